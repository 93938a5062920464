"""The 11M model: 96 wide, 12 layers, 12 heads over 4 key/value heads, SwiGLU of 384.

It has 11,282,784 parameters with a vocabulary of 50,304, and 2,410,848 with the 4,096 of the default corpus.
On a GPU sizes, steps and batch are the paper's (Africa et al. 2025). Without a GPU it trains within minutes.
"""
import pathlib
import sys

import torch

from plumbing import machine

d_model, n_layers, n_heads, n_kv_heads, d_ff = 96, 12, 12, 4, 384
out_dir = "out/11m"
meta_ratio = 0.5  # half of the steps are meta steps; 0 is the vanilla baseline

_large = pathlib.Path(__file__).parents[1] / "data" / "large" / "meta.json"
if torch.cuda.is_available() and "--device=cpu" not in sys.argv:
    max_steps, lr, warmup_steps = 6000, 3e-4, 2500  # the paper's
    batch_size, block_size = 256, 512  # most likely the paper's: 131,072 tokens a language-model step
    n_way, k_shot, inner_steps = 32, 4, 10  # the paper's
    episodes_per_step, episode_len = 8, 128  # 131,072 tokens of support and as many of query a meta step
    if _large.exists():
        dataset = "large"
    else:
        print("config  no corpus data/large: taking docstrings, a small one, and few steps", file=sys.stderr)
        dataset = "docstrings"
        max_steps, warmup_steps, lr = 600, 100, 2e-3  # 300 LM steps read its 5 million tokens 8 times
else:
    dataset = "docstrings"  # about 5 million tokens of documentation, built on the spot
    batch_size, block_size = 16, 128  # many small steps learn more a minute than few large ones
    episodes_per_step, episode_len = 4, 16  # many short windows taught more than few long ones (LOG.md)
    max_steps, lr, warmup_steps = 1200, 3e-3, 100  # few steps need a larger lr than the paper's
    if machine.choose_dtype("auto", torch.device("cpu")) == torch.float32:
        max_steps = 450  # without bfloat16 a step takes four times as long; --max_steps=1200 takes all
