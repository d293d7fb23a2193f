import json

import pytest
import torch
from conftest import load_golden, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from local.inference import separate
from local.tasnet import ConvTasNetStereo


class Identity(torch.nn.Module):
    """Every source is the mixture."""

    def __init__(self, samplerate: int = 1000, C: int = 2):
        super().__init__()
        self.samplerate, self.C = samplerate, C
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # says which device the model is on
        self.lengths = []

    def forward(self, mixture):
        self.lengths.append(mixture.shape[-1])
        return mixture.unsqueeze(1).repeat(1, self.C, 1, 1)


@needs_golden
def test_matches_the_baseline_of_the_challenge():
    settings_, golden, _ = load_golden("overlap_add")
    metadata, _, state = load_golden(settings_["model"])
    model = ConvTasNetStereo(**json.loads(metadata["config"])).eval()
    model.load_state_dict(state)
    segment, overlap = float(settings_["segment"]), float(settings_["overlap"])
    estimates = separate(model, golden["mixture"][0], segment, overlap)
    error = (estimates - golden["estimate"][0]).norm() / golden["estimate"].norm()
    assert error < 1e-6
    # The golden whole-track output differs, so the match above says something.
    assert (estimates - golden["full_forward"][0]).norm() / golden["estimate"].norm() > 1e-3


@pytest.mark.parametrize("length", [1, 99, 100, 101, 999, 1099, 1100, 1101, 1200, 2200, 4321])
@pytest.mark.parametrize("overlap", [0, 0.001, 0.1, 0.9])
def test_an_identity_model_returns_the_mixture(length, overlap):
    mixture = torch.randn(2, length)
    estimates = separate(Identity(), mixture, segment=1.0, overlap=overlap)
    assert estimates.shape == (2, 2, length)
    torch.testing.assert_close(estimates, mixture.expand(2, 2, length), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(
    length=st.integers(1, 5000),
    rate=st.integers(10, 1000),
    segment=st.floats(0.1, 3),
    share=st.floats(0, 0.95),
)
def test_windows_cover_the_song_and_progress_adds_up(length, rate, segment, share):
    mixture, done = torch.randn(1, length), []
    model = Identity(rate)
    estimates = separate(model, mixture, segment, share * segment, done.append)
    torch.testing.assert_close(estimates[1], mixture, rtol=0, atol=1e-5)
    assert sum(done) == length
    assert len(done) == len(model.lengths)


def test_windows_are_those_of_the_baseline():
    model = Identity()
    separate(model, torch.zeros(2, 3500), segment=1.0, overlap=0.1)
    assert model.lengths == [1100, 1200, 1200, 300]


def test_an_input_shorter_than_a_window_is_what_the_model_returns():
    torch.manual_seed(0)
    model = ConvTasNetStereo(
        N=8, L=8, B=8, H=8, X=2, R=1, C=2, audio_channels=2, samplerate=1000
    ).eval()
    for length in (50, 500, 1100):
        mixture = torch.randn(2, length)
        with torch.no_grad():
            expected = model(mixture[None])[0]
        torch.testing.assert_close(separate(model, mixture, 1.0, 0.1), expected)


def test_no_samples_in_none_out():
    assert separate(Identity(), torch.zeros(2, 0)).shape == (2, 2, 0)


@pytest.mark.parametrize("segment, overlap", [(1.0, 1.2), (1.0, -0.1), (0.0, 0.0), (-1, 0)])
def test_settings_that_cannot_be(segment, overlap):
    with pytest.raises(ValueError, match="expected 0 <= overlap < segment"):
        separate(Identity(), torch.zeros(2, 100), segment, overlap)


def test_the_result_stays_with_the_mixture_and_keeps_no_graph():
    estimates = separate(Identity(), torch.randn(2, 2500).double(), 1.0, 0.1)
    assert estimates.dtype == torch.float64
    assert not estimates.requires_grad
