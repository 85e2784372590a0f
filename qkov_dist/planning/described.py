"""A model and its tasks as far as their descriptions go: a configuration without weights, a tokenizer on this disk.

A configuration may be a JSON file of a few facts, one of those in ``described_models`` by its name
(``builtin:llama-3-8b``), a model directory, a ``.gguf`` file or a hub id.
"""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from qkov_dist.config import ModelConfig, RunConfig, TaskConfig
from qkov_dist.data.samples import IGNORED, Sample, Task
from qkov_dist.data.tasks import load_task
from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import is_masked_lm, text_config
from qkov_dist.loading.architecture import meta_model
from qkov_dist.loading.explained import LOAD_ERRORS
from qkov_dist.loading.whereabouts import BUILTIN

SHORTEST = 2  # tokens: the first is never predicted
PACKAGED = "described_models"  # folder beside this module


def described_model(config: ModelConfig) -> Any:
    """The model on the meta device.

    Raises:
        QkovError: where there is no such description, or it builds no model.
    """
    description = _description(config.path)
    if description is None:
        return meta_model(config)
    facts = _facts(description, config.path)
    try:
        settings = AutoConfig.for_model(**facts)
    except LOAD_ERRORS as error:
        remedy = "Give the facts of a model type that transformers knows, as its config.json has them."
        raise QkovError(config.path, expected="a model's configuration", got=str(error), remedy=remedy) from error
    return meta_model(settings)


def _description(path: str) -> Traversable | None:
    """The file of facts that a path or name stands for; None where a model itself is named."""
    if not path.startswith(BUILTIN):
        file = Path(path).expanduser()
        return file if file.suffix == ".json" else None
    packaged = {f"{BUILTIN}{Path(file.name).stem}": file for file in (files(__package__) / PACKAGED).iterdir()}
    if path not in packaged:
        known, remedy = f"one of {', '.join(sorted(packaged))}", "Choose one of these, or give a JSON file of your own."
        raise QkovError("model.path", expected=known, got=repr(path), remedy=remedy)
    return packaged[path]


def _facts(file: Traversable, place: str) -> dict[str, Any]:
    remedy = "Give a JSON object with model_type and sizes, as a model's config.json has them."
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QkovError(place, expected="a readable JSON file", got=str(error), remedy=remedy) from error
    if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
        raise QkovError(place, expected="an object with a model_type", got="none", remedy=remedy)
    return facts


def described_tasks(
    config: RunConfig, model: Any, num_samples: int | None, num_tokens: int | None
) -> tuple[tuple[Task, ...], str]:
    """All tasks as a plan needs them, and how they were found.

    They are read where the model's tokenizer is on this disk and no size is given; else they are made up of
    ``num_samples`` samples of ``num_tokens`` tokens, by default the configuration's ``max_samples`` and ``max_tokens``.

    Raises:
        QkovError: where neither can be had.
    """
    reason = "sizes were given"
    if num_samples is None and num_tokens is None:
        try:
            return tuple(_read(task, model, config.model) for task in config.tasks), "samples: read from the tasks"
        except QkovError as error:
            reason = f"the tasks cannot be read here: {error}"
    tasks = tuple(_made_up(task, num_samples, num_tokens, reason) for task in config.tasks)
    longest = max(sample.num_tokens for task in tasks for sample in task.samples)
    counts = " + ".join(str(len(task.samples)) for task in tasks)
    return tasks, f"samples: assumed to be {counts} of up to {longest} tokens, all labelled ({reason})"


def _read(task: TaskConfig, model: Any, config: ModelConfig) -> Task:
    objective = "masked" if is_masked_lm(model) else "causal"
    vocabulary = int(text_config(model).vocab_size)
    tokenizer = _tokenizer(config)
    return load_task(task, tokenizer, vocab_size=vocabulary, max_positions=None, objective=objective)


def _tokenizer(config: ModelConfig) -> Any:
    """The tokenizer, where it is on this disk; None where it is not."""
    if _description(config.path) is not None:
        return None
    path = Path(config.path).expanduser()
    source: dict[str, Any] = {"pretrained_model_name_or_path": config.path, "revision": config.revision}
    if path.is_file():
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif path.is_dir():
        source = {"pretrained_model_name_or_path": str(path)}
    try:
        return AutoTokenizer.from_pretrained(
            **source, local_files_only=True, trust_remote_code=config.trust_remote_code
        )
    except LOAD_ERRORS:
        return None


def _made_up(task: TaskConfig, num_samples: int | None, num_tokens: int | None, reason: str) -> Task:
    found = {"max_samples": num_samples or task.max_samples, "max_tokens": num_tokens or task.max_tokens}
    if missing := [name for name, value in found.items() if value is None]:
        raise QkovError(
            f"task {task.name!r}",
            expected=f"samples to plan with, or {' and '.join(missing)}",
            got=reason,
            remedy="Give --samples and --tokens.",
        )
    return made_up_task(task.name, int(found["max_samples"] or 0), max(int(found["max_tokens"] or 0), SHORTEST))


def made_up_task(name: str, num_samples: int, num_tokens: int) -> Task:
    """A task of which no more is known than its size: every token but the first is labelled."""
    ids = np.zeros(num_tokens, np.int64)
    labels = ids.copy()
    labels[0] = IGNORED
    return Task(name, tuple(Sample(f"{name}-{n}", ids, labels, "") for n in range(1, num_samples + 1)))
