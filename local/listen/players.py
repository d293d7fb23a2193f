"""The players of a track: what can be heard of it, in which order."""

from dataclasses import dataclass

from local.listen.runs import Run, list_targets


@dataclass(frozen=True)
class Player:
    """What can be heard of a track.

    Args:
        number: from 1 on; also its key and the name of its files.
        target: "" for the mixture.
        run: the name of the run whose estimate it is; "" for the data set's audio.
    """

    number: int
    target: str
    run: str

    @property
    def label(self) -> str:
        return self.run or ("reference" if self.target else "mixture")


def list_players(runs: list[Run], track: str, has_reference: bool) -> list[Player]:
    """Return the players of a track: the mixture, then per target its reference and the runs'
    estimates. A track without estimates has none.
    """
    has_reference = has_reference and any(track in run.estimates for run in runs)
    found = [("", "")] if has_reference else []
    for target in list_targets(runs, track):
        names = [run.name for run in runs if target in run.estimates.get(track, {})]
        references = [""] if has_reference and names else []
        found += [(target, name) for name in references + names]
    return [Player(number, *player) for number, player in enumerate(found, start=1)]
