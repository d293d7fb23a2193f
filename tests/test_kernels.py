"""The kernels of local/fast/kernels.py, held to the plain passes of local/fast/block.py in float64.

They run on a GPU, or by Triton's interpreter on a CPU: TRITON_INTERPRET=1, with triton installed.
"""

import os
from importlib.util import find_spec

import pytest
import torch

from local.fast.block import BlockFunction, BlockPasses, BlockShape, BlockWeights, Scratch

HAS_TRITON = find_spec("triton") is not None
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="torch sees no GPU, and TRITON_INTERPRET is not 1",
    ),
]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
CASES = {  # M, K, B, H, P, dilation, causal
    "published": (2, 37, 16, 32, 3, 4, False),
    "causal": (2, 37, 16, 32, 3, 4, True),
    "odd sizes": (3, 29, 5, 37, 3, 2, False),
    "several programs": (1, 301, 8, 300, 3, 64, False),
    "long reach": (2, 11, 8, 16, 5, 16, True),
    "one tap": (1, 9, 8, 16, 1, 1, False),
    "one frame": (2, 1, 8, 16, 3, 1, False),
}


def make_block(case: str) -> tuple[BlockShape, BlockWeights, torch.Tensor, torch.Tensor]:
    """(shape, weights, residual, update), in float64."""
    M, K, B, H, P, dilation, causal = CASES[case]
    torch.manual_seed(0)
    padding = (P - 1) * dilation if causal else (P - 1) * dilation // 2
    slopes = (torch.tensor([slope]) for slope in (0.25, 0.1))
    norms = [(1 + 0.3 * torch.randn(H), 0.3 * torch.randn(H)) for _ in range(2)]
    weights = BlockWeights(
        torch.randn(H, B) / B**0.5,
        next(slopes),
        *norms[0],
        torch.randn(P, H),
        next(slopes),
        *norms[1],
        torch.randn(B, H) / H**0.5,
    )
    rows = torch.randn(M, K, B), 0.5 * torch.randn(M, K, B)
    weights = BlockWeights(*(weight.double() for weight in weights))
    return BlockShape("", dilation, padding), weights, *(each.double() for each in rows)


def run(case, norm_type, passes, saves_all, device, dtype) -> dict[str, torch.Tensor]:
    """The sum that a block gives, and its gradients, in float64 on the CPU.

    Args:
        dtype: of the products; all else is in float32, or all is in float64.
    """
    shape, weights, residual, update = make_block(case)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = BlockWeights(*[exact] * 9)._replace(expand=dtype, project=dtype)
    weights = BlockWeights(
        *(weight.to(device, kind) for weight, kind in zip(weights, kinds, strict=True))
    )
    inputs = [residual.to(device, exact), update.to(device, dtype), *weights]
    inputs = [each.detach().requires_grad_() for each in inputs]
    shape = shape._replace(norm_type=norm_type)
    residual, update, *_ = BlockFunction.apply(passes, saves_all, Scratch(), shape, *inputs)
    total = residual + update
    torch.manual_seed(1)
    total.backward(torch.randn(total.shape, dtype=torch.float64).to(total))
    names = ["residual", "update", *BlockWeights._fields]
    found = {"total": total, **{name: each.grad for name, each in zip(names, inputs, strict=True)}}
    return {name: each.detach().double().cpu() for name, each in found.items()}


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("saves_all", [False, True], ids=["recomputed", "saved"])
@pytest.mark.parametrize("norm_type", ["gLN", "cLN"])
@pytest.mark.parametrize("case", CASES)
def test_a_block_and_its_gradients_are_those_of_the_plain_passes(
    case, norm_type, saves_all, dtype
):
    from local.fast.gpu import PASSES

    expected = run(case, norm_type, BlockPasses(), saves_all, "cpu", torch.float64)
    plain = run(case, norm_type, BlockPasses(), saves_all, "cpu", dtype)
    found = run(case, norm_type, PASSES, saves_all, DEVICE, dtype)
    for name, truth in expected.items():
        norm = truth.norm() + 1  # sums may cancel
        error, allowed = (found[name] - truth).norm() / norm, (plain[name] - truth).norm() / norm
        assert error < max(BOUNDS[dtype], 3 * allowed), name
