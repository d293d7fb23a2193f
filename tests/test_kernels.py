"""The Triton kernels, held to the plain passes of a block and to the plain model.

They run on a GPU, or interpreted on the CPU, which is slow, where Triton is installed:
`TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py`.
"""

import copy
import functools
import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model

from local import tasnet
from local.fast.block import BlockPasses, BlockShape, BlockWeights, Scratch
from local.fast.choose import WITH_KERNELS
from local.fast.training import TrainingForward
from local.tools.choices import MEMORY

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if not find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("torch sees no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from local.fast import gpu  # noqa: E402 (it needs Triton)

SIZES = dict(N=12, L=8, B=8, H=40, P=3, X=2, R=2, C=2, audio_channels=2)  # of a model
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# (M, K, H, P, dilation, padding)
SEVERAL_TILES = (2, 70, 40, 3, 4, 4)
ONE_FRAME = (3, 1, 40, 3, 2, 2)
DILATED_BEYOND_THE_END = (2, 33, 40, 3, 64, 64)
CAUSAL = (2, 67, 40, 3, 5, 10)
EVEN_TAPS = (1, 130, 20, 2, 3, 3)  # and causal, with channels that are no multiple of 8
ONE_TAP = (2, 9, 150, 1, 1, 0)  # and more channels than a program takes
SHAPES = [SEVERAL_TILES, ONE_FRAME, DILATED_BEYOND_THE_END, CAUSAL]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def make_block(M, K, H, P, dilation, padding, norm_type, dtype):
    """(weights, shape, hidden, gradient of normed)."""
    generator = torch.Generator().manual_seed(H + K)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    norms = [(1 + 0.3 * draw(H), 0.3 * draw(H)) for _ in range(2)]
    slope_in, slope_out = torch.tensor([0.25]), torch.tensor([-0.3])
    taps = draw(H, P).t()
    weights = BlockWeights(None, slope_in, *norms[0], taps, slope_out, *norms[1], None)
    hidden, grad = (draw(M, K, H) + 0.5).to(dtype), draw(M, K, H).to(dtype)
    return weights, BlockShape(norm_type, dilation, padding), hidden, grad


def run_block(passes: BlockPasses, weights, shape, hidden, grad, to) -> dict[str, torch.Tensor]:
    """What the passes make of a block whose tensors go through `to` first."""
    weights = BlockWeights(*(tensor if tensor is None else to(tensor) for tensor in weights))
    hidden, grad, scratch = to(hidden), to(grad.clone()), Scratch()
    normed, mixed, moments = passes.forward(hidden, weights, shape, True, scratch)
    saved = moments, weights, shape, scratch
    from_moments = passes.recompute(hidden, None, *saved)
    from_mixed = passes.recompute(hidden, mixed, *saved)
    grad_mixed, *grads_out = passes.backward_out(grad, mixed, *saved)
    grad_mixed = grad_mixed.clone()
    grad_hidden, *grads_in = passes.backward_in(grad_mixed, hidden, *saved)
    return {
        "normed": normed,
        "mixed": mixed,
        **dict(zip(moments._fields, moments, strict=True)),
        "normed from moments": from_moments[0],
        "mixed from moments": from_moments[1],
        "normed from mixed": from_mixed[0],
        "grad of mixed": grad_mixed,
        "grads of the second half": torch.cat([grad.flatten() for grad in grads_out]),
        "grad of hidden": grad_hidden,
        "grads of the first half": torch.cat([grad.flatten() for grad in grads_in]),
    }


def skip_if_inexact(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not round to bf16, it cuts off")


@pytest.mark.parametrize("norm_type", WITH_KERNELS)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(sizes, dtype) for dtype in DTYPES for sizes in SHAPES]
    + [(EVEN_TAPS, torch.float32), (ONE_TAP, torch.float32)],
)
def test_the_passes_are_the_plain_ones(sizes, norm_type, dtype):
    skip_if_inexact(dtype)
    block = make_block(*sizes, norm_type, dtype)
    exact = run_block(BlockPasses(), *block, to=torch.Tensor.double)
    plain = run_block(BlockPasses(), *block, to=lambda tensor: tensor)
    found = run_block(gpu.PASSES, *block, to=lambda tensor: tensor.to(DEVICE))
    for name, expected in exact.items():
        assert found[name].dtype == plain[name].dtype, name
        assert found[name].shape == expected.shape, name
        limit = ROUNDING[dtype] + 2 * error(plain[name], expected)
        assert error(found[name], expected) < limit, name


@pytest.mark.parametrize("norm_type", WITH_KERNELS)
def test_moments_far_from_zero_do_not_cancel(norm_type):
    weights, shape, hidden, _ = make_block(*SEVERAL_TILES, norm_type, torch.float32)
    hidden += 3000
    moments = gpu.measure(hidden.to(DEVICE), weights.slope_in.to(DEVICE), norm_type)
    pooled = (1, 2) if norm_type == "gLN" else 2
    variance, mean = torch.var_mean(hidden.double(), pooled, correction=0, keepdim=True)
    assert error(moments.mean, mean) < 1e-6
    assert error(moments.scale, variance.rsqrt()) < 1e-4


@pytest.mark.parametrize("norm_type", WITH_KERNELS)
def test_an_overflow_shows(norm_type):
    """A GradScaler looks for it in the gradients of the parameters."""
    weights, shape, hidden, grad = make_block(*SEVERAL_TILES, norm_type, torch.float16)
    grad[1, 3, 5] = torch.inf
    to_device = functools.partial(torch.Tensor.to, device=DEVICE)
    found = run_block(gpu.PASSES, weights, shape, hidden, grad, to_device)
    for name in ("grad of hidden", "grads of the first half", "grads of the second half"):
        assert not found[name].isfinite().all(), name


@pytest.mark.parametrize("norm_type", WITH_KERNELS)
def test_a_run_gives_the_same_bits_again(norm_type):
    block = make_block(*SEVERAL_TILES, norm_type, torch.float32)
    one, other = (run_block(gpu.PASSES, *block, to=lambda x: x.to(DEVICE)) for _ in range(2))
    for name, expected in one.items():
        assert torch.equal(other[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_of_residual_and_update_comes_with_a_copy(dtype):
    skip_if_inexact(dtype)
    residual, update = torch.randn(3, 71, 33, device=DEVICE), torch.randn(3, 71, 33, device=DEVICE)
    for given in (update.to(dtype), None):
        expected = residual if given is None else residual + given
        total, copied = gpu.add(residual, given, dtype)
        assert total.dtype == torch.float32
        assert torch.equal(total, expected)
        assert torch.equal(copied, expected.to(dtype))


@pytest.mark.parametrize("norm_type", WITH_KERNELS)
def test_kernels_that_work_are_found_to_work(norm_type):
    model = random_model({**SIZES, "norm_type": norm_type}).to(DEVICE)
    assert gpu.find_difference(model, torch.device(DEVICE)) == ""


@pytest.mark.parametrize("name", BlockPasses._fields[:1] + BlockPasses._fields[2:4])
def test_kernels_that_are_compiled_wrongly_are_found(name, monkeypatch):
    def run(*args):
        first, *rest = getattr(passes, name)(*args)
        return 1.01 * first, *rest

    passes = gpu.PASSES
    monkeypatch.setattr(gpu, "PASSES", passes._replace(**{name: run}))
    model = random_model({**SIZES, "norm_type": "gLN"}).to(DEVICE)
    assert "error of 0.01" in gpu.find_difference(model, torch.device(DEVICE))


def take_step(model: tasnet.ConvTasNetStereo, batch, forward=None) -> tuple[torch.Tensor, ...]:
    mixture, targets = batch
    estimates = (forward or model)(mixture)
    F.l1_loss(estimates, targets).backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    return estimates.detach(), torch.cat(gradients)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("norm_type", "causal"), [("gLN", False), ("cLN", True), ("cLN", False)])
def test_a_step_is_that_of_the_plain_model(norm_type, causal, memory):
    model = random_model({**SIZES, "norm_type": norm_type, "causal": causal}).train()
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(2, 2, 120, generator=generator)
    targets = torch.randn(2, 2, 2, 120, generator=generator)
    exact = copy.deepcopy(model).double()
    expected = take_step(exact, (mixture.double(), targets.double()))
    model = model.to(DEVICE)
    batch = mixture.to(DEVICE), targets.to(DEVICE)
    estimates, gradients = take_step(model, batch, TrainingForward(model, memory, kernels=True))
    assert error(estimates, expected[0]) < 1e-5
    assert error(gradients, expected[1]) < 1e-4
