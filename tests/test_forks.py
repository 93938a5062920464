"""The two forks of the README: each patch applies to the files as they are, and what it makes of them is right."""
import json
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, run_many

WORDS = (
    "--d_model=16 --n_layers=2 --n_heads=2 --n_kv_heads=1 --d_ff=24 --block_size=16 --batch_size=4 --max_steps=2 --lr=1e-9 "
    "--warmup_steps=1 --eval_steps=1 --compile=False --dtype=float32 --meta_ratio=1 --n_way=4 --k_shot=2 --q_query=2 "
    "--episode_len=20 --inner_lr=2 --inner_steps=2"
).split()


def forked(folder, name):
    """A copy of the code with a patch of the README applied."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    patch = ROOT / "forks" / f"{name}.patch"
    assert len(patch.read_text().splitlines()) <= 30
    subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    return folder


def meta_steps(script, here, data_dir, cases):
    """The losses of the episodes of runs and the norms of their gradients, by name."""
    words = [[*WORDS, f"--data_dir={data_dir}", f"--out_dir={here / name}", *more] for name, more in cases.items()]
    for done in run_many(script, words):
        assert done.returncode == 0, done.stderr
    logs = {name: map(json.loads, (here / name / "log.jsonl").read_text().splitlines()) for name in cases}
    return {name: [line[key] for line in log if line["kind"] == "meta" for key in ("meta_loss", "grad_norm")] for name, log in logs.items()}


def test_lora(data_dir, tmp_path):
    """At a target_lr of nearly 0 it is the head that adapts, alone; at a larger one the low-rank products do too, but not as whole matrices would."""
    still, moving = ["--target=attention", "--target_lr=1e-12"], ["--target=attention", "--target_lr=10"]
    steps = meta_steps(ROOT / "train.py", tmp_path, data_dir, {"head": [], "whole": moving})
    steps |= meta_steps(forked(tmp_path / "fork", "lora") / "train.py", tmp_path, data_dir, {"still": still, "moving": moving})
    assert steps["still"] == pytest.approx(steps["head"], rel=1e-5)
    assert all(abs(a - b) > 1e-4 for other in ("head", "whole") for a, b in zip(steps["moving"], steps[other], strict=True))


def test_prototypes(tmp_path):
    """One inner step with lr = 1 from zero gives the class means, and the query loss is that of a softmax over squared distances to them."""
    program = """
import sys, torch, maml
support, query = torch.load(sys.argv[1], weights_only=True)
labels = torch.arange(3).repeat_interleave(4)[None]
head = maml.init_head(5, 3)
loss, numbers = maml.episode_loss(head, support, labels, query, labels, lr=1.0, steps=1)
print(loss.item(), numbers["query_acc"].item())
"""
    fork = forked(tmp_path / "fork", "prototypes")
    (fork / "program.py").write_text(program)
    support, query = torch.randn(2, 1, 12, 5, generator=torch.Generator().manual_seed(0)).unbind()
    torch.save((support, query), fork / "features.pt")
    (done,) = run_many(fork / "program.py", [[fork / "features.pt"]])
    assert done.returncode == 0, done.stderr
    x, means = query[0] / 5**0.5, (support[0] / 5**0.5).view(3, 4, 5).mean(1)
    likelihood = (-5 * (x[:, None] - means).square().sum(-1)).softmax(-1)[range(12), torch.arange(3).repeat_interleave(4)]
    nearest = torch.cdist(x, means).argmin(1) == torch.arange(3).repeat_interleave(4)
    assert [float(word) for word in done.stdout.split()] == pytest.approx([-likelihood.log().mean().item(), nearest.float().mean().item()], rel=1e-4)
