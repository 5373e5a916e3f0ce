"""Imports flow one way, and in no circle."""

import ast
import graphlib

from tests.helpers.trainer import ROOT

# packages and modules of m3ae_fast, lowest first; what is not named, and every __main__, is a program, on top of all
LAYERS = ("m3ae_kernels", "memory", "errors", "whole_file", "regular_file", "environment", "progress", "stop_signals")
LAYERS += ("hub_answers",)
LAYERS += ("command_line", "config", "hardware", "object_store")
LAYERS += ("batch", "weights", "vqgan", "model", "data", "shard_tools", "process", "engine", "pictures", "run")
LAYERS += ("encoding", "open_model")


def _modules():
    """Path by dotted name, of both packages."""
    folders = {"m3ae_fast": ROOT, "m3ae_kernels": ROOT / "kernels"}
    paths = {path: home for name, home in folders.items() for path in (home / name).rglob("*.py")}
    return {".".join(path.relative_to(home).with_suffix("").parts): path for path, home in paths.items()}


MODULES = {name.removesuffix(".__init__"): path for name, path in _modules().items()}


def _imports(name):
    """What a module imports of both packages when it is imported itself: not what its functions import."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    todo, found = list(ast.parse(MODULES[name].read_text(encoding="utf-8")).body), set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {part if (part := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return (found & MODULES.keys()) - {name}


def _layer(name):
    top, *inner = name.removesuffix(".__main__").split(".")
    if name.endswith("__main__"):
        return len(LAYERS)
    part = inner[0] if top == "m3ae_fast" and inner else top
    return LAYERS.index(part) if part in LAYERS else len(LAYERS)


GRAPH = {name: _imports(name) for name in MODULES}


def test_no_module_imports_itself_by_way_of_others():
    assert len(list(graphlib.TopologicalSorter(GRAPH).static_order())) == len(MODULES)  # raises CycleError


def test_a_layer_imports_only_the_layers_below():
    upwards = [f"{name} -> {other}" for name in GRAPH for other in GRAPH[name] if _layer(other) > _layer(name)]
    assert not upwards
