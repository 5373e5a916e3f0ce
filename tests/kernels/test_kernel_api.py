"""Behaviour that users of torch, Liger, timm and transformers expect. The tests run on both implementations, like those
of test_kernel_ops.py."""

import importlib
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import m3ae_kernels
import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from m3ae_kernels import reference
from m3ae_kernels.attention.choice import kernel_for
from m3ae_kernels.attention.padded import PADDED
from m3ae_kernels.pixels import _per_element
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.kernel_cases import SMALL, Inputs, call, make, run
from tests.kernels.test_kernel_ops import double, error

TRITON = os.environ.get("M3AE_KERNELS_IMPL") == "triton"
PIXELS = {"patch_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}


OWN = {"impl": "torch", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "patch_size": 4, "channels": 3, "bias": False}
OWN |= {"reduction": "none", "norm_pix": True, "label_smoothing": 0.2, "z_loss": 0.3, "ignore_index": 5, "eps": 0.7}
OWN |= {"workspace": 999, "image_mlp": nn.Linear(8, 8), "text_mlp": nn.Linear(8, 8)}


@pytest.fixture
def op_options(monkeypatch):
    """Record the options with which modules call their ops, by the name of the op."""
    seen = {}

    def watch(module, name):
        real = getattr(importlib.import_module(f"m3ae_kernels.{module}"), name)

        def op(*args, **options):
            bound = inspect.signature(real).bind(*args, **options)
            bound.apply_defaults()
            seen[name] = bound.arguments
            return real(*args, **options)

        monkeypatch.setattr(importlib.import_module(f"m3ae_kernels.{module}"), name, op)

    for module, name in (
        ("gather", "gather_tokens"),
        ("patch_embed", "patch_embed"),
        ("pixel_loss", "masked_pixel_loss"),
        ("hog_loss", "masked_hog_loss"),
        ("token_loss", "masked_token_loss"),
    ):
        watch(module, name)
    return seen


@pytest.mark.parametrize(
    ("module", "ops"),
    [
        (m3ae_kernels.GatherNorm, {"gather_tokens"}),
        (m3ae_kernels.PatchEmbed, {"patch_embed"}),
        (m3ae_kernels.MaskedPixelLoss, {"masked_pixel_loss"}),
        (m3ae_kernels.MaskedHogLoss, {"masked_hog_loss"}),
        (m3ae_kernels.MaskedTokenLoss, {"masked_token_loss"}),
        (m3ae_kernels.M3AEHeads, {"gather_tokens", "masked_pixel_loss", "masked_token_loss"}),
    ],
)
def test_a_module_passes_each_of_its_options_to_its_ops(op_options, module, ops):
    """Each option except `channels` has a value that differs from its default. The test fails for a new option until
    OWN contains a value for it."""
    options = [p for p in inspect.signature(module).parameters.values() if p.kind == p.KEYWORD_ONLY]
    own = {p.name: OWN[p.name] for p in options}
    assert all(own[p.name] != p.default for p in options if p.name != "channels")
    made = module(8, *([] if "vocab" not in inspect.signature(module).parameters else [31]), **own)
    ids, rows = torch.arange(3), {"image_rows": torch.arange(3), "text_rows": torch.arange(3, 6)}
    images = torch.zeros(1, 3, 8, 8, dtype=torch.float32 if module is m3ae_kernels.MaskedHogLoss else torch.uint8)
    targets = {"images": images, "patch_ids": ids, "targets": ids}
    {
        m3ae_kernels.GatherNorm: lambda: made(torch.randn(5, 8), ids),
        m3ae_kernels.PatchEmbed: lambda: made(images, ids),
        m3ae_kernels.MaskedPixelLoss: lambda: made(torch.randn(3, 8), images, ids),
        m3ae_kernels.MaskedHogLoss: lambda: made(torch.randn(3, 8), images, ids),
        m3ae_kernels.MaskedTokenLoss: lambda: made(torch.randn(3, 8), ids),
        m3ae_kernels.M3AEHeads: lambda: made(torch.randn(6, 8), **rows, **targets),
    }[module]()
    assert op_options.keys() == ops
    heeded = {"channels", "image_mlp", "text_mlp"}
    for op, arguments in op_options.items():
        for name in own.keys() & arguments.keys() - {"bias"}:
            assert arguments[name] == own[name], (op, name)
            heeded.add(name)
        if "bias" in own:
            heeded.add("bias")
            assert arguments.get("bias", arguments.get("norm_bias")) is None
    assert heeded >= own.keys()


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_gather_norm_equals_torch_layer_norm_with_the_same_eps(eps):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((9, 12), (12,), (12,))]
    rows, upstream = torch.tensor([7, 0, 3]), torch.randn(3, 12)
    x, weight, bias = tensors
    got = m3ae_kernels.gather_tokens(x, rows, norm_weight=weight, norm_bias=bias, eps=eps)
    expected = F.layer_norm(x[rows], (12,), weight, bias, eps)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(*(torch.autograd.grad(out, tensors, upstream) for out in (got, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_loss_equals_cross_entropy(reduction, smoothing):
    """The value and the gradients are those of torch's cross-entropy, with ignored rows, and without row weights or
    bias."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(19, 12, requires_grad=True), torch.randn(31, 12, requires_grad=True)
    targets = torch.randint(0, 31, (19,))
    targets[::4] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}
    got, correct = m3ae_kernels.masked_token_loss(hidden, weight, targets, return_correct=True, **options)
    logits = hidden @ weight.t()
    expected = F.cross_entropy(logits, targets, **options)
    assert torch.allclose(got, expected, rtol=1e-5)
    assert torch.equal(correct, logits.argmax(1) == targets)
    upstream = torch.randn(got.shape)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight), upstream) for loss in (got, expected))):
        assert error(a, b.double()) < 2e-6


def test_a_head_without_bias_equals_one_with_zero_bias():
    """A constant that is added to all logits would change the log-partition, so it is compared too."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(19, 12, requires_grad=True), torch.randint(0, 48, (19,))
    weight = torch.randn(48, 12, requires_grad=True)
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    pixels = {"patch_size": 4, "mean": [0.4] * 3, "std": [0.2] * 3, "reduction": "sum"}

    def results(bias):
        words = m3ae_kernels.masked_token_loss(hidden, weight, targets, bias=bias, z_loss=0.1, reduction="sum")
        patches = m3ae_kernels.masked_pixel_loss(hidden, weight, images, torch.arange(19), bias=bias, **pixels)
        return [words, patches, *(g for loss in (words, patches) for g in torch.autograd.grad(loss, (hidden, weight)))]

    for found, expected in zip(results(None), results(torch.zeros(48))):
        torch.testing.assert_close(found, expected)


def losses() -> dict:
    """Return calls of each loss on one input, as a function and as a module, by its name."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(4, 12), torch.tensor([3, -100, 0, 30])
    images, ids = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8), torch.arange(4)
    weight, bias = torch.randn(192, 12), torch.randn(192)

    def module(kind, *sizes, inputs, **options):
        torch.manual_seed(0)
        return kind(12, *sizes, **options)(hidden, *inputs)

    m = m3ae_kernels
    return {
        "masked_token_loss": lambda **options: m.masked_token_loss(hidden, weight[:31], targets, **options),
        "masked_pixel_loss": lambda **options: m.masked_pixel_loss(
            hidden, weight, images, ids, bias=bias, **PIXELS, **options
        ),
        "masked_hog_loss": lambda **options: m.masked_hog_loss(
            hidden, weight[:9], images, ids, patch_size=8, **options
        ),
        "MaskedHogLoss": lambda **options: module(m.MaskedHogLoss, inputs=(images, ids), patch_size=8, **options),
        "MaskedTokenLoss": lambda **options: module(m.MaskedTokenLoss, 31, inputs=(targets,), **options),
        "MaskedPixelLoss": lambda **options: module(m.MaskedPixelLoss, inputs=(images, ids), **PIXELS, **options),
    }


@pytest.mark.parametrize("name", losses())
def test_the_default_reduction_is_the_mean_as_in_torch(name):
    compute = losses()[name]
    mean, total, rows = compute(), compute(reduction="sum"), compute(reduction="none")
    counted = 3 if "oken" in name else 4
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(mean, total / counted)
    assert torch.equal(mean, compute(reduction="mean"))


def test_positional_arguments_have_the_order_of_torch():
    """The third argument of F.linear is the bias, but that of the loss is the targets. A call with the bias in third
    place raises an error."""
    (hidden, weight), targets = (torch.randn(n, 12) for n in (5, 31)), torch.arange(5)
    for bias in (None, torch.randn(31)):
        with pytest.raises(TypeError, match="positional arguments"):
            m3ae_kernels.masked_token_loss(hidden, weight, bias, targets)
    if hasattr(F, "linear_cross_entropy"):
        theirs, ours = (
            [p.name for p in inspect.signature(f).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
            for f in (F.linear_cross_entropy, m3ae_kernels.masked_token_loss)
        )
        assert (theirs, ours) == (["input", "linear_weight", "target"], ["hidden", "weight", "targets"])


def test_ignored_rows_have_no_effect():
    """For any ignore_index and any weight, ignored rows have loss 0 and no gradient and do not count as correct."""
    inputs = make("token-some", torch.float32)
    targets, weights = inputs.tensors["targets"], torch.rand(19) + 0.5
    ignored = torch.arange(19) % 3 == 0
    inputs.tensors |= {"targets": torch.where(ignored, 5000, targets), "row_weight": weights}
    inputs.tensors["row_weight"][ignored] = float("inf")
    inputs.options |= {"ignore_index": 5000, "return_correct": True}
    loss, correct = m3ae_kernels.masked_token_loss(**inputs.tensors, **inputs.options)
    assert not correct[ignored].any()
    hidden = inputs.tensors["hidden"]
    grad = torch.autograd.grad(loss, hidden)[0]
    assert (grad[ignored] == 0).all() and (grad[~ignored] != 0).any(1).all()
    kept = {n: t if n in ("weight", "bias") else t[~ignored] for n, t in inputs.tensors.items()}
    assert torch.allclose(loss, reference.masked_token_loss(**kept, reduction="sum"), rtol=1e-5)
    inputs.tensors["targets"] = torch.full((19,), 5000)
    inputs.tensors["row_weight"] = None
    for reduction in ("sum", "mean", "none"):
        result = run(m3ae_kernels, "token-some", Inputs(inputs.tensors, inputs.options | {"reduction": reduction}))
        assert all((value == 0).all() for value in result.values())


def test_the_bias_gradient_of_an_embedding_is_summed_in_float32():
    torch.manual_seed(0)
    images, patch_ids = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.arange(8).repeat(50)
    weight, bias = torch.randn(32, 192, requires_grad=True), torch.zeros(32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = m3ae_kernels.patch_embed(images, patch_ids, weight, bias, **PIXELS)
    grad = torch.randn(out.shape).to(out.dtype)
    out.backward(grad)
    assert out.dtype == torch.bfloat16 and error(bias.grad, grad.double().sum(0)) < 1e-5


@pytest.mark.parametrize("offset", [1, 2, 4, 6, 8])
def test_images_and_rows_may_begin_at_any_offset(offset):
    """Slices of a buffer may begin at any element. If rows are not aligned, kernels read them as narrower elements than
    usual."""
    torch.manual_seed(0)
    buffer, weight = torch.randint(0, 256, (2 * 3 * 16 * 16 + 8,), dtype=torch.uint8), torch.randn(5, 192)
    images = buffer[offset : offset + 2 * 3 * 16 * 16].view(2, 3, 16, 16)
    found, expected = (
        m3ae_kernels.patch_embed(each, torch.arange(8), weight, **PIXELS) for each in (images, images.clone())
    )
    assert torch.equal(found, expected)
    rows = torch.randn(8 + 12 * 8).half()[offset : offset + 12 * 8].view(12, 8)
    x, order = torch.randn(12, 8).half().requires_grad_(), torch.randperm(12)
    m3ae_kernels.gather_tokens(x, order, norm_weight=torch.ones(8).half()).backward(rows)
    first, x.grad = x.grad, None
    m3ae_kernels.gather_tokens(x, order, norm_weight=torch.ones(8).half()).backward(rows.clone())
    assert torch.equal(first, x.grad)


def test_correct_predictions_are_counted_with_separate_weights():
    """The number of correct predictions can be weighted separately from the loss; by default, the weights of the loss
    are used. The weights of the count never have a gradient."""
    torch.manual_seed(0)
    head = m3ae_kernels.MaskedTokenLoss(12, 5, reduction="sum")
    image_head = m3ae_kernels.MaskedTokenLoss(12, 5, reduction="sum")
    hidden, targets = torch.randn(30, 12), torch.randint(0, 5, (30,))
    hits = ((hidden @ head.weight.t() + head.bias).argmax(1) == targets).float()
    loss_weight, own_weight = (torch.rand(30, requires_grad=True) for _ in range(2))
    image = {"image_head": image_head, "image_targets": targets[:4]}

    def correct(**weights):
        text = {"text_head": head, "targets": targets, **weights}
        found = m3ae_kernels.m3ae_loss(hidden[:4], hidden, **image, **text)
        assert not found.correct.requires_grad and found.text.requires_grad
        return found.correct

    assert 0 < hits.sum() < 30
    torch.testing.assert_close(correct(), hits.sum())
    torch.testing.assert_close(correct(text_row_weight=loss_weight), (hits * loss_weight).sum().detach())
    both = {"text_row_weight": loss_weight, "correct_weight": own_weight}
    torch.testing.assert_close(correct(**both), (hits * own_weight).sum().detach())


@pytest.mark.parametrize("op", ["token", "pixel", "hog", "embed"])
def test_float64_stays_float64_under_autocast(op):
    """The behaviour is that of torch's own layers."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 192, dtype=torch.float64), torch.randn(192, 192, dtype=torch.float64)
    images, patch_ids = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.arange(6)
    work = {
        "token": lambda: m3ae_kernels.masked_token_loss(hidden, weight, patch_ids, reduction="sum"),
        "pixel": lambda: m3ae_kernels.masked_pixel_loss(hidden, weight, images, patch_ids, reduction="sum", **PIXELS),
        "hog": lambda: m3ae_kernels.masked_hog_loss(hidden, weight[:9], images, patch_ids, patch_size=8),
        "embed": lambda: m3ae_kernels.patch_embed(images, patch_ids, weight, **PIXELS),
    }[op]
    expected = work()
    with torch.autocast("cpu", torch.bfloat16):
        found = work()
    assert found.dtype == torch.float64 and torch.equal(found, expected)


def test_an_ignored_token_of_the_vocabulary_is_never_correct():
    """ignore_index may be the id of padding, which the model may predict."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 12), torch.randn(7, 12)
    targets = (hidden @ weight.t()).argmax(1)
    assert (targets == 3).any() and (targets != 3).any()
    for reduction in ("sum", "none"):
        options = {"ignore_index": 3, "reduction": reduction, "return_correct": True}
        loss, correct = m3ae_kernels.masked_token_loss(hidden, weight, targets, **options)
        assert torch.equal(correct, targets != 3)
        expected = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=3, reduction=reduction)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 97, 2**31 - 1, -(2**31)])
def test_a_target_out_of_range_affects_only_its_own_loss(target):
    """On a CPU, such a target raises an IndexError."""
    inputs = make("token-some", torch.float32)
    inputs.options |= {"reduction": "none", "return_correct": True}
    expected, right = m3ae_kernels.masked_token_loss(**inputs.tensors, **inputs.options)
    inputs.tensors["targets"][7] = target
    if not TRITON:
        with pytest.raises(IndexError, match="targets is out of range at row 7"):
            m3ae_kernels.masked_token_loss(**inputs.tensors, **inputs.options)
        return
    loss, correct = m3ae_kernels.masked_token_loss(**inputs.tensors, **inputs.options)
    others = torch.arange(19) != 7
    assert loss[7].isnan() and not correct[7]
    assert torch.equal(loss[others], expected[others]) and torch.equal(correct[others], right[others])


@pytest.mark.parametrize("case", ["pixel-p16", "hog-p16", "token-z"])
def test_reductions_agree(case):
    inputs = make(case, torch.float32)
    sums = {}
    for reduction in ("sum", "mean", "none"):
        inputs.options["reduction"] = reduction
        sums[reduction] = call(m3ae_kernels, case, inputs)
    weight = inputs.tensors["row_weight"]
    assert torch.allclose(sums["none"].sum(), sums["sum"]) and torch.allclose(sums["sum"] / weight.sum(), sums["mean"])
    inputs.options["reduction"] = "mean"
    inputs.tensors["row_weight"] = weight * 1e-3
    assert torch.allclose(call(m3ae_kernels, case, inputs), sums["mean"])
    inputs.tensors["row_weight"] = weight.requires_grad_()
    for reduction in ("sum", "mean", "none"):
        inputs.options["reduction"] = reduction
        true = run(reference, case, double(inputs))
        for name, got in run(m3ae_kernels, case, inputs).items():
            assert error(got, true[name]) < 3e-6, (reduction, name)


@pytest.mark.parametrize("case", [*SMALL, "token-mean", "norm-no-bias", "embed-last"])
def test_frozen_tensors_get_no_gradient_and_do_not_change_other_gradients(case):
    inputs = make(case, torch.float32)
    expected = run(m3ae_kernels, case, inputs)
    for frozen in inputs.learned if len(inputs.learned) > 1 else ():
        tensors = inputs.tensors | {frozen: inputs.tensors[frozen].detach()}
        results = run(m3ae_kernels, case, Inputs(tensors, inputs.options))
        assert results.keys() == expected.keys() - {frozen}
        for name, got in results.items():
            assert error(got, expected[name].double()) < 1e-6, (frozen, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_frozen_norm_does_not_change_the_gradients_of_its_input(dtype):
    case = "norm-some"
    inputs = make(case, dtype)
    expected = run(m3ae_kernels, case, inputs)
    frozen = {name: t.detach() if name.endswith(("weight", "bias")) else t for name, t in inputs.tensors.items()}
    results = run(m3ae_kernels, case, Inputs(frozen, inputs.options))
    assert results.keys() == {name for name in expected if not name.endswith(("weight", "bias"))}
    assert all(torch.equal(got, expected[name]) for name, got in results.items())


def test_without_autograd_no_gradient_is_computed():
    """The parameters require gradients. An evaluation nevertheless takes only the time of the forward pass."""
    hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(4096, 64, requires_grad=True)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        m3ae_kernels.masked_token_loss(hidden, weight, torch.arange(8), reduction="sum")
    assert max(event.self_cpu_memory_usage for event in record.events()) < 4 * weight.numel()
    assert sum(event.name in ("aten::mm", "aten::addmm") for event in record.events()) == 1


def test_frozen_heads_allocate_no_gradient_memory():
    """If the weight is frozen, no tensor of its size is allocated. If the bias is frozen, its gradient is not
    computed."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(8, 64, requires_grad=True), torch.randn(4096, 64), torch.randn(4096)
    targets = torch.randint(0, 4096, (8,))

    def largest() -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            m3ae_kernels.masked_token_loss(hidden, weight, targets, bias=bias, reduction="sum").backward()
        return max(event.self_cpu_memory_usage for event in record.events())

    assert largest() < 4 * weight.numel()
    weight.requires_grad_()
    assert largest() >= 4 * weight.numel()


@pytest.mark.parametrize("case", SMALL)
def test_torch_func_grad_is_supported(case):
    inputs = make(case, torch.float32)
    expected = run(m3ae_kernels, case, inputs, torch.ones_like(call(reference, case, inputs)))
    names = inputs.learned

    def summed(*tensors: Tensor) -> Tensor:
        return call(m3ae_kernels, case, Inputs(inputs.tensors | dict(zip(names, tensors)), inputs.options)).sum()

    learned = [inputs.tensors[name].detach() for name in names]
    for name, got in zip(names, torch.func.grad(summed, tuple(range(len(names))))(*learned)):
        assert error(got, expected[name].double()) < 1e-6, name


@pytest.mark.parametrize("case", [case for case in SMALL if case != "gather-some"])
def test_unsupported_function_transforms_are_refused_in_one_line(case):
    inputs = make(case, torch.float32)
    name = inputs.learned[0]
    learned = inputs.tensors[name].detach()

    def function(tensor: Tensor) -> Tensor:
        return call(m3ae_kernels, case, Inputs(inputs.tensors | {name: tensor}, inputs.options))

    with pytest.raises(NotImplementedError, match=r"^m3ae_kernels: [a-z_]+ does not support torch.vmap; pass"):
        torch.func.vmap(function)(learned[None])
    with pytest.raises(NotImplementedError, match=r"^m3ae_kernels: [a-z_]+ does not support forward-mode diff"):
        torch.func.jvp(function, (learned,), (learned,))
    once = torch.func.grad(lambda tensor: function(tensor).sum())
    with pytest.raises(NotImplementedError, match=r"^m3ae_kernels: [a-z_]+ does not support second derivatives$"):
        torch.func.grad(lambda tensor: once(tensor).sum())(learned)


@pytest.mark.parametrize("case", SMALL)
def test_torch_func_vjp_is_supported_without_a_graph_of_the_gradients(case):
    inputs = make(case, torch.float32)
    name = inputs.learned[0]
    upstream = torch.ones_like(call(reference, case, inputs))
    expected = run(m3ae_kernels, case, inputs, upstream)[name]

    def function(tensor: Tensor) -> Tensor:
        return call(m3ae_kernels, case, Inputs(inputs.tensors | {name: tensor}, inputs.options))

    _, pull = torch.func.vjp(function, inputs.tensors[name].detach())
    with torch.no_grad():
        (got,) = pull(upstream)
    assert error(got, expected.double()) < 1e-6


@pytest.mark.parametrize("case", [case for case in SMALL if case != "gather-some"])
def test_second_derivatives_are_refused_in_one_line(case):
    """The graph of a sum, whose upstream gradient is a constant, is rejected too: torch would treat the gradients as
    constants."""
    inputs = make(case, torch.float32)
    learned = inputs.tensors[inputs.learned[0]]
    out = call(m3ae_kernels, case, inputs)
    for loss in (out.sum(), out.square().sum()):
        with pytest.raises(NotImplementedError, match=r"^m3ae_kernels: [a-z_]+ does not support second derivatives$"):
            torch.autograd.grad(loss, learned, create_graph=True)


def test_scatter_orders_of_the_loader_do_not_change_results():
    for case in ("scatter-vocab", "scatter-long", *(["scatter-mask"] if not TRITON else [])):  # the interpreter is slow
        inputs = make(case, torch.float32)
        expected = run(m3ae_kernels, case, inputs)
        ids = [inputs.tensors[name] for name in ("src", "fill_ids", "table_ids")]
        orders = dict(zip(("fill_order", "table_order"), m3ae_kernels.scatter_orders(*ids)))
        assert all(order.dtype == torch.int32 for order in orders.values())
        for name, got in run(m3ae_kernels, case, Inputs(inputs.tensors, inputs.options | orders)).items():
            assert torch.equal(got, expected[name]), name
    assert m3ae_kernels.scatter_orders(ids[0]) == (None, None)


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embed_converts_from_and_to_convolutions(bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 12, 8, 8, bias=bias)
    conv.weight.requires_grad_(False)
    images = torch.randn(2, 3, 16, 24)
    embed = m3ae_kernels.PatchEmbed.from_conv(conv)
    expected = conv(images).flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(embed(images, torch.arange(12)), expected, atol=1e-5)
    assert not embed.weight.requires_grad and (embed.bias is not None) == bias
    back = embed.to_conv()
    assert back.state_dict().keys() == conv.state_dict().keys() and not back.weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), conv.parameters()))
    uint8 = (images * 50 + 128).clamp(0, 255).to(torch.uint8)
    normalised = (uint8 / 255 - 0.5) / 0.25
    of_pixels = m3ae_kernels.PatchEmbed.from_conv(conv, mean=PIXELS["mean"], std=PIXELS["std"])
    assert torch.allclose(of_pixels(uint8, torch.arange(12)), embed(normalised, torch.arange(12)), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stride": 4}, "kernel and stride"),
        ({"stride": 8, "padding": 1}, "has padding"),
        ({"stride": 8, "groups": 3}, "groups must be 1"),
    ],
)
def test_convolutions_that_are_not_patch_embeddings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        m3ae_kernels.PatchEmbed.from_conv(nn.Conv2d(3, 12, 8, **options))


@pytest.mark.parametrize("layer", [nn.Conv1d(12, 31, 1), nn.Identity(), "Linear"], ids=str)
def test_heads_and_embeddings_of_other_layer_types_are_refused(layer):
    """Adapters, for example, also have a weight, but compute more than a product with it."""
    with pytest.raises(TypeError, match=rf"^the head must be a torch\.nn\.Linear, not {type(layer).__name__}$"):
        m3ae_kernels.MaskedTokenLoss.from_linear(layer, reduction="mean")
    with pytest.raises(TypeError, match=r"^the head must be a torch\.nn\.Linear"):
        m3ae_kernels.MaskedPixelLoss.from_linear(layer, patch_size=8, reduction="mean")
    with pytest.raises(TypeError, match=r"^the embedding must be a torch\.nn\.Conv2d"):
        m3ae_kernels.PatchEmbed.from_conv(layer)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    """A convolution that normalises its weight, as timm's StdConv2d does."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _, __, out: 2 * out)
    return layer


def with_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    return layer


CHANGES = [with_hook, with_forward, lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh())]


@pytest.mark.parametrize("linear", [Doubled(12, 192), *(change(nn.Linear(12, 192)) for change in CHANGES)], ids=str)
def test_heads_that_compute_more_than_a_linear_layer_are_refused(linear):
    """The losses read only the parameters of the layer, so anything else that it computes would be lost silently."""
    for kind, options in ((m3ae_kernels.MaskedTokenLoss, {}), (m3ae_kernels.MaskedPixelLoss, {"patch_size": 8})):
        with pytest.raises(TypeError, match=r"^the head is a .* that computes more than a torch\.nn\.Linear, "):
            kind.from_linear(linear, **options)


@pytest.mark.parametrize(
    "conv", [Standardised(3, 12, 8, 8), *(change(nn.Conv2d(3, 12, 8, 8)) for change in CHANGES)], ids=str
)
def test_convolutions_that_compute_more_are_refused(conv):
    with pytest.raises(TypeError, match=r"^the embedding is a .* that computes more than a torch\.nn\.Conv2d, "):
        m3ae_kernels.PatchEmbed.from_conv(conv)


def test_a_subclass_without_its_own_forward_is_a_linear_layer():
    linear = type("Named", (nn.Linear,), {})(12, 31)
    hidden = torch.randn(5, 12)
    assert torch.equal(m3ae_kernels.MaskedTokenLoss.from_linear(linear).predict(hidden), linear(hidden))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads_that_do_not_sum_are_refused_by_m3ae_loss(reduction):
    total, other = (m3ae_kernels.MaskedTokenLoss(8, 31, reduction=kind) for kind in ("sum", reduction))
    rows = {"image_targets": torch.arange(4), "targets": torch.arange(4)}
    for heads, name in (((other, total), "image_head"), ((total, other), "text_head")):
        with pytest.raises(ValueError, match=f'^{name} has reduction "{reduction}", but .* reduction="sum"$'):
            m3ae_kernels.m3ae_loss(*torch.randn(2, 4, 8), image_head=heads[0], text_head=heads[1], **rows)


def test_swapped_sizes_of_a_token_loss_are_named():
    with pytest.raises(ValueError, match=r"^hidden has width 8, but this MaskedTokenLoss has dim=50 and vocab=8$"):
        m3ae_kernels.MaskedTokenLoss(50, 8)(torch.randn(4, 8), torch.arange(4))


def test_a_head_that_does_not_predict_whole_patches_is_refused():
    with pytest.raises(ValueError, match=r"does not predict patches of 8 x 8 pixels: .* multiple of 64$"):
        m3ae_kernels.MaskedPixelLoss.from_linear(nn.Linear(12, 100), patch_size=8, reduction="mean")


def test_pixel_targets_with_gradients_or_without_variance_are_refused():
    """If the images were accepted, the gradient would ignore the targets, or the loss would be NaN."""
    images, weight = torch.rand(1, 3, 16, 16, requires_grad=True), torch.randn(192, 12)
    hidden, ids = torch.randn(4, 12), torch.arange(4)
    options = {"patch_size": 8, "reduction": "sum"}
    with pytest.raises(ValueError, match=r"^images require a gradient, .* pass images\.detach\(\)$"):
        m3ae_kernels.masked_pixel_loss(hidden, weight, images, ids, **options)
    with torch.no_grad():
        evaluated = m3ae_kernels.masked_pixel_loss(hidden, weight, images, ids, **options)
    assert torch.equal(evaluated, m3ae_kernels.masked_pixel_loss(hidden, weight, images.detach(), ids, **options))
    with pytest.raises(
        ValueError, match=r"^images require a gradient, which masked_hog_loss .* pass images\.detach\(\)$"
    ):
        m3ae_kernels.masked_hog_loss(hidden, weight[:9], images, ids, patch_size=8)
    grey, options = images.detach()[:, :1], {"patch_size": 1, "norm_pix": True, "reduction": "sum"}
    with pytest.raises(ValueError, match="norm_pix needs patches with at least two values"):
        m3ae_kernels.masked_pixel_loss(hidden, weight[:1], grey, ids, **options)


def test_means_may_be_arrays_or_tensors_of_any_shape():
    images, ids = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8), torch.arange(4)
    weight, (mean, std) = torch.randn(12, 192), ((0.25, 0.5, 0.75), (0.25, 0.5, 0.125))
    expected = m3ae_kernels.patch_embed(images, ids, weight, patch_size=8, mean=mean, std=std)
    for kind in (lambda v: torch.tensor(v).view(1, 3, 1, 1), np.array):
        found = m3ae_kernels.patch_embed(images, ids, weight, patch_size=8, mean=kind(mean), std=kind(std))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", SMALL)
def test_tensors_without_data_pass_through_every_op(case):
    """The shapes and dtypes of results and gradients are right for tensors on the meta device."""
    inputs = make(case, torch.float32)
    expected = run(m3ae_kernels, case, inputs)
    empty = {
        name: t if t is None else t.detach().to("meta").requires_grad_(t.requires_grad)
        for name, t in inputs.tensors.items()
    }
    found = run(m3ae_kernels, case, Inputs(empty, inputs.options), expected["out"].to("meta"))
    for name, value in found.items():
        assert value.is_meta and (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name


@pytest.mark.parametrize("case", [case for case in SMALL if case != "gather-some"])
def test_lazily_negated_and_zero_gradients_are_resolved(case):
    """The memory of a negated tensor contains the values with the opposite sign, and a zero tensor has no memory."""
    inputs = make(case, torch.float32)
    upstream = torch.randn(call(m3ae_kernels, case, inputs).shape)
    for lazy, plain in (
        (torch._neg_view(upstream), -upstream),
        (torch._efficientzerotensor(upstream.shape), torch.zeros_like(upstream)),
    ):
        found, expected = (run(m3ae_kernels, case, inputs, each) for each in (lazy, plain))
        assert all(torch.equal(got, expected[name]) for name, got in found.items())


@pytest.mark.parametrize("case", [case for case in SMALL if case != "gather-some"])
def test_batched_gradients_are_refused_in_one_line(case):
    inputs = make(case, torch.float32)
    out = call(m3ae_kernels, case, inputs)
    with pytest.raises(NotImplementedError, match=r"^m3ae_kernels: [a-z_]+ does not support batched gradients$"):
        learned = inputs.tensors[inputs.learned[0]]
        torch.autograd.grad(out, learned, torch.ones(2, *out.shape), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore")  # torch.jit, with which TensorBoard's graphs are created, is deprecated
@pytest.mark.parametrize("case", ["embed-p16", "attend-some", "norm-some", "scatter-mask", "token-rows"])
def test_traced_functions_recompute_with_new_inputs(case):
    inputs, others = make(case, torch.float32), make(case, torch.float32, seed=1)
    fixed = {n: t for n, t in inputs.tensors.items() if n not in inputs.learned}

    def function(*learned: Tensor) -> Tensor:
        return call(m3ae_kernels, case, Inputs(fixed | dict(zip(inputs.learned, learned)), inputs.options))

    first, second = ([each.tensors[n].detach() for n in inputs.learned] for each in (inputs, others))
    assert torch.equal(torch.jit.trace(function, first, check_trace=False)(*second), function(*second))


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"^impl is 'triton' .*, but the tensors are on a CPU: use a GPU"):
        m3ae_kernels.gather_tokens(torch.randn(5, 8), torch.arange(2), impl="triton")


def test_devices_other_than_gpus_and_the_cpu_use_plain_torch():
    """C kernels would mistake the addresses of tensors on such devices for addresses in host memory."""
    for impl in ("auto", "torch"):
        assert kernel_for(impl, torch.device("mps"), torch.float32, 2, 16, 37) is PADDED


@pytest.mark.parametrize("case", SMALL)
def test_the_default_device_of_torch_has_no_effect(case):
    """A program may set a GPU as the default device and call the ops on CPU tensors."""
    inputs = make(case, torch.float32)
    if case == "attend-queries":  # two samples of the same length are computed together
        inputs.tensors |= {"cu_seqlens": torch.tensor([0, 4, 8, 24]), "cu_queries": torch.tensor([0, 4, 8, 13])}
    upstream = torch.ones_like(call(m3ae_kernels, case, inputs))
    expected = run(m3ae_kernels, case, inputs, upstream)
    _per_element.cache_clear()
    with torch.device("meta"):
        got = run(m3ae_kernels, case, inputs, upstream)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", ["pixel-p16", "pixel-rows", "hog-p16", "hog-rows", "token-z", "token-rows"])
def test_gradients_of_16_bits_are_never_multiplied_by_a_0d_factor_on_a_gpu(case):
    """On a GPU, torch rounds a 0-d factor to the dtype of the other factor, so a loss scale of 65,536 would be infinite
    in float16. Meta tensors follow the same path as tensors on a GPU."""
    products = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mul.Tensor:
                products.append({(x.dtype, x.dim()) for x in args if isinstance(x, Tensor)})
            return func(*args, **(kwargs or {}))

    inputs = make(case, torch.float16)
    tensors = {name: None if t is None else t.detach().to("meta") for name, t in inputs.tensors.items()}
    for name in inputs.learned:
        tensors[name].requires_grad_()
    each = Inputs(tensors, inputs.options)
    upstream = torch.empty_like(call(m3ae_kernels, case, each))
    with Record():
        run(m3ae_kernels, case, each, upstream)
    assert {(torch.float16, 2), (torch.float32, 1)} in products
    assert not any({(torch.float16, dims), (torch.float32, 0)} <= each for each in products for dims in (1, 2))


@pytest.mark.parametrize("module", [m3ae_kernels.PatchEmbed, m3ae_kernels.MaskedPixelLoss, m3ae_kernels.MaskedHogLoss])
def test_images_and_patch_sizes_of_modules_are_checked(module):
    options = {} if module is m3ae_kernels.PatchEmbed else {"reduction": "sum"}
    built, hidden = module(8, patch_size=2, **options), [torch.zeros(3, 8)] if options else []
    with pytest.raises(TypeError, match=r"^images must be a tensor, not NoneType$"):
        built(*hidden, None, torch.arange(3))
    with pytest.raises(TypeError, match=r"^patch_size is \(2, 2\), but must be an integer: patches are square$"):
        module(8, patch_size=(2, 2), **options)
    with pytest.raises(ValueError, match=r"^patch_size is 0, but must be at least 1$"):
        module(8, patch_size=0, **options)


def test_ids_of_orders_and_of_heads_are_checked():
    src, x = torch.tensor([0, -1, -1]), torch.zeros(3, 8)
    with pytest.raises(TypeError, match=r"^src must be a tensor, not list$"):
        m3ae_kernels.scatter_orders([0, -1])
    with pytest.raises(ValueError, match=r"^fill_ids has shape \(1,\), expected \[3\]$"):
        m3ae_kernels.scatter_orders(src, src[:1])
    with pytest.raises(TypeError, match=r"^table_ids must be int32 or int64, not torch.float32$"):
        m3ae_kernels.scatter_orders(src, None, src.float())
    norm, head = m3ae_kernels.GatherNorm(8), m3ae_kernels.MaskedTokenLoss(8, 5, reduction="sum")
    with pytest.raises(TypeError, match=r"^image_rows must be a tensor, not list$"):
        m3ae_kernels.head_inputs(x, norm=norm, image_rows=[0])
    with pytest.raises(TypeError, match=r"^text_rows must be int32 or int64, not torch.bool$"):
        m3ae_kernels.head_inputs(x, norm=norm, image_rows=src[:1], text_rows=src > 0)
    with pytest.raises(ValueError, match=r"^correct_weight has shape \(2,\), expected \[3\]$"):
        targets = torch.zeros(3, dtype=torch.int64)
        m3ae_kernels.m3ae_loss(
            x, x, image_head=head, image_targets=targets, text_head=head, targets=targets, correct_weight=torch.ones(2)
        )


def test_heads_from_linear_share_its_parameters():
    torch.manual_seed(0)
    for bias in (True, False):
        linear = nn.Linear(12, 31, bias=bias)
        head = m3ae_kernels.MaskedTokenLoss.from_linear(linear, reduction="mean")
        assert head.weight is linear.weight and head.bias is linear.bias
        hidden, targets = torch.randn(5, 12), torch.randint(0, 31, (5,))
        assert torch.allclose(head(hidden, targets), F.cross_entropy(linear(hidden), targets))
        assert torch.equal(head.predict(hidden), linear(hidden))
    linear, options = nn.Linear(12, 192), PIXELS | {"norm_pix": True, "reduction": "sum"}
    head = m3ae_kernels.MaskedPixelLoss.from_linear(linear, **options)
    assert [name for name, _ in head.named_parameters()] == ["weight", "bias"] and head.weight is linear.weight
    images, ids = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8), torch.arange(4)
    hidden = torch.randn(4, 12)
    expected = reference.masked_pixel_loss(hidden, linear.weight, images, ids, bias=linear.bias, **options)
    assert torch.allclose(head(hidden, images, ids), expected)


def test_torch_precision_settings_are_used():
    """The newer settings, with which torch.get_float32_matmul_precision() raises an error, are used too."""
    from m3ae_kernels.triton_impl.common import precision

    matmul = torch.backends.cuda.matmul
    setting = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"  # before torch 2.9
    before = getattr(matmul, setting)
    values = (
        (("tf32", "tf32"), ("ieee", "tf32x3")) if setting == "fp32_precision" else ((True, "tf32"), (False, "tf32x3"))
    )
    try:
        for value, expected in values:
            setattr(matmul, setting, value)
            assert precision(torch.float32) == expected
        assert precision(torch.bfloat16) == "ieee"
        inputs = make("pixel-p16", torch.float32)
        assert error(call(m3ae_kernels, "pixel-p16", inputs), call(reference, "pixel-p16", double(inputs))) < 1e-6
    finally:
        setattr(matmul, setting, before)


def test_the_older_precision_setting_is_used_if_there_is_no_newer_one(monkeypatch):
    """For example, torch 2.8 has only the older one."""
    from m3ae_kernels.triton_impl import common

    for allowed, expected in ((True, "tf32"), (False, "tf32x3")):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert common.precision(torch.float32) == expected


def test_channels_last_images_are_read_without_copying():
    for case in ("embed-last", "pixel-mean-last"):
        inputs = make(case, torch.float32)
        images = inputs.tensors["images"]
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
            run(m3ae_kernels, case, inputs)
        copied = [e for e in record.events() if e.name in ("aten::clone", "aten::copy_") and e.input_shapes]
        assert not any(list(images.shape) in e.input_shapes for e in copied)


def test_importing_the_library_imports_no_compiler():
    code = "import sys, m3ae_kernels; print({'torch._dynamo', 'triton'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "set()\n", ran.stderr
