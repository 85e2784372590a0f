"""An adapter's directory in place of a model: its base, what is scored, what is said, and what is refused."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoints import refused
from comparing import closeness, deviation
from oracle import per_sample_gradients
from running import qkov, run_quietly
from safetensors.torch import load_file, save_file
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB, randomize

from qkov_dist import load_heatmap
from qkov_dist.config import ModelConfig
from qkov_dist.distributed.fingerprint import fingerprint
from qkov_dist.distributed.parallelism import Parallelism, load_parallel
from qkov_dist.distributed.world import Alone
from qkov_dist.errors import QkovError
from qkov_dist.loading.architecture import meta_model
from qkov_dist.loading.models import load_model
from qkov_dist.loading.whereabouts import base_config

SAMPLES = {"a": mixed_samples(3, VOCAB, seed=1), "b": mixed_samples(2, VOCAB, seed=2)}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}


def adapted(base: Path, settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(TINY["llama"].build(), settings)
    model.peft_config["default"].base_model_name_or_path = str(base)
    randomize(model, seed=1)
    return model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    adapted(tmp_path, peft.LoraConfig(**LORA)).unload().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    adapted(base, peft.LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter: Path, **settings: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def load(path: Path | str) -> Any:
    return load_model(ModelConfig(str(path)))


def test_the_adapter_is_on_its_base_model_and_said_to_be(adapter: Path, base: Path) -> None:
    loaded = load(adapter)
    expected, ids = adapted(base, peft.LoraConfig(**LORA)), torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(ids).logits, expected(ids).logits)
    assert not torch.equal(loaded.model(ids).logits, load(base).model(ids).logits)
    assert (loaded.objective, loaded.vocab_size, loaded.max_positions) == ("causal", VOCAB, 64)
    assert not loaded.model.training
    (note,) = loaded.notes
    assert note.startswith(f"adapter {adapter} (LORA, r 4, lora_alpha 8) is active on base model {base}: scored are")
    assert not any("lora" in name for name in meta_model(str(adapter)).state_dict())


def settings_of(adapter: Path, folder: Path) -> dict[str, Any]:
    for name, samples in SAMPLES.items():
        write_task(folder / f"{name}.jsonl", samples)
    return {
        "model": {"path": str(adapter)},
        "tasks": [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in SAMPLES],
        "metric": {"score": "symmetric"},
        "ridge": {"epsilon": 0.0, "absolute": 1.0, "relative": 0.0},
        "fisher": {"estimator": "mean"},
        "statistics": {"enabled": False},
        "output": {"dir": str(folder / "out")},
    }


@pytest.mark.long
def test_replicas_of_an_adapted_model_equal_one_process(adapter: Path, tmp_path: Path, ranks: Any) -> None:
    raw = settings_of(adapter, tmp_path)
    run_quietly(raw)
    ranks(2).run(run_quietly, {**raw, "output": {"dir": str(tmp_path / "two")}})
    one, two = load_heatmap(tmp_path / "out"), load_heatmap(tmp_path / "two")
    assert (one.run_id, deviation(two, one) < 1e-5) == (two.run_id, True)


def test_a_run_scores_the_base_weights_of_the_adapted_model(adapter: Path, base: Path, tmp_path: Path, capsys) -> None:
    """Against dense autograd of the adapted model, and of the merged one, which has the same gradients."""
    a, b = SAMPLES.values()
    (tmp_path / "run.yaml").write_text(json.dumps(settings_of(adapter, tmp_path)))
    assert qkov("run", tmp_path / "run.yaml", "--quiet") == 0
    assert f"note: adapter {adapter}" in capsys.readouterr().err
    heatmap = load_heatmap(tmp_path / "out")
    assert any(note.startswith(f"adapter {adapter}") for note in heatmap.attributes["notes"])
    merged = adapted(base, peft.LoraConfig(**LORA)).merge_and_unload()
    found, _ = per_sample_gradients(merged, [(s.input_ids, s.labels) for s in (*a, *b)])
    for layer, block, name in ((0, "Q", "q_proj"), (1, "V", "v_proj"), (1, "K", "k_proj")):
        rows = torch.stack([g[f"model.layers.{layer}.self_attn.{name}.weight"] for g in found])
        heads = rows.reshape(len(rows), -1, 16 * 32).transpose(0, 1).abs()
        scores = torch.einsum("hip,hjp->hij", heads[:, :3] / (heads.square().mean(1, keepdim=True) + 1), heads[:, 3:])
        assert closeness(torch.from_numpy(heatmap.cross[block][layer]), scores) < 1e-5


def test_the_fingerprint_depends_on_the_adapter(adapter: Path, base: Path) -> None:
    plain, first = fingerprint(load(base).model), fingerprint(load(adapter).model)
    assert first == fingerprint(load(adapter).model) != plain
    change(adapter, lora_alpha=16)
    louder = fingerprint(load(adapter).model)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    other, off = fingerprint(load(adapter).model), load(adapter).model
    off.base_model.disable_adapter_layers()
    assert len({plain, first, louder, other, fingerprint(off)}) == 5


def test_a_relative_base_is_found_from_here_or_from_the_adapter(adapter: Path, monkeypatch, tmp_path: Path) -> None:
    change(adapter, base_model_name_or_path="../base")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "../base" in load(adapter).notes[0]  # the same folder, seen from here
    monkeypatch.chdir(tmp_path)
    assert str(adapter / "../base") in load(adapter).notes[0]


def test_the_revision_is_that_of_what_lies_on_the_hub(adapter: Path) -> None:
    change(adapter, base_model_name_or_path="some-org/base", revision="theirs")
    found = [base_config(ModelConfig(str(adapter), revision=given)) for given in (None, "mine")]
    assert [(base.path, base.revision) for base in found if base] == [
        ("some-org/base", "theirs"),
        ("some-org/base", "mine"),
    ]


def test_its_own_tokenizer_goes_before_that_of_the_base(adapter: Path, base: Path) -> None:
    from toy_tokenizers import byte_tokenizer

    assert load(adapter).tokenizer is None
    byte_tokenizer("of the base").save_pretrained(base)
    assert load(adapter).tokenizer.chat_template == "of the base"
    byte_tokenizer("of the adapter").save_pretrained(adapter)
    assert load(adapter).tokenizer.chat_template == "of the adapter"


def test_a_folder_with_a_configuration_too_is_an_adapter(adapter: Path, base: Path) -> None:
    (adapter / "config.json").write_text((base / "config.json").read_text())
    assert load(adapter).notes


@pytest.mark.parametrize(
    ("settings", "expect"),
    [
        ({"base_model_name_or_path": None}, "adapter_config.json: expected the name of the base model, got None"),
        ({"base_model_name_or_path": "./nowhere"}, "adapter: base model: ./nowhere: expected a model directory"),
        ({"peft_type": "NEW_FROM_THE_FUTURE"}, "expected an adapter that fits its base model"),
        ({"target_modules": ["q_proj", "v_proj"]}, "tensors that the model has no place for: 4, among them"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "got none for: 4, among them"),
        ({"r": 5}, "expected an adapter that fits its base model"),
        ({"target_modules": ["no_such"]}, "expected an adapter that fits its base model"),
    ],
)
def test_what_does_not_fit_is_refused(adapter: Path, settings: dict[str, Any], expect: str) -> None:
    change(adapter, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of the keys that are missing, and goes on
        assert expect in str(refused(adapter))


def test_an_adapter_of_an_adapter_is_refused(adapter: Path) -> None:
    change(adapter, base_model_name_or_path=str(adapter))
    assert "expected a model, got another adapter" in str(refused(adapter))


def test_prompts_are_no_adapters_of_weights(base: Path, tmp_path: Path) -> None:
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapted(base, settings).save_pretrained(tmp_path / "prompt")
    assert "expected an adapter of weights, got PROMPT_TUNING" in str(refused(tmp_path / "prompt"))


def test_without_peft_it_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    error = refused(adapter)
    assert (error.expected, "pip install peft" in error.remedy) == ("the package peft", True)


@pytest.mark.parametrize("cut", [Parallelism(2, "none", 1), Parallelism(1, "fsdp", 2), Parallelism(1, "zero3", 2)])
def test_a_cut_while_weights_are_read_is_refused_before_they_are(adapter: Path, cut: Parallelism) -> None:
    with pytest.raises(QkovError, match="merge_and_unload"):
        load_parallel(ModelConfig(str(adapter)), cut, Alone())
