"""What does not compute loads none of the libraries that take seconds. Asked of what is loaded, not of the time."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from heatmaps import make_heatmap, make_statistics

import qkov_dist
from qkov_dist.cli import COMMANDS
from qkov_dist.commands.version import STANDS_ON, version

HEAVY = ("torch", "transformers", "matplotlib", "pandas", "scipy", "accelerate", "datasets", "pyarrow", "jsonschema")
LIGHT = (
    [],
    ["--help"],
    ["--version"],
    *([command, "--help"] for command in COMMANDS),
    ["rnu"],
    ["run"],
    ["run", "--keys"],
    ["run", "--schema"],
    ["run", "run.yaml", "--layers", "0-3"],
    ["run", "run.yaml"],
    ["run", "run.yaml", "metric.scor=signed"],
    ["plan", "run.yaml"],
    ["check", "model", "--dtype", "float31"],
    ["stats", "nowhere"],
    ["report", "nowhere"],
    ["push", "nowhere", "me/heatmap"],
    ["heads", "nowhere"],
    ["compare", "nowhere", "nor here"],
    ["compare", "."],
    ["heads", ".", "--by", "overlap", "--format", "csv"],
)


def observed() -> dict[str, list[str]]:
    """In a process of its own and in its current folder: step -> heavy libraries loaded by then, and the exit code."""
    seen: dict[str, list[str]] = {}

    def note(step: str, more: object = "") -> None:
        seen[step] = [*(name for name in HEAVY if name in sys.modules), *([str(more)] if more != "" else [])]

    import qkov_dist

    dir(qkov_dist)
    note("import")
    from qkov_dist import load_heatmap

    note("from qkov_dist import load_heatmap")
    from qkov_dist.cli import main

    for arguments in LIGHT:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                code = main(arguments)
            except SystemExit as ended:
                code = ended.code
        note(" ".join(["qkov", *arguments]), code)
    heatmap = load_heatmap("heatmap.h5")
    view = heatmap["K"]
    assert view["scores"].shape[2:] == view["layer_head_avg"].shape
    assert view["top_conflicts"][0]["p_value"] <= 1
    repr(heatmap)
    note("read a heatmap")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(["report", "."])
    note("qkov report .", code)
    import scipy  # noqa: F401

    note("import scipy")
    return seen


@pytest.mark.long
def test_what_does_not_compute_loads_no_heavy_library(tmp_path: Path) -> None:
    made = make_heatmap()
    made.with_statistics(make_statistics()).save(tmp_path / "heatmap.h5")
    (tmp_path / "run.yaml").write_text("metrik: {}\nmodel: {path: m}\ntasks: [{name: a, path: a}, {name: b, path: b}]")
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    drawn, heavy = seen.pop("qkov report ."), seen.pop("import scipy")
    fine = {"qkov", "qkov --version", "qkov run --keys", "qkov run --schema", "qkov heads . --by overlap --format csv"}
    assert seen == {
        step: [] if not step.startswith("qkov") else ["0" if step in fine or step.endswith("--help") else "2"]
        for step in seen
    }
    assert len(seen) == len(LIGHT) + 3
    assert drawn == ["matplotlib", "0"]
    assert (tmp_path / "report.html").exists()
    assert heavy == ["matplotlib", "scipy"]  # what is loaded is seen


def face() -> dict[str, str]:
    """What the public face imports for type checkers: name -> module."""
    tree = ast.parse(Path(qkov_dist.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: str(node.module) for node in checked.body for alias in node.names}


def test_the_face_hands_on_what_type_checkers_see() -> None:
    assert face() == qkov_dist._HOMES
    assert sorted(face()) == sorted(qkov_dist.__all__)
    assert set(qkov_dist.__all__) <= set(dir(qkov_dist))
    for name, home in face().items():
        assert getattr(qkov_dist, name) is getattr(import_module(f"qkov_dist.{home}"), name)


def test_a_name_that_is_not_there_is_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'qkov_dist' has no attribute 'load_heatmp'"):
        qkov_dist.load_heatmp  # noqa: B018
    with pytest.raises(ImportError, match="load_heatmp"):
        from qkov_dist import load_heatmp  # noqa: F401


def test_versions_are_those_that_are_loaded() -> None:
    line = version()
    assert line.startswith("qkov-dist ")
    for name in STANDS_ON:
        public = import_module(name).__version__.partition("+")[0]  # without what a build adds, such as +cu130
        assert f"{name} {public}" in line


if __name__ == "__main__":
    print(json.dumps(observed()))
