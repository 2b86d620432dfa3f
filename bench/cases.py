"""What is timed: the networks, and the tensors that an optimizer steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from l2l_fast import CoordinatewiseLSTM

UNROLL = 20
device = torch.device("cpu")  # where everything is timed
NETWORKS = {
    "paper": {},
    "moments": {"features": "moments", "projection": True, "output": "tanh", "output_scale": 0.02},
}


def _resnet() -> list[tuple[int, ...]]:
    """Two hundred tensors, most of them tiny: 66 convolutions with their norms, and a last layer."""
    shapes: list[tuple[int, ...]] = []
    for width in (16, 32, 64):
        shapes += 22 * [(width, width, 3, 3), (width,), (width,)]
    return [*shapes, (10, 64), (10,)]


SIZES = {
    "1k": [(1000,)],
    "16k": [(20, 784), (20,), (10, 20), (10,)],  # the MNIST network
    "resnet": _resnet(),
    "1M": [(1000, 1000)],
    "10M": [(10_000, 1000)],
}
QUICK = ("1k", "16k")


def use(name: str) -> None:
    """Time on this device from now on."""
    global device
    device = torch.device(name)


def finished() -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def network(name: str = "paper", **options) -> CoordinatewiseLSTM:
    """The same weights in every row of every run."""
    torch.manual_seed(0)
    return CoordinatewiseLSTM(**NETWORKS[name] | options).to(device)


def of_one_size() -> CoordinatewiseLSTM:
    """The default network without ``max_update_rms``: steps of one size."""
    shipped = CoordinatewiseLSTM.from_pretrained("l2l-base")
    made = CoordinatewiseLSTM(**shipped.options | {"max_update_rms": None})
    made.load_flat_weights_(shipped.flat_weights())
    return made


def params(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Parameters with gradients of mixed magnitude, so that both branches of the log_sign features are taken."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    for param in made:
        size = torch.empty(param.shape).uniform_(-12, 0, generator=generator).exp()
        param.grad = (size * torch.randn(param.shape, generator=generator)).to(device)
    return made


def count(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def state_bytes(optimizer) -> int:
    """Memory of an optimizer's state."""
    state = optimizer.state
    leaves = tree_leaves(list(state.values()) if isinstance(state, dict) else state)
    return sum(leaf.numel() * leaf.itemsize for leaf in leaves if isinstance(leaf, Tensor))
