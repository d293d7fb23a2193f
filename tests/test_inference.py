import itertools
import warnings

import numpy as np
import pytest
import torch
from conftest import (
    PEAK_MB,
    ROOT,
    forward,
    linux,
    load_golden,
    load_golden_model,
    model_confs,
    random_model,
    run_python,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import allow_for_rounding, assert_within_rounding

import local.fast.full
import local.inference
import local.streaming
import local.tasnet
from local.inference import separate, separate_blocks
from local.streaming import StreamingConvTasNet
from local.tasnet import NORM_TYPES
from local.tools.choices import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(N=8, L=8, B=8, H=8, X=2, R=1, C=2, audio_channels=2, samplerate=1000)


class Identity(torch.nn.Module):
    """Every source is the mixture."""

    def __init__(self, samplerate: int = 1000, C: int = 2, audio_channels: int = 2):
        super().__init__()
        self.samplerate, self.C, self.audio_channels = samplerate, C, audio_channels
        self.encoder = torch.nn.Identity()
        self.encoder.length = 2
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # says which device the model is on
        self.shapes = []

    def forward(self, mixture):
        self.shapes.append(tuple(mixture.shape))
        return mixture.unsqueeze(1).repeat(1, self.C, 1, 1)


@pytest.fixture
def tile(request, monkeypatch):
    """Tiles of so many frames."""
    set_tile_size(monkeypatch, request.param)
    return request.param


def set_tile_size(patch: pytest.MonkeyPatch, size: int) -> None:
    for module in (local.fast.full, local.inference, local.streaming):
        patch.setattr(module, "tile_size", lambda device: size)


def test_matches_the_baseline_of_the_challenge():
    settings_, golden, _ = load_golden("overlap_add")
    model, _ = load_golden_model(settings_["model"])
    segment, overlap = float(settings_["segment"]), float(settings_["overlap"])
    estimates = separate(model, golden["mixture"][0], "overlap-add", segment, overlap)
    error = (estimates - golden["estimate"][0]).norm() / golden["estimate"].norm()
    assert error < 1e-6
    # The golden whole-track output differs, so the match above says something.
    assert (estimates - golden["full_forward"][0]).norm() / golden["estimate"].norm() > 1e-3
    full = separate(model, golden["mixture"][0], "full")
    assert (full - golden["full_forward"][0]).norm() / full.norm() < 1e-6


@pytest.mark.smoke
@pytest.mark.parametrize("length", [1, 99, 100, 101, 999, 1099, 1100, 1101, 1200, 2200, 4321])
@pytest.mark.parametrize("overlap", [0, 0.001, 0.1, 0.9])
def test_an_identity_model_returns_the_mixture(length, overlap):
    # Where the overlap is a whole number of samples.
    mixture = torch.randn(2, length)
    estimates = separate(Identity(), mixture, segment=1.0, overlap=overlap)
    assert estimates.shape == (2, 2, length)
    torch.testing.assert_close(estimates, mixture.expand(2, 2, length), rtol=0, atol=1e-6)


def separate_as_published(model, mixture, segment: float, overlap: float) -> torch.Tensor:
    """The loop of the challenge's baseline, without its faults at the end of a song: a song of one
    window fades out, and one of whole windows gets a last window that lies in the one before.
    """
    rate, length = model.samplerate, mixture.shape[-1]
    chunk, shared = int(rate * segment * (1 + overlap)), overlap * rate
    fade, start, end, is_first = int(shared), 0, chunk, True
    ramp = torch.linspace(0, 1, fade)
    estimates = torch.zeros(model.C, *mixture.shape)
    while is_first or start < length - shared and end < length + chunk:
        window = forward(model, mixture[:, start:end]).clone()
        if not is_first:
            window[..., :fade] *= ramp
        if end < length:
            window[..., window.shape[-1] - fade :] *= 1 - ramp
        estimates[..., start:end] += window
        start += int(chunk - shared) if is_first else chunk
        end += chunk
        is_first = False
    return estimates


# Products of rate and overlap that are no whole numbers, though they may look like it.
@pytest.mark.parametrize(
    "rate, overlap",
    [(44100, 0.35), (44100, 0.123), (44100, 0.7), (44100, 0.07), (44100, 0.14), (11025, 0.1)],
)
def test_windows_are_those_of_the_published_loop(rate, overlap):
    model = random_model({**SMALL, "samplerate": rate})
    window = int(rate * 1.0 * (1 + overlap))
    for length in (window - 1, window + 1, 2 * window + 7, 3 * window - 1, 3 * window + 1):
        mixture = torch.randn(2, length)
        estimates = separate(model, mixture, "overlap-add", 1.0, overlap)
        expected = separate_as_published(model, mixture, 1.0, overlap)
        assert (estimates - expected).norm() < 1e-5 * expected.norm()


@settings(deadline=None, max_examples=100)
@given(
    length=st.integers(1, 5000),
    rate=st.integers(20, 1000),
    segment=st.floats(0.1, 3),
    share=st.floats(0, 0.95),
)
def test_windows_and_progress_are_those_of_the_published_loop(length, rate, segment, share):
    model, mixture, done = Identity(rate, audio_channels=1), torch.randn(1, length), []
    estimates = separate(model, mixture, "overlap-add", segment, share * segment, done.append)
    windows, model.shapes = model.shapes, []
    expected = separate_as_published(model, mixture, segment, share * segment)
    torch.testing.assert_close(estimates, expected, rtol=0, atol=1e-5)
    assert sum(done) == length
    assert len(done) == len(windows)
    assert windows == model.shapes


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(METHODS),
    sizes=st.lists(st.integers(0, 3000), max_size=5),
    overlap=st.sampled_from([0.0, 0.1, 0.123]),
    size=st.sampled_from([30, 1024]),
)
def test_a_track_in_blocks_is_separated_as_the_whole(method, sizes, overlap, size):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    mixture, done = torch.randn(2, sum(sizes)), []
    blocks = iter(mixture.split(sizes, dim=-1) if sizes else [mixture])
    with pytest.MonkeyPatch.context() as patch:
        set_tile_size(patch, size)
        expected = separate(model, mixture, method, 1.0, overlap)
        pieces = separate_blocks(model, blocks, method, 1.0, overlap, done.append)
        estimates = torch.cat(list(pieces), dim=-1)
    assert torch.equal(estimates, expected)
    assert not estimates.requires_grad
    assert sum(done) == sum(sizes)


@pytest.mark.parametrize("method", ["overlap-add", "stream"])
def test_estimates_come_before_the_track_has_ended(method):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    read = []

    def blocks():
        for number in range(40):
            read.append(number)
            yield torch.randn(2, 1000)

    pieces, done, held = separate_blocks(model, blocks(), method, 1.0), 0, []
    for piece in pieces:
        done += piece.shape[-1]
        held.append(1000 * len(read) - done)
    # A window, the block that shows that the song goes beyond it, and a tile.
    assert max(held) <= 1200 + 1000 + 4 * 1024


def test_windows_are_those_of_the_baseline():
    model = Identity()
    separate(model, torch.zeros(2, 3500), segment=1.0, overlap=0.1)
    assert [time for *_, time in model.shapes] == [1100, 1200, 1200, 300]


@pytest.mark.parametrize("length", [900, 1100, 2300, 3500, 4600, 5000, 9999])
def test_windows_in_batches_give_the_same(length, monkeypatch):
    """As where there is a GPU: equal windows together, the others alone."""
    mixture, model = torch.randn(2, length), Identity()
    expected, one_by_one = separate(model, mixture, segment=1.0), model.shapes
    monkeypatch.setattr(local.inference, "count_windows", lambda *args: 3)
    model, done = Identity(), []
    estimates = separate(model, mixture, segment=1.0, progress=done.append)
    assert torch.equal(estimates, expected)
    assert sum(done) == length
    windows = [(1, *shape) for batch, *shape in model.shapes for _ in range(batch)]
    assert windows == one_by_one
    assert max(batch for batch, *_ in model.shapes) == min(3, max(1, len(windows) - 2))


def test_an_input_shorter_than_a_window_is_what_the_model_returns():
    model = random_model(SMALL)
    for length in (50, 500, 1100):
        mixture = torch.randn(2, length)
        torch.testing.assert_close(separate(model, mixture, segment=1.0), forward(model, mixture))


@pytest.mark.parametrize("tile", [37, 1024], indirect=True)
@pytest.mark.parametrize(
    "name",
    ["noncausal_gln", "noncausal_cln", "noncausal_bn_softmax", "causal_cln", "causal_id_mono"],
)
def test_full_equals_the_published_model(name, tile):
    model, golden = load_golden_model(name)
    for mixture, expected in zip(golden["input"], golden["output"], strict=True):
        error = (separate(model, mixture, "full") - expected).norm() / expected.norm()
        assert error < 1e-6


@settings(deadline=None, max_examples=80)
@given(
    conf=model_confs(
        causal=st.booleans(), norm_type=st.sampled_from(NORM_TYPES), H=st.integers(2, 12)
    ),
    length=st.integers(0, 250),
    size=st.sampled_from([1, 2, 3, 10, 64, 1024]),
)
def test_full_is_the_plain_forward(conf, length, size):
    model, mixture = random_model(conf), torch.randn(conf["audio_channels"], length)
    with pytest.MonkeyPatch.context() as patch:
        set_tile_size(patch, size)
        estimates = separate(model, mixture, "full")
    assert_within_rounding(model, mixture, estimates)


# Dilations 1, 2, 4, 8 with five taps reach 16 frames to either side; a frame is 4 samples.
@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("norm_type, causal", list(itertools.product(NORM_TYPES, [True, False])))
def test_full_at_the_edges_of_tiles_and_dilations(frames, norm_type, causal, monkeypatch):
    model = random_model({**SMALL, "P": 5, "X": 4, "norm_type": norm_type, "causal": causal})
    for extra in (0, 3):
        mixture, estimates = torch.randn(2, 8 + 4 * (frames - 1) + extra), []
        for size in (1, 15, 16, 17, 32):
            set_tile_size(monkeypatch, size)
            estimates.append(separate(model, mixture, "full"))
        assert_within_rounding(model, mixture, *estimates)


@pytest.mark.parametrize("norm_type", ["gLN", "cLN"])
def test_rounding_does_not_excuse_a_slightly_wrong_formula(norm_type, monkeypatch):
    """A fault of a ten-thousandth of the output; what rounding is allowed is far below."""
    sizes = dict(N=24, L=8, B=16, H=32, X=3, R=2)
    model = random_model({**SMALL, **sizes, "norm_type": norm_type})
    mixture = torch.randn(2, 500)
    exact, allowed = allow_for_rounding(model, mixture)
    assert allowed < 5e-6 * exact.norm()
    assert_within_rounding(model, mixture, separate(model, mixture, "full"))
    with monkeypatch.context() as patch:
        patch.setattr(local.tasnet, "EPS", 4e-7)
        estimates = separate(model, mixture, "full")
    assert 3e-5 < (estimates - exact).norm() / exact.norm() < 3e-4
    with pytest.raises(AssertionError):
        assert_within_rounding(model, mixture, estimates)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [0, 1, 7, 8])
def test_songs_about_as_short_as_a_filter(method, length):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    mixture = torch.randn(2, length)
    torch.testing.assert_close(separate(model, mixture, method), forward(model, mixture))


@pytest.mark.parametrize("tile", [1, 50, 1024], indirect=True)
def test_stream_is_the_plain_forward(tile):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    mixture = torch.randn(2, 1001)
    estimates = separate(model, mixture, "stream")
    torch.testing.assert_close(estimates, forward(model, mixture))


@pytest.mark.parametrize(
    "method, causal", [("overlap-add", True), ("stream", True), ("full", True), ("full", False)]
)
@pytest.mark.parametrize("length", [0, 5, 999, 5000])
def test_progress_adds_up_to_the_song(method, causal, length):
    model, done = random_model({**SMALL, "causal": causal, "norm_type": "cLN"}), []
    separate(model, torch.randn(2, length), method, 1.0, 0.1, done.append)
    assert sum(done) == length


@pytest.mark.parametrize("method", METHODS)
def test_the_result_stays_with_the_mixture_and_keeps_no_graph(method):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    estimates = separate(model, torch.randn(2, 2500).double(), method, 1.0)
    assert estimates.dtype == torch.float64
    assert not estimates.requires_grad


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
def test_an_array_gives_an_array(method):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    songs = np.random.default_rng(0).standard_normal((2500, 2)).astype(np.float32)
    read_only = songs.copy()
    read_only.flags.writeable = False
    for song in (songs.T, songs[::-1, ::-1].T, read_only.T, songs.T.astype(np.float64)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            estimates = separate(model, song, method, 1.0)
        assert isinstance(estimates, np.ndarray) and estimates.dtype == song.dtype
        expected = separate(model, torch.tensor(song.copy()), method, 1.0)
        np.testing.assert_array_equal(estimates, expected.numpy())
    with pytest.raises(ValueError, match=r"expected \(2, time\), got \(2500, 2\)"):
        separate(model, songs, method)
    with pytest.raises(ValueError, match="floating-point"):
        separate(model, songs.T.astype(np.int16), method)


@pytest.mark.parametrize("method", METHODS)
def test_loud_and_silent_songs_give_numbers(method):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    for scale in (0.0, 1e-12, 1e4):
        assert separate(model, scale * torch.randn(2, 3000), method, 1.0).isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4])
def test_gln_of_loud_and_silent_songs(scale):
    model, mixture = random_model({**SMALL, "norm_type": "gLN"}), scale * torch.randn(2, 3000)
    assert_within_rounding(model, mixture, separate(model, mixture, "full"))


@pytest.mark.parametrize("method, fast", [*itertools.product(METHODS, ["yes"]), ("full", "no")])
def test_bf16_is_near_float32_and_float32_is_the_default(method, fast, with_bf16):
    torch.manual_seed(0)
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    mixture = torch.randn(2, 700)
    exact, short = (
        separate(model, mixture, method, 0.3, 0.1, fast=fast, precision=precision)
        for precision in ("float32", "bf16")
    )
    assert exact.dtype == short.dtype == torch.float32
    assert torch.equal(exact, separate(model, mixture, method, 0.3, 0.1, fast=fast))
    assert 1e-4 < (short - exact).norm() / exact.norm() < 0.03


def test_what_takes_the_pieces_has_its_own_precision(with_bf16):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    for _ in separate_blocks(model, torch.randn(2, 700).split(100, 1), "stream", precision="bf16"):
        assert not torch.is_autocast_enabled("cpu")


def test_bf16_is_refused_where_the_cpu_has_none(monkeypatch):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    with pytest.raises(ValueError, match="no bf16 instructions in this CPU"):
        separate(model, torch.randn(2, 100), precision="bf16")
    with pytest.raises(ValueError, match="no bf16 instructions in this CPU"):
        StreamingConvTasNet(model, "bf16")
    with pytest.raises(ValueError, match="precision must be one of float32, bf16"):
        separate(model, torch.randn(2, 100), precision="bf17")


@pytest.mark.parametrize("norm_type, causal", [("gLN", False), ("cLN", True)])
def test_full_under_autocast_is_near_the_plain_forward_under_autocast(norm_type, causal):
    """As where training validates in bf16-mixed."""
    model = random_model({**SMALL, "norm_type": norm_type, "causal": causal})
    mixture = torch.randn(2, 3000)
    exact = forward(model, mixture)
    with torch.autocast("cpu", torch.bfloat16):
        estimates, plain = separate(model, mixture, "full"), forward(model, mixture)
    assert estimates.dtype == torch.float32
    assert (estimates - exact).norm() < max(2 * (plain - exact).norm(), 1e-2 * exact.norm())


MEMORY = f"""
import sys, torch
sys.path.insert(0, sys.argv[1])
from local.inference import separate
from local.tasnet import ConvTasNetStereo
torch.set_num_threads(1)
method, causal, seconds = sys.argv[2], sys.argv[3] == "causal", int(sys.argv[4])
norm_type = "cLN" if causal else "gLN"
model = ConvTasNetStereo(
    N=16, L=20, B=16, H=64, X=int(sys.argv[5]), R=1, C=2, causal=causal, norm_type=norm_type
).eval()
separate(model, torch.zeros(1, 44100), method)  # what is paid once
mixture = torch.zeros(1, 44100 * seconds).normal_()
peak = lambda: {PEAK_MB}
before = peak()
estimates = separate(model, mixture, method)
print(peak() - before - estimates.nbytes / 2**20)
"""


def megabytes(method: str, kind: str, seconds: int, blocks: int) -> float:
    """Peak memory of a separation beyond its input and output, in a process of its own."""
    result = run_python("-c", MEMORY, ROOT, method, kind, seconds, blocks, own_process=True)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@linux
def test_memory_of_stream_does_not_grow_with_the_song():
    # The hidden channels of 100 s alone would be 108 MB.
    assert megabytes("stream", "causal", 100, 4) < megabytes("stream", "causal", 30, 4) + 15


@linux
def test_memory_of_full_is_that_of_two_tensors_at_any_depth():
    # 60 s: residual 16.1 MB, hidden channels 64.6 MB.
    for blocks in (2, 8):
        assert megabytes("full", "non-causal", 60, blocks) < 81 + 20


@pytest.mark.parametrize(
    "segment, overlap",
    [(1.0, 1.2), (1.0, -0.1), (0.0, 0.0), (-1, 0), (float("inf"), 0.1), (1e308, 1)],
)
def test_invalid_settings(segment, overlap):
    with pytest.raises(ValueError, match="expected 0 <= overlap < segment"):
        separate(Identity(), torch.zeros(2, 100), "overlap-add", segment, overlap)


def test_a_segment_longer_than_any_song_is_one_window():
    mixture = torch.randn(2, 100)
    assert torch.equal(separate(Identity(), mixture, segment=9e8, overlap=8e8)[0], mixture)


def test_a_segment_shorter_than_the_filter():
    model = random_model(SMALL)
    separate(model, torch.zeros(2, 100), segment=0.008, overlap=0)
    with pytest.raises(ValueError, match=r"segment must be at least 0\.008000 seconds"):
        separate(model, torch.zeros(2, 100), segment=0.0079, overlap=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "mixture, message",
    [
        (torch.zeros(3, 50), r"expected \(2, time\), got \(3, 50\)"),
        (torch.zeros(50), r"got \(50,\)"),
        (torch.zeros(1, 2, 50), r"got \(1, 2, 50\)"),
        (torch.zeros(2, 50, dtype=torch.int16), "floating-point samples, got torch.int16"),
        (torch.zeros(2, 50, dtype=torch.complex64), "floating-point samples, got torch.complex64"),
        (torch.full((2, 50), torch.nan), "NaN or infinity"),
        (torch.full((2, 50), -torch.inf), "NaN or infinity"),
    ],
)
def test_invalid_mixtures(method, mixture, message):
    model = random_model({**SMALL, "causal": True, "norm_type": "cLN"})
    with pytest.raises(ValueError, match=message):
        separate(model, mixture, method)


def test_invalid_methods():
    with pytest.raises(
        ValueError, match="method must be one of overlap-add, full, stream, got 'x'"
    ):
        separate(random_model(SMALL), torch.zeros(2, 50), "x")
    with pytest.raises(ValueError, match="only a causal model with norm_type cLN, BN or id"):
        separate(random_model(SMALL), torch.zeros(2, 50), "stream")
