"""Data sets in memory, their halves, and the embedded digits."""

import subprocess
import sys

import pytest
import torch

from l2l_fast.data import Dataset, digits, halves


def rows(dataset: Dataset) -> list[bytes]:
    return [row.numpy().tobytes() for row in dataset.inputs.flatten(1)]


def test_digits():
    dataset = digits()
    assert dataset is digits()
    assert (dataset.inputs.shape, dataset.inputs.dtype) == ((1797, 8, 8), torch.float32)
    assert (dataset.targets.shape, dataset.targets.dtype, dataset.classes) == ((1797,), torch.int64, 10)
    assert (dataset.inputs.min(), dataset.inputs.max()) == (0, 1)
    assert dataset.targets[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]  # the order is part of every result


def test_digits_keep_their_labels():
    from sklearn.datasets import load_digits

    loaded = load_digits()
    label = {
        row.tobytes(): target for row, target in zip(loaded.data.astype("float32") / 16, loaded.target, strict=True)
    }
    assert [label[row] for row in rows(digits())] == digits().targets.tolist()


def test_halves_are_disjoint_alike_and_free():
    dataset = digits()
    parts = halves(dataset)
    assert list(parts) == ["meta-train", "meta-test"]
    assert [len(part) for part in parts.values()] == [898, 899]
    # All 1,797 images differ, so that sharing no row means sharing no image.
    assert not set(rows(parts["meta-train"])) & set(rows(parts["meta-test"]))
    assert torch.equal(torch.cat([part.inputs for part in parts.values()]), dataset.inputs)
    for part in parts.values():
        assert part.inputs.untyped_storage().data_ptr() == dataset.inputs.untyped_storage().data_ptr()
        assert part.targets.bincount().min() > 70  # every class, about 90 of each


def test_too_few_to_halve():
    with pytest.raises(ValueError, match="too few"):
        halves(Dataset("one", torch.rand(1, 2), torch.zeros(1, dtype=torch.long), 2))


@pytest.mark.parametrize(
    ("inputs", "targets", "why"),
    [
        (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.long), "inputs of mine"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "inputs of mine"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), "targets of mine"),
        (torch.zeros(3, 2), torch.zeros(3), "targets of mine"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), r"0 \.\.\. 1"),
    ],
)
def test_dataset_refuses(inputs, targets, why):
    with pytest.raises(ValueError, match=why):
        Dataset("mine", inputs, targets, classes=2)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install l2l_fast\[data\]"):
        digits.__wrapped__()  # past the cache


def test_import_reads_nothing_and_needs_no_extra():
    code = (
        "import sys\n"
        "sys.modules['sklearn'] = sys.modules['pooch'] = None\n"  # as if neither were installed
        "import l2l_fast.tasks as tasks\n"
        "[tasks.get(name) for name in tasks.names() if name not in tasks.WORKLOADS | tasks.SMALL]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
