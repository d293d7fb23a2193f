"""What the page shows of a signal: the peaks of its waveform, a log-mel spectrogram, loudness."""

from dataclasses import dataclass

import numpy as np
from scipy.fft import rfft

from local.lift.loudness import LoudnessMeter

COLUMNS = 1000  # of a waveform and a spectrogram, at most
MELS = 80
WINDOW = 2048  # samples
HOP = WINDOW // 2
FRAMES = 512  # to transform at a time
LOWEST, HIGHEST = 30, 16_000  # Hz
FLOOR = 1e-10  # of a power
BLOCK = 2**18  # samples, for the loudness


@dataclass(frozen=True)
class Analysis:
    """What is shown of a signal.

    Args:
        peaks: (columns, 2), the lowest and the highest sample of both channels.
        mel: (MELS, columns), power in dB, the lowest frequency first.
        loudness: in LUFS; -inf for silence.
    """

    peaks: np.ndarray
    mel: np.ndarray
    loudness: float


def analyse(samples: np.ndarray, rate: int) -> Analysis:
    """Analyse samples (channels, T)."""
    powers = _reduce(np.add, _measure_powers(samples, rate), COLUMNS, mean=True)
    decibels = 10 * np.log10(np.maximum(powers, FLOOR))
    return Analysis(find_peaks(samples), decibels.T, measure_loudness(samples, rate))


def measure_loudness(samples: np.ndarray, rate: int) -> float:
    """Return the loudness of samples (channels, T) in LUFS; -inf for silence."""
    meter = LoudnessMeter(rate, len(samples))
    for start in range(0, samples.shape[1], BLOCK):
        meter.add(samples[:, start : start + BLOCK].T)
    return meter.measure()


def find_peaks(samples: np.ndarray) -> np.ndarray:
    """Return (columns, 2): the lowest and the highest sample of (channels, T) in each column."""
    low = _reduce(np.minimum, samples.min(0), COLUMNS)
    high = _reduce(np.maximum, samples.max(0), COLUMNS)
    return np.stack([low, high], axis=1)


def match_loudness(loudness: list[float], most: float = 12) -> list[float]:
    """Return gains in dB, none above 0, that make signals as loud as the quietest.

    A signal that is more than `most` dB quieter than the loudest stays as it is, and the others are
    not brought down to it.

    Args:
        loudness: of each signal, in LUFS.
    """
    finite = [value for value in loudness if np.isfinite(value)]
    if not finite:
        return [0.0] * len(loudness)
    common = max(min(finite), max(finite) - most)
    return [min(0.0, common - value) if np.isfinite(value) else 0.0 for value in loudness]


def find_loudest(samples: np.ndarray, rate: int, seconds: int) -> int:
    """Return where the passage with the most power begins, in whole seconds."""
    whole = samples.shape[1] // rate
    if whole <= seconds:
        return 0
    powers = np.square(samples[:, : whole * rate]).reshape(len(samples), whole, rate).sum((0, 2))
    return int(np.argmax(np.convolve(powers, np.ones(seconds), "valid")))


def _measure_powers(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return the powers of frames (frames, MELS), summed over channels.

    Frame k is around sample k * HOP.
    """
    filters = mel_filters(np.fft.rfftfreq(WINDOW, 1 / rate), min(HIGHEST, rate / 2))
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    padded = np.pad(samples.astype(np.float32), ((0, 0), (WINDOW // 2, WINDOW)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)[:, ::HOP]
    frames = frames[:, : samples.shape[1] // HOP + 1]
    mel = []
    for start in range(0, frames.shape[1], FRAMES):
        spectra = rfft(frames[:, start : start + FRAMES] * window)
        mel.append((spectra.real**2 + spectra.imag**2).sum(0) @ filters)
    return np.concatenate(mel)


def mel_filters(frequencies: np.ndarray, highest: float) -> np.ndarray:
    """Return triangular filters (frequencies, MELS), each of area 1, from LOWEST to `highest` Hz.

    A filter narrower than the distance of two frequencies takes the nearest of them.
    """
    to_mel = 2595 * np.log10(1 + np.array([LOWEST, highest]) / 700)
    corners = 700 * (10 ** (np.linspace(*to_mel, MELS + 2) / 2595) - 1)
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies[:, None] - low) / (centre - low)
    falling = (high - frequencies[:, None]) / (high - centre)
    filters = np.maximum(np.minimum(rising, falling), 0)
    empty = filters.sum(0) == 0
    nearest = np.abs(frequencies[:, None] - centre).argmin(0)
    filters[nearest[empty], np.flatnonzero(empty)] = 1
    return (filters / filters.sum(0)).astype(np.float32)


def _reduce(function: np.ufunc, values: np.ndarray, parts: int, mean: bool = False) -> np.ndarray:
    """Reduce the first axis to at most `parts` of nearly equal length."""
    edges = np.linspace(0, len(values), min(parts, len(values)), endpoint=False).astype(int)
    reduced = function.reduceat(values, edges, axis=0)
    if not mean:
        return reduced
    counts = np.diff(edges, append=len(values))
    return reduced / counts.reshape(-1, *(1,) * (values.ndim - 1))
