"""What the flags of eval.py mean, and what is wrong with them."""

import os
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from local.fast.choose import describe_fast
from local.tools.choices import SUFFIXES
from local.tools.command_line import UserError, plural, raise_together
from local.tools.ffmpeg import need_ffmpeg
from local.tools.files import read_yaml
from local.tools.ranks import Ranks


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
    if args.root and not args.root.is_dir():
        faults.append(f"--root: no such folder: {args.root}")
    if not args.checkpoint and not (args.exp_dir / "best_model.pth").is_file():
        faults.append(
            f"--exp_dir: {args.exp_dir} holds no best_model.pth; train first, or pass --checkpoint"
        )
    try:
        need_ffmpeg()
    except UserError as error:
        faults.append(str(error))
    raise_together(faults)


def find_test_set(args: Namespace) -> tuple[Path, str]:
    """Return (root, suffix) by the flags, or else by conf.yml of the run.

    Raises:
        UserError: neither names a root, or conf.yml cannot be used.
    """
    conf_file = args.exp_dir / "conf.yml"
    data = read_yaml(conf_file).get("data") if conf_file.is_file() else None
    data = data if isinstance(data, dict) else {}
    root, suffix = args.root or data.get("root"), args.suffix or data.get("suffix", "wav")
    if not root:
        raise UserError(f"--root is needed: {conf_file} has no data.root")
    if suffix not in SUFFIXES:
        raise UserError(f"{conf_file}: data.suffix must be {' or '.join(SUFFIXES)}, got {suffix}")
    return Path(os.path.expanduser(str(root))), suffix


def choose_device(use_gpu: int, ranks: Ranks) -> torch.device:
    """Return the CPU, or the GPU of this rank."""
    if not use_gpu:
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def describe_evaluation(args: Namespace, model: nn.Module, tracks: int) -> str:
    """Return the first lines of the output: what is separated, by what, where and how."""
    device = torch.cuda.get_device_name() if args.use_gpu else "the CPU"
    if not args.use_gpu and torch.cuda.is_available():
        device += " (--use_gpu 1 runs on the GPU)"
    segments = ""
    if args.method == "overlap-add":
        segments = f" (--segment {args.segment}, --overlap {args.overlap}, in seconds)"
    return (
        f"{plural(tracks, 'test track')} of {args.root}\n"
        f"separated by {args.checkpoint} on {device}, method {args.method}{segments}\n"
        f"through {describe_fast(model, args.fast)}"
    )
