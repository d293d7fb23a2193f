"""The processes of a training run."""

import torch.distributed as dist


def find_rank() -> tuple[int, int]:
    """(rank, number of ranks), as they are now: Lightning starts the process group in fit."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_from_ranks(value) -> list:
    """What every rank has, on every rank."""
    values = [value] * find_rank()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def end_process_group() -> None:
    """Ends the threads of gloo, which Lightning leaves running: if Python ends first, one that
    still holds the tensors of a collective aborts its process.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
