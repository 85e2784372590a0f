from __future__ import annotations

import pytest
import torch

from qkov_dist.capture.sinks import Factors
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.batches import Batch
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site

Q, K = Site(0, "q"), Site(0, "k")


def batch_of(numbers: tuple[int, ...], lengths: tuple[int, ...]) -> Batch:
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for n, length in enumerate(lengths):
        mask[n, :length] = 1
    return Batch(numbers, tuple(map(str, numbers)), torch.zeros_like(mask), mask, torch.zeros_like(mask), mask)


def fill(store: FactorStore, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three batches of two sites that share one X; returns what should come back."""
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[torch.Tensor, ...]] = []
    for numbers, lengths in [((4, 1), (3, 2)), ((0,), (5,)), ((2, 3), (1, 1))]:
        tokens = sum(lengths)
        x, dq, dk = (torch.randn(tokens, width, generator=generator).to(dtype) for width in (6, 4, 2))
        with store.batch(batch_of(numbers, lengths)):
            store.add(Factors(K, Q, x, dk))
            store.add(Factors(Q, Q, x, dq))
        kept.append((x, dq, dk))
    return tuple(torch.cat(parts) for parts in zip(*kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0, 150, 10**6])
def test_what_comes_back_is_identical_whatever_the_budget(budget, dtype, tmp_path):
    store = FactorStore(budget, tmp_path)
    x, dq, dk = fill(store, dtype)
    assert torch.equal(store.x(Q).values, x)
    assert torch.equal(store.x(K).values, x)
    assert torch.equal(store.d(Q).values, dq)
    assert torch.equal(store.d(K).values, dk)
    assert store.spans == {4: (0, 3), 1: (3, 5), 0: (5, 10), 2: (10, 11), 3: (11, 12)}
    assert store.bytes_in_memory <= budget
    assert store.bytes_in_memory + store.bytes_on_disk == sum(t.nbytes for t in (x, dq, dk))
    store.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [0, 150, 10**6])
def test_a_failed_batch_leaves_no_trace(budget, tmp_path):
    store = FactorStore(budget, tmp_path)
    x, dq, _ = fill(store, torch.float32)
    before = store.bytes_in_memory, store.bytes_on_disk

    def fail_halfway() -> None:
        with store.batch(batch_of((9,), (2,))):
            store.add(Factors(Q, Q, torch.ones(2, 6), torch.ones(2, 4)))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail_halfway()
    assert (store.bytes_in_memory, store.bytes_on_disk) == before
    assert torch.equal(store.x(Q).values, x)
    assert torch.equal(store.d(Q).values, dq)
    assert 9 not in store.spans


def test_an_uncaptured_site_is_named(tmp_path):
    store = FactorStore(0, tmp_path)
    with pytest.raises(QkovError, match=r"layer 3 \(o\): expected captured factors, got none"):
        store.d(Site(3, "o"))


def test_a_changed_sharing_of_inputs_is_an_error(tmp_path):
    store = FactorStore(10**6, tmp_path)
    fill(store, torch.float32)
    with pytest.raises(QkovError, match="the same input as q in every batch"), store.batch(batch_of((9,), (2,))):
        store.add(Factors(K, K, torch.ones(2, 6), torch.ones(2, 2)))


def test_a_damaged_spill_file_is_an_error(tmp_path):
    store = FactorStore(0, tmp_path)
    fill(store, torch.float32)
    for path in tmp_path.rglob("*.bin"):
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(QkovError, match="bytes of spilled factors"):
        store.x(Q)
