"""Whole runs in tests: their settings, the command and the function, and what its files add up to."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from samples import mixed_samples, write_task
from zoo import RELATIVES, TINY, VOCAB

from qkov_dist.cli import main
from qkov_dist.config_file import from_dict
from qkov_dist.console import Console
from qkov_dist.results.assemble import assemble
from qkov_dist.results.metadata import from_json
from qkov_dist.results.partials import PartialWriter, list_partials, read_partial
from qkov_dist.results.reduce import add_layers
from qkov_dist.run import run


def qkov(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def interrupt_at(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run interrupted when it is about to record a layer."""
    write_layer = PartialWriter.write_layer

    def interrupted(writer, number, *args):
        if number == layer:
            raise KeyboardInterrupt
        write_layer(writer, number, *args)

    monkeypatch.setattr(PartialWriter, "write_layer", interrupted)


def exit_as_qkov(*arguments: object) -> None:
    """What a process of its own does that was started as the command."""
    sys.exit(qkov(*arguments))


def write_inputs(folder: Path, *models: str) -> Path:
    """Two tasks of 5 and 4 samples, and models of the zoo by name, as ``settings`` expects them."""
    for task, seed, num in (("a", 1, 5), ("b", 2, 4)):
        write_task(folder / f"{task}.jsonl", mixed_samples(num, VOCAB, seed=seed))
    for name in models:
        (TINY | RELATIVES)[name].build().save_pretrained(folder / name)
    return folder


def settings(folder: Path, model: str, out: str, cut: dict, **sections) -> dict:
    return {
        "model": {"path": str(folder / model)},
        "parallel": cut,
        "tasks": [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("a", "b")],
        "fisher": {"batch_size": 2, "scope": "pooled"},
        "statistics": {"enabled": False},
        "compute": {"batch_tokens": 24},
        "output": {"dir": str(folder / "out" / out), "resume": False},
        **sections,
    }


def run_quietly(*configurations: dict) -> list[str]:
    """Run configurations one after the other on this rank; returns what was said."""
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for raw in configurations:
            run(from_dict(raw), Console.of(said.append, show_progress=False))
    return said


def from_files(folder: Path, *, twice: int | None = None):
    """The heatmap that the partial files add up to; one rank's counted twice where asked."""
    partials = [read_partial(path) for path in list_partials(folder)]
    counted = [*partials, *([partials[twice]] if twice is not None else [])]
    frame = from_json(partials[0].header.extra, "test")
    layers = ((x.layer, add_layers([partial.read_layer(x.layer) for partial in counted])) for x in frame.layers)
    return assemble(frame, layers)
