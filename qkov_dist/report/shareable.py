"""A finished run without what is not for everybody: the samples' texts, and the folders of paths.

Ids, lengths, losses and hashes of samples stay, for the numbers rest on them. This is what leaves the machine unless a
user says otherwise: to trackers, and to the hub.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_data import SampleTable
from qkov_dist.results.task_matrix import TaskMatrix

from .logged import Found
from .matrix_page import make_matrix_page
from .page import make_page
from .pair_files import link_back, pair_files
from .write import MOST_WITH_A_RUN, PAGE_FILE


def pages_of(run: Found, *, alone: bool = False) -> dict[str, bytes]:
    """File name -> page of a run; of more than two tasks also those of pairs, where they are few.

    Args:
        run: What was found.
        alone: Leave out pages of pairs.
    """
    if not isinstance(run, TaskMatrix):
        return {PAGE_FILE: _encoded(make_page(run))}
    pairs = {} if alone or len(run.pairs) > MOST_WITH_A_RUN else pair_files(run.tasks)
    pages = {PAGE_FILE: _encoded(make_matrix_page(run, pairs))}
    return pages | {
        file: _encoded(make_page(run.heatmap(*pair), link_back(PAGE_FILE, pair))) for pair, file in pairs.items()
    }


def _encoded(page: str) -> bytes:
    return page.encode("utf-8", "backslashreplace")


def without_texts(run: Found) -> Found:
    """A copy without the samples' texts, and with paths that name no folder of this machine."""
    attributes = _without(_folders(run.attributes.get("config")), run.attributes)
    if isinstance(run, TaskMatrix):
        return dataclasses.replace(
            run,
            samples=tuple(map(_without_text, run.samples)),
            attributes=attributes,
            whole=lambda pair: _of_two_without_texts(run.heatmap(*pair)),
        )
    return _of_two_without_texts(run)


def _of_two_without_texts(heatmap: Heatmap) -> Heatmap:
    return dataclasses.replace(
        heatmap,
        samples_a=_without_text(heatmap.samples_a),
        samples_b=_without_text(heatmap.samples_b),
        attributes=_without(_folders(heatmap.attributes.get("config")), heatmap.attributes),
    )


def _without_text(table: SampleTable) -> SampleTable:
    return dataclasses.replace(table, texts=("",) * len(table))


def _folders(config: Any) -> list[str]:
    """The folders of paths in a configuration that lie outside the current one, the longest first, each with its /."""
    if not isinstance(config, Mapping):
        return []
    sections = [config.get("model"), config.get("output"), *(config.get("tasks") or ())]
    given = [section.get(key) for section in sections if isinstance(section, Mapping) for key in ("path", "dir")]
    paths = [PurePath(text) for text in given if isinstance(text, str) and text.startswith(("/", "~", ".."))]
    return sorted({f"{path.parent}/" for path in paths if len(path.parts) > 2}, key=len, reverse=True)


def _without(folders: list[str], value: Any) -> Any:
    """A tree of JSON values in whose texts these folders are left out."""
    if isinstance(value, str):
        for folder in folders:
            value = value.replace(folder, "")
        return value
    if isinstance(value, Mapping):
        return {name: _without(folders, item) for name, item in value.items()}
    return [_without(folders, item) for item in value] if isinstance(value, list | tuple) else value
