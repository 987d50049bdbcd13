"""The comparison of ways to invert: its numbers recomputed, its detector that of the library."""

import functools
import json

import jax
import numpy as np
import pytest
from helpers import small_layer

import flipad_jax
from experiments import _config
from experiments import inversion_accuracy as experiment
from flipad_jax import AttributorConfig, FinalLayer, data, linops
from flipad_jax.inversion.final_layer import forward

CHANNELS = 5


def run(workdir, *flags):
    flags = ("--experiment=inversion_accuracy", "--preset=smoke", *flags)
    return _config.main(["run.py", *flags, f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("inversion_accuracy")
    assert run(workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def toy():
    """Layer, mean activation and images of a generator with six latent factors."""
    rng = np.random.default_rng(0)
    # Dense, as it compiles faster. float64, as rounding could swap two ranks in the reference.
    matrix = 0.03 * rng.standard_normal((8 * 8 * CHANNELS, 8 * 8 * 3))
    layer = FinalLayer(linops.dense(matrix, (8, 8, CHANNELS), (8, 8, 3)))
    mixing = rng.standard_normal((6, 8, 8, CHANNELS))
    z = np.maximum(0.5 * np.einsum("nk,khwc->nhwc", rng.standard_normal((400, 6)), mixing), 0)
    return (
        layer,
        z.mean(axis=0),
        data.to_uint8(np.asarray(jax.vmap(lambda v: forward(layer, v))(z))),
    )


@pytest.mark.slow
def test_every_setting_has_a_row(smoke):
    rows = json.loads((smoke / "results.json").read_text())["metrics"]["rows"]
    assert [(row["lam"], row["asked"], row["tested"]) for row in rows] == [
        (1e-5, "1 iterations", True),
        (1e-5, "10 iterations", True),
        (1e-5, "gap 0.1", False),
        (1e-2, "1 iterations", True),
        (1e-2, "10 iterations", True),
        (1e-2, "gap 0.1", True),
    ]
    # What is left out tells its price: more than the 100 iterations that the preset allows.
    assert 100 < rows[2]["iterations_mean"] <= 200
    certified = rows[-1]
    assert certified["share_certified"] == 1 and certified["gap_largest"] <= 0.1
    assert 20 < certified["iterations_mean"] < 100
    for row in (rows[0], rows[1], rows[3], rows[4]):
        assert row["iterations_mean"] == row["max_iters"] and row["share_certified"] is None
        assert row["gap_median"] > 0.5
    # More iterations take longer and get nearer.
    for one, ten in ((rows[0], rows[1]), (rows[3], rows[4])):
        assert ten["gap_median"] < one["gap_median"]
    assert certified["gap_median"] < rows[4]["gap_median"]


@pytest.mark.slow
def test_rates_are_those_of_the_scores(smoke):
    rows = json.loads((smoke / "results.json").read_text())["metrics"]["rows"]
    for row, name in ((rows[1], "lam-1e-05-iterations-10"), (rows[5], "lam-0.01-gap-0.1")):
        with np.load(smoke / "stages" / f"{name}.npz") as stage:
            own, threshold = stage["own"][0], stage["threshold"][0]
            rivals = {rival: stage[rival][0] for rival in row["accuracy"]}
            gaps = stage["gap"]
        assert set(rivals) == {"real", "digits_dcgan_1", "digits_dcgan_2", "digits_wgan_gp_0"}
        assert len(own) == 24 and len(gaps) == 400 + 5 * 24
        for rival, scores in rivals.items():
            rejected, accepted = np.mean(scores > threshold), np.mean(own <= threshold)
            np.testing.assert_allclose(row["accuracy"][rival], (rejected + accepted) / 2)
            above = scores[:, None] > own[None]
            ties = scores[:, None] == own[None]
            np.testing.assert_allclose(row["auc"][rival], np.mean(above + 0.5 * ties))
        np.testing.assert_allclose(row["mean_auc"], np.mean(list(row["auc"].values())))
        np.testing.assert_allclose(row["achieved_fnr"], np.mean(own > threshold))
        np.testing.assert_allclose(row["gap_median"], np.median(gaps), rtol=1e-6)
        # With a quarter of the own images and ten iterations it tells more than chance.
        assert row["mean_auc"] > 0.85


@pytest.mark.slow
def test_the_page_shows_the_figure(smoke):
    assert (smoke / "figures" / "accuracy_by_gap.png").stat().st_size > 5000
    page = (smoke / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert page.count("<tr>") == 1 + 6
    rows = json.loads((smoke / "results.json").read_text())["metrics"]["rows"]
    best = max((row for row in rows if row["tested"]), key=lambda row: row["mean_auc"])
    told = f"lam {best['lam']:g}, {best['asked']}: AUC {best['mean_auc']:.3f}"
    assert f"Highest AUC over rivals: {told}" in page


def test_the_detector_is_that_of_the_library(toy):
    layer, z_bar, images = toy
    rng = jax.random.key(3)
    config = AttributorConfig(lam=1e-3, max_iters=15, num_altered=0)
    theirs = flipad_jax.fit(layer, z_bar, images, rng=rng, config=config)
    way = experiment.Setting(1e-3, 0.0, 15, "fista", "float64")
    z, _ = experiment._invert(layer, z_bar, images, way)
    _, calibration_scores = experiment.fit_split(z, rng)
    np.testing.assert_allclose(calibration_scores, theirs.calibration_scores, rtol=1e-5)


def test_a_gap_that_float32_misses_is_found_in_float64():
    conv, matrix = small_layer(np.float32)
    op = linops.dense(matrix.T.astype(np.float32), conv.input_shape, conv.output_shape)
    images = np.random.default_rng(0).integers(0, 256, (2, *op.output_shape), np.uint8)
    probe = functools.partial(
        experiment._probe, FinalLayer(op), np.zeros(op.input_shape, np.float32), images, 1e-1
    )
    loose = probe(1e-1, 1000)
    assert loose["dtype"] == "float32" and "float64_gap" not in loose
    assert 0 < loose["iterations"] <= 2000
    tight = probe(1e-7, 1000)
    assert tight["dtype"] == "float64" and tight["cost"] == 2
    assert tight["float64_gap"] <= 1e-7 < tight["float32_gap"]
    assert loose["iterations"] < tight["iterations"] <= 2000
    assert np.isinf(probe(1e-7, 5)["iterations"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--ours=digits_dcgan_9"], "no generator 'digits_dcgan_9' in the zoo"),
        (["--gaps=", "--iterations="], "nothing to compare"),
        (["--lams="], "nothing to compare"),
    ],
)
def test_mistakes_are_refused_before_anything_is_computed(tmp_path, capsys, flags, words):
    assert run(tmp_path / "work", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error:") and words in error[-1]
    assert not (tmp_path / "work" / "stages").exists()
