"""Text that parsers find hard: JSON with duplicate keys, numbers beyond any type, deep nests; plain values to match."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import strategies as st

DEEP = 100_000

WORDS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\ufeff",
    "\ud800",
    "\u2028",
    "\x1b[31mred",
    "a\r\nb",
    "../../etc/passwd",
    "/dev/null",
    "=1+1",
    "</script>",
    "%s%n{}",
    "null",
    "1e5",
    "x" * 5000,
    "e\u0301\u0301\u0301",
    "\U0010ffff",
)
NUMBERS = (0, 1, -1, True, False, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**400, 0.5, 1e308, 5e-324)
BROKEN_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 4000, "1" * 5000, "-0", "0.1e-999999999")

leaves: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(NUMBERS),
    st.sampled_from([None, float("nan"), float("inf"), -float("inf")]),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
)
trees: st.SearchStrategy[Any] = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(), inner, max_size=4),
    max_leaves=12,
)


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs) + "}"


def deep(opening: str, closing: str, *, is_closed: bool) -> str:
    """A nest deeper than any stack."""
    return opening * DEEP + (closing * DEEP if is_closed else "")


json_texts: st.SearchStrategy[str] = st.recursive(
    st.one_of(
        leaves.map(json.dumps),
        st.sampled_from(BROKEN_NUMBERS),
        st.sampled_from(["'a'", "tru", "{", "]", '"', '"\\ud800"', '"\\x"', '"a\nb"', "//", ""]),
        st.builds(
            deep, st.sampled_from(["[", '{"a":', '[{"a":']), st.sampled_from(["]", "}"]), is_closed=st.booleans()
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda parts: f"[{', '.join(parts)}]"),
        st.lists(st.tuples(st.sampled_from(["a", "b", "", "id"]), inner), max_size=4).map(_object),
    ),
    max_leaves=8,
)


def changed(tree: Any, seed: int, value: Any) -> Any:
    """A tree with one place in it replaced, removed, given twice, or wrapped."""
    random = Random(seed)
    places = list(_places(tree, lambda new: new))
    return random.choice(places)(random, value) if places else value


def _places(tree: Any, rebuild: Callable[[Any], Any]) -> Any:
    """For each place in a tree, a function of a generator and a value that gives the tree changed there."""
    yield lambda random, value: rebuild(random.choice((value, [tree], {"a": tree})))
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        yield lambda _, __, key=key: rebuild(_without(tree, key))
        if isinstance(tree, list):
            yield lambda _, __, inner=inner: rebuild([*tree, inner])
        yield from _places(inner, lambda new, key=key: rebuild(_with(tree, key, new)))


def _with(tree: Any, key: Any, value: Any) -> Any:
    copy = tree.copy()
    copy[key] = value
    return copy


def _without(tree: Any, key: Any) -> Any:
    copy = tree.copy()
    del copy[key]
    return copy
