"""The wheel that is built from this tree works, in an environment that does not know the tree."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = ("instaflow", "pipelines", "configs", "cli.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements() -> dict[str, Requirement]:
    lines = setup()["options"]["install_requires"].split("\n")
    found = [Requirement(line) for line in lines if line.strip()]
    return {normal(requirement.name): requirement for requirement in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the tree stays as it is."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "tree"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy / name)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; it borrows the other packages from this one, by path and without hooks."""
    folder = tmp_path_factory.mktemp("environment") / "v"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def outside(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_every_package_config_and_prompt_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {"cli.py", "instaflow/py.typed"}
    for folder in ("instaflow", "pipelines"):
        wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted |= {f"instaflow/{path.relative_to(ROOT).as_posix()}" for path in configs}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "instaflow" / "serving" / "page").iterdir()}
    assert held == wanted


def test_the_command_works_from_an_empty_folder(installed, tmp_path):
    place = outside(installed / "python", "-c", "import cli, instaflow; print(cli.__file__)", cwd=tmp_path)
    assert place.stdout.startswith(str(installed.parent)), place.stdout + place.stderr  # not the tree
    done = outside(installed / "instaflow", "run", "digits", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "student:" in done.stdout
    (prompts,) = set(re.findall(r"prompts: (.*\.txt)", done.stdout))
    assert prompts.startswith(str(installed.parent))
    assert Path(prompts).is_file()
    assert list(tmp_path.iterdir()) == []


def test_every_stage_is_part_of_the_wheel(installed, tmp_path):
    code = (
        "import importlib.util, instaflow.methods as s;"
        "kinds = {*s.KINDS, *s.METHODS, *s.TEACHERS} - {'instaflow', 'latent'};"
        "print([kind for kind in kinds if not importlib.util.find_spec(f'pipelines.{kind}')])"
    )
    assert outside(installed / "python", "-c", code, cwd=tmp_path).stdout == "[]\n"


def test_the_version_is_the_package_s(installed, tmp_path):
    import instaflow

    done = outside(installed / "instaflow", "--version", cwd=tmp_path)
    assert done.stdout.strip().endswith(instaflow.__version__)


def test_the_listed_packages_are_those_of_the_tree():
    listed = set(setup()["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("instaflow", "pipelines")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == {*found, "instaflow.configs"}


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.11.0"), ("torchvision", "0.26.0"), ("transformers", "5.17.0")]
)
def test_the_versions_of_a_gpu_machine_lie_inside_the_ranges(name, version):
    assert requirements()[name].specifier.contains(version)


def test_every_range_has_two_ends_or_a_reason():
    open_ended = {"fsspec", "pillow"}  # versioned by date, and a major number every year
    for name, requirement in requirements().items():
        operators = {clause.operator for clause in requirement.specifier}
        assert operators == ({">="} if name in open_ended else {">=", "<"}), name


def pins() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text("utf-8") if (ROOT / "constraints.txt").is_file() else ""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line]
    for requirement in found:
        assert [clause.operator for clause in requirement.specifier] == ["=="], requirement
    return {normal(requirement.name): next(iter(requirement.specifier)).version for requirement in found}


def test_the_tested_versions_lie_inside_the_ranges():
    tested = pins()
    assert tested
    for name, requirement in requirements().items():
        assert name in tested, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(tested[name]), f"{name} {tested[name]}"
