"""The challenge's own run, on a tiny package of its metadata and music."""

import json
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile as sf
import torch
from conftest import ROOT, make_stems, random_model, start_python, write_times

from local import enhance as command
from local.checkpoint import load_model
from local.inference import separate
from local.lift.listener import make_listener
from local.lift.package import RATE, read_pairs
from local.lift.remix import mix
from local.tools.command_line import UserError

needs_compressor = pytest.mark.skipif(not find_spec("clarity"), reason="pyClarity is not installed")
pytestmark = needs_compressor

SMALL = dict(N=8, L=8, B=8, H=8, X=2, R=1, C=2, audio_channels=2, samplerate=RATE)
EAR = {"cr_l": [2] * 6, "gain_l": [5] * 6, "cr_r": [3] * 6, "gain_r": [9] * 6}
TIMES = {
    "M1": ("train/one", 0.25, 0.95),
    "M2": ("train/two", 0.1, 0.70003),
    "M3": ("train/two", 0, 1),
}
FILES = {
    "music.valid": {
        name: {"path": path, "start_time": start, "end_time": end}
        for name, (path, start, end) in TIMES.items()
    },
    "scene.valid": {
        "S1": {"segment_id": "M1", "alpha": "alpha_0"},
        "S2": {"segment_id": "M2", "alpha": "alpha_1"},
        "S3": {"segment_id": "M1", "alpha": "alpha_2"},
    },
    "scene_listeners.valid": {"S1": ["L1", "L2"], "S2": ["L2"], "S3": ["L1"]},
    "alpha": {"alpha_0": 0.0, "alpha_1": 0.5, "alpha_2": 1},
    "compressor_params.valid": {"L1": EAR, "L2": EAR | {"gain_l": [0] * 6}},
}
WRITTEN = {
    "S1_L1_A0.0_remix.flac",
    "S1_L2_A0.0_remix.flac",
    "S2_L2_A0.5_remix.flac",
    "S3_L1_A1_remix.flac",
}


@pytest.fixture
def package(tmp_path) -> Path:
    """TMP/metadata and TMP/audio."""
    write_package(tmp_path / "metadata", tmp_path / "audio")
    return tmp_path


def write_package(metadata: Path, audio: Path) -> None:
    """Write metadata, and the songs that they name."""
    metadata.mkdir()
    for name, content in FILES.items():
        (metadata / f"{name}.json").write_text(json.dumps(content))
    for seed, name in enumerate(("one", "two")):
        song = audio / "train" / name
        song.mkdir(parents=True)
        sf.write(song / "mixture.flac", make_stems(1.0, RATE, seed)["mixture"], RATE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model(SMALL).save_pretrained(folder)
    return folder


@pytest.fixture
def words(package, checkpoint) -> list[str]:
    words = ["--scenes", package / "metadata", "--music", package / "audio"]
    words += ["--checkpoint", checkpoint, "--out", package / "out", "--device", "cpu"]
    return list(map(str, words))


def enhance(words: list[str], *more: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        command.main([*words, *more])
    return exit_.value.code


def list_written(package: Path) -> set[str]:
    return {path.name for path in (package / "out" / "enhanced_signals").iterdir()}


def change(package: Path, name: str, **entries) -> None:
    file = package / "metadata" / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_remix_is_made_as_the_challenge_says(package, words, checkpoint):
    assert enhance(words) == 0
    assert list_written(package) == WRITTEN
    song, _ = sf.read(package / "audio" / "train" / "two" / "mixture.flac")
    segment = song[int(0.1 * RATE) : int(0.70003 * RATE)]
    loudness = pyloudnorm.Meter(RATE).integrated_loudness(segment)
    levelled = torch.from_numpy((segment * 10 ** ((-40 - loudness) / 20)).T).float()
    estimates = separate(load_model(checkpoint), levelled).numpy()
    compressor = make_listener(FILES["compressor_params.valid"]["L2"])
    expected = compressor.compress(mix(*estimates, 0.5), RATE).clip(-1, 1)
    file = package / "out" / "enhanced_signals" / "S2_L2_A0.5_remix.flac"
    found, rate = sf.read(file)
    info = sf.info(file)
    assert (rate, info.subtype, found.shape) == (RATE, "PCM_16", segment.shape)
    assert np.abs(found.T - expected).max() < 0.6 / 32768 + 1e-6


def test_a_segment_is_separated_once_for_all_who_hear_it(words, monkeypatch):
    separated = []

    def note(model, mixture, args, title):
        separated.append(title)
        return {"vocals": mixture.numpy(), "accompaniment": mixture.numpy()}

    monkeypatch.setattr("local.lift.scenes.separate_targets", note)
    assert enhance(words) == 0
    assert separated == ["[1/2] M1", "[2/2] M2"]


def test_finished_files_are_kept(package, words, capsys):
    assert enhance(words) == 0
    (package / "out" / "enhanced_signals" / "S3_L1_A1_remix.flac").unlink()
    before = write_times(package / "out" / "enhanced_signals")
    assert enhance(words) == 0
    after = write_times(package / "out" / "enhanced_signals")
    assert {path: time for path, time in after.items() if path in before} == before
    assert list_written(package) == WRITTEN
    assert "1 remix written" in capsys.readouterr().out
    assert enhance(words, "--segment", "0.5") == 2
    assert "holds remixes made with segment 6.0, not 0.5" in capsys.readouterr().err
    assert enhance(words, "--segment", "0.5", "--overwrite") == 0
    assert "4 remixes written" in capsys.readouterr().out


def test_a_killed_run_leaves_whole_files_and_is_continued(package, words):
    scenes = {f"T{i}": {"segment_id": f"M{i}", "alpha": "alpha_1"} for i in range(20)}
    change(package, "scene.valid", **scenes)
    change(package, "scene_listeners.valid", **dict.fromkeys(scenes, ["L1", "L2"]))
    one = FILES["music.valid"]["M1"]
    change(package, "music.valid", **{f"M{i}": one for i in range(20)})
    process = start_python(ROOT / "local" / "enhance.py", *words, stderr=subprocess.DEVNULL)
    folder, deadline = package / "out" / "enhanced_signals", time.monotonic() + 60
    while len(list(folder.glob("T*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = sorted(folder.glob("*.flac"))
    assert 3 <= len(made) < 40
    assert all(sf.info(file).frames == int(0.95 * RATE) - int(0.25 * RATE) for file in made)
    before = write_times(folder)
    assert enhance(words) == 0
    assert len(list(folder.glob("*.flac"))) == 44
    kept = {path: time for path, time in write_times(folder).items() if path in made}
    assert kept == {path: before[path] for path in made}
    assert list(folder.glob(".*.tmp")) == []


def test_jobs_share_the_pairs(package, words):
    assert enhance(words, "--part", "1/2") == 0
    first = list_written(package)
    assert enhance(words, "--part", "2/2") == 0
    assert list_written(package) == WRITTEN
    assert 0 < len(first) < len(WRITTEN)


def test_wrong_references_are_listed_together_before_the_work(package, words, capsys):
    change(package, "scene.valid", S4={"segment_id": "M9", "alpha": "alpha_7"}, S5={"alpha": 1})
    change(package, "scene_listeners.valid", S1=["L1", "L3"], S3="L1", S4=["L1", "../L1"])
    change(package, "compressor_params.valid", L2=EAR | {"cr_l": [1, 2]})
    change(package, "music.valid", M2={"path": "gone", "start_time": 0, "end_time": 1})
    assert enhance(words) == 2
    error = capsys.readouterr().err
    for fault in (
        "music.valid.json has no M9, which scene S4 names",
        "alpha.json has no alpha_7, which scene S4 names",
        "scene: S5 has no segment_id",
        "alpha.json has no 1, which scene S5 names",
        "scene_listeners.valid.json has no S5",
        "scene_listeners: S3 must have a list of names, got L1",
        "scene_listeners: S4 ../L1 cannot be the name of a file",
        "compressor_params.valid.json has no L3",
        "compressor_params: L2: cr_l must be 6 numbers",
        f"--music: no such file: {package / 'audio' / 'gone' / 'mixture.flac'}",
    ):
        assert fault in error, fault
    assert "10 faults" in error
    assert not (package / "out").exists()


@pytest.mark.parametrize(
    ("start", "end", "fault"),
    [
        (0.5, 0.5, "must end after it starts"),
        (-1, 0.5, "must end after it starts"),
        (0, 1.01, "ends after 1.00 s"),
        ("zero", None, "start_time and end_time"),
        (0, float("nan"), "start_time and end_time"),
    ],
)
def test_segments_that_cannot_be_cut(start, end, fault, package):
    change(package, "music.valid", M1={"path": "train/one", "start_time": start, "end_time": end})
    with pytest.raises(UserError, match=fault):
        read_pairs(package / "metadata", package / "audio", "valid")


@pytest.mark.parametrize("entry", [5, {"start_time": 0, "end_time": 1}])
def test_segments_without_a_path(entry, package):
    change(package, "music.valid", M1=entry)
    with pytest.raises(UserError, match="must have path"):
        read_pairs(package / "metadata", package / "audio", "valid")


def test_many_faults_are_cut_short(package):
    scenes = {f"T{i}": {"segment_id": "M1", "alpha": f"none {i}"} for i in range(50)}
    change(package, "scene.valid", **scenes)
    change(package, "scene_listeners.valid", **dict.fromkeys(scenes, ["L1"]))
    with pytest.raises(UserError, match="and 30 more"):
        read_pairs(package / "metadata", package / "audio", "valid")


def test_flags_that_do_not_go_with_scenes(package, words, error_of):
    for args, message in {
        ("song.wav", "--alpha", "1"): "omit SONG, --alpha",
        ("--split", "train"): "music.train.json: cannot be read",
        ("--music", package / "gone"): "--music: no such folder",
        ("--scenes", package / "gone"): "--scenes: no such folder",
    }.items():
        assert message in error_of(command.main, *words, *args), args


def test_a_model_of_another_rate_is_refused(package, words, tmp_path, error_of):
    random_model({**SMALL, "samplerate": 16000}).save_pretrained(tmp_path / "other")
    error = error_of(command.main, *words, "--checkpoint", tmp_path / "other")
    assert "--checkpoint" in error and "44100 Hz" in error
