"""crpt/ops/cuda.py without a GPU: its functions on CPU tensors, over cpp_tests/cuda_emulation.

What is proven here is the glue: checks, allocation, layouts, batches, dtypes, blocks of queries and
errors. The kernels have their own tests in cpp_tests/test_cuda_*.cpp.
"""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

from crpt.ops import cuda, reference
from crpt.ops.schemas import SCHEMAS

EMULATION = Path(__file__).parents[2] / "cpp_tests" / "cuda_emulation"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module crpt._cuda, compiled as C++ for the emulated device."""
    build = tmp_path_factory.mktemp("cuda_emulation")
    configure = (
        *("cmake", "-S", EMULATION, "-B", build, "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    )
    for command in (configure, ("cmake", "--build", build, "--parallel", "2")):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (path,) = build.glob("_cuda*.so")
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _on_emulated_device(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", emulated)
    monkeypatch.setattr(cuda, "_stream", lambda device: (0, 0))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return in_dtype("", args, torch.float64)


def budget(got: Tensor, twin: Callable[..., Tensor], *args: Any) -> None:
    """No worse than twice the twin in the same dtype, both measured against the twin in float64."""
    exact = twin(*double(args))
    assert got.shape == exact.shape
    assert got.dtype == args[0].dtype
    if got.numel() == 0:
        return
    roundings = 16 if got.dtype == torch.float64 else 1  # float64 cannot be measured against itself
    tiny = roundings * torch.finfo(got.dtype).eps * exact.abs().max().item()
    allowed = 2 * (twin(*args).double() - exact).abs().max().item() + tiny
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=allowed)


def transposed(x: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return x.mT.contiguous().mT


def test_every_operator_has_a_cuda_function_with_the_arguments_of_its_schema() -> None:
    for schema in SCHEMAS:
        parsed = torch._C.parse_schema(f"crpt::{schema}")
        function = getattr(cuda, parsed.name.removeprefix("crpt::") + "_cuda")
        assert list(inspect.signature(function).parameters) == [a.name for a in parsed.arguments]


def test_available_only_with_kernels_and_a_torch_that_has_cuda() -> None:
    built = importlib.util.find_spec("crpt._cuda") is not None
    assert (built and torch.version.cuda is not None) is cuda.AVAILABLE


def cases() -> dict[str, tuple[str, tuple[Any, ...]]]:
    scores, codes = normal(2, 3, 9, 33), normal(2, 3, 9, 33).softmax(-1)
    vectors = torch.nn.functional.normalize(normal(3, 17, 5), dim=-1)
    images = normal(3, 2, 6, 7)
    shifts = torch.tensor([[-4, 4], [0, 1], [3, -2]])
    frames = normal(5, 3, 6, 7).mul(40).clamp(0, 255).to(torch.uint8)
    index = torch.tensor([[4, 0], [1, 1], [2, 4]])
    return {
        "sinkhorn": ("sinkhorn", (0.3 * scores, 0.1, 3)),
        "sinkhorn wide": ("sinkhorn", (30 * scores, 0.1, 3)),
        "sinkhorn no iteration": ("sinkhorn", (scores[0], 0.5, 0)),
        "sinkhorn not contiguous": ("sinkhorn", (transposed(scores[0, 0]), 0.5, 2)),
        "sinkhorn no items": ("sinkhorn", (scores[:0], 0.1, 3)),
        "prototype_similarity": ("prototype_similarity", (normal(2, 9, 5), normal(2, 7, 5))),
        "prototype_similarity one set": ("prototype_similarity", (normal(2, 9, 5), normal(7, 5))),
        "prototype_similarity not contiguous": (
            "prototype_similarity",
            (transposed(normal(9, 5)), transposed(normal(7, 5))),
        ),
        "prototype_similarity no samples": ("prototype_similarity", (normal(0, 5), normal(7, 5))),
        "prototype_loss": ("prototype_loss", (scores, codes, 0.1)),
        "prototype_loss one": (
            "prototype_loss",
            (transposed(scores[0, 0]), transposed(codes[0, 0]), 0.7),
        ),
        "prototype_loss no items": ("prototype_loss", (scores[:0], codes[:0], 0.1)),
        "intrinsic_loss": ("intrinsic_loss", (vectors, 1.5)),
        "intrinsic_loss one": ("intrinsic_loss", (transposed(vectors[0]), 2.0)),
        "intrinsic_loss no items": ("intrinsic_loss", (vectors[:0], 1.5)),
        "random_shift": ("random_shift", (images, shifts, 4)),
        "random_shift channels last": (
            "random_shift",
            (images.to(memory_format=torch.channels_last), shifts, 4),
        ),
        "random_shift not contiguous": (
            "random_shift",
            (images.mT, shifts.t().contiguous().t(), 4),
        ),
        "random_shift no images": ("random_shift", (images[:0], shifts[:0], 4)),
        "frame_stack": ("frame_stack", (frames, index, shifts, 4)),
        "frame_stack no shifts": ("frame_stack", (frames, index, None, 0)),
        "frame_stack any strides": ("frame_stack", (frames.mT[:, 1:, :, ::2], index, shifts, 4)),
        "frame_stack no samples": ("frame_stack", (frames, index[:0], shifts[:0], 4)),
        "knn_distance": ("knn_distance", (normal(9, 5), normal(20, 5), 3)),
        "knn_distance farthest": ("knn_distance", (normal(9, 5), normal(20, 5), 20)),
        "knn_distance not contiguous": (
            "knn_distance",
            (transposed(normal(9, 5)), transposed(normal(20, 5)), 1),
        ),
        "knn_distance no queries": ("knn_distance", (normal(0, 5), normal(20, 5), 3)),
    }


CASES = cases()


def in_dtype(name: str, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    if name == "frame_stack":
        return (*args, dtype)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, dtype: torch.dtype) -> None:
    name, args = CASES[case]
    args = in_dtype(name, args, dtype)
    got = getattr(cuda, f"{name}_cuda")(*args)
    got = got[0] if isinstance(got, tuple) else got
    twin = getattr(reference, name)
    if name == "random_shift":
        images, shifts, pad = args
        assert torch.equal(got, twin(images, pad, shifts))
    elif name == "frame_stack":
        assert torch.equal(got, twin(*args))
        assert got.dtype == dtype
    elif name == "knn_distance":
        budget(got.to(dtype), twin, *args)
    else:
        budget(got, twin, *args)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results_are_what_the_fakes_promise(case: str, dtype: torch.dtype) -> None:
    name, args = CASES[case]
    args = in_dtype(name, args, dtype)
    got = getattr(cuda, f"{name}_cuda")(*args)
    meta = (x.to("meta") if isinstance(x, Tensor) else x for x in args)
    promised = getattr(torch.ops.crpt, name)(*meta)
    pairs = zip(got, promised, strict=True) if isinstance(got, tuple) else [(got, promised)]
    for real, fake in pairs:
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        assert real.numel() == 0 or real.stride() == fake.stride()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str
)
def test_random_shift_moves_every_type(dtype: torch.dtype) -> None:
    images = normal(3, 2, 6, 7).mul(50).to(dtype)
    shifts = torch.tensor([[-2, 2], [0, 1], [1, -2]])
    got = cuda.random_shift_cuda(images, shifts, 2)
    assert torch.equal(got, reference.random_shift(images, 2, shifts))


def test_frame_stack_leaves_bytes_alone() -> None:
    _, args = CASES["frame_stack any strides"]
    assert torch.equal(cuda.frame_stack_cuda(*args, torch.uint8), reference.frame_stack(*args))


# --- gradients: the backward functions against autograd of the twin in float64 ---


def gradients_of(twin: Callable[..., Tensor], grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    leaves = [x.double().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    out = twin(*leaves)
    wanted = [x for x in leaves if isinstance(x, Tensor)]
    return torch.autograd.grad(out, wanted, grad.double().to(out.dtype))


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=4 * eps * scale + 1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_prototype_similarity(dtype: torch.dtype) -> None:
    for leading in ((), (2,)):
        e, c = normal(*leading, 9, 5, dtype=dtype), normal(7, 5, dtype=dtype)
        grad = normal(*leading, 9, 7, dtype=dtype)
        _, unit_e, unit_c, norm_e, norm_c = cuda.prototype_similarity_cuda(e, c)
        expected = gradients_of(reference.prototype_similarity, grad, e, c)
        backward = cuda.prototype_similarity_backward_cuda
        close(backward(grad, unit_e, norm_e, unit_c), expected[0], dtype)
        close(backward(grad.mT, unit_c, norm_c, unit_e), expected[1], dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_prototype_loss(dtype: torch.dtype) -> None:
    scores = normal(2, 9, 33, dtype=dtype)
    codes = (2 * normal(2, 9, 33).softmax(-1)).to(dtype)  # need not sum to 1
    grad = torch.tensor([0.5, -2.0], dtype=dtype)
    _, logsumexp = cuda.prototype_loss_cuda(scores, codes, 0.5)
    of_scores, of_codes = gradients_of(
        lambda s, q: reference.prototype_loss(s, q, 0.5), grad, scores, codes
    )
    got = cuda.prototype_loss_backward_scores_cuda(grad, scores, codes, logsumexp, 0.5)
    assert got.dtype == dtype
    close(got, of_scores, dtype)
    got = cuda.prototype_loss_backward_codes_cuda(grad, scores, logsumexp, 0.5)
    assert got.dtype == dtype
    close(got, of_codes, dtype)
    expanded = torch.ones((), dtype=dtype).expand(2)  # what sum().backward() hands over
    got = cuda.prototype_loss_backward_codes_cuda(expanded, scores, logsumexp, 0.5)
    close(got, (of_codes.mT / grad.double()[:, None, None].mT).mT, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_intrinsic_loss(dtype: torch.dtype) -> None:
    c = torch.nn.functional.normalize(normal(3, 17, 5), dim=-1).to(dtype)
    grad = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    _, weights = cuda.intrinsic_loss_cuda(c, 1.5)
    (expected,) = gradients_of(reference.intrinsic_loss, grad, c)
    got = cuda.intrinsic_loss_backward_cuda(grad, c, weights)
    assert got.dtype == dtype
    close(got, expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_random_shift(dtype: torch.dtype) -> None:
    _, (images, shifts, pad) = CASES["random_shift"]
    grad = images.flip(0).to(dtype)
    (expected,) = gradients_of(lambda x: reference.random_shift(x, pad, shifts), grad, images)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = cuda.random_shift_backward_cuda(grad.to(memory_format=layout), shifts, pad)
        assert got.dtype == dtype
        close(got, expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_knn_distance(dtype: torch.dtype) -> None:
    queries, keys = normal(9, 5, dtype=dtype), normal(20, 5, dtype=dtype)
    queries[2] = keys[4]
    grad = normal(9, dtype=dtype)
    distance, index = cuda.knn_distance_cuda(queries, keys, 1)
    assert distance[2] == 0
    assert index[2] == 4
    saved = (grad, queries, keys, distance, index)
    expected = gradients_of(lambda q, k: reference.knn_distance(q, k, 1), grad, queries, keys)
    close(cuda.knn_distance_backward_queries_cuda(*saved), expected[0], dtype)
    close(cuda.knn_distance_backward_keys_cuda(*saved), expected[1], dtype)


# --- the rest of the glue ---


def test_knn_distance_is_the_same_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = normal(9, 5), normal(20, 5)
    whole = cuda.knn_distance_cuda(queries, keys, 3)
    for elements in (1, 45, 80, 180):
        monkeypatch.setattr(cuda, "_SQUARES_PER_BLOCK", elements)
        for a, b in zip(cuda.knn_distance_cuda(queries, keys, 3), whole, strict=True):
            assert torch.equal(a, b)


def test_arguments_are_checked_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"scores should be \[..., B, M\]"):
        cuda.sinkhorn_cuda(normal(0, 512), 0.1, 3)
    with pytest.raises(TypeError, match="scores should be float32"):
        cuda.sinkhorn_cuda(torch.ones(2, 3, dtype=torch.int64), 0.1, 3)
    with pytest.raises(ValueError, match="k should be in"):
        cuda.knn_distance_cuda(normal(9, 5), normal(20, 5), 21)


def test_a_kernel_that_fails_is_an_error_with_the_operators_name() -> None:
    frames, index = torch.zeros(5, 3, 6, 7, dtype=torch.uint8), torch.tensor([[4, 5]])
    failed = r"crpt\.ops\.{}: CUDA error: device-side assert"
    with pytest.raises(RuntimeError, match=failed.format("frame_stack")):
        cuda.frame_stack_cuda(frames, index, None, 0, torch.uint8)
    with pytest.raises(RuntimeError, match=failed.format("random_shift")):
        cuda.random_shift_cuda(normal(1, 1, 6, 7), torch.tensor([[5, 0]]), 4)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_stream", lambda device: (7, 0))
    with pytest.raises(RuntimeError, match=r"ops\.sinkhorn: CUDA error: invalid device ordinal"):
        cuda.sinkhorn_cuda(normal(4, 5), 0.1, 3)
