"""Separate and score MUSDB18's test tracks: python eval.py --exp_dir EXP --out_dir OUT ..."""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from local.checkpoint import atomic_path
from local.config import (
    CHOICES,
    OneLineParser,
    UserError,
    clear_errors,
    plural,
    raise_together,
    read_yaml,
)
from local.inference import separate
from local.scoring import RESULTS, ScoredTrack, open_test_set, score_track, write_results
from local.separate import (
    add_method_flags,
    check_method,
    load_separator,
    name_targets,
    progress_bar,
    save_estimates,
)
from local.stems import need_ffmpeg
from local.tasnet import ConvTasNetStereo

SUFFIXES = CHOICES["suffix"]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with clear_errors(parser.prog):
        try:
            failures = evaluate(parser.parse_args(argv))
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from None
    if failures:
        raise SystemExit(1)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="eval.py", description=__doc__)
    add = parser.add_argument
    add("--exp_dir", type=Path, default="exp/tmp", help="folder of the run [%(default)s]")
    add("--out_dir", required=True, help="folder in exp_dir for everything that is written")
    add("--use_gpu", type=int, choices=(0, 1), default=0, help="1: run on the GPU [%(default)s]")
    add("--n_save_ex", type=int, default=10, help="tracks to save as audio; -1: all [%(default)s]")
    add("--checkpoint", help="a best_model.pth, .ckpt, folder or hub name [the run's best model]")
    add("--root", type=Path, help="the MUSDB18 or MUSDB18-HQ folder [the run's]")
    add("--suffix", choices=SUFFIXES, help="of the files under root [the run's]")
    add_method_flags(parser)
    add("--float32", action="store_true", help="save 32-bit float wav instead of 16-bit")
    return parser


def evaluate(args: Namespace) -> dict[str, str]:
    """Separates and scores every test track; returns the tracks that failed, and why.

    Raises:
        UserError, DatasetError: a fault of the arguments, the checkpoint or the files.
    """
    raise_together(find_faults(args))
    checkpoint = args.checkpoint or args.exp_dir / "best_model.pth"
    root, suffix = find_test_set(args)
    model = load_separator(checkpoint).to("cuda" if args.use_gpu else "cpu")
    check_method(model, args)
    tracks = open_test_set(root, model.samplerate, suffix)
    out = prepare_out(args.exp_dir / args.out_dir, tracks)
    print(describe_evaluation(args, checkpoint, root, len(tracks)), flush=True)

    scored, failures = [], {}
    for number, (name, read) in enumerate(tracks.items(), start=1):
        saves = args.n_save_ex == -1 or number <= args.n_save_ex
        try:
            title, folder = f"[{number}/{len(tracks)}] {name}", out / name if saves else None
            track = evaluate_track(name, read(), model, args, title, folder)
        except ValueError as error:  # the track cannot be read, or not be scored
            failures[name] = str(error)
            print(f"{name}: not scored: {error}", file=sys.stderr)
            continue
        with atomic_path(out / "test" / f"{name}.json") as temporary:
            temporary.write_text(track.store.json, encoding="utf-8")
        scored.append(track)
    print(f"\n{write_results(out, scored, failures)}\nAll of it is in {out}")
    return failures


def find_faults(args: Namespace) -> list[str]:
    """What is wrong with the arguments, a line each."""
    faults = []
    if args.use_gpu and not torch.cuda.is_available():
        faults.append("--use_gpu 1: torch sees no GPU; use --use_gpu 0")
    if args.n_save_ex < -1:
        faults.append(f"--n_save_ex must be at least 0, or -1 for all, got {args.n_save_ex}")
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
    return faults


def find_test_set(args: Namespace) -> tuple[Path, str]:
    """(root, suffix): of the arguments, or else of the run's conf.yml."""
    conf_file = args.exp_dir / "conf.yml"
    data = read_yaml(conf_file).get("data") if conf_file.is_file() else None
    data = data if isinstance(data, dict) else {}
    root, suffix = args.root or data.get("root"), args.suffix or data.get("suffix", "wav")
    if not root:
        raise UserError(f"--root is needed: {conf_file} names no data set")
    if suffix not in SUFFIXES:
        raise UserError(f"{conf_file}: data.suffix must be wav or flac, got {suffix}")
    return Path(str(root)), suffix


def prepare_out(out: Path, names: dict) -> Path:
    """Makes the folder for the results, and in it test/ for the scores per track.

    Raises:
        UserError: it cannot be written, or holds scores of tracks that this run will not replace.
    """
    scores = (out / "test").glob("*.json")
    others = sorted(path.name for path in scores if path.stem not in names)
    if others:
        raise UserError(
            f"--out_dir: {out} holds scores of another test set ({others[0]},"
            f" {len(others)} in all); name another --out_dir"
        )
    try:
        (out / "test").mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir: {out} cannot be written: {error.strerror}") from None
    return out


def describe_evaluation(args: Namespace, checkpoint, root: Path, tracks: int) -> str:
    """What will be scored on what, for the first screen."""
    device = torch.cuda.get_device_name() if args.use_gpu else "the CPU"
    if not args.use_gpu and torch.cuda.is_available():
        device += " (--use_gpu 1 runs on the GPU)"
    windows = f" of {args.segment} s with {args.overlap} s of crossfade"
    if args.method != "overlap-add":
        windows = ""
    return (
        f"{plural(tracks, 'test track')} of {root}\n"
        f"separated by {checkpoint} on {device}, method {args.method}{windows}"
    )


def evaluate_track(
    name: str,
    audio: dict[str, np.ndarray],
    model: ConvTasNetStereo,
    args: Namespace,
    title: str,
    folder: Path | None,
) -> ScoredTrack:
    """Separates and scores a track, and saves the estimates where there is a folder for them."""
    mixture, rate = torch.from_numpy(audio["mixture"].astype(np.float32)), model.samplerate
    settings = args.method, args.segment, args.overlap
    with progress_bar(f"{title}, separating", mixture.shape[-1], rate) as bar:
        estimates = name_targets(separate(model, mixture, *settings, bar.update))
        bar.set_description(f"{title}, scoring")
        track = score_track(name, rate, audio, estimates)
        bar.set_description(title)
    if folder:
        save_estimates(folder, estimates, rate, args.float32)
    return track


if __name__ == "__main__":
    main()
