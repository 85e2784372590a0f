"""The answer in words: what a step on one task does to the other, how sure that is, which heads, and what to do next.

Words alone: the numbers come as ``Facts`` (``Heatmap.verdict`` gathers them). Page, terminal and notebooks show the
same sentences. A *unit step* is one with learning rate times number of steps = 1; the first order grows with the step,
the second with its square.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .effects import Total
from .influences import Floats

Direction = Literal["harm", "help", "unknown"]
USUAL_STEP = 3e-3  # learning rate x number of steps: 300 steps at 1e-5
MOST_NAMED = 5  # heads named in a sentence
BY, BESIDE = "adam", "sgd"
CHANGE = f"change_{BY}"
WORDS = (
    "In conflict: a step in that head alone raises the other task's loss; in synergy: it lowers it. A unit step is one "
    "with learning rate x number of steps = 1; at a thousandth of it the first order is a thousandth."
)
RANK = "For your own step (learning rate x number of steps) rank heads"
_DETECTION = 2.8  # standard errors that a change found in 80% of samplings has, at a level of 5%
_TOO_MANY = 100  # times the samples, beyond which more of them are no advice


@dataclass(frozen=True)
class Facts:
    """What the words are made of; arrays are over all present heads of all blocks.

    Attributes:
        tasks: Names of A and B.
        num_samples: Of A and of B, those that effects are of.
        level: At or below which q a head is significant.
        totals: Optimizer -> what all heads add up to.
        names: Of heads, as ``Q 14.2``: block, layer, head.
        changes: Optimizer -> change by head.
        q_values: Optimizer -> q of the change by head.
        folder: Where the run lies, as commands name it.
    """

    tasks: tuple[str, str]
    num_samples: tuple[int, int]
    level: float
    totals: Mapping[str, Total]
    names: Sequence[str]
    changes: Mapping[str, Floats]
    q_values: Mapping[str, Floats]
    folder: str

    def number(self, sign: int) -> int:
        """How many heads are in conflict (1) or in synergy (-1)."""
        return int(((np.sign(self.changes[BY]) == sign) & (self.q_values[BY] <= self.level)).sum())


@dataclass(frozen=True)
class Action:
    """What to do next, and the command or line of Python that does it ("" where none is needed)."""

    why: str
    command: str


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        direction: What a step on B does to A's loss, where the total's interval says so.
        sentences: The answer in two sentences: the whole of attention, and its heads.
        details: What words mean, which order decides, the other direction, the other optimizer.
        carriers: The fewest heads that make half of the harm, as ``Q 14.2``, most harmful first.
        actions: What to do next.
    """

    direction: Direction
    sentences: tuple[str, str]
    details: tuple[str, ...]
    carriers: tuple[str, ...]
    actions: tuple[Action, ...]


def verdict_of(facts: Facts) -> Verdict:
    """All of it."""
    carriers = _carriers(facts)
    return Verdict(
        direction_of(facts.totals[BY]),
        (_whole(facts), _heads(facts, carriers)),
        (WORDS, _order(facts), _other_way(facts), _other_optimizer(facts)),
        carriers,
        tuple(_actions(facts)),
    )


def direction_of(total: Total) -> Direction:
    """Harm or help where the interval of the total does not contain 0."""
    low, high = total.interval
    return "harm" if low > 0 else "help" if high < 0 else "unknown"


def overtakes(total: Total, harmed: str) -> float:
    """The step from which on the second order is the larger one, NaN where there is none."""
    curvature = total.curvature[harmed]
    return abs(total.change) / curvature if curvature > 0 else math.nan


def example_step(total: Total) -> float:
    """A step to begin with where a user's own is not known: a usual one, or that at which the second order decides."""
    found = [overtakes(total, task) for task in total.curvature]
    return min([USUAL_STEP, *(float(f"{step:.1g}") for step in found if step > 0)])


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def _whole(facts: Facts) -> str:
    a, b = facts.tasks
    total = facts.totals[BY]
    change, interval = number(total.change), "[{}, {}]".format(*map(number, total.interval))
    match direction_of(total):
        case "unknown" if math.isnan(total.standard_error):
            return (
                f"A step on {b} is estimated to change {a}'s loss by {change} for a unit step of {BY}; how sure that "
                "is cannot be said, since a task has fewer than two samples of its own."
            )
        case "unknown":
            samples = " + ".join(map(str, facts.num_samples))
            return (
                f"Whether a step on {b} raises or lowers {a}'s loss is not known from {samples} samples: the change by "
                f"a unit step of {BY} is {change}, and its 95% interval {interval} contains 0."
            )
        case direction:
            verb = "raises" if direction == "harm" else "lowers"
            ends = sorted(map(abs, total.interval))
            return (
                f"A step on {b} {verb} {a}'s loss: by {number(abs(total.change))} (95% interval {number(ends[0])} to "
                f"{number(ends[1])}) for a unit step of {BY} on all of attention, to first order"
                f"{_relation(total, a, b, 'b')}."
            )


def _relation(total: Total, harmed: str, stepped: str, key: str) -> str:
    """The change in relation to what the stepped task itself gains; nothing where it gains nothing."""
    gain = -total.own[key]
    if not gain > 0:
        return ""
    moves = "rises" if total.change > 0 else "falls"
    return f"; for every 1.00 that {stepped}'s loss falls, {harmed}'s {moves} by {abs(total.change) / gain:.2g}"


def _heads(facts: Facts, carriers: Sequence[str]) -> str:
    conflict, synergy, level = facts.number(1), facts.number(-1), f"q <= {facts.level:g}"
    if conflict or synergy:
        found = f"Of {len(facts.names):,} heads {conflict:,} {_are(conflict)} in conflict and {synergy:,} in synergy"
    else:
        found = f"None of {len(facts.names):,} heads is significantly in conflict or in synergy"
    if not carriers:
        return f"{found} ({level}); no head's change is above 0."
    shown = ", ".join(carriers[:MOST_NAMED])
    more = f" and {len(carriers) - MOST_NAMED:,} more" if len(carriers) > MOST_NAMED else ""
    whose = "one head" if len(carriers) == 1 else f"{len(carriers):,} heads"
    return f"{found} ({level}); half of the estimated harm is in {whose}: {shown}{more}."


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _carriers(facts: Facts) -> tuple[str, ...]:
    """The fewest heads whose changes above 0 make half of the sum of such changes."""
    harmful = np.where(facts.changes[BY] > 0, facts.changes[BY], 0.0)
    order = np.argsort(-harmful, kind="stable")
    reached = np.cumsum(harmful[order])
    if not len(reached) or reached[-1] == 0:
        return ()
    return tuple(facts.names[place] for place in order[: int(np.searchsorted(reached, reached[-1] / 2)) + 1])


def _order(facts: Facts) -> str:
    a, b = facts.tasks
    step = overtakes(facts.totals[BY], "a")
    if math.isnan(step):
        return f"The second order of a step on {b} is 0 for {a}: the first order decides."
    size = f"{number(step)} (learning rate x number of steps)"
    if direction_of(facts.totals[BY]) == "unknown":
        return (
            f"From a step of {size} on, the second order, which always raises {a}'s loss, outweighs the first order's "
            "estimate."
        )
    if facts.totals[BY].change < 0:
        return (
            f"From a step of {size} on, the second order outweighs what the first order gains: a larger step on {b} "
            f"raises {a}'s loss."
        )
    return f"From a step of {size} on, the second order decides: {a}'s loss then rises with the square of the step."


def _other_way(facts: Facts) -> str:
    a, b = facts.tasks
    total = facts.totals[BY]
    step = overtakes(total, "b")
    until = "" if math.isnan(step) else f"; there the second order decides from a step of {number(step)} on"
    relation = _relation(total, b, a, "a") if direction_of(total) != "unknown" else ""
    return f"The other way round, a step on {a} changes {b}'s loss by the same amount to first order{relation}{until}."


def _other_optimizer(facts: Facts) -> str:
    total = facts.totals[BESIDE]
    interval = "[{}, {}]".format(*map(number, total.interval))
    verdicts = [direction_of(facts.totals[optimizer]) for optimizer in (BESIDE, BY)]
    if verdicts[0] == "unknown":
        said = "direction not known"
    elif verdicts[1] == "unknown":
        said = "it harms" if verdicts[0] == "harm" else "it helps"
    else:
        said = f"{'the same' if verdicts[0] == verdicts[1] else 'the opposite'} direction"
    unlike = int((np.sign(facts.changes[BESIDE]) * np.sign(facts.changes[BY]) < 0).sum())
    return (
        f"By {BESIDE} the change is {number(total.change)} {interval}: {said}; {unlike:,} of {len(facts.names):,} "
        f"heads have another sign than by {BY}."
    )


def _actions(facts: Facts) -> Iterator[Action]:
    a, b = facts.tasks
    folder, conflict = shlex.quote(facts.folder), facts.number(1)
    step = overtakes(facts.totals[BY], "a")
    has_step = step > 0 and math.isfinite(step)
    match direction_of(facts.totals[BY]):
        case "unknown":
            yield from _more_samples(facts)
        case "help":
            until = f", up to a step of {number(step)}" if has_step else ""
            yield Action(f"Train on {b}: to first order it helps {a} as a whole{until}.", "")
    if conflict:
        which = "the head" if conflict == 1 else f"the {conflict:,} heads"
        yield Action(
            f"List {which} in conflict, with their rows and columns.",
            f"qkov heads {folder} --by {CHANGE} --significant",
        )
        select = f'load_heatmap({facts.folder!r}).select(by="{CHANGE}", significant=True)'
        yield Action(f"Leave them as they are while training on {b}.", f"with freeze_heads(model, {select}): ...")
    if has_step:
        where = f"Where your own step (learning rate x number of steps) comes near {number(step)}, rank them"
        yield Action(
            f"{where if conflict else RANK} by harm at that step: beyond {number(step)} the second order decides.",
            f"qkov heads {folder} --by harm --step {example_step(facts.totals[BY]):g}",
        )


def _more_samples(facts: Facts) -> Iterator[Action]:
    """How many samples would tell the direction: errors shrink with the root of their number."""
    total = facts.totals[BY]
    if math.isnan(total.standard_error) or total.change == 0:
        yield Action("Take more samples: two of each task at the very least, better sixteen.", "")
        return
    factor = (_DETECTION * total.standard_error / abs(total.change)) ** 2
    if factor > _TOO_MANY:
        yield Action(
            f"The change is so near 0 that its direction would take more than {_TOO_MANY} times the samples: take the "
            "tasks as neutral to each other, to first order.",
            "",
        )
        return
    wanted = _rounded_up(max(factor, 1.5) * max(facts.num_samples))
    keys = " ".join(f"tasks.{place}.max_samples={wanted}" for place in range(2))
    yield Action(
        f"Take more samples: if the change is as large as estimated, about {wanted:,} of each task tell its direction.",
        f"qkov run CONFIG.yaml {keys} output.dir={shlex.quote(f'{facts.folder}-{wanted}')}",
    )


def _rounded_up(number: float) -> int:
    """To two significant digits."""
    unit: int = 10 ** max(math.floor(math.log10(number)) - 1, 0)
    return math.ceil(number / unit) * unit
