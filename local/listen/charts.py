"""The geometry of charts: numbers and SVG paths, which the templates draw."""

from collections.abc import Iterable

import numpy as np

SPARK_POINTS = 60
PASSAGE = 5  # seconds


def draw_line(values: np.ndarray, step: float = 1.0) -> str:
    """Return an SVG path through the middle of frames of `step` seconds, with gaps where NaN is.

    y is -dB, since y grows downwards.
    """
    parts, is_drawing = [], False
    for number, value in enumerate(values):
        if np.isfinite(value):
            point = f"{(number + 0.5) * step:.4g} {-value:.4g}"
            # A line of no length is a dot, which a frame between two gaps would not have.
            parts.append(f"L{point}" if is_drawing else f"M{point}h0")
        is_drawing = bool(np.isfinite(value))
    return "".join(parts)


def draw_waveform(peaks: np.ndarray, full_scale: float) -> str:
    """Return an SVG path around peaks (columns, 2), in a box of columns x [-100, 100]; what is
    beyond `full_scale` is cut.
    """
    y = np.rint(-100 * np.clip(peaks / max(full_scale, 1e-9), -1, 1)).astype(int)
    upper = [f"{x} {high}" for x, high in enumerate(y[:, 1])]
    lower = [f"{x} {low}" for x, low in enumerate(y[:, 0])]
    return f"M{'L'.join(upper)}L{'L'.join(reversed(lower))}Z"


def draw_sparks(frames: dict[str, np.ndarray]) -> tuple[dict[str, str], tuple[float, float]]:
    """Return (run -> the path of a small line of at most SPARK_POINTS, the range of all and 0).

    The range is a tenth wider, so that no line is cut at the edge.
    """
    shrunk = {name: _shrink(values) for name, values in frames.items()}
    found = np.concatenate([np.zeros(1), *shrunk.values()])
    low, high = np.nanmin(found), max(np.nanmax(found), 1)
    margin = (high - low) / 20
    paths = {n: draw_line(v, SPARK_POINTS / max(len(v), 1)) for n, v in shrunk.items()}
    return paths, (float(low - margin), float(high + margin))


def _shrink(values: np.ndarray) -> np.ndarray:
    """Return the means of at most SPARK_POINTS parts; NaN where a part has no score."""
    step = max(1, -(-len(values) // SPARK_POINTS))
    parts = np.pad(values, (0, -len(values) % step), constant_values=np.nan).reshape(-1, step)
    counts = np.isfinite(parts).sum(1)
    return np.where(counts > 0, np.nansum(parts, axis=1) / np.maximum(counts, 1), np.nan)


def choose_range(values: Iterable[np.ndarray], most: float = 40) -> tuple[int, int]:
    """Return multiples of 5 dB around all values and 0, no more than `most` dB from 0."""
    found = np.concatenate([np.zeros(1), *values])
    found = np.clip(found[np.isfinite(found)], -most, most)
    low, high = 5 * np.floor(found.min() / 5), 5 * np.ceil(found.max() / 5)
    return int(low), int(max(high, low + 5))


def choose_ticks(low: float, high: float, most: int) -> list[int]:
    """Return at most about `most` round numbers from `low` to `high`."""
    steps = (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 1800, 3600)
    step = next((step for step in steps if (high - low) / step <= most), 2 * steps[-1])
    return list(range(int(-(-low // step) * step), int(high) + 1, step))


def describe_box(values: np.ndarray) -> dict:
    """Return what a box plot draws of (tracks,) dB; {} where there are none.

    The whiskers reach to the furthest track within 1.5 times the distance of the quartiles.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    reach = 1.5 * (high - low)
    inner = values[(values >= low - reach) & (values <= high + reach)]
    ends = {"low": min(low, inner.min()), "high": max(high, inner.max())}
    return {"q1": low, "median": median, "q3": high, **ends}


def find_passages(sdr: np.ndarray) -> dict[str, tuple[int, float]]:
    """Find the worst and the best PASSAGE seconds by mean SDR.

    Args:
        sdr: (seconds,) dB. A passage has a score in every second, or else in as many as any has.

    Returns:
        "worst", and "best" where two passages have room -> (where it begins in seconds, its mean);
        {} without scores.
    """
    if len(sdr) == 0 or not np.isfinite(sdr).any():
        return {}
    size = min(PASSAGE, len(sdr))
    windows = np.lib.stride_tricks.sliding_window_view(sdr, size)
    counts = np.isfinite(windows).sum(1)
    means = np.nansum(windows, axis=1) / np.maximum(counts, 1)
    is_full = counts == counts.max()
    found = {"worst": int(np.argmin(np.where(is_full, means, np.inf)))}
    if len(sdr) >= 2 * PASSAGE:
        found["best"] = int(np.argmax(np.where(is_full, means, -np.inf)))
    return {kind: (start, float(means[start])) for kind, start in found.items()}
