"""What is written appears whole or not at all, whoever else writes, reads, or is killed."""

import ast
import errno
import os
import stat
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import l2l_fast
from l2l_fast import CoordinatewiseLSTM, files
from l2l_fast.evaluate.store import Store

PACKAGE = Path(l2l_fast.__file__).parent


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "a", "first\n")

    def fail():
        with files.replacing(tmp_path / "a") as file:
            file.write(b"half of the sec")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a").read_text() == "first\n"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.write_text(tmp_path / "a", "first")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left on device, so it stays as it was before: .*/a'") as caught:
        files.write_text(tmp_path / "a", "second")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_a_file_is_readable_as_any_other_and_in_utf_8(tmp_path):
    files.write_text(tmp_path / "ours", "± 1\n")
    (tmp_path / "theirs").write_text("")
    ours, theirs = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "theirs"))
    assert ours == theirs
    assert (tmp_path / "ours").read_bytes() == b"\xc2\xb1 1\n"


def test_links_are_followed_and_pipes_are_written_to(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    for text in ("first", "second"):
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "file").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    files.write_text(tmp_path / "pipe", "through")
    reader.join()
    assert found == ["through"]
    assert names(tmp_path) == ["far", "link", "pipe"]


def test_what_killed_writers_left_is_removed_in_time(tmp_path):
    for name, age in ((".a.00.part", 2 * files.STALE), (".a.11.part", 0), (".ab.22.part", 2 * files.STALE)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    files.write_text(tmp_path / "a", "")
    assert names(tmp_path) == [".a.11.part", ".ab.22.part", "a"]  # of a file of this name, and not in use


def test_a_lock_is_for_one_thread_too(tmp_path):
    refused = []

    def try_it():
        try:
            with files.locked(tmp_path):
                pass
        except files.HeldError as error:
            refused.append(str(error))

    for _ in range(2):  # and is free again afterwards
        with files.locked(tmp_path):
            thread = threading.Thread(target=try_it)
            thread.start()
            thread.join()
    assert len(refused) == 2
    assert all(f"another run of this process is using {tmp_path}: wait for it" in text for text in refused)
    try_it()
    assert len(refused) == 2


def test_a_lock_by_another_path_is_the_same_lock(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "one")
    with files.locked(tmp_path / "one"), pytest.raises(files.HeldError), files.locked(tmp_path / "other"):
        pass


# ---------------------------------------------------------------- whoever writes at the same time


def _together(writes, read, wanted, most=30.0):
    """Writers over and over, each in a thread of its own, while what is read is counted until all of it was seen."""
    stop, seen, failed = threading.Event(), Counter(), []

    def loop(write):
        try:
            while not stop.is_set():
                write()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=loop, args=(write,)) for write in writes]
    for thread in threads:
        thread.start()
    try:
        start = time.monotonic()
        while time.monotonic() < start + most and not failed and (seen.total() < 100 or set(seen) != wanted):
            seen[read()] += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed
    assert set(seen) == wanted


def test_a_reader_meets_one_network_whole_while_two_are_saved(tmp_path):
    networks = [CoordinatewiseLSTM("moments", 3, 1), CoordinatewiseLSTM("both", 5, 2, output="tanh")]
    whole = {network.config: network.flat_weights().detach() for network in networks}
    networks[0].save_pretrained(tmp_path)

    def read():
        network = CoordinatewiseLSTM.from_pretrained(tmp_path)
        assert torch.equal(network.flat_weights(), whole[network.config])
        return network.config

    _together([partial(network.save_pretrained, tmp_path) for network in networks], read, set(whole))
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def test_a_store_gives_whole_values_while_others_are_put(tmp_path):
    values = [torch.full((size,), float(size)) for size in (10, 10_000)]
    stores = [Store(tmp_path, task="a") for _ in values]
    stores[0].put(values[0])

    def read():
        found = stores[0].get()
        assert (found == len(found)).all()
        return len(found)

    _together([partial(store.put, value) for store, value in zip(stores, values, strict=True)], read, {10, 10_000})
    assert len(names(tmp_path)) == 1


# ---------------------------------------------------------------- everything that writes does so by way of this file


def _calls(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_other_file_of_the_package_writes_by_way_of_files_and_reads_utf_8(path):
    for call in _calls(path):
        name, where = ast.unparse(call.func), f"{path.name}:{call.lineno}"
        method = name.rpartition(".")[2]
        if method == "read_text":
            assert "encoding" in {keyword.arg for keyword in call.keywords}, where
        if path.name != "files.py":
            assert method not in ("write_bytes", "save_file"), where
            assert method != "open" or name in ("Image.open", "os.open"), where
            assert method != "write_text" or name == "write_text", where
            if method == "savefig" or name == "torch.save":  # into what is written as one
                assert ast.unparse(call.args[method == "save"]) in ("file", "contents"), where
