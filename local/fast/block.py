"""A TemporalBlock as one node of the autograd graph.

It saves its input, the moments of its norms and little else: the backward pass recomputes the rest,
which takes less time than reading it from memory would. Its two 1x1 convolutions are matrix
products; what lies between them is in local/fast/layers.py.

Letters in shapes are those of local.tasnet.
"""

from __future__ import annotations  # an edited local/tasnet.py need not have these classes

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from local import tasnet
from local.fast.layers import (
    Moments,
    depthwise,
    depthwise_backward,
    normalise_,
    normalise_backward_,
    prelu,
    prelu_backward_,
)
from local.fast.packed import product_dtype, upcast


class Scratch(NamedTuple):
    """Buffers of (M, K, H) that all blocks write to in turn; None where they allocate."""

    hidden: Tensor | None = None  # after the first 1x1 convolution
    active: Tensor | None = None  # after a PReLU
    mixed: Tensor | None = None  # after the depthwise convolution
    normed: Tensor | None = None  # before the last 1x1 convolution
    grad: Tensor | None = None
    spare: Tensor | None = None


class BlockMoments(NamedTuple):
    """The Moments of both norms, flat, since autograd takes tensors alone."""

    mean_in: Tensor | None
    scale_in: Tensor | None
    mean_out: Tensor | None
    scale_out: Tensor | None

    def before(self) -> Moments:
        """Of the norm before the depthwise convolution."""
        return Moments(self.mean_in, self.scale_in)

    def after(self) -> Moments:
        """Of the norm after it."""
        return Moments(self.mean_out, self.scale_out)


class BlockShape(NamedTuple):
    """The arguments of a TemporalBlock that matter beside its parameters."""

    norm_type: str
    dilation: int
    padding: int  # frames of zeros before the first

    @classmethod
    def of(cls, block: tasnet.TemporalBlock, norm_type: str) -> BlockShape:
        depthwise = block.net[3].net[0]
        return cls(norm_type, depthwise.dilation[0], depthwise.padding[0])

    def offsets(self, weights: BlockWeights) -> list[int]:
        """The frame that each tap reads, relative to the frame that it adds to."""
        return [p * self.dilation - self.padding for p in range(len(weights.taps))]


class BlockWeights(NamedTuple):
    """The parameters of a TemporalBlock; gamma and beta are None where the norm is id.

    The names that end in _in belong to the layers before the depthwise convolution, those in _out
    to the layers after it.
    """

    expand: Tensor  # (H, B), as project of autocast's dtype
    slope_in: Tensor  # (1,)
    gamma_in: Tensor | None  # (H,)
    beta_in: Tensor | None
    taps: Tensor  # (P, H)
    slope_out: Tensor
    gamma_out: Tensor | None
    beta_out: Tensor | None
    project: Tensor  # (B, H)

    @classmethod
    def of(cls, block: tasnet.TemporalBlock) -> BlockWeights:
        expand, activation_in, norm_in, separable = block.net
        depthwise, *_, activation_out, norm_out, project = separable.net
        dtype = product_dtype(expand.weight)
        return cls(
            expand.weight[:, :, 0].to(dtype),
            activation_in.weight,
            *_gamma_and_beta(norm_in),
            depthwise.weight[:, 0].t(),
            activation_out.weight,
            *_gamma_and_beta(norm_out),
            project.weight[:, :, 0].to(dtype),
        )


def _gamma_and_beta(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(norm, tasnet.ChannelwiseLayerNorm):
        return norm.gamma.flatten(), norm.beta.flatten()
    if isinstance(norm, nn.BatchNorm1d):
        return norm.weight, norm.bias
    return None, None


def add(residual: Tensor, update: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(their sum, or the residual without an update; the same in a dtype)."""
    if update is not None:
        residual = residual + update
    return residual, residual.to(dtype)


def forward(
    hidden: Tensor, weights: BlockWeights, shape: BlockShape, saves_all: bool, scratch: Scratch
) -> tuple[Tensor, Tensor, BlockMoments]:
    """From the first 1x1 convolution to the last: (normed, mixed, moments), as in Scratch.

    Args:
        saves_all: whether `mixed` is saved, so that it must not be a buffer.
    """
    active = prelu(upcast(hidden), weights.slope_in, scratch.active)
    norm_type, spare = shape.norm_type, scratch.spare
    before = normalise_(active, weights.gamma_in, weights.beta_in, norm_type, spare)
    out = None if saves_all else scratch.mixed
    mixed = depthwise(active, weights.taps, shape.offsets(weights), out).to(hidden.dtype)
    active = prelu(upcast(mixed), weights.slope_out, scratch.active)
    after = normalise_(active, weights.gamma_out, weights.beta_out, norm_type, spare)
    return active.to(hidden.dtype), mixed, BlockMoments(*before, *after)


def recompute(
    hidden: Tensor,
    mixed: Tensor | None,
    moments: BlockMoments,
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """(normed, mixed) of `forward`, from its moments, and from `mixed` where that was saved."""
    w, norm_type = weights, shape.norm_type
    if mixed is None:
        active = prelu(upcast(hidden), w.slope_in, scratch.active)
        normalise_(active, w.gamma_in, w.beta_in, norm_type, moments=moments.before())
        mixed = depthwise(active, w.taps, shape.offsets(w), scratch.mixed).to(hidden.dtype)
    normed = prelu(upcast(mixed), w.slope_out, scratch.normed)
    normalise_(normed, w.gamma_out, w.beta_out, norm_type, moments=moments.after())
    return normed.to(hidden.dtype), mixed


def backward_out(
    grad: Tensor,
    mixed: Tensor,
    moments: BlockMoments,
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor | None, ...]:
    """The gradient of `mixed`, from that of `normed`; then those of slope_out, gamma_out and
    beta_out.
    """
    dtype, grad, mixed = grad.dtype, upcast(grad), upcast(mixed)
    active = prelu(mixed, weights.slope_out, scratch.active)
    grads = normalise_backward_(
        grad, active, weights.gamma_out, shape.norm_type, scratch.spare, moments.after()
    )
    grad_slope = prelu_backward_(grad, mixed, weights.slope_out, scratch.spare)
    return grad.to(dtype), grad_slope, *grads


def backward_in(
    grad: Tensor,
    hidden: Tensor,
    moments: BlockMoments,
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor | None, ...]:
    """The gradient of `hidden`, from that of `mixed`; then those of slope_in, gamma_in, beta_in
    and the taps.
    """
    w, spare, norm_type = weights, scratch.spare, shape.norm_type
    dtype, grad, hidden = grad.dtype, upcast(grad), upcast(hidden)
    offsets = shape.offsets(w)
    active = prelu(hidden, w.slope_in, scratch.active)
    normalise_(active, w.gamma_in, w.beta_in, norm_type, moments=moments.before())
    grad_taps = depthwise_backward(grad, active, offsets, spare)
    # `normed` is not needed any more.
    grad = depthwise(grad, w.taps, [-offset for offset in offsets], out=scratch.normed)
    active = prelu(hidden, w.slope_in, scratch.active)
    grads = normalise_backward_(grad, active, w.gamma_in, norm_type, spare, moments.before())
    grad_slope = prelu_backward_(grad, hidden, w.slope_in, spare)
    return grad.to(dtype), grad_slope, *grads, grad_taps


class BlockPasses(NamedTuple):
    """What lies between the products of a block: the functions above, compiled or not."""

    forward: Callable = forward
    recompute: Callable = recompute
    backward_out: Callable = backward_out
    backward_in: Callable = backward_in
    add: Callable = add


class BlockFunction(torch.autograd.Function):
    """The block: (residual, update) to the next (residual, update), all (M, K, B), where the sum of
    a pair is the residual path; and, without a gradient, BlockMoments.

    So the sum is one pass with its copy in the dtype of the products, here and in the backward
    pass.

    Args of `apply`: BlockPasses, whether hidden and mixed are saved, Scratch, BlockShape, residual,
    update or None, and the BlockWeights one by one.
    """

    @staticmethod
    def forward(ctx, passes, saves_all, scratch, shape, residual, update, *weights):
        ctx.passes, ctx.scratch, ctx.shape = passes, scratch, shape
        ctx.set_materialize_grads(False)  # the moments have none, and zeros would be filled in
        weights = BlockWeights(*weights)
        with torch.autocast(residual.device.type, enabled=False):
            residual, inputs = passes.add(residual, update, weights.expand.dtype)
            out = None if saves_all else scratch.hidden
            hidden = _product(inputs, weights.expand.t(), out)
            normed, mixed, moments = passes.forward(hidden, weights, shape, saves_all, scratch)
            update = _product(normed, weights.project.t())
        saved = (hidden, mixed) if saves_all else (None, None)
        ctx.save_for_backward(inputs, *saved, *moments, *weights)
        ctx.mark_non_differentiable(*(moment for moment in moments if moment is not None))
        return residual, update, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_update, *_):
        inputs, hidden, mixed, *rest = ctx.saved_tensors
        moments, weights = BlockMoments(*rest[:4]), BlockWeights(*rest[4:])
        passes, scratch, shape = ctx.passes, ctx.scratch, ctx.shape
        if hidden is None:
            hidden = _product(inputs, weights.expand.t(), scratch.hidden)
        normed, mixed = passes.recompute(hidden, mixed, moments, weights, shape, scratch)
        grad_project = _product_over_frames(grad_update, normed)
        del normed  # or its memory is held to the end
        inner = _product(grad_update, weights.project, scratch.grad)
        inner, *grads_out = passes.backward_out(inner, mixed, moments, weights, shape, scratch)
        del mixed
        inner, *grads_in = passes.backward_in(inner, hidden, moments, weights, shape, scratch)
        grad_expand = _product_over_frames(inner, inputs)
        grad, grad_update = passes.add(grad, _product(inner, weights.expand), inputs.dtype)
        grads = grad_expand, *grads_in, *grads_out, grad_project
        has_update = ctx.needs_input_grad[5]
        return None, None, None, None, grad, grad_update if has_update else None, *grads


def _product(frames: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """(M, K, i) @ (i, j) -> (M, K, j)."""
    rows = torch.mm(_rows(frames), matrix, out=None if out is None else _rows(out))
    return rows.view(*frames.shape[:2], -1)


def _product_over_frames(first: Tensor, second: Tensor) -> Tensor:
    """(M, K, i), (M, K, j) -> (i, j)."""
    return _rows(first).t() @ _rows(second)


def _rows(frames: Tensor) -> Tensor:
    return frames.flatten(0, 1)
