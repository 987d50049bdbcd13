"""How many own images it takes: the rates are those of the scores that the stages hold."""

import json

import numpy as np
import pytest

from experiments import _config, sample_size
from flipad_jax.detection import calibration


def test_rates_are_pooled_over_fits_and_thresholds_are_each_fits_own():
    rng = np.random.default_rng(0)
    scored = []
    for shift in (0.0, 5.0):  # Fits differ in scale; a common threshold would be wrong.
        own = rng.exponential(size=1400) + shift
        scored.append(
            {
                "calibration": np.sort(own[:400]),
                "own": own[400:],
                "real": rng.exponential(size=300) + shift + 6,
                "fit_seconds": shift,
            }
        )
    row = sample_size._row(1600, 0.05, scored, ["real"])
    rejected = 0
    for arrays in scored:
        p_values = calibration.conformal_p_values(arrays["calibration"], arrays["own"])
        rejected += int((p_values <= 0.05).sum())
    found = row["verdict"]
    assert found["achieved_fnr"] == rejected / 2000 and row["certified"]
    assert found["interval"][0] < rejected / 2000 < found["interval"][1]
    assert len(found["mean"]) == 2 and found["worst"] > 0.95
    # At most what was asked for on average; the interpolated quantile loses a little more.
    assert row["quantile"]["achieved_fnr"] >= found["achieved_fnr"]
    assert not sample_size._row(1600, 0.001, scored, ["real"])["certified"]


@pytest.mark.slow
def test_the_table_is_made_of_the_stages(tmp_path):
    flags = ("--experiment=sample_size", "--preset=smoke", f"--workdir={tmp_path}")
    assert _config.main(["run.py", *flags]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["metrics"]["rows"]
    assert [row["count"] for row in rows] == [100, 160]
    lost = []
    for refit in range(2):
        with np.load(tmp_path / "stages" / f"fit-160-{refit}.npz") as stage:
            assert len(stage["calibration"]) == 40
            lost += list(calibration.conformal_p_values(stage["calibration"], stage["own"]) <= 0.05)
    assert rows[1]["verdict"]["achieved_fnr"] == np.mean(lost)
    assert "own images" in (tmp_path / "report.html").read_text()
