"""Models as ONNX graphs: of a whole mixture, and of one push of a stream."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import onnx
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import opset18 as op
from torch import Tensor, nn
from torch.export import Dim

from local.models import least_samples
from local.share.onnx_stream import STATES, StreamStep
from local.tools.command_line import UserError, brief

OPSET = 18
NO_TYPE = -1  # a dtype that is not given


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
                custom_translation_table={torch.ops.aten.mean.dim: reduce_mean},
                verbose=False,
            )
    except Exception as error:  # of any type, from an edited model
        raise UserError(f"torch cannot export the model: {find_cause(error)}") from None
    ClearMetadataAndDocStringPass()(program.model)  # lines of source, with paths
    return program.model_proto


def reduce_mean(self, dim, keepdim=False, dtype=None):
    """What torch's `mean` over axes becomes: one axis after the other, after the first in float64.

    onnxruntime adds float32 up in a few running sums. Over all channels and frames at once, as gLN
    does, estimates were off by 3e-5 after a second, by 3e-4 after four, and so on.
    """
    rank = len(self.shape)
    first, *others = axes = sorted(axis % rank for axis in dim or range(rank))
    if dtype not in (None, NO_TYPE):
        self = op.Cast(self, to=dtype)
    mean = op.ReduceMean(self, op.Constant(value_ints=[first]), keepdims=1)
    if others:
        exact = op.Cast(mean, to=onnx.TensorProto.DOUBLE)
        for axis in others:
            exact = op.ReduceMean(exact, op.Constant(value_ints=[axis]), keepdims=1)
        mean = op.CastLike(exact, mean)
    return mean if keepdim else op.Squeeze(mean, op.Constant(value_ints=axes))


def find_cause(error: BaseException) -> str:
    """What first went wrong: the exporter wraps what a model raises in pages of its own advice."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {brief(error).partition('. ')[0]}"


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide what torch says to its developers: warnings, and graphs that it prints on failure."""
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
