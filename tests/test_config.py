import argparse
import getpass
import os
import re

import pytest
import yaml
from conftest import run_python
from test_published import CAUSAL, NON_CAUSAL

from local.config import CONF_FILE, OPTIONS, parse_conf, read_conf
from local.keys import find_faults
from local.tools.command_line import UserError, raise_together


def write_conf(path, **changes):
    """The shipped conf.yml with some keys changed: section__key=value."""
    conf = yaml.safe_load(CONF_FILE.read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        conf.setdefault(section, {})[key] = value
    path.write_text(yaml.safe_dump(conf))
    return path


def test_keys_are_unique_over_all_sections():
    keys = [key for section in read_conf(CONF_FILE).values() for key in section]
    assert len(keys) == len(set(keys))


def parse_as_asteroid_does(argv: list[str]) -> dict:
    """The published way: asteroid's parser on conf.yml."""
    from asteroid.utils.parser_utils import parse_args_as_dict, prepare_parser_from_dict

    conf = read_conf(CONF_FILE)
    parser = argparse.ArgumentParser()
    parser.add_argument("--exp_dir", default=conf.pop("main_args")["exp_dir"])
    parser.add_argument("--n_src", dest="C", type=int, default=argparse.SUPPRESS)
    parsed = parse_args_as_dict(prepare_parser_from_dict(conf, parser=parser), args=argv)
    return {section: parsed[section] for section in conf} | {
        "main_args": {"exp_dir": parsed["main_args"]["exp_dir"]}
    }


@pytest.mark.parametrize(
    "argv", [[], NON_CAUSAL, CAUSAL, ["--half_lr", "no", "--lr", "1", "--seed", "7"]]
)
def test_flags_are_read_as_asteroid_reads_them(argv):
    found = parse_conf(argv)
    for option, default in OPTIONS.items():
        assert found["main_args"].pop(option) == default
    expected = parse_as_asteroid_does(argv)
    assert found == expected
    kinds = [
        {key: type(value) for section in conf.values() for key, value in section.items()}
        for conf in (found, expected)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.smoke
def test_every_key_is_a_flag():
    argv = ["--root", "X"]
    for section, keys in read_conf(CONF_FILE).items():
        for key, value in keys.items():
            if section != "main_args" and key not in ("root", "valid_tracks"):
                argv += [f"--{key}", str(value)]
    assert parse_conf(argv) == parse_conf(["--root", "X"])


@pytest.mark.parametrize("word", ["yes", "true", "True", "1", "y"])
def test_words_for_true(word):
    assert parse_conf(["--root", "X", "--causal", word])["convtasnet"]["causal"] is True


@pytest.mark.parametrize("word", ["no", "false", "False", "0", "n"])
def test_words_for_false(word):
    assert parse_conf(["--root", "X", "--half_lr", word])["training"]["half_lr"] is False


def test_n_src_is_another_name_for_c():
    conf = parse_conf(["--root", "X", "--n_src", "4", "--mix_background", "no"])
    assert conf["convtasnet"]["C"] == 4


def test_text_stays_text_and_whole_numbers_do_for_fractions(tmp_path):
    path = write_conf(tmp_path / "conf.yml", data__segment=5, training__devices=2, data__root=2024)
    conf = parse_conf(["--segment", "4.5"], path)
    assert conf["data"]["segment"] == 4.5
    assert conf["training"]["devices"] == "2"
    assert conf["data"]["root"] == "2024"
    assert parse_conf(["--root", "007"])["data"]["root"] == "007"


@pytest.mark.parametrize("word", ["yes", "no"])
def test_yes_and_no_need_no_quotes_where_text_is_expected(tmp_path, word):
    shipped = CONF_FILE.read_text("utf-8")
    path = tmp_path / "conf.yml"
    path.write_text(re.sub(r"compile: \w+", f"compile: {word}", shipped), encoding="utf-8")
    assert parse_conf(["--root", "X"], path)["training"]["compile"] == word
    assert parse_conf(["--root", "X", "--compile", "auto"], path)["training"]["compile"] == "auto"


def test_one_device_is_not_taken_for_yes(tmp_path):
    path = write_conf(tmp_path / "conf.yml", training__devices=1)
    assert parse_conf(["--root", "X"], path)["training"]["devices"] == "1"
    assert parse_conf(["--root", "X", "--devices", "2"], path)["training"]["devices"] == "2"


def faults_of(argv, conf_file=CONF_FILE) -> str:
    with pytest.raises(UserError) as error:
        raise_together(find_faults(parse_conf(argv, conf_file)))
    return str(error.value)


@pytest.mark.smoke
def test_the_shipped_values_have_no_faults(tmp_path):
    assert find_faults(parse_conf(["--root", str(tmp_path)])) == []


def test_faults_of_the_values_are_reported_together():
    faults = faults_of(
        "--N 0 --norm_type GLN --epochs 0 --lr -1 --suffix mp3 --precision 8 --max_steps 0"
        " --segment nan --C 3 --mix_background yes --audio_channels 1 --num_workers -1"
        " --valid_tracks x --exp_dir=".split()
    )
    for words in (
        "14 faults",
        "--N must be a whole number of at least 1, got 0",
        "--norm_type must be one of gLN, cLN, BN, id, got 'GLN'",
        "--epochs must be at least 1, or -1 for no limit, got 0",
        "--lr must be a number above 0, got -1.0",
        "--suffix must be one of auto, wav, flac, got mp3",
        "--precision must be one of",
        "--max_steps must be at least 1, or -1 for no limit, got 0",
        "--segment must be a number above 0, got nan",
        "--root is needed",
        "--C must be 2 with --mix_background yes, got 3",
        "--audio_channels must be 2 (stereo), got 1",
        "--num_workers must be at least 0, got -1",
        "--valid_tracks: no such file: x",
        "--exp_dir must not be empty",
    ):
        assert words in faults


def test_faults_of_the_file_are_reported_together(tmp_path):
    path = write_conf(
        tmp_path / "conf.yml",
        training__batchsize=4,
        optim__lr="5e-4",
        convtasnet__causal="maybe",
        data__segment=None,
        training__epochs=2.5,
        extra__key=1,
    )
    faults = faults_of([], path)
    for words in (
        f"{path}: 6 faults",
        "training.batchsize: unknown key; did you mean batch_size?",
        "optim.lr: expected a number, got '5e-4'; YAML reads it as a number when written 5.0e-4",
        "convtasnet.causal: expected yes or no, got 'maybe'",
        "data.segment: expected a number, got None",
        "training.epochs: expected a whole number, got 2.5",
        "extra: unknown section",
    ):
        assert words in faults


@pytest.mark.parametrize(
    "content", ["", "a: [", "- 1", "\x00", "!!python/object/apply:os.system []"]
)
def test_a_file_that_is_no_configuration(content, tmp_path):
    path = tmp_path / "conf.yml"
    path.write_text(content)
    assert str(path) in faults_of([], path)


def test_missing_keys_and_sections_are_named(tmp_path):
    path = tmp_path / "conf.yml"
    path.write_text("optim: {}\ntraining: 3\n")
    faults = faults_of([], path)
    assert "optim.lr: missing" in faults
    assert "training: section missing" in faults


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr", "fast"], "argument --lr: expected a number, got 'fast'"),
        (["--learning_rate", "1"], "no flag --learning_rate"),
        (["--seg", "1"], "no flag --seg; did you mean --segment?"),
        (["--batch=8"], "did you mean --batch_size?"),
        (["-lr", "1"], "did you mean --lr?"),
        (["--conf", "nowhere"], "--conf nowhere"),
        (["--causal", "perhaps"], "argument --causal: expected yes or no, got 'perhaps'"),
        (["--accelerator", "gpu"], "--accelerator gpu: torch sees no GPU"),
        (["--segment", "1e-5", "--L", "20"], "--segment 1e-05 is shorter than a frame (--L 20)"),
        (["--root", "nowhere"], "--root: no such folder: nowhere"),
        (["--loss", "l2"], "--loss must be one of l1, mse, sdr, si_sdr (local/losses.py), got l2"),
        (["--optimizer", "sgd"], "--optimizer must be one of adam, adamw, got sgd"),
        (["--weight_decay", "inf"], "--weight_decay must be at least 0, got inf"),
        (["--clip_norm", "0"], "--clip_norm must be a number above 0, got 0.0"),
        (["--ema", "1"], "--ema must be at least 0 and below 1, got 1.0"),
        (["--ema", "nan"], "--ema must be at least 0 and below 1, got nan"),
        (["--patience", "0"], "--patience must be at least 1, got 0"),
        (["--lr_patience", "-1"], "--lr_patience must be at least 0, got -1"),
        (["--keep_best", "0"], "--keep_best must be at least 1, got 0"),
        (["--swap", "1.5"], "--swap must be at least 0 and at most 1, got 1.5"),
        (["--gain_max", "inf"], "--gain_max must be a number above 0, got inf"),
        (["--gain_min", "-0.5"], "--gain_min must be at least 0, got -0.5"),
        (
            ["--gain_min", "1", "--gain_max", "0.5"],
            "--gain_min must not be above --gain_max, got 1.0 and 0.5",
        ),
    ],
)
def test_faults_of_flags(argv, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert words in faults_of(["--root", "X", *argv])


@pytest.mark.smoke
def test_help_shows_the_comments_of_conf_yml(capsys):
    with pytest.raises(SystemExit):
        parse_conf(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    segment = parse_conf(["--root", "X"])["data"]["segment"]
    assert f"--segment SEGMENT seconds in a training item [{segment}]" in text


@pytest.mark.parametrize("name", ["batch_size", "samples_per_track", "exp_dir", "n_src"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_flag_has_two_spellings_and_its_value_stays(name, joined, tmp_path):
    value = str(tmp_path / "a-b_c") if name == "exp_dir" else "7"
    parsed = [
        parse_conf([f"--{word}={value}"] if joined else [f"--{word}", value])
        for word in (name, name.replace("_", "-"))
    ]
    assert parsed[0] == parsed[1] != parse_conf([])


def test_home_is_known_in_flags_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_conf(tmp_path / "conf.yml", data__root="~/a", main_args__exp_dir="~/b")
    user = getpass.getuser()
    for argv, file in ((["--root=~/a", "--exp_dir", "~/b"], CONF_FILE), ([], path)):
        conf = parse_conf([*argv, f"--valid_tracks=~{user}/c", "--resume=~/d"], file)
        assert conf["data"]["root"] == str(tmp_path / "a")
        assert conf["main_args"]["exp_dir"] == str(tmp_path / "b")
        assert conf["main_args"]["resume"] == str(tmp_path / "d")
        assert conf["data"]["valid_tracks"] == os.path.expanduser(f"~{user}/c")
    assert conf["data"]["valid_tracks"][0] == "/"


# A saved configuration


def test_a_published_configuration_is_read_and_flags_override_it(tmp_path):
    path = tmp_path / "saved.yml"
    path.write_text(
        "convtasnet: {N: 32, causal: true}\noptim: {lr: 0.1}\ndata: {root: X}\n"
        "main_args: {exp_dir: E, help: null}\npositional arguments: {}\ntraining:\n"
    )
    conf = parse_conf(["--conf", str(path), "--lr", "0.2"])
    flags = ["--root", "X", "--exp_dir", "E", "--N", "32", "--causal", "yes", "--lr", "0.2"]
    assert conf == parse_conf(flags)


def test_a_configuration_in_the_folder_of_a_run_is_of_that_run(tmp_path):
    path = write_conf(tmp_path / "conf.yml", main_args__exp_dir="before it was moved")
    (tmp_path / "checkpoints").mkdir()
    for name in (path, tmp_path):
        assert parse_conf(["--conf", str(name)])["main_args"]["exp_dir"] == str(tmp_path)
    conf = parse_conf(["--conf", str(path), "--exp_dir", "elsewhere"])
    assert conf["main_args"]["exp_dir"] == "elsewhere"


def test_faults_of_a_saved_configuration_are_named(tmp_path):
    path = tmp_path / "saved.yml"
    path.write_text("optim: {rl: 1}\nextra: {}\nmain_args: {help: 1}\ntraining: {epochs: x}\n")
    error = faults_of(["--conf", str(path)])
    for words in (f"--conf {path}", "optim.rl", "extra", "main_args.help", "training.epochs"):
        assert words in error
    path.write_text("optim: 3\n")
    assert f"--conf {path}: optim: expected a section" in faults_of(["--conf", str(path)])


TORCHAUDIO = {
    "missing": None,
    "for a CUDA build": "raise OSError('libcudart.so: cannot open shared object file')",
    "for another CUDA": "raise RuntimeError('PyTorch and TorchAudio were compiled with ...')",
    "broken": "raise AttributeError('torch has no attribute x')",
    "working": "class transforms: Resample = None\nclass functional: pass",
}


@pytest.mark.parametrize("kind", TORCHAUDIO)
def test_asteroid_imports_whatever_torchaudio_does(kind, tmp_path):
    """In a process of its own, with a torchaudio of our making first on the path."""
    setup = "import sys; sys.modules['torchaudio'] = None"
    if TORCHAUDIO[kind] is not None:
        (tmp_path / "torchaudio").mkdir()
        (tmp_path / "torchaudio" / "__init__.py").write_text(TORCHAUDIO[kind])
        setup = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    code = (
        f"{setup}\n"
        "import local\n"
        "from asteroid.engine.system import System\n"
        "replaced = 'torch_stoi' not in sys.modules\n"
        "print(System.__name__, replaced)"
    )
    result = run_python("-c", code, own_process=True)
    assert result.stdout == f"System {kind != 'working'}\n", result.stderr
