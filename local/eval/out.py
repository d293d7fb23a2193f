"""The folder OUT: no file of others is overwritten, and no old scores stay beside new ones."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from local import __version__
from local.eval.pool import remove_estimates
from local.eval.results import RESULTS
from local.eval.score_files import ScoredTrack, find_change, load_track
from local.eval.tracks import TestTrack, describe_files
from local.tools.command_line import UserError, plural, raise_together
from local.tools.files import LONGEST_NAME, is_failed_access, locked
from local.tools.ranks import Ranks

if TYPE_CHECKING:  # local.score needs no torch
    from torch import nn

PAGE = "page"  # in OUT: what eval.py --page writes
FLAGS = "--out_dir", "--root"  # of eval.py, that name OUT and the tracks


@contextmanager
def report_failed_access(out: Path, *places: Path) -> Iterator[None]:
    """Turn an OSError in OUT or other places, or of a disk, into a UserError of one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if not is_failed_access(error, out, *places):
            raise
        reason = error.strerror or f"cannot be written (is the disk full?): {error}"
        raise UserError(f"{error.filename or out}: {reason}") from None


@contextmanager
def prepared_out(
    out: Path, files: dict[str, list[Path]], ranks: Ranks, flags: tuple[str, str] = FLAGS
) -> Iterator[None]:
    """On rank 0, make and lock OUT, and remove the results over all tracks of an earlier run.

    Scores of tracks stay: see `find_scored`. Other ranks have nothing to do.

    Args:
        files: track -> the files that it is read from.
        flags: those that name OUT and the tracks.

    Raises:
        UserError: see `make_out`; or another run writes to OUT.
    """
    if ranks.rank != 0:
        yield
        return
    make_out(out, files, *flags)
    with locked(out):
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
        remove_estimates(out)
        yield


def make_out(
    out: Path, files: dict[str, list[Path]], out_flag: str = FLAGS[0], root_flag: str = FLAGS[1]
) -> None:
    """Make OUT, and in it test/ for the scores of tracks.

    Args: as of `prepared_out`.

    Raises:
        UserError: OUT cannot be written, holds the test tracks themselves, or holds scores of
            other tracks; or a track has a name that OUT cannot have.
    """
    names, faults = list(files), []
    inputs = {file.parent.resolve() for of_track in files.values() for file in of_track}
    outputs = {folder.resolve() for folder in (out, out / "test", *(out / name for name in names))}
    if inputs & outputs:
        faults.append(
            f"{out_flag}: {out} holds the test tracks, and they would be overwritten; name another"
            f" {out_flag}"
        )
    scores = (out / "test").glob("[!.]*.json")
    if others := sorted(path.name for path in scores if path.stem not in names):
        faults.append(
            f"{out_flag}: {out} holds scores of another test set ({others[0]},"
            f" {len(others)} in all); name another {out_flag}"
        )
    faults += [
        f"{root_flag}: a track called {name} would overwrite {out / name}; rename the track"
        for name in sorted({"test", PAGE, *RESULTS} & set(names))
    ]
    faults += [
        f"{root_flag}: the name of the track {name} is too long for a file of scores; rename the"
        " track"
        for name in names
        if len(os.fsencode(f"{name}.json")) > LONGEST_NAME
    ]
    raise_together(faults)
    try:
        (out / "test").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_flag}: {out} cannot be written: {error.strerror}") from None


def plan_records(
    args: Namespace, model: nn.Module, tracks: list[TestTrack]
) -> dict[TestTrack, dict]:
    """Return track -> the record that its scores will have: see `score_files.save_track`."""
    from local.estimates import describe_settings, list_targets

    settings = {
        **describe_settings(args, model),
        "targets": list(list_targets(model)),
        "scorer": args.scorer,
        "float_references": args.float_references,
    }
    kind = "FLOAT" if args.float32 else "PCM_16"
    count = len(tracks) if args.n_save_ex == -1 else args.n_save_ex
    return {
        track: {
            "made_with": settings,
            "files": describe_files(track),
            "saved": kind if number < count else None,
            "version": __version__,
        }
        for number, track in enumerate(tracks)
    }


def find_scored(
    out: Path, records: dict[TestTrack, dict], ranks: Ranks
) -> tuple[list[ScoredTrack], dict[TestTrack, dict]]:
    """Find which tracks have valid scores in OUT. Print why others are scored again.

    Rank 0 reads OUT for all ranks.

    Args:
        records: of all tracks: see `plan_records`.

    Returns:
        (tracks with valid scores; on rank 0 alone, records of the tracks that are still to score).
    """
    kept, missing, reasons = [], {}, {}
    for track, record in records.items() if ranks.rank == 0 else ():
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
    return kept, ranks.broadcast(missing)


def choose_share(missing: dict[TestTrack, dict], ranks: Ranks) -> dict[TestTrack, dict]:
    """Return the part of `missing` that this rank scores, the longest tracks first."""
    longest_first = sorted(missing, key=lambda track: track.seconds, reverse=True)
    return {track: missing[track] for track in longest_first[ranks.rank :: ranks.count]}
