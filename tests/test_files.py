from pathlib import Path

import pytest

from local.tools.files import is_foreign, make_absolute, replaced_folder


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name",
    [
        *("@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", "$Recycle.Bin"),
        *("System Volume Information", ".Trashes", ".ipynb_checkpoints", ".Half made.tmp"),
        *("._vocals.wav", "._A.stem.mp4", ".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r"),
    ],
)
def test_what_systems_and_programs_leave_is_no_data(name):
    assert is_foreign(Path("music/train") / name)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["vocals.wav", "Lost + Found", "@eaDir live", "_", "#1", "$"])
def test_ordinary_names_are_data(name):
    assert not is_foreign(Path(".cache/@eaDir") / name)


def test_absolute_paths_hold_no_dots_and_keep_links(tmp_path, monkeypatch):
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    monkeypatch.chdir(tmp_path)
    expected = {"link": "link", "link/../x": "far/x", "./new": "new", "../a": "../a"}
    for path, meant in expected.items():
        wanted = tmp_path.parent / "a" if meant == "../a" else tmp_path / meant
        assert make_absolute(path) == str(wanted)


def test_of_a_run_that_was_killed_the_old_folder_stays(tmp_path):
    old = tmp_path / ".page.old.tmp"  # where it is while the new one takes its place
    old.mkdir()
    (old / "index.html").write_text("old")
    with pytest.raises(ValueError), replaced_folder(tmp_path / "page"):
        raise ValueError
    assert (tmp_path / "page" / "index.html").read_text() == "old"
    with replaced_folder(tmp_path / "page") as folder:
        folder.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["page"]
