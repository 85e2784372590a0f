"""Memory that is kept changes no number, and goes back."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest
import torch

from qkov_dist import memory as pages
from qkov_dist.memory import kept_heap

MIB = 2**20
CPU = torch.device("cpu")
GLIBC = pages._glibc() is not None


FAULTS = """
import resource, sys, torch
from qkov_dist.memory import kept_heap

def passes():
    for _ in range(20):
        torch.ones(40 * 2**20 // 4)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
torch.ones(4)
before = resident()
with kept_heap(torch.device(sys.argv[1])):
    start = faults()
    passes()
    inside = faults() - start
print(inside, resident() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_what_is_freed_is_taken_again_and_goes_back_at_the_end():
    def measured(device: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", FAULTS, device], capture_output=True, text=True, check=True)
        inside, grown = map(int, done.stdout.split())
        return inside, grown

    once = 40 * MIB // mmap.PAGESIZE
    kept, grown = measured("cpu")
    assert grown < 20 * MIB
    ordinary, _ = measured("meta")  # a model that is elsewhere: nothing is kept
    assert ordinary > 15 * once
    assert kept < ordinary / 2  # how often the heap itself has to grow depends on where the kernel put it


def test_an_error_inside_leaves_as_any_other():
    with pytest.raises(RuntimeError, match="inside"), kept_heap(CPU):
        raise RuntimeError("inside")


def test_nothing_is_done_without_glibc(monkeypatch):
    monkeypatch.setattr(pages, "_glibc", lambda: None)
    with kept_heap(CPU):
        assert torch.ones(3).sum() == 3
