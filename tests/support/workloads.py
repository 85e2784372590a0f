"""What plans are made of: the work of made-up samples on a model, without files."""

from __future__ import annotations

from zoo import TINY

from qkov_dist.config_file import from_dict
from qkov_dist.layout.resolve import resolve
from qkov_dist.planning.described import made_up_task
from qkov_dist.planning.model_sizes import model_sizes_of
from qkov_dist.planning.workload import Workload


def work_of(model, name: str, *, layers=None, num=8, tokens=13, on_gpu=False, **sections) -> Workload:
    """The work of made-up samples, without files."""
    layout = resolve(model)
    raw = {
        "model": {"path": "x"},
        "tasks": [{"name": task, "path": task} for task in "ab"],
        "metric": {"layers": layers},
        "compute": {"batch_tokens": 64},
        **sections,
    }
    tasks = made_up_task("a", num, tokens), made_up_task("b", num, tokens)
    objective = "masked" if TINY[name].masked_lm else "causal"
    config = from_dict(raw)
    size = config.compute.batch_tokens or 512
    return Workload(config, model_sizes_of(model, layout), layout, tasks, size, objective, on_gpu)
