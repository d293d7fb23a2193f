import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, needs_shared, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from local.compare import FILES, compare, main
from local.comparison.runs import find_method_notes, name_runs, read_published, read_runs
from local.comparison.statistics import describe_paired, paired_differences
from local.eval.score_files import METRICS, order_targets
from local.tools.command_line import UserError

PUBLISHED = SHARED / "data" / "museval_scores"
KNOCKOUT = "M.E.R.C. Music - Knockout"
HEART = "AM Contra - Heart Peripheral"
TARGETS = ("vocals", "accompaniment")


def write_scores(run: Path, track: str, db: dict[str, list[float]], **metrics) -> Path:
    """Writes museval's JSON of a track: target -> dB of every frame, in all four metrics."""
    targets = []
    for name, values in db.items():
        frames = [
            {"time": time, "duration": 1.0, "metrics": {**dict.fromkeys(METRICS, value), **metrics}}
            for time, value in enumerate(values)
        ]
        targets.append({"name": name, "frames": frames})
    path = run / "test" / f"{track}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"targets": targets}), encoding="utf-8")
    return run


def write_run(run: Path, tracks=(KNOCKOUT, HEART), shift=0.0, targets=TARGETS) -> Path:
    for number, track in enumerate(tracks):
        db = [np.nan, shift + 3 * number, shift + 3 * number + 1, shift + 8]
        write_scores(run, track, dict.fromkeys(targets, db))
    return run


def read_table(**runs: Path) -> pd.DataFrame:
    table, faults = read_runs(runs)
    assert not faults
    return table


frames = st.lists(st.floats(-60, 60) | st.just(np.nan), min_size=1, max_size=6)
tracks = st.dictionaries(st.sampled_from("ABCDE"), frames, min_size=1)


@settings(deadline=None)  # the first example imports museval
@given(tracks)
def test_medians_and_means_are_those_of_museval(scores):
    museval = pytest.importorskip("museval")
    table = table_of({"run": scores}).query("metric == 'SDR'")
    reference = pd.DataFrame(
        [
            {"method": "run", "track": t, "target": "vocals", "metric": "SDR"}
            | {"time": time, "score": value}
            for t, values in scores.items()
            for time, value in enumerate(values)
        ]
    )
    for tracks_agg in ("median", "mean"):
        store = museval.EvalStore(tracks_agg=tracks_agg)
        store.df = reference
        expected = store.agg_frames_tracks_scores().to_numpy().squeeze()
        np.testing.assert_allclose(table["median"].agg(tracks_agg), expected, atol=1e-9)


def table_of(runs: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Vocals alone, with the same in all metrics: run -> track -> dB of every frame."""
    rows = [
        {"run": run, "track": track, "metric": metric, "median": pd.Series(values).median()}
        for run, scores in runs.items()
        for track, values in scores.items()
        for metric in METRICS
    ]
    return pd.DataFrame(rows).assign(target="vocals")


@settings(max_examples=10, deadline=None)  # each takes several bootstraps
@given(tracks, st.floats(-20, 20))
def test_a_shift_of_all_tracks_is_found_with_certainty(scores, shift):
    shifted = {track: [value + shift for value in values] for track, values in scores.items()}
    found = paired_differences(table_of({"first": scores, "second": shifted}))
    scored = [track for track, values in scores.items() if not np.isnan(values).all()]
    assert list(found["tracks"]) == (4 * [len(scored)] if scored else [])
    for row in found.to_dict("records"):
        for name in ("mean", "median"):
            assert row[name] == pytest.approx(shift, abs=1e-9)
            ends = [row[f"{name}_low"], row[f"{name}_high"]]
            expected = [np.nan, np.nan] if len(scored) < 2 else [shift, shift]
            np.testing.assert_allclose(ends, expected, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=8))
def test_an_interval_lies_within_the_tracks_whatever_their_signs(values):
    row = describe_paired(np.array(values))
    negative = describe_paired(-np.array(values))
    for name in ("mean", "median"):
        assert min(values) - 1e-9 <= row[f"{name}_low"] <= row[f"{name}_high"] + 1e-9
        assert row[f"{name}_high"] <= max(values) + 1e-9
        assert negative[f"{name}_low"] == pytest.approx(-row[f"{name}_high"], abs=1e-9)
    assert row == describe_paired(np.array(values))


def test_an_interval_of_the_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(1, 2, 400)
    row = describe_paired(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert row["mean_low"] == pytest.approx(values.mean() - half, abs=0.01)
    assert row["mean_high"] == pytest.approx(values.mean() + half, abs=0.01)


names = st.lists(st.sampled_from(["a", "b", "out", "test"]), min_size=1, max_size=4)


@given(st.lists(names.map(lambda parts: Path("/nowhere", *parts)), min_size=1, unique=True))
def test_names_are_the_shortest_ends_that_tell_runs_apart(folders):
    # A run and its test/ can be distinguished only where they exist.
    folders = [path for path in folders if path.name != "test"]
    runs, faults = name_runs(folders, taken=["published causal"])
    assert not faults
    assert list(runs.values()) == folders
    for name, folder in runs.items():
        assert f"{folder}".endswith(f"/{name}")
        others = [f"{other}" for other in folders if other != folder]
        assert not any(other.endswith(f"/{name}") for other in others)
        shorter = name.partition("/")[2]
        assert not shorter or any(other.endswith(f"/{shorter}") for other in others)


def test_names_of_runs():
    folders = [Path("exp/a/out"), Path("exp/b/out"), Path("x/OpenUnmix/test")]
    runs, _ = name_runs([*folders, Path("y/published causal")], taken=["published causal"])
    assert list(runs) == ["a/out", "b/out", "OpenUnmix", "y/published causal"]


def test_what_eval_wrote_is_named_with_its_training_run(tmp_path):
    folders = [tmp_path / "a" / "out", tmp_path / "b" / "out" / "full", tmp_path / "c"]
    for exp in ("a", "b"):
        (tmp_path / exp).mkdir()
        (tmp_path / exp / "best_model.pth").touch()
    assert list(name_runs(folders, taken=[])[0]) == ["a/out", "b/out/full", "c"]


def test_a_track_keeps_the_dots_of_its_name(tmp_path):
    write_run(tmp_path, tracks=(KNOCKOUT, "A.json"))
    assert set(read_table(run=tmp_path)["track"]) == {KNOCKOUT, "A.json"}


@pytest.mark.smoke
def test_a_row_says_what_the_frames_hold(tmp_path):
    write_scores(tmp_path, "A", {"vocals": [np.nan, 1, 2, 6]}, SIR=5)
    table = read_table(run=tmp_path).set_index("metric")
    assert list(table.loc["SDR"]) == ["run", "A", "vocals", 2, 3, 4, 0.25]
    assert list(table.loc["SIR"]) == ["run", "A", "vocals", 5, 5, 4, 0]


def test_targets_come_in_a_fixed_order():
    assert order_targets(["piano", "drums", "bass", "accompaniment", "vocals"]) == [
        *("vocals", "accompaniment", "bass", "drums", "piano")
    ]


@needs_shared
def test_the_medians_of_published_systems(tmp_path):
    text = compare([PUBLISHED / "OpenUnmix", PUBLISHED / "MMDenseLSTM" / "test"], tmp_path)
    known = {
        "OpenUnmix": {"vocals": 6.319, "drums": 5.731, "bass": 5.234, "other": 4.020},
        "MMDenseLSTM": {"vocals": 7.159, "accompaniment": 13.737},
    }
    table = pd.read_csv(tmp_path / "scores.csv").query("metric == 'SDR'")
    medians = table.groupby(["run", "target"])["median"].median()
    for run, targets in known.items():
        for target, median in targets.items():
            assert round(medians[run, target], 3) == median
            assert re.search(rf"^{run} +50 +{median:.3f} ", text, re.MULTILINE)
    # These two published models are known by 15 tracks, which both systems have.
    assert re.search(r"^published causal +15 +5\.733 ", text, re.MULTILINE)
    assert "published causal hold different tracks, 15 of them in all" in text
    assert "vocals: in 42 tracks the runs have scores of different frames" in text
    assert "accompaniment: nothing to pair, OpenUnmix or all others" in text


@needs_shared
def test_the_published_scores_are_those_of_the_specification():
    text = (SHARED / "spec.md").read_text(encoding="utf-8")
    number = r"(\d+\.\d+)"
    row = rf"^\| (.+) \| {number} / {number} \| {number} / {number} \|$"
    expected = {}
    for track, *sdr in re.findall(row, text, re.MULTILINE):
        keys = [(f"published {m}", t) for m in ("non-causal", "causal") for t in TARGETS]
        expected |= {(*key, track): float(x) for key, x in zip(keys, sdr, strict=True)}
    assert len(expected) == 60
    found = read_published().set_index(["run", "target", "track"])["median"]
    assert found.to_dict() == expected


def test_published_scores_stand_beside_the_tracks_they_share(tmp_path):
    ours = write_run(tmp_path / "ours", targets=("vocals", "drums"))
    (ours / "test" / f"{HEART}.yml").write_text("made_with: {method: overlap-add}")
    text = compare([ours], tmp_path / "with")
    assert "ours: 1 track made with --method overlap-add" in text
    assert "published, not computed here" in text and "eval.py --method full" in text
    table = pd.read_csv(tmp_path / "with" / "scores.csv").query("run != 'ours'")
    assert [tuple(row) for row in table[["run", "track", "target", "median"]].to_numpy()] == [
        ("published non-causal", HEART, "vocals", 6.948),
        ("published causal", HEART, "vocals", 5.887),
    ]
    differences = pd.read_csv(tmp_path / "with" / "differences.csv").set_index("run")
    assert differences.loc["published causal", "mean"] == pytest.approx(5.887 - 4)
    assert np.isnan(differences.loc["published causal", "mean_low"])
    text = compare([ours], tmp_path / "without", with_published=False)
    assert "published causal" not in text and "--method" not in text
    text = compare([write_run(tmp_path / "synthetic", tracks=["1"])], tmp_path / "none")
    assert "no track and target that has a published score" in text


def test_what_is_not_comparable_is_said(tmp_path):
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", tracks=(KNOCKOUT,), shift=1.5)
    write_scores(second, "Silent", {"vocals": [np.nan, np.nan]})
    text = compare([first, second], tmp_path / "out", with_published=False)
    assert "vocals: no frame of Silent has a score in second" in text
    assert "vocals, accompaniment: first, second hold different tracks, 1 of them in all" in text
    assert "paired differences are" in text
    assert "scores of different frames" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "second 1 2.500 2.500 2.500 2.500 50.0% 2.500" in lines
    assert "second SDR 1 +1.50 - +1.50 -" in lines
    assert f"{HEART} 4.00 -" in lines
    assert "Silent - nan" in lines


@pytest.mark.parametrize("tracks", [1, 2, 50])
def test_the_boxes_are_a_picture(tmp_path, tracks):
    image = pytest.importorskip("PIL.Image")
    folders = [tmp_path / f"a rather long name of a run, with a ${n}^2$" for n in range(5)]
    for shift, folder in enumerate(folders):
        write_run(folder, [f"{number}" for number in range(tracks)], shift)
    compare(folders, tmp_path / "out", ["vocals"])
    with image.open(tmp_path / "out" / "scores.png") as picture:
        width, height = picture.size
        extent = picture.convert("L").point(lambda level: level < 128 and 255).getbbox()
    assert 600 < width < 2000 and 600 < height < 2000
    # No name is cut off at the edge.
    assert 0 < extent[0] and extent[2] < width and extent[3] < height


def test_the_command(tmp_path):
    write_run(tmp_path / "exp" / "a" / "out")
    write_run(tmp_path / "exp" / "b" / "out", shift=2)
    (tmp_path / "exp" / "a" / "best_k_models.json").write_text("{}")
    runs = [tmp_path / "exp" / run / "out" for run in "ab"]
    words = ["-m", "local.compare", *runs, "--out", tmp_path / "new" / "out"]
    result = run_python("-W", "error::FutureWarning", *words, "--targets", "vocals")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "b/out SDR 2 +2.00 [+2.00, +2.00] +2.00 [+2.00, +2.00]" in lines
    assert "Paired differences to the baseline, the first RUN: a/out, in dB" in lines
    assert "accompaniment" not in result.stdout
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(FILES)
    text = (tmp_path / "new" / "out" / "comparison.txt").read_text(encoding="utf-8")
    assert result.stdout.startswith(text)


@pytest.mark.parametrize("form", ["markdown", "latex"])
def test_a_table_to_paste_is_all_that_stdout_has(form, tmp_path, capsys):
    first = write_run(tmp_path / "a_b", targets=("vocals", "drums", "accompaniment"))
    second = write_run(tmp_path / "c&d|e", tracks=(HEART,), shift=1.5)
    main([str(first), str(second), "-o", str(tmp_path / "out"), "--format", form])
    printed = capsys.readouterr()
    assert f"Written to {tmp_path / 'out'}" in printed.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert compare([first, second], tmp_path / "text") == (
        (tmp_path / "out" / "comparison.txt").read_text(encoding="utf-8")
    )
    if form == "markdown":
        table, _, notes = printed.out.partition("\n\n")
        lines = [line.strip("| ").replace(" | ", " & ") for line in table.splitlines()]
        names, lines = [r"a\_b", r"c&d\|e"], [lines[0], *lines[2:]]
    else:
        notes, _, table = printed.out.partition("\\begin{tabular}{llrrrrr}\n")
        lines = [line.removesuffix(r" \\") for line in table.splitlines() if " & " in line]
        names = [r"a\_b", r"c\&d\textbar{}e"]
        assert {line[0] for line in notes.splitlines()} == {"%"}
        assert table.endswith("\\bottomrule\n\\end{tabular}\n")
    assert lines[:4] == [
        "Target & Run & Tracks & SDR & SIR & ISR & SAR",
        f"vocals & {names[0]} & 2 & 2.50 & 2.50 & 2.50 & 2.50",
        f"vocals & {names[1]} & 1 & 2.50 & 2.50 & 2.50 & 2.50",
        "vocals & published non-causal & 1 & 6.95 & - & - & -",
    ]
    assert [line.split(" & ")[:2] for line in lines if line.startswith("drums")] == [
        ["drums", names[0]]
    ]
    assert "different tracks" in notes and "Medians over tracks" in notes


def test_comparing_needs_no_torch(tmp_path):
    words = [str(write_run(tmp_path / "run")), "--out", str(tmp_path / "out")]
    code = f"import sys, local.compare; local.compare.main({words!r});"
    code += "print({'torch', 'asteroid', 'museval', 'musdb'} & set(sys.modules), file=sys.stderr)"
    result = run_python("-c", code, own_process=True)
    assert (result.returncode, result.stderr) == (0, "set()\n")


@pytest.mark.parametrize(
    "record, is_comparable",
    [
        ("made_with: {method: overlap-add}", False),
        ("made_with: {method: full}", True),
        ("made_with: {method: stream}", True),
        ("made_with: [", True),
        ("", True),
    ],
)
def test_only_whole_tracks_are_comparable_with_the_published_scores(
    record, is_comparable, tmp_path
):
    run = write_run(tmp_path / "run")
    assert find_method_notes({"run": run}) == []
    (run / "test" / f"{KNOCKOUT}.yml").write_text(record)
    notes = find_method_notes({"run": run})
    assert (notes == []) is is_comparable
    for note in notes:
        assert "run: 1 track made with --method overlap-add" in note and "--method full" in note


@pytest.mark.parametrize(
    ("methods", "is_noted"),
    [(("full", "overlap-add"), True), (("full", "stream"), False), (("full", "full"), False)],
)
def test_runs_of_different_methods(methods, is_noted, tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    for run, method in zip(runs, methods, strict=True):
        (run / "test" / f"{KNOCKOUT}.yml").write_text(f"made_with: {{method: {method}}}")
    text = compare(runs, tmp_path / "out", with_published=False)
    assert ("a by full; b by overlap-add" in text and "same --method" in text) is is_noted


def test_runs_without_a_common_track(tmp_path):
    first, second = (write_run(tmp_path / n, tracks=(f"Song{n}",)) for n in ("", " (mine)"))
    text = compare([first, second], tmp_path / "out")
    assert text.count("hold different tracks") == 1 and "no paired differences" in text
    assert "Song (ROOT)" in text and "--root" in text


def test_all_faults_are_reported_together_and_nothing_is_written(tmp_path, error_of):
    good, exp = write_run(tmp_path / "good"), tmp_path / "exp"
    broken = write_run(tmp_path / "broken")
    path = broken / "test" / f"{HEART}.json"
    path.write_text(path.read_text()[:200])
    write_run(exp / "out")
    (exp / "best_k_models.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    runs = [good, good / "test", exp, broken, tmp_path / "gone", tmp_path / "empty"]
    error = error_of(main, *runs, "-o", path)
    assert "6 faults" in error
    for fault in (
        f"{good / 'test'}: the same run as {good}",
        f"{exp}: holds no museval JSON; name the folder that eval.py wrote, such as {exp / 'out'}",
        f"{path}: ",
        f"{tmp_path / 'gone'}: no such folder",
        f"{tmp_path / 'empty'}: holds no museval JSON",
        f"--out: {path} is a file",
    ):
        assert f"\n  {fault}" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_results_over_tracks_are_no_track(tmp_path):
    run = write_run(tmp_path / "exp" / "out")
    (run / "final_metrics.json").write_text('{"vocals_SDR_median": 6}')
    assert set(read_table(run=tmp_path / "exp")["track"]) == {KNOCKOUT, HEART}


def test_tracks_that_are_there_twice(tmp_path, error_of):
    write_run(tmp_path / "exp" / "a")
    write_run(tmp_path / "exp" / "b")
    error = error_of(main, tmp_path / "exp", "-o", tmp_path / "out")
    assert f"holds several runs; name the folder that eval.py wrote, such as {tmp_path}" in error
    shutil.copy(*[tmp_path / "exp/a/test" / f"{KNOCKOUT}.json{end}" for end in ("", ".gz")])
    error = error_of(main, tmp_path / "exp" / "a", "-o", tmp_path / "out")
    assert f"holds 1 track twice, first test/{KNOCKOUT}.json and test/{KNOCKOUT}.json.gz" in error
    assert not (tmp_path / "out").exists()


def dump_targets(**db: float) -> str:
    metrics = {name: dict.fromkeys(METRICS, value) for name, value in db.items()}
    targets = [{"name": name, "frames": [{"metrics": of}]} for name, of in metrics.items()]
    return json.dumps({"targets": targets})


@pytest.mark.parametrize(
    "content",
    [
        *["", "{", "[]", "{}", '{"targets": []}', '{"targets": [{"name": "vocals"}]}'],
        '{"targets": [{"name": "vocals", "frames": []}]}',
        '{"targets": [{"name": "vocals", "frames": [{"metrics": {"SDR": 1}}]}]}',
        json.dumps(
            {"targets": [{"name": "v", "frames": [{"metrics": dict.fromkeys(METRICS, [1])}]}]}
        ),
        json.dumps(
            {"targets": [{"name": "v", "frames": [{"metrics": dict.fromkeys(METRICS, np.inf)}]}]}
        ),
        dump_targets(v=10**400),
        dump_targets(v=1e308),
        dump_targets(**{"\ud800": 1}),
        dump_targets(**{"a\nb": 1}),
        dump_targets(v=1).replace('"v"', "5"),
        dump_targets(v=1).replace('"v"', "null"),
        dump_targets(v=1, w=1).replace('"w"', '"v"'),
        "[" * 300_000,
    ],
)
def test_json_of_something_else_is_named(tmp_path, error_of, content):
    (tmp_path / "A.json").write_text(content)
    assert f"{tmp_path / 'A.json'}: " in error_of(main, tmp_path, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.smoke
def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path):
    write_run(tmp_path / "a", tracks=["\x1b[31mred", "two\nlines"])
    text = compare([tmp_path / "a"], tmp_path / "out")
    assert "\\x1b[31mred" in text and "two\\nlines" in text and "\x1b" not in text


def test_what_is_in_the_way_is_said_before_anything_is_written(tmp_path, error_of):
    (tmp_path / "out" / "scores.csv").mkdir(parents=True)
    error = error_of(main, write_run(tmp_path / "a"), "-o", tmp_path / "out")
    assert f"--out: {tmp_path / 'out' / 'scores.csv'} is a folder" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.csv"]
    error = error_of(main, tmp_path / "a", "-o", tmp_path / ("n" * 300))
    assert "File name too long" in error


def test_targets_that_are_not_there(tmp_path, error_of):
    first = write_run(tmp_path / "first", targets=["vocals"])
    second = write_run(tmp_path / "second", targets=["drums", "vocals"])
    error = error_of(main, first, second, "--targets", "drums", "guitar")
    assert "no run has guitar; there are vocals, drums" in error
    assert "first has none of them, only vocals" in error


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        compare([write_run(tmp_path / "run")], tmp_path / "file" / "out")


def test_runs_without_any_score_are_compared_too(tmp_path):
    silent = write_scores(tmp_path / "silent", "A", {"vocals": [np.nan]})
    text = compare([silent, write_run(tmp_path / "run")], tmp_path / "out", with_published=False)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "silent 0 - - - - 100.0% -" in lines
    assert "vocals: nothing to pair, silent or all others have no score of it" in lines
    compare([silent], tmp_path / "out", with_published=False)
