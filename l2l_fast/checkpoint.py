"""How trained networks are kept and found: a folder of ``model.safetensors`` and ``config.json``.

This file knows options and tensors; :class:`~l2l_fast.CoordinatewiseLSTM`, or another kind's class, makes a network of
them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from l2l_fast.files import replacing, write_text

FORMAT_VERSION = 2  # 1 had no linear_path and none of networks.SURROUNDINGS: they have their defaults there
LSTM = "CoordinatewiseLSTM"  # the kind of network that a folder holds unless it says otherwise
KINDS = {  # and what reads and steps each of them
    LSTM: "CoordinatewiseLSTM.from_pretrained reads it, and LSTMOptimizer steps it",
    "CoordinatewiseMLP": "CoordinatewiseMLP.from_pretrained reads it, and MLPOptimizer steps it",
    "AdaptiveMLP": "AdaptiveMLP.from_pretrained reads it, and MLPOptimizer steps it",
}
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
WEIGHTS = Path(__file__).parent / "weights"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def shipped() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CONFIG_FILE}"))


class Saved(NamedTuple):
    """A network as it is kept: the constructor's options, the tensors by name, and the file that holds them."""

    options: dict
    tensors: dict[str, Tensor]
    path: Path


def write(folder: str | PathLike, options: dict, tensors: dict[str, Tensor], kind: str = LSTM) -> None:
    """Put a network into ``folder``, made if it is not there.

    ``model.safetensors`` holds the options too, so that one rename puts a network in the place of another; then
    ``config.json`` follows, the same options for people and for the hub. Who reads in between, or after a kill there,
    finds one network, whole.

    Args:
        folder: where; other files in it stay.
        options: of the network's constructor, fit for JSON.
        tensors: its ``state_dict``.
        kind: its class's name.

    Raises:
        OSError: it cannot be written; the network that was there is there still.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config = {"format_version": FORMAT_VERSION, "network": kind, "options": options}
    text = json.dumps(config | {"weights": _digest(tensors)}, indent=2) + "\n"
    with replacing(folder / WEIGHTS_FILE) as file:
        file.write(save(tensors, metadata={"format": "pt", "config": text}))
    write_text(folder / CONFIG_FILE, text)


def read(name_or_folder: str | PathLike, *, revision: str | None = None, kind: str = LSTM) -> Saved:
    """A network that was written, from a shipped name (:func:`shipped`), a folder or a hub id.

    Args:
        name_or_folder: which.
        revision: of a hub id.
        kind: the name of the class that is to be there.

    Raises:
        FileNotFoundError: nothing of that name, or no hub to ask; where it can be no hub id, the message lists the
            shipped names.
        ImportError: a hub id without huggingface_hub; the message has the command that installs it.
        ValueError: the folder's files are damaged, or of a later format.
    """
    if not isinstance(name_or_folder, str | PathLike):
        raise TypeError(f"name_or_folder must be a name or a path, got {type(name_or_folder).__name__}")
    name = os.fspath(name_or_folder)
    # First, so that what a name means does not depend on the folder in which a program was started.
    if isinstance(name_or_folder, str) and name in shipped():
        return _read(WEIGHTS / name, kind)
    if Path(name).is_dir():
        return _read(Path(name), kind)
    if isinstance(name_or_folder, str) and _HUB_ID.fullmatch(name):
        return _read(_download(name, revision), kind)
    raise FileNotFoundError(
        f"no network {name!r}: give a folder written by save_pretrained, a hub id owner/name, "
        f"or a shipped name ({', '.join(shipped()) or 'none is shipped in this version'})"
    )


def unfit(path: Path, reason: object) -> ValueError:
    """The refusal of a file whose tensors are not those of its options."""
    reason = str(reason).splitlines()[-1].strip()
    return ValueError(f"{path} does not hold the network of config.json: {reason}; save it again")


def _download(hub_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError(
            f"{hub_id!r} is no folder, and a hub id needs huggingface_hub: pip install 'l2l_fast[hub]'"
        ) from None
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached"
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"the hub gives none of that id ({type(error).__name__})"
    raise FileNotFoundError(
        f"no network {hub_id!r}: there is no such folder, and {reason}; correct the folder or the hub id"
    )


def _read(folder: Path, kind: str) -> Saved:
    weights, path = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    config = _read_config(path)
    tensors, own = _read_weights(weights, config is not None)
    if own is not None:
        if config is not None and config.get("weights") == own["weights"] and config != own:
            changed = [name for name in config | own if config.get(name) != own.get(name)]
            raise ValueError(
                f"{weights} does not hold the network of config.json, whose {', '.join(changed)} "
                f"{config.get(changed[0])!r} it was not saved with: save the network again with save_pretrained"
            )
        config = own  # a config.json of other weights is that of a save that is under way, or was killed
    if config is None:
        raise FileNotFoundError(f"{folder} holds no network: config.json is missing; save one with save_pretrained")
    if config.get("weights", digest := _digest(tensors)) != digest:
        raise unfit(weights, "these weights are not those that were saved with it")
    if config["network"] != kind:
        found = config["network"]
        raise ValueError(f"{folder} holds a network of the kind {found}, needed is {kind}: {KINDS[found]}")
    return Saved(config["options"], tensors, weights)


def _read_config(path: Path) -> dict | None:
    """What ``config.json`` says; None if it is not there."""
    try:
        return _checked(path.read_bytes(), path)
    except FileNotFoundError:
        return None


def _read_weights(path: Path, needed: bool) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors of one file, and the config that was saved with them; of earlier versions there is none."""
    try:
        contents = path.read_bytes()  # at once, whatever takes the file's name meanwhile
    except FileNotFoundError:
        if not needed:
            return {}, None
        raise FileNotFoundError(f"{path} is missing; save the network again with save_pretrained") from None
    try:
        tensors = load(contents)
    except SafetensorError as error:
        raise unfit(path, error) from None
    # The format begins with the length of a JSON header, of which safetensors shows all but this.
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    metadata = header.get("__metadata__", {})
    return tensors, _checked(metadata["config"], path) if "config" in metadata else None


def _checked(text: str | bytes, path: Path) -> dict:
    """A config that this version reads."""
    try:
        config = json.loads(text)
        version, kind, _ = config["format_version"], config["network"], config["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a config written by save_pretrained: {error!r}; save the network again"
        ) from None
    if version not in range(1, FORMAT_VERSION + 1) or kind not in KINDS:
        raise ValueError(
            f"{path} is a {kind} of format {version}, and this l2l_fast reads {', '.join(KINDS)} of formats 1 "
            f"to {FORMAT_VERSION}: upgrade l2l_fast"
        )
    return config


def _digest(tensors: dict[str, Tensor]) -> str:
    """Tells a network's weights from others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
