import os
import shutil

import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, TEST_NAMES, write_corpus

from local.eval.tracks import describe_files, open_test_set, read_mixture, read_track
from local.musdb18_tracks import DatasetError
from local.tools.command_line import UserError


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_wav_tree_reads_as_musdb_reads_it(subtype, own_corpus):
    import musdb

    rng = np.random.default_rng(0)
    for path in (own_corpus / "test").rglob("*.wav"):
        audio, _ = sf.read(path)
        sf.write(path, audio + rng.uniform(-1e-5, 1e-5, audio.shape), RATE, subtype)
    tracks = open_test_set(own_corpus, RATE, "wav")
    assert [track.name for track in tracks] == sorted(TEST_NAMES)
    by_name = {track.name: track for track in tracks}
    for expected in musdb.DB(root=str(own_corpus), is_wav=True, subsets="test"):
        track = by_name[expected.name]
        audio = read_track(track)
        np.testing.assert_array_equal(audio["mixture"].T, expected.audio)
        np.testing.assert_array_equal(read_mixture(track).T, expected.audio)
        np.testing.assert_array_equal(audio["vocals"].T, expected.targets["vocals"].audio)
        np.testing.assert_allclose(
            audio["accompaniment"].T, expected.targets["accompaniment"].audio, atol=1e-12
        )


def test_a_stem_root_reads_as_musdb_reads_it(excerpts):
    import musdb

    (expected,) = musdb.DB(root=str(excerpts), subsets="test")
    (track,) = open_test_set(excerpts, 44100, "wav")
    assert track.name == expected.name
    assert track.seconds == pytest.approx(expected.duration, rel=0.05)
    np.testing.assert_array_equal(read_track(track)["mixture"].T, expected.audio)
    np.testing.assert_array_equal(read_mixture(track).T, expected.audio)


@pytest.mark.smoke
def test_a_flac_tree_reads_like_a_wav_tree(corpus, tmp_path):
    flac = open_test_set(write_corpus(tmp_path, suffix="flac"), RATE, "flac")
    for one, other in zip(open_test_set(corpus, RATE, "wav"), flac, strict=True):
        assert one.name == other.name
        for file, audio in read_track(one).items():
            np.testing.assert_array_equal(audio, read_track(other)[file])


def test_faults_of_a_test_set(own_corpus, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="no such folder"):
        open_test_set(tmp_path / "nowhere", RATE, "wav")
    with pytest.raises(DatasetError, match="expected 44100 Hz .*, got 8000 Hz"):
        open_test_set(own_corpus, 44100, "wav")
    (own_corpus / "test" / TEST_NAMES[0] / "mixture.wav").unlink()
    with pytest.raises(DatasetError, match="mixture.wav: missing"):
        open_test_set(own_corpus, RATE, "wav")
    (tmp_path / "packed" / "test").mkdir(parents=True)
    (tmp_path / "packed" / "test" / "A.stem.mp4").write_bytes(b"no video")
    (track,) = open_test_set(tmp_path / "packed", RATE, "wav")
    for read in (read_mixture, read_track):
        with pytest.raises(UserError, match="cannot be decoded"):
            read(track)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install ffmpeg"):
        open_test_set(tmp_path / "packed", RATE, "wav")


def test_a_stem_root_of_another_rate_is_refused(excerpts):
    with pytest.raises(DatasetError, match="--root: .*Falcon 69.stem.mp4: .*8000 Hz, got 44100"):
        open_test_set(excerpts, RATE, "wav")


def test_what_systems_leave_makes_no_track_of_a_stem_root(excerpts, tmp_path):
    (file,) = (excerpts / "test").iterdir()
    (tmp_path / "test").mkdir()
    shutil.copy(file, tmp_path / "test" / "A.stem.MP4")
    (tmp_path / "test" / "._A.stem.mp4").touch()
    for name in (".cache", "@eaDir", "__MACOSX"):
        (tmp_path / "test" / name).mkdir()
    assert [track.name for track in open_test_set(tmp_path, 44100, "wav")] == ["A"]


def test_files_that_change_are_noticed(own_corpus, excerpts):
    track, other = open_test_set(own_corpus, RATE, "wav")
    before = describe_files(track)
    assert sorted(before) == sorted(path.name for path in track.folder.iterdir())
    assert before == describe_files(track) != describe_files(other)
    os.utime(track.path("bass"), ns=(1, 1))
    assert describe_files(track) != before
    (packed,) = open_test_set(excerpts, 44100, "wav")
    assert list(describe_files(packed)) == [packed.path.name]


def test_packed_tracks_with_unfit_names_are_refused(excerpts, tmp_path):
    (file,) = (excerpts / "test").iterdir()
    (tmp_path / "test").mkdir()
    shutil.copy(file, tmp_path / "test" / "a\nb.stem.mp4")
    with pytest.raises(DatasetError, match=r"'a\\nb': rename it"):
        open_test_set(tmp_path, 44100, "wav")
