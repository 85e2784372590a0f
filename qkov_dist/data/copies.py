"""Samples that occur more than once: the same tokens and labels, within a task or in both, whatever their id and text.

A sample and its copy have one gradient. Their pair is a self-pair: it says nothing about two tasks, and where files
share many samples it makes heads look contested that are not. Such pairs are left out of means and tests wherever they
are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from qkov_dist.errors import QkovError

MOST = 0.1  # of a task that may occur in the other one too


Mask = npt.NDArray[np.bool_]


def different(left: Sequence[str], right: Sequence[str]) -> Mask:
    """Which pairs are of different contents, [left, right]; an unknown content ("") differs from every other."""
    one, other = (np.array(contents, dtype=str).reshape(-1) for contents in (left, right))
    is_other: Mask = (one[:, None] != other[None]) | (one[:, None] == "")
    return is_other


def different_pairs(contents: Sequence[str]) -> Mask:
    """The same among all pooled samples, where each is also one with itself, [N, N]."""
    pairs = different(contents, contents)
    np.fill_diagonal(pairs, val=False)
    return pairs


def in_one_task(contents: Sequence[Sequence[str]]) -> Mask:
    """Which of the samples of all tasks only one task has, [N]; an unknown content ("") is nobody else's."""
    tasks_with = Counter(content for of_task in contents for content in {*of_task} - {""})
    return np.array([tasks_with[content] < 2 for of_task in contents for content in of_task], bool)


def look_for_copies(
    tasks: Sequence[str],
    contents: Sequence[Sequence[str]],
    ids: Sequence[Sequence[str]],
    *,
    allowed: bool,
    name: str = "statistics.allow_shared_samples",
) -> list[str]:
    """What a reader must know of samples that occur more than once, a sentence each.

    Args:
        tasks: Names of the tasks.
        contents: Their samples' contents.
        ids: Their samples' ids.
        allowed: Whether tasks may share more than a tenth of their samples.
        name: The setting that allows it.

    Raises:
        QkovError: where they do, and it is not allowed.
    """
    found = []
    for both in combinations(range(len(tasks)), 2):
        names, of_two = [tasks[task] for task in both], [contents[task] for task in both]
        shared = _shared(of_two)
        if not allowed:
            _refuse_many(names, of_two, shared, name)
        found += _shared_warning(names, of_two, [ids[task] for task in both], shared)
    return [*found, *_repeated_warnings(tasks, contents, ids)]


def _shared(contents: Sequence[Sequence[str]]) -> list[list[int]]:
    """Of each of two tasks, the samples that the other has too."""
    first, second = contents
    return [
        [n for n, content in enumerate(part) if content in known]
        for part, known in ((first, {*second} - {""}), (second, {*first} - {""}))
    ]


def _refuse_many(
    tasks: Sequence[str], contents: Sequence[Sequence[str]], shared: Sequence[list[int]], name: str
) -> None:
    for task, part, of_task, other in zip(tasks, shared, contents, reversed(tasks), strict=True):
        if len(part) > MOST * len(of_task):
            raise QkovError(
                f"task {task!r}",
                expected=f"at most a tenth of its samples also in task {other!r} (the same tokens and labels)",
                got=f"{len(part)} of {len(of_task)}",
                remedy=f"Give each task samples of its own, or allow it by name: {name}=true leaves out the pairs of "
                "a sample with its copy; tests then rest on fewer samples than there seem to be.",
            )


def _shared_warning(
    tasks: Sequence[str], contents: Sequence[Sequence[str]], ids: Sequence[Sequence[str]], shared: Sequence[list[int]]
) -> list[str]:
    if not shared[0]:
        return []
    first = shared[0][0]
    copy = contents[1].index(contents[0][first])
    return [
        f"tasks share samples: {len(shared[0])} of {len(contents[0])} of {tasks[0]!r} and {len(shared[1])} of "
        f"{len(contents[1])} of {tasks[1]!r} have the same tokens and labels (first: {ids[0][first]!r} is "
        f"{ids[1][copy]!r}). Pairs of a sample with its copy are left out; p-values take all samples for independent."
    ]


def _repeated_warnings(
    tasks: Sequence[str], contents: Sequence[Sequence[str]], ids: Sequence[Sequence[str]]
) -> list[str]:
    found = []
    for task, of_task, names in zip(tasks, contents, ids, strict=True):
        known: dict[str, int] = {}
        copies = [(known.setdefault(content, n), n) for n, content in enumerate(of_task) if content]
        if repeated := [(one, other) for one, other in copies if one != other]:
            one, other = repeated[0]
            found.append(
                f"task {task!r} holds {len(repeated)} samples more than once (first: {names[other]!r} is "
                f"{names[one]!r}). Pairs of a sample with its copy are left out; p-values take all samples for "
                "independent: remove the copies."
            )
    return found
