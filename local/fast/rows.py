"""The layers of ConvTasNetStereo with channels last, for inference tile by tile.

A frame is a row, so a 1x1 convolution is one matrix product, and the layers between two of them
process a tile while it is in the cache. Layers keep the state that the next tile needs, so the same
layers serve for streaming and for whole tracks.

Letters in shapes are those of local.tasnet; K is the number of frames in the tile.
"""

from __future__ import annotations  # an edited local/tasnet.py need not have these classes

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local import tasnet
from local.fast.packed import PackedLinear, upcast

MOST_KEPT = 256  # rows whose room a convolution keeps for the next; 58 ms of the published models


def tile_size(device: torch.device) -> int:
    """Frames in a tile: it should fit into the cache of a CPU, and be large enough for a GPU."""
    return 1024 if device.type == "cpu" else 32768


def encode(model: tasnet.ConvTasNetStereo, mixture: Tensor) -> Tensor:
    """(..., audio_channels, T) with T >= L -> weights (..., K, N)."""
    windows = mixture.unfold(-1, model.encoder.length, model.encoder.hop).movedim(-3, -2)
    return F.linear(windows.flatten(-2), model.encoder.conv1d_U.weight.flatten(1)).relu_()


def embed(model: tasnet.ConvTasNetStereo, weights: Tensor) -> Tensor:
    """(..., K, N) -> residual (..., K, B), the input of the first block."""
    norm, conv = model.separator.network[:2]
    return F.linear(local_norm(norm)(weights), conv.weight[:, :, 0])


def decode(model: tasnet.ConvTasNetStereo, weights: Tensor, residual: Tensor) -> Tensor:
    """(..., K, N), (..., K, B) -> estimates (..., C, audio_channels, (K - 1) * hop + L)."""
    scores = F.linear(residual, model.separator.network[-1].weight[:, :, 0]).to(weights.dtype)
    scores = scores.unflatten(-1, (model.C, -1))
    softmax = model.separator.mask_nonlinear == "softmax"
    masks = scores.softmax(-2) if softmax else scores.relu_()
    signals = F.linear(weights.unsqueeze(-2) * masks, model.decoder.basis_signals.weight)
    signals = upcast(signals).unflatten(-1, (model.audio_channels, model.decoder.length))
    return tasnet.overlap_and_add(signals.movedim(-4, -2), model.decoder.hop)


class RowModel:
    """A ConvTasNetStereo by rows: stateless encoder and decoder, and blocks, which have state.

    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, model: tasnet.ConvTasNetStereo):
        if model.training:
            raise ValueError("expected a model in eval mode; call model.eval() first")
        self._model = model
        norm, conv, repeats, _ = model.separator.network
        self.length, self.hop = model.encoder.length, model.encoder.hop
        self.B, self.H = conv.out_channels, repeats[0][0].net[0].out_channels
        self.bottleneck = Projection(norm, conv)  # weights (..., K, N) -> residual (..., K, B)
        self.blocks = [RowBlock(block) for repeat in repeats for block in repeat]

    def count_frames(self, time: int) -> int:
        """Whole frames in `time` samples."""
        return max(0, (time - self.length) // self.hop + 1)

    def encode(self, mixture: Tensor) -> Tensor:
        return upcast(encode(self._model, mixture))

    def decode(self, weights: Tensor, residual: Tensor) -> Tensor:
        return decode(self._model, weights, residual)


class RowBlock:
    """A TemporalBlock in three steps: expand, project, add to the residual.

    With gLN, all tiles must have passed one step before the first passes the next.
    """

    def __init__(self, block: tasnet.TemporalBlock):
        expand, activation_in, norm_in, separable = block.net
        depthwise, *_, activation_out, norm_out, project = separable.net
        is_global = isinstance(norm_in, tasnet.GlobalLayerNorm)
        self._expand = PackedLinear(expand.weight[:, :, 0], activation_in.weight.item())
        self._slope = activation_out.weight.item()
        self._norm = GlobalNorm(norm_in) if is_global else LocalNorm(norm_in)
        self.depthwise = RowDepthwise(depthwise)
        self._project = (GlobalProjection if is_global else Projection)(norm_out, project)

    def expand(self, residual: Tensor) -> Tensor:
        """(..., K, B) -> hidden (..., K, H) of `product_dtype`."""
        return self._norm.observe(self._expand(residual))

    def project(self, hidden: Tensor) -> Tensor:
        """(..., K, H) -> update (..., K', B) of the next K' frames.

        A block that looks ahead lags behind its input; `finish` returns the rest.
        """
        return self._after_depthwise(self.depthwise.push(hidden, self._norm))

    def finish(self) -> Tensor:
        """The update of the frames that are missing at the end of the track."""
        return self._after_depthwise(self.depthwise.finish())

    def add_to(self, residual: Tensor, update: Tensor) -> None:
        """Adds the update of some frames to their residual, both (..., K, B)."""
        self._project.add_to(residual, update)

    def _after_depthwise(self, mixed: Tensor) -> Tensor:
        return self._project(F.leaky_relu_(mixed, self._slope))


class RowDepthwise:
    """A dilated depthwise convolution. Its state is the input of the next frames.

    New rows are written behind the state. At the end of the buffer the state moves to its front,
    which is seldom where there are few new rows: there is room for the state twice. Where there are
    many, their room is given back.
    """

    def __init__(self, conv: nn.Conv1d):
        taps, dilation = conv.weight[:, 0].detach().t().contiguous(), conv.dilation[0]  # (P, H)
        self._taps = [(p * dilation, tap) for p, tap in enumerate(taps)]
        self._before, self._reach = conv.padding[0], (len(taps) - 1) * dilation
        self.reset()

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def reset(self) -> None:
        self._buffer = None
        self._start, self._end = 0, self._before  # of the state

    def push(self, rows: Tensor, norm: LocalNorm | GlobalNorm) -> Tensor:
        """(..., K, H), not yet normalised by `norm` -> (..., K', H)."""
        *batch, frames, _ = rows.shape
        norm.write(rows, self._room(batch, frames))
        mixed = self._convolve(frames)
        if frames > MOST_KEPT:
            self._shrink()
        return mixed

    def finish(self) -> Tensor:
        """The output for the zeros after the last frame. The next frame begins another track."""
        frames = self._reach - self._before
        self._room(self._buffer.shape[:-2], frames).zero_()
        mixed = self._convolve(frames)
        self.reset()
        return mixed

    def _room(self, batch: Sequence[int], frames: int) -> Tensor:
        """Where the next rows go, behind the state."""
        if self._buffer is None or self._end + frames > self._buffer.shape[-2]:
            self._make_room(batch, frames)
        return self._rows(self._end, frames)

    def _make_room(self, batch: Sequence[int], frames: int) -> None:
        """Moves the state to the front of the buffer, of a larger one where that is too small."""
        old, size = self._buffer, self._end - self._start
        room = 2 * self._reach + frames
        if old is None or room > old.shape[-2]:
            like = self._taps[0][1]
            self._buffer = like.new_empty(*batch, room, len(like))
        state = self._rows(0, size)
        state.zero_() if old is None else state.copy_(old.narrow(-2, self._start, size))
        self._start, self._end = 0, size

    def _shrink(self) -> None:
        """Keeps the state alone."""
        size = self._end - self._start
        self._buffer = self._rows(self._start, size).clone()
        self._start, self._end = 0, size

    def _rows(self, start: int, frames: int) -> Tensor:
        return self._buffer.narrow(-2, start, frames)  # in a quarter of the time of indexing

    def _convolve(self, new: int) -> Tensor:
        """Takes new rows behind the state, and all before that the next frames do not need."""
        self._end += new
        start, frames = self._start, max(0, self._end - self._start - self._reach)
        self._start += frames
        (_, first), *others = self._taps
        mixed = self._rows(start, frames) * first
        for shift, tap in others:
            mixed.addcmul_(self._rows(start + shift, frames), tap)
        return mixed


def local_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """cLN, BN or id as a function that normalises each row alone."""
    if isinstance(norm, tasnet.ChannelwiseLayerNorm):
        gamma, beta = norm.gamma.flatten(), norm.beta.flatten()
        shape = gamma.shape
        return lambda rows: torch.layer_norm(rows, shape, gamma, beta, tasnet.EPS)
    if isinstance(norm, nn.BatchNorm1d):
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        offset = norm.bias - norm.running_mean * gain
        return lambda rows: torch.addcmul(offset, rows, gain)
    return lambda rows: rows


class LocalNorm:
    """cLN, BN or id, with the interface of GlobalNorm."""

    def __init__(self, norm: nn.Module):
        self._apply = local_norm(norm)

    def observe(self, rows: Tensor) -> Tensor:
        return rows

    def write(self, rows: Tensor, out: Tensor) -> None:
        out.copy_(self._apply(upcast(rows)))


class GlobalNorm:
    """gLN: all rows must have been observed before the first can be normalised."""

    def __init__(self, norm: tasnet.GlobalLayerNorm):
        self.gamma, self.beta = norm.gamma.flatten(), norm.beta.flatten()
        # float64 accumulation: mean(x^2) - mean(x)^2 would cancel in float32.
        self._total = self.gamma.new_zeros((), dtype=torch.float64)
        self._total_squares = torch.zeros_like(self._total)
        self._count, self._moments = 0, None

    def observe(self, rows: Tensor) -> Tensor:
        # The rounding errors of row sums average out over many rows, but not over a few.
        exact = rows.double() if rows.numel() < 2**16 else upcast(rows)
        self._total += exact.sum(-1).double().sum()
        self._total_squares += torch.linalg.vector_norm(exact, dim=-1).double().square().sum()
        self._count += rows.numel()
        return rows

    def moments(self) -> tuple[float, float]:
        """Mean and 1 / standard deviation of all observed rows."""
        if self._moments is None:
            mean = self._total / self._count
            variance = (self._total_squares / self._count - mean.square()).clamp(min=0)
            self._moments = torch.stack([mean, torch.rsqrt(variance + tasnet.EPS)]).tolist()
        return self._moments

    def write(self, rows: Tensor, out: Tensor) -> None:
        mean, scale = self.moments()
        gain = self.gamma * scale
        torch.addcmul(self.beta - mean * gain, rows, gain, out=out)


class Projection:
    """A local norm, then a 1x1 convolution."""

    def __init__(self, norm: nn.Module, conv: nn.Conv1d):
        self._norm, self._linear = local_norm(norm), PackedLinear(conv.weight[:, :, 0])

    def __call__(self, rows: Tensor) -> Tensor:
        return self._linear(self._norm(rows))

    def add_to(self, residual: Tensor, update: Tensor) -> None:
        residual.add_(update)


class GlobalProjection:
    """gLN, then a 1x1 convolution, computed before the moments are known.

    W (gamma (x - mean) * scale + beta) = scale * (W gamma) x + a constant row: the call computes
    (W gamma) x, and `add_to` applies the scale and the constant.
    """

    def __init__(self, norm: tasnet.GlobalLayerNorm, conv: nn.Conv1d):
        self._norm, weight = GlobalNorm(norm), conv.weight[:, :, 0]
        scaled = weight * self._norm.gamma
        self._linear = PackedLinear(scaled)
        self._of_beta, self._of_gamma = weight @ self._norm.beta, scaled.sum(-1)

    def __call__(self, rows: Tensor) -> Tensor:
        return self._linear(self._norm.observe(rows))

    def add_to(self, residual: Tensor, update: Tensor) -> None:
        mean, scale = self._norm.moments()
        residual.add_(update, alpha=scale).add_(self._of_beta - mean * scale * self._of_gamma)
