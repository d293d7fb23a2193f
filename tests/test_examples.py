import errno
import io
import resource
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import RATE
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import end_of, flags, run_until

import train
from local.checkpoint import load_model
from local.inference import separate
from local.keys import KEYS
from local.musdb18_dataset import TrackDataset
from local.musdb18_tracks import find_tracks
from local.sdr import sum_sdr
from local.train import curves, examples
from local.train.checkpoints import list_last
from local.train.event_file import EventFile, make_audio
from local.train.examples import Examples, find_loudest, make_example
from local.train.spectrograms import draw_spectrograms

NAMES = ("Leaf - Summerghost", "M.E.R.C. Music - Knockout")  # of the tracks that are validated on
TARGETS = ("vocals", "accompaniment")
FOLDER = Path("tensorboard") / "examples"


def take_one_second(patch) -> None:
    """Of a track, as those of the corpus are short; and a round after every epoch."""
    patch.setattr(examples, "SECONDS", 1)
    patch.setattr(examples, "PAUSE", 0)


@pytest.fixture
def one_second(monkeypatch) -> None:
    take_one_second(monkeypatch)


@pytest.fixture(scope="module")
def names_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("names") / "valid.txt"
    path.write_text("\n".join(NAMES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_flags(corpus, names_file):
    """Flags of a run with examples."""

    def make(exp_dir: Path, *more, count=2) -> list[str]:
        return flags(exp_dir, corpus, "--valid_tracks", names_file, "--examples", count, *more)

    return make


@pytest.fixture(scope="module")
def run(run_flags, tmp_path_factory) -> Path:
    """A run with examples after every of three epochs."""
    exp_dir = tmp_path_factory.mktemp("examples") / "run"
    with pytest.MonkeyPatch.context() as patch:
        take_one_second(patch)
        train.main(run_flags(exp_dir))
    return exp_dir


def read_events(exp_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(exp_dir / FOLDER), size_guidance={"audio": 0, "images": 0}).Reload()


def list_steps(exp_dir: Path) -> dict[str, list[int]]:
    """Tag -> the steps at which TensorBoard shows it."""
    events = read_events(exp_dir)
    kinds = {"audio": events.Audio, "images": events.Images, "scalars": events.Scalars}
    return {
        tag: [event.step for event in read(tag)]
        for kind, read in kinds.items()
        for tag in events.Tags()[kind]
    }


def find_tracks_of(run: Path, corpus: Path) -> list:
    tracks = {track.name: track for track in find_tracks(corpus, "train", RATE)}
    return [tracks[name] for name in NAMES]


# What TensorBoard shows


def test_tensorboard_shows_audio_spectrograms_and_sdr_of_every_round(run):
    steps = list_steps(run)
    every = [3, 7, 11]  # those of val_loss
    shown = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("val_loss")
    assert [event.step for event in shown] == every
    assert steps == {
        f"{name}/{tag}": every[:1] if tag == "mixture" else every
        for name in NAMES
        for tag in ("mixture", *TARGETS, "spectrograms", *(f"sdr_{t}" for t in TARGETS))
    }


def test_audio_has_the_length_rate_and_channels_of_the_tracks(run):
    events = read_events(run)
    for tag in events.Tags()["audio"]:
        for event in events.Audio(tag):
            samples, rate = sf.read(io.BytesIO(event.encoded_audio_string), always_2d=True)
            assert (event.sample_rate, event.length_frames, event.content_type) == (
                *(RATE, RATE),
                "audio/wav",
            )
            assert (rate, samples.shape) == (RATE, (RATE, 2))


def test_the_estimates_are_those_of_the_model_at_the_loudest_vocals(run, corpus):
    events, model = read_events(run), load_model(run / "best_model.pth").eval()
    last = torch.load(list_last(run / "checkpoints")[0], weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in last.items()})
    for track in find_tracks_of(run, corpus):
        mixture, targets = TrackDataset([track])[0]
        start = find_loudest(targets[0], RATE)
        part = slice(start, start + RATE)
        estimates = separate(model, mixture, "full")[..., part]
        expected = dict(zip(TARGETS, estimates, strict=True))
        expected["mixture"] = mixture[..., part]
        for name, signal in expected.items():
            content = events.Audio(f"{track.name}/{name}")[-1].encoded_audio_string
            samples, _ = sf.read(io.BytesIO(content), dtype="float32")
            assert np.abs(samples.T - signal.numpy()).max() <= 1 / 32768
        sdr = sum_sdr(estimates[None], targets[None, ..., part])[0]
        for name, value in zip(TARGETS, sdr.tolist(), strict=True):
            assert events.Scalars(f"{track.name}/sdr_{name}")[-1].value == pytest.approx(value)


def test_spectrograms_are_images(run):
    events = read_events(run)
    for tag in events.Tags()["images"]:
        for event in events.Images(tag):
            with Image.open(io.BytesIO(event.encoded_image_string)) as image:
                assert image.format == "PNG"
                assert image.size == (event.width, event.height)
                assert len(image.convert("RGB").getcolors(2**24)) > 100


@pytest.mark.parametrize("count", [1, 5])
def test_it_is_the_first_tracks(count, one_second, run_flags, tmp_path):
    train.main(run_flags(tmp_path / "run", "--epochs", 1, count=count))
    tracks = {tag.partition("/")[0] for tag in list_steps(tmp_path / "run")}
    assert tracks == set(NAMES[:count])


# What a run computes


def test_weights_random_states_and_metrics_are_those_of_a_run_without(run, run_flags, tmp_path):
    train.main(run_flags(tmp_path / "run", count=0))
    assert not (tmp_path / "run" / FOLDER).exists()
    assert end_of(tmp_path / "run") == end_of(run)
    states = [
        torch.load(list_last(exp_dir / "checkpoints")[0], weights_only=True)["callbacks"]
        for exp_dir in (tmp_path / "run", run)
    ]
    assert (
        states[0]["RandomStates"]["ranks"][0]["python"]
        == (states[1]["RandomStates"]["ranks"][0]["python"])
    )
    for kind in ("torch", "numpy"):
        one, other = (state["RandomStates"]["ranks"][0][kind] for state in states)
        assert torch.equal(one, other) if kind == "torch" else one == other


# Resuming


@pytest.fixture
def small_images(monkeypatch) -> None:
    """They take most of the time otherwise."""
    monkeypatch.setattr(examples, "draw_spectrograms", lambda *args: Figure((1, 1)))
    monkeypatch.setattr(curves, "plot_curves", lambda *args: Figure((1, 1)))


@pytest.mark.parametrize("batches", [[3], [8], [9], [17, 6], [21]])
def test_nothing_is_written_twice_on_resume(
    batches, run, one_second, small_images, run_flags, tmp_path, monkeypatch
):
    for batch in batches:
        run_until(batch, run_flags(tmp_path / "run"), monkeypatch)
    train.main(run_flags(tmp_path / "run"))
    assert list_steps(tmp_path / "run") == list_steps(run)
    assert end_of(tmp_path / "run") == end_of(run)


def test_the_number_of_tracks_may_change_and_the_folder_may_go(
    one_second, small_images, run_flags, tmp_path, monkeypatch
):
    exp_dir = tmp_path / "run"
    run_until(9, run_flags(exp_dir, count=1), monkeypatch)
    run_until(9, run_flags(exp_dir), monkeypatch)
    steps = list_steps(exp_dir)
    assert steps[f"{NAMES[0]}/mixture"] == [3]
    assert steps[f"{NAMES[1]}/mixture"] == [7]
    for path in (exp_dir / FOLDER).iterdir():
        path.unlink()
    (exp_dir / FOLDER).rmdir()
    train.main(run_flags(exp_dir))
    assert {tuple(steps) for steps in list_steps(exp_dir).values()} == {(11,)}


def test_ten_minutes_are_between_two_rounds(small_images, run_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "SECONDS", 1)
    run_until(17, run_flags(tmp_path / "run"), monkeypatch)
    train.main(run_flags(tmp_path / "run"))
    assert {tuple(steps) for steps in list_steps(tmp_path / "run").values()} == {(3,)}


# What goes wrong


def test_a_full_disk_ends_no_run(
    one_second, small_images, run_flags, tmp_path, monkeypatch, capsys
):
    def fail(file, step, values=()):
        raise OSError(errno.ENOSPC, "No space left on device", str(file.path))

    monkeypatch.setattr(EventFile, "write", fail)
    exp_dir = tmp_path / "run"
    train.main(run_flags(exp_dir))
    assert (exp_dir / "best_model.pth").is_file()
    assert capsys.readouterr().err.count("examples cannot be written") == 1
    assert (exp_dir / "train.log").read_text().count("examples cannot be written") == 1


def test_events_are_written_whole_or_not_at_all(tmp_path):
    rng = np.random.default_rng(0)
    values = [make_audio(f"{n}", rng.uniform(-1, 1, (RATE, 2)), RATE) for n in range(2)]
    file = EventFile(tmp_path / "new", 0)
    file.write(1, values)
    size = file.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40_000, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError):
            file.write(2, values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.path.stat().st_size == size
    file.write(3, values)
    events = EventAccumulator(str(tmp_path / "new")).Reload()
    assert [[event.step for event in events.Audio(tag)] for tag in ("0", "1")] == [[1, 3]] * 2


def test_later_events_of_an_earlier_process_are_void(tmp_path):
    audio = make_audio("a", np.zeros((RATE, 2)), RATE)
    for number, (begin, step) in enumerate([(0, 1), (2, 2), (2, 3)]):
        file = EventFile(tmp_path, begin)
        file.path = file.path.with_name(f"events.out.tfevents.{number}")
        file.write(step, [audio])
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Audio("a")] == [1, 3]


def test_other_ranks_and_what_lightning_calls_a_sanity_check_write_nothing(tmp_path):
    callback = Examples(tmp_path, 2)
    for is_first, checks in [(True, True), (False, False)]:
        trainer = SimpleNamespace(
            is_global_zero=is_first, sanity_checking=checks, global_step=3, world_size=2
        )
        callback.on_train_start(trainer, None)
        callback.on_validation_start(trainer, None)
        callback.on_validation_batch_end(trainer, None, torch.ones(1), [torch.ones(1)] * 2, 0)
        callback.on_validation_end(trainer, None)
    assert not any(tmp_path.iterdir())


def test_how_many_must_not_be_negative(run_flags, tmp_path, error_of):
    assert "--examples must be at least 0" in error_of(train.main, *run_flags(tmp_path, count=-1))
    assert KEYS["training"]["examples"].is_free


# The piece of a track


@pytest.mark.parametrize("start", [0, 4, 15])
def test_the_loudest_ten_seconds_are_found(start):
    signal = torch.full((2, 25 * 100 + 50), 0.01)
    signal[0, start * 100 : (start + 10) * 100] = 0.1
    signal[:, -50:] = 1  # no whole second
    assert find_loudest(signal, 100) == start * 100


@pytest.mark.parametrize("samples", [1, 99, 999])
def test_of_a_short_track_it_is_all(samples):
    assert find_loudest(torch.ones(2, samples), 100) == 0
    part = make_example("a", 100, TARGETS, torch.ones(2, samples), *torch.ones(2, 2, 2, samples))
    assert {signal.shape for signal in part.signals.values()} == {(samples, 2)}


def test_a_silent_target_has_no_sdr_and_silence_can_be_drawn():
    mixture, targets = torch.zeros(2, 4000), torch.zeros(2, 2, 4000)
    targets[1, 0, 5] = mixture[0, 5] = 0.5
    part = make_example("a", 400, TARGETS, mixture, targets, 0.5 * targets)
    assert part.sdr == {"accompaniment": pytest.approx(6.02, abs=0.01)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_spectrograms(part.signals | {"silence": np.zeros((4000, 2))}, 400)
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes[:4]] == [
        *("mixture", *TARGETS, "silence")
    ]
    for axes in figure.axes[:4]:
        assert axes.get_xlim() == (0, 10)
        assert axes.get_ylim() == (0, 0.2)
