"""The CPU kernels of attention, compared with float64, and the fallback if they cannot be built."""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from m3ae_kernels.attention import Kernel, Segments, native
from m3ae_kernels.attention.choice import kernel_for
from m3ae_kernels.cpu import build as builds
from m3ae_kernels.cpu.processor import Cpu, this_cpu
from torch import Tensor

from tests.helpers.amx import TILES_ANYWHERE
from tests.helpers.waiting import has_ended, until

AMX = {"amx_tile", "amx_bf16"}
BUILDS = {  # dtype, vendor of the CPUs, required CPU flags, whether it uses AMX, largest relative error
    "float32": (torch.float32, "GenuineIntel", set(), False, 3e-6),
    "bf16 as floats": (torch.bfloat16, "GenuineIntel", {"avx512_bf16"}, False, 4e-3),
    "bf16 in pairs": (torch.bfloat16, "AuthenticAMD", {"avx512_bf16"}, False, 4e-3),
    "bf16 in tiles": (torch.bfloat16, "GenuineIntel", {"avx512_bf16"}, True, 4e-3),
}
PER_SAMPLE = "torch, per sample"
SHAPES = {  # heads, head dimension, queries, keys
    "one key": (1, 16, [1], [1]),
    "decoder": (4, 32, [217, 229, 198], [217, 229, 198]),
    "encoder": (6, 64, [55, 3, 61, 8, 9, 16, 17], [55, 3, 61, 8, 9, 16, 17]),
    "pruned": (3, 48, [0, 5, 31, 0, 2], [4, 37, 33, 1, 200]),
    "wide": (2, 128, [7, 90], [7, 91]),
    "no rows": (2, 32, [], []),
    "no queries": (2, 32, [0, 0], [3, 5]),
}


def segments(lengths: list[int]) -> Segments:
    ends = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return Segments(ends, max(lengths, default=0), sum(lengths))


@pytest.fixture
def cpu(monkeypatch):
    """Return a function of (vendor, flags) that makes this CPU appear as another one."""

    def pretend(vendor: str, flags: set[str]) -> None:
        monkeypatch.setattr(native, "this_cpu", lambda: Cpu(vendor, "", frozenset(flags)))
        builds.load.cache_clear()

    yield pretend
    builds.load.cache_clear()


@pytest.fixture(params=BUILDS)
def build(request, cpu, monkeypatch) -> tuple[torch.dtype, float]:
    """Return (dtype, largest relative error) of the build that the test uses."""
    dtype, vendor, needs, tiles, error = BUILDS[request.param]
    flags = this_cpu().flags
    if not flags >= builds.AVX512 | needs:
        pytest.skip("this CPU lacks the instructions")
    cpu(vendor, flags | AMX if tiles else flags - AMX)
    monkeypatch.setattr(native, "TILES", TILES_ANYWHERE)
    monkeypatch.setattr(native, "may_use_tiles", lambda: True)
    return dtype, error


def inputs(shape: str, dtype: torch.dtype = torch.float32, scale: float = 1.5) -> tuple:
    """Return grad, q, k, v and the segments of the queries and of the keys. As in the model, q, k and v are slices of
    one tensor."""
    heads, dim, queries, keys = SHAPES[shape]
    torch.manual_seed(0)
    qkv = (scale * torch.randn(sum(keys), 3 * heads * dim)).to(dtype)
    q, k, v = (x.unflatten(-1, (heads, dim)) for x in qkv.chunk(3, dim=-1))
    q = q[: sum(queries)]
    return torch.randn(q.shape).to(dtype), q, k, v, segments(queries), segments(keys)


def kernel_of(q: Tensor) -> Kernel:
    return kernel_for("auto", q.device, q.dtype, q.shape[1], q.shape[2], 9)


def name(q: Tensor) -> str:
    return kernel_of(q).name


def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> dict[str, Tensor]:
    """Return outputs and gradients. Gradients are NaN where the kernel does not write. Those of keys and values are
    slices of one tensor."""
    kernel = kernel_of(q)
    out, lse = kernel.forward(q, k, v, queries, keys)
    dq, dkv = q.new_full(q.shape, torch.nan), k.new_full((len(k), 2, *k.shape[1:]), torch.nan)
    kernel.backward(grad, q, k, v, out, lse, dq, *dkv.unbind(1), queries, keys)
    return {"out": out, "lse": lse, "dq": dq, "dk": dkv[:, 0], "dv": dkv[:, 1]}


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_float64(build, shape):
    dtype, error = build
    *tensors, cu_queries, cu_keys = inputs(shape, dtype)
    tiles = dtype == torch.bfloat16 and tensors[1].shape[-1] % 32 == 0 and "amx_tile" in native.this_cpu().flags
    assert name(tensors[1]) == ("AMX" if tiles else "AVX-512")
    exact = run(*(x.double() for x in tensors), cu_queries, cu_keys)
    for part, got in run(*tensors, cu_queries, cu_keys).items():
        assert got.shape == exact[part].shape
        assert got.dtype == (torch.float32 if part == "lse" else dtype)
        assert (got.double() - exact[part]).norm() <= error * (1 + exact[part].norm()), part


def test_results_do_not_depend_on_threads_or_strides(build):
    *tensors, cu_queries, cu_keys = inputs("pruned", build[0])
    expected = run(*tensors, cu_queries, cu_keys)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for part, got in run(*tensors, cu_queries, cu_keys).items():
                assert torch.equal(got, expected[part])
    finally:
        torch.set_num_threads(threads)
    odd = [torch.zeros(len(x), x.shape[1] * x.shape[2] + 5, dtype=x.dtype) for x in tensors]
    strided = [pad[:, : x[0].numel()].unflatten(1, x.shape[1:]).copy_(x) for pad, x in zip(odd, tensors)]
    across = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in tensors]
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    apart = [torch.nn.functional.pad(x, (0, 3))[..., : x.shape[2]] for x in tensors]
    for others, number in itertools.product((strided, across, by_head, apart), range(4)):
        mixed = [*tensors[:number], others[number], *tensors[number + 1 :]]
        for part, got in run(*mixed, cu_queries, cu_keys).items():
            assert torch.equal(got, expected[part])


@pytest.mark.parametrize("short", [0, 1, 2])
def test_a_thread_without_memory_raises_an_error_even_if_other_threads_succeed(monkeypatch, short):
    _, q, k, v, *ends = inputs("encoder")
    answers = [1, 1, 1]
    answers[short] = 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    parts = {"q": q, "k": k, "v": v, "out": q, "lse": q[..., 0]}
    with pytest.raises(MemoryError, match="not enough memory for the scores"):
        native._run(lambda _: answers.pop(), *ends, **parts)
    native._run(lambda _: 1, *ends, **parts)


@pytest.mark.parametrize(
    ("dtype", "dim", "pairs", "tiles", "name", "defined"),
    [
        (torch.float32, 48, True, True, "AVX-512", set()),
        (torch.bfloat16, 48, True, True, "AVX-512", {"-DBF16", "-DPAIRS"}),
        (torch.bfloat16, 48, False, True, "AVX-512", {"-DBF16"}),
        (torch.bfloat16, 64, False, True, "AMX", {"-DBF16", "-DTILES"}),
        (torch.bfloat16, 64, False, False, "AVX-512", {"-DBF16"}),
    ],
)
def test_each_cpu_has_the_build_for_its_instructions(cpu, monkeypatch, dtype, dim, pairs, tiles, name, defined):
    monkeypatch.setattr(native, "may_use_tiles", lambda: True)
    cpu("AuthenticAMD" if pairs else "GenuineIntel", builds.AVX512 | {"avx512_bf16"} | (AMX if tiles else set()))
    build = native.best_build(dtype, dim)
    assert build.name == name and {flag for flag in build.flags if flag.startswith("-D")} == defined


def test_large_and_non_finite_scores(build):
    *tensors, cu_queries, cu_keys = inputs("pruned", build[0], scale=60)
    for part, got in run(*tensors, cu_queries, cu_keys).items():
        assert got.isfinite().all(), part
    tensors[2][5, 0, 3] = torch.nan  # a key of the second sample's first head
    out = run(*tensors, cu_queries, cu_keys)["out"]
    assert out[:5, 0].isnan().all()
    assert out[:5, 1:].isfinite().all() and out[5:].isfinite().all()


def test_unused_lanes_after_the_last_key_have_no_effect(build):
    """All scores are far below 0, and the number of keys is not a multiple of 16. An unused lane whose value is 0 would
    therefore be the largest score."""
    grad, q, k, v, *cu = inputs("pruned", build[0], scale=8)
    k = -q.abs().amax() * torch.ones_like(k)
    q = q.abs().contiguous()
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    assert scores.max() < -100
    exact = run(*(x.double() for x in (grad, q, k, v)), *cu)
    results = run(grad, q, k, v, *cu)
    assert all(result.isfinite().all() for result in results.values())
    for name in ("out", "lse", "dv"):  # the other gradients are differences of equal numbers
        got = results[name]
        # dv is a sum with the weights exp2(score - lse). Their relative error is the rounding error of score - lse,
        # which grows with the size of the scores.
        bound = 2 * build[1] + (2 * 2**-23 * float(scores.abs().max()) if name == "dv" else 0)
        assert (got.double() - exact[name]).norm() <= bound * (1 + exact[name].norm()), name


def cached(cache: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (cache / "m3ae_kernels").iterdir()}


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    path = tmp_path / "a new home/cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


def test_a_kernel_is_compiled_once_per_source_text_and_flags(cache, monkeypatch, tmp_path):
    """A change of an included header also causes a build."""
    monkeypatch.setattr(builds, "FOLDER", tmp_path)
    header, source = tmp_path / "one.h", tmp_path / "one.c"
    header.write_text("#define ONE 1\n")
    source.write_text('#include "one.h"\nint one(void) { return ONE; }\n')
    assert builds.compiled("one.c", ()).one() == 1
    (library,) = cached(cache)
    built = library.stat().st_mtime_ns
    builds.compiled("one.c", ())
    assert library.stat().st_mtime_ns == built and list(cached(cache)) == [library]
    assert builds.compiled("one.c", ("-DOTHER",)).one() == 1 and len(cached(cache)) == 2
    header.write_text("#define ONE 2\n")
    assert builds.compiled("one.c", ()).one() == 2 and len(cached(cache)) == 3
    source.write_text(source.read_text().replace("return", "return 1 +"))
    assert builds.compiled("one.c", ()).one() == 3 and len(cached(cache)) == 4


@pytest.mark.slow
def test_a_damaged_library_is_rebuilt(cache):
    """The test runs in a separate process, because a truncated library would end the process with SIGBUS."""
    builds.compiled("gelu.c", ())
    whole = cached(cache)
    (library,) = whole
    code = """if True:
        import sys
        from pathlib import Path
        from m3ae_kernels.cpu import build
        library = Path(sys.argv[1])
        whole = library.read_bytes()
        for left in (0, 5000, -1):
            library.unlink()  # it is not overwritten, because this process may have mapped it
            library.write_bytes(whole[:left])
            build.compiled("gelu.c", ()).forward
            assert library.read_bytes() == whole, left
    """
    subprocess.run([sys.executable, "-c", code, str(library)], check=True)
    assert cached(cache) == whole


def test_a_library_that_cannot_be_loaded_is_removed_from_the_cache(cache, monkeypatch, tmp_path, caplog):
    """The file that cannot be loaded is removed. Otherwise, the next run would accept it because its checksum is
    correct."""
    script(monkeypatch, tmp_path, 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"')
    for _ in range(2):
        assert load_anew() is None
    assert not cached(cache) and "cannot be built" in caplog.text


def script(monkeypatch, folder: Path, text: str) -> None:
    """Set CC to a shell script."""
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\n{text}\n", encoding="latin-1")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))


def load_anew():
    builds.load.cache_clear()
    return builds.load("gelu.c", (), "torch takes over")


def test_a_compiler_that_hangs_is_ended_with_its_children(cache, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(builds, "LIMIT_S", 0.3)
    script(monkeypatch, tmp_path, f"sleep 300 & echo $! > {tmp_path}/child; wait")
    assert load_anew() is None
    assert "torch takes over: gelu.c cannot be built (the compiler took longer than 0.3 s)" in caplog.text
    until(lambda: has_ended(int((tmp_path / "child").read_text())))


@pytest.mark.parametrize(
    ("text", "reason"),
    [("echo Datei nicht gefunden: \xfc >&2; exit 1", "nicht gefunden: \ufffd"), ("exit 0", "library.so")],
)
def test_a_broken_compiler_gives_one_log_line(cache, monkeypatch, tmp_path, caplog, text, reason):
    script(monkeypatch, tmp_path, text)
    assert load_anew() is None
    assert len(caplog.records) == 1 and reason in caplog.text


@pytest.mark.parametrize("home", ["none", "read-only"])
def test_kernels_are_built_without_a_home(monkeypatch, tmp_path, caplog, home):
    builds._temporary_folder.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home == "none":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:  # there is a file in place of the folder, because root can write to a folder without permissions
        (tmp_path / ".cache").touch()
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert builds.compiled("gelu.c", ()).forward and builds.compiled("gelu.c", ("-DOTHER",)).forward
    assert len(caplog.records) == 1 and "they cannot be cached" in caplog.text
    (folder,) = tmp_path.glob("m3ae_kernels-*")
    assert len(list(folder.glob("gelu-*.so"))) == 2
    builds._temporary_folder.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/no/such/compiler", "No such file"), ("false", "exit status 1"), ('cc "', "")],
)
def test_torch_is_used_if_there_is_no_compiler(monkeypatch, tmp_path, caplog, cpu, compiler, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    cpu("GenuineIntel", builds.AVX512)
    tensors = inputs("pruned")
    assert name(tensors[1]) == PER_SAMPLE
    assert reason in caplog.text and "half the speed" in caplog.text
    assert run(*tensors)["out"].isfinite().all()


def test_torch_is_used_on_unsupported_cpus_dtypes_and_head_dimensions(cpu):
    _, q, *_ = inputs("pruned")
    assert name(q.double()) == name(q.half()) == PER_SAMPLE
    assert name(q[..., :24]) == PER_SAMPLE
    cpu("GenuineIntel", builds.AVX512)
    assert name(q.bfloat16()) == PER_SAMPLE
    cpu("GenuineIntel", set())
    assert name(q) == PER_SAMPLE
