"""What pages show to readers, code and commands and numbers, runs and holds as it stands there."""

import dataclasses
import json
import re
import shlex
import warnings

import matplotlib
import pytest

from lib.findings import CLAIMS
from lib.findings.claims import CONTRADICTED, INCONCLUSIVE, SUPPORTED, Judgement
from lib.site import PUBLISHED, ROOT, commands, results
from lib.studies import load_study

PAGES = {
    name: (ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("your-own-model", "bigger")
}


def test_other_studies_are_as_the_page_says():
    text = (ROOT / "book" / "studies.md").read_text(encoding="utf-8")
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 2}
    said = {what: columns[0] for what, columns in table.items()}
    recipe = results.load("tiny-imagenet-small")["cards"]["vit"]["recipe"]
    assert recipe["distinct"] == 120 * 200
    assert said["trained on"] == f"120 of each class, {recipe['distinct']:,}"
    seen, rest = divmod(recipe["images"], recipe["distinct"])
    assert (said["each network sees"], rest) == (f"each photograph {seen} times", 0)
    lab = load_study("lab")
    for name in ("vit", "vit_other_seed"):
        card = results.load("lab-long")["cards"][name]
        recipe = json.loads(json.dumps(dataclasses.asdict(lab.role(name).recipe)))
        five = {key: 5 * recipe[key] for key in ("images", "distinct")}
        assert recipe | card["recipe"] == recipe | five
        resnet = lab.cards[name.replace("vit", "resnet")]
        assert 0.95 < card["accuracy"] / resnet["accuracy"] < 1
    assert "trained on five times as\nmany scenes" in text
    assert "right nearly as often as the ResNets" in text
    for name, card in results.load("lab-faint")["cards"].items():
        assert 1 / 16 < card["accuracy"] < lab.cards[name]["accuracy"] - 0.05
    assert "a quarter of an image's patches" in text
    for name in ("vit", "vit_other_seed"):
        recipe = results.load("lab-masked")["cards"][name]["recipe"]
        assert recipe["shown"] == 1 / 4
        assert 1000 < recipe["fitted_on"] < 5000
        assert recipe["images"] == lab.role(name).recipe.images


def judgements(found):
    """The judgements on a study's evidence, by claim; of numbers that decide nothing too."""
    judged = {}
    for chapter in found["chapters"].values():
        for evidence in chapter["claims"]:
            if evidence["replicates"] and not evidence["why"]:
                claim = CLAIMS[evidence["claim"]]
                judged[claim.key] = Judgement.from_plain(claim, evidence)
    return judged


def test_other_studies_found_what_the_chapters_say_of_them():
    lab, third, long, faint, painting = map(
        judgements,
        [
            results.of_chapters(PUBLISHED),
            *map(results.load, ("lab-third-seed", "lab-long", "lab-faint", "lab-masked")),
        ],
    )
    # Chapter 2: "one is more uniform than here, its twin less, and both far more so"
    uniform = "E01-uniform"
    assert long[uniform].trained.low > lab[uniform].trained.high
    assert long[uniform].replicates[1].high < lab[uniform].replicates[1].low
    assert long[uniform].replicates[1].low > 0.4
    # "with ViTs that were trained five times as long, the claim is undecided"
    kinship = "E22-kinship"
    assert lab[kinship].verdict == third[kinship].verdict == CONTRADICTED
    assert long[kinship].trained.low < 0 < long[kinship].trained.high
    # "A third seed sides ... with the first ViT on the other two", and against it on equal depth
    first, other = (one.value for one in lab["E02-last-third"].replicates)
    one, its = (one.value for one in third["E02-last-third"].replicates)
    assert its == pytest.approx(other, abs=1e-4)
    assert abs(one - first) < abs(one - other)
    assert lab["E22-blocks"].verdict == third["E22-blocks"].verdict == SUPPORTED
    assert lab["E21-diagonal"].verdict == CONTRADICTED
    assert third["E21-diagonal"].verdict == SUPPORTED
    # Other studies: "One verdict reverses"
    both = {key: {lab[key].verdict, found.verdict} for key, found in faint.items() if key in lab}
    assert [k for k, pair in both.items() if pair == {SUPPORTED, CONTRADICTED}] == ["E21-diagonal"]
    assert {CONTRADICTED} in both.values()
    # Chapter 3: "Five times the training brings none either, nor does learning without labels"
    for found in (lab, long, painting):
        assert found["E03-local"].verdict == CONTRADICTED
    # Chapter 5: "in both seeds nearly every token ... edge tokens light up other edges"
    for key in ("E12-own-patch", "E12-edges"):
        assert (lab[key].verdict, painting[key].verdict) == (INCONCLUSIVE, SUPPORTED)
    own = painting["E12-own-patch"]
    assert min(own.trained.low, own.replicates[1].low, own.baselines[0].value) > 0.9
    assert painting["E06-centre"].trained.low > 2 * lab["E06-centre"].replicates[1].high
    assert painting["E06-centre"].replicates[1].low > 2 * lab["E06-centre"].replicates[1].high
    # Other studies: "Three verdicts reverse", "all blocks of these ViTs are much alike"
    reversed_ones = {
        key
        for key, found in painting.items()
        if key in lab and {lab[key].verdict, found.verdict} == {SUPPORTED, CONTRADICTED}
    }
    assert reversed_ones == {"E15-plateau", "E03-spread", "E02-midpoint"}
    assert painting["E01-uniform"].replicates[1].low > lab["E01-uniform"].trained.high


def blocks(page):
    return re.findall(r"```(python|bash|toml)\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands_on(page):
    """The library's commands on a page, as lists of arguments, with what starts them."""
    for kind, text in blocks(page):
        if kind == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                if "-m lib " in line:
                    start, _, arguments = line.partition("-m lib ")
                    yield start, shlex.split(arguments)


def runs_offline(arguments):
    """Whether a command needs nothing that is not on the page or in the repository."""
    here = {"vit_untrained", "vit", "--study", "mine.toml"}
    given = set(arguments)
    needs = {"--cnn", "imagenet", "imagenet-small", "imagenet-paper", "execute"}
    return bool(given & here or given == {"studies"}) and not given & needs


def run_all(page, capsys):
    """Run a page from top to bottom, as a reader would; what its Python names and prints."""
    names, printed = {}, []
    given = iter(list(commands_on(page)))
    for kind, text in blocks(page):
        capsys.readouterr()
        if kind == "toml":
            name = re.match(r"# (\S+\.toml)\n", text)[1]
            with open(name, "w", encoding="utf-8") as file:
                file.write(text)
        elif kind == "python":
            exec(compile(text, page, "exec"), names)
            printed += capsys.readouterr().out.splitlines()
        else:
            for _ in range(text.count("-m lib ")):
                _, arguments = next(given)
                if runs_offline(arguments):
                    assert commands.main(arguments) == 0, arguments
    return names, printed


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    matplotlib.use("agg")
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:CKA is undefined", "ignore:a minibatch of")
def test_your_own_model(capsys, tmp_path):
    names, printed = run_all("your-own-model", capsys)
    networks, estimate, taps, few, more, refusal = printed
    assert "my-vit.safetensors" in networks
    assert "test_resnet.r160_in1k, random weights" in networks
    assert re.fullmatch(r"-?\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]", estimate)
    assert taps.count("attn'") == 6
    assert (few, more) == ("12", "36")
    assert "MlpMixer matches 'blocks.*.attn.attn_drop'" in refusal
    assert len(names["figure"].axes) == 3  # two maps and their scale
    assert names["record"].attrs["study"] == "mine"
    assert {path.name for path in tmp_path.glob("*.nc")} == {"mine.nc", "vit.nc"}


@pytest.mark.filterwarnings("ignore:CKA is undefined")
def test_bigger(capsys, tmp_path):
    _, printed = run_all("bigger", capsys)
    assert "'forward': 2.5" in printed[-1]
    assert {path.name for path in tmp_path.glob("*.nc")} == {"twin.nc"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_the_page_are_understood(page, monkeypatch):
    """Those that need a hub, several machines or hours too."""
    seen = []
    for name in ("measure", "studies", "execute"):

        def command(args):
            """Seen."""
            seen.append(args)

        command.__name__ = name
        monkeypatch.setattr(commands, name, command)
    given = list(commands_on(page))
    for start, arguments in given:
        assert re.search(r"(\.venv/bin/python|torchrun .*) $", start)
        assert commands.main(arguments) == 0
    assert len(seen) == len(given) >= 5
    for args in seen:
        study = getattr(args, "study", None)
        if study and isinstance(study, str) and study.startswith("imagenet"):
            for role in getattr(args, "roles", ()):  # chapters have roles of their own
                load_study(study).role(role)


def test_every_message_that_is_explained_is_one_that_somebody_can_get():
    page = (ROOT / "book" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = [*ROOT.glob("lib/**/*.py"), *ROOT.glob("tests/*.py"), ROOT / "Makefile"]
    # A message may be put together from several pieces of text, over several lines.
    told = "".join(path.read_text(encoding="utf-8") for path in sources)
    told = re.sub(r'"\s*\n\s*f?"', "", told)
    messages = [m for m in re.findall(r"^### (.*)$", page, re.MULTILINE) if m[0].islower()]
    assert len(messages) >= 12
    for message in messages:
        assert message in told
