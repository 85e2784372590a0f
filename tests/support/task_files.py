"""Task files as they are loaded: what of them is labelled, and why one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import TOKENIZER, VOCAB

from qkov_dist.config import TaskConfig
from qkov_dist.data.samples import IGNORED, Task
from qkov_dist.data.tasks import load_task
from qkov_dist.errors import QkovError

CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes ab"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


def load(path: Path | str, tokenizer: Any = TOKENIZER, **options: Any) -> Task:
    limits = {"vocab_size": len(VOCAB), "max_positions": 64, "objective": "causal"}
    limits |= {key: options.pop(key) for key in list(options) if key in limits}
    return load_task(TaskConfig("math", str(path), **options), tokenizer, **limits)


def refused(path: Path | str, tokenizer: Any = TOKENIZER, **options: Any) -> QkovError:
    with pytest.raises(QkovError) as caught:
        load(path, tokenizer, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def labelled_text(task: Task, tokenizer: Any = TOKENIZER, index: int = 0) -> str:
    sample = task.samples[index]
    kept = sample.labels != IGNORED
    assert (sample.labels[kept] == sample.input_ids[kept]).all()
    return str(tokenizer.decode(sample.labels[kept].tolist()))
