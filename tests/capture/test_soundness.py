"""What is asked of a model before its first batch, and that what users do to a model is scored as it computes."""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from comparing import assert_close, closeness
from expected import expected_scores
from jobs import Job, job_for
from samples import mixed_samples
from sites import sites_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from wrong_layouts import wrong_layouts
from zoo import COMMON, GROUPED, TINY, VOCAB, randomize

from qkov_dist import FisherCollector, QKOVConfig, QkovError, QKOVInterferenceMetric
from qkov_dist.capture import soundness
from qkov_dist.capture.collect import Collection
from qkov_dist.capture.ropes import ropes_by_length
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.samples import Sample
from qkov_dist.distributed.connect import current
from qkov_dist.distributed.topology import Topology
from qkov_dist.layout.proof import prove, resolve_proved
from qkov_dist.layout.resolve import resolve
from qkov_dist.modes import HOOKS, bare
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.scoring.tiles import Selection

LLAMA = TINY["llama"]
BLOCK_OF = {"q_proj": "Q", "k_proj": "K", "v_proj": "V", "o_proj": "O"}


def attention(model: nn.Module, layer: int = 0) -> nn.Module:
    return model.model.layers[layer].self_attn


def scaled_output(model, projection):
    return [getattr(attention(model), projection).register_forward_hook(lambda _m, _a, out: 2 * out)]


def scaled_input(model, projection):
    hook = lambda _m, args: (0.5 * args[0],)  # noqa: E731
    return [getattr(attention(model), projection).register_forward_pre_hook(hook, prepend=True)]


def scaled_in_place(model, projection):
    return [getattr(attention(model), projection).register_forward_hook(lambda _m, _a, out: out.mul_(3))]


def scaled_everywhere(model, projection):
    shape = getattr(attention(model), projection).weight.shape

    def hook(module, _args, out):
        return 2 * out if type(module) is nn.Linear and module.weight.shape == shape else None

    return [torch_module.register_module_forward_hook(hook)]


def ablated(model, projection):
    def zero_head_0(_m, args):
        return (args[0] * (torch.arange(args[0].shape[-1]) >= 16),)

    return [attention(model).o_proj.register_forward_pre_hook(zero_head_0)]


@pytest.mark.parametrize("projection", BLOCK_OF)
@pytest.mark.parametrize("hook", [scaled_output, scaled_input, scaled_in_place, scaled_everywhere, ablated])
def test_scores_under_a_users_hooks_are_those_of_autograd_under_them(hook, projection):
    model, job = LLAMA.build(), job_for(LLAMA)
    without = expected_scores(LLAMA, model, job)
    handles = hook(model, projection)
    try:
        layout = resolve_proved(model)
        expected = expected_scores(LLAMA, model, job)
        assert_close(job.run(model, layout=layout), expected)
    finally:
        for handle in handles:
            handle.remove()
    block = "O" if hook is ablated else BLOCK_OF[projection]
    assert closeness(without[0][block], expected[0][block]) > 0.01  # the hooks do change them


def test_a_projection_that_is_cut_off_is_refused():
    model = LLAMA.build()
    attention(model).v_proj.register_forward_hook(lambda _m, _a, out: out.detach())
    with pytest.raises(QkovError, match=r"layers\.0\.self_attn\.v_proj: .*loss does not depend on.*detaches"):
        job_for(LLAMA).run(model)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ActivationScaled(nn.Linear):
    def forward(self, x):
        return super().forward(x * torch.linspace(0.5, 2, self.in_features))


class TwiceLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x[..., : self.out_features] @ self.weight[:, : self.out_features].t()


class BentLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
@pytest.mark.parametrize("kind", [ScaledLinear, ActivationScaled, TwiceLinear, BentLinear])
def test_a_projection_that_is_no_linear_map_is_refused_by_name(kind, projection):
    model = LLAMA.build()
    getattr(attention(model, 1), projection).__class__ = kind
    refused = rf"layers\.1\.self_attn\.{projection}.*expected a projection that is Y = X W.*{kind.__name__}"
    with pytest.raises(QkovError, match=refused):
        job_for(LLAMA).run(model)
    if projection == "o_proj":  # the layout's own proof names the map too, not the layout
        with pytest.raises(QkovError, match="expected a projection that is Y = X W"):
            prove(model, resolve(model), layers=[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_map_has_to_be_affine(bits):
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    bent = type("Bent", (base,), {"forward": lambda self, x: base.forward(self, x).relu()})
    model = LLAMA.build(hidden_size=64, intermediate_size=64)
    old = attention(model).v_proj
    settings = {"compute_dtype": torch.float32} if bits == 4 else {"has_fp16_weights": False}
    new = bent(old.in_features, old.out_features, bias=False, **settings)
    new.load_state_dict(old.state_dict())
    attention(model).v_proj = new.to("cpu")
    model.requires_grad_(False)
    with pytest.raises(QkovError, match=r"v_proj.*not affine"):
        job_for(LLAMA).run(model)


def test_a_weight_that_is_also_used_without_its_module_is_refused():
    model = LLAMA.build()
    o_proj = attention(model).o_proj

    def once_more(_module, args, out):
        return out + args[0] @ o_proj.weight.t()

    attention(model).o_proj.register_forward_hook(once_more)
    with pytest.raises(QkovError, match=r"layer 0 \(model\.layers\.0\.self_attn\.o_proj\.weight\).*D\^T X.*differs"):
        job_for(LLAMA).run(model)


def adapted(**settings):
    peft = pytest.importorskip("peft")
    kind = getattr(peft, settings.pop("kind"))
    return randomize(peft.get_peft_model(LLAMA.build(), kind(task_type="CAUSAL_LM", **settings)).eval())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "LoraConfig", "r": 4, "target_modules": ["q_proj"], "use_dora": True},
        {"kind": "OFTConfig", "r": 0, "oft_block_size": 4, "target_modules": ["q_proj"]},
        {"kind": "PrefixTuningConfig", "num_virtual_tokens": 3},
    ],
    ids=lambda settings: settings["kind"],
)
def test_adapters_around_the_weights_are_scored_as_autograd_says(settings):
    model, job = adapted(**settings), job_for(LLAMA)
    assert_close(job.run(model), expected_scores(LLAMA, model, job))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_replaces_the_weight_is_refused():
    model = adapted(kind="HRAConfig", r=2, target_modules=["q_proj"])
    with pytest.raises(QkovError, match=r"q_proj\.base_layer: .*loss does not depend on"):
        job_for(LLAMA).run(model)


@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_are_refused_in_one_message():
    model = adapted(kind="PromptTuningConfig", num_virtual_tokens=3)
    with pytest.raises(QkovError, match=r"expected logits .*virtual tokens"):
        FisherCollector().collect_fisher(model, mixed_samples(2, VOCAB, seed=3), "a")


@pytest.mark.parametrize("kind", ["parameter", "view", "module"])
def test_a_weight_in_several_places_is_refused_and_other_layers_are_not(kind):
    model, job = LLAMA.build(num_hidden_layers=3), job_for(LLAMA)
    first, second = attention(model, 1).q_proj, attention(model, 2).q_proj
    if kind == "parameter":
        second.weight = first.weight
    elif kind == "view":  # other objects, the same numbers: PEFT's layer_replication
        second.weight = nn.Parameter(first.weight.detach())
    else:
        attention(model, 2).q_proj = first
    refused = r"layers\.1\.self_attn\.q_proj\.weight.*also model\.layers\.2\.self_attn\.q_proj"
    with pytest.raises(QkovError, match=refused):
        job.run(model)
    alone, untied = replace(job, selection=Selection((0,))), copy.deepcopy(model)
    attention(untied, 2).q_proj = copy.deepcopy(attention(untied, 1).q_proj)
    assert_close(alone.run(model), {0: expected_scores(LLAMA, untied, job)[0]})


def test_a_hook_on_the_gradient_of_a_weight_is_refused():
    model = LLAMA.build()
    handle = attention(model).k_proj.weight.register_hook(lambda grad: 0 * grad)
    with pytest.raises(QkovError, match=r"k_proj\.weight: expected a weight without hooks on its gradient"):
        job_for(LLAMA).run(model)
    handle.remove()


def pruned(linear):
    prune.l1_unstructured(linear, "weight", amount=0.5)


@pytest.mark.parametrize("compute", [pruned, parametrizations.weight_norm])
def test_a_weight_that_is_computed_before_each_use_is_refused(compute):
    model = LLAMA.build()
    compute(attention(model).q_proj)
    with pytest.raises(QkovError, match=r"q_proj\.weight: expected a weight that is a parameter.*prune\.remove"):
        FisherCollector().collect_fisher(model, mixed_samples(2, VOCAB, seed=3), "a")


ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 8}
LONGROPE = {
    **ROPE,
    "rope_type": "longrope",
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 2.0, 3.0],
    "factor": 8.0,
}
DYNAMIC = {**ROPE, "rope_type": "dynamic", "factor": 4.0}


def with_rope(kind: str):
    """(the zoo's entry, a model of it whose rope depends on the length)."""
    if kind == "longrope":
        return TINY["phi3"], TINY["phi3"].build(rope_parameters=LONGROPE, original_max_position_embeddings=8)
    return LLAMA, LLAMA.build(rope_parameters=DYNAMIC, max_position_embeddings=8)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_sample_is_as_if_alone_and_uncut_where_rope_depends_on_the_length(kind):
    entry, model = with_rope(kind)
    samples = sorted(mixed_samples(9, VOCAB, seed=5, lengths=(4, 16)), key=lambda s: len(s.input_ids))
    lengths = [len(s.input_ids) for s in samples]
    assert lengths[0] < 8 < lengths[-1]
    assert any(s.labels[-1] == -100 for s in samples[:-1])  # one is cut
    job = Job(samples[::2], samples[1::2], batch_tokens=10**6)
    order = np.argsort([*lengths[::2], *lengths[1::2]], kind="stable")
    expected = expected_by_growing_length(entry, model, job, order)
    model(input_ids=torch.arange(20)[None])  # what went before must not matter
    before = [{name: value.clone() for name, value in rope.named_buffers()} for rope in ropes_by_length(model)]
    assert before
    assert_close(job.run(model), expected)
    for rope, buffers in zip(ropes_by_length(model), before, strict=True):
        assert all(torch.equal(buffers[name], value) for name, value in rope.named_buffers())


def expected_by_growing_length(entry, model, job, order):
    """The oracle runs samples one after another: shortest first, dynamic frequencies are each sample's own."""
    import oracle

    samples = [(s.input_ids, s.labels) for s in (*job.a, *job.b)]
    found, _ = oracle.per_sample_gradients(model, [samples[n] for n in order])
    gradients = [found[int(np.flatnonzero(order == n)[0])] for n in range(len(samples))]
    settings, expected = job.settings, {}
    for index, layer in enumerate(model.model.layers):
        path = next(name for name, module in model.named_modules() if module is layer.self_attn)
        heads = [oracle.heads_of_layer(model, entry.family, path, g) for g in gradients]
        expected[index] = {
            block: oracle.block_scores(
                heads,
                block,
                lambda squares: oracle.ema_fisher(squares, job.steps, job.decay),
                left=list(range(len(job.a))),
                right=list(range(len(job.a), len(samples))),
                epsilon=settings.epsilon,
                absolute=settings.ridge_absolute,
                relative=settings.ridge_relative,
            )
            for block in heads[0]
        }
    return expected


class ByLength(nn.Module):
    """A head that counts how many positions stand beside each other: no config says so."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.length = head, 1

    def forward(self, x):
        return self.head(x) / self.length


def test_whatever_depends_on_the_longest_sequence_is_found_by_trying():
    model = LLAMA.build()
    model.lm_head = ByLength(model.lm_head)
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: setattr(model.lm_head, "length", kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    job = job_for(LLAMA, batch_tokens=10**6)
    model_free = LLAMA.build()
    lengths = [len(s.input_ids) for s in (*job.a, *job.b)]
    assert len(set(lengths)) > 2
    got = collected_losses(model, job)
    with torch.no_grad():
        for sample, loss in zip((*job.a, *job.b), got, strict=True):
            logits = model_free(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0, :-1]
            logits /= len(sample.input_ids)
            alone = nn.functional.cross_entropy(logits, torch.from_numpy(sample.labels[1:]), ignore_index=-100)
            assert loss == pytest.approx(float(alone), rel=1e-5)


def collected_losses(model, job) -> list[float]:
    collector = FisherCollector(batch_tokens=10**6)
    return [*collector.collect_fisher(model, job.a, "a"), *collector.collect_fisher(model, job.b, "b")]


def bidirectional_gemma():
    return TINY["gemma3_text"].build(use_bidirectional_attention=True)


def not_causal_llama():
    model = LLAMA.build()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def paligemma():
    text = {**COMMON, **GROUPED, "model_type": "gemma", "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 32}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_id=90, projection_dim=32, hidden_size=32
    )
    return randomize(transformers.PaliGemmaForConditionalGeneration(config).eval())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [bidirectional_gemma, not_causal_llama, paligemma])
def test_a_decoder_that_is_not_causal_is_refused(build):
    model = build()
    with pytest.raises(QkovError, match=rf"{type(model).__name__}: expected a causal decoder"):
        FisherCollector().collect_fisher(model, mixed_samples(3, VOCAB - 10, seed=3), "a")


@pytest.mark.parametrize("projection", BLOCK_OF)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_dead_head_is_scored_and_refutes_no_layout(name, projection):
    entry = TINY[name]
    model, job = entry.build(), job_for(entry)
    with torch.no_grad():
        if name == "llama":
            weight = getattr(attention(model), projection).weight
            (weight[:, :16] if projection == "o_proj" else weight[:16]).zero_()
        else:
            fused = model.gpt_neox.layers[0].attention.query_key_value
            row = 8 * list(BLOCK_OF).index(projection) % 24
            fused.weight[row : row + 8].zero_()
            fused.bias[row : row + 8].zero_()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    layout = resolve_proved(model)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert_close(job.run(model, layout=layout), expected_scores(entry, model, job))


def test_wrong_layouts_of_a_dead_head_are_still_refused():
    model = LLAMA.build()
    with torch.no_grad():
        attention(model).q_proj.weight[:16].zero_()
        attention(model).v_proj.weight[16:].zero_()
    layout = resolve(model)
    for label, wrong in wrong_layouts(layout, layout.layers[0]):
        assert is_refused(model, wrong), label


def is_refused(model, layout) -> bool:
    try:
        prove(model, layout)
    except QkovError:
        return True
    return False


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_is_scored_as_the_model_computes(cached):
    model, job = LLAMA.build(), job_for(LLAMA)
    exact = expected_scores(LLAMA, model, job)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
        layout = resolve_proved(model)
        got = job.run(model, layout=layout)
    deviations = [closeness(got[layer][b].scores, exact[layer][b]) for layer in exact for b in exact[layer]]
    assert 1e-4 < max(deviations) < 0.2  # bfloat16 it is, and no more than that


def test_the_float16_of_autocast_is_seen_and_weak_gradients_are_kept():
    scale_free = ScoreSettings(epsilon=0.0, ridge_absolute=0.0, ridge_relative=1e-3)
    model, job = LLAMA.build(), job_for(LLAMA, settings=scale_free)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-6)
    exact = expected_scores(LLAMA, model, job)
    with torch.autocast("cpu", dtype=torch.float16):
        got = job.run(model)
    for layer, blocks in exact.items():
        for block, scores in blocks.items():
            assert closeness(got[layer][block].scores, scores) < 0.3, (layer, block)
            assert (got[layer][block].scores == 0).double().mean() < 0.01


def test_weights_that_accelerate_moves_are_scored_where_they_run():
    from accelerate import cpu_offload

    settings = ScoreSettings(epsilon=1e-10, ridge_absolute=1e-8, ridge_relative=0.0)
    model, job = LLAMA.build(), job_for(LLAMA, estimator="mean", settings=settings)
    expected = expected_scores(LLAMA, model, job)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert attention(model).q_proj.weight.is_meta
    collector = FisherCollector()
    for task, samples in (("a", job.a), ("b", job.b)):
        collector.collect_fisher(model, samples, task, mode="mean")
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector, 1e-10, 1e-8, 0.0)
    for block, scores in metric.compute_heatmap("a", "b", pairs="cross").cross.items():
        assert closeness(torch.tensor(np.asarray(scores[0])), expected[0][block]) < 1e-5


class Bare(nn.Module):
    """A module with what the refusal of a model without a config asks for, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LLAMA.build()
        self.config = self.inner.config

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Pair(Bare):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask).logits, None


class TensorOnly(Bare):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask).logits


def tuple_outputs():
    model = LLAMA.build()
    model.config.return_dict = False
    return model


@pytest.mark.parametrize("build", [Bare, Pair, TensorOnly, tuple_outputs])
def test_logits_are_found_in_what_a_forward_returns(build):
    samples = mixed_samples(4, VOCAB, seed=3)
    expected = FisherCollector().collect_fisher(LLAMA.build(), samples, "a")
    model = build()
    np.testing.assert_allclose(FisherCollector().collect_fisher(model, samples, "a"), expected, rtol=1e-5)
    if build is tuple_outputs:
        assert model.config.return_dict is False


def built_in_inference_mode():
    with torch.inference_mode():
        return LLAMA.build()


def flex_attention():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, "head_dim": 16})).eval()
    model.set_attn_implementation("flex_attention")
    return model


WRONG_MODELS = {
    "no head": (lambda: LLAMA.build().model, "LlamaModel: expected logits .* language-model head"),
    "sequence classifier": (
        lambda: transformers.LlamaForSequenceClassification(LLAMA.config()).eval(),
        "LlamaForSequenceClassification: expected logits",
    ),
    "token classifier": (
        lambda: transformers.LlamaForTokenClassification(LLAMA.config()).eval(),
        "LlamaForTokenClassification: expected logits",
    ),
    "inference mode": (built_in_inference_mode, "made inside torch.inference_mode"),
    "flex attention": (flex_attention, r"NotImplementedError: FlexAttention.*set_attn_implementation\('sdpa'\)"),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WRONG_MODELS)
def test_a_model_without_a_loss_of_each_token_is_refused_in_one_message(what):
    build, message = WRONG_MODELS[what]
    as_it_is = torch.compiler.set_stance("force_eager")  # flex attention is compiled before it is refused: 30 s
    with as_it_is, pytest.raises(QkovError, match=message):
        FisherCollector().collect_fisher(build(), mixed_samples(2, VOCAB, seed=3), "a")


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ([{"input_ids": [5, 6, 7]}], "a list of dict"),
        (["hello"], "a list of str"),
        ("hello", "got str"),
        ([torch.arange(5)], "a list of Tensor"),
        (torch.arange(10).reshape(2, 5), "got Tensor"),
    ],
)
def test_a_batch_of_another_kind_is_refused_in_one_message(batch, got):
    with pytest.raises(QkovError, match=rf"batch of task 'a': expected a mapping with input_ids.*{got}.*Tokenize"):
        FisherCollector().collect_fisher(LLAMA.build(), batch, "a")


def test_a_sample_beyond_the_positions_of_a_model_is_named():
    model = TINY["gpt2"].build(max_position_embeddings=8)
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    with pytest.raises(QkovError, match=r"batch of task 'a', sample 0: expected at most 8 tokens.*got 10"):
        FisherCollector().collect_fisher(model, batch, "a")
    longer = LLAMA.build(max_position_embeddings=8)  # rope goes on
    assert np.isfinite(FisherCollector().collect_fisher(longer, batch, "a")).all()


def test_an_error_inside_the_model_is_one_message_that_names_it():
    model = LLAMA.build()

    def breaks(_module, _args):
        raise KeyError("nothing of this name")

    attention(model).register_forward_pre_hook(breaks)
    with pytest.raises(QkovError, match=r"LlamaForCausalLM: .*KeyError: 'nothing of this name'") as caught:
        job_for(LLAMA).run(model)
    assert isinstance(caught.value.__cause__, KeyError)


def test_hooks_are_put_back_after_a_bare_run():
    model = LLAMA.build()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append("own"))
    handle = torch_module.register_module_forward_hook(lambda *_: calls.append("global"))
    try:
        with bare(model):
            model(input_ids=torch.arange(4)[None])
        assert not calls
        model(input_ids=torch.arange(4)[None])
        assert set(calls) == {"own", "global"}
    finally:
        handle.remove()
    assert all(hasattr(torch_module, f"_global{name}") for name in HOOKS)


def training_after(first: str) -> dict[str, torch.Tensor]:
    """The gradients of a training step under FSDP2 with a bfloat16 policy, on this rank, as they are held."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = LLAMA.build()
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    model.model.embed_tokens.weight.requires_grad_(False)
    for layer in model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    if first == "collect":
        FisherCollector().collect_fisher(model, mixed_samples(3, VOCAB, seed=3), "a")
    ids = torch.arange(5, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.to_local().clone() for name, grad in grads.items()}


@pytest.mark.long
def test_training_goes_on_under_fsdp2_as_if_nothing_had_been_collected(ranks):
    expected, found = (ranks(2).run(training_after, first) for first in ("nothing", "collect"))
    for without, after in zip(expected, found, strict=True):
        assert "model.embed_tokens.weight" not in without
        assert without.keys() == after.keys()
        for name, grad in without.items():
            assert after[name].dtype == grad.dtype, name
            assert torch.equal(after[name], grad), name


def weak_scores(cut: str) -> dict[str, np.ndarray]:
    """Scores of gradients of about 1e-7, by weights or passes in float16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = LLAMA.build()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-6)
    if cut == "policy":
        policy = MixedPrecisionPolicy(torch.float16, torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    collector = FisherCollector()
    for seed, task in ((1, "a"), (2, "b")):
        collector.collect_fisher(model, mixed_samples(3, VOCAB, seed=seed), task, mode="mean")
    settings = {"epsilon": 0.0, "ridge_lambda": 0.0, "ridge_relative": 0.01}
    return dict(QKOVInterferenceMetric(collector.config, collector, **settings).compute_heatmap("a", "b").cross)


@pytest.mark.long
def test_the_float16_of_a_policy_keeps_weak_gradients(ranks):
    exact = weak_scores("none")
    for found in ranks(2).run(weak_scores, "policy"):
        for block, scores in found.items():
            assert np.abs(scores - exact[block]).max() / np.abs(exact[block]).max() < 0.3, block
            assert np.mean(scores == 0) < 0.01, block


@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_a_weight_in_use_elsewhere_is_found_whichever_sample_comes_first(projection):
    """A first token attends to itself alone: where it is the only one with a target, no gradient reaches Q and K."""
    model = LLAMA.build()
    linear = getattr(attention(model), projection)
    linear.register_forward_hook(lambda m, args, out: out + 0.5 * nn.functional.linear(args[0].tanh(), m.weight))
    short = Sample("short", np.array([5, 9]), np.array([-100, 9]), "")
    for samples in ([short], [short, *mixed_samples(2, VOCAB, seed=3)]):
        with pytest.raises(QkovError, match=rf"{projection}\.weight\): expected a gradient D\^T X"):
            FisherCollector().collect_fisher(model, samples, "a")


def test_other_names_of_a_layer_are_no_other_uses():
    model, job = LLAMA.build(), job_for(LLAMA)
    expected = expected_scores(LLAMA, model, job)
    model.backbone, model.blocks = model.model, model.model.layers
    assert_close(job.run(model), expected)


def compiled_layers(model):
    for n, layer in enumerate(model.model.layers):
        model.model.layers[n] = torch.compile(layer, backend="eager")


def compiled_in_place(model):
    for layer in model.model.layers:
        layer.self_attn.compile(backend="eager")


def compiled_forwards(model):
    for layer in model.model.layers:
        layer.self_attn.forward = torch.compile(layer.self_attn.forward, backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [compiled_layers, compiled_in_place, compiled_forwards])
def test_compiled_parts_are_scored_though_they_ran_before(compiled):
    model, job = LLAMA.build(), job_for(LLAMA)
    expected = expected_scores(LLAMA, model, job)
    compiled(model)
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None], use_cache=False)  # from here on no hook inside is looked at
    assert_close(job.run(model, layout=resolve_proved(model)), expected)


def test_the_float16_inside_a_reentrant_checkpoint_is_seen():
    """Its forward pass has no graph, and only in the backward pass do projections see gradients."""
    model, job = LLAMA.build(), job_for(LLAMA)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-6)
    exact = expected_scores(LLAMA, model, job)
    for n, layer in enumerate(model.model.layers):
        model.model.layers[n] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT)
    with torch.autocast("cpu", dtype=torch.float16):
        got = job.run(model)
    for layer, blocks in exact.items():
        for block, scores in blocks.items():
            assert closeness(got[layer][block].scores, scores) < 0.3, (layer, block)


@pytest.mark.parametrize("is_known", [True, False])
def test_an_error_inside_the_model_is_one_message_of_the_proof_too(is_known):
    model = LLAMA.build()
    if not is_known:
        model.config.model_type = "unheard_of"

    def fail(*_):
        raise ValueError("a hook of the user's")

    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(QkovError, match=r"LlamaForCausalLM: expected a forward .*ValueError: a hook of the user's"):
        resolve_proved(model)


def asked(same_model: bool, error: str) -> tuple[list[str], bool, tuple[int, int] | None, str]:
    """What this rank asks of a model that all have whole, what it then knows of it, and what it raises."""
    world, names, said = current(), [], ""
    topology, model = Topology(world=world, dp_group=world, dp_ranks=tuple(range(world.size))), LLAMA.build()

    def ask(name: str, found: object) -> object:
        names.append(name)
        if name == error:
            raise QkovError(name, expected="a sound model", got="another", remedy="none")
        return found

    with pytest.MonkeyPatch.context() as patched, closing(FactorStore(2**28)) as store:
        patched.setattr(soundness, "check_gradients", lambda *of: ask("gradients", None))
        patched.setattr(soundness, "depends_on_length", lambda *of: ask("length", True))
        collection = Collection(store, tuple(sites_of(model)), topology=topology, same_model=same_model)
        try:
            for seed, task in ((1, "a"), (2, "b")):
                collection.run(model, task, mixed_samples(4, VOCAB, seed=seed))
        except QkovError as raised:
            said = str(raised).partition(":")[0]
        return names, collection.soundness.alone, collection.soundness.lengths, said


@pytest.mark.parametrize("size", [2, 3])
def test_of_one_model_on_all_ranks_one_asks_for_gradients_and_another_for_lengths(size, ranks):
    """What they find all know; of models that may differ each rank asks by itself."""
    first, second, *others = ranks(size).run(asked, True, "")
    assert [first[0], second[0], *(one[0] for one in others)] == [["gradients"], ["length"], *([[]] * (size - 2))]
    assert len({one[1:] for one in (first, second, *others)}) == 1
    assert first[1] is True
    for error, rank in (("gradients", 0), ("length", 1)):
        assert {one[3] for one in ranks(size).run(asked, True, error)} == {f"rank {rank}"}
    assert [one[0] for one in ranks(size).run(asked, False, "")] == [["gradients", "length"]] * size
