"""The net holds: a small fault in the library turns its tests red, and the book with them.

All faults are tried by `tests/mutations.py`; here a few of them, and whether the list fits the
library as it is.
"""

import ast

import pytest

from lib.records import ROOT
from tests import mutations

FAULTS = {fault.what: fault for fault in mutations.FAULTS}
WHICH_LIBRARY = """
from pathlib import Path
import lib.cka

def test_the_copy_is_what_is_imported():
    assert Path(lib.cka.__file__).is_relative_to(Path(__file__).resolve().parents[1])
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = mutations.copy_to(tmp_path_factory.mktemp("copy"))
    (folder / "tests" / "test_a_which.py").write_text(WHICH_LIBRARY)
    return folder


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda f: f"{f.module}: {f.what}")
def test_every_fault_can_be_put_in(fault):
    text = (ROOT / "lib" / f"{fault.module}.py").read_text(encoding="utf-8")
    faulty = mutations.put(fault, text)
    assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text))


def test_a_fault_that_is_out_of_date_is_named():
    fault = mutations.Fault("cka", "nothing", "a line that is not there", "")
    with pytest.raises(SystemExit, match=r"'nothing' is out of date: lib/cka\.py holds"):
        mutations.put(fault, "")


def test_without_a_fault_nothing_fails(copy):
    tests = [copy / "tests" / name for name in ("test_a_which.py", "test_records.py")]
    assert mutations.first_failure(copy, tests) == ""


@pytest.mark.parametrize("what", ["minibatches weigh alike", "half a record is kept"])
def test_a_fault_is_noticed_and_taken_back(copy, what):
    fault = FAULTS[what]
    before = (copy / "lib" / f"{fault.module}.py").read_text(encoding="utf-8")
    caught = mutations.by_whom(fault, copy, own_only=True)
    assert caught.startswith(f"test_{fault.module}.py::test_")
    assert (copy / "lib" / f"{fault.module}.py").read_text(encoding="utf-8") == before


def test_the_book_notices_too(copy):
    path = copy / "lib" / "cka.py"
    right = path.read_text(encoding="utf-8")
    path.write_text(mutations.put(FAULTS["minibatches weigh alike"], right), encoding="utf-8")
    nbval = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with"]
    chapter = copy / "book" / "chapters" / "01-measuring-similarity.ipynb"
    given = [*nbval, copy / "tests" / "nbval-sanitize.cfg", "--rootdir", copy, chapter]
    try:
        caught = mutations.first_failure(copy, given)
    finally:
        path.write_text(right, encoding="utf-8")
    assert caught.startswith(f"{chapter.name}::Cell")
