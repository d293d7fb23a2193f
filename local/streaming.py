"""Streaming of the causal model: block by block, with low latency and constant memory."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from local.fast.equal import find_difference
from local.fast.packed import autocast_to, find_precision_fault, upcast
from local.fast.rows import RowModel, tile_size
from local.tasnet import ConvTasNetStereo
from local.tools.choices import PRECISIONS


def find_stream_fault(model: torch.nn.Module) -> str:
    """Why a model cannot be streamed; "" if it can."""
    if difference := find_difference(model):
        return f"only a model that the fast path equals can be streamed, not this one: {difference}"
    if model.causal and model.norm_type != "gLN":
        return ""
    kind = "causal" if model.causal else "non-causal"
    return (
        "only a causal model with norm_type cLN, BN or id can be streamed,"
        f" got a {kind} model with norm_type {model.norm_type}"
    )


class StreamingConvTasNet:
    """Separates a mixture that arrives in blocks of any size.

    Returned estimates are final; joined, they equal the model's output for the whole mixture.

    Args:
        model: causal, with cLN, BN or id, in eval mode, and equal to the fast path (see
            local/fast/equal.py); its weights must not change.
        precision: of the products, one of PRECISIONS.

    Raises:
        ValueError: the model cannot be streamed, or is in training mode; or its device has no bf16.
    """

    def __init__(self, model: ConvTasNetStereo, precision: str = PRECISIONS[0]):
        device = next(model.parameters()).device
        if fault := find_stream_fault(model) or find_precision_fault(precision, device):
            raise ValueError(fault)
        self._autocast = partial(autocast_to, precision, device)
        with self._autocast():
            self._model, self._rows = model, RowModel(model)
        self.reset()

    @property
    def latency(self) -> int:
        """The largest lag of the output behind the input, in samples."""
        return self._rows.length - 1

    @property
    def state_size(self) -> int:
        """The size of the state between two blocks, in bytes. It grows with the largest block."""
        channels, itemsize = self._pending.shape[:-1].numel(), self._pending.itemsize
        states = [self._tail, *(block.depthwise for block in self._rows.blocks)]
        return channels * self.latency * itemsize + sum(state.nbytes for state in states)

    def reset(self) -> None:
        """Clears the state: the next block begins a new mixture."""
        like = next(self._model.parameters())
        channels, rows = self._model.audio_channels, self._rows
        self._pending = like.new_zeros(channels, 0)  # samples from the next frame's first on
        self._tail = like.new_zeros(self._model.C, channels, rows.length - rows.hop)
        self._started = self._flushed = False
        for block in rows.blocks:
            block.depthwise.reset()

    @torch.no_grad()
    def push(self, block: Tensor) -> Tensor:
        """Takes the next samples; returns the estimates that are final now.

        Shape:
            - block: (audio_channels, T) or (M, audio_channels, T), any T
            - estimates, on the model's device: (C, audio_channels, T') or
              (M, C, audio_channels, T')

        Raises:
            ValueError: the block is not floating-point, holds NaN or infinity, has another shape
                than those before it, or comes after `flush`.
        """
        self._check_open()
        self._check_block(block)
        block = block.to(self._pending)
        if not self._started:
            self._started = True
            self._pending = self._pending.expand(*block.shape[:-1], -1)
            self._tail = self._tail.expand(*block.shape[:-2], -1, -1, -1)
        pieces = block.split(tile_size(block.device) * self._rows.hop, dim=-1)
        with torch.inference_mode(), self._autocast():
            estimates = [self._push_tile(piece) for piece in pieces]
        return torch.cat(estimates, dim=-1)  # outside, for tensors that autograd takes

    def _push_tile(self, block: Tensor) -> Tensor:
        rows = self._rows
        samples = torch.cat([self._pending, block], dim=-1)
        done = rows.count_frames(samples.shape[-1]) * rows.hop
        self._pending = samples[..., done:].clone()
        if done == 0:
            return self._tail[..., :0]
        weights = rows.encode(samples)
        residual = upcast(rows.bottleneck(weights))
        for layer in rows.blocks:
            layer.add_to(residual, layer.project(layer.expand(residual)))
        estimates = rows.decode(weights, residual)
        estimates[..., : self._tail.shape[-1]] += self._tail
        self._tail = estimates[..., done:].clone()
        return estimates[..., :done]

    def flush(self) -> Tensor:
        """Ends the mixture; returns the rest of the estimates, shaped as by `push`."""
        self._check_open()
        self._flushed = True
        # Samples after the last whole frame are zeros.
        return F.pad(self._tail, (0, self._pending.shape[-1] - self._tail.shape[-1]))

    def _check_open(self) -> None:
        if self._flushed:
            raise ValueError("the mixture ended with flush(); call reset() to begin another")

    def _check_block(self, block: Tensor) -> None:
        channels, started = self._model.audio_channels, self._pending.shape[:-1]
        if block.dim() not in (2, 3) or block.shape[-2] != channels:
            raise ValueError(
                f"expected ({channels}, time) or (batch, {channels}, time),"
                f" got {tuple(block.shape)}"
            )
        if self._started and block.shape[:-1] != started:
            raise ValueError(
                f"expected ({', '.join(map(str, started))}, time) as in the first block,"
                f" got {tuple(block.shape)}"
            )
        check_samples(block)


def check_samples(mixture: Tensor) -> None:
    """Raises a ValueError unless the samples are real, floating-point and finite."""
    if not mixture.is_floating_point():
        raise ValueError(f"expected floating-point samples, got {mixture.dtype}")
    for piece in mixture.split(2**20, dim=-1):  # isfinite() allocates a copy
        if not piece.isfinite().all():
            raise ValueError("the mixture holds NaN or infinity")
