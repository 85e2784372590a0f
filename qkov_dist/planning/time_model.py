"""How long a planned run should take on some hardware: for each phase, what its slowest rank needs at least.

    capture     max(products of both passes, reading all weights twice a batch, sums and gathered weights over the link)
                + factors to the host, and those on disk written
    scoring     products of gradients (of factors in half a type at that type's rate on a GPU) and pairs + their
                elementwise part through the memory
                + factors exchanged, to the GPU, and read from disk; partial scores written twice
                + products of the tests of layers that are tested as they are scored, on a GPU
    combining   partial scores sent and read + products of the tests, in float64 + the heatmap written

On the processor at hand, rates of products, of scoring and of tests are those of parts of the run itself
(``planning.probes``); what these leave out of combining is a constant a head.

Every assumption that is no fact of a data sheet is a constant here, and is printed with the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .cost import Cost
from .hardware import Hardware
from .probes import Probes, probed
from .run_plan import RunPlan

EFFICIENCY = 0.5  # of the peak (of a CPU: of the measured rate) that products reach
# Of the rate of a pass's products on a CPU that whole passes reach, everything between them included: one at a time,
# and several, each by cores of its own.
OF_PASSES, OF_PASSES_AT_ONCE = 0.7, 0.8
BANDWIDTH = 0.8  # of a memory's bandwidth or a link's, likewise
NODE_LINK = 50e9  # bytes a second of a rank to another node: 400 Gbit/s
HOST_LINK = 25e9  # bytes a second between a GPU and its host
DISK = 2e9  # bytes a second
ELEMENT_TRAFFIC = 8  # times that an element of a gradient passes the memory: formed, squared, mapped, multiplied
COMBINING, A_HEAD, A_PAIRS_HEAD = 0.2, 0.1e-3, 0.4e-3  # seconds on a CPU: once, a head, and one of each of many pairs
WORTH_TIMING = 10**11  # operations of a run, about a second: parts of a smaller one would take as long as all of it
PHASES = ("capture", "scoring", "combining")


@dataclass(frozen=True)
class Phase:
    """One phase of the slowest rank: seconds by what takes them; those that overlap are counted once."""

    name: str
    terms: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.terms.values())

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        return max(self.terms, key=lambda name: self.terms[name])


def expected(plan: RunPlan, hardware: Hardware, ranks_per_node: int) -> list[Phase]:
    """Each phase of the rank that takes longest."""
    times = not hardware.is_gpu and max(map(_operations, plan.costs)) >= WORTH_TIMING
    clock = _Clock(
        plan, hardware, ranks_per_node, probed(plan.work, max(cost.elements for cost in plan.costs)) if times else None
    )
    found = []
    for name, terms in zip(PHASES, (clock.capture, clock.scoring, clock.combining), strict=True):
        found.append(max((Phase(name, terms(cost)) for cost in plan.costs), key=lambda phase: phase.seconds))
    return found


def _operations(cost: Cost) -> int:
    return cost.flops_forward + cost.flops_backward + cost.flops_scoring


def assumptions(hardware: Hardware) -> list[str]:
    """What the times rest on, in sentences."""
    links = (
        f"memory and links {BANDWIDTH:.0%} of theirs; disk {DISK / 1e9:.0f} GB/s; between nodes "
        f"{NODE_LINK / 1e9:.0f} GB/s a rank"
    )
    if hardware.is_gpu:
        return [
            f"time: products reach {EFFICIENCY:.0%} of the data sheet's peak, {links}; the elementwise part of scores "
            f"moves each gradient {ELEMENT_TRAFFIC} times",
            f"time: {HOST_LINK / 1e9:.0f} GB/s between GPU and host",
        ]
    return [
        f"time: passes reach {OF_PASSES:.0%} of the rate measured on a product of theirs (several at a time "
        f"{OF_PASSES_AT_ONCE:.0%}), and scoring and tests are timed on a few heads, now (of runs that take more than "
        f"about a second); {links}"
    ]


@dataclass(frozen=True)
class _Clock:
    """Costs -> seconds."""

    plan: RunPlan
    hardware: Hardware
    ranks_per_node: int
    probes: Probes | None

    def capture(self, cost: Cost) -> dict[str, float]:
        """Forward and backward passes."""
        model_sizes, parallelism = self.plan.work.model_sizes, self.plan.parallelism
        reached = OF_PASSES_AT_ONCE if cost.at_once > 1 else OF_PASSES
        of_passes = self._rate(model_sizes.itemsize) if self.probes is None else self.probes.product * reached
        products = (cost.flops_forward + cost.flops_backward) / of_passes
        products += cost.flops_kept / self._rate(max(model_sizes.itemsize, 4))
        reading = 2 * cost.batches * cost.weights * parallelism.shards / (self.hardware.bandwidth * BANDWIDTH)
        moving = cost.moved_weights / self._link(self.plan.num_ranks) + cost.moved_sums / self._link(parallelism.tp)
        moving += cost.moved_tokens / self._link(parallelism.context)
        together = {"products": products, "reading weights": reading, "moving weights and sums": moving}
        longest = max(together, key=lambda name: together[name])
        return {longest: together[longest], "factors to host and disk": self._factors(cost)}

    def scoring(self, cost: Cost) -> dict[str, float]:
        """Scores from factors."""
        if self.probes is not None and self.probes.element is not None:
            of_heads = {"heads": cost.elements * self.probes.element}
        else:
            of_heads = self._heads(cost)
        return {
            **of_heads,
            "exchanging factors": cost.sent_factors / self._link(self.plan.num_ranks),
            "factors from host and disk": self._factors(cost),
            "writing scores": 2 * cost.written / DISK,
            "tests": self._tests(cost) * cost.heads_early / max(cost.heads, 1),
        }

    def _heads(self, cost: Cost) -> dict[str, float]:
        """Products, and what is done element by element."""
        itemsize = self.plan.work.scoring.itemsize
        products = (cost.flops_scoring - cost.flops_narrow + cost.flops_norms) / self._rate(itemsize)
        products += cost.flops_narrow / self._rate(self.plan.work.scoring.product_itemsize)
        passing = ELEMENT_TRAFFIC * cost.elements * itemsize / (self.hardware.bandwidth * BANDWIDTH)
        return {"products": products, "elementwise maps": passing}

    def combining(self, cost: Cost) -> dict[str, float]:
        """Sums over ranks, tests, the heatmap."""
        return {
            "exchanging scores": cost.sent_scores / self._link(self.plan.num_ranks),
            "tests": self._tests(cost) * (1 - cost.heads_early / max(cost.heads, 1)),
            "reading and writing scores": 2 * cost.written / DISK,
            "putting heads together": self._together(cost),
        }

    def _tests(self, cost: Cost) -> float:
        pairs = self.plan.work.sizes_of_pairs
        found = [None if self.probes is None else self.probes.tests[sizes] for sizes in pairs]
        known = [seconds for seconds in found if seconds is not None]
        return cost.heads * sum(known) if len(known) == len(pairs) else cost.flops_statistics / self._rate(8)

    def _together(self, cost: Cost) -> float:
        """What is done of each head beside its tests, by one core."""
        if self.hardware.is_gpu:
            return 0.0
        pairs = len(self.plan.work.sizes_of_pairs)
        return COMBINING + cost.heads * (A_HEAD if pairs == 1 else pairs * A_PAIRS_HEAD)

    def _factors(self, cost: Cost) -> float:
        """Once over the host's link, and over that of the disk for those that wait there."""
        sweeps = self.plan.captures * len(self.plan.sweeps)
        copied = sweeps * (cost.factors_memory + cost.factors_disk) / HOST_LINK if self.hardware.is_gpu else 0.0
        return copied + sweeps * cost.factors_disk / DISK

    def _rate(self, itemsize: int) -> float:
        return self.hardware.rate(itemsize) * EFFICIENCY

    def _link(self, num_ranks: int) -> float:
        """Bytes a second between that many neighbouring ranks."""
        within = self.hardware.link
        return BANDWIDTH * (within if num_ranks <= self.ranks_per_node else min(within, NODE_LINK))
