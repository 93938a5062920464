"""What adapts, and how often: targets of the inner loop in joint, shares of meta steps in alternate.

The model, steps and windows are those of mix.py. Targets take one episode a step, as they run one by one.
"""
base = """config/train_11m.py --dataset=docstrings --n_way=16 --n_layers=4 --n_heads=4 --n_kv_heads=4
    --block_size=128 --batch_size=16 --lr=3e-3 --max_steps=400 --warmup_steps=50 --eval_interval=200
    --ckpt_interval=400 --k_shot=2 --q_query=2 --episode_len=16 --dtype=float32"""
joint = "--mix=joint --meta_weight=0.1 --meta_ratio=1 --episodes_per_step=1"
arms = {
    "vanilla": "--meta_ratio=0",
    "joint, head": joint,
    "joint, attention": f"{joint} --target=attention",
    "joint, mlp": f"{joint} --target=mlp",
    "joint, norms": f"{joint} --target=norms",
    "alternate, 0.1": "--meta_ratio=0.1 --episodes_per_step=8",
    "alternate, 0.25": "--meta_ratio=0.25 --episodes_per_step=8",
    "alternate, 0.5": "--meta_ratio=0.5 --episodes_per_step=8",
    "alternate, 0.75": "--meta_ratio=0.75 --episodes_per_step=8",
}
seeds = [3, 4]
