"""Mutants: small changes of the source that imitate plausible mistakes, and a fixed random sample of them."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("m3ae_fast/**/*.py", "kernels/m3ae_kernels/**/*.py")
LEFT_OUT = {  # files that are not mutated, by prefixes of their paths
    "kernels/m3ae_kernels/aot.py": "compiles for GPUs",
    "kernels/m3ae_kernels/tuning/": "block sizes of GPUs",
    "kernels/m3ae_kernels/triton_impl/": "kernels of GPUs, which only slow tests interpret",
    "kernels/m3ae_kernels/attention/cuda.py": "kernels of GPUs; tests/test_attention.py has stand-ins for them",
}
_SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
# code that only affects messages or type checkers
_PASSED_OVER = (ast.JoinedStr, ast.Raise, ast.Assert, ast.AnnAssign, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Mutant:
    file: str  # relative to the repository
    line: int
    start: int  # offset in the file in bytes
    end: int
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {' '.join(self.old.split())} -> {' '.join(self.new.split())}"

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]


def sample(count: int, seed: int) -> list[Mutant]:
    """Return a uniform random sample of `count` mutants."""
    every = [mutant for path in _files() for mutant in mutants(path)]
    return random.Random(seed).sample(every, count)


def _files() -> list[Path]:
    found = {path for pattern in FILES for path in ROOT.glob(pattern)}
    return sorted(path for path in found if not str(path.relative_to(ROOT)).startswith(tuple(LEFT_OUT)))


def mutants(path: Path) -> Iterator[Mutant]:
    source = path.read_bytes()
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for node, new in _changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old = source[start:end].decode()
        if isinstance(node, ast.expr):
            new = f"({new})"
        yield Mutant(str(path.relative_to(ROOT)), node.lineno, start, end, old, new)


def _changes(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Yield each possible change as (node, source that replaces it)."""
    for node in _walk(tree):
        match node:
            case ast.Compare(ops=[op]) if type(op) in _SWAPPED:
                yield node, _with(node, ops=[_SWAPPED[type(op)]()])
            case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in _SWAPPED:
                yield node, _with(node, op=_SWAPPED[type(op)]())
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
                yield node, ast.unparse(operand)
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not isinstance(test, ast.Compare):
                yield test, f"not ({ast.unparse(test)})"
            case ast.Constant(value=bool() as value):
                yield node, repr(not value)
            case ast.Constant(value=int() as value):
                yield node, repr(value + 1)
            case ast.Constant(value=float() as value):
                yield node, repr(2 * value or 1.0)
            case ast.AugAssign(op=op) if type(op) in _SWAPPED:
                yield node, _with(node, op=_SWAPPED[type(op)]())
            case ast.Expr(value=ast.Call()):
                yield node, "pass"
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield node, "return None"
            case ast.Break():
                yield node, "continue"
            case ast.Continue():
                yield node, "break"


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or (name == "orelse" and _is_main(node)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AnnAssign) and child.value is not None:
                yield from _walk(child.value)
            elif isinstance(child, ast.AST) and not isinstance(child, _PASSED_OVER) and not _is_main(child):
                yield from _walk(child)


def _is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ("__name__" in (test := ast.unparse(node.test)) or "TYPE_CHECKING" in test)


def _with(node: ast.AST, **fields) -> str:
    values = {name: getattr(node, name) for name in node._fields} | fields
    return ast.unparse(type(node)(**values))
