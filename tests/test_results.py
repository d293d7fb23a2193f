import numpy as np
import pytest
from test_score_files import save

from local.eval.results import RESULTS, describe_track, sdr_table, whole_track_table, write_results
from local.eval.score_files import ScoredTrack


@pytest.fixture
def scored(tmp_path) -> list[ScoredTrack]:
    return [save(tmp_path, f"Track {seed}", seed) for seed in range(3)]


def test_the_tables_show_the_gain_over_the_mixture_and_missing_frames(scored):
    lines, usdr = sdr_table(scored), whole_track_table(scored, "uSDR")
    model = np.nanmedian(scored[0].scores["vocals"]["SDR"])
    mixture = scored[0].record["mixture_SDR"]["vocals"]["median"]
    cells = lines[2].removeprefix("Track 0").split()
    assert cells[:4] == [f"{mixture:.2f}", f"{model:.2f}", f"{model - mixture:+.2f}", "20%"]
    models = [np.nanmedian(track.scores["vocals"]["SDR"]) for track in scored]
    assert lines[-2].split()[4] == f"{np.median(models):.2f}"
    assert lines[-1].split()[4] == f"{np.mean(models):.2f}"
    line = (
        f"Track 0: SDR vocals {model:.2f} dB (gain {model - mixture:+.2f}, NaN 20%), accompaniment "
    )
    assert line in describe_track(scored[0])

    assert usdr[0].startswith("uSDR in dB, whole track (MDX challenges)")
    models = [track.record["uSDR"]["accompaniment"] for track in scored]
    mixtures = [track.record["mixture_uSDR"]["accompaniment"] for track in scored]
    assert usdr[3].split()[-3:-1] == [f"{mixtures[1]:.2f}", f"{models[1]:.2f}"]
    assert usdr[-1].split()[-2] == f"{np.mean(models):.2f}"
    for table in (lines, usdr):
        assert len({len(line) for line in table}) == 1


def test_clipped_files_are_named(tmp_path):
    clipped = {0: {}, 1: {"mixture": 5, "bass": 2}}
    scored = [save(tmp_path, f"Track {seed}", clipped=found) for seed, found in clipped.items()]
    text = write_results(tmp_path, scored, {})
    assert "--float_references" in text
    assert "\n  Track 1: bass 2, mixture 5\n" in text
    for unclipped in (scored[:1], [save(tmp_path, "of an earlier version")]):
        assert "--float_references" not in write_results(tmp_path, unclipped, {})


@pytest.mark.smoke
def test_written_results_are_read_by_museval(scored, tmp_path):
    import museval

    text = write_results(tmp_path, scored, {"Quiet": "silent", "Bad": "damaged"})
    assert (tmp_path / "results.txt").read_text() == text
    assert "Not scored: 2 of 5 tracks\n  Bad: damaged\n  Quiet: silent" in text
    assert "Frames without a score (NaN): vocals 3 of 15 (20.0%), accompaniment 0 of 15" in text
    for aggregates in ("median over frames, median", "median over frames, mean", "mean over"):
        assert aggregates in text
    loaded, again = museval.EvalStore(), museval.EvalStore()
    loaded.load(str(tmp_path / "results.pandas"))
    again.add_eval_dir(str(tmp_path))
    assert loaded.agg_frames_tracks_scores().to_dict() == again.agg_frames_tracks_scores().to_dict()

    rows = (tmp_path / "results.csv").read_text().splitlines()
    columns = rows[0].split(",")
    first = dict(zip(columns, rows[1].split(","), strict=True))
    frames = loaded.agg_frames_scores()
    assert float(first["SDR_median"]) == pytest.approx(frames["Track 0", "vocals", "SDR"], abs=1e-5)
    assert float(first["uSDR"]) == pytest.approx(scored[0].record["uSDR"]["vocals"], abs=1e-5)
    assert (first["frames"], float(first["nan_share"])) == ("5", pytest.approx(0.2))
    assert len(rows) == 1 + 3 * 2


def test_nothing_scored_is_said(tmp_path):
    text = write_results(tmp_path, [], {"Quiet": "silent"})
    assert text == "\nNot scored: 1 of 1 tracks\n  Quiet: silent\n"
    assert {path.name for path in tmp_path.iterdir()} == set(RESULTS)
