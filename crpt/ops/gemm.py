"""The matrix product inside the operators, by the BLAS that torch carries, in the inputs' dtype.

torch carries two, and takes MKL's for float32. On a CPU of another maker than Intel that one keeps
to AVX2 though the CPU has AVX-512; there oneDNN's is about twice as fast (measured on a Zen 5:
104 and 230 GFLOP/s a core), so large products in float32 go to it. Both are exact float32 unless
torch.set_float32_matmul_precision allows less, and both follow torch.set_num_threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crpt.ops.compiled import _cpu

_C: Any = torch._C
# Says what torch.backends.mkldnn.enabled does, several times as fast.
_enabled = getattr(_C, "_get_mkldnn_enabled", lambda: bool(torch.backends.mkldnn.enabled))
# Multiplications from which the faster product outweighs oneDNN's 10 us a call.
_WORTH_A_CALL = 1 << 21
# Terms that one call of oneDNN's may sum. It adds hundreds of them in one chain, where MKL begins
# anew after 192 or so. The error, over MKL's: 1.3 to 1.9 for scattered terms; for terms of one
# sign, or in groups that are alike, up to 2.9, without an end 4 at 2,048. Parts of 256 would leave
# 2.6 of it and take a fourth longer.
_LONGEST_SUM = 512


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, also where autocast would have lowered the precision. For real tensors only."""
    if _by_onednn(a, b):
        return _onednn(a, b)
    device = a.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return torch.matmul(a, b)
    return torch.matmul(a, b)


def scaled(grad: Tensor, gradient: Tensor) -> Tensor:
    """grad [...] times gradient [..., R, D], in the dtype of grad; an empty one stays empty."""
    if gradient.dim() < grad.dim() + 2:
        return gradient.new_empty(gradient.shape, dtype=grad.dtype)
    gradient = gradient if gradient.is_contiguous() else gradient.contiguous()
    product = gradient * (grad if grad.dim() == 0 else grad[..., None, None])
    return product if product.dtype == grad.dtype else product.to(grad.dtype)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether it takes this product, and each matrix of the batch is worth a call of its own."""
    return (
        ONEDNN
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[-2] * a.shape[-1] * b.shape[-1] >= _WORTH_A_CALL
        and a.numel() > 0
        and b.numel() > 0
        and _enabled()
    )


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    if b.dim() == 2:
        if _turns(a, b):
            return _by_rows(_in_parts(b.mT, a).mT)
        return _in_parts(a, b.mT)
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = a.expand(*leading, *a.shape[-2:]).flatten(0, -3)
    b = b.expand(*leading, *b.shape[-2:]).flatten(0, -3)
    out = a.new_empty((*a.shape[:-1], b.shape[-1]))
    for x, y, product in zip(a.unbind(), b.unbind(), out.unbind(), strict=True):
        product.copy_(_onednn(x, y))  # one by one: stacked they would be held twice
    return out.view(*leading, *out.shape[-2:])


def _in_parts(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T, [..., K] and [N, K] -> [..., N], in equal parts of no more than
    _LONGEST_SUM of K."""
    length = rows.shape[-1]
    parts = -(-length // _LONGEST_SUM)
    if parts <= 1:
        return _linear(_by_rows(rows), _strided(weight))
    size = -(-length // parts)
    first, *others = zip(rows.split(size, -1), weight.split(size, -1), strict=True)
    out = _linear(_by_rows(first[0]), _strided(first[1]))
    for x, y in others:
        out.add_(_linear(_by_rows(x), _strided(y)))
    return out


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T, [..., K] and [N, K] -> [..., N]: what torch.compile's linear layers call."""
    return torch.ops.mkldnn._linear_pointwise.default(rows, weight, None, "none", [], "")


def _turns(a: Tensor, b: Tensor) -> bool:
    """Whether a is the transpose of a contiguous matrix, and (b^T a^T)^T spares the larger copy."""
    return (
        a.dim() == 2
        and not a.is_contiguous()
        and a.mT.is_contiguous()
        and b.numel() + a.shape[0] * b.shape[1] < a.numel()
    )


def _strided(x: Tensor) -> Tensor:
    """x where it is a matrix by rows or by columns without gaps, else a copy: where there is one
    oneDNN takes its reference code, some hundred times as slow."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _by_rows(x: Tensor) -> Tensor:
    """x.contiguous(), several times as fast where x is the transpose of a contiguous matrix."""
    if x.is_contiguous() or x.dim() != 2 or x.stride(0) != 1 or x.stride(1) < x.shape[0]:
        return x.contiguous()
    out = x.new_empty(x.shape)
    _cpu.transpose(
        x.data_ptr(), out.data_ptr(), x.shape[1], x.shape[0], x.stride(1), torch.get_num_threads()
    )
    return out


def _works() -> bool:
    """Whether torch has these products, with the signatures and results that they have today."""
    if not torch.backends.mkldnn.is_available():
        return False
    # Named, since whoever imports this may have other defaults.
    kind: Any = {"dtype": torch.float32, "device": "cpu"}
    a, b = torch.arange(6, **kind).view(2, 3), torch.arange(12, **kind).view(3, 4)
    try:
        return torch.equal(_linear(a, b.mT), a @ b)
    except (AttributeError, RuntimeError, TypeError):
        return False


ONEDNN = _cpu.avx512_hidden_from_mkl and torch.backends.mkl.is_available() and _works()
