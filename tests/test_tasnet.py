import json
import warnings

import pytest
import textbook
import torch
from conftest import load_golden_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.functional import l1_loss

from local.tasnet import ConvTasNetStereo, overlap_and_add

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = [
    "noncausal_gln",
    "noncausal_cln",
    "noncausal_bn_softmax",
    "causal_cln",
    "causal_id_mono",
]
SMALL = dict(N=12, L=8, B=6, H=10, P=3, X=3, R=2, C=2, audio_channels=2, samplerate=8000)


def small_model(**changes) -> ConvTasNetStereo:
    torch.manual_seed(0)
    return ConvTasNetStereo(**{**SMALL, **changes}).eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", GOLDEN)
def test_matches_the_published_model(name):
    model, golden = load_golden_model(name)
    estimates = model(golden["input"])
    loss = l1_loss(estimates, golden["target"])
    loss.backward()

    assert relative_error(estimates.detach(), golden["output"]) < 1e-6
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {f"grad/{name}" for name in gradients} == {k for k in golden if k.startswith("grad/")}
    for key, gradient in gradients.items():
        assert relative_error(gradient, golden[f"grad/{key}"]) < 1e-5, key


@settings(deadline=None, max_examples=25)
@given(
    causal=st.booleans(),
    norm_type=st.sampled_from(["gLN", "cLN", "BN", "id"]),
    mask_nonlinear=st.sampled_from(["relu", "softmax"]),
    L=st.integers(2, 9),
    P=st.sampled_from([1, 3, 5]),
    C=st.integers(1, 4),
    audio_channels=st.integers(1, 2),
    time=st.integers(0, 120),
)
@pytest.mark.filterwarnings("ignore:causal with norm_type gLN")
def test_equals_the_textbook(time, **conf):
    conf = {**SMALL, **conf}
    model = ConvTasNetStereo(**conf).double().eval()
    mixture = torch.randn(2, conf["audio_channels"], time, dtype=torch.float64)
    with torch.no_grad():
        estimates = model(mixture)
        expected = textbook.separate(model.state_dict(), conf, mixture)
    assert estimates.shape == (2, conf["C"], conf["audio_channels"], time)
    torch.testing.assert_close(estimates, expected, rtol=1e-9, atol=1e-12)


def test_even_taps_work_when_causal():
    changes = dict(P=4, causal=True, norm_type="cLN", mask_nonlinear="relu")
    model = small_model(**changes)
    mixture = torch.randn(1, 2, 100)
    expected = textbook.separate(model.state_dict(), {**SMALL, **changes}, mixture)
    torch.testing.assert_close(model(mixture), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("norm_type", ["cLN", "BN", "id"])
@pytest.mark.parametrize("cut", [40, 101, 160])
def test_a_causal_model_ignores_the_future(norm_type, cut):
    model = small_model(causal=True, norm_type=norm_type)
    mixture = torch.randn(1, 2, 203)
    changed = mixture.clone()
    changed[..., cut:] += 1
    settled = cut - SMALL["L"] + 1  # a frame may look L - 1 samples ahead of its first
    before, after = model(mixture), model(changed)
    torch.testing.assert_close(before[..., :settled], after[..., :settled], rtol=0, atol=0)
    assert not torch.equal(before[..., cut:], after[..., cut:])


def test_a_non_causal_model_hears_the_future():
    model = small_model(norm_type="cLN")
    mixture = torch.randn(1, 2, 200)
    changed = mixture.clone()
    changed[..., 150:] += 1
    assert not torch.equal(model(mixture)[..., 100:140], model(changed)[..., 100:140])


@pytest.mark.parametrize("time", [0, 1, 7])
def test_an_input_shorter_than_a_frame_gives_zeros(time):
    estimates = small_model()(torch.randn(3, 2, time))
    assert estimates.shape == (3, 2, 2, time)
    assert not estimates.any()


def test_samples_after_the_last_whole_frame_are_zeros():
    estimates = small_model()(torch.randn(1, 2, 103))  # frames end at 100
    assert estimates[..., :100].any()
    assert not estimates[..., 100:].any()


@pytest.mark.parametrize("L", [2, 3, 20])
def test_constant_frames_add_up_to_how_many_overlap(L):
    added = overlap_and_add(torch.ones(1, 5, L), L // 2)
    counts = torch.zeros((5 - 1) * (L // 2) + L)
    for start in range(0, 5 * (L // 2), L // 2):
        counts[start : start + L] += 1
    assert torch.equal(added[0], counts)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(2, 100), (1, 1, 100), (1, 3, 100), (1, 2, 2, 100)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError) as error:
        small_model()(torch.zeros(shape))
    assert str(error.value) == f"expected (batch, 2, time), got {shape}"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"norm_type": "GLN"}, "norm_type must be one of gLN, cLN, BN, id, got 'GLN'"),
        ({"mask_nonlinear": "tanh"}, "mask_nonlinear must be one of relu, softmax"),
        ({"P": 4}, "P must be odd unless the model is causal, got 4"),
        ({"L": 1}, "L must be a whole number of at least 2, got 1"),
        ({"N": 0}, "N must be a whole number of at least 1, got 0"),
        ({"X": -1}, "X must be"),
        ({"B": 2.0}, "B must be"),
        ({"C": True}, "C must be"),
        ({"audio_channels": 0}, "audio_channels must be"),
        ({"samplerate": 0}, "samplerate must be"),
        ({"causal": "yes"}, "causal must be one of True, False"),
    ],
)
def test_an_argument_that_cannot_be_is_named(changes, words):
    with pytest.raises(ValueError) as error:
        ConvTasNetStereo(**{**SMALL, **changes})
    assert words in str(error.value)


def test_all_wrong_arguments_are_named_together():
    with pytest.raises(ValueError, match="N must.*H must.*norm_type must"):
        ConvTasNetStereo(**{**SMALL, "N": 0, "H": -3, "norm_type": "x"})


def test_causal_with_gln_warns():
    with pytest.warns(UserWarning, match="depend on the future"):
        ConvTasNetStereo(**SMALL, causal=True, norm_type="gLN")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConvTasNetStereo(**SMALL, causal=True, norm_type="cLN")


def test_every_weight_with_dimensions_starts_xavier_normal():
    model = ConvTasNetStereo(**{**SMALL, "H": 400}, norm_type="cLN")
    gamma = model.separator.network[2][0][0].net[2].gamma
    # Fans of (1, 400, 1): in 400, out 1.
    assert gamma.std().item() == pytest.approx((2 / 401) ** 0.5, rel=0.15)
    assert abs(gamma.mean().item()) < 0.02
    assert model.separator.network[2][0][0].net[1].weight.tolist() == [0.25]


@pytest.mark.smoke
@pytest.mark.parametrize("causal", [False, True])
def test_a_model_survives_save_and_from_pretrained(causal, tmp_path):
    model = small_model(causal=causal, norm_type="cLN")
    model.save_pretrained(tmp_path)
    loaded = ConvTasNetStereo.from_pretrained(str(tmp_path))
    mixture = torch.randn(1, 2, 300)
    assert torch.equal(loaded(mixture), model(mixture))
    assert (loaded.samplerate, loaded.causal) == (8000, causal)
    assert not loaded.training


def write_hub_folder(folder, conf: dict, state: dict) -> str:
    (folder / "config.json").write_text(json.dumps(conf))
    save_file(state, folder / "model.safetensors")
    return str(folder)


def test_a_folder_laid_out_like_the_published_repositories_loads(tmp_path):
    model = small_model()
    conf = {**SMALL, "norm_type": "gLN", "causal": False, "mask_nonlinear": "relu"}
    folder = write_hub_folder(tmp_path, conf, model.state_dict())
    mixture = torch.randn(1, 2, 300)
    assert torch.equal(ConvTasNetStereo.from_pretrained(folder)(mixture), model(mixture))


def test_a_folder_with_other_weights_is_refused(tmp_path):
    state = small_model().state_dict()
    del state["decoder.basis_signals.weight"]
    folder = write_hub_folder(tmp_path, SMALL, state)
    with pytest.raises(RuntimeError, match="basis_signals"):
        ConvTasNetStereo.from_pretrained(folder)


def test_load_reads_what_serialize_gave(tmp_path):
    model = small_model(causal=True, norm_type="BN", mask_nonlinear="softmax", P=4)
    torch.save(model.serialize(), tmp_path / "model.pth")
    loaded = ConvTasNetStereo.load(str(tmp_path / "model.pth"))
    mixture = torch.randn(1, 2, 300)
    assert torch.equal(loaded(mixture), model(mixture))
    assert not loaded.training


def test_serialize_gives_plain_data_and_every_argument(tmp_path):
    content = small_model(norm_type="id").serialize()
    torch.save(content, tmp_path / "model.pth")
    assert torch.load(tmp_path / "model.pth", weights_only=True).keys() == content.keys()
    assert content["model_name"] == "ConvTasNetStereo"
    given = {**SMALL, "norm_type": "id", "causal": False, "mask_nonlinear": "relu"}
    assert content["model_args"] == given
    assert "torch" in content["infos"]["software_versions"]


@pytest.mark.parametrize(
    "source, words",
    [
        ("no/such/file.pth", "no such file or folder: no/such/file.pth"),
        ("exp/best_model.pth", "no such file or folder: exp/best_model.pth"),
        ("nobody/NoSuchModel", "nobody/NoSuchModel: .*hub.*check the name or the connection"),
        ("exp/demos", "no such file or folder: exp/demos; did you mean exp/demo[?]"),
        ("empty", "empty: not a usable folder"),
        ("other.pth", "other.pth: holds a DPTNet"),
        ("published.pth", "published.pth: holds no model_args.*load_model"),
        ("nan.pth", "nan.pth: .*NaN"),
    ],
)
def test_load_says_what_is_no_model(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "exp" / "demo").mkdir(parents=True)
    content = small_model().serialize()
    torch.save({**content, "model_name": "DPTNet"}, "other.pth")
    torch.save({"state_dict": content["state_dict"]}, "published.pth")
    state = {name: tensor * torch.nan for name, tensor in content["state_dict"].items()}
    torch.save({**content, "state_dict": state}, "nan.pth")
    with pytest.raises(ValueError, match=words) as error:
        ConvTasNetStereo.load(source)
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, capfd):
    asked = []

    def fail(url):
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("local.tools.weights.get_hf_file_metadata", fail)
    with pytest.raises(ValueError, match="nobody/NoSuchModel: .*cannot be reached"):
        ConvTasNetStereo.load("nobody/NoSuchModel")
    assert len(asked) == 1 and "nobody/NoSuchModel" in asked[0]
    assert capfd.readouterr() == ("", "")


def test_every_length_is_valid():
    assert small_model().valid_length(12345) == 12345
