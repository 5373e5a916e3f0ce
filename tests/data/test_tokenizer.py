import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, processors

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.tokenizer import SPECIAL, growth, load_tokenizer, train_tokenizer
from tests.helpers.shards import caption

CAPTIONS = [caption(i) for i in range(40)]


def test_a_json_tokenizer_is_loaded(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file, 8)
    ids = tokenizer.encode("Red CAT, red  dög")
    assert [tokenizer.token(i) for i in ids[:2]] == ["red", "cat"]
    assert tokenizer.token(ids[2]) == "[UNK]"  # the training captions contain no comma
    assert ids.dtype == "int64"
    assert not set(ids[:2]) & set(range(len(SPECIAL)))
    assert tokenizer.decode(tokenizer.encode("red houses")) == "red houses"
    assert tokenizer.token(10**6) == ""


def test_long_captions_are_truncated_and_empty_captions_have_no_tokens(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file, 5)
    assert len(tokenizer.encode("red " * 50)) == 5
    assert tokenizer.encode("").shape == tokenizer.encode(" \n\t").shape == (0,)


def test_padding_and_truncation_settings_of_a_tokenizer_file_are_ignored(tmp_path, tokenizer_file):
    plain = load_tokenizer(tokenizer_file, 8)
    other = Tokenizer.from_file(tokenizer_file)
    other.enable_padding(length=20)
    other.enable_truncation(2)
    special = [(word, other.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
    other.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=special)
    other.save(str(tmp_path / "other.json"))
    found = load_tokenizer(str(tmp_path / "other.json"), 8)
    assert found.encode("red cat dog").tolist() == plain.encode("red cat dog").tolist()


def test_token_ids_may_have_gaps(tmp_path):
    """A vocabulary from which words were removed has gaps. The model's table has a row for each id up to the
    highest."""
    Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 7}, unk_token="[UNK]")).save(str(tmp_path / "gaps.json"))
    tokenizer = load_tokenizer(str(tmp_path / "gaps.json"), 8, vocab_size=8)
    assert max(tokenizer.encode("cat")) < tokenizer.vocab_size == 8
    with pytest.raises(UserError, match=r"has 8 tokens but model\.vocab_size is 2"):
        load_tokenizer(str(tmp_path / "gaps.json"), 8, vocab_size=2)


def test_a_vocab_txt_file_is_loaded(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##believ", "##able", "cat", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(str(tmp_path / "vocab.txt"), 8, vocab_size=10)
    assert tokenizer.encode("Unbelievable Cät! xyz").tolist() == [5, 6, 7, 8, 9, 1]
    assert tokenizer.decode([5, 6, 7, 8]) == "unbelievable cat"


def test_invalid_tokenizers_are_refused(tmp_path, tokenizer_file, monkeypatch):
    size = load_tokenizer(tokenizer_file, 8).vocab_size
    assert load_tokenizer(tokenizer_file, 8, vocab_size=size).vocab_size == size
    with pytest.raises(UserError, match=f"has {size} tokens but model.vocab_size is 30522"):
        load_tokenizer(tokenizer_file, 8, vocab_size=30522)
    for name, content in (("a.json", "{}"), ("b.json", "no json"), ("vocab.txt", "cat\ndog\n"), ("empty.txt", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="not a tokenizer"):
            load_tokenizer(str(tmp_path / name), 8)
    Tokenizer(models.WordLevel({"cat": 0}, unk_token="[UNK]")).save(str(tmp_path / "knows-all.json"))
    with pytest.raises(UserError, match=r"fails on unknown words .* define an unknown token in it"):
        load_tokenizer(str(tmp_path / "knows-all.json"), 8)
    for name in ("none.json", "none/vocab.txt", str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(UserError, match="no such file"):
            load_tokenizer(name, 8)

    def offline(name, file, **_):
        raise OSError("no network")

    monkeypatch.setattr("m3ae_fast.batch.tokenizer.hub_answers", lambda name: True)
    monkeypatch.setattr("m3ae_fast.batch.tokenizer.hf_hub_download", offline)
    with pytest.raises(UserError, match="bert-base-uncased: is neither a file nor available from the Hugging Face Hub"):
        load_tokenizer("bert-base-uncased", 8)


def test_a_tokenizer_is_loaded_from_the_hub(tokenizer_file, monkeypatch):
    for answers in (True, False):
        monkeypatch.setattr("m3ae_fast.batch.tokenizer.hub_answers", lambda name, answers=answers: answers)
        hub = {("org/name", "tokenizer.json"): {not answers: tokenizer_file}}
        download = lambda *what, local_files_only: hub[what][local_files_only]  # noqa: E731, B023
        monkeypatch.setattr("m3ae_fast.batch.tokenizer.hf_hub_download", download)
        assert load_tokenizer("org/name", 8).encode("cat").shape == (1,)


def test_tokenizer_training_is_deterministic():
    trained = [train_tokenizer(CAPTIONS, 100).to_str() for _ in range(3)]
    assert trained[0] == trained[1] == trained[2]
    vocab = Tokenizer.from_str(trained[0]).get_vocab()
    assert [vocab[token] for token in SPECIAL] == list(range(len(SPECIAL)))
    assert {"red", "house", "##r", "r"} <= set(vocab)


RULES = st.one_of(
    st.builds(normalizers.Replace, st.sampled_from(["a", "b"]), st.text("ab", max_size=5)),
    st.builds(normalizers.Replace, st.sampled_from([Regex("a"), Regex("[ab]")]), st.text("ab", max_size=5)),
    st.builds(normalizers.Prepend, st.text("ab", min_size=1, max_size=5)),
    st.just(normalizers.Lowercase()),
)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    rules=st.recursive(
        RULES, lambda own: st.builds(normalizers.Sequence, st.lists(own, min_size=1, max_size=3)), max_leaves=4
    )
)
def test_no_rules_expand_a_character_beyond_the_computed_growth(rules):
    state = json.loads(rules.__getstate__())
    assert len(rules.normalize_str("a")) <= growth(state)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_the_computed_growth_of_a_character_is_exact(lengths):
    """The rules replace a character by several copies of itself."""
    rules = normalizers.Sequence([normalizers.Replace("a", "a" * length) for length in lengths])
    assert len(rules.normalize_str("a")) == growth(json.loads(rules.__getstate__())) == math.prod(lengths)


def test_only_the_special_tokens_are_marked_as_special():
    tokenizer = train_tokenizer(CAPTIONS, 100)
    assert {token.content for token in tokenizer.get_added_tokens_decoder().values()} == set(SPECIAL)


def test_the_committed_tokenizer_fits_its_captions(store):
    from m3ae_fast.shards.problem_counts import Tally
    from m3ae_fast.shards.tokenizer_training import caption_texts as captions_of

    folder = Path(__file__).parents[2] / "data" / "openclipart"
    captions = list(captions_of([str(folder / "train-{0000..0002}.tar")], store, Tally()))
    assert len(captions) == 1536
    assert train_tokenizer(captions, 2048).to_str() == Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()
