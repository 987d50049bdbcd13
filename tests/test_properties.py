"""What holds for every input: conversions, thresholds, p-values, keys, rows with odd file names."""

import csv
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from experiments import _suspects, attribute
from flipad_jax import data
from flipad_jax.detection import calibration
from flipad_jax.inversion import linops, prox
from flipad_jax.registry import user_keys

quick = settings(max_examples=50, deadline=None)
# A temporary folder is shared by the examples of a test: each writes its own file.
with_files = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

finite = st.floats(-1e6, 1e6)
scores = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5 + 2**-52, 1.0, 7.0]), min_size=1, max_size=9)
judged = st.lists(
    st.sampled_from([-math.inf, -2.0, -1.0, 0.5, 0.5 + 2**-52, 1.0, 8.0, math.inf, math.nan]),
    max_size=9,
)


# Conversions.


@quick
@given(npst.arrays(np.uint8, npst.array_shapes(max_dims=4, max_side=5)))
def test_levels_survive_the_way_to_float_and_back(levels):
    x = data.to_float(levels)
    assert x.dtype == np.float32 and x.shape == levels.shape
    assert np.abs(x).max(initial=0) <= 1
    np.testing.assert_array_equal(data.to_uint8(x), levels)
    np.testing.assert_array_equal(data.to_uint8(x.astype(np.float64)), levels)


@quick
@given(
    npst.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.integers(1, 30),
        elements=st.floats(-2, 2, width=32) | st.sampled_from([-1.0, 1.0, 3e38, -3e38, 1e-40]),
    )
)
def test_no_other_level_is_nearer(x):
    levels = data.to_uint8(x)
    distances = np.abs(np.arange(256) / 127.5 - 1 - x[:, None].astype(np.float64))
    chosen = distances[np.arange(len(x)), levels]
    assert (chosen <= distances.min(axis=1) * (1 + 1e-5) + 1e-6).all()
    order = np.argsort(x, kind="stable")
    assert (np.diff(levels[order].astype(int)) >= 0).all()  # brighter stays brighter


@quick
@given(st.integers(0, 5), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_has_no_level(place, bad):
    x = np.zeros(6, np.float32)
    x[place] = bad
    with pytest.raises(ValueError, match=rf"first at index \[{place}\]"):
        data.to_uint8(x)


# Thresholds and p-values.


@quick
@given(scores, judged, st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9, 1.0]))
@example([1.0], [math.nan, math.inf, -math.inf], 1.0)
def test_p_values_and_threshold_agree_and_nan_is_no_verdict(own, others, fnr):
    p_values = calibration.conformal_p_values(own, others)
    threshold = calibration.conformal_threshold(own, fnr)
    for score, p_value in zip(others, p_values, strict=True):
        if not math.isfinite(score):
            assert math.isnan(p_value)
            continue
        assert p_value == (1 + sum(o >= score for o in own)) / (len(own) + 1)
        if fnr != 1 / 3:  # its decimal digits end, so that (n + 1) fnr may fall short of a whole
            assert (score > threshold) == (p_value <= fnr)
    # Of the own scores and one more, no more than the rate are above what the others allow.
    everything = sorted(own)
    rejected = [
        everything[i] > calibration.conformal_threshold(everything[:i] + everything[i + 1 :], fnr)
        for i in range(len(everything))
        if len(everything) > 1
    ]
    assert sum(rejected) <= fnr * len(everything) + 1e-9


@quick
@given(
    st.lists(st.integers(1, 20).map(lambda k: k / 20) | st.just(math.nan), max_size=9),
    st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 1.0]),
)
def test_benjamini_hochberg_is_the_largest_set_that_the_line_allows(p_values, fdr):
    known = sorted(p for p in p_values if not math.isnan(p))
    fits = [k for k in range(1, len(known) + 1) if known[k - 1] * len(known) <= fdr * k + 1e-9]
    bound = known[fits[-1] - 1] if fits else -1.0
    expected = [p <= bound for p in p_values]  # NaN is below nothing
    np.testing.assert_array_equal(calibration.benjamini_hochberg(p_values, fdr), expected)


# The proximal step and the operators that need no convolution.


@quick
@given(npst.arrays(np.float64, 8, elements=finite), st.floats(0, 1e6))
def test_soft_threshold_is_what_clipping_leaves(v, threshold):
    found = np.asarray(prox.soft_threshold(jnp.asarray(v), threshold))
    # Moreau: the proximal step of the norm and the projection onto its dual ball add up.
    np.testing.assert_allclose(found + np.clip(v, -threshold, threshold), v, rtol=1e-12, atol=1e-9)
    assert (np.abs(found) <= np.abs(v)).all() and (found * v >= 0).all()
    assert (found[np.abs(v) <= threshold] == 0).all()
    other = np.asarray(prox.soft_threshold(jnp.asarray(v[::-1].copy()), threshold))
    assert np.linalg.norm(found - other) <= np.linalg.norm(v - v[::-1]) * (1 + 1e-12)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 7), st.integers(0, 99))
def test_dense_operators_are_adjoint(shape, outputs, seed):
    draw = np.random.default_rng(seed)
    matrix = draw.standard_normal((math.prod(shape), outputs))
    op = linops.dense(matrix, input_shape=tuple(shape), output_shape=(outputs,))
    z, y = draw.standard_normal(shape), draw.standard_normal(outputs)
    az, aty = np.asarray(op.forward(jnp.asarray(z))), np.asarray(op.adjoint(jnp.asarray(y)))
    np.testing.assert_allclose(az, z.ravel() @ matrix, atol=1e-12)
    assert float(az @ y) == pytest.approx(float(np.sum(z * aty)), abs=1e-10)


# Files.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@with_files
@given(
    npst.arrays(
        np.float32,
        st.tuples(*[st.integers(1, 4)] * 4),
        elements=st.integers(-3, 3).map(float),
    ),
    st.dictionaries(st.text(max_size=5), json_values, max_size=3),
)
def test_keys_come_back_with_their_facts(tmp_path, rows, facts):
    norms = np.linalg.norm(rows.reshape(len(rows), -1), axis=1)
    path = tmp_path / "keys.safetensors"
    if not norms.all():
        with pytest.raises(ValueError, match="norm"):
            user_keys.save(path, rows, facts)
        return
    keys = (rows / norms[:, None, None, None]).astype(np.float32)
    user_keys.save(path, keys, facts)
    found, told = user_keys.load(path)
    np.testing.assert_array_equal(found, keys)
    assert told == json.loads(json.dumps(facts))


# Any bytes but "/" and the end of the string, as the system decodes them.
file_names = st.binary(min_size=1, max_size=20).map(
    lambda name: name.replace(b"/", b"_").replace(b"\0", b"_").decode("utf-8", "surrogateescape")
) | st.sampled_from(["a,b.png", 'quo"te', "new\nline", "\r", "\r\n", "=1+1", "ü\u2028x", "\udcff"])


def read_back(path, columns):
    if path.suffix == ".jsonl":
        # Split at "\n" alone: str.splitlines knows more ends of a line than JSON Lines has.
        return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert next(csv.reader(file)) == list(columns)
        return list(csv.DictReader(file, columns))


@with_files
@given(st.lists(file_names, max_size=4), st.sampled_from([".csv", ".jsonl"]))
def test_rows_hold_any_file_name(tmp_path, names, ending):
    path = tmp_path / f"rows{ending}"
    rows = [{"path": name, "verdict": "ours", "score": "0.5"} for name in names]
    columns = ("path", "verdict", "score")
    _suspects.write_rows(path, columns, rows)
    assert read_back(path, columns) == rows
    record = SimpleNamespace(workdir=path.parent, shown="", has_kept_anything=lambda: True)
    _suspects.check_output(path, columns, record)  # and is known again as ours


@with_files
@given(st.lists(file_names, max_size=4), st.sampled_from([".csv", ".jsonl"]))
def test_verdicts_hold_any_file_name(tmp_path, names, ending):
    path = tmp_path / f"verdicts{ending}"
    with attribute._Writer(path) as writer:
        for name in names:
            writer.write([attribute.Row(name, 0.5, None, 1.0, "ours", "")])
    assert [row["path"] for row in read_back(path, attribute.COLUMNS)] == names


@with_files
@given(st.lists(file_names, max_size=4, unique=True))
def test_the_log_of_scores_holds_any_file_name(tmp_path, names):
    path = tmp_path / "scores.jsonl"
    path.unlink(missing_ok=True)
    rows = [attribute.Judged(name, "ab", 0.5, 1e-3, True, "", "") for name in names]
    with attribute._ScoreLog(path, "cd") as log:
        log.add(rows)
    with attribute._ScoreLog(path, "cd") as log:
        assert list(log.known.values()) == rows
