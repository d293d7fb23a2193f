"""The audio files of the page, and how large they get."""

import os
from pathlib import Path

import numpy as np
import soundfile as sf

from local.tools.command_line import UserError
from local.tools.formats import FORMATS, RATES, Format
from local.tools.sound_files import describe_fault
from local.tools.sound_writer import SoundWriter
from local.tools.wav import to_integers

OPUS_RATE = 128  # kbit/s
CHANNELS = 2
FORMS = {  # of AUDIO_FORMATS
    "flac": FORMATS["flac16"],
    "opus": Format(
        "opus", None, RATES["opus"], encoder="libopus", options=f"-b:a {OPUS_RATE}k -f opus"
    ),
}
# Chromium hangs after a seek into the third block from the end of FLAC, of 4096 samples each.
LAST_BLOCKS = 4 * 4096  # samples, into which the page does not seek


def most_bytes(seconds: float, rate: int, form: str) -> float:
    """Return what a stereo file takes at most; FLAC takes about half of that for music."""
    flac = seconds * rate * CHANNELS * 2
    return flac if form == "flac" else seconds * OPUS_RATE * 1000 / 8 * 1.1


def write_samples(path: Path, samples: np.ndarray, rate: int, form: str) -> int:
    """Write samples (channels, T) as a file of AUDIO_FORMATS, and return how many were clipped.

    Both formats are made of 16 bits.

    Raises:
        OSError: the file cannot be written, or ffmpeg has no Opus.
    """
    integers, clipped = to_integers(samples, 16)
    with SoundWriter(path, rate, len(samples), FORMS[form]) as file:
        file.write(integers.T / np.float32(2**15))
    return clipped


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
