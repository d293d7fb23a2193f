import tempfile
from multiprocessing import util

import pytest
from conftest import ROOT, TINY_RUN, run_python, slow

from local.tools import socket_folder
from local.tools.command_line import UserError
from local.tools.socket_folder import make_socket_folder

LIMIT = 107  # bytes of the path of a socket on Linux


@pytest.fixture
def chosen(monkeypatch):
    """The folders in which multiprocessing would have made its own."""
    found = []
    monkeypatch.setattr(util, "get_temp_dir", lambda: found.append(tempfile.gettempdir()))
    return found


@pytest.mark.parametrize("length", [71, 72, 76, 107, 200])
def test_sockets_fit_wherever_tmpdir_is(monkeypatch, chosen, length):
    folder = "/" + "x" * (length - 1)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    make_socket_folder()
    assert tempfile.tempdir == folder
    (place,) = chosen
    assert len(place) + len("/pymp-12345678/listener-12345678") <= LIMIT
    assert (place == folder) == (length <= 71)


def test_without_a_short_folder_there_is_a_line(tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    monkeypatch.setattr(socket_folder, "SHORT_FOLDERS", (str(tmp_path / ("y" * 100)),))
    with pytest.raises(UserError, match="TMPDIR: .* at most 71 bytes"):
        make_socket_folder()
    assert not chosen


@slow
def test_workers_run_in_a_long_tmpdir(corpus, tmp_path):
    """Training, then scoring; with processes that read TMPDIR at their own start."""
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    train = ["train.py", "--exp_dir", tmp_path / "run", "--root", corpus, *TINY_RUN]
    evaluate = ["eval.py", "--exp_dir", tmp_path / "run", "--out_dir", "out", "--jobs", "2"]
    for script, *flags in ([*train, "--num_workers", "2"], evaluate):
        result = run_python(ROOT / script, *flags, own_process=True, TMPDIR=str(folder))
        assert result.returncode == 0, result.stderr
    assert not list(folder.glob("pymp-*"))
