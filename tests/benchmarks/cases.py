"""What is measured: a model and its input, and the work and the rate it is held against."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import textbook
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import measure_apart, stopwatch
from local.fast.rows import tile_size
from local.inference import separate
from local.tasnet import ConvTasNetStereo

RATE = 44100
SIZES = dict(N=256, B=256, H=512, X=10, R=4)  # of the published models
CONF = dict(L=20, P=3, C=2, audio_channels=2, samplerate=RATE, mask_nonlinear="relu")
MODELS = {
    "causal": dict(causal=True, norm_type="cLN"),
    "non-causal": dict(causal=False, norm_type="gLN"),
}
MATRIX_BURSTS, BURST = 10, 8


@dataclass(frozen=True)
class Case:
    """A model and its input, the same in every process that measures them."""

    device: str
    model: str
    seconds: float
    sizes: dict
    folder: Path

    @property
    def conf(self) -> dict:
        return {**CONF, **self.sizes, **MODELS[self.model]}

    @property
    def reference(self) -> Path:
        """Where the textbook's estimates are kept."""
        return self.folder / f"{self.device}-{self.model}-{self.seconds}.pt"

    def load(self) -> tuple[ConvTasNetStereo, Tensor]:
        """The model and a mixture (audio_channels, T), on the device."""
        torch.manual_seed(0)
        model = ConvTasNetStereo(**self.conf).eval()
        mixture = 0.1 * torch.randn(model.audio_channels, round(self.seconds * RATE))
        return model.to(self.device), mixture.to(self.device)


def measure(function: Callable[..., dict], case: Case, *args) -> dict:
    """On a CPU in a process of its own: a process's peak memory never falls."""
    if case.device != "cpu":
        return function(case, *args)
    return measure_apart(function, case, *args)


def choose_method(case: Case, model: ConvTasNetStereo, method: str) -> Callable[[Tensor], Tensor]:
    """A function from (audio_channels, T) to (C, audio_channels, T)."""
    if method != "textbook":
        return lambda mixture: separate(model, mixture, method)
    state, conf = model.state_dict(), case.conf
    return lambda mixture: textbook.separate(state, conf, mixture[None])[0]


def count_gflop(model: ConvTasNetStereo, samples: int) -> float:
    """What the convolutions and linear layers multiply and add, at 2 a pair."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv1d)]
    per_frame = sum(layer.weight.numel() for layer in layers)
    per_frame += model.C * model.decoder.basis_signals.weight.numel()
    frames = (samples - model.encoder.length) // model.encoder.hop + 1
    return 2e-9 * per_frame * frames


def matrix_rate(case: Case, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of the two products that are nearly all of the model's work, by themselves."""
    B, H, tile = case.sizes["B"], case.sizes["H"], tile_size(torch.device(case.device))
    shapes = (tile, B), (tile, H), (H, B), (B, H)
    narrow, wide, up, down = (torch.randn(s, device=case.device, dtype=dtype) for s in shapes)

    def multiply() -> None:
        for _ in range(BURST):  # so that starting and waiting for a GPU does not show
            F.linear(narrow, up)
            F.linear(wide, down)

    times = [stopwatch(case.device, multiply)[1] for _ in range(MATRIX_BURSTS)]
    return 4e-9 * tile * B * H * BURST / statistics.median(times)
