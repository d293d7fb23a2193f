"""Gradient checkpointing for any model: parts are recomputed in the backward pass, to save memory.

After T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from local.tools.choices import MEMORY
from local.tools.private import has_hooks


class RecomputingForward:
    """The forward pass of a model, parts of which the backward pass recomputes.

    Args:
        memory: "none": no part; "some": every block, which is a module of the model's
            `block_class`; "most": every repeat, which is a Sequential of blocks, or every block if
            there are no repeats.

    Raises:
        ValueError: `memory` is none of MEMORY.
    """

    def __init__(self, model: nn.Module, memory: str = "some"):
        self._model = model
        parts, _ = find_recomputed(model, memory)
        self._forwards = {part: partial(_run_checkpointed, part, part.forward) for part in parts}

    def __call__(self, mixture: Tensor) -> Tensor:
        with self._replaced_forwards():
            return self._model(mixture)

    @contextmanager
    def _replaced_forwards(self) -> Iterator[None]:
        """Replaced during a forward pass only: validation and checkpoints see the plain model."""
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
    """The parts of a model to recompute, and a note why there are none, or "".

    Raises:
        ValueError: `memory` is none of MEMORY.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    if memory == "none":
        return [], ""
    block_class = getattr(model, "block_class", None)
    if block_class is None:
        return [], f"--memory {memory} saves nothing: the model has no block_class"
    blocks = find_outermost(model, lambda module: isinstance(module, block_class))
    if any(has_hooks(module) for block in blocks for module in block.modules()):
        return [], f"--memory {memory} saves nothing: hooks in a block would run twice"
    repeats = find_outermost(
        model,
        lambda module: (
            isinstance(module, nn.Sequential)
            and len(module) > 0
            and all(isinstance(child, block_class) for child in module)
        ),
    )
    return (repeats if memory == "most" and repeats else blocks), ""


def find_outermost(module: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The wanted modules inside a module that are in no other wanted module."""
    found = []
    for child in module.children():
        found += [child] if is_wanted(child) else find_outermost(child, is_wanted)
    return found


def _run_checkpointed(part: nn.Module, forward: Callable, *args, **kwargs):
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = partial(keep_buffers, part)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def keep_buffers(part: nn.Module) -> tuple:
    """For torch's checkpoint: the contexts of the forward pass and of its recomputation.

    The recomputation finds the buffers as the forward pass found them, and changes copies: BN
    counts a batch once.
    """
    return nullcontext(), _EarlierBuffers(part)


class _EarlierBuffers:
    """Within it, the buffers of a module have copies of the values that they have now.

    A graph may be walked twice, and enter this twice.
    """

    def __init__(self, part: nn.Module):
        self._earlier = {module: _copy(_get_buffers(module)) for module in part.modules()}

    def __enter__(self) -> None:
        self._own = {module: _get_buffers(module) for module in self._earlier}
        for module, own in self._own.items():
            earlier = _copy(self._earlier[module])
            for name in {**own, **earlier}:
                setattr(module, name, earlier.get(name))

    def __exit__(self, *_) -> None:
        for module, own in self._own.items():
            for name in {**own, **self._earlier[module]}:
                setattr(module, name, own.get(name))


def _get_buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def _copy(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in buffers.items()}
