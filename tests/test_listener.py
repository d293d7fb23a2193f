import json
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import read_lift

from local.lift import listener
from local.lift.listener import find_compressor_fault, load_listener, make_listener, read_json
from local.tools.command_line import UserError

needs_clarity = pytest.mark.skipif(not find_spec("clarity"), reason="pyClarity is not installed")
VALUES = {"cr_l": [2] * 6, "gain_l": [5] * 6, "cr_r": [1.5] * 6, "gain_r": [0] * 6}


@needs_clarity
def test_the_golden_signal_is_compressed_as_the_challenge_does():
    golden, facts = read_lift()
    facts = json.loads(facts["compressor"])
    for name, values in listener.BANDS.items():
        assert facts[name] == values
    assert facts["crossover_frequencies"] == listener.CROSSOVERS
    found = make_listener(facts).compress(golden["compressor_input"], 44100)
    expected = np.stack([golden["compressed_l"], golden["compressed_r"]])
    assert np.abs(found - expected).max() < 1e-6


@needs_clarity
def test_a_mono_remix_reaches_both_ears():
    mono = 0.1 * np.random.default_rng(0).standard_normal((1, 2000))
    one, other = make_listener(VALUES | {"cr_r": [2] * 6}).compress(mono, 44100)
    assert np.allclose(one, other * to_amplitude(5), atol=1e-9)


def to_amplitude(decibels: float) -> float:
    return 10 ** (decibels / 20)


def test_a_missing_pyclarity_is_named_with_the_remedy(monkeypatch):
    for name in ("clarity", "clarity.enhancer", "clarity.enhancer.multiband_compressor"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert "pip install pyclarity" in find_compressor_fault()


def test_a_listener_is_found_in_the_files_of_any_split(tmp_path):
    for split, name in {"train": "L1", "valid": "L2"}.items():
        file = tmp_path / f"compressor_params.{split}.json"
        file.write_text(json.dumps({name: VALUES | {"gain_l": [len(split)] * 6}}))
    assert load_listener(tmp_path, "L2").left.gains == [5] * 6
    with pytest.raises(UserError, match="has no L3"):
        load_listener(tmp_path, "L3")
    with pytest.raises(UserError, match="--metadata: .* holds no compressor_params"):
        load_listener(tmp_path / "none", "L1")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cr_l": [1] * 5}, "cr_l must be 6 numbers"),
        ({"gain_r": [1, 2, 3, 4, 5, "6"]}, "gain_r"),
        ({"gain_r": [1, 2, 3, 4, 5, float("nan")]}, "gain_r"),
        ({"gain_l": None}, "gain_l"),
        ({"cr_r": [0] * 6}, "above 0"),
    ],
)
def test_values_of_a_listener_that_make_no_compressor(change, named):
    with pytest.raises(ValueError, match=named):
        make_listener(VALUES | change)


@pytest.mark.parametrize(("content", "fault"), [(None, "cannot be read"), ("[", "no JSON")])
def test_metadata_that_cannot_be_read(content, fault, tmp_path):
    if content:
        (tmp_path / "file.json").write_text(content)
    with pytest.raises(UserError, match=fault):
        read_json(tmp_path / "file.json")


def test_metadata_of_another_kind(tmp_path):
    (tmp_path / "file.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        read_json(tmp_path / "file.json")
