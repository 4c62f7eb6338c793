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
# Kinds of verdicts, in the order in which the pages sort them (words: templates/counts.html).
KINDS = ("learned", "holds", "before", "seeds", "open", "against", "unmeasurable", "missing")
HOLDS = {"learned", "holds", "before"}
# Likewise, for the verdicts of two studies on one claim.
TOGETHER = ("before", "holds", "against", "differs", "open")


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
        return KINDS.index(self.kind)


def view(evidence: dict, chapter: str) -> View:
    """The verdict that follows from the evidence a chapter has for a claim."""
    claim = CLAIMS[evidence["claim"]]
    first, second = [*map(_estimate, evidence["replicates"]), None, None][:2]
    floor = next(map(_estimate, evidence["baselines"]), None)
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


def _estimate(numbers: list) -> Estimate:
    return Estimate(*(math.nan if number is None else number for number in numbers))


def _kind(verdict: str, why: str, floor: Estimate | None) -> str:
    if verdict == SUPPORTED and why != ALREADY_TRUE:
        return "learned" if floor and math.isfinite(floor.value) else "holds"
    if verdict == INCONCLUSIVE:
        return "seeds" if why == NOT_REPEATED else "open"
    return {SUPPORTED: "before", CONTRADICTED: "against"}.get(verdict, "unmeasurable")


def together(*views: View | None) -> str | None:
    """Which of :data:`TOGETHER` a claim is, by the studies that measured it, at least two."""
    kinds = [each.kind for each in views if each and each.kind != "unmeasurable"]
    if len(kinds) < 2:
        return None
    if set(kinds) <= HOLDS:
        return "before" if set(kinds) == {"before"} else "holds"
    if set(kinds) == {"against"}:
        return "against"
    return "differs" if set(kinds) <= HOLDS | {"against"} else "open"
