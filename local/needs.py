"""How much memory and time the separation of a track needs, before it is tried."""

import math
from argparse import Namespace

import torch
from torch import nn

from local.fast.choose import choose_fast
from local.streaming import find_stream_fault
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import brief
from local.tools.memory import free_gpu_memory, is_out_of_memory

MOST_WINDOWS = 4  # in a batch of overlap-add
WORKSPACE = 100e6  # bytes that do not grow with the track, of the published models (measured)
PRODUCTS = 16e9  # multiplications and additions of a core in a second (measured of small models)


def separation_seconds(model: nn.Module) -> float:
    """Return about how long one core takes to separate a second of audio.

    It is infinite for models other than ConvTasNetStereo, of which it is not known.
    """
    if not isinstance(model, ConvTasNetStereo):
        return math.inf
    frames = model.samplerate / model.encoder.hop
    return frames * sum(weights.numel() for weights in model.parameters()) / PRODUCTS


def separation_bytes(
    model: nn.Module, seconds: float, args: Namespace, in_blocks: bool = False
) -> float:
    """Return the bytes of the machine's memory that the separation of a track takes.

    Mixture and estimates are counted, also of a window of overlap-add, and what the model keeps of
    what it separates at once: the track, or such a window. The latter not for models other than
    ConvTasNetStereo, of which it is not known, and not on a GPU, which has memory of its own.

    Args:
        args: of the flags of `add_method_flags`.
        in_blocks: whether mixture and estimates are never in memory as a whole.
    """
    rate, at_once = model.samplerate, seconds
    targets = model.C + (model.C > 2)  # then the accompaniment is one more
    per_second = 4 * model.audio_channels * (1 + targets) * rate
    signals = 0 if in_blocks else per_second * seconds
    device = next(model.parameters()).device
    if device.type != "cpu" or args.method == "stream" or not isinstance(model, ConvTasNetStereo):
        return WORKSPACE + signals
    if args.method == "overlap-add":
        at_once = min(seconds, args.segment * (1 + args.overlap) + args.overlap)
        signals += per_second * at_once
    channels = _count_channels(model)
    if choose_fast(model, args.fast):  # the residual, and a buffer; or a stream
        channels = model.B + max(model.B, model.H) if find_stream_fault(model) else 0
    return WORKSPACE + signals + 4 * channels * at_once * rate / model.encoder.hop


def count_windows(model: nn.Module, samples: int, device: torch.device) -> int:
    """Return how many windows of overlap-add the model separates at once: on a CPU one, as more
    gain nothing; on a GPU up to MOST_WINDOWS, as its free memory allows.
    """
    if device.type == "cpu":
        return 1
    if device.type != "cuda" or not isinstance(model, ConvTasNetStereo):
        return MOST_WINDOWS
    window = 4 * _count_channels(model) * samples / model.encoder.hop
    return max(1, min(MOST_WINDOWS, int((free_gpu_memory(device) - WORKSPACE) / window)))


def _count_channels(model: ConvTasNetStereo) -> int:
    """Of the tensors that the model itself holds at its peak (measured on a CPU)."""
    return 5 * model.H + 2 * model.B + model.N


def describe_failure(error: Exception, args: Namespace, on_cpu: str = "") -> str:
    """Return why a track could not be separated; an error that does not tell is raised again.

    Args:
        args, on_cpu: see `advise_on_memory`.
    """
    if is_out_of_memory(error):
        return f"out of memory: {brief(error)}{advise_on_memory(args, on_cpu)}"
    if not isinstance(error, ValueError):
        raise error
    return str(error)


def advise_on_memory(args: Namespace, on_cpu: str = "") -> str:
    """Return the flags with which the separation of a track needs less memory, if any.

    Args:
        args: of the flags of `add_method_flags`.
        on_cpu: the flag that separates on the CPU, where it is not used.
    """
    flags = [on_cpu] if on_cpu else []
    if args.method == "full":
        flags.append("--method overlap-add")
    if args.method == "overlap-add":
        flags.append(f"--segment below {args.segment}")
    if args.fast == "no":
        flags.append("--fast auto")
    return f"; these need less: {', '.join(flags)}" if flags else ""
