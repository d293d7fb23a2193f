import numpy as np
import pytest
from conftest import read_lift

from local.lift.remix import mix, to_gain


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
def test_remixes_are_the_golden_ones(alpha):
    golden, facts = read_lift()
    gain = to_gain(-40 - float(facts["loudness_lufs"]))
    assert np.abs(gain * golden["mixture"] - golden["levelled"]).max() < 1e-8
    found = mix(gain * golden["vocals"], gain * golden["accompaniment"], alpha)
    assert np.abs(found - golden[f"remix_{alpha:g}"]).max() < 1e-8
