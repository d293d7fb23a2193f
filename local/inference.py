"""Separation of whole tracks: by overlap-add, in full, or as a stream."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn

from local.fast.choose import choose_batch_forward, choose_fast
from local.fast.full import separate_full
from local.fast.packed import autocast_to, find_precision_fault
from local.fast.rows import tile_size
from local.models import least_samples
from local.needs import count_windows
from local.streaming import StreamingConvTasNet, check_samples, find_stream_fault
from local.tasnet import ConvTasNetStereo
from local.tools.choices import METHODS, OVERLAP, PRECISIONS, SEGMENT
from local.tools.windows import batch_windows, cut_windows

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
    precision: str = PRECISIONS[0],
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
        precision: of the products, one of PRECISIONS; norms, the residual path, masks and estimates
            are float32 in the fast path, and as autocast has them in the model itself.

    Shape:
        - mixture: (audio_channels, T)
        - estimates: (C, audio_channels, T), on the device of the mixture and of its dtype; an
          array for an array

    Raises:
        ValueError: an argument is invalid; or the model cannot be streamed, differs from the fast
            path with fast="yes", or returns another shape; or the device has no bf16.
    """
    if isinstance(mixture, np.ndarray):
        tensor = torch.from_numpy(np.require(mixture, requirements=["C", "W"]))
        settings = method, segment, overlap, progress, fast, precision
        return separate(model, tensor, *settings).numpy()
    pieces = separate_blocks(model, [mixture], method, segment, overlap, progress, fast, precision)
    return _join(pieces, model, mixture)


@torch.no_grad()
def separate_blocks(
    model: nn.Module,
    blocks: Iterable[Tensor],
    method: str = "overlap-add",
    segment: float = SEGMENT,
    overlap: float = OVERLAP,
    progress: Progress | None = None,
    fast: str = "auto",
    precision: str = PRECISIONS[0],
) -> Iterator[Tensor]:
    """Separates a track that arrives in blocks; joined, the estimates are those of `separate`.

    The memory that "overlap-add" and "stream" need does not grow with the track. "full" reads all
    blocks before it starts.

    Args:
        see `separate`.

    Shape:
        - blocks: (audio_channels, T) each, of any T
        - estimates: (C, audio_channels, T') each; in all, as many samples as the blocks have

    Raises:
        ValueError: see `separate`.
    """
    is_fast = check_method(model, method, segment, overlap, fast, precision)
    blocks, progress = _check_blocks(model, blocks), progress or (lambda samples: None)
    if method == "overlap-add":
        pieces = _overlap_add(model, blocks, segment, overlap, progress, is_fast)
    elif is_fast:
        pieces = _run_fast(model, blocks, progress)
    else:
        pieces = _run_whole(model, blocks, progress)
    while True:
        with autocast_to(precision, next(model.parameters()).device):  # not what takes the pieces
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _check_blocks(model: nn.Module, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        if block.dim() != 2 or len(block) != model.audio_channels:
            raise ValueError(f"expected ({model.audio_channels}, time), got {tuple(block.shape)}")
        check_samples(block)
        yield block


def _join(pieces: Iterable[Tensor], model: nn.Module, mixture: Tensor) -> Tensor:
    """Joins the estimates of a mixture. They are allocated once, before its separation."""
    estimates, done = mixture.new_zeros(model.C, *mixture.shape), 0
    for piece in pieces:
        estimates[..., done : done + piece.shape[-1]] = piece
        done += piece.shape[-1]
    return estimates


def check_method(
    model: nn.Module,
    method: str,
    segment: float,
    overlap: float,
    fast: str = "auto",
    precision: str = PRECISIONS[0],
) -> bool:
    """Checks arguments of `separate`; returns whether it will use the fast path.

    Raises:
        ValueError: one of them is invalid, as in `separate`.
    """
    is_fast = choose_fast(model, fast)
    if fault := find_precision_fault(precision, next(model.parameters()).device):
        raise ValueError(fault)
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


def _run_fast(
    model: ConvTasNetStereo, blocks: Iterable[Tensor], progress: Progress
) -> Iterator[Tensor]:
    """The fast path on a whole track, as a stream if the model can be streamed."""
    if find_stream_fault(model):
        return separate_full(model, _concatenate(blocks), progress)
    return _stream(model, blocks, progress)


def _run_whole(model: nn.Module, blocks: Iterable[Tensor], progress: Progress) -> Iterator[Tensor]:
    """The model itself on a whole track."""
    if model.training:
        raise ValueError("expected a model in eval mode; call model.eval() first")
    mixture = _concatenate(blocks)
    yield run_model(model, mixture[None].to(next(model.parameters())))[0].to(mixture)
    progress(mixture.shape[-1])


def _concatenate(blocks: Iterable[Tensor]) -> Tensor:
    """Joins blocks without a copy of a single one."""
    blocks = list(blocks)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def run_model(model: nn.Module, mixtures: Tensor, forward: Callable | None = None) -> Tensor:
    """Runs the model, or a forward pass of it: (M, audio_channels, T) -> (M, C, audio_channels, T).

    Raises:
        ValueError: it returns another shape.
    """
    batch, channels, time = mixtures.shape
    if time == 0:
        return mixtures.new_zeros(batch, model.C, channels, 0)
    estimates = (forward or model)(mixtures)
    if estimates.shape != (batch, model.C, channels, time):
        raise ValueError(
            f"the model must give {(batch, model.C, channels, time)} for a mixture of"
            f" {tuple(mixtures.shape)}, got {tuple(estimates.shape)}"
        )
    return estimates


def _overlap_add(
    model: nn.Module,
    blocks: Iterable[Tensor],
    segment: float,
    overlap: float,
    progress: Progress,
    is_fast: bool,
) -> Iterator[Tensor]:
    """Windows end every segment * (1 + overlap) seconds, and each starts `overlap` seconds before
    the end of the one before it. There the two are crossfaded linearly, with both ends of the ramp
    included. The start and the end of the track are not faded.

    As published, an `overlap` that is no whole number of samples is rounded down for the fades, and
    up for the samples that two windows share: the earlier window does not fade in the first.
    """
    rate, like = model.samplerate, next(model.parameters())
    hop, fade = int(rate * segment * (1 + overlap)), int(rate * overlap)
    shared = hop - int(hop - overlap * rate)  # samples of two windows; fade or fade + 1
    make_ramp = partial(torch.linspace, 0, 1, fade, device=like.device)
    tail = None  # the end of the window before, faded out
    most = count_windows(model, hop + shared, like.device)
    forward = _choose_window_forward(model, is_fast)
    for mixtures, is_end in batch_windows(cut_windows(blocks, hop, shared), most):
        estimates = forward(mixtures.to(like))
        for number, window in enumerate(estimates, start=1):
            time = done = window.shape[-1]
            if tail is not None:
                window[..., :fade] *= make_ramp()
            if not is_end or number < len(estimates):
                window[..., time - fade :] *= 1 - make_ramp()
                done -= shared
            window = window.to(mixtures)
            if tail is not None:
                window[..., :shared] += tail
            tail = window[..., done:]
            progress(done)
            yield window[..., :done]


def _choose_window_forward(model: nn.Module, is_fast: bool) -> Callable[[Tensor], Tensor]:
    """From windows to their estimates: on a CPU one by one, on a GPU all at once."""

    def run_each(mixtures: Tensor) -> Tensor:
        pieces = [_run_fast(model, [mixture], lambda samples: None) for mixture in mixtures]
        return torch.stack(list(map(_join, pieces, repeat(model), mixtures)))

    if is_fast and next(model.parameters()).device.type == "cpu":
        return run_each
    return partial(run_model, model, forward=choose_batch_forward(model, is_fast))


def _stream(
    model: ConvTasNetStereo, blocks: Iterable[Tensor], progress: Progress
) -> Iterator[Tensor]:
    stream = StreamingConvTasNet(model)
    size = tile_size(next(model.parameters()).device) * model.encoder.hop
    for block, is_last in cut_windows(blocks, size):
        yield stream.push(block).to(block)
        progress(block.shape[-1])
        if is_last:
            yield stream.flush().to(block)
