"""The check that the fast path equals a model.

The fast path reads weights and never calls the model's forward, so without this check it would
ignore an edit of the model. Two steps:

1. The structure, at every call: each module must be of exactly the class that local/tasnet.py has
   in its place, without parametrizations, hooks or a forward of its own.
2. The numbers, once per process and architecture: outputs and gradients of a copy of the model with
   random weights must agree, in float64. In float32 the gradients of two correct forward passes
   differ by 4e-4, so that no limit would tell an edit from rounding.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local import tasnet
from local.fast.rows import RowModel
from local.fast.training import TrainingForward
from local.tools.private import has_hooks
from local.tools.random_states import get_random_states, keep_random_states

LIMIT = 1e-9  # relative error
FRAMES = 64  # in addition to those that the longest filter spans
LOUDEST = 4.0  # times full scale, so that clipping shows
CPU = torch.device("cpu")

_differences: dict[tuple, str] = {}  # by architecture, and whether training was compared


def find_difference(model: nn.Module, training: bool = False) -> str:
    """How the fast path differs from a model, in a few words; "" if it does not.

    Neither the model nor any random state changes.

    Args:
        training: also compare outputs and gradients in training mode.
    """
    if fault := find_structural_difference(model):
        return fault
    if training and model.training and not all(part.training for part in model.modules()):
        return "part of the model is in eval mode, as frozen BN is"
    architecture = _describe_architecture(model)
    for compared in {training, True}:  # comparing for training includes inference
        if (architecture, compared) in _differences:
            return _differences[architecture, compared]
    difference = find_numerical_difference(model, training)
    return _differences.setdefault((architecture, training), difference)


# 1. The structure


def find_structural_difference(model: nn.Module) -> str:
    """The first module that is not as in local/tasnet.py, in a few words; "" if there is none."""
    if type(model) is not tasnet.ConvTasNetStereo:
        return f"the model is a {type(model).__name__}, not a ConvTasNetStereo"
    found = dict(model.named_modules(remove_duplicate=False))
    try:
        expected = dict(_expect_modules(model))
    except Exception as error:  # of any type, from an edited file
        return f"the model has other parts: {error}"
    for name in {**expected, **found}:
        if name not in found or type(found[name]) is not expected.get(name):
            actual = type(found[name]).__name__ if name in found else "missing"
            wanted = expected[name].__name__ if name in expected else "nothing"
            return f"{name or 'the model'}: expected {wanted}, got {actual}"
    for name, module in found.items():
        if has_hooks(module):
            return f"{name or 'the model'} has hooks"
        if "forward" in vars(module):
            return f"{name or 'the model'} has a forward that its class does not have"
    return ""


def _expect_modules(model: nn.Module) -> Iterator[tuple[str, type[nn.Module]]]:
    """The name and class of every module that the fast path relies on."""
    conv, sequential = nn.Conv1d, nn.Sequential
    yield from [("", tasnet.ConvTasNetStereo), ("encoder", tasnet.Encoder)]
    yield from [("encoder.conv1d_U", conv), ("separator", tasnet.TemporalConvNet)]
    yield from [("decoder", tasnet.Decoder), ("decoder.basis_signals", nn.Linear)]
    network = model.separator.network
    parts = (tasnet.ChannelwiseLayerNorm, conv, sequential, conv)
    yield from _expect_sequence("separator.network", parts)
    norm = {
        "gLN": tasnet.GlobalLayerNorm,
        "cLN": tasnet.ChannelwiseLayerNorm,
        "BN": nn.BatchNorm1d,
        "id": nn.Identity,
    }[model.norm_type]
    chomp = [tasnet.Chomp] if model.causal else []
    for r, repeat in enumerate(network[2]):
        name = f"separator.network.2.{r}"
        yield from _expect_sequence(name, [tasnet.TemporalBlock] * len(repeat))
        for x in range(len(repeat)):
            net = f"{name}.{x}.net"
            block = (conv, nn.PReLU, norm, tasnet.DepthwiseSeparableConv)
            yield from _expect_sequence(net, block)
            yield from _expect_sequence(f"{net}.3.net", (conv, *chomp, nn.PReLU, norm, conv))


def _expect_sequence(name: str, parts) -> Iterator[tuple[str, type[nn.Module]]]:
    yield name, nn.Sequential
    yield from ((f"{name}.{number}", part) for number, part in enumerate(parts))


def _describe_architecture(model: nn.Module) -> tuple:
    """A key that is equal for models which compute the same from the same weights."""
    ignored, numbers, described = set(vars(nn.Module())), {}, []
    for name, module in model.named_modules(remove_duplicate=False):
        settings = {key: value for key, value in vars(module).items() if key not in ignored}
        tensors = [
            (key, numbers.setdefault(id(tensor), len(numbers)), tuple(tensor.shape))
            for named in (module.named_parameters, module.named_buffers)
            for key, tensor in named(recurse=False, remove_duplicate=False)
        ]
        described.append((name, type(module), repr(settings), *tensors))
    # A notebook may replace a function, a constant or a method of local/tasnet.py.
    classes = [value for value in vars(tasnet).values() if isinstance(value, type)]
    described += [
        (name, id(value)) for space in (tasnet, *classes) for name, value in vars(space).items()
    ]
    return tuple(described)


# 2. The numbers


def find_numerical_difference(model: nn.Module, training: bool) -> str:
    """How the fast path differs from a copy of the model with random weights; "" if it does not.

    A model that cannot be copied or run counts as different.
    """
    with (
        keep_random_states(CPU),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
    ):
        try:
            generator = torch.Generator().manual_seed(0)
            model = copy.deepcopy(model).to(CPU, torch.float64)
            _redraw(model, generator)
            mixtures = _make_mixtures(model, generator)
            difference = _compare_training(model, mixtures[0], generator) if training else ""
            return difference or _compare_inference(model.eval(), mixtures)
        except Exception as error:  # of any type, from an edited model
            return f"comparing them raises {type(error).__name__}: {' '.join(str(error).split())}"


@torch.no_grad()
def _redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Randomizes all weights, so that none stays 0 or 1: a new gate that starts closed would else
    hide what it gates. Buffers stay positive, since some are variances.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            factor = torch.rand(tensor.shape, generator=generator) + 0.5
            added = torch.randn(tensor.shape, generator=generator)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensor.mul_(factor).add_(added if is_parameter else added.abs(), alpha=0.05)
    model.requires_grad_(True)


def _make_mixtures(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """Batches: one mixture longer than the longest filter, two shorter ones, two of less than a
    frame. All grow from silence to LOUDEST, and end in less than a hop that fills no frame.
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv1d)]
    longest = max((conv.kernel_size[0] - 1) * conv.dilation[0] for conv in convs)
    hop, length = model.encoder.hop, model.encoder.length
    sizes = [(1, longest + FRAMES), (2, FRAMES), (2, 0)]
    shapes = [
        (batch, model.audio_channels, (frames - 1) * hop + length + hop - 1)
        for batch, frames in sizes
    ]
    noises = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [noise * torch.linspace(0, LOUDEST, noise.shape[-1]).double() for noise in noises]


def _compare_training(model: nn.Module, mixture: Tensor, generator: torch.Generator) -> str:
    model, fast = model.train(), copy.deepcopy(model).train()
    before = _read_random_states()
    with torch.enable_grad():
        expected = model(mixture)
        if _read_random_states() != before:
            return "its forward pass in training draws random numbers"
        found = TrainingForward(fast, "none")(mixture)
    if fault := _describe_error("outputs in training", found, expected):
        return fault
    grad = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    expected.backward(grad)
    found.backward(grad)
    return _compare_gradients(fast, model) or _compare_buffers(fast, model)


def _read_random_states() -> dict:
    """Random states that == can compare."""
    states = get_random_states(CPU)
    return {**states, "torch": states["torch"].tolist()}


def _compare_gradients(fast: nn.Module, plain: nn.Module) -> str:
    found = {name: parameter.grad for name, parameter in fast.named_parameters()}
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    # Relative to all gradients together: rounding keeps a gradient that is zero in theory from
    # being zero.
    norms = [grad.norm() for grad in expected.values() if grad is not None]
    scale = torch.stack(norms).norm()
    for name, grad in expected.items():
        if (grad is None) != (found[name] is None):
            return f"gradient of {name}: only one of them has it"
        if grad is not None and (fault := _describe_error(name, found[name], grad, scale)):
            return f"gradient of {fault}"
    return ""


def _compare_buffers(fast: nn.Module, plain: nn.Module) -> str:
    found = dict(fast.named_buffers())
    faults = (
        _describe_error(name, found[name].double(), buffer.double())
        for name, buffer in plain.named_buffers()
    )
    return next(filter(None, faults), "")


@torch.no_grad()
def _compare_inference(model: nn.Module, mixtures: list[Tensor]) -> str:
    """Compares the model on batches with the fast path on each item alone."""
    for batch in mixtures:
        found = torch.stack([_separate_by_rows(model, mixture) for mixture in batch])
        name = f"outputs of {batch.shape[-1]} samples"
        if fault := _describe_error(name, found, model(batch)):
            return fault
    return ""


def _separate_by_rows(model: nn.Module, mixture: Tensor) -> Tensor:
    rows = RowModel(model)
    if rows.count_frames(mixture.shape[-1]) == 0:
        return mixture.new_zeros(model.C, *mixture.shape)
    weights = rows.encode(mixture)
    residual = rows.bottleneck(weights)
    for block in rows.blocks:
        update = [block.project(block.expand(residual)), block.finish()]
        block.add_to(residual, torch.cat(update))
    estimates = rows.decode(weights, residual)
    return F.pad(estimates, (0, mixture.shape[-1] - estimates.shape[-1]))


def _describe_error(name: str, found: Tensor, expected: Tensor, scale: Tensor | None = None) -> str:
    if found.shape != expected.shape:
        return f"{name}: {tuple(expected.shape)} instead of {tuple(found.shape)}"
    error = (found - expected).norm()
    scale = expected.norm() if scale is None else scale
    if error <= LIMIT * scale:  # false for NaN
        return ""
    return f"{name}: a relative difference of {error / scale.clamp(min=1e-300):.1g}"
