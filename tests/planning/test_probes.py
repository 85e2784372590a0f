"""Parts of a run's own work, timed: in the form, at the sizes and in as small a part as they should be."""

from __future__ import annotations

import pytest

from qkov_dist.config_file import from_dict
from qkov_dist.planning import probes
from qkov_dist.planning.hardware import measured_cpu
from qkov_dist.planning.planner import Planner, Setting
from qkov_dist.planning.run_plan import RunPlan
from qkov_dist.planning.time_model import expected


def plan_of(samples: int, tokens: int, tasks: int = 2, **settings: object) -> RunPlan:
    """Of an 8B Llama in float32."""
    config = from_dict(
        {
            "model": {"path": "builtin:llama-3-8b", "dtype": "float32"},
            "tasks": [{"name": str(number), "path": f"builtin:{number}"} for number in range(tasks)],
            **settings,
        }
    )
    return Planner(config, samples, tokens, gpu_memory=None).plan(Setting(config, 1))


def test_made_factors_are_in_the_form_in_which_a_run_keeps_them():
    work = plan_of(3, 100).work
    few, many = (probes.MadeFactors.of(work, above, (8, 6)) for above in (99, 98))
    assert (few.inputs.shape, few.outputs.shape, few.g(probes.SITE)) == ((594, 6), (594, 8), None)
    assert (len(many.inputs), many.g(probes.SITE).values.shape) == (0, (6, 8, 7))
    assert few.inputs.std() > 0.5


def test_what_would_take_long_or_much_memory_is_counted_in_place_of_timed():
    assert probes.element_seconds(plan_of(8, 16).work) > 0
    assert probes.element_seconds(plan_of(64, 4000).work) is None
    work = plan_of(8, 16).work
    assert probes.test_seconds(work, 8, 8) > 0
    assert probes.test_seconds(work, 1, 8) is None
    assert probes.test_seconds(work, 2000, 2000) is None


@pytest.mark.parametrize(("tasks", "settings"), [(3, {}), (2, {"statistics": {"enabled": False}})])
def test_times_on_a_processor_follow_from_what_was_timed(tasks, settings, monkeypatch):
    """Twice the seconds an element and a test: twice those of scoring's heads and of tests."""
    plan, found = plan_of(6, 16, tasks, **settings), []
    known = probes.probed(plan.work, plan.costs[0].elements)
    for factor in (1, 2):
        tests = {sizes: seconds * factor for sizes, seconds in known.tests.items()}
        slower = probes.Probes(known.product / factor, known.element * factor, tests)
        monkeypatch.setattr("qkov_dist.planning.time_model.probed", lambda *_, slower=slower: slower)
        found.append({phase.name: phase.terms for phase in expected(plan, measured_cpu(), 8)})
    for phase, term in (("scoring", "heads"), ("combining", "tests")):
        assert found[1][phase][term] == pytest.approx(2 * found[0][phase][term])
    pairs = tasks * (tasks - 1) // 2
    of_tests = 0 if settings else plan.costs[0].heads * pairs * known.tests[6, 6]
    assert found[0]["combining"]["tests"] == pytest.approx(of_tests)
    assert plan.costs[0].heads == 32 * (32 + 8 + 8 + 32)
