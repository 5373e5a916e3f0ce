"""Packages import only lower packages, and no imports are circular. Imports inside functions are included."""

import ast
import graphlib
from functools import cache

from tests.helpers.trainer import ROOT

# The packages, lowest first. The programs at the root of m3ae_fast are above all of them.
LAYERS = ("m3ae_kernels", "base", "config", "process", "images", "batch", "model", "vqgan", "data", "shards", "engine")
LAYERS += ("checkpoint", "weights", "drawing", "training", "heads", "evaluation", "embedding", "pretraining")
LAYERS += ("verify", "cli")


def _modules():
    """Return the path of each module of both packages by its dotted name."""
    folders = {"m3ae_fast": ROOT, "m3ae_kernels": ROOT / "kernels"}
    paths = {path: home for name, home in folders.items() for path in (home / name).rglob("*.py")}
    return {".".join(path.relative_to(home).with_suffix("").parts): path for path, home in paths.items()}


MODULES = {name.removesuffix(".__init__"): path for name, path in _modules().items()}


def _imports(name, inside=False):
    """Return the modules of both packages that a module imports at the top or inside functions. With `inside`, return
    only those that it imports inside functions."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = set()
    for node in (each for part in (functions if inside else [tree]) for each in ast.walk(part)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {part if (part := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return (found & MODULES.keys()) - {name}


def _layer(name):
    top, *inner = name.split(".")
    part = inner[0] if top == "m3ae_fast" and inner else top
    return LAYERS.index(part) if part in LAYERS else len(LAYERS)


@cache
def _graph():
    """Return the imports of each module. They are not found when this file is imported, because each of pytest's
    workers imports all files, and only one runs these tests."""
    return {name: _imports(name) for name in MODULES}


def test_there_are_no_circular_imports():
    assert len(list(graphlib.TopologicalSorter(_graph()).static_order())) == len(MODULES)  # raises CycleError


def test_a_layer_imports_only_the_layers_below():
    upwards = {
        f"{name} -> {other}" for name, others in _graph().items() for other in others if _layer(other) > _layer(name)
    }
    assert upwards == set()


def test_training_and_all_packages_below_do_not_know_the_settings_of_evaluation():
    below = {name for name in MODULES if _layer(name) <= LAYERS.index("training")}
    names = {name for name in below if "m3ae_fast.config.evaluation" in _graph()[name]}
    assert {name for name in names if not name.startswith("m3ae_fast.config")} == set()


def test_every_package_has_a_layer_and_every_layer_is_a_package():
    packages = {path.parent.name for path in (ROOT / "m3ae_fast").glob("*/__init__.py")}
    assert packages == {*LAYERS} - {"m3ae_kernels"}


def test_only_programs_import_modules_of_the_package_in_functions():
    """Programs import modules in functions, so that --help does not import torch. DeepSpeed is an optional library."""
    programs = {"m3ae_fast", "m3ae_fast.__main__", "m3ae_fast.train"}
    modules = [name for name in MODULES if name.startswith("m3ae_fast") and not name.startswith("m3ae_fast.cli.")]
    found = {f"{name} -> {other}" for name in {*modules} - programs for other in _imports(name, inside=True)}
    assert found == {"m3ae_fast.engine.build -> m3ae_fast.engine.deepspeed_engine"}
