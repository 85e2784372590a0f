"""Attention of a span of queries, in both forms: masked, and as a kernel knows it; and what is refused."""

from __future__ import annotations

import pytest
import torch
from zoo import TINY

from qkov_dist import FisherCollector
from qkov_dist.distributed import context_parallel
from qkov_dist.distributed.connect import current
from qkov_dist.distributed.context_parallel import shared_tokens
from qkov_dist.distributed.topology import make_topology
from qkov_dist.errors import QkovError
from qkov_dist.layout.resolve import resolve

SPAN, NUM = 5, 3


@pytest.mark.parametrize("rank", range(NUM))
def test_a_mask_and_a_kernel_that_is_causal_are_one_attention(rank):
    """Of queries from the rank's own position on; GPUs have the kernel, CPUs the mask."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, NUM * SPAN, width).double() for heads, width in ((4, 6), (2, 6), (2, 8)))
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    spans = torch.stack(torch.cat([key, value], dim=-1).split(SPAN, dim=2))
    mine = slice(rank * SPAN, (rank + 1) * SPAN)
    mask = context_parallel._mask(
        "sdpa", rank, q_length=SPAN, device=key.device, batch_size=2, dtype=key.dtype, allow_is_causal_skip=True
    )
    for form in (mask, None):
        parts = (tensor[:, :, mine] for tensor in (query, key, value))
        output, _ = context_parallel._attention("sdpa", rank, lambda _: spans, torch.nn.Module(), *parts, form)
        torch.testing.assert_close(output, whole[:, :, mine].transpose(1, 2))


def test_other_attention_than_is_made_for_it_is_refused_and_left():
    model = TINY["llama"].build()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(QkovError, match=r"sdpa or eager, got flex_attention\. Set model\.attn_implementation=sdpa"):
        shared_tokens(model, None).__enter__()
    assert model.config._attn_implementation == "flex_attention"


def test_no_fewer_than_one_rank_shares_tokens():
    with pytest.raises(QkovError, match="cp: expected at least 1, got 0"):
        FisherCollector(cp=0)


def test_ranks_that_are_not_there_share_no_tokens():
    model = TINY["llama"].build()
    with pytest.raises(QkovError, match=r"context parallelism: expected a multiple of 2 ranks, .* got 1\."):
        make_topology(current(), model, resolve(model), [0], context=2)
