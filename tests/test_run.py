"""run.sh itself; tests/test_readme.py runs the commands that the README gives for it."""

import csv
import shutil
import subprocess
from pathlib import Path

import pytest
import stempeg
from conftest import (
    ROOT,
    TEST_NAMES,
    TINY_RUN,
    copy_project,
    needs_venv,
    slow,
    write_corpus,
    write_times,
)


def run_sh(checkout: Path, *args, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [checkout / "run.sh", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--stage", "3"], "--stage must be 0, 1 or 2, got 3"),
        (["--stage"], "--stage needs a value"),
        (["--root="], "--root needs a value"),
        (["--root", "nowhere"], "--root: no such folder: "),
        (["--root=nowhere"], "--root: no such folder: "),
        (["--tag", "../elsewhere"], "--tag must be a plain name"),
        (["--exp_dir", "x"], "use --tag NAME"),
    ],
)
def test_bad_options_are_one_line_and_status_2(args, words, tmp_path):
    result = run_sh(ROOT, *args, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("run.sh: error: ")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_later_stages_need_the_first(tmp_path):
    checkout = copy_project(tmp_path / "checkout")
    (checkout / ".venv").unlink(missing_ok=True)
    result = run_sh(checkout, "--stage", "1")
    assert (result.returncode, "start with --stage 0" in result.stderr) == (2, True)


@needs_venv
def test_a_root_beside_the_caller_is_trained_and_evaluated_once(tmp_path):
    checkout, caller = copy_project(tmp_path / "check out"), tmp_path / "caller"
    write_corpus(caller / "my data")
    args = ["--root", "my data", "--tag", "t", *TINY_RUN]
    result = run_sh(checkout, *args, cwd=caller)
    assert result.returncode == 0, result.stderr
    exp_dir = checkout / "exp" / "t"
    assert str(exp_dir / "best_model.pth") in result.stdout
    assert (exp_dir / "eval" / TEST_NAMES[0] / "vocals.wav").is_file()
    assert list(caller.iterdir()) == [caller / "my data"]

    before, results = write_times(exp_dir), (exp_dir / "eval" / "results.txt").read_text()
    again = run_sh(checkout, *args, cwd=caller)
    assert again.returncode == 0, again.stderr
    assert "is trained already" in again.stdout
    assert results in again.stdout
    assert write_times(exp_dir) == before

    (exp_dir / ".trained").unlink()
    interrupted = run_sh(checkout, *args, cwd=caller)  # it would resume; this one had finished
    assert interrupted.returncode == 0, interrupted.stderr
    assert "is finished, after 1 epoch" in interrupted.stdout
    evaluated = run_sh(checkout, "--stage", "2", "--tag=t")
    assert evaluated.returncode == 0, evaluated.stderr
    assert (exp_dir / "eval" / "results.txt").read_text() == results


@needs_venv
def test_a_root_of_stem_mp4_files_is_decoded_once(tmp_path):
    checkout, root = copy_project(tmp_path / "checkout"), tmp_path / "MUSDB18"
    for name in ("train/A.B. - C", "train/Leaf - Summerghost", "test/D"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stempeg.example_stem_path(), root / f"{name}.stem.mp4")
    args = ["--root", root, *TINY_RUN, "--sample_rate", "44100", "--samples_per_track", "4"]
    result = run_sh(checkout, *args)
    assert result.returncode == 0, result.stderr
    assert "3 tracks decoded, 0 there already" in result.stdout
    vocals = tmp_path / "MUSDB18-wav" / "train" / "A.B. - C" / "vocals.wav"
    assert vocals.is_file()
    assert (checkout / "exp" / "musdb18" / "eval" / "D" / "vocals.wav").is_file()
    assert "0 tracks decoded, 3 there already" in run_sh(checkout, *args).stdout


@needs_venv
def test_evaluation_needs_a_model(tmp_path):
    result = run_sh(copy_project(tmp_path / "checkout"), "--stage", "2", "--tag", "nope")
    assert (result.returncode, "holds no trained model" in result.stderr) == (2, True)


@needs_venv
@slow
def test_the_demo_gains_3_db_of_vocals(tmp_path):
    checkout = copy_project(tmp_path / "checkout")
    result = run_sh(checkout)
    assert result.returncode == 0, result.stderr
    with (checkout / "exp" / "demo" / "eval" / "results.csv").open(encoding="utf-8") as file:
        rows = {row["track"]: row for row in csv.DictReader(file) if row["target"] == "vocals"}
    excerpt = rows.pop("The Easton Ellises - Falcon 69")
    assert len(rows) == 3
    for row in rows.values():
        assert float(row["SDR_median"]) > 0  # a silent estimate would have 0 dB
        assert float(row["SDR_median"]) - float(row["mixture_SDR_median"]) > 3
    assert float(excerpt["nan_share"]) < 1
