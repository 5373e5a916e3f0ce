"""The implementations that the benchmarks compare do the same work."""

import json
import re
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from m3ae_kernels.tuning.timing import CpuDevice

from benchmarks import alone, apart, baselines, limit, results, table, test_attention, test_ops, test_step
from benchmarks.alone import Alone
from benchmarks.measure import measure
from benchmarks.reference import ReferenceM3AE, ReferenceTrainer
from benchmarks.workload import make_batch, make_config
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.engine.build import build_engine
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks

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
    usual, cheap, fast = (test_step.step_flops(name, 8, 224) for name in test_step.RECIPES)
    assert cheap[0] == fast[0] < 0.38 * usual[0] and usual[1] == cheap[1] == 0 < fast[1]
    of_muon = [test_step.step_flops(test_step.FAST, samples, 224) for samples in (32, 256, 4096)]
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


def test_results_are_written_to_the_readme_and_to_one_page(tmp_path):
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    rates = {"reference": 2.0, "expert": 4.0, "engine": 10.0}
    steps = [
        {"size": "tiny", "batch": 3, "implementation": n, "samples/s": rate, table.SPEEDUP: 10 / rate}
        for n, rate in rates.items()
    ]
    ops = [{"what": "a", "samples/s": 1234.5}, {"what": "b", "samples/s": None}]
    for name, title, rows in (("step", "Old", steps[:1]), ("ops", "Ops", ops), ("step", "Steps", steps)):
        results.write(name, title, rows, folder / "some-cpu.json")
    assert results.read(folder / "some-cpu.json").keys() == {"step", "ops"}
    assert table.main(["--readme", str(readme), "--results", str(folder)]) == 0
    text = readme.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    head = "| machine | tiny, batch 3: samples/s | speed-up over reference | speed-up over expert |"
    assert f"{head}\n|---|--:|--:|--:|\n" in text
    assert "](results/README.md#" in text and ") | 10 | 5.00 x | 2.50 x |\n" in text and "Ops" not in text
    assert table.NOTE not in text
    page = (folder / "README.md").read_text()
    assert page.index("**Steps**") < page.index("**Ops**") and "Old" not in page
    assert "| a | 1,234 |" in page and "| b | - |" in page


def test_the_readmes_table_uses_readable_machine_names_and_marks_the_earlier_expert(tmp_path):
    def measured(file, device, version, names=("reference", "expert", "engine")):
        rows = [
            {"size": "tiny", "batch": 3, "implementation": name, "samples/s": 1.0, table.SPEEDUP: 2.0} for name in names
        ]
        path = tmp_path / f"{file}.json"
        results.write("step", "Steps", rows, path)
        written = json.loads(path.read_text())
        written["step"]["about"] |= {"device": device, "m3ae_fast": version}
        path.write_text(json.dumps(written))

    measured("a", "Intel Xeon Processor, family 6 model 167", "0.2.0")
    measured("b", "AMD EPYC, family 26 model 2", "0.1.0")
    measured("c", "a GPU", "0.2.0", ("expert", "engine"))  # the reference needs more memory than there is
    made = table.section(tmp_path, tmp_path / "page.md")
    assert "| [Intel with AMX](README.md#intel-with-amx) | 1 | 2.00 x | 2.00 x |\n" in made
    assert "| [AMD Zen 5](README.md#amd-zen-5) | 1 | 2.00 x | 2.00 x * |\n" in made
    assert "| [a GPU](README.md#a-gpu) | 1 | - | 2.00 x |\n" in made
    assert made.endswith(f"\n\n{table.NOTE}\n") and made.count(table.NOTE) == 1


def test_a_baseline_that_fails_is_left_out_but_not_the_engine(monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(test_step, "Alone", fail)
    with ExitStack() as stack:
        assert test_step.start(stack, "reference", {}, 2) is None
        with pytest.raises(RuntimeError, match="no memory left"):
            test_step.start(stack, "engine", {}, 2)


def test_the_limit_is_that_of_flops_or_of_bytes(monkeypatch):
    monkeypatch.setattr(limit, "peak", lambda *_: 1e12)
    monkeypatch.setattr(limit, "bandwidth", lambda *_: 1e11)
    cpu = torch.device("cpu")
    assert limit.least_ms((2e12, 1e11), cpu, torch.bfloat16) == pytest.approx(2000)
    assert limit.least_ms((1e12, 3e11), cpu, torch.bfloat16) == pytest.approx(3000)
    assert limit.least_ms((1e12, 3e11), cpu, torch.float32) == pytest.approx(6000)


def test_the_bandwidth_of_a_cpu_is_measured(monkeypatch):
    monkeypatch.setitem(limit.COPIED_BYTES, "cpu", 1 << 20)
    assert limit.bandwidth.__wrapped__(torch.device("cpu")) > 1e8


def test_measurements_alternate_between_functions():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measure(CpuDevice(), functions, rounds=2, repeats=2)
    assert "".join(calls) == "aaabbb" + "aabb" * 2 + "ab"  # warm-up, alternating rounds, peak memory
    assert all(t.p20 <= t.p50 <= t.p80 for t in timings.values())


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
        assert process.step() > 0


def test_the_process_of_an_implementation_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(alone, "LIMIT_S", 0.01)  # shorter than the import of torch
    with pytest.raises(RuntimeError, match=r"exit code -9 because it did not answer within 0\.01 s"):
        Alone("reference", TINY.model_dump(mode="json"), 2)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("return {'op': name}", ""),
        ("raise ValueError('no ' + name)", "(?s)the process of gather ended with exit code 1.*no gather"),
        ("os.abort()", "the process of gather was ended by SIGABRT"),
        ("ctypes.PyDLL(None).sleep(60)", "the process of gather did not end within 15 s and was killed"),
    ],
)
def test_a_measurement_that_fails_crashes_or_hangs_ends_only_its_process(tmp_path, monkeypatch, end, message):
    (tmp_path / "stand_in.py").write_text(f"import ctypes, os\n\ndef row_of(name):\n    {end}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(apart, "LIMIT_S", 15 if "sleep" in end else 120)
    row_of = SimpleNamespace(__module__="stand_in", __name__="row_of")
    with pytest.raises(RuntimeError, match=message) if message else nullcontext():
        assert apart.apart(row_of, "gather") == {"op": "gather"}


def without_a_driver(**_):
    raise RuntimeError("0 active drivers ([]). There should only be one.")


@pytest.fixture
def tiny_ops(monkeypatch):
    """Set up the table of ops at tiny sizes, without a compiler, and with one library that does not run."""
    rows: list[results.Row] = []
    sizes = replace(test_ops.SIZES, samples=2, patch=4, grid=3, visible=3, words=8, encoder=32, decoder=32, vocab=97)
    monkeypatch.setattr(test_ops, "SIZES", sizes)
    monkeypatch.setattr(test_ops, "ROWS", rows)
    monkeypatch.setattr(limit, "peak", lambda *_: 1e12)
    monkeypatch.setattr(limit, "bandwidth", lambda *_: 1e11)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(baselines, "_liger", lambda: without_a_driver)
    return rows


@pytest.mark.parametrize("name", ["masked_token_loss", "gather_tokens", "packed_attention, loss rows"])
def test_a_row_of_the_op_table_has_every_column(tiny_ops, name):
    """The columns of libraries that do not run here are empty."""
    test_ops.test_op(name)
    (row,) = tiny_ops
    columns = {"both passes, ms", "both passes, eager torch, ms", "peak memory, MB", "peak memory, eager torch, MB"}
    assert row["limit of both passes by FLOPs and bytes, ms"] > 0
    assert row.keys() >= columns | {"op"}
    found = {rival: row[f"both passes, {rival}, ms"] is not None for rival in test_ops.RIVALS}
    theirs = name == "masked_token_loss" and hasattr(torch.nn.functional, "linear_cross_entropy")
    assert found["torch.compile"] and found["matmuls alone"] == (name == "masked_token_loss")
    assert found["torch linear_cross_entropy"] == theirs and not found["Liger"]


def test_attention_is_timed_with_every_kernel_that_runs(tiny_ops, monkeypatch):
    rows: list[results.Row] = []
    monkeypatch.setattr(test_attention, "SIZES", test_ops.SIZES)
    monkeypatch.setattr(test_attention, "ROWS", rows)
    test_attention.test_attention("packed_attention, encoder")
    assert [row["kernel"] for row in rows] == ["engine", "eager", "SDPA"]
    assert all(row["part"] == "encoder" and row["ms"] > 0 and row["limit, ms"] > 0 for row in rows)
