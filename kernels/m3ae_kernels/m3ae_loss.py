"""Both losses of M3AE, computed from the packed rows of the decoder, with separate heads or with `M3AEHeads`.

Shapes: M packed rows, D width, I rows with a pixel loss, W rows with a token loss, V vocabulary, K = P * P * C.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dispatch import as_rows, check_float, check_index, with_lead
from .gather import GatherNorm
from .hog_loss import MaskedHogLoss
from .pixel_loss import MaskedPixelLoss
from .token_loss import MaskedTokenLoss


class M3AELoss(NamedTuple):
    """The two losses and the weighted number of correct text predictions (detached). Each value is a floating-point
    scalar, a weighted sum over rows. Without a text head, the values for text are 0."""

    image: Tensor
    text: Tensor
    correct: Tensor


def head_inputs(
    x: Tensor,
    *,
    norm: Callable[[Tensor, Tensor], Tensor],
    image_rows: Tensor,
    text_rows: Tensor | None = None,
    image_mlp: Callable[[Tensor], Tensor] | None = None,
    text_mlp: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the input rows of both heads, with the final LayerNorm applied to only these rows in one pass.

    Args:
        x: [..., D] floating-point, the last block's output.
        norm: a `GatherNorm`, or any callable with the arguments (x, rows).
        image_rows: [...] int, distinct rows of x.
        text_rows: [...] int, distinct rows of x that are not in image_rows; None for an image-only model.
        image_mlp, text_mlp: hidden layers between the norm and a head; None for no hidden layers.

    Returns:
        The rows of the image head [..., D], and the rows of the text head, or None without text_rows.

    Raises:
        TypeError, ValueError: the dtype or device of the named argument is wrong.
    """
    check_float("x", x, (..., None), x)
    check_index("image_rows", image_rows, (...,), x)
    if text_rows is not None:
        check_index("text_rows", text_rows, (...,), x)
    own_rows = as_rows(image_rows, 0)
    rows = own_rows if text_rows is None else torch.cat((own_rows, as_rows(text_rows, 0)))
    image, text = norm(x, rows).tensor_split([own_rows.shape[0]])
    image = with_lead(image, image_rows.shape)
    image = image if image_mlp is None else image_mlp(image)
    if text_rows is None:
        return image, None
    text = with_lead(text, text_rows.shape)
    return image, text if text_mlp is None else text_mlp(text)


def m3ae_loss(
    image_hidden: Tensor,
    text_hidden: Tensor | None = None,
    *,
    image_head: nn.Module,
    images: Tensor | None = None,
    patch_ids: Tensor | None = None,
    image_targets: Tensor | None = None,
    image_row_weight: Tensor | None = None,
    text_head: MaskedTokenLoss | None = None,
    targets: Tensor | None = None,
    text_row_weight: Tensor | None = None,
    correct_weight: Tensor | None = None,
) -> M3AELoss:
    """Return the `M3AELoss` of the rows that `head_inputs` returns. As ZeRO-3 requires, each weight is read only in the
    forward of the module that owns it.

    Args:
        image_hidden: [I, D] floating-point; text_hidden: [W, D] floating-point, or None without a text head.
        image_head: a `MaskedPixelLoss`, a `MaskedHogLoss` or a `MaskedTokenLoss` with reduction "sum", or a module of
            your own. Your module is called with (image_hidden, image_targets, image_row_weight) and returns a scalar;
            its attribute `reduction` must be "sum".
        text_head: a `MaskedTokenLoss` with reduction "sum"; None for an image-only model.
        images: [B, C, H, W] as in `MaskedPixelLoss` or `MaskedHogLoss`; patch_ids: [I] int; image_row_weight: [I]
            floating-point, or None for ones: as in `masked_pixel_loss`.
        image_targets: the targets of an image_head that does not read images, given in place of images and patch_ids.
            For a `MaskedTokenLoss`, these are the patches' token ids, [I] int.
        targets: [W] int; text_row_weight: [W] floating-point, or None for ones: as in `masked_token_loss`.
        correct_weight: [W] floating-point, weights of the correct predictions; None for text_row_weight.

    Raises:
        TypeError, ValueError, IndexError: as in `masked_pixel_loss` and `masked_token_loss`. ValueError also if the
            reduction of a head is not "sum".
    """
    for name, head in (("image_head", image_head), ("text_head", text_head)):
        if head is not None and head.reduction != "sum":
            raise ValueError(f'{name} has reduction "{head.reduction}", but m3ae_loss needs heads with reduction="sum"')
    if isinstance(image_head, MaskedPixelLoss | MaskedHogLoss):
        image = image_head(image_hidden, images, patch_ids, image_row_weight)
    else:
        image = image_head(image_hidden, image_targets, image_row_weight)
    if text_head is None:
        return M3AELoss(image, torch.zeros_like(image), torch.zeros_like(image))
    text, correct = text_head(text_hidden, targets, text_row_weight, return_correct=True)
    if correct_weight is not None:
        check_float("correct_weight", correct_weight, tuple(correct.shape), text)
    counted = text_row_weight if correct_weight is None else correct_weight
    correct = correct.to(text.dtype) if counted is None else correct * counted.detach()
    return M3AELoss(image, text, correct.sum())


class M3AEHeads(nn.Module):
    """A module with the final LayerNorm (`norm`), optional hidden layers (`image_mlp`, `text_mlp`) and the heads
    (`image_head`, and `text_head` if there is a vocabulary)."""

    def __init__(
        self,
        dim: int,
        vocab: int | None,
        *,
        patch_size: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        norm_pix: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        eps: float = 1e-6,
        image_mlp: nn.Module | None = None,
        text_mlp: nn.Module | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        self.norm = GatherNorm(dim, eps=eps, impl=impl)
        self.image_mlp, self.text_mlp = image_mlp, text_mlp
        self.image_head = MaskedPixelLoss(
            dim, patch_size=patch_size, channels=channels, mean=mean, std=std, norm_pix=norm_pix, reduction="sum",
            impl=impl,
        )  # fmt: skip
        self.text_head = None
        if vocab is not None:
            self.text_head = MaskedTokenLoss(
                dim, vocab, reduction="sum", label_smoothing=label_smoothing, z_loss=z_loss, impl=impl
            )

    def forward(self, x: Tensor, *, image_rows: Tensor, text_rows: Tensor | None = None, **targets) -> M3AELoss:
        """Return the losses. See `head_inputs` for `x` and the rows, and `m3ae_loss` for the other arguments. Without a
        vocabulary, `text_rows` are ignored."""
        hidden = self._inputs(x, image_rows, text_rows)
        return m3ae_loss(*hidden, image_head=self.image_head, text_head=self.text_head, **targets)

    def predict(
        self, x: Tensor, *, image_rows: Tensor, text_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return normalised pixels [I, K], and logits [W, V] if there is a text head (otherwise None). The arguments
        are those of `head_inputs`."""
        image, text = self._inputs(x, image_rows, text_rows)
        logits = None if self.text_head is None or text is None else self.text_head.predict(text)
        return self.image_head.predict(image), logits

    def _inputs(self, x: Tensor, image_rows: Tensor, text_rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return head_inputs(
            x, norm=self.norm, image_rows=image_rows, text_rows=None if self.text_head is None else text_rows,
            image_mlp=self.image_mlp, text_mlp=self.text_mlp,
        )  # fmt: skip
