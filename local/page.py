"""A page to see and hear what runs of eval.py make of their tracks, opened without a server.

`python -m local.page EXP/OUT [RUN ...] --out FOLDER` writes FOLDER/index.html: medians with
intervals, box plots, tables, and for each track players of the mixture, the references and the
estimates, in step, with scores over time. It opens from disk, or on any web host. MUSDB18's audio
may not be republished: --no_references leaves it out.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.tools.choices import SPLITS
from local.tools.command_line import (
    OneLineParser,
    cleaning_up_on_sigterm,
    clear_errors,
    raise_together,
)
from local.tools.progress import add_progress_flags, set_progress

FORMATS = ("flac", "opus")
TRACK_MEMORY = 1.5e9  # bytes, of a track of six minutes


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.page", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="EXP/OUT of eval.py; the baseline first")
    add("-o", "--out", type=Path, required=True, help="folder to write; an older page is replaced")
    add("--audio", choices=FORMATS, default=FORMATS[0], help="format of the audio [%(default)s]")
    add("--excerpt", type=int, metavar="SECONDS", help="of the loudest vocals alone [all]")
    add("--no_references", action="store_true", help="leave the data set's audio out")
    add("--root", type=Path, nargs="+", help="the data set that was scored [the run's]")
    add("--split", choices=SPLITS, default="test", help="that was scored [%(default)s]")
    add("--jobs", type=int, help="tracks at a time [as cores and free memory allow]")
    add_progress_flags(parser)
    with clear_errors(parser.prog), cleaning_up_on_sigterm():
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        make_page(args)


def make_page(args: Namespace) -> None:
    """Write the page; print its size before, and what to open after.

    Args:
        args: the flags of `main`.

    Raises:
        UserError: lists all faults of the flags, the runs, the data set and `out`; an older page
            stays as it is.
    """
    from local.comparison.runs import name_runs, printable, read_published, read_runs
    from local.eval.out import report_failed_access
    from local.listen.build import check_room, plan_tracks, reckon_bytes, show_bytes, write_page
    from local.listen.dataset import find_references
    from local.listen.folder import check_folder, replaced_folder
    from local.listen.overview import make_overview
    from local.listen.runs import find_notes, find_rate_faults, read_run
    from local.listen.tracks import Options

    faults = find_flag_faults(args)
    names, unnamed = name_runs(args.runs, taken=read_published()["run"].unique())
    faults += unnamed + read_runs(names)[1]
    raise_together(faults)
    found = [read_run(name, folder) for name, folder in names.items()]
    runs = [run for run, _ in found]
    faults = [fault for _, of_run in found for fault in of_run]
    raise_together(faults + find_rate_faults(runs))
    check_folder(args.out)

    rates = {rate for run in runs for rate in run.rates.values()}
    rate = next(iter(rates), 0)
    with_references = bool(rates) and not args.no_references
    references = find_references(runs, rate, args.root, args.split) if with_references else {}
    options = Options(args.audio, args.excerpt, with_references)
    plans = plan_tracks(make_overview(runs), references, rate)
    size = reckon_bytes(plans, options)
    check_room(args.out, size)
    count = sum(bool(plan.players) for plan in plans)
    print(f"{len(plans)} tracks, {count} with audio: up to {show_bytes(size)}", flush=True)
    print(*find_notes(runs), sep="\n", end="\n" if find_notes(runs) else "", flush=True)
    with report_failed_access(args.out), replaced_folder(args.out) as folder:
        write_page(plans, folder, options, args.jobs or choose_jobs())
    print(f"Written: open {printable(args.out / 'index.html')}")


def find_flag_faults(args: Namespace) -> list[str]:
    faults = []
    if args.excerpt is not None and args.excerpt < 1:
        faults.append(f"--excerpt must be at least 1, got {args.excerpt}")
    if args.jobs is not None and args.jobs < 1:
        faults.append(f"--jobs must be at least 1, got {args.jobs}")
    return faults


def choose_jobs() -> int:
    """Choose how many tracks to work on at a time, by cores and free memory."""
    from local.tools.memory import shared_memory

    return max(1, min(len(os.sched_getaffinity(0)), int(shared_memory() // TRACK_MEMORY)))


if __name__ == "__main__":
    main()
