"""Arrays larger than memory: where they are, that nothing is left of them, and a disk that is too small."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from qkov_dist import memory as scratch
from qkov_dist.errors import QkovError
from qkov_dist.memory import scratch_array


@pytest.fixture
def small_memory(monkeypatch):
    monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", 1000)


def test_small_arrays_are_in_memory(small_memory):
    assert type(scratch_array((10, 25), np.float32)) is np.ndarray


def test_large_arrays_are_in_a_file_without_a_name(small_memory, tmp_path):
    array = scratch_array((10, 26), np.float32, tmp_path)
    assert isinstance(array, np.memmap)
    array[...] = np.arange(260).reshape(10, 26)
    assert array[9, 25] == 259
    assert not list(tmp_path.iterdir())


def test_a_file_that_has_no_room_is_an_error_before_anything_is_written(small_memory, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(QkovError, match=r"room for 0\.0 GiB of scores") as caught:
            scratch_array((1024, 1025), np.float64, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(QkovError, match="No such file"):
        scratch_array((1024, 1025), np.float64, tmp_path / "nowhere")
