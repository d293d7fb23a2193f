import dataclasses
import math
import multiprocessing
import os
import signal
import time
from collections import namedtuple
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import RATE, ROOT, make_record, run_python, write_track
from test_scoring import make_estimates
from threadpoolctl import threadpool_info

from local.eval.jobs import choose_jobs, choose_threads
from local.eval.pool import ScoringPool, remove_estimates
from local.eval.score_files import load_track
from local.eval.scoring import score_track
from local.eval.tracks import open_test_set
from local.musdb18_tracks import Track


def make_out(tmp_path: Path) -> Path:
    (tmp_path / "out" / "test").mkdir(parents=True)
    return tmp_path / "out"


def test_a_pool_scores_what_one_process_would(corpus, tmp_path, capsys):
    out, tracks = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    with ScoringPool(out, 2, "bsseval") as pool:
        for track in tracks:
            pool.submit(track, make_estimates(track), make_record())
        scored, failures = pool.finish()
    assert failures == {}
    printed = capsys.readouterr().out
    for track in tracks:
        text = (out / "test" / f"{track.name}.json").read_text()
        assert text == score_track(track, make_estimates(track))[0].json
        (found,) = (found for found in scored if found.name == track.name)
        assert found.record == load_track(out, track.name).record
        assert f"{track.name}: SDR vocals " in printed
    assert [path.name for path in out.iterdir()] == ["test"]


def test_a_track_that_cannot_be_scored_leaves_the_others(corpus, tmp_path, capsys):
    out = make_out(tmp_path)
    loud, quiet = open_test_set(corpus, RATE, "wav")
    for _ in range(2):  # the second time, the failure removes the scores of the first time
        with ScoringPool(out, 1, "bsseval") as pool:
            for track in (quiet, loud):
                pool.submit(track, make_estimates(track), make_record())
            pool.finish()
        estimates = make_estimates(quiet)
        estimates["vocals"][:] = 0
        with ScoringPool(out, 1, "bsseval") as pool:
            pool.submit(quiet, estimates, make_record())
            pool.submit(loud, make_estimates(loud), make_record())
            scored, failures = pool.finish()
        assert [track.name for track in scored] == [loud.name]
        assert list(failures) == [quiet.name]
        assert f"{quiet.name}: not scored: an entire estimate is silent" in capsys.readouterr().err
        assert {path.stem for path in (out / "test").iterdir()} == {loud.name}


def test_a_process_takes_one_core(tmp_path):
    with ScoringPool(make_out(tmp_path), 1, "bsseval") as pool:
        libraries = pool.processes.submit(threadpool_info).result()
    assert {library["num_threads"] for library in libraries} == {1}


def kill_a_process(pool: ScoringPool) -> None:
    """As the kernel does where memory runs out."""
    deadline = time.monotonic() + 60
    while not pool.processes._processes and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(next(iter(pool.processes._processes)), signal.SIGKILL)


@dataclass(frozen=True)
class FatalTrack(Track):
    """A track whose scoring takes all memory: the kernel kills its process, but not this one."""

    main: int = 0
    times: Path | None = None  # a file, where it happens but once

    def read_file(self, *args):
        if os.getpid() != self.main and not (self.times and self.times.exists()):
            if self.times:
                self.times.touch()
            self.end()
        return super().read_file(*args)

    def end(self):
        os.kill(os.getpid(), signal.SIGKILL)


class GreedyTrack(FatalTrack):
    """One whose scoring is told that there is no memory, as under `ulimit`."""

    def end(self):
        np.empty(2**45)


def as_kind(kind: type, track: Track, times: Path | None = None) -> Track:
    fields = track.place, track.rate, track.length, track.stems
    return kind(*fields, main=os.getpid(), times=times)


@pytest.mark.parametrize(("kind", "jobs"), [(FatalTrack, 1), (FatalTrack, 3), (GreedyTrack, 2)])
def test_a_track_that_takes_all_memory_costs_itself_only(kind, jobs, tmp_path, capsys):
    for number in range(5):
        write_track(tmp_path / "test" / f"T{number}", seconds=1 + 0.2 * number, seed=number)
    tracks, out = open_test_set(tmp_path, RATE, "wav"), make_out(tmp_path)
    tracks[1] = as_kind(kind, tracks[1])
    with ScoringPool(out, jobs, "museval") as pool:
        for track in tracks:
            pool.submit(track, make_estimates(track), make_record())
        scored, failures = pool.finish()
    assert sorted(track.name for track in scored) == ["T0", "T2", "T3", "T4"]
    assert list(failures) == ["T1"]
    assert "out of memory" in failures["T1"]
    assert "--scorer bsseval" in failures["T1"]
    printed = capsys.readouterr()
    assert f"T1: not scored: {failures['T1']}" in printed.err
    for track in scored:
        assert load_track(out, track.name).record == track.record
        assert printed.out.count(f"{track.name}: SDR vocals ") == 1
    assert [path.name for path in out.iterdir()] == ["test"]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("kind", [FatalTrack, GreedyTrack])
def test_a_track_that_only_lacks_memory_beside_others_is_scored_in_the_end(kind, corpus, tmp_path):
    out, tracks = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    tracks[0] = as_kind(kind, tracks[0], times=tmp_path / "once")
    with ScoringPool(out, 2, "bsseval") as pool:
        for track in tracks:
            pool.submit(track, make_estimates(track), make_record())
        scored, failures = pool.finish()
    assert (tmp_path / "once").exists()
    assert failures == {}
    assert {track.name for track in scored} == {track.name for track in tracks}


def test_a_pool_goes_on_after_a_process_was_killed_while_it_had_nothing_to_do(corpus, tmp_path):
    out, tracks = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    with ScoringPool(out, 2, "bsseval") as pool:
        for track in tracks:
            pool.submit(track, make_estimates(track), make_record())
            if track == tracks[0]:
                wait(pool.waiting)
                kill_a_process(pool)
        scored, failures = pool.finish()
    assert failures == {}
    assert {track.name for track in scored} == {track.name for track in tracks}


GB = 10**9


def limit_memory(monkeypatch, free: float) -> None:
    """As the limit of a container does."""
    for module in ("jobs", "pool"):
        monkeypatch.setattr(f"local.eval.{module}.shared_memory", lambda: free)


def test_a_track_is_refused_where_its_separation_or_scoring_does_not_fit(
    corpus, tmp_path, monkeypatch
):
    out, (track, _) = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    long = dataclasses.replace(track, length=3600 * RATE)
    with ScoringPool(out, 1, "museval") as pool:
        limit_memory(monkeypatch, 2 * GB)
        pool.wait_for_memory(track, 1.9 * GB)
        with pytest.raises(MemoryError, match=r"2\.10 GB of memory, and 2\.00 are free"):
            pool.wait_for_memory(track, 2.1 * GB)
        with pytest.raises(ValueError, match=r"scoring needs about 61\.65 GB.*--scorer bsseval"):
            pool.wait_for_memory(long, 1.9 * GB)


def test_a_separation_waits_until_others_are_scored(corpus, tmp_path, monkeypatch):
    out, tracks = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    processes = []
    monkeypatch.setattr("multiprocessing.active_children", lambda: processes)
    with ScoringPool(out, 2, "bsseval") as pool:
        limit_memory(monkeypatch, 1.1 * GB)
        for track in tracks:
            pool.wait_for_memory(track, 0.9 * GB)  # beside the other's scoring it would not fit
            assert not pool.waiting
            pool.submit(track, make_estimates(track), make_record())
            pool.wait_for_memory(track, 0.5 * GB)
            assert pool.waiting
        processes += 9 * [SimpleNamespace(pid=os.getpid())]  # these take what it needs already
        pool.wait_for_memory(track, 0.9 * GB)
        assert pool.waiting
        assert len(pool.finish()[0]) == 2


def test_what_was_killed_is_not_tried_again_where_it_does_not_fit(corpus, tmp_path, monkeypatch):
    out, tracks = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    times = tmp_path / "once"
    with ScoringPool(out, 1, "bsseval") as pool:
        limit_memory(monkeypatch, 0.1 * GB)
        for track in (as_kind(FatalTrack, tracks[0], times), tracks[1]):
            pool.submit(track, make_estimates(track), make_record())
        scored, failures = pool.finish()
    assert [track.name for track in scored] == [tracks[1].name]
    assert "its scoring needs about 0.45 GB" in failures[tracks[0].name]


def test_an_interrupt_does_not_stop_the_imports_of_the_fork_server(corpus, tmp_path):
    """Ctrl-C during the imports of the fork server does not stop it."""
    (tmp_path / "pressed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    script = tmp_path / "score_one.py"
    script.write_text(f"""
from pathlib import Path
import local.eval.processes
from test_pool import *
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    local.eval.processes.IMPORTS.append("pressed")
    track = open_test_set(Path({str(corpus)!r}), RATE, "wav")[0]
    with ScoringPool(Path({str(make_out(tmp_path))!r}), 1, "bsseval") as pool:
        pool.submit(track, make_estimates(track), make_record())
        print(len(pool.finish()[0]), "scored")
""")
    result = run_python(script, PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'tests'}")
    assert result.stdout.endswith("1 scored\n"), result.stderr
    assert "Traceback" not in result.stderr


def test_what_a_killed_run_left_is_removed(tmp_path):
    for name in (".estimates.0", ".estimates.11", "test"):
        (tmp_path / name).mkdir()
    (tmp_path / ".estimates.0" / "0.npy").touch()
    remove_estimates(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_as_many_jobs_as_cores_memory_and_tracks_allow(monkeypatch):
    Timed = namedtuple("Timed", "seconds")
    tracks = [Timed(240)] * 50
    cores = set(range(16))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    limit_memory(monkeypatch, 64 * GB)
    assert choose_jobs(tracks, "bsseval") == 16
    assert choose_jobs(tracks, "museval") == 14  # of 4.5 GB each
    assert choose_jobs(tracks, "museval", separation=10 * GB) == 11
    assert choose_jobs(tracks[:3], "bsseval") == 3
    assert choose_jobs([], "bsseval") == 1
    assert choose_jobs(tracks, "bsseval", processes=2) == 16  # of these 32, srun gave us 16
    assert choose_jobs(tracks, "bsseval", processes=8) == 8
    assert choose_jobs(tracks, "museval", processes=4) == 3  # in a quarter of the memory
    assert choose_jobs(tracks, "museval", processes=4, separation=5 * GB) == 2
    limit_memory(monkeypatch, 1 * GB)
    assert choose_jobs(tracks, "museval") == 1


def test_threads_and_scoring_processes_share_the_cores_as_the_work():
    assert choose_threads(2, 0.01, "bsseval") == 1
    assert choose_threads(2, 1.5, "bsseval") == 2  # the published models
    assert choose_threads(2, math.inf, "bsseval") == 2  # not known
    assert choose_threads(1, math.inf, "museval") == 1
    assert choose_threads(16, 0.015, "bsseval") == 8
    assert choose_threads(16, 0.015, "bsseval", targets=6) == 4
    assert choose_threads(16, 1e-9, "museval") == 1
