"""Read the sound of any file that ffmpeg reads, block by block."""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from local.tools.command_line import UserError
from local.tools.ffmpeg import last_line, run_program

BLOCK = 2**16  # samples at a time
# The duration in the header of these formats is exact. In others, frames are padded at both ends.
LOSSLESS = re.compile("pcm_.*|flac|alac|tta|wavpack")
PADDING = 4000  # samples, at least
ESTIMATED = "Estimating duration from bitrate"  # says ffprobe where a header has no duration
DECODE = ["ffmpeg", "-nostdin", "-loglevel", "error", "-err_detect", "crccheck"]
# What ffmpeg says of bytes between or after frames that are none, such as tags.
NO_AUDIO = ("Header missing", "Error parsing the packet header", "Error while decoding stream")
TIME_STAMPS = "non monotonically increasing dts"  # raw samples have none


class SongReader:
    """The sound of a file: mono, or stereo, to which more channels are mixed down.

    Attributes:
        rate: in Hz.
        channels: 1 or 2.
        expected: the length in samples by the header; None where it has none.
        length: samples read so far.
        damage: what is missing or wrong, known at the end of `read_blocks`; "" for nothing.
        note: bytes that were no sound, where it is not known whether any is missing; or "".

    Raises:
        UserError: ffmpeg cannot read the file, or it holds no sound.
    """

    def __init__(self, path: Path):
        self.source = f"file:{path}"  # with the protocol, a name may hold colons
        entries = "stream=codec_type,codec_name,sample_rate,channels,start_time,duration"
        entries += ":stream_disposition=attached_pic"
        probed = run_program(
            *("ffprobe", "-loglevel", "warning", "-i", self.source),
            *("-show_entries", entries, "-of", "json"),
        )
        streams = json.loads(probed.stdout).get("streams", [])
        sound = next((one for one in streams if one.get("codec_type") == "audio"), {})
        rate, self.channels = sound.get("sample_rate", ""), min(sound.get("channels", 0), 2)
        if not rate.isdecimal() or not int(rate) or not self.channels:
            raise UserError("holds no audio")
        self.rate, self.length, self.damage, self.note = int(rate), 0, "", ""
        self._silence = round(_find_delay(streams, sound) * self.rate)
        self._slack = (
            0.001 if LOSSLESS.fullmatch(sound.get("codec_name", "")) else PADDING / self.rate
        )
        is_known = "duration" in sound and ESTIMATED not in probed.stderr.decode(errors="replace")
        self._seconds = float(sound["duration"]) if is_known else None
        self.expected = self._silence + round(self._seconds * self.rate) if is_known else None

    def read_blocks(self) -> Iterator[np.ndarray]:
        """Read all that can be read. Sound that starts later than the picture begins with silence.

        Shape:
            - blocks: (T, channels), float32, of at most BLOCK samples

        Raises:
            UserError: ffmpeg cannot read the file, or it holds no sound, NaN or infinity.
        """
        for start in range(0, self._silence, BLOCK):
            size = min(BLOCK, self._silence - start)
            self.length += size
            yield np.zeros((size, self.channels), np.float32)
        # Else ffmpeg mixes channels down without normalising float samples, and they clip.
        mix = ["-ac", str(self.channels), "-rematrix_maxval", "1.0"]
        command = [*DECODE, "-i", self.source, "-map", "0:a:0", *mix, "-f", "f32le", "-"]
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
        ):
            try:
                while samples := process.stdout.read(BLOCK * 4 * self.channels):
                    block = np.frombuffer(samples, np.float32).reshape(-1, self.channels)
                    if not np.isfinite(block).all():
                        seconds = self.length / self.rate
                        raise UserError(f"holds NaN or infinity after {seconds:.1f} s")
                    self.length += len(block)
                    yield block
                status = process.wait()
            finally:
                process.kill()
            errors.seek(0)
            self._check_end(status, errors.read())

    def _check_end(self, status: int, errors: bytes) -> None:
        if b"Rematrix is needed" in errors:
            raise UserError("ffmpeg knows no way to mix its channels to stereo; mix it to stereo")
        if status:
            raise UserError(f"ffmpeg cannot read it: {last_line(errors) or f'status {status}'}")
        if self.length == self._silence:
            raise UserError("holds no audio")
        read = (self.length - self._silence) / self.rate
        if self._seconds is not None and read < self._seconds - self._slack:
            self.damage = f"{self._seconds - read:.2f} s of its {self._seconds:.2f} s are missing"
            return
        if self._seconds is not None and errors:  # those after the sound do not matter
            errors = self._find_errors(self._seconds - self._slack)
        lines = errors.decode(errors="replace").splitlines()
        lines = [line for line in lines if TIME_STAMPS not in line]
        telling = [line for line in lines if not any(words in line for words in NO_AUDIO)]
        if telling or (lines and self._seconds is not None):
            self.damage = (telling or lines)[-1]
        elif lines:
            self.note = "holds bytes that are no audio, which ffmpeg skipped"

    def _find_errors(self, seconds: float) -> bytes:
        """Return what ffmpeg says of the first seconds alone."""
        command = [*DECODE, "-t", f"{seconds:.6f}", "-i", self.source, "-map", "0:a:0"]
        return subprocess.run([*command, "-f", "null", "-"], capture_output=True).stderr


def _find_delay(streams: list[dict], sound: dict) -> float:
    """Return by how many seconds the sound starts later than the picture.

    A cover is no picture here, and without one a start is that of the encoder.
    """
    starts = [
        float(one["start_time"])
        for one in streams
        if one.get("codec_type") == "video"
        and not one.get("disposition", {}).get("attached_pic")
        and "start_time" in one
    ]
    if not starts or "start_time" not in sound:
        return 0.0
    return max(0.0, float(sound["start_time"]) - min(starts))
