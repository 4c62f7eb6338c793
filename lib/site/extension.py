"""The Sphinx extension that puts the results of all studies into the pages, when they are built.

- ``{results} NAME`` is a template of ``lib/site/templates``, with the name of a study behind it if
  the template needs one; ``{verdict}`` is a claim's verdict in the lab.
- The executed chapters are shown from the folder that ``VIT_SEE_CHAPTERS`` names, by default the
  committed ones. Their tables of claims are judged anew.
- Every chapter gets the data of its switch (``book/_scripts/switch.js``), which shows the figures,
  tables and numbers of another study in place, and the explorer the CKA maps.
"""

import html
import json
import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

from lib.site import PUBLISHED, RESULTS, ROOT, explorer, results
from lib.site.board import Book

GLUED = re.compile(r"\{glue:text\}`([^`:]+)(?::([^`:]*))?`")  # of the chapter itself
OUTPUT = '<div class="cell_output docutils container"><div class="output text_html">{}</div></div>'


def setup(app) -> dict:
    pages = Pages(PUBLISHED, ROOT / os.environ.get("VIT_SEE_CHAPTERS", PUBLISHED))

    class Results(Directive):
        required_arguments, optional_arguments = 1, 1

        def run(self):
            template, study = [*self.arguments, None][:2]
            return [nodes.raw("", pages.book.render(template, study=study), format="html")]

    def verdict(name, rawtext, key, *_):
        return [nodes.raw("", pages.book.views["lab"][key].badge, format="html")], []

    app.add_directive("results", Results)
    app.add_role("verdict", verdict)
    app.connect("source-read", pages.read)
    app.connect("html-page-context", pages.load)
    app.connect("build-finished", pages.write)
    return {"parallel_read_safe": False, "parallel_write_safe": False}


class Pages:
    """The chapters as the site shows them, and what their switches need.

    folders : where the executed chapters of the lab are, the last run last
    """

    def __init__(self, *folders: Path):
        self.book, self.run = Book(*folders), folders[-1]
        self.chapters = results.executed(*folders)
        self.switches: dict[str, list[dict]] = {}  # by chapter, an entry for every study

    def read(self, app, docname: str, content: list[str]) -> None:
        """Before a chapter is parsed: show the run, with verdicts and places for the switch."""
        name = docname.removeprefix("chapters/")
        if name not in self.chapters:
            return
        notebook = json.loads(self.chapters[name].read_text(encoding="utf-8"))
        keys = self.prepare(name, notebook)
        content[0] = json.dumps(notebook, ensure_ascii=False)
        having = [study for study in self.book.titles if name in self._chapters(study)]
        if len(having) > 1:
            self.switches[name] = [self.entry(study, name, *keys) for study in having]

    def prepare(self, name: str, notebook: dict) -> tuple[dict, set]:
        """Judge the tables of claims, paste glued numbers and mark what a switch may change.

        Returns the claims in every cell, by its key, and the numbers in the text, with formats.
        """
        cells, pasted = {}, set()
        glued = self._chapters("lab")[name]["glued"]
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                source = results.text(cell["source"])
                pasted |= {found.groups("") for found in GLUED.finditer(source)}
                cell["source"] = GLUED.sub(lambda found: _number(*found.groups(""), glued), source)
            elif cell["outputs"]:
                key = results.cell_key(cell)
                cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), f"cell-{key}"]
                cells[key] = []
                for output in cell["outputs"]:
                    if carried := output.get("metadata", {}).get(results.CARRIED):
                        cells[key] = [plain["claim"] for plain in carried]
                        output["data"] = {"text/html": self._claims("lab", cells[key])}
        return cells, pasted

    def entry(self, study: str, name: str, cells: dict, pasted: set) -> dict:
        """A study's part of a chapter's switch: HTML by the place where it is shown."""
        lab, own = (self._chapters(one)[name] for one in ("lab", study))
        entry = {"name": study, "title": self.book.titles[study], "note": "", "html": {}}
        if study == "lab":
            return entry
        for figure in lab["figures"]:
            shown = _picture(study, name, figure, own["figures"].get(figure, {}))
            entry["html"][f"figure:{figure}"] = shown
        for key, claims in cells.items():
            if table := self._claims(study, claims) if claims else own["outputs"].get(key):
                entry["html"][f"cell:{key}"] = OUTPUT.format(table)
        provenance = own["provenance"].items()
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in provenance)
        table = f'<table class="dataframe"><tbody>{rows}</tbody></table>'
        entry["html"][f"cell:{list(cells)[-1]}"] = OUTPUT.format(table)
        for key, form in pasted:
            if key in own["glued"]:
                entry["html"][f"glue:{key}:{form}"] = _number(key, form, own["glued"])
        same = "." if own["code"] == lab["code"] else ", whose code for this chapter was another."
        return entry | {"note": f"Measured by the {own['edition']} of this book{same}"}

    def load(self, app, page: str, template, context, doctree) -> None:
        """Let a chapter's page load its switch, and no other page."""
        if (name := page.removeprefix("chapters/")) in self.switches:
            app.add_js_file(f"switch/{name}.js", priority=800)
            app.add_js_file("switch.js", priority=801, loading_method="defer")

    def write(self, app, exception) -> None:
        """Write the data that pages load, once all pages are there."""
        if exception or app.builder.format != "html":
            return
        files = {}
        for name, studies in self.switches.items():
            data = json.dumps(studies, ensure_ascii=False, separators=(",", ":"))
            files[f"switch/{name}.js"] = f"globalThis.switchStudies = {data};\n".encode()
        for study in self.book.titles:
            for figure, png in results.figures(study).items():
                files[f"studies/{study}/{figure}.png"] = png
        for study in self.book.maps():
            run = self.run / "cka.npz"
            maps = run if study == "lab" and run.exists() else RESULTS / study / "cka.npz"
            files[f"explorer/{study}.js"] = explorer.script(maps).encode()
        for name, content in files.items():
            path = Path(app.outdir, "_static", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for path in self.chapters.values():  # for readers who download a chapter
            shutil.copy(path, Path(app.outdir) / "_sources" / "chapters")

    def _chapters(self, study: str) -> dict[str, dict]:
        return self.book.results[study]["chapters"]

    def _claims(self, study: str, keys: list[str]) -> str:
        return self.book.render("claims", study=study, keys=keys)


def _number(key: str, form: str, glued: dict) -> str:
    """A glued number as the text shows it; words stand as they are, in the place of a number."""
    value = glued[key]
    shown = value if isinstance(value, str) else format(value, form)
    return f'<span data-glue="{key}:{form}">{shown}</span>'


def _picture(study: str, chapter: str, name: str, figure: dict) -> str:
    if "width" not in figure:
        return '<p class="not-here">Not measured in this study.</p>'
    where, alt = f"../_static/studies/{study}/{chapter}/{name}.png", html.escape(figure["alt"])
    return f'<img src="{where}" alt="{alt}" style="width: {figure["width"]}px">'
