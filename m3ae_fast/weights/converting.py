"""Conversion of weights from other programs to a folder for `M3AE.from_pretrained`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.model.card import model_card
from m3ae_fast.model.pretrained import Pretrained, write_pretrained
from m3ae_fast.vqgan.flax import convert_vqgan
from m3ae_fast.vqgan.model import VQGAN
from m3ae_fast.weights.from_mae_or_timm import ViTOptions
from m3ae_fast.weights.importing import read_source


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    num_heads: int | None = None,
    dec_num_heads: int | None = None,
) -> Pretrained | VQGAN:
    """Convert weights and return the result: a model, or the image tokenizer for a .msgpack file.

    Args:
        source: file, folder or Hugging Face Hub name of the weights; `m3ae-fast convert --help` lists the supported
            kinds. No code in the files is executed.
        out: the folder to write.
        tokenizer: the tokenizer.json, BERT vocab.txt or Hub name of the captions' tokenizer.
        num_heads, dec_num_heads: numbers of attention heads of encoder and decoder, for a .pth or .safetensors file
            whose width is not one of the published sizes.

    Raises:
        UserError: the source is unknown or damaged, the tokenizer does not fit, or `out` cannot be written.
    """
    name, folder = os.fspath(source), os.fspath(out)
    if Path(name).suffix == ".msgpack":
        return convert_vqgan(name, folder)
    found = read_source(name, ViTOptions(num_heads, dec_num_heads))
    if tokenizer:
        sizes = found.config.text_length, found.config.vocab_size
        found = replace(found, tokenizer=load_tokenizer(tokenizer, *sizes, label="--tokenizer"))
    card = model_card(Path(folder).resolve().name, found.config, f"Converted from: {found.kind}.\n")
    write_pretrained(folder, found, card)
    return found
