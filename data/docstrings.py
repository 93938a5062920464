"""The documents of the default corpus: the documentation strings of installed packages, a document a module.

Source is parsed, never imported: nothing runs, and the order is always the same.
"""
import ast
import gc
import inspect
import os
import re
import signal
import sysconfig
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.machinery import PathFinder
from multiprocessing import parent_process
from pathlib import Path

from tqdm import tqdm

from plumbing.files import fail, on_signals

SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}

def read_packages(packages, workers):
    """[(module name, text)] of packages, sorted by name. A long paragraph stays only where it comes first."""
    modules = sorted({module for package in packages for module in modules_of(package)})
    seen, documents = set(), []
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        texts = pool.map(read_module, [path for _, path in modules], chunksize=4)
        texts = tqdm(texts, "reading", len(modules), unit=" modules", disable=None)
        try:
            for (name, _), text in zip(modules, texts, strict=True):
                text = "\n\n".join(unseen_prose(text, seen))
                if text:
                    documents.append((name, text))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # or leaving the `with` would first read the rest
            raise
    return documents

def start_worker():
    """Set up a process that reads modules. It leaves Ctrl-C to its parent and never outlives it."""
    on_signals(signal.SIG_IGN)  # a terminal sends them to workers too
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # about escapes in other people's strings
    gc.disable()  # syntax trees have no cycles; looking for some takes a third of the time

def end_with_parent():
    parent_process().join()
    os._exit(1)

def modules_of(package):
    """[(module name, path)] of a package, without test modules."""
    if package == "stdlib":
        folder = root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = PathFinder.find_spec(package)  # looks past frozen and built-in modules
        if spec is None or not (spec.origin or "").endswith(".py"):
            fail(f"no Python source of {package!r} is installed: choose others with --packages=a,b")
        if not spec.submodule_search_locations:
            return [(package, Path(spec.origin))]
        folder, root = Path(spec.origin).parent, Path(spec.origin).parents[1]
    modules = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts) and not parts[-1].startswith("test_"):
            modules.append((".".join(parts).removesuffix(".__init__"), path))
    return modules

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
