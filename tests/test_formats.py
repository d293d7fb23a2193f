from types import SimpleNamespace

import pytest

from local.tools.formats import FORMATS, choose_format, find_format_faults


def choose(format=None, float32=False) -> SimpleNamespace:
    return SimpleNamespace(format=format, float32=float32)


def test_16_bit_wav_is_the_default_and_float32_a_name_of_a_format():
    assert choose_format(choose()) == "wav16"
    assert choose_format(choose(float32=True)) == "float32"
    assert choose_format(choose("opus")) == "opus"


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_can_be_written_here(form):
    assert find_format_faults(choose(form)) == []


def test_two_formats_are_refused():
    (fault,) = find_format_faults(choose("mp3", float32=True))
    assert "--float32" in fault and "mp3" in fault


def test_a_missing_encoder_is_named(monkeypatch):
    monkeypatch.setattr("local.tools.formats.list_encoders", lambda: {"aac"})
    monkeypatch.setattr("soundfile.available_formats", lambda: {"WAV": "", "FLAC": ""})
    assert find_format_faults(choose("m4a")) == find_format_faults(choose("flac24")) == []
    for form, encoder in {"opus": "libopus", "mp3": "libsndfile"}.items():
        (fault,) = find_format_faults(choose(form))
        assert f"--format {form}" in fault and encoder in fault


@pytest.mark.parametrize(
    ("form", "rate", "nearest"),
    [("mp3", 44100, 44100), ("mp3", 28000, 32000), ("opus", 8000, 48000), ("flac24", 96001, 96000)],
)
def test_the_nearest_rate_is_the_higher_of_two(form, rate, nearest):
    assert FORMATS[form].find_rate(rate) == nearest
