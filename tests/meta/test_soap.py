import pytest
import torch

from l2l_fast.meta.soap import Soap


def descend(optimizer_class, steps, **options):
    """Losses of an ill-conditioned quadratic whose axes are turned away from the coordinates."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    matrix = axes @ torch.diag(10.0 ** torch.linspace(0, 3, 6, dtype=torch.float64)) @ axes.T
    first, second = (torch.nn.Parameter(part) for part in torch.ones(6, dtype=torch.float64).split([2, 4]))
    optimizer, losses = optimizer_class([first, second], **options), []
    for _ in range(steps):
        point = torch.cat([first, second])
        loss = point @ matrix @ point
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_is_adam_until_the_first_basis():
    soap = descend(Soap, 20, lr=0.1, betas=(0.9, 0.99), every=21, eps=1e-8)
    adam = descend(torch.optim.Adam, 20, lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    assert soap == pytest.approx(adam, rel=1e-9)


def test_turned_axes_change_nothing():
    """The updates for turned gradients are the turned updates, which Adam's are not."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    grads = torch.randn(12, 5, generator=generator, dtype=torch.float64)

    def end(optimizer_class, grads, **options):
        param = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer = optimizer_class([param], lr=0.1, **options)
        for grad in grads:
            param.grad = grad
            optimizer.step()
        return param.detach()

    torch.testing.assert_close(
        end(Soap, grads @ turn.T, every=1), turn @ end(Soap, grads, every=1), rtol=1e-4, atol=1e-5
    )
    adams = turn @ end(torch.optim.Adam, grads)
    assert (end(torch.optim.Adam, grads @ turn.T) - adams).norm() > 0.1 * adams.norm()


def test_the_basis_is_orthogonal_and_the_mean_square_keeps_its_sum():
    param = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    optimizer = Soap([param], lr=0.1, every=3)
    for step in range(1, 4):
        param.grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    state = optimizer.state[param]
    torch.testing.assert_close(state["basis"].T @ state["basis"], torch.eye(5))
    assert not torch.equal(state["basis"], torch.eye(5))
    expected = 0.0
    for step in range(1, 4):
        grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        expected = 0.98 * expected + 0.02 * grad.square().sum()
    torch.testing.assert_close(state["square"].sum(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"covariance_beta": -0.1}, "covariance_beta must be"),
        ({"every": 0}, "every must be an int of at least 1"),
        ({"every": 2.5}, "every must be an int of at least 1, got 2.5"),
        ({"lr": -1}, "lr must be a number of at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be a number of at least 0, got nan"),
        ({"eps": -1}, "eps must be a positive number, got -1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Soap([torch.nn.Parameter(torch.zeros(2))], **options)


def test_refuses_what_one_basis_cannot_serve():
    with pytest.raises(ValueError, match="at most 8192 numbers"):
        Soap([torch.nn.Parameter(torch.zeros(8193))])
    with pytest.raises(ValueError, match="one group"):
        Soap([{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}])
