"""Scores for a corpus by many machines, through Ray Data (extra `cluster`).

    score_on_cluster("auto", {"images": "/shared/crawl"}, output, "/shared/attributor",
                     corpora.missing(output))

Every device of the cluster gets an actor, which loads the attributor and compiles its scorer once.
What travels between machines are numbers of shards and nothing else: every machine reads the
attributor and the records, and writes the shards, under the same paths, so all of these must lie
where all machines can see them. Nothing of ours is pickled or unpickled.

A shard is written by whoever scores it, at once, when it is complete. A machine that dies loses the
shards that it was at; Ray, or the next round here, gives them to another one, and every record is
in the output exactly once.
"""

import glob
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import flipad_jax
from flipad_jax import checkpoints, corpora, records
from flipad_jax.corpora import Output
from flipad_jax.detection import bundle

__all__ = ["score_on_cluster"]

_ROUNDS = 3  # without a single shard more: something is wrong that trying again does not mend


class _Scorer:
    """An actor: the scorer of one device. Its arguments are text and numbers."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        if flipad_jax.__version__ != job["version"]:
            raise ValueError(
                f"this machine has flipad_jax {flipad_jax.__version__}, the one that began has "
                f"{job['version']}: install the same on all"
            )
        corpora.one_heap()
        self._attributor = bundle.load(job["attributor"])
        self._source = records.open_source(**job["source"])
        if not os.path.isdir(job["folder"]):
            raise ValueError(f"{job['folder']} is not where all machines of the cluster see it")
        self._output = corpora.open_output(
            job["folder"], self._source, job["attributor"], **job["settings"], write=False
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shards = batch["shard"].tolist()
        # Another actor may have come so far as to write one before its machine died.
        left = corpora.missing(self._output, shards)
        corpora.score_shards(self._attributor, self._source, self._output, left)
        return {"shard": batch["shard"]}


def score_on_cluster(
    address: str,
    source: Mapping[str, str],
    output: Output,
    attributor: str | os.PathLike,
    shards: Sequence[int],
    *,
    num_actors: int = 0,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Scores some shards on a Ray cluster.

    Args:
      address: "local" starts Ray on this machine alone; else that of a cluster, as `ray.init` takes
        it, "auto" for the one that this machine belongs to.
      source: the arguments of `records.open_source`.
      output: from `corpora.open_output`, in a folder that all machines share.
      attributor: the bundle, where all machines can read it.
      shards: their numbers, as from `corpora.missing`. Decoding starts anew with each: few large
        ones are faster than many small ones.
      num_actors: by default one per GPU, or per machine if there are no GPUs.
      should_stop: asked after every shard.
      progress: told how many more records are scored.
    Raises:
      Preempted: if it should stop.
      ValueError: without Ray, if there is no cluster at the address, or if shards stay missing
        (with what Ray says of the reason).
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "a cluster takes Ray on all of its machines: pip install 'flipad_jax[cluster]'"
        ) from error

    job = {
        "version": flipad_jax.__version__,
        "attributor": os.path.abspath(attributor),
        "folder": os.path.abspath(output.folder),
        "source": _absolute(source),
        "settings": {"fnr": output.fnr, "shard_size": output.shard_size, "format": output.format},
    }
    running = ray.is_initialized()
    if not running:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"no Ray cluster at {address!r}: start one, or give local") from error
    try:
        left, failed, reason = list(shards), 0, ""
        while left:
            before = len(left)
            reason = _round(job, output, left, num_actors, should_stop, progress)
            left = corpora.missing(output, left)
            failed = failed + 1 if len(left) == before else 0
            if failed == _ROUNDS:
                raise ValueError(f"{len(left)} shards cannot be scored: {reason}")
    finally:
        if not running:
            ray.shutdown()


def _absolute(source: Mapping[str, str]) -> dict[str, str]:
    """The arguments of `open_source` for who starts in another folder."""
    there = dict(source)
    if os.path.exists(there["images"]) or glob.has_magic(there["images"]):
        there["images"] = os.path.abspath(there["images"])
    if there.get("data_dir"):
        there["data_dir"] = os.path.abspath(os.path.expanduser(there["data_dir"]))
    return there


def _round(
    job: Mapping[str, Any],
    output: Output,
    shards: Sequence[int],
    num_actors: int,
    should_stop: Callable[[], bool] | None,
    progress: Callable[[int], None] | None,
) -> str:
    """Give every shard to some actor once; what went wrong, if anything did."""
    import ray.data

    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    numbered = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    scored = numbered.map_batches(
        _Scorer,
        fn_constructor_kwargs={"job": dict(job)},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(num_actors or num_gpus or machines, len(shards)),
            max_tasks_in_flight_per_actor=1,
        ),
        num_gpus=1 if num_gpus else None,
        num_cpus=None if num_gpus else 1,
    )
    try:
        for row in scored.iter_rows():
            if progress is not None:
                progress(len(output.records(int(row["shard"]))))
            if should_stop is not None and should_stop():
                raise checkpoints.Preempted("stopped; the shards that are complete are kept")
    except ray.exceptions.RayError as error:
        return " ".join(str(error).split())[-500:]
    return ""
