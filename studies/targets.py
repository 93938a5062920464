"""What adapts, and how often: targets of the inner loop in joint, shares of meta steps in alternate."""
from studies.mix import base

base += " --eval_interval=200"
joint = "--mix=joint --meta_weight=0.1 --episodes_per_step=1"  # targets run their episodes one by one
arms = {
    "vanilla": "--meta_ratio=0",
    "joint, head": joint,
    "joint, attention": f"{joint} --target=attention",
    "joint, mlp": f"{joint} --target=mlp",
    "joint, norms": f"{joint} --target=norms",
    "alternate, 0.1": "--meta_ratio=0.1",
    "alternate, 0.25": "--meta_ratio=0.25",
    "alternate, 0.5": "--meta_ratio=0.5",
    "alternate, 0.75": "--meta_ratio=0.75",
}
seeds = [3, 4]
