"""Which room may know which, as a table. Imports inside functions and under TYPE_CHECKING count like any other."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qkov_dist

PACKAGE = Path(qkov_dist.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py")
}

# Rooms and files of the root that stand above the rooms, from the top down; modules in one line know those below it.
ORDER = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("verification",),
    ("acting",),
    ("run", "metric"),
    ("finish", "collector"),
    ("planning",),
    ("stats", "report", "job"),
    ("results",),
    ("scoring",),
    ("capture",),
    ("distributed",),
    ("loading",),
    ("layout", "data"),
)
BELOW_ALL = {"config", "config_file", "console", "errors", "memory", "modes", "values"}
FACE = "__init__"  # hands on names of all rooms; nobody in them asks it

# Libraries with one home; no other room imports them.
HOMES = {"torch.distributed": "distributed", "mpi4py": "distributed", "deepspeed": "distributed", "triton": "scoring"}

# Libraries that a module does without.
WITHOUT = {"layout.rects": {"torch", "numpy"}, "report.summary": {"torch", "scipy"}, "report.write": {"torch", "scipy"}}

MOST_AT_THE_ROOT = 15
NAMES_THAT_SAY_NOTHING = {"utils", "helpers", "misc", "common"}


@functools.cache
def imported(source: str, module: str = "module") -> frozenset[str]:
    """Absolute dotted names of all that a module imports, or reaches as an attribute of what it imports."""
    return frozenset(_imported(source, module))


def _imported(source: str, module: str) -> Iterator[str]:
    inside = [PACKAGE.name, *module.split(".")]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                base = ".".join([*(inside[:-level] if level else []), *([name] if name else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name("import_module") | ast.Attribute(attr="import_module")):
                yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))
            case ast.Attribute():
                yield ast.unparse(node)


def own(source: str, module: str = "module") -> dict[str, set[str]]:
    """Modules of the package that a module imports, each with the names that are taken from it."""
    found: dict[str, set[str]] = {}
    for name in imported(source, module):
        parts = name.split(".")
        if parts[0] != PACKAGE.name or len(parts) == 1:
            continue
        place = next(
            (".".join(parts[1:end]) for end in range(len(parts), 1, -1) if ".".join(parts[1:end]) in MODULES), FACE
        )
        rest = parts[1 + len(place.split(".")) :] if place != FACE else parts[1:]
        found.setdefault(place, set()).update(rest[:1])
    return found


def uses(source: str, library: str) -> bool:
    """Whether a module imports a library or a part of it."""
    return any(f"{name}.".startswith(f"{library}.") for name in imported(source))


def defined(source: str) -> set[str]:
    """What a module makes itself, at its top."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def room(module: str) -> str:
    return module.partition(".")[0]


FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names} | dict.fromkeys(BELOW_ALL, len(ORDER))
OWN = {module: own(source, module) for module, source in MODULES.items()}
GRAPH = {module: set(found) for module, found in OWN.items()}


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports that do not lead downward, or to a module of the same room."""
    return [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if module != FACE
        and room(module) != room(other)
        and not FLOOR[room(module)] < FLOOR.get(room(other), -1)
        and not {room(module), room(other)} <= BELOW_ALL
    ]


def test_rooms_know_only_what_lies_below_them() -> None:
    assert upward(GRAPH) == []


def test_an_arrow_upward_is_found() -> None:
    wrong = {
        "layout.heads": {"capture.hooks"},
        "scoring.score": {"results.heatmap"},
        "errors": {"job"},
        "data.tasks": {"layout.rects"},
    }
    assert upward(wrong) == [f"{module} -> {other}" for module, (other,) in wrong.items()]
    assert upward({"results.gather": {"scoring.score", "results.partials", "errors"}, "values": {"errors"}}) == []


def test_every_room_has_its_floor_and_the_root_is_small() -> None:
    assert {room(module) for module in MODULES} - {FACE} == FLOOR.keys()
    assert len([module for module in MODULES if "." not in module]) <= MOST_AT_THE_ROOT


def test_no_imports_form_a_circle() -> None:
    TopologicalSorter(GRAPH).prepare()  # a CycleError names the circle
    with pytest.raises(CycleError):
        TopologicalSorter(GRAPH | {"errors": {"job"}}).prepare()


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_alone(library: str) -> None:
    assert {room(module) for module, source in MODULES.items() if uses(source, library)} <= {HOMES[library]}


def test_a_name_is_imported_from_where_it_is_defined() -> None:
    made = {module: defined(source) for module, source in MODULES.items()}
    elsewhere = [
        f"{module}: {name} of {other}"
        for module, found in OWN.items()
        for other, names in found.items()
        for name in names
        if name not in made[other] and not any(f"{other}.{name}" == known for known in MODULES)
    ]
    assert elsewhere == []


@pytest.mark.parametrize("module", [module for module in MODULES if module.endswith(".__init__")])
def test_a_room_says_what_it_is_and_hands_on_nothing(module: str) -> None:
    (only,) = ast.parse(MODULES[module]).body
    assert isinstance(only, ast.Expr)


@pytest.mark.parametrize("module", WITHOUT)
def test_a_module_does_without_libraries(module: str) -> None:
    assert not {library for library in WITHOUT[module] if uses(MODULES[module], library)}


def test_every_module_is_named_after_its_idea() -> None:
    assert not NAMES_THAT_SAY_NOTHING & {module.rpartition(".")[2] for module in MODULES}


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
    ("source", "found"),
    [
        ("from .tiles import Tile", {"scoring.tiles": {"Tile"}}),
        ("from . import tiles", {"scoring.tiles": set()}),
        ("import qkov_dist.scoring.tiles", {"scoring.tiles": set()}),
        ("from qkov_dist.scoring.tiles import Tile", {"scoring.tiles": {"Tile"}}),
        ("from qkov_dist.scoring import tiles", {"scoring.tiles": set()}),
        ("from qkov_dist import QkovError", {"__init__": {"QkovError"}}),
        ("if TYPE_CHECKING:\n    from ..errors import QkovError", {"errors": {"QkovError"}}),
    ],
)
def test_every_way_of_importing_a_module_is_seen(source: str, found: dict[str, set[str]]) -> None:
    assert own(source, "scoring.kernel") == found
    assert own("import json\nfrom planning import plan") == {}
