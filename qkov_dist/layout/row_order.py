"""The order of heads along one side of a projection, as a small language.

    sequence = term term ...            in the order of the rows
    term     = [count "*"] (atom | "(" sequence ")")
    count    = H | K | G | an integer | one of them "/" an integer, such as H/4
    atom     = q | k | v | gate | _

H is the number of query heads, K of kv heads, G = H / K. An atom is one head's rows of one block, as many as its size
says; ``gate`` and ``_`` are rows that belong to no block. Heads are numbered by occurrence: the first ``q`` from the
top is query head 0. That is all that it takes to say every fused order in use: ``H*q H*k H*v`` (gpt2), ``H*(q k v)``
(gpt_neox), ``K*(G*q k v)`` (falcon), ``4*(H/4*q H/4*v H/4*k)`` (codegen), ``H*(q gate)`` (qwen3_next).

The string is parsed once into a frozen recipe; laying the recipe out is counting.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from qkov_dist.errors import QkovError

BLOCK_OF_ATOM = {"q": "Q", "k": "K", "v": "V"}
ATOMS = (*BLOCK_OF_ATOM, "gate", "_")
_TOKEN = re.compile(r"\s*([A-Za-z_]+|\d+|[*/()])")
_GRAMMAR = "Write terms such as 'H*q K*k K*v' or 'K*(G*q k v)'; atoms are q, k, v, gate, _; counts are H, K, G, H/4, 3."


@dataclass(frozen=True)
class RowSlice:
    """The rows [start, stop) of one head; ``block`` is None where they belong to no block."""

    block: str | None
    head: int
    start: int
    stop: int


@dataclass(frozen=True)
class Term:
    """``symbol / divisor`` repetitions of an atom (``body`` empty) or of a sequence of terms."""

    symbol: str
    divisor: int
    atom: str
    body: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A parsed order; ``pattern`` is kept for messages."""

    pattern: str
    terms: tuple[Term, ...]

    def layout(self, num_heads: int, num_kv_heads: int, sizes: Mapping[str, int]) -> tuple[RowSlice, ...]:
        """Lay the order out for these counts and atom sizes; slices follow each other without a gap.

        Raises:
            QkovError: where a count does not divide or an atom has no size.
        """
        counts = {"H": num_heads, "K": num_kv_heads}
        if num_heads % num_kv_heads == 0:
            counts["G"] = num_heads // num_kv_heads
        try:
            names = [name for term in self.terms for name in _expand(term, counts)]
            return _number(names, sizes)
        except _OrderError as problem:
            shown = ", ".join(f"{k}={v}" for k, v in (*counts.items(), *sizes.items()))
            raise QkovError(
                f"row order {self.pattern!r} with {shown}",
                expected=problem.expected,
                got=problem.got,
                remedy="Correct the row order or the sizes that the attention module states.",
            ) from None


class _OrderError(Exception):
    """An inner complaint that does not know the pattern yet."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected, self.got = expected, got


@lru_cache(maxsize=256)
def parse(pattern: str) -> Recipe:
    """Parse an order such as ``"H*q K*k K*v"``.

    Raises:
        QkovError: for anything outside the grammar; the message shows the pattern and the place.
    """
    try:
        tokens = _tokens(pattern)
        terms, position = _sequence(tokens, 0)
        if position != len(tokens) or not terms:
            raise _OrderError("a term", repr(tokens[position]) if position < len(tokens) else "nothing")
    except _OrderError as problem:
        where = f"row order {pattern!r}"
        raise QkovError(where, expected=problem.expected, got=problem.got, remedy=_GRAMMAR) from None
    return Recipe(pattern, terms)


def _tokens(pattern: str) -> list[str]:
    tokens, position, end = [], 0, len(pattern.rstrip())
    while position < end:
        match = _TOKEN.match(pattern, position)
        if match is None:
            raise _OrderError("a name, a number, or one of * / ( )", repr(pattern[position:].strip()[0]))
        tokens.append(match.group(1))
        position = match.end()
    return tokens


def _sequence(tokens: list[str], position: int) -> tuple[tuple[Term, ...], int]:
    terms: list[Term] = []
    while position < len(tokens) and tokens[position] != ")":
        term, position = _term(tokens, position)
        terms.append(term)
    return tuple(terms), position


def _term(tokens: list[str], position: int) -> tuple[Term, int]:
    symbol, divisor, position = _count(tokens, position)
    token = tokens[position] if position < len(tokens) else "the end"
    if token == "(":
        body, position = _sequence(tokens, position + 1)
        if position >= len(tokens) or not body:
            raise _OrderError("terms and a closing ')'", "an empty group" if position < len(tokens) else "the end")
        return Term(symbol, divisor, "", body), position + 1
    if token not in ATOMS:
        raise _OrderError(f"an atom ({', '.join(ATOMS)}) or '('", repr(token))
    return Term(symbol, divisor, token), position + 1


def _count(tokens: list[str], position: int) -> tuple[str, int, int]:
    """An optional ``count "*"``: (symbol, divisor, position after it)."""
    symbol = tokens[position]
    if symbol not in ("H", "K", "G") and not symbol.isdigit():
        return "1", 1, position
    tail = tokens[position + 1 : position + 4]
    divisor = 1
    if tail[:1] == ["/"] and len(tail) > 1 and tail[1].isdigit() and int(tail[1]) > 0:
        divisor, tail, position = int(tail[1]), tail[2:], position + 2
    if tail[:1] != ["*"] or symbol == "0":
        raise _OrderError(f"'*' after the count {symbol}", repr(tail[0]) if tail else "the end")
    return symbol, divisor, position + 2


def _expand(term: Term, counts: Mapping[str, int]) -> Iterator[str]:
    """The atom names of one term, one an occurrence."""
    if term.symbol == "G" and "G" not in counts:
        raise _OrderError("K that divides H", f"H={counts['H']}, K={counts['K']}")
    total = int(term.symbol) if term.symbol.isdigit() else counts[term.symbol]
    count, rest = divmod(total, term.divisor)
    if rest:
        raise _OrderError(f"{term.symbol} divisible by {term.divisor}", f"{term.symbol}={total}")
    for _ in range(count):
        if term.body:
            for inner in term.body:
                yield from _expand(inner, counts)
        else:
            yield term.atom


def _number(names: list[str], sizes: Mapping[str, int]) -> tuple[RowSlice, ...]:
    seen: Counter[str] = Counter()
    slices, start = [], 0
    for name in names:
        if name not in sizes:
            raise _OrderError(f"a size for the atom {name!r}", f"sizes of {', '.join(sizes)} only")
        stop = start + sizes[name]
        slices.append(RowSlice(BLOCK_OF_ATOM.get(name), seen[name], start, stop))
        seen[name] += 1
        start = stop
    return tuple(slices)
