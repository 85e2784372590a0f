"""Where each head lives in each architecture, as data.

One ``Family`` is one layout: which child modules of the attention module are projections, the order of heads along the
rows of each (``rows.py``), the columns of O, and which attributes of the module state the head dims. A model type with
several layouts has several families, told apart by ``when``: the config attributes that select one. Nothing here is
code; ``proof`` checks each claim by perturbation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OUTPUT_MARK = "cols "


@dataclass(frozen=True)
class HeadDims:
    """Attributes of the attention module that state the head dims; ``a/b`` is the quotient of two of them.

    ``k`` and ``v`` default to ``q``. Under MLA the head-resolved part of a key is narrower than a query.
    """

    q: str = "head_dim"
    k: str = ""
    v: str = ""


@dataclass(frozen=True)
class Family:
    """One layout.

    Args:
        name: What the layout is called in reports.
        model_types: ``config.model_type`` of the text model.
        attention: Path of the attention module inside a decoder layer; None for the one that has all the projections.
        orders: (path inside the attention module, row order); the output projection's is ``"cols ..."``.
        optional: Projections that a layer may lack.
        when: (config attribute, value) pairs that must all hold.
        dims: Where the head dims are read.
        notes: What a reader of the results must know.
    """

    name: str
    model_types: tuple[str, ...]
    attention: str | None
    orders: tuple[tuple[str, str], ...]
    optional: tuple[str, ...] = ()
    when: tuple[tuple[str, object], ...] = ()
    dims: HeadDims = HeadDims()
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """The Q, K, V projections: (path, row order)."""
        return tuple((path, order) for path, order in self.orders if not order.startswith(OUTPUT_MARK))

    @property
    def output(self) -> tuple[str, str]:
        """The O projection: (path, column order)."""
        ((path, order),) = [(p, o) for p, o in self.orders if o.startswith(OUTPUT_MARK)]
        return path, order.removeprefix(OUTPUT_MARK)

    @property
    def required(self) -> tuple[str, ...]:
        """Projections that every attention module of the family has."""
        return tuple(path for path, _ in self.orders if path not in self.optional)


def _separate(q: str, k: str, v: str, o: str) -> tuple[tuple[str, str], ...]:
    return (q, "H*q"), (k, "K*k"), (v, "K*v"), (o, "cols H*v")


def _fused(qkv: str, order: str, o: str) -> tuple[tuple[str, str], ...]:
    return (qkv, order), (o, "cols H*v")


_BLOCKED, _GROUPED_BLOCKS, _PER_HEAD, _PER_GROUP = "H*q H*k H*v", "H*q K*k K*v", "H*(q k v)", "K*(G*q k v)"
_LLAMA = _separate("q_proj", "k_proj", "v_proj", "o_proj")
_OPT = _separate("q_proj", "k_proj", "v_proj", "out_proj")
_HEAD_SIZE = HeadDims(q="head_size")


NORM_NOTE = "q_norm and k_norm span all heads: the heads of Q, and of K, are coupled through their common scale"
SINK_NOTE = "attention sinks, where a layer has them, are parameters of their own: they belong to no block"


FAMILIES: tuple[Family, ...] = (
    Family("gpt2", ("gpt2",), "attn", _fused("c_attn", _BLOCKED, "c_proj")),
    Family(
        "openai-gpt",
        ("openai-gpt",),
        "attn",
        _fused("c_attn", _BLOCKED, "c_proj"),
        dims=HeadDims(q="split_size/n_head"),  # this module has no head dim of its own
    ),
    Family("gpt_neox", ("gpt_neox",), "attention", _fused("query_key_value", _PER_HEAD, "dense"), dims=_HEAD_SIZE),
    Family(
        "gpt_neox_japanese",
        ("gpt_neox_japanese",),
        "attention",
        _fused("query_key_value", _PER_HEAD, "dense"),
        dims=_HEAD_SIZE,
        notes=("dense_bias of the last layer is a parameter of its own, not the bias of a projection",),
    ),
    Family("persimmon", ("persimmon",), "self_attn", _fused("query_key_value", _PER_HEAD, "dense")),
    Family("bloom", ("bloom",), "self_attention", _fused("query_key_value", _PER_HEAD, "dense")),
    Family(
        "falcon, new decoder",
        ("falcon",),
        "self_attention",
        _fused("query_key_value", _PER_GROUP, "dense"),
        when=(("new_decoder_architecture", True),),
    ),
    Family(
        "falcon, multi-query",
        ("falcon",),
        "self_attention",
        _fused("query_key_value", _GROUPED_BLOCKS, "dense"),
        when=(("new_decoder_architecture", False), ("multi_query", True)),
    ),
    Family(
        "falcon, multi-head",
        ("falcon",),
        "self_attention",
        _fused("query_key_value", _PER_HEAD, "dense"),
        when=(("new_decoder_architecture", False), ("multi_query", False)),
    ),
    Family(
        "gpt_bigcode, multi-query",
        ("gpt_bigcode",),
        "attn",
        _fused("c_attn", _GROUPED_BLOCKS, "c_proj"),
        when=(("multi_query", True),),
    ),
    Family(
        "gpt_bigcode, multi-head",
        ("gpt_bigcode",),
        "attn",
        _fused("c_attn", _PER_HEAD, "c_proj"),
        when=(("multi_query", False),),
    ),
    Family("mpt", ("mpt",), "attn", _fused("Wqkv", _BLOCKED, "out_proj")),
    Family("dbrx", ("dbrx",), "norm_attn_norm.attn", _fused("Wqkv", _GROUPED_BLOCKS, "out_proj")),
    Family("phi3", ("phi3",), "self_attn", _fused("qkv_proj", _GROUPED_BLOCKS, "o_proj")),
    Family("codegen", ("codegen",), "attn", _fused("qkv_proj", "4*(H/4*q H/4*v H/4*k)", "out_proj")),
    Family("gptj", ("gptj",), "attn", _OPT),
    Family("gpt_neo", ("gpt_neo",), "attn.attention", _OPT),
    Family("opt", ("opt", "biogpt", "xglm", "lfm2"), "self_attn", _OPT),
    Family("phi", ("phi",), "self_attn", _separate("q_proj", "k_proj", "v_proj", "dense")),
    Family(
        "llama",
        (
            *("llama", "mistral", "mixtral", "gemma", "gemma2", "olmo", "cohere", "granite", "smollm3", "nemotron"),
            *("arcee", "helium", "ernie4_5", "stablelm", "phimoe", "granitemoe", "jamba", "bamba", "starcoder2"),
            *("qwen2", "qwen2_moe", "glm", "glm4", "seed_oss"),
            *("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "exaone4", "apertus", "dots1"),
            *("aria_text", "cohere2", "cohere2_moe", "cwm", "ernie4_5_moe", "exaone_moe", "glm4_moe", "granite_swa"),
            *("granitemoe_swa", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "jais2"),
            *(
                "llama4_text",
                "minimax",
                "qwen2_vl_text",
                "qwen2_5_vl_text",
                "ministral",
                "ministral3",
                "nanochat",
                "solar_open",
                "vaultgemma",
                "falcon_h1",
            ),
        ),
        "self_attn",
        _LLAMA,
    ),
    Family("gpt_oss", ("gpt_oss",), "self_attn", _LLAMA, notes=(SINK_NOTE,)),
    Family("olmo2", ("olmo2", "olmo3", "olmoe", "flex_olmo", "minimax_m2"), "self_attn", _LLAMA, notes=(NORM_NOTE,)),
    Family(
        "qwen3_next",
        ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        "self_attn",
        (("q_proj", "H*(q gate)"), *_LLAMA[1:]),
        notes=("the gate rows of q_proj belong to no block",),
    ),
    Family("afmoe", ("afmoe",), "self_attn", _LLAMA),
    Family("nemotron_h", ("nemotron_h",), "mixer", _LLAMA),
    Family("modernbert-decoder", ("modernbert-decoder",), "attn", _separate("q_proj", "k_proj", "v_proj", "Wo")),
    Family("gemma3n", ("gemma3n", "gemma3n_text"), "self_attn", _LLAMA, optional=("k_proj", "v_proj")),
    Family(
        "gemma4", ("gemma4", "gemma4_text", "gemma4_unified_text"), "self_attn", _LLAMA, optional=("k_proj", "v_proj")
    ),
    Family(
        "mimo_v2_flash",
        ("mimo_v2_flash",),
        "self_attn",
        _LLAMA,
        dims=HeadDims(v="v_head_dim"),
        notes=(SINK_NOTE,),
    ),
    Family(
        "mla",
        (
            *("deepseek_v2", "deepseek_v3", "minicpm3"),
            *("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "youtu", "axk1"),
        ),
        "self_attn",
        (("q_proj", "H*q"), ("q_b_proj", "H*q"), ("kv_b_proj", "H*(k v)"), ("o_proj", "cols H*v")),
        optional=("q_proj", "q_b_proj"),
        dims=HeadDims(q="qk_head_dim", k="qk_nope_head_dim", v="v_head_dim"),
        notes=(
            "a-projections (q_a_proj, kv_a_proj_with_mqa) are shared by all heads: not head-resolved",
            "K is the nope part of kv_b_proj; the rope key is shared by all heads",
        ),
    ),
    Family(
        "bert",
        (
            *("bert", "roberta", "electra"),
            *("bert-generation", "camembert", "data2vec-text", "ernie", "megatron-bert", "rembert", "roc_bert"),
            *("roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        ),
        "attention",
        _separate("self.query", "self.key", "self.value", "output.dense"),
        dims=HeadDims(q="self.attention_head_size"),
    ),
)


REFUSED: Mapping[str, str] = {
    "diffllama": "paired heads share Q and V, so a score per head is not defined",
}
