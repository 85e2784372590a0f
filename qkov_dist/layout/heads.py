"""What a layout is: (layer, block, head) -> rectangles of a parameter, as frozen dataclasses of integers.

Weights are seen as [out, in]. A Q, K or V head is a band of rows of its projection; an O head is a band of columns of
the output projection. K and V heads are counted at native resolution, ``num_kv_heads``: query head h reads kv head
h // group. ``resolve`` finds these; everything downstream reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from qkov_dist.errors import QkovError

from .rects import Rect

BLOCKS = ("Q", "K", "V", "O")


@dataclass(frozen=True)
class HeadSlice:
    """One head's rectangle; ``head`` counts query heads for Q and O, kv heads for K and V."""

    block: str
    head: int
    rect: Rect


@dataclass(frozen=True)
class Projection:
    """One linear map X -> Y and the heads in it.

    Args:
        module: Path in ``model.named_modules()`` of the linear itself, inside any LoRA wrapper.
        shape: Logical (out, in), whatever the storage.
        transposed: Whether the weight is stored [in, out].
        has_bias: Whether the linear has a bias.
        slices: The heads. Rows that belong to no block have none; a head may own several rectangles of a block.
        order: The rule in words, such as ``"H*q K*k K*v"`` or ``"cols H*v"``.
    """

    module: str
    shape: tuple[int, int]
    transposed: bool
    has_bias: bool
    slices: tuple[HeadSlice, ...]
    order: str

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks with a head here, in the order Q, K, V, O."""
        found = {piece.block for piece in self.slices}
        return tuple(block for block in BLOCKS if block in found)

    def whole(self, bias: bool = False) -> Rect:
        """All of its weight, or of its bias."""
        return Rect.of_shape(self.shape[0], 1 if bias else self.shape[1])

    def stored(self, rect: Rect) -> Rect:
        """Where a rectangle of its weight lies in storage; of a rectangle in storage, where it lies in the weight."""
        return rect.transposed if self.transposed else rect


@dataclass(frozen=True)
class AttentionLayer:
    """The softmax attention of one decoder layer. ``index`` counts decoder layers, those without attention too."""

    index: int
    module: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    projections: tuple[Projection, ...]
    notes: tuple[str, ...]

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that this layer has."""
        return tuple(b for b in BLOCKS if any(b in p.blocks for p in self.projections))

    @property
    def output(self) -> Projection:
        """The O projection."""
        return next(p for p in self.projections if "O" in p.blocks)

    def heads(self, block: str) -> tuple[int, ...]:
        """The native heads of a block, sorted; empty where the layer lacks it."""
        return tuple(sorted({s.head for p in self.projections for s in p.slices if s.block == block}))

    def query_heads(self, block: str, head: int) -> range:
        """The query heads that a native head serves."""
        return range(head * self.group, (head + 1) * self.group) if block in ("K", "V") else range(head, head + 1)


@dataclass(frozen=True)
class OtherLayer:
    """A decoder layer without softmax attention; ``kind`` is the class of its mixer."""

    index: int
    module: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Layout:
    """Every head of a model. ``proved`` is False until ``proof`` has seen each slice respond."""

    model_type: str
    family: str
    num_layers: int
    layers: tuple[AttentionLayer, ...]
    others: tuple[OtherLayer, ...]
    proved: bool = False

    @property
    def num_heads(self) -> int:
        """Most query heads of any layer."""
        return max(layer.num_heads for layer in self.layers)

    @property
    def num_kv_heads(self) -> int:
        """Most kv heads of any layer."""
        return max(layer.num_kv_heads for layer in self.layers)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that some layer has."""
        return tuple(b for b in BLOCKS if any(b in layer.blocks for layer in self.layers))

    def distinct_layers(self) -> tuple[int, ...]:
        """The first layer of each kind: layers of one kind have the same counts, dims, projections and notes."""
        kinds: dict[tuple[object, ...], int] = {}
        for layer in self.layers:
            shapes = tuple((p.shape, p.transposed, p.has_bias, p.order) for p in layer.projections)
            counts = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim)
            kinds.setdefault((*counts, shapes, layer.notes), layer.index)
        return tuple(kinds.values())

    def layer(self, index: int) -> AttentionLayer:
        """The attention layer with this layer number.

        Raises:
            QkovError: where that layer has no softmax attention, or there is none.
        """
        for layer in self.layers:
            if layer.index == index:
                return layer
        other = next((o.kind for o in self.others if o.index == index), "no such layer")
        raise QkovError(
            f"layer {index}",
            expected=f"one of {[layer.index for layer in self.layers]}",
            got=other,
            remedy="Choose layers that have softmax attention.",
        )


def layout_table(layout: Layout) -> list[dict[str, str]]:
    """One row a (layer, projection, block), for printing: every head, where it is, and by which rule."""
    table = []
    for layer in layout.layers:
        for projection in layer.projections:
            for block in projection.blocks:
                heads = {piece.head for piece in projection.slices if piece.block == block}
                table.append(
                    {
                        "layer": str(layer.index),
                        "block": block,
                        "heads": str(len(heads)),
                        "parameter": f"{projection.module}.weight",
                        "shape": f"[{projection.shape[0]}, {projection.shape[1]}]",
                        "slice rule": projection.order,
                        "bias": "yes" if projection.has_bias else "no",
                    }
                )
    return table


@dataclass(frozen=True, order=True)
class Site:
    """A projection whose factors are captured: its layer and its module path."""

    layer: int
    module: str


def layout_notes(layout: Layout) -> list[str]:
    """What no score of this layout covers, one sentence each."""
    notes = [f"layer {other.index} ({other.kind}) is not scored: {other.reason}" for other in layout.others]
    for text in dict.fromkeys(note for layer in layout.layers for note in layer.notes):
        where = [layer.index for layer in layout.layers if text in layer.notes]
        notes.append(text if len(where) == len(layout.layers) else f"layers {where}: {text}")
    return notes
