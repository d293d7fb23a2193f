"""The command on songs; scenes are in test_scenes.py, the live remix in test_separate.py."""

import json
import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyloudnorm
import pytest
import soundfile as sf
import torch
from conftest import ROOT, random_model, start_python, write_song, write_times

from local import enhance as command
from local.checkpoint import load_model
from local.inference import separate
from local.lift.remix import find_peak, mix, to_gain

RATE = 16000
SMALL = dict(N=8, L=8, B=8, H=8, X=2, R=1, C=2, audio_channels=2, samplerate=RATE)


def enhance(*args) -> int:
    with pytest.raises(SystemExit) as exit_:
        command.main([str(arg) for arg in args])
    return exit_.value.code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model({**SMALL, "causal": True, "norm_type": "cLN"}).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(checkpoint, tmp_path) -> list:
    return ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--device", "cpu"]


def read(tmp_path: Path, name: str = "remix") -> np.ndarray:
    """(channels, T)."""
    samples, _ = sf.read(tmp_path / "out" / "song" / f"{name}.wav", always_2d=True)
    return samples.T


def find_loudness(samples: np.ndarray, rate: int = RATE) -> float:
    return pyloudnorm.Meter(rate).integrated_loudness(samples.T)


def separate_with(checkpoint: Path, audio: np.ndarray) -> np.ndarray:
    """Vocals and accompaniment (2, 2, T) of (T, 2) samples."""
    return separate(load_model(checkpoint), torch.from_numpy(audio.T.copy())).numpy().astype(float)


def test_remixes_are_those_of_the_estimates_at_the_loudness_of_the_song(
    flags, checkpoint, tmp_path
):
    audio = write_song(tmp_path / "song.wav", seconds=3)
    alphas = [0, 0.5, 1]
    assert enhance(tmp_path / "song.wav", *flags, "--float32", "--alpha", *alphas) == 0
    estimates = separate_with(checkpoint, audio)
    for alpha in alphas:
        found, expected = read(tmp_path, f"remix_{alpha}"), mix(*estimates, alpha)
        expected *= to_gain(find_loudness(audio.T) - find_loudness(expected))
        assert find_peak(expected) < 1
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert find_loudness(found) == pytest.approx(find_loudness(audio.T), abs=0.01)


def test_the_share_of_the_vocals_rises_with_alpha(flags, tmp_path):
    """By projection on the estimates, which are written beside the remixes."""
    write_song(tmp_path / "song.wav", seconds=3)
    alphas = [0, 0.2, 0.4, 0.6, 0.8, 1]
    words = ["--float32", "--save_estimates", "--alpha", *alphas]
    assert enhance(tmp_path / "song.wav", *flags, *words) == 0
    sources = [read(tmp_path, name).ravel() for name in ("vocals", "accompaniment")]
    shares = []
    for alpha in alphas:
        remix = read(tmp_path, f"remix_{alpha}").ravel()
        gains = np.linalg.lstsq(np.stack(sources, axis=1), remix, rcond=None)[0]
        energies = [
            gain**2 * (source @ source) for gain, source in zip(gains, sources, strict=True)
        ]
        shares.append(energies[0] / sum(energies))
    assert sorted(shares) == shares
    assert len(set(shares)) == len(alphas)
    assert shares[-1] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("method", ["overlap-add", "full", "stream"])
@pytest.mark.parametrize("rate, channels", [(RATE, 2), (22050, 1)])
def test_consistent_estimates_add_up_to_the_song(method, rate, channels, flags, tmp_path):
    audio = write_song(tmp_path / "song.wav", rate, channels, seconds=2)
    words = ["--consistent", "--alpha", 0, "--float32", "--method", method, "--segment", 0.5]
    assert enhance(tmp_path / "song.wav", *flags, *words) == 0
    np.testing.assert_allclose(read(tmp_path), audio.T, atol=1e-6)


def test_a_song_is_brought_to_a_loudness_before_it_is_separated(flags, checkpoint, tmp_path):
    audio = write_song(tmp_path / "song.wav", seconds=2)
    words = ["--lufs", -30, "--alpha", 0.5, "--float32"]
    assert enhance(tmp_path / "song.wav", *flags, *words) == 0
    levelled = audio * np.float32(to_gain(-30 - find_loudness(audio.T)))
    expected = mix(*separate_with(checkpoint, levelled), 0.5)
    np.testing.assert_allclose(read(tmp_path), expected, atol=1e-6)


def test_a_remix_beyond_full_scale_is_turned_down_or_clipped(flags, tmp_path, capsys):
    audio = write_song(tmp_path / "song.wav", seconds=2)
    sf.write(tmp_path / "song.wav", 1.9 * audio / np.abs(audio).max(), RATE, "FLOAT")
    words = ["--alpha", 0, "--consistent", "--overwrite"]
    assert enhance(tmp_path / "song.wav", *flags, *words) == 0
    printed = capsys.readouterr().out
    assert "alpha 0: turned down by 5.58 dB" in printed and "clipped" not in printed
    assert find_peak(read(tmp_path)) == pytest.approx(1, abs=1e-4)
    turned_down = read(tmp_path)
    assert enhance(tmp_path / "song.wav", *flags, *words, "--clip") == 0
    printed = capsys.readouterr().out
    assert "alpha 0: clipped, by up to 5.58 dB" in printed
    inside = np.abs(turned_down) < 0.5
    np.testing.assert_allclose(read(tmp_path)[inside], 1.9 * turned_down[inside], atol=2e-3)
    assert find_peak(read(tmp_path)) <= 1


@pytest.mark.parametrize("seconds, gain", [(0.3, 1), (1, 0), (1, 1e-6)])
def test_silence_and_short_songs_keep_their_level(seconds, gain, flags, tmp_path, capsys):
    audio = gain * write_song(tmp_path / "song.wav", seconds=seconds)
    sf.write(tmp_path / "song.wav", audio, RATE, "FLOAT")
    words = ["--alpha", 0, "--float32", "--consistent"]
    assert enhance(tmp_path / "song.wav", *flags, *words) == 0
    assert "too quiet or short to have a loudness" in capsys.readouterr().out
    np.testing.assert_allclose(read(tmp_path), audio.T, atol=1e-6)
    assert enhance(tmp_path / "song.wav", *flags, *words, "--lufs", -20, "--overwrite") == 0
    assert "too quiet or short to have a loudness" in capsys.readouterr().out


@pytest.mark.skipif(not find_spec("clarity"), reason="pyClarity is not installed")
@pytest.mark.parametrize("channels", [1, 2])
def test_a_remix_is_compressed_for_a_listener(channels, flags, checkpoint, tmp_path):
    from local.lift.listener import make_listener

    ear = {"cr_l": [2] * 6, "gain_l": [5] * 6, "cr_r": [3] * 6, "gain_r": [9] * 6}
    (tmp_path / "compressor_params.valid.json").write_text(json.dumps({"L1": ear}))
    audio = write_song(tmp_path / "song.wav", channels=channels)
    words = ["--alpha", 0.5, "--listener", "L1", "--metadata", tmp_path, "--float32"]
    assert enhance(tmp_path / "song.wav", *flags, *words) == 0
    levelled = audio * np.float32(to_gain(-40 - find_loudness(audio.T)))
    both = np.broadcast_to(levelled, (len(audio), 2))
    estimates = separate_with(checkpoint, both)
    if channels == 1:
        estimates = estimates.mean(1, keepdims=True)
    expected = make_listener(ear).compress(mix(*estimates, 0.5), RATE)
    np.testing.assert_allclose(read(tmp_path), expected, atol=1e-6)


def test_what_is_there_is_kept_unless_it_was_made_otherwise(flags, tmp_path, capsys):
    write_song(tmp_path / "song.wav")
    words = [tmp_path / "song.wav", *flags]
    assert enhance(*words, "--alpha", 0.5) == 0
    before = write_times(tmp_path / "out")
    assert enhance(*words, "--alpha", 0.5) == 0
    assert write_times(tmp_path / "out") == before
    assert "0 songs enhanced" in capsys.readouterr().out
    for others in (["--alpha", 0.4], ["--alpha", 0.5, "--consistent"], ["--alpha", 0.5, "--clip"]):
        assert enhance(*words, *others) == 1
        assert "holds" in capsys.readouterr().err
        assert write_times(tmp_path / "out") == before
    assert enhance(*words, "--alpha", 0.4, 0.5, 0.5) == 0
    assert {path.name for path in (tmp_path / "out" / "song").iterdir()} == {
        *("remix.wav", "remix_0.4.wav", "remix_0.5.wav", "made_from.yml")
    }


def test_other_names_than_a_listener_of_the_files(flags, tmp_path, error_of):
    write_song(tmp_path / "song.wav")
    song = tmp_path / "song.wav"
    for args, message in {
        (song,): "name an --alpha",
        ("--alpha", 0.5): "name a SONG",
        (song, "--alpha", 1.5): "--alpha must be from 0 to 1, got 1.5",
        (song, "--alpha", 0.5, "nan"): "--alpha must be from 0 to 1, got nan",
        (song, "--alpha", 0.5, "--lufs", 3): "--lufs must be from",
        (song, "--alpha", 0.5, "--listener", "L1"): "--listener needs --metadata",
        (song, "--alpha", 0.5, "--metadata", tmp_path): "--metadata needs --listener",
        (song, "--alpha", 0.5, "--part", "1/2"): "--part is for --scenes",
        (song, "--alpha", 0.5, "--part", "3/2"): "expected K/N",
    }.items():
        assert message in error_of(command.main, *args, *flags), args
    assert not (tmp_path / "out").exists()


def test_a_sample_that_is_nan_is_named(flags, tmp_path, capsys):
    audio = write_song(tmp_path / "song.wav")
    audio[5] = np.nan
    sf.write(tmp_path / "song.wav", audio, RATE, "FLOAT")
    assert enhance(tmp_path / "song.wav", *flags, "--alpha", 1) == 1
    assert "holds NaN or infinity" in capsys.readouterr().err
    assert list((tmp_path / "out").rglob("*.*")) == []


def test_a_disk_without_space_is_found_before_the_work(flags, tmp_path, monkeypatch, capsys):
    write_song(tmp_path / "song.wav", seconds=10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert enhance(tmp_path / "song.wav", *flags, "--alpha", 1) == 1
    assert "GB free" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_remains_of_a_command_that_is_ended(number, flags, tmp_path):
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", "sine=440:r=16000"]
        + ["-ac", "2", "-t", "600", str(tmp_path / "song.flac")],
        check=True,
    )
    words = [tmp_path / "song.flac", *flags, "--alpha", 0.5]
    process = start_python(ROOT / "local" / "enhance.py", *words, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not has_spool(process.pid, tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def has_spool(pid: int, out: Path) -> bool:
    """Whether a process has an open file in a folder."""
    try:
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(link.startswith(f"{out}/") for link in links)
