"""Where the pages of pairs lie beside the page of all tasks: ``pairs/math__code.html``, safe on any file system.

A task's name becomes ASCII letters, digits, dots, hyphens and single underscores, at most 40 of them. Where that is not
the name itself, or is another task's too, or ends like a place, the task's place is behind it: no two names meet.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import combinations
from urllib.parse import quote

FOLDER = "pairs"
_LONGEST = 40
_PLACE = re.compile(r"-\d+$")


def pair_files(tasks: Sequence[str]) -> dict[tuple[str, str], str]:
    """Pair, in the order of the tasks -> the path of its page relative to the folder of the run, with slashes."""
    names = _safe_names(tasks)
    return {
        (a, b): f"{FOLDER}/{names[first]}__{names[second]}.html"
        for (first, a), (second, b) in combinations(enumerate(tasks), 2)
    }


def link_back(page: str, pair: tuple[str, str]) -> str:
    """From a pair's page to its cell on the page of all tasks."""
    return f"../{page}#{'.'.join(quote(task, safe='') for task in pair)}"


def _safe_names(tasks: Sequence[str]) -> list[str]:
    plain = [_plain(task) for task in tasks]
    folded = [name.casefold() for name in plain]
    return [
        name
        if name == task and folded.count(name.casefold()) == 1 and not _PLACE.search(name)
        else f"{name}-{place + 1}"
        for place, (name, task) in enumerate(zip(plain, tasks, strict=True))
    ]


def _plain(task: str) -> str:
    decomposed = unicodedata.normalize("NFKD", task).encode("ascii", "ignore").decode()
    return re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9.-]+", "_", decomposed))[:_LONGEST].strip("_.-") or "task"
