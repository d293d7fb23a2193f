"""Stereo ConvTasNet, causal and non-causal.

The architecture of Luo & Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude
Masking for Speech Separation" (IEEE/ACM TASLP 2019), in the stereo form of Demucs v1 (Défossez et
al. 2019, itself after Kaituo Xu's implementation). Parameter names and their nesting are a contract
with the published Cadenza weights, which `ConvTasNetStereo.load` reads.

Letters in shapes: M batch, T samples, K frames, N basis signals, B bottleneck channels, H hidden
channels, C sources.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local.tools.arguments import find_wrong_choices, find_wrong_sizes
from local.tools.weights import HubModel

EPS = 1e-8
NORM_TYPES = ("gLN", "cLN", "BN", "id")
MASKS = ("relu", "softmax")


class ConvTasNetStereo(nn.Module, HubModel):
    """Splits a mixture into sources by masking a learned representation of its frames.

    Args:
        N: basis signals of the encoder and decoder.
        L: length of a basis signal, in samples; frames start every L // 2 samples.
        B: channels of the residual path (the bottleneck).
        H: channels inside a block.
        P: taps of the depthwise convolutions; odd unless `causal`.
        X: blocks in a repeat, with dilations 1, 2, 4, ... 2 ** (X - 1).
        R: repeats.
        C: sources.
        audio_channels: channels of the mixture and of every source.
        samplerate: in Hz; saved with the weights, not used by the network.
        norm_type: "gLN" (over channels and time), "cLN" (over channels, frame by frame), "BN"
            or "id" (none).
        causal: no block looks ahead. Only cLN, BN and id keep the whole network causal.
        mask_nonlinear: "relu", or "softmax" over the sources.

    Raises:
        ValueError: lists every invalid argument.
    """

    def __init__(
        self,
        N: int = 256,
        L: int = 20,
        B: int = 256,
        H: int = 512,
        P: int = 3,
        X: int = 8,
        R: int = 4,
        C: int = 4,
        audio_channels: int = 1,
        samplerate: int = 44100,
        norm_type: str = "gLN",
        causal: bool = False,
        mask_nonlinear: str = "relu",
    ):
        super().__init__()
        faults = find_wrong_sizes(N=N, B=B, H=H, P=P, X=X, R=R, C=C)
        faults += find_wrong_sizes(least=2, L=L)
        faults += find_wrong_sizes(audio_channels=audio_channels, samplerate=samplerate)
        faults += find_wrong_choices(NORM_TYPES, norm_type=norm_type)
        faults += find_wrong_choices(MASKS, mask_nonlinear=mask_nonlinear)
        faults += find_wrong_choices((True, False), causal=causal)
        if not causal and isinstance(P, int) and P % 2 == 0:
            faults.append(f"P must be odd unless the model is causal, got {P}")
        if faults:
            raise ValueError("; ".join(faults))
        if causal and norm_type == "gLN":
            warnings.warn(
                "causal with norm_type gLN: gLN normalises over the whole input, so the outputs"
                " depend on the future; use norm_type cLN for a causal model",
                stacklevel=2,
            )
        self.N, self.L, self.B, self.H = N, L, B, H
        self.P, self.X, self.R, self.C = P, X, R, C
        self.audio_channels, self.samplerate = audio_channels, samplerate
        self.norm_type, self.causal, self.mask_nonlinear = norm_type, causal, mask_nonlinear
        self.encoder = Encoder(L, N, audio_channels)
        self.separator = TemporalConvNet(N, B, H, P, X, R, C, norm_type, causal, mask_nonlinear)
        self.decoder = Decoder(N, L, audio_channels)
        # Over every parameter with more than one dimension, so gamma and beta (1, channels, 1)
        # start Xavier-normal too: that is how the published models began.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separates.

        Shape:
            - mixture: (M, audio_channels, T), any T
            - estimates: (M, C, audio_channels, T); source 0 is vocals, 1 accompaniment. Samples
              after the last whole frame are zeros, and so is everything where T < L.
        """
        if mixture.dim() != 3 or mixture.shape[1] != self.audio_channels:
            raise ValueError(
                f"expected (batch, {self.audio_channels}, time), got {tuple(mixture.shape)}"
            )
        batch, channels, time = mixture.shape
        if time < self.encoder.length:
            return mixture.new_zeros(batch, self.C, channels, time)
        weights = self.encoder(mixture)
        masks = self.separator(weights)
        estimates = self.decoder(weights, masks)
        return F.pad(estimates, (0, time - estimates.shape[-1]))

    def valid_length(self, length: int) -> int:
        """The input length to use for `length` samples: as published, the same."""
        return length

    @property
    def block_class(self) -> type[nn.Module]:
        """What `--memory some` recomputes in the backward pass: see local/fast/recompute.py."""
        return TemporalBlock


class Encoder(nn.Module):
    """Mixture to non-negative weights of N basis signals per frame (paper, section II-B).

    Shape:
        - mixture: (M, audio_channels, T) with T >= L
        - weights: (M, N, K), K = (T - L) // (L // 2) + 1
    """

    def __init__(self, L: int, N: int, audio_channels: int):
        super().__init__()
        self.length, self.hop = L, L // 2
        self.conv1d_U = nn.Conv1d(audio_channels, N, L, stride=self.hop, bias=False)

    def forward(self, mixture: Tensor) -> Tensor:
        return F.relu(self.conv1d_U(mixture))


class TemporalConvNet(nn.Module):
    """Weights to one mask per source (paper, section II-C, figure 1B); arguments as above.

    Shape:
        - weights: (M, N, K)
        - masks: (M, C, N, K)
    """

    def __init__(self, N, B, H, P, X, R, C, norm_type, causal, mask_nonlinear):
        super().__init__()
        self.C, self.mask_nonlinear = C, mask_nonlinear
        repeats = [
            nn.Sequential(*(TemporalBlock(B, H, P, 2**x, norm_type, causal) for x in range(X)))
            for _ in range(R)
        ]
        self.network = nn.Sequential(
            ChannelwiseLayerNorm(N),
            nn.Conv1d(N, B, 1, bias=False),
            nn.Sequential(*repeats),
            nn.Conv1d(B, C * N, 1, bias=False),
        )

    def forward(self, weights: Tensor) -> Tensor:
        batch, N, frames = weights.shape
        scores = self.network(weights).view(batch, self.C, N, frames)
        return scores.softmax(dim=1) if self.mask_nonlinear == "softmax" else scores.relu()


class TemporalBlock(nn.Module):
    """A residual block: 1x1 convolution up to H channels, then the depthwise part back to B.

    Shape:
        - input and output: (M, B, K)
    """

    def __init__(self, B: int, H: int, P: int, dilation: int, norm_type: str, causal: bool):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(B, H, 1, bias=False),
            nn.PReLU(),
            make_norm(norm_type, H),
            DepthwiseSeparableConv(H, B, P, dilation, norm_type, causal),
        )

    def forward(self, residual: Tensor) -> Tensor:
        return residual + self.net(residual)


class DepthwiseSeparableConv(nn.Module):
    """Dilated depthwise convolution, then a 1x1 convolution (paper, section II-C, figure 1C).

    Shape:
        - input: (M, H, K)
        - output: (M, B, K)
    """

    def __init__(self, H: int, B: int, P: int, dilation: int, norm_type: str, causal: bool):
        super().__init__()
        reach = (P - 1) * dilation
        padding = reach if causal else reach // 2
        depthwise = nn.Conv1d(H, H, P, padding=padding, dilation=dilation, groups=H, bias=False)
        # The chomp takes an index in the published models, so causal and non-causal names differ.
        chomp = [Chomp(reach)] if causal else []
        self.net = nn.Sequential(
            depthwise,
            *chomp,
            nn.PReLU(),
            make_norm(norm_type, H),
            nn.Conv1d(H, B, 1, bias=False),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.net(hidden)


class Chomp(nn.Module):
    """Cuts off the last `size` frames, which a causal convolution must not see."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, :, : hidden.shape[-1] - self.size]


class Decoder(nn.Module):
    """Masked weights to waveforms by overlap-add of basis signals (paper, section II-B).

    Shape:
        - weights: (M, N, K)
        - masks: (M, C, N, K)
        - estimates: (M, C, audio_channels, (K - 1) * (L // 2) + L)
    """

    def __init__(self, N: int, L: int, audio_channels: int):
        super().__init__()
        self.length, self.hop, self.audio_channels = L, L // 2, audio_channels
        self.basis_signals = nn.Linear(N, audio_channels * L, bias=False)

    def forward(self, weights: Tensor, masks: Tensor) -> Tensor:
        batch, sources, _, frames = masks.shape
        masked = (weights.unsqueeze(1) * masks).transpose(2, 3)
        signals = self.basis_signals(masked)  # (M, C, K, audio_channels * L)
        signals = signals.view(batch, sources, frames, self.audio_channels, self.length)
        return overlap_and_add(signals.transpose(2, 3), self.hop)


def overlap_and_add(frames: Tensor, hop: int) -> Tensor:
    """Sums frames that start every `hop` samples.

    Shape:
        - frames: (..., K, L)
        - output: (..., (K - 1) * hop + L)
    """
    *outer, count, length = frames.shape
    samples = (count - 1) * hop + length
    columns = frames.reshape(-1, count, length).transpose(1, 2)
    folded = F.fold(columns, (1, samples), kernel_size=(1, length), stride=(1, hop))
    return folded.view(*outer, samples)


class ChannelwiseLayerNorm(nn.Module):
    """cLN: over the channels, frame by frame, so it is causal (not cumulative).

    Shape:
        - input and output: (M, channels, K)
    """

    dims: tuple[int, ...] = (1,)

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        mean = hidden.mean(self.dims, keepdim=True)
        centred = hidden - mean
        variance = centred.square().mean(self.dims, keepdim=True)
        return self.gamma * centred / torch.sqrt(variance + EPS) + self.beta


class GlobalLayerNorm(ChannelwiseLayerNorm):
    """gLN: over channels and time (paper, section II-D)."""

    dims = (1, 2)


def make_norm(norm_type: str, channels: int) -> nn.Module:
    """The norm of that name (one of NORM_TYPES) for (M, channels, K)."""
    norms = {
        "gLN": GlobalLayerNorm,
        "cLN": ChannelwiseLayerNorm,
        "BN": nn.BatchNorm1d,
        "id": nn.Identity,
    }
    return norms[norm_type](channels)
