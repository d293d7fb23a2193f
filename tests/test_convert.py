import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import soundfile as sf
from conftest import (
    RATE,
    ROOT,
    TRAIN_NAMES,
    write_flac_of_unknown_length,
    write_times,
    write_track,
)

from local.convert import convert_tree, main
from local.musdb18_tracks import SOURCES, find_tracks
from local.tools.command_line import UserError

Usage = namedtuple("Usage", "free")


def write_tone(path, rate, channels, seconds=1.0, subtype="PCM_16", pitch=440.0):
    """A tone that no resampling changes much, faded at both ends."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.5 * np.sin(np.pi * time / seconds) ** 2 * np.sin(2 * np.pi * pitch * time)
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.stack([tone] * channels, axis=1), rate, subtype)


def expected_tone(seconds=1.0, pitch=440.0):
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.5 * np.sin(np.pi * time / seconds) ** 2 * np.sin(2 * np.pi * pitch * time)


@pytest.mark.parametrize("rate", [RATE, 11_025, 16_000, 44_100])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_mono_and_other_rates_become_what_training_takes(rate, subtype, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    for number, source in enumerate(SOURCES):
        suffix = "flac" if number == 3 else "wav"
        write_tone(
            root / "train" / "A.B. - C" / f"{source}.{suffix}", rate, 1 + number % 2, 1, subtype
        )
    (root / "train" / "A.B. - C" / "notes.txt").touch()
    convert_tree(root, out, RATE, 2)
    (track,) = find_tracks(out, "train", RATE)
    for source in SOURCES:
        info = sf.info(track.path(source))
        assert (info.channels, info.subtype) == (2, "PCM_16" if subtype == "PCM_16" else "FLOAT")
        for channel in track.read(source):
            np.testing.assert_allclose(channel, expected_tone(), atol=2e-4)


def test_what_is_right_already_keeps_its_samples(corpus, tmp_path):
    convert_tree(corpus, tmp_path, RATE, 1)
    for split in ("train", "test"):
        tracks = find_tracks(corpus, split, RATE), find_tracks(tmp_path, split, RATE)
        for one, other in zip(*tracks, strict=True):
            for source in SOURCES:
                np.testing.assert_array_equal(one.read(source), other.read(source))


@pytest.mark.parametrize("seconds", [0.3, 1.00001, 1.0007])
def test_files_of_several_rates_get_one_length(seconds, tmp_path):
    folder = tmp_path / "root" / "train" / "Song"
    write_tone(folder / "vocals.wav", 44_100, 2, seconds)
    write_tone(folder / "accompaniment.wav", 48_000, 1, seconds)
    convert_tree(tmp_path / "root", tmp_path / "out", RATE, 1)
    (track,) = find_tracks(tmp_path / "out", "train", RATE)
    assert abs(track.length - seconds * RATE) <= 1


def test_only_what_is_missing_is_converted_and_the_size_comes_first(corpus, tmp_path, capsys):
    args = [str(corpus), str(tmp_path / "out"), "--sample_rate", str(RATE)]
    main(args)
    shown = capsys.readouterr().out.splitlines()
    assert "GB in 6 tracks" in shown[0] and "6 tracks converted" in shown[-1]
    shutil.rmtree(tmp_path / "out" / "train" / TRAIN_NAMES[0])
    kept = write_times(tmp_path / "out" / "test")
    (tmp_path / "out" / "train" / f".{TRAIN_NAMES[0]}.tmp").mkdir()  # of a killed call
    main(args)
    assert "1 track converted, 5 there already" in capsys.readouterr().out
    assert write_times(tmp_path / "out" / "test") == kept
    assert len(find_tracks(tmp_path / "out", "train", RATE)) == len(TRAIN_NAMES)


def test_samples_beyond_full_scale_are_counted(tmp_path):
    path = tmp_path / "root" / "train" / "Song" / "vocals.wav"
    square = np.sign(np.sin(np.arange(16_000) / 20))[:, None]
    path.parent.mkdir(parents=True)
    sf.write(path, square, 16_000, "PCM_16")
    assert "beyond full scale clipped" in convert_tree(tmp_path / "root", tmp_path / "a", RATE, 1)
    sf.write(path, square, 16_000, "FLOAT")
    assert "clipped" not in convert_tree(tmp_path / "root", tmp_path / "b", RATE, 1)
    assert np.abs(sf.read(tmp_path / "b" / "train" / "Song" / "vocals.wav")[0]).max() > 1


def test_faults_are_found_before_anything_is_written(tmp_path, error_of, monkeypatch):
    root, out = tmp_path / "root", tmp_path / "out"
    assert f"no such folder: {root}" in error_of(main, root, out)
    folder = write_track(root / "train" / "Song")
    assert "OUT" in error_of(main, root, root)
    error = error_of(main, root, out, "--jobs", 0, "--sample_rate", 0)
    assert "--jobs" in error and "--sample_rate" in error
    write_flac_of_unknown_length(folder / "piano.flac")
    sf.write(folder / "empty.wav", np.zeros((0, 2)), RATE)
    (folder / "vocals.mp3").touch()
    (folder / "drums.wav").write_bytes(b"")
    sf.write(folder / "bass.flac", np.zeros((9, 2)), RATE)
    sf.write(folder / "other.wav", np.zeros((9, 3)), RATE)
    error = error_of(main, root, out)
    for words in (
        f"{folder / 'vocals.mp3'}: neither wav nor flac",
        f"{folder / 'piano.flac'}: its header does not say how long it is",
        f"{folder / 'empty.wav'}: no samples",
        f"{folder / 'drums.wav'}: cannot be read",
        f"{folder / 'bass.wav'}: bass.flac is there, too",
        f"{folder / 'other.wav'}: expected 1 or 2 channels, got 3",
    ):
        assert words in error
    assert not out.exists()
    shutil.rmtree(folder)
    write_track(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
    assert "GB are free; make room" in error_of(main, root, out)
    assert not out.exists()
    monkeypatch.undo()
    convert_tree(root, out, RATE, 1)
    assert f"not --sample_rate {2 * RATE}" in error_of(main, root, out, "--sample_rate", 2 * RATE)


def test_a_damaged_file_costs_its_own_track(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    for name in ("A", "B"):
        write_track(root / "train" / name, suffix="flac")
    path = root / "train" / "A" / "bass.flac"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"1 track converted, 1 failed: {path}: damaged"):
        convert_tree(root, out, RATE, 2)
    assert [path.name for path in (out / "train").iterdir()] == ["B"]


def test_a_full_disk_is_one_line_and_leaves_no_half_track(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    write_track(root / "train" / "A", 0.2)
    write_track(root / "train" / "B", 3.0)
    command = f'ulimit -f 20; exec "{sys.executable}" "{ROOT}/local/convert.py" "{root}" "{out}"'
    result = subprocess.run(
        ["bash", "-c", f"{command} --sample_rate {RATE} --jobs 1"], capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "make room" in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in (out / "train").iterdir()] == ["A"]
