"""The report of a finished run: ``report.html``, and with ``qkov report`` figures and tables for papers.

    DIR/report.html                             the page: self-contained, offline
    DIR/report/{heads,blocks,layers,conflicts}.{csv,md}, and shared.{csv,md} where O's bias was scored
    DIR/report/{heatmaps,blocks,layers}.{pdf,png}   with matplotlib; {changes,waterfall} where effects are known

It shows what ``heatmap.h5`` holds and computes nothing else. A page of another run is refused, never overwritten.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from qkov_dist.errors import QkovError
from qkov_dist.results.disk import file_errors
from qkov_dist.results.hdf5_write import remove_leftovers
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import HEATMAP_FILE, heatmap_path, load_heatmap

from .figures import figures
from .page import make_page, run_marker
from .tables import all_tables

PAGE_FILE, FOLDER = "report.html", "report"


def write_page(heatmap: Heatmap, folder: str | Path) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    Raises:
        QkovError: where ``folder`` holds a page of another run, or cannot be written.
    """
    path = Path(folder) / PAGE_FILE
    refuse_other_page(path, heatmap.run_id)
    _replace(path, make_page(heatmap).encode("utf-8", "backslashreplace"))
    return path


def write_report(place: str | Path, say: Callable[[str], None]) -> Path:
    """Write page, tables and figures of a run beside its heatmap; returns the page's path.

    Args:
        place: The heatmap's file, or the folder where ``heatmap.h5`` lies.
        say: Takes a line about each part.

    Raises:
        QkovError: without a readable ``heatmap.h5``, for a page of another run, and where writing fails.
    """
    path = heatmap_path(place)
    if not path.exists():
        remedy = "Name the output folder of a finished `qkov run`, or its heatmap."
        raise QkovError(str(place), expected=f"a folder with {HEATMAP_FILE}, or a heatmap", got="none", remedy=remedy)
    heatmap, folder = load_heatmap(path), path.parent
    page = write_page(heatmap, folder)
    for table in all_tables(heatmap):
        _replace(folder / FOLDER / f"{table.name}.csv", table.to_csv().encode())
        _replace(folder / FOLDER / f"{table.name}.md", table.to_markdown().encode())
    say(f"tables: {folder / FOLDER}/*.csv, *.md")
    try:
        for name, content in figures(heatmap):
            _replace(folder / FOLDER / name, content)
        say(f"figures: {folder / FOLDER}/*.pdf, *.png")
    except ModuleNotFoundError as error:
        say(f"no figures: {error.name} is not installed. Run: pip install 'qkov-dist[report]'")
    return page


def refuse_other_page(path: Path, run_id: str) -> None:
    """Refuse a file that is there and is no page of this run."""
    with file_errors(path, OSError):
        found = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    if found is not None and run_marker(run_id) not in found:
        remedy = "Nothing was overwritten. Move it away, then run `qkov report` again."
        raise QkovError(str(path), expected=f"a report of run {run_id!r}", got="another file", remedy=remedy)


def _replace(path: Path, content: bytes) -> None:
    """Have a file appear whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with file_errors(path, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
