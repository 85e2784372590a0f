"""A short run of the fuzzing in ``launch/fuzz.sh``, and proofs that its harness sees what it is there for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import campaign
import fuzz_config
import fuzz_tasks
import pytest
import yaml
from fuzz_readers import READERS
from hdf5_edits import CONTENT
from hdf5_storage import STORAGE
from result_files import HEATMAP, LAYER_FILE, PARTIALS, metadata, results
from watchdog import Files, Outcome, Watchdog

from qkov_dist.results.metadata import to_json

NUM_INPUTS = 18  # of each reader
FEWER = {"report": 2, "page": 10, "stats": 10, "merge": 14}  # those that draw, test and write
TASK_OPTIONS = {"tokenizer": "tagged", "objective": "causal", "max_samples": None, "max_tokens": None}

VALID: dict[str, Files] = {
    "config": {"run.yaml": yaml.safe_dump(fuzz_config.VALID).encode(), "overrides.json": b'["fisher.decay=0.5"]'},
    "task": {
        "task.jsonl": fuzz_tasks.VALID[0],
        "options.json": json.dumps({**TASK_OPTIONS, "max_positions": None}).encode(),
    },
    "partial": {PARTIALS[0]: results()[PARTIALS[0]]},
    "resume": {LAYER_FILE: results()[LAYER_FILE]},
    **{reader: {name: results()[name] for name in PARTIALS} for reader in ("carry", "gather", "merge")},
    "frame": {"frame.json": json.dumps(to_json(metadata())).encode()},
    **{reader: {HEATMAP: results()[HEATMAP]} for reader in ("heatmap", "page", "report", "stats")},
}


@pytest.fixture(scope="module")
def watchdog() -> Iterator[Watchdog]:
    with Watchdog() as found:
        yield found


def bad(reader: str, **limits: int) -> Outcome:
    with Watchdog("bad_readers", **limits) as watchdog:
        found = watchdog.run(reader, {"file": b"content"})
        after = watchdog.run("good", {"file": b"content"})
    assert after == Outcome("ok"), "the next input has a worker again"
    return found


def test_every_reader_has_hostile_inputs_and_valid_ones() -> None:
    assert READERS.keys() == campaign.INPUTS.keys() == VALID.keys()


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS)
def test_what_is_valid_is_read(watchdog: Watchdog, reader: str) -> None:
    assert watchdog.run(reader, VALID[reader]) == Outcome("ok")


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS)
def test_hostile_inputs_have_clear_answers(watchdog: Watchdog, reader: str) -> None:
    num_inputs = FEWER.get(reader, NUM_INPUTS)
    tally = campaign.fuzz(reader, num_inputs, 0, watchdog)
    assert not tally.failures, [outcome for alike in tally.failures.values() for _, outcome in alike]
    if reader != "report":
        assert tally.counts["refused"] > num_inputs // 5  # the inputs are hostile


@pytest.mark.long
@pytest.mark.parametrize(
    ("reader", "kind", "word"),
    [
        ("good", "ok", ""),
        ("refuses", "refused", "expected a good one, got a bad one"),
        ("says_too_much", "unclear", "xxx"),
        ("says_it_on_two_lines", "unclear", r"a\nb"),
        ("raises", "error", "KeyError: 'layers'"),
        ("exits", "error", "SystemExit"),
        ("eats", "error", "MemoryError"),
        ("nibbles", "error", "MemoryError"),
        ("crashes", "crash", "exit code -6"),
    ],
)
def test_the_harness_tells_a_fault_from_an_answer(reader: str, kind: str, word: str) -> None:
    found = bad(reader)
    assert found.kind == kind
    assert word in found.detail


@pytest.mark.long
def test_what_never_ends_is_a_hang() -> None:
    assert (found := bad("computes", cpu_seconds=1)).kind == "hang"
    assert "bad_readers.py" in found.detail, "where it was"
    assert bad("waits", wall_seconds=2).kind == "hang"


@pytest.mark.long
def test_failures_are_counted_saved_and_replayed(tmp_path: Path) -> None:
    tally, files = campaign.Tally(), {"run.yaml": b"a: 1", "deep/overrides.json": b"[]"}
    for kind in ("ok", "refused", "error", "error", "hang"):
        tally.add(files, Outcome(kind, "what happened", "KeyError at store.py:1"))
    lines = campaign.table({"config": tally}).splitlines()
    assert lines[2].split()[1::2] == ["config", "5", "1", "1", "0", "2", "0", "1"]
    assert [line.partition(": /")[0] for line in campaign.save({"config": tally}, tmp_path)] == [
        "config: error: KeyError at store.py:1",
        "config: hang: KeyError at store.py:1",
    ]
    saved = tmp_path / "config-0-1"
    assert "what happened" in (saved / "outcome.txt").read_text()
    assert {name: (saved / name).read_bytes() for name in files} == files
    assert campaign.replay(saved).kind == "error"  # no overrides.json where the reader looks for it


@pytest.mark.long
def test_inputs_are_the_same_for_a_seed_and_others_for_another() -> None:
    first, again, other = (list(campaign.drawn("heatmap", 10, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({files[HEATMAP] for files in first}) > 5


def test_shares_add_up_to_what_was_asked() -> None:
    shares = campaign.shares(12_000, list(campaign.INPUTS))
    assert sum(shares.values()) >= 12_000
    assert min(shares.values()) >= 50
    assert campaign.shares(100, ["stats"]) == {"stats": 100}


@pytest.mark.parametrize("edit", dict.fromkeys((*CONTENT, *STORAGE)), ids=lambda edit: edit.__name__)
def test_every_edit_makes_another_file(edit: object) -> None:
    from fuzz_hdf5 import edited

    content = results()[HEATMAP]
    assert any(edited(content, [(edit, seed)], {"a": 1}) != content for seed in range(5))


def test_a_run_says_what_failed_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(campaign, "Watchdog", lambda: Watchdog("bad_readers"))
    monkeypatch.setitem(campaign.INPUTS, "raises", campaign.INPUTS["frame"])
    monkeypatch.setitem(campaign.INPUTS, "refuses", campaign.INPUTS["frame"])
    assert campaign.main(["--inputs", "3", "--readers", "refuses"]) == 0
    assert campaign.main(["--inputs", "4", "--readers", "refuses,raises"]) == 1
    assert "raises: error: KeyError at bad_readers.py" in capsys.readouterr().out
