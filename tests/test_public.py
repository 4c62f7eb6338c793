"""Studies of public checkpoints: what a TOML file says is what is measured, on any pictures."""

import re
import shutil
import tomllib
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from lib import studies
from lib.__main__ import main
from lib.cka import MinibatchCKA
from lib.measure import measure
from lib.measurements.localisation import Localisation
from lib.measurements.probes import Probes
from lib.records import ROOT, between, weights_hash
from lib.studies import STUDIES, hub, load_study
from lib.studies.public import Public, PublicRole, Source
from lib.taps import tap_names

SHIPPED = ["imagenet-small", "imagenet", "imagenet-paper"]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet-sample.zip"
ROLES = """
[roles.vit]
model = "test_vit.r160_in1k"
purpose = "a tiny ViT"

[roles.resnet]
model = "test_resnet.r160_in1k"
licence = "apache-2.0"
seed = 3
"""


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """Two classes of twelve drawn pictures."""
    stream = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for k in range(12):
            coarse = stream.integers(0, 255, (9, 7, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((280, 240))
            image.save(tmp_path / "pictures" / label / f"{k}.jpg")
    return tmp_path / "pictures"


@pytest.fixture
def mine(tmp_path, pictures):
    path = tmp_path / "mine.toml"
    path.write_text(f'purpose = "a try"\n[images]\nfolder = "pictures"\n{ROLES}')
    return path


# The studies that come with the book --------------------------------------------------------------


def test_the_book_has_three_sizes():
    measured = [name for name, entry in STUDIES.items() if entry.load]
    assert [name for name in measured if isinstance(load_study(name), Public)] == SHIPPED
    files = (ROOT / "lib" / "studies").glob("*.toml")
    assert sorted(path.stem for path in files) == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_role_is_a_checkpoint_of_timm_with_its_licence(name):
    study = load_study(name)
    assert isinstance(study, Public)
    for role in ("vit", "vit_gap", "vit_cls", "resnet", "mixer", "vit_untrained"):
        assert study.has(role)
    assert not study.has("vit_other_seed")
    assert (study.source.resize, study.source.crop) == (256, 224)
    assert len(study.purpose) > 20
    assert study.cards == {}
    for role, what in study.roles.items():
        known = hub.config(what.model)
        assert what.licence == known["license"], role
        assert known["hf_hub_id"] == f"timm/{what.model}"
        assert len(what.purpose) > 3
        assert what.weights is None
    # Partners differ in what their purpose says, and are built alike.
    gap, cls = (study.roles[role].model for role in ("vit_gap", "vit_cls"))
    assert cls.replace("_cls", "") == gap


@pytest.mark.parametrize("role", list(load_study("imagenet-small").roles))
def test_the_taps_of_every_network_are_known(role):
    study = load_study("imagenet-small")
    with torch.device("meta"):
        model = timm.create_model(study.roles[role].model)
    counts = {kind: len(tap_names(model, kind)) for kind in ("blocks", "branches", "all")}
    assert counts["blocks"] >= 12
    assert counts["blocks"] < counts["branches"] < counts["all"]


def test_a_study_is_listed_with_licences_and_whether_it_is_here(capsys, monkeypatch):
    monkeypatch.setattr(hub, "is_here", lambda name: name.startswith("mixer"))
    assert main(["studies", "imagenet-small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("imagenet-small: ViT-S/16")
    assert any(
        re.match(r"  vit +vit_small_\S+ +apache-2.0 +not here yet +the Vision", x) for x in lines
    )
    assert any(re.match(r"  mixer +mixer_\S+ +apache-2.0 +here +the MLP", x) for x in lines)
    assert main(["studies", "imagenet"]) == 0
    assert re.search(r"vit_mae .*cc-by-nc-4.0", capsys.readouterr().out)


def test_public_networks_are_not_trained_here(capsys):
    assert main(["train", "--study", "imagenet-small"]) == 2
    assert capsys.readouterr().err == (
        "the networks of 'imagenet-small' come trained: there is nothing to train\n"
    )


def test_a_role_that_public_checkpoints_lack_is_one_sentence():
    with pytest.raises(ValueError, match="'imagenet' has no role 'vit_other_seed'") as error:
        load_study("imagenet").model("vit_other_seed")
    sentence(error)


# A study of one's own -----------------------------------------------------------------------------


def test_a_file_is_a_study(mine, monkeypatch):
    study = load_study(str(mine))
    assert (study.name, study.purpose) == ("mine", "a try")
    expected = PublicRole("test_vit.r160_in1k", "a tiny ViT", name="vit", arm="vit", family="vit")
    assert study.roles["vit"] == expected
    assert study.classes == ["a", "b"]
    images = study.images(6)
    assert images.pixels.shape == (6, 3, 224, 224)
    assert sorted(images.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert study.images(6) is images
    assert study.images(6, seed=1) is not images
    # From elsewhere, by a path that starts where one is.
    monkeypatch.chdir(mine.parent)
    assert torch.equal(load_study("mine.toml").images(6).pixels, images.pixels)
    monkeypatch.setattr(studies, "__file__", str(mine.parent / "lib" / "studies" / "__init__.py"))
    monkeypatch.chdir("/")
    assert load_study("mine.toml").name == "mine"


def test_paths_may_have_variables(mine, monkeypatch, pictures):
    mine.write_text(mine.read_text().replace('"pictures"', '"$PICTURES/a"'))
    with pytest.raises(ValueError, match=r"names '\$PICTURES/a', and no such variable") as error:
        load_study(str(mine)).images(2)
    sentence(error)
    monkeypatch.setenv("PICTURES", str(pictures))
    assert len(load_study(str(mine)).images(2)) == 2


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("[images]", "[images", "mine.toml is not valid TOML: .*line"),
        ("folder =", "foldr =", "images: give either folder = ... or dataset = ..."),
        ('folder = "pictures"', 'folder = "x"\ndataset = "Imagenette"', "give either folder"),
        (
            'folder = "pictures"',
            'folder = "x"\nsplit = "val"',
            "images: `split` means nothing here; known are",
        ),
        ("purpose =", "porpoise =", "the file: `porpoise` means nothing here; known are images, r"),
        ("seed = 3", "sead = 3", "roles.resnet: `sead` means nothing here; known are arm, "),
        ('model = "test_vit.r160_in1k"', "", "roles.vit: .*required field `model`"),
        (ROLES, "", "the file: .*required field `roles`"),
        (ROLES, "[roles]", "roles: Expected a table of length >= 1"),
        (ROLES, "[roles]\nvit = 3", "roles.*: Expected a table, got `int`"),
        (ROLES, "[[roles]]\nvit = 3", "roles: Expected a table, got an array"),
        ('"pictures"', "5", "images.folder: Expected `str.*, got `int`"),
        ("[roles.vit]", "crop = 64.0\n[roles.vit]", "images.crop: Expected `int`, got `float`"),
        ("[roles.vit]", "crop = true\n[roles.vit]", "images.crop: Expected `int`, got `bool`"),
        ("[roles.vit]", 'resize = "64"\n[roles.vit]', "images.resize: Expected `int`, got `str`"),
        (
            "[roles.vit]",
            "crop = 384\n[roles.vit]",
            "images: crop is 384: make it at most resize, which is 256; known",
        ),
        ("[roles.vit]", "crop = 0\n[roles.vit]", "images.crop: Expected `int` >= 1; known"),
        ("[roles.vit]", "resize = -1\n[roles.vit]", "images.resize: Expected `int` >= 1; known"),
        ("seed = 3", "name = 'x'", "roles.resnet: `name` means nothing here; known are arm, "),
        ("seed = 3", "trained = false", "roles.resnet: `trained` means nothing here"),
        ('"pictures"', '"x"\noptions = {}', "images: `options` means nothing here; known are f"),
        ('"test_vit.r160_in1k"', "5", "roles.vit.model: Expected `str`, got `int`"),
        ('"test_vit.r160_in1k"', '["x"]', "roles.vit.model: Expected `str`, got an array"),
        ("seed = 3", "weights = 5", "roles.resnet.weights: Expected `str.*, got `int`"),
        ("[roles.vit]", "[roles.vit_untrained]", "roles.vit_untrained is no name of a role"),
        (
            "[roles.vit]",
            '[roles."vit/b"]',
            "roles.vit/b is no name of a role: expected are letters",
        ),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(mine, before, after, says):
    mine.write_text(mine.read_text().replace(before, after))
    with pytest.raises(ValueError, match=says) as error:
        load_study(str(mine))
    assert "mine.toml" in sentence(error)


def test_a_file_may_begin_with_a_mark_of_its_encoding(mine):
    mine.write_bytes(b"\xef\xbb\xbf" + mine.read_bytes())
    assert load_study(str(mine)).purpose == "a try"


def test_replicates_of_ones_own(mine):
    mine.write_text(
        mine.read_text() + '[roles.two]\nmodel = "test_vit"\narm = "vit"\nreplicate = 1'
    )
    study = load_study(str(mine))
    assert [study.find("vit", k).name for k in (0, 1)] == ["vit", "two"]
    names = [study.find("vit", k, trained=False).name for k in (0, 1, 2)]
    assert names == ["vit_untrained", "two_untrained", "vit_seed_2_untrained"]


def test_torchvisions_options_stand_beside_ours(mine):
    table = 'dataset = "Imagenette"\nsplit = "val"\nsize = "320px"\ncrop = 96\nroot = "data"'
    mine.write_text(mine.read_text().replace('folder = "pictures"', table))
    expected = Source(
        dataset="Imagenette", root="data", crop=96, options={"split": "val", "size": "320px"}
    )
    assert load_study(str(mine)).source == expected


def test_pictures_of_another_folder_take_the_place_of_those_that_were_read(mine, pictures):
    study = load_study(str(mine))
    before = study.images(6)
    study.use_folder(pictures / "b")
    after = study.images(6)
    expected = load_study(str(mine))
    expected.use_folder(pictures / "b")
    assert torch.equal(after.pixels, expected.images(6).pixels)
    assert not torch.equal(after.pixels, before.pixels)
    assert not after.labelled
    assert study.facts(["vit"])["pictures"] == "b"


@pytest.mark.parametrize("name", ["imagenet-tiny", "nowhere.toml"])
def test_a_study_that_is_not_there_is_one_sentence(name):
    with pytest.raises((ValueError, FileNotFoundError), match=name) as error:
        load_study(name)
    sentence(error)


def test_each_network_has_its_own_normalisation_of_the_same_pixels():
    roles = {"half": PublicRole("test_vit.r160_in1k"), "imagenet": PublicRole("resnet50.a1_in1k")}
    study = Public("t", roles, Source(folder="."))
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(study.to_input(pixels, "half").squeeze(), plus_minus(1.0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = torch.stack([-mean / std, (1 - mean) / std])
    torch.testing.assert_close(study.to_input(pixels, "imagenet_untrained").squeeze(), expected)


def plus_minus(value):
    return torch.tensor([[-value] * 3, [value] * 3])


def test_baselines_have_the_seed_of_their_role(mine):
    study = load_study(str(mine))
    for role, seed in (("vit", 0), ("resnet", 3)):
        expected = hub.build(study.roles[role].model, seed, 224)
        assert weights_hash(study.model(f"{role}_untrained")) == weights_hash(expected)


def test_weights_from_a_file_beside_the_study(mine):
    network = hub.build("test_vit.r160_in1k", 9)
    safetensors.torch.save_file(network.state_dict(), mine.parent / "nine.safetensors")
    mine.write_text(
        mine.read_text().replace("[roles.vit]", '[roles.vit]\nweights = "nine.safetensors"')
    )
    study = load_study(str(mine))
    assert weights_hash(study.model("vit")) == weights_hash(network)
    assert study.is_here("vit")
    assert study.facts(["vit", "vit_untrained"])["networks"] == {
        "vit": "test_vit.r160_in1k, weights of nine.safetensors",
        "vit_untrained": "test_vit.r160_in1k, random weights",
    }


# Measured -----------------------------------------------------------------------------------------


@pytest.fixture(params=["drawn", "photographed"])
def study(request, tmp_path, pictures):
    """A tiny ViT and ResNet on 224-pixel pictures, drawn ones and, where they are, photographs."""
    folder = pictures
    if request.param == "photographed":
        if not PHOTOGRAPHS.exists():
            pytest.skip("no photographs beside this checkout")
        folder = tmp_path / "photographs"
        with zipfile.ZipFile(PHOTOGRAPHS) as archive:
            archive.extractall(folder, archive.namelist()[:24])
        for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
            # One photograph per class is too few to read classes from: two made-up ones.
            target = folder / "ab"[number % 2]
            target.mkdir(exist_ok=True)
            shutil.move(path, target / path.name)
        shutil.rmtree(folder / "imagenet-sample")
    roles = tomllib.loads(ROLES)["roles"]
    roles = {role: PublicRole(**entries) for role, entries in roles.items()}
    return Public("t", roles, Source(folder=folder))


def test_everything_is_measured_at_224_pixels(study):
    roles = ["vit_untrained", "resnet_untrained"]
    record = measure(study, roles, [MinibatchCKA("blocks")], 24, 12)
    square = record["cka"].values
    np.testing.assert_allclose(np.diag(square), 1, atol=1e-6)
    np.testing.assert_allclose(square, square.T, atol=1e-6)
    assert np.abs(square).max() < 1 + 1e-6
    assert between(record, *roles).values.max() < 0.999
    assert square.mean() > 0.05
    assert record["role"].values.tolist().count("vit_untrained") == 6
    assert record.attrs["networks"] == str(study.facts(roles)["networks"])
    assert record.attrs["crop"] == "short side 256 (bicubic), middle 224"
    # A ViT's 14 x 14 tokens and a ResNet's 7 x 7 places speak of the same patches.
    for role, tap in zip(roles, ("blocks.5", "layer4.0"), strict=True):
        found = measure(study, [role], [Localisation([tap], grid=7)], 24, 12)
        assert found["localisation"].shape[-2:] == (49, 49)
        assert np.isfinite(found["localisation"]).all()


@pytest.mark.filterwarnings("ignore")
def test_probes_read_classes_and_leave_places_open_where_no_box_is_known(study):
    probes = Probes(["blocks.5"], grid=2, shots=3, draws=2)
    record = measure(study, ["vit_untrained"], [probes], 24, 12)
    right = record["right"].sel(readout="mean of all")
    assert np.isfinite(right).all()
    assert np.isnan(record["centre"]).all()


def test_what_needs_labels_says_so_on_pictures_without(pictures):
    for path in (pictures / "b").iterdir():
        shutil.move(path, pictures / f"b{path.name}")
    roles = {"vit": PublicRole("test_vit.r160_in1k")}
    study = Public("t", roles, Source(folder=pictures))
    record = measure(study, ["vit_untrained"], [MinibatchCKA("blocks")], 8, 8)
    assert np.isfinite(record["cka"]).all()
    with pytest.raises(ValueError, match="have no labels, and this measurement needs") as error:
        measure(study, ["vit_untrained"], [Probes(["blocks.5"], shots=1, draws=2)], 8, 8)
    sentence(error)


# The command line ---------------------------------------------------------------------------------


NAMES = ["--vit", "test_vit.r160_in1k", "--cnn", "test_resnet.r160_in1k"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name the roles to measure, or networks with --vit and --cnn"),
        (NAMES, "say which pictures the networks are to see: --images FOLDER"),
        ([*NAMES, "--study", "imagenet"], "give either --study or networks"),
        ([*NAMES, "--images", "x", "--weights", "f"], "whose weights f holds: --weights vit=f or"),
        ([*NAMES[:2], "--images", "x", "--weights", "cnn=f"], "whose weights f holds"),
        (["vit", "--weights", "f"], "--weights belongs to --vit or --cnn"),
        (["vit", "--images", "x"], "the study 'lab' has images of its own"),
        ([*NAMES, "--images", "nowhere"], "there is no folder"),
        ([*NAMES, "--images", "x", "vti"], "no role 'vti'"),
    ],
)
def test_mistakes_on_the_command_line(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(["measure", *arguments, "--out", "r.nc"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "r.nc").exists()


def test_networks_and_pictures_from_the_command_line(pictures, tmp_path, capsys):
    network = hub.build("test_resnet.r160_in1k", 4)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "four.safetensors")
    (pictures / "a" / "0.jpg").write_bytes(b"")
    out = str(tmp_path / "r.nc")
    arguments = [*NAMES, "--images", str(pictures), "--weights", f"cnn={tmp_path}/four.safetensors"]
    size = ["--n-images", "23", "--batch-size", "12", "--taps", "blocks"]
    chosen = ["measure", "vit_untrained", "resnet", *arguments, *size, "--out", out]
    with warnings.catch_warnings():
        assert main(chosen) == 0
    told = capsys.readouterr()
    (warning,) = [line for line in told.err.splitlines() if line.startswith("warning: 1 of the")]
    assert warning.endswith("1 empty (0.jpg)")
    assert "CKA of" in told.out

    mine = tmp_path / "mine.toml"
    mine.write_text(f'[images]\nfolder = "nowhere"\n{ROLES}')
    again = ["vit_untrained", "--study", str(mine), "--images", str(pictures)]
    with warnings.catch_warnings():
        assert main(["measure", *again, *size, "--out", out]) == 0
