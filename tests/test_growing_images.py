"""Training that begins with smaller images: their positions, crops and FLOPs, and runs that are resumed across a change
of the size."""

import re
import shutil
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.masking import draw_mask
from m3ae_fast.batch.packing import Geometry, Sample, pack
from m3ae_fast.config import Config, DataConfig, MaskingConfig, ModelConfig, SourceConfig, load_config, parse
from m3ae_fast.data import Data, Preparation, ShardStore, Share, eval_loader, open_corpus, train_loader
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.positions import Positions, resampled, sincos_2d, sincos_of_smaller
from m3ae_fast.process.stoppable_loop import Stopped
from m3ae_fast.training import dry_run, throughput_estimate
from m3ae_fast.training.dry_run import report
from m3ae_fast.training.run import preparation_of
from tests.helpers.shards import members, write_tar
from tests.helpers.trainer import TINY

PROBE = {"train": [{"shards": "a.tar"}], "val": [{"shards": "b.tar"}], "every": 5}
MODEL = ModelConfig(
    size=None, emb_dim=16, depth=2, num_heads=2, dec_emb_dim=16, dec_depth=1, dec_num_heads=2, image_size=32,
    patch_size=8, vocab_size=0,
)  # fmt: skip


def test_position_embeddings_of_a_smaller_image_are_resampled_from_those_of_the_full_size():
    assert torch.equal(sincos_of_smaller(16, 4, 4), sincos_2d(16, 4))
    middle = torch.tensor([0.5, 2.5])  # each patch covers 2 x 2 patches of the full size
    assert torch.allclose(sincos_of_smaller(16, 2, 4)[[0, 3], :4], torch.sin(middle[:, None] * 0.1 ** torch.arange(4)))
    for kind in ("sincos", "stored"):
        positions = Positions(MODEL.model_copy(update={"positions": kind}), 16)
        found, _ = positions(None, None, [(2, 2), (2, 2)])
        expected = resampled(positions.image, (2, 2)) if kind == "stored" else sincos_of_smaller(16, 2, 4)
        assert torch.equal(found, expected) and torch.equal(positions(None, None, [(4, 4)])[0], positions.image)
        assert torch.equal(positions(None, None, [])[0], positions.image)  # a batch that contains only captions


def test_positions_of_a_smaller_image_follow_the_model():
    """The positions have the model's dtype, and follow a change of the image size."""
    positions = Positions(MODEL, 16)
    first = positions(None, None, [(2, 2)])[0]
    positions.to(torch.bfloat16)
    assert torch.equal(positions(None, None, [(2, 2)])[0], first.bfloat16())
    positions.float().lay_out(MODEL.model_copy(update={"image_size": 64}))
    assert torch.equal(positions(None, None, [(2, 2)])[0], sincos_of_smaller(16, 2, 8))


def test_each_image_size_is_used_for_its_fraction_of_the_steps():
    """The number of steps is rounded to the nearest integer, even if fraction times steps is slightly less than an
    integer. Batches that a rollback has left out, here two before the first change of the size, do not count."""
    train = TINY["train"] | {"image_sizes": [[0.29, 8], [0.57, 16]], "steps": 100}
    data = TINY["data"] | {"tokenizer": None}
    config = parse(Config, TINY | {"model": MODEL.model_dump(), "train": train, "data": data}, "test")
    opened = Data(train=None, val=None, tokenizer=None)
    schedule = Schedule(config.train, config.optim, 1000)
    for left_out, expected in (((), ((29, 8), (57, 16))), ((60, 29, 3), ((31, 8), (59, 16)))):
        assert preparation_of(config, M3AE(MODEL), opened, schedule, left_out).smaller == expected


@pytest.fixture
def batches(tmp_path):
    """Return the batches of four steps and of an evaluation. The images of the first step have 8 pixels per side, and
    those of the second step 16."""
    corpus = open_corpus(
        [SourceConfig(shards=write_tar(tmp_path / "a.tar", members(range(8), "image")))], ShardStore(None)
    )
    masking = MaskingConfig(image_predicted=0.5)
    preparation = Preparation(Geometry.of(MODEL), masking, None, 0, smaller=((1, 8), (2, 16)))
    share, data = Share(8, 2, 0, 1), DataConfig(train=[SourceConfig(shards="none")], workers=0)
    training = [*train_loader(data, corpus, preparation, share, range(4))]
    return training, [*eval_loader(data, corpus, preparation, share)]


def test_training_images_have_the_size_of_their_step_and_evaluation_images_that_of_the_model(batches):
    training, evaluation = batches
    assert [batch.images.shape[-1] for batch in training] == [8, 8, 16, 16, 32, 32, 32, 32]
    assert [{*batch.grids} for batch in training[::2]] == [{(1, 1)}, {(2, 2)}, {(4, 4)}, {(4, 4)}]
    assert all(batch.images.shape[-1] == 32 for batch in evaluation)
    flops = [executed_flops(MODEL, batch) for batch in training[::2]]
    assert flops[0] < flops[1] / 2 < flops[2] / 4 and flops[2] == flops[3]


def test_an_evaluation_predicts_all_masked_patches(batches):
    """Training predicts half of the 12 masked patches."""
    predicted = [[int((batch.image_row_weight > 0).sum()) for batch in part] for part in batches]
    assert predicted[0][4:] == [4 * 6] * 4 and sum(predicted[1]) == 8 * 12


def test_the_loss_of_smaller_images_equals_that_of_a_model_built_for_their_size(batches):
    """Only the positions differ: they are derived from the positions of the full size."""
    training, _ = batches
    torch.manual_seed(0)
    model = M3AE(MODEL)
    other = M3AE(MODEL.model_copy(update={"image_size": 16}))
    other.load_state_dict(model.state_dict())
    for holder, dim in ((other.encoder_input, 16), (other.decoder_input.unshuffle, 16)):
        holder.positions.image = sincos_of_smaller(dim, 2, 4)
    losses = [each(training[2]).loss for each in (model, other)]
    assert torch.equal(*losses) and losses[0].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["self", "cross"])
def test_compiled_blocks_process_images_of_all_sizes_without_recompilation(attention, monkeypatch):
    """Blocks are only traced, because compiling them takes a long time."""
    torch._dynamo.reset()
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiled, backend=counter))
    model, found = M3AE(MODEL.model_copy(update={"dec_attention": attention, "dec_depth": 2})), []
    for blocks in (model.encoder, model.decoder):
        blocks.compile_blocks()
    for samples, side in ((4, 16), (4, 16), (4, 24), (4, 32), (3, 32)):
        geometry, generator = replace(model.geometry, image_size=side), torch.Generator().manual_seed(side)
        images = [torch.full((3, side, side), number, dtype=torch.uint8) for number in range(samples)]
        masks = [draw_mask((side // 8) ** 2, 0.75, generator) for _ in images]
        batch = pack([Sample(f"{i}", image, mask) for i, (image, mask) in enumerate(zip(images, masks))], geometry)
        model(batch).loss.backward()
        found.append(counter.frame_count)
    assert {*found} == {2}  # the first batch creates one graph for the encoder and one for the decoder
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"resize": "native"}, {}, r"square images with pixel targets, not model\.resize native"),
        ({"image_targets": "vqgan"}, {}, r"square images with pixel targets, not model\.image_targets vqgan"),
        ({}, {"hours": 1.0}, r"a known number of steps: set train\.hours"),
        ({}, {"image_sizes": [[0.5, 8], [0.25, 12]]}, r"the fractions \[0\.5, 0\.25\] must increase"),
        ({}, {"image_sizes": [[0.5, 10]]}, r"10 must be a multiple of model\.patch_size"),
        ({}, {"image_sizes": [[0.5, 32]]}, r"below model\.image_size"),
        ({}, {"image_sizes": [[0.5, 8], [0.5, 16]]}, r"the fractions \[0\.5, 0\.5\] must increase"),
        ({}, {"stop_at": "plateau", "probe": PROBE}, r"a known number of steps: set train\.hours and train\.stop_at"),
        ({}, {"image_sizes": [[1.0, 16]]}, r"train\.image_sizes"),
    ],
)
def test_settings_incompatible_with_growing_images_are_refused_in_one_line(model, train, message):
    data = {"image_tokenizer": "vqgan"} if "image_targets" in model else {}
    changed = {"model": TINY["model"] | model, "data": TINY["data"] | data}
    changed |= {"optim": TINY["optim"] | ({"schedule": "wsd"} if "stop_at" in train else {})}
    with pytest.raises(UserError, match=message) as error:
        parse(Config, TINY | changed | {"train": TINY["train"] | {"image_sizes": [[0.5, 8]]} | train}, "test")
    assert "\n" not in str(error.value)


def test_growing_images_are_refused_if_the_data_section_asks_for_native_images():
    changed = {"data": TINY["data"] | {"resize": "native"}, "train": TINY["train"] | {"image_sizes": [[0.5, 8]]}}
    with pytest.raises(UserError, match=r"square images with pixel targets, not model\.resize native"):
        parse(Config, TINY | changed, "test")


def test_throughput_is_measured_with_images_of_full_size(monkeypatch):
    """The whole run, which may end early, is not part of the measurement either."""
    configs = []

    def set_up(config, *_):
        configs.append(config)
        raise Stopped

    monkeypatch.setattr(throughput_estimate, "set_up", set_up)
    config = parse(Config, TINY | {"train": TINY["train"] | {"image_sizes": [[0.5, 8]]}}, "test")
    with pytest.raises(Stopped):
        throughput_estimate.measure_batch(config, SimpleNamespace(ranks=SimpleNamespace(is_main=False)), 4, 1.0)
    (measured,) = configs
    assert (measured.train.image_sizes, measured.train.global_batch, measured.run.loggers) == ([], 4, [])
    assert measured.train.steps > 10**9 and measured.run.dir != config.run.dir
    pace, schedule = throughput_estimate.ThroughputEstimate(0.5, 4, 9), Schedule(config.train, config.optim, 50)
    assert pace.sentence(config, schedule).endswith("; steps with smaller images take less time")


def test_a_dry_run_counts_the_flops_of_all_sizes(capsys):
    """The mean is that over the steps of a run, each with the FLOPs of a model of its size."""
    sizes = {"emb_dim": 256, "num_heads": 4, "vocab_size": 0}
    given = {"model": TINY["model"] | sizes, "data": TINY["data"] | {"tokenizer": None}}
    train = TINY["train"] | {"image_sizes": [[0.25, 8], [0.75, 16]], "steps": 8}
    config = parse(Config, TINY | given | {"train": train}, "test")
    flops = []
    for size in (8, 8, 16, 16, 16, 16, 32, 32):
        model = M3AE(config.model.model_copy(update={"image_size": size}))
        image = torch.zeros(3, size, size, dtype=torch.uint8)
        sample = Sample("one", image, draw_mask((size // 8) ** 2, config.masking.image_ratio))
        flops.append(executed_flops(model.config, pack([sample], model.geometry)))
    needs = dry_run._Needs(config, 1, None)
    assert (needs.flops, needs.mean_flops) == (flops[-1], pytest.approx(np.mean(flops)))
    assert needs.rate * needs.mean_flops == pytest.approx(dry_run.UTILISATION * needs.peaks.flops)
    report(config, world=1, data=False)
    assert f"{np.mean(flops) / 1e9:,.1f} G on average, with train.image_sizes" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [[[0.75, 96]], [[0.01, 96], [0.75, 160]]])
def test_a_dry_run_plans_the_loader_for_the_phase_with_the_fastest_steps(capsys, sizes):
    """A loader that is sufficient on average would be the bottleneck while the images are small."""
    config = load_config("large")
    train = config.train.model_copy(update={"image_sizes": sizes})
    report(config.model_copy(update={"train": train}), world=8, data=False)
    growing = capsys.readouterr().out
    report(config.model_copy(update={"model": config.model.model_copy(update={"image_size": 96})}), world=8, data=False)
    small = capsys.readouterr().out
    (line,), (always,) = (re.findall("^loader +(.*)$", out, re.M) for out in (growing, small))
    assert line == always.replace(" samples/s", " samples/s with images of 96 px")
    assert "the loader is the bottleneck" in line and float(line.split()[0]) > dry_run.CORES_PER_GPU


@pytest.mark.slow
def test_all_ranks_switch_image_size_together_and_a_run_can_be_resumed_across_the_switch(trainer):
    options = ["train.image_sizes=[[0.5,8]]", "train.save_every=1", "train.keep=9", "data.workers=0", "optim.name=muon"]
    options = [word for option in options for word in ("--set", option)]
    out = trainer("one", *options)
    assert "train.image_sizes=[[0.5, 8]]" in out and "Open: " in out
    whole = trainer.losses("one")
    assert len(whole) == 6 and not trainer.lines("one", "mfu")
    folder = trainer.folder / "one"
    for last in (2, 3):  # before and at the change of the size
        for path in checkpoint.saved_steps(folder):
            if checkpoint.step_of(path) > last:
                shutil.rmtree(path)
        trainer("one", *options, "--resume", "auto")
        assert trainer.losses("one") == whole
    trainer("two", *options, ranks=2)
    np.testing.assert_allclose(np.array(trainer.losses("two")), np.array(whole), rtol=2e-5)
    other = ["--set", "train.image_sizes=[]", "--set", "train.steps=9", "--resume", "auto"]
    assert "which changes the stream of samples" in trainer("one", *options, *other, code=2)
    trainer("full", "--set", "optim.name=muon")
    assert trainer.lines("full", "val_image_loss")[0] == trainer.lines("one", "val_image_loss")[0]
