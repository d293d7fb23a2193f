"""The source files that a model needs to be loaded where this repository is not."""

import ast
import inspect
import shutil
from pathlib import Path

from torch import nn

from local.tools.files import sha256

ROOT = Path(__file__).resolve().parents[2]
LICENCE = ROOT / "LICENSE"


def copy_sources(model: nn.Module, folder: Path) -> list[str]:
    """Copy the module of a model, and what it imports of this project, with the licence.

    Returns:
        the names of the copies, relative to `folder`.
    """
    names = {file.relative_to(ROOT) for file in list_sources(inspect.getfile(type(model)))}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    package = Path("local")
    shutil.copyfile(LICENCE, folder / package / LICENCE.name)
    return sorted(map(str, {*names, package / LICENCE.name}))


def list_sources(file: str | Path) -> set[Path]:
    """Return a source file and those of this project that are imported with it."""
    found, waiting = set(), [Path(file).resolve()]
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += _list_imported(path)
    return found


def _list_imported(path: Path) -> list[Path]:
    """Return the files of this project that a file imports when it is imported itself: those named
    outside its functions, and the packages that they are in.
    """
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    files = [path]
    for name in names:
        module = ROOT.joinpath(*name.split("."))
        files += [module.with_suffix(".py"), module / "__init__.py"]
    files = [file for file in files if file.is_relative_to(ROOT) and file.is_file()]
    packages = {folder / "__init__.py" for file in files for folder in file.parents}
    return files + [file for file in packages if file.is_relative_to(ROOT) and file.is_file()]


def has_other_code(model: nn.Module, digest: str | None) -> bool:
    """Whether the module of a model is another than that with a SHA-256; not where that is None."""
    return digest is not None and sha256(Path(inspect.getfile(type(model)))) != digest
