"""What a heatmap shows of one block: averages, scores by query head, top conflicts.

K and V heads are stored, summed and tested at native resolution, one per kv head. A query-head view repeats kv head
q // group for each query head q, so that the four blocks have one shape; sums and tests over such repeats would count
a head several times, so none is made from a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qkov_dist.errors import QkovError

from .conflicts import excess, spread, strongest_heads

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


HEAD_DIM = {"Q": "head", "K": "kv_head", "V": "kv_head", "O": "head"}
NUM_CONFLICTS = 20


class UnknownEntryError(QkovError, KeyError):
    """A name that a mapping does not have: a QkovError that ``get`` and ``in`` understand."""

    __str__ = ValueError.__str__


@dataclass(frozen=True, eq=False)
class BlockView(Mapping[str, Any]):
    """One block of a heatmap, as ``heatmap["Q"]``.

    Its entries are ``scores`` [n_a, n_b, layers, heads] and ``layer_head_avg`` [layers, heads] (float64) by query head,
    ``native_avg`` [layers, native heads] (float64), and ``top_conflicts``. Absent heads are NaN. Without stored pairs
    (``output.pairs: none``) there are only the averages.

    Args:
        block: Q, K, V or O.
        layers: Model layer numbers.
        heads: Query head numbers.
        natives: Native head numbers: ``heads`` for Q and O, kv heads for K and V.
        groups: Query heads of one kv head, [layer].
        native_avg: Mean score over pairs, float64 [layer, native head].
        cross: Scores [layer, native head, n_a, n_b], or None.
        ids_a: Ids of A's samples.
        ids_b: Ids of B's samples.
        p_values: Of each head by the statistic that decides, [layer, native head], or None before a test.
        conflict_is_low: Whether conflict means a low score, as where scores may be negative.
        different: Which pairs are of different samples, bool [n_a, n_b]; others are no conflict. None: all.
    """

    block: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    natives: tuple[int, ...]
    groups: Ints
    native_avg: Floats
    cross: Floats | None
    ids_a: tuple[str, ...]
    ids_b: tuple[str, ...]
    p_values: Floats | None = None
    conflict_is_low: bool = False
    different: npt.NDArray[np.bool_] | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in tuple(self):
            raise self._unknown(name)
        match name:
            case "scores":
                return np.moveaxis(self.by_query_head(self._pairs()), (2, 3), (0, 1))
            case "layer_head_avg":
                return self.by_query_head(self.native_avg)
            case "native_avg":
                return self.native_avg
            case _:
                return self.top_conflicts()

    def __iter__(self) -> Iterator[str]:
        pairs = () if self.cross is None else ("scores", "top_conflicts")
        return iter(("layer_head_avg", "native_avg", *pairs))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"BlockView({self.block!r}: {len(self.layers)} layers, {len(self.natives)} native heads)"

    def by_query_head(self, values: Floats) -> Floats:
        """Values [layer, native head, ...] -> [layer, query head, ...]; kv heads are repeated, absent ones are NaN."""
        if HEAD_DIM[self.block] == "head":
            return values
        wanted = np.asarray(self.heads)[None, :] // np.asarray(self.groups)[:, None]
        order = np.argsort(self.natives)
        place = np.searchsorted(self.natives, wanted, sorter=order).clip(max=len(self.natives) - 1)
        place = order[place]
        repeated: Floats = values[np.arange(len(self.layers))[:, None], place]
        repeated[np.asarray(self.natives)[place] != wanted] = np.nan
        return repeated

    def top_conflicts(self, count: int = NUM_CONFLICTS) -> list[dict[str, Any]]:
        """The strongest (sample pair, layer, native head), strongest first; equal scores in index order.

        Each is a dict of sample_i, sample_j (positions in A and B), id_a, id_b, layer, head, score, excess (the score
        over what the scales of both samples explain, ``conflicts``) and p_value (of the head by the statistic that
        decides, None before a test). For K and V ``head`` is the kv head, repeated as
        ``kv_head``: a kv head is listed once, not once for each of its query heads.
        """
        pairs = self._pairs()
        sign = -1 if self.conflict_is_low else 1
        found = [
            (-sign * float(layer_scores.flat[place]), layer, int(place))
            for layer, layer_scores in enumerate(pairs)
            for place in _largest(sign * self.of_different(layer_scores).ravel(), count)
        ]
        return [self._conflict(layer, place) for _, layer, place in sorted(found)[: max(count, 0)]]

    def top_excesses(self, count: int = NUM_CONFLICTS) -> list[dict[str, Any]]:
        """Pairs that score beyond what the scales of both samples explain (``conflicts``), most so first.

        The records are those of ``top_conflicts``; each pair is at the head where it exceeds most, and no sample stands
        in more than a tenth of them, where there are samples enough.
        """
        sign = -1 if self.conflict_is_low else 1
        excesses = (sign * excess(self.of_different(layer)) for layer in self._pairs())
        values, layers, heads = strongest_heads(excesses)  # scores of both signs rank by -score: lowest is first
        places = [(int(layers[pair]), (int(heads[pair]), *pair)) for pair in spread(values, count)]
        shape = self._pairs().shape[1:]
        return [self._conflict(layer, int(np.ravel_multi_index(place, shape))) for layer, place in places]

    def of_different(self, scores: Floats) -> Floats:
        """Scores [..., n_a, n_b], NaN for a sample and its copy."""
        if self.different is None or self.different.all():
            return scores
        kept: Floats = np.where(self.different, scores, np.array(np.nan, scores.dtype))
        return kept

    def _conflict(self, layer: int, place: int) -> dict[str, Any]:
        pairs = self._pairs()
        head, i, j = (int(index) for index in np.unravel_index(place, pairs.shape[1:]))
        number = self.natives[head]
        return {
            "sample_i": i,
            "sample_j": j,
            "id_a": self.ids_a[i],
            "id_b": self.ids_b[j],
            "layer": self.layers[layer],
            "head": number,
            **({"kv_head": number} if HEAD_DIM[self.block] == "kv_head" else {}),
            "score": float(pairs[layer, head, i, j]),
            "excess": float(excess(self.of_different(pairs[layer, head]))[i, j]),
            "p_value": None if self.p_values is None else float(self.p_values[layer, head]),
        }

    def _pairs(self) -> Floats:
        if self.cross is None:
            raise self._unknown("scores")
        return self.cross

    def _unknown(self, name: str) -> UnknownEntryError:
        if name in ("scores", "top_conflicts"):
            remedy = "Run with output.pairs: cross (or all), which keeps the scores of every pair."
            return UnknownEntryError(f"heatmap[{self.block!r}]", expected="stored pairs", got="averages", remedy=remedy)
        remedy = "Use one of these names."
        expected = f"one of {', '.join(self)}"
        return UnknownEntryError(f"heatmap[{self.block!r}]", expected=expected, got=repr(name), remedy=remedy)


def _largest(values: Floats, count: int) -> Ints:
    """Places of the ``count`` largest numbers, in index order; among equals the first ones, NaN never."""
    places = np.flatnonzero(~np.isnan(values))
    if count <= 0 or len(places) <= count:
        return places[: max(count, 0)]
    kept = values[places]
    least = np.partition(kept, len(kept) - count)[len(kept) - count]
    above = places[kept > least]
    return np.sort(np.concatenate([above, places[kept == least][: count - len(above)]]))


def missing_extra(where: str, package: str) -> QkovError:
    """The error for an optional package that is not installed."""
    remedy = "Run: pip install 'qkov-dist[report]'"
    return QkovError(where, expected=f"{package} to be installed", got="no such module", remedy=remedy)
