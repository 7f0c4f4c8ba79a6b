"""What torch.func.vmap makes of each operator: one call where a leading dimension or more rows can
hold the samples of vmap, else one call a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crpt.ops.schemas import LIBRARY

Dims = tuple[int | None, ...]
Rule = Callable[..., tuple[Any, Any]]


def _first(x: Any, dim: int | None, size: int, rank: int = 0) -> Any:
    """x with the samples of vmap in front, and behind them its own dimensions, at least `rank`."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x[(slice(None), *(None,) * (rank + 1 - x.dim()))]


def _leading(name: str) -> Rule:
    """One call: all tensors have leading dimensions, the same ones."""

    def rule(info: Any, dims: Dims, *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        out = getattr(torch.ops.crpt, name)(
            *(_first(x, dim, size) for x, dim in zip(args, dims, strict=True))
        )
        return out, 0 if isinstance(out, Tensor) else (0,) * len(out)

    return rule


def _rows(name: str, *, spread: tuple[int, ...], whole: int | None = None) -> Rule:
    """One call: the rows of the arguments in `spread` are independent of each other.

    Unless the argument `whole`, in which they look something up, differs between samples.
    """

    def rule(info: Any, dims: Dims, *args: Any) -> tuple[Any, Any]:
        if whole is not None and dims[whole] is not None:
            return _one_by_one(name)(info, dims, *args)
        spread_out = [
            _first(x, dim, info.batch_size) if i in spread and x is not None else x
            for i, (x, dim) in enumerate(zip(args, dims, strict=True))
        ]
        samples = tuple(spread_out[spread[0]].shape[:2])  # and rows of each
        flat = [
            x.flatten(0, 1) if i in spread and x is not None else x
            for i, x in enumerate(spread_out)
        ]
        try:
            out = getattr(torch.ops.crpt, name)(*flat)
        except ValueError as error:
            raise ValueError(
                f"{error} (of the rows of all {samples[0]} samples of vmap, {samples[1]} each)"
            ) from None
        if isinstance(out, Tensor):
            return out.unflatten(0, samples), 0
        return tuple(x.unflatten(0, samples) for x in out), (0,) * len(out)

    return rule


def _one_by_one(name: str) -> Rule:
    def rule(info: Any, dims: Dims, *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            return _of_no_sample(name, dims, *args)
        outs = [
            getattr(torch.ops.crpt, name)(
                *(x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])

    return rule


def _of_no_sample(name: str, dims: Dims, *args: Any) -> tuple[Any, Any]:
    """What one call would return, none times."""
    device = next(x.device for x in args if isinstance(x, Tensor))

    def sample(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = [size for i, size in enumerate(x.shape) if dim is None or i != dim % x.dim()]
        return x.new_empty(shape, device="meta")

    def none(x: Tensor) -> Tensor:
        return x.new_empty((0, *x.shape), device=device)

    out = getattr(torch.ops.crpt, name)(*map(sample, args, dims))
    if isinstance(out, Tensor):
        return none(out), 0
    return tuple(map(none, out)), (0,) * len(out)


def _similarity(info: Any, dims: Dims, *args: Tensor) -> tuple[Any, Any]:
    """Leading dimensions broadcast from the last: the shorter shape gets ones behind the sample."""
    shapes = [_first(x, dim, 1).shape[1:] for x, dim in zip(args, dims, strict=True)]
    rank = max(map(len, shapes))
    e, c = (_first(x, dim, info.batch_size, rank) for x, dim in zip(args, dims, strict=True))
    similarity, *rest = torch.ops.crpt.prototype_similarity(e, c)
    shapes += [shape[:-1] for shape in shapes]
    rows = (x.reshape(info.batch_size, *shape) for x, shape in zip(rest, shapes, strict=True))
    return (similarity, *rows), (0,) * 5


def _similarity_backward(
    info: Any, dims: Dims, grad: Tensor, unit: Tensor, norm: Tensor, other: Tensor
) -> tuple[Tensor, int]:
    size = info.batch_size
    grad = _first(grad, dims[0], size)
    rank = grad.dim() - 1
    shape = _first(unit, dims[1], size).shape
    unit, other = _first(unit, dims[1], size, rank), _first(other, dims[3], size, rank)
    norm = _first(norm, dims[2], size, rank - 1)
    rows = torch.ops.crpt.prototype_similarity_backward(grad, unit, norm, other)
    return rows.reshape(shape), 0


def _frame_stack_out(info: Any, dims: Dims, *args: Any) -> tuple[Any, Any]:
    raise NotImplementedError("frame_stack should have no out under vmap: leave it to torch.stack")


_RULES: dict[str, Rule] = {
    "sinkhorn": _leading("sinkhorn"),
    "prototype_similarity": _similarity,
    "prototype_similarity_backward": _similarity_backward,
    "prototype_loss": _leading("prototype_loss"),
    "prototype_loss_backward": _leading("prototype_loss_backward"),
    "prototype_loss_backward_scores": _leading("prototype_loss_backward_scores"),
    "prototype_loss_backward_codes": _leading("prototype_loss_backward_codes"),
    "prototype_objective": _leading("prototype_objective"),
    "prototype_objective_backward": _leading("prototype_objective_backward"),
    "intrinsic_loss": _leading("intrinsic_loss"),
    "intrinsic_loss_backward": _leading("intrinsic_loss_backward"),
    "random_shift": _rows("random_shift", spread=(0, 1)),
    "random_shift_backward": _rows("random_shift_backward", spread=(0, 1)),
    "frame_stack": _rows("frame_stack", spread=(1, 2), whole=0),
    "frame_stack_out": _frame_stack_out,
    "knn_distance": _rows("knn_distance", spread=(0,), whole=1),
    "knn_distance_backward_queries": _rows(
        "knn_distance_backward_queries", spread=(0, 1, 3, 4), whole=2
    ),
    "knn_distance_backward_keys": _one_by_one("knn_distance_backward_keys"),
}

for _name, _rule in _RULES.items():
    torch.library.register_vmap(f"crpt::{_name}", _rule, lib=LIBRARY)
