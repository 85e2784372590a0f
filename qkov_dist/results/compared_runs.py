"""What runs must have in common to be compared head by head, and in what they may differ.

The same layers, native heads, blocks and tasks in the same order: without these a head of one run is not that head of
the other, and the runs are refused. Model weights, samples, score and Fisher may differ; each is told, with what
follows: other samples make errors unpaired; another score, Fisher or loss makes values of another kind, of which only
ranks are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qkov_dist.errors import QkovError

from .heatmap import Heatmap
from .heatmap_data import SampleTable

QUANTITIES = ("change_adam", "change_sgd", "relative_adam", "relative_sgd", "overlap", "cross_mean", "score_mean")
OF_ADAM, OF_SCORES = ("change_adam", "relative_adam"), ("overlap", "cross_mean", "score_mean")
SAME_LOSS = 1e-3  # relative: dtypes and batches move a loss by less, another checkpoint by more
_ARRAYS_OF_MODEL = ("path", "revision", "dtype", "attn_implementation")

# Settings of one meaning, by their names in a run's configuration and in a file that Python made; and what becomes
# values of another kind where they differ.
_SETTINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "metric.score": (("score",), OF_SCORES),
    "metric.sample_scale": (("sample_scale",), QUANTITIES),
    "metric.loss_reduction": (("loss_reduction",), QUANTITIES),
    "metric.include_bias": (("include_bias",), QUANTITIES),
    "fisher.estimator": (("estimator",), (*OF_ADAM, *OF_SCORES)),
    "fisher.scope": (("scope",), (*OF_ADAM, *OF_SCORES)),
    "fisher.decay": (("decay",), (*OF_ADAM, *OF_SCORES)),
    "fisher.batch_size": ((), (*OF_ADAM, *OF_SCORES)),
    "ridge.epsilon": (("epsilon",), (*OF_ADAM, *OF_SCORES)),
    "ridge.absolute": (("ridge_absolute",), (*OF_ADAM, *OF_SCORES)),
    "ridge.relative": (("ridge_relative",), (*OF_ADAM, *OF_SCORES)),
}
_OF_MOVING_AVERAGE = ("fisher.decay", "fisher.batch_size")


@dataclass(frozen=True)
class RunHeader:
    """What of a run says whether and how it can be compared; its arrays are not kept.

    Attributes:
        name: By which the comparison calls it.
        run_id: Hash of what it follows from; "" where nobody said.
        tasks: Names of A and B.
        layers: Model layer numbers.
        natives: Block -> native head numbers.
        present: Block -> whether the layer has this head, bool [layer, native head].
        samples: The samples of A and of B.
        model: What is said of the model: path, revision, dtype, type, fingerprint.
        shapes: Parameter -> shape of all that heads lie in; empty where the file does not say.
        settings: ``section.key`` -> value, as far as the file says.
        beside: Names of other tasks of the run, whose samples are in its Fisher.
        alpha: Level of its tests.
    """

    name: str
    run_id: str
    tasks: tuple[str, str]
    layers: tuple[int, ...]
    natives: Mapping[str, tuple[int, ...]]
    present: Mapping[str, npt.NDArray[np.bool_]]
    samples: tuple[SampleTable, SampleTable]
    model: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any]
    beside: tuple[str, ...]
    alpha: float


@dataclass(frozen=True)
class Differences:
    """In what runs differ, and what follows.

    Attributes:
        found: What differs, a few words each.
        notes: What follows from it, a sentence each.
        paired: Whether all runs are of the same samples.
        of_another_kind: Quantities of which only ranks are compared.
    """

    found: tuple[str, ...]
    notes: tuple[str, ...]
    paired: bool
    of_another_kind: frozenset[str]


def header_of(heatmap: Heatmap, name: str) -> RunHeader:
    """What a comparison has to know of a heatmap besides its values."""
    attributes, config = heatmap.attributes, heatmap.attributes.get("config")
    sections = config if isinstance(config, Mapping) else {}
    model = {key: value for key, value in sections.get("model", {}).items() if key in _ARRAYS_OF_MODEL}
    slices = attributes.get("slices", ())
    return RunHeader(
        name,
        heatmap.run_id,
        (heatmap.task_a, heatmap.task_b),
        heatmap.layers,
        {block: heatmap.natives(block) for block in heatmap.blocks},
        heatmap.present,
        (heatmap.samples_a, heatmap.samples_b),
        {
            **model,
            "type": str(attributes.get("model_type", "")),
            "fingerprint": str(attributes.get("model_fingerprint", "")),
        },
        {record["parameter"]: tuple(record["shape"]) for record in slices},
        _settings(sections, attributes),
        tuple(sorted(_task_names(sections) - {heatmap.task_a, heatmap.task_b})),
        heatmap.fdr_alpha,
    )


def _task_names(sections: Mapping[str, Any]) -> set[str]:
    tasks = sections.get("tasks", ())
    known = [task for task in tasks if isinstance(task, Mapping)] if isinstance(tasks, list) else []
    return {str(task["name"]) for task in known if "name" in task}


def _settings(sections: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, (names, _) in _SETTINGS.items():
        section, _, name = key.partition(".")
        known = [attributes[other] for other in names if other in attributes]
        configured = sections.get(section, {})
        if known or (isinstance(configured, Mapping) and name in configured):
            found[key] = known[0] if known else configured[name]
    if found.get("fisher.estimator") == "mean":
        found = {key: value for key, value in found.items() if key not in _OF_MOVING_AVERAGE}
    return found


def refuse_unlike(first: RunHeader, other: RunHeader) -> None:
    """Refuse two runs whose heads are not the same heads, or whose tasks are not the same two.

    Raises:
        QkovError: that says what differs and why the runs cannot be compared.
    """
    whose = f"compare {other.name} with {first.name}"
    if other.tasks != first.tasks:
        turned = other.tasks == first.tasks[::-1]
        remedy = (
            "What A's samples do to B is not what B's do to A: list the tasks of both runs in the same order."
            if turned
            else "Effects and scores are those of one pair of tasks: give the tasks of both runs the same names."
        )
        raise QkovError(whose, expected=f"tasks {_listed(first.tasks)}", got=_listed(other.tasks), remedy=remedy)
    kinds = [run.model["type"] for run in (first, other)]
    if all(kinds) and kinds[0] != kinds[1]:
        raise _other_heads(whose, f"a model of type {kinds[0]}", kinds[1])
    if other.layers != first.layers:
        raise _other_heads(whose, f"layers {_numbers(first.layers)}", _numbers(other.layers))
    if tuple(other.natives) != tuple(first.natives):
        raise _other_heads(whose, f"blocks {', '.join(first.natives)}", ", ".join(other.natives))
    for block, heads in first.natives.items():
        if other.natives[block] != heads:
            raise _other_heads(whose, f"{block} heads {_numbers(heads)}", _numbers(other.natives[block]))
        if (at := np.argwhere(first.present[block] != other.present[block])).size:
            name = f"{block} {first.layers[at[0][0]]}.{heads[at[0][1]]}"
            has = ("a layer with", "one without")[:: 1 if first.present[block][tuple(at[0])] else -1]
            raise _other_heads(whose, f"{has[0]} {name}", has[1])
    for parameter in first.shapes.keys() & other.shapes.keys():
        if first.shapes[parameter] != other.shapes[parameter]:
            shape, got = first.shapes[parameter], other.shapes[parameter]
            raise _other_heads(whose, f"{parameter} of shape {list(shape)}", f"{list(got)}")


def _other_heads(whose: str, expected: str, got: str) -> QkovError:
    remedy = (
        "A head of one run would not be that head of the other: compare runs of one architecture, with the same "
        "metric.layers and metric.heads."
    )
    return QkovError(whose, expected=expected, got=got, remedy=remedy)


def same_order(first: SampleTable, other: SampleTable) -> npt.NDArray[np.intp] | None:
    """Where each sample of the first stands in the other; None where they are not the same samples, or not known."""
    if "" in (*first.contents, *other.contents) or sorted(first.contents) != sorted(other.contents):
        return None
    order = np.empty(len(first), np.intp)
    order[np.argsort(first.contents, kind="stable")] = np.argsort(other.contents, kind="stable")
    return order


def differences(runs: Sequence[RunHeader]) -> Differences:
    """In what runs differ that can be compared."""
    found, notes, of_another_kind = list(_of_model(runs)), [], set()
    for key, (_, concerned) in _SETTINGS.items():
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values):
            found.append(f"{key} ({_said(values)})")
            of_another_kind |= set(concerned)
    besides = {run.beside for run in runs}
    if len(besides) > 1:
        found.append(f"tasks beside the pair ({'; '.join(sorted(', '.join(of_run) or 'none' for of_run in besides))})")
        of_another_kind |= {*OF_ADAM, *OF_SCORES}
    if of_another_kind:
        names = ", ".join(name for name in QUANTITIES if name in of_another_kind)
        notes.append(f"Settings differ, so that values are of another kind: only ranks are compared of {names}.")
    unlike = [place for place in (0, 1) if not _same_samples(runs, place)]
    for place in unlike:
        found.append(f"samples of {runs[0].tasks[place]!r} ({_shared(runs, place)})")
    if unlike:
        notes.append(
            "Samples differ: errors are unpaired, those of both runs add up. Runs on the same samples find smaller "
            "moves."
        )
    return Differences(tuple(found), tuple(notes), not unlike, frozenset(of_another_kind))


def _same_samples(runs: Sequence[RunHeader], place: int) -> bool:
    return all(same_order(runs[0].samples[place], run.samples[place]) is not None for run in runs[1:])


def _shared(runs: Sequence[RunHeader], place: int) -> str:
    """How many samples of a task all runs have."""
    if any("" in run.samples[place].contents for run in runs):
        return "the files do not say which they are"
    common = set.intersection(*(set(run.samples[place].contents) for run in runs))
    sizes = ", ".join(str(len(run.samples[place])) for run in runs)
    return f"{len(common)} in all runs, of {sizes}"


def _of_model(runs: Sequence[RunHeader]) -> list[str]:
    """What differs of the model: what the configurations say, and its weights, by fingerprints, or else by losses."""
    found = []
    for key in _ARRAYS_OF_MODEL:
        values = [run.model.get(key) for run in runs]
        if any(value != values[0] for value in values):
            found.append(f"model.{key} ({_said(values)})")
    fingerprints = [run.model["fingerprint"] for run in runs]
    if all(fingerprints):
        if len(set(fingerprints)) > 1:
            found.insert(0, f"model weights (fingerprints {', '.join(of[:8] for of in dict.fromkeys(fingerprints))})")
        return found
    apart = max((_loss_apart(runs[0], run) for run in runs[1:]), default=0.0)
    if apart > SAME_LOSS:
        found.insert(0, f"model weights (losses of the same samples differ by up to {apart:.2g} of themselves)")
    return found


def _loss_apart(first: RunHeader, other: RunHeader) -> float:
    """The largest relative difference of a sample's loss between two runs that both have it; 0 without any."""
    if first.settings.get("metric.loss_reduction") != other.settings.get("metric.loss_reduction"):
        return 0.0
    largest = 0.0
    for one, another in zip(first.samples, other.samples, strict=True):
        known = dict(zip(another.contents, another.losses, strict=True))
        for content, loss in zip(one.contents, one.losses, strict=True):
            if content and content in known and np.isfinite(loss):
                largest = max(largest, abs(loss - known[content]) / max(abs(loss), abs(known[content]), 1e-12))
    return float(largest)


def _said(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys("not said" if value is None else str(value) for value in values))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _numbers(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 0-11, 13."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{low}-{high}" if low != high else f"{low}" for low, high in parts)
