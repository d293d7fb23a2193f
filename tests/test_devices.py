import lightning_fabric.accelerators
import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY_RUN

import train
from local.config import parse_conf
from local.train.devices import make_trainer_on_devices


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
@pytest.mark.parametrize("found", ["mps", ""])
def test_without_cuda_a_run_is_on_the_cpu(accelerator, found, tmp_path, monkeypatch):
    """Also on a Mac, whose GPU has no float64."""
    for accelerators in (lightning_fabric.accelerators, pl.accelerators):
        is_found = staticmethod(lambda: bool(found))
        monkeypatch.setattr(accelerators.MPSAccelerator, "is_available", is_found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--accelerator", accelerator, "--devices", "auto", "--exp_dir", str(tmp_path)]
    conf = parse_conf([*TINY_RUN, *flags])
    trainer = make_trainer_on_devices(conf, items=100, valid_tracks=2, enable_progress_bar=False)
    assert trainer.strategy.root_device.type == "cpu"


def test_the_first_screen_says_that_mps_is_not_used(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train.main(["--exp_dir", str(tmp_path / "run"), "--root", str(corpus), *TINY_RUN, "--check"])
    assert "CPU (1 thread), not MPS" in capsys.readouterr().out
