"""Claims: sentences of the paper that a record can support or contradict.

A claim is a statistic and a threshold, both written down before any network was measured. Its
verdict follows from the statistic's interval over images, and from two twins: networks that were
never trained, and networks trained from another seed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import xarray as xr
from IPython.display import HTML

from lib.cka import alignment, jackknife_margin
from lib.records import compared

SUPPORTED, CONTRADICTED, INCONCLUSIVE = "supported", "contradicted", "inconclusive"
UNMEASURABLE = "not measurable"
ALREADY_TRUE, NOT_REPEATED = "already true before training", "another seed does not repeat it"
CARRIED = "vit-see-claims"  # judgements in the metadata of an executed chapter's outputs
UNKNOWN = "not measured here"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A falsifiable sentence.

    key       : short name, beginning with the experiment it belongs to
    sentence  : what is claimed
    source    : where the paper claims it
    statistic : function of :class:`Maps` whose value decides, or None if a chapter works it out
    meaning   : what the statistic is, in words
    threshold : the claim holds where the statistic is above it (below it, if ``below``)
    roles     : the networks the statistic speaks of
    below     : the claim holds below its threshold
    other_seed: who plays the roles in the twin from another seed; by default each role's own
    """

    key: str
    sentence: str
    source: str
    statistic: Callable[["Maps"], float] | None
    meaning: str
    threshold: float
    roles: tuple[str, ...]
    below: bool = False
    other_seed: Mapping[str, str] | None = None

    @property
    def wording(self) -> str:
        """What is claimed, where, and what decides, as HTML."""
        side = f"{'&lt;' if self.below else '&gt;'} {self.threshold:g}"
        source = self.source if " et al." in self.source else f"the paper's {self.source}"
        return f"{self.sentence} ({source})<br><small>Holds if: {self.meaning} {side}</small>"

    def holds(self, estimate: "Estimate") -> str:
        """Verdict of one estimate alone, by where its interval lies."""
        if np.isnan(estimate.low) or np.isnan(estimate.high):
            return UNMEASURABLE
        if estimate.low > self.threshold:
            return CONTRADICTED if self.below else SUPPORTED
        if estimate.high < self.threshold:
            return SUPPORTED if self.below else CONTRADICTED
        return INCONCLUSIVE


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "–"
        if np.isnan(self.low):
            return f"{self.value:.3f} (no interval)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a record says about a claim. Twins are None where the record has no such networks."""

    claim: Claim
    trained: Estimate
    other_seed: Estimate | None
    untrained: Estimate | None
    verdict: str
    why: str


class Maps:
    """CKA maps by pair of roles: ``maps["vit", "resnet"]`` is (blocks, blocks), input to output.

    ``maps.all("vit", "vit")`` has all taps instead of the outputs of blocks, and
    ``maps.layers("vit")`` says which those are.
    """

    def __init__(self, squares: dict, layers: dict, cast: dict[str, str]):
        self._squares, self._layers, self._cast = squares, layers, cast

    def __getitem__(self, pair: tuple[str, str]) -> np.ndarray:
        return self._squares[(*map(self._cast.get, pair), True)]

    def all(self, rows: str, columns: str) -> np.ndarray:
        return self._squares[self._cast[rows], self._cast[columns], False]

    def layers(self, role: str, blocks: bool = True) -> list[str]:
        return self._layers[self._cast[role], blocks]


def decide(
    claim: Claim, trained: Estimate, other_seed: Estimate | None, untrained: Estimate | None
) -> Judgement:
    """Verdict on a claim from its statistic for the trained networks and their twins.

    A claim is supported if its interval lies on the claimed side for the networks and for their
    twins from another seed, and contradicted if both lie on the other side. Anything else is
    inconclusive. ``why`` says what to make of it, above all if untrained networks do the same.
    """
    verdict, why = claim.holds(trained), ""
    if verdict == UNMEASURABLE:
        undefined = not np.isfinite(trained.value)
        why = "the statistic is undefined" if undefined else "too few minibatches for an interval"
    elif verdict == INCONCLUSIVE:
        why = "the interval contains the threshold"
    elif other_seed and claim.holds(other_seed) != verdict:
        verdict, why = INCONCLUSIVE, NOT_REPEATED
    elif verdict == SUPPORTED and untrained and claim.holds(untrained) == SUPPORTED:
        why = ALREADY_TRUE
    return Judgement(claim, trained, other_seed, untrained, verdict, why)


def unmeasurable(claim: Claim, why: str) -> Judgement:
    """What is said of a claim that cannot be judged here, and why, in a few words."""
    unknown = Estimate(np.nan, np.nan, np.nan)
    return Judgement(claim, unknown, None, None, UNMEASURABLE, why)


def lacking(claim: Claim, known) -> str:
    """Why a claim cannot be judged from the roles that were measured; empty if it can."""
    missing = [role for role in claim.roles if role not in known]
    return f"{UNKNOWN}: no network {missing[0]}" if missing else ""


def judge_by(claim: Claim, known, of: Callable[[str], "Estimate"]) -> Judgement:
    """Verdict on a claim whose estimates a chapter works out.

    Parameters
    ----------
    claim : Claim
    known : collection of str
        The roles that were measured. A twin counts if all the claim's roles have it.
    of : function of "", "_other_seed" and "_untrained"
        The estimate for the networks themselves or for their twins, asked only for what is there.
    """
    if why := lacking(claim, known):
        return unmeasurable(claim, why)
    twins = (
        of(twin) if all(role + twin in known for role in claim.roles) else None
        for twin in ("_other_seed", "_untrained")
    )
    return decide(claim, of(""), *twins)


def number(value: float | None) -> float | str:
    """A number for the text, or the words that stand in its place where there is none."""
    return float(value) if value is not None and np.isfinite(value) else UNKNOWN


def judge(claim: Claim, record: xr.Dataset) -> Judgement:
    """Verdict on a claim about CKA maps, from a record of its networks and their twins."""
    known = set(record["role"].values.tolist())
    if why := lacking(claim, known):
        return unmeasurable(claim, why)

    def known_twins(suffix):
        return {role: role + suffix for role in claim.roles if role + suffix in known}

    # One network from another seed makes another pair; one untrained network no untrained pair.
    other_seed = known_twins("_other_seed") if claim.other_seed is None else claim.other_seed
    if not set(other_seed.values()) <= known:
        other_seed = {}
    untrained = known_twins("_untrained")
    return decide(
        claim,
        estimate(claim, record),
        estimate(claim, record, other_seed) if other_seed else None,
        estimate(claim, record, untrained) if len(untrained) == len(claim.roles) else None,
    )


def estimate(claim: Claim, record: xr.Dataset, cast: dict[str, str] | None = None) -> Estimate:
    """A claim's statistic and its jackknife interval over groups of minibatches.

    ``cast`` lets other roles play the claim's, for instance ``{"vit": "vit_untrained"}``.
    """
    cast = {role: role for role in claim.roles} | (cast or {})
    actors = list(dict.fromkeys(cast.values()))
    taps = record["tap"][compared(record) & np.isin(record["role"], actors)].values
    record = record.sel(tap=taps, other=taps)
    layers, places = {}, {}
    role, block = record["role"].values, record["block"].values
    for actor in actors:
        for blocks in (True, False):
            places[actor, blocks] = np.flatnonzero((role == actor) & (block | (not blocks)))
            layers[actor, blocks] = record["layer"].values[places[actor, blocks]].tolist()

    def statistic(hsic):
        full = alignment(hsic)
        squares = {
            (rows, columns, blocks): full[np.ix_(places[rows, blocks], places[columns, blocks])]
            for rows in actors
            for columns in actors
            for blocks in (True, False)
        }
        return float(claim.statistic(Maps(squares, layers, cast)))

    groups = record["hsic"].values.astype(np.float64)
    value = statistic(groups.sum(0))
    margin = float(jackknife_margin(groups, statistic))
    return Estimate(value, value - margin, value + margin)


class Table(HTML):
    """A table of claims for people, which carries the same as JSON for the scoreboard."""

    def __init__(self, html: str, judgements: list[Judgement]):
        super().__init__(html)
        self.judgements = judgements

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        # As metadata, since the site's builder complains of output of a kind it cannot show.
        shown = {"text/html": self.data, "text/plain": "<IPython.core.display.HTML object>"}
        return shown, {CARRIED: [_plain(judgement) for judgement in self.judgements]}


def _plain(judgement: Judgement) -> dict:
    """A judgement for JSON; numbers as they are printed, so that they hold on every machine."""

    def rounded(value):
        return None if np.isnan(value) else float(f"{value:.3f}")

    return {"claim": judgement.claim.key, "verdict": judgement.verdict, "why": judgement.why} | {
        name: found and {part: rounded(value) for part, value in dataclasses.asdict(found).items()}
        for name in ("trained", "other_seed", "untrained")
        for found in [getattr(judgement, name)]
    }


def from_plain(plain: dict) -> Judgement:
    """The judgement that a table carried into an executed chapter."""

    def estimate_of(found):
        known = {part: np.nan if value is None else value for part, value in found.items()}
        return Estimate(**known)

    return Judgement(
        CLAIMS[plain["claim"]],
        verdict=plain["verdict"],
        why=plain["why"],
        **{
            name: plain[name] and estimate_of(plain[name])
            for name in ("trained", "other_seed", "untrained")
        },
    )


def table(judgements: list[Judgement]) -> Table:
    """The claims of a chapter with their numbers and verdicts, as HTML."""
    rows = [
        {
            "claim": f"<b>{j.claim.key}</b> {j.claim.wording}",
            "measured [95 %]": str(j.trained),
            "other seed": str(j.other_seed or "–"),
            "untrained": str(j.untrained or "–"),
            "verdict": badge(j.verdict, j.why),
        }
        for j in judgements
    ]
    html = pd.DataFrame(rows).to_html(index=False, escape=False, classes="claims", border=0)
    return Table(html, judgements)


def badge(verdict: str, why: str = "") -> str:
    """A verdict as a labelled span, styled by the book's style sheet, and what to make of it."""
    css = "unmeasured" if verdict == UNMEASURABLE else verdict
    return f'<span class="verdict-{css}">{verdict}</span>' + (
        f" <small>{why}</small>" if why else ""
    )


# Statistics ---------------------------------------------------------------------------------------


def low_high(square: np.ndarray) -> float:
    """Mean CKA between the lowest and the highest third of a network's layers."""
    third = max(1, round(len(square) / 3))
    return float(np.nanmean(square[:third, -third:]))


def two_block_contrast(square: np.ndarray) -> float:
    """Mean CKA within two parts of the layers minus across them, at the cut where it is largest."""
    n = len(square)
    return max(_contrast(square, np.arange(n) >= cut) for cut in range(1, n))


def stage_contrast(square: np.ndarray, layers: list[str]) -> float:
    """Contrast of a network's own stages minus the mean contrast of all other divisions.

    Layers that are close are similar anyway, so any division of the layers into runs has some
    contrast; what counts is whether the stages have more of it than as many runs cut elsewhere.
    """
    n, stages = len(square), [layer.rpartition(".")[0] for layer in layers]
    own = np.cumsum([0] + [a != b for a, b in itertools.pairwise(stages)])
    divisions = (
        np.searchsorted(cuts, np.arange(n), side="right")
        for cuts in itertools.combinations(range(1, n), int(own[-1]))
    )
    others = [_contrast(square, labels) for labels in divisions if (labels != own).any()]
    return _contrast(square, own) - float(np.mean(others))


def diagonal_contrast(square: np.ndarray) -> float:
    """Mean CKA of layers at equal relative depth minus that of all other pairs."""
    rows, columns = square.shape
    depth = np.round(np.linspace(0, columns - 1, rows)).astype(int)
    equal = np.zeros(square.shape, dtype=bool)
    equal[np.arange(rows), depth] = True
    return float(np.nanmean(square[equal]) - np.nanmean(square[~equal]))


def kind_contrast(square: np.ndarray, layers: list[str]) -> float:
    """How much of a grid a map of all taps shows.

    Mean CKA between taps on the residual stream minus that between such a tap and one inside a
    branch, over pairs of different blocks that are equally far apart on average.
    """
    parts = [layer.split(".") for layer in layers]
    inside = [part[0] == "blocks" and part[1].isdigit() for part in parts]
    block = np.array([int(part[1]) if ok else -1 for part, ok in zip(parts, inside, strict=True)])
    stream = np.array([len(part) == 2 or part[-1] == "norm2:input" for part in parts])
    apart = (block[:, None] != block[None]) & (block[:, None] >= 0) & (block[None] >= 0)
    alike = apart & stream[:, None] & stream[None]
    unlike = apart & (stream[:, None] != stream[None])
    return float(np.nanmean(square[alike]) - np.nanmean(square[unlike]))


def across(square: np.ndarray, cut: int) -> float:
    """Mean CKA between the layers before a cut and those from it on; ``cut`` counts from 0."""
    return float(np.mean(square[:cut, cut:]))


def _contrast(square: np.ndarray, labels: np.ndarray) -> float:
    same = labels[:, None] == labels[None]
    off_diagonal = ~np.eye(len(square), dtype=bool)
    return float(np.nanmean(square[same & off_diagonal]) - np.nanmean(square[~same]))


# The claims ---------------------------------------------------------------------------------------


def _uniformity_gap(maps: Maps) -> float:
    return low_high(maps["vit", "vit"]) - low_high(maps["resnet", "resnet"])


def _midpoint_fit(maps: Maps) -> float:
    """Best fit of the ResNet's middle unit to ViT blocks below depth 0.45, minus to those above."""
    cross = maps["vit", "resnet"]
    depth = np.linspace(0, 1, len(cross))
    fit = cross[:, cross.shape[1] // 2]
    return float(fit[depth < 0.45].max() - fit[depth >= 0.45].max())


def _last_third_deficit(maps: Maps) -> float:
    """Best fit of the middle third of ViT blocks to any ResNet unit, minus that of the last."""
    best = maps["vit", "resnet"].max(1)
    third = max(1, round(len(best) / 3))
    return float(best[third:-third].mean() - best[-third:].mean())


def _mixer_kinship(maps: Maps) -> float:
    return float(maps["mixer", "vit"].mean() - maps["mixer", "resnet"].mean())


def _deficit(maps: Maps, fewer: str) -> np.ndarray:
    """What less data costs each block in CKA with a full-data network, against the ceiling.

    The reference is a network from another seed, for which the full-data twin is the ceiling: both
    pairs differ in their initial weights.
    """
    reference = "vit_other_seed"
    return np.diagonal(maps["vit", reference]) - np.diagonal(maps[fewer, reference])


def _early_deficit(maps: Maps, fewer: str) -> float:
    """Mean deficit of the first third of the blocks."""
    deficit = _deficit(maps, fewer)
    return float(deficit[: max(1, round(len(deficit) / 3))].mean())


def _late_deficit(maps: Maps, fewer: str) -> float:
    """Mean deficit of the last third of the blocks minus that of the first third."""
    deficit = _deficit(maps, fewer)
    third = max(1, round(len(deficit) / 3))
    return float(deficit[-third:].mean()) - _early_deficit(maps, fewer)


def _drift(maps: Maps, tuned: str) -> np.ndarray:
    """How far each block has moved from where it was before the further training: 1 - CKA."""
    return 1 - np.diagonal(maps[tuned.partition("_tuned")[0], tuned])


def _early_drift(maps: Maps) -> float:
    drift = _drift(maps, "vit_tuned_colour")
    return float(drift[: max(1, round(len(drift) / 3))].max())


def _distant_drift(maps: Maps) -> float:
    """Drift of the last third for the distant task minus that for the related one."""
    distant, related = (_drift(maps, f"vit_tuned_{task}") for task in ("colour", "fine_textures"))
    third = max(1, round(len(distant) / 3))
    return float((distant - related)[-third:].mean())


def _partition(maps: Maps) -> float:
    intact, cut = maps["vit", "vit"], maps["vit_no_skip_middle", "vit_no_skip_middle"]
    return across(intact, MIDDLE) - across(cut, MIDDLE)


MIDDLE = 4  # the block without skips of the role vit_no_skip_middle


CLAIMS = {
    claim.key: claim
    for claim in (
        Claim(
            "E01-uniform",
            "Lower and higher layers are more alike in a ViT than in a ResNet.",
            "Fig. 1",
            _uniformity_gap,
            "mean CKA of the lowest with the highest third of blocks, ViT minus ResNet,",
            0.0,
            ("vit", "resnet"),
        ),
        Claim(
            "E01-stages",
            "A ResNet's map falls into squares at its stages.",
            "Fig. 1",
            lambda maps: stage_contrast(maps["resnet", "resnet"], maps.layers("resnet")),
            "CKA within minus across stages, beyond that of other cuts,",
            0.0,
            ("resnet",),
        ),
        Claim(
            "E01-grid",
            "A ViT's map of all layers shows a grid.",
            "Fig. 1",
            lambda maps: kind_contrast(maps.all("vit", "vit"), maps.layers("vit", blocks=False)),
            "CKA between taps of the residual stream minus that of stream with branch",
            0.0,
            ("vit",),
        ),
        Claim(
            "E02-midpoint",
            "The middle unit of a ResNet fits the lower blocks of a ViT best.",
            "Fig. 2",
            _midpoint_fit,
            "best CKA of the ResNet's middle unit with ViT blocks below depth 0.45, minus above,",
            0.0,
            ("vit", "resnet"),
        ),
        Claim(
            "E02-last-third",
            "The last third of a ViT resembles a ResNet's layers less than its middle third does.",
            "Fig. 2",
            _last_third_deficit,
            "best CKA with any ResNet unit, middle third of ViT blocks minus last third,",
            0.0,
            ("vit", "resnet"),
        ),
        Claim(
            "E03-local",
            "Some heads of the lowest blocks look at what is near.",
            "Fig. 3",
            None,
            "least distance of a head of the two lowest blocks, relative to uniform attention,",
            0.5,
            ("vit",),
            below=True,
        ),
        Claim(
            "E03-spread",
            "Training moves heads of the first block away from the uniform distance.",
            "Fig. 3",
            None,
            "largest deviation of a head of the first block, relative to uniform attention,",
            0.05,
            ("vit",),
        ),
        Claim(
            "E03-global",
            "The heads of the last blocks all look far.",
            "Fig. 3",
            None,
            "least distance of a head of the two last blocks, relative to uniform attention,",
            0.8,
            ("vit",),
        ),
        Claim(
            "E04-data",
            "Trained on less data, a ViT looks less at what is near.",
            "Fig. 4",
            None,
            "least relative distance in the two lowest blocks, with 3 % of the images minus all,",
            0.0,
            ("vit_data_03", "vit"),
        ),
        Claim(
            "E05-slope",
            "The nearer a first-block head looks, the more it resembles a ResNet's first units.",
            "Fig. 5",
            None,
            "rank correlation of distance with CKA, neighbouring pairs of heads, largest of five "
            "units,",
            -0.5,
            ("vit", "resnet"),
            below=True,
        ),
        Claim(
            "E06-wide",
            "In the lower half a ViT sees more widely than a ResNet of equal relative depth.",
            "Fig. 6",
            None,
            "least excess of the ViT's radius of 90 % of the field over the ResNet's, in pixels,",
            0.0,
            ("vit", "resnet"),
        ),
        Claim(
            "E06-centre",
            "At every depth a ViT's token answers most to its own patch.",
            "Fig. 6",
            None,
            "share of the field in the own patch minus the strongest other, least over blocks,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E07-attention",
            "Without the skip, later attention layers no longer answer most to their own patch.",
            "appendix C",
            None,
            "own patch minus strongest other, mean over attention branches of the upper half,",
            0.0,
            ("vit",),
            below=True,
        ),
        Claim(
            "E07-mlp",
            "Without the skip, later MLPs still answer most to their own patch.",
            "appendix C",
            None,
            "own patch minus strongest other, mean over MLP branches of the upper half,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E08-crossing",
            "Early, the class token is carried by the skips more than the patches are; late, less.",
            "Fig. 7",
            None,
            "class token's over patches' norm ratio, in doublings: the smaller of how far above in "
            "the first half of the blocks and how far below in the second,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E08-above-resnet",
            "The skips of a ViT carry more, relative to the branches, than those of a ResNet.",
            "Fig. 7",
            None,
            "norm ratio of patches over that of the ResNet's locations at equal depth, in "
            "doublings, median over depths,",
            0.0,
            ("vit", "resnet"),
        ),
        Claim(
            "E09-class-late",
            "The class token is changed late.",
            "Fig. E.1",
            None,
            "class token's norm ratio in the first over that in the second half, in doublings,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E09-class-mlp",
            "What changes the class token late is mostly the MLP.",
            "Fig. E.1",
            None,
            "class token's norm ratio at attentions over that at MLPs of the second half, in "
            "doublings,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E10-patches-rise",
            "The direction of patch tokens is changed less and less with depth.",
            "Fig. E.2",
            None,
            "cosine of skip and output for patches, second half of the blocks minus first,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E10-patches-end",
            "In the end it is hardly changed at all.",
            "Fig. E.2",
            None,
            "cosine of skip and output for patches in the last block",
            0.9,
            ("vit",),
        ),
        Claim(
            "E10-class-falls",
            "The direction of the class token is changed more and more with depth.",
            "Fig. E.2",
            None,
            "cosine of skip and output for the class token, first half of the blocks minus second,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E11-partition",
            "Without the skips of a middle block, the layers before and after it are unlike.",
            "Fig. 8",
            _partition,
            "mean CKA of blocks before the cut with those after, intact minus cut,",
            0.1,
            ("vit", "vit_no_skip_middle"),
        ),
        Claim(
            "E11-accuracy",
            "Without the skips of a middle block, a ViT is less accurate.",
            "Fig. 8",
            None,
            "accuracy, intact minus cut,",
            0.0,
            ("vit", "vit_no_skip_middle"),
        ),
        Claim(
            "E12-own-patch",
            "Most interior tokens of a ViT's last block are more like their own patch than like "
            "any other.",
            "Fig. 9",
            None,
            "share of interior tokens whose map peaks at their own patch, ViT, last block,",
            0.5,
            ("vit",),
        ),
        Claim(
            "E12-edges",
            "Tokens at the edge of the image are like other patches at the edge as well.",
            "Fig. 9",
            None,
            "CKA of edge tokens with edge patches minus interior ones as far, ViT, last block,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E12-sharper",
            "The last block of a ViT localises better than the last unit of a ResNet.",
            "Fig. 9",
            None,
            "share of all tokens whose map peaks at their own patch, ViT minus ResNet,",
            0.0,
            ("vit", "resnet"),
        ),
        Claim(
            "E13-pooling",
            "A ViT that is read from the mean of its tokens localises less than one that is read "
            "from a class token.",
            "Fig. 10",
            None,
            "CKA with the own patch minus with others, last block, class token minus mean-pooled,",
            0.0,
            ("vit", "vit_gap"),
        ),
        Claim(
            "X9-last-block",
            "The last block of a ViT gives up more of what is where than any block before it.",
            "Ghiasi et al., 2022",
            None,
            "loss of CKA with the own patch over others, last block minus the most of another,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E14-gap",
            "A single token says more about the class in a mean-pooled ViT than in one with a "
            "class token.",
            "Fig. 11",
            None,
            "mean accuracy of single patch tokens, last block, mean-pooled minus class token,",
            0.05,
            ("vit_gap", "vit"),
        ),
        Claim(
            "E14-resnet",
            "A single location of a ResNet says more about the class than a token of a ViT with a "
            "class token.",
            "Fig. 11",
            None,
            "mean accuracy of single locations, last unit, minus single patch tokens, last block,",
            0.05,
            ("resnet", "vit"),
        ),
        Claim(
            "E15-tie",
            "Read as they were trained to be read, the two ViTs are equally good.",
            "Fig. 11",
            None,
            "difference in accuracy, class token against mean of the mean-pooled ViT, last block,",
            0.05,
            ("vit", "vit_gap"),
            below=True,
        ),
        Claim(
            "E15-plateau",
            "The mean of the patch tokens of a ViT with a class token ends below that token.",
            "Fig. 11",
            None,
            "accuracy of class token minus mean of patch tokens, last block,",
            0.0,
            ("vit",),
        ),
        Claim(
            "E15-first",
            "In a mean-pooled ViT, one token ends nearly as good as the mean of all.",
            "Fig. 11",
            None,
            "accuracy of the mean minus that of the first token, mean-pooled ViT, last block,",
            0.05,
            ("vit_gap",),
            below=True,
        ),
        *(
            Claim(
                f"E16-{where}{key}",
                sentence,
                "Fig. 12",
                functools.partial(loss, fewer=fewer),
                f"loss of CKA with a full-data ViT, trained on {share}, {blocks},",
                threshold,
                (fewer, "vit", "vit_other_seed"),
                below=where == "early",
                other_seed={"vit": "vit_other_seed", "vit_other_seed": "vit"},
            )
            for fewer, share, key, less, little in (
                ("vit_data_10", "10 %", "", "less", "little"),
                ("vit_data_03", "3 %", "-03", "very little", "very little"),
            )
            for where, sentence, loss, blocks, threshold in (
                (
                    "late",
                    f"What {less} data costs a ViT, it costs in the later blocks.",
                    _late_deficit,
                    "last third of blocks minus first",
                    0.0,
                ),
                (
                    "early",
                    f"The early blocks of a ViT need {little} data.",
                    _early_deficit,
                    "first third of blocks",
                    0.1,
                ),
            )
        ),
        Claim(
            "E17-middle",
            "More data makes the middle of a ViT more useful.",
            "Fig. 13",
            None,
            "probe accuracy of the middle third of blocks, all data minus 10 %,",
            0.0,
            ("vit", "vit_data_10"),
        ),
        Claim(
            "E17-middle-03",
            "More data than very little makes the middle of a ViT more useful.",
            "Fig. 13",
            None,
            "probe accuracy of the middle third of blocks, all data minus 3 %,",
            0.0,
            ("vit", "vit_data_03"),
        ),
        Claim(
            "E18-middle",
            "In the middle a ViT knows more than a ResNet at the same depth.",
            "Fig. 13",
            None,
            "probe accuracy of the middle third of blocks or units, ViT minus ResNet,",
            0.0,
            ("vit", "resnet"),
        ),
        Claim(
            "E19-early",
            "Trained further on another task, the early blocks of a ViT stay as they are.",
            "appendix G",
            _early_drift,
            "largest 1 - CKA of the first third of blocks with themselves before, colour task,",
            0.05,
            ("vit", "vit_tuned_colour"),
            below=True,
            other_seed={
                "vit": "vit_other_seed",
                "vit_tuned_colour": "vit_other_seed_tuned_colour",
            },
        ),
        Claim(
            "E19-distant",
            "The late blocks move more the more distant the task.",
            "appendix G",
            _distant_drift,
            "1 - CKA of the last third of blocks with themselves before, colour minus textures,",
            0.0,
            ("vit", "vit_tuned_colour", "vit_tuned_fine_textures"),
            other_seed={
                "vit": "vit_other_seed",
                "vit_tuned_colour": "vit_other_seed_tuned_colour",
                "vit_tuned_fine_textures": "vit_other_seed_tuned_fine_textures",
            },
        ),
        Claim(
            "E21-diagonal",
            "Two ViTs agree best at equal relative depth.",
            "appendix G",
            lambda maps: diagonal_contrast(maps["vit", "vit_gap"]),
            "CKA at equal depth minus elsewhere, ViT against mean-pooled ViT,",
            0.0,
            ("vit", "vit_gap"),
        ),
        Claim(
            "E22-blocks",
            "An MLP-Mixer falls into two parts, early and late, more than a ViT does.",
            "appendix H",
            lambda maps: (
                two_block_contrast(maps["mixer", "mixer"]) - two_block_contrast(maps["vit", "vit"])
            ),
            "CKA within minus across two parts at the best cut, Mixer minus ViT,",
            0.0,
            ("mixer", "vit"),
        ),
        Claim(
            "E22-kinship",
            "An MLP-Mixer is closer to a ViT than to a ResNet.",
            "appendix H",
            _mixer_kinship,
            "mean CKA of Mixer with ViT minus Mixer with ResNet",
            0.0,
            ("mixer", "vit", "resnet"),
        ),
        Claim(
            "E23-batch-size",
            "The size of the minibatch does not matter to CKA.",
            "appendix A",
            None,
            "largest change of any cell between minibatches of 128 and all images at once",
            0.02,
            ("vit", "resnet"),
            below=True,
        ),
    )
}
