"""Several languages: vanilla and inline on English with a little Danish and Swedish. See mix.py.

The corpus was made by data/prepare.py mixed --source=english=... --source=danish=... --source=swedish=...
--weights=8,1,1 --vocab_size=8192 (LOG.md has the texts).
"""
base = """config/train_11m.py --dataset=mixed --n_way=16 --n_layers=4 --n_heads=4 --n_kv_heads=4
    --block_size=128 --batch_size=16 --lr=3e-3 --max_steps=400 --warmup_steps=50 --eval_interval=100
    --ckpt_interval=400 --k_shot=2 --q_query=2 --episode_len=16 --episodes_per_step=8 --dtype=float32"""
arms = {"vanilla": "--meta_ratio=0", "inline": "--mix=inline --meta_weight=0.3 --meta_ratio=1"}
seeds = [3, 4]
