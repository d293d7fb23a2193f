"""The command, on songs of every kind that ffmpeg here can write, and between two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import (
    PEAK_MB,
    ROOT,
    linux,
    make_stems,
    random_model,
    run_python,
    slow,
    start_python,
    write_song,
    write_times,
)

from local import raw_stream
from local import separate as command
from local.checkpoint import load_model
from local.estimates import save_estimates
from local.inference import separate
from local.musdb18_tracks import SOURCES, TARGETS
from local.songs.read import SongReader
from local.streaming import StreamingConvTasNet
from local.tools.command_line import CLOSED_PIPE
from local.tools.wav import WavWriter

RATE = 16000  # of the models
SMALL = dict(N=8, L=8, B=8, H=8, X=2, R=1, C=2, audio_channels=2, samplerate=RATE)


def separate_songs(*args) -> int:
    with pytest.raises(SystemExit) as exit_:
        command.main([str(arg) for arg in args])
    return exit_.value.code


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = {"non-causal": {}, "causal": dict(causal=True, norm_type="cLN"), "mono": {}, "four": {}}
    kinds["mono"] = dict(audio_channels=1)
    kinds["four"] = dict(causal=True, norm_type="cLN", C=4)
    for name, kind in kinds.items():
        random_model({**SMALL, **kind}).save_pretrained(folder / name)
    return {name: folder / name for name in kinds}


@pytest.fixture
def flags(checkpoints, tmp_path) -> list:
    return ["--checkpoint", checkpoints["non-causal"], "--out", tmp_path / "out"]


def read(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: sf.read(path, dtype="float32")[0] for path in folder.glob("*.wav")}


@pytest.mark.smoke
def test_the_estimates_are_those_of_the_model(flags, checkpoints, tmp_path):
    audio = write_song(tmp_path / "song.wav")
    assert separate_songs(tmp_path / "song.wav", *flags, "--float32") == 0
    model = load_model(checkpoints["non-causal"])
    vocals, accompaniment = separate(model, torch.from_numpy(audio.T.copy()))
    found = read(tmp_path / "out" / "song")
    np.testing.assert_allclose(found["vocals"].T, vocals, atol=1e-6)
    np.testing.assert_allclose(found["accompaniment"].T, accompaniment, atol=1e-6)


@pytest.mark.parametrize("suffix", [".mp3", ".m4a", ".flac", ".ogg", ".wav"])
@pytest.mark.parametrize("rate, channels", [(16000, 2), (44100, 2), (8000, 1), (48000, 1)])
def test_length_rate_and_channels_stay_those_of_the_song(suffix, rate, channels, flags, tmp_path):
    song = tmp_path / f"song{suffix}"
    write_song(song, rate, channels)
    assert separate_songs(song, *flags) == 0
    reader = SongReader(song)
    decoded = np.concatenate(list(reader.read_blocks()))
    assert (reader.rate, reader.damage, decoded.shape[1]) == (rate, "", channels)
    for target in TARGETS:
        info = sf.info(tmp_path / "out" / "song" / f"{target}.wav")
        assert (info.frames, info.samplerate, info.channels) == (len(decoded), rate, channels)
        assert info.subtype == "PCM_16"


class Halves(torch.nn.Module):
    """Both sources are half of the mixture."""

    C, audio_channels, samplerate = 2, 2, RATE

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Identity()
        self.encoder.length = 2
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, mixture):
        return torch.stack([mixture / 2, mixture / 2], dim=1)


@pytest.mark.parametrize("rate, channels", [(22050, 2), (44100, 1), (11025, 2)])
def test_resampling_there_and_back_changes_little(rate, channels, flags, tmp_path, monkeypatch):
    """All that is below both Nyquist frequencies comes back where it was."""
    time_ = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 1234 * time_) * np.hanning(rate)
    audio = np.stack([tone, 0.3 * tone][:channels], axis=1)
    sf.write(tmp_path / "song.wav", audio, rate, "FLOAT")
    monkeypatch.setattr("local.estimates.load_separator", lambda checkpoint: Halves())
    assert separate_songs(tmp_path / "song.wav", *flags, "--float32") == 0
    found = read(tmp_path / "out" / "song")
    error = found["vocals"].reshape(audio.shape) - audio / 2
    assert np.abs(error).max() < 1e-4
    np.testing.assert_array_equal(found["vocals"], found["accompaniment"])


def test_more_channels_than_two_are_mixed_down(flags, tmp_path):
    write_song(tmp_path / "song.wav", channels=6)
    assert separate_songs(tmp_path / "song.wav", *flags) == 0
    assert sf.info(tmp_path / "out" / "song" / "vocals.wav").channels == 2


@pytest.mark.parametrize("method", ["overlap-add", "full", "stream"])
def test_methods(method, checkpoints, tmp_path):
    audio = write_song(tmp_path / "song.wav", seconds=2)
    flags = ["--checkpoint", checkpoints["causal"], "-o", tmp_path / "out", "-d", "cpu"]
    flags += ["--method", method, "--segment", 0.5, "--overlap", 0.1, "--float32"]
    assert separate_songs(tmp_path / "song.wav", *flags) == 0
    model, mixture = load_model(checkpoints["causal"]), torch.from_numpy(audio.T.copy())
    expected = separate(model, mixture, method, 0.5, 0.1)[0]
    np.testing.assert_allclose(read(tmp_path / "out" / "song")["vocals"].T, expected, atol=1e-6)


def test_a_folder_keeps_its_order_and_other_files_are_named(flags, tmp_path, capsys):
    songs = tmp_path / "songs"
    for number, name in enumerate(["one.flac", "album/one.wav", 'album/M.E.R.C. "é": x.wav']):
        write_song(songs / name, seed=number)
    (songs / "cover.txt").write_text("not a song")
    (songs / ".hidden.wav").write_bytes(b"")
    assert separate_songs(songs, *flags) == 0
    out = tmp_path / "out"
    assert {str(path.relative_to(out)) for path in out.rglob("vocals.wav")} == {
        "one/vocals.wav",
        "album/one/vocals.wav",
        'album/M.E.R.C. "é": x/vocals.wav',
    }
    printed = capsys.readouterr()
    assert "1 other file ignored, first cover.txt" in printed.out
    assert "3 songs separated" in printed.out
    assert "[2/3]" in printed.err and "one.flac" in printed.err


def test_what_was_written_into_the_folder_is_no_song_of_it(checkpoints, tmp_path):
    write_song(tmp_path / "song.wav")
    flags = ["--checkpoint", checkpoints["non-causal"], "--out", tmp_path / "separated"]
    for _ in range(2):
        assert separate_songs(tmp_path, *flags) == 0
    assert len(list((tmp_path / "separated").rglob("vocals.wav"))) == 1


def test_what_exists_is_kept_unless_overwritten(flags, tmp_path, capsys):
    write_song(tmp_path / "song.wav")
    separate_songs(tmp_path / "song.wav", *flags)
    before = write_times(tmp_path / "out")
    assert separate_songs(tmp_path / "song.wav", *flags) == 0
    assert write_times(tmp_path / "out") == before
    assert "--overwrite makes it again" in capsys.readouterr().out
    assert separate_songs(tmp_path / "song.wav", *flags, "--overwrite") == 0
    assert write_times(tmp_path / "out") != before
    # Half of a song, as a killed run leaves it, is no song.
    (tmp_path / "out" / "song" / "accompaniment.wav").unlink()
    assert separate_songs(tmp_path / "song.wav", *flags) == 0
    assert (tmp_path / "out" / "song" / "accompaniment.wav").is_file()


def test_estimates_that_something_else_made_are_not_taken_for_those_of_a_song(
    flags, checkpoints, tmp_path, capsys
):
    song, folder = tmp_path / "song.wav", tmp_path / "out" / "song"
    write_song(song)
    separate_songs(song, *flags)
    before = write_times(folder)
    other = ["--checkpoint", checkpoints["causal"], "--out", tmp_path / "out"]
    for others in ([*flags, "--segment", "2"], [*flags, "--float32"], other):
        assert separate_songs(song, *others) == 1
        assert "--overwrite" in capsys.readouterr().err
    write_song(tmp_path / "other" / "song.wav", seed=1)
    assert separate_songs(tmp_path / "other" / "song.wav", *flags) == 1
    assert "another song" in capsys.readouterr().err
    (folder / "made_from.yml").write_text("song: [")
    assert separate_songs(song, *flags) == 1
    assert "no record" in capsys.readouterr().err
    (folder / "made_from.yml").unlink()
    assert write_times(folder).items() <= before.items()
    assert separate_songs(song, *flags, "--overwrite") == separate_songs(song, *flags) == 0


def test_the_rest_of_a_damaged_song_stays_a_fault(flags, tmp_path, capsys):
    song = tmp_path / "song.wav"
    write_song(song)
    song.write_bytes(song.read_bytes()[:-1000])
    for _ in range(2):
        assert separate_songs(song, *flags) == 1
        assert "damaged" in capsys.readouterr().err


def test_broken_songs_are_reported_and_the_others_separated(flags, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "a noise.mp3").write_bytes(rng.bytes(3000))
    (tmp_path / "b empty.wav").write_bytes(b"")
    (tmp_path / "c text.wav").write_text("not a song")
    write_song(tmp_path / "d cut.flac", seconds=3)
    content = (tmp_path / "d cut.flac").read_bytes()
    (tmp_path / "d cut.flac").write_bytes(content[: len(content) // 2])
    sf.write(tmp_path / "e nan.wav", np.full((100, 2), np.nan), RATE, "FLOAT")
    sf.write(tmp_path / "f none.wav", np.zeros((0, 2)), RATE)
    write_song(tmp_path / "g good.wav")
    assert separate_songs(tmp_path, *flags) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    for song, fault in {
        "a noise.mp3": "ffprobe cannot read it",
        "b empty.wav": "ffprobe cannot read it",
        "c text.wav": "ffprobe cannot read it",
        "d cut.flac": "damaged; separated what ffmpeg could read",
        "e nan.wav": "holds NaN or infinity",
        "f none.wav": "holds no audio",
    }.items():
        assert any(song in line and fault in line for line in printed.err.splitlines()), song
    assert "1 song separated" in printed.out
    assert "6 with faults" in printed.out
    found = {path.parent.name for path in (tmp_path / "out").rglob("vocals.wav")}
    assert found == {"d cut", "g good"}


def test_loud_estimates_are_clipped_not_wrapped(tmp_path):
    loud = np.array([[2.0, -2.0, 1.0, -1.0, 0.5, 1 / 32768]] * 2)
    save_estimates(tmp_path / "t", {"vocals": loud}, RATE, "wav16")
    audio, _ = sf.read(tmp_path / "t" / "vocals.wav", dtype="int16")
    assert audio[:, 0].tolist() == [32767, -32768, 32767, -32768, 16384, 1]
    save_estimates(tmp_path / "t", {"vocals": loud}, RATE, "float32")
    audio, _ = sf.read(tmp_path / "t" / "vocals.wav", dtype="float32")
    np.testing.assert_array_equal(audio.T, loud.astype(np.float32))


def test_clipped_samples_are_counted(flags, tmp_path, capsys, monkeypatch):
    sf.write(tmp_path / "song.wav", np.full((100, 2), 2.5), RATE, "FLOAT")
    monkeypatch.setattr("local.estimates.load_separator", lambda checkpoint: Halves())
    separate_songs(tmp_path / "song.wav", *flags)
    assert (
        "400 samples clipped at full scale in these files; see --float32" in capsys.readouterr().out
    )
    assert read(tmp_path / "out" / "song")["vocals"].max() == 32767 / 32768


@pytest.mark.parametrize("name", ["one.wav", "...wav", b"not utf-8 \xff.wav"])
@pytest.mark.parametrize("rate", [RATE, 3 * RATE, RATE // 2])
def test_a_song_of_one_sample_and_awkward_names(name, rate, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sf.write(os.fsencode(name), np.full((1, 2), 0.5), rate, format="WAV")
    assert separate_songs(os.fsdecode(name), *flags) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert sf.info(os.fsencode(folder / "vocals.wav")).frames == 1


def test_both_files_are_replaced_or_none(flags, tmp_path, monkeypatch):
    write_song(tmp_path / "song.wav")
    separate_songs(tmp_path / "song.wav", *flags)
    before, write = write_times(tmp_path / "out"), WavWriter.write

    def write_one(self, samples):
        if "accompaniment" in self.path.name:
            raise KeyboardInterrupt
        write(self, samples)

    monkeypatch.setattr(WavWriter, "write", write_one)
    assert separate_songs(tmp_path / "song.wav", *flags, "--overwrite") == 130
    after = write_times(tmp_path / "out")
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_song_leaves_no_file(number, flags, tmp_path):
    song = tmp_path / "song.flac"
    tone = ["-f", "lavfi", "-i", "sine=440:r=44100", "-t", "3000"]
    subprocess.run(["ffmpeg", "-loglevel", "error", *tone, "-ac", "2", str(song)], check=True)
    words = ("-m", "local.separate", song, *flags)
    process = start_python(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list((tmp_path / "out").rglob(".vocals.wav.tmp")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_disk_that_is_full(flags, tmp_path, monkeypatch, capsys):
    write_song(tmp_path / "song.wav")

    def fail(*args, **kwargs):
        raise sf.LibsndfileError(2)  # as libsndfile says it

    monkeypatch.setattr(sf.SoundFile, "write", fail)
    assert separate_songs(tmp_path / "song.wav", *flags) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "song").iterdir())


def test_songs_with_one_name_go_to_folders_of_their_own(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("local.estimates.load_separator", lambda checkpoint: Halves())
    flac = write_song(tmp_path / "song.flac", seed=1)
    wav = write_song(tmp_path / "song.wav", seed=2)
    write_song(tmp_path / "b" / "song.wav", seed=3)
    songs = [tmp_path / name for name in ("song.flac", "song.wav", "b/song.wav", "song.flac")]
    assert separate_songs(*songs, *flags) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"song", "song.wav", "song (2)"}
    said = capsys.readouterr().out
    assert f"{songs[1]}: goes to {tmp_path / 'out' / 'song.wav'}" in said
    assert f"{songs[2]}: goes to {tmp_path / 'out' / 'song (2)'}" in said
    assert "3 songs separated" in said
    for name, audio in {"song": flac, "song.wav": wav}.items():  # each its own
        error = read(tmp_path / "out" / name)["vocals"] - audio / 2
        assert np.abs(error).max() < 1e-4


def test_a_folder_that_cannot_be_written_is_found_before_the_first_song(
    flags, tmp_path, monkeypatch, error_of
):
    write_song(tmp_path / "song.wav")
    monkeypatch.setattr(command, "separate_song", lambda *args: pytest.fail("separated"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    error = error_of(command.main, tmp_path / "song.wav", *flags, "--out", out)
    assert f"--out: {out} cannot be written" in error
    touch = Path.touch

    def refuse(self, *args):
        if self.parent == tmp_path / "out":
            raise PermissionError(13, "Permission denied")
        touch(self, *args)

    monkeypatch.setattr(Path, "touch", refuse)
    error = error_of(command.main, tmp_path / "song.wav", *flags)
    assert f"--out: {tmp_path / 'out'} cannot be written: Permission denied" in error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_a_song_without_memory_does_not_stop_the_others(
    error, flags, tmp_path, monkeypatch, capsys
):
    for name in "abc":
        write_song(tmp_path / f"{name}.wav")
    separate_song = command.separate_song

    def separate_or_fail(model, song, *args):
        if song.stem == "b":
            raise error
        return separate_song(model, song, *args)

    monkeypatch.setattr(command, "separate_song", separate_or_fail)
    assert separate_songs(tmp_path, *flags) == 1
    printed = capsys.readouterr()
    assert "[2/3] b.wav: out of memory" in printed.err and "--segment below" in printed.err
    assert "2 songs separated" in printed.out and "1 with faults" in printed.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "c"}


def test_full_says_what_memory_it_needs_and_is_not_tried_without(
    flags, tmp_path, monkeypatch, capsys
):
    write_song(tmp_path / "song.wav")
    assert separate_songs(tmp_path / "song.wav", *flags, "--method", "full") == 0
    assert "--method full needs about 0.1 GB of memory" in capsys.readouterr().out
    monkeypatch.setattr("local.songs.separation.free_memory", lambda: 10_000_000)
    assert separate_songs(tmp_path / "song.wav", *flags, "--method", "full", "--overwrite") == 1
    error = capsys.readouterr().err
    assert "--method full needs about 0.1 GB" in error and "--method overlap-add" in error
    assert separate_songs(tmp_path / "song.wav", *flags, "--overwrite") == 1
    error = capsys.readouterr().err
    assert "--method overlap-add needs about 0.1 GB" in error and "--segment below" in error


@linux
@pytest.mark.parametrize(
    "kind, method",
    [("non-causal", "overlap-add"), pytest.param("causal", "stream", marks=slow)],
)
def test_memory_does_not_grow_with_the_song(kind, method, checkpoints, tmp_path):
    """Of ffmpeg's reading, resampling, separating and writing; 1,000 s are 380 MB in all files."""
    peaks = []
    for seconds in (100, 1000):
        song = tmp_path / f"{seconds}.flac"
        subprocess.run(
            ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", "sine=440:r=22050"]
            + ["-ac", "2", "-t", str(seconds), str(song)],
            check=True,
        )
        words = [song, "--checkpoint", checkpoints[kind], "--out", tmp_path / "out", "--float32"]
        result = run_python("-c", PEAK, ROOT, *words, "--method", method, own_process=True)
        assert result.returncode == 0, result.stderr
        peaks.append(float(result.stdout.splitlines()[-1]))
    assert peaks[1] < peaks[0] + 30


PEAK = f"""
import sys
sys.path.insert(0, sys.argv[1])
from local.separate import main
try:
    main(sys.argv[2:])
except SystemExit as end:
    assert end.code == 0
print({PEAK_MB})
"""


def test_faults_of_the_arguments(checkpoints, tmp_path, error_of):
    write_song(tmp_path / "song.wav")
    song, checkpoint = tmp_path / "song.wav", ["--checkpoint", checkpoints["non-causal"]]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for args, message in {
        (tmp_path / "fifo",): "no such file or folder",
        ("x" * 300,): "no such file or folder",
        (tmp_path, "--out", tmp_path): "name another folder to write to",
        (): "name a SONG, or use --stream",
        (tmp_path / "gone.wav",): "no such file or folder",
        (tmp_path / "folder",): "holds no song",
        (song, "--out", tmp_path / "file"): "is a file",
        (song, "--device", "gpu"): "--device must be cpu, cuda, or cuda: and a number, got gpu",
        (song, "--method", "stream"): "--method: only a causal model",
        (song, "--overlap", 7): "--segment, --overlap: expected 0 <= overlap < segment",
        (song, "--segment", "0.0001", "--overlap", 0): "segment must be at least",
        (song, "--method", "fast"): "invalid choice: 'fast'",
        (song, "--stream", "vocals"): "--stream reads stdin",
        (song, "--block", 20): "--block needs --stream",
        (song, "--alpha", 0.5): "--alpha is for --stream remix",
        ("--stream", "--alpha", 0.5): "--alpha is for --stream remix",
        ("--stream", "remix"): "--stream remix needs an --alpha from 0 to 1",
        ("--stream", "remix", "--alpha", 2): "--stream remix needs an --alpha from 0 to 1, got 2",
        ("--stream", "--block", 0): "--block must be above 0",
        ("--stream", "--block", "nan"): "--block must be above 0",
    }.items():
        assert message in error_of(command.main, *args, *checkpoint), args
    error = error_of(command.main, song, "--checkpoint", checkpoints["mono"])
    assert "expected a stereo model" in error
    error = error_of(command.main, song, "--checkpoint", tmp_path / "gone.pth")
    assert "--checkpoint: no such file or folder" in error
    error = error_of(command.main, "gone", "--device", "x", *checkpoint)
    assert "2 faults" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(checkpoints, tmp_path, error_of):
    write_song(tmp_path / "song.wav")
    args = [tmp_path / "song.wav", "--checkpoint", checkpoints["causal"], "--device", "cuda:1"]
    assert "use --device cpu" in error_of(command.main, *args)


# Streams


@pytest.fixture
def stream(checkpoints, tmp_path, monkeypatch, capsys):
    """Runs the command on raw bytes in a file; returns its status, what it wrote, its stderr."""

    def stream(raw: bytes, *args, checkpoint="causal", **streams) -> tuple[int, bytes, str]:
        (tmp_path / "in").write_bytes(raw)
        words = ["--checkpoint", checkpoints[checkpoint], "--stream", *args]
        with open(tmp_path / "in") as source, open(tmp_path / "raw", "w") as sink:
            with monkeypatch.context() as patch:
                for name, file in {"stdin": source, "stdout": sink, **streams}.items():
                    patch.setattr(sys, name, file)
                status = separate_songs(*words)
        return status, (tmp_path / "raw").read_bytes(), capsys.readouterr().err

    return stream


def start(checkpoint: Path, *args, **kwargs) -> subprocess.Popen:
    """Starts a stream between pipes."""
    words = ["-m", "local.separate", "--checkpoint", checkpoint, "--stream", *args]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return start_python(*words, **{"text": False, **pipes, **kwargs})


@pytest.fixture
def mixture() -> torch.Tensor:
    return torch.from_numpy(make_stems(2.0, RATE, 0)["mixture"].T / 32768).float()


def to_bytes(samples: torch.Tensor) -> bytes:
    return samples.T.contiguous().numpy().tobytes()


def from_bytes(raw: bytes, channels: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(raw, np.float32).reshape(-1, channels).T.copy())


def streamed(checkpoint: Path, mixture: torch.Tensor) -> torch.Tensor:
    engine = StreamingConvTasNet(load_model(checkpoint))
    return torch.cat([engine.push(mixture), engine.flush()], dim=-1)


@pytest.mark.parametrize("target", ["vocals", "accompaniment", "both", "remix"])
def test_a_stream_is_the_whole_forward(target, checkpoints, mixture, stream):
    words = ["--alpha", 0.5] if target == "remix" else []
    status, out, error = stream(to_bytes(mixture), target, *words)
    assert status == 0
    vocals, accompaniment = streamed(checkpoints["causal"], mixture)
    expected = {"vocals": vocals, "accompaniment": accompaniment}
    expected["both"] = torch.cat([vocals, accompaniment])
    expected["remix"] = 1.25 * vocals + 0.75 * accompaniment
    found = from_bytes(out, channels=len(expected[target]))
    torch.testing.assert_close(found, expected[target], rtol=0, atol=1e-6)
    assert "latency 7 samples (0.4 ms)" in error
    assert ("blocks of 320 samples" in error) == (target == "remix")  # 20 ms


@pytest.mark.parametrize("block", [1, 10, 10_000])
def test_a_stream_in_blocks(block, checkpoints, mixture, stream, monkeypatch):
    pushed = []

    class Stream(StreamingConvTasNet):
        def push(self, block):
            pushed.append(block.shape[-1])
            return super().push(block)

    monkeypatch.setattr(raw_stream, "StreamingConvTasNet", Stream)
    status, out, error = stream(to_bytes(mixture), "--block", block)
    assert status == 0
    samples, time = RATE * block // 1000, mixture.shape[-1]
    assert f"blocks of {samples} samples" in error
    assert pushed == [samples] * (time // samples) + [time % samples]
    expected = streamed(checkpoints["causal"], mixture)[0]
    torch.testing.assert_close(from_bytes(out), expected, rtol=0, atol=1e-6)


def test_falling_behind_is_said_once_a_minute(monkeypatch, capsys):
    now, pace = [1000.0], raw_stream.Pace()
    monkeypatch.setattr(raw_stream.time, "monotonic", lambda: now[0])
    for work, seconds, notes in ((0.9, 50, 0), (1.1, 50, 1), (1.1, 125, 2), (0.9, 99, 0)):
        for _ in range(seconds):
            pace.add(work, 1.0)
            now[0] += 1.0
        assert capsys.readouterr().err.count("falls behind: 1.10 s of work") == notes


def test_a_model_of_four_stems_gives_them_all(checkpoints, mixture, stream, tmp_path):
    with torch.no_grad():
        sources = load_model(checkpoints["four"])(mixture[None])[0]
    expected = dict(zip(SOURCES, sources, strict=True), accompaniment=sources[1:].sum(0))
    sf.write(tmp_path / "song.wav", mixture.T.numpy(), RATE, "FLOAT")
    flags = ["--checkpoint", checkpoints["four"], "--out", tmp_path / "out", "--float32"]
    assert separate_songs(tmp_path / "song.wav", *flags, "--method", "full") == 0
    saved = read(tmp_path / "out" / "song")
    assert saved.keys() == expected.keys()
    for target, estimate in expected.items():
        np.testing.assert_allclose(saved[target], estimate.T, atol=1e-6)
    expected["both"] = torch.cat([expected["vocals"], expected["accompaniment"]])
    for target in ("drums", "accompaniment", "both"):
        status, out, _ = stream(to_bytes(mixture), target, checkpoint="four")
        assert status == 0
        found = from_bytes(out, channels=len(expected[target]))
        torch.testing.assert_close(found, expected[target], rtol=0, atol=1e-6)


def test_a_target_that_the_model_does_not_give(stream):
    status, out, error = stream(b"", "drums")
    assert (status, out) == (2, b"")
    assert "--stream drums: the model gives vocals, accompaniment" in error


def test_a_stream_between_ffmpeg_and_ffmpeg(checkpoints, tmp_path):
    write_song(tmp_path / "song.flac", rate=44100, seconds=1)
    raw = f"-f f32le -ar {RATE} -ac 2".split()
    decoder = subprocess.Popen(
        ["ffmpeg", "-v", "error", "-i", tmp_path / "song.flac", *raw, "-"], stdout=subprocess.PIPE
    )
    process = start(checkpoints["causal"], stdin=decoder.stdout)
    encode = ["ffmpeg", "-v", "error", *raw, "-i", "-", tmp_path / "vocals.flac"]
    encoded = subprocess.run(encode, stdin=process.stdout, timeout=120)
    error = process.stderr.read().decode()
    assert (decoder.wait(), process.wait(), encoded.returncode) == (0, 0, 0), error
    assert sf.info(tmp_path / "vocals.flac").frames == RATE


def test_estimates_come_out_while_samples_still_come_in(checkpoints, mixture):
    process, half = start(checkpoints["causal"]), 5000  # less than a pipe holds
    mixture = mixture[:, : 2 * half]
    process.stdin.write(to_bytes(mixture[:, :half]))
    process.stdin.flush()
    first = process.stdout.read((half - 7) * 8)  # all but the latency, before there is an end
    process.stdin.write(to_bytes(mixture[:, half:]))
    process.stdin.close()
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0, process.stderr.read()
    expected = streamed(checkpoints["causal"], mixture)[0]
    torch.testing.assert_close(from_bytes(first + rest), expected, rtol=0, atol=1e-6)


def test_ctrl_c_flushes_what_is_pending(checkpoints, mixture):
    mixture = mixture[:, :5000]  # less than a pipe holds
    process = start(checkpoints["causal"], own_process=True)
    process.stdin.write(to_bytes(mixture))
    process.stdin.flush()
    first = process.stdout.read((mixture.shape[-1] - 7) * 8)
    process.send_signal(signal.SIGINT)
    rest, error = process.stdout.read(), process.stderr.read().decode()
    assert process.wait(timeout=60) == 130, error
    assert "Traceback" not in error
    expected = streamed(checkpoints["causal"], mixture)[0]
    torch.testing.assert_close(from_bytes(first + rest), expected, rtol=0, atol=1e-6)


def test_a_reader_that_goes_away_is_no_traceback(checkpoints):
    process = start(checkpoints["causal"], own_process=True)
    block = np.zeros((1000, 2), np.float32).tobytes()
    process.stdin.write(block)
    process.stdin.flush()
    process.stdout.read(1000)
    process.stdout.close()
    with pytest.raises(BrokenPipeError):
        for _ in range(10**4):
            process.stdin.write(block)
            process.stdin.flush()
            time.sleep(0.001)
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == CLOSED_PIPE
    assert "Traceback" not in error and "Exception ignored" not in error


@pytest.mark.parametrize(
    "raw, status, length, message",
    [
        (b"", 0, 0, "streaming vocals"),
        (bytes(8 * 5), 0, 8 * 5, "streaming vocals"),
        (bytes(8 * 100 + 3), 0, 8 * 100, "its last 3 bytes"),
        (b"\xff" * 16, 2, 0, "error: stdin: the mixture holds NaN or infinity"),
    ],
)
def test_the_end_of_a_stream(raw, status, length, message, stream):
    found, out, error = stream(raw)
    assert (found, len(out)) == (status, length)
    assert message in error


def test_a_model_that_cannot_be_streamed(stream):
    status, out, error = stream(b"", checkpoint="non-causal")
    assert (status, out) == (2, b"")
    assert "error: --stream: only a causal model" in error


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_closed_pipe_is_no_stream(name, stream):
    status, _, error = stream(b"", **{name: None})  # as Python has it
    assert status == 2
    assert f"{name} is closed: use pipes" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_stream_to_a_full_disk(stream):
    with open("/dev/full", "w") as full:
        status, _, error = stream(bytes(8000), stdout=full)
    assert status == 2
    assert "stdin or stdout: No space left on device" in error


def test_a_terminal_is_no_stream(stream):
    terminal, other_end = os.openpty()
    with open(other_end) as stdin:
        status, _, error = stream(b"", stdin=stdin)
    os.close(terminal)
    assert status == 2
    assert "stdin is a terminal: use pipes" in error
