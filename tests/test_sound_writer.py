"""Files of every format, and what reads them."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from scipy.signal import correlate

from local.songs.read import SongReader
from local.tools.ffmpeg import list_encoders
from local.tools.formats import FORMATS
from local.tools.sound_writer import SoundWriter

BITS = {"wav16": 16, "wav24": 24, "float32": None, "flac16": 16, "flac24": 24}
LOSSY = [name for name in FORMATS if name not in BITS]
FRAME = 1024  # samples of an m4a file


def make_audio(length: int, channels: int, rate: int = 44100) -> np.ndarray:
    """(T, channels) of coloured noise, unlike at any other lag, within the band of all formats."""
    random = np.random.default_rng(length)
    noise = random.standard_normal((length, channels))
    smooth = np.exp(-np.arange(64) / 8)
    audio = np.stack([np.convolve(side, smooth)[:length] for side in noise.T], axis=1)
    return (0.3 * audio / max(np.abs(audio).max(), 1e-9)).astype(np.float32)


def write(path: Path, audio: np.ndarray, rate: int, form: str, blocks: int = 3) -> SoundWriter:
    with SoundWriter(path, rate, audio.shape[1], FORMATS[form]) as writer:
        for block in np.array_split(audio, blocks):
            writer.write(block)
    return writer


def decode(path: Path, rate: int, channels: int) -> np.ndarray:
    """(T, channels), as players decode it."""
    command = ["ffmpeg", "-loglevel", "error", "-i", f"file:{path}", "-f", "f32le"]
    command += ["-ar", str(rate), "-ac", str(channels), "pipe:"]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(raw, np.float32).reshape(-1, channels)


def find_lag(audio: np.ndarray, found: np.ndarray) -> int:
    """By how many samples `found` comes later."""
    shared = min(len(audio), len(found))
    correlation = correlate(found[:shared, 0], audio[:shared, 0], method="fft")
    return int(np.argmax(correlation)) - (shared - 1)


@pytest.mark.parametrize("form", BITS)
@pytest.mark.parametrize("length", [1, 4410, 100_003])
def test_files_without_loss_hold_the_samples(form, length, tmp_path):
    audio = make_audio(length, 2)
    assert write(tmp_path / "file", audio, 44100, form).clipped == 0
    found, rate = sf.read(tmp_path / "file", always_2d=True)
    error = 0.5 * 2.0 ** (1 - BITS[form]) if BITS[form] else 0
    assert rate == 44100
    assert np.abs(found - audio).max() <= error


@pytest.mark.parametrize("form", LOSSY)
@pytest.mark.parametrize("rate, channels", [(44100, 2), (48000, 2), (22050, 1)])
@pytest.mark.parametrize("length", [700, 4608, 100_003])
def test_coded_files_line_up_with_the_samples(form, rate, channels, length, tmp_path):
    audio = make_audio(length, channels)
    path = tmp_path / f"file.{FORMATS[form].suffix}"
    write(path, audio, rate, form)
    reader = SongReader(path)
    found = np.concatenate(list(reader.read_blocks()))
    assert reader.damage == ""
    coded_length = round(length * reader.rate / rate)
    assert 0 <= len(found) - coded_length <= (FRAME if form == "m4a" else 0)
    played = decode(path, rate, channels)
    assert abs(len(played) - len(found) * rate / reader.rate) <= 1
    assert find_lag(audio, played) == 0
    shared = min(length, len(played))
    noise = played[:shared] - audio[:shared]
    # Noise is the hardest to code: some 12 dB where an m4a is short. Other samples give below 0 dB.
    assert 10 * np.log10((audio**2).sum() / (noise**2).sum()) > 9


@pytest.mark.parametrize(
    ("form", "rate", "expected"),
    [
        ("mp3", 96000, 48000),
        ("mp3", 37800, 32000),
        ("opus", 44100, 48000),
        ("m4a", 96000, 96000),
        ("m4a", 192000, 96000),
        ("flac16", 70001, 70000),
        ("wav16", 70001, 70001),
    ],
)
def test_the_nearest_rate_of_a_format_is_taken(form, rate, expected, tmp_path):
    audio = make_audio(30_001, 2)
    path = tmp_path / f"file.{FORMATS[form].suffix}"
    write(path, audio, rate, form, blocks=7)
    reader = SongReader(path)
    assert reader.rate == expected
    found = np.concatenate(list(reader.read_blocks()))
    assert 0 <= len(found) - round(30_001 * expected / rate) <= (FRAME if form == "m4a" else 0)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_gives_a_file_that_can_be_read(form, tmp_path):
    path = tmp_path / f"file.{FORMATS[form].suffix}"
    write(path, np.zeros((0, 2), np.float32), 44100, form)
    assert len(decode(path, 44100, 2)) <= (2 * FRAME if form == "m4a" else 1)


@pytest.mark.parametrize(("form", "clipped"), [("wav16", 2), ("flac24", 2), ("float32", 0)])
def test_integers_are_clipped_and_counted(form, clipped, tmp_path):
    audio = np.array([[1.5, 0.5], [-1.5, -1.0]], np.float32)
    assert write(tmp_path / "file", audio, 44100, form, blocks=1).clipped == clipped
    found, _ = sf.read(tmp_path / "file")
    np.testing.assert_allclose(found, audio if not clipped else audio.clip(-1, 1), atol=1e-4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seconds", [0.01, 20])
def test_a_full_disk_is_an_os_error(form, seconds, tmp_path):
    """Whether it shows on the way or when the last samples are written."""
    path = tmp_path / "file"
    os.symlink("/dev/full", path)
    with pytest.raises(OSError):
        write(path, make_audio(round(seconds * 44100), 2), 44100, form)


def test_an_error_of_the_caller_ends_the_encoder(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with SoundWriter(tmp_path / "file", 44100, 2, FORMATS["opus"]) as writer:
            writer.write(make_audio(5000, 2))
            raise ZeroDivisionError
    assert writer.file.process.returncode is not None


def test_each_encoder_is_there():
    """Of the ffmpeg and libsndfile that run.sh installs."""
    needed = {form.encoder for form in FORMATS.values() if form.encoder}
    assert needed <= list_encoders()
