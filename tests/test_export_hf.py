"""export_hf.py as a user runs it: what transformers makes of the folder, against our own model, tokenizer and sample.py."""
import importlib
import inspect
import itertools
import json
import os
import random
import re
import shutil

import pytest
import tiktoken
import torch
from conftest import PACKAGES, run_many
from safetensors.torch import load_file

from export_hf import NAMES, card, hf_names, hf_tokenizer
from runs import load_checkpoint, load_model, read_json

PROMPT = "Return the number of"
# One passage in many scripts: accents composed and not, right to left, no spaces, joined emoji, digits of several kinds, odd spaces, contractions.
SCRIPTS = [
    "Größe, garçon, naïve, cafe\u0301, Łódź, İstanbul, ǅ", "Всички хора се раждат свободни и равни", "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι",
    "يولد جميع الناس أحرارًا متساوين", "כל בני האדם נולדו בני חורין", "सभी मनुष्यों को गौरव और अधिकारों", "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、", "모든 인간은 태어날 때부터 자유로우며", "ทุกคนเกิดมาอิสระ", "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇰 e=mc² ½ ٣٤٥ Ⅻ 五",
    "They're we'll I'M IT'S don't 'tis x'd 12345 3.14 $%^ ===> \t\tif x:\r\n\r\n    y  =  1   \n",
    " \u00a0\u2003\u3000\u200b\ufeff\x00\x1c\x85\u2028a  b",
    "", " ", "\n", "\U0010ffff\ue000\ufffd",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(quick_start, tmp_path_factory):
    """A folder, and what became of the commands that write into it, by name."""
    run, here = quick_start.folder, tmp_path_factory.mktemp("hub")
    (here / "full").mkdir()
    (here / "full" / "letter.txt").write_text("mine")
    (here / "made").mkdir()
    lacking = shutil.copytree(run, tmp_path_factory.mktemp("run") / "no sources")
    meta = read_json(lacking / "meta.json")
    (lacking / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if key != "sources"}))
    cases = {
        "no sources": [lacking, here / "x"],
        "newest": [run, here / "newest"], "step 40": [run, here / "made", "--step=40"],
        "nothing": [], "no target": [run], "no run": [here / "none", here / "x"], "no checkpoint": [here / "full", here / "x"],
        "full": [run, here / "full"], "no step": [run, here / "x", "--step=3"], "unwritable": [run, here / "full" / "letter.txt" / "x"],
    }  # fmt: skip
    return here, dict(zip(cases, run_many("export_hf.py", cases.values()), strict=True))


@pytest.fixture(scope="module")
def hub(results):
    """The folder of the newest step, its model and tokenizer as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = results[0] / "newest"
    return folder, AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_output(results):
    here, done = results
    for name, folder, step in (("newest", "newest", 160), ("step 40", "made", 40)):
        assert done[name].returncode == 0 and not done[name].stderr, done[name].stderr
        assert f"step {step}" in done[name].stdout and str(here / folder) in done[name].stdout
        assert sorted(os.listdir(here / folder)) == ["README.md", "config.json", "generation_config.json", "head.safetensors", "model.safetensors",
                                                     "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
        assert len({path.stat().st_mode for path in (here / folder).iterdir()}) == 1  # who may read one file may read all
    assert os.listdir(here / "full") == ["letter.txt"] and sorted(os.listdir(here)) == ["full", "made", "newest"]


@torch.no_grad()
@pytest.mark.parametrize(("folder", "step"), [("newest", 160), ("made", 40)])
def test_logits(quick_start, results, folder, step):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(results[0] / folder)
    ours = load_model(str(quick_start.folder), step)[0]
    assert type(theirs) is LlamaForCausalLM and theirs.dtype == torch.float32
    idx = torch.randint(ours.config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    assert ours.logits(idx).std() > 0.1
    torch.testing.assert_close(theirs(idx).logits, ours.logits(idx), rtol=0, atol=1e-5)


def test_names_go_both_ways(quick_start):
    model = load_model(str(quick_start.folder))[0]
    names = hf_names(model.config.n_layers)
    assert names.keys() == model.state_dict().keys() and len(set(names.values())) == len(names) and len(set(NAMES.values())) == len(NAMES)


def test_ids_and_text(quick_start, hub):
    """On the documentation of the standard library, in many scripts, and on random code points; decoded, it is the text again."""
    encoding, tokenizer, rng = load_model(str(quick_start.folder))[1], hub[2], random.Random(0)
    members = [value for name in PACKAGES.split(",") for _, value in inspect.getmembers(importlib.import_module(name)) if name != "typing"]
    texts = [text for value in members if (text := inspect.getdoc(value))]
    everywhere = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts += SCRIPTS + ["".join(SCRIPTS)] + ["".join(rng.choices(everywhere, k=50)) for _ in range(200)]
    texts += ["".join(rng.choices("ab 1'!\n\u00e9\t", k=30)) for _ in range(200)]
    ids = [encoding.encode_ordinary(text) for text in texts]
    assert sum(map(len, ids)) > 100_000 and len(set(sum(ids, []))) > 900
    for text, expected, given in zip(texts, ids, tokenizer(texts)["input_ids"], strict=True):
        assert given == expected, text
        assert tokenizer.decode(given) == text
    assert tokenizer("<|endoftext|>a<|mask|>")["input_ids"] == encoding.encode("<|endoftext|>a<|mask|>", allowed_special="all")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.mask_token) == ("<|endoftext|>", "<|endoftext|>", "<|mask|>")


def test_ids_of_another_vocabulary():
    """abc is ab + c and a + bc, cabcb no sum of tokens, c1 joins what GPT-2's pattern parts, ids are left out: all short strings, by tiktoken."""
    from tokenizers import Tokenizer

    special = {"<|mask|>": 301, "<|endoftext|>": 300}
    ranks = {bytes([i]): i for i in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"ca": 259, b"cabcb": 260, b"c1": 261}
    meta = {"pattern": "[abc1]+|.", "special_tokens": special}
    encoding = tiktoken.Encoding("other", pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.from_str(json.dumps(hf_tokenizer(encoding, meta)))
    for n in range(1, 7):
        for letters in itertools.product("abc1", repeat=n):
            assert tokenizer.encode("".join(letters)).ids == encoding.encode_ordinary("".join(letters)), letters
    assert tokenizer.encode("<|mask|><|endoftext|>").ids == [301, 300]


def test_greedy_text_is_that_of_sample(quick_start, hub):
    folder, model, tokenizer = hub
    printed = run_many("sample.py", [[quick_start.folder, f"--prompt={PROMPT}", "--temperature=0", "--n_tokens=20", "--n_samples=1"]])[0].stdout
    ids = tokenizer(f"<|endoftext|>{PROMPT}", return_tensors="pt")
    assert ids["input_ids"].shape[1] + 20 <= 32  # beyond block_size sample.py slides its window
    written = tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    assert printed.split("---\n", 1)[1] == written + "\n" and len(written) > len(PROMPT)


def test_head(quick_start, hub):
    head = load_checkpoint(str(quick_start.folder / "ckpt_000160.pt"))["head"]
    written = load_file(hub[0] / "head.safetensors")
    assert written.keys() == head.keys() and all(torch.equal(written[name], head[name]) for name in head)


def test_card(quick_start, hub):
    """Every number of the card from its source, and its example runs."""
    text, settings = (hub[0] / "README.md").read_text(), read_json(quick_start.folder / "config.json")
    last = [json.loads(line) for line in open(quick_start.folder / "log.jsonl")][-1]
    meta = read_json(quick_start.folder / "meta.json")
    size = meta["splits"]["train"]["tokens"] + meta["splits"]["val"]["tokens"]
    rows = dict(re.findall(r"^\| ([\w -]+) \| (.*) \|$", text, re.MULTILINE))
    n_params = sum(p.numel() for p in load_file(hub[0] / "model.safetensors").values())
    assert rows["parameters"] == f"{n_params:,}" and rows["steps"] == "160 of 160, seed 0" and "none" in rows["meta steps"]
    assert rows["tokens"] == f"{160 * 8 * 32:,} of language modelling, 0 of episodes" and rows["FLOPs"] == f"{last['flops']:.3g}"
    assert rows["validation loss"] == f"{last['val_loss']:.4f} nats a token, {last['val_bits_per_byte']:.4f} bits a byte"
    assert rows["held-out words"] == "not measured at this step"  # so small a corpus has too few such words
    assert all(part in rows["corpus"] for part in ("docstrings", meta["corpus_hash"], f"{size:,}"))
    written = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert {key for key in written if written[key] != settings[key]} == {"data_dir", "out_dir"} and str(quick_start.folder.parent) not in text
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {"DIR": hub[0]})


def test_card_of_a_run_with_meta_steps(quick_start):
    model, _, checkpoint = load_model(str(quick_start.folder))
    state = checkpoint | {"config": checkpoint["config"] | {"meta_ratio": 0.25, "n_way": 8, "k_shot": 3, "inner_steps": 5, "inner_lr": 2.0}}
    looked = {"val_loss": 1.25, "val_bits_per_byte": 0.5, "heldout_query_acc": 0.4321, "heldout_query_acc_se": 0.0123}
    text = card(model, state, read_json(quick_start.folder / "meta.json"), looked)
    assert "| meta steps | 0.25 of all, 8-way 3-shot, features read before the blank, 5 inner steps at learning rate 2 |" in text
    assert "| held-out words | query accuracy 0.432 ± 0.012 (standard error), chance 0.1250 |" in text and "interleaved" in text
    assert "vanilla" not in text and "vanilla" in card(model, checkpoint, read_json(quick_start.folder / "meta.json"), {})


MISTAKES = {
    "nothing": ["python export_hf.py out/<run> DIR", "nothing"],
    "no target": ["python export_hf.py out/<run> DIR"],
    "no run": ["python export_hf.py out/<run> DIR", "none"],
    "no checkpoint": ["holds no checkpoint"],
    "full": ["full exists already"],
    "no step": ["no checkpoint of step 3", "40, 80, 120, 160"],
    "unwritable": ["cannot write"],
    "no sources": ["meta.json", "lacks", "'sources'"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(results, name):
    done = results[1][name]
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in MISTAKES[name]), done.stderr
