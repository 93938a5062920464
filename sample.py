"""Let a trained model write.

    python sample.py out/11m --prompt="Return the sum of"
    python sample.py out/11m --step=500 --temperature=0
    python sample.py folder/of/a/Llama
"""
from dataclasses import dataclass

from plumbing import settings  # before torch: Ctrl-C prints no traceback from here on
from plumbing.files import fail
from plumbing.settings import Count, Prompt, Whole

import torch

from plumbing.checkpoint import load_model

@dataclass
class Config:
    prompt: Prompt = ""  # text to continue; empty begins a new document
    n_samples: Count = 3  # continuations
    n_tokens: Count = 160  # tokens in each; it ends earlier where the model ends the document
    temperature: float = 0.8  # below 1 prefers likely tokens, 0 always takes the likeliest
    top_k: Whole = 50  # sample among the k likeliest tokens; 0 samples among all
    seed: Whole = 0  # same seed, same text
    step: int = -1  # of the checkpoint; -1 takes the newest

RULES = [(lambda c: c.temperature == 0 or c.temperature >= 1e-3, "temperature must be 0 or at least 0.001")]

config, paths = settings.load(Config, __doc__, RULES)
if len(paths) != 1:
    fail("name one run folder: python sample.py out/<run>")
loaded = load_model(paths[0], config.step)
eot = loaded.tokenizer.eot
prompt = [eot, *loaded.tokenizer.encode_ordinary(config.prompt)]  # the model has seen each document after one
generator = torch.Generator().manual_seed(config.seed)
print(f"{paths[0]}, step {loaded.step}")
for _ in range(config.n_samples):
    idx = torch.tensor([prompt])
    idx = loaded.model.generate(idx, config.n_tokens, config.temperature, config.top_k or None, generator)
    ids = idx[0, len(prompt) :].tolist()
    ids = ids[: ids.index(eot)] if eot in ids else ids
    print(f"---\n{config.prompt}{loaded.tokenizer.decode(ids)}")
