"""Which rows are taken, and how much of a large file is read for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_files import load, refused

from qkov_dist.config import TaskConfig
from qkov_dist.data import json_files
from qkov_dist.data.rows import Unread, drawn
from qkov_dist.data.sources import rows

LARGE = 10 << 30
TABLE = pa.table({"question": [f"q{n} " for n in range(40)], "answer": [f"a{n}" for n in range(40)]})
GSM8K = {"prompt": "question", "completion": "answer"}


def of_table(path: Path) -> Path:
    if path.suffix == ".csv":
        records = [tuple(TABLE.column_names), *(tuple(row.values()) for row in TABLE.to_pylist())]
        path.write_text("".join(f"{','.join(record)}\n" for record in records))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, TABLE.to_pylist())))
    else:
        pq.write_table(TABLE, path, row_group_size=7)
    return path


def test_the_same_rows_are_drawn_whatever_holds_them(tmp_path: Path) -> None:
    texts = []
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        task = load(of_table(tmp_path / name), columns=GSM8K, max_samples=6, sample="random", sample_seed=3)
        texts.append([sample.text for sample in task.samples])
        assert task.notes == ("task 'math': its 6 samples are drawn from all rows, with seed 3",)
    numbers = [int(text.split("a")[1]) for text in texts[0]]
    assert texts[0] == texts[1] == texts[2]
    assert numbers == sorted(set(numbers))
    assert numbers != [*range(6)]
    (tmp_path / "parts").mkdir()
    for number in range(4):
        pq.write_table(TABLE.slice(10 * number, 10), tmp_path / "parts" / f"{number}.parquet")
    parts = load(f"{tmp_path}/parts/*", columns=GSM8K, max_samples=6, sample="random", sample_seed=3)
    assert [sample.text for sample in parts.samples] == texts[0]
    everything = load(tmp_path / "t.csv", columns=GSM8K, max_samples=99, sample="random")
    assert [sample.text for sample in everything.samples] == [f"q{n} a{n}" for n in range(40)]


def test_another_process_draws_the_same(tmp_path: Path) -> None:
    """As every rank does for itself."""
    path = of_table(tmp_path / "t.csv")
    program = (
        "import sys; from qkov_dist.config import TaskConfig; from qkov_dist.data.sources import rows\n"
        "task = TaskConfig(name='m', path=sys.argv[1], max_samples=5, sample='random', sample_seed=7,\n"
        "                  columns={'text': 'answer'})\n"
        "print([number for _, number, _ in rows(task)])"
    )
    task = TaskConfig(
        name="m", path=str(path), max_samples=5, sample="random", sample_seed=7, columns={"text": "answer"}
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([number for _, number, _ in rows(task)])


def test_every_row_has_the_same_chance() -> None:
    seen: Counter[int] = Counter()
    unread = [Unread(str(n), n, dict) for n in range(12)]
    for seed in range(2000):
        numbers = [number for _, number, _ in drawn(unread, 3, seed)]
        assert len(set(numbers)) == 3
        seen.update(numbers)
    assert all(abs(seen[n] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for n in range(12))  # five standard deviations


def test_built_in_tasks_are_drawn_from_too() -> None:
    task = load("builtin:python", max_samples=20, max_positions=None, sample="random")
    numbers = {int(sample.id.removeprefix("math-")) for sample in task.samples}
    assert len(numbers) == 20
    assert max(numbers) > 1000


class Holed:
    """A file that leaves 10 GiB out before what is written next, once it is told to."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.leaves_out, self.closed = file, False, False

    def write(self, data: bytes) -> int:
        if self.leaves_out:
            self.file.seek(LARGE, os.SEEK_CUR)
            self.leaves_out = False
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def with_hole(path: Path) -> Path:
    """Some rows, and 10 GiB of nothing, which takes no room on the disk."""
    if path.suffix == ".parquet":
        table = pa.table({"question": ["q"] * 100, "answer": [f"a{n}" for n in range(100)]})
        with path.open("wb") as file:
            holed = Holed(file)
            with pq.ParquetWriter(pa.PythonFile(holed, "w"), table.schema) as writer:
                writer.write_table(table)
                holed.leaves_out = True
                writer.write_table(table)
        return path
    head, row = {
        ".csv": ("question,answer\n", "q,a\n"),
        ".jsonl": ("", '{"question": "q", "answer": "a"}\n'),
        ".json": ("[", '{"question": "q", "answer": "a"},\n'),
    }[path.suffix]
    path.write_text(head + row * 100)
    os.truncate(path, LARGE)
    return path


def bytes_read() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet"])
def test_of_ten_gigabytes_only_what_is_asked_for_is_read(tmp_path: Path, name: str) -> None:
    path = with_hole(tmp_path / name)
    assert path.stat().st_size >= LARGE
    before = bytes_read()
    task = load(path, columns=GSM8K, max_samples=20, max_positions=None)
    assert len(task.samples) == 20
    assert bytes_read() - before < 2 << 20


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    for name in ("t.csv", "t.jsonl", "t.json"):
        path = with_hole(tmp_path / name)
        tracemalloc.start()
        error = refused(path, columns=GSM8K, max_samples=101, sample="random")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert error.where.startswith(str(path))
        assert peak < 40 << 20, (name, peak)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet"])
def test_memory_does_not_grow_with_the_rows_that_are_drawn_from(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", 1 << 16)

    def peak(rows_of: int) -> int:
        path = tmp_path / name
        written(path, rows_of)
        tracemalloc.start()
        pool = pa.total_allocated_bytes()
        list(rows(TaskConfig(name="m", path=str(path), columns=GSM8K, max_samples=5, sample="random")))
        found = tracemalloc.get_traced_memory()[1] + max(pa.total_allocated_bytes() - pool, 0)
        tracemalloc.stop()
        return found

    few, many = peak(2000), peak(6000)
    assert many < few + (1 << 20), (few, many)


def written(path: Path, count: int) -> None:
    text = "word " * 100
    match path.suffix:
        case ".csv":
            path.write_text("question,answer\n" + f"{text},b\n" * count)
        case ".jsonl":
            path.write_text((json.dumps({"question": text, "answer": "b"}) + "\n") * count)
        case ".json":
            path.write_text(json.dumps([{"question": text, "answer": "b"}] * count))
        case _:
            pq.write_table(pa.table({"question": [text] * count, "answer": ["b"] * count}), path, row_group_size=500)
