"""Files of every kind with columns of their own: what is read, and what is refused where."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_files import CONVERSATION, labelled_text, load, refused
from toy_tokenizers import CHATTER

from qkov_dist.data import rows, text_files

GSM8K = {"prompt": "question", "completion": "answer"}
Table = Mapping[str, Sequence[Any]]


def as_csv(table: Table, separator: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([[*table], *zip(*table.values(), strict=True)])
    return text.getvalue().encode()


def as_objects(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def as_jsonl(table: Table) -> bytes:
    return "\n".join(map(json.dumps, as_objects(table))).encode()


def as_parquet(table: Table | pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def as_arrow(table: Table | pa.Table, new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    sink, made = pa.BufferOutputStream(), table if isinstance(table, pa.Table) else pa.table(table)
    with new(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def as_stream(table: Table | pa.Table) -> bytes:
    return as_arrow(table, pa.ipc.new_stream)


KINDS: dict[str, Callable[[Table], bytes]] = {
    "t.csv": as_csv,
    "t.CSV": as_csv,
    "t.csv.gz": lambda table: gzip.compress(as_csv(table)),
    "t.tsv": lambda table: as_csv(table, "\t"),
    "t.jsonl": as_jsonl,
    "t.json": lambda table: json.dumps(as_objects(table), indent=2).encode(),
    "lines.json": as_jsonl,
    "t.json.gz": lambda table: gzip.compress(json.dumps(as_objects(table)).encode()),
    "t.parquet": as_parquet,
    "t.arrow": as_arrow,
    "t.feather": as_arrow,
    "stream.arrow": as_stream,
}


def texts(path: Path | str, columns: Mapping[str, str] = GSM8K, **options: Any) -> list[str]:
    return [sample.text for sample in load(path, columns=columns, **options).samples]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    table = {
        "answer": ["042", "NA", "null", ' say "x", y'],
        "source": ["s", "", "t", "u"],
        "question": ["a b\nc", "", "d,e\tf", "é "],
    }
    path.write_bytes(KINDS[name](table))
    task = load(path, columns=GSM8K)
    assert [sample.text for sample in task.samples] == ["a b\nc042", "NA", "d,e\tfnull", 'é  say "x", y']
    assert labelled_text(task, index=3) == ' say "x", y'
    assert texts(path, max_samples=2) == ["a b\nc042", "NA"]
    assert len({sample.id for sample in task.samples}) == 4


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_column_names_those_that_are_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(KINDS[name]({"question": ["a"], "anser": ["b"]}))
    error = refused(path, columns=GSM8K)
    assert error.where.startswith(str(path))
    assert error.expected == "a column 'answer'"
    assert error.remedy == "Did you mean 'anser'? The columns are question, anser."


@pytest.mark.parametrize("name", [name for name in KINDS if "sv" not in name.lower()])
def test_a_null_and_a_number_name_row_and_column(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(KINDS[name]({"question": ["a", "b", None], "answer": ["c", "d", "e"], "label": [1, 0, 1]}))
    null = refused(path, columns=GSM8K)
    line = {"t.json": 12, "t.json.gz": 1}.get(name, 3)
    assert null.where == f"{path}:{line}: prompt (column 'question')"
    assert null.got == "null"
    assert texts(path, max_samples=2) == ["ac", "bd"]
    number = refused(path, columns={"prompt": "label", "completion": "answer"})
    assert number.where.endswith(": prompt (column 'label')")
    assert (number.expected, number.got) == ("text", "1 (int)")
    assert number.remedy == 'To write it as text, make it a template: prompt: "{label}".'
    assert texts(path, {"prompt": "{label}", "completion": "answer"}) == ["1c", "0d", "1e"]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer,,\r\n\r\n"two\r\nlines",1,,\r\nb,2,,\r\n')
    assert texts(path) == ["two\r\nlines1", "b2"]
    path.write_bytes(path.read_bytes() + b"c,,,\r\n")
    assert refused(path, columns=GSM8K).where == f"{path}:6: completion"


def test_a_value_of_csv_may_be_as_long_as_any_line(tmp_path: Path) -> None:
    path, before = tmp_path / "t.csv", csv.field_size_limit()
    path.write_text(f"question,answer\n{'a' * (before + 1)},b\n")
    assert load(path, columns=GSM8K, max_positions=None).samples[0].num_tokens > before
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "line", "expected", "got"),
    [
        ("question,answer\na,b\nWhat are 2, 3?,9\n", 3, "2 values, as many as the first line has", "3"),
        ("question,answer\n\na\n", 3, "2 values, as many as the first line has", "1"),
        ('question,answer\na,"b\nc\n', 2, "a record", "unexpected end of data"),
        ('question,answer\na,"b"c\n', 2, "a record", "',' expected after '\"'"),
        ("question,answer,question\na,b,c\n", 1, "one column 'question'", "2 of this name"),
        ("question;answer\na;b\n", 1, "a column 'question'", "no such column"),
        (b"question,answer\na,b\ncaf\xe9,d\n", 3, "UTF-8 text", "byte 0xe9 at byte 3 of the line"),
        ("question,answer\r\n".encode("utf-16"), 1, "UTF-8 text", "byte 0xff at byte 0 of the line"),
    ],
)
def test_broken_csv_names_the_line(tmp_path: Path, content: str | bytes, line: int, expected: str, got: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(path, columns=GSM8K)
    assert (error.where, error.expected, error.got) == (f"{path}:{line}", expected, got)


@pytest.mark.parametrize(
    ("content", "line", "expected", "got"),
    [
        ('[{"text": "a"},\n\n {"text": "b"} {}]', 3, "',' or ']' after an object", "{"),
        ('[{"text": "a"},\n]', 2, "an object", "]"),
        ('[{"text": "a"},\n5]', 2, "an object", "5"),
        ('\n[{"text": "a"},\n{"text": "b",\n"id": }]', 4, "a JSON object", "Expecting value"),
        ('[{"text": "a", "text": "b"}]', 1, "a JSON object", "a key twice among ['text', 'text']"),
        ('[{"text": "a"}', 1, "',' or ']' after an object", "the end of the file"),
        ('[{"text": "a"}]\n]', 2, "nothing after the array", "]"),
        (b'[{"text": "\xe9"}]', 1, "UTF-8 text", "byte 0xe9"),
        ('{"data": [\n1]}', 1, "one JSON object", "Expecting value at column 1"),
    ],
)
def test_broken_json_names_the_line(tmp_path: Path, content: str | bytes, line: int, expected: str, got: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(path)
    assert (error.where, error.expected, error.got) == (f"{path}:{line}", expected, got)


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    monkeypatch.setattr("qkov_dist.data.json_files._CHUNK_BYTES", 7)
    path.write_text('\ufeff [ {"text": "é → \\n {[\\""} ,\n{"text": "b"}, oops', encoding="utf-8")
    assert [sample.text for sample in load(path, max_samples=2).samples] == ['é → \n {["', "b"]
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 20)
    path.write_text('[{"text": "' + "a" * 100 + '"}]')
    assert refused(path).expected == "an object of at most 20 characters"


@pytest.mark.parametrize("write", [as_parquet, as_arrow, as_stream])
def test_columns_of_any_encoding(tmp_path: Path, write: Callable[[pa.Table], bytes]) -> None:
    path = tmp_path / ("t.parquet" if write is as_parquet else "t.arrow")
    names = {"info": {"features": {"kind": {"names": ["sum", "code"], "_type": "ClassLabel"}, "n": {"_type": "Value"}}}}
    table = pa.table(
        {
            "question": pa.array(["a", "b", "a"]).dictionary_encode(),
            "answer": pa.array(["c", "d", "e"], pa.large_string()),
            "kind": pa.array([1, 0, -1], pa.int8()),
            "x": pa.array([0.5, 1.0, float("nan")]),
            "chat": [[{**turn, "tool_calls": None} for turn in CONVERSATION]] * 3,
            "tools": pa.array([None] * 3, pa.list_(pa.string())),
            "ids": [[5, 6, 7], [8, 9], [1, 2]],
        }
    )
    both = pa.table([*table.columns, table["x"], table["x"]], names=[*table.column_names, "twice", "twice"])
    path.write_bytes(write(both.replace_schema_metadata({"huggingface": json.dumps(names)})))
    assert texts(path) == ["ac", "bd", "ae"]
    columns = {"prompt": "{question}?", "completion": " {kind} {x}"}
    assert texts(path, columns, max_samples=2) == ["a? code 0.5", "b? sum 1.0"]
    assert refused(path, columns=columns).where == f"{path}:3: completion (column 'kind')"
    assert texts(path, {"prompt": "question", "completion": "kind"}, max_samples=1) == ["acode"]
    chats = load(path, CHATTER, columns={"messages": "chat", "tools": "tools"}, max_samples=1)
    assert labelled_text(chats, CHATTER) == "yes ab<|end|>no<|end|>"
    assert load(path, columns={"input_ids": "ids"}).samples[1].input_ids.tolist() == [8, 9]
    assert refused(path, columns={"text": "twice"}).got == "2 of this name"
    assert refused(path, columns={"text": "{x}"}).got == "nan (float)"


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_a_broken_table_is_one_message(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = KINDS[name]({"question": [f"{n} " * 40 for n in range(60)], "answer": ["b"] * 60})
    path.write_bytes(whole)
    assert len(texts(path, max_positions=None)) == 60
    half = len(whole) // 2
    for content in (b"question,answer\n", whole[:half], whole[:8] + bytes(900) + whole[908:], whole[:-8]):
        path.write_bytes(content)
        error = refused(path, columns=GSM8K, max_positions=None)
        assert error.where.startswith(str(path)), content
        assert error.expected.startswith("a readable"), content


def test_text_that_is_none_in_a_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    wrong = pa.StringArray.from_buffers(1, pa.array([b"caf\xe9"]).buffers()[1], pa.py_buffer(b"caf\xe9"))
    path.write_bytes(as_parquet(pa.table({"question": ["a"], "answer": wrong})))
    assert refused(path, columns=GSM8K).where == f"{path}:1: column 'answer'"
    path = tmp_path / "t.arrow"
    path.write_bytes(as_arrow(pa.table({"question": ["a"], "answer": wrong})))
    assert refused(path, columns=GSM8K).expected == "a readable Arrow file"
    path.write_bytes(as_arrow(pa.table({"question": ["a"], "answer": ["b"]})).replace(b"answer", b"answe\xf8"))
    assert refused(path, columns=GSM8K).expected == "a readable Arrow file"


@pytest.mark.parametrize("name", ["t.csv", "t.json", "t.parquet", "t.arrow", "stream.arrow"])
def test_a_table_without_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    table = {"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}
    path.write_bytes(KINDS[name](table))
    assert refused(path, columns=GSM8K).expected == "at least one sample"
    path.write_bytes(b"")
    assert refused(path, columns=GSM8K).where == str(path)


def test_tables_without_columns_have_a_samples_keys_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,messages\none,"' + json.dumps(CONVERSATION).replace('"', '""') + '"\n')
    task = load(path, CHATTER)
    assert (task.samples[0].id, labelled_text(task, CHATTER)) == ("one", "yes ab<|end|>no<|end|>")
    path.write_text("question,answer\na,b\n")
    assert refused(path).remedy == "Set for example columns: {prompt: question, completion: answer}."
    path.write_text("id,text,source\n1,b,c\n")
    assert refused(path).remedy == "Set for example columns: {text: text}."


def test_a_pattern_takes_its_files_by_name_and_numbers_on(tmp_path: Path) -> None:
    for number, name in enumerate(("b.csv", "a.parquet", "c.jsonl")):
        (tmp_path / name).write_bytes(KINDS[f"t.{name[2:]}"]({"question": [f"{number}", "q"], "answer": ["x", "y"]}))
    (tmp_path / "d.jsonl").mkdir()
    task = load(f"{tmp_path}/*", columns=GSM8K)
    assert [sample.text for sample in task.samples] == ["1x", "qy", "0x", "qy", "2x", "qy"]
    assert [sample.id for sample in task.samples] == [f"math-{n}" for n in range(1, 7)]
    assert refused(f"{tmp_path}/*.tsv").expected == "files of this pattern"
    (tmp_path / "[1].csv").write_text("question,answer\nin,brackets\n")
    assert texts(tmp_path / "[1].csv") == ["inbrackets"]
    (tmp_path / "notes.txt").write_text("")
    error = refused(f"{tmp_path}/*", columns=GSM8K)
    assert error.where == f"{tmp_path}/notes.txt"
    assert ".jsonl, .ndjson, .json, .csv, .tsv, .parquet" in error.expected


def test_without_the_extra_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library, path in (("pyarrow", f"{tmp_path}/t.parquet"), ("datasets", "hf:org/set")):
        monkeypatch.setitem(sys.modules, library, None)
        error = refused(path)
        assert (error.where, error.expected) == (path, f"the package {library!r}")
        assert 'pip install "qkov-dist[data]"' in error.remedy
    plain = tmp_path / "t.csv"
    plain.write_bytes(as_csv({"question": ["a"], "answer": ["b"]}))
    assert texts(plain) == ["ab"]


def test_rows_beyond_measure_are_refused_where_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_ROWS", 3)
    for name in ("t.csv", "t.json", "t.parquet", "t.arrow"):
        path = tmp_path / name
        path.write_bytes(KINDS[name]({"question": ["a"] * 4, "answer": ["b"] * 4}))
        assert refused(path, columns=GSM8K).expected == "at most 3 lines or rows and 64 MiB"
        assert len(texts(path, max_samples=2)) == 2
        assert len(texts(path, max_samples=4, sample="random")) == 4
