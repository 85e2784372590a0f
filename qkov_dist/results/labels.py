"""What each array of a heatmap is, in words, as xarray and ArviZ have it: ``long_name``, ``units``, ``description``.

Units follow from the loss (``verdict_facts.UNITS``) and from the powers of gradients in a quantity: g is a change of
loss per unit of a weight, I and R its square. With ``metric.sample_scale: unit`` gradients, and all that is made of
them, are free of units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkov_dist.scoring.score_kinds import KINDS

from .verdict_facts import UNITS

NONE = "1"  # as udunits and CF have it
TEXT = "text"
_AXES = {
    "layer": ("layer", "number of the model's layer, from 0"),
    "head": ("query head", "number of the query head, from 0; of Q and O"),
    "kv_head": ("kv head", "number of the kv head, from 0; of K and V"),
    "sample_a": ("sample of A", "place among A's samples, in file order"),
    "sample_b": ("sample of B", "place among B's samples, in file order"),
    "sample": ("sample", "place among all samples, A's first"),
    "sample_right": ("right sample of a pair", "place among all samples, A's first"),
    "optimizer": ("optimizer", "whose step: sgd or adam"),
    "task": ("task", "whose loss changes, and whose samples are i"),
    "task_right": ("other task", "which is stepped on, and whose samples are j"),
}
_NAMES = ("optimizer", "task", "task_right")  # axes of names
_SAMPLES = {
    "id": ("id", TEXT, "as the task's file says"),
    "num_tokens": ("labelled tokens", NONE, "tokens whose loss counts"),
    "loss": ("loss", "loss", "the sample's own, at the present weights"),
    "text": ("text", TEXT, "empty where none was kept"),
    "content": ("content", TEXT, "hash of tokens and labels, by which copies are known"),
    "gradient_norm": ("gradient norm", "gradient", "over all scored weights; the gradient was divided by it"),
}
_FISHER = {
    "mean": ("mean Fisher", "square", "mean of I over the head's weights"),
    "min": ("least Fisher", "square", "least I of the head's weights"),
    "ridge_share": ("ridge share", NONE, "part of the head's weights where the ridge exceeds I"),
    "share_a": ("share of A", NONE, "part of the head's I that A's samples make up"),
}
_EFFECTS = {
    "change": (
        "change",
        "step",
        "first-order change of a task's loss by a unit step on the other; above 0 is harm",
    ),
    "standard_error": ("standard error of the change", "step", "over samples"),
    "ci_low": ("lower end of the change's interval", "step", "Student's t over samples"),
    "ci_high": ("upper end of the change's interval", "step", "Student's t over samples"),
    "p_value": ("p-value of the change", NONE, "two-sided, against 0"),
    "q_value": ("q-value of the change", NONE, "Benjamini-Hochberg over the native heads of the block"),
    "p_max": ("family-wise p-value of the change", NONE, "over all heads of all blocks"),
    "curvature_a": ("curvature of A's loss", "step2", "second-order rise by a squared unit step on B, diagonal Fisher"),
    "curvature_b": ("curvature of B's loss", "step2", "second-order rise by a squared unit step on A, diagonal Fisher"),
    "curvature_along_a": ("curvature of A's loss along the step", "step2", "by the whole Fisher, of a step on B"),
    "curvature_along_b": ("curvature of B's loss along the step", "step2", "by the whole Fisher, of a step on A"),
    "own_a": ("change of A's own loss", "step", "by a unit step on A, without self-pairs"),
    "own_b": ("change of B's own loss", "step", "by a unit step on B, without self-pairs"),
}
_TESTS = {
    "statistic": ("", "statistic", "as observed"),
    "ci_low": ("lower end of the interval", "statistic", "delete-one jackknife over samples"),
    "ci_high": ("upper end of the interval", "statistic", "delete-one jackknife over samples"),
    "null_mean": ("mean under exchanged labels", "statistic", "what the statistic is compared with"),
    "null_low": ("lower end of the null's band", "statistic", "under exchanged labels"),
    "null_high": ("upper end of the null's band", "statistic", "under exchanged labels"),
    "effect_size": ("effect size", NONE, "distance from the null's mean in its standard deviations"),
    "effect_low": ("lower end of the effect size's interval", NONE, "delete-one jackknife over samples"),
    "effect_high": ("upper end of the effect size's interval", NONE, "delete-one jackknife over samples"),
    "detectable": ("smallest detectable distance", "statistic", "from the null's mean, at this number of samples"),
    "detectable_sd": ("smallest detectable effect size", NONE, "at this number of samples"),
    "p_value": ("p-value", NONE, "over exchanged labels"),
    "p_greater": ("one-sided p-value, above", NONE, "over exchanged labels"),
    "p_less": ("one-sided p-value, below", NONE, "over exchanged labels"),
    "q_value": ("q-value", NONE, "Benjamini-Hochberg over the native heads of the block"),
    "q_value_by": ("q-value under dependence", NONE, "Benjamini-Yekutieli over the native heads of the block"),
    "p_max": ("family-wise p-value", NONE, "over all heads of all blocks"),
}
_STATISTICS = {"cross_mean": "mean score over pairs of A and B", "overlap": "overlap"}


@dataclass(frozen=True)
class Labels:
    """The words for the arrays of one heatmap, by its attributes.

    Attributes:
        attributes: As they are stored, with ``score``, ``task_a``, ``task_b``, ``config`` and ``sample_scale``.
    """

    attributes: Mapping[str, Any]

    def of_axis(self, name: str) -> dict[str, str]:
        """The attributes of a coordinate along its own dimension."""
        long_name, description = _AXES.get(name, (f"axis of {name[1:]}", "an axis of a test's array, without a name"))
        return labelled_as(long_name, TEXT if name in _NAMES else NONE, description)

    def of(self, path: str) -> dict[str, str]:
        """The attributes of an array by its path in the file, without the optimizer where it is an axis."""
        root, *rest = path.split("/")
        match root, rest:
            case "group", []:
                return labelled_as("query heads of a kv head", NONE, "by layer")
            case "samples", [task, key] if key in _SAMPLES:
                long_name, kind, description = _SAMPLES[key]
                return labelled_as(f"{long_name} of {self._task(task)}", self.unit(kind), description)
            case "heatmap", [block]:
                return labelled_as(
                    f"mean {self._score} of {block}", self.unit("score"), "over pairs of different samples"
                )
            case "present", [block]:
                return labelled_as(f"heads of {block}", NONE, "whether the layer has this head")
            case "fisher", [block, key] if key in _FISHER:
                return self._of_block(block, *_FISHER[key])
            case "effects", [block, key] if key in _EFFECTS:
                return self._of_block(block, *_EFFECTS[key])
            case "influences", [block]:
                return self._of_block(block, "influence on the change", "step", "what each sample has to do with it")
            case "own_shares", [block, "overlap"]:
                what = "by how much overlap would be another under a Fisher without the sample"
                return self._of_block(block, what, NONE, "own shares taken out, and scores with the sample left out")
            case "own_shares", [block, key]:
                side = "row" if key.startswith("rows") else "column"
                what = f"sum of a sample's {side} without its own share of the Fisher, as a multiple"
                return self._of_block(block, what, NONE, f"over the other samples of {self._task(key[-1])}")
            case "scores", [block]:
                return self._of_block(block, self._score, "score", "sample of A (i) against sample of B (j)")
            case "scores_all", [block]:
                long_name = f"{self._score} among all samples"
                return self._of_block(block, long_name, "score", "every sample (i) against every sample (j)")
            case "shared", [name, what]:
                long_name = f"{'mean ' if what == 'heatmap' else ''}{self._score} of {name.replace('_', ' ')}"
                return labelled_as(long_name, self.unit("score"), "of a parameter that belongs to no head")
            case "statistics", [statistic, block, key] if statistic in _STATISTICS and key in _TESTS:
                return self._of_test(statistic, block, *_TESTS[key])
        return labelled_as(" ".join(rest or [root]).replace("_", " "), NONE, "as a test stored it")

    def _of_block(self, block: str, long_name: str, kind: str, description: str) -> dict[str, str]:
        return labelled_as(f"{long_name} of {block}", self.unit(kind), description)

    def _of_test(self, statistic: str, block: str, long_name: str, kind: str, description: str) -> dict[str, str]:
        of = _STATISTICS[statistic]
        unit = self.unit("score" if statistic == "cross_mean" else NONE) if kind == "statistic" else kind
        return labelled_as(f"{long_name} of {of} of {block}" if long_name else f"{of} of {block}", unit, description)

    def _task(self, task: str) -> str:
        return str(self.attributes.get(f"task_{task}", task.upper()))

    @property
    def _score(self) -> str:
        return str(self.attributes.get("score", "score"))

    def unit(self, kind: str) -> str:
        """The unit of a kind of quantity: ``score``, ``step``, ``loss``, ..., or a unit itself."""
        loss, gradient = self._losses, NONE if self.attributes.get("sample_scale") == "unit" else self._losses
        score = KINDS.get(self.attributes.get("score"))  # type: ignore[arg-type]
        degree = 0 if score is None else score.degree - round(2 * score.power)
        return {
            "loss": loss,
            "gradient": _power(loss, 1),
            "square": _power(gradient, 2),
            "score": _power(gradient, degree),
            "step": f"{gradient} per unit step",
            "step2": f"{gradient} per squared unit step",
        }.get(kind, kind)

    @property
    def _losses(self) -> str:
        config = self.attributes.get("config")
        metric = config.get("metric", {}) if isinstance(config, Mapping) else {}
        return UNITS.get(metric.get("loss_reduction") if isinstance(metric, Mapping) else None, "nats")  # type: ignore[arg-type]


def _power(unit: str, degree: int) -> str:
    if degree == 0 or unit == NONE:
        return NONE
    return unit if degree == 1 else f"({unit})^{degree}"


def labelled_as(long_name: str, units: str, description: str) -> dict[str, str]:
    """The three attributes."""
    return {"long_name": long_name, "units": units, "description": description}
