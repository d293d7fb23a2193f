"""Models as ONNX graphs: of a whole mixture, and of one push of a stream."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.export import Dim

from local.models import least_samples
from local.share.onnx_stream import STATES, StreamStep
from local.tools.command_line import UserError, brief

OPSET = 18


def export_whole(model: nn.Module) -> onnx.ModelProto:
    """The graph of a model as it is written, an edited one too.

    Shape:
        - mixture: (M, audio_channels, T) with T >= `least_samples`
        - estimates: (M, C, audio_channels, T)

    Raises:
        UserError: torch cannot export the model.
    """
    least = least_samples(model)
    mixture = torch.zeros(2, model.audio_channels, least + model.samplerate)
    sizes = {0: Dim("batch"), 2: Dim("time", min=least)}
    return export_module(model, (mixture,), (sizes,), ("mixture",), ("estimates",))


def export_stream(step: StreamStep) -> onnx.ModelProto:
    """The graph of one push. The next value of each of STATES is called next_STATE.

    Raises:
        UserError: torch cannot export the model.
    """
    mixture = torch.zeros(1, step.model.audio_channels, 2 * step.hop)
    sizes = {2: step.hop * Dim("hops", min=1)}
    return export_module(
        step,
        (mixture, *step.make_states()),
        (sizes, *[None] * len(STATES)),
        ("mixture", *STATES),
        ("estimates", *(f"next_{name}" for name in STATES)),
    )


def export_module(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic_shapes: tuple,
    input_names: tuple[str, ...],
    output_names: tuple[str, ...],
) -> onnx.ModelProto:
    """The graph of a module in eval mode, without the traces of its source that torch adds."""
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                module.eval(),
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                # Optimising takes the EPS of a norm for zero, which gives NaN in silence.
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # of any type, from an edited model
        raise UserError(f"torch cannot export the model: {brief(find_cause(error))}") from None
    ClearMetadataAndDocStringPass()(program.model)  # lines of source, with paths
    return program.model_proto


def find_cause(error: BaseException) -> BaseException:
    """The first of a chain of errors: the exporter wraps what a model raises in its own advice."""
    while error.__cause__:
        error = error.__cause__
    return error


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide what the exporter says to its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
