"""SmolLM2-135M's first layers cut over real ranks, tensor parallel and FSDP2: each equals one process."""

from __future__ import annotations

import json

import pytest
import real
from comparing import deviation, deviations
from rounding import passes, reordered
from running import from_files, run_quietly

from qkov_dist.results.heatmap_file import load_heatmap

pytestmark = [pytest.mark.real, pytest.mark.long]
LAYERS, HIDDEN = 4, 576  # its first layers: how all 30 compute in one process is tested beside
IN_FLOAT32 = passes(layers=LAYERS, hidden=HIDDEN, tokens=56, elements=64 * HIDDEN)
IN_FLOAT64 = reordered(2 * (2 * LAYERS + 1))  # the model's norms still round to float32, there and back
CUTS = [
    (3, {"tp": 3}, "float64", IN_FLOAT64),
    (2, {"shard": "fsdp"}, "float32", IN_FLOAT32),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a directory, and two tasks of real text."""
    folder = tmp_path_factory.mktemp("real")
    loaded = real.smollm2(num_layers=LAYERS)
    loaded.model.save_pretrained(folder / "model")
    a = real.arithmetic_samples(loaded.tokenizer, 3, 40)
    b = real.code_samples(loaded.tokenizer, 4, 56)
    for name, samples in (("a", a), ("b", b)):
        rows = [{"id": s.id, "input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder, out: str, cut: dict, dtype: str) -> dict:
    return {
        "model": {"path": str(folder / "model"), "dtype": dtype},
        "compute": {"score_dtype": dtype},
        "parallel": cut,
        "tasks": [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("a", "b")],
        "metric": {"layers": [0, 2, 3]},
        "statistics": {"enabled": False},
        "output": {"dir": str(folder / out)},
    }


@pytest.fixture(scope="module")
def one_process(folder):
    made = {}

    def result(dtype: str):
        if dtype not in made:
            run_quietly(settings(folder, f"one-{dtype}", {}, dtype))
            made[dtype] = load_heatmap(folder / f"one-{dtype}" / "heatmap.h5")
        return made[dtype]

    return result


@pytest.mark.parametrize(("world_size", "cut", "dtype", "tolerance"), CUTS)
def test_smollm2_on_ranks_equals_one_process(world_size, cut, dtype, tolerance, folder, one_process, ranks):
    out = f"{world_size}-{'-'.join(cut)}-{'-'.join(map(str, cut.values()))}-{dtype}"
    ranks(world_size).run(run_quietly, settings(folder, out, cut, dtype))
    merged, expected = load_heatmap(folder / out / "heatmap.h5"), one_process(dtype)
    assert merged.run_id == expected.run_id
    largest = deviation(merged, expected)
    print(f"{cut} on {world_size} ranks, {dtype}: {largest:.1e} of the block's largest score")
    assert largest < tolerance
    doubled = deviations(from_files(folder / out, twice=0), expected)
    assert min(doubled.values()) > 100 * IN_FLOAT32, ("a replica counted twice", doubled)
