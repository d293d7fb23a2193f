from types import SimpleNamespace

import pytest
import torch
from conftest import RATE

from local.musdb18_dataset import SegmentDataset
from local.musdb18_tracks import find_tracks
from local.tools.memory import is_out_of_memory
from local.train.failures import (
    describe_lost_worker,
    is_lost_connection,
    is_out_of_shared_memory,
)

KILLED, UNABLE = "is killed by signal", "unable to allocate shared memory(shm) for file"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "connection"),
        (RuntimeError("NCCL communicator was aborted on rank 1."), "connection"),
        (RuntimeError("writev [::1]:1: Broken pipe"), "connection"),
        (RuntimeError(f"DataLoader worker (pid 7) {KILLED}: Bus error. It is possible"), "shared"),
        (RuntimeError(f"{UNABLE} </torch_1_2_0>: No space left on device (28)"), "shared"),
        (RuntimeError(f"DataLoader worker (pid 7) {KILLED}: Killed. "), None),
        (RuntimeError("out of resource: shared memory, Required: 262144"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
    ids=str,
)
def test_errors_are_classified(error, kind):
    found = {
        "memory": is_out_of_memory(error),
        "connection": is_lost_connection(error),
        "shared": is_out_of_shared_memory(error),
    }
    assert [name for name, is_found in found.items() if is_found] == ([kind] if kind else [])


def test_a_lost_worker_is_known_by_its_number(corpus, monkeypatch):
    tracks = find_tracks(corpus, "train", RATE)
    dataset = SegmentDataset(tracks, RATE)
    system = SimpleNamespace(train_loader=SimpleNamespace(dataset=dataset))
    worker = SimpleNamespace(id=1)
    monkeypatch.setattr("local.musdb18_dataset.get_worker_info", lambda: worker)
    monkeypatch.setattr("os.getpid", lambda: 4242)
    dataset.reading.note(3, 2)
    path = tracks[3].path("drums")
    for words in (
        "DataLoader worker (pid 4242) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 17, 4242) exited unexpectedly",
    ):
        assert f"ended while it read {path};" in describe_lost_worker(RuntimeError(words), system)
    unknown = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")
    assert describe_lost_worker(unknown, system).startswith("a worker of a loader ended: Data")
    assert describe_lost_worker(RuntimeError("another"), system) == ""
