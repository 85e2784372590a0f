"""Tensors of a checkpoint that the model does not use: refused, warned of, or nothing to speak of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import refused, write_gguf
from running import run_quietly
from safetensors.torch import load_file, save_file
from zoo import TINY, VOCAB

from qkov_dist import load_heatmap
from qkov_dist.cli import main
from qkov_dist.config import ModelConfig
from qkov_dist.errors import QkovError
from qkov_dist.loading import checkpoint
from qkov_dist.loading.models import load_model
from qkov_dist.report.page import make_page


def saved(folder: Path, name: str, more: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A tiny model on disk, with more tensors in its file and other settings than those it was made with."""
    TINY[name].build().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, **{key: tensor.clone() for key, tensor in more.items()}},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


ONE = torch.ones(1)
ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", f"{ATTENTION}.q_proj.bias"),
        ("llama", f"{ATTENTION}.o_proj.bias"),
        ("llama", f"{ATTENTION}.k_norm.weight"),
        ("llama", f"{ATTENTION}.rotary_emb.scale"),
        ("llama", f"{ATTENTION}.sinks"),
        ("llama", "model.layers.1.attention.wq.weight"),
        ("llama", f"{ATTENTION}.q_proj.lora_A.weight"),
        ("llama", "model.layers.0.mlp.up_proj.weight_scale_inv"),
        ("llama", "model.layers.0.mlp.up_proj.weight_scale"),
        ("llama", "model.layers.0.mlp.up_proj.weight.absmax"),
        ("llama", "lm_head.input_scale"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.scales"),
        ("gpt2", "transformer.h.0.attn.q_norm.weight"),
        ("bert_masked", "bert.encoder.layer.0.attention.self.distance_embedding.weight"),
    ],
)
def test_an_unused_tensor_of_attention_or_a_scale_is_refused(tmp_path: Path, name: str, key: str) -> None:
    error = refused(saved(tmp_path, name, {key: ONE}))
    assert (error.where, error.got.startswith("1 that it does not use: ")) == (str(tmp_path), True)


def test_biases_that_a_conversion_forgot_are_refused(tmp_path: Path) -> None:
    """As a whole: the model of config.json is another function than that of the weights."""
    model = TINY["llama"].build(attention_bias=True)
    model.save_pretrained(tmp_path)
    load_model(ModelConfig(str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    assert refused(tmp_path).got == (
        "8 that it does not use: model.layers.*.self_attn.k_proj.bias, model.layers.*.self_attn.o_proj.bias, "
        "model.layers.*.self_attn.q_proj.bias, model.layers.*.self_attn.v_proj.bias"
    )


OTHERS = {
    "model.layers.0.mlp.up_proj.bias": ONE,
    "model.layers.0.post_attention_layernorm.bias": ONE,
    "model.layers.2.self_attn.q_proj.weight": ONE,
    "vision_tower.layers.0.self_attn.q_proj.bias": ONE,
    "vision_tower.layers.0.self_attn.q_proj.weight_scale": ONE,
    "score.weight": ONE,
}


def test_other_unused_tensors_are_warned_of(tmp_path: Path) -> None:
    """Also a whole layer, or tower, that the model does not have."""
    loaded = load_model(ModelConfig(str(saved(tmp_path, "llama", OTHERS))))
    assert loaded.warnings == (
        "6 tensors of the checkpoint are not used by the model: model.layers.*.mlp.up_proj.bias, "
        "model.layers.*.post_attention_layernorm.bias, model.layers.*.self_attn.q_proj.weight, score.weight, "
        "and 2 other names",
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", f"{ATTENTION}.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("codegen", "transformer.h.0.attn.causal_mask"),
        ("bert_masked", "bert.embeddings.position_ids"),
    ],
)
def test_what_a_model_forms_by_itself_is_no_matter(tmp_path: Path, name: str, key: str) -> None:
    assert load_model(ModelConfig(str(saved(tmp_path, name, {key: ONE})))).warnings == ()


@pytest.mark.parametrize("name", TINY)
def test_a_model_that_was_saved_whole_has_nothing_unused(tmp_path: Path, name: str) -> None:
    TINY[name].build().save_pretrained(tmp_path)
    assert load_model(ModelConfig(str(tmp_path))).warnings == ()


def test_a_warning_of_the_model_reaches_file_page_and_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "model", "llama", OTHERS)
    rows = "".join(json.dumps({"input_ids": [5, 6 + n, 7, VOCAB - 1]}) + "\n" for n in range(3))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.jsonl").write_text(rows.replace("[5,", "[9,"))
    tasks = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    raw = {"model": {"path": str(path)}, "tasks": tasks, "output": {"dir": str(tmp_path / "out")}}
    raw["statistics"] = {"enabled": False}
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    assert main(["run", str(tmp_path / "run.yaml"), "--quiet"]) == 0
    told = "6 tensors of the checkpoint are not used by the model"
    assert f"warning: {told}" in capsys.readouterr().err
    heatmap = load_heatmap(tmp_path / "out")
    assert any(text.startswith(told) for text in heatmap.attributes["warnings"])
    assert told in make_page(heatmap)


def refusal_of(raw: dict[str, Any]) -> str:
    try:
        run_quietly(raw)
    except QkovError as error:
        return str(error)
    return "accepted"


@pytest.mark.long
@pytest.mark.parametrize("cut", [{"tp": 2}, {"shard": "fsdp"}, {"shard": "zero3"}], ids=str)
def test_every_way_of_loading_refuses_and_warns(tmp_path: Path, ranks: Any, cut: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 6, 7]}\n{"input_ids": [5, 6, 8]}\n')
    (tmp_path / "b.jsonl").write_text('{"input_ids": [9, 6, 7]}\n{"input_ids": [9, 6, 8]}\n')

    def settings(name: str, more: dict[str, torch.Tensor]) -> dict[str, Any]:
        tasks = [{"name": task, "path": str(tmp_path / f"{task}.jsonl")} for task in "ab"]
        out = {"dir": str(tmp_path / f"out-{name}")}
        model = {"path": str(saved(tmp_path / name, "llama", more))}
        return {"model": model, "parallel": cut, "tasks": tasks, "output": out, "statistics": {"enabled": False}}

    for told in ranks(2).run(refusal_of, settings("biased", {f"{ATTENTION}.q_proj.bias": ONE})):
        assert "1 that it does not use: model.layers.*.self_attn.q_proj.bias" in told
    assert ranks(2).run(refusal_of, settings("others", OTHERS)) == ["accepted"] * 2
    assert load_heatmap(tmp_path / "out-others").attributes["warnings"][0].startswith("6 tensors of the checkpoint")


# GGUF: transformers takes what it has a name for


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("blk.0.attn_q.bias", True),
        ("blk.0.attn_output.bias", True),
        ("blk.0.attn_k_norm.weight", True),
        ("blk.0.attn_sinks.weight", True),
        ("blk.0.ffn_up.scale", True),
        ("blk.3.attn_q.bias", False),
        ("rope_freqs.weight", False),
        ("blk.0.attn_rot_embd", False),
    ],
)
def test_what_a_gguf_file_has_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, needed: bool
) -> None:
    write: Callable[..., Any] = gguf.GGUFWriter.write_header_to_file

    def write_with_more(self: Any) -> None:
        self.add_tensor(name, np.ones(16, np.float32))
        write(self)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", write_with_more)
    path = write_gguf(tmp_path / "tiny.gguf")
    if needed:
        assert name.replace(".0.", ".*.") in refused(path).got
    else:
        assert load_model(ModelConfig(str(path))).warnings == ()


def test_biases_that_a_gguf_model_uses_are_used(tmp_path: Path) -> None:
    model = TINY["qwen2"].build()
    linear = model.model.layers[0].self_attn
    used = checkpoint._gguf_used
    assert linear.q_proj.bias is not None
    assert [used(model.model.layers[0], name, "bias") for name in ("attn_q", "attn_output")] == [True, False]
    assert used(TINY["gpt2"].build().transformer.h[0], "attn_qkv", "bias")
    assert used(TINY["qwen3"].build().model.layers[0], "attn_q_norm", "weight")
