"""The forward pass of training: the fast path or the model itself, compiled or not."""

from collections.abc import Callable

import torch
from torch import nn

from local.fast.equal import choose_fast
from local.fast.recompute import RecomputingForward
from local.fast.training import TrainingForward, allow_tf32_products


def choose_forward(model: nn.Module, training: dict, device: torch.device) -> tuple[Callable, str]:
    """The forward pass from mixtures to estimates in training, and a note for the user or "".

    Args:
        training: the section `training` of the configuration.

    Raises:
        ValueError: as choose_fast.
    """
    memory, compile_ = training["memory"], training["compile"]
    is_fast = choose_fast(model, training["fast"], training=True)
    compiled = compile_ == "yes" or (compile_ == "auto" and is_fast and device.type == "cuda")
    note = ""
    if compiled:
        note = "the first step compiles, which takes a minute or two"
        if fault := find_compiler_fault(device):
            note = f"torch.compile does not work here, so nothing is compiled: {fault}"
            compiled = False
    if is_fast:
        if device.type == "cuda":
            allow_tf32_products()
        return TrainingForward(model, memory, compiled), note
    if compiled:
        model.compile()
    return RecomputingForward(model, memory), note


def find_compiler_fault(device: torch.device) -> str:
    """Why torch.compile does not work on a device, in a line; "" if it does."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "on a single CPU thread its gradients are wrong (with torch 2.13 and gLN)"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of several types: no C++ compiler, no Triton, no Python headers
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""
