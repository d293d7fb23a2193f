import pytest
import torch
from asteroid.losses import singlesrc_neg_sisdr
from torch import Tensor

from local.losses import LOSSES, SDRLoss, SISDRLoss


def make_sources(items=3, sources=2, channels=2, time=400) -> tuple[Tensor, Tensor]:
    """(estimates, targets)"""
    generator = torch.Generator().manual_seed(0)
    shape = (2, items, sources, channels, time)
    targets, errors = torch.randn(shape, generator=generator)
    return targets + 0.3 * errors, targets


def test_sdr_is_that_of_all_channels_and_samples_of_a_source():
    estimates, targets = make_sources()
    ratios = [
        target.square().sum() / (target - estimate).square().sum()
        for estimate, target in zip(estimates.flatten(0, 1), targets.flatten(0, 1), strict=True)
    ]
    expected = sum(-10 * ratio.log10().item() for ratio in ratios) / len(ratios)
    assert SDRLoss()(estimates, targets).item() == pytest.approx(expected, rel=1e-5)


def test_si_sdr_is_asteroids_on_mono():
    estimates, targets = make_sources(channels=1)
    mono = (part.flatten(0, 1).squeeze(1) for part in (estimates, targets))
    expected = singlesrc_neg_sisdr(*mono).mean()
    torch.testing.assert_close(SISDRLoss()(estimates, targets), expected)


def test_si_sdr_takes_both_channels_as_one_signal():
    """A level of the whole does not count; of one channel, it does."""
    loss, (estimates, targets) = SISDRLoss(), make_sources()
    expected = loss(estimates, targets)
    torch.testing.assert_close(loss(0.01 * estimates, targets), expected, rtol=1e-4, atol=1e-4)
    one_sided = estimates * torch.tensor([[1.0], [0.01]])
    assert loss(one_sided, targets) > expected + 1


@pytest.mark.parametrize("silent", ["target", "estimate", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_silence_has_a_finite_loss_and_gradient(name, silent):
    estimates, targets = make_sources()
    if silent != "estimate":
        targets[0, 0] = 0
    if silent != "target":
        estimates[0, 0] = 0
    estimates.requires_grad_()
    loss = LOSSES[name]()(estimates, targets)
    loss.backward()
    assert loss.isfinite() and estimates.grad.isfinite().all()


def test_a_silent_target_teaches_silence_by_sdr_and_counts_nothing_by_si_sdr():
    estimates, targets = make_sources(items=1)
    targets[0, 0] = 0
    louder = estimates.clone()
    louder[0, 0] *= 2
    assert SDRLoss()(louder, targets) > SDRLoss()(estimates, targets) + 1
    others = SISDRLoss()(estimates[:, 1:], targets[:, 1:])
    torch.testing.assert_close(SISDRLoss()(louder, targets), others / 2)


@pytest.mark.parametrize("kind", [SDRLoss, SISDRLoss])
def test_half_precision_gives_the_loss_in_float32(kind):
    estimates, targets = make_sources(time=100_000)  # whose energy float16 does not hold
    loss = kind()(estimates.half(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kind()(estimates, targets), rtol=1e-3, atol=1e-3)
