"""The net holds: a wrong number in the library turns the tests red, and the book with them.

The library is copied, one fault is put into the copy, and the tests are run on it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = ROOT / "book" / "chapters" / "01-measuring-similarity.ipynb"
ORIGINAL = ("test_cka.py", "test_measure.py", "test_records.py")

# fault: (module, replacements of code in it, the file of tests that must notice)
FAULTS = {
    "CKA is a tenth too small": (
        "cka",
        {
            "return float((gram_x": "return 0.9 * float((gram_x",
            "return hsic / (own": "return 0.9 * hsic / (own",
        },
        "test_cka.py",
    ),
    "rows and columns are swapped": (
        "records",
        {"isel(tap=tap, other=other)": "transpose(..., 'other', 'tap').isel(tap=tap, other=other)"},
        "test_records.py",
    ),
    "the biased estimator in place of the unbiased": (
        "cka",
        {
            '    if estimator == "biased":\n        return gram - gram.mean(0)': (
                "    if True:\n        return gram - gram.mean(0)"
            )
        },
        "test_measure.py",
    ),
}

WHICH_LIBRARY = """
from pathlib import Path
import lib.cka, lib.records

def test_the_copy_is_what_is_imported():
    here = Path(__file__).resolve().parents[1]
    for module in (lib, lib.cka, lib.records):
        assert Path(module.__file__).resolve().is_relative_to(here)
"""


def copy(folder, fault=None, checkpoints=False) -> Path:
    """A copy of the library and its tests, in which one fault was made."""
    ignored = shutil.ignore_patterns("__pycache__", *(() if checkpoints else ("checkpoints",)))
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=ignored)
    (folder / "tests").mkdir()
    for name in ORIGINAL:
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    # The tests stand beside the copy: beside the original, pytest would import that one.
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests" / "test_a_which.py").write_text(WHICH_LIBRARY)
    if fault:
        module, replacements, _ = FAULTS[fault]
        path = folder / "lib" / f"{module}.py"
        source = path.read_text(encoding="utf-8")
        for right, wrong in replacements.items():
            assert source.count(right) == 1, f"no longer in lib/{module}.py: {right}"
            source = source.replace(right, wrong)
        path.write_text(source, encoding="utf-8")
    return folder


def run_pytest(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(folder), "VIT_SEE_CACHE": str(folder / "cache")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p"]
    command += ["no:cacheprovider", *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )


def test_an_unmodified_copy_passes(tmp_path):
    folder = copy(tmp_path)
    slow = ("two_processes", "intervals_cover", "float32_agrees", "whatever_changes", "half_a_file")
    fast = [f"tests/{name}" for name in ("test_a_which.py", "test_cka.py", "test_records.py")]
    run = run_pytest(folder, *fast, "-k", " and ".join(f"not {name}" for name in slow))
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 50


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(tmp_path, fault):
    folder = copy(tmp_path, fault)
    run = run_pytest(folder, "tests/test_a_which.py", f"tests/{FAULTS[fault][2]}")
    # 1 is "some tests failed"; a copy that cannot be imported would give 2.
    assert run.returncode == 1, run.stdout
    assert re.search(r"\b1 failed, [1-9]\d* passed", run.stdout)
    assert re.search(r"^FAILED tests/test_(cka|measure|records)", run.stdout, re.MULTILINE)
    assert "AssertionError" in run.stdout


def test_the_book_notices_too(tmp_path):
    if not CHAPTER.exists():
        pytest.skip("the first chapter has no executed copy yet: run `make book`")
    folder = copy(tmp_path, "CKA is a tenth too small", checkpoints=True)
    chapter = folder / "book" / "chapters" / CHAPTER.name
    chapter.parent.mkdir(parents=True)
    shutil.copy(CHAPTER, chapter)
    sanitize = ROOT / "tests" / "nbval-sanitize.cfg"
    run = run_pytest(
        folder,
        *("--nbval", "--nbval-current-env", "--nbval-sanitize-with", sanitize),
        *("--rootdir", folder, chapter),
    )
    assert run.returncode == 1, run.stdout
    # The cell that compares CKA by hand with that of the library is the first to know.
    assert "AssertionError" in run.stdout
    assert "by_hand" in run.stdout
