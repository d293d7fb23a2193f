"""run.sh itself; tests/test_readme.py runs the commands that the README gives for it."""

import csv
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import stempeg
import torch
from conftest import (
    RATE,
    ROOT,
    TEST_NAMES,
    TINY_RUN,
    copy_project,
    needs_venv,
    slow,
    write_corpus,
    write_times,
)

from local import ConvTasNetStereo, __version__


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
        (["--exp-dir=x"], "use --tag NAME"),
        (["--root=~/nowhere/x"], f"no such folder: {Path.home()}/nowhere/x"),
        (["--conf", "nowhere", "--tag", "t"], "--conf: no such file: "),
        (["--conf", "conf.yml"], "--conf"),
        (["--eval", "--out-dir", "x"], "omit --out-dir"),
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


@pytest.fixture
def run_once(tmp_path) -> tuple[Path, Path, list, subprocess.CompletedProcess]:
    """(project, folder of the caller, flags, result) of a run on a data set beside the caller."""
    checkout, caller = copy_project(tmp_path / "check out"), tmp_path / "caller"
    write_corpus(caller / "my data")
    args = ["--root", "my data", "--tag", "t", *TINY_RUN]
    return checkout, caller, args, run_sh(checkout, *args, cwd=caller)


@needs_venv
def test_a_root_beside_the_caller_is_trained_and_evaluated_once(run_once):
    checkout, caller, args, result = run_once
    assert result.returncode == 0, result.stderr
    exp_dir = checkout / "exp" / "t"
    assert str(exp_dir / "best_model.pth") in result.stdout
    assert (exp_dir / "eval" / TEST_NAMES[0] / "vocals.wav").is_file()
    assert list(caller.iterdir()) == [caller / "my data"]

    before = write_times(exp_dir)
    again = run_sh(checkout, *args, cwd=caller)
    assert again.returncode == 0, again.stderr
    assert "is finished, after 1 epoch" in again.stdout
    assert f"{len(TEST_NAMES)} tracks scored already" in again.stdout
    kinds = (".wav", ".json", ".pth")
    kept = {path: at for path, at in before.items() if path.suffix in kinds}
    del kept[exp_dir / "eval" / "final_metrics.json"]  # of all tracks: written anew
    assert kept.items() <= write_times(exp_dir).items()


@needs_venv
@slow
def test_a_run_is_evaluated_otherwise_looked_at_and_extended(run_once):
    checkout, caller, args, _ = run_once
    results = checkout / "exp" / "t" / "eval" / "results.txt"
    before = results.read_text()
    evaluated = run_sh(checkout, "--stage", "2", "--tag=t", "--eval", "--method", "full")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "method full" in evaluated.stdout
    assert results.read_text() == before  # tracks of one window

    looked = write_times(checkout / "exp")
    for tag in ("t", "new"):
        check = run_sh(checkout, *args, "--check", "--tag", tag, cwd=caller)
        assert (check.returncode, "stage 2" in check.stdout) == (0, False), check.stderr
        assert write_times(checkout / "exp") == looked
    refused = run_sh(checkout, *args, "--lr", "1", cwd=caller)
    assert refused.returncode == 2
    assert "--lr" in refused.stderr and "--tag NAME" in refused.stderr
    assert "stage 2" not in refused.stdout
    assert write_times(checkout / "exp") == looked
    more = run_sh(checkout, *args, "--epochs", "2", "--check", cwd=caller)
    assert "resumes" in more.stdout


@needs_venv
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stage", "2", "--method", "full"], ("--method", "after --eval")),
        (["--epoch", "3"], ("--epoch", "did you mean --epochs?")),
        (["--stage", "2", "--lr", "fast"], ("--lr", "got 'fast'")),
        (["--eval", "--methd", "full"], ("--eval", "did you mean --method?")),
    ],
)
def test_flags_are_checked_at_every_stage(args, words, tmp_path):
    checkout = copy_project(tmp_path / "checkout")
    installed = checkout / ".venv" / "requirements.txt"
    if not installed.is_file() or installed.read_text() != (ROOT / "requirements.txt").read_text():
        args = ["--stage", "1", *args]  # stage 0 would install
    result = run_sh(checkout, *args)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words)


def test_a_copy_in_the_spool_folder_of_slurm_finds_the_project(tmp_path):
    copy = Path(shutil.copy(ROOT / "run.sh", tmp_path / "slurm_script"))
    command = [copy, "--version"]
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT)}
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == f"run.sh {__version__}\n"
    env["SLURM_SUBMIT_DIR"] = str(tmp_path)
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "submit it from its folder" in result.stderr


def test_a_link_to_it_finds_the_project(tmp_path):
    (tmp_path / "run").symlink_to(ROOT / "run.sh")
    result = subprocess.run([tmp_path / "run", "--version"], capture_output=True, text=True)
    assert result.stdout == f"run.sh {__version__}\n"


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
def test_the_demo_trains_the_model_of_init(tmp_path):
    checkout, base = copy_project(tmp_path / "checkout"), tmp_path / "base.pth"
    write_corpus(checkout / "data" / "demo")
    model = ConvTasNetStereo(N=8, L=20, B=4, H=8, X=1, R=1, C=2, audio_channels=2, samplerate=RATE)
    torch.save(model.serialize(), base)
    result = run_sh(checkout, "--stage", 1, "--init", base, "--check")
    assert result.returncode == 0, result.stderr
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters, {RATE} Hz" in result.stdout


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
