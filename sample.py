"""Let a trained model write.

    python sample.py out/11m --prompt="Return the sum of"
    python sample.py out/11m --step=500 --temperature=0
"""
import os
import sys
from dataclasses import dataclass

import torch

import configurator
from runs import decode, fail, load_model


@dataclass
class Config:
    prompt: str = ""  # text to go on from; empty begins a new document
    n_samples: int = 3  # continuations
    n_tokens: int = 160  # tokens in each; it ends earlier where the model ends the document
    temperature: float = 0.8  # below 1 is bolder about likely tokens, 0 always takes the likeliest
    top_k: int = 50  # sample among the k likeliest tokens; 0 samples among all
    seed: int = 0  # same seed, same text
    step: int = -1  # of the checkpoint; -1 takes the newest


config, rest = configurator.load(Config, sys.argv[1:], __doc__)
if len(rest) != 1 or not os.path.isdir(rest[0]):
    fail(f"name one run folder: python sample.py out/<run> ({'nothing given' if not rest else ' '.join(rest) + ' is none'})")
if config.n_samples < 1 or config.n_tokens < 1 or config.top_k < 0 or not 0 <= config.seed < 2**63:
    fail("n_samples and n_tokens must be at least 1; top_k and seed must not be negative")
if not (config.temperature == 0 or 1e-3 <= config.temperature < 1e6):
    fail(f"temperature = {config.temperature}: 0 takes the likeliest token, else it lies between 0.001 and 1,000,000")

model, encoding, checkpoint = load_model(rest[0], None if config.step == -1 else config.step)
end = encoding.encode_single_token("<|endoftext|>")
prompt = [end] + encoding.encode_ordinary(config.prompt)  # documents follow an end-of-text, so the model knows that something begins here
generator = torch.Generator().manual_seed(config.seed)
print(f"{rest[0]}, step {checkpoint['step']}")
for _ in range(config.n_samples):
    idx = torch.tensor([prompt])
    ids = model.generate(idx, config.n_tokens, config.temperature, config.top_k or None, generator)[0, len(prompt) :].tolist()
    ids = ids[: ids.index(end)] if end in ids else ids
    print(f"---\n{config.prompt}{decode(encoding, ids)}")
