"""The words of a caption are located with every kind of tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from m3ae_fast.batch.tokenizer import CaptionTokenizer, train_tokenizer
from m3ae_fast.drawing.attention import words_of
from m3ae_fast.drawing.figures import GREEN
from m3ae_fast.drawing.reconstructions import caption_views

CAPTIONS = [
    "a red house by the sea",
    "I do not see the Red dog",
    "it's a café, a t-shirt and a hot dog",
    "日本 é 🙂",
] * 3


def word_piece():
    return train_tokenizer(CAPTIONS, 60)


def word_piece_without_decoder():
    tokenizer = word_piece()
    tokenizer.decoder = None
    return tokenizer


def byte_level():
    """Return a byte-level tokenizer like those of GPT-2 and CLIP."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    return tokenizer


def sentence_piece():
    """Return a SentencePiece tokenizer like that of T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


def llama():
    """Return a tokenizer without a pre-tokenizer, which treats a caption as one word."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


@pytest.mark.parametrize("make", [word_piece, word_piece_without_decoder, byte_level, sentence_piece, llama])
def test_words_are_found_with_any_tokenizer(make):
    tokenizer = CaptionTokenizer(make(), 64)

    def found(caption, word=None):
        ids = tokenizer.encode(caption).tolist()
        pieces = tokenizer.pieces(ids)
        words = words_of(tokenizer, ids, word)
        for each in words:
            assert each.text in "".join(pieces[i] for i in each.tokens)
        return [each.text.lower() for each in words], words, pieces

    assert found("a red house by the red sea")[0] == ["a", "red", "house", "by", "the", "sea"]
    for word in ("house", "House", "HOUSE"):
        names, (only,), pieces = found("a red house by the sea", word)
        assert names == ["house"] and "".join(pieces[i] for i in only.tokens).strip() == "house"
    assert found("I do not see the Red dog", "not")[0] == ["not"]
    assert found("I do not see the Red dog", "red")[0] == ["red"]
    assert found("a hot dog", "hot dog")[0] == ["hot dog"]
    assert not found("a red house by the sea", "hous")[0] and not found("a red house", "dog")[0]
    (name,), _, _ = found("it's a café, a t-shirt and a hot dog", "t-shirt")
    assert name.replace(" ", "") == "t-shirt"
    first, second = (found(text, "dog")[1][0].tokens for text in ("a dog, a dog", "the sea, a dog"))
    assert min(first) < min(second)


@pytest.mark.parametrize("make", [word_piece, word_piece_without_decoder, byte_level, sentence_piece, llama])
def test_captions_are_drawn_without_the_markers_of_the_tokenizer(make):
    tokenizer, caption = CaptionTokenizer(make(), 64), "a red house by the sea"
    tokens = torch.from_numpy(tokenizer.encode(caption))
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    mask[1] = True
    views = caption_views(tokens, mask, {1: int(tokens[1])}, tokenizer)
    for name in ("caption", "predicted"):
        assert "".join(piece for piece, _ in views[name]) == caption
    assert views["masked"][1][0] == " ___" and [colour for _, colour in views["predicted"]].count(GREEN) == 1


def test_a_character_of_several_tokens_belongs_to_its_last_token():
    tokenizer = CaptionTokenizer(byte_level(), 64)
    ids = tokenizer.encode("a 🙃 dog").tolist()
    pieces = tokenizer.pieces(ids)
    assert "".join(pieces) == "a 🙃 dog" and len(ids) > 4
    (word,) = words_of(tokenizer, ids, "dog")
    assert "".join(pieces[i] for i in word.tokens) == " dog"


def test_unknown_tokens_are_not_words():
    tokenizer = CaptionTokenizer(word_piece(), 64)
    assert [word.text for word in words_of(tokenizer, tokenizer.encode("a Ж dog").tolist(), None)] == ["a", "dog"]
