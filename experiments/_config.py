"""Settings of experiments: a frozen dataclass becomes absl flags; one command runs them all.

An experiment is a module of this package whose name does not start with an underscore:

    \"\"\"One line that `--help` shows.\"\"\"

    @dataclasses.dataclass(frozen=True)
    class Config:
        lam: float = setting(5e-4, "Lasso weight.", lower_bound=0.0)
        seed: int = setting(0, "Seed of everything random.")

    PRESETS = {"smoke": {"num_images": 8}, "demo": {}, "paper": {"num_images": 10_000}}

    def run(config: Config, record: Run) -> dict: ...   # the metrics of results.json
    def summary(metrics: dict) -> str: ...              # optional: the table printed at the end
    def default_workdir(config: Config) -> str: ...     # optional: in place of runs/NAME-PRESET
    def plan(config: Config) -> list[Stage]: ...        # optional: what --plan counts, see _plan.py
    CHANGEABLE = ("fnr",)   # optional: every start runs anew, on what the workdir keeps, and
                            # these settings may differ from those of the last start; the others
                            # are remembered where --workdir is given
    MOVABLE = ("images",)   # optional, beside CHANGEABLE: may differ too, but are remembered
    TOGETHER = True         # optional: several processes can run it, though it has CHANGEABLE: it
                            # keeps nothing but in record.common, and decides alike in all
    PRECIOUS = "keys.json"  # optional: a workdir with this file is never overwritten

How a command ends is in `EXIT_CODES`, and --help shows it.

A setting is an int, float, bool, str or a tuple of int, float or str. The flags live in a
FlagValues of their own, never in `absl.flags.FLAGS`, so that nothing leaks between runs in one
process. JAX is imported by the experiment that is chosen, not before.
"""

import ast
import configparser
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
import pkgutil
import platform
import re
import shlex
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from experiments import _stopping
from experiments._record import (
    Progress,
    Run,
    UsageError,
    open_workdir,
    out_of_room,
    read_flags,
)

__all__ = [
    "Progress",
    "Run",
    "UsageError",
    "check_once",
    "execute",
    "main",
    "make_config",
    "setting",
]

DEFAULT_EXPERIMENT = "demo"
DEFAULT_PRESET = "demo"
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "experiments"
_RESERVED = (
    "experiment",
    "preset",
    "workdir",
    "overwrite",
    "plan",
    "plan_devices",
    "profile",
    "compilation_cache",
    "coordinator_address",
    "num_processes",
    "process_id",
    "debug",
    "help",
    "flagfile",
    "undefok",
)
# Whatever ended it but 0 and 2, the same command goes on where it was.
EXIT_CODES = {
    0: "done",
    1: "an error of ours: its trace is shown",
    2: "a mistake in the command or in its files, told in one line",
    74: "nothing more could be written: make room",
    128 + signal.SIGINT: "interrupted by Ctrl-C",
    _stopping.EXIT_CODE: "stopped by SIGTERM, as by a scheduler (a second SIGTERM ends at once)",
}
_PROFILED_SECONDS = 60.0
_TRUSTED = (0,)  # root can do anything anyway
# What a caller can mend: refused input, and paths that are not there or not his.
_USER_ERRORS = (
    UsageError,
    flags.Error,
    ValueError,
    FileExistsError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    FloatingPointError,  # a training that diverged: its message says of what, and what to change
)


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    lower_bound: float | None = None,
    upper_bound: float | None = None,
) -> Any:
    """A field of an experiment's Config: default, help text and what values are allowed.

    The bounds are inclusive and hold for every element of a tuple, as do the choices.
    """
    metadata = {"help": help, "choices": choices, "lower": lower_bound, "upper": upper_bound}
    return dataclasses.field(default=default, metadata=metadata)


class _SettingParser(flags.ArgumentParser):
    """Parses one setting by the annotation of its field."""

    def __init__(self, annotation: Any, metadata: Mapping[str, Any]) -> None:
        super().__init__()
        self._is_tuple = typing.get_origin(annotation) is tuple
        arguments = typing.get_args(annotation)
        self._kind = arguments[0] if self._is_tuple else annotation
        if self._kind not in (int, float, bool, str) or (
            self._is_tuple and (self._kind is bool or arguments[1:] != (...,))
        ):
            raise TypeError(f"a setting cannot be {annotation}; see experiments/_config.py")
        self._metadata = metadata

    def parse(self, argument: Any) -> Any:
        """Text or a value to the value, checked; ValueError says what was expected."""
        if not self._is_tuple:
            return self._element(argument)
        if isinstance(argument, str):
            argument = [part for part in argument.split(",") if part.strip()]
        return tuple(self._element(part) for part in argument)

    def _element(self, value: Any) -> Any:
        kind, name = self._kind, self._kind.__name__
        expected = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        try:
            if isinstance(value, str):
                if kind is bool:
                    texts = {"true": True, "1": True, "false": False, "0": False}
                    value = texts[value.strip().lower()]
                elif kind is str:
                    value = value.strip()
                else:
                    value = kind(value.strip())
            elif kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
        except (ValueError, KeyError):
            raise ValueError(f"expected {expected[name]}") from None
        if type(value) is not kind:
            raise ValueError(f"{value!r} is not {expected.get(name, 'text')}")
        return self._allowed(value)

    def _allowed(self, value: Any) -> Any:
        lower, upper = self._metadata.get("lower"), self._metadata.get("upper")
        choices = self._metadata.get("choices")
        if self._kind is float and not math.isfinite(value):
            raise ValueError("expected a finite number")
        if lower is not None and value < lower:
            raise ValueError(f"expected at least {lower}")
        if upper is not None and value > upper:
            raise ValueError(f"expected at most {upper}")
        if choices is not None and value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}{_did_you_mean(value, choices)}")
        # One setting is one line of config.flags, and a comma parts the elements of a tuple.
        if self._kind is str and ("\n" in value or (self._is_tuple and "," in value)):
            raise ValueError("text must fit one line, and an element of a tuple has no comma")
        return value

    def flag_type(self) -> str:
        """What help shows in place of a value."""
        return f"{self._kind.__name__},..." if self._is_tuple else self._kind.__name__


class _SettingSerializer(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        """The text that parses back to the same value."""
        if isinstance(value, tuple):
            return ",".join(map(self.serialize, value))
        if isinstance(value, bool):
            return str(value).lower()
        return repr(value) if isinstance(value, float) else str(value)


def _one_of(choices: Sequence[Any] | None) -> str:
    return f" One of: {', '.join(map(str, choices))}." if choices else ""


class _SettingFlag(flags.Flag):
    """A flag made from a field of a Config."""

    def __init__(self, name: str, field: dataclasses.Field[Any], annotation: Any, default: Any):
        super().__init__(
            _SettingParser(annotation, field.metadata),
            _SettingSerializer(),
            name,
            default,
            field.metadata.get("help", "") + _one_of(field.metadata.get("choices")),
            boolean=annotation is bool,
        )

    def text(self, value: Any) -> str:
        """The value as config.flags and help show it."""
        return _SettingSerializer().serialize(value)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _names(package: str) -> dict[str, str]:
    """The experiments of a package and their one-line summaries, read without importing them."""
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or []) if spec else []
    found = {}
    for module in pkgutil.iter_modules(locations):
        if module.name.startswith("_") or module.ispkg:
            continue
        source = Path(module.module_finder.path) / f"{module.name}.py"  # type: ignore[union-attr]
        try:
            text = ast.get_docstring(ast.parse(source.read_text())) or ""
        except (SyntaxError, OSError):
            text = "(cannot be read)"
        found[module.name] = text.partition("\n")[0]
    return found


def _find(experiment: str, package: str) -> types.ModuleType:
    known = sorted(_names(package))
    if experiment not in known:
        raise UsageError(
            f"--experiment={experiment} is not one of {', '.join(known)}"
            f"{_did_you_mean(experiment, known)}"
        )
    return importlib.import_module(f"{package}.{experiment}")


def _preset(module: types.ModuleType, preset: str) -> Mapping[str, Any]:
    presets = getattr(module, "PRESETS", {})
    if preset in presets:
        return presets[preset]
    if preset == DEFAULT_PRESET:
        return {}
    known = list(dict.fromkeys([*presets, DEFAULT_PRESET]))
    raise UsageError(
        f"--preset={preset} is not one of {', '.join(known)}{_did_you_mean(preset, known)}"
    )


def _common_flags(preset_help: str = "Named set of sizes.") -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # Also takes "--name value", anywhere, as --flagfile needs.
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    switch = functools.partial(flags.DEFINE_boolean, flag_values=values)
    text("experiment", DEFAULT_EXPERIMENT, "What to run.")
    text("preset", DEFAULT_PRESET, preset_help)
    text("workdir", None, "Folder of the run; by default runs/EXPERIMENT-PRESET, or by its files.")
    switch("overwrite", False, "Delete what an earlier run left in the workdir.")
    switch("plan", False, "Tell what the run would cost, without running it, and stop.")
    number = functools.partial(flags.DEFINE_integer, flag_values=values)
    number("plan_devices", None, "With --plan: for so many devices; by default those present.")
    text(
        "profile",
        None,
        "Write a trace of the first minute of computing into this folder, for TensorBoard (XProf) "
        "and ui.perfetto.dev.",
    )
    text(
        "compilation_cache",
        None,
        "Keep compiled programs in this folder of yours, for later runs; none by default.",
    )
    text(
        "coordinator_address",
        None,
        "HOST:PORT of process 0 of several; auto: found by JAX (Slurm, TPU, MPI).",
    )
    number("num_processes", None, "How many processes there are.")
    number("process_id", None, "Which of them this is, from 0.")
    switch("debug", False, "Show the trace of every error.")
    switch("help", False, "Show this and stop.", short_name="h")
    return values


def _define_settings(
    values: flags.FlagValues, module: types.ModuleType, preset: str
) -> dict[str, _SettingFlag]:
    """Add a flag for every field of the module's Config, with the preset's values as defaults."""
    annotations = typing.get_type_hints(module.Config)
    fields = {field.name: field for field in dataclasses.fields(module.Config)}
    overrides = _preset(module, preset)
    unknown = [name for name in overrides if name not in fields]
    if unknown:
        raise TypeError(f"preset {preset} of {module.__name__} sets {unknown}, not in its Config")
    settings = {}
    for name, field in fields.items():
        if name in _RESERVED:
            raise TypeError(f"{module.__name__}.Config.{name}: --{name} has a meaning already")
        default = overrides.get(name, field.default)
        if default is dataclasses.MISSING:
            raise TypeError(f"{module.__name__}.Config.{name} has no default")
        settings[name] = _SettingFlag(name, field, annotations[name], default)
        flags.DEFINE_flag(settings[name], flag_values=values)
    return settings


def check_once(settings: Any, *names: str) -> None:
    """Refuse settings that hold nothing, or a value twice.

    Raises:
      ValueError: naming the setting.
    """
    for name in names:
        values = getattr(settings, name)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"--{name}={','.join(map(str, values))}: give each one once")


def make_config(module: types.ModuleType, preset: str = DEFAULT_PRESET, **overrides: Any) -> Any:
    """The Config of an experiment at a preset, with single settings replaced.

    Raises:
      UsageError: if the preset or a setting is unknown, or a value is not allowed.
    """
    settings = _define_settings(flags.FlagValues(), module, preset)
    for name, value in overrides.items():
        if name not in settings:
            raise UsageError(f"unknown setting {name}{_did_you_mean(name, list(settings))}")
        try:
            settings[name].value = settings[name].parser.parse(value)
        except ValueError as error:
            raise UsageError(f"{name}={value}: {error}") from None
    return module.Config(**{name: flag.value for name, flag in settings.items()})


def _flag_texts(
    module: types.ModuleType, experiment: str, preset: str, config: Any
) -> dict[str, str]:
    settings = _define_settings(flags.FlagValues(), module, preset)
    texts = {name: flag.text(getattr(config, name)) for name, flag in settings.items()}
    return {"experiment": experiment, "preset": preset, **texts}


def _commit() -> str | None:
    """Revision of this checkout, "+dirty" where tracked files differ; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _ROOT:
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str | None]:
    # Experiments run from the checkout, whose setup.cfg is newer than metadata of an installation.
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    versions: dict[str, str | None] = {
        "flipad_jax": setup.get("metadata", "version", fallback=None),
        "python": platform.python_version(),
    }
    for name in ("jax", "jaxlib", "flax", "optax", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _device() -> dict[str, Any]:
    import jax  # Here, so that the settings can be read and checked without it.

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
    }


def execute(
    module: types.ModuleType,
    config: Any,
    *,
    workdir: str | os.PathLike[str],
    preset: str = DEFAULT_PRESET,
    overwrite: bool = False,
    command: Sequence[str] | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """Run an experiment in a workdir, or go on with it, or only read what it found.

    Args:
      module: the experiment.
      config: an instance of its Config.
      workdir: folder of the run; see `experiments._record`.
      preset: name of the preset that `config` started from; recorded.
      overwrite: start over where a run was.
      command: the command line, recorded.
      profile: folder for a trace of the first minute.

    Returns:
      What results.json holds.

    Raises:
      UsageError: if the workdir cannot be used.
    """
    experiment = module.__name__.rpartition(".")[2]
    commit = _commit()
    texts = _flag_texts(module, experiment, preset, config)
    summary = getattr(module, "summary", None)
    changeable = getattr(module, "CHANGEABLE", None)
    movable = getattr(module, "MOVABLE", ())
    with open_workdir(
        workdir,
        texts,
        overwrite=overwrite,
        commit=commit,
        changeable=(*(changeable or ()), *movable),
        precious=getattr(module, "PRECIOUS", None),
        defaults=_flag_texts(module, experiment, preset, module.Config()),
    ) as record:
        try:
            results = record.results() if changeable is None else None
            if results is not None:
                record.say(f"{record.shown} is complete since {results.get('finished')}.")
            else:
                record.need_room()
                record.set_results_aside()
                with _profiled(profile):
                    results = _compute(module, config, record, experiment, preset, command)
            if summary is not None:
                record.say(summary(results["metrics"]))
            record.say(f"Results: {Path(record.shown) / 'results.json'}")
        except BaseException as error:
            again = ["python", "run.py", f"--flagfile={Path(record.shown) / 'config.flags'}"]
            error.add_note(f"go on with: {shlex.join([*again, f'--workdir={record.shown}'])}")
            if isinstance(error, _USER_ERRORS) and not out_of_room(error):
                record.put_results_back()
                record.withdraw()
            raise
        return results


def _compute(
    module: types.ModuleType,
    config: Any,
    record: Run,
    experiment: str,
    preset: str,
    command: Sequence[str] | None,
) -> dict[str, Any]:
    start = time.monotonic()
    metrics = module.run(config, record)
    facts = {
        "experiment": experiment,
        "preset": preset,
        "settings": dataclasses.asdict(config),
        "convention": getattr(config, "convention", "paper"),
        "seed": getattr(config, "seed", None),
        "versions": _versions(),
        "device": _device(),
        "commit": record.commit,
        "command": shlex.join(command) if command else None,
        "last_start_seconds": round(time.monotonic() - start, 3),
    }
    return record.finish(facts, metrics)


def _help(
    names: Mapping[str, str],
    experiment: str,
    preset: str,
    values: flags.FlagValues,
    settings: Mapping[str, _SettingFlag],
) -> str:
    def entry(left: str, text: str) -> str:
        gap = "\n" + " " * 30 if len(left) > 27 else " " * (28 - len(left))
        body = textwrap.fill(text, 66, break_long_words=False).replace("\n", "\n" + " " * 30)
        return f"  {left}{gap}{body}".rstrip()

    def switch(name: str) -> str:
        flag = values[name]
        return f"--{name}" if flag.boolean else f"--{name}={flag.default or name.upper()}"

    common = [name for name in _RESERVED if name in values]
    lines = [
        "python run.py --experiment=NAME [--preset=PRESET] [--workdir=FOLDER] [--FLAG=VALUE ...]",
        "",
        "Experiments:",
        *(entry(name, text) for name, text in names.items()),
        "",
        "Flags of every experiment:",
        *(entry(switch(name), values[name].help) for name in common),
        entry("--flagfile=FILE", "Read flags from a file, as from WORKDIR/config.flags."),
        "",
        f"Settings of {experiment}, with the values of --preset={preset}:",
        *(entry(f"--{n}={flag.text(flag.default)}", flag.help) for n, flag in settings.items()),
        "",
        "Exit codes:",
        *(entry(str(code), text) for code, text in EXIT_CODES.items()),
    ]
    return "\n".join(lines)


def _show_plan(
    module: types.ModuleType,
    experiment: str,
    preset: str,
    config: Any,
    settings: Mapping[str, _SettingFlag],
    num_devices: int | None,
) -> None:
    plan = getattr(module, "plan", None)
    if plan is None:
        raise UsageError(
            f"--experiment={experiment} has no plan of what it costs; leave out --plan"
        )
    from experiments import _plan  # Here, as it imports JAX and most of the library.

    words = [f"--experiment={experiment}", f"--preset={preset}"]
    for name, flag in settings.items():
        if flag.value != flag.default:
            words.append(f"--{name}={flag.text(flag.value)}")
    print("counting what every part computes ...", file=sys.stderr, flush=True)  # Up to minutes.
    print(_plan.report(shlex.join(words), plan(config), num_devices), flush=True)


def _remembered(module: types.ModuleType, early: flags.FlagValues) -> dict[str, str]:
    """Settings of the workdir that a changeable experiment goes on in, but for the changeable."""
    changeable = getattr(module, "CHANGEABLE", None)
    if changeable is None or not early.workdir or early.overwrite:
        return {}
    texts = read_flags(early.workdir) or {}
    if texts.get("experiment") != early.experiment:
        return {}
    return {name: text for name, text in texts.items() if name not in changeable}


def _run(argv: Sequence[str], package: str) -> int:
    early = _common_flags()  # Experiment and preset decide which other flags there are.
    early(argv, known_only=True)
    names = _names(package)
    module = _find(early.experiment, package)
    remembered = _remembered(module, early)
    preset = early.preset if early["preset"].present else remembered.get("preset", early.preset)
    presets = list(dict.fromkeys([*getattr(module, "PRESETS", {}), DEFAULT_PRESET]))
    values = _common_flags(f"Named set of sizes: {', '.join(presets)}.")
    settings = _define_settings(values, module, preset)
    if early.help:
        print(_help(names, early.experiment, preset, values, settings), flush=True)
        return 0
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(f"--experiment={early.experiment}: {error}") from None
    for name, flag in settings.items():
        if not flag.present and name in remembered:
            try:
                flag.value = flag.parser.parse(remembered[name])
            except ValueError as error:
                raise UsageError(
                    f"{early.workdir}/config.flags: {name}={remembered[name]}: {error}"
                ) from None
    if rest:
        hint = f"; did you mean --experiment={rest[0]}?" if rest[0] in names else ""
        raise UsageError(f"unexpected argument {rest[0]!r}: flags are --name=value{hint}")
    # Libraries that read absl's own flags (Grain, absl.logging) want them parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    config = module.Config(**{name: _at_home(flag.value) for name, flag in settings.items()})
    _check_common(values)
    if values.compilation_cache is not None:
        _keep_programs(values.compilation_cache)
    if values.plan:
        _show_plan(module, early.experiment, preset, config, settings, values.plan_devices)
        return 0
    _join(values, module)
    default_workdir = getattr(module, "default_workdir", None)
    execute(
        module,
        config,
        workdir=values.workdir
        or (default_workdir and default_workdir(config))
        or f"runs/{early.experiment}-{preset}",
        preset=preset,
        overwrite=values.overwrite,
        command=argv,
        profile=values.profile,
    )
    return 0


def _at_home(value: Any) -> Any:
    """A path that begins with ~, which no shell expands behind an equals sign."""
    return os.path.expanduser(value) if isinstance(value, str) and value[:1] == "~" else value


def _check_common(values: flags.FlagValues) -> None:
    devices, count, place = values.plan_devices, values.num_processes, values.process_id
    if devices is not None and (devices < 1 or not values.plan):
        raise UsageError(f"--plan_devices={devices}: expected 1 or more, and --plan")
    if (count is None) != (place is None):
        raise UsageError("--num_processes and --process_id belong together: give both or neither")
    if count is not None and place is not None and not 0 <= place < count:
        raise UsageError(
            f"--process_id={place} --num_processes={count}: expected 0 to {count - 1}, each once"
        )
    if count is not None and values.coordinator_address is None:
        raise UsageError(
            "--coordinator_address is missing: HOST:PORT of the process with --process_id=0"
        )


def _join(values: flags.FlagValues, module: types.ModuleType) -> None:
    """Make this process one of several, if the command says so."""
    address = values.coordinator_address
    if address is None:
        return
    if getattr(module, "CHANGEABLE", None) is not None and not getattr(module, "TOGETHER", False):
        raise UsageError(
            f"--experiment={values.experiment} runs in one process: leave out --coordinator_address"
        )
    from flipad_jax import parallel

    try:
        parallel.initialize(
            None if address == "auto" else address, values.num_processes, values.process_id
        )
    except RuntimeError as error:  # A port that is taken, a host that nobody answers at.
        raise UsageError(
            f"--coordinator_address={address}: {' '.join(str(error).split())}"
        ) from error


def _keep_programs(folder: str) -> None:
    """Let JAX keep what it compiles in a folder of this user that is not open to everybody.

    A compiled program that is read is run: who can write there can make this process do anything. A
    group that may is trusted.
    """
    path = Path(folder).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for place in (path, *path.resolve().parents):
        status = place.stat()
        open_to_all = status.st_mode & stat.S_IWOTH
        # In /tmp, whose sticky bit is set, others cannot exchange what is ours.
        if open_to_all and (place == path or not status.st_mode & stat.S_ISVTX):
            raise UsageError(
                f"--compilation_cache={folder}: everybody can write to {place} and could put "
                "programs there that this run executes; give a folder of your own"
            )
    if path.stat().st_uid not in (os.geteuid(), *_TRUSTED):
        raise UsageError(
            f"--compilation_cache={folder} belongs to somebody else; give a folder of your own"
        )
    import jax

    jax.config.update("jax_compilation_cache_dir", str(path))


@contextlib.contextmanager
def _profiled(folder: str | None) -> Iterator[None]:
    """Trace what runs inside, for a minute at most: longer traces no viewer opens."""
    if folder is None:
        yield
        return
    import jax

    from flipad_jax import parallel

    if not parallel.is_main():
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)  # Refused before and not after the work.
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function: ten times the size
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
    stopping = threading.Lock()

    def stop() -> None:
        if stopping.acquire(blocking=False):
            jax.profiler.stop_trace()
            print(f"Trace: {folder}", file=sys.stderr, flush=True)

    timer = threading.Timer(_PROFILED_SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        stop()
        if timer.is_alive():
            timer.join()


def _say_error(error: BaseException) -> str:
    text = str(error).removeprefix("ERROR:: ")
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{os.fspath(error.filename)}: {error.strerror}"
    if not isinstance(error, UsageError | flags.Error):
        text += " (--debug shows where)"
    return " ".join(text.split())


def _flagfiles(argv: Sequence[str]) -> str:
    """Where else than on the command line a refused setting may stand."""
    files = [word.partition("=")[2] for word in argv if re.match("--?flagfile=", word)]
    names = " ".join(", ".join(files).split())
    return f" (settings are also read from {names})" if files else ""


def main(argv: Sequence[str], *, package: str = _PACKAGE) -> int:
    """Run the experiment that the command line names.

    Args:
      argv: the command line, program first.
      package: where the experiments are.

    Returns:
      The exit code, see `EXIT_CODES`.

    Raises:
      Exception: an error of ours, with its trace, which ends the program with 1.
    """
    debug = "--debug" in argv or "--debug=true" in argv
    with _stopping.listening():
        try:
            return _run(argv, package)
        except KeyboardInterrupt as error:
            _say_end("interrupted", error)
            return 128 + signal.SIGINT
        except _stopping.Stopped as error:
            _say_end("stopped by SIGTERM", error)
            return _stopping.EXIT_CODE
        except SystemExit as error:  # Libraries with a handler of their own (Ray) end so.
            if not _stopping.came():
                raise
            _say_end("stopped by SIGTERM", error)
            return _stopping.EXIT_CODE
        except BrokenPipeError:  # The reader of our output, `head` say, has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if _is_preempted(error):
                _say_end("stopped by SIGTERM", error)
                return _stopping.EXIT_CODE
            if out_of_room(error) and not isinstance(error, UsageError):
                if debug:
                    traceback.print_exc()
                _say_end(f"error: nothing more could be written ({_say_error(error)})", error)
                return 74
            if isinstance(error, _USER_ERRORS):
                if debug:
                    traceback.print_exc()
                print(f"error: {_say_error(error)}{_flagfiles(argv)}", file=sys.stderr)
                return 2
            if _stopping.came():  # Workers that the scheduler stopped as well, say.
                traceback.print_exc()
                _say_end("stopped by SIGTERM", error)
                return _stopping.EXIT_CODE
            raise


def _is_preempted(error: Exception) -> bool:
    checkpoints = sys.modules.get("flipad_jax.checkpoints")  # Who raised it has imported it.
    return checkpoints is not None and isinstance(error, checkpoints.Preempted)


def _say_end(what: str, error: BaseException) -> None:
    """One line: what ended the run, and how it goes on."""
    notes = getattr(error, "__notes__", None) or ["nothing was begun; give the same command again"]
    print(f"{what}; {notes[-1]}", file=sys.stderr, flush=True)
