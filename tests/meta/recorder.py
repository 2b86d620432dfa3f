"""CUDA graphs without a GPU: the operators that work calls are recorded, then repeated on the same tensors.

A replay runs none of the work's Python, so a number that came from the host is as fixed as it would be in a graph, and
a tensor that was made anew after the recording is not seen. Reading a number back is refused, as in a graph.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


def tensors(tree):
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def place(tensor):
    return tensor.untyped_storage().data_ptr()


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.outside, self.inside = [], {}, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in WAITS:
            raise RuntimeError(f"{op} waits for the device")
        for tensor in tensors((args, kwargs)):
            if place(tensor) not in self.inside | self.outside.keys():  # there before: its contents come back
                self.outside[place(tensor)] = tensor, tensor.untyped_storage().clone()
        given = {place(tensor) for tensor in tensors((args, kwargs))}
        out = op(*args, **kwargs)
        fresh = [tensor for tensor in tensors(out) if place(tensor) not in given]
        self.inside |= {place(tensor) for tensor in fresh}
        # Detached: the graph of autograd would otherwise live as long as the recording.
        args, kwargs, held = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs, out))
        self.calls.append((op, args, kwargs, held, given))
        return out


class Recorder:
    """The ``Capture`` of :mod:`l2l_fast.meta.graphs` on any device."""

    def __init__(self):
        self.recorded = self.replayed = self.warmed = 0

    def warm_up(self, work):
        self.warmed += 1
        work()

    def record(self, work):
        self.recorded += 1
        with _Recording() as recording:
            work()
        for tensor, contents in recording.outside.values():
            tensor.untyped_storage().copy_(contents)

        def replay():
            self.replayed += 1
            with torch.no_grad():
                for op, args, kwargs, held, given in recording.calls:
                    for found, kept in zip(tensors(op(*args, **kwargs)), tensors(held), strict=True):
                        if place(kept) not in given:  # neither a view nor written in place
                            kept.copy_(found)

        return replay
