"""A registry of keyed copies: hand out models to users, and say whose copy made an image.

The workdir is the registry. The first start makes it from a root generator and authentic images;
every start hands a key and a model to users that are new in --users (all others keep theirs), tests
all copies, and attributes the files of --images, if given. A killed run goes on at the user where
it was. --ask=NAME adds, for every file, how far it is on NAME's side.

Rows of the output (path, user, margin, reason): user is a name, nobody, or several where more than
one key claims the file; reason says why a file cannot be attributed. What a user gets is
WORKDIR/models/NAME.safetensors; `zoo.load_file` reads it.

    python run.py --experiment=registry --users=ann,bob,cleo --workdir=runs/my_registry
    python run.py --experiment=registry --workdir=runs/my_registry --images=suspects
"""

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import _keyed
from experiments._config import Run, setting
from experiments._record import UsageError, replacing
from flipad_jax import data, report
from flipad_jax.generators import sampling, zoo
from flipad_jax.registry import attributability, ledger, user_generators, user_keys

COLUMNS = ("path", "user", "margin", "reason")
_NAMES = {attributability.NOBODY: "nobody", attributability.SEVERAL: "several"}
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Config(_keyed.Settings):
    """Settings of a registry."""

    users: tuple[str, ...] = setting(
        (), "Who shall have a copy; without any, a new registry gets user_1 to user_N."
    )
    num_users: int = setting(5, "N, where --users names nobody.", lower_bound=1)
    images: str = setting("", "A folder of images, or one file, to attribute.")
    output: str = setting("", "Its rows, .csv or .jsonl; WORKDIR/attributions.csv by default.")
    ask: str = setting("", "A user: adds a column with the margin of this one's key.")
    num_shown: int = setting(60, "Attributed images shown on the page.", lower_bound=0)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**_keyed.SMOKE, "num_shown": 12},
    "demo": {},
    "paper": {**_keyed.PAPER, "num_users": 100},
}
CHANGEABLE = ("users", "images", "output", "ask", "num_shown")


class Row(NamedTuple):
    """A row of the output."""

    path: str
    user: str
    margin: float | None
    reason: str
    asked: float | None = None


def run(config: Config, record: Run) -> dict[str, Any]:
    """Make or extend the registry, test it, attribute files; returns what the page shows."""
    _keyed.check(config)
    found = data.find_images(config.images) if config.images else None
    output = Path(config.output) if config.output else record.workdir / "attributions.csv"
    if output.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"--output={output}: expected a name that ends in .csv or .jsonl")
    registry, entry = _open(config, record)
    images = _keyed.load_images(config, registry.root)
    registry = _hand_out_keys(config, record, registry, images)
    if config.ask:
        ledger.user_index(registry, config.ask)  # Refuses an unknown one before models are trained.
    registry = _train_models(config, record, registry, images, entry)
    tested = _test(config, record, registry, images)
    rows: list[Row] = []
    if found is not None:
        rows = _attribute(config, record, registry, found)
        _write_rows(config, output, rows)
    metrics = {
        "registry": record.shown,
        "users": [dataclasses.asdict(user) for user in registry.users],
        **tested,
        "num_files": len(rows),
        "attributed": _counts(registry, rows),
        "output": str(output) if rows else None,
    }
    _write_page(config, record, registry, images, metrics, rows, found)
    if rows:
        record.say(f"Attributions: {output}")
    record.say(f"Report: {Path(record.shown) / 'report.html'}")
    return metrics


def _open(config: Config, record: Run) -> tuple[ledger.Registry, dict[str, Any]]:
    """The registry of the workdir, made if there is none; and what its root is."""
    if (record.workdir / "registry.json").exists():
        registry = ledger.load(record.workdir)
    else:
        root = _keyed.load_root(config)
        known = zoo.names()
        described = zoo.record if config.root in known else zoo.record_file
        facts = {key: getattr(config, key) for key in ("root", "dataset", "data_seed", "seed")}
        registry = ledger.create(record.workdir, root, described(config.root), facts)
    return registry, zoo.record_file(registry.path / "root.safetensors")


def _hand_out_keys(config, record: Run, registry, images) -> ledger.Registry:
    names = config.users
    if not names and not registry.users:
        names = tuple(f"user_{i + 1}" for i in range(config.num_users))
    if len(set(names)) != len(names):
        raise UsageError(f"--users={','.join(names)}: give each one once")
    new = [name for name in names if name not in registry.names]
    if not new:
        return registry
    ledger.check_names(registry, new)
    first = len(registry.users)
    rng = _keyed.rng(config, 1, first)
    make = user_keys.joint if config.key_method == "joint" else user_keys.sequential
    with record.progress(1, f"keys for {len(new)} new users") as bar:
        keys = make(
            rng,
            images.train,
            images.generated,
            len(new),
            earlier=registry.keys if first else None,
            config=config.key_config(),
        )
        bar.update()
    compliance = attributability.extent(keys, [images.validation]).compliance
    poor = [f"{name} ({share:.0%})" for name, share in zip(new, compliance) if share < 0.9]
    if poor:
        raise UsageError(
            f"no keys for {', '.join(poor)}: that share of authentic images would be on the right "
            "side only; the data may be no images of the root's kind, or the registry is full "
            "(--experiment=key_capacity)"
        )
    return ledger.add_users(registry, new, keys)


def _train_models(config, record: Run, registry, images, entry) -> ledger.Registry:
    """Algorithm 1 for every user who has a key only."""
    for index, user in enumerate(registry.users):
        if user.sha256 is not None:
            continue
        with record.parts(f"model of {user.name}") as progress:
            found = user_generators.search(
                registry.root,
                registry.keys[index : index + 1],
                images.validation,
                _keyed.rng(config, 2),
                config.keyed_config(),
                first=index,
                num_images=config.num_search,
                progress=progress,
            )
        if not found.reached[0]:
            record.warn(
                f"{user.name}: D is {found.distinguishability[0]:.3f} after {found.rounds[0]} "
                f"rounds, {1 - config.delta:g} was wanted: more --max_rounds, or more --num_steps"
            )
        registry = ledger.set_model(
            registry,
            user.name,
            user_generators.take_user(registry.root, found.state, 0),
            entry,
            gamma=found.gammas[0],
            distinguishability=found.distinguishability[0],
            reached=found.reached[0],
        )
    return registry


def _test(config, record: Run, registry, images) -> dict[str, Any]:
    """Who is found to have made images of every copy: D, A(G), shares `[model, user or nobody]`."""
    num = len(registry.users)
    real = attributability.responses(registry.keys, images.test)
    tables, distances = [], []
    with record.progress(registry.names, f"testing {num} copies") as bar:
        for index, name in enumerate(bar):
            model = ledger.load_model(registry, name)
            made = sampling.generate(model, _keyed.rng(config, 3, index), config.num_test)
            tables.append(attributability.responses(registry.keys, made))
            distances.append(_distance(registry.root, model, config, index))
    shares = []
    for table in [*tables, real]:
        user = attributability.assign(table).user
        shares.append([float((user == j).mean()) for j in (*range(num), *_NAMES)])
    flat = registry.keys.reshape(num, -1).astype(np.float64)
    return {
        "distinguishability": [
            attributability.distinguishability(tables[i][:, i], real[:, i]) for i in range(num)
        ],
        "attributability": attributability.attributability(tables),
        "shift": distances,
        "compliance": attributability.extent(registry.keys, [images.test]).compliance,
        "shares": shares,
        "cosines": flat @ flat.T,
        "num_test": config.num_test,
    }


def _distance(root, model, config, index: int) -> float:
    rng = _keyed.rng(config, 3, index)
    count = min(250, config.num_test)
    pair = [data.to_float(sampling.generate(g, rng, count)) for g in (model, root)]
    return attributability.shift_length([pair[0] - pair[1]]).mean


def _attribute(config, record: Run, registry, found: data.Found) -> list[Row]:
    """A row per file, in order; one that cannot be read is a row with a reason."""
    asked = ledger.user_index(registry, config.ask) if config.ask else None
    rows: list[Row] = []
    with record.progress(len(found.paths), f"attributing {len(found.paths)} files") as bar:
        for start in range(0, len(found.paths), _BLOCK):
            paths = found.paths[start : start + _BLOCK]
            decoded = [
                data.decode_image(os.path.join(found.root, path), registry.root.image_shape)
                for path in paths
            ]
            read = [image for image, _ in decoded if image is not None]
            answers: Iterator[tuple[Any, Any, np.ndarray]] = iter(())
            if read:
                table = attributability.responses(registry.keys, np.stack(read))
                assigned = attributability.assign(table)
                answers = iter(zip(assigned.user, assigned.margin, table))
            for path, (image, reason) in zip(paths, decoded):
                if image is None:
                    rows.append(Row(path, "", None, str(reason)))
                    continue
                user, margin, responses = next(answers)
                name = _NAMES.get(int(user)) or registry.names[user]
                towards = None if asked is None else float(responses[asked])
                rows.append(Row(path, name, float(margin), "", towards))
            bar.update(len(paths))
    return rows + [Row(path, "", None, reason) for path, reason in found.rejected]


def _write_rows(config, output: Path, rows: list[Row]) -> None:
    """All rows, at once: the file is complete or not there."""
    records = []
    for row in rows:
        fields = row._asdict()
        towards = fields.pop("asked")
        if config.ask:
            fields[f"towards_{config.ask}"] = towards
        records.append(fields)
    columns = [*COLUMNS, *([f"towards_{config.ask}"] if config.ask else [])]
    with replacing(output) as file:
        write = functools.partial(_encoded, file)
        if output.suffix == ".jsonl":
            for fields in records:
                write(json.dumps(fields) + "\n")
            return
        writer = csv.DictWriter(_Text(write), columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _encoded(file, text: str) -> None:
    # File names are bytes, not always text.
    file.write(text.encode("utf-8", "surrogateescape"))


class _Text(NamedTuple):
    """What the csv module writes to."""

    write: Any


def _counts(registry, rows: list[Row]) -> dict[str, int]:
    names = [*registry.names, *_NAMES.values()]
    counts = {name: sum(row.user == name for row in rows) for name in names}
    counts["cannot be read"] = sum(row.reason != "" for row in rows)
    return {name: count for name, count in counts.items() if count}


def _users_table(metrics: dict[str, Any]) -> report.Table:
    header = ["user", "gamma", "D", "real images on its side", "E||dx||", "own images found"]
    rows = []
    for i, user in enumerate(metrics["users"]):
        rows.append(
            [
                user["name"],
                f"{user['gamma']:.2f}",
                f"{metrics['distinguishability'][i]:.3f}",
                f"{metrics['compliance'][i]:.1%}",
                f"{metrics['shift'][i]:.2f}",
                f"{metrics['shares'][i][i]:.1%}",
            ]
        )
    return report.Table(header, rows)


def _write_page(config, record, registry, images, metrics, rows, found) -> None:
    names = list(registry.names)
    shown = {"root": sampling.generate(registry.root, _keyed.rng(config, 4), 12)}
    for index, name in enumerate(names[:12]):
        made = sampling.generate(
            ledger.load_model(registry, name), _keyed.rng(config, 3, index), 11
        )
        key = report.signed_pictures(registry.keys[index : index + 1])
        shown[name] = np.concatenate([key, made])
    keys = report.image_grid(shown, num_columns=12)
    angles = report.matrix_map(
        np.asarray(metrics["cosines"]) - np.eye(len(names)), names, "cosine of two keys"
    )
    report.save_figure(keys, record.figures / "keys.png")
    report.save_figure(angles, record.figures / "angles.png")
    made_by = report.Table(
        ["images of", *names, *_NAMES.values()],
        [
            [who, *(f"{share:.1%}" if share else None for share in shares)]
            for who, shares in zip([*names, "real"], metrics["shares"])
        ],
        caption=f"Share of {metrics['num_test']} images of every copy, and of real test images, "
        "that is attributed to each user.",
    )
    sections = [report.Section("Users", [_users_table(metrics)])]
    if rows:
        counted = [[name, count] for name, count in metrics["attributed"].items()]
        blocks: list[Any] = [report.Table(["attributed to", "files"], counted)]
        blocks += _gallery(config, registry, rows, found)
        sections.append(report.Section("Whose images are these?", blocks))
    sections += [
        report.Section("Who is found to have made what", [made_by]),
        report.Section(
            "Keys and images",
            [
                report.Picture(
                    keys, "The key of every user (first picture), and images of the copy."
                ),
                report.Picture(angles, "How far keys are from right angles; white is exact."),
            ],
        ),
        report.Section(
            "How to read it",
            [
                "An image is a user's if phi^T x is above 0 for that user's key and for no other; "
                "the margin is phi^T x. Real images are below 0 for all keys. The registry keeps "
                "keys and copies; a copy alone does not tell its key.",
                _keyed.settings_text(config),
            ],
        ),
    ]
    lead = (
        f"{len(names)} copies of {config.root}: {metrics['attributability']:.1%} of their images "
        "are attributed to the right user and to nobody else."
    )
    report.write_page(record.workdir / "report.html", "Registry", sections, lead=lead)


def _gallery(config, registry, rows: list[Row], found) -> list[Any]:
    """Some attributed images by user."""
    by_user: dict[str, list[np.ndarray]] = {}
    left = config.num_shown
    for row in rows:
        if left and row.user and len(by_user.get(row.user, ())) < 12:
            path = os.path.join(found.root, row.path)
            image, _ = data.decode_image(path, registry.root.image_shape)
            if image is not None:
                by_user.setdefault(row.user, []).append(image)
                left -= 1
    if not by_user:
        return []
    grid = report.image_grid({name: np.stack(part) for name, part in by_user.items()})
    unread = [[row.path, row.reason] for row in rows if row.reason]
    blocks: list[Any] = [report.Picture(grid, "The first files of every user.")]
    if unread:
        blocks.append(report.Table(["cannot be attributed", "why"], unread[:50]))
    return blocks


def summary(metrics: dict[str, Any]) -> str:
    """Users, and who made the files, as the terminal shows them."""
    table = _users_table(metrics)
    text = report.table_text(table.header, table.rows)
    text += f"\nA(G) {metrics['attributability']:.3f}"
    if metrics["num_files"]:
        rows = [[name, count] for name, count in metrics["attributed"].items()]
        text += "\n\n" + report.table_text(["attributed to", "files"], rows)
    return text
