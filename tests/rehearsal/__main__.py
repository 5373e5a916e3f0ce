"""python -m tests.rehearsal [PYTEST OPTIONS]: run the CUDA path without a GPU, and list the lines that were not
executed.

All lines of functions that mention CUDA must be executed, with stand-ins if necessary. Lines for which this is not
possible are listed in LEFT with the reason. The exit code is 1 if a line that was not executed has no reason, or if a
line with a reason was executed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("m3ae_fast/**/*.py", "kernels/m3ae_kernels/**/*.py", "benchmarks/*.py", "benchmarks/gpu/*.py")
# (file, part of the line): reason why the line is not executed here
LEFT = {
    ("kernels/m3ae_kernels/aot.py", ""): "compiles for GPUs and needs none; CI compiles all kernels with it",
    ("kernels/m3ae_kernels/attention/varlen.py", ""): "for other projects; test_kernel_varlen.py runs it on every path",
    ("kernels/m3ae_kernels/dispatch.py", 'return "torch"'): "float64; a test runs it with a stand-in for the device",
    ("kernels/m3ae_kernels/dispatch.py", "raise ValueError("): "Triton on a CPU; test_kernel_api.py asks for it",
    ("kernels/m3ae_kernels/triton_impl/common.py", "allow_tf32"): "of torch 2.8, which lacks fp32_precision",
    ("m3ae_fast/cli/command_line.py", ""): "--device, which no stage gives; test_command_line.py does",
}


def main(options: list[str]) -> int:
    # Kernels run in few tests, because Triton's interpreter is slow, and wrong in bf16 (triton-lang/triton#11584).
    os.environ |= {"TRITON_INTERPRET": "1", "M3AE_KERNELS_IMPL": "torch"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    import coverage
    import pytest

    from tests.rehearsal.cuda_lines import cuda_functions

    paths = {path: cuda_functions(path) for path in sorted({p for pattern in FILES for p in ROOT.glob(pattern)})}
    functions = {path: found for path, found in paths.items() if found}
    measured = coverage.Coverage(data_file=None, include=[str(path) for path in functions])  # tracing takes time
    measured.start()
    failed = pytest.main([str(Path(__file__).parent), "-o", "python_files=rehearse_*.py", *options])
    measured.stop()
    if failed:
        return int(failed)
    return report(measured, functions)


def report(measured, functions_of) -> int:
    total = ran = 0
    unexplained, used = [], set()
    for path, functions in functions_of.items():
        name = str(path.relative_to(ROOT))
        _, statements, _, missing, _ = measured.analysis2(str(path))
        lines = path.read_text(encoding="utf-8").splitlines()
        for function, numbers in functions.items():
            mine = numbers & set(statements)
            left = sorted(mine & set(missing))
            total, ran = total + len(mine), ran + len(mine) - len(left)
            for number in left:
                text = lines[number - 1].strip()
                key = next((k for k in LEFT if name.startswith(k[0]) and k[1] in text), None)
                used.add(key)
                if key is None:
                    unexplained.append(f"{name}:{number} in {function}: {text}")
    print(f"{ran} of {total} lines of the CUDA path ran without a GPU")
    for key, why in LEFT.items():
        print(f"left: {' '.join(key).strip()}: {why}" + ("" if key in used else " (but all of it ran)"))
    print("\n".join(f"unexplained: {line}" for line in unexplained))
    return 1 if unexplained or LEFT.keys() - used else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
