"""Score the estimates of any system, without a model and without musdb.

`python -m local.score REFERENCES ESTIMATES --out OUT` compares ESTIMATES/TRACK/TARGET.wav with
REFERENCES/TRACK/TARGET.wav, for any tracks and targets; both may also be the folder of one track.
The scores are museval's (BSSEval v4, frames of 1 s), beside SDR and SI-SDR of whole tracks.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local import __version__
from local.tools.choices import add_scoring_flags
from local.tools.command_line import OneLineParser, UserError, clear_errors, plural, raise_together
from local.tools.ffmpeg import need_ffmpeg
from local.tools.progress import add_progress_flags, set_progress

if TYPE_CHECKING:  # what scores takes seconds to import
    from local.eval.folders import FolderTrack
    from local.eval.score_files import ScoredTrack

FLAGS = "--out", "REFERENCES"  # that name OUT and the tracks


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.score", description=__doc__)
    add = parser.add_argument
    add("references", type=Path, metavar="REFERENCES", help="folder of tracks: TRACK/TARGET.wav")
    add("estimates", type=Path, metavar="ESTIMATES", help="folder of the same tracks")
    add("-o", "--out", type=Path, required=True, metavar="OUT", help="folder to write to")
    add_scoring_flags(parser)
    add_progress_flags(parser)
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        set_progress(args.quiet, args.progress)
        from local.eval.out import report_failed_access

        with report_failed_access(args.out, args.references, args.estimates):
            failures = score(args)
    if failures:
        raise SystemExit(1)


def score(args: Namespace) -> dict[str, str]:
    """Score all tracks, except those whose scores in OUT are still valid; write the results.

    Returns:
        track -> why it has no scores.

    Raises:
        UserError: the flags, the folders, a file in them or OUT cannot be used.
        OSError: a file cannot be written.
    """
    from local.eval.folders import find_folder_tracks
    from local.eval.out import find_scored, prepared_out
    from local.eval.results import write_results
    from local.tools.ranks import Ranks

    check_flags(args)
    tracks, notes = find_folder_tracks(args.references, args.estimates)
    with prepared_out(args.out, {track.name: track.files for track in tracks}, Ranks(), FLAGS):
        print(f"{plural(len(tracks), 'track')} of {args.estimates}", *notes, sep="\n", flush=True)
        records = {track: make_record(track, args.scorer) for track in tracks}
        scored, missing = find_scored(args.out, records, Ranks())
        found, failures = score_tracks(missing, args)
        scored = sorted([*scored, *found], key=lambda track: track.name)
        text = write_results(args.out, scored, failures)
        print(f"\n{text}\nAll results are in {args.out}")
    return failures


def check_flags(args: Namespace) -> None:
    """Raise a UserError that lists the faults of the flags."""
    from local.eval.score_files import read_method

    faults = []
    if args.jobs is not None and args.jobs < 1:
        faults.append(f"--jobs must be at least 1, got {args.jobs}")
    if any(map(read_method, (args.out / "test").glob("[!.]*.json"))):
        faults.append(f"--out: {args.out} holds scores of eval.py; name another --out")
    try:
        need_ffmpeg()  # to import museval
    except UserError as error:
        faults.append(str(error))
    raise_together(faults)


def make_record(track: FolderTrack, scorer: str) -> dict:
    """Return the record that the scores of a track will have: see `score_files.save_track`."""
    return {
        "made_with": {"targets": sorted(track.estimates), "scorer": scorer},
        "files": track.describe_files(),
        "saved": None,
        "version": __version__,
    }


def score_tracks(
    records: dict[FolderTrack, dict], args: Namespace
) -> tuple[list[ScoredTrack], dict[str, str]]:
    """Return (the scored tracks, track -> why it has no scores)."""
    from local.eval.jobs import choose_jobs
    from local.eval.out import choose_share
    from local.eval.pool import ScoringPool
    from local.eval.score_files import remove_scores
    from local.tools.ranks import Ranks

    targets = max((len(track.estimates) for track in records), default=0)
    jobs = args.jobs or choose_jobs(records, args.scorer, targets=targets)
    options = {"targets": targets, "remove": remove_scores}
    with ScoringPool(args.out, jobs, args.scorer, **options) as pool:
        for track, record in choose_share(records, Ranks()).items():
            try:
                pool.wait_for_memory(track, 0)
            except ValueError as error:
                pool.fail(track, str(error))
            else:
                pool.submit(track, None, record)
        return pool.finish()


if __name__ == "__main__":
    main()
