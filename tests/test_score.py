import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, ROOT, make_stems, run_python, write_times
from test_eval import contents, kill, start, wait_for

from local.eval.score_files import read_scores
from local.score import main

TARGETS = ("drums", "piano", "vocals")


def write(folder: Path, signals: dict[str, np.ndarray], suffix="wav", rate=RATE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for target, audio in signals.items():
        sf.write(folder / f"{target}.{suffix}", audio, rate)


def make_signals(seed: int, seconds=2.3) -> tuple[dict, dict]:
    """References and estimates of TARGETS, (T, 2) on the grid of 16 bits."""
    stems = make_stems(seconds, RATE, seed)
    references = dict(zip(TARGETS, (stems["drums"], stems["other"], stems["vocals"]), strict=True))
    noise = np.random.default_rng(seed).integers(-300, 300, stems["drums"].shape)
    return references, {t: (0.7 * x + noise).astype(np.int16) for t, x in references.items()}


@pytest.fixture(scope="module")
def shared_folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for seed, (name, suffix) in enumerate({"A": "wav", "B. 2": "flac"}.items()):
        references, estimates = make_signals(seed)
        write(root / "true" / name, references, suffix)
        write(root / "found" / name, estimates)
    return root


@pytest.fixture
def folders(shared_folders, tmp_path) -> Path:
    return Path(shutil.copytree(shared_folders, tmp_path / "folders"))


def score(folders: Path, *flags) -> Path:
    main([str(folders / "true"), str(folders / "found"), "-o", str(folders / "out"), *flags])
    return folders / "out"


def museval_json(true: Path, found: Path) -> list[dict]:
    """museval's own of a folder of references and one of estimates."""
    import museval

    audio = [np.stack([sf.read(f / f"{t}.wav")[0] for t in TARGETS]) for f in (true, found)]
    ratios = museval.evaluate(*audio, win=RATE, hop=RATE)
    store = museval.TrackStore("A", win=1.0, hop=1.0)
    for target in ("vocals", "drums", "piano"):  # known ones first
        sdr, isr, sir, sar = (values[TARGETS.index(target)].tolist() for values in ratios)
        store.add_target(target, {"SDR": sdr, "ISR": isr, "SIR": sir, "SAR": sar})
    return json.loads(store.json)


def test_scores_of_any_targets_are_those_of_museval(folders, capsys):
    """An estimate of another length is cut or padded, as there, which is said."""
    audio, _ = sf.read(folders / "found" / "A" / "piano.wav", dtype="int16")
    write(folders / "found" / "A", {"piano": audio[:-77], "drums": np.pad(audio, [(0, 9), (0, 0)])})
    write(folders / "found" / "A", {"mixture": audio})
    out = score(folders)
    found = json.loads((out / "test" / "A.json").read_text())
    padded = {"piano": np.pad(audio[:-77], [(0, 77), (0, 0)]), "drums": audio}
    write(folders / "found" / "A", padded)
    assert found == museval_json(folders / "true" / "A", folders / "found" / "A")
    printed = capsys.readouterr().out
    for note in ("another length, cut or padded with zeros as by museval", "mixture, not scored"):
        assert f"{note}: 1, first A" in printed
    assert "the mixture is the sum of drums, piano, vocals: 2, first A" in printed
    for name in ("results.txt", "results.csv", "results.pandas", "final_metrics.json"):
        assert (out / name).is_file()
    metrics = json.loads((out / "final_metrics.json").read_text())
    assert {f"{t}_SI_SDR_median" for t in TARGETS} < metrics.keys()


def test_the_accompaniment_is_compared_with_the_sum_of_the_stems(folders, capsys):
    for name in ("A", "B. 2"):
        references = {
            path.stem: sf.read(path, dtype="int16")[0]
            for path in (folders / "true" / name).iterdir()
        }
        summed = references["drums"] + references["piano"]
        write(folders / "again" / name, {"vocals": references["vocals"], "accompaniment": summed})
        shutil.move(folders / "found" / name / "drums.wav", folders / f"{name}.wav")
        estimate, rate = sf.read(folders / f"{name}.wav", dtype="int16")
        write(folders / "found" / name, {"accompaniment": estimate}, rate=rate)
        (folders / "found" / name / "piano.wav").unlink()
    out = score(folders)
    printed = capsys.readouterr().out
    assert "accompaniment is compared with the sum of drums, piano: 2," in printed
    assert "references of piano without estimates, not scored: 2," in printed
    main([str(folders / name) for name in ("again", "found")] + ["-o", str(folders / "out2")])
    for file in ("test/A.json", "test/B. 2.json", "results.txt"):
        assert (folders / "out2" / file).read_text() == (out / file).read_text()


def test_one_track_has_the_name_of_its_folder(folders):
    main([*(str(folders / kind / "A") for kind in ("true", "found")), "-o", str(folders / "out")])
    assert [path.name for path in (folders / "out" / "test").glob("*.json")] == ["A.json"]


def test_a_second_run_scores_what_has_changed(folders, capsys):
    out = score(folders, "--jobs", "2")
    before = write_times(out / "test")
    capsys.readouterr()
    score(folders)
    assert "2 tracks scored already" in capsys.readouterr().out
    assert write_times(out / "test") == before
    _, estimates = make_signals(7)
    write(folders / "found" / "A", {"vocals": estimates["vocals"]})
    (folders / "found" / "B. 2" / "piano.wav").unlink()
    score(folders)
    printed = capsys.readouterr().out
    assert "1 track to score again, its files have changed: A\n" in printed
    assert "1 track to score again, made with targets " in printed
    assert set(read_scores(out / "test" / "B. 2.json")) == {"drums", "vocals"}


def test_killed_it_resumes_to_the_same_results(tmp_path):
    for seed in range(4):
        references, estimates = make_signals(seed, seconds=20)
        write(tmp_path / "true" / f"{seed}", references)
        write(tmp_path / "found" / f"{seed}", estimates)
    undisturbed = score(tmp_path).rename(tmp_path / "undisturbed")
    words = [ROOT / "local/score.py", tmp_path / "true", tmp_path / "found", "--jobs", 1]
    process = start(*words, "--out", tmp_path / "out")
    wait_for(process, lambda: any((tmp_path / "out").glob("test/[!.]*.json")))
    kill(process)
    assert not (tmp_path / "out" / "results.txt").exists()
    score(tmp_path)
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_a_track_that_cannot_be_scored_costs_no_file_but_its_scores(folders, capsys):
    out = score(folders)
    silence, _ = sf.read(folders / "found" / "A" / "drums.wav", dtype="int16")
    write(folders / "found" / "A", dict.fromkeys(("drums", "piano"), 0 * silence))
    kept = out / "A" / "vocals.wav"  # of the user, where eval.py saves estimates
    kept.parent.mkdir()
    kept.touch()
    before = sorted((folders / "found").rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        score(folders)
    assert exit_.value.code == 1
    assert "Not scored: 1 of 2 tracks\n  A: " in capsys.readouterr().out
    assert kept.exists()
    assert sorted((folders / "found").rglob("*")) == before
    assert {path.stem for path in (out / "test").iterdir()} == {"B. 2"}


def test_all_faults_are_reported_together_and_nothing_is_written(folders, error_of):
    true, found = folders / "true", folders / "found"
    long, estimates = make_signals(0, seconds=3)
    write(found / "C", estimates)
    write(true / "A", {"piano": long["piano"]})
    write(found / "A", {"guitar": estimates["vocals"], "vocals": estimates["vocals"][:, :1]})
    write(found / "B. 2", {"piano": estimates["piano"]}, suffix="flac")
    error = error_of(main, true, found, "-o", folders / "out")
    assert str(found / "B. 2" / "piano.flac") in error
    (found / "B. 2" / "piano.flac").unlink()
    (found / "B. 2" / "piano.wav").write_bytes(b"RIFF")
    (found / "B. 2" / "drums.wav").unlink()
    error = error_of(main, true, found, "-o", folders / "out")
    for fault in (
        f"{found / 'C'} has no track of this name in REFERENCES",
        f"{found / 'A' / 'guitar.wav'}: no reference of guitar",
        f"{found / 'B. 2' / 'piano.wav'}: cannot be read",
    ):
        assert fault in error
    (found / "A" / "guitar.wav").unlink()
    shutil.rmtree(found / "C")
    (found / "B. 2" / "piano.wav").unlink()
    error = error_of(main, true, found, "-o", folders / "out")
    for fault in (
        f"{true / 'A' / 'piano.wav'}: expected {round(2.3 * RATE)} samples",
        f"{found / 'A' / 'vocals.wav'}: expected {RATE} Hz and 2 channels",
        f"{found / 'B. 2' / 'vocals.wav'}: BSSEval needs two targets or more",
    ):
        assert fault in error
    assert not (folders / "out").exists()


def test_folders_that_are_none(folders, tmp_path, error_of):
    (tmp_path / "empty").mkdir()
    flags = ["-o", folders / "out"]
    error = error_of(main, tmp_path / "empty", tmp_path / "gone", *flags)
    assert f"REFERENCES: {tmp_path / 'empty'} holds no TRACK/TARGET.wav" in error
    assert f"ESTIMATES: {tmp_path / 'gone'}: No such file" in error
    error = error_of(main, folders / "true" / "A", folders / "found", *flags)
    assert f"{folders / 'true' / 'A'} is the folder of one track" in error
    assert "--jobs must be at least 1" in error_of(
        main, folders / "true", folders / "found", *flags, "--jobs", 0
    )
    assert not (folders / "out").exists()


@pytest.mark.parametrize("place", ["found", "true"])
def test_what_is_scored_is_never_written_to(place, folders, error_of):
    before = write_times(folders)
    error = error_of(main, folders / "true", folders / "found", "--out", folders / place)
    assert f"--out: {folders / place} holds the test tracks" in error
    assert write_times(folders) == before


def test_scores_of_eval_are_not_replaced(folders, error_of):
    (folders / "out" / "test").mkdir(parents=True)
    (folders / "out" / "test" / "A.json").write_text("{}")
    (folders / "out" / "test" / "A.yml").write_text("made_with: {method: full}")
    before = write_times(folders)
    error = error_of(main, folders / "true", folders / "found", "--out", folders / "out")
    assert f"--out: {folders / 'out'} holds scores of eval.py" in error
    assert write_times(folders) == before


def test_scoring_needs_no_torch(folders):
    (folders / "found" / "A" / "vocals.mp3").touch()
    words = [*(str(folders / kind) for kind in ("true", "found")), "-o", str(folders / "out")]
    script = folders / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import local.score\n"
        f"if __name__ == '__main__': local.score.main({words!r}); print('torch' in sys.modules)"
    )
    result = run_python(script, own_process=True)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "False"), result.stderr
    assert "neither wav nor flac, not read: 1, first " in result.stdout
