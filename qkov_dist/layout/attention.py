"""One attention module -> its heads, by laying the family's orders over the shapes of its projections.

Head dims are read from the module; the number of query heads is O's columns over the V head dim; the number of kv heads
is the only one with which every row order tiles its projection exactly. Each is checked against what the module or the
config states, and a disagreement is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from qkov_dist.errors import QkovError

from .families import OUTPUT_MARK, Family, HeadDims
from .heads import AttentionLayer, HeadSlice, Projection
from .modules import (
    base_linear,
    check_own_weight,
    declared_heads,
    declared_kv_heads,
    is_transposed,
    linear_shape,
    read_int,
    submodule,
    unassigned_linears,
)
from .rects import Rect
from .row_order import RowSlice, parse


def attention_layer(index: int, path: str, attention: nn.Module, family: Family, config: Any) -> AttentionLayer:
    """Lay a family's orders over one attention module; ``path`` is where it is, ``index`` its layer number.

    Raises:
        QkovError: where a head dim is not stated, or shapes and counts disagree.
    """
    sizes = _sizes(path, attention, family.dims, config)
    children = {rel: submodule(attention, rel) for rel, _ in family.orders}
    linears = {rel: base_linear(f"{path}.{rel}", child) for rel, child in children.items() if child is not None}
    for place, linear in linears.values():
        check_own_weight(place, linear)
    shapes = {rel: _shape(*linears[rel]) for rel in linears}
    output, columns = family.output
    num_heads = _num_heads(path, shapes[output][1], sizes["v"], declared_heads(attention, config))
    inputs = [(rel, order) for rel, order in family.inputs if rel in linears]
    fitting = _fitting_kv_heads([(order, shapes[rel][0]) for rel, order in inputs], num_heads, sizes)
    declared = declared_kv_heads(attention, config, num_heads)
    num_kv_heads = _num_kv_heads(path, fitting, declared, {rel: shapes[rel] for rel, _ in inputs}, sizes)

    projections = []
    for rel, order in (*inputs, (output, columns)):
        pieces = parse(order).layout(num_heads, num_kv_heads, sizes)
        is_output = rel == output
        rule = OUTPUT_MARK + order if is_output else order
        projections.append(_projection(*linears[rel], rule, _slices(pieces, shapes[rel], is_output)))
    blocks = {block for projection in projections for block in projection.blocks}
    unassigned = unassigned_linears(attention, linears)
    in_no_block = (f"in no block of Q, K, V, O: {', '.join(unassigned)}",) if unassigned else ()
    notes = (*family.notes, *_notes_on_missing(blocks), *in_no_block)
    return AttentionLayer(index, path, num_heads, num_kv_heads, sizes["q"], sizes["v"], tuple(projections), notes)


def _sizes(path: str, attention: nn.Module, dims: HeadDims, config: Any) -> dict[str, int]:
    """Rows of each atom: head dims as the module states them, or else its config."""

    def read(attribute: str) -> int:
        """One head dim."""
        value = read_int(attention, attribute)
        value = value if value is not None else getattr(config, attribute.rsplit(".", 1)[-1], None)
        if not isinstance(value, int) or value < 1:
            raise QkovError(
                path,
                expected=f"an integer head dim in the attribute {attribute!r} of {type(attention).__name__}",
                got=repr(value),
                remedy="Name the attribute with register_layout(..., head_dim=...). It is never derived.",
            )
        return value

    q = read(dims.q)
    k, v = (read(name) if name else q for name in (dims.k, dims.v))
    return {"q": q, "k": k, "v": v, "gate": v, "_": q}


def _shape(path: str, module: nn.Module) -> tuple[int, int]:
    shape = linear_shape(module)
    if shape is None:
        raise QkovError(
            path,
            expected="a linear with in_features and out_features, or a transformers Conv1D",
            got=type(module).__name__,
            remedy="Register a layout for this model type that names its linears.",
        )
    return shape


def _num_heads(path: str, columns: int, v_head_dim: int, declared: int | None) -> int:
    num_heads, rest = divmod(columns, v_head_dim)
    if rest or (declared is not None and declared != num_heads):
        raise QkovError(
            path,
            expected=f"an output projection of {declared or 'whole'} heads with {v_head_dim} columns each",
            got=f"{columns} columns",
            remedy="Check the model's head counts and head dims, or register a layout for this model type.",
        )
    return num_heads


def _fitting_kv_heads(inputs: list[tuple[str, int]], num_heads: int, sizes: Mapping[str, int]) -> list[int]:
    """The kv head counts with which every row order tiles its projection exactly."""
    return [
        num_kv_heads
        for num_kv_heads in range(1, num_heads + 1)
        if num_heads % num_kv_heads == 0 and _tiles(inputs, num_heads, num_kv_heads, sizes)
    ]


def _tiles(inputs: list[tuple[str, int]], num_heads: int, num_kv_heads: int, sizes: Mapping[str, int]) -> bool:
    seen: Counter[str | None] = Counter()
    for order, num_rows in inputs:
        try:
            pieces = parse(order).layout(num_heads, num_kv_heads, sizes)
        except QkovError:
            return False  # a count of the order does not divide with this many kv heads
        if pieces[-1].stop != num_rows:
            return False
        seen.update(piece.block for piece in pieces)
    return seen["Q"] == num_heads and all(seen[block] in (0, num_kv_heads) for block in ("K", "V"))


def _num_kv_heads(
    path: str, fitting: list[int], declared: int | None, shapes: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]
) -> int:
    if len(fitting) == 1 and declared in (None, fitting[0]):
        return fitting[0]
    if declared is not None and declared in fitting:
        return declared
    raise QkovError(
        path,
        expected=f"row orders that tile the projections {dict(shapes)} with head dims {dict(sizes)}",
        got=f"{fitting or 'no'} fitting kv head counts where the model states {declared}",
        remedy="Check the model's head counts and head dims, or register a layout for this model type.",
    )


def _slices(pieces: Sequence[RowSlice], shape: tuple[int, int], is_output: bool) -> Iterator[HeadSlice]:
    num_rows, num_cols = shape
    for piece in pieces:
        if is_output:
            yield HeadSlice("O", piece.head, Rect(0, num_rows, piece.start, piece.stop))
        elif piece.block is not None:
            yield HeadSlice(piece.block, piece.head, Rect(piece.start, piece.stop, 0, num_cols))


def _projection(path: str, linear: nn.Module, rule: str, slices: Iterator[HeadSlice]) -> Projection:
    shape, has_bias = _shape(path, linear), getattr(linear, "bias", None) is not None
    return Projection(path, shape, is_transposed(linear), has_bias, tuple(slices), rule)


def _notes_on_missing(blocks: set[str]) -> Iterator[str]:
    if "K" not in blocks and "V" not in blocks:
        yield "keys and values come from an earlier layer: there are no K and V blocks"
    elif "V" not in blocks:
        yield "the K projection serves keys and values: there is no V block"
