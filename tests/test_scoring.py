from pathlib import Path

import numpy as np
import pytest
from conftest import RATE

from local.eval.score_files import read_scores
from local.eval.scoring import score_track, whole_track_sdr
from local.eval.tracks import open_test_set, read_track
from local.musdb18_tracks import TARGETS
from local.tools.choices import SCORERS


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
