"""How much memory and time the separation of a track needs, before it is tried."""

import math
from argparse import Namespace

from torch import nn

from local.fast.choose import choose_fast
from local.inference import count_windows
from local.streaming import find_stream_fault
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import brief
from local.tools.memory import is_out_of_memory

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
        window = args.segment * (1 + args.overlap) + args.overlap
        at_once = min(seconds, window * count_windows(device))
        signals += per_second * at_once
    channels = 5 * model.H + 2 * model.B + model.N  # of the model itself, at its peak (measured)
    if choose_fast(model, args.fast):  # the residual, and a buffer; or a stream
        channels = model.B + max(model.B, model.H) if find_stream_fault(model) else 0
    return WORKSPACE + signals + 4 * channels * at_once * rate / model.encoder.hop


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
