import json

import benchmark
import pytest
from conftest import ROOT, run_command, run_python

TINY = ["--N", "16", "--B", "8", "--H", "16", "--X", "2", "--R", "1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("benchmark")
    flags = ["--lengths", "0.2", "0.3", "--longest", "0.5", "--repeats", "1", "--device", "cpu"]
    result = run_command(
        "tests/benchmark.py", "separate", *TINY, *flags, "--json", "costs.json", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    assert "matrix %" in result.stdout
    assert [path.name for path in folder.iterdir()] == ["costs.json"]
    return json.loads((folder / "costs.json").read_text())


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


def test_streams_agree_with_the_textbook(measured):
    assert [row["block_ms"] for row in measured["stream"]] == [1, 5, 20, 200]
    for row in measured["stream"]:
        assert row["error"] < 1e-5
        assert 0 < row["median_ms"] <= row["p99_ms"]
        assert row["latency_ms"] == pytest.approx(19 / 44.1)
        assert row["state_mb"] > 0


def test_work_is_counted_for_every_multiplication():
    case = benchmark.Case("cpu", "causal", 0.1, dict(N=4, B=3, H=5, X=2, R=1), ROOT)
    model, _ = case.load()
    blocks = 2 * (3 * 5 + 3 * 5 + 5 * 3)  # up, depthwise with 3 taps, down
    per_frame = 2 * 20 * 4 + 4 * 3 + blocks + 3 * 2 * 4 + 2 * 4 * 2 * 20
    assert benchmark.count_gflop(model, 20) == pytest.approx(2e-9 * per_frame)
    assert benchmark.count_gflop(model, 39) == pytest.approx(2e-9 * per_frame * 2)


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


def test_it_needs_torch_and_the_hub_alone():
    code = (
        "import sys\n"
        "others = 'asteroid pytorch_lightning musdb museval soundfile pytest'.split()\n"
        "sys.modules.update(dict.fromkeys(others))\n"
        "sys.path.insert(0, 'tests')\n"
        "import benchmark"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
