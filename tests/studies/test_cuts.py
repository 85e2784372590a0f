"""A short form of the matrix of cuts: cells that no other test has, and the table itself."""

from __future__ import annotations

import functools
import os
import shutil

import pytest
from cuts import agreed, table
from cutting import CUTS, FAMILIES, MORE_FAMILIES, Met, meet, oracle_of, save

MLA = "MLA (deepseek_v3)"
CELLS = {
    ("`ep: N, shard: fsdp`", "idle experts", 2): "",  # all tokens go to experts of the first rank
    ("`ep: N`", "gpt_oss", 2): "",
    ("`ep: 2, shard: fsdp, replicate: 2`", "qwen3_moe", 4): "",
    ("DeepSpeed ZeRO-3, experts as leaf modules", MLA, 2): "",
    ("DeepSpeed ZeRO-3", MLA, 2): 'set_z3_leaf_modules(model, ["DeepseekV3Experts"])',  # else ranks wait for each other
    ("`fully_shard`, mixed precision (bfloat16)", "dense (llama)", 2): "",
    ("`cp: N, shard: ddp`", "multi-query (gpt_bigcode)", 3): "",  # more ranks than kv heads
    ("`cp: N, shard: zero3`", "dense (llama)", 2): "",
    ("accelerate, `cp_size=N`, outside of its context", "dense (llama)", 2): "",
    ("DeepSpeed ZeRO-3, loaded to NVMe", "dense (llama)", 2): "",
    ("DeepSpeed ZeRO-3, moved to NVMe", "dense (llama)", 2): "deepspeed.initialize has rounded them",
}


@functools.cache
def oracle(family: str):
    return oracle_of((FAMILIES | MORE_FAMILIES)[family])


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cut_equals_dense_autograd_or_is_refused(cell, ranks, tmp_path):
    cut, family, size = cell
    if reason := CUTS[cut].left_out():
        pytest.skip(reason)
    place = save((FAMILIES | MORE_FAMILIES)[family], tmp_path / "model")
    met = agreed(ranks(size).run(meet, cut, family, place, oracle(family)), cut)
    assert isinstance(met, Met), met
    assert (CELLS[cell] in met.refusal) if CELLS[cell] else not met.refusal


def test_a_cut_that_would_have_an_extension_built_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cut = CUTS["DeepSpeed ZeRO-3, loaded to NVMe"]
    assert cut.left_out().startswith("DeepSpeed's pin_memory is not built; this builds it: python")
    if not shutil.which("ninja"):
        return
    (tmp_path / "pin_memory" / "build.ninja").touch()  # nothing is left to build
    assert cut.left_out().startswith("DeepSpeed's async_io is not built")
    (tmp_path / "async_io" / "build.ninja").write_text("rule make\n  command = false\nbuild made: make\n")
    assert cut.left_out().startswith("DeepSpeed's async_io is not built")
    (tmp_path / "async_io" / "build.ninja").write_text("")
    assert not cut.left_out()
    lock = tmp_path / "async_io" / "lock"
    lock.touch()
    assert not cut.left_out()  # who loads an extension has it for a moment
    os.utime(lock, (0, 0))
    assert cut.left_out().startswith(f"{lock} is there")


def test_the_table_has_the_worst_and_says_what_was_refused_why():
    cut, family = "`tp: N`", next(iter(FAMILIES))
    refused = Met(refusal="tp: expected a divisor, got 3.")
    found = {(cut, name, size): Met(1e-7 * size, 1.0) for name in FAMILIES for size in CUTS[cut].sizes}
    lines = table(found | {(cut, family, 3): refused, (cut, MLA, 2): "WRONG"})
    assert lines[2] == (
        "| `tp: N` | 2, 3, 4 | 4e-07; refused at 3 [1] | 4e-07 | 4e-07; ERROR at 2 (WRONG) | 4e-07 | 4e-07 |"
    )
    assert lines[-1] == "1. tp: expected a divisor, got N."


def test_a_part_that_is_counted_twice_unseen_is_wrong():
    fine, unseen, far = Met(1e-6, 1.0), Met(1e-6, 1e-5), Met(1e-3, 1.0)
    early = Met(1e-6, 1.0, early=1e-5)  # as if it made no difference whether all tokens are there
    assert agreed([fine, fine], "`shard: ddp`") == fine
    assert all(isinstance(agreed([fine, wrong], "`shard: ddp`"), str) for wrong in (unseen, far, early))
    assert isinstance(agreed([fine, Met(refusal="no")], "`shard: ddp`"), str)
