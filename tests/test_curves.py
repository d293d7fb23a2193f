import csv
import errno
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_RUN
from matplotlib.figure import Figure
from PIL import Image
from test_resume import flags, run_until

import train
from local.config import parse_conf
from local.train import curves
from local.train.curves import Curves, plot_curves, read_table
from local.train.loggers import EpochTable, make_loggers

LABELS = ["l1 loss", "SDR in dB", "learning rate", "items per second"]
COLUMNS = ["epoch", "train_loss", "val_loss", "val_sdr_vocals", "lr", "items_per_second"]


def write_metrics(path: Path, epochs: int, **changes) -> Path:
    """A metrics.csv as runs write it, with some columns changed: None for none, or its values."""
    rows = []
    for epoch in range(epochs):
        values = (0.06 * 0.99**epoch, 0.07 * 0.98**epoch, 0.03 * epoch, 5e-4 / 2 ** (epoch // 23))
        rows.append(dict(zip(COLUMNS, (epoch, *values, 70), strict=True)))
    kept = [name for name in COLUMNS if changes.get(name, "") is not None]
    for name, values in changes.items():
        for row, value in zip(rows, values or (), strict=values is not None):
            row[name] = value
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_panels(figure: Figure) -> dict[str, dict[str, list[float]]]:
    """Label -> name of a curve -> its values."""
    return {
        panel.get_ylabel(): {line.get_label(): list(line.get_ydata()) for line in panel.lines}
        for panel in figure.axes
    }


def list_texts(figure: Figure) -> list:
    """What can be read in a figure outside of its panels: (text, where it is)."""
    texts = [*(panel.yaxis.label for panel in figure.axes), figure.axes[-1].xaxis.label]
    for panel in figure.axes:
        low, high = sorted(panel.get_ylim())
        texts += [
            label.label1
            for label in panel.yaxis.get_major_ticks()
            if low <= label.get_loc() <= high
        ]
    low, high = figure.axes[-1].get_xlim()
    ticks = figure.axes[-1].xaxis.get_major_ticks()
    texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    texts += figure.texts
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]


@pytest.mark.parametrize("epochs", [1, 3, 40, 200])
def test_everything_can_be_read(epochs, tmp_path):
    table = read_table(write_metrics(tmp_path / "metrics.csv", epochs))
    figure = plot_curves(table, "l1 loss")
    panels = read_panels(figure)
    assert list(panels) == LABELS
    assert list(panels["l1 loss"]) == ["training", "validation"]
    assert list(panels["SDR in dB"]) == ["vocals"]
    assert panels["l1 loss"]["validation"] == pytest.approx(table["val_loss"].tolist())
    assert figure.axes[-1].get_xlabel() == "epoch"
    figure.draw_without_rendering()
    assert f"in epoch {epochs - 1}" in figure.texts[0].get_text()
    for (one, place), (other, place_of_other) in combinations(list_texts(figure), 2):
        assert not place.overlaps(place_of_other), (one, other)
    whole = figure.bbox
    for text, place in list_texts(figure):
        assert whole.contains(place.x0, place.y0) and whole.contains(place.x1, place.y1), text


def test_the_curve_of_a_single_epoch_is_seen(tmp_path):
    figure = plot_curves(read_table(write_metrics(tmp_path / "metrics.csv", 1)), "loss")
    assert all(line.get_marker() == "." for panel in figure.axes for line in panel.lines)


def test_what_is_missing_or_not_finite_is_a_gap(tmp_path):
    changes = {"val_sdr_vocals": [1, "nan", 3], "items_per_second": [70, "", 71]}
    path = write_metrics(tmp_path / "m.csv", 3, train_loss=["inf", 0.5, 0.25], **changes)
    panels = read_panels(plot_curves(read_table(path), "l1 loss"))
    nan = pytest.approx(np.nan, nan_ok=True)
    assert panels["l1 loss"]["training"] == [nan, 0.5, 0.25]
    assert panels["SDR in dB"]["vocals"] == [1, nan, 3]
    assert panels["items per second"]["items per second"] == [70, nan, 71]


@pytest.mark.parametrize("values", [None, ["nan", "nan"], ["", ""]])
def test_a_panel_without_values_is_left_out(values, tmp_path):
    table = read_table(write_metrics(tmp_path / "metrics.csv", 2, val_sdr_vocals=values))
    assert list(read_panels(plot_curves(table, "l1 loss"))) == [LABELS[0], *LABELS[2:]]


@pytest.mark.parametrize(("loss", "label"), [("l1", "l1 loss"), ("sdr", "sdr loss in dB")])
def test_the_loss_has_its_name_and_unit(loss, label, tmp_path):
    assert Curves(tmp_path, loss).label == label


# In a run


@pytest.fixture
def drawn(monkeypatch) -> list[list[float]]:
    """The epochs in every image that was drawn."""

    def plot(table, label):
        drawn.append(table["epoch"].tolist())
        return plot_curves(table, label)

    drawn = []
    monkeypatch.setattr(curves, "plot_curves", plot)
    return drawn


def test_it_is_drawn_after_every_epoch_and_on_resume_too(drawn, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "SHARE", 1e9)
    run_until(30, flags(tmp_path / "run", corpus), monkeypatch)
    assert drawn == [[0], [0, 1]]
    train.main(flags(tmp_path / "run", corpus))
    assert drawn[2:] == [[0, 1, 2]]
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.format == "PNG" and image.width > 500
        image.load()


def test_short_epochs_are_not_all_drawn_but_the_last_is(drawn, corpus, tmp_path):
    train.main(flags(tmp_path / "run", corpus))
    assert drawn == [[0], [0, 1, 2]]


def test_it_follows_the_table_that_it_reads(tmp_path):
    conf = parse_conf(["--exp_dir", str(tmp_path)])
    kinds = [type(logger) for logger in make_loggers(conf)]
    assert kinds.index(Curves) > kinds.index(EpochTable)


def test_an_image_that_cannot_be_written_ends_no_run(corpus, tmp_path, monkeypatch, capsys):
    def fill_disk(figure, path, **options):
        path.write_bytes(b"\x89PNG")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(curves, "SHARE", 1e9)
    monkeypatch.setattr(Figure, "savefig", fill_disk)
    exp_dir = tmp_path / "run"
    train.main(["--exp_dir", str(exp_dir), "--root", str(corpus), *TINY_RUN, "--epochs", "3"])
    assert capsys.readouterr().err.count("curves.png cannot be written") == 1
    assert (exp_dir / "train.log").read_text().count("curves.png cannot be written") == 1
    assert not list(exp_dir.glob("*curves*"))


def test_what_is_in_the_way_is_named(corpus, tmp_path, error_of):
    (tmp_path / "run" / "curves.png").mkdir(parents=True)
    error = error_of(train.main, *flags(tmp_path / "run", corpus))
    assert f"{tmp_path / 'run' / 'curves.png'} is in the way" in error


def test_other_ranks_draw_nothing(tmp_path, drawn, monkeypatch):
    write_metrics((tmp_path / "logs").mkdir() or tmp_path / "logs" / "metrics.csv", 1)
    logger = Curves(tmp_path, "l1")
    monkeypatch.setattr("pytorch_lightning.utilities.rank_zero_only.rank", 1)
    logger.log_metrics({"train_loss": 1.0})
    logger.finalize("success")
    assert drawn == []
    monkeypatch.setattr("pytorch_lightning.utilities.rank_zero_only.rank", 0)
    logger.log_metrics({"train_loss": 1.0})
    assert drawn == [[0]]
