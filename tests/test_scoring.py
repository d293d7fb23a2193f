import json
from pathlib import Path

import musdb
import museval
import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, TEST_NAMES, make_stems, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from local.config import UserError
from local.musdb18_dataset import DatasetError
from local.scoring import (
    TARGETS,
    framewise_sdr,
    open_test_set,
    score_track,
    sdr_table,
    write_results,
)


def make_estimates(audio: dict, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    return {t: 0.7 * audio[t] + rng.normal(0, 0.01, audio[t].shape) for t in TARGETS}


def expected_scores(track, estimates: dict, tmp_path: Path) -> dict:
    museval.eval_mus_track(track, {t: e.T for t, e in estimates.items()}, output_dir=str(tmp_path))
    return json.loads((tmp_path / "test" / f"{track.name}.json").read_text())


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_scores_of_a_wav_tree_are_those_of_museval(subtype, own_corpus, tmp_path):
    rng = np.random.default_rng(0)
    for path in (own_corpus / "test").rglob("*.wav"):
        audio, _ = sf.read(path)
        sf.write(path, audio + rng.uniform(-1e-5, 1e-5, audio.shape), RATE, subtype)
    tracks = open_test_set(own_corpus, RATE, "wav")
    assert list(tracks) == sorted(TEST_NAMES)
    for track in musdb.DB(root=str(own_corpus), is_wav=True, subsets="test"):
        audio = tracks[track.name]()
        np.testing.assert_array_equal(audio["mixture"].T, track.audio)
        np.testing.assert_array_equal(audio["vocals"].T, track.targets["vocals"].audio)
        np.testing.assert_allclose(
            audio["accompaniment"].T, track.targets["accompaniment"].audio, atol=1e-12
        )
        estimates = make_estimates(audio)
        scored = score_track(track.name, RATE, audio, estimates)
        assert json.loads(scored.store.json) == expected_scores(track, estimates, tmp_path)


def test_scores_of_a_stem_root_are_those_of_museval(excerpts, tmp_path):
    (track,) = musdb.DB(root=str(excerpts), subsets="test")
    ((name, read),) = open_test_set(excerpts, 44100, "wav").items()
    audio = read()
    assert name == track.name
    np.testing.assert_array_equal(audio["mixture"].T, track.audio)
    estimates = make_estimates(audio)
    scored = score_track(name, 44100, audio, estimates)
    assert json.loads(scored.store.json) == expected_scores(track, estimates, tmp_path)


def test_a_flac_tree_reads_like_a_wav_tree(corpus, tmp_path):
    flac = open_test_set(write_corpus(tmp_path, suffix="flac"), RATE, "flac")
    wav = open_test_set(corpus, RATE, "wav")
    for name, read in wav.items():
        for file, audio in read().items():
            np.testing.assert_array_equal(audio, flac[name]()[file])


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
    tracks = open_test_set(tmp_path / "packed", RATE, "wav")
    with pytest.raises(UserError, match="cannot be decoded"):
        tracks["A"]()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install ffmpeg"):
        open_test_set(tmp_path / "packed", RATE, "wav")


@settings(deadline=None, max_examples=15)
@given(
    length=st.integers(1, 4000),
    window=st.integers(500, 1500),
    sources=st.integers(1, 3),
    silence=st.integers(0, 3000),
    seed=st.integers(0, 99),
)
def test_sdr_of_frames_is_that_of_museval(length, window, sources, silence, seed):
    length += 600  # museval's 512-tap filters want some signal
    rng = np.random.default_rng(seed)
    references, estimates = rng.standard_normal((2, sources, 2, length))
    references[0, :, silence : silence + window] = 0
    estimates[-1, 1, -window:] = -estimates[-1, 0, -window:]
    if not references.any(axis=(1, 2)).all() or not estimates.sum(1).any(axis=1).all():
        return
    expected, *_ = museval.evaluate(
        references.transpose(0, 2, 1), estimates.transpose(0, 2, 1), win=window, hop=window
    )
    found = framewise_sdr(references, estimates, window)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def score_synthetic(name: str, seconds=3.2, seed=0):
    stems = {k: v.T / 32768 for k, v in make_stems(seconds, RATE, seed).items()}
    audio = {"mixture": stems["mixture"], "vocals": stems["vocals"]}
    audio["accompaniment"] = stems["drums"] + stems["bass"] + stems["other"]
    audio["vocals"][:, :RATE] = 0  # a frame without a score
    return score_track(name, RATE, audio, make_estimates(audio, seed))


@pytest.fixture(scope="module")
def scored():
    return [score_synthetic(f"Track {seed}", seed=seed) for seed in range(3)]


def test_what_cannot_be_scored_says_why():
    audio = {name: np.ones((2, 2 * RATE)) for name in ("mixture", *TARGETS)}
    with pytest.raises(ValueError, match="silent"):
        score_track("T", RATE, audio, {t: np.zeros((2, 2 * RATE)) for t in TARGETS})
    for value in (np.nan, np.inf):
        estimates = make_estimates(audio)
        estimates["vocals"][0, 5] = value
        with pytest.raises(ValueError, match="the estimate of vocals holds NaN or infinity"):
            score_track("T", RATE, audio, estimates)


def test_the_table_shows_the_gain_over_the_mixture_and_missing_frames(scored):
    lines = sdr_table(scored)
    cells = lines[2].removeprefix("Track 0").split()
    vocals, mixture = scored[0].frames("vocals", "SDR"), scored[0].mixture_sdr["vocals"]
    assert len(vocals) == 3
    assert cells[:4] == [
        f"{np.nanmedian(mixture):.2f}",
        f"{np.nanmedian(vocals):.2f}",
        f"{np.nanmedian(vocals) - np.nanmedian(mixture):+.2f}",
        "33%",
    ]
    models = [np.nanmedian(track.frames("vocals", "SDR")) for track in scored]
    assert lines[-2].split()[3:5][1] == f"{np.median(models):.2f}"
    assert lines[-1].split()[3:5][1] == f"{np.mean(models):.2f}"
    assert len({len(line) for line in lines}) == 1


def test_written_results_are_read_by_museval(scored, tmp_path):
    text = write_results(tmp_path, scored, {"Quiet": "silent"})
    assert (tmp_path / "results.txt").read_text() == text
    assert "Not scored: 1 of 4 tracks\n  Quiet: silent" in text
    for aggregates in ("median over frames, median", "median over frames, mean", "mean over"):
        assert aggregates in text
    (tmp_path / "test").mkdir()
    for track in scored:
        (tmp_path / "test" / f"{track.name}.json").write_text(track.store.json)
    loaded, again = museval.EvalStore(), museval.EvalStore()
    loaded.load(str(tmp_path / "results.pandas"))
    again.add_eval_dir(str(tmp_path))
    assert loaded.agg_frames_tracks_scores().to_dict() == again.agg_frames_tracks_scores().to_dict()

    rows = (tmp_path / "results.csv").read_text().splitlines()
    columns = rows[0].split(",")
    first = dict(zip(columns, rows[1].split(","), strict=True))
    frames = loaded.agg_frames_scores()
    assert float(first["SDR_median"]) == pytest.approx(frames["Track 0", "vocals", "SDR"], abs=1e-5)
    assert (first["frames"], float(first["nan_share"])) == ("3", pytest.approx(1 / 3, abs=1e-5))
    assert len(rows) == 1 + 3 * 2


def test_nothing_scored_is_said(tmp_path):
    text = write_results(tmp_path, [], {"Quiet": "silent"})
    assert "Not scored: 1 of 1 tracks" in text
