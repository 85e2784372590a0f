"""What ``qkov plan`` does: what a run would hold, move and compute on ranks that need not be there."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qkov_dist.config import RunConfig
from qkov_dist.errors import QkovError

from .hardware import Hardware, hardware, this_hardware
from .planner import Planner, Setting
from .remedies import Limits, limits_in_words, remedies, shortages
from .run_plan import RunPlan
from .table import as_json, plan_lines, size_notes
from .time_model import Phase, assumptions, expected

GIB = 2**30


@dataclass(frozen=True)
class Machines:
    """What to plan for, as the command line says it.

    Attributes:
        world_size: Ranks; by default as many as tp, ep and copies take.
        hardware: A name of :mod:`~qkov_dist.planning.hardware`; what is here by default.
        gpu_memory: GiB of each GPU, instead of the hardware's.
        host_memory: GiB of a node's own memory.
        ranks_per_node: Ranks that share a node.
        samples: Samples of each task, instead of reading them.
        tokens: Tokens of each sample.
    """

    world_size: int | None = None
    hardware: str | None = None
    gpu_memory: float | None = None
    host_memory: float | None = None
    ranks_per_node: int = 8
    samples: int | None = None
    tokens: int | None = None


def plan_run(config: RunConfig, machines: Machines, *, as_numbers: bool = False) -> RunPlan:
    """Print the plan of a configuration.

    Args:
        config: The run's configuration.
        machines: What to plan for.
        as_numbers: Print JSON instead of tables.

    Raises:
        QkovError: where the run would not fit: says by how much, and what would.
    """
    chosen = _hardware(machines)
    limits = _limits(machines, chosen)
    on_gpu = limits.gpu is not None
    least = max(config.parallel.tp, config.parallel.ep, config.parallel.cp) * config.parallel.replicate
    setting = Setting(config, machines.world_size or least)
    planner = Planner(config, machines.samples, machines.tokens, gpu_memory=limits.gpu)
    plan = planner.plan(setting)
    phases = expected(plan, chosen, machines.ranks_per_node) if chosen else []
    if as_numbers:
        print(json.dumps(_numbers(plan, phases, limits, planner.note), indent=1))
    else:
        notes = [planner.note, *size_notes(plan)]
        notes += assumptions(chosen) if chosen else ["time: name the hardware (--hardware) to have one expected"]
        for line in plan_lines(plan, phases, chosen.name if chosen else "", notes):
            print(line)
    if missing := shortages(plan, limits):
        raise _does_not_fit(setting, limits, planner, missing, on_gpu=on_gpu)
    if not as_numbers:
        print(f"fits in {limits_in_words(limits, on_gpu=on_gpu)}")
    return plan


def _hardware(machines: Machines) -> Hardware | None:
    """The hardware asked for; where only a GPU's memory is known, none."""
    if machines.hardware is not None:
        return hardware(machines.hardware)
    return None if machines.gpu_memory is not None else this_hardware()


def _limits(machines: Machines, chosen: Hardware | None) -> Limits:
    gpu = None if machines.gpu_memory is None else int(machines.gpu_memory * GIB)
    host = None if machines.host_memory is None else int(machines.host_memory * GIB)
    if chosen is not None and chosen.is_gpu:
        gpu = chosen.memory if gpu is None else gpu
    elif chosen is not None and host is None:
        host = chosen.memory
    return Limits(gpu, host, machines.ranks_per_node)


def _numbers(plan: RunPlan, phases: list[Phase], limits: Limits, note: str) -> dict[str, object]:
    missing = shortages(plan, limits)
    return {**as_json(plan, phases), "fits": not missing, "shortages": missing, "samples": note}


def _does_not_fit(setting: Setting, limits: Limits, planner: Planner, missing: list[str], *, on_gpu: bool) -> QkovError:
    ways = remedies(setting, limits, planner)
    remedy = "No more ranks, smaller batches or bfloat16 make it fit: use shorter samples or more memory."
    if ways:
        remedy = f"It fits with {'; or with '.join(ways)}."
    return QkovError(
        f"{setting.config.model.path} on {setting.num_ranks} rank{'s' if setting.num_ranks > 1 else ''}",
        expected=f"at most {limits_in_words(limits, on_gpu=on_gpu)}",
        got=", ".join(missing),
        remedy=remedy,
    )
