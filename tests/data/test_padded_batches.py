"""A batch from Python: what is taken off, what may stand beside the tokens, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qkov_dist.data.given import samples_of_batch
from qkov_dist.errors import QkovError

IDS = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def samples(**batch: Any) -> list[tuple[list[int], list[int]]]:
    found = samples_of_batch(batch, where="batch", vocab_size=10)
    return [(sample.input_ids.tolist(), sample.labels.tolist()) for sample in found]


PLAIN = samples(input_ids=IDS, attention_mask=MASK)


def test_padding_is_taken_off() -> None:
    assert PLAIN == [([5, 6, 7], [5, 6, 7]), ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9])]


@pytest.mark.parametrize(
    "more",
    [
        {"labels": None},
        {"token_type_ids": torch.zeros_like(IDS)},
        {"token_type_ids": None, "position_ids": None, "labels": None},
        {"position_ids": torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])},
        {"position_ids": [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]},
    ],
)
def test_what_says_nothing_more_may_be_there(more: dict[str, Any]) -> None:
    assert samples(input_ids=IDS, attention_mask=MASK, **more) == PLAIN


def test_a_mask_of_none_is_no_mask() -> None:
    assert samples(input_ids=IDS[1:], attention_mask=None, position_ids=torch.arange(5)[None]) == PLAIN[1:]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"token_type_ids": torch.ones_like(IDS)}, "batch: token_type_ids: expected zeros alone"),
        ({"position_ids": torch.arange(5).repeat(2, 1)}, "batch: position_ids: expected 0, 1, 2"),
        ({"position_ids": torch.arange(5)[None]}, "of one shape"),
        ({"inputs_embeds": np.zeros((2, 5, 4))}, "batch: expected input_ids"),
        ({"pixel_values": np.zeros((2, 5))}, "batch: expected input_ids"),
    ],
)
def test_what_says_more_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(QkovError, match=message):
        samples(input_ids=IDS, attention_mask=MASK, **more)
