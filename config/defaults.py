"""Every setting of train.py: its name, type, default and meaning, as `python train.py --help` prints them."""
from dataclasses import dataclass
from typing import Literal

from plumbing.files import ROOT
from plumbing.settings import Count, Positive, Share, Whole

@dataclass
class Config:
    # Run
    out_dir: str = "out/run"  # the run folder; each run has its own
    dataset: str = "docstrings"  # name of a prepared corpus; docstrings is built when it is missing
    data_dir: str = str(ROOT / "data")  # where the prepared corpora are
    seed: Whole = 0  # of the initial weights and of all random choices
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute; auto finds a GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matmuls; float32 is TF32 on GPUs
    compile: bool = True  # torch.compile the block and the loss, where the machine has a compiler
    resume: bool = False  # continue from the newest checkpoint in out_dir
    wandb: bool = False  # also log to Weights & Biases; WANDB_MODE=offline keeps it for `wandb sync`
    wandb_project: str = "nanomaml"  # name of the Weights & Biases project
    # Model
    d_model: Count = 96  # width of the residual stream
    n_layers: Count = 12  # transformer blocks
    n_heads: Count = 12  # query heads
    n_kv_heads: Count = 4  # key/value heads
    d_ff: Count = 384  # hidden width of the SwiGLU
    block_size: Count = 512  # tokens of a row, a training sequence
    # Optimization
    batch_size: Count = 64  # rows in a language-model step, over all processes
    micro_batch_size: Whole = 0  # rows at a time in a process; 0: all that fit in half a GPU's memory
    max_steps: Count = 6000  # optimizer steps of any kind
    lr: Positive = 3e-4  # peak learning rate of AdamW, the outer loop
    warmup_steps: Whole = 2500  # steps from 0 to the peak
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of lr after warm-up; linear, cosine: to 0
    weight_decay: Share = 0.1  # on matrices only
    grad_clip: Positive = 1.0  # largest norm of the gradient
    # Episodes
    mix: Literal["alternate", "joint", "inline"] = "alternate"  # a coin; both losses; both, on the same rows
    meta_ratio: Share = 0.0  # share of meta steps (paper: 0.5); 0: none, vanilla. joint, inline: any above 0
    meta_weight: float = 0.1  # weight of the meta loss in joint and inline
    n_way: Count = 16  # words to tell apart in an episode
    k_shot: Count = 4  # support windows of each word
    q_query: Count = 4  # query windows of each word
    episodes_per_step: Count = 1  # episodes in a step that has any, over all processes
    micro_episodes: Whole = 0  # episodes at a time in a process, evaluations too; 0: all that fit; inline: 1
    episode_len: Count = 64  # longest window in tokens; independent of block_size
    readout: Literal["before", "mask", "last"] = "before"  # the token whose features are read
    word_min_count: Count = 20  # least occurrences of a word in the pool
    word_max_count: Count = 5000  # most occurrences of a word
    pool_tokens: Count = 10_000_000  # tokens that episodes are drawn from; redrawn every 1,000 steps
    on_collapse: Literal["off", "stop", "vanilla", "meta"] = "off"  # at a collapse: stop, meta off, meta on
    # Inner loop
    inner_steps: Whole = 10  # gradient steps on the support set; 0 is the multi-task control
    inner_lr: Positive = 0.625  # of the head: last layer at this * n_way (one shot: half), others at this / 2
    second_order: bool = False  # differentiate through the inner gradients
    target: Literal["head", "attention", "mlp", "attention+mlp", "norms", "all"] = "head"  # what adapts
    target_layers: str = ""  # blocks that adapt, as 0,1,5; empty: all (norms, all: the final norm too)
    target_lr: Positive = 0.01  # inner learning rate of the target's parameters; inner_lr is the head's
    head_layers: Count = 1  # linear layers of the head that adapts; the paper has 4
    head_hidden: Count = 128  # width of the head's hidden layers
    shuffle_labels: bool = False  # control: permute support labels, so that the support set teaches nothing
    # Evaluation and checkpoints
    eval_interval: Count = 250  # steps between evaluations
    eval_steps: Count = 16  # batches in an evaluation, evenly spaced over the validation text
    ckpt_interval: Count = 500  # steps between checkpoints
    log_interval: Count = 1  # steps between printed lines; log.jsonl has every step

RULES = [  # (what must hold, the sentence that says so); an error shows the settings that the sentence names
    (lambda c: c.out_dir, "out_dir must name a folder"),
    (lambda c: c.lr < 1, "lr must be below 1; the paper has 3e-4"),
    (lambda c: c.d_model % (2 * c.n_heads) == 0, "d_model must divide into n_heads heads of an even width"),
    (lambda c: c.n_heads % c.n_kv_heads == 0, "n_kv_heads must divide n_heads"),
    (lambda c: c.n_way >= 2, "n_way must be at least 2"),
    (lambda c: c.episode_len >= 16, "episode_len must be at least 16"),
    (lambda c: c.inner_lr < 4, "inner_lr must be below 4; it is multiplied by n_way: 0.625 is 10 at 16 ways"),
    (lambda c: set(c.target_layers.split(",")) <= {"", *map(str, range(c.n_layers))},
     "target_layers are numbers of blocks below n_layers, as 0,1,5; empty is all"),
    (lambda c: c.target != "head" or not c.target_layers, "target_layers needs a target in the blocks"),
    (lambda c: c.target == "head" or c.inner_steps, "target does not adapt when inner_steps is 0"),
    (lambda c: c.meta_ratio or c.readout != "mask",
     "readout=mask needs a meta_ratio above 0, since only meta steps show <|mask|> to the model"),
    (lambda c: c.meta_weight >= 0, "meta_weight must be 0 or more"),
    (lambda c: c.mix == "alternate" or c.meta_ratio, "mix=joint and mix=inline need a meta_ratio above 0"),
    (lambda c: c.mix != "inline" or (c.target, c.readout, c.micro_batch_size) == ("head", "before", 0),
     "mix=inline reads a step's own rows: it needs target=head, readout=before and micro_batch_size=0"),
    (lambda c: c.meta_ratio or c.on_collapse in ("off", "stop"),
     "on_collapse switches meta steps on or off, but meta_ratio has none"),
    (lambda c: c.on_collapse == "off" or c.max_steps - c.warmup_steps >= 11 * c.eval_interval,
     "on_collapse needs 12 evaluations after warmup_steps; lower eval_interval"),
]
