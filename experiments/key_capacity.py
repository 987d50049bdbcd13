"""How many keys there is room for: compliance and angles as their number grows ([P2] section 4).

Every further key takes a direction of its own, and the data's mean has only so much to give: N
orthonormal keys have a root mean square response to the mean image of at most ||m|| / sqrt(N), so
they come ever nearer to the data until real images fall on the wrong side. The paper calls this an
open packing problem. Here: keys by both methods, in growing numbers, on held-out images, beside
that bound.

    python run.py --experiment=key_capacity
"""

import dataclasses
from typing import Any

import numpy as np

from experiments import _keyed
from experiments._config import Run, check_once, setting
from flipad_jax import data, report
from flipad_jax.registry import attributability, user_keys


@dataclasses.dataclass(frozen=True)
class Config(_keyed.KeySettings):
    """Settings of the capacity study."""

    counts: tuple[int, ...] = setting(
        (10, 30, 100, 300, 600, 900), "Numbers of keys, all at once.", lower_bound=2
    )
    sequential_counts: tuple[int, ...] = setting(
        (10, 30), "Numbers of keys by eq. 9, one after the other.", lower_bound=2
    )
    compliance: float = setting(
        0.99, "Share of real images that a key must have on its side.", upper_bound=1.0
    )
    num_test: int = setting(
        1000, "Images of the data, and of the root, that judge the keys.", lower_bound=8
    )


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**_keyed.SMOKE_KEYS, "num_test": 60, "counts": (2, 8), "sequential_counts": (2,)},
    "demo": {},
    "paper": {
        **_keyed.PAPER_KEYS,
        "num_test": 5000,
        "sequential_counts": (10, 30, 100, 300),
    },
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """Keys of every number and method; returns a row for each."""
    _keyed.check(config)
    check_once(config, "counts", "sequential_counts")
    root = _keyed.load_root(config)
    for name in ("counts", "sequential_counts"):
        for count in getattr(config, name):
            _keyed.check_room(config, root, f"--{name}={count}", count)
    images = _keyed.load_images(config, root, num_test=config.num_test)
    size = int(np.prod(root.image_shape))
    root_images = _keyed.root_test_images(config, root, config.num_test)
    mean_image = np.concatenate([data.to_float(images.test), data.to_float(root_images)]).mean(0)
    rows = []
    for method, counts in (
        ("joint", sorted(config.counts)),
        ("sequential", sorted(config.sequential_counts)),
    ):
        for count in counts:
            name = f"keys-{method}-{count}"
            keys = _keyed.make_keys(config, record, images, count, method, name=name)
            found = user_keys.describe(keys, images.test, root_images)
            to_mean = attributability.responses(keys, mean_image[None])[0]
            rows.append(
                {
                    "method": method,
                    "count": count,
                    "compliance_mean": found.compliance.mean(),
                    "compliance_smallest": found.compliance.min(),
                    "generated_compliance_mean": found.generated_compliance.mean(),
                    "share_compliant": (found.compliance >= config.compliance).mean(),
                    "largest_cosine": found.largest_cosine.max(),
                    "d_max_mean": found.d_max.mean(),
                    "d_min_mean": found.d_min.mean(),
                    "mean_response": float(np.sqrt(np.mean(np.square(to_mean)))),
                    "mean_response_bound": user_keys.mean_response_bound(mean_image, count),
                    "seconds": record.seconds[name],
                }
            )
    joint = [row for row in rows if row["method"] == "joint"]
    fit = [row["count"] for row in joint if row["compliance_smallest"] >= config.compliance]
    results = {"rows": rows, "capacity": max(fit, default=0), "num_dimensions": size}
    _write_page(config, record, results, images)
    return results


def tables(results: dict[str, Any]) -> list[report.Table]:
    """A row per method and number of keys."""
    header = [
        "method",
        "keys",
        "compliant real images",
        "of the worst key",
        "keys that comply",
        "largest cosine",
        "d_max",
        "response to the mean",
        "bound",
        "seconds",
    ]
    rows = [
        [
            row["method"],
            row["count"],
            f"{row['compliance_mean']:.2%}",
            f"{row['compliance_smallest']:.2%}",
            f"{row['share_compliant']:.0%}",
            f"{row['largest_cosine']:.3f}",
            f"{row['d_max_mean']:.2f}",
            f"{row['mean_response']:.3f}",
            f"{row['mean_response_bound']:.3f}",
            f"{row['seconds']:.1f}",
        ]
        for row in results["rows"]
    ]
    return [report.Table(header, rows)]


def _write_page(config, record, results, images) -> None:
    series: dict[str, dict[str, Any]] = {"compliance": {}, "response": {}}
    for method in ("joint", "sequential"):
        rows = [row for row in results["rows"] if row["method"] == method]
        counts = np.log10([row["count"] for row in rows])
        series["compliance"][method] = (counts, [row["compliance_smallest"] for row in rows])
        series["response"][method] = (counts, [row["mean_response"] for row in rows])
    joint = [row for row in results["rows"] if row["method"] == "joint"]
    series["response"]["bound"] = (
        np.log10([row["count"] for row in joint]),
        [row["mean_response_bound"] for row in joint],
    )
    figure = report.scatter_panels(
        [
            report.Panel(
                "Compliance of the worst key",
                "log10 of the number of keys",
                "share of real images",
                series["compliance"],
                level=config.compliance,
            ),
            report.Panel(
                "Response to the mean image",
                "log10 of the number of keys",
                "root mean square",
                series["response"],
            ),
        ]
    )
    report.save_figure(figure, record.figures / "capacity.png")
    lead = (
        f"Of the numbers tried, {results['capacity']} keys at right angles all keep "
        f"{config.compliance:.0%} of held-out real images on their side; images have "
        f"{results['num_dimensions']} dimensions."
    )
    sections = [
        report.Section(
            "How many keys", [report.Picture(figure, "Held-out images."), *tables(results)]
        ),
        report.Section(
            "How to read it",
            [
                "Keys at right angles share out the squared length of the data's mean: the more "
                "there are, the nearer each of them is to the data (bound). Where the worst key "
                "no longer keeps real images on its side, D falls with it.",
                _keyed.keys_text(config, images, "joint"),
                _keyed.keys_text(config, images, "sequential"),
                f"Judged on {len(images.test)} test images and {config.num_test} others of the "
                "root. Seconds include compiling, anew for every number of keys.",
            ],
        ),
    ]
    report.write_page(record.workdir / "report.html", "Capacity of keys", sections, lead=lead)


def summary(metrics: dict[str, Any]) -> str:
    """The table, as the terminal shows it."""
    return "\n\n".join(report.table_text(t.header, t.rows) for t in tables(metrics))
