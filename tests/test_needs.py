from argparse import Namespace

import pytest
from conftest import ROOT, run_python
from torch import nn

from local.needs import WORKSPACE, advise_on_memory, separation_bytes
from local.tasnet import ConvTasNetStereo

SIZES = dict(N=8, L=20, B=64, H=256, X=1, R=1, C=2, audio_channels=2, samplerate=44100)


@pytest.mark.parametrize("fast", ["auto", "no"])
def test_full_needs_what_it_takes(fast, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import psutil, torch
from local.inference import separate
from local.needs import WORKSPACE, separation_bytes
from local.tasnet import ConvTasNetStereo
torch.set_num_threads(1)
model = ConvTasNetStereo(**{SIZES!r}).eval()
separate(model, torch.randn(2, 4410), "full", fast={fast!r})
before = psutil.Process().memory_info().rss
separate(model, torch.randn(2, 20 * 44100), "full", fast={fast!r})
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(separation_bytes(model, 20, "full", {fast!r}) - WORKSPACE)
""")
    result = run_python(script, own_process=True)
    taken, needed = map(float, result.stdout.split())
    assert 0.8 * needed < taken < 1.1 * needed + WORKSPACE


def test_other_methods_need_no_more_than_the_signals():
    model = ConvTasNetStereo(**SIZES).eval()
    stream = ConvTasNetStereo(**SIZES, causal=True, norm_type="cLN").eval()
    signals = WORKSPACE + 4 * 6 * 44100 * 60
    assert separation_bytes(model, 60, "overlap-add") == signals
    assert separation_bytes(model, 60, "full") > signals
    assert separation_bytes(stream, 60, "full") == signals  # in blocks, with the same result
    assert separation_bytes(stream, 60, "full", "no") > signals


def test_of_another_model_the_signals_alone_are_known():
    model = nn.Conv1d(2, 4, 1)
    model.C, model.audio_channels, model.samplerate = 2, 2, 44100
    assert separation_bytes(model, 60, "full") == WORKSPACE + 4 * 6 * 44100 * 60


@pytest.mark.parametrize(
    "flags, on_cpu, advice",
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
def test_the_flags_that_need_less_memory(flags, on_cpu, advice):
    known = {"method": "overlap-add", "segment": 6.0, "fast": "auto"}
    assert advise_on_memory(Namespace(**{**known, **flags}), on_cpu) == advice
