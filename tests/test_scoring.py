import multiprocessing
import os
import signal
import time
from collections import namedtuple
from pathlib import Path

import musdb
import museval
import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, TEST_NAMES, make_record, write_corpus
from threadpoolctl import threadpool_info

from local import scoring
from local.config import UserError
from local.musdb18_dataset import DatasetError
from local.results import load_track, read_scores
from local.scoring import (
    SCORERS,
    TARGETS,
    ScoringPool,
    choose_jobs,
    open_test_set,
    read_mixture,
    read_track,
    remove_estimates,
    score_track,
    whole_track_sdr,
)


def make_estimates(track, seed=0) -> np.ndarray:
    """(2, 2, T) float32, the targets with some noise."""
    audio = read_track(track)
    rng = np.random.default_rng(seed)
    estimates = [0.7 * audio[t] + rng.normal(0, 0.01, audio[t].shape) for t in TARGETS]
    return np.stack(estimates).astype(np.float32)


def museval_scores(track, estimates: np.ndarray, tmp_path: Path) -> str:
    """The file that museval itself writes."""
    by_target = {target: x.T for target, x in zip(TARGETS, estimates, strict=True)}
    museval.eval_mus_track(track, by_target, output_dir=str(tmp_path))
    return (tmp_path / "test" / f"{track.name}.json").read_text()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_scores_of_a_wav_tree_are_those_of_museval(subtype, own_corpus, tmp_path):
    rng = np.random.default_rng(0)
    for path in (own_corpus / "test").rglob("*.wav"):
        audio, _ = sf.read(path)
        sf.write(path, audio + rng.uniform(-1e-5, 1e-5, audio.shape), RATE, subtype)
    tracks = open_test_set(own_corpus, RATE, "wav")
    assert [track.name for track in tracks] == sorted(TEST_NAMES)
    by_name = {track.name: track for track in tracks}
    for expected in musdb.DB(root=str(own_corpus), is_wav=True, subsets="test"):
        track = by_name[expected.name]
        audio = read_track(track)
        np.testing.assert_array_equal(audio["mixture"].T, expected.audio)
        np.testing.assert_array_equal(read_mixture(track).T, expected.audio)
        np.testing.assert_array_equal(audio["vocals"].T, expected.targets["vocals"].audio)
        np.testing.assert_allclose(
            audio["accompaniment"].T, expected.targets["accompaniment"].audio, atol=1e-12
        )
        estimates = make_estimates(track)
        text = museval_scores(expected, estimates, tmp_path)
        for scorer in SCORERS:
            assert score_track(track, estimates, scorer)[0].json == text


def test_scores_of_a_stem_root_are_those_of_museval(excerpts, tmp_path):
    (expected,) = musdb.DB(root=str(excerpts), subsets="test")
    (track,) = open_test_set(excerpts, 44100, "wav")
    assert track.name == expected.name
    assert track.seconds == pytest.approx(expected.duration, rel=0.05)
    np.testing.assert_array_equal(read_track(track)["mixture"].T, expected.audio)
    np.testing.assert_array_equal(read_mixture(track).T, expected.audio)
    estimates = make_estimates(track)
    text = museval_scores(expected, estimates, tmp_path)
    assert score_track(track, estimates, "museval")[0].json == text
    (tmp_path / "ours.json").write_text(score_track(track, estimates)[0].json)
    scores = read_scores(tmp_path / "test" / f"{track.name}.json")
    for target, metrics in read_scores(tmp_path / "ours.json").items():
        for metric, values in metrics.items():  # the last of five digits may be another
            np.testing.assert_allclose(values, scores[target][metric], rtol=0, atol=1.5e-5)


def test_a_flac_tree_reads_like_a_wav_tree(corpus, tmp_path):
    flac = open_test_set(write_corpus(tmp_path, suffix="flac"), RATE, "flac")
    for one, other in zip(open_test_set(corpus, RATE, "wav"), flac, strict=True):
        assert one.name == other.name
        for file, audio in read_track(one).items():
            np.testing.assert_array_equal(audio, read_track(other)[file])


def test_faults_of_a_test_set(own_corpus, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="no such folder"):
        open_test_set(tmp_path / "nowhere", RATE, "wav")
    with pytest.raises(DatasetError, match="expected 44100 Hz .*, got 8000 Hz"):
        open_test_set(own_corpus, 44100, "wav")
    (own_corpus / "test" / TEST_NAMES[0] / "mixture.wav").unlink()
    with pytest.raises(DatasetError, match="mixture.wav: missing"):
        open_test_set(own_corpus, RATE, "wav")
    (tmp_path / "packed" / "test").mkdir(parents=True)
    (tmp_path / "packed" / "test" / "A.stem.mp4").write_bytes(b"no video")
    (track,) = open_test_set(tmp_path / "packed", RATE, "wav")
    for read in (read_mixture, read_track):
        with pytest.raises(UserError, match="cannot be decoded"):
            read(track)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install ffmpeg"):
        open_test_set(tmp_path / "packed", RATE, "wav")


def test_sdr_of_the_mixture_and_of_whole_tracks(corpus):
    track, _ = open_test_set(corpus, RATE, "wav")
    audio, estimates = read_track(track), make_estimates(track)
    _, extras = score_track(track, estimates)
    references = np.stack([audio[target].T for target in TARGETS])
    untouched = np.stack([audio["mixture"].T for _ in TARGETS])
    sdr, *_ = museval.evaluate(references, untouched, win=RATE, hop=RATE)
    for target, frames, estimate in zip(TARGETS, sdr, estimates, strict=True):
        assert extras["mixture_SDR"][target]["median"] == pytest.approx(np.median(frames))
        assert extras["mixture_SDR"][target]["mean"] == pytest.approx(np.mean(frames))
        for name, found in {"uSDR": estimate, "mixture_uSDR": audio["mixture"]}.items():
            true = audio[target].astype(np.float64)
            ratio = (1e-7 + np.sum(true**2)) / (1e-7 + np.sum((true - found) ** 2))
            assert extras[name][target] == pytest.approx(10 * np.log10(ratio))
    assert extras["frames"] == sdr.shape[1]


def test_usdr_of_silence_is_finite():
    silence, noise = np.zeros((2, 70_000, 2)), np.ones((2, 70_000, 2))
    assert whole_track_sdr(silence, silence) == {"vocals": 0, "accompaniment": 0}
    assert whole_track_sdr(silence, noise)["vocals"] == pytest.approx(-121.46, abs=0.01)
    assert whole_track_sdr(noise, noise)["vocals"] == pytest.approx(121.46, abs=0.01)


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_silent_estimate_cannot_be_scored(scorer, corpus):
    track, _ = open_test_set(corpus, RATE, "wav")
    estimates = make_estimates(track)
    estimates[1] = 0
    with pytest.raises(ValueError, match="silent"):
        score_track(track, estimates, scorer)


# Many tracks


def as_targets(estimates: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(TARGETS, estimates, strict=True))


def make_out(tmp_path: Path) -> Path:
    (tmp_path / "out" / "test").mkdir(parents=True)
    return tmp_path / "out"


def test_a_pool_scores_what_one_process_would(corpus, tmp_path, capsys):
    out, tracks = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    with ScoringPool(out, 2, "bsseval") as pool:
        for track in tracks:
            pool.submit(track, as_targets(make_estimates(track)), make_record(track))
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
    for _ in range(2):  # the second time, a failure takes the scores of the first away
        with ScoringPool(out, 1, "bsseval") as pool:
            for track in (quiet, loud):
                pool.submit(track, as_targets(make_estimates(track)), make_record(track))
            pool.finish()
        estimates = as_targets(make_estimates(quiet))
        estimates["vocals"][:] = 0
        with ScoringPool(out, 1, "bsseval") as pool:
            pool.submit(quiet, estimates, make_record(quiet))
            pool.submit(loud, as_targets(make_estimates(loud)), make_record(loud))
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


def test_a_killed_process_ends_the_run_with_the_remedy(corpus, tmp_path):
    out, (track, _) = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    with (
        pytest.raises(UserError, match="a scoring process was killed .* a smaller --jobs"),
        ScoringPool(out, 1, "bsseval") as pool,
    ):
        pool.submit(track, as_targets(make_estimates(track)), make_record(track))
        kill_a_process(pool)
        pool.finish()
    assert not any(out.glob(".*"))
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_all_processes(corpus, tmp_path):
    out, (track, _) = make_out(tmp_path), open_test_set(corpus, RATE, "wav")
    with pytest.raises(KeyboardInterrupt), ScoringPool(out, 2, "museval") as pool:
        for _ in range(4):
            pool.submit(track, as_targets(make_estimates(track)), make_record(track))
        raise KeyboardInterrupt
    for process in multiprocessing.active_children():
        process.join(10)
    assert not multiprocessing.active_children()
    assert [path.name for path in out.iterdir()] == ["test"]


def test_what_killed_runs_left_is_removed_once(tmp_path):
    for rank in range(5):
        (tmp_path / f".estimates.{rank}").mkdir()
    remove_estimates(tmp_path, 1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".estimates.0",
        ".estimates.2",
        ".estimates.4",
    ]
    remove_estimates(tmp_path, 0, 2)
    assert not any(tmp_path.iterdir())


def test_as_many_jobs_as_cores_memory_and_tracks_allow(monkeypatch):
    Timed = namedtuple("Timed", "seconds")
    Memory = namedtuple("Memory", "available")
    tracks = [Timed(240)] * 50
    cores = set(range(16))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    free = 64e9
    monkeypatch.setattr(scoring.psutil, "virtual_memory", lambda: Memory(free))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert choose_jobs(tracks, "bsseval") == 16
    assert choose_jobs(tracks, "museval") == 14  # of 4.5 GB each
    assert choose_jobs(tracks[:3], "bsseval") == 3
    assert choose_jobs([], "bsseval") == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_jobs(tracks, "bsseval") == 4
    free = 1e9
    assert choose_jobs(tracks, "museval") == 1
