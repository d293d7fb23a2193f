"""Whether the fast path is used, and which forward pass trains: compiled, with kernels, or not."""

from collections.abc import Callable

import torch
from torch import nn

from local import tasnet
from local.fast.equal import find_difference
from local.fast.graphed import GraphedForward
from local.fast.recompute import RecomputingForward
from local.fast.training import TrainingForward, allow_tf32_products
from local.tools.choices import FAST
from local.tools.command_line import brief

WITH_KERNELS = ("gLN", "cLN")  # the norms for which local/fast/gpu.py has kernels
OLDEST = (8, 0)  # the compute capability of GPUs with bf16, which the kernels need


def choose_fast(model: nn.Module, fast: str, training: bool = False) -> bool:
    """Whether to use the fast path.

    Args:
        fast: one of FAST.

    Raises:
        ValueError: `fast` is none of FAST, or "yes" for a model that the fast path does not equal.
    """
    if fast not in FAST:
        raise ValueError(f"fast must be one of {', '.join(FAST)}, got {fast!r}")
    difference = "" if fast == "no" else find_difference(model, training)
    if difference and fast == "yes":
        raise ValueError(f"the fast path differs from the model: {difference}; use fast auto or no")
    return fast != "no" and not difference


def describe_fast(model: nn.Module, fast: str, training: bool = False) -> str:
    """Which forward pass runs and why, for the first screen.

    Raises:
        ValueError: as choose_fast.
    """
    if choose_fast(model, fast, training):
        return "the fast path, which equals the model in local/tasnet.py"
    if type(model) is not tasnet.ConvTasNetStereo:
        return "the model itself; the fast path is for ConvTasNetStereo only"
    reason = "because of --fast no"
    if fast != "no":
        reason = f"from which the fast path differs ({find_difference(model, training)})"
    return f"the model itself, {reason}: up to 4 times slower, with several times the memory"


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
    kernels, note = False, ""
    if compiled:
        note = "the first step compiles, which takes half a minute or so"
        if fault := find_compiler_fault(device):
            note = f"torch.compile does not work here, so nothing is compiled: {fault}"
            compiled = False
    if compiled and is_fast and device.type == "cuda":
        fault = find_kernel_fault(model, device)
        kernels = not fault
        note += f"; blocks{' do not' if fault else ''} run as Triton kernels"
        note += f": {fault}" if fault else ""
    if is_fast:
        if device.type == "cuda":
            allow_tf32_products()
        forward = TrainingForward(model, memory, compiled, kernels)
        if kernels and not torch.distributed.is_initialized():
            return GraphedForward(forward, model.parameters()), note + ", in CUDA graphs"
        return forward, note
    if compiled:
        model.compile()
    return RecomputingForward(model, memory), note


def choose_batch_forward(model: nn.Module, is_fast: bool) -> Callable:
    """The forward pass of batches in inference: by the kernels where they work, or the model's own.

    Args:
        is_fast: whether the fast path may be used.
    """
    device = next(model.parameters()).device
    if not is_fast or find_kernel_fault(model, device) or find_difference(model, training=True):
        return model
    return TrainingForward(model, kernels=True)


def find_kernel_fault(model: tasnet.ConvTasNetStereo, device: torch.device) -> str:
    """Why the kernels of local/fast/gpu.py cannot run a model on a device, in a line; "" if they
    can, which is tried on a block.
    """
    if model.norm_type not in WITH_KERNELS:
        return f"there are none for {model.norm_type}"
    if next(model.parameters()).dtype != torch.float32:
        return "they are for weights in float32"
    if device.type != "cuda" or torch.version.hip:
        return "they are for GPUs of NVIDIA"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "the GPU is too old"
    try:
        from local.fast import gpu

        return gpu.find_difference(model, device)
    except Exception as error:  # of several types: no Triton, or another version of it
        return brief(error)


def find_compiler_fault(device: torch.device) -> str:
    """Why torch.compile does not work on a device, in a line; "" if it does."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "on a single CPU thread its gradients are wrong (with torch 2.13 and gLN)"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of several types: no C++ compiler, no Triton, no Python headers
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""
