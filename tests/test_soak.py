"""The faults of soak.py, a few of each. `python tests/soak.py --long` tries them in earnest."""
from conftest import run_script


def test_every_fault_is_survived():
    lines = run_script("tests/soak.py").stdout.splitlines()
    told = [line.partition(" tried ")[2].split()[:3:2] for line in lines if " tried " in line]  # [tried, survived]
    assert len(told) == 34 and all(int(tried) == int(survived) > 0 for tried, survived in told) and lines[-1].startswith("0 not survived"), lines
