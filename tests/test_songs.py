"""Songs as ffmpeg reads them: damage, channels, the start of the sound; and songs in folders."""

import os
import subprocess

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch
from conftest import write_song
from hypothesis import given, settings
from hypothesis import strategies as st

from local.musdb18_tracks import TARGETS
from local.songs.convert import read_mixture, restore
from local.songs.find import find_songs
from local.songs.read import BLOCK, SongReader
from local.tools.command_line import UserError

RATE = 44100


def run_ffmpeg(*args) -> None:
    subprocess.run(["ffmpeg", "-loglevel", "error", "-y", *map(str, args)], check=True)


def read_song(path) -> tuple[np.ndarray, SongReader]:
    reader = SongReader(path)
    return np.concatenate(list(reader.read_blocks())), reader


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """A song of 5 s in every format, by its suffix."""
    folder = tmp_path_factory.mktemp("songs")
    rng = np.random.default_rng(0)
    time = np.arange(5 * RATE) / RATE
    tone = 0.3 * np.sin(2 * np.pi * 440 * time)[:, None] + 0.05 * rng.standard_normal(
        (len(time), 2)
    )
    sf.write(folder / "song.wav", tone, RATE, "PCM_16")
    coders = {"ogg": ["-c:a", "libvorbis"], "webm": ["-ar", "48000"], "opus": ["-ar", "48000"]}
    for suffix in ("flac", "mp3", "ogg", "m4a", "opus", "aac", "mka", "webm", "wma", "mp2", "caf"):
        run_ffmpeg("-i", folder / "song.wav", *coders.get(suffix, []), folder / f"song.{suffix}")
    run_ffmpeg("-i", folder / "song.wav", "-write_xing", "0", folder / "plain.mp3")
    return folder


WHOLE = (
    *("song.wav", "song.flac", "song.mp3", "song.ogg", "song.m4a", "song.opus", "song.aac"),
    *("song.mka", "song.webm", "song.wma", "song.mp2", "song.caf", "plain.mp3"),
)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("extra", [b"", bytes(3000), b"hello world\n" * 100, "noise", "itself"])
def test_trailing_bytes_and_chained_files_are_no_damage(name, extra, songs, tmp_path):
    if extra == "noise" and name in ("song.mp2", "plain.mp3"):
        extra = b"no frame"  # without a length in the header, a frame in noise may be a broken one
    content = (songs / name).read_bytes()
    rest = {"noise": np.random.default_rng(1).bytes(3000), "itself": content}.get(extra, extra)
    (tmp_path / name).write_bytes(content + rest)
    audio, reader = read_song(tmp_path / name)
    assert reader.damage == ""
    assert len(audio) >= 4.95 * reader.rate
    if extra == "itself" and name in ("song.mp3", "song.ogg", "plain.mp3"):
        assert len(audio) >= 9.9 * reader.rate


def cut(content: bytearray) -> bytearray:
    return content[: len(content) * 2 // 3]


def overwrite(content: bytearray) -> bytearray:
    middle = len(content) // 2
    content[middle : middle + 5000] = np.random.default_rng(1).bytes(5000)
    return content


def flip(content: bytearray) -> bytearray:
    content[len(content) * 3 // 5] ^= 0x55
    return content


@pytest.mark.parametrize(
    "name, spoil",
    [
        *((name, cut) for name in ("song.wav", "song.flac", "song.mp3")),
        *((f"song.{suffix}", overwrite) for suffix in ("flac", "mp3", "ogg", "m4a", "opus")),
        *((f"song.{suffix}", flip) for suffix in ("flac", "ogg", "opus")),
    ],
)
def test_missing_and_wrong_audio_is_damage(name, spoil, songs, tmp_path):
    (tmp_path / name).write_bytes(spoil(bytearray((songs / name).read_bytes())))
    audio, reader = read_song(tmp_path / name)
    assert reader.damage
    assert len(audio)


def test_bytes_that_are_no_audio_are_said_where_the_length_is_not_known(songs, tmp_path):
    (tmp_path / "a.mp3").write_bytes((songs / "plain.mp3").read_bytes() + b"hello world\n" * 100)
    _, reader = read_song(tmp_path / "a.mp3")
    assert "no audio" in reader.note and not reader.damage


LAYOUTS = {"2.1": 3, "quad": 4, "4.0": 4, "5.1": 6, "5.1(side)": 6, "7.1": 8, "octagonal": 8}


@pytest.mark.parametrize("layout, channels", LAYOUTS.items())
def test_a_downmix_is_as_loud_as_that_of_16_bit_files_and_does_not_clip(layout, channels, tmp_path):
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, (RATE // 4, channels))
    noise[:100] = 1.0  # full scale in every channel
    sf.write(tmp_path / "plain.wav", noise, RATE, "FLOAT")
    for kind in ("f32", "s16"):
        to_layout = f"channelmap=channel_layout={layout}"
        run_ffmpeg(
            *("-i", tmp_path / "plain.wav", "-af", to_layout),
            *("-c:a", f"pcm_{kind}le", tmp_path / f"{kind}.wav"),
        )
    audio, _ = read_song(tmp_path / "f32.wav")
    run_ffmpeg("-i", tmp_path / "s16.wav", "-ac", "2", tmp_path / "stereo.wav")
    expected, _ = sf.read(tmp_path / "stereo.wav")
    assert audio.shape == expected.shape
    assert np.abs(audio).max() <= 1 + 1e-6
    np.testing.assert_allclose(audio, expected, atol=2e-4)


def test_channels_that_cannot_be_mixed_down(tmp_path):
    sf.write(tmp_path / "nine.wav", np.zeros((1000, 9)), RATE)
    with pytest.raises(UserError, match="mix it to stereo"):
        read_song(tmp_path / "nine.wav")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_sound_lines_up_with_the_picture(suffix, delay, tmp_path):
    """A click half a second after the start of the sound."""
    clicks = np.zeros((RATE, 2), np.float32)
    clicks[RATE // 2] = 0.9
    sf.write(tmp_path / "clicks.wav", clicks, RATE, "PCM_16")
    video = tmp_path / f"video.{suffix}"
    run_ffmpeg(
        *("-f", "lavfi", "-i", "testsrc=d=3:s=32x32:r=10", "-itsoffset", delay),
        *("-i", tmp_path / "clicks.wav", "-c:v", "mpeg4", "-c:a", "alac", video),
    )
    audio, reader = read_song(video)
    assert abs(np.abs(audio[:, 0]).argmax() / RATE - (delay + 0.5)) < 0.002
    assert reader.length == len(audio) and reader.damage == ""


def test_a_cover_is_no_picture_and_an_mp3_starts_at_its_start(songs, tmp_path):
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=d=1:s=32x32", "-frames:v", "1", tmp_path / "cover.png")
    inputs = ["-i", songs / "song.mp3", "-i", tmp_path / "cover.png", "-map", "0:a", "-map", "1:v"]
    run_ffmpeg(*inputs, "-c", "copy", "-disposition:v", "attached_pic", tmp_path / "cover.mp3")
    plain, _ = read_song(songs / "song.mp3")
    covered, reader = read_song(tmp_path / "cover.mp3")
    np.testing.assert_array_equal(covered, plain)
    assert reader.damage == ""


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 3 * BLOCK),
    rate=st.sampled_from([8000, 11025, 22050, 44100, 48000, 96000]),
    channels=st.integers(1, 2),
)
def test_resampling_in_blocks_equals_resampling_the_whole(length, rate, channels, tmp_path_factory):
    song = tmp_path_factory.mktemp("song") / "song.wav"
    audio = np.random.default_rng(length).uniform(-1, 1, (length, channels)).astype(np.float32)
    sf.write(song, audio, rate, "FLOAT")
    reader = SongReader(song)
    blocks = list(read_mixture(reader.read_blocks(), reader, RATE))
    mixture = np.concatenate(blocks, axis=1)
    expected = soxr.resample(audio, rate, RATE, "VHQ")
    assert abs(mixture.shape[1] - len(expected)) <= 1
    shared = min(mixture.shape[1], len(expected))
    np.testing.assert_allclose(
        mixture[:, :shared].T, np.broadcast_to(expected, (len(expected), 2))[:shared], atol=2e-6
    )
    estimates = [torch.stack([block, 0.5 * block]) for block in blocks]
    restored = list(restore(estimates, TARGETS, RATE, reader))
    vocals = np.concatenate([piece["vocals"] for piece in restored], axis=1)
    assert vocals.shape == (channels, length)
    whole = soxr.resample(expected, RATE, rate, "VHQ")[:length]
    np.testing.assert_allclose(vocals[:, : len(whole)].T, whole, atol=4e-6)


def test_estimates_that_are_no_numbers(tmp_path):
    write_song(tmp_path / "song.wav")
    reader = SongReader(tmp_path / "song.wav")
    estimates = [torch.full((2, 2, 10), torch.nan)]
    with pytest.raises(UserError, match="estimate of vocals holds NaN"):
        list(restore(estimates, TARGETS, reader.rate, reader))


def test_folders_with_links(tmp_path, capsys):
    write_song(tmp_path / "elsewhere" / "linked.wav")
    write_song(tmp_path / "songs" / "sub" / "one.wav")
    folder = tmp_path / "songs"
    for name in ("away", "again"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "above").symlink_to(folder)
    (folder / "a link").symlink_to(folder / "sub")  # its songs are those of the folder itself
    (folder / "gone.wav").symlink_to(tmp_path / "nothing.wav")
    (folder / "gone").symlink_to(tmp_path / "nothing")
    (folder / "file.wav").symlink_to(folder / "sub" / "one.wav")
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints"):
        write_song(folder / name / "x.wav")
    write_song(folder / "._one.wav")
    found, unreadable = find_songs([folder], tmp_path / "out")
    out = tmp_path / "out"
    assert set(found) == {out / "sub" / "one", out / "file", out / "again" / "linked"}
    assert set(unreadable) == {folder / "gone.wav", folder / "gone"}
    said = capsys.readouterr().out
    assert f"{folder / 'away'}: is the same folder as {folder / 'again'}" in said
    assert f"{folder / 'sub' / 'above'}: is the same folder as {folder}" in said


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    write_song(tmp_path / "songs" / "one.wav")
    write_song(tmp_path / "songs" / "closed" / "two.wav")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, unreadable = find_songs([tmp_path / "songs"], tmp_path / "out")
    assert set(found) == {tmp_path / "out" / "one"}
    assert unreadable == {tmp_path / "songs" / "closed": "cannot be read: Permission denied"}
