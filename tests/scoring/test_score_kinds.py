"""The table of scores: what follows from it, what agrees with it, and that nobody else knows scores by their names."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest
import torch

import qkov_dist
from qkov_dist.config_file import from_dict
from qkov_dist.errors import QkovError
from qkov_dist.scoring.kernel import Rule, add_tile
from qkov_dist.scoring.score_kinds import KINDS, Score, ScoreKind, may_be_negative
from qkov_dist.scoring.tile_gradients import Buffers

PACKAGE = Path(qkov_dist.__file__).parent
MAPS = {"gradient": lambda g: g, "magnitude": torch.abs, "square": torch.square}


def test_the_configuration_and_the_types_have_the_scores_of_the_table() -> None:
    tasks = [{"name": name, "path": f"builtin:{name}"} for name in ("arithmetic", "python")]
    known = {"model": {"path": "x"}, "tasks": tasks}
    assert [from_dict({**known, "metric": {"score": name}}).metric.score for name in KINDS] == list(get_args(Score))
    with pytest.raises(QkovError) as refusal:
        from_dict({**known, "metric": {"score": "another"}})
    assert all(name in str(refusal.value) for name in KINDS)


def test_what_follows_from_the_maps() -> None:
    assert [name for name, kind in KINDS.items() if kind.is_symmetric] == ["signed", "symmetric", "curvature"]
    assert [name for name in (*KINDS, "another", None) if may_be_negative(name)] == ["signed"]


@pytest.mark.parametrize("right", MAPS)
@pytest.mark.parametrize("left", MAPS)
@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_any_two_maps_and_any_power_make_a_score(left, right, power, monkeypatch) -> None:
    """A new row of the table is all that a new score needs of the arithmetic, in halves where these do."""
    monkeypatch.setattr("qkov_dist.scoring.kernel.HALF_PAIRS", 2)
    monkeypatch.setitem(KINDS, "new", ScoreKind(left, right, power))
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 1, 10, generator=generator).double()
    weights = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, 0.25]]).double()
    regularised = (weights.sum(0) @ gradients[:, 0].square()).clamp_min(0.1) + 0.2
    expected = (MAPS[left](gradients[:, 0]) / regularised**power) @ MAPS[right](gradients[:, 0]).t()
    scores = torch.zeros(1, 3, 3).double()
    rule = Rule("new", 0.1, (0.2,), slice(0, 3), slice(0, 3))
    for _ in range(2):
        add_tile(scores, gradients.clone(), weights, rule, Buffers())
    torch.testing.assert_close(scores[0], 2 * expected, rtol=1e-12, atol=1e-12)


def names_compared(code: str) -> set[str]:
    """Names of scores that a module compares with something."""
    return {
        constant.value
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Compare)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and constant.value in KINDS
    }


def test_no_module_compares_names_of_scores() -> None:
    assert names_compared('if score != "signed": pass') == {"signed"}
    found = {str(path.relative_to(PACKAGE)): names_compared(path.read_text()) for path in PACKAGE.rglob("*.py")}
    # criteria that rank heads have names, of which some are called after scores
    expected = {"results/criteria.py": {"curvature", "interference"}}
    assert {name: names for name, names in found.items() if names} == expected
    scripts = "".join(path.read_text() for path in PACKAGE.rglob("*.js"))
    assert not any(f'"{name}"' in scripts for name in set(KINDS) - {"curvature"})  # of effects, which the page shows
