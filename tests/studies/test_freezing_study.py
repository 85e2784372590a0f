"""The study of freezing: its model is the whole one, and what is said of its results is what they are."""

from __future__ import annotations

import json

import pytest
import torch
from examined import examined_of
from freezing import MATH_CODE, RESULTS, SUMS, upper_of
from steps import SIZES, tables, totals
from zoo import TINY, VOCAB

from qkov_dist.verification.agreement import PREDICTORS, SLOPES


def test_the_last_layers_alone_are_the_same_function():
    whole = TINY["llama"].build(num_hidden_layers=3)
    upper = upper_of(*(TINY["llama"].build(num_hidden_layers=3) for _ in range(2)), 1)
    ids = torch.arange(3, 15).view(2, 6) % VOCAB
    expected = whole(input_ids=ids, use_cache=False).logits
    for _ in range(2):  # the second time from memory
        torch.testing.assert_close(upper(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=0)
    assert not torch.equal(upper(input_ids=ids.flip(1), use_cache=False).logits, expected)


def test_what_is_said_of_freezing_is_what_was_found():
    """Far from A's optimum the first order is worth freezing by, near it the second may be; less is learned."""
    found = json.loads((RESULTS / "freezing.json").read_text())
    assert {key: sorted({row["share"] for row in rows}) for key, rows in found.items()} == {
        f"{'-'.join(pair)}, {case}": [0.1, 0.25, 0.5] for pair in (SUMS, MATH_CODE) for case in ("far", "near")
    }
    spared = {
        (key, row["share"], row["criterion"])
        for key, rows in found.items()
        for row in rows
        if row["criterion"] != "none"
        and max(row["less_random"][over][1] for over in ("over_seeds", "over_samples")) < 0
    }
    first_order, second_order = ("change_adam", "harm"), ("curvature", "interference")
    assert spared == {
        *(("digits-words, far", share, name) for share in (0.25, 0.5) for name in first_order),
        *(("gsm8k-human_eval, far", share, name) for share in (0.1, 0.25, 0.5) for name in first_order),
        ("gsm8k-human_eval, far", 0.1, "curvature"),
        *(("digits-words, near", 0.1, name) for name in second_order),
    }
    for key, rows in found.items():
        by_name = {(row["share"], row["criterion"]): row["total_gain"] for row in rows}
        least = [gain for (share, name), gain in by_name.items() if name != "none" and gain >= by_name[share, "none"]]
        assert least == [], key  # whatever is frozen, less is learned


@pytest.mark.long
def test_the_study_of_steps_shows_every_predictor_and_slope():
    examined = examined_of("llama", torch.float32)
    ranks, slopes = tables(examined, "adam")
    assert len(ranks.splitlines()) == 2 + sum(map(len, PREDICTORS.values()))
    assert len(slopes.splitlines()) == 2 + len(SIZES["adam"]) * len(SLOPES)
    assert "second, along the step +" in totals(examined)
