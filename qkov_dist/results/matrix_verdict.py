"""The answer of a matrix in words: which tasks hurt which, which help, which mix is without harm, and what to do next.

A pair harms or helps where the total change of attention is told from 0 over all pairs (``matrix_pairs``); numbers are
those of a practical step, as parts of the harmed task's loss. A mix without harm is free of any pair whose own interval
lies above 0, whether or not that holds over all pairs.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .advice import Action
from .matrix_pairs import Chance, PairRecord, chance, of_task, scope_of
from .verdict import SCOPE
from .verdict_facts import BESIDE, BY, CHANGE, PART, Direction, number

MOST_PAIRS, MOST_TASKS, MOST_KEYS = 3, 8, 8  # named in a sentence; keys of a command
TIMES = "\N{MULTIPLICATION SIGN}"
SIZES = (
    f"Per cents: what training attention on one task until its own loss is {PART:.0%} lower does to another's loss, to "
    "first order, as a part of that loss, with the 95% interval of the pair."
)
WORDS = (
    "In conflict: a step on either task, in that head alone, raises the other task's loss, significantly; in synergy: "
    "it lowers it. To first order: as the slope at the present weights says."
)


@dataclass(frozen=True)
class MatrixVerdict:
    """The answer.

    Attributes:
        direction: Harm where some pair harms over all pairs; help where some helps and none harms.
        sentences: How many pairs hurt and help; which, where there are such; the mix without harm; heads.
        details: What is not measured, what words mean, how sure it is, and what other ways of asking say.
        mix: The tasks that are without a harmful pair among them.
        actions: What to do next.
    """

    direction: Direction
    sentences: tuple[str, ...]
    details: tuple[str, ...]
    mix: tuple[str, ...]
    actions: tuple[Action, ...]


@dataclass(frozen=True)
class MatrixFacts:
    """What the words are made of.

    Attributes:
        tasks: Their names, in the order of the configuration.
        most_samples: Of any task.
        num_heads: Heads of all blocks.
        records: Of every pair; all have totals.
        common_head: The head in conflict in most pairs, as ``Q 14.2``, and in how many.
        folder: Where the run lies, as commands name it.
    """

    tasks: tuple[str, ...]
    most_samples: int
    num_heads: int
    records: tuple[PairRecord, ...]
    common_head: tuple[str, int]
    folder: str


def matrix_verdict(facts: MatrixFacts) -> MatrixVerdict:
    """All of it."""
    records = facts.records
    kinds = by_verdict(records)
    mix = mix_without_harm(facts.tasks, records)
    direction: Direction = "harm" if kinds["harm"] else "help" if kinds["help"] else "unknown"
    return MatrixVerdict(
        direction,
        (*_who(facts, kinds), _mix(facts.tasks, mix, records), _heads(facts)),
        (SIZES, SCOPE, WORDS, *_how_sure(records), _other_optimizer(records)),
        mix,
        tuple(_actions(facts, kinds)),
    )


def by_verdict(records: Sequence[PairRecord]) -> dict[Direction, list[PairRecord]]:
    """Pairs by what holds over all pairs: the largest change for its error first."""
    kinds: dict[Direction, list[PairRecord]] = {"harm": [], "help": [], "unknown": []}
    for record in sorted(records, key=lambda record: record.totals[BY].total.p_value):
        kinds[record.verdict()].append(record)
    return kinds


def mix_without_harm(tasks: Sequence[str], records: Sequence[PairRecord]) -> tuple[str, ...]:
    """Tasks left when the one with most harmful pairs is taken away, again and again; then what fits is put back."""
    harmful = {frozenset(record.tasks) for record in records if record.direction() == "harm"}
    kept = list(tasks)
    gone: list[str] = []

    def harms(task: str) -> int:
        """How many of the tasks kept it harms."""
        return sum(frozenset((task, other)) in harmful for other in kept)

    while kept and any(harms(task) for task in kept):
        worst = max(reversed(kept), key=harms)
        kept.remove(worst)
        gone.append(worst)
    for task in reversed(gone):
        if not harms(task):
            kept.append(task)
    return tuple(task for task in tasks if task in kept)


def name_of_pair(record: PairRecord) -> str:
    """As sentences name it."""
    return f" {TIMES} ".join(record.tasks)


def percent(value: float) -> str:
    """A part as per cent, with its sign where it has one."""
    return "not known" if not math.isfinite(value) else f"{number(100 * value)}%"


def _who(facts: MatrixFacts, kinds: Mapping[Direction, Sequence[PairRecord]]) -> Iterator[str]:
    records = facts.records
    pairs = f"Of {len(records):,} pairs of {len(facts.tasks)} tasks" if len(records) > 1 else "Of the one pair of tasks"
    harm, help_, open_ = (len(kinds[kind]) for kind in ("harm", "help", "unknown"))
    yield (
        f"{pairs}, {_counted(harm, 'hurt')} each other, {_counted(help_, 'help')} each other, and of "
        f"{open_:,} it is not known ({BY}, q <= {records[0].level:g} over the pairs)."
    )
    for verb, chosen in (("Hurt", kinds["harm"]), ("Help", kinds["help"])):
        if chosen:
            more = len(chosen) - MOST_PAIRS
            listed_ = "; ".join(map(_sizes, chosen[:MOST_PAIRS])) + (f"; and {more:,} more" if more > 0 else "")
            yield f"{verb}: {listed_}."


def _verb(count: int, verb: str) -> str:
    return f"{verb}s" if count == 1 else verb


def _counted(count: int, verb: str) -> str:
    return f"{count:,} {_verb(count, verb)}" if count else f"none {verb}"


def _sizes(record: PairRecord) -> str:
    """A pair and what training on either does to the other: at the practical step, else at the unit step."""
    total, (a, b) = record.totals[BY], record.tasks
    if not has_practical_steps(record):
        return f"{name_of_pair(record)} (a change of {number(total.total.change)} for a unit step)"
    said = [
        f"{whose}'s loss {_signed(value)} [{_signed(low)}, {_signed(high)}] by {other}"
        for whose, other, (value, low, high) in ((a, b, total.relative(0)), (b, a, total.relative(1)))
    ]
    return f"{name_of_pair(record)} ({', '.join(said)})"


def has_practical_steps(record: PairRecord, optimizer: str = BY) -> bool:
    """Whether both ways can be told at a practical step."""
    total = record.totals[optimizer]
    return all(map(math.isfinite, (*total.relative(0), *total.relative(1))))


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{percent(value)}"


def _mix(tasks: Sequence[str], mix: Sequence[str], records: Sequence[PairRecord]) -> str:
    inside = [record for record in records if {*record.tasks} <= {*mix}]
    helps = sum(record.verdict() == "help" for record in inside)
    if len(mix) < 2:
        return "No two tasks are without a sign of harm: train each apart, or hold the heads in conflict."
    open_ = len(inside) - helps
    sure = f"of {'its one pair' if len(inside) == 1 else f'its {len(inside):,} pairs'} {_counted(helps, 'help')}"
    rest = f", and of {open_:,} it is not known: no harm was found, which is no proof of none" if open_ else ""
    if len(mix) == len(tasks):
        return (
            f"No pair shows harm by its own 95% interval: all {len(tasks)} tasks can be tried together ({sure}{rest})."
        )
    left_out = [task for task in tasks if task not in mix]
    return (
        f"To train together: {listed(mix)}; no pair of these shows harm by its own 95% interval ({sure}{rest}). "
        f"Left out: {listed(left_out)}."
    )


def listed(names: Sequence[str], most: int = MOST_TASKS) -> str:
    """Some names, the first few of them where there are many."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def _heads(facts: MatrixFacts) -> str:
    """Pairs, tasks and heads with most conflicts."""
    records, num_heads = facts.records, facts.num_heads
    level = f"q <= {records[0].level:g} {scope_of(records)}"
    most = [record for record in most_conflicts(records) if record.count(BY, 1)]
    if not most:
        return f"In single heads no pair is in conflict: none of {num_heads:,} heads in any pair ({level})."
    pairs = ", ".join(f"{name_of_pair(record)} ({record.count(BY, 1):,})" for record in most[:MOST_PAIRS])
    task, count = max(((task, conflicts_of(records, task)) for task in facts.tasks), key=lambda found: found[1])
    head, in_pairs = facts.common_head
    return (
        f"Heads in conflict, of {num_heads:,} ({level}): most in {pairs}; of all tasks {task} has most, {count:,} over "
        f"its {len(of_task(records, task)):,} pairs; head {head} conflicts in most pairs, {in_pairs:,} of "
        f"{len(records):,}."
    )


def most_conflicts(records: Sequence[PairRecord]) -> list[PairRecord]:
    """Pairs, those with most heads in conflict first."""
    return sorted(records, key=lambda record: -record.count(BY, 1))


def conflicts_of(records: Sequence[PairRecord], task: str, kind: str = BY, sign: int = 1) -> int:
    """Heads of a sign over all pairs of a task: a head counts once in each of them."""
    return sum(record.count(kind, sign) for record in of_task(records, task))


def _how_sure(records: Sequence[PairRecord]) -> Iterator[str]:
    """Families of tests, and what chance alone gives."""
    yield in_words(chance(records), records[0].level)
    only_own = [record for record in records if record.direction() != record.verdict()]
    if only_own:
        named = listed([f"{name_of_pair(record)} ({record.direction()})" for record in only_own], MOST_PAIRS)
        yield f"By its own 95% interval alone, not over all pairs: {named}."


def in_words(expected: Chance, level: float, found: str = "in conflict or synergy", *, has_totals: bool = True) -> str:
    """What chance alone gives, as the page and the terminal say it; ``found`` is what heads are found to be."""
    of_heads = (
        f"Tests of heads are corrected {expected.scope}: {expected.pairs:,} pairs make {expected.families:,} such "
        f"families. Of {expected.found:,} heads found {found} over all pairs at most "
        f"{number(expected.false_finds)} are expected to be no find; were there no effect at all, at most "
        f"{number(expected.false_families)} families would show any (level {level:g})."
    )
    of_totals = (
        f" Totals of pairs are corrected over pairs; of {expected.pairs:,} intervals of 95% about "
        f"{number(expected.false_intervals)} miss the truth."
    )
    return of_heads + (of_totals if has_totals else "")


def _other_optimizer(records: Sequence[PairRecord]) -> str:
    beside = [record.verdict(BESIDE) for record in records]
    other = sum(
        record.verdict(BESIDE) != record.verdict() and "unknown" not in (record.verdict(BESIDE), record.verdict())
        for record in records
    )
    harm, help_ = _counted(beside.count("harm"), "hurt"), _counted(beside.count("help"), "help")
    opposite = f"in {other:,} the direction is the opposite of" if other else "no direction is the opposite of"
    return f"By {BESIDE} {harm} and {help_}; {opposite} {BY}'s."


def _actions(facts: MatrixFacts, kinds: Mapping[Direction, Sequence[PairRecord]]) -> Iterator[Action]:
    folder = shlex.quote(facts.folder)
    worst = next((record for record in [*kinds["harm"], *most_conflicts(facts.records)] if record.count(BY, 1)), None)
    if worst is not None:
        yield Action(
            f"List the heads in conflict of {name_of_pair(worst)}, with their rows and columns; hold them with "
            "freeze_heads while you train.",
            f"qkov heads {folder} --pair {shlex.join(worst.tasks)} --by {CHANGE} --significant",
        )
    if kinds["unknown"]:
        yield _more_samples(facts, len(kinds["unknown"]))
    yield Action("Write pages of pairs, tables and figures.", f"qkov report {folder}")


def _more_samples(facts: MatrixFacts, count: int) -> Action:
    """Errors shrink with the root of the number of samples: four times as many halve them."""
    wanted = 4 * facts.most_samples
    keys = " ".join(f"tasks.{place}.max_samples={wanted}" for place in range(len(facts.tasks)))
    command = f"qkov run CONFIG.yaml {keys} output.dir={shlex.quote(f'{facts.folder}-{wanted}')}"
    which = "The one open pair takes" if count == 1 else f"The {count:,} open pairs take"
    return Action(
        f"{which} more samples: four times as many ({wanted:,} of each task) halve all intervals.",
        command if len(facts.tasks) <= MOST_KEYS else "",
    )
