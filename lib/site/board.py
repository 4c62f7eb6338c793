"""The results of all studies, judged and put together for the pages.

Verdicts are made of the evidence that is kept and of the claim as it is written now, so that a
changed sentence or threshold never stands beside an old verdict.
"""

import functools
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup
from sphinx.ext.autodoc.mock import mock

from lib.site import RESULTS, results
from lib.studies import STUDIES

# Claims and the rule that decides need no measurement: without PyTorch, what only the statistics
# use is replaced by stand-ins, and the site can be built.
CORE = ("cka", "measure", "measurements", "plots", "processes", "records", "taps")
UNUSED = ("torch", "xarray", "scipy", "pandas", *(f"lib.{name}" for name in CORE))
with mock([] if find_spec("torch") else [*UNUSED]):
    from lib.findings import CLAIMS, claims

COLUMNS = ("measured [95 %]", "other seed", "untrained")
# Kinds of verdicts, in the order in which the pages sort them (words: templates/counts.html).
KINDS = ("learned", "holds", "before", "seeds", "open", "against", "unmeasurable", "missing")
HOLDS = {"learned", "holds", "before"}
TOGETHER = ("before", "holds", "against", "differs", "open")  # of two studies on one claim


class View(NamedTuple):
    """A verdict as the pages show it; ``numbers`` as text, for :data:`COLUMNS`."""

    badge: str
    numbers: tuple[str, ...]
    kind: str
    chapter: str


def view(evidence: dict, chapter: str) -> View:
    """The verdict that follows from the evidence a chapter has for a claim."""
    judgement = claims.Judgement.from_plain(CLAIMS[evidence["claim"]], evidence)
    verdict, why = judgement.verdict, judgement.why
    first, second = [*judgement.replicates, None, None][:2]
    floor = next(iter(judgement.baselines), None)
    if verdict == claims.INCONCLUSIVE:
        kind = "seeds" if why == claims.NOT_REPEATED else "open"
    elif verdict == claims.SUPPORTED and why != claims.ALREADY_TRUE:
        kind = "learned" if floor and math.isfinite(floor.value) else "holds"
    else:
        kinds = {claims.SUPPORTED: "before", claims.CONTRADICTED: "against"}
        kind = kinds.get(verdict, "unmeasurable")
    numbers = tuple(str(estimate or "–") for estimate in (first, second, floor))
    return View(claims.badge(verdict, why), numbers, kind, chapter)


def together(*views: View | None) -> str | None:
    """Which of :data:`TOGETHER` a claim is, by the studies that measured it, at least two."""
    kinds = [each.kind for each in views if each and each.kind != "unmeasurable"]
    if len(kinds) < 2:
        return None
    if len(set(kinds)) == 1 and kinds[0] in ("before", "against"):
        return kinds[0]
    if HOLDS.issuperset(kinds):
        return "holds"
    return "differs" if {*HOLDS, "against"}.issuperset(kinds) else "open"


def titles() -> dict[str, str]:
    """The studies that have results, by name: those of the registry first, in its order."""
    measured = {"lab", *(path.parent.name for path in RESULTS.glob("*/results.json"))}
    names = [name for name in dict.fromkeys([*STUDIES, *sorted(measured)]) if name in measured]
    return {name: getattr(STUDIES.get(name), "title", name) for name in names}


def judged(found: dict) -> dict[str, View]:
    """The verdicts of a study by the claim's key, from its results.

    Two chapters must not judge one claim, nor a chapter of this edition an unknown one.
    """
    views = {}
    for name, chapter in found["chapters"].items():
        for evidence in chapter["claims"]:
            if (key := evidence["claim"]) in CLAIMS:
                if key in views:
                    both = f"{views[key].chapter} and {name}"
                    raise ValueError(f"chapters {both} both judge {key!r}; one has to leave it out")
                views[key] = view(evidence, name)
            elif chapter["edition"] == results.EDITION:  # an earlier one had other claims
                raise ValueError(
                    f"chapter {name} judges {key!r}, which is no claim of lib/findings; "
                    "run the chapter again"
                )
    return views


class Book:
    """What the pages need: by study the title, the results and the verdicts; the lab is first."""

    def __init__(self, *lab: Path):
        """Of folders of the lab's executed chapters, see :func:`lib.site.results.executed`."""
        self.titles = titles()
        self.results = dict(zip(self.titles, map(results.load, self.titles), strict=True))
        self.results["lab"] = results.of_chapters(*lab)
        self.views = {name: judged(found) for name, found in self.results.items()}

    def kinds(self, study: str) -> dict[str, list[str]]:
        """By kind of verdict the claims of a study."""
        views = self.views[study]
        return _sorted(KINDS, lambda key: views[key].kind if key in views else "missing")

    def compared(self, study: str) -> dict[str, list[str]]:
        """By what the lab and another study make of them together, the claims of both."""
        lab, other = self.views["lab"], self.views[study]
        return _sorted(TOGETHER, lambda key: together(lab.get(key), other.get(key)))

    def maps(self) -> list[str]:
        """The studies whose CKA maps are kept."""
        names = [path.parent.name for path in sorted(RESULTS.glob("*/cka.npz"))]
        return [*filter(names.__contains__, self.titles), *(set(names) - {*self.titles})]

    def render(self, template: str, **more) -> str:
        """A template of ``lib/site/templates``; no empty lines, at which Markdown would end it."""
        html = _templates().get_template(f"{template}.html").render(book=self, **more)
        return re.sub(r"\n\s*\n", "\n", html.strip())


def _sorted(kinds: tuple, kind_of) -> dict[str, list[str]]:
    found = {kind: [key for key in CLAIMS if kind_of(key) == kind] for kind in kinds}
    return {kind: keys for kind, keys in found.items() if keys}


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["anchor"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    environment.filters["html"] = Markup  # of the book's own making
    environment.globals |= {"CLAIMS": CLAIMS, "COLUMNS": COLUMNS, "KINDS": KINDS}
    return environment
