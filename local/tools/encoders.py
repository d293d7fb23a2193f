"""Files that libsndfile or ffmpeg encodes, written block by block."""

import errno
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import soundfile as sf

from local.tools.ffmpeg import last_line
from local.tools.formats import Format
from local.tools.wav import call

LAST = 2**16  # bytes, more than libsndfile keeps until it closes a file


class SoundFileWriter:
    """A file that libsndfile encodes.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, rate: int, channels: int, form: Format):
        self.path = path
        place, how = (os.fsencode(path), "w"), (form.subtype, None, form.suffix.upper())
        self.file = call(path, sf.SoundFile, *place, rate, channels, *how, **form.settings)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        call(self.path, self.file.close)
        if kind is None:
            self._check_room()

    def write(self, samples: np.ndarray) -> None:
        """Append samples (T, channels)."""
        call(self.path, self.file.write, samples)

    def _check_room(self) -> None:
        """Raise an OSError where the disk is full: libsndfile writes the last samples when it
        closes the file, and does not say if that fails.
        """
        with open(self.path, "ab") as file:
            size = file.tell()
            file.write(bytes(LAST))
            file.truncate(size)


class FfmpegWriter:
    """A file that ffmpeg encodes, from float32 samples in a pipe.

    Raises:
        OSError: the file cannot be written, or ffmpeg fails.
    """

    def __init__(self, path: Path, rate: int, channels: int, form: Format):
        raw = ["-f", "f32le", "-ar", str(rate), "-ac", str(channels), "-i", "pipe:"]
        coder = ["-c:a", form.encoder, *form.options.split()]
        command = ["ffmpeg", "-loglevel", "error", *raw, *coder, "-y", f"file:{path}"]
        self.folder, self.errors = path.parent, tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self.errors)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self._end()
        finally:
            self.process.kill()
            self.process.wait()
            with suppress(BrokenPipeError):
                self.process.stdin.close()
            self.errors.close()

    def write(self, samples: np.ndarray) -> None:
        """Append samples (T, channels)."""
        try:
            self.process.stdin.write(samples.astype("<f4").tobytes())
        except BrokenPipeError:
            self._end()

    def _end(self) -> None:
        """Let ffmpeg end the file. Its status is 0 where the disk is full at the very end."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        status = self.process.wait()
        self.errors.seek(0)
        words = last_line(self.errors.read())
        if status or words:
            reason = words.rpartition(": ")[2] or f"it ended with status {status}"
            raise OSError(errno.EIO, f"ffmpeg: {reason}", os.fspath(self.folder))
