"""Saving and finding trained networks: a folder of ``model.safetensors`` and ``config.json``."""

from __future__ import annotations

import json
import os
import re
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from l2l_fast.networks import CoordinatewiseLSTM

FORMAT_VERSION = 1
WEIGHTS = Path(__file__).parent / "weights"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def shipped() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def save_pretrained(network: CoordinatewiseLSTM, folder: str | PathLike) -> None:
    """Write a network into ``folder``; each of the two files appears whole or not at all.

    Example:
        >>> import tempfile, l2l_fast as l2l
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     l2l.CoordinatewiseLSTM().save_pretrained(folder)
        ...     network = l2l.CoordinatewiseLSTM.from_pretrained(folder)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    config = {"format_version": FORMAT_VERSION, "network": "CoordinatewiseLSTM", "options": network.options}
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "config.json.part").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        os.replace(folder / f"{name}.part", folder / name)


def from_pretrained(name_or_folder: str | PathLike, *, revision: str | None = None) -> CoordinatewiseLSTM:
    """A trained network.

    Args:
        name_or_folder: a shipped name (:func:`shipped`), a folder written by ``save_pretrained`` (``./NAME`` where NAME
            is a shipped one), or a hub id ``owner/name``, which is downloaded with huggingface_hub.
        revision: of the hub id: a branch, tag or commit.

    Raises:
        FileNotFoundError: nothing of that name, or no hub to ask; where it can be no hub id, the message lists the
            shipped names.
        ValueError: the folder's files are damaged, or of a later format.
    """
    name = os.fspath(name_or_folder)
    # First, so that what a name means does not depend on the folder in which a program was started.
    if isinstance(name_or_folder, str) and name in shipped():
        return _load(WEIGHTS / name)
    if Path(name).is_dir():
        return _load(Path(name))
    if isinstance(name_or_folder, str) and _HUB_ID.fullmatch(name):
        return _load(_download(name, revision))
    raise FileNotFoundError(
        f"no network {name!r}: give a folder written by save_pretrained, a hub id owner/name, "
        f"or a shipped name ({', '.join(shipped()) or 'none is shipped in this version'})"
    )


def _download(hub_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError(
            f"{hub_id!r} is no folder, and a hub id needs huggingface_hub: pip install 'l2l_fast[hub]'"
        ) from None
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["model.safetensors", "config.json"]))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached"
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"the hub gives none of that id ({type(error).__name__})"
    raise FileNotFoundError(
        f"no network {hub_id!r}: there is no such folder, and {reason}; correct the folder or the hub id"
    )


def _load(folder: Path) -> CoordinatewiseLSTM:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        version, kind, options = config["format_version"], config["network"], config["options"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no network: config.json is missing; save one with save_pretrained"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a config written by save_pretrained: {error!r}; save the network again"
        ) from None
    if version != FORMAT_VERSION or kind != "CoordinatewiseLSTM":
        raise ValueError(
            f"{path} is a {kind} of format {version}, and this l2l_fast reads CoordinatewiseLSTM of format "
            f"{FORMAT_VERSION}: upgrade l2l_fast"
        )
    try:
        network = CoordinatewiseLSTM._blank(**options)
    except TypeError as error:
        raise ValueError(f"{path}: {error}; upgrade l2l_fast or save the network again") from None
    weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
        network.to(tensors["head.weight"].dtype).load_state_dict(tensors)
    except FileNotFoundError:
        raise FileNotFoundError(f"{weights} is missing; save the network again with save_pretrained") from None
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{weights} does not hold the network of config.json: {reason}; save it again") from None
    return network
