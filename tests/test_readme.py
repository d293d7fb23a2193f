"""The READMEs: every command and example is run, on a tiny data set where it would take days."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import stempeg
import torch
from conftest import (
    RATE,
    ROOT,
    TINY_RUN,
    TRAIN_NAMES,
    copy_project,
    forward,
    make_stems,
    needs_onnx,
    needs_venv,
    random_model,
    slow,
    write_corpus,
    write_song,
    write_track,
)
from test_scenes import needs_compressor, write_package

from local.checkpoint import load_model
from local.eval.results import METRICS
from local.share.onnx_file import export_onnx

READMES = {
    path: (ROOT / path).read_text(encoding="utf-8")
    for path in ("README.md", "local/README.md", "tests/README.md")
}
HUB_MODEL = dict(N=8, L=20, B=8, H=8, X=2, R=1, C=2, audio_channels=2, samplerate=RATE)
HUB = "cadenzachallenge/ConvTasNet_LyricsSeparation_"


def blocks(language: str) -> list[str]:
    found = (re.findall(rf"```{language}\n(.*?)```", t, re.DOTALL) for t in READMES.values())
    return [block for of_one in found for block in of_one]


def commands() -> list[str]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return list(dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip()))


TINY_BENCHMARK = "--repeats 1 --X 1 --R 1 --N 8".split()

# What is added to a command so that it ends within seconds.
SMALLER = {
    "./run.sh": ["--epochs", "1", "--samples_per_track", "1"],
    "./run.sh test": ["--collect-only", "tests/test_inference.py"],
    "./run.sh test -m": ["--collect-only"],
    "./run.sh --root": TINY_RUN,
    "pip": ["--dry-run"],
    "python train.py": TINY_RUN,
    "torchrun": [
        *TINY_RUN,
        *"--accelerator cpu --num_nodes 1 --devices 2 --valid_tracks two.txt".split(),
    ],
    "torchrun --nproc_per_node 4 eval.py": [],
    "python eval.py": [],
    "python -m local.compare": [],
    "python -m local.page": [],
    "python -m local.publish": [],
    "python -m local.score": [],
    "python -m local.separate": [],
    "python -m local.enhance": [],
    "python -m local.enhance --scenes": [],
    "python tests/benchmark.py separate": ["--lengths", "0.1", "--longest", "0", *TINY_BENCHMARK],
    "python tests/benchmark.py stream": ["--seconds", "0.3", "--blocks", "5", *TINY_BENCHMARK[2:]],
    "python tests/benchmark.py train": ["--seconds", "0.1", "--compile", "no", *TINY_BENCHMARK],
    "python tests/benchmark.py load": ["--seconds", "0.5", "--items", "8"],
    "python tests/benchmark.py score": "--lengths 1 --repeats 1 --tracks 2".split(),
    "ffmpeg": [],
    "python -m local.stems": [],
    "python -m local.export": [],
    "python -m local.convert": ["--sample_rate", str(RATE)],
    "python -m local.demo_musdb18": ["--seconds", "3", "--tracks", "1"],
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, experiment) -> Path:
    """A copy of the project with MUSDB18 in it, and what the hub's client would have fetched."""
    folder = copy_project(tmp_path_factory.mktemp("readme") / "checkout")
    write_corpus(folder / "MUSDB18")
    write_corpus(folder / "OWN")
    for split, name in {"train": "Pair", "valid": "Other pair"}.items():
        stems = write_track(folder / "PAIRS" / split / name)
        (stems / "other.wav").rename(stems / "instrumental.wav")
        for left in ("bass.wav", "drums.wav", "mixture.wav"):
            (stems / left).unlink()
    (folder / "two.txt").write_text("\n".join(TRAIN_NAMES[:2]), encoding="utf-8")
    for number, name in enumerate(["SONG.mp3", "SONGS/one.mp3", "SONGS/two.mp3"]):
        (folder / "SONGS").mkdir(exist_ok=True)
        write_song(folder / name, seed=number)
    hub = {"NonCausal": load_model(experiment / "best_model.pth")}
    hub["Causal"] = random_model({**HUB_MODEL, "causal": True, "norm_type": "cLN"})
    for kind, model in hub.items():
        repository = folder / "hub" / f"models--{(HUB + kind).replace('/', '--')}"
        model.save_pretrained(repository / "snapshots" / "1")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("1")
    return folder


def run(words: list[str], checkout: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_CACHE": str(checkout / "hub"), "HF_HUB_OFFLINE": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run(
        words, cwd=checkout, env=env, capture_output=True, text=True, timeout=1200
    )


def find_marks(command: str) -> list[pytest.MarkDecorator]:
    # test_benchmark.py measures the same in its own process.
    marks = {"./run.sh": needs_venv, "python tests/benchmark.py": slow}
    marks["python -m local.enhance --scenes"] = needs_compressor
    marks["python -m local.export"] = needs_onnx
    return [mark for start, mark in marks.items() if command.startswith(start)]


@pytest.mark.parametrize(
    "command", [pytest.param(command, marks=find_marks(command)) for command in commands()]
)
def test_the_command_works(command, checkout, experiment, tmp_path):
    kind = max((kind for kind in SMALLER if command.startswith(kind)), key=len)
    if kind == "ffmpeg":
        words = ["bash", "-o", "pipefail", "-c", command]
    else:
        words = shlex.split(command) + SMALLER[kind]
    if words[0] == "pip":
        words[:1] = ["python", "-m", "pip"]
    words = [re.sub("^EXP", str(tmp_path / "exp"), word) for word in words]
    if "--use_gpu" in words:
        words[words.index("--use_gpu") + 1] = "0"  # there may be none
    if kind == "torchrun --nproc_per_node 4 eval.py":
        words[2] = "2"
    if kind == "torchrun":  # on one machine
        words[1:5] = ["--nnodes", "1", "--nproc_per_node", "2"]
        words[words.index("HOST:29500")] = "localhost:0"
    if "EXP" in command and "train.py" not in command:
        shutil.copytree(experiment, tmp_path / "exp")
    if kind == "python -m local.stems":
        (tmp_path / "MUSDB18" / "train").mkdir(parents=True)
        shutil.copy(stempeg.example_stem_path(), tmp_path / "MUSDB18" / "train")
        words = [str(tmp_path / w) if w.startswith("MUSDB18") else w for w in words]
    if kind == "python -m local.enhance --scenes":
        write_package(tmp_path / "METADATA", tmp_path / "AUDIO")
        random_model({**HUB_MODEL, "samplerate": 44100}).save_pretrained(tmp_path / "model")
        words = [str(tmp_path / w) if w in ("METADATA", "AUDIO", "DIR") else w for w in words]
        words[words.index(str(tmp_path / "exp/best_model.pth"))] = str(tmp_path / "model")
    if kind == "python -m local.score":
        for number, track in enumerate((checkout / "MUSDB18" / "test").iterdir()):
            write_track(tmp_path / "exp" / "OUT" / track.name, seconds=2.3, seed=number)
        words[-1] = str(tmp_path / "scores")
    if kind in ("python -m local.compare", "python -m local.page"):
        scores = {
            "targets": [{"name": "vocals", "frames": [{"metrics": dict.fromkeys(METRICS, 6)}]}]
        }
        for run_name in ("OUT", "OUT-full", "START"):
            (tmp_path / "exp" / run_name / "test").mkdir(parents=True)
            (tmp_path / "exp" / run_name / "test" / "A.json").write_text(json.dumps(scores))
    if kind == "python -m local.demo_musdb18":
        words[words.index("data/demo")] = str(tmp_path / "demo")

    result = run(words, checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    if kind == "./run.sh":
        assert "The Easton Ellises - Falcon 69" in result.stdout
        assert (checkout / "exp" / "demo" / "eval" / "results.txt").is_file()
    if kind == "pip":
        assert "Would install" not in result.stdout


def test_the_python_examples_work(checkout):
    (mixture,) = checkout.glob("MUSDB18/test/AM*/mixture.wav")
    shutil.copy(mixture, checkout / "mixture.wav")
    # Of the stream, the last block is left: what the 9,999 frames of 100,000 samples do not end.
    lengths = (sf.info(mixture).frames, 10, 4000)
    examples = [block for block in blocks("python") if "import onnxruntime" not in block]
    for example, samples in zip(examples, lengths, strict=True):
        small = example.replace("44100", str(RATE)).replace("220_500", "4000")
        code = small + "\nprint(*vocals.shape, *accompaniment.shape)"
        (checkout / "example.py").write_text(code)
        result = run([sys.executable, "example.py"], checkout)
        assert result.stdout == f"2 {samples} 2 {samples}\n", result.stderr


@needs_onnx
def test_the_example_without_pytorch_works(checkout, tmp_path):
    (example,) = [block for block in blocks("python") if "import onnxruntime" in block]
    assert len(example.splitlines()) <= 40
    model = load_model(next(checkout.glob("hub/*_Causal/snapshots/1")))
    export_onnx(next(checkout.glob("hub/*_Causal/snapshots/1")), tmp_path / "stream.onnx", True)
    for length in (20, 4001, 4010):
        mixture = make_stems(length / RATE, RATE, 0)["mixture"] / 32768
        sf.write(tmp_path / "mixture.wav", mixture, RATE, "FLOAT")
        code = f"import sys; sys.modules['torch'] = None\n{example}"
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
        assert result.returncode == 0, result.stderr
        written = [sf.read(tmp_path / f"{name}.wav")[0].T for name in ("vocals", "accompaniment")]
        mixture = torch.from_numpy(mixture.T).float()
        expected = forward(model, mixture).numpy()
        assert np.linalg.norm(written - expected) <= 1e-6 * np.linalg.norm(expected)


@needs_venv
def test_the_job_for_slurm_works(checkout, tmp_path):
    """With an srun that only looks; --signal without B: is for what srun starts."""
    (block,) = re.findall(r"```sh\n(.*?)```", READMES["local/README.md"], re.DOTALL)
    job = textwrap.dedent(block)
    options = shlex.split(" ".join(re.findall(r"^ *#SBATCH (.*)", block, re.MULTILINE)))
    assert {"--requeue", "--open-mode=append", "--signal=USR1@120"} < set(options)
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/sh\nshift; exec "$@" --check {shlex.join(TINY_RUN)}')
    srun.chmod(0o755)
    job = job.replace("srun", str(srun)).replace("baseline", "job")  # a run of its own
    (tmp_path / "slurm_script").write_text(job)
    result = run(["bash", str(tmp_path / "slurm_script")], checkout)
    assert result.returncode == 0, result.stderr
    assert "no fault was found" in result.stdout


def test_every_flag_they_name_exists():
    named = set(re.findall(r"`(--\w+)", "".join(READMES.values())))
    names = ("separate", "enhance", "compare", "publish", "page")
    modules = (["-m", f"local.{name}"] for name in names)
    commands = (["train.py"], ["eval.py"], *modules)
    helps = [run([sys.executable, *words, "--help"], ROOT).stdout for words in commands]
    helps.append(run([ROOT / "run.sh", "--help"], ROOT).stdout)
    assert named <= set(re.findall(r"--\w+", " ".join(helps)))


def find_anchors(text: str) -> set[str]:
    """Those that GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", READMES)
def test_every_link_leads_somewhere(path):
    links = re.findall(r"\]\((?!https://)([^)]*)\)", READMES[path])
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / path).parent / name if name else ROOT / path
        assert target.exists(), link
        assert not anchor or anchor in find_anchors(target.read_text(encoding="utf-8")), link


def test_the_map_has_a_line_for_every_file():
    tables, _, _ = READMES["local/README.md"].partition("| where is")
    named, folder = [], ""
    for row in re.findall(r"^\| (?:`(.*?)`)? ?\|", tables, re.MULTILINE):
        if row and not row.endswith("/"):
            named.append(f"{folder}{row}")
        else:
            folder = row
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("local/**/*.py")}
    files |= {"train.py", "eval.py", "run.sh", "conf.yml"}
    assert sorted(named) == sorted(name for name in files if not name.endswith("__init__.py"))


def test_what_the_map_finds_is_there():
    _, _, table = READMES["local/README.md"].partition("| where is")
    found = re.findall(r"`([\w.]+)`, ([\w/]+\.py)", table.partition("\n\n")[0])
    assert len(found) > 9
    for name, path in found:
        places = [place for place in (ROOT / "local" / path, ROOT / path) if place.exists()]
        assert name.split(".")[-1] in places[0].read_text(encoding="utf-8"), f"{name}, {path}"
