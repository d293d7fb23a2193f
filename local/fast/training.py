"""The model's forward pass for training: the same numbers in a fraction of the time and memory.

local.tasnet is the definition; this is held to it. Frames are rows, (M, K, channels), so every 1x1
convolution is one matrix product. A block is one node of the autograd graph that keeps little
beside what entered it: its backward pass rebuilds the rest, which costs less than reading it back.

Letters in shapes are those of local.tasnet.
"""

from __future__ import annotations  # an edited local/tasnet.py need not have these classes

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from local import tasnet
from local.fast.recompute import keep_buffers
from local.fast.rows import decode, embed, encode, product_dtype, wide
from local.tools.choices import MEMORY

BN_EPS = nn.BatchNorm1d(1).eps
POOLED = {"gLN": (1, 2), "cLN": (2,), "BN": (0, 1)}  # the dimensions that a norm takes as one

Scratch = Sequence[Tensor | None]  # six of (M, K, H)


class TrainingForward:
    """What `model` computes in training mode, up to rounding, with the same gradients.

    Under autocast the products, and what is kept of a block, are of its dtype; the statistics of
    norms, the residual path and the estimates stay float32.

    Args:
        model: its parameters are used where they are, and the statistics of its BN updated.
        memory: how much the backward pass computes again. "none": only what lies between
            products, so that three tensors are kept of a block; "some": everything but what
            entered a block; "most": everything but what entered a repeat.
        compiled: let torch.compile fuse what lies between the products, which takes a minute or
            so at the first step.

    Raises:
        ValueError: there is no such `memory`.
    """

    def __init__(
        self, model: tasnet.ConvTasNetStereo, memory: str = "some", compiled: bool = False
    ):
        if memory not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
        fuse = torch.compile if compiled else lambda function: function
        self._model, self._memory, self._compiled = model, memory, compiled
        self._batch_norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm1d)]
        self._start, self._end = fuse(_start), fuse(decode)
        self._passes = BlockPasses(*map(fuse, BlockPasses()))

    def __call__(self, mixture: Tensor) -> Tensor:
        """Separates.

        Shape:
            - mixture: (M, audio_channels, T) with T >= L
            - estimates: (M, C, audio_channels, T)
        """
        if not all(norm.training for norm in self._batch_norms):
            return self._model(mixture)  # with kept statistics it is simpler, and no case of these
        weights, residual = self._start(self._model, mixture)
        scratch = self._make_scratch(residual)
        for repeat in self._model.separator.network[2]:
            residual = self._run(repeat, residual, scratch)
        estimates = self._end(self._model, weights, residual)
        return F.pad(estimates, (0, mixture.shape[-1] - estimates.shape[-1]))

    def _make_scratch(self, residual: Tensor) -> Scratch:
        """Fresh memory costs a CPU more than the pass that fills it; a GPU has a cache of it, and a
        compiler leaves most of the passes out.
        """
        device = residual.device.type
        if self._compiled or device != "cpu" or torch.is_autocast_enabled(device):
            return [None] * 6
        H = self._model.separator.network[2][0][0].net[0].out_channels
        return residual.new_empty(6, *residual.shape[:2], H).unbind()

    def _run(self, repeat: nn.Sequential, residual: Tensor, scratch: Scratch) -> Tensor:
        if self._memory != "most":
            return self._run_blocks(repeat, residual, scratch)
        return checkpoint(
            self._run_blocks,
            repeat,
            residual,
            scratch,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: keep_buffers(repeat),
        )

    def _run_blocks(self, repeat: nn.Sequential, residual: Tensor, scratch: Scratch) -> Tensor:
        norm_type, keep = self._model.norm_type, self._memory == "none"
        for block in repeat:
            shape, weights = BlockShape.of(block, norm_type), BlockWeights.of(block)
            residual, *moments = BlockFunction.apply(
                self._passes, keep, scratch, shape, residual, *weights
            )
            if norm_type == "BN":
                frames = residual.shape[0] * residual.shape[1]
                _count_batch(block.net[2], *moments[:2], frames)
                _count_batch(block.net[3].net[-2], *moments[2:], frames)
        return residual


def multiply_as_convolutions_do() -> None:
    """Lets products in float32 take TF32 on a GPU where torch's convolutions may, which they are
    here: a 1x1 convolution is a product over rows.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32


def _start(model: tasnet.ConvTasNetStereo, mixture: Tensor) -> tuple[Tensor, Tensor]:
    weights = encode(model, mixture)
    return weights, wide(embed(model, weights))


@torch.no_grad()
def _count_batch(norm: nn.BatchNorm1d, mean: Tensor, scale: Tensor, frames: int) -> None:
    """Moves the running statistics towards those of a batch, as BN does in training mode."""
    if norm.track_running_stats:
        variance = (scale.square().reciprocal() - norm.eps) * (frames / max(frames - 1, 1))
        norm.running_mean.lerp_(mean.flatten(), norm.momentum)
        norm.running_var.lerp_(variance.flatten(), norm.momentum)
        norm.num_batches_tracked += 1


# A block


class BlockShape(NamedTuple):
    """What a TemporalBlock is beside its parameters."""

    norm_type: str
    dilation: int
    before: int  # frames of zeros before the first

    @classmethod
    def of(cls, block: tasnet.TemporalBlock, norm_type: str) -> BlockShape:
        depthwise = block.net[3].net[0]
        return cls(norm_type, depthwise.dilation[0], depthwise.padding[0])

    def offsets(self, weights: BlockWeights) -> list[int]:
        """Where each tap looks, in frames from the one that it adds to."""
        return [p * self.dilation - self.before for p in range(len(weights.taps))]


class BlockWeights(NamedTuple):
    """The parameters of a TemporalBlock; gamma and beta are None where the norm is id."""

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


def forward(
    hidden: Tensor, weights: BlockWeights, shape: BlockShape, keep: bool, scratch: Scratch
) -> tuple[Tensor, Tensor, tuple]:
    """What is projected, what goes into the second PReLU, and the moments of both norms."""
    _, two, three, four, *_ = scratch
    active = prelu(wide(hidden), weights.slope_in, out=two)
    moments_in = normalise_(active, weights.gamma_in, weights.beta_in, shape.norm_type, three)
    mixed = depthwise(active, weights.taps, shape.offsets(weights), out=None if keep else four)
    mixed = mixed.to(hidden.dtype)
    active = prelu(wide(mixed), weights.slope_out, out=two)
    moments_out = normalise_(active, weights.gamma_out, weights.beta_out, shape.norm_type, three)
    return active.to(hidden.dtype), mixed, (*moments_in, *moments_out)


def forward_again(
    hidden: Tensor,
    mixed: Tensor | None,
    moments: Sequence[Tensor | None],
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """As `forward`, without measuring anew, and from `mixed` where it was kept."""
    _, two, three, four, *_ = scratch
    if mixed is None:
        active = prelu(wide(hidden), weights.slope_in, out=two)
        normalise_(active, weights.gamma_in, weights.beta_in, shape.norm_type, None, moments[:2])
        mixed = depthwise(active, weights.taps, shape.offsets(weights), out=three)
        mixed = mixed.to(hidden.dtype)
    active = prelu(wide(mixed), weights.slope_out, out=four)
    normalise_(active, weights.gamma_out, weights.beta_out, shape.norm_type, None, moments[2:])
    return active.to(hidden.dtype), mixed


def backward_out(
    flow: Tensor,
    mixed: Tensor,
    moments: Sequence[Tensor | None],
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor | None, ...]:
    """From the gradient of what is projected to that of `mixed`; the gradients of slope_out,
    gamma_out and beta_out.
    """
    *_, four, _, six = scratch
    dtype, flow, mixed = flow.dtype, wide(flow), wide(mixed)
    active = prelu(mixed, weights.slope_out, out=four)
    grads = normalise_backward_(flow, active, weights.gamma_out, shape.norm_type, six, moments)
    grad_slope = prelu_backward_(flow, mixed, weights.slope_out, six)
    return flow.to(dtype), grad_slope, *grads


def backward_in(
    flow: Tensor,
    hidden: Tensor,
    moments: Sequence[Tensor | None],
    weights: BlockWeights,
    shape: BlockShape,
    scratch: Scratch,
) -> tuple[Tensor | None, ...]:
    """From the gradient of `mixed` to that of `hidden`; the gradients of slope_in, gamma_in,
    beta_in and the taps.
    """
    _, two, _, four, _, six = scratch
    dtype, flow, hidden = flow.dtype, wide(flow), wide(hidden)
    offsets, norm_type = shape.offsets(weights), shape.norm_type
    active = prelu(hidden, weights.slope_in, out=two)
    normalise_(active, weights.gamma_in, weights.beta_in, norm_type, None, moments)
    grad_taps = depthwise_backward(flow, active, offsets, six)
    flow = depthwise(flow, weights.taps, [-offset for offset in offsets], out=four)
    active = prelu(hidden, weights.slope_in, out=two)
    grads = normalise_backward_(flow, active, weights.gamma_in, norm_type, six, moments)
    grad_slope = prelu_backward_(flow, hidden, weights.slope_in, six)
    return flow.to(dtype), grad_slope, *grads, grad_taps


class BlockPasses(NamedTuple):
    """What lies between the products of a block; each as it is, or fused by a compiler."""

    forward: Callable = forward
    again: Callable = forward_again
    backward_out: Callable = backward_out
    backward_in: Callable = backward_in


class BlockFunction(torch.autograd.Function):
    """A TemporalBlock as one node: residual (M, K, B) to the next residual and, without a
    gradient, the moments of its two norms.
    """

    @staticmethod
    def forward(ctx, passes, keep, scratch, shape, residual, *weights):
        ctx.passes, ctx.scratch, ctx.shape = passes, scratch, shape
        weights, entered = BlockWeights(*weights), residual.to(weights[0].dtype)
        with torch.autocast(residual.device.type, enabled=False):
            hidden = _product(entered, weights.expand.t(), None if keep else scratch[0])
            normed, mixed, moments = passes.forward(hidden, weights, shape, keep, scratch)
            residual = residual + _product(normed, weights.project.t())
        kept = (hidden, mixed) if keep else (None, None)
        ctx.save_for_backward(entered, *kept, *moments, *weights)
        ctx.mark_non_differentiable(*(moment for moment in moments if moment is not None))
        return residual, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        entered, hidden, mixed, *rest = ctx.saved_tensors
        moments, weights = rest[:4], BlockWeights(*rest[4:])
        passes, scratch, shape = ctx.passes, ctx.scratch, ctx.shape
        if hidden is None:
            hidden = _product(entered, weights.expand.t(), scratch[0])
        normed, mixed = passes.again(hidden, mixed, moments, weights, shape, scratch)
        grad_update = grad.to(hidden.dtype)
        grad_project = _product_over_frames(grad_update, normed)
        flow = _product(grad_update, weights.project, scratch[4])
        flow, *grads_out = passes.backward_out(flow, mixed, moments[2:], weights, shape, scratch)
        flow, *grads_in = passes.backward_in(flow, hidden, moments[:2], weights, shape, scratch)
        grad_expand = _product_over_frames(flow, entered)
        grad_residual = grad + _product(flow, weights.expand)
        grads = grad_residual, grad_expand, *grads_in, *grads_out, grad_project
        return None, None, None, None, *grads


def _product(frames: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """(M, K, i) @ (i, j) -> (M, K, j)."""
    rows = torch.mm(_rows(frames), matrix, out=None if out is None else _rows(out))
    return rows.view(*frames.shape[:2], -1)


def _product_over_frames(first: Tensor, second: Tensor) -> Tensor:
    """(M, K, i), (M, K, j) -> (i, j)."""
    return _rows(first).t() @ _rows(second)


def _rows(frames: Tensor) -> Tensor:
    return frames.flatten(0, 1)


# What lies between the products. `out` and `spare` are tensors to write to, or None; a trailing
# underscore means that the first argument is changed.


def prelu(hidden: Tensor, slope: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.clamp(hidden, min=0, out=out).lerp_(hidden, slope)


def prelu_backward_(grad: Tensor, hidden: Tensor, slope: Tensor, spare: Tensor | None) -> Tensor:
    """From the gradient of the activation to that of hidden; returns that of the slope."""
    below = torch.clamp(hidden, max=0, out=spare)
    grad_slope = torch.mul(grad, below, out=spare).sum().view(1)
    above = torch.gt(hidden, 0, out=spare)
    grad.mul_(torch.mul(above, 1 - slope, out=spare).add_(slope))
    return grad_slope


def normalise_(
    hidden: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    norm_type: str,
    spare: Tensor | None,
    moments: Sequence[Tensor | None] = (None, None),
) -> Sequence[Tensor | None]:
    """Returns (mean, 1 / standard deviation), measured where they are not given."""
    if norm_type == "id":
        return None, None
    mean, scale = moments
    if mean is None:
        mean = hidden.mean(POOLED[norm_type], keepdim=True)
    hidden.sub_(mean)
    if scale is None:
        variance = torch.mul(hidden, hidden, out=spare).mean(POOLED[norm_type], keepdim=True)
        scale = torch.rsqrt(variance + _eps(norm_type))
    torch.addcmul(beta, hidden.mul_(scale), gamma, out=hidden)
    return mean, scale


def _eps(norm_type: str) -> float:
    return BN_EPS if norm_type == "BN" else tasnet.EPS


def normalise_backward_(
    grad: Tensor,
    hidden: Tensor,
    gamma: Tensor | None,
    norm_type: str,
    spare: Tensor | None,
    moments: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient of what is normalised to that of hidden, which is changed too; returns
    the gradients of gamma and beta.
    """
    if norm_type == "id":
        return None, None
    (mean, scale), pooled = moments, POOLED[norm_type]
    normed = hidden.sub_(mean).mul_(scale)
    product = torch.mul(grad, normed, out=spare)
    grad_gamma, grad_beta = product.sum((0, 1)), grad.sum((0, 1))
    grad.mul_(gamma)
    mean_grad = grad.mean(pooled, keepdim=True)
    mean_product = product.mul_(gamma).mean(pooled, keepdim=True)
    grad.sub_(mean_grad).addcmul_(normed, mean_product, value=-1).mul_(scale)
    return grad_gamma, grad_beta


def depthwise(
    hidden: Tensor, taps: Tensor, offsets: list[int], out: Tensor | None = None
) -> Tensor:
    """Sums over the taps p of taps[p] * hidden[k + offsets[p]], zeros around; an offset is 0."""
    if torch.compiler.is_compiling():
        shifted = _shift(hidden, offsets)
        return sum(tap * frames for tap, frames in zip(taps, shifted, strict=True))
    mixed = torch.mul(hidden, taps[offsets.index(0)], out=out)
    for tap, offset in zip(taps, offsets, strict=True):
        if offset != 0:
            to, origin = _overlap(mixed, hidden, offset)
            to.addcmul_(origin, tap)
    return mixed


def depthwise_backward(
    grad: Tensor, hidden: Tensor, offsets: list[int], spare: Tensor | None
) -> Tensor:
    """The gradient of the taps."""
    if torch.compiler.is_compiling():
        shifted = _shift(hidden, offsets)
        return torch.stack([(grad * frames).sum((0, 1)) for frames in shifted])
    grads = []
    for offset in offsets:
        flow, origin = _overlap(grad, hidden, offset)
        product = torch.mul(flow, origin, out=None if spare is None else spare[:, : flow.shape[1]])
        grads.append(product.sum((0, 1)))
    return torch.stack(grads)


def _overlap(first: Tensor, second: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """first[k] and second[k + offset] for the frames k where both are."""
    frames = max(first.shape[1] - abs(offset), 0)
    return first[:, max(-offset, 0) :][:, :frames], second[:, max(offset, 0) :][:, :frames]


def _shift(hidden: Tensor, offsets: list[int]) -> list[Tensor]:
    """hidden[k + offset] for every offset, zeros around: a compiler reads through the padding,
    where memory would be filled otherwise.
    """
    before, after = max(-min(offsets), 0), max(*offsets, 0)
    padded = F.pad(hidden, (0, 0, before, after))
    return [padded[:, before + offset :][:, : hidden.shape[1]] for offset in offsets]
