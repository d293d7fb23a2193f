"""The box plots of scores.png."""

from pathlib import Path

import numpy as np
import pandas as pd

from local.comparison.runs import read_published
from local.eval.score_files import METRICS, order_targets

SEED = 0  # of where the dots are


def plot_scores(scores: pd.DataFrame, path: Path) -> None:
    """Write a PNG of boxes over tracks: a row per metric, a column per target, a box per run."""
    from matplotlib.figure import Figure  # takes a second to import

    targets = order_targets(scores["target"])
    scored = scores.dropna(subset="median")
    # Runs without a metric, such as the published ones, get no row in its panels.
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
    title = "Tracks (median over frames), their quartiles and median"
    if not scores.merge(read_published()[["run"]]).empty:
        title += "\npublished: whole tracks at once, comparable with eval.py --method full"
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, format="png")


def draw_boxes(panel, values: list[list[float]]) -> None:
    """Draw a box per list of values and a dot per value, the first list at the top."""
    rng = np.random.default_rng(SEED)
    panel.boxplot(
        values,
        positions=range(len(values)),
        orientation="horizontal",
        widths=0.7,
        showfliers=False,  # they are dots already
        medianprops={"color": "black", "linewidth": 1.5},
    )
    for position, dots in enumerate(values):
        heights = position + rng.uniform(-0.2, 0.2, len(dots))
        color = f"C{position % 10}"
        panel.plot(dots, heights, ".", color=color, alpha=0.7, markersize=6, zorder=3)
    panel.set_ylim(len(values) - 0.4, -0.6)
    panel.grid(axis="x", alpha=0.3)
