"""Separate and score MUSDB18's test tracks: python eval.py --exp_dir EXP --out_dir OUT ..."""

import inspect
import os
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from local.checkpoint import find_weights
from local.eval.results import (
    RESULTS,
    ScoredTrack,
    find_change,
    load_track,
    remove_track,
    write_results,
)
from local.eval.scoring import ScoringPool, choose_jobs, remove_estimates
from local.eval.tracks import TestTrack, describe_files, list_files, open_test_set, read_mixture
from local.fast.equal import describe_fast
from local.inference import separate
from local.separate import (
    add_method_flags,
    check_flags,
    load_separator,
    name_targets,
    progress_bar,
    save_estimates,
)
from local.tools.choices import SCORERS, SUFFIXES
from local.tools.command_line import OneLineParser, UserError, clear_errors, plural, raise_together
from local.tools.ffmpeg import need_ffmpeg
from local.tools.files import LONGEST_NAME, is_failed_access, locked, read_yaml, sha256
from local.tools.ranks import Ranks, joined_ranks


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        try:
            failures = evaluate(args)
        except BrokenPipeError:
            raise
        except OSError as error:
            places = (args.exp_dir, args.root, args.checkpoint and Path(args.checkpoint))
            if not is_failed_access(error, *filter(None, places)):
                raise
            place = error.filename or args.exp_dir / args.out_dir
            reason = error.strerror or f"cannot be written (is the disk full?): {error}"
            raise UserError(f"{place}: {reason}") from None
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
    add("--scorer", choices=SCORERS, default=SCORERS[0], help="same numbers, slower: museval")
    add("--jobs", type=int, help="tracks to score at a time [as cores and free memory allow]")
    return parser


def evaluate(args: Namespace) -> dict[str, str]:
    """Separates and scores every test track that is not scored yet, or this rank's share of them.

    Returns:
        the tracks that failed, and why; on rank 0 those of all ranks.

    Raises:
        UserError, DatasetError: a fault of the arguments, the checkpoint or the files.
        OSError: something cannot be written.
    """
    raise_together(find_faults(args))
    with joined_ranks() as ranks, ExitStack() as held:
        checkpoint = args.checkpoint or args.exp_dir / "best_model.pth"
        args.root, args.suffix = find_test_set(args)
        model = load_separator(checkpoint).to(choose_device(args, ranks))
        check_flags(model, args)
        tracks = open_test_set(args.root, model.samplerate, args.suffix)
        out = args.exp_dir / args.out_dir
        kept, missing = [], {}
        if ranks.rank == 0:
            prepare_out(out, tracks)
            held.enter_context(locked(out))
            remove_leftovers(out)
            print(describe_evaluation(args, checkpoint, len(tracks), model), flush=True)
            records = plan_records(tracks, args, describe_settings(args, checkpoint, model))
            kept, missing = find_scored(records, out)
        longest_first = sorted(
            ranks.broadcast(missing).items(), key=lambda item: item[0].seconds, reverse=True
        )
        share = dict(longest_first[ranks.rank :: ranks.count])
        gathered = ranks.gather(score_share(share, out, model, args, ranks))
        if ranks.rank != 0:
            return {}
        scored = kept + [track for found, _ in gathered for track in found]
        failures = {name: reason for _, failed in gathered for name, reason in failed.items()}
        text = write_results(out, sorted(scored, key=lambda track: track.name), failures)
        print(f"\n{text}\nAll of it is in {out}")
        return failures


def find_faults(args: Namespace) -> list[str]:
    """What is wrong with the arguments, a line each."""
    faults = []
    if args.use_gpu and not torch.cuda.is_available():
        faults.append("--use_gpu 1: torch sees no GPU; use --use_gpu 0")
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


def choose_device(args: Namespace, ranks: Ranks) -> torch.device:
    if not args.use_gpu:
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def prepare_out(out: Path, tracks: list[TestTrack]) -> None:
    """Makes the folder for the results, and in it test/ for the scores per track.

    Raises:
        UserError: it cannot be written, is that of the tracks, holds scores of tracks that this run
            will not replace, or a track has a name that cannot be had there.
    """
    names, faults = [track.name for track in tracks], []
    own = {file.parent.resolve() for track in tracks for file in list_files(track)}
    if own & {folder.resolve() for folder in (out, out / "test", *(out / name for name in names))}:
        faults.append(
            f"--out_dir: {out} is where the test tracks are, and they would be replaced; name"
            " another --out_dir"
        )
    scores = (out / "test").glob("*.json")
    if others := sorted(path.name for path in scores if path.stem not in names):
        faults.append(
            f"--out_dir: {out} holds scores of another test set ({others[0]},"
            f" {len(others)} in all); name another --out_dir"
        )
    faults += [
        f"--root: a track called {name} would replace what is called so in {out}; rename it"
        for name in sorted({"test", *RESULTS} & set(names))
    ]
    faults += [
        f"--root: the name of {name} is too long for that of its scores; rename it"
        for name in names
        if len(os.fsencode(f"{name}.json")) > LONGEST_NAME
    ]
    raise_together(faults)
    try:
        (out / "test").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir: {out} cannot be written: {error.strerror}") from None


def remove_leftovers(out: Path) -> None:
    """Removes the results of an earlier run, which hold until this one starts, but no scores."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    remove_estimates(out)


def describe_evaluation(
    args: Namespace, checkpoint: str | Path, tracks: int, model: nn.Module
) -> str:
    """What will be scored on what, for the first screen."""
    device = torch.cuda.get_device_name() if args.use_gpu else "the CPU"
    if not args.use_gpu and torch.cuda.is_available():
        device += " (--use_gpu 1 runs on the GPU)"
    windows = f" of {args.segment} s with {args.overlap} s of crossfade"
    if args.method != "overlap-add":
        windows = ""
    return (
        f"{plural(tracks, 'test track')} of {args.root}\n"
        f"separated by {checkpoint} on {device}, method {args.method}{windows}\n"
        f"through {describe_fast(model, args.fast)}"
    )


def describe_settings(args: Namespace, checkpoint: str | Path, model: nn.Module) -> dict:
    """What decides about the scores of a track: runs that have it in common give the same."""
    window = {"segment": args.segment, "overlap": args.overlap}
    return {
        "checkpoint": sha256(find_weights(checkpoint)),
        "model_code": sha256(Path(inspect.getsourcefile(type(model)))),
        "method": args.method,
        **(window if args.method == "overlap-add" else {}),
        "scorer": args.scorer,
    }


def plan_records(tracks: list[TestTrack], args: Namespace, settings: dict) -> dict[TestTrack, dict]:
    """track -> the record that its scores are to have: see `results.save_track`."""
    kind = "FLOAT" if args.float32 else "PCM_16"
    count = len(tracks) if args.n_save_ex == -1 else args.n_save_ex
    return {
        track: {
            "made_with": settings,
            "files": describe_files(track),
            "saved": kind if number < count else None,
        }
        for number, track in enumerate(tracks)
    }


def find_scored(
    records: dict[TestTrack, dict], out: Path
) -> tuple[list[ScoredTrack], dict[TestTrack, dict]]:
    """(what OUT holds as this run would score it, the records still to be made); says why some
    tracks are scored again.
    """
    kept, missing, reasons = [], {}, {}
    for track, record in records.items():
        try:
            found = load_track(out, track.name)
            reason = find_change(out, found, record) if found else "not scored yet"
        except ValueError as error:
            reason = str(error)
        if reason:
            missing[track] = record
            reasons.setdefault(reason, []).append(track.name)
        else:
            kept.append(found)
    reasons.pop("not scored yet", None)
    if kept:
        print(f"{plural(len(kept), 'track')} scored already")
    for reason, names in reasons.items():
        print(f"{plural(len(names), 'track')} to score again, {reason}: {', '.join(names)}")
    return kept, missing


def score_share(
    records: dict[TestTrack, dict],
    out: Path,
    model: nn.Module,
    args: Namespace,
    ranks: Ranks,
) -> tuple[list[ScoredTrack], dict[str, str]]:
    """Separates and scores the tracks of a rank; separation does not wait for scores.

    Returns:
        (the scored tracks, those that failed and why).
    """
    jobs = args.jobs or choose_jobs(list(records), args.scorer, ranks.local_count)
    with ScoringPool(out, jobs, args.scorer, ranks.rank) as pool:
        for number, (track, record) in enumerate(records.items(), start=1):
            title = f"[{number}/{len(records)}] {track.name}"
            try:
                estimates = separate_track(track, model, args, title)
            except ValueError as error:  # it cannot be read, or its estimates are not finite
                pool.fail(track, error)
                continue
            remove_track(out, track.name)  # else a run that ends here would leave old scores to it
            if record["saved"]:
                save_estimates(out / track.name, estimates, track.rate, args.float32)
            pool.submit(track, estimates, record)
        return pool.finish()


def separate_track(
    track: TestTrack, model: nn.Module, args: Namespace, title: str
) -> dict[str, np.ndarray]:
    """target -> (2, T) estimate.

    Raises:
        ValueError: the mixture cannot be read, or an estimate holds NaN or infinity.
    """
    mixture = torch.from_numpy(read_mixture(track))
    with progress_bar(title, mixture.shape[-1], model.samplerate) as bar:
        window = args.segment, args.overlap
        sources = separate(model, mixture, args.method, *window, bar.update, args.fast)
    estimates = name_targets(sources)
    for target, estimate in estimates.items():
        if not np.isfinite(estimate).all():
            raise ValueError(f"the estimate of {target} holds NaN or infinity")
    return estimates


if __name__ == "__main__":
    main()
