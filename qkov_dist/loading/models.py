"""Loading a model and its tokenizer.

A path is a directory or a ``.gguf`` file where it looks like one, and a Hugging Face hub id otherwise; the hub is never
asked about local paths. Weights come from safetensors, or from tensors-only checkpoints: nothing is unpickled.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import constants as hub
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import has_file

from qkov_dist.config import ModelConfig
from qkov_dist.errors import QkovError, is_broken_call

from .adapters import CONFIG as ADAPTER_CONFIG
from .adapters import Adapter, find_adapter, put_on
from .checkpoint import check_gguf, check_loaded
from .positions import max_positions

AUTO_CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "image-text": AutoModelForImageTextToText,  # given text alone
}
BUILTIN = "builtin:"  # of models that are described, without weights
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json",
)  # fmt: skip
LOAD_ERRORS = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError,
    pickle.UnpicklingError, struct.error, SafetensorError, StrictDataclassError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode and what its samples must respect.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer, or None where the checkpoint has none.
        objective: ``causal`` or ``masked``.
        vocab_size: Token ids lie in [0, vocab_size).
        max_positions: Longest input in tokens, or None for no limit.
        engine: What keeps a model's parts together (a DeepSpeed engine); held, not used.
        warnings: What a reader of its results must know, one sentence each.
        notes: What a reader of its results may want to know, one sentence each.
    """

    model: Any
    tokenizer: Any
    objective: str
    vocab_size: int
    max_positions: int | None
    engine: Any = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Warnings and notes, as lines of the terminal."""
        return (*(f"warning: {text}" for text in self.warnings), *(f"note: {text}" for text in self.notes))


def load_model(config: ModelConfig, *, device_map: Any = None, distributed: Any = None) -> LoadedModel:
    """Load the weights, in eval mode, and the tokenizer; of an adapter, those of its base model with it on them.

    Args:
        config: Path and dtype; ``dtype: auto`` keeps the checkpoint's.
        device_map: As in ``transformers``; None loads on the CPU.
        distributed: A transformers ``DistributedConfig``: every rank reads its own shards.

    Raises:
        QkovError: The path, its files, the dtype or the attention implementation do not do.
    """
    name, options = _source(config.path, config.revision)
    if adapter := _adapter(config.path, name, options):
        return _load_adapted(config, adapter, options, device_map=device_map, distributed=distributed)
    options["trust_remote_code"] = config.trust_remote_code
    settings = _settings(name, options, config.path)
    kind = _kind(settings, config.path)
    extra: dict[str, Any] = {"device_map": device_map, "dtype": _dtype(config.dtype), "weights_only": True}
    if distributed is not None:
        extra["distributed_config"] = distributed
    if config.attn_implementation is not None:
        extra["attn_implementation"] = config.attn_implementation
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet(), _explained(config.path, "a model that loads"):
        model, report = AUTO_CLASSES[kind].from_pretrained(name, output_loading_info=True, **options, **extra)
    warnings = check_loaded(model, report, config.path)
    model = model.eval()
    if "gguf_file" in options:
        warnings, model = (*warnings, *check_gguf(model, Path(name) / options["gguf_file"])), _plain(model)
    text_settings = model.config.get_text_config()
    return LoadedModel(
        model,
        _tokenizer(name, options, config.path),
        "masked" if kind == "masked" else "causal",
        int(text_settings.vocab_size),
        max_positions(model, text_settings),
        warnings=warnings,
    )


def base_config(config: ModelConfig) -> ModelConfig | None:
    """Where the base model of an adapter is; None where the path is no adapter's.

    Raises:
        QkovError: for an adapter that does not name its base model.
    """
    name, options = _source(config.path, config.revision)
    adapter = _adapter(config.path, name, options)
    return _base_of(config, adapter) if adapter else None


def _base_of(config: ModelConfig, adapter: Adapter) -> ModelConfig:
    """A revision that is given is that of what lies on the hub: of the adapter, or of the base of a local one."""
    given = config.revision if Path(config.path).expanduser().exists() else None
    return replace(config, path=adapter.base, revision=given or adapter.revision)


def _adapter(place: str, name: str, options: dict[str, Any]) -> Adapter | None:
    with _explained(place, "a readable adapter configuration"):
        return find_adapter(name, options)


def _load_adapted(config: ModelConfig, adapter: Adapter, options: dict[str, Any], **how: Any) -> LoadedModel:
    """An adapter's base model with the adapter on it; its own tokenizer goes before that of the base."""
    base = _base_of(config, adapter)
    try:
        if base_config(base):
            remedy = "Merge that adapter into its base model first."
            raise QkovError(adapter.base, expected="a model", got="another adapter", remedy=remedy)
        loaded = load_model(base, **how)
    except QkovError as error:
        raise error.within(f"{adapter.place}: base model") from error
    with _quiet(), _explained(adapter.place, "an adapter that fits its base model"):
        model, note = put_on(loaded.model, adapter, options)
    own = _tokenizer(adapter.place, {**options, "trust_remote_code": config.trust_remote_code}, adapter.place)
    return replace(loaded, model=model, tokenizer=own or loaded.tokenizer, notes=(*loaded.notes, note))


def meta_model(source: str | ModelConfig | transformers.PretrainedConfig) -> Any:
    """The model on the meta device, from its configuration alone: module names and shapes, no weights."""
    if isinstance(source, transformers.PretrainedConfig):
        settings, place, trust = source, source.model_type, False
    else:
        config = ModelConfig(source) if isinstance(source, str) else source
        config = base_config(config) or config
        place, trust = config.path, config.trust_remote_code
        name, options = _source(config.path, config.revision)
        settings = _settings(name, {**options, "trust_remote_code": trust}, place)
    auto = AUTO_CLASSES[_kind(settings, place)]
    with _quiet(), _explained(place, "a configuration that builds a model"), torch.device("meta"):
        return auto.from_config(settings, trust_remote_code=trust).eval()


def fill_computed_buffers(model: nn.Module, config: ModelConfig) -> None:
    """Give buffers that no checkpoint holds the values that the model's own code computes for them.

    A model that is made on the meta device, for each rank to read its shards, may be left with whatever its memory held
    (transformers does so with the multipliers of falcon_h1).

    Args:
        model: A loaded model, or this rank's shards of it.
        config: What it was loaded by.
    """
    settings: Any = copy.deepcopy(model.config)
    settings.__dict__.pop("distributed_config", None)
    auto = AUTO_CLASSES[_kind(settings, config.path)]
    with _quiet(), _explained(config.path, "a configuration that builds a model"), init_empty_weights(False):
        fresh = dict(auto.from_config(settings, trust_remote_code=config.trust_remote_code).named_buffers())
    held = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in held and name in fresh and fresh[name].shape == buffer.shape:
            buffer.copy_(fresh[name])


def _source(path: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """The name that transformers loads from, and the options that go with it."""
    local = Path(path).expanduser()
    if path.startswith(BUILTIN):
        remedy = "Give a model directory, a hub id, or a GGUF file; what is built in is for `qkov plan`."
        raise QkovError(path, expected="a model with weights", got="the description of one", remedy=remedy)
    if not local.exists():
        if _looks_local(path):
            remedy = f"Check the path; it is taken from {Path.cwd()}."
            raise QkovError(path, expected="a model directory or a .gguf file", got="no such file", remedy=remedy)
        pinned = {} if revision is None else {"revision": revision}
        return path, {**pinned, "local_files_only": not _hub_reachable()}
    if local.is_file():
        _check_gguf(local)
        return str(local.parent), {"gguf_file": local.name, "local_files_only": True}
    _check_directory(local)
    return str(local), {"local_files_only": True}


def _looks_local(path: str) -> bool:
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path) and not path.endswith(".gguf")
    return not is_hub_id or ("/" in path and Path(path).parent.is_dir())


def _hub_reachable() -> bool:
    """Whether the hub answers within seconds; without this, every missing file is retried for half a minute."""
    if hub.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    url = urlsplit(hub.ENDPOINT)
    try:
        with socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5):
            return True
    except OSError:
        return False


def _check_gguf(path: Path) -> None:
    with _explained(str(path), "a readable file"), path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        remedy = "Give a model directory, a hub id, or a GGUF file."
        raise QkovError(str(path), expected="a GGUF file", got=f"a file that begins with {magic!r}", remedy=remedy)


def _check_directory(path: Path) -> None:
    place, remedy = path / "config.json", "Give a directory written by save_pretrained."
    if not place.is_file():
        if (path / ADAPTER_CONFIG).is_file():
            return  # its base model has one
        raise QkovError(str(path), expected="a config.json in the directory", got="none", remedy=remedy)
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise QkovError(f"{place}:{error.lineno}", expected="valid JSON", got=error.msg, remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise QkovError(str(place), expected="readable UTF-8 JSON", got=str(error), remedy=remedy) from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise QkovError(str(place), expected="an object with a model_type", got="none", remedy=remedy)


def _settings(name: str, options: dict[str, Any], place: str) -> Any:
    with _quiet(), _explained(place, "a readable model configuration"):
        return AutoConfig.from_pretrained(name, **options)


def _kind(settings: Any, place: str) -> str:
    """Which of ``AUTO_CLASSES`` a model is: ``masked`` is for encoders that are not set up as decoders."""
    remedy = "Give a decoder language model, or a BERT-style encoder with a masked LM head."
    if getattr(settings, "is_encoder_decoder", False):
        raise QkovError(place, expected="a model of one stack", got="an encoder-decoder", remedy=remedy)
    remote = getattr(settings, "auto_map", None) or {}
    masked = settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "AutoModelForMaskedLM" in remote
    causal = settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in remote
    if masked and not getattr(settings, "is_decoder", False):
        return "masked"
    if causal:
        return "causal"
    remote_image = "AutoModelForImageTextToText" in remote
    if remote_image or settings.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "image-text"
    raise QkovError(place, expected="a language model", got=f"model type {settings.model_type!r}", remedy=remedy)


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _plain(model: Any) -> Any:
    """Take away the traces of a GGUF quantizer from a model whose weights are dense; tied weights stay tied."""
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        return model
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.config.__dict__.pop("quantization_config", None)
    return model


def _tokenizer(name: str, options: dict[str, Any], place: str) -> Any:
    with _quiet(), _explained(place, "a tokenizer that loads"):
        where = {key: options[key] for key in ("revision", "local_files_only") if key in options}
        if "gguf_file" in options or any(has_file(name, file, **where) for file in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(name, **options)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers without progress bars and warnings; both come back as they were."""
    logs: Any = transformers_logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


@contextmanager
def _explained(place: str, expected: str) -> Iterator[None]:
    """Turn what loading raises into one message of the project's own."""
    try:
        yield
    except QkovError:
        raise
    except LOAD_ERRORS as error:
        if isinstance(error, RuntimeError) and is_broken_call(error):
            raise  # another rank's fault, not the files'
        got = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise QkovError(place, expected=expected, got=got, remedy=_remedy(error)) from error


def _remedy(error: BaseException) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "Read the code that comes with the model; if you trust it, set model.trust_remote_code=true."
    if isinstance(error, ImportError) or "attn_implementation" in text:
        return "Install what is missing, or set another model.attn_implementation, such as sdpa or eager."
    if "connect" in text or "offline" in text or hub.HUGGINGFACE_CO_URL_HOME in text:
        return "Check the id, the revision and the network, or download the model and give its directory."
    return "Check that the files are a complete checkpoint that this version of transformers knows."
