"""crpt/ops/cuda.py without a GPU: its functions on CPU tensors, over cpp_tests/cuda_emulation.

The public operators and their gradients run as on a GPU, from the dispatcher down to the kernels.
What is proven here is the glue: checks, allocation, layouts, batches, dtypes, blocks of queries and
errors. The kernels have their own tests in cpp_tests/test_cuda_*.cpp.
"""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import every_kernel
import pybind11
import pytest
import rounded_encoder
import torch
from cmake import CMAKE_BIN_DIR
from copies import copies
from operator_samples import Sample
from test_common import (
    MOVES_ONLY,
    assert_within_budget,
    differentiable,
    dtypes,
    gradients,
    samples,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crpt import ops
from crpt.byte_encoder import project_bytes
from crpt.encoder import Encoder, EncoderConfig
from crpt.ops import conv_cuda, conv_features, cuda, direct, reference
from crpt.ops.schemas import SCHEMAS

pytestmark = pytest.mark.slow  # the kernels take half a minute to compile

EMULATION = Path(__file__).parents[2] / "cpp_tests" / "cuda_emulation"


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module crpt._cuda, compiled as C++ for the emulated device."""
    build = tmp_path_factory.mktemp("cuda_emulation")
    # The one from PyPI that the extra `test` installs, whether or not its environment is active.
    cmake = shutil.which("cmake", path=CMAKE_BIN_DIR)
    assert cmake
    configure = (
        *(cmake, "-S", EMULATION, "-B", build, "-DCMAKE_BUILD_TYPE=Release"),
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",  # to build takes longer than to run
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    )
    for command in (configure, (cmake, "--build", build, "--parallel", "2")):
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


def test_every_operator_has_a_cuda_function_with_the_arguments_of_its_schema() -> None:
    for schema in SCHEMAS:
        parsed = torch._C.parse_schema(f"crpt::{schema}")
        function = getattr(cuda, parsed.name.removeprefix("crpt::") + "_cuda")
        assert list(inspect.signature(function).parameters) == [a.name for a in parsed.arguments]


def test_available_only_with_kernels_and_a_torch_that_has_cuda(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "crpt._cuda", emulated)
    assert cuda._load() is emulated
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda._load() is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib, "import_module", missing("crpt._cuda"))
    assert cuda._load() is None
    # Kernels that are there and do not load are an error, not an installation without kernels.
    monkeypatch.setattr(importlib, "import_module", missing("libcudart"))
    with pytest.raises(ModuleNotFoundError):
        cuda._load()


def missing(module: str) -> Callable[[str], ModuleType]:
    def import_module(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    return import_module


class OnEmulatedDevice(TorchDispatchMode):
    """Sends crpt's operators to their CUDA functions, and compares what returns with the fakes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "crpt":
            return func(*args, **(kwargs or {}))
        assert not kwargs
        got = getattr(cuda, f"{func._opname}_cuda")(*args)
        promised = func(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
        pairs = zip(got, promised, strict=True) if isinstance(got, tuple) else [(got, promised)]
        for real, fake in pairs:
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
            assert real.numel() == 0 or real.stride() == fake.stride()
        return got


@samples
@dtypes
def test_values_match_the_twin(sample: Sample, dtype: torch.dtype) -> None:
    args, kwargs = sample.arguments(dtype)
    with OnEmulatedDevice():
        got = sample.function(*args, **kwargs)
    twin = sample.twin(*args, **kwargs)
    if sample.operator in MOVES_ONLY:
        assert got.dtype == twin.dtype
        assert torch.equal(got, twin)
        return
    exact_args = [x.double() if isinstance(x, Tensor) else x for x in args]
    assert_within_budget(got, twin, sample.twin(*exact_args, **kwargs))


@differentiable
@dtypes
def test_gradients_match_the_twin(sample: Sample, dtype: torch.dtype) -> None:
    args, kwargs = sample.arguments(dtype, requires_grad=True)
    exact_args, _ = sample.arguments(dtype, requires_grad=True)
    exact_args = tuple(
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in exact_args
    )
    weight = torch.randn_like(sample.twin(*exact_args, **kwargs)).to(dtype)
    with OnEmulatedDevice():
        got = gradients(sample.function, args, kwargs, weight)
    twin = gradients(sample.twin, args, kwargs, weight)
    exact = gradients(sample.twin, exact_args, kwargs, weight)
    for g, t, e in zip(got, twin, exact, strict=True):
        assert_within_budget(g, t, e)


@samples
def test_past_the_dispatcher_the_same_is_computed(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plain calls go on a GPU (crpt.ops.direct)."""
    args, kwargs = sample.arguments(torch.float32, requires_grad=sample.differentiable)
    weight = torch.randn_like(sample.twin(*args, **kwargs).float())
    with OnEmulatedDevice():
        expected = sample.function(*args, **kwargs)
        if sample.differentiable:
            expected_gradients = gradients(sample.function, args, kwargs, weight)
    called = []
    for name in direct._KERNELS["cpu"]:

        def kernel(*inputs: Any, name: str = name) -> Any:
            called.append(name)
            return getattr(cuda, f"{name}_cuda")(*inputs)

        monkeypatch.setitem(direct._KERNELS["cpu"], name, kernel)
    assert torch.equal(sample.function(*args, **kwargs), expected)
    assert called == ([] if "out" in kwargs else [sample.operator])
    if sample.differentiable:
        got = gradients(sample.function, args, kwargs, weight)
        for a, b in zip(got, expected_gradients, strict=True):
            assert torch.equal(a, b)
        assert len(called) >= 3


@differentiable
def test_autocast_changes_no_precision(sample: Sample) -> None:
    args, kwargs = sample.arguments(torch.float32, requires_grad=True)
    weight = torch.randn_like(sample.twin(*args, **kwargs))
    with OnEmulatedDevice():
        expected = gradients(sample.function, args, kwargs, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = gradients(sample.function, args, kwargs, weight)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@dtypes
def test_sinkhorn_without_a_cluster(
    emulated: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device does whose blocks cannot hold the scores: the plan's other half."""
    scores = torch.rand(2, 19, 21, dtype=torch.float64).to(dtype)
    in_cluster = cuda.sinkhorn_cuda(scores, 0.1, 3)
    asked = []

    def plan(kernels: ModuleType, *arguments: int) -> tuple[int, int]:
        asked.append(arguments)
        return 0, kernels.sinkhorn_scratch(*arguments[1:])

    monkeypatch.setattr(cuda, "_sinkhorn_plan", plan)
    through_memory = cuda.sinkhorn_cuda(scores, 0.1, 3)
    assert asked == [(0, cuda._DTYPE[dtype], 2, 19, 21)]
    torch.testing.assert_close(through_memory, in_cluster)
    assert emulated.sinkhorn_plan(*asked[0])[0] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_frame_stack_casts(dtype: torch.dtype) -> None:
    frames = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    index, shifts = torch.tensor([[4, 0], [1, 1]]), torch.tensor([[-2, 2], [0, 1]])
    got = cuda.frame_stack_cuda(frames, index, shifts, 2, dtype)
    assert torch.equal(got, reference.frame_stack(frames, index, shifts, 2, dtype))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str
)
def test_random_shift_moves_every_type(dtype: torch.dtype) -> None:
    images = torch.randn(3, 2, 6, 7).mul(50).to(dtype)
    shifts = torch.tensor([[-2, 2], [0, 1], [1, -2]])
    got = cuda.random_shift_cuda(images, shifts, 2)
    assert torch.equal(got, reference.random_shift(images, 2, shifts))


@pytest.mark.parametrize("last", [False, True])
def test_random_shift_reads_parts_of_images_where_they_lie(last: bool) -> None:
    images = torch.rand(6, 5, 12, 16)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    shifts = torch.tensor([[1, -2], [0, 3], [-3, 0]])
    parts = [
        images[::2],
        images[:3, :, 1::2],
        images[:3, :, 2:9, 3:11],
        images[:1].expand(3, 5, 12, 16),
    ]
    for part in parts if last else [*parts, images[:3, 1:4]]:
        for name in ("random_shift", "random_shift_backward"):
            operator, function = getattr(torch.ops.crpt, name), getattr(cuda, f"{name}_cuda")
            with OnEmulatedDevice():
                got = operator(part, shifts, 3)
            assert torch.equal(got, operator(part.contiguous(), shifts, 3))
            assert copies(function, part, shifts, 3) == []
    with OnEmulatedDevice():  # what is between these pixels costs a copy, and changes no layout
        pixels = ops.random_shift(images[:3, :2, :, ::2], 3, shifts)
    assert torch.equal(pixels, ops.random_shift(images[:3, :2, :, ::2].contiguous(), 3, shifts))
    assert pixels.is_contiguous(memory_format=torch.channels_last) == last


def test_knn_distance_at_a_key_has_no_gradient() -> None:
    queries, keys = torch.randn(3, 5, requires_grad=True), torch.randn(8, 5, requires_grad=True)
    with torch.no_grad():
        keys[4] += 100  # nobody else's neighbour
        queries[1] = keys[4]
    with OnEmulatedDevice():
        distance = ops.knn_distance(queries, keys, 1)
        distance.sum().backward()
    assert distance[1] == 0
    assert not queries.grad[1].any()
    assert queries.grad[[0, 2]].any(-1).all()
    assert not keys.grad[4].any()
    torch.testing.assert_close(keys.grad.sum(0), -queries.grad.sum(0))


def test_knn_distance_is_the_same_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = torch.randn(9, 5), torch.randn(20, 5)
    whole = cuda.knn_distance_cuda(queries, keys, 3)
    for elements in (1, 45, 80, 180):
        monkeypatch.setattr(cuda, "_SQUARES_PER_BLOCK", elements)
        for a, b in zip(cuda.knn_distance_cuda(queries, keys, 3), whole, strict=True):
            assert torch.equal(a, b)


def test_arguments_are_checked_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"scores should be \[..., B, M\]"):
        cuda.sinkhorn_cuda(torch.randn(0, 512), 0.1, 3)
    with pytest.raises(TypeError, match="scores should be float32"):
        cuda.sinkhorn_cuda(torch.ones(2, 3, dtype=torch.int64), 0.1, 3)
    with pytest.raises(ValueError, match="k should be in"):
        cuda.knn_distance_cuda(torch.randn(9, 5), torch.randn(20, 5), 21)


def test_rows_longer_than_the_kernels_count_are_named() -> None:
    longest = 1 << 26
    error = rf"{{}} should have rows of at most {longest} elements on CUDA, got {longest + 1}"
    images, shifts = torch.empty(1, 1, 1, longest + 1, dtype=torch.uint8), torch.zeros(1, 2).long()
    with pytest.raises(ValueError, match=error.format("images")):
        cuda.random_shift_cuda(images, shifts, 0)
    with pytest.raises(ValueError, match=error.format("frames")):
        cuda.frame_stack_cuda(images, torch.tensor([[0]]), None, 0, torch.uint8)
    with pytest.raises(ValueError, match=error.format("grad")):
        cuda.random_shift_backward_cuda(images.half(), shifts, 0)
    wide = torch.empty(1, 2, 2, longest // 2 + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"got {longest + 2}"):
        cuda.random_shift_cuda(wide.to(memory_format=torch.channels_last), shifts, 0)


def test_frames_of_an_empty_store_are_named() -> None:
    with pytest.raises(ValueError, match=r"frames should be .* with N >= 1 where index has rows"):
        cuda.frame_stack_cuda(
            torch.zeros(0, 3, 6, 7, dtype=torch.uint8), torch.tensor([[0]]), None, 0, torch.uint8
        )


def test_a_kernel_that_fails_is_an_error_with_the_operators_name() -> None:
    frames, index = torch.zeros(5, 3, 6, 7, dtype=torch.uint8), torch.tensor([[4, 5]])
    failed = r"crpt\.ops\.{}: CUDA error: device-side assert"
    with pytest.raises(RuntimeError, match=failed.format("frame_stack")):
        cuda.frame_stack_cuda(frames, index, None, 0, torch.uint8)
    with pytest.raises(RuntimeError, match=failed.format("random_shift")):
        cuda.random_shift_cuda(torch.randn(1, 1, 6, 7), torch.tensor([[5, 0]]), 4)


class Recorded:
    """A module, and with what its functions were called."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.setdefault(name, []).append(args)
            return getattr(self._module, name)(*args)

        return call


def test_what_compute_sanitizer_is_given_starts_every_operators_kernels(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(emulated)
    monkeypatch.setattr(cuda, "_cuda", recorded)
    monkeypatch.setattr(every_kernel, "DEVICE", "cpu")
    monkeypatch.setattr(every_kernel, "bytes_are_faster", lambda encoder, device: True)
    monkeypatch.setattr(conv_features, "_kernels", lambda device: conv_cuda)
    monkeypatch.setattr(conv_cuda, "processors", lambda device: 2)
    monkeypatch.setattr(sys, "argv", ["every_kernel.py", "--small"])
    with OnEmulatedDevice():
        every_kernel.main()
    launchers = {name for name in vars(emulated) if not name.startswith("_")}
    assert launchers - recorded.calls.keys() == {"sinkhorn_scratch"}
    for name in ("random_shift", "random_shift_backward"):  # of planes, and of pixels
        assert {args[-6] == 1 for args in recorded.calls[name]} == {False, True}, name
    clusters = {args[-2] for args in recorded.calls["sinkhorn"]}
    assert {0, 1} < clusters  # and some of several blocks


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_stream", lambda device: (7, 0))
    with pytest.raises(RuntimeError, match=r"ops\.sinkhorn: CUDA error: invalid device ordinal"):
        cuda.sinkhorn_cuda(torch.randn(4, 5), 0.1, 3)


@pytest.mark.parametrize(("channels", "size"), [(3, 18), (9, 21)])
def test_conv_features_follow_the_encoder(
    channels: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_features, "_kernels", lambda device: conv_cuda)
    monkeypatch.setattr(conv_cuda, "processors", lambda device: 2)
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(in_channels=channels, image_size=size, projection_dim=8))
    for layer in encoder.convolutions[::2]:
        torch.nn.init.uniform_(layer.bias, -0.3, 0.3)
    images = torch.randint(0, 256, (3, channels, size, size), dtype=torch.uint8)
    direction = torch.randn(3, 8)
    z = project_bytes(encoder, images)
    found = rounded_encoder.results(encoder, z, direction)
    rounded_encoder.assert_follows(encoder, found, images, direction)
    with torch.no_grad():
        assert torch.equal(project_bytes(encoder, images), found["z"])


def test_conv_features_are_for_layers_that_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    layers = Encoder(EncoderConfig()).convolutions
    assert conv_features.usable(layers, 84, gpu)
    assert conv_features.usable(layers, 256, gpu)
    assert not conv_features.usable(layers, 257, gpu)
    for other in (
        EncoderConfig(channels=16), EncoderConfig(strides=(2, 2, 1)), EncoderConfig(in_channels=18),
    ):  # fmt: skip
        assert not conv_features.usable(Encoder(other).convolutions, 84, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not conv_features.usable(layers, 84, gpu)
