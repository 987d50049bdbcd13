"""What installing and importing the package promises."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Needed at run time though nothing here imports them.
INDIRECT = {
    "chex": "the tests' assertions on trees; optax brings it along anyway",
    "scikit-image": "its photographs are read as files, by data.py",
    "tensorflow-datasets": "one of the fixed set; data.py will read its data sets",
}


def python(script):
    """Run a script in a fresh interpreter in which starting any device is an error."""
    prelude = "import os; os.environ['JAX_PLATFORMS'] = 'no_such_platform'\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_starting_a_device_would_be_noticed():
    done = python("import jax; jax.numpy.zeros(1)")
    assert done.returncode != 0 and "no_such_platform" in done.stderr


def test_import_starts_no_device_defines_no_flag_and_changes_no_setting():
    done = python("""
        import warnings
        import jax
        from absl import flags

        filters, config = list(warnings.filters), dict(jax.config.values)
        import flipad_jax

        assert dict(jax.config.values) == config, "JAX settings changed"
        ours = [m for m in flags.FLAGS.flags_by_module_dict() if m.startswith("flipad_jax")]
        assert not ours, f"flags defined in {ours}"
        assert not flags.FLAGS.is_parsed()
        added = [f for f in warnings.filters if f not in filters and "flipad" in str(f)]
        assert not added, added
        """)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_import_of_every_module_is_light_and_has_what_it_names():
    done = python("""
        import importlib, pkgutil, sys
        import flipad_jax

        names = [m.name for m in pkgutil.walk_packages(flipad_jax.__path__, "flipad_jax.")]
        assert "flipad_jax.inversion.linops" in names
        for name in names:
            module = importlib.import_module(name)
            if not hasattr(module, "__path__"):
                assert module.__all__, f"{name} has no __all__"
            missing = [n for n in getattr(module, "__all__", []) if not hasattr(module, n)]
            assert not missing, f"{name}.__all__ names {missing}"
        heavy = ("matplotlib", "sklearn", "skimage", "orbax", "tensorflow_datasets", "tensorflow")
        heavy += ("torch", "grain", "pywt", "scipy.stats", "ray", "array_record")
        loaded = [name for name in heavy if name in sys.modules]
        assert not loaded, f"imported at module level: {loaded}"
        """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name",
    ["linops", "lasso", "FinalLayer", "invert", "fit", "score", "verdicts", "save", "load"]
    + ["AttributorConfig"],
)
def test_public_names(name):
    import flipad_jax

    assert name in flipad_jax.__all__ and hasattr(flipad_jax, name)


# What setup.cfg says and what the code does.


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return {normalised(re.match(r"[\w.-]+", line.strip())[0]) for line in lines}


def imported(*folders):
    """Distributions that the code of some folders imports, and those imported at module level."""
    owners = importlib.metadata.packages_distributions()
    everywhere, at_top = set(), set()
    local = {"flipad_jax", "experiments", "benchmarks"}
    local |= {path.stem for path in (ROOT / "tests").glob("*.py")}
    for file in [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names):
                if name in local:
                    continue
                found = normalised(owners.get(name, [name])[0])
                everywhere.add(found)
                if node in tree.body:
                    at_top.add(found)
    return everywhere, at_top


def test_dependencies_are_what_the_code_imports(setup_cfg):
    core = requirements(setup_cfg["options"]["install_requires"])
    extras = setup_cfg["options.extras_require"]
    everywhere, at_top = imported("flipad_jax", "experiments")
    optional = requirements(extras["torch"]) | requirements(extras["cluster"])
    assert everywhere - core <= optional, everywhere - core
    assert at_top <= core, "an optional dependency is imported at module level"
    assert core - everywhere - set(INDIRECT) == set(), "nothing imports these"


def test_extras_are_enough_for_tests_and_benchmarks(setup_cfg):
    core = requirements(setup_cfg["options"]["install_requires"])
    extras = setup_cfg["options.extras_require"]
    needed, _ = imported("tests", "benchmarks")
    for extra in ("test", "bench", "cluster"):
        core |= requirements(extras[extra])
    assert needed <= core, needed - core


def test_every_requirement_has_a_lower_bound_that_this_environment_meets(setup_cfg):
    text = setup_cfg["options"]["install_requires"] + setup_cfg["options.extras_require"]["test"]
    for line in filter(str.strip, text.splitlines()):
        name, bound = re.fullmatch(r"([\w.-]+)>=([\d.]+)", line.strip()).groups()
        version = importlib.metadata.version(name)
        numbers = [tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (version, bound)]
        assert numbers[0] >= numbers[1], f"{name} {version} is older than {bound}"


def test_every_data_file_is_installed(setup_cfg):
    patterns = setup_cfg["options.package_data"]["flipad_jax"].split()
    package = ROOT / "flipad_jax"
    installed = {file for pattern in patterns for file in package.glob(pattern)}
    files = {file for file in package.rglob("*") if file.is_file()}
    left = {f for f in files - installed if f.suffix != ".py" and "__pycache__" not in f.parts}
    assert not left, f"no pattern of package_data covers {sorted(left)}"
    # Without __init__.py a folder is no package, and setuptools leaves it out.
    code = {file.parent for file in files if file.suffix == ".py"}
    assert all((folder / "__init__.py").exists() for folder in code), code


def test_pyproject_names_the_build_backend_only():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"^\[.*\]$", text, re.M) == ["[build-system]"]
