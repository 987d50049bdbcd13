"""Records by number, and scores of a corpus in shards that survive kills and damage."""

import csv
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import toy_model
from image_files import broken_files, png, random_images
from test_tfds_images import prepare
from toy_model import own_images

import flipad_jax
from flipad_jax import checkpoints, corpora, data, records
from flipad_jax.corpora import Row
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection.attributor import Scores

SHAPE = (8, 8, 3)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle")
    return toy_model.save_attributor(path, 320, batch_size=16, max_iters=5)


@pytest.fixture(scope="module")
def attributor(bundle):
    return flipad_jax.load(bundle)


def write_records(path, contents):
    from array_record.python import array_record_module

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def example(**features):
    """A tf.train.Example of some byte features, by the wire format of protocol buffers."""

    def field(number, body):
        assert len(body) < 1 << 14
        size = bytes([len(body) & 0x7F | 0x80, len(body) >> 7])
        return bytes([number << 3 | 2]) + size + body

    entries = [
        field(
            1, field(1, name.encode()) + field(2, field(1, b"".join(field(1, v) for v in values)))
        )
        for name, values in features.items()
    ]
    return field(1, b"".join(entries))


@pytest.fixture
def mixed(tmp_path):
    """55 own and 20 foreign images and four bad records in three ArrayRecord files.

    Returns the folder, and image or pattern of the reason for every record in order.
    """
    own, foreign = own_images(2, 55)[0], random_images(20, seed=3)
    contents = [(png(image), image) for image in (*own, *foreign)]
    bad = broken_files()
    for place, name in ((3, "empty.png"), (17, "grey.png"), (40, "truncated.png")):
        contents.insert(place, bad[name])
    contents.insert(60, (b"\nno example", "neither an image nor"))
    write_records(tmp_path / "c" / "part-2.array_record", [c for c, _ in contents[:30]])
    write_records(tmp_path / "c" / "part-10.array_record", [c for c, _ in contents[30:31]])
    write_records(tmp_path / "c" / "sub" / "part-11.arrayrecord", [c for c, _ in contents[31:]])
    return tmp_path / "c", [expected for _, expected in contents]


def read_all(source, start=0, stop=None, shape=SHAPE):
    with data.decoding():
        return source.images(start, len(source) if stop is None else stop, shape)


def rows_of(output):
    """All rows, shard after shard, as a user's own program would read them."""
    rows = []
    for shard in range(output.num_shards):
        text = output.path(shard).read_bytes().decode("utf-8", "surrogateescape")
        rows += list(csv.DictReader(io.StringIO(text, newline="")))
    return rows


# --- records ----------------------------------------------------------------------------------


def test_records_are_numbered_through_all_files(mixed):
    folder, expected = mixed
    source = records.open_source(folder)
    assert len(source) == len(expected) == 79
    for (image, reason), wanted in zip(read_all(source), expected, strict=True):
        if isinstance(wanted, str):
            assert image is None and re.search(wanted, reason)
        else:
            np.testing.assert_array_equal(image, wanted)
    # Any range, across the ends of files, gives the same as all at once.
    whole = read_all(source)
    for start, stop in ((0, 0), (28, 34), (30, 31), (78, 79), (29, 79)):
        part = read_all(source, start, stop)
        assert [reason for _, reason in part] == [reason for _, reason in whole[start:stop]]
        for (a, _), (b, _) in zip(part, whole[start:stop], strict=True):
            assert (a is None) == (b is None) and (a is None or (a == b).all())
    names = [source.name(index) for index in range(len(source))]
    assert len(set(names)) == len(names)
    assert names[29] == "part-2.array_record[29]" and names[30] == "part-10.array_record[0]"
    assert names[78] == "sub/part-11.arrayrecord[47]"


def test_the_image_of_an_example_is_found_by_name(tmp_path):
    images = random_images(3)
    path = tmp_path / "a.array_record"
    write_records(
        path,
        [
            example(image=[png(images[0])], label=[b"7"]),
            png(images[1]),  # kinds may be mixed
            example(label=[b"7"], text=[b"x"]),
            example(image=[png(images[2])] * 2),
        ],
    )
    found = read_all(records.open_source(path))
    np.testing.assert_array_equal([image for image, _ in found[:2]], images[:2])
    assert "no feature image; its features are: label, text" in found[2][1]
    assert "holds 2 pictures" in found[3][1]
    with pytest.raises(ValueError, match="no feature photo; its features are: image, label"):
        records.open_source(path, feature="photo")


def test_a_damaged_record_is_lost_alone(tmp_path):
    contents = [png(image) for image in random_images(60)]
    path = tmp_path / "a.array_record"
    write_records(path, contents)
    raw = bytearray(path.read_bytes())
    raw[raw.index(contents[20]) + 40] ^= 0xFF
    path.write_bytes(raw)
    found = read_all(records.open_source(path))
    bad = [i for i, (image, _) in enumerate(found) if image is None]
    assert bad == [20] and found[20][1].startswith("cannot be read: ")


def test_a_disk_that_fails_is_no_matter_of_a_record(tmp_path, monkeypatch):
    class Failing:
        def read(self, start, stop):
            raise RuntimeError("pread() failed: Input/output error")

    write_records(tmp_path / "a.array_record", [png(image) for image in random_images(3)])
    source = records.open_source(tmp_path)
    monkeypatch.setattr(source, "_reader", lambda path: Failing())
    with pytest.raises(ValueError, match="a.array_record cannot be read any more: pread"):
        read_all(source)


def test_a_folder_is_what_attribute_finds(tmp_path):
    data.write_images(tmp_path, random_images(12))
    for name, (content, _) in broken_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    source = records.open_source(tmp_path)
    found = data.find_images(tmp_path)
    names = [source.name(index) for index in range(len(source))]
    assert names == [*found.paths, "round"]
    for name, (image, reason) in zip(names[:-1], read_all(source)):
        wanted, why = data.decode_image(tmp_path / name, SHAPE)
        assert reason == why and (wanted is None or (image == wanted).all())
    assert read_all(source, len(names) - 1)[0][1] == "link to a folder, not followed"


def test_a_set_of_tfds_is_read_by_its_name(tmp_path):
    import tensorflow_datasets as tfds

    images = random_images(30)
    features = tfds.features.FeaturesDict(
        {
            "photo": tfds.features.Image(shape=SHAPE),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
    )
    examples = [{"photo": png(image), "label": i % 2} for i, image in enumerate(images)]
    prepare(tmp_path, "crawl", features, {"train": examples[:20], "test": examples[20:]})

    def content(split):
        source = records.open_source("crawl", data_dir=str(tmp_path), split=split)
        return sorted(image.tobytes() for image, _ in read_all(source)), source

    found, source = content("test")
    assert found == sorted(image.tobytes() for image in images[20:])
    assert source.name(3) == "crawl-test.array_record-00000-of-00001[3]"
    assert len(content("train[:25%]")[0]) == 5
    parts = [content(split)[1] for split in ("train[:25%]", "train[25%:]")]
    assert len({p.name(i) for p in parts for i in range(len(p))}) == 20
    assert parts[0].fingerprint != parts[1].fingerprint
    for split, message in (("", "give a split: test, train"), ("tset", "no split 'tset'")):
        with pytest.raises(ValueError, match=message):
            content(split)
    with pytest.raises(ValueError, match="mnist is .* not prepared in .*; to prepare it"):
        records.open_source("mnist", data_dir=str(tmp_path), split="test")


def test_what_cannot_be_a_source_is_refused(tmp_path):
    (tmp_path / "none").mkdir()
    write_records(tmp_path / "empty.array_record", [])
    (tmp_path / "text.array_record").write_text("I am no record at all.\n" * 100)
    write_records(tmp_path / "good.array_record", [b"x" * 5000] * 9)
    raw = (tmp_path / "good.array_record").read_bytes()
    (tmp_path / "cut.array_record").write_bytes(raw[: len(raw) // 2])
    write_records(tmp_path / "both" / "a.array_record", [b"x"])
    data.write_images(tmp_path / "both", random_images(2))
    for name, message in (
        ("none", "no images found"),
        ("empty.array_record", "holds no records"),
        ("text.array_record", "cannot be read as an ArrayRecord file"),
        ("cut.array_record", "cannot be read as an ArrayRecord file"),
        ("*.png", "matches no file"),
        ("both/*", "which is none"),
        ("both", "1 ArrayRecord files and 2 image files"),
        ("missing", "is neither there, nor"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            records.open_source(tmp_path / name)
        assert name in str(caught.value)
    (tmp_path / "linked").mkdir()
    write_records(tmp_path / "linked" / "a.array_record", [b"x"])
    (tmp_path / "linked" / "b").symlink_to(tmp_path / "both", target_is_directory=True)
    with pytest.raises(ValueError, match="linked/b' is a link to a folder.* would be missing"):
        records.open_source(tmp_path / "linked")
    data.write_images(tmp_path / "images", random_images(2))
    for options, message in (
        ({"split": "test"}, "is a path, of which all records are taken: split go with a name"),
        ({"split": "test", "data_dir": "x"}, "split and data_dir go with"),
        ({"feature": "photo"}, "holds image files, which have no feature 'photo'"),
    ):
        with pytest.raises(ValueError, match=message):
            records.open_source(tmp_path / "images", **options)
    # Found twice by the pattern, and a record once.
    assert len(records.open_source(f"{tmp_path}/**/**/good.array_record")) == 9
    with pytest.raises(ValueError, match="celeb_a@cropped: .* leave out the crop"):
        records.open_source("celeb_a@cropped", split="test")


def test_warnings_of_the_process_are_as_before_after_decoding_in_threads(tmp_path, attributor):
    import warnings

    data.write_images(tmp_path, random_images(40))
    before = list(warnings.filters)
    corpora.score_range(attributor, records.open_source(tmp_path), 0, 40)
    assert warnings.filters == before


_FIRST_OF_ALL = """
import builtins, sys, threading
from flipad_jax import data, records
sys.setswitchinterval(1e-6)
source, usual, found = records.open_source(sys.argv[1]), builtins.__import__, {}
def decode(index):
    found[index] = source.images(index, index + 1, None)[0][1]
with data.decoding():
    thread = threading.Thread(target=decode, args=(1,))
    thread.start()
    while thread.is_alive() and builtins.__import__ is usual:
        pass
    decode(0)
    thread.join()
assert found[0] is None, found
assert "neither an image nor" in found[1], found
"""


def test_the_first_image_can_be_decoded_while_a_thread_meets_the_first_example(tmp_path):
    # In a process of its own, in which TFDS has not been imported: see `_ArrayRecords`.
    write_records(tmp_path / "a.array_record", [png(random_images(1)[0]), b"\nno example"])
    command = [sys.executable, "-c", _FIRST_OF_ALL, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


# --- scoring ----------------------------------------------------------------------------------


def test_rows_are_the_verdicts_of_the_library(mixed, attributor):
    folder, expected = mixed
    source = records.open_source(folder)
    rows = corpora.score_range(attributor, source, 0, 79, fnr=0.05)
    good = [i for i, wanted in enumerate(expected) if not isinstance(wanted, str)]
    found = flipad_jax.verdicts(attributor, np.stack([expected[i] for i in good]), fnr=0.05)
    assert [row.path for row in rows] == [source.name(i) for i in range(79)]
    np.testing.assert_allclose([rows[i].score for i in good], found.score, rtol=1e-5)
    assert [rows[i].verdict for i in good] == found.verdict.tolist()
    assert [rows[i].p_value for i in good] == found.p_value.tolist()
    assert [rows[i].reason for i in good] == found.doubt.tolist()
    bad = [row for i, row in enumerate(rows) if i not in good]
    assert len(bad) == 4
    assert all(r.verdict == "cannot_judge" and r.reason and r.score is None for r in bad)
    # The same rows, whatever range is asked for.
    part = corpora.score_range(attributor, source, 10, 41, fnr=0.05)
    assert [row.path for row in part] == [row.path for row in rows[10:41]]
    np.testing.assert_allclose(
        [row.score or 0 for row in part], [row.score or 0 for row in rows[10:41]], rtol=1e-5
    )
    with pytest.raises(ValueError, match="records 70 to 80 of 79"):
        corpora.score_range(attributor, source, 70, 80)
    with pytest.raises(ValueError, match="fnr"):
        corpora.score_range(attributor, source, 0, 1, fnr=2)


def test_a_score_that_is_not_finite_is_no_verdict(mixed, attributor, bundle, tmp_path, monkeypatch):
    def broken(_, images):
        n = len(images)
        score = np.where(np.arange(n) % 3 == 0, np.nan, 0.0)
        converged = np.arange(n) % 3 != 1
        return Scores(score, np.full(n, 0.5), np.ones(n, np.int32), converged)

    def doubted(_, images):
        return np.where(np.arange(len(images)) % 2, "looks processed", "")

    monkeypatch.setattr(attribution, "score_with_info", broken)
    monkeypatch.setattr(attribution, "doubts", doubted)
    source = records.open_source(mixed[0])
    output = corpora.open_output(tmp_path / "out", source, bundle)
    corpora.score_shards(attributor, source, output, corpora.missing(output))
    rows = rows_of(output)
    judged = [row for row in rows if row["verdict"] != "cannot_judge"]
    assert 20 < len(judged) < 30 and all(row["score"] == "0.0" for row in judged)
    gaps = sum("stopped at a relative gap of 0.5" in row["reason"] for row in rows)
    nans = sum(row["reason"] == "the score is not finite" for row in rows)
    assert len(judged) + gaps + nans + 4 == 79 and gaps > 20 and nans > 20
    counts = corpora.collect(output).counts
    doubtful = sum(row["reason"] == "looks processed" for row in judged)
    assert counts["unconverged"] == gaps and counts["doubtful"] == doubtful > 5
    assert counts["cannot_judge"] == gaps + nans + 4 and counts["not_ours"] == 0


class Counting:
    """A source of a million images made on the fly, which knows how far ahead it was asked."""

    fingerprint = "00"

    def __init__(self):
        self.lock, self.loaded, self.done, self.ahead = threading.Lock(), 0, 0, 0

    def __len__(self):
        return 10**6

    def name(self, index):
        return str(index)

    def images(self, start, stop, image_shape):
        with self.lock:
            self.loaded = max(self.loaded, stop)
            self.ahead = max(self.ahead, self.loaded - self.done)
        return [(np.full(image_shape, i % 256, np.uint8), None) for i in range(start, stop)]


def test_no_more_is_read_ahead_than_a_few_blocks(attributor, bundle, tmp_path, monkeypatch):
    zeros = np.zeros(attributor.config.batch_size)
    scores = Scores(zeros, zeros, zeros.astype(np.int32), zeros == 0)
    monkeypatch.setattr(attribution, "score_with_info", lambda *_: scores)
    monkeypatch.setattr(attribution, "doubts", lambda *_: np.full(len(zeros), ""))
    source = Counting()
    output = corpora.open_output(tmp_path, source, bundle, shard_size=64)
    assert output.num_shards == 15625

    source.done = 3 * 64

    def progress(count):
        source.done += count

    corpora.score_shards(attributor, source, output, range(3, 13), progress=progress)
    assert source.done == 13 * 64
    assert 16 <= source.ahead <= (corpora._THREADS + 2) * 16
    names = [row["path"] for shard in range(3, 13) for row in read_csv(output.path(shard))]
    assert names == [str(i) for i in range(192, 832)]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- shards -----------------------------------------------------------------------------------


@pytest.fixture
def scored(mixed, attributor, bundle, tmp_path):
    """A finished output of 4 shards, each of two blocks, and its source."""
    source = records.open_source(mixed[0])
    output = corpora.open_output(tmp_path / "out", source, bundle, shard_size=20)
    corpora.score_shards(attributor, source, output, corpora.missing(output))
    corpora.finish(output)
    return source, output


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_record_is_in_the_output_once_and_the_manifest_says_so(scored):
    source, output = scored
    rows = rows_of(output)
    assert [row["path"] for row in rows] == [source.name(i) for i in range(79)]
    manifest = json.loads((output.folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["num_records"] == 79 and manifest["shard_size"] == 20
    assert manifest["source_sha256"] == source.fingerprint
    assert tuple(manifest["columns"]) == corpora.COLUMNS == tuple(rows[0])
    assert [shard["rows"] for shard in manifest["shards"]] == [20] * 3 + [19]
    for k, shard in enumerate(manifest["shards"]):
        content = (output.folder / shard["file"]).read_bytes()
        assert shard["file"] == f"scores-{k:05d}-of-00004.csv"
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        verdicts = [row["verdict"] for row in read_csv(output.folder / shard["file"])]
        assert all(shard[v] == verdicts.count(v) for v in corpora.VERDICTS)


def test_findings_are_those_of_all_rows(scored, monkeypatch):
    source, output = scored
    rows = rows_of(output)
    findings = corpora.collect(output)
    scores = [float(row["score"]) for row in rows if row["score"]]
    assert findings.sample.tolist() == scores
    for verdict, sign in (("not_ours", -1), ("ours", 1)):
        wanted = sorted(sign * float(r["score"]) for r in rows if r["verdict"] == verdict)[:12]
        assert [sign * row.score for _, row in findings.examples[verdict]] == wanted
    bad = [i for i, row in enumerate(rows) if row["verdict"] == "cannot_judge"]
    assert [index for index, _ in findings.examples["cannot_judge"]] == bad
    assert all(source.name(i) == row.path for e in findings.examples.values() for i, row in e)


def test_stopped_runs_go_on_to_the_same_bytes(scored, attributor, bundle, tmp_path):
    source, output = scored
    again = corpora.open_output(tmp_path / "again", source, bundle, shard_size=20)
    for start in range(3):
        asked = iter([False, False])  # the third block is the first of the second shard
        with pytest.raises(checkpoints.Preempted, match="complete are kept"):
            corpora.score_shards(
                attributor,
                source,
                again,
                corpora.missing(again),
                should_stop=lambda: next(asked, True),
            )
        assert corpora.missing(again) == list(range(start + 1, 4))
    with pytest.raises(checkpoints.Preempted, match="1 shards were still missing"):
        corpora.finish(again, others=True, should_stop=lambda: True)
    with pytest.raises(ValueError, match="1 of 4 files in .* are gone or damaged; start once more"):
        corpora.finish(again)  # Nobody else is at it.
    assert not json.loads((again.folder / "manifest.json").read_text())["complete"]
    corpora.score_shards(attributor, source, again, corpora.missing(again))
    corpora.finish(again)
    assert contents(again.folder) == contents(output.folder)


def test_names_of_any_kind_are_one_row_each():
    names = ["a\rb.png", "c\nd.png", 'e",f.png', "g\udcff.png"]
    rows = [corpora.Row(name, 1.0, 0.5, 2.0, "ours", "") for name in names]
    text = corpora._csv(rows).decode("utf-8", "surrogateescape")
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["path"] for row in found] == names
    assert "\r\n" not in text


def test_processes_share_the_shards(scored, attributor, bundle, tmp_path):
    source, output = scored
    # The later one first: it writes no manifest.
    for process in (1, 0):
        shared = corpora.open_output(
            tmp_path / "shared", source, bundle, shard_size=20, write=process == 0
        )
        mine = range(shared.num_shards)[process::2]
        assert corpora.missing(shared, mine) == list(mine)
        corpora.score_shards(attributor, source, shared, mine)
    corpora.finish(shared, write=False)
    assert not json.loads((shared.folder / "manifest.json").read_text())["complete"]
    corpora.finish(shared)
    assert contents(shared.folder) == contents(output.folder)


_PROCESS = """
import sys, jax
jax.config.update("jax_enable_x64", True)
port, process, images, bundle, folder = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from experiments import score
from flipad_jax import corpora, load, records
process, count = score._process()
assert count == 2
source = records.open_source(images)
output = corpora.open_output(folder, source, bundle, shard_size=20, write=process == 0)
mine = range(output.num_shards)[process::count]
corpora.score_shards(load(bundle), source, output, mine)
corpora.finish(output, others=True, write=process == 0)
"""


@pytest.mark.slow
def test_two_processes_of_jax_make_one_output(scored, mixed, bundle, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "two"
    arguments = [str(mixed[0]), str(bundle), str(folder)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(port), str(process), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for process in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert contents(folder) == contents(scored[1].folder)


@pytest.mark.parametrize("what", ["row", "cut", "gone", "receipt", "receipt_gone", "other"])
def test_damage_is_found_and_mended(scored, attributor, what):
    source, output = scored
    before = contents(output.folder)
    path, receipt = output.path(2), output.receipt_path(2)
    if what == "row":
        path.write_bytes(path.read_bytes().replace(b"ours", b"hers", 1))
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "gone":
        path.unlink()
    elif what == "receipt":
        receipt.write_bytes(receipt.read_bytes()[:-9])
    elif what == "receipt_gone":
        receipt.unlink()
    else:  # that of another scoring
        known = json.loads(receipt.read_text())
        receipt.write_text(json.dumps({**known, "output": "00"}))
    assert corpora.missing(output) == [2]
    corpora.score_shards(attributor, source, output, [2])
    corpora.finish(output)
    assert contents(output.folder) == before


def test_another_source_attributor_or_setting_is_refused(scored, mixed, bundle, tmp_path):
    source, output = scored
    before = contents(output.folder)
    other = tmp_path / "other"
    flipad_jax.save(flipad_jax.load(bundle), other)
    settings = json.loads((other / "attributor.json").read_text())
    settings["num_calibration"] += 1
    from flipad_jax.detection import bundle as bundles

    settings["sha256"] = bundles._digest(settings)
    (other / "attributor.json").write_text(json.dumps(settings))
    for change, message in (
        ({"attributor": other}, "the attributor is another one"),
        ({"fnr": 0.01}, "fnr is 0.005 there and 0.01 here"),
        ({"shard_size": 11}, "shard_size is 20 there and 11 here"),
        ({"format": "jsonl"}, "format is csv there and jsonl here"),
    ):
        arguments = {"attributor": bundle, "shard_size": 20, **change}
        with pytest.raises(ValueError, match=message):
            corpora.open_output(output.folder, source, **arguments)
    file = mixed[0] / "part-10.array_record"
    content = file.read_bytes()
    file.write_bytes(content)  # the same bytes, but nobody can know without reading all of them
    changed = records.open_source(mixed[0])
    with pytest.raises(ValueError, match="the source has changed"):
        corpora.open_output(output.folder, changed, bundle, shard_size=20)
    write_records(file, [b"1", b"2"])
    with pytest.raises(ValueError, match="num_records is 79 there and 80 here"):
        corpora.open_output(output.folder, records.open_source(mixed[0]), bundle, shard_size=20)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no manifest of ours"):
        corpora.open_output(tmp_path / "odd", source, bundle)
    for wrong in ({"shard_size": 0}, {"format": "txt"}, {"fnr": 1.5}):
        with pytest.raises(ValueError):
            corpora.open_output(tmp_path / "new", source, bundle, **wrong)
    assert contents(output.folder) == before and not (tmp_path / "new").exists()


def test_names_that_are_no_text_are_written_as_they_are():
    row = Row('a\udce9,"b"\n.png', 1.5, 0.1, 2.0, "ours", "")
    text = corpora._csv([row])
    assert b'"a\xe9,""b""\n.png",1.5' in text
    (line,) = corpora._jsonl([row]).splitlines()
    assert json.loads(line)["path"] == row.path
