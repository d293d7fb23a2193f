"""Runs side by side: museval's scores as tables, paired differences and box plots.

`python -m local.compare RUN [RUN ...]` reads folders of museval's JSON (.json, .json.gz), RUN/test
or RUN itself: EXP/OUT of eval.py, or another system's. The first RUN is the baseline of the
differences. The published SDR of the tracks that a RUN holds stands beside them.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from local.eval.results import METRICS, read_scores, summarise
from local.musdb18_tracks import SOURCES, TARGETS, UNFIT_FOR_NAMES
from local.tools.command_line import OneLineParser, UserError, clear_errors, plural, raise_together
from local.tools.files import atomic_path

PUBLISHED_FILE = Path(__file__).with_name("published_scores.csv")
PUBLISHED_ORIGIN = "published, not computed here: SDR of whole tracks through the model at once"
SUFFIXES = (".json", ".json.gz")
TRAINING_FILE = "best_k_models.json"  # which train.py writes, in EXP
FILES = ("comparison.txt", "scores.csv", "differences.csv", "scores.png")
STATISTICS = {"mean": np.mean, "median": np.median}
MOST_DB = 10_000  # no ratio of two float64 numbers is larger
RESAMPLES = 10_000
SEED = 0


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.compare", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of museval's JSON: EXP/OUT")
    add("-o", "--out", type=Path, default="comparison", help="folder to write to [%(default)s]")
    add("--targets", nargs="+", metavar="TARGET", help="to compare, after the RUNs [all]")
    add("--no_published", action="store_true", help="leave the published scores out")
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        text = compare(args.runs, args.out, args.targets, not args.no_published)
        print(f"{text}\nWritten to {printable(args.out)}: {', '.join(FILES)}")


def compare(
    folders: list[Path],
    out: Path,
    targets: list[str] | None = None,
    with_published: bool = True,
) -> str:
    """Writes FILES to `out`; returns the text of comparison.txt.

    Args:
        targets: what to compare; all that the runs have, where there are none.

    Raises:
        UserError: lists every fault of the folders, their files and `out`; nothing is written then.
    """
    published = read_published()
    runs, faults = name_runs(folders, taken=published["run"].unique())
    scores, unreadable = read_runs(runs)
    faults += unreadable
    if targets and not faults:
        faults += find_missing(scores, targets)
        scores = scores[scores["target"].isin(targets)]
    if os.path.lexists(out) and not os.path.isdir(out):
        faults.append(f"--out: {out} is a file")
    for name in FILES:
        if os.path.isdir(out / name):
            faults.append(f"--out: {out / name} is a folder; it would be a file")
    raise_together(faults, heading="the comparison")

    shared = published.merge(scores[["track", "target"]].drop_duplicates())
    if with_published and len(shared):
        scores = pd.concat([scores, shared], ignore_index=True)
    differences = paired_differences(scores)
    text = describe(runs, scores, differences)
    if with_published and not len(shared):
        text += "\nThese runs hold no track and target that has a published score.\n"
    write_files(out, text, scores, differences)
    return text


def name_runs(folders: list[Path], taken: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """Folders by the shortest end of their paths that neither another one nor a name in `taken`
    has; and the faults: folders that are there already.
    """
    distinct, faults = {}, []
    for folder in folders:
        first = distinct.setdefault(os.path.realpath(scores_folder(folder)), folder)
        if first is not folder:
            faults.append(f"{folder}: the same run as {first}")
    # The parent says what run it is, whose test/ was named itself.
    paths = {folder: Path(os.path.abspath(folder)) for folder in distinct.values()}
    paths = {f: path.parent if path.name == "test" else path for f, path in paths.items()}
    others = [*paths.values(), *map(Path, taken)]
    return {short_name(path, others): folder for folder, path in paths.items()}, faults


def short_name(path: Path, others: list[Path]) -> str:
    for size in range(1, len(path.parts) + 1):
        end = path.parts[-size:]
        if not any(other.parts[-size:] == end for other in others if other != path):
            break
    return printable(Path(*end))


def printable(path: Path | str) -> str:
    """A path, or its end, as text: it may hold control characters, or bytes that are not UTF-8."""
    return UNFIT_FOR_NAMES.sub(lambda found: ascii(found[0])[1:-1], str(path))


def scores_folder(run: Path) -> Path:
    return run / "test" if (run / "test").is_dir() else run


def read_runs(runs: dict[str, Path]) -> tuple[pd.DataFrame, list[str]]:
    """The scores of all runs, and the faults of their files.

    Returns:
        a row per run, track, target and metric: median and mean over frames in dB (NaN where no
        frame has a score), the number of frames, and the share of them that have no score.
    """
    rows, faults = [], []
    for run, folder in runs.items():
        try:
            files = find_scores(folder)
        except UserError as error:
            faults.append(str(error))
            continue
        for track, path in files.items():
            try:
                rows += [{"run": run, "track": track, **row} for row in read_track(path)]
            except ValueError as error:
                faults.append(str(error))
    columns = ["run", "track", "target", "metric", "median", "mean", "frames", "nan_share"]
    return pd.DataFrame(rows, columns=columns).astype({"frames": "Int64"}), faults


def find_scores(run: Path) -> dict[str, Path]:
    """The files of a run by track, sorted.

    Raises:
        UserError: there are none, those of several runs, or two of the same track.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder")
    folder = scores_folder(run)
    files = sorted(
        path for path in folder.rglob("[!.]*") if path.name.endswith(SUFFIXES) and not path.is_dir()
    )
    below = sorted({path.parent.parent for path in files if path.parent.name == "test"})
    is_training_run = any(path.name == TRAINING_FILE for path in files)
    if not files or folder == run and (is_training_run or len(below) > 1):
        fault = "holds several runs" if len(below) > 1 else "no museval JSON in it"
        example = below[0] if below else "EXP/OUT"
        raise UserError(f"{run}: {fault}; name the folder that eval.py wrote, such as {example}")
    tracks, twice = {}, []
    for path in files:
        first = tracks.setdefault(track_name(path), path)
        if first is not path:
            twice.append(f"{first.relative_to(run)} and {path.relative_to(run)}")
    if twice:
        raise UserError(f"{run}: {plural(len(twice), 'track')} there twice, first {twice[0]}")
    return tracks


def track_name(path: Path) -> str:
    return printable(path.name.removesuffix(".gz").removesuffix(".json"))


def read_track(path: Path) -> list[dict]:
    """The rows of a track, without run and track: see `read_runs`.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    scores = read_scores(path)
    frames = [values for metrics in scores.values() for values in metrics.values()]
    if not frames or any(x.ndim != 1 or not len(x) or (np.abs(x) > MOST_DB).any() for x in frames):
        raise ValueError(f"{path}: expected targets with scores in dB, or NaN, of some frames")
    rows = []
    for target, metrics in scores.items():
        for metric in METRICS:
            values = metrics[metric]
            row = {"target": target, "metric": metric, **summarise(values)}
            rows.append({**row, "frames": len(values), "nan_share": np.isnan(values).mean()})
    return rows


def read_published() -> pd.DataFrame:
    """The SDR of the model cards, as `read_runs` has it; they say no more than medians."""
    table = pd.read_csv(PUBLISHED_FILE).rename(columns={"SDR": "median"})
    return table.assign(run="published " + table.pop("model"), metric="SDR")


def find_missing(scores: pd.DataFrame, targets: list[str]) -> list[str]:
    """The targets that no run has, and the runs that have none of the targets, a line each."""
    found = ", ".join(order_targets(scores["target"]))
    faults = [
        f"--targets: no run has {target}; there are {found}"
        for target in targets
        if target not in set(scores["target"])
    ]
    for run, of_run in scores.groupby("run", sort=False)["target"]:
        if not set(targets) & set(of_run):
            held = ", ".join(order_targets(of_run))
            faults.append(f"--targets: {run} has none of them, only {held}")
    return faults


def order_targets(targets: Iterable[str]) -> list[str]:
    known = list(dict.fromkeys((*TARGETS, *SOURCES)))
    others = sorted(set(targets) - set(known))
    return [target for target in known if target in set(targets)] + others


def paired_differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Every run minus the first, over the tracks in which both have a score.

    Returns:
        a row per target, metric and run that have one: the number of tracks, mean and median over
        them in dB, and 95 % intervals (NaN with fewer than 2 tracks).
    """
    first, *others = scores["run"].unique()
    medians = scores.pivot(index=["target", "metric", "track"], columns="run", values="median")
    rows = []
    for target in order_targets(scores["target"]):
        for metric in METRICS:
            tracks = medians.loc[(target, metric)]
            for run in others:
                if tracks[[first, run]].notna().any().all():
                    paired = (tracks[run] - tracks[first]).dropna().to_numpy()
                    row = {"run": run, "baseline": first, "target": target, "metric": metric}
                    rows.append({**row, **describe_paired(paired)})
    columns = ["run", "baseline", "target", "metric", *describe_paired(np.zeros(0))]
    return pd.DataFrame(rows, columns=columns)


def describe_paired(differences: np.ndarray) -> dict[str, float]:
    """(tracks,) dB -> the number of them, mean, median and their intervals."""
    row = {"tracks": len(differences)}
    for name, statistic in STATISTICS.items():
        row[name] = statistic(differences) if len(differences) else np.nan
        row[f"{name}_low"], row[f"{name}_high"] = interval(differences, statistic)
    return row


def interval(differences: np.ndarray, statistic: Callable) -> tuple[float, float]:
    """The 95 % percentile interval of a bootstrap over tracks; the same whenever it is computed."""
    if len(differences) < 2:
        return np.nan, np.nan
    result = bootstrap(
        (differences,), statistic, method="percentile", n_resamples=RESAMPLES, rng=SEED
    )
    return tuple(result.confidence_interval)


def describe(runs: dict[str, Path], scores: pd.DataFrame, differences: pd.DataFrame) -> str:
    """The text of comparison.txt."""
    names, targets = scores["run"].unique(), order_targets(scores["target"])
    lines = align([[name, printable(runs.get(name, PUBLISHED_ORIGIN))] for name in names], left=2)
    lines += ["", "Medians over tracks of the median over frames, in dB; last the mean over tracks"]
    for target in targets:
        lines += ["", *summary_table(scores, target)]
    if notes := find_notes(scores):
        lines += ["", *notes]
    if len(names) > 1:
        lines += ["", f"Paired differences to the baseline, the first RUN: {names[0]}, in dB"]
        lines.append(
            "(above 0: better than it; tracks that both have; 95 % by bootstrap over tracks)"
        )
        for target in targets:
            lines += ["", *difference_table(differences, target, names[0])]
    lines += ["", "SDR of every track in dB, median over frames (-: not in this run)"]
    for target in targets:
        lines += ["", *track_table(scores, target)]
    return "\n".join(lines) + "\n"


def summary_table(scores: pd.DataFrame, target: str) -> list[str]:
    of_target = scores[scores["target"] == target]
    sdr = of_target[of_target["metric"] == "SDR"]
    medians = of_target.groupby(["run", "metric"])["median"].median().to_dict()
    rows = [[target, "tracks", *METRICS, "NaN frames", "mean SDR"]]
    for run in scores["run"].unique():
        tracks = sdr[sdr["run"] == run]
        shown = [cell(medians.get((run, metric)), ".3f") for metric in METRICS]
        # The published scores do not say.
        nan_share = (tracks["frames"] * tracks["nan_share"]).sum(min_count=1)
        share = cell(nan_share / tracks["frames"].sum(min_count=1), ".1%")
        mean = cell(tracks["median"].mean(), ".3f")
        rows.append([run, str(tracks["median"].count()), *shown, share, mean])
    return align(rows)


def cell(value: float | None, form: str) -> str:
    return "-" if pd.isna(value) else f"{value:{form}}"


def align(rows: list[list[str]], left: int = 1) -> list[str]:
    """The lines of a table: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<"] * left + [">"] * (len(widths) - left)
    forms = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
    return [
        "  ".join(f"{text:{form}}" for text, form in zip(row, forms, strict=True)).rstrip()
        for row in rows
    ]


def find_notes(scores: pd.DataFrame) -> list[str]:
    """What to know before comparing medians, a line each: where they are over different things."""
    sdr = scores[scores["metric"] == "SDR"]
    notes = [
        f"{row.target}: no frame of {row.track} has a score in {row.run}, so no median counts it"
        for row in sdr[sdr["median"].isna()].itertuples()
    ]
    for target in order_targets(sdr["target"]):
        of_target = sdr[sdr["target"] == target]
        held = of_target.dropna(subset="median").groupby("run")["track"].agg(frozenset)
        if held.nunique() > 1:
            notes.append(
                f"{target}: the runs hold different tracks, {len(frozenset.intersection(*held))}"
                " of them in all runs; medians over different tracks are not comparable, paired"
                " differences are"
            )
        uneven = (of_target.groupby("track")["nan_share"].nunique() > 1).sum()
        if uneven:
            notes.append(
                f"{target}: in {plural(uneven, 'track')} the runs have scores of different frames;"
                " museval gives none where any of the targets it scores together is silent"
            )
    return notes


def difference_table(differences: pd.DataFrame, target: str, baseline: str) -> list[str]:
    rows = [[target, "", "tracks", "mean", "95 %", "median", "95 %"]]
    for row in differences[differences["target"] == target].to_dict("records"):
        shown = []
        for name in STATISTICS:
            low, high = (cell(row[f"{name}_{end}"], "+.2f") for end in ("low", "high"))
            shown += [cell(row[name], "+.2f"), "-" if low == "-" else f"[{low}, {high}]"]
        rows.append([row["run"], row["metric"], str(row["tracks"]), *shown])
    if len(rows) == 1:
        return [f"{target}: nothing to pair, {baseline} or all others have no score of it"]
    return align(rows, left=2)


def track_table(scores: pd.DataFrame, target: str) -> list[str]:
    sdr = scores[(scores["target"] == target) & (scores["metric"] == "SDR")]
    shown = sdr.assign(shown=sdr["median"].map("{:.2f}".format))
    cells = shown.pivot(index="track", columns="run", values="shown").fillna("-")
    cells = cells[sdr["run"].unique()]
    return align([[target, *cells.columns], *map(list, cells.itertuples())])


def write_files(out: Path, text: str, scores: pd.DataFrame, differences: pd.DataFrame) -> None:
    """Writes FILES, all of them or none.

    Raises:
        UserError: they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context(atomic_path(out / name)) for name in FILES]
            files[0].write_text(text, encoding="utf-8")
            for table, file in zip((scores, differences), files[1:3], strict=True):
                table.to_csv(file, index=False, float_format="%.5f")
            plot_scores(scores, files[3])
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None


def plot_scores(scores: pd.DataFrame, path: Path) -> None:
    """Writes a PNG of boxes over tracks: a row per metric, a column per target, a box per run."""
    from matplotlib.figure import Figure  # it takes a second to import

    targets = order_targets(scores["target"])
    scored = scores.dropna(subset="median")
    # A metric that a run lacks, as the published ones do, takes no room for it.
    runs = {m: list(scores.loc[scores["metric"] == m, "run"].unique()) for m in METRICS}
    heights = [0.6 + 0.35 * len(runs[metric]) for metric in METRICS]  # inches
    longest = max(map(len, scores["run"]))
    width = 1 + 0.08 * longest + 3 * len(targets)
    figure = Figure(figsize=(width, 0.6 + sum(heights)), dpi=120, layout="constrained")
    panels = figure.subplots(len(METRICS), len(targets), height_ratios=heights, squeeze=False)
    for metric, row in zip(METRICS, panels, strict=True):
        for target, panel in zip(targets, row, strict=True):
            is_here = (scored["metric"] == metric) & (scored["target"] == target)
            medians = scored[is_here].groupby("run")["median"].agg(list).to_dict()
            draw_boxes(panel, [medians.get(run, []) for run in runs[metric]])
            labels = [f"n = {len(medians.get(run, []))}" for run in runs[metric]]
            if panel is row[0]:
                names = zip(runs[metric], labels, strict=True)
                labels = [f"{run}   {label}" for run, label in names]
            panel.set_yticks(range(len(labels)), labels, parse_math=False)
            panel.set_xlabel(f"{metric} of {target} in dB", parse_math=False)
    figure.suptitle("Tracks (median over frames), their quartiles and median", fontsize="medium")
    figure.savefig(path, format="png")


def draw_boxes(panel, values: list[list[float]]) -> None:
    """A box per list of values with a dot for each of them, the first list at the top."""
    rng = np.random.default_rng(SEED)
    panel.boxplot(
        values,
        positions=range(len(values)),
        orientation="horizontal",
        widths=0.7,
        showfliers=False,  # they are among the dots
        medianprops={"color": "black", "linewidth": 1.5},
    )
    for position, dots in enumerate(values):
        heights = position + rng.uniform(-0.2, 0.2, len(dots))
        color = f"C{position % 10}"
        panel.plot(dots, heights, ".", color=color, alpha=0.7, markersize=6, zorder=3)
    panel.set_ylim(len(values) - 0.4, -0.6)
    panel.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
