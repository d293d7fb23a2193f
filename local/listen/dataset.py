"""The mixtures and references of the data set that runs were scored on."""

from argparse import Namespace

from local.eval.flags import DATA_FLAGS, fill_data_flags
from local.eval.score_files import DAMAGE
from local.eval.tracks import TestTrack, describe_files, open_test_set
from local.listen.runs import Run
from local.tools.command_line import UserError, plural, raise_together
from local.tracks.roots import find_root_faults

REMEDY = "pass --root and --split as of eval.py, or --no_references"


def find_references(runs: list[Run], rate: int, flags: Namespace) -> dict[str, TestTrack]:
    """Find the tracks of which a run has estimates, in the data set of the first run that names it.

    Args:
        rate: of the estimates, in Hz.
        flags: those of `choices.add_data_flags`, of which some may be None.

    Raises:
        UserError: no run names a data set, it cannot be used, it lacks tracks, or their files are
            not those that were scored.
    """
    conf_file = next(filter(None, (run.find_conf() for run in runs)), None)
    if not flags.root and conf_file is None:
        raise UserError(f"--root is needed: no run is in the folder of a training run; {REMEDY}")
    given = {key: getattr(flags, key) for key in ("root", "split", *DATA_FLAGS)}
    filled = Namespace(exp_dir=conf_file.parent if conf_file else runs[0].folder, **given)
    data = fill_data_flags(filled)
    if faults := find_root_faults(filled.root):
        raise_together([f"{fault}; {REMEDY}" for fault in faults])
    found = {track.name: track for track in open_test_set(filled.root, rate, **data)}
    wanted = sorted(set().union(*(run.estimates for run in runs)))
    missing = [name for name in wanted if name not in found]
    if missing:
        count = f"{plural(len(missing), 'track')} of {len(wanted)}"
        shown = " ".join(map(str, filled.root))
        raise UserError(f"--root: {shown} lacks {count}, first {missing[0]}; {REMEDY}")
    raise_together(
        [fault for run in runs for name in run.estimates for fault in _compare(run, found[name])]
    )
    return {name: found[name] for name in wanted}


def _compare(run: Run, track: TestTrack) -> list[str]:
    """Return a fault where the files of a track have other sizes than those that were scored."""
    try:
        before = {name: size for name, (size, _) in run.records[track.name]["files"].items()}
    except DAMAGE:  # another system's, or of a damaged record
        return []
    sizes = {name: size for name, (size, _) in describe_files(track).items()}
    if sizes == before:
        return []
    return [f"{track.place.path}: not the files that {run.name} was scored on; {REMEDY}"]
