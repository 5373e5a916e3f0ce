"""python -m tests.rehearsal.stand_in_python ARGUMENTS: run Python with these arguments as on a machine with a GPU, with
small sizes. first_hour.py runs the plan of benchmarks/gpu with it.

The environment variable FAULTS lists faults: "op" (an op raises in bf16), "process" (a process dies in float16),
"stage" (a program fails), "hang" (a trainer in its own session neither ends nor handles SIGTERM).
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINER = str(ROOT / "m3ae_fast/train.py")
MODEL = {
    "size": None, "emb_dim": 32, "depth": 1, "num_heads": 2, "dec_emb_dim": 16, "dec_depth": 1, "dec_num_heads": 1,
    "image_size": 32, "patch_size": 8, "text_length": 16,
}  # fmt: skip
QUICKSTART = {
    "train.global_batch": 8, "train.steps": 12, "train.log_every": 2, "train.eval_every": 6, "train.eval_samples": 8,
    "train.save_every": 3, "data.workers": 1, "train.pictures": 0, "optim.warmup_epochs": 0,
} | {f"model.{name}": "null" if value is None else value for name, value in MODEL.items()}  # fmt: skip
RAISES, DIES, HANGS = "gather_tokens", "masked_pixel_loss", 256  # the last one is a batch size


def main() -> None:
    what, *rest = sys.argv[1:]
    faults = os.environ.get("FAULTS", "").split()
    module = rest[0] if what == "-m" else ""
    ours = module.partition(".")[0] in ("benchmarks", "m3ae_fast") or (what == "-c" and "m3ae_fast" in rest[0])
    if not ours and what != TRAINER:  # for example helper processes of multiprocessing
        os.execv(os.environ["REAL_PYTHON"], [os.environ["REAL_PYTHON"], what, *rest])
    sys.executable = os.environ["STAND_IN_PYTHON"]
    # Because Triton's interpreter is slow, kernels run only in the tuning.
    os.environ["M3AE_KERNELS_IMPL"] = "triton" if "--tune" in rest else "torch"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled code would look for the GPU
    from tests.rehearsal.fake_cuda import FakeCuda

    with FakeCuda() if os.environ.get("CUDA_VISIBLE_DEVICES") != "" else nullcontext():
        _make_small(module)
        if "stage" in faults and module == "benchmarks.gpu.attention":
            sys.exit("made to fail")
        if what == TRAINER:
            config = Path(rest[rest.index("--config") + 1]).read_text(encoding="utf-8")
            if "hang" in faults and f'"global_batch": {HANGS // 64},' in config:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.setsid()
                time.sleep(3600)
            sys.argv = [what, *rest]
            runpy.run_path(what, run_name="__main__")
        elif what == "-c":
            sys.argv = [what, *rest[1:]]
            exec(compile(rest[0], what, "exec"), {"__name__": "__main__"})
        elif module == "benchmarks.gpu":
            sys.exit(_suite(rest[1:], faults))
        elif module.startswith("benchmarks.gpu."):
            sys.exit(sys.modules[module].main())
        else:
            sys.argv = rest
            runpy.run_module(module, run_name="__main__", alter_sys=True)


def _make_small(module: str) -> None:
    """Reduce the sizes that a module measures, and replace functions that take a long time without a GPU."""
    from m3ae_kernels import tuning

    from m3ae_fast.base import hardware

    tuning.FOLDER = Path(os.environ["STAND_IN_TUNING"])
    hardware.peak_flops = lambda *_: 1e12
    if not module.startswith("benchmarks.gpu"):
        return
    from benchmarks.gpu import attention, ceilings, curve
    from benchmarks.measure import CudaDevice

    CudaDevice.clear_cache = lambda self: None
    attention.SHAPES, attention.SAMPLES, attention.REPEATS = {"encoder": (1, 16, 5)}, 2, 2
    all_sizes, all_curves = ceilings.measure_all, curve.measure
    ceilings.measure_all = lambda device: all_sizes(device, divide=512, rounds=1)
    curves = [replace(each, kill_at=each.kill_at and 4) for each in curve.CURVES]
    curve.measure = lambda folder: all_curves(folder, curves, QUICKSTART)


def _suite(arguments: list[str], faults: list[str]) -> int:
    import torch
    from torch.overrides import _pop_mode_temporarily

    from benchmarks.gpu import __main__ as program
    from benchmarks.gpu import candidates, step, suite, tune
    from benchmarks.ops import ODD

    sizes = replace(ODD, samples=1, vocab=40, encoder=16, decoder=16)
    check, run, make_shards = suite.check_small, step.run, step.make_shards

    def check_or_fail(name, dtype, *others):
        if "op" in faults and "--quick" in arguments and (name, dtype) == (RAISES, torch.bfloat16):
            raise RuntimeError("made to fail")
        if "process" in faults and "--quick" in arguments and (name, dtype) == (DIES, torch.float16):
            os.abort()
        return check(name, dtype, *others)

    def make_on_the_cpu(*arguments, **options):
        with _pop_mode_temporarily():  # torchvision would ask the GPU to encode
            make_shards(*arguments, **options)

    suite.check_small, step.make_shards = check_or_fail, make_on_the_cpu
    tune.OPS, tune.REPEATS = ("gather_tokens", "packed_attention, encoder"), 1
    candidates.settings_to_try = lambda kernel, now, *_: [now | {"num_warps": 2}]
    config = {"model": MODEL | {"vocab_size": 50}, "train": {"precision": "fp32"}}
    step.shipped = lambda names=program.plan.SIZES: [step.Case(name, config, samples=16) for name in names]
    step.run = lambda folder, cases, names: run(folder, [replace(c, batch=c.batch // 64) for c in cases], names)
    step.START_UP_STEPS, step.STEPS = 9, 15
    return program.main(arguments, sizes=sizes, small=sizes, rounds=1, repeats=1)


if __name__ == "__main__":
    main()
