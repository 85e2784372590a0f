"""A notebook executed as Jupyter would, in a process and a folder of its own; the exit code says whether a cell raised.

python notebooks.py NOTEBOOK.ipynb EXECUTED.ipynb
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATIENCE_S = 400  # for one cell

if __name__ == "__main__":
    given, executed = map(Path, sys.argv[1:])
    notebook = nbformat.read(given, as_version=4)
    try:
        NotebookClient(notebook, timeout=PATIENCE_S, resources={"metadata": {"path": str(executed.parent)}}).execute()
    finally:
        nbformat.write(notebook, executed)
