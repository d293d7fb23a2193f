"""Separate raw float32 samples from stdin to stdout as they come, for `local.separate --stream`."""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from local.estimates import list_targets, name_targets
from local.musdb18_tracks import TARGETS
from local.streaming import StreamingConvTasNet
from local.tools.command_line import CLOSED_PIPE, INTERRUPTED, UserError

PIPE_SIZE = 2**16  # bytes


def separate_stream(model: nn.Module, target: str) -> int:
    """Separate stdin until it ends or Ctrl-C is pressed.

    Args:
        model: see `StreamingConvTasNet`.
        target: what the model gives, see `list_targets`; or "both": the channels of vocals, then
            those of accompaniment.

    Returns:
        the exit status.

    Raises:
        UserError: the model cannot be streamed, or does not give the target; a sample is NaN or
            infinity, or stdin or stdout fails.
    """
    source, sink = sys.stdin.fileno(), sys.stdout.fileno()
    channels, targets = model.audio_channels, list_targets(model)
    if target not in (*targets, "both"):
        raise UserError(f"--stream {target}: the model gives {', '.join(targets)}; name one")
    try:
        engine = StreamingConvTasNet(model)
    except ValueError as error:
        raise UserError(f"--stream: {error}") from None
    print(
        f"streaming {target} at {model.samplerate} Hz, float32 samples of {channels} channels in,"
        f" {channels * (2 if target == 'both' else 1)} out; latency {engine.latency} samples"
        f" ({1000 * engine.latency / model.samplerate:.1f} ms)",
        file=sys.stderr,
    )
    rest, size = b"", 4 * channels
    try:
        with ctrl_c_as_input() as interrupt:
            for chunk in read_chunks(source, interrupt):
                rest += chunk
                whole = len(rest) // size * size
                block = np.frombuffer(rest[:whole], np.float32).reshape(-1, channels)
                rest = rest[whole:]
                write_samples(sink, engine.push(torch.from_numpy(block.T.copy())), target)
            interrupted = is_readable(interrupt)
        write_samples(sink, engine.flush(), target)
    except BrokenPipeError:
        return CLOSED_PIPE
    except OSError as error:
        raise UserError(f"--stream: stdin or stdout: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"stdin: {error}") from None
    if rest:
        print(f"stdin: its last {len(rest)} bytes are no whole sample; ignored", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


@contextmanager
def ctrl_c_as_input() -> Iterator[int]:
    """Yield a file descriptor that the first Ctrl-C makes readable, instead of interrupting.

    A second Ctrl-C interrupts as usual.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, handler))
    signal.set_wakeup_fd(writable)
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, handler)
        os.close(readable)
        os.close(writable)


def read_chunks(source: int, interrupt: int) -> Iterator[bytes]:
    """Yield bytes of `source` as they come, until it ends or `interrupt` is readable."""
    while True:
        ready, _, _ = select.select([source, interrupt], [], [])
        if interrupt in ready:
            return
        chunk = os.read(source, PIPE_SIZE)
        if not chunk:
            return
        yield chunk


def is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def write_samples(sink: int, sources: Tensor, target: str) -> None:
    """Write (C, channels, T) estimates as interleaved float32."""
    estimates = name_targets(sources.cpu())
    names = TARGETS if target == "both" else (target,)
    chosen = np.concatenate([estimates[name] for name in names])
    samples = memoryview(chosen.T.astype(np.float32).tobytes())
    while samples:
        samples = samples[os.write(sink, samples) :]
