"""``qkov plan``: what a run would hold, move and compute on ranks that need not be there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qkov_dist.config import RunConfig
from qkov_dist.distributed.parallelism import Parallelism, resolve_parallelism
from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import is_masked_lm
from qkov_dist.layout.resolve import resolve
from qkov_dist.planning.described import described_model, described_tasks
from qkov_dist.planning.hardware import Hardware, hardware, this_hardware
from qkov_dist.planning.model_sizes import Anatomy, anatomy_of
from qkov_dist.planning.remedies import Limits, Setting, limits_in_words, remedies, shortages
from qkov_dist.planning.run_plan import MIB, RunPlan, least_peak, plan_pretended
from qkov_dist.planning.table import as_json, plan_lines, size_notes
from qkov_dist.planning.time_model import Phase, assumptions, expected
from qkov_dist.planning.workload import Workload

from .arguments import Commands, _add, _positive, _positive_float

GIB = 2**30


@dataclass(frozen=True)
class Machines:
    """What to plan for, as the command line says it.

    Attributes:
        world_size: Ranks; ``parallel.tp`` by default.
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


def plan_run(
    config: RunConfig, machines: Machines, *, as_numbers: bool = False, show: Callable[[str], object] = print
) -> RunPlan:
    """Print the plan of a configuration.

    Args:
        config: The run's configuration.
        machines: What to plan for.
        as_numbers: Print JSON instead of tables.
        show: Takes what is printed.

    Raises:
        QkovError: where the run would not fit: says by how much, and what would.
    """
    chosen = _hardware(machines)
    limits = _limits(machines, chosen)
    on_gpu = limits.gpu is not None
    setting = Setting(config, machines.world_size or config.parallel.tp)
    planner = ConfigPlanner(config, machines, gpu_memory=limits.gpu)
    plan = planner.plan(setting)
    phases = expected(plan, chosen, machines.ranks_per_node) if chosen else []
    if as_numbers:
        show(json.dumps(_numbers(plan, phases, limits, planner.note), indent=1))
    else:
        notes = [planner.note, *size_notes(plan)]
        notes += assumptions(chosen) if chosen else ["time: name the hardware (--hardware) to have one expected"]
        for line in plan_lines(plan, phases, chosen.name if chosen else "", notes):
            show(line)
    if missing := shortages(plan, limits):
        raise _does_not_fit(setting, limits, planner, missing, on_gpu=on_gpu)
    if not as_numbers:
        show(f"fits in {limits_in_words(limits, on_gpu=on_gpu)}")
    return plan


class ConfigPlanner:
    """Makes plans of one model and its tasks, as far as their descriptions go (a ``planning.remedies.Planner``).

    Args:
        config: Names the model and the tasks.
        machines: Sizes of samples, where they are given.
        gpu_memory: Bytes of the GPU that each rank has; None where ranks have none.

    Attributes:
        note: How the samples were found.

    Raises:
        QkovError: for a model or tasks that cannot be described.
    """

    def __init__(self, config: RunConfig, machines: Machines, *, gpu_memory: int | None) -> None:
        self._on_gpu, self._gpu_memory, self._anatomies = gpu_memory is not None, gpu_memory, dict[str, Anatomy]()
        self._model = described_model(config.model)
        self._recomputes = config.model.attn_implementation != "eager"
        self._layout = resolve(self._model)
        self._tasks, self.note = described_tasks(config, self._model, machines.samples, machines.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(sample.num_tokens for task in self._tasks for sample in task.samples)

    def batch_tokens(self, setting: Setting) -> int:
        """Padded tokens in one batch."""
        num_parameters = self._anatomy(setting.config.model.dtype).num_parameters
        return _parallelism(setting).batch_tokens(
            setting.config.compute, on_gpu=self._on_gpu, num_parameters=num_parameters
        )

    def plan(self, setting: Setting) -> RunPlan:
        """The whole plan."""
        return plan_pretended(self._work(setting), _parallelism(setting))

    def least(self, setting: Setting) -> int:
        """Bytes that a rank holds at least while it runs its samples."""
        return least_peak(self._work(setting), _parallelism(setting))

    def _anatomy(self, dtype: str) -> Anatomy:
        if dtype not in self._anatomies:
            found = anatomy_of(self._model, self._layout, dtype)
            self._anatomies[dtype] = replace(found, recomputes=self._recomputes)
        return self._anatomies[dtype]

    def _work(self, setting: Setting) -> Workload:
        config, disk = setting.config, setting.config.compute.factor_disk_mb
        return Workload(
            config=config,
            anatomy=self._anatomy(config.model.dtype),
            layout=self._layout,
            tasks=self._tasks,
            batch_tokens=self.batch_tokens(setting),
            objective="masked" if is_masked_lm(self._model) else "causal",
            on_gpu=self._on_gpu,
            gpu_memory=self._gpu_memory,
            workers=1 if self._on_gpu else torch.get_num_threads(),
            disk=None if disk is None else disk * MIB,
        )


def _parallelism(setting: Setting) -> Parallelism:
    return resolve_parallelism(setting.config.parallel, setting.num_ranks, {})


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


def _does_not_fit(
    setting: Setting, limits: Limits, planner: ConfigPlanner, missing: list[str], *, on_gpu: bool
) -> QkovError:
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


def _add_plan(group: Commands) -> None:
    parser = _add(
        group,
        "plan",
        plan_command,
        "Show what a run would hold, send and compute on each rank, and how long it should take; no weights are read.",
        "qkov plan configs/node8.yaml model.path=builtin:llama-3-70b --world-size 8 --hardware H100",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG.yaml",
        help="configuration; model.path may be builtin:llama-3-8b, or a JSON of a few facts",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--world-size", type=_positive, metavar="N", help="ranks (default: parallel.tp)")
    parser.add_argument(
        "--hardware", metavar="NAME", help="A100-40, A100-80, H100, H200, MI300X, L40S or cpu (measured)"
    )
    parser.add_argument("--gpu-memory", type=_positive_float, metavar="GiB", help="of each GPU")
    parser.add_argument("--host-memory", type=_positive_float, metavar="GiB", help="of a node beside its GPUs")
    parser.add_argument("--ranks-per-node", type=_positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--samples", type=_positive, metavar="N", help="samples of each task, instead of reading them")
    parser.add_argument("--tokens", type=_positive, metavar="N", help="tokens of each sample")
    parser.add_argument("--json", action="store_true", help="print the numbers of every rank")


def plan_command(options: argparse.Namespace) -> None:
    """Show what a run would cost."""
    from qkov_dist.config_file import load_config

    config = load_config(options.config, options.overrides)
    machines = Machines(
        world_size=options.world_size,
        hardware=options.hardware,
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        ranks_per_node=options.ranks_per_node,
        samples=options.samples,
        tokens=options.tokens,
    )
    plan_run(config, machines, as_numbers=options.json)
