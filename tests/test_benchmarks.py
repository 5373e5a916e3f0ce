"""The benchmarks compare like with like."""

import json

import pytest
import torch

from benchmarks import results, table
from benchmarks.alone import Alone
from benchmarks.gpu import step as gpu_step
from benchmarks.reference import ReferenceM3AE
from benchmarks.workload import make_batch, make_config
from m3ae_fast.config import ModelConfig
from m3ae_fast.model.m3ae import M3AE

TINY = ModelConfig(
    size=None, emb_dim=24, depth=2, num_heads=2, dec_emb_dim=16, dec_depth=2, dec_num_heads=2,
    image_size=32, patch_size=8, text_length=12, vocab_size=50,
)  # fmt: skip


@pytest.mark.parametrize("expert", [False, True])
def test_references_do_the_engines_work(expert):
    """Same parameters, samples and masks: same loss and gradients."""
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


def test_results_become_the_readmes_tables(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    rows = [{"what": "a", "samples/s": 1234.5}, {"what": "b", "samples/s": None}]
    for name, title in (("step", "Steps"), ("ops", "Ops")):
        results.write(name, title, rows, tmp_path / "results/some-cpu")
    assert table.main(["--readme", str(readme), "--results", str(tmp_path / "results")]) == 0
    text = readme.read_text()
    assert "(results/some-cpu/README.md)" in text and "Ops" not in text
    assert "**Ops**" in (tmp_path / "results/some-cpu/README.md").read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    assert "**Steps**" in text and "| a | 1,234 |" in text and "| b | - |" in text


def test_table_needs_its_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    assert table.main(["--readme", str(readme), "--results", str(tmp_path)]) == 2
    assert table.START in capsys.readouterr().err


def test_an_implementation_works_alone():
    with Alone("reference", TINY.model_dump(mode="json"), 2) as process:
        first, second = process.losses
        assert first > second  # it learns
        assert process.startup > process.step() > 0
        assert process.peak_bytes() > -4 * 200_000  # less its gradients


def test_gpu_steps(tmp_path, monkeypatch):
    """The table, where one implementation has no memory left."""

    class Fake:
        startup = 9.0

        def __init__(self, name, model, samples):
            if name == "expert":
                raise RuntimeError("left")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def step(self):
            return 0.5

        def peak_bytes(self):
            return 2e9

    monkeypatch.setattr(gpu_step, "Alone", Fake)
    path = gpu_step.run(tmp_path, cases=[({"size": "small"}, 8)])
    expert, engine = json.loads(path.read_text())["rows"]
    assert expert["samples/s"] is None
    assert (engine["samples/s"], engine["peak GB"], engine["start-up s"]) == (16, 2, 9)
    assert engine["reference MFU"] > 0
