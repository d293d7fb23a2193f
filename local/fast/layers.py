"""The layers between the 1x1 convolutions of a block, over frames as rows, with their gradients.

PReLU, norm and depthwise convolution of (M, K, H) tensors. `out` and `spare` are buffers of that
shape to write to, or None to allocate; a trailing underscore means that the first argument is
changed in place.

Letters in shapes are those of local.tasnet.
"""

from __future__ import annotations  # an edited local/tasnet.py need not have these classes

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local import tasnet

BN_EPS = nn.BatchNorm1d(1).eps
POOLED = {"gLN": (1, 2), "cLN": (2,), "BN": (0, 1)}  # the dimensions that a norm averages over


class Moments(NamedTuple):
    """What a norm has measured; None where it is id."""

    mean: Tensor | None
    scale: Tensor | None  # 1 / standard deviation


def prelu(hidden: Tensor, slope: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.clamp(hidden, min=0, out=out).lerp_(hidden, slope)


def prelu_backward_(grad: Tensor, hidden: Tensor, slope: Tensor, spare: Tensor | None) -> Tensor:
    """Turns the gradient of the activation into that of `hidden`; returns that of the slope."""
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
    spare: Tensor | None = None,
    moments: Moments | None = None,
) -> Moments:
    """Normalises in place; returns the moments, which are measured unless given."""
    if norm_type == "id":
        return Moments(None, None)
    pooled = POOLED[norm_type]
    mean = hidden.mean(pooled, keepdim=True) if moments is None else moments.mean
    hidden.sub_(mean)
    if moments is None:
        variance = torch.mul(hidden, hidden, out=spare).mean(pooled, keepdim=True)
        moments = Moments(mean, torch.rsqrt(variance + _eps(norm_type)))
    torch.addcmul(beta, hidden.mul_(moments.scale), gamma, out=hidden)
    return moments


def _eps(norm_type: str) -> float:
    return BN_EPS if norm_type == "BN" else tasnet.EPS


def normalise_backward_(
    grad: Tensor,
    hidden: Tensor,
    gamma: Tensor | None,
    norm_type: str,
    spare: Tensor | None,
    moments: Moments,
) -> tuple[Tensor | None, Tensor | None]:
    """Turns the gradient of the norm's output into that of its input `hidden`, which is changed
    too; returns the gradients of gamma and beta.
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
    """The sum over p of taps[p] * hidden[:, k + offsets[p]], with zeros outside.

    Args:
        taps: (P, H).
        offsets: in frames; one of them is 0.
    """
    if torch.compiler.is_compiling():
        shifted = _shift(hidden, offsets)
        return sum(tap * frames for tap, frames in zip(taps, shifted, strict=True))
    mixed = torch.mul(hidden, taps[offsets.index(0)], out=out)
    for tap, offset in zip(taps, offsets, strict=True):
        if offset != 0:
            written, read = _overlap(mixed, hidden, offset)
            written.addcmul_(read, tap)
    return mixed


def depthwise_backward(
    grad: Tensor, hidden: Tensor, offsets: list[int], spare: Tensor | None
) -> Tensor:
    """The gradient of the taps, from that of the output."""
    if torch.compiler.is_compiling():
        shifted = _shift(hidden, offsets)
        return torch.stack([(grad * frames).sum((0, 1)) for frames in shifted])
    grads = []
    for offset in offsets:
        given, read = _overlap(grad, hidden, offset)
        product = torch.mul(given, read, out=None if spare is None else spare[:, : given.shape[1]])
        grads.append(product.sum((0, 1)))
    return torch.stack(grads)


def _overlap(first: Tensor, second: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """first[:, k] and second[:, k + offset] for the frames k where both exist."""
    frames = max(first.shape[1] - abs(offset), 0)
    return first[:, max(-offset, 0) :][:, :frames], second[:, max(offset, 0) :][:, :frames]


def _shift(hidden: Tensor, offsets: list[int]) -> list[Tensor]:
    """hidden[:, k + offset] for every offset, with zeros outside.

    For a compiler alone, which fuses the padding; without one it would fill memory.
    """
    before, after = max(-min(offsets), 0), max(*offsets, 0)
    padded = F.pad(hidden, (0, 0, before, after))
    return [padded[:, before + offset :][:, : hidden.shape[1]] for offset in offsets]
