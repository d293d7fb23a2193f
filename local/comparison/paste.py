"""A table of the comparison to paste into a README (Markdown) or a paper (LaTeX)."""

from pathlib import Path

import pandas as pd

from local.comparison.tables import PUBLISHED_ORIGIN, cell, find_notes, method_notes
from local.eval.score_files import METRICS, order_targets
from local.tools.markdown import escape, table

CAPTION = "Medians over tracks of the median over frames, in dB"
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}


def paste_table(runs: dict[str, Path], scores: pd.DataFrame, form: str) -> str:
    """Return the table as "markdown" or "latex", with what makes medians incomparable.

    Args:
        runs, scores: see `runs.name_runs` and `runs.read_runs`.
    """
    write = {"markdown": _markdown, "latex": _latex}[form]
    notes = [CAPTION, *method_notes(runs, scores), *find_notes(scores)]
    if set(scores["run"]) - set(runs):
        notes.append(PUBLISHED_ORIGIN)
    return write(_rows(scores), notes)


def _rows(scores: pd.DataFrame) -> list[list[str]]:
    """Return the heading, then a row per target and run that has it."""
    rows = [["Target", "Run", "Tracks", *METRICS]]
    medians = scores.groupby(["target", "run", "metric"])["median"].agg(["median", "count"])
    for target in order_targets(scores["target"]):
        of_target = scores.loc[scores["target"] == target, "run"]
        for run in of_target.unique():
            found = medians.loc[(target, run)]
            shown = [cell(found["median"].get(metric), ".2f") for metric in METRICS]
            rows.append([target, run, str(found.loc["SDR", "count"]), *shown])
    return rows


def _markdown(rows: list[list[str]], notes: list[str]) -> str:
    escaped = [[escape(text) for text in row] for row in rows]
    return "\n\n".join([table(escaped, left=2), *map(escape, notes)])


def _latex(rows: list[list[str]], notes: list[str]) -> str:
    """Return a tabular with the rules of the package booktabs; notes are comments above it."""

    def escape(text: str) -> str:
        return "".join(LATEX.get(character, character) for character in text)

    heading, *body = (f"{' & '.join(map(escape, row))} \\\\" for row in rows)
    lines = [f"% {note}" for note in [*notes, r"\usepackage{booktabs}"]]
    columns = "ll" + "r" * (len(rows[0]) - 2)
    lines += [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", heading, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
