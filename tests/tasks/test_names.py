"""The names of tasks: each gives a working task of the right size; others are refused helpfully."""

import doctest
import importlib
import sys

import pytest
import torch

from l2l_fast import tasks

SIZES = {
    "quadratic": 10,
    "digits-mlp": 1510,
    "digits-mlp-2layer": 1930,
    "digits-mlp-40": 3010,
    "digits-mlp-relu": 1510,
    "digits-conv": 1898,
    "mnist-mlp": 15910,
    "mnist-mlp-2layer": 16330,
    "mnist-mlp-40": 31810,
    "mnist-mlp-relu": 15910,
    "mnist-conv": 9098,
    "meta-quadratic": 49,
    "meta-digits-mlp": 49,
    "transformer-lm": 116326,
    "vision-transformer": 27530,
    "recurrent-lm": 34982,
    "cnn-batchnorm": 4978,
    "autoencoder": 54740,
    "tabular-regression": 4929,
    "wide-mlp": 105994,
    "deep-mlp": 21706,
    "digits-small-mlp": 2410,
    "mnist-small-mlp": 1930,
    "small-regression": 1377,
    "small-text-mlp": 9165,
    "small-transformer": 6637,
}
OF_MNIST = ("mnist", "vision", "cnn", "autoencoder", "wide", "deep")
MNIST = [pytest.param(name, marks=pytest.mark.mnist) for name in SIZES if name.startswith(OF_MNIST)]
ALL = [name for name in SIZES if not name.startswith(OF_MNIST)] + MNIST


@pytest.fixture
def files(request):
    """MNIST's files, or a skip; never a download."""
    if not request.node.get_closest_marker("mnist"):
        return
    places = sys.modules["l2l_fast.data.mnist"]._places(None)
    if not any(path.is_file() for place in places for path in place.glob("train-images-idx3-ubyte*")):
        pytest.skip("MNIST's files are neither under L2L_FAST_DATA nor in the cache")


def test_names():
    assert tasks.names() == list(SIZES)


@pytest.mark.parametrize("name", ALL)
def test_every_name_works(files, name):
    task = tasks.get(name)
    assert isinstance(task, tasks.Task)
    assert task.name == name
    instances = tasks.Instances(task, seeds=[1, 2, 3])
    theta, batch = instances.start(), instances.draw()
    assert theta.shape == (3, SIZES[name])
    losses, grads = instances.evaluate(theta, batch)
    assert losses.shape == (3,)
    assert losses.isfinite().all()
    assert grads.isfinite().all()
    assert grads.abs().amax(1).min() > 0
    if isinstance(task, tasks.Classifier):
        assert ((losses > 1.5) & (losses < 3.5)).all()  # log 10 = 2.3 for a network that knows nothing

    theta.requires_grad_()
    again, with_graph = instances.evaluate(theta, batch, create_graph=True)
    torch.testing.assert_close(again.detach(), losses)
    torch.testing.assert_close(with_graph.detach(), grads)
    (second,) = torch.autograd.grad(with_graph.square().sum(), theta)
    assert second.isfinite().all()
    assert second.any()


def test_the_deck_s_network():
    task = tasks.get("digits-mlp")
    assert (task.hidden, task.activation, task.batch_size, task.half) == ((20,), "sigmoid", 128, "meta-train")
    assert tasks.get("digits-mlp-2layer").hidden == (20, 20)
    assert tasks.get("digits-mlp-40").hidden == (40,)
    assert tasks.get("digits-mlp-relu").activation == "relu"


def test_overrides():
    task = tasks.get("digits-mlp", init_scale=(0.001, 0.1), batch_size=16, half="meta-test", folder=None, name="mine")
    assert (task.init_scale, task.batch_size, task.half, task.name) == ((0.001, 0.1), 16, "meta-test", "mine")
    assert tasks.get("quadratic", dimension=3).dimension == 3
    with pytest.raises(TypeError, match="widths"):
        tasks.get("digits-mlp", widths=(3,))


def test_folder_reaches_mnist(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        tasks.get("mnist-mlp", folder=tmp_path / "absent").init(torch.Generator())


@pytest.mark.parametrize(("name", "hint"), [("mnist-mpl", "Did you mean mnist-mlp?"), ("digit-conv", "digits-conv?")])
def test_unknown_name_suggests(name, hint):
    with pytest.raises(ValueError, match="there is no task") as caught:
        tasks.get(name)
    assert hint in str(caught.value)
    assert all(known in str(caught.value) for known in SIZES)


def test_unknown_name_unlike_any():
    with pytest.raises(ValueError, match="Known: quadratic") as caught:
        tasks.get("xyz")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["tasks.registry", "tasks.base", "tasks.quadratic", "tasks.classifier", "tasks.module", "tasks.meta_training",
     "data.dataset", "data.digits", "data.idx", "data.mnist"],
)  # fmt: skip
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"l2l_fast.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
