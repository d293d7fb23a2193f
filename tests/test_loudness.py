import math

import numpy as np
import pyloudnorm
import pytest
from conftest import read_lift
from hypothesis import given
from hypothesis import strategies as st

from local.lift.loudness import SHORTEST, LoudnessMeter

EXACT = 1e-6  # dB


def measure(samples: np.ndarray, rate: int, blocks: int = 1) -> float:
    meter = LoudnessMeter(rate, samples.shape[1])
    for block in np.array_split(samples, blocks):
        meter.add(block)
        meter.add(block[:0])
    return meter.measure()


def test_the_golden_mixture_has_its_loudness():
    golden, facts = read_lift()
    found = measure(golden["mixture"].T.astype(np.float64), 44100, blocks=7)
    assert found == pytest.approx(float(facts["loudness_lufs"]), abs=EXACT)


@given(
    rate=st.sampled_from([8000, 22050, 32000, 44100, 48000]),
    seconds=st.floats(SHORTEST + 1e-4, 3),
    levels=st.lists(st.sampled_from([0, 1e-5, 1e-3, 0.05, 1]), min_size=1, max_size=4),
    channels=st.integers(1, 2),
    blocks=st.integers(1, 9),
)
def test_it_is_that_of_the_whole(rate, seconds, levels, channels, blocks):
    """With parts that one gate or the other shuts out, and ends that fill no window."""
    length = round(seconds * rate)
    random = np.random.default_rng(length)
    parts = np.array_split(random.standard_normal((length, channels)), len(levels))
    samples = np.concatenate([level * part for level, part in zip(levels, parts, strict=True)])
    expected = pyloudnorm.Meter(rate).integrated_loudness(samples)
    assert measure(samples, rate, blocks) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("step", [-1, 0, 1])
@pytest.mark.parametrize("windows", [0, 1, 2, 7])
def test_the_last_window_is_counted_as_there(windows, step):
    """It counts from half of its step on."""
    length = round(44100 * (0.4 + 0.1 * (windows + 0.5))) + step
    samples = np.random.default_rng(windows).standard_normal((length, 2))
    expected = pyloudnorm.Meter(44100).integrated_loudness(samples)
    assert measure(samples, 44100, blocks=3) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("samples", [np.zeros((44100, 2)), np.ones((17639, 2)), np.ones((0, 1))])
def test_silence_and_less_than_a_window_have_no_loudness(samples):
    assert measure(samples, 44100) == -math.inf
