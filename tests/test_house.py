"""The rules of the house: what lies where, who imports whom, how long a file may be."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, run_python

import local

# A module imports modules of its own floor and of those below it.
FLOORS = (
    ("local.tools", "local"),
    (
        *("local.tasnet", "local.tracks", "local.musdb18_tracks", "local.sdr", "local.losses"),
        "local.stems",
    ),
    ("local.models", "local.musdb18_dataset", "local.keys", "local.config", "local.checkpoint"),
    ("local.fast",),
    ("local.streaming", "local.inference", "local.needs"),
    ("local.system", "local.estimates"),
    ("local.train", "local.eval", "local.songs", "local.comparison", "local.share", "local.demo"),
    ("local.lift", "local.raw_stream", "local.listen"),
    (
        *("local.separate", "local.enhance", "local.score", "local.compare", "local.publish"),
        *("local.page", "local.export", "local.convert"),
        "local.demo_musdb18",
    ),
    ("train", "eval"),
)
LIBRARIES = ("torch", "pytorch_lightning", "lightning_fabric", "asteroid")
FILES = sorted([*ROOT.glob("local/**/*.py"), ROOT / "train.py", ROOT / "eval.py"])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def list_imports(module: str) -> set[str]:
    """The modules of the project that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{name.name}" for name in node.names}
            found |= modules & TREES.keys() or {node.module}
    return (found & TREES.keys()) - {module}


def find_floor(module: str) -> int:
    for number, parts in enumerate(FLOORS):
        if any(
            module == part or module.startswith(f"{part}.") for part in parts if part != "local"
        ):
            return number
    return 0 if module == "local" else pytest.fail(f"{module} stands on no floor: see FLOORS")


@pytest.mark.smoke
@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_too_long(path):
    most = 200 if path.parent == ROOT else 300
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= most, f"{path.name} has {lines} lines; move an idea to a module of its own"


@pytest.mark.smoke
def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 220


@pytest.mark.smoke
@pytest.mark.parametrize("module", TREES)
def test_nothing_imports_upwards(module):
    upwards = [name for name in list_imports(module) if find_floor(name) > find_floor(module)]
    assert upwards == []


@pytest.mark.smoke
def test_there_are_no_circles():
    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(list_imports(module)):
                visit(name, [*path, module])
            done.add(module)

    done = set()
    for module in TREES:
        visit(module, [])


@pytest.mark.smoke
def test_training_and_evaluation_do_not_import_each_other():
    folders = {"train": "local.eval", "eval": "local.train"}
    for module in TREES:
        other = folders.get(module.removeprefix("local.").partition(".")[0])
        assert not [name for name in list_imports(module) if other and name.startswith(other)]


def list_private_names(tree: ast.Module) -> Iterator[str]:
    """Private attributes of anything but self, and private modules and names that are imported."""

    def is_private(name: str) -> bool:
        return any(p.startswith("_") and not p.startswith("__") for p in name.split("."))

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = node.value
            is_own = isinstance(base, ast.Name) and base.id in ("self", "cls", "os")
            if not is_own:
                yield f"{ast.unparse(node)} in line {node.lineno}"
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(name.name for name in node.names)]
            yield from (f"{name} in line {node.lineno}" for name in names if is_private(name))
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
            yield from (f"{name} in line {node.lineno}" for name in names if is_private(name))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield f"{ast.unparse(node)} in line {node.lineno}"


@pytest.mark.smoke
@pytest.mark.parametrize("module", sorted(TREES.keys() - {"local.tools.private"}))
def test_private_names_of_others_are_in_one_module(module):
    assert list(list_private_names(TREES[module])) == [], "move it to local/tools/private.py"


def test_no_class_overrides_a_private_method_of_a_library():
    optional = {
        "triton": ("local.fast.kernels", "local.fast.gpu"),
        "onnxruntime": ("local.share.onnx_graph", "local.share.onnx_check"),
    }
    missing = {name for library in optional if not find_spec(library) for name in optional[library]}
    for module in TREES.keys() - missing:
        for kind in vars(importlib.import_module(module)).values():
            if not inspect.isclass(kind) or kind.__module__ != module:
                continue
            bases = [b for b in kind.__mro__ if b.__module__.partition(".")[0] in LIBRARIES]
            methods = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
            own = {name for name in methods if name.startswith("_") and name[:2] != "__"}
            for base in bases:
                assert not own & vars(base).keys(), f"{kind} overrides {own & vars(base).keys()}"


# What is imported when


@pytest.mark.parametrize(
    ("name", "unneeded"),
    [
        ("ConvTasNetStereo", ["asteroid", "pytorch_lightning", "soundfile", "museval"]),
        ("StreamingConvTasNet", ["asteroid", "pytorch_lightning", "soundfile", "museval"]),
        ("SegmentDataset", ["asteroid", "pytorch_lightning", "local.tasnet", "museval"]),
        ("TrackDataset", ["asteroid", "pytorch_lightning", "local.tasnet", "museval"]),
        ("MusicSystem", ["museval", "musdb", "stempeg"]),
    ],
)
def test_the_package_gives_what_is_asked_for_and_loads_no_more(name, unneeded):
    code = f"from local import {name}; import sys; print({name}.__name__)\n"
    code += f"print(sorted(set({unneeded}) & set(sys.modules)))"
    result = run_python("-c", code, own_process=True)
    assert result.stdout == f"{name}\n[]\n", result.stderr


@pytest.mark.smoke
def test_the_package_has_nothing_else():
    with pytest.raises(ImportError, match="nothing"):
        from local import nothing  # noqa: F401


SLOW = {"torch", "asteroid", "pytorch_lightning", "museval", "musdb", "matplotlib", "pandas"}
MODULES = "separate enhance score compare page publish export stems convert".split()
COMMANDS = ("train.py", "eval.py", *(f"local/{name}.py" for name in MODULES))


@pytest.mark.parametrize("flags", [["--help"], ["--unheard-of"]], ids=["help", "unknown flag"])
@pytest.mark.parametrize("command", [*COMMANDS, "local/demo_musdb18.py"])
def test_help_and_a_wrong_flag_answer_before_the_slow_imports(command, flags):
    module = command.removesuffix(".py").replace("/", ".")
    code = (
        "import importlib, sys\n"
        f"try: importlib.import_module({module!r}).main({flags!r})\n"
        f"except SystemExit as e: print(e.code, sorted({SLOW} & set(sys.modules)), file=sys.stderr)"
    )
    result = run_python("-c", code, own_process=True)
    status = 0 if flags == ["--help"] else 2
    assert result.stderr.splitlines()[-1] == f"{status} []", result.stderr


@pytest.mark.parametrize(
    "name",
    [
        "separate",
        "enhance",
        "score",
        "compare",
        "page",
        "publish",
        "export",
        "stems",
        "convert",
        "demo_musdb18",
    ],
)
def test_a_command_runs_as_a_script_from_any_folder(name, tmp_path):
    result = run_python(ROOT / "local" / f"{name}.py", "--version", own_process=True, cwd=tmp_path)
    assert result.stdout == f"python -m local.{name} {local.__version__}\n", result.stderr
