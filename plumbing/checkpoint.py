"""A checkpoint is a folder that Hugging Face's libraries open; and any folder with a Llama opens here.

    model = AutoModelForCausalLM.from_pretrained("out/11m/step_001200")     # theirs opens ours
    loaded = load_model("out/11m"), load_model("folder/of/a/Llama")         # ours opens both

Checkpoints are data: only safetensors and JSON are read, nothing is unpickled, no code of a checkpoint runs.
"""
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from model import Llama, ModelConfig
from plumbing.files import attempt, fail, read_json, sha256_of
from plumbing.tokenizer import hf_files, load_tokenizer

NAMES = {  # ours: (Hugging Face's, pico-decoder's); {i} is the number of a block
    "embedding": ("model.embed_tokens", "embedding_proj"),
    "blocks.{i}.attention_norm": ("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
    "blocks.{i}.attention.q_proj": ("model.layers.{i}.self_attn.q_proj", "layers.{i}.attention.q_proj"),
    "blocks.{i}.attention.k_proj": ("model.layers.{i}.self_attn.k_proj", "layers.{i}.attention.k_proj"),
    "blocks.{i}.attention.v_proj": ("model.layers.{i}.self_attn.v_proj", "layers.{i}.attention.v_proj"),
    "blocks.{i}.attention.o_proj": ("model.layers.{i}.self_attn.o_proj", "layers.{i}.attention.o_proj"),
    "blocks.{i}.mlp_norm": ("model.layers.{i}.post_attention_layernorm", "layers.{i}.swiglu_norm"),
    "blocks.{i}.mlp.gate": ("model.layers.{i}.mlp.gate_proj", "layers.{i}.swiglu.w_0"),
    "blocks.{i}.mlp.up": ("model.layers.{i}.mlp.up_proj", "layers.{i}.swiglu.w_1"),
    "blocks.{i}.mlp.down": ("model.layers.{i}.mlp.down_proj", "layers.{i}.swiglu.w_2"),
    "norm": ("model.norm", "output_norm"), "unembedding": ("lm_head", "de_embedding_proj")}
SHAPE = {  # the same for config.json
    "d_model": ("hidden_size", "d_model"), "n_layers": ("num_hidden_layers", "n_layers"),
    "n_heads": ("num_attention_heads", "attention_n_heads"),
    "n_kv_heads": ("num_key_value_heads", "attention_n_kv_heads"),
    "d_ff": ("intermediate_size", "activation_hidden_dim"), "vocab_size": ("vocab_size", "vocab_size"),
    "block_size": ("max_position_embeddings", "max_seq_len"), "norm_eps": ("rms_norm_eps", "norm_eps"),
    "rope_theta": ("rope_theta", "position_emb_theta")}

def their_names(n_layers, pico=False):
    """{our name of a tensor: theirs} of a model of n_layers blocks. Names without {i} are made repeatedly."""
    return {f"{ours}.weight".format(i=i): f"{theirs[pico]}.weight".format(i=i)
            for i in range(n_layers) for ours, theirs in NAMES.items()}

# --------------------------------------------------------------------------------------------------
# Writing

def checkpoints(run):
    """The checkpoints of a run folder by step, ascending: {600: "out/11m/step_000600", ...}."""
    paths = {path.name[5:]: str(path) for path in Path(run).glob("step_*/")}
    return dict(sorted((int(step), path) for step, path in paths.items() if step.isdecimal()))

def save_checkpoint(run, step, model, head, moments, tokenizer, spectra, state):
    """Write a checkpoint beside its name and rename it into place. Only the newest two keep their optimizer.

    head, moments: dicts of tensors. spectra: a dict of arrays. state: what state.json says besides hashes.
    """
    path, work = f"{run}/step_{step:06d}", f"{run}/step_{step:06d}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    names = their_names(model.config.n_layers)
    weights = {names[ours]: p for ours, p in model.state_dict().items()}
    for name, tensors in (("model", weights), ("head", head), ("optimizer", moments)):
        save_file(tensors, f"{work}/{name}.safetensors", {"format": "pt"})
    np.savez(f"{work}/spectra.npz", **spectra)
    special = {f"{kind}_token_id": tokenizer.eot for kind in ("bos", "eos", "pad")}
    card = CARD.format(name=os.path.basename(run), step=step, **state["settings"], **state["progress"])
    texts = hf_files(tokenizer, model.config.block_size) | {
        "config.json": json.dumps(hf_config(model.config) | special, indent=2),
        "generation_config.json": json.dumps(special), "README.md": card}
    for name, text in texts.items():
        Path(work, name).write_text(text, "utf8")
    sha256 = {name: sha256_of(f"{work}/{name}") for name in sorted(os.listdir(work))}
    Path(work, "state.json").write_text(json.dumps(state | {"step": step, "sha256": sha256}, indent=1))
    for name in os.listdir(work):
        with open(f"{work}/{name}", "rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
    shutil.rmtree(path, ignore_errors=True)  # damaged, or from before the run was resumed at an earlier step
    os.rename(work, path)
    for older in list(checkpoints(run).values())[:-2]:  # the newest two can be resumed from
        Path(older, "optimizer.safetensors").unlink(missing_ok=True)

def hf_config(shape):
    """config.json of a LlamaForCausalLM of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        **{theirs: getattr(shape, ours) for ours, (theirs, _) in SHAPE.items()},
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "head_dim": shape.d_model // shape.n_heads, "tie_word_embeddings": False}  # else Llama's defaults

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [nanomaml, maml, smlmt]
---

# {name}
A Llama decoder after {step:,} steps of nanoMAML: next-token prediction on {lm_tokens:,} tokens, and MAML on
few-shot tasks of {episode_tokens:,} (arXiv 2508.02189; meta_ratio = {meta_ratio:g}). All settings are in
state.json. A text is read after an <|endoftext|>. head.safetensors, where the inner loop starts, takes the
last hidden states, after the final norm, divided by the square root of their width.
"""

# --------------------------------------------------------------------------------------------------
# Reading

class Loaded(NamedTuple):
    path: str  # the folder that was opened
    model: Llama  # in evaluation mode
    tokenizer: object  # see plumbing/tokenizer.py
    head: dict  # where the inner loop starts; {} for a model of others
    settings: dict  # of train.py; {} for a model of others
    step: int
    progress: dict  # budgets spent so far: lm_tokens, episode_tokens, flops, seconds, ...
    state: dict  # state.json

def load_model(path, step=-1, device="cpu"):
    """Open a run folder (of `step`; -1: the newest), a step's folder, or any Llama's folder of safetensors.

    Others' weights may have Hugging Face's names or pico-decoder's, lie in several files, and be tied. Memory
    is taken for what the files hold, not for what config.json says. A damaged file ends the program.
    """
    steps = checkpoints(path)
    if not steps and not list(Path(path).glob("model.safetensors*")):
        fail(f"{path} holds no checkpoint (step_*) and no model.safetensors; only these are read")
    if step not in (-1, *steps):
        fail(f"{path} has no checkpoint of step {step}; there is {', '.join(map(str, steps)) or 'only this'}")
    folder = steps[max(steps) if step == -1 else step] if steps else path
    ours = os.path.exists(f"{folder}/state.json")
    remedy = "copy it again, or delete the folder to use an older step" if ours else "download it again"
    state = read_json(f"{folder}/state.json", remedy) if ours else {}
    with attempt(f"read {folder}", remedy):
        named = ("model.safetensors", "head.safetensors", "config.json", "tokenizer.json")
        for name in named if ours else ():
            check_sha256(folder, state, name)
        shape, weights = read_weights(folder)
        with torch.device("meta"):  # shapes without memory
            model = Llama(shape)
        model.load_state_dict(weights, assign=True)
        head = load_file(f"{folder}/head.safetensors") if ours else {}
        return Loaded(folder, model.to(device).eval(), load_tokenizer(folder), head,
                      state.get("settings", {}), state.get("step", 0), state.get("progress", {}), state)

def load_models(paths, step=-1, device="cpu"):
    """{path: Loaded} of the folders that a command line names."""
    if not paths:
        fail("name a run folder, out/<run>, or the folder of a Llama")
    return {path: load_model(path, step, device) for path in paths}

def check_sha256(folder, state, name):
    """ValueError: a file of a checkpoint of ours is not what was written."""
    if sha256_of(f"{folder}/{name}") != state["sha256"][name]:
        raise ValueError(f"{name} does not match the sha256 in state.json")

def read_weights(folder):
    """The shape of a model and its weights under our names, {name: float32 tensor}."""
    files, tensors = {"model.safetensors"}, {}
    if not os.path.exists(f"{folder}/model.safetensors"):
        files = set(read_json(f"{folder}/model.safetensors.index.json")["weight_map"].values())
    for file in files:
        tensors |= load_file(f"{folder}/{os.path.basename(file)}")
    tensors = {key.removeprefix("pico_decoder."): tensor for key, tensor in tensors.items()
               if not key.endswith("rotary_emb.inv_freq")}
    theirs = read_json(f"{folder}/config.json")
    pico = "activation_hidden_dim" in theirs
    shape = read_shape(theirs, pico)
    if shape.n_layers > len(tensors):
        raise ValueError(f"config.json says {shape.n_layers} layers, but there are {len(tensors)} tensors")
    if theirs.get("tie_word_embeddings") and not pico:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    weights = {ours: tensors.pop(name).float() for ours, name in their_names(shape.n_layers, pico).items()}
    if tensors:
        raise ValueError(f"a Llama has no tensor {min(tensors)}")
    half = shape.d_model // shape.n_heads // 2  # a rotary pair is rows j, j + half here; 2j, 2j + 1 in pico
    for ours, weight in weights.items():
        if pico and ours.endswith(("q_proj.weight", "k_proj.weight")):  # (H, half, 2, C) -> (H, 2, half, C)
            weights[ours] = weight.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    return shape, weights

def read_shape(theirs, pico):
    """The ModelConfig that a config.json describes. ValueError: this model cannot be that."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theirs = {"num_key_value_heads": theirs.get("num_attention_heads"), "rms_norm_eps": 1e-6,
              "rope_theta": rope.get("rope_theta", 10000.0), **theirs,
              "rope_type": rope.get("rope_type", rope.get("type"))}
    shape = ModelConfig(**{f.name: f.type(theirs[SHAPE[f.name][pico]]) for f in fields(ModelConfig)})
    ours = {"model_type": "pico_decoder" if pico else "llama", "head_dim": shape.d_model // shape.n_heads,
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default"}
    for key, here in ours.items():
        if theirs.get(key) not in (None, here):
            raise ValueError(f"config.json has {key} = {theirs[key]}, where this model has {here}")
    return shape

def corpus_problem(loaded, folder):
    """Why the corpus in `folder` cannot be used with a model; "" if it can, having the same tokens."""
    if not os.path.exists(f"{folder}/meta.json"):
        return f"there is no corpus {folder}; name one with --corpus=FOLDER (data/prepare.py makes one)"
    if load_tokenizer(folder).token_bytes != loaded.tokenizer.token_bytes:
        return f"the corpus {folder} has other tokens than {loaded.path}; name another with --corpus=FOLDER"
    return ""
