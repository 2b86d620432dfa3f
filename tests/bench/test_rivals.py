"""The benches compare like with like: rivals compute what ours computes, and the counts are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM, tasks
from l2l_fast.meta.estimators import TruncatedBackpropagation
from l2l_fast.meta.unroll import Rule, Trajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import cases
import costs
import gpu_small
import ours
import parity
import report
import rivals

SHAPES = [(5, 7), (3,), (2, 2, 2)]


def _joined(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # compiling takes half a minute


@pytest.mark.parametrize("way", rivals.LEARNED)
def test_rivals_make_our_steps(way, monkeypatch):
    _eager(monkeypatch)
    theirs, mine = cases.params(SHAPES), cases.params(SHAPES)
    before = _joined(mine)
    rival, own = rivals.LEARNED[way](cases.network(), theirs), ours.optimizer("ours", mine)
    for _ in range(5):
        rival.step()
        own.step()
    assert (_joined(mine) - before).abs().max() > 1e-3
    torch.testing.assert_close(_joined(theirs), _joined(mine), rtol=1e-5, atol=1e-6)
    assert cases.state_bytes(rival) == 46 * 80 * 4


@pytest.mark.parametrize("move", [rivals.Cells, rivals.Compiled])
def test_rivals_make_our_meta_gradient(move, monkeypatch):
    _eager(monkeypatch)
    network = cases.network()
    (source,) = cases.params([(7, 33)])
    expected = ours.meta_gradient(network, source.grad)
    found = rivals.meta_gradient(move(network), source.grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    alone = ours.meta_gradient(network, source.grad, forward=False)
    torch.testing.assert_close(alone, expected)


def test_the_eager_meta_update_has_our_meta_gradient():
    network, task = cases.network(), tasks.Quadratic()
    rival = rivals.MetaUpdate(network, task, instances=3, unroll=6)
    trajectory = Trajectory(tasks.Instances(task, range(3)), network.config)
    rule = Rule.of(network)
    expected = TruncatedBackpropagation(rule).prepare(trajectory, 6)().gradient
    rival.gradient_()
    found = _joined([parameter.grad for parameter in rival.cells.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_the_eager_meta_update_goes_on_to_the_next_trajectory():
    rival = rivals.MetaUpdate(cases.network(), tasks.Quadratic(), instances=2, unroll=2, horizon=4)
    for started in (2, 4, 4):
        rival.step()
        assert rival.started == started


@pytest.mark.parametrize("way", rivals.HAND_DESIGNED)
def test_hand_designed_ways_are_torchs_own(way):
    one, other = cases.params(SHAPES), cases.params(SHAPES)
    for optimizer in (rivals.hand_designed(way, one), getattr(torch.optim, way.split()[0])(other, lr=1e-4)):
        optimizer.step()
    torch.testing.assert_close(one, other)


def test_counts_of_the_paper_network():
    config = CoordinatewiseLSTM().config
    # 80 numbers of state read and written, the parameter read and written, the gradient read.
    assert costs.step_bytes(config) == 2 * 80 * 4 + 3 * 4 == 652
    assert costs.step_bytes(config, torch.bfloat16) == 2 * 80 * 2 + 3 * 4 == 332
    # 80 gates from 2 features and 20 hidden, 80 gates from 20 and 20, one output from 20.
    assert costs.step_multiply_adds(config) == 80 * 22 + 80 * 40 + 20 == 4980
    assert costs.meta_multiply_adds(config) == 3 * 4980 - 80 * 2


def test_the_ceiling_is_the_slower_of_both():
    slow_copy = {"sgemm_flops": 1e12, "copy_bytes_per_second": 1e9}
    assert costs.floor_seconds(652, 4980, slow_copy) == (652e-9, "copy")
    slow_sgemm = {"sgemm_flops": 1e10, "copy_bytes_per_second": 1e12}
    assert costs.floor_seconds(652, 4980, slow_sgemm) == (pytest.approx(9960e-10), "sgemm")


def test_two_products_in_tf32_stand_for_one_in_float32():
    rates = {"sgemm_flops": 1e10, "tf32_flops": 4e10, "copy_bytes_per_second": 1e12}
    assert costs.floor_seconds(652, 4980, rates) == (pytest.approx(9960 / 2e10), "sgemm")


def test_sizes():
    counts = {name: sum(torch.Size(shape).numel() for shape in shapes) for name, shapes in cases.SIZES.items()}
    assert counts["16k"] == 15_910
    assert counts["10M"] == 10_000_000
    assert len(cases.SIZES["resnet"]) == 200


def test_parity_gate(monkeypatch):
    assert parity.check() == []
    monkeypatch.setattr(parity, "_steps", lambda network, dtype: (torch.ones(3), torch.zeros(3) + 0.9))
    missed = parity.check()
    assert len(missed) == 4, missed  # both networks, both states; the meta-gradients are right
    assert missed[0].startswith("step, paper network, torch.float32 state: relative error 1.1e-01")


def _bench(kind, case, way, median, coordinates, **extra):
    extra = {"kind": kind, "case": case, "way": way, "threads": 2, "coordinates": coordinates, **extra}
    numbers = {"q1": 0.9 * median, "q3": 1.1 * median, "iqr": 0.2 * median, "min": 0.8 * median, "rounds": 5}
    return {"extra_info": extra, "stats": {"median": median, "mean": median, **numbers, "data": [median] * 5}}


def test_report(tmp_path):
    shared = {"share_of_ceiling": 0.7, "limit": "sgemm", "bytes": 652, "multiply_adds": 4980, "state_bytes": 2**20}
    raw = {
        "machine_info": {"node": "secret-host"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2030-01-02T03:04:05",
        "environment": {"cpu": "A CPU", "cores": 2, "kernels": "native avx512", "torch": "2.13.0", "threads": 2,
                        "command": "python -m pytest bench"},
        "benchmarks": [
            _bench("step", "1k", "ours", 1e-4, 1000, coordinates_per_second=1e7, share_of_fma=0.6, **shared),
            _bench("step", "1k", "nn.LSTMCell", 2.4e-3, 1000, times_ours=24.0, **shared),
            _bench("step", "1M", "ours", 0.1, 10**6, **shared),
            _bench("step", "1M", "Adam fused", 1e-3, 10**6, times_ours=0.01),
            _bench("step", "1M", "ours moments", 0.12, 10**6, times_ours=1.2),
            _bench("overhead", "16k", "step() beside the op", 1e-3, 15910, overhead_seconds=4e-5),
            _bench("overhead", "16k", "step() of empty tensors", 3e-5, 0),
            _bench("memory", "unroll 20", "ours", 2, 800, peak_extra_bytes=4e5, peak_extra_bytes_per_coordinate=500),
            _bench("memory", "unroll 20", "autograd", 2, 10, peak_extra_bytes=1e5, peak_extra_bytes_per_coordinate=1e4),
        ],
    }  # fmt: skip
    result = report.joined([report.trim(raw)])
    report.write(result, tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "24.0x" in text
    assert "0.01x" in text
    assert "70% sgemm" in text
    assert "ours moments takes 1.20 of ours" in text
    assert "step, 1k, 2 threads: more than 40.0x nn.LSTMCell is out of this machine's reach" in text
    assert "40 µs" in text
    assert "20 times as much" in text
    assert max(map(len, text.splitlines())) <= 105
    assert "1 MiB" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    (saved,) = tmp_path.glob("*.json")
    assert saved.name == "2030-01-02-native-avx512-0123456789.json"
    assert json.loads(saved.read_text()) == result
    assert "secret-host" not in saved.read_text()
    assert "data" not in result["rows"][0]


def test_several_runs_make_one_report():
    """The last to have a row counts, and what was written once can be joined again."""

    def run(command, *medians):
        rows = [{"kind": "step", "case": case, "way": "ours", "median": median} for case, median in medians]
        return {"environment": {"command": command, "cpu": "A"}, "rows": rows}

    first, second = run("one", ("1k", 1), ("1M", 2)), run("two", ("1M", 3), ("10M", 4))
    both = report.joined([report.trim(report.joined([first])), second])
    assert both == run("one; two", ("1k", 1), ("1M", 3), ("10M", 4))


def test_a_gpus_report():
    shared = {"bytes": 652, "multiply_adds": 4980, "share_of_ceiling": 0.9, "limit": "copy", "tf32_flops": 3e14,
              "copy_bytes_per_second": 4e12, "share_of_copy": 0.9}  # fmt: skip
    raw = {
        "commit_info": {"id": None, "dirty": None},
        "datetime": "2030-01-02T03:04:05",
        "environment": {"cpu": "A CPU", "cores": 2, "kernels": "cuda", "torch": "2.11.0", "threads": 2,
                        "command": "x", "gpu": "A GPU", "driver": "580"},
        "benchmarks": [
            _bench("step", "10M", "ours", 1.8e-3, 10**7, **shared),
            _bench("step", "10M", "torch.compile max-autotune", 1e-2, 10**7, times_ours=5.5, **shared),
            _bench("step in a graph", "16k", "ours", 1e-5, 15910),
            _bench("step in a graph", "16k", "Adam fused", 9e-6, 15910, times_ours=0.9),
            _bench("meta-update", "mnist-mlp", "ours", 5e-3, 318_200),
        ],
    }  # fmt: skip
    text = report.summary(report.trim(raw))
    assert "10M: ours moves 3,600 GB/s, 90% of the copy rate" in text
    assert "10,000 meta-updates of mnist-mlp: 50 s" in text
    assert "max-autotune" in text
    assert "0.9x" in text
    assert "A GPU, driver 580" in text


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_the_small_case_for_gpu_tools(name, capsys, monkeypatch):
    monkeypatch.setattr(gpu_small, "missed", [])
    gpu_small.step(name, [(100,), (3, 5)], torch.bfloat16, "cpu")
    gpu_small.unroll(name, 65, "cpu")
    assert capsys.readouterr().out.count("allowed") == 2
    assert gpu_small.missed == []


def test_the_small_case_goes_on_where_something_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(gpu_small, "missed", [])
    wrong = [torch.ones(3), torch.tensor([1.0, 2.0, float("nan")])]
    gpu_small.compare("a thing", wrong, [torch.ones(3).double(), torch.tensor([1.0, 2.0, 3.0]).double()], 1e-3)
    assert "tensor 1: nan" in capsys.readouterr().out
    assert gpu_small.missed == ["a thing"]


def gpu_script(*arguments):
    script = Path(report.__file__).parent / "gpu.sh"
    return subprocess.run(
        [script, *arguments], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("parts", [[], ["tests", "ncu"]])
def test_the_gpu_script_says_when_there_is_no_gpu(tmp_path, parts):
    done = gpu_script(tmp_path, *parts)
    assert done.returncode == 2, done.stderr
    assert "no GPU" in done.stderr


def test_the_gpu_script_says_which_parts_there_are(tmp_path):
    done = gpu_script(tmp_path / "out", "test")
    assert done.returncode == 64
    assert "PARTs: kernels smoke first ncu tests meta general (A)" in done.stdout.replace("\n# ", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "text"), [(2.5, "2.5 s"), (0.1072, "107 ms"), (4.2e-5, "42 µs"), (3e-8, "30 ns")])
def test_seconds(value, text):
    assert report.seconds(value) == text
