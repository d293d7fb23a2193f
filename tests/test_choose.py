import copy
import sys

import pytest
import torch
from conftest import random_model, run_python, slow

import local.fast.choose
from local import tasnet
from local.fast.choose import choose_forward, find_compiler_fault, find_kernel_fault
from local.fast.recompute import RecomputingForward
from local.fast.training import TrainingForward

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = dict(N=12, L=8, B=8, H=12, P=3, X=2, R=1, C=2, audio_channels=2)


def choose(model, **training):
    return choose_forward(
        model, {"memory": "some", "compile": "no", "fast": "auto", **training}, CPU
    )


@pytest.fixture
def edited(monkeypatch) -> tasnet.ConvTasNetStereo:
    monkeypatch.setattr(
        tasnet.TemporalBlock, "forward", lambda block, hidden: hidden + 0.5 * block.net(hidden)
    )
    return random_model(SMALL).train()


def test_an_edited_model_runs_itself(edited):
    assert isinstance(choose(edited)[0], RecomputingForward)
    with pytest.raises(ValueError, match="fast path differs from the model"):
        choose(edited, fast="yes")


@pytest.mark.parametrize("fast, kind", [("auto", "fast"), ("yes", "fast"), ("no", "plain")])
def test_the_flag_chooses_for_the_unedited_model(fast, kind):
    forward, note = choose(random_model(SMALL).train(), fast=fast)
    kinds = {"fast": TrainingForward, "plain": RecomputingForward}
    assert type(forward) is kinds[kind]
    assert note == ""


@slow
def test_an_edited_model_is_compiled_in_place(edited, two_threads):
    if fault := find_compiler_fault(CPU):
        pytest.skip(f"torch.compile does not work here: {fault}")
    plain, mixture = copy.deepcopy(edited), torch.randn(2, 2, 300)
    forward, note = choose(edited, compile="yes")
    assert "the first step compiles" in note
    assert list(edited.state_dict()) == list(plain.state_dict())
    for run in (plain, forward):
        run(mixture).square().mean().backward()
    for found, expected in zip(edited.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_one_thread_of_a_cpu_is_not_compiled_for():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fault = find_compiler_fault(CPU)
    torch.set_num_threads(threads)
    assert "single CPU thread" in fault


def test_a_missing_compiler_is_named_in_a_line(tmp_path):
    code = (
        "import os, torch\n"
        f"os.environ.update(CXX='/no/such/compiler', TORCHINDUCTOR_CACHE_DIR='{tmp_path}')\n"
        "from local.fast.choose import find_compiler_fault\n"
        "print(find_compiler_fault(torch.device('cpu')))"
    )
    result = run_python("-c", code, own_process=True)  # the compiler starts processes
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert result.stdout.count("\n") == 1


# Triton kernels


@pytest.mark.parametrize(
    ("compile_", "compiler_fault", "kernel_fault", "used", "said"),
    [
        ("auto", "", "", (True, True), "blocks run as Triton kernels"),
        ("auto", "", "it is old", (True, False), "not run as Triton kernels: it is old"),
        ("auto", "no g++", "", (False, False), "no g++"),
        ("no", "", "", (False, False), ""),
    ],
)
def test_kernels_are_for_a_gpu_where_they_work_and_compiling_does(
    compile_, compiler_fault, kernel_fault, used, said, monkeypatch
):
    made = []
    faults = {"find_compiler_fault": compiler_fault, "find_kernel_fault": kernel_fault}
    for name, fault in faults.items():
        monkeypatch.setattr(local.fast.choose, name, lambda *args, fault=fault: fault)
    monkeypatch.setattr(local.fast.choose, "allow_tf32_products", lambda: None)
    monkeypatch.setattr(local.fast.choose, "TrainingForward", lambda *args: made.append(args))
    training = {"memory": "some", "compile": compile_, "fast": "auto"}
    _, note = choose_forward(random_model(SMALL).train(), training, GPU)
    assert made[0][2:] == used
    assert said in note
    assert bool(said) == bool(note)


@pytest.mark.parametrize(
    ("norm_type", "device", "hip", "capability", "triton", "named"),
    [
        ("gLN", CPU, None, (9, 0), True, "NVIDIA"),
        ("gLN", GPU, "6.4", (9, 4), True, "NVIDIA"),
        ("gLN", GPU, None, (7, 5), True, "old"),
        ("cLN", GPU, None, (9, 0), False, "triton"),
        ("BN", GPU, None, (9, 0), True, "BN"),
        ("id", GPU, None, (9, 0), True, "id"),
    ],
)
def test_kernels_that_cannot_run_are_not_used(
    norm_type, device, hip, capability, triton, named, monkeypatch
):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not triton:
        for module in ("gpu", "kernels"):
            monkeypatch.delitem(sys.modules, f"local.fast.{module}", raising=False)
            monkeypatch.delattr(local.fast, module, raising=False)
        monkeypatch.setitem(sys.modules, "triton", None)
    assert named in find_kernel_fault(random_model({**SMALL, "norm_type": norm_type}), device)
