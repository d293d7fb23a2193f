"""The first screen of a run: the model, the data and the objects as they were made."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch

from local import __version__
from local.fast.choose import choose_fast, describe_fast
from local.fast.recompute import find_recomputed
from local.musdb18_dataset import SegmentDataset, TrackDataset
from local.musdb18_tracks import (
    TRAINING_SPLITS,
    describe_layout,
    describe_validation,
    name_some,
)
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import UserError, plural
from local.tracks.roots import list_places, list_roots
from local.train.loaders import count_batches
from local.train.origin import find_commit
from local.train.preflight import describe_versions
from local.train.recipe import describe_object, describe_optimizer, list_schedules
from local.train.run_folder import describe_disk
from local.train.start import describe_start


def describe_run(system: pl.LightningModule, trainer: pl.Trainer, resumed=None, base=None) -> str:
    """What will be trained on what.

    Args:
        resumed: as of `resume.find_resumed`.
        base: as of `start.find_base`.

    Raises:
        UserError: `--fast yes`, and the fast path differs from the model.
    """
    conf = system.config
    training, data = conf["training"], conf["data"]
    train_set, valid_set = system.train_loader.dataset, system.val_loader.dataset
    exp_dir = Path(conf["main_args"]["exp_dir"])
    batches = count_batches(conf, len(train_set), trainer.world_size)
    parameters = sum(parameter.numel() for parameter in system.model.parameters())
    how = "whole tracks" if training["valid_method"] == "full" else training["valid_method"]
    chosen = describe_validation(valid_set.tracks, data["valid_tracks"])
    rows = {
        "model": f"{describe_model(system.model)}, {parameters:,} parameters,"
        f" {data['sample_rate']} Hz",
        **describe_start(conf, system.model, base),
        "runs as": _describe_forward(system.model, training),
        "training": f"{_describe_tracks(train_set)}, in random segments of {data['segment']} s",
        "validation": f"{_describe_tracks(valid_set)}, {how}, {chosen}",
        "data": _describe_data(data["root"], [*train_set.tracks, *valid_set.tracks]),
        "epoch": f"{len(train_set)} items = {plural(batches, 'batch', 'batches')} of"
        f" {training['batch_size']} per device,"
        f" {plural(training['aggregate'], 'batch', 'batches')} to an optimizer step",
        "end": _describe_limits(training, trainer),
        "loss": _describe_loss(system.loss_func),
        "optimizer": f"{describe_optimizer(system.optimizer)}; seed {training['seed']}",
        "schedule": ", ".join(map(describe_object, list_schedules(system))) or "none",
        **_describe_average(training),
        "devices": f"{_describe_devices(trainer)}, precision {training['precision']},"
        f" memory {training['memory']}, compile {training['compile']}",
        "versions": describe_versions(),
        "code": f"{__version__}, commit {find_commit()}",
        "output": f"{exp_dir}, {describe_disk(exp_dir, training, parameters)}",
    }
    lines = [f"{name:<11}{text}" for name, text in rows.items()]
    return "\n".join(lines + ([resumed.describe(conf, trainer)] if resumed else []))


def describe_model(model: torch.nn.Module) -> str:
    name = type(model).__name__
    if not isinstance(model, ConvTasNetStereo):
        return name
    return f"{name}, {'causal' if model.causal else 'non-causal'}, {model.norm_type}"


def _describe_loss(loss_func: Callable) -> str:
    note = getattr(loss_func, "note", "")
    return f"{describe_object(loss_func)}; {note}" if note else describe_object(loss_func)


def _describe_average(training: dict) -> dict[str, str]:
    """A row for --ema, and none without."""
    if not training["ema"]:
        return {}
    return {"average": f"of the weights, with decay {training['ema']}, is validated and kept"}


def _describe_limits(training: dict, trainer: pl.Trainer) -> str:
    limits = [
        f"after {plural(limit, unit)}"
        for limit, unit in ((training["epochs"], "epoch"), (training["max_steps"], "step"))
        if limit > 0
    ]
    if stopper := trainer.early_stopping_callback:
        limits.append(f"by {describe_object(stopper)}")
    return ", or ".join(limits) or "when it is interrupted: there is no limit"


def _describe_forward(model: torch.nn.Module, training: dict) -> str:
    try:
        text = describe_fast(model, training["fast"], training=True)
    except ValueError as error:
        raise UserError(f"--fast {training['fast']}: {error}") from None
    if choose_fast(model, training["fast"], training=True):
        return text
    note = find_recomputed(model, training["memory"])[1]
    return f"{text}; {note}" if note else text


def _describe_tracks(dataset: SegmentDataset | TrackDataset) -> str:
    minutes = sum(track.seconds for track in dataset.tracks) / 60
    duration = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
    return f"{plural(len(dataset.tracks), 'track')} ({duration})"


def _describe_data(roots, tracks: list) -> str:
    """The roots, with their numbers of tracks where there are several, and what is special."""
    shown = list(map(str, list_roots(roots)))
    if len(shown) > 1:
        counts = Counter(str(track.place.root) for track in tracks)
        shown = [f"{root} ({plural(counts[root], 'track')})" for root in shown]
    used = {track.place for track in tracks}
    unused = [place.name for place in list_places(roots, TRAINING_SPLITS) if place not in used]
    notes = describe_layout(tracks)
    if unused:
        notes.append(
            f"{plural(len(unused), 'track')} neither for training nor for validation:"
            f" {name_some(unused)}"
        )
    return ("\n" + " " * 11).join([", ".join(shown), *notes])


def _describe_devices(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"CPU ({plural(torch.get_num_threads(), 'thread')})"
        if torch.backends.mps.is_available():
            name += ", not MPS, which has no float64"
    else:
        name = device.type
    return f"{trainer.world_size} x {name}"
