from conftest import run_python

# Each command, with what makes its command line complete.
COMMANDS = {
    "eval": ["--out_dir", "out"],
    "local.separate": ["song.wav", "--checkpoint", "best_model.pth"],
    "local.compare": ["run"],
    "local.stems": ["root", "out"],
    "local.demo_musdb18": ["out"],
}
HEAVY = ["torch", "asteroid", "lightning_fabric", "pytorch_lightning", "museval", "pandas"]
CODE = f"""
import contextlib, importlib, io, sys

for name, complete in {COMMANDS}.items():
    command = importlib.import_module(name)
    for args, status, words in (["--help"], 0, "--help"), ([*complete, "--wrong"], 2, "--wrong"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                command.main(args)
            except SystemExit as exit:
                assert exit.code == status, (name, args, exit.code)
        assert words in printed.getvalue(), (name, args)
        print(name, args[-1], sorted(set({HEAVY}) & set(sys.modules)))
"""


def test_help_and_a_wrong_flag_need_no_heavy_library():
    result = run_python("-c", CODE)
    assert result.returncode == 0, result.stderr
    expected = [f"{name} {flag} []" for name in COMMANDS for flag in ("--help", "--wrong")]
    assert result.stdout.splitlines() == expected
