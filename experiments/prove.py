"""Proof of origin: find the latent that makes each image of a folder again, to the last grey level.

Rows (path, verdict, rmse, largest, p_value, foreign_probability, processing, latent_sha256, reason)
go to --output, CSV or JSON Lines. verdict is proved, ours, not_ours or cannot_judge: docs/proof.md
says what each means, and what it rests on. Latents lie in WORKDIR/proofs.safetensors, regenerated
images in WORKDIR/regenerated.

With --processing the search also looks for what may have happened to an image: noise, jpeg, blur,
crop, brightness. With --attributor, images that it calls not ours without a doubt are not searched.

    python run.py --experiment=prove --generator=digits_dcgan_0 --images=suspects
    python run.py --experiment=prove --generator=my_package.model:load --foreign=real_images \\
        --images=suspects --processing=none,jpeg
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from experiments import _regeneration, _suspects
from experiments._config import Run, check_once, setting
from experiments._record import UsageError, read_flags
from flipad_jax import conventions, data, files, idx_images, metrics, report
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import bundle, proof, regeneration

COLUMNS = (
    "path",
    "verdict",
    "rmse",
    "largest",
    "p_value",
    "foreign_probability",
    "processing",
    "latent_sha256",
    "reason",
)
_BLOCK = 32  # images that are searched for and kept together: what a stop can cost
_NAMED = 5  # files that an error names, at most
# Best first: what counts if several searches were made for an image.
_RANK = {verdict: rank for rank, verdict in enumerate(("proved", "ours", "cannot_judge"))}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the search."""

    generator: str = setting(
        "digits_dcgan_0",
        "A generator of the zoo, a file of train_generator, PyTorch weights of a DCGAN, WGAN-GP, "
        "LSGAN or EBGAN, or MODULE:FUNCTION that returns a LatentGenerator or TrainedGenerator.",
    )
    convention: str = setting(
        "paper",
        "Of LSGAN from PyTorch weights: reference has the epsilon of its published code; nothing "
        "else heeds it.",
        choices=conventions.CONVENTIONS,
    )
    images: str = setting("", "A folder of images (with subfolders), or one image file.")
    output: str = setting("", "File of verdicts, .csv or .jsonl; WORKDIR/verdicts.csv by default.")
    processing: tuple[str, ...] = setting(
        ("none",),
        "What may have happened to the images, the likeliest first.",
        choices=_regeneration.PROCESSINGS,
    )
    foreign: str = setting(
        "",
        "Images that are certainly not ours: digits, photos, a TFDS name, or a folder; by default "
        "the test split of the data set that the generator was trained on.",
    )
    data_dir: str = setting("", "Where TFDS data sets lie; its default if empty.")
    seed: int = setting(0, "Latents and starts are drawn from it.", lower_bound=0)
    num_own: int = setting(60, "Own images that the search is tried on.", lower_bound=1)
    num_foreign: int = setting(100, "Foreign images that it is tried on.", lower_bound=1)
    num_starts: int = setting(4, "Starts per image, at most.", lower_bound=1)
    bank: int = setting(
        8192,
        "Own images with known latents to start from; 0: zero and random latents only.",
        lower_bound=0,
    )
    places: int = setting(
        0, "Searches at once, for speed; 0: one on a CPU, 16 elsewhere.", lower_bound=0
    )
    reuse: str = setting(
        "", "Workdir of an earlier run with this generator, whose calibration is taken."
    )
    attributor: str = setting("", "Folder of an attributor that looks first.")
    fnr: float = setting(
        0.02,
        "Share of own images that may be called not ours; with --attributor by each of the two.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    foreign_rate: float = setting(
        1e-3, "Share of foreign images that may be called ours.", lower_bound=0.0, upper_bound=1.0
    )
    num_shown: int = setting(200, "Images shown on the page, at most.", lower_bound=0)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"num_own": 10, "num_foreign": 14, "num_shown": 20, "num_starts": 2, "bank": 500},
    "demo": {},
}
CHANGEABLE = ("output", "fnr", "foreign_rate", "num_shown", "reuse")


def default_workdir(config: Config) -> str:
    """Beside the output, as `attribute` has it."""
    return f"{config.output}.run" if config.output else ""


class Known(NamedTuple):
    """Images whose origin is known."""

    own: np.ndarray  # [m, h, w, c]
    foreign: np.ndarray  # [k, h, w, c]
    names: list[str]  # [k] where to find the foreign ones
    source: str  # folder or data set that they are of
    is_folder: bool  # whether single files can be taken out of it


class Calibration(NamedTuple):
    """What a search makes of images whose origin is known."""

    own: np.ndarray  # [m] errors
    own_proved: np.ndarray  # [m] bool
    foreign: np.ndarray  # [k] errors, the smaller one of those untouched and processed
    excess: tuple[np.ndarray, np.ndarray] | None  # [m] and [k] under noise, of own and foreign ones
    equations: np.ndarray  # [k] of foreign images
    tail: proof.ForeignTail


class Row(NamedTuple):
    """A row of the output."""

    path: str
    verdict: str
    rmse: float | None
    largest: float | None
    p_value: float | None
    foreign_probability: float | None
    processing: str
    latent_sha256: str
    reason: str


class Suspect(NamedTuple):
    """An image that was searched for: its row, and all that repeats what was found."""

    row: Row
    image: np.ndarray
    made: np.ndarray  # what the latent makes
    processed: np.ndarray  # the same after the processing that was found
    latent: np.ndarray
    unknowns: np.ndarray
    replayed: str


def run(config: Config, record: Run) -> dict[str, Any]:
    """Calibrate the searches, make them, judge; returns counts and what verdicts rest on."""
    if not config.images:
        raise UsageError("--images is missing; see --experiment=prove --help")
    check_once(config, "processing")
    if config.reuse and (read_flags(config.reuse) or {}).get("experiment") != "prove":
        raise UsageError(f"--reuse={config.reuse} is no workdir of --experiment=prove")
    found = _suspects.find(config.images, record)
    output = Path(config.output) if config.output else record.workdir / "verdicts.csv"
    _suspects.check_output(output, COLUMNS, record)
    judging = proof.ProofConfig(
        fnr=config.fnr, foreign_rate=config.foreign_rate / len(config.processing)
    )
    if config.fnr * (config.num_own + 1) < 1:
        record.warn(
            f"{config.num_own} own images certify no fnr below {1 / (config.num_own + 1):.3g}: no "
            "image can be called not ours; give a larger --num_own"
        )
    generator, origin = _regeneration.load_generator(config.generator, config.convention)
    shape = regeneration.check_generator(generator)
    bank = _regeneration.make_bank(config, generator)
    num_unknowns = generator.latent_dim + max(
        _regeneration.num_unknowns(kind) for kind in config.processing
    )
    known = _known_images(config, record, generator, origin, shape, num_unknowns)
    calibrations: dict[str, Calibration] = {}
    decoded, rejected = _decoded(config, record, generator, shape, found)
    suspects = []
    if decoded:
        digest = _digest(config, generator, known.own, known.foreign)
        calibrations = _calibrate(config, record, generator, bank, known, digest, judging)
        suspects = _search_all(
            config, record, generator, bank, decoded, calibrations, judging, digest
        )
    places = {path: place for place, path in enumerate(found.paths)}
    rows = sorted(
        [s.row for s in suspects] + rejected,
        key=lambda row: (places.get(row.path, len(places)), row.path),
    )
    _suspects.write_rows(output, COLUMNS, [row._asdict() for row in rows])
    _write_proofs(record.workdir, suspects, generator)
    metrics_found = _metrics(config, rows, calibrations, judging, generator)
    metrics_found["output"] = str(output)
    _write_page(config, record, suspects, rows, calibrations, metrics_found)
    record.say(f"Verdicts: {output}")
    record.say(f"Report: {Path(record.shown) / 'report.html'}")
    return metrics_found


def _known_images(config, record, generator, origin, shape, num_unknowns: int) -> Known:
    """Own images of fresh latents, and foreign ones that say enough about so many unknowns."""
    own = regeneration.make_bank(generator, _regeneration.rng(config, 1), config.num_own).images
    if own.min() >= 127:
        record.warn(
            "no own image is anywhere darker than grey: the generator seems to make images in "
            "[0, 1], expected are images in [-1, 1]"
        )
    name = config.foreign or origin.get("dataset", "")
    if not name:
        raise UsageError(
            "--foreign is missing: a folder or data set of images that are certainly not ours"
        )
    is_folder = os.path.isdir(name) and not idx_images.is_folder(name)
    if is_folder:  # all of it, not its test split
        images: Iterable[tuple[str, np.ndarray]] = _usable_images(name, shape, config.seed)
    else:
        loaded = data.load(
            name,
            split="test",
            image_size=shape[0],
            num_images=2 * config.num_foreign,  # some may say too little
            exact=False,
            seed=int(origin.get("data_seed", 0)),
            data_dir=config.data_dir or None,
        )
        if loaded.shape[1:] != shape:
            raise UsageError(
                f"--foreign={name} has images {loaded.shape[1:]}, the generator makes {shape}"
            )
        images = ((f"number {i} of the test split", image) for i, image in enumerate(loaded))
    chosen, names, left_out = [], [], 0
    for where, image in images:
        equations = np.count_nonzero((image > 0) & (image < 255))
        if proof.is_determined(np.asarray(equations), num_unknowns):
            chosen.append(image)
            names.append(where)
        else:
            left_out += 1
        if len(chosen) == config.num_foreign:
            break
    if left_out:
        record.warn(
            f"{left_out} images of --foreign={name} are passed over: too few pixels between black "
            f"and white for {num_unknowns} unknowns"
        )
    if not chosen:
        raise UsageError(f"--foreign={name} has no usable image {shape}")
    foreign = np.stack(chosen)
    if len(foreign) < config.num_foreign:
        record.warn(f"--foreign={name} has {len(foreign)} images, {config.num_foreign} were wanted")
    return Known(own, foreign, names, name, is_folder)


def _usable_images(folder: str, shape, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Paths and images of a folder in an order that the seed fixes, no more of them read than are
    taken."""
    found = data.find_images(folder)
    for place in data.permutation(len(found.paths), seed):
        path = found.paths[place]
        image, _ = data.decode_image(os.path.join(found.root, path), shape)
        if image is not None:
            yield path, image


def _digest(
    config: Config, generator: _regeneration.Generator, own: np.ndarray, foreign: np.ndarray
) -> str:
    """Of all that a search rests on, but for its name; own images change with `apply`."""
    settings = (config.seed, config.num_starts, config.bank)
    digest = hashlib.sha256(f"{_regeneration.weights_sha256(generator)} {settings}".encode())
    digest.update(own.tobytes())
    digest.update(foreign.tobytes())
    return digest.hexdigest()[:12]


def _calibrate(config, record, generator, bank, known, digest, judging) -> dict[str, Calibration]:
    """Own and foreign images under every search."""
    stages = Path(config.reuse).expanduser() / "stages"
    if config.reuse and not any(stages.glob(f"own-*-{digest}.npz")):
        record.warn(
            f"--reuse={config.reuse} was calibrated for another generator, other foreign images or "
            "other settings of the search: calibrating anew"
        )
    found = {}
    for kind in config.processing:
        results, excess = _search_known(config, record, generator, bank, known, digest, kind)
        size = generator.latent_dim + _regeneration.num_unknowns(kind)
        # As of suspects, what became too plain to say anything counts as nothing.
        says = {
            which: proof.is_determined(result["equations"], size)
            for which, result in results.items()
        }
        foreign = [
            (np.where(says[which], result["rmse"], np.nan), says[which] & result["proved"])
            for which, result in results.items()
            if which != "own"
        ]
        said = np.any([says[which] for which in says if which != "own"], axis=0)
        if not said.any() or not says["own"].any():
            raise UsageError(
                f"no {'foreign' if says['own'].any() else 'own'} image has enough pixels between "
                f"black and white for {size} unknowns (search {kind})"
            )
        errors = np.nanmin([error[said] for error, _ in foreign], axis=0).astype(float)
        _refuse_hits(known, np.any([proved for _, proved in foreign], axis=0), len(errors), kind)
        if not np.isfinite(errors).all():
            raise UsageError(f"foreign images with errors that are not finite (search {kind})")
        tail = proof.foreign_tail(errors, confidence=judging.confidence)
        if np.isnan(tail.edge):
            record.warn(
                f"{len(errors)} foreign images are too few to bound how near others come (search "
                f"{kind}): nothing is called ours; give 80 at least (--foreign, --num_foreign)"
            )
        found[kind] = Calibration(
            results["own"]["rmse"][says["own"]].astype(float),
            results["own"]["proved"][says["own"]],
            errors,
            _nearest_excess(excess, says, said) if excess else None,
            results["foreign"]["equations"][said],
            tail,
        )
    return found


def _search_known(config, record, generator, bank, known: Known, digest: str, kind: str):
    """Own and foreign images under one search: results by set, and under noise the excess."""
    # Its own random stream, whatever other searches there are.
    number = _regeneration.PROCESSINGS.index(kind)
    results: dict[str, dict[str, np.ndarray]] = {}
    excess: dict[str, np.ndarray] = {}
    sets = [("own", known.own, kind), ("foreign", known.foreign, kind)]
    if kind != "none":  # a foreign image need not have been processed at all
        sets.append(("foreign-untouched", known.foreign, "none"))
    for place, (which, images, how) in enumerate(sets):
        treated = _regeneration.processed(how, images, _regeneration.rng(config, 2, number, place))
        text = f"{len(images)} {which} images" + (f", {kind}" if kind != "none" else "")
        name = f"{which}-{kind}-{digest}"
        compute = functools.partial(
            _regeneration.search_in_blocks,
            config,
            record,
            generator,
            bank,
            treated,
            kind,
            _regeneration.rng(config, 3, number, place),
            text,
            name,
            _BLOCK,
        )
        results[which] = record.stage(name, compute, text=text, reuse=config.reuse)
        if kind == "noise":
            excess[which] = proof.noise_excess(results[which]["image"], treated)
    return results, excess


def _refuse_hits(known: Known, hits: np.ndarray, num_judged: int, kind: str) -> None:
    """Nothing can be proved if foreign images are regenerated as well."""
    names = [name for name, hit in zip(known.names, hits, strict=True) if hit]
    if not names:
        return
    shown = ", ".join(names[:_NAMED])
    if len(names) > _NAMED:
        shown += f" and {len(names) - _NAMED} more"
    if known.is_folder:
        remedy = f"take what it made out of --foreign={known.source}"
    else:
        shown += " (counted from 0)"
        remedy = f"give a folder without what it made as --foreign, not {known.source}"
    raise UsageError(
        f"{len(names)} of {num_judged} foreign images are regenerated (search {kind}): {shown}. "
        f"If they are images of this generator, {remedy}; if they are certainly not, it makes "
        "almost any image and nothing can be proved: give another --generator"
    )


def _nearest_excess(excess, says, said) -> tuple[np.ndarray, np.ndarray]:
    """Of own images, and of foreign ones the smaller one of those untouched and processed."""
    foreign = [
        np.where(says[which], values, np.nan)[said]
        for which, values in excess.items()
        if which != "own"
    ]
    return excess["own"][says["own"]], np.nanmin(foreign, axis=0)


def _decoded(config, record, generator, shape, found):
    """Images that are to be searched for, and rows of all other files."""
    rejected = [_row(path, reason) for path, reason in found.rejected]
    decoded: list[tuple[str, str, np.ndarray]] = []
    for path in found.paths:
        full = os.path.join(found.root, path)
        image, reason = None, "not a regular file"
        if os.path.isfile(full):  # a pipe would block
            image, reason = data.decode_image(full, shape)
        if image is None:
            rejected.append(_row(path, str(reason)))
            continue
        decoded.append((path, hashlib.sha256(image.tobytes()).hexdigest(), image))
    if config.attributor and decoded:
        decoded, refused = _looked_at_first(config, record, generator, shape, decoded)
        rejected += refused
    return decoded, rejected


def _search_all(config, record, generator, bank, decoded, calibrations, judging, digest):
    """Every image under every search until it is proved. Copies of an image are searched once."""
    by_pixels = {sha: image for _, sha, image in decoded}
    # By the first digits, as many as make blocks of some `_BLOCK`: a new file changes its own block
    # and no other, unless their number passes a power of 16.
    digits = 0
    while len(by_pixels) > _BLOCK * 16**digits:
        digits += 1
    best: dict[str, Suspect] = {}
    for _, members in itertools.groupby(sorted(by_pixels), key=lambda sha: sha[:digits]):
        block = list(members)
        best.update(
            _search_block(
                config, record, generator, bank, block, by_pixels, calibrations, judging, digest
            )
        )
    return [best[sha]._replace(row=best[sha].row._replace(path=path)) for path, sha, _ in decoded]


def _search_block(
    config, record, generator, bank, block, by_pixels, calibrations, judging, digest
) -> dict[str, "Suspect"]:
    name = hashlib.sha256("".join(block).encode()).hexdigest()[:12]
    best: dict[str, tuple[tuple[int, float], Suspect]] = {}
    for kind in config.processing:
        todo = [sha for sha in block if sha not in best or best[sha][1].row.verdict != "proved"]
        if not todo:
            break
        images = np.stack([by_pixels[sha] for sha in todo])
        text = f"{len(todo)} suspects" + (f", {kind}" if kind != "none" else "")

        def compute(images=images, kind=kind, text=text, todo=todo):
            search_rng = _regeneration.rng(config, 4, _regeneration.PROCESSINGS.index(kind))
            # What is found of an image does not depend on what lies beside it.
            names = [int(sha[:8], 16) for sha in todo]
            return _regeneration.search(
                config, record, generator, bank, images, kind, search_rng, text, names
            )

        stage = f"search-{kind}-{name}-{digest}"
        result = record.stage(stage, compute, text=text, reuse=config.reuse)
        for place, sha in enumerate(todo):
            suspect = _judged(
                config, generator, calibrations[kind], judging, kind, result, place, by_pixels[sha]
            )
            error = suspect.row.rmse
            rank = (
                _RANK.get(suspect.row.verdict, len(_RANK)),
                np.inf if error is None else error,
            )
            if sha not in best or rank < best[sha][0]:
                best[sha] = (rank, suspect)
    return {sha: suspect for sha, (_, suspect) in best.items()}


def _judged(
    config, generator, known: Calibration, judging, kind: str, result, place: int, image
) -> Suspect:
    """One image under one search; its path is filled in later."""
    part = slice(place, place + 1)
    unknowns = result["unknowns"][place]
    size = generator.latent_dim + len(unknowns)
    determined = proof.is_determined(result["equations"][part], size)
    std = excess = None
    if known.excess is not None:
        std = proof.noise_std(result["image"][part], image[None])
        excess = (proof.noise_excess(result["image"][part], image[None], std), *known.excess)
    judged = proof.judge(
        result["rmse"][part],
        result["proved"][part],
        known.own,
        known.tail,
        judging,
        determined=determined,
        excess=excess,
    )
    verdict = str(judged.verdict[0])
    latent = np.ascontiguousarray(result["latent"][place], np.float32)
    replayed = str(result["replayed"][place])
    words = [replayed] if replayed else []
    if std is not None and verdict != "proved" and np.isfinite(result["rmse"][place]):
        words.append(f"noise of some {std[0]:.1f} levels")
    if not determined[0]:
        words.append(
            f"{result['equations'][place]} pixels between black and white are too few for {size} "
            "unknowns"
        )
    elif not np.isfinite(result["rmse"][place]):
        words.append("no start made an image")
    elif verdict == "cannot_judge":
        words.append(_why_undecided(judged.p_value[0], known, judging))
    elif verdict == "proved" and kind == "none":
        p_value = proof.rounding_p_value(result["misfit"][place], result["equations"][place])
        words.append(f"that what is left is only rounding has p = {float(p_value):.2g}")
    # Several searches are several chances of a coincidence.
    chance = judged.foreign_probability[0] * len(config.processing)
    row = Row(
        "",
        verdict,
        _number(result["rmse"][place]),
        _number(result["largest"][place]),
        _number(judged.p_value[0]),
        _number(np.minimum(chance, 1.0)),
        kind,
        hashlib.sha256(latent.tobytes()).hexdigest(),
        "; ".join(words),
    )
    made, after = result["image"][place], result["processed"][place]
    return Suspect(row, image, made, after, latent, unknowns, replayed)


def _why_undecided(p_value: float, known: Calibration, judging) -> str:
    if p_value > judging.fnr and 1 / (len(known.own) + 1) > judging.fnr:
        return f"{len(known.own)} own images are too few to call anything not ours"
    if p_value > judging.fnr:
        near = "too near to foreign images to be called ours"
        if np.isnan(known.tail.edge):
            near = "too few foreign images to call anything ours"
        return f"no further away than own images, and {near}"
    return "further away than own images, and not as far as foreign ones"


def _looked_at_first(config, record, generator, shape, decoded):
    """Two stages: what the attributor calls not ours without a doubt is not searched."""
    attributor = bundle.load(config.attributor)
    if attributor.image_shape != shape:
        raise UsageError(
            f"--attributor={config.attributor} is for images {attributor.image_shape}, the "
            f"generator makes {shape}"
        )
    if attributor.validity is None and config.processing != ("none",):
        raise UsageError(
            f"--attributor={config.attributor} cannot tell processed images, which it would call "
            "not ours: leave it out, or --processing"
        )

    def refused_by(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = attribution.score_with_info(attributor, images)
        judged = attribution.decide(attributor, scores, config.fnr)
        return (judged.verdict == "not_ours") & (
            attribution.doubts(attributor, images) == ""
        ), judged.p_value

    own = regeneration.make_bank(
        generator, _regeneration.rng(config, 6), max(100, config.num_own)
    ).images
    for number, kind in enumerate(config.processing):
        treated = _regeneration.processed(kind, own, _regeneration.rng(config, 6, 1 + number))
        count = int(refused_by(treated)[0].sum())
        share, how = count / len(own), _regeneration.CALIBRATED_AT[kind]
        if share > max(0.1, 5 * config.fnr):
            raise UsageError(
                f"--attributor={config.attributor} calls {share:.0%} of the generator's own images "
                f"({how}) not ours: "
                + (
                    "it is another model's"
                    if kind == "none"
                    else "leave it out, or this --processing"
                )
            )
        if metrics.clopper_pearson(count, len(own))[0] > config.fnr:
            record.warn(
                f"--attributor={config.attributor} calls {share:.0%} of own images ({how}) not "
                f"ours, more than --fnr={config.fnr:g}: they are not searched for"
            )
    left, refused = [], []
    size = attributor.config.batch_size
    with record.progress(len(decoded), f"attributing {len(decoded)} images") as bar:
        for start in range(0, len(decoded), size):
            part = decoded[start : start + size]
            wrong, p_values = refused_by(np.stack([image for _, _, image in part]))
            for i, entry in enumerate(part):
                if wrong[i]:
                    why = f"by the attributor (p = {p_values[i]:.2g}); not searched"
                    refused.append(_row(entry[0], why, "not_ours"))
                else:
                    left.append(entry)
            bar.update(len(part))
    return left, refused


def _row(path: str, reason: str, verdict: str = "cannot_judge") -> Row:
    return Row(path, verdict, None, None, None, None, "", "", reason)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _write_proofs(
    workdir: Path, suspects: list[Suspect], generator: _regeneration.Generator
) -> None:
    """Latents and unknowns of what is proved or ours, and their images before and after
    processing."""
    from safetensors.numpy import save

    kept = [s for s in suspects if s.row.verdict in ("proved", "ours")]
    latents = [s.latent for s in kept] or [np.zeros((0, generator.latent_dim), np.float32)]
    arrays = {"latents": np.stack(latents) if kept else latents[0]}
    listed = [
        {
            "path": s.row.path.encode("utf-8", "backslashreplace").decode(),
            "verdict": s.row.verdict,
            "pixels_sha256": hashlib.sha256(s.image.tobytes()).hexdigest(),
            "latent_sha256": s.row.latent_sha256,
            "processing": s.row.processing,
            "unknowns": [float(u) for u in s.unknowns],
            "replayed": s.replayed,
            "file": f"{number:05d}.png",
        }
        for number, s in enumerate(kept)
    ]
    metadata = {
        "weights_sha256": _regeneration.weights_sha256(generator),
        "images": json.dumps(listed),
    }
    for folder in ("regenerated", "processed"):  # what an earlier start left there
        shutil.rmtree(workdir / folder, ignore_errors=True)
    files.write_atomically(workdir / "proofs.safetensors", save(arrays, metadata=metadata))
    if kept:
        data.write_images(workdir / "regenerated", np.stack([s.made for s in kept]))
        if any(s.row.processing != "none" for s in kept):
            data.write_images(workdir / "processed", np.stack([s.processed for s in kept]))


def _rests_on(calibrations, judging, latent_dim: int) -> list[dict[str, Any]]:
    """Per search, what its verdicts rest on."""
    found = []
    for kind, known in calibrations.items():
        tail = known.tail
        proved = int(known.own_proved.sum())
        found.append(
            {
                "processing": kind,
                "calibrated_at": _regeneration.CALIBRATED_AT[kind],
                "num_own": len(known.own),
                "share_proved": proved / len(known.own),
                "share_proved_interval": list(metrics.clopper_pearson(proved, len(known.own))),
                "own_median": float(np.median(known.own)),
                "own_largest": float(known.own.max()),
                "num_foreign": len(known.foreign),
                "foreign_smallest": tail.smallest,
                "foreign_median": float(np.median(known.foreign)),
                "codimension": tail.codimension,
                "codimension_low": tail.codimension_low,
                "counted_codimension": float(
                    np.median(
                        proof.counted_codimension(
                            known.equations, latent_dim + _regeneration.num_unknowns(kind)
                        )
                    )
                ),
                "ours_up_to": proof.ours_up_to(tail, judging.foreign_rate),
                "probability_at_half_a_level": float(proof.foreign_probability(tail, 0.5)),
            }
        )
    return found


def _metrics(config, rows, calibrations, judging, generator) -> dict[str, Any]:
    counts = collections.Counter(row.verdict for row in rows)
    return {
        "generator": config.generator,
        "weights_sha256": _regeneration.weights_sha256(generator),
        "num_files": len(rows),
        **{verdict: counts[verdict] for verdict in proof.VERDICTS},
        "rests_on": _rests_on(calibrations, judging, generator.latent_dim),
    }


def table(results: dict[str, Any]) -> report.Table:
    """What verdicts rest on, a row per search."""
    rows = [
        [
            row["processing"],
            row["calibrated_at"],
            row["num_own"],
            f"{row['share_proved']:.0%} [{row['share_proved_interval'][0]:.0%}, "
            f"{row['share_proved_interval'][1]:.0%}]",
            f"{row['own_median']:.2f} / {row['own_largest']:.2f}",
            row["num_foreign"],
            f"{row['foreign_smallest']:.2f} / {row['foreign_median']:.2f}",
            _regeneration.codimension_text(row),
            f"{row['counted_codimension']:.0f}",
            f"{row['ours_up_to']:.2f}",
        ]
        for row in results["rests_on"]
    ]
    header = [
        "search",
        "calibrated at",
        "own",
        "proved",
        "own median / largest",
        "foreign",
        "foreign smallest / median",
        "codimension",
        "counted",
        "ours up to",
    ]
    return report.Table(header, rows, caption="Errors are root mean squares, in grey levels.")


def _difference(image: np.ndarray, regenerated: np.ndarray) -> np.ndarray:
    """Regenerated image, and the difference times 32 on grey, side by side in RGB."""
    difference = regenerated.astype(np.int32) - image
    shown = np.clip(128 + 32 * difference, 0, 255).astype(np.uint8)
    gap = np.full((image.shape[0], max(1, image.shape[1] // 16), 3), 255, np.uint8)
    pair = [np.broadcast_to(x, (*x.shape[:2], 3)) for x in (regenerated, shown)]
    return np.concatenate([pair[0], gap, pair[1]], axis=1)


def _write_page(config, record, suspects, rows, calibrations, results) -> None:
    order = sorted(suspects, key=lambda s: proof.VERDICTS.index(s.row.verdict))
    shown = order[: config.num_shown]
    cards = []
    for s in shown:
        words = [s.row.reason] if s.row.reason else []
        if s.row.rmse is not None:
            after = f" after {s.row.processing}" if s.row.processing != "none" else ""
            words = [
                f"{s.row.rmse:.2f} levels{after}, no pixel off by more than {s.row.largest:.0f}",
                f"latent {s.row.latent_sha256[:12]}",
                *words,
            ]
        cards.append(
            report.Card(
                s.row.path,
                s.image,
                cast(Any, s.row.verdict),
                s.row.rmse,
                s.row.p_value,
                "; ".join(words),
                _difference(s.image, s.processed),
                "regenerated, and difference times 32",
            )
        )
    names = {"proved": "proved", "ours": "ours", "not_ours": "not ours"}
    numbers = [(f"{results[key]:,}", words) for key, words in names.items()]
    numbers.append((f"{results['cannot_judge']:,}", "cannot be judged"))
    left_out = len(suspects) - len(shown)
    caption = "Score: root mean square error in grey levels." + (
        f" {left_out} more images are in the file of verdicts." if left_out else ""
    )
    searched: list[Any] = (
        [report.Gallery(cards, caption)] if cards else ["No image was searched for."]
    )
    others = [row for row in rows if row.rmse is None]
    if others:
        searched.append(
            report.Table(
                ["file", "verdict", "why"],
                [[row.path, row.verdict.replace("_", " "), row.reason] for row in others[:200]],
                caption=f"{len(others)} files that were not searched for."
                + (" The first 200." if len(others) > 200 else ""),
            )
        )
    rests: list[Any] = ["Nothing was searched for."]
    if calibrations:
        errors = {}
        for kind, known in calibrations.items():
            errors[f"own, {kind}"] = known.own
            errors[f"foreign, {kind}"] = known.foreign
        figure = report.histograms(errors, "error in grey levels")
        report.save_figure(figure, record.figures / "errors.png")
        rests = [
            table(results),
            report.Picture(figure, "Errors of own and of foreign images under every search."),
            *_tail_text(results["rests_on"][0]),
        ]
    sections = [
        report.Section(
            "Verdicts", [report.KeyNumbers(numbers), *_reading(config, results["rests_on"])]
        ),
        report.Section("Images", searched),
        report.Section("What a verdict rests on", rests),
        report.Section(
            "To repeat a proof",
            [
                "proofs.safetensors holds the latents of what is proved or ours, and in its "
                "metadata which image each is of and what was done to it. With the weights "
                f"(SHA-256: {results['weights_sha256']}) the generator makes the images again, "
                "and what was done to them is done again: "
                "flipad_jax.detection.regeneration.repeat(generator, 'proofs.safetensors', "
                "'the folder of the images') compares them with the files.",
                report.Table(
                    ["setting", "value"],
                    [
                        [field.name, str(getattr(config, field.name))]
                        for field in dataclasses.fields(config)
                    ],
                ),
            ],
        ),
    ]
    report.write_page(
        record.workdir / "report.html",
        "Can this model make these images again?",
        sections,
        lead=f"{Path(config.images).name or config.images}: {results['num_files']} files, searched "
        f"for in the latents of {config.generator}.",
    )


def _reading(config: Config, rests_on: list[dict[str, Any]]) -> list[str]:
    return [
        "Proved: a latent makes the image again, to half a grey level, and no pixel off by more "
        "than one. Ours: "
        "at most half as far as the nearest foreign image, and nearer than a share of "
        f"{config.foreign_rate:g} of them is expected to come. Not ours: as far away as foreign "
        f"images, and further than all but {100 * config.fnr:g} % of own ones; an own image that "
        "was processed otherwise, or more strongly, than the searches were calibrated for can look "
        "like that. Cannot be judged: between the two, too little between black and white, or no "
        "image of this size.",
        *(
            f"Of {row['num_own']} fresh own images ({row['calibrated_at']}) "
            f"{row['share_proved']:.0%} were regenerated."
            for row in rests_on
        ),
    ]


def _tail_text(first: dict[str, Any]) -> list[str]:
    if _regeneration.codimension_text(first) == "-":
        return ["Too few foreign images to say how near others come: nothing is called ours."]
    return [
        "How near a foreign image comes by chance: the smallest errors follow a power law, whose "
        f"exponent is the codimension, {first['codimension']:.1f} here and at least "
        f"{first['codimension_low']:.1f}. So the probability of an error below half a level is at "
        f"most {first['probability_at_half_a_level']:.1g}, if the law holds that far down, where "
        "no foreign image was seen. Counted equations minus unknowns would be a codimension of "
        f"{first['counted_codimension']:.0f}: what it would be if foreign images were spread over "
        "all directions, which they are not.",
        "Neither says anything about images that somebody made so that they come near.",
    ]


def summary(metrics: dict[str, Any]) -> str:
    """The counts, and what they rest on."""
    rests = table(metrics)
    return "\n".join(
        [
            "",
            report.table_text(rests.header, rests.rows),
            "",
            f"{metrics['num_files']} files: {metrics['proved']} proved, {metrics['ours']} ours, "
            f"{metrics['not_ours']} not ours, {metrics['cannot_judge']} cannot be judged.",
            "",
        ]
    )
