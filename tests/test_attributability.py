"""What is measured against counting by hand; what is promised against random linear models."""

import numpy as np
import pytest

from flipad_jax.registry import attributability as at


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_distinguishability_and_attributability_by_counting():
    rng = np.random.default_rng(0)
    own, real = rng.normal(0.5, 1, 50), rng.normal(-0.5, 1, 70)
    counted = sum(x > 0 for x in own) / 50 / 2 + sum(x < 0 for x in real) / 70 / 2
    assert at.distinguishability(own, real) == pytest.approx(counted)
    tables = [rng.normal(0.3 * np.eye(3)[i] * 6 - 0.8, 1, (40, 3)) for i in range(3)]
    total = 0
    for i, table in enumerate(tables):
        for row in table:
            total += all((row[j] > 0) == (i == j) for j in range(3)) / 40 / 3
    assert at.attributability(tables) == pytest.approx(total)


def test_responses_extent_and_shift_against_numpy():
    rng = np.random.default_rng(1)
    keys = unit(rng.normal(size=(4, 48))).reshape(4, 4, 4, 3).astype(np.float32)
    images = rng.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    exact = (images.reshape(30, -1) / 127.5 - 1) @ keys.reshape(4, -1).T.astype(float)
    np.testing.assert_allclose(at.responses(keys, images), exact, atol=1e-5)
    found = at.extent(keys, [images[:7], images[7:]])
    np.testing.assert_allclose(found.d_min, np.abs(exact).min(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.d_max, np.abs(exact).max(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found.compliance, (exact < 0).mean(axis=0))
    differences = rng.normal(0.1, 1, (30, 4, 4, 3))
    length = at.shift_length([differences[:11], differences[11:]])
    flat = differences.reshape(30, -1)
    assert length.of_mean == pytest.approx(np.linalg.norm(flat.mean(axis=0)))
    assert length.mean == pytest.approx(np.mean([np.linalg.norm(row) for row in flat]))
    assert length.of_mean <= length.mean


def test_error_statistics_are_the_quadratic_forms():
    rng = np.random.default_rng(2)
    keys = unit(rng.normal(size=(3, 6))).astype(np.float32)
    errors = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 0.3
    found = at.error_statistics(keys, [errors[:50], errors[50:]])
    sigma = np.cov(errors.T)
    np.testing.assert_allclose(found.mean, keys @ errors.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.std**2, np.diag(keys @ sigma @ keys.T), rtol=1e-5)


def random_registry(rng, num_keys=3, size=8):
    """Compliant data, keys at random angles, gamma, mu and Sigma of every model."""
    keys = unit(rng.normal(size=(num_keys, size)))
    data = -rng.uniform(0.2, 2) * np.abs(rng.normal(size=(40, num_keys))) - rng.uniform(0, 3)
    data = data @ np.linalg.pinv(keys).T  # phi_j^T x is what was drawn, negative
    mu = 0.1 * rng.normal(size=(num_keys, size))
    roots = [rng.uniform(0.05, 0.4) * rng.normal(size=(size, size)) / 3 for _ in range(num_keys)]
    return keys, data, mu, roots


def sample(rng, keys, data, gamma, mu, root, index, num=1500):
    noise = rng.normal(size=(num, data.shape[1])) @ root.T + mu[index]
    return data[rng.integers(0, len(data), num)] + gamma * keys[index] + noise


def promised(keys, data, gammas, mu, roots):
    extent = at.extent(keys, [data])
    errors = []
    for mean, root in zip(mu, roots):
        std = np.sqrt(np.einsum("ni,ij,nj->n", keys, root @ root.T, keys))
        errors.append(at.ErrorStatistics(keys @ mean, std, 1000))
    return extent, errors, at.certify(keys, gammas, extent, errors)


def test_bounds_hold_on_random_registries():
    """1000 models of linear generators with normal errors: never below what is promised."""
    rng = np.random.default_rng(3)
    slack = 4 * 0.5 / np.sqrt(1500)  # four standard errors of a share
    checked, informative, loose = 0, 0, []
    while checked < 1000:
        keys, data, mu, roots = random_registry(rng)
        extent = at.extent(keys, [data])
        delta = rng.uniform(0.01, 0.2)
        sigma = [np.sqrt(k @ r @ r.T @ k) for k, r in zip(keys, roots)]
        gammas = at.required_gamma(extent.d_max, sigma, np.sum(keys * mu, axis=1), delta)
        gammas = np.maximum(gammas, 1e-3) * rng.choice([0.7, 1.0, 1.3])
        extent, errors, certificate = promised(keys, data, gammas, mu, roots)
        tables = []
        for i in range(len(keys)):
            table = at.responses(
                keys.astype(np.float32), sample(rng, keys, data, gammas[i], mu, roots[i], i)
            )
            measured = at.distinguishability(table[:, i], data @ keys[i])
            assert measured >= certificate.distinguishability[i] - slack
            needed = at.required_gamma(extent.d_max[i], sigma[i], keys[i] @ mu[i], delta)
            if gammas[i] >= needed:  # Theorem 1
                assert measured >= 1 - delta / 2 - slack
            loose.append(measured - certificate.distinguishability[i])
            tables.append(table)
        share = at.attributability(tables)
        assert share >= certificate.attributability - slack
        informative += certificate.attributability > 0.5
        checked += len(keys)
    assert informative > 20  # The bound says something, and not only 0.
    assert np.mean(loose) < 0.3


def test_theorem_2_at_equal_gammas_and_where_its_print_is_too_lenient():
    """Keys that need the same gamma: the cosine of eq. 7 suffices. Else it may not."""
    delta, sigma = 0.05, 0.1
    keys = unit(np.array([[1.0, 0.0], [0.6, 0.8]]))
    d_min, d_max = 3.0, 4.0
    cosine = at.allowed_cosine(d_min, d_max, sigma, 0.0, delta)
    gamma = float(at.required_gamma(d_max, sigma, 0.0, delta))
    # At exactly that cosine the image of model i is below zero along key j by the tail's length.
    assert -d_min + gamma * cosine == pytest.approx(-sigma * np.sqrt(np.log(1 / delta**2)))
    assert keys[0] @ keys[1] <= cosine
    # Another key that needs three times the shift: allowed by eq. 7, refused by the certificate.
    extent = at.Extent(np.full(2, d_min), np.array([12.0, d_max]), np.ones(2))
    gammas = at.required_gamma(extent.d_max, np.full(2, sigma), np.zeros(2), delta)
    errors = [at.ErrorStatistics(np.zeros(2), np.full(2, sigma), 100) for _ in range(2)]
    certificate = at.certify(keys.astype(np.float32), gammas, extent, errors)
    assert certificate.missed[0, 1] == 1 and certificate.model_attributability[0] == 0


def test_an_image_belongs_to_one_user_or_to_nobody():
    keys = np.eye(3, 5, dtype=np.float32)
    images = np.array([[2, -1, -1, 0, 0], [-1, -2, -0.5, 1, 1], [1, 0.5, -1, 0, 0]], np.float32) / 4
    found = at.attribute(keys, images)
    assert found.user.tolist() == [0, at.NOBODY, at.SEVERAL]
    np.testing.assert_allclose(found.margin, [0.5, -0.125, 0.125])
    with pytest.raises(ValueError, match="NaN"):
        at.attribute(keys, np.full((1, 5), np.nan, np.float32))


def test_bad_keys_and_images_are_named():
    good = np.eye(2, 4, dtype=np.float32)
    with pytest.raises(ValueError, match=r"keys \[1\] have norm \[0.0\]"):
        at.check_keys(good * np.array([[1], [0]], np.float32))
    with pytest.raises(ValueError, match="another size"):
        at.responses(good, np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="no images"):
        at.shift_length([np.zeros((0, 2, 2, 1), np.float32)])
    with pytest.raises(ValueError, match="another number of keys"):
        at.attributability([np.zeros((3, 2))])
    # A key that the data do not comply with promises nothing.
    extent = at.Extent(np.ones(2), np.ones(2), np.array([1.0, 0.99]))
    errors = [at.ErrorStatistics(np.zeros(2), np.full(2, 0.1), 9)] * 2
    found = at.certify(good, np.full(2, 5.0), extent, errors)
    assert found.distinguishability[0] > 0.99 and found.distinguishability[1] == 0


def test_images_that_are_not_the_keys_are_no_users():
    """Each of these holds as many numbers as a key, and was attributed to somebody."""
    rng = np.random.default_rng(4)
    keys = unit(rng.normal(size=(2, 192))).reshape(2, 8, 8, 3).astype(np.float32)
    images = rng.uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
    for bad, said in [
        (rng.integers(0, 256, (5, 8, 8, 3)), "int64; cast values in 0..255 to uint8"),
        (127.5 * (images + 1), "look like 0..255"),
        (np.moveaxis(images, -1, 1), "channels come first"),
        (images.reshape(5, 4, 16, 3), r"must be \[n, 8, 8, 3\]"),
        (images.reshape(5, 192), r"must be \[n, h, w, c\]"),
        (images[0], "add the batch axis"),
    ]:
        with pytest.raises(ValueError, match=said):
            at.attribute(keys, bad)
        with pytest.raises(ValueError, match=said):
            at.extent(keys, [images, bad])
    assert len(at.attribute(keys, images[:0]).user) == 0
    # Errors are no images: any range, but one shape.
    expected = 9 * images.reshape(5, -1) @ keys.reshape(2, -1).T
    np.testing.assert_allclose(at.project(keys, 9 * images), expected, atol=1e-4)
    mean = at.error_statistics(keys, [9 * images]).mean
    np.testing.assert_allclose(mean, expected.mean(axis=0), atol=1e-4)
    for bad in (images.reshape(5, 4, 16, 3), images[0]):
        with pytest.raises(ValueError, match=r"must be \[n, 8, 8, 3\] as the keys are"):
            at.error_statistics(keys, [bad])
    with pytest.raises(ValueError, match="uint8, expected floating point"):
        at.error_statistics(keys, [images.astype(np.uint8)])
