"""Take a run to Hugging Face: a folder that `transformers` opens as a LlamaForCausalLM with its tokenizer, offline and without code of ours.
And bring a Llama from there: a run folder that the evaluations, spectra.py and sample.py open.

    python export_hf.py out/11m hub/11m
    python export_hf.py --from_hf=DIR out/<run>            # DIR as downloaded: config.json, model.safetensors or its shards, tokenizer.json

    model = AutoModelForCausalLM.from_pretrained("hub/11m")
    tokenizer = AutoTokenizer.from_pretrained("hub/11m")

The folder holds config.json, model.safetensors (the same float32 numbers under Hugging Face's names), generation_config.json, tokenizer.json,
tokenizer_config.json, head.safetensors (the learnt initial head of the inner loop), and README.md, the model card. Ids are those of our tokenizer,
but for one thing: <|endoftext|> and <|mask|>, written out in a text, are the special tokens there and ordinary characters here.

What comes from there is data: no code of it runs, nothing is unpickled, and sizes are checked before memory is taken. Its tensors may have Hugging
Face's names or pico-decoder's. Its tokenizer must be a byte-level byte-pair encoder that tiktoken can be: that pieces of text become the same ids is
proven from its merges, not tried on texts. <|endoftext|>, which every script puts before a text, is the token that begins its texts, or ends them.
"""
import base64
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass, fields

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import configurator
from model import Llama, ModelConfig
from runs import UTF8, fail, load_model, read_json, read_log, write_atomic


@dataclass
class Config:
    step: int = -1  # of the checkpoint; -1 takes the newest
    from_hf: str = ""  # folder of a Hugging Face Llama, or of one in pico-decoder's naming, to make a run folder of


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Names and tokens in the two dialects

NAMES = {  # ours -> Hugging Face's, pico-decoder's, module by module; {i} is the number of a block. Shapes are the same
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
    "norm": ("model.norm", "output_norm"),
    "unembedding": ("lm_head", "de_embedding_proj"),
}
SHAPE = {  # the same of config.json
    "d_model": ("hidden_size", "d_model"),
    "n_layers": ("num_hidden_layers", "n_layers"),
    "n_heads": ("num_attention_heads", "attention_n_heads"),
    "n_kv_heads": ("num_key_value_heads", "attention_n_kv_heads"),
    "d_ff": ("intermediate_size", "activation_hidden_dim"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "block_size": ("max_position_embeddings", "max_seq_len"),
    "norm_eps": ("rms_norm_eps", "norm_eps"),
    "rope_theta": ("rope_theta", "position_emb_theta"),  # Hugging Face's since version 5 of transformers: in rope_parameters
}


def hf_names(n_layers, pico=False):
    """{our name of a tensor: theirs} of a model of n_layers blocks."""
    return {f"{ours}.weight".format(i=i): f"{theirs[pico]}.weight".format(i=i) for i in range(n_layers) for ours, theirs in NAMES.items()}


def hf_config(model, eot):
    """config.json."""
    shape = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        **{theirs: getattr(shape, field) for field, (theirs, _) in SHAPE.items()},
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "head_dim": shape.d_model // shape.n_heads,
        "hidden_act": "silu",
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
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": by_bytes,
        "normalizer": {"type": meta["normalizer"]} if meta.get("normalizer") else None,
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
    origin = trained.get("from_hf")
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
    if origin:
        rows = {name: rows[name] for name in ("parameters", "shape")} | {"origin": f"imported from {origin}; none of its training was done here"}
    head = ", ".join(f"`{name}` {tuple(p.shape)}" for name, p in checkpoint["head"].items())
    about_head = f"""`head.safetensors` is the learnt initial head of the inner loop: {head}. It takes the last hidden states, after the final norm,
divided by the square root of their width. The last layer is set to zero before it adapts to something new.

""" if head else ""
    method = "interleaved with first-order MAML on few-shot tasks cut from the same text"
    about = "A Llama decoder pretrained with nanoMAML: next-token prediction, " + (
        method if trained["meta_ratio"] else "the vanilla baseline of runs with meta steps")  # fmt: skip
    if origin:
        about = f"A Llama decoder that nanoMAML imported from {origin}"
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    settings = json.dumps(trained | {"data_dir": "", "out_dir": os.path.basename(trained["out_dir"])}, indent=2)  # paths say nothing elsewhere
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanomaml, maml, smlmt]
---

# {os.path.basename(trained["out_dir"])}

{about}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
ids = tokenizer("<|endoftext|>Return the sum of", return_tensors="pt")  # documents follow an end-of-text
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0]))
```

{about_head}All settings of the run:

```json
{settings}
```
"""


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# From Hugging Face: the weights


def tensors_of(folder):
    """{name: (path, shape)} of a checkpoint's tensors, from the headers of model.safetensors or of the shards that its index lists."""
    path = os.path.join(folder, "model.safetensors")
    index, paths, placed = f"{path}.index.json", [path], {}
    if not os.path.isfile(path):
        if not os.path.isfile(index):
            pickles = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
            why = f"{pickles[0]} is a pickle, which could run code" if pickles else "there are no weights"
            fail(f"{folder} holds no model.safetensors: {why}; only safetensors are read, as save_pretrained(DIR) of transformers writes them")
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
            fail(f"{index} has no weight_map from tensors to files: it is damaged; download it again")
        for name in sorted(set(placed.values())):
            if os.path.basename(name) != name or "\\" in name or not name.endswith(".safetensors"):
                fail(f"{index} names {name[:80]!r}, which is not a .safetensors file in {folder} itself: it is not to be trusted")
            if not os.path.isfile(os.path.join(folder, name)):
                fail(f"{folder} lacks the shard {name} that {os.path.basename(index)} names: download it again")
        paths = [os.path.join(folder, name) for name in sorted(set(placed.values()))]
    found = {}
    for path in paths:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (a file is no dict)
                if name in found:
                    fail(f"{path} and {found[name][0]} both hold the tensor {name}")
                found[name] = path, tuple(file.get_slice(name).get_shape())
    for name, shard in placed.items():
        if name not in found or found[name][0] != os.path.join(folder, shard):
            fail(f"the tensor {name} is missing: {index} places it in {shard}, which does not hold it")
    return found


def digest(tensors):
    """sha256 of the names, kinds and numbers of (name, tensor) pairs: what safetensors itself has no sum of, we keep in its metadata."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


@contextlib.contextmanager
def opened(path):
    """A safetensors file, whose library checks its header against its size."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        fail(f"{path} is no sound safetensors file ({error}): download it again")


def shape_of(folder, pico):
    """The ModelConfig of a checkpoint's config.json. What this model cannot be ends the program."""
    path = os.path.join(folder, "config.json")
    theirs = read_json(path)
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not pico:
        if theirs.get("model_type") != "llama":
            fail(f"{path} has model_type {theirs.get('model_type')!r:.40}: only llama has this architecture")
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            fail(f"{path} scales its rotary positions ({json.dumps(rope)[:100]}), which this model does not")
        theirs = {"num_key_value_heads": theirs.get("num_attention_heads"), "rms_norm_eps": 1e-6, "max_position_embeddings": 2048} | theirs
        theirs["rope_theta"] = rope.get("rope_theta", theirs.get("rope_theta", 10000.0))
    shape = {}
    for field in fields(ModelConfig):
        key = SHAPE[field.name][pico]
        value = theirs.get(key)
        if field.type is float and type(value) is int and value < 2**24:
            value = float(value)
        if type(value) is not field.type or not 0 < value < 2**24:
            fail(f"{path} has {key} = {json.dumps(value)[:40]}, where a {'whole ' * (field.type is int)}number above 0 and below {2**24:,} belongs")
        shape[field.name] = value
    shape = ModelConfig(**shape)
    if shape.d_model % shape.n_heads or shape.d_model // shape.n_heads % 2 or shape.n_heads % shape.n_kv_heads:
        fail(f"{path}: a width of {shape.d_model} with {shape.n_heads} heads and {shape.n_kv_heads} key/value heads does not divide evenly")
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": shape.d_model // shape.n_heads}
    for key, ours in fixed.items():
        if not pico and theirs.get(key) not in (None, ours):
            fail(f"{path} has {key} = {json.dumps(theirs[key])[:40]}, where this model has {json.dumps(ours)}")
    if not pico and (rope | theirs).get("partial_rotary_factor", 1) != 1:
        fail(f"{path} has a partial_rotary_factor; this model turns all of a head")
    return shape


def halves(weight, n_heads):
    """Rows of q or k (H D, C): the pair j of a head is its rows j and j + D/2 here, 2j and 2j + 1 in pico-decoder, which turns complex numbers."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (H, D/2, 2, C) -> (H, 2, D/2, C)


def weights_of(folder):
    """The ModelConfig and our state dict, in float32, of a checkpoint; and what is to be told of it."""
    found = {name: at for name, at in tensors_of(folder).items() if not name.endswith("rotary_emb.inv_freq")}  # older files: what rope_theta says
    pico, prefix = any(name.endswith("embedding_proj.weight") for name in found), "pico_decoder."
    shape, notes = shape_of(folder, pico), []
    if shape.n_layers > len(found):
        fail(f"{folder}/config.json says {shape.n_layers} layers, but the files hold {len(found)} tensors in all")
    with torch.device("meta"):  # takes no memory
        expected = {name: tuple(p.shape) for name, p in Llama(shape).state_dict().items()}
    names = hf_names(shape.n_layers, pico)
    if pico and any(name.startswith(prefix) for name in found):
        names = {ours: prefix + theirs for ours, theirs in names.items()}
    if not pico and read_json(os.path.join(folder, "config.json")).get("tie_word_embeddings"):
        found.pop(names["unembedding.weight"], None)  # if it is there, transformers does not read it either
        names["unembedding.weight"] = names["embedding.weight"]
        notes.append("the unembedding is tied to the embedding there, and a copy of it here")
    for ours, theirs in names.items():
        if theirs not in found:
            fail(f"{folder}: the tensor {theirs} is missing")
        path, there = found[theirs]
        if there != expected[ours]:
            fail(f"{path}: the tensor {theirs} is {' x '.join(map(str, there))}, but config.json makes it {' x '.join(map(str, expected[ours]))}")
    if extra := sorted(set(found) - set(names.values())):
        fail(f"{found[extra[0]][0]}: a Llama has no tensor {extra[0]:.200}" + f", nor {len(extra) - 1} more of its tensors" * (len(extra) > 1))
    for path in sorted({path for path, _ in found.values()}):
        with opened(path) as file:
            said = (file.metadata() or {}).get("sha256")
            if said and said != digest((name, file.get_tensor(name)) for name in sorted(file.keys())):
                fail(f"{path} does not match the sha256 that export_hf.py wrote into it: it was changed or damaged; export it again")
    weights = {}
    for ours, theirs in names.items():
        with opened(found[theirs][0]) as file:
            weight = file.get_tensor(theirs)
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            fail(f"{found[theirs][0]}: the tensor {theirs} is {weight.dtype}, not float32, float16 or bfloat16")
        weights[ours] = weight.float()
        if not weights[ours].isfinite().all():
            fail(f"{found[theirs][0]}: the tensor {theirs} is not finite")
        if pico and ours.endswith(("q_proj.weight", "k_proj.weight")):
            weights[ours] = halves(weights[ours], shape.n_heads if ours.endswith("q_proj.weight") else shape.n_kv_heads)
    return shape, weights, notes


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# From Hugging Face: the tokenizer

LETTERS, NUMBERS, OTHERS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+", r"| ?\p{N}+", r"| ?[^\s\p{L}\p{N}]+"
GPT2 = LETTERS + NUMBERS + OTHERS + r"|\s+(?!\S)|\s+"  # the pattern that ByteLevel brings
LONGEST = 1000  # bytes in a token, at most: to check one takes time by their square
SAMPLE = "Größe's 12,345\n\n  a\tΩ  Всички يولد 人人 वह 👩‍👧 cafe\u0301 \u00a0\u2003\u3000\u200b\ufeff\x00\x1c\x85\u2028 ½ Ⅻ $%^ _=\r\n "


def pattern_of(pre, longest_run, path):
    """tiktoken's pattern for a pre-tokenizer. Runs of 2 to `longest_run` spaces, if that is not 0, are tokens that are cut out of the text before.

    White space then is cut as at the end of a text where a thing follows that was cut out before: such a run, or a digit.
    """
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds, last = [part["type"] for part in parts], parts[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", True):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            spaces = r"|(?:(?!  )\s)+(?!\S)|(?:(?!  )\s)+"
            return f" {{2,{longest_run}}}|{LETTERS}{NUMBERS}{OTHERS}{spaces}" if longest_run else GPT2
        if kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True) and not longest_run:
            number = r"\p{N}" if parts[0]["individual_digits"] else r"\p{N}+"
            return rf"{number}|{LETTERS}{OTHERS}|\s+(?![^\s\p{{N}}])|\s+"
        split = parts[0] if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and not longest_run else {}
        if split.get("behavior") == "Isolated" and not split.get("invert") and "Regex" in split["pattern"]:
            pattern = split["pattern"]["Regex"]
            outside = re.sub(r"\\[pP]\{[^}]*\}|\\.|\[(\\.|[^]\\])*\]", "", pattern.replace(r"\s++$", ""))  # after \s++ an end is the text's
            if sign := re.search(r"[$^]|\}\+|\(\?\w*m", outside):
                fail(f"{path}: its pattern {pattern[:80]!r} has {sign[0]}, which means something else to tiktoken: ids would differ")
            return pattern
    fail(f"{path}: tiktoken cannot cut text as its pre-tokenizer does ({', '.join(kinds)}): GPT-2's, Llama 3's and SmolLM's kinds are known")


def last_pair(token, ranks):
    """The two tokens that tiktoken joins last on the way from the bytes of `token` to it, or None if it never gets there."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank == math.inf:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def check_merges(ranks, pairs, ignore_merges, path):
    """Ends the program unless tiktoken, which joins the neighbours that make the token of the lowest id, joins what the list of merges would.

    It does if (1) the merges stand in the order of the ids that they make, and (2) each token that tiktoken reaches from its bytes alone is reached
    by a listed merge, and each token that it does not reach is taken whole there, too. For wherever two neighbours x y make a token, all joins inside
    their stretch of text so far were those of xy read alone: they are its last pair, which is on the list, and both take the one that comes first.
    """
    ids = [ranks[left + right] for left, right in pairs]
    if wrong := next((i for i in range(1, len(ids)) if ids[i - 1] > ids[i]), None):
        fail(f"{path}: merge {wrong} makes the id {ids[wrong]} after {ids[wrong - 1]}: tiktoken joins in the order of ids, so its ids would differ")
    listed = set(pairs)
    for token, i in ranks.items():
        pair = last_pair(token, ranks)
        if len(token) > 1 and pair not in listed and not (pair is None and ignore_merges):
            fail(f"{path}: its merges do not make the token {i} ({token!r}) as tiktoken would, so ids would differ")


def tokenizer_of(folder, n_rows):
    """What meta.json says of a tokenizer, the ranks {bytes: id}, and what is to be told, from tokenizer.json; n_rows: of the embedding."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        fail(f"{folder} holds no tokenizer.json: put it there (a pico-decoder has that of allenai/OLMo-7B-0724-hf)")
    try:
        return _tokenizer_of(read_json(path), folder, path, n_rows)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        fail(f"{path} is not what Hugging Face's tokenizers write ({error!r:.100}): download it again")


def _tokenizer_of(theirs, folder, path, n_rows):
    bpe, notes = theirs["model"], []
    changes = theirs.get("normalizer") or {"normalizers": []}
    changes = [change["type"] for change in changes.get("normalizers", [changes])]
    if bpe["type"] != "BPE" or any(bpe.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        fail(f"{path} is not a byte-level byte-pair encoder (it is {bpe['type']}{', SentencePiece-style' * bool(bpe.get('byte_fallback'))}): "
             "tiktoken cannot express it")  # fmt: skip
    if changes not in ([], ["NFC"]):
        fail(f"{path} changes the text before it reads it ({', '.join(changes)}): of normalizers only NFC is known")
    added = {token["content"]: token["id"] for token in theirs["added_tokens"]}
    runs = {token["content"].encode(): token["id"] for token in theirs["added_tokens"] if not token["content"].strip(" ")}
    if sorted(map(len, runs)) != list(range(2, len(runs) + 2)):
        fail(f"{path} has runs of spaces as added tokens, but not of each length from 2 on: tiktoken cannot express it")
    markup = {token for token in added if re.search(r"\w", token) and re.search(r"[^\w\s]", token)}  # such as <s>, which no text has
    if text := next((token for token in added if token not in markup and token.encode() not in runs), None):
        fail(f"{path} cuts {text[:40]!r}, an added token, out of the middle of a text: tiktoken cannot express it")
    pattern = pattern_of(theirs["pre_tokenizer"], max(map(len, runs), default=0), path)

    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    taken = set(added.values())
    ordinary = {token: i for token, i in bpe["vocab"].items() if i not in taken}
    if strange := next((token for token in ordinary if not set(token) <= set(bytes_of)), None):
        fail(f"{path}: the token {strange[:40]!r} is not written in the letters of a byte-level encoder: tiktoken cannot express it")
    ranks = {bytes(bytes_of[letter] for letter in token): i for token, i in ordinary.items()}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in bpe["merges"]]
    pairs = [tuple(bytes(bytes_of[letter] for letter in part) for part in merge) for merge in merges]
    if absent := UTF8 - {token[0] for token in ranks if len(token) == 1}:
        fail(f"{path} has no token for the byte {min(absent)}: it cannot write every text")
    if any(len(token) > LONGEST for token in ranks):
        fail(f"{path} has tokens of more than {LONGEST} bytes, which is no vocabulary for text")
    check_merges(ranks, pairs, bpe.get("ignore_merges"), path)
    ranks |= runs  # a piece of text then is a run or has no two spaces: what other tokens have some never meet it
    used = set(ranks.values()) | taken
    if len(used) != len(ranks) + len(added) - len(runs) or not all(type(i) is int and 0 <= i < n_rows for i in used):
        fail(f"{path} has an id twice, or ids outside 0 to {n_rows - 1}, the rows of the embedding in config.json")

    end = end_of_text(folder, added)
    mask = next((name for name in ("<|mask|>", "<mask>", "[MASK]") if name in added and name != end), None)
    spare = next((i for i in range(n_rows) if i not in used), None)
    if mask is None and spare is None:
        spare = ranks.pop(b"\xff", None)
        notes.append(f"<|mask|> is the id {spare}, of the byte 255, which no text has")
        if spare is None:
            fail(f"{path} and the embedding leave no id for <|mask|>")
    else:
        notes.append(f"<|mask|> is {f'their {mask}, {added[mask]}' if mask else f'the row {spare} of the embedding, which no token used'}")
    special = {"<|endoftext|>": added[end], "<|mask|>": spare if mask is None else added[mask]}
    special |= {name: i for name, i in added.items() if name not in special and i not in special.values() and name.encode() not in runs}
    used = set(ranks.values()) | set(special.values())
    special |= {f"<|unused {i}|>": i for i in range(max(used)) if i not in used}  # so that any id below the last stands for something
    notes += [f"<|endoftext|> is their {end}, {added[end]}"] + ["characters are composed (NFC) before they are read"] * len(changes)
    meta = {"vocab_size": n_rows, "pattern": pattern, "special_tokens": special, "normalizer": changes[0] if changes else None}
    nothing = max(used) + 1  # an id for a piece without characters, on which tiktoken would panic
    encoding = tiktoken.Encoding("imported", pat_str=pattern, mergeable_ranks=ranks | {b"": nothing}, special_tokens=special)
    ids = encoding.encode_ordinary(SAMPLE)
    if nothing in ids or encoding.decode(ids) != SAMPLE:  # tiktoken leaves out what a pattern does not match
        fail(f"{path}: its pattern {pattern[:80]!r} does not match all of a text, or matches nothing at all, and tiktoken would lose the rest")
    return meta, ranks, notes


def end_of_text(folder, added):
    """Which of the added tokens stands before a text: the one that begins texts or, where there is none, ends them."""
    named = []
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):  # the last is often left at a default that means something else
        path = os.path.join(folder, name)
        theirs = read_json(path) if os.path.exists(path) else {}
        for kind in ("bos_token", "eos_token"):
            token, number = theirs.get(kind), theirs.get(f"{kind}_id")
            named.append(token.get("content") if isinstance(token, dict) else token)
            named += [content for content, i in added.items() if i == (number[0] if isinstance(number, list) and number else number)]
    found = next((name for name in named if isinstance(name, str) and name in added), None)
    return found or fail(f"{folder}: neither tokenizer_config.json nor config.json names a token that begins or ends a text (bos_token, eos_token)")


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# A run folder of it

# What the evaluations read of a run's settings and training did not set: train.py's defaults.
SETTINGS = {"seed": 0, "meta_ratio": 0.0, "n_way": 16, "k_shot": 4, "q_query": 4, "episode_len": 64, "readout": "before", "word_min_count": 20,
            "word_max_count": 5000, "pool_tokens": 10_000_000, "inner_steps": 10, "inner_lr": 10.0, "head_layers": 1, "head_hidden": 128,
            "max_steps": 0, "warmup_steps": 0}  # fmt: skip


def write_run(source, target, work):
    """Fill the folder `work`, which becomes the run `target`, with the checkpoint in `source`; returns what is to be told."""
    shape, weights, notes = weights_of(source)
    tokens, ranks, more = tokenizer_of(source, shape.vocab_size)
    name = os.path.basename(os.path.abspath(target))
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in sorted(ranks.items(), key=lambda item: item[1]))
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("torch", "safetensors", "tiktoken")}
    meta = {"format": 1, "name": name, **tokens, "splits": {}, "sources": [], "versions": versions,
            "sha256": {"tokenizer.tiktoken": hashlib.sha256(lines).hexdigest()}, "corpus_hash": None}  # fmt: skip
    # A corpus made with its tokenizer goes by the name of the run, so that the scripts find it.
    settings = {"out_dir": target, "from_hf": os.path.basename(os.path.abspath(source)), "dataset": name,
                "data_dir": os.path.join(configurator.HERE, "data"), **SETTINGS, **asdict(shape)}  # fmt: skip
    progress = dict.fromkeys("lm_tokens episode_tokens support_tokens query_tokens flops seconds".split(), 0)
    state = {"model": weights, "head": {}, "optimizer": {}, "scaler": {}, "step": 0, "progress": progress, "config": settings}
    write_atomic(os.path.join(work, "tokenizer.tiktoken"), lambda file: file.write(lines))
    write_atomic(os.path.join(work, "meta.json"), lambda file: file.write(json.dumps(meta, indent=2).encode()))
    write_atomic(os.path.join(work, "config.json"), lambda file: file.write(json.dumps(settings | {"corpus_hash": None}, indent=2).encode()))
    write_atomic(os.path.join(work, "ckpt_000000.pt"), lambda file: torch.save(state, file))
    return f"{source}: {sum(p.numel() for p in weights.values()):,} parameters written to {target}\n" + "\n".join(notes + more)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# To Hugging Face: a folder for transformers


def write_hub(folder, step, target, work):
    """Fill the folder `work`, which becomes `target`, with a run's checkpoint; returns what is to be told."""
    model, encoding, checkpoint = load_model(folder, step)
    meta = read_json(os.path.join(folder, "meta.json"))
    eot = meta["special_tokens"]["<|endoftext|>"]
    looked = next((line for line in read_log(folder) if (line["kind"], line["step"]) == ("eval", checkpoint["step"])), {})
    names = hf_names(model.config.n_layers)
    weights = {names[ours]: p for ours, p in model.state_dict().items()}
    special = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    try:
        about = {name: str(checkpoint["config"][name]) for name in ("readout", "inner_lr", "inner_steps", "n_way", "k_shot")}
        told = card(model, checkpoint, meta, looked)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"meta.json or the checkpoint in {folder} lacks what the model card tells ({error!r}): copy the run again")
    files = {
        "config.json": json.dumps(hf_config(model, eot), indent=2),
        "generation_config.json": json.dumps(special),
        "tokenizer.json": json.dumps(hf_tokenizer(encoding, meta), ensure_ascii=False),
        "tokenizer_config.json": json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
            "mask_token": "<|mask|>", "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": model.config.block_size, "clean_up_tokenization_spaces": False}, indent=2),
        "README.md": told,
        "model.safetensors": save(weights, {"format": "pt", "sha256": digest(sorted(weights.items()))}),
        **({"head.safetensors": save(checkpoint["head"], about | {"format": "pt"})} if checkpoint["head"] else {}),
    }  # fmt: skip
    for name, content in files.items():
        with open(os.path.join(work, name), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    return f"{folder}, step {checkpoint['step']}: {model.n_params():,} parameters written to {target}"


if __name__ == "__main__":
    config, rest = configurator.load(Config, sys.argv[1:], __doc__)
    source, *targets = [config.from_hf] * bool(config.from_hf) + rest or [""]
    if len(targets) != 1 or not os.path.isdir(source):
        usage = "a folder from Hugging Face and a new run: python export_hf.py --from_hf=DIR out/<run>" if config.from_hf else \
                "a run folder and a new folder: python export_hf.py out/<run> DIR"  # fmt: skip
        fail(f"name {usage} ({' '.join([source, *targets]) or 'nothing'} given)")
    (target,) = targets
    if os.path.exists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        fail(f"{target} exists already: name a new folder")
    work = os.path.normpath(target) + ".tmp"  # renamed when all is there
    try:
        os.makedirs(work)
        try:
            told = write_run(source, target, work) if config.from_hf else write_hub(source, None if config.step == -1 else config.step, target, work)
            os.replace(work, target)
        except BaseException:
            shutil.rmtree(work)
            raise
    except FileExistsError as error:
        fail(f"{error.filename} is there already, perhaps left by an interrupted command: delete it")
    except OSError as error:
        fail(f"cannot write {error.filename or target}: {error.strerror or error}")
    print(told)
