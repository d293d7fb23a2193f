"""Wav files in blocks, and beyond 4 GiB."""

import numpy as np
import pytest
import soundfile as sf

import local.tools.wav
from local.tools.wav import WavWriter


@pytest.mark.parametrize("subtype, dtype", [("PCM_16", np.int16), ("FLOAT", np.float32)])
@pytest.mark.parametrize("largest", [2**32, 4000, 8000])
def test_a_file_that_outgrows_its_header_becomes_rf64(
    subtype, dtype, largest, tmp_path, monkeypatch
):
    monkeypatch.setattr(local.tools.wav, "LARGEST", largest)
    monkeypatch.setattr(local.tools.wav, "BLOCK", 300)
    samples = (np.random.default_rng(0).standard_normal((2000, 2)) * 1000).astype(dtype)
    with WavWriter(tmp_path / "a.wav", 8000, 2, subtype) as writer:
        for block in np.split(samples, [1, 500, 501, 1700]):
            writer.write(block)
    info = sf.info(tmp_path / "a.wav")
    is_large = samples.nbytes > largest
    assert (info.format, info.subtype) == ("RF64" if is_large else "WAV", subtype)
    assert (tmp_path / "a.wav").read_bytes()[:4] == (b"RF64" if is_large else b"RIFF")
    np.testing.assert_array_equal(sf.read(tmp_path / "a.wav", dtype=dtype)[0], samples)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_a_plain_header_is_enough_below_its_limit(tmp_path):
    """libsndfile writes the size of samples and headers in 32 bits."""
    assert local.tools.wav.LARGEST + 1000 < 2**32
