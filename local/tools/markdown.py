"""Tables and text in Markdown."""

import re


def escape(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text)


def table(rows: list[list[str]], left: int = 1) -> str:
    """Return a table of cells that are Markdown already.

    Args:
        rows: the heading first.
        left: the columns, from the first, that hold words; the others hold numbers.
    """
    rule = [*["---"] * left, *["---:"] * (len(rows[0]) - left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
