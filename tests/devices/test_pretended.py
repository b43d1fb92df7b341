"""The pretended accelerator refuses what a GPU refuses, and computes what the CPU computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from device_helpers import PRETENDED, Accelerator, accelerator
from torch import Tensor, nn


@pytest.fixture
def there() -> Iterator[Accelerator]:
    with accelerator() as made:
        yield made


MIXED: dict[str, Callable[[Tensor], object]] = {
    "add": lambda x: x + torch.ones(3),
    "where": lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, x),
    "masked fill": lambda x: x.masked_fill(torch.ones(3, dtype=torch.bool), 0),
    "matmul": lambda x: torch.ones(2, 3) @ x,
    "cat": lambda x: torch.cat([x, torch.ones(1)]),
    "stack of numbers": lambda x: torch.stack([x[0], torch.tensor(1.0)]),
    "gather": lambda x: x.gather(0, torch.zeros(1, dtype=torch.long)),
    "index on the device": lambda x: torch.ones(3)[x.long() * 0],
    "values put": lambda x: x.index_put((torch.tensor([0, 1]),), torch.ones(2)),
    "equal": lambda x: torch.equal(x, torch.ones(3)),
    "in place": lambda x: torch.ones(3).add_(x),
}


@pytest.mark.parametrize("mixed", MIXED)
def test_devices_do_not_mix(mixed: str, there: Accelerator) -> None:
    x = torch.arange(3.0, device=PRETENDED)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        MIXED[mixed](x)


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "a number": lambda x: x * torch.tensor(2.0),
    "a number put": lambda x: x.index_put((torch.tensor([0, 1]),), torch.tensor(5.0)),
    "an index of the CPU": lambda x: x[torch.tensor([2, 0])],
    "a mask of the CPU": lambda x: x[torch.tensor([True, False, True])],
    "a copy": lambda x: x.clone().copy_(torch.ones(3)),
    "a view edited": lambda x: (x.clone()[1:].add_(1), x)[1],
    "made like it": lambda x: torch.zeros_like(x) + x.new_ones(3) + torch.tensor([1.0, 2, 3], device=x.device),
}


@pytest.mark.parametrize("allowed", ALLOWED)
def test_what_a_gpu_allows_is_allowed(allowed: str, there: Accelerator) -> None:
    result = ALLOWED[allowed](torch.arange(3.0, device=PRETENDED))
    assert result.device.type == PRETENDED
    assert torch.equal(result.cpu(), ALLOWED[allowed](torch.arange(3.0)))


def test_values_can_be_looked_at(there: Accelerator) -> None:
    x = torch.tensor([1, 2], device=PRETENDED)
    assert (x.tolist(), x.sum().item(), bool((x == 2).any())) == ([1, 2], 3, True)
    assert there.waits == Counter({"to device": 1, "to CPU": 1, "value": 2})
    there.waits.clear()
    assert x[x > 1].tolist() == [2] and (x > 1).nonzero().tolist() == [[1]]
    assert there.waits == Counter({"size": 2, "to CPU": 2})


def test_gradients_and_steps_are_those_of_the_cpu(there: Accelerator) -> None:
    weights = []
    for device in ("cpu", PRETENDED):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        layer(torch.ones(4, 3, device=device)).pow(2).sum().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        weights.append(layer.weight)
    assert weights[1].device.type == PRETENDED
    assert torch.equal(weights[0], weights[1].cpu())
