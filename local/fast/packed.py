"""Products of rows with weights that are packed once, for inference.

torch's own linear layer arranges the weights anew at every call, which for a few rows takes longer
than the product itself.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from local.tools.choices import PRECISIONS
from local.tools.private import list_packable, pack_linear

SHORT = (torch.bfloat16, torch.float16)


def find_precision_fault(precision: str, device: torch.device) -> str:
    """Why products cannot have a precision on a device; "" if they can."""
    if precision not in PRECISIONS:
        return f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
    if precision == "float32" or device.type == "meta":
        return ""
    if device.type == "cuda":
        return "" if torch.cuda.is_bf16_supported(False) else "this GPU has no bf16; use float32"
    has = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.13
    if has.get("avx512_bf16") or has.get("amx_bf16"):
        return ""
    return "torch finds no bf16 instructions in this CPU (AVX512-BF16, AMX); use float32"


def autocast_to(precision: str, device: torch.device) -> AbstractContextManager:
    """Gives the products a precision; float32 leaves an autocast around it as it is."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def product_dtype(like: Tensor) -> torch.dtype:
    """The dtype of products with `like`: that of autocast if enabled, else its own."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


def upcast(rows: Tensor) -> Tensor:
    """To float32 at least: under autocast, products have a shorter type."""
    return rows.float() if rows.dtype in SHORT else rows


@lru_cache
def find_packable() -> tuple[torch.dtype, ...]:
    """The dtypes whose packed products are those of torch's own linear layer, as tried once.

    That is also when oneDNN takes the memory that it needs: later, where there is none left, it may
    crash.
    """
    rows, weight = (torch.linspace(-1, 1, size).sin().view(-1, 64) for size in (64 * 40, 64 * 48))
    expected = F.linear(rows, weight)
    return tuple(
        dtype
        for dtype in list_packable()
        if torch.allclose(
            pack_linear(weight.to(dtype), 1.0)(rows.to(dtype)).float(),
            expected,
            rtol=0,
            atol=100 * torch.finfo(dtype).eps,
        )
    )


class PackedLinear:
    """A linear layer without bias, then PReLU with a slope. Changes of the weight have no effect.

    Without oneDNN, on another device or in float64 it is torch's own.
    """

    def __init__(self, weight: Tensor, slope: float = 1.0):
        self._weight, self._slope = weight.detach().to(product_dtype(weight)), slope
        can_pack = self._weight.dtype in find_packable() and self._weight.device.type == "cpu"
        self._packed = pack_linear(self._weight, slope) if can_pack else None

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def __call__(self, rows: Tensor) -> Tensor:
        """(..., K, in) -> (..., K, out) of `product_dtype`."""
        if rows.dtype is not self._weight.dtype:
            rows = rows.to(self._weight.dtype)
        if self._packed is not None and rows.numel():
            return self._packed(rows)
        product = F.linear(rows, self._weight)
        return product if self._slope == 1 else F.leaky_relu_(product, self._slope)
