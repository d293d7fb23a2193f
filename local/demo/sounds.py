"""The sounds of the demo: (samples,) while mono, (2, samples) once panned. Times are in seconds."""

import numpy as np
from numpy.random import Generator
from scipy.signal import butter, fftconvolve, sosfilt

RATE = 44100
# Five formants, in Hz, of a sung a, e, i, o and u; then their bandwidths in Hz and their gains.
VOWELS = np.array(
    [
        (750, 1150, 2800, 3500, 4950),
        (450, 1700, 2700, 3550, 4950),
        (320, 1900, 2800, 3600, 4950),
        (450, 820, 2750, 3500, 4950),
        (340, 700, 2650, 3500, 4950),
    ]
)
FORMANT_WIDTHS = np.array([90, 110, 140, 170, 220])
FORMANT_GAINS = np.array([1.0, 0.6, 0.35, 0.3, 0.12])
CURVE_RATE = 210  # values a second of the curves that control the voice


def resonate(
    frequency: np.ndarray, formants: np.ndarray, loudness: np.ndarray, tilt: float, samples: int
) -> np.ndarray:
    """Return a voice: the harmonics up to 8 kHz of a gliding tone, with gains by its formants.

    Args:
        tilt: the larger, the softer the high harmonics.

    Shape:
        - frequency: (K,) in Hz, at CURVE_RATE
        - formants: (K, 5) in Hz
        - loudness: (K,)
        - output: (samples,)
    """
    turn = np.exp(2j * np.pi / RATE * np.cumsum(at_audio_rate(frequency, samples)))
    voice, phasor = np.zeros(samples), np.ones(samples, complex)
    for harmonic in range(1, int(8000 / frequency.max()) + 1):
        phasor *= turn
        distance = (harmonic * frequency[:, None] - formants) / (FORMANT_WIDTHS / 2)
        gain = loudness * (FORMANT_GAINS / np.hypot(1, distance)).sum(axis=1) / harmonic**tilt
        voice += at_audio_rate(gain, samples) * phasor.imag
    return voice


def kick(rng: Generator) -> np.ndarray:
    """Return a sine whose frequency falls fast."""
    time = np.arange(int(0.4 * RATE)) / RATE
    fall = rng.uniform(0.02, 0.05)
    cycles = rng.uniform(45, 65) * time - rng.uniform(100, 250) * fall * np.exp(-time / fall)
    return np.sin(2 * np.pi * cycles) * np.exp(-time / rng.uniform(0.08, 0.15))


def tone(note: float, seconds: float, tilt: float, decay: float, attack: float) -> np.ndarray:
    """Return twelve partials that decay, the high ones faster; `tilt` softens the high ones."""
    time = np.arange(int(seconds * RATE)) / RATE
    partial = np.arange(1, 13)[:, None]
    strength = np.exp(-time * np.sqrt(partial) / decay) / partial**tilt
    ends = np.clip(np.minimum(time, time[-1] - time) / attack, 0, 1)
    return ends * (strength * np.sin(2 * np.pi * hertz(note) * partial * time)).sum(axis=0)


def burst(rng: Generator, decay: float, low: float, high: float) -> np.ndarray:
    """Return decaying noise between two frequencies in Hz."""
    time = np.arange(int(5 * decay * RATE)) / RATE
    return noise(rng, len(time), low, high) * np.exp(-time / decay)


def noise(rng: Generator, samples: int, low: float, high: float) -> np.ndarray:
    band = butter(2, (low, high), "bandpass", fs=RATE, output="sos")
    return at_unit_level(sosfilt(band, rng.normal(size=samples)))


def arrange(hits: list[tuple[float, object, float]], sounds: dict, samples: int) -> np.ndarray:
    """Return the sum of all hits, each a start, a key of `sounds` (2, n), and a loudness."""
    track = np.zeros((2, samples))
    for start, which, loudness in hits:
        here = track[:, round(start * RATE) :]
        sound = sounds[which][:, : here.shape[1]]
        here[:, : sound.shape[1]] += loudness * sound
    return track


def pan(mono: np.ndarray, side: float) -> np.ndarray:
    """Place (n,) in stereo, (2, n) of the same power. `side` is from -1, left, to 1, right."""
    angle = np.pi / 4 * (1 + side)
    return np.stack([np.cos(angle) * mono, np.sin(angle) * mono])


def in_room(rng: Generator, dry: np.ndarray, wet: float) -> np.ndarray:
    """Add reverberation, other for each channel, of `wet` times the level of the sound."""
    time = np.arange(int(0.4 * RATE)) / RATE
    response = rng.normal(size=(2, len(time))) * np.exp(-time / 0.08)
    echo = fftconvolve(dry, response, axes=1)[:, : dry.shape[1]]
    return dry + wet * level(dry) * at_unit_level(echo)


def smooth(curve: np.ndarray, seconds: float) -> np.ndarray:
    """Return the moving average of a curve (K,) under a raised cosine of that length."""
    half = round(seconds * CURVE_RATE / 2)
    window = np.hanning(2 * half + 3)[1:-1]
    return np.convolve(np.pad(curve, half, mode="edge"), window / window.sum(), mode="valid")


def at_audio_rate(curve: np.ndarray, samples: int) -> np.ndarray:
    return np.interp(np.arange(samples) * CURVE_RATE / RATE, np.arange(len(curve)), curve)


def within_octave(note: int, lowest: int) -> int:
    """Return the note of that name among the twelve from `lowest` up."""
    return lowest + (note - lowest) % 12


def hertz(note):
    return 440 * 2 ** ((note - 69) / 12)


def level(audio: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(audio**2)))


def at_unit_level(audio: np.ndarray) -> np.ndarray:
    return audio / level(audio)
