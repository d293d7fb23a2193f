"""The processes that torchrun or srun starts for one run, and what they tell one another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from local.tools.command_line import UserError

JOIN_WAIT = timedelta(minutes=10)  # for all to start
LONGEST_WAIT = timedelta(days=7)  # for the others' work; that one is lost shows at once


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; by itself, rank 0 of 1.

    Args:
        rank, count: of all machines.
        local_rank, local_count: of this machine.
        group: over which they talk, where there are several.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    group: dist.ProcessGroup | None = None

    def broadcast(self, value):
        """What rank 0 has.

        Raises:
            UserError: it was lost.
        """
        if self.group is None:
            return value
        values = [value]
        with _lost_ranks():
            dist.broadcast_object_list(values, group=self.group)
        return values[0]

    def gather(self, value) -> list:
        """What every rank has, on rank 0.

        Raises:
            UserError: one was lost.
        """
        if self.group is None:
            return [value]
        values = [None] * self.count
        with _lost_ranks():
            dist.gather_object(value, values if self.rank == 0 else None, group=self.group)
        return values


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Waits for all processes that torchrun or srun started; none where they did not.

    Raises:
        UserError: they do not all come, or SLURM's variables are those of an sbatch or srun that
            Lightning does not support.
    """
    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    try:
        found = next((kind() for kind in kinds if kind.detect()), LightningEnvironment())
    except RuntimeError as error:
        raise UserError(str(error)) from None
    if found.world_size() == 1:
        yield Ranks()
        return
    # torchrun itself serves the address, and says so in the environment.
    address = f"tcp://{found.main_address}:{found.main_port}"
    try:
        dist.init_process_group(
            "gloo",
            init_method="env://" if isinstance(found, TorchElasticEnvironment) else address,
            rank=found.global_rank(),
            world_size=found.world_size(),
            timeout=JOIN_WAIT,
        )
        group = dist.new_group(timeout=LONGEST_WAIT)
    except RuntimeError:
        raise UserError(
            f"not all {found.world_size()} processes of this run came to {address} within"
            f" {JOIN_WAIT}; has one of them stopped with an error?"
        ) from None
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1
    try:
        yield Ranks(found.global_rank(), found.world_size(), found.local_rank(), int(here), group)
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise UserError(
            "a process of this run was lost; the same command goes on where it ended"
        ) from None
