"""What fails on one rank fails on all of them, alike, so that none waits for another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from qkov_dist.errors import QkovError, is_broken_call

from .failures import failed, in_full
from .world import World

T = TypeVar("T")


class SharedError(QkovError):
    """An error that every rank raises, so that none of them waits for another."""


def together(world: World, step: Callable[[], T], names: Sequence[int] | None = None) -> T:
    """Take a step on every rank, in which none needs another; where it fails on one, all of them raise an error.

    Args:
        world: The ranks.
        step: What each of them does.
        names: What they are called; by default their places in this world.

    Raises:
        QkovError: that of the first rank that failed; it names the rank unless all failed alike.
        Exception: on a rank that failed by a mistake, its own error; the others are told of it.
    """
    if world.size == 1:
        return step()
    done: list[T] = []
    mistake, parts = None, None
    try:
        done.append(step())
    except SharedError:
        raise  # all ranks raise it
    except QkovError as error:
        parts = error.parts
    except Exception as error:
        if isinstance(error, RuntimeError) and is_broken_call(error):
            raise  # there is a call in it after all, and another rank is gone
        mistake, parts = error, failed(_name(world.rank, names), in_full(error)).parts
    everyone = world.gather(parts)
    if mistake is not None:
        raise mistake
    raise_first(everyone, names)
    return done[0]


def raise_first(by_rank: Sequence[Mapping[str, str] | None], names: Sequence[int] | None = None) -> None:
    """Raise the first error of any rank, as all ranks that know them do; it names the rank unless all failed alike.

    Args:
        by_rank: ``parts`` of each rank's error, None where there was none.
        names: What the ranks are called; by default their places in the list.

    Raises:
        SharedError: where there is one.
    """
    for place, parts in enumerate(by_rank):
        if parts:
            rank = f"rank {_name(place, names)}"
            known = parts["where"].startswith(rank) or all(other == parts for other in by_rank)
            raise SharedError(**{**parts, "where": parts["where"] if known else f"{rank}: {parts['where']}"})


def _name(place: int, names: Sequence[int] | None) -> int:
    return place if names is None else names[place]


def same_on_all(world: World, what: str, value: Mapping[str, Any]) -> None:
    """Raise on every rank unless all were started with the same value; names the first rank and key that differ."""
    everyone = world.gather(value)
    for rank, other in enumerate(everyone):
        for key in sorted({*everyone[0], *other}):
            if everyone[0].get(key) != other.get(key):
                raise SharedError(
                    f"rank {rank}: {what}: {key}",
                    expected=f"what rank 0 has, {everyone[0].get(key)!r}",
                    got=repr(other.get(key)),
                    remedy="Start all ranks with the same command, configuration and files.",
                )
