"""Claims: sentences of the paper that a record can support or contradict.

A claim is a sentence, a statistic and a threshold, written down before any network was measured.
Its evidence is the statistic, with its interval over images, for every seed replicate and for the
baselines, which are the same networks untrained. The verdict follows from the evidence.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np
import pandas as pd
from IPython.display import HTML

from lib.intervals import UNKNOWN, Estimate

SUPPORTED, CONTRADICTED, INCONCLUSIVE = "supported", "contradicted", "inconclusive"
UNMEASURABLE = "not measurable"
ALREADY_TRUE, NOT_REPEATED = "already true before training", "another seed does not repeat it"
CARRIED = "vit-see-claims"  # evidence in the metadata of an executed chapter's outputs
NOT_MEASURED = "not measured here"
MOST = 20  # replicates of an arm
COLUMNS = {"trained": (0, True), "other seed": (1, True), "untrained": (0, False)}


class NotMeasurable(Exception):
    """Why a statistic means nothing of the networks that play a claim's arms."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A falsifiable sentence, and what decides on it."""

    key: str  # begins with the experiment
    sentence: str
    source: str  # where the paper claims it
    # Of a record and a cast, the role that plays each arm. May raise NotMeasurable.
    statistic: Callable[[object, dict[str, str]], Estimate]
    meaning: str  # of the statistic
    threshold: float  # the claim holds where the statistic is above it (below it, if ``below``)
    arms: tuple[str, ...]  # the statistic speaks of; "vit+1" is the next replicate of "vit"
    below: bool = False
    ours: bool = False  # the paper does not make this claim

    @property
    def wording(self) -> str:
        """What is claimed, where, and what decides, as HTML."""
        side = f"{'&lt;' if self.below else '&gt;'} {self.threshold:g}"
        source = self.source if " et al." in self.source else f"the paper's {self.source}"
        source = f"our own, after {source}" if self.ours else source
        return f"{self.sentence} ({source})<br><small>Holds if: {self.meaning} {side}</small>"

    def holds(self, estimate: Estimate) -> str:
        """Verdict of one estimate alone, by where its interval lies."""
        if np.isnan(estimate.low) or np.isnan(estimate.high):
            return UNMEASURABLE
        if estimate.low > self.threshold:
            return CONTRADICTED if self.below else SUPPORTED
        if estimate.high < self.threshold:
            return SUPPORTED if self.below else CONTRADICTED
        return INCONCLUSIVE


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A claim and its evidence: estimates by replicate, of trained networks and of baselines.

    ``missing`` is the reason why there is none, or none that can decide.
    """

    claim: Claim
    replicates: tuple[Estimate, ...] = ()
    baselines: tuple[Estimate, ...] = ()
    missing: str = ""

    verdict = property(lambda self: self._decided[0])
    why = property(lambda self: self._decided[1], doc="What to make of the verdict.")
    trained = property(lambda self: (*self.replicates, UNKNOWN)[0], doc="Of the first replicate.")

    @property
    def _decided(self) -> tuple[str, str]:
        """Verdict and reason.

        A claim is supported if the interval of every replicate lies on the claimed side, and
        contradicted if every one lies on the other side. Anything else is inconclusive.
        """
        verdicts = [self.claim.holds(one) for one in self.replicates]
        if self.missing or not verdicts:
            return UNMEASURABLE, self.missing
        if verdicts[0] == UNMEASURABLE:
            undefined = not np.isfinite(self.trained.value)
            return UNMEASURABLE, (
                "the statistic is undefined" if undefined else "too few minibatches"
            )
        if verdicts[0] == INCONCLUSIVE:
            return INCONCLUSIVE, "the interval contains the threshold"
        if len(set(verdicts)) > 1:
            return INCONCLUSIVE, NOT_REPEATED
        before = [self.claim.holds(one) for one in self.baselines[:1]]
        return verdicts[0], ALREADY_TRUE if before == [SUPPORTED] == verdicts[:1] else ""

    def as_plain(self) -> dict:
        """The evidence for JSON, rounded as it is printed, so that it holds on every machine."""
        found = {"replicates": self.replicates, "baselines": self.baselines}
        parts = {name: [dataclasses.astuple(one) for one in ones] for name, ones in found.items()}
        plain = {
            name: [[None if np.isnan(x) else float(f"{x:.3f}") for x in one] for one in ones]
            for name, ones in parts.items()
        }
        return {"claim": self.claim.key, **plain, "why": self.missing}

    @classmethod
    def from_plain(cls, claim: Claim, plain: dict) -> "Judgement":
        """The judgement whose evidence :meth:`as_plain` wrote, of the claim as it is now."""
        replicates, baselines = (
            tuple(Estimate(*(np.nan if part is None else part for part in one)) for one in found)
            for found in (plain["replicates"], plain["baselines"])
        )
        return cls(claim, replicates, baselines, plain["why"])


def judge(claims: Sequence[Claim], record, study, roles: Collection[str]) -> list[Judgement]:
    """The evidence on some claims in ``record``, whatever their statistics take, of ``roles``.

    The study's roles play the arms. A replicate counts if all arms of a claim have it.
    """
    return [_judge(claim, record, study, roles) for claim in claims]


def _judge(claim, record, study, roles) -> Judgement:
    first = _cast(claim, study, roles, 0, True)
    if absent := [arm for arm, role in first.items() if not role]:
        name, _, further = absent[0].partition("+")
        which = "second network" if further and first.get(name) else "network"
        return Judgement(claim, missing=f"{NOT_MEASURED}: no {which} {name}")
    found = {True: [], False: []}
    try:
        for trained, estimates in found.items():
            for replicate in range(MOST):
                cast = _cast(claim, study, roles, replicate, trained)
                if all(cast.values()):
                    estimates.append(claim.statistic(record, cast))
    except NotMeasurable as why:
        return Judgement(claim, missing=str(why))
    return Judgement(claim, tuple(found[True]), tuple(found[False]))


def _cast(claim, study, roles, replicate, trained) -> dict[str, str]:
    """The roles that play a claim's arms; "" for those that were not measured."""
    played = {}
    for arm in claim.arms:
        name, _, further = arm.partition("+")
        every = {k: study.find(name, k, trained) for k in range(MOST)}
        known = {k: role.name for k, role in every.items() if role and role.name in roles}
        played[arm] = ""
        if replicate in known and not (further and len(known) == 1):
            place = list(known).index(replicate) + int(further or 0)
            played[arm] = list(known.values())[place % len(known)]
    return played


def networks(study, *arms: str) -> list[str]:
    """The roles that a record of some arms needs: their replicates and one baseline of each."""
    wanted = [(k, True) for k in range(MOST)] + [(0, False)]
    found = [study.find(arm, *which) for which in wanted for arm in arms]
    return study.those(*(role.name for role in found if role))


def casts(study, *arms: str, complete: bool = False) -> dict[str, dict[str, str]]:
    """What plays some arms in the columns of tables and figures; "" where the study has nothing.

    ``casts(study, "vit")["untrained"]["vit"]`` is ``"vit_untrained"``. If ``complete``, columns in
    which something is missing are left out.
    """
    found = {}
    for column, which in COLUMNS.items():
        roles = {arm: study.find(arm, *which) for arm in arms}
        found[column] = {
            arm: (study.those(role.name) or [""])[0] if role else "" for arm, role in roles.items()
        }
    return {name: cast for name, cast in found.items() if all(cast.values()) or not complete}


class Table(HTML):
    """A table of claims for people, which carries their evidence as JSON for the scoreboard."""

    def __init__(self, html: str, judgements: list[Judgement]):
        super().__init__(html)
        self.judgements = judgements

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        # As metadata, since the site's builder complains of output of a kind it cannot show.
        shown = {"text/html": self.data, "text/plain": "<IPython.core.display.HTML object>"}
        return shown, {CARRIED: [judgement.as_plain() for judgement in self.judgements]}


def table(judgements: list[Judgement]) -> Table:
    """The claims of a chapter with their numbers and verdicts; the text may paste each verdict."""
    from myst_nb import glue

    rows = []
    for one in judgements:
        verdict = badge(one.verdict, one.why)
        glue(one.claim.key, HTML(verdict), display=False)
        numbers = [
            one.trained,
            (*one.replicates, UNKNOWN, UNKNOWN)[1],
            (*one.baselines, UNKNOWN)[0],
        ]
        words = f"<b>{one.claim.key}</b> {one.claim.wording}"
        rows.append([words, *map(str, numbers), verdict])
    head = ["claim", "measured [95 %]", "other seed", "untrained", "verdict"]
    look = {"index": False, "escape": False, "classes": "claims", "border": 0}
    return Table(pd.DataFrame(rows, columns=head).to_html(**look), judgements)


def in_text(**numbers) -> None:
    """Let the text of a chapter paste numbers by name; unknown ones as words."""
    from myst_nb import glue

    for name, value in numbers.items():
        value = value.value if isinstance(value, Estimate) else value
        known = value is not None and np.isfinite(value)
        glue(name, float(value) if known else NOT_MEASURED, display=False)


def badge(verdict: str, why: str = "") -> str:
    """A verdict as a labelled span, styled by the book's style sheet, and what to make of it."""
    css = "unmeasured" if verdict == UNMEASURABLE else verdict
    return f'<span class="verdict-{css}">{verdict}</span>' + f" <small>{why}</small>" * bool(why)
