from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
from test_system import FLAGS, fit, make_system

from local.config import parse_conf
from local.models import make_model
from local.train.display import ProgressBar, describe_time, estimate_validation_memory


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (119, "119.0 s"), (120, "2.0 min"), (7200, "2.0 h"), (1e6, "11.6 days")],
)
def test_times_are_readable(seconds, text):
    assert describe_time(seconds) == text


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
