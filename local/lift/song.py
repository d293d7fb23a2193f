"""A song whose lyrics are lifted: separated once, and remixed at each alpha in a second pass."""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from local.estimates import EstimateWriter
from local.lift.listener import BYTES, Listener
from local.lift.mixture import Mixture, find_gain, measure_song
from local.lift.remix import Remix, find_peak
from local.lift.spool import Spool, open_spool
from local.musdb18_tracks import TARGETS
from local.songs.batch import writing_to
from local.songs.read import SongReader
from local.songs.record import is_made, plan_record, save_record
from local.songs.separation import SongSeparation
from local.tools.command_line import UserError
from local.tools.memory import free_memory
from local.tools.progress import report

FULL_SCALE = 1 - 2**-15  # the greatest sample of 16 bits


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
    record = plan_record(song, settings, args.float32)
    if is_made(folder, [f"{file}.wav" for file in files], record, args.overwrite):
        return False
    reader = SongReader(song)
    mixture = Mixture(reader, keep=args.consistent)
    if args.lufs is not None:
        mixture.gain = find_gain(measure_song(song), args.lufs, title)
    if listener and reader.expected:
        check_compressor_memory(reader.expected)
    separation = SongSeparation(model, reader, args, title, mixture.read_blocks())
    remixes = [Remix(alpha, reader.rate, reader.channels) for alpha in args.alpha]
    form = reader.rate, 2 if listener else reader.channels, args.float32
    with writing_to(folder), open_spool(args.out, reader) as spool:
        for estimates in separation.read():
            vocals, accompaniment = (estimates[target] for target in TARGETS)
            if args.consistent:
                accompaniment = mixture.take(vocals.shape[-1]) - vocals
            spool.write(vocals, accompaniment)
            for remix in remixes:
                remix.measure(vocals, accompaniment)
        if args.lufs is None:
            for remix in remixes:
                name = f"{title}: alpha {remix.alpha:g}"
                remix.gain = find_gain(remix.loudness, mixture.loudness, name)
        with EstimateWriter(folder, *form, files) as writer:
            for name, remix in zip(names, remixes, strict=True):
                for block in finish(remix, spool, reader.rate, listener, args.clip, title):
                    writer.write({name: block})
            for pair in spool.read() if args.save_estimates else ():
                writer.write(dict(zip(TARGETS, pair, strict=True)))
        save_record(folder, record | {"damage": reader.damage or ""})
    separation.report_end()
    return True


def name_remixes(alphas: Sequence[float]) -> list[str]:
    return ["remix"] if len(alphas) == 1 else [f"remix_{alpha:g}" for alpha in alphas]


def finish(
    remix: Remix,
    spool: Spool,
    rate: int,
    listener: Listener | None,
    clip: bool,
    title: str,
) -> Iterator[np.ndarray]:
    """The blocks (channels, T) of a remix, within full scale."""
    blocks, peak = (remix.make(*pair) for pair in spool.read()), remix.peak
    if listener:
        blocks = [listener.compress(np.concatenate(list(blocks), axis=-1), rate)]
        peak = find_peak(blocks[0])
    excess = max(1.0, peak / FULL_SCALE)
    if excess > 1:
        decibels = f"{20 * math.log10(excess):.1f} dB"
        done = f"clipped, by up to {decibels}" if clip else f"turned down by {decibels}"
        report(f"{title}: alpha {remix.alpha:g}: {done}, to full scale")
    for block in blocks:
        yield block.clip(-1, FULL_SCALE) if clip else block / excess


def check_compressor_memory(samples: int) -> None:
    needed, free = BYTES * samples, free_memory()
    if needed > free:
        raise UserError(
            f"--listener needs the whole song in memory, about {needed / 1e9:.1f} GB, and"
            f" {free / 1e9:.1f} GB are free; cut the song"
        )
