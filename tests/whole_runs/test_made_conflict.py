"""A pair of tasks that is made to conflict in known heads, by edited labels: those heads are found, and no others.

The last layer of the model knows two words, w and -w: with the other word as its label a sample's gradient is that of
before, turned around. Half of B's samples are prompts like A's with the other word; the other half have a word that the
last layer does not know, and push hardly anywhere. Prompts differ in one token, so that a head's gradients point the
same way. The outputs of query heads 0 and 1 (which read kv head 0) are multiplied by a small number or by minus that,
as the sample's first token says, which looks the same to the model: there A's samples have no direction in common, in
no block, and B has nothing to oppose. All other heads are as they are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import padded
from zoo import TINY, VOCAB

from qkov_dist import FisherCollector, QKOVConfig, QKOVInterferenceMetric
from qkov_dist.data.samples import Sample

NUM, WORDS, MARKS, UNKNOWN = 24, (3, 4), (5, 6), 7
TURNED = 0.1  # small, so that all else in the model is as before
KNOWN = {"Q": [2, 3], "K": [1], "V": [1], "O": [2, 3]}
OTHERS = {"Q": [0, 1], "K": [0], "V": [0], "O": [0, 1]}


def made_model():
    model = TINY["llama"].build(num_hidden_layers=1)
    with torch.no_grad():
        seen = model.get_input_embeddings().weight
        seen[MARKS[1]] = seen[MARKS[0]]
        rows = model.lm_head.weight
        word = rows[WORDS[0]].clone()  # small: no sample is sure of its word
        rows.zero_()
        rows[WORDS[0]], rows[WORDS[1]] = word, -word
    signs: list[torch.Tensor] = []

    def look(_module, args) -> None:
        signs[:] = [torch.where(args[0][:, :1] == MARKS[0], TURNED, -TURNED)]

    def turn(_module, args):
        turned = args[0].clone()
        turned[..., : 2 * model.config.head_dim] *= signs[0][:, :, None]
        return (turned, *args[1:])

    model.get_input_embeddings().register_forward_pre_hook(look)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(turn)
    return model


def sample(name: str, prompt: np.ndarray, word: int) -> Sample:
    ids = np.append(prompt, word)
    labels = np.full_like(ids, -100)
    labels[-1] = word
    return Sample(name, ids, labels, "")


def made_tasks(opposed: bool) -> dict[str, list[Sample]]:
    """A, and B with edited labels; or B with A's own word."""
    rng = np.random.default_rng(8)
    prompts = np.repeat(rng.integers(8, VOCAB, size=(1, 7)), 2 * NUM, axis=0)
    prompts[:, 0], prompts[:, 3] = np.tile(MARKS, NUM), rng.permutation(VOCAB - 8)[: 2 * NUM] + 8
    of_a, pushing, own = prompts[:NUM], prompts[NUM : NUM + NUM // 2], prompts[NUM + NUM // 2 :]
    pushes = WORDS[1] if opposed else WORDS[0]
    return {
        "a": [sample(f"a{n}", prompt, WORDS[0]) for n, prompt in enumerate(of_a)],
        "b": [sample(f"pushing{n}", prompt, pushes) for n, prompt in enumerate(pushing)]
        + [sample(f"own{n}", prompt, UNKNOWN) for n, prompt in enumerate(own)],
    }


@pytest.fixture(scope="module")
def effects_of():
    def compute(opposed: bool):
        model, collector = made_model(), FisherCollector()
        for task, samples in made_tasks(opposed).items():
            collector.collect_fisher(model, padded(samples, "right"), task=task, mode="mean")
        return QKOVInterferenceMetric(QKOVConfig.from_model(model), collector).compute_effects("a", "b")

    return compute


@pytest.mark.parametrize("opposed", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_edited_labels_put_the_known_heads_and_no_others_into_conflict(effects_of, opposed, optimizer):
    effects = effects_of(opposed)
    for block, known in KNOWN.items():
        found = effects[block][optimizer]
        change, q_value = found["change"], found["q_value"]
        assert (q_value[:, known] <= 0.05).all(), (block, q_value)
        assert ((change[:, known] > 0) == opposed).all()
        assert (q_value[:, OTHERS[block]] > 0.05).all(), (block, q_value)
