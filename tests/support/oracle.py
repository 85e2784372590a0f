"""The oracle: dense float64 autograd, one sample at a time, with slicing of its own.

Nothing here imports the engine. A model is copied to float64, each sample is run alone and unpadded, the gradients of
the attention weights are formed whole, and each family's heads are cut out by reshaping, as the model's own forward
does it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

Heads = dict[str, list[Tensor]]  # block -> per native head, the head's gradient elements in one dimension


def per_sample_gradients(
    model: nn.Module,
    samples: list[tuple[np.ndarray, np.ndarray]],
    *,
    causal: bool = True,
    reduction: str = "mean",
    keep: tuple[str, ...] = ("",),
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Gradients of the parameters whose names begin as ``keep`` says, as stored; one dict a sample, and the losses."""
    twin = copy.deepcopy(model).double().eval()
    if any("experts" in name for name, _ in twin.named_parameters()):
        twin.set_experts_implementation("eager")  # the grouped matrix product has no float64
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    gradients, losses = [], []
    for ids, labels in samples:
        twin.zero_grad(set_to_none=True)
        with _float64_default():
            logits = twin(input_ids=torch.from_numpy(ids)[None]).logits[0].double()
        targets = torch.from_numpy(labels)
        if causal:
            logits, targets = logits[:-1], targets[1:]
        loss = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction=reduction)
        loss.backward()
        kept = {n: p for n, p in twin.named_parameters() if n.startswith(keep) and p.grad is not None}
        gradients.append({n: p.grad.clone() for n, p in kept.items()})
        losses.append(float(loss.detach()))
    return gradients, losses


@contextmanager
def _float64_default() -> Iterator[None]:
    """Some models make constants in the default type inside their forward (xglm's floor of the attention scores)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _flat(parts: Tensor) -> list[Tensor]:
    return [part.reshape(-1) for part in parts]


def split_heads(q: Tensor, k: Tensor | None, v: Tensor | None, o: Tensor, dims: tuple[int, int, int]) -> Heads:
    """Separate [out, in] projections in head order; ``dims`` are the head dims of q, k, v."""
    dq, dk, dv = dims
    heads = {"Q": _flat(q.reshape(-1, dq, q.shape[1])), "O": _flat(o.t().reshape(-1, dv, o.shape[0]))}
    if k is not None:
        heads["K"] = _flat(k.reshape(-1, dk, k.shape[1]))
    if v is not None:
        heads["V"] = _flat(v.reshape(-1, dv, v.shape[1]))
    return heads


def blocked(qkv: Tensor, o: Tensor, dim: int, num_heads: int, num_kv: int) -> Heads:
    """[Q x H | K x K | V x K]."""
    q, k, v = qkv.split([num_heads * dim, num_kv * dim, num_kv * dim])
    return split_heads(q, k, v, o, (dim, dim, dim))


def per_head(qkv: Tensor, o: Tensor, dim: int) -> Heads:
    """Per head [q, k, v]."""
    q, k, v = qkv.reshape(-1, 3, dim, qkv.shape[1]).unbind(1)
    return split_heads(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), o, (dim, dim, dim))


def per_group(qkv: Tensor, o: Tensor, dim: int, group: int) -> Heads:
    """Per kv group [G x q, k, v]."""
    grouped = qkv.reshape(-1, group + 2, dim, qkv.shape[1])
    q, k, v = grouped[:, :group].flatten(0, 2), grouped[:, group].flatten(0, 1), grouped[:, group + 1].flatten(0, 1)
    return split_heads(q, k, v, o, (dim, dim, dim))


def codegen(qkv: Tensor, o: Tensor, dim: int) -> Heads:
    """Four groups, each [Q, V, K]."""
    q, v, k = qkv.reshape(4, 3, -1, qkv.shape[1]).unbind(1)
    return split_heads(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), o, (dim, dim, dim))


def mla(q: Tensor, kv: Tensor, o: Tensor, num_heads: int, nope: int, dv: int) -> Heads:
    """Per head [nope, rope] queries and [k_nope, v] keys and values."""
    k, v = kv.reshape(num_heads, nope + dv, kv.shape[1]).split([nope, dv], dim=1)
    return split_heads(q, k.flatten(0, 1), v.flatten(0, 1), o, (q.shape[0] // num_heads, nope, dv))


OUTPUTS = ("c_proj", "dense", "out_proj", "o_proj", "output.dense")


def ema_fisher(squares: list[Tensor], steps: list[list[int]], decay: float) -> Tensor:
    """The EMA as it is written down: step by step, then bias-corrected."""
    fisher = torch.zeros_like(squares[0])
    for step in steps:
        fisher = decay * fisher + (1 - decay) * torch.stack([squares[n] for n in step]).mean(dim=0)
    return fisher / (1 - decay ** len(steps))


PAIRS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "interference": lambda gi, gj, reg: (gi.square() / reg * gj.abs()).sum(),
    "signed": lambda gi, gj, reg: (gi * gj / reg).sum(),
    "symmetric": lambda gi, gj, reg: (gi.abs() * gj.abs() / reg).sum(),
    "curvature": lambda gi, gj, reg: (gi.square() * gj.square() / reg).sum(),
}


def block_scores(
    heads: list[Heads],
    block: str,
    fisher: Callable[[list[Tensor]], Tensor],
    *,
    left: list[int],
    right: list[int],
    score: str = "interference",
    epsilon: float = 0.0,
    absolute: float = 0.0,
    relative: float = 1e-3,
) -> Tensor:
    """One block's scores [heads, left, right] by the definition, pair by pair; ``heads`` holds one dict a sample."""
    regularised = regularised_fishers(heads, block, fisher, epsilon=epsilon, absolute=absolute, relative=relative)
    out = torch.zeros(len(regularised), len(left), len(right), dtype=torch.float64)
    for h, of_head in enumerate(regularised):
        for a, i in enumerate(left):
            for b, j in enumerate(right):
                out[h, a, b] = PAIRS[score](heads[i][block][h], heads[j][block][h], of_head)
    return out


def regularised_fishers(
    heads: list[Heads],
    block: str,
    fisher: Callable[[list[Tensor]], Tensor],
    *,
    epsilon: float,
    absolute: float,
    relative: float,
) -> list[Tensor]:
    """R of each head of one block."""
    fishers = [fisher([sample[block][h].square() for sample in heads]) for h in range(len(heads[0][block]))]
    ridge = absolute + relative * float(torch.cat(fishers).mean())
    return [of_head.clamp_min(epsilon) + ridge for of_head in fishers]


def heads_of_layer(
    model: nn.Module, family: str, path: str, gradients: dict[str, Tensor], *, include_bias: bool = False
) -> Heads:
    """Cut one layer's attention gradients into heads, family by family, with counts from the model's own modules.

    Args:
        model: The model.
        family: Name of the zoo's family.
        path: Path of the attention module.
        gradients: One sample's gradients by parameter name.
        include_bias: Whether the biases of Q, K and V are one more input feature of their weights.
    """
    attention, config = model.get_submodule(path), model.config.get_text_config()

    def grad(name: str) -> Tensor | None:
        weight = gradients.get(f"{path}.{name}.weight", gradients.get(f"{path}.{name}.base_layer.weight"))
        bias = gradients.get(f"{path}.{name}.bias")
        if not include_bias or bias is None or name in OUTPUTS:
            return weight
        conv1d = family in ("gpt2", "openai-gpt")
        return torch.cat([weight, bias[None]]) if conv1d else torch.cat([weight, bias[:, None]], dim=1)

    if family in ("gpt2", "openai-gpt"):  # Conv1D stores [in, out]
        dim = config.n_embd // config.n_head
        return blocked(grad("c_attn").t(), grad("c_proj").t(), dim, config.n_head, config.n_head)
    if family in ("gpt_neox", "gpt_neox_japanese", "persimmon", "bloom", "falcon, multi-head"):
        return per_head(grad("query_key_value"), grad("dense"), config.hidden_size // config.num_attention_heads)
    if family == "falcon, multi-query":
        dim = config.hidden_size // config.num_attention_heads
        return blocked(grad("query_key_value"), grad("dense"), dim, config.num_attention_heads, 1)
    if family == "falcon, new decoder":
        dim, group = config.hidden_size // config.num_attention_heads, config.num_attention_heads // config.num_kv_heads
        return per_group(grad("query_key_value"), grad("dense"), dim, group)
    if family == "gpt_bigcode, multi-query":
        return blocked(grad("c_attn"), grad("c_proj"), config.n_embd // config.n_head, config.n_head, 1)
    if family == "gpt_bigcode, multi-head":
        return per_head(grad("c_attn"), grad("c_proj"), config.n_embd // config.n_head)
    if family == "mpt":
        return blocked(grad("Wqkv"), grad("out_proj"), config.d_model // config.n_heads, config.n_heads, config.n_heads)
    if family == "dbrx":
        dim, num_kv = config.d_model // config.n_heads, config.attn_config.kv_n_heads
        return blocked(grad("Wqkv"), grad("out_proj"), dim, config.n_heads, num_kv)
    if family == "phi3":
        dim = config.hidden_size // config.num_attention_heads
        kv = config.num_key_value_heads
        return blocked(grad("qkv_proj"), grad("o_proj"), dim, config.num_attention_heads, kv)
    if family == "codegen":
        return codegen(grad("qkv_proj"), grad("out_proj"), config.n_embd // config.n_head)
    if family == "mla":
        q = grad("q_proj") if config.q_lora_rank is None else grad("q_b_proj")
        heads, nope, dv = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        return mla(q, grad("kv_b_proj"), grad("o_proj"), heads, nope, dv)
    if family == "bert":
        dim = config.hidden_size // config.num_attention_heads
        names = ("self.query", "self.key", "self.value", "output.dense")
        return split_heads(*(grad(name) for name in names), (dim, dim, dim))
    if family == "qwen3_next":  # per head [q, gate]
        dim = config.head_dim
        q = grad("q_proj").reshape(config.num_attention_heads, 2, dim, -1)[:, 0].flatten(0, 1)
        return split_heads(q, grad("k_proj"), grad("v_proj"), grad("o_proj"), (dim, dim, dim))
    output = next(name for name in ("o_proj", "out_proj", "dense") if grad(name) is not None)
    dim = getattr(attention, "head_dim", None)
    dv = config.v_head_dim if family == "mimo_v2_flash" else dim
    return split_heads(grad("q_proj"), grad("k_proj"), grad("v_proj"), grad(output), (dim, dim, dv))
