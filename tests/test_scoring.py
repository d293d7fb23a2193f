import multiprocessing
import os
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import RATE, ROOT, make_record, run_python
from threadpoolctl import threadpool_info

from local.eval import scoring
from local.eval.score_files import load_track, read_scores
from local.eval.scoring import (
    ScoringPool,
    choose_jobs,
    remove_estimates,
    score_track,
    whole_track_sdr,
)
from local.eval.tracks import open_test_set, read_track
from local.musdb18_tracks import TARGETS
from local.tools.choices import SCORERS
from local.tools.command_line import UserError


def make_estimates(track, seed=0) -> np.ndarray:
    """(2, 2, T) float32, the targets with some noise."""
    audio, _ = read_track(track)
    rng = np.random.default_rng(seed)
    estimates = [0.7 * audio[t] + rng.normal(0, 0.01, audio[t].shape) for t in TARGETS]
    return np.stack(estimates).astype(np.float32)


def museval_scores(track, estimates: np.ndarray, tmp_path: Path) -> str:
    """The file that museval itself writes."""
    import museval

    by_target = {target: x.T for target, x in zip(TARGETS, estimates, strict=True)}
    museval.eval_mus_track(track, by_target, output_dir=str(tmp_path))
    return (tmp_path / "test" / f"{track.name}.json").read_text()


def test_scores_of_a_wav_tree_are_those_of_museval(corpus, tmp_path):
    import musdb

    expected = musdb.DB(root=str(corpus), is_wav=True, subsets="test")
    for track, musdb_track in zip(open_test_set(corpus, RATE, "wav"), expected, strict=True):
        estimates = make_estimates(track)
        text = museval_scores(musdb_track, estimates, tmp_path)
        for scorer in SCORERS:
            assert score_track(track, estimates, scorer)[0].json == text


def test_scores_of_a_stem_root_are_those_of_museval(excerpts, tmp_path):
    import musdb

    (expected,) = musdb.DB(root=str(excerpts), subsets="test")
    (track,) = open_test_set(excerpts, 44100, "wav")
    estimates = make_estimates(track)
    text = museval_scores(expected, estimates, tmp_path)
    assert score_track(track, estimates, "museval")[0].json == text
    (tmp_path / "ours.json").write_text(score_track(track, estimates)[0].json)
    scores = read_scores(tmp_path / "test" / f"{track.name}.json")
    for target, metrics in read_scores(tmp_path / "ours.json").items():
        for metric, values in metrics.items():  # the last of five digits may be another
            np.testing.assert_allclose(values, scores[target][metric], rtol=0, atol=1.5e-5)


def test_estimates_of_another_length_are_refused(corpus):
    track, _ = open_test_set(corpus, RATE, "wav")
    for shape in ((2, 2, 99), (2, 2, track.length + 1)):
        with pytest.raises(ValueError, match=f"its mixture has {shape[2]} samples"):
            score_track(track, np.ones(shape, np.float32))


def test_sdr_of_the_mixture_and_of_whole_tracks(corpus):
    import museval

    track, _ = open_test_set(corpus, RATE, "wav")
    (audio, _), estimates = read_track(track), make_estimates(track)
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
            pool.submit(track, as_targets(make_estimates(track)), make_record())
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
                pool.submit(track, as_targets(make_estimates(track)), make_record())
            pool.finish()
        estimates = as_targets(make_estimates(quiet))
        estimates["vocals"][:] = 0
        with ScoringPool(out, 1, "bsseval") as pool:
            pool.submit(quiet, estimates, make_record())
            pool.submit(loud, as_targets(make_estimates(loud)), make_record())
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
        pytest.raises(UserError, match="smaller --jobs"),
        ScoringPool(out, 1, "bsseval") as pool,
    ):
        pool.submit(track, as_targets(make_estimates(track)), make_record())
        kill_a_process(pool)
        pool.finish()
    assert not any(out.glob(".*"))
    assert not multiprocessing.active_children()


def test_an_interrupt_does_not_stop_the_imports_of_the_fork_server(corpus, tmp_path):
    """Ctrl-C during the imports of the fork server does not stop it."""
    (tmp_path / "pressed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    script = tmp_path / "score_one.py"
    script.write_text(f"""
from pathlib import Path
from test_scoring import *
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    scoring.IMPORTS.append("pressed")
    track = open_test_set(Path({str(corpus)!r}), RATE, "wav")[0]
    with ScoringPool(Path({str(make_out(tmp_path))!r}), 1, "bsseval") as pool:
        pool.submit(track, as_targets(make_estimates(track)), make_record())
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
    Memory = namedtuple("Memory", "available")
    tracks = [Timed(240)] * 50
    cores = set(range(16))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    free = 64e9
    monkeypatch.setattr(scoring.psutil, "virtual_memory", lambda: Memory(free))
    assert choose_jobs(tracks, "bsseval") == 16
    assert choose_jobs(tracks, "museval") == 14  # of 4.5 GB each
    assert choose_jobs(tracks[:3], "bsseval") == 3
    assert choose_jobs([], "bsseval") == 1
    assert choose_jobs(tracks, "bsseval", processes=2) == 16  # of these 32, srun gave us 16
    assert choose_jobs(tracks, "bsseval", processes=8) == 8
    assert choose_jobs(tracks, "museval", processes=4) == 3  # in a quarter of the memory
    free = 1e9
    assert choose_jobs(tracks, "museval") == 1
