"""Every reader of files under `fuzz`, and the hostile files that were once let through."""

import gzip
import json
import re
import struct
import zipfile

import fuzz
import numpy as np
import pytest

from experiments import _config, _record, attribute, fit
from flipad_jax import data, idx_images, tfds_images
from flipad_jax.generators import interop, zoo
from flipad_jax.registry import ledger, user_keys


def check(outcome):
    assert not outcome.findings, "\n".join(outcome.findings)
    read = set(outcome.slowest)
    assert read | set(outcome.skipped) == set(fuzz.TARGETS)
    assert set(outcome.skipped) <= {"torch"}


def test_some_damaged_files():
    outcome = fuzz.run(300, seed=1)
    check(outcome)
    assert outcome.num_files >= 280
    # Not everything is damaged beyond recognition, nor is everything let through.
    assert 0.2 < sum(outcome.num_refused.values()) / outcome.num_files < 0.9


@pytest.mark.slow
def test_thousands_of_damaged_files():
    check(fuzz.run(3000, seed=2))


@pytest.mark.parametrize(
    "body, found",
    [
        ("while True: pass", "hang"),
        ("os.kill(os.getpid(), 11)", r"crash \(SIGSEGV"),
        ("os.system('true')", r"ran os\.system"),
        ("__import__('pickle').loads(b'cos\\ngetpid\\n.')", r"ran pickle\.find_class"),
        ("__import__('fuzz_canary')", "ran exec of code"),
        ("raise KeyError(3)", "raised KeyError"),
        ("raise ValueError('bad')", "unnamed: ValueError"),
        (
            "e = time.process_time() + 1.2; list(iter(lambda: time.process_time() < e, False))",
            "slow",
        ),
        ("np.ones(1 << 40)", "raised .*MemoryError"),
    ],
)
@pytest.mark.slow
def test_what_a_reader_must_not_do_would_be_found(body, found, tmp_path, monkeypatch):
    source = (fuzz.ROOT / "tests" / "fuzz.py").read_text()
    head, name, tail = source.partition("def _read_array(path: Path) -> None:\n")
    body = f"    if path.read_bytes() != GOOD:\n        {body}\n"
    bad = f"{head}{name}{body}\n\ndef _old(path):\n{tail}"
    bad = bad.replace(
        "ROOT = Path(__file__).resolve().parent.parent", f"ROOT = Path({str(fuzz.ROOT)!r})"
    )
    good = tmp_path / "mean.npy"
    np.save(good, fuzz._arrays()["last.weight"])
    bad = bad.replace("Files = dict", f"GOOD = {good.read_bytes()!r}\nFiles = dict")
    (tmp_path / "fuzz.py").write_text(bad)
    monkeypatch.setattr(fuzz, "__file__", str(tmp_path / "fuzz.py"))
    if found == "hang":
        monkeypatch.setattr(fuzz, "WALL_FACTOR", 5.0)
    outcome = fuzz.run(1, targets=["array"])
    (finding,) = outcome.findings
    assert re.match(f"array 0: {found}", finding), finding


# Findings of the fuzzer, once each.


def test_no_program_is_run_to_decode_an_image(tmp_path):
    # Pillow hands PostScript to Ghostscript, whatever the file is called.
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    assert data.decode_image(tmp_path / "a.png") == (None, "not an image: no known format")


def test_a_description_names_no_code(tmp_path):
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    features = tmp_path / "mnist" / "3.0.1" / "features.json"
    features.write_text(json.dumps({"pythonClassName": "antigravity.Feature"}))
    (features.parent / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="mnist in .*antigravity.Feature.*none of TFDS's own"):
        tfds_images.load("mnist", split="train", data_dir=tmp_path)


def torch_file(path, pickled, torch):
    torch.save({"w": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)


def test_lists_that_hold_lists_twice_end(tmp_path):
    torch = pytest.importorskip("torch")
    doubled = [f"]q{chr(i + 1)}(h{chr(i)}h{chr(i)}e".encode() for i in range(60)]
    torch_file(tmp_path / "a.pth", b"\x80\x02]q\0" + b"".join(doubled) + b".", torch)
    with pytest.raises(ValueError, match="a.pth: it holds more than 100000 entries"):
        interop.read_arrays(tmp_path / "a.pth")


def test_a_tensor_is_no_larger_than_its_file(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: w claims {1 << 40} numbers"):
        interop.read_arrays(tmp_path / "a.pth")
    torch.save({"w": torch.ones(1).expand(1000)}, tmp_path / "b.pth")
    assert interop.read_arrays(tmp_path / "b.pth")["w"].shape == (1000,)


def test_members_that_are_no_arrays_are_left_out(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    assert list(interop.read_arrays(tmp_path / "a.npz")) == ["w"]


@pytest.mark.parametrize("packed", [False, True])
def test_no_memory_is_taken_for_images_that_cannot_be_there(packed, tmp_path):
    content = b"".join(n.to_bytes(4, "big") for n in (0x803, 2**13, 2**10, 2**10)) + bytes(100)
    name = "train-images-idx3-ubyte" + (".gz" if packed else "")
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"{name} promises 8192 images of 1024 x 1024, and has"):
        idx_images.load(tmp_path, split="train")


DEEP = "[" * 100_000


def with_metadata(path, **metadata):
    """A safetensors file with a unit key and any metadata."""
    key = np.zeros((1, 2, 2, 1), np.float32)
    key[0, 0] = np.sqrt(0.5)
    tensor = {"dtype": "F32", "shape": key.shape, "data_offsets": [0, key.nbytes]}
    header = json.dumps({"__metadata__": metadata, "keys": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + key.tobytes())
    return path


@pytest.mark.parametrize("inner", [DEEP, "[]", "3", "nonsense"])
def test_what_is_written_in_metadata_is_checked(inner, tmp_path):
    path = with_metadata(tmp_path / "a.safetensors", format="1", facts=inner, generator=inner)
    for read in (user_keys.load, zoo.load_file, zoo.record_file):
        with pytest.raises(ValueError, match="a.safetensors"):
            read(path)
    assert user_keys.load(with_metadata(path, format="1", facts="{}"))[1] == {}
    with pytest.raises(ValueError, match="a.safetensors is not a generator"):
        zoo.load_file(with_metadata(path, generator='{"family": 3}'))


@pytest.mark.parametrize("text", [DEEP, "3", "[1]", '{"sha256": 1}'])
def test_ledgers_and_bundles_that_are_no_such_thing(text, tmp_path):
    from flipad_jax.detection import bundle

    for name, read in (("registry.json", ledger.load), ("attributor.json", bundle.load)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=str(tmp_path)):
            read(tmp_path)


def test_users_of_a_signed_ledger_still_cannot_leave_the_folder(tmp_path):
    path = next(iter(fuzz._registry_seeds(tmp_path).values()))
    content = json.loads((path / "registry.json").read_text())
    del content["sha256"]
    content["users"][0]["name"] = "../../somebody"
    ledger._write(path, content)
    with pytest.raises(ValueError, match="registry.json is not that of a registry: user '../../s"):
        ledger.load(path)


def test_a_stage_whose_compression_is_damaged_is_computed_again(tmp_path):
    flags = {"experiment": "demo"}
    with _record.open_workdir(tmp_path / "w", flags) as run:
        run.stage("first", lambda: {"z": np.ones(100)})
    path = tmp_path / "w" / "stages" / "first.npz"
    content = bytearray(path.read_bytes())
    # The directory at the end says deflated (8), or a way that nobody knows (99).
    for method in (8, 99):
        place = content.rfind(b"PK\x01\x02")
        content[place + 10] = content[8] = method
        path.write_bytes(content)
        with _record.open_workdir(tmp_path / "w", flags) as run:
            assert run.stage("first", lambda: {"z": np.zeros(1)})["z"].shape in ((1,), (100,))


def test_rows_of_scores_of_another_kind_end_the_log(tmp_path):
    row = attribute.Judged("a.png", "ab", 0.5, 1e-3, True, "", "")._asdict()
    head = json.dumps({"attributor_sha256": "cd"})
    for name, value in (("sha256", []), ("score", "high"), ("score", float("nan")), ("path", 3)):
        lines = [head, json.dumps(row), json.dumps(row | {"path": "b.png", name: value}), ""]
        (tmp_path / "scores.jsonl").write_text("\n".join(lines))
        with attribute._ScoreLog(tmp_path / "scores.jsonl", "cd") as log:
            assert list(log.known) == [("a.png", "ab")]


def test_a_mean_activation_is_one_array(tmp_path):
    np.savez(tmp_path / "many.npz", w=np.ones(3))
    with pytest.raises(_record.UsageError, match="many.npz is no .npy file of numbers"):
        fit._read_array(str(tmp_path / "many.npz"))


def test_a_flagfile_is_named_beside_its_mistake(tmp_path, capsys):
    for content in (b"--no_such_setting=1\n", b"\xff\xfe", b"--flagfile=nowhere\n"):
        (tmp_path / "my.flags").write_bytes(content)
        assert _config.main(["run.py", f"--flagfile={tmp_path / 'my.flags'}"]) == 2
        said = capsys.readouterr().err
        assert "my.flags" in said and said.count("\n") == 1
