"""Scores of whole tracks, without frames: uSDR and SI-SDR."""

from collections.abc import Iterator

import numpy as np

from local.eval.bsseval import energies

FLOOR = 1e-7  # of uSDR: the challenges add it to both energies
EPS = 1e-8  # of SI-SDR, as in asteroid
SAMPLES = 2**16  # at a time


def usdr(references: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """Return the SDR of whole tracks in dB, as in the Music Demixing challenges.

    Mitsufuji et al., "Music Demixing Challenge 2021" (Frontiers in Signal Processing 1, 2022),
    equation 1.

    Shape:
        - references, estimates: (sources, samples, channels)
        - output: (sources,)
    """
    total = sum(energies(*parts) for parts in _parts(references, estimates))
    return 10 * np.log10(np.divide(*(total + FLOOR)))


def si_sdr(references: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """Return the scale-invariant SDR of whole tracks in dB.

    Le Roux et al., "SDR - half-baked or well done?" (ICASSP 2019), with asteroid's constants. All
    channels of a source are one signal, whose mean is removed.

    Shape:
        - references, estimates: (sources, samples, channels)
        - output: (sources,)
    """
    totals = sum(np.stack([_sum(r), _sum(e)]) for r, e in _parts(references, estimates))
    means = totals[..., None, None] / references[0].size

    def centred() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((r - means[0], e - means[1]) for r, e in _parts(references, estimates))

    products = sum(np.stack([_sum(r * e), _sum(r * r)]) for r, e in centred())
    scale = (products[0] / (products[1] + EPS))[:, None, None]
    signal, noise = sum(
        np.stack([_sum((scale * r) ** 2), _sum((e - scale * r) ** 2)]) for r, e in centred()
    )
    return 10 * np.log10(signal / (noise + EPS) + EPS)


def _parts(references: np.ndarray, estimates: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield both in parts of SAMPLES, as float64."""
    for start in range(0, references.shape[1], SAMPLES):
        part = slice(start, start + SAMPLES)
        yield tuple(x[:, part].astype(np.float64) for x in (references, estimates))


def _sum(signals: np.ndarray) -> np.ndarray:
    return signals.sum(axis=(1, 2))
