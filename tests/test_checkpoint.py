import json
import os
import sys
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2l_fast import CoordinatewiseLSTM, checkpoint


@pytest.mark.parametrize(
    "sizes",
    [{}, {"update_rms": 0.6}, {"update_rms": 0.2, "max_update_rms": 1.0, "input_rms": 0.01, "orthogonalize": True}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("linear_path", [False, True])
def test_round_trip(tmp_path, dtype, sizes, linear_path):
    options = {"projection": True, "output": "tanh", "output_scale": 0.03, "linear_path": linear_path, **sizes}
    network = CoordinatewiseLSTM("both", 3, 2, **options).to(dtype)
    network.save_pretrained(tmp_path / "new" / "folder")
    loaded = CoordinatewiseLSTM.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.options == network.options
    assert torch.equal(loaded.flat_weights(), network.flat_weights())
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_shipped_names(network, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    network.save_pretrained(tmp_path / "l2l-test")
    assert checkpoint.shipped() == ["l2l-test"]
    assert CoordinatewiseLSTM.from_pretrained("l2l-test").config == network.config
    with pytest.raises(FileNotFoundError, match=r"no network 'l2l-tset'.*l2l-test"):
        CoordinatewiseLSTM.from_pretrained("l2l-tset")


def test_hub_id_is_downloaded(network, tmp_path, monkeypatch):
    import huggingface_hub

    network.save_pretrained(tmp_path / "snapshot")
    asked = {}

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = CoordinatewiseLSTM.from_pretrained("owner/some-network", revision="v1")
    assert loaded.config == network.config
    assert asked == {
        "repo_id": "owner/some-network",
        "revision": "v1",
        "patterns": ["model.safetensors", "config.json"],
    }


def test_a_mistyped_folder_is_told_from_a_hub_id(monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    absent = RepositoryNotFoundError("401 Client Error", response=MagicMock())
    for error, reason in (
        (LocalEntryNotFoundError("no connection"), "the hub cannot be reached"),
        (absent, r"the hub gives none of that id \(RepositoryNotFoundError\)"),
        (HFValidationError("-- in it"), r"the hub gives none of that id \(HFValidationError\)"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", MagicMock(side_effect=error))
        with pytest.raises(FileNotFoundError, match=f"no network 'runs/mien': there is no such folder, and {reason}"):
            CoordinatewiseLSTM.from_pretrained("runs/mien")


def test_hub_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'l2l_fast\[hub\]'"):
        CoordinatewiseLSTM.from_pretrained("owner/network")


def _edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _as_before(folder):
    """As earlier versions saved it: weights and options tied by nothing but the folder."""
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["weights"]
    (folder / "config.json").write_text(json.dumps(config))


def _other_weights(folder):
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda folder: _as_before(folder) or (folder / "config.json").unlink(),
            FileNotFoundError, r"holds no network: config.json is missing",
        ),
        (lambda folder: [path.unlink() for path in folder.iterdir()], FileNotFoundError, "holds no network"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "not a config"),
        (lambda folder: (folder / "config.json").write_text("[]"), ValueError, "not a config"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), ValueError, "not a config"),
        (lambda folder: _edit(folder, format_version=3), ValueError, "upgrade l2l_fast"),
        (lambda folder: _edit(folder, options={"wings": 2}), ValueError, "wings"),
        (lambda folder: _edit(folder, options={"hidden_size": 9, "num_layers": 2}), ValueError, "does not hold"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), ValueError, "does not hold"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), ValueError, "does not hold"),
        (_other_weights, ValueError, "does not hold the network of config.json: these weights are not those that were"),
    ],
)  # fmt: skip
def test_damage_is_named(network, tmp_path, damage, error, message):
    network.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        CoordinatewiseLSTM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_damage(network, tmp_path, name):
    network.save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for kept in (1, 9, len(whole) // 2, len(whole) - 2):
        (tmp_path / name).write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"not a config|does not hold"):
            CoordinatewiseLSTM.from_pretrained(tmp_path)


def test_a_bit_that_has_flipped_is_damage(network, tmp_path):
    network.save_pretrained(tmp_path)
    contents = bytearray((tmp_path / "model.safetensors").read_bytes())
    contents[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(contents)
    with pytest.raises(ValueError, match="these weights are not those that were saved with it"):
        CoordinatewiseLSTM.from_pretrained(tmp_path)


def test_what_earlier_versions_saved_is_loaded(network, tmp_path):
    network.save_pretrained(tmp_path)
    _as_before(tmp_path)
    assert torch.equal(CoordinatewiseLSTM.from_pretrained(tmp_path).flat_weights(), network.flat_weights())


@pytest.mark.parametrize(
    "unknown",
    [{"update_rms", "max_update_rms", "input_rms", "orthogonalize", "linear_path"}, {"linear_path"}],
    ids=["first", "later"],
)
def test_options_that_were_not_there_yet_have_their_defaults(network, tmp_path, unknown):
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    _as_before(tmp_path)
    options = {name: value for name, value in network.options.items() if name not in unknown}
    _edit(tmp_path, format_version=2 if len(unknown) == 1 else 1, options=options)
    loaded = CoordinatewiseLSTM.from_pretrained(tmp_path)
    assert loaded.options == network.options
    assert loaded.update_rms is None
    assert not loaded.config.linear_path


@pytest.mark.parametrize("first", [True, False])
def test_a_save_that_was_killed_between_its_files_is_the_new_network(network, tmp_path, monkeypatch, first):
    other = CoordinatewiseLSTM("both", 5, 1)
    if not first:
        other.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_text", MagicMock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            network.save_pretrained(tmp_path)
    found = CoordinatewiseLSTM.from_pretrained(tmp_path)
    assert found.config == network.config
    assert torch.equal(found.flat_weights(), network.flat_weights())
    other.save_pretrained(tmp_path)
    assert CoordinatewiseLSTM.from_pretrained(tmp_path).config == other.config


def test_a_save_that_fails_leaves_the_network_that_was_there(network, tmp_path, monkeypatch):
    other = CoordinatewiseLSTM("both", 5, 1)
    other.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", MagicMock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left on device, so it stays as it was"):
            network.save_pretrained(tmp_path)
    assert torch.equal(CoordinatewiseLSTM.from_pretrained(tmp_path).flat_weights(), other.flat_weights())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_shipped_name_means_the_same_in_every_folder(network, tmp_path, monkeypatch):
    name = checkpoint.shipped()[0]
    expected = CoordinatewiseLSTM.from_pretrained(name).config
    network.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert CoordinatewiseLSTM.from_pretrained(name).config == expected
    for folder in (f"./{name}", tmp_path / name):
        assert CoordinatewiseLSTM.from_pretrained(folder).config == network.config
