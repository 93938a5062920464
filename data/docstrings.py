"""The documents of the default corpus: documentation strings of installed packages, a document a module.

`python data/prepare.py docstrings` makes it. Source is parsed, never imported: nothing runs.
"""
import ast
import gc
import inspect
import multiprocessing
import os
import re
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from tqdm import tqdm

from plumbing.files import fail

SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}

def read_packages(packages, workers):
    """[(module name, text)] of packages, sorted by name. A long paragraph stays only where it comes first."""
    modules, seen = sorted({module for package in packages for module in modules_of(package)}), set()
    with multiprocessing.Pool(workers, start_worker) as pool:
        texts = pool.imap(read_module, [path for _, path in modules], chunksize=4)
        texts = tqdm(texts, "reading", len(modules), unit=" modules", disable=None)
        texts = ["\n\n".join(unseen_prose(text, seen)) for text in texts]
    return [(name, text) for (name, _), text in zip(modules, texts, strict=True) if text]

def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to workers too
    sys.stderr = open(os.devnull, "w")  # no warnings about others' code, no traceback if killed
    gc.disable()  # syntax trees have no cycles; looking for some takes a third of the time

def modules_of(package):
    """[(module name, path)] of a package, without test modules."""
    folder = root = Path(ast.__file__).parent  # of the standard library
    if package != "stdlib":
        spec = PathFinder.find_spec(package)  # looks past frozen and built-in modules
        origin = Path((spec and spec.origin) or "")
        if origin.suffix != ".py":
            fail(f"no Python source of {package!r} is installed: choose others with --packages=a,b")
        if origin.name != "__init__.py":
            return [(package, origin)]
        folder, root = origin.parent, origin.parents[1]
    modules = {path: path.relative_to(root).with_suffix("").parts for path in folder.rglob("*.py")}
    return [(".".join(parts).removesuffix(".__init__"), path) for path, parts in modules.items()
            if not SKIPPED_FOLDERS.intersection(parts) and not parts[-1].startswith("test_")]

def read_module(path):
    """The documentation in a source file, "" where there is none or the file is for another Python."""
    try:
        text = "\n\n".join(filter(None, documentation(ast.parse(path.read_bytes()))))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    return text.encode("utf-8", "replace").decode()  # literals may hold half a surrogate pair

def documentation(node):
    """Yield the documentation strings of a syntax tree in source order, also of add_docstr(f, "...")."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield ast.get_docstring(node) or ""
    elif isinstance(node, (ast.Assign, ast.Expr)):
        names = map(last_name, [node.value, *getattr(node, "targets", ())])
        if any("doc" in name or name == "topics" for name in names):  # topics: in pydoc_data
            for text in ast.walk(node.value):
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and "\n" in text.value:
                    yield inspect.cleandoc(text.value)
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            yield from documentation(child)

def last_name(node):
    """`docs` for the expression pandas.docs["merge"], `add_docstr` for add_docstr(x, "..."), or ""."""
    while isinstance(node, (ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "attr", getattr(node, "id", ""))

def unseen_prose(text, seen):
    """Yield the paragraphs that are no doctest (>>>) and, if long, not in the set `seen`, which grows."""
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.lstrip().startswith(">>>") and (len(paragraph) <= 80 or paragraph not in seen):
            seen.add(paragraph)
            yield paragraph
