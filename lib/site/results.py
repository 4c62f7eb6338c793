"""The results of a study, taken from its executed chapters and kept in ``book/results/STUDY``.

results.json  by chapter: evidence for claims, glued numbers, printed outputs, captions and
              alternative texts of figures, provenance, a hash of the code, the edition;
              by role: the model cards that are kept nowhere else
figures.zip   the figures as PNG files of 256 colours (``03-locality/fig-heads.png``)
cka.npz       the CKA maps between all taps (:mod:`lib.site.explorer`)
"""

import ast
import base64
import hashlib
import html
import io
import json
import re
import zipfile
from datetime import date
from pathlib import Path

from PIL import Image

from lib.site import RESULTS

EDITION = "second edition"
CARRIED = "vit-see-claims"  # evidence in the metadata of an executed chapter's outputs
LARGEST = 120_000  # bytes of a picture
LINE = 90  # pixels; lower pictures are a line of words in the place of a figure


def of_chapter(notebook: dict, study: str) -> tuple[dict, dict[str, bytes]]:
    """An executed chapter's part of results.json, and its figures by name, PNG files as drawn."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    cells = [cell for cell in cells if cell["id"] != "injected-parameters"]
    # Of the code, imports do not count, since modules move without changing.
    found = {"edition": EDITION, "code": _hash("\n".join(map(_without_imports, cells)))}
    found |= {"claims": [], "glued": {}, "outputs": {}, "figures": {}, "provenance": {}}
    pictures = {}
    for cell in cells:
        about = cell["metadata"].get("mystnb", {})
        if figure := about.get("figure"):
            name, caption = figure["name"], figure["caption"]
            alt = about["image"]["alt"] if study == "lab" else f"In {study}: {caption}"
            found["figures"][name] = {"caption": caption, "alt": alt}
            if png := picture(cell):
                width, height = Image.open(io.BytesIO(png)).size
                if height > LINE:
                    pictures[name] = png
                    found["figures"][name]["width"] = width
        elif shown := _shown(cell):
            found["outputs"][cell_key(cell)] = shown
        for output in cell["outputs"]:
            metadata = output.get("metadata", {})
            found["claims"] += metadata.get(CARRIED, [])
            if scrap := metadata.get("scrapbook"):  # glued for the text
                value = text(output["data"][f"{scrap['mime_prefix']}text/plain"])
                if not value.startswith("<"):  # no number and no words
                    found["glued"][scrap["name"]] = ast.literal_eval(value)
    if cells and "<th>" in (last := found["outputs"].pop(cell_key(cells[-1]), "")):
        rows = re.findall(r"<th>(.*?)</th>\s*<td>(.*?)</td>", last, re.DOTALL)
        found["provenance"] = {name: html.unescape(value) for name, value in rows}
    return found, pictures


def cell_key(cell: dict) -> str:
    """What identifies a cell in the runs of several studies: its code."""
    return _hash(_without_imports(cell))


def _without_imports(cell: dict) -> str:
    lines = text(cell["source"]).splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line.strip())


def _hash(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def text(source: str | list[str]) -> str:
    """Notebooks keep text as one string or as a list of lines."""
    return "".join(source)


def _shown(cell: dict) -> str:
    """What a cell prints, as HTML; nothing of cells that are left out of the page."""
    # Tables of claims are made anew from the evidence.
    claims = any(CARRIED in output.get("metadata", {}) for output in cell["outputs"])
    if claims or "remove-cell" in cell["metadata"].get("tags", []):
        return ""
    shown = []
    for output in cell["outputs"]:
        if table := output.get("data", {}).get("text/html"):
            shown.append(re.sub(r"<style.*?</style>\s*", "", text(table), flags=re.DOTALL))
        elif output.get("name") == "stdout":
            shown.append(f"<pre>{html.escape(text(output['text']))}</pre>")
    return "\n".join(shown)


def picture(cell: dict) -> bytes | None:
    """The first picture among a cell's outputs, as a PNG file."""
    data = (output.get("data", {}).get("image/png") for output in cell["outputs"])
    return next((base64.b64decode(text(png)) for png in data if png), None)


def small(png: bytes) -> bytes:
    """The same picture in 256 colours, a third of the bytes, or in fewer if it is too large."""
    whole = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 64, 16):
        buffer = io.BytesIO()
        fewer = whole.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        fewer.save(buffer, "PNG")
        if buffer.tell() <= LARGEST:
            break
    return buffer.getvalue()


def load(study: str) -> dict:
    """The results.json of a study; without chapters and cards if there is none."""
    if not (path := RESULTS / study / "results.json").exists():
        return {"study": study, "chapters": {}, "cards": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def figures(study: str) -> dict[str, bytes]:
    """The figures of a study by chapter and name, ``03-locality/fig-heads``."""
    if not (path := RESULTS / study / "figures.zip").exists():
        return {}
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".png"): archive.read(name) for name in archive.namelist()}


def save(study: str, notebooks: dict[str, dict], cards: dict[str, dict] | None = None) -> Path:
    """Put executed chapters, by name, and model cards, by role, into the results of a study."""
    found, pictures = load(study), figures(study)
    for name, notebook in notebooks.items():
        found["chapters"][name], drawn = of_chapter(notebook, study)
        # The lab's chapters are run every day and have no date, which would change their bytes.
        found["chapters"][name]["provenance"].setdefault("date", date.today().isoformat())
        pictures = {key: png for key, png in pictures.items() if not key.startswith(f"{name}/")}
        pictures |= {f"{name}/{key}": small(png) for key, png in drawn.items()}
    found["cards"] |= cards or {}
    folder = RESULTS / study
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "figures.zip", "w") as archive:
        for key, png in sorted(pictures.items()):
            archive.writestr(zipfile.ZipInfo(f"{key}.png"), png)  # no date: the same bytes again
    kept = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "results.json").write_text(kept + "\n", encoding="utf-8")
    return folder


def executed(*folders: Path) -> dict[str, Path]:
    """The executed chapters in some folders by name; a later folder outweighs an earlier one."""
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.ipynb"))]
    return {path.stem: path for path in paths}


def of_chapters(*folders: Path) -> dict:
    """As :func:`load`, of the lab, whose executed chapters are in some folders."""
    chapters = {
        name: of_chapter(json.loads(path.read_text(encoding="utf-8")), "lab")[0]
        for name, path in executed(*folders).items()
    }
    return {"study": "lab", "chapters": chapters, "cards": {}}
