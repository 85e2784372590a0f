"""Layouts of every known family, in integers; refusals; custom architectures. No forward runs here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from zoo import COMMON, HEADS, HIDDEN, LLAMA, RELATIVES, TINY, VOCAB, Stranger, Tiny

from qkov_dist.errors import QkovError
from qkov_dist.layout import resolve as layout_module
from qkov_dist.layout.heads import AttentionLayer, Layout, Projection, layout_table
from qkov_dist.layout.proof import resolve_proved
from qkov_dist.layout.rects import Rect, check_exact_cover, first_overlap
from qkov_dist.layout.resolve import candidates, register_layout, resolve, unresolved

ALL = {**TINY, **RELATIVES}


@pytest.fixture(autouse=True)
def _forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "_REGISTERED", {})


def spelled(projection: Projection) -> str:
    """The heads of a projection in the order of its rows (columns for O)."""
    along_rows = sorted(projection.slices, key=lambda s: (s.rect.row, s.rect.col))
    return " ".join(f"{piece.block}{piece.head}" for piece in along_rows)


def widths(layer: AttentionLayer) -> dict[str, set[int]]:
    """Rows (for O, columns) of a head, per block."""
    found: dict[str, set[int]] = {}
    for projection in layer.projections:
        for piece in projection.slices:
            found.setdefault(piece.block, set()).add(piece.rect.shape[piece.block == "O"])
    return found


def check_tiles(layer: AttentionLayer) -> None:
    """Slices are disjoint and cover what is not a gate; every native head occurs exactly once."""
    for projection in layer.projections:
        whole, rects = Rect.of_shape(*projection.shape), [piece.rect for piece in projection.slices]
        if "gate" in projection.order:
            assert first_overlap(rects) is None
            assert all(rect.intersect(whole) == rect for rect in rects)
            assert 2 * sum(rect.area for rect in rects) == whole.area
        else:
            check_exact_cover(projection.module, whole, rects)
    counts = Counter((piece.block, piece.head) for p in layer.projections for piece in p.slices)
    assert set(counts.values()) == {1}
    for block in layer.blocks:
        wanted = layer.num_heads if block in ("Q", "O") else layer.num_kv_heads
        assert layer.heads(block) == tuple(range(wanted))


@pytest.mark.parametrize("tiny", ALL.values(), ids=lambda tiny: tiny.name)
def test_every_known_model_resolves_and_tiles(tiny: Tiny) -> None:
    model = tiny.build()
    layout = resolve(model)
    assert layout.family == tiny.family
    assert not layout.proved
    assert layout.num_layers == len(layout.layers) + len(layout.others)
    assert sorted([x.index for x in (*layout.layers, *layout.others)]) == list(range(layout.num_layers))
    for layer in layout.layers:
        check_tiles(layer)
        for projection in layer.projections:
            linear = model.get_submodule(projection.module)
            stored = tuple(linear.weight.shape)
            assert stored == (projection.shape[::-1] if projection.transposed else projection.shape)
            assert projection.has_bias == (linear.bias is not None)


@pytest.mark.parametrize("tiny", TINY.values(), ids=lambda tiny: tiny.name)
def test_the_meta_device_gives_the_same_layout(tiny: Tiny) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(tiny.model_type, **{**COMMON, **tiny.settings})
        skeleton = type(tiny.build())(config)
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
    assert resolve(skeleton) == resolve(tiny.build())


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("gpt2", "c_attn", "Q0 Q1 Q2 Q3 K0 K1 K2 K3 V0 V1 V2 V3"),
        ("gpt_neox", "query_key_value", "Q0 K0 V0 Q1 K1 V1 Q2 K2 V2 Q3 K3 V3"),
        ("falcon_new", "query_key_value", "Q0 Q1 K0 V0 Q2 Q3 K1 V1"),
        ("falcon_mqa", "query_key_value", "Q0 Q1 Q2 Q3 K0 V0"),
        ("falcon_mha", "query_key_value", "Q0 K0 V0 Q1 K1 V1 Q2 K2 V2 Q3 K3 V3"),
        ("gpt_bigcode_mqa", "c_attn", "Q0 Q1 Q2 Q3 K0 V0"),
        ("gpt_bigcode_mha", "c_attn", "Q0 K0 V0 Q1 K1 V1 Q2 K2 V2 Q3 K3 V3"),
        ("dbrx", "Wqkv", "Q0 Q1 Q2 Q3 K0 K1 V0 V1"),
        ("phi3", "qkv_proj", "Q0 Q1 Q2 Q3 K0 K1 V0 V1"),
        ("codegen", "qkv_proj", "Q0 Q1 V0 V1 K0 K1 Q2 Q3 V2 V3 K2 K3 Q4 Q5 V4 V5 K4 K5 Q6 Q7 V6 V7 K6 K7"),
        ("deepseek_v3", "kv_b_proj", "K0 V0 K1 V1 K2 V2 K3 V3"),
        ("qwen3_next", "q_proj", "Q0 Q1 Q2 Q3"),
        ("llama", "k_proj", "K0 K1"),
        ("gpt2", "c_proj", "O0 O1 O2 O3"),
    ],
)
def test_heads_lie_in_the_order_of_the_table(name: str, module: str, expected: str) -> None:
    projections = resolve(TINY[name].build()).layers[0].projections
    (projection,) = [p for p in projections if p.module.endswith(module)]
    assert spelled(projection) == expected


def test_head_dims_are_read_not_divided() -> None:
    layout = resolve(TINY["llama"].build())
    assert [(x.head_dim, x.v_head_dim, x.num_heads, x.num_kv_heads) for x in layout.layers] == [(16, 16, 4, 2)] * 2
    assert HIDDEN // HEADS != 16
    gemma = resolve(TINY["gemma4"].build())
    assert [layer.head_dim for layer in gemma.layers] == [8, 16, 8, 16]
    mimo = resolve(TINY["mimo_v2_flash"].build())
    assert [widths(layer) for layer in mimo.layers] == [{"Q": {16}, "K": {16}, "V": {10}, "O": {10}}] * 2
    assert [layer.num_kv_heads for layer in mimo.layers] == [1, 2]
    assert (mimo.num_heads, mimo.num_kv_heads) == (4, 2)
    mla = resolve(TINY["deepseek_v2"].build())
    assert widths(mla.layers[0]) == {"Q": {12}, "K": {8}, "V": {10}, "O": {10}}


def test_gate_rows_belong_to_no_block_and_are_named() -> None:
    layout = resolve(TINY["qwen3_next"].build())
    (layer,) = layout.layers
    q_proj = layer.projections[0]
    assert [(piece.rect.row, piece.rect.row_end) for piece in q_proj.slices] == [
        (h * 32, h * 32 + 16) for h in range(4)
    ]
    assert "the gate rows of q_proj belong to no block" in layer.notes
    assert "in no block of Q, K, V, O: gate_proj" in resolve(TINY["afmoe"].build()).layers[0].notes
    mla_notes = " ".join(resolve(TINY["deepseek_v3"].build()).layers[0].notes)
    assert "not head-resolved" in mla_notes
    assert "in no block of Q, K, V, O: q_a_proj, kv_a_proj_with_mqa" in mla_notes


@pytest.mark.parametrize("name", ["gemma3n_kv_shared", "gemma4_kv_shared"])
def test_shared_keys_and_values_are_found_in_an_architecture_that_is_not_known(name: str) -> None:
    model = TINY[name].build()
    known = resolve(model)
    model.config.model_type = "unheard_of"
    found = resolve_proved(model)
    assert [layer.blocks for layer in found.layers] == [layer.blocks for layer in known.layers]
    assert [layer.projections for layer in found.layers] == [layer.projections for layer in known.layers]
    advice = str(unresolved(model, "unknown"))
    assert "head_dim='head_dim', optional=['k_proj', 'v_proj'])" in advice
    assert "optional" not in str(unresolved(TINY["llama"].build(), "unknown"))


def test_missing_projections_of_gemma4_are_named() -> None:
    shared = resolve(TINY["gemma4_kv_shared"].build())
    assert [layer.blocks for layer in shared.layers] == [("Q", "K", "V", "O")] * 2 + [("Q", "O")] * 2
    assert "earlier layer" in shared.layers[3].notes[0]
    equal = resolve(TINY["gemma4_k_eq_v"].build())
    assert [layer.blocks for layer in equal.layers] == [("Q", "K", "V", "O"), ("Q", "K", "O")] * 2
    assert "keys and values" in equal.layers[1].notes[0]
    assert equal.blocks == ("Q", "K", "V", "O")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("jamba", ["JambaMambaMixer"]),
        ("bamba", ["BambaMixer"]),
        ("qwen3_next", ["Qwen3NextGatedDeltaNet"]),
        ("minimax", ["MiniMaxLightningAttention"]),
        ("lfm2", ["Lfm2ShortConv"]),
        ("nemotron_h", ["NemotronHMamba2Mixer", "NemotronHMoE", "NemotronHMLP"]),
    ],
)
def test_layers_without_softmax_attention_are_listed(name: str, kinds: list[str]) -> None:
    layout = resolve(ALL[name].build())
    assert [other.kind for other in layout.others] == kinds
    with pytest.raises(QkovError, match=kinds[0]):
        layout.layer(layout.others[0].index)
    assert layout.layer(layout.layers[0].index) is layout.layers[0]


def test_a_mixer_beside_the_attention_is_named() -> None:
    assert "beside the attention there is a FalconH1Mixer" in resolve(RELATIVES["falcon_h1"].build()).layers[0].notes[0]


def test_the_table_names_every_block_of_every_layer() -> None:
    table = layout_table(resolve(TINY["gpt2"].build()))
    assert [(row["layer"], row["block"]) for row in table] == [(str(i), b) for i in range(2) for b in "QKVO"]
    assert table[3] == {
        "layer": "0",
        "block": "O",
        "heads": "4",
        "parameter": "transformer.h.0.attn.c_proj.weight",
        "shape": "[32, 32]",
        "slice rule": "cols H*v",
        "bias": "yes",
    }


def test_only_the_text_decoder_counts_in_a_multimodal_model() -> None:
    text = LlamaConfig(**{**COMMON, **LLAMA})
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=95))
    layout = resolve(model)
    assert layout.model_type == "llama"
    assert [layer.module for layer in layout.layers] == [f"model.language_model.layers.{i}.self_attn" for i in range(2)]


def _refused() -> Iterator[tuple[str, nn.Module, str]]:
    t5 = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    yield "t5", T5ForConditionalGeneration(t5), "encoder-decoder"
    yield "gpt2", TINY["gpt2"].build(add_cross_attention=True), "cross-attention"
    mamba = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2)
    yield "mamba", MambaForCausalLM(mamba), "allows 0 layouts"
    yield "stranger", Stranger(), "layouts"


@pytest.mark.parametrize(
    ("model_type", "model", "why"), list(_refused()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_cannot_be_resolved_is_refused_with_parameters_and_remedy(
    model_type: str, model: nn.Module, why: str
) -> None:
    with pytest.raises(QkovError, match=why) as refusal:
        resolve(model)
    message = str(refusal.value)
    assert "\n    from qkov_dist import register_layout\n" in message
    assert f"register_layout({model_type!r}, orders, head_dim='head_dim')" in message
    assert "attention-like parameters [out, in]: " in message
    if model_type == "stranger":
        assert "blocks.*.talk.qkv [48, 32]; blocks.*.talk.out [32, 24]." in message


def test_heads_that_share_weights_are_refused_for_good() -> None:
    llama = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("diffllama", **llama, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(QkovError, match="paired heads share Q and V") as refusal:
        resolve(AutoModelForCausalLM.from_config(config))
    assert "choose another model" in str(refusal.value)
    assert "register_layout" not in str(refusal.value)


def test_a_model_without_a_config_is_refused() -> None:
    with pytest.raises(QkovError, match="a config that has a model_type"):
        resolve(nn.Linear(2, 2))


def test_counts_that_disagree_with_the_module_are_refused() -> None:
    model = TINY["llama"].build()
    model.model.layers[1].self_attn.num_key_value_groups = 4
    with pytest.raises(QkovError, match=r"layers\.1\.self_attn.*\[2\] fitting kv head counts .* states 1"):
        resolve(model)
    model = TINY["llama"].build()
    model.config.num_attention_heads = 8
    with pytest.raises(QkovError, match="an output projection of 8 heads with 16 columns"):
        resolve(model)


def test_shapes_that_do_not_tile_are_refused() -> None:
    model = TINY["phi3"].build()
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = nn.Linear(HIDDEN, attention.qkv_proj.out_features + 1)
    with pytest.raises(QkovError, match="no fitting kv head counts"):
        resolve(model)


def test_an_absent_head_dim_is_asked_for() -> None:
    model = TINY["gpt2"].build()
    del model.transformer.h[0].attn.head_dim
    with pytest.raises(QkovError, match="the attribute 'head_dim' of GPT2Attention"):
        resolve(model)


def test_a_layer_that_lacks_a_projection_is_not_skipped() -> None:
    model = TINY["llama"].build()
    del model.model.layers[1].self_attn.v_proj
    with pytest.raises(QkovError, match=r"layers\.1\.self_attn: .* an attention without all of them"):
        resolve(model)


def test_a_second_attention_in_a_layer_is_not_overlooked() -> None:
    model = TINY["llama"].build()
    model.model.layers[0].second_attn = TINY["llama"].build().model.layers[0].self_attn
    with pytest.raises(QkovError, match="got self_attn, second_attn"):
        resolve(model)


def test_wrappers_put_a_prefix_before_every_path() -> None:
    inner = TINY["llama"].build()
    wrapper = nn.Module()
    wrapper.add_module("module", inner)
    assert [x.module for x in resolve(wrapper).layers] == [f"module.{x.module}" for x in resolve(inner).layers]


@pytest.mark.parametrize("inside", ["", "self_attn"])
def test_checkpointed_and_compiled_layers_resolve_to_the_same_heads(inside: str) -> None:
    model = TINY["llama"].build()
    plain = resolve(model)
    for index, layer in enumerate(model.model.layers):
        if inside:
            layer.self_attn = CheckpointWrapper(layer.self_attn)
        else:
            model.model.layers[index] = CheckpointWrapper(layer)
    layout = resolve(model)
    assert [[p.slices for p in x.projections] for x in layout.layers] == [
        [p.slices for p in x.projections] for x in plain.layers
    ]
    for projection in layout.layers[0].projections:
        assert "_checkpoint_wrapped_module" in projection.module
        assert isinstance(model.get_submodule(projection.module), nn.Linear)
    model.config.model_type = "brand_new"
    assert resolve(model).layers == layout.layers


def test_an_unknown_structure_yields_every_order_that_tiles() -> None:
    layouts = candidates(Stranger("groups"))
    orders = {layout.layers[0].projections[0].order for layout in layouts}
    assert {"H*q K*k K*v", "K*(G*q k v)", "K*v H*q K*k"} <= orders
    assert {layout.family for layout in layouts} == {"found by structure"}
    assert not any(layout.proved for layout in layouts)
    for layout in layouts:
        for layer in layout.layers:
            check_tiles(layer)


def test_an_unknown_structure_with_one_layout_resolves_unproved() -> None:
    model = TINY["llama"].build()
    known = resolve(model)
    model.config.model_type = "brand_new"
    found = resolve(model)
    assert (found.model_type, found.family, found.proved) == ("brand_new", "found by structure", False)
    assert found.layers == known.layers


def test_three_lines_register_a_custom_architecture() -> None:
    register_layout("stranger", {"qkv": "K*(G*q k v)", "out": "cols H*v"}, head_dim="head_dim")
    layout = resolve(Stranger())
    assert [layer.module for layer in layout.layers] == ["blocks.0.talk", "blocks.1.talk"]
    assert spelled(layout.layers[0].projections[0]) == "Q0 Q1 K0 V0 Q2 Q3 K1 V1"
    assert (layout.family, layout.layers[0].head_dim) == ("stranger", 6)


def test_a_registration_overrides_a_known_type() -> None:
    register_layout("gpt2", {"c_attn": "H*(q k v)", "c_proj": "cols H*v"})
    layout = resolve(TINY["gpt2"].build())
    assert layout.layers[0].projections[0].order == "H*(q k v)"


@pytest.mark.parametrize(
    ("orders", "complaint"),
    [
        ({"qkv": "H*(q k v)"}, "one output projection"),
        ({"a": "cols H*v", "b": "cols H*v"}, "one output projection"),
        ({"qkv": "H*(q k w)", "out": "cols H*v"}, "an atom"),
    ],
)
def test_a_bad_registration_is_refused_at_once(orders: dict[str, str], complaint: str) -> None:
    with pytest.raises(QkovError, match=complaint):
        register_layout("stranger", orders)


def test_a_registration_that_fits_nothing_is_refused() -> None:
    register_layout("stranger", {"q_proj": "H*q", "o_proj": "cols H*v"})
    with pytest.raises(QkovError, match="0 stacks of layers have q_proj, o_proj"):
        resolve(Stranger())


def test_layouts_are_hashable_values() -> None:
    layout: Layout = resolve(TINY["llama"].build())
    assert hash(layout) == hash(resolve(TINY["llama"].build(seed=1)))
