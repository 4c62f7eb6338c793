"""The three descriptions of the environment agree, and name no package registry."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins():
    """Pins by name; one package may have several, for different versions of Python."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = {}
    for pin in (Requirement(line) for line in lines if not line.startswith("#")):
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


@pytest.fixture(scope="module")
def conda():
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_every_requirement_is_one_exact_version(pins):
    for pin in (pin for several in pins.values() for pin in several):
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is not an exact version"
        assert "*" not in specifier.version


def test_every_direct_dependency_is_pinned_within_its_range(project, pins):
    extras = project["project"]["optional-dependencies"].values()
    groups = [project["project"]["dependencies"], *extras, *project["dependency-groups"].values()]
    for wanted in (Requirement(line) for lines in groups for line in lines):
        name = canonicalize_name(wanted.name)
        assert name in pins, f"{name} is in pyproject.toml but not in requirements.txt"
        for pin in pins[name]:
            (specifier,) = pin.specifier
            assert wanted.specifier.contains(specifier.version, prereleases=True)


@pytest.mark.slow
# Debian 12's Python first: its patch release is older than what some packages ask for.
@pytest.mark.parametrize(
    ("python", "system"),
    [
        ("3.11.2", "x86_64-unknown-linux-gnu"),
        ("3.14", "x86_64-unknown-linux-gnu"),
        ("3.11.0", "aarch64-apple-darwin"),
        ("3.14", "x86_64-pc-windows-msvc"),
    ],
)
def test_pins_can_be_installed(python, system, tmp_path):
    """All pins together, from wheels only: one that needs another Python has no solution."""
    error = _resolve(python, system, ROOT / "requirements.txt", tmp_path)
    assert error is None, error


def test_a_pin_for_a_newer_python_has_no_solution(tmp_path):
    """The pin of the first edition, which Debian 12 could not install."""
    (tmp_path / "pins.txt").write_text("soupsieve==4.1.2\n")
    error = _resolve("3.11.2", "x86_64-unknown-linux-gnu", tmp_path / "pins.txt", tmp_path)
    assert "3.11.2" in error
    assert "Python>=3.11.5" in error


def _resolve(python, system, pins, folder):
    """None if there is a solution, else why there is none; skips where no index can be reached."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        # In CI everything that the tests need has been installed before.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no uv: `make setup` installs it")
    command = [uv, "pip", "compile", "--python-version", python, "--python-platform", system]
    command += ["--only-binary", ":all:", "--quiet", str(pins), "-o", str(folder / "out.txt")]
    # PyTorch's wheels need macOS 14; uv assumes an older one.
    surroundings = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    surroundings.pop("UV_TORCH_BACKEND", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=surroundings)
    unreachable = "No solution found" not in done.stderr or "network was disabled" in done.stderr
    if done.returncode and unreachable:
        pytest.skip(f"no package index can be reached: {done.stderr.strip()[-300:]}")
    return done.stderr if done.returncode else None


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
    """What setup accepts is what the pins are resolved for and what the package claims."""
    makefile = (ROOT / "Makefile").read_text()
    assert "(3, 11) <= sys.version_info < (3, 15)" in makefile
    assert "--universal --python-version 3.11.0" in makefile
    assert project["project"]["requires-python"] == ">=3.11"
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    assert claimed == ["3.11", "3.12", "3.13", "3.14"]
    (python,) = [item for item in conda if str(item).startswith("python=")]
    assert python.removeprefix("python=") in claimed


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


def test_a_published_site_has_addresses_and_buttons():
    """A copy on a disk has none of them: they come from the workflow's environment."""
    published = runpy.run_path(str(ROOT / ".github" / "published.py"))["published"]
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert "repository" not in config
    surroundings = {"SITE_URL": "https://o.example/n", "GITHUB_SERVER_URL": "https://git.example"}
    surroundings |= {"GITHUB_REPOSITORY": "o/n", "GITHUB_REF_NAME": "7/merge"}
    config = published(config, surroundings)
    assert config["repository"]["url"] == "https://git.example/o/n"
    assert config["repository"]["branch"] == "main"  # a pull request's own reference is no branch
    assert config["html"]["baseurl"] == "https://o.example/n/"
    assert config["html"]["use_edit_page_button"]
    assert config["html"]["home_page_in_navbar"], "what was configured before is kept"
    assert config["sphinx"]["config"]["ogp_image"].startswith("https://o.example/n/_static/")
    assert (ROOT / "book" / config["sphinx"]["config"]["ogp_image"].split("/n/")[1]).is_file()


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.stem
)
def test_commands_of_workflows_exist(file):
    """Targets of make, files and modules that a workflow runs are there."""
    text = file.read_text()
    assert yaml.safe_load(text)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:run: |&& )make ([a-z]+)", text):
        assert target in targets, target
    for path in re.findall(r"(?:\.github|tests|\.ci)/[\w./-]+(?:\.py|\.sh|/run)", text):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("reachable", [True, False])
def test_setup_with_uv_takes_pytorch_for_this_machine_where_it_can(reachable, tmp_path):
    """A stand-in for uv notes its calls; it fails where PyTorch's own index would not answer."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        "#!/bin/sh\n"
        f'echo "${{UV_TORCH_BACKEND:-none}} $*" >> {tmp_path}/calls\n'
        'case "$1 $UV_TORCH_BACKEND" in pip\\ ?*) exit ' + "10"[reachable] + ";; esac\n"
    )
    uv.chmod(0o755)
    surroundings = os.environ | {"PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}"}
    surroundings.pop("UV_TORCH_BACKEND", None)
    subprocess.run(["make", "setup"], cwd=tmp_path, env=surroundings, check=False)
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "venv " not in line]
    pins = "pip install --python .venv/bin/python -r requirements.txt"
    again = [] if reachable else [f"none {pins}"]
    library = "none pip install --python .venv/bin/python --no-deps -e ."
    assert calls == [f"auto {pins}", *again, library]
