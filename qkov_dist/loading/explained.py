"""Transformers without progress bars and warnings, and what it raises as one message of the project's own."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants as hub
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from qkov_dist.errors import QkovError, is_broken_call

LOAD_ERRORS = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError,
    pickle.UnpicklingError, struct.error, SafetensorError, StrictDataclassError,
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
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
def explained(place: str, expected: str) -> Iterator[None]:
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
