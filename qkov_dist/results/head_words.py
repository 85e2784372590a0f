"""What is said of heads: how many are in conflict and in synergy, which these are, and which carry the harm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .verdict_facts import BY, Facts

MOST_NAMED, MOST_ESTIMATES = 5, 3  # heads named in a sentence


def sentence_on_heads(facts: Facts, carriers: Sequence[str]) -> str:
    """How many heads show what, and their names: no head is named for a harm that may be 0 without saying so."""
    conflict, synergy = facts.significant(1), facts.significant(-1)
    level, spelled = f"q <= {facts.level:g}", _Spelling()
    if conflict or synergy:
        counted = (
            f"{len(conflict):,} {'is' if len(conflict) == 1 else 'are'} in conflict and {len(synergy):,} in synergy"
        )
        found = f"Of {len(facts.names):,} heads {counted} ({level})."
    else:
        found = f"None of {len(facts.names):,} heads is significantly in conflict or in synergy ({level})."
    kinds = {"conflict": conflict, "synergy": synergy}
    parts = [found, *(f"In {kind}: {spelled.listed(names)}." for kind, names in kinds.items() if names)]
    if carriers:
        whose = "one head" if len(carriers) == 1 else f"{len(carriers):,} heads"
        parts.append(f"Half of the estimated harm, significant or not, is in {whose}: {spelled.listed(carriers)}.")
    elif largest := _largest(facts):
        parts.append(
            f"No single head's harm can be told from 0 with {facts.samples} samples; largest estimates: "
            f"{spelled.listed(largest)}."
        )
    else:
        parts.append("No head's change is above 0.")
    return " ".join(parts)


class _Spelling:
    """Names of heads in a sentence; the first is spelled out."""

    def __init__(self) -> None:
        self._is_first = True

    def listed(self, names: Sequence[str]) -> str:
        """The first few of some names, and how many more there are."""
        shown = [*names[:MOST_NAMED]]
        if self._is_first:
            block, _, place = shown[0].partition(" ")
            layer, _, head = place.partition(".")
            kind = "kv head" if block in ("K", "V") else "head"
            shown[0] += f" (block {block}, layer {layer}, {kind} {head})"
            self._is_first = False
        more = len(names) - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _by_harm(facts: Facts) -> tuple[list[str], list[float]]:
    """Heads whose change is above 0, most harmful first, and these changes."""
    order = np.argsort(-facts.changes[BY], kind="stable")
    chosen = [place for place in order if facts.changes[BY][place] > 0]
    return [facts.names[place] for place in chosen], [float(facts.changes[BY][place]) for place in chosen]


def carriers_of(facts: Facts) -> tuple[str, ...]:
    """The fewest heads whose changes above 0 make half of the sum of such changes."""
    names, harms = _by_harm(facts)
    reached = np.cumsum(harms)
    return tuple(names[: int(np.searchsorted(reached, reached[-1] / 2)) + 1])


def _largest(facts: Facts) -> list[str]:
    return _by_harm(facts)[0][:MOST_ESTIMATES]
