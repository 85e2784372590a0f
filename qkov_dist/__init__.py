"""Which attention heads, in which projection (Q, K, V, O), two tasks fight over inside a language model.

    from qkov_dist import QKOVConfig, FisherCollector, QKOVInterferenceMetric, QKOVStatistics, load_heatmap

The engine from Python is :mod:`qkov_dist.collector` and :mod:`qkov_dist.metric`; the command line is ``qkov --help``.
"""

from __future__ import annotations

from .collector import FisherCollector, QKOVConfig
from .errors import QkovError
from .layout.resolve import register_layout
from .metric import QKOVInterferenceMetric
from .results.heatmap import Heatmap
from .results.heatmap_file import load_heatmap
from .stats.statistics import QKOVStatistics

__all__ = [
    "FisherCollector",
    "Heatmap",
    "QKOVConfig",
    "QKOVInterferenceMetric",
    "QKOVStatistics",
    "QkovError",
    "load_heatmap",
    "register_layout",
]
