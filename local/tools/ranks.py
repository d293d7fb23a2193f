"""The processes that torchrun or srun starts for one run, and how they exchange values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from local.tools.command_line import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

JOIN_TIMEOUT = timedelta(minutes=10)  # for all ranks to start
WORK_TIMEOUT = timedelta(days=7)  # for the work of the other ranks; a lost rank is noticed at once
LAUNCHERS = ("TORCHELASTIC_", "SLURM_")  # how their environment variables start


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; rank 0 of 1 where it is the only one.

    Args:
        rank, count: over all machines.
        local_rank, local_count: on this machine.
        group: the process group of all ranks; None where there is one rank.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    group: ProcessGroup | None = None

    def broadcast(self, value):
        """Return the value of rank 0 on every rank.

        Raises:
            UserError: rank 0 was lost.
        """
        if self.group is None:
            return value
        import torch.distributed as dist

        values = [value]
        with _report_lost_ranks():
            dist.broadcast_object_list(values, group=self.group)
        return values[0]

    def gather(self, value) -> list:
        """Return the values of all ranks on rank 0; other ranks get nothing of use.

        Raises:
            UserError: a rank was lost.
        """
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values = [None] * self.count
        with _report_lost_ranks():
            dist.gather_object(value, values if self.rank == 0 else None, group=self.group)
        return values


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Wait for all processes that torchrun or srun started, and connect them.

    Without torchrun or srun, yield a single rank at once, and import neither torch nor Lightning.

    Raises:
        UserError: some ranks do not start in time, or Lightning does not support the SLURM
            variables of this sbatch or srun.
    """
    if not any(name.startswith(LAUNCHERS) for name in os.environ):
        yield Ranks()
        return
    import torch.distributed as dist
    from pytorch_lightning.plugins.environments import (
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )

    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    try:
        found = next((kind() for kind in kinds if kind.detect()), LightningEnvironment())
    except RuntimeError as error:
        raise UserError(str(error)) from None
    if found.world_size() == 1:
        yield Ranks()
        return
    address = f"tcp://{found.main_address}:{found.main_port}"
    # torchrun has opened a store at the address already, which env:// uses.
    is_torchrun = isinstance(found, TorchElasticEnvironment)
    try:
        dist.init_process_group(
            "gloo",
            init_method="env://" if is_torchrun else address,
            rank=found.global_rank(),
            world_size=found.world_size(),
            timeout=JOIN_TIMEOUT,
        )
        group = dist.new_group(timeout=WORK_TIMEOUT)
    except RuntimeError:
        raise UserError(
            f"not all {found.world_size()} ranks of this run connected to {address} within"
            f" {JOIN_TIMEOUT}; see whether one of them stopped with an error"
        ) from None
    local_count = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    place = found.global_rank(), found.world_size(), found.local_rank(), int(local_count or 1)
    try:
        yield Ranks(*place, group)
    finally:
        dist.destroy_process_group()


@contextmanager
def _report_lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise UserError(
            "a rank of this run was lost; run the same command again to resume"
        ) from None
