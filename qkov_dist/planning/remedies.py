"""Whether a planned run fits into the memory there is, and what would make it fit: tried out, not guessed.

Changes are tried in the order of what they cost: fewer factors in memory, a type of half the size, smaller batches,
weights sharded over the ranks there are, and over more of them; where one sample is too long for all of that, its
tokens too. A change is proposed only after the whole plan was made with it and fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qkov_dist.distributed.parallelism import SHARDED
from qkov_dist.errors import QkovError

from .hardware import GPU_OVERHEAD
from .planner import Planner, Setting
from .run_plan import MIB, RunPlan
from .table import gib

MOST_RANKS = 512
HOST_OVERHEAD = 600 * MIB  # of a process: Python and its libraries
HALF = "bfloat16"


@dataclass(frozen=True)
class Limits:
    """Memory that there is; None sets no limit.

    Attributes:
        gpu: Bytes of each GPU.
        host: Bytes of a node's own memory.
        ranks_per_node: Ranks that share a node.
    """

    gpu: int | None
    host: int | None
    ranks_per_node: int


def shortages(plan: RunPlan, limits: Limits) -> list[str]:
    """Where a plan needs more than there is; nothing where it fits."""
    gpu, host = plan.peak()
    on_node = min(plan.num_ranks, limits.ranks_per_node)
    needs = [(gpu + GPU_OVERHEAD, limits.gpu, "on a GPU")] if plan.work.on_gpu else []
    needs.append((on_node * (host + HOST_OVERHEAD), limits.host, f"in the memory of a node with {on_node} rank(s)"))
    return [f"{gib(need)} {place}" for need, limit, place in needs if limit is not None and need > limit]


def limits_in_words(limits: Limits, *, on_gpu: bool) -> str:
    """What there is."""
    known = [(limits.gpu, "on each GPU")] if on_gpu else []
    known.append((limits.host, "in the memory of a node"))
    return " and ".join(f"{gib(limit)} {place}" for limit, place in known if limit is not None)


def remedies(setting: Setting, limits: Limits, planner: Planner) -> list[str]:
    """Changes with each of which the run fits; where no single one is enough, half the size and more ranks together, or
    ranks that share the tokens of samples.
    """
    search = _Search(limits, planner)
    half = _half(setting)
    smaller, more = search.smaller_batches(setting), search.more_ranks(setting)
    if smaller and more and more.config.compute.batch_tokens != setting.config.compute.batch_tokens:
        more = None  # smaller batches are enough without more ranks
    ways = [search.less_factor_memory(setting), half if half and search.fits(half) else None, smaller, more]
    found = [way for way in ways if way is not None]
    if not found and half and (both := search.more_ranks(half)):
        found = [both]
    if not found and (shared := search.shared_tokens(setting)):
        found = [shared]
    return [setting.changes(way) for way in found]


class _Search:
    """Makes whole plans, and keeps them."""

    def __init__(self, limits: Limits, planner: Planner) -> None:
        self._limits, self._planner = limits, planner
        self._known: dict[Setting, bool] = {}

    def fits(self, setting: Setting) -> bool:
        """Whether it does; not where the model cannot be cut so, or a layer's factors find no room."""
        if setting not in self._known:
            try:
                self._known[setting] = not self._is_too_much(setting) and self._plan_fits(setting)
            except QkovError:
                self._known[setting] = False
        return self._known[setting]

    def _is_too_much(self, setting: Setting) -> bool:
        on_gpu = self._limits.gpu is not None
        limit, overhead = (self._limits.gpu, GPU_OVERHEAD) if on_gpu else (self._limits.host, HOST_OVERHEAD)
        return limit is not None and self._planner.least(setting) + overhead > limit

    def _plan_fits(self, setting: Setting) -> bool:
        return not shortages(self._planner.plan(setting), self._limits)

    def less_factor_memory(self, setting: Setting) -> Setting | None:
        """A quarter of the factors in memory, and again; the rest goes to disk."""
        size = setting.config.compute.factor_memory_mb
        while self._limits.host is not None and size > 1:
            size = size // 4 or 1
            compute = replace(setting.config.compute, factor_memory_mb=size)
            if self.fits(way := replace(setting, config=replace(setting.config, compute=compute))):
                return way
        return None

    def smaller_batches(self, setting: Setting) -> Setting | None:
        """Half as many tokens in a batch, and again, down to one sample: the largest batches that fit."""
        size, least = self._planner.batch_tokens(setting), self._planner.longest
        while size > least:
            size = max(size // 2, least)
            if self.fits(way := _with_batches(setting, size)):
                return way
        return None

    def more_ranks(self, setting: Setting) -> Setting | None:
        """A part of every weight on each of ever more ranks: the fewest that fit, with batches that do."""
        wider = setting if setting.config.parallel.shard in SHARDED else _fsdp(setting)
        has_replicas = setting.num_ranks > setting.config.parallel.tp
        num_ranks = setting.num_ranks if has_replicas and wider is not setting else 2 * setting.num_ranks
        while num_ranks <= MOST_RANKS:
            way = replace(wider, num_ranks=num_ranks)
            if found := way if self.fits(way) else self.smaller_batches(way):
                return found
            num_ranks *= 2
        return None

    def shared_tokens(self, setting: Setting) -> Setting | None:
        """A part of each sample's tokens, and of every weight, on each of ever more ranks: the fewest that fit."""
        wider, context = setting if setting.config.parallel.shard in SHARDED else _fsdp(setting), 2
        while context <= MOST_RANKS:
            num_ranks = -(-setting.num_ranks // context) * context
            if self.fits(way := replace(_with_context(wider, context), num_ranks=num_ranks)):
                return way
            context *= 2
        return None


def _half(setting: Setting) -> Setting | None:
    config = setting.config
    if config.model.dtype == HALF:
        return None
    return replace(setting, config=replace(config, model=replace(config.model, dtype=HALF)))


def _fsdp(setting: Setting) -> Setting:
    config = setting.config
    return replace(setting, config=replace(config, parallel=replace(config.parallel, shard="fsdp")))


def _with_context(setting: Setting, context: int) -> Setting:
    config = setting.config
    return replace(setting, config=replace(config, parallel=replace(config.parallel, cp=context)))


def _with_batches(setting: Setting, size: int) -> Setting:
    compute = replace(setting.config.compute, batch_tokens=size)
    return replace(setting, config=replace(setting.config, compute=compute))
