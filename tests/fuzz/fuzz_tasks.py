"""Task files that ought to be refused: wrong rows, broken tables, lines and gzip streams that lie about their size."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_bytes import IN_PLACE, SEEDS, damaged, one_of_files
from fuzz_text import changed, json_texts, leaves, trees
from hypothesis import strategies as st

TOKENIZERS = ("bytes", "chat", "tagged", "words", "pieces", "none")
BOMB_BYTES = 300 << 20

ROWS: tuple[dict[str, Any], ...] = (
    {"text": "ab w 12"},
    {"text": "é → \U0001f600", "id": "é-1"},
    {"prompt": "x + y =", "completion": " 12", "id": 7},
    {"prompt": "", "completion": "ab"},
    {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]},
    {"input_ids": [5, 6]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"messages": [{"role": role, "content": "so"} for role in ("system", "user", "assistant", "user", "assistant")]},
)
LINES = tuple(json.dumps(row).encode() for row in ROWS)
VALID = tuple(b"\n".join(lines) + b"\n" for lines in (LINES, LINES[:1], LINES[:4], LINES[4:6], LINES[6:]))

KEYS = (
    "text",
    "prompt",
    "completion",
    "messages",
    "input_ids",
    "labels",
    "id",
    "ID",
    "",
    "\ud800",
    "k" * 3000,
    "\x1b[2J",
)

TABLE = pa.table(
    {
        "text": ["ab w 12", "é → \U0001f600", 'say "x",\ty', "", None],
        "label": [0, 1, -1, 7, None],
        "kind": pa.array(["a", "b", "a", None, "b"]).dictionary_encode(),
        "messages": [ROWS[6]["messages"], None, [], [{"role": "assistant", "content": None}], ROWS[6]["messages"]],
        "input_ids": [[1, 2, 3], [], None, [300, -1], [None, 1]],
    }
)
COLUMNS: tuple[dict[str, str] | None, ...] = (
    None,
    {"text": "text"},
    {"prompt": "{kind} {label}: ", "completion": "text"},
    {"messages": "messages"},
    {"input_ids": "input_ids", "id": "label"},
)


def _row(pairs: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs) + "}"


def _one_key(row: dict[str, Any], seed: int, value: str) -> str:
    """A valid row in which the value of one key is another JSON text."""
    chosen = Random(seed).choice(list(row))
    return _row([(key, value if key == chosen else json.dumps(row[key])) for key in row])


def _messages(roles: list[Any], content: Any, count: int) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles] * count})


_lines = st.one_of(
    json_texts,
    st.builds(_row, st.lists(st.tuples(st.sampled_from(KEYS), json_texts), max_size=4)),
    st.builds(_one_key, st.sampled_from(ROWS), SEEDS, json_texts),
    st.builds(changed, st.sampled_from(ROWS), SEEDS, trees).map(json.dumps),
    st.builds(
        _messages, st.lists(st.sampled_from(["user", "assistant", "tool", "", "\0"])), leaves, st.integers(1, 50)
    ),
    st.sampled_from(
        [
            '{"text": "' + "a" * (6 << 20) + '"}',
            '{"text": "' + "a b " * (1 << 18) + '"}',
            '{"id": "' + "i" * (1 << 20) + '", "text": "ab"}',
            '{"id": 1' + "0" * 4000 + ', "text": "ab"}',
            '{"input_ids": [' + "1, " * (1 << 20) + "1]}",
            '{"input_ids": [1, 1' + "0" * 4000 + "]}",
            '{"text": "ab", "' + "k" * (1 << 20) + '": 1}',
            "[" + "[], " * (1 << 20) + "[]]",
            "{" + ", ".join(f'"{number}": 0' for number in range(1 << 16)) + "}",
            _messages(["user", "assistant"], "hi", 5000),
        ]
    ),
)


def _joined(lines: Sequence[str], end: str, start: str) -> bytes:
    return (start + end.join(lines)).encode("utf-8", "surrogatepass")


_texts = st.one_of(
    st.builds(
        _joined,
        st.lists(st.one_of(_lines, st.sampled_from(LINES).map(bytes.decode)), max_size=3),
        st.sampled_from(["\n", "\n", "\r\n", "\r", "\n\n", "\0\n"]),
        st.sampled_from(["", "", "\ufeff", "\ufeff\ufeff", "\n", json.dumps(ROWS[0]) + "\n"]),
    ),
    damaged(VALID),
    st.sampled_from(VALID).map(lambda text: text.decode().encode("utf-16")),
)


@functools.cache
def _bomb(content: bytes) -> bytes:
    """A gzip stream that grows about a thousandfold."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = content * ((1 << 20) // len(content))
    return b"".join(packer.compress(piece) for _ in range(BOMB_BYTES >> 20)) + packer.flush()


_bombs = st.sampled_from((b"\0", b"\n", b"a", b'{"text": "a"}\n', b"[", b'{"id": ')).map(_bomb)
_ZIPPED = tuple(gzip.compress(text, mtime=0) for text in VALID)
_NAMED = b"\x1f\x8b\x08\x1f" + bytes(6) + b"\xff\xff" + b"x" * 70_000  # extra field, name, comment: none of them ends

_streams = st.one_of(
    _texts.map(lambda text: gzip.compress(text, 1, mtime=0)),
    damaged(_ZIPPED),
    damaged(_ZIPPED, IN_PLACE),
    st.builds(
        bytes.__add__,
        st.sampled_from(_ZIPPED),
        st.binary(max_size=40) | st.just(bytes(1000)) | st.sampled_from(_ZIPPED),
    ),
    st.builds(lambda data, at: data[: at % len(data)], st.one_of(one_of_files(_ZIPPED), _bombs), SEEDS),
    _bombs,
    one_of_files((_NAMED, b"", b"\x1f\x8b")),
    _texts,
)
_options = st.fixed_dictionaries(
    {
        "tokenizer": st.sampled_from([*TOKENIZERS, "chat", "tagged", "chat", "tagged"]),
        "objective": st.sampled_from(["causal"] * 5 + ["masked"]),
        "max_samples": st.sampled_from([None, None, 1, 3, 2**63 - 1]),
        "max_tokens": st.sampled_from([None, None, None, 1, 4, 2**63 - 1]),
        "max_positions": st.sampled_from([None, 64, 64, 8]),
    }
)


def _files(name: str, content: bytes, options: dict[str, Any]) -> dict[str, bytes]:
    return {name: content, "options.json": json.dumps(options).encode()}


def _tables(options: dict[str, Any], columns: dict[str, str] | None, sample: str) -> dict[str, Any]:
    """Options for a table: which columns, and which rows."""
    return options | {"columns": columns} | ({"sample": sample, "max_samples": 3} if sample == "random" else {})


def _parquet(compression: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink, row_group_size=2, compression=compression)
    return bytes(sink.getvalue())


def _arrow(new: Callable[..., Any]) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return bytes(sink.getvalue())


_CSV = (b'text,label,kind\r\n"a\n""b""",1,x\r\nc,NA,\r\n', b"text;kind\na;b\n", b"\xef\xbb\xbftext,text\na,b\n")
_JSON = tuple(b"[" + b", \n".join(lines) + b"]" for lines in (LINES, LINES[:1], LINES[6:]))
_ended = {
    "csv": st.one_of(_texts, damaged(_CSV)),
    "tsv": damaged(_CSV),
    "json": st.one_of(_texts, damaged(_JSON), _texts.map(lambda text: b"[" + text)),
    "parquet": st.one_of(damaged((_parquet("none"), _parquet("snappy"))), damaged((_parquet("none"),), IN_PLACE)),
    "arrow": st.one_of(
        damaged((_arrow(pa.ipc.new_file), _arrow(pa.ipc.new_stream))),
        damaged((_arrow(pa.ipc.new_file), _arrow(pa.ipc.new_stream)), IN_PLACE),
    ),
}
_of_tables = st.sampled_from(sorted(_ended)).flatmap(
    lambda ending: st.builds(
        _files,
        st.just(f"task.{ending}"),
        _ended[ending],
        st.builds(_tables, _options, st.sampled_from(COLUMNS), st.sampled_from(["first", "first", "random"])),
    )
)


inputs = st.one_of(
    st.builds(_files, st.just("task.jsonl"), _texts, _options),
    st.builds(_files, st.just("task.jsonl.gz"), _streams, _options),
    _of_tables,
    _of_tables,
)
