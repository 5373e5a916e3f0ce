"""An untrusted or damaged file leads to an error of one line, or to a sample that is skipped and counted, but never to
a traceback or an endless wait. Hypothesis generates the examples. It generates the same ones in each run
(derandomize=True)."""

import hashlib
import json
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from m3ae_fast import checkpoint
from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.metrics_file import METRICS_FILE
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.checkpoint.state_files import STATE_FILE, TABLE_FILE
from m3ae_fast.cli.shards import main as data
from m3ae_fast.config import Config, ModelConfig, SourceConfig, load_config, parse
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.tar import scan_tar
from m3ae_fast.evaluation.run_report import read_results
from m3ae_fast.heads.classifier import read_config
from m3ae_fast.model.pretrained import read_pretrained
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.output_claim import claimed
from m3ae_fast.shards.sources.hdf5 import Hdf5
from m3ae_fast.training.metrics_log import RunLog
from m3ae_fast.verify.golden import Golden
from m3ae_fast.vqgan.model import VQGAN
from m3ae_fast.weights.from_mae_or_timm import ViTOptions
from m3ae_fast.weights.importing import read_source
from tests.helpers.checkpoints import changes_of, save
from tests.helpers.shards import members, write_tar
from tests.helpers.trainer import CLIPART, TINY

pytestmark = pytest.mark.slow


def fuzz(examples: int):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["auto", "large"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def one_line(error: UserError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 2000, error


def damaged(data: bytes, cut: int, edits: list[tuple[int, bytes]]) -> bytes:
    """Return `data` without its last `cut` bytes and overwritten by `edits`."""
    out = bytearray(data[: max(0, len(data) - cut)])
    for position, piece in edits:
        start = position % max(1, len(out))
        out[start : start + len(piece)] = piece
    return bytes(out)


DAMAGE = (
    st.integers(0, 4000) | st.just(0),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=40)), max_size=4),
)


def keys(value, path=()):
    """Return the paths to all values of nested dicts."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from keys(inner, (*path, key))


WHOLE = parse(Config, TINY, "").model_dump(mode="json")


@fuzz(300)
@given(where=st.sampled_from(sorted(keys(WHOLE))), value=JSON, drop=st.booleans())
def test_any_value_in_any_field_of_a_config_is_accepted_or_refused_in_one_line(tmp_path, where, value, drop):
    data = json.loads(json.dumps(WHOLE))
    node = data
    for key in where[:-1]:
        node = node[key]
    node.pop(where[-1]) if drop else node.update({where[-1]: value})
    (tmp_path / "config.json").write_text(json.dumps(data))
    try:
        load_config(tmp_path / "config.json")
    except UserError as error:
        one_line(error)


NESTED = st.just(0) | st.integers(0, 3000)


@fuzz(300)
@given(content=JSON, section=st.sampled_from([None, *WHOLE]), nested=NESTED, brackets=st.booleans())
@example(content={"\n": 1}, section="run", nested=0, brackets=True)
@example(content={"x" * 9999: 1}, section=None, nested=0, brackets=True)
def test_any_json_as_a_config_or_section_is_accepted_or_refused_in_one_line(
    tmp_path, content, section, nested, brackets
):
    """The result is a Config or a one-line error, even for the deepest nesting that Python or pydantic allow."""
    path = tmp_path / "config.json"
    text = json.dumps(content if section is None else WHOLE | {section: content})
    before, after = ("[", "]") if brackets else ('{"run":', "}")
    path.write_text(before * nested + text + after * nested)
    try:
        assert isinstance(load_config(path), Config)
    except UserError as error:
        one_line(error)


@fuzz(100)
@given(text=st.binary(max_size=60), cut=DAMAGE[0], edits=DAMAGE[1], override=st.text(max_size=30))
@example(text=b"", cut=0, edits=[], override="run\nning")
@example(text=b"", cut=0, edits=[], override="train.steps.\n" + "x" * 9999 + "=1")
def test_any_bytes_as_a_config_and_any_override_are_accepted_or_refused_in_one_line(
    tmp_path, text, cut, edits, override
):
    path = tmp_path / "config.json"
    for content in (text, damaged(json.dumps(TINY).encode(), cut, edits), b"[" * 100_000):
        path.write_bytes(content)
        try:
            load_config(path, [override])
        except UserError as error:
            one_line(error)


def header(fields: dict[int, bytes], name: str = "0.jpg") -> bytes:
    """Return a tar header with `fields` written at their offsets and a correct checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    for start, value in fields.items():
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SIZES = st.sampled_from(
    [b"77777777777\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80" + b"\0" * 10 + b"\x09", b" " * 12]
)
PAX_SIZES = st.sampled_from(["9" * 5000, str(1 << 63), "-1", "1e3", "", "٣", "3", "0" * 30 + "3"])


@fuzz(200)
@given(
    size=SIZES | st.binary(min_size=12, max_size=12),
    kind=st.sampled_from(b"0\0x7gLK1235"),
    pax=PAX_SIZES,
    length=st.sampled_from(["9" * 5000, "0", "-3", "12", "\xff"]) | st.just(None),
    other=st.dictionaries(st.integers(0, 147), st.binary(max_size=12), max_size=3),
)
def test_any_field_of_a_tar_header_causes_no_unexpected_error(tmp_path, size, kind, pax, length, other):
    """A valid member precedes a pax record and a member with an arbitrary header and a correct checksum."""
    record = f" size={pax}\n"
    record = f"{len(record) + 2 if length is None else length}{record}".encode("utf-8", "surrogateescape")
    good = (tmp_path / "good.tar").read_bytes() if (tmp_path / "good.tar").exists() else None
    if good is None:
        good = Path(write_tar(tmp_path / "good.tar", members([1]))).read_bytes()[:-10240].rstrip(b"\0")
        good += b"\0" * (-len(good) % 512)
    pax_header = header({156: b"x", 124: b"%011o\0" % len(record)})
    hostile = header(other | {124: size, 156: bytes([kind])})
    path = tmp_path / "hostile.tar"
    path.write_bytes(good + pax_header + record + b"\0" * (-len(record) % 512) + hostile + b"\xff\xd8data" * 99)
    read_all(path, ShardStore(tmp_path / "cache"))


def read_all(path: Path, store: ShardStore) -> int:
    """Read a shard as training does, and return the number of samples that could be read."""
    try:
        corpus = open_corpus([SourceConfig(shards=str(path))], store)
    except UserError as error:
        one_line(error)
        return 0
    reader = Reader(corpus.sources[0], store)
    read = 0
    for sample in range(corpus.samples):
        shard, row = reader.find(sample)
        try:
            assert reader.key(shard, row).isprintable()
            reader.read(shard, row)
            read += 1
        except (BadSample, OSError) as error:
            assert "\n" not in str(error)
    return read


@fuzz(150)
@given(cut=DAMAGE[0], edits=DAMAGE[1])
def test_any_damage_to_a_tar_causes_no_unexpected_error(tmp_path, cut, edits):
    whole = tmp_path / "whole.tar"
    if not whole.exists():
        write_tar(whole, members(range(4)))
    path = tmp_path / "damaged.tar"
    path.write_bytes(damaged(whole.read_bytes(), cut, edits))
    found, reason = scan_tar(path)
    assert reason is None or "\n" not in reason
    assert all(member.offset + member.size <= 1 << 61 for member in found)
    assert read_all(path, ShardStore(tmp_path / "cache")) <= 8


@fuzz(100)
@given(
    cut=DAMAGE[0],
    edits=DAMAGE[1],
    field=st.sampled_from(["version", "size", "samples", "images", "damage"]),
    value=JSON,
)
def test_any_damage_to_a_sidecar_causes_no_unexpected_error(tmp_path, cut, edits, field, value):
    """A sidecar that is recognisably wrong is written again, and all samples are read."""
    path, store = tmp_path / "a.tar", ShardStore(tmp_path / "cache")
    if not path.exists():
        write_tar(path, members(range(4)))
    sidecar = Path(f"{path}.index")
    sidecar.unlink(missing_ok=True)
    index_shards([str(path)], store)
    summary, _, table = sidecar.read_bytes().partition(b"\n")
    sidecar.write_bytes(damaged(sidecar.read_bytes(), cut, edits))
    read_all(path, store)
    edited = json.dumps(json.loads(summary) | {field: value}).encode()
    for content in (edited + b"\n" + table, summary + b"\n" + damaged(table, cut, []), b"{" * 100_000, edited):
        sidecar.write_bytes(content)
        read_all(path, store)
    sidecar.write_bytes(summary + b"\n" + damaged(table, cut + 1, []))
    assert read_all(path, store) == 4


@pytest.mark.parametrize(
    "descr", ["[('key', 'O')]", "{'a': 1}", "'<i8'", "[" * 200, "__import__('os')", "[('key', '|S0')]"]
)
def test_a_sidecar_with_a_table_of_another_dtype_is_rebuilt(tmp_path, store_with_shard, descr):
    path, store, sidecar = store_with_shard
    summary = sidecar.read_bytes().partition(b"\n")[0]
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': ({1 << 50},)}}\n".encode()
    sidecar.write_bytes(summary + b"\n\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    assert read_all(path, store) == 4


@pytest.fixture
def store_with_shard(tmp_path):
    path, store = Path(write_tar(tmp_path / "a.tar", members(range(4)))), ShardStore(tmp_path / "cache")
    index_shards([str(path)], store)
    return path, store, Path(f"{path}.index")


STATE = {"model/w": torch.arange(6.0).view(2, 3), "exp_avg/w": torch.ones(2, 3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    return save(run, STATE, checkpoint.Info(3, 48, 42, WHOLE, {"torch": "2"}, {"data.train": "1"}), keep=9)


def open_checkpoint(path: Path) -> None:
    """Open a checkpoint in all the ways that programs do."""
    try:
        info = checkpoint.read_info(path)
        changes_of(path, info, parse(Config, TINY, "tiny"), {"data.train": "1"})
        parse(ModelConfig, info.config.get("model"), f"checkpoint {path}")
        parse(Config, info.config, f"checkpoint {path}")
        checkpoint.open_state(path).check({name: tuple(t.shape) for name, t in STATE.items()})
        state = checkpoint.read_weights(path)
        assert state["w"].shape == (2, 3)
    except UserError as error:
        one_line(error)


@fuzz(200)
@given(
    where=st.sampled_from(
        sorted(keys({"step": 0, "seed": 0, "versions": {}, "stream": {}, "sha256": {}, "config": WHOLE}))
    ),
    value=JSON,
)
def test_any_value_in_any_field_of_a_state_json_causes_no_unexpected_error(tmp_path, saved, where, value):
    data = json.loads((saved / checkpoint.INFO_FILE).read_text())
    node = data
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    path = tmp_path / saved.name
    path.mkdir(exist_ok=True)
    (path / checkpoint.INFO_FILE).write_text(json.dumps(data))
    for file in (STATE_FILE, TABLE_FILE):
        (path / file).write_bytes((saved / file).read_bytes())
    open_checkpoint(path)


@fuzz(100)
@given(
    cut=st.integers(0, 300),
    edits=DAMAGE[1],
    sums=st.sampled_from(["as saved", "of the damaged file", "none"]),
    head=st.integers(0, (1 << 64) - 1),
)
def test_any_damage_to_the_files_of_a_checkpoint_causes_no_unexpected_error(tmp_path, saved, cut, edits, sums, head):
    path = tmp_path / saved.name
    path.mkdir(exist_ok=True)
    info = json.loads((saved / checkpoint.INFO_FILE).read_text())
    whole = (saved / STATE_FILE).read_bytes()
    (path / TABLE_FILE).write_bytes((saved / TABLE_FILE).read_bytes())
    for content in (damaged(whole, cut, edits), head.to_bytes(8, "little") + whole[8:]):
        (path / STATE_FILE).write_bytes(content)
        of_it = info["sha256"] | {STATE_FILE: hashlib.sha256(content).hexdigest()}
        sha256 = {"as saved": info["sha256"], "of the damaged file": of_it, "none": {}}[sums]
        (path / checkpoint.INFO_FILE).write_text(json.dumps(info | {"sha256": sha256}))
        open_checkpoint(path)
        if sums == "as saved" and content != whole:
            with pytest.raises(UserError, match="is damaged"):
                checkpoint.open_state(path)
    (path / checkpoint.INFO_FILE).write_bytes(damaged(json.dumps(info).encode(), cut, edits))
    open_checkpoint(path)


def test_a_pipe_in_place_of_a_checkpoints_state_is_refused_without_waiting(tmp_path, saved):
    path = tmp_path / saved.name
    path.mkdir()
    (path / checkpoint.INFO_FILE).write_bytes((saved / checkpoint.INFO_FILE).read_bytes())
    os.mkfifo(path / STATE_FILE)
    (path / TABLE_FILE).write_bytes((saved / TABLE_FILE).read_bytes())
    for read in (checkpoint.open_state, checkpoint.read_weights):
        with pytest.raises(UserError, match=r"state\.safetensors is damaged .*is not a regular file"):
            read(path)


@fuzz(60)
@given(lines=st.lists(st.binary(max_size=30) | JSON.map(lambda v: json.dumps({"step": v}).encode()), max_size=6))
def test_arbitrary_metrics_of_an_earlier_attempt_do_not_break_the_log(tmp_path, lines):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b"\n".join([*lines, b"[" * 100_000, b'{"step": 1, "loss": 2.0}', b'{"step": 7}', b'{"st']))
    with RunLog(tmp_path, 3, 9) as log:
        log.log(4, {"loss": 1.0})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps[-2:] == [1, 4] and all(not math.isnan(step) and step <= 4 for step in steps)


@fuzz(60)
@given(
    where=st.sampled_from(["model", "normalizer", "pre_tokenizer", "decoder", "added_tokens"]),
    value=JSON,
    cut=DAMAGE[0],
    edits=DAMAGE[1],
)
def test_any_tokenizer_file_is_loaded_or_refused_in_one_line(tmp_path, where, value, cut, edits):
    whole = (CLIPART / "tokenizer.json").read_bytes()
    path = tmp_path / "tokenizer.json"
    for content in (json.dumps(json.loads(whole) | {where: value}).encode(), damaged(whole, cut, edits)):
        path.write_bytes(content)
        try:
            ids = load_tokenizer(str(path), 16, 2048).encode("a red cat \N{SNOWMAN}")
            assert ids.dtype == np.int64 and (not len(ids) or 0 <= ids.min() <= ids.max() < 2048)
        except UserError as error:
            one_line(error)


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    "rule",
    [
        _replace({"String": "a"}, "a" * 10),
        _replace({"Regex": "(?=a)"}, "aa"),
        _replace({"String": ""}, "bb"),
        {"type": "Prepend", "prepend": "a" * 99},
    ],
    ids=lambda rule: json.dumps(rule)[:50],
)
def test_a_tokenizer_whose_rules_would_fill_the_memory_is_refused(tmp_path, part, rule):
    data = json.loads((CLIPART / "tokenizer.json").read_text())
    parts = {"type": "Sequence", f"{part}s": [rule] * 4}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {part: {"type": "Sequence", f"{part}s": [parts] * 4}}))
    with pytest.raises(UserError, match=f"rules of its {part} may expand one character into more than 4,096"):
        load_tokenizer(str(tmp_path / "tokenizer.json"), 16)


def test_a_tokenizer_with_the_rules_of_a_published_one_is_accepted(tmp_path):
    data = json.loads((CLIPART / "tokenizer.json").read_text())
    rules = [{"type": "Prepend", "prepend": "\u2581"}, _replace({"String": " "}, "\u2581"), {"type": "NFKD"}]
    rules += [_replace({"Regex": "\\s+"}, " "), _replace({"String": "``"}, '"')]
    data["normalizer"] = {"type": "Sequence", "normalizers": rules}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert len(load_tokenizer(str(tmp_path / "tokenizer.json"), 16).encode("a red cat"))


def test_a_panic_of_the_tokenizers_library_is_reported_in_one_line(tmp_path):
    data = json.loads((CLIPART / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="the library panics") as caught:
        load_tokenizer(str(tmp_path / "tokenizer.json"), 16)
    one_line(caught.value)


def test_a_tokenizer_with_a_duplicate_id_is_refused(tmp_path):
    data = json.loads((CLIPART / "tokenizer.json").read_text())
    words = data["model"]["vocab"]
    words[max(words, key=words.get)] = 7
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="have the same id 7"):
        load_tokenizer(str(tmp_path / "tokenizer.json"), 16)


READERS = {
    METRICS_FILE: lambda path: RunLog(path.parent, 3, 9).begin(),
    "a.tar": lambda path: open_corpus([SourceConfig(shards=str(path))], ShardStore(path.parent)),
    "tokenizer.json": lambda path: load_tokenizer(str(path), 16),
    "run.json": load_config,
    "config.json": lambda path: read_pretrained(path.parent),
    "config.json of a VQGAN": lambda path: VQGAN.from_pretrained(path.parent),
    "config.json of a classifier": lambda path: read_config(path.parent),
    "config.json of timm": lambda path: read_source(str(path.parent), ViTOptions()),
    "result.json": lambda path: read_results([path.parent]),
    "state.json": lambda path: checkpoint.read_info(path.parent),
    "classes.json": lambda path: data(
        ["make", str(path.parent), "--out", str(path.parent / "out"), "--classes", str(path)]
    ),
    "config.json of stats --write": lambda path: data(["stats", "a.tar", "--write", str(path)]),
    "a_stats.json": lambda path: data(
        ["table", write_tar(path.parent / "a.tar", []), "--stats", "--out", str(path.parent / "a.npy")]
    ),
    "conversion.json": lambda path: claimed(path.parent, {"source": {"kind": "folder"}}, None).__enter__(),
    "model.pkl": lambda path: read_source(str(path), ViTOptions()),
    "golden.npz": Golden.load,
    "data.hdf5": lambda path: Hdf5(path, SourceOptions()),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(tmp_path, reader):
    path = tmp_path / reader.partition(" ")[0]
    os.mkfifo(path)
    with pytest.raises(UserError) as caught:
        READERS[reader](path)
    one_line(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("reader", [name for name in READERS if Path(name.partition(" ")[0]).suffix == ".json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"model":' * 100_000, b'{"a": 1, "a": 2}', None])
def test_json_that_is_a_folder_or_too_deep_is_reported_in_one_line(tmp_path, reader, content):
    path = tmp_path / reader.partition(" ")[0]
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        READERS[reader](path)
    one_line(caught.value)
    assert str(tmp_path) in str(caught.value)
