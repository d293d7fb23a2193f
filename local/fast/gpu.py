"""The passes of local/fast/block.py by the kernels of local/fast/kernels.py, for gLN and cLN.

Letters in shapes are those of local.tasnet, and P is the number of taps.
"""

from __future__ import annotations  # an edited local/tasnet.py need not have these classes

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from local import tasnet
from local.fast import block, kernels
from local.fast.block import BlockMoments, BlockPasses, BlockShape, BlockWeights, Scratch
from local.fast.layers import Moments

# Sizes are fixed: to try several would cost more at the first step than it gives.
WARPS = 4  # of a program, with 32 threads each
BYTES = 16  # of a tensor that a thread reads at once
CHANNELS = 128  # of a program, or all where the norm averages over them
FRAMES = 64  # of a program: with fewer there are many sums to add, with more few programs
STAGES = 1  # steps whose reads are under way at a time
PARTS = 1024  # that a program joins in a step

LIMIT = 1e-3  # relative error of a block in float32


class Half(NamedTuple):
    """PReLU, norm and the taps that follow, if any: half of what is between the products."""

    slope: Tensor
    gamma: Tensor
    beta: Tensor
    taps: Tensor | None  # (H, P)
    shape: BlockShape

    @classmethod
    def first(cls, w: BlockWeights, shape: BlockShape) -> Half:
        return cls(w.slope_in, w.gamma_in, w.beta_in, w.taps.t().contiguous(), shape)

    @classmethod
    def second(cls, w: BlockWeights, shape: BlockShape) -> Half:
        in_place = BlockShape(shape.norm_type, dilation=0, padding=0)
        return cls(w.slope_out, w.gamma_out, w.beta_out, None, in_place)

    def count_taps(self) -> int:
        return 1 if self.taps is None else self.taps.shape[1]


class Tiling(NamedTuple):
    """How the programs of a kernel share an (M, K, H) tensor."""

    grid: tuple[int, int, int]  # channels, frames, items
    sizes: dict[str, int | bool]

    @classmethod
    def of(cls, rows: Tensor, norm_type: str) -> Tiling:
        return _tile(rows.shape, rows.element_size(), norm_type)


@functools.cache  # a step asks some hundred times
def _tile(shape: torch.Size, value_bytes: int, norm_type: str) -> Tiling:
    M, K, H = shape
    by_row, channels = norm_type == "cLN", triton.next_power_of_2(H)
    if not by_row:
        channels = min(channels, CHANNELS)
    values = WARPS * 32 * BYTES // value_bytes
    sizes = dict(ROWS=max(1, values // channels), CHANNELS=channels)
    sizes["STEPS"] = max(1, FRAMES // sizes["ROWS"])
    frames = sizes["ROWS"] * sizes["STEPS"]
    grid = triton.cdiv(H, channels), triton.cdiv(K, frames), M
    return Tiling(grid, dict(sizes, STAGES=STAGES, H=H, BY_ROW=by_row, num_warps=WARPS))


class Measurement:
    """Moments of (M, K, H) rows, to be filled by a kernel."""

    def __init__(self, rows: Tensor, norm_type: str):
        self._tiling = Tiling.of(rows, norm_type)
        self._parts = None
        if norm_type == "cLN":
            shape = *rows.shape[:2], 1
        else:
            shape = rows.shape[0], 1, 1
            self._parts = new(rows, *self._tiling.grid, 3)
        self._moments = Moments(new(rows, *shape), new(rows, *shape))

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Of `measure` and `transform`: mean, scale, parts."""
        return *self._moments, self._parts

    def finish(self) -> Moments:
        """To be called after the kernel."""
        if self._parts is not None:
            channels, frames, items = self._tiling.grid
            arguments = self._parts, *self._moments, channels * frames, tasnet.EPS, PARTS
            kernels.combine[items,](*arguments)
        return self._moments


def new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def measure(source: Tensor, slope: Tensor, norm_type: str) -> Moments:
    """The moments of prelu(source)."""
    grid, sizes = Tiling.of(source, norm_type)
    measurement = Measurement(source, norm_type)
    arguments = source, slope, *measurement.arguments(), source.shape[1]
    kernels.measure[grid](*arguments, EPS=tasnet.EPS, **sizes)
    return measurement.finish()


def transform(
    source: Tensor, half: Half, moments: Moments, next_slope: Tensor | None = None
) -> tuple[Tensor, Moments | None]:
    """What `half` makes of its input, and with next_slope the moments of the norm that follows."""
    slope, gamma, beta, taps, (norm_type, dilation, padding) = half
    grid, sizes = Tiling.of(source, norm_type)
    out, measurement = torch.empty_like(source), None
    if next_slope is not None:
        measurement = Measurement(source, norm_type)
    kernels.transform[grid](
        *(source, slope, gamma, beta, *moments, taps, out, next_slope),
        *(measurement.arguments() if measurement else (None, None, None)),
        *(source.shape[1], dilation, padding),
        P=half.count_taps(),
        EPS=tasnet.EPS,
        **sizes,
    )
    return out, measurement and measurement.finish()


def differentiate(
    grad: Tensor, source: Tensor, half: Half, moments: Moments, out: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of source, which is written to `out`, slope, gamma and beta, and of (P, H) taps
    if there are any.
    """
    slope, gamma, _, taps, (norm_type, dilation, padding) = half
    (grid, sizes), (M, K, H) = Tiling.of(source, norm_type), source.shape
    P, averages = half.count_taps(), None
    sums = new(source, M, grid[1], 2, P, H)
    slope_sums = new(source, math.prod(grid))

    def run(out: Tensor | None, sums: Tensor | None, slope_sums: Tensor | None) -> None:
        kernels.differentiate[grid](
            *(grad, source, slope, gamma, *moments, taps, averages, out, sums, slope_sums),
            *(K, dilation, padding),
            P=P,
            **sizes,
        )

    if norm_type == "cLN":
        run(out, sums, slope_sums)
        sums = sums.flatten(0, 1).sum(0)
    else:
        run(None, sums, None)
        sums = sums.sum(1)
        averages = (_through_taps(sums, taps) * gamma).sum(-1) / (K * H)
        run(out, None, slope_sums)
        sums = sums.sum(0)
    grad_beta, grad_gamma = _through_taps(sums, taps)
    grads = out, slope_sums.sum().view(1), grad_gamma, grad_beta
    if taps is None:
        return grads
    totals, products = sums
    return *grads, torch.addcmul(half.beta * totals, gamma, products)


def _through_taps(sums: Tensor, taps: Tensor | None) -> Tensor:
    """(..., P, H) sums of the shifted gradients -> (..., H) of the gradient before the taps."""
    return sums.squeeze(-2) if taps is None else (sums * taps.t()).sum(-2)


def forward(
    hidden: Tensor, weights: BlockWeights, shape: BlockShape, saves_all: bool, scratch: Scratch
) -> tuple[Tensor, Tensor, BlockMoments]:
    before = measure(hidden, weights.slope_in, shape.norm_type)
    mixed, after = transform(hidden, Half.first(weights, shape), before, weights.slope_out)
    normed, _ = transform(mixed, Half.second(weights, shape), after)
    return normed, mixed, BlockMoments(*before, *after)


def recompute(
    hidden: Tensor,
    mixed: Tensor | None,
    moments: BlockMoments,
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    if mixed is None:
        mixed, _ = transform(hidden, Half.first(weights, shape), moments.before())
    normed, _ = transform(mixed, Half.second(weights, shape), moments.after())
    return normed, mixed


def backward_out(
    grad: Tensor,
    mixed: Tensor,
    moments: BlockMoments,
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor, ...]:
    half = Half.second(weights, shape)
    return differentiate(grad, mixed, half, moments.after(), out=grad)


def backward_in(
    grad: Tensor,
    hidden: Tensor,
    moments: BlockMoments,
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor, ...]:
    half = Half.first(weights, shape)
    return differentiate(grad, hidden, half, moments.before(), out=torch.empty_like(grad))


def add(residual: Tensor, update: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if update is None or dtype == residual.dtype:
        return block.add(residual, update, dtype)
    total, copy = torch.empty_like(residual), torch.empty_like(update)
    size, tile = total.numel(), 2 * WARPS * 32 * BYTES // copy.element_size()
    grid = (triton.cdiv(size, tile),)
    kernels.add[grid](residual, update, total, copy, size, tile, num_warps=WARPS)
    return total, copy


PASSES = BlockPasses(forward, recompute, backward_out, backward_in, add)


@torch.no_grad()
def find_difference(model: tasnet.ConvTasNetStereo, device: torch.device) -> str:
    """How these passes differ from the plain ones in the first block of a model, in a few words; ""
    if they do not. An untried GPU or version of Triton may compile the kernels wrongly.
    """
    first, scratch = model.separator.network[2][0][0], Scratch()
    weights, shape = BlockWeights.of(first), BlockShape.of(first, model.norm_type)
    generator = torch.Generator(device).manual_seed(0)
    hidden, grad = torch.randn(2, 2, 3 * FRAMES, model.H, device=device, generator=generator)
    _, mixed, moments = block.forward(hidden, weights, shape, True, scratch)

    def run(passes: BlockPasses) -> tuple[Tensor, ...]:
        normed, *_ = passes.forward(hidden, weights, shape, True, scratch)
        saved = moments, weights, shape, scratch
        inner, *grads_out = passes.backward_out(grad.clone(), mixed, *saved)
        return normed, inner, *grads_out, *passes.backward_in(inner, hidden, *saved)

    with torch.cuda.device_of(hidden):
        for found, expected in zip(run(PASSES), run(BlockPasses()), strict=True):
            error, scale = (found - expected).norm(), expected.norm()
            if not error <= LIMIT * scale:  # true for NaN
                return f"a block has a relative error of {float(error / scale):.1g}"
    return ""
