"""Around inline: its weight, shots, inner learning rate and inner steps, one at a time. See mix.py."""
base = """config/train_11m.py --dataset=docstrings --n_way=16 --n_layers=4 --n_heads=4 --n_kv_heads=4
    --block_size=128 --batch_size=16 --lr=3e-3 --max_steps=400 --warmup_steps=50 --eval_interval=100
    --ckpt_interval=400 --k_shot=2 --q_query=2 --episode_len=16 --episodes_per_step=8 --dtype=float32
    --mix=inline --meta_weight=0.3"""
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
