import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from local.stems import STREAMS, decode_track, decode_tree, main, track_name
from local.tools.command_line import UserError


def test_a_decoded_tree_is_what_musdb_reads(excerpts, tmp_path):
    import musdb

    assert decode_tree(excerpts, tmp_path / "wav", jobs=2) == (2, 0)
    packed = musdb.DB(root=str(excerpts))
    unpacked = musdb.DB(root=str(tmp_path / "wav"), is_wav=True)
    assert len(packed) == len(unpacked) == 2
    for one, two in zip(packed, unpacked, strict=True):
        assert (one.name, one.subset) == (two.name, two.subset)
        folder = tmp_path / "wav" / one.subset / one.name
        for index, source in enumerate(STREAMS):
            audio, rate = sf.read(folder / f"{source}.wav")
            assert rate == 44100
            np.testing.assert_array_equal(audio, one.stems[index])
    assert decode_tree(excerpts, tmp_path / "wav", jobs=2) == (0, 2)


def test_only_what_is_missing_is_decoded(excerpts, tmp_path, capsys):
    decode_tree(excerpts, tmp_path, jobs=1)
    (gone,) = (tmp_path / "test").iterdir()
    (kept,) = (tmp_path / "train").iterdir()
    made = (kept / "vocals.wav").stat().st_mtime_ns
    shutil.rmtree(gone)
    main([str(excerpts), str(tmp_path)])
    assert "1 track decoded, 1 there already" in capsys.readouterr().out
    assert sorted(path.name for path in gone.iterdir()) == sorted(f"{s}.wav" for s in STREAMS)
    assert (kept / "vocals.wav").stat().st_mtime_ns == made


def test_suffixes_in_other_letters_and_what_systems_leave(excerpts, tmp_path):
    (file,) = (excerpts / "train").iterdir()
    train = tmp_path / "root" / "train"
    train.mkdir(parents=True)
    shutil.copy(file, train / "A.stem.MP4")
    (train / "._A.stem.mp4").touch()
    (train / "@eaDir").mkdir()
    assert decode_tree(tmp_path / "root", tmp_path / "out", jobs=1) == (1, 0)
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["A"]
    (train / "A.stem.mp4").touch()
    with pytest.raises(UserError, match="A.stem.mp4 and A.stem.MP4 would be the same track"):
        decode_tree(tmp_path / "root", tmp_path / "other", jobs=1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("size", [0, 1000, 300_000])
def test_a_broken_file_is_named_and_the_others_are_decoded(excerpts, tmp_path, size):
    root, out = Path(shutil.copytree(excerpts, tmp_path / "root")), tmp_path / "out"
    (broken,) = (root / "train").iterdir()
    broken.write_bytes(broken.read_bytes()[:size])
    with pytest.raises(UserError) as error:
        decode_tree(root, out, jobs=2)
    assert "1 track decoded, 1 failed" in str(error.value)
    assert broken.name in str(error.value)
    assert list((out / "train").iterdir()) == []
    assert len(list((out / "test").iterdir())) == 1


def test_what_a_killed_run_left_is_replaced(excerpts, tmp_path):
    (stem_file,) = (excerpts / "test").glob("*.stem.mp4")
    folder = tmp_path / track_name(stem_file)
    left = tmp_path / f".{folder.name}.tmp"
    left.mkdir()
    (left / "half.wav").touch()
    decode_track(stem_file, folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(list(folder.iterdir())) == 5


@pytest.mark.smoke
def test_names_with_dots_keep_them():
    assert track_name(Path("train/M.E.R.C. Music - Knockout.stem.mp4")) == (
        "M.E.R.C. Music - Knockout"
    )


def test_faults_of_the_command(excerpts, tmp_path, error_of, monkeypatch):
    assert "holds no train/TRACK.stem.mp4" in error_of(main, tmp_path, tmp_path / "out")
    assert "--jobs must be at least 1" in error_of(main, excerpts, tmp_path / "out", "--jobs", 0)
    (tmp_path / "file").touch()
    assert "cannot be written" in error_of(main, excerpts, tmp_path / "file")
    monkeypatch.setenv("PATH", "")
    assert "install ffmpeg" in error_of(main, excerpts, tmp_path / "out")


def test_a_file_with_too_few_streams_is_refused(tmp_path):
    stem_file = tmp_path / "A.stem.mp4"
    tone = ["-f", "lavfi", "-i", "sine=duration=0.2"]
    subprocess.run(["ffmpeg", "-loglevel", "error", *tone, "-f", "mp4", stem_file], check=True)
    with pytest.raises(UserError, match="cannot be decoded"):
        decode_track(stem_file, tmp_path / "A")


def test_ctrl_c_stops_the_queue(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    for index in range(50):
        (tmp_path / "train" / f"{index:02d}.stem.mp4").touch()
    started = []

    def interrupt(stem_file, folder):
        started.append(stem_file)
        raise KeyboardInterrupt

    monkeypatch.setattr("local.stems.decode_track", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode_tree(tmp_path, tmp_path / "out", jobs=1)
    assert len(started) < 50
