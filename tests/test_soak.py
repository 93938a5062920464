"""The faults of soak.py, a few of each. `python tests/soak.py --long` tries them in earnest."""
from conftest import run_many

def test_every_fault_is_survived():
    (done,) = run_many("tests/soak.py", [[]])
    *lines, last = done.stdout.splitlines()
    counts = [line.partition(" tried ")[2].split()[:3:2] for line in lines]  # [tried, survived]
    assert len(counts) == 11 and all(int(tried) == int(survived) > 0 for tried, survived in counts), done
    assert last.startswith("0 not survived") and done.returncode == 0
