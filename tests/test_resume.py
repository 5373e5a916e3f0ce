"""Runs that are killed, stopped or moved continue as if uninterrupted."""

import json
import os
import shutil
import signal
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m3ae_fast import checkpoint, train
from m3ae_fast.base.errors import UserError
from m3ae_fast.checkpoint import resuming, state_files
from m3ae_fast.checkpoint.saver import judge
from m3ae_fast.checkpoint.state_files import STATE_FILE
from m3ae_fast.config import Config, DataConfig, ModelConfig, SourceConfig, parse
from m3ae_fast.data import Data, Layout, ShardStore, open_corpus
from m3ae_fast.data.fingerprint import WRITTEN, fingerprint
from m3ae_fast.training import pretraining_task
from tests.helpers.checkpoints import changes_of, save
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import members, write_tar
from tests.helpers.trainer import CLIPART, TINY, zero

pytestmark = pytest.mark.slow

SAVE = ["--set", "train.save_every=2", "--set", "train.keep=9"]


def _cut(trainer, run: str, step: int) -> None:
    """Make `run` look as if it had died after the checkpoint of `step`."""
    for path in checkpoint.saved_steps(trainer.folder / run):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_resume_is_bitwise(trainer, stage):
    """The run is in bf16, in which weights are rounded copies of float32 master weights."""
    options = [*zero(stage), *SAVE, "--set", "train.precision=bf16"]
    trainer("run", *options)
    whole = trainer.losses("run")
    _cut(trainer, "run", 4)
    trainer("run", *options, "--resume", "auto")
    assert trainer.losses("run") == whole


@pytest.mark.parametrize(("stage", "ranks", "then_stage", "then_ranks"), [(3, 2, 1, 1), (1, 1, 3, 2), (None, 1, 2, 2)])
def test_resume_on_other_ranks_and_stage(trainer, stage, ranks, then_stage, then_ranks):
    trainer("run", *zero(stage), *SAVE, ranks=ranks)
    whole = np.array(trainer.losses("run"))
    _cut(trainer, "run", 4)
    trainer("run", *zero(then_stage), *SAVE, "--resume", "auto", ranks=then_ranks)
    np.testing.assert_allclose(np.array(trainer.losses("run")), whole, rtol=2e-5)


def test_a_run_killed_at_any_point_resumes_bitwise_identically(trainer):
    """A run that is killed at three arbitrary moments and then finished is bitwise equal to the uninterrupted run."""

    def read(path):
        try:
            return path.read_text()
        except FileNotFoundError:  # it does not exist yet, or is being replaced
            return ""

    options = ["--set", "train.steps=40", "--set", "train.save_every=1"]
    trainer("whole", *options)
    for delay in (0.05, 0.4, 0.9):
        process = trainer.fork("killed", *options, "--resume", "auto")
        metrics = trainer.folder / "killed/metrics.jsonl"
        before = read(metrics)
        while process.is_alive() and len(read(metrics)) <= len(before):
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.join()
    trainer("killed", *options, "--resume", "auto")
    assert trainer.losses("killed") == trainer.losses("whole")


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, ["data.workers=0"]),
        # the signal nearly always arrives during an evaluation
        (signal.SIGTERM, ["data.workers=3", "train.eval_every=1", "train.eval_samples=1000"]),
        (signal.SIGUSR1, ["data.workers=1", "train.save_every=1"]),
        (signal.SIGHUP, ["data.workers=1"]),
    ],
)
def test_signals_to_the_process_group_save_a_checkpoint_and_exit(trainer, number, options):
    options = ["train.steps=100000", "train.save_every=100000", "train.keep=1", *options]
    process = trainer.fork("run", *(word for o in options for word in ("--set", o)))
    _wait_for_steps(trainer, "run", process.is_alive, 3)
    os.killpg(process.pid, number)
    process.join(60)
    out = trainer.log("run").read_text()
    assert process.exitcode == 0, out
    assert f"({number.name})" in out and "Traceback" not in out
    assert trainer.checkpoints("run")[-1] == f"step-{trainer.losses('run')[-1][0]:08d}"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_run_whose_launcher_died_saves_a_checkpoint(trainer, launcher):
    """A killed launcher does not forward signals, and DeepSpeed's outer launcher never does. In both cases, the ranks
    notice that the launcher has ended."""
    options = ["--set", "train.steps=100000", "--set", "train.save_every=100000"]
    process = trainer.start("run", *options, ranks=2, launcher=launcher)
    _wait_for_steps(trainer, "run", lambda: process.poll() is None, 3)
    process.kill()
    process.wait(timeout=60)
    deadline = time.time() + 60
    while not checkpoint.saved_steps(trainer.folder / "run"):
        assert time.time() < deadline, process.communicate()[0]
        time.sleep(0.2)


@pytest.mark.parametrize("step", [3, 6])  # also the last step, after which only the evaluation is missing
def test_an_evaluation_interrupted_by_a_stop_is_repeated_when_the_run_is_resumed(trainer, monkeypatch, capsys, step):
    options = ["--set", "train.eval_every=3", "--set", "data.workers=0"]
    trainer("whole", *options)
    evaluate, calls = pretraining_task.evaluate, []

    def signalled(*args):
        if len(calls) == step // 3:  # the first call is before step 1
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return evaluate(*args)

    monkeypatch.setattr(pretraining_task, "evaluate", signalled)
    assert train.main(trainer.arguments("run", *options)) == 0
    assert f"the evaluation after step {step} was interrupted" in capsys.readouterr().out
    monkeypatch.undo()
    for _ in range(2):  # the second call has nothing to repeat
        trainer("run", *options, "--resume", "auto")
    names = ("val_image_loss", "val_text_loss")
    found = [trainer.lines(name, *names) for name in ("whole", "run")]
    assert found[0] == found[1] and [at for at, *_ in found[0]] == [0, 3, 6]
    assert trainer.losses("run") == trainer.losses("whole")


def _wait_for_steps(trainer, run: str, alive, count: int) -> None:
    metrics = trainer.folder / run / "metrics.jsonl"
    while alive() and not (metrics.exists() and len(metrics.read_text().splitlines()) >= count):
        time.sleep(0.05)
    assert alive()


def test_a_run_can_be_resumed_from_an_older_checkpoint(trainer):
    """Later checkpoints are set aside, and the run repeats the same steps."""
    trainer("run", *SAVE)
    whole = trainer.losses("run")
    out = trainer("run", *SAVE, "--resume", str(trainer.folder / "run/checkpoints/step-00000002"))
    assert out.count("a later checkpoint was renamed to") == 2
    assert trainer.losses("run") == whole
    steps = [f"step-{step:08d}" for step in (2, 4, 6)]
    assert trainer.checkpoints("run") == [f"aside-{step}" for step in steps[1:]] + steps
    saved = checkpoint.saved_steps(trainer.folder / "run")
    assert [checkpoint.read_info(path).samples for path in saved] == [16 * step for step in (2, 4, 6)]


def test_resuming_on_other_data_is_refused_and_other_changes_are_reported(trainer):
    trainer("run", *SAVE, "--set", "train.steps=2")
    shards = json.dumps([{"shards": str(CLIPART / "train-0001.tar")}])
    options = ["--resume", "auto", "--set", "train.steps=3"]
    out = trainer("run", *options, "--set", f"data.train={shards}", code=2)
    assert "was made with data.train = 1 shards with" in out and "to train on other samples, start a new run" in out
    assert "note: train.steps was 2 and is 3 from here on" in trainer("run", *options)
    assert [step for step, *_ in trainer.losses("run")] == [1, 2, 3]


def test_permitted_changes_of_a_resumed_run_are_applied(tmp_path):
    config = parse(Config, TINY, "tiny")
    stream = {"data.train": "1 shards", "data.tokenizer": "9 tokens", "data.order": "4 lanes, windows of 2 shards"}
    info = checkpoint.Info(1, 0, config.run.seed, config.model_dump(mode="json"), {}, stream)

    def fits(section: str, stream=stream, **values) -> list[str]:
        part = getattr(config, section).model_copy(update=values)
        return changes_of(tmp_path, info, config.model_copy(update={section: part}), stream)

    assert fits("run", dir=tmp_path) == fits("data", workers=7, cache_dir=tmp_path) == fits("train", keep=9) == []
    for section, values in (("model", {"depth": 3}), ("run", {"seed": 1}), ("train", {"global_batch": 32})):
        with pytest.raises(UserError, match=f"was made with {section}.{next(iter(values))} = "):
            fits(section, **values)
    for section, values in (
        ("run", {"stream": stream | {"data.order": "8 lanes, windows of 2 shards"}}),
        ("data", {"crop_scale": (0.5, 1.0)}),
        ("data", {"flip": False}),
        ("masking", {"image_ratio": 0.5}),
        ("run", {"stream": stream | {"data.tokenizer": "8 tokens"}}),
    ):
        with pytest.raises(UserError, match="which changes the stream of samples; to train on other samples, start a"):
            fits(section, **values)
    assert fits("optim", peak_lr=0.5) == ["optim.peak_lr was 0.02 and is 0.5 from here on"]
    assert fits("train", steps=7, precision="bf16", log_every=2) == [
        "train.steps was 6 and is 7 from here on",
        "train.precision was fp32 and is bf16 from here on",
    ]
    with pytest.raises(
        UserError, match=r"with data\.image_tokenizer = none, but it is now weights 1, which changes the stream"
    ):
        fits("run", stream=stream | {"data.image_tokenizer": "weights 1"})


def test_the_masking_of_captions_may_change_if_the_model_is_image_only(tmp_path):
    config = parse(Config, TINY | {"model": TINY["model"] | {"vocab_size": 0}}, "tiny")
    saved = config.model_dump(mode="json")
    saved["masking"]["text_ratio"] = 0.5
    info = checkpoint.Info(1, 0, config.run.seed, saved, {}, {})
    assert changes_of(tmp_path, info, config, {}) == []
    saved["masking"]["image_predicted"] = 0.33
    with pytest.raises(UserError, match=r"was made with masking\.image_predicted = 0\.33"):
        changes_of(tmp_path, info, config, {})


# The effect of another value in a resumed run. A new setting must be added to one of the groups.
REFUSED, STREAM, NOTED, FREE = "was made with", "which changes the stream of samples", "from here on", ""
SETTINGS = {
    "run": {"seed": REFUSED, "dir": FREE, "loggers": FREE, "stall_timeout": FREE},
    # target_width is not compared, because it is the width of the teacher's features
    "model": {
        name: FREE if name in ("init_from", "pool", "target_width") else REFUSED for name in ModelConfig.model_fields
    },
    "masking": dict.fromkeys(("image_ratio", "text_ratio", "image_predicted", "text_predicted", "per"), STREAM),
    "loss": dict.fromkeys(
        ("image_weight", "text_weight", "image_all_tokens", "text_all_tokens", "norm_pix", "per"), NOTED
    )
    | {"teacher": FREE},  # the fingerprint contains a hash of the teacher's weights
    "data": dict.fromkeys(("crop_scale", "flip", "repeats", "image_tokens"), STREAM)
    # compared by the fingerprint, regardless of the location of the files
    | dict.fromkeys(("train", "tokenizer", "image_tokenizer"), FREE)
    | dict.fromkeys(("shuffle_shards", "lanes"), FREE)  # the fingerprint contains the order of the samples
    | {"show_channels": FREE}
    | dict.fromkeys(("val", "workers", "cache_dir", "cache_gb", "max_bad_fraction"), FREE),
    "optim": {"name": REFUSED}
    | dict.fromkeys(
        ("peak_lr", "end_lr", "warmup_epochs", "weight_decay", "betas", "clip_grad"), NOTED
    )
    | dict.fromkeys(("layer_decay", "muon_momentum", "muon_lr_ratio", "schedule", "decay_fraction"), NOTED),
    "train": {"global_batch": REFUSED}
    | dict.fromkeys(("epochs", "steps", "hours", "precision"), NOTED)
    | dict.fromkeys(
        (
            "micro_batch", "log_every", "eval_every", "save_every", "keep", "ema", "activation_checkpointing",
            "compile", "eval_samples", "pictures", "probe",
        ),
        FREE,
    ),
}  # fmt: skip


def test_every_setting_is_classified():
    sections = {name: getattr(parse(Config, TINY, "tiny"), name) for name in SETTINGS}
    assert Config.model_fields.keys() == SETTINGS.keys() | {"deepspeed"}
    assert {name: {*type(section).model_fields} for name, section in sections.items()} == {
        name: {*settings} for name, settings in SETTINGS.items()
    }


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, names in SETTINGS.items() for n in names])
def test_changing_a_setting_has_the_consequence_of_its_class(tmp_path, section, name):
    config = parse(Config, TINY, "tiny")
    saved = config.model_dump(mode="json")
    saved[section] |= {name: "another"}
    if section == "model":  # this section must stay valid, because it is parsed
        grey = {"image_mean": [0.5], "image_std": [0.5]} if name == "channels" else {}
        possible = {"value_range": [0, 4095], "channels": 1, "max_patches": 9, "target_width": 8}
        other = possible[name] if name in possible else _another(getattr(config.model, name))
        saved[section] |= grey | {name: other}
    info = checkpoint.Info(1, 0, config.run.seed, saved, {}, {})
    kind = SETTINGS[section][name]
    if kind in (REFUSED, STREAM):
        with pytest.raises(UserError, match=rf"was made with {section}\.{name} = .*{kind.replace(REFUSED, '')}"):
            changes_of(tmp_path, info, config, {})
    else:
        notes = changes_of(tmp_path, info, config, {})
        assert [note.split(" was another and is ")[0] for note in notes] == ([f"{section}.{name}"] if kind else [])


def _another(value):
    """Return another value of the same type that is valid for every setting of a tiny model."""
    others = {"tanh": "exact", "sincos": "stored", "after_norm": "before_norm", "pixels": "vqgan", None: "small"}
    others |= {"square": "native", "absolute": "centred", "uint8": "uint16", "self": "cross"}
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return [x / 2 for x in value]
    return (
        others[value]
        if value in others
        else value + 0.5
        if isinstance(value, float) and value >= 1
        else (0.25 if isinstance(value, float) else value * 2 or 1)
    )


def _fingerprint(folder, sources, labels=None):
    data = DataConfig.model_validate({"train": sources})
    corpus = open_corpus(data.train, ShardStore(folder))
    if labels is not None:
        corpus = replace(corpus, sources=[replace(corpus.sources[0], labels=np.array(labels))])
    return fingerprint(Data(corpus, None, None), Layout(1, 1))


def test_the_fingerprint_depends_on_every_property_of_a_source(tmp_path):
    one, two = (write_tar(tmp_path / f"{name}.tar", members(range(6))) for name in ("a", "b"))
    base = [{"shards": one, "weight": 1.0}, {"shards": two, "weight": 2.0}]
    found = _fingerprint(tmp_path, base)
    assert found == _fingerprint(tmp_path, base)
    for number, change, entry in (
        (0, {"weight": 3.0}, "data.train"),
        (1, {"weight": 1.0}, "data.train"),
        (1, {"loss_weight": 0.5}, "data.train.loss_weight"),
        (0, {"modality": "image"}, "data.train"),
        (0, {"caption_fraction": 0.5}, "data.train.caption_fraction"),
        (0, {"shards": two}, "data.train"),
        (0, {"shards": [one, two]}, "data.train"),
    ):
        sources = [dict(source) for source in base]
        sources[number] |= change
        other = _fingerprint(tmp_path, sources)
        assert entry in [name for name in other if other[name] != found[name]], change
    assert {*SourceConfig.model_fields} == {"shards", "weight", "loss_weight", "modality", "caption_fraction"}
    halves = [_fingerprint(tmp_path, [base[0] | a, base[1] | b]) for a, b in (({"caption_fraction": 0.5}, {}),
              ({}, {"caption_fraction": 0.5}), ({"caption_fraction": 0.5000001}, {}))]  # fmt: skip
    assert len({half["data.train.caption_fraction"] for half in halves}) == 3
    cuts = [_fingerprint(tmp_path, [{"shards": a}, {"shards": b}]) for a, b in (([one, two], one), (one, [two, one]))]
    assert cuts[0]["data.train"] != cuts[1]["data.train"]
    labelled = [_fingerprint(tmp_path, base[:1], labels) for labels in ([0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 0])]
    assert labelled[0]["data.train.labels"] != labelled[1]["data.train.labels"]


def main(argv):
    """Train on the shards in the separate home folder of each rank."""
    folder, *arguments = argv
    os.environ["HOME"] = f"{folder}/node{os.environ['RANK']}"
    return train.main(arguments)


def test_a_run_whose_nodes_see_different_shards_does_not_start(trainer):
    """If the run began, the nodes would read the samples in two different orders, and at the end, one node would wait
    for the other."""
    for node, shards in ((0, 2), (1, 1)):
        (trainer.folder / f"node{node}").mkdir()
        for number in range(shards):
            write_tar(trainer.folder / f"node{node}/{number}.tar", members(range(number * 40, number * 40 + 40)))
    sources = json.dumps([{"shards": "~/*.tar"}])
    arguments = trainer.arguments("run", "--set", f"data.train={sources}")
    code, output = run_ranks(__name__, [str(trainer.folder), *arguments], 2, trainer.log("run"))
    assert code == 2 and not (trainer.folder / "run/checkpoints").exists()
    (line,) = output.splitlines()
    assert line.startswith("error: data.train is 2 shards with 80 samples, ") and "on rank 0 (" in line
    assert "1 shards with 40 samples" in line and line.endswith("make the files identical on all nodes")


@pytest.mark.parametrize(("seen", "message"), [
    ({}, None),
    ({WRITTEN: "today"}, None),  # a copy has another modification time
    ({"data.train": "2 shards"}, r"data\.train is 1 shards on rank 0 \(a\), but 2 shards on rank 1 \(b\)"),
    ({"data.val": 7}, r"data\.val is 9 samples on rank 0 \(a\), but 7 samples on rank 1"),
    ({"data.val": None}, r"data\.val is 9 samples on rank 0 \(a\), but none on rank 1"),
])  # fmt: skip
def test_each_rank_compares_its_data_with_those_of_rank_0(seen, message):
    sent = []
    first = SimpleNamespace(from_main=lambda found: sent.append(found) or found, together=lambda work: work())
    stream, held_out = {"data.train": "1 shards", WRITTEN: "yesterday"}, SimpleNamespace(samples=9)
    resuming.require_same(first, stream, held_out)
    other = SimpleNamespace(from_main=lambda _: sent[0], together=first.together, rank=1, hosts=["a", "b"])
    stream |= {name: value for name, value in seen.items() if name != "data.val"}
    if "data.val" in seen:
        held_out = seen["data.val"] and SimpleNamespace(samples=seen["data.val"])
    if message is None:
        resuming.require_same(other, stream, held_out)
    else:
        with pytest.raises(UserError, match=message):
            resuming.require_same(other, stream, held_out)


def test_rewritten_shards_of_equal_size_are_reported_and_moved_shards_are_not(tmp_path):
    path = write_tar(tmp_path / "a.tar", members(range(6)))
    before = _fingerprint(tmp_path, [{"shards": path}])
    (tmp_path / "moved").mkdir()
    moved = shutil.copy2(path, tmp_path / "moved/a.tar")
    assert _fingerprint(tmp_path, [{"shards": str(moved)}]) == before
    os.utime(path, (1, 1_700_000_000))
    after = _fingerprint(tmp_path, [{"shards": path}])
    config = parse(Config, TINY, "tiny")
    info = checkpoint.Info(1, 0, config.run.seed, config.model_dump(mode="json"), {}, before)
    (note,) = changes_of(tmp_path, info, config, after)
    assert note.startswith("data.train.written was ") and "is 2023-11-14 22:13:20 UTC" in note
    with pytest.raises(UserError, match=r"data\.train\.loss_weight = 1, but it is now 2, which changes the stream"):
        changes_of(tmp_path, info, config, before | {"data.train.loss_weight": "2"})


def test_resuming_does_not_loop_on_weights_with_a_non_finite_loss(trainer):
    """After the first update, the weights are finite, but the loss is not. The weights are saved before this can be
    detected."""
    options = ["--set", "train.save_every=1", "--set", "train.keep=1", "--set", "optim.clip_grad=null"]
    trainer("run", *options, "--set", "train.steps=3")
    run = trainer.folder / "run"
    assert trainer.checkpoints("run") == ["step-00000003"]  # marked as good by the evaluation at the end
    assert checkpoint.is_good(checkpoint.saved_steps(run)[0])
    wild = [*options, "--resume", "auto", "--set", "train.steps=9", "--set", "optim.peak_lr=1e30"]
    out = trainer("run", *wild, code=2)
    assert "step-00000004 is now marked as failed" in out and "the last good checkpoint is" in out
    assert trainer.checkpoints("run") == ["step-00000003", "step-00000004"]
    out = trainer("run", *options, "--resume", "auto", "--set", "train.steps=5")
    assert "step-00000004 is skipped: the loss or gradient norm of step 5, the first step with these weights" in out
    assert [step for step, *_ in trainer.losses("run")] == [1, 2, 3, 4, 5]


def test_the_last_good_checkpoint_is_never_removed_to_keep_few_checkpoints(tmp_path):
    for step in range(1, 6):
        _save(tmp_path, step, keep=2)
        if step in (1, 2):
            checkpoint.mark(tmp_path, step, checkpoint.GOOD, "")
    assert [checkpoint.step_of(path) for path in checkpoint.saved_steps(tmp_path)] == [2, 4, 5]
    checkpoint.mark(tmp_path, 4, checkpoint.GOOD, "")
    checkpoint.prune(tmp_path, 2)
    assert [checkpoint.step_of(path) for path in checkpoint.saved_steps(tmp_path)] == [4, 5]


def test_the_next_save_removes_leftovers_of_a_killed_process(tmp_path):
    for name in (".writing-00000007-1", ".removing-step-00000001", "step-00000002"):
        (checkpoint.checkpoints_dir(tmp_path) / name).mkdir(parents=True)
        (checkpoint.checkpoints_dir(tmp_path) / name / STATE_FILE).touch()
    _save(tmp_path, 2)
    assert [path.name for path in checkpoint.checkpoints_dir(tmp_path).iterdir()] == ["step-00000002"]
    assert checkpoint.saved_steps(tmp_path)


def test_a_checkpoint_set_aside_again_replaces_the_earlier_one(tmp_path):
    for number in range(2):
        for step in (1, 2 + number, 5):
            _save(tmp_path, step)
        asides = checkpoint.set_aside_after(tmp_path, 1)
        assert [path.name for path in asides] == [f"aside-step-{step:08}" for step in (2 + number, 5)]
    names = sorted(path.name for path in checkpoint.checkpoints_dir(tmp_path).iterdir())
    assert names == [*(f"aside-step-{step:08}" for step in (2, 3, 5)), "step-00000001"]


def test_resume_auto_skips_failed_checkpoints(tmp_path):
    _, two, three = (_save(tmp_path, step) for step in (1, 2, 3))
    assert "no checkpoint is known to be good" in judge(tmp_path, 4)
    assert resuming.find(tmp_path, "auto") == two
    assert len(resuming.skipped_checkpoints(tmp_path)) == 1 and str(three) in resuming.skipped_checkpoints(tmp_path)[0]
    checkpoint.mark(tmp_path, 2, checkpoint.GOOD, "")
    # step 2 is known to be good, so it is not marked as failed
    assert judge(tmp_path, 3) == f"the last good checkpoint is {two}"
    assert resuming.find(tmp_path, "auto") == two
    assert resuming.find(tmp_path, str(three)) == three
    checkpoint.mark(tmp_path, 1, checkpoint.FAILED, "")
    # earlier checkpoints are not reported
    assert [str(three) in note for note in resuming.skipped_checkpoints(tmp_path)] == [True]
    checkpoint.mark(tmp_path, 2, checkpoint.FAILED, "")
    with pytest.raises(UserError, match="all of its checkpoints are marked as failed"):
        resuming.find(tmp_path, "auto")


@pytest.mark.parametrize("tensor", [torch.ones(1, 3), torch.ones(6), None])
def test_tensors_with_another_shape_are_refused_before_copying(tmp_path, tensor):
    state = {} if tensor is None else {"model/w": tensor}
    path = save(tmp_path, state | {"model/b": torch.ones(2)}, checkpoint.Info(1, 0, 42, {}, {}), keep=9)
    saved = checkpoint.open_state(path)
    saved.check({"model/b": (2,)})
    words = "has no tensor model/w" if tensor is None else r"model/w has the shape \[.*the model needs \[3\]"
    with pytest.raises(UserError, match=words):
        saved.check({"model/b": (2,), "model/w": (3,)})


def test_the_trainer_checks_the_whole_state(trainer):
    """One optimiser moment of one weight has a shape that would broadcast."""
    trainer("run", *SAVE)
    path = checkpoint.saved_steps(trainer.folder / "run")[-1]
    state = load_file(path / STATE_FILE)
    name = next(name for name, t in state.items() if name.startswith("exp_avg_sq/") and t.ndim == 2 and len(t) > 1)
    save_file(state | {name: state[name][:1].contiguous()}, path / STATE_FILE)
    table = json.loads((path / state_files.TABLE_FILE).read_text())
    table["shapes"][name] = [1, state[name].shape[1]]
    table["pieces"][name] = [[0, state[name].shape[1]]]
    (path / state_files.TABLE_FILE).write_text(json.dumps(table))
    info = json.loads((path / checkpoint.INFO_FILE).read_text())
    sums = {file: state_files.sha256(path / file) for file in (STATE_FILE, state_files.TABLE_FILE)}
    (path / checkpoint.INFO_FILE).write_text(json.dumps(info | {"sha256": sums}))
    out = trainer("run", *SAVE, "--set", "train.steps=8", "--resume", "auto", code=2)
    assert f"{name} has the shape [1, " in out and out.count("\n") == 1


def test_a_renamed_checkpoint_is_not_mistaken_for_another_step(tmp_path):
    path = _save(tmp_path, 1).rename(tmp_path / "checkpoints/step-00000007")
    with pytest.raises(UserError, match="it belongs to step 1"):
        checkpoint.read_info(path)


def _save(run_dir, step, **options):
    return save(
        run_dir,
        {"model/w": torch.full((3,), float(step))},
        checkpoint.Info(step, 0, 42, {}, {}),
        **{"keep": 9, **options},
    )


def test_checkpoints_are_listed_in_order_of_steps(tmp_path):
    paths = [_save(tmp_path, step) for step in (8, 99_999_999, 100_000_000)]
    (tmp_path / "checkpoints/step-by-step").mkdir()
    assert checkpoint.saved_steps(tmp_path) == paths
    last = _save(tmp_path, 100_000_001, keep=2)
    assert checkpoint.saved_steps(tmp_path) == [paths[-1], last]


@pytest.mark.parametrize("lost", [STATE_FILE, checkpoint.INFO_FILE])
def test_a_partly_deleted_checkpoint_is_ignored(tmp_path, lost):
    one, two = _save(tmp_path, 1), _save(tmp_path, 2)
    (two / lost).unlink()
    assert resuming.find(tmp_path, "auto") == one
    assert resuming.skipped_checkpoints(tmp_path) == [f"{two} is skipped: some of its files are missing"]
    shutil.rmtree(one)
    assert len(resuming.skipped_checkpoints(tmp_path)) == 1  # also if no other checkpoint is left
    _save(tmp_path, 1)
    assert _save(tmp_path, 2) == two
    assert resuming.skipped_checkpoints(tmp_path) == []
    assert checkpoint.open_state(two).whole("model/w").tolist() == [2, 2, 2]


def test_a_run_cannot_resume_from_another_run_in_a_folder_with_checkpoints(tmp_path):
    mine, other = _save(tmp_path / "mine", 1), _save(tmp_path / "other", 2)
    (tmp_path / "link").symlink_to(mine)
    assert resuming.find(tmp_path / "mine", str(tmp_path / "link")) == tmp_path / "link"
    assert resuming.find(tmp_path / "new", str(tmp_path / "other")) == other
    with pytest.raises(UserError, match="already contains checkpoints"):
        resuming.find(tmp_path / "mine", str(other))


def test_a_failed_save_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    info = checkpoint.Info(1, 16, 42, {}, {})
    good = save(tmp_path, {"model/w": torch.ones(3)}, info, keep=1)
    monkeypatch.setattr(state_files, "save_file", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, {"model/w": torch.zeros(3)}, checkpoint.Info(2, 32, 42, {}, {}), keep=1)
    assert checkpoint.saved_steps(tmp_path) == [good]
    assert os.listdir(tmp_path / "checkpoints") == [good.name]
    assert checkpoint.open_state(good).whole("model/w").tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_neither_saved_nor_loaded(tmp_path, value):
    info, poison = checkpoint.Info(2, 32, 42, {}, {}), {"model/w": torch.tensor([1.0, value])}
    with pytest.raises(UserError, match=r"not written, because model/w is not finite"):
        save(tmp_path, poison, info, keep=1)
    assert checkpoint.saved_steps(tmp_path) == []
    path = save(tmp_path, {"model/w": torch.ones(2)}, info, keep=1)
    save_file(poison, path / STATE_FILE)
    with pytest.raises(UserError, match=r"state.safetensors is damaged \(its checksum"):
        checkpoint.open_state(path)
    sums = {state_files.TABLE_FILE: state_files.sha256(path / state_files.TABLE_FILE)}
    (path / checkpoint.INFO_FILE).write_text(json.dumps(asdict(info) | {"sha256": sums}))
    with pytest.raises(UserError, match=r"state.safetensors is damaged \(its checksum is missing"):
        checkpoint.open_state(path)
    sums[STATE_FILE] = state_files.sha256(path / STATE_FILE)
    (path / checkpoint.INFO_FILE).write_text(json.dumps(asdict(info) | {"sha256": sums}))
    with pytest.raises(UserError, match=r"model/w is not finite; remove the folder"):
        checkpoint.open_state(path).whole("model/w")
