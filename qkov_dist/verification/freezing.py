r"""Does freezing the most harmful heads spare A while B is learned? One seed of the experiment.

A seed deals the samples of both tasks into halves and orders the training batches. On the first halves the model is
warmed up (on A, where asked), heads are scored, and attention is trained on B; on the second halves losses are looked
at. Every training of a seed starts from the same weights and sees the same batches: all that differs is which heads are
frozen: none, the ``share`` of all heads that a criterion puts first, or as many chosen at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from qkov_dist.acting.freeze import freeze_heads
from qkov_dist.data.samples import Sample
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.influences import Floats
from qkov_dist.results.selection import Selection

from .criteria import CRITERIA, chosen_at_random, chosen_by, heatmap_of
from .examined_model import ExaminedModel
from .head_targets import Target, halves, refuse_unchangeable
from .trajectories import Training, Trajectory, attention_weights, kept, trained

NONE = "none"


@dataclass(frozen=True)
class FreezingPlan:
    """What is tried with one seed.

    Attributes:
        training: On B.
        warmup: Steps on A before heads are scored; 0 for none.
        shares: Of all heads, which are frozen.
        num_random: Random choices for each share.
        criteria: By which heads are chosen.
    """

    training: Training = field(default_factory=Training)
    warmup: int = 0
    shares: tuple[float, ...] = (0.25,)
    num_random: int = 1
    criteria: tuple[str, ...] = CRITERIA

    @property
    def num_trainings(self) -> int:
        """Trainings on B with one seed."""
        return 1 + len(self.shares) * (len(self.criteria) + self.num_random)


@dataclass(frozen=True)
class Tried:
    """One training.

    Attributes:
        criterion: Its name, ``none`` or ``random``.
        share: Of all heads, that was frozen; 0 for none.
        heads: Which.
        trajectory: What became of the losses.
    """

    criterion: str
    share: float
    heads: tuple[Target, ...]
    trajectory: Trajectory


@dataclass(frozen=True)
class Trial:
    """All trainings with one seed.

    Attributes:
        seed: The seed.
        held_out_a: Which of A's samples are held out.
        tried: The trainings, that without frozen heads first.
    """

    seed: int
    held_out_a: tuple[int, ...]
    tried: tuple[Tried, ...]

    def as_json(self) -> dict[str, Any]:
        """Numbers and names alone."""
        tried = [
            {
                "criterion": one.criterion,
                "share": one.share,
                "heads": [[target.layer, target.block, target.head] for target in one.heads],
                "a": one.trajectory.a.tolist(),
                "b": one.trajectory.b.tolist(),
            }
            for one in self.tried
        ]
        return {"seed": self.seed, "held_out_a": list(self.held_out_a), "tried": tried}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Trial:
        """What :meth:`as_json` was made of."""
        tried = tuple(
            Tried(
                one["criterion"],
                one["share"],
                tuple(Target(*head) for head in one["heads"]),
                Trajectory(np.array(one["a"]), np.array(one["b"])),
            )
            for one in content["tried"]
        )
        return Trial(content["seed"], tuple(content["held_out_a"]), tried)


def run_trial(
    examined: ExaminedModel, plan: FreezingPlan, seed: int, on_training: Callable[[int], object] = lambda n: None
) -> Trial:
    """Every training of one seed; the model's weights are put back.

    Args:
        examined: The model, its layers and all samples of both tasks.
        plan: What is tried.
        seed: Of the halves, the batches and the random choices.
        on_training: Called with 1 after each training.

    Raises:
        QkovError: where a task has too few samples, or weights cannot be changed.
    """
    refuse_unchangeable(examined)
    for_a, held_out_a = halves(len(examined.a), seed, "task A")
    for_b, held_out_b = halves(len(examined.b), seed + 1_000_003, "task B")  # others than A's, of tasks of one size
    first = replace(examined, a=_chosen(examined.a, for_a), b=_chosen(examined.b, for_b))
    second = replace(examined, a=_chosen(examined.a, held_out_a), b=_chosen(examined.b, held_out_b))
    tried = []
    with kept(attention_weights(examined)):
        if plan.warmup:
            trained(first, first.a, replace(plan.training, steps=plan.warmup), seed)
        held_out, known = _HeldOut(second), dict[frozenset[Target], Trajectory]()
        for share, selection in _choices(heatmap_of(first), plan, seed):
            heads = tuple(Target(head.layer, head.block, head.head) for head in selection.heads)
            key = frozenset(heads)  # two criteria may choose the same heads: one training is both
            if key not in known:
                known[key] = _trajectory(first, held_out, plan.training, seed, selection)
            tried.append(Tried(selection.by, share, heads, known[key]))
            on_training(1)
    return Trial(seed, held_out_a, tuple(tried))


def _chosen(samples: Sequence[Sample], places: Sequence[int]) -> tuple[Sample, ...]:
    return tuple(samples[place] for place in places)


def _choices(heatmap: Heatmap, plan: FreezingPlan, seed: int) -> Iterator[tuple[float, Selection]]:
    """Share and heads of every training of a seed."""
    yield 0.0, Selection(NONE, ())
    rng = np.random.default_rng((seed, len(heatmap.layers)))
    for share in plan.shares:
        for criterion in plan.criteria:
            yield share, chosen_by(heatmap, criterion, share, plan.training.step)
        for _ in range(plan.num_random):
            yield share, chosen_at_random(heatmap, share, rng)


class _HeldOut:
    """Both tasks' held-out samples, and their losses before the training."""

    def __init__(self, examined: ExaminedModel) -> None:
        self._examined = examined
        self._batches = examined.batches(examined.a), examined.batches(examined.b)
        self.start = self.losses()

    def losses(self) -> tuple[Floats, Floats]:
        """Of A's samples and of B's, as the model now is."""
        of_a, of_b = self._batches
        return self._examined.losses(of_a), self._examined.losses(of_b)


def _trajectory(
    first: ExaminedModel, held_out: _HeldOut, training: Training, seed: int, selection: Selection
) -> Trajectory:
    """Train on B's first half with some heads frozen; look at both second halves."""
    looks = [held_out.start]

    def look(number: int) -> None:
        if number in training.looked_at:
            looks.append(held_out.losses())

    with kept(attention_weights(first)):
        freezing = partial(freeze_heads, first.model, selection)
        trained(first, first.b, training, seed, freezing=freezing, after_step=look)
    of_a, of_b = zip(*looks, strict=True)
    return Trajectory(np.stack(of_a), np.stack(of_b))
