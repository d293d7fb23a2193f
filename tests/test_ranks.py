import multiprocessing
import os
from datetime import timedelta

import pytest
from lightning_fabric.plugins.environments.lightning import find_free_network_port

from local.tools import ranks
from local.tools.command_line import UserError
from local.tools.ranks import Ranks, joined_ranks


def run_rank(rank: int, port: int, timeout: int, leaves: bool, answers) -> None:
    """One of two processes that srun starts on a machine; it sends what it got, or its error."""
    variables = dict(SLURM_NTASKS=2, SLURM_NTASKS_PER_NODE=2, SLURM_NNODES=1, SLURM_JOB_NAME="a")
    variables |= dict(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID=0, SLURM_JOB_ID=1)
    variables |= dict(MASTER_ADDR="localhost", MASTER_PORT=port, SLURM_NODELIST="localhost")
    os.environ.update({name: str(value) for name, value in variables.items()})
    ranks.JOIN_TIMEOUT = timedelta(seconds=timeout)
    try:
        with joined_ranks() as found:
            if leaves:
                return
            word = found.broadcast(f"from {found.rank}")
            place = [found.rank, found.count, found.local_rank, found.local_count]
            shares = found.gather(place)
            answers.put((rank, word, shares if found.rank == 0 else None))
    except UserError as error:
        answers.put(str(error))


@pytest.fixture
def run_ranks():
    """Runs processes that are forked from this one, which has imported torch and Lightning."""
    fork, port, processes = multiprocessing.get_context("fork"), find_free_network_port(), []
    answers = fork.Queue()

    def run(count: int, timeout=60, leaving=()):
        for rank in range(count):
            args = (rank, port, timeout, rank in leaving, answers)
            processes.append(fork.Process(target=run_rank, args=args))
            processes[-1].start()
        return [answers.get(timeout=120) for _ in range(count - len(leaving))]

    yield run
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_a_single_process_is_rank_0_of_1():
    with joined_ranks() as found:
        assert found == Ranks(rank=0, count=1)
        assert found.broadcast("word") == "word"
        assert found.gather("word") == ["word"]


def test_two_ranks_exchange_values(run_ranks):
    places = [[0, 2, 0, 2], [1, 2, 1, 2]]
    assert sorted(run_ranks(2)) == [(0, "from 0", places), (1, "from 0", None)]


def test_a_rank_that_does_not_start_is_a_user_error(run_ranks):
    (error,) = run_ranks(1, timeout=2)
    assert "not all 2 ranks of this run connected to tcp://" in error


def test_a_rank_that_is_lost_is_a_user_error(run_ranks):
    (error,) = run_ranks(2, leaving=[1])
    assert "a rank of this run was lost; run the same command again" in error
