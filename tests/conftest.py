"""A tiny corpus in the layout of MUSDB18-HQ, and how tests run the commands."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from forkserver import ForkedProcess, ForkServer
from hypothesis import strategies as st
from safetensors import safe_open

from local.tasnet import ConvTasNetStereo

# One thread per process, here and in what tests start: more would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}  # before tests change it
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
GOLDEN = ROOT / "tests" / "golden"  # what the published code computes
RATE = 8000
TRAIN_NAMES = (
    "M.E.R.C. Music - Knockout",
    'Clara & "Friends" - L\'été',
    "Leaf - Summerghost",
    "Zeno - Signs",
)
TEST_NAMES = ("AM Contra - Heart Peripheral", "Triviul feat. The Fiend - Widow")
# A value for each key of conf.yml that a result or a message depends on, since its defaults may be
# edited. Those that were published are checked by test_published.
FIXED = [
    *["--P", "3", "--C", "2", "--audio_channels", "2", "--norm_type", "gLN", "--causal", "no"],
    *["--mask_nonlinear", "relu", "--mix_background", "yes", "--suffix", "auto"],
    *["--batch_size", "4", "--lr", "0.0005", "--half_lr", "yes", "--early_stop", "yes"],
    *["--seed", "0", "--precision", "32-true", "--compile", "auto", "--memory", "some"],
    *["--fast", "auto", "--valid_method", "full", "--max_valid_tracks", "-1", "--max_steps", "-1"],
    *["--max_skipped_steps", "100", "--checkpoint_every", "30 min", "--lr_patience", "5"],
    *["--patience", "20", "--keep_best", "10", "--loss", "l1", "--clip_norm", "5", "--ema", "0"],
    *["--examples", "0", "--optimizer", "adam", "--weight_decay", "0", "--mix_tracks", "yes"],
    *["--gain_min", "0.25", "--gain_max", "1.25", "--swap", "0.5"],
]
TINY_RUN = [
    *["--N", "16", "--L", "16", "--B", "8", "--H", "16", "--X", "2", "--R", "1"],
    *["--sample_rate", str(RATE), "--segment", "0.5", "--samples_per_track", "4"],
    *["--epochs", "1", "--num_workers", "0", "--aggregate", "1", *FIXED],
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


# For a script: the most memory that its process has held, in MB. ru_maxrss would include what
# pytest held when it started the process.
PEAK_MB = "int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) / 1024"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


def write_flac_of_unknown_length(path: Path) -> None:
    """A second, as ffmpeg writes it to a pipe."""
    command = f"ffmpeg -v error -f lavfi -i sine=sample_rate={RATE}:duration=1 -ac 2 -f flac -"
    path.write_bytes(subprocess.run(command.split(), capture_output=True, check=True).stdout)


def write_song(path: Path, rate=16000, channels=2, seconds=0.7, seed=0) -> np.ndarray:
    """Writes what its suffix says, and returns its (T, channels) samples before any coding."""
    audio = make_stems(seconds, rate, seed)["mixture"] / 32768
    audio = np.resize(audio.T, (channels, len(audio))).T
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path.with_suffix(".wav"), audio, rate, "FLOAT")
    if path.suffix != ".wav":
        convert = ["ffmpeg", "-v", "error", "-y", "-i", path.with_suffix(".wav"), path]
        subprocess.run(convert, check=True)
        path.with_suffix(".wav").unlink()
    return audio.astype(np.float32)


slow = pytest.mark.skipif(
    "RECIPE_SLOW_TESTS" not in os.environ,
    reason="takes minutes; RECIPE_SLOW_TESTS=1 in the environment runs it",
)

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="no onnx, onnxscript and onnxruntime: see requirements.txt",
)

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
    import stempeg  # refuses to be imported where there is no ffmpeg

    root = tmp_path_factory.mktemp("excerpts")
    for split in ("train", "test"):
        (root / split).mkdir()
        shutil.copy(stempeg.example_stem_path(), root / split)
    return root


# Not to be copied: museval's scores and the excerpts have licenses of their own.
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(),
    reason="the published scores, excerpts and specification in ../shared are not here",
)


def load_golden(name: str) -> tuple[dict, dict, dict]:
    """(metadata, tensors, the model's state dict) of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    return metadata, tensors, state


def load_golden_model(name: str) -> tuple[ConvTasNetStereo, dict]:
    """(model in eval mode, tensors) of a golden file."""
    metadata, tensors, state = load_golden(name)
    model = ConvTasNetStereo(**json.loads(metadata["config"])).eval()
    model.load_state_dict(state)
    return model, tensors


@functools.cache
def read_lift() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(signals (2, T) of a lift by the challenge's libraries at 44,100 Hz, facts on them)."""
    with safe_open(GOLDEN / "lift.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def model_confs(**kinds: st.SearchStrategy) -> st.SearchStrategy:
    """Arguments of small models. `kinds` says at least which are causal, and their norms."""
    sizes = dict(
        N=st.integers(1, 12),
        L=st.integers(2, 21),
        B=st.integers(1, 12),
        H=st.integers(1, 12),
        P=st.sampled_from([1, 3, 5]),
        X=st.integers(1, 4),
        R=st.integers(1, 2),
        C=st.integers(1, 4),
        audio_channels=st.integers(1, 3),
        mask_nonlinear=st.sampled_from(["relu", "softmax"]),
    )
    return st.fixed_dictionaries({**sizes, **kinds})


def random_model(conf: dict) -> ConvTasNetStereo:
    """A model in eval mode whose batch norms have seen something."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "causal with norm_type gLN")
        model = ConvTasNetStereo(**conf).eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(norm.running_mean)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


@torch.no_grad()
def forward(model: ConvTasNetStereo, mixture: torch.Tensor) -> torch.Tensor:
    """What the model makes of a whole (audio_channels, T) mixture."""
    return model(mixture[None])[0]


@pytest.fixture(scope="module")
def one_thread():
    """For tests of small models: on a busy machine threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads():
    """For tests of the compiler, whose gradients are wrong on one thread of a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def make_record(**changes) -> dict:
    """What eval.py says of the making of a track's scores."""
    made_with = {"checkpoint": "0" * 64, "method": "full", "scorer": "bsseval"}
    return {"made_with": made_with, "files": {"mixture.wav": [1, 2]}, "saved": None, **changes}


def write_times(folder: Path) -> dict[Path, int]:
    """When everything below a folder was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer(ENVIRONMENT)


def start_python(
    *args,
    own_process: bool = False,
    cwd: Path | None = ROOT,
    env: dict | None = None,
    preexec_fn=None,
    **options,
) -> subprocess.Popen | ForkedProcess:
    """Starts Python as a process that Ctrl-C interrupts; its other options are those of Popen.

    It is forked after the slow imports where that makes no difference: see tests/forkserver.py.
    With `own_process` it is a new Python, as tests need that look at imports, at the peak memory,
    at names of processes, or at a command from its very start to its end.
    """
    args = list(map(str, args))
    options = {"text": True, **options}
    # Without what libraries have set in this process since.
    own = {name: value for name, value in (env or {}).items() if os.environ.get(name) != value}
    env = {**ENVIRONMENT, **own}
    forks = sys.platform == "linux" and not own_process and preexec_fn is None
    if forks and fork_server().can_run(args, env):
        return fork_server().start(args, cwd=cwd or Path.cwd(), env=env, **options)
    options["preexec_fn"] = preexec_fn or reset_signals
    return subprocess.Popen([sys.executable, *args], cwd=cwd, env=env, **options)


def run_python(
    *args, cwd: Path | None = ROOT, own_process: bool = False, **variables
) -> subprocess.CompletedProcess:
    """Runs Python to its end, with more variables in its environment: see `start_python`."""
    process = start_python(
        *args,
        own_process=own_process,
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        stdout, stderr = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_command(
    script: str, *args, cwd: Path | None = None, **options
) -> subprocess.CompletedProcess:
    """Runs a script of this project, from any folder."""
    return run_python(ROOT / script, *args, cwd=cwd, **options)


def imitate_slurm(folder: Path, status: int = 0) -> dict[str, str]:
    """Makes a `scontrol` that notes its arguments in FOLDER/asked, and ends with a status.

    Returns:
        the variables of a process that srun has started.
    """
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    note = f'echo "$@" >>"{folder}/asked"; echo disabled >&2; exit {status}'
    scontrol.write_text(f"#!/bin/sh\n{note}")
    scontrol.chmod(0o755)
    ranks = dict(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    job = dict(SLURM_JOB_ID="7", SLURM_JOB_NAME="a", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="1")
    return {**ranks, **job, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}


def reset_signals() -> None:
    """For a child process: a background job of a shell ignores Ctrl-C, one under nohup a closed
    terminal, and so do their children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start_training(
    exp_dir: Path, *flags, until=None, **options
) -> subprocess.Popen | ForkedProcess:
    """Starts train.py; returns when the run has a model, or when `until` says so."""
    until = until or (exp_dir / "best_model.pth").exists
    options = {"cwd": None, "stderr": subprocess.PIPE, **options}
    process = start_python(ROOT / "train.py", "--exp_dir", exp_dir, *flags, **options)
    deadline = time.monotonic() + 120
    while not until() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


@pytest.fixture
def with_bf16(monkeypatch) -> None:
    """As on a CPU with instructions for bf16; others compute the same, slower."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


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
