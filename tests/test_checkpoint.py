import io
import os
import pickle
import subprocess
import zipfile

import numpy as np
import pytest
import torch
import yaml
from torch.torch_version import TorchVersion

from local import __version__
from local.checkpoint import find_weights, load_model, save_best_model
from local.config import parse_conf, read_conf
from local.keys import KEYS
from local.models import make_model
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import UserError
from local.tools.files import atomic_path, read_yaml, sha256
from local.tools.weights import load_weights_only

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = "--root X --N 8 --L 8 --B 8 --H 8 --X 2 --R 1 --sample_rate 8000".split()


@pytest.fixture
def conf() -> dict:
    return parse_conf(FLAGS)


@pytest.fixture
def model(conf) -> ConvTasNetStereo:
    return make_model(conf).eval()


def same(one: ConvTasNetStereo, two: ConvTasNetStereo) -> bool:
    mixture = torch.randn(1, 2, 500)
    return not one.training and torch.equal(one(mixture), two(mixture))


def error_of(source) -> str:
    with pytest.raises(UserError) as error:
        load_model(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.smoke
def test_best_model_needs_nothing_else_to_be_rebuilt(tmp_path, conf, model):
    path = tmp_path / "best_model.pth"
    save_best_model(path, model.state_dict(), conf)
    loaded = load_model(path)
    assert same(loaded, model)
    assert loaded.samplerate == 8000


def test_the_folder_of_a_run_is_its_best_model(tmp_path, conf, model):
    save_best_model(tmp_path / "best_model.pth", model.state_dict(), conf)
    assert same(load_model(tmp_path), model)
    assert find_weights(tmp_path) == tmp_path / "best_model.pth"
    (tmp_path / "best_model.pth").unlink()
    assert str(tmp_path) in error_of(tmp_path)


def test_best_model_holds_plain_types_and_what_is_published(tmp_path, conf, model):
    path = tmp_path / "best_model.pth"
    save_best_model(path, model.state_dict(), conf)
    content = torch.load(path, weights_only=True)
    assert content["model_name"] == "ConvTasNetStereo"
    assert {"state_dict", "infos", "dataset", "task", "licenses"} <= set(content)
    assert content["infos"]["software_versions"]["recipe"] == __version__
    assert content["infos"]["software_versions"]["torch"].startswith(
        torch.__version__.split("+")[0]
    )

    def kinds(value):
        if isinstance(value, dict):
            return set().union(*map(kinds, value.values()))
        if isinstance(value, list):
            return set().union(*map(kinds, value))
        return {type(value)}

    assert kinds(content) <= {str, int, float, bool, torch.Tensor}


def test_a_published_file_takes_its_arguments_from_the_configuration_beside_it(
    tmp_path, conf, model
):
    content = {
        "model_name": "ConvTasNetStereo",
        "state_dict": model.state_dict(),
        "infos": {"software_versions": {"torch_version": TorchVersion("1.13.1")}},
        "dataset": "MUSDB18",
    }
    torch.save(content, tmp_path / "best_model.pth")
    assert "holds no model arguments" in error_of(tmp_path / "best_model.pth")
    published = {**conf, "positional arguments": {}, "main_args": {"exp_dir": "x", "help": None}}
    (tmp_path / "conf.yml").write_text(yaml.safe_dump(published))
    assert same(load_model(tmp_path / "best_model.pth"), model)
    for conf_yml, section in [("data: {}", "convtasnet"), ("convtasnet: {}\ndata: 3", "data")]:
        (tmp_path / "conf.yml").write_text(conf_yml)
        assert f"no section {section}" in error_of(tmp_path / "best_model.pth")


@pytest.mark.parametrize("name", ["best_model.pth", "epoch=0-step=1.ckpt"])
@pytest.mark.parametrize(
    "section, key", [(name, key) for name in ("convtasnet", "data") for key in KEYS[name]]
)
def test_a_key_that_a_saved_configuration_lacks_counts_as_its_default(
    tmp_path, conf, section, key, name
):
    conf[section][key] = read_conf()[section][key]
    model = make_model(conf).eval()
    del conf[section][key]
    state = {f"model.{part}": tensor for part, tensor in model.state_dict().items()}
    content = {"state_dict": state}
    if name == "best_model.pth":
        (tmp_path / "conf.yml").write_text(yaml.safe_dump(conf))
    else:
        content["training_config"] = conf
    torch.save(content, tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert same(loaded, model)
    assert loaded.samplerate == model.samplerate


def test_lightning_checkpoints_and_the_best_model_agree(experiment):
    best = load_model(experiment / "best_model.pth")
    scores = read_yaml(experiment / "best_k_models.json")
    name = min(scores, key=scores.get)
    assert same(best, load_model(experiment / name))


def test_folders_of_save_pretrained(tmp_path, model):
    model.save_pretrained(tmp_path / "folder")
    assert same(load_model(tmp_path / "folder"), model)
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds neither" in error_of(tmp_path / "empty")


@pytest.mark.parametrize("size", [0, 10, 1000, 6000])
def test_a_truncated_file(tmp_path, conf, model, size):
    path = tmp_path / "best_model.pth"
    save_best_model(path, model.state_dict(), conf)
    path.write_bytes(path.read_bytes()[:size])
    assert "damaged, cut short" in error_of(path)


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path, conf, model):
    path, rng, found = tmp_path / "best_model.pth", np.random.default_rng(0), 0
    save_best_model(path, model.state_dict(), conf)
    content = path.read_bytes()
    for place in rng.integers(len(content), size=200):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            loaded = load_model(path).state_dict()
        except UserError:
            found += 1
        else:
            assert all(torch.equal(loaded[name], model.state_dict()[name]) for name in loaded)
    assert found > 50


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    for name, write in {
        "plain.pth": lambda path: path.write_bytes(pickle.dumps(Payload())),
        "zip.pth": lambda path: torch.save({"state_dict": {"x": Payload()}}, path),
    }.items():
        write(tmp_path / name)
        assert "not made of plain data alone; name a best_model.pth" in error_of(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content.update(model_name="DPTNet"), "holds a DPTNet"),
        (lambda content: content.pop("state_dict"), "holds no state_dict"),
        (lambda content: content["model_args"].update(N=16), "another model: .*size mismatch"),
        (lambda content: content["model_args"].update(norm_type="x"), "norm_type must be one of"),
        (lambda content: content["model_args"].update(heads=2), "unexpected keyword .*heads"),
        (lambda content: content["state_dict"].popitem(), "Missing key"),
    ],
)
def test_another_model(tmp_path, conf, model, change, words):
    path = tmp_path / "best_model.pth"
    save_best_model(path, model.state_dict(), conf)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match=words):
        load_model(path)


def test_a_file_that_is_no_checkpoint(tmp_path):
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    (tmp_path / "list.pth").write_bytes(buffer.getvalue())
    assert "holds no state_dict" in error_of(tmp_path / "list.pth")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_with_the_weights_is_found(tmp_path, conf, model, monkeypatch):
    path = tmp_path / "best_model.pth"
    save_best_model(path, model.state_dict(), conf)
    assert find_weights(path) == path
    assert sha256(path) == subprocess.check_output(["sha256sum", path], text=True).split()[0]
    model.save_pretrained(tmp_path / "folder")
    weights = tmp_path / "folder" / "model.safetensors"
    assert find_weights(tmp_path / "folder") == weights
    old = weights.rename(weights.with_name("pytorch_model.bin"))
    assert find_weights(tmp_path / "folder") == old

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--mine"
    for place in ("refs", "snapshots/1", ".no_exist/1"):
        (repository / place).mkdir(parents=True)
    (repository / "refs" / "main").write_text("1")
    (repository / ".no_exist" / "1" / "model.safetensors").touch()
    (repository / "snapshots" / "1" / "pytorch_model.bin").touch()
    assert find_weights("me/mine") == repository / "snapshots" / "1" / "pytorch_model.bin"


def test_no_flipped_bit_in_the_directory_of_a_file_changes_what_is_read(tmp_path):
    """Checksums are of what the entries hold; one bit of their attributes made torch skip them."""
    path = tmp_path / "content.pt"
    torch.save({"ones": torch.ones(3), "twos": torch.full((2,), 2), "text": "text"}, path)
    raw, expected, found = path.read_bytes(), repr(load_weights_only(path)), 0
    with zipfile.ZipFile(path) as file:
        start = file.start_dir
    for place in range(start, len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                content = load_weights_only(path)
            except Exception:
                found += 1
            else:
                assert repr(content) == expected, (place, bit)
    assert found > len(raw) - start
