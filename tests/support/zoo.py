"""One tiny random model for every row of the layout table: the same few sizes, every architecture.

Weights, biases and norms are all random, so that nothing cancels; there is no dropout. Where an architecture allows it,
heads are grouped (4 query heads, 2 kv heads) and the head dim is 16 with a hidden size of 32, so that hidden / heads
is wrong. Vocabularies have 96 tokens, models are float32 in eval mode on the CPU; experts run one by one, so that
float64 works too (``grouped_mm`` has no float64).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

VOCAB = 96
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 2, 4, 2, 16


@dataclass(frozen=True)
class Tiny:
    """How to build one model; ``family`` is the name in ``families``, ``causal`` whether it masks the future."""

    name: str
    family: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = True
    masked_lm: bool = False
    float64: bool = True  # whether transformers' code for it runs in float64

    def config(self) -> Any:
        return AutoConfig.for_model(self.model_type, **{**COMMON, **self.settings})

    def build(self, seed: int = 0, **overrides: Any) -> Any:
        """The model, seeded; ``overrides`` go to the config."""
        config = AutoConfig.for_model(self.model_type, **{**COMMON, **self.settings, **overrides})
        auto = AutoModelForMaskedLM if self.masked_lm else AutoModelForCausalLM
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)  # of what is not a parameter of a useful size, such as A_log
            model = auto.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
        return randomize(model, seed)


def randomize(model: Any, seed: int = 0) -> Any:
    """Give every parameter a random value of useful size, in place; uses a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.data_ptr() in done:
                continue
            done.add(parameter.data_ptr())
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)  # a norm stays near its neutral value, a bias is no longer zero
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
NO_PDROP = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GROUPED = {"num_key_value_heads": KV_HEADS}
LLAMA = {**GROUPED, "head_dim": HEAD_DIM}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
MLA = {
    "num_key_value_heads": HEADS,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "q_lora_rank": 12,
    "kv_lora_rank": 14,
    "head_dim": 4,
    **MOE,
    "first_k_dense_replace": 1,
}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_size": HIDDEN}
DECODER_BERT = {**BERT, "is_decoder": True}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {
    "mamba_d_state": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "attn_layer_indices": [1],
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}


def _entries() -> list[Tiny]:
    entries = [
        Tiny("gpt2", "gpt2", "gpt2", NO_PDROP),
        Tiny("openai-gpt", "openai-gpt", "openai-gpt", NO_PDROP),
        Tiny("gpt_neox", "gpt_neox", "gpt_neox", NO_DROPOUT),
        Tiny("gpt_neox_japanese", "gpt_neox_japanese", "gpt_neox_japanese", NO_DROPOUT),
        Tiny("persimmon", "persimmon", "persimmon", NO_DROPOUT),
        Tiny("bloom", "bloom", "bloom", NO_DROPOUT),
        Tiny(
            "falcon_new",
            "falcon, new decoder",
            "falcon",
            {**NO_DROPOUT, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        ),
        Tiny("falcon_mqa", "falcon, multi-query", "falcon", {**NO_DROPOUT, "multi_query": True}),
        Tiny(
            "falcon_mha",
            "falcon, multi-head",
            "falcon",
            {**NO_DROPOUT, "multi_query": False, "alibi": True, "bias": True},
        ),
        Tiny("gpt_bigcode_mqa", "gpt_bigcode, multi-query", "gpt_bigcode", {**NO_PDROP, "multi_query": True}),
        Tiny("gpt_bigcode_mha", "gpt_bigcode, multi-head", "gpt_bigcode", {**NO_PDROP, "multi_query": False}),
        Tiny("mpt", "mpt", "mpt", {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64}),
        Tiny("dbrx", "dbrx", "dbrx", _DBRX),
        Tiny("phi3", "phi3", "phi3", {**GROUPED, **NO_DROPOUT, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
        Tiny("codegen", "codegen", "codegen", {**NO_PDROP, "num_attention_heads": 8, "n_ctx": 64, "rotary_dim": 2}),
        Tiny("gptj", "gptj", "gptj", {**NO_PDROP, "rotary_dim": 4}),
        Tiny(
            "gpt_neo",
            "gpt_neo",
            "gpt_neo",
            {
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 4,
                "embed_dropout": 0.0,
                "attention_dropout": 0.0,
                "resid_dropout": 0.0,
            },
        ),
        Tiny("opt", "opt", "opt", {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": HIDDEN}),
        Tiny("biogpt", "opt", "biogpt", {**BERT, "activation_dropout": 0.0, "layerdrop": 0.0}),
        Tiny(
            "xglm",
            "opt",
            "xglm",
            {
                "d_model": HIDDEN,
                "ffn_dim": 48,
                "num_layers": LAYERS,
                "attention_heads": HEADS,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "activation_dropout": 0.0,
                "layerdrop": 0.0,
            },
            float64=False,  # it fills a float32 tensor with the least float64
        ),
        Tiny("phi", "phi", "phi", {**LLAMA, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "qk_layernorm": False}),
        Tiny("mimo_v2_flash", "mimo_v2_flash", "mimo_v2_flash", _MIMO),
        Tiny("deepseek_v2", "mla", "deepseek_v2", {**MLA, "attention_bias": True}),
        Tiny("deepseek_v2_no_q_lora", "mla", "deepseek_v2", {**MLA, "q_lora_rank": None}),
        Tiny("deepseek_v3", "mla", "deepseek_v3", MLA),
        Tiny("minicpm3", "mla", "minicpm3", MLA),
        Tiny("gpt_oss", "gpt_oss", "gpt_oss", {**LLAMA, **MOE, **WINDOW, "rope_parameters": ROPE}),
        Tiny("afmoe", "afmoe", "afmoe", {**LLAMA, **MOE, **WINDOW, "num_dense_layers": 1}),
        Tiny("qwen3_next", "qwen3_next", "qwen3_next", {**LLAMA, **MOE, **HYBRID}),
        Tiny("qwen3_5", "qwen3_next", "qwen3_5_text", {**LLAMA, **HYBRID}),
        Tiny("gemma3n", "gemma3n", "gemma3n_text", {**GROUPED, **GEMMA3N, "num_kv_shared_layers": 0}),
        Tiny("gemma3n_kv_shared", "gemma3n", "gemma3n_text", {**GROUPED, **GEMMA3N, "num_kv_shared_layers": 2}),
        Tiny("gemma4", "gemma4", "gemma4_text", {**GROUPED, **GEMMA4}),
        Tiny(
            "gemma4_k_eq_v",
            "gemma4",
            "gemma4_text",
            {**GROUPED, **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        ),
        Tiny("gemma4_kv_shared", "gemma4", "gemma4_text", {**GROUPED, **GEMMA4, "num_kv_shared_layers": 2}),
        Tiny("bert", "bert", "bert", DECODER_BERT),
        Tiny("bert_masked", "bert", "bert", BERT, causal=False, masked_lm=True),
        Tiny("roberta", "bert", "roberta", DECODER_BERT),
        Tiny("roberta_masked", "bert", "roberta", BERT, causal=False, masked_lm=True),
        Tiny("electra", "bert", "electra", DECODER_BERT),
        Tiny("electra_masked", "bert", "electra", BERT, causal=False, masked_lm=True),
    ]
    entries += [Tiny(name, "olmo2", name, {**LLAMA, **extra}) for name, extra in _OLMO2_LIKE.items()]
    entries += [Tiny(name, "llama", name, {**LLAMA, **extra}) for name, extra in _LLAMA_LIKE.items()]
    return entries


_DBRX = {
    "d_model": HIDDEN,
    "n_heads": HEADS,
    "n_layers": LAYERS,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
}
_MIMO = {
    **LLAMA,
    "num_key_value_heads": 1,
    "v_head_dim": 10,
    "rope_parameters": None,
    **MOE,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
_OLMO2_LIKE: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {**MOE, "head_dim": HIDDEN // HEADS},
    "flex_olmo": MOE,
    "minimax_m2": MOE,
}
_LLAMA_LIKE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "mixtral": {**MOE, "sliding_window": None},
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": HEAD_DIM},
    "olmo": {"clip_qkv": None},
    "cohere": {"use_qk_norm": True},
    "granite": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "nemotron": {},
    "arcee": {},
    "helium": {"head_dim": HIDDEN // HEADS},
    "ernie4_5": {"use_bias": True},
    "stablelm": {"head_dim": HIDDEN // HEADS, "qk_layernorm": True, "use_qkv_bias": True},
    "phimoe": MOE,
    "granitemoe": MOE,
    "jamba": {**MOE, **MAMBA},
    "bamba": MAMBA2,
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 4},
    "qwen2": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "glm": {},
    "glm4": {},
    "seed_oss": {"attention_bias": True, "residual_dropout": 0.0},
    "qwen3": {},
    "qwen3_moe": MOE,
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": HEAD_DIM},
    "exaone4": WINDOW,
    "apertus": {"rope_parameters": ROPE},
    "dots1": {**MOE, "first_k_dense_replace": 1},
}

TINY: dict[str, Tiny] = {entry.name: entry for entry in _entries()}

# Close relatives that share a layout, one entry a model type, proved by the tests; not in TINY.
_SSM = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
_RELATIVES: list[tuple[str, str, dict[str, Any]]] = [
    *(("llama", name, {**LLAMA, **MOE}) for name in ("aria_text", "cohere2_moe", "ernie4_5_moe", "glm4_moe")),
    *(("llama", name, {**LLAMA, **MOE}) for name in ("granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe")),
    *(("llama", name, {**LLAMA, **MOE}) for name in ("llama4_text", "solar_open", "exaone_moe")),
    *(("llama", name, {**LLAMA, **WINDOW}) for name in ("cohere2", "cwm", "granite_swa", "ministral", "vaultgemma")),
    *(("llama", name, LLAMA) for name in ("hunyuan_v1_dense", "hyperclovax", "jais2", "ministral3", "nanochat")),
    ("llama", "minimax", {**LLAMA, **MOE, "layer_types": ["linear_attention", "full_attention"]}),
    ("llama", "falcon_h1", {**LLAMA, **_SSM}),
    ("opt", "lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
    ("qwen3_next", "qwen3_5_moe_text", {**LLAMA, **MOE, **HYBRID}),
    ("gemma4", "gemma4_unified_text", {**GROUPED, **GEMMA4, "num_kv_shared_layers": 2}),
    ("nemotron_h", "nemotron_h", {**LLAMA, **MOE}),
    ("modernbert-decoder", "modernbert-decoder", NO_DROPOUT),
    *(("mla", name, {**MLA, **_INDEXER}) for name in ("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "youtu", "axk1")),
    *(("bert", name, DECODER_BERT) for name in ("bert-generation", "camembert", "data2vec-text", "ernie")),
    *(("bert", name, DECODER_BERT) for name in ("megatron-bert", "rembert", "roc_bert", "roberta-prelayernorm")),
    *(("bert", name, DECODER_BERT) for name in ("roformer", "xlm-roberta", "xlm-roberta-xl")),
]
RELATIVES: dict[str, Tiny] = {name: Tiny(name, family, name, settings) for family, name, settings in _RELATIVES}


class StrangerAttention(nn.Module):
    """Causal attention that no library knows: a fused ``qkv`` in an order of its own, and ``out``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim, self.order = config.head_dim, config.order
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv = nn.Linear(HIDDEN, (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim)
        self.out = nn.Linear(self.num_heads * self.head_dim, HIDDEN)
        self.mix = nn.Linear(self.num_heads, self.num_heads, bias=False) if config.mixes_heads else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_kv, group = self.num_key_value_heads, self.num_heads // self.num_key_value_heads
        if self.order == "groups":  # per kv head: its queries, its key, its value
            rows = self.qkv(x).view(*x.shape[:2], num_kv, group + 2, self.head_dim)
            q, k, v = rows[:, :, :, :group].flatten(2, 3), rows[:, :, :, group], rows[:, :, :, group + 1]
        else:  # all values, then all queries, then all keys
            rows = self.qkv(x).view(*x.shape[:2], -1, self.head_dim)
            v, q, k = rows.split([num_kv, self.num_heads, num_kv], dim=2)
        k, v = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))
        heads = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)
        if self.mix is not None:
            heads = self.mix(heads.transpose(-1, -2)).transpose(-1, -2)
        return self.out(heads.flatten(2))


class StrangerLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm, self.talk = nn.LayerNorm(HIDDEN), StrangerAttention(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.talk(self.norm(x))


class Stranger(nn.Module):
    """A language model of an unknown type. ``order`` is "groups" or "blocks"; mixed heads cannot be told apart."""

    def __init__(self, order: str = "groups", *, mixes_heads: bool = False, model_type: str = "stranger") -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type=model_type,
            vocab_size=VOCAB,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=6,
            order=order,
            mixes_heads=mixes_heads,
        )
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(StrangerLayer(self.config) for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB)
        randomize(self)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
