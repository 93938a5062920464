"""Several languages: vanilla and inline on English with a little Danish and Swedish.

The corpus was made by data/prepare.py mixed --source=english=... --source=danish=... --source=swedish=...
--weights=8,1,1 --vocab_size=8192 (LOG.md has the texts).
"""
from studies.mix import base

base += " --dataset=mixed"
arms = {"vanilla": "--meta_ratio=0", "inline": "--mix=inline --meta_weight=0.3"}
seeds = [3, 4]
