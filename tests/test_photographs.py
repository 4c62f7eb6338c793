"""Tiny-ImageNet is read alike from both layouts, and networks are trained on what was read."""

import csv
import dataclasses
import functools
import hashlib
import http.server
import shutil
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib import records
from lib.cka import MinibatchCKA
from lib.measure import measure
from lib.studies import lab, load_study, networks, photographs, pictures, recipes, study, training
from lib.studies.photographs import Photographs
from lib.studies.recipes import CroppingRecipe, Recipe, crop

WNIDS = ("n03000000", "n01000000", "n02000000")  # not in sorted order, as the publisher's are not
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiny-imagenet"
EACH, VAL = 12, 5


def picture(path, seed, side=64):
    """A JPEG of smooth noise, grey if the seed is a multiple of 7, as some of the set's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    (image.convert("L") if seed % 7 == 0 else image).save(path, quality=95)


def box(seed):
    return [seed % 20, seed % 13, 20 + seed % 44, 20 + seed % 40]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A data folder with three classes in the publisher's layout."""
    folder = tmp_path_factory.mktemp("data")
    root = folder / "tiny-imagenet-200"
    seed = 0
    for wnid in WNIDS:
        lines = []
        for number in range(EACH):
            seed += 1
            name = f"{wnid}_{number}.JPEG"
            picture(root / "train" / wnid / "images" / name, seed)
            lines.append("\t".join(map(str, [name, *box(seed)])))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("\n".join(lines) + "\n")
    lines = []
    for number in range(VAL * len(WNIDS)):
        seed += 1
        name = f"val_{number}.JPEG"
        picture(root / "val" / "images" / name, seed)
        lines.append("\t".join(map(str, [name, WNIDS[number % 3], *box(seed)])))
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    picture(root / "test" / "images" / "test_0.JPEG", 0)  # no labels: not used
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    names = {wnid: f"class {wnid[2]}, a thing" for wnid in WNIDS} | {"n09000000": "not used"}
    (root / "words.txt").write_text("".join(f"{a}\t{b}\n" for a, b in names.items()))
    return folder


@pytest.fixture(scope="module")
def unpacked(published, tmp_path_factory):
    """The same pictures as an ImageFolder."""
    folder = tmp_path_factory.mktemp("shards")
    root, source = folder / "tiny-imagenet", published / "tiny-imagenet-200"
    rows = []
    for name in ("train", "val"):
        for wnid, path, sides in photographs._published(source, name):
            target = root / name / wnid / f"{path.stem}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            rows.append([target.relative_to(root).as_posix(), *map(int, sides)])
    with open(root / "boxes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "x0", "y0", "x1", "y1"], *rows])
    lines = [f"{wnid}\tclass {wnid[2]}, a thing\n" for wnid in sorted(WNIDS)]
    (root / "classes.tsv").write_text("wnid\tname\n" + "".join(lines))
    return folder


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Reading ------------------------------------------------------------------------------------------


def test_the_publishers_layout(published):
    root = photographs.find(published)
    train = photographs.read_split(root, "train")
    assert train.classes == ["class 1", "class 2", "class 3"]  # by WordNet's number
    assert train.labels == [0] * EACH + [1] * EACH + [2] * EACH
    # By number: 2 before 10.
    assert [p.stem for p in train.paths[:EACH]] == [f"n01000000_{k}" for k in range(EACH)]
    # n01000000 was written second, so its first picture is of seed 13; the last pixel is included.
    x0, y0, x1, y1 = box(EACH + 1)
    assert train.boxes[0].tolist() == [x0, y0, x1 + 1, y1 + 1]
    val = photographs.read_split(root, "val")
    assert Counter(val.labels) == {0: VAL, 1: VAL, 2: VAL}
    assert [p.stem for p in val.paths[:VAL]] == [f"val_{k}" for k in (1, 4, 7, 10, 13)]


@pytest.mark.parametrize("name", ["train", "val"])
def test_both_layouts_give_the_same_images_in_the_same_order(published, unpacked, name, tmp_path):
    one, other = (
        photographs.read_split(photographs.find(folder), name) for folder in (published, unpacked)
    )
    assert [p.stem for p in one.paths] == [p.stem for p in other.paths]
    assert (one.labels, one.classes) == (other.labels, other.classes)
    assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(*(photographs.read(split, tmp_path).pixels for split in (one, other)))


def test_pixels_are_those_of_the_files(published, tmp_path):
    split = photographs.read_split(photographs.find(published), "train")
    images = photographs.read(split, tmp_path)
    assert images.pixels.shape == (3 * EACH, 3, 64, 64)
    for place in (0, 5, 20):
        with Image.open(split.paths[place]) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(images.pixels[place].permute(1, 2, 0), expected)
    assert torch.equal(images.boxes, split.boxes)
    assert images.labels.tolist() == split.labels


def test_pixels_are_decoded_once_and_kept_in_one_file(published, tmp_path, monkeypatch):
    split = photographs.read_split(photographs.find(published), "val")
    first = photographs.read(split, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert np.load(kept).dtype == np.uint8
    monkeypatch.setattr(photographs, "_decode", None)
    assert torch.equal(photographs.read(split, tmp_path).pixels, first.pixels)
    with pytest.raises(TypeError):  # another selection is another file
        photographs.read(dataclasses.replace(split, paths=split.paths[:2]), tmp_path)


def test_a_damaged_picture_is_one_sentence(published, tmp_path):
    split = photographs.read_split(photographs.find(published), "val")
    (tmp_path / "0.JPEG").write_bytes(split.paths[0].read_bytes()[:-200])
    broken = dataclasses.replace(split, paths=[tmp_path / "0.JPEG", *split.paths[1:]])
    with pytest.raises(ValueError, match=r"0\.JPEG cannot be read \(truncated\): unpack") as error:
        photographs.read(broken, tmp_path)
    one_sentence(error)


def test_no_pictures_and_unknown_classes_are_one_sentence(unpacked, tmp_path):
    root = tmp_path / "tiny-imagenet"
    shutil.copytree(unpacked / "tiny-imagenet", root)
    (root / "classes.tsv").write_text("wnid\tname\nn01000000\tone\nn02000000\ttwo\n")
    with pytest.raises(ValueError, match="n03000000, which its list of classes lacks") as error:
        photographs.read_split(root, "val")
    one_sentence(error)
    shutil.rmtree(root / "val")
    with pytest.raises(FileNotFoundError, match=r"val holds no pictures .*tiny-imagenet-200") as e:
        photographs.read_split(root, "val")
    one_sentence(e)


# From its publisher -------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def archive(published, tmp_path, monkeypatch):
    """The publisher, who is on this machine."""
    web, name = tmp_path / "web", "tiny-imagenet-200"
    path = Path(shutil.make_archive(str(web / name), "zip", published, name))
    handler = functools.partial(Quiet, directory=str(web))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setattr(photographs, "URL", url)
        monkeypatch.setattr(photographs, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
        yield path
        server.shutdown()


def test_the_set_is_downloaded_once_and_checked(archive, tmp_path):
    folder = tmp_path / "data"
    root = photographs.find(folder)
    assert root == folder / "tiny-imagenet-200"
    assert len(photographs.read_split(root, "val")) == 3 * VAL
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "tiny-imagenet-200"]
    archive.unlink()
    assert photographs.find(folder) == root


@pytest.mark.parametrize("what", ["another file", "nobody there"])
def test_what_cannot_be_downloaded_says_what_to_put_where(archive, tmp_path, what):
    if what == "another file":
        archive.write_bytes(archive.read_bytes() + b"more")
    else:
        archive.unlink()
    folder = tmp_path / "data"
    with pytest.raises(OSError, match="could not be downloaded") as error:
        photographs.find(folder)
    text = one_sentence(error)
    assert f"downloaded into {folder} (" in text
    assert ("corrupted" if what == "another file" else "404") in text
    assert "put the publisher's folder tiny-imagenet-200/ there, unpacked from" in text
    assert [p.name for p in folder.iterdir()] == [".lock"]


def test_url_and_md5_are_the_publishers():
    assert photographs.URL == "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    assert photographs.MD5 == "90528d7ca1a48142e341f4ef8d21d0de"


# Augmentation -------------------------------------------------------------------------------------


def noise(n=6, side=8, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), generator=stream, dtype=torch.uint8)


def squares(n, x, y, extent, mirrored=False):
    full = [torch.full((n,), float(v)) for v in (x, y, extent)]
    return (*full, torch.full((n,), mirrored))


def test_a_crop_of_everything_is_the_image():
    pixels = noise()
    assert torch.equal(crop(pixels, *squares(6, 0, 0, 8)), pixels)


def test_mirrored_twice_is_the_image():
    pixels = noise(side=33)
    once = crop(pixels, *squares(6, 0, 0, 33, mirrored=True))
    assert torch.equal(once, pixels.flip(3))
    assert torch.equal(crop(once, *squares(6, 0, 0, 33, mirrored=True)), pixels)


def test_a_crop_beyond_the_edge_is_moved_and_black_there():
    pixels = noise()
    expected = torch.zeros_like(pixels)
    expected[:, :, 3:, :6] = pixels[:, :, :5, 2:]
    assert torch.equal(crop(pixels, *squares(6, 2, -3, 8)), expected)
    # A crop is mirrored in its own middle.
    assert torch.equal(crop(pixels, *squares(6, 2, -3, 8, mirrored=True)), expected.flip(3))


def test_a_small_crop_is_enlarged():
    pixels = noise(side=8)
    found = crop(pixels, *squares(6, 2, 4, 4))
    part = pixels[:, :, 4:, 2:6].float()
    expected = torch.nn.functional.interpolate(part, scale_factor=2, mode="bilinear")
    # Its outermost pixels also see what lies around the crop.
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert (found[inner].float() - expected[inner]).abs().max() <= 0.5 + 1e-3


def test_without_padding_scaling_and_mirroring_nothing_changes():
    pixels = noise(side=32)
    plain = CroppingRecipe(pad=0, area=1, flip=False)
    assert torch.equal(plain.augmented(pixels, 7), pixels)
    assert torch.equal(Recipe().augmented(pixels, 7), pixels)
    mirrored = CroppingRecipe(pad=0, area=1).augmented(pixels, 7)
    kinds = [
        (torch.equal(a, b), torch.equal(a, b.flip(2)))
        for a, b in zip(mirrored, pixels, strict=True)
    ]
    assert set(kinds) == {(True, False), (False, True)}


def test_crops_are_drawn_by_seed_and_step_alone_and_stay_within_their_bounds(monkeypatch):
    pixels = noise(n=500, side=32)
    recipe = CroppingRecipe(pad=4, area=0.25)
    first = recipe.augmented(pixels, 3)
    torch.manual_seed(5)
    assert torch.equal(recipe.augmented(pixels, 3), first)
    assert not torch.equal(recipe.augmented(pixels, 4), first)
    assert not torch.equal(dataclasses.replace(recipe, seed=1).augmented(pixels, 3), first)

    seen = []
    monkeypatch.setattr(recipes, "crop", lambda pixels, *square: seen.append(square))
    recipe.augmented(pixels, 3)
    ((x, y, extent, mirrored),) = seen
    assert (int(extent.min()), int(extent.max())) == (16, 32)
    assert ((extent / 32) ** 2).mean() == pytest.approx(0.625, abs=0.03)  # areas are uniform
    for corner in (x, y):
        assert corner.min() >= -4
        assert (corner + extent).max() == 36
        assert torch.equal(corner, corner.round())
        assert (corner + extent / 2).mean() == pytest.approx(16, abs=0.6)
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.07)


class Constant(torch.nn.Module):
    """Keeps what it is shown, and gives every image the same logits."""

    num_classes = 5

    def forward(self, x):
        self.seen = x
        return torch.arange(5.0).expand(len(x), -1)


def test_cutmix_takes_a_rectangle_from_another_image_and_weighs_labels_by_area():
    recipe, model = CroppingRecipe(cutmix=True), Constant()
    n, side = 8, 64
    images = torch.arange(float(n))[:, None, None, None].expand(n, 3, side, side)
    labels = torch.arange(n) % 5
    surprise = -torch.log_softmax(torch.arange(5.0).double(), 0)
    shares = []
    for step in range(200):
        loss = recipe.loss(model, images, labels, step)
        assert torch.equal(model.seen[:, 0], model.seen[:, 2])
        # The other image is the one before it in the batch; a rectangle, the same in all images.
        other = model.seen[:, 0] != images[:, 0]
        assert (other == other[0]).all()
        assert torch.equal(other[0], other[0].any(1)[:, None] & other[0].any(0)[None])
        mixed = torch.where(other[0], images.roll(1, 0)[:, 0], images[:, 0])
        assert torch.equal(model.seen[:, 0], mixed)
        share = float(other[0].double().mean())
        expected = (1 - share) * surprise[labels] + share * surprise[labels.roll(1)]
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
        shares.append(share)
    # Areas r^2 are uniform and centres too: E (r - r^2 / 4)^2 = .32 is left within the image.
    assert np.mean(shares) == pytest.approx(0.32, abs=0.05)
    assert max(shares) > 0.7


def test_cutmix_is_drawn_by_seed_and_step_alone_and_leaves_crops_as_they_are():
    recipe, model = CroppingRecipe(cutmix=True), Constant()
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)

    def shown(recipe, step):
        recipe.loss(model, images, labels, step)
        return model.seen

    first = shown(recipe, 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(shown(recipe, 3), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(shown(recipe, 4), first)
    assert not torch.equal(shown(dataclasses.replace(recipe, seed=1), 3), first)
    assert torch.equal(shown(dataclasses.replace(recipe, cutmix=False), 3), images)
    pixels = noise(side=32)
    assert torch.equal(recipe.augmented(pixels, 2), CroppingRecipe().augmented(pixels, 2))


# The study ----------------------------------------------------------------------------------------


RECIPE = CroppingRecipe(images=60, distinct=30, batch_size=3, warmup_steps=2)


@pytest.fixture
def small(unpacked, monkeypatch, tmp_path):
    """The study on three classes, with a training of a second."""
    monkeypatch.setenv("VIT_SEE_DATA", str(unpacked))
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(photographs, "OF_EACH_CLASS", 12)
    monkeypatch.setattr(photographs, "TRAINED_ON", 10)
    monkeypatch.setattr(Photographs, "size", networks.Size(64, 3))
    roles = {**study.arm("vit", RECIPE, ""), **lab.less_data("vit", RECIPE, [10])}
    return Photographs("photographs", roles)


def test_less_data_is_a_part_of_more_and_no_image_is_in_two_sets(small):
    sets = {}
    for name, n in (("vit", 30), ("vit_data_10", 3)):
        data, curve, test = small.training_data(small.role(name), "cpu")
        assert len(data) == n == small.role(name).recipe.distinct
        pixels, labels = data[torch.arange(n)]
        assert labels.bincount().tolist() == [n // 3] * 3
        sets[name] = [image.numpy().tobytes() for image in pixels]
        assert curve.labels.bincount().tolist() == [2, 2, 2]
        assert len(test) == 3 * VAL
        others = {image.numpy().tobytes() for held in (curve, test) for image in held.pixels}
        assert len(others) == 6 + 3 * VAL
        assert others.isdisjoint(sets[name])
    assert sets["vit"][:3] == sets["vit_data_10"]


def test_a_study_that_misses_pictures_says_so(small, monkeypatch):
    monkeypatch.setattr(photographs, "OF_EACH_CLASS", 13)
    told = "has 36 training pictures and should have 13 of each of 3 classes"
    with pytest.raises(ValueError, match=told) as e:
        small.training_data(small.role("vit"), "cpu")
    one_sentence(e)
    with pytest.raises(ValueError, match="has 15 test images and 16 were asked for"):
        small.images(16)


def test_images_are_of_the_validation_set_with_labels_and_boxes(small):
    images = small.images(6)
    assert images.pixels.shape == (6, 3, 64, 64)
    assert images.labels.bincount().tolist() == [2, 2, 2]
    assert small.classes == ["class 1", "class 2", "class 3"]
    places = pictures.order(small.test, 0)[:6]
    assert torch.equal(images.boxes, small.test.boxes[places])
    assert torch.equal(small.images(9).pixels[:6], images.pixels)
    assert not torch.equal(small.images(6, seed=1).pixels, images.pixels)
    expected = (images.pixels[:, 0] / 255 - 0.480) / 0.277
    torch.testing.assert_close(small.to_input(images.pixels, "vit")[:, 0], expected)


def test_training_can_be_interrupted_and_ends_in_a_card_that_is_true(small, tmp_path, monkeypatch):
    card = small.train("vit", tmp_path / "runs")
    kept = tmp_path / "weights" / "photographs"
    assert sorted(p.name for p in kept.iterdir()) == ["vit.json", "vit.safetensors"]
    assert small.is_trained("vit")
    assert small.cards["vit"]["accuracy"] == card["accuracy"]
    assert card["recipe"]["area"] == RECIPE.area
    assert card["recipe"]["pad"] == RECIPE.pad
    assert (card["study"], card["test_images"]) == ("photographs", 15)
    assert card["weights"] == records.weights_hash(small.model("vit"))
    test = small.images(15)

    def normalised(pixels):
        return small.to_input(pixels, "vit")

    accuracy = training.score(small.model("vit"), test.pixels, test.labels, to_input=normalised)
    assert accuracy == pytest.approx(card["accuracy"])

    whole = training.train

    def stopping(*args, **options):
        whole(*args, **options, stop_after=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        small.train("vit", tmp_path / "again", tmp_path / "elsewhere")
    monkeypatch.setattr(training, "train", whole)
    again = small.train("vit", tmp_path / "again", tmp_path / "elsewhere")
    assert again["weights"] == card["weights"]


def test_networks_see_the_studys_inputs_and_the_recipes_crops(small, tmp_path):
    seen = []

    class Spy(torch.nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x.flatten(1))

    data, curve, _ = small.training_data(small.role("vit"), "cpu")
    training.train(
        Spy(3 * 64 * 64, 3), RECIPE, data, (curve.pixels, curve.labels), tmp_path,
        stop_after=1, to_input=lambda pixels: small.to_input(pixels, "vit"),
    )  # fmt: skip
    pixels, _ = data[training._order(RECIPE, 0)]
    shown = small.to_input(RECIPE.augmented(pixels, 0), "vit")
    torch.testing.assert_close(seen[0], shown)
    torch.testing.assert_close(seen[1], small.to_input(curve.pixels, "vit"))


def test_the_study_is_measured_like_the_lab(small):
    record = measure(small, ["vit_untrained"], [MinibatchCKA("blocks")], 10, 5)
    assert record.sizes["tap"] == 8
    assert np.isfinite(record["cka"].values).all()
    assert record.attrs["pictures"] == "validation set of Tiny-ImageNet-200, 64 pixels"
    assert record.attrs["study"] == "photographs"


def test_missing_weights_name_the_study(small):
    with pytest.raises(FileNotFoundError, match="lib train --study photographs vit") as e:
        small.model("vit")
    one_sentence(e)


def test_recipes_fit_the_data():
    chosen = load_study("photographs")
    for role in chosen.roles.values():
        assert role.recipe.images % role.recipe.batch_size == 0
        assert role.recipe.distinct % role.recipe.batch_size == 0
        assert role.recipe.distinct % 200 in (0, 80, 120)  # classes take turns: even, or nearly
        assert role.recipe.distinct == round(role.share * photographs.TRAINED_ON * 200)
    assert chosen.role("vit_data_10").share == 0.1
    again = dataclasses.replace(chosen.find("vit", 1).recipe, seed=0)
    assert again == chosen.roles["vit"].recipe == chosen.roles["resnet"].recipe


def test_the_second_editions_photographs():
    chosen = load_study("photographs")
    counts = Counter(role.arm for role in chosen.roles.values())
    twice = (
        "vit_gap",
        "vit_cutmix",
        "vit_data_03",
        "vit_muon",
        "vit_no_skip_middle",
        "vit_data_10",
    )
    assert counts == {"vit": 3, "resnet": 3, "mixer": 1} | dict.fromkeys(twice, 2)
    assert chosen.find("vit", 2).name == "vit_seed_2"
    assert (chosen.find("vit_no_skip_middle", 1).cut, chosen.find("vit").cut) == (4, None)
    assert dataclasses.asdict(chosen.role("vit_seed_2").recipe) == {
        **{"images": 1_599_984, "distinct": 96_000, "batch_size": 48, "optimiser": "adamw"},
        **{"lr": 1e-3, "warmup_steps": 1000, "weight_decay": 0.05, "clip": 1.0},
        **{"betas": (0.9, 0.98), "fade": 0.0, "until": 1.0, "seed": 2},
        **{"pad": 4, "area": 0.35, "flip": True, "cutmix": False},
    }
    plain = chosen.role("vit").recipe
    for name, change in (("vit_muon", {"optimiser": "muon"}), ("vit_cutmix", {"cutmix": True})):
        assert chosen.role(name).recipe == dataclasses.replace(plain, **change)
    assert chosen.size == networks.Size(image=64, classes=200)


# The real pictures --------------------------------------------------------------------------------


@pytest.mark.optional
def test_the_real_validation_set(tmp_path):
    if not (REAL / "val.zip").is_file():
        pytest.skip("Tiny-ImageNet is not beside the repository, in ../shared/data/tiny-imagenet")
    root = tmp_path / "tiny-imagenet"
    root.mkdir()
    for name in ("classes.tsv", "boxes.csv"):
        shutil.copyfile(REAL / name, root / name)
    with zipfile.ZipFile(REAL / "val.zip") as archive:
        names = [n for n in archive.namelist() if int(n.rpartition("_")[2].split(".")[0]) < 300]
        archive.extractall(root, names)
    split = photographs.read_split(root, "val")
    assert (len(split), len(split.classes)) == (300, 200)
    assert split.classes[0] == "goldfish"
    images = photographs.read(split, tmp_path)
    boxes = images.boxes
    assert ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, :2] >= 0) & (boxes[:, 2:] <= 64)).all()
    inputs = load_study("photographs").to_input(images.pixels, "vit")
    assert inputs.mean((0, 2, 3)).abs().max() < 0.15
    assert inputs.std((0, 2, 3)).tolist() == pytest.approx([0.94] * 3, abs=0.1)
