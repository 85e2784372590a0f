"""Which attention heads, in which projection (Q, K, V, O), two tasks fight over inside a language model.

    from qkov_dist import QKOVConfig, FisherCollector, QKOVInterferenceMetric, QKOVStatistics, load_heatmap

See :mod:`qkov_dist.collector` and :mod:`qkov_dist.metric` for the engine from Python and ``qkov --help`` for the command line.
"""

from .collector import FisherCollector, QKOVConfig
from .errors import QkovError
from .layout import register_layout
from .metric import QKOVInterferenceMetric
from .results import Heatmap
from .statistics import QKOVStatistics
from .store import load_heatmap

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
