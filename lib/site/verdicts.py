"""Evidence and claims, as the pages show them: the only module of the site that judges.

Verdicts are made of the evidence that is kept and of the claim as it is written now, so that a
changed sentence or threshold never stands beside an old verdict.
"""

import dataclasses
import math

from lib.findings.claims import (
    ALREADY_TRUE,
    CLAIMS,
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_REPEATED,
    SUPPORTED,
    Claim,
    Estimate,
    badge,
    decide,
    unmeasurable,
)

COLUMNS = ("measured [95 %]", "other seed", "untrained")
# Kinds of verdicts in the order in which the pages sort them: how many claims (one, several), and
# what is said of them.
KINDS = {
    "learned": ("claim holds", "claims hold", "and cannot be seen in untrained networks"),
    "holds": ("holds", "hold", "in comparisons that have no untrained counterpart"),
    "before": ("holds", "hold", "but already in untrained networks, so nothing has to be learned"),
    "seeds": ("does", "do", "not repeat from one seed to the other"),
    "open": ("remains", "remain", "undecided"),
    "against": ("comes", "come", "out against the sentence, in every seed there is"),
    "unmeasurable": ("could", "could", "not be measured"),
    "missing": ("has", "have", "not been measured"),
}
HOLDS = {"learned", "holds", "before"}
# Likewise, for the verdicts of several studies on one claim.
TOGETHER = {
    "before": ("holds", "hold", "in both already before training"),
    "holds": ("holds", "hold", "in both, and in one at least not before training"),
    "against": ("comes", "come", "out against the sentence in both"),
    "differs": ("holds", "hold", "in one and not in the other, which is against the sentence"),
    "open": ("is", "are", "not decided in one of them at least"),
}


@dataclasses.dataclass(frozen=True)
class View:
    """A claim and the verdict on it; ``numbers`` as text, for :data:`COLUMNS`."""

    claim: Claim
    badge: str
    numbers: tuple[str, ...]
    kind: str
    chapter: str

    @property
    def rank(self) -> int:
        return list(KINDS).index(self.kind)


def view(evidence: dict, chapter: str) -> View:
    """The verdict that follows from the evidence a chapter has for a claim."""
    claim = CLAIMS[evidence["claim"]]
    first, second, floor = (
        Estimate(*(math.nan if part is None else part for part in numbers)) if numbers else None
        for numbers in [*(evidence["replicates"] + [None, None])[:2], *evidence["baselines"], None][
            :3
        ]
    )
    judgement = decide(claim, first, second, floor) if first else unmeasurable(claim, "")
    verdict, why = judgement.verdict, judgement.why
    if evidence["why"]:
        verdict, why = unmeasurable(claim, evidence["why"]).verdict, evidence["why"]
    return View(
        claim,
        badge(verdict, why),
        tuple(str(estimate or "–") for estimate in (first, second, floor)),
        _kind(verdict, why, floor),
        chapter,
    )


def _kind(verdict: str, why: str, floor: Estimate | None) -> str:
    if verdict == SUPPORTED and why != ALREADY_TRUE:
        return "learned" if floor and math.isfinite(floor.value) else "holds"
    if verdict == INCONCLUSIVE:
        return "seeds" if why == NOT_REPEATED else "open"
    return {SUPPORTED: "before", CONTRADICTED: "against"}.get(verdict, "unmeasurable")


def together(*views: View | None) -> str | None:
    """Which of :data:`TOGETHER` a claim is, by those that measured it; None if fewer than two did."""
    kinds = [each.kind for each in views if each and each.kind != "unmeasurable"]
    if len(kinds) < 2:
        return None
    if set(kinds) <= HOLDS:
        return "before" if set(kinds) == {"before"} else "holds"
    if set(kinds) == {"against"}:
        return "against"
    return "differs" if set(kinds) <= HOLDS | {"against"} else "open"
