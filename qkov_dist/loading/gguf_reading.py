"""Reading a GGUF file once.

Its reader walks over the whole vocabulary in Python, which takes seconds, and transformers makes one for every
question: the configuration (twice), the weights, the tokenizer. The table of a model's tensor names takes a while too,
and transformers makes it for every module of the model.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Have everyone who reads a GGUF file within the block share its reader, and the tables of names."""
    library: Any = importlib.import_module("gguf")
    plain, name_map = library.GGUFReader, library.get_tensor_name_map
    readers: dict[tuple[str, str], Any] = {}

    def shared(path: Any, mode: str = "r") -> Any:
        if (str(path), mode) not in readers:
            readers[str(path), mode] = plain(path, mode)
        return readers[str(path), mode]

    library.GGUFReader, library.get_tensor_name_map = shared, functools.cache(name_map)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = plain, name_map
