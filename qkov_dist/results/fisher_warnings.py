"""What a reader of the scores must know of the Fisher: heads that it hardly weighs or that have none, a loud task.

What to set instead follows from what is set now and from which of it exceeds I.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qkov_dist.scoring.score_kinds import KINDS

from .metadata import HeatmapMetadata

LOUD = 0.9  # from this fraction of I on, one task decides what the other is measured against
RIDGED = 0.5  # from this fraction of elements on, a head's scores are those of an unweighted product
RELATIVE = 1e-3  # the default of ridge.relative: a larger floor, in units of the mean of I, is what to take away
NOISE = 1e-12  # of the largest mean of I in a layer: squares of float32's rounding errors are about 1e-14 of squares
NORMAL, FAR = 1e-38, 1e-4  # the smallest that float32 holds with all digits; of the usual, elements that still count


Arrays = Mapping[str, np.ndarray]


def warnings_of(metadata: HeatmapMetadata, fisher: Mapping[str, Arrays]) -> list[str]:
    """One sentence for each thing that is so.

    Args:
        metadata: Axes, samples and settings.
        fisher: Block -> ``mean``, ``ridge_share`` and ``share_a``, [layer, native head].
    """
    found = []
    for block, parts in fisher.items():
        found += [*_ridged(metadata, block, parts), *_without(metadata, block, parts), *_tiny(metadata, block, parts)]
    return [*found, *_noise(metadata, fisher), *_loud_task(metadata, fisher)]


def _ridged(metadata: HeatmapMetadata, block: str, parts: Arrays) -> Iterator[str]:
    ridged = np.argwhere(parts["ridge_share"] > RIDGED)
    if not len(ridged):
        return
    worst = tuple(ridged[np.argmax(parts["ridge_share"][tuple(ridged.T)])])
    terms = _terms(metadata.attributes)
    mean = float(np.nanmean(parts["mean"][worst[0]]))  # of the layer's block, or of its selected heads
    yield (
        f"{block}: {_dominating(terms, mean)} exceeds I on more than half of the elements of {_heads(len(ridged))} "
        f"(most in layer {metadata.layers[worst[0]].layer}, head {metadata.axis(block)[worst[1]]}: "
        f"{parts['ridge_share'][worst]:.0%}); scores there are those of an unweighted product. "
        f"Set {_advice(terms, mean, metadata.attributes)}."
    )


def _heads(number: int) -> str:
    return f"{number} head{'' if number == 1 else 's'}"


def _terms(attributes: Mapping[str, Any]) -> dict[str, float]:
    """Epsilon, absolute and relative ridge as they are set, from `qkov run` or from Python."""
    config = attributes.get("config")
    section: Mapping[str, Any] = config.get("ridge", {}) if isinstance(config, Mapping) else {}
    from_python = {"epsilon": "epsilon", "absolute": "ridge_absolute", "relative": "ridge_relative"}
    found = {name: section.get(name, attributes.get(key, 0.0)) for name, key in from_python.items()}
    return {name: float(value) if isinstance(value, int | float) else 0.0 for name, value in found.items()}


def _dominating(terms: Mapping[str, float], mean: float) -> str:
    return "epsilon" if terms["epsilon"] > terms["absolute"] + terms["relative"] * mean else "lambda"


def _advice(terms: Mapping[str, float], mean: float, attributes: Mapping[str, Any]) -> str:
    """The settings under which I has its say."""
    in_python = {"epsilon": "epsilon", "absolute": "ridge_lambda", "relative": "ridge_relative"}
    named = {name: f"ridge.{name}" if "config" in attributes else in_python[name] for name in terms}
    unknown = not any(terms.values())
    changes = {name: 0.0 for name in ("epsilon", "absolute") if unknown or terms[name] > RELATIVE * mean}
    if not changes:
        changes["relative"] = terms["relative"] / 100
    elif not 0 < terms["relative"] <= RELATIVE:
        changes["relative"] = RELATIVE
    listed = [f"{named[name]}={value:g}" for name, value in changes.items()]
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)


def _without(metadata: HeatmapMetadata, block: str, parts: Arrays) -> Iterator[str]:
    still = np.argwhere(parts["mean"] == 0)
    if len(still):
        names = ", ".join(f"{metadata.layers[i].layer}.{metadata.axis(block)[h]}" for i, h in still[:5])
        yield f"{block}: every gradient of {_heads(len(still))} is zero (layer.head {names})."


def _tiny(metadata: HeatmapMetadata, block: str, parts: Arrays) -> Iterator[str]:
    """Where squares leave what float32 can hold; in float64 they are far from it."""
    config = metadata.attributes.get("config")
    compute = config.get("compute", {}) if isinstance(config, Mapping) else {}
    if compute.get("score_dtype", metadata.attributes.get("dtype")) == "float64":
        return
    of_squares, of_scores = smallest_fisher(str(metadata.attributes.get("score")))
    tiny = int(((parts["mean"] > 0) & (parts["mean"] < max(of_squares, of_scores))).sum())
    if tiny:
        least, lost = max((of_squares, "their squares"), (of_scores, "their scores"))
        yield (
            f"{block}: gradients of {_heads(tiny)} are so small (mean I below {least:g}) that float32 "
            f"loses digits of {lost}. Score in float64 (compute.score_dtype, or dtype in Python), or scale the loss."
        )


def smallest_fisher(score: str) -> tuple[float, float]:
    """The means of I below which float32 loses digits of squares, and of scores of this name, 0 where it never does.

    At the elements at which gradients are ``FAR`` of the usual, sqrt(I), squares are FAR^2 I and terms of a score of
    degree d FAR^d I^(d/2 - power).
    """
    kind = KINDS.get(score)  # type: ignore[call-overload]
    of_scores = 0.0
    if kind is not None and (exponent := kind.degree / 2 - kind.power) > 0:
        of_scores = (NORMAL / FAR**kind.degree) ** (1 / exponent)
    return NORMAL / FAR**2, of_scores


def _noise(metadata: HeatmapMetadata, fisher: Mapping[str, Arrays]) -> Iterator[str]:
    """Heads whose gradients are zero in theory: of Q and K in samples of two tokens, whose softmax is constant."""
    peaks = [np.fmax.reduce(parts["mean"], axis=1) for parts in fisher.values() if parts["mean"].size]
    if not peaks:
        return
    peak = np.fmax.reduce(peaks)[:, None]
    for block, parts in fisher.items():
        if noisy := int(((parts["mean"] > 0) & (parts["mean"] < NOISE * peak)).sum()):
            yield (
                f"{block}: gradients of {_heads(noisy)} are rounding errors beside the rest of their layer "
                f"(mean I below {NOISE:g} of its largest), and so are their scores. "
                "Samples of two tokens have none of Q and K."
            )


def _loud_task(metadata: HeatmapMetadata, fisher: Mapping[str, Arrays]) -> list[str]:
    """A sentence where a pooled Fisher is nearly that of one task: said once, with each block's median."""
    if metadata.attributes.get("scope", "pooled") != "pooled":
        return []
    fractions = {block: parts["share_a"][np.isfinite(parts["share_a"])] for block, parts in fisher.items()}
    medians = {block: float(np.median(fraction)) for block, fraction in fractions.items() if len(fraction)}
    for task in (0, 1):
        of_task = {block: median if task == 0 else 1 - median for block, median in medians.items()}
        if loud := {block: fraction for block, fraction in of_task.items() if fraction > LOUD}:
            listed = ", ".join(f"{block} {fraction:.0%}" for block, fraction in loud.items())
            return [
                f"task {metadata.tasks[task]!r} is loud: its gradients make up most of the pooled Fisher (median over "
                f"heads: {listed}). Scores and cross_mean depend on that; overlap compares the tasks free of it."
            ]
    return []
