"""A registry of keyed copies: hand out models to users, and say whose copy made an image.

The workdir is the registry. The first start makes it from a root generator and authentic images;
every start hands a key and a model to users that are new in --users (all others keep theirs), tests
all copies, and attributes the files of --images, if given. A killed run goes on at the user where
it was. --ask=NAME adds, for every file, how far it is on NAME's side.

A registry remembers its settings. Those by which keys are found and copies trained (--key_steps,
--num_steps, --batch_size, --learning_rate, --max_rounds) may be others for users who are new.

Rows of the output (path, user, margin, reason): user is a name, nobody, or several where more than
one key claims the file; reason says why a file cannot be attributed. What a user gets is
WORKDIR/models/NAME.safetensors; `zoo.load_file` reads it.

    python run.py --experiment=registry --users=ann,bob,cleo --workdir=runs/my_registry
    python run.py --experiment=registry --workdir=runs/my_registry --images=suspects
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import _keyed, _suspects
from experiments._config import Run, setting
from experiments._record import UsageError
from flipad_jax import data, report
from flipad_jax.generators import sampling, zoo
from flipad_jax.registry import attributability, ledger, user_generators, user_keys

COLUMNS = ("path", "user", "margin", "reason")
_NAMES = {attributability.NOBODY: "nobody", attributability.SEVERAL: "several"}
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Config(_keyed.ModelSettings):
    """Settings of a registry."""

    users: tuple[str, ...] = setting(
        (), "Who shall have a copy; without any, a new registry gets user_1 to user_N."
    )
    num_users: int = setting(5, "N, where --users names nobody.", lower_bound=1)
    key_method: str = setting(
        "joint",
        "Keys of new users as one problem, or eq. 9 one after the other.",
        choices=_keyed.KEY_METHODS,
    )
    num_test: int = setting(
        1000, "Images of every copy, and real ones, that test it.", lower_bound=8
    )
    images: str = setting("", "A folder of images, or one file, to attribute.")
    output: str = setting("", "Its rows, .csv or .jsonl; WORKDIR/attributions.csv by default.")
    ask: str = setting("", "A user: adds a column with the margin of this one's key.")
    num_shown: int = setting(60, "Attributed images shown on the page.", lower_bound=0)
    hand_out_unreached: bool = setting(
        False, "Hand out a copy even if its D is below what --delta asks for."
    )


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        **_keyed.SMOKE_MODELS,
        "num_test": 60,
        "num_shown": 12,
        "hand_out_unreached": True,
    },
    "demo": {},
    "paper": {**_keyed.PAPER_MODELS, "key_method": "sequential", "num_test": 5000},
}
CHANGEABLE = (
    "users",
    "num_users",
    "images",
    "output",
    "ask",
    "num_shown",
    "num_test",
    "hand_out_unreached",
)
MOVABLE = ("key_steps", "num_steps", "batch_size", "learning_rate", "max_rounds")
PRECIOUS = "registry.json"


class Row(NamedTuple):
    """A row of the output."""

    path: str
    user: str
    margin: float | None
    reason: str
    asked: float | None = None


def run(config: Config, record: Run) -> dict[str, Any]:
    """Make or extend the registry, test it, attribute files; returns what the page shows."""
    found = _suspects.find(config.images, record) if config.images else None
    output = Path(config.output) if config.output else record.workdir / "attributions.csv"
    _suspects.check_output(output, COLUMNS, record)
    registry, images = _open(config, record)
    registry = _train_models(config, record, registry, images)
    rows: list[Row] = []
    if found is not None:
        rows = _attribute(config, record, registry, found)
        _write_rows(config, output, rows)
        record.say(f"Attributions: {output}")
    tested = _test(config, record, registry, images)
    metrics = {
        "registry": record.shown,
        "users": [dataclasses.asdict(user) for user in registry.users],
        **tested,
        "num_files": len(rows),
        "attributed": _counts(registry, rows),
        "output": str(output) if rows else None,
    }
    _write_page(config, record, registry, images, metrics, rows, found)
    record.say(f"Report: {Path(record.shown) / 'report.html'}")
    return metrics


def _open(config: Config, record: Run) -> tuple[ledger.Registry, _keyed.Images]:
    """The registry, with keys for everybody who is new; nothing is written before all is checked.

    Raises:
      ValueError, UsageError: for data, names or keys that will not do.
    """
    is_new = not (record.workdir / PRECIOUS).exists()
    registry = None if is_new else ledger.load(record.workdir)
    if registry is None:
        _keyed.check(config)
    root = _keyed.load_root(config) if registry is None else registry.root
    images = _keyed.load_images(
        config, root, num_validation=config.num_search, num_test=config.num_test
    )
    known = () if registry is None else registry.names
    names = config.users
    if not names and not known:
        if config.images:
            raise UsageError(
                f"there is no registry in {record.shown} to ask; give --users to found one there, "
                "or another --workdir"
            )
        names = tuple(f"user_{i + 1}" for i in range(config.num_users))
    if len(set(names)) != len(names):
        raise UsageError(f"--users={','.join(names)}: give each one once")
    new = [name for name in names if name not in known]
    everybody = [*known, *new]
    if config.ask and config.ask not in everybody:
        raise UsageError(f"--ask={config.ask}: there is no such user, only {', '.join(everybody)}")
    if registry is None:
        described = zoo.record if config.root in zoo.names() else zoo.record_file
        ledger.check_names((), new)
        keys = _new_keys(config, record, images, new, None)
        facts = {key: getattr(config, key) for key in ("root", "dataset", "data_seed", "seed")}
        registry = ledger.create(record.workdir, root, described(config.root), facts)
        return ledger.add_users(registry, new, keys), images
    if new:
        ledger.check_names(known, new)
        keys = _new_keys(config, record, images, new, registry.keys)
        registry = ledger.add_users(registry, new, keys)
    return registry, images


def _new_keys(config, record: Run, images, new, earlier: np.ndarray | None) -> np.ndarray:
    """Keys for new users, beside those that were handed out.

    Raises:
      UsageError: if one is not data compliant enough for D to be reached.
    """
    make = user_keys.joint if config.key_method == "joint" else user_keys.sequential
    first = 0 if earlier is None else len(earlier)
    with record.progress(1, f"keys for {len(new)} new users") as bar:
        keys = make(
            _keyed.rng(config, 1, first),
            images.train,
            images.generated,
            len(new),
            earlier=earlier,
            config=config.key_config(config.key_method),
        )
        bar.update()
    compliance = attributability.extent(keys, [images.validation]).compliance
    wanted = 1 - 2 * config.delta  # D of 1 - delta needs as much even if all own images are seen
    poor = [f"{name} ({share:.1%})" for name, share in zip(new, compliance) if share < wanted]
    if poor:
        raise UsageError(
            f"no keys for {', '.join(poor)}: too few authentic images are on the right side of "
            f"them, {wanted:.1%} are needed. More --key_steps may help; or the data are no images "
            "of the root's kind, or the registry is full (--experiment=key_capacity)"
        )
    return keys


def _train_models(config, record: Run, registry, images) -> ledger.Registry:
    """Algorithm 1 for every user who has a key only; one that misses D is not handed out."""
    entry = zoo.record_file(registry.path / "root.safetensors")
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
            what = "it is handed out all the same" if config.hand_out_unreached else "no copy yet"
            rounds = int(found.rounds[0])
            advice = " at the next start" if rounds else "; a user of another name gets another key"
            record.warn(
                f"{user.name}: D is {found.distinguishability[0]:.3f} after {rounds} rounds, "
                f"{1 - config.delta:g} was wanted: {what}; {_keyed.why_missed(rounds)}{advice}"
            )
            if not config.hand_out_unreached:
                continue
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


def _copies(registry) -> list[int]:
    """Numbers of the users who have a copy."""
    return [i for i, user in enumerate(registry.users) if user.sha256 is not None]


def _test(config, record: Run, registry, images) -> dict[str, Any]:
    """Who is found to have made images of every copy: D, A(G), shares `[copy, user or nobody]`."""
    num = len(registry.users)
    real = attributability.responses(registry.keys, images.test)
    tables: dict[int, np.ndarray] = {}
    shifts = {}
    copies = _copies(registry)
    with record.progress(len(copies), f"testing {len(copies)} copies") as bar:
        for index in copies:
            model = ledger.load_model(registry, registry.names[index])
            rng = _keyed.rng(config, 3, index)
            made = sampling.generate(model, rng, config.num_test)
            tables[index] = attributability.responses(registry.keys, made)
            before = sampling.generate(registry.root, rng, config.num_test)
            differences = (
                data.to_float(made[i : i + _BLOCK]) - data.to_float(before[i : i + _BLOCK])
                for i in range(0, len(made), _BLOCK)
            )
            shifts[index] = attributability.shift_length(differences).mean
            bar.update()
    shares = {}
    for who, table in [*tables.items(), ("real", real)]:
        user = attributability.assign(table).user
        name = who if isinstance(who, str) else registry.names[who]
        shares[name] = [float((user == j).mean()) for j in (*range(num), *_NAMES)]
    flat = registry.keys.reshape(num, -1).astype(np.float64)
    d = {i: attributability.distinguishability(t[:, i], real[:, i]) for i, t in tables.items()}
    own = [shares[registry.names[i]][i] for i in copies]
    return {
        "distinguishability": [d.get(i) for i in range(num)],
        "attributability": float(np.mean(own)) if own else None,
        "shift": [shifts.get(i) for i in range(num)],
        "compliance": attributability.extent(registry.keys, [images.test]).compliance,
        "shares": shares,
        "cosines": flat @ flat.T,
        "num_test": config.num_test,
    }


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
    _suspects.write_rows(output, columns, records)


def _counts(registry, rows: list[Row]) -> dict[str, int]:
    names = [*registry.names, *_NAMES.values()]
    counts = {name: sum(row.user == name for row in rows) for name in names}
    counts["cannot be read"] = sum(row.reason != "" for row in rows)
    return {name: count for name, count in counts.items() if count}


def _users_table(metrics: dict[str, Any]) -> report.Table:
    header = [
        "user",
        "copy",
        "gamma",
        "D",
        "real images on its side",
        "E||dx||",
        "found as its own",
    ]
    rows = []
    for i, user in enumerate(metrics["users"]):
        name, d, shift = user["name"], metrics["distinguishability"][i], metrics["shift"][i]
        has_copy = user["sha256"] is not None
        rows.append(
            [
                name,
                "none yet" if not has_copy else "yes" if user["reached"] else "D was missed",
                f"{user['gamma']:.2f}" if has_copy else None,
                None if d is None else f"{d:.3f}",
                f"{metrics['compliance'][i]:.1%}",
                None if shift is None else f"{shift:.2f}",
                f"{metrics['shares'][name][i]:.1%}" if has_copy else None,
            ]
        )
    return report.Table(header, rows)


def _write_page(config, record, registry, images, metrics, rows, found) -> None:
    names = list(registry.names)
    shown = {"root": _keyed.root_test_images(config, registry.root, 12)}
    for index in _copies(registry)[:12]:
        model = ledger.load_model(registry, names[index])
        made = sampling.generate(model, _keyed.rng(config, 3, index), 11)
        key = report.signed_pictures(registry.keys[index : index + 1])
        shown[names[index]] = np.concatenate([key, made])
    keys = report.image_grid(shown, num_columns=12)
    cosines = np.asarray(metrics["cosines"]) - np.eye(len(names))
    angles = report.matrix_map(cosines, names, "cosine of two keys", smallest=0.05)
    report.save_figure(keys, record.figures / "keys.png")
    report.save_figure(angles, record.figures / "angles.png")
    made_by = report.Table(
        ["images of", *names, *_NAMES.values()],
        [
            [who, *(f"{share:.1%}" if share else None for share in shares)]
            for who, shares in metrics["shares"].items()
        ],
        caption=f"Share of {metrics['num_test']} images of every copy, and of {len(images.test)} "
        "real test images, that is attributed to each user.",
    )
    sections = [report.Section("Users", [_users_table(metrics)])]
    if rows:
        counted = [[name, count] for name, count in metrics["attributed"].items()]
        blocks: list[Any] = [report.Table(["attributed to", "files"], counted)]
        blocks += _examples(config, registry, rows, found)
        sections.append(report.Section("Whose images are these?", blocks))
    sections += [
        report.Section("Who is found to have made what", [made_by]),
        report.Section(
            "Keys and images",
            [
                report.Picture(
                    keys, "The key of every user (first picture), and images of the copy."
                ),
                report.Picture(
                    angles,
                    f"White: right angles. Furthest from one: {np.abs(cosines).max():.1e}.",
                ),
            ],
        ),
        report.Section(
            "How to read it",
            [
                "An image is a user's if phi^T x is above 0 for that user's key and for no other; "
                "the margin is phi^T x. Real images are below 0 for all keys. Keep this folder to "
                "yourself, the root too: whoever has the root and a copy can read the key off "
                "their difference.",
                _keyed.keys_text(config, images, config.key_method),
                _keyed.models_text(config, images),
            ],
        ),
    ]
    share = metrics["attributability"]
    lead = f"{len(_copies(registry))} copies of {config.root}" + (
        f": {share:.1%} of their images are attributed to the right user and to nobody else."
        if share is not None
        else "."
    )
    report.write_page(record.workdir / "report.html", "Registry", sections, lead=lead)


def _examples(config, registry, rows: list[Row], found) -> list[Any]:
    """Some attributed images by user, and what could not be attributed."""
    by_user: dict[str, list[np.ndarray]] = {}
    left = config.num_shown
    for row in rows:
        if left and row.user and len(by_user.get(row.user, ())) < 12:
            path = os.path.join(found.root, row.path)
            image, _ = data.decode_image(path, registry.root.image_shape)
            if image is not None:
                by_user.setdefault(row.user, []).append(image)
                left -= 1
    blocks: list[Any] = []
    if by_user:
        grid = report.image_grid({name: np.stack(part) for name, part in by_user.items()})
        blocks.append(report.Picture(grid, "The first files of every user."))
    unread = [[row.path, row.reason] for row in rows if row.reason]
    if unread:
        blocks.append(report.Table(["cannot be attributed", "why"], unread[:50]))
    return blocks


def summary(metrics: dict[str, Any]) -> str:
    """Users, and who made the files, as the terminal shows them."""
    table = _users_table(metrics)
    text = report.table_text(table.header, table.rows)
    if metrics["attributability"] is not None:
        text += f"\nA(G) {metrics['attributability']:.3f}"
    if metrics["num_files"]:
        rows = [[name, count] for name, count in metrics["attributed"].items()]
        text += "\n\n" + report.table_text(["attributed to", "files"], rows)
    return text
