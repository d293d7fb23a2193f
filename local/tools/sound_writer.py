"""Write sound files of any format, block by block."""

from pathlib import Path

import numpy as np

from local.tools.encoders import FfmpegWriter, SoundFileWriter
from local.tools.formats import Format
from local.tools.resample import Resampler
from local.tools.wav import WavWriter, to_integers


class SoundWriter:
    """A sound file of one of FORMATS: wav, or what libsndfile or ffmpeg encodes.

    T samples are round(T * new / rate) where the format lacks their rate, with `new` the nearest
    that it has; an m4a file is up to a frame of 1024 samples longer. Other than a wav file, none
    can be empty: without samples it holds one that is zero.

    Args:
        rate: of the samples, in Hz.

    Attributes:
        clipped: how many samples were beyond full scale, and clipped; formats of floats clip none.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, rate: int, channels: int, form: Format):
        self.form, self.channels, self.clipped = form, channels, 0
        self.rate, self.new_rate = rate, form.find_rate(rate)
        self.resampler = Resampler(rate, self.new_rate, channels)
        self.received = self.written = 0  # samples
        self.file = _open_file(path, self.new_rate, channels, form)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            self.file.__exit__(kind, error, traceback)
            return
        with self.file:
            self._write_rest()

    def write(self, samples: np.ndarray) -> None:
        """Append samples (T, channels)."""
        self.received += len(samples)
        self._encode(self.resampler.push(samples))

    def _write_rest(self) -> None:
        length = round(self.received * self.new_rate / self.rate)
        if self.form.suffix != "wav":
            length = max(length, 1)
        self._encode(self.resampler.flush()[: length - self.written])
        missing = length - self.written  # no more than soxr rounds off
        self._encode(np.zeros((missing, self.channels), np.float32))

    def _encode(self, samples: np.ndarray) -> None:
        self.written += len(samples)
        if self.form.bits:
            samples, clipped = to_integers(samples, self.form.bits)
            self.clipped += clipped
        self.file.write(samples)


def _open_file(path: Path, rate: int, channels: int, form: Format):
    if form.suffix == "wav":
        return WavWriter(path, rate, channels, form.subtype)
    if form.encoder:
        return FfmpegWriter(path, rate, channels, form)
    return SoundFileWriter(path, rate, channels, form)
