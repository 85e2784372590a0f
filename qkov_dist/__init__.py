"""Which attention heads, in which projection (Q, K, V, O), two tasks fight over inside a language model.

    from qkov_dist import QKOVConfig, FisherCollector, QKOVInterferenceMetric, QKOVStatistics, load_heatmap

The engine from Python is :mod:`qkov_dist.collector` and :mod:`qkov_dist.metric`; the command line is ``qkov --help``.
A name is loaded when it is first used: what reads a file need not wait for torch and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acting.freeze import freeze_heads, scale_heads
    from .acting.trainer import FreezeHeadsCallback
    from .collector import FisherCollector, QKOVConfig
    from .errors import QkovError
    from .layout.resolve import register_layout
    from .metric import QKOVInterferenceMetric
    from .results.comparison import Comparison
    from .results.heatmap import Heatmap
    from .results.heatmap_file import load_heatmap
    from .results.matrix_file import load_matrix
    from .results.selection import Selection
    from .results.task_matrix import TaskMatrix
    from .stats.comparison import compare_runs
    from .stats.statistics import QKOVStatistics

__all__ = [
    "Comparison",
    "FisherCollector",
    "FreezeHeadsCallback",
    "Heatmap",
    "QKOVConfig",
    "QKOVInterferenceMetric",
    "QKOVStatistics",
    "QkovError",
    "Selection",
    "TaskMatrix",
    "compare_runs",
    "freeze_heads",
    "load_heatmap",
    "load_matrix",
    "register_layout",
    "scale_heads",
]

_HOMES = {  # the imports above once more, for when the program runs
    "Comparison": "results.comparison",
    "FisherCollector": "collector",
    "FreezeHeadsCallback": "acting.trainer",
    "Heatmap": "results.heatmap",
    "QKOVConfig": "collector",
    "QKOVInterferenceMetric": "metric",
    "QKOVStatistics": "stats.statistics",
    "QkovError": "errors",
    "Selection": "results.selection",
    "compare_runs": "stats.comparison",
    "TaskMatrix": "results.task_matrix",
    "freeze_heads": "acting.freeze",
    "load_heatmap": "results.heatmap_file",
    "load_matrix": "results.matrix_file",
    "register_layout": "layout.resolve",
    "scale_heads": "acting.freeze",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the next use finds it there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
