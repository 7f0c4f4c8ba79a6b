"""The operators of crpt: compiled CPU and CUDA kernels behind torch.library.

`crpt.ops.reference` holds the plain-PyTorch twin of each: same name, same signature; the
specification, and what the tests compare with. What holds for all of them:

Numbers.    float32, float16, bfloat16 (accumulated in float32) and float64; the error against
            float64, in the root of the mean square, is at most twice that of the twin in the same
            precision: three times where oneDNN takes float32 products with sums of more than 192
            terms (crpt.ops.gemm). Deterministic from run to run, and, where no matrix product of
            torch's takes part, the same bits whatever the number of threads.
Memory.     Inputs may have any strides and are never written to, but for the `out` of frame_stack.
            frame_stack and random_shift read images where they lie; on a CPU the others do so with
            matrices whose rows are contiguous and equally far apart (some columns of a larger one,
            every other row), and copy what lies otherwise; on CUDA all that is not contiguous. Any
            sizes, also beyond 2**31 elements (on CUDA up to 2**26 in a row of an image). Results
            are fresh tensors; large images on a CPU lie in memory that is kept for the next ones
            (crpt.ops.cpu_memory).
Threads.    The CPU kernels use torch.get_num_threads() threads, fewer for little work, and release
            the GIL: calls from several Python threads are safe and run in parallel.
CUDA.       The current stream and the device of the inputs; nothing waits for the device, so every
            operator can be captured in a CUDA graph.
Gradients.  Reverse mode, to first order: a second derivative raises NotImplementedError, but for
            random_shift, which is linear. sinkhorn and frame_stack have none by design. Forward
            mode (jvp, jacfwd, torch.func.hessian) raises NotImplementedError.
torch.func. vmap, grad, vjp and jacrev of every operator, in any nesting: one call for all samples,
            but one each in knn_distance and frame_stack where keys or frames differ between samples
            and in the gradient of knn_distance's keys. No vmap over sinkhorn(group=...).
Compiler.   torch.compile(fullgraph=True), with dynamic and with data-dependent sizes, also of vmap;
            not of the gradients of torch.func, which torch itself refuses there. Integers (k, pad,
            iterations) may vary as sizes may. Floats are compiled in, one graph for each value, as
            in all of torch's operators, and torch gives up after eight. Keep one that follows a
            schedule out of the arguments, as a tensor or as a float: with T and w such,
                sinkhorn(scores / T, 1.0)
                prototype_loss(scores / T, codes, 1.0)
                prototype_loss(prototype_similarity(embeddings, prototypes) / T, codes, 1.0)
                    + w * intrinsic_loss(prototypes)
            the last for prototype_objective, whose prototypes are of unit length.
autocast.   The dtype of the inputs decides; inputs of mixed floating dtypes, elsewhere a TypeError,
            are promoted to the widest.
Processes.  Inside DistributedDataParallel as any other function; sinkhorn(group=...) balances over
            the batches of all processes.
Errors.     TypeError for type and dtype, ValueError for shape, device and value. Each names the
            argument, what it should be and what it was.
"""

# Importing cpu, cuda and vmap registers what they hold.
from crpt.ops import cpu, cpu_memory, cuda, reference, vmap  # noqa: F401
from crpt.ops._frame_stack import frame_stack
from crpt.ops._intrinsic_loss import intrinsic_loss
from crpt.ops._knn_distance import knn_distance
from crpt.ops._prototype_loss import prototype_loss
from crpt.ops._prototype_objective import prototype_objective
from crpt.ops._prototype_similarity import prototype_similarity
from crpt.ops._random_shift import random_shift
from crpt.ops._sinkhorn import sinkhorn

__all__ = [
    "cpu_memory",
    "frame_stack",
    "intrinsic_loss",
    "knn_distance",
    "prototype_loss",
    "prototype_objective",
    "prototype_similarity",
    "random_shift",
    "reference",
    "sinkhorn",
]
