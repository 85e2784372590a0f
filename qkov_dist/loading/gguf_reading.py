"""Reading a GGUF file once.

Its reader walks over the whole vocabulary in Python, which takes seconds, and transformers makes one for every
question: the configuration (twice), the weights, the tokenizer.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Have everyone who reads a GGUF file within the block share its reader."""
    library: Any = importlib.import_module("gguf")
    plain = library.GGUFReader
    readers: dict[tuple[str, str], Any] = {}

    def shared(path: Any, mode: str = "r") -> Any:
        if (str(path), mode) not in readers:
            readers[str(path), mode] = plain(path, mode)
        return readers[str(path), mode]

    library.GGUFReader = shared
    try:
        yield
    finally:
        library.GGUFReader = plain
