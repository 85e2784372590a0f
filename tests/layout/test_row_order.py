"""The language of row orders: parsed, laid out, refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkov_dist.errors import QkovError
from qkov_dist.layout.row_order import RowSlice, parse

SIZES = {"q": 2, "k": 2, "v": 3, "gate": 3, "_": 1}


def spelled(pattern: str, num_heads: int, num_kv_heads: int, sizes: dict[str, int] = SIZES) -> str:
    """The order as one name a slice, such as ``Q0 Q1 K0 V0``; rows of no block are dots."""
    slices = parse(pattern).layout(num_heads, num_kv_heads, sizes)
    return " ".join(f"{s.block}{s.head}" if s.block else "." for s in slices)


@pytest.mark.parametrize(
    ("pattern", "counts", "expected"),
    [
        ("H*q H*k H*v", (2, 2), "Q0 Q1 K0 K1 V0 V1"),
        ("H*(q k v)", (2, 2), "Q0 K0 V0 Q1 K1 V1"),
        ("H*q K*k K*v", (4, 1), "Q0 Q1 Q2 Q3 K0 V0"),
        ("K*(G*q k v)", (4, 2), "Q0 Q1 K0 V0 Q2 Q3 K1 V1"),
        ("4*(H/4*q H/4*v H/4*k)", (8, 8), "Q0 Q1 V0 V1 K0 K1 Q2 Q3 V2 V3 K2 K3 Q4 Q5 V4 V5 K4 K5 Q6 Q7 V6 V7 K6 K7"),
        ("H*(q gate)", (2, 1), "Q0 . Q1 ."),
        ("H*(k v)", (2, 1), "K0 V0 K1 V1"),
        ("q 2*(_ k)", (1, 1), "Q0 . K0 . K1"),
        (" 2 * ( 3 * q ) ", (1, 1), "Q0 Q1 Q2 Q3 Q4 Q5"),
    ],
)
def test_orders_number_heads_by_occurrence(pattern: str, counts: tuple[int, int], expected: str) -> None:
    assert spelled(pattern, *counts) == expected


def test_slices_have_the_sizes_of_their_atoms() -> None:
    slices = parse("H*(k v)").layout(2, 1, {"k": 4, "v": 3})
    assert slices == (RowSlice("K", 0, 0, 4), RowSlice("V", 0, 4, 7), RowSlice("K", 1, 7, 11), RowSlice("V", 1, 11, 14))


@settings(deadline=None)
@given(
    pattern=st.sampled_from(["H*q K*k K*v", "K*(G*q k v)", "H*(q gate) K*(k v)", "K*(v k) H*q H*_"]),
    num_kv_heads=st.integers(1, 5),
    group=st.integers(1, 4),
    sizes=st.fixed_dictionaries({name: st.integers(1, 9) for name in SIZES}),
)
def test_every_order_tiles_without_gaps(pattern: str, num_kv_heads: int, group: int, sizes: dict[str, int]) -> None:
    slices = parse(pattern).layout(num_kv_heads * group, num_kv_heads, sizes)
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])]
    for block, count in (("Q", num_kv_heads * group), ("K", num_kv_heads), ("V", num_kv_heads)):
        assert [s.head for s in slices if s.block == block] == list(range(count))


def test_a_pattern_is_parsed_once() -> None:
    assert parse("H*q H*k") is parse("H*q H*k")


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("", "a term, got nothing"),
        ("H*x", "an atom .* got 'x'"),
        ("H q", r"'\*' after the count H, got 'q'"),
        ("H*", "an atom .* got 'the end'"),
        ("H*(q k", "a closing '\\)'"),
        ("H*()", "an empty group"),
        ("q)", "a term, got '\\)'"),
        ("H/0*q", r"'\*' after the count H, got '/'"),
        ("0*q", r"after the count 0"),
        ("H-q", "one of"),
        ("h*q", "an atom"),
    ],
)
def test_bad_patterns_are_refused_with_the_pattern(pattern: str, complaint: str) -> None:
    with pytest.raises(QkovError, match=complaint) as refusal:
        parse(pattern)
    assert repr(pattern) in str(refusal.value)


@pytest.mark.parametrize(
    ("pattern", "counts", "complaint"),
    [
        ("4*(H/4*q)", (6, 6), "H divisible by 4, got H=6"),
        ("K*(G*q k v)", (4, 3), "K that divides H, got H=4, K=3"),
    ],
)
def test_counts_that_do_not_divide_are_refused_with_pattern_and_sizes(
    pattern: str, counts: tuple[int, int], complaint: str
) -> None:
    with pytest.raises(QkovError, match=complaint) as refusal:
        parse(pattern).layout(*counts, SIZES)
    assert repr(pattern) in str(refusal.value)
    assert "q=2" in str(refusal.value)


def test_an_atom_without_a_size_is_refused() -> None:
    with pytest.raises(QkovError, match="a size for the atom 'gate'"):
        parse("H*(q gate)").layout(2, 2, {"q": 2})
