"""A tiny corpus in the layout of MUSDB18-HQ, and how tests run the commands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import stempeg
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RATE = 8000
TRAIN_NAMES = (
    "M.E.R.C. Music - Knockout",
    'Clara & "Friends" - L\'été',
    "Leaf - Summerghost",
    "Zeno - Signs",
)
TEST_NAMES = ("AM Contra - Heart Peripheral", "Triviul feat. The Fiend - Widow")
TINY_RUN = [
    *["--N", "16", "--L", "16", "--B", "8", "--H", "16", "--X", "2", "--R", "1"],
    *["--sample_rate", str(RATE), "--segment", "0.5", "--samples_per_track", "4"],
    *["--epochs", "1", "--num_workers", "0", "--aggregate", "1"],
]


def make_stems(seconds: float, rate: int, seed: int) -> dict[str, np.ndarray]:
    """Four stereo stems and their mixture, (T, 2) int16; the voice is easy to tell apart."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = rng.uniform(300, 400)
    tones = {"vocals": pitch, "bass": pitch / 8, "other": 3.1 * pitch}
    stems = {name: 0.1 * np.sin(2 * np.pi * pitch * time) for name, pitch in tones.items()}
    stems["drums"] = 0.2 * rng.standard_normal(len(time)) * np.exp(-20 * (time % 0.25))
    panned = {name: np.stack([x, rng.uniform(0.5, 0.9) * x], axis=1) for name, x in stems.items()}
    noisy = {name: x + rng.normal(0, 1e-3, x.shape) for name, x in panned.items()}
    stems = {
        name: np.rint(x * 32768).clip(-8000, 8000).astype(np.int16) for name, x in noisy.items()
    }
    return {"mixture": sum(stems.values()), **stems}


def write_track(folder: Path, seconds=1.5, rate=RATE, suffix="wav", seed=0) -> Path:
    folder.mkdir(parents=True)
    for name, audio in make_stems(seconds, rate, seed).items():
        sf.write(folder / f"{name}.{suffix}", audio, rate)
    return folder


def write_corpus(root: Path, suffix="wav") -> Path:
    for seed, name in enumerate(TRAIN_NAMES):
        write_track(root / "train" / name, 1.5 + 0.1 * seed, suffix=suffix, seed=seed)
    for seed, name in enumerate(TEST_NAMES, start=100):
        write_track(root / "test" / name, 2.3, suffix=suffix, seed=seed)
    return root


# run.sh would otherwise make and fill another environment.
needs_venv = pytest.mark.skipif(
    not (ROOT / ".venv").is_dir(), reason="no .venv, so these tests were not started by run.sh"
)


def copy_project(folder: Path) -> Path:
    """Copies what git has or would take of the project, and links its environment."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if (ROOT / ".venv").is_dir():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A corpus that no test changes."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def own_corpus(corpus, tmp_path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def experiment(corpus, tmp_path_factory) -> Path:
    """A run of train.py on the corpus that no test changes."""
    exp_dir = tmp_path_factory.mktemp("exp") / "run"
    result = run_command(
        "train.py", "--exp_dir", exp_dir, "--root", corpus, *TINY_RUN, "--epochs", "3"
    )
    assert result.returncode == 0, result.stderr
    return exp_dir


@pytest.fixture(scope="session")
def excerpts(tmp_path_factory) -> Path:
    """A real, tiny MUSDB18: where shared is absent, the excerpt inside stempeg for both splits."""
    shipped = SHARED / "data" / "musdb18_excerpts"
    if shipped.is_dir():
        return shipped
    root = tmp_path_factory.mktemp("excerpts")
    for split in ("train", "test"):
        (root / split).mkdir()
        shutil.copy(stempeg.example_stem_path(), root / split)
    return root


needs_golden = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the golden files in ../shared are not here"
)


def load_golden(name: str) -> tuple[dict, dict, dict]:
    """(metadata, tensors, the model's state dict) of a golden file."""
    with safe_open(SHARED / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    return metadata, tensors, state


def write_times(folder: Path) -> dict[Path, int]:
    """When everything below a folder was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def run_python(*args, cwd: Path | None = ROOT) -> subprocess.CompletedProcess:
    """Runs this Python in a process of its own."""
    command = [sys.executable, *map(str, args)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)


def run_command(script: str, *args, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a script of this project, from any folder."""
    return run_python(ROOT / script, *args, cwd=cwd)


@pytest.fixture
def error_of(capsys):
    """Runs a command's main; returns its error, after checking how it was reported."""

    def run(main, *args) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        assert ": error: " in error
        assert "Traceback" not in error
        return error

    return run
