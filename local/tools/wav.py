"""Write wav files block by block, of any size."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile as sf

LARGEST = 2**32 - 2**10  # bytes of samples in a plain wav file: its header has 32 bits for sizes
BLOCK = 2**20  # samples at a time
BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}  # of a sample
DTYPES = {"PCM_16": "int16", "PCM_24": "int32", "FLOAT": "float32"}


def to_integers(samples: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """Return (float samples as integers, how many were beyond full scale and clipped).

    Those of 16 bits are int16; those of 24 bits fill the upper bits of int32, as soundfile has it.
    """
    scale = 2.0 ** (bits - 1)
    scaled = np.rint(samples * scale)
    clipped = np.clip(scaled, -scale, scale - 1)
    dtype, shift = (np.int16, 0) if bits == 16 else (np.int32, 32 - bits)
    return clipped.astype(dtype) << shift, int(np.count_nonzero(scaled != clipped))


class WavWriter:
    """A wav file; one of more than 4 GiB is written as RF64, whose sizes have 64 bits.

    Args:
        subtype: soundfile's name of the samples' format, one of BYTES.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, rate: int, channels: int, subtype: str):
        self.path, self.form = path, (rate, channels, subtype)
        self.frame = channels * BYTES[subtype]
        self.file = self._open(path, "WAV")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        call(self.path, self.file.close)

    def write(self, samples: np.ndarray) -> None:
        """Append samples (T, channels)."""
        for start in range(0, len(samples), BLOCK):
            block = samples[start : start + BLOCK]
            size = (self.file.tell() + len(block)) * self.frame
            if self.file.format == "WAV" and size > LARGEST:
                self._change_to_rf64()
            call(self.path, self.file.write, block)

    def _change_to_rf64(self) -> None:
        """Copy what is written: the longer header does not fit before it."""
        call(self.path, self.file.close)
        plain = self.path.with_name(f"{self.path.name}.plain")
        os.replace(self.path, plain)
        try:
            self.file = self._open(self.path, "RF64")
            with sf.SoundFile(os.fsencode(plain)) as written:
                for block in written.blocks(BLOCK, dtype=DTYPES[written.subtype]):
                    call(self.path, self.file.write, block)
        finally:
            plain.unlink()

    def _open(self, path: Path, kind: str) -> sf.SoundFile:
        rate, channels, subtype = self.form
        name = os.fsencode(path)
        return call(path, sf.SoundFile, name, "w", rate, channels, subtype, None, kind)


def call(path: Path, function: Callable, *args, **kwargs):
    """Call a function of soundfile that writes to `path`; what it raises becomes an OSError."""
    try:
        return function(*args, **kwargs)
    except sf.LibsndfileError as error:
        reason = f"{error.error_string.rstrip('.')} (is the disk full?)"
        raise OSError(errno.EIO, reason, str(path.parent)) from None
