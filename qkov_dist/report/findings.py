"""What a significant head shows: on which side of its null it lies, and what that says about the two tasks.

    statistic             above its null                      below its null
    overlap               contested                           apart
    cross_mean, signed    synergy (milder: mean below 0)      conflict (weaker: mean not below 0)
    cross_mean            higher                              lower

The side is the sign of the effect size: the observed statistic against the mean of its null, which is what was tested.
It is not the sign of the statistic: the null of ``overlap`` lies above 0, so that a head may be apart and above 0.
Page, tables, figures and terminal all take words and marks from here; which side was looked for at all is
``sidedness``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from qkov_dist.results.block_view import Floats, Ints
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.scoring.score_kinds import may_be_negative

Side = Literal["above", "below"]
SIDEDNESS = {"two-sided": "two-sided", "greater": "one-sided above", "less": "one-sided below"}


@dataclass(frozen=True)
class Finding:
    """One thing that a significant head can show.

    Args:
        name: The word for it.
        side: Of the null on which the statistic lies; None where the file does not say.
        mark: The name of its shape in drawings.
        glyph: The same as a character.
        meaning: What it says, as a clause.
        mean_is_low: Whether the mean score is below 0; None where that does not matter.
        is_rare: Not worth a line where no head shows it.
    """

    name: str
    side: Side | None
    mark: str
    glyph: str
    meaning: str
    mean_is_low: bool | None = None
    is_rare: bool = False


_NO_SIDE = Finding("unlike", None, "dot", "●", "the file does not say on which side of its null", is_rare=True)
_OVERLAP = (
    Finding("contested", "above", "square", "■", "the tasks use the same weights more than random halves of the pool"),
    Finding("apart", "below", "diamond", "◆", "they do so less than random halves of the pool; overlap may be above 0"),
)
_SIGNED = (
    Finding("synergy", "above", "up", "▲", "gradients of the two tasks agree, more than under exchanged labels", False),
    Finding("conflict", "below", "down", "▼", "gradients of the two tasks point against each other", True),
    Finding("weaker", "below", "square", "■", "they agree, but less than under exchanged labels", False),
    Finding(
        "milder", "above", "diamond", "◆", "they conflict, but less than under exchanged labels", True, is_rare=True
    ),
)
_MEAN = (
    Finding("higher", "above", "up", "▲", "a larger mean score than under exchanged labels, be it by scale alone"),
    Finding("lower", "below", "down", "▼", "a smaller mean score than under exchanged labels, be it by scale alone"),
)


def findings(heatmap: Heatmap) -> tuple[Finding, ...]:
    """What this heatmap's significant heads can show; empty before a test."""
    if not heatmap.tests:
        return ()
    if heatmap.deciding == "overlap":
        return (*_OVERLAP, _NO_SIDE)
    return (*(_SIGNED if may_be_negative(heatmap.attributes.get("score")) else _MEAN), _NO_SIDE)


def sides(tests: Mapping[str, Floats]) -> npt.NDArray[np.int8]:
    """1 above the null, -1 below it, 0 where nothing says so: [layer, native head] of one statistic of one block."""
    effect = tests.get("effect_size", np.full(np.shape(tests["statistic"]), np.nan))
    side: npt.NDArray[np.int8] = np.sign(np.nan_to_num(effect)).astype(np.int8)
    return side


_FOUND: WeakKeyDictionary[Heatmap, dict[str, Ints]] = WeakKeyDictionary()  # a heatmap does not change


def found(heatmap: Heatmap, block: str) -> Ints:
    """What each head shows: 1 + its place in ``findings``, 0 where it is not significant; [layer, native head].

    It is worked out once for a heatmap: page, tables, figures and terminal ask for it again and again.
    """
    known = _FOUND.setdefault(heatmap, {})
    if block not in known:
        known[block] = _found(heatmap, block)
        known[block].setflags(write=False)
    return known[block]


def _found(heatmap: Heatmap, block: str) -> Ints:
    tests, mean = heatmap.tests[block], heatmap.mean[block]
    side = sides(tests)
    codes = np.zeros(mean.shape, np.int64)
    for code, finding in enumerate(findings(heatmap), 1):
        is_it = side == {"above": 1, "below": -1, None: 0}[finding.side]
        if finding.mean_is_low is not None:
            is_it &= (mean < 0) == finding.mean_is_low
        codes[is_it & (tests["q_value"] <= heatmap.fdr_alpha)] = code
    return codes


def is_family_wise(heatmap: Heatmap, block: str) -> npt.NDArray[np.bool_]:
    """Which significant heads also hold over all heads of all blocks, [layer, native head]."""
    p_max = heatmap.tests[block].get("p_max", np.full(heatmap.mean[block].shape, np.nan))
    held: npt.NDArray[np.bool_] = (p_max <= heatmap.fdr_alpha) & (found(heatmap, block) > 0)
    return held


def name_of(heatmap: Heatmap, code: int) -> str | None:
    """The word for a number of ``found``; None for 0."""
    return findings(heatmap)[code - 1].name if code else None


def counts(heatmap: Heatmap) -> dict[Finding, int]:
    """How many heads of all blocks show each finding; empty before a test, and without rare ones that none shows."""
    if not heatmap.tests:
        return {}
    numbers = tally(heatmap, np.concatenate([found(heatmap, block).ravel() for block in heatmap.blocks]))
    return {finding: number for finding, number in numbers.items() if number or not finding.is_rare}


def tally(heatmap: Heatmap, codes: Ints) -> dict[Finding, int]:
    """How often each finding is among numbers of ``found``."""
    known = findings(heatmap)
    numbers = np.bincount(codes.ravel(), minlength=1 + len(known))[1:].tolist()
    return dict(zip(known, numbers, strict=True))


def sidedness(heatmap: Heatmap) -> str | None:
    """In words, which deviations from the null were looked for; None where the file does not say."""
    alternative = _settings(heatmap).get("alternative")
    return None if alternative is None else SIDEDNESS.get(str(alternative), str(alternative))


def significance(heatmap: Heatmap) -> str:
    """How many heads are significant, what they show, and by which test: one line."""
    if not heatmap.tests:
        return "not tested"
    present = sum(int(mask.sum()) for mask in heatmap.present.values())
    numbers = counts(heatmap)
    total = sum(numbers.values())
    parts = ", ".join(f"{number:,} {finding.name}" for finding, number in numbers.items())
    tested = ", ".join(filter(None, (heatmap.deciding, sidedness(heatmap), f"q <= {heatmap.fdr_alpha:g}")))
    return f"{total:,} of {present:,} heads{f': {parts}' if total else ''} ({tested})"


def about_intervals(heatmap: Heatmap) -> str:
    """Why a value may lie outside its interval, and beside what p stands; "" where overlap has no interval."""
    if not any("ci_low" in arrays for arrays in (heatmap.statistics or {}).get("overlap", {}).values()):
        return ""
    return (
        "Intervals say how far other samples would move a value; overlap's is freed of what samples of unequal "
        "gradient norms do to it, which the value is not, and need not hold the value. p and q come from exchanged "
        "labels, not from intervals: a small p may stand beside an interval that holds 0."
    )


def how_tested(heatmap: Heatmap) -> Iterator[str]:
    """Sentences on the test: statistic and sides, labellings and seed, corrections, exchangeability, a caveat."""
    settings = _settings(heatmap)
    sided = sidedness(heatmap)
    yield f"By {heatmap.deciding}{f', {sided}' if sided else ''}: its value against those under exchanged task labels."
    if "n_labellings" in settings:
        yield _labellings(settings)
    yield "q: Benjamini-Hochberg over the native heads of one block; family-wise p: over all heads of all blocks."
    if "exactly_exchangeable" in settings:
        yield _exchangeability(heatmap, exactly=settings["exactly_exchangeable"])
    yield from _beside_zero(heatmap)
    if heatmap.deciding == "overlap" and settings.get("alternative") in ("two-sided", "less"):
        yield "Gradients of unequal scale raise the null of overlap and can, alone, put a head below it."


def _beside_zero(heatmap: Heatmap) -> Iterator[str]:
    """That the null, not 0, is what heads are compared with; how many lie on one side of it and on the other of 0."""
    if heatmap.deciding != "overlap":
        return
    below = above = 0
    for block in heatmap.blocks:
        tests = heatmap.tests[block]
        is_below = (found(heatmap, block) > 0) & (sides(tests) < 0)
        below += int(is_below.sum())
        above += int((is_below & (tests["statistic"] > 0)).sum())
    yield (
        "Compared with its null, not with 0: self-pairs being left out, the null lies above 0, the more so the more "
        f"samples' norms vary. Of {below:,} significant heads below their null {above:,} have an overlap above 0."
    )


def null_of(tests: Mapping[str, Floats], layer: int, head: int) -> tuple[float, float, float] | None:
    """A head's null, as stored: its mean, and both ends of its band; None where the file does not say."""
    if "null_mean" not in tests:
        return None
    mean, low, high = (float(tests[key][layer, head]) for key in ("null_mean", "null_low", "null_high"))
    return None if np.isnan(mean) else (mean, low, high)


def _exchangeability(heatmap: Heatmap, *, exactly: bool) -> str:
    if exactly:
        return "Labels are exactly exchangeable under this Fisher."
    if heatmap.attributes.get("scope", "pooled") == "pooled":
        return "Labels are nearly, not exactly, exchangeable: the Fisher weights samples by their place or task."
    return "Labels are not exchangeable: the Fisher is that of one task."


def _labellings(settings: Mapping[str, Any]) -> str:
    number = int(settings["n_labellings"])
    samples = f" of {settings['n_a']} + {settings['n_b']} samples" if {"n_a", "n_b"} <= settings.keys() else ""
    if settings.get("method") == "exhaustive":
        drawn = f"All {number:,} labellings{samples}"
    else:
        seed = f" (seed {settings['seed']})" if "seed" in settings else ""
        drawn = f"{number - 1:,} random labellings{samples}{seed} and the observed one"
    return f"{drawn}, the same for all heads; no p can be below {1 / number:.2g}."


def _settings(heatmap: Heatmap) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = (heatmap.statistics or {}).get("settings", {})
    return settings
