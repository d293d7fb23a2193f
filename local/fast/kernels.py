"""Triton kernels for what lies between the products of a block with gLN or cLN; gpu.py calls them.

A GPU waits for its memory here, so what counts is how often a kernel reads or writes an (M, K, H)
tensor. Each takes along whatever needs the tensors that it has at hand:

- `measure` finds the moments of the first norm;
- `transform` applies PReLU, norm and taps, and finds the moments of the norm that follows;
- `differentiate` goes back through PReLU, norm and taps.

A program takes ROWS x CHANNELS values of an item in each of STEPS steps. Its sums are kept apart,
to be added afterwards in one order, so that every run gives the same bits.

BY_ROW: whether the norm averages over a row (cLN), all of which is then in CHANNELS, or over an
item (gLN). P is the number of taps; they are stored as (H, P). Other letters are those of
local.tasnet.
"""

import triton
import triton.language as tl

COUNTS = ["frames", "dilation", "padding", "parts_per_item"]  # no code of its own for every value


@triton.jit
def _prelu(values, slope):
    return tl.where(values > 0, values, values * slope)


@triton.jit
def _load_channels(values, channels, H: tl.constexpr):
    """(1, CHANNELS) of a parameter."""
    return tl.load(values + channels, mask=channels < H, other=0.0)[None, :]


@triton.jit
def _load_taps(taps, p: tl.constexpr, channels, H: tl.constexpr, P: tl.constexpr):
    """(1, CHANNELS) of tap p, or 1 without taps."""
    if taps is None:
        return 1.0
    else:  # or the compiler would go on to the next line
        return tl.load(taps + channels * P + p, mask=channels < H, other=0.0)[None, :]


@triton.jit
def _load_rows(values, rows, channels, frames, H: tl.constexpr):
    """(ROWS, CHANNELS) of an item in float32, with zeros outside."""
    inside = ((rows >= 0) & (rows < frames))[:, None] & (channels < H)[None, :]
    offsets = rows.to(tl.int64)[:, None] * H + channels[None, :]
    return tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(values, found, rows, channels, frames, H: tl.constexpr):
    inside = (rows < frames)[:, None] & (channels < H)[None, :]
    offsets = rows.to(tl.int64)[:, None] * H + channels[None, :]
    tl.store(values + offsets, found, mask=inside)


@triton.jit
def _load_moments(mean, scale, rows, frames, BY_ROW: tl.constexpr):
    """Scale and offset that normalise: (ROWS, 1), with zeros outside of the item, or the item's."""
    if BY_ROW:
        inside = (rows >= 0) & (rows < frames)
        mean = tl.load(mean + rows, mask=inside, other=0.0)[:, None]
        scale = tl.load(scale + rows, mask=inside, other=0.0)[:, None]
    return scale, -mean * scale


# Moments


@triton.jit
def _observe(active, step, rows, frames, mean, squares):
    """Adds the values of a step to the mean and the squared deviations of each place in a tile.

    After B. P. Welford, "Note on a method for calculating corrected sums of squares and products",
    1962: sums of the squares themselves would cancel.
    """
    weight = tl.where(rows < frames, 1.0 / (step + 1), 0.0)[:, None]
    deviation = active - mean
    return mean + deviation * weight, squares + deviation * (deviation * (weight * step))


@triton.jit
def _store_part(
    parts, first, channels, frames, mean, squares, H: tl.constexpr, STEPS: tl.constexpr
):
    """Joins the places of a tile, and stores count, mean and squared deviations of the program."""
    ROWS: tl.constexpr = mean.shape[0]
    steps = tl.minimum(tl.maximum((frames - first + ROWS - 1) // ROWS, 0), STEPS)
    counts = tl.where((channels < H)[None, :], steps[:, None], 0).to(tl.float32)
    count = tl.sum(counts)
    joint_mean = tl.sum(counts * mean) / count
    deviation = mean - joint_mean
    joint_squares = tl.sum(tl.where(counts > 0, squares + counts * deviation * deviation, 0.0))
    part = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    parts += (part * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(parts, count)
    tl.store(parts + 1, joint_mean)
    tl.store(parts + 2, joint_squares)


@triton.jit(do_not_specialize=COUNTS)
def combine(parts, mean, scale, parts_per_item, EPS: tl.constexpr, SIZE: tl.constexpr):
    """The moments of an item from the parts of its programs.

    After T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979.
    """
    item = tl.program_id(0)
    parts += item * parts_per_item * 3
    count = tl.zeros((SIZE,), tl.float64)
    total = count
    for first in range(0, parts_per_item, SIZE):
        part = first + tl.arange(0, SIZE)
        at, inside = parts + part * 3, part < parts_per_item
        number = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        count, total = count + number, total + number * tl.load(at + 1, mask=inside, other=0.0)
    joint_count, squares = tl.sum(count), tl.zeros((SIZE,), tl.float64)
    joint_mean = tl.sum(total) / joint_count
    for first in range(0, parts_per_item, SIZE):
        part = first + tl.arange(0, SIZE)
        at, inside = parts + part * 3, part < parts_per_item
        number = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        deviation = tl.load(at + 1, mask=inside, other=0.0) - joint_mean
        squares += tl.load(at + 2, mask=inside, other=0.0) + number * deviation * deviation
    tl.store(mean + item, joint_mean)
    tl.store(scale + item, tl.rsqrt(tl.sum(squares) / joint_count + EPS))


@triton.jit
def _store_row_moments(
    active, mean, scale, rows, channels, frames, H: tl.constexpr, EPS: tl.constexpr
):
    row_mean = tl.sum(active, axis=1) / H
    deviation = tl.where((channels < H)[None, :], active - row_mean[:, None], 0.0)
    variance = tl.sum(deviation * deviation, axis=1) / H
    tl.store(mean + rows, row_mean, mask=rows < frames)
    tl.store(scale + rows, tl.rsqrt(variance + EPS), mask=rows < frames)


@triton.jit(do_not_specialize=COUNTS)
def measure(
    source, slope, mean, scale, parts, frames,
    H: tl.constexpr, EPS: tl.constexpr, BY_ROW: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The moments of prelu(source): those of the rows, or parts of those of the items."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * (ROWS * STEPS) + tl.arange(0, ROWS)
    start = tl.program_id(2).to(tl.int64) * frames
    slope = tl.load(slope)
    average = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = average
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS
        active = _prelu(_load_rows(source + start * H, rows, channels, frames, H), slope)
        if BY_ROW:
            _store_row_moments(active, mean + start, scale + start, rows, channels, frames, H, EPS)
        else:
            average, squares = _observe(active, step, rows, frames, average, squares)
    if not BY_ROW:
        _store_part(parts, first, channels, frames, average, squares, H, STEPS)


# PReLU, norm and taps


@triton.jit(do_not_specialize=COUNTS)
def transform(
    source, slope, gamma, beta, mean, scale, taps, out,
    next_slope, next_mean, next_scale, parts, frames, dilation, padding,
    H: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr, BY_ROW: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = depthwise(norm(prelu(source))), or norm(prelu(source)) without taps.

    Where next_slope is given, it also does with `out` what `measure` does.
    """
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * (ROWS * STEPS) + tl.arange(0, ROWS)
    start = tl.program_id(2).to(tl.int64) * frames
    slope = tl.load(slope)
    gamma, beta = _load_channels(gamma, channels, H), _load_channels(beta, channels, H)
    if BY_ROW:
        mean, scale = mean + start, scale + start
    else:  # the norm is one line for all rows
        mean, scale = tl.load(mean + tl.program_id(2)), tl.load(scale + tl.program_id(2))
        gamma = gamma * scale
        beta = beta - gamma * mean
    gains, shifts = (), ()
    for p in tl.static_range(P):
        tap = _load_taps(taps, p, channels, H, P)
        gains, shifts = gains + (tap * gamma,), shifts + (tap * beta,)
    if next_slope is not None:
        next_slope = tl.load(next_slope)
    average = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = average
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS
        found = tl.zeros((ROWS, CHANNELS), tl.float32)
        for p in tl.static_range(P):
            read = rows + (p * dilation - padding)
            active = _prelu(_load_rows(source + start * H, read, channels, frames, H), slope)
            if BY_ROW:
                row_scale, row_offset = _load_moments(mean, scale, read, frames, BY_ROW)
                active = active * row_scale + row_offset
            found += active * gains[p]
            found += ((read >= 0) & (read < frames)).to(tl.float32)[:, None] * shifts[p]
        rounded = found.to(out.dtype.element_ty)
        _store_rows(out + start * H, rounded, rows, channels, frames, H)
        if next_slope is not None:
            active = _prelu(rounded.to(tl.float32), next_slope)
            if BY_ROW:
                _store_row_moments(
                    active, next_mean + start, next_scale + start, rows, channels, frames, H, EPS
                )
            else:
                average, squares = _observe(active, step, rows, frames, average, squares)
    if next_slope is not None and not BY_ROW:
        _store_part(parts, first, channels, frames, average, squares, H, STEPS)


@triton.jit(do_not_specialize=COUNTS)
def differentiate(
    grad, source, slope, gamma, mean, scale, taps, averages, out, sums, slope_sums,
    frames, dilation, padding,
    H: tl.constexpr, P: tl.constexpr, BY_ROW: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of `transform`, from that of its output.

    Args:
        averages: (M, 2), over an item: of the gradient of the norm's output times gamma, and of
            that times the normalised values. Not needed BY_ROW.
        out: the gradient of source, or None to leave it.
        sums: a program's sums (2, P, H) for every p of the gradient, as shifted by tap p, and of
            that times the normalised values; or None to leave them.
        slope_sums: a program's share of the gradient of the slope; with `out`.
    """
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    first = tl.program_id(1) * (ROWS * STEPS) + tl.arange(0, ROWS)
    start = tl.program_id(2).to(tl.int64) * frames
    slope, gamma = tl.load(slope), _load_channels(gamma, channels, H)
    zeros = tl.zeros((ROWS, CHANNELS), tl.float32)
    slope_sum = zeros
    gains, totals, products = (), (), ()
    for p in tl.static_range(P):
        gains += (_load_taps(taps, p, channels, H, P) * gamma,)
        totals, products = totals + (zeros,), products + (zeros,)
    if BY_ROW:
        mean, scale = mean + start, scale + start
    else:
        mean, scale = tl.load(mean + tl.program_id(2)), tl.load(scale + tl.program_id(2))
        if out is not None:
            mean_grad = tl.load(averages + tl.program_id(2) * 2)
            mean_product = tl.load(averages + tl.program_id(2) * 2 + 1)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * ROWS
        values = _load_rows(source + start * H, rows, channels, frames, H)
        row_scale, row_offset = _load_moments(mean, scale, rows, frames, BY_ROW)
        normed = _prelu(values, slope) * row_scale + row_offset
        found, new_totals, new_products = zeros, (), ()
        for p in tl.static_range(P):
            read = tl.where(rows < frames, rows - (p * dilation - padding), -1)
            given = _load_rows(grad + start * H, read, channels, frames, H)
            found += given * gains[p]
            if sums is not None:
                new_totals += (totals[p] + given,)
                new_products += (products[p] + given * normed,)
        if sums is not None:
            totals, products = new_totals, new_products
        if out is not None:
            if BY_ROW:
                mean_grad = (tl.sum(found, axis=1) / H)[:, None]
                mean_product = (tl.sum(found * normed, axis=1) / H)[:, None]
            found = found * row_scale - mean_grad * row_scale
            found -= normed * (mean_product * row_scale)
            slope_sum += found * tl.minimum(values, 0.0)
            found = tl.where(values > 0, found, found * slope)
            _store_rows(out + start * H, found.to(out.dtype.element_ty), rows, channels, frames, H)
    if sums is not None:
        sums += tile.to(tl.int64) * (2 * P * H) + channels
        for p in tl.static_range(P):
            tl.store(sums + p * H, tl.sum(totals[p], axis=0), mask=channels < H)
            tl.store(sums + (P + p) * H, tl.sum(products[p], axis=0), mask=channels < H)
    if out is not None:
        program = tile * tl.num_programs(0) + tl.program_id(0)
        tl.store(slope_sums + program, tl.sum(slope_sum))


@triton.jit
def add(residual, update, out, copy, size, SIZE: tl.constexpr):
    """out = residual + update in float32, and the same in the type of `copy`."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    found = tl.load(residual + at, mask=at < size) + tl.load(update + at, mask=at < size)
    tl.store(out + at, found, mask=at < size)
    tl.store(copy + at, found.to(copy.dtype.element_ty), mask=at < size)
