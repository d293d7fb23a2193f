"""Separation of whole songs with a model that was trained on segments."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SEGMENT = 6.0
OVERLAP = 0.1


@torch.no_grad()
def separate(
    model: nn.Module,
    mixture: Tensor,
    segment: float = SEGMENT,
    overlap: float = OVERLAP,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Separates window by window and crossfades, as the challenge's baseline does.

    A window opens every segment * (1 + overlap) seconds and reaches `overlap` seconds back into
    the one before; there the two are crossfaded linearly, both ends of the ramp included. The
    first window has nothing before it and the last nothing after it: the song's ends do not fade.

    Args:
        model: with attributes `C` and `samplerate`; on any device, in eval mode.
        mixture: stays where it is; windows travel to the model's device and back.
        segment: in seconds.
        overlap: in seconds, shorter than the segment.
        progress: called with the number of samples just finished.

    Shape:
        - mixture: (audio_channels, T)
        - estimates: (C, audio_channels, T)

    Raises:
        ValueError: the segment or the overlap cannot be.
    """
    hop = int(model.samplerate * segment * (1 + overlap))
    fade = int(model.samplerate * overlap)
    if not (0 <= overlap < segment and fade < hop):
        raise ValueError(f"expected 0 <= overlap < segment, got {overlap} and {segment} seconds")
    channels, time = mixture.shape
    device = next(model.parameters()).device
    ramp = torch.linspace(0, 1, fade, device=device)
    estimates = mixture.new_zeros(model.C, channels, time)
    for end in range(hop, max(time, 1) + hop, hop):
        start = max(end - hop - fade, 0)
        window = model(mixture[None, :, start:end].to(device))[0]
        if start > 0:
            window[..., :fade] *= ramp
        if end < time:
            window[..., window.shape[-1] - fade :] *= 1 - ramp
        estimates[..., start:end] += window.to(estimates.device)
        if progress:
            progress(min(end, time) - max(end - hop, 0))
    return estimates
