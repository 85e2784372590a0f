"""``qkov plan``: what would a run cost, before it runs?"""

from __future__ import annotations

import argparse

from .arguments import add_configuration, positive, positive_float

EXAMPLE = "qkov plan configs/node8.yaml model.path=builtin:llama-3-70b --world-size 8 --hardware H100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration, and what to plan for."""
    add_configuration(
        parser, "configuration; model.path may be builtin:llama-3-8b, -70b, -405b, or a JSON of a few facts"
    )
    parser.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help="ranks (default: what tp, ep, cp, replicate take)",
    )
    parser.add_argument(
        "--hardware", metavar="NAME", help="A100-40, A100-80, H100, H200, MI300X, L40S or cpu (measured)"
    )
    parser.add_argument("--gpu-memory", type=positive_float, metavar="GiB", help="of each GPU")
    parser.add_argument("--host-memory", type=positive_float, metavar="GiB", help="of a node beside its GPUs")
    parser.add_argument("--ranks-per-node", type=positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--samples", type=positive, metavar="N", help="samples of each task, instead of reading them")
    parser.add_argument("--tokens", type=positive, metavar="N", help="tokens of each sample")
    parser.add_argument("--json", action="store_true", help="print the numbers of every rank")


def execute(options: argparse.Namespace) -> None:
    """Show what a run would cost."""
    from qkov_dist.config_file import load_config

    config = load_config(options.config, options.overrides)
    from qkov_dist.planning.config_plan import Machines, plan_run

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
