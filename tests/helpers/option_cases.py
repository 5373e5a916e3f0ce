"""All settings of the deepspeed section at every ZeRO stage that supports them: run by test_deepspeed_options.py.

    python -m torch.distributed.run --nproc-per-node 3 -m tests.helpers.option_cases save FOLDER
    python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.option_cases resume FOLDER
    python -m tests.helpers.option_cases resume-plain FOLDER

save trains a model in each case, saves it halfway, and continues. resume continues from the saved state with the same
settings, and resume-plain continues with plain torch. Each command writes the losses and gradient norms of its steps,
by case.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel
from torch import Tensor

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.checkpoint import resuming
from m3ae_fast.checkpoint.host_copy import Staging
from m3ae_fast.config import Config, DeepSpeedConfig, ZeroConfig
from m3ae_fast.config.messages import section_of
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.process.ranks import Ranks, join_ranks
from tests.helpers.zero_cases import config_of, engine_of, take

HALF, STEPS = 1, 3
# bucket size: the 70,000 weights fill several buckets, and a tensor may be smaller or larger than a bucket
SMALL = 3000
STAGE = "zero_optimization.stage"


def settings(section: type[BaseModel] = DeepSpeedConfig, above: str = "") -> dict[str, list[Any]]:
    """Return the values to try for each setting, by its full name, as derived from the schema. The first one is the
    base value. The base values of sizes are small, so that they affect a small model."""
    found: dict[str, list[Any]] = {}
    for key, field in section.model_fields.items():
        name, kind = above + key, field.annotation
        if inner := section_of(kind):
            found |= settings(inner, f"{name}.")
        elif name == STAGE:
            found[name] = [0, 1, 2, 3]
        elif kind is bool:
            found[name] = [field.default, not field.default]
        elif kind is int:
            found[name] = [SMALL, field.default]
        else:
            found[name] = sorted(get_args(kind), key=lambda value, usual=field.default: value != usual)
    return found


def cases(world: int) -> Iterator[tuple[str, dict[str, Any], Config]]:
    """Yield (name, changed settings, config) for each stage. The first config of a stage has the base values. In each
    of the following configs, one setting has another value. In the last config, all sizes have their defaults. Settings
    that have no effect at a stage are left out."""
    found = settings()
    for stage in found.pop(STAGE):
        usual = {STAGE: stage} | {name: values[0] for name, values in found.items()}
        other = [(name, value) for name in found if stage in stages_of(name) for value in found[name][1:]]
        sizes = {name: value for name, value in other if type(value) is int}
        changes = [{name: value} for name, value in other if name not in sizes]
        for change in [{}, *changes, *([sizes] if sizes else [])]:
            try:
                yield f"stage={stage} {change}", change, config_of(world, stage, 2, "fp32", **nested(usual | change))
            except UserError:  # the stage does not support it
                continue


def stages_of(name: str) -> set[int]:
    """Return the stages at which a setting has an effect. The description of the setting begins with these stages.
    Without them, a setting of ZeRO has an effect at stages 1 to 3, and any other setting at all stages."""
    _, _, rest = name.partition("zero_optimization.")
    if not rest:
        return {0, 1, 2, 3}
    prefix, colon, _ = (ZeroConfig.model_fields[rest.partition(".")[0]].description or "").partition(":")
    return set(map(int, re.findall(r"\d", prefix))) if colon and prefix.startswith("Stage") else {1, 2, 3}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return settings by full name as nested sections."""
    section: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        inside = section
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[last] = value
    return {"zero": section.pop("zero_optimization"), **section}


def weights(engine: ModelEngine) -> dict[str, Tensor]:
    """Return the weights that forward passes use."""
    import deepspeed  # takes seconds, and not every process that reads the cases requires it

    with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
        return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def require_saved(engine: ModelEngine, path: Path, case: str) -> None:
    saved = checkpoint.read_weights(path, average=False)
    for name, weight in weights(engine).items():
        assert torch.equal(weight, saved[name]), f"{case}: {name}"


def save(ranks: Ranks, folder: Path) -> dict[str, Any]:
    agreed = ranks.agreement(threading.Event())
    curves = {}
    for case, _, config in cases(ranks.world):
        engine = engine_of(ranks, config)
        curve = take(ranks, engine, config, range(HALF))
        staging = Staging()
        staging.begin(ranks.device)
        part = staging.copy(engine.fragments)
        path = checkpoint.save(folder / str(len(curves)), part, checkpoint.Info(HALF, 0, 42, {}, {}), 1, ranks=agreed)
        require_saved(engine, path, case)
        curves[case] = curve + take(ranks, engine, config, range(HALF, STEPS))
    return curves


def resume(ranks: Ranks, folder: Path, plain: bool) -> dict[str, Any]:
    curves = {}
    for case, _, config in cases(ranks.world):
        if plain:
            config = config.model_copy(update={"deepspeed": None})
        engine, path = engine_of(ranks, config, seed=1), checkpoint.saved_steps(folder / str(len(curves)))[-1]
        info = checkpoint.read_info(path)
        engine.load_state(HALF, resuming.open_checkpoint(path, info, engine.model, ranks, engine.kinds))
        require_saved(engine, path, case)
        curves[case] = take(ranks, engine, config, range(HALF, STEPS))
    return curves


def main(argv: list[str] | None = None) -> int:
    what, folder = argv or sys.argv[1:]
    logging.disable(logging.WARNING)
    from m3ae_fast.engine import deepspeed_engine  # takes seconds to import

    deepspeed_engine.PERSISTENT = 0  # otherwise stage 3 would split no weight of such a small model
    with join_ranks() as ranks:
        torch.set_num_threads(1)
        found = save(ranks, Path(folder)) if what == "save" else resume(ranks, Path(folder), what == "resume-plain")
        if ranks.is_main:
            Path(folder, f"{what}.json").write_text(json.dumps(found))
        ranks.gather(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
