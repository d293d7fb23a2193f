import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_record
from hypothesis import given
from hypothesis import strategies as st

from local.eval.score_files import (
    METRICS,
    ScoredTrack,
    find_change,
    load_track,
    make_track_store,
    read_scores,
    remove_track,
    save_track,
)
from local.musdb18_tracks import TARGETS, UNFIT_FOR_NAMES

FRAMES = 5
WHOLE_TRACK = ("uSDR", "mixture_uSDR", "SI_SDR", "mixture_SI_SDR")
DAMAGED = "its scores or their record are damaged"


def make_scores(seed: int, frames=FRAMES) -> dict:
    rng = np.random.default_rng(seed)
    scores = {
        target: {metric: np.round(rng.normal(6, 3, frames), 5) for metric in METRICS}
        for target in TARGETS
    }
    for metric in METRICS:
        scores["vocals"][metric][0] = np.nan
    return scores


def make_extras(seed: int) -> dict:
    rng = np.random.default_rng(1000 + seed)
    return {
        "frames": FRAMES,
        "silent": {},
        "mixture_SDR": {
            target: {"median": rng.normal(), "mean": rng.normal()} for target in TARGETS
        },
        **{name: {t: float(rng.normal()) for t in TARGETS} for name in WHOLE_TRACK},
    }


def save(out: Path, name="M.E.R.C. Music - Knockout", seed=0, **changes) -> ScoredTrack:
    (out / "test").mkdir(parents=True, exist_ok=True)
    record = {**make_record(), **make_extras(seed), **changes}
    save_track(out, make_track_store(name, make_scores(seed)), record)
    return load_track(out, name)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["M.E.R.C. Music - Knockout", 'L\'été & "Friends"', "a.json"])
def test_what_is_saved_is_loaded(name, tmp_path):
    found = save(tmp_path, name)
    assert found.name == name
    for target, metrics in make_scores(0).items():
        for metric, values in metrics.items():
            np.testing.assert_array_equal(found.scores[target][metric], values)
    for key, value in make_extras(0).items():
        assert found.record[key] == value
    assert load_track(tmp_path, "another") is None
    import museval

    store = museval.EvalStore()
    store.add_eval_dir(str(tmp_path))
    assert set(store.df["track"]) == {name}


def test_nothing_of_a_removed_track_is_left_but_what_others_put_there(tmp_path):
    for name in ("one", "two"):
        save(tmp_path, name)
        (tmp_path / name).mkdir()
        for file in ("vocals.wav", "accompaniment.wav", ".vocals.wav.tmp"):
            (tmp_path / name / file).touch()
    (tmp_path / "two" / "notes.txt").touch()
    for name in ("one", "two", "three"):
        remove_track(tmp_path, name)
        assert load_track(tmp_path, name) is None
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "test", "two"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "suffix, spoil, words",
    [
        ("json", cut, DAMAGED),
        ("json", lambda path: path.write_text("[]"), DAMAGED),
        ("json", lambda path: path.write_text("[" * 300_000), DAMAGED),
        ("json", lambda path: path.write_bytes(b"\xff"), DAMAGED),
        ("json", lambda path: path.write_text(path.read_text() + " "), "do not belong together"),
        ("yml", Path.unlink, "no record of what made its scores"),
        ("yml", cut, "do not belong together"),
        ("yml", lambda path: path.write_text(""), DAMAGED),
        ("yml", lambda path: path.write_text("a: 1"), DAMAGED),
        (
            "yml",
            lambda path: path.write_text("sha256: 2001-02-03\na: 2001-02-03"),
            "do not belong together",
        ),
        ("yml", lambda path: path.write_text("a: ["), DAMAGED),
        ("yml", lambda path: path.write_text("[" * 3000), DAMAGED),
        ("yml", lambda path: path.write_text("sha256: 1\n2: 3\na: 4"), DAMAGED),
        ("yml", lambda path: path.write_text("!!python/name:os.system"), DAMAGED),
    ],
)
def test_damage_is_noticed(suffix, spoil, words, tmp_path):
    save(tmp_path, "T")
    spoil(tmp_path / "test" / f"T.{suffix}")
    with pytest.raises(ValueError, match=words):
        load_track(tmp_path, "T")


def test_scores_of_one_run_with_the_record_of_another_are_noticed(tmp_path):
    """What is there where a run was killed between its two files."""
    save(tmp_path, "T", seed=0)
    record = (tmp_path / "test" / "T.yml").read_text()
    save(tmp_path, "T", seed=1)
    (tmp_path / "test" / "T.yml").write_text(record)
    with pytest.raises(ValueError, match="do not belong together"):
        load_track(tmp_path, "T")


def made_with(**settings) -> dict:
    return {
        "made_with": {"checkpoint": "0" * 64, "method": "full", "scorer": "bsseval", **settings}
    }


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        (made_with(checkpoint="1" * 64), "made with another checkpoint"),
        (made_with(method="stream"), "made with method full, not stream"),
        (made_with(segment=3.0), "made with segment None, not 3.0"),
        (made_with(float_references=False), ""),  # as in earlier versions, which had no such flag
        (made_with(float_references=True), "made with float_references False, not True"),
        ({"files": {"mixture.wav": [1, 3]}}, "its files have changed"),
        ({"saved": "PCM_16"}, "not saved as PCM_16"),
    ],
)
def test_scores_are_kept_only_where_nothing_has_changed(change, words, tmp_path):
    found = save(tmp_path)
    assert find_change(tmp_path, found, {**make_record(), **change}) == words


def test_other_code_of_the_model_is_a_change(tmp_path):
    found = save(tmp_path, **made_with(model_code="1"))
    same, edited = ({**make_record(), **made_with(model_code=code)} for code in "12")
    assert find_change(tmp_path, found, same) == ""
    assert find_change(tmp_path, found, edited) == "made with other code of the model"
    earlier = save(tmp_path)  # by a version that kept none of it
    assert find_change(tmp_path, earlier, same) == ""


def test_missing_frames_and_missing_audio_are_a_change(tmp_path):
    found, wanted = save(tmp_path, "T", saved="PCM_16"), make_record(saved="PCM_16")
    assert find_change(tmp_path, found, wanted) == "not saved as PCM_16"
    (tmp_path / "T").mkdir()
    for target in TARGETS:
        (tmp_path / "T" / f"{target}.wav").touch()
    assert find_change(tmp_path, found, wanted) == ""
    assert find_change(tmp_path, found, make_record()) == ""  # saved, and need not be
    assert find_change(tmp_path, found, make_record(saved="FLOAT")) == "not saved as FLOAT"
    del found.scores["vocals"]
    assert find_change(tmp_path, found, wanted) == "frames of it are missing"


@given(
    st.dictionaries(
        st.text(max_size=5).filter(lambda name: not UNFIT_FOR_NAMES.search(name)),
        st.fixed_dictionaries(
            {m: st.lists(st.floats(-99, 99) | st.just(np.nan), max_size=4) for m in METRICS}
        ),
        max_size=3,
    ),
    st.booleans(),
)
def test_any_scores_are_read(tmp_path_factory, targets, packed):
    frames = {
        name: [
            {"metrics": dict(zip(metrics, x, strict=True))}
            for x in zip(*metrics.values(), strict=False)
        ]
        for name, metrics in targets.items()
    }
    content = {"targets": [{"name": name, "frames": x} for name, x in frames.items()]}
    path = tmp_path_factory.mktemp("scores") / ("T.json.gz" if packed else "T.json")
    (gzip.open if packed else open)(path, "wt").write(json.dumps(content))
    found = read_scores(path)
    assert found.keys() == targets.keys()
    for name, metrics in targets.items():
        shortest = min(map(len, metrics.values()))
        for metric, values in metrics.items():
            np.testing.assert_array_equal(found[name][metric], values[:shortest])
