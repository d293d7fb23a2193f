import pytest
import torch
import yaml
from conftest import ROOT, TINY_RUN, copy_project, run_python, write_song
from torch import nn

from local.models import MODELS, build_model, find_keyword_faults, find_shape_fault, sketch_model
from local.tasnet import ConvTasNetStereo

OWN_MODEL = '''
"""A model of somebody's own: masks over learned frames, by a recurrent net."""

import torch
from torch import nn


class OwnNet(nn.Module):
    def __init__(self, C, audio_channels, samplerate, width=8, lr=0.5, use_rnn=True):
        super().__init__()
        self.C, self.width = C, width
        self.encode = nn.Conv1d(audio_channels, width, 8, stride=4)
        self.net = nn.GRU(width, width, batch_first=True) if use_rnn else nn.Identity()
        self.mask = nn.Linear(width, C * width)
        self.decode = nn.ConvTranspose1d(width, audio_channels, 8, stride=4)

    def forward(self, mixture):
        batch, channels, time = mixture.shape
        padded = nn.functional.pad(mixture, (0, 8 + -time % 4))
        frames = self.encode(padded).relu()
        hidden = self.net(frames.transpose(1, 2))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        masks = self.mask(hidden).sigmoid().transpose(1, 2)
        masked = masks.unflatten(1, (self.C, self.width)) * frames[:, None]
        waves = self.decode(masked.flatten(0, 1))[..., :time]
        return waves.view(batch, self.C, channels, time)
'''


class Doubled(nn.Module):
    """Its estimates have twice as many channels as they should."""

    def __init__(self, C, audio_channels, samplerate, **options):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, mixture):
        return self.scale * mixture[:, None].repeat(1, 2, 2, 1)


class Strict(nn.Module):
    def __init__(self, C, audio_channels, samplerate, width: int = 4):
        super().__init__()
        if width < 1:
            raise ValueError("width must be at least 1")
        self.net, self.start = nn.Linear(width, width), torch.zeros(1).item()


SHARED = dict(C=2, audio_channels=2, samplerate=8000)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(MODELS, "Doubled", Doubled)
    monkeypatch.setitem(MODELS, "Strict", Strict)


@pytest.mark.smoke
def test_a_model_gets_the_shared_attributes(added):
    model = build_model("Doubled", SHARED)
    assert (model.C, model.audio_channels, model.samplerate) == (2, 2, 8000)


def test_unknown_models_and_keywords_are_named(added):
    with pytest.raises(ValueError, match="no model Other; local/models.py has ConvTasNetStereo"):
        build_model("Other", SHARED)
    assert find_keyword_faults("Doubled", {"anything": 1}) == []
    assert find_keyword_faults("Strict", {"width": 2}) == []
    (fault,) = find_keyword_faults("Strict", {"widht": 2, "width": 3})
    assert "Strict.widht" in fault and "takes width" in fault
    with pytest.raises(ValueError, match="at least 1"):
        sketch_model("Strict", {**SHARED, "width": 0})


def test_a_sketch_has_weights_only_if_the_constructor_needs_them(added):
    before = torch.get_rng_state()
    assert sketch_model("Strict", SHARED).net.weight.device.type == "cpu"  # item() needs a number
    assert sketch_model("Doubled", SHARED).scale.device.type == "meta"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrong_shape_is_found_without_computing(added):
    assert "got (1, 2, 4, 100)" in find_shape_fault(sketch_model("Doubled", SHARED), 100)
    network = dict(N=4, L=4, B=4, H=4, X=1, R=1, C=2, audio_channels=2)
    assert find_shape_fault(sketch_model("ConvTasNetStereo", network), 101) == ""
    assert find_shape_fault(sketch_model("Strict", SHARED), 100) == ""  # it has no forward


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project to which somebody has added a model."""
    folder = copy_project(tmp_path_factory.mktemp("own") / "project")
    (folder / "local" / "own_net.py").write_text(OWN_MODEL.lstrip())
    models = folder / "local" / "models.py"
    text = models.read_text()
    entry = 'MODELS["OwnNet"] = OwnNet\n'
    imported = "from local.own_net import OwnNet\nfrom local.tasnet import"
    models.write_text(text.replace("from local.tasnet import", imported) + "\n\n" + entry)
    conf = yaml.safe_load((ROOT / "conf.yml").read_text())
    conf["training"]["model"] = "OwnNet"
    conf["OwnNet"] = {"width": 6, "lr": 0.1}  # lr: the name of a flag, which it does not become
    (folder / "conf.yml").write_text(yaml.safe_dump(conf))
    return folder


def run(project, *command, status: int = 0) -> str:
    result = run_python(*command, cwd=project)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def test_a_model_of_ones_own_through_all_commands(project, corpus):
    exp = project / "exp" / "own"
    train = ["train.py", "--exp_dir", exp, "--root", corpus, *TINY_RUN]
    first = run(project, *train, "--valid_method", "overlap-add")
    assert "OwnNet" in first and "the model itself" in first
    assert "--memory some" in first and "block_class" in first
    extended = ["--valid_method", "overlap-add", "--epochs", "2"]
    assert "epoch 1:" in run(project, *train, *extended)
    content = torch.load(exp / "best_model.pth", weights_only=True)
    assert content["model_name"] == "OwnNet"
    assert content["model_args"] == {"width": 6, "lr": 0.1, **SHARED}

    conf = (project / "conf.yml").read_text()
    (project / "conf.yml").write_text(conf.replace("width: 6", "width: 7"))
    assert "--OwnNet" not in (refused := run(project, *train, *extended, status=2))
    assert "width" in refused and "6 before, 7 now" in refused
    (project / "conf.yml").unlink()  # best_model.pth is all that the others need

    assert "SDR" in run(project, "eval.py", "--exp_dir", exp, "--out_dir", "out")
    ckpt = next(exp.glob("checkpoints/epoch=0*.ckpt"))
    full = ["--checkpoint", ckpt, "--method", "full"]
    run(project, "eval.py", "--exp_dir", exp, "--out_dir", "full", *full)
    song = project / "song.wav"
    write_song(song)
    separate = ["-m", "local.separate", song, "--checkpoint", exp / "best_model.pth"]
    run(project, *separate, "--out", project / "separated")
    assert (project / "separated" / "song" / "vocals.wav").is_file()
    refused = run(project, *separate, "--method", "stream", status=2)
    assert "OwnNet" in refused and "stream" in refused


def test_a_model_that_is_not_in_models_is_named(project, experiment, corpus, tmp_path):
    """A checkpoint of a model that another copy of the project has."""
    content = torch.load(experiment / "best_model.pth", weights_only=True)
    torch.save({**content, "model_name": "OwnNet"}, tmp_path / "best_model.pth")
    command = ["eval.py", "--exp_dir", experiment, "--out_dir", "x", "--root", corpus]
    refused = run(ROOT, *command, "--checkpoint", tmp_path / "best_model.pth", status=2)
    assert "holds a OwnNet; local/models.py has ConvTasNetStereo" in refused


def test_the_published_model_is_the_default():
    assert MODELS["ConvTasNetStereo"] is ConvTasNetStereo
