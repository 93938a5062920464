"""Who imports whom: concepts stand alone, plumbing knows the model only, and no script imports a script."""
import ast

from conftest import ROOT

CONCEPTS = {"model", "smlmt", "maml", "spectra"}
ALLOWED = {path.stem: CONCEPTS | {"config", "plumbing"} for path in ROOT.glob("*.py")}  # a script's
ALLOWED |= {"docstrings": {"plumbing"}, "prepare": {"docstrings", "plumbing"}}
ALLOWED |= {path.stem: {"model", "plumbing"} for path in (ROOT / "plumbing").glob("*.py")}
ALLOWED |= dict.fromkeys(CONCEPTS, set()) | {"bench": set(ALLOWED) | {"config", "plumbing"}}

def test_imports():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("data/*.py")]:
        tree = ast.parse(path.read_text())
        nodes = tree.body if path.stem in CONCEPTS else ast.walk(tree)  # its command line may
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        ours = {name.split(".")[0] for name in names} & ({*ALLOWED, "plumbing", "config"} - {"__init__"})
        assert ours <= ALLOWED[path.stem], f"{path.stem} imports {ours - ALLOWED[path.stem]}"
