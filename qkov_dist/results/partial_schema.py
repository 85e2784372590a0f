"""What a partial file holds: whose scores it has, and its layers. Where the files are is ``partials``.

    /partial/{Q,K,V,O}/layer_0003   [heads touched, left, right]   attribute ``heads``; float32 (or float64 on request)
    /fisher/{Q,K,V,O}/layer_0003    [heads touched, columns] float64       ``scoring.fisher_sums``
    /influences/{Q,K,V,O}/layer_0003  [heads touched, optimizer, sums and influences] float64  ``influence_records``
    /own_shares/{Q,K,V,O}/layer_0003  [heads touched, sums] float64        ``scoring.own_shares``, of pooled samples
    /shared/O_bias/layer_0003       [left, right]                  what no head owns
    /layer, /complete               [layer]                        which layers are in this file

left x right is n_A x n_B, or all pooled samples in both (attribute ``pooled``). All of it adds up over ranks, columns
as ``scoring.fisher_sums`` says. A block of which a rank owns nothing in a layer has no dataset there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qkov_dist.config import MOST_TASKS
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.scoring.fisher_sums import FisherSums, num_columns
from qkov_dist.scoring.influence_records import Influences, no_influences
from qkov_dist.scoring.own_share_records import Records, no_shares
from qkov_dist.values import FLAG, as_it_is, whole

from .hdf5_read import Reader, check_values
from .hdf5_write import Writer

_KINDS = {
    "run_id": as_it_is("a short text", lambda value: isinstance(value, str) and len(value) <= 200),
    "world_size": as_it_is("a number of ranks", lambda value: type(value) is int and 0 < value <= 1 << 16),
    "rank": whole(0),
    "n_left": whole(1),
    "n_right": whole(1),
    "pooled": FLAG,
    "num_tasks": as_it_is("a number of tasks", lambda value: type(value) is int and 2 <= value <= MOST_TASKS),
    "extra": as_it_is("a mapping", lambda value: isinstance(value, Mapping)),
}


Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PartialHeader:
    """Whose partial scores these are.

    Args:
        run_id: Hash of the resolved config, model and samples.
        rank: Who wrote them.
        world_size: Of how many.
        n_left: Samples in the role of i.
        n_right: Samples in the role of j.
        layers: Model layer numbers that make the file complete.
        pooled: Whether both roles are all pooled samples.
        extra: What merging needs to know besides (JSON values; one rank's will do). Two headers may differ in it.
        cut: Digest of what each rank owns; empty for one process. Partials of different cuts do not add up.
        num_tasks: Tasks that samples are of; with more than two always pooled.
    """

    run_id: str
    rank: int
    world_size: int
    n_left: int
    n_right: int
    layers: tuple[int, ...]
    pooled: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    cut: str = ""
    num_tasks: int = 2

    @property
    def num_samples(self) -> int:
        """Samples of all tasks."""
        return self.n_left if self.pooled else self.n_left + self.n_right


class BlockPartial(NamedTuple):
    """One block of one layer: heads [h], scores [h, left, right], what is known of I [h, columns], influences, shares.

    Influences are [h, optimizer, sums and N], A's samples first, and what own shares of the Fisher do [h, sums];
    nothing at all where they were left out.
    """

    heads: Ints
    scores: Floats
    fisher_sums: FisherSums
    influences: Influences
    own_shares: Records


class LayerPartial(NamedTuple):
    """One layer: the blocks of which this rank owns something, and what no head owns [left, right]."""

    blocks: dict[str, BlockPartial]
    shared: dict[str, Floats]

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        of_blocks = (array.nbytes for block in self.blocks.values() for array in block)
        return sum(of_blocks) + sum(scores.nbytes for scores in self.shared.values())


def layer_name(layer: int) -> str:
    """What a layer is called in files and folders."""
    return f"layer_{layer:04d}"


def checked_layer(
    layer: int,
    header: PartialHeader,
    blocks: Mapping[str, BlockPartial],
    shared: Mapping[str, Floats],
) -> LayerPartial:
    """One layer's arrays, with the types and shapes that are stored, or a QkovError."""
    return LayerPartial(
        {block: _checked(layer, block, arrays, header) for block, arrays in blocks.items() if len(arrays[0])},
        {name: _checked_shared(layer, name, scores, header) for name, scores in shared.items()},
    )


def write_header(writer: Writer, header: PartialHeader, complete: set[int]) -> None:
    """Write whose scores these are, and which layers are among them."""
    writer.attributes({entry.name: getattr(header, entry.name) for entry in fields(header) if entry.name != "layers"})
    writer.array("layer", np.array(header.layers, np.int64))
    writer.array("complete", np.array([layer in complete for layer in header.layers]))


def read_header(reader: Reader) -> PartialHeader:
    """Read whose scores these are."""
    attributes = reader.attributes()
    names = [entry.name for entry in fields(PartialHeader) if entry.name != "layers"]
    attributes = {"num_tasks": 2, **attributes}  # files of before do not say
    if absent := [name for name in names if name not in attributes]:
        remedy = "This is no partial file: use one that `qkov run` wrote as partial_rankNNNNN.h5."
        raise QkovError("attributes", expected=f"{', '.join(absent)} among them", got="none", remedy=remedy)
    check_values("attribute", attributes, _KINDS)
    layers = tuple(reader.array("layer", kinds="iu").tolist())
    return PartialHeader(layers=layers, **{name: attributes[name] for name in names})


def complete_layers(reader: Reader) -> list[int]:
    """Layers in this file."""
    layers = reader.array("layer", kinds="iu")
    return [int(layer) for layer in layers[reader.array("complete", layers.shape, "b")]]


def check_same(path: Path, expected: PartialHeader, got: PartialHeader) -> None:
    """Raise unless two headers are of one rank of one run."""
    for entry in fields(PartialHeader):
        wanted, found = getattr(expected, entry.name), getattr(got, entry.name)
        if entry.compare and wanted != found:
            remedy = "Nothing was overwritten. Choose another output.dir, or move the old partial files away."
            where, expected_text = f"{path}: {entry.name}", f"{wanted!r}"
            raise QkovError(where, expected=expected_text, got=f"{found!r}", remedy=remedy)


def write_layer(writer: Writer, layer: int, content: LayerPartial) -> None:
    """Write one layer's datasets."""
    name = layer_name(layer)
    for block, arrays in content.blocks.items():
        writer.array(f"partial/{block}/{name}", arrays.scores)
        writer.attributes({"heads": arrays.heads}, f"partial/{block}/{name}")
        writer.array(f"fisher/{block}/{name}", arrays.fisher_sums)
        if arrays.influences.size:
            writer.array(f"influences/{block}/{name}", arrays.influences)
        if arrays.own_shares.size:
            writer.array(f"own_shares/{block}/{name}", arrays.own_shares)
    for parameter, scores in content.shared.items():
        writer.array(f"shared/{parameter}/{name}", scores)


def read_layer(reader: Reader, layer: int, header: PartialHeader) -> LayerPartial:
    """Read one layer's datasets; their shapes must be the header's."""
    name, pairs = layer_name(layer), (header.n_left, header.n_right)
    blocks = {}
    for block in BLOCKS:
        path = f"partial/{block}/{name}"
        if reader.has(path):
            heads = np.asarray(reader.attribute(path, "heads"), np.int64)
            scores = reader.array(path, (*heads.shape, *pairs))
            sums = reader.array(f"fisher/{block}/{name}", (len(heads), num_columns(header.num_tasks)))
            influences = _read_influences(reader, block, name, len(heads), header)
            shares = _read_shares(reader, block, name, len(heads), header)
            blocks[block] = BlockPartial(heads, scores, sums, influences, shares)
    paths = {parameter: f"shared/{parameter}/{name}" for parameter in reader.names("shared")}
    return LayerPartial(blocks, {key: reader.array(path, pairs) for key, path in paths.items() if reader.has(path)})


def _read_influences(reader: Reader, block: str, name: str, num_heads: int, header: PartialHeader) -> Influences:
    path = f"influences/{block}/{name}"
    if not reader.has(path):
        return no_influences(num_heads)
    return reader.array(path, no_influences(num_heads, header.num_samples, header.num_tasks).shape)


def _read_shares(reader: Reader, block: str, name: str, num_heads: int, header: PartialHeader) -> Records:
    path = f"own_shares/{block}/{name}"
    if not reader.has(path):
        return no_shares(num_heads)
    return reader.array(path, no_shares(num_heads, header.num_samples, header.num_tasks).shape)


def copy_layer(reader: Reader, writer: Writer, layer: int) -> None:
    """Copy one layer's datasets from one file, in which they were read before or just written, into another."""
    for kind in ("partial", "fisher", "influences", "own_shares", "shared"):
        for part in reader.names(kind):
            if reader.has(path := f"{kind}/{part}/{layer_name(layer)}"):
                writer.copy(reader, path)


def _checked(layer: int, block: str, arrays: BlockPartial, header: PartialHeader) -> BlockPartial:
    heads, scores, fisher_sums, influences, shares = (np.asarray(array) for array in arrays)
    where = f"layer {layer}, block {block}"
    if block not in BLOCKS or heads.ndim != 1 or len(set(heads.tolist())) != len(heads):
        raise _wrong(where, f"one of {BLOCKS} with different heads", f"heads {heads.tolist()}")
    columns = num_columns(header.num_tasks)
    if fisher_sums.shape != (len(heads), columns):
        raise _wrong(where, f"Fisher sums [{len(heads)}, {columns}]", f"{list(fisher_sums.shape)}")
    every = no_influences(len(heads), header.num_samples, header.num_tasks)
    known = no_influences(len(heads)).shape, every.shape
    if influences.shape not in known:
        raise _wrong(where, f"influences {list(known[1])}", f"{list(influences.shape)}")
    of_shares = no_shares(len(heads)).shape, no_shares(len(heads), header.num_samples, header.num_tasks).shape
    if shares.shape not in of_shares:
        raise _wrong(where, f"own shares {list(of_shares[1])}", f"{list(shares.shape)}")
    scores = _scores(where, arrays.scores, (len(heads), header.n_left, header.n_right))
    others = (array.astype(np.float64) for array in (fisher_sums, influences, shares))
    return BlockPartial(heads.astype(np.int64), scores, *others)


def _checked_shared(layer: int, name: str, scores: Floats, header: PartialHeader) -> Floats:
    if not re.fullmatch(r"\w+", name):
        raise _wrong(f"layer {layer}", "a name of letters, digits and _", repr(name))
    return _scores(f"layer {layer}, {name}", np.asarray(scores), (header.n_left, header.n_right))


def _scores(where: str, scores: Floats, shape: tuple[int, ...]) -> Floats:
    """Scores of a shape, as float32 unless they are float64."""
    if scores.shape != shape:
        raise _wrong(where, f"scores {list(shape)}", f"{list(scores.shape)}")
    return scores if scores.dtype == np.float64 else scores.astype(np.float32, copy=False)


def _wrong(where: str, expected: str, got: str) -> QkovError:
    return QkovError(where, expected=expected, got=got, remedy="Report this: the plan and the scores do not fit.")
