import json
from pathlib import Path

import numpy as np
import pytest
import torch
from asteroid.losses import singlesrc_neg_sisdr
from conftest import RATE

from local.eval.score_files import read_scores
from local.eval.scoring import Signals, plan_passes, score_signals, score_track
from local.eval.tracks import open_test_set, read_track
from local.eval.whole_track import SAMPLES, si_sdr, usdr
from local.musdb18_tracks import SOURCES, TARGETS
from local.tools.choices import SCORERS


def make_estimates(track, seed=0, with_stems=False) -> dict[str, np.ndarray]:
    """target -> (2, T) float32, with some noise."""
    audio, _ = read_track(track, with_stems=with_stems)
    del audio["mixture"]
    rng = np.random.default_rng(seed)
    noisy = {t: 0.7 * x + rng.normal(0, 0.01, x.shape) for t, x in audio.items()}
    return {target: x.astype(np.float32) for target, x in noisy.items()}


def museval_scores(track, estimates: dict[str, np.ndarray], tmp_path: Path) -> str:
    """The file that museval itself writes."""
    import museval

    by_target = {target: x.T for target, x in estimates.items()}
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


def test_scores_of_four_stems_and_their_accompaniment_are_those_of_museval(corpus, tmp_path):
    """Where stems are silent, the others have those that museval gives without it."""
    import musdb

    track, _ = open_test_set(corpus, RATE, "wav")
    (expected, _) = musdb.DB(root=str(corpus), is_wav=True, subsets="test")
    estimates = make_estimates(track, with_stems=True)
    text = museval_scores(expected, estimates, tmp_path)
    assert score_track(track, estimates)[0].json == text
    assert set(read_scores(tmp_path / "test" / f"{track.name}.json")) == {*TARGETS, *SOURCES}

    audible = {target: x for target, x in estimates.items() if target not in ("bass", "other")}
    text = museval_scores(expected, audible, tmp_path)
    references, _ = read_track(track, with_stems=True)
    mixture = references.pop("mixture")
    silence = dict.fromkeys(("bass", "other"), np.zeros_like(mixture))
    for kind, signals in {
        "reference": Signals(RATE, mixture, references | silence, estimates),
        "estimate": Signals(RATE, mixture, references, estimates | silence),
    }.items():
        store, extras = score_signals(track.name, signals)
        assert store.json == text
        assert extras["silent"] == dict.fromkeys(silence, kind)
        for metric in ("mixture_SDR", "uSDR", "mixture_uSDR", "SI_SDR", "mixture_SI_SDR"):
            assert set(extras[metric]) == set(audible)


def test_stems_that_a_track_does_not_have_are_not_scored(corpus):
    """As where a model of four stems is tested on a karaoke pair."""
    track, _ = open_test_set(corpus, RATE, "wav")
    estimates = make_estimates(track, with_stems=True)
    mixture = read_track(track)[0]["mixture"]
    references = {target: estimates[target] for target in TARGETS}
    store, extras = score_signals(track.name, Signals(RATE, mixture, references, estimates))
    assert extras["without_reference"] == ["bass", "drums", "other"]
    assert {target["name"] for target in json.loads(store.json)["targets"]} == set(TARGETS)


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


def test_passes_of_any_targets():
    assert list(plan_passes(["b", "a"])) == [(["a", "b"], ["a", "b"])]
    assert list(plan_passes(TARGETS)) == [(list(TARGETS), list(TARGETS))]
    stems, pair = plan_passes(["lead", *TARGETS, "drums"], silent=["lead"])
    assert stems == (["vocals", "drums"], ["drums"])
    assert pair == (list(TARGETS), list(TARGETS))
    for targets, silent in ((["vocals"], []), (["vocals", "drums"], ["drums"]), ([], [])):
        with pytest.raises(ValueError, match="needs two targets or more"):
            list(plan_passes(targets, silent))


def test_estimates_of_another_length_are_refused(corpus):
    track, _ = open_test_set(corpus, RATE, "wav")
    for length in (99, track.length + 1):
        estimates = dict.fromkeys(TARGETS, np.ones((2, length), np.float32))
        with pytest.raises(ValueError, match=f"its mixture has {length} samples"):
            score_track(track, estimates)


def test_sdr_of_the_mixture_and_of_whole_tracks(corpus):
    import museval

    track, _ = open_test_set(corpus, RATE, "wav")
    (audio, _), estimates = read_track(track), make_estimates(track)
    _, extras = score_track(track, estimates)
    references = np.stack([audio[target].T for target in TARGETS])
    untouched = np.stack([audio["mixture"].T for _ in TARGETS])
    sdr, *_ = museval.evaluate(references, untouched, win=RATE, hop=RATE)
    for target, frames in zip(TARGETS, sdr, strict=True):
        assert extras["mixture_SDR"][target]["median"] == pytest.approx(np.median(frames))
        assert extras["mixture_SDR"][target]["mean"] == pytest.approx(np.mean(frames))
        for start, found in {"": estimates[target], "mixture_": audio["mixture"]}.items():
            true = audio[target].astype(np.float64)
            ratio = (1e-7 + np.sum(true**2)) / (1e-7 + np.sum((true - found) ** 2))
            assert extras[f"{start}uSDR"][target] == pytest.approx(10 * np.log10(ratio))
            assert extras[f"{start}SI_SDR"][target] == pytest.approx(asteroid_si_sdr(true, found))
    assert extras["frames"] == sdr.shape[1]


def asteroid_si_sdr(true: np.ndarray, found: np.ndarray) -> float:
    """With all channels as one signal."""
    signals = (torch.from_numpy(x).double().reshape(1, -1) for x in (found, true))
    return -singlesrc_neg_sisdr(*signals).item()


def test_si_sdr_does_not_depend_on_level_or_offset():
    rng = np.random.default_rng(0)
    true = rng.normal(0, 0.1, (3, SAMPLES + 77, 1))
    found = true + rng.normal(0, 0.05, true.shape)
    expected = si_sdr(true, found)
    for number in range(3):
        assert expected[number] == pytest.approx(asteroid_si_sdr(true[number], found[number]))
    np.testing.assert_allclose(si_sdr(true, 0.3 * found + 0.7), expected, atol=1e-6)


def test_whole_track_scores_of_silence_are_finite():
    silence, noise = np.zeros((2, 70_000, 2)), np.ones((2, 70_000, 2))
    noise[:, ::2] = -1
    np.testing.assert_array_equal(usdr(silence, silence), 0)
    np.testing.assert_allclose(usdr(silence, noise), -121.46, atol=0.01)
    np.testing.assert_allclose(usdr(noise, noise), 121.46, atol=0.01)
    for reference in (silence, noise):
        for estimate in (silence, noise):
            assert np.isfinite(si_sdr(reference, estimate)).all()


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_silent_estimate_cannot_be_scored(scorer, corpus):
    track, _ = open_test_set(corpus, RATE, "wav")
    estimates = make_estimates(track)
    estimates["accompaniment"][:] = 0
    with pytest.raises(ValueError, match="silent"):
        score_track(track, estimates, scorer)
