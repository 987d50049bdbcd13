"""How exactly must images be inverted for the detector's sake, and at which lasso weight?

The one-class detector (own images only, no networks, so that nothing but the inversion is judged)
is fitted and tested on the same images again and again, inverted each time by another setting: to a
relative duality gap by the primal-dual method, or by a fixed number of FISTA iterations, at several
weights lam. Accuracy at `--fnr` and AUC against every other generator of the zoo and real images
stand beside the gap that was reached and the seconds that an image took.

float32 cannot tell every gap from zero. A few images find out what each asked gap takes: one that
float32 misses is solved in float64, one that is too costly is reported and left out. All images are
inverted once per setting; the detector is fitted to several random splits of the own ones.

    python run.py --experiment=inversion_accuracy
    python run.py --experiment=inversion_accuracy --ours=digits_wgan_gp_0 --gaps=
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import _generators
from experiments._config import Run, setting
from flipad_jax import metrics, report
from flipad_jax.detection import calibration, one_class
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.generators import sampling, zoo
from flipad_jax.inversion.final_layer import FinalLayer, invert


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    seed: int = setting(0, "Seed of everything random.", lower_bound=0)
    ours: str = setting("digits_dcgan_0", "Generator of the zoo that is ours; the rest are rivals.")
    rivals: tuple[str, ...] = setting(
        ("digits_dcgan_0", "digits_dcgan_1", "digits_dcgan_2", "digits_wgan_gp_0"),
        "Generators of the zoo that are asked about; ours is left out of them.",
    )
    fnr: float = setting(
        0.005, "Share of own images that may be rejected.", lower_bound=0.0, upper_bound=1.0
    )
    lams: tuple[float, ...] = setting(
        (1e-5, 1e-4, 5e-4, 1e-3, 1e-2), "Lasso weights (half of the paper's lambda).", lower_bound=0
    )
    gaps: tuple[float, ...] = setting(
        (1e-1, 1e-2, 1e-3, 1e-4), "Relative duality gaps, primal-dual method.", lower_bound=1e-12
    )
    iterations: tuple[int, ...] = setting((3, 10, 30, 100), "FISTA iterations.", lower_bound=1)
    num_own: int = setting(
        800,
        "Own images: half to fit, a quarter as reference, a quarter to calibrate.",
        lower_bound=400,
    )
    num_test: int = setting(100, "Test images of every source.", lower_bound=8)
    num_splits: int = setting(2, "Random splits of the own images, averaged.", lower_bound=1)
    num_mean: int = setting(5000, "Latents that the mean activation averages.", lower_bound=1)
    num_probe: int = setting(4, "Images that find out what a gap takes.", lower_bound=2)
    most_iterations: int = setting(
        1000,
        "A gap that takes more on average is left out; one in float64 counts twice.",
        lower_bound=10,
    )


PRESETS = {
    "smoke": {
        "fnr": 0.05,
        "lams": (1e-5, 1e-2),
        "gaps": (1e-1,),
        "iterations": (1, 10),
        "num_own": 400,
        "num_test": 24,
        "num_splits": 1,
        "num_mean": 500,
        "num_probe": 24,  # as many slots as the run: one compilation
        "most_iterations": 100,
    },
    "demo": {},
    "paper": {"num_own": 4000, "num_test": 500, "most_iterations": 20_000},
}

FLOAT64_COST = 2  # float32 iterations that take as long as one in float64
_PATIENCE = 3  # images may take so many times the iterations of the average one


class Setting(NamedTuple):
    """One way to invert: `tol` is 0 for a fixed number of iterations."""

    lam: float
    tol: float
    max_iters: int
    method: str
    dtype: str = "float32"


def run(config: Config, record: Run) -> dict[str, Any]:
    """Invert, fit and test by every setting; returns a row of results per setting."""
    names = config.rivals
    for name in (config.ours, *names):
        zoo.record(name)  # Refuses one that is not there, and says which there are.
    if not config.lams or not (config.gaps or config.iterations):
        raise ValueError("nothing to compare: give --lams, and --gaps or --iterations")
    ours = zoo.load(config.ours)
    mean_rng, own_rng, rival_rng, fit_rng = jax.random.split(jax.random.key(config.seed), 4)
    z_bar = record.stage(
        "mean_activation",
        lambda: {"z_bar": sampling.mean_activation(ours, mean_rng, config.num_mean)},
        text=f"mean activation over {config.num_mean} latents",
    )["z_bar"]
    layer = sampling.final_layer(ours)
    own = sampling.generate(ours, own_rng, config.num_own)
    sources = {
        "own": sampling.generate(ours, own_rng, config.num_test, first=config.num_own),
        "real": _generators.recorded_images(zoo.record(config.ours), "test", config.num_test),
    }
    for index, name in enumerate(names):
        if name != config.ours:
            stream = jax.random.fold_in(rival_rng, index)
            sources[name] = sampling.generate(zoo.load(name), stream, config.num_test)

    few = np.concatenate(
        [sources[kind][: max(config.num_probe // 2, 1)] for kind in ("own", "real")]
    )
    rows = []
    for lam in config.lams:
        for count in config.iterations:
            way = Setting(lam, 0.0, count, "fista")
            rows.append(
                _row(
                    f"iterations-{count}", way, layer, z_bar, own, sources, fit_rng, config, record
                )
            )
        for gap in config.gaps:
            probed = {
                key: value.item()
                for key, value in record.stage(
                    f"probe-{lam:g}-{gap:g}",
                    functools.partial(_probe, layer, z_bar, few, lam, gap, config.most_iterations),
                    text=f"lam {lam:g}, gap {gap:g}: what {len(few)} images take",
                ).items()
            }
            if probed["iterations"] * probed["cost"] > config.most_iterations:
                rows.append(_left_out(lam, gap, probed))
                continue
            patience = _PATIENCE * config.most_iterations
            way = Setting(lam, gap, patience, "primal_dual", probed["dtype"])
            rows.append(
                _row(f"gap-{gap:g}", way, layer, z_bar, own, sources, fit_rng, config, record)
            )
    figure = _figure([row for row in rows if row["tested"]])
    report.save_figure(figure, record.figures / "accuracy_by_gap.png")
    results = {"rows": rows, "usual": _usual(rows)}
    _write_report(record, config, results, figure)
    record.say(f"Report: {record.shown}/report.html")
    return results


@functools.lru_cache(maxsize=2)
def _cast(layer: FinalLayer, dtype: str) -> FinalLayer:
    """The layer in a dtype; the same object again, of which `lasso` remembers the constants."""
    return layer if dtype == "float32" else jax.tree.map(lambda x: x.astype(dtype), layer)


def _invert(layer: FinalLayer, z_bar: np.ndarray, images: np.ndarray, way: Setting, **options):
    """z' = z - z_bar `[n, h, w, c]` float32, and the info, both on the host."""
    # float64 only in here: the detector is what a user has.
    with jax.enable_x64(way.dtype == "float64"):
        z_bar = z_bar.astype(way.dtype)
        z, info = invert(
            _cast(layer, way.dtype),
            images,
            z_bar,
            lam=way.lam,
            tol=way.tol,
            max_iters=way.max_iters,
            method=way.method,
            **options,
        )
        shifted = np.asarray(z) - z_bar[None]
        return shifted.astype(np.float32), jax.tree.map(np.asarray, info)


def _probe(layer, z_bar, images, lam, gap, most_iterations) -> dict[str, Any]:
    """Iterations that the gap takes in float32 or, where that misses it, in float64."""
    found: dict[str, Any] = {}
    for dtype, cost in (("float32", 1), ("float64", FLOAT64_COST)):
        way = Setting(lam, gap, 2 * most_iterations, "primal_dual", dtype)
        _, info = _invert(layer, z_bar, images, way)
        found[f"{dtype}_gap"] = float(info.relative_gap.max())
        reached = bool(info.converged.all())
        # Not reached: dearer than anything that is run.
        iterations = float(info.num_iters.mean()) if reached else np.inf
        found |= {"dtype": dtype, "cost": cost, "iterations": iterations}
        if reached:
            break
    return found


def _row(name, way, layer, z_bar, own, sources, fit_rng, config, record) -> dict[str, Any]:
    """Invert everything one way, fit and test on every split; what came out, for results.json."""
    what = f"gap {way.tol:g}" if way.tol else f"{way.max_iters} iterations"
    arrays = record.stage(
        f"lam-{way.lam:g}-{name}",
        functools.partial(_measure, way, layer, z_bar, own, sources, fit_rng, config, record),
        text=f"lam {way.lam:g}, {what} ({way.method}, {way.dtype}): invert, fit, test",
    )
    rivals = [source for source in sources if source != "own"]
    found = [
        metrics.summary(
            arrays["own"][i], {rival: arrays[rival][i] for rival in rivals}, arrays["threshold"][i]
        )
        for i in range(config.num_splits)
    ]

    def mean(*path):
        values = [functools.reduce(lambda entry, key: entry[key], path, one) for one in found]
        return float(np.mean(values))

    return {
        "lam": way.lam,
        "asked": what,
        "tol": way.tol,
        "max_iters": way.max_iters,
        "method": way.method,
        "dtype": way.dtype,
        "tested": True,
        "gap_median": float(np.median(arrays["gap"])),
        "gap_largest": float(np.max(arrays["gap"])),
        "iterations_mean": float(arrays["num_iters"].mean()),
        "share_certified": float(arrays["converged"].mean()) if way.tol else None,
        "seconds_per_image": float(arrays["seconds"]) / len(arrays["gap"]),
        "cpu_seconds_per_image": float(arrays["cpu_seconds"]) / len(arrays["gap"]),
        "mean_accuracy": mean("mean_accuracy"),
        "mean_accuracy_std": float(np.std([one["mean_accuracy"] for one in found])),
        "mean_auc": mean("mean_auc"),
        "mean_auc_std": float(np.std([one["mean_auc"] for one in found])),
        "accuracy": {rival: mean("accuracy", rival) for rival in rivals},
        "auc": {rival: mean("auc", rival) for rival in rivals},
        "achieved_fnr": mean("achieved_fnr"),
    }


def _measure(way, layer, z_bar, own, sources, fit_rng, config, record) -> dict[str, np.ndarray]:
    images = np.concatenate([own, *sources.values()])
    # Compiles, so that the seconds below are those of inverting.
    _invert(layer, z_bar, images[:64], way._replace(tol=0.0, max_iters=1))
    with record.progress(len(images), f"lam {way.lam:g}") as bar:
        done = 0

        def progress(count):
            nonlocal done
            bar.update(count - done)
            done = count

        start, cpu_start = time.perf_counter(), time.process_time()
        z, info = _invert(layer, z_bar, images, way, progress=progress)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    ends = np.cumsum([len(own), *(len(batch) for batch in sources.values())])
    own_z, *parts = np.split(z, ends[:-1])
    scores: dict[str, list[np.ndarray]] = {name: [] for name in ("threshold", *sources)}
    for split in range(config.num_splits):
        detector, calibration_scores = fit_split(own_z, jax.random.fold_in(fit_rng, split))
        scores["threshold"].append(
            np.asarray(calibration.threshold(calibration_scores, config.fnr))
        )
        for source, part in zip(sources, parts, strict=True):
            scores[source].append(one_class.score(detector, part))
    return {
        "seconds": np.asarray(seconds),
        "cpu_seconds": np.asarray(cpu_seconds),
        "gap": info.relative_gap,
        "num_iters": info.num_iters,
        "converged": info.converged,
        **{name: np.stack(rows) for name, rows in scores.items()},
    }


def fit_split(own_z: np.ndarray, rng: jax.Array) -> tuple[one_class.OneClass, np.ndarray]:
    """What `attributor.fit` does with inverted own images: detector, scores of the calibration."""
    order = np.asarray(jax.random.permutation(jax.random.split(rng)[0], len(own_z)))
    num_calibration = int(len(own_z) * AttributorConfig.calibration_share)
    calibrating, reference, fitting = np.split(order, [num_calibration, 2 * num_calibration])
    detector = one_class.fit(own_z[fitting], own_z[reference])
    return detector, np.sort(one_class.score(detector, own_z[calibrating]))


def _left_out(lam: float, gap: float, probed: dict[str, Any]) -> dict[str, Any]:
    reached = np.isfinite(probed["iterations"])
    return {
        "lam": lam,
        "asked": f"gap {gap:g}",
        "tol": gap,
        "method": "primal_dual",
        "dtype": probed["dtype"] if reached else None,
        "tested": False,
        "iterations_mean": probed["iterations"] if reached else None,
        "float32_gap": probed["float32_gap"],
        "float64_gap": probed.get("float64_gap"),
    }


def _usual(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the library's defaults, if it is among them."""
    usual = AttributorConfig()
    for row in rows:
        wanted = (usual.lam, usual.tol, usual.max_iters, usual.method)
        if row["tested"] and (row["lam"], row["tol"], row["max_iters"], row["method"]) == wanted:
            return row
    return None


def _figure(rows: list[dict[str, Any]]) -> Any:
    """Accuracy and AUC against the gap reached, a line per lam."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    lams = sorted({row["lam"] for row in rows})
    colours = ("#56b4e9", "#0072b2", "#000000", "#e69f00", "#d55e00", "#009e73", "#cc79a7")
    for axes, value, name in zip(
        panels, ("mean_accuracy", "mean_auc"), ("accuracy", "AUC"), strict=True
    ):
        for index, lam in enumerate(lams):
            colour = colours[index % len(colours)]
            line = [row for row in rows if row["lam"] == lam]
            for method, options in (
                ("fista", {"marker": "o", "mfc": "white", "label": f"lam {lam:g}"}),
                ("primal_dual", {"marker": "D"}),
            ):
                points = [row for row in line if row["method"] == method]
                gaps, values = ([row[key] for row in points] for key in ("gap_median", value))
                if method == "fista" and lam == lams[-1]:
                    # Here the gaps are far enough apart to write beside them.
                    for row, x, y in zip(points, gaps, values, strict=True):
                        axes.annotate(
                            str(row["max_iters"]),
                            (x, y),
                            xytext=(5, -3),
                            textcoords="offset points",
                            size=7,
                            color=colour,
                        )
                axes.plot(gaps, values, color=colour, ms=4.5, lw=1.2, **options)
        axes.set_xscale("log")
        # The library's figures parse no mathematics, so no 10^k.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda gap, _: f"{gap:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.invert_xaxis()
        axes.set_xlabel("relative duality gap reached (median)")
        axes.set_title(f"Mean {name} over rivals", loc="left", size=9, weight="bold")
        axes.xaxis.label.set_size(8)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e9edf1")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].legend(
        frameon=False,
        fontsize=7.5,
        title="circles: FISTA (iterations), diamonds: primal-dual",
        title_fontsize=7.5,
    )
    return figure


def _table(results: dict[str, Any]) -> report.Table:
    tested = [row for row in results["rows"] if row["tested"]]
    rivals = list(tested[0]["accuracy"]) if tested else []
    percent = ["mean", *rivals, "fnr"]
    header = ["lam", "asked", "float", "iterations", "gap", "ms", "CPU ms", "AUC", *percent]
    rows: list[list[Any]] = []
    for row in results["rows"]:
        start = [f"{row['lam']:g}", row["asked"], row["dtype"] and row["dtype"][5:]]
        if not row["tested"]:
            left_out = "not reached" if row["iterations_mean"] is None else row["iterations_mean"]
            rows.append([*start, left_out, *[None] * (len(header) - len(start) - 1)])
            continue
        rows.append(
            [
                *start,
                row["iterations_mean"],
                row["gap_median"],
                1e3 * row["seconds_per_image"],
                1e3 * row["cpu_seconds_per_image"],
                row["mean_auc"],
                row["mean_accuracy"],
                *(row["accuracy"][rival] for rival in rivals),
                row["achieved_fnr"],
            ]
        )
    for row in rows:  # Text and numbers share this column.
        row[3] = row[3] if isinstance(row[3], str) else f"{row[3]:.0f}"
    return report.Table(
        header,
        rows,
        formats={
            "gap": ".1e",
            "ms": ".1f",
            "CPU ms": ".1f",
            "AUC": ".3f",
            **dict.fromkeys(percent, ".1%"),
        },
        best={"AUC": "max", "mean": "max"},
    )


def summary(results: dict[str, Any]) -> str:
    """The table, as it is printed."""
    table = _table(results)
    return report.table_text(table.header, table.rows, formats=table.formats, best=table.best)


def _outcome(results: dict[str, Any]) -> str:
    """The default beside the best setting, in a sentence or two."""

    def told(row):
        return (
            f"lam {row['lam']:g}, {row['asked']}: AUC {row['mean_auc']:.3f}, accuracy "
            f"{100 * row['mean_accuracy']:.1f} %, {1e3 * row['cpu_seconds_per_image']:.1f} ms of "
            "processor time an image"
        )

    tested = [row for row in results["rows"] if row["tested"]]
    if not tested:
        return "No setting was within --most_iterations."
    best = max(tested, key=lambda row: row["mean_auc"])
    text = f"Highest AUC over rivals: {told(best)}."
    usual = results["usual"]
    return text if usual is None else f"{text} The library's defaults: {told(usual)}."


def _write_report(record: Run, config: Config, results: dict[str, Any], figure: Any) -> None:
    usual = AttributorConfig()
    table = dataclasses.replace(
        _table(results),
        caption="Accuracy at one threshold per setting: own accepted and rival rejected, averaged. "
        "Gap: median over all images. ms, CPU ms: per image, of inverting, by the clock and of all "
        "cores; other load on the machine adds to the former. A row without accuracy was left out: "
        f"its gap takes more than "
        f"{config.most_iterations} iterations an image (one in float64 counts "
        f"{FLOAT64_COST}), or was not reached in twice as many on {config.num_probe} images.",
    )
    setup = (
        f"Ours: {config.ours}. One-class detector on {config.num_own} own images, without "
        f"impostors; {config.num_test} test images of every source; mean over "
        f"{config.num_splits} random splits of the own images, the same for every setting. "
        f"fnr {config.fnr:g}. The library's defaults: lam {usual.lam:g}, "
        f"{usual.max_iters} iterations of {usual.method}."
    )
    picture = report.Picture(
        figure, "How well the detector decides, by how exactly images were inverted."
    )
    report.write_page(
        record.workdir / "report.html",
        "How exactly images must be inverted",
        [report.Section("Result", [picture, setup]), report.Section("All settings", [table])],
        lead=_outcome(results),
    )
