"""The list of faults that the tests are tried on fits the library as it is."""

import ast

import pytest

from lib.records import ROOT
from tests import mutations


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda f: f"{f.module}: {f.what}")
def test_every_fault_can_be_put_in(fault):
    text = (ROOT / "lib" / f"{fault.module}.py").read_text(encoding="utf-8")
    faulty = mutations.put(fault, text)
    assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text))


def test_a_fault_that_is_out_of_date_is_named():
    fault = mutations.Fault("cka", "nothing", "a line that is not there", "")
    with pytest.raises(SystemExit, match=r"'nothing' is out of date: lib/cka\.py holds"):
        mutations.put(fault, "")
