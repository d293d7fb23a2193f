"""The model itself in training, with less memory: parts are computed again in the backward pass.

As in T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from local.tools.choices import MEMORY

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in HOOKS)


class RecomputingForward:
    """The model itself, of which the backward pass computes parts again.

    Args:
        memory: "none": no part; "some": every block, of the class that the model has as
            `block_class`; "most": every repeat, which is a Sequential of blocks, or every block
            where there are no repeats.

    Raises:
        ValueError: there is no such `memory`.
    """

    def __init__(self, model: nn.Module, memory: str = "some"):
        self._model = model
        parts, _ = find_recomputed(model, memory)
        self._forwards = {part: partial(_compute_again_later, part, part.forward) for part in parts}

    def __call__(self, mixture: Tensor) -> Tensor:
        with self._replaced_forwards():
            return self._model(mixture)

    @contextmanager
    def _replaced_forwards(self) -> Iterator[None]:
        """Only while segments go through: validation and the model on disk know nothing of it."""
        own = {part: vars(part)["forward"] for part in self._forwards if "forward" in vars(part)}
        for part, forward in self._forwards.items():
            part.forward = forward
        try:
            yield
        finally:
            for part in self._forwards:
                del part.forward
            for part, forward in own.items():
                part.forward = forward


def find_recomputed(model: nn.Module, memory: str) -> tuple[list[nn.Module], str]:
    """The parts of a model that are computed again, and why there are none, where `memory` asks
    for some.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    if memory == "none":
        return [], ""
    block_class = getattr(model, "block_class", None)
    if block_class is None:
        return [], f"memory {memory} is as none: the model has no block_class"
    blocks = find_outermost(model, lambda module: isinstance(module, block_class))
    if any(has_hooks(module) for block in blocks for module in block.modules()):
        return [], f"memory {memory} is as none: there are hooks in a block, which would run twice"
    repeats = find_outermost(
        model,
        lambda module: (
            isinstance(module, nn.Sequential)
            and len(module) > 0
            and all(isinstance(child, block_class) for child in module)
        ),
    )
    return (repeats if memory == "most" and repeats else blocks), ""


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after the forward or backward pass of a module."""
    own = any(getattr(module, kind) for kind in HOOKS)
    return own or any(getattr(torch_module, kind) for kind in GLOBAL_HOOKS)


def find_outermost(module: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules below one that are wanted and lie in no other such."""
    found = []
    for child in module.children():
        found += [child] if is_wanted(child) else find_outermost(child, is_wanted)
    return found


def _compute_again_later(part: nn.Module, forward: Callable, *args, **kwargs):
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = partial(keep_buffers, part)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def keep_buffers(part: nn.Module) -> tuple:
    """For torch's checkpoint: the contexts of a forward pass and of its repetitions, which find the
    buffers as the pass found them and change copies: BN counts a batch once.
    """
    modules = [module for module in part.modules() if module._buffers]
    found = [_copy_buffers(module._buffers) for module in modules]
    return nullcontext(), _OtherBuffers(modules, found)


class _OtherBuffers:
    """Lends modules copies of other buffers; a graph may be walked twice, and enter this twice."""

    def __init__(self, modules: list[nn.Module], buffers: list[dict]):
        self._modules, self._buffers = modules, buffers

    def __enter__(self) -> None:
        self._own = [module._buffers for module in self._modules]
        for module, buffers in zip(self._modules, self._buffers, strict=True):
            module._buffers = _copy_buffers(buffers)

    def __exit__(self, *_) -> None:
        for module, buffers in zip(self._modules, self._own, strict=True):
            module._buffers = buffers


def _copy_buffers(buffers: dict) -> dict:
    return {name: None if tensor is None else tensor.clone() for name, tensor in buffers.items()}
