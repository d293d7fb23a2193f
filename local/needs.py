"""How much memory the separation of a track needs, before it is tried."""

from argparse import Namespace

from torch import nn

from local.fast.choose import choose_fast
from local.streaming import find_stream_fault
from local.tasnet import ConvTasNetStereo

WORKSPACE = 100e6  # bytes that do not grow with the track, of the published models (measured)


def separation_bytes(model: nn.Module, seconds: float, method: str, fast: str = "auto") -> float:
    """Return the bytes of the machine's memory that the separation of a whole track takes.

    Mixture and estimates are counted, and what `full` keeps of the track; the latter not for models
    other than ConvTasNetStereo, of which it is not known, and not on a GPU, which has memory of its
    own.

    Args:
        method, fast: as in `inference.separate`.
    """
    samples = seconds * model.samplerate
    targets = model.C + (model.C > 2)  # then the accompaniment is one more
    signals = 4 * model.audio_channels * (1 + targets) * samples
    is_on_gpu = next(model.parameters()).is_cuda
    if method != "full" or is_on_gpu or not isinstance(model, ConvTasNetStereo):
        return WORKSPACE + signals
    channels = 5 * model.H + 2 * model.B + model.N  # of the model itself, at its peak (measured)
    if choose_fast(model, fast):  # the residual, and a buffer; or a stream
        channels = model.B + max(model.B, model.H) if find_stream_fault(model) else 0
    return WORKSPACE + signals + 4 * channels * samples / model.encoder.hop


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
