"""From a checkpoint to the estimates of vocals, accompaniment and other stems, and to wav files.

eval.py and local.separate share it.
"""

import inspect
from argparse import Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from local import inference
from local.checkpoint import find_weights, load_model
from local.fast.packed import find_precision_fault
from local.musdb18_tracks import SOURCES, TARGETS
from local.tools.command_line import UserError, plural
from local.tools.files import atomic_path, sha256
from local.tools.formats import FORMATS
from local.tools.progress import Lines, report, show_progress
from local.tools.sound_writer import SoundWriter


def load_separator(checkpoint: str | Path) -> nn.Module:
    """Load a stereo model whose first source is the vocals.

    Raises:
        UserError: the checkpoint cannot be loaded, or holds another kind of model.
    """
    model = load_model(checkpoint)
    if model.C < 2 or model.audio_channels != 2:
        raise UserError(
            f"--checkpoint {checkpoint}: expected a stereo model of vocals and other sources,"
            f" got {model.C} source(s) of {model.audio_channels} channel(s)"
        )
    return model


def check_method_flags(model: nn.Module, args: Namespace) -> None:
    """Raise a UserError where the model cannot be used with the flags of `add_method_flags`."""
    device = next(model.parameters()).device
    if fault := find_precision_fault(args.precision, device):
        raise UserError(f"--precision {args.precision}: {fault}")
    flags = {"overlap-add": "--segment, --overlap"}.get(args.method, "--method")
    for flag, method in {f"--fast {args.fast}": "full", flags: args.method}.items():
        try:
            inference.check_method(model, method, args.segment, args.overlap, args.fast)
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from None


def describe_settings(args: Namespace, model: nn.Module) -> dict:
    """Return what estimates depend on beside their song: equal settings give equal estimates."""
    segments = {"segment": args.segment, "overlap": args.overlap}
    return {
        "checkpoint": sha256(find_weights(args.checkpoint)),
        "model_code": sha256(Path(inspect.getsourcefile(type(model)))),
        "method": args.method,
        **(segments if args.method == "overlap-add" else {}),
        "precision": args.precision,
    }


def separate_targets(
    model: nn.Module, mixture: Tensor, args: Namespace, title: str
) -> dict[str, np.ndarray]:
    """Separate a mixture (2, T), showing progress, into target -> (2, T)."""
    with progress_bar(title, mixture.shape[-1], model.samplerate) as bar:
        settings = list_settings(args, bar.update)
        return name_targets(inference.separate(model, mixture, *settings))


def list_settings(args: Namespace, progress: inference.Progress) -> tuple:
    """Return the arguments of `inference.separate` after the mixture."""
    return args.method, args.segment, args.overlap, progress, args.fast, args.precision


def progress_bar(title: str, time: int, rate: int) -> tqdm | Lines:
    """Show progress in samples, as seconds; a line stays."""
    return show_progress(title, time, "s", scale=1 / rate, leave=True)


def list_targets(model: nn.Module) -> tuple[str, ...]:
    """Return what a model gives: see `name_targets`."""
    return (*TARGETS, *SOURCES[1:]) if model.C == len(SOURCES) else TARGETS


def name_targets(sources: Tensor) -> dict[str, np.ndarray]:
    """Turn (C, 2, T) into target -> (2, T): the accompaniment is the sum of all but the vocals.

    Four sources are SOURCES, as `--mix_background no` trains them, and each is a target, too.
    """
    targets = dict(zip(TARGETS, (sources[0].numpy(), sources[1:].sum(0).numpy()), strict=True))
    if len(sources) == len(SOURCES):
        targets |= dict(zip(SOURCES[1:], sources[1:].numpy(), strict=True))
    return targets


def save_estimates(folder: Path, estimates: dict[str, np.ndarray], rate: int, form: str) -> None:
    """Write target -> (channels, T) as files of a format: see `EstimateWriter`."""
    channels = len(next(iter(estimates.values())))
    with EstimateWriter(folder, rate, channels, form, estimates) as writer:
        writer.write(estimates)


class EstimateWriter:
    """Write estimates as FOLDER/TARGET.wav, say, block by block: all files whole, or none.

    Integers are clipped beyond full scale, which is reported at the end.

    Args:
        rate: of the estimates, in Hz. Files of a format that lacks it have the nearest one, which
            is said once.
        form: one of FORMATS.
        targets: those that are written.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, folder: Path, rate: int, channels: int, form: str, targets: Iterable[str]):
        self.folder, self.targets = folder, tuple(targets)
        self.form = rate, channels, FORMATS[form]
        say_rate(form, rate)

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            # All files are closed before the first gets its name.
            suffix = self.form[-1].suffix
            places = [self.folder / f"{target}.{suffix}" for target in self.targets]
            paths = [stack.enter_context(atomic_path(place)) for place in places]
            writers = [stack.enter_context(SoundWriter(path, *self.form)) for path in paths]
            self.files = dict(zip(self.targets, writers, strict=True))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self.stack.__exit__(*error)
        clipped = sum(file.clipped for file in self.files.values())
        if clipped and error[0] is None:
            samples = plural(clipped, "sample")
            print(f"{self.folder}: {samples} clipped at full scale in these files; see --float32")

    def write(self, estimates: dict[str, np.ndarray]) -> None:
        """Append target -> (channels, T)."""
        for target, estimate in estimates.items():
            self.files[target].write(estimate.T)


@cache
def say_rate(form: str, rate: int) -> None:
    """Say where a format lacks a rate, once in a process."""
    nearest = FORMATS[form].find_rate(rate)
    if nearest != rate:
        report(f"{form} has no rate of {rate} Hz; such estimates are written at {nearest} Hz")
