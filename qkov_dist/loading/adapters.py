"""An adapter (LoRA and its like) on its base model, which the adapter's configuration names.

The base weights stay as they are and the adapter stays beside them: for a linear map W x + B A x the gradient for W is
that of the merged weight, and this is what is scored. The adapter's own weights are not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.values import written

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter and its base.

    Attributes:
        place: Its folder or hub id.
        base: The base model's directory, file or hub id.
        revision: Of the base model on the hub.
    """

    place: str
    base: str
    revision: str | None


def find_adapter(place: str, options: dict[str, Any]) -> Adapter | None:
    """The adapter in a directory or hub repository, or None where there is none.

    Raises:
        QkovError: for one that does not name its base model, or whose base model is not there.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    where = _where(options)
    file = None if "gguf_file" in options else find_adapter_config_file(place, **where)
    if file is None:
        return None
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "Give a directory written by save_pretrained of peft."
        raise QkovError(file, expected="readable JSON", got=str(error), remedy=remedy) from None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(base, str) or not base:
        remedy = "Set base_model_name_or_path in it to the base model's directory or hub id."
        raise QkovError(file, expected="the name of the base model", got=written(base), remedy=remedy)
    return Adapter(place, _resolved(base, Path(place)), content.get("revision"))


def _resolved(base: str, folder: Path) -> str:
    """A relative path is taken from the current directory, as peft does, or else from the adapter's."""
    local = Path(base).expanduser()
    beside = folder / local
    return str(beside) if not local.is_absolute() and not local.exists() and beside.exists() else base


def put_on(model: Any, adapter: Adapter, options: dict[str, Any]) -> tuple[Any, str]:
    """Put an adapter on its base model; returns the model and what there is to say of it.

    Raises:
        QkovError: without peft, for adapters that change inputs and not weights, and for one that does not fit.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        remedy = "Run 'pip install peft', or merge the adapter into its base model."
        raise QkovError(adapter.place, expected="the package peft", got=str(error), remedy=remedy) from error
    where = _where(options)
    settings = PeftConfig.from_pretrained(adapter.place, **where)
    settings.base_model_name_or_path = adapter.base
    kind = str(getattr(settings.peft_type, "value", settings.peft_type))
    if settings.is_prompt_learning:
        remedy = "Score its base model, or an adapter of weights, such as LoRA."
        raise QkovError(adapter.place, expected="an adapter of weights", got=kind, remedy=remedy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are missing, which are refused below, and of peft's own future
        adapted = PeftModel.from_pretrained(model, adapter.place, config=settings, **where)
    _check_complete(adapted, adapter.place, where)
    rank = "".join(f", {name} {value}" for name in ("r", "lora_alpha") if (value := getattr(settings, name, None)))
    return adapted.eval(), (
        f"adapter {adapter.place} ({kind}{rank}) is active on base model {adapter.base}: "
        "scored are the base weights, by their gradients in the adapted model"
    )


def _where(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of loading, those that say which files are meant."""
    return {key: value for key, value in options.items() if key in ("revision", "local_files_only")}


def _check_complete(adapted: Any, place: str, where: dict[str, Any]) -> None:
    """Refuse an adapter of which some tensors were not used, or that lacks some; peft says little of either."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = set(load_peft_weights(place, device="cpu", **where))
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    unused = stored - wanted - set(adapted.state_dict())  # embeddings that were trained too go by their own name
    for what, keys in (("tensors that the model has no place for", unused), ("none for", wanted - stored)):
        if keys:
            raise QkovError(
                place,
                expected="one tensor for each of the adapter's weights",
                got=f"{what}: {len(keys)}, among them {min(keys)}",
                remedy="Its adapter_config.json does not fit its weights, or it was made for another base model.",
            )
