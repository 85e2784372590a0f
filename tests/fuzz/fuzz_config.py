"""Configurations that ought to be refused: hostile values and keys, YAML's own traps, overrides."""

from __future__ import annotations

import json
from typing import Any

import yaml
from fuzz_bytes import SEEDS, damaged
from fuzz_text import NUMBERS, WORDS, changed, leaves, trees
from hypothesis import strategies as st

from qkov_dist.config import KEYS, SECTIONS

VALID: dict[str, Any] = {
    "model": {"path": "some/model", "revision": None, "dtype": "auto", "trust_remote_code": False},
    "parallel": {"tp": 2, "shard": "auto"},
    "tasks": [
        {"name": "math", "path": "math.jsonl", "max_samples": 7},
        {"name": "code", "path": "code.jsonl", "max_tokens": 96},
    ],
    "metric": {"score": "signed", "include_bias": True, "layers": [0, 3], "heads": "0-3,7"},
    "fisher": {"estimator": "ema", "decay": 0.9, "scope": "pooled", "batch_size": 8},
    "ridge": {"epsilon": 1e-10, "absolute": 1e-8, "relative": 0.001},
    "statistics": {"enabled": True, "permutations": 100, "seed": 0},
    "compute": {"batch_tokens": 512, "score_dtype": "float64", "compile": "auto"},
    "output": {"dir": "runs/x", "pairs": "all", "resume": False},
}
_HEAD = "model: {path: m}\ntasks: [{name: a, path: a}, {name: b, path: b}]\n"


def _laughs(depth: int, width: int, merge: bool) -> str:
    """Aliases of aliases: ``width ** depth`` values, or as many merged pairs, in a few lines."""
    lines = ["a0: &a0 {x: 1, y: 2}" if merge else "a0: &a0 [lol, lol]"]
    for level in range(1, depth):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{aliases}]}}" if merge else f"[{aliases}]"))
    return "\n".join(lines) + "\n"


def _laughing(depth: int, width: int, merge: bool, place: str) -> str:
    bomb = _laughs(depth, width, merge)
    return f"{bomb}{place}: *a{depth - 1}\n" if place else _HEAD + bomb


_SCALARS = (
    "1:59:59",
    ":".join(["59"] * 400),
    ":".join(["59"] * 400) + ".5",
    "0x" + "f" * 8000,
    "0b" + "1" * 20_000,
    "1" * 8000,
    "1_000",
    "2024-02-30",
    "2024-01-01T25:00:00Z",
    "2024-01-01 00:00:00 +99:99",
    "!!int ''",
    "!!int abc",
    "!!int 0x",
    "!!float ''",
    "!!float x",
    "!!bool maybe",
    "!!timestamp x",
    "!!binary '\u00e9'",
    "!!binary abc",
    "!!null x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!omap 3",
    "!!pairs [a: 1, a: 1]",
    "!!str {a: 1}",
    "!!map [a]",
    "!!seq {a: b}",
    "!!python/object/apply:os.system [id]",
    "!!python/name:os.system",
    "!local x",
    "!<tag:yaml.org,2002:int> 5",
    "&a *a",
    "&a [*a]",
    "*nowhere",
    "{? [1, 2] : 3}",
    "{? {a: b} : 3}",
    "{<<: 3}",
    "{<<: [3]}",
    "&a {<<: *a}",
    "{=: 3}",
    "=",
    "<<",
    "| \n  text\n",
    "'unfinished",
    "@",
    "`",
    "%YAML 9.9",
    "[" * 400,
    "{a: " * 400,
    "- " * 400,
    "x" * 100_000,
    '"\\ud800"',
    '"\\0"',
    '"\\UFFFFFFFF"',
    ".inf",
    ".nan",
    "~",
)

yaml_values = st.one_of(
    st.sampled_from(_SCALARS),
    leaves.map(lambda value: json.dumps(value, allow_nan=True)),
    trees.map(lambda value: json.dumps(value, ensure_ascii=True)),
)
keys = st.one_of(
    st.sampled_from([*KEYS, *SECTIONS, "tasks", "tasks.a.path", "tasks.2.name", "", ".", "a.b.c.d", "model."]),
    st.sampled_from(WORDS),
    st.text(max_size=10),
)


@st.composite
def _with_a_value(draw: st.DrawFn) -> str:
    """A valid file in which one known key has another value."""
    key = draw(st.sampled_from([key for key in KEYS if not key.startswith("tasks.")]))
    section, _, name = key.partition(".")
    rest = {name: values for name, values in VALID.items() if name != section}
    return f"{yaml.safe_dump(rest)}{section}:\n  {name}: {draw(yaml_values)}\n"


@st.composite
def _with_an_entry(draw: st.DrawFn) -> str:
    """A valid file and one line more."""
    key = draw(st.one_of(keys.map(json.dumps), st.sampled_from(_SCALARS)))
    line = f"{key}: {draw(yaml_values)}\n"
    return draw(st.sampled_from([_HEAD + line, line + _HEAD, f"{_HEAD}fisher:\n  {line}"]))


def _as_written(tree: Any, style: bool | None, end: str) -> str:
    return yaml.safe_dump(tree, default_flow_style=style).replace("\n", end)


_texts = st.one_of(
    _with_a_value(),
    _with_an_entry(),
    st.builds(changed, st.just(VALID), SEEDS, trees).flatmap(
        lambda tree: st.builds(
            _as_written, st.just(tree), st.sampled_from([True, False, None]), st.sampled_from(["\n", "\r\n", "\r"])
        )
    ),
    st.builds(
        _laughing,
        st.integers(1, 40),
        st.integers(1, 9),
        st.booleans(),
        st.sampled_from(["", "model", "metric", "tasks", "fisher"]),
    ),
    st.sampled_from([f"{_HEAD}---\n{_HEAD}", "", "#", "- a\n- b\n", "\t", "%TAG ! tag:x,2000:\n---\n!x a\n"]),
)
_encodings = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32-be", "latin-1", "cp037"])


def _encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


_bytes = st.one_of(
    st.builds(_encoded, _texts, _encodings),
    damaged([yaml.safe_dump(VALID).encode(), yaml.safe_dump(VALID, default_flow_style=True).encode(), _HEAD.encode()]),
    st.sampled_from([_HEAD.encode() + b"#" * (64 << 20), b"[" * (8 << 20), b"a: " + b"x" * (32 << 20)]),
)
_overrides = st.lists(
    st.one_of(
        st.builds("{}={}".format, keys, yaml_values),
        st.builds("{}={}".format, st.sampled_from(list(KEYS)), yaml_values),
        st.builds("{}={}".format, st.sampled_from(list(KEYS)), st.sampled_from(NUMBERS)),
        st.text(max_size=20),
    ),
    max_size=3,
)


def _files(config: bytes, overrides: list[str]) -> dict[str, bytes]:
    return {"run.yaml": config, "overrides.json": json.dumps(overrides).encode()}


inputs = st.one_of(
    st.builds(_files, _bytes, st.just([])),
    st.builds(_files, st.just(_HEAD.encode()), _overrides),
    st.builds(_files, _bytes, _overrides),
)
