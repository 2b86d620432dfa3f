"""The ops once each, small and checked: what a sanitizer or a profiler runs.

    python bench/gpu_small.py [--device cuda] [--coordinates 1000] [--many] [--state float32] [--only step]

Inputs are made on the CPU, so that a sanitizer sees little but our own kernels; results are held to the float64
reference, which runs on the CPU too.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import cases
from l2l_fast import arguments, ops, reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
STEPS = 3
missed: list[str] = []  # what was beyond its tolerance: all is compared before the program ends with 1


def step(
    name: str, shapes: list[tuple[int, ...]], state_dtype: torch.dtype, device: str, transposed=False, **options
) -> None:
    """Two steps of several tensors at once; transposed: the parameters, unlike their gradients, by columns."""
    network, params = cases.network(name, **options), cases.params(shapes)
    grads, config = [param.grad for param in params], network.config
    if transposed:
        params = [param.detach().t().contiguous().t() for param in params]
    weights, codes = network.flat_weights().detach(), arguments.codes(config)

    def run(kernel, device: str, dtype: torch.dtype, held: torch.dtype) -> list[Tensor]:
        def here(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        thetas, states = [here(param) for param in params], []
        for param in params:
            like = ops.new_state(param, config, held)
            storage = torch.zeros(like.untyped_storage().nbytes() // like.itemsize, dtype=held).to(device)
            states.append(storage.as_strided(like.shape, like.stride()))
        lr, counts = here(torch.ones(())), [here(torch.tensor(float(t))) for t in (1, 2)]
        gradients, flat = [here(grad) for grad in grads], here(weights)
        for count in counts:
            kernel(thetas, gradients, states, flat, lr, [count] * len(thetas), *codes, 0.01, False)
        return [*thetas, *states]

    found = run(torch.ops.l2l_fast.lstm_step_, device, torch.float32, state_dtype)
    if cases.count(params) <= 100_000:
        expected = run(reference.lstm_step_, "cpu", torch.float64, torch.float64)
        what = f"step, {name} network, {config.hidden_size} units, {state_dtype} state"
        compare(what, found, expected, TOLERANCE[state_dtype])


def scaled(name: str, shapes: list[tuple[int, ...]], device: str) -> None:
    """Two steps whose updates are scaled over each tensor."""
    network, params = cases.network(name), cases.params(shapes)
    config, weights = network.config, network.flat_weights().detach()

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        def here(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        thetas, grads = [here(param) for param in params], [here(param.grad) for param in params]
        states = [ops.new_state(theta, config, dtype) for theta in thetas]
        for t in (1, 2):
            counts = [here(torch.tensor(float(t)))] * len(thetas)
            torch.ops.l2l_fast.lstm_step_scaled_(
                thetas, grads, states, here(weights), here(torch.ones(())), counts, *arguments.codes(config),
                0.01, False, 0.2, [], 0.2,
            )  # fmt: skip
        return [*thetas, *states]

    found, expected = run(device, torch.float32), run("cpu", torch.float64)
    compare(f"scaled step, {name} network", found, expected, TOLERANCE[torch.float32])


def unroll(name: str, size: int, device: str, **options) -> None:
    """Forward and backward through time, every gradient."""
    network, (series,) = cases.network(name, **options), cases.params([(STEPS, size)])
    config, flags = network.config, (True, True, True)
    codes = arguments.codes(config)

    def run(forward, backward, device: str, dtype: torch.dtype) -> list[Tensor]:
        def here(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        grads, weights, count = here(series.grad), here(network.flat_weights()), here(torch.ones(()))
        state = here(ops.new_state(series[0], config, dtype))
        updates, last = forward(grads, state, weights, count, *codes)
        d_updates, d_last = here(series), here(torch.linspace(-1, 1, last.numel()).view(last.shape))
        return [updates, last, *backward(d_updates, d_last, grads, state, weights, count, *codes, *flags)]

    kernels = torch.ops.l2l_fast
    found = run(kernels.lstm_unroll, kernels.lstm_unroll_backward, device, torch.float32)
    expected = run(reference.lstm_unroll_forward, reference.lstm_unroll_backward, "cpu", torch.float64)
    compare(f"unroll and its backward, {name} network, {config.hidden_size} units", found, expected, 1e-4)


def compare(what: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    errors = [
        ((mine.cpu().double() - theirs).abs().max() / theirs.abs().max()).item()
        for mine, theirs in zip(found, expected, strict=True)
    ]
    bad = [f"tensor {index}: {error:.1e}" for index, error in enumerate(errors) if not error <= tolerance]
    print(f"{what}: error {max(errors):.1e}, allowed {tolerance:.0e}", *bad, sep="; " if bad else "", flush=True)
    if bad:
        missed.append(what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--coordinates", type=int, default=1000)
    parser.add_argument("--many", action="store_true", help="and 70,000: other kernels; and those for any network")
    parser.add_argument("--state", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--only", choices=["step"], help="steps of the paper's network alone")
    arguments = parser.parse_args()
    size, states = arguments.coordinates, list(TOLERANCE)
    if arguments.state:
        states = [getattr(torch, arguments.state)]
    for name in ("paper",) if arguments.only else cases.NETWORKS:
        for state_dtype in states:
            shapes = [(size,)] if arguments.only else [(size,), (3, 5), (1,), (size // 8, 8)]
            step(name, shapes, state_dtype, arguments.device)
        if not arguments.only:
            scaled(name, [(size,), (3, 5), (1,), (20_000,)], arguments.device)
            unroll(name, size, arguments.device)
    if arguments.many:
        for state_dtype in states:
            step("paper", [(70_000,)], state_dtype, arguments.device)
            step("paper", [(40, 7), (size,)], state_dtype, arguments.device, transposed=True, hidden_size=6)
        unroll("paper", size, arguments.device, hidden_size=6)
    if missed:
        raise SystemExit(f"{len(missed)} beyond their tolerance: {', '.join(missed)}")
    print("all good")


if __name__ == "__main__":
    main()
