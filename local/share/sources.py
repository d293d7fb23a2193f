"""The source files that a model needs to be loaded where this repository is not."""

import ast
import inspect
import shutil
from pathlib import Path

from torch import nn

from local.tools.files import sha256

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
LICENCE = ROOT / "LICENSE"


def copy_sources(model: nn.Module, folder: Path) -> None:
    """Copy the module of a model, and what it imports of this project, with the licence."""
    copies = {file.relative_to(ROOT): file for file in list_sources(inspect.getfile(type(model)))}
    copies[Path(PACKAGE.name) / LICENCE.name] = LICENCE
    for name, file in copies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def list_sources(file: str | Path) -> set[Path]:
    """Return a source file of local/, and those that are imported with it."""
    found, waiting = set(), [Path(file).resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_relative_to(PACKAGE) and path.is_file():
            found.add(path)
            waiting += [folder / "__init__.py" for folder in path.parents]
            waiting += _list_imported(path)
    return found


def _list_imported(path: Path) -> list[Path]:
    """Return the files that modules may have which a file imports outside its functions."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    modules = [ROOT.joinpath(*name.split(".")) for name in names]
    return [file for module in modules for file in (Path(f"{module}.py"), module / "__init__.py")]


def has_other_code(model: nn.Module, digest: str | None) -> bool:
    """Whether the module of a model is another than that with a SHA-256; not where that is None."""
    return digest is not None and sha256(Path(inspect.getfile(type(model)))) != digest
