"""How a run handles signals; test_resume shows that it resumes as if undisturbed."""

import os
import pty
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY_RUN, imitate_slurm, reset_signals, start_python

from local.train.interrupts import Interrupted, Interrupts

# Takes its time for the second step, and leaves a file when that begins.
SLOW_STEP = """
import time
from pathlib import Path
import train
from local.system import MusicSystem

def step_slowly(system, batch, batch_idx):
    if batch_idx == 1:
        Path({marker!r}).touch()
        end = time.monotonic() + {seconds}
        while time.monotonic() < end:
            time.sleep(0.01)
    return step(system, batch, batch_idx)

step, MusicSystem.training_step = MusicSystem.training_step, step_slowly
train.quieten_lightning()
train.main({arguments!r})
"""


@pytest.fixture
def start(corpus, tmp_path):
    """Starts a run whose second step takes so many seconds, and returns when that has begun."""
    processes = []

    def start(seconds: float, prepare=None, more=(), **streams) -> subprocess.Popen:
        marker = tmp_path / "second step"
        flags = ["--exp_dir", tmp_path / "run", "--root", corpus, *TINY_RUN, "--epochs", "2", *more]
        arguments = list(map(str, flags))
        code = SLOW_STEP.format(seconds=seconds, arguments=arguments, marker=str(marker))
        process = start_python(
            *("-c", code),
            preexec_fn=prepare,
            start_new_session=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        )
        processes.append(process)
        while not marker.exists():
            assert process.poll() is None
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        process.kill()


def test_a_second_ctrl_c_ends_at_once(start, tmp_path):
    process = start(seconds=300, more=["--num_workers", "2", "--samples_per_track", "8"])
    os.killpg(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)  # it finishes its step
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "ending after this step; a second signal ends at once" in stderr
    assert "interrupted in epoch 0; there is no best_model.pth yet" in stderr
    assert "Traceback" not in stderr


def test_a_signal_that_comes_twice_by_two_ways_is_one(start):
    process = start(seconds=2)
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.count("ending after this step") == 1
    assert "last-epoch=0-step=2.ckpt" in stderr  # the second step was finished, and kept


def ignore_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("prepare", "status"), [(None, 129), (ignore_hangups, 0)], ids=["alone", "nohup"]
)
def test_a_closed_terminal_ends_a_run_but_not_under_nohup(start, prepare, status):
    process = start(seconds=2, prepare=prepare)
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == status


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_saving(start, tmp_path):
    """As it writes to it, at its bar and where it says how it ended."""
    terminal, end = pty.openpty()
    process = start(seconds=2, stdout=end, stderr=end, more=["--samples_per_track", "8"])
    os.close(end)
    os.killpg(process.pid, signal.SIGHUP)
    os.close(terminal)
    assert process.wait(timeout=60) == 129
    assert (tmp_path / "run" / "checkpoints" / "last-epoch=0-step=2.ckpt").is_file()


def test_ctrl_c_of_a_run_whose_output_goes_through_tee(start, tmp_path):
    read, write = os.pipe()
    command = ["tee", tmp_path / "log"]
    tee = subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, preexec_fn=reset_signals)
    process = start(seconds=2, stdout=write, stderr=write, more=["--samples_per_track", "8"])
    os.close(read), os.close(write)
    os.killpg(process.pid, signal.SIGINT)
    tee.send_signal(signal.SIGINT)  # as a terminal has it
    assert tee.wait() == -signal.SIGINT
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "run" / "checkpoints" / "last-epoch=0-step=2.ckpt").is_file()


def test_a_reader_of_the_output_that_is_gone_ends_a_run(start):
    read, write = os.pipe()
    process = start(seconds=1, stdout=write, more=["--samples_per_track", "8"])
    os.close(read), os.close(write)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 141
    assert "Traceback" not in stderr


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_that_slurm_ends_in_time_saves_and_requeues_its_job(start, tmp_path, status):
    """By our checkpoint alone: a file of Lightning's in the current folder is not resumed."""
    env = {**os.environ, **imitate_slurm(tmp_path, status), "PYTHONPATH": str(ROOT)}
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "hpc_ckpt_1.ckpt").touch()
    process = start(seconds=2, more=["--samples_per_track", "8"], env=env, cwd=tmp_path / "cwd")
    os.killpg(process.pid, signal.SIGUSR1)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 138, stderr
    assert (tmp_path / "run" / "checkpoints" / "last-epoch=0-step=2.ckpt").is_file()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert ("has requeued job 7" in stderr) == (status == 0)
    assert ("job 7: disabled" in stderr) == (status == 1)
    assert len(list((tmp_path / "cwd").iterdir())) == 1


def test_the_first_process_ends_a_validation():
    """And says how to go on; another one that ended before it would take it along."""
    interrupts = Interrupts()
    interrupts.signum = signal.SIGTERM
    interrupts.on_validation_batch_start(SimpleNamespace(is_global_zero=False))
    with pytest.raises(Interrupted):
        interrupts.on_validation_batch_start(SimpleNamespace(is_global_zero=True))


LOADERS = """
import sys
from local.config import parse_conf
from local.musdb18_tracks import find_tracks
from local.train.loaders import make_loaders
from train import make_datasets

conf = parse_conf(sys.argv[1:])
tracks = find_tracks(conf["data"]["root"], "train", conf["data"]["sample_rate"])
loader, _ = make_loaders(conf, *make_datasets(conf, tracks))
batches = iter(loader)
next(batches)
print("ready", flush=True)
while True:
    next(batches, None)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_uses_the_loaders_can_be_stopped(signum, corpus):
    """Outside fit their workers handle signals as any others do."""
    flags = ["--root", corpus, *TINY_RUN, "--num_workers", "2", "--samples_per_track", "64"]
    process = start_python(
        "-c",
        LOADERS,
        *flags,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signum)
    assert process.wait(timeout=60) != 0
    with pytest.raises(ProcessLookupError):  # no worker is left
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
