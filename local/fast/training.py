"""The model's forward pass for training: the same numbers in a fraction of the time and memory.

local/tasnet.py is the definition, and tests hold this to it. Frames are rows, (M, K, channels), so
every 1x1 convolution is one matrix product, and a block is one node of the autograd graph.

Letters in shapes are those of local.tasnet.
"""

from __future__ import annotations  # an edited local/tasnet.py need not have these classes

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from local import tasnet
from local.fast.block import (
    BlockFunction,
    BlockMoments,
    BlockPasses,
    BlockShape,
    BlockWeights,
    Scratch,
)
from local.fast.layers import Moments
from local.fast.packed import upcast
from local.fast.recompute import keep_buffers
from local.fast.rows import decode, embed, encode
from local.tools.choices import MEMORY


class TrainingForward:
    """What `model` computes in training mode, up to rounding, with the same gradients.

    Under autocast the products and the saved tensors are of its dtype; the statistics of the norms,
    the residual path and the estimates stay float32.

    Args:
        model: its parameters are used where they are, and the statistics of its BN updated.
        memory: how much the backward pass recomputes. "none": only what lies between the products,
            so that a block saves three tensors; "some": everything but the input of each block;
            "most": everything but the input of each repeat.
        compiled: let torch.compile fuse what lies between the products, and the two ends of the
            model; the first step then takes up to a minute.
        kernels: run what lies between the products by the Triton kernels of local/fast/gpu.py,
            compiled or not. See `choose.find_kernel_fault` for where they work.

    Raises:
        ValueError: `memory` is none of MEMORY.
    """

    def __init__(
        self,
        model: tasnet.ConvTasNetStereo,
        memory: str = "some",
        compiled: bool = False,
        kernels: bool = False,
    ):
        if memory not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
        fuse = torch.compile if compiled else lambda function: function
        self._model, self._memory, self._compiled = model, memory, compiled
        self._batch_norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm1d)]
        self._start, self._end = fuse(_start), fuse(decode)
        self._passes = BlockPasses(*map(fuse, BlockPasses()))
        if kernels:
            from local.fast import gpu  # needs Triton

            self._passes = gpu.PASSES

    def __call__(self, mixture: Tensor) -> Tensor:
        """Separates.

        Shape:
            - mixture: (M, audio_channels, T)
            - estimates: (M, C, audio_channels, T)
        """
        is_short = mixture.shape[-1] < self._model.encoder.length
        if is_short or not all(norm.training for norm in self._batch_norms):
            return self._model(mixture)  # no frame, or the frozen statistics of BN
        weights, residual = self._start(self._model, mixture)
        scratch = self._make_scratch(residual)
        with torch.cuda.device_of(residual):  # Triton takes the current device
            for repeat in self._model.separator.network[2]:
                residual = self._run(repeat, residual, scratch)
        estimates = self._end(self._model, weights, residual)
        return F.pad(estimates, (0, mixture.shape[-1] - estimates.shape[-1]))

    def _make_scratch(self, residual: Tensor) -> Scratch:
        """Buffers on a CPU, where new memory costs more than the pass that fills it; none on a GPU,
        whose memory torch caches, and none for a compiler, which avoids most of them.
        """
        device = residual.device.type
        if self._compiled or device != "cpu" or torch.is_autocast_enabled(device):
            return Scratch()
        H = self._model.separator.network[2][0][0].net[0].out_channels
        buffers = residual.new_empty(len(Scratch()), *residual.shape[:2], H)
        return Scratch(*buffers.unbind())

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
        norm_type, saves_all = self._model.norm_type, self._memory == "none"
        update = None
        for block in repeat:
            shape, weights = BlockShape.of(block, norm_type), BlockWeights.of(block)
            residual, update, *moments = BlockFunction.apply(
                self._passes, saves_all, scratch, shape, residual, update, *weights
            )
            if norm_type == "BN":
                moments, frames = BlockMoments(*moments), residual.shape[0] * residual.shape[1]
                _update_statistics(block.net[2], moments.before(), frames)
                _update_statistics(block.net[3].net[-2], moments.after(), frames)
        return residual + update


def allow_tf32_products() -> None:
    """Lets float32 matrix products use TF32 on a GPU where torch's convolutions may: here, a 1x1
    convolution is a product.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32


def _start(model: tasnet.ConvTasNetStereo, mixture: Tensor) -> tuple[Tensor, Tensor]:
    weights = encode(model, mixture)
    return weights, upcast(embed(model, weights))


@torch.no_grad()
def _update_statistics(norm: nn.BatchNorm1d, moments: Moments, frames: int) -> None:
    """Moves the running statistics towards those of a batch, as BN does in training mode."""
    if norm.track_running_stats:
        mean, scale = moments
        variance = (scale.square().reciprocal() - norm.eps) * (frames / max(frames - 1, 1))
        norm.running_mean.lerp_(mean.flatten(), norm.momentum)
        norm.running_var.lerp_(variance.flatten(), norm.momentum)
        norm.num_batches_tracked += 1
