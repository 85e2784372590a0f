"""What ``qkov validate`` does: do effects and scores predict what a step on one task does to the other?

Head by head, as a table for one model; and, where shares of heads are given, whether freezing the heads that they put
first spares A while B is learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from tabulate import tabulate

from qkov_dist.config import ModelConfig, TaskConfig
from qkov_dist.console import Console
from qkov_dist.data.batches import Objective
from qkov_dist.data.samples import Sample
from qkov_dist.data.tasks import load_task
from qkov_dist.errors import QkovError
from qkov_dist.layout.proof import resolve_proved
from qkov_dist.loading.models import LoadedModel, load_model

from .agreement import PREDICTORS, Agreement, Slope, agreements
from .effects import HELD_OUT, HeadEffect, measure, refuse_common_samples
from .examined_model import ExaminedModel
from .freezing import FreezingPlan, Trial, run_trial
from .freezing_results import Difference, Outcome, outcomes, spares
from .head_targets import sample_targets

MAX_LAYERS = 10


@dataclass(frozen=True)
class Question:
    """Of what is asked.

    Attributes:
        tasks: Paths of A and of B, as in a configuration.
        columns: What the keys of a sample are called in them, likewise; None where they are called so.
        samples: Samples of each task.
        max_tokens: Samples are cut after so many tokens.
        seed: Of halves, of the choice of heads, and of resamples; the first one of several.
        output: A JSON file to write all numbers to.
    """

    tasks: tuple[str, str]
    columns: tuple[Mapping[str, str] | None, Mapping[str, str] | None]
    samples: int
    max_tokens: int
    seed: int
    output: str | None

    def configs(self) -> list[TaskConfig]:
        """Both tasks as a configuration has them."""
        limits: dict[str, Any] = {"max_samples": self.samples, "max_tokens": self.max_tokens}
        return [
            TaskConfig(name=path, path=path, columns=columns, **limits)
            for path, columns in zip(self.tasks, self.columns, strict=True)
        ]


def validate(
    config: ModelConfig,
    question: Question,
    *,
    heads: int,
    optimizer: str,
    sizes: Sequence[float],
    bootstrap: int,
    console: Console,
) -> None:
    """Step in one head after the other, measure and print.

    Args:
        config: The model.
        question: The tasks.
        heads: How many heads to step in.
        optimizer: ``sgd`` or ``adam``.
        sizes: Step sizes.
        bootstrap: Resamples of heads for the intervals.
        console: Hears of each stage, and shows how far it is.

    Raises:
        QkovError: for a model or task that cannot be read or run, or weights that cannot be changed.
    """
    examined = _examined(config, question, console)
    every = examined.layers
    count = min(len(every), max(-(-heads // 4), 1), MAX_LAYERS)
    layers = tuple(every[place * (len(every) - 1) // max(count - 1, 1)] for place in range(count))
    examined = replace(examined, layers=layers)
    targets = sample_targets(examined, heads, question.seed)
    console.say(f"one step of {question.tasks[1]} in each of {len(targets)} heads, measured on {question.tasks[0]}")
    with console.bar("stepping", len(targets), "head") as advance:
        effects = measure(examined, targets, sizes, optimizer=optimizer, seed=question.seed, on_head=advance)
    ranks, slopes = agreements(effects, sizes, resamples=bootstrap, seed=question.seed)
    _print(question.tasks, optimizer, layers, effects, ranks, slopes)
    if question.output:
        content = {
            "heads": [asdict(effect) for effect in effects],
            "agreements": [asdict(row) for row in ranks],
            "slopes": [asdict(slope) for slope in slopes],
        }
        _write(Path(question.output), content)


def validate_freezing(
    config: ModelConfig, question: Question, plan: FreezingPlan, *, num_seeds: int, console: Console
) -> None:
    """Train attention on B with heads frozen by each criterion, and print what that did to A.

    Args:
        config: The model.
        question: The tasks.
        plan: What is tried with each seed.
        num_seeds: Seeds, from the question's on.
        console: Hears of each stage, and shows how far it is.

    Raises:
        QkovError: as :func:`validate`, and where B gains nothing; the output file is there all the same.
    """
    examined = _examined(config, question, console)
    refuse_common_samples(examined)
    trials: list[Trial] = []
    console.say(f"training attention on {question.tasks[1]}, looking at {question.tasks[0]}, with {num_seeds} seeds")
    with console.bar("training", num_seeds * plan.num_trainings, "training") as advance:
        for seed in range(question.seed, question.seed + num_seeds):
            trials.append(run_trial(examined, plan, seed, advance))
            if question.output:
                _write(Path(question.output), {"plan": asdict(plan), "trials": [trial.as_json() for trial in trials]})
    print(f"\nA = {question.tasks[0]}, B = {question.tasks[1]}: {num_seeds} seeds")
    print(freezing_table(outcomes(trials, len(examined.a))))


def _examined(config: ModelConfig, question: Question, console: Console) -> ExaminedModel:
    """The model and its samples, all of its layers."""
    tasks = question.configs()
    console.say(f"loading {config.path}")
    loaded = load_model(config)
    for line in loaded.remarks:
        console.say(line)
    layout = resolve_proved(loaded.model)
    a, b = (_samples(loaded, task, console) for task in tasks)
    layers = tuple(layer.index for layer in layout.layers)
    return ExaminedModel(loaded.model, layout, a, b, layers, cast(Objective, loaded.objective), estimator="mean")


def _samples(loaded: LoadedModel, task: TaskConfig, console: Console) -> tuple[Sample, ...]:
    limits = {"vocab_size": loaded.vocab_size, "max_positions": loaded.max_positions, "objective": loaded.objective}
    found = load_task(task, loaded.tokenizer, **limits)  # type: ignore[arg-type]
    for warning in found.warnings:
        console.say(f"warning: {warning}")
    return found.samples


def _print(
    tasks: tuple[str, str],
    optimizer: str,
    layers: Sequence[int],
    effects: Sequence[HeadEffect],
    ranks: Sequence[Agreement],
    slopes: Sequence[Slope],
) -> None:
    print(f"\nA = {tasks[0]}, B = {tasks[1]}: {len(effects)} heads of layers {list(layers)}")
    print(f"One {optimizer} step on B in one head alone, and back; predicted on one half of A, measured on the other.")
    for size in dict.fromkeys(row.size for row in ranks):
        shown = [row for row in ranks if row.size == size and row.samples == HELD_OUT]
        print(f"\nsize {size:g}: Spearman rank correlation with the change of A's held-out loss, and its parts\n")
        print(tabulate([_shown(row) for row in shown], headers="keys", disable_numparse=True))
    print("\nslope, measured against predicted (1: right in size)\n")
    print(tabulate(slope_rows(slopes), headers="keys", disable_numparse=True))
    print(f"\n{_verdict([row for row in ranks if row.samples == HELD_OUT])}")


def _shown(row: Agreement) -> dict[str, str]:
    first = PREDICTORS[row.measured][0]
    return {
        "measured": row.measured,
        "predictor": row.predictor,
        "all heads": number(row.rho, row.interval),
        "within blocks": number(row.within, row.within_interval),
        "gain over the first": "-" if row.predictor == first else number(row.gain, row.gain_interval),
    }


def slope_rows(slopes: Sequence[Slope]) -> list[dict[str, str]]:
    """One row for each size and part, one column for each half of A's samples."""
    rows: dict[tuple[float, str, str], dict[str, str]] = {}
    for slope in slopes:
        names = {"size": f"{slope.size:g}", "measured": slope.measured, "predicted": slope.predictor}
        row = rows.setdefault((slope.size, slope.measured, slope.predictor), names)
        row[f"{slope.samples} samples"] = number(slope.slope, slope.interval)
    return list(rows.values())


def number(value: float, interval: tuple[float, float], form: str = "+.2f") -> str:
    """A value with its interval."""
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def _verdict(rows: Sequence[Agreement]) -> str:
    """Which scores rank heads better or worse than the predicted change, beyond the intervals."""
    scores = [row for row in rows if row.measured == "change" and row.predictor != "change"]
    better = [f"{row.predictor} at size {row.size:g}" for row in scores if row.gain_interval[0] > 0]
    worse = [f"{row.predictor} at size {row.size:g}" for row in scores if row.gain_interval[1] < 0]
    return (
        f"better than the predicted change within blocks: {'; '.join(better) or 'none'}\n"
        f"worse than the predicted change within blocks: {'; '.join(worse) or 'none'}"
    )


def freezing_table(found: Sequence[Outcome], style: str = "simple") -> str:
    """Outcomes as a table for each share, and what they say in words."""
    parts = []
    for share in dict.fromkeys(outcome.share for outcome in found):
        rows = [outcome for outcome in found if outcome.share == share]
        heads = max(outcome.heads for outcome in rows)
        title = f"{share:.0%} of heads frozen ({heads}): A's held-out change where B has gained {rows[0].gain:.3g}"
        table = tabulate([_outcome_row(row) for row in rows], headers="keys", tablefmt=style, disable_numparse=True)
        parts += [title, table, spares(rows)]
    return "\n\n".join(parts)


def _outcome_row(row: Outcome) -> dict[str, str]:
    def shown(difference: Difference) -> str:
        return number(difference.value, difference.over_seeds, "+.4f")

    samples = row.less_random.over_samples
    return {
        "frozen by": row.criterion,
        "A's change": shown(row.change),
        "less none": "-" if row.criterion == "none" else shown(row.less_none),
        "less random": "-" if row.criterion in ("none", "random") else shown(row.less_random),
        "over samples": "-" if row.criterion in ("none", "random") else f"[{samples[0]:+.4f}, {samples[1]:+.4f}]",
        "at the end: A": f"{row.total_change:+.4f}",
        "B": f"{-row.total_gain:+.4f}",
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        remedy = "Choose a file in an existing folder with --output."
        raise QkovError(str(path), expected="a file that can be written", got=str(error), remedy=remedy) from error
