"""The results of all studies, judged and put together for the pages."""

import functools
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from lib.site import RESULTS, results
from lib.site.verdicts import CLAIMS, COLUMNS, KINDS, TOGETHER, View, together, view
from lib.studies import STUDIES


def titles() -> dict[str, str]:
    """The studies that have results, by name: those of the registry first, in its order."""
    measured = {"lab"} | {path.parent.name for path in RESULTS.glob("*/results.json")}
    names = [name for name in dict.fromkeys([*STUDIES, *sorted(measured)]) if name in measured]
    return {name: getattr(STUDIES.get(name), "title", name) for name in names}


def judged(found: dict) -> dict[str, View]:
    """The verdicts of a study by the claim's key, from its results.

    Raises
    ------
    ValueError
        If two chapters judge one claim, or a chapter of this edition judges an unknown one.
    """
    views = {}
    for name, chapter in found["chapters"].items():
        for evidence in chapter["claims"]:
            key = evidence["claim"]
            if key not in CLAIMS:
                if chapter["edition"] != results.EDITION:
                    continue  # measured when there was such a claim
                raise ValueError(
                    f"chapter {name} judges {key!r}, which is no claim of lib/findings; "
                    "run the chapter again"
                )
            if key in views:
                raise ValueError(
                    f"chapters {views[key].chapter} and {name} both judge {key!r}; "
                    "one of them has to leave it out"
                )
            views[key] = view(evidence, name)
    return views


class Book:
    """What the pages need: by study the title, the results and the verdicts; the lab is first.

    lab : folders of the executed chapters of the lab, see :func:`lib.site.results.executed`
    """

    def __init__(self, *lab: Path):
        self.titles = titles()
        self.results = {
            name: results.of_chapters(*lab) if name == "lab" else results.load(name)
            for name in self.titles
        }
        self.views = {name: judged(found) for name, found in self.results.items()}

    def kinds(self, study: str) -> dict[str, list[str]]:
        """By kind of verdict the claims of a study."""
        views = self.views[study]
        return _sorted(KINDS, {key: getattr(views.get(key), "kind", "missing") for key in CLAIMS})

    def compared(self, study: str) -> dict[str, list[str]]:
        """By what the lab and another study make of them together, the claims of both."""
        lab, other = self.views["lab"], self.views[study]
        return _sorted(TOGETHER, {key: together(lab.get(key), other.get(key)) for key in CLAIMS})

    def maps(self) -> list[str]:
        """The studies whose CKA maps are kept."""
        names = [path.parent.name for path in sorted(RESULTS.glob("*/cka.npz"))]
        return [*filter(names.__contains__, self.titles), *(set(names) - {*self.titles})]

    def render(self, template: str, **more) -> str:
        """A template of ``lib/site/templates``; no empty lines, at which Markdown would end it."""
        html = _templates().get_template(f"{template}.html").render(book=self, **more)
        return re.sub(r"\n\s*\n", "\n", html.strip())


def _sorted(kinds: tuple, by_key: dict) -> dict[str, list[str]]:
    found = {kind: [key for key in by_key if by_key[key] == kind] for kind in kinds}
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
