"""train.py --mix: both losses in a step, of episodes of their own or of tasks inside the step's rows."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint, log_of, run_many, without_times
from test_processes import end, ranks, same_lines

import smlmt
from model import Llama, ModelConfig
from plumbing.corpus import load_corpus

D, T, B, N, K, Q, E, STEPS, WEIGHT = 16, 16, 40, 3, 2, 1, 2, 3, 0.5
WORDS = f"""--d_model={D} --n_layers=1 --n_heads=2 --n_kv_heads=1 --d_ff=24 --block_size={T} --batch_size={B}
    --compile=False --dtype=float32 --n_way={N} --k_shot={K} --q_query={Q} --episode_len=20 --inner_lr=1
    --inner_steps={STEPS} --meta_ratio=0.5 --meta_weight={WEIGHT} --episodes_per_step={E} --max_steps=4
    --warmup_steps=1 --lr=0.01 --grad_clip=1e9 --eval_steps=2 --eval_interval=1000 --ckpt_interval=1
    --word_max_count=1000 --word_min_count=200""".split()
CASES = {  # name of a run -> what it adds to WORDS
    "vanilla": ["--meta_ratio=0"], "lm": ["--meta_ratio=0", "--max_steps=1"],
    "meta": ["--meta_ratio=1", "--max_steps=1"], "joint": ["--mix=joint", "--max_steps=1"],
    "joint, 0": ["--mix=joint", "--meta_weight=0"],
    "inline": ["--mix=inline"], "inline, 0": ["--mix=inline", "--meta_weight=0"],
    "scarce": ["--mix=inline", "--n_way=60"], "second order": ["--mix=inline", "--second_order=True"],
    "shuffled": ["--mix=inline", "--shuffle_labels=True"], "multi-task": ["--mix=inline", "--inner_steps=0"],
    "again": ["--mix=inline", "--max_steps=2", "--schedule=constant"],
    "through": ["--mix=inline", "--schedule=constant"]}

@pytest.fixture(scope="module")
def here(data_dir, tmp_path_factory):
    """The folder of all runs."""
    here = tmp_path_factory.mktemp("mix")
    cases = [[*WORDS, f"--data_dir={data_dir}", f"--out_dir={here / name}", *words]
             for name, words in CASES.items()]
    cases.append([*cases[-2], "--max_steps=4", "--resume=True"])  # "again"
    for done in run_many("train.py", cases, report=False):
        assert (done.returncode, done.stderr) == (0, "")
    return here

@pytest.fixture(scope="module")
def corpus(data_dir):
    return load_corpus(data_dir / "docstrings")

def batch(corpus, step):
    """The rows of a step, and its tasks, by train.py's streams of random numbers."""
    starts = np.random.default_rng((0, 0, step)).integers(len(corpus.train) - T, size=B)
    rows, rng = np.stack([corpus.train[i : i + T + 1] for i in starts]), np.random.default_rng((0, 2, step))
    vocabulary = smlmt.Vocabulary(corpus.token_bytes, corpus.vocab_size)
    return rows, smlmt.inline(vocabulary, rows, rng, E, n_way=N, k_shot=K, q_query=Q)

def gradient_of(folder, step=4):
    """Name -> the gradient of a step, from AdamW's first moments before and after it."""
    before, after = (checkpoint(folder, s).optimizer for s in (step - 1, step))
    return {name[8:]: (m - 0.9 * before[name]) / 0.1 for name, m in after.items() if name[:8] == "exp_avg/"}

@pytest.mark.parametrize("name", ["inline", "second order", "shuffled", "multi-task"])
def test_inline_step_is_that_of_an_unrolled_loop(here, corpus, name):
    rows, (_, tasks) = batch(corpus, 4)
    saved = checkpoint(here / name, 3)
    model = Llama(ModelConfig(D, 1, 2, 1, 24, corpus.vocab_size, T))
    model.load_state_dict(saved.model)
    head = {key: p.requires_grad_() for key, p in saved.head.items()}
    idx = torch.from_numpy(rows.astype(np.int64))
    x = model.features(idx[:, :-1])  # (B, T, D)
    lm_loss = F.cross_entropy(model.unembedding(x).flatten(0, 1), idx[:, 1:].flatten())
    losses, second_order = [], name == "second order"
    for e in range(E):
        support, query = (torch.stack([x[p // T, p % T] for p in tasks[part][e].tolist()]) / D**0.5
                          for part in ("support", "query"))
        labels, asked = torch.arange(N).repeat_interleave(K), torch.arange(N).repeat_interleave(Q)
        if name == "shuffled":
            labels = torch.from_numpy(np.random.default_rng((0, 4, 4, e)).permutation(labels.numpy()))
        W, b = head["0.weight"], head["0.bias"]
        W, b = (W[tasks["words"][e]], b[tasks["words"][e]]) if name == "multi-task" else (W, b)
        for _ in range(0 if name == "multi-task" else STEPS):
            loss = F.cross_entropy((support if second_order else support.detach()) @ W.T + b, labels)
            slope = torch.autograd.grad(loss, (W, b), create_graph=second_order)
            W, b = W - N * slope[0], b - N * slope[1]
        losses.append(F.cross_entropy(query @ W.T + b, asked))
    meta_loss, start = sum(losses) / E, dict(model.named_parameters())
    start |= {f"head.{key}": p for key, p in head.items()}
    expected = torch.autograd.grad(lm_loss + WEIGHT * meta_loss, list(start.values()))
    gradient = gradient_of(here / name)
    for key, theirs in zip(start, expected, strict=True):
        torch.testing.assert_close(gradient.pop(key), theirs, rtol=1e-3, atol=2e-5, msg=key)
    assert not gradient
    line = log_of(here / name, "joint")[-1]
    assert (line["lm_loss"], line["meta_loss"]) == pytest.approx((lm_loss.item(), meta_loss.item()), rel=1e-5)

def test_inline_tasks_are_in_the_rows(corpus):
    """Against a search, token by token: each place is followed by its word, and that is whole."""
    texts = [piece.decode("utf-8", "surrogateescape") for piece in corpus.token_bytes]
    texts += [""] * (corpus.vocab_size - len(texts))
    for step in range(5):
        rows, (found, tasks) = batch(corpus, step)
        places = np.concatenate([tasks[part].reshape(E, N, -1) for part in ("support", "query")], axis=2)
        stands = {}  # word -> where a model is about to read it
        for b, row in enumerate(rows.tolist()):
            for t in range(T - 1):
                text, following = texts[row[t + 1]], texts[row[t + 2]][:1]
                ends = not (following.isalpha() or "\udc80" <= following <= "\udcff")
                word, is_word = text[1:].casefold(), text[:1] == " " and text[1:].isalpha()
                if is_word and ends and not smlmt.is_heldout(word):
                    stands.setdefault(word, []).append(b * T + t)
        assert found == sum(len(of_word) >= K + Q for of_word in stands.values()) > N
        assert places.shape == (E, N, K + Q) and tasks["words"].shape == (E, N)
        for e in range(E):
            asked = [texts[i][1:].casefold() for i in tasks["words"][e]]
            assert len(set(asked)) == N and len(set(places[e].ravel())) == N * (K + Q)
            assert all(set(places[e, c]) <= set(stands[word]) for c, word in enumerate(asked))
    vocabulary = smlmt.Vocabulary(corpus.token_bytes, corpus.vocab_size)
    none = smlmt.inline(vocabulary, rows, np.random.default_rng(0), E, n_way=found + 1, k_shot=K, q_query=Q)
    assert none == (found, None)

def test_features_at_a_place_have_not_seen_the_word(corpus):
    rows, (_, tasks) = batch(corpus, 1)
    model = Llama(ModelConfig(D, 1, 2, 1, 24, corpus.vocab_size, T))
    idx = torch.from_numpy(rows.astype(np.int64))
    b, t = divmod(int(tasks["support"][0, 0]), T)
    other = idx.clone()
    other[b, t + 1 :] = 7
    a, c = (model.features(tokens[:, :-1])[b] for tokens in (idx, other))
    assert torch.equal(a[t], c[t]) and not (t + 1 < T and torch.equal(a[t + 1], c[t + 1]))

@pytest.mark.parametrize("name", ["joint, 0", "inline, 0", "scarce"])
def test_without_weight_or_words_it_is_the_vanilla_run(here, name):
    keys = "lm_loss", "val_loss", "grad_norm"
    ours, theirs = ([[line.get(key) for key in keys] for line in log_of(here / run)]
                    for run in (name, "vanilla"))
    assert ours == theirs
    model = checkpoint(here / name, 4).model
    assert all(torch.equal(p, model[key]) for key, p in checkpoint(here / "vanilla", 4).model.items())
    kinds = {line["kind"] for line in log_of(here / name)}
    assert kinds == ({"lm", "eval"} if name == "scarce" else {"joint", "eval"})
    if name == "scarce":
        assert all(0 < line["inline_words"] < 60 for line in log_of(here / name, "lm"))

def test_joint_step_is_the_sum_of_both(here):
    """At the first step, from the same weights: the gradient of the one, and the other's times its weight."""
    lm, meta, joint = ({name[8:]: m / 0.1 for name, m in checkpoint(here / run, 1).optimizer.items()
                        if name[:8] == "exp_avg/"} for run in ("lm", "meta", "joint"))
    assert joint.keys() == lm.keys() | meta.keys()
    for name, g in joint.items():
        zero = torch.zeros_like(g)
        total = lm.get(name, zero) + WEIGHT * meta.get(name, zero)
        torch.testing.assert_close(g, total, rtol=1e-4, atol=1e-6)

def test_budgets(here):
    """Joint reads its episodes besides; inline reads nothing, and pays for the head alone."""
    lm, meta, joint, inline = (log_of(here / run)[1] for run in ("lm", "meta", "joint", "inline"))
    for key in ("lm_tokens", "episode_tokens", "flops"):
        assert joint[key] == lm[key] + meta[key]
    assert inline["lm_tokens"] == lm["lm_tokens"] and inline["episode_tokens"] == 0
    assert inline["flops"] - lm["flops"] == E * N * (K * STEPS + Q) * 6 * N * (D + 1)

def test_inline_resumes_bit_equal(here):
    straight, again = (without_times(log_of(here / name, "joint")) for name in ("through", "again"))
    assert len(again) == 4 and again == straight

def test_two_processes_are_one(here, data_dir, tmp_path):
    codes, _ = end(ranks(2, *WORDS, "--mix=inline", f"--data_dir={data_dir}", f"--out_dir={tmp_path}"))
    assert codes == [0, 0]
    same_lines(log_of(tmp_path), log_of(here / "inline"))
