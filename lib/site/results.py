"""The chapters of other studies beside those of the lab, as pages of the book.

A page holds a chapter's figures and verdicts, one column per study, and none of its prose: labels,
equations and glued numbers stay those of the chapter. Pages are made of executed notebooks alone,
and the same notebooks always give the same pages.
"""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lib.findings.claims import CLAIMS, badge
from lib.site.board import STUDIES, Finding, collect, together
from lib.site.run import BOOK_CHAPTERS, RECORDS, ROOT, cards

PAGES = ROOT / "book" / "studies"
TOC = ROOT / "book" / "_toc.yml"
NETWORKS = "networks.txt"  # what the page on the studies includes
LARGEST = 120_000  # bytes of a picture
LINE = 90  # pixels, the height of a picture that is a line of words
WIDEST = 700  # pixels of a picture that can still be read in half of a page's width
CHAPTER = re.compile(r"\d\d-.*")
TAKEN_TOGETHER = {  # what the studies that measured a claim make of it, if there are several
    "before": "holds in each, already before training",
    "holds": "holds in each",
    "against": "comes out against the sentence in each",
    "differs": "depends on the study",
    "open": "not decided in each",
}


def write(lab=BOOK_CHAPTERS, records=RECORDS, pages=PAGES, toc=TOC) -> list[Path]:
    """Write a page for every chapter that was run on another study, and list them in the toc.

    Parameters
    ----------
    lab : path
        The executed chapters of the lab.
    records : path
        Holds a folder of executed chapters and model cards for each other study.
    pages : path
        Where pages and their pictures go, and what is known of the studies' networks. What earlier
        runs left there is replaced.
    toc : path
        The table of contents; the pages stand below the one that is called as their folder is.

    Returns
    -------
    list of Path
        The pages, in the order of the book.
    """
    pages = Path(pages)
    run = {folder.name: folder for folder in sorted(Path(records).iterdir()) if folder.is_dir()}
    folders = {study: run[study] for study in dict.fromkeys([*STUDIES, *run]) if study in run}
    found = {study: collect(folder) for study, folder in {"lab": Path(lab), **folders}.items()}
    pages.mkdir(parents=True, exist_ok=True)
    for old in filter(_is_chapter, pages.iterdir()):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    written = []
    for path in sorted(Path(lab).glob("*.ipynb")):
        others = {study: folder / path.name for study, folder in folders.items()}
        others = {study: other for study, other in others.items() if other.exists()}
        if others:
            written.append(_write_page(path, others, found, pages))
    (pages / NETWORKS).write_text(_networks(folders), encoding="utf-8")
    _list(written, Path(toc), pages.name)
    return written


def _is_chapter(path: Path) -> bool:
    return bool(CHAPTER.fullmatch(path.stem))


def _write_page(lab: Path, others: dict[str, Path], found: dict, pages: Path) -> Path:
    """The page of one chapter, with its pictures in a folder of the chapter's name."""
    notebooks = {"lab": _read(lab)} | {study: _read(path) for study, path in others.items()}
    cells = {
        study: {cell["id"]: cell for cell in notebook["cells"]}
        for study, notebook in notebooks.items()
    }
    title, text = "", []
    heading = shown = None
    for cell in notebooks["lab"]["cells"]:
        if cell["cell_type"] == "markdown":
            source = _text(cell["source"])
            title = title or next(iter(re.findall(r"^# (.+)$", source, re.MULTILINE)), "")
            heading = next(iter(re.findall(r"^## (.+)$", source, re.MULTILINE)[-1:]), heading)
        elif figure := cell["metadata"].get("mystnb", {}).get("figure"):
            if heading != shown:
                text += [f"## {heading}", ""]
                shown = heading
            alt = cell["metadata"]["mystnb"].get("image", {}).get("alt", "")
            caption = figure["caption"]
            pngs = {study: _picture(own.get(cell["id"])) for study, own in cells.items()}
            # A single line stands where a study lacks something (lib.plots.nothing).
            pngs = {
                study: png if png and _height(png) > LINE else None for study, png in pngs.items()
            }
            across = 2 if max(map(_width, filter(None, pngs.values())), default=0) <= WIDEST else 1
            text += [f":::::{{grid}} 1 1 {across} {across}", ":gutter: 2", ""]
            for study, png in pngs.items():
                text += ["::::{grid-item}", f"**{_name(study)}**", ""]
                if png:
                    image = pages / lab.stem / f"{figure['name']}-{study}.png"
                    image.parent.mkdir(exist_ok=True)
                    image.write_bytes(_small(png))
                    text += [
                        f":::{{image}} {lab.stem}/{image.name}",
                        f":width: {_width(png)}px",
                        f":alt: {alt if study == 'lab' else f'In {study}: {caption}'}",
                        ":::",
                    ]
                else:
                    text += ["*Not measured in this study.*"]
                text += ["::::", ""]
            text += [":::::", "", f"{{numref}}`{figure['name']}`: {caption}", ""]

    verdicts = _verdicts({study: found[study] for study in notebooks}, lab.stem)
    if verdicts:
        text += ["## Claims and verdicts", "", verdicts, ""]
    text += ["## Where the numbers come from", ""]
    for study in notebooks:
        text += [f"**{_name(study)}**", "", _provenance(notebooks[study]), ""]
        if _code(notebooks[study]) != _code(notebooks["lab"]):
            text += [
                "The chapter's code has changed since this study was measured: where the columns "
                "differ, that may be a reason.",
                "",
            ]
    begin = [
        f"# {title}, study by study",
        "",
        f"The figures and claims of {{doc}}`../{lab.parent.name}/{lab.stem}`, which explains them, "
        f"in {', '.join(['the lab', *(f'`{study}`' for study in others)])} "
        f"({{doc}}`../{pages.name}`). The code is the chapter's for all columns; numbers of images "
        "may differ and are at the end.",
        "",
    ]
    page = pages / f"{lab.stem}.md"
    page.write_text("\n".join(begin + text).rstrip() + "\n", encoding="utf-8")
    return page


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _text(source) -> str:
    """Notebooks keep text as one string or as a list of lines."""
    return source if isinstance(source, str) else "".join(source)


def _name(study: str) -> str:
    return "The lab" if study == "lab" else study


def _data(cell, mime: str) -> Iterator[str]:
    for output in (cell or {}).get("outputs", []):
        if mime in output.get("data", {}):
            yield _text(output["data"][mime])


def _picture(cell) -> bytes | None:
    """The first picture among a cell's outputs, as a PNG file."""
    return next((base64.b64decode(data) for data in _data(cell, "image/png")), None)


def _width(png: bytes) -> int:
    """In pixels, as a PNG file's header gives it."""
    return int.from_bytes(png[16:20], "big")


def _height(png: bytes) -> int:
    return int.from_bytes(png[20:24], "big")


def _small(png: bytes) -> bytes:
    """The same picture in 256 colours, a third of the bytes, or in fewer if it is too large."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 64, 16):
        buffer = io.BytesIO()
        fewer = picture.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        fewer.save(buffer, "PNG")
        if buffer.tell() <= LARGEST:
            break
    return buffer.getvalue()


def _verdicts(found: dict[str, dict[str, Finding]], chapter: str) -> str:
    """One table of a chapter's claims: what is claimed, then each study's verdict."""
    judged = {
        study: {key: each.judgement for key, each in own.items() if each.chapter == chapter}
        for study, own in found.items()
    }
    keys = [key for key in CLAIMS if any(key in own for own in judged.values())]
    if not keys:
        return ""

    def cell(judgement):
        if judgement is None:
            return "not measured"
        return f"{badge(judgement.verdict, judgement.why)}<br>{judgement.trained}"

    def taken_together(key):
        verdict = together(*(own.get(key) for own in judged.values()))
        return f"<br><small>Taken together: {TAKEN_TOGETHER[verdict]}</small>" if verdict else ""

    head = "".join(f"<th>{name}</th>" for name in map(_name, judged))
    rows = "".join(
        f"<tr><td><b>{key}</b> {CLAIMS[key].wording}{taken_together(key)}</td>"
        + "".join(f"<td>{cell(own.get(key))}</td>" for own in judged.values())
        + "</tr>\n"
        for key in keys
    )
    return (
        '<div class="cell_output"><div class="output">\n<table class="dataframe claims">\n'
        f"<thead><tr><th>claim</th>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n"
        "</div></div>"
    )


def _provenance(notebook: dict) -> str:
    """The table at a chapter's end."""
    last = notebook["cells"][-1]
    html = next(_data(last, "text/html"), "")
    table = re.sub(r"<style.*?</style>\s*", "", html, flags=re.DOTALL)
    # A blank line would end the HTML for the page's parser.
    table = re.sub(r"\n\s*\n", "\n", table)
    return f'<div class="cell_output"><div class="output">\n{table}\n</div></div>'


def _code(notebook: dict) -> list[str]:
    """A chapter's code, apart from its parameters."""
    return [
        _text(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and cell["id"] != "injected-parameters"
    ]


NOTHING = "**Not measured here:** no network of these studies has been trained yet.\n"
COLUMNS = (
    "network",
    "parameters",
    "images seen",
    "different",
    "seed",
    "accuracy [95 %]",
    "trained in",
)


def _networks(folders: dict[str, Path]) -> str:
    """What the model cards of all studies but the lab say, as tables."""
    tables = []
    for study, folder in folders.items():
        if found := list(cards(folder).values()):
            rows = [COLUMNS, ["---"] * len(COLUMNS), *map(_card, found)]
            tables += [
                f"`{study}`, accuracy on {found[0]['test_images']:,} test images:",
                "",
                *(f"| {' | '.join(row)} |" for row in rows),
                "",
            ]
    return "\n".join(tables) or NOTHING


def _card(card: dict) -> list[str]:
    recipe, (low, high) = card["recipe"], card["accuracy_interval"]
    return [
        f"`{card['role']}`",
        f"{card['parameters'] / 1e6:.2f} M",
        f"{recipe['images'] * recipe['until']:,.0f}",
        f"{recipe['distinct']:,}",
        str(recipe["seed"]),
        f"{card['accuracy']:.3f} [{low:.3f}, {high:.3f}]",
        f"{card['seconds'] / 60:.0f} min, {card['device']}",
    ]


def _list(written: list[Path], toc: Path, folder: str) -> None:
    """Put the pages into the table of contents, below the page named as their folder."""
    lines = [
        line
        for line in toc.read_text(encoding="utf-8").splitlines()
        if f"- file: {folder}/" not in line
    ]
    (place,) = (n for n, line in enumerate(lines) if line.strip() == f"- file: {folder}")
    indent = lines[place].partition("-")[0]
    lines[place + 1 : place + 1] = [f"{indent}- file: {folder}/{path.stem}" for path in written]
    text = "\n".join(lines) + "\n"
    if text != toc.read_text(encoding="utf-8"):
        toc.write_text(text, encoding="utf-8")
