"""Datasets of the hub, by the library itself on a folder laid out like one: the id is where it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_files import CONVERSATION, labelled_text, load, refused
from toy_tokenizers import CHAT, CHATTER, byte_tokenizer

from qkov_dist.data.hub import hub_path

CARD = """---
configs:
- {config_name: main, default: true, data_files: [{split: train, path: main/train*}, {split: test, path: main/test*}]}
- {config_name: chats, data_files: [{split: train, path: chats.parquet}]}
dataset_info:
- config_name: main
  features:
  - {name: question, dtype: string}
  - {name: answer, dtype: string}
  - {name: kind, dtype: {class_label: {names: {'0': sum, '1': code}}}}
  - {name: ids, list: int64}
  splits: [{name: train, num_examples: 20, num_bytes: 9}, {name: test, num_examples: 4, num_bytes: 9}]
---
"""
GSM8K = {"prompt": "question", "completion": "answer"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hub") / "set"
    (folder / "main").mkdir(parents=True)

    def table(start: int, count: int) -> pa.Table:
        numbers = range(start, start + count)
        return pa.table(
            {
                "question": [f"q{n} " for n in numbers],
                "answer": [f"a{n}" for n in numbers],
                "kind": [n % 2 for n in numbers],
                "ids": [[n, 6, 7] for n in numbers],
            }
        )

    pq.write_table(table(0, 10), folder / "main" / "train-0.parquet", row_group_size=3)
    pq.write_table(table(10, 10), folder / "main" / "train-1.parquet", row_group_size=3)
    pq.write_table(table(20, 4), folder / "main" / "test.parquet")
    tool = [{"function": {"name": "f", "strict": None}}, {"function": {"name": None, "strict": True}}]
    chats = {"chat": [[{**turn, "tool_calls": None} for turn in CONVERSATION]], "tools": [tool]}
    pq.write_table(pa.table(chats), folder / "chats.parquet")
    (folder / "README.md").write_text(CARD)
    return f"hf:{folder}"


def answers(path: str, **options: object) -> list[int]:
    task = load(path, columns=GSM8K, **options)
    return [int(sample.text.split("a")[1]) for sample in task.samples]


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("", range(20)),
        (":main", range(20)),
        (":test", range(20, 24)),
        (":main:test", range(20, 24)),
        (":train[:3]", range(3)),
        (":train[8:12]", range(8, 12)),
        (":train[18:99]", range(18, 20)),
        (":main:train[5:2]", []),
        (":train[10%:25%]", range(2, 5)),
        (":train[-2:]", [18, 19]),
        (":test+train", [*range(20, 24), *range(20)]),
        (":train[:2]+test[50%:]", [0, 1, 22, 23]),
    ],
)
def test_splits_and_slices(hub: str, split: str, numbers: list[int]) -> None:
    if not numbers:
        assert refused(f"{hub}{split}", columns=GSM8K).expected == "at least one sample"
        return
    assert answers(f"{hub}{split}") == [*numbers]
    assert answers(f"{hub}{split}", max_samples=2) == [*numbers][:2]


def test_rows_that_are_not_asked_for_are_not_fetched(hub: str, tmp_path: Path) -> None:
    """The second file of the split is broken, which nobody notices before its rows are wanted."""
    folder = tmp_path / "set"
    (folder / "main").mkdir(parents=True)
    for file in Path(hub.removeprefix("hf:")).rglob("*.*"):
        os.link(file, folder / file.relative_to(hub.removeprefix("hf:")))
    last = folder / "main" / "train-1.parquet"
    last.unlink()
    last.write_bytes(b"broken")
    for split in ("", ":train[2:]", ":train[10%:]"):
        assert len(answers(f"hf:{folder}{split}", max_samples=7)) == 7
        error = refused(f"hf:{folder}{split}", columns=GSM8K, max_samples=15)
        assert (error.where, error.expected) == (f"hf:{folder}{split}", "a readable dataset")


def test_class_labels_go_by_name_and_rows_are_drawn(hub: str) -> None:
    columns = {"prompt": "{question}is ", "completion": "kind"}
    assert [sample.text for sample in load(hub, columns=columns, max_samples=2).samples] == ["q0 is sum", "q1 is code"]
    numbers = answers(hub, max_samples=4, sample="random", sample_seed=1)
    assert numbers == sorted(set(numbers)) != [0, 1, 2, 3]


def test_one_column_by_what_it_holds(hub: str) -> None:
    assert [sample.text for sample in load(f"{hub}#question", max_samples=2).samples] == ["q0 ", "q1 "]
    assert load(f"{hub}#ids").samples[8].input_ids.tolist() == [8, 6, 7]
    assert labelled_text(load(f"{hub}:chats#chat", CHATTER), CHATTER) == "yes ab<|end|>no<|end|>"
    shows = byte_tokenizer("{{ tools | tojson }}" + CHAT)
    for path, columns in ((f"{hub}:chats#chat", None), (f"{hub}:chats", {"messages": "chat", "tools": "tools"})):
        text = load(path, shows, columns=columns, max_positions=None).samples[0].text
        assert text.startswith('[{"function": {"name": "f"}}, {"function": {"strict": true}}]<|user|>')


def test_what_is_not_there_is_one_message(hub: str, capfd: pytest.CaptureFixture[str]) -> None:
    error = refused(hub, columns={"prompt": "qestion", "completion": "answer"})
    assert error.where == hub
    assert error.remedy == "Did you mean 'question'? The columns are question, answer, kind, ids."
    assert refused(hub).remedy == "Set for example columns: {prompt: question, completion: answer}."
    assert refused(f"{hub}#nothing").where == f"{hub}#nothing:1"
    assert refused(f"{hub}#answer", columns=GSM8K).got == "both"
    assert "Bad split: dev" in refused(f"{hub}:dev", columns=GSM8K).got
    assert refused(f"{hub}:train[a]", columns=GSM8K).expected == "a readable dataset"
    assert refused("hf:/nowhere/at/all", columns=GSM8K).expected == "a readable dataset"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["hf:#text", "hf:org/set#", "hf:a:b:c:d#text", "hf:"])
def test_malformed_path(path: str) -> None:
    error = refused(path)
    assert (error.where, error.expected) == (path, "hf:HUB_ID[:CONFIG][:SPLIT][#COLUMN]")


def test_parts_of_a_path() -> None:
    assert hub_path("hf:org/set:main:train[:10]+test#a:b") == ("org/set", ("main", "train[:10]+test"), "a:b")
    assert hub_path("hf:org/set") == ("org/set", (), None)


def test_a_slice_of_unknown_length_is_cut_from_the_whole_split(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    task = load(f"{hub}:chats:train[-1:]", CHATTER, columns={"messages": "chat"})
    assert labelled_text(task, CHATTER) == "yes ab<|end|>no<|end|>"
