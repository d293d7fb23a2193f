import math
from argparse import Namespace

import pytest
import torch
from conftest import PEAK_MB, ROOT, linux, run_python
from torch import nn

import local.needs
from local.needs import (
    MOST_WINDOWS,
    WORKSPACE,
    advise_on_memory,
    count_windows,
    describe_failure,
    separation_bytes,
    separation_seconds,
)
from local.tasnet import ConvTasNetStereo

FLAGS = dict(method="overlap-add", segment=6.0, overlap=0.1, fast="auto")
SIZES = dict(N=8, L=20, B=64, H=256, X=1, R=1, C=2, audio_channels=2, samplerate=44100)


def flags(**others) -> Namespace:
    return Namespace(**{**FLAGS, **others})


@linux
@pytest.mark.parametrize("fast", ["auto", "no"])
@pytest.mark.parametrize("method", ["full", "overlap-add"])
def test_a_separation_needs_what_it_takes(method, fast, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(f"""
import argparse, sys
sys.path.insert(0, {str(ROOT)!r})
import psutil, torch
from local.inference import separate
from local.needs import WORKSPACE, separation_bytes
from local.tasnet import ConvTasNetStereo
torch.set_num_threads(1)
model = ConvTasNetStereo(**{SIZES!r}).eval()
flags = argparse.Namespace(method={method!r}, segment=20.0, overlap=0.1, fast={fast!r})
run = lambda mixture: separate(model, mixture, {method!r}, 20.0, 0.1, fast={fast!r})
run(torch.randn(2, 4410))
before = psutil.Process().memory_info().rss
run(torch.randn(2, 30 * 44100))
print(2**20 * {PEAK_MB} - before)
print(separation_bytes(model, 30, flags) - WORKSPACE)
""")
    result = run_python(script, own_process=True)
    taken, needed = map(float, result.stdout.split())
    assert 0.8 * needed < taken < 1.1 * needed + WORKSPACE


def test_what_is_separated_at_once_needs_memory_beside_the_signals():
    model = ConvTasNetStereo(**SIZES).eval()
    stream = ConvTasNetStereo(**SIZES, causal=True, norm_type="cLN").eval()
    signals = WORKSPACE + 4 * 6 * 44100 * 60

    def excess(model, **others) -> float:
        return separation_bytes(model, 60, flags(**others)) - signals

    whole, second = excess(model, method="full"), 4 * 6 * 44100
    assert whole > 0
    window = 6.7  # 6 * 1.1 + 0.1 s
    assert excess(model) == pytest.approx((whole / 60 + second) * window)
    assert excess(model, segment=600.0) == whole + second * 60  # no longer than the track
    assert excess(stream, method="full") == 0  # in blocks, with the same result
    assert excess(stream, method="stream") == 0
    assert excess(stream, method="full", fast="no") > 0
    in_blocks = separation_bytes(model, math.inf, flags(), in_blocks=True)
    assert in_blocks == pytest.approx(WORKSPACE + excess(model))


def test_more_weights_or_frames_take_longer():
    seconds = separation_seconds(ConvTasNetStereo(**SIZES))
    assert separation_seconds(ConvTasNetStereo(**SIZES | {"X": 2})) > 1.4 * seconds
    assert separation_seconds(ConvTasNetStereo(**SIZES | {"samplerate": 88200})) == 2 * seconds
    assert separation_seconds(nn.Conv1d(2, 4, 1)) == math.inf  # not known


def test_of_another_model_the_signals_alone_are_known():
    model = nn.Conv1d(2, 4, 1)
    model.C, model.audio_channels, model.samplerate = 2, 2, 44100
    assert separation_bytes(model, 60, flags(method="full")) == WORKSPACE + 4 * 6 * 44100 * 60


def test_windows_on_a_gpu_are_as_many_as_its_free_memory_holds(monkeypatch):
    model, samples = ConvTasNetStereo(**SIZES).eval(), 6 * 44100
    window = separation_bytes(model, 6, flags(method="full", fast="no"), in_blocks=True) - WORKSPACE
    for held, expected in ((0, 1), (1.1, 1), (2.1, 2), (2.9, 2), (99, MOST_WINDOWS)):
        free = WORKSPACE + held * window
        monkeypatch.setattr(local.needs, "free_gpu_memory", lambda device, free=free: free)
        assert count_windows(model, samples, torch.device("cuda")) == expected
        assert count_windows(model, samples, torch.device("cpu")) == 1


@pytest.mark.parametrize(
    "others, on_cpu, advice",
    [
        ({}, "", "; these need less: --segment below 6.0"),
        ({"method": "full"}, "", "; these need less: --method overlap-add"),
        (
            {"method": "full", "fast": "no"},
            "--use_gpu 0",
            "; these need less: --use_gpu 0, --method overlap-add, --fast auto",
        ),
        ({"method": "stream"}, "", ""),
    ],
)
def test_the_flags_that_need_less_memory(others, on_cpu, advice):
    assert advise_on_memory(flags(**others), on_cpu) == advice


def test_a_failure_is_told_and_an_error_of_another_kind_raised():
    assert describe_failure(ValueError("damaged"), flags()) == "damaged"
    told = describe_failure(MemoryError("no room"), flags(method="full"), "--use_gpu 0")
    assert told == "out of memory: no room; these need less: --use_gpu 0, --method overlap-add"
    with pytest.raises(KeyError, match="name"):
        describe_failure(KeyError("name"), flags())
