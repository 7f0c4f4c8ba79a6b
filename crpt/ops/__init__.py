"""The operators of crpt: compiled CPU and CUDA kernels behind torch.library.

Each works on float32, float16, bfloat16 (accumulated in float32) and float64, under autograd where
a gradient exists and under torch.compile(fullgraph=True). Results are deterministic, and, where no
GEMM of torch's takes part, the same bits whatever the number of threads. Under autocast the dtype
of the inputs decides; inputs of mixed floating dtypes, elsewhere a TypeError, are there promoted to
the widest. Derivatives are reverse-mode: forward mode raises NotImplementedError, and torch itself
refuses torch.func.grad and vjp. `crpt.ops.reference` holds the plain-PyTorch twin of each: same
name, same signature.
"""

# Importing cpu and cuda registers their kernels.
from crpt.ops import cpu, cpu_memory, cuda, reference  # noqa: F401
from crpt.ops._frame_stack import frame_stack
from crpt.ops._intrinsic_loss import intrinsic_loss
from crpt.ops._knn_distance import knn_distance
from crpt.ops._prototype_loss import prototype_loss
from crpt.ops._prototype_similarity import prototype_similarity
from crpt.ops._random_shift import random_shift
from crpt.ops._sinkhorn import sinkhorn

__all__ = [
    "cpu_memory",
    "frame_stack",
    "intrinsic_loss",
    "knn_distance",
    "prototype_loss",
    "prototype_similarity",
    "random_shift",
    "reference",
    "sinkhorn",
]
