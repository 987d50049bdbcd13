"""Docstrings name the arguments that there are, all of them or none."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for part in ("flipad_jax", "experiments") for path in (ROOT / part).rglob("*.py")]


def arguments(function):
    """Names of a function's arguments, without self."""
    found = function.args
    names = [arg.arg for arg in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    names += [arg.arg for arg in (found.vararg, found.kwarg) if arg]
    return [name for name in names if name not in ("self", "cls")]


def documented(docstring):
    """Names under "Args:", also several on a line; None where there is no such section."""
    lines = docstring.splitlines()
    if "Args:" not in [line.strip() for line in lines]:
        return None
    start = [line.strip() for line in lines].index("Args:")
    indent = len(lines[start]) - len(lines[start].lstrip()) + 2
    names = []
    for line in lines[start + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        found = re.match(rf" {{{indent}}}([*\w][*\w, ]*):( |$)", line)
        if found:
            names += [name.strip().lstrip("*") for name in found[1].split(",")]
    return names


def findings(source):
    """Functions whose docstring names other arguments than they have."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        names = documented(ast.get_docstring(node) or "")
        if names is not None and sorted(names) != sorted(arguments(node)):
            found.append(f"{node.name} (line {node.lineno}): {names}, has {arguments(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_arguments_exist(path):
    assert not findings(path.read_text())


@pytest.mark.parametrize(
    "words", ["a: one.\n      c: two.", "a: one.", "a, b, c: all.", "b, c: no."]
)
def test_a_mistake_would_be_found(words):
    section = "Args:\n      a, b: both.\n    Returns:\n      1\n"
    good = f'def f(self, a, *, b):\n    """Do.\n\n    {section}    """'
    assert not findings(good)
    assert findings(good.replace("a, b: both.", words))
