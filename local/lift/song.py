"""A song whose lyrics are lifted: separated once, and remixed at each alpha in a second pass."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from local.estimates import EstimateWriter
from local.lift.listener import BYTES, Listener
from local.lift.mixture import Mixture, find_gain, measure_song
from local.lift.remixer import Remixer
from local.lift.spool import open_spool
from local.musdb18_tracks import TARGETS
from local.songs.batch import writing_to
from local.songs.read import SongReader
from local.songs.record import is_made, plan_record, save_record
from local.songs.separation import SongSeparation
from local.tools.command_line import UserError
from local.tools.formats import choose_format
from local.tools.memory import free_memory


def enhance_song(
    model: nn.Module,
    song: Path,
    folder: Path,
    args: Namespace,
    title: str,
    settings: dict,
    listener: Listener | None = None,
) -> bool:
    """Write the remixes of a song, with its length, sampling rate and number of channels (or two,
    for a listener), and what made them: see `songs.record`.

    Args:
        args: of the flags of local.enhance.
        settings: what the remixes depend on beside the song.

    Returns:
        whether they were not there yet.

    Raises:
        UserError: see `separate.separate_song`; or no space is left for the estimates.
    """
    names = name_remixes(args.alpha)
    files = [*names, *(TARGETS if args.save_estimates else ())]
    form = choose_format(args)
    record = plan_record(song, settings, form)
    if is_made(folder, files, record, args.overwrite):
        return False
    reader = SongReader(song)
    if listener and reader.expected:
        check_compressor_memory(reader.expected)
    mixture = Mixture(reader, keep=args.consistent)
    if args.lufs is not None:
        mixture.gain = find_gain(measure_song(song), args.lufs, title)
    separation = SongSeparation(model, reader, args, title, mixture.read_blocks())
    how = title, reader.rate, reader.channels, listener, args.clip
    remixers = {name: Remixer(a, *how) for name, a in zip(names, args.alpha, strict=True)}
    with writing_to(folder), open_spool(args.out, reader) as spool:
        for pair in read_estimates(separation, mixture if args.consistent else None):
            spool.write(*pair)
            for remixer in remixers.values():
                remixer.measure(*pair)
        if args.lufs is None:
            for remixer in remixers.values():
                remixer.level(mixture.loudness)
        channels = 2 if listener else reader.channels
        with EstimateWriter(folder, reader.rate, channels, form, files) as writer:
            for name, remixer in remixers.items():
                for block in remixer.make(spool):
                    writer.write({name: block})
            for pair in spool.read() if args.save_estimates else ():
                writer.write(dict(zip(TARGETS, pair, strict=True)))
        save_record(folder, record | {"damage": reader.damage or ""})
    separation.report_end()
    return True


def name_remixes(alphas: Sequence[float]) -> list[str]:
    return ["remix"] if len(alphas) == 1 else [f"remix_{alpha:g}" for alpha in alphas]


def read_estimates(
    separation: SongSeparation, mixture: Mixture | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Vocals and accompaniment (channels, T), the latter as what the vocals leave of a mixture."""
    for estimates in separation.read():
        vocals, accompaniment = (estimates[target] for target in TARGETS)
        if mixture:
            accompaniment = mixture.take(vocals.shape[-1]) - vocals
        yield vocals, accompaniment


def check_compressor_memory(samples: int) -> None:
    """Raise a UserError where the compressor would take more memory than there is."""
    needed, free = BYTES * samples, free_memory()
    if needed > free:
        raise UserError(
            f"--listener needs the whole song in memory, about {needed / 1e9:.1f} GB, and"
            f" {free / 1e9:.1f} GB are free; cut the song"
        )
