"""Who may import whom: each room of the library knows the rooms below it and no other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {path.stem for path in (ROOT / "instaflow").glob("*.py")} - {"__init__"}
DOORS = {
    "flow": set(),
    "models": {"flow", *GROUND},
    "couplings": {"models", "flow", *GROUND},
    "training": {"models", "flow", *GROUND},
    "evaluation": {"models", "flow", *GROUND},
    "using": {"couplings", "models", "flow", *GROUND},
    "serving": GROUND,  # HTTP alone: who draws is handed in
    "toy": {"flow", "training", "evaluation", *GROUND},  # a method and its page in one
    "digits": GROUND,  # the miniature knows no method; only stages know the miniature
    **dict.fromkeys(GROUND, GROUND),
}
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "deepspeed", "webdataset", "open_clip", "sklearn"}
LIBRARY = sorted((ROOT / "instaflow").rglob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))


def imported(source: str, module: str, *, anywhere: bool = True) -> set[str]:
    """The dotted names that a module imports; only those it imports as it is loaded, unless `anywhere`."""
    names = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not anywhere:
            continue
        waiting += ast.iter_child_nodes(node)
    return names


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path, *, anywhere: bool = True) -> set[str]:
    return imported(path.read_text("utf-8"), module_of(path), anywhere=anywhere)


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def rooms(names: set[str]) -> set[str]:
    """The rooms of the library among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("instaflow.")} - {"__version__"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_are_found_wherever_they_stand():
    source = (
        "import a.b\nfrom c import d, e as f\nfrom . import g\nfrom .h import i\nfrom ..j import k\n"
        "def work():\n    import l\nif True:\n    import m\nclass N:\n    import n\n"
    )
    loaded = {"a.b", "c.d", "c.e", "top.room.g", "top.room.h.i", "top.j.k", "m", "n"}
    assert imported(source, "top.room.here") == {*loaded, "l"}
    assert imported(source, "top.room.here", anywhere=False) == loaded


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_a_room_knows_only_the_rooms_below(path):
    parts = path.relative_to(ROOT / "instaflow").with_suffix("").parts
    allowed = DOORS[parts[0]] | {parts[0]} if parts != ("__init__",) else {"using", *GROUND}
    assert rooms(imports_of(path)) <= allowed


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_the_library_knows_neither_stages_nor_the_command_line(path):
    assert not tops(imports_of(path)) & {"click", "cli", "pipelines"}


@pytest.mark.parametrize("path", PIPELINES, ids=named)
def test_stages_do_not_know_the_command_line(path):
    assert not tops(imports_of(path)) & {"click", "cli"}


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_floor_loads_nothing_heavy(name):
    assert not tops(imports_of(ROOT / "instaflow" / f"{name}.py", anywhere=False)) & HEAVY


@pytest.mark.parametrize("path", sorted((ROOT / "instaflow" / "couplings").glob("*.py")), ids=named)
def test_couplings_are_read_without_loading_torch(path):
    assert not tops(imports_of(path, anywhere=False)) & HEAVY


@pytest.mark.parametrize("path", sorted((ROOT / "instaflow" / "flow").glob("*.py")), ids=named)
def test_the_maths_knows_no_files(path):
    assert not tops(imports_of(path)) & {"os", "pathlib", "io", "json", "shutil", "tempfile"}


def test_the_command_line_loads_nothing_heavy():
    loaded = imports_of(ROOT / "cli.py", anywhere=False)
    assert {name for name in loaded if name.startswith("instaflow")} == {"instaflow.__version__"}
    assert not tops(loaded) & {"pipelines", "pydantic", "yaml", "rich", "numpy", *HEAVY}


def test_every_room_has_its_door():
    found = {path.name for path in (ROOT / "instaflow").iterdir() if (path / "__init__.py").is_file()}
    assert found | GROUND == set(DOORS)


def test_files_are_named_after_what_they_know():
    vague = {"utils", "util", "helper", "helpers", "manager", "info", "common", "misc"}
    assert not [path for path in (*LIBRARY, *PIPELINES) if path.stem in vague or path.parent.name in vague]
