"""What whole runs start from: a tiny model on disk, two tasks, and their configuration."""

from __future__ import annotations

import pytest
import yaml
from jobs import job_for
from samples import write_task
from zoo import TINY


@pytest.fixture(scope="module")
def entry():
    return TINY["llama"]


@pytest.fixture(scope="module")
def model_dir(entry, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    entry.build().save_pretrained(folder)
    return folder


@pytest.fixture
def config(entry, model_dir, tmp_path):
    """A configuration file, and a function that writes it again with changes (``section.key`` -> value)."""
    job = job_for(entry)
    write_task(tmp_path / "a.jsonl", job.a)
    write_task(tmp_path / "b.jsonl", job.b)
    plain = {
        "model": {"path": str(model_dir)},
        "tasks": [
            {"name": "math", "path": str(tmp_path / "a.jsonl")},
            {"name": "code", "path": str(tmp_path / "b.jsonl")},
        ],
        "fisher": {"estimator": "ema", "decay": job.decay, "batch_size": job.fisher_batch},
        "statistics": {"permutations": 50},
        "output": {"dir": str(tmp_path / "out")},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path
