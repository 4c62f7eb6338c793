"""Weights come through timm's and the hub's real clients, from a server on this machine.

The server holds a small random checkpoint and can be told to fail in every way that hubs do.
"""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import safetensors.torch
import timm
import torch
import xarray as xr
from huggingface_hub import constants, file_download
from PIL import Image

from lib.__main__ import main
from lib.records import ROOT, weights_hash
from lib.studies import hub
from lib.studies.public import Public, PublicRole, Source

NAME = "test_vit.r160_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


ANSWERS = {
    "bad token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {}),
    "too many": (429, {}),
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for when it downloads one file."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, file = self.server, self.path.rpartition("/")[2]
        server.asked.append((self.command, self.path))
        content = server.files.get(self.path)
        if server.fault == "down":
            return self.answer(503, {}, b"maintenance")
        if server.fault == "gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"}, b"")
        if server.fault == "login page":
            return self.answer(200, {"Content-Type": "text/html"}, b"<html>who are you?</html>")
        if server.fault in ANSWERS:
            return self.answer(*ANSWERS[server.fault], b"")
        if content is None:
            known = any(path.split("/resolve/")[0] in self.path for path in server.files)
            code = "EntryNotFound" if known else "RepoNotFound"
            return self.answer(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b"")
        told = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "ETag": f'"{file}"',
        }
        if self.command == "GET" and server.fault == "other bytes":
            content = content[:-8] + bytes(8)
        if self.command == "GET" and server.fault == "shorter":
            content = content[: len(content) // 2]
        if self.command == "GET" and server.fault == "cut":
            if "Range" in self.headers:
                self.close_connection = True
                return None
            return self.answer(200, told, content[: len(content) // 2], length=len(content))
        return self.answer(200, told, content)

    do_HEAD = do_GET

    def answer(self, status, headers, content, length=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        self.close_connection = length is not None

    def log_message(self, *_):
        pass


def random_network(name=NAME, seed=5, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **options).eval()


@pytest.fixture(scope="module")
def network():
    return random_network()


@pytest.fixture(scope="module")
def content(network):
    return safetensors.torch.save(network.state_dict())


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    """A hub with one checkpoint, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {f"/timm/{NAME}/resolve/main/model.safetensors": content}
    server.fault, server.asked = None, []
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.home = tmp_path / "home"
    # The client reads HF_ENDPOINT and HF_HOME when it is imported.
    point_to(server.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    hub.config.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


def point_to(address, monkeypatch):
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def kept(server):
    """Files in the cache that are weights, or could be taken for some."""
    return [p for p in server.home.rglob("*") if p.is_file() and p.stat().st_size > 1000]


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# When all is well ---------------------------------------------------------------------------------


def test_weights_are_those_of_the_hub_and_downloaded_once(server, network):
    assert not hub.is_here(NAME)
    model = hub.pretrained(NAME, size=160)
    assert weights_hash(model) == weights_hash(network)
    assert not model.training
    assert hub.is_here(NAME)
    asked = ("GET", f"/timm/{NAME}/resolve/main/model.safetensors")
    assert server.asked.count(asked) == 1
    assert weights_hash(hub.pretrained(NAME, size=160)) == weights_hash(network)
    assert server.asked.count(asked) == 1


def test_what_is_here_needs_no_hub(server, network, monkeypatch):
    hub.fetch(NAME)
    server.fault = "down"
    assert weights_hash(hub.pretrained(NAME, size=160)) == weights_hash(network)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.asked)
    assert weights_hash(hub.pretrained(NAME, size=160)) == weights_hash(network)
    assert len(server.asked) == asked


def test_an_older_repository_has_another_file(server, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "weights")
    server.files = {
        f"/timm/{NAME}/resolve/main/pytorch_model.bin": (tmp_path / "weights").read_bytes()
    }
    assert weights_hash(hub.pretrained(NAME, size=160)) == weights_hash(network)


def test_a_network_that_somebody_else_put_on_the_hub(server, network, content):
    name = "hf-hub:somebody/my-vit"
    config = {
        "architecture": "test_vit",
        "num_classes": 1000,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "num_classes": 1000}
        | {"input_size": [3, 160, 160], "fixed_input_size": True, "classifier": "head"},
    }
    at = "/somebody/my-vit/resolve/main"
    server.files = {f"{at}/config.json": json.dumps(config).encode()}
    server.files[f"{at}/model.safetensors"] = content
    assert weights_hash(hub.pretrained(name, size=160)) == weights_hash(network)
    study = Public("mine", {"vit": PublicRole(name)}, Source(folder="."))
    white = study.to_input(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), "vit")
    torch.testing.assert_close(white[0, :, 0, 0], torch.tensor([1.8, 1.6, 1.4]))


# When it is not -----------------------------------------------------------------------------------


FAULTS = {
    "not there": ("has no weights of that name", ("(404)", "HF_ENDPOINT", "file of weights")),
    "down": ("does not answer", ("HF_ENDPOINT", "HF_HOME", "file of weights")),
    "refused": ("does not answer", ("HF_ENDPOINT", "HF_HOME", "file of weights")),
    "offline": ("HF_HUB_OFFLINE forbids", ("unset it", "HF_HOME", "file of weights")),
    "gated": ("only to those who have accepted", ("HF_TOKEN", "file of weights")),
    "bad token": (r"refuses to give it \(401\)", ("HF_TOKEN", "unset it", "file of weights")),
    "forbidden": (r"refuses to give it \(403\)", ("HF_TOKEN", "file of weights")),
    "too many": (r"refuses to give it \(429\)", ("wait", "HF_TOKEN", "file of weights")),
    "login page": ("answers as no hub does", ("login page", "HF_ENDPOINT", "file of weights")),
    "other bytes": ("are damaged: their SHA-256", ("were removed", "HF_ENDPOINT")),
    "shorter": ("broke off", ("nothing was kept", "HF_ENDPOINT", "file of weights")),
    "cut": ("broke off", ("nothing was kept", "HF_ENDPOINT", "file of weights")),
    "no room": ("no room in", ("nothing was kept", "HF_HOME")),
    "no permission": ("cannot be written to", ("HF_HOME",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_trouble_is_one_sentence_with_a_cure_and_leaves_nothing(fault, server, monkeypatch):
    server.fault = fault
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "not there":
        server.files = {}
    elif fault == "refused":
        point_to("http://127.0.0.1:9", monkeypatch)
    elif fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif fault == "no room":  # files cannot grow beyond this, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    elif fault == "no permission":
        server.home.mkdir()
        (server.home / "hub").write_text("a file in the place of the folder")
        monkeypatch.setattr(os, "makedirs", refuse)
    try:
        with pytest.raises(hub.HubError, match=FAULTS[fault][0]) as error:
            hub.pretrained(NAME, size=160)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = sentence(error)
    assert NAME in text
    for cure in FAULTS[fault][1]:
        assert cure in text
    assert not kept(server)
    assert not hub.is_here(NAME)


def refuse(path, *_, **__):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.mark.parametrize("fault", ["other bytes", "shorter", "cut"])
def test_after_a_failed_download_the_next_one_is_whole(fault, server, network):
    server.fault = fault
    with pytest.raises(hub.HubError):
        hub.fetch(NAME)
    server.fault = None
    assert weights_hash(hub.pretrained(NAME, size=160)) == weights_hash(network)


def test_weights_that_rotted_on_the_disk_are_noticed(server):
    blob = hub.fetch(NAME).resolve()
    data = bytearray(blob.read_bytes())
    data[-100] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(hub.HubError, match="are damaged"):
        hub.pretrained(NAME, size=160)
    assert not hub.is_here(NAME)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_bass_patch16_224", "no network 'vit_bass_patch16_224' .is it 'vit_base_patch16_224'"),
        ("test_vit.r161_in1k", "no network 'test_vit.r161_in1k' .is it 'test_vit.r160_in1k'"),
        ("", "no network ''"),
    ],
)
def test_a_name_that_timm_does_not_know(name, says):
    with pytest.raises(ValueError, match=says) as error:
        hub.pretrained(name)
    sentence(error)


# From a file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pth", "training"])
def test_weights_from_a_file(tmp_path, network, kind):
    path = tmp_path / f"weights.{kind.replace('training', 'pth.tar')}"
    if kind == "safetensors":
        safetensors.torch.save_file(network.state_dict(), path)
    else:
        state = network.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if kind == "training" else state, path)
    assert weights_hash(hub.pretrained(NAME, 160, path)) == weights_hash(network)


@pytest.mark.parametrize("classes", [0, 7])
def test_a_file_may_have_another_number_of_classes(tmp_path, classes):
    network = random_network(num_classes=classes)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    model = hub.pretrained(NAME, 160, path)
    assert weights_hash(model) == weights_hash(network)
    untrained = hub.build(NAME, 0, 160, path).state_dict()
    assert {k: v.shape for k, v in untrained.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_a_network_built_for_another_size_takes_the_studys(tmp_path, network):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    model = hub.pretrained(NAME, 224, path)
    assert model.pos_embed.shape[1] == (224 // 16) ** 2 + model.num_prefix_tokens
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    same = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in same.items())


@pytest.mark.parametrize("case", ["absent", "half", "no weights", "of another network", "one more"])
def test_a_file_that_does_not_fit_is_one_sentence(tmp_path, network, content, case):
    path = tmp_path / "weights.safetensors"
    if case == "half":
        path.write_bytes(content[: len(content) // 2])
    elif case == "no weights":
        path.write_bytes(b"<html>not found</html>")
    elif case == "of another network":
        safetensors.torch.save_file(random_network("test_resnet").state_dict(), path)
    elif case == "one more":
        extra = network.state_dict() | {"decoder.weight": torch.zeros(3)}
        safetensors.torch.save_file(extra, path)
    says = {
        "absent": "no file of weights",
        "half": "cannot be read as weights",
        "no weights": "cannot be read as weights",
        "of another network": "does not hold weights of test_vit.r160_in1k: ",
        "one more": "decoder.weight",
    }
    with pytest.raises((hub.HubError, FileNotFoundError), match=says[case]) as error:
        hub.pretrained(NAME, 160, path)
    assert "weights.safetensors" in sentence(error)


# Random weights -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_random_weights_and_disturbs_no_other():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (hub.build(NAME, seed, 160) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert weights_hash(first) == weights_hash(again) != weights_hash(other)
    assert not first.training


# The whole way ------------------------------------------------------------------------------------


ARGUMENTS = ["measure", "--vit", NAME, "--images", "pictures", "--out", "record.nc"]
ARGUMENTS += ["--n-images", "8", "--batch-size", "4", "--taps", "blocks"]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for k in range(8):
        pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / f"{k}.png")
    (tmp_path / "pictures" / "empty.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore:1 of the pictures")
def test_trouble_on_the_command_line(server, tmp_path, pictures, capsys):
    server.fault = "gated"
    assert main(ARGUMENTS) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"{NAME} could not be downloaded ({server.address} gives it only to")
    assert not list(tmp_path.rglob("*.nc*"))


def test_the_environment_says_where_the_hub_is(server, tmp_path, pictures, network):
    environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": str(server.home)}
    run = subprocess.run(
        [sys.executable, "-m", "lib", *ARGUMENTS],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "record.nc: CKA of" in run.stdout
    with xr.open_dataset(tmp_path / "record.nc", engine="h5netcdf") as record:
        assert set(record["role"].values.tolist()) == {"vit"}
        assert record.attrs["networks"] == str({"vit": NAME})
        of_network = weights_hash(hub.pretrained(NAME, 224))
        assert record.attrs["weights"] == str({"vit": of_network})
        assert record.attrs["n_images"] == "8"
