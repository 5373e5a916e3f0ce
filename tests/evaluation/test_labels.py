import json

import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.labels import class_names, label_corpus, read_labels
from m3ae_fast.data.reader import Reader
from tests.helpers.labelled import labelled_members, labelled_tar
from tests.helpers.shards import write_tar


@pytest.fixture
def opened(tmp_path):
    """Return a function that writes samples with the given numbers and labels, and returns their dataset. Each argument
    is a tuple, (numbers, labels) or (numbers,), and becomes a shard."""

    def make(*shards):
        paths = [labelled_tar(tmp_path / f"{i}.tar", *shard) for i, shard in enumerate(shards)]
        return open_corpus([SourceConfig(shards=paths)], ShardStore(tmp_path / "cache"))

    return make


def test_labels_are_read_from_cls_and_json(opened):
    corpus = opened((range(4),), (range(4, 6),), (range(6, 7),))
    assert read_labels(corpus, "cls") == read_labels(corpus, "json.label") == [[0, 1, 2, 0, 1, 2, 0]]
    assert read_labels(corpus, "json.name") == [["blue", "green", "red", "blue", "green", "red", "blue"]]
    assert read_labels(corpus, "json.other") == [[None] * 7]


def test_figures_show_class_names(tmp_path, opened):
    """classes.json next to the shards takes precedence over class_name in the samples. Text labels are names
    already."""

    def corpus(name, class_names):
        files = dict(labelled_members(range(6)))
        for number, written in class_names.items():
            files[f"{number:05d}.json"] = json.dumps({"class_name": written, "label": number % 3}).encode()
        path = write_tar(tmp_path / f"{name}.tar", files.items())
        return label_corpus(open_corpus([SourceConfig(shards=path)], ShardStore(tmp_path / "cache")), "cls")

    assert class_names(*corpus("none", {})) == ["0", "1", "2"]
    assert class_names(*corpus("some", {0: "cat", 3: "cat", 5: "emu"})) == ["cat", "1", "emu"]
    # a name that two labels share is not used
    assert class_names(*corpus("two", {0: "cat", 3: "dog"})) == ["0", "1", "2"]
    assert class_names(*label_corpus(opened((range(4),)), "json.name")) == ["blue", "green", "red"]
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    assert class_names(*corpus("listed", {0: "cat"})) == ["a", "b", "c"]
    (tmp_path / "classes.json").write_text("[broken")
    assert class_names(*corpus("broken", {0: "cat"})) == ["cat", "1", "2"]


def test_labels_become_ids_in_sorted_order_and_the_label_minus_one_excludes_a_sample(opened):
    corpus = opened((range(4), {1: -1}), (range(4, 8), {4: -1, 5: -1}))
    found, classes = label_corpus(corpus, "cls")
    assert (list(classes), found.samples, [sizes.tolist() for sizes in found.sizes]) == ([0, 1, 2], 5, [[3, 2]])
    assert found.sources[0].labels.tolist() == [0, 2, 0, 0, 1]
    reader = Reader(found.sources[0], found.store)
    assert [reader.key(*reader.find(i)) for i in range(5)] == ["00000", "00002", "00003", "00006", "00007"]
    gaps, classes = label_corpus(opened((range(6), {2: 7, 5: 7})), "cls")
    assert (classes, gaps.sources[0].labels.tolist()) == ([0, 1, 7], [0, 1, 2, 0, 1, 2])
    whole, names = label_corpus(opened((range(4),)), "json.name")
    assert (names, whole.sources[0].labels.tolist()) == (["blue", "green", "red"], [0, 1, 2, 0])


def test_unlabelled_samples_stay_excluded_if_a_damaged_index_is_rebuilt(opened):
    found, _ = label_corpus(opened((range(4), {1: -1}), (range(4, 8),)), "cls")
    sidecar = found.sources[0].shards[0].sidecar
    sidecar.write_bytes(sidecar.read_bytes()[:-1])
    reader = Reader(found.sources[0], found.store)
    assert [reader.key(*reader.find(i)) for i in range(3)] == ["00000", "00002", "00003"]


def test_a_shard_without_labelled_samples_is_excluded(opened):
    found, _ = label_corpus(opened((range(3), {0: -1, 1: -1, 2: -1}), (range(3),)), "cls")
    assert found.sizes == [[3]]


def test_validation_labels_use_the_class_ids_of_training(opened):
    found, _ = label_corpus(opened((range(2),)), "json.name", ["amber", "blue", "green"])
    assert found.sources[0].labels.tolist() == [1, 2]
    with pytest.raises(UserError, match="no training sample has the label 'green'"):
        label_corpus(opened((range(2),)), "json.name", ["amber", "blue"])
    with pytest.raises(UserError, match="no training sample has the label 1"):
        label_corpus(opened((range(2),)), "cls", [0, 2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {3: None},
            "1 of 6 samples have no label .*, for example .*0.tar/00003; the samples have neither .cls nor .json "
            r"\(the files of a sample must be adjacent in the tar file\): label these samples",
        ),
        (dict.fromkeys(range(6), -1), "no sample has a label .* other than -1"),
        (dict.fromkeys(range(6), 2), "all samples have the label 2 .*; at least two classes"),
        ({2: -5}, "the label -5 .* is out of range"),
        ({2: 1 << 30}, "the label 1073741824 .* is out of range"),
        ({2: "red"}, "00002: its cls member must be an integer of at most 18 digits, but is 'red'"),
    ],
)
def test_invalid_labels_are_reported_in_one_line(opened, labels, message):
    with pytest.raises(UserError, match=message) as error:
        label_corpus(opened((range(6), labels)), "cls")
    assert "\n" not in str(error.value)


def test_the_error_for_a_missing_label_field_lists_the_existing_fields(opened):
    with pytest.raises(UserError, match=r"0\.tar/00000; the samples have cls, json.name, json.label: choose one"):
        label_corpus(opened((range(3),)), "json.colour")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"label": {}}', "must be an integer or text"),
        (
            b'{"label": [1]}',
            "json.label is a list; lists of labels are supported only by evaluate knn, logistic and attentive",
        ),
        (
            b'{"label": 9223372036854775808}',
            "json.label is 9223372036854775808, which does not fit into a 64-bit integer",
        ),
        (b'{"label": -9223372036854775809}', "which does not fit into"),
    ],
)
def test_json_without_a_label_is_named(tmp_path, text, message):
    files = [*labelled_members(range(2)), ("7.png", next(labelled_members([7]))[1]), ("7.json", text)]
    path = write_tar(tmp_path / "a.tar", files)
    corpus = open_corpus([SourceConfig(shards=path)], ShardStore(tmp_path / "cache"))
    with pytest.raises(UserError, match=message):
        label_corpus(corpus, "json.label")


def test_an_invalid_label_field_is_refused(opened):
    with pytest.raises(UserError, match=r"must be cls, or json.FIELD"):
        read_labels(opened((range(3),)), "json.")


@pytest.mark.parametrize("count", [2, 3])
def test_mixed_labels_are_refused(opened, count):
    with pytest.raises(UserError, match=r"some labels .* are integers and some are text"):
        label_corpus(opened((range(count), {1: "two"})), "json.label")


def test_a_missing_label_is_found_in_the_last_of_several_sources(tmp_path):
    paths = [labelled_tar(tmp_path / f"{i}.tar", range(3), {} if i < 2 else {1: None}) for i in range(3)]
    corpus = open_corpus([SourceConfig(shards=path) for path in paths], ShardStore(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"1 of 9 samples have no label .*, for example .*2\.tar/00001;"):
        label_corpus(corpus, "cls")
