"""Where a model lies: in a directory, in a ``.gguf`` file, or on the Hugging Face hub; where an adapter's base lies.

A path is local where it looks like one, or is there; the hub is never asked about local paths.
"""

from __future__ import annotations

import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants as hub

from qkov_dist.config import ModelConfig
from qkov_dist.errors import QkovError

from .adapters import CONFIG as ADAPTER_CONFIG
from .adapters import Adapter, find_adapter
from .explained import explained

BUILTIN = "builtin:"  # of models that are described, without weights


def source_of(path: str, revision: str | None) -> tuple[str, dict[str, Any]]:
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
    with explained(str(path), "a readable file"), path.open("rb") as file:
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


def base_config(config: ModelConfig) -> ModelConfig | None:
    """Where the base model of an adapter is; None where the path is no adapter's.

    Raises:
        QkovError: for an adapter that does not name its base model.
    """
    name, options = source_of(config.path, config.revision)
    adapter = adapter_of(config.path, name, options)
    return base_of(config, adapter) if adapter else None


def base_of(config: ModelConfig, adapter: Adapter) -> ModelConfig:
    """A revision that is given is that of what lies on the hub: of the adapter, or of the base of a local one."""
    given = config.revision if Path(config.path).expanduser().exists() else None
    return replace(config, path=adapter.base, revision=given or adapter.revision)


def adapter_of(place: str, name: str, options: dict[str, Any]) -> Adapter | None:
    """The adapter that lies where ``source_of`` says, if it is one; messages call it ``place``."""
    with explained(place, "a readable adapter configuration"):
        return find_adapter(name, options)
