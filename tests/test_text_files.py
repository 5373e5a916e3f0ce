"""Text is read and written as UTF-8 everywhere, regardless of the locale."""

import ast

from tests.helpers.trainer import ROOT

MODES = {"r", "w", "a", "x", "r+", "w+", "a+"}


def opens_text(call: ast.Call) -> bool:
    """Return whether a call reads or writes a file as text."""
    constants = [value.value for value in call.args if isinstance(value, ast.Constant)]
    match call.func:
        case ast.Attribute(attr="read_text" | "write_text"):
            return True
        case ast.Attribute(value=ast.Name(id="tarfile")):
            return False
        case ast.Attribute(attr="open" | "fdopen"):
            return not MODES.isdisjoint(constants)
        case ast.Name(id="open"):
            return len(call.args) < 2 or not MODES.isdisjoint(constants)
    return False


def test_text_files_are_always_opened_with_an_explicit_encoding():
    found, paths = {}, [*(ROOT / "m3ae_fast").rglob("*.py"), *(ROOT / "kernels/m3ae_kernels").rglob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node):
                encodings = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "encoding"]
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = encodings
    assert len(found) > 20
    assert {
        place: encodings for place, encodings in found.items() if encodings not in (["'utf-8'"], ["'utf-8-sig'"])
    } == {}
