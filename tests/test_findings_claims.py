"""Verdicts follow from the evidence, and the evidence is of networks that differ."""

import itertools
import math
import types

import numpy as np
import pytest
from bs4 import BeautifulSoup

from lib.findings import CLAIMS, claims
from lib.findings.claims import (
    CONTRADICTED,
    INCONCLUSIVE,
    SUPPORTED,
    UNMEASURABLE,
    Claim,
    Judgement,
    NotMeasurable,
    judge,
)
from lib.intervals import Estimate
from lib.studies import load_study

PLACES = {
    "above": Estimate(0.8, 0.7, 0.9),
    "below": Estimate(0.2, 0.1, 0.3),
    "across": Estimate(0.5, 0.4, 0.6),
    "undefined": Estimate(math.nan, math.nan, math.nan),
    "no interval": Estimate(0.8, math.nan, math.nan),
}


def claim_of(statistic=None, arms=("vit",), threshold=0.5, **options):
    return Claim(
        "E99-key", "A sentence.", "Fig. 9", statistic, "meaning", threshold, arms, **options
    )


def judgement_of(claim, *names):
    """A judgement of estimates at ``PLACES``: first replicate, second, baseline; None for none."""
    first, second, baseline = (PLACES.get(name) for name in names)
    replicates = tuple(one for one in (first, second) if one)
    return Judgement(claim, replicates, (baseline,) if baseline else ())


# Verdicts -----------------------------------------------------------------------------------------


def verdict(good, trained, other) -> str:
    """What a verdict has to be, where ``good`` is the claimed side of the threshold."""
    if trained in ("undefined", "no interval"):
        return UNMEASURABLE
    if trained == "across" or other not in (None, trained):
        return INCONCLUSIVE
    return SUPPORTED if trained == good else CONTRADICTED


def reason(good, trained, other, untrained) -> str:
    if trained in ("undefined", "no interval"):
        return {"undefined": "the statistic is undefined"}.get(trained, "too few minibatches")
    if trained == "across":
        return "the interval contains the threshold"
    if other not in (None, trained):
        return "another seed does not repeat it"
    return "already true before training" if trained == untrained == good else ""


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("trained", PLACES)
def test_every_combination_has_the_verdict_it_should(below, trained):
    good = "below" if below else "above"
    for other, untrained in itertools.product([None, *PLACES], repeat=2):
        judgement = judgement_of(claim_of(below=below), trained, other, untrained)
        assert judgement.verdict == verdict(good, trained, other), (other, untrained)
        assert judgement.why == reason(good, trained, other, untrained), (other, untrained)


def test_every_replicate_has_to_agree_however_many_there_are():
    above, below = PLACES["above"], PLACES["below"]
    assert Judgement(claim_of(), (above,) * 5).verdict == SUPPORTED
    assert Judgement(claim_of(), (below,) * 5).verdict == CONTRADICTED
    assert Judgement(claim_of(), (above,) * 4 + (below,)).verdict == INCONCLUSIVE


def test_an_interval_that_touches_the_threshold_decides_nothing():
    for below in (False, True):
        for low, high in ((0.5, 0.9), (0.1, 0.5), (0.5, 0.5)):
            middle = Estimate((low + high) / 2, low, high)
            assert claim_of(below=below).holds(middle) == INCONCLUSIVE


def test_an_infinite_statistic_is_undefined():
    judgement = Judgement(claim_of(), (Estimate(-np.inf, np.nan, np.nan),))
    assert (judgement.verdict, judgement.why) == (UNMEASURABLE, "the statistic is undefined")


def test_evidence_is_plain_and_makes_the_same_verdict_again():
    judgement = judgement_of(claim_of(), "above", "below", "undefined")
    plain = judgement.as_plain()
    assert plain == {
        "claim": "E99-key",
        "replicates": [[0.8, 0.7, 0.9], [0.2, 0.1, 0.3]],
        "baselines": [[None, None, None]],
        "why": "",
    }
    again = Judgement.from_plain(judgement.claim, plain)
    assert again.replicates == judgement.replicates
    assert (again.verdict, again.why) == (judgement.verdict, judgement.why)
    # The claim as it is now decides, not as it was.
    assert Judgement.from_plain(claim_of(threshold=0.05), plain).verdict == SUPPORTED
    missing = Judgement(claim_of(), missing="no such network").as_plain()
    assert Judgement.from_plain(claim_of(), missing).why == "no such network"


# Which networks are judged ------------------------------------------------------------------------


class Study:
    """Arms by name with their numbers of replicates; baselines are there of all."""

    def __init__(self, **replicates):
        self.replicates = replicates

    def find(self, arm, replicate=0, trained=True):
        if replicate >= self.replicates.get(arm, 0):
            return None
        return types.SimpleNamespace(name=f"{arm} {replicate}" + " before" * (not trained))

    def those(self, *names):
        return [name for name in names if name != "vit 2"]  # has not been trained


def casts_of(study, roles, *arms):
    """The casts that a claim about some arms is judged of, trained and before."""
    seen = []

    def statistic(record, cast):
        assert record == "the record"
        seen.append(tuple(cast.values()))
        return PLACES["above"]

    [judgement] = judge([claim_of(statistic, arms)], "the record", study, roles)
    return judgement, seen


def test_a_replicate_counts_if_every_arm_has_it():
    study = Study(vit=3, resnet=2, mixer=1)
    names = itertools.product(study.replicates, range(3), ("", " before"))
    everything = {f"{arm} {k}{end}" for arm, k, end in names}
    judgement, seen = casts_of(study, everything, "vit", "resnet")
    assert seen == [
        ("vit 0", "resnet 0"),
        ("vit 1", "resnet 1"),
        ("vit 0 before", "resnet 0 before"),
        ("vit 1 before", "resnet 1 before"),
    ]
    assert (len(judgement.replicates), len(judgement.baselines)) == (2, 2)
    assert judgement.why == "already true before training"
    # A network is never judged twice against others.
    assert casts_of(study, everything, "vit", "mixer")[1] == [
        ("vit 0", "mixer 0"),
        ("vit 0 before", "mixer 0 before"),
    ]
    # What was not measured does not count.
    assert casts_of(study, {"vit 0", "vit 2", "vit 1 before"}, "vit")[1] == [
        ("vit 0",),
        ("vit 2",),
        ("vit 1 before",),
    ]


def test_the_next_replicate_is_another_network():
    study = Study(vit=3, less=2)
    roles = {"vit 0", "vit 1", "vit 2", "less 0", "less 1"}
    _, seen = casts_of(study, roles, "less", "vit", "vit+1")
    assert seen == [("less 0", "vit 0", "vit 1"), ("less 1", "vit 1", "vit 2")]
    _, seen = casts_of(study, roles - {"vit 2"}, "vit", "vit+1")
    assert seen == [("vit 0", "vit 1"), ("vit 1", "vit 0")]
    judgement, seen = casts_of(study, {"vit 0", "less 0"}, "less", "vit", "vit+1")
    assert (seen, judgement.why) == ([], "not measured here: no second network vit")


def test_without_its_networks_a_claim_is_not_measurable_and_names_the_first():
    judgement, seen = casts_of(Study(vit=1), {"vit 0"}, "vit", "mixer", "resnet")
    assert seen == []
    assert (judgement.verdict, judgement.why) == (
        UNMEASURABLE,
        "not measured here: no network mixer",
    )
    assert (str(judgement.trained), judgement.replicates, judgement.baselines) == ("–", (), ())


def test_a_statistic_may_refuse_with_a_reason():
    def statistic(record, cast):
        raise NotMeasurable("needs more images")

    [judgement] = judge([claim_of(statistic)], None, Study(vit=1), {"vit 0"})
    assert (judgement.verdict, judgement.why) == (UNMEASURABLE, "needs more images")


def test_networks_of_a_record_and_of_the_columns_of_a_table():
    study = Study(vit=3, mixer=1)
    assert claims.networks(study, "vit", "mixer", "other") == [
        "vit 0", "mixer 0", "vit 1", "vit 0 before", "mixer 0 before"
    ]  # fmt: skip
    assert claims.casts(study, "vit", "mixer") == {
        "trained": {"vit": "vit 0", "mixer": "mixer 0"},
        "other seed": {"vit": "vit 1", "mixer": ""},
        "untrained": {"vit": "vit 0 before", "mixer": "mixer 0 before"},
    }
    assert list(claims.casts(study, "vit", "mixer", complete=True)) == ["trained", "untrained"]


# The claims of the book ---------------------------------------------------------------------------


def test_claims_are_complete():
    study = load_study("lab")
    for key, claim in CLAIMS.items():
        assert claim.key == key
        assert claim.sentence.endswith(".")
        assert claim.source
        assert claim.meaning
        assert callable(claim.statistic)
        assert all(study.find(arm.partition("+")[0]) for arm in claim.arms), key


def test_our_own_claims_are_not_laid_at_the_papers_door():
    assert {"E21-diagonal", "E23-batch-size"} <= {key for key, c in CLAIMS.items() if c.ours}
    assert "(our own, after the paper's appendix A)" in CLAIMS["E23-batch-size"].wording
    assert "(the paper's Fig. 1)" in CLAIMS["E01-grid"].wording


# Tables and text ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def glued(monkeypatch):
    """What the text can paste."""
    import myst_nb

    found = {}
    monkeypatch.setattr(myst_nb, "glue", lambda name, value, display: found.update({name: value}))
    return found


def test_the_table_shows_every_column_of_every_judgement_in_full(glued):
    far = Estimate(0.123456, 0.1, 0.147)
    first = Judgement(claim_of(below=True, threshold=0.02), (PLACES["above"], far))
    claim = CLAIMS["E02-midpoint"]
    second = Judgement(claim, (PLACES["above"],) * 2, (PLACES["above"],))
    table = claims.table([first, second])
    page = BeautifulSoup(table.data, "html.parser")
    head, *rows = page.find_all("tr")
    names = [cell.text for cell in head.find_all("th")]
    assert names == ["claim", "measured [95 %]", "other seed", "untrained", "verdict"]
    cells = [[cell.get_text(" ") for cell in row.find_all("td")] for row in rows]
    assert [len(row) for row in cells] == [5, 5]
    assert cells[0][1:4] == ["0.800 [0.700, 0.900]", "0.123 [0.100, 0.147]", "–"]
    assert cells[1][1:4] == ["0.800 [0.700, 0.900]"] * 3
    assert "E99-key" in cells[0][0]
    assert "A sentence. (the paper's Fig. 9)" in cells[0][0]
    for text in (claim.key, claim.sentence, claim.source, claim.meaning):
        assert text in cells[1][0]
    assert cells[1][4].split() == ["supported", "already", "true", "before", "training"]
    assert "…" not in page.text
    assert "..." not in page.text
    _, metadata = table._repr_mimebundle_()
    assert metadata[claims.CARRIED] == [first.as_plain(), second.as_plain()]
    assert glued["E02-midpoint"].data == claims.badge(SUPPORTED, "already true before training")


def test_the_table_escapes_what_is_not_markup():
    sides = [claim_of(below=True, threshold=0.02), claim_of(threshold=0.25)]
    html = claims.table([Judgement(claim, (PLACES["below"],)) for claim in sides]).data
    assert "meaning &lt; 0.02" in html
    assert "meaning &gt; 0.25" in html
    text = BeautifulSoup(html, "html.parser").text
    assert "meaning < 0.02" in text
    assert "meaning > 0.25" in text


def test_numbers_that_are_missing_are_words(glued):
    claims.in_text(a=np.float32(0.5), b=PLACES["above"], c=None, d=math.nan, e=PLACES["undefined"])
    words = "not measured here"
    assert glued == {"a": 0.5, "b": 0.8, "c": words, "d": words, "e": words}
    assert type(glued["a"]) is float


@pytest.mark.parametrize(
    ("verdict", "css"),
    [
        (SUPPORTED, "supported"),
        (CONTRADICTED, "contradicted"),
        (INCONCLUSIVE, "inconclusive"),
        (UNMEASURABLE, "unmeasured"),
    ],
)
def test_a_verdict_has_its_badge(verdict, css):
    assert claims.badge(verdict) == f'<span class="verdict-{css}">{verdict}</span>'
