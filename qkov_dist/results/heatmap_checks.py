"""What a stored heatmap must be beyond its types and shapes, so that what shows or tests it can rely on it.

Axes are numbers of layers and heads; attributes that have a meaning have their type; a test has one number for each
native head in every array. Other attributes, and other parts of ``statistics``, may be anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qkov_dist.errors import QkovError
from qkov_dist.values import FRACTION, Kind, as_it_is, one_of, whole, written

from .block_view import Ints
from .disk import DAMAGED
from .hdf5_read import check_values
from .head_slices import are_slices
from .heatmap import Heatmap

ABOVE_ALL = 2**31  # numbers of layers and heads
_MOST_DRAWN = 10**7  # labellings, which testing again would draw
_STATISTICS = ("cross_mean", "overlap")
_ALWAYS = {"statistic", "p_value", "q_value"}
_PAIRED = ({"ci_low", "ci_high"}, {"effect_low", "effect_high"}, {"null_mean", "null_low", "null_high"})
_BY_HEAD = _ALWAYS.union(*_PAIRED, {"effect_size", "p_greater", "p_less", "p_max", "q_value_by"})


_STRING = as_it_is("text", lambda value: isinstance(value, str))
_STRINGS = as_it_is(
    "a list of texts", lambda value: type(value) in (list, tuple) and all(isinstance(x, str) for x in value)
)
_DRAWN = as_it_is(f"a whole number up to {_MOST_DRAWN}", lambda value: type(value) is int and 0 <= value <= _MOST_DRAWN)
_MAPPING = as_it_is("a mapping", lambda value: isinstance(value, Mapping))


def _is_config(value: object) -> bool:
    """Whether this is text, or a mapping in which the sections that are looked at are mappings too."""
    sections = [value.get("model", {}), value.get("statistics", {})] if isinstance(value, Mapping) else []
    return isinstance(value, str | Mapping) and all(isinstance(section, Mapping) for section in sections)


_ATTRIBUTES: Mapping[str, Kind] = {
    **dict.fromkeys(("task_a", "task_b", "run_id", "score", "estimator", "scope"), _STRING),
    "config": as_it_is("text, or sections of settings", _is_config),
    "seeds": _MAPPING,
    "tasks": _STRINGS,
    "warnings": _STRINGS,
    "notes": _STRINGS,
    "slices": as_it_is("where heads lie, parameter by parameter", are_slices),
}
_CONFIGURED: Mapping[str, Kind] = {
    "permutations": _DRAWN,
    **dict.fromkeys(("fdr_alpha", "confidence"), FRACTION),
    "seed": whole(0),
}
_SETTINGS: Mapping[str, Kind] = {
    **dict.fromkeys(("fdr_alpha", "confidence", "power"), FRACTION),
    "n_permutations": _DRAWN,
    "seed": whole(0),
    "n_labellings": whole(1),
    "statistic": one_of(*_STATISTICS),
    "family": one_of("pair", "all"),
}


def check_stored(heatmap: Heatmap) -> None:
    """Prove that a heatmap from a file can be shown, tabulated and tested again.

    Raises:
        QkovError: at the axis, attribute or test that is not as it should be.
    """
    check_attributes({**heatmap.attributes, "task_a": heatmap.task_a, "task_b": heatmap.task_b})
    check_axes(heatmap.layers, heatmap.heads, heatmap.kv_heads, heatmap.groups)
    for block in heatmap.blocks:
        for name, scores in (("heatmap", heatmap.mean), ("scores", heatmap.cross), ("scores_all", heatmap.pooled)):
            if scores and any(np.isinf(of_layer).any() for of_layer in scores[block]):
                raise _wrong(f"{name}/{block}", "finite numbers, and NaN for absent heads", "infinity")
    if heatmap.statistics is not None:
        _check_statistics(heatmap, heatmap.statistics)


def check_axes(layers: tuple[int, ...], heads: tuple[int, ...], kv_heads: tuple[int, ...], groups: Ints) -> None:
    """Prove that axes are numbers of layers and heads."""
    for name, numbers in (("layer", layers), ("head", heads), ("kv_head", kv_heads)):
        if not all(0 <= number < ABOVE_ALL for number in numbers):
            raise _wrong(name, "numbers from 0", written(numbers))
    if not (groups > 0).all():
        raise _wrong("group", "at least one query head of a kv head", written(groups.tolist()))


def check_attributes(attributes: Mapping[str, Any], needed: Collection[str] = ()) -> None:
    """Prove that the attributes of a heatmap which have a meaning are of their type, and that some are there."""
    if missing := [name for name in needed if name not in attributes]:
        raise _wrong("attributes", f"the run's configuration and {', '.join(needed)}", f"no {', '.join(missing)}")
    check_values("attribute", attributes, _ATTRIBUTES)
    tasks, named = attributes.get("tasks", ()), [attributes[key] for key in ("task_a", "task_b") if key in attributes]
    if len(tasks) > 2 and not {*named} <= {*tasks}:
        raise _wrong("attribute tasks", f"{', '.join(named)} among them", written(tasks))
    if isinstance(config := attributes.get("config"), Mapping):
        check_values("attribute config.statistics", config.get("statistics", {}), _CONFIGURED)


def _check_statistics(heatmap: Heatmap, statistics: Mapping[str, Any]) -> None:
    kinds = {"settings": _MAPPING, "notes": _STRINGS, **dict.fromkeys(_STATISTICS, _MAPPING)}
    check_values("statistics", statistics, kinds)
    check_values("statistics/settings", statistics.get("settings", {}), _SETTINGS)
    for name in (name for name in _STATISTICS if name in statistics):
        for block in heatmap.blocks:
            _check_tests(f"statistics/{name}/{block}", statistics[name].get(block), heatmap.mean[block].shape)


def _check_tests(place: str, tests: object, shape: tuple[int, ...]) -> None:
    """One statistic of one block: what every test has, what comes in pairs, and a number for each head in each."""
    if not isinstance(tests, Mapping) or not tests.keys() >= _ALWAYS:
        raise _wrong(place, f"arrays {', '.join(sorted(_ALWAYS))}", "none, or not all")
    for together in _PAIRED:
        if (found := together & tests.keys()) and found != together:
            raise _wrong(place, f"all of {', '.join(sorted(together))}", ", ".join(sorted(found)))
    for name in sorted(_BY_HEAD & tests.keys()):
        if np.shape(tests[name]) != shape or np.asarray(tests[name]).dtype.kind != "f":
            raise _wrong(f"{place}/{name}", f"numbers of shape {shape}", written(tests[name]))


def _wrong(where: str, expected: str, got: str) -> QkovError:
    return QkovError(where, expected=expected, got=got, remedy=DAMAGED)
