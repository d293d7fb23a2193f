import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import RATE, TINY_RUN, TRAIN_NAMES, write_corpus

import train
from local.config import parse_conf
from local.models import count_parameters, make_model
from local.musdb18_tracks import DatasetError, find_tracks
from local.tools.command_line import UserError
from local.tools.files import locked
from local.train import preflight, run_folder
from local.train.preflight import check_files, describe_versions
from local.train.run_folder import count_needed_bytes, find_existing_parent, find_folder_faults

Usage = namedtuple("Usage", "free")
TRAINING = {"keep_best": 10, "ema": 0.0, "examples": 0, "epochs": 200}


def cut(path, share=0.9) -> None:
    """Shortens a file, whose header still promises the whole."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def test_files_that_end_badly_are_listed(tmp_path):
    root = write_corpus(tmp_path, "flac")
    tracks = find_tracks(root, "train", RATE, "flac")
    check_files(tracks)
    cut(tracks[0].path("bass"))
    cut(tracks[2].path("vocals"))
    with pytest.raises(DatasetError) as error:
        check_files(find_tracks(root, "train", RATE, "flac"))
    heading, *lines = str(error.value).splitlines()
    assert heading.startswith(f"--root: 2 faults in {root};")
    for line, path in zip(lines, (tracks[0].path("bass"), tracks[2].path("vocals")), strict=True):
        assert line.startswith(f"  {path}: ")


def test_a_check_finds_damage_in_the_middle_of_a_flac(tmp_path):
    root = write_corpus(tmp_path, "flac")
    tracks = find_tracks(root, "train", RATE, "flac")
    path = tracks[0].path("bass")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    check_files(tracks)
    with pytest.raises(DatasetError, match=f"1 fault in .*\n  {path}: damaged after 0.4"):
        check_files(tracks, whole=True)


def test_a_place_that_will_not_do(tmp_path, monkeypatch):
    assert find_folder_faults(tmp_path / "new" / "run", TRAINING, 1000) == []
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (fault,) = find_folder_faults(tmp_path / "file" / "run", TRAINING, 1000)
    file = tmp_path / "file"
    assert fault == f"--exp_dir: {file / 'run'} cannot be written: {file}: Not a directory"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1.2e9))
    assert find_folder_faults(tmp_path, TRAINING, 1000) == []
    (fault,) = find_folder_faults(tmp_path, TRAINING, 10_846_800)
    assert fault == (
        f"--exp_dir: a run writes about 1.8 GB, and 1.2 GB are free in {tmp_path};"
        " make room, or name another folder"
    )


def test_what_is_in_the_way(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    (tmp_path / "logs").symlink_to(tmp_path / "gone")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "conf.yml").write_text("")
    (tmp_path / "changes.yml").mkdir()
    kinds = {"checkpoints": "folder", "logs": "folder", "changes.yml": "file"}
    assert find_folder_faults(tmp_path, TRAINING, 1000) == [
        f"--exp_dir: {tmp_path / name} is in the way: it should be a {kind}"
        for name, kind in kinds.items()
    ]


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be locked"), locked(tmp_path):
        pass


def test_what_a_run_writes_is_what_it_says(experiment):
    """Three epochs, so five of the checkpoints that it makes room for, and one model."""
    conf = parse_conf([*TINY_RUN, "--root", "x"])
    parameters = sum(parameter.numel() for parameter in make_model(conf).parameters())
    assert count_parameters(conf) == parameters
    checkpoints = list((experiment / "checkpoints").iterdir())
    assert len(checkpoints) == 3 + 2
    overhead = 100_000  # bytes of names and settings, which count in a tiny model
    for path in checkpoints:
        assert 12 * parameters < path.stat().st_size < 12 * parameters + overhead
    assert count_needed_bytes(Path("new"), TRAINING, 0) == run_folder.LOG_BYTES
    whole = 13 * 12 * parameters + 2 * 4 * parameters
    assert count_needed_bytes(Path("new"), TRAINING, parameters) == run_folder.LOG_BYTES + whole
    more = {**TRAINING, "keep_best": 20, "ema": 0.9}
    whole = 23 * 16 * parameters + 2 * 4 * parameters
    assert count_needed_bytes(Path("new"), more, parameters) == run_folder.LOG_BYTES + whole
    heard = {**TRAINING, "examples": 2, "epochs": 3}
    examples = count_needed_bytes(Path("new"), heard, 0) - run_folder.LOG_BYTES
    assert examples == 2 * 3 * run_folder.EXAMPLE_BYTES
    written = sum(path.stat().st_size for path in checkpoints)
    much = 10_846_800
    new, resumed = (count_needed_bytes(path, TRAINING, much) for path in (Path("new"), experiment))
    assert new - resumed == written


def test_the_nearest_folder_that_is_there(tmp_path, monkeypatch):
    assert find_existing_parent(tmp_path) == tmp_path
    assert find_existing_parent(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert find_existing_parent(Path("a/b")) == tmp_path


def test_versions_beyond_the_tested_ones_are_marked(monkeypatch):
    assert "tested" not in describe_versions()
    found = {"torch": "9.0.1+cpu", "numpy": "2.9"}
    monkeypatch.setattr(preflight, "version", lambda name: found.get(name, "2.7.0"))
    shown = describe_versions()
    limits = {name: wanted.specifier for name, wanted in preflight.read_requirements().items()}
    assert f"torch 9.0.1+cpu (tested: {limits['torch']})" in shown
    assert f"numpy 2.9 (tested: {limits['numpy']})" in shown
    assert "pytorch-lightning 2.7.0," in shown


def flags(exp_dir, root) -> list[str]:
    return ["--exp_dir", str(exp_dir), "--root", str(root), *TINY_RUN, "--check"]


@pytest.mark.smoke
def test_a_check_says_what_the_run_would_be_and_writes_nothing(corpus, tmp_path, capsys):
    train.main(flags(tmp_path / "a" / "run", corpus))
    printed = capsys.readouterr().out
    for words in ("model ", "validation 1 track", "versions ", "GB will be written", "no fault"):
        assert words in printed
    assert not any(tmp_path.iterdir())


def test_a_check_reports_everything_together(own_corpus, tmp_path, error_of):
    cut(own_corpus / "train" / TRAIN_NAMES[0] / "drums.wav")
    (tmp_path / "file").touch()
    error = error_of(train.main, *flags(tmp_path / "file" / "run", own_corpus), "--lr", 0)
    for words in ("3 faults", "--lr must be", "run cannot be written", "different lengths"):
        assert words in error


def test_two_runs_in_one_folder_are_refused(corpus, tmp_path, error_of):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        error = error_of(train.main, *flags(tmp_path / "run", corpus)[:-1])
    assert "run is in use: another run writes to it" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
