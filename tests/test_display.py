import re
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
from test_system import FLAGS, fit, make_system

from local.config import parse_conf
from local.models import make_model
from local.tools import progress
from local.train.display import (
    ProgressBar,
    ProgressLines,
    describe_rest,
    describe_time,
    estimate_validation_memory,
)


@pytest.mark.parametrize(
    ("seconds", "interval", "read_at"),
    [(1e9, 50, [0, 0, 0, 0]), (1e9, 2, [0, 1, 1, 3]), (-1.0, 50, [0, 1, 2, 3])],
    ids=["first", "log interval", "slow steps"],
)
def test_the_bar_shows_the_loss_that_was_read_last(
    tmp_path, monkeypatch, seconds, interval, read_at
):
    class Losses(pl.Callback):
        shown, true = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            bar = trainer.progress_bar_callback
            self.shown.append(bar.get_metrics(trainer, pl_module)["loss"])
            self.true.append(outputs["loss"].item())

    monkeypatch.setattr(ProgressBar, "READ", seconds)
    fit(
        make_system(parse_conf(FLAGS)),
        tmp_path,
        callbacks=[ProgressBar(), Losses()],
        enable_progress_bar=True,
        log_every_n_steps=interval,
    )
    assert len(set(Losses.true)) == 4
    assert Losses.shown == [Losses.true[index] for index in read_at]


@pytest.mark.parametrize("every", [-1.0, 1e9], ids=["slow", "fast"])
def test_without_bars_long_work_shows_lines(tmp_path, monkeypatch, capsys, every):
    monkeypatch.setattr(progress, "EVERY", every)
    options = dict(callbacks=[ProgressLines()], enable_progress_bar=True)
    fit(make_system(parse_conf(FLAGS)), tmp_path, epochs=2, **options)
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    if every > 0:
        assert lines == []
        return
    for epoch in (0, 1):
        own = [line for line in lines if line.startswith(f"epoch {epoch}: ")]
        training, validation = own[:4], own[4:]
        for number, line in enumerate(training, start=1):
            assert re.search(rf"training: {number} of 4 batches in .*, loss \d\.\d+$", line)
        assert [": validation: " in line for line in validation] == [True] * 3
        assert "3 of 3 tracks" in validation[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (119, "119.0 s"), (120, "2.0 min"), (7200, "2.0 h"), (1e6, "11.6 days")],
)
def test_times_are_readable(seconds, text):
    assert describe_time(seconds) == text


@pytest.mark.parametrize(
    ("epoch", "before", "limits", "text"),
    [
        (0, 0, (20, -1), "3.3 min for 20 epochs"),
        (11, 0, (20, -1), "90.0 s for 9 more epochs"),
        (19, 8, (20, -1), "2.0 s for 1 more epoch"),
        (1, 4, (-1, 12), "10.0 s for 5 more steps"),
        (1, 0, (2, 100), "10.0 s for 1 more epoch"),
        (3, 0, (-1, -1), ""),
    ],
)
def test_a_forecast_counts_what_is_left(epoch, before, limits, text):
    trainer = SimpleNamespace(num_training_batches=10, current_epoch=epoch)
    training = {"epochs": limits[0], "max_steps": limits[1], "aggregate": 2}
    found = describe_rest(1.0, before, trainer, training)
    assert found == "10.0 s per epoch" + f", {text}" * bool(text)


@pytest.mark.parametrize(
    ("flags", "per_frame"),
    [
        ([], 4 * 6 + 4 * 10),
        (["--precision", "bf16-mixed"], 4 * 6 + 2 * 10),
        (["--precision", "16-mixed"], 4 * 6 + 2 * 10),
        (["--H", "5"], 4 * 6 + 4 * 6),
        (["--causal", "yes", "--norm_type", "cLN"], 0),
    ],
    ids=["32-true", "bf16-mixed", "16-mixed", "few hidden channels", "streamed"],
)
def test_the_memory_of_validation_is_that_of_the_tensors_it_keeps(flags, per_frame):
    conf = parse_conf([*FLAGS, "--B", "6", "--H", "10", *flags])
    system = SimpleNamespace(model=make_model(conf), config=conf)
    assert estimate_validation_memory(system, 8001) == 2000 * per_frame
