"""Data sets other than MUSDB18-HQ: several roots, pairs, stems of other names, other splits."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import yaml
from conftest import RATE, TEST_NAMES, TINY_RUN, TRAIN_NAMES, make_stems, run_command, write_track
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import train
from local.eval.tracks import open_test_set, read_mixture, read_track
from local.musdb18_dataset import SegmentDataset, TrackDataset
from local.musdb18_tracks import (
    SOURCES,
    TRAINING_SPLITS,
    DatasetError,
    describe_layout,
    find_tracks,
    split_validation,
)
from local.tools.command_line import UserError
from local.tracks.roots import PACKAGE, list_places
from local.tracks.stem_files import read_stem_names

LENGTH = 4000
FLAGS = [*TINY_RUN, "--samples_per_track", "4", "--batch_size", "2"]


def write_files(folder: Path, files: dict[str, np.ndarray]) -> Path:
    """Writes file name -> (T, 2) int16."""
    folder.mkdir(parents=True)
    for name, audio in files.items():
        sf.write(folder / name, audio, RATE)
    return folder


def write_pair(folder: Path, seed=0, seconds=1.5, background="accompaniment.wav") -> Path:
    """A karaoke pair of the stems of conftest."""
    stems = make_stems(seconds, RATE, seed)
    music = stems["bass"] + stems["drums"] + stems["other"]
    audio = stems["mixture"] if background.startswith("mixture") else music
    return write_files(folder, {"vocals.wav": stems["vocals"], background: audio})


def names_of(tracks) -> list[str]:
    return [track.name for track in tracks]


def run_train(tmp_path, roots, *flags) -> str:
    command = ["--exp_dir", tmp_path / "run", *FLAGS, "--root", *roots, *flags]
    result = run_command("train.py", *command)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_eval(tmp_path, *flags) -> str:
    command = ["--exp_dir", tmp_path / "run", "--out_dir", "out", "--n_save_ex", 0, *flags]
    result = run_command("eval.py", *command)
    assert result.returncode == 0, result.stderr
    return result.stdout


def scored(tmp_path) -> list[str]:
    return sorted(path.stem for path in (tmp_path / "run" / "out" / "test").glob("*.json"))


def pool(*roots, **options) -> list:
    return find_tracks(roots, TRAINING_SPLITS, RATE, **options)


# Roots


@pytest.fixture
def two_roots(own_corpus, tmp_path) -> tuple[Path, Path]:
    """The corpus, and a root with a track of the same name, one of its own, and no test/."""
    mine = tmp_path / "mine"
    write_track(mine / "train" / TRAIN_NAMES[0], seed=7)
    write_track(mine / "train" / "Me - One", seed=8)
    return own_corpus, mine


def test_several_roots_are_one_data_set(two_roots, tmp_path):
    corpus, mine = two_roots
    name = TRAIN_NAMES[0]
    equal = [f"{name} (corpus)", f"{name} (mine)"]
    expected = sorted([*TRAIN_NAMES[1:], *equal, "Me - One"])
    assert names_of(pool(corpus, mine)) == names_of(pool(mine, corpus)) == expected
    screen = run_train(tmp_path, two_roots)
    assert f"{corpus} (4 tracks), {mine} (2 tracks)" in screen
    assert "from musdb's list: " in screen
    conf = yaml.safe_load((tmp_path / "run" / "conf.yml").read_text())
    assert conf["data"]["root"] == [str(corpus), str(mine)]
    again = ["--conf", tmp_path / "run", "--exp_dir", tmp_path / "new", "--check"]
    assert f"{mine} (2 tracks)" in run_command("train.py", *again).stdout
    shown = run_eval(tmp_path)
    assert f"2 test tracks of {corpus}\n{mine} has no test track" in shown
    assert scored(tmp_path) == sorted(TEST_NAMES)


def test_a_validation_track_of_one_root_is_trained_on_in_none(two_roots, tmp_path):
    tracks, name = pool(*two_roots), TRAIN_NAMES[0]
    listed = tmp_path / "valid.txt"
    for line, validation in {
        f"{name} (mine)": [f"{name} (mine)"],
        name: [f"{name} (corpus)", f"{name} (mine)"],
    }.items():
        listed.write_text(line)
        training, found = split_validation(tracks, listed)
        assert names_of(found) == validation
        assert sorted(names_of(training)) == sorted([*TRAIN_NAMES[1:], "Me - One"])
    listed.write_text(f"{name} (mine)")
    screen = run_train(tmp_path, two_roots, "--valid_tracks", listed, "--check")
    assert f"1 track neither for training nor for validation: {name} (corpus)" in screen
    assert f"from --valid_tracks {listed}: {name} (mine)" in screen


def test_roots_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    for above in ("a", "b"):
        write_track(tmp_path / above / "data" / "train" / "Song")
    roots = [tmp_path / above / "data" for above in ("a", "b")]
    assert names_of(pool(*roots)) == ["Song (a-data)", "Song (b-data)"]


def test_faults_of_roots_come_together(two_roots, tmp_path, error_of):
    corpus, mine = two_roots
    (tmp_path / "empty").mkdir()
    command = ["--exp_dir", tmp_path / "run", *FLAGS, "--root", corpus]
    error = error_of(train.main, *command, tmp_path / "gone", mine, corpus)
    assert f"--root: no such folder: {tmp_path / 'gone'}" in error
    assert f"--root: {corpus} is named twice" in error
    assert f"did you mean {mine}?" in error_of(train.main, *command, tmp_path / "min")
    assert f"--root: {tmp_path / 'empty'} holds no" in error_of(
        train.main, *command, tmp_path / "empty"
    )
    (corpus / "train" / TRAIN_NAMES[1] / "bass.wav").unlink()
    (mine / "train" / "Me - One" / "bass.wav").unlink()
    error = error_of(train.main, *command, mine)
    assert f"1 fault in {corpus}" in error and f"1 fault in {mine}" in error
    assert "train/Me - One/bass.wav or .flac: missing" in error
    assert not (tmp_path / "run").exists()


def test_a_conf_with_a_list_of_roots(tmp_path):
    from local.config import parse_conf
    from local.tools.files import read_yaml

    conf = read_yaml(Path(train.__file__).with_name("conf.yml"))
    for root, parsed in {("~/a", "b"): ["~/a", "b"], ("b",): "b"}.items():
        conf["data"]["root"] = list(root)
        (tmp_path / "conf.yml").write_text(yaml.safe_dump(conf))
        parsed = [str(Path(each).expanduser()) for each in parsed] if len(root) > 1 else parsed
        assert parse_conf(["--conf", str(tmp_path / "conf.yml")])["data"]["root"] == parsed


# Suffixes


def test_wav_and_flac_may_be_mixed_but_not_doubled(own_corpus):
    vocals = own_corpus / "train" / TRAIN_NAMES[0] / "vocals.wav"
    audio, _ = sf.read(vocals, dtype="int16")
    before = {track.name: track.read("vocals") for track in pool(own_corpus)}
    sf.write(vocals.with_suffix(".flac"), audio, RATE)
    with pytest.raises(DatasetError, match="vocals.flac and vocals.wav are both there"):
        pool(own_corpus)
    assert len(pool(own_corpus, suffix="wav")) == 4
    vocals.unlink()
    for track in pool(own_corpus):
        np.testing.assert_array_equal(track.read("vocals"), before[track.name])


# The challenge's package


def test_the_package_of_the_challenge(tmp_path):
    home = tmp_path.joinpath("x", *PACKAGE)
    for seed, name in enumerate(TRAIN_NAMES):
        write_track(home / "train" / "audio" / name, suffix="flac", seed=seed)
    (home / "train" / "lyrics").mkdir()
    (home / "train" / "lyrics" / "A.txt").touch()
    for depth in range(len(PACKAGE) + 1):
        root = tmp_path.joinpath("x", *PACKAGE[:depth])
        assert names_of(pool(root)) == sorted(TRAIN_NAMES)
    root = home.parents[1]
    run_train(tmp_path, [root])
    assert "1 validation track of" in run_eval(tmp_path, "--split", "valid")
    result = run_command("eval.py", "--exp_dir", tmp_path / "run", "--out_dir", "test")
    assert (result.returncode, "--root" in result.stderr) == (2, True)


def test_a_track_may_be_called_audio(tmp_path):
    write_track(tmp_path / "train" / "audio")
    assert names_of(pool(tmp_path)) == ["audio"]


# Karaoke pairs


@pytest.mark.parametrize(
    "background",
    ["accompaniment.wav", "Instrumental.wav", "no_vocals.flac", "background.wav", "mixture.wav"],
)
def test_every_kind_of_background_is_the_same_pair(background, tmp_path):
    write_pair(tmp_path / "train" / "Song", background=background)
    (track,) = pool(tmp_path)
    mixture, (vocals, music) = TrackDataset([track])[0]
    stems = make_stems(1.5, RATE, 0)
    expected = (stems["bass"] + stems["drums"] + stems["other"]).T
    np.testing.assert_array_equal(vocals.numpy() * 32768, stems["vocals"].T)
    np.testing.assert_array_equal(music.numpy() * 32768, expected)
    is_difference = background.startswith("mixture")
    assert any("minus" in line for line in describe_layout([track])) is is_difference


def test_the_first_background_is_taken_and_any_stem_makes_four(tmp_path):
    folder = write_pair(tmp_path / "train" / "Song", background="no_vocals.wav")
    for name in ("mixture.wav", "background.wav"):
        shutil.copy(folder / "vocals.wav", folder / name)
    assert [path.name for path in pool(tmp_path)[0].paths("accompaniment")] == ["no_vocals.wav"]
    shutil.copy(folder / "vocals.wav", folder / "drums.wav")
    with pytest.raises(DatasetError, match="2 faults(.|\n)*bass.wav or .flac: missing") as error:
        pool(tmp_path)
    assert "other.wav or .flac: missing" in str(error.value)


@settings(max_examples=8, deadline=None)
@given(fours=st.integers(0, 3), pairs=st.integers(1, 3))
def test_backgrounds_are_drawn_in_proportion(fours, pairs, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    for number in range(fours):
        write_track(root / "train" / f"four {number}", 0.6, seed=number)
    for number in range(pairs):
        write_pair(root / "train" / f"pair {number}", 10 + number, 0.6)
    dataset, drawn = SegmentDataset(pool(root), LENGTH, 64, seed=1), []
    draw = dataset.draw_stem
    dataset.draw_stem = lambda stem, rng: (drawn.append(stem), draw(stem, rng))[1]
    count = 240
    for index in range(count):
        dataset[index // len(dataset), index % len(dataset)]
    items = drawn.count("accompaniment")
    share = pairs / (fours + pairs)
    assert drawn.count("vocals") == count
    assert [drawn.count(stem) for stem in SOURCES[1:]] == [count - items] * 3
    assert abs(items / count - share) < 5 * (share * (1 - share) / count) ** 0.5 + 1e-9


def test_a_background_of_another_name_is_said_and_no_silence(tmp_path):
    write_pair(tmp_path / "train" / "A", background="acompaniment.wav")
    other = write_pair(tmp_path / "train" / "B", background="instrumental.wav")
    (other / "instrumental.wav").rename(other / "instrumental.mp3")
    for rule in ("error", "silent"):
        with pytest.raises(DatasetError) as error:
            pool(tmp_path, missing_stems=rule)
        heading, *lines = str(error.value).splitlines()
        assert "no_vocals" in heading and "--stem_names accompaniment=NAME" in heading
        assert "--missing_stems" not in heading
        assert ["acompaniment.wav" in line for line in lines] == [True, False]
        assert "train/B" in lines[1] and "instrumental.mp3" in lines[1]
    with pytest.raises(DatasetError, match="2 faults(.|\n)*--suffix"):
        pool(tmp_path, suffix="flac")
    shutil.rmtree(other)
    (track,) = pool(tmp_path, stem_names="accompaniment=acompaniment")
    assert [path.name for path in track.paths("accompaniment")] == ["acompaniment.wav"]


def test_silent_stems_are_named_with_what_lies_beside_them(own_corpus):
    folder = own_corpus / "train" / TRAIN_NAMES[0]
    (folder / "bass.wav").rename(folder / "base.wav")
    with pytest.raises(DatasetError, match=r"bass.wav or .flac: missing \(found base.wav"):
        pool(own_corpus)
    lines = describe_layout(pool(own_corpus, missing_stems="silent"))
    assert f"missing: {TRAIN_NAMES[0]}" in lines[0] and f"{TRAIN_NAMES[0]}/base.wav" in lines[1]


def test_pairs_alone_train_and_are_evaluated(tmp_path):
    root = tmp_path / "songs"
    for seed, place in enumerate(("train/A", "train/B", "valid/C", "test/D", "test/E")):
        background = "mixture.wav" if place in ("train/B", "test/E") else "accompaniment.wav"
        write_pair(root / place, seed, 2.3, background)
    screen = run_train(tmp_path, [root])
    assert "3 tracks of vocals and a background" in screen
    assert "1 track whose background is the mixture minus the vocals" in screen
    assert re.search("validation .*, from valid/: C$", screen, re.MULTILINE)
    shown = run_eval(tmp_path)
    assert shown.count("1 track without a mixture") == 1
    assert scored(tmp_path) == ["D", "E"]


def test_pairs_need_a_mixed_background(own_corpus, tmp_path, error_of):
    write_pair(own_corpus / "train" / "Pair")
    command = ["--exp_dir", tmp_path / "run", "--root", own_corpus, *FLAGS]
    error = error_of(train.main, *command, "--mix_background", "no", "--C", 4)
    assert "--mix_background no" in error and "Pair" in error


def test_a_background_of_another_length_is_refused(tmp_path):
    folder = write_pair(tmp_path / "train" / "Song")
    sf.write(folder / "accompaniment.wav", np.zeros((100, 2)), RATE)
    with pytest.raises(DatasetError, match="train/Song: files of different lengths"):
        pool(tmp_path)
    sf.write(folder / "accompaniment.wav", np.zeros((100, 2)), 2 * RATE)
    with pytest.raises(DatasetError, match="1 fault in(.|\n)*--sample_rate"):
        pool(tmp_path)


# Stem names


def write_named(root: Path) -> dict[str, np.ndarray]:
    stems = make_stems(1.5, RATE, 0)
    half = stems["vocals"] // 2
    files = {"Lead Vox.wav": half, "backing.flac": stems["vocals"] - half}
    files |= {"perc.wav": stems["drums"], "bass.wav": stems["bass"], "other.wav": stems["other"]}
    write_files(root / "train" / "Song", files)
    return stems


def test_stems_of_other_names_are_found_and_summed(tmp_path):
    stems = write_named(tmp_path)
    write_track(tmp_path / "train" / "Usual", seed=1)
    names = "vocals='lead vox',backing drums=perc"
    song, usual = pool(tmp_path, stem_names=names)
    for source in SOURCES:
        np.testing.assert_array_equal(song.read(source) * 32768, stems[source].T)
        part = song.read(source, 7, 100)
        np.testing.assert_array_equal(part * 32768, stems[source].T[:, 7:107])
    np.testing.assert_array_equal(
        usual.read("vocals") * 32768, make_stems(1.5, RATE, 1)["vocals"].T
    )


def test_a_missing_stem_is_a_fault_or_silence(tmp_path):
    write_named(tmp_path)
    folder = tmp_path / "train" / "Song"
    (folder / "perc.wav").unlink()
    names = "vocals='lead vox',backing"
    with pytest.raises(DatasetError, match=r"--missing_stems silent(.|\n)*Song/drums.wav or"):
        pool(tmp_path, stem_names=names)
    (track,) = pool(tmp_path, stem_names=names, missing_stems="silent")
    assert not track.read("drums").any() and track.read("drums").shape == (2, track.length)
    assert "1 track with silence" in describe_layout([track])[0]
    assert TrackDataset([track], mix_background=False)[0][1].shape == (4, 2, track.length)
    (folder / "drums.mp3").touch()  # which is not missing, but of a kind that is not read
    with pytest.raises(DatasetError, match="found drums.mp3"):
        pool(tmp_path, stem_names=names, missing_stems="silent")
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DatasetError, match="train/Song/vocals: missing"):
        pool(tmp_path, missing_stems="silent")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vocals", "expected STEM=NAME"),
        ("vocals=", "expected STEM=NAME"),
        ("vocals=a,", "expected STEM=NAME"),
        ("vocal=lead", "did you mean vocals"),
        ("vocals=a vocals=b", "named twice"),
        ("vocals=a bass=A", "more than once"),
        ("vocals='a", "--stem_names"),
    ],
)
def test_faults_of_stem_names(text, words):
    with pytest.raises(UserError, match=words) as error:
        read_stem_names(text)
    assert str(error.value).count("--stem_names") == 1


def test_stem_names_of_a_run_hold_in_evaluation(tmp_path):
    root = tmp_path / "songs"
    write_named(root)
    for place in ("valid/V", "test/T"):
        shutil.copytree(root / "train" / "Song", root / place)
        (root / place / "perc.wav").unlink()
    flags = ["--stem_names", "vocals='lead vox',backing drums=perc", "--missing_stems", "silent"]
    screen = run_train(tmp_path, [root], *flags)
    assert "1 track with silence for a stem that is missing" in screen
    assert "1 track with silence" in run_eval(tmp_path)
    assert scored(tmp_path) == ["T"]


# Splits


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_a_validation_folder_is_validated_on(name, own_corpus):
    """And musdb's list does not count then; a track of its name is left out in train/."""
    shutil.copytree(own_corpus / "train" / TRAIN_NAMES[0], own_corpus / name / TRAIN_NAMES[0])
    training, validation = split_validation(pool(own_corpus))
    assert [track.place.split for track in validation] == ["valid"]
    assert names_of(validation) == [TRAIN_NAMES[0]]
    assert names_of(training) == sorted(TRAIN_NAMES[1:])


def test_each_root_has_its_own_validation(own_corpus, tmp_path):
    """One by its folder, the other by musdb's list; valid.txt takes the place of both."""
    mine = tmp_path / "mine"
    for place in ("train/One", "train/Two", "valid/Two", "valid/Three"):
        write_pair(mine / place)
    training, validation = split_validation(pool(own_corpus, mine))
    assert names_of(validation) == ["Leaf - Summerghost", "Three", "Two"]
    assert sorted(names_of(training)) == sorted({*TRAIN_NAMES, "One"} - {"Leaf - Summerghost"})
    (tmp_path / "valid.txt").write_text("Three")
    training, validation = split_validation(pool(own_corpus, mine), tmp_path / "valid.txt")
    assert names_of(validation) == ["Three"]
    assert sorted(names_of(training)) == sorted([*TRAIN_NAMES, "One"])


def test_two_validation_folders_or_an_empty_one_are_faults(own_corpus):
    (own_corpus / "valid").mkdir()
    with pytest.raises(DatasetError, match="valid holds no tracks"):
        pool(own_corpus)
    (own_corpus / "validation").mkdir()
    with pytest.raises(DatasetError, match="valid.* and .*validation are both there"):
        pool(own_corpus)


def test_what_was_trained_and_validated_on_is_evaluated(corpus, experiment, tmp_path):
    found = {
        split: names_of(open_test_set(corpus, RATE, split=split))
        for split in ("train", "valid", "test")
    }
    assert found["valid"] == ["Leaf - Summerghost"]
    assert found["train"] == sorted(set(TRAIN_NAMES) - {"Leaf - Summerghost"})
    assert found["test"] == sorted(TEST_NAMES)
    shutil.copytree(experiment, tmp_path / "run")
    assert "1 validation track of" in run_eval(tmp_path, "--split", "valid")
    assert scored(tmp_path) == ["Leaf - Summerghost"]


def test_a_split_of_stem_files_is_evaluated(excerpts, tmp_path, error_of, experiment):
    (name,) = (path.name.removesuffix(".stem.mp4") for path in (excerpts / "train").iterdir())
    (track,) = open_test_set(excerpts, 44100, split="train")
    assert track.name == name
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", excerpts]
    assert "--split valid" in error_of(evaluation.main, *flags, "--split", "valid")


def test_without_a_mixture_the_sum_of_the_stems_is_read(own_corpus):
    """Of 16-bit files it is the mixture to the last bit."""
    before = [read_track(track) for track in open_test_set(own_corpus, RATE)]
    for path in own_corpus.glob("test/*/mixture.wav"):
        path.unlink()
    tracks = open_test_set(own_corpus, RATE)
    for track, (expected, _) in zip(tracks, before, strict=True):
        audio, clipped = read_track(track)
        assert clipped == {}
        np.testing.assert_array_equal(read_mixture(track), expected["mixture"])
        for target, samples in expected.items():
            np.testing.assert_array_equal(audio[target], samples)
    assert describe_layout(tracks) == ["2 tracks without a mixture: the sum of the stems is taken"]


def test_names_are_found_without_reading_files(own_corpus):
    """As the first screen does; damaged files are a matter of find_tracks."""
    for path in own_corpus.rglob("*.wav"):
        path.write_bytes(b"")
    assert len(list_places(own_corpus, TRAINING_SPLITS)) == len(TRAIN_NAMES)


def test_a_refused_rate_names_the_command_that_converts(own_corpus):
    folder = own_corpus / "train" / TRAIN_NAMES[0]
    sf.write(folder / "vocals.wav", np.zeros((100, 1)), RATE)
    with pytest.raises(DatasetError, match=f"local.convert {own_corpus} OUT --sample_rate {RATE}"):
        pool(own_corpus)
