"""lesson.ipynb: it is stored with its outputs, and runs from top to bottom."""
import ast
import importlib
import json
import shutil

import pytest
from conftest import ROOT

PATH = ROOT / "lesson.ipynb"
CELLS = [cell for cell in json.loads(PATH.read_text("utf8"))["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]

def test_names_exist():
    """What it imports is there, and so is each name of a module of ours that it uses."""
    code = "\n".join(line for source in SOURCES for line in source.splitlines() if not line.startswith("%"))
    modules, tree = {}, list(ast.walk(ast.parse(code)))
    for node in tree:
        for alias in node.names if isinstance(node, ast.Import) else []:
            modules[alias.asname or alias.name] = importlib.import_module(alias.name)
        for alias in node.names if isinstance(node, ast.ImportFrom) else []:
            module = importlib.import_module(node.module)
            if not hasattr(module, alias.name):
                module = importlib.import_module(f"{node.module}.{alias.name}")
            modules[alias.name] = getattr(module, alias.name, module)
    for node in tree:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
    assert {"maml", "smlmt", "spectra", "Llama"} <= set(modules)

def test_outputs_are_stored():
    """As one run from top to bottom left them: pictures, no error, no path of a machine, below 1 MB."""
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    text = PATH.read_text("utf8")
    assert len(text) < 1e6 and not any(path in text for path in ("/tmp/", "/root", "/home/", "/work"))

@pytest.mark.slow
def test_runs(tmp_path):
    """In a copy of the project, which has no runs; the corpus is built if there is none to copy."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns("out", ".*", "tests", "wandb"))
    notebook = nbformat.read(PATH, as_version=4)
    options = {"timeout": 1200, "resources": {"metadata": {"path": tmp_path / "copy"}}}
    nbclient.NotebookClient(notebook, **options).execute()
    printed = {output["text"] for cell in notebook.cells for output in cell.get("outputs", [])
               if output["output_type"] == "stream"}
    assert any("largest difference to the loop above" in text for text in printed)
