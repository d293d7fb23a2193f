import inspect
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from asteroid.models.publisher import make_license_notice
from conftest import ENVIRONMENT, ROOT, make_record, random_model, run_command
from huggingface_hub import ModelCard
from test_score_files import make_extras, make_scores

from local.checkpoint import load_model, save_best_model
from local.config import read_conf
from local.eval.results import write_results
from local.eval.score_files import load_track, make_track_store, save_track
from local.models import MODELS
from local.publish import main
from local.share import sources, upload
from local.share.sources import list_sources
from local.tasnet import ConvTasNetStereo
from local.tools.files import sha256
from local.tools.weights import load_checkpoint
from local.train.origin import DEMO_DATASET, MUSDB18, MUSDB18_LICENSE

SIZES = dict(N=8, L=20, B=8, H=8, X=2, R=1)
KEYWORDS = dict(**SIZES, C=2, audio_channels=2, samplerate=44100)
TRACKS = ("AM Contra - Heart Peripheral", "A | B * [c](d) `e` _f_")
FILES = {"README.md", "config.json", "model.safetensors", "published.yml"}


def make_run(
    exp_dir: Path, dataset=MUSDB18, licenses=(MUSDB18_LICENSE,), conf=None, **infos
) -> Path:
    """A run's folder with a model, and what train.py says of it."""
    exp_dir.mkdir(parents=True)
    configuration = read_conf()
    configuration["convtasnet"] |= {**SIZES, **(conf or {})}
    configuration["data"]["root"] = "/home/somebody/MUSDB18"
    arguments = {**KEYWORDS, **configuration["convtasnet"]}
    origin = {
        "infos": {
            "configuration": configuration,
            "commit": "0123abc",
            "epoch": 11,
            "val_loss": 0.01234,
            "training_tracks": ["One", "Two", "Three"],
            "validation_tracks": ["Four"],
            "hours": {"training_tracks": 5.25, "validation_tracks": 0.5},
            **infos,
        },
        "dataset": dataset,
        "licenses": list(licenses),
    }
    state = random_model(arguments).state_dict()
    save_best_model(exp_dir / "best_model.pth", state, configuration, origin)
    return exp_dir


def add_scores(out: Path, checkpoint: Path, names=TRACKS, is_done=True, **made_with) -> Path:
    """What eval.py leaves in a folder."""
    (out / "test").mkdir(parents=True)
    for seed, name in enumerate(names):
        record = {**make_record(), **make_extras(seed)}
        record["made_with"] = {
            **record["made_with"],
            "checkpoint": sha256(checkpoint),
            **made_with,
        }
        save_track(out, make_track_store(name, make_scores(seed)), record)
    if is_done:
        write_results(out, [load_track(out, name) for name in names], {})
    return out


@pytest.fixture
def run(tmp_path) -> Path:
    exp_dir = make_run(tmp_path / "exp" / "run")
    add_scores(exp_dir / "full", exp_dir / "best_model.pth")
    return exp_dir


def publish(*args) -> Path:
    """Runs the command; the folder of EXP, the first of the arguments."""
    main(list(map(str, args)))
    return args[0] / "published"


def fail(capsys, *args) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, args)))
    assert end.value.code == 2
    return capsys.readouterr().err


def read_card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def list_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The folder


def test_it_holds_what_the_hub_takes(run):
    folder = publish(run)
    top = {path.name for path in folder.iterdir()}
    assert top == FILES | {"local"}
    model = ConvTasNetStereo.from_pretrained(folder)
    expected = load_model(run / "best_model.pth")
    assert model.arguments() == expected.arguments()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("conf", [{}, {"causal": True, "norm_type": "cLN"}])
def test_the_sample_runs_without_this_project_and_gives_the_same(conf, tmp_path):
    folder = publish(make_run(tmp_path / "run", conf=conf))
    (sample,) = re.findall(r"```python\n(.*?)```", read_card(folder), re.DOTALL)
    # So that the same mixture is separated there and here.
    seeded = sample.replace("import torch\n", "import torch\ntorch.manual_seed(5)\n")
    (tmp_path / "sample.py").write_text(
        f"{seeded}\ntorch.save([vocals, accompaniment], 'estimates.pt')\n"
        f"assert not [name for name in sys.modules if '{ROOT}/local' in str(sys.modules[name])]\n"
    )
    shutil.move(folder, tmp_path / "published")
    subprocess.run(
        [sys.executable, tmp_path / "sample.py"], cwd=tmp_path, env=ENVIRONMENT, check=True
    )
    torch.manual_seed(5)
    with torch.inference_mode():
        expected = load_model(tmp_path / "run" / "best_model.pth")(torch.randn(1, 2, 441_000))[0]
    assert torch.equal(torch.stack(torch.load(tmp_path / "estimates.pt")), expected)


def test_the_commands_take_the_folder_and_give_the_same(experiment, corpus, tmp_path):
    run = Path(shutil.copytree(experiment, tmp_path / "run"))
    evaluate = ["eval.py", "--exp_dir", run, "--jobs", "1", "--out_dir"]
    assert run_command(*evaluate, "best").returncode == 0
    folder = publish(run)
    assert run_command(*evaluate, "hub", "--checkpoint", folder).returncode == 0
    song = next(corpus.glob("test/*/mixture.wav"))
    for name, checkpoint in {"s1": run / "best_model.pth", "s2": folder}.items():
        flags = ["--checkpoint", checkpoint, "--out", run / name]
        assert run_command("local/separate.py", song, *flags).returncode == 0
    for first, second in (("best", "hub"), ("s1", "s2")):
        made = sorted((run / first).rglob("*.wav"))
        assert made
        for path in made:
            same = run / second / path.relative_to(run / first)
            assert path.read_bytes() == same.read_bytes()
    for path in (run / "best" / "test").glob("*.json"):
        assert path.read_bytes() == (run / "hub" / "test" / path.name).read_bytes()


def test_a_run_of_train_py_is_described(experiment, corpus, tmp_path):
    run = Path(shutil.copytree(experiment, tmp_path / "run"))
    card = read_card(publish(run))
    infos = load_checkpoint(run / "best_model.pth")["infos"]
    assert "| 3 tracks, " in card and "| 1 track, " in card and " min |" in card
    assert infos["commit"].replace("_", r"\_") in card
    assert f"after {infos['epoch'] + 1} epoch" in card
    assert sha256(run / "best_model.pth") in card


def test_the_folders_of_this_machine_are_nowhere(experiment, corpus, tmp_path):
    run = Path(shutil.copytree(experiment, tmp_path / "run"))
    publish(run)
    files = list_files(run / "published") | list_files(run / "publish_dir")
    for path, content in files.items():
        for private in (tmp_path, corpus, experiment, ROOT):
            assert str(private).encode() not in content, path


def test_it_is_replaced_while_it_is_as_it_was_written(run):
    before = list_files(publish(run))
    (run / "published" / "config.json").unlink()
    assert list_files(publish(run)) == before
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


def test_another_folder_is_never_replaced(run, capsys):
    folder = publish(run)
    for name, content in {"notes.txt": "mine", "README.md": "my own card"}.items():
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text(content)
        held = list_files(run)
        assert name in fail(capsys, run)
        assert list_files(run) == held
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    publish(run)
    assert "run" in fail(capsys, run, "--out", run)
    (run / "file").write_text("")
    assert "file" in fail(capsys, run, "--out", run / "file")


def test_what_a_killed_run_has_left_is_put_back(run, capsys):
    folder = publish(run)
    before = list_files(folder)
    old = folder.rename(run / ".published.old.tmp")
    (run / ".published.tmp").mkdir()
    assert list_files(publish(run)) == before
    assert not old.exists() and not (run / ".published.tmp").exists()


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "empty").mkdir()
    publish(run, "--out", tmp_path / "empty")
    assert FILES < {path.name for path in (tmp_path / "empty").iterdir()}


@pytest.mark.parametrize("place", ["save_pretrained", "replace"])
def test_what_was_there_stays_where_writing_fails(place, run, capsys, monkeypatch):
    held = list_files(publish(run))

    def fail_to_write(*args):
        raise OSError(28, "No space left on device")

    if place == "replace":  # the new folder cannot get its name
        monkeypatch.setattr(os, "replace", replace_but(run / "published", fail_to_write))
    else:
        monkeypatch.setattr(ConvTasNetStereo, "save_pretrained", fail_to_write)
    assert "No space left" in fail(capsys, run)
    monkeypatch.undo()
    assert list_files(run / "published") == held
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


def replace_but(target: Path, fail_to_write):
    """os.replace that fails for a new folder at `target`."""
    rename = os.replace

    def replace(source, destination):
        if Path(destination) == target and Path(source).name == f".{target.name}.tmp":
            fail_to_write()
        rename(source, destination)

    return replace


# The card


def test_the_front_matter_is_what_the_hub_reads(run):
    card = ModelCard.load(publish(run) / "README.md")
    data = card.data
    assert (data.license, data.license_link) == ("other", MUSDB18_LICENSE["title_link"])
    assert "academic" in data.license_name and data.pipeline_tag == "audio-to-audio"
    assert {"audio", "music-source-separation", "pytorch_model_hub_mixin"} <= set(data.tags)
    assert data.model_name == "run" and data.base_model is None
    tracks = [make_scores(seed) for seed in range(len(TRACKS))]
    found = {result.metric_name.partition(" in dB")[0]: result for result in data.eval_results}
    assert len(found) == len(data.eval_results) == 8
    for target, metrics in tracks[0].items():
        for metric in metrics:
            medians = [np.nanmedian(track[target][metric]) for track in tracks]
            result = found[f"{metric} of {target}"]
            assert result.metric_value == pytest.approx(np.median(medians), abs=6e-4)
            assert result.metric_type == metric.lower()
            assert result.metric_args == {"method": "full"}
    again = ModelCard(f"---\n{data.to_yaml()}\n---\n")
    assert again.data.eval_results == data.eval_results


def test_the_card_says_how_the_model_was_trained(run):
    card = read_card(publish(run))
    for fact in ("3 tracks, 5.2 h", "1 track, 30.0 min", "after 12 epochs", "0.01234", "0123abc"):
        assert fact in card
    assert sha256(run / "best_model.pth") in card
    assert "random weights" in card and "Adam" in card and "academic use only" in card
    assert "somebody" not in card


def test_the_card_has_every_score(run):
    card = read_card(publish(run))
    for seed in range(len(TRACKS)):
        for metrics in make_scores(seed).values():
            for values in metrics.values():
                assert f"| {np.nanmedian(values):.2f} |" in card
    assert "| 2 of 10 | 2 |" in card and "| 0 of 10 | 2 |" in card  # NaN frames, tracks
    assert r"A \| B \* \[c\](d) \`e\` \_f\_" in card


@pytest.mark.parametrize(
    ("made_with", "compares"),
    [
        ({"method": "full"}, True),
        ({"method": "stream"}, True),
        ({"method": "overlap-add", "segment": 6.0, "overlap": 0.1}, False),
    ],
)
def test_only_whole_tracks_compare_with_the_published_scores(made_with, compares, tmp_path):
    run = make_run(tmp_path / "run")
    add_scores(run / "OUT", run / "best_model.pth", **made_with)
    card = read_card(publish(run))
    assert f"--method {made_with['method']}" in card
    assert ("do not compare" in card) != compares


def test_scores_of_tracks_that_were_trained_on_are_marked(tmp_path):
    run = make_run(tmp_path / "run", validation_tracks=[TRACKS[0]])
    add_scores(run / "OUT", run / "best_model.pth")
    folder = publish(run)
    assert "on 1 of these 2 tracks" in read_card(folder)
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {result.dataset_split for result in results} == {None}


def test_without_scores_the_card_and_the_command_say_so(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    folder = publish(run)
    assert "scores: none" in capsys.readouterr().out
    assert "No scores" in read_card(folder)
    assert ModelCard.load(folder / "README.md").data.eval_results is None


@pytest.mark.parametrize("dataset", ["tracks of /home/somebody/own", DEMO_DATASET])
def test_no_licence_is_made_up(dataset, tmp_path, capsys):
    run = make_run(tmp_path / "run", dataset=dataset, licenses=(), conf={})
    folder = publish(run)
    assert "licence: none" in capsys.readouterr().out
    data = ModelCard.load(folder / "README.md").data
    assert data.license is None and data.license_name is None
    assert "No licence" in read_card(folder) and "academic" not in read_card(folder)


def test_a_base_model_is_named_and_its_licence_carries_over(tmp_path):
    base = make_run(tmp_path / "base") / "best_model.pth"
    origin = {"source": str(base), "sha256": sha256(base), "partial": False}
    own = dict(dataset="tracks of own", licenses=(), base_model=origin)
    folder = publish(make_run(tmp_path / "run", **own))
    card = read_card(folder)
    assert ModelCard.load(folder / "README.md").data.base_model is None
    assert "`base/best_model.pth`" in card and sha256(base) in card
    assert "carry over" in card and "academic use only" in card
    assert ModelCard.load(folder / "README.md").data.license == "other"
    base.unlink()  # what is not there is not known
    folder = publish(make_run(tmp_path / "other", **own))
    assert "carry over" in read_card(folder) and "academic" not in read_card(folder)


def test_a_base_model_of_the_hub_is_linked(tmp_path):
    hub = "cadenzachallenge/ConvTasNet_LyricsSeparation_NonCausal"
    origin = {"source": hub, "sha256": 64 * "1", "partial": True}
    own = dict(dataset="tracks of own", licenses=(), base_model=origin)
    folder = publish(make_run(tmp_path / "run", **own))
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model == hub and data.license_link.endswith(hub)
    assert f"[{hub}](https://huggingface.co/{hub})" in read_card(folder)


def test_a_model_of_ones_own_brings_its_code(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "local"
    for name in ("__init__", "tools/__init__", "tools/one", "tools/two", "tools/three", "net"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("")
    (package / "net.py").write_text("import torch\nfrom local.tools.one import a\n")
    (package / "tools" / "one.py").write_text(
        "from local.tools import two\ndef later():\n    from local.tools import three\n"
    )
    monkeypatch.setattr(sources, "PACKAGE", package)
    monkeypatch.setattr(sources, "ROOT", package.parent)
    found = {path.relative_to(package).as_posix() for path in list_sources(package / "net.py")}
    assert found == {
        "net.py",
        "__init__.py",
        *(f"tools/{n}.py" for n in ("__init__", "one", "two")),
    }
    assert list_sources(torch.__file__) == set()  # what others install


def test_a_model_of_four_stems(tmp_path):
    run = make_run(tmp_path / "run", conf={"C": 4})
    folder = publish(run)
    assert "vocals, bass, drums, other = model(mixture)[0]" in read_card(folder)


def test_a_file_that_records_nothing_is_published_as_such(tmp_path):
    run = make_run(tmp_path / "run")
    content = load_checkpoint(run / "best_model.pth")
    kept = {key: content[key] for key in ("model_name", "model_args", "state_dict")}
    torch.save(kept, run / "best_model.pth")
    card = read_card(publish(run))
    assert "does not record" in card and sha256(run / "best_model.pth") in card


def test_what_an_earlier_version_did_not_record_is_unknown(tmp_path):
    run = make_run(tmp_path / "run")
    content = load_checkpoint(run / "best_model.pth")
    for key in ("hours", "validation_tracks", "epoch"):
        del content["infos"][key]
    del content["infos"]["configuration"]["training"]["ema"]
    torch.save(content, run / "best_model.pth")
    card = read_card(publish(run))
    assert "| training tracks | 3 tracks |" in card and "| validation tracks | unknown |" in card


# For asteroid


def test_model_pth_is_what_asteroid_publishes_and_what_we_load(run):
    publish(run)
    path = run / "publish_dir" / "model.pth"
    content = torch.load(path, weights_only=True)
    assert content["infos"]["final_metrics"]["vocals_SDR_median"] is not None
    assert content["infos"]["training_config"]["training"]["epochs"] == 200
    assert MUSDB18 in make_license_notice("model", content["licenses"], uploader="Somebody")
    mixture = torch.randn(1, 2, 4000)
    with torch.no_grad():
        expected = load_model(run / "best_model.pth")(mixture)
        assert torch.equal(load_model(path)(mixture), expected)
    assert [path.name for path in path.parent.iterdir()] == ["model.pth"]


# Bad input


def test_exp_needs_a_model(tmp_path, capsys):
    assert "best_model.pth" in fail(capsys, tmp_path)
    (tmp_path / "exp").mkdir()
    message = fail(capsys, tmp_path / "ex")
    assert "ex" in message and message.count("\n") == 1
    (tmp_path / "best_model.pth").write_bytes(b"damaged")
    assert "damaged" in fail(capsys, tmp_path)
    assert not (tmp_path / "published").exists()


def test_other_kinds_of_models_are_refused(tmp_path, capsys, monkeypatch):
    class Small(torch.nn.Module):
        def __init__(self, C, audio_channels, samplerate):
            super().__init__()
            self.C, self.scale = C, torch.nn.Parameter(torch.ones(1))

    monkeypatch.setitem(MODELS, "Small", Small)
    keywords = dict(C=2, audio_channels=2, samplerate=44100)
    content = {"model_name": "Small", "model_args": keywords}
    torch.save(
        {**content, "state_dict": Small(**keywords).state_dict()}, tmp_path / "best_model.pth"
    )
    message = fail(capsys, tmp_path)
    assert "Small" in message and "PyTorchModelHubMixin" in message
    assert [path.name for path in tmp_path.iterdir()] == ["best_model.pth"]


def test_scores_of_another_model_are_refused(run, tmp_path, capsys):
    other = make_run(tmp_path / "other", epoch=2)
    out = add_scores(tmp_path / "OUT", other / "best_model.pth")
    message = fail(capsys, run, "--eval", out)
    assert sha256(other / "best_model.pth") in message and "2 of the 2 tracks" in message
    assert not (run / "published").exists() and not (run / "publish_dir").exists()
    shutil.move(out, other / "OUT")
    shutil.copytree(other / "OUT", run / "of-another")
    assert "full, 2 tracks" in publish_and_read(capsys, run)


def publish_and_read(capsys, *args) -> str:
    publish(*args)
    return capsys.readouterr().out


def test_one_of_several_evaluations_has_to_be_named(run, capsys):
    add_scores(run / "deeper" / "again", run / "best_model.pth", method="stream")
    message = fail(capsys, run)
    assert "full" in message and "deeper/again" in message
    for name in ("full", run / "deeper" / "again"):
        assert f"{Path(name).name}, 2 tracks" in publish_and_read(capsys, run, "--eval", name)


def test_unfit_scores_are_refused(run, capsys):
    assert "no scores" in fail(capsys, run, "--eval", "ful")
    out = add_scores(run / "unfinished", run / "best_model.pth", is_done=False)
    assert "results.txt" in fail(capsys, run, "--eval", out)
    out = add_scores(run / "mixed", run / "best_model.pth", names=TRACKS[:1])
    shutil.copytree(add_scores(run / "m", run / "best_model.pth", TRACKS[1:], method="stream"),
                    out, dirs_exist_ok=True)  # fmt: skip
    assert "several settings" in fail(capsys, run, "--eval", out)
    (run / "full" / "test" / f"{TRACKS[0]}.json").write_text("{}")
    assert TRACKS[0] in fail(capsys, run, "--eval", "full")


# The hub


@pytest.fixture
def hub(monkeypatch):
    """What would have been sent, with a token in the environment."""
    calls = []

    def create_repo(repo, **options):
        calls.append(("create_repo", repo, options))
        return f"https://huggingface.co/{repo}"

    def upload_folder(**options):
        inspect.signature(huggingface_hub.upload_folder).bind(**options)  # it takes these
        calls.append(options)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(upload, "create_repo", create_repo)
    monkeypatch.setattr(upload, "upload_folder", upload_folder)
    return calls


def test_nothing_leaves_the_machine_unasked(run, hub, monkeypatch, capsys):
    def connect(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    publish(run)
    assert hub == [] and "Nothing was uploaded" in capsys.readouterr().out


def test_what_is_uploaded_is_listed(run, hub, capsys):
    folder = publish(run, "--repo", "me/lyrics")
    create, commit = hub
    assert create[:2] == ("create_repo", "me/lyrics") and create[2]["exist_ok"]
    files = {path.relative_to(folder).as_posix() for path in list_files(folder)}
    assert commit["repo_id"] == "me/lyrics" and Path(commit["folder_path"]) == folder
    assert set(commit["allow_patterns"]) == files
    out = capsys.readouterr().out
    assert all(name in out for name in files) and "huggingface.co/me/lyrics" in out
    assert "hf_secret" not in out + read_card(folder)
    assert 'snapshot_download("me/lyrics")' in read_card(folder)
    assert ModelCard.load(folder / "README.md").data.model_name == "lyrics"


@pytest.mark.parametrize("name", ["lyrics", "a/b/c", "me/-", "me/a--b", "", "me/a b", "/x"])
def test_a_repo_needs_a_name(name, run, hub, capsys):
    message = fail(capsys, run, "--repo", name)
    assert "--repo" in message and "USER/NAME" in message
    assert hub == [] and not (run / "published").exists()


def test_an_upload_needs_a_token(run, hub, capsys, monkeypatch):
    monkeypatch.setattr(upload, "get_token", lambda: None)
    message = fail(capsys, run, "--repo", "no name")
    assert "HF_TOKEN" in message and "USER/NAME" in message  # both faults
    assert hub == [] and not (run / "published").exists()


def test_a_hub_that_cannot_be_reached_is_a_line(run):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        result = run_command(
            *("local/publish.py", run, "--repo", "me/lyrics"),
            HF_ENDPOINT=endpoint,
            HF_TOKEN="hf_secret",
            HF_HUB_OFFLINE="0",
            own_process=True,
        )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert endpoint in line and "--repo" in line and "hf_secret" not in line
    assert (run / "published" / "README.md").is_file()
