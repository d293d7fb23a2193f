"""One push of the causal model as a module without memory of its own, to be exported.

It calls the parts of the model and adds what a stream needs between them: the state, which comes in
as tensors and goes out as those for the next push. local/streaming.py does the same in PyTorch.

Letters in shapes are those of local.tasnet; S is the latency and G the frames that all blocks
together look back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local.streaming import find_stream_fault
from local.tasnet import ConvTasNetStereo

STATES = ("samples", "frames", "context", "overlap")


class StreamStep(nn.Module):
    """Separates a block of whole hops. Every push gives as many samples as it takes.

    The estimates lag `latency` samples behind the mixture: those of the first push begin with so
    many zeros. Once a mixture has ended, the overlap continues its estimates.

    Args:
        model: causal, with cLN, BN or id, and equal to the fast path (see local/fast/equal.py).

    Raises:
        ValueError: the model cannot be streamed.
    """

    def __init__(self, model: ConvTasNetStereo):
        super().__init__()
        if fault := find_stream_fault(model):
            raise ValueError(fault)
        self.model = model
        self.length, self.hop = model.encoder.length, model.encoder.hop
        # How many hops a frame reaches beyond that in which it starts.
        self.lag = -(-(self.length - self.hop) // self.hop)
        self.blocks = [block for repeat in model.separator.network[2] for block in repeat]
        self.reaches = [find_reach(block) for block in self.blocks]

    @property
    def latency(self) -> int:
        return self.lag * self.hop

    def make_states(self) -> tuple[Tensor, ...]:
        """The state before the first push, zeros.

        Shape:
            - samples: (1, audio_channels, S), the last ones of the mixture
            - frames: (1,), how many there were, counted up to those of the latency
            - context: (1, H, G), the last frames of each block, one block after the other
            - overlap: (1, C, audio_channels, L - hop), the end of the last frame
        """
        model = self.model
        return (
            torch.zeros(1, model.audio_channels, self.latency),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, model.H, sum(self.reaches)),
            torch.zeros(1, model.C, model.audio_channels, self.length - self.hop),
        )

    def forward(
        self, mixture: Tensor, samples: Tensor, frames: Tensor, context: Tensor, overlap: Tensor
    ) -> tuple[Tensor, ...]:
        """Takes a block and the state.

        Shape:
            - mixture: (1, audio_channels, K * hop)
            - estimates: (1, C, audio_channels, K * hop), followed by the next state
        """
        hops = mixture.unflatten(-1, (-1, self.hop))  # fails for other blocks
        samples = torch.cat([samples, hops.flatten(-2)], dim=-1)
        weights = self.model.encoder(samples)
        new = weights.shape[-1]
        # The first frames begin before the mixture does, where the model has none.
        is_frame = (frames + torch.arange(new) >= self.lag).to(weights.dtype)
        weights = weights * is_frame
        masks, context = self._separate(weights, is_frame, context)
        estimates = self.model.decoder(weights, masks)
        estimates = estimates + F.pad(overlap, (0, new * self.hop))
        return (
            estimates[..., : new * self.hop],
            samples[..., new * self.hop :],
            (frames + new).clamp(max=self.lag),
            context,
            estimates[..., new * self.hop :],
        )

    def _separate(
        self, weights: Tensor, is_frame: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor]:
        """TemporalConvNet: (1, N, K) -> masks (1, C, N, K), and the next context."""
        separator, kept, start = self.model.separator, [], 0
        norm, bottleneck, _, to_masks = separator.network
        residual = bottleneck(norm(weights))
        for block, reach in zip(self.blocks, self.reaches, strict=True):
            expand, activation, norm, separable = block.net
            hidden = norm(activation(expand(residual))) * is_frame
            hidden = torch.cat([context[..., start : start + reach], hidden], dim=-1)
            kept.append(hidden[..., weights.shape[-1] :])
            conv, after_chomp = separable.net[0], separable.net[2:]
            mixed = F.conv1d(hidden, conv.weight, dilation=conv.dilation, groups=conv.groups)
            residual = residual + after_chomp(mixed)
            start += reach
        scores = to_masks(residual).unflatten(1, (separator.C, -1))
        masks = scores.softmax(dim=1) if separator.mask_nonlinear == "softmax" else scores.relu()
        return masks, torch.cat(kept, dim=-1)


def find_reach(block: nn.Module) -> int:
    """How many frames a TemporalBlock looks back."""
    conv = block.net[3].net[0]
    return (conv.kernel_size[0] - 1) * conv.dilation[0]
