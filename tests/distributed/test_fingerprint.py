"""Checksums that add up over parts, and a fingerprint that sees every change of what a model computes."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from checkpoints import LLAMA, llama
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

from qkov_dist.config import ModelConfig
from qkov_dist.distributed import fingerprint as fingerprint_module
from qkov_dist.distributed.fingerprint import checksum, fingerprint
from qkov_dist.errors import QkovError
from qkov_dist.loading.architecture import meta_model
from qkov_dist.loading.models import load_model


def parts(matrix: torch.Tensor, rows: list[int], cols: list[int]) -> list[tuple[int, int]]:
    row_cuts, col_cuts = [0, *sorted(rows), matrix.shape[0]], [0, *sorted(cols), matrix.shape[1]]
    return [
        checksum(matrix[row:row_end, col:col_end], torch.arange(row, row_end), torch.arange(col, col_end))
        for row, row_end in pairwise(row_cuts)
        for col, col_end in pairwise(col_cuts)
    ]


@given(
    rows=st.lists(st.integers(0, 11), max_size=3),
    cols=st.lists(st.integers(0, 7), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8]),
)
def test_checksums_of_the_parts_add_up(rows: list[int], cols: list[int], dtype: torch.dtype) -> None:
    matrix = (torch.randn(11, 7, generator=torch.Generator().manual_seed(0)) * 50).abs().to(dtype)
    plain, weighted = (sum(values) % 2**64 for values in zip(*parts(matrix, rows, cols), strict=True))
    assert (plain, weighted) == checksum(matrix)
    shifted = [checksum(matrix[:5]), checksum(matrix[5:])]  # a part whose place is not told
    assert (sum(values[1] for values in shifted) % 2**64) != checksum(matrix)[1]


def test_checksum_does_not_depend_on_chunks_or_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(33, 65)
    whole = checksum(matrix)
    monkeypatch.setattr(fingerprint_module, "CHUNK_ELEMENTS", 100)
    assert checksum(matrix) == whole
    assert checksum(matrix.t().contiguous().t()) == whole
    assert checksum(matrix.t()) != whole


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (0, 3), (3, 0), (2, 3, 4)])
def test_checksum_of_every_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape)
    assert (checksum(tensor) != (0, 0)) == (tensor.numel() > 0)


def test_fingerprint_sees_every_single_element() -> None:
    model = llama()
    base = fingerprint(model)
    for parameter in {id(tensor): tensor for tensor in model.parameters()}.values():
        flat = parameter.data.view(-1)
        for index in (0, len(flat) // 2, len(flat) - 1):
            old = flat[index].item()
            flat[index] = torch.nextafter(torch.tensor(old), torch.tensor(9.0))
            assert fingerprint(model) != base
            flat[index] = old
    assert fingerprint(model) == base


def test_fingerprint_sees_elements_change_places() -> None:
    model = llama()
    base = fingerprint(model)
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    for order in (torch.arange(15, -1, -1), torch.tensor([1, 0, *range(2, 16)])):
        kept = weight.clone()
        weight.copy_(kept[order])
        assert fingerprint(model) != base
        weight.copy_(kept[:, order])
        assert fingerprint(model) != base
        weight.copy_(kept)
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    assert fingerprint(model) != base


def test_fingerprint_sees_settings_without_weights() -> None:
    other = copy.deepcopy(LLAMA)
    other.rms_norm_eps = 1e-3
    model = LlamaForCausalLM(other)
    model.load_state_dict(llama().state_dict())
    assert fingerprint(model) != fingerprint(llama())


def test_fingerprint_ignores_how_the_model_is_held(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    base = fingerprint(llama())
    model = llama().requires_grad_(False).train()
    model.config.use_cache = False
    model.config._attn_implementation = "eager"
    model(torch.ones(1, 4, dtype=torch.int64))
    assert fingerprint(model) == base
    assert fingerprint(load_model(ModelConfig(str(tmp_path), attn_implementation="eager")).model) == base
    assert fingerprint(llama().bfloat16()) != base
    assert fingerprint(llama(seed=1)) != base


def test_fingerprint_covers_buffers_and_small_integers() -> None:
    module = nn.Linear(3, 3)
    module.register_buffer("scale", torch.tensor([1, 2, 3], dtype=torch.int8))
    module.register_buffer("cache", torch.zeros(2), persistent=False)
    base = fingerprint(module)
    module.cache += 1
    assert fingerprint(module) == base
    module.scale[1] = -2
    assert fingerprint(module) != base


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_fingerprint_covers_lora() -> None:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), settings)
    base = fingerprint(model)
    weight = next(tensor for name, tensor in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        weight[0, 0] = 1.0
    assert fingerprint(model) != base


def test_fingerprint_needs_weights() -> None:
    with pytest.raises(QkovError, match="meta device"):
        fingerprint(meta_model(copy.deepcopy(LLAMA)))


@pytest.mark.gpu
def test_fingerprint_is_the_same_on_a_gpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert fingerprint(llama().to(dtype)) == fingerprint(llama().to("cuda", dtype))
