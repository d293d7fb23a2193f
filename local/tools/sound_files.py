"""wav and flac files: 16-bit wav is read fast, and what is wrong with a file is said."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf

BLOCK = 512  # samples to read at a time; a frame of a flac holds more
UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's, of a flac that was written to a pipe


def read_header(path: Path):
    """Return soundfile's info on a wav or flac file.

    Raises:
        ValueError: what is wrong with the file, without its name.
    """
    try:
        info = sf.info(os.fsencode(path))
    except (OSError, sf.LibsndfileError):
        raise ValueError(describe_fault(path)) from None
    if info.frames == UNKNOWN_LENGTH:
        raise ValueError(
            "its header does not say how long it is; write it again, for example with ffmpeg"
        )
    return info


def read_pcm16(path: Path, rate: int, total: int, start: int, length: int) -> np.ndarray | None:
    """Read `length` samples from `start` on as (length, 2) int16.

    Return None where the file is no 16-bit wav of this rate and `total` samples, or ends early:
    then libsndfile reads it, or reports what is wrong. Not a memory map: if the file shrank, the
    process would be killed.
    """
    with open(path, "rb") as file:
        size = _find_samples(file, rate)
        if size != 4 * total or not 0 <= start <= total - length:
            return None
        file.seek(4 * start, os.SEEK_CUR)
        frames = np.empty((length, 2), "<i2")
        return frames if file.readinto(frames) == frames.nbytes else None


def _find_samples(file: BinaryIO, rate: int) -> int:
    """Seek to the samples of a 16-bit stereo wav; return their bytes, or 0 for other files."""
    head = file.read(12)
    if head[:4] + head[8:] != b"RIFFWAVE":
        return 0
    pcm16 = struct.pack("<HHIIHH", 1, 2, rate, 4 * rate, 4, 16)
    layout = b""
    while chunk := file.read(8):
        size = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"data":
            return size if layout == pcm16 else 0
        end = file.tell() + size + size % 2
        if chunk[:4] == b"fmt ":
            layout = file.read(16)
        file.seek(end)
    return 0


def describe_fault(path: Path) -> str:
    """Say what is wrong with a file that could not be read, and where, without libsndfile's words.

    Reads it again, as far as it goes: libsndfile notices what differs from a flac's checksums.
    """
    samples = 0
    try:
        with open(path, "rb") as opened:
            if not opened.read(1):
                return "cannot be read: it is empty; copy it again"
        with sf.SoundFile(os.fsencode(path)) as file:
            rate = file.samplerate
            while read := len(file.read(BLOCK, "float32")):
                samples += read
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except sf.LibsndfileError:
        if not samples:
            return "cannot be read: no wav or flac, or damaged at its beginning; copy it again"
        return f"damaged after {samples / rate:.2f} s; copy it again"
    return "could not be read, and now can be; was it changed?"
