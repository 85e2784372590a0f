"""Damage to the bytes of a valid file: what a bad disk, a bad copy or an attacker does without knowing the format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from hypothesis import strategies as st

_SIZES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_WORDS = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r",
    b"\r\n",
    b"\n",
    b"\x1b[2J",
    b'"',
    b"{",
    b"[",
    b"\\u0000",
)

Damage = Callable[[bytearray, bytes, Random], None]
SEEDS = st.integers(0, 2**64 - 1)


def flip(data: bytearray, _: bytes, random: Random) -> None:
    """One bit."""
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def overwrite(data: bytearray, _: bytes, random: Random) -> None:
    """A number of 1 to 8 bytes, of either byte order, by one that breaks sizes and offsets."""
    width, at = random.choice((1, 2, 4, 8)), random.randrange(len(data))
    number = random.choice(_SIZES) % (1 << 8 * width)
    data[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))


def insert(data: bytearray, _: bytes, random: Random) -> None:
    """Random bytes, or a word that text formats do not expect."""
    at = random.randrange(len(data) + 1)
    data[at:at] = random.choice((random.randbytes(random.randint(1, 40)), random.choice(_WORDS)))


def delete(data: bytearray, _: bytes, random: Random) -> None:
    """A range."""
    at = random.randrange(len(data))
    del data[at : at + random.randint(1, 64)]


def duplicate(data: bytearray, _: bytes, random: Random) -> None:
    """A range, put again somewhere."""
    start, at = random.randrange(len(data)), random.randrange(len(data))
    data[at:at] = data[start : start + random.randint(1, 512)]


def splice(data: bytearray, other: bytes, random: Random) -> None:
    """The head of one file before the tail of another."""
    at = random.randrange(len(data))
    data[at:] = other[random.choice((at, random.randrange(len(other) + 1))) :]


def truncate(data: bytearray, _: bytes, random: Random) -> None:
    """The tail is gone."""
    del data[random.randrange(len(data)) :]


def zero(data: bytearray, _: bytes, random: Random) -> None:
    """A range that was never written."""
    start = random.randrange(len(data))
    stop = min(start + random.choice((8, 64, 512, 4096)), len(data))
    data[start:stop] = bytes(stop - start)


DAMAGES: tuple[Damage, ...] = (flip, overwrite, insert, delete, duplicate, splice, truncate, zero)
IN_PLACE: tuple[Damage, ...] = (flip, flip, overwrite, zero)  # offsets elsewhere in the file stay right


def one_of_files(files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of several contents; hypothesis, which writes out its strategies, sees their numbers alone."""
    return st.integers(0, len(files) - 1).map(lambda place: files[place])


def damaged(files: Sequence[bytes], damages: Sequence[Damage] = DAMAGES) -> st.SearchStrategy[bytes]:
    """One of several files after one to four damages."""

    def damage(data: bytes, other: bytes, chosen: Sequence[Damage], seed: int) -> bytes:
        changed, random = bytearray(data), Random(seed)
        for one in chosen:
            if changed:
                one(changed, other, random)
        return bytes(changed)

    some = st.lists(st.sampled_from(list(damages)), min_size=1, max_size=4)
    return st.builds(damage, one_of_files(files), one_of_files(files), some, SEEDS)
