"""Small runs of eval.py for the tests of the listening page, without a model."""

import json
from pathlib import Path

import numpy as np
import soundfile as sf
import yaml
from conftest import RATE, write_track

from local.eval.score_files import METRICS

TARGETS = ("vocals", "accompaniment")
HOSTILE = "Z\"><img src=x onerror=alert(1)> & 'שלום' L\u2019été <script>alert(1)<"


def write_scored_run(
    exp: Path,
    names: list[str],
    seconds: float = 6,
    shift: float = 0.0,
    saved: int = -1,
    method: str = "full",
) -> Path:
    """Writes EXP/conf.yml, EXP/data/test/TRACK and EXP/eval with its scores and the estimates of
    the first `saved` tracks; returns EXP/eval. The worst second is the third one.
    """
    exp.mkdir(parents=True)
    for name in ("best_model.pth", "best_k_models.json"):
        (exp / name).touch()
    conf = {"data": {"root": str(exp / "data")}, "training": {"epochs": 3}}
    (exp / "conf.yml").write_text(yaml.safe_dump(conf), encoding="utf-8")
    for number, name in enumerate(names):
        track = write_track(exp / "data" / "test" / name, seconds, seed=number)
        write_scores(exp / "eval", name, number + shift, int(seconds), track, method)
        if saved == -1 or number < saved:
            write_estimates(exp / "eval" / name, track)
    return exp / "eval"


def write_scores(
    out: Path,
    name: str,
    level: float,
    frames: int,
    track: Path | None = None,
    method: str = "full",
) -> None:
    """Writes OUT/test/NAME.json, and with the folder of a track its record beside it."""
    (out / "test").mkdir(parents=True, exist_ok=True)
    dB = [level + (-9 if second == 2 else second % 3) for second in range(frames)]
    dB[-1] = float("nan")
    scored = [
        {"time": s, "duration": 1.0, "metrics": dict.fromkeys(METRICS, dB[s])}
        for s in range(frames)
    ]
    targets = [{"name": target, "frames": scored} for target in TARGETS]
    path = out / "test" / f"{name}.json"
    path.write_text(json.dumps({"targets": targets}), encoding="utf-8")
    if track:
        record = {
            "made_with": {"method": method, "checkpoint": "ab" * 32},
            "files": {f.name: [f.stat().st_size, 1] for f in track.iterdir()},
            "mixture_SDR": {target: {"median": -3.0, "mean": -3.0} for target in TARGETS},
            "saved": "PCM_16",
            "version": "1.0.0",
        }
        text = yaml.safe_dump(record, allow_unicode=True)
        path.with_suffix(".yml").write_text(text, encoding="utf-8")


def write_estimates(folder: Path, track: Path) -> None:
    folder.mkdir(parents=True)
    mixture, _ = sf.read(track / "mixture.wav")
    vocals, _ = sf.read(track / "vocals.wav")
    noise = np.random.default_rng(0).normal(0, 0.01, vocals.shape)
    sf.write(folder / "vocals.wav", vocals + noise, RATE)
    sf.write(folder / "accompaniment.wav", mixture - vocals - noise, RATE)
