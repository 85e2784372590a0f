"""Who may import whom, as a table. Imports inside functions and under TYPE_CHECKING count like any other."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qkov_dist

PACKAGE = Path(qkov_dist.__file__).parent
MODULES = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}

# Libraries with one home; no other module imports them.
HOMES = {"torch.distributed": "comm", "mpi4py": "comm", "deepspeed": "parallel"}

# All that a module may import of the package.
ONLY = {"errors": set(), "geometry": {"errors"}, "score": {"errors"}}

# Modules that a module must not know, be it through others.
PLACEMENT = {"shards", "plan", "capture"}
RUNNING = {"capture", "engine", "run"}
COMPUTING = {"capture", "engine", "run", "score", "fisher", "permutation"} | {
    "pair_sums",
    "head_tests",
    "layer_tests",
    "significance",
    "statistics",
}
STRANGERS = {
    "layout": PLACEMENT,
    "slices": PLACEMENT,
    "rows": PLACEMENT,
    "families": PLACEMENT,
    "shards": {"layout", "plan"},
    "statistics": RUNNING,
    "head_tests": RUNNING,
    "layer_tests": RUNNING,
    "pair_sums": RUNNING,
    "significance": RUNNING,
    "permutation": RUNNING,
    "summary": COMPUTING,
    "report": COMPUTING,
}

# Libraries that a module does without.
WITHOUT = {"geometry": {"torch", "numpy"}, "summary": {"torch", "scipy"}, "report": {"torch", "scipy"}}

# Modules that the tables speak of before they are there.
PLANNED = {"comm", "shards", "report"}

NAMES_THAT_SAY_NOTHING = {"utils", "helpers", "misc", "common"}


def imported(source: str) -> Iterator[str]:
    """Absolute dotted names of all that a module imports, or reaches as an attribute of what it imports."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join(part for part in (PACKAGE.name if level else "", module) if part)
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name("import_module") | ast.Attribute(attr="import_module")):
                yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))
            case ast.Attribute():
                yield ast.unparse(node)


def own(source: str) -> set[str]:
    """Modules of the package that a module imports; a name that is no module comes from ``__init__``."""
    parts = [name.split(".") for name in imported(source)]
    names = {part[1] for part in parts if part[0] == PACKAGE.name and len(part) > 1}
    return {name if name in MODULES else "__init__" for name in names}


def uses(source: str, library: str) -> bool:
    """Whether a module imports a library or a part of it."""
    return any(f"{name}.".startswith(f"{library}.") for name in imported(source))


GRAPH = {module: own(source) for module, source in MODULES.items()}


def reached(module: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Every module that is imported along with a module."""
    found: set[str] = set()
    todo = [module]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def there(table: Mapping[str, object]) -> list[str]:
    return sorted(table.keys() & MODULES.keys())


def test_no_imports_form_a_circle() -> None:
    TopologicalSorter(GRAPH).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_alone(library: str) -> None:
    assert {module for module, source in MODULES.items() if uses(source, library)} <= {HOMES[library]}


@pytest.mark.parametrize("module", there(ONLY))
def test_a_module_imports_nothing_else_of_the_package(module: str) -> None:
    assert GRAPH[module] <= ONLY[module]


@pytest.mark.parametrize("module", there(STRANGERS))
def test_a_module_does_not_know_strangers(module: str) -> None:
    assert not reached(module, GRAPH) & STRANGERS[module]


@pytest.mark.parametrize("module", there(WITHOUT))
def test_a_module_does_without_libraries(module: str) -> None:
    assert not {library for library in WITHOUT[module] if uses(MODULES[module], library)}


def test_every_module_is_named_after_its_idea() -> None:
    assert not NAMES_THAT_SAY_NOTHING & MODULES.keys()


def test_the_tables_speak_of_modules_that_are_there_or_planned() -> None:
    named = {*HOMES.values(), *ONLY, *STRANGERS, *WITHOUT}.union(*ONLY.values(), *STRANGERS.values())
    assert named <= MODULES.keys() | PLANNED


@pytest.mark.parametrize(
    ("source", "library"),
    [
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("from torch.distributed.tensor import DTensor", "torch.distributed"),
        ("import torch\n\ntorch.distributed.barrier()", "torch.distributed"),
        ("def join():\n    from mpi4py import MPI", "mpi4py"),
        ("import importlib\n\nimportlib.import_module('deepspeed')", "deepspeed"),
    ],
)
def test_every_way_of_importing_a_library_is_seen(source: str, library: str) -> None:
    assert uses(source, library)
    assert not uses("import torch\nfrom torch import distributions, nn\nimport deepspeedy", library)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from .plan import Tile", "plan"),
        ("from . import plan", "plan"),
        ("import qkov_dist.plan", "plan"),
        ("from qkov_dist.plan import Tile", "plan"),
        ("from qkov_dist import plan", "plan"),
        ("from qkov_dist import QkovError", "__init__"),
        ("if TYPE_CHECKING:\n    from .plan import Tile", "plan"),
    ],
)
def test_every_way_of_importing_a_module_is_seen(source: str, module: str) -> None:
    assert own(source) == {module}
    assert own("import json\nfrom planning import plan") == set()


def test_circles_and_strangers_behind_others_are_found() -> None:
    graph = {"layout": {"families"}, "families": {"rows"}, "rows": {"plan"}, "plan": set()}
    TopologicalSorter(graph).prepare()
    assert reached("layout", graph) == {"families", "rows", "plan"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {"plan": {"layout"}}).prepare()
