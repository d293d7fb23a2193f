import csv
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

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
    run_command,
    run_python,
    start_training,
    write_corpus,
    write_times,
    write_track,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from local.checkpoint import load_model
from local.config import parse_conf
from local.system import MusicSystem
from local.tools.weights import save_atomically
from local.train.loggers import make_loggers


def rows_of(experiment) -> list[dict]:
    with (experiment / "logs" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def values_of(experiment, column: str) -> list[float]:
    return [float(row[column]) for row in rows_of(experiment) if row.get(column)]


# A run


@pytest.mark.smoke
def test_a_run_writes_everything_it_promises(experiment, corpus):
    assert {path.name for path in experiment.iterdir()} == {
        *("conf.yml", "checkpoints", "best_k_models.json", "best_model.pth"),
        *("logs", "tensorboard", "train.log", "curves.png", ".lock"),
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
    rows = rows_of(experiment)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert [int(row["step"]) for row in rows] == [2, 5, 8]
    columns = ["train_loss", "val_loss", "val_sdr_vocals", "val_sdr_accompaniment", "lr"]
    for column in (*columns, "items_per_second", "peak_memory_gib", "grad_norm"):
        assert np.isfinite(values_of(experiment, column)).sum() == 3
    assert values_of(experiment, "skipped_steps") == [0, 0, 0]
    assert all(peak > 0.05 for peak in values_of(experiment, "peak_memory_gib"))
    norms = zip(
        values_of(experiment, "grad_norm"), values_of(experiment, "grad_norm_max"), strict=True
    )
    assert all(0 < mean < most for mean, most in norms)
    scalars = EventAccumulator(str(experiment / "tensorboard")).Reload()
    assert len(scalars.Scalars("loss")) >= 3
    assert [event.value for event in scalars.Scalars("val_loss")] == pytest.approx(
        values_of(experiment, "val_loss")
    )
    assert values_of(experiment, "lr") == pytest.approx([0.0005] * 3)


@pytest.mark.smoke
def test_training_lowers_the_loss(corpus, tmp_path):
    flags = [*TINY_RUN, "--epochs", "6", "--samples_per_track", "32", "--lr", "0.005"]
    train.main(["--exp_dir", str(tmp_path / "run"), "--root", str(corpus), *flags])
    losses = values_of(tmp_path / "run", "val_loss")
    assert losses[-1] < 0.8 * losses[0]


def test_the_first_screen_says_what_is_trained_on_what(corpus, tmp_path):
    exp_dir = tmp_path / "run"
    flags = ["--exp_dir", exp_dir, "--root", corpus, *TINY_RUN]
    result = run_command("train.py", *flags, own_process=True)
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
    assert re.search(
        r"^memory     [\d.]+ of [\d.]+ GiB \(\d+%\) .*, measured in training; about 0.00 GiB for"
        r" the longest validation track \(1.7 s\), not measured$",
        result.stdout,
        re.MULTILINE,
    )
    assert re.search(
        r"^time       \S+ s per epoch, \S+ s for 1 epoch, measured on 2 batches,",
        result.stdout,
        re.MULTILINE,
    )
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d epoch 0: train_loss 0\.\d{6}, val_loss 0\.\d{6},"
        r" lr 0.0005, [\d.]+ items/s, peak memory [\d.]+ GiB, [\d.]+ s$",
        result.stdout,
        re.MULTILINE,
    )
    assert result.stderr == ""


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
    result = run_command(
        "train.py", "--exp_dir", "exp/tmp", "--root", "data", *TINY_RUN, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    conf = yaml.safe_load((tmp_path / "exp" / "tmp" / "conf.yml").read_text())
    assert conf["data"]["root"] == str(tmp_path / "data")


def test_training_imports_neither_musdb_nor_museval():
    code = "import sys, train; print({'musdb', 'museval', 'stempeg'} & set(sys.modules))"
    result = run_python("-c", code, own_process=True)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize(
    "module", ["tasnet", "fast.rows", "fast.training", "inference", "streaming"]
)
def test_the_model_imports_torch_and_the_hub_alone(module):
    code = (
        "import sys\n"
        "for name in ('asteroid', 'pytorch_lightning', 'musdb', 'museval', 'soundfile'):\n"
        "    sys.modules[name] = None\n"
        f"import local.{module}"
    )
    result = run_python("-c", code, own_process=True)
    assert result.returncode == 0, result.stderr


def test_a_saved_configuration_alone_trains_the_same_model(experiment, tmp_path):
    new = tmp_path / "new"
    train.main(["--conf", str(experiment / "conf.yml"), "--exp_dir", str(new)])
    states = [load_model(folder).state_dict() for folder in (experiment, new)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    saved = [yaml.safe_load((folder / "conf.yml").read_text()) for folder in (experiment, new)]
    assert [conf["main_args"].pop("exp_dir") for conf in saved] == [str(experiment), str(new)]
    assert saved[0] == saved[1]


def test_a_saved_configuration_resumes_its_run_where_it_lies_now(experiment, tmp_path, capsys):
    moved = shutil.copytree(experiment, tmp_path / "moved")
    train.main(["--conf", str(moved / "conf.yml")])
    assert f"{moved} is finished, after 3 epochs" in capsys.readouterr().out


def test_without_a_limit_of_epochs_a_run_goes_on(experiment, corpus, tmp_path, capsys):
    run = shutil.copytree(experiment, tmp_path / "run")
    flags = ["--exp_dir", str(run), "--root", str(corpus), *TINY_RUN, "--epochs", "-1"]
    train.main([*flags, "--check"])
    shown = capsys.readouterr().out
    assert "resumes    in epoch 3" in shown
    assert re.search(r"^end +by EarlyStopping", shown, re.MULTILINE)
    new = ["--exp_dir", str(tmp_path / "new"), "--max_steps", "8"]
    for words in ("stopped after 8 steps", "it had --max_steps 8"):
        train.main([*flags, *new])
        assert words in capsys.readouterr().out


def test_ctrl_c_keeps_the_best_model_and_says_so(corpus, tmp_path):
    exp_dir = tmp_path / "run"
    flags = ["--root", corpus, *TINY_RUN, "--epochs", "10000"]
    process = start_training(exp_dir, *flags, stdout=subprocess.PIPE, own_process=True)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert re.search(r"interrupted in epoch \d+; best val_loss", stderr)
    assert "Traceback" not in stderr
    assert load_model(exp_dir / "best_model.pth").samplerate == RATE


def test_ctrl_c_within_torch_save_is_no_error_of_its_own(corpus, tmp_path, failing_step, capsys):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 683 vs 0")
    error.__context__ = KeyboardInterrupt()
    failing_step(error, in_training=False)
    with pytest.raises(SystemExit) as exit_:
        train.main(["--exp_dir", str(tmp_path / "run"), "--root", str(corpus), *TINY_RUN])
    assert exit_.value.code == 130
    assert "interrupted in epoch 0; there is no best_model.pth yet" in capsys.readouterr().err


def test_the_end_of_a_run_waits_for_no_wake_up_that_an_interrupt_took(tmp_path, monkeypatch):
    """Ctrl-C within queue.put can leave the thread that writes for TensorBoard asleep."""
    logger = make_loggers(parse_conf(["--exp_dir", str(tmp_path)]))[0]
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.experiment.flush()
    queue = logger.experiment.file_writer.event_writer._async_writer._byte_queue
    monkeypatch.setattr(queue.not_empty, "notify", lambda: None)
    logger.log_metrics({"loss": 0.5}, step=1)
    end = threading.Thread(target=logger.finalize, args=["failed"], daemon=True)
    end.start()
    end.join(timeout=60)
    assert not end.is_alive()


# What is wrong is said in one line, and nothing is written


@pytest.fixture
def refused(error_of, tmp_path):
    def run(root, *flags) -> str:
        exp_dir = tmp_path / "refused"
        error = error_of(train.main, "--exp_dir", exp_dir, "--root", root, *TINY_RUN, *flags)
        assert not exp_dir.exists()
        return error

    return run


@pytest.mark.smoke
def test_faults_of_the_configuration(refused, corpus):
    error = refused(corpus, "--P", 4, "--norm_type", "LN", "--batch_size", 0)
    for words in ("--P must be odd", "--norm_type must be one of", "--batch_size must be at least"):
        assert words in error


def test_a_used_experiment_and_other_faults_are_reported_together(experiment, error_of):
    flags = ["--exp_dir", experiment, "--root", "nowhere", "--lr", 0, "--resume", "never"]
    error = error_of(train.main, *flags)
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
    assert "bass.wav or .flac: missing" in refused(own_corpus)


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
        audio[: -RATE // 5] = np.nan  # the end is read before the run starts
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
    flags = ["--exp_dir", experiment, "--root", corpus, *TINY_RUN, "--resume", "never"]
    assert "holds a run already; name another --exp_dir" in error_of(train.main, *flags)
    assert write_times(experiment) == before


def test_an_experiment_that_cannot_be_written(corpus, tmp_path, error_of):
    (tmp_path / "file").touch()
    for exp_dir in (tmp_path / "file" / "run", tmp_path / "file", "/proc/run"):
        error = error_of(train.main, "--exp_dir", exp_dir, "--root", corpus, *TINY_RUN)
        assert f"--exp_dir: {exp_dir} cannot be written" in error


def test_errors_are_one_line_and_status_2_in_a_process_of_their_own(tmp_path):
    write_track(tmp_path / "train" / "Leaf - Summerghost")
    flags = ["--root", tmp_path, "--exp_dir", tmp_path / "e", *TINY_RUN]
    result = run_command("train.py", *flags, own_process=True)
    assert result.returncode == 2
    words = "--root: nothing is left to train on: every track of train/ is a validation track"
    assert result.stderr == f"train.py: error: {words}\n"
    assert result.stdout == ""


# Memory


@pytest.fixture
def failing_step(monkeypatch):
    """Makes the training or the validation step raise what it is given."""

    def set_up(error: BaseException, in_training: bool):
        step = MusicSystem.common_step

        def common_step(self, batch, batch_nb, train=True):
            if train is in_training:
                raise error
            return step(self, batch, batch_nb, train)

        monkeypatch.setattr(MusicSystem, "common_step", common_step)

    return set_up


def allocator_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.int8)
    return error.value


@pytest.mark.parametrize(
    "make_error",
    [lambda: torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError, allocator_error],
    ids=["cuda", "python", "cpu"],
)
def test_out_of_memory_in_training_names_the_flags(
    corpus, tmp_path, error_of, failing_step, make_error
):
    failing_step(make_error(), in_training=True)
    flags = ["--exp_dir", tmp_path / "run", "--root", corpus, *TINY_RUN, "--batch_size", "6"]
    line = error_of(train.main, *flags).strip().splitlines()[-1]
    assert line == (
        "train.py: error: out of memory in training; these need less: --memory most, --precision"
        " bf16-mixed, --segment below 0.5, --batch_size 3 --aggregate 2 (now 6 and 1); a run that"
        " has begun resumes with them and --resume_with_changes"
    )


def test_out_of_memory_in_validation_names_its_flag(corpus, tmp_path, error_of, failing_step):
    failing_step(torch.OutOfMemoryError("CUDA out of memory. Tried"), in_training=False)
    error = error_of(train.main, "--exp_dir", tmp_path / "run", "--root", corpus, *TINY_RUN)
    assert "out of memory in validation; omit the longest tracks, with --valid_track" in error


def test_other_errors_are_not_taken_for_a_lack_of_memory(corpus, tmp_path, failing_step):
    failing_step(RuntimeError("something else"), in_training=True)
    with pytest.raises(RuntimeError, match="something else"):
        train.main(["--exp_dir", str(tmp_path / "run"), "--root", str(corpus), *TINY_RUN])


def test_a_full_disk_ends_the_run_and_keeps_the_best_model(corpus, tmp_path, monkeypatch, capsys):
    def save_once(checkpoint, path):
        if any(Path(path).parent.glob("epoch=*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_atomically(checkpoint, path)

    monkeypatch.setattr("local.train.checkpoints.save_atomically", save_once)
    exp_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        train.main(["--exp_dir", str(exp_dir), "--root", str(corpus), *TINY_RUN, "--epochs", "3"])
    assert exit_.value.code == 1
    shown = capsys.readouterr().err
    assert f"train.py: error: {exp_dir} cannot be written (is the disk full?): " in shown
    (checkpoint,) = (exp_dir / "checkpoints").glob("epoch=*")
    assert f"best val_loss {next(iter(kept_scores(exp_dir).values())):.6f}, in " in shown
    kept, best = load_model(checkpoint), load_model(exp_dir / "best_model.pth")
    for one, other in zip(kept.parameters(), best.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "killer", ["signal.SIGKILL", "signal.SIGSEGV"], ids=["out of memory", "crash"]
)
def test_a_worker_that_dies_names_the_file(killer, corpus, tmp_path):
    """As the kernel kills where memory runs out, or a decoder that meets a damaged file crashes."""
    name = "Zeno - Signs"
    arguments = ["--exp_dir", tmp_path / "run", "--root", corpus, *TINY_RUN, "--num_workers", 2]
    code = f"""
import os, signal
import train
from local.musdb18_dataset import get_worker_info
from local.musdb18_tracks import Track

def read(track, source, *place):
    if track.name == {name!r} and source == "bass" and get_worker_info():
        os.kill(os.getpid(), {killer})
    return read_samples(track, source, *place)

read_samples, Track.read_samples = Track.read_samples, read
train.main({list(map(str, arguments))!r})
"""
    result = run_python("-c", code)
    path = corpus / "train" / name / "bass.wav"
    assert f"train.py: error: a worker of a loader ended while it read {path};" in (result.stderr)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def kept_scores(exp_dir: Path) -> dict[str, float]:
    return json.loads((exp_dir / "best_k_models.json").read_text())


@pytest.mark.parametrize("kilobytes", [2, 4, 16])
def test_a_full_disk_is_one_line_wherever_it_is_met(kilobytes, corpus, tmp_path):
    """By the writer of TensorBoard, by that of metrics.csv, and by a checkpoint."""
    command = [sys.executable, ROOT / "train.py", "--exp_dir", tmp_path / "run", "--root", corpus]
    limited = f"ulimit -f {kilobytes}; exec {shlex.join(map(str, [*command, *TINY_RUN]))}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    words = "cannot be written (is the disk full?): [Errno 27] File too large; ended in epoch 0;"
    assert words in result.stderr
    written = {path.suffix for path in (tmp_path / "run").rglob("*")}
    assert not written & {".ckpt", ".pth", ".tmp"}


def test_the_shipped_configuration_is_whole():
    conf = parse_conf(["--root", "X"])
    assert train.make_trainer(conf, items=64, valid_tracks=1).gradient_clip_val == 5.0
