"""The 65M model: 384 wide, 12 layers, 12 heads over 4 key/value heads, SwiGLU of 1536.

It has 64,595,328 parameters with a vocabulary of 50,304. Sizes, steps and batch are the paper's
(Africa et al. 2025), on a corpus data/large, for one GPU, or for several with torchrun.
"""
d_model, n_layers, n_heads, n_kv_heads, d_ff = 384, 12, 12, 4, 1536
out_dir, dataset = "out/65m", "large"
meta_ratio = 0.5  # half of the steps are meta steps; 0 is the vanilla baseline
max_steps, lr, warmup_steps = 6000, 3e-4, 2500  # the paper's
batch_size, block_size = 256, 512  # most likely the paper's: 131,072 tokens a language-model step
n_way, k_shot, inner_steps = 32, 4, 10  # the paper's
episodes_per_step, episode_len = 8, 128  # 131,072 tokens of support and as many of query a meta step
