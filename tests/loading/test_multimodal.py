"""Models that see images, given text alone: their text towers, from the command line as from Python."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_close, deviation
from expected import expected_scores
from jobs import job_for
from running import qkov, run_quietly
from samples import write_task
from transformers import AutoConfig, AutoModelForImageTextToText
from zoo import COMMON, GROUPED, TINY, randomize

from qkov_dist import load_heatmap
from qkov_dist.config import ModelConfig
from qkov_dist.distributed.sharded_proof import prove_stand_in
from qkov_dist.layout.proof import resolve_proved
from qkov_dist.layout.resolve import resolve
from qkov_dist.loading.architecture import meta_model
from qkov_dist.loading.models import load_model

TEXT = {**COMMON, **GROUPED}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
VIT = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "patch_size": 4}
TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "patch_size": 4, **CLIP},
        "image_token_index": 90,
    },
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": VIT, **TOKENS},
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
        **TOKENS,
    },
}
TOWER = "model.language_model"


def build(name: str) -> Any:
    config = AutoConfig.for_model(name, **MODELS[name], tie_word_embeddings=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomize(AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval())


@pytest.mark.parametrize("name", MODELS)
def test_the_text_tower_equals_the_oracle(name: str, tmp_path: Path) -> None:
    """Loaded as the command line does; samples of several lengths in one batch."""
    build(name).save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(str(tmp_path)))
    assert (loaded.objective, loaded.vocab_size, loaded.max_positions) == ("causal", 96, 64)
    assert loaded.warnings == ()
    layout = resolve_proved(loaded.model)
    assert layout.family == "llama"
    assert layout.layers[1].module == f"{TOWER}.layers.1.self_attn"
    llama = TINY["llama"]
    job = job_for(llama, batch_tokens=64)
    assert_close(job.run(loaded.model), expected_scores(llama, loaded.model, job))
    meta = meta_model(str(tmp_path))
    assert resolve(meta) == resolve(loaded.model)
    prove_stand_in(loaded.model, layout)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_run_of_a_model_that_sees_images(name: str, tmp_path: Path) -> None:
    assert qkov("run", write(name, tmp_path), "--quiet") == 0
    heatmap = load_heatmap(tmp_path / "out")
    assert heatmap.attributes["layout_family"] == "llama"
    assert heatmap.mean["K"].shape == (2, 2)


@pytest.mark.long
@pytest.mark.parametrize("cut", [{"shard": "fsdp"}, {"shard": "zero3"}])
def test_its_cuts_equal_one_process(tmp_path: Path, ranks: Any, cut: dict[str, Any]) -> None:
    config = json.loads(write("qwen2_5_vl", tmp_path).read_text())
    ranks(2).run(run_quietly, {**config, "parallel": cut, "output": {"dir": str(tmp_path / "cut")}})
    run_quietly(config)
    assert deviation(load_heatmap(tmp_path / "cut"), load_heatmap(tmp_path / "out")) < 1e-5


def write(name: str, folder: Path) -> Path:
    build(name).save_pretrained(folder / "model")
    job = replace(job_for(TINY["llama"]))
    for task, samples in (("a", job.a), ("b", job.b)):
        write_task(folder / f"{task}.jsonl", samples)
    tasks = [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in "ab"]
    raw = {"model": {"path": str(folder / "model")}, "tasks": tasks, "statistics": {"enabled": False}}
    (folder / "run.yaml").write_text(json.dumps({**raw, "output": {"dir": str(folder / "out")}}))
    return folder / "run.yaml"
