"""The 11M model: 96 wide, 12 layers, 12 heads over 4 key/value heads, SwiGLU of 384. It has 11,282,784 parameters with a vocabulary of 50,304 and
2,410,848 with the 4,096 of the default corpus.

On a GPU this is the paper's recipe (Africa et al. 2025); without one, the same model in a version that a laptop finishes within minutes.
"""
import pathlib

import torch

d_model, n_layers, n_heads, n_kv_heads, d_ff = 96, 12, 12, 4, 384
out_dir = "out/11m"
meta_ratio = 0.5  # half of the steps are meta steps; 0 is the vanilla baseline

_large = pathlib.Path(__file__).parents[1] / "data" / "large" / "meta.json"
if torch.cuda.is_available():
    max_steps, lr, warmup_steps = 6000, 3e-4, 2500  # the paper's
    batch_size, block_size, micro_batch_size = 256, 512, 64  # what its run most likely used: 131,072 tokens an LM step
    n_way, k_shot, inner_steps = 32, 4, 10  # the paper's
    episodes_per_step, episode_len, micro_episodes = 8, 128, 2  # 131,072 tokens of support and as many of query a meta step
    if _large.exists():
        dataset = "large"
        print("config  corpus data/large")
    else:
        dataset = "docstrings"
        max_steps, warmup_steps, lr = 600, 100, 2e-3  # 300 LM steps go 8 times over its 5 million tokens
        print("config  corpus docstrings, a small one, with steps to match; to prepare a large one: "
              "python data/prepare.py large --source=FILES --vocab_size=50304")
else:
    dataset = "docstrings"  # English of documentation strings, about 5 million tokens, built on the spot
    batch_size, block_size = 16, 128  # 2,048 tokens a step: at this size many small steps learn more a minute than few large ones
    episodes_per_step, episode_len = 4, 16  # 4,096 tokens of support and of query: many short windows taught more than few long ones (LOG.md)
    max_steps, lr, warmup_steps = 1200, 3e-3, 100  # few steps need a larger lr than the paper's 3e-4, and small models bear it
    eval_interval, ckpt_interval, eval_steps = 250, 500, 16
    expected = "val_loss 4.81 +- 0.04, held-out query accuracy 0.326 +- 0.005 with these settings (three seeds, corpus 08983bb4080b)"
