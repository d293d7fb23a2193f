import os
import shutil
import subprocess

import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, TEST_NAMES, write_corpus

from local.eval.tracks import FILES, describe_files, open_test_set, read_mixture, read_track
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
        audio, _ = read_track(track)
        np.testing.assert_array_equal(audio["mixture"].T, expected.audio)
        np.testing.assert_array_equal(read_mixture(track).T, expected.audio)
        np.testing.assert_array_equal(audio["vocals"].T, expected.targets["vocals"].audio)
        np.testing.assert_allclose(
            audio["accompaniment"].T, expected.targets["accompaniment"].audio, atol=1e-12
        )


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_beyond_full_scale_are_counted_or_read_as_they_are(subtype, own_corpus):
    track = open_test_set(own_corpus, RATE, "wav")[0]
    audio = {}
    for number, name in enumerate(FILES):
        audio[name], _ = sf.read(track.path(name), dtype="float32")
        audio[name][:number, 0], audio[name][9, 1] = 1.25, -1  # -1 is on the grid, and 1 nearly
        audio[name][8, 1] = 1
        sf.write(track.path(name), audio[name], RATE, subtype)
    (track, _) = open_test_set(own_corpus, RATE, "wav")

    found, clipped = read_track(track)
    assert clipped == {"vocals": 1, "bass": 2, "drums": 3, "other": 4}  # none of the mixture
    assert found["vocals"][0, 0] == np.float32(32767 / 32768)
    np.testing.assert_array_equal(found["mixture"], read_mixture(track))

    found, clipped = read_track(track, float32=True)
    assert clipped == {}
    expected = {
        "mixture": audio["mixture"],
        "vocals": audio["vocals"],
        "accompaniment": audio["bass"] + audio["drums"] + audio["other"],
    }
    for target, samples in expected.items():
        np.testing.assert_array_equal(found[target].T, samples)
    np.testing.assert_array_equal(found["mixture"], read_mixture(track, float32=True))


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32"])
def test_integers_are_never_beyond_full_scale(subtype, own_corpus):
    path = own_corpus / "test" / TEST_NAMES[0] / "drums.wav"
    audio = sf.read(path)[0]
    audio[:5], audio[5:9] = 1, -1  # 1 becomes the largest of the integers
    sf.write(path, audio, RATE, subtype)
    assert read_track(open_test_set(own_corpus, RATE, "wav")[0])[1] == {}


def test_a_stem_file_that_decodes_beyond_full_scale(tmp_path):
    """As AAC does to loud music. `musdb` decodes to 16 bits, which clips."""
    loud = tmp_path / "loud.wav"
    time = np.arange(44100) / 44100
    square = np.sign(np.sin(2 * np.pi * 100 * time))
    sf.write(loud, np.stack([square, square], axis=1), 44100, "FLOAT")
    packed = tmp_path / "test" / "Loud.stem.mp4"
    packed.parent.mkdir()
    command = ["ffmpeg", "-v", "error", *5 * ["-i", loud]]
    command += [word for number in range(5) for word in ("-map", f"{number}:a")]
    subprocess.run([*command, "-c:a", "aac", packed], check=True)
    (track,) = open_test_set(tmp_path, 44100, "wav")
    audio, clipped = read_track(track)
    as_it_is, none = read_track(track, float32=True)
    assert list(clipped) == list(FILES)
    assert none == {}
    assert np.count_nonzero(np.abs(as_it_is["vocals"]) > 1) == clipped["vocals"] > 0
    expected = np.clip(np.rint(as_it_is["vocals"] * 32768.0), -32768, 32767) / 32768
    np.testing.assert_array_equal(audio["vocals"], expected)


def test_a_stem_root_reads_as_musdb_reads_it(excerpts):
    import musdb

    (expected,) = musdb.DB(root=str(excerpts), subsets="test")
    (track,) = open_test_set(excerpts, 44100, "wav")
    assert track.name == expected.name
    assert track.seconds == pytest.approx(expected.duration, rel=0.05)
    np.testing.assert_array_equal(read_track(track)[0]["mixture"].T, expected.audio)
    np.testing.assert_array_equal(read_mixture(track).T, expected.audio)


@pytest.mark.smoke
def test_a_flac_tree_reads_like_a_wav_tree(corpus, tmp_path):
    flac = open_test_set(write_corpus(tmp_path, suffix="flac"), RATE, "flac")
    for one, other in zip(open_test_set(corpus, RATE, "wav"), flac, strict=True):
        assert one.name == other.name
        for file, audio in read_track(one)[0].items():
            np.testing.assert_array_equal(audio, read_track(other)[0][file])


def test_faults_of_a_test_set(own_corpus, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="no such folder"):
        open_test_set(tmp_path / "nowhere", RATE, "wav")
    with pytest.raises(DatasetError, match="expected 44100 Hz .*, got 8000 Hz"):
        open_test_set(own_corpus, 44100, "wav")
    (own_corpus / "test" / TEST_NAMES[0] / "bass.wav").unlink()
    with pytest.raises(DatasetError, match="bass.wav: missing"):
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


def test_a_packed_track_that_goes_is_found_where_it_is_read(excerpts, tmp_path):
    root = shutil.copytree(excerpts, tmp_path / "root", copy_function=shutil.copyfile)
    (track,) = open_test_set(root, 44100, "wav")
    before = track.seconds
    root.joinpath("test").chmod(0o755)
    track.path.unlink()
    assert track.seconds == before  # by which memory and the order of tracks are chosen
    with pytest.raises(UserError, match="cannot be decoded"):
        read_mixture(track)


def test_packed_tracks_with_unfit_names_are_refused(excerpts, tmp_path):
    (file,) = (excerpts / "test").iterdir()
    (tmp_path / "test").mkdir()
    shutil.copy(file, tmp_path / "test" / "a\nb.stem.mp4")
    with pytest.raises(DatasetError, match=r"'a\\nb': rename it"):
        open_test_set(tmp_path, 44100, "wav")
