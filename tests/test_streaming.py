import pytest
import torch
from conftest import (
    forward,
    load_golden_model,
    model_confs,
    random_model,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rounding import assert_within_rounding

import local.streaming
from local.streaming import StreamingConvTasNet
from local.tasnet import ConvTasNetStereo

pytestmark = pytest.mark.usefixtures("one_thread")

# Of an almost constant frame, whose rounding cLN amplifies a thousandfold.
CONSTANT = dict(N=10, L=6, B=4, H=11, P=1, X=3, R=1, C=1, audio_channels=1, mask_nonlinear="relu")
SMALL = dict(N=12, L=8, B=8, H=12, P=3, X=3, R=2, C=2, audio_channels=2, causal=True)


def make_model(**kwargs) -> ConvTasNetStereo:
    return random_model({**SMALL, "norm_type": "cLN", **kwargs})


def stream(model, mixture, splits=None) -> torch.Tensor:
    engine = StreamingConvTasNet(model)
    blocks = mixture.split(splits, dim=-1) if splits else [mixture]
    return torch.cat([*(engine.push(block) for block in blocks), engine.flush()], dim=-1)


def assert_same(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["causal_cln", "causal_id_mono"])
@pytest.mark.parametrize("size", [61, 10**6])
def test_equals_the_published_model(name, size):
    model, golden = load_golden_model(name)
    assert_same(stream(model, golden["input"], size), golden["output"])


@settings(deadline=None, max_examples=60)
@given(
    conf=model_confs(causal=st.just(True), norm_type=st.sampled_from(["cLN", "BN", "id"])),
    splits=st.lists(st.sampled_from([0, 1, 2, 3, 10, 29, 150]), min_size=1, max_size=30),
)
@example(conf={**CONSTANT, "causal": True, "norm_type": "id"}, splits=[3, 3])
def test_any_split_gives_the_whole_forward(conf, splits):
    model = random_model(conf)
    mixture = torch.randn(conf["audio_channels"], sum(splits))
    assert_within_rounding(model, mixture, stream(model, mixture, splits))


@pytest.mark.smoke
@pytest.mark.parametrize("tile", [1, 3, 1000])
def test_a_long_block_goes_through_in_tiles(tile, monkeypatch):
    monkeypatch.setattr(local.streaming, "tile_size", lambda device: tile)
    model, mixture = make_model(), torch.randn(2, 500)
    assert_same(stream(model, mixture), forward(model, mixture))


@pytest.mark.parametrize("time", [0, 1, 7, 8, 9, 11, 12])
def test_inputs_about_as_short_as_a_filter(time):
    model, mixture = make_model(), torch.randn(2, time)
    assert_same(stream(model, mixture, [1] * time), forward(model, mixture))


@pytest.mark.parametrize("cut", [5, 40, 41, 333])
def test_what_was_returned_is_final(cut):
    """Later input does not change it, and a later push does not write to it."""
    model = make_model()
    past, futures = torch.randn(2, cut), torch.randn(2, 2, 300) * 100
    returned = []
    for future in futures:
        engine = StreamingConvTasNet(model)
        first = engine.push(past)
        copy = first.clone()
        engine.push(future)
        assert torch.equal(first, copy)
        returned.append(first)
        whole = forward(model, torch.cat([past, future], 1))
        assert_same(first, whole[..., : first.shape[-1]])
    assert torch.equal(*returned)


@pytest.mark.parametrize("L", [2, 3, 8, 9])
def test_latency_is_the_most_that_the_output_lags(L):
    engine = StreamingConvTasNet(make_model(L=L))
    given = got = most = 0
    for block in torch.randn(2, 60).split(1, dim=-1):
        given, got = given + 1, got + engine.push(block).shape[-1]
        most = max(most, given - got)
    assert engine.latency == most == L - 1


def test_a_batch_dimension_is_passed_through():
    model, mixtures = make_model(), torch.randn(3, 2, 200)
    engine = StreamingConvTasNet(model)
    pushed = [engine.push(block) for block in mixtures.split(33, dim=-1)]
    estimates = torch.cat([*pushed, engine.flush()], dim=-1)
    with torch.no_grad():
        assert_same(estimates, model(mixtures))


def test_reset_begins_another_mixture():
    model, mixture = make_model(), torch.randn(2, 333)
    engine = StreamingConvTasNet(model)
    engine.push(torch.randn(5, 2, 123))  # of another batch size even
    engine.reset()
    first = torch.cat([engine.push(mixture), engine.flush()], -1)
    engine.reset()
    assert torch.equal(first, torch.cat([engine.push(mixture), engine.flush()], -1))
    assert_same(first, forward(model, mixture))


def test_the_state_is_small_and_stays_where_it_is():
    engine = StreamingConvTasNet(make_model())
    block = torch.randn(2, 40)  # 10 frames
    for _ in range(3):
        assert not engine.push(block).requires_grad
    buffers = [layer.depthwise._buffer for layer in engine._rows.blocks]
    for _ in range(20):
        engine.push(block)
    for layer, buffer in zip(engine._rows.blocks, buffers, strict=True):
        assert layer.depthwise._buffer is buffer
    # Twice (P - 1) * dilation rows of H channels per block, and the new ones; L - 1 samples in,
    # L - L // 2 out.
    rows = (2 * 2 * (1 + 2 + 4) + 3 * 10) * SMALL["R"] * SMALL["H"]
    assert engine.state_size == 4 * (rows + 2 * (8 - 1) + 2 * 2 * (8 - 4))


def test_estimates_can_be_part_of_a_graph():
    engine, weight = StreamingConvTasNet(make_model()), torch.ones(1, requires_grad=True)
    for estimates in (engine.push(torch.randn(2, 100)), engine.flush()):
        (estimates * weight).sum().backward()
    assert weight.grad.isfinite().all()


def test_estimates_are_of_the_models_dtype():
    engine = StreamingConvTasNet(make_model())
    assert engine.push(torch.randn(2, 100).double()).dtype == torch.float32


@pytest.mark.parametrize("kwargs", [{"causal": False}, {"norm_type": "gLN"}])
@pytest.mark.filterwarnings("ignore:causal with norm_type gLN")
def test_models_that_cannot_be_streamed(kwargs):
    with pytest.raises(ValueError, match="only a causal model with norm_type cLN, BN or id"):
        StreamingConvTasNet(make_model(**kwargs))


@pytest.mark.parametrize(
    "block, message",
    [
        (torch.zeros(5), r"expected \(2, time\) or \(batch, 2, time\), got \(5,\)"),
        (torch.zeros(1, 5), r"got \(1, 5\)"),
        (torch.zeros(1, 1, 2, 5), "expected"),
        (torch.zeros(2, 5, dtype=torch.int16), "floating-point samples, got torch.int16"),
        (torch.zeros(2, 5, dtype=torch.complex64), "floating-point samples, got torch.complex64"),
        (torch.full((2, 5), torch.nan), "NaN or infinity"),
        (torch.full((2, 5), torch.inf), "NaN or infinity"),
        (torch.zeros(4, 2, 5), r"expected \(2, time\) .*got \(4, 2, 5\)"),
    ],
)
def test_invalid_blocks_do_not_change_the_state(block, message):
    model, mixture = make_model(), torch.randn(2, 100)
    engine = StreamingConvTasNet(model)
    first = engine.push(mixture[:, :50])
    with pytest.raises(ValueError, match=message):
        engine.push(block)
    estimates = torch.cat([first, engine.push(mixture[:, 50:]), engine.flush()], -1)
    assert_same(estimates, forward(model, mixture))


def test_nothing_comes_after_flush_but_reset():
    engine = StreamingConvTasNet(make_model())
    engine.flush()
    for again in (lambda: engine.push(torch.zeros(2, 1)), engine.flush):
        with pytest.raises(ValueError, match=r"ended with flush\(\); call reset\(\)"):
            again()
