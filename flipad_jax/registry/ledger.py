"""A registry on disk: who has which key, and whose model is where. Nothing is pickled.

    REGISTRY/
      registry.json             format, root, users in the order of their keys, hashes of all files
      root.safetensors          G_0, as `zoo.save_file` writes it
      keys-HASH.safetensors     all keys
      models/NAME.safetensors   a user's copy of the generator

`registry.json` decides. Every other file is complete before it is named there and never changed
afterwards (another set of keys is another file), so that a process that dies at any moment leaves
the registry as it was before, or as it is after. A user gets a key first and a model later
(training takes minutes): until then the ledger names none. Keys and models that were handed out are
never changed.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flipad_jax import files
from flipad_jax.generators import zoo
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.registry import attributability, user_keys

__all__ = [
    "FORMAT",
    "Registry",
    "User",
    "add_users",
    "check_names",
    "create",
    "load",
    "load_model",
    "set_model",
    "user_index",
]

FORMAT = 1
_LEDGER, _ROOT, _MODELS = "registry.json", "root.safetensors", "models"
_RESERVED = ("nobody", "several", "real", "root")  # what else an image can be found to be
_PARALLEL = 0.999  # cosine of two keys that no image tells apart
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclasses.dataclass(frozen=True)
class User:
    """Someone who holds a key.

    Attributes:
      name: unique; letters, digits, `_`, `-`, `.`; also names the model's file.
      gamma: length of the shift; None until there is a model.
      distinguishability: D that Algorithm 1 measured.
      reached: whether that was as much as it wanted.
      sha256: of the model's file; None until there is one.
    """

    name: str
    gamma: float | None = None
    distinguishability: float | None = None
    reached: bool | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Registry:
    """What a folder holds; the functions of this module return a new one.

    Attributes:
      path: the folder.
      root: G_0.
      keys: `[N, h, w, c]` float32, key i is that of user i.
      users: N of them.
      facts: what `create` was told: data, settings.
    """

    path: Path
    root: TrainedGenerator
    keys: np.ndarray
    users: tuple[User, ...]
    facts: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the users, in the order of their keys."""
        return tuple(user.name for user in self.users)


def create(
    path: str | os.PathLike,
    root: TrainedGenerator,
    entry: dict[str, Any],
    facts: dict[str, Any] | None = None,
) -> Registry:
    """A registry without users.

    The root is stored as float16, as generators of the zoo are, and is what was stored: models must
    be made from the returned registry's root.

    Args:
      path: folder; made if it is not there.
      root: G_0.
      entry: what made it: family, widths, ..., as `zoo.save_file` takes it.
      facts: anything JSON-able to remember: data set, seeds.
    Raises:
      FileExistsError: if there is a registry already.
      ValueError: what `zoo.save_file` refuses.
    """
    folder = Path(path)
    if (folder / _LEDGER).exists():
        raise FileExistsError(
            f"{folder} holds a registry already; load it, or choose another place"
        )
    folder.mkdir(parents=True, exist_ok=True)
    digest = zoo.save_file(folder / _ROOT, root, _described(entry))
    stored = zoo.load_file(folder / _ROOT)
    ledger = {
        "format": FORMAT,
        "root": {"file": _ROOT, "sha256": digest},
        "keys": None,
        "users": [],
        "facts": facts or {},
    }
    _write(folder, ledger)
    return Registry(folder, stored, np.zeros((0, *stored.image_shape), np.float32), (), facts or {})


def load(path: str | os.PathLike) -> Registry:
    """Read a registry; models are read one at a time by `load_model`.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if a file is damaged, missing, or of a newer format; the message says which.
    """
    folder = Path(path)
    ledger = _read(folder)
    try:
        _checked(folder / ledger["root"]["file"], ledger["root"]["sha256"])
        root = zoo.load_file(folder / ledger["root"]["file"])
        users = tuple(User(**entry) for entry in ledger["users"])
        keys = np.zeros((0, *root.image_shape), np.float32)
        if ledger["keys"] is not None:
            _checked(folder / ledger["keys"]["file"], ledger["keys"]["sha256"])
            keys = user_keys.load(folder / ledger["keys"]["file"])[0]
        facts = ledger["facts"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / _LEDGER} is not that of a registry: {error}") from error
    try:
        check_names((), [user.name for user in users])  # they name files
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / _LEDGER} is not that of a registry: {error}") from error
    if len(keys) != len(users) or keys.shape[1:] != root.image_shape:
        raise ValueError(
            f"{folder}: keys {keys.shape} for {len(users)} users and images {root.image_shape}; "
            "restore the folder from a copy"
        )
    return Registry(folder, root, keys, users, facts)


def add_users(registry: Registry, names: Sequence[str], keys: np.ndarray) -> Registry:
    """Hand out keys; keys of earlier users are not touched.

    Args:
      registry: as it is.
      names: of the new users.
      keys: theirs, `[n, h, w, c]`, unit vectors.
    Raises:
      ValueError: for a name that is taken, doubled or cannot name a file, bad keys, a key that is
        (nearly) another one, or a registry that has changed on disk.
    """
    if len(names) != len(keys) or keys.shape[1:] != registry.root.image_shape:
        raise ValueError(
            f"{len(names)} users and keys {keys.shape}: expected one each, of the size of the "
            f"root's images, {registry.root.image_shape}"
        )
    check_names(registry.names, names)
    everybody = np.concatenate([registry.keys, np.asarray(keys, np.float32)])
    flat = attributability.check_keys(everybody).astype(np.float64)
    cosines = np.tril(flat @ flat.T, -1)
    if cosines.max(initial=0) > _PARALLEL:
        later, earlier = (int(i) for i in np.argwhere(cosines > _PARALLEL)[0])
        raise ValueError(f"keys {earlier} and {later} are the same: no image could tell them apart")
    users = (*registry.users, *(User(name) for name in names))
    ledger = _read_same(registry)
    # Named by their content: the file that the ledger names is never written to.
    digest = hashlib.sha256(everybody.tobytes()).hexdigest()
    file = f"keys-{digest[:16]}.safetensors"
    user_keys.save(registry.path / file, everybody, {"users": [user.name for user in users]})
    ledger["keys"] = {"file": file, "sha256": _digest(registry.path / file)}
    ledger["users"] = [dataclasses.asdict(user) for user in users]
    _write(registry.path, ledger)
    for other in registry.path.glob("keys-*.safetensors"):  # also those of a process that died
        if other.name != file:
            other.unlink(missing_ok=True)
    return dataclasses.replace(registry, keys=everybody, users=users)


def set_model(
    registry: Registry,
    name: str,
    generator: TrainedGenerator,
    entry: dict[str, Any],
    *,
    gamma: float,
    distinguishability: float,
    reached: bool,
) -> Registry:
    """Keep a user's model; like a key it is handed out once.

    Args:
      registry: as it is.
      name: of the user.
      generator: the model.
      entry: family and widths, as for `create`.
      gamma, distinguishability, reached: from Algorithm 1.
    Raises:
      ValueError: for an unknown user, one who has a model, numbers that are not finite, a registry
        that has changed on disk, or what `zoo.save_file` refuses.
    """
    gamma, distinguishability = float(gamma), float(distinguishability)
    if not (math.isfinite(gamma) and math.isfinite(distinguishability)):
        raise ValueError(f"{name}: gamma {gamma} and D {distinguishability}, expected finite ones")
    index = user_index(registry, name)
    if registry.users[index].sha256 is not None:
        raise ValueError(f"{name} has a model already; models are handed out once")
    ledger = _read_same(registry)
    path = registry.path / _MODELS / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    # What a user holds says nothing of the key: neither gamma nor the user's name.
    digest = zoo.save_file(path, generator, _described(entry))
    user = User(name, gamma, distinguishability, bool(reached), digest)
    users = (*registry.users[:index], user, *registry.users[index + 1 :])
    ledger["users"] = [dataclasses.asdict(user) for user in users]
    _write(registry.path, ledger)
    return dataclasses.replace(registry, users=users)


def load_model(registry: Registry, name: str) -> TrainedGenerator:
    """A user's model.

    Raises:
      ValueError: for an unknown user, one without a model, or a damaged file.
    """
    user = registry.users[user_index(registry, name)]
    if user.sha256 is None:
        raise ValueError(f"{name} has a key but no model yet: finish the registry first")
    path = registry.path / _MODELS / f"{name}.safetensors"
    _checked(path, user.sha256)
    return zoo.load_file(path)


def user_index(registry: Registry, name: str) -> int:
    """Number of a user's key.

    Raises:
      ValueError: for an unknown user; the message lists who is known.
    """
    if name not in registry.names:
        known = ", ".join(registry.names[:20]) or "nobody"
        more = f" and {len(registry.names) - 20} more" if len(registry.names) > 20 else ""
        raise ValueError(f"no user {name!r} in {registry.path}; there are {known}{more}")
    return registry.names.index(name)


def check_names(known: Sequence[str], names: Sequence[str]) -> None:
    """Refuse what `add_users` would refuse, before keys are computed.

    Args:
      known: users that there are.
      names: those that shall be added.
    Raises:
      ValueError: for a name that is taken, doubled, means something else or cannot name a file.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"user {name!r}: a name has up to 64 letters, digits, '_', '-' and '.', and begins "
                "with a letter or digit"
            )
        if name.casefold() in _RESERVED:
            raise ValueError(f"nobody can be called {name!r}: it stands for something else in rows")
        if name in known:
            raise ValueError(f"user {name!r} has a key already; keys are handed out once")
    # Two names that differ in case only share a file on some systems.
    folded = [name.casefold() for name in (*known, *names)]
    doubled = sorted({name for name in names if folded.count(name.casefold()) > 1})
    if doubled:
        raise ValueError(f"users {', '.join(doubled)}: names must differ in more than their case")


def _described(entry: dict[str, Any]) -> dict[str, Any]:
    """What makes the generator, without what belongs to the file that it came from."""
    return {name: value for name, value in entry.items() if name not in ("sha256", "command")}


def _read_same(registry: Registry) -> dict[str, Any]:
    """The ledger on disk, if it is still the one that the object was read from.

    Raises:
      ValueError: if somebody else has changed it since.
    """
    ledger = _read(registry.path)
    if ledger["users"] != [dataclasses.asdict(user) for user in registry.users]:
        raise ValueError(f"{registry.path} has changed on disk since it was read: load it again")
    return ledger


def _read(folder: Path) -> dict[str, Any]:
    try:
        ledger = json.loads((folder / _LEDGER).read_bytes())
        claimed = ledger.pop("sha256")
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no registry: {_LEDGER} is not there") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder / _LEDGER} is damaged ({error}); restore the folder from a copy"
        ) from error
    if claimed != _ledger_digest(ledger):
        raise ValueError(
            f"{folder / _LEDGER} is damaged: its hash differs; restore the folder from a copy"
        )
    if not isinstance(ledger.get("format"), int) or ledger["format"] > FORMAT:
        raise ValueError(
            f"{folder} is of format {ledger.get('format')}, this version knows up to {FORMAT}: "
            "update flipad_jax"
        )
    return ledger


def _write(folder: Path, ledger: dict[str, Any]) -> None:
    text = json.dumps({**ledger, "sha256": _ledger_digest(ledger)}, indent=1) + "\n"
    files.write_atomically(folder / _LEDGER, text.encode())


def _ledger_digest(ledger: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(ledger, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(path: Path, digest: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore the folder from a copy")
    if _digest(path) != digest:
        raise ValueError(f"{path} is damaged: its hash differs; restore the folder from a copy")
