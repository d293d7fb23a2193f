"""Whether the fast formulas equal a model; they take its weights and never call its forward.

Two looks. At the structure, every time: each module must be of exactly the class that
local/tasnet.py has in its place (a parametrized one is not), with nothing hooked into it. At the
numbers, once per process and architecture: in float64, on a copy with other weights, outputs and
gradients must be the same.

float64, since in float32 the gradients of two right formulas differ by 4e-4: a limit in float32
would be blind to an edit, or find one where there is none.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local import tasnet
from local.fast.rows import RowModel
from local.fast.training import TrainingForward
from local.tools.choices import FAST
from local.tools.private import has_hooks
from local.tools.random_states import get_random_states, keep_random_states

LIMIT = 1e-9  # of a difference, relative to what is compared
FRAMES = 64  # beyond those that the longest filter spans
LOUDEST = 4.0  # of full scale, so that an edit that clips shows
CPU = torch.device("cpu")

_differences: dict[tuple, str] = {}  # by what was compared


def find_difference(model: nn.Module, training: bool = False) -> str:
    """In what the fast formulas differ from a model, in a few words; nothing where they equal it.

    The model, random states and the statistics of its norms stay as they are.

    Args:
        training: compare gradients and outputs in training mode, too.
    """
    if fault := find_structural_difference(model):
        return fault
    architecture = _describe_architecture(model)
    for compared in {training, True}:  # what was compared for training includes the rest
        if (architecture, compared) in _differences:
            return _differences[architecture, compared]
    difference = find_numerical_difference(model, training)
    return _differences.setdefault((architecture, training), difference)


def choose_fast(model: nn.Module, fast: str, training: bool = False) -> bool:
    """Whether to go by the fast formulas.

    Args:
        fast: one of FAST.

    Raises:
        ValueError: `fast` is "yes" and they differ from the model, or it is none of FAST.
    """
    if fast not in FAST:
        raise ValueError(f"fast must be one of {', '.join(FAST)}, got {fast!r}")
    difference = "" if fast == "no" else find_difference(model, training)
    if difference and fast == "yes":
        raise ValueError(f"the fast formulas differ from the model: {difference}")
    return fast != "no" and not difference


def describe_fast(model: nn.Module, fast: str, training: bool = False) -> str:
    """What runs and why, for the first screen.

    Raises:
        ValueError: as choose_fast.
    """
    if choose_fast(model, fast, training):
        return "the fast formulas, which equal the model as written in local/tasnet.py"
    if type(model) is not tasnet.ConvTasNetStereo:
        return "the model itself; fast formulas are there for ConvTasNetStereo alone"
    reason = "as --fast no says"
    if fast != "no":
        reason = f"the fast formulas differ from it ({find_difference(model, training)})"
    return f"the model itself, {reason}: up to four times as slow, with several times the memory"


# The structure


def find_structural_difference(model: nn.Module) -> str:
    """Which module of a model is not what local/tasnet.py has in its place; nothing if none."""
    if type(model) is not tasnet.ConvTasNetStereo:
        return f"the model is a {type(model).__name__}, and they are ConvTasNetStereo's"
    found = dict(model.named_modules(remove_duplicate=False))
    try:
        expected = dict(_expect_modules(model))
    except Exception as error:  # of whatever kind an edited file raises
        return f"the model has other parts: {error}"
    for name in {**expected, **found}:
        if name not in found or type(found[name]) is not expected.get(name):
            there = type(found[name]).__name__ if name in found else "nothing"
            usual = expected[name].__name__ if name in expected else "nothing"
            return f"{name or 'the model'} is {there} where {usual} is expected"
    for name, module in found.items():
        if has_hooks(module):
            return f"{name or 'the model'} has hooks"
        if "forward" in vars(module):
            return f"{name or 'the model'} has a forward of its own"
    return ""


def _expect_modules(model: nn.Module) -> Iterator[tuple[str, type[nn.Module]]]:
    """The name and class of every module, as the formulas take them."""
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
    """What two models have in common that compute the same from the same weights."""
    usual, numbers, described = set(vars(nn.Module())), {}, []
    for name, module in model.named_modules(remove_duplicate=False):
        settings = {key: value for key, value in vars(module).items() if key not in usual}
        tensors = [
            (key, numbers.setdefault(id(tensor), len(numbers)), tuple(tensor.shape))
            for named in (module.named_parameters, module.named_buffers)
            for key, tensor in named(recurse=False, remove_duplicate=False)
        ]
        described.append((name, type(module), repr(settings), *tensors))
    # A notebook may replace a function, a constant or a method of the file.
    classes = [value for value in vars(tasnet).values() if isinstance(value, type)]
    described += [
        (name, id(value)) for space in (tasnet, *classes) for name, value in vars(space).items()
    ]
    return tuple(described)


# The numbers


def find_numerical_difference(model: nn.Module, training: bool) -> str:
    """In what a copy of a model with other weights computes something else; nothing if it does not.

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
        except Exception as error:  # of whatever kind an edited model raises
            return f"comparing them raises {type(error).__name__}: {' '.join(str(error).split())}"


@torch.no_grad()
def _redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Other weights, none of them 0 or 1: what a gate that starts there lets through counts, too.

    Buffers stay as positive as they are: there are variances among them.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            factor = torch.rand(tensor.shape, generator=generator) + 0.5
            added = torch.randn(tensor.shape, generator=generator)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensor.mul_(factor).add_(added if is_parameter else added.abs(), alpha=0.05)
    model.requires_grad_(True)


def _make_mixtures(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """One mixture in which the longest filter fits, two short ones, two of less than a frame; all
    from silence to more than full scale, and with a rest that fills no frame.
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
    flow = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    expected.backward(flow)
    found.backward(flow)
    return _compare_gradients(fast, model) or _compare_buffers(fast, model)


def _read_random_states() -> dict:
    """In a form that can be compared."""
    states = get_random_states(CPU)
    return {**states, "torch": states["torch"].tolist()}


def _compare_gradients(fast: nn.Module, plain: nn.Module) -> str:
    found = {name: parameter.grad for name, parameter in fast.named_parameters()}
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    # Beside the others' sizes: one that should be zero is never more than nearly so.
    norms = [grad.norm() for grad in expected.values() if grad is not None]
    scale = torch.stack(norms).norm()
    for name, grad in expected.items():
        if (grad is None) != (found[name] is None):
            return f"only one of them has a gradient of {name}"
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
    """What the model makes of songs together, and the formulas of each by itself."""
    for together in mixtures:
        found = torch.stack([_separate_by_rows(model, mixture) for mixture in together])
        name = f"outputs of {together.shape[-1]} samples"
        if fault := _describe_error(name, found, model(together)):
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
    if error <= LIMIT * scale:  # never where one of them holds NaN
        return ""
    return f"{name}: a relative difference of {error / scale.clamp(min=1e-300):.1g}"
