"""Take a run to Hugging Face: a folder that `transformers` opens as a LlamaForCausalLM with its tokenizer, offline and without code of ours.

    python export_hf.py out/11m hub/11m

    model = AutoModelForCausalLM.from_pretrained("hub/11m")
    tokenizer = AutoTokenizer.from_pretrained("hub/11m")

The folder holds config.json, model.safetensors (the same float32 numbers under Hugging Face's names), generation_config.json, tokenizer.json,
tokenizer_config.json, head.safetensors (the learnt initial head of the inner loop), and README.md, the model card. Ids are those of our tokenizer,
but for one thing: <|endoftext|> and <|mask|>, written out in a text, are the special tokens there and ordinary characters here.
"""
import json
import os
import sys
from dataclasses import dataclass

from safetensors.torch import save

import configurator
from runs import fail, load_model, read_json, read_log


@dataclass
class Config:
    step: int = -1  # of the checkpoint; -1 takes the newest


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Names and tokens in the two dialects

NAMES = {  # ours -> Hugging Face's, module by module; {i} is the number of a block. Shapes and pairing of rotary positions are the same
    "embedding": "model.embed_tokens",
    "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.attention.q_proj": "model.layers.{i}.self_attn.q_proj",
    "blocks.{i}.attention.k_proj": "model.layers.{i}.self_attn.k_proj",
    "blocks.{i}.attention.v_proj": "model.layers.{i}.self_attn.v_proj",
    "blocks.{i}.attention.o_proj": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "unembedding": "lm_head",
}


def hf_names(n_layers):
    """{our name of a tensor: Hugging Face's} of a model of n_layers blocks."""
    return {f"{ours}.weight".format(i=i): f"{theirs}.weight".format(i=i) for i in range(n_layers) for ours, theirs in NAMES.items()}


def hf_config(model, eot):
    """config.json."""
    shape = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.d_model // shape.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": shape.block_size,
        "rope_theta": shape.rope_theta,  # before version 5 of transformers
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},  # since
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": eot,
        "eos_token_id": eot,
    }


def byte_letters():
    """The printable letter that stands for each byte in tokenizer.json, as GPT-2 chose them: printable bytes themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def hf_tokenizer(encoding, meta):
    """tokenizer.json: a byte-level byte-pair encoder with the ids of `encoding`.

    tiktoken joins whichever two neighbours make the token of the lowest rank, and takes a piece that is a token whole. Hence each way to cut a token
    in two tokens is a merge, in order of rank, and `ignore_merges` is set.
    """
    letters = byte_letters()
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab) if i not in meta["special_tokens"].values()}

    def written(token):
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [[written(left), written(right)] for left, right in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": by_bytes,
        "added_tokens": [{"id": i, "content": token, **special} for token, i in meta["special_tokens"].items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": meta["pattern"]}, "behavior": "Isolated", "invert": False}, by_bytes]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": True, "merges": merges,
                  "vocab": {written(token): i for token, i in ranks.items()} | meta["special_tokens"]},
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The model card


def card(model, checkpoint, meta, looked):
    """README.md. `looked` is the evaluation that was logged at this step, or {}."""
    trained, progress, shape = checkpoint["config"], checkpoint["progress"], model.config
    where = {"before": "before the blank", "mask": "at the blank", "last": "at the last token"}[trained["readout"]]
    meta_steps = f"{trained['meta_ratio']:g} of all, {trained['n_way']}-way {trained['k_shot']}-shot, features read {where}, "
    meta_steps += f"{trained['inner_steps']} inner steps at learning rate {trained['inner_lr']:g}"
    none = "not measured at this step"
    size = sum(split["tokens"] for split in meta["splits"].values())
    rows = {
        "parameters": f"{model.n_params():,}",
        "shape": f"width {shape.d_model}, {shape.n_layers} layers, {shape.n_heads} heads / {shape.n_kv_heads} key/value heads, SwiGLU {shape.d_ff}, "
                 f"vocabulary {shape.vocab_size:,}, rows of {shape.block_size} tokens",
        "steps": f"{checkpoint['step']:,} of {trained['max_steps']:,}, seed {trained['seed']}",
        "meta steps": meta_steps if trained["meta_ratio"] else "none: language modelling only",
        "tokens": f"{progress['lm_tokens']:,} of language modelling, {progress['episode_tokens']:,} of episodes",
        "FLOPs": f"{progress['flops']:.3g}",
        "validation loss": f"{looked['val_loss']:.4f} nats a token, {looked['val_bits_per_byte']:.4f} bits a byte" if looked else none,
        "held-out words": f"query accuracy {looked['heldout_query_acc']:.3f} ± {looked['heldout_query_acc_se']:.3f} (standard error), "
                          f"chance {1 / trained['n_way']:.4f}" if "heldout_query_acc" in looked else none,
        "corpus": f"{meta['name']} {meta['corpus_hash']}, {size:,} tokens: {', '.join(source['name'] for source in meta['sources'])}",
    }  # fmt: skip
    head = ", ".join(f"`{name}` {tuple(p.shape)}" for name, p in checkpoint["head"].items())
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    settings = json.dumps(trained | {"data_dir": "", "out_dir": os.path.basename(trained["out_dir"])}, indent=2)  # paths say nothing elsewhere
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanomaml, maml, smlmt]
---

# {os.path.basename(trained["out_dir"])}

A Llama decoder pretrained with nanoMAML: next-token prediction, {"interleaved with first-order MAML on few-shot tasks cut from the same text"
if trained["meta_ratio"] else "the vanilla baseline of runs with meta steps"}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
ids = tokenizer("<|endoftext|>Return the sum of", return_tensors="pt")  # documents follow an end-of-text
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0]))
```

`head.safetensors` is the learnt initial head of the inner loop: {head}. It takes the last hidden states, after the final norm,
divided by the square root of their width. The last layer is set to zero before it adapts to something new.

All settings of the run:

```json
{settings}
```
"""


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Writing

if __name__ == "__main__":
    config, rest = configurator.load(Config, sys.argv[1:], __doc__)
    if len(rest) != 2 or not os.path.isdir(rest[0]):
        fail(f"name a run folder and a new folder: python export_hf.py out/<run> DIR ({' '.join(rest) or 'nothing'} given)")
    folder, target = rest
    if os.path.exists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        fail(f"{target} exists already: name a new folder")
    model, encoding, checkpoint = load_model(folder, None if config.step == -1 else config.step)
    meta = read_json(os.path.join(folder, "meta.json"))
    eot = meta["special_tokens"]["<|endoftext|>"]
    looked = next((line for line in read_log(folder) if (line["kind"], line["step"]) == ("eval", checkpoint["step"])), {})
    names, weights = hf_names(model.config.n_layers), model.state_dict()
    special = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    about = {name: str(checkpoint["config"][name]) for name in ("readout", "inner_lr", "inner_steps", "n_way", "k_shot")}
    files = {
        "config.json": json.dumps(hf_config(model, eot), indent=2),
        "generation_config.json": json.dumps(special),
        "tokenizer.json": json.dumps(hf_tokenizer(encoding, meta), ensure_ascii=False),
        "tokenizer_config.json": json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
            "mask_token": "<|mask|>", "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": model.config.block_size, "clean_up_tokenization_spaces": False}, indent=2),
        "README.md": card(model, checkpoint, meta, looked),
        "model.safetensors": save({names[ours]: p for ours, p in weights.items()}, {"format": "pt"}),
        "head.safetensors": save(checkpoint["head"], about | {"format": "pt"}),
    }  # fmt: skip
    work = os.path.normpath(target) + ".tmp"  # renamed when all is there
    try:
        os.makedirs(work, exist_ok=True)
        for name, content in files.items():
            with open(os.path.join(work, name), "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
        os.replace(work, target)
    except OSError as error:
        fail(f"cannot write {error.filename or target}: {error.strerror or error}")
    print(f"{folder}, step {checkpoint['step']}: {model.n_params():,} parameters written to {target}")
