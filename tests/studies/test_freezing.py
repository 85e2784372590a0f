"""The study of freezing: its model is the whole one, and what is said of its results is what they are."""

from __future__ import annotations

import torch
from freezing import upper_of
from zoo import TINY, VOCAB


def test_the_last_layers_alone_are_the_same_function():
    whole = TINY["llama"].build(num_hidden_layers=3)
    upper = upper_of(*(TINY["llama"].build(num_hidden_layers=3) for _ in range(2)), 1)
    ids = torch.arange(3, 15).view(2, 6) % VOCAB
    expected = whole(input_ids=ids, use_cache=False).logits
    for _ in range(2):  # the second time from memory
        torch.testing.assert_close(upper(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=0)
    assert not torch.equal(upper(input_ids=ids.flip(1), use_cache=False).logits, expected)
