"""The challenge's own run: a remix for each listener of each scene in its metadata."""

import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from local.estimates import separate_targets
from local.lift.listener import LUFS
from local.lift.loudness import LoudnessMeter
from local.lift.mixture import find_gain
from local.lift.package import RATE, Pair, Segment
from local.lift.remix import mix
from local.musdb18_tracks import TARGETS
from local.needs import describe_failure
from local.songs.batch import writing_to
from local.tools.command_line import UserError, plural
from local.tools.files import atomic_path, read_yaml
from local.tools.formats import FORMATS
from local.tools.progress import report
from local.tools.sound_writer import SoundWriter
from local.tools.values import find_changed_setting

FOLDER, RECORD = "enhanced_signals", "made_from.yml"


def enhance_scenes(
    model: nn.Module, pairs: dict[Segment, list[Pair]], args: Namespace, settings: dict
) -> int:
    """Write DIR/enhanced_signals/SCENE_LISTENER_AALPHA_remix.flac of all pairs that have none yet.

    A segment is separated once for all its pairs.

    Args:
        args: `out`, `overwrite`, `device`, and the flags of `add_method_flags`.
        settings: see `estimates.describe_settings`.

    Returns:
        how many segments failed.

    Raises:
        UserError: the model is of another sampling rate; or DIR has remixes by other settings, or
            cannot be written.
    """
    if model.samplerate != RATE:
        raise UserError(
            f"--checkpoint {args.checkpoint}: --scenes needs a model of {RATE} Hz, this one is of"
            f" {model.samplerate} Hz"
        )
    folder = args.out / FOLDER
    with writing_to(args.out):
        folder.mkdir(parents=True, exist_ok=True)
        keep_record(args.out / RECORD, settings, args.overwrite)
    on_cpu = "" if args.device == "cpu" else "--device cpu"
    failed = made = there = 0
    for number, (segment, all_pairs) in enumerate(pairs.items(), start=1):
        title = f"[{number}/{len(pairs)}] {segment.name}"
        there_already = [pair for pair in all_pairs if (folder / pair.file).exists()]
        missing = [p for p in all_pairs if args.overwrite or p not in there_already]
        there += len(all_pairs) - len(missing)
        if not missing:
            continue
        try:
            made += enhance_segment(model, segment, missing, folder, args, title)
        except Exception as error:
            report(f"{title}: {describe_failure(error, args, on_cpu)}", sys.stderr)
            failed += 1
    faults = f", {plural(failed, 'segment')} with faults" if failed else ""
    report(f"{plural(made, 'remix', 'remixes')} written to {folder}, {there} there already{faults}")
    return failed


def enhance_segment(
    model: nn.Module, segment: Segment, pairs: list[Pair], folder: Path, args: Namespace, title: str
) -> int:
    """Write the remixes of a segment, and return how many."""
    mixture = segment.read()
    meter = LoudnessMeter(RATE, len(mixture))
    meter.add(mixture.T)
    gain = find_gain(meter.measure(), LUFS, title)
    estimates = separate_targets(model, torch.from_numpy(np.float32(gain) * mixture), args, title)
    vocals, accompaniment = (estimates[target] for target in TARGETS)
    for pair in pairs:
        remix = pair.compressor.compress(mix(vocals, accompaniment, pair.alpha), RATE)
        save(folder / pair.file, remix, title)
    return len(pairs)


def save(path: Path, remix: np.ndarray, title: str) -> None:
    """Write (2, T) as 16-bit flac, clipped, as the challenge's scorer reads it."""
    with writing_to(path.parent), atomic_path(path) as temporary:
        with SoundWriter(temporary, RATE, len(remix), FORMATS["flac16"]) as file:
            file.write(remix.T)
    if file.clipped:
        report(f"{title}: {plural(file.clipped, 'sample')} clipped at full scale in {path.name}")


def keep_record(path: Path, settings: dict, overwrite: bool) -> None:
    """Write what made the remixes, or compare it with what made those that are there.

    Several jobs may do so at once.

    Raises:
        UserError: those that are there were made by other settings.
    """
    if path.exists() and not overwrite:
        if change := find_changed_setting(read_yaml(path), settings):
            advice = "--overwrite makes them again, --out writes elsewhere"
            raise UserError(f"{path.parent} holds remixes {change}; {advice}")
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        yaml.safe_dump(settings, file, sort_keys=False)
    os.replace(file.name, path)
