import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml
from conftest import (
    RATE,
    ROOT,
    TINY_RUN,
    TRAIN_NAMES,
    heed_ctrl_c,
    run_command,
    run_python,
    write_corpus,
    write_times,
    write_track,
)

import train
from local.checkpoint import load_model
from local.config import parse_conf


def rows_of(experiment) -> list[dict]:
    with (experiment / "logs" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def values_of(experiment, column: str) -> list[float]:
    return [float(row[column]) for row in rows_of(experiment) if row.get(column)]


# A run


def test_a_run_writes_everything_it_promises(experiment, corpus):
    assert {path.name for path in experiment.iterdir()} == {
        *("conf.yml", "checkpoints", "best_k_models.json", "best_model.pth"),
        *("logs", "tensorboard"),
    }
    conf = yaml.safe_load((experiment / "conf.yml").read_text())
    assert conf["data"]["root"] == str(corpus)
    assert conf["convtasnet"]["N"] == 16
    assert set(conf) == {"convtasnet", "training", "optim", "data", "main_args"}
    assert list((experiment / "tensorboard").glob("events.*"))
    assert len(json.loads((experiment / "best_k_models.json").read_text())) == 3
    model = load_model(experiment / "best_model.pth")
    assert (model.samplerate, model.C) == (RATE, 2)


def test_losses_learning_rate_and_speed_are_logged(experiment):
    for column in ("train_loss", "val_loss", "lr", "items_per_second"):
        assert len(values_of(experiment, column)) == 3
    assert len(values_of(experiment, "loss")) >= 3
    assert values_of(experiment, "lr") == pytest.approx([0.0005] * 3)


def test_training_lowers_the_loss(corpus, tmp_path):
    flags = [*TINY_RUN, "--epochs", "6", "--samples_per_track", "32", "--lr", "0.005"]
    train.main(["--exp_dir", str(tmp_path / "run"), "--root", str(corpus), *flags])
    losses = values_of(tmp_path / "run", "val_loss")
    assert losses[-1] < 0.8 * losses[0]


def test_the_first_screen_says_what_is_trained_on_what(corpus, tmp_path):
    exp_dir = tmp_path / "run"
    result = run_command("train.py", "--exp_dir", exp_dir, "--root", corpus, *TINY_RUN)
    assert result.returncode == 0, result.stderr
    for words in (
        "non-causal, gLN, ",
        "3 tracks (0.1 min), in random segments of 0.5 s",
        "1 track (0.0 min), whole",
        "12 items = 3 batches of 4",
        "seed 0",
        "CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
    ):
        assert words in result.stdout
    assert re.search(
        r"trained for 1 epoch, 3 steps; best val_loss 0\.\d+, in .*/best_model.pth", result.stdout
    )
    assert "Epoch 0: 100%" in result.stderr + result.stdout
    assert "Warning" not in result.stderr


def test_the_same_seed_gives_the_same_model_for_any_number_of_workers(corpus, tmp_path):
    for name, flags in {"a": ["--num_workers", "0"], "b": ["--num_workers", "2"]}.items():
        train.main(["--exp_dir", str(tmp_path / name), "--root", str(corpus), *TINY_RUN, *flags])
    train.main(["--exp_dir", str(tmp_path / "c"), "--root", str(corpus), *TINY_RUN, "--seed", "1"])
    a, b, c = (load_model(tmp_path / n / "best_model.pth").state_dict() for n in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if a[key].dim() > 1)


@pytest.mark.parametrize(
    "flags",
    [
        ["--causal", "True", "--norm_type", "cLN", "--n_src", "2"],
        ["--mix_background", "no", "--C", "4", "--norm_type", "BN"],
        ["--half_lr", "no", "--early_stop", "no", "--mask_nonlinear", "softmax"],
        ["--precision", "bf16-mixed", "--norm_type", "id"],
        ["--max_steps", "2", "--max_valid_tracks", "1"],
    ],
    ids=lambda flags: flags[0],
)
def test_other_configurations_train(corpus, tmp_path, flags, capsys):
    train.main(["--exp_dir", str(tmp_path / "run"), "--root", str(corpus), *TINY_RUN, *flags])
    assert np.isfinite(values_of(tmp_path / "run", "val_loss")).all()
    if "--max_steps" in flags:
        assert "2 steps" in capsys.readouterr().out


def test_flac_and_a_list_of_validation_tracks(tmp_path):
    root = write_corpus(tmp_path / "flac", suffix="flac")
    names = tmp_path / "valid.txt"
    names.write_text("\n".join(TRAIN_NAMES[:2]), encoding="utf-8")
    flags = ["--suffix", "flac", "--valid_tracks", str(names)]
    train.main(["--exp_dir", str(tmp_path / "run"), "--root", str(root), *TINY_RUN, *flags])
    conf = yaml.safe_load((tmp_path / "run" / "conf.yml").read_text())
    assert conf["data"]["valid_tracks"] == str(names)


def test_the_command_works_from_any_folder(corpus, tmp_path):
    (tmp_path / "data").symlink_to(corpus)
    result = run_command("train.py", "--root", "data", *TINY_RUN, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    conf = yaml.safe_load((tmp_path / "exp" / "tmp" / "conf.yml").read_text())
    assert conf["data"]["root"] == str(tmp_path / "data")


def test_training_imports_neither_musdb_nor_museval():
    code = "import sys, train; print({'musdb', 'museval', 'stempeg'} & set(sys.modules))"
    result = run_python("-c", code)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("module", ["tasnet", "rows", "inference", "streaming"])
def test_the_model_imports_torch_and_the_hub_alone(module):
    code = (
        "import sys\n"
        "for name in ('asteroid', 'pytorch_lightning', 'musdb', 'museval', 'soundfile'):\n"
        "    sys.modules[name] = None\n"
        f"import local.{module}"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_ctrl_c_keeps_the_best_model_and_says_so(corpus, tmp_path):
    exp_dir = tmp_path / "run"
    flags = ["--exp_dir", exp_dir, "--root", corpus, *TINY_RUN, "--epochs", "10000"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    deadline = time.monotonic() + 120
    while not (exp_dir / "best_model.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"interrupted in epoch \d+; best val_loss", stderr)
    assert "Traceback" not in stderr
    assert load_model(exp_dir / "best_model.pth").samplerate == RATE


# What is wrong is said in one line, and nothing is written


@pytest.fixture
def refused(error_of, tmp_path):
    def run(root, *flags) -> str:
        exp_dir = tmp_path / "refused"
        error = error_of(train.main, "--exp_dir", exp_dir, "--root", root, *TINY_RUN, *flags)
        assert not exp_dir.exists()
        return error

    return run


def test_faults_of_the_configuration(refused, corpus):
    error = refused(corpus, "--P", 4, "--norm_type", "LN", "--batch_size", 0)
    for words in ("--P must be odd", "--norm_type must be one of", "--batch_size must be at least"):
        assert words in error


def test_a_used_experiment_and_other_faults_are_reported_together(experiment, error_of):
    error = error_of(train.main, "--exp_dir", experiment, "--root", "nowhere", "--lr", 0)
    for words in ("3 faults", "--root: no such folder", "--lr must be", "holds a run already"):
        assert words in error


def test_faults_of_the_data(refused, own_corpus, tmp_path):
    assert "--root: no such folder" in refused(tmp_path / "nowhere")
    assert "expected 44100 Hz (--sample_rate), got 8000 Hz" in refused(
        own_corpus, "--sample_rate", 44100
    )
    assert "16 faults" in refused(own_corpus, "--sample_rate", 44100, "--segment", 9)
    assert "shorter than --segment 1.65" in refused(own_corpus, "--segment", 1.65)
    assert "more than the 12 training items" in refused(own_corpus, "--batch_size", 13)
    error = refused(own_corpus, "--accelerator", "cpu", "--devices", 2, "--batch_size", 7)
    assert "2 devices have only 1 track to validate on" in error
    assert "--batch_size 7 on 2 devices" in error
    shutil.rmtree(own_corpus / "train" / "Leaf - Summerghost")
    assert "--valid_tracks FILE" in refused(own_corpus)
    (own_corpus / "train" / TRAIN_NAMES[0] / "bass.wav").unlink()
    assert "bass.wav: missing" in refused(own_corpus)


def test_a_packed_root_says_how_to_unpack_it(refused, tmp_path):
    (tmp_path / "packed" / "train").mkdir(parents=True)
    (tmp_path / "packed" / "train" / "A.stem.mp4").touch()
    assert "python -m local.stems" in refused(tmp_path / "packed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_faults_of_the_devices(refused, corpus):
    assert "torch sees no GPU; use auto or cpu" in refused(corpus, "--accelerator", "gpu")
    assert "--devices" in refused(corpus, "--devices", "none")
    assert "--devices" in refused(corpus, "--devices", "0")


def test_nan_in_the_audio_is_found_when_it_is_read(own_corpus, tmp_path, error_of):
    for path in own_corpus.glob("train/*/vocals.wav"):
        audio, _ = sf.read(path, dtype="float32")
        audio[:] = np.nan
        sf.write(path, audio, RATE, "FLOAT")
    for workers in (0, 1):
        flags = ["--exp_dir", tmp_path / f"{workers}", "--root", own_corpus, *TINY_RUN]
        error = error_of(train.main, *flags, "--num_workers", workers)
        line = error.strip().splitlines()[-1]
        assert re.fullmatch(
            r"train.py: error: /.*/vocals.wav: not a finite number at sample \d+ \(.* s\);.*", line
        )


def test_a_run_that_failed_before_its_first_model_can_be_started_again(
    own_corpus, tmp_path, error_of
):
    vocals = own_corpus / "train" / TRAIN_NAMES[0] / "vocals.wav"
    audio, _ = sf.read(vocals, dtype="float32")
    sf.write(vocals, np.full_like(audio, np.nan), RATE, "FLOAT")
    flags = ["--exp_dir", str(tmp_path / "run"), "--root", str(own_corpus), *TINY_RUN]
    error_of(train.main, *flags)
    sf.write(vocals, audio, RATE)
    train.main(flags)
    assert load_model(tmp_path / "run" / "best_model.pth").samplerate == RATE


def test_a_used_experiment_is_refused(experiment, corpus, error_of):
    before = write_times(experiment)
    error = error_of(train.main, "--exp_dir", experiment, "--root", corpus, *TINY_RUN)
    assert "holds a run already; name another --exp_dir" in error
    assert write_times(experiment) == before


def test_an_experiment_that_cannot_be_written(corpus, tmp_path, error_of):
    (tmp_path / "file").touch()
    for exp_dir in (tmp_path / "file" / "run", tmp_path / "file", "/proc/run"):
        error = error_of(train.main, "--exp_dir", exp_dir, "--root", corpus, *TINY_RUN)
        assert f"--exp_dir: {exp_dir} cannot be written" in error


def test_errors_are_one_line_and_status_2_in_a_process_of_their_own(tmp_path):
    write_track(tmp_path / "train" / "Leaf - Summerghost")
    result = run_command("train.py", "--root", tmp_path, "--exp_dir", tmp_path / "e", *TINY_RUN)
    assert result.returncode == 2
    assert result.stderr == "train.py: error: --root: every track of train/ is a validation track\n"
    assert result.stdout == ""


# Several processes


def test_two_processes_share_the_items_and_agree_on_val_loss(corpus, tmp_path):
    flags = ["--root", corpus, *TINY_RUN, "--accelerator", "cpu", "--epochs", "2"]
    flags += ["--valid_tracks", tmp_path / "valid.txt", "--samples_per_track", "16"]
    (tmp_path / "valid.txt").write_text("\n".join(TRAIN_NAMES[:3]), encoding="utf-8")
    two = run_command(
        "train.py", "--exp_dir", tmp_path / "two", *flags, "--devices", "2", "--batch_size", "2"
    )
    assert two.returncode == 0, two.stderr
    train.main([*map(str, ["--exp_dir", tmp_path / "one", *flags, "--devices", "1"])])
    assert values_of(tmp_path / "two", "val_loss") == pytest.approx(
        values_of(tmp_path / "one", "val_loss"), rel=1e-4
    )
    one, two = (load_model(tmp_path / n / "best_model.pth").state_dict() for n in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_the_shipped_configuration_is_whole():
    conf = parse_conf(["--root", "X"])
    assert train.make_trainer(conf, items=64, valid_tracks=1).gradient_clip_val == 5.0
