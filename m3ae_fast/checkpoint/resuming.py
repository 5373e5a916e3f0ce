"""Finds the checkpoint to resume from, and checks that it is of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Config, DataConfig, ModelConfig, parse
from m3ae_fast.config.evaluation import FORMER_SECTIONS
from m3ae_fast.data import Corpus, Layout, lay_out
from m3ae_fast.data.fingerprint import WRITTEN
from m3ae_fast.data.lanes import without_lanes
from m3ae_fast.engine.interface import Engine, Read
from m3ae_fast.engine.optimizer import EMA, Kinds
from m3ae_fast.process.ranks import Ranks

# settings of the data section on which the stream of samples depends, beside what the fingerprint holds
STREAM = ("crop_scale", "flip", "repeats", "image_tokens")
_Change = tuple[str, Any, Any]  # name, old and new value
_GROUP = 16  # what data.shuffle_shards was by default, before there were lanes


def find(run_dir: Path, resume: str, extended: Callable[[checkpoint.Info], bool] = lambda info: False) -> Path | None:
    """Return the checkpoint that `--resume` means: "auto", "no", or a path for `checkpoint.locate`. "auto" is the last
    one that has not FAILED, if any; if the run that wrote it is now `extended`, the last one before the learning rate
    fell. Raises UserError if the path holds none, `run_dir` holds those of another run, or all have failed."""
    own = checkpoint.saved_steps(run_dir)
    if resume == "auto":
        usable = [path for path in own if not (path / checkpoint.FAILED).exists()]
        if own and not usable:
            raise UserError(
                f"{run_dir}: all of its checkpoints are marked as failed (non-finite loss); change the "
                "config, and delete them to start again"
            )
        if not own:
            return None
        before = checkpoint.before_decay(usable)
        return before if before not in (None, usable[-1]) and extended(checkpoint.read_info(usable[-1])) else usable[-1]
    path = None if resume == "no" else checkpoint.locate(Path(resume))
    if own and (path is None or path.resolve() not in [p.resolve() for p in own]):
        raise UserError(f"{run_dir} already holds checkpoints; add --resume auto, or choose another run.dir")
    return path


class Resume:
    """The checkpoint that a run continues from, if any. Every rank must make one, and call its methods."""

    def __init__(
        self,
        run_dir: Path,
        resume: str,
        ranks: Ranks,
        extended: Callable[[checkpoint.Info], bool] = lambda info: False,
    ) -> None:
        """Find the checkpoint that `--resume` means: arguments as of `find`. Raises UserError as `find` does, and where
        it is damaged."""
        self.ranks = ranks
        self.path = path = ranks.broadcast(lambda: find(run_dir, resume, extended))
        self.info = ranks.broadcast(lambda: checkpoint.read_info(path)) if path else None
        self.step = self.info.step if self.info else 0
        self.read: Read | None = None  # see `open`

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the checkpoint's config; empty if there is none."""
        return (_sections(self.info).get(name) or {}) if self.info else {}

    def restore(
        self, engine: Engine, sections: dict[str, Any], same: Iterable[tuple[str, str]], stream: dict[str, str]
    ) -> list[str]:
        """Load the checkpoint into the engine, and return notes on the data, whose fingerprint is `stream`. Raises
        UserError if the checkpoint and `sections` differ in a `same` (section, key), or the data are others."""
        if not (self.path and self.info):
            return []
        check_same(self.path, self.info, sections, same)
        notes = check_stream(self.path, self.info, stream)
        self.open(engine.model, engine.kinds)
        self.load(engine)
        return notes

    def notes(self, config: Config, stream: dict[str, str], resume: str, with_changes: bool) -> list[str]:
        """Return differences between this run and the one that wrote the checkpoint, one line each. Raises UserError as
        `check_fits` does."""
        notes = check_fits(self.path, self.info, config, stream, with_changes) if self.path and self.info else []
        return notes + (self.ranks.broadcast(lambda: passed_over(config.run.dir)) if resume == "auto" else [])

    def open(self, model: nn.Module, kinds: Kinds) -> None:
        """Make `read` give the checkpoint's tensors of a model and of its optimiser's `kinds`, as `open_checkpoint`."""
        if self.path and self.info:
            self.read = open_checkpoint(self.path, self.info, model, self.ranks, kinds)

    def load(self, engine: Engine) -> None:
        """Load what was opened into the engine."""
        if self.read:
            engine.load_state(self.step, self.read)


def passed_over(run_dir: Path) -> list[str]:
    """Return notes on the last checkpoints if "auto" takes an older one, or begins anew."""
    whole = checkpoint.saved_steps(run_dir)
    latest = max(checkpoint.checkpoints_dir(run_dir).glob("step-*"), key=checkpoint.step_of, default=None)
    notes = [f"{latest} is skipped: files of it are missing"] if latest and latest not in whole[-1:] else []
    for path in reversed(whole):
        if not (path / checkpoint.FAILED).exists():
            break
        reason = (path / checkpoint.FAILED).read_text(encoding="utf-8", errors="replace")
        notes.append(f"{path} is skipped: {reason.strip()}")
    return notes


def layout_of(
    info: checkpoint.Info | None, config: DataConfig, train: Corpus, global_batch: int, with_changes: bool = False
) -> tuple[Layout, list[str]]:
    """Return the order's lanes of a run that continues from `info`, if any, and a note where they are not the config's:
    what a version without lanes began keeps its order, unless `with_changes`."""
    wanted = lay_out(config, train.sizes, global_batch)
    if info is None or with_changes:
        return wanted, []
    group = (info.config.get("data") or {}).get("shuffle_shards", _GROUP)
    kept = without_lanes(info.stream.get("data.order", f"groups of {group} shards"))
    if kept is None or kept == wanted:
        return wanted, []
    return kept, [
        f"the order of samples stays {kept}, as the checkpoint's version had it, and not {wanted}; this is the last "
        "release that keeps it, and --resume-with-changes changes it"
    ]


def check_fits(
    path: Path, info: checkpoint.Info, config: Config, stream: dict[str, str], with_changes: bool = False
) -> list[str]:
    """Return the differences between this run and the one that wrote the checkpoint, one line each. Raises UserError
    if it would not be the same model, or, unless `with_changes`, not the same stream of samples."""
    saved, wanted = info.config, config.model_dump(mode="json")

    def differing(section: str, keys: Iterable[str]) -> list[_Change]:
        then, now = saved.get(section) or {}, wanted[section]
        return [(f"{section}.{key}", then[key], now[key]) for key in keys if key in then and then[key] != now[key]]

    same = [("model", key) for key in wanted["model"] if key != "init_from"]
    check_same(path, info, wanted, [*same, ("run", "seed"), ("train", "global_batch"), ("optim", "name")])
    other = differing("data", STREAM) + differing("masking", wanted["masking"])
    advice = "--resume-with-changes continues anyway"
    notes = check_stream(path, info, stream, advice, other, with_changes)
    other = differing("loss", wanted["loss"]) + differing("optim", wanted["optim"])
    return notes + _notes(other + differing("train", ("epochs", "steps", "hours", "precision")))


def changed(info: checkpoint.Info, stream: dict[str, str], noted: bool = False) -> list[_Change]:
    """Return each entry of the `stream`'s fingerprint that differs from the checkpoint's; `noted`: of entries that may
    differ. A checkpoint of an earlier version lacks entries, which count as equal."""
    mine = {name: now for name, now in stream.items() if (name == WRITTEN) == noted}
    return [(name, info.stream[name], now) for name, now in mine.items() if info.stream.get(name, now) != now]


def check_stream(
    path: Path,
    info: checkpoint.Info,
    stream: dict[str, str],
    advice: str = "start in another folder, or set it back",
    others: Sequence[_Change] = (),
    with_changes: bool = False,
) -> list[str]:
    """Return notes on what of the `stream` differs from the checkpoint's. Raises UserError with `advice`, unless
    `with_changes`, where that or one of the `others` makes it another stream of samples."""
    differing = [*others, *changed(info, stream)]
    if differing and not with_changes:
        name, was, now = differing[0]
        raise UserError(
            f"checkpoint {path}: was made with {name} = {was}, now it is {now}: not the same stream of samples; "
            f"{advice}"
        )
    return _notes(differing + changed(info, stream, noted=True))


def _notes(changes: Iterable[_Change]) -> list[str]:
    return [f"{name} was {was} and is {now} from here on" for name, was, now in changes]


def require_same(ranks: Ranks, stream: dict[str, str], held_out: Corpus | None) -> None:
    """Raise UserError on every rank where one sees other data than rank 0, whose fingerprint is `stream`: nodes would
    train on samples of different orders, and some of them end before the others."""
    seen = {name: value for name, value in stream.items() if name != WRITTEN}
    seen["data.val"] = f"{held_out.samples:,} samples" if held_out else "none"
    first = ranks.from_main(seen)

    def compare() -> None:
        for name, value in first.items():
            if seen.get(name) != value:
                raise UserError(
                    f"{name} is {value} on rank 0 ({ranks.hosts[0]}), {seen.get(name)} on rank {ranks.rank} "
                    f"({ranks.hosts[ranks.rank]}): not the same stream of samples; give every node the same files"
                )

    ranks.together(compare)


def _sections(info: checkpoint.Info) -> dict[str, Any]:
    """Return the checkpoint's config by the sections' present names."""
    return {FORMER_SECTIONS.get(name, name): section for name, section in info.config.items()}


def check_same(path: Path, info: checkpoint.Info, wanted: dict[str, Any], same: Iterable[tuple[str, str]]) -> None:
    """Raise UserError if the checkpoint and the `wanted` sections differ in a `same` (section, key)."""
    saved = _sections(info)
    if saved.get("model"):  # one of an earlier version lacks settings, which had their defaults
        model = parse(ModelConfig, saved["model"], f"checkpoint {path}")
        saved = saved | {"model": model.model_dump(mode="json")}
    saved = saved | {"optim": {"name": "adamw"} | (saved.get("optim") or {})}
    for section, key in same:
        was, now = (saved.get(section) or {}).get(key), wanted[section][key]
        if was != now:
            raise UserError(f"checkpoint {path}: was made with {section}.{key} = {was}, the config says {now}")


def open_checkpoint(path: Path, info: checkpoint.Info, model: nn.Module, ranks: Ranks, kinds: Kinds) -> Read:
    """Return a reader of the tensors of a checkpoint of `model`.

    `kinds`: of the optimiser's state, as the engine has them; an average of the weights may begin here. Every rank must
    call it. Raises UserError if the checkpoint is damaged, or a tensor of it does not fit the model.
    """
    had_ema = any((section or {}).get("ema") is not None for section in info.config.values())
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    state = ranks.together(lambda: checkpoint.open_state(path, ranks.rank, ranks.world))
    wanted = {
        f"{kind}/{name}": shape
        for name, shape in shapes.items()
        for kind in ("model", *kinds[name])
        if kind != EMA or had_ema
    }
    ranks.together(lambda: state.check(wanted))

    def read(name: str, start: int, count: int) -> Tensor:
        return state.read(name if had_ema else name.replace(f"{EMA}/", "model/", 1), start, count)

    return read
