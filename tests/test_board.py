"""The scoreboard says what the chapters say, and nothing where nothing was measured."""

import json
import re

import numpy as np
import pytest
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter

from lib.findings import claims
from lib.findings.claims import CLAIMS, Estimate, decide
from lib.records import ROOT
from lib.site import board, results

ABOVE, BELOW = Estimate(0.8, 0.71234, 0.9), Estimate(-0.8, -0.9, -0.7)
ABOVE_TOO = Estimate(0.5, 0.4, 0.6)
ACROSS, UNKNOWN = Estimate(0.0, -0.1, 0.1), Estimate(np.nan, np.nan, np.nan)
PROSE = (ROOT / "book" / "scoreboard.md").read_text(encoding="utf-8")


def output(judgements):
    """What displaying a table of claims puts into an executed chapter."""
    data, metadata = DisplayFormatter().format(claims.table(judgements))
    return {"output_type": "execute_result", "data": data, "metadata": metadata}


def chapter(folder, name, *tables):
    """An executed chapter that ends in tables of claims."""
    folder.mkdir(exist_ok=True)
    cells = [
        {"cell_type": "markdown", "source": ["# A finding\n", "\n", "## Claims, and verdicts"]},
        *({"cell_type": "code", "outputs": [shown]} for shown in map(output, tables)),
        {"cell_type": "markdown", "source": ["## Exercises"]},
    ]
    text = json.dumps({"cells": cells}, allow_nan=False)
    (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")


def row(text, key):
    """The cells of a claim in the page's table."""
    table = BeautifulSoup(text, "html.parser").find("table")
    return table.find("tr", id=key.lower()).find_all(["th", "td"])


def test_a_table_displays_as_before_and_carries_its_judgements():
    judgement = decide(CLAIMS["E01-uniform"], ABOVE, BELOW, None)
    shown = output([judgement])
    assert shown["data"] == {
        "text/html": claims.table([judgement]).data,
        "text/plain": "<IPython.core.display.HTML object>",
    }
    assert shown["metadata"][claims.CARRIED] == [
        {
            "claim": "E01-uniform",
            "verdict": "inconclusive",
            "why": "another seed does not repeat it",
            "trained": {"value": 0.8, "low": 0.712, "high": 0.9},
            "other_seed": {"value": -0.8, "low": -0.9, "high": -0.7},
            "untrained": None,
        }
    ]


@pytest.mark.parametrize("trained", [ABOVE, UNKNOWN])
def test_a_judgement_survives_json(trained):
    judgement = decide(CLAIMS["E01-uniform"], trained, None, BELOW)
    (plain,) = json.loads(
        json.dumps(output([judgement])["metadata"][claims.CARRIED], allow_nan=False)
    )
    again = claims.from_plain(plain)
    assert (again.claim, again.verdict, again.why) == (
        judgement.claim,
        judgement.verdict,
        judgement.why,
    )
    assert [str(part) for part in (again.trained, again.other_seed, again.untrained)] == [
        str(part) for part in (judgement.trained, judgement.other_seed, judgement.untrained)
    ]


def test_a_known_judgement_becomes_a_row(tmp_path):
    chapter(tmp_path, "02-finding", [decide(CLAIMS["E01-uniform"], ABOVE, ABOVE_TOO, BELOW)])
    found = board.collect(tmp_path)
    assert list(found) == ["E01-uniform"]
    text = board.page({"lab": found, "imagenet": {}})
    name, says, *cells = row(text, "E01-uniform")
    assert name.text == "E01-uniform"
    assert CLAIMS["E01-uniform"].sentence in says.text
    assert "> 0" in says.text
    assert says.a.text == "A finding"
    assert says.a["href"] == "chapters/02-finding.html#claims-and-verdicts"
    assert [cell.get_text(" ") for cell in cells] == [
        "supported",
        "0.800 [0.712, 0.900]",
        "-0.800 [-0.900, -0.700]",
        "0.500 [0.400, 0.600]",
        "not measured here",
    ]
    assert [cell["data-sort"] for cell in cells[1:4]] == ["0.800", "-0.800", "0.500"]


def test_what_was_not_measured_shows_no_number(tmp_path):
    chapter(tmp_path, "02-finding", [decide(CLAIMS["E01-uniform"], UNKNOWN, None, None)])
    text = board.page({"lab": board.collect(tmp_path), "tiny-imagenet": {}})
    texts = [cell.get_text(" ", strip=True) for cell in row(text, "E01-uniform")[2:]]
    assert texts == [
        "not measurable the statistic is undefined", "–", "–", "–", "not measured here",
    ]  # fmt: skip
    texts = [cell.get_text(" ") for cell in row(text, "E22-kinship")[2:]]
    assert texts == ["not measured here", "–", "–", "–", "not measured here"]
    assert f"**{len(claims.CLAIMS) - 1}** have not been measured" in text


def test_a_study_or_a_chapter_without_claims_is_none(tmp_path):
    assert board.collect(tmp_path / "never-measured") == {}
    chapter(tmp_path, "00-the-lab")
    assert board.collect(tmp_path) == {}
    text = board.page({study: {} for study in board.STUDIES})
    assert text.startswith("<div")  # nothing to sum up
    assert text.count("not measured here") == len(CLAIMS) * len(board.STUDIES)
    for key in CLAIMS:
        numbers = [cell.text for cell in row(text, key)[2:] if re.search(r"\d", cell.text)]
        assert not numbers


@pytest.mark.parametrize(
    ("estimates", "kind"),
    [
        ((ABOVE, ABOVE, BELOW), "learned"),
        ((ABOVE, None, ACROSS), "learned"),
        ((ABOVE, ABOVE, None), "holds"),
        ((ABOVE, ABOVE, UNKNOWN), "holds"),
        ((ABOVE, ABOVE, ABOVE), "before"),
        ((ABOVE, BELOW, ABOVE), "seeds"),
        ((ACROSS, ABOVE, ABOVE), "open"),
        ((BELOW, BELOW, ABOVE), "against"),
        ((UNKNOWN, None, None), "unmeasurable"),
    ],
)
def test_the_summary_counts_and_names(tmp_path, estimates, kind):
    judgement = decide(CLAIMS["E01-uniform"], *estimates)
    assert board.kind(judgement) == kind
    chapter(tmp_path, "02-finding", [judgement])
    text = board.page({"lab": board.collect(tmp_path)})
    one, _, rest = board.KINDS[kind]
    (line,) = [line for line in text.splitlines() if line.startswith(f"- **1** {one} {rest}: ")]
    assert re.findall(r">([\w-]+)</a>", line) == ["E01-uniform"]


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [
        (("before", "before"), "before"),
        (("before", "learned"), "holds"),
        (("holds", "holds"), "holds"),
        (("against", "against"), "against"),
        (("against", "before"), "differs"),
        (("learned", "open"), "open"),
        (("against", "seeds"), "open"),
        (("unmeasurable", "before"), None),
    ],
)
def test_studies_are_compared_claim_by_claim(tmp_path, kinds, kind):
    estimates = {
        "learned": (ABOVE, ABOVE, BELOW),
        "holds": (ABOVE, ABOVE, None),
        "before": (ABOVE, ABOVE, ABOVE),
        "against": (BELOW, BELOW, BELOW),
        "open": (ACROSS, ABOVE, ABOVE),
        "seeds": (ABOVE, BELOW, ABOVE),
        "unmeasurable": (UNKNOWN, None, None),
    }
    studies = {}
    for study, found in zip(("lab", "mine"), kinds, strict=True):
        judgements = [decide(CLAIMS["E01-uniform"], *estimates[found])]
        # Claims of which only one study speaks cannot be compared.
        judgements += [decide(CLAIMS["E01-grid"], ABOVE, ABOVE, None)] * (study == "lab")
        chapter(tmp_path / study, "02-finding", judgements)
        studies[study] = board.collect(tmp_path / study)
    said = " claims that both `lab` and `mine` have measured:\n"
    before, begin, rest = board.page(studies).partition(said)
    assert begin
    assert before.endswith(f"Of the {int(kind is not None)}")
    lines = [re.sub("<.*?>", "", line) for line in rest.splitlines() if line.startswith("- ")]
    one, _, says = board.TOGETHER.get(kind, [""] * 3)
    assert lines == ([f"- **1** {one} {says}: E01-uniform."] if kind else [])


def test_each_study_is_compared_with_the_first_on_what_both_measured(tmp_path):
    supported, contradicted = (decide(CLAIMS["E01-uniform"], at, at, None) for at in (ABOVE, BELOW))
    only = decide(CLAIMS["E01-grid"], ABOVE, ABOVE, None)
    for study, judgements in {
        "lab": [supported], "longer": [contradicted, only], "photos": [supported, only],
    }.items():  # fmt: skip
        chapter(tmp_path / study, "02-finding", judgements)
    studies = {each: board.collect(tmp_path / each) for each in ("lab", "longer", "photos")}
    text = board.page({**studies, "imagenet": {}})
    begins = [line for line in text.splitlines() if line.startswith("Of the ")]
    assert begins == [
        f"Of the 1 claims that both `lab` and `{other}` have measured:"
        for other in ("longer", "photos")
    ]
    differs, holds = (
        re.sub("<.*?>", "", part.partition("- ")[2]).partition("\n")[0]
        for part in text.partition(begins[0])[2].split(begins[1])
    )
    assert differs.startswith("**1** holds in one and comes out against the sentence in the other")
    assert holds.startswith("**1** holds in both, and in one at least not before training")


def test_what_studies_make_of_a_claim_together_is_of_those_that_measured_it():
    before, against = (decide(CLAIMS["E01-uniform"], *how) for how in ((ABOVE,) * 3, (BELOW,) * 3))
    unknown = claims.unmeasurable(CLAIMS["E01-uniform"], "no ViT")
    assert board.together(before, None, before, unknown) == "before"
    assert board.together(before, before, against) == "differs"
    assert board.together(before, None, unknown) is None


def test_claims_that_one_thing_is_missing_for_stand_together(tmp_path):
    judgements = [
        claims.unmeasurable(CLAIMS[key], why)
        for key, why in {"E14-gap": "no ViT", "E01-grid": "no boxes", "E15-tie": "no ViT"}.items()
    ]
    chapter(tmp_path, "02-finding", judgements)
    text = board.page({"lab": board.collect(tmp_path)})
    line = re.sub("<.*?>", "", next(one for one in text.splitlines() if "not be measured" in one))
    assert line == "- **3** could not be measured: E01-grid (no boxes); E14-gap, E15-tie (no ViT)."


def test_the_summary_says_in_words_what_its_keys_stand_for(tmp_path):
    chapter(tmp_path, "02-finding", [decide(CLAIMS["E01-uniform"], ABOVE, ABOVE, BELOW)])
    page = BeautifulSoup(board.page({"lab": board.collect(tmp_path)}), "html.parser")
    told = [[item.text for item in fold.find_all("li")] for fold in page.find_all("details")]
    assert told[0] == [f"E01-uniform: {CLAIMS['E01-uniform'].sentence}"]
    assert sum(map(len, told)) == len(CLAIMS)


def test_columns_are_numbered_as_cells_are(tmp_path):
    chapter(tmp_path, "02-finding", [decide(CLAIMS["E01-uniform"], ABOVE, ABOVE, BELOW)])
    text = board.page({"lab": board.collect(tmp_path), "imagenet": {}})
    page = BeautifulSoup(text, "html.parser")
    results = sorted(
        int(head["data-column"]) for head in page.find_all("th", {"data-column": True})
    )
    assert results == list(range(6))  # there is nothing to sort an empty study by
    assert {head.get("data-of") for head in page.thead.find_all("tr")[1].find_all("th")} == {"lab"}
    assert {len(found.find_all(["th", "td"])) for found in page.tbody.find_all("tr")} == {7}
    assert "\n\n" not in text[text.index("<table") :]  # Markdown would end the table there
    assert all(cell.has_attr("data-sort") for cell in page.tbody.find_all(["th", "td"]))


def test_what_cannot_be_right_is_refused(tmp_path):
    judgement = decide(CLAIMS["E01-uniform"], ABOVE, ABOVE, BELOW)
    chapter(tmp_path, "02-one", [judgement])
    chapter(tmp_path, "03-two", [judgement])
    with pytest.raises(ValueError, match="chapters 02-one and 03-two both judge 'E01-uniform'"):
        board.collect(tmp_path)
    path = tmp_path / "03-two.ipynb"
    path.write_text(path.read_text().replace("E01-uniform", "E01-gone"))
    with pytest.raises(ValueError, match="chapter 03-two judges 'E01-gone', which is not in"):
        board.collect(tmp_path)


def test_a_study_that_was_run_gets_its_column_whatever_its_name(tmp_path, monkeypatch):
    chapter(tmp_path / "mine", "02-finding", [decide(CLAIMS["E01-uniform"], ABOVE, None, None)])
    monkeypatch.setattr(board, "RECORDS", tmp_path)
    folders = board.folders()
    assert list(folders) == [*board.STUDIES, "mine"]
    assert folders["mine"] == tmp_path / "mine"
    monkeypatch.setattr(board, "PAGE", tmp_path / "made" / "page.md")
    board.write()
    table = BeautifulSoup(board.PAGE.read_text(), "html.parser").find("table")
    heads = [head.text for head in table.find("tr").find_all("th")]
    assert heads == ["claim", "what it says", *folders]


def test_whatever_studies_say_together_has_its_words():
    assert set(results.TAKEN_TOGETHER) == set(board.TOGETHER)


def test_claims_are_worded_without_marks_of_html():
    for claim in CLAIMS.values():
        assert not re.search("[<>&]", claim.sentence + claim.source + claim.meaning)


def test_the_committed_page_is_what_the_committed_chapters_say():
    studies = {study: board.collect(path) for study, path in board.folders().items()}
    pieces = board.pieces(studies)
    compared = (
        "lab-third-seed",
        "lab-long",
        "lab-faint",
        "lab-masked",
        "tiny-imagenet-small",
    )
    assert list(pieces)[1:] == [f"compared-{study}.md" for study in compared]
    for name, text in pieces.items():
        committed = (board.PAGE.parent / name).read_text(encoding="utf-8")
        assert committed == text, "run `python -m lib pages`"
    table = BeautifulSoup(pieces[board.PAGE.name], "html.parser").find("table")
    rows = {f"scoreboard.html#{row['id']}" for row in table.tbody.find_all("tr")}
    for text in list(pieces.values())[1:]:
        links = {link["href"] for link in BeautifulSoup(text, "html.parser").find_all("a")}
        assert links
        assert links <= rows


def test_the_page_accounts_for_every_experiment_of_the_paper():
    claimed = {key.split("-")[0] for key in CLAIMS}
    _, _, absent = PROSE.partition("## What is not on it")
    explained = set(re.findall(r"^- \*\*(E\d\d)\*\*", absent, re.MULTILINE))
    assert explained == {f"E{number:02}" for number in range(1, 24)} - claimed
    assert set(re.findall(r"\bE\d\d\b", absent)) - explained <= claimed
