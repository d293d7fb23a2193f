import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from local import demo_musdb18
from local.demo.songs import compose, synthesise_song
from local.demo.sounds import RATE
from local.demo_musdb18 import EXCERPT_NAME, add_excerpt, make_demo
from local.musdb18_tracks import SOURCES, VALIDATION_TRACKS
from local.tools.command_line import UserError

SECONDS = 3.3  # neither a whole number of seconds nor of bars


@pytest.fixture(scope="module")
def no_excerpt():
    """The synthesised songs alone: the excerpt needs ffmpeg, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_musdb18, "add_excerpt", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory, no_excerpt):
    """A demo with one song to train on."""
    out = tmp_path_factory.mktemp("demo") / "tree"
    make_demo(out, seconds=SECONDS, tracks=1)
    return out


def contents(tree):
    """Relative path -> bytes of every file, hidden ones too."""
    return {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def song(seed, seconds=SECONDS):
    return synthesise_song(np.random.default_rng(seed), seconds)


def levels(audio, seconds):
    """RMS of successive stretches of (2, T)."""
    n = round(seconds * RATE)
    stretches = audio[:, : audio.shape[1] // n * n].reshape(2, -1, n)
    return np.sqrt((stretches**2).mean(axis=(0, 2)))


@pytest.mark.smoke
def test_the_tree_is_laid_out_like_musdb18(tree):
    assert [len(list((tree / split).iterdir())) for split in ("train", "test")] == [1 + 2, 3]
    train_names = {folder.name for folder in (tree / "train").iterdir()}
    assert len(train_names & set(VALIDATION_TRACKS)) == 2
    for folder in (*(tree / "train").iterdir(), *(tree / "test").iterdir()):
        assert {file.name for file in folder.iterdir()} == {
            f"{source}.wav" for source in ("mixture", *SOURCES)
        }
        for file in folder.iterdir():
            info = sf.info(file)
            assert (info.samplerate, info.channels, info.subtype) == (RATE, 2, "PCM_16")
            assert info.frames == round(SECONDS * RATE)


def test_names_are_as_awkward_as_those_of_musdb18():
    names = "".join(folder.name for _, folder in demo_musdb18.song_folders(Path(), tracks=3))
    assert set(".&'") < set(names)
    assert not names.isascii()


def test_the_mixture_is_exactly_the_sum_of_the_stems_and_does_not_clip(tree):
    for mixture_file in tree.glob("*/*/mixture.wav"):
        mixture, _ = sf.read(mixture_file, dtype="int16")
        stems = [sf.read(mixture_file.with_stem(s), dtype="int16")[0].astype(int) for s in SOURCES]
        np.testing.assert_array_equal(mixture, sum(stems))
        assert max(np.abs(track.astype(int)).max() for track in (mixture, *stems)) < 32000


def test_no_stem_is_digitally_silent_for_longer_than_a_blink(tree):
    for file in tree.glob("*/*/*.wav"):
        audio, _ = sf.read(file)
        assert levels(audio.T, 0.02).min() > 0, file


def test_the_same_seed_gives_the_same_bytes_and_more_songs_do_not_change_the_others(
    tree, tmp_path, no_excerpt
):
    make_demo(tmp_path, seconds=SECONDS, tracks=2)
    ours, theirs = contents(tmp_path), contents(tree)
    assert len(ours) == len(theirs) + 5
    differing = {path.name for path in theirs if ours[path] != theirs[path]}
    assert differing == {".demo_musdb18.json"}


def test_all_songs_of_all_seeds_differ(tree, tmp_path, no_excerpt):
    make_demo(tmp_path, seconds=SECONDS, tracks=1, seed=1)
    files = [file for out in (tree, tmp_path) for file in out.rglob("*.wav")]
    assert len({file.read_bytes() for file in files}) == len(files)


def test_a_second_run_keeps_what_is_there_and_makes_what_is_missing(
    tree, tmp_path, no_excerpt, monkeypatch
):
    out = tmp_path / "copy"
    shutil.copytree(tree, out)
    lost = next((out / "test").iterdir())
    shutil.rmtree(lost)
    half_written = lost.with_name(f".{lost.name}.tmp")
    half_written.mkdir()
    made = []
    write_song = demo_musdb18.write_song
    monkeypatch.setattr(
        demo_musdb18, "write_song", lambda *args: (made.append(args[-1]), write_song(*args))
    )
    make_demo(out, seconds=SECONDS, tracks=1)
    assert made == [lost]
    assert contents(out) == contents(tree)
    assert not half_written.exists()


@pytest.mark.parametrize("flags", [["--seconds", "4"], ["--seed", "1"], ["--tracks", "3"]])
def test_a_demo_made_with_other_arguments_is_refused_and_left_alone(tree, flags, capsys):
    before = contents(tree)
    with pytest.raises(SystemExit) as stop:
        demo_musdb18.main([str(tree), "--seconds", str(SECONDS), "--tracks", "1", *flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("python -m local.demo_musdb18: error: ")
    assert message.count("\n") == 1 and str(tree) in message and "delete" in message
    assert contents(tree) == before


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path} holds files"):
        make_demo(tmp_path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "train"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--seconds", "0"],
        ["--seconds", "-1"],
        ["--seconds", "1.5"],
        ["--seconds", "nan"],
        ["--seconds", "inf"],
        ["--seconds", "long"],
        ["--tracks", "0"],
        ["--seed", "-1"],
    ],
)
def test_bad_arguments_end_in_one_line(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo_musdb18.main([str(tmp_path / "new"), *flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and flags[0] in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "/new"])
def test_a_place_that_cannot_be_written_is_a_user_error(below, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        make_demo(f"{tmp_path}/file{below}")


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32), seconds=st.floats(demo_musdb18.SHORTEST, 5))
def test_any_song_is_stereo_in_range_and_of_the_length_asked(seed, seconds):
    stems = song(seed, seconds)
    assert set(stems) == set(SOURCES)
    for stem in (*stems.values(), sum(stems.values())):
        assert stem.shape == (2, round(seconds * RATE)) and stem.dtype == np.float32
        assert np.abs(stem).max() < 0.901
        left, right = stem
        assert 0.01 < levels(stem * [[1], [-1]], seconds)[0]
        assert np.abs(left - right).max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_voice_sings_most_of_the_time_and_rests_between_phrases(seed):
    vocals = song(seed, seconds=8)["vocals"]
    loudness = levels(vocals, 0.1)
    assert (loudness > 0.3 * loudness.max()).mean() > 0.4
    assert 0.03 < (loudness < 0.03 * loudness.max()).mean() < 0.4


@pytest.mark.parametrize("seed", range(3))
def test_the_voice_is_as_loud_in_the_mixture_as_in_pop_music(seed):
    stems = song(seed, seconds=8)
    band = stems["drums"] + stems["bass"] + stems["other"]
    ratio = 20 * np.log10(levels(stems["vocals"], 1) / levels(band, 1))
    assert -8 < np.median(ratio) < 1


@pytest.mark.parametrize("seed", range(3))
def test_the_drums_strike_at_the_start_of_every_bar(seed):
    drums = song(seed, seconds=8)["drums"]
    for start, _ in list(compose(np.random.default_rng(seed)).bars(8))[1:-1]:
        at = round(start * RATE)
        before, after = drums[:, at - 1000 : at], drums[:, at : at + 1000]
        assert np.abs(after).max() > 2 * np.abs(before).max()


@pytest.mark.parametrize("seed", range(3))
def test_the_bass_starts_on_the_root_of_the_first_chord(seed):
    score = compose(np.random.default_rng(seed))
    struck = song(seed)["bass"][0, : round(0.5 * score.beat * RATE)]
    spectrum = np.abs(np.fft.rfft(struck * np.hanning(len(struck)), n=10 * RATE))
    hertz = (350 + spectrum[350:1300].argmax()) / 10
    distance = 69 + 12 * np.log2(hertz / 440) - score.note(score.progression[0])
    assert abs((distance + 6) % 12 - 6) < 0.5


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg decodes the excerpt")
def test_the_excerpt_is_a_real_recording_whose_stems_add_up(tmp_path):
    folder = tmp_path / EXCERPT_NAME
    add_excerpt(folder)
    tracks = {file.stem: sf.read(file)[0] for file in folder.iterdir()}
    assert set(tracks) == {"mixture", *SOURCES}
    error = tracks["mixture"] - sum(tracks[source] for source in SOURCES)
    assert np.square(error).mean() < 0.1 * np.square(tracks["mixture"]).mean()  # it is mastered


def test_without_ffmpeg_the_excerpt_is_omitted_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_musdb18.shutil, "which", lambda program: None)
    add_excerpt(tmp_path / EXCERPT_NAME)
    assert "ffmpeg" in capsys.readouterr().err
    assert not (tmp_path / EXCERPT_NAME).exists()
