"""Code that pages show to readers runs as it stands there."""

import re

import matplotlib
import pytest

from lib.records import ROOT

PAGES = {
    "your-own-model": (ROOT / "book" / "your-own-model.md").read_text(encoding="utf-8"),
}


@pytest.mark.parametrize("page", PAGES)
def test_python_on_the_page_runs(page, monkeypatch, tmp_path, capsys):
    matplotlib.use("agg")
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    estimate, taps = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"-?\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]", estimate)
    assert taps.count("attn'") == 6
    assert len(names["figure"].axes) == 4  # three maps and their scale
    assert names["record"].attrs["study"] == "mine"
