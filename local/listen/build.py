"""The files of the page: its size, its tracks, the pages made of templates."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from local import __version__
from local.eval.score_files import METRICS
from local.eval.tracks import TestTrack
from local.listen.audio import most_bytes
from local.listen.charts import PASSAGE, choose_ticks
from local.listen.folder import MARK
from local.listen.overview import Overview, describe_overview
from local.listen.runs import find_missing_audio, list_tracks
from local.listen.signals import Options, TrackPlan
from local.listen.tracks import MOST_TICKS, write_track
from local.tools.command_line import UserError, raise_together
from local.tools.jobs import run_jobs
from local.tools.sound_files import read_header

TEMPLATES = Path(__file__).with_name("templates")
STATIC = ("page.css", "page.js")
PICTURE_BYTES = 400e3  # of a player: its spectrogram and its waveform, at most
TRACK_BYTES = 100e3  # of the page of a track


def plan_tracks(overview: Overview, references: dict[str, TestTrack], rate: int) -> list[TrackPlan]:
    return [
        TrackPlan(number, name, overview, references.get(name), rate)
        for number, name in enumerate(list_tracks(overview.runs), start=1)
    ]


def reckon_bytes(plans: list[TrackPlan], options: Options) -> float:
    """Return what the page takes at most."""
    total = 0.0
    for plan in plans:
        files = [f for run in plan.overview.runs for f in run.estimates.get(plan.name, {}).values()]
        seconds = max((read_header(file).duration for file in files), default=0)
        seconds = min(seconds, options.excerpt or seconds)
        of_player = most_bytes(seconds, plan.rate, options.audio) + PICTURE_BYTES
        total += TRACK_BYTES + len(plan.players) * of_player
    return total


def check_room(out: Path, size: float) -> None:
    """Raise a UserError where there is no room for a page of `size` bytes."""
    parent = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(
            f"--out: {out} would take up to {show_bytes(size)}, and {show_bytes(free)} are free;"
            " make room, or use --audio opus or --excerpt 30"
        )


def show_bytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def write_page(plans: list[TrackPlan], folder: Path, options: Options, jobs: int) -> None:
    """Write the page of all tracks into an empty folder.

    Raises:
        UserError: audio cannot be read.
        OSError: a file cannot be written.
    """
    overview = plans[0].overview
    for name in STATIC:
        shutil.copyfile(TEMPLATES / name, folder / name)
    tracks = folder / "tracks"
    tracks.mkdir()
    shared, render = describe_options(overview, options), make_renderer()
    index = render("index.html", {**shared, **describe_overview(overview, options.with_references)})

    def work(plan: TrackPlan) -> None:
        context = write_track(plan, tracks, options)
        start, shown = context["start"], 0.97 * context["seconds"]  # no label is cut at the end
        around = {
            "before": plans[plan.number - 2 : plan.number - 1],
            "after": plans[plan.number : plan.number + 1],
            "ticks": choose_ticks(start, start + shown, MOST_TICKS),
        }
        text = render("track.html", {**shared, **context, **around})
        (tracks / f"{plan.number}.html").write_text(text, encoding="utf-8")

    _, faults = run_jobs(work, [(plan,) for plan in plans], jobs, "listening page", "tracks")
    raise_together(faults)
    (folder / "index.html").write_text(index, encoding="utf-8")


def describe_options(overview: Overview, options: Options) -> dict:
    """Return what all templates take."""
    return {
        "mark": MARK,
        "version": __version__,
        "options": options,
        "passage": PASSAGE,
        "metrics": METRICS,
        "missing": find_missing_audio(overview.runs),
        "numbers": {name: number for number, name in enumerate(overview.names, start=1)},
        "has_audio": any(run.estimates for run in overview.runs),
    }


def make_renderer() -> Callable[[str, dict], str]:
    """Return a function from the name of a template and its values to text.

    All text that comes from files is escaped. The templates are read now, whatever happens to them
    while a page is made.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {"db": show_db, "gain": show_gain}
    environment.filters |= {"level": show_level, "clock": show_clock}
    templates = {
        name: environment.get_template(name) for name in environment.list_templates(["html"])
    }
    return lambda name, values: templates[name].render(values)


def show_db(value: float | None) -> str:
    return f"{value:.2f}" if value is not None and np.isfinite(value) else "–"


def show_level(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "–"


def show_gain(value: float | None) -> str:
    return f"{value:+.2f}" if value is not None and np.isfinite(value) else "–"


def show_clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
