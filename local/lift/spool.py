"""Estimates on a disk between the two passes over a song, so that songs of any length fit."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from local.songs.read import BLOCK, SongReader
from local.tools.command_line import UserError


class Spool:
    """Vocals and accompaniment in a file, to be read again.

    Shape:
        - all blocks: (channels, T)
    """

    def __init__(self, file: BinaryIO, channels: int):
        self._file, self._channels = file, channels

    def write(self, vocals: np.ndarray, accompaniment: np.ndarray) -> None:
        pair = np.concatenate([vocals, accompaniment]).astype(np.float32)
        self._file.write(pair.T.tobytes())

    def read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self._file.seek(0)
        while samples := self._file.read(BLOCK * 8 * self._channels):
            pair = np.frombuffer(samples, np.float32).reshape(-1, 2 * self._channels).T
            yield pair[: self._channels], pair[self._channels :]


@contextmanager
def open_spool(out: Path, reader: SongReader) -> Iterator[Spool]:
    """A file in OUT without a name, so that nothing of it remains however the command ends.

    Raises:
        UserError: there is no space for it.
    """
    needed, free = 8 * reader.channels * (reader.expected or 0), shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"--out: {out} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed for"
            " the estimates of this song"
        )
    with tempfile.TemporaryFile(dir=out) as file:
        yield Spool(file, reader.channels)
