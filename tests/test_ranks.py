import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from lightning_fabric.plugins.environments.lightning import find_free_network_port

from local.tools.ranks import Ranks, joined_ranks

# Two ranks exchange values; the second may not start, or leave early.
TALK = """
import json, sys
from datetime import timedelta
from local.tools import ranks
from local.tools.command_line import clear_errors

ranks.JOIN_TIMEOUT = timedelta(seconds=int(sys.argv[1]))
with clear_errors("talk"), ranks.joined_ranks() as found:
    if sys.argv[2] == "leave" and found.rank == 1:
        sys.exit()
    word = found.broadcast(f"from {found.rank}")
    place = [found.rank, found.count, found.local_rank, found.local_count]
    shares = found.gather(place)
    if found.rank == 0:
        print(json.dumps([word, shares]))
"""


def start(rank: int, port: int, *args) -> subprocess.Popen:
    variables = dict(SLURM_NTASKS=2, SLURM_NTASKS_PER_NODE=2, SLURM_NNODES=1, SLURM_JOB_NAME="a")
    variables |= dict(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID=0, SLURM_JOB_ID=1)
    variables |= dict(MASTER_ADDR="localhost", MASTER_PORT=port, SLURM_NODELIST="localhost")
    return subprocess.Popen(
        [sys.executable, "-c", TALK, *args],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_single_process_is_rank_0_of_1():
    with joined_ranks() as ranks:
        assert ranks == Ranks(rank=0, count=1)
        assert ranks.broadcast("word") == "word"
        assert ranks.gather("word") == ["word"]


def test_two_ranks_exchange_values():
    port = find_free_network_port()
    first, second = (start(rank, port, "60", "stay") for rank in (0, 1))
    printed, error = first.communicate(timeout=120)
    assert first.returncode == second.wait(60) == 0, error + second.stderr.read()
    assert json.loads(printed) == ["from 0", [[0, 2, 0, 2], [1, 2, 1, 2]]]
    second.communicate()


@pytest.mark.parametrize("alone", [True, False], ids=["never came", "left"])
def test_a_rank_that_is_missing_ends_the_others_in_one_line(alone):
    port = find_free_network_port()
    first = start(0, port, "2" if alone else "60", "leave")
    second = None if alone else start(1, port, "60", "leave")
    printed, error = first.communicate(timeout=120)
    assert first.returncode == 2
    words = "not all 2 ranks of this run connected to " if alone else "a rank of this run was lost"
    assert f"talk: error: {words}" in error
    assert "Traceback" not in error
    if second:
        second.communicate(timeout=60)
