import os
import signal

import pytest
from conftest import imitate_slurm

from local.tools.slurm import requeue_job, requeueing


def test_other_signals_and_jobs_of_no_srun_are_not_requeued(tmp_path, monkeypatch):
    assert requeue_job(signal.SIGUSR1) == ""
    for name, value in imitate_slurm(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert requeue_job(signal.SIGTERM) == ""
    assert not (tmp_path / "asked").exists()


def test_a_job_of_an_array_is_requeued_by_its_number_there(tmp_path, monkeypatch):
    array = dict(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    for name, value in {**imitate_slurm(tmp_path), **array}.items():
        monkeypatch.setenv(name, value)
    assert "5_2" in requeue_job(signal.SIGUSR1)
    assert (tmp_path / "asked").read_text() == "requeue 5_2\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_of_several_processes_requeues(rank, tmp_path, monkeypatch):
    for name, value in {**imitate_slurm(tmp_path), "SLURM_PROCID": rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end, requeueing():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert end.value.code == 138
    assert (tmp_path / "asked").exists() == (rank == "0")
