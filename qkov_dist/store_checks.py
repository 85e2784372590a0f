"""What a stored heatmap must be beyond its types and shapes, so that all that shows it can rely on it.

Axes are different numbers of layers and heads; scores are finite where a head is present; attributes that have a
meaning have their type; a test has one number for each native head in every array. Other attributes and other parts of
``statistics`` may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .errors import QkovError
from .results import Heatmap

_HIGHEST = 2**31
_LARGEST = float(np.finfo(np.float32).max)
_STATISTICS = ("cross_mean", "overlap")
_ALWAYS = {"statistic", "p_value", "q_value"}
_TOGETHER = ({"ci_low", "ci_high"},)
_BY_HEAD = {"effect_size", "p_greater", "p_less", "p_max", "q_value_by"}.union(_ALWAYS, *_TOGETHER)


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _is_fraction(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


Rule = tuple[str, Callable[[Any], bool]]

_TEXT: Rule = ("text", lambda value: isinstance(value, str))
_TEXTS: Rule = ("a list of texts", _is_texts)
_MAPPING: Rule = ("a mapping", lambda value: isinstance(value, Mapping))
_FRACTION: Rule = ("a number between 0 and 1", _is_fraction)
_COUNT: Rule = ("a whole number of at least 0", _is_count)
_POSITIVE: Rule = ("a whole number of at least 1", lambda value: _is_count(value) and value > 0)
_NAME: Rule = ("one of cross_mean, overlap", lambda value: value in _STATISTICS)

_ATTRIBUTES: Mapping[str, Rule] = {
    "run_id": _TEXT,
    "score": _TEXT,
    "estimator": _TEXT,
    "scope": _TEXT,
    "model_type": _TEXT,
    "seeds": _MAPPING,
    "warnings": _TEXTS,
    "notes": _TEXTS,
}
_SETTINGS: Mapping[str, Rule] = {
    "fdr_alpha": _FRACTION,
    "confidence": _FRACTION,
    "power": _FRACTION,
    "n_permutations": _COUNT,
    "n_bootstrap": _COUNT,
    "seed": _COUNT,
    "n_labellings": _POSITIVE,
    "n_a": _COUNT,
    "n_b": _COUNT,
    "statistic": _NAME,
    "alternative": _TEXT,
    "method": _TEXT,
    "exactly_exchangeable": ("true or false", lambda value: isinstance(value, bool)),
}


def check_stored(heatmap: Heatmap) -> None:
    """Prove that a heatmap from a file can be shown, tabulated and tested again.

    Raises:
        QkovError: at the axis, array, attribute or test that is not as it should be.
    """
    for name, value in (("task_a", heatmap.task_a), ("task_b", heatmap.task_b)):
        _check(name, {name: value}, {name: _TEXT})
    for name, numbers in (("layer", heatmap.layers), ("head", heatmap.heads), ("kv_head", heatmap.kv_heads)):
        if len(set(numbers)) < len(numbers) or not all(0 <= number < _HIGHEST for number in numbers):
            raise _wrong(name, "different numbers from 0", "others")
    if not ((heatmap.groups > 0) & (heatmap.groups < _HIGHEST)).all():
        raise _wrong("group", "at least one query head of a kv head", "less")
    for place, array in _scores(heatmap):
        _check_finite(place, array)
    _check("attribute", heatmap.attributes, _ATTRIBUTES)
    if heatmap.statistics is not None:
        _check_statistics(heatmap, heatmap.statistics)


def _scores(heatmap: Heatmap) -> Iterator[tuple[str, Any]]:
    for block in heatmap.blocks:
        yield f"heatmap/{block}", heatmap.mean[block][heatmap.present[block]]
        for name, scores in (("scores", heatmap.cross), ("scores_all", heatmap.pooled)):
            if scores is not None:
                yield from ((f"{name}/{block}", layer[mask]) for layer, mask in _by_layer(heatmap, scores, block))
        for key, values in heatmap.fisher[block].items():
            yield f"fisher/{block}/{key}", values[np.isfinite(values) == np.isinf(values)]
    for table in (heatmap.samples_a, heatmap.samples_b):
        yield "samples", table.losses
