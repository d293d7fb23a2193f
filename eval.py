"""Separate and score MUSDB18's test tracks: python eval.py --exp_dir EXP --out_dir OUT ..."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from local.tools.choices import add_data_flags, add_method_flags, add_scoring_flags
from local.tools.command_line import OneLineParser, clear_errors
from local.tools.progress import add_progress_flags, set_progress
from local.tools.slurm import requeueing

if TYPE_CHECKING:  # importing torch takes seconds, which --help need not wait for
    import numpy as np
    from torch import nn

    from local.eval.score_files import ScoredTrack
    from local.eval.tracks import TestTrack
    from local.tools.ranks import Ranks


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with clear_errors(parser.prog), requeueing():
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        from local.eval.out import report_failed_access

        named = filter(None, (args.exp_dir, *(args.root or ()), args.checkpoint))
        with report_failed_access(args.exp_dir / args.out_dir, *map(Path, named)):
            failures = evaluate(args)
    if failures:
        raise SystemExit(1)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="eval.py", description=__doc__)
    add = parser.add_argument
    add("--exp_dir", type=Path, default="exp/tmp", help="folder of the run [%(default)s]")
    add(
        "--out_dir",
        type=os.path.expanduser,
        required=True,
        help="folder in exp_dir for everything that is written",
    )
    add("--use_gpu", type=int, choices=(0, 1), default=0, help="1: run on the GPU [%(default)s]")
    add("--n_save_ex", type=int, default=10, help="tracks to save as audio; -1: all [%(default)s]")
    add(
        "--checkpoint",
        type=os.path.expanduser,
        help="a run's folder, best_model.pth, .ckpt, save_pretrained folder or hub name [the run's"
        " best model]",
    )
    add_data_flags(parser)
    add_method_flags(parser)
    add("--page", action="store_true", help="make a page to hear them, OUT/page: see local.page")
    add("--float32", action="store_true", help="save 32-bit float wav instead of 16-bit")
    add(
        "--float_references",
        action="store_true",
        help="read the test set as it is, not on the grid of 16 bits as musdb does",
    )
    add_scoring_flags(parser)
    add_progress_flags(parser)
    return parser


def evaluate(args: Namespace) -> dict[str, str]:
    """Separate and score the test tracks, except those whose scores in OUT are still valid.

    Several ranks share the tracks, and rank 0 writes the results.

    Returns:
        track -> why it has no scores; on rank 0 those of all ranks.

    Raises:
        UserError: the flags, the checkpoint, the test set or OUT cannot be used.
        OSError: a file cannot be read or written.
    """
    from local.estimates import check_method_flags, load_separator
    from local.eval.flags import check_flags, choose_device, describe_evaluation, fill_data_flags
    from local.eval.out import PAGE, choose_share, find_scored, plan_records, prepared_out
    from local.eval.results import write_results
    from local.eval.tracks import list_files, open_test_set
    from local.listen.folder import check_folder
    from local.page import make_page
    from local.tools.ranks import joined_ranks

    check_flags(args)
    data = fill_data_flags(args)
    args.checkpoint = args.checkpoint or args.exp_dir / "best_model.pth"
    out = args.exp_dir / args.out_dir
    if args.page:
        check_folder(out / PAGE)
    with joined_ranks() as ranks:
        model = load_separator(args.checkpoint).to(choose_device(args.use_gpu, ranks))
        check_method_flags(model, args)
        tracks = open_test_set(args.root, model.samplerate, **data)
        with prepared_out(out, {track.name: list_files(track) for track in tracks}, ranks):
            if ranks.rank == 0:
                print(describe_evaluation(args, model, tracks), flush=True)
            records = plan_records(args, model, tracks)
            scored, missing = find_scored(out, records, ranks)
            share = choose_share(missing, ranks)
            parts = ranks.gather(separate_and_score(share, out, model, args, ranks))
            if ranks.rank != 0:
                return {}
            scored += [track for found, _ in parts for track in found]
            failures = {name: reason for _, failed in parts for name, reason in failed.items()}
            text = write_results(out, sorted(scored, key=lambda track: track.name), failures)
            print(f"\n{text}\nAll results are in {out}")
            if args.page and scored:
                make_page([out], out / PAGE, args)
            elif os.path.exists(out / PAGE):
                print(f"{out / PAGE} is of an earlier evaluation; --page makes it again")
            return failures


def separate_and_score(
    records: dict[TestTrack, dict], out: Path, model: nn.Module, args: Namespace, ranks: Ranks
) -> tuple[list[ScoredTrack], dict[str, str]]:
    """Separate one track after another, while processes score those that are separated.

    Args:
        records: track -> what made its scores, which is saved beside them.

    Returns:
        (the scored tracks, track -> why it has no scores).
    """
    import torch

    from local.estimates import list_targets, save_estimates
    from local.eval.jobs import choose_jobs, choose_threads
    from local.eval.pool import ScoringPool
    from local.eval.score_files import remove_track
    from local.needs import describe_failure, separation_bytes, separation_seconds

    needs = {track: separation_bytes(model, track.seconds, args) for track in records}
    most, targets = max(needs.values(), default=0), len(list_targets(model))
    jobs = args.jobs or choose_jobs(records, args.scorer, ranks.local_count, most, targets)
    work = separation_seconds(model), args.scorer, targets
    form = "float32" if args.float32 else "wav16"
    torch.set_num_threads(choose_threads(torch.get_num_threads(), *work))
    with ScoringPool(out, jobs, args.scorer, args.float_references, ranks.rank, targets) as pool:
        for number, (track, record) in enumerate(records.items(), start=1):
            title = f"[{number}/{len(records)}] {track.name}"
            try:
                pool.wait_for_memory(track, needs[track])
                estimates = separate_track(track, model, args, title)
                # If the run stops here, no old scores may stay beside new audio.
                remove_track(out, track.name)
                if record["saved"]:
                    save_estimates(out / track.name, estimates, track.rate, form)
                pool.submit(track, estimates, record)
            except Exception as error:
                pool.fail(track, describe_failure(error, args, "--use_gpu 0" * args.use_gpu))
        return pool.finish()


def separate_track(
    track: TestTrack, model: nn.Module, args: Namespace, title: str
) -> dict[str, np.ndarray]:
    """Separate a track into target -> (2, T).

    Raises:
        ValueError: the mixture cannot be read, or an estimate holds NaN or infinity.
    """
    import numpy as np
    import torch

    from local.estimates import separate_targets
    from local.eval.tracks import read_mixture

    mixture = torch.from_numpy(read_mixture(track, args.float_references))
    estimates = separate_targets(model, mixture, args, title)
    for target, estimate in estimates.items():
        if not np.isfinite(estimate).all():
            raise ValueError(f"the estimate of {target} holds NaN or infinity")
    return estimates


if __name__ == "__main__":
    main()
