"""The metric on a GPU in two passes over a tile's gradients, in Triton's language; ``pair_kernel`` calls it.

    put_squares     what each task adds to the Fisher, from gradients read once
    put_products    maps of gradients, formed where they are multiplied into the scores of all pairs

Importing this needs Triton, which torch brings along for NVIDIA GPUs on Linux. Names in capitals are constants that a
kernel is compiled for. Only what is built into the language is used, so that its interpreter can be had for one module.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

GRADIENT, MAGNITUDE = tl.constexpr(0), tl.constexpr(1)  # maps by ``score_kinds.MAP_NUMBERS``; else the square
HALF_ULP, KEPT_BITS = tl.constexpr(0x1000), tl.constexpr(-0x2000)  # of TF32, in the bits of a float32


@triton.jit
def put_squares(gradients, weights, by_task, num, tasks, size, row, TASKS: tl.constexpr, COLS: tl.constexpr):
    """Sum w g^2 over the samples, for some TASKS, in COLS columns: by_task [tasks, size].

    Gradients [num, size] are ``row`` apart; weights [tasks, num].
    """
    columns = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    task = tl.program_id(1) * TASKS + tl.arange(0, TASKS)
    inside, known = columns < size, task < tasks
    sums = tl.full((TASKS, COLS), 0.0, tl.float32)
    of_sample, counted = gradients + columns, weights + task * num
    for _ in range(num):
        g, weight = tl.load(of_sample, mask=inside, other=0.0), tl.load(counted, mask=known, other=0.0)
        sums += weight[:, None] * (g * g)[None, :]
        of_sample += row
        counted += 1
    place = by_task + task[:, None].to(tl.int64) * size + columns[None, :]
    tl.store(place, sums, mask=known[:, None] & inside[None, :])


@triton.jit
def mapped(g, MAP: tl.constexpr):
    """A map of gradients."""
    if MAP == GRADIENT:
        return g
    elif MAP == MAGNITUDE:  # noqa: RET505 (Triton decides on it as it compiles)
        return tl.abs(g)
    else:
        return g * g


@triton.jit
def rounded(values, TF32: tl.constexpr):
    """Values rounded to the nearest TF32, where products are of these: some hardware cuts digits off, all one way."""
    if TF32:
        bits = (values.to(tl.int32, bitcast=True) + HALF_ULP) & KEPT_BITS
        return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)  # noqa: PLR0124 (what is no number)
    else:  # noqa: RET505 (Triton decides on it as it compiles)
        return values


@triton.jit
def put_products(
    gradients,
    factors,
    products,
    left,
    num_left,
    right,
    num_right,
    size,
    of_part,
    row,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of a block of pairs over a part of a head's elements: products [heads, parts, num_left, num_right].

    Gradients [N, heads * size] are ``row`` apart; samples of the left begin at ``left``. The left map is multiplied by
    factors [heads * size], of SYMMETRIC scores the right one, too. With HALF blocks below the diagonal are left as they
    are.
    """
    blocks = (num_right + BLOCK - 1) // BLOCK
    block_i, block_j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    part, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if HALF and block_j < block_i:
        return
    i, j = block_i * BLOCK + tl.arange(0, BLOCK), block_j * BLOCK + tl.arange(0, BLOCK)
    of_i = gradients + (left + i)[:, None].to(tl.int64) * row + head * size
    of_j = gradients + (right + j)[:, None].to(tl.int64) * row + head * size
    end = tl.minimum((part + 1) * of_part, size)
    sums = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(part * of_part, end, STEP):
        element = start + tl.arange(0, STEP)
        there = element < end
        g = tl.load(of_i + element[None, :], mask=(i < num_left)[:, None] & there[None, :], other=0.0)
        h = tl.load(of_j + element[None, :], mask=(j < num_right)[:, None] & there[None, :], other=0.0)
        factor = tl.load(factors + head * size + element, mask=there, other=0.0)
        one, other = mapped(g, LEFT) * factor[None, :], mapped(h, RIGHT)
        if SYMMETRIC:
            other = other * factor[None, :]
        one, other = rounded(one, PRECISION == "tf32"), rounded(other, PRECISION == "tf32")
        sums = tl.dot(one, tl.trans(other), sums, input_precision=PRECISION)
    place = products + (head * tl.num_programs(1) + part) * num_left * num_right
    here = (i < num_left)[:, None] & (j < num_right)[None, :]
    tl.store(place + i[:, None] * num_right + j[None, :], sums, mask=here)
