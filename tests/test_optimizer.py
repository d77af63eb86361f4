"""Adam as written down, with averages behind the weights."""

import torch
from torch import nn

from aaae_dist.optimizer import EPSILON, Adam

BETAS = (0.5, 0.9)


def networks() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {"encoder": nn.Linear(3, 2), "critic": nn.Linear(4, 1, bias=False)}


def adam(nets: dict[str, nn.Linear]) -> Adam:
    optimizer = Adam([{"params": list(net.parameters()), "name": name, "betas": BETAS} for name, net in nets.items()])
    optimizer.begin([weight for net in nets.values() for weight in net.parameters()])
    return optimizer


def gradients(nets: dict[str, nn.Linear], step: int) -> list[torch.Tensor]:
    """Give every weight a gradient of its own."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for weight in (weight for net in nets.values() for weight in net.parameters()):
        weight.grad = torch.randn(weight.shape, generator=generator)
        found.append(weight.grad.clone())
    return found


def test_steps_against_the_formulas():
    nets = networks()
    optimizer, rates, averaging = adam(nets), {"encoder": 0.1, "critic": 0.02}, {"encoder": 0.3, "critic": 1}
    weights = {name: [w.detach().clone().double() for w in net.parameters()] for name, net in nets.items()}
    averages = {name: [w.clone() for w in values] for name, values in weights.items()}
    first = {name: [torch.zeros_like(w) for w in values] for name, values in weights.items()}
    second = {name: [torch.zeros_like(w) for w in values] for name, values in weights.items()}
    for step in range(1, 6):
        given = iter(gradients(nets, step))
        for group in optimizer.param_groups:
            group.update(lr=rates[group["name"]], rate=averaging[group["name"]])
        optimizer.step()
        for name, values in weights.items():
            grads = [next(given).double() for _ in values]
            for i, g in enumerate(grads):
                first[name][i] = BETAS[0] * first[name][i] + (1 - BETAS[0]) * g
                second[name][i] = BETAS[1] * second[name][i] + (1 - BETAS[1]) * g**2
                mean, square = first[name][i] / (1 - BETAS[0] ** step), second[name][i] / (1 - BETAS[1] ** step)
                weights[name][i] -= rates[name] * mean / (square.sqrt() + EPSILON)
                averages[name][i] += averaging[name] * (weights[name][i] - averages[name][i])
    for name, net in nets.items():
        for weight, expected, average in zip(net.parameters(), weights[name], averages[name], strict=True):
            torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(optimizer.state[weight]["average"].double(), average, rtol=1e-4, atol=1e-6)


def test_a_network_without_gradients_stays_and_so_does_its_average():
    nets = networks()
    optimizer, before = adam(nets), nets["critic"].weight.detach().clone()
    gradients(nets, 0)
    nets["critic"].weight.grad = None
    for group in optimizer.param_groups:
        group.update(lr=0.1, rate=0.5)
    optimizer.step()
    assert torch.equal(nets["critic"].weight, before)
    assert torch.equal(optimizer.state[nets["critic"].weight]["average"], before)
    assert not torch.equal(nets["encoder"].weight, networks()["encoder"].weight)


def test_an_idle_step_moves_nothing():
    nets = networks()
    optimizer = adam(nets)
    optimizer.idle = True
    gradients(nets, 0)
    optimizer.step()
    for name, net in networks().items():
        assert torch.equal(net.weight, nets[name].weight)
    assert all(not state["step"] for state in optimizer.state.values())


def test_steps_are_counted_on_from_where_they_were():
    """Bias correction belongs to the number of steps: one that goes on differs from one that begins."""
    found = []
    for steps in (0, 50):
        nets = networks()
        optimizer = adam(nets)
        optimizer.count(steps)
        gradients(nets, 0)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        found.append(nets["encoder"].weight.detach().clone())
        assert {state["step"].item() for state in optimizer.state.values()} == {steps + 1}
    assert not torch.allclose(*found)
