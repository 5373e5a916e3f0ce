"""Golden files with results of the official JAX implementation, and their conversion to our model and batch.

A file is an .npz with parameters under their flax paths, one batch, and the results of the official model for them.

Shapes: S samples, L patches, X text positions, C channels, H = W pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.batch.packing import Sample
from m3ae_fast.config import LossConfig, ModelConfig, OptimConfig, parse
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.weights.from_official_code import flax_name, from_flax


class Quantity(NamedTuple):
    """A result of the official implementation together with ours. They agree if `relative_error(ours, official) <=
    tolerance`."""

    name: str
    ours: Tensor
    official: Tensor
    tolerance: float


def relative_error(ours: Tensor, official: Tensor) -> float:
    """Return ||ours - official|| / ||official||, or ||ours|| if the official result is 0; infinite for different
    shapes."""
    ours, official = ours.detach().double().cpu(), official.double()
    if ours.shape != official.shape:
        return math.inf
    scale = official.norm().item()
    return (ours - official).norm().item() / (scale or 1.0)


@dataclass
class Golden:
    """A golden file."""

    path: Path
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Golden:
        """Load a golden file. Raises UserError if it is missing or has another format."""
        path = Path(path)
        try:
            with open_regular(path) as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            meta = json.loads(arrays.pop("meta").tobytes())
            return cls(path, arrays, meta)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except Exception as error:  # NumPy and zipfile raise many kinds of errors on hostile input
            reason = str(error).partition(". ")[0]  # removes NumPy's advice to trust a pickle
            raise UserError(f"{path}: is not a golden file ({reason})") from None

    @property
    def optim(self) -> OptimConfig:
        """Return the settings of AdamW with which the file was created."""
        m = self.meta
        return OptimConfig(weight_decay=m["weight_decay"], betas=tuple(m["betas"]), clip_grad=m["clip_gradient"])

    def build_model(self, dtype: torch.dtype = torch.float32) -> M3AE:
        """Return our model with this file's config and parameters. Raises UserError if the config is invalid."""
        c, m = self.meta["config"], self.meta
        same = (
            "emb_dim depth num_heads dec_emb_dim dec_depth dec_num_heads mlp_ratio output_head_depth use_type_embedding"
        )
        data = {name: c[name] for name in same.split()}
        data |= {"size": None, "image_size": m["image_size"], "patch_size": m["patch"], "text_length": m["text_len"]}
        data |= {"vocab_size": m["vocab"], "channels": len(self.arrays["in/mean"])}
        data |= {f"image_{k}": self.arrays[f"in/{k}"].astype(float).tolist() for k in ("mean", "std")}
        loss = LossConfig(
            image_weight=m["image_loss_weight"],
            text_weight=m["text_loss_weight"],
            image_all_tokens=m["all_token_loss"],
            text_all_tokens=m["all_token_loss"],
        )
        model = M3AE(parse(ModelConfig, data, str(self.path)), loss)
        self.load_parameters(model, self.flax_path)
        return model.to(dtype)

    def flax_path(self, name: str) -> str:
        """Return the flax path of the parameter `name`."""
        return flax_name(name, self.meta["config"]["output_head_depth"])

    def tensor(self, key: str) -> Tensor:
        """Return the array as a tensor of the same shape and dtype. Raises KeyError if the file does not contain it."""
        return torch.from_numpy(self.arrays[key])

    def get(self, key: str) -> Tensor | None:
        """Return the array as `tensor` does; None if the file does not contain it, for example because the file has
        only one modality."""
        return self.tensor(key) if key in self.arrays else None

    def at(self, key: str) -> Tensor:
        """Return a parameter's array in our layout ([out, in] for matmuls), as `from_flax` does. Raises KeyError if the
        file does not contain it."""
        return from_flax(key, self.arrays[key])

    @torch.no_grad()
    def load_parameters(self, model: nn.Module, path: Callable[[str], str]) -> None:
        """Load the parameters. `path`: function from our parameter name to the flax path."""
        for name, p in model.named_parameters():
            p.copy_(self.at(f"params/{path(name)}"))

    def gradients(self, model: nn.Module, path: Callable[[str], str], tolerance: float) -> Iterator[Quantity]:
        """Yield comparisons of the gradient of every parameter; the gradient of an unused parameter is 0."""
        for name, p in model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            yield Quantity(f"grad {path(name)}", grad, self.at(f"grads/{path(name)}"), tolerance)

    def samples(self) -> list[Sample]:
        """Return the samples of the batch, with their masks."""
        images, text = self.get("in/image_u8"), self.get("in/text")
        size = next(len(array) for array in (images, text) if array is not None)
        samples = []
        for i in range(size):
            sample = Sample(key=f"sample {i}")
            if images is not None:
                sample.image = images[i].permute(2, 0, 1).contiguous()
                sample.image_mask = self.tensor("in/image_mask")[i] > 0
            if text is not None:
                valid = self.valid(i)
                sample.tokens = text[i][valid]
                sample.text_mask = (self.tensor("in/text_mask")[i] > 0)[valid]
            samples.append(sample)
        return samples

    def valid(self, i: int) -> Tensor:
        """Return a mask of the text positions with tokens in sample i, bool [X]. Raises ValueError if padding precedes
        tokens."""
        valid = self.tensor("in/text_padding_mask")[i] == 0
        if (valid[1:] > valid[:-1]).any():
            raise ValueError(f"in/text_padding_mask[{i}]: padding must follow the text tokens")
        return valid

    def kept(self, modality: str) -> np.ndarray:
        """Return the visible positions in the official order, int64 [kept]: the first int(length * (1 - ratio)) of the
        shuffle. They are the same for all samples. `modality`: "image" or "text"."""
        restore = self.arrays[f"in/{modality}_ids_restore"]
        ratio = self.meta["config"][f"{modality}_mask_ratio"]
        return np.argsort(restore)[: int(len(restore) * (1.0 - ratio))]


def without_keys(name: str, *tensors: Tensor) -> list[Tensor]:
    """Return the given tensors, which have the shape of the parameter `name`. For a qkv bias, the part of the keys is
    removed: it does not affect the softmax, so its gradient consists of rounding errors, which Adam would scale up to
    full steps."""
    if not name.endswith("qkv.bias"):
        return [*tensors]
    return [torch.stack((t.chunk(3)[0], t.chunk(3)[2])) for t in tensors]
