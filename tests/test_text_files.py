"""Text is read and written as UTF-8 everywhere, regardless of the locale. No text file contains the path of a folder of
the machine on which it was written."""

import ast
import sys

from tests.helpers.trainer import ROOT

FOLDERS = ("m3ae_fast", "kernels", "lab", "benchmarks", "examples", "docs", "configs", "tests")
KINDS = {".py", ".md", ".sh", ".ipynb", ".json", ".toml", ".yaml", ".yml", ".sbatch", ".c", ".h", ".cpp"}
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


def test_no_file_contains_a_path_of_this_machine():
    """Stored results and outputs of the notebook are the most likely to contain such a path."""
    own = (f"{ROOT}/", f"{sys.prefix}/")
    paths = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in KINDS]
    paths += [path for path in ROOT.glob("*.*") if path.suffix in KINDS]
    assert {".py", ".md", ".json", ".ipynb"} <= {path.suffix for path in paths}
    assert [path for path in paths if any(each in path.read_text(encoding="utf-8") for each in own)] == []
