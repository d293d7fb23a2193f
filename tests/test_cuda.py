"""Every path on a GPU, held to the plain model on the CPU.

Imports only what a lent GPU machine has, and is to end there within 90 seconds.
"""

import copy
import csv
import functools
import gc
import math
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import RATE, TINY_RUN, random_model, run_command, start_training
from torch.utils.data import DataLoader, TensorDataset

from local.checkpoint import load_model
from local.fast.choose import (
    OLDEST,
    WITH_KERNELS,
    choose_forward,
    find_compiler_fault,
    find_kernel_fault,
)
from local.fast.equal import find_difference
from local.fast.graphed import GraphedForward
from local.fast.recompute import RecomputingForward
from local.fast.training import TrainingForward
from local.inference import separate
from local.needs import MOST_WINDOWS
from local.streaming import StreamingConvTasNet
from local.tasnet import NORM_TYPES, ConvTasNetStereo
from local.tools.choices import MEMORY
from local.tools.memory import free_gpu_memory
from local.train.checkpoints import list_last
from local.train.epochs import FreeCachedMemory

DEVICE = "cuda"
ACCELERATOR = "gpu"  # the same to Lightning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
needs_asteroid = pytest.mark.skipif(
    find_spec("asteroid") is None, reason="asteroid is not installed"
)

SIZES = dict(N=24, L=8, B=16, H=32, P=3, X=3, R=2, C=2, audio_channels=2, samplerate=1000)
DIRECTIONS = [pytest.param(False, id="non-causal"), pytest.param(True, id="causal")]
EVERY_MODEL = [(norm_type, causal) for norm_type in NORM_TYPES for causal in (False, True)]
STREAMED = [(norm_type, True) for norm_type in NORM_TYPES if norm_type != "gLN"]


@pytest.fixture(autouse=True)
def full_float32():
    """Neither products nor convolutions take TF32, and what was set before is set back."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


def make_model(norm_type: str, causal: bool, **sizes) -> ConvTasNetStereo:
    return random_model({**SIZES, **sizes, "norm_type": norm_type, "causal": causal})


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm of what is expected."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


# The training step

LOSS_SCALE = 1024.0  # as a GradScaler would, or small gradients vanish in fp16


def make_graphed(model: ConvTasNetStereo, memory: str) -> GraphedForward:
    return GraphedForward(TrainingForward(model, memory, kernels=True), model.parameters())


FORWARDS = {
    "plain": TrainingForward,
    "kernels": functools.partial(TrainingForward, kernels=True),
    "graphed": make_graphed,
}
BY_FORWARD = [
    pytest.param(norm_type, name, id=f"{norm_type}-{name}")
    for name, norm_types in (
        ("plain", NORM_TYPES),
        ("kernels", WITH_KERNELS),
        ("graphed", WITH_KERNELS),
    )
    for norm_type in norm_types
]


def choose_compiled(model: ConvTasNetStereo, memory: str) -> Callable:
    """As train.py does."""
    training = {"memory": memory, "compile": "auto", "fast": "yes"}
    forward, note = choose_forward(model, training, torch.device(DEVICE))
    has_kernels = not find_kernel_fault(model, torch.device(DEVICE))
    assert ("blocks run as Triton kernels, in CUDA graphs" in note) == has_kernels
    return forward


FORWARDS["compiled"] = choose_compiled


def skip_without_kernels(model: ConvTasNetStereo) -> None:
    if fault := find_kernel_fault(model, torch.device(DEVICE)):
        pytest.skip(f"the kernels do not run here: {fault}")


def take_step(model, batch, device, memory=None, forward="plain", autocast=None) -> dict:
    """Estimates, gradients and buffers after a step of the plain model, or with `memory` of one of
    FORWARDS, with a copy of the model on a device.
    """
    model = copy.deepcopy(model).to(device).train()
    if forward in ("kernels", "graphed"):
        skip_without_kernels(model)
    mixture, targets = (tensor.to(device) for tensor in batch)
    separate_batch = FORWARDS[forward](model, memory) if memory else model
    with torch.autocast(device, autocast, enabled=autocast is not None):
        estimates = separate_batch(mixture)
        loss = LOSS_SCALE * F.l1_loss(estimates, targets)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    return {
        "estimates": estimates.detach(),
        "gradients": torch.cat(gradients),
        "buffers": dict(model.named_buffers()),
    }


def make_batch(items: int, time: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(items, 2, 2, time, generator=generator)
    return torch.randn(items, 2, time, generator=generator), targets


def take_exact_step(model, batch) -> dict:
    """That of the plain model on the CPU in float64."""
    return take_step(copy.deepcopy(model).double(), [tensor.double() for tensor in batch], "cpu")


@functools.cache
def small_steps(norm_type: str, causal: bool, **sizes) -> tuple[ConvTasNetStereo, list]:
    """(model, three pairs of a batch and its exact step)."""
    model = make_model(norm_type, causal, **sizes)
    batches = [make_batch(3, 500, seed) for seed in range(3)]
    return model, [(batch, take_exact_step(model, batch)) for batch in batches]


@functools.cache
def large_step(norm_type: str, causal: bool) -> tuple[ConvTasNetStereo, tuple, dict]:
    """(model, batch, its exact step)."""
    model, batch = make_model(norm_type, causal), make_batch(8, 4000)
    return model, batch, take_exact_step(model, batch)


def assert_steps_agree(found: list[dict], expected: list[dict]) -> None:
    """Holds steps in float32 to those in float64.

    Where a PReLU, a ReLU or the L1 loss is next to its kink, rounding decides on a sign, and that
    moves the gradients by 1e-3. It happens to a batch in fifty, so the nearest of three counts.
    """
    pairs = list(zip(found, expected, strict=True))
    for one, other in pairs:
        assert one["estimates"].dtype == torch.float32
        assert error(one["estimates"], other["estimates"]) < 1e-5
        for name, buffer in other["buffers"].items():  # the statistics of BN
            values = one["buffers"][name].cpu().to(buffer.dtype)
            torch.testing.assert_close(values, buffer, rtol=1e-5, atol=1e-6)
    assert min(error(one["gradients"], other["gradients"]) for one, other in pairs) < 1e-4


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("causal", DIRECTIONS)
@pytest.mark.parametrize(("norm_type", "forward"), BY_FORWARD)
def test_a_step_in_float32_is_that_of_the_cpu(norm_type, forward, causal, memory):
    model, pairs = small_steps(norm_type, causal)
    found = [take_step(model, batch, DEVICE, memory, forward) for batch, _ in pairs]
    assert_steps_agree(found, [expected for _, expected in pairs])


@pytest.mark.parametrize(("norm_type", "causal"), EVERY_MODEL)
def test_the_plain_model_is_that_of_the_cpu(norm_type, causal):
    model, pairs = small_steps(norm_type, causal)
    found = [take_step(model, batch, DEVICE) for batch, _ in pairs]
    assert_steps_agree(found, [expected for _, expected in pairs])


def test_the_fast_formulas_are_known_to_equal_a_model_on_a_gpu():
    model = make_model("BN", True).to(DEVICE).train()
    before, state = torch.cuda.get_rng_state(), copy.deepcopy(model.state_dict())
    assert find_difference(model, training=True) == ""
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("memory", MEMORY)
def test_an_edited_model_trains_on_a_gpu_as_edited(memory):
    """Through the model itself, in which dropout drops the same when a block is computed again."""
    model = make_model("BN", False).to(DEVICE).train()
    for module in model.modules():
        if isinstance(module, torch.nn.PReLU):
            module.forward = functools.partial(F.dropout, p=0.2)
    assert find_difference(model, training=True)
    steps = []
    for make in (lambda model: model, lambda model: RecomputingForward(model, memory)):
        copied = copy.deepcopy(model)
        torch.cuda.manual_seed(0)
        estimates = make(copied)(make_mixture(900)[None].to(DEVICE))
        estimates.square().mean().backward()
        grads = [p.grad for p in copied.parameters() if p.grad is not None]
        steps.append([estimates.detach(), *grads, *copied.buffers()])
    for expected, found in zip(*steps, strict=True):
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("norm_type", WITH_KERNELS)
def test_the_kernels_work_here(norm_type):
    if torch.version.hip or torch.cuda.get_device_capability() < OLDEST or not find_spec("triton"):
        pytest.skip("the kernels need a GPU of NVIDIA, Ampere or later, and Triton")
    model = make_model(norm_type, False).to(DEVICE)
    assert find_kernel_fault(model, torch.device(DEVICE)) == ""


@pytest.fixture
def graphed() -> tuple[ConvTasNetStereo, GraphedForward]:
    model = make_model("gLN", False).to(DEVICE).train()
    skip_without_kernels(model)
    return model, make_graphed(model, "some")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_graphs_follow_batches_and_weights(graphed, autocast):
    """Of two shapes, with gradients that add up over two batches, and a part that is frozen."""
    model, forward = graphed
    other = copy.deepcopy(model)
    eager = TrainingForward(other, "some", kernels=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for number, time in enumerate([500, 500, 500, 500, 400, 500, 500, 500]):
        mixture, targets = (tensor.to(DEVICE) for tensor in make_batch(2, time, number))
        for separate_batch in (forward, eager):
            with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
                estimates = separate_batch(mixture)
                F.mse_loss(estimates, targets).backward()
        for one, expected in zip(model.parameters(), other.parameters(), strict=True):
            assert (one.grad is None) == (expected.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, expected.grad, rtol=1e-4, atol=1e-5)
        if number % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if number == 5:
            for m in (model, other):
                m.encoder.requires_grad_(False)


def test_a_graph_refuses_what_it_would_compute_wrongly(graphed):
    _, forward = graphed
    first, second = (forward(make_batch(2, 500, seed)[0].to(DEVICE)) for seed in range(2))
    with pytest.raises(RuntimeError, match="--compile no"):
        first.sum().backward()
    loss = second.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="--compile no"):
        loss.backward()


def test_the_memory_of_graphs_is_given_back(graphed):
    model, forward = graphed
    mixture = make_batch(8, 20_000)[0].to(DEVICE)
    forward(mixture).sum().backward()  # what libraries take is theirs from now on
    forward.release()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    forward(mixture).sum().backward()
    held = torch.cuda.memory_reserved() - before
    forward.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 0.1 * held
    with torch.no_grad():
        expected = model(mixture)
    assert error(forward(mixture).detach(), expected) < 1e-5


@pytest.mark.usefixtures("finish")  # the runs below are under way while this compiles
@pytest.mark.parametrize("norm_type", ["gLN", "BN"])  # with kernels, and with none
def test_a_compiled_step_is_that_of_the_cpu(norm_type):
    if fault := find_compiler_fault(torch.device(DEVICE)):
        pytest.skip(f"torch.compile does not work here: {fault}")
    model, pairs = small_steps(norm_type, False, X=1, R=1)
    found = [take_step(model, batch, DEVICE, "some", "compiled") for batch, _ in pairs]
    assert_steps_agree(found, [expected for _, expected in pairs])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("norm_type", "forward"), BY_FORWARD)
def test_autocast_is_as_near_to_float32_as_the_plain_model_under_it(
    norm_type, forward, dtype, memory
):
    # In few frames a handful of signs, on which rounding decides, would make all the difference.
    model, batch, expected = large_step(norm_type, norm_type == "cLN")
    plain = take_step(model, batch, DEVICE, autocast=dtype)
    found = take_step(model, batch, DEVICE, memory, forward, dtype)
    assert found["estimates"].dtype == torch.float32
    for name in ("estimates", "gradients"):
        # Below the first limit it was not autocast's dtype that was computed in.
        assert 1e-5 < error(found[name], expected[name]) < 2 * error(plain[name], expected[name])


@pytest.mark.parametrize(("norm_type", "forward"), BY_FORWARD)
def test_tf32_is_nearer_to_float32_than_the_plain_model_in_bf16(norm_type, forward):
    model, batch, expected = large_step(norm_type, norm_type == "cLN")
    plain = take_step(model, batch, DEVICE, autocast=torch.bfloat16)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    found = take_step(model, batch, DEVICE, "some", forward)
    for name in ("estimates", "gradients"):
        assert error(found[name], expected[name]) < error(plain[name], expected[name])


# Separation

LENGTH = 140_001  # more than the 32768 frames of a tile, and no whole number of frames


def make_mixture(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(2, length, generator=torch.Generator().manual_seed(7))


@functools.cache
def whole_song(norm_type: str, causal: bool) -> tuple[ConvTasNetStereo, torch.Tensor]:
    """(model, what it makes of the whole mixture on the CPU in float64)."""
    model = make_model(norm_type, causal, N=16, B=8, H=16, X=2, R=1)
    with torch.no_grad():
        return model, copy.deepcopy(model).double()(make_mixture()[None].double())[0]


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize(
    ("method", "norm_type", "causal"),
    [("full", *model) for model in EVERY_MODEL] + [("stream", *model) for model in STREAMED],
)
def test_a_whole_song_is_separated_as_by_the_model_on_the_cpu(method, norm_type, causal, place):
    model, expected = whole_song(norm_type, causal)
    mixture = make_mixture().to(place)
    estimates = separate(copy.deepcopy(model).to(DEVICE), mixture, method)
    assert estimates.device == mixture.device
    assert estimates.dtype == torch.float32
    assert error(estimates, expected) < 1e-5


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_overlap_add_takes_several_windows_and_gives_what_the_cpu_gives(norm_type):
    model, _ = whole_song(norm_type, norm_type == "cLN")
    mixture, on_device, batches = make_mixture(), copy.deepcopy(model).to(DEVICE), []
    on_device.register_forward_pre_hook(lambda model, args: batches.append(len(args[0])))
    estimates = separate(on_device, mixture, "overlap-add", segment=20.0)
    exact = copy.deepcopy(model).double()
    expected = separate(exact, mixture.double(), "overlap-add", segment=20.0, fast="no")
    assert max(batches) == MOST_WINDOWS
    assert sum(batches) == 7
    assert estimates.device == mixture.device
    assert error(estimates, expected) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("norm_type", WITH_KERNELS)
def test_windows_are_separated_by_the_kernels(norm_type, precision, monkeypatch):
    from local.fast import gpu

    model, _ = whole_song(norm_type, norm_type == "cLN")
    on_device, calls = copy.deepcopy(model).to(DEVICE), []
    skip_without_kernels(on_device)

    def forward(*args):
        calls.append(args)
        return gpu.forward(*args)

    mixture, settings = make_mixture(), ("overlap-add", 20.0)
    expected = separate(copy.deepcopy(model).double(), mixture.double(), *settings, fast="no")
    monkeypatch.setattr(gpu, "PASSES", gpu.PASSES._replace(forward=forward))
    for length in (LENGTH, 20_001, 5, 0):
        found = separate(on_device, mixture[:, :length], *settings, precision=precision)
        if length == LENGTH:
            assert error(found, expected) < (1e-5 if precision == "float32" else 2e-2)
    found = separate(on_device.double(), mixture.double(), *settings)
    assert error(found, expected) < 1e-9  # not by the kernels, whose sums are in float32
    assert calls


def test_windows_are_separated_in_the_memory_that_is_left(monkeypatch):
    """One by one here, with what they give together."""
    model, _ = whole_song("gLN", False)
    mixture, on_device, batches = make_mixture(), copy.deepcopy(model).to(DEVICE), []
    on_device.register_forward_pre_hook(lambda model, args: batches.append(len(args[0])))
    together = separate(on_device, mixture, "overlap-add", segment=20.0)
    del batches[:]
    monkeypatch.setattr("local.needs.free_gpu_memory", lambda device: 1)
    one_by_one = separate(on_device, mixture, "overlap-add", segment=20.0)
    assert batches == [1] * 7
    assert error(one_by_one, together) < 1e-5


def test_memory_that_torch_holds_for_later_is_free(monkeypatch):
    # Of the device itself, since other processes take and leave some meanwhile.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    gc.collect()
    torch.cuda.empty_cache()
    before, block = free_gpu_memory(DEVICE), torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    assert free_gpu_memory(DEVICE) == before
    del block
    assert free_gpu_memory(DEVICE) == before + 2**28


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize(("norm_type", "causal"), STREAMED)
def test_blocks_of_any_sizes_join_to_what_the_model_on_the_cpu_makes(norm_type, causal, place):
    model, expected = whole_song(norm_type, causal)
    stream = StreamingConvTasNet(copy.deepcopy(model).to(DEVICE))
    sizes = [1, 2, 3, 997, 4096, 20_000]
    blocks = make_mixture().to(place).split([*sizes, LENGTH - sum(sizes)], dim=-1)
    pieces = [*map(stream.push, blocks), stream.flush()]
    assert all(piece.device.type == DEVICE for piece in pieces)
    assert error(torch.cat(pieces, dim=-1), expected) < 1e-5


# Runs of train.py, each in a Python of its own: what the fork server imports isn't all there

RUN = [*TINY_RUN, "--accelerator", ACCELERATOR, "--devices", "1", "--compile", "no"]
RUN += ["--samples_per_track", "16", "--batch_size", "4"]  # 12 steps an epoch


def train(exp_dir: Path, corpus: Path, *flags) -> None:
    command = ["train.py", "--exp_dir", exp_dir, "--root", corpus, *RUN, *flags]
    result = run_command(*command, own_process=True)
    assert result.returncode == 0, result.stderr


def train_with_an_interrupt(exp_dir: Path, corpus: Path, *flags) -> None:
    """Ctrl-C comes as soon as there is a checkpoint of the third step, or a later one."""
    checkpoints = exp_dir / "checkpoints"
    process = start_training(
        exp_dir,
        *["--root", corpus, *RUN, *flags, "--checkpoint_every", "1steps"],
        until=lambda: any(checkpoints.glob("last-epoch=0-step=[3-9].ckpt")),
        own_process=True,
        stdout=subprocess.DEVNULL,
    )
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, stderr
    train(exp_dir, corpus, *flags)


def train_and_extend(exp_dir: Path, corpus: Path, *flags) -> None:
    """Two epochs, of which a copy is kept, and then what the flags say."""
    train(exp_dir, corpus, "--epochs", "2")
    shutil.copytree(exp_dir, exp_dir.with_name("half"))
    train(exp_dir, corpus, *flags)


@pytest.fixture(scope="module")
def finish(corpus, tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """Waits for a run, by name, and returns its folder.

    All are started here and run side by side, since starting one takes longest.
    """
    root = tmp_path_factory.mktemp("runs")
    four = ["--epochs", "4"]
    with ThreadPoolExecutor() as pool:
        runs = {
            "undisturbed": pool.submit(train, root / "undisturbed", corpus, *four),
            "resumed": pool.submit(train_with_an_interrupt, root / "resumed", corpus, *four),
            "extended": pool.submit(train_and_extend, root / "extended", corpus, *four),
        }
        for precision in ("16-mixed", "bf16-mixed"):
            flags = ["--precision", precision]
            runs[precision] = pool.submit(train, root / precision, corpus, *flags)

        def finish_(name: str) -> Path:
            runs[name].result()
            return root / name

        yield finish_


def read_weights(exp_dir: Path) -> torch.Tensor:
    """All those of the newest checkpoint of a run, one after the other."""
    checkpoint = torch.load(list_last(exp_dir / "checkpoints")[0], "cpu", weights_only=True)
    state = checkpoint["state_dict"]
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def read_column(exp_dir: Path, name: str) -> list[float]:
    """What a run logged under a name."""
    with (exp_dir / "logs" / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@needs_asteroid
@pytest.mark.parametrize("name", ["resumed", "extended"])
def test_a_run_that_is_resumed_ends_near_an_undisturbed_one(finish, name):
    """Not at the same bits, since a GPU need not add in the same order twice.

    The measure is how far the last two epochs move the weights. On a CPU another order of adding
    leaves 5e-7 of that between two runs, all of bf16's rounding 1e-2, and a state of Adam that was
    lost 3e-1.
    """
    undisturbed, folder, extended = map(finish, ("undisturbed", name, "extended"))
    expected, found = read_weights(undisturbed), read_weights(folder)
    half = read_weights(extended.with_name("half"))
    assert (found - expected).norm() < 1e-2 * (half - expected).norm()
    losses = read_column(folder, "val_loss")
    assert losses == pytest.approx(read_column(undisturbed, "val_loss"), rel=1e-3)
    assert len(losses) == 4


@needs_asteroid
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_run_in_mixed_precision_ends_with_a_finite_loss(finish, precision):
    folder = finish(precision)
    (val_loss,) = read_column(folder, "val_loss")
    assert math.isfinite(val_loss)
    (skipped,) = read_column(folder, "skipped_steps")
    assert skipped < 12  # a scaler may look for its scale, but must find it


@needs_asteroid
def test_a_model_trained_on_a_gpu_separates_on_a_cpu_as_there(finish):
    model, mixture = load_model(finish("undisturbed") / "best_model.pth"), make_mixture(3 * RATE)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    on_cpu = separate(model, mixture, "full")
    assert on_cpu.norm() > 0
    assert error(separate(copy.deepcopy(model).to(DEVICE), mixture, "full"), on_cpu) < 1e-5


# Memory


class Reserved(pl.Callback):
    """Notes how many bytes torch holds of the GPU's memory: used, or cached for later."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after_training = torch.cuda.memory_reserved()

    # The system's own start of the epoch comes between that and this.
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.in_validation = torch.cuda.memory_reserved()


@needs_asteroid
def test_validation_does_not_hold_the_memory_of_training(tmp_path):
    from local.config import parse_conf
    from local.models import make_model
    from local.system import MusicSystem

    sizes = "--N 8 --L 8 --B 8 --H 256 --X 2 --R 1 --sample_rate 8000".split()
    conf = parse_conf(["--root", "X", *sizes, "--compile", "no", "--memory", "none"])
    model = make_model(conf)
    targets = torch.randn(8, 2, 2, 40_000)  # 80 MiB for each tensor inside a block
    short = targets[:1, ..., :800]
    system = MusicSystem(
        model,
        torch.optim.Adam(model.parameters(), fused=True),
        torch.nn.L1Loss(),
        DataLoader(TensorDataset(targets.sum(1), targets), batch_size=8),
        DataLoader(TensorDataset(short.sum(1), short)),
        config=conf,
    )
    # So that no workspace of cuBLAS comes to lie in what training leaves behind.
    take_step(model, make_batch(1, 800), DEVICE, "none")
    gc.collect()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_reserved(), Reserved()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator=ACCELERATOR,
        devices=1,
        callbacks=[FreeCachedMemory(), reserved],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=5.0,
        default_root_dir=tmp_path,
    )
    trainer.fit(system)
    blocks = reserved.after_training - before
    assert blocks > 400 * 2**20
    # What stays are weights, the states of Adam, a batch, and workspaces of cuBLAS.
    assert reserved.in_validation - before < blocks / 4


@needs_asteroid
def test_the_average_of_the_weights_is_on_the_gpu():
    from local.train.average import WeightAverage

    system, trainer, average = pl.LightningModule(), SimpleNamespace(), WeightAverage(0.5)
    system.weight = torch.nn.Parameter(torch.zeros(3))
    average.setup(trainer, system, "fit")  # which Lightning does before it moves the model
    system.to(DEVICE)
    average.on_fit_start(trainer, system)
    for trainer.global_step in (1, 2, 3):
        system.weight.data.fill_(trainer.global_step)
        average.on_train_batch_end(trainer, system, None, None, None)
    checkpoint = {"state_dict": system.state_dict()}
    average.on_save_checkpoint(trainer, system, checkpoint)
    (found,) = checkpoint["state_dict"].values()
    assert found.device.type == system.weight.device.type
    assert found.tolist() == [2.25] * 3  # of 1, 2 and 3, by halves
