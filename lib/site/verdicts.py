"""Evidence and claims, as the pages show them: the only module of the site that judges.

Verdicts are made of the evidence that is kept and of the claim as it is written now, so that a
changed sentence or threshold never stands beside an old verdict.
"""

import dataclasses
import math

from lib.findings import CLAIMS
from lib.findings.claims import (
    ALREADY_TRUE,
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_REPEATED,
    SUPPORTED,
    Claim,
    Judgement,
    badge,
)
from lib.intervals import Estimate

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
    judgement = Judgement.from_plain(CLAIMS[evidence["claim"]], evidence)
    first, second = [*judgement.replicates, None, None][:2]
    floor = next(iter(judgement.baselines), None)
    return View(
        judgement.claim,
        badge(judgement.verdict, judgement.why),
        tuple(str(estimate or "–") for estimate in (first, second, floor)),
        _kind(judgement.verdict, judgement.why, floor),
        chapter,
    )


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
