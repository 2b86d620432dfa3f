"""How a row is timed and what is written down with it.

    python -m pytest bench [--quick] [--sizes 1k,16k] [--device cuda] [-k NAME] --benchmark-json=benchmark.json
    python bench/report.py benchmark.json --out FOLDER

A rival is timed beside ours: one round of ours before each of its rounds, so that a ratio compares what was measured
within the same second. On a GPU a round is many calls, so that launches queue up as they do in training, and ends when
the device has done them; the time written down is one call's.
"""

from __future__ import annotations

import signal
import statistics
import time
import warnings

import pytest
import torch

import cases
import ceilings
import costs
import environment
import parity

ROUND = 0.005  # seconds that a round on a GPU takes at least
WARM, PATIENCE = 20, 1.0  # calls before any is timed, and seconds: the first ones compile, and capture CUDA graphs
MISSED = pytest.StashKey[list[str]]()  # what differs from the reference beyond its tolerance
SHORT = 0.02  # seconds; rounds shorter than this are each preceded by a call that only warms the caches


def pytest_addoption(parser) -> None:
    group = parser.getgroup("l2l_fast benches")
    group.addoption("--quick", action="store_true", help="small cases only, few rounds: under a minute")
    group.addoption("--sizes", help=f"which sizes of the step, separated by commas: {', '.join(cases.SIZES)}")
    group.addoption(
        "--time-anyway", action="store_true",
        help="time even where parity fails, say so at the end, and exit with 1: a GPU's time is scarce",
    )  # fmt: skip
    group.addoption("--device", default="cpu", help="where to run what is timed: cpu (default) or cuda")


def pytest_configure(config) -> None:
    # What is timed so far is written when it is interrupted, also where a shell has made its children ignore that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cases.use(config.getoption("--device"))
    if cases.device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    config.addinivalue_line("markers", "full: left out by --quick")
    # torch.compile warns of what does not concern the row: deprecations inside torch, TF32 hints, forks.
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}:torch")


def pytest_sessionstart() -> None:
    # Where parity fails or nothing is selected, pytest-benchmark's remark would end the session with a traceback.
    warnings.filterwarnings("ignore", message="Not saving anything")


def pytest_collection_modifyitems(config, items) -> None:
    quick, sizes = config.getoption("--quick"), config.getoption("--sizes")
    sizes = sizes.split(",") if sizes else cases.QUICK if quick else tuple(cases.SIZES)
    unknown = set(sizes) - set(cases.SIZES)
    if unknown:
        raise pytest.UsageError(f"--sizes {','.join(sorted(unknown))}: give some of {', '.join(cases.SIZES)}")

    def wanted(item) -> bool:
        size = item.callspec.params.get("size") if hasattr(item, "callspec") else None
        return (size is None or size in sizes) and not (quick and item.get_closest_marker("full"))

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(scope="session", autouse=True)
def _parity(request) -> None:
    """A bench refuses to report when parity fails, or flags what it reports."""
    missed = request.config.stash[MISSED] = parity.check()
    if missed and not request.config.getoption("--time-anyway"):
        pytest.exit(f"nothing is timed, because parity with the float64 reference fails: {missed[0]}", returncode=1)


def pytest_terminal_summary(terminalreporter, config) -> None:
    for missed in config.stash.get(MISSED, []):
        terminalreporter.write_line(f"PARITY FAILS, and what was timed is not the right thing: {missed}")


def pytest_sessionfinish(session) -> None:
    if session.config.stash.get(MISSED, []):
        session.exitstatus = 1


@pytest.fixture(scope="session")
def _ceilings() -> dict:
    """By (group, threads): measured again for each group, since a machine's clock drifts."""
    return {}


@pytest.fixture
def race(benchmark, request, _ceilings):
    """``race(group, call, ...)``: times a call, beside ours where it is a rival, and writes the row's facts down."""
    threads_before = torch.get_num_threads()
    on_gpu = cases.device.type == "cuda"
    budget = 0.3 if request.config.getoption("--quick") else 0.6 if on_gpu else 1.5

    def run(
        group: str, call, *, kind: str, case: str, way: str, coordinates: int,
        threads: int | None = None, beside=None, moved: float | None = None, multiply_adds: float = 0, **facts,
    ) -> list[float]:  # fmt: skip
        """Times ``call``; returns the times of ``beside``, one for each of its rounds.

        Args:
            group: what is compared with each other.
            call: what is timed; threads are set already.
            kind, case, way: the row's names.
            coordinates: that one call works on (times steps, where it makes several).
            beside: ours, to be timed in turn with it.
            moved, multiply_adds: bytes and multiply-adds a coordinate must cost; None where no ceiling applies.
            facts: what else to write down.
        """
        benchmark.group = group
        times = [_settled(each, PATIENCE if on_gpu else 0.1) for each in (call, beside) if each]
        estimate, calls = sum(times), 1
        if on_gpu:
            calls = max(1, min(200, int(ROUND / min(times))))
            call, beside = _repeated(call, calls), beside and _repeated(beside, calls)
            estimate *= calls
            benchmark._timer = lambda: _clock() / calls  # the seconds of one call
        short = estimate < SHORT and not on_gpu
        rounds = max(3, min(200, int(budget / ((1 + short) * estimate))))
        ours: list[float] = []

        def before() -> None:
            if beside:
                if short:
                    beside()
                ours.append(_time(beside) / calls)
            if short:
                call()

        benchmark.pedantic(call, setup=before, rounds=rounds)
        seconds = benchmark.stats.stats.median
        row = {"kind": kind, "case": case, "way": way, "threads": torch.get_num_threads(), "coordinates": coordinates,
               "coordinates_per_second": coordinates / seconds}  # fmt: skip
        if beside:
            row["ours_seconds"] = statistics.median(ours)
            row["times_ours"] = seconds / row["ours_seconds"]
            ratios = [theirs / mine for theirs, mine in zip(benchmark.stats.stats.data, ours, strict=True)]
            row["times_ours_q1"], _, row["times_ours_q3"] = statistics.quantiles(ratios, n=4, method="inclusive")
        if moved is not None:
            key = cases.device if on_gpu else (group, torch.get_num_threads())
            if key not in _ceilings:
                _ceilings[key] = ceilings.measure()
            found = _ceilings[key]
            floor, limit = costs.floor_seconds(moved, multiply_adds, found)
            row |= {"bytes": moved, "multiply_adds": multiply_adds, **found, "limit": limit,
                    "share_of_ceiling": floor * coordinates / seconds,
                    "share_of_copy": moved * coordinates / seconds / found["copy_bytes_per_second"]}  # fmt: skip
            if multiply_adds and "fma_flops" in found:
                row["share_of_fma"] = 2 * multiply_adds / found["fma_flops"] * coordinates / seconds
        benchmark.extra_info.update(row | facts)
        return ours

    yield run
    torch.set_num_threads(threads_before)


def _clock() -> float:
    cases.finished()
    return time.perf_counter()


def _time(call) -> float:
    begun = _clock()
    call()
    return _clock() - begun


def _settled(call, patience: float) -> float:
    """Seconds of a call when WARM have been made, or when those after the first have taken ``patience`` seconds."""
    last, spent = _time(call), 0.0
    for _ in range(WARM):
        if spent >= patience:
            break
        last = _time(call)
        spent += last
    return last


def _repeated(call, times: int):
    def run() -> None:
        for _ in range(times):
            call()

    return run


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    facts = environment.describe(list(config.invocation_params.args))
    if cases.device.type == "cpu":
        facts["gate_products_flops"] = ceilings.gate_products()
    output_json["environment"] = facts
