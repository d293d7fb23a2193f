"""The states of all random generators that a run may use."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def get_random_states(device: torch.device) -> dict:
    """The states of Python, numpy and torch, and of the device if it is a GPU, as plain data."""
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    name, keys, *rest = np.random.get_state()
    states["numpy"] = (name, keys.tolist(), *rest)
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict, device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def keep_random_states(device: torch.device) -> Iterator[None]:
    """Restores the random states at the end of the block."""
    states = get_random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)
