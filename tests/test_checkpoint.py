"""Checkpoints: what Hugging Face's libraries make of ours, what we make of theirs, and damage."""
import importlib
import inspect
import itertools
import json
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import PACKAGES, run_many
from safetensors.torch import load_file, save_file

from plumbing.checkpoint import checkpoints, load_model
from plumbing.files import read_json
from plumbing.tokenizer import HubTokenizer, Tokenizer, hf_files, load_tokenizer

# Accents composed and not, right to left, no spaces, joined emoji, digits of several kinds, odd spaces.
SCRIPTS = [
    "Größe, garçon, naïve, cafe\u0301, Łódź, İstanbul, ǅ", "Всички хора се раждат", "يولد جميع الناس",
    "सभी मनुष्यों को गौरव", "人人生而自由，在尊严和权利上一律平等。", "すべての人間は、", "모든 인간은",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇰 e=mc² ½ ٣٤٥ Ⅻ 五",
    "They're we'll I'M x'd 12345 3.14 $%^ ===> \t\tif x:\r\n\r\n    y  =  1  \n",
    " \u00a0\u2003\u3000\u200b\ufeff\x00\x1c\x85\u2028a  b", "", " ", "\n", "\U0010ffff\ue000\ufffd",
    "<|endoftext|> <|mask|>",
]

def documentation():
    modules = [importlib.import_module(name) for name in PACKAGES.split(",") if name != "typing"]
    members = [member for module in modules for _, member in inspect.getmembers(module)]
    return [text for member in members if (text := inspect.getdoc(member))]

# --------------------------------------------------------------------------------------------------
# Ours, as Hugging Face's libraries open it

@pytest.fixture(scope="module")
def hub(quick_start):
    """The folder of the newest step, its model and its tokenizer as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = list(checkpoints(quick_start.folder).values())[-1]
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

@torch.no_grad()
def test_logits(quick_start, hub):
    from transformers import LlamaForCausalLM

    ours = load_model(quick_start.folder).model
    idx = torch.randint(ours.config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    assert type(hub[1]) is LlamaForCausalLM and hub[1].dtype == torch.float32 and ours.logits(idx).std() > 0.1
    torch.testing.assert_close(hub[1](idx).logits, ours.logits(idx), rtol=0, atol=1e-5)

def test_ids_and_text(data_dir, quick_start, hub):
    """On documentation, many scripts and random code points: tiktoken, transformers and our adapter agree."""
    corpus, adapter = load_tokenizer(data_dir / "docstrings"), load_model(quick_start.folder).tokenizer
    assert type(corpus) is Tokenizer and type(adapter) is HubTokenizer
    rng, everywhere = random.Random(0), [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts = documentation() + SCRIPTS + ["".join(SCRIPTS)]
    texts += ["".join(rng.choices(everywhere, k=50)) for _ in range(200)]
    texts += ["".join(rng.choices("ab 1'!\n\u00e9\t", k=30)) for _ in range(200)]
    ids = corpus.encode_ordinary_batch(texts)
    assert sum(map(len, ids)) > 100_000 and len(set(itertools.chain(*ids))) > 900
    assert adapter.encode_ordinary_batch(texts) == ids
    assert [adapter.decode(row) for row in ids] == texts == [corpus.decode(row) for row in ids]
    assert adapter.token_bytes == corpus.token_bytes
    assert (adapter.eot, adapter.mask, adapter.n_vocab) == (corpus.eot, corpus.mask, corpus.n_vocab)
    plain = [text for text in texts if "<|" not in text]  # written out, these are special to transformers
    assert hub[2](plain)["input_ids"] == corpus.encode_ordinary_batch(plain)
    special = [corpus.eot, *corpus.encode_ordinary("a"), corpus.mask]
    assert hub[2]("<|endoftext|>a<|mask|>")["input_ids"] == special

def test_ids_of_another_vocabulary(tmp_path):
    """abc is ab + c and a + bc, cabcb is no sum of tokens, c1 joins letter and digit: all short strings."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"bc": 256, b"ab": 257, b"abc": 258, b"ca": 259, b"cabcb": 260, b"c1": 261}
    ours = Tokenizer(ranks, "[abc1]+|.", {"<|mask|>": 263, "<|endoftext|>": 262})
    for name, text in hf_files(ours, 8).items():
        (tmp_path / name).write_text(text)
    theirs = load_tokenizer(tmp_path)
    for n in range(1, 7):
        for letters in itertools.product("abc1", repeat=n):
            assert theirs.encode_ordinary("".join(letters)) == ours.encode_ordinary("".join(letters)), letters

def test_a_batch_of_texts(hub):
    """Texts of different lengths are continued as each alone is, and a sequence classifier takes them."""
    from transformers import AutoModelForSequenceClassification

    folder, model, tokenizer = hub
    texts = ["Return", "Return the sum of the numbers in the list"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    for text, row in zip(texts, together, strict=True):
        alone = model.generate(**tokenizer([text], return_tensors="pt"), max_new_tokens=6, do_sample=False)
        assert alone[0, -6:].tolist() == row.tolist()
    assert model.config.pad_token_id == tokenizer.pad_token_id
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert classifier(**batch).logits.shape == (2, 2)

# --------------------------------------------------------------------------------------------------
# Theirs

def train_tokenizer(folder):
    """A byte-level tokenizer of SmolLM's kind, by `tokenizers`, in the files that transformers writes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer, parts = Tokenizer(models.BPE()), pre_tokenizers
    tokenizer.pre_tokenizer = parts.Sequence([parts.Digits(True), parts.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<|begin|>", "<|end|>"],
                                  show_progress=False, initial_alphabet=parts.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documentation()[::4], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.save_pretrained(folder)

def pico_state(prefix=""):
    """A state dict in pico-decoder's names, two layers of four heads over two."""
    torch.manual_seed(2)
    D, state = 32, {"output_norm": torch.rand(32) + 0.5}
    state |= {"embedding_proj": torch.randn(960, D), "de_embedding_proj": torch.randn(960, D) / 8}
    for i in range(2):
        for name, width in {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}.items():
            state[f"layers.{i}.attention.{name}"] = torch.randn(width, D) / 3
        for name, shape in {"w_0": (48, D), "w_1": (48, D), "w_2": (D, 48)}.items():
            state[f"layers.{i}.swiglu.{name}"] = torch.randn(shape) / 3
        for name in ("attention", "swiglu"):
            state[f"layers.{i}.{name}_norm"] = torch.rand(D) + 0.5
    return {f"{prefix}{name}.weight": p for name, p in state.items()}

PICO = {"model_type": "pico_decoder", "d_model": 32, "n_layers": 2, "vocab_size": 960, "max_seq_len": 40,
        "attention_n_heads": 4, "attention_n_kv_heads": 2, "activation_hidden_dim": 48, "norm_eps": 1e-4,
        "position_emb_theta": 500.0}

def pico_logits(state, idx, eps=1e-4, theta=500.0, H=4, K=2):
    """The pico-decoder, written anew: positions rotate complex numbers, attention goes head by head."""
    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    (T,), C = idx.shape, 32
    D = C // H
    frequencies = theta ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.exp(1j * torch.outer(torch.arange(T).double(), frequencies))  # (T, D/2)
    state = {name: p.double() for name, p in state.items()}
    x = state["embedding_proj.weight"][idx]  # (T, C)
    for i in range(2):
        w = {name.removeprefix(f"layers.{i}.").removesuffix(".weight"): p for name, p in state.items()}
        h, out = norm(x, w["attention_norm"]), torch.zeros(T, C).double()
        q, k, v = (h @ w[f"attention.{name}_proj"].T for name in "qkv")
        for head in range(H):
            mine, of = slice(head * D, (head + 1) * D), head // (H // K)
            theirs = slice(of * D, (of + 1) * D)
            qs = torch.view_as_complex(q[:, mine].reshape(T, D // 2, 2)) * turn
            ks = torch.view_as_complex(k[:, theirs].reshape(T, D // 2, 2)) * turn
            for t in range(T):
                p = ((qs[t] * ks[: t + 1].conj()).real.sum(-1) / D**0.5).softmax(0)
                out[t, mine] = p @ v[: t + 1, theirs]
        x = x + out @ w["attention.o_proj"].T
        h = norm(x, w["swiglu_norm"])
        x = x + (F.silu(h @ w["swiglu.w_0"].T) * (h @ w["swiglu.w_1"].T)) @ w["swiglu.w_2"].T
    return norm(x, state["output_norm.weight"]) @ state["de_embedding_proj.weight"].T

@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Folders of others: a Llama in bfloat16, tied, in three files; one in one file; two pico-decoders."""
    from transformers import LlamaConfig, LlamaForCausalLM

    here = tmp_path_factory.mktemp("theirs")
    train_tokenizer(here / "tokenizer")
    for name, options in (("tied", {"tie_word_embeddings": True}), ("single", {"rms_norm_eps": 1e-3})):
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=960,
            intermediate_size=48, max_position_embeddings=40, initializer_range=0.2, bos_token_id=0,
            **options))
        for parameter in (p for key, p in model.named_parameters() if "norm" in key):
            parameter.data.uniform_(0.5, 1.5)
        model = model.bfloat16() if name == "tied" else model
        shutil.copytree(here / "tokenizer", here / name)
        model.save_pretrained(here / name, max_shard_size="20KB" if name == "tied" else "1GB")
    for name, prefix in (("pico", ""), ("prefixed", "pico_decoder.")):
        shutil.copytree(here / "tokenizer", here / name)
        save_file(pico_state(prefix), here / name / "model.safetensors")
        (here / name / "config.json").write_text(json.dumps(PICO))
    assert len(list((here / "tied").glob("model-*-of-*.safetensors"))) == 3
    return here

@torch.no_grad()
@pytest.mark.parametrize("name", ["tied", "single"])
def test_logits_of_theirs(theirs, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    idx = torch.randint(960, (3, 40), generator=torch.Generator().manual_seed(0))
    loaded = load_model(theirs / name)
    expected = AutoModelForCausalLM.from_pretrained(theirs / name, dtype=torch.float32).eval()(idx).logits
    assert expected.std() > 0.5 and loaded.settings == {} and loaded.head == {}
    torch.testing.assert_close(loaded.model.logits(idx), expected, rtol=0, atol=2e-5)
    tokenizer, texts = AutoTokenizer.from_pretrained(theirs / name), documentation()[:50] + SCRIPTS[:-1]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert loaded.tokenizer.encode_ordinary_batch(texts) == ids
    assert loaded.tokenizer.eot == tokenizer.bos_token_id

@torch.no_grad()
@pytest.mark.parametrize("name", ["pico", "prefixed"])
def test_logits_of_a_pico_decoder(theirs, name):
    model, idx = load_model(theirs / name).model, torch.arange(7, 47)
    expected = pico_logits(pico_state(), idx)
    torch.testing.assert_close(model.logits(idx[None])[0].double(), expected, rtol=0, atol=1e-4)

def test_every_script_takes_them(theirs, tmp_path):
    """eval_lm, sample and spectra on a Llama of others, eval_fewshot and eval_ner on a pico-decoder."""
    rows = [{"text": text[:200], "label": i % 2} for i, text in enumerate(documentation()[:40])]
    for name in ("toy_train", "toy_test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"{i}\t{word}\t{tag}\t-\tx" for i, word, tag in ((1, "so", "O"), (2, "it", "B-PER"))]
    for split in ("train", "dev", "test"):
        (tmp_path / f"da_ddt-ud-{split}.iob2").write_text(("\n".join(words) + "\n\n") * 12)
    options = [f"--data_dir={tmp_path}", f"--tokenizer={theirs / 'tied'}", "--val_fraction=0.5"]
    (corpus,) = run_many("data/prepare.py", [["other", f"--source={tmp_path}/toy_train.jsonl", *options]])
    assert corpus.returncode == 0, corpus.stderr
    tied, pico = (shutil.copytree(theirs / name, tmp_path / name) for name in ("tied", "pico"))
    cases = {"eval_lm.py": [tied, f"--data={tmp_path}/toy_test.jsonl"],
             "eval_fewshot.py": [pico, f"--data={tmp_path}", "--n_episodes=2", "--shots=1"],
             "eval_ner.py": [pico, f"--uner_dir={tmp_path}", "--train=da_ddt", "--test=da_ddt", "--mode=head",
                             "--head_epochs=1"],
             "sample.py": [tied, "--n_samples=1", "--n_tokens=5"],
             "spectra.py": [tied, f"--corpus={tmp_path}/other"]}
    for script, words in cases.items():
        (done,) = run_many(script, [words])
        assert done.returncode == 0 and "Traceback" not in done.stderr, (script, done.stderr)

# --------------------------------------------------------------------------------------------------
# Damage and malice

def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | changes))

def without(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")

DAMAGE = {  # what is done to a sound folder, and what the one line says
    "missing tensor": (lambda f: without(f, "model.norm.weight"), "lacks 'model.norm.weight'"),
    "too few layers": (lambda f: change_config(f, num_hidden_layers=1), "no tensor model.layers.1"),
    "a million layers": (lambda f: change_config(f, num_hidden_layers=10**6), "1000000 layers"),
    "another model": (lambda f: change_config(f, model_type="mistral"), "model_type = mistral"),
    "biases": (lambda f: change_config(f, attention_bias=True), "attention_bias = True"),
    "scaled": (lambda f: change_config(f, rope_parameters={"rope_type": "yarn"}), "rope_type = yarn"),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no model.safetensors"),
    "half a tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"'), "the tokenizer"),
}

@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(theirs, tmp_path, capsys, name):
    folder, (damage, says) = shutil.copytree(theirs / "single", tmp_path / "copy"), DAMAGE[name]
    damage(folder)
    with pytest.raises(SystemExit):
        load_model(folder)
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and says in line

def test_flipped_bits_are_found(quick_start, tmp_path, capsys):
    folder = shutil.copytree(list(checkpoints(quick_start.folder).values())[-1], tmp_path / "copy")
    for name in ("model.safetensors", "head.safetensors", "tokenizer.json", "config.json"):
        sound = (folder / name).read_bytes()
        damaged = bytearray(sound)
        damaged[len(sound) * 2 // 3] ^= 4
        (folder / name).write_bytes(damaged)
        with pytest.raises(SystemExit):
            load_model(folder)
        assert f"{name} does not match the sha256" in capsys.readouterr().err
        (folder / name).write_bytes(sound)
    assert load_model(folder).step == 160

def test_index_cannot_reach_outside(theirs, tmp_path, capsys):
    folder = shutil.copytree(theirs / "tied", tmp_path / "copy")
    shutil.copy(theirs / "single" / "model.safetensors", tmp_path / "outside.safetensors")
    index = read_json(folder / "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(index["weight_map"], "../outside.safetensors")}))
    with pytest.raises(SystemExit):
        load_model(folder)
    assert "outside.safetensors" in capsys.readouterr().err
