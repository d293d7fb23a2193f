import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import model_confs, random_model, slow
from hypothesis import given, settings
from hypothesis import strategies as st

from local.fast.choose import find_compiler_fault
from local.fast.training import TrainingForward
from local.tasnet import NORM_TYPES, ConvTasNetStereo
from local.tools.choices import MEMORY

pytestmark = pytest.mark.usefixtures("one_thread")

MEDIUM = dict(N=24, L=8, B=16, H=32, P=3, X=3, R=2, C=2, audio_channels=2)
DIRECTIONS = [pytest.param(False, id="non-causal"), pytest.param(True, id="causal")]


def make_model(norm_type: str, causal: bool = False, **sizes) -> ConvTasNetStereo:
    return random_model({**MEDIUM, **sizes, "norm_type": norm_type, "causal": causal}).train()


def make_batch(model: ConvTasNetStereo, items: int = 3, time: int = 500):
    mixture = torch.randn(items, model.audio_channels, time)
    targets = torch.randn(items, model.C, model.audio_channels, time)
    dtype = next(model.parameters()).dtype
    return mixture.to(dtype), targets.to(dtype)


def run(model: ConvTasNetStereo, batch, memory: str | None = None, compiled: bool = False):
    """Estimates, loss and gradients of the plain forward, or of the one for training."""
    mixture, targets = batch
    model = copy.deepcopy(model)
    separate = TrainingForward(model, memory, compiled) if memory else model
    estimates = separate(mixture)
    loss = F.l1_loss(estimates, targets)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "estimates": estimates.detach(),
        "loss": loss.detach(),
        "gradients": torch.cat([gradient.flatten() for gradient in gradients.values()]),
        **gradients,
        **dict(model.named_buffers()),
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("causal", DIRECTIONS)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_float32_agrees_with_the_plain_model(norm_type, causal, memory):
    model = make_model(norm_type, causal)
    batch = make_batch(model)
    expected, found = run(model, batch), run(model, batch, memory)
    for name in ("estimates", "loss", "gradients"):
        assert found[name].dtype == torch.float32
        assert error(found[name], expected[name]) < 1e-5, name
    for name in dict(model.named_buffers()):  # the statistics of BN
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    # With fewer channels a norm divides nothing by nothing, and rounding decides on signs.
    conf=model_confs(
        **{size: st.integers(4, 12) for size in "NBH"},
        causal=st.booleans(),
        norm_type=st.sampled_from(NORM_TYPES),
    ),
    memory=st.sampled_from(MEMORY),
    items=st.integers(1, 3),
    time=st.integers(50, 200),
)
def test_float64_agrees_with_the_plain_model_at_any_size(conf, memory, items, time):
    model = random_model(conf).double().train()
    batch = make_batch(model, items, time)
    expected, found = run(model, batch), run(model, batch, memory)
    # Where a norm has next to nothing to normalise, even float64 is rounded visibly.
    largest = expected["gradients"].abs().max()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6 * float(largest))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_bf16_is_as_near_to_float32_as_the_plain_model_under_autocast(norm_type, memory):
    model = make_model(norm_type, norm_type == "cLN")
    batch = make_batch(model)
    expected = run(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = run(model, batch), run(model, batch, memory)
    assert found["estimates"].dtype == torch.float32
    for name in ("estimates", "gradients"):
        assert 1e-4 < error(found[name], expected[name]) < 1.5 * error(plain[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_silence_gives_no_nan(norm_type, dtype):
    model = make_model(norm_type)
    mixture, targets = make_batch(model)
    mixture[1:] = 0
    for batch in (mixture, targets), (torch.zeros_like(mixture), torch.zeros_like(targets)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = run(model, batch, "some")
        assert all(value.isfinite().all() for value in found.values())


def test_more_recomputing_saves_fewer_tensors():
    model = make_model("cLN", X=8)
    mixture, _ = make_batch(model)

    def count_saved(separate) -> int:
        saved = {}  # by storage: the graph names many tensors twice

        def note(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            estimates = separate(mixture)
        assert estimates.requires_grad
        return sum(saved.values())

    plain, none, some = (
        count_saved(separate)
        for separate in (model, TrainingForward(model, "none"), TrainingForward(model, "some"))
    )
    frames = (mixture.shape[-1] - 8) // 4 + 1
    hidden, residual = (4 * 3 * frames * channels * 16 for channels in (32, 16))  # of 16 blocks
    assert none - some == 2 * hidden
    assert residual < some < plain / 4
    assert none < plain / 2


def test_most_recomputes_a_repeat_at_a_time():
    model = make_model("id", X=8)
    mixture, targets = make_batch(model)
    calls = []
    separate = TrainingForward(model, "most")

    def count(name):
        run = getattr(separate._passes, name)

        def counted(*args):
            calls.append(name)
            return run(*args)

        return counted

    names = ["forward", "backward_in"]
    separate._passes = separate._passes._replace(**{name: count(name) for name in names})
    F.l1_loss(separate(mixture), targets).backward()
    assert calls == ["forward"] * 16 + (["forward"] * 8 + ["backward_in"] * 8) * 2


def test_two_passes_before_their_gradients_do_not_mix():
    model = make_model("gLN")
    batches = [make_batch(model), make_batch(model, time=900)]
    expected = sum(run(model, batch)["gradients"] for batch in batches)
    separate = TrainingForward(model)
    losses = [F.l1_loss(separate(mixture), targets) for mixture, targets in batches]
    for loss in losses:
        loss.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("memory", MEMORY)
def test_the_same_graph_can_be_walked_twice(memory):
    model = make_model("cLN")
    batch = make_batch(model)
    expected = run(model, batch)["gradients"]
    loss = F.l1_loss(TrainingForward(model, memory)(batch[0]), batch[1])
    loss.backward(retain_graph=True)
    loss.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert error(found, 2 * expected) < 1e-5


def test_a_few_hundred_steps_give_the_same_curve():
    torch.manual_seed(3)
    mixtures, targets = torch.randn(20, 2, 2, 300), torch.randn(20, 2, 2, 2, 300)
    curves = []
    for fast in (False, True):
        model = make_model("gLN", N=8, B=6, H=10, X=2)
        separate = TrainingForward(model) if fast else model
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        curve = []
        for step in range(300):
            loss = F.l1_loss(separate(mixtures[step % 20]), targets[step % 20])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    plain, fast = curves
    assert plain[-20:].mean() < 0.98 * plain[:20].mean()  # it learns
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=0)


def test_bf16_learns():
    torch.manual_seed(3)
    model = make_model("gLN", N=16, B=8, H=16, X=2)
    mixture = torch.randn(2, 2, 400)
    targets = torch.stack([0.8 * mixture, 0.2 * mixture], dim=1)
    separate, optimizer = TrainingForward(model), torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.l1_loss(separate(mixture), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


COMPILED = [("gLN", "some"), ("cLN", "some"), ("BN", "most"), ("id", "none")]


@pytest.mark.parametrize(
    ("norm_type", "memory"),
    [COMPILED[0], *(pytest.param(*case, marks=slow) for case in COMPILED[1:])],
)
def test_compiled_agrees_with_the_plain_model(norm_type, memory, two_threads):
    device = torch.device("cpu")
    if fault := find_compiler_fault(device):
        pytest.skip(f"torch.compile does not work here: {fault}")
    model = make_model(norm_type, R=1, X=3)
    batch = make_batch(model)
    expected, found = run(model, batch), run(model, batch, memory, compiled=True)
    for name in ("estimates", "loss", "gradients"):
        assert error(found[name], expected[name]) < 1e-5, name
    for name in dict(model.named_buffers()):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_memory_must_be_one_of_three():
    with pytest.raises(ValueError, match="none, some, most"):
        TrainingForward(make_model("gLN"), "all")


def test_frozen_statistics_of_bn_are_used():
    model = make_model("BN")
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.eval()
    batch = make_batch(model)
    expected, found = run(model, batch), run(model, batch, "some")
    for name in ("estimates", "gradients"):
        assert torch.equal(found[name], expected[name])
