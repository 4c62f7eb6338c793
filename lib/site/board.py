"""The scoreboard: every claim of the book in one table, as the executed chapters judged it.

Nothing is measured or judged here. Tables of claims carry their judgements as JSON into the
outputs of an executed chapter; they are collected from there, and what no chapter has judged is
shown as not measured.
"""

import dataclasses
import html
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from lib.findings.claims import (
    ALREADY_TRUE,
    CARRIED,
    CLAIMS,
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_REPEATED,
    SUPPORTED,
    Claim,
    Estimate,
    Judgement,
    badge,
    from_plain,
)
from lib.site.run import BOOK_CHAPTERS, RECORDS, ROOT

PAGE = ROOT / "book" / "_generated" / "scoreboard.md"
# Measured or not.
STUDIES = (
    "lab",
    "lab-third-seed",
    "lab-long",
    "lab-faint",
    "lab-masked",
    "tiny-imagenet-small",
    "tiny-imagenet",
    "imagenet",
)
MISSING = "not measured here"
PARTS = {  # of a judgement, as columns
    "verdict": "verdict",
    "trained": "measured<br>[95 %]",
    "untrained": "untrained<br>(floor)",
    "other_seed": "other seed<br>(ceiling)",
}

# What a judgement amounts to, in the order in which the page tells and sorts it: how many claims,
# one or several, and what is said of them.
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
# Likewise, of what two studies say of one claim.
TOGETHER = {
    "before": (
        "holds",
        "hold",
        "in both already before training: nothing that images have taught",
    ),
    "holds": ("holds", "hold", "in both, and in one at least not before training"),
    "against": ("comes", "come", "out against the sentence in both"),
    "differs": (
        "holds in one and comes",
        "hold in one and come",
        "out against the sentence in the other",
    ),
    "open": ("is", "are", "not decided in one of them at least"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """A judgement and where in the book it was made."""

    judgement: Judgement
    chapter: str
    title: str
    section: str

    @property
    def link(self) -> str:
        return f"chapters/{self.chapter}.html#{self.section}"


def collect(folder: Path) -> dict[str, Finding]:
    """The judgements in the executed chapters of a folder, by the claim's key.

    Raises
    ------
    ValueError
        If two tables judge one claim, or a chapter judges a claim that does not exist.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.ipynb")):
        title, section = path.stem, ""
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                for heading in re.findall(r"^#+ +(.+)$", "".join(cell["source"]), re.MULTILINE):
                    title = title if section else heading
                    section = _id(heading)
            for output in cell.get("outputs", []):
                for plain in output.get("metadata", {}).get(CARRIED, []):
                    key = plain["claim"]
                    if key not in CLAIMS:
                        raise ValueError(
                            f"chapter {path.stem} judges {key!r}, which is not in CLAIMS of "
                            "lib/findings/claims.py; run the chapter again"
                        )
                    if key in found:
                        raise ValueError(
                            f"chapters {found[key].chapter} and {path.stem} both judge {key!r}; "
                            "one of them has to leave it out"
                        )
                    found[key] = Finding(from_plain(plain), path.stem, title, section)
    return found


def kind(judgement: Judgement | None) -> str:
    """Which of :data:`KINDS` a judgement is."""
    if judgement is None:
        return "missing"
    if judgement.verdict == SUPPORTED:
        if judgement.why == ALREADY_TRUE:
            return "before"
        return "learned" if _is_known(judgement.untrained) else "holds"
    if judgement.verdict == INCONCLUSIVE:
        return "seeds" if judgement.why == NOT_REPEATED else "open"
    return "against" if judgement.verdict == CONTRADICTED else "unmeasurable"


def page(studies: Mapping[str, Mapping[str, Finding]]) -> str:
    """What the scoreboard page includes: a summary per study that was measured, and the table.

    Parameters
    ----------
    studies : mapping
        For every study what :func:`collect` found, nothing if it was never measured. The others
        are compared with the first.
    """
    measured = {study: found for study, found in studies.items() if found}
    parts = [_summary(study, found) for study, found in measured.items()]
    parts += comparisons(studies).values()
    return "\n\n".join([*parts, _table(studies)]) + "\n"


def _summary(study, found) -> str:
    by_kind = {name: [] for name in KINDS}
    for key in CLAIMS:
        by_kind[kind(found[key].judgement if key in found else None)].append(key)
    reasons = {key: found[key].judgement.why for key in by_kind["unmeasurable"]}
    return _counts(
        f"What the study `{study}` says of the {len(CLAIMS)} claims:", KINDS, by_kind, reasons
    )


def together(*judgements: Judgement | None) -> str | None:
    """Which of :data:`TOGETHER` a claim is, by the studies that measured it; None by one alone."""
    kinds = [kind(each) for each in judgements]
    kinds = [each for each in kinds if each not in ("unmeasurable", "missing")]
    if len(kinds) < 2:
        return None
    kinds = set(kinds)
    if kinds <= HOLDS:
        return "before" if kinds == {"before"} else "holds"
    if kinds == {"against"}:
        return "against"
    return "differs" if kinds <= HOLDS | {"against"} else "open"


def comparisons(studies, home: str = "") -> dict[str, str]:
    """By study what comes of its claims beside those of the first; links go to the page ``home``.

    Studies that were never measured are left out.
    """
    first, *others = [study for study, found in studies.items() if found] or [None]
    compared = {}
    for other in others:
        by_kind = {name: [] for name in TOGETHER}
        for key in CLAIMS:
            found = (studies[study].get(key) for study in (first, other))
            if verdict := together(*(each and each.judgement for each in found)):
                by_kind[verdict].append(key)
        count = sum(map(len, by_kind.values()))
        begin = f"Of the {count} claims that both `{first}` and `{other}` have measured:"
        compared[other] = _counts(begin, TOGETHER, by_kind, home=home)
    return compared


def _counts(begin: str, said: dict, by_kind: dict, reasons=None, home: str = "") -> str:
    """A list of how many claims are of which kind, and which; those of one reason together."""
    lines = [begin, ""]
    for name, keys in by_kind.items():
        if keys:
            one, several, rest = said[name]
            groups = {}
            for key in keys:
                link = _anchor(CLAIMS[key], home)
                groups.setdefault((reasons or {}).get(key, ""), []).append(link)
            links = "; ".join(
                ", ".join(group) + (f" ({html.escape(why)})" if why else "")
                for why, group in groups.items()
            )
            verb = several if len(keys) > 1 else one
            lines.append(f"- **{len(keys)}** {verb} {rest}: {links}.\n\n  {_in_words(keys)}\n")
    return "\n".join(lines)


def _in_words(keys: list[str]) -> str:
    """What claims say, folded away."""
    says = "".join(f"<li>{key}: {html.escape(CLAIMS[key].sentence)}</li>" for key in keys)
    return f"<details><summary>In words</summary><ul>{says}</ul></details>"


def _id(text: str) -> str:
    """What the site calls a heading in addresses; rows are called likewise."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _anchor(claim: Claim, home: str) -> str:
    where, says = f"{home}#{_id(claim.key)}", html.escape(claim.sentence)
    return f'<a href="{where}" title="{says}">{claim.key}</a>'


def _table(studies) -> str:
    """The table as HTML without empty lines, which would end it for Markdown."""
    columns = itertools.count()

    def head(text, more=""):
        return f'<th scope="col" data-column="{next(columns)}"{more}>{text}</th>'

    def empty(study):
        next(columns)
        return f'<th scope="col" rowspan="2">{study}</th>'

    whole = ' rowspan="2"'
    upper = [
        head("claim", f'{whole} aria-sort="ascending"'),
        head("what it says", whole),
    ]
    lower = []
    for study, found in studies.items():
        if found:
            upper.append(f'<th scope="colgroup" colspan="{len(PARTS)}">{study}</th>')
            lower += [head(part, f' data-of="{study}"') for part in PARTS.values()]
        else:
            upper.append(empty(study))
    rows = [_row(place, claim, studies) for place, claim in enumerate(CLAIMS.values())]
    return "\n".join(
        [
            '<div class="scoreboard" role="region" aria-label="All claims" tabindex="0">',
            '<table class="sortable">',
            "<thead>",
            f"<tr>{''.join(upper)}</tr>",
            f"<tr>{''.join(lower)}</tr>",
            "</thead>",
            "<tbody>",
            *rows,
            "</tbody>",
            "</table>",
            "</div>",
        ]
    )


def _row(place: int, claim: Claim, studies) -> str:
    says = claim.wording
    at = next((found[claim.key] for found in studies.values() if claim.key in found), None)
    if at:
        says += f'<br><small><a href="{at.link}">{html.escape(at.title)}</a></small>'
    cells = [
        f'<th scope="row" data-sort="{place}">{claim.key}</th>',
        _cell(says, claim.sentence, "says"),
    ]
    for found in studies.values():
        judgement = found[claim.key].judgement if claim.key in found else None
        rank = list(KINDS).index(kind(judgement))
        if judgement is None:
            cells.append(_cell(MISSING, rank, "unmeasured"))
            cells += [_cell("–")] * (len(PARTS) - 1 if found else 0)
        else:
            cells.append(_cell(badge(judgement.verdict, html.escape(judgement.why)), rank))
            cells += [_number(getattr(judgement, part)) for part in list(PARTS)[1:]]
    return f'<tr id="{_id(claim.key)}">{"".join(cells)}</tr>'


def _number(estimate: Estimate | None) -> str:
    if not _is_known(estimate):
        return _cell("–")
    value, interval = str(estimate).split(" ", 1)
    return _cell(f"{value}<br><small>{interval}</small>", value, "number")


def _is_known(estimate: Estimate | None) -> bool:
    return estimate is not None and not math.isnan(estimate.value)


def _cell(content: str, sort=None, css: str = "") -> str:
    """A cell, and what it is sorted by; without that it comes last."""
    key = "" if sort is None else html.escape(str(sort))
    look = f' class="{css}"' if css else ""
    return f'<td{look} data-sort="{key}">{content}</td>'


def folders() -> dict[str, Path]:
    """Where the executed chapters of studies are: of all that are named, and all that were run."""
    measured = sorted(path.name for path in RECORDS.iterdir() if path.is_dir())
    studies = dict.fromkeys([*STUDIES, *measured])
    return {study: BOOK_CHAPTERS if study == "lab" else RECORDS / study for study in studies}


def pieces(studies) -> dict[str, str]:
    """What pages of the book include, by file name."""
    compared = comparisons(studies, home="scoreboard.html")
    return {PAGE.name: page(studies)} | {
        f"compared-{study}.md": text + "\n" for study, text in compared.items()
    }


def write() -> None:
    """Collect all studies and write what the scoreboard and the page on studies include."""
    studies = {study: collect(folder) for study, folder in folders().items()}
    PAGE.parent.mkdir(exist_ok=True)
    for name, text in pieces(studies).items():
        (PAGE.parent / name).write_text(text, encoding="utf-8")
    for study, found in studies.items():
        print(f"{study}: {len(found)} of {len(CLAIMS)} claims" if found else f"{study}: {MISSING}")
