from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from local.fast.rows import GlobalNorm, LocalNorm, RowDepthwise, RowModel
from local.tasnet import ConvTasNetStereo, GlobalLayerNorm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("L", [2, 3, 7, 16])
@pytest.mark.parametrize("mask", ["relu", "softmax"])
def test_encoder_and_decoder_are_those_of_the_model(L, mask):
    model = ConvTasNetStereo(
        N=6, L=L, B=4, H=5, X=1, R=1, C=3, audio_channels=2, mask_nonlinear=mask
    ).eval()
    rows, mixture = RowModel(model), torch.randn(2, 2, 50)
    weights = rows.encode(mixture)
    torch.testing.assert_close(weights.transpose(1, 2), model.encoder(mixture))
    assert weights.shape[1] == rows.count_frames(50)
    residual = torch.randn(2, weights.shape[1], 4)
    scores = model.separator.network[3](residual.transpose(1, 2)).unflatten(1, (3, 6))
    masks = scores.softmax(1) if mask == "softmax" else scores.relu()
    expected = model.decoder(model.encoder(mixture), masks)
    torch.testing.assert_close(rows.decode(weights, residual), expected)


@pytest.mark.parametrize("time, frames", [(0, 0), (7, 0), (8, 1), (11, 1), (12, 2), (100, 24)])
def test_frames_are_counted_as_the_encoder_does(time, frames):
    model = ConvTasNetStereo(N=4, L=8, B=4, H=4, X=1, R=1).eval()
    assert RowModel(model).count_frames(time) == frames
    if frames:
        assert model.encoder(torch.randn(1, 1, time)).shape[-1] == frames


@settings(deadline=None, max_examples=100)
@given(
    P=st.sampled_from([1, 3, 5]),
    dilation=st.integers(1, 9),
    causal=st.booleans(),
    splits=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    kept=st.sampled_from([0, 5, 256]),
)
def test_any_split_of_the_rows_gives_the_convolution(P, dilation, causal, splits, kept):
    reach, frames = (P - 1) * dilation, sum(splits)
    padding = reach if causal else reach // 2
    conv = nn.Conv1d(3, 3, P, dilation=dilation, padding=padding, groups=3, bias=False)
    rows, depthwise = torch.randn(2, frames, 3), RowDepthwise(conv)
    with patch("local.fast.rows.MOST_KEPT", kept):
        pushed = rows.split(splits, 1)
        pieces = [depthwise.push(piece, LocalNorm(nn.Identity())) for piece in pushed]
    result = torch.cat([*pieces, depthwise.finish()], 1)
    before, after = padding, reach - padding
    padded = F.pad(rows.transpose(1, 2), (before, after))
    conv.padding = (0,)
    expected = conv(padded) if frames else padded[..., :0]
    torch.testing.assert_close(result.transpose(1, 2), expected)


def test_a_global_norm_over_tiles_is_gln():
    norm = GlobalLayerNorm(7)
    nn.init.normal_(norm.gamma), nn.init.normal_(norm.beta)
    rows, tiled = torch.randn(500, 7) + 3, GlobalNorm(norm)
    for tile in rows.split(64):
        assert tiled.observe(tile) is tile
    out = torch.empty_like(rows)
    tiled.write(rows, out)
    torch.testing.assert_close(out, norm(rows.t()[None])[0].t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-3, 1e3])
def test_a_constant_has_no_negative_variance(value):
    tiled = GlobalNorm(GlobalLayerNorm(5))
    for _ in range(3):
        tiled.observe(torch.full((20000, 5), value))
    mean, scale = tiled.moments()
    assert mean == pytest.approx(value, rel=1e-6)
    assert 0 < scale <= 1e4 * (1 + 1e-6)  # 1 / sqrt(EPS), of a variance of zero


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"eval mode; call model\.eval\(\) first"):
        RowModel(ConvTasNetStereo(N=4, L=8, B=4, H=4, X=1, R=1))
