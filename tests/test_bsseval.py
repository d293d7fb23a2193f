import json
import warnings

import numpy as np
import pytest
from conftest import SHARED, make_stems, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from local.eval.bsseval import TAPS, bss_eval
from local.tools.museval_guard import import_museval


def make_signals(shape: tuple[int, int, int], seed=0) -> tuple[np.ndarray, np.ndarray]:
    """(references, estimates) with filtering, interference and artifacts, as a model makes them."""
    rng = np.random.default_rng(seed)
    references = rng.standard_normal(shape)
    estimates = 0.8 * references + 0.3 * np.roll(references, 3, axis=1)
    estimates += 0.2 * references[::-1] + 0.1 * rng.standard_normal(shape)
    return references, estimates


def evaluate_both(references, estimates, window=np.inf, hop=np.inf):
    """The results of museval and of ours; where museval raises, ours has to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of np.linalg.linalg, and of empty input
        try:
            expected = import_museval().evaluate(references, estimates, win=window, hop=hop)
        except ValueError:
            with pytest.raises(ValueError):
                bss_eval(references, estimates, window, hop)
            return None
    found = bss_eval(references, estimates, window, hop)
    for scores in found:
        assert scores.dtype == np.float64
    return np.stack(expected), np.stack(found)


def assert_same(expected: np.ndarray, found: np.ndarray, limit=200.0) -> None:
    """Holds dB to dB; what lies beyond the limit in both is rounding noise."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(
        np.minimum(found, limit), np.minimum(expected, limit), rtol=0, atol=1e-6
    )


@settings(deadline=None, max_examples=40)
@given(
    sources=st.integers(1, 3),
    channels=st.integers(1, 2),
    length=st.integers(4000, 20_000),
    window=st.one_of(st.integers(1, 25_000), st.floats(100, 9000), st.just(np.inf)),
    hop=st.one_of(st.integers(300, 25_000), st.floats(300, 9000)),
    estimated=st.floats(0.7, 1.3),
    silence=st.tuples(st.booleans(), st.integers(0, 20_000), st.integers(0, 9000)),
    dtype=st.sampled_from([np.float64, np.float32]),
    seed=st.integers(0, 99),
)
def test_every_number_is_that_of_museval(
    sources, channels, length, window, hop, estimated, silence, dtype, seed
):
    references, estimates = make_signals((sources, length, channels), seed)
    of_a_reference, start, duration = silence
    (references if of_a_reference else estimates)[-1, start : start + duration] = 0
    estimates = np.resize(estimates, (sources, round(estimated * length), channels))
    both = evaluate_both(references.astype(dtype), estimates.astype(dtype), window, hop)
    if both is not None:
        assert_same(*both)


@settings(deadline=None, max_examples=20)
@given(
    sources=st.integers(1, 2),
    channels=st.integers(1, 2),
    length=st.integers(0, 2500),
    window=st.integers(1, 2500),
    seed=st.integers(0, 99),
)
def test_signals_too_short_for_their_filters_have_the_sdr_of_museval(
    sources, channels, length, window, seed
):
    references, estimates = make_signals((sources, length, channels), seed)
    both = evaluate_both(references, estimates, window, window)
    if both is not None and length:
        expected, found = both
        assert_same(expected[0], found[0])
        assert expected.shape == found.shape
    elif both is not None:
        assert both[1].shape == both[0].shape == (4, 0)


def mono_as_stereo(references, estimates):
    references[..., 1], estimates[..., 1] = references[..., 0], estimates[..., 0]


def equal_references(references, estimates):
    references[1] = references[0]


def dead_channel(references, estimates):
    references[..., 1] = estimates[..., 1] = 0


def dead_channel_of_one(references, estimates):
    references[0, :, 1] = 0


def antiphase_in_a_frame(references, estimates):
    references[0, 3000:6000, 1] = -references[0, 3000:6000, 0]


def antiphase(references, estimates):
    references[0, :, 1] = -references[0, :, 0]


def antiphase_estimate(references, estimates):
    estimates[1, :, 1] = -estimates[1, :, 0]


def perfect(references, estimates):
    estimates[:] = references


def perfect_for_one(references, estimates):
    estimates[0] = references[0]


def swapped(references, estimates):
    estimates[:] = references[::-1]


def scaled(references, estimates):
    estimates[:] = references / 2


def impulses(references, estimates):
    references[:] = 0
    references[:, 4000] = 1


@pytest.mark.parametrize(
    "spoil",
    [
        mono_as_stereo,
        equal_references,
        dead_channel,
        dead_channel_of_one,
        antiphase_in_a_frame,
        antiphase,
        antiphase_estimate,
        perfect,
        perfect_for_one,
        swapped,
        scaled,
        impulses,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_degenerate_signals(spoil):
    """SDR, NaN and errors are those of museval. So are the others, but for a singular matrix: it is
    within its own rounding.
    """
    references, estimates = make_signals((2, 12_000, 2))
    spoil(references, estimates)
    both = evaluate_both(references, estimates, 3000, 3000)
    assert (both is None) == (spoil in (antiphase, antiphase_estimate))
    if both is not None:
        assert_same(*both)


def test_a_singular_matrix_is_solved_by_least_squares(monkeypatch):
    references, estimates = make_signals((2, 9000, 1))
    expected = np.stack(bss_eval(references, estimates, 3000, 3000))

    def refuse(*args):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(np.linalg, "solve", refuse)
    assert_same(expected, np.stack(bss_eval(references, estimates, 3000, 3000)))


def test_museval_solves_a_singular_matrix_with_any_numpy(monkeypatch):
    """numpy 2.4 removed a name that museval uses there alone."""
    references, estimates = make_signals((1, 3000, 1))
    monkeypatch.delattr(np.linalg, "linalg", raising=False)
    expected, _ = evaluate_both(references, estimates)

    def refuse(*args):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(np.linalg, "solve", refuse)
    assert_same(*map(np.stack, (expected, import_museval().evaluate(references, estimates))))


@pytest.mark.parametrize(
    "references, estimates, window, hop, words",
    [
        ((2, 900, 2), (2, 900, 1), 99, 99, r"one shape .*, got \(2, 900, 2\) and \(2, 900, 1\)"),
        ((2, 900, 2), (1, 900, 2), 99, 99, r"one shape .*, got \(2, 900, 2\) and \(1, 900, 2\)"),
        ((2, 9, 2, 2), (2, 9, 2, 2), 99, 99, "one shape"),
        ((101, 4, 1), (101, 4, 1), 99, 99, "at most 100 sources, got 101"),
        ((1, 900, 1), (1, 900, 1), 0, 99, "window >= 1 and hop > 0 in samples, got 0 and 99"),
        ((1, 900, 1), (1, 900, 1), 99, 0, "got 99 and 0"),
        ((1, 900, 1), (1, 900, 1), np.nan, 99, "got nan and 99"),
    ],
)
def test_bad_input(references, estimates, window, hop, words):
    with pytest.raises(ValueError, match=words):
        bss_eval(np.ones(references), np.ones(estimates), window, hop)


@pytest.mark.parametrize("name, which", [("reference", 0), ("estimate", 1)])
def test_a_silent_source_is_named(name, which):
    signals = make_signals((2, 3000, 2))
    signals[which][1] = 0
    with pytest.raises(ValueError, match=f"an entire {name} is silent, or its channels cancel out"):
        bss_eval(*signals)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value):
    for which in (0, 1):
        signals = make_signals((2, 9000, 2))
        signals[which][1, 8999, 0] = value
        with pytest.raises(ValueError, match="holds NaN, infinity"):
            bss_eval(*signals)


@pytest.mark.smoke
def test_time_invariant_filters_are_no_artifact():
    """Each source through filters of its own: spatial distortion, and nothing else."""
    rng = np.random.default_rng(0)
    references, _ = make_signals((2, 30_000, 1))
    references[:, -TAPS:] = 0  # else the end of an estimate would be cut off
    taps = 0.1 * rng.standard_normal((2, TAPS))
    filtered = [np.convolve(x[:, 0], h) for x, h in zip(references, taps, strict=True)]
    _, isr, sir, sar = bss_eval(references, np.stack(filtered)[..., None])
    assert (isr < 1).all()
    assert (sir > 200).all() and (sar > 200).all()


@pytest.mark.parametrize("block", [1, 5, 64])
def test_the_number_of_blocks_at_once_changes_nothing(block, monkeypatch):
    references, estimates = make_signals((2, 40_000, 2))
    expected = np.stack(bss_eval(references, estimates, 30_000, 5000))
    monkeypatch.setattr("local.eval.bsseval.BLOCKS_AT_ONCE", block)
    found = np.stack(bss_eval(references, estimates, 30_000, 5000))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_music_with_its_rounding_to_16_bits():
    stems = make_stems(4, 8000, seed=3)
    references = np.stack([stems["vocals"], stems["drums"] + stems["bass"] + stems["other"]])
    _, noise = make_signals(references.shape)
    estimates = np.rint(0.9 * references + 0.1 * references[::-1] + 20 * noise) / 32768
    assert_same(*evaluate_both(references / 32768, estimates, 8000, 8000))


def test_real_music_is_scored_as_exactly_as_museval_does(excerpts):
    """Music without its highest octave makes the matrix near-singular (a condition of 1e10 and
    more), and museval's numbers vary by 1e-6 dB with the order of the sources alone.
    """
    import musdb

    (track,) = musdb.DB(root=str(excerpts), subsets="test")
    references = np.stack([track.targets[name].audio for name in ("vocals", "accompaniment")])
    _, noise = make_signals(references.shape)
    estimates = 0.7 * references + 0.2 * references[::-1] + 0.003 * noise
    expected, found = evaluate_both(references, estimates, 44100, 44100)
    swapped, _ = evaluate_both(references[::-1], estimates[::-1], 44100, 44100)
    own_deviation = np.abs(expected - swapped[:, ::-1]).max()
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-9)  # SDR needs no matrix
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 + 10 * own_deviation)


@needs_shared
def test_museval_s_own_regression_case():
    """Uniform noise for the training excerpt: numpy's seed 0, vocals before accompaniment."""
    import musdb

    (track,) = musdb.DB(root=str(SHARED / "data" / "musdb18_excerpts"), subsets="train")
    references = np.stack([track.targets[name].audio for name in ("vocals", "accompaniment")])
    np.random.seed(0)
    estimates = np.stack([np.random.random(references.shape[1:]) for _ in references])
    scores = json.loads((SHARED / "data/museval_scores/random_estimates_80s_rock.json").read_text())
    found = bss_eval(references, estimates, track.rate, track.rate)
    for number, target in enumerate(("vocals", "accompaniment")):
        (frames,) = (t["frames"] for t in scores["targets"] if t["name"] == target)
        for metric, values in zip(("SDR", "ISR", "SIR", "SAR"), found, strict=True):
            expected = [frame["metrics"][metric] for frame in frames]
            np.testing.assert_allclose(values[number], expected, rtol=0, atol=2e-5)
