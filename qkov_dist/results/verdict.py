"""The answer in words: what a step on one task does to the other, how sure that is, which heads, and what to do next.

Words alone: the numbers come as ``Facts`` (``Heatmap.verdict`` gathers them). Page, terminal and notebooks show the
same sentences. The first order grows with the step, the second with its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .advice import Action, actions, example_step, second_decides
from .effects import Total
from .head_words import carriers_of, sentence_on_heads
from .influences import TASKS
from .verdict_facts import BESIDE, BY, PART, Direction, Facts, bracket, direction_of, number

SCOPE = "Attention weights alone: MLPs, embeddings and norms are not measured."
WORDS = (
    "In conflict: a step in that head alone raises the other task's loss, significantly; in synergy: it lowers it. "
    "To first order: as the slope at the present weights says. q: the share of false finds "
    "expected among the heads up to that q."
)


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        direction: What a step on B does to A's loss, where the total's interval says so.
        sentences: The answer: attention as a whole, what is not measured, and its heads.
        details: What words mean, which order decides, the other direction, the other optimizer, the unit step.
        carriers: The fewest heads that make half of the harm, as ``Q 14.2``, most harmful first; none where no head is
            in conflict.
        actions: What to do next.
        step: The step of commands: the practical one, to two significant digits, or a usual one.
        practical: Optimizer -> task, ``a`` or ``b`` -> the practical step on it, None where there is none.
    """

    direction: Direction
    sentences: tuple[str, str, str]
    details: tuple[str, ...]
    carriers: tuple[str, ...]
    actions: tuple[Action, ...]
    step: float
    practical: Mapping[str, Mapping[str, float | None]]


def verdict_of(facts: Facts) -> Verdict:
    """All of it."""
    carriers = carriers_of(facts) if facts.significant(1) else ()
    return Verdict(
        direction_of(facts.totals[BY]),
        (_whole(facts), SCOPE, sentence_on_heads(facts, carriers)),
        (WORDS, _order(facts), _other_way(facts), _other_optimizer(facts), _unit_step(facts)),
        carriers,
        tuple(actions(facts)),
        example_step(facts),
        {
            optimizer: {task: _known(facts.practical_step(task, optimizer)) for task in TASKS}
            for optimizer in facts.totals
        },
    )


def _known(step: float) -> float | None:
    return None if math.isnan(step) else step


def overtakes(change: float, curvature: float) -> float:
    """The step from which on the second order is the larger one, NaN where there is none."""
    return abs(change) / curvature if curvature > 0 else math.nan


def _training(facts: Facts, stepped: str, optimizer: str) -> tuple[str, float]:
    """How far a task is trained, in words, and the step that is: the practical one, else the unit step."""
    name, step = facts.name_of(stepped), facts.practical_step(stepped, optimizer)
    if math.isnan(step):
        return f"a unit step of {optimizer} on {name}'s attention weights (learning rate x number of steps = 1)", 1.0
    fall = f"{number(PART * facts.losses[stepped])} {facts.unit}"
    return (
        f"training attention on {name} with {optimizer} until its own loss is {PART:.0%} lower ({fall}; a step of "
        f"{number(step)}: learning rate x number of steps)",
        step,
    )


def _whole(facts: Facts) -> str:
    return _said(facts, "b", BY)


def _said(facts: Facts, stepped: str, optimizer: str) -> str:
    """What training on a task does to the other's loss: all numbers at one step, with their unit."""
    total, harmed = facts.totals[optimizer], "a" if stepped == "b" else "b"
    training, step = _training(facts, stepped, optimizer)
    whose, change = facts.name_of(harmed), step * total.change
    ends = [step * end for end in total.interval]
    is_practical = not math.isnan(facts.practical_step(stepped, optimizer))
    unit = "" if is_practical or facts.are_scaled else f" {facts.unit}"
    has_loss = math.isfinite(facts.losses[harmed]) and not facts.are_scaled
    of = f"{unit} of {number(facts.losses[harmed])}" if has_loss else unit
    why = "" if is_practical else f" Told for a unit step, since {facts.why_no_step(stepped, optimizer)}."
    match direction_of(total):
        case "unknown" if math.isnan(total.standard_error):
            return (
                f"{_capital(training)} is estimated to change {whose}'s loss by {number(change)}{of}, to first order; "
                f"how sure that is cannot be said: a task has fewer than two samples of its own.{why}"
            )
        case "unknown":
            return (
                f"Whether training on {facts.name_of(stepped)} raises or lowers {whose}'s loss is not known from "
                f"{facts.samples} samples: {training} changes it by {number(change)} {bracket(*ends)}{of}, to first "
                f"order, and this 95% interval contains 0.{why}"
            )
        case direction:
            verb = "raises" if direction == "harm" else "lowers"
            sizes = bracket(*sorted(map(abs, ends)))
            return (
                f"{_capital(training)} {verb} {whose}'s loss by {number(abs(change))} {sizes}{of}, to first order.{why}"
            )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _order(facts: Facts) -> str:
    """Which order decides at the step of the answer; the step of equality is an estimate, never a limit."""
    total, step = facts.totals[BY], facts.practical_step()
    curvature = total.curvature_along["a"]
    until = (
        f"By that estimate the second is the larger from a step of {number(overtakes(total.change, curvature))} on; it "
        "is made at the present weights, with the Fisher in place of the Hessian: no step up to which training is safe."
    )
    if math.isnan(step):
        return (
            f"The second order always raises {facts.tasks[0]}'s loss and grows with the square of the step: "
            f"{number(curvature)} for a unit step, by the whole Fisher along it. {until}"
        )
    which = "second" if second_decides(facts, step) else "first"
    return (
        f"At a step of {number(step)} the {which} order decides: the first is {number(step * total.change)}, the "
        f"second +{number(step**2 * curvature)}, by the whole Fisher along the step. {until}"
    )


def _other_way(facts: Facts) -> str:
    return f"The other way round: {_lower(_said(facts, 'a', BY))}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _other_optimizer(facts: Facts) -> str:
    verdicts = [direction_of(facts.totals[optimizer]) for optimizer in (BESIDE, BY)]
    if verdicts[0] == "unknown":
        said = "direction not known"
    elif verdicts[1] == "unknown":
        said = "it harms" if verdicts[0] == "harm" else "it helps"
    else:
        said = f"{'the same' if verdicts[0] == verdicts[1] else 'the opposite'} direction"
    unlike = int((np.sign(facts.changes[BESIDE]) * np.sign(facts.changes[BY]) < 0).sum())
    return (
        f"By {BESIDE}, {said}: {_lower(_said(facts, 'b', BESIDE))} {unlike:,} of {len(facts.names):,} heads have "
        f"another sign than by {BY}."
    )


def _unit_step(facts: Facts) -> str:
    """Numbers that heads and files hold, and what they are in relation to what the stepped task gains."""
    a, b = facts.tasks
    total = facts.totals[BY]
    text = (
        f"Heads are listed for a unit step (learning rate x number of steps = 1), which nobody takes: multiply by your "
        f"own. All together: {number(total.change)} {bracket(*total.interval)}"
    )
    return f"{text}{''.join(_relation(total, a, b))}."


def _relation(total: Total, harmed: str, stepped: str) -> Iterator[str]:
    """The change in relation to what the stepped task itself gains; nothing where that, or the sign, is not known."""
    gain = -total.own["b"]
    if gain > 0 and direction_of(total) != "unknown":
        moves = "rises" if total.change > 0 else "falls"
        yield f"; for every 1.00 that {stepped}'s loss falls, {harmed}'s {moves} by {number(abs(total.change) / gain)}"
