"""Compiles all kernels for several architectures with the settings of the tuning tables, without a GPU; checks them.

    python -m m3ae_kernels.aot [--full] [--arch sm_90 ...] [--kernel token_rows ...] [--jobs N]

For sm_90, each kernel is compiled at M3AE-Large's size (attention: that of the encoder) in all dtypes, at all other
sizes (head dimensions, bands) in bf16, and at the largest head dimension also in float32. For other architectures, each
kernel is compiled in bf16 at M3AE-Large's sizes and at the largest head dimension. Two groups of cases are also
compiled in float32, because they use the most registers and shared memory: those of the largest head dimension, and the
matmuls of images. `--full` compiles every kernel at every size in every dtype, which takes three times as long. The
additional cases have the same settings as the others, and nearly the same code.

The program prints one line per compilation: the kernel, the architecture, the dtype, the settings, the numbers of
registers and spills, the bytes of local and shared memory, and the matrix instruction. Nothing is compiled for
architectures on which the ops run on torch. The exit code is 1 if a kernel does not compile, has more than MOST_SPILLS
instructions that spill registers, uses local memory without spilling registers, requires more shared memory than one
program instance may use, multiplies matrices without tensor cores, or allows fewer program instances on an NVIDIA
multiprocessor than required. It is 2 for an invalid argument.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from . import tuning

# Bytes of shared memory available to one program instance (CUDA C programming guide, technical specifications by
# compute capability; CDNA 3 architecture guide, local data share). A multiprocessor has 1 kB more than this, and
# reserves 1 kB per program instance. Registers are allocated in units of 8 per thread.
SHARED_BYTES = {
    "sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448,
    "sm_120": 101376, "gfx942": 65536,
}  # fmt: skip
REGISTERS = 65536
# maximum number of loads and stores of spilled registers in a kernel's assembly, which has about a thousand
# instructions
MOST_SPILLS = 16
DTYPES = {"bf16": "16", "fp16": "16", "fp32": "32"}
# For this architecture, kernels are compiled in every dtype, and at every size in bf16. For the other architectures,
# three kinds of cases are not compiled, because they need the same registers and shared memory as other cases: fp16
# (the same as bf16), head dimensions of 80 and 96 (the same as 128, to which they are padded), and 13 bands (the same
# as 3 bands).
EVERYTHING = ("sm_90",)
DECODER, WIDEST = 32, 128  # head dimension of M3AE-Large's decoder, and the largest head dimension
# Architectures for which kernels are compiled only on request, because their settings and the results are the same as
# those of sm_89.
AS_OTHERS = ("sm_86",)
MATRIX_INSTRUCTION = re.compile(r"\b(wgmma\.mma|tcgen05\.mma|mma\.sync|v_mfma)")  # in PTX and in AMD's assembly

# Sizes of M3AE-Large, which are constants in the kernels.
DIM, PATCHES = 512, {"P": 16, "C": 3, "H": 256, "W": 256, "PLANAR": True, "NORMALISE": True, "table": None}
CELLS = {name: value for name, value in PATCHES.items() if name != "table"}
PIXEL_FLOATS = ("s0", "s1", "s2", "s3", "b0", "b1", "b2", "b3")


@dataclass(frozen=True)
class Case:
    """A call of a kernel, described by its arguments: pointers with their element types ("x": the dtype of the inputs),
    sizes that are multiples of 16, other sizes, floats, and constants. `whole_rows`: if a program instance processes
    whole rows, the width of a row (a power of two), by which TILE is divided; otherwise 0. `sample`: the head dimension
    and the number of rows for which TILE_M and TILE_N are chosen. `programs`: the minimum number of program instances
    that must fit on a multiprocessor."""

    module: str
    kernel: str
    pointers: dict[str, str]
    aligned: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    constants: dict | None = None
    matmul: bool = False
    whole_rows: int = 0
    table: str = ""
    sample: tuple[int, int] = (0, 0)
    programs: int = 1

    def compiled(self, arch: str, dtype: str) -> bool:
        """Return whether the command compiles the case for this architecture and dtype without --full."""
        first, head = self is LARGE[self.kernel], self.sample[0]
        if arch in EVERYTHING:
            return dtype == "bf16" or first or (dtype == "fp32" and head == WIDEST)
        if dtype == "bf16":
            return first or head in (DECODER, WIDEST)
        return dtype == "fp32" and (head == WIDEST or (first and self.matmul and not head))


def _pointers(**by_type: str) -> dict[str, str]:
    return {name: kind for kind, names in by_type.items() for name in names.split()}


def _with_bands(*cases: Case) -> list[Case]:
    """Return the given cases, which read 8-bit RGB images, and the same cases for 16-bit images with 13 bands, as in
    Sentinel-2."""
    several = []
    for case in cases:
        constants = {name: value for name, value in (case.constants or {}).items() if name != "table"} | {"C": 13}
        pointers = case.pointers | {"images": "u16", "table": "fp32"}
        several.append(replace(case, constants=constants, pointers=pointers, whole_rows=4 * case.whole_rows))
    return [*cases, *several]


def _attention(head_dim: int, keys: int, programs: int = 1) -> list[Case]:
    ends, strides = "cu_queries cu_keys", ("H", "stride_q", "stride_kv")
    forward = Case(
        "attention", "attention", _pointers(x="q k v out", fp32="lse", i32=ends), strides,
        ("Q", "blocks"), ("scale",), matmul=True, programs=programs, sample=(head_dim, keys),
    )  # fmt: skip
    pointers = _pointers(x="grad q k v out dq dk dv", fp32="lse partial", i32=ends)
    aligned, floats = (*strides, "stride_dq", "stride_dkv"), ("scale", "scale2")
    return [
        forward,
        replace(forward, kernel="attention_backward", pointers=pointers, aligned=aligned, sizes=("Q",), floats=floats),
    ]


CASES = [
    *_attention(64, 81, programs=2),  # M3AE-Large's encoder
    *_attention(DECODER, 321, programs=2),  # M3AE-Large's decoder
    # Head dimensions of other models. `programs` is 1, because in float32, one program instance uses all registers or
    # all shared memory of a multiprocessor.
    *(case for head_dim in (80, 96, WIDEST) for case in _attention(head_dim, 321)),
    *_with_bands(
        Case(
            "patch_embed", "patch_embed", _pointers(u8="images", i32="ids", x="weight bias out"),
            ("D", "stride"), ("N",), PIXEL_FLOATS, PATCHES, matmul=True,
        ),
        Case(
            "patch_embed", "patch_embed_dweight", _pointers(u8="images", i32="ids", x="grad", fp32="partial"),
            ("D",), ("N", "split_rows"), PIXEL_FLOATS, PATCHES, matmul=True,
        ),
        Case(
            "pixel_loss", "patch_stats", _pointers(u8="images", i32="ids", fp32="mean rstd"),
            (), ("N",), PIXEL_FLOATS, PATCHES | {"EPS": 1e-6}, whole_rows=1024,
        ),
        Case(
            "pixel_loss", "pixel_error",
            _pointers(
                x="hidden weight bias grad", u8="images", i32="ids", fp32="unit_weight mean rstd tile_loss tile_bias"
            ),
            ("D", "stride"), ("N",), PIXEL_FLOATS, PATCHES | {"NORM_PIX": True, "GRAD": True}, matmul=True,
        ),
        Case(
            "hog", "hog_energy", _pointers(u8="images", fp32="energy table"), (), ("N",), (), CELLS, whole_rows=256,
            table="hog",
        ),
        Case(
            "hog", "hog_targets", _pointers(u8="images", i32="ids", fp32="energy out table"), (), ("N",), (), CELLS,
            whole_rows=256, table="hog",
        ),
    ),
    Case("rows", "take_rows", _pointers(x="x out", i32="rows"), ("D", "stride"), ("M",), table="rows"),
    Case("rows", "invert", _pointers(i32="places out"), (), ("M",)),
    Case(
        "rows", "scatter_tokens", _pointers(x="x fill table out", i32="src fill_ids table_ids"),
        ("D",), ("T",), (), {"FILL": True, "TABLE": True}, table="rows",
    ),
    Case(
        "segment_sum", "segment_sum", _pointers(x="rows", i64="order", i32="starts", fp32="out"),
        ("D", "stride"), ("count", "splits"),
    ),
    Case(
        "norm", "gather_norm", _pointers(x="x weight bias y", i32="rows", fp32="mean rstd"),
        ("D", "stride"), ("M",), ("eps",), {"BIAS": True}, whole_rows=DIM,
    ),
    Case(
        "norm", "gather_norm_backward",
        _pointers(x="grad x weight grad_x", i32="source", fp32="mean rstd partial_weight partial_bias"),
        ("D", "stride"), ("T", "program_rows"), (), {"GRAD_X": True, "PARAMETERS": True}, whole_rows=DIM,
    ),
    Case("bias_gelu", "bias_gelu", _pointers(x="x bias y"), ("D", "stride"), ("T",)),
    Case(
        "bias_gelu", "bias_gelu_backward", _pointers(x="grad x bias grad_x", fp32="partial"), ("D", "stride"),
        ("T", "program_rows"), table="bias_gelu",
    ),
    Case(
        "token_loss", "token_rows", _pointers(x="logits", i32="targets", fp32="unit_weight row_loss", i8="correct"),
        ("stride",), ("V", "ignore_index"), ("smoothing", "z_loss"), {"GRAD": True, "CORRECT": True, "SMOOTH": True},
    ),
]  # fmt: skip

# the first case of each kernel, which is its call in M3AE-Large (for attention, in the encoder)
LARGE = {case.kernel: case for case in reversed(CASES)}


@dataclass
class Report:
    """The result of one compilation. `problems` is empty if there are none."""

    kernel: str
    arch: str
    dtype: str
    settings: str
    registers: int = 0
    spills: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    instruction: str = "-"
    problems: tuple[str, ...] = ()


def compile_case(case: Case, arch: str, dtype: str, settings: dict[str, int] | None = None) -> Report:
    """Compile one kernel for one architecture and dtype with the settings of the table, or with `settings`, and return
    a report. Errors of the compiler are in the report."""
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = arch.startswith("gfx")
    name = arch if amd else tuning.nvidia_arch(_capability(arch))
    samples = tuning.samples_class(*case.sample) if case.sample[0] else ""
    tile = dict(settings or tuning.settings(name, case.table or case.kernel, DTYPES[dtype], samples))
    shown = " ".join(f"{k.removeprefix('BLOCK_').removeprefix('num_')}={v}" for k, v in tile.items())
    channels = (case.constants or {}).get("C")
    report = Report(case.kernel, arch, dtype, f"C={channels} {shown}" if channels else shown)
    module = importlib.import_module(f".triton_impl.{case.module}", __package__)
    if case.kernel == "patch_stats":
        tile = module.whole_patches(tile, case.whole_rows)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages") if name in tile} | tuning.FUSE
    if "TILE" in tile:
        tile = {"BLOCK_M": max(1, tile.pop("TILE") // case.whole_rows), "BLOCK_D": case.whole_rows}
    dim, rows = case.sample
    if dim:
        report.settings = f"D={dim} {shown}"
        tile = module.as_rows(tile, dim, rows, rows) | tile
    kernel = getattr(module, f"{case.kernel}_kernel")
    known = {
        "ACC": tl.float32,
        "PRECISION": "tf32x3" if dtype == "fp32" and not amd else "ieee",
    } | ({"D": dim, "LONG": rows > tile["BLOCK_N"]} if dim else {})
    constants = {k: v for k, v in (known | tile | (case.constants or {})).items() if k in kernel.arg_names}
    signature, attributes = {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in case.pointers:
            kind = case.pointers[name]
            signature[name] = "*" + (dtype if kind == "x" else kind)
        else:
            signature[name] = "fp32" if name in case.floats else "i32"
        if name in case.aligned or (name in case.pointers and not parameter.do_not_specialize_on_alignment):
            attributes[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    try:
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    except Exception as error:  # any error of the compiler is reported
        report.problems = (f"does not compile: {str(error).strip().splitlines()[-1] if str(error) else repr(error)}",)
        return report
    report.shared_bytes = compiled.metadata.shared
    if amd:
        _read_amd(report, compiled.asm["amdgcn"])
    else:
        _read_nvidia(report, compiled.asm["cubin"])
    found = MATRIX_INSTRUCTION.search(compiled.asm["amdgcn" if amd else "ptx"])
    report.instruction = found.group(1) if found else "-"
    problems = []
    if report.spills > MOST_SPILLS or (report.local_bytes and not report.spills):
        problems.append(f"{report.spills} spills, {report.local_bytes} bytes of local memory per thread")
    if report.shared_bytes > SHARED_BYTES[arch]:
        problems.append(f"needs {report.shared_bytes} bytes of shared memory; {SHARED_BYTES[arch]} are available")
    threads = 32 * options.get("num_warps", 4)
    of_registers = REGISTERS // (threads * 8 * -(-report.registers // 8))
    fit = min(of_registers, (SHARED_BYTES[arch] + 1024) // (report.shared_bytes + 1024))
    if fit < case.programs and not amd:
        problems.append(f"{fit} program instances fit on a multiprocessor, but {case.programs} must fit")
    if case.matmul and not found:
        problems.append("contains no matrix instruction")
    report.problems = tuple(problems)
    return report


def _capability(arch: str) -> tuple[int, int]:
    """Return the compute capability of an architecture, such as (8, 0) for sm_80."""
    number = int(arch.removeprefix("sm_"))
    return number // 10, number % 10


def _on_torch(arch: str) -> bool:
    """Return whether `dispatch` uses torch on this architecture."""
    return arch.startswith("sm_") and _capability(arch) < tuning.OLDEST


def _read_nvidia(report: Report, cubin: bytes) -> None:
    """Fill in the resources that a kernel uses. Only a kernel with local memory can have spills, so only such kernels
    are disassembled, which takes half a second each."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            command = [knobs.nvidia.cuobjdump.path, flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage")))
        report.registers = int(numbers["REG"])
        report.local_bytes = int(numbers["STACK"]) + int(numbers["LOCAL"])
        if report.local_bytes:
            report.spills = len(re.findall(r"\b(?:STL|LDL)\b", dump("-sass")))


def _read_amd(report: Report, assembly: str) -> None:
    numbers = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", assembly, re.M)}
    report.registers = numbers["vgpr_count"]
    report.spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    report.local_bytes = numbers["private_segment_fixed_size"]


def main(arguments: list[str] | None = None) -> int:
    """Compile the kernels, print one line for each compilation, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m m3ae_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arch",
        nargs="+",
        choices=SHARED_BYTES,
        default=[arch for arch in SHARED_BYTES if arch not in AS_OTHERS],
        metavar="ARCH",
        help=f"architectures to compile for: {', '.join(SHARED_BYTES)} (default: all except {', '.join(AS_OTHERS)})",
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=dict.fromkeys(c.kernel for c in CASES),
        metavar="KERNEL",
        help="names of the kernels to compile (default: all)",
    )
    parser.add_argument("--full", action="store_true", help="compile every kernel at every size in every dtype")
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="number of parallel compilations (default: number of cores)",
    )
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, but the interpreter compiles nothing: unset this variable")
    cases = [case for case in CASES if not args.kernel or case.kernel in args.kernel]
    for arch in filter(_on_torch, args.arch):
        print(f"{arch}: nothing is compiled, because the ops run on torch on this architecture")
    compiled = [arch for arch in args.arch if not _on_torch(arch)]
    grid = [(case, arch, dtype) for case in cases for arch in compiled for dtype in DTYPES]
    work = [(case, arch, dtype) for case, arch, dtype in grid if args.full or case.compiled(arch, dtype)]
    if not work:
        return 0
    form = "{:21} {:7} {:5} {:40} {:>4} {:>6} {:>6} {:>7}  {:11} {}"
    print(form.format("kernel", "arch", "dtype", "settings", "regs", "spills", "local", "shared", "matrix", ""))
    bad = 0
    with ProcessPoolExecutor(max(1, args.jobs)) as pool:
        for r in pool.map(compile_case, *zip(*work)):
            verdict = "; ".join(r.problems)
            bad += bool(verdict)
            print(
                form.format(
                    r.kernel, r.arch, r.dtype, r.settings, r.registers, r.spills, r.local_bytes, r.shared_bytes,
                    r.instruction, verdict,
                ).rstrip(),
                flush=True,
            )  # fmt: skip
    print(f"{len(work) - bad} of {len(work)} compilations pass all checks")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
