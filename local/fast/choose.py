"""How segments go through the model in training: by the fast formulas or the model itself."""

from collections.abc import Callable

import torch
from torch import nn

from local.fast.equal import choose_fast
from local.fast.recompute import RecomputingForward
from local.fast.training import TrainingForward, allow_tf32_products


def choose_forward(model: nn.Module, training: dict, device: torch.device) -> tuple[Callable, str]:
    """What takes mixtures to estimates in training, and what is to be said of it, if anything.

    Args:
        training: that section of the configuration.
    """
    memory, compile_ = training["memory"], training["compile"]
    is_fast = choose_fast(model, training["fast"], training=True)
    compiled = compile_ == "yes" or (compile_ == "auto" and is_fast and device.type == "cuda")
    note = ""
    if compiled:
        note = "at the first step, which takes a minute or two for it"
        if fault := find_compiler_fault(device):
            note = f"torch.compile does not work here, going on without it: {fault}"
            compiled = False
    if is_fast:
        if device.type == "cuda":
            allow_tf32_products()
        return TrainingForward(model, memory, compiled), note
    if compiled:
        model.compile()
    return RecomputingForward(model, memory), note


def find_compiler_fault(device: torch.device) -> str:
    """Why torch.compile does not work here, in a line; empty where it does."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "on one thread of a CPU, its gradients are wrong (seen with torch 2.13 and gLN)"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, no Python headers
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""
