"""Around inline: its weight, shots, inner learning rate and inner steps, one at a time."""
from studies.mix import base

base += " --mix=inline --meta_weight=0.3"
arms = {
    "inline": "",
    "weight 0.1": "--meta_weight=0.1",
    "weight 1": "--meta_weight=1",
    "1 shot": "--k_shot=1",
    "3 shots, 1 query": "--k_shot=3 --q_query=1",
    "inner_lr 0.2": "--inner_lr=0.2",
    "inner_lr 2": "--inner_lr=2",
    "3 inner steps": "--inner_steps=3",
    "30 inner steps": "--inner_steps=30",
}
seeds = [3, 4]
