import re
import shutil
from argparse import Namespace
from pathlib import Path

import html5lib
import numpy as np
import pytest
import soundfile as sf
from conftest import RATE
from scored_runs import HOSTILE, write_scored_run, write_scores

from eval import main as evaluate
from local.comparison.runs import read_published
from local.listen.analysis import COLUMNS, MELS, analyse, find_loudest, find_peaks, match_loudness
from local.listen.audio import most_bytes, write_samples
from local.listen.build import TEMPLATES
from local.listen.charts import choose_range, describe_box, draw_line, draw_sparks, find_passages
from local.page import main
from local.tools.sound_writer import SoundWriter

NAMES = ["A - Song", HOSTILE]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_scored_run(tmp_path_factory.mktemp("page") / "exp", NAMES)


@pytest.fixture(scope="module")
def page(run) -> Path:
    out = run.parent / "page"
    main([str(run), "--out", str(out)])
    return out


def parse(file: Path):
    """The page as html5lib's strict parser reads it: it raises at the first error."""
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    return parser.parse(file.read_text(encoding="utf-8"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# The page


def test_a_page_has_all_files_that_it_names(page):
    for file in page.rglob("*.html"):
        found = parse(file)
        links = [e.get(key) for key in ("src", "href") for e in found.iter() if e.get(key)]
        named = [
            link.partition("#")[0]
            for link in links
            if not link.startswith(("data:", "#", "https:"))
        ]
        assert named and all((file.parent / link).is_file() for link in named if link)


def test_strict_html_holds_hostile_names_as_text(page):
    track = next(f for f in page.glob("tracks/*.html") if "onerror" in f.read_text())
    for file in (page / "index.html", track):
        found = parse(file)
        elements = list(found.iter())
        assert any(NAMES[1] == e.text for e in elements if e.tag == "bdi")
        assert not any("onerror" in key for e in elements for key in e.keys())
        assert all(e.get("src").endswith("page.js") for e in elements if e.tag == "script")


def test_a_track_has_a_player_per_signal_in_step_with_its_audio(page):
    found = parse(page / "tracks" / "1.html")
    players = [e for e in found.iter("audio")]
    assert [p.get("src") for p in players] == [f"1/{n}.flac" for n in range(1, 6)]
    gains = [float(e.get("data-gain")) for e in found.iter("input") if e.get("data-gain")]
    assert len(gains) == 5 and max(gains) == 0 and min(gains) >= -12
    for player in players:
        assert sf.info(page / "tracks" / player.get("src")).duration == 6
    mixture, rate = sf.read(page / "tracks" / "1" / "1.flac", dtype="int16")
    original, _ = sf.read(page.parent / "data/test/A - Song/mixture.wav", dtype="int16")
    assert rate == RATE and np.array_equal(mixture, original)


def test_the_page_says_that_it_holds_audio_of_the_data_set(run, page, tmp_path):
    notice = "holds audio of the data set"
    main([str(run), "--out", str(tmp_path / "page"), "--no_references"])
    assert all(notice in file.read_text() for file in page.rglob("*.html"))
    assert all(notice not in file.read_text() for file in tmp_path.rglob("*.html"))
    assert len(list(tmp_path.rglob("*.flac"))) == 4
    labels = [e.text for e in parse(tmp_path / "page/tracks/1.html").iter("bdi")]
    assert "reference" not in labels


def test_no_references_needs_no_data_set(run, tmp_path):
    own = shutil.copytree(run.parent, tmp_path / "exp")
    shutil.rmtree(own / "data")
    main([str(own / "eval"), "--out", str(tmp_path / "page"), "--no_references"])
    assert (tmp_path / "page" / "index.html").is_file()


def test_worst_and_best_passages_are_linked_with_their_player(page):
    links = [e.get("href") for e in parse(page / "tracks/1.html").iter("a")]
    # The third second is the worst, and the last has no score.
    assert "#t=0&p=3&loop" in links and "#t=0&p=5&loop" in links
    index = [e.get("href") for e in parse(page / "index.html").iter("a")]
    assert "tracks/1.html#t=0&p=3&loop" in index


def test_an_excerpt_is_of_the_loudest_vocals_and_its_times_are_those_of_the_song(run, tmp_path):
    own = shutil.copytree(run.parent, tmp_path / "exp")
    file = own / "data" / "test" / NAMES[0] / "vocals.wav"
    audio, _ = sf.read(file)
    audio[: 3 * RATE] *= 0.01
    sf.write(file, audio, RATE)
    out = tmp_path / "page"
    main([str(own / "eval"), "--out", str(out), "--excerpt", "2", "--root", str(own / "data")])
    assert sf.info(out / "tracks/1/1.flac").duration == 2
    lanes = next(e for e in parse(out / "tracks/1.html").iter("div") if e.get("id") == "lanes")
    assert float(lanes.get("data-seconds")) == 2 and float(lanes.get("data-start")) >= 3
    assert "an excerpt of 2 s" in (out / "tracks/1.html").read_text()


def test_opus_is_small_and_its_size_was_told(run, tmp_path, capsys):
    for form in ("flac", "opus"):
        out = tmp_path / form
        main([str(run), "--out", str(out), "--audio", form])
        told = float(re.search(r"up to (\d+) MB", capsys.readouterr().out)[1])
        size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
        assert size <= told + 0.5
    assert sf.info(tmp_path / "opus/tracks/1/1.opus").duration == pytest.approx(6, abs=0.05)


def test_runs_are_side_by_side_with_the_published_scores(tmp_path):
    name = read_published()["track"].iloc[0]
    first = write_scored_run(tmp_path / "a", [name, "B - Song"])
    second = write_scored_run(tmp_path / "b", [name, "B - Song"], shift=1, saved=1)
    out = tmp_path / "page"
    main([str(first), str(second), "--out", str(out), "--root", str(tmp_path / "a" / "data")])
    text = (out / "index.html").read_text()
    for shown in (
        "Paired differences",
        "+1.00",
        "published non-causal",
        "6.84",
        "(full)",
        "_NonCausal",
    ):
        assert shown in text
    assert "b/eval: no saved estimates of 1 of 2 tracks" in text
    assert "<title>Listening page: a/eval, b/eval</title>" in text
    heading, first, *_ = read_rows(out / "index.html", "tracks")
    assert first[heading.index("b/eval minus a/eval")] == "+1.00"
    assert {"gain of a/eval", "gain of b/eval", "Worst 5 s of a/eval (mean)"} <= set(heading)
    track = out / "tracks/1.html"
    heading, *rows = read_rows(track)
    column = heading.index("minus a/eval")
    of_vocals = {row[1]: row[column] for row in rows if row[0] == "vocals"}
    assert of_vocals["b/eval"] == "+1.00" and of_vocals["a/eval"] == "–"
    for shown in ("ISR, dB", "<kbd>1</kbd>–<kbd>7</kbd>", "played at"):
        assert shown in track.read_text()
    assert "<kbd>1</kbd>–<kbd>5</kbd>" in (out / "tracks/2.html").read_text()
    assert len([*parse(out / "tracks/1.html").iter("audio")]) == 7
    assert len([*parse(out / "tracks/2.html").iter("audio")]) == 5


def read_rows(file: Path, id_of_section: str = "") -> list[list[str]]:
    """The cells of the rows of all tables, or of those in one section of the overview."""
    found = parse(file)
    sections = [e for e in found.iter("section") if e.get("aria-labelledby") == id_of_section]
    parts = sections if id_of_section else [found]
    rows = [row for part in parts for row in part.iter("tr")]
    return [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in rows]


@pytest.mark.parametrize("method", ["full", "overlap-add"])
def test_published_scores_of_another_method_are_shown_and_not_compared(tmp_path, method):
    name = read_published()["track"].iloc[0]
    run = write_scored_run(tmp_path / "a", [name, "B - Song"], method=method)
    main([str(run), "--out", str(tmp_path / "page"), "--no_references"])
    index, track = tmp_path / "page/index.html", tmp_path / "page/tracks/1.html"
    is_compared = method == "full"
    differences = [row for row in read_rows(index, "differences") if "published" in row[1]]
    assert bool(differences) is is_compared
    for file in (index, track):
        assert ("run eval.py --method full" in file.read_text()) is not is_compared
    assert ("hold different tracks" in index.read_text()) is is_compared
    assert "not comparable" not in (tmp_path / "page/tracks/2.html").read_text()
    of_track = {row[1]: row for row in read_rows(track) if row[0] == "vocals"}
    assert of_track["published non-causal"][2] == "full" and of_track["a/eval"][2] == method
    assert of_track["a/eval"][7] == "+3.00"
    assert of_track["published non-causal"][7] == ("+9.84" if is_compared else "–")


def test_clipped_samples_are_counted(tmp_path):
    run = write_scored_run(tmp_path / "exp", ["A", "B"])
    audio = np.zeros((6 * RATE, 2), np.float32)
    audio[:3, 0] = 1.5
    sf.write(run / "A" / "vocals.wav", audio, RATE, "FLOAT")
    main([str(run), "--out", str(tmp_path / "page")])
    notes = {n: (tmp_path / f"page/tracks/{n}.html").read_text() for n in (1, 2)}
    assert "exp/eval, vocals: 3 samples beyond full scale clipped" in notes[1]
    assert "clipped" not in notes[2]


def test_a_run_without_estimates_gives_scores_alone_and_what_to_run(tmp_path, capsys):
    run = write_scored_run(tmp_path / "exp", ["A", "B"], saved=0)
    main([str(run), "--out", str(tmp_path / "page")])
    assert "eval.py --n_save_ex -1" in capsys.readouterr().out
    assert "eval.py --n_save_ex -1" in (tmp_path / "page/index.html").read_text()
    track = (tmp_path / "page/tracks/1.html").read_text()
    assert "<audio" not in track and "scores alone" in track and "SDR, dB" in track


def test_scores_of_other_systems_have_no_records(tmp_path):
    write_scores(tmp_path / "other", "A", 3, 5)
    main([str(tmp_path / "other"), "--out", str(tmp_path / "page")])
    parse(tmp_path / "page" / "tracks" / "1.html")


def test_eval_makes_a_page_of_its_own_estimates(experiment, tmp_path, capsys):
    own = shutil.copytree(experiment, tmp_path / "exp")
    flags = ["--exp_dir", str(own), "--out_dir", "out", "--n_save_ex", "1", "--page"]
    evaluate(flags)
    index = own / "out" / "page" / "index.html"
    assert str(index) in capsys.readouterr().out
    assert len(list(index.parent.rglob("*.flac"))) == 5
    evaluate(flags[:-1])
    assert "--page makes it again" in capsys.readouterr().out
    shutil.rmtree(index.parent)
    index.parent.mkdir()
    (index.parent / "notes.txt").touch()
    with pytest.raises(SystemExit):
        evaluate(flags)
    assert "notes.txt" in capsys.readouterr().err


# Bad input


def test_faults_of_the_flags_are_told_together(run, tmp_path, error_of):
    error = error_of(main, run, "--out", tmp_path / "page", "--excerpt", 0, "--jobs", 0)
    assert "--excerpt" in error and "--jobs" in error
    assert "--out" in error_of(main, run)
    assert not (tmp_path / "page").exists()


def test_mixed_sample_rates_are_refused(tmp_path, error_of):
    run = write_scored_run(tmp_path / "exp", ["A", "B"])
    sf.write(run / "B" / "vocals.wav", np.zeros((100, 2)), 2 * RATE)
    error = error_of(main, run, "--out", tmp_path / "page")
    assert f"{RATE} Hz" in error and f"{2 * RATE} Hz" in error
    assert not (tmp_path / "page").exists()


def test_damaged_estimates_are_named(tmp_path, error_of):
    run = write_scored_run(tmp_path / "exp", ["A", "B"])
    (run / "A" / "vocals.wav").write_bytes(b"")
    (run / "B" / "vocals.wav").write_bytes(b"RIFF")
    sf.write(run / "B" / "accompaniment.wav", np.zeros((0, 2)), RATE)
    error = error_of(main, run, "--out", tmp_path / "page")
    for file in ("A/vocals.wav", "B/vocals.wav", "B/accompaniment.wav"):
        assert str(run / file) in error


def test_an_estimate_damaged_in_its_middle_leaves_no_page(tmp_path, error_of):
    run = write_scored_run(tmp_path / "exp", ["A", "B"])
    file = run / "B" / "vocals.flac"
    sf.write(file, sf.read(run / "B" / "vocals.wav")[0], RATE)
    (run / "B" / "vocals.wav").unlink()
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    file.write_bytes(data)
    assert f"{file}: damaged after" in error_of(main, run, "--out", tmp_path / "page")
    assert [path.name for path in tmp_path.iterdir()] == ["exp"]


def test_damaged_records_and_settings(tmp_path, error_of):
    run = write_scored_run(tmp_path / "exp", ["A", "B"])
    (run / "test" / "A.yml").write_text("files: [1]\nmade_with: 3\nmixture_SDR: x")
    (run / "test" / "B.yml").write_text("- 1")
    main([str(run), "--out", str(tmp_path / "page")])
    (tmp_path / "exp" / "conf.yml").write_text("- 1")
    assert "conf.yml" in error_of(main, run, "--out", tmp_path / "page", "--no_references")


def test_no_run_and_no_place_for_a_page(run, tmp_path, error_of):
    assert "did you mean" in error_of(main, f"{run}l", "--out", tmp_path / "page")
    assert "name the folder" in error_of(main, run.parent, "--out", tmp_path / "page")
    (tmp_path / "file").touch()
    for out in ("file", "file/page"):
        assert "--out" in error_of(main, run, "--out", tmp_path / out)
    assert "other files" in error_of(main, run, "--out", run)


def test_a_missing_data_set_is_named_with_the_remedies(tmp_path, error_of):
    run = write_scored_run(tmp_path / "exp", ["A"])
    (tmp_path / "exp" / "data").rename(tmp_path / "moved")
    error = error_of(main, run, "--out", tmp_path / "page")
    assert "--root" in error and "--no_references" in error
    main([str(run), "--out", str(tmp_path / "page"), "--root", str(tmp_path / "moved")])


def test_references_of_another_data_set_are_refused(tmp_path, error_of):
    run = write_scored_run(tmp_path / "exp", ["A"])
    write_scored_run(tmp_path / "other", ["A"], seconds=3)
    write_scored_run(tmp_path / "lacking", ["B"])
    for other, fault in {"other": "not the files", "lacking": "lacks 1 track"}.items():
        root = tmp_path / other / "data"
        assert fault in error_of(main, run, "--out", tmp_path / "page", "--root", root)


@pytest.mark.parametrize("content", ["index.html", "notes.txt"])
def test_a_folder_of_others_is_not_replaced(run, tmp_path, content, error_of):
    out = tmp_path / "page"
    out.mkdir()
    (out / content).write_text("<html>mine</html>")
    assert "--out" in error_of(main, run, "--out", out)
    assert files_of(out) == {content: b"<html>mine</html>"}


def test_a_file_in_a_page_is_not_deleted(run, page, tmp_path, error_of):
    out = shutil.copytree(page, tmp_path / "page")
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in error_of(main, run, "--out", out)


def test_a_page_of_ours_is_replaced(run, page, tmp_path):
    out = shutil.copytree(page, tmp_path / "page")
    (out / "tracks" / "9.html").write_text("old")
    main([str(run), "--out", str(out)])
    assert not (out / "tracks" / "9.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_full_disk_leaves_the_old_page(run, page, tmp_path, monkeypatch, error_of):
    out = shutil.copytree(page, tmp_path / "page")
    before = files_of(out)

    def fail(path, *args):
        if path.name == "4.flac":
            path.write_bytes(b"a part")
            raise OSError(28, "No space left on device", str(path))
        return SoundWriter(path, *args)

    monkeypatch.setattr("local.listen.audio.SoundWriter", fail)
    assert "No space left" in error_of(main, run, "--out", out)
    assert files_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_page_without_room_is_not_begun(run, tmp_path, monkeypatch, error_of):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=1000))
    assert "--audio opus" in error_of(main, run, "--out", tmp_path / "page")
    assert not (tmp_path / "page").exists()


# Parts


def test_loudness_is_that_of_the_standard():
    # ITU-R BS.1770: 997 Hz at full scale in one channel is at -3.01 LUFS.
    time = np.arange(10 * 48_000) / 48_000
    one_channel = np.stack([np.sin(2 * np.pi * 997 * time), 0 * time])
    assert analyse(one_channel, 48_000).loudness == pytest.approx(-3.01, abs=0.05)
    assert analyse(0 * one_channel, 48_000).loudness == -np.inf


def test_matched_signals_are_equally_loud():
    assert match_loudness([-14.0, -20.0, -17.0]) == [-6.0, 0.0, -3.0]
    assert match_loudness([-14.0, -60.0, -np.inf]) == [-12.0 + 0.0, 0.0, 0.0]
    assert match_loudness([-np.inf]) == [0.0]


@pytest.mark.parametrize("length", [1, 999, 1000, 1001, 50_000])
def test_pictures_of_any_length(length):
    samples = np.random.default_rng(0).normal(0, 0.1, (2, length))
    found = analyse(samples, RATE)
    assert len(found.peaks) == min(length, COLUMNS)
    assert found.mel.shape[0] == MELS and np.isfinite(found.mel).all()
    assert found.peaks.min() == samples.min() and found.peaks.max() == samples.max()


def test_a_tone_is_brightest_at_its_frequency():
    time = np.arange(4 * 44_100) / 44_100
    bands = [
        analyse(np.sin(2 * np.pi * f * time)[None], 44_100).mel.mean(1).argmax()
        for f in (100, 1000, 10_000)
    ]
    assert bands == sorted(bands) and bands[0] < 10 and bands[2] > 60


def test_a_click_is_in_its_column():
    samples = np.zeros((2, COLUMNS * 10))
    samples[1, 2505] = -1
    peaks = find_peaks(samples)
    assert np.flatnonzero(peaks[:, 0]).tolist() == [250] and not peaks[:, 1].any()


@pytest.mark.parametrize("seconds", [1, 3, 100])
def test_the_loudest_passage(seconds):
    samples = np.full((2, 10 * RATE + 5), 0.1)
    samples[:, 6 * RATE : 7 * RATE] = 0.5
    start = find_loudest(samples, RATE, seconds)
    assert start <= 6 < start + seconds
    assert find_loudest(samples[:, :5], RATE, seconds) == 0


def test_flac_holds_16_bits_and_no_more_than_was_told(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (2, RATE)) / 32768
    file = tmp_path / "1.flac"
    assert write_samples(file, samples, RATE, "flac") == 0
    assert np.array_equal(sf.read(file)[0].T, samples)
    assert file.stat().st_size <= most_bytes(1, RATE, "flac") + 20_000


def test_lines_have_gaps_where_a_frame_has_no_score():
    nan = float("nan")
    assert draw_line(np.array([1, 2, nan, 3])) == "M0.5 -1h0L1.5 -2M3.5 -3h0"
    assert draw_line(np.array([nan])) == ""
    paths, _ = draw_sparks({"none": np.full(1000, np.nan), "long": np.arange(1000.0)})
    assert paths["none"] == "" and 30 < paths["long"].count("L") < 60


def test_small_lines_are_within_their_range():
    deep, flat = np.array([-60.0, 5, np.nan]), np.array([1.0, 2])
    _, (low, high) = draw_sparks({"a": deep, "b": flat})
    assert low < -60 and 5 < high < 15
    _, (low, high) = draw_sparks({"a": np.full(2, np.nan)})
    assert low < 0 < high


def test_the_range_of_a_chart_holds_its_values():
    assert choose_range([np.array([-3.0, 7]), np.array([np.nan])]) == (-5, 10)
    assert choose_range([np.zeros(0)]) == (0, 5)
    assert choose_range([np.array([-1000.0, 1000])]) == (-40, 40)


def test_boxes_are_quartiles_and_whiskers_reach_tracks():
    box = describe_box(np.array([0.0, 1, 2, 3, 4, 100]))
    assert box["low"] == 0 and box["high"] == 4 and box["median"] == 2.5
    assert describe_box(np.array([np.nan])) == {}


def test_passages_avoid_frames_without_a_score():
    sdr = np.array([0, 0, 0, 0, 0, -9, np.nan, 5, 5, 5, 5, 5], float)
    assert find_passages(sdr)["best"] == (7, 5.0)
    assert find_passages(sdr)["worst"][0] in (1,)
    assert find_passages(np.full(9, np.nan)) == {}
    assert find_passages(np.array([3.0])) == {"worst": (0, 3.0)}


def test_the_best_passage_needs_room_for_two():
    assert find_passages(np.arange(9.0)).keys() == {"worst"}
    assert find_passages(np.arange(10.0))["best"] == (5, 7.0)


def test_the_script_is_short():
    assert len((TEMPLATES / "page.js").read_text(encoding="utf-8").splitlines()) < 300
