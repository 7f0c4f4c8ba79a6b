"""Every operator's CUDA kernels over odd sizes, forward and backward, checking nothing: for
compute-sanitizer, under which the test suite would take hours.

    compute-sanitizer --tool memcheck --kernel-name kns=crpt python python_tests/ops/every_kernel.py
    compute-sanitizer --tool racecheck --kernel-name kns=crpt \
        python python_tests/ops/every_kernel.py --small
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from crpt import ops
from crpt.byte_encoder import bytes_are_faster, project_bytes
from crpt.encoder import Encoder, EncoderConfig

DEVICE = "cuda"  # the tests' is another
# Of scores; the last is for no cluster of blocks, whose grid works through memory.
ITEMS = [(7, 5), (70, 36), (130, 257), (3, 96, 132), (100, 516), (2, 60001)]
LARGE_ITEMS = [(1, 1), (64, 33), (512, 512), (1200, 515), (300, 516), (5, 40, 1024), (900, 512)]
PROBLEMS = [(7, 5, 3), (33, 132, 50)]  # samples, prototypes, dimensions
LARGE_PROBLEMS = [(33, 129, 50), (128, 256, 128)]
TEMPERATURES = (0.1, 0.005)  # exp space, and log space


def backward(out: Tensor, *inputs: Tensor) -> None:
    grad = torch.ones_like(out)  # laid out as `out` is, where that of a sum would not be
    torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad)


def uniform(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape, device=DEVICE) * 2 - 1).to(dtype)


def losses(samples: int, prototypes: int, dim: int, dtype: torch.dtype) -> None:
    e = uniform(samples, dim, dtype=dtype).requires_grad_()
    c = uniform(prototypes, dim, dtype=dtype).requires_grad_()
    scores = ops.prototype_similarity(e, c)
    codes = ops.sinkhorn(scores.detach())
    backward(ops.prototype_loss(scores, codes), e, c)
    learnt = codes.clone().requires_grad_()
    backward(ops.prototype_loss(scores.detach(), learnt), learnt)
    backward(ops.intrinsic_loss(c), c)
    backward(ops.prototype_objective(e, c, codes)[0], e, c)
    backward(ops.knn_distance(e, c, 3), e, c)


def images(dtype: torch.dtype) -> None:
    for shape in ((3, 9, 84, 84), (2, 3, 7, 13)):
        shifts = torch.randint(-2, 3, (shape[0], 2), device=DEVICE)
        x = uniform(*shape, dtype=dtype).requires_grad_()
        backward(ops.random_shift(x, 2, shifts), x)
        pixels = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        backward(ops.random_shift(pixels, 2, shifts), pixels)
        for part in (x.detach()[:, :, 1:, 2:], pixels.detach()[:, 1:, 1:, 2:]):
            ops.random_shift(part, 2, shifts)
    frames = torch.randint(0, 256, (20, 3, 84, 84), device=DEVICE, dtype=torch.uint8)
    index = torch.randint(20, (5, 3), device=DEVICE)
    shifts = torch.randint(-4, 5, (20, 2), device=DEVICE)
    for out in (dtype, torch.uint8):
        ops.frame_stack(frames, index, shifts[:5], 4, out)
        ops.frame_stack(frames[:, :, 1:, 2:], index, dtype=out)  # rows that are no words
    ops.random_shift(frames, 4, shifts)


def encoder(image_size: int) -> None:
    module = Encoder(EncoderConfig(image_size=image_size, projection_dim=24)).to(DEVICE)
    shape = (5, module.config.in_channels, image_size, image_size)
    images = torch.randint(0, 256, shape, device=DEVICE, dtype=torch.uint8)
    backward(project_bytes(module, images), *module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="for tools that take long")
    small = parser.parse_args().small
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16]
    for dtype in dtypes if small else [*dtypes, torch.float16, torch.float64]:
        for shape in ITEMS if small else ITEMS + LARGE_ITEMS:
            for temperature in TEMPERATURES:
                ops.sinkhorn(uniform(*shape, dtype=dtype), temperature)
        for problem in PROBLEMS if small else PROBLEMS + LARGE_PROBLEMS:
            losses(*problem, dtype=dtype)
        images(dtype)
    if bytes_are_faster(Encoder(EncoderConfig()), torch.device(DEVICE)):
        for image_size in (21,) if small else (21, 84, 100):
            encoder(image_size)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
