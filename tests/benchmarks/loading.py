"""Training items, and the textbook's."""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.cases import RATE
from benchmarks.measuring import stopwatch
from benchmarks.options import count, seconds
from benchmarks.report import print_table

SOURCES = ("vocals", "bass", "drums", "other")
TRACKS, TRACK_SECONDS, BATCH, ROUNDS = 6, 20.0, 4, 5
COLUMNS = {
    "loader": ("loader", 14, ""),
    "workers": ("workers", 7, "d"),
    "page_cache": ("page cache", 10, ""),
    "items_per_s": ("items/s", 8, ".1f"),
    "per_core": ("per core", 8, ".1f"),
    "speed": ("speed x", 8, ".2f"),
}


def add_options(commands) -> None:
    parser = commands.add_parser("load", help="training items, and the textbook's")
    parser.set_defaults(run=run)
    parser.add_argument("--seconds", type=seconds, default=5.0, help="of an item [%(default)g]")
    parser.add_argument("--items", type=count, default=200, help="per worker [%(default)s]")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="[%(default)s]")


class TextbookItems:
    """What one writes first: float64 from soundfile, then tensor operations."""

    def __init__(self, tracks: list, length: int):
        self.tracks, self.length = tracks, length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        draws = torch.rand(4, 4, generator=random, dtype=torch.float64).tolist()
        stems = torch.stack([self.draw(*pair) for pair in zip(SOURCES, draws, strict=True)])
        targets = torch.stack([stems[0], stems[1:].sum(0)])
        return targets.sum(0), targets

    def draw(self, source: str, draws: list[float]) -> Tensor:
        import soundfile

        track = self.tracks[int(draws[0] * len(self.tracks))]
        start = int(draws[1] * (track.length - self.length))
        audio, _ = soundfile.read(
            track.path(source), start=start, stop=start + self.length, always_2d=True
        )
        audio = (0.25 + draws[2]) * torch.tensor(audio, dtype=torch.float32).T
        return audio.flip(0) if draws[3] < 0.5 else audio


class ColdItems:
    """Items whose files are dropped from the kernel's page cache before each batch.

    So they are read from the disk, as those of a data set that is larger than the memory.
    """

    def __init__(self, items, files: list[Path]):
        self.items, self.files = items, files

    def __getitem__(self, position):
        self.drop_files()
        return self.items[position]

    def __getitems__(self, positions: list):
        self.drop_files()
        if hasattr(self.items, "__getitems__"):
            return self.items.__getitems__(positions)
        return [self.items[position] for position in positions]

    def drop_files(self) -> None:
        for file in self.files:
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder), "train", TRACKS, max(TRACK_SECONDS, args.seconds))
        print(f"\nItems of {args.seconds:g} s; speed is relative to the textbook's. Where the page")
        print("cache is cold, files are read from the disk, unless they are in a tmpfs.")
        rows = print_table(COLUMNS, load_rows(Path(folder), args))
    return {"load": rows}


def write_noise(root: Path, split: str, tracks: int, seconds: float) -> None:
    import soundfile

    time = round(seconds * RATE)
    for track in range(tracks):
        folder = root / split / f"{track}"
        folder.mkdir(parents=True)
        mixture = 0
        for source in SOURCES:
            noise = torch.randint(-8000, 8000, (time, 2), dtype=torch.int16).numpy()
            soundfile.write(folder / f"{source}.wav", noise, RATE, "PCM_16")
            mixture = mixture + noise
        soundfile.write(folder / "mixture.wav", mixture, RATE, "PCM_16")


def load_rows(root: Path, args: argparse.Namespace) -> Iterator[dict]:
    from local.musdb18_dataset import SegmentDataset, keep_batch
    from local.musdb18_tracks import find_tracks
    from local.train.loaders import EpochSampler

    tracks, length = find_tracks(root, "train", RATE), round(args.seconds * RATE)
    dataset = SegmentDataset(tracks, length, -(-args.items * args.workers // len(tracks)))
    all_items = {"textbook": TextbookItems(tracks, length), "SegmentDataset": dataset}
    torch.set_num_threads(1)  # as in a worker
    os.sync()  # what is not written yet stays in the cache
    files = [path for track in tracks for path in track.paths()]
    cold_items = {name: ColdItems(items, files) for name, items in all_items.items()}
    for page_cache, chosen in {"warm": all_items, "cold": cold_items}.items():
        one_core = {
            name: lambda items=items: map(items.__getitem__, range(args.items))
            for name, items in chosen.items()
        }
        yield from compare_loaders(one_core, args.items, 0, page_cache)

        options = dict(batch_size=BATCH, num_workers=args.workers, persistent_workers=True)
        own = dict(sampler=EpochSampler(len(dataset)), collate_fn=keep_batch)
        loaders = {
            "textbook": DataLoader(chosen["textbook"], sampler=range(len(dataset)), **options),
            "SegmentDataset": DataLoader(chosen["SegmentDataset"], **own, **options),
        }
        items = BATCH * len(loaders["textbook"])
        starts = {name: loader.__iter__ for name, loader in loaders.items()}
        yield from compare_loaders(starts, items, args.workers, page_cache)


def compare_loaders(
    starts: dict[str, Callable], items: int, workers: int, page_cache: str
) -> Iterator[dict]:
    """A row per loader: the medians over rounds in which they take turns, after one to warm up."""
    times = {name: [] for name in starts}
    for _ in range(ROUNDS + 1):
        for name, start in starts.items():
            times[name].append(stopwatch("cpu", lambda start=start: sum(1 for _ in start()))[1])
    seconds = {name: statistics.median(found[1:]) for name, found in times.items()}
    for name, taken in seconds.items():
        yield {
            "loader": name,
            "workers": workers,
            "page_cache": page_cache,
            "items_per_s": items / taken,
            "per_core": items / taken / max(workers, 1),
            "speed": seconds["textbook"] / taken,
        }
