"""A story: a run is killed one to four times at moments drawn from a seed, resumed each time, and left to finish."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from attempts import Clock, Kill, Order, Outcome, play
from moments import Aim, Seen
from scene import ALONE, CUTS, LAYERS, Scene
from verdicts import (
    Standing,
    deviation,
    ending_faults,
    folder_faults,
    heatmap_faults,
    leftovers,
    of_ranks,
    standing,
    work_faults,
)

from qkov_dist.results.heatmap_file import HEATMAP_FILE

NUM_KILLS = (1, 1, 2, 2, 3, 4)
BY_CLOCK, BY_TERM, IN_WRITE, WITHOUT_PARTIALS = 0.35, 0.2, 0.35, 0.15  # shares of kills, and of stories
ELSEWHERE, ONE_RANK = 0.35, 0.6  # attempts on other ranks or another cut; kills of one rank of several
IN_LAYERS = ("scoring", "writing a layer")  # phases that are as long as layers are missing
ANSWERS_TERM = ("capture", *IN_LAYERS)
CARRY_STEPS, CARRY_WRITES = 8, 120  # of each layer that is carried over


@dataclass
class Tally:
    """What happened, and what should not have.

    Attributes:
        kills: (phase, signal's name, "one rank" or "the job") -> how often.
        attempts: How often the run was started.
        resumes: How often it was started after a kill.
        elsewhere: Resumes on another number of ranks, or cut otherwise.
        missed: Kills whose moment never came, because the run had finished.
        stories: How many were played.
        scored: Layers scored, summed over ranks.
        again: Of these, layers that a rank on as many ranks had begun before, and not finished.
        worst: Largest deviation of a score under ranks.
        faults: Sentences.
    """

    kills: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    attempts: int = 0
    resumes: int = 0
    elsewhere: int = 0
    missed: int = 0
    stories: int = 0
    scored: int = 0
    again: int = 0
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return self.kills.total()

    def add(self, other: Tally) -> None:
        """Add another tally's counts and faults to this one's."""
        self.worst = max(self.worst, other.worst)
        for name in ("kills", "attempts", "resumes", "elsewhere", "missed", "stories", "scored", "again", "faults"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Story:
    """One story; the same seed, cut and number draw the same.

    Args:
        scene: What it plays with.
        seed: Of the campaign.
        cut: How the model is cut: one of ``CUTS``; ``none`` is one process throughout.
        number: Which of the campaign's stories of this cut.
    """

    def __init__(self, scene: Scene, seed: int, cut: str, number: int) -> None:
        self._scene, self._cut, self.name = scene.of_cut(cut), cut, f"{cut}-{number}"
        self._random = random.Random(f"{seed}/{cut}/{number}")
        self.partials = self._random.random() >= WITHOUT_PARTIALS
        self._begun: set[tuple[int, int, int]] = set()
        self._shards: dict[int, set[str]] = {}  # number of ranks -> how they were cut
        self._last = (cut, 0)
        self._wrote = 0  # how many ranks there were when the heatmap was written: the partial files are theirs
        self.tally, self.told = Tally(stories=1), list[str]()

    def play(self) -> Tally:
        """Play it; its folders are removed where nothing was at fault."""
        goes_on = True
        for _ in range(self._random.choice(NUM_KILLS)):
            if not (goes_on := self.attempt(*self._ranks(), with_kill=True)):
                break
        if goes_on:
            self.attempt(*self._ranks())
        self.judge_end()
        if not self.tally.faults:
            shutil.rmtree(self.out)
            shutil.rmtree(self._scene.folder / "notes" / self.name)
        return self.tally

    @property
    def out(self) -> Path:
        """The run's output folder."""
        return self._scene.out(self.name)

    def attempt(
        self,
        shard: str,
        num_ranks: int,
        kill: Kill | None = None,
        *,
        with_kill: bool = False,
        broken: Callable[[], None] | None = None,
    ) -> bool:
        """One start of the run; what was at fault goes into the tally.

        Args:
            shard: How the model is cut.
            num_ranks: On how many ranks.
            kill: When who is killed.
            with_kill: Whether to draw that instead.
            broken: Breaks the product.

        Returns:
            Whether the story goes on: the run has not finished, and nothing was at fault.
        """
        before = standing(self.out)
        path = self.out / HEATMAP_FILE
        self._wrote = self._wrote if path.exists() else num_ranks
        overrides = f"output.partials={self.partials}".lower()
        order = replace(self._scene.order(self.name, shard, num_ranks, overrides), broken=broken)
        shards = self._shards.setdefault(num_ranks, set())
        shards.add(order.shard)
        alone = of_ranks(before, num_ranks, same_cut=len(shards) == 1)
        kill = self._kill(order, before) if with_kill else kill
        outcome = play(self._scene.context, order, kill)
        self._count(order, kill, outcome)
        faults = [
            *ending_faults(outcome, kill, has_heatmap=path.exists()),
            *work_faults(outcome, before, alone),
            *folder_faults(self.out, before, num_ranks, alone, partials=self.partials),
            *(heatmap_faults(path, self._scene.reference, same_bits=self._alone) if path.exists() else ()),
        ]
        what = f"{order.shard} on {num_ranks}, {_in_words(kill, outcome)}, ended with {outcome.codes}"
        self.told.append(f"{what} after {outcome.seconds:.1f} s; finished layers before: {sorted(before.whole)}")
        self.tally.faults += [f"{fault} [{what}; {order.notes}]" for fault in faults]
        return not outcome.finished and not faults

    def judge_end(self) -> None:
        """The right result, and nothing else, unless something was at fault before."""
        path, tally = self.out / HEATMAP_FILE, self.tally
        if tally.faults:
            return
        if not path.exists():
            tally.faults.append("the run finished without a heatmap")
            return
        if not self._alone:
            tally.worst = deviation(path, self._scene.reference)
        tally.faults += leftovers(self.out, self._wrote, partials=self.partials)

    @property
    def _alone(self) -> bool:
        """Whether it was one process throughout."""
        return self._shards.keys() <= {1}

    def _ranks(self) -> tuple[str, int]:
        """How the run is cut now, and on how many ranks."""
        mine = CUTS[self._cut]
        usual = self._cut, mine.ranks
        cuts = [cut for cut in CUTS if cut not in (ALONE, self._cut) and CUTS[cut].model in ("llama", mine.model)]
        others = [(ALONE, 1), (self._cut, mine.elsewhere), (self._random.choice(cuts), 2)]
        elsewhere = self._cut != ALONE and self._random.random() < ELSEWHERE
        return self._random.choice(others) if elsewhere else usual

    def _kill(self, order: Order, before: Standing) -> Kill:
        """A moment of an attempt, who is struck then, and by what."""
        draw, ranks = self._random, range(order.num_ranks)
        first = draw.choice(ranks)
        victims = (first,) if draw.random() < ONE_RANK else (first, *(rank for rank in ranks if rank != first))
        number = signal.SIGTERM if draw.random() < BY_TERM else signal.SIGKILL
        usual = self._scene.undisturbed(order.shard, order.num_ranks)
        if draw.random() < BY_CLOCK:
            return Kill(Clock(draw.random() * usual.seconds, number), victims)
        in_write = draw.random() < IN_WRITE
        steps = dict(_steps(usual.seen[first], before, in_write=in_write))
        if order.num_ranks not in {size for size, _ in before.by_rank} and before.by_rank and first == 0:
            steps["carrying over"] = (CARRY_WRITES if in_write else CARRY_STEPS) * (len(before.whole) + 1)
        if number == signal.SIGTERM:
            steps = {phase: num for phase, num in steps.items() if phase in ANSWERS_TERM} or steps
        phase = draw.choice(sorted(steps))
        return Kill(Aim(phase, draw.randint(1, steps[phase]), in_write, number), victims)

    def _count(self, order: Order, kill: Kill | None, outcome: Outcome) -> None:
        tally = self.tally
        tally.attempts += 1
        if tally.attempts > 1:
            tally.resumes += 1
            tally.elsewhere += self._last != (order.shard, order.num_ranks)
        self._last = (order.shard, order.num_ranks)
        if kill and outcome.struck and not outcome.finished:
            who = "one rank" if order.num_ranks > len(kill.victims) else "the job"
            tally.kills[outcome.phase, signal.Signals(kill.signal).name, who] += 1
        elif kill:
            tally.missed += 1
        begun = {(order.num_ranks, rank, layer) for rank, seen in enumerate(outcome.seen) for layer in seen.scored}
        tally.scored += len(begun)
        tally.again += len(begun & self._begun)
        self._begun |= begun


def _steps(seen: Seen, before: Standing, *, in_write: bool) -> Iterator[tuple[str, int]]:
    """Phases that a rank will come through, and about how many steps each will have."""
    missing = len(LAYERS) - len(before.whole)
    for phase, num in (seen.writes if in_write else seen.steps).items():
        expected = num * missing // len(LAYERS) if phase in IN_LAYERS else num
        if expected and (missing or phase not in ANSWERS_TERM):
            yield phase, expected


def _in_words(kill: Kill | None, outcome: Outcome) -> str:
    if kill is None:
        return "left alone"
    if not outcome.struck:
        return f"not struck ({kill})"
    return f"{signal.Signals(kill.signal).name} of ranks {sorted(outcome.struck)} in {outcome.phase} ({kill.moment})"
