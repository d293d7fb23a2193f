import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_RUN, load_golden, load_golden_model, run_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import run_until

import train
from local.checkpoint import find_weights, load_model, save_best_model
from local.config import OPTIONS, parse_conf
from local.fast.training import TrainingForward
from local.keys import KEYS
from local.models import make_model
from local.system import MusicSystem
from local.tasnet import ConvTasNetStereo
from local.tools.files import sha256
from local.tools.freeze import freeze
from local.tools.weights import load_weights_only
from local.train.checkpoints import list_last
from local.train.start import find_base

pytestmark = pytest.mark.usefixtures("one_thread")

OF_MODEL = {f"--{key}" for key in (*KEYS["convtasnet"], "sample_rate")}
PAIRS = list(zip(TINY_RUN[::2], TINY_RUN[1::2], strict=True))
# Those of TINY_RUN that say nothing of the model, and 3 batches an epoch.
RUN = [word for pair in PAIRS if pair[0] not in OF_MODEL for word in pair]


def flags_of(exp_dir, corpus, *more) -> list[str]:
    words = ["--exp_dir", exp_dir, "--root", corpus, *RUN, "--accelerator", "cpu", *more]
    return list(map(str, words))


def rows_of(exp_dir: Path) -> list[dict]:
    with (exp_dir / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def end_of(exp_dir: Path) -> tuple:
    """What a run leads to, but for the time it took and what it says of its start."""
    times = ("items_per_second", "peak_memory_gib", "val_loss_start")
    state = load_weights_only(list_last(exp_dir / "checkpoints")[0])
    return (
        *(
            {name: tensor.tolist() for name, tensor in state.get(weights, {}).items()}
            for weights in ("state_dict", "current_model_state")  # they differ with --ema
        ),
        state["lr_schedulers"],
        [{k: v for k, v in row.items() if k not in times} for row in rows_of(exp_dir)],
        json.loads((exp_dir / "best_k_models.json").read_text()),
    )


@pytest.fixture
def base(experiment, tmp_path) -> Path:
    """A best_model.pth that the test may spoil."""
    return Path(shutil.copy(experiment / "best_model.pth", tmp_path / "base.pth"))


def change(path: Path, edit) -> None:
    content = load_weights_only(path)
    edit(content)
    torch.save(content, path)


# What --init takes


def save_as(kind: str, model: ConvTasNetStereo, folder: Path, monkeypatch) -> str:
    """Saves a model; returns what --init calls it."""
    if kind in ("best_model.pth", "run"):
        conf = {"convtasnet": model.arguments(), "data": {}}
        conf["data"]["sample_rate"] = conf["convtasnet"].pop("samplerate")
        save_best_model(folder / "best_model.pth", model.state_dict(), conf)
        return str(folder if kind == "run" else folder / kind)
    if kind == "epoch.ckpt":
        conf = parse_conf(["--root", "X"])
        conf["convtasnet"] = model.arguments()
        conf["data"]["sample_rate"] = conf["convtasnet"].pop("samplerate")
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "training_config": conf}, folder / kind)
        return str(folder / kind)
    if kind == "folder":
        model.save_pretrained(folder)
        return str(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = folder / "models--me--mine"
    model.save_pretrained(repository / "snapshots" / "1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    return "me/mine"


@pytest.mark.parametrize("kind", ["best_model.pth", "run", "epoch.ckpt", "folder", "hub"])
def test_every_kind_of_checkpoint_gives_its_model(kind, tmp_path, monkeypatch):
    model, _ = load_golden_model("causal_cln")
    name = save_as(kind, model, tmp_path, monkeypatch)
    conf = parse_conf(["--root", "X", "--init", name, "--causal", "yes", "--lr", "0.1"])
    options = {option: conf["main_args"].pop(option) for option in OPTIONS}
    found = find_base(conf, options)
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)
    assert {**conf["convtasnet"], "samplerate": conf["data"]["sample_rate"]} == model.arguments()
    assert conf["training"]["init_sha256"] == sha256(find_weights(name))
    assert conf["optim"]["lr"] == 0.1


@pytest.mark.smoke
def test_the_published_state_gives_the_published_output_at_step_0_and_trains(corpus, tmp_path):
    model, golden = load_golden_model("noncausal_gln")
    model.save_pretrained(tmp_path / "published")
    one_step = ["--samples_per_track", 1, "--batch_size", 3]
    init = ["--init", tmp_path / "published"]
    train.main(flags_of(tmp_path / "run", corpus, *one_step, *init))
    after, before = map(load_model, list_last(tmp_path / "run" / "checkpoints"))
    torch.testing.assert_close(before(golden["input"]), golden["output"], rtol=0, atol=1e-5)
    assert not torch.allclose(after(golden["input"]), golden["output"], rtol=0, atol=1e-5)


def test_all_but_the_weights_starts_afresh(corpus, tmp_path):
    """A run from the weights with which it would start anyway is the same run."""
    new, same = tmp_path / "new", tmp_path / "same"
    train.main(["--exp_dir", str(new), "--root", str(corpus), *TINY_RUN, "--epochs", "2"])
    conf = parse_conf(["--root", "X", *TINY_RUN])
    torch.manual_seed(0)
    save_best_model(tmp_path / "random.pth", make_model(conf).state_dict(), conf)
    train.main(flags_of(same, corpus, "--epochs", 2, "--init", tmp_path / "random.pth"))
    assert end_of(same) == end_of(new)


# val_loss_start


def test_val_loss_before_the_first_step_is_logged_once_and_steers_nothing(
    experiment, corpus, tmp_path, capsys
):
    last = rows_of(experiment)[-1]
    (checkpoint,) = (experiment / "checkpoints").glob("epoch=2-*.ckpt")
    exp_dir = tmp_path / "run"
    train.main(flags_of(exp_dir, corpus, "--init", checkpoint, "--lr", 1, "--epochs", 2))
    rows = rows_of(exp_dir)
    assert [row["val_loss_start"] for row in rows] == [last["val_loss"], ""]
    assert f"val_loss   {float(last['val_loss']):.6f} with the weights" in capsys.readouterr().out
    events = EventAccumulator(str(exp_dir / "tensorboard")).Reload()
    counts = [len(events.Scalars(tag)) for tag in ("val_loss_start", "val_loss")]
    assert counts == [1, 2]
    best = min(float(row["val_loss"]) for row in rows)
    assert best > float(last["val_loss"])  # by a rate that spoils the model
    state = load_weights_only(list_last(exp_dir / "checkpoints")[0])
    (stop,) = (state["callbacks"][key] for key in state["callbacks"] if "EarlyStopping" in key)
    assert [float(stop["best_score"]), state["lr_schedulers"][0]["best"]] == [best, best]


def test_a_val_loss_that_is_not_finite_ends_the_run(base, corpus, tmp_path, error_of):
    huge = {"decoder.basis_signals.weight", "encoder.conv1d_U.weight"}
    change(base, lambda c: [c["state_dict"][name].mul_(1e30) for name in huge])
    error = error_of(train.main, *flags_of(tmp_path / "run", corpus, "--init", base))
    assert "--init: val_loss with its weights is not finite" in error


# --init_partial


def test_two_targets_become_four_stems(experiment, corpus, tmp_path):
    exp_dir, new = tmp_path / "run", "separator.network.3.weight"
    four = ["--init_partial", "yes", "--C", 4, "--mix_background", "no"]
    steps = ["--samples_per_track", 1, "--batch_size", 3]
    flags = flags_of(exp_dir, corpus, "--init", experiment, *four, *steps)
    result = run_command("train.py", *flags)
    assert result.returncode == 0, result.stderr
    screen = " ".join(result.stdout.split())
    assert f"new 1 tensor {new} (64, 8, 1) left out 1 tensor {new} (32, 8, 1)" in screen
    started = load_model(list_last(exp_dir / "checkpoints")[1]).state_dict()
    for name, tensor in load_model(experiment).state_dict().items():
        assert name == new or torch.equal(started[name], tensor), name
    assert load_weights_only(exp_dir / "best_model.pth")["infos"]["base_model"]["partial"] is True
    # The run's own conf.yml says it all.
    train.main(["--conf", str(exp_dir), "--exp_dir", str(tmp_path / "again")])
    assert end_of(tmp_path / "again") == end_of(exp_dir)


# What is recorded


def test_the_start_is_recorded_and_the_saved_configuration_repeats_it(
    base, corpus, tmp_path, error_of, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    exp_dir, of_base = tmp_path / "run", sha256(base)
    train.main(flags_of(exp_dir, corpus, "--init", "base.pth"))
    assert of_base in capsys.readouterr().out
    conf = yaml.safe_load((exp_dir / "conf.yml").read_text())
    assert conf["training"]["init"] == str(base)
    recorded = load_weights_only(exp_dir / "best_model.pth")["infos"]["base_model"]
    assert recorded == {"source": str(base), "sha256": of_base, "partial": False}
    saved = ["--conf", str(exp_dir / "conf.yml"), "--exp_dir"]
    train.main([*saved, str(tmp_path / "again")])
    assert end_of(tmp_path / "again") == end_of(exp_dir)
    change(base, lambda content: content["infos"].clear())
    error = error_of(train.main, *saved, tmp_path / "changed")
    assert f"--init: {base}" in error and of_base in error and sha256(base) in error
    train.main([*saved, str(tmp_path / "typed"), "--init", str(base)])


# Resuming


def test_a_killed_run_resumes_without_its_base(base, corpus, tmp_path, monkeypatch, error_of):
    whole, exp_dir = tmp_path / "whole", tmp_path / "run"
    more = ["--init", base, "--epochs", 2, "--checkpoint_every", "1 steps", "--ema", 0.9]
    more += ["--freeze", "encoder"]
    encoder = load_model(base).encoder.state_dict()
    train.main(flags_of(whole, corpus, *more))
    run_until(2, flags_of(exp_dir, corpus, *more), monkeypatch)
    error = error_of(train.main, *flags_of(exp_dir, corpus, "--epochs", 2))
    assert f"add --init {base}" in error
    change(base, lambda content: content["infos"].clear())
    error = error_of(train.main, *flags_of(exp_dir, corpus, *more))
    assert f"--init: {exp_dir}" in error and sha256(base) in error
    base.unlink()
    run_until(3, flags_of(exp_dir, corpus, *more), monkeypatch)
    train.main(flags_of(exp_dir, corpus, *more))
    assert end_of(exp_dir) == end_of(whole)
    for row, expected in zip(rows_of(exp_dir), rows_of(whole), strict=True):
        assert row["val_loss_start"] == expected["val_loss_start"]
    for name, tensor in load_model(exp_dir).encoder.state_dict().items():
        assert torch.equal(tensor, encoder[name])
    conf = [yaml.safe_load((folder / "conf.yml").read_text()) for folder in (exp_dir, whole)]
    assert conf[0]["training"] == conf[1]["training"]


def test_a_run_without_init_does_not_resume_with_it(experiment, base, corpus, error_of):
    error = error_of(train.main, *flags_of(experiment, corpus, "--epochs", 9, "--init", base))
    assert "--init: " in error and "omit --init" in error


def test_a_signal_before_the_first_step_ends_the_run(base, corpus, tmp_path, monkeypatch):
    start, flags = MusicSystem.on_validation_epoch_start, flags_of(tmp_path, corpus, "--init", base)

    def hear(system):
        os.kill(os.getpid(), signal.SIGUSR1)
        start(system)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(MusicSystem, "on_validation_epoch_start", hear)
        train.main(flags)
    assert exit_.value.code == 128 + signal.SIGUSR1
    train.main(flags)
    assert rows_of(tmp_path)[0]["val_loss_start"]


# Bad input


@pytest.fixture
def refused(corpus, tmp_path, error_of):
    def run(*flags) -> str:
        exp_dir = tmp_path / "refused"
        error = error_of(train.main, *flags_of(exp_dir, corpus, *flags))
        assert not exp_dir.exists()
        return error

    return run


def test_typed_flags_that_contradict_the_model_are_refused_together(experiment, refused):
    same, other = ["--B", 8], ["--N", 32, "--causal", "yes", "--sample_rate", 44100]
    error = refused("--init", experiment, *same, *other)
    for words in ("3 faults", "--N 32: ", " 16;", "--causal True", "--sample_rate 44100", "8000"):
        assert words in error
    assert "--init_partial" in error and "--B" not in error


def spoil(path: Path) -> None:
    change(path, lambda c: c["state_dict"]["decoder.basis_signals.weight"][0].fill_(torch.nan))


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda path: path.unlink(), "no such file"),
        (spoil, "NaN"),
        (lambda path: change(path, lambda content: content.update(model_name="DPTNet")), "DPTNet"),
        (lambda path: path.write_text("no weights"), "damaged"),
    ],
    ids=["missing", "NaN", "another model", "no weights"],
)
def test_what_cannot_be_started_from_is_named_with_all_other_faults(edit, words, base, refused):
    edit(base)
    error = refused("--init", base, "--lr", 0, "--mix_background", "no", "--freeze", "encoder")
    assert "2 faults" in error  # none of a model that is not known
    assert f"--init: {'no such file or folder: ' * (words == 'no such file')}{base}" in error
    assert words in error and "--lr must be" in error


@pytest.mark.parametrize(
    "flags",
    [["--init_partial", "yes"], ["--init_sha256", "0" * 64], ["--init_partial", "1", "--B", "3"]],
)
def test_flags_that_need_init(flags, refused):
    error = refused(*flags)
    assert f"{flags[0]} needs --init" in error


# --freeze


def test_what_is_frozen_stays_and_has_no_state(base, corpus, tmp_path, monkeypatch):
    exp_dir, more = tmp_path / "run", ["--epochs", 2, "--checkpoint_every", "1 steps"]
    flags = flags_of(
        exp_dir, corpus, *more, "--init", base, "--freeze", "encoder,separator.network.0"
    )
    run_until(4, flags, monkeypatch)
    train.main(flags)
    before, after = load_model(base).state_dict(), load_model(exp_dir).state_dict()
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    parts = ("encoder.", "separator.network.0.")
    assert frozen == {name for name in before if name.startswith(parts)}
    adam = load_weights_only(list_last(exp_dir / "checkpoints")[0])["optimizer_states"][0]
    names = [name for name, _ in load_model(base).named_parameters()]
    assert {names[number] for number in adam["state"]} == set(names) - frozen


def test_frozen_norms_keep_their_statistics(corpus, tmp_path, monkeypatch, capsys):
    _, _, state = load_golden("noncausal_bn_softmax")
    model, _ = load_golden_model("noncausal_bn_softmax")
    model.save_pretrained(tmp_path / "base")
    exp_dir, block = tmp_path / "run", "separator.network.2.0.1"
    more = ["--mix_background", "no", "--epochs", 2, "--checkpoint_every", "1 steps"]
    flags = flags_of(exp_dir, corpus, *more, "--init", tmp_path / "base", "--freeze", block)
    run_until(4, flags, monkeypatch)
    train.main(flags)
    after = load_model(exp_dir).state_dict()
    statistics = {name for name in state if "running" in name or "batches" in name}
    kept = {name for name in statistics if torch.equal(after[name], state[name])}
    assert kept == {name for name in statistics if name.startswith(f"{block}.")} != set()
    assert "the model itself, from which the fast path differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "parts, words",
    [
        ("encodr", "no part 'encodr'; did you mean encoder?"),
        ("encoder,x.y", "no part 'x.y'; it has encoder, separator, decoder"),
        ("separator.network.0.gam", "no part 'separator.network.0.gam'; did you mean"),
        ("encoder,,decoder", "no part ''"),
        ("encoder,separator,decoder.", "leaves nothing to train"),
    ],
)
def test_parts_that_cannot_be_frozen(parts, words, refused):
    sizes = [word for pair in PAIRS if pair[0] in OF_MODEL for word in pair]
    error = refused(*sizes, "--freeze", parts)
    assert "error: --freeze" in error and words in error


def test_another_freeze_is_a_change_that_a_run_can_resume_with(corpus, tmp_path, error_of):
    flags = ["--exp_dir", str(tmp_path), "--root", str(corpus), *TINY_RUN]
    train.main([*flags, "--freeze", "encoder"])
    longer = [*flags, "--epochs", "2", "--freeze", "decoder"]
    assert "--freeze: encoder before, decoder now" in error_of(train.main, *longer)
    before = load_model(list_last(tmp_path / "checkpoints")[0]).state_dict()
    train.main([*longer, "--resume_with_changes"])
    after = load_model(list_last(tmp_path / "checkpoints")[0]).state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {"decoder.basis_signals.weight"}


@pytest.mark.parametrize("parts", ["encoder,separator.network.0", "separator.network.2", "decoder"])
def test_the_fast_path_trains_the_rest_as_the_model_does(parts):
    gradients = []
    for make_forward in (lambda model: model, TrainingForward):
        model, golden = load_golden_model("noncausal_gln")
        freeze(model.train(), parts)
        torch.nn.functional.l1_loss(
            make_forward(model)(golden["input"]), golden["target"]
        ).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    plain, fast = gradients
    largest = max(grad.abs().max() for grad in plain.values() if grad is not None)
    for name, expected in plain.items():
        is_frozen = name.startswith(tuple(f"{part}." for part in parts.split(",")))
        assert (expected is None) == (fast[name] is None) == is_frozen
        if not is_frozen:
            torch.testing.assert_close(fast[name], expected, rtol=0, atol=1e-4 * largest.item())
