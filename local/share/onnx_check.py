"""Exported files, held to the model: run by onnxruntime on noise and on silence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from local.models import least_samples
from local.share.onnx_stream import STATES, StreamStep
from local.tools.command_line import UserError, brief

LIMIT = 1e-5  # relative error
PUSHES = 200
LEVEL = 0.1  # of the noise, as of music
FRAMES = 64  # in addition to those that the longest filter spans
ERRORS_ONLY = 4  # of the levels of onnxruntime's log: it raises them as well


def check_whole(path: Path, model: nn.Module) -> float:
    """Compare a file with its model on batches of noise around silence, and on silence alone.

    Returns:
        the relative error.

    Raises:
        UserError: the file is no plain ONNX, does not run, or differs by more than LIMIT.
    """
    least = least_samples(model)
    noise = make_noise(2, model.audio_channels, least + model.samplerate)
    mixtures = [noise, torch.zeros_like(noise[:1]), noise[:1, :, -least:]]
    session = open_session(path)

    def run(mixture: Tensor) -> Tensor:
        return run_session(session, {"mixture": mixture.numpy()})["estimates"]

    return compare(model, mixtures, run)


def check_stream(path: Path, step: StreamStep) -> float:
    """Compare a file of one push with the model, over PUSHES pushes of several sizes.

    Returns, raises:
        as `check_whole`.
    """
    longest = max(step.reaches) + FRAMES
    medium = -(-longest // PUSHES)
    sizes = [1, medium, 2 * medium, 5] * (PUSHES // 4)
    blocks = [size * step.hop for size in sizes]
    noise = make_noise(1, step.model.audio_channels, sum(blocks))
    mixtures = [noise, torch.zeros_like(noise)]
    session = open_session(path)
    return compare(step.model, mixtures, lambda mixture: push_all(session, step, mixture, blocks))


def push_all(session, step: StreamStep, mixture: Tensor, blocks: list[int]) -> Tensor:
    """The estimates of a whole mixture, which blocks of these sizes make up."""
    states = {name: np.zeros(*read_type(session, name)) for name in STATES}
    pushed = []
    for block in mixture.split(blocks, dim=-1):
        results = run_session(session, {"mixture": block.numpy(), **states})
        pushed.append(results["estimates"])
        states = {name: results[f"next_{name}"].numpy() for name in STATES}
    estimates = torch.cat([*pushed, torch.from_numpy(states["overlap"])], dim=-1)
    missing = mixture.shape[-1] - (estimates.shape[-1] - step.latency)
    return nn.functional.pad(estimates[..., step.latency :], (0, missing))


def read_type(session: onnxruntime.InferenceSession, name: str) -> tuple[list[int], type]:
    """The shape and the dtype of a state."""
    (found,) = (given for given in session.get_inputs() if given.name == name)
    return found.shape, {"tensor(float)": np.float32, "tensor(int64)": np.int64}[found.type]


def make_noise(batch: int, channels: int, time: int) -> Tensor:
    """(batch, channels, time) of noise, with silence in the middle."""
    generator = torch.Generator().manual_seed(0)
    noise = LEVEL * torch.randn(batch, channels, time, generator=generator)
    noise[..., time // 2 : 3 * time // 4] = 0
    return noise


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Check a file by ONNX's own rules, and load it.

    Raises:
        UserError: it is no plain ONNX.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:  # of several types
        raise UserError(f"what torch exported is not valid: {brief(error)}") from None
    if others := sorted({entry.domain for entry in graph.opset_import} - {""}):
        raise UserError(f"the model needs operators that ONNX does not have: {', '.join(others)}")
    return session


def run_session(session: onnxruntime.InferenceSession, inputs: dict) -> dict[str, Tensor]:
    names = [output.name for output in session.get_outputs()]
    try:
        results = session.run(names, inputs)
    except Exception as error:  # of several types
        raise UserError(f"onnxruntime cannot run what torch exported: {brief(error)}") from None
    return dict(zip(names, map(torch.from_numpy, results), strict=True))


@torch.no_grad()
def compare(model: nn.Module, mixtures: list[Tensor], run: Callable[[Tensor], Tensor]) -> float:
    """The relative error of all estimates as one vector."""
    differences, estimates = [], []
    for mixture in mixtures:
        expected, found = model(mixture), run(mixture)
        if found.shape != expected.shape:
            raise UserError(
                f"exported, the model gives {tuple(found.shape)} instead of"
                f" {tuple(expected.shape)} for {tuple(mixture.shape)}"
            )
        if not found.isfinite().all():
            whose = "exported, the model" if expected.isfinite().all() else "the model itself"
            where = "noise" if mixture.any() else "silence"
            raise UserError(f"{whose} gives NaN or infinity for {where}")
        differences.append((found - expected).flatten())
        estimates.append(expected.flatten())
    scale = torch.cat(estimates).norm().clamp(min=1e-30)
    error = (torch.cat(differences).norm() / scale).item()
    if error > LIMIT:
        raise UserError(
            f"exported, the model differs by {error:.1g} relative to its estimates, more than"
            f" {LIMIT:g}"
        )
    return error
