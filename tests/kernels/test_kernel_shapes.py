"""Rows in any number of dimensions. Like those of test_kernel_ops.py, the tests run with torch and with Triton."""

import m3ae_kernels
import pytest
import torch
import torch._dynamo
from torch import Tensor

from tests.kernels import kernel_cases as cases
from tests.kernels.kernel_cases import Inputs

IMAGES = {"rows": 12, "dim": 16, "batch": 4, "channels": 3, "patch": 8}
TOKENS = {"rows": 12, "dim": 16, "vocab": 31, "ignored": True}
ROWS = {  # the inputs whose first dimension may be replaced by several dimensions
    "patch_embed": ("patch_ids",),
    "gather_tokens": ("x", "rows"),
    "bias_gelu": ("x",),
    "scatter_tokens": ("x", "src", "fill", "fill_ids", "table", "table_ids"),
    "masked_pixel_loss": ("hidden", "patch_ids", "row_weight"),
    "masked_hog_loss": ("hidden", "patch_ids", "row_weight"),
    "masked_token_loss": ("hidden", "targets", "row_weight"),
    "packed_attention": ("qkv", "q"),
}
CASES = {
    "embed": (cases.patch_embed, IMAGES),
    "gather": (cases.gather_tokens, {"tokens": 24, "rows": 12, "dim": 16}),
    "norm": (cases.gather_tokens, {"tokens": 24, "rows": 12, "dim": 16, "norm": True}),
    "gelu": (cases.bias_gelu, {"rows": 24, "dim": 16}),
    "scatter": (cases.scatter_tokens, {"tokens": 24, "rows": 12, "dim": 16, "fill": 6, "table": 6}),
    "pixel": (cases.masked_pixel_loss, IMAGES),
    "pixel rows": (cases.masked_pixel_loss, IMAGES | {"reduction": "none"}),
    "hog": (cases.masked_hog_loss, IMAGES),
    "hog rows": (cases.masked_hog_loss, IMAGES | {"reduction": "none"}),
    "token": (cases.masked_token_loss, TOKENS),
    "token rows": (cases.masked_token_loss, TOKENS | {"reduction": "none"}),
    "attention": (cases.packed_attention, {"lengths": (5, 7, 12), "heads": 2, "dim": 16}),
    "queries": (cases.packed_attention, {"lengths": (5, 7, 12), "heads": 2, "dim": 16, "queries": (4, 6, 2)}),
}


def make(case: str) -> tuple[str, Inputs]:
    torch.manual_seed(0)
    function, sizes = CASES[case]
    inputs = function(torch.float32, **sizes)
    if "targets" in inputs.tensors:
        inputs.options["return_correct"] = True
    return function.__name__, inputs


def results(op: str, inputs: Inputs) -> dict[str, Tensor]:
    """Return the outputs of the op and all gradients."""
    out = getattr(m3ae_kernels, op)(**inputs.tensors, **inputs.options)
    out, *correct = out if isinstance(out, tuple) else (out,)
    upstream = torch.randn(out.numel(), generator=torch.Generator().manual_seed(1)).view(out.shape)
    names = inputs.learned
    grads = torch.autograd.grad(out, [inputs.tensors[name] for name in names], upstream)
    return {"out": out.detach()} | dict(zip(names, grads)) | dict(zip(["correct"], correct))


def shaped(op: str, inputs: Inputs, lead: tuple[int, ...]) -> Inputs:
    tensors = {
        name: t.detach().unflatten(0, lead).requires_grad_(t.requires_grad) if name in ROWS[op] and t is not None else t
        for name, t in inputs.tensors.items()
    }
    return Inputs(tensors, inputs.options)


@pytest.mark.parametrize("lead", [(2, -1), (-1, 1, 3), (1, -1)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_leading_dimensions_do_not_change_results_bitwise(case, lead):
    op, inputs = make(case)
    flat, found = results(op, inputs), results(op, shaped(op, inputs, lead))
    assert found.keys() == flat.keys()
    for name, got in found.items():
        by_rows = name in ROWS[op] or (name in ("out", "correct") and flat[name].dim())
        assert got.shape == (flat[name].unflatten(0, lead).shape if by_rows else flat[name].shape), name
        assert torch.equal(got.reshape(flat[name].shape), flat[name]), name


@pytest.mark.parametrize("case", ["token rows", "pixel rows", "hog rows", "gather", "norm", "embed", "scatter"])
def test_a_single_row_may_be_passed_without_a_row_dimension(case):
    op, inputs = make(case)
    several = {"x", "fill", "table"}
    one = {name: t[:1] if name in ROWS[op] and name not in several else t for name, t in inputs.tensors.items()}
    alone = {name: t[0] if name in ROWS[op] and name not in several else t for name, t in one.items()}
    call = getattr(m3ae_kernels, op)
    expected, found = (call(**tensors, **inputs.options) for tensors in (one, alone))
    expected, found = (each if isinstance(each, tuple) else (each,) for each in (expected, found))
    for a, b in zip(expected, found):
        assert b.shape == a.shape[1:] and torch.equal(a[0], b)


def test_empty_inputs_with_two_row_dimensions_are_accepted():
    weight, ids = torch.randn(7, 4, requires_grad=True), torch.empty(3, 0, dtype=torch.int64)
    hidden = torch.empty(3, 0, 4, requires_grad=True)
    loss = m3ae_kernels.masked_token_loss(hidden, weight, ids, reduction="none")
    assert loss.shape == (3, 0)
    loss.sum().backward()
    assert hidden.grad.shape == (3, 0, 4) and (weight.grad == 0).all()


def test_batches_with_non_contiguous_rows_have_correct_gradients():
    """A transposed batch gives the same result as its copy. Silently wrong gradients for strided inputs are the most
    common bug of such ops."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 3, 16).transpose(0, 1), torch.randn(31, 16)
    targets = torch.randint(0, 31, (5, 3)).t()
    gradients = []
    for copied in (False, True):
        h = (hidden.contiguous() if copied else hidden).detach().requires_grad_()
        t = targets.contiguous() if copied else targets
        m3ae_kernels.masked_token_loss(h, weight, t, reduction="mean").backward()
        gradients.append(h.grad)
    assert not hidden.is_contiguous() and torch.equal(*gradients)


def test_dimensions_that_do_not_agree_are_named():
    hidden, weight = torch.randn(2, 6, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"^targets has shape \(12,\), expected \[2, 6\]$"):
        m3ae_kernels.masked_token_loss(hidden, weight, torch.zeros(12, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^row_weight has shape \(6, 2\), expected \[2, 6\]$"):
        m3ae_kernels.masked_token_loss(
            hidden, weight, torch.zeros(2, 6, dtype=torch.int64), row_weight=torch.ones(6, 2)
        )
    with pytest.raises(ValueError, match=r"^qkv has shape \(5, 2, 2, 4\), expected \[\.\.\., 3, \?, \?\]$"):
        m3ae_kernels.packed_attention(torch.randn(5, 2, 2, 4), torch.tensor([0, 5]), 5)


def test_m3ae_heads_accept_batch_dimensions():
    """`head_inputs` and `m3ae_loss` are tested too, through `M3AEHeads`."""
    torch.manual_seed(0)
    heads = m3ae_kernels.M3AEHeads(16, 31, patch_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    x, images = torch.randn(2, 10, 16), torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    rows = torch.randperm(20).view(2, 10)
    image_rows, text_rows = rows[:, :6], rows[:, 6:]
    ids, targets = torch.randperm(12).view(2, 6), torch.randint(0, 31, (2, 4))
    weight = torch.rand(2, 4)

    def losses(flatten: bool):
        def each(t: Tensor) -> Tensor:
            return t.flatten() if flatten else t

        return heads(
            x.flatten(0, 1) if flatten else x, image_rows=each(image_rows), text_rows=each(text_rows), images=images,
            patch_ids=each(ids), targets=each(targets), text_row_weight=each(weight),
        )  # fmt: skip

    assert all(torch.equal(a, b) for a, b in zip(losses(False), losses(True)))


def test_ops_with_batch_dimensions_compile_to_one_graph():
    torch.manual_seed(0)
    weight = torch.randn(31, 16)
    torch._dynamo.reset()
    compiled = torch.compile(m3ae_kernels.masked_token_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3), (4, 5)):
        hidden, targets = torch.randn(*shape, 16), torch.randint(0, 31, shape)
        expected = m3ae_kernels.masked_token_loss(hidden, weight, targets, reduction="none")
        assert torch.equal(compiled(hidden, weight, targets, reduction="none"), expected)
