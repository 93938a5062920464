"""export_hf.py --from_hf: models and tokenizers that transformers and tokenizers made, beside what becomes of them here, and all the way back."""
import importlib
import inspect
import itertools
import json
import os
import random
import runpy
import shutil
import sys

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import PACKAGES, ROOT, run_many
from safetensors.torch import load_file, save_file
from test_export_hf import SCRIPTS

from export_hf import LETTERS, NAMES, check_merges, pattern_of
from runs import load_corpus, load_model, load_tokenizer, read_json

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "vocab_size": 960, "block_size": 40}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def documentation():
    members = [value for name in PACKAGES.split(",") for _, value in inspect.getmembers(importlib.import_module(name)) if name != "typing"]
    return [text for value in members if (text := inspect.getdoc(value))]


def trained(kind, folder):
    """A byte-level tokenizer of a kind, trained by `tokenizers`, in the files that `transformers` makes of it."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    before = {"smol": pre_tokenizers.Digits(individual_digits=True), "llama3": pre_tokenizers.Split(Regex(LLAMA3), "isolated")}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([before[kind], byte_level]) if kind in before else byte_level
    first = ["<|begin|>", "<|im_start|>", "<|end|>"] if kind == "smol" else ["<|padding|>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(documentation()[::4], trainer)
    if kind == "olmo":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)] + ["|||EMAIL|||"])
    end = {"smol": "<|end|>", "olmo": "<|endoftext|>", "llama3": "</s>"}[kind]
    if kind != "smol":
        tokenizer.add_special_tokens([end])
    tokens = {"bos_token": "<|begin|>"} if kind == "smol" else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, **tokens).save_pretrained(folder)
    return tokenizer


def llama(folder, shards=None, **settings):
    """A Hugging Face Llama with random weights that are large enough for attention to be no plain mean."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                                         vocab_size=960, max_position_embeddings=40, initializer_range=0.2, **settings))  # fmt: skip
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **{"max_shard_size": shards} if shards else {})


def pico_state(prefix):
    """A state dict in pico-decoder's names."""
    torch.manual_seed(2)
    D, widths = 32, {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    state = {"embedding_proj": torch.randn(960, D), "de_embedding_proj": torch.randn(960, D) / 8, "output_norm": torch.rand(D) + 0.5}
    for i in range(2):
        state |= {f"layers.{i}.attention.{name}": torch.randn(width, D) / 3 for name, width in widths.items()}
        state |= {f"layers.{i}.attention.o_proj": torch.randn(D, D) / 3, f"layers.{i}.swiglu.w_2": torch.randn(D, 48) / 3}
        state |= {f"layers.{i}.swiglu.w_{n}": torch.randn(48, D) / 3 for n in (0, 1)}
        state |= {f"layers.{i}.{name}_norm": torch.rand(D) + 0.5 for name in ("attention", "swiglu")}
    return {f"{prefix}{name}.weight": p for name, p in state.items()}


PICO = {"model_type": "pico_decoder", "d_model": 32, "n_layers": 2, "vocab_size": 960, "max_seq_len": 40, "attention_n_heads": 4,
        "attention_n_kv_heads": 2, "activation_hidden_dim": 48, "norm_eps": 1e-4, "position_emb_theta": 500.0}  # fmt: skip


def complex_logits(state, idx, eps=1e-4, theta=500.0, H=4, K=2):
    """The pico-decoder, written anew: rotary positions as products of complex numbers, attention one head and one position at a time."""

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    (T,), C = idx.shape, state["embedding_proj.weight"].shape[1]
    D = C // H
    turn = torch.exp(1j * torch.outer(torch.arange(T).double(), theta ** (-torch.arange(0, D, 2).double() / D)))  # (T, D/2)
    state = {name: p.double() for name, p in state.items()}
    x = state["embedding_proj.weight"][idx]  # (T, C)
    for i in range(2):
        w = {name.removeprefix(f"layers.{i}.").removesuffix(".weight"): p for name, p in state.items()}
        h = norm(x, w["attention_norm"])
        q, k, v = (h @ w[f"attention.{name}_proj"].T for name in "qkv")
        out = torch.zeros(T, C).double()
        for head in range(H):
            qs = torch.view_as_complex(q[:, head * D : (head + 1) * D].reshape(T, D // 2, 2)) * turn
            of = head // (H // K)
            ks = torch.view_as_complex(k[:, of * D : (of + 1) * D].reshape(T, D // 2, 2)) * turn
            for t in range(T):
                p = ((qs[t] * ks[: t + 1].conj()).real.sum(-1) / D**0.5).softmax(0)
                out[t, head * D : (head + 1) * D] = p @ v[: t + 1, of * D : (of + 1) * D]
        x = x + out @ w["attention.o_proj"].T
        h = norm(x, w["swiglu_norm"])
        x = x + (F.silu(h @ w["swiglu.w_0"].T) * (h @ w["swiglu.w_1"].T)) @ w["swiglu.w_2"].T
    return norm(x, state["output_norm.weight"]) @ state["de_embedding_proj.weight"].T


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# What goes wrong: each case changes a copy of a sound folder

MISTAKES = {  # name -> what the line says
    "missing": ["the tensor model.layers.1.mlp.up_proj.weight is missing"],
    "extra": ["model.safetensors", "no tensor model.layers.0.self_attn.q_proj.bias"],
    "evil name": ["no tensor model.x\\nerror: \\x1b[2J"],
    "shape": ["model.safetensors", "model.norm.weight is 33", "makes it 32"],
    "not finite": ["model.safetensors", "model.layers.0.mlp.down_proj.weight is not finite"],
    "whole numbers": ["model.norm.weight is torch.int8"],
    "layers": ["no tensor model.layers.1.", "nor 8 more"],
    "many layers": ["16000000 layers", "21 tensors"],
    "wide": ["model.embed_tokens.weight is 960 x 32", "960 x 16000000"],
    "huge": ["vocab_size = 1000000000000"],
    "huge theta": ["rope_theta = 1000000000000"],
    "no vocab_size": ["config.json has vocab_size = null"],
    "odd heads": ["does not divide"],
    "mistral": ["model_type 'mistral'"],
    "gelu": ["hidden_act = \"gelu\""],
    "biased": ["attention_bias = true"],
    "head_dim": ["head_dim = 16"],
    "scaled": ["scales its rotary positions", "yarn"],
    "config list": ["config.json is not valid JSON (an object is expected)"],
    "deep": ["config.json is not valid JSON"],
    "cut": ["model.safetensors is no sound safetensors file"],
    "liar": ["model.safetensors is no sound safetensors file"],
    "pickle": ["pytorch_model.bin is a pickle"],
    "nothing": ["there are no weights"],
    "no shard": ["lacks the shard model-00002-of-0000"],
    "escape": ["'../smol/model", "not to be trusted"],
    "absolute": ["not to be trusted"],
    "lost": ["the tensor model.norm.weight is missing", "index.json"],
    "absent": ["the tensor model.new.weight is missing", "index.json"],
    "twice": ["both hold the tensor"],
    "no map": ["index.json has no weight_map", "download it again"],
    "no tokenizer": ["holds no tokenizer.json"],
    "sentencepiece": ["SentencePiece-style"],
    "metaspace": ["cannot cut text", "Metaspace"],
    "prefix space": ["cannot cut text", "ByteLevel"],
    "wordpiece": ["it is WordPiece"],
    "lowercase": ["Lowercase"],
    "unordered": ["merge 7 makes the id", "ids would differ"],
    "unreachable": ["do not make the token", "b'qzq'"],
    "letters": ["'▁the'", "not written in the letters"],
    "no byte": ["no token for the byte 10"],
    "long": ["more than 1000 bytes"],
    "two ids": ["an id twice"],
    "too many": ["ids outside 0 to 959"],
    "no end": ["names a token that begins or ends a text"],
    "gap": ["does not match all of a text"],
    "nothing cut": ["or matches nothing at all"],
    "possessive": ["has }+, which means something else"],
    "line": ["has ^, which means something else"],
    "word": ["cuts 'learning', an added token"],
    "tabs": ["cuts '\\t\\t', an added token"],
    "runs": ["runs of spaces"],
    "odd": ["is not what Hugging Face's tokenizers write", "KeyError"],
    "no folder": ["--from_hf=DIR out/<run>"],
    "no run": ["--from_hf=DIR out/<run>"],
    "taken": ["exists already"],
    "half": [".tmp is there already"],
}


def damaged(name, here):
    """The words of the command of a mistake."""
    sharded = ("no shard", "escape", "absolute", "lost", "absent", "twice", "no map")
    folder, sound = here / f"bad {name}", here / ("smol" if name in sharded else "llama3")
    shutil.copytree(sound, folder)
    weights, tokenizer = folder / "model.safetensors", json.loads((folder / "tokenizer.json").read_text())
    bpe, index = tokenizer["model"], folder / "model.safetensors.index.json"

    def config(**changed):
        theirs = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps({key: value for key, value in theirs.items() if value is not ...}))

    def tensors(**changed):
        changed = {name.replace("__", "."): p for name, p in changed.items()}
        save_file({name: p for name, p in (load_file(weights) | changed).items() if p is not None}, weights)

    def shards(change):
        listed = json.loads(index.read_text())
        change(listed["weight_map"])
        index.write_text(json.dumps(listed))

    def pattern(regex):
        tokenizer["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": regex})

    def added(content):
        tokenizer["added_tokens"].append({"id": 950, "content": content})

    def header(raw):
        weights.write_bytes(len(raw).to_bytes(8, "little") + raw)

    changes = {
        "missing": lambda: tensors(model__layers__1__mlp__up_proj__weight=None),
        "extra": lambda: tensors(model__layers__0__self_attn__q_proj__bias=torch.zeros(32)),
        "evil name": lambda: tensors(**{"model.x\nerror: \x1b[2J": torch.zeros(1)}),
        "shape": lambda: tensors(model__norm__weight=torch.ones(33)),
        "not finite": lambda: tensors(model__layers__0__mlp__down_proj__weight=torch.full((32, 48), torch.nan)),
        "whole numbers": lambda: tensors(model__norm__weight=torch.ones(32, dtype=torch.int8)),
        "layers": lambda: config(num_hidden_layers=1), "many layers": lambda: config(num_hidden_layers=16_000_000),
        "wide": lambda: config(hidden_size=16_000_000, head_dim=...), "huge": lambda: config(vocab_size=10**12),
        "huge theta": lambda: config(rope_parameters=..., rope_theta=10**400),
        "no vocab_size": lambda: config(vocab_size=...), "odd heads": lambda: config(num_attention_heads=5),
        "mistral": lambda: config(model_type="mistral"),
        "gelu": lambda: config(hidden_act="gelu"), "biased": lambda: config(attention_bias=True), "head_dim": lambda: config(head_dim=16),
        "scaled": lambda: config(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        "config list": lambda: (folder / "config.json").write_text("[]"), "deep": lambda: (folder / "config.json").write_text("[" * 100_000),
        "cut": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "liar": lambda: header(b'{"model.norm.weight":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        "pickle": lambda: weights.rename(folder / "pytorch_model.bin"), "nothing": weights.unlink,
        "no shard": lambda: next(folder.glob("model-00002*")).unlink(),
        "escape": lambda: shards(lambda placed: placed.update({"model.norm.weight": "../smol/" + placed["model.norm.weight"]})),
        "absolute": lambda: shards(lambda placed: placed.update({"model.norm.weight": str(sound / "x.safetensors")})),
        "lost": lambda: shards(lambda placed: placed.update({"model.norm.weight": next(name for name in placed.values() if "00001" in name)})),
        "absent": lambda: shards(lambda placed: placed.update({"model.new.weight": placed["model.norm.weight"]})),
        "twice": lambda: (shutil.copy(next(folder.glob("model-00001*")), folder / "more.safetensors"),
                          shards(lambda placed: placed.update({"model.norm.weight": "more.safetensors"}))),
        "no map": lambda: index.write_text("{}"),
        "no tokenizer": (folder / "tokenizer.json").unlink,
        "sentencepiece": lambda: bpe.update(byte_fallback=True),
        "metaspace": lambda: tokenizer.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
        "prefix space": lambda: tokenizer.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        "wordpiece": lambda: bpe.update(type="WordPiece"), "lowercase": lambda: tokenizer.update(normalizer={"type": "Lowercase"}),
        "unordered": lambda: bpe["merges"].insert(6, bpe["merges"].pop(7)),
        "unreachable": lambda: bpe["vocab"].update({"qzq": 950}), "letters": lambda: bpe["vocab"].update({"▁the": 950}),
        "no byte": lambda: bpe["vocab"].pop("Ċ"), "long": lambda: bpe["vocab"].update({"a" * 1001: 950}),
        "two ids": lambda: (bpe["vocab"].update({"zq": 950, "qz": 950}), bpe["merges"].extend([["z", "q"], ["q", "z"]])),
        "too many": lambda: (bpe["vocab"].update({"zq": 960}), bpe["merges"].append(["z", "q"])),
        "no end": lambda: ((folder / "tokenizer_config.json").unlink(), (folder / "generation_config.json").unlink(), config(eos_token_id=300)),
        "gap": lambda: pattern(r"\p{L}+|\s+"), "nothing cut": lambda: pattern(r"\p{L}*|\s+|[^\s\p{L}]"),
        "possessive": lambda: pattern(r"\p{N}{1,3}+|\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "line": lambda: pattern(r"[^\s$]+|^\s+|\s+"),
        "word": lambda: added("learning"), "tabs": lambda: added("\t\t"),
        "runs": lambda: added("   "), "odd": lambda: tokenizer.pop("added_tokens"),
        "no folder": lambda: shutil.rmtree(folder), "no run": lambda: None, "half": lambda: (here / "half.tmp").mkdir(), "taken": lambda: None,
    }  # fmt: skip
    changes[name]()
    if folder.exists() and name != "no tokenizer":
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    target = {"taken": sound, "half": here / "half"}.get(name, here / f"run {name}")
    return [f"--from_hf={folder}", *([target] if name != "no run" else [])]


# ----------------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with three checkpoints, the runs made of them, the folders made of these in turn, and what became of the commands."""
    here = tmp_path_factory.mktemp("from_hf")
    kinds = {kind: trained(kind, here / kind) for kind in ("smol", "llama3", "olmo")}
    llama(here / "llama3", rope_parameters={"rope_type": "default", "rope_theta": 700.0}, rms_norm_eps=1e-3)
    llama(here / "smol", shards="20KB", tie_word_embeddings=True)
    for path in (here / "smol").glob("model*.safetensors"):
        save_file({name: p.bfloat16() for name, p in load_file(path).items()}, path, {"format": "pt"})
    shutil.copytree(here / "olmo", here / "bare")
    for name, prefix in (("olmo", "pico_decoder."), ("bare", "")):
        save_file(pico_state(prefix), here / name / "model.safetensors")
        (here / name / "config.json").write_text(json.dumps(PICO))
    shutil.copytree(here / "llama3", here / "full")
    weights, config = load_file(here / "full" / "model.safetensors"), read_json(here / "full" / "config.json")
    save_file({name: p[:901].contiguous() if len(p) == 960 else p for name, p in weights.items()}, here / "full" / "model.safetensors")
    (here / "full" / "config.json").write_text(json.dumps(config | {"vocab_size": 901}))
    cases = {name: [f"--from_hf={here / name}", here / f"{name}_run"] for name in ("smol", "llama3", "olmo", "bare", "full")}
    cases |= {f"{name} back": [here / f"{name}_run", here / f"{name}_back"] for name in ("smol", "llama3", "olmo")}
    cases |= {f"{name} again": [f"--from_hf={here / name}_back", here / f"{name}_again"] for name in ("smol", "llama3", "olmo")}
    cases |= {name: damaged(name, here) for name in MISTAKES}
    done = dict(zip(cases, run_many("export_hf.py", cases.values()), strict=True))
    return here, kinds, done


def test_it_works(world):
    here, _, done = world
    for name in done:
        if name not in MISTAKES:
            assert done[name].returncode == 0 and not done[name].stderr, done[name].stderr
    for name in ("smol", "llama3", "olmo", "bare"):
        assert sorted(os.listdir(here / f"{name}_run")) == ["ckpt_000000.pt", "config.json", "meta.json", "tokenizer.tiktoken"]
    assert "tied" in done["smol"].stdout and "<|endoftext|> is their <|begin|>, 0" in done["smol"].stdout
    assert "<|mask|> is the row 900 of" in done["smol"].stdout
    assert "<|endoftext|> is their </s>, 900" in done["llama3"].stdout and "NFC" in done["olmo"].stdout and "tied" not in done["llama3"].stdout


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(world, name):
    here, _, done = world
    done = done[name]
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in MISTAKES[name]), done.stderr
    assert not (here / f"run {name}").exists() and not (here / f"run {name}.tmp").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["smol", "llama3"])
@pytest.mark.parametrize("back", [False, True])
def test_logits(world, name, back):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(world[0] / (f"{name}_back" if back else name), dtype=torch.float32).eval()
    ours = load_model(str(world[0] / f"{name}_run"))[0]
    idx = torch.randint(960, (3, 40), generator=torch.Generator().manual_seed(0))
    assert ours.logits(idx).std() > 0.5
    torch.testing.assert_close(ours.logits(idx), theirs(idx).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmo", "bare"])
def test_rotation_of_complex_numbers(world, name):
    """The whole of a pico-decoder, written anew in float64; and it does matter which numbers make a pair."""
    model = load_model(str(world[0] / f"{name}_run"))[0]
    idx = torch.randint(960, (40,), generator=torch.Generator().manual_seed(0))
    expected = complex_logits(pico_state(""), idx)
    torch.testing.assert_close(model.logits(idx[None])[0].double(), expected, rtol=0, atol=1e-4)
    for block in model.blocks:
        block.attention.q_proj.weight.copy_(block.attention.q_proj.weight.roll(1, 0))
    assert (model.logits(idx[None])[0].double() - expected).abs().max() > 0.1


def test_pico_and_back(world):
    """Our weights, written in pico-decoder's names row by row, are the file that they came from."""
    model, theirs = load_model(str(world[0] / "olmo_run"))[0], load_file(world[0] / "olmo" / "model.safetensors")
    ours, written = model.state_dict(), {}
    for name, (_, pico) in NAMES.items():
        for i in range(2):
            p = ours[f"{name}.weight".format(i=i)].clone()
            if name.endswith(("q_proj", "k_proj")):
                p = torch.stack([p[head * 8 + half * 4 + j] for head in range(len(p) // 8) for j in range(4) for half in range(2)])
            written[f"pico_decoder.{pico}.weight".format(i=i)] = p
    assert written.keys() == theirs.keys() and all(torch.equal(written[name], theirs[name]) for name in theirs)


def test_settings_reach_the_model(world):
    for name, theta, eps in (("smol", 10000.0, 1e-6), ("llama3", 700.0, 1e-3), ("olmo", 500.0, 1e-4)):
        config = load_model(str(world[0] / f"{name}_run"))[0].config
        assert vars(config) == SHAPE | {"norm_eps": eps, "rope_theta": theta}


@pytest.mark.parametrize("name", ["smol", "llama3", "olmo"])
def test_ids(world, name):
    """Documentation, many scripts, random code points, and strings of what the patterns part: ids as `tokenizers` has them, there, here and back."""
    from tokenizers import Tokenizer

    here, kinds, _ = world
    encoding, rng = load_tokenizer(str(here / f"{name}_run")), random.Random(0)
    texts = documentation()[1::4] + SCRIPTS + ["".join(SCRIPTS)]
    everywhere = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts += ["".join(rng.choices(everywhere, k=50)) for _ in range(200)]
    parts = ["ab", "the", *(" " * n for n in (1, 2, 7, 24, 25, 49)), "\n", "\n\n", "\t", "'s", "'LL", "12", "5", "\u2003", "é", "e\u0301", "!", "²"]
    texts += ["".join(rng.choices(parts, k=15)) for _ in range(2000)]
    for tokenizer in (kinds[name], Tokenizer.from_file(str(here / f"{name}_back" / "tokenizer.json"))):
        found = [encoded.ids for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
        for text, expected in zip(texts, found, strict=True):
            assert encoding.encode_ordinary(text) == expected, text
    assert encoding.encode_ordinary_batch(texts) == found and sum(map(len, found)) > 100_000 and len(set(sum(found, []))) > 800


def test_there_and_back(world):
    """A run, exported and imported, is the run again."""
    for name in ("smol", "llama3", "olmo"):
        one, two = ([load_model(str(world[0] / f"{name}_{kind}"))[0].state_dict(), read_json(world[0] / f"{name}_{kind}" / "meta.json"),
                     (world[0] / f"{name}_{kind}" / "tokenizer.tiktoken").read_bytes()] for kind in ("run", "again"))  # fmt: skip
        assert all(torch.equal(one[0][key], two[0][key]) for key in one[0]) and one[2] == two[2]
        assert all(one[1][key] == two[1][key] for key in ("pattern", "special_tokens", "normalizer", "vocab_size", "sha256"))
        assert "imported from" in (world[0] / f"{name}_back" / "README.md").read_text()


def test_merges_by_all_short_strings():
    """Random vocabularies: the check lets those pass, and no others, with which tiktoken and `tokenizers` agree on all short strings."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    strings = ["".join(letters) for n in range(1, 7) for letters in itertools.product("abc", repeat=n)]
    rng, outcomes = random.Random(0), []
    for _ in range(120):
        vocab, merges, ignore = {"a": 0, "b": 1, "c": 2}, [], rng.random() < 0.3
        for _ in range(rng.randint(1, 6)):
            left, right = rng.choices(list(vocab), k=2)
            if len(left + right) <= 4 and vocab.setdefault(left + right, len(vocab)) == len(vocab) - 1 and (left, right) not in merges:
                merges.append((left, right))
        if rng.random() < 0.3:
            vocab["".join(rng.choices("abc", k=3))] = len(vocab)
        vocab = {token: i for i, token in enumerate(vocab)}
        ranks, pairs = {token.encode(): i for token, i in vocab.items()}, [(left.encode(), right.encode()) for left, right in merges]
        theirs = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex("[abc]+"), "isolated")
        encoding = tiktoken.Encoding("random", pat_str="[abc]+", mergeable_ranks=ranks, special_tokens={})
        same = all(encoded.ids == encoding.encode_ordinary(text) for text, encoded in zip(strings, theirs.encode_batch(strings), strict=True))
        try:
            check_merges(ranks, pairs, ignore, "random")
            passed = True
        except SystemExit:
            passed = False
        assert same == passed, (vocab, merges, ignore)
        outcomes.append(same)
    assert 20 < sum(outcomes) < 100


def test_pattern_of_tiktoken():
    """GPT-2's as tiktoken writes it, of a corpus made with --tokenizer=gpt2, comes back from an export; it cuts the same there."""
    import regex  # tiktoken's own dependency
    from tiktoken_ext.openai_public import r50k_pat_str
    from tokenizers import Regex, pre_tokenizers

    split = {"type": "Split", "pattern": {"Regex": r50k_pat_str}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    assert pattern_of({"type": "Sequence", "pretokenizers": [split, by_bytes]}, 0, "") == r50k_pat_str
    theirs = pre_tokenizers.Split(Regex(r50k_pat_str), "isolated")
    for text in ["".join(parts) for parts in itertools.product(["a", " ", "\n", "\r", "1", "'s"], repeat=5)]:
        assert [piece for piece, _ in theirs.pre_tokenize_str(text)] == regex.findall(r50k_pat_str, text)


def test_the_last_id_left(world):
    """Where each row of the embedding has its token, the byte 255 gives up its own: no text has it."""
    here, kinds, done = world
    meta, encoding = read_json(here / "full_run" / "meta.json"), load_tokenizer(str(here / "full_run"))
    was = read_json(here / "full" / "tokenizer.json")["model"]["vocab"]["ÿ"]
    assert meta["special_tokens"]["<|mask|>"] == was and f"the id {was}, of the byte 255" in done["full"].stdout
    assert encoding.decode_single_token_bytes(was) == b"<|mask|>" and b"/w== " not in (here / "full_run" / "tokenizer.tiktoken").read_bytes()
    for text, expected in zip(SCRIPTS, kinds["llama3"].encode_batch(SCRIPTS, add_special_tokens=False), strict=True):
        assert encoding.encode_ordinary(text) == expected.ids and was not in expected.ids


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The evaluations


def run_here(capsys, script, *words):
    """Run a script in this process, where torch is there already: (exit code, what it printed, its errors)."""
    code, argv = 0, sys.argv
    sys.argv = [script, *map(str, words)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.argv = argv
    return code, *capsys.readouterr()


NER = "".join(f"# text = {name} sees {place} .\n1\t{name}\tB-PER\t-\t-\n2\tsees\tO\t-\t-\n3\t{place}\tB-LOC\t-\t-\n4\t.\tO\t-\t-\n\n"
              for name in ("Ann", "Bo") for place in ("Rome", "Oslo"))  # fmt: skip


def test_evaluations(world, tmp_path, capsys):
    """Each of them on one run, in a corpus of its own tokens; where there is no such corpus, one line says how to make it."""
    run = tmp_path / "smol_run"
    shutil.copytree(world[0] / "smol_run", run)
    with open(tmp_path / "text.jsonl", "w") as file:
        for i, text in enumerate(documentation()[::2]):
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "letters.txt").write_text("cafe\u0301 and 12 more\n\n   words")
    for split in ("train", "dev", "test"):
        (tmp_path / f"da_ddt-ud-{split}.iob2").write_text(NER)

    code, out, err = run_here(capsys, "eval_lm.py", run, f"--data={tmp_path / 'lm'}")
    scored = read_json(run / "eval_lm.json")["steps"]["0"]["all"]
    model, encoding, _ = load_model(str(run))
    ids = [0, *encoding.encode_ordinary("cafe\u0301 and 12 more\n\n   words")]  # 0 is its <|begin|>
    with torch.no_grad():
        nats = F.cross_entropy(model.logits(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="sum")
    assert code == 0 and scored["nats"] == pytest.approx(nats.item(), rel=1e-4) and scored["tokens"] == len(ids) - 1, err
    code, out, err = run_here(capsys, "sample.py", run, "--n_samples=1", "--n_tokens=60", "--temperature=5", "--top_k=0", "--prompt=The")
    assert code == 0 and "---\nThe" in out, err
    code, out, err = run_here(capsys, "eval_ner.py", run, f"--uner_dir={tmp_path}", "--test=da_ddt", "--epochs=1", "--head_epochs=1")
    assert code == 0 and "| full | da_ddt" in out, err

    looks = ["spectra.py"], ["eval_fewshot.py", "--n_episodes=4", "--shots=1"]
    for script, *more in looks:
        code, out, err = run_here(capsys, script, run, f"--data_dir={tmp_path / 'lm'}", *more)
        assert code == 2 and err.count("\n") == 1, err
        made = f"python data/prepare.py smol_run --source=... --tokenizer={run} --data_dir={tmp_path / 'lm'}"
        assert f"there is no corpus {tmp_path / 'lm' / 'smol_run'}: {made}" in err
    prepare = ["--val_fraction=0.5", "--workers=1", f"--source={tmp_path / 'text.jsonl'}", f"--tokenizer={run}"]
    code, out, err = run_here(capsys, "data/prepare.py", "smol_run", *prepare, f"--data_dir={tmp_path / 'data'}")
    assert code == 0, err
    for script, *more in looks:
        code, out, err = run_here(capsys, script, run, f"--data_dir={tmp_path / 'data'}", *more)
        assert code == 0 and "written" in out, err
    assert "per/weights/down" in (run / "spectra.csv").read_text() and read_json(run / "fewshot.json")["tasks"]
    meta = read_json(tmp_path / "data" / "smol_run" / "meta.json")
    (tmp_path / "data" / "smol_run" / "meta.json").write_text(json.dumps(meta | {"pattern": LETTERS}))
    code, out, err = run_here(capsys, "eval_fewshot.py", run, f"--data_dir={tmp_path / 'data'}")
    assert code == 2 and "has other tokens than" in err and err.count("\n") == 1


def test_corpus_in_its_tokens(world, tmp_path, capsys):
    """Documents of a corpus are what `tokenizers` makes of them, composed characters, runs of spaces and all."""
    texts = [f"{i}: cafe\u0301, A\u030a  and\n\n   {' ' * i}b" for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, _, err = run_here(capsys, "data/prepare.py", "docs", f"--source={tmp_path / 'text.jsonl'}", f"--tokenizer={world[0] / 'olmo_run'}",
                            f"--data_dir={tmp_path}", "--val_fraction=0.5", "--workers=1")  # fmt: skip
    assert code == 0, err
    meta = read_json(tmp_path / "docs" / "meta.json")
    tokens = np.concatenate([np.fromfile(tmp_path / "docs" / f"{split}.bin", "<u2") for split in ("train", "val")])
    eot = meta["special_tokens"]["<|endoftext|>"]
    documents = {tuple(document.tolist()) for document in np.split(tokens, np.flatnonzero(tokens == eot) + 1)[:-1]}
    assert documents == {(*encoded.ids, eot) for encoded in world[1]["olmo"].encode_batch(texts, add_special_tokens=False)}
    assert meta["vocab_size"] == 960 and load_corpus(str(tmp_path / "docs")).token_bytes[eot] == b""
