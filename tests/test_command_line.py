"""Faults in one error, and what was probably meant."""

from pathlib import Path

import pytest

from local.tools.command_line import UserError, raise_together, suggest_path


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("exp/demos", "exp/demo"),
        ("exp/de", "exp/demo"),
        ("exps/demo/best_model.pth", "exp"),
        ("../her", "../here"),
        ("exp/demo", ""),
        ("exp/something", ""),
        ("exp/.cach", ""),
        ("exp/file/below", ""),
        ("x" * 300, ""),
        ("", ""),
    ],
)
def test_a_path_that_was_probably_meant(path, meant, tmp_path, monkeypatch):
    (tmp_path / "here" / "exp" / "demo").mkdir(parents=True)
    (tmp_path / "here" / "exp" / ".cache").mkdir()
    (tmp_path / "here" / "exp" / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert suggest_path(path) == (f"; did you mean {Path(meant)}?" if meant else "")


@pytest.mark.parametrize(
    ("faults", "heading", "text"),
    [
        (["a"], "", "a"),
        (["a"], "FILE", "FILE: a"),
        (["a", "b"], "", "2 faults\n  a\n  b"),
        (["a", "b"], "FILE", "FILE: 2 faults\n  a\n  b"),
    ],
)
def test_faults_are_raised_together(faults, heading, text):
    with pytest.raises(UserError) as error:
        raise_together(faults, heading)
    assert str(error.value) == text
    raise_together([], heading)
