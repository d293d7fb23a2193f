import pytest
import torch

from local import sdr
from local.eval.whole_track import usdr
from local.sdr import sum_sdr


def make_track(time: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(estimates, targets) of one track, (1, 2, 2, T)."""
    generator = torch.Generator().manual_seed(seed)
    targets = 0.1 * torch.randn(1, 2, 2, time, generator=generator)
    noise = torch.randn(1, 2, 2, time, generator=generator)
    return targets + torch.tensor([0.01, 0.3])[None, :, None, None] * noise, targets


@pytest.mark.parametrize("block", [1, 7, 999, 1000, 2**20])
def test_it_is_the_usdr_of_the_evaluation(block, monkeypatch):
    monkeypatch.setattr(sdr, "SAMPLES", block)
    estimates, targets = make_track(1000)
    expected = usdr(*(x[0].transpose(1, 2).double().numpy() for x in (targets, estimates)))
    found = sum_sdr(estimates, targets)
    assert found[0].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert found[1].tolist() == [1, 1]


def test_sums_of_tracks_add_up():
    tracks = [make_track(500, seed) for seed in range(3)]
    whole = sum_sdr(*(torch.cat(parts) for parts in zip(*tracks, strict=True)))
    torch.testing.assert_close(sum(sum_sdr(*track) for track in tracks), whole)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_energies_are_summed_in_float32(kind):
    estimates, targets = make_track(200_000)
    found = sum_sdr(estimates.to(kind), targets.to(kind))
    torch.testing.assert_close(found, sum_sdr(estimates, targets), rtol=0, atol=0.05)


def test_a_silent_target_is_left_out_and_a_perfect_estimate_is_finite():
    estimates, targets = make_track(500)
    targets[:, 0] = 0
    estimates[:, 1] = targets[:, 1]
    total, count = sum_sdr(estimates, targets)
    assert (total[0], count.tolist()) == (0, [0, 1])
    assert 60 < total[1] < torch.inf
