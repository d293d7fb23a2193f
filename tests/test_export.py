"""Models as ONNX files, run by onnxruntime and held to the model: local/export.py and its parts."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, forward, load_golden_model, needs_onnx, random_model, slow
from torch import Tensor, nn

from local import tasnet
from local.checkpoint import save_best_model
from local.export import main
from local.share import onnx_file
from local.tasnet import ConvTasNetStereo
from local.tools.command_line import UserError
from local.tools.files import sha256

pytestmark = [needs_onnx, pytest.mark.usefixtures("one_thread")]

LIMIT = 1e-5
TINY = dict(N=8, L=6, B=6, H=8, P=3, X=2, R=1, C=2, audio_channels=2, samplerate=500)
CAUSAL = {**TINY, "causal": True, "norm_type": "cLN"}
FULL = dict(N=256, L=20, B=256, H=512, P=3, X=10, R=4, C=2, audio_channels=2)


def save(folder, **changes):
    """(folder of save_pretrained, its model)."""
    model = random_model({**TINY, **changes})
    model.save_pretrained(folder)
    return folder, model


def open_file(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options)


def run_file(path, mixture: Tensor) -> Tensor:
    (estimates,) = open_file(path).run(None, {"mixture": mixture.numpy()})
    return torch.from_numpy(estimates)


def push_file(path, mixture: Tensor, sizes: list[int]) -> Tensor:
    """Estimates of (channels, T) in pushes of so many hops, which together are T."""
    session = open_file(path)
    facts = session.get_modelmeta().custom_metadata_map
    _, *given = session.get_inputs()
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    states = {state.name: np.zeros(state.shape, kinds[state.type]) for state in given}
    pushed = []
    for block in mixture.split([int(facts["hop"]) * size for size in sizes], dim=-1):
        estimates, *after = session.run(None, {"mixture": block[None].numpy(), **states})
        assert estimates.shape[-1] == block.shape[-1]
        pushed.append(estimates[0])
        states = dict(zip(states, after, strict=True))
    found = np.concatenate([*pushed, states["overlap"][0]], axis=-1)[..., int(facts["latency"]) :]
    return nn.functional.pad(torch.from_numpy(found), (0, mixture.shape[-1] - found.shape[-1]))


def add_silence(mixture: Tensor) -> Tensor:
    """In the middle."""
    mixture, time = mixture.clone(), mixture.shape[-1]
    mixture[..., time // 2 : 3 * time // 4] = 0
    return mixture


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= LIMIT * expected.norm()


@pytest.fixture(scope="module")
def export_golden(tmp_path_factory):
    """A file of a golden model, made once: (name, flags) -> (path, model, tensors)."""
    folder, made = tmp_path_factory.mktemp("golden"), {}

    def export(name, *flags):
        model, tensors = load_golden_model(name)
        path = folder / f"{name}{'-'.join(flags)}.onnx"
        if (name, flags) not in made:
            model.save_pretrained(folder / name)
            main([str(folder / name), "--out", str(path), *flags])
            made[name, flags] = path
        return path, model, tensors

    return export


@pytest.mark.parametrize("name", ["noncausal_gln", "noncausal_bn_softmax"])
def test_whole_mixtures_are_separated_as_by_the_published_model(name, export_golden):
    path, model, golden = export_golden(name)
    assert_close(run_file(path, golden["input"]), golden["output"])
    for shape in ((1, model.encoder.length), (3, 1001)):
        mixture = torch.randn(shape[0], model.audio_channels, shape[1])
        with torch.no_grad():
            assert_close(run_file(path, add_silence(mixture)), model(add_silence(mixture)))
            assert_close(run_file(path, 0 * mixture), model(0 * mixture))


@pytest.mark.parametrize("name", ["causal_cln", "causal_id_mono"])
def test_pushes_give_what_the_model_gives(name, export_golden):
    path, model, _ = export_golden(name, "--stream")
    sizes = [1, 7, 2, 30] * 50
    noise = torch.randn(model.audio_channels, sum(sizes) * model.encoder.hop)
    for mixture in (noise, add_silence(noise), 0 * noise):
        assert_close(push_file(path, mixture, sizes), forward(model, mixture))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_type": "BN", "L": 7, "P": 2, "mask_nonlinear": "softmax"},
        {"norm_type": "id", "L": 2, "P": 1, "X": 1},
    ],
    ids=["odd frames", "frames of two samples"],
)
def test_pushes_of_other_models(changes, tmp_path):
    folder, model = save(tmp_path / "model", **{**CAUSAL, **changes})
    main([str(folder), "--out", str(tmp_path / "a.onnx"), "--stream"])
    sizes = [1, 3, 1, 20] * 50
    mixture = add_silence(torch.randn(2, sum(sizes) * model.encoder.hop))
    assert_close(push_file(tmp_path / "a.onnx", mixture, sizes), forward(model, mixture))


def test_a_push_of_broken_hops_fails(export_golden):
    path, model, _ = export_golden("causal_cln", "--stream")
    session = open_file(path)
    shapes = {given.name: given.shape for given in session.get_inputs()}
    inputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name[0] != "m"}
    inputs["frames"] = np.zeros(1, np.int64)
    inputs["mixture"] = np.zeros((1, model.audio_channels, model.encoder.hop + 1), np.float32)
    with pytest.raises(Exception, match="Reshape"):
        session.run(None, inputs)


@pytest.mark.parametrize("flags", [(), ("--stream",)], ids=["whole", "stream"])
def test_a_file_says_what_it_is_and_nothing_of_its_maker(flags, export_golden, capsys):
    import onnx

    name = "causal_cln" if flags else "noncausal_gln"
    path, model, _ = export_golden(name, *flags)
    onnx.checker.check_model(path, full_check=True)
    assert [entry.domain for entry in onnx.load(path).opset_import] == [""]
    for word in (str(ROOT), "site-packages", "forward"):
        assert word.encode() not in path.read_bytes()
    session = open_file(path)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["sample_rate"] == str(model.samplerate)
    assert json.loads(facts["arguments"]) == model.arguments()
    assert len(json.loads(facts["sources"])) == model.C
    weights = path.parent / name / "model.safetensors"
    assert facts["weights_sha256"] == sha256(weights)
    if flags:
        assert facts["hop"] == facts["latency"] == str(model.encoder.hop)
        names = {given.name for given in session.get_inputs()} - {"mixture"}
        assert {f"next_{name}" for name in names} < {out.name for out in session.get_outputs()}
    else:
        assert facts["least_samples"] == str(model.encoder.length)
        assert session.get_inputs()[0].shape == ["batch", model.audio_channels, "time"]


def test_a_run_is_exported_with_the_origin_of_its_model(tmp_path, capsys):
    model = random_model({**TINY, "X": 1, "norm_type": "id"})
    network = model.arguments()
    conf = {"data": {"sample_rate": network.pop("samplerate")}, "convtasnet": network}
    origin = {"infos": {}, "dataset": "MUSDB18", "licenses": [{"title": "of academic use"}]}
    save_best_model(tmp_path / "best_model.pth", model.state_dict(), conf, origin)
    main([str(tmp_path), "--out", str(tmp_path / "a.onnx")])
    shown = capsys.readouterr()
    assert "a.onnx" in shown.out and "MB" in shown.out and shown.err == ""
    facts = open_file(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map
    assert facts["dataset"] == origin["dataset"]
    assert json.loads(facts["licenses"]) == origin["licenses"]
    assert json.loads(facts["sources"]) == ["vocals", "accompaniment"]


def test_an_edited_model_is_exported_as_edited_but_never_as_a_stream(
    tmp_path, monkeypatch, error_of
):
    folder, _ = save(tmp_path / "model", **CAUSAL)
    half = lambda block, residual: residual + 0.5 * block.net(residual)  # noqa: E731
    monkeypatch.setattr(tasnet.TemporalBlock, "forward", half)
    main([str(folder), "--out", str(tmp_path / "a.onnx")])
    mixture = torch.randn(1, 2, 500)
    with torch.no_grad():
        edited = ConvTasNetStereo.load(folder)(mixture)
    assert_close(run_file(tmp_path / "a.onnx", mixture), edited)
    error = error_of(main, folder, "--out", tmp_path / "b.onnx", "--stream")
    assert "--stream" in error and "fast path" in error
    assert not (tmp_path / "b.onnx").exists()


def test_a_norm_that_lost_its_eps_is_noticed(tmp_path, monkeypatch, error_of):
    folder, _ = save(tmp_path / "model", **CAUSAL)
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: export(*a, **{**k, "optimize": True}))
    (tmp_path / "a.onnx").write_text("old")
    assert "NaN" in error_of(main, folder, "--out", tmp_path / "a.onnx", "--stream")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "a.onnx"}
    assert (tmp_path / "a.onnx").read_text() == "old"


def test_a_file_of_other_weights_is_noticed(export_golden):
    from local.share.onnx_check import check_stream, check_whole
    from local.share.onnx_stream import StreamStep

    for name, flags in {"noncausal_gln": (), "causal_cln": ("--stream",)}.items():
        path, model, _ = export_golden(name, *flags)
        with torch.no_grad():
            model.separator.network[2][0][0].net[0].weight[0, 0] += 0.1
        with pytest.raises(UserError, match="differs by"):
            check_stream(path, StreamStep(model)) if flags else check_whole(path, model)


class Mean(nn.Module):
    """Of so many squares that float32 in a few running sums is not enough."""

    C, audio_channels, samplerate = 1, 2, 100

    def forward(self, mixture):
        squares = mixture.square()
        mean = squares.mean((1, 2), keepdim=True) + squares.mean((-1, 1))[:, None, None]
        exact = squares.mean((1, 2), keepdim=True, dtype=torch.float64).float()
        return (mean + exact).expand_as(mixture)[:, None]


def test_means_over_several_axes_stay_exact(tmp_path):
    import onnx

    from local.share.onnx_graph import export_whole

    onnx.save(export_whole(Mean()), tmp_path / "a.onnx")
    mixture = torch.rand(1, 2, 2**22)
    found, expected = run_file(tmp_path / "a.onnx", mixture), Mean()(mixture.double())
    assert (found - expected).norm() <= 1e-6 * expected.norm()


# Bad input


def branch(model, mixture):
    return mixture[:, None] * (2 if mixture.max() > 1 else 1)


def decompose(model, mixture):
    return torch.linalg.svd(mixture, full_matrices=False).Vh[:, None]


def divide(model, mixture):
    return (mixture / mixture.square().mean().sqrt())[:, None].expand(-1, 2, -1, -1)


@pytest.mark.parametrize(
    ("forward", "word"), [(branch, "torch"), (decompose, "svd"), (divide, "the model itself")]
)
def test_what_cannot_be_exported_is_one_line(forward, word, tmp_path, monkeypatch, error_of):
    folder, _ = save(tmp_path / "model")
    monkeypatch.setattr(ConvTasNetStereo, "forward", forward)
    error = error_of(main, folder, "--out", tmp_path / "a.onnx")
    (line,) = error.partition(": error: ")[2].splitlines()
    assert word in line and len(line) < 400
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("changes", [{"causal": False}, {"norm_type": "gLN"}], ids=str)
@pytest.mark.filterwarnings("ignore:causal with norm_type gLN")
def test_only_causal_models_stream(changes, tmp_path, error_of):
    folder, _ = save(tmp_path / "model", **{**CAUSAL, **changes})
    error = error_of(main, folder, "--out", tmp_path / "a.onnx", "--stream")
    assert "--stream" in error and "causal" in error
    assert not (tmp_path / "a.onnx").exists()


def test_faults_are_told_before_a_model_is_loaded(tmp_path, monkeypatch, error_of):
    assert "--out" in error_of(main, "EXP")
    assert "CHECKPOINT" in error_of(main, tmp_path, "--out", tmp_path / "a.onnx")
    (tmp_path / "b.onnx").mkdir()
    assert "is a folder" in error_of(main, "EXP", "--out", tmp_path / "b.onnx")
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: name != "onnxscript")
    error = error_of(main, "EXP", "--out", tmp_path / "none" / "model.pt")
    for words in ("pip install onnxscript\n", "no such folder", ".onnx, got"):
        assert words in error


# The published sizes


@slow
@pytest.mark.parametrize(
    ("norm", "causal"), [("cLN", True), ("BN", True), ("id", True), ("gLN", False)]
)
def test_the_full_model(norm, causal, tmp_path):
    model = random_model({**FULL, "norm_type": norm, "causal": causal})
    model.save_pretrained(tmp_path / "model")
    main([str(tmp_path / "model"), "--out", str(tmp_path / "a.onnx"), *["--stream"] * causal])
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (tmp_path / "a.onnx").stat().st_size < 1.05 * weights
