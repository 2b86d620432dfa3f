"""Whether two things are the same to the last bit."""

import torch


def same(one, two) -> bool:
    """Of tensors, and of dicts, lists and tuples of them: in dtype, shape and every bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(_bytes(one), _bytes(two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def copied(thing):
    """As it is now: later changes in place do not reach it."""
    if isinstance(thing, torch.Tensor):
        return thing.detach().clone()
    if isinstance(thing, dict):
        return {key: copied(value) for key, value in thing.items()}
    return [copied(each) for each in thing] if isinstance(thing, list | tuple) else thing
