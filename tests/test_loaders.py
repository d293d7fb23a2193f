import os
import threading
import warnings
from collections import namedtuple

import pytest
import torch
from conftest import RATE, TINY_RUN
from torch.utils.data import DataLoader

import train
from local.config import parse_conf
from local.musdb18_dataset import TrackDataset
from local.musdb18_tracks import DatasetError, find_tracks
from local.train import loaders
from local.train.loaders import TrackLoader, find_shared_memory_faults
from local.train.quiet import WARNINGS

Usage = namedtuple("Usage", "free")


@pytest.mark.smoke
@pytest.mark.parametrize("readers", [0, 1, 3, 9])
def test_whole_tracks_are_those_of_the_data_set_in_its_order(corpus, readers):
    dataset = TrackDataset(find_tracks(corpus, "train", RATE))
    loader = TrackLoader(dataset, readers)
    for _ in range(2):
        for found, expected in zip(loader, dataset, strict=True):
            for batch, part in zip(found, expected, strict=True):
                assert torch.equal(batch, part[None])
                assert not batch.is_shared()


@pytest.mark.parametrize("readers", [0, 1, 3])
def test_no_more_tracks_are_read_ahead_than_there_are_readers(readers):
    class Counting:
        started = 0

        def __len__(self):
            return 9

        def __getitem__(self, index):
            self.started += 1
            return torch.zeros(2, 4), torch.zeros(2, 2, 4)

    dataset = Counting()
    for number, _ in enumerate(TrackLoader(dataset, readers), start=1):
        assert dataset.started <= number + readers
    assert dataset.started == 9


def test_a_loop_that_is_broken_off_leaves_no_readers(corpus):
    before = threading.active_count()
    tracks = iter(TrackLoader(TrackDataset(find_tracks(corpus, "train", RATE)), 3))
    next(tracks)
    assert threading.active_count() > before
    tracks.close()
    assert threading.active_count() == before


def test_a_fault_is_raised_where_its_track_is_due(own_corpus):
    tracks = find_tracks(own_corpus, "train", RATE)
    tracks[1].path("bass").unlink()
    loaded = iter(TrackLoader(TrackDataset(tracks), 3))
    next(loaded)
    with pytest.raises(DatasetError, match=f"{tracks[1].path('bass')}: cannot be read"):
        next(loaded)


def test_more_workers_than_cores_are_no_warning():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        DataLoader([0], num_workers=os.cpu_count() + 1)
    assert shown == []


def make_conf(*flags) -> dict:
    return parse_conf([*TINY_RUN, "--segment", "5", "--sample_rate", "44100", *flags])


def test_room_for_what_workers_read_ahead(monkeypatch):
    """At the published settings 8 batches of 21 MB wait, and another is in use."""
    whole = 9 * 4 * 3 * 2 * 220_500 * 4
    assert 170e6 < whole < 200e6
    monkeypatch.setattr(loaders, "disk_usage", lambda _: Usage(64 << 20))
    (fault,) = find_shared_memory_faults(make_conf("--num_workers", "4"), processes=1)
    for words in ("--num_workers 4: ", "190.5 MB", "67.1 MB", "--num_workers 0", "--shm-size"):
        assert words in fault
    assert find_shared_memory_faults(make_conf("--num_workers", "0"), processes=8) == []
    monkeypatch.setattr(loaders, "disk_usage", lambda _: Usage(whole))
    assert find_shared_memory_faults(make_conf("--num_workers", "4"), processes=1) == []
    for more in (["--C", "4", "--mix_background", "no"], ["--batch_size", "5"]):
        assert find_shared_memory_faults(make_conf("--num_workers", "4", *more), processes=1)
    assert find_shared_memory_faults(make_conf("--num_workers", "4"), processes=2)
    assert find_shared_memory_faults(make_conf("--num_workers", "5"), processes=1)


def test_shared_memory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "SHARED_MEMORY", tmp_path / "gone")
    (fault,) = find_shared_memory_faults(make_conf("--num_workers", "4"), processes=1)
    assert "gone, which cannot be written; use 0" in fault


def test_a_check_says_that_shared_memory_is_small(corpus, tmp_path, error_of, monkeypatch):
    monkeypatch.setattr(loaders, "disk_usage", lambda _: Usage(100_000))
    flags = ["--exp_dir", tmp_path / "run", "--root", corpus, *TINY_RUN, "--num_workers", "2"]
    assert "--num_workers 2: " in error_of(train.main, *flags, "--check")
    assert list(tmp_path.iterdir()) == []
