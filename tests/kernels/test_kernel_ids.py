"""Ids that are out of range raise errors: in torch's code on a CPU and, with M3AE_KERNELS_CHECK, everywhere. The tests
run on both implementations, like those of test_kernel_ops.py."""

import os
import re

import m3ae_kernels
import pytest
import torch
import torch._dynamo
from m3ae_kernels import ids

from tests.kernels.kernel_cases import CASES, SMALL, Inputs, call, make, run

TRITON = os.environ.get("M3AE_KERNELS_IMPL") == "triton"
OUT_OF_RANGE = [
    ("embed-p16", "patch_ids", -1, "from 0 to 47"),
    ("embed-last", "patch_ids", 10**6, "from 0 to 35"),
    ("pixel-p16", "patch_ids", -1, "from 0 to 47"),
    ("pixel-rows", "patch_ids", 24, "from 0 to 23"),
    ("hog-p16", "patch_ids", -1, "from 0 to 17"),
    ("hog-rows", "patch_ids", 24, "from 0 to 23"),
    ("gather-some", "rows", 101, "from 0 to 100"),
    ("gather-long", "rows", -1, "from 0 to 30"),
    ("norm-some", "rows", 101, "from 0 to 100"),
    ("scatter-mask", "src", 97, "from 0 to 96, or negative for no row"),
    ("scatter-no-rows", "src", 0, "absent, because there are no rows, or negative for no row"),
    ("scatter-mask", "fill_ids", 2, "from 0 to 1, or negative for no row"),
    ("scatter-mask", "table_ids", 35, "from 0 to 34, or negative for no row"),
    ("token-some", "targets", 97, "from 0 to 96, or -100 to be ignored"),
    ("token-some", "targets", -1, "from 0 to 96, or -100 to be ignored"),
    ("token-rows", "targets", 2**31 - 1, "from 0 to 63, or -100 to be ignored"),
]
ENDS = [
    ("attend-some", "cu_seqlens", 1, 44, "cu_seqlens[1] is 44"),
    ("attend-some", "cu_seqlens", 0, 1, "cu_seqlens[0] is 1"),
    ("attend-queries", "cu_queries", -1, 12, "cu_queries[3] is 12"),
    ("attend-queries", "cu_seqlens", 2, 3, "cu_seqlens[2] is 3"),
]


@pytest.fixture
def check(monkeypatch):
    monkeypatch.setenv(ids.ENV, "1")


def wrong(case: str, name: str, at: int, value: int) -> Inputs:
    inputs = make(case, torch.float32)
    inputs.tensors[name][at] = value
    return inputs


@pytest.mark.parametrize("case, name, value, valid", OUT_OF_RANGE)
def test_an_id_out_of_range_is_named_with_op_argument_row_and_range(check, case, name, value, valid):
    op = CASES[case][0].__name__
    message = f"{op}: {name} is out of range at row 2: it is {value}, but must be {valid}"
    with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
        call(m3ae_kernels, case, wrong(case, name, 2, value))


@pytest.mark.parametrize("case, name, at, value, found", ENDS)
def test_invalid_sample_boundaries_are_named(check, case, name, at, value, found):
    with pytest.raises(
        IndexError, match=rf"^packed_attention: {name} must increase from 0 to .* length: {re.escape(found)}$"
    ):
        call(m3ae_kernels, case, wrong(case, name, at, value))


@pytest.mark.parametrize(
    "case, name",
    [
        ("gather-some", "rows"), ("norm-some", "rows"), ("scatter-mask", "src"), ("pixel-p16", "patch_ids"),
        ("hog-p16", "patch_ids"),
    ],
)  # fmt: skip
def test_duplicate_rows_are_named_if_rows_must_be_distinct(check, case, name):
    inputs = make(case, torch.float32)
    named = inputs.tensors[name]
    first, again = (named >= 0).nonzero()[[1, 4], 0].tolist()
    named[again] = named[first]
    message = f"^{CASES[case][0].__name__}: {name} is {named[first]} at row {first} and again at row {again}: "
    with pytest.raises(IndexError, match=message):
        call(m3ae_kernels, case, inputs)


@pytest.mark.parametrize(
    "name, at, message", [("fill_order", 3, "out of range at row 3"), ("table_order", 3, "again at")]
)
def test_orders_that_are_not_permutations_are_named(check, name, at, message):
    inputs = make("scatter-mask", torch.float32)
    named = [inputs.tensors[each] for each in ("src", "fill_ids", "table_ids")]
    orders = dict(zip(("fill_order", "table_order"), m3ae_kernels.scatter_orders(*named)))
    call(m3ae_kernels, "scatter-mask", Inputs(inputs.tensors, inputs.options | orders))
    orders[name][at] = 641 if name == "fill_order" else orders[name][at - 1]
    with pytest.raises(IndexError, match=f"^scatter_tokens: {name} is .*{message}"):
        call(m3ae_kernels, "scatter-mask", Inputs(inputs.tensors, inputs.options | orders))


@pytest.mark.parametrize("case", SMALL)
def test_checking_valid_ids_does_not_change_results(case, monkeypatch):
    expected = run(m3ae_kernels, case, make(case, torch.float32))
    monkeypatch.setenv(ids.ENV, "1")
    for name, got in run(m3ae_kernels, case, make(case, torch.float32)).items():
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize("case, name, value, valid", OUT_OF_RANGE)
def test_torch_on_a_cpu_always_checks_ids(case, name, value, valid):
    inputs = wrong(case, name, 2, value)
    inputs.options["impl"] = "torch"
    with pytest.raises(
        IndexError, match=f"^{CASES[case][0].__name__}: {name} is out of range at row 2: it is {value}, "
    ):
        call(m3ae_kernels, case, inputs)


@pytest.mark.parametrize("case, name, at, value, found", ENDS)
def test_sample_boundaries_are_always_checked_on_a_cpu(case, name, at, value, found):
    with pytest.raises(IndexError, match=re.escape(found)):
        call(m3ae_kernels, case, wrong(case, name, at, value))


def test_kernels_do_not_check_ids_by_default(monkeypatch):
    """The check would synchronise with the device."""
    monkeypatch.setattr(ids, "check_range", lambda *_, **__: pytest.fail("the ids were read"))
    for value in ("0", ""):
        monkeypatch.setenv(ids.ENV, value)
        assert not ids.checked(torch.zeros(3), "triton") and ids.checked(torch.zeros(3), "torch")
        assert not ids.checked(torch.zeros(3, device="meta"), "torch")


def test_compiled_code_checks_ids_too(check):
    torch._dynamo.reset()
    compiled = torch.compile(m3ae_kernels.gather_tokens, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    assert torch.equal(compiled(x, torch.tensor([4, 0])), x[[4, 0]])
    with pytest.raises(IndexError, match=r"^gather_tokens: rows is out of range at row 1: it is 5"):
        compiled(x, torch.tensor([4, 5]))


def test_ids_numbered_per_image_are_named_and_converted(check):
    """MAE numbers visible patches per image. Without the conversion, the ops would read only the first image."""
    torch.manual_seed(0)
    kept, patches = torch.rand(4, 16).argsort(1)[:, :8], 16
    images, x = torch.randn(4, 3, 16, 16), torch.randn(4, patches, 12)
    embed, loss = (
        m3ae_kernels.PatchEmbed(12, patch_size=4),
        m3ae_kernels.MaskedPixelLoss(12, patch_size=4, reduction="sum"),
    )
    calls = {
        "gather_tokens": lambda ids: m3ae_kernels.gather_tokens(x, ids),
        "patch_embed": lambda ids: embed(images, ids),
        "masked_pixel_loss": lambda ids: loss(torch.ones(4, 8, 12), images, ids),
    }
    found = {}
    for op, call_op in calls.items():
        with pytest.raises(IndexError, match=rf"^{op}: .* again at row .* converted by m3ae_kernels.flat_ids$"):
            call_op(kept)
        found[op] = call_op(m3ae_kernels.flat_ids(kept, patches))
    torch.testing.assert_close(found["gather_tokens"], x.gather(1, kept[..., None].expand(-1, -1, 12)))
    alone = [embed(image[None], ids) for image, ids in zip(images, kept)]
    torch.testing.assert_close(found["patch_embed"], torch.stack(alone))
    losses = [loss(torch.ones(8, 12), image[None], ids) for image, ids in zip(images, kept)]
    torch.testing.assert_close(found["masked_pixel_loss"], sum(losses))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_flat_ids_number_the_patches_of_a_batch(dtype):
    ids = torch.tensor([[2, 0], [1, 2]], dtype=dtype)
    flat = m3ae_kernels.flat_ids(ids, 3)
    assert flat.tolist() == [[2, 0], [4, 5]] and flat.dtype == dtype
    assert m3ae_kernels.flat_ids(ids[:, 0], 3).tolist() == [2, 4]
    with pytest.raises(IndexError, match=r"^flat_ids: ids is out of range at row 3: it is 2, but must be from 0 to 1$"):
        m3ae_kernels.flat_ids(torch.tensor([[0, 1], [0, 2]], dtype=dtype), 2)
    with pytest.raises(TypeError, match=r"^ids must be int32 or int64"):
        m3ae_kernels.flat_ids(ids.float(), 3)


def test_an_image_may_be_embedded_with_several_masks(check):
    embed, images = m3ae_kernels.PatchEmbed(12, patch_size=4), torch.randn(2, 3, 8, 8)
    first, second = embed(images, torch.tensor([[0, 1, 6], [3, 1, 6]]))
    assert torch.equal(first[1:], second[1:])
    embed(images[:1], torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(IndexError, match=r"patch_ids is 1 at row 1 and again at row 3"):
        embed(images, torch.tensor([[0, 1, 2], [1, 2, 3]]))


def test_equal_patch_ids_are_accepted_as_padding(check):
    images, ids = torch.randn(1, 3, 8, 8), torch.tensor([2, 0, 3, 0, 0])
    m3ae_kernels.PatchEmbed(12, patch_size=4)(images, ids)
    for kind in (m3ae_kernels.MaskedPixelLoss, m3ae_kernels.MaskedHogLoss):
        loss = kind(12, patch_size=4, reduction="sum")
        loss(torch.ones(5, 12), images, ids, torch.tensor([1.0, 1, 1, 0, 0]))
