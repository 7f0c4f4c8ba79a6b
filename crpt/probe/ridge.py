"""Linear probes: how much of a simulator's state a ridge regression reads from an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Rows = NDArray[np.bool_]


@dataclass(frozen=True)
class Ridge:
    """A ridge regression: what it knows of the embeddings, and its penalties."""

    predict: Callable[[Matrix, Matrix, Rows, Rows, Sequence[float]], list[Matrix]]
    """(x, y, fitting, wanted, penalties): fit on the rows `fitting`, predict the rows `wanted`,
    once per penalty."""
    penalties: tuple[float, ...]
    """To choose from."""


def _standardised(
    x: Matrix, y: Matrix, fitting: Rows, wanted: Rows, penalties: Sequence[float]
) -> list[Matrix]:
    """On standardised embeddings x [N, D]; a penalty is in units of a dimension's mean square."""
    mean, deviation = x[fitting].mean(axis=0), x[fitting].std(axis=0)
    # A dimension that does not vary while fitting says nothing, whatever it does elsewhere.
    scale = np.where(deviation > 1e-12, 1 / np.maximum(deviation, 1e-12), 0.0)
    fit, want = (x[fitting] - mean) * scale, (x[wanted] - mean) * scale
    y_mean = y[fitting].mean(axis=0)
    values, vectors = np.linalg.eigh(fit.T @ fit / len(fit))
    projected = vectors.T @ (fit.T @ (y[fitting] - y_mean)) / len(fit)
    wanted_vectors = want @ vectors
    return [
        wanted_vectors @ (projected / (np.maximum(values, 0) + penalty)[:, None]) + y_mean
        for penalty in penalties
    ]


def _of_gram(
    gram: Matrix, y: Matrix, fitting: Rows, wanted: Rows, penalties: Sequence[float]
) -> list[Matrix]:
    """On centred embeddings, known by their inner products [N, N]: the dual, whose cost does not
    grow with their dimension; a penalty is in units of their mean squared length."""
    # torch's solver takes half of the time of NumPy's, and its threads disturb each other less.
    products, fit = torch.from_numpy(gram), torch.from_numpy(fitting)
    inner, across = products[fit][:, fit], products[torch.from_numpy(wanted)][:, fit]
    mean = inner.mean(dim=0)
    centred = inner - mean - mean[:, None] + mean.mean()
    want = across - mean - across.mean(dim=1, keepdim=True) + mean.mean()
    y_mean = y[fitting].mean(axis=0)
    # Of embeddings that are all equal only rounding is left, which says nothing.
    if centred.trace() <= 1e-12 * inner.trace():
        return [np.tile(y_mean, (len(want), 1)) for _ in penalties]
    right = torch.from_numpy(y[fitting] - y_mean)
    predicted = []
    for penalty in penalties:
        left = centred.clone()
        # The trace is their number times their mean squared length.
        left.diagonal().add_(penalty * centred.trace())
        predicted.append((want @ torch.linalg.solve(left, right)).numpy() + y_mean)
    return predicted


OF_EMBEDDINGS = Ridge(_standardised, tuple(10.0**e for e in range(-4, 3)))
# Not standardised: of tens of thousands of dimensions some hardly vary while fitting, and what they
# do elsewhere, in units of that, would drown the others.
OF_GRAM = Ridge(_of_gram, tuple(10.0**e for e in range(-7, 1)))


def held_out_r2(
    x: Matrix,
    y: Matrix,
    episode: NDArray[np.int64],
    folds: int = 5,
    ridge: Ridge = OF_EMBEDDINGS,
) -> Matrix:
    """R2_k = 1 - sum_n (y_nk - p_nk)^2 / sum_n (y_nk - mean y_k)^2, p_n predicted without n's
    episode.

    The episodes are dealt into `folds` parts; each part is predicted by a ridge regression that is
    fitted on the others, whose penalty is chosen on a third of their episodes.

    Args:
        x: embeddings, [N, D]; with OF_GRAM their inner products, [N, N].
        y: states, [N, K].
        episode: the episode of each row, [N].
        folds: parts, from 2 to the number of episodes.
        ridge: OF_EMBEDDINGS or OF_GRAM.

    Returns:
        [K]; NaN for a dimension of y that does not vary. 1: read without error; 0: no better than
        the mean; negative: worse than the mean.

    Raises:
        ValueError: shapes that do not match, or too few episodes to fit, choose and hold out.
    """
    predicted = held_out_predictions(x, y, episode, folds, ridge)
    residual = ((y - predicted) ** 2).sum(axis=0)
    total, varies = ((y - y.mean(axis=0)) ** 2).sum(axis=0), varying(y)
    r2: Matrix = np.where(varies, 1 - residual / np.where(varies, total, 1), np.nan)
    return r2


def varying(y: Matrix) -> Rows:
    """Which dimensions of y [N, K] do, by more than rounding: [K]."""
    varies: Rows = y.var(axis=0) > 1e-12 * (1 + (y**2).mean(axis=0))
    return varies


def held_out_accuracy(
    x: Matrix,
    label: NDArray[np.int64],
    episode: NDArray[np.int64],
    folds: int = 5,
    ridge: Ridge = OF_EMBEDDINGS,
) -> float:
    """Share of rows whose label is the largest output of a ridge regression on one-hot labels,
    predicted without the row's episode.

    Args and errors as `held_out_r2`, with label [N], small numbers from 0.
    """
    one_hot = np.eye(int(label.max()) + 1)[label]
    predicted = held_out_predictions(x, one_hot, episode, folds, ridge)
    return float((predicted.argmax(axis=1) == label).mean())


def held_out_predictions(
    x: Matrix,
    y: Matrix,
    episode: NDArray[np.int64],
    folds: int = 5,
    ridge: Ridge = OF_EMBEDDINGS,
) -> Matrix:
    """y [N, K] as `held_out_r2` says: each row predicted without its episode."""
    numbers = np.unique(episode)
    if not len(x) == len(y) == len(episode):
        raise ValueError(
            f"x, y and episode should be of one length, got {len(x)}, {len(y)}, {len(episode)}"
        )
    if not 2 <= folds <= len(numbers) or len(numbers) < 3:
        raise ValueError(
            f"folds should be in [2, {len(numbers)}], the episodes, of at least 3, got {folds}"
        )
    predicted = np.empty_like(y)
    for fold in range(folds):
        held_out = np.isin(episode, numbers[fold::folds])
        fitted = numbers[~np.isin(numbers, numbers[fold::folds])]
        choosing = np.isin(episode, fitted[::3]) if len(fitted) > 1 else ~held_out
        fitting = ~held_out & ~choosing if len(fitted) > 1 else ~held_out
        penalty = _choose_penalty(ridge, x, y, fitting, choosing)
        predicted[held_out] = ridge.predict(x, y, ~held_out, held_out, [penalty])[0]
    return predicted


def _choose_penalty(ridge: Ridge, x: Matrix, y: Matrix, fitting: Rows, choosing: Rows) -> float:
    """The penalty with the least squared error on `choosing`, every state dimension in units of its
    deviation."""
    scale = y.std(axis=0) + 1e-12
    errors = [
        (((y[choosing] - p) / scale) ** 2).mean()
        for p in ridge.predict(x, y, fitting, choosing, ridge.penalties)
    ]
    return ridge.penalties[int(np.argmin(errors))]
