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


def together(world: World, step: Callable[[], T]) -> T:
    """Take a step on every rank, in which none needs another; where it fails on one, all of them raise an error.

    Args:
        world: The ranks.
        step: What each of them does.

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
        mistake, parts = error, failed(world.names[world.rank], in_full(error)).parts
    everyone = world.all_gather(parts)
    if mistake is not None:
        raise mistake
    raise_first(everyone, world.names)
    return done[0]


def raise_first(by_rank: Sequence[Mapping[str, str] | None], names: Sequence[int]) -> None:
    """Raise the first error of any rank, as all ranks that know them do; it names the rank unless all failed alike.

    Args:
        by_rank: ``parts`` of each rank's error, None where there was none.
        names: What the ranks are called.

    Raises:
        SharedError: where there is one.
    """
    for place, parts in enumerate(by_rank):
        if parts:
            rank = f"rank {names[place]}"
            known = parts["where"].startswith(rank) or all(other == parts for other in by_rank)
            raise SharedError(**{**parts, "where": parts["where"] if known else f"{rank}: {parts['where']}"})


def same_on_all(world: World, what: str, value: Mapping[str, Any]) -> None:
    """Raise on every rank unless all were started with the same value; names the first rank and key that differ."""
    everyone = world.all_gather(value)
    for rank, other in zip(world.names, everyone, strict=True):
        for key in sorted({*everyone[0], *other}):
            if everyone[0].get(key) != other.get(key):
                raise SharedError(
                    f"rank {rank}: {what}: {key}",
                    expected=f"what rank {world.names[0]} has, {everyone[0].get(key)!r}",
                    got=repr(other.get(key)),
                    remedy="Start all ranks with the same command, configuration and files.",
                )
