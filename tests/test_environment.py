"""The three descriptions of the environment agree, and name no package registry."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


@pytest.fixture(scope="module")
def conda():
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_every_requirement_is_one_exact_version(pins):
    for pin in pins.values():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is not an exact version"
        assert "*" not in specifier.version


def test_every_direct_dependency_is_pinned_within_its_range(project, pins):
    extras = project["optional-dependencies"].values()
    for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        assert name in pins, f"{name} is in pyproject.toml but not in requirements.txt"
        (specifier,) = pins[name].specifier
        assert wanted.specifier.contains(specifier.version, prereleases=True)


@pytest.mark.parametrize(
    "name",
    ["jupyter-book", "torch", "timm", "numpy", "matplotlib", "seaborn", "papermill", "nbval"],
)
def test_the_stack_is_there(name, pins):
    assert name in pins


def test_conda_installs_the_same_versions(conda):
    (pip,) = [item["pip"] for item in conda if isinstance(item, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    assert "pip" in conda


def test_python_versions_agree(project, conda):
    (python,) = [item for item in conda if str(item).startswith("python=")]
    version = python.removeprefix("python=")
    assert SpecifierSet(project["requires-python"]).contains(version)
    assert f'python-version: "{version}"' in (ROOT / ".github/workflows/ci.yml").read_text()


def test_no_file_names_a_registry():
    # In pieces, or this file would name them.
    hosts = ["pypi" + ".org", "python" + "hosted.org", "npmjs" + ".", "deb.debian" + ".org"]
    hosts += ["repo.anaconda" + ".com", "conda.anaconda" + ".org", "download.pytorch" + ".org"]
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile("|".join(map(re.escape, hosts)).encode())
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    named = [path for path in paths if path.is_file() and pattern.search(path.read_bytes())]
    assert not named
