"""The losses that can be trained with: functions of estimates and targets. Add your own to LOSSES.

Both are (M, C, channels, T). Validation takes the same loss of whole tracks.
"""

import torch
from asteroid.losses import singlesrc_neg_sisdr
from torch import Tensor, nn

from local.sdr import FLOOR


class SDRLoss(nn.Module):
    """The negative SDR in dB over all channels and samples of a source, the mean over sources.

    FLOOR is added to both energies, as in `val_sdr_vocals`. So the loss of a silent source is
    finite, and still tells a quieter estimate from a louder one.
    """

    is_in_decibels = True  # and so below zero, where it is good

    def forward(self, estimates: Tensor, targets: Tensor) -> Tensor:
        target, error = (
            part.float().square().sum((-2, -1)) + FLOOR for part in (targets, targets - estimates)
        )
        return -10 * torch.log10(target / error).mean()


class SISDRLoss(nn.Module):
    """The negative SI-SDR in dB over all channels and samples of a source, the mean over sources:
    asteroid's, of Le Roux et al., "SDR - half-baked or well done?" (ICASSP 2019).

    An estimate may be of any level: it is compared with the target scaled to it. A silent source
    has no SI-SDR, and counts as 0 dB.
    """

    is_in_decibels = True
    note = "the level of the estimates is not learned"  # for the first screen

    def forward(self, estimates: Tensor, targets: Tensor) -> Tensor:
        estimates, targets = (
            part.float().flatten(0, 1).flatten(1) for part in (estimates, targets)
        )
        losses = singlesrc_neg_sisdr(estimates, targets)
        return torch.where(targets.any(1), losses, 0).mean()


LOSSES = {
    "l1": nn.L1Loss,
    "mse": nn.MSELoss,
    "sdr": SDRLoss,
    "si_sdr": SISDRLoss,
}
