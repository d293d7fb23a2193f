"""Scores of whole tracks, without frames: uSDR and SI-SDR."""

from collections.abc import Iterator

import numpy as np

from local.eval.bsseval import energies, energy

FLOOR = 1e-7  # of uSDR: the challenges add it to both energies
EPS = 1e-8  # of SI-SDR, as in asteroid
SAMPLES = 2**12  # at a time: two stereo sources fit into the CPU's cache


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
    products = sum(_products(r, e) for r, e in _parts(references, estimates))
    of_reference, of_estimate, power, product = products
    count = references[0].size
    power = power - of_reference**2 / count
    scale = (product - of_reference * of_estimate / count) / (power + EPS)
    offset = (of_estimate - scale * of_reference) / count
    shape = -1, 1, 1
    noise = sum(
        energy(e - scale.reshape(shape) * r - offset.reshape(shape))
        for r, e in _parts(references, estimates)
    )
    return 10 * np.log10(scale**2 * power / (noise + EPS) + EPS)


def _products(reference: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Return the sums of the reference, the estimate, the square of the former, the product."""
    sums = reference.sum(axis=(1, 2)), estimate.sum(axis=(1, 2))
    return np.stack([*sums, energy(reference), np.einsum("stc,stc->s", reference, estimate)])


def _parts(references: np.ndarray, estimates: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield both in parts of SAMPLES, as float64."""
    for start in range(0, references.shape[1], SAMPLES):
        part = slice(start, start + SAMPLES)
        yield tuple(x[:, part].astype(np.float64, order="C") for x in (references, estimates))
