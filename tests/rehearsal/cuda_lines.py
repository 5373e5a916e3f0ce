"""Detection of the lines of the CUDA path: all lines of functions that mention CUDA."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

CUDA = re.compile(r"cuda|nccl", re.IGNORECASE)


def cuda_functions(path: Path) -> dict[str, set[int]]:
    """Return the lines of the innermost functions whose code (without docstrings and comments) mentions CUDA, by
    name."""
    source = path.read_text(encoding="utf-8")
    owner: dict[int, str] = {}
    silent: set[int] = set()  # lines of docstrings and comments
    for node in ast.walk(tree := ast.parse(source)):  # outer functions come before inner ones
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            owner |= dict.fromkeys(range(node.body[0].lineno, node.end_lineno + 1), f"{node.name}:{node.lineno}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            silent |= set(range(node.lineno, node.end_lineno + 1))
    lines = source.splitlines()
    functions: dict[str, set[int]] = defaultdict(set)
    for number, name in owner.items():
        functions[name].add(number)
    return {
        name.partition(":")[0]: numbers
        for name, numbers in functions.items()
        if any(CUDA.search(lines[n - 1].partition("#")[0]) for n in numbers - silent)
    }
