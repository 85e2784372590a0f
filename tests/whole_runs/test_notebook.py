"""The notebook for newcomers runs from its first cell to its last, offline, and holds nothing of a machine."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from places import SUPPORT
from processes import ran

NOTEBOOK = Path(__file__).parents[2] / ".github" / "notebooks" / "first_heatmap.ipynb"


def executed(notebook: Path, folder: Path):
    """Exit code and words of the process, and the notebook as it was left."""
    out = folder / "executed.ipynb"
    own = {
        name: str(folder) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
    }
    done = ran(sys.executable, SUPPORT / "notebooks.py", notebook, out, HF_HUB_OFFLINE="1", **own)
    return done, nbformat.read(out, as_version=4)


@pytest.mark.long
@pytest.mark.real
def test_every_cell_runs_and_shows_the_answer_and_pictures(tmp_path: Path) -> None:
    done, notebook = executed(NOTEBOOK, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    assert any("training attention on words" in data.get("text/html", "").lower() for data in shown)
    assert sum("image/png" in data for data in shown) == 2


def test_a_cell_that_raises_fails(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 1", "x / 0", "y = 2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "wrong.ipynb")
    done, notebook = executed(tmp_path / "wrong.ipynb", tmp_path)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, None]


def test_it_is_stored_without_outputs_and_places_of_a_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []
    assert {cell.execution_count for cell in notebook.cells if cell.cell_type == "code"} == {None}
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not [place for place in ("/home/", "/root/", "/work/", "/tmp/", "C:\\") if place in text]
    assert {*notebook.metadata} == {"kernelspec", "language_info"}
