"""A checkpoint as an ONNX file, with the facts that its user needs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from local import __version__
from local.checkpoint import Loaded, find_weights, load_with_arguments
from local.models import least_samples
from local.share.facts import name_sources
from local.tools.command_line import UserError, raise_together, suggest_path
from local.tools.files import atomic_path, sha256
from local.tools.weights import FILE_SUFFIXES, load_checkpoint

if TYPE_CHECKING:
    import onnx

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(source: str, out: Path, stream: bool = False) -> str:
    """Write the model of a checkpoint, of whole mixtures or of one push, as ONNX.

    The file appears once onnxruntime has made of it what the model makes.

    Args:
        source: see `load_with_arguments`.

    Returns:
        what was written, in a few lines.

    Raises:
        UserError: lists all faults of the packages and `out`; or the checkpoint cannot be loaded,
            its model cannot be streamed or exported, or the file differs from it.
    """
    raise_together(find_faults(out))
    loaded = load_with_arguments(source, "CHECKPOINT")
    facts = describe_model(source, loaded)
    write = write_stream if stream else write_whole
    try:
        with atomic_path(out) as temporary:
            return write(temporary, loaded.model, facts)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None


def find_faults(out: Path) -> list[str]:
    """What keeps a file from being made, before a model is looked at."""
    faults = []
    if missing := [name for name in PACKAGES if not find_spec(name)]:
        faults.append(f"this needs more packages: pip install {' '.join(missing)}")
    if out.suffix != ".onnx":
        faults.append(f"--out: expected a name that ends in .onnx, got {out}")
    if not out.absolute().parent.is_dir():
        faults.append(f"--out: no such folder: {out.parent}{suggest_path(out.parent)}")
    if out.is_dir():
        faults.append(f"--out: {out} is a folder; name a file")
    return faults


def write_whole(path: Path, model: nn.Module, facts: dict[str, str]) -> str:
    """Write and check a file of whole mixtures; return what it is, in a few lines."""
    from local.share.onnx_check import check_whole
    from local.share.onnx_graph import export_whole

    least = least_samples(model)
    save_graph(path, export_whole(model), facts | {"least_samples": str(least)})
    use = f"mixtures of any length from {least} samples on"
    return describe_file(path, use, check_whole(path, model))


def write_stream(path: Path, model: nn.Module, facts: dict[str, str]) -> str:
    """Write and check a file of one push; return what it is, in a few lines."""
    from local.share.onnx_check import check_stream
    from local.share.onnx_graph import export_stream
    from local.share.onnx_stream import StreamStep

    try:
        step = StreamStep(model)
    except ValueError as error:
        raise UserError(f"--stream: {error}") from None
    sizes = {"hop": step.hop, "latency": step.latency, "frame": step.length}
    facts = facts | {name: str(size) for name, size in sizes.items()}
    save_graph(path, export_stream(step), facts)
    use = f"blocks of any multiple of {step.hop} samples, latency {step.latency} samples"
    return describe_file(path, use, check_stream(path, step))


def save_graph(path: Path, graph: onnx.ModelProto, facts: dict[str, str]) -> None:
    import onnx

    onnx.helper.set_model_props(graph, facts)
    onnx.save(graph, path)


def describe_file(path: Path, use: str, error: float) -> str:
    return (
        f"{use}; {path.stat().st_size / 1e6:.1f} MB\n"
        f"onnxruntime gives what the model gives, with a relative error of {error:.1g}"
    )


def describe_model(source: str, loaded: Loaded) -> dict[str, str]:
    """The facts of a model for the file's metadata, which takes text alone."""
    model, weights = loaded.model, find_weights(source)
    content = load_checkpoint(weights) if weights.suffix in FILE_SUFFIXES else {}
    return {
        "sample_rate": str(model.samplerate),
        "audio_channels": str(model.audio_channels),
        "sources": json.dumps(name_sources(model)),
        "model": loaded.name,
        "arguments": json.dumps(loaded.arguments, default=str),
        "weights_sha256": sha256(weights),
        "recipe": __version__,
        "dataset": str(content.get("dataset", "unknown")),
        "licenses": json.dumps(content.get("licenses", []), default=str),
    }
