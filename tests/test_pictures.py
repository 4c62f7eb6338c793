"""Picture files of every kind are read as an eye would see them, or left out and counted."""

import hashlib
import struct
import tarfile
import warnings
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from lib.studies import pictures
from lib.studies.images import Images
from lib.studies.pictures import in_folder, of_torchvision, read

COLOUR = (200, 80, 20)


def plain(colour=COLOUR, size=(60, 48), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


def noise(seed, size=(60, 48)):
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path):
    """Four classes with one to four pictures each, all different."""
    number = 0
    for label, count in enumerate((4, 1, 3, 2)):
        (tmp_path / "abcd"[label]).mkdir()
        for k in range(count):
            noise(number).save(tmp_path / "abcd"[label] / f"{k}.png")
            number += 1
    return tmp_path


def one(path, **options):
    """The pixels of a single file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pictures.Pictures("here", [path], None, [])
        return read(found, 1, **{"resize": 32, "crop": 24} | options).pixels[0]


# Reading right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 500), (640, 257), (30, 41), (224, 224)])
def test_the_crop_is_torchvisions(tmp_path, size):
    noise(1, size).save(tmp_path / "a.png")
    usual = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])
    expected = torch.from_numpy(np.array(usual(noise(1, size)))).permute(2, 0, 1)
    assert torch.equal(one(tmp_path / "a.png", resize=256, crop=224), expected)


@pytest.mark.parametrize(
    ("kind", "save"),
    [
        ("palette", lambda path: plain().quantize(8).save(path.with_suffix(".png"))),
        ("cmyk", lambda path: plain(mode="CMYK").save(path.with_suffix(".jpg"), quality=100)),
        ("upper case", lambda path: plain().save(path.with_suffix(".PNG"))),
        ("webp", lambda path: plain().save(path.with_suffix(".webp"), lossless=True)),
        ("tiff", lambda path: plain().save(path.with_suffix(".tif"))),
        (
            "transparent corner",
            lambda path: plain(mode="RGBA").save(path.with_suffix(".png")),
        ),
    ],
)
def test_colours_come_out_as_they_look(tmp_path, kind, save):
    save(tmp_path / "a")
    (path,) = in_folder(tmp_path).paths
    found = one(path).float()
    assert found.shape == (3, 24, 24)
    for channel, value in enumerate(COLOUR):
        assert float((found[channel] - value).abs().max()) <= 3, kind


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_grey_is_grey_of_the_right_brightness(tmp_path, bits):
    if bits == 16:
        Image.fromarray(np.full((40, 40), 180 * 257, dtype=np.uint16)).save(tmp_path / "a.png")
    else:
        Image.new({1: "1", 8: "L"}[bits], (40, 40), 180).save(tmp_path / "a.png")
    expected = 255 if bits == 1 else 180
    assert one(tmp_path / "a.png").unique().tolist() == [expected]


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (40, 40), (10, 20, 30, 0)).save(tmp_path / "a.png")
    indexed = Image.new("P", (40, 40), 1)
    indexed.putpalette([0, 0, 0, 9, 9, 9])
    indexed.save(tmp_path / "b.png", transparency=1)
    for name in "ab":
        assert one(tmp_path / f"{name}.png").unique().tolist() == [255]


def test_a_turned_camera_is_turned_back(tmp_path):
    upright = plain((250, 250, 250), (40, 40))
    upright.paste((0, 0, 0), (0, 0, 40, 20))  # black above, white below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90).save(tmp_path / "a.jpg", exif=exif, quality=100)
    found = one(tmp_path / "a.jpg").float()
    assert float(found[:, :8].mean()) < 10
    assert float(found[:, -8:].mean()) > 240


# Reading around what is broken --------------------------------------------------------------------


def break_some(folder):
    """One file of every kind of trouble; eight are left of ten."""
    (folder / "a" / "0.png").write_bytes(b"")
    data = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "1.png").write_bytes(data[: len(data) // 2])
    (folder / "c" / "page.jpg").write_text("<html>404</html>")
    noise(3, (2000, 20)).save(folder / "d" / "strip.png")
    Image.fromarray(np.ones((9, 9), dtype=np.float32)).save(folder / "d" / "float.tif")
    broken = bytearray((folder / "d" / "0.png").read_bytes())
    broken[1000:1100] = bytes(100)  # inside its compressed pixels
    (folder / "d" / "broken.png").write_bytes(broken)
    (folder / "notes.txt").write_text("not a picture, and not counted")
    (folder / "d" / "._0.png").write_bytes(b"of a Macintosh")
    Image.fromarray(np.full((9, 9), 200, dtype=np.int32)).save(folder / "d" / "int.tif")


def seed_that_draws_last(path):
    """So that all others are tried before it, whatever class they are of."""
    for seed in range(2000):
        folder = next(parent for parent in path.parents if parent.name.startswith("test_"))
        found = in_folder(folder)
        if found.paths[pictures.order(found, seed)[-1]] == path:
            return seed
    raise AssertionError


def test_broken_files_are_counted_once_and_others_take_their_place(folder):
    whole = {image.numpy().tobytes() for image in read(in_folder(folder), 10).pixels}
    break_some(folder)
    with pytest.warns(UserWarning, match="could not be used") as caught:
        images = read(in_folder(folder), 8, seed=seed_that_draws_last(folder / "d" / "1.png"))
    (warning,) = [str(w.message) for w in caught]
    assert warning.startswith("7 of the pictures could not be used, and others of ")
    assert f"{folder} take their place: " in warning
    for reason in (
        "1 empty (0.png)",
        "1 truncated (1.png)",
        "1 no picture of a known format (page.jpg)",
        "1 more than 20 times as long as wide (strip.png)",
        "1 in floating point, with no known range (float.tif)",
        "1 in 32-bit integers, with no known range (int.tif)",
        "1 damaged (broken.png)",
    ):
        assert reason in warning
    found = [image.numpy().tobytes() for image in images.pixels]
    assert len(set(found)) == 8
    assert set(found) < whole
    assert sorted(images.labels.tolist()) == [0, 0, 1, 2, 2, 2, 3, 3]


def test_too_few_pictures_are_one_sentence(folder):
    break_some(folder)
    with pytest.raises(ValueError, match="8 pictures that can be read, and 9 were asked") as error:
        read(in_folder(folder), 9)
    assert "1 empty (0.png)" in str(error.value)
    assert "\n" not in str(error.value)


def test_several_of_a_kind_share_a_reason(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(b"")
    noise(0).save(tmp_path / "good.png")
    with pytest.warns(UserWarning, match=r"3 empty \([012]\.jpg, \.\.\.\)") as caught:
        images = read(in_folder(tmp_path), 1, seed=seed_that_draws_last(tmp_path / "good.png"))
    assert len(caught) == 1
    assert len(images) == 1


# Which pictures -----------------------------------------------------------------------------------


def test_labels_are_the_subfolders_in_alphabetical_order(folder):
    pictures = in_folder(folder)
    assert pictures.classes == ["a", "b", "c", "d"]
    images = read(pictures, 10, resize=32, crop=24)
    for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
        of_class = [one(path) for path in (folder / "abcd"[label]).iterdir()]
        assert any(torch.equal(pixels, candidate) for candidate in of_class)
    assert images.labels.dtype == torch.long
    assert images.pixels.dtype == torch.uint8
    assert bool(images.boxes.isnan().all())
    assert images.boxes.shape == (10, 4)


def test_classes_take_turns_and_fewer_pictures_are_the_first_of_more(folder):
    pictures = in_folder(folder)
    images = read(pictures, 10, seed=3)
    assert sorted(images.labels[:4].tolist()) == [0, 1, 2, 3]
    assert sorted(images.labels[4:7].tolist()) == [0, 2, 3]
    assert sorted(images.labels[7:].tolist()) == [0, 0, 2]
    again = read(pictures, 6, seed=3)
    assert torch.equal(again.pixels, images.pixels[:6])
    other = read(pictures, 6, seed=4)
    assert not torch.equal(other.pixels, again.pixels)


def test_pictures_without_classes_have_no_labels_and_say_so(tmp_path):
    (tmp_path / "deeper").mkdir()
    for k in range(3):
        noise(k).save(tmp_path / ("deeper" if k else "") / f"{k}.png")
    images = read(in_folder(tmp_path), 3)
    for part in (images, images[1:], images[torch.tensor([0, 2])]):
        with pytest.raises(ValueError, match="these images have no labels") as error:
            part.labels  # noqa: B018
        assert "one subfolder per class" in str(error.value)
    assert len(images[1:]) == 2
    assert torch.equal(images[torch.tensor([2, 0])].pixels, images.pixels[[2, 0]])


def test_some_of_the_images_keep_what_is_known_of_them():
    images = Images(torch.arange(4).view(4, 1, 1, 1), torch.arange(4) * 10, torch.rand(4, 4))
    part = images[1:3]
    assert part.labels.tolist() == [10, 20]
    assert torch.equal(part.boxes, images.boxes[1:3])


@pytest.mark.parametrize(
    "left", [".ipynb_checkpoints", ".Trash-1000", "@eaDir", "__MACOSX", ".cache", "$RECYCLE.BIN"]
)
def test_folders_that_systems_leave_behind_hold_no_pictures(folder, left):
    before = in_folder(folder)
    for place in (folder, folder / "a", folder / "a" / left / "b"):
        (place / left).mkdir(parents=True)
        noise(50).save(place / left / "x.png")
    noise(51).save(folder / "b" / "._0.png")
    (folder / "b" / "folder.jpg").mkdir()
    assert in_folder(folder) == before


def test_a_hidden_folder_beside_splits_is_no_class(tmp_path):
    for name in ("train", "val", ".cache"):
        (tmp_path / name).mkdir()
        noise(0).save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match="holds train and val: name one of them"):
        in_folder(tmp_path)


def test_a_hidden_folder_may_hold_the_folder(tmp_path):
    (tmp_path / ".data" / "a").mkdir(parents=True)
    noise(0).save(tmp_path / ".data" / "a" / "0.png")
    assert in_folder(tmp_path / ".data").classes == ["a"]


def test_equal_pictures_are_counted_once(folder):
    for k, name in enumerate(("a/0.png", "a/0.png", "c/2.png")):
        (folder / "b" / f"copy{k}.png").write_bytes((folder / name).read_bytes())
    with pytest.warns(UserWarning, match=r"^3 of 13 pictures of .* equal another") as caught:
        read(in_folder(folder), 13)
    assert len(caught) == 1


@pytest.mark.parametrize("case", ["nothing", "empty", "no pictures", "splits"])
def test_a_folder_that_cannot_be_meant_is_one_sentence(tmp_path, case):
    if case == "nothing":
        tmp_path = tmp_path / "nowhere"
    if case == "no pictures":
        (tmp_path / "readme.txt").write_text("")
    if case == "splits":
        for split in ("train", "val"):
            (tmp_path / split / "cat").mkdir(parents=True)
            noise(0).save(tmp_path / split / "cat" / "0.png")
    says = {"nothing": "no folder", "splits": "holds train and val: name one of them"}
    with pytest.raises(
        (FileNotFoundError, ValueError), match=says.get(case, "no pictures in")
    ) as e:
        in_folder(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


# Data sets of torchvision -------------------------------------------------------------------------


@pytest.fixture
def imagenette(tmp_path, monkeypatch):
    """Imagenette's own loader, with an archive of two classes on this machine's own server."""
    content = tmp_path / "server"
    for wnid, colour in (("n01440764", "red"), ("n03888257", "blue")):
        (content / "imagenette2-320" / "val" / wnid).mkdir(parents=True)
        for k in range(3):
            plain(colour).save(content / "imagenette2-320" / "val" / wnid / f"{k}.JPEG")
    with tarfile.open(content / "imagenette2-320.tgz", "w:gz") as archive:
        archive.add(content / "imagenette2-320", "imagenette2-320")
    data = (content / "imagenette2-320.tgz").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sent = data
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/imagenette2-320.tgz"
    archives = {"320px": (url, hashlib.md5(data).hexdigest())}
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", archives)
    yield server
    server.shutdown()
    server.server_close()


class Handler(SimpleHTTPRequestHandler):
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.sent)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.server.sent)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def nette(root):
    return of_torchvision("Imagenette", root, split="val", size="320px")


def test_torchvision_downloads_once(imagenette, tmp_path):
    pictures = nette(tmp_path / "data")
    assert pictures.classes == ["tench", "parachute"]
    images = read(pictures, 4, resize=32, crop=24)
    assert sorted(images.labels.tolist()) == [0, 0, 1, 1]
    red, blue = (images.pixels[images.labels == label].float().mean((0, 2, 3)) for label in (0, 1))
    assert red[0] > 200 > 60 > red[2]
    assert blue[2] > 200 > 60 > blue[0]
    before = Handler.requests
    assert nette(tmp_path / "data").paths == pictures.paths
    assert Handler.requests == before
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {".lock", "imagenette2-320"}


def test_half_a_download_leaves_nothing(imagenette, tmp_path):
    whole = imagenette.sent
    imagenette.sent = whole[: len(whole) // 2]
    with pytest.raises(OSError, match="Imagenette could not be downloaded") as error:
        nette(tmp_path / "data")
    assert "a folder of pictures instead" in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {".lock"}
    imagenette.sent = whole
    assert len(nette(tmp_path / "data").paths) == 6


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Imagenet", {}, "torchvision has no 'Imagenet'; Imagenette is"),
        ("ImageNet", {"split": "val"}, "archive ILSVRC2012_devkit_t12.tar.gz is not present"),
        ("Imagenette", {"splot": "val"}, "does not take these options"),
        ("FakeData", {}, "keeps no picture files, as Imagenette does"),
    ],
)
def test_other_data_sets_are_refused_with_a_reason(tmp_path, name, options, says):
    with pytest.raises((ValueError, RuntimeError), match=says) as error:
        of_torchvision(name, tmp_path, **options)
    assert "\n" not in str(error.value)


def test_a_small_file_that_claims_to_be_huge_is_left_out(tmp_path):
    plain().save(tmp_path / "good.png")
    data = bytearray((tmp_path / "good.png").read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"1 larger than is safe to decode \(bomb.png\)"):
        read(in_folder(tmp_path), 2)
