"""Runs side by side: museval's scores as tables, paired differences and box plots.

`python -m local.compare RUN [RUN ...]` reads folders of museval's JSON (.json, .json.gz), RUN/test
or RUN itself: EXP/OUT of eval.py, or another system's. The first RUN is the baseline of the
differences. The published SDR of the tracks that a RUN holds stands beside them; it is of whole
tracks at once, so it is comparable with runs of eval.py --method full.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: Python puts this folder on its path, not the one above
    sys.path[0] = str(Path(__file__).parents[1])

from local.tools.command_line import OneLineParser, UserError, clear_errors, raise_together
from local.tools.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("text", "markdown", "latex")
FILES = ("comparison.txt", "scores.csv", "differences.csv", "scores.png")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m local.compare", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of museval's JSON: EXP/OUT")
    add("-o", "--out", type=Path, default="comparison", help="folder to write to [%(default)s]")
    add("--targets", nargs="+", metavar="TARGET", help="to compare, after the RUNs [all]")
    add(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="markdown, latex: print the medians as one table to paste instead [%(default)s]",
    )
    add("--no_published", action="store_true", help="omit the published scores")
    with clear_errors(parser.prog):
        args = parser.parse_args(argv)
        from local.comparison.runs import printable

        text = compare(args.runs, args.out, args.targets, not args.no_published, args.format)
        print(text)
        is_table = args.format != FORMATS[0]  # stdout is then the table alone
        written = f"Written to {printable(args.out)}: {', '.join(FILES)}"
        print(written, file=sys.stderr if is_table else sys.stdout)


def compare(
    folders: list[Path],
    out: Path,
    targets: list[str] | None = None,
    with_published: bool = True,
    form: str = FORMATS[0],
) -> str:
    """Compare runs and write FILES to `out`.

    Args:
        folders: of the runs, the baseline first.
        targets: to compare; None for all that the runs have.
        form: one of FORMATS.

    Returns:
        the text of comparison.txt; or, in other FORMATS, a table to paste.

    Raises:
        UserError: lists all faults of the folders, their files and `out`; nothing is written.
    """
    import pandas as pd

    from local.comparison.paste import paste_table
    from local.comparison.runs import find_missing, name_runs, read_published, read_runs
    from local.comparison.statistics import paired_differences
    from local.comparison.tables import describe

    published = read_published()
    runs, faults = name_runs(folders, taken=published["run"].unique())
    scores, unreadable = read_runs(runs)
    faults += unreadable
    if targets and not faults:
        faults += find_missing(scores, targets)
        scores = scores[scores["target"].isin(targets)]
    if os.path.lexists(out) and not os.path.isdir(out):
        faults.append(f"--out: {out} is a file; name a folder")
    for name in FILES:
        if os.path.isdir(out / name):
            faults.append(f"--out: {out / name} is a folder; remove it, or name another --out")
    raise_together(faults)

    shared = published.merge(scores[["track", "target"]].drop_duplicates())
    if with_published and len(shared):
        scores = pd.concat([scores, shared], ignore_index=True)
    differences = paired_differences(scores)
    text = describe(runs, scores, differences)
    if with_published and not len(shared):
        text += "\nThese runs hold no track and target that has a published score.\n"
    write_files(out, text, scores, differences)
    return text if form == FORMATS[0] else paste_table(runs, scores, form)


def write_files(out: Path, text: str, scores: pd.DataFrame, differences: pd.DataFrame) -> None:
    """Write FILES, all of them or none.

    Raises:
        UserError: they cannot be written.
    """
    from local.comparison.plot import plot_scores

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


if __name__ == "__main__":
    main()
