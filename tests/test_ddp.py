"""Training in several processes: the same model, the same val_loss, one clear end."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import RATE, ROOT, TINY_RUN, TRAIN_NAMES, run_command, run_python, start_training
from lightning_fabric.plugins.environments.lightning import find_free_network_port

import train
from local.checkpoint import load_model

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# The batch of two ranks is that of one process with --batch_size 4.
TWO_RANKS = ["--batch_size", "2"]


@pytest.fixture(scope="module")
def shared_flags(corpus, tmp_path_factory) -> list[str]:
    """Flags of a run that two ranks cannot share evenly: they validate on three tracks."""
    names = tmp_path_factory.mktemp("names") / "valid.txt"
    names.write_text("\n".join(TRAIN_NAMES[:3]), encoding="utf-8")
    flags = ["--root", corpus, *TINY_RUN, "--accelerator", "cpu", "--valid_tracks", names]
    flags += ["--samples_per_track", "24", "--epochs", "2", "--aggregate", "2"]
    return [str(flag) for flag in flags]


@pytest.fixture(scope="module")
def alone(shared_flags, tmp_path_factory) -> Path:
    """A run in one process."""
    exp_dir = tmp_path_factory.mktemp("alone") / "run"
    train.main(["--exp_dir", str(exp_dir), *shared_flags, "--batch_size", "4"])
    return exp_dir


COLUMNS = ("train_loss", "val_loss", "val_sdr_vocals", "val_sdr_accompaniment", "grad_norm")


def read_column(exp_dir: Path, name: str) -> list[float]:
    with (exp_dir / "logs" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def assert_same_run(found: Path, expected: Path) -> None:
    for name in COLUMNS:
        values = (read_column(exp_dir, name) for exp_dir in (found, expected))
        assert next(values) == pytest.approx(next(values), rel=1e-4 if "sdr" in name else 1e-5), (
            name
        )
    found, expected = (load_model(exp / "best_model.pth").state_dict() for exp in (found, expected))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def environment(**variables) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}


# The same run


def test_two_devices_train_what_one_process_trains(alone, shared_flags, tmp_path):
    flags = ["--exp_dir", tmp_path / "run", *shared_flags, *TWO_RANKS, "--devices", "2"]
    result = run_command("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", alone)
    for words in ("24 items = 6 batches of 2 per device", "2 x CPU", "epoch 1: ", "trained for 2"):
        assert result.stdout.count(words) == 1
    assert result.stderr == ""


def test_two_devices_average_what_one_process_averages(shared_flags, tmp_path):
    flags = [*shared_flags, "--ema", "0.5", "--epochs", "1"]
    train.main(["--exp_dir", str(tmp_path / "alone"), *flags, "--batch_size", "4"])
    both = ["--exp_dir", tmp_path / "both", *flags, *TWO_RANKS, "--devices", "2"]
    result = run_command("train.py", *both)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "both", tmp_path / "alone")


PROBE = """
import json, os, sys
import pytorch_lightning as pl
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
import local.train.callbacks, local.train.display, train

class Reads(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Reads.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

class Probe(pl.Callback):
    shared, per_batch = 0, []
    def on_train_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, self.share)
    def share(self, state, bucket):
        Probe.shared += 1
        return allreduce_hook(torch.distributed.group.WORLD, bucket)
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Probe.per_batch.append((Reads.count, Probe.shared))

local.train.callbacks.Forecast = Probe
local.train.display.ProgressBar.READ = float("inf")
with Reads():
    train.main(sys.argv[2:])
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(Probe.per_batch, file)
"""


def test_under_torchrun_ranks_meet_at_optimizer_steps_alone(alone, shared_flags, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    flags = ["--exp_dir", tmp_path / "run", *shared_flags, *TWO_RANKS, "--devices", "2"]
    command = [*TORCHRUN, "--nproc_per_node", "2", tmp_path / "probe.py", tmp_path, *flags]
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=ROOT),
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", alone)
    for rank in (0, 1):
        per_batch = torch.tensor(json.loads((tmp_path / f"{rank}.json").read_text()))
        read, shared = per_batch[:6].diff(dim=0).T.tolist()
        assert read[1:4] == [0, 0, 0]  # checkpoints are taken before the first step and the last
        assert shared == [0, 1, 0, 1, 0]  # --aggregate 2


def test_two_nodes_train_what_one_process_trains(alone, shared_flags, tmp_path):
    flags = ["--exp_dir", tmp_path / "run", *shared_flags, *TWO_RANKS, "--devices", "1"]
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=find_free_network_port())
    nodes = [
        subprocess.Popen(
            [sys.executable, ROOT / "train.py", *map(str, flags), "--num_nodes", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(NODE_RANK=node, **address),
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same_run(tmp_path / "run", alone)
    assert "trained for 2 epochs" in outputs[0]
    assert outputs[1] == ""


# The end. Both processes write to the pipes of the first, so what waits for the end of these, as
# subprocess does, waits for both.


AT_END = """
import atexit, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})

def say():
    names = {{path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}}
    os.write(1, f"{{[name for name in names if 'gloo' in name]}}\\n".encode())

atexit.register(say)
import train
train.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/task is Linux's")
@pytest.mark.parametrize(("more", "status"), [([], 0), (["--lr", "1e30"], 2)])
def test_no_thread_of_gloo_outlives_python(more, status, shared_flags, tmp_path):
    """It aborted about every twentieth run, at the end."""
    script = tmp_path / "at_end.py"
    script.write_text(AT_END.format(root=str(ROOT)))
    flags = ["--exp_dir", tmp_path / "run", *shared_flags, *TWO_RANKS, "--devices", 2, *more]
    result = run_python(script, *flags)
    assert result.returncode == status, result.stderr
    assert result.stdout.count("[]\n") == (1 if status else 2)  # the first ends the others


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_both(shared_flags, own_corpus, tmp_path, rank):
    name = sorted(TRAIN_NAMES[:3])[rank]  # the validation track that this rank alone reads
    path = own_corpus / "train" / name / "vocals.wav"
    audio, _ = sf.read(path, dtype="float32")
    audio[: -RATE // 5] = np.nan  # the end is read before the run starts
    sf.write(path, audio, RATE, "FLOAT")
    flags = ["--exp_dir", tmp_path / "run", *shared_flags, *TWO_RANKS, "--devices", "2"]
    result = run_command("train.py", *flags, "--root", own_corpus)
    assert result.returncode == 2
    assert result.stderr.count("vocals.wav: not a finite number at sample 0") == 1
    rest = [line for line in result.stderr.splitlines() if "vocals.wav" not in line]
    assert set(rest) <= {"train.py: error: another process of this run ended; its error says why"}


@pytest.mark.parametrize(
    ("send", "signum"),
    [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM to the first"],
)
def test_a_signal_ends_both(shared_flags, tmp_path, send, signum):
    exp_dir = tmp_path / "run"
    flags = [*shared_flags, "--devices", "2", "--epochs", "100000"]
    process = start_training(exp_dir, *flags, stdout=subprocess.DEVNULL, start_new_session=True)
    send(process.pid, signum)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signum, stderr
    assert re.fullmatch(
        r"\nending after this step; a second signal ends at once\n"
        r"\ninterrupted in epoch \d+; best val_loss \d.\d+, in \S+\n"
        r"the same command resumes from \S+\n",
        stderr,
    )


# What is wrong is said before anything waits


def test_several_nodes_need_a_launcher(shared_flags, tmp_path, error_of, monkeypatch):
    flags = ["--exp_dir", tmp_path / "run", *shared_flags, "--num_nodes", "2"]
    error = error_of(train.main, *flags)
    for words in ("--num_nodes 2: ", "torchrun", "srun", "no MASTER_ADDR, MASTER_PORT, NODE_RANK"):
        assert words in error
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "; there is no NODE_RANK" in error_of(train.main, *flags)
    assert not (tmp_path / "run").exists()


TORCHRUN_TWO = dict(TORCHELASTIC_RUN_ID="a", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
SRUN_TWO = dict(SLURM_NTASKS="2", SLURM_JOB_NAME="a", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="2")
SRUN_TWO |= dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_JOB_ID="1")


@pytest.mark.parametrize(
    ("variables", "flags", "words"),
    [
        (TORCHRUN_TWO, ["--devices", "1"], "does not match the world size (2)"),
        (TORCHRUN_TWO, ["--devices", "2", "--num_nodes", "2"], "does not match the world size (2)"),
        (SRUN_TWO, ["--devices", "2", "--num_nodes", "2"], "`--ntasks-per-node=1` does not match"),
    ],
)
def test_the_flags_must_say_what_was_launched(
    shared_flags, tmp_path, error_of, monkeypatch, variables, flags, words
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = error_of(train.main, "--exp_dir", tmp_path / "run", *shared_flags, *flags)
    assert words in error
    assert not (tmp_path / "run").exists()
