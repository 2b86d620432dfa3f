"""MNIST: found on disk, otherwise downloaded; verified either way."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from pathlib import Path

from torch import Tensor

from l2l_fast.data.dataset import Dataset, fixed_order
from l2l_fast.data.idx import IdxError, read_idx
from l2l_fast.modes import plain

# sha256 of the unzipped content: the .gz files differ between mirrors in their headers.
_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_SPLITS = {"train": "train", "test": "t10k"}
_TIMEOUT = 30  # seconds without a byte

_log = logging.getLogger(__name__)


def mnist(folder: str | Path | None = None, *, split: str = "train") -> Dataset:
    """MNIST's images [M, 28, 28] and labels, in a fixed shuffled order; the same files give the same tensors.

    Each of the split's two IDX files, with or without ``.gz``, is looked for in ``folder``, then in the folder that the
    environment variable ``L2L_FAST_DATA`` names (in both also in the subfolder ``mnist``), then in the user's cache
    (``$XDG_CACHE_HOME/l2l_fast/mnist``, by default ``~/.cache/l2l_fast/mnist``). A file that is nowhere is downloaded
    into the cache, from the address in ``L2L_FAST_MNIST_URL`` or else from public mirrors. Every file is verified
    against the published content before it is used, and before it enters the cache.

    Args:
        folder: the first folder to look in; None starts at ``L2L_FAST_DATA``.
        split: "train" (60,000 examples) or "test" (10,000).

    Raises:
        ValueError: if ``split`` is another, or a file found is not the published one.
        FileNotFoundError: if ``folder`` or ``L2L_FAST_DATA`` is not a folder.
        RuntimeError: if a file is nowhere and no mirror gives it.
        ImportError: if a download is needed and pooch is not installed.

    Example:
        >>> from l2l_fast.data import mnist
        >>> mnist().inputs.shape  # doctest: +SKIP
        torch.Size([60000, 28, 28])

    References:
        LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}; got {split!r}")
    places = _places(folder)
    prefix = _SPLITS[split]
    images, labels = (_find(f"{prefix}-{part}", places) for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return _load(images, labels)


@functools.cache
@plain()
def _load(images: Path, labels: Path) -> Dataset:
    inputs, targets = _read(images), _read(labels)
    order = fixed_order(len(targets))  # applied to bytes, a quarter of the work
    return Dataset("mnist", inputs[order].float().div_(255), targets[order].long(), classes=10)


def _read(path: Path) -> Tensor:
    name = path.name.removesuffix(".gz")
    return read_idx(path, dimensions=3 if "images" in name else 1, sha256=_SHA256[name])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2l_fast" / "mnist"


def _places(folder: str | Path | None) -> list[Path]:
    """Where to look, in order."""
    places = []
    for given, said_by in ((folder, "the folder of data sets"), (os.environ.get("L2L_FAST_DATA"), "L2L_FAST_DATA")):
        if given:
            root = Path(given).expanduser().resolve()
            if not root.is_dir():
                raise FileNotFoundError(f"{said_by} is {given}, which is not a folder: create it or name another")
            places += [root, root / "mnist"]
    return [*places, _cache()]


def _find(name: str, places: list[Path]) -> Path:
    for place in places:
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    return _download(name, places)


def _download(name: str, places: list[Path]) -> Path:
    try:
        from pooch import HTTPDownloader
    except ImportError as error:
        raise ImportError(
            f"{name} is in none of {', '.join(map(str, places))}, and downloading it needs pooch: "
            "pip install l2l_fast[data], or put MNIST's IDX files into the folder that L2L_FAST_DATA names"
        ) from error
    own_mirror = os.environ.get("L2L_FAST_MNIST_URL")
    failures = []
    for mirror in [own_mirror] if own_mirror else _MIRRORS:
        address = f"{mirror.rstrip('/')}/{name}.gz"
        cache = _cache()
        cache.mkdir(parents=True, exist_ok=True)
        # In the cache's own file system, so that the verified file enters the cache in one atomic move.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
            arrived = Path(scratch) / f"{name}.gz"
            _log.info("downloading %s", address)
            try:
                HTTPDownloader(timeout=_TIMEOUT)(address, str(arrived), None)
                _read(arrived)
            except (OSError, ValueError) as error:  # requests' errors are OSErrors, pooch's ValueErrors
                # The scratch copy is gone by the time that anyone reads this: its path would only mislead.
                failures.append(f"{address}: {error.what if isinstance(error, IdxError) else error}")
                continue
            arrived.replace(cache / arrived.name)
            return cache / arrived.name
    raise RuntimeError(
        f"could not download {name}.gz ({'; '.join(failures)}). Try again, name another mirror in L2L_FAST_MNIST_URL, "
        "or put MNIST's IDX files into the folder that L2L_FAST_DATA names"
    )
