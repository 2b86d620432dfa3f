"""MNIST on disk and from a mirror on loopback: what is verified, and that nothing bad enters the cache."""

import gzip
import hashlib
import http.server
import os
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch

from l2l_fast.data import halves, mnist

module = sys.modules["l2l_fast.data.mnist"]  # the function hides it in the package
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def tiny_files(count=12) -> dict[str, bytes]:
    """Unzipped files of MNIST's form, ``count`` images of 2x2."""
    files = {}
    for name in module._SHA256:
        if "images" in name:
            files[name] = struct.pack(">4B3I", 0, 0, 8, 3, count, 2, 2) + bytes(range(4 * count))
        else:
            files[name] = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(i % 10 for i in range(count))
    return files


@pytest.fixture
def tiny(monkeypatch) -> dict[str, bytes]:
    """Tiny files in MNIST's place, gzipped under the names that mirrors serve."""
    files = tiny_files()
    for name, content in files.items():
        monkeypatch.setitem(module._SHA256, name, hashlib.sha256(content).hexdigest())
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache, and no folder of data sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("L2L_FAST_DATA", raising=False)
    return tmp_path / "cache" / "l2l_fast" / "mnist"


class Mirror(http.server.ThreadingHTTPServer):
    """Serves ``files`` by name and keeps the names asked for; those in ``cut`` lose the connection half way."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.cut = {}, [], set()
        self.address = f"http://127.0.0.1:{self.server_port}/files/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/files/")
        self.server.asked.append(name)
        content = self.server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if name in self.server.cut else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("L2L_FAST_MNIST_URL", server.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def content_of(dataset) -> set:
    return {(int(target), *image.flatten().mul(255).round().int().tolist()) for image, target in
            zip(dataset.inputs, dataset.targets, strict=True)}  # fmt: skip


EXPECTED = {(i % 10, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3) for i in range(12)}


def test_downloads_once_and_verifies(tiny, cache, mirror):
    mirror.files = tiny
    dataset = mnist()
    assert content_of(dataset) == EXPECTED
    assert (dataset.name, dataset.classes, dataset.inputs.shape) == ("mnist", 10, (12, 2, 2))
    assert sorted(mirror.asked) == sorted(path.name for path in cache.iterdir()) == [f"{IMAGES}.gz", f"{LABELS}.gz"]
    assert mnist() is dataset
    assert content_of(mnist(split="test")) == EXPECTED
    assert len(mirror.asked) == len(list(cache.iterdir())) == 4


def corrupted(content: bytes) -> bytes:
    """Another image in a file that is otherwise well formed: only the hash tells."""
    return gzip.compress(gzip.decompress(content)[:-1] + b"\xff")


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "corrupted": corrupted,
    "bits flipped": lambda content: content[:30] + bytes([content[30] ^ 0xFF]) + content[31:],
    "a page instead": lambda content: b"<html>Sign in to the hotel's network</html>",
    "nothing": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_bad_download_never_enters_the_cache(tiny, cache, mirror, name, damage):
    name = f"{name}.gz"
    mirror.files = tiny | {name: DAMAGE[damage](tiny[name])}
    with pytest.raises(RuntimeError, match="could not download") as caught:
        mnist()
    message = str(caught.value)
    assert name in message
    assert mirror.address + name in message
    assert "L2L_FAST_MNIST_URL" in message
    assert ".download-" not in message  # a scratch file that is gone
    assert name not in [path.name for path in cache.iterdir()]
    assert not [path for path in cache.iterdir() if path.is_dir()]

    mirror.files = tiny  # the mirror is repaired: the next call goes through
    assert content_of(mnist()) == EXPECTED


def test_connection_lost_half_way(tiny, cache, mirror):
    mirror.files, mirror.cut = tiny, {f"{IMAGES}.gz"}
    with pytest.raises(RuntimeError, match=f"{mirror.address}{IMAGES}.gz"):
        mnist()
    assert list(cache.iterdir()) == []


def test_mirror_without_the_file(tiny, cache, mirror):
    with pytest.raises(RuntimeError, match="404"):
        mnist()


def test_public_mirrors_are_tried_in_turn(tiny, cache, mirror, monkeypatch):
    mirror.files = tiny
    monkeypatch.delenv("L2L_FAST_MNIST_URL")
    monkeypatch.setattr(module, "_MIRRORS", (mirror.address + "gone/", mirror.address))
    assert content_of(mnist()) == EXPECTED
    assert mirror.asked[:2] == [f"gone/{IMAGES}.gz", f"{IMAGES}.gz"]


def test_no_pooch(tiny, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install l2l_fast\[data\]") as caught:
        mnist()
    assert str(cache) in str(caught.value)


@pytest.mark.parametrize("place", ["folder", "folder/mnist", "environment", "environment/mnist", "cache"])
@pytest.mark.parametrize("zipped", [True, False])
def test_finds_files(tiny, cache, mirror, monkeypatch, tmp_path, place, zipped):
    files = tiny if zipped else {name.removesuffix(".gz"): gzip.decompress(data) for name, data in tiny.items()}
    write(cache if place == "cache" else tmp_path / place, files)
    if place.startswith("environment"):
        monkeypatch.setenv("L2L_FAST_DATA", str(tmp_path / "environment"))
    folder = tmp_path / "folder" if place.startswith("folder") else None
    dataset = mnist(folder)
    assert content_of(dataset) == EXPECTED
    assert dataset is mnist(folder)
    assert mirror.asked == []


def test_the_folder_comes_before_the_environment(tiny, cache, monkeypatch, tmp_path):
    write(tmp_path / "one", tiny)
    write(tmp_path / "two", {name: b"never read" for name in tiny})
    monkeypatch.setenv("L2L_FAST_DATA", str(tmp_path / "two"))
    assert content_of(mnist(tmp_path / "one")) == EXPECTED
    with pytest.raises(ValueError, match="not an IDX file"):
        mnist()


@pytest.mark.parametrize("damage", DAMAGE)
def test_found_files_are_verified(tiny, cache, mirror, tmp_path, damage):
    bad = tmp_path / f"{LABELS}.gz"
    write(tmp_path, tiny | {bad.name: DAMAGE[damage](tiny[bad.name])})
    with pytest.raises(ValueError, match="Replace the file, or delete it") as caught:
        mnist(tmp_path)
    assert str(bad) in str(caught.value)


def test_folder_that_is_none(cache, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="typo"):
        mnist(tmp_path / "typo")
    monkeypatch.setenv("L2L_FAST_DATA", str(tmp_path / "typo"))
    with pytest.raises(FileNotFoundError, match="L2L_FAST_DATA"):
        mnist()


def test_unknown_split():
    with pytest.raises(ValueError, match="train, test"):
        mnist(split="valid")


@pytest.fixture
def real() -> Path:
    for place in [Path(os.environ["L2L_FAST_DATA"])] if "L2L_FAST_DATA" in os.environ else []:
        for folder in (place, place / "mnist"):
            if (folder / f"{IMAGES}.gz").is_file():
                return folder.resolve()
    pytest.skip("L2L_FAST_DATA names no folder with MNIST's gzipped files")


@pytest.mark.mnist
def test_real_files(real):
    dataset = mnist(real)
    assert (dataset.inputs.shape, dataset.inputs.dtype) == ((60000, 28, 28), torch.float32)
    assert (dataset.inputs.min(), dataset.inputs.max()) == (0, 1)
    assert dataset.targets.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert dataset is mnist(real)
    assert [len(half) for half in halves(dataset).values()] == [30000, 30000]
    assert mnist(real, split="test").inputs.shape == (10000, 28, 28)


@pytest.mark.mnist
def test_real_files_from_a_mirror(real, cache, mirror):
    mirror.files = {path.name: path.read_bytes() for path in real.iterdir() if path.suffix == ".gz"}
    good = dict(mirror.files)
    images, labels = f"{IMAGES}.gz", f"{LABELS}.gz"
    mirror.files[images] = good[images][:-1000]  # truncated
    mirror.files[labels] = corrupted(good[labels])
    with pytest.raises(RuntimeError, match=f"{mirror.address}{images}"):
        mnist()
    assert list(cache.iterdir()) == []
    mirror.files[images] = good[images]
    with pytest.raises(RuntimeError, match=f"{mirror.address}{labels}"):
        mnist()
    assert [path.name for path in cache.iterdir()] == [images]
    mirror.files[labels] = good[labels]
    dataset = mnist()
    assert len(dataset) == 60000
    module._load.cache_clear()  # this copy's 188 MB are of no further use
