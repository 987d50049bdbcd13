"""Damaged and hostile files for every reader: no crash, no hang, no code run, the file is named.

    python -m tests.fuzz --num_files=10000 --seed=0
    python -m tests.fuzz --targets=bundle,registry --num_files=500
    python -m tests.fuzz --targets=bundle --first=17 --num_files=1      one case again

A target is a reader, some good files for it, and what it may raise. A case is a number: it decides
which good file is taken, how it is changed and what it is called, so that every finding can be made
again. A worker process reads one case after the other, with a bound on its memory and under an
audit hook that notices unpickling, processes, network and code from elsewhere. What takes the
worker too long, or kills it, is a finding like the others.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

SECONDS = 1.0  # of processor time that a file may take, on an idle machine
WALL_FACTOR = 30.0  # a worker is stopped after that many times as long by the clock
MEMORY = 3 << 30  # bytes beyond what the worker needs before the first file
CANARY = "fuzz_canary"  # a module that files name; running its code is a finding

Files = dict[str, bytes]  # path inside a case's folder -> content
Draw = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
      seeds: writes good files into a folder: name of the seed -> what `read` takes of it.
      read: reads a file or folder; whatever it returns is well.
      hurt: changes the files of a seed; `_hurt_one` by default.
      weight: how often it is chosen.
      rename: whether the file may be called anything (its ending is kept).
    """

    seeds: Callable[[Path], Mapping[str, Path]]
    read: Callable[[Path], Any]
    hurt: Callable[[Draw, Files], Files] | None = None
    weight: float = 1.0
    rename: bool = True


# --- changes of bytes ------------------------------------------------------------------------

_HUGE = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
)
_TOKENS = (
    b"null", b"[]", b"{}", b"true", b'""', b"-1", b"1e999", b"NaN", b"Infinity", b"1" * 5000,
    b"[" * 100_000, b'{"a":' * 50_000, b'"../../../../etc/passwd"', b'"\\ud800"', b'"\\u0000"',
    b"99999999999999999999", b"0.5", b"[[[1]]]", f'"{CANARY}.Canary"'.encode(),
)  # fmt: skip
_NPY = b"\x93NUMPY\x01\0\x76\0"
_FOREIGN = (
    b"",
    b"\0" * 1000,
    b"I am text.\n",
    b"cos\nsystem\n(S'true'\ntR.",  # a pickle that runs a command
    b"\x80\x02cposix\nsystem\nq\0X\x04\0\0\0trueq\1\x85q\2Rq\3.",
    f"c{CANARY}\nCanary\n.".encode(),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
    _NPY + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807,)}",
    _NPY + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(118) + b"N.",
    b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    b"P6\n99999 99999\n255\n",
    b"\xff" * 64,
    zlib.compress(b"\0" * (1 << 20)),
    struct.pack("<Q", 2**63 - 1) + b"{}",
)  # fmt: skip
_NAMES = (
    "plain", "with space", "-dash", ".hidden", "ümlaut", "日本", "%s{}%n", "a'b\"c", "x" * 200,
    "new\nline", "tab\t", "\udcff", "a,b;c", "--flag=1", "$HOME", "~", "con", "trailing.",
)  # fmt: skip


def _flip(draw: Draw, content: bytearray) -> None:
    for _ in range(int(draw.integers(1, 17))):
        place = int(draw.integers(len(content)))
        content[place] ^= 1 << int(draw.integers(8))


def _set(draw: Draw, content: bytearray) -> None:
    place = int(draw.integers(len(content)))
    content[place] = int(draw.choice([0, 1, 0x7F, 0x80, 0xFF]))


def _cut(draw: Draw, content: bytearray) -> None:
    del content[int(draw.integers(len(content))) :]


def _extend(draw: Draw, content: bytearray) -> None:
    content += draw.bytes(int(draw.integers(1, 2000)))


def _drop(draw: Draw, content: bytearray) -> None:
    start = int(draw.integers(len(content)))
    del content[start : start + int(draw.integers(1, 64))]


def _double(draw: Draw, content: bytearray) -> None:
    start = int(draw.integers(len(content)))
    part = content[start : start + int(draw.integers(1, 400))]
    content[start:start] = part * int(draw.integers(1, 9))


def _length(draw: Draw, content: bytearray) -> None:
    """A number that a reader may take for a length, anywhere, more often at the beginning."""
    size = int(draw.choice([2, 4, 8]))
    reach = len(content) if draw.random() < 0.5 else min(len(content), 200)
    place = int(draw.integers(reach))
    value = int(_HUGE[draw.integers(len(_HUGE))]) & (2 ** (8 * size) - 1)
    content[place : place + size] = value.to_bytes(size, "little" if draw.random() < 0.5 else "big")


def _digits(draw: Draw, content: bytearray) -> None:
    """A number in digits, as in headers of JSON, gone wrong."""
    found = [m.span() for m in re.finditer(rb"\d+", bytes(content[:100_000]))]
    if found:
        start, end = found[int(draw.integers(len(found)))]
        content[start:end] = str(draw.choice(["-1", "0", "9" * 20, "1e999", "2147483648"])).encode()


def _token(draw: Draw, content: bytearray) -> None:
    """A value of JSON that becomes another one."""
    pattern = rb'"[^"]{0,80}"|-?\d+(\.\d+)?|true|false|null|\[[^\[\]]*\]|\{[^{}]*\}'
    found = [m.span() for m in re.finditer(pattern, bytes(content[:100_000]))]
    if found:
        start, end = found[int(draw.integers(len(found)))]
        content[start:end] = _TOKENS[int(draw.integers(len(_TOKENS)))]


_CHANGES = (_flip, _flip, _set, _cut, _extend, _drop, _double, _length, _length, _digits, _token)


def change(draw: Draw, content: bytes, others: list[bytes]) -> bytes:
    """One file, damaged.

    Args:
      draw: decides everything.
      content: of a good file.
      others: what parts of may be spliced in.
    """
    kind = draw.random()
    if kind < 0.05:
        return _FOREIGN[int(draw.integers(len(_FOREIGN)))]
    if kind < 0.12 and others:
        other = others[int(draw.integers(len(others)))]
        place = int(draw.integers(len(content) + 1))
        return content[:place] + other[int(draw.integers(len(other) + 1)) :]
    changed = bytearray(content)
    for _ in range(int(draw.choice([1, 1, 1, 2, 3]))):
        if changed:
            _CHANGES[int(draw.integers(len(_CHANGES)))](draw, changed)
    return bytes(changed)


def _hurt_one(draw: Draw, files: Files) -> Files:
    """One file of the seed changed, or gone."""
    names = sorted(files)
    name = names[int(draw.integers(len(names)))]
    if len(names) > 1 and draw.random() < 0.05:
        return {other: content for other, content in files.items() if other != name}
    others = [files[other] for other in names if other != name]
    return files | {name: change(draw, files[name], others)}


# --- changes that keep a format's checks satisfied --------------------------------------------


def _hurt_png(draw: Draw, files: Files) -> Files:
    """A chunk of a PNG file changed, its checksum right."""
    (name, content), *_ = files.items()
    if not content.startswith(b"\x89PNG") or draw.random() < 0.5:
        return _hurt_one(draw, files)
    chunks, place = [], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    index = int(draw.integers(len(chunks)))
    kind, body = chunks[index]
    body = zlib.compress(change(draw, zlib.decompress(body), [])) if kind == b"IDAT" else (
        change(draw, body, [])
    )  # fmt: skip
    chunks[index] = (kind, body)
    if draw.random() < 0.2:  # text that is a bomb, and kinds that Pillow interprets
        kind = (b"zTXt", b"iCCP", b"eXIf", b"acTL", b"tRNS")[int(draw.integers(5))]
        chunks.insert(1, (kind, b"k\0\0" + zlib.compress(b"x" * (4 << 20))))
    built = b"".join(
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks
    )
    return {name: content[:8] + built}


def _hurt_zip(draw: Draw, files: Files) -> Files:
    """A member of a zip file changed, its checksum right; bombs, zips in zips, odd names."""
    names = [n for n, c in sorted(files.items()) if c.startswith(b"PK")]
    if not names or draw.random() < 0.4:
        return _hurt_one(draw, files)
    name = names[int(draw.integers(len(names)))]
    with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = int(draw.integers(len(members)))
    member, content = members[index]
    kind = draw.random()
    if kind < 0.55:
        content = change(draw, content, [c for _, c in members])
    elif kind < 0.65:
        content = files[name]  # a zip in the zip
    elif kind < 0.8:
        member = str(
            draw.choice(
                ["../../evil", "a/../b.npy", "-", "x" * 3000, "é\u0000.npy", "/abs", "n.txt"]
            )
        )
    elif kind < 0.9:
        content += b"\0" * (64 << 20)
    else:
        members.append((member, content))
    members[index] = (member, content)
    buffer = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if draw.random() < 0.5 else zipfile.ZIP_STORED
    if kind >= 0.8:
        compression = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for member, content in members:
            archive.writestr(member, content)
    return files | {name: buffer.getvalue()}


def _hurt_pickle(draw: Draw, files: Files) -> Files:
    """A PyTorch file whose pickle is hostile: code, a tree without end, a tensor without memory."""
    (name, content), *_ = files.items()
    if draw.random() < 0.7 or not content.startswith(b"PK"):
        return _hurt_zip(draw, files)
    laughs = b"\x80\x02]q\0" + b"".join(
        b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)
    )
    nested = b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    inside = (
        _FOREIGN[3],
        _FOREIGN[4],
        _FOREIGN[5],
        laughs + b".",
        nested,
        b"\x80\x02]q\0h\0a.",  # a list that holds itself
    )
    buffer = io.BytesIO()
    pickled = inside[int(draw.integers(len(inside)))]
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w") as out:
        for info in archive.infolist():
            data = archive.read(info)
            if info.filename.endswith("data.pkl"):
                if draw.random() < 0.4:  # sizes and strides: whole numbers of one byte
                    places = [i for i, b in enumerate(data) if b == 0x4B and i + 1 < len(data)]
                    changed = bytearray(data)
                    place = places[int(draw.integers(len(places)))]
                    changed[place : place + 2] = b"\x8a\x06" + (2**40).to_bytes(6, "little")
                    data = bytes(changed)
                else:
                    data = pickled
            out.writestr(info.filename, data)
    return {name: buffer.getvalue()}


def _hurt_safetensors(draw: Draw, files: Files) -> Files:
    """The header of a safetensors file changed, its length right."""
    names = [n for n in sorted(files) if n.endswith(".safetensors")]
    if not names or draw.random() < 0.5:
        return _hurt_one(draw, files)
    name = names[int(draw.integers(len(names)))]
    content = files[name]
    (length,) = struct.unpack_from("<Q", content)
    header = content[8 : 8 + length]
    if draw.random() < 0.5:
        changed = bytearray(header)
        (_token if draw.random() < 0.6 else _digits)(draw, changed)
        header = bytes(changed)
    else:
        parsed = json.loads(header)
        metadata = parsed.get("__metadata__", {})
        if metadata and draw.random() < 0.6:  # valid to the format, but not to us
            key = sorted(metadata)[int(draw.integers(len(metadata)))]
            inner = bytearray(metadata[key].encode())
            if inner:
                _token(draw, inner)
            metadata[key] = inner.decode(errors="replace")
        else:
            key = sorted(parsed)[int(draw.integers(len(parsed)))]
            parsed[key + "/" if draw.random() < 0.5 else "x/" + key] = parsed.pop(key)
        header = json.dumps(parsed).encode()
    header += b" " * (-len(header) % 8)
    return files | {name: struct.pack("<Q", len(header)) + header + content[8 + length :]}


def _signed(settings: str, arrays: str | None) -> Callable[[Draw, Files], Files]:
    """Changes the inside of a signed JSON file and signs it again, so that it is looked at."""
    import hashlib

    def hurt(draw: Draw, files: Files) -> Files:
        if draw.random() < 0.3:
            return _hurt_one(draw, files)
        changed = {Path(name).name: content for name, content in files.items()}
        if arrays and draw.random() < 0.4:
            changed[arrays] = _hurt_safetensors(draw, {arrays: changed[arrays]})[arrays]
        else:
            text = bytearray(changed[settings])
            (_token if draw.random() < 0.7 else _digits)(draw, text)
            changed[settings] = bytes(text)
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError, KeyError):
            content = json.loads(changed[settings])
            if arrays:
                content["files"][arrays] = hashlib.sha256(changed[arrays]).hexdigest()
            rest = {k: v for k, v in content.items() if k != "sha256"}
            digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
            changed[settings] = json.dumps(rest | {"sha256": digest}).encode()
        return {name: changed[Path(name).name] for name in files}

    return hurt


def _hurt_tfds(draw: Draw, files: Files) -> Files:
    """A set whose description names a class of a feature that is not one of TFDS."""
    names = [name for name in sorted(files) if name.endswith("features.json")]
    if draw.random() < 0.8 or not names:
        return _hurt_one(draw, files)
    pattern = rb'"tensorflow_datasets\.[^"]*"'
    evil = f'"{CANARY}.Canary"'.encode()
    return files | {
        names[0]: re.sub(pattern, evil, files[names[0]], count=int(draw.integers(1, 3)))
    }


# --- the readers --------------------------------------------------------------------------------


def _arrays(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "last.weight": draw.standard_normal((3, 2, 2, 2)).astype(np.float32),
        "last.bias": draw.standard_normal(2).astype(np.float16),
        "steps": np.arange(3),
    }


def _image_seeds(folder: Path) -> dict[str, Path]:
    from PIL import Image

    draw = np.random.default_rng(0)
    rgb = Image.fromarray(draw.integers(0, 256, (24, 16, 3), dtype=np.uint8))
    smooth = rgb.resize((4, 4)).resize((64, 48), Image.Resampling.BICUBIC)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {}),
        "grey.png": (rgb.convert("L"), {}),
        "palette.png": (rgb.quantize(8), {}),
        "bilevel.png": (rgb.convert("1"), {}),
        "smooth.jpg": (smooth, {"quality": 90}),
        "progressive.jpg": (smooth, {"progressive": True}),
        "rgb.bmp": (rgb, {}),
        "lossy.webp": (smooth, {}),
        "lossless.webp": (rgb, {"lossless": True}),
        "raw.tif": (rgb, {}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw"}),
        "deflate.tif": (rgb, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tif": (rgb, {"compression": "jpeg"}),
        "still.gif": (rgb.quantize(16), {}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in kinds}


def _read_image(path: Path) -> None:
    from flipad_jax import data

    for shape in (None, (24, 16, 3)):
        image, reason = data.decode_image(path, shape)
        if image is None:
            assert reason and "\n" not in reason, f"no reason, or lines of it: {reason!r}"
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3)


def _folder_seeds(folder: Path) -> dict[str, Path]:
    seeds = _image_seeds(folder)
    for place in ("some/a 1.png", "some/sub/b\n2.jpg", "some/10.png", "some/.hidden/c.png"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        source = seeds["smooth.jpg" if place.endswith("jpg") else "rgb.png"]
        (folder / place).write_bytes(source.read_bytes())
    return {"some": folder / "some"}


def _read_folder(path: Path) -> None:
    from flipad_jax import data

    found = data.read_images(path)
    names = [*found.paths, *(row.path for row in found.rejected)]
    expected = sorted(data.find_images(path).paths)
    assert sorted(names) == expected, f"{names} instead of {expected}"
    assert all(row.reason for row in found.rejected)


def _idx_seeds(folder: Path) -> dict[str, Path]:
    import gzip

    draw = np.random.default_rng(0)
    content = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (30, 6, 5))
    content += draw.bytes(900)
    for name, data in (("plain", content), ("packed", gzip.compress(content, mtime=0))):
        (folder / name).mkdir()
        ending = ".gz" if name == "packed" else ""
        (folder / name / f"train-images-idx3-ubyte{ending}").write_bytes(data)
        (folder / name / f"t10k-images-idx3-ubyte{ending}").write_bytes(data)
    return {name: folder / name for name in ("plain", "packed")}


def _read_idx(path: Path) -> None:
    from flipad_jax import data

    for split in ("train", "test"):
        data.load(path, split=split, image_size=8, num_images=3, exact=False)


def _npz_seeds(folder: Path) -> dict[str, Path]:
    np.savez(folder / "plain.npz", **_arrays())
    np.savez_compressed(folder / "packed.npz", **_arrays())
    return {name: folder / name for name in ("plain.npz", "packed.npz")}


def _safetensors_seeds(folder: Path) -> dict[str, Path]:
    from safetensors.numpy import save_file

    save_file(_arrays(), folder / "w.safetensors", metadata={"made": "here"})
    return {"w.safetensors": folder / "w.safetensors"}


def _torch_seeds(folder: Path) -> dict[str, Path]:
    try:
        import torch
    except ImportError:
        return {}
    tensors = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "new.pth")
    torch.save(tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    return {name: folder / name for name in ("new.pth", "old.pt")}


def _msgpack_seeds(folder: Path) -> dict[str, Path]:
    from flax import serialization

    tree = {"params": {"last": _arrays()}, "step": np.int32(3)}
    (folder / "w.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    return {"w.msgpack": folder / "w.msgpack"}


def _read_weights(path: Path) -> None:
    from flipad_jax.generators import interop

    arrays = interop.read_arrays(path)
    assert arrays and all(array.dtype.itemsize >= 4 for array in arrays.values())
    total = sum(array.nbytes for array in arrays.values())
    assert total <= 1 << 30, f"{total} bytes of arrays"


def _orbax_seeds(folder: Path) -> dict[str, Path]:
    import orbax.checkpoint as ocp

    tree = {"params": {"w": _arrays()["last.weight"], "b": np.ones(2, np.float32)}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.resolve() / "checkpoint", tree)
    return {"checkpoint": folder / "checkpoint"}


def _template() -> Any:
    import jax

    return {"w": np.ones((2, 3), np.float32), "rng": jax.random.key(0)}


def _checkpoint_seeds(folder: Path) -> dict[str, Path]:
    from flipad_jax import checkpoints

    for step in (1, 2):
        checkpoints.save(folder / "kept", step, _template())
    return {"kept": folder / "kept"}


def _read_checkpoint(path: Path) -> None:
    from flipad_jax import checkpoints

    checkpoints.restore_latest(path, _template())


def _zoo_seeds(folder: Path) -> dict[str, Path]:
    import jax

    from flipad_jax.generators import zoo
    from flipad_jax.generators.sampling import TrainedGenerator

    entry = {"family": "dcgan", "image_shape": [8, 8, 1], "latent_dim": 3, "features": [2]}
    gan = zoo.make("dcgan", (8, 8, 1), latent_dim=3, features=(2,))
    latent = np.zeros((1, 3), np.float32)
    shapes = jax.eval_shape(gan.generator.init, jax.random.key(0), latent)
    weights = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    generator = TrainedGenerator(weights, gan.generator, (8, 8, 1), 3)
    zoo.save_file(folder / "g.safetensors", generator, entry)
    return {"g.safetensors": folder / "g.safetensors"}


def _read_zoo(path: Path) -> None:
    from flipad_jax.generators import zoo

    zoo.is_record(path)
    zoo.load_file(path)


def _pytorch_generator_seeds(folder: Path) -> dict[str, Path]:
    from safetensors.numpy import save_file

    draw = np.random.default_rng(0)
    arrays = {
        "main.0.weight": draw.standard_normal((3, 2, 4, 4)),
        "main.1.weight": np.ones(2),
        "main.1.bias": np.zeros(2),
        "main.1.running_mean": np.zeros(2),
        "main.1.running_var": np.ones(2),
        "main.3.weight": draw.standard_normal((2, 1, 4, 4)),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    save_file(arrays, folder / "g.safetensors")
    return {"g.safetensors": folder / "g.safetensors"}


def _read_generator(path: Path) -> None:
    from experiments import _regeneration

    _regeneration.load_generator(str(path))


def _inception_seeds(folder: Path) -> dict[str, Path]:
    from safetensors.numpy import save_file

    from flipad_jax import inception

    names = [inception._torchvision_name(path) for path in inception._shapes()]
    save_file({name: np.ones(2, np.float32) for name in names[:40]}, folder / "i.safetensors")
    return {"i.safetensors": folder / "i.safetensors"}


def _read_inception(path: Path) -> None:
    from flipad_jax import inception

    inception.load(path)


def _key_rows() -> np.ndarray:
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 2)))[0].T
    return rows.reshape(2, 8, 8, 1).astype(np.float32)


def _keys_seeds(folder: Path) -> dict[str, Path]:
    from flipad_jax.registry import user_keys

    user_keys.save(folder / "k.safetensors", _key_rows(), {"users": ["ann", "bob"]})
    return {"k.safetensors": folder / "k.safetensors"}


def _read_keys(path: Path) -> None:
    from flipad_jax.registry import user_keys

    keys, facts = user_keys.load(path)
    assert keys.ndim >= 2 and isinstance(facts, dict)


def _registry_seeds(folder: Path) -> dict[str, Path]:
    from flipad_jax.generators import zoo
    from flipad_jax.registry import ledger

    source = next(iter(_zoo_seeds(folder).values()))
    root, entry = zoo.load_file(source), zoo.record_file(source)
    registry = ledger.create(folder / "r", root, entry, {"dataset": "digits"})
    registry = ledger.add_users(registry, ["ann", "bob"], _key_rows())
    ledger.set_model(registry, "ann", root, entry, gamma=2.0, distinguishability=0.9, reached=True)
    return {"r": folder / "r"}


def _read_registry(path: Path) -> None:
    from flipad_jax.registry import ledger

    registry = ledger.load(path)
    for user in registry.users:
        assert isinstance(user.name, str) and "/" not in user.name
        if user.sha256 is not None:
            ledger.load_model(registry, user.name)


def _bundle_seeds(folder: Path) -> dict[str, Path]:
    import flipad_jax
    from flipad_jax import AttributorConfig, linops
    from flipad_jax.detection import attributor, deepsad, features, one_class

    draw = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return draw.standard_normal(shape).astype(np.float32)

    op = linops.conv_transpose(array(4, 4, 3, 3), (6, 6, 3), strides=2, padding=1)
    scores = np.sort(draw.random(30))
    one = one_class.OneClass(
        array(108),
        array(108, 5),
        one_class.Gaussian(array(6), array(6, 6)),
        one_class.Gaussian(array(4), array(4, 4)),
        array(3, 30),
        {},
        (6, 6, 3),
        one_class.OneClassConfig(num_components=5),
    )
    config = deepsad.DeepSADConfig(widths=(4,), rep_dim=4)
    deep = attributor.DeepSADDetector(
        features.FittedFeatures(
            array(6, 6, 3), array(6, 6, 3), None, features.preset("activations"), (6, 6, 3)
        ),
        deepsad.DeepSAD(
            {"Conv_0": {"kernel": array(5, 5, 3, 4)}},
            {"BatchNorm_0": {"mean": array(4), "var": array(4)}},
            array(4),
            config,
            (6, 6, 3),
        ),
    )
    made = {
        "ours": (one, AttributorConfig(one_class=one.config)),
        "deep": (deep, AttributorConfig(detector="deepsad", deepsad=config)),
    }
    profile = attributor.ActivationProfile(array(6, 6, 3), array(6, 6, 3), 30)
    for name, (detector, settings) in made.items():
        layer = flipad_jax.FinalLayer(op, array(3))
        fitted = attributor.Attributor(layer, array(6, 6, 3), detector, scores, settings, profile)
        flipad_jax.save(fitted, folder / name)
    return {name: folder / name for name in made}


def _read_bundle(path: Path) -> None:
    from flipad_jax.detection import bundle

    bundle.load(path)


_EXPERIMENT = '''"""Nothing."""
import dataclasses
import numpy as np
from experiments._config import setting

@dataclasses.dataclass(frozen=True)
class Config:
    num_images: int = setting(100, "Images.", lower_bound=1, upper_bound=1000)
    lam: float = setting(5e-4, "Weight.", lower_bound=0.0, upper_bound=1.0)
    rivals: tuple[str, ...] = setting(("a", "b"), "Rivals.")
    retrain: bool = setting(False, "Train anew.")

PRESETS = {"smoke": {"num_images": 3}}

def run(config, record):
    first = record.stage("first", lambda: {"z": np.ones(3), "names": np.array(["a", "b"])})
    record.log_metrics(step=1, loss=0.5)
    return {"sum": float(first["z"].sum())}
'''
_TOY = "fuzz_experiments"


def _toy(folder: Path) -> str:
    """A package with an experiment that does nothing."""
    (folder / _TOY).mkdir(exist_ok=True)
    (folder / _TOY / "__init__.py").write_text("")
    (folder / _TOY / "demo.py").write_text(_EXPERIMENT)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from experiments import _config

    _config._commit = lambda: "0" * 40  # it asks git, a process, for every run
    return _TOY


def _flagfile_seeds(folder: Path) -> dict[str, Path]:
    _toy(folder)
    texts = {
        "a.flags": "# A run.\n--experiment=demo\n--preset=smoke\n--num_images=7\n--lam=0.25\n",
        "b.flags": "--rivals=x,y\n--retrain=true\n--lam\n0.5\n// nothing\n\n--noretrain\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in texts}


def _main(argv: list[str]) -> None:
    """The command; its message becomes an error of the user."""
    from experiments import _config

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = _config.main(["run.py", *argv], package=_TOY)
    if code:
        assert code == 2, f"exit code {code}: {said.getvalue()}"
        raise ValueError(said.getvalue().strip().splitlines()[-1])


def _read_flagfile(path: Path) -> None:
    _main([f"--flagfile={path}", "--workdir=toy_run", "--overwrite"])


def _workdir_seeds(folder: Path) -> dict[str, Path]:
    _toy(folder)
    from experiments import _config

    config = _config.make_config(importlib.import_module(f"{_TOY}.demo"), "smoke")
    module = importlib.import_module(f"{_TOY}.demo")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        _config.execute(module, config, workdir=folder / "done", preset="smoke")
        _config.execute(module, config, workdir=folder / "killed", preset="smoke")
    (folder / "killed" / "results.json").unlink()
    return {name: folder / name for name in ("done", "killed")}


def _read_workdir(path: Path) -> None:
    _main(["--preset=smoke", f"--workdir={path}"])
    content = json.loads((path / "results.json").read_text())
    assert content["metrics"] is not None


def _scores_seeds(folder: Path) -> dict[str, Path]:
    from experiments import attribute

    rows = [
        attribute.Judged(f"{i}.png", "ab" * 32, 0.5 + i, 1e-3, True, "", "") for i in range(4)
    ] + [attribute.Judged("bad.png", None, None, None, False, "", "not an image")]
    with attribute._ScoreLog(folder / "scores.jsonl", "cd" * 32) as log:
        log.add(rows)
    return {"scores.jsonl": folder / "scores.jsonl"}


def _read_scores(path: Path) -> None:
    from experiments import attribute

    with attribute._ScoreLog(path, "cd" * 32) as log:
        for judged in log.known.values():
            assert isinstance(judged.path, str) and isinstance(judged.doubt, str), judged
            assert judged.score is None or isinstance(judged.score, float), judged
            assert judged.converged in (True, False), judged


def _array_seeds(folder: Path) -> dict[str, Path]:
    np.save(folder / "mean.npy", _arrays()["last.weight"])
    return {"mean.npy": folder / "mean.npy"}


def _read_array(path: Path) -> None:
    from experiments import fit

    assert isinstance(fit._read_array(str(path)), np.ndarray)


def _tfds_seeds(folder: Path) -> dict[str, Path]:
    import tensorflow_datasets as tfds
    from PIL import Image

    draw = np.random.default_rng(0)
    examples = []
    for _ in range(12):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (28, 28), dtype=np.uint8)).save(buffer, "PNG")
        examples.append({"image": buffer.getvalue()})

    class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "mnist"
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(28, 28, 1))})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": iter(enumerate(examples))}

        def _generate_examples(self):
            raise AssertionError

    tfds.disable_progress_bar()
    Set(data_dir=folder / "sets").download_and_prepare(file_format="array_record")
    return {"sets": folder / "sets"}


def _read_tfds(path: Path) -> None:
    from flipad_jax import data

    data.load("mnist", split="train", data_dir=path)


TARGETS: dict[str, Target] = {
    "image": Target(_image_seeds, _read_image, _hurt_png, weight=12),
    "folder": Target(_folder_seeds, _read_folder, weight=3),
    "idx": Target(_idx_seeds, _read_idx, weight=3),
    "npz": Target(_npz_seeds, _read_weights, _hurt_zip, weight=4),
    "safetensors": Target(_safetensors_seeds, _read_weights, _hurt_safetensors, weight=4),
    "torch": Target(_torch_seeds, _read_weights, _hurt_pickle, weight=4),
    "msgpack": Target(_msgpack_seeds, _read_weights, weight=4),
    "orbax": Target(_orbax_seeds, _read_weights, weight=2),
    "checkpoint": Target(_checkpoint_seeds, _read_checkpoint, weight=1),
    "zoo": Target(_zoo_seeds, _read_zoo, _hurt_safetensors, weight=2),
    "generator": Target(_pytorch_generator_seeds, _read_generator, _hurt_safetensors, weight=2),
    "inception": Target(_inception_seeds, _read_inception, _hurt_safetensors, weight=1),
    "keys": Target(_keys_seeds, _read_keys, _hurt_safetensors, weight=3),
    "registry": Target(_registry_seeds, _read_registry, _signed("registry.json", None), weight=3),
    "bundle": Target(
        _bundle_seeds,
        _read_bundle,
        _signed("attributor.json", "attributor.safetensors"),
        weight=5,
    ),
    "flagfile": Target(_flagfile_seeds, _read_flagfile, weight=4),
    "workdir": Target(_workdir_seeds, _read_workdir, _hurt_zip, weight=3),
    "scores": Target(_scores_seeds, _read_scores, weight=2),
    "array": Target(_array_seeds, _read_array, weight=2),
    "tfds": Target(_tfds_seeds, _read_tfds, _hurt_tfds, weight=1, rename=False),
}


# --- one case -----------------------------------------------------------------------------------


def _files(path: Path) -> Files:
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {
        str(Path(path.name) / file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def make(target: str, number: int, seed: int, seeds: Mapping[str, Path], folder: Path) -> Path:
    """Write a case into a folder; what the reader takes."""
    found = TARGETS[target]
    draw = np.random.default_rng([seed, sorted(TARGETS).index(target), number])
    source = seeds[sorted(seeds)[int(draw.integers(len(seeds)))]]
    files = (found.hurt or _hurt_one)(draw, _files(source))
    name = source.name
    if found.rename and draw.random() < 0.2:
        name = _NAMES[int(draw.integers(len(_NAMES)))] + source.suffix
    for place, content in files.items():
        path = folder / name / Path(*Path(place).parts[1:]) if len(Path(place).parts) > 1 else (
            folder / name
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    path = folder / name
    if not path.exists():  # a folder of which nothing is left
        path.mkdir()
    return path


_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.putenv",
    "os.chmod", "os.symlink", "os.link", "subprocess.Popen", "pickle.find_class", "urllib.Request",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "shutil.unpack_archive",
)  # fmt: skip


class _Watch:
    """What a reader did that no reader may do; the hook that notices it cannot be removed."""

    def __init__(self, home: Path) -> None:
        self.on = False
        self.seen: list[str] = []
        self._inside = False
        libraries = {sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)}
        self._trusted = (*libraries, str(ROOT), str(home / "seeds"))
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or self._inside:
            return
        self._inside = True
        try:
            found = None
            if event in _FORBIDDEN:
                found = f"{event}{arguments!r}"
            elif event == "exec":
                file = getattr(arguments[0], "co_filename", "?")
                if not file.startswith(("<frozen", *self._trusted)) and not self._from_library():
                    found = f"exec of code from {file}"
        finally:
            self._inside = False
        if found:
            self.seen.append(found[:300])
            raise RuntimeError(f"forbidden: {found[:300]}")

    def _from_library(self) -> bool:
        """Whether the code that runs text as code is a library's own: namedtuple, dataclass."""
        frame = sys._getframe(3)
        return frame is not None and frame.f_code.co_filename.startswith(self._trusted)


def _named(message: str, path: Path) -> bool:
    """Whether a message names a file, in one of the ways that odd names can be written."""
    name = path.name
    ways = {
        name,
        repr(name)[1:-1],
        ascii(name)[1:-1],
        " ".join(name.split()),
        json.dumps(name)[1:-1],
    }
    ways.add(name.encode(errors="surrogateescape").decode(errors="replace"))
    ways.add(name.encode(errors="backslashreplace").decode())
    return any(way in message for way in ways)


def _judge(target: str, path: Path, watch: _Watch) -> tuple[str | None, bool]:
    """What is wrong with how a case was read, None if nothing; and whether it was refused."""
    from absl import flags

    from experiments._record import UsageError

    watch.seen.clear()
    watch.on = True
    problem, refused = None, False
    try:
        TARGETS[target].read(path)
    except AssertionError as error:
        problem = f"wrong: {error}"
    except (ValueError, OSError, UsageError, flags.Error) as error:
        refused = True
        if not _named(str(error), path):
            problem = f"unnamed: {type(error).__name__}: {str(error)[:300]}"
    except BaseException as error:  # noqa: BLE001 - whatever else it raises is the finding
        problem = f"raised {type(error).__name__}: {str(error)[:300]}"
    finally:
        watch.on = False
    return f"ran {watch.seen[0]}" if watch.seen else problem, refused


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def work(home: Path, seed: int) -> None:
    """The worker: cases from stdin, a line of JSON for each on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what readers print is nobody's answer
    os.chdir(home)
    import warnings

    warnings.simplefilter("ignore")
    import jax

    jax.config.update("jax_platforms", "cpu")
    seeds: dict[str, Mapping[str, Path]] = {}
    (home / "elsewhere").mkdir(exist_ok=True)
    (home / "elsewhere" / f"{CANARY}.py").write_text("class Canary:\n    pass\n")
    sys.path.append(str(home / "elsewhere"))
    watch = _Watch(home)
    limited = False
    for line in sys.stdin:
        target, number = json.loads(line)
        if target not in seeds:
            folder = home / "seeds" / target
            if folder.exists():  # made by a worker before this one
                seeds[target] = {
                    p: Path(q) for p, q in json.loads((folder / ".json").read_text()).items()
                }
                if target in ("flagfile", "workdir"):
                    _toy(folder)
            else:
                folder.mkdir(parents=True)
                seeds[target] = TARGETS[target].seeds(folder)
                index = {name: str(path) for name, path in seeds[target].items()}
                (folder / ".json").write_text(json.dumps(index))
            for path in seeds[target].values():  # imports and compiles what reading needs
                copy = home / "warm" / path.name
                copy.parent.mkdir(exist_ok=True)
                (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
                problem, refused = _judge(target, copy, watch)
                assert problem is None, f"a good {target}: {problem}"
                assert refused == (target == "inception"), f"a good {target}: {refused=}"
                shutil.rmtree(copy.parent)
            bound = _address_space() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (bound, resource.RLIM_INFINITY))
            limited = True
        if number < 0 or not seeds[target]:
            print(
                json.dumps({"target": target, "skipped": not seeds[target]}),
                file=answers,
                flush=True,
            )
            continue
        assert limited
        seconds = []
        problem = None
        # Slow once may be the machine; slow twice is the file.
        while len(seconds) < 2 and (not seconds or seconds[-1] > SECONDS / 2):
            folder = Path(tempfile.mkdtemp(dir=home))
            path = make(target, number, seed, seeds[target], folder)
            start, clock = time.process_time(), time.monotonic()
            found, refused = _judge(target, path, watch)
            problem = problem or found
            seconds.append(min(time.process_time() - start, time.monotonic() - clock))
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(home / "toy_run", ignore_errors=True)
        if problem is None and min(seconds) > SECONDS:
            problem = f"slow: {min(seconds):.2f} s"
        answer = {
            "seconds": min(seconds),
            "problem": problem,
            "refused": refused,
        }
        print(json.dumps(answer), file=answers, flush=True)


# --- all cases ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What a run found.

    Attributes:
      num_files: how many were read.
      num_refused: of every target, how many were refused with an error, as they should be.
      findings: one line each, empty if all is well.
      slowest: seconds, target and number of the file that took longest, of every target.
      skipped: targets whose library is not installed.
    """

    num_files: int = 0
    num_refused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    findings: list[str] = dataclasses.field(default_factory=list)
    slowest: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)


class _Worker:
    def __init__(self, home: Path, seed: int) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.errors = open(home / "stderr", "w+b")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(home), "--seed", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            cwd=ROOT,
        )

    def ask(self, target: str, number: int, seconds: float) -> dict[str, Any] | None:
        """The answer; None if the worker died or took too long."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([target, number]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        if ready and not line:
            self.process.wait()  # it has died
        return json.loads(line) if line else None

    def stop(self) -> str:
        """End the process; what became of it."""
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        if code is None:
            return "hang"
        died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"crash ({died}; {said[-1][:200] if said else 'nothing said'})"


def cases(num_files: int, first: int, targets: list[str]) -> Iterator[tuple[str, int]]:
    """So many cases, every target by its weight, in turn."""
    total = sum(TARGETS[target].weight for target in targets)
    for target in targets:
        share = max(1, round(num_files * TARGETS[target].weight / total))
        for number in range(first, first + share):
            yield target, number


def run(
    num_files: int,
    *,
    seed: int = 0,
    first: int = 0,
    targets: list[str] | None = None,
    progress: Callable[[int, str], None] = lambda done, text: None,
) -> Outcome:
    """Read many damaged files.

    Args:
      num_files: how many, of all targets together (rounded for each).
      seed: of all draws.
      first: number of the first case of every target.
      targets: of `TARGETS`; all, if None.
      progress: told after every file how many were read, and what was found.
    Returns:
      What was found; `findings` is empty if all is well.
    """
    outcome = Outcome()
    targets = list(TARGETS) if targets is None else targets
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        home = Path(name)
        worker: _Worker | None = None
        warm: set[str] = set()
        try:
            for target, number in cases(num_files, first, targets):
                if target in outcome.skipped:
                    continue
                if worker is None:
                    worker, warm = _Worker(home, seed), set()
                if target not in warm:
                    answer = worker.ask(target, -1, 300)
                    if answer is None:
                        raise RuntimeError(f"{target}: {worker.stop()} before the first file")
                    warm.add(target)
                    if answer["skipped"]:
                        outcome.skipped.append(target)
                        continue
                answer = worker.ask(target, number, WALL_FACTOR * SECONDS)
                outcome.num_files += 1
                found = None
                if answer is None:
                    found = worker.stop()
                    worker = None
                else:
                    found = answer["problem"]
                    outcome.num_refused[target] += answer["refused"]
                    slowest = max(
                        outcome.slowest.get(target, (0.0, 0)), (answer["seconds"], number)
                    )
                    outcome.slowest[target] = slowest
                if found:
                    outcome.findings.append(f"{target} {number}: {found}")
                progress(outcome.num_files, outcome.findings[-1] if found else "")
        finally:
            if worker is not None:
                worker.stop()
    return outcome


def main() -> int:
    """The command; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num_files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--targets", default="", help=f"some of {','.join(TARGETS)}")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker), options.seed)
        return 0

    def progress(done: int, found: str) -> None:
        if found:
            print(found, flush=True)
        if done % 500 == 0:
            print(f"{done} files", file=sys.stderr, flush=True)

    start = time.monotonic()
    outcome = run(
        options.num_files,
        seed=options.seed,
        first=options.first,
        targets=options.targets.split(",") if options.targets else None,
        progress=progress,
    )
    for target, (seconds, number) in outcome.slowest.items():
        refused = outcome.num_refused[target]
        print(f"{target:12} {refused:5} refused, slowest {seconds:.3f} s (number {number})")
    if outcome.skipped:
        print(f"skipped, as their library is not installed: {', '.join(outcome.skipped)}")
    print(
        f"{outcome.num_files} files, {len(outcome.findings)} findings, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
