"""BSSEval v4: the same numbers as `museval.evaluate`, faster and in less memory.

Vincent, Gribonval & Févotte, "Performance measurement in blind audio source separation" (IEEE TASLP
14(4), 2006) define the ratios; in Stöter, Liutkus & Ito, "The 2018 Signal Separation Evaluation
Campaign" (LVA/ICA 2018, section 3) and here, one distortion filter serves the whole track.
"""

from collections.abc import Iterator
from functools import reduce

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import irfft, next_fast_len, rfft

RATIOS = ("SDR", "ISR", "SIR", "SAR")  # in the order in which museval returns them
TAPS = 512  # of the distortion filters
BLOCK = 4096  # samples in a transform
STEP = BLOCK - TAPS + 1  # samples of a transform that circular convolution leaves valid
BLOCKS_AT_ONCE = 13  # a second of audio; fits into the CPU's cache
MOST_SOURCES = 100  # as in museval


def bss_eval(
    references: np.ndarray, estimates: np.ndarray, window: float = 44100, hop: float = 44100
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return SDR, ISR, SIR and SAR in dB of every frame.

    Estimates are cut or zero-padded to the length of the references. A frame is NaN for all sources
    where the channels of a reference or an estimate sum to zero in all its samples. Samples after
    the last whole frame are used for the filters alone. Memory grows with the window.

    Args:
        window: length of a frame in samples; np.inf, or more than there are, for a single frame.
        hop: from the start of a frame to that of the next, in samples.

    Shape:
        - references, estimates: (sources, samples, channels)
        - output: four times (sources, frames), float64; empty where the input is

    Raises:
        ValueError: the shapes differ, a reference or an estimate is silent throughout (or its
            channels cancel out), window or hop is out of range, or (unlike museval) a sample is NaN
            or infinity.
    """
    references, estimates = np.atleast_3d(references), np.atleast_3d(estimates)
    estimates = _fit_length(estimates, references.shape[1])
    _check(references, estimates)
    if not references.size:
        return tuple(np.empty(0) for _ in range(4))
    frames = _frames(references.shape[1], window, hop)
    longest = max(frame.stop - frame.start for frame in frames)
    size = 2 * next_fast_len(-(-(longest + TAPS - 1) // 2), real=True)
    filters = _distortion_filters(references, estimates)
    responses = tuple(rfft(taps, size) for taps in filters)
    ratios = np.full((4, len(references), len(frames)), np.nan)
    for number, reference, estimate in _audible(references, estimates, frames):
        ratios[..., number] = _score_frame(reference, estimate, responses, size)
    return tuple(ratios)


def framewise_sdr(
    references: np.ndarray, estimates: np.ndarray, window: float = 44100, hop: float = 44100
) -> np.ndarray:
    """Return the SDR of `bss_eval` alone, which needs no filters.

    Shape:
        - references, estimates: (sources, samples, channels)
        - output: (sources, frames), float64
    """
    frames = _frames(references.shape[1], window, hop)
    sdr = np.full((len(references), len(frames)), np.nan)
    for number, reference, estimate in _audible(references, estimates, frames):
        sdr[:, number] = _decibels(*energies(reference, estimate))
    return sdr


def energies(references: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """Return the energies of the references and of the errors of the estimates.

    Shape:
        - references, estimates: (sources, samples, channels)
        - output: (2, sources), float64
    """
    references = references.astype(np.float64, copy=False)
    return np.stack([energy(references), energy(references - estimates)])


def energy(signals: np.ndarray) -> np.ndarray:
    """Return the sum of squares of each source: (sources, samples, channels) -> (sources,)."""
    return np.einsum("stc,stc->s", signals, signals)


def _fit_length(estimates: np.ndarray, time: int) -> np.ndarray:
    missing = time - estimates.shape[1]
    if missing > 0:
        estimates = np.pad(estimates, ((0, 0), (0, missing), (0, 0)))
    return estimates[:, :time]


def _check(references: np.ndarray, estimates: np.ndarray) -> None:
    if references.ndim != 3 or references.shape != estimates.shape:
        raise ValueError(
            "expected references and estimates of one shape (sources, samples, channels),"
            f" got {references.shape} and {estimates.shape}"
        )
    if len(references) > MOST_SOURCES:
        raise ValueError(f"expected at most {MOST_SOURCES} sources, got {len(references)}")
    for name, signals in {"reference": references, "estimate": estimates}.items():
        if signals.size and _any_silent(signals):
            raise ValueError(f"an entire {name} is silent, or its channels cancel out")


def _any_silent(signals: np.ndarray) -> bool:
    return any(map(is_silent, signals))


def is_silent(signal: np.ndarray) -> bool:
    """Tell whether the channels sum to zero in all samples of (samples, channels)."""
    return not any((part @ np.ones(part.shape[1])).any() for part in _parts(signal))


def _parts(signal: np.ndarray) -> Iterator[np.ndarray]:
    return (signal[start : start + BLOCK] for start in range(0, len(signal), BLOCK))


def _frames(time: int, window: float, hop: float) -> list[slice]:
    if not (window >= 1 and hop > 0):
        raise ValueError(f"expected window >= 1 and hop > 0 in samples, got {window} and {hop}")
    count = int(np.floor((time - window + hop) / hop)) if window < time else 1
    starts = [number * hop if number else 0 for number in range(count)]  # a hop may be infinite
    return [slice(int(start), int(min(start + window, time))) for start in starts]


def _audible(
    references: np.ndarray, estimates: np.ndarray, frames: list[slice]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (number, references, estimates) of the frames in which no signal is silent."""
    for number, frame in enumerate(frames):
        reference, estimate = references[:, frame], estimates[:, frame]
        if not (_any_silent(reference) or _any_silent(estimate)):
            yield number, reference, estimate


def _distortion_filters(references: np.ndarray, estimates: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the least-squares filters from references to estimates.

    Shape:
        - references, estimates: (sources, samples, channels)
        - output: (channels of all sources, channels, TAPS), from the channels of a reference to
          each channel of its own estimate; (channels of all sources, channels of all sources,
          TAPS), from all references to each channel of the estimates
    """
    sources, _, channels = references.shape
    count = sources * channels
    lags = _correlate(references, estimates)
    if not np.isfinite(lags).all():
        raise ValueError(
            "a reference or an estimate holds NaN, infinity, or squares beyond float64"
        )
    gram = _gram(lags[:, :count])
    targets = lags[:, count:].transpose(0, 2, 1).reshape(count * TAPS, count)
    own = []
    for first in range(0, count, channels):
        taps = slice(first * TAPS, (first + channels) * TAPS)
        own.append(_solve(gram[taps, taps], targets[taps, first : first + channels]))
    joint = _solve(gram, targets).reshape(count, TAPS, count)
    own = np.concatenate([x.reshape(channels, TAPS, channels) for x in own], axis=-1)
    return own.transpose(2, 0, 1), joint.transpose(2, 0, 1)


def _correlate(references: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """Return the sums over t of reference[t] signal[t + lag], for every pair of channels.

    Shape:
        - references, estimates: (sources, samples, channels)
        - output: (R, R + E, TAPS), R and E the channels of all references and estimates
    """
    total = 0
    for reference, estimate in zip(_blocks(references), _blocks(estimates), strict=True):
        signals = np.concatenate([reference, estimate], axis=1)
        spectra = rfft(signals, axis=0)
        total = total + rfft(reference[:STEP], BLOCK, axis=0).conj() @ spectra.transpose(0, 2, 1)
    return irfft(total, BLOCK, axis=0)[:TAPS].transpose(1, 2, 0)


def _blocks(signals: np.ndarray) -> Iterator[np.ndarray]:
    """Yield blocks of BLOCK samples every STEP, several at a time, with zeros beyond the end.

    Shape:
        - signals: (sources, samples, channels)
        - output: (BLOCK, channels of all sources, blocks)
    """
    sources, time, channels = signals.shape
    for first in range(0, time, BLOCKS_AT_ONCE * STEP):
        count = min(BLOCKS_AT_ONCE, -(-(time - first) // STEP))
        padded = np.zeros((sources, channels, count * STEP + TAPS - 1))
        part = signals[:, first : first + padded.shape[-1]].transpose(0, 2, 1)
        padded[..., : part.shape[-1]] = part
        views = sliding_window_view(padded.reshape(sources * channels, -1), BLOCK, axis=1)
        yield views[:, ::STEP].transpose(2, 0, 1)


def _gram(lags: np.ndarray) -> np.ndarray:
    """Turn (R, R, TAPS) correlations into (R x TAPS, R x TAPS) products of delayed references."""
    both_ways = np.concatenate([lags[..., :0:-1], lags.transpose(1, 0, 2)], axis=-1)
    # Row m of a Toeplitz matrix starts at lag -m.
    rows = sliding_window_view(both_ways, TAPS, axis=-1)[..., ::-1, :]
    count = len(lags) * TAPS
    return rows.transpose(0, 2, 1, 3).reshape(count, count)


def _solve(gram: np.ndarray, targets: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(gram + np.finfo(float).eps * np.eye(len(gram)), targets)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(gram, targets)[0]


def _score_frame(
    reference: np.ndarray, estimate: np.ndarray, responses: tuple[np.ndarray, ...], size: int
) -> np.ndarray:
    """Return SDR, ISR, SIR and SAR of a frame, which is cut out before it is filtered.

    The energies are those of spectra, by Parseval's theorem.

    Args:
        responses: of the filters of `_distortion_filters`.
        size: of the transforms, even; not less than a filtered frame.

    Shape:
        - reference, estimate: (sources, samples, channels)
        - output: (4, sources)
    """
    sources, _, channels = reference.shape
    true, estimated = _spectra(reference, size), _spectra(estimate, size)
    squares = []
    for number, (own_response, response) in enumerate(zip(*responses, strict=True)):
        first = number - number % channels
        own = _filter(own_response, true[first : first + channels])
        joint = _filter(response, true)
        parts = own - true[number], own, joint - own, joint, estimated[number] - joint
        squares.append([_energy(part) / size for part in parts])
    by_source = np.reshape(squares, (sources, channels, len(parts))).sum(axis=1)
    spatial, own, interference, joint, artifacts = by_source.T
    true, error = energies(reference, estimate)
    signals = np.stack([true, true, own, joint])
    return _decibels(signals, np.stack([error, spatial, interference, artifacts]))


def _spectra(signals: np.ndarray, size: int) -> np.ndarray:
    """Transform (sources, samples, channels) to (channels of all sources, size // 2 + 1)."""
    samples = signals.astype(np.float64).transpose(0, 2, 1)
    return rfft(samples.reshape(-1, samples.shape[-1]), size)


def _filter(responses: np.ndarray, spectra: np.ndarray) -> np.ndarray:
    """Return the sum of some spectra, each filtered by its response."""
    return reduce(np.add, map(np.multiply, responses, spectra))


def _energy(spectrum: np.ndarray) -> float:
    """Return the sum of squares over a spectrum and its mirror image, for an even size."""
    ends = spectrum[[0, -1]]
    return 2 * np.vdot(spectrum, spectrum).real - np.vdot(ends, ends).real


def _decibels(signal: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distortion == 0, np.inf, 10 * np.log10(signal / distortion))
