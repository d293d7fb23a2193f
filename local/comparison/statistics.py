"""Differences between runs over the tracks that both have, with bootstrap intervals."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from local.eval.score_files import METRICS, order_targets

STATISTICS = {"mean": np.mean, "median": np.median}
RESAMPLES = 10_000
SEED = 0


def paired_differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Subtract the first run from every other, over the tracks in which both have a score.

    Returns:
        a row per target, metric and run with such tracks: their number, mean and median over them
        in dB, and 95 % intervals (NaN with fewer than 2 tracks).
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
    """Return the number of tracks, mean, median and their intervals of (tracks,) dB."""
    row = {"tracks": len(differences)}
    for name, statistic in STATISTICS.items():
        row[name] = statistic(differences) if len(differences) else np.nan
        row[f"{name}_low"], row[f"{name}_high"] = interval(differences, statistic)
    return row


def interval(differences: np.ndarray, statistic: Callable) -> tuple[float, float]:
    """Return the 95 % percentile interval of a bootstrap over tracks, with a fixed seed."""
    if len(differences) < 2:
        return np.nan, np.nan
    result = bootstrap(
        (differences,), statistic, method="percentile", n_resamples=RESAMPLES, rng=SEED
    )
    return tuple(result.confidence_interval)
