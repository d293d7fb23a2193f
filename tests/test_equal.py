"""Edits of the model, in the file or in a notebook: training and inference must follow them all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import forward, model_confs, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from local import tasnet
from local.fast import equal
from local.fast.choose import choose_fast, choose_forward, describe_fast
from local.fast.equal import find_difference
from local.inference import separate
from local.streaming import StreamingConvTasNet
from local.tasnet import NORM_TYPES, ConvTasNetStereo
from local.tools.random_states import get_random_states

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(N=12, L=8, B=8, H=12, P=3, X=3, R=2, C=2, audio_channels=2, samplerate=1000)
TRAINING = {"memory": "some", "compile": "no", "fast": "auto"}


def make_model(**changes) -> ConvTasNetStereo:
    return random_model({**SMALL, **changes})


def edit(patch, thing, name: str, make) -> None:
    """Replaces a function by what `make` makes of it."""
    patch.setattr(thing, name, make(getattr(thing, name)))


def add_gate(patch) -> None:
    """A gate that starts closed, so that at first nothing is different."""

    def with_gate(init):
        def make(block, *args):
            init(block, *args)
            block.gate = nn.Parameter(torch.zeros(1))

        return make

    edit(patch, tasnet.TemporalBlock, "__init__", with_gate)
    edit(
        patch,
        tasnet.TemporalBlock,
        "forward",
        lambda original: lambda block, hidden: original(block, hidden) + block.gate * hidden,
    )


def replace_with_subclass(model: nn.Module) -> None:
    class Block(tasnet.TemporalBlock):
        pass

    model.separator.network[2][0][1].__class__ = Block


CLASSES = {  # before the model is made, as in the file
    "block": (tasnet.TemporalBlock, lambda f: lambda block, x: x + 0.5 * block.net(x)),
    "norm": (tasnet.ChannelwiseLayerNorm, lambda f: lambda norm, x: f(norm, x).tanh()),
    "encoder": (tasnet.Encoder, lambda f: lambda encoder, x: encoder.conv1d_U(x).abs()),
    "decoder": (tasnet.Decoder, lambda f: lambda decoder, w, m: f(decoder, w, 0.9 * m + 0.1)),
    "mask": (tasnet.TemporalConvNet, lambda f: lambda net, x: f(net, x).clamp(max=1)),
    "clipping": (tasnet.ConvTasNetStereo, lambda f: lambda model, x: f(model, x).clamp(-1, 1)),
    "dropout": (
        tasnet.TemporalBlock,
        lambda f: lambda block, x: x + F.dropout(block.net(x), 0.1, block.training),
    ),
}
MODELS = {  # on the model that was made, as in train.py
    "subclass": replace_with_subclass,
    "hook": lambda model: model.separator.register_forward_hook(lambda *args: args[-1] * 0.5),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.decoder.basis_signals),
    "own forward": lambda model: setattr(model.encoder, "forward", model.encoder.conv1d_U),
    "other activation": lambda model: setattr(
        model.separator.network[2][0][0].net, "1", nn.Softplus()
    ),
    "circular padding": lambda model: vars(model.separator.network[2][1][2].net[3].net[0]).update(
        padding_mode="circular", _reversed_padding_repeated_twice=[4, 4]
    ),
}


@pytest.fixture(params=[*CLASSES, "gate", *MODELS])
def edited(request, monkeypatch) -> ConvTasNetStereo:
    name = request.param
    if name in CLASSES:
        thing, make = CLASSES[name]
        edit(monkeypatch, thing, "forward", make)
    if name == "gate":
        add_gate(monkeypatch)
    model = make_model()
    if name in MODELS:
        MODELS[name](model)
    return model


@pytest.mark.smoke
def test_an_edited_model_trains_and_separates_as_edited(edited):
    assert find_difference(edited, training=True)
    mixture, device = torch.randn(2, 1500), torch.device("cpu")
    expected = forward(edited, mixture)
    assert torch.equal(separate(edited, mixture, "full"), expected)
    assert torch.equal(separate(edited, mixture, segment=2.0), expected)  # in one window
    edited.train()
    separate_segments, _ = choose_forward(edited, TRAINING, device)
    losses = []
    for run in (edited, separate_segments):
        torch.manual_seed(0)
        losses.append(run(mixture[None]).abs().mean())
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="fast path differs from the model"):
        choose_fast(edited, "yes", training=True)
    assert "the model itself" in describe_fast(edited, "auto", training=True)


def test_an_edited_causal_model_cannot_be_streamed(monkeypatch):
    edit(monkeypatch, *CLASSES["block"][:1], "forward", CLASSES["block"][1])
    model = make_model(causal=True, norm_type="cLN")
    for attempt in (
        lambda: StreamingConvTasNet(model),
        lambda: separate(model, torch.zeros(2, 100), "stream"),
    ):
        with pytest.raises(ValueError, match="not this one: outputs .* difference of"):
            attempt()


def test_a_model_that_mixes_the_items_of_a_batch_is_different(monkeypatch):
    monkeypatch.setattr(tasnet.GlobalLayerNorm, "dims", (0, 1, 2))
    assert "outputs" in find_difference(make_model())


def test_a_hook_for_all_modules_is_found():
    model = make_model()
    assert not find_difference(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert "hooks" in find_difference(model)
    finally:
        handle.remove()
    assert not find_difference(model)


def test_what_cannot_be_run_or_copied_counts_as_different(monkeypatch, tmp_path):
    model = make_model()
    with open(tmp_path / "file", "w") as model.log:
        assert "comparing them raises TypeError" in find_difference(model)

    def fail(*args):
        raise KeyError("width")

    monkeypatch.setattr(ConvTasNetStereo, "forward", fail)
    assert "comparing them raises KeyError: 'width'" in find_difference(make_model())


@pytest.mark.parametrize("name", ["Chomp", "GlobalLayerNorm", "TemporalBlock"])
def test_a_file_without_some_of_its_classes_still_works(monkeypatch, name):
    model = make_model(causal=True, norm_type="cLN")
    monkeypatch.delattr(tasnet, name)
    mixture = torch.randn(2, 300)
    assert torch.equal(separate(model, mixture, "full"), forward(model, mixture))


@settings(deadline=None, max_examples=25)
@given(
    # With fewer channels a norm divides nothing by nothing.
    conf=model_confs(
        **{size: st.integers(4, 12) for size in "NBH"},
        causal=st.booleans(),
        norm_type=st.sampled_from(NORM_TYPES),
    )
)
def test_the_unedited_model_equals_the_fast_path(conf):
    assert find_difference(random_model(conf), training=True) == ""


def test_the_check_changes_nothing(monkeypatch):
    edit(monkeypatch, *CLASSES["dropout"][:1], "forward", CLASSES["dropout"][1])
    model = make_model(norm_type="BN").train()
    state, device = copy.deepcopy(model.state_dict()), torch.device("cpu")
    before = get_random_states(device)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as in validation
        assert "random numbers" in find_difference(model, training=True)
    after = get_random_states(device)
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_numbers_are_compared_once_for_an_architecture(monkeypatch):
    calls = []

    def count(model, training):
        calls.append(training)
        return ""

    monkeypatch.setattr(equal, "find_numerical_difference", count)
    monkeypatch.setattr(equal, "_differences", {})
    for model in (make_model(), make_model()):
        find_difference(model, training=True)
        find_difference(model)  # which training includes
    assert calls == [True]
    find_difference(make_model(H=16))
    model.separator.mask_nonlinear = "softmax"
    find_difference(model)
    monkeypatch.setattr(tasnet, "EPS", 1e-6)
    find_difference(model)
    assert calls == [True, False, False, False]


def test_fast_must_be_one_of_three():
    with pytest.raises(ValueError, match="auto, yes, no"):
        choose_fast(make_model(), "maybe")
    assert choose_fast(make_model(), "yes")
    assert not choose_fast(make_model(), "no")
