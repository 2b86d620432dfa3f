"""What goes from rank to rank, by a group that carries the tensors of one kind of device alone, as NCCL does."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.meta import ranks

META = torch.device("meta")


class Sent(Exception):
    pass


@pytest.fixture
def group(monkeypatch):
    """Two ranks in the place of torch.distributed: the other one says what we say. Takes tensors of ``device``."""

    def all_reduce(tensor):
        assert tensor.device == group.device
        if tensor.device == META:
            raise Sent  # it has no values to go on with
        tensor.mul_(2)

    def gather_object(value, values):
        group.sent.append((value, group.current))
        values[:] = [value, value]

    @contextmanager
    def current(device):
        group.current = device
        yield
        group.current = None

    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 2,
        all_reduce=all_reduce, gather_object=gather_object, device=META, current=None, sent=[],
    )  # fmt: skip
    monkeypatch.setattr(ranks, "distributed", group)
    monkeypatch.setattr(torch.cuda, "device", current)
    return group


@pytest.mark.parametrize("send", [lambda: ranks.any_rank(False, META), lambda: ranks.raise_together(None, META)])
def test_flags_are_on_the_device_that_is_named(group, send):
    with pytest.raises(Sent):
        send()


@pytest.mark.parametrize("name", ["cuda:1", "cpu"])
def test_objects_go_by_the_device_that_is_named(group, name):
    device = torch.device(name)
    value = {"a": [None, torch.ones(2)], "b": 3}
    assert ranks.gather(value, device) == [value, value]
    assert group.sent == [(value, device if name == "cuda:1" else None)]
    assert group.current is None


def test_a_trainer_sends_from_its_own_device(group, monkeypatch, tmp_path):
    group.device = torch.device("cpu")
    seen = {"any_rank": set(), "gather": set(), "raise_together": set()}
    for name in seen:
        call = getattr(ranks, name)
        spy = lambda *arguments, name=name, call=call: seen[name].add(arguments[-1]) or call(*arguments)  # noqa: E731
        monkeypatch.setattr(ranks, name, spy)
    network = l2l.CoordinatewiseLSTM("moments", 4, 1)
    trainer = l2l.MetaTrainer(network, "quadratic", horizon=12, unroll=5, checkpoint=tmp_path, progress=False)
    assert len(trainer.fit(3).meta_losses) == 3
    assert seen == {name: {trainer.device} for name in seen}


def test_an_error_of_one_rank_is_raised_on_all(group, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(ranks, "any_rank", lambda flag, device: True)  # this rank's, or another's
    with pytest.raises(OSError, match="No space left"):
        ranks.raise_together(OSError(28, "No space left"), device)
    with pytest.raises(RuntimeError, match="another rank of this run has failed"):
        ranks.raise_together(None, device)


def start(store, size):
    """What each of some ranks that start together makes of a store."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda own: ranks._fresh(store, own, size), range(size)))


def test_ranks_that_start_again_find_nothing_of_those_before():
    """Gloo would connect to where a killed rank had listened."""
    store = torch.distributed.HashStore()
    for generation in range(3):
        store.set("question/1", "of a process that was killed before it was answered")
        parts = start(store, 3)
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", str(generation))
        assert [part.get("address") for part in parts] == [str(generation).encode()] * 3


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] of 3 have not come"):
        ranks._fresh(torch.distributed.HashStore(), 0, 3)
