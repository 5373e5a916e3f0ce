"""Tokenisation of captions into ids, without special tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hub import hub_answers
from m3ae_fast.base.untrusted_file import read_json

MAX_GROWTH = 4096  # maximum number of characters into which rules may expand one character; common rules produce 2
UNKNOWN = "[UNK]"
SPECIAL = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")


class CaptionTokenizer:
    """A tokenizer that truncates captions to `max_length` tokens and adds no special tokens."""

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.max_length = max_length

    @property
    def vocab_size(self) -> int:
        """Return the highest token id + 1."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def shared_id(self) -> tuple[str, str, int] | None:
        """Return two tokens with the same id, together with this id; None if all ids differ."""
        words: dict[int, str] = {}
        for word, number in self._tokenizer.get_vocab().items():
            if number in words:
                return min(words[number], word), max(words[number], word), number
            words[number] = word
        return None

    @property
    def definition(self) -> str:
        """Return the complete tokenizer as the text of a tokenizer.json."""
        return self._tokenizer.to_str()

    def encode(self, caption: str) -> np.ndarray:
        """Return token ids, int64 [n], n <= max_length. Raises BadSample if the library fails on the caption."""
        try:
            with _panics_as_errors():
                ids = self._tokenizer.encode(caption, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exceptions
            raise BadSample(f"the tokenizer fails on the caption: {_line(error)}") from None
        return np.array(ids[: self.max_length], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the part of a caption's text that each of its tokens adds, including the space before a word. This
        works for any tokenizer. A character that consists of several tokens belongs to the last of them."""
        decode: Callable[[Sequence[int]], str] = self.decode
        model = self._tokenizer.model
        # the usual decoder of WordPiece would change text, for example "do not" to "don't"
        if isinstance(model, models.WordPiece):
            word_pieces = decoders.WordPiece(model.continuing_subword_prefix, cleanup=False)
            decode = lambda ids: word_pieces.decode([self.token(each) for each in ids])  # noqa: E731
        texts = [decode(ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}") for end in range(len(ids) + 1)]
        return [text[len(before) :] for before, text in pairwise(texts)]

    def is_special(self, token_id: int) -> bool:
        """Return whether a token represents no text of its own, like the token for unknown words."""
        added = self._tokenizer.get_added_tokens_decoder().get(token_id)
        return self.token(token_id) in SPECIAL or (added is not None and added.special)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json. Raises OSError if that fails."""
        write_tokenizer(self._tokenizer, path)

    def token(self, token_id: int) -> str:
        """Return the vocabulary entry of an id; "" if there is none."""
        return self._tokenizer.id_to_token(int(token_id)) or ""


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json. Raises OSError if that fails; the library's own method raises a plain Exception."""
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def load_tokenizer(
    name: str, max_length: int, vocab_size: int | None = None, label: str = "data.tokenizer"
) -> CaptionTokenizer:
    """Load a tokenizer that truncates captions to `max_length` tokens: from a `tokenizer.json`, from a BERT `vocab.txt`
    (lower-cased), or by name, such as `bert-base-uncased`, from the Hugging Face Hub. `vocab_size`: number of rows of
    the model's text embedding; None: any. `label`: beginning of error messages. Raises UserError if the tokenizer is
    not found or cannot be used, or if its vocabulary does not fit the model."""
    path = _find(name, label)
    try:
        with _panics_as_errors():
            tokenizer = _from_vocab(path) if path.suffix == ".txt" else _from_json(path)
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{label} {name}: is not a tokenizer.json or a BERT vocab.txt ({_line(error)})") from None
    captions = CaptionTokenizer(tokenizer, max_length)
    try:
        captions.encode("\N{SNOWMAN}xqzj \N{CJK UNIFIED IDEOGRAPH-9F98}")
    except BadSample as error:
        reason = f"the tokenizer fails on unknown words ({error})"
        raise UserError(f"{label} {name}: {reason}; define an unknown token in it") from None
    if twice := captions.shared_id():
        raise UserError(
            f"{label} {name}: {twice[0]!r} and {twice[1]!r} have the same id {twice[2]}; make the ids distinct"
        )
    if vocab_size is not None and captions.vocab_size != vocab_size:
        raise UserError(
            f"{label} {name}: has {captions.vocab_size} tokens but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to {captions.vocab_size}"
        )
    return captions


def check_tokenizer(tokenizer: CaptionTokenizer | None, has_captions: bool) -> None:
    """Raise UserError if there are captions but no tokenizer."""
    if tokenizer is None and has_captions:
        raise UserError(
            'data.tokenizer: no tokenizer is set, but the shards have captions; set one, or set modality "image"'
        )


def train_tokenizer(captions: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a lower-cased WordPiece tokenizer like BERT's. The result is deterministic.

    The tokenizer has `vocab_size` tokens. It has fewer if the captions contain too few distinct words, and more if they
    contain more distinct characters.
    """
    tokenizer = _bert(models.WordPiece(unk_token=UNKNOWN))
    # The trainer breaks ties between equally frequent pairs by the ids of their symbols. For reproducibility, it is
    # given all symbols in sorted order; otherwise, the ids would be in the order of their hashes. Because it treats the
    # given symbols as special tokens, a new tokenizer is then built from the vocabulary.
    symbols = sorted({symbol for caption in captions for symbol in _symbols(tokenizer, caption)})
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*SPECIAL, *symbols], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer = _bert(models.WordPiece(tokenizer.get_vocab(), unk_token=UNKNOWN))
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _symbols(tokenizer: Tokenizer, caption: str) -> Iterator[str]:
    """Yield the characters of a caption in WordPiece's notation, with ## inside a word."""
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(caption)):
        yield word[0]
        yield from ("##" + character for character in word[1:])


def _find(name: str, label: str) -> Path:
    """Return the path `name` if it is a file, otherwise the path of the file downloaded from the Hub. Raises UserError
    if there is neither."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".json", ".txt") or path.is_absolute() or path.exists():
        raise UserError(f"{label} {name}: no such file; specify a tokenizer.json, a vocab.txt or a model on the Hub")
    try:
        return Path(hf_hub_download(name, "tokenizer.json", local_files_only=not hub_answers(name)))
    except Exception:
        raise UserError(
            f"{label} {name}: is neither a file nor available from the Hugging Face Hub; "
            "download its tokenizer.json and specify the path of that file"
        ) from None


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Convert a panic in the Rust tokenizers library into a ValueError, because the exception that a panic raises does
    not derive from Exception.

    Rust itself also prints a message on stderr. This message could be suppressed only by redirecting file descriptor 2.
    That would also hide the output of other threads, and the last message of the process if the library aborts the
    process for lack of memory.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:
        raise ValueError(f"the library panics: {panic}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _from_json(path: Path) -> Tokenizer:
    """Parse a tokenizer.json. Raises ValueError, before parsing, if its rules could expand a short caption until memory
    is exhausted."""
    data = read_json(path)
    for part in ("normalizer", "decoder"):
        if isinstance(data, dict) and growth(data.get(part)) > MAX_GROWTH:
            raise ValueError(
                f"the rules of its {part} may expand one character into more than {MAX_GROWTH:,} characters"
            )
    return Tokenizer.from_file(str(path))


def growth(rule: Any) -> int:
    """Return the maximum number of characters that a normalizer or decoder produces from one character by replacing it
    and prepending others."""
    if not isinstance(rule, dict):
        return 1
    parts = [part for name in ("normalizers", "decoders") for part in rule.get(name) or ()]
    text = rule.get("content", rule.get("prepend"))
    length = len(text) if isinstance(text, str) else 0
    pattern = rule.get("pattern")
    needs_text = isinstance(pattern, dict) and bool(pattern.get("String"))  # other patterns may match the empty string
    return math.prod(map(growth, parts)) * (max(1, length) if needs_text else 1 + length)


def _from_vocab(path: Path) -> Tokenizer:
    vocab = models.WordPiece.read_file(str(path))
    if UNKNOWN not in vocab:
        raise ValueError(f"the vocabulary lacks {UNKNOWN}")
    return _bert(models.WordPiece(vocab, unk_token=UNKNOWN))


def _bert(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
