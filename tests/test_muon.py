"""Tests of Muon. Its update is compared with the polar factor, and its steps are compared with a loop over matrices.
Loss curves are equal for all numbers of ranks and all ZeRO stages. Checkpoints contain its state."""

import json
import math
import re
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import pack
from m3ae_fast.config import Config, parse
from m3ae_fast.engine import optimizer
from m3ae_fast.engine.build import build_engine
from m3ae_fast.engine.memory_estimate import (
    activation_bytes,
    matrix_elements,
    memory_needed,
    muon_bytes,
    typical_batch,
    zero_bytes,
)
from m3ae_fast.engine.muon import orthogonalisation_flops, orthogonalise
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.ranks import join_ranks
from m3ae_fast.training.dry_run import report
from m3ae_fast.training.user_warnings import open_options
from tests.helpers.checkpoints import changes_of
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer import TINY, zero
from tests.test_model import MIXED
from tests.test_model import TINY as SMALL

MUON = ["--set", "optim.name=muon", "--set", "train.save_every=2", "--set", "train.keep=9", "--set", "train.ema=0.7"]


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 7)])
def test_newton_schulz_gives_about_the_polar_factor(shape):
    """The result has the singular vectors of the matrix. Five iterations of Jordan's polynomial map all singular values
    that are not tiny to values between 0.68 and 1.14, whatever the scale of the matrix."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, *shape, generator=generator)
    u, sizes, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ orthogonalise(x) @ v.mT
    values = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=2e-5)
    expected = (sizes / sizes.norm(dim=1, keepdim=True)).double()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(values, expected.float(), rtol=0, atol=1e-3)
    values = values[sizes > 0.02 * sizes.norm(dim=1, keepdim=True)]
    assert len(values) > 0 and values.min() > 0.6 and values.max() < 1.2
    torch.testing.assert_close(orthogonalise(1e-3 * x), orthogonalise(x), rtol=0, atol=1e-3)
    assert not orthogonalise(torch.zeros(2, *shape)).any()


def test_the_flops_of_newton_schulz_are_those_of_its_products():
    weights = [(torch.randn(24, 16), 1), (torch.randn(3 * 8, 12), 3), (torch.randn(16, 40), 1)]
    with FlopCounterMode(display=False) as counter:
        for weight, number in weights:
            orthogonalise(weight.view(number, -1, weight.shape[1]))
    assert orthogonalisation_flops(dict(weights)) == counter.get_total_flops()


def config(**optim) -> Config:
    data = json.loads(json.dumps(TINY))
    data["optim"] |= {"name": "muon", "weight_decay": 0.3, "betas": [0.8, 0.6]} | optim
    data["train"] |= {"global_batch": 6, "micro_batch": 3}
    return parse(Config, data, "test")


def stacked(name: str, model: M3AE) -> int:
    """Return the number of matrices in the weight with this name; 0 if AdamW and not Muon updates the weight."""
    if name == "decoder.kv.weight":
        return 2 * model.config.dec_depth
    if name.endswith(".qkv.weight"):
        return 3
    return int(
        name == "decoder_input.proj.weight" or (".blocks." in name and name.endswith("weight") and "norm" not in name)
    )


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_muon_steps_equal_those_of_a_loop_over_matrices(attention, monkeypatch):
    """Gradients are clipped before the orthogonalisation. The momentum is Nesterov's, the weight decay is decoupled,
    and AdamW updates the other parameters."""
    monkeypatch.setattr(optimizer, "ADAM_EPS", 0.01)
    settings = config(clip_grad=0.1, muon_momentum=0.7, muon_lr_ratio=3.0)
    with join_ranks() as ranks:
        torch.manual_seed(0)
        model = M3AE(SMALL.model_copy(update={"dec_attention": attention}), settings.loss)
        batch = pack(MIXED, model.geometry)
        engine = build_engine(model, settings, ranks)
        weights = engine.whole("model")
        moments = {name: torch.zeros(2, *w.shape) for name, w in weights.items()}
        for step, rate in enumerate((0.02, 0.0, 0.05), 1):
            model.zero_grad()
            model(batch, batch.counts).loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            model.zero_grad()
            norm = torch.stack([g.norm() for g in gradients.values()]).norm()
            for name, gradient in gradients.items():
                gradient = gradient * min(1.0, 0.1 / norm.item())
                first, second = moments[name]
                decay = 0.3 if name.endswith(".weight") else 0.0
                if number := stacked(name, model):
                    first += 0.3 * (gradient - first)
                    update = gradient + 0.7 * (first - gradient)
                    pieces = [orthogonalise(x[None])[0] * 0.2 * math.sqrt(max(x.shape)) for x in update.chunk(number)]
                    weights[name] -= 3 * rate * (torch.cat(pieces) + decay * weights[name])
                else:
                    first += 0.2 * (gradient - first)
                    second += 0.4 * (gradient.square() - second)
                    size = (second / (1 - 0.6**step)).sqrt() + 0.01
                    weights[name] -= rate * (first / (1 - 0.8**step) / size + decay * weights[name])
            engine.step([batch], batch.counts, rate)
            for name, found in engine.whole("model").items():
                torch.testing.assert_close(found, weights[name], rtol=2e-4, atol=2e-5, msg=name)
        kinds = engine.kinds
    assert {name for name, each in kinds.items() if each == ("momentum_buffer",)} == {
        name for name in weights if stacked(name, model)
    }
    assert sum(stacked(name, model) > 1 for name in weights) >= 2
    assert engine.optimizer_name == "Muon for hidden matrices (learning rate x 3), torch AdamW for the rest"


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_newton_schulz_runs_in_the_precision_of_the_run(precision, dtype):
    """In bfloat16, the orthogonalised matrices differ from those in float32 by about 1 %."""

    class Products(TorchDispatchMode):
        dtypes: set[torch.dtype] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.baddbmm.default:  # no other part of a step calls it
                self.dtypes.add(args[0].dtype)
            return func(*args, **kwargs or {})

    settings = config()
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"precision": precision})})
    with join_ranks() as ranks:
        torch.manual_seed(0)
        model = M3AE(SMALL, settings.loss)
        batch = pack(MIXED, model.geometry)
        engine = build_engine(model, settings, ranks)
        engine.step([batch], batch.counts, 0.0)  # creates the state
        with Products() as products:
            engine.step([batch], batch.counts, 0.01)
    assert products.dtypes == {dtype}
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalise(x), orthogonalise(x, dtype)
    assert rounded.dtype == dtype and (rounded.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.slow
def test_muon_loss_curves_on_any_number_of_ranks_equal_those_of_plain_torch(tmp_path):
    """The curves of one, two and three ranks, at every stage, equal the curve of plain torch in float32. Partitions may
    begin and end anywhere in a matrix."""
    found = {}
    for ranks in (1, 2, 3):
        path = tmp_path / f"{ranks}.jsonl"
        code, out = run_ranks("tests.helpers.zero_cases", ["muon", str(path)], ranks, tmp_path / f"{ranks}.log")
        assert code == 0, out[-3000:]
        found[ranks] = {name: np.array(curve) for name, curve in map(json.loads, path.read_text().splitlines())}
    plain = found[1]["fp32 stage=None"]
    assert np.ptp(plain[:, 0]) > 0.1
    for (ranks, curves), (precision, tolerance) in product(found.items(), (("fp32", 1e-5), ("bf16", 2e-2))):
        cases = {name: curve for name, curve in curves.items() if name.startswith(precision)}
        assert len(cases) == 4
        for name, curve in cases.items():
            np.testing.assert_allclose(curve, plain, rtol=tolerance, err_msg=f"{name} on {ranks} ranks")


def _cut(trainer, run: str, step: int) -> None:
    for path in checkpoint.saved_steps(trainer.folder / run):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 1])
def test_resume_is_bitwise(trainer, stage):
    options = [*zero(stage), *MUON, "--set", "train.precision=bf16"]
    out = trainer("run", *options)
    assert "optimiser: Muon for hidden matrices (learning rate x 2), torch AdamW for the rest" in out
    whole = trainer.losses("run")
    _cut(trainer, "run", 4)
    trainer("run", *options, "--resume", "auto")
    assert trainer.losses("run") == whole


@pytest.mark.slow
def test_resume_on_other_ranks_and_stages(trainer):
    """DDP, ZeRO stages 2, 0 and 1, and plain torch take turns, each with the state that the previous one has saved."""
    options = [*MUON, "--set", "train.save_every=1"]
    trainer("run", *zero(None), *options, ranks=2)
    whole = np.array(trainer.losses("run"))
    for step, (stage, ranks) in enumerate([(2, 2), (0, 1), (1, 2), (None, 1)], 1):
        _cut(trainer, "run", step)
        trainer("run", *zero(stage), *options, "--resume", "auto", ranks=ranks)
        np.testing.assert_allclose(np.array(trainer.losses("run")), whole, rtol=2e-5, err_msg=f"{stage}, {ranks}")
    (saved,) = checkpoint.saved_steps(trainer.folder / "run")[-1:]
    names = checkpoint.open_state(saved).shapes
    kinds = {
        kind for kind, _, name in (each.partition("/") for each in names) if name == "encoder.blocks.0.mlp.fc1.weight"
    }
    assert kinds == {"model", "momentum_buffer", "ema"}


@pytest.mark.slow
def test_changing_the_optimiser_is_refused_when_a_run_is_resumed(trainer):
    trainer("run", *MUON, "--set", "train.steps=2")
    out = trainer("run", "--resume", "auto", "--set", "train.steps=4", code=2)
    (line,) = out.strip().splitlines()[-1:]
    assert "was made with optim.name = muon, but the config has adamw" in line


@pytest.mark.parametrize(
    "section",
    [{"stage": 3}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}],
    ids=["stage 3", "offload_optimizer"],
)
def test_settings_that_split_matrices_are_refused_with_muon(section, request):
    data = json.loads(json.dumps(TINY))
    data["optim"] |= {"name": "muon"}
    data["deepspeed"] = {"zero_optimization": section}
    with pytest.raises(
        UserError, match=f"optim.name muon needs whole matrices on the GPU, but {request.node.callspec.id}"
    ):
        parse(Config, data, "test")
    data["optim"]["name"] = "adamw"
    parse(Config, data, "test")


def test_a_run_with_adamw_is_not_resumed_with_muon(tmp_path):
    settings = config()
    saved = config(name="adamw").model_dump(mode="json")
    info = checkpoint.Info(1, 0, settings.run.seed, saved, {})
    with pytest.raises(UserError, match=r"was made with optim\.name = adamw, but the config has muon"):
        changes_of(tmp_path, info, settings, {})
    changes_of(tmp_path, info, config(name="adamw"), {})


@pytest.mark.parametrize("stage", [0, 2])
def test_the_memory_estimate_has_one_moment_of_a_matrix(stage):
    model = M3AE(SMALL)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if stacked(name, model))
    assert matrix_elements(config(name="adamw"), model) == 0
    assert matrix_elements(config(), model) == matrices > 0
    *same, moments = zero_bytes(parameters, stage, 4, True)
    assert zero_bytes(parameters, stage, 4, True, matrices) == (*same, moments - matrices * 4 / (4 if stage else 1))
    assert muon_bytes(matrices, stage, 4) == 4 * matrices * (1.75 if stage else 4)


@pytest.mark.parametrize(("stage", "parts"), [(0, 1), (2, 2)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_memory_in_a_dry_run_includes_one_moment_of_a_matrix(name, stage, parts, capsys):
    """At stage 2, each of two ranks has half of the gradients and of the moments."""
    sections = config(name=name).model_dump(mode="json") | {"deepspeed": {"zero_optimization": {"stage": stage}}}
    settings = parse(Config, sections, "test")
    model = M3AE(settings.model)
    moments = 4 * sum(
        p.numel() * (1 if name == "muon" and stacked(n, model) else 2) for n, p in model.named_parameters()
    )
    activations = 3 * activation_bytes(settings, typical_batch(settings, model))  # bytes of a micro-batch
    # bytes for an update by Muon, after activations have been freed
    update = 4 * (1 + 3 / parts) * matrix_elements(settings, model)
    assert name == "adamw" or update > activations
    weights = 4 * sum(p.numel() for p in model.parameters())
    expected = weights + (weights + moments) / parts + max(activations, update)
    report(settings, world=2 if stage else 1, gpus=False, data=False)
    (found,) = re.findall(r"^memory +(\S+) GB per rank", capsys.readouterr().out, re.M)
    assert found == f"{expected / 1e9:,.3g}"


def test_a_muon_update_allocates_less_memory_than_the_activations_of_a_large_batch():
    """Activations are freed before the update. With a large batch, the peak is reached before this, so the only
    difference from AdamW is the missing second moment of matrices. With a batch of one sample, the update of Muon needs
    more memory than the activations."""

    def needed(name: str, samples: int) -> float:
        given = config(name=name)
        train = given.train.model_copy(update={"micro_batch": None})
        return memory_needed(given.model_copy(update={"train": train}), 1, samples)

    matrices = matrix_elements(config(), M3AE(config().model))
    assert needed("adamw", 4096) - needed("muon", 4096) == pytest.approx(4 * matrices)
    assert needed("muon", 1) > needed("adamw", 1)


def test_settings_without_a_counterpart_in_the_official_code_are_reported_as_open():
    assert open_options(config(name="adamw")) == ""
    assert open_options(config()).startswith("Open: optim.name=muon; ")
    partly = TINY | {"masking": {"text_predicted": 0.5}}
    without_text = partly | {"model": TINY["model"] | {"vocab_size": 0}}
    assert open_options(parse(Config, partly, "test")).startswith("Open: masking.text_predicted=0.5; ")
    assert open_options(parse(Config, without_text, "test")) == ""
