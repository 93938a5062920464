"""Does it pay to mix meta-learning into pretraining, and how? Ways to mix, and controls, over seeds.

The quick start's model with 4 layers and 4 heads, 400 steps, the docstrings corpus. All arms take 2 + 2
windows of a word: inline finds no more in 16 rows of 128 tokens.
"""
base = """config/train_11m.py --dataset=docstrings --n_way=16 --n_layers=4 --n_heads=4 --n_kv_heads=4
    --block_size=128 --batch_size=16 --lr=3e-3 --max_steps=400 --warmup_steps=50 --eval_interval=100
    --ckpt_interval=400 --k_shot=2 --q_query=2 --episode_len=16 --episodes_per_step=8 --dtype=float32"""
arms = {
    "vanilla": "--meta_ratio=0",
    "vanilla, half the steps": "--meta_ratio=0 --max_steps=200",  # the language-model tokens of alternate
    "vanilla, FLOPs of alternate": "--meta_ratio=0 --max_steps=508",
    "alternate": "--mix=alternate --meta_ratio=0.5",
    "joint": "--mix=joint --meta_weight=0.1",
    "inline": "--mix=inline --meta_weight=0.3",
    "inline, shuffled labels": "--mix=inline --meta_weight=0.3 --shuffle_labels=True",
    "alternate, second order": "--mix=alternate --meta_ratio=0.5 --second_order=True",
    "alternate, multi-task": "--mix=alternate --meta_ratio=0.5 --inner_steps=0",
    "alternate, shuffled labels": "--mix=alternate --meta_ratio=0.5 --shuffle_labels=True",
}
seeds = [3, 4, 5, 6, 7]  # 0 to 2 chose the weights of joint and inline
