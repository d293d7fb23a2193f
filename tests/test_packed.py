import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import local.fast.packed
import local.tools.private
from local.fast.packed import PackedLinear, find_packable
from local.tools.private import pack_linear

pytestmark = pytest.mark.usefixtures("one_thread")
sizes = st.integers(1, 70)
# Of a dtype: that of a sum of products, in terms of the sum of their magnitudes.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-14, torch.bfloat16: 2**-8}


def assert_product(linear: PackedLinear, rows, weight, slope, dtype):
    found = linear(rows)
    exact = [x.to(dtype).double() for x in (rows, weight)]
    expected = F.leaky_relu(F.linear(*exact), slope)
    assert found.dtype == dtype
    limit = ROUNDING[dtype] * F.linear(*(x.abs() for x in exact)) * max(1, abs(slope))
    assert ((found - expected).abs() <= limit).all()


@settings(deadline=None, max_examples=100)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    inputs=sizes,
    outputs=sizes,
    slope=st.sampled_from([1.0, 0.25, 0.0, -0.5, 3.0]),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_is_a_product_and_prelu(shape, inputs, outputs, slope, dtype):
    own = torch.float64 if dtype == torch.float64 else torch.float32
    weight, rows = torch.randn(outputs, inputs, dtype=own), torch.randn(*shape, inputs, dtype=own)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
        assert_product(PackedLinear(weight, slope), rows, weight, slope, dtype)


def test_which_products_are_packed():
    weight = torch.randn(6, 5)
    has_onednn = torch.backends.mkldnn.is_available()
    assert PackedLinear(weight).is_packed == has_onednn
    with torch.autocast("cpu", torch.bfloat16):
        assert PackedLinear(weight).is_packed == has_onednn
    assert not PackedLinear(weight.double()).is_packed


def test_operators_that_compute_something_else_are_not_used(monkeypatch):
    def pack_wrongly(weight, slope):
        return pack_linear((1 + 1e-3) * weight, slope)

    monkeypatch.setattr(local.fast.packed, "pack_linear", pack_wrongly)
    assert torch.float32 not in find_packable.__wrapped__()


def test_without_the_operators_of_onednn_it_is_the_same(monkeypatch):
    weight, rows = torch.randn(6, 5), torch.randn(7, 5)
    monkeypatch.setattr(local.tools.private, "PACKED", ("_gone",))
    monkeypatch.setattr(local.fast.packed, "find_packable", find_packable.__wrapped__)
    for slope in (1.0, 0.25):
        linear = PackedLinear(weight, slope)
        assert not linear.is_packed
        assert_product(linear, rows, weight, slope, torch.float32)
