"""What the flags of eval.py mean, and what is wrong with them."""

import os
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from local.eval.tracks import TestTrack
from local.fast.choose import describe_fast
from local.musdb18_tracks import Track, describe_layout
from local.tools.choices import MISSING_STEMS, SUFFIX
from local.tools.command_line import UserError, plural, raise_together, suggest_path
from local.tools.ffmpeg import need_ffmpeg
from local.tools.files import read_yaml
from local.tools.ranks import Ranks
from local.tracks.roots import find_root_faults

# Flags of the data besides --root, and what they mean where neither they nor the run name a value.
DATA_FLAGS = {"suffix": "auto", "stem_names": "", "missing_stems": "error", "valid_tracks": None}
TRACKS_OF = {"train": "training track", "valid": "validation track", "test": "test track"}


def check_flags(args: Namespace) -> None:
    """Raise a UserError that lists the faults of the flags."""
    faults = []
    if args.use_gpu and not torch.cuda.is_available():
        faults.append("--use_gpu 1: torch finds no GPU; use --use_gpu 0")
    if args.n_save_ex < -1:
        faults.append(f"--n_save_ex must be at least 0, or -1 for all, got {args.n_save_ex}")
    if args.jobs is not None and args.jobs < 1:
        faults.append(f"--jobs must be at least 1, got {args.jobs}")
    if args.method == "overlap-add" and not 0 <= args.overlap < args.segment:
        faults.append(
            f"--overlap must be at least 0 and below --segment,"
            f" got {args.overlap} and {args.segment}"
        )
    if not args.out_dir:
        faults.append("--out_dir must not be empty")
    if args.root:
        faults += find_root_faults(args.root)
    if not args.checkpoint and not (args.exp_dir / "best_model.pth").is_file():
        faults.append(
            f"--exp_dir: {args.exp_dir} holds no best_model.pth; train first, or pass --checkpoint"
            + suggest_path(args.exp_dir)
        )
    try:
        need_ffmpeg()
    except UserError as error:
        faults.append(str(error))
    raise_together(faults)


def fill_data_flags(args: Namespace) -> dict:
    """Set the flags of the data that were not given, by conf.yml of the run.

    Returns:
        what `open_test_set` takes besides the roots and the rate.

    Raises:
        UserError: neither names a root, or conf.yml cannot be used.
    """
    conf_file = args.exp_dir / "conf.yml"
    data = read_yaml(conf_file).get("data") if conf_file.is_file() else None
    data = data if isinstance(data, dict) else {}
    if not args.root:
        if not data.get("root"):
            raise UserError(f"--root is needed: {conf_file} has no data.root")
        roots = data["root"] if isinstance(data["root"], list) else [data["root"]]
        args.root = [Path(os.path.expanduser(str(root))) for root in roots]
    choices = {"suffix": SUFFIX, "missing_stems": MISSING_STEMS}
    for key, default in DATA_FLAGS.items():
        if getattr(args, key) is None:
            setattr(args, key, data.get(key) or default)
    for key, allowed in choices.items():
        if (value := getattr(args, key)) not in allowed:
            rule = f"must be one of {', '.join(allowed)}, got {value}"
            raise UserError(f"{conf_file}: data.{key} {rule}")
    return {key: getattr(args, key) for key in ("split", *DATA_FLAGS)}


def choose_device(use_gpu: int, ranks: Ranks) -> torch.device:
    """Return the CPU, or the GPU of this rank."""
    if not use_gpu:
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def describe_evaluation(args: Namespace, model: nn.Module, tracks: list[TestTrack]) -> str:
    """Return the first lines of the output: what is separated, by what, where and how."""
    device = torch.cuda.get_device_name() if args.use_gpu else "the CPU"
    if not args.use_gpu and torch.cuda.is_available():
        device += " (--use_gpu 1 runs on the GPU)"
    segments = ""
    if args.method == "overlap-add":
        segments = f" (--segment {args.segment}, --overlap {args.overlap}, in seconds)"
    return (
        f"{_describe_tracks(args, tracks)}\n"
        f"separated by {args.checkpoint} on {device}, method {args.method}{segments}\n"
        f"through {describe_fast(model, args.fast)}"
    )


def _describe_tracks(args: Namespace, tracks: list[TestTrack]) -> str:
    """Return which tracks are evaluated, and what is special about their files."""
    with_tracks = {track.place.root for track in tracks}
    lines = [
        f"{plural(len(tracks), TRACKS_OF[args.split])} of"
        f" {', '.join(str(root) for root in args.root if root in with_tracks)}"
    ]
    lines += [
        f"{root} has no {TRACKS_OF[args.split]}" for root in args.root if root not in with_tracks
    ]
    return "\n".join(lines + describe_layout([t for t in tracks if isinstance(t, Track)]))
