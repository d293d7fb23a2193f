"""Separate raw float32 samples from stdin to stdout as they come, for `local.separate --stream`."""

import math
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from local.estimates import list_targets, name_targets
from local.lift.remix import mix
from local.musdb18_tracks import TARGETS
from local.streaming import StreamingConvTasNet
from local.tools.choices import PRECISIONS
from local.tools.command_line import CLOSED_PIPE, INTERRUPTED, UserError

PIPE_SIZE = 2**16  # bytes
REMIX_BLOCK = 20.0  # ms
SHORTEST_PACE, PAUSE = 5, 60  # seconds: of audio that is judged, and between two notes


def separate_stream(
    model: nn.Module,
    target: str,
    block_ms: float | None = None,
    precision: str = PRECISIONS[0],
    alpha: float | None = None,
) -> int:
    """Separate stdin until it ends or Ctrl-C is pressed.

    Args:
        model: see `StreamingConvTasNet`.
        target: what the model gives, see `list_targets`; or "both": the channels of vocals, then
            those of accompaniment; or "remix", see `local.lift.remix.mix`.
        block_ms: how much is separated at a time; None: what the pipe holds, of a remix 20 ms.
        precision: see `StreamingConvTasNet`.
        alpha: of a remix.

    Returns:
        the exit status.

    Raises:
        UserError: the model cannot be streamed, or does not give the target; a sample is NaN or
            infinity, or stdin or stdout fails.
    """
    source, sink = sys.stdin.fileno(), sys.stdout.fileno()
    channels, targets = model.audio_channels, list_targets(model)
    if target not in (*targets, "both", "remix"):
        raise UserError(f"--stream {target}: the model gives {', '.join(targets)}; name one")
    try:
        engine = StreamingConvTasNet(model, precision)
    except ValueError as error:
        raise UserError(f"--stream: {error}") from None
    rate, size = model.samplerate, 4 * channels
    if target == "remix":
        block_ms = block_ms or REMIX_BLOCK
    block = size * max(1, round(block_ms * rate / 1000)) if block_ms else 0
    in_blocks = f"blocks of {block // size} samples, " if block else ""
    print(
        f"streaming {target} at {rate} Hz, float32 samples of {channels} channels in,"
        f" {channels * (2 if target == 'both' else 1)} out; {in_blocks}latency {engine.latency}"
        f" samples ({1000 * engine.latency / rate:.1f} ms)",
        file=sys.stderr,
    )
    pace, odd = Pace(), 0
    try:
        with ctrl_c_as_input() as interrupt:
            for piece in cut_pieces(read_chunks(source, interrupt), size, block):
                odd = len(piece) % size
                samples = np.frombuffer(piece[: len(piece) - odd], np.float32)
                samples = torch.from_numpy(samples.reshape(-1, channels).T.copy())
                start = time.monotonic()
                estimates = engine.push(samples)
                pace.add(time.monotonic() - start, samples.shape[-1] / rate)
                write_samples(sink, choose_output(estimates, target, alpha))
            interrupted = is_readable(interrupt)
        write_samples(sink, choose_output(engine.flush(), target, alpha))
    except BrokenPipeError:
        return CLOSED_PIPE
    except OSError as error:
        raise UserError(f"--stream: stdin or stdout: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"stdin: {error}") from None
    if odd:
        print(f"stdin: its last {odd} bytes are no whole sample; ignored", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


class Pace:
    """Says on stderr, at most once a minute, that the work takes longer than the audio lasts."""

    def __init__(self):
        self.work = self.audio = 0.0
        self.quiet_until = -math.inf

    def add(self, work: float, audio: float) -> None:
        """Both in seconds."""
        self.work, self.audio = self.work + work, self.audio + audio
        if self.audio < SHORTEST_PACE:
            return
        if self.work > self.audio and time.monotonic() >= self.quiet_until:
            print(
                f"falls behind: {self.work / self.audio:.2f} s of work for a second of audio;"
                " a larger --block, or --precision bf16, is faster",
                file=sys.stderr,
                flush=True,
            )
            self.quiet_until = time.monotonic() + PAUSE
        self.work = self.audio = 0.0


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


def cut_pieces(chunks: Iterator[bytes], sample: int, block: int) -> Iterator[bytes]:
    """Cut raw samples into pieces of `block` bytes, or into what has arrived where that is 0.

    Args:
        sample: bytes of a sample of all channels; pieces hold whole ones.

    Yields:
        the pieces; the last is what remains, if only a part of a sample.
    """
    rest = b""
    for chunk in chunks:
        rest += chunk
        size = block or len(rest) // sample * sample or sample
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    yield rest


def is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def choose_output(sources: Tensor, target: str, alpha: float | None) -> np.ndarray:
    """(C, channels, T) -> (channels of the output, T)."""
    estimates = name_targets(sources.cpu())
    if target == "remix":
        return mix(*map(estimates.get, TARGETS), alpha)
    names = TARGETS if target == "both" else (target,)
    return np.concatenate([estimates[name] for name in names])


def write_samples(sink: int, output: np.ndarray) -> None:
    """Write (channels, T) as interleaved float32."""
    samples = memoryview(output.T.astype(np.float32).tobytes())
    while samples:
        samples = samples[os.write(sink, samples) :]
