import csv
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile as sf
import torch
from conftest import (
    RATE,
    ROOT,
    TEST_NAMES,
    TINY_RUN,
    forward,
    imitate_slurm,
    run_command,
    run_python,
    start_python,
    write_corpus,
    write_times,
    write_track,
)
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from test_memory import V2_MOUNT, v2, write_files

import eval as evaluation
import train
from local import __version__, stems
from local.checkpoint import load_model
from local.compare import compare
from local.estimates import save_estimates
from local.eval.jobs import scoring_bytes
from local.eval.out import make_out
from local.eval.results import RESULTS
from local.eval.score_files import make_track_store, read_scores, save_track
from local.eval.tracks import PackedTrack, list_files
from local.inference import separate
from local.musdb18_tracks import SOURCES
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import UserError
from local.tools.files import locked, read_yaml
from local.tracks.track import Place


def evaluate(*args) -> None:
    evaluation.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def results(experiment, tmp_path_factory):
    """An experiment evaluated with every default, and what was printed."""
    exp_dir = shutil.copytree(experiment, tmp_path_factory.mktemp("eval") / "run")
    result = run_command("eval.py", "--exp_dir", exp_dir, "--out_dir", "out")
    assert result.returncode == 0, result.stderr
    return exp_dir / "out", result


@pytest.mark.smoke
def test_everything_promised_is_written(results):
    out, result = results
    for name in TEST_NAMES:
        assert (out / "test" / f"{name}.json").is_file()
        assert sorted(p.name for p in (out / name).iterdir()) == ["accompaniment.wav", "vocals.wav"]
    text = (out / "results.txt").read_text()
    assert text in result.stdout
    assert str(out) in result.stdout
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["track"], row["target"]) for row in rows] == [
        (name, target) for name in sorted(TEST_NAMES) for target in ("vocals", "accompaniment")
    ]
    for name in TEST_NAMES:
        assert name in result.stderr  # its progress bar
        assert re.search(rf"{re.escape(name)} +-?\d", text)


def test_scores_are_those_of_museval_on_the_saved_audio_of_the_model(results, corpus, tmp_path):
    import musdb
    import museval

    out, _ = results
    model = load_model(out.parent / "best_model.pth")
    for track in musdb.DB(root=str(corpus), is_wav=True, subsets="test"):
        mixture = torch.from_numpy(track.audio.T.astype(np.float32))
        estimates = separate(model, mixture).numpy()
        for estimate, target in zip(estimates, ("vocals", "accompaniment"), strict=True):
            audio, rate = sf.read(out / track.name / f"{target}.wav", dtype="int16")
            assert rate == RATE
            expected = np.clip(np.rint(estimate.T * 32768.0), -32768, 32767)
            np.testing.assert_array_equal(audio, expected)
        user_estimates = {"vocals": estimates[0].T, "accompaniment": estimates[1].T}
        museval.eval_mus_track(track, user_estimates, output_dir=str(tmp_path))
        expected = json.loads((tmp_path / "test" / f"{track.name}.json").read_text())
        assert json.loads((out / "test" / f"{track.name}.json").read_text()) == expected


def test_the_folder_is_one_that_museval_reads(results):
    import museval

    out, _ = results
    store = museval.EvalStore()
    store.add_eval_dir(str(out))
    assert set(store.df["track"]) == set(TEST_NAMES)
    saved = museval.EvalStore()
    saved.load(str(out / "results.pandas"))
    assert len(saved.df) == len(store.df)


def test_only_the_first_tracks_are_saved(experiment, tmp_path):
    evaluate("--exp_dir", experiment, "--out_dir", tmp_path, "--n_save_ex", 1, "--float32")
    first, second = sorted(TEST_NAMES)
    assert sf.info(tmp_path / first / "vocals.wav").subtype == "FLOAT"
    assert not (tmp_path / second).exists()
    assert len(list((tmp_path / "test").glob("*.json"))) == 2


def test_segment_and_overlap_reach_the_separation(results, experiment, corpus, tmp_path):
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path, "--segment", 0.5, "--overlap", 0.05]
    evaluate(*flags, "--float32")
    model = load_model(experiment / "best_model.pth")
    audio, _ = sf.read(corpus / "test" / TEST_NAMES[0] / "mixture.wav", dtype="float32")
    expected = separate(model, torch.from_numpy(audio.T.copy()), segment=0.5, overlap=0.05)[0].T
    saved, _ = sf.read(tmp_path / TEST_NAMES[0] / "vocals.wav", dtype="float32")
    np.testing.assert_allclose(saved, expected, atol=1e-6)


def test_a_small_model_leaves_cores_to_scoring(experiment, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    evaluate("--exp_dir", experiment, "--out_dir", tmp_path / "out")
    assert chosen == [1]


def test_method_full_is_the_whole_forward(experiment, corpus, tmp_path, capsys):
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path, "--method", "full", "--float32"]
    evaluate(*flags)
    assert "on the CPU, method full\n" in capsys.readouterr().out
    model = load_model(experiment / "best_model.pth")
    audio, _ = sf.read(corpus / "test" / TEST_NAMES[0] / "mixture.wav", dtype="float32")
    expected = forward(model, torch.from_numpy(audio.T.copy()))[0].T
    saved, _ = sf.read(tmp_path / TEST_NAMES[0] / "vocals.wav", dtype="float32")
    np.testing.assert_allclose(saved, expected, atol=1e-6)


def test_another_root_suffix_and_kind_of_checkpoint(experiment, tmp_path):
    root = write_corpus(tmp_path / "flac", suffix="flac")
    checkpoint = next((experiment / "checkpoints").glob("*.ckpt"))
    load_model(checkpoint).save_pretrained(tmp_path / "folder")
    flags = ["--root", root, "--suffix", "flac", "--n_save_ex", 0]
    for name, source in {"ckpt": checkpoint, "folder": tmp_path / "folder"}.items():
        evaluate("--exp_dir", tmp_path, "--out_dir", name, "--checkpoint", source, *flags)
    ckpt, folder = ((tmp_path / name / "results.txt").read_text() for name in ("ckpt", "folder"))
    assert ckpt == folder


def test_four_stems_and_their_accompaniment_are_saved_and_scored(own_corpus, tmp_path, capsys):
    """Where a stem is silent, the others still are scored."""
    exp_dir, out = tmp_path / "run", tmp_path / "run" / "out"
    flags = [*TINY_RUN, "--mix_background", "no", "--C", "4"]
    train.main(["--exp_dir", str(exp_dir), "--root", str(own_corpus), *flags])
    loud, quiet = sorted(TEST_NAMES)
    bass, rate = sf.read(own_corpus / "test" / quiet / "bass.wav", dtype="int16")
    sf.write(own_corpus / "test" / quiet / "bass.wav", np.zeros_like(bass), rate)
    evaluate("--exp_dir", exp_dir, "--out_dir", "out", "--float32", "--n_save_ex", 1)
    model = load_model(exp_dir / "best_model.pth")
    audio, _ = sf.read(own_corpus / "test" / loud / "mixture.wav", dtype="float32")
    sources = separate(model, torch.from_numpy(audio.T.copy()))
    expected = dict(zip(SOURCES, sources, strict=True), accompaniment=sources[1:].sum(0))
    assert {path.stem for path in (out / loud).iterdir()} == set(expected)
    for target, estimate in expected.items():
        saved, _ = sf.read(out / loud / f"{target}.wav", dtype="float32")
        np.testing.assert_allclose(saved, estimate.T, atol=1e-6)
    scored = {name: set(read_scores(out / "test" / f"{name}.json")) for name in TEST_NAMES}
    assert scored == {loud: set(expected), quiet: set(expected) - {"bass"}}
    assert f"  {quiet}: bass (its reference is silent)\n" in (out / "results.txt").read_text()
    metrics = json.loads((out / "final_metrics.json").read_text())
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for target in expected:
        of_target = [float(row["SI_SDR"]) for row in rows if row["target"] == target]
        assert metrics[f"{target}_SI_SDR_mean"] == pytest.approx(np.mean(of_target), abs=1e-4)
    # What an earlier version has scored, of vocals and accompaniment alone, is scored again.
    for path in (out / "test").glob("*.yml"):
        record = read_yaml(path)
        del record["made_with"]["targets"], record["sha256"]
        save_track(out, make_track_store(path.stem, read_scores(path.with_suffix(".json"))), record)
    capsys.readouterr()
    evaluate("--exp_dir", exp_dir, "--out_dir", "out", "--float32", "--n_save_ex", 1)
    assert "2 tracks to score again, made with targets " in capsys.readouterr().out


def test_real_music_from_stem_mp4_through_training_to_scores(excerpts, tmp_path):
    """The mp4 form end to end: decoded for training, read as it is for evaluation."""
    stems.main([str(excerpts), str(tmp_path / "wav")])
    (name,) = (path.name for path in (tmp_path / "wav" / "train").iterdir())
    shutil.copytree(tmp_path / "wav" / "train" / name, tmp_path / "wav" / "train" / "Leaf")
    (tmp_path / "valid.txt").write_text("Leaf")
    flags = [*TINY_RUN, "--sample_rate", 44100, "--samples_per_track", 4]
    flags += ["--valid_tracks", tmp_path / "valid.txt", "--root", tmp_path / "wav"]
    train.main([str(word) for word in ("--exp_dir", tmp_path / "run", *flags)])
    for out, root in {"packed": excerpts, "unpacked": tmp_path / "wav"}.items():
        evaluate("--exp_dir", tmp_path / "run", "--out_dir", out, "--root", root)
    packed, unpacked = (tmp_path / "run" / out for out in ("packed", "unpacked"))
    texts = [(out / "results.txt").read_text() for out in (packed, unpacked)]
    assert texts[0].partition("\nSamples beyond full scale")[0] == texts[1]  # before decoding
    (song,) = (path for path in packed.iterdir() if path.is_dir() and path.name != "test")
    assert sf.info(song / "vocals.wav").samplerate == 44100
    text = compare([packed, unpacked], tmp_path / "compared")
    (line,) = (line for line in text.splitlines() if line.startswith("run/unpacked  SDR"))
    assert line.split()[2:4] == ["1", "+0.00"]  # a track, and no difference


# Resuming


def contents(out: Path) -> dict[str, bytes]:
    """All that a run leaves, but for the pickled table, which keeps no order of its columns, and
    the time in the head of a 32-bit wav.
    """
    files = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".pandas")
    return {
        str(path.relative_to(out)): (
            sf.read(path)[0].tobytes() if path.suffix == ".wav" else path.read_bytes()
        )
        for path in files
    }


def test_a_second_run_keeps_what_it_would_make_again(results, experiment, tmp_path, capsys):
    out, _ = results
    copy = shutil.copytree(out, tmp_path / "out")
    before = {name: time for name, time in write_times(copy).items() if name.name not in RESULTS}
    evaluate("--exp_dir", out.parent, "--out_dir", copy)
    assert "2 tracks scored already\n" in capsys.readouterr().out
    after = write_times(copy)
    assert all(after[path] == time for path, time in before.items() if path != copy)
    assert contents(copy) == contents(out)


def test_another_version_alone_scores_nothing_again(results, tmp_path, monkeypatch):
    out = shutil.copytree(results[0], tmp_path / "out")
    record = read_yaml(out / "test" / f"{TEST_NAMES[0]}.yml")
    assert record["version"] == __version__
    monkeypatch.setattr("local.eval.out.__version__", "another")
    before = write_times(out / "test")
    evaluate("--exp_dir", results[0].parent, "--out_dir", out)
    assert write_times(out / "test") == before


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--method", "full"], "made with method overlap-add, not full"),
        (["--overlap", "0.2"], "made with overlap 0.1, not 0.2"),
        (["--scorer", "museval"], "made with scorer bsseval, not museval"),
        (["--precision", "bf16"], "made with precision float32, not bf16"),
        (["--float32"], "not saved as FLOAT"),
    ],
)
def test_other_settings_score_all_tracks_again(results, flags, reason, tmp_path, capsys, with_bf16):
    out, _ = results
    copy = shutil.copytree(out, tmp_path / "out")
    evaluate("--exp_dir", out.parent, "--out_dir", copy, *flags)
    names = ", ".join(sorted(TEST_NAMES))
    assert f"2 tracks to score again, {reason}: {names}\n" in capsys.readouterr().out
    evaluate("--exp_dir", out.parent, "--out_dir", tmp_path / "new", *flags)
    assert contents(copy) == contents(tmp_path / "new")


def test_another_checkpoint_or_a_missing_file_scores_again(results, tmp_path, capsys):
    out, _ = results
    copy = shutil.copytree(out, tmp_path / "out")
    first, second = sorted(TEST_NAMES)
    (copy / "test" / f"{first}.yml").unlink()
    (copy / second / "vocals.wav").unlink()
    evaluate("--exp_dir", out.parent, "--out_dir", copy)
    printed = capsys.readouterr().out
    assert f"1 track to score again, no record of what made its scores: {first}\n" in printed
    assert f"1 track to score again, not saved as PCM_16: {second}\n" in printed
    assert contents(copy) == contents(out)

    content = torch.load(out.parent / "best_model.pth", weights_only=True)
    torch.save({**content, "epoch": 9}, tmp_path / "other.pth")
    evaluate("--exp_dir", out.parent, "--out_dir", copy, "--checkpoint", tmp_path / "other.pth")
    assert "2 tracks to score again, made with another checkpoint" in capsys.readouterr().out


def test_a_test_set_beyond_full_scale(experiment, own_corpus, tmp_path, capsys):
    """It is clipped, as musdb does, and listed; or read as it is, and scored again for that."""
    for path in (own_corpus / "test").rglob("*.wav"):
        audio, _ = sf.read(path, dtype="float32")
        if path.parent.name == TEST_NAMES[0]:
            audio *= 2.5 / np.abs(audio).max()
        sf.write(path, audio, RATE, "FLOAT")
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus]
    listed = rf"--float_references.*\n  {TEST_NAMES[0]}: bass \d+, [^\n]*vocals \d+\n\Z"
    for _ in range(2):  # the second time, from the records
        evaluate(*flags)
        assert re.search(listed, (tmp_path / "out" / "results.txt").read_text(), re.DOTALL)
    clipped = contents(tmp_path / "out" / "test")

    evaluate(*flags, "--float_references", "--float32")
    printed = capsys.readouterr().out
    assert "2 tracks to score again, made with float_references False, not True: " in printed
    assert "--float_references" not in (tmp_path / "out" / "results.txt").read_text()
    scores = f"{TEST_NAMES[0]}.json"
    assert contents(tmp_path / "out" / "test")[scores] != clipped[scores]
    model = load_model(experiment / "best_model.pth")
    audio, _ = sf.read(own_corpus / "test" / TEST_NAMES[0] / "mixture.wav", dtype="float32")
    saved, _ = sf.read(tmp_path / "out" / TEST_NAMES[0] / "vocals.wav", dtype="float32")
    expected = separate(model, torch.from_numpy(audio.T.copy()))[0].T
    np.testing.assert_allclose(saved, expected, atol=1e-6)


def test_replaced_files_are_scored_again(experiment, own_corpus, tmp_path, capsys):
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus]
    evaluate(*flags)
    first, second = (own_corpus / "test" / name for name in sorted(TEST_NAMES))
    shutil.copy(second / "bass.wav", first / "bass.wav")
    evaluate(*flags)
    printed = capsys.readouterr().out
    assert f"1 track to score again, its files have changed: {first.name}\n" in printed
    evaluate("--exp_dir", experiment, "--out_dir", tmp_path / "new", "--root", own_corpus)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_audio_of_another_run_does_not_stay_beside_scores(results, tmp_path):
    out, _ = results
    copy = shutil.copytree(out, tmp_path / "out")
    evaluate("--exp_dir", out.parent, "--out_dir", copy, "--method", "full", "--n_save_ex", 0)
    assert not any(copy.rglob("*.wav"))


class Killed(BaseException):
    pass


def test_a_run_that_ends_after_its_audio_leaves_no_older_scores_to_it(
    results, tmp_path, monkeypatch
):
    def save_and_end(*args):
        save(*args)
        raise Killed

    out, _ = results
    copy, save = shutil.copytree(out, tmp_path / "out"), save_estimates
    flags = ["--exp_dir", out.parent, "--out_dir", copy]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("local.estimates.save_estimates", save_and_end)
        evaluate(*flags, "--method", "full")
    assert len(list(copy.glob("test/*.json"))) == 1
    evaluate(*flags)
    assert contents(copy) == contents(out)


def test_two_runs_into_one_folder_are_refused(experiment, tmp_path, error_of):
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out"]
    evaluate(*flags)
    before = contents(tmp_path / "out")
    with locked(tmp_path / "out"):
        assert "out is in use: another run writes to it" in error_of(evaluation.main, *flags)
    assert contents(tmp_path / "out") == before
    evaluate(*flags)


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory) -> Path:
    """A test set that takes some seconds to score, its longest track the last by name."""
    root = tmp_path_factory.mktemp("long")
    for number in range(6):
        write_track(root / "test" / f"Song {number}", 8 + 4 * number, seed=number)
    return root


@pytest.fixture(scope="module")
def undisturbed(experiment, long_corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    evaluate("--exp_dir", experiment, "--out_dir", out, "--root", long_corpus, "--n_save_ex", 2)
    return out


def start(*command, own_process=False, **variables) -> subprocess.Popen:
    return start_python(
        *command,
        own_process=own_process,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def has_ended(session: int) -> bool:
    """Whether no process of a session runs; one that has ended may be listed as a zombie."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def check_that_all_end(session: int) -> None:
    deadline = time.monotonic() + 30
    while not has_ended(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended(session), "a scoring process outlived the run"


def kill(process: subprocess.Popen) -> str:
    """Kills a command, and waits for the processes it started; returns what was printed."""
    process.kill()
    printed, _ = process.communicate()
    check_that_all_end(process.pid)
    return printed


def test_killed_at_any_moment_it_resumes_to_the_same_results(
    undisturbed, experiment, long_corpus, tmp_path
):
    """One run, killed again and again, each time when some more files are there."""
    out = tmp_path / "out"
    command = [ROOT / "eval.py", "--exp_dir", experiment, "--root", long_corpus, "--n_save_ex", 2]
    command += ["--out_dir", out, "--jobs", 2]
    moments, unfinished = random.Random(0), 0
    for files in (0, 4, 9):
        process = start(*command)
        wait_for(process, lambda files=files: len(list(out.glob("test/[!.]*"))) > files)
        time.sleep(moments.uniform(0, 0.3))
        unfinished += process.poll() is None and not (out / "results.txt").exists()
        kill(process)
    assert unfinished >= 2
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(undisturbed)


def test_ctrl_c_ends_the_run_and_its_scoring_processes(experiment, long_corpus, tmp_path):
    out = tmp_path / "out"
    flags = ["--exp_dir", experiment, "--root", long_corpus, "--out_dir", out, "--jobs", 2]
    process = start(ROOT / "eval.py", *flags, own_process=True)
    wait_for(process, lambda: any(out.glob("test/[!.]*.json")))
    os.killpg(process.pid, signal.SIGINT)  # all processes, as a terminal does
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "eval.py: interrupted" in printed
    assert "Traceback" not in printed
    check_that_all_end(process.pid)
    assert not (out / "results.txt").exists()
    assert not any(out.glob(".estimates*"))


def test_an_evaluation_that_slurm_ends_in_time_requeues_its_job(experiment, long_corpus, tmp_path):
    out = tmp_path / "out"
    flags = ["--exp_dir", experiment, "--root", long_corpus, "--out_dir", out, "--jobs", 2]
    process = start(ROOT / "eval.py", *flags, own_process=True, **imitate_slurm(tmp_path))
    wait_for(process, lambda: any(out.glob("test/[!.]*.json")))
    os.killpg(process.pid, signal.SIGUSR1)  # all processes, as srun does
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 138
    assert "SLURM has requeued job 7" in printed
    assert "killed" not in printed and "Traceback" not in printed
    check_that_all_end(process.pid)
    assert not any(out.glob(".estimates*"))


# Memory


def check_that_only_the_longest_failed(out: Path, printed: str) -> None:
    assert f"Not scored: 1 of 3 tracks\n  Long: {printed}" in (out / "results.txt").read_text()
    assert {path.stem for path in (out / "test").iterdir()} == {"A", "B"}
    assert not any(out.glob(".estimates*"))


@pytest.fixture
def uneven_corpus(tmp_path) -> Path:
    for number, (name, seconds) in enumerate({"A": 2, "Long": 60, "B": 2}.items()):
        write_track(tmp_path / "uneven" / "test" / name, seconds, seed=number)
    return tmp_path / "uneven"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_track_that_is_out_of_memory_costs_itself_only(
    error, experiment, uneven_corpus, tmp_path, monkeypatch
):
    def separate_short(model, mixture, *settings):
        if mixture.shape[-1] > 10 * RATE:
            raise error
        return separate(model, mixture, *settings)

    monkeypatch.setattr("local.inference.separate", separate_short)
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", uneven_corpus]
    for _ in range(2):  # the second time, the others are kept
        with pytest.raises(SystemExit) as exit_:
            evaluate(*flags, "--segment", 3)
        assert exit_.value.code == 1
        reason = f"out of memory: {str(error) or 'MemoryError'}; these need less: --segment below 3"
        check_that_only_the_longest_failed(tmp_path / "out", reason)


def test_under_a_limit_of_the_shell(experiment, uneven_corpus, tmp_path):
    """As by `ulimit -v`, set for the separation alone, since imports take more."""
    script = tmp_path / "limited.py"
    script.write_text(f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import psutil
from local import inference
import eval as evaluation
separate = inference.separate
def limited(model, mixture, *args):
    if mixture.shape[-1] < 50 * model.samplerate:  # oneDNN needs more for its first products
        return separate(model, mixture, *args)
    least = psutil.Process().memory_info().vms + 4_000_000  # the estimates of 60 s take 7.7 MB
    resource.setrlimit(resource.RLIMIT_AS, (least, resource.RLIM_INFINITY))
    try:
        return separate(model, mixture, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
inference.separate = limited
if __name__ == "__main__":
    evaluation.main(sys.argv[1:])
""")
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", uneven_corpus]
    result = run_python(script, *flags, "--segment", 0.5, own_process=True)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    check_that_only_the_longest_failed(tmp_path / "out", "out of memory: ")


def test_a_limit_of_a_container_is_known_before(
    experiment, uneven_corpus, tmp_path, monkeypatch, capsys
):
    """Where the kernel would kill the run, a track is listed without being tried."""

    def separate_short(model, mixture, *settings):
        assert mixture.shape[-1] < 10 * RATE
        return separate(model, mixture, *settings)

    monkeypatch.setattr("local.inference.separate", separate_short)
    needed = scoring_bytes(30, "bsseval")
    cgroup = v2("/job", limit=int(needed) + 300, used=400, cache=100)
    place = {"proc/self/mountinfo": V2_MOUNT.format(top="/"), "proc/self/cgroup": "0::/job"}
    write_files(tmp_path / "root", {**place, **cgroup})
    monkeypatch.setattr("local.tools.memory.ROOT", tmp_path / "root")
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", uneven_corpus]
    with pytest.raises(SystemExit) as exit_:
        evaluate(*flags)
    assert exit_.value.code == 1
    reason = "its scoring needs about 0.57 GB of memory, and 0.51 are free"
    check_that_only_the_longest_failed(tmp_path / "out", reason)
    assert f"Long: not scored: {reason}" in capsys.readouterr().err


def test_out_of_memory_before_the_first_track(experiment, tmp_path, error_of, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    monkeypatch.setattr("local.estimates.load_model", fail)
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out"]
    error = error_of(evaluation.main, *flags)
    assert error == "eval.py: error: out of memory: CUDA out of memory. Tried to allocate 2 MiB\n"


# Several processes


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--rdzv_backend", "c10d"]
TORCHRUN += ["--rdzv_endpoint", "localhost:0"]


def test_two_ranks_share_the_tracks(undisturbed, experiment, long_corpus, tmp_path):
    out = tmp_path / "out"
    flags = ["--exp_dir", experiment, "--root", long_corpus, "--n_save_ex", 2, "--out_dir", out]
    process = start(*TORCHRUN, ROOT / "eval.py", *flags)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert contents(out) == contents(undisturbed)
    assert printed.count("\nAll results are in ") == 1
    for name in ("Song 0", "Song 5"):
        assert printed.count(f"{name}: SDR vocals ") == 1


def srun(rank: int, port: int, *command) -> subprocess.Popen:
    """One of the two processes that srun would start on this machine."""
    variables = dict(SLURM_NTASKS="2", SLURM_JOB_NAME="a", SLURM_JOB_ID="1", SLURM_NNODES="1")
    variables |= dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0")
    variables |= dict(
        SLURM_NTASKS_PER_NODE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        SLURM_NODELIST="localhost",
    )
    return start(*command, **variables)


def test_what_a_dead_rank_leaves_is_scored_by_the_next_run(
    undisturbed, experiment, long_corpus, tmp_path
):
    out, port = tmp_path / "out", find_free_network_port()
    command = [ROOT / "eval.py", "--exp_dir", experiment, "--root", long_corpus, "--n_save_ex", 2]
    command += ["--out_dir", out, "--jobs", 1]
    first, second = (srun(rank, port, *command) for rank in (0, 1))
    wait_for(second, lambda: (out / ".estimates.1" / "2").exists())
    assert second.poll() is None
    kill(second)
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 2
    assert "run the same command again to resume" in printed
    assert "Traceback" not in printed
    assert not (out / "results.txt").exists()
    kept = list(out.glob("test/*.json"))
    assert 3 <= len(kept) < 6  # the whole share of the first rank is kept

    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert f"{len(kept)} tracks scored already" in result.stdout
    assert contents(out) == contents(undisturbed)


# What goes wrong


def test_tasks_that_lightning_cannot_place_are_refused(experiment, tmp_path, error_of, monkeypatch):
    for name, value in dict(SLURM_NTASKS="2", SLURM_JOB_NAME="a", SLURM_PROCID="0").items():
        monkeypatch.setenv(name, value)
    error = error_of(evaluation.main, "--exp_dir", experiment, "--out_dir", tmp_path / "out")
    assert "--ntasks-per-node=2" in error
    assert not (tmp_path / "out").exists()


def test_a_track_that_cannot_be_scored_is_listed_and_the_others_are(
    experiment, own_corpus, tmp_path, capsys
):
    silent = own_corpus / "test" / TEST_NAMES[0] / "vocals.wav"
    sf.write(silent, np.zeros((round(2.3 * RATE), 2), dtype=np.int16), RATE)
    with pytest.raises(SystemExit) as exit_:
        evaluate("--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus)
    assert exit_.value.code == 1
    text = (tmp_path / "out" / "results.txt").read_text()
    assert f"Not scored: 1 of 2 tracks\n  {TEST_NAMES[0]}: " in text
    assert "silent" in text
    assert TEST_NAMES[0] in capsys.readouterr().err
    assert [path.stem for path in (tmp_path / "out" / "test").glob("*.json")] == [TEST_NAMES[1]]


@pytest.mark.parametrize("file", ["mixture.wav", "vocals.wav"])
@pytest.mark.parametrize("left", [None, 100], ids=["gone", "cut"])
def test_a_file_that_goes_during_the_run_is_named(
    file, left, experiment, own_corpus, tmp_path, monkeypatch
):
    def spoil_and_separate(model, mixture, *settings):
        path.unlink() if left is None else os.truncate(path, left)
        monkeypatch.setattr("local.inference.separate", separate)
        return separate(model, mixture, *settings)

    path = own_corpus / "test" / TEST_NAMES[1] / file
    monkeypatch.setattr("local.inference.separate", spoil_and_separate)
    with pytest.raises(SystemExit) as exit_:
        evaluate("--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus)
    assert exit_.value.code == 1
    text = (tmp_path / "out" / "results.txt").read_text()
    assert f"Not scored: 1 of 2 tracks\n  {TEST_NAMES[1]}: " in text
    assert file in text
    assert [path.stem for path in (tmp_path / "out" / "test").glob("*.json")] == [TEST_NAMES[0]]


def test_an_estimate_that_is_not_finite_stops_its_track(experiment, tmp_path, capsys, monkeypatch):
    def separate_badly(model, mixture, *settings):
        sources = separate(model, mixture)
        sources[1, 0, 99] = next(spoilt)
        return sources

    spoilt = iter([float("nan"), float("inf")])
    monkeypatch.setattr("local.inference.separate", separate_badly)
    with pytest.raises(SystemExit) as exit_:
        evaluate("--exp_dir", experiment, "--out_dir", tmp_path / "out")
    assert exit_.value.code == 1
    text = (tmp_path / "out" / "results.txt").read_text()
    for name in TEST_NAMES:
        assert f"  {name}: the estimate of accompaniment holds NaN or infinity" in text
    assert not any((tmp_path / "out").rglob("*.wav"))


def test_scores_of_other_tracks_are_not_mixed_with_these(
    experiment, own_corpus, tmp_path, error_of
):
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus]
    evaluate(*flags)
    (own_corpus / "test" / TEST_NAMES[0]).rename(own_corpus / "test" / "results.txt")

    before = write_times(tmp_path / "out")
    error = error_of(evaluation.main, *flags)
    assert "2 faults" in error
    assert "holds scores of another test set" in error
    assert "--root: a track called results.txt " in error
    assert write_times(tmp_path / "out") == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--overlap", "7"], "--overlap must be at least 0 and below --segment, got 7.0 and 6.0"),
        (["--segment", "nan"], "--overlap must be at least 0 and below --segment"),
        (["--n_save_ex", "-2"], "--n_save_ex must be at least 0, or -1 for all, got -2"),
        (["--checkpoint", "nothing.pth"], "--checkpoint: no such file or folder: nothing.pth"),
        (["--root", "nowhere"], "--root: no such folder: nowhere"),
        (["--suffix", "mp3"], "argument --suffix: invalid choice: 'mp3'"),
        (["--segment", "1e-5", "--overlap", "0"], "--segment, --overlap: segment must be"),
        (["--out_dir", ""], "--out_dir must not be empty"),
        (["--use_gpu", "2"], "argument --use_gpu: invalid choice: 2"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--scorer", "mir_eval"], "argument --scorer: invalid choice: 'mir_eval'"),
    ],
)
def test_bad_arguments(experiment, flags, words, error_of, tmp_path):
    out = tmp_path / "out"
    error = error_of(evaluation.main, "--exp_dir", experiment, "--out_dir", out, *flags)
    assert words in error
    assert not out.exists()


def test_several_bad_arguments_are_reported_together(experiment, error_of, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    flags = ["--out_dir", "x", "--use_gpu", 1, "--n_save_ex", -5, "--overlap", -1]
    error = error_of(evaluation.main, "--exp_dir", experiment, *flags)
    for words in ("4 faults", "--use_gpu 1: ", "--n_save_ex", "install ffmpeg"):
        assert words in error


def test_an_experiment_without_a_model_or_a_root(tmp_path, experiment, error_of, monkeypatch):
    error = error_of(evaluation.main, "--exp_dir", tmp_path, "--out_dir", "out")
    assert f"--exp_dir: {tmp_path} holds no best_model.pth; train first" in error
    monkeypatch.chdir(tmp_path)  # EXP/best_model.pth looks like the name of a hub repository
    error = error_of(evaluation.main, "--exp_dir", "EXP", "--out_dir", "out")
    assert "--exp_dir: EXP holds no best_model.pth" in error
    checkpoint = experiment / "best_model.pth"
    flags = ["--exp_dir", tmp_path, "--out_dir", "out", "--checkpoint", checkpoint]
    assert "--root is needed" in error_of(evaluation.main, *flags)
    for content, words in {
        "data: 3": "--root is needed",
        "data: {root: 5}": "no such folder: 5",
        "data: {root: x, suffix: mp3}": "data.suffix must be one of auto, wav, flac, got mp3",
        "- 1": "expected sections",
    }.items():
        (tmp_path / "conf.yml").write_text(content)
        assert words in error_of(evaluation.main, *flags)


def test_the_conf_of_a_published_experiment_is_read(experiment, corpus, tmp_path):
    """Leftovers of its parser, and none of the keys that only we have."""
    shutil.copy(experiment / "best_model.pth", tmp_path)
    (tmp_path / "conf.yml").write_text(
        f"convtasnet: {{}}\ndata:\n  root: {corpus}\n  sample_rate: {RATE}\n"
        "main_args:\n  exp_dir: x\n  help: null\npositional arguments: {}\n"
    )
    evaluate("--exp_dir", tmp_path, "--out_dir", "out")
    assert (tmp_path / "out" / "results.txt").is_file()


def test_a_mono_model_is_refused(tmp_path, corpus, error_of):
    mono = ConvTasNetStereo(N=8, B=8, H=8, X=1, R=1, C=2, audio_channels=1, samplerate=RATE)
    mono.save_pretrained(tmp_path / "mono")
    flags = ["--exp_dir", tmp_path, "--out_dir", "out", "--root", corpus]
    error = error_of(evaluation.main, *flags, "--checkpoint", tmp_path / "mono")
    assert "expected a stereo model" in error


def test_an_out_dir_that_cannot_be_written(experiment, tmp_path, error_of):
    (tmp_path / "file").touch()
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "file"]
    assert "--out_dir" in error_of(evaluation.main, *flags)


def test_a_diverged_model_is_refused(experiment, tmp_path, error_of):
    content = torch.load(experiment / "best_model.pth", weights_only=True)
    content["state_dict"]["decoder.basis_signals.weight"][0, 0] = np.nan
    torch.save(content, tmp_path / "nan.pth")
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out"]
    error = error_of(evaluation.main, *flags, "--checkpoint", tmp_path / "nan.pth")
    assert "its weights hold NaN or infinity" in error


def test_a_full_disk_is_named(experiment, tmp_path):
    """As a limit on the size of files has it, which numpy and json meet in their own ways."""
    for limit, samples in {20: 10, 1: 0}.items():  # kB of a file
        out = tmp_path / str(limit)
        command = f"ulimit -f {limit}; exec {shlex.quote(sys.executable)} {ROOT / 'eval.py'}"
        command += f" --exp_dir {experiment} --out_dir {out} --n_save_ex {samples}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert result.returncode == 2
        assert re.search(rf"eval.py: error: {out}.*: .*(disk full|too large)", result.stderr)
        assert "Traceback" not in result.stderr
        assert not any(out.rglob("*.np[yz]"))


def test_names_that_the_terminal_cannot_show(experiment, own_corpus, tmp_path, monkeypatch):
    (own_corpus / "test" / TEST_NAMES[0]).rename(own_corpus / "test" / "Été")
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus]
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    evaluate(*flags)
    assert b"\\xc9t\\xe9: SDR vocals" in stdout.buffer.getvalue()


def test_a_reader_that_has_gone(results, tmp_path):
    out, _ = results
    command = [sys.executable, ROOT / "eval.py", "--exp_dir", out.parent, "--out_dir", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert error == ""


@pytest.mark.parametrize("name", ["results.txt", "results.csv", "test"])
def test_a_track_with_the_name_of_a_result(name, experiment, own_corpus, tmp_path, error_of):
    (own_corpus / "test" / TEST_NAMES[0]).rename(own_corpus / "test" / name)
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus]
    assert f"--root: a track called {name} " in error_of(evaluation.main, *flags)


def test_a_name_too_long_for_a_file_ends_in_one_line(experiment, own_corpus, tmp_path, error_of):
    (own_corpus / "test" / TEST_NAMES[0]).rename(own_corpus / "test" / ("n" * 252))
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus]
    assert f"--root: the name of the track {'n' * 252} is too long" in error_of(
        evaluation.main, *flags
    )
    assert not (tmp_path / "out").exists()


def test_the_longest_name_is_scored(experiment, own_corpus, tmp_path):
    (own_corpus / "test" / TEST_NAMES[0]).rename(own_corpus / "test" / ("n" * 245))
    flags = ["--exp_dir", experiment, "--out_dir", tmp_path / "out", "--root", own_corpus]
    evaluate(*flags)
    assert (tmp_path / "out" / "test" / f"{'n' * 245}.json").is_file()


@pytest.mark.parametrize("place", ["", TEST_NAMES[0], "../link"])
def test_the_references_are_never_overwritten(place, experiment, own_corpus, tmp_path, error_of):
    (own_corpus / "link").symlink_to(own_corpus / "test")
    before = {path: path.read_bytes() for path in own_corpus.rglob("*.wav")}
    out = own_corpus / "test" / place
    flags = ["--exp_dir", experiment, "--out_dir", out, "--root", own_corpus, "--n_save_ex", 0]
    assert f"--out_dir: {out} holds the test tracks" in error_of(evaluation.main, *flags)
    assert before == {path: path.read_bytes() for path in own_corpus.rglob("*.wav")}
    assert not list(own_corpus.rglob("*.json"))


@pytest.mark.parametrize("place", ["", "test"])
def test_packed_tracks_are_not_mixed_with_results(place, tmp_path):
    file = tmp_path / "test" / "A.stem.mp4"
    track = PackedTrack(Place(file, "A", "A", tmp_path, "test"), RATE)
    with pytest.raises(UserError, match="--out_dir: .* holds the test tracks"):
        make_out(tmp_path / place, {track.name: list_files(track)})
    assert not (tmp_path / "test").exists()
