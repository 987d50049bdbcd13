"""The registry's folder: handed out once, never half written, damage found."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from flipad_jax.generators import sampling, zoo
from flipad_jax.registry import ledger

ROOT = "digits_dcgan_0"


def keys(num, seed=0):
    rows = np.linalg.qr(np.random.default_rng(seed).normal(size=(1024, num)))[0].T
    return rows.reshape(num, 32, 32, 1).astype(np.float32)


@pytest.fixture(name="registry")
def _registry(tmp_path):
    return ledger.create(tmp_path / "r", zoo.load(ROOT), zoo.record(ROOT), {"dataset": "digits"})


def give(registry, name, shift=0.1):
    model = registry.root
    params = jax.tree.map(lambda leaf: leaf + np.float32(shift), model.variables["params"])
    model = dataclasses.replace(model, variables={**model.variables, "params": params})
    return ledger.set_model(
        registry, name, model, zoo.record(ROOT), gamma=2.0, distinguishability=0.99, reached=True
    )


def same(a, b):
    assert a.users == b.users and a.facts == b.facts
    np.testing.assert_array_equal(a.keys, b.keys)
    first, second = (sampling.generate(r.root, jax.random.key(0), 3) for r in (a, b))
    np.testing.assert_array_equal(first, second)


def test_what_is_loaded_is_what_was_kept(registry):
    some = ledger.add_users(registry, ["ann", "bob"], keys(2))
    some = give(some, "bob")
    more = ledger.add_users(some, ["cleo"], keys(3)[2:])
    same(ledger.load(registry.path), more)
    assert more.names == ("ann", "bob", "cleo")
    # Keys and models that were handed out before are the same bytes.
    np.testing.assert_array_equal(more.keys[:2], some.keys)
    assert more.users[1].gamma == 2.0 and more.users[0].sha256 is None
    images = sampling.generate(ledger.load_model(more, "bob"), jax.random.key(0), 2)
    assert (images != sampling.generate(more.root, jax.random.key(0), 2)).any()
    # One file of keys, that of now.
    assert len(list(registry.path.glob("keys-*.safetensors"))) == 1


def test_mistakes_are_named(registry):
    some = give(ledger.add_users(registry, ["ann", "bob"], keys(2)), "ann")
    for call, said in (
        (lambda: ledger.add_users(some, ["ann"], keys(1)), "has a key already"),
        (lambda: ledger.add_users(some, ["Ann"], keys(1)), "more than their case"),
        (lambda: ledger.add_users(some, ["../x"], keys(1)), "begins with a letter"),
        (lambda: ledger.add_users(some, ["a", "b"], keys(1)), "expected one each"),
        (lambda: ledger.add_users(some, ["a"], np.zeros((1, 8, 8, 1))), "expected one each"),
        (lambda: ledger.add_users(some, ["a"], np.zeros((1, 32, 32, 1))), "norm"),
        (lambda: ledger.user_index(some, "carl"), "no user 'carl'.*ann, bob"),
        (lambda: ledger.load_model(some, "bob"), "no model yet"),
        (lambda: give(some, "ann"), "has a model already"),
        (lambda: give(some, "carl"), "no user"),
        (lambda: ledger.add_users(some, ["Nobody"], keys(1)), "stands for something else"),
        (lambda: ledger.add_users(some, ["carl"], keys(2)[1:]), "keys 1 and 2 are the same"),
        (lambda: ledger.add_users(registry, ["carl"], keys(3)[2:]), "load it again"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(FileExistsError, match="holds a registry already"):
        ledger.create(registry.path, registry.root, zoo.record(ROOT))
    same(ledger.load(registry.path), some)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(9))
def test_a_process_that_dies_leaves_the_registry_before_or_after(
    registry, tmp_path, monkeypatch, at
):
    """Dies at the n-th moving or deleting of a file; what is loaded then is one of the states that
    an undisturbed registry goes through."""
    steps = (
        lambda r: ledger.add_users(r, ["cleo"], keys(3)[2:]),
        lambda r: give(r, "bob"),
    )
    undisturbed = ledger.create(tmp_path / "u", zoo.load(ROOT), zoo.record(ROOT))
    states = [give(ledger.add_users(undisturbed, ["ann", "bob"], keys(2)), "ann")]
    for step in steps:
        states.append(step(states[-1]))
    before = give(ledger.add_users(registry, ["ann", "bob"], keys(2)), "ann")
    count = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > at:  # Dead: what `finally` would tidy up stays as well.
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(os, "unlink", dying(os.unlink))
        reached = before
        try:
            for step in steps:
                reached = step(reached)
        except Killed:
            pass
    assert ledger.load(registry.path).users in [state.users for state in states]
    done = ledger.load(registry.path)
    if "cleo" not in done.names:
        done = ledger.add_users(done, ["cleo"], keys(3)[2:])
    if done.users[1].sha256 is None:
        done = give(done, "bob")
    assert done.names == ("ann", "bob", "cleo") and done.users[1].gamma == 2.0
    np.testing.assert_array_equal(done.keys[:2], before.keys)
    same(ledger.load(registry.path), done)


def test_damage_is_found(registry):
    give(ledger.add_users(registry, ["ann"], keys(1)), "ann")
    path = registry.path
    for file in ("registry.json", "root.safetensors", next(path.glob("keys-*")).name):
        content = (path / file).read_bytes()
        (path / file).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        with pytest.raises(ValueError, match="damaged.*restore"):
            ledger.load(path)
        (path / file).unlink()
        with pytest.raises((ValueError, FileNotFoundError), match="missing|not there"):
            ledger.load(path)
        (path / file).write_bytes(content)
    model = path / "models" / "ann.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        ledger.load_model(ledger.load(path), "ann")
    newer = json.loads((path / "registry.json").read_text())
    newer.pop("sha256")
    newer["format"] = 99
    ledger._write(path, newer)
    with pytest.raises(ValueError, match="update flipad_jax"):
        ledger.load(path)
