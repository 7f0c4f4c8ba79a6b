"""The operators in the loss of a model inside DistributedDataParallel: gradients are those of one
process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crpt import ops

FRAMES = torch.randint(0, 256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
KEYS = torch.randn(40, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
STEPS = 2


class Model(nn.Module):
    """The pre-training objective in small, with every operator on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.features = nn.Conv2d(2, 3, 3, stride=2)
        self.embedding = nn.Linear(27, 12)
        self.prototypes = nn.Parameter(torch.randn(10, 12))
        self.double()

    def forward(self, index: Tensor, shifts: Tensor, noise: Tensor, group: Any) -> Tensor:
        views = ops.frame_stack(FRAMES, index, shifts, pad=2, dtype=torch.float64)
        views = ops.random_shift(views + noise, 2, shifts.flip(1))  # [B, 2, 8, 8]
        z = self.embedding(self.features(views).relu().flatten(1))  # [B, 12]
        scores = ops.prototype_similarity(z, self.prototypes)
        codes = ops.sinkhorn(scores, group=group)
        unit = F.normalize(self.prototypes, dim=-1)
        return (
            ops.prototype_loss(scores, codes)
            + 0.5 * ops.intrinsic_loss(unit)
            + 0.3 * ops.prototype_objective(z, unit, codes, 0.2, 0.7)[0]
            - 0.1 * ops.knn_distance(z, KEYS, 3).mean()
        )


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return (
        torch.randint(0, 30, (12, 2), generator=g),
        torch.randint(-2, 3, (12, 2), generator=g),
        torch.randn(12, 2, 8, 8, generator=g, dtype=torch.float64),
    )


def train(model: nn.Module, group: Any, rank: int, size: int, compiled: bool) -> list[Any]:
    torch._dynamo.reset()
    function = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for step in range(STEPS):
        mine = [x.chunk(size)[rank] for x in batch(step)]
        optimizer.zero_grad()
        loss = function(*mine, group)
        loss.backward()
        history.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        optimizer.step()
    return history


def _train_in_parallel(group: Any, compiled: bool) -> list[Any]:
    model = DistributedDataParallel(Model(), process_group=group)
    return train(model, group, group.rank(), group.size(), compiled)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_gradients_are_those_of_one_process(ranks: Ranks, size: int, compiled: bool) -> None:
    expected = train(Model(), None, 0, 1, compiled=False)
    for histories in zip(
        *ranks.run(_train_in_parallel, *[(compiled,)] * size), expected, strict=True
    ):
        *parts, (loss, *grads) = histories
        torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), loss)
        assert all(grad.abs().max() > 0 for grad in grads)
        for part in parts:
            for got, grad in zip(part[1:], grads, strict=True):
                torch.testing.assert_close(got, grad, rtol=1e-9, atol=1e-12)
