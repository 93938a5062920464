"""The forks of the README: each patch applies to the files as they are, and what it makes is right."""
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, checkpoint, log_of, run_many

WORDS = """--d_model=16 --n_layers=2 --n_heads=2 --n_kv_heads=1 --d_ff=24 --block_size=16 --batch_size=4
    --max_steps=2 --lr=1e-9 --warmup_steps=1 --eval_steps=1 --compile=False --dtype=float32 --meta_ratio=1
    --n_way=4 --k_shot=2 --q_query=2 --episode_len=20 --inner_lr=0.5 --inner_steps=2
    --word_min_count=200""".split()  # too many for episodes in evaluations, which take long

def forked(folder, name):
    """A copy of the code with a patch applied."""
    patch = ROOT / "forks" / f"{name}.patch"
    assert len(patch.read_text().splitlines()) <= 30
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for inner in ("plumbing", "config"):
        shutil.copytree(ROOT / inner, folder / inner)
    subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    return folder

def meta_steps(script, here, data_dir, cases, **options):
    """The losses of the episodes of runs and the norms of their gradients, by name."""
    base, steps = [*WORDS, f"--data_dir={data_dir}"], {}
    words = [[*base, f"--out_dir={here / name}", *cases[name]] for name in cases]
    results = run_many(script, words, **options)
    assert [done.stderr for done in results] == [""] * len(cases)
    for name in cases:
        lines = log_of(here / name, "meta")
        steps[name] = [line[key] for line in lines for key in ("meta_loss", "grad_norm")]
    return steps

def test_lora(data_dir, tmp_path):
    """At a target_lr near 0 the head adapts alone; at a larger one the products do, not as matrices would."""
    still, moving = ["--target=attention", "--target_lr=1e-12"], ["--target=attention", "--target_lr=10"]
    steps = meta_steps(ROOT / "train.py", tmp_path, data_dir, {"head": [], "whole": moving}, report=False)
    fork = forked(tmp_path / "fork", "lora") / "train.py"
    steps |= meta_steps(fork, tmp_path, data_dir, {"still": still, "moving": moving})
    assert steps["still"] == pytest.approx(steps["head"], rel=1e-5)
    for other in ("head", "whole"):
        assert all(abs(a - b) > 1e-4 for a, b in zip(steps["moving"], steps[other], strict=True))

def test_prototypes(tmp_path):
    """One step of lr = N from zero gives the class means; the loss is of a softmax over distances to them."""
    fork = forked(tmp_path / "fork", "prototypes")
    (fork / "program.py").write_text("""import sys, torch, maml
support, query = torch.load(sys.argv[1])
labels = torch.arange(3).repeat_interleave(4)[None]
loss, numbers = maml.episode_loss(maml.init_head(5, 3), support, labels, query, labels, lr=3.0, steps=1)
print(loss.item(), numbers["query_acc"].mean().item())
""")
    support, query = torch.randn(2, 1, 12, 5, generator=torch.Generator().manual_seed(0))
    torch.save((support, query), fork / "features.pt")
    (done,) = run_many(fork / "program.py", [[fork / "features.pt"]])
    labels = torch.arange(3).repeat_interleave(4)
    x, means = query[0] / 5**0.5, (support[0] / 5**0.5).view(3, 4, 5).mean(1)
    likelihood = (-5 * (x[:, None] - means).square().sum(-1)).softmax(-1)[range(12), labels]
    accuracy = (torch.cdist(x, means).argmin(1) == labels).float().mean().item()
    expected = [-likelihood.log().mean().item(), accuracy]
    assert [float(word) for word in done.stdout.split()] == pytest.approx(expected, rel=1e-4), done.stderr

def test_meta_sgd(data_dir, tmp_path):
    """Rates begin at lr, have the gradient of finite differences, and are trained and saved."""
    fork = forked(tmp_path / "fork", "meta_sgd")
    (fork / "program.py").write_text("""import torch, maml
random = torch.Generator().manual_seed(0)
x, z = torch.randn(2, 1, 6, 5, dtype=torch.float64, generator=random)
labels = torch.arange(3).repeat_interleave(2)[None]
head = {name: p.double() for name, p in maml.init_head(5, 3, layers=2, hidden=4, generator=random).items()}
rate = head["1.weight.rate"].requires_grad_()
def loss():
    return maml.episode_loss(head, x, labels, z, labels, lr=2.0, steps=3, first_order=False)[0]
(gradient,) = torch.autograd.grad(loss(), rate)
with torch.no_grad():
    rate[2, 3] += 1e-5
    above = loss()
    rate[2, 3] -= 2e-5
    print(gradient[2, 3].item(), ((above - loss()) / 2e-5).item())
    rate[2, 3] += 1e-5
    fresh = maml.fresh_head(head, 7)
    print(sorted(set(head) ^ set(fresh)), fresh["1.weight.rate"].shape == fresh["1.weight"].shape == (7, 4))
    plain = {name: p for name, p in head.items() if "rate" not in name}  # a run of the code without the patch
    print(maml.fresh_head(plain, 7).keys() == plain.keys())
""")
    (done,) = run_many(fork / "program.py", [[]])
    first, *others = done.stdout.splitlines()
    analytic, numeric = map(float, first.split())
    assert abs(analytic) > 1e-4 and analytic == pytest.approx(numeric, rel=1e-3)
    assert others == ["[] True", "True"]
    plain = meta_steps("train.py", tmp_path, data_dir, {"plain": []}, report=False)["plain"]
    words = ["--lr=0.01", "--ckpt_interval=1"]
    learned = meta_steps(fork / "train.py", tmp_path, data_dir, {"learned": words})["learned"]
    assert learned[0] == pytest.approx(plain[0], rel=1e-6)  # at the first step all rates are lr
    first, second = (checkpoint(tmp_path / "learned", step).head["0.weight.rate"] for step in (1, 2))
    assert first.abs().max() > 0.001 and not torch.equal(first, second)
