"""The first figures of a GPU, through torch: small models, meta-gradients, and where a meta-update's time goes.

    python bench/gpu_first.py [--device cuda] [small] [rule] [backward] [meta] [general]

A line for each measurement, the prediction of docs/kernels.md beside it where there is one. bench/kernels.cu times the
kernels themselves; the benches of this folder, with more rounds and more rivals, are what results are published from.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from pathlib import Path

import torch

import cases
import ours
import rivals
from l2l_fast import LSTMOptimizer

PREDICTED = {
    ("small", "a CUDA graph"): "0.8 to 1.3 of fused Adam's",
    ("rule", "16k, a CUDA graph, one size, orthogonalize=False"): "five launches: 36 to 38 us, with four it was 34.9",
    ("rule", "16k, a CUDA graph, l2l-base, orthogonalize=False"): "the same: a few sums more in them",
    ("rule", "9.5M, a CUDA graph, l2l-base, orthogonalize=False"): "8 bytes a coordinate more than one size: 1.20 ms",
    ("rule", "9.5M, a CUDA graph, one size, orthogonalize=False"): "312 bytes a coordinate at 3.0 TB/s: 1.0 ms",
    ("backward", 100_000): "about level with compiled autograd",
    ("meta", "mnist-mlp"): "4 to 5.5 ms a meta-update",
}


def seconds(call, budget: float = 0.4) -> float:
    """Median time of a call, many of them queued between two waits."""
    for _ in range(5):
        call()
    cases.finished()
    begun = time.perf_counter()
    call()
    cases.finished()
    calls = max(1, min(500, int(budget / 8 / max(time.perf_counter() - begun, 1e-6))))
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        cases.finished()
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times)


def say(part: str, what: str, *figures: str, key=None) -> None:
    predicted = PREDICTED.get((part, key if key is not None else what))
    print(f"{part:9} {what:52}", *figures, f"(predicted: {predicted})" if predicted else "", flush=True)


def small() -> None:
    """16k coordinates in the four tensors of the MNIST network, eagerly and in a CUDA graph."""
    ways = {way: functools.partial(ours.optimizer, way) for way in ours.STEPS}
    ways |= {
        way: functools.partial(rivals.hand_designed, way, capturable=cases.device.type == "cuda")
        for way in ("Adam fused", "Adam foreach")
    }
    for how in ("eagerly", "a CUDA graph") if cases.device.type == "cuda" else ("eagerly",):
        times = {}
        for way, make in ways.items():
            step = make(cases.params(cases.SIZES["16k"])).step
            step()
            times[way] = seconds(ours.captured(step) if how != "eagerly" else step)
        for way, taken in times.items():
            ratio = taken / times["Adam fused"]
            say("small", f"16k, {how}, {way}", f"{1e6 * taken:8.2f} us, {ratio:.2f} of fused Adam's",
                key=how if way == "ours" else way)  # fmt: skip


def _adamw(params):
    return torch.optim.AdamW(params, fused=True, capturable=cases.device.type == "cuda")


def _muon(params):
    matrices, rest = [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]
    steps = torch.optim.Muon(matrices).step, _adamw(rest).step
    return lambda: [step() for step in steps]


def rule() -> None:
    """The default network's step, scaled over each tensor, of the MNIST network and of a transformer."""
    blocks = 12 if cases.device.type == "cuda" else 1
    block = [(768, 256), (768,), (256, 256), (256,), (1024, 256), (1024,), (256, 1024), (256,), (256,), (256,)]
    of_one_size = cases.of_one_size()
    models = {"16k": cases.SIZES["16k"], "9.5M" if blocks == 12 else "0.8M": block * blocks}
    ways = {
        "AdamW fused": lambda params: _adamw(params).step,
        "Muon, and AdamW for the rest": _muon,
        "l2l-base": lambda params: LSTMOptimizer(params).step,
        "l2l-base, orthogonalize=False": lambda params: LSTMOptimizer(params, orthogonalize=False).step,
        # Without max_update_rms: what h100/first.txt has as l2l-base.
        "one size": lambda params: LSTMOptimizer(params, of_one_size).step,
        "one size, orthogonalize=False": lambda params: LSTMOptimizer(params, of_one_size, orthogonalize=False).step,
    }
    for size, shapes in models.items():
        for how in ("eagerly", "a CUDA graph") if cases.device.type == "cuda" else ("eagerly",):
            times = {}
            for way, make in ways.items():
                step = make(cases.params(shapes))
                step()
                times[way] = seconds(ours.captured(step) if how != "eagerly" else step)
            for way, taken in times.items():
                ratio = taken / times["AdamW fused"]
                say("rule", f"{size}, {how}, {way}", f"{1e6 * taken:8.2f} us, {ratio:.2f} of fused AdamW's")


def backward() -> None:
    """A meta-gradient of 20 steps: ours, its backward alone, and autograd through nn.LSTMCell."""
    network = cases.network()
    for size in (512, 15_910, 100_000):
        (source,) = cases.params([(cases.UNROLL + 1, size)])
        grads = source.grad
        whole = seconds(functools.partial(ours.meta_gradient, network, grads))
        alone = seconds(functools.partial(ours.meta_gradient, network, grads, forward=False))
        rival = seconds(functools.partial(rivals.meta_gradient, rivals.Cells(network), grads))
        say("backward", f"{size} coordinates, 20 steps", f"{1e3 * whole:8.3f} ms, backward alone {1e3 * alone:.3f} ms,",
            f"autograd {1e3 * rival:.3f} ms ({rival / whole:.1f}x)", key=size)  # fmt: skip


def meta() -> None:
    """A meta-update of the MNIST network, and what the device does in it."""
    from l2l_fast import MetaTrainer
    from test_meta_update import CASES, UPDATES

    for case, (make, instances, _) in CASES.items():
        task = make()
        trainer = MetaTrainer(cases.network(**UPDATES), task, unroll=cases.UNROLL, horizon=100, instances=instances,
                              progress=False, device=cases.device)  # fmt: skip
        for _ in range(30):  # captured by then
            trainer.step()
        cases.finished()
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            for _ in range(40):
                trainer.step()
            cases.finished()
            times.append((time.perf_counter() - begun) / 40)
        say("meta", f"{case}, {task.name}", f"{1e3 * statistics.median(times):8.3f} ms a meta-update", key=case)
        if cases.device.type == "cuda":
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(10):
                    trainer.step()
                cases.finished()
            events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
            busy = sum(event.self_device_time_total for event in events) / 1e4
            say("meta", f"{case}, the device at work", f"{busy:8.3f} ms a meta-update")
            for event in events[:12]:
                name, share = event.key[:72], event.self_device_time_total / 1e4
                print(f"          {share:8.4f} ms  {event.count // 10:5d} times  {name}")


def general() -> None:
    """Meta-steps of the recipe for any network: windows of 500 steps on twenty kinds of task, one kind a step."""
    from l2l_fast import MetaTrainer
    from l2l_fast.meta import recipes

    stage = recipes.stages(recipes.read(Path(__file__).with_name("general.json")))[-1]
    network, tasks, options = recipes.prepare(stage, "mnist" if "L2L_FAST_DATA" in os.environ else "digits")
    trainer = MetaTrainer(network, tasks, **options, progress=False, device=cases.device)
    for _ in range(5):
        begun = time.perf_counter()
        trainer.step()
        cases.finished()
        say("general", "a meta-step, 2 windows of 500 steps", f"{time.perf_counter() - begun:8.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="small, rule, backward, meta, general (default: all)")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    cases.use(arguments.device)
    parts = {"small": small, "rule": rule, "backward": backward, "meta": meta, "general": general}
    for name in arguments.parts or parts:
        begun = time.perf_counter()
        parts[name]()
        print(f"          ({name} took {time.perf_counter() - begun:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
