import importlib.util
import multiprocessing
import os
import re
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml
from conftest import (
    RATE,
    TEST_NAMES,
    TRAIN_NAMES,
    make_stems,
    write_corpus,
    write_flac_of_unknown_length,
    write_track,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from local.musdb18_dataset import SegmentDataset, TrackDataset, keep_batch
from local.musdb18_tracks import (
    SOURCES,
    VALIDATION_TRACKS,
    DatasetError,
    Track,
    find_tracks,
    split_validation,
)
from local.tracks.track import Part, Place
from local.train.loaders import EpochSampler, RankSampler

LENGTH = 4000


@pytest.fixture(scope="module")
def tracks(corpus):
    return find_tracks(corpus, "train", RATE)


@pytest.fixture(scope="module")
def segments(tracks):
    return SegmentDataset(tracks, LENGTH, samples_per_track=8, seed=3)


def fault_of(root: Path, split="train", **options) -> str:
    with pytest.raises(DatasetError) as error:
        find_tracks(root, split, RATE, **options)
    return str(error.value)


def make_track(path: Path, length: int) -> Track:
    """A track whose only stem is a file."""
    place = Place(path.parent, path.parent.name, path.parent.name, path.parent, "train")
    return Track(place, RATE, length, {path.stem: (Part(path.name),)})


# Tracks


def test_the_validation_list_is_that_of_musdb():
    package = Path(importlib.util.find_spec("musdb").origin).parent
    listed = yaml.safe_load((package / "configs" / "mus.yaml").read_text())["validation_tracks"]
    assert VALIDATION_TRACKS == tuple(listed)


def test_tracks_are_sorted_and_keep_their_whole_names(corpus, tracks):
    assert [track.name for track in tracks] == sorted(TRAIN_NAMES)
    assert [track.name for track in find_tracks(corpus, "test", RATE)] == sorted(TEST_NAMES)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_reading_gives_exactly_the_samples_of_the_file(suffix, tmp_path):
    write_track(tmp_path / "train" / "T.1 & co", 1.0, suffix=suffix, seed=7)
    (track,) = find_tracks(tmp_path, "train", RATE, suffix, with_mixture=True)
    for source, stem in make_stems(1.0, RATE, 7).items():
        audio = track.read(source, 100, 1000)
        assert audio.dtype == np.float32
        np.testing.assert_array_equal(audio * 32768, stem[100:1100].T)
        np.testing.assert_array_equal(track.read(source) * 32768, stem.T)


def wav_bytes(frames: np.ndarray, before=(), after=(), fmt_tail=b"") -> bytes:
    """A wav of (T, 2) int16 with other chunks, (name, body) each, around its samples."""
    layout = struct.pack("<HHIIHH", 1, 2, RATE, 4 * RATE, 4, 16) + fmt_tail
    chunks = [*before, (b"fmt ", layout), *before, (b"data", frames.tobytes()), *after]
    padded = [name + struct.pack("<I", len(x)) + x + bytes(len(x) % 2) for name, x in chunks]
    body = b"WAVE" + b"".join(padded)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def whole_file(path: Path) -> np.ndarray:
    """(2, T) float32, as soundfile reads it."""
    return sf.read(path, dtype="float32", always_2d=True)[0].T


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    noise = np.random.default_rng(0).integers(-32768, 32768, (500, 2), dtype=np.int16)
    noise[:2] = [[-32768, 32767], [0, -1]]
    return noise


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


CHUNKS = st.lists(
    st.tuples(st.sampled_from([b"LIST", b"junk", b"id3 ", b"PAD "]), st.binary(max_size=9001)),
    max_size=2,
)


@settings(max_examples=60, deadline=None)
@given(
    before=CHUNKS,
    after=CHUNKS,
    fmt_tail=st.sampled_from([b"", b"\0\0"]),
    ends=st.tuples(st.integers(0, 500), st.integers(0, 500)).map(sorted),
)
def test_a_16_bit_wav_is_read_as_soundfile_reads_it(scratch, noise, before, after, fmt_tail, ends):
    path = scratch / "vocals.wav"
    path.write_bytes(wav_bytes(noise, before, after, fmt_tail))
    track, (start, end) = make_track(scratch / "vocals.wav", len(noise)), ends
    samples, _ = track.read_samples("vocals", start, end - start)
    assert samples.dtype == np.int16  # not read by soundfile
    audio = track.read("vocals", start, end - start)
    assert audio.dtype == np.float32
    np.testing.assert_array_equal(audio, whole_file(path)[:, start:end])
    np.testing.assert_array_equal(track.read("vocals"), whole_file(path))


@pytest.mark.parametrize(
    "suffix, options",
    [
        ("flac", dict(subtype="PCM_16")),
        ("wav", dict(subtype="PCM_24")),
        ("wav", dict(subtype="PCM_U8")),
        ("wav", dict(subtype="FLOAT")),
        ("wav", dict(subtype="PCM_16", format="WAVEX")),
        ("wav", dict(subtype="PCM_16", format="RF64")),
        ("wav", dict(subtype="PCM_16", endian="BIG")),
        ("wav", dict(subtype="PCM_16", format="AIFF")),
    ],
)
def test_all_other_formats_are_read_by_soundfile(tmp_path, noise, suffix, options):
    path = tmp_path / f"vocals.{suffix}"
    sf.write(path, noise, RATE, **options)
    track = make_track(path, len(noise))
    assert track.read_samples("vocals")[0].dtype == np.float32
    np.testing.assert_array_equal(track.read("vocals"), whole_file(path))
    np.testing.assert_array_equal(track.read("vocals", 7, 100), whole_file(path)[:, 7:107])


def test_a_header_with_wrong_sizes_is_read_by_soundfile(tmp_path, noise):
    """A writer that streams does not know how many samples will come."""
    whole, size = wav_bytes(noise), struct.pack("<I", noise.nbytes)
    path = tmp_path / "vocals.wav"
    path.write_bytes(whole.replace(b"data" + size, b"data" + b"\xff" * 4))
    track = make_track(tmp_path / "vocals.wav", len(noise))
    np.testing.assert_array_equal(track.read("vocals") * 32768, noise.T)


@pytest.mark.parametrize("cut", [0, 4, 11, 12, 19, 30, 40, 44])
def test_a_file_that_ends_within_its_header_is_an_error(tmp_path, noise, cut):
    (tmp_path / "vocals.wav").write_bytes(wav_bytes(noise)[:cut])
    with pytest.raises(DatasetError, match="vocals.wav: "):
        make_track(tmp_path / "vocals.wav", len(noise)).read("vocals", 0, 100)


@pytest.mark.parametrize("name", [b"RIFF", b"WAVE", b"fmt ", b"data"])
def test_a_file_with_a_damaged_header_is_an_error(tmp_path, noise, name):
    (tmp_path / "vocals.wav").write_bytes(wav_bytes(noise).replace(name, b"\0" * 4))
    with pytest.raises(DatasetError, match="vocals.wav: "):
        make_track(tmp_path / "vocals.wav", len(noise)).read("vocals", 0, 100)


def test_a_segment_of_a_wav_reads_no_more_than_its_samples(tmp_path, noise):
    """A hole of 100 MB makes a file of hours that costs no disk."""
    size, path = 100 << 20, tmp_path / "vocals.wav"
    path.write_bytes(wav_bytes(noise[:0])[:-4] + struct.pack("<I", size))
    os.truncate(path, 44 + size)
    track = make_track(path, size // 4)
    tracemalloc.start()
    try:
        track.read_samples("vocals", 20_000_000, 4000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 4 * 4000 + 50_000


def test_a_segment_of_a_flac_reads_no_more_than_its_samples(tmp_path, monkeypatch):
    write_corpus(tmp_path, suffix="flac")
    segments = SegmentDataset(find_tracks(tmp_path, "train", RATE, "flac"), LENGTH)
    lengths, read = [], sf.read

    def spy(path, frames, *args, **kwargs):
        lengths.append((frames, kwargs["dtype"]))
        return read(path, frames, *args, **kwargs)

    monkeypatch.setattr(sf, "read", spy)
    segments[0, 0]
    assert lengths == [(LENGTH, "float32")] * 4


def test_validation_tracks_are_never_trained_on(tracks):
    training, validation = split_validation(tracks)
    assert [track.name for track in validation] == ["Leaf - Summerghost"]
    assert {track.name for track in training} == set(TRAIN_NAMES) - {"Leaf - Summerghost"}


@pytest.mark.parametrize("kind", [Path, str])
def test_validation_tracks_from_a_file(tracks, tmp_path, kind):
    names = tmp_path / "valid.txt"
    names.write_text(f"{TRAIN_NAMES[1]}\n\n  {TRAIN_NAMES[0]}\n", encoding="utf-8")
    training, validation = split_validation(tracks, kind(names))
    assert {track.name for track in validation} == set(TRAIN_NAMES[:2])
    assert {track.name for track in training} == set(TRAIN_NAMES[2:])


@pytest.mark.parametrize(
    "content, words",
    [
        ("Nobody\n" + TRAIN_NAMES[0], "--valid_tracks: .*valid.txt: not in .*: Nobody$"),
        (TRAIN_NAMES[0] + "x", rf"valid.txt: .*; did you mean {re.escape(TRAIN_NAMES[0])}\?"),
        ("", "pass --valid_tracks FILE"),
        ("\n".join(TRAIN_NAMES), "every track of train/ is a validation track"),
        (None, "--valid_tracks: .*valid.txt cannot be read"),
    ],
)
def test_faults_of_a_validation_file(tracks, tmp_path, content, words):
    names = tmp_path / "valid.txt"
    if content is not None:
        names.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=words):
        split_validation(tracks, names)


def test_no_known_validation_track(tracks):
    with pytest.raises(DatasetError, match="--valid_tracks FILE"):
        split_validation([track for track in tracks if track.name not in VALIDATION_TRACKS])


# Faults of the files


def test_faults_of_the_layout(tmp_path):
    assert "no such folder" in fault_of(tmp_path / "nowhere")
    assert "holds no train/TRACK/vocals.wav or .flac" in fault_of(tmp_path)
    (tmp_path / "train").mkdir()
    assert "holds no tracks" in fault_of(tmp_path)
    (tmp_path / "train" / "A - B.stem.mp4").touch()
    assert "python -m local.stems" in fault_of(tmp_path)


def test_every_fault_of_the_files_is_reported_at_once(own_corpus):
    first, second, third, fourth = sorted((own_corpus / "train").iterdir())
    (first / "bass.wav").unlink()
    (first / "drums.wav").write_bytes(b"RIFF, but no wav")
    sf.write(second / "vocals.wav", np.zeros((100, 2)), RATE)
    sf.write(second / "other.wav", np.zeros((0, 2)), RATE)
    sf.write(third / "vocals.wav", np.zeros((12800, 1)), RATE)
    sf.write(fourth / "vocals.wav", np.zeros((14400, 2)), 44100)
    fault = fault_of(own_corpus)
    for words in (
        f"7 faults in {own_corpus}",
        f"{first.name}/bass.wav or .flac: missing",
        f"{first.name}/drums.wav: cannot be read",
        f"{second.name}/other.wav: no samples",
        f"{second.name}: files of different lengths",
        "vocals.wav 100, bass.wav",
        f"{third.name}/vocals.wav: expected 2 channels, got 1",
        f"{fourth.name}/vocals.wav: expected 8000 Hz (--sample_rate), got 44100 Hz",
    ):
        assert words in fault


def test_the_other_suffix_is_suggested(tmp_path):
    write_corpus(tmp_path, suffix="flac")
    fault = fault_of(tmp_path, suffix="wav")
    assert fault.count("vocals.flac: see --suffix") == len(TRAIN_NAMES) == fault.count("missing")
    assert find_tracks(tmp_path, "train", RATE, suffix="flac")


def header(rate=RATE, channels=2, samples=12_000) -> bytes:
    """A 16-bit wav that says so much, and holds nothing."""
    width = 2 * channels
    layout = struct.pack("<IHHIIHH", 16, 1, channels, rate, width * rate % 2**32, width, 16)
    size = width * samples % 2**32
    return (
        b"RIFF"
        + struct.pack("<I", 2**32 - 1)
        + b"WAVEfmt "
        + layout
        + b"data"
        + struct.pack("<I", size)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"RIFF", "cannot be read"),
        (header(channels=0), "cannot be read"),
        (header(), "no samples"),
        (header(samples=2**30 - 1), "no samples"),
        (header(rate=2**31 - 1), "expected 8000 Hz .*, got 2147483647 Hz"),
        (header(channels=1000), "expected 2 channels, got 1000|cannot be read"),
    ],
    ids=["empty", "cut", "no channels", "nothing", "huge", "absurd rate", "many channels"],
)
def test_wrong_headers(own_corpus, content, words):
    (own_corpus / "train" / TRAIN_NAMES[0] / "vocals.wav").write_bytes(content)
    with pytest.raises(DatasetError, match=f"vocals.wav: ({words})"):
        find_tracks(own_corpus, "train", RATE)


@pytest.mark.parametrize(
    "name", ["line\nbreak", "bell\a", os.fsdecode(b"caf\xe9"), "para\u2029graph"]
)
def test_names_that_cannot_be_printed(own_corpus, name):
    (own_corpus / "train" / TRAIN_NAMES[0]).rename(own_corpus / "train" / name)
    with pytest.raises(DatasetError) as error:
        find_tracks(own_corpus, "train", RATE)
    line = str(error.value).splitlines()[-1]
    assert line == f"  {ascii(name)}: rename it; its name holds control characters or is not UTF-8"


def test_names_of_any_language_and_punctuation(own_corpus):
    for old, new in zip(
        TRAIN_NAMES, ["-rf *", "日本語 \u00a0 e\u0301", "%s {x} $HOME", "'\"`\\"], strict=True
    ):
        (own_corpus / "train" / old).rename(own_corpus / "train" / new)
    for track in find_tracks(own_corpus, "train", RATE):
        assert track.read("vocals").shape == (2, track.length)


def test_broken_links_are_no_tracks(own_corpus):
    (own_corpus / "train" / "Loop").symlink_to("Loop")
    (own_corpus / "train" / "Gone").symlink_to(own_corpus / "elsewhere")
    (own_corpus / "train" / "Linked").symlink_to(own_corpus / "test" / TEST_NAMES[0])
    with pytest.raises(DatasetError) as error:
        find_tracks(own_corpus, "train", RATE)
    expected = [f"  train/{name}: a broken symbolic link" for name in ("Gone", "Loop")]
    assert str(error.value).splitlines()[1:] == expected


def test_hundreds_of_faults_are_counted(tmp_path):
    for index in range(10):
        (tmp_path / "train" / f"{index}").mkdir(parents=True)
    fault = fault_of(tmp_path)
    assert "40 faults" in fault
    assert fault.endswith("and 20 more")


def test_the_mixture_is_not_needed_for_training_but_for_the_test(own_corpus):
    for split in ("train", "test"):
        for folder in (own_corpus / split).iterdir():
            (folder / "mixture.wav").unlink()
    assert find_tracks(own_corpus, "train", RATE)
    assert not find_tracks(own_corpus, "test", RATE, with_mixture=True)[0].has_mixture


def test_folders_of_systems_are_no_tracks(own_corpus):
    train = own_corpus / "train"
    for name in (".Half made.tmp", "__MACOSX", "@eaDir", "lost+found", ".ipynb_checkpoints"):
        (train / name).mkdir()
        (train / name / "._vocals.wav").write_bytes(b"\0\5\x16\7")
        (train / TRAIN_NAMES[0] / name).mkdir()
    (train / "notes.txt").touch()
    (train / "._gone").symlink_to("gone")
    tracks = find_tracks(own_corpus, "train", RATE)
    assert [track.name for track in tracks] == sorted(TRAIN_NAMES)


def test_a_track_may_be_named_as_a_folder_of_a_system(own_corpus):
    folder = (own_corpus / "train" / TRAIN_NAMES[0]).rename(own_corpus / "train" / "Lost+Found")
    assert "Lost+Found" in [track.name for track in find_tracks(own_corpus, "train", RATE)]
    (folder / "vocals.wav").unlink()
    assert "Lost+Found/vocals.wav or .flac: missing" in fault_of(own_corpus)


@pytest.mark.parametrize("content", [[], [".DS_Store"], ["._vocals.wav"], ["@eaDir"]])
def test_an_ordinary_folder_without_audio_is_a_fault(own_corpus, content):
    """It may be a track whose copy has failed."""
    (own_corpus / "train" / "Failed").mkdir()
    for name in content:
        (own_corpus / "train" / "Failed" / name).touch()
    assert "train/Failed/vocals.wav or .flac: missing" in fault_of(own_corpus)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_names_of_files_in_other_letters(corpus, tmp_path, suffix):
    write_corpus(tmp_path, suffix)
    folder = tmp_path / "train" / TRAIN_NAMES[0]
    for name in (f"vocals.{suffix.upper()}", f"Bass.{suffix}", f"DRUMS.{suffix.title()}"):
        (folder / name.casefold()).rename(folder / name)
    expected = find_tracks(corpus, "train", RATE)
    for one, other in zip(expected, find_tracks(tmp_path, "train", RATE, suffix), strict=True):
        for source in SOURCES:
            np.testing.assert_array_equal(one.read(source), other.read(source))
    shutil.copy(folder / f"vocals.{suffix.upper()}", folder / f"vocals.{suffix}")
    names = f"vocals.{suffix.upper()} and vocals.{suffix}"
    fault = f"train/{TRAIN_NAMES[0]}/vocals.{suffix}: {names} are both there"
    with pytest.raises(DatasetError) as error:
        find_tracks(tmp_path, "train", RATE, suffix)
    assert fault in str(error.value)


def test_tracks_shorter_than_a_segment_are_listed(tracks):
    with pytest.raises(DatasetError) as error:
        SegmentDataset(tracks, int(1.65 * RATE))
    assert "1.50 s, shorter than --segment 1.65" in str(error.value)
    assert "2 faults" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_found_with_their_place(own_corpus, value):
    path = own_corpus / "train" / TRAIN_NAMES[0] / "vocals.wav"
    audio, _ = sf.read(path, dtype="float32")
    audio[6000, 1] = value
    sf.write(path, audio, RATE, "FLOAT")
    track = next(t for t in find_tracks(own_corpus, "train", RATE) if t.name == TRAIN_NAMES[0])
    with pytest.raises(DatasetError) as error:
        track.read("vocals", 1000, 6000)
    assert f"{path}: not a finite number at sample 6000 (0.750 s)" in str(error.value)
    assert np.isfinite(track.read("vocals", 0, 6000)).all()


def test_a_file_that_shrinks_or_goes_during_the_run_is_named(own_corpus):
    track = find_tracks(own_corpus, "train", RATE)[0]
    sf.write(track.path("bass"), np.zeros((50, 2)), RATE)
    with pytest.raises(DatasetError, match="bass.wav: "):
        track.read("bass", 10, 1000)
    track.path("bass").unlink()
    with pytest.raises(DatasetError, match="bass.wav: cannot be read"):
        track.read("bass", 10, 1000)


@settings(max_examples=60, deadline=None)
@given(
    place=st.floats(0, 1, exclude_max=True),
    kind=st.sampled_from(["flip", "cut", "remove", "blank"]),
    start=st.integers(0, 11_000),
)
def test_a_damaged_flac_is_named_or_read_right(scratch, place, kind, start):
    audio = make_stems(1.5, RATE, 0)["mixture"]
    path = scratch / "vocals.flac"
    sf.write(path, audio, RATE)
    content = bytearray(path.read_bytes())
    index = int(place * len(content))
    if kind == "flip":
        content[index] ^= 4
    elif kind == "cut":
        del content[index:]
    elif kind == "remove":
        del content[index : index + 300]
    else:
        content[index : index + 300] = bytes(len(content[index : index + 300]))
    path.write_bytes(content)
    try:
        samples = make_track(path, len(audio)).read("vocals", start, 1000)
    except DatasetError as error:
        fault = str(error)
        assert fault.startswith(f"{path}: ")
        assert re.search("damaged|changed|empty", fault)
        assert not re.search("psf|decoder|sync|Error", fault)
    else:
        np.testing.assert_array_equal(samples * 32768, audio[start : start + 1000].T)


def test_a_flac_of_unknown_length_is_refused(tmp_path):
    write_corpus(tmp_path / "flac", "flac")
    path = tmp_path / "flac" / "train" / TRAIN_NAMES[0] / "bass.flac"
    write_flac_of_unknown_length(path)
    with pytest.raises(DatasetError, match="bass.flac: its header does not say how long"):
        find_tracks(tmp_path / "flac", "train", RATE, "flac")


@pytest.fixture
def changing(tmp_path, noise) -> tuple[Track, Path]:
    """(a track as it was when the run began, its file)"""
    path = tmp_path / "vocals.wav"
    path.write_bytes(wav_bytes(noise))
    return make_track(tmp_path / "vocals.wav", len(noise)), path


def test_a_truncated_file_is_read_as_far_as_it_goes(changing, noise):
    track, path = changing
    os.truncate(path, 44 + 4 * 300 + 1)
    np.testing.assert_array_equal(track.read("vocals", 100, 200) * 32768, noise[100:300].T)
    for start, length, left in [(100, 201, 200), (400, 50, 0), (0, -1, 300)]:
        with pytest.raises(DatasetError, match=f"vocals.wav: .*got {left}; .*damaged"):
            track.read("vocals", start, length)


@pytest.mark.parametrize("start, length", [(400, 101), (600, 10), (-10, 100)])
def test_bytes_after_the_samples_are_not_read_as_audio(changing, noise, start, length):
    track, path = changing
    path.write_bytes(wav_bytes(noise, after=[(b"junk", bytes(1000))]))
    with pytest.raises(DatasetError, match="vocals.wav: .*samples"):
        track.read("vocals", start, length)


@pytest.mark.parametrize("found", [250, 1000])
def test_a_file_replaced_by_one_of_another_length(changing, noise, found):
    track, path = changing
    path.write_bytes(wav_bytes(np.resize(noise, (found, 2))))
    with pytest.raises(DatasetError, match=f"vocals.wav: expected 500 samples.*got {found};"):
        track.read("vocals")


def test_a_file_replaced_by_one_of_other_channels(changing, noise):
    track, path = changing
    sf.write(path, noise[:, :1], RATE)
    with pytest.raises(DatasetError, match="vocals.wav: expected 2 channels at 8000 Hz, got 1"):
        track.read("vocals", 0, 100)


def test_a_file_replaced_by_one_of_another_format_is_read(changing, noise):
    track, path = changing
    sf.write(path, noise, RATE, "PCM_24")
    np.testing.assert_array_equal(track.read("vocals", 3, 99) * 32768, noise[3:102].T)


# Items


@pytest.mark.smoke
def test_the_mixture_is_the_sum_of_the_targets(segments):
    mixture, targets = segments[0, 5]
    assert mixture.shape == (2, LENGTH)
    assert targets.shape == (2, 2, LENGTH)
    assert mixture.dtype == targets.dtype == torch.float32
    assert torch.equal(mixture, targets.sum(0))


def test_a_source_is_a_segment_with_a_gain_and_perhaps_swapped(corpus, tracks, segments):
    """Each target 0 is found in exactly one vocals file, scaled by a gain within bounds."""
    whole = {track.name: track.read("vocals") for track in tracks}
    gains, swaps, origins, starts = [], [], set(), []
    for index in range(len(segments)):
        vocals = segments[1, index][1][0].numpy()
        gain, swapped, name, start = locate(vocals, whole)
        gains.append(gain)
        swaps.append(swapped)
        origins.add(name)
        starts.append(start)
    assert 0.25 <= min(gains) < 0.4
    assert 1.1 < max(gains) <= 1.25
    assert 0.2 < np.mean(swaps) < 0.8
    assert origins == set(TRAIN_NAMES)
    assert len(set(starts)) > 20


def locate(segment: np.ndarray, whole: dict[str, np.ndarray]) -> tuple[float, bool, str, int]:
    for name, audio in whole.items():
        for swapped in (False, True):
            channels = audio[::-1] if swapped else audio
            windows = np.lib.stride_tricks.sliding_window_view(channels[0], 200)
            probe = segment[0, :200]
            gains = windows @ probe / np.square(windows).sum(1)
            errors = np.abs(windows * gains[:, None] - probe).max(1)
            start = int(errors.argmin())
            found = channels[:, start : start + segment.shape[1]]
            if found.shape == segment.shape and np.allclose(
                found * gains[start], segment, atol=1e-6
            ):
                return float(gains[start]), swapped, name, start
    raise AssertionError("a segment that is in no file")


@pytest.mark.parametrize("mix_background", [True, False])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_items_equal_a_plain_implementation_bit_for_bit(own_corpus, subtype, mix_background):
    for path in own_corpus.glob("train/*/bass.wav"):
        sf.write(path, sf.read(path)[0], RATE, subtype)
    tracks = find_tracks(own_corpus, "train", RATE)
    dataset = SegmentDataset(tracks, 1001, 8, mix_background, seed=5)
    for index in range(len(dataset)):
        mixture, targets = dataset[3, index]
        expected = plain_targets(tracks, 1001, (5, 3, index), mix_background)
        np.testing.assert_array_equal(targets.numpy(), expected)
        np.testing.assert_array_equal(mixture.numpy(), sum(expected))
        assert mixture.is_contiguous() and targets.is_contiguous()


@pytest.mark.parametrize(("gains", "swap"), [((0.5, 0.5), 0), ((0.75, 2), 1)])
def test_stems_of_one_track_are_from_one_place_with_gains_and_swaps_of_their_own(
    tracks, gains, swap
):
    dataset = SegmentDataset(tracks, 1001, 4, False, 5, mix_tracks=False, gains=gains, swap=swap)
    places = set()
    for index in range(len(dataset)):
        rng = np.random.default_rng((5, 2, index))
        number = rng.integers(len(tracks))
        start = rng.integers(tracks[number].length - 1001 + 1)
        places.add((number, start))
        for source, target in zip(SOURCES, dataset[2, index][1].numpy(), strict=True):
            gain, _ = np.float32(rng.uniform(*gains)), rng.random()
            segment = whole_file(tracks[number].path(source))[:, start : start + 1001]
            np.testing.assert_array_equal(target, gain * segment[:: -1 if swap else 1])
    assert len(places) == len(dataset)


def plain_targets(tracks, length: int, seed: tuple, mix_background: bool) -> list[np.ndarray]:
    rng, stems = np.random.default_rng(seed), []
    for source in SOURCES:
        track = tracks[rng.integers(len(tracks))]
        start = rng.integers(track.length - length + 1)
        gain, swap = rng.uniform(0.25, 1.25), rng.random() < 0.5
        left, right = np.float32(gain) * whole_file(track.path(source))[:, start : start + length]
        stems.append(np.stack([right, left] if swap else [left, right]))
    vocals, bass, drums, other = stems
    return [vocals, bass + drums + other] if mix_background else stems


def test_four_targets_are_stacked_in_the_published_order(tracks):
    (mixture, targets), track = TrackDataset(tracks, mix_background=False)[1], tracks[1]
    for target, source in zip(targets, ("vocals", "bass", "drums", "other"), strict=True):
        np.testing.assert_array_equal(target.numpy(), track.read(source))
    torch.testing.assert_close(mixture, targets.sum(0), rtol=0, atol=1e-7)


@pytest.mark.smoke
def test_a_validation_item_is_a_whole_track_as_it_is(tracks):
    mixture, targets = TrackDataset(tracks)[2]
    assert targets.shape == (2, 2, tracks[2].length)
    np.testing.assert_array_equal(targets[0].numpy(), tracks[2].read("vocals"))
    np.testing.assert_allclose(
        mixture.numpy(), whole_file(tracks[2].folder / "mixture.wav"), atol=1e-7
    )


def test_an_epoch_has_tracks_times_samples_per_track_items(segments):
    assert len(segments) == len(TRAIN_NAMES) * 8


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 500), index=st.integers(0, 31))
def test_an_item_is_a_function_of_seed_epoch_and_index(tracks, seed, epoch, index):
    one, two = (SegmentDataset(tracks, LENGTH, 8, seed=seed) for _ in range(2))
    two[epoch, (index + 1) % 32]  # what was read before does not matter
    assert torch.equal(one[epoch, index][1], two[epoch, index][1])
    assert not torch.equal(one[epoch, index][1], one[epoch + 1, index][1])
    assert not torch.equal(one[epoch, index][1], one[epoch, index + 1][1])
    other = SegmentDataset(tracks, LENGTH, 8, seed=seed + 1)
    assert not torch.equal(one[epoch, index][1], other[epoch, index][1])


def load_batches(dataset, workers: int, collate_fn=keep_batch) -> list:
    """Its items 0 to 9 of epoch 2, in batches of 4, 4 and 2."""
    positions = [(2, index) for index in range(10)]
    return list(
        DataLoader(dataset, 4, sampler=positions, num_workers=workers, collate_fn=collate_fn)
    )


@pytest.mark.parametrize("mix_background", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_stacked_items_bit_for_bit(tracks, workers, mix_background):
    dataset = SegmentDataset(tracks, LENGTH, 8, mix_background, seed=7)
    batches = load_batches(dataset, workers)
    assert [len(mixtures) for mixtures, _ in batches] == [4, 4, 2]
    items = [dataset[2, index] for index in range(10)]
    for parts, expected in zip(zip(*batches, strict=True), zip(*items, strict=True), strict=True):
        assert all(part.dtype == torch.float32 and part.is_contiguous() for part in parts)
        assert torch.equal(
            torch.cat(parts).view(torch.int32), torch.stack(expected).view(torch.int32)
        )


def are_shared(batch) -> list[bool]:
    return [tensor.is_shared() for tensor in keep_batch(batch)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_made_in_shared_memory_by_workers_only(segments, workers):
    """Checked inside the worker, since sending a batch moves it to shared memory anyway."""
    assert load_batches(segments, workers, are_shared) == [[workers > 0] * 2] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_notebook_needs_no_sampler_and_no_collate_function(corpus, workers):
    """Strings for paths, torch's defaults for the loader, and indices, which are of epoch 0."""
    dataset = SegmentDataset(find_tracks(str(corpus), "train", RATE), LENGTH, 2)
    expected = [dataset[0, index][1] for index in range(8)]
    assert torch.equal(dataset[0][1], expected[0])
    assert torch.equal(dataset[-1][1], expected[7])
    assert [len(mixture) for mixture, _ in dataset] == [2] * 8  # the loop ends
    with pytest.raises(IndexError):
        dataset[8]
    found = []
    for mixtures, targets in DataLoader(dataset, 3, shuffle=True, num_workers=workers):
        assert torch.equal(mixtures, targets.sum(1))
        found += targets
    order = [[torch.equal(x, y) for y in expected].index(True) for x in found]
    assert sorted(order) == list(range(8))


def loaded_epochs(dataset, workers: int, context=None) -> list[torch.Tensor]:
    sampler = EpochSampler(len(dataset), seed=5)
    loader = DataLoader(
        dataset,
        batch_size=5,
        sampler=sampler,
        drop_last=True,
        collate_fn=keep_batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
    )
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(torch.cat([targets for _, targets in loader]))
    return epochs


@pytest.mark.smoke
def test_epochs_are_the_same_for_any_number_of_workers(segments):
    alone = loaded_epochs(segments, 0)
    assert len(alone[0]) == 30  # the incomplete batch is dropped
    assert not torch.equal(alone[0], alone[1])
    for workers in (1, 3):
        for expected, found in zip(alone, loaded_epochs(segments, workers), strict=True):
            assert torch.equal(expected, found)


def test_the_data_sets_can_be_sent_to_spawned_workers(segments):
    context = multiprocessing.get_context("spawn")
    assert torch.equal(loaded_epochs(segments, 1, context)[1], loaded_epochs(segments, 0)[1])


def test_a_fault_in_a_worker_names_the_file(own_corpus):
    tracks = find_tracks(own_corpus, "train", RATE)
    dataset = SegmentDataset(tracks, LENGTH, samples_per_track=2)
    shutil.rmtree(own_corpus)
    loader = DataLoader(
        dataset, sampler=EpochSampler(len(dataset)), collate_fn=keep_batch, num_workers=1
    )
    with pytest.raises(DatasetError, match="cannot be read"):
        list(loader)


@settings(max_examples=50, deadline=None)
@given(items=st.integers(1, 60), ranks=st.integers(1, 5), epoch=st.integers(0, 9))
def test_ranks_share_an_epoch(items, ranks, epoch):
    with pytest.MonkeyPatch.context() as patch:
        shares, valid = [], []
        for rank in range(ranks):
            patch.setattr("local.train.loaders.find_rank", lambda r=rank: (r, ranks))
            sampler = EpochSampler(items, seed=1)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler)
            valid.append(list(RankSampler(items)))
            assert len(valid[-1]) == len(RankSampler(items))
    assert {len(share) for share in shares} == {items // ranks}
    trained = [position for share in shares for position in share]
    assert len(set(trained)) == len(trained)
    assert {epoch_ for epoch_, _ in trained} <= {epoch}
    assert {index for _, index in trained} <= set(range(items))
    assert sorted(index for share in valid for index in share) == list(range(items))


def test_every_epoch_is_shuffled_again():
    sampler = EpochSampler(100, seed=0)
    first = [index for _, index in sampler]
    sampler.set_epoch(1)
    second = [index for _, index in sampler]
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second != list(range(100))
