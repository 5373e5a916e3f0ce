"""The benchmarks compare like with like."""

import gzip
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import baselines, results, table, test_ops, test_step
from benchmarks.alone import Alone
from benchmarks.gpu import step as gpu_step
from benchmarks.gpu import trace
from benchmarks.reference import ReferenceM3AE, ReferenceTrainer
from benchmarks.workload import make_batch, make_config
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks
from tests.helpers.trainer import TINY as TRAINER_TINY

TINY = ModelConfig(
    size=None, emb_dim=24, depth=2, num_heads=2, dec_emb_dim=16, dec_depth=2, dec_num_heads=2,
    image_size=32, patch_size=8, text_length=12, vocab_size=50,
)  # fmt: skip


@pytest.mark.parametrize("expert", [False, True])
def test_reference_implementations_have_the_loss_and_gradients_of_the_engine(expert):
    """The reference and the engine have the same loss and gradients for the same parameters, samples and masks."""
    config = make_config(TINY, samples=5)
    torch.manual_seed(0)
    model = M3AE(config.model, config.loss)
    reference = ReferenceM3AE(config.model, config.masking, config.loss, expert=expert)
    reference.load_state_dict(model.state_dict())
    packed, padded = make_batch(config, 5, words=(1, 12))
    loss, expected = model(packed).loss, reference(padded)
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    loss.backward()
    expected.backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_of_the_faster_recipe_fits_its_model():
    model = TINY.model_copy(update={"dec_attention": "cross"})
    config = make_config(model, samples=3, masking=MaskingConfig(image_predicted=0.5, text_predicted=0.5))
    packed, _ = make_batch(config, 3, words=(4, 12))
    every, _ = make_batch(make_config(model, samples=3), 3, words=(4, 12))
    rows = [int((batch.image_row_weight > 0).sum() + (batch.text_row_weight > 0).sum()) for batch in (packed, every)]
    assert M3AE(model)(packed).loss.isfinite() and 0 < rows[0] < 0.7 * rows[1]


def test_faster_steps_have_the_flops_stated_in_the_guide():
    usual, cheap, fast = (test_step.step_flops(name, 8) for name in test_step.RECIPES)
    assert cheap[0] == fast[0] < 0.38 * usual[0] and usual[1] == cheap[1] == 0 < fast[1]
    of_muon = [test_step.step_flops(test_step.FAST, samples) for samples in (32, 256, 4096)]
    assert [round(muon / (passes + muon), 3) for passes, muon in of_muon] == [0.502, 0.112, 0.008]


@pytest.mark.parametrize(("size", "most"), [("small", 0.38), ("base", 0.59), ("large", 0.81)])
def test_a_cross_decoder_that_predicts_a_third_reduces_the_flops_of_the_workload(size, most):
    flops = []
    for model, masking in (({}, {}), ({"dec_attention": "cross"}, test_step.THIRD)):
        config = make_config(ModelConfig(size=size, **model), 8, masking=MaskingConfig(**masking))
        flops.append(executed_flops(config.model, make_batch(config, 8)[0]))
    assert 0.9 * most * flops[0] < flops[1] <= most * flops[0]


def test_the_reference_takes_the_same_steps_as_the_engine():
    """The reference and the engine use the same optimiser with the same settings."""
    config = make_config(TINY, samples=5, precision="fp32")
    torch.manual_seed(0)
    model = M3AE(config.model, config.loss)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    reference = ReferenceTrainer(config, start, torch.device("cpu"), expert=False)
    with join_ranks() as ranks:
        engine = build_engine(model, config, ranks)
        for seed in range(4):
            packed, padded = make_batch(config, 5, seed=seed, words=(1, 12))
            engine.step([packed], packed.counts, 1e-3)
            reference.step(padded, 1e-3)
    weights = dict(reference.model.named_parameters())
    # the gradient of the keys' bias is rounding error, which Adam amplifies
    for name in start.keys() - {n for n in start if n.endswith("qkv.bias")}:
        moved = model.get_parameter(name) - start[name]
        assert (weights[name] - model.get_parameter(name)).norm() < 2e-3 * moved.norm(), name


def test_results_are_written_to_the_tables_of_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    rates = {"reference": 2.0, "expert": 4.0, "engine": 10.0}
    steps = [
        {"size": "tiny", "batch": 3, "implementation": n, "samples/s": rate, table.SPEEDUP: 10 / rate}
        for n, rate in rates.items()
    ]
    ops = [{"what": "a", "samples/s": 1234.5}, {"what": "b", "samples/s": None}]
    for name, title, rows in (("step", "Steps", steps), ("ops", "Ops", ops)):
        results.write(name, title, rows, tmp_path / "results/some-cpu")
    assert table.main(["--readme", str(readme), "--results", str(tmp_path / "results")]) == 0
    text = readme.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    head = "| machine | tiny, batch 3: samples/s | speed-up over reference | speed-up over expert |"
    assert f"{head}\n|---|--:|--:|--:|\n" in text
    assert "(results/some-cpu/README.md) | 10 | 5.00 x | 2.50 x |\n" in text and "Ops" not in text
    assert table.NOTE not in text
    page = (tmp_path / "results/some-cpu/README.md").read_text()
    assert "**Ops**" in page and "| a | 1,234 |" in page and "| b | - |" in page


def test_the_readmes_table_uses_readable_machine_names_and_marks_the_earlier_expert(tmp_path):
    def measured(folder, device, version):
        rows = [
            {"size": "tiny", "batch": 3, "implementation": name, "samples/s": 1.0, table.SPEEDUP: 2.0}
            for name in ("reference", "expert", "engine")
        ]
        path = results.write("step", "Steps", rows, tmp_path / folder)
        written = json.loads(path.read_text())
        written["about"] |= {"device": device, "m3ae_fast": version}
        path.write_text(json.dumps(written))

    measured("a", "Intel Xeon Processor, family 6 model 167", "0.2.0")
    measured("b", "AMD EPYC, Zen 5", "0.1.0")
    made = table.section(tmp_path, tmp_path / "README.md")
    assert "| [Intel with AMX](a/README.md) | 1 | 2.00 x | 2.00 x |\n" in made
    assert "| [AMD Zen 5](b/README.md) | 1 | 2.00 x | 2.00 x * |\n" in made
    assert made.endswith(f"\n\n{table.NOTE}\n") and made.count(table.NOTE) == 1


def test_the_first_claim_of_the_readme_agrees_with_its_tables():
    text = table.README.read_text()
    claim = re.search(r"(\d+) to (\d+) times as fast as a plain .*? and ([\d.]+) to ([\d.]+) times", text, re.DOTALL)
    rows = [line for line in text.splitlines() if line.count(" x") == 4]
    ratios = [[float(number) for number in re.findall(r"([\d.]+) x", row)] for row in rows]
    over_reference = [ratio for row in ratios for ratio in row[::2]]
    over_expert = [ratio for row in ratios for ratio in row[1::2]]
    claimed = [float(number) for number in claim.groups()]
    assert claimed[:2] == [round(min(over_reference)), round(max(over_reference))]
    assert claimed[2:] == [round(min(over_expert), 1), round(max(over_expert), 1)]


def test_a_table_requires_its_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    assert table.main(["--readme", str(readme), "--results", str(tmp_path)]) == 2
    assert table.START in capsys.readouterr().err


def test_an_implementation_is_measured_in_its_own_process():
    with Alone("reference", TINY.model_dump(mode="json"), 2, batches=1, words=(1, 12)) as process:
        first, second = process.losses
        assert first > second  # the loss decreases
        assert process.step() > 0 and process.held_bytes() > 50e6


def test_the_shipped_trainer_is_timed(tmp_path, monkeypatch):
    """The trainer is timed with DeepSpeed and with plain torch, with its loader, and compared with an expert that runs
    out of memory."""

    def fail(case):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(gpu_step, "time_expert", fail)
    monkeypatch.setattr(gpu_step, "START_UP_STEPS", 5)
    monkeypatch.setattr(gpu_step, "STEPS", 15)
    config = {name: TRAINER_TINY[name] for name in ("model", "optim", "train", "deepspeed")}
    case = gpu_step.Case("tiny", config | {"model": config["model"] | {"vocab_size": 50}}, batch=4, samples=16)
    gpu_step.run(tmp_path, [case])
    rows = results.read(tmp_path / "gpu-step.json")
    assert [row["implementation"] for row in rows] == ["engine, DeepSpeed", "engine, torch", "expert"]
    assert [row["samples/s"] is None for row in rows] == [False, False, True]
    assert all(0 <= row["data wait"] < 1 and row["reference MFU"] > 0 and row["peak GB"] > 0 for row in rows[:2])
    assert not (tmp_path / "gpu-profile.json").exists()  # a CPU has no kernels
    with pytest.raises(RuntimeError, match=r"zero_optimization\.stage"):
        wrong = replace(case, config=config | {"deepspeed": {"zero_optimization": {"stage": 9}}})
        gpu_step.time_trainer(wrong, tmp_path, tmp_path / "kept", 1, plain=False)
    assert "zero_optimization.stage" in (tmp_path / "kept/log.txt").read_text()
    kept = {path.name for path in (tmp_path / "tiny-4-torch").iterdir()}
    assert kept >= {"log.txt", "metrics.jsonl", "trace.json.gz"}


def test_the_hand_optimised_baseline_is_timed_on_changing_batches(monkeypatch):
    class Fake:
        def __init__(self, name, model, samples, **options):
            assert (name, samples, options) == ("expert", 8, {"words": (8, 32), "batches": 4})

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def step(self):
            return 0.5

        def held_bytes(self):
            return 2e9

    monkeypatch.setattr(gpu_step, "Alone", Fake)
    row = gpu_step.time_expert(gpu_step.Case("small", {"model": {"size": "small"}}, batch=8))
    assert (row["samples/s"], row["peak GB"]) == (16, 2) and row["reference MFU"] > 0


def test_timed_configs_are_the_shipped_ones():
    assert [(case.name, case.batch, case.model.size) for case in gpu_step.shipped()] == [
        (name, 512, name) for name in ("large", "base", "small")
    ]


def test_a_trace_is_summarised_by_the_time_of_each_part(tmp_path):
    def event(start, length, name, cat="kernel"):
        return {"ph": "X", "ts": start, "dur": length, "name": name, "cat": cat}

    kernels = {
        "void flash::flash_fwd_kernel<cutlass>": "attention",
        "nvjet_tst_128x256": "matmul",
        "sm90_xmma_gemm_bf16": "matmul",
        "triton_poi_fused_add_3": "elementwise",
        "patch_embed_kernel": "own ops",
        "void multi_tensor_apply_kernel<adam>": "optimiser",
        "ncclDevKernel_AllReduce": "communication",
        "Memcpy HtoD": "copies",
    }
    assert {name: trace.part_of(name) for name in kernels} == kernels
    events = [event(100 * i, 90, name) for i, name in enumerate(kernels)]
    events += [event(50, 100, "nvjet_on_another_stream"), event(0, 9, "aten::mm", "cpu_op")]
    events += [event(0, 400, f"ProfilerStep#{i}", "user_annotation") for i in (5, 6)] + [{"ph": "M", "name": "meta"}]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    spent = {row["part"]: row["ms per step"] for row in trace.breakdown(path)}
    assert spent == pytest.approx(
        {"communication": 0.045, "attention": 0.045, "own ops": 0.045, "optimiser": 0.045, "matmul": 0.14}
        | {"copies": 0.045, "elementwise": 0.045, "idle": 0.03, "whole": 0.395}
    )
    events.append(event(900, 30, "nvjet_on_another_stream"))
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert trace.heaviest(path, 2) == [
        {"kernel": "nvjet_on_another_stream", "part": "matmul", "launches": 1.0, "ms per step": pytest.approx(0.065)},
        {"kernel": "void flash::flash_fwd_kernel<cutlass>", "part": "attention", "launches": 0.5, "ms per step": 0.045},
    ]


def without_a_driver(**_):
    raise RuntimeError("0 active drivers ([]). There should only be one.")


@pytest.fixture
def tiny_ops(monkeypatch):
    """Set up the table of ops at tiny sizes, without a compiler, and with one library that does not run."""
    rows: list[results.Row] = []
    sizes = replace(test_ops.SIZES, samples=2, patch=4, grid=3, visible=3, words=8, encoder=32, decoder=32, vocab=97)
    monkeypatch.setattr(test_ops, "SIZES", sizes)
    monkeypatch.setattr(test_ops, "ROWS", rows)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(baselines, "_liger", lambda: without_a_driver)
    return rows


@pytest.mark.parametrize("name", ["attention", "masked_token_loss", "gather_tokens", "packed_attention, loss rows"])
def test_a_row_of_the_op_table_has_every_column(tiny_ops, name):
    """The columns of libraries that do not run here are empty."""
    pedantic = SimpleNamespace(pedantic=lambda *_, **__: None, extra_info={})
    test_ops.test_op(pedantic, name)
    (row,) = tiny_ops
    columns = {"both passes, ms", "both passes, eager torch, ms", "peak memory, MB", "peak memory, eager torch, MB"}
    assert row.keys() == pedantic.extra_info.keys() >= columns | {"op"}
    found = {rival: row[f"both passes, {rival}, ms"] is not None for rival in test_ops.RIVALS}
    theirs = name == "masked_token_loss" and hasattr(torch.nn.functional, "linear_cross_entropy")
    assert found["torch.compile"] == (name != "attention")
    assert found["torch linear_cross_entropy"] == theirs and not found["Liger"]
