"""The scoreboard shows the verdicts that follow from evidence, and nothing where there is none."""

import json
import re

import numpy as np
import pytest
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter

from lib.findings import CLAIMS, claims
from lib.findings.claims import Judgement
from lib.intervals import Estimate
from lib.site import PUBLISHED, RESULTS, ROOT, board, results

ABOVE, BELOW = Estimate(0.8, 0.71234, 0.9), Estimate(-0.8, -0.9, -0.7)
ABOVE_TOO = Estimate(0.5, 0.4, 0.6)
ACROSS, UNKNOWN = Estimate(0.0, -0.1, 0.1), Estimate(np.nan, np.nan, np.nan)
PROSE = (ROOT / "book" / "scoreboard.md").read_text(encoding="utf-8")


def decide(claim, trained, other_seed, untrained):
    """A judgement on the estimates of one or two replicates and of the baseline."""
    replicates = [one for one in (trained, other_seed) if one]
    return Judgement(claim, tuple(replicates), (untrained,) if untrained else ())


def carried(judgements):
    """What displaying a table of claims puts into an executed chapter."""
    _, metadata = DisplayFormatter().format(claims.table(judgements))
    return json.loads(json.dumps(metadata[results.CARRIED], allow_nan=False))


def chapter(*judgements, edition=results.EDITION):
    """A chapter's part of results.json."""
    return {"claims": carried(judgements), "edition": edition}


@pytest.fixture
def made(monkeypatch):
    """A book of studies whose chapters are given as judgements by study and chapter."""

    def make(**studies):
        found = {
            study: {"chapters": {name: chapter(*js) for name, js in chapters.items()}, "cards": {}}
            for study, chapters in studies.items()
        }
        monkeypatch.setattr(board, "titles", lambda: {study: f"The {study}" for study in found})
        monkeypatch.setattr(results, "of_chapters", lambda folder: found["lab"])
        monkeypatch.setattr(results, "load", found.get)
        return board.Book("nowhere")

    return make


def row(html, key):
    """The cells of a claim in the page's table."""
    return BeautifulSoup(html, "html.parser").find("tr", id=key.lower()).find_all(["th", "td"])


def test_evidence_has_what_a_judgement_was_made_of():
    judgement = decide(CLAIMS["E01-uniform"], ABOVE, BELOW, ABOVE_TOO)
    (found,) = carried([judgement])
    assert found == {
        "claim": "E01-uniform",
        "replicates": [[0.8, 0.712, 0.9], [-0.8, -0.9, -0.7]],
        "baselines": [[0.5, 0.4, 0.6]],
        "why": "",
    }
    (found,) = carried([Judgement(judgement.claim, missing="no boxes")])
    assert (found["replicates"], found["baselines"], found["why"]) == ([], [], "no boxes")


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
def test_the_verdict_follows_from_the_evidence(made, estimates, kind):
    judgement = decide(CLAIMS["E01-uniform"], *estimates)
    book = made(lab={"02-finding": [judgement]})
    view = book.views["lab"]["E01-uniform"]
    assert view.kind == kind
    assert view.badge.startswith(claims.badge(judgement.verdict))
    assert {name: keys for name, keys in book.kinds("lab").items() if name != "missing"} == {
        kind: ["E01-uniform"]
    }
    assert len(book.kinds("lab")["missing"]) == len(CLAIMS) - 1


def test_a_changed_threshold_changes_the_verdict_on_old_evidence(monkeypatch):
    import dataclasses

    (evidence,) = chapter(decide(CLAIMS["E01-uniform"], ABOVE, ABOVE, BELOW))["claims"]
    assert board.view(evidence, "").kind == "learned"
    stricter = dataclasses.replace(CLAIMS["E01-uniform"], threshold=0.95)
    monkeypatch.setitem(CLAIMS, "E01-uniform", stricter)
    assert board.view(evidence, "").kind == "against"


def test_a_reason_outweighs_numbers():
    """Numbers may be there though they decide nothing, as of heads that hardly differ."""
    evidence = {"claim": "E05-slope", "replicates": [[-0.8, -0.9, -0.7]], "baselines": []}
    assert board.view(evidence | {"why": ""}, "").kind == "holds"
    view = board.view(evidence | {"why": "heads hardly differ"}, "")
    assert view.kind == "unmeasurable"
    assert view.numbers == ("-0.800 [-0.900, -0.700]", "–", "–")
    assert "heads hardly differ" in view.badge


def test_a_known_verdict_becomes_a_row(made):
    book = made(
        lab={"02-finding": [decide(CLAIMS["E01-uniform"], ABOVE, ABOVE_TOO, BELOW)]}, other={}
    )
    html = book.render("scoreboard")
    name, says, lab, other = row(html, "E01-uniform")
    assert name.text == "E01-uniform"
    assert CLAIMS["E01-uniform"].sentence in says.text
    assert "> 0" in says.text
    assert re.sub(r"\s+", " ", lab.get_text(" ")).strip() == (
        "supported 0.800 [0.712, 0.900] other seed: 0.500 [0.400, 0.600] "
        "untrained: -0.800 [-0.900, -0.700]"
    )
    assert lab.a["href"] == "chapters/02-finding.html?study=lab#e01-uniform"
    assert other.text == "not measured here"
    assert [cell.text for cell in row(html, "E22-kinship")[2:]] == ["not measured here"] * 2


def test_columns_are_numbered_as_cells_are(made):
    html = made(lab={}, other={}).render("scoreboard")
    page = BeautifulSoup(html, "html.parser")
    heads = page.find_all("th", {"data-column": True})
    assert [int(head["data-column"]) for head in heads] == [0, 1, 2, 3]
    assert [head.get("data-of") for head in heads] == [None, None, "The lab", "The other"]
    assert {len(found.find_all(["th", "td"])) for found in page.tbody.find_all("tr")} == {4}
    assert "\n\n" not in html  # Markdown would end the table there
    assert all(cell.has_attr("data-sort") for cell in page.tbody.find_all(["th", "td"]))


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
def test_studies_are_compared_claim_by_claim(made, kinds, kind):
    estimates = {
        "learned": (ABOVE, ABOVE, BELOW),
        "holds": (ABOVE, ABOVE, None),
        "before": (ABOVE, ABOVE, ABOVE),
        "against": (BELOW, BELOW, BELOW),
        "open": (ACROSS, ABOVE, ABOVE),
        "seeds": (ABOVE, BELOW, ABOVE),
        "unmeasurable": (UNKNOWN, None, None),
    }
    judgements = [[decide(CLAIMS["E01-uniform"], *estimates[found])] for found in kinds]
    # A claim that only one study has measured cannot be compared.
    judgements[0].append(decide(CLAIMS["E01-grid"], ABOVE, ABOVE, None))
    book = made(lab={"02": judgements[0]}, mine={"02": judgements[1]})
    assert book.compared("mine") == ({kind: ["E01-uniform"]} if kind else {})
    html = book.render("compared", study="mine")
    assert f"Of the {int(kind is not None)} claims that both" in html
    page = BeautifulSoup(html, "html.parser")
    assert [li.text for li in page.select("details li")] == (
        [f"E01-uniform: {CLAIMS['E01-uniform'].sentence}"] if kind else []
    )
    assert [link["href"] for link in page.find_all("a")] == (
        ["scoreboard.html#e01-uniform"] if kind else []
    )


def test_every_kind_has_its_words(made):
    book = made(lab={})
    counts = board._templates().get_template("counts.html").module
    for said, kinds in (("alone", board.KINDS), ("together", board.TOGETHER)):
        html = counts.counts(said, {kind: ["E01-uniform"] for kind in kinds})
        assert str(html).count("<b>1</b>") == len(kinds)
    listed = BeautifulSoup(book.render("summary"), "html.parser").select("details details li")
    assert len(listed) == len(CLAIMS)


def test_what_cannot_be_right_is_refused():
    judgement = decide(CLAIMS["E01-uniform"], ABOVE, ABOVE, BELOW)
    twice = {"chapters": {"02-one": chapter(judgement), "03-two": chapter(judgement)}}
    with pytest.raises(ValueError, match="chapters 02-one and 03-two both judge 'E01-uniform'"):
        board.judged(twice)
    gone = chapter(judgement)
    gone["claims"][0]["claim"] = "E01-gone"
    with pytest.raises(ValueError, match="chapter 03-two judges 'E01-gone', which is no claim"):
        board.judged({"chapters": {"03-two": gone}})
    # An earlier edition had other claims.
    assert board.judged({"chapters": {"03-two": gone | {"edition": "first edition"}}}) == {}


def test_a_study_with_results_is_shown_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "RESULTS", tmp_path)
    for name in ("mine", "lab-long"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
    (tmp_path / "tiny-imagenet").mkdir()  # nothing in it
    assert list(board.titles()) == ["lab", "lab-long", "mine"]


def test_claims_are_worded_without_marks_of_html():
    for claim in CLAIMS.values():
        assert not re.search("[<>&]", claim.sentence + claim.source + claim.meaning)


def test_the_books_own_results_are_judged():
    book = board.Book(PUBLISHED)
    assert set(book.views) == {"lab", *(p.parent.name for p in RESULTS.glob("*/results.json"))}
    for study, views in book.views.items():
        assert len(views) >= 40, study
        assert {view.kind for view in views.values()} >= {"before", "against"}
    assert set(book.views["lab"]) == set(CLAIMS)


def test_the_page_accounts_for_every_experiment_of_the_paper():
    claimed = {key.split("-")[0] for key in CLAIMS}
    _, _, absent = PROSE.partition("## What is not on it")
    explained = set(re.findall(r"^- \*\*(E\d\d)\*\*", absent, re.MULTILINE))
    assert explained == {f"E{number:02}" for number in range(1, 24)} - claimed
    assert set(re.findall(r"\bE\d\d\b", absent)) - explained <= claimed
