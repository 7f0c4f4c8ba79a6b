"""Every operator that torch's dispatcher knows as `torch.ops.crpt.*`, on one screen.

None aliases its inputs, and only `frame_stack_out` writes to one. Beside its result an operator
returns what its gradient needs again, so that nothing is computed twice. "compute" is float64 for
float64 inputs, else float32. Integers are SymInt, so that one compiled graph serves all values, as
of sizes; torch has no such thing for floats.

sinkhorn              -> codes [..., B, M]
prototype_similarity  -> similarity [..., B, M]; in compute: unit rows [..., B, D] and [..., M, D],
                         their lengths [..., B] and [..., M]
      _backward       -> in compute, the gradient of the rows that `unit` and `norm` came from; for
                         the prototypes pass the transposed gradient and the embeddings as `other`
prototype_loss        -> loss [...]; in compute, row logsumexp of (scores - the row's largest) /
                         temperature [..., B], and the gradient for the scores [..., B, M], or
                         [..., 0] where not asked for
      _backward       -> grad times the latter, in the dtype of the scores
      _backward_scores, _backward_codes -> the gradients from the logsumexp
prototype_objective   -> loss, its comparison and its intrinsic part [...]; in compute, gradients of
                         the loss for the embeddings [..., B, D] and the prototypes [..., M, D],
                         [..., 0] where not asked for
      _backward       -> grad times these two, in the dtype of the embeddings
intrinsic_loss        -> loss [...]; weights [i != j] / (M^2 (s_ij + offset)) [..., M, M] in compute
random_shift          -> images [B, C, H, W], shifted
frame_stack           -> [B, K*C, H, W]
      _out            -> nothing; the same, written to `out`
knn_distance          -> distance to the k-th nearest [B] in compute; which key that is, int64 [B]
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("crpt", "DEF")

SCHEMAS = (
    "sinkhorn(Tensor scores, float temperature, SymInt iterations) -> Tensor",
    "prototype_similarity("
    "Tensor embeddings, Tensor prototypes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "prototype_similarity_backward(Tensor grad, Tensor unit, Tensor norm, Tensor other) -> Tensor",
    "prototype_loss(Tensor scores, Tensor codes, float temperature, bool of_scores"
    ") -> (Tensor, Tensor, Tensor)",
    "prototype_loss_backward("
    "Tensor grad, Tensor grad_scores, Tensor scores, Tensor codes) -> Tensor",
    "prototype_loss_backward_scores("
    "Tensor grad, Tensor scores, Tensor codes, Tensor logsumexp, float temperature) -> Tensor",
    "prototype_loss_backward_codes("
    "Tensor grad, Tensor scores, Tensor logsumexp, float temperature) -> Tensor",
    "prototype_objective("
    "Tensor embeddings, Tensor prototypes, Tensor codes, float temperature, "
    "float intrinsic_weight, float offset, bool of_embeddings, bool of_prototypes"
    ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "prototype_objective_backward("
    "Tensor grad, Tensor grad_embeddings, Tensor grad_prototypes, "
    "Tensor embeddings, Tensor prototypes) -> (Tensor, Tensor)",
    "intrinsic_loss(Tensor prototypes, float offset) -> (Tensor, Tensor)",
    "intrinsic_loss_backward(Tensor grad, Tensor prototypes, Tensor weights) -> Tensor",
    "random_shift(Tensor images, Tensor shifts, SymInt pad) -> Tensor",
    "random_shift_backward(Tensor grad, Tensor shifts, SymInt pad) -> Tensor",
    "frame_stack("
    "Tensor frames, Tensor index, Tensor? shifts, SymInt pad, ScalarType dtype) -> Tensor",
    "frame_stack_out("
    "Tensor frames, Tensor index, Tensor? shifts, SymInt pad, Tensor(a!) out) -> ()",
    "knn_distance(Tensor queries, Tensor keys, SymInt k) -> (Tensor, Tensor)",
    "knn_distance_backward_queries("
    "Tensor grad, Tensor queries, Tensor keys, Tensor distance, Tensor index) -> Tensor",
    "knn_distance_backward_keys("
    "Tensor grad, Tensor queries, Tensor keys, Tensor distance, Tensor index) -> Tensor",
)

for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
