"""Separation of whole tracks: by overlap-add, in full, or as a stream."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from local.fast.choose import choose_fast
from local.fast.rows import RowBlock, RowModel, product_dtype, tile_size
from local.models import least_samples
from local.streaming import StreamingConvTasNet, check_samples, find_stream_fault
from local.tasnet import ConvTasNetStereo
from local.tools.choices import METHODS, OVERLAP, SEGMENT

Progress = Callable[[int], object]


@torch.no_grad()
def separate(
    model: nn.Module,
    mixture: Tensor | np.ndarray,
    method: str = "overlap-add",
    segment: float = SEGMENT,
    overlap: float = OVERLAP,
    progress: Progress | None = None,
    fast: str = "auto",
) -> Tensor | np.ndarray:
    """Separates a track.

    - "overlap-add": window by window with crossfades, as the challenge's baseline does.
    - "full": the model's output for the whole track at once; the fast path (see local/fast) needs a
      fraction of the memory.
    - "stream": the same in constant memory, for a causal model without gLN; needs the fast path.

    Args:
        model: in eval mode, on any device; maps (M, audio_channels, T) to
            (M, C, audio_channels, T) and has C, audio_channels and samplerate as attributes.
        mixture: may be on another device than the model; pieces of it are copied.
        method: one of METHODS.
        segment: in seconds, for "overlap-add".
        overlap: in seconds, less than `segment`, for "overlap-add".
        progress: called with the number of samples just finished.
        fast: "auto" uses the fast path if it equals the model, "yes" refuses a model that it does
            not equal, "no" runs the model itself.

    Shape:
        - mixture: (audio_channels, T)
        - estimates: (C, audio_channels, T), on the device of the mixture and of its dtype; an
          array for an array

    Raises:
        ValueError: an argument is invalid; or the model cannot be streamed, differs from the fast
            path with fast="yes", or returns another shape.
    """
    if isinstance(mixture, np.ndarray):
        tensor = torch.from_numpy(np.require(mixture, requirements=["C", "W"]))
        return separate(model, tensor, method, segment, overlap, progress, fast).numpy()
    if mixture.dim() != 2 or len(mixture) != model.audio_channels:
        raise ValueError(f"expected ({model.audio_channels}, time), got {tuple(mixture.shape)}")
    check_samples(mixture)
    is_fast = check_method(model, method, segment, overlap, fast)
    progress = progress or (lambda samples: None)
    if method == "overlap-add":
        return _overlap_add(model, mixture, segment, overlap, progress, is_fast)
    if not is_fast:
        return _run_whole(model, mixture, progress)
    return _run_fast(model, mixture, progress)


def _run_fast(model: ConvTasNetStereo, mixture: Tensor, progress: Progress) -> Tensor:
    """The fast path on a whole track, as a stream if the model can be streamed."""
    return (_full if find_stream_fault(model) else _stream)(model, mixture, progress)


def check_method(
    model: nn.Module, method: str, segment: float, overlap: float, fast: str = "auto"
) -> bool:
    """Checks arguments of `separate`; returns whether it will use the fast path.

    Raises:
        ValueError: one of them is invalid, as in `separate`.
    """
    is_fast = choose_fast(model, fast)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "overlap-add":
        if not 0 <= overlap < segment < 1e9:
            raise ValueError(
                f"expected 0 <= overlap < segment < 1e9 seconds, got overlap {overlap} and segment"
                f" {segment}"
            )
        least, rate = least_samples(model), model.samplerate
        if segment * rate < least:
            raise ValueError(
                f"segment must be at least {least / rate:.6f} seconds, the length of the model's"
                f" filters, got {segment}"
            )
    if method == "stream":
        if fast == "no":
            raise ValueError("method stream needs the fast path; use fast auto or yes")
        if fault := find_stream_fault(model):
            raise ValueError(fault)
    return is_fast


def _run_whole(model: nn.Module, mixture: Tensor, progress: Progress) -> Tensor:
    """The model itself on a whole track."""
    if model.training:
        raise ValueError("expected a model in eval mode; call model.eval() first")
    estimates = run_model(model, mixture[None].to(next(model.parameters())))[0]
    progress(mixture.shape[-1])
    return estimates.to(mixture)


def run_model(model: nn.Module, mixtures: Tensor) -> Tensor:
    """Runs the model: (M, audio_channels, T) -> (M, C, audio_channels, T).

    Raises:
        ValueError: it returns another shape.
    """
    batch, channels, time = mixtures.shape
    if time == 0:
        return mixtures.new_zeros(batch, model.C, channels, 0)
    estimates = model(mixtures)
    if estimates.shape != (batch, model.C, channels, time):
        raise ValueError(
            f"the model must give {(batch, model.C, channels, time)} for a mixture of"
            f" {tuple(mixtures.shape)}, got {tuple(estimates.shape)}"
        )
    return estimates


def _overlap_add(
    model: nn.Module,
    mixture: Tensor,
    segment: float,
    overlap: float,
    progress: Progress,
    is_fast: bool,
) -> Tensor:
    """Windows end every segment * (1 + overlap) seconds, and each starts `overlap` seconds before
    the end of the one before it. There the two are crossfaded linearly, with both ends of the ramp
    included. The start and the end of the track are not faded.
    """
    rate, time = model.samplerate, mixture.shape[-1]
    hop, fade = int(rate * segment * (1 + overlap)), int(rate * overlap)
    like = next(model.parameters())
    ends = range(hop, max(time, 1) + hop, hop)
    spans = [(max(end - hop - fade, 0), min(end, time)) for end in ends]
    ramp = torch.linspace(0, 1, fade if len(spans) > 1 else 0, device=like.device)
    estimates = mixture.new_zeros(model.C, *mixture.shape)
    for group in _group_spans(spans, count_windows(like.device)):
        mixtures = torch.stack([mixture[:, start:end] for start, end in group])
        windows = _forward(model, mixtures.to(like), is_fast)
        for (start, end), window in zip(group, windows, strict=True):
            if start > 0:
                window[..., :fade] *= ramp
            if end < time:
                window[..., window.shape[-1] - fade :] *= 1 - ramp
            estimates[..., start:end] += window.to(estimates)
            progress(end - start - (fade if start > 0 else 0))
    return estimates


def count_windows(device: torch.device) -> int:
    """Windows in a batch: on a CPU, more than one gains nothing."""
    return 1 if device.type == "cpu" else 4


def _group_spans(spans: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of up to `most` consecutive windows of one length: gLN would average over padding."""
    group = []
    for start, end in spans:
        if group and (len(group) == most or group[0][1] - group[0][0] != end - start):
            yield group
            group = []
        group.append((start, end))
    yield group


def _forward(model: nn.Module, mixtures: Tensor, is_fast: bool) -> Tensor:
    """Separates windows, by the fast path on a CPU only: on a GPU, whole windows are faster."""
    if is_fast and mixtures.device.type == "cpu":
        whole = [_run_fast(model, mixture, lambda samples: None) for mixture in mixtures]
        return torch.stack(whole)
    return run_model(model, mixtures)


def _stream(model: ConvTasNetStereo, mixture: Tensor, progress: Progress) -> Tensor:
    stream, done = StreamingConvTasNet(model), 0
    estimates = mixture.new_zeros(model.C, *mixture.shape)
    block_size = tile_size(next(model.parameters()).device) * model.encoder.hop
    for block in mixture.split(block_size, dim=-1):
        final = stream.push(block)
        estimates[..., done : done + final.shape[-1]] = final
        done += final.shape[-1]
        progress(block.shape[-1])
    estimates[..., done:] = stream.flush()
    return estimates


def _full(model: ConvTasNetStereo, mixture: Tensor, progress: Progress) -> Tensor:
    """Layer by layer, each over all tiles, since gLN averages over the whole track.

    Two tensors have the length of the track: the residual, and a buffer for the hidden channels of
    a block. The block's update of the residual overwrites rows of the buffer that are not needed
    any more.
    """
    rows, like, time = RowModel(model), next(model.parameters()), mixture.shape[-1]
    estimates = mixture.new_zeros(model.C, *mixture.shape)
    frames, size = rows.count_frames(time), tile_size(like.device)
    if frames == 0:
        progress(time)
        return estimates
    tiles = [slice(start, min(start + size, frames)) for start in range(0, frames, size)]
    spans = [slice(t.start * rows.hop, (t.stop - 1) * rows.hop + rows.length) for t in tiles]
    residual = like.new_zeros(frames, rows.B)
    buffer = like.new_empty(frames, max(rows.B, rows.H), dtype=product_dtype(like))
    hidden, update = buffer[:, : rows.H], buffer[:, : rows.B]

    for tile, span in zip(tiles, spans, strict=True):
        update[tile] = rows.bottleneck(rows.encode(mixture[:, span].to(like)))
    layer = rows.bottleneck
    for number, block in enumerate(rows.blocks):
        for tile in tiles:
            layer.add_to(residual[tile], update[tile])
            hidden[tile] = block.expand(residual[tile])
        done = 0
        for new in _updates(block, hidden, tiles):
            update[done : done + len(new)] = new
            done += len(new)
        layer = block
        progress(time * (number + 1) // len(rows.blocks) - time * number // len(rows.blocks))
    for tile, span in zip(tiles, spans, strict=True):
        layer.add_to(residual[tile], update[tile])
        weights = rows.encode(mixture[:, span].to(like))
        estimates[..., span] += rows.decode(weights, residual[tile]).to(estimates)
    return estimates


def _updates(block: RowBlock, hidden: Tensor, tiles: list[slice]) -> Iterator[Tensor]:
    for tile in tiles:
        yield block.project(hidden[tile])
    yield block.finish()
