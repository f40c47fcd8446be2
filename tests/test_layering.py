"""Imports point downwards only.

Read from the source, so that an import inside a function counts, too. A room is a file or folder right below
`keras_gemma_ft`, or one of the folders beside it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "keras_gemma_ft"

# From the top down. A room may import what stands below it.
LAYERS = (
    ("configs", "launch"),
    ("cli", "__main__"),
    ("train", "evaluate", "serve", "export"),
    ("checkpoint",),
    ("model", "data"),
    ("ops",),
    (
        "advice",
        "backend",
        "best_metric",
        "compilation",
        "config",
        "errors",
        "json_files",
        "presets",
        "recipes",
        "stopping",
    ),
)
HEIGHT = {room: -height for height, rooms in enumerate(LAYERS) for room in rooms}

# Rooms of one layer that may import each other, in this direction. Those of the lowest layer all may.
NEIGHBOURS = {
    ("__main__", "cli"): "the console script",
    ("train", "evaluate"): "validation generates and scores as evaluation does",
    ("model", "data"): "generation renders and encodes messages",
}

# Upwards or sideways, from a module (or all of a room) to another, only inside a function.
LAZILY = {
    ("data", "model.config"): "the chat template depends on the preset's kind",
    ("model.causal_lm", "export.model"): "export_to_transformers() is a method of the model",
}


class Import(NamedTuple):
    place: str
    importer: str
    imported: str
    lazy: bool


def imports(root: Path) -> Iterator[Import]:
    """Every import of a room, in the package and the folders beside it; names without `keras_gemma_ft.`."""
    folders = {root / PACKAGE: "", root / "configs": "configs.", root / "launch": "launch."}
    for folder, prefix in folders.items():
        for path in sorted(folder.rglob("*.py")):
            module = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            module = module.removesuffix("__init__").removesuffix(".")
            if module:  # the package itself offers names of every room
                yield from _imports_of(path, module, root)


def _imports_of(path: Path, module: str, root: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write imports from {PACKAGE} on"
            names = [node.module or ""]
            if node.module == PACKAGE:
                names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] in (PACKAGE, "configs", "launch"):
                imported = name.removeprefix(PACKAGE).removeprefix(".")
                place = f"{path.relative_to(root)}:{node.lineno}"
                yield Import(place, module, imported, lazy=node not in at_import)


def faults(found: Iterator[Import]) -> list[str]:
    return [
        f"{each.place}: {each.importer} imports {each.imported or PACKAGE}"
        for each in found
        if not _allowed(each)
    ]


def _allowed(found: Import) -> bool:
    importer, imported = _room(found.importer), _room(found.imported)
    if imported == "__version__":
        return True
    if imported not in HEIGHT:
        return False  # the package itself, which is for users
    if importer == imported or HEIGHT[imported] < HEIGHT[importer] or (importer, imported) in NEIGHBOURS:
        return True
    if importer in LAYERS[-1] and imported in LAYERS[-1]:
        return True
    return found.lazy and any(
        _inside(found.importer, module) and _inside(found.imported, other) for module, other in LAZILY
    )


def _room(module: str) -> str:
    return module.partition(".")[0]


def _inside(module: str, whole: str) -> bool:
    return module == whole or module.startswith(f"{whole}.")


def test_imports_point_downwards():
    assert not faults(imports(ROOT))


def test_every_room_has_its_layer():
    inside = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    inside |= {path.parent.name for path in (ROOT / PACKAGE).glob("*/*.py")}
    assert inside - HEIGHT.keys() == set(), "place the new room in LAYERS"
    assert HEIGHT.keys() - inside == {"configs", "launch"}, "take a room that is gone out of LAYERS"


def test_no_exception_outlives_its_use():
    found = list(imports(ROOT))
    rooms = {(_room(each.importer), _room(each.imported)) for each in found}
    assert rooms >= NEIGHBOURS.keys()
    for module, other in LAZILY:
        assert any(_inside(each.importer, module) and _inside(each.imported, other) for each in found), other


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("ops/moe", "from keras_gemma_ft.model import lora", "ops.moe imports model"),
        ("ops/moe", "import keras_gemma_ft.data.rows", "ops.moe imports data.rows"),
        ("serve/chat", "from keras_gemma_ft import export", "serve.chat imports export"),
        ("export/hf", "def f():\n    import keras_gemma_ft.serve", "export.hf imports serve"),
        ("data/rows", "from keras_gemma_ft.model.config import X", "data.rows imports model.config"),
        ("data/rows", "def f():\n    import keras_gemma_ft.model.lora", "data.rows imports model.lora"),
        ("errors", "if True:\n    from keras_gemma_ft.cli import run", "errors imports cli"),
        ("evaluate/tasks", "import keras_gemma_ft", "evaluate.tasks imports keras_gemma_ft"),
        ("cli", "from keras_gemma_ft import cloud", "cli imports cloud"),
        ("cli", "import launch.local", "cli imports launch.local"),
    ],
)
def test_an_upward_import_is_found(tmp_path, file, source, fault):
    path = tmp_path / PACKAGE / f"{file}.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert [each.split(": ")[1] for each in faults(imports(tmp_path))] == [fault]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("keras_gemma_ft/data/tokenizer.py", "def f():\n    from keras_gemma_ft.model.config import X"),
        (
            "keras_gemma_ft/train/run.py",
            "from keras_gemma_ft import checkpoint\nimport keras_gemma_ft.ops.nf4",
        ),
        ("launch/local.py", "from keras_gemma_ft import cli"),
        ("keras_gemma_ft/__init__.py", "from keras_gemma_ft.model.causal_lm import GemmaCausalLM"),
    ],
)
def test_other_imports_are_not(tmp_path, file, source):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert faults(imports(tmp_path)) == []
