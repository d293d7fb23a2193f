"""The audio files of the page, and how large they get."""

import io
import os
from pathlib import Path

import numpy as np
import soundfile as sf

from local.tools.command_line import UserError
from local.tools.ffmpeg import run_program
from local.tools.sound_files import describe_fault
from local.tools.wav import to_integers

OPUS_RATE = 128  # kbit/s
CHANNELS = 2
# Chromium hangs after a seek into the third block from the end of FLAC, of 4096 samples each.
LAST_BLOCKS = 4 * 4096  # samples, into which the page does not seek


def most_bytes(seconds: float, rate: int, form: str) -> float:
    """Return what a stereo file takes at most; FLAC takes about half of that for music."""
    flac = seconds * rate * CHANNELS * 2
    return flac if form == "flac" else seconds * OPUS_RATE * 1000 / 8 * 1.1


def encode(samples: np.ndarray, rate: int, form: str) -> tuple[bytes, int]:
    """Return (samples (channels, T) as a file of AUDIO_FORMATS, how many of them were clipped).

    FLAC has 16 bits; Opus is made of it.

    Raises:
        UserError: ffmpeg has no Opus.
    """
    flac = io.BytesIO()
    integers, clipped = to_integers(samples, 16)
    sf.write(flac, integers.T, rate, "PCM_16", format="FLAC")
    if form == "flac":
        return flac.getvalue(), clipped
    words = f"-i - -c:a libopus -b:a {OPUS_RATE}k -map_metadata -1 -f opus -".split()
    return run_program("ffmpeg", *words, stdin=flac.getvalue()).stdout, clipped


def read_audio(path: Path) -> np.ndarray:
    """Read a wav or flac file as (2, T) float32; mono is doubled.

    Raises:
        UserError: it cannot be read.
    """
    try:
        samples, _ = sf.read(os.fsencode(path), dtype="float32", always_2d=True)
    except (OSError, sf.LibsndfileError):
        raise UserError(f"{path}: {describe_fault(path)}") from None
    return np.array(np.broadcast_to(samples.T[:CHANNELS], (CHANNELS, len(samples))), order="C")
