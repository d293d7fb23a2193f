"""The SDR of whole tracks, on their device: what validation logs beside its loss."""

import torch
from torch import Tensor

FLOOR = 1e-7  # the Music Demixing challenges add it to both energies
SAMPLES = 2**20  # at a time


def sum_sdr(estimates: Tensor, targets: Tensor) -> Tensor:
    """The SDR in dB of each target, summed over the tracks in which it is not silent, and in how
    many tracks that is.

    The SDR is 10 log10 of the energy of a target over that of its error, over all samples and
    channels: uSDR, equation 1 in Mitsufuji et al., "Music Demixing Challenge 2021" (Frontiers in
    Signal Processing 1, 2022).

    Shape:
        - estimates, targets: (M, C, channels, T)
        - output: (2, C)
    """
    energies = torch.full((2, *targets.shape[:2]), FLOOR, device=targets.device)
    for estimate, target in zip(
        estimates.float().split(SAMPLES, dim=-1),
        targets.float().split(SAMPLES, dim=-1),
        strict=True,
    ):
        parts = torch.stack([target, target - estimate])
        energies += parts.square().sum((-2, -1))
    is_heard = (targets != 0).any(-1).any(-1)
    sdr = 10 * torch.log10(energies[0] / energies[1])
    return torch.stack([torch.where(is_heard, sdr, 0).sum(0), is_heard.sum(0)])
