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
from typing import TYPE_CHECKING

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.tools.choices import AUDIO_FORMATS, add_data_flags
from local.tools.command_line import (
    OneLineParser,
    cleaning_up_on_sigterm,
    clear_errors,
    plural,
    raise_together,
)
from local.tools.progress import add_progress_flags, set_progress

if TYPE_CHECKING:  # what makes the page takes seconds to import
    from local.listen.signals import Options

TRACK_MEMORY = 1.5e9  # bytes, of a track of six minutes


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.page", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="EXP/OUT of eval.py; the baseline first")
    add("-o", "--out", type=Path, required=True, help="folder to write; an older page is replaced")
    add(
        "--audio",
        choices=AUDIO_FORMATS,
        default=AUDIO_FORMATS[0],
        help="format of the audio [%(default)s]",
    )
    add("--excerpt", type=int, metavar="SECONDS", help="of the loudest vocals alone [all]")
    add("--no_references", action="store_true", help="leave the data set's audio out")
    add_data_flags(parser)
    add("--jobs", type=int, help="tracks at a time [as cores and free memory allow]")
    add_progress_flags(parser)
    with clear_errors(parser.prog), cleaning_up_on_sigterm():
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        raise_together(find_flag_faults(args))
        from local.listen.signals import Options

        options = Options(args.audio, args.excerpt, not args.no_references)
        make_page(args.runs, args.out, args, options, args.jobs)


def find_flag_faults(args: Namespace) -> list[str]:
    faults = []
    if args.excerpt is not None and args.excerpt < 1:
        faults.append(f"--excerpt must be at least 1, got {args.excerpt}")
    if args.jobs is not None and args.jobs < 1:
        faults.append(f"--jobs must be at least 1, got {args.jobs}")
    return faults


def make_page(
    folders: list[Path],
    out: Path,
    data: Namespace,
    options: Options | None = None,
    jobs: int | None = None,
) -> None:
    """Write the page; print its size before, and what to open after.

    Args:
        folders: of the runs, the baseline first.
        data: the flags of `choices.add_data_flags`.
        jobs: tracks at a time; None: as cores and free memory allow.

    Raises:
        UserError: lists all faults of the runs, the data set or `out`; an older page stays as it
            is.
    """
    from local.comparison.runs import printable
    from local.eval.out import report_failed_access
    from local.listen.build import check_room, plan_tracks, reckon_bytes, show_bytes, write_page
    from local.listen.dataset import find_references
    from local.listen.folder import check_folder
    from local.listen.overview import make_overview
    from local.listen.runs import find_missing_audio, read_runs
    from local.listen.signals import Options
    from local.tools.files import replaced_folder

    check_folder(out)
    runs, scores, rate = read_runs(folders)
    options = options or Options()
    wanted = options.with_references and rate
    references = find_references(runs, rate, data) if wanted else {}
    plans = plan_tracks(make_overview(runs, scores), references, rate)
    size = reckon_bytes(plans, options)
    check_room(out, size)
    with_audio = sum(bool(plan.players) for plan in plans)
    tracks = f"{plural(len(plans), 'track')}, {with_audio} with audio"
    print(f"{out}: {tracks}: up to {show_bytes(size)}")
    for line in find_missing_audio(runs):
        print(line, flush=True)
    parent = next(path for path in out.absolute().parents if path.is_dir())
    with report_failed_access(parent), replaced_folder(out) as folder:
        folder.mkdir()
        write_page(plans, folder, options, jobs or choose_jobs())
    print(f"To see and hear: open {printable(out / 'index.html')}")


def choose_jobs() -> int:
    """Choose how many tracks to work on at a time, by cores and free memory."""
    from local.tools.memory import shared_memory

    return max(1, min(len(os.sched_getaffinity(0)), int(shared_memory() // TRACK_MEMORY)))


if __name__ == "__main__":
    main()
