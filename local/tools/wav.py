"""Write wav files block by block, of any size."""

import errno
import os
from pathlib import Path

import numpy as np
import soundfile as sf

LARGEST = 2**32 - 2**10  # bytes of samples in a plain wav file: its header has 32 bits for sizes
BLOCK = 2**20  # samples at a time


def to_16_bits(samples: np.ndarray) -> tuple[np.ndarray, int]:
    """Return (float samples as int16, how many were beyond full scale and clipped)."""
    scaled = np.rint(samples * 32768.0)
    clipped = np.clip(scaled, -32768, 32767).astype(np.int16)
    return clipped, int(np.count_nonzero(scaled != clipped))


class WavWriter:
    """A wav file; one of more than 4 GiB is written as RF64, whose sizes have 64 bits.

    Args:
        subtype: soundfile's name of the samples' format.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, rate: int, channels: int, subtype: str):
        self.path, self.form = path, (rate, channels, subtype)
        self.frame = channels * {"PCM_16": 2, "FLOAT": 4}[subtype]  # bytes
        self.file = self._open(path, "WAV")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._call(self.file.close)

    def write(self, samples: np.ndarray) -> None:
        """Append samples (T, channels)."""
        for start in range(0, len(samples), BLOCK):
            block = samples[start : start + BLOCK]
            size = (self.file.tell() + len(block)) * self.frame
            if self.file.format == "WAV" and size > LARGEST:
                self._change_to_rf64()
            self._call(self.file.write, block)

    def _change_to_rf64(self) -> None:
        """Copy what is written: the longer header does not fit before it."""
        self._call(self.file.close)
        plain = self.path.with_name(f"{self.path.name}.plain")
        os.replace(self.path, plain)
        try:
            self.file = self._open(self.path, "RF64")
            with sf.SoundFile(os.fsencode(plain)) as written:
                dtype = "float32" if written.subtype == "FLOAT" else "int16"
                for block in written.blocks(BLOCK, dtype=dtype):
                    self._call(self.file.write, block)
        finally:
            plain.unlink()

    def _open(self, path: Path, kind: str) -> sf.SoundFile:
        rate, channels, subtype = self.form
        name = os.fsencode(path)
        return self._call(sf.SoundFile, name, "w", rate, channels, subtype, None, kind)

    def _call(self, function, *args):
        try:
            return function(*args)
        except sf.LibsndfileError as error:
            reason = f"{error.error_string.rstrip('.')} (is the disk full?)"
            raise OSError(errno.EIO, reason, str(self.path.parent)) from None
