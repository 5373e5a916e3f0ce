"""Finds the checkpoint to resume from, and checks that it belongs to the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Config
from m3ae_fast.data import Corpus
from m3ae_fast.data.fingerprint import DATA, WRITTEN
from m3ae_fast.engine.interface import Engine, Read
from m3ae_fast.engine.optimizer import EMA, Kinds, tensors_of
from m3ae_fast.process.ranks import Ranks

Severity = Literal["refused", "other samples", "noted", "free"]
Sections = Mapping[str, Mapping[str, Any] | None]  # settings by section, as in JSON
TEACHER = "loss.teacher"  # entry of the fingerprint of a run with a teacher
SAMPLING = ("data.crop_scale", "data.flip", "data.repeats", "data.image_tokens")  # settings that change the samples


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules on changes between a resumed run and its checkpoint. Each rule lists names of settings and of entries of
    the data's fingerprint; `section.*` stands for all settings of the section that are not listed in another rule.
    Settings that are in no rule may change silently."""

    same: tuple[str, ...]  # changes are refused, because they change the model or the optimiser
    samples: tuple[str, ...] = DATA  # changes are refused, because they change the samples
    noted: tuple[str, ...] = (WRITTEN,)  # changes are reported
    free: tuple[str, ...] = ()  # exceptions to a `section.*`: these settings may change silently
    advice: str = "start in another folder, or restore the former value"  # advice in the message about changed samples

    def severity(self, name: str) -> Severity:
        """Return the severity of a change of this setting or entry."""
        section = f"{name.partition('.')[0]}.*"
        rules: dict[Severity, tuple[str, ...]] = {
            "refused": self.same,
            "other samples": self.samples,
            "noted": self.noted,
            "free": self.free,
        }
        return next((rule for wanted in (name, section) for rule, names in rules.items() if wanted in names), "free")


PRETRAINING = Rules(
    same=("model.*", "run.seed", "train.global_batch", "optim.name", TEACHER),
    samples=(*DATA, *SAMPLING, "masking.*"),
    noted=(
        WRITTEN,
        "loss.*",
        "optim.*",
        *(f"train.{key}" for key in ("epochs", "steps", "hours", "precision")),
    ),
    free=("model.init_from", "model.pool", "model.target_width"),
    advice="to train on other samples, start a new run",
)


def find(run_dir: Path, resume: str, extended: Callable[[checkpoint.Info], bool] = lambda info: False) -> Path | None:
    """Return the checkpoint that `resume` (the option `--resume`) selects; None if it selects none. "no" selects none.
    "auto" selects the last checkpoint that is not marked as FAILED, if any; if the run is now `extended`, it selects
    the last checkpoint before the learning rate decayed. Any other value is a path for `checkpoint.locate`. Raises
    UserError if the path contains no checkpoint, if `run_dir` contains checkpoints but not the selected one, or if all
    checkpoints have failed."""
    own = checkpoint.saved_steps(run_dir)
    if resume == "auto":
        usable = [path for path in own if not (path / checkpoint.FAILED).exists()]
        if own and not usable:
            raise UserError(
                f"{run_dir}: all of its checkpoints are marked as failed (non-finite loss or gradient); to start "
                "again, change the config and delete these checkpoints"
            )
        if not own:
            return None
        before = checkpoint.before_decay(usable)
        return before if before not in (None, usable[-1]) and extended(checkpoint.read_info(usable[-1])) else usable[-1]
    path = None if resume == "no" else checkpoint.locate(Path(resume))
    if own and (path is None or path.resolve() not in [p.resolve() for p in own]):
        raise UserError(f"{run_dir} already contains checkpoints; add --resume auto, or choose another run.dir")
    return path


class Resume:
    """The checkpoint from which a run resumes, if any. Every rank must create this object and call its methods."""

    def __init__(
        self,
        run_dir: Path,
        resume: str,
        ranks: Ranks,
        extended: Callable[[checkpoint.Info], bool] = lambda info: False,
    ) -> None:
        """Find the checkpoint that `--resume` selects, with the arguments of `find`. Raises UserError as `find` does,
        and if the checkpoint is damaged."""
        self.ranks = ranks
        self.path = path = ranks.broadcast(lambda: find(run_dir, resume, extended))
        self.info = ranks.broadcast(lambda: checkpoint.read_info(path)) if path else None
        self.step = self.info.step if self.info else 0
        self.read: Read | None = None  # see `open`

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the checkpoint's config; empty if there is none."""
        return (self.info.config.get(name) or {}) if self.info else {}

    def restore(self, engine: Engine, sections: Sections, stream: dict[str, str], rules: Rules) -> list[str]:
        """Load the checkpoint into the engine, and return one line for each change. Raises UserError as `changes`
        does."""
        if not (self.path and self.info):
            return []
        notes = changes(self.path, self.info, sections, stream, rules)
        self.open(engine.model, engine.kinds)
        self.load(engine)
        return notes

    def notes(self, config: Config, stream: dict[str, str], resume: str) -> list[str]:
        """Return one line for each difference between this pre-training run and the run that wrote the checkpoint.
        Raises UserError as `changes` does."""
        notes = []
        if self.path and self.info:
            sections = config.model_dump(mode="json")
            notes = changes(self.path, self.info, sections, stream, PRETRAINING)
        return notes + (self.ranks.broadcast(lambda: skipped_checkpoints(config.run.dir)) if resume == "auto" else [])

    def open(self, model: nn.Module, kinds: Kinds) -> None:
        """Open the checkpoint's tensors for a model and the `kinds` of its optimiser's state, and store the reader in
        `read`. Every rank must call this method. Raises UserError as `open_checkpoint` does."""
        if self.path and self.info:
            self.read = open_checkpoint(self.path, self.info, model, self.ranks, kinds)

    def load(self, engine: Engine) -> None:
        """Load the opened checkpoint into the engine. Raises UserError if a tensor is damaged."""
        if self.read:
            engine.load_state(self.step, self.read)


def skipped_checkpoints(run_dir: Path) -> list[str]:
    """Return notes on skipped checkpoints if "auto" selects an older one or starts from the beginning."""
    whole = checkpoint.saved_steps(run_dir)
    latest = max(checkpoint.checkpoints_dir(run_dir).glob("step-*"), key=checkpoint.step_of, default=None)
    notes = [f"{latest} is skipped: some of its files are missing"] if latest and latest not in whole[-1:] else []
    for path in reversed(whole):
        if not (path / checkpoint.FAILED).exists():
            break
        reason = (path / checkpoint.FAILED).read_text(encoding="utf-8", errors="replace")
        notes.append(f"{path} is skipped: {reason.strip()}")
    return notes


def changes(
    path: Path,
    info: checkpoint.Info,
    sections: Sections,
    stream: Mapping[str, str],
    rules: Rules,
) -> list[str]:
    """Return one line for each difference between a run and the run that wrote a checkpoint.

    Args:
        path: the checkpoint, for messages.
        info: the checkpoint's content except its tensors.
        sections: the run's settings by section, as in JSON.
        stream: fingerprint of the run's data.
        rules: rules on changes.

    Raises:
        UserError: the samples, or a setting that must not change, have changed.
    """
    then, now = describe(info.config, info.stream), describe(sections, stream)
    changed = [(name, then.get(name, "none"), now[name]) for name in now if then.get(name, "none") != now[name]]
    for name, was, value in changed:
        if rules.severity(name) == "refused":
            raise UserError(f"checkpoint {path}: was made with {name} = {was}, but the config has {value}")
    for name, was, value in changed:
        if rules.severity(name) != "other samples":
            continue
        raise UserError(
            f"checkpoint {path}: was made with {name} = {was}, but it is now {value}, which changes the stream of "
            f"samples; {rules.advice}"
        )
    noted = [each for each in changed if rules.severity(each[0]) == "noted"]
    return [f"{name} was {was} and is {value} from here on" for name, was, value in noted]


def describe(sections: Sections, stream: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings and data of a run in one flat dict: {"model.depth": 12, "data.train": "4 shards with ...",
    ...}. Settings that name files are replaced with the entries of the fingerprint. The masking of captions is left out
    if the model is image-only, because it has no effect."""
    settings = {f"{name}.{key}": value for name, values in sections.items() for key, value in (values or {}).items()}
    nested = [name for name, value in settings.items() if isinstance(value, dict)]
    for name in nested:
        settings |= {f"{name}.{key}": value for key, value in settings.pop(name).items()}
    if settings.get("model.vocab_size") == 0:
        settings = {name: value for name, value in settings.items() if not name.startswith("masking.text_")}
    return settings | dict.fromkeys((*DATA, WRITTEN, TEACHER), "none") | dict(stream)


def require_same(ranks: Ranks, stream: dict[str, str], held_out: Corpus | None) -> None:
    """Raise UserError on every rank if the data of a rank differ from those of rank 0, whose fingerprint is `stream`.
    Otherwise nodes would train on samples in different orders, and some nodes would end before others."""
    seen = {name: value for name, value in stream.items() if name != WRITTEN}
    seen["data.val"] = f"{held_out.samples:,} samples" if held_out else "none"
    first = ranks.from_main(seen)

    def compare() -> None:
        for name, value in first.items():
            if seen.get(name) != value:
                raise UserError(
                    f"{name} is {value} on rank 0 ({ranks.hosts[0]}), but {seen.get(name)} on rank {ranks.rank} "
                    f"({ranks.hosts[ranks.rank]}): the streams of samples differ; make the files identical on all nodes"
                )

    ranks.together(compare)


def open_checkpoint(path: Path, info: checkpoint.Info, model: nn.Module, ranks: Ranks, kinds: Kinds) -> Read:
    """Return a reader of a checkpoint's tensors for `model`.

    `kinds`: kinds of the optimiser's state in the engine. If the checkpoint contains no moving average of the weights,
    the average begins with the checkpoint's weights. Every rank must call this function. Raises UserError if the
    checkpoint is damaged or one of its tensors does not fit the model.
    """
    had_ema = (info.config.get("train") or {}).get("ema") is not None
    state = ranks.together(lambda: checkpoint.open_state(path, ranks.rank, ranks.world))
    wanted = {
        name: tuple(getattr(p, "ds_shape", p.shape))
        for name, p, kind in tensors_of(model, kinds)
        if kind != EMA or had_ema
    }
    ranks.together(lambda: state.check(wanted))

    def read(name: str, start: int, count: int) -> Tensor:
        return state.read(name if had_ema else name.replace(f"{EMA}/", "model/", 1), start, count)

    return read
