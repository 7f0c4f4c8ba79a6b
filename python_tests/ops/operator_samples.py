"""The one list of sample inputs that values, gradients, opcheck, torch.compile and instruction-set
tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crpt import ops
from crpt.ops import reference

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Make = Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Sample:
    operator: str
    name: str
    make: Make  # float64 arguments on the CPU
    differentiable: bool = True
    constants: tuple[int, ...] = ()  # arguments that no gradient reaches, by position

    @property
    def function(self) -> Callable[..., Tensor]:
        return self._result_of(getattr(ops, self.operator))

    @property
    def twin(self) -> Callable[..., Tensor]:
        return self._result_of(getattr(reference, self.operator))

    def _result_of(self, function: Callable[..., Any]) -> Callable[..., Tensor]:
        if self.operator != "prototype_objective":
            return function
        return lambda *args, **kwargs: function(*args, **kwargs)[0]  # the others have no gradient

    def arguments(
        self, dtype: torch.dtype, device: str = "cpu", requires_grad: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self.make(torch.Generator().manual_seed(0))

        def cast(x: Any, requires_grad: bool = requires_grad) -> Any:
            if not isinstance(x, Tensor):
                return x
            if not x.is_floating_point():
                return x.to(device)
            # A strided sample must stay strided: cast without touching the layout.
            return x.to(device=device, dtype=dtype).detach().requires_grad_(requires_grad)

        constant = [i in self.constants for i in range(len(args))]
        cast_args = (cast(x, requires_grad and not c) for x, c in zip(args, constant, strict=True))
        return tuple(cast_args), {k: cast(v) for k, v in kwargs.items()}

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"


def normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64)


def cosine(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1


def codes(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g, dtype=torch.float64).softmax(-1)


def units(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1)


def opposite(_: torch.Generator) -> Tensor:
    return torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def pixels(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def integers(low: int, high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(low, high + 1, shape, generator=g)


def call(*makers: Any, **keywords: Any) -> Make:
    def build(x: Any, g: torch.Generator) -> Any:
        return x(g) if callable(x) else x

    return lambda g: (
        tuple(build(x, g) for x in makers),
        {name: build(x, g) for name, x in keywords.items()},
    )


def transposed(make: Callable[[torch.Generator], Tensor]) -> Callable[[torch.Generator], Tensor]:
    return lambda g: make(g).mT


def channels_last(make: Callable[[torch.Generator], Tensor]) -> Callable[[torch.Generator], Tensor]:
    return lambda g: make(g).to(memory_format=torch.channels_last)


SAMPLES = [
    Sample("sinkhorn", "square", call(cosine(64, 64)), False),
    Sample("sinkhorn", "odd", call(cosine(37, 53)), False),
    Sample("sinkhorn", "batched", call(cosine(2, 3, 19, 21), 0.2, 5), False),
    # As wide as exp is trusted with: (max - min) / T just below 40.
    Sample("sinkhorn", "widest_exp", call(cosine(64, 48), 0.05), False),
    Sample("sinkhorn", "log_space", call(cosine(33, 18), 0.01, 3), False),
    Sample("sinkhorn", "no_iteration", call(cosine(9, 300), 0.1, 0), False),
    Sample("sinkhorn", "tall", call(cosine(1100, 5)), False),
    Sample("sinkhorn", "strided", call(transposed(cosine(40, 30))), False),
    Sample("sinkhorn", "one_sample", call(cosine(1, 7)), False),
    # Contiguous by torch's rules, with a stride that no fresh tensor has.
    Sample("sinkhorn", "one_strided_sample", call(lambda g: cosine(4, 7)(g)[::4]), False),
    Sample("sinkhorn", "one_prototype", call(cosine(7, 1)), False),
    Sample("sinkhorn", "no_problems", call(cosine(0, 3, 4)), False),
    Sample("prototype_similarity", "plain", call(normal(13, 24), normal(17, 24))),
    Sample("prototype_similarity", "batched", call(normal(2, 3, 8), normal(2, 5, 8))),
    Sample("prototype_similarity", "broadcast", call(normal(2, 1, 3, 8), normal(4, 5, 8))),
    Sample("prototype_similarity", "one_dimension", call(normal(5, 1), normal(3, 1))),
    Sample("prototype_similarity", "strided", call(transposed(normal(6, 9)), normal(4, 6))),
    Sample("prototype_similarity", "no_samples", call(normal(0, 6), normal(4, 6))),
    Sample("prototype_loss", "plain", call(cosine(16, 32), codes(16, 32))),
    Sample("prototype_loss", "odd", call(cosine(5, 300), codes(5, 300), 0.3)),
    Sample("prototype_loss", "batched", call(cosine(2, 3, 7, 11), codes(2, 3, 7, 11))),
    Sample("prototype_loss", "not_normalised", call(cosine(6, 9), normal(6, 9))),
    Sample("prototype_loss", "strided", call(transposed(cosine(9, 6)), transposed(codes(9, 6)))),
    Sample("prototype_loss", "one_prototype", call(cosine(4, 1), codes(4, 1))),
    *(
        Sample("prototype_objective", name, call(*arguments), constants=(2,))
        for name, arguments in {
            "plain": (normal(16, 12), units(24, 12), codes(16, 24)),
            # A weight with which the intrinsic part is seen, on either side.
            "heavy": (normal(5, 7), normal(9, 7), codes(5, 9), 0.3, 2.0, 40.0),
            "batched": (normal(2, 3, 5, 4), units(2, 3, 7, 4), codes(2, 3, 5, 7)),
            "strided": (*map(transposed, (normal(6, 9), units(6, 8), codes(8, 9))), 0.1, 0.0),
            # Opposite prototypes, at s + offset = 0.
            "infinite_without_weight": (normal(5, 2), opposite, codes(5, 3), 0.1, 0.0, 1.0),
            "one_of_each": (normal(1, 1), normal(1, 1), codes(1, 1)),
            "no_problems": (normal(0, 3, 4), normal(0, 5, 4), codes(0, 3, 5)),
        }.items()
    ),
    Sample("intrinsic_loss", "plain", call(units(32, 16))),
    Sample("intrinsic_loss", "odd", call(units(67, 5), 2.0)),
    Sample("intrinsic_loss", "batched", call(units(2, 3, 9, 4))),
    Sample("intrinsic_loss", "strided", call(lambda g: units(16, 7)(g)[::2])),
    Sample("intrinsic_loss", "one_prototype", call(units(1, 4))),
    Sample("random_shift", "plain", call(normal(5, 3, 11, 13), 4, integers(-4, 4, 5, 2))),
    Sample("random_shift", "beyond_the_edge", call(normal(6, 2, 3, 4), 9, integers(-9, 9, 6, 2))),
    Sample(
        "random_shift",
        "channels_last",
        call(channels_last(normal(4, 3, 9, 8)), 2, integers(-2, 2, 4, 2)),
    ),
    Sample(
        "random_shift", "strided", call(transposed(normal(4, 3, 9, 8)), 2, integers(-2, 2, 4, 2))
    ),
    Sample(
        "random_shift",
        "one_channel",
        call(lambda g: normal(3, 4, 6, 5)(g)[:, :1], 2, integers(-2, 2, 3, 2)),
    ),
    Sample("random_shift", "one_pixel", call(normal(3, 2, 1, 1), 2, integers(-2, 2, 3, 2))),
    Sample("random_shift", "no_images", call(normal(0, 2, 5, 5), 2, integers(-2, 2, 0, 2))),
    Sample("frame_stack", "plain", call(pixels(20, 3, 10, 12), integers(0, 19, 6, 3)), False),
    Sample(
        "frame_stack",
        "shifted",
        call(pixels(20, 3, 10, 12), integers(0, 19, 6, 3), integers(-4, 4, 6, 2)),
        False,
    ),
    Sample(
        "frame_stack",
        "float",
        call(
            pixels(20, 3, 10, 13),
            integers(0, 19, 6, 2),
            integers(-4, 4, 6, 2),
            dtype=torch.float32,
        ),
        False,
    ),
    Sample(
        "frame_stack",
        "strided",
        call(
            lambda g: pixels(20, 10, 12, 6)(g).permute(0, 3, 1, 2)[::2, ::2],
            integers(0, 9, 6, 2),
            integers(-3, 3, 6, 2),
            3,
            torch.bfloat16,
        ),
        False,
    ),
    Sample("frame_stack", "no_samples", call(pixels(4, 3, 5, 5), integers(0, 3, 0, 3)), False),
    Sample("frame_stack", "no_frames", call(pixels(0, 3, 5, 5), integers(0, 3, 0, 3)), False),
    Sample("knn_distance", "plain", call(normal(12, 8), normal(30, 8), 3)),
    Sample("knn_distance", "nearest", call(normal(7, 16), normal(65, 16), 1)),
    Sample("knn_distance", "farthest", call(normal(7, 3), normal(33, 3), 33)),
    Sample("knn_distance", "strided", call(transposed(normal(8, 6)), transposed(normal(8, 20)), 2)),
    Sample("knn_distance", "one_key", call(normal(5, 4), normal(1, 4), 1)),
    Sample("knn_distance", "no_queries", call(normal(0, 4), normal(3, 4), 2)),
]

# Enough work for three threads in every loop, forwards and backwards: each of them wants 16,384
# elements. Odd sizes, so that the shares differ.
LARGE = [
    Sample("sinkhorn", "many_problems", call(cosine(101, 24, 23)), False),
    # One problem on all threads: its rows, and the sums over its columns.
    Sample("sinkhorn", "one_problem", call(cosine(1021, 801)), False),
    Sample("sinkhorn", "one_problem_in_log_space", call(cosine(1021, 801), 0.01), False),
    Sample("prototype_similarity", "large", call(normal(501, 128), normal(403, 128))),
    Sample("prototype_loss", "large", call(cosine(301, 257), codes(301, 257))),
    Sample("prototype_loss", "many_problems", call(cosine(61, 7, 131), codes(61, 7, 131))),
    Sample(
        "prototype_objective",
        "large",
        call(normal(301, 40), units(257, 40), codes(301, 257), 0.1, 1.0),
        constants=(2,),
    ),
    Sample("intrinsic_loss", "large", call(units(257, 8))),
    Sample("intrinsic_loss", "many_problems", call(units(61, 33, 8))),
    Sample("random_shift", "large", call(normal(37, 3, 29, 31), 4, integers(-4, 4, 37, 2))),
    Sample(
        "random_shift",
        "large_channels_last",
        call(channels_last(normal(67, 3, 29, 31)), 4, integers(-4, 4, 67, 2)),
    ),
    Sample(
        "frame_stack",
        "large",
        call(pixels(50, 3, 29, 31), integers(0, 49, 23, 3), integers(-4, 4, 23, 2)),
        False,
    ),
    Sample("knn_distance", "large", call(normal(401, 128), normal(403, 128), 3)),
]
