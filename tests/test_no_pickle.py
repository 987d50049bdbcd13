"""No file is ever unpickled, and no text becomes code: read off the source of every module."""

import ast
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *sorted((ROOT / "flipad_jax").rglob("*.py")),
    *sorted((ROOT / "experiments").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    ROOT / "run.py",
]

# Modules that turn bytes into objects by running what the bytes say.
UNPICKLERS = {"pickle", "_pickle", "cPickle", "pickletools", "marshal", "shelve", "dill"}
UNPICKLERS |= {"cloudpickle", "joblib", "jsonpickle", "copyreg", "yaml"}
# Of these, what reads nothing.
HARMLESS = {"pickle.UnpicklingError"}
# Readers that unpickle unless they are told not to.
TOLD = {
    "numpy.load": ("allow_pickle", False),
    "numpy.lib.format.read_array": ("allow_pickle", False),
    "numpy.lib.npyio.NpzFile": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pandas.read_pickle"}
FORBIDDEN |= {"torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"}
FORBIDDEN |= {"numpy.lib.format.open_memmap", "runpy.run_path", "runpy.run_module"}
FORBIDDEN |= {"scipy.io.loadmat", "sklearn.datasets.fetch_openml"}


def name_of(node, aliases):
    """The dotted name of an expression, with what import statements say of its beginning."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ".".join(["?", *reversed(parts)])
    return ".".join([aliases.get(node.id, node.id), *reversed(parts)])


def findings(source):
    """What a module does that could unpickle or run text, one line each."""
    tree = ast.parse(source)
    aliases, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name if alias.asname else alias.name.partition(".")[0]
                aliases[alias.asname or first] = first
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = name_of(node, aliases)
            if name.partition(".")[0] in UNPICKLERS and "." in name and name not in HARMLESS:
                found.append(f"line {node.lineno}: {name}")
            if name.endswith((".read_pickle", ".Unpickler")) or name in FORBIDDEN:
                found.append(f"line {node.lineno}: {name}")
        if isinstance(node, ast.Name) and node.id in TOLD:
            found.append(f"line {node.lineno}: {node.id}")
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func, aliases)
        if name in TOLD:
            keyword, value = TOLD[name]
            given = {k.arg: k.value for k in node.keywords}
            told = given.get(keyword)
            if not isinstance(told, ast.Constant) or told.value is not value:
                found.append(f"line {node.lineno}: {name} without {keyword}={value}")
        shell = {k.arg: k.value for k in node.keywords}.get("shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            found.append(f"line {node.lineno}: {name} with a shell")
    # A reader that is passed on is called where nobody sees with what.
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in calls:
            if name_of(node, aliases) in TOLD:
                found.append(f"line {node.lineno}: {name_of(node, aliases)} passed on")
    return sorted(set(found))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path):
    assert findings(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "import pickle as p\np.loads(b'')",
        "from pickle import loads\nloads(b'')",
        "from pickle import Unpickler as U\nU(file)",
        "import _pickle\n_pickle.load(file)",
        "import marshal\nmarshal.load(file)",
        "import shelve\nshelve.open('x')",
        "import joblib\njoblib.load('x')",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "from numpy import load\nload('x')",
        "import numpy as np\nread = np.load",
        "import numpy as np\nwith np.load('x', 'r') as f: pass",
        "import numpy as np\nnp.lib.format.read_array(file)",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\nmap(torch.load, files)",
        "import torch\ntorch.jit.load('x')",
        "import pandas as pd\npd.read_pickle('x')",
        "eval('1')",
        "exec(text)",
        "__import__(name)",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "def f():\n    import pickle\n    return pickle.load",
    ],
)
def test_every_way_would_be_seen(source):
    assert findings(source)


def test_what_is_told_not_to_is_let_through():
    assert not findings(textwrap.dedent("""
        import pickle
        import numpy as np
        import torch

        try:
            with np.load("x", allow_pickle=False) as file:
                torch.load("x", weights_only=True)
        except pickle.UnpicklingError:
            re.compile("x")
        """))
