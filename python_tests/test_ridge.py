import numpy as np
import pytest

from crpt.probe.ridge import OF_GRAM, Ridge, held_out_accuracy, held_out_predictions, held_out_r2


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def episodes(n: int, length: int) -> np.ndarray:
    return np.repeat(np.arange(n), length)


def test_a_linear_state_is_read_exactly(rng):
    x = rng.normal(size=(400, 6))
    y = x @ rng.normal(size=(6, 3)) + 2.0
    r2 = held_out_r2(x, y, episodes(20, 20))
    assert (r2 > 0.999).all()


def test_noise_reads_as_nothing(rng):
    x, y = rng.normal(size=(400, 6)), rng.normal(size=(400, 2))
    r2 = held_out_r2(x, y, episodes(20, 20))
    assert (np.abs(r2) < 0.1).all()


def test_half_the_variance_gives_a_half(rng):
    x = rng.normal(size=(4000, 2))
    y = x[:, :1] + rng.normal(size=(4000, 1))
    assert held_out_r2(x, y, episodes(40, 100)) == pytest.approx([0.5], abs=0.05)


def test_what_only_identifies_the_episode_is_worth_nothing(rng):
    # Each episode has its own constant state and its own one-hot code: a split by frames would
    # read it perfectly.
    episode = episodes(12, 30)
    x = np.eye(12)[episode] + 0.01 * rng.normal(size=(360, 12))
    y = rng.normal(size=(12, 1))[episode]
    assert held_out_r2(x, y, episode)[0] < 0.05


def test_invariant_to_scale_and_shift_of_both_sides(rng):
    x = rng.normal(size=(300, 4))
    y = x @ rng.normal(size=(4, 2)) + 0.5 * rng.normal(size=(300, 2))
    episode = episodes(15, 20)
    expected = held_out_r2(x, y, episode)
    moved = held_out_r2(1e3 * x - 7, 1e-3 * y + 4, episode)
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_dimensions_that_do_not_vary(rng):
    x = np.concatenate([rng.normal(size=(200, 3)), np.ones((200, 1))], axis=1)
    y = np.stack([x[:, 0], np.full(200, 3.0)], axis=1)
    r2 = held_out_r2(x, y, episodes(10, 20))
    assert r2[0] > 0.999
    assert np.isnan(r2[1])


def test_more_dimensions_than_rows_do_not_fit_the_noise(rng):
    x, y = rng.normal(size=(60, 200)), rng.normal(size=(60, 1))
    assert held_out_r2(x, y, episodes(12, 5))[0] < 0.3


@pytest.mark.parametrize(
    ("n", "folds", "message"),
    [(2, 2, "of at least 3"), (6, 7, r"folds should be in \[2, 6\]"), (6, 1, "got 1")],
)
def test_too_few_episodes(rng, n, folds, message):
    x = rng.normal(size=(n * 5, 2))
    with pytest.raises(ValueError, match=message):
        held_out_r2(x, x, episodes(n, 5), folds)


def test_lengths_must_match(rng):
    x = rng.normal(size=(10, 2))
    with pytest.raises(ValueError, match="of one length, got 10, 9, 10"):
        held_out_r2(x, x[:9], episodes(5, 2))


def test_accuracy_of_labels_that_are_linear_and_of_labels_that_are_noise(rng):
    label = np.repeat(np.arange(3), 100)
    x = rng.normal(size=(300, 6)) + 4 * np.eye(6)[label]
    assert held_out_accuracy(x, label, episodes(30, 10)) > 0.95
    assert 0.2 < held_out_accuracy(rng.normal(size=(300, 6)), label, episodes(30, 10)) < 0.47


def test_a_row_is_predicted_without_its_episode(rng):
    # Each episode is a point of its own with a value of its own: known only to who has seen it.
    points, values = rng.normal(size=(20, 40)), rng.normal(size=(20, 1))
    x, y = np.repeat(points, 10, axis=0), np.repeat(values, 10, axis=0)
    assert held_out_r2(x, y, episodes(20, 10))[0] < 0.5
    assert held_out_predictions(x, y, episodes(20, 10)).shape == y.shape


def centred_primal(x, y, fitting, wanted, penalties):
    """What OF_GRAM is the dual of."""
    mean, y_mean = x[fitting].mean(axis=0), y[fitting].mean(axis=0)
    fit = x[fitting] - mean
    unit = (fit**2).sum() * np.eye(x.shape[1])
    return [
        (x[wanted] - mean) @ np.linalg.solve(fit.T @ fit + p * unit, fit.T @ (y[fitting] - y_mean))
        + y_mean
        for p in penalties
    ]


@pytest.mark.parametrize("dimensions", [3, 30, 200])
def test_inner_products_predict_what_embeddings_do(rng, dimensions):
    episode = np.repeat(np.arange(9), [3, 9, 11, 2, 6, 8, 1, 12, 7])
    x = 5 + rng.normal(size=(len(episode), dimensions)) * rng.uniform(0.1, 2, dimensions)
    x[:, 0] = 3.0
    y = x[:, -2:] @ rng.normal(size=(2, 4)) + rng.normal(size=(len(x), 4))
    primal = Ridge(centred_primal, OF_GRAM.penalties)
    for folds in (2, 4, 9):
        expected = held_out_predictions(x, y, episode, folds, primal)
        got = held_out_predictions(x @ x.T, y, episode, folds, OF_GRAM)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_inner_products_read_all_or_nothing_and_tell_labels(rng):
    x, episode = rng.normal(size=(200, 6)), episodes(20, 10)
    y, noise = x @ rng.normal(size=(6, 3)) + 2.0, rng.normal(size=(200, 3))
    assert (held_out_r2(x @ x.T, y, episode, ridge=OF_GRAM) > 0.999).all()
    assert (np.abs(held_out_r2(x @ x.T, noise, episode, ridge=OF_GRAM)) < 0.2).all()
    label = np.repeat(np.arange(4), 50)
    x += 4 * np.eye(6)[label]
    assert held_out_accuracy(x @ x.T, label, episode, ridge=OF_GRAM) > 0.95


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_equal_embeddings_say_nothing_by_their_inner_products(rng, value):
    x, y, episode = np.full((60, 40), value), rng.normal(size=(60, 2)), episodes(6, 10)
    x += 1e-8 * value * rng.normal(size=x.shape)
    got = held_out_predictions(x @ x.T, y, episode, 3, OF_GRAM)
    held_out = episode % 3 == 0
    np.testing.assert_array_equal(got[held_out], np.tile(y[~held_out].mean(axis=0), (20, 1)))


def test_what_hardly_varies_while_fitting_does_not_drown_the_rest(rng):
    """As ReLUs do that the frames of one episode activate."""
    episode, known = episodes(20, 10), 3 * rng.normal(size=(200, 3))
    rare = np.arange(400) % 20 == episode[:, None]
    x = np.concatenate([known, rng.normal(size=(200, 400)) * (rare + 1e-4)], axis=1)
    y = known + rng.normal(size=(200, 3))
    assert (held_out_r2(x @ x.T, y, episode, ridge=OF_GRAM) > 0.5).all()
    assert (held_out_r2(x, y, episode) < 0.2).all()
