"""What to do next: from the answer to the command that goes on from it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from .verdict_facts import BY, CHANGE, Facts, direction_of, number

USUAL_STEP = 3e-3  # where no practical step is known: 300 steps at 1e-5
_DETECTION = 2.8  # standard errors that a change found in 80% of samplings has, at a level of 5%
_TOO_MANY = 100  # times the samples, beyond which more of them are no advice


@dataclass(frozen=True)
class Action:
    """What to do next, and the command or line of Python that does it ("" where none is needed)."""

    why: str
    command: str


def example_step(facts: Facts) -> float:
    """A step to rank heads at: the practical one on B, to two significant digits, or a usual one."""
    step = facts.practical_step()
    return USUAL_STEP if math.isnan(step) else float(f"{step:.2g}")


def second_decides(facts: Facts, step: float, harmed: str = "a") -> bool:
    """Whether, at a step, the second order is larger than the first."""
    total = facts.totals[BY]
    return step * total.curvature_along[harmed] > abs(total.change)


def actions(facts: Facts) -> Iterator[Action]:
    """All of it, most urgent first."""
    folder, conflict = shlex.quote(facts.folder), len(facts.significant(1))
    if facts.pair:
        folder += f" --pair {shlex.join(facts.pair)}"
    match direction_of(facts.totals[BY]):
        case "unknown":
            yield from _more_samples(facts)
        case "help":
            yield _train(facts)
    if conflict:
        which = "the head" if conflict == 1 else f"the {conflict:,} heads"
        yield Action(
            f"List {which} in conflict, with their rows and columns.",
            f"qkov heads {folder} --by {CHANGE} --significant",
        )
        source = repr(facts.folder) if facts.pair is None else f"{facts.folder!r}, {facts.pair!r}"
        select = f'load_heatmap({source}).select(by="{CHANGE}", significant=True)'
        yield Action(
            f"Leave {'it as it is' if conflict == 1 else 'them as they are'} while training on {facts.tasks[1]}.",
            f"with freeze_heads(model, {select}): ...",
        )
    kind = "an example" if math.isnan(facts.practical_step()) else "the practical step above"
    yield Action(
        f"Rank heads by harm at your own step (learning rate x number of steps; here {kind}).",
        f"qkov heads {folder} --by harm --step {example_step(facts):g}",
    )


def _train(facts: Facts) -> Action:
    """Training on B helps; how far is said up to the practical step and no further."""
    a, b = facts.tasks
    step = facts.practical_step()
    if math.isnan(step):
        limit = "how far is not known"
    elif second_decides(facts, step):
        limit = f"already at a step of {number(step)} the second order outweighs that, so take smaller ones"
    else:
        limit = f"this says nothing beyond a step of {number(step)}"
    return Action(f"Train on {b}: to first order it helps {a} as a whole; {limit}. Measure {a}'s loss as you go.", "")


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
    keys = " ".join(f"tasks.{place}.max_samples={wanted}" for place in facts.places)
    yield Action(
        f"Take more samples: if the change is as large as estimated, about {wanted:,} of each task tell its direction.",
        f"qkov run CONFIG.yaml {keys} output.dir={shlex.quote(f'{facts.folder}-{wanted}')}",
    )


def _rounded_up(count: float) -> int:
    """To two significant digits."""
    unit: int = 10 ** max(math.floor(math.log10(count)) - 1, 0)
    return math.ceil(count / unit) * unit
