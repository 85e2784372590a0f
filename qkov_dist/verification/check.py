"""What ``qkov check`` does: the six properties on a user's model, as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from tabulate import tabulate

from qkov_dist.config import MetricConfig, ModelConfig, TaskConfig
from qkov_dist.data.batches import Objective
from qkov_dist.data.samples import Sample
from qkov_dist.data.tasks import load_task
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout
from qkov_dist.layout.modules import text_config
from qkov_dist.layout.proof import prove_candidates
from qkov_dist.layout.resolve import candidates, known_family, resolve
from qkov_dist.loading.models import LoadedModel, load_model
from qkov_dist.scoring.tiles import Selection

from .examined_model import ExaminedModel
from .properties import run_checks
from .property_result import PropertyResult

TASKS = ("arithmetic", "python")


def check(
    config: ModelConfig, *, samples: int, max_tokens: int, layers: str | None, say: Callable[[str], object]
) -> None:
    """Measure the six properties and print them.

    Args:
        config: The model.
        samples: Samples of each task.
        max_tokens: Samples are cut after so many tokens.
        layers: Layers to score, as in ``metric.layers``; the first, middle and last by default.
        say: Takes one line about each stage.

    Raises:
        QkovError: for a model that cannot be read or run, and where a property does not hold.
    """
    say(f"loading {config.path}")
    loaded = load_model(config)
    for line in loaded.remarks:
        say(line)
    layout = _layout(loaded)
    chosen = Selection(MetricConfig(layers=layers).layers or _spread(layout)).layers_of(layout)  # type: ignore[arg-type]
    a, b = (_samples(loaded, name, samples, max_tokens, seed) for seed, name in enumerate(TASKS))
    examined = ExaminedModel(
        loaded.model, layout, a, b, tuple(layer.index for layer in chosen), cast(Objective, loaded.objective)
    )
    results = []
    for result in run_checks(examined):
        say(f"{result.check}: {result.what}")
        results.append(result)
    print(f"\n{layout.model_type}, layers {list(examined.layers)}, {samples} + {samples} samples\n")
    print(tabulate([_row(result) for result in results], headers="keys", disable_numparse=True))
    if broken := [result for result in results if result.holds is False]:
        raise QkovError(
            "qkov check",
            expected="all six properties to hold",
            got=f"{len(broken)} broken: " + "; ".join(f"{f.check}: {f.what} {f.note}".strip() for f in broken),
            remedy="Do not trust scores of this model; report its architecture, or register its layout.",
        )
    print("\nall six properties hold" + _unjudged(results))


def _unjudged(results: list[PropertyResult]) -> str:
    judged = {result.check for result in results if result.holds}
    left = [check for check in dict.fromkeys(result.check for result in results) if check not in judged]
    return f", as far as they apply ({', '.join(left)}: not on this model)" if left else ""


def _layout(loaded: LoadedModel) -> Layout:
    """A known layout as it stands (check 5 will prove every layer), or the one that the model itself proves."""
    if known_family(text_config(loaded.model)) is None:
        return prove_candidates(loaded.model, candidates(loaded.model))
    return resolve(loaded.model)


def _spread(layout: Layout) -> tuple[int, ...]:
    """The first, middle and last layer with attention."""
    indices = [layer.index for layer in layout.layers]
    return tuple(dict.fromkeys((indices[0], indices[len(indices) // 2], indices[-1])))


def _samples(loaded: LoadedModel, name: str, count: int, max_tokens: int, seed: int) -> tuple[Sample, ...]:
    """Samples of a built-in task; random tokens where the model has no tokenizer or needs labels of its own."""
    if loaded.tokenizer is not None and loaded.objective == "causal":
        task = TaskConfig(name=name, path=f"builtin:{name}", max_samples=count, max_tokens=max_tokens)
        return load_task(
            task, loaded.tokenizer, vocab_size=loaded.vocab_size, max_positions=loaded.max_positions
        ).samples
    rng = np.random.default_rng(seed)
    longest = min(max_tokens, loaded.max_positions or max_tokens)
    lengths = rng.integers(max(longest // 2, 2), longest + 1, size=count)
    ids = [rng.integers(loaded.vocab_size // 4, loaded.vocab_size, size=length) for length in lengths]
    return tuple(Sample(f"{name}-{n}", row, row.copy(), "") for n, row in enumerate(ids))


def _row(result: PropertyResult) -> dict[str, str]:
    verdict = {True: "holds", False: "BROKEN", None: "-"}[result.holds]
    return {
        "check": result.check,
        "measured": result.what,
        "deviation": "-" if result.deviation is None else f"{result.deviation:.2g}",
        "at most": "-" if result.bound is None else f"{result.bound:.2g}",
        "result": verdict,
        "note": result.note[:100],
    }
