"""What ``qkov validate`` does: do scores predict what a step on one task does to the other? A table for one model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from tabulate import tabulate

from qkov_dist.config import ModelConfig, TaskConfig
from qkov_dist.console import Console
from qkov_dist.data.batches import Objective
from qkov_dist.data.samples import Sample
from qkov_dist.data.tasks import load_task
from qkov_dist.errors import QkovError
from qkov_dist.layout.proof import resolve_proved
from qkov_dist.loading.models import LoadedModel, load_model

from .agreement import Agreement, agreements
from .effects import HeadEffect, measure, sample_targets
from .examined_model import ExaminedModel

MAX_LAYERS = 10


def validate(
    config: ModelConfig,
    *,
    tasks: tuple[str, str],
    samples: int,
    max_tokens: int,
    heads: int,
    steps: Sequence[float],
    bootstrap: int,
    seed: int,
    output: str | None,
    console: Console,
) -> None:
    """Measure and print.

    Args:
        config: The model.
        tasks: Paths of A and of B, as in a configuration.
        samples: Samples of each task.
        max_tokens: Samples are cut after so many tokens.
        heads: How many heads to step in.
        steps: Step sizes.
        bootstrap: Resamples of heads for the intervals.
        seed: Of the choice of heads and the resamples.
        output: A JSON file to write all numbers to.
        console: Hears of each stage, and shows how far it is.

    Raises:
        QkovError: for a model or task that cannot be read or run, or weights that cannot be changed.
    """
    console.say(f"loading {config.path}")
    loaded = load_model(config)
    for line in loaded.remarks:
        console.say(line)
    layout = resolve_proved(loaded.model)
    indices = [layer.index for layer in layout.layers]
    count = min(len(indices), max(-(-heads // 4), 1), MAX_LAYERS)
    layers = tuple(indices[place * (len(indices) - 1) // max(count - 1, 1)] for place in range(count))
    a, b = (_samples(loaded, path, samples, max_tokens, console) for path in tasks)
    examined = ExaminedModel(loaded.model, layout, a, b, layers, cast(Objective, loaded.objective))
    targets = sample_targets(examined, heads, seed)
    console.say(f"one step of {tasks[1]} in each of {len(targets)} heads, measured on {tasks[0]}")
    with console.bar("stepping", len(targets), "head") as advance:
        effects = measure(examined, targets, steps, advance)
    rows = agreements(effects, steps, resamples=bootstrap, seed=seed)
    _print(tasks, layers, effects, rows)
    if output:
        _write(Path(output), effects, rows)


def _samples(loaded: LoadedModel, path: str, count: int, max_tokens: int, console: Console) -> tuple[Sample, ...]:
    task = TaskConfig(name=path, path=path, max_samples=count, max_tokens=max_tokens)
    limits = {"vocab_size": loaded.vocab_size, "max_positions": loaded.max_positions, "objective": loaded.objective}
    found = load_task(task, loaded.tokenizer, **limits)  # type: ignore[arg-type]
    for warning in found.warnings:
        console.say(f"warning: {warning}")
    return found.samples


def _print(
    tasks: tuple[str, str], layers: Sequence[int], effects: Sequence[HeadEffect], rows: Sequence[Agreement]
) -> None:
    print(f"\nA = {tasks[0]}, B = {tasks[1]}: {len(effects)} heads of layers {list(layers)}")
    print("Spearman rank correlation with the change of A's loss after one gradient step on B in that head alone")
    for step in dict.fromkeys(row.step for row in rows):
        place = list(dict.fromkeys(row.step for row in rows)).index(step)
        changes = [effect.changes[place] for effect in effects]
        print(f"\nstep {step:g}: changes from {min(changes):+.2g} to {max(changes):+.2g}\n")
        print(tabulate([_shown(row) for row in rows if row.step == step], headers="keys", disable_numparse=True))
    print(f"\n{_verdict(rows)}")


def _shown(row: Agreement) -> dict[str, str]:
    return {
        "measured": row.measured,
        "predictor": row.predictor,
        "all heads": _number(row.rho, row.interval),
        "within blocks": _number(row.within, row.within_interval),
        "gain over plain gradients": "baseline"
        if row.gain_interval == (0, 0)
        else _number(row.gain, row.gain_interval),
    }


def _number(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _verdict(rows: Sequence[Agreement]) -> str:
    """Which scores rank heads better or worse than plain gradients, beyond the intervals."""
    scores = [row for row in rows if "signed" in row.predictor or row.predictor in ("interference", "overlap")]
    better = [f"{r.predictor} for {r.measured} at step {r.step:g}" for r in scores if r.gain_interval[0] > 0]
    worse = [f"{r.predictor} for {r.measured} at step {r.step:g}" for r in scores if r.gain_interval[1] < 0]
    return (
        f"better than plain gradients within blocks: {'; '.join(better) or 'none'}\n"
        f"worse than plain gradients within blocks: {'; '.join(worse) or 'none'}"
    )


def _write(path: Path, effects: Sequence[HeadEffect], rows: Sequence[Agreement]) -> None:
    content = {"heads": [asdict(effect) for effect in effects], "agreements": [asdict(row) for row in rows]}
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        remedy = "Choose a file in an existing folder with --output."
        raise QkovError(str(path), expected="a file that can be written", got=str(error), remedy=remedy) from error
