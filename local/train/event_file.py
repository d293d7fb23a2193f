"""A file for TensorBoard that is written at once, where an error of the disk can be caught."""

import io
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile as sf
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """The events of one process. Torch's SummaryWriter writes in a thread, whose errors come later,
    and its audio is mono.

    Args:
        folder: made when the first events are written.
        step: what earlier processes have written of this step and later ones is void.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / f"events.out.tfevents.{time.time():.0f}.{os.getpid()}"
        self._step = step

    def write(self, step: int, values: Iterable[Summary.Value] = ()) -> None:
        """Appends all values, or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        content = io.BytesIO()
        writer = RecordWriter(content)
        for event in self._begin() + [_stamp(step, summary=Summary(value=[v])) for v in values]:
            writer.write(event.SerializeToString())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                rest = content.getbuffer()
                while rest:  # of a disk that is almost full, a write takes a part
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(size)
                raise

    def _begin(self) -> list[Event]:
        """What a file begins with; nothing where it has begun."""
        if self.path.exists():
            return []
        version = _stamp(0, file_version="brain.Event:2")
        return [version, _stamp(self._step, session_log=SessionLog(status=SessionLog.START))]


def _stamp(step: int, **content) -> Event:
    return Event(wall_time=time.time(), step=step, **content)


def make_audio(tag: str, samples: np.ndarray, rate: int) -> Summary.Value:
    """Audio of 16 bits from (T, channels); what exceeds full scale is scaled down to it."""
    content = io.BytesIO()
    sf.write(
        content, samples / max(np.abs(samples).max(initial=0), 1), rate, "PCM_16", format="WAV"
    )
    audio = Summary.Audio(
        sample_rate=rate,
        num_channels=samples.shape[1],
        length_frames=len(samples),
        encoded_audio_string=content.getvalue(),
        content_type="audio/wav",
    )
    return Summary.Value(tag=tag, audio=audio)


def make_image(tag: str, figure) -> Summary.Value:
    """A matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    width, height = figure.canvas.get_width_height()
    image = Summary.Image(width=width, height=height, encoded_image_string=content.getvalue())
    return Summary.Value(tag=tag, image=image)
