"""A song on its way through a model: read, separated, and given its rate and channels again."""

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from local.estimates import list_settings, list_targets, progress_bar
from local.inference import separate_blocks
from local.needs import advise_on_memory, separation_bytes
from local.songs.convert import read_mixture, restore
from local.songs.read import SongReader
from local.tools.command_line import UserError
from local.tools.memory import free_memory
from local.tools.progress import report


class SongSeparation:
    """The estimates of a song.

    Args:
        args: of the flags of `add_method_flags`.
        blocks: what is separated: those of the reader, or made of them.

    Raises:
        UserError: memory is too small.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: SongReader,
        args: Namespace,
        title: str,
        blocks: Iterable[np.ndarray] | None = None,
    ):
        self._model, self._reader, self._args, self._title = model, reader, args, title
        blocks = reader.read_blocks() if blocks is None else blocks
        self._mixture = read_mixture(blocks, reader, model.samplerate)
        seconds = reader.expected / reader.rate if reader.expected else math.inf
        if args.method == "full":
            self._mixture = [torch.cat(list(self._mixture), dim=-1)]
            seconds = self._mixture[0].shape[-1] / model.samplerate
        memory = check_memory(model, seconds, args)
        if args.method == "full":
            report(f"{title}: {memory}")

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        """Target -> (channels, T), block by block, showing progress.

        Raises:
            UserError: the song cannot be read, or an estimate holds NaN or infinity.
        """
        reader, rate, targets = self._reader, self._model.samplerate, list_targets(self._model)
        samples = reader.expected and round(reader.expected * rate / reader.rate)
        with progress_bar(self._title, samples, rate) as bar:
            settings = list_settings(self._args, bar.update)
            blocks = separate_blocks(self._model, self._mixture, *settings)
            yield from restore(blocks, targets, rate, reader)

    def report_end(self) -> None:
        """Says what was wrong with the song, once all is read and written.

        Raises:
            UserError: it could be read only in part.
        """
        if self._reader.note:
            report(f"{self._title}: {self._reader.note}")
        if self._reader.damage:
            raise UserError(f"damaged; separated what ffmpeg could read: {self._reader.damage}")


def check_memory(model: nn.Module, seconds: float, args: Namespace) -> str:
    """Return what memory the separation of a song needs, and finds.

    Raises:
        UserError: that is too little.
    """
    in_blocks = args.method != "full"
    needed, free = separation_bytes(model, seconds, args, in_blocks), free_memory()
    memory = f"about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB free"
    if needed > free:
        raise UserError(f"--method {args.method} needs {memory}{advise_on_memory(args)}")
    return f"--method {args.method} needs {memory}"
