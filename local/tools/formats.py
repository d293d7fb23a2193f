"""The formats of sound files that commands write, and the flags that choose one."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from local.tools.ffmpeg import list_encoders


class Format(NamedTuple):
    """What files of a format hold, and who encodes it: libsndfile, or ffmpeg where it cannot.

    Attributes:
        suffix: of the files' names.
        bits: of a sample that is an integer; None for formats without full scale.
        rates: those that the format has, in Hz.
        subtype, settings: soundfile's name of how samples are encoded, and how well; "" for ffmpeg.
        encoder, options: ffmpeg's name of its encoder, and how well it encodes; "" for libsndfile.
    """

    suffix: str
    bits: int | None
    rates: Sequence[int]
    subtype: str = ""
    settings: Mapping[str, object] = {}
    encoder: str = ""
    options: str = ""

    def find_rate(self, rate: int) -> int:
        """Return the nearest rate that the format has, the higher of two that are equally near."""
        if rate in self.rates:
            return rate
        return min(self.rates, key=lambda other: (abs(other - rate), -other))


MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
RATES = {
    "wav": range(1, 2**31),
    "flac": (*range(1, 2**16), *range(2**16 + 4, 655351, 10)),  # above 16 bits, tens of Hz
    "mp3": MPEG_RATES,
    "m4a": (7350, *MPEG_RATES, 64000, 88200, 96000),
    "opus": (48000,),  # what every decoder gives
}
BEST_MP3 = {"bitrate_mode": "CONSTANT", "compression_level": 0}  # 320 kbit/s
# In whole frames: by the header, whose times are in ms, ffmpeg would drop a short last one.
BEST_M4A = "-b:a 320k -af asetnsamples=1024 -f ipod"
FORMATS = {
    "wav16": Format("wav", 16, RATES["wav"], "PCM_16"),
    "wav24": Format("wav", 24, RATES["wav"], "PCM_24"),
    "float32": Format("wav", None, RATES["wav"], "FLOAT"),
    "flac16": Format("flac", 16, RATES["flac"], "PCM_16"),
    "flac24": Format("flac", 24, RATES["flac"], "PCM_24"),
    # Not by ffmpeg, whose files say too little of their padding, and are up to 47 samples longer.
    "mp3": Format("mp3", None, RATES["mp3"], "MPEG_LAYER_III", BEST_MP3),
    "m4a": Format("m4a", None, RATES["m4a"], encoder="aac", options=BEST_M4A),
    "opus": Format("opus", None, RATES["opus"], encoder="libopus", options="-b:a 256k -f opus"),
}


def add_format_flags(parser: ArgumentParser) -> None:
    """Add --format and --float32."""
    parser.add_argument("--format", choices=FORMATS, help="of the files that are written [wav16]")
    parser.add_argument("--float32", action="store_true", help="the same as --format float32")


def choose_format(args: Namespace) -> str:
    """Return the format that the flags of `add_format_flags` choose."""
    return args.format or ("float32" if args.float32 else "wav16")


def find_format_faults(args: Namespace) -> list[str]:
    """Return what is wrong with the flags of `add_format_flags`, a line each, and who cannot encode
    the format that they choose.
    """
    import soundfile as sf

    name, faults = choose_format(args), []
    form = FORMATS[name]
    if args.float32 and name != "float32":
        faults.append(f"--float32 means --format float32; omit it, or --format {name}")
    if form.encoder and shutil.which("ffmpeg") and form.encoder not in list_encoders():
        fault = f"ffmpeg here has no encoder {form.encoder}; install one that has, as Debian's"
        faults.append(f"--format {name}: {fault}, or choose another format")
    if form.subtype and form.suffix.upper() not in sf.available_formats():
        fault = f"libsndfile here writes no {form.suffix}; install soundfile by pip, which brings"
        faults.append(f"--format {name}: {fault} one that does, or choose another format")
    return faults
