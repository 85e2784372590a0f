"""What one batch leaves at one site, and what takes it as the backward pass produces it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qkov_dist.layout.heads import Site


@dataclass(frozen=True)
class Factors:
    """What one batch leaves at one site: X [tokens, in] and D [tokens, out] of the kept tokens, sample after sample.

    ``x_site`` is the first site of the layer that was handed this very input: q, k and v share one X.
    """

    site: Site
    x_site: Site
    x: Tensor
    d: Tensor


class FactorSink(Protocol):
    """Where factors go as the backward pass produces them."""

    def add(self, factors: Factors) -> None:
        """Take one site's factors of the current batch."""


class Nowhere:
    """Takes the factors of a pass that is made for something else."""

    def add(self, factors: Factors) -> None:
        """Drop them."""


class DeferredSink:
    """Keeps a batch's factors until the whole backward pass proved finite, or their turn has come."""

    def __init__(self) -> None:
        self._waiting: list[Factors] = []

    def add(self, factors: Factors) -> None:
        """Keep them."""
        self._waiting.append(factors)

    def release(self, sink: FactorSink) -> None:
        """Hand all of them on."""
        for factors in self._waiting:
            sink.add(factors)
