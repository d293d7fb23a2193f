import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import benchmark
import psutil
import pytest
from benchmarks import cases, loading, training
from conftest import ROOT, run_command, run_python, slow

TINY = ["--N", "16", "--B", "8", "--H", "16", "--X", "2", "--R", "1"]


def run(folder: Path, command: str, *flags: str) -> tuple[dict, str]:
    """What is written to --json, and what is printed."""
    result = run_command("tests/benchmark.py", command, *flags, "--json", "costs.json", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in folder.iterdir()] == ["costs.json"]
    return json.loads((folder / "costs.json").read_text()), result.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("separate")
    flags = ["--lengths", "0.2", "0.3", "--longest", "0.5", "--repeats", "1", "--device", "cpu"]
    costs, printed = run(folder, "separate", *TINY, *flags)
    assert "matrix %" in printed
    return costs


def test_every_method_of_both_models_has_a_row_at_every_length(measured):
    shown = {(row["model"], row["method"], row["audio_s"]) for row in measured["separate"]}
    methods = {
        "causal": {"textbook", "overlap-add", "full", "stream"},
        "non-causal": {"textbook", "overlap-add", "full"},
    }
    expected = {
        (model, method, length)
        for model, names in methods.items()
        for method in names
        for length in (0.2, 0.3)
    }
    longest = {("causal", "stream"), ("non-causal", "full")}
    assert shown == expected | {(*key, 0.5) for key in longest}
    assert len(measured["separate"]) == len(shown)


def test_the_methods_agree_with_the_textbook(measured):
    for row in measured["separate"]:
        compared = row["method"] != "textbook" and row["audio_s"] < 0.5
        assert (row["error"] is not None) == compared
        assert not compared or row["error"] < 1e-5


def test_rows_hold_memory_and_rates(measured):
    for row in measured["separate"]:
        assert 0 <= row["extra_mb"] < 1000
        assert min(row[key] for key in ("work_s", "rtf", "gflop_per_s", "matrix_share")) > 0
    assert measured["machine"]["threads"] >= 1


def test_streams_agree_with_the_textbook(tmp_path):
    flags = ["--seconds", "0.3", "--blocks", "1", "20", "--device", "cpu"]
    costs, printed = run(tmp_path, "stream", *TINY, *flags, "--precision", "float32")
    assert [row["block_ms"] for row in costs["stream"]] == [1, 20]
    assert "cpu float32: " in printed and " in real time" in printed
    for row in costs["stream"]:
        assert row["error"] < 1e-5
        assert 0 < row["median_ms"] <= row["p99_ms"] <= row["longest_ms"]
        assert row["latency_ms"] == pytest.approx(19 / 44.1)
        assert row["state_mb"] > 0


@slow
def test_training_steps_agree_with_the_textbook(tmp_path):
    flags = ["--seconds", "0.2", "--batch", "2", "--repeats", "1", "--device", "cpu"]
    flags += ["--precision", "float32"]
    costs, printed = run(tmp_path, "train", *TINY, *flags, "--compile", "no")
    assert "2 x 0.2 s on cpu" in printed
    settings = [("textbook", None)] + [("plain", memory) for memory in ("none", "some", "most")]
    shown = [(row["model"], row["step"], row["memory"]) for row in costs["train"]]
    assert shown == [(model, *pair) for model in ("causal", "non-causal") for pair in settings]
    losses = {row["model"]: row["loss"] for row in costs["train"] if row["step"] == "textbook"}
    for row in costs["train"]:
        assert min(row[key] for key in ("step_s", "floor_s", "extra_mb", "speed")) > 0
        assert row["loss"] == pytest.approx(losses[row["model"]], rel=1e-6)
        if row["step"] == "plain":
            assert row["error"] < 1e-5


def test_without_a_compiler_the_other_steps_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(training, "find_compiler_fault", lambda device: "no g++")
    args = argparse.Namespace(compile="both", memory=["some"], precision=["float32"])
    steps = training.choose_steps("cpu", args)
    assert [step.name for step in steps] == ["textbook", "plain"]
    assert capsys.readouterr().out == "without torch.compile: no g++\n"


def test_items_are_loaded_by_both_loaders(tmp_path):
    costs, _ = run(tmp_path, "load", "--seconds", "0.5", "--items", "12", "--workers", "2")
    shown = [(row["page_cache"], row["workers"], row["loader"]) for row in costs["load"]]
    names = ("textbook", "SegmentDataset")
    assert shown == list(itertools.product(("warm", "cold"), (0, 2), names))
    for row in costs["load"]:
        assert row["items_per_s"] == pytest.approx(row["per_core"] * max(row["workers"], 1))
        assert row["loader"] != "textbook" or row["speed"] == 1


@pytest.mark.parametrize("of_a_batch", ["__getitem__", "__getitems__"])
def test_cold_items_are_dropped_from_the_page_cache_first(of_a_batch, tmp_path, monkeypatch):
    done, files = [], [tmp_path / name for name in "ab"]
    for file in files:
        file.touch()

    class Items:
        pass

    items = loading.ColdItems(Items(), files)
    setattr(Items, of_a_batch, lambda self, position: done.append(position))
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: done.append(args[1:]))
    items[7] if of_a_batch == "__getitem__" else items.__getitems__([7, 8])
    dropped = 2 * [(0, 0, os.POSIX_FADV_DONTNEED)]
    assert done == [*dropped, 7 if of_a_batch == "__getitem__" else [7, 8]]


def test_scores_are_measured_against_museval(tmp_path):
    flags = ["--lengths", "2.5", "1.2", "--repeats", "1", "--jobs", "2", "--tracks", "3"]
    costs, printed = run(tmp_path, "score", *flags)
    assert "3 tracks of 2.5 s from wav to JSON" in printed
    shown = [(row["scorer"], row["audio_s"]) for row in costs["score"]]
    assert shown == [(name, length) for length in (2.5, 1.2) for name in ("museval", "bsseval")]
    for row in costs["score"]:
        assert min(row["work_s"], row["speed"]) > 0
        assert row["scorer"] == "museval" or row["deviation_db"] < 1e-6
    assert [(row["jobs"], row["tracks"]) for row in costs["pool"]] == [(1, 3), (2, 3)]
    for row in costs["pool"]:
        assert row["tracks_per_minute"] == pytest.approx(180 / row["work_s"])


def test_work_is_counted_for_every_multiplication():
    case = cases.Case("cpu", "causal", 0.1, dict(N=4, B=3, H=5, X=2, R=1), ROOT)
    model, _ = case.load()
    blocks = 2 * (3 * 5 + 3 * 5 + 5 * 3)  # up, depthwise with 3 taps, down
    per_frame = 2 * 20 * 4 + 4 * 3 + blocks + 3 * 2 * 4 + 2 * 4 * 2 * 20
    assert cases.count_gflop(model, 20) == pytest.approx(2e-9 * per_frame)
    assert cases.count_gflop(model, 39) == pytest.approx(2e-9 * per_frame * 2)


@pytest.mark.parametrize(
    "flags",
    [
        ["--lengths", "0"],
        ["--lengths", "4", "nan"],
        ["--longest", "inf"],
        ["--repeats", "0"],
        ["--H", "1.5"],
        ["--device", "tpu"],
        ["--json", "no/such/folder/costs.json"],
        ["--speed", "up"],
    ],
    ids=lambda flags: flags[0],
)
def test_bad_options(error_of, flags):
    error = error_of(benchmark.main, "separate", *flags)
    assert error.startswith("benchmark.py: error: ")
    assert error.count("\n") == 1


def test_no_command_is_an_error(error_of):
    assert "COMMAND" in error_of(benchmark.main)


MEASURE = """\
import os, sys, time
from benchmarks.measuring import measure_apart

def work():
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    measure_apart(work)
"""


def test_a_measurement_ends_with_the_benchmark(tmp_path):
    (tmp_path / "measure.py").write_text(MEASURE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, tmp_path / "measure.py"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_it_needs_torch_and_the_hub_alone():
    code = (
        "import sys\n"
        "others = 'asteroid pytorch_lightning musdb museval soundfile pytest'.split()\n"
        "sys.modules.update(dict.fromkeys(others))\n"
        "sys.path.insert(0, 'tests')\n"
        "import benchmark"
    )
    result = run_python("-c", code, own_process=True)
    assert result.returncode == 0, result.stderr
