"""The published scores on the page: where they are from, and which runs they compare with."""

from local.comparison.runs import PUBLISHED_CARDS, PUBLISHED_METHODS
from local.listen.runs import Run

METHOD = "full"  # whole tracks at once


def link_card(name: str) -> dict[str, str]:
    """Return the name of a published model on the hub, and the address of its card."""
    hub = PUBLISHED_CARDS[name]
    return {"name": name, "hub": hub, "address": f"https://huggingface.co/{hub}"}


def is_comparable(run: Run) -> bool:
    """Tell whether no track of a run is known to be separated by another method."""
    return set(run.find_methods()) <= set(PUBLISHED_METHODS)


def describe_methods(runs: list[Run]) -> str:
    """Return which runs do not compare with the published scores, and the remedy; "" for none."""
    shown = [f"{r.name} ({' and '.join(r.find_methods())})" for r in runs if not is_comparable(r)]
    if not shown:
        return ""
    return (
        f"{' and '.join(shown)}: not comparable with the published scores, whose method is"
        f" {METHOD}; run eval.py --method {METHOD} for that"
    )
