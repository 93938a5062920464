"""train.py with both objectives: the meta step against an unrolled loop of plain autograd; what is drawn.

The commands run in one process, behind a witness that writes down every episode drawn. Checkpoints tell the
rest: AdamW's first moment becomes 0.9 m + 0.1 g, so that two in a row tell the gradient g between them.
"""
import json
import math
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, log_of, one_line, run_many, without_times

from model import Llama, ModelConfig
from plumbing.corpus import load_corpus
from plumbing.figures import curves
from smlmt import pool

WITNESS = f"""
import runpy, sys, zlib
import torch
import maml, smlmt
path, evaluates, sys.argv = sys.argv[1], sys.argv[2] == "True", [{str(ROOT / "train.py")!r}, *sys.argv[3:]]
was, drawn, adapted = (smlmt.Sampler.episode, maml.episode_loss), [], []

def seen_episode(self, index, heldout=False):
    if heldout and not evaluates:  # most runs can do without
        raise ValueError("not wanted here")
    episode = was[0](self, index, heldout)
    drawn.append((index, heldout, len(self.tokens), zlib.crc32(self.tokens), vars(episode)))
    return episode

def seen_loss(head, support, support_labels, query, query_labels, **settings):
    if torch.is_grad_enabled():  # not in evaluations
        labels = support_labels.tolist(), query_labels.tolist()
        adapted.append((support.requires_grad, query.requires_grad, *labels))
    return was[1](head, support, support_labels, query, query_labels, **settings)

smlmt.Sampler.episode, maml.episode_loss, smlmt.POOL_STEPS = seen_episode, seen_loss, 2
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    smlmt.Sampler.episode, maml.episode_loss = was
    torch.save((drawn, adapted), path)
"""
D, FF, V, B, T = 16, 24, 1024, 4, 16  # one layer of two heads and one key/value head, on rows of 16 tokens
N, K, Q, L, INNER_LR, INNER_STEPS, LAST = 4, 2, 3, 20, 5.0, 3, 3
BASE = dict(
    d_model=D, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=FF, block_size=T, batch_size=B, compile=False,
    dtype="float32", device="cpu", n_way=N, k_shot=K, q_query=Q, episode_len=L, inner_lr=INNER_LR / N,
    inner_steps=INNER_STEPS, meta_ratio=1, max_steps=LAST, lr=0.01, warmup_steps=1, grad_clip=1e9,
    eval_steps=2, eval_interval=1000, ckpt_interval=1, log_interval=1000, micro_episodes=64)
KINDS = {  # of meta steps, and what is set for each
    "first order": {},
    "second order": {"second_order": True},
    "one shot": {"k_shot": 1},
    "deep head": {"head_layers": 4, "head_hidden": 8},
    "deep head, second order": {"head_layers": 2, "head_hidden": 8, "second_order": True},
    "at the mask": {"readout": "mask"},
    "at the end": {"readout": "last"},
    "four episodes": {"episodes_per_step": 4},
    "four episodes, one by one": {"episodes_per_step": 4, "micro_episodes": 1},
    "four episodes, in halves": {"episodes_per_step": 4, "micro_episodes": 2, "second_order": True},
    "multi-task": {"inner_steps": 0},
    "multi-task, deep head": {"inner_steps": 0, "head_layers": 2, "head_hidden": 8, "episodes_per_step": 2},
}
BOTH = {"meta_ratio": 0.5, "max_steps": 12, "eval_interval": 6, "schedule": "constant", "seed": 1,
        "head_layers": 2, "head_hidden": 8}
STILL = {"lr": 1e-12, "max_steps": 40, "ckpt_interval": 40}  # weights stand still: losses tell of the text
LONG = {"max_steps": 40, "ckpt_interval": 20, "n_way": 8, "k_shot": 4, "q_query": 2, "inner_lr": 1.25,
        "inner_steps": 10, "grad_clip": 1}
POOL = {"pool_tokens": 40_000, "max_steps": 5}
MISTAKES = {  # what is set, and what the one line says
    "many ways": ({"n_way": 1000}, "n_way=1000"),
    "long windows": ({"episode_len": 10**6}, "episode_len=1000000"),
    "empty range": ({"word_min_count": 5001}, "word_max_count"),
    "short windows": ({"episode_len": 15}, "episode_len = 15"),
    "a mask never seen": ({"readout": "mask", "meta_ratio": 0}, "readout = mask"),
}

def run_witnessed(here, data_dir, cases):
    """Run train.py for each case, name -> changes to BASE, into here/name; its draws go to here/name.pt."""
    (here / "witness.py").write_text(WITNESS)
    words = []
    for name, changes in cases.items():
        changes = BASE | {"data_dir": data_dir, "out_dir": here / name, "evaluates": False} | changes
        evaluates = changes.pop("evaluates")
        words.append([here / f"{name}.pt", evaluates, *(f"--{k}={v}" for k, v in changes.items())])
    return dict(zip(cases, run_many(here / "witness.py", words, report=False), strict=True))

@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """The folder of all runs, and what became of the commands by name."""
    here = tmp_path_factory.mktemp("meta")
    again = {"out_dir": here / "both again"}
    cases = KINDS | {"both": BOTH | {"evaluates": True}, "both again": BOTH | {"max_steps": 7} | again,
                     "both, resumed": BOTH | {"resume": True} | again}
    cases |= {f"still {r}": STILL | {"meta_ratio": r} for r in (0.3, 1)}
    cases["still 0"] = STILL | {"meta_ratio": 0, "inner_steps": 1, "evaluates": True}
    cases["small pools"] = POOL
    cases["shuffled"] = LONG | {"shuffle_labels": True}
    cases["not shuffled"] = LONG
    cases["multi-task, long"] = LONG | {"inner_steps": 0, "evaluates": True, "eval_interval": 20}
    cases |= {name: changes for name, (changes, _) in MISTAKES.items()}
    return here, run_witnessed(here, data_dir, cases)

def witnessed(here, name):
    """[(index, heldout, length and crc32 of the pool, episode)] of the draws, and what seen_loss saw."""
    return torch.load(here / f"{name}.pt", weights_only=False)

def drawn(here, name):
    """The episodes of a run's meta steps, (step, e) -> dict, and the draws of its evaluations, in order."""
    calls, _ = witnessed(here, name)
    evaluations = [call for call in calls if isinstance(call[0], int)]
    return {index: episode for index, _, _, _, episode in calls if isinstance(index, tuple)}, evaluations

def step_episodes(here, name, step):
    return [episode for (i, _), episode in sorted(drawn(here, name)[0].items()) if i == step]

def same_draws(ours, theirs):
    assert ours.keys() == theirs.keys()
    for index, episode in ours.items():
        assert all(np.array_equal(part, theirs[index][name]) for name, part in episode.items()), index

def parameters(saved):
    return saved.model | {f"head.{name}": p for name, p in saved.head.items()}

def moments(saved):
    """Name -> AdamW's first moment; parameters that never had a gradient are missing."""
    return {name[8:]: m for name, m in saved.optimizer.items() if name.startswith("exp_avg/")}

# --------------------------------------------------------------------------------------------------
# The meta step

def by_hand(saved, episodes, lr, steps, second_order=False, multi_task=False):
    """Gradients by parameter name and the metrics, by an unrolled loop of plain autograd.

    Nothing here is shared with maml.py: features divided by sqrt(d), rectified layers, cross-entropy, and
    gradient descent on the head alone. At first order support features and inner gradients are constants.
    """
    model = Llama(ModelConfig(D, 1, 2, 1, FF, V, T))
    model.load_state_dict(saved.model)
    head = {name: p.clone().requires_grad_() for name, p in saved.head.items()}

    def answer(weights, x, labels):  # surprise, and which answers are right
        for W, b in zip(weights[:-2:2], weights[1:-2:2], strict=True):
            x = torch.relu(x @ W.T + b)
        logits = x @ weights[-2].T + weights[-1]
        right = logits[torch.arange(len(labels)), labels]
        return (logits.exp().sum(1).log() - right).mean(), (logits.argmax(1) == labels).numpy()

    losses, numbers = [], []
    for episode in episodes:
        labels, asked = (torch.from_numpy(episode[name]) for name in ("support_labels", "query_labels"))
        support, query = (
            model.features(torch.from_numpy(episode[part]))[range(len(episode[part])), episode[f"{part}_pos"]]
            / D**0.5 for part in ("support", "query"))
        support = support if second_order else support.detach()
        weights = [head[f"{i}.{kind}"] for i in range(len(head) // 2) for kind in ("weight", "bias")]
        weights[-2:] = [w[episode["words"]] if multi_task else w for w in weights[-2:]]
        line = {"chance": 1 / N, "majority_acc": 1 / N, "far_share": episode["far_share"]}
        line["support_loss_before"] = answer(weights, support, labels)[0].item()
        loss, line["query_acc_before"] = answer(weights, query, asked)
        line["query_loss_before"] = loss.item()
        for _ in range(steps):
            loss, _ = answer(weights, support, labels)
            slope = torch.autograd.grad(loss, weights, create_graph=second_order)
            rates = [lr / N / 2] * (len(weights) - 2) + [lr] * 2  # below the last layer not times the ways
            weights = [w - rate * g for w, rate, g in zip(weights, rates, slope, strict=True)]
        loss, line["query_acc"] = answer(weights, query, asked)
        losses.append(loss)
        line["support_acc"] = answer(weights, support, labels)[1].mean()
        numbers.append(line | {"meta_loss": loss.item()})
    start = dict(model.named_parameters()) | {f"head.{name}": p for name, p in head.items()}
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(start.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(start, gradients, strict=True) if g is not None}
    return gradients, {name: np.array([line[name] for line in numbers]) for name in numbers[0]}

@pytest.mark.parametrize("kind", KINDS)
def test_meta_step_is_that_of_an_unrolled_loop(runs, kind):
    here, changes = runs[0], KINDS[kind]
    before, after = checkpoint(here / kind, LAST - 1), checkpoint(here / kind, LAST)
    gradient = {name: (m - 0.9 * moments(before)[name]) / 0.1 for name, m in moments(after).items()}
    episodes, steps = step_episodes(here, kind, LAST), changes.get("inner_steps", INNER_STEPS)
    second_order = changes.get("second_order", False)
    lr = INNER_LR / 2 if kind == "one shot" else INNER_LR
    expected, numbers = by_hand(before, episodes, lr, steps, second_order, multi_task=steps == 0)
    assert len(episodes) == changes.get("episodes_per_step", 1)
    assert gradient.keys() == expected.keys() == parameters(before).keys() - {"unembedding.weight"}
    largest = max(g.abs().max() for g in expected.values())
    for name, g in gradient.items():
        assert (g - expected[name]).abs().max() < 1e-4 * largest, name
    line = log_of(here / kind, "meta")[-1]
    means = {name: values.mean() for name, values in numbers.items()}
    assert {name: line[name] for name in means} == pytest.approx(means, rel=1e-4, abs=1e-6)
    norm = sum(g.square().sum().item() for g in expected.values()) ** 0.5
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    if steps:  # the comparison tells the two orders apart
        other, _ = by_hand(before, episodes, lr, steps, not second_order)
        assert max((other[name] - g).abs().max() for name, g in expected.items()) > 1e-2 * largest

@pytest.mark.parametrize("kind", KINDS)
def test_backbone_keeps_no_graph_of_the_support_at_first_order(runs, kind):
    """The numbers do not show it: at first order a graph would cost memory and time, and change nothing."""
    _, calls = witnessed(runs[0], kind)
    assert {call[:2] for call in calls} == {(KINDS[kind].get("second_order", False), True)}
    assert len(calls) == LAST * {"four episodes, one by one": 4, "four episodes, in halves": 2}.get(kind, 1)

def test_episodes_in_parts_are_episodes_at_once(runs):
    whole, parts = (runs[0] / name for name in ("four episodes", "four episodes, one by one"))
    for a, b in zip(*(without_times(log_of(folder, "meta")) for folder in (whole, parts)), strict=True):
        for name in a.keys() - {"kind"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
    whole, parts = (moments(checkpoint(folder, LAST)) for folder in (whole, parts))
    for name, m in whole.items():
        torch.testing.assert_close(m, parts[name], rtol=1e-3, atol=1e-4)

def test_each_objective_leaves_alone_what_it_does_not_use(runs):
    """Not even weight decay or momentum moves the unembedding in meta steps, or the head in the others."""
    saved, kinds = [checkpoint(runs[0] / "both", step) for step in range(1, 13)], set()
    steps = log_of(runs[0] / "both", "lm", "meta")[1:]
    for before, after, line in zip(saved[:-1], saved[1:], steps, strict=True):
        kinds.add(line["kind"])
        before, after = parameters(before), parameters(after)
        still = {name for name in before if torch.equal(before[name], after[name])}
        heads = {name for name in before if name.startswith("head.")}
        assert still == (heads if line["kind"] == "lm" else {"unembedding.weight"}), line
    assert kinds == {"lm", "meta"}
    vanilla = checkpoint(runs[0] / "still 0", 40)
    assert moments(vanilla).keys() == vanilla.model.keys()

# ----------------------------------------------------------------------------------------------------
# What is drawn

def test_share_of_meta_steps(runs):
    counts = [len(log_of(runs[0] / f"still {ratio}", "meta")) for ratio in (0, 0.3, 1)]
    assert counts[0] == 0 and 4 <= counts[1] <= 20 and counts[2] == 40  # 12 are expected, give or take 2.9

def test_every_run_of_a_seed_sees_the_same_text_at_the_same_step(runs):
    vanilla, mixed = ({line["step"]: line["lm_loss"] for line in log_of(runs[0] / f"still {ratio}", "lm")}
                      for ratio in (0, 0.3))
    assert mixed == pytest.approx({step: vanilla[step] for step in mixed}, rel=1e-6)
    assert len(vanilla) == 40 and np.median(np.diff(sorted(vanilla.values()))) > 1e-4  # batches differ
    mixed, always = (drawn(runs[0], f"still {ratio}")[0] for ratio in (0.3, 1))
    same_draws(mixed, {index: always[index] for index in mixed})
    assert {(line["step"], 0) for line in log_of(runs[0] / "still 0.3", "meta")} <= mixed.keys()

def test_heldout_words_are_never_trained_on(runs, data_dir):
    token_bytes, words = load_corpus(data_dir / "docstrings").token_bytes, {}
    training, evaluations = drawn(runs[0], "still 1")[0], drawn(runs[0], "still 0")[1]
    uses = {"training": training.values()}
    uses |= {use: [e for _, heldout, _, _, e in evaluations if heldout == use] for use in (False, True)}
    for use, episodes in uses.items():
        ids = {i for episode in episodes for i in episode["words"]}
        words[use] = {token_bytes[i].decode().strip().casefold() for i in ids}
        assert len(words[use]) > 10
    heldout = {word for word in set().union(*words.values()) if zlib.crc32(word.encode()) % 10 == 0}
    assert words[True] <= heldout and not heldout & (words["training"] | words[False])

def test_training_and_evaluations_read_their_own_split(runs, data_dir):
    train, val = (zlib.crc32((data_dir / f"docstrings/{name}.bin").read_bytes()) for name in ("train", "val"))
    seen = {(isinstance(index, tuple), crc) for index, _, _, crc, _ in witnessed(runs[0], "both")[0]}
    assert seen == {(True, train), (False, val)}

def test_pools_are_refreshed(runs, data_dir):
    """Every two steps behind the witness; of the seed, the stream POOL and the number of the refresh."""
    corpus, (calls, _) = load_corpus(data_dir / "docstrings"), witnessed(runs[0], "small pools")
    crc = {index[0]: crc for index, _, _, crc, _ in calls if isinstance(index, tuple)}
    pools = [pool(corpus.train, POOL["pool_tokens"], (0, 3), number, eot=corpus.eot) for number in range(3)]
    assert crc == {step: zlib.crc32(pools[step // 2]) for step in range(1, 6)}

def test_both_objectives_resume_bit_equal(runs):
    folders = [runs[0] / name for name in ("both", "both again")]
    straight, again = (without_times(log_of(folder, "lm", "meta")) for folder in folders)
    assert straight == again and {line["kind"] for line in straight[7:]} == {"lm", "meta"}
    straight, again = (checkpoint(folder, 12) for folder in folders)
    straight, again = (parameters(saved) | saved.optimizer for saved in (straight, again))
    assert all(torch.equal(p, again[name]) for name, p in straight.items())

def test_shuffled_labels(runs):
    """Support labels are permuted within the episode, query labels are not: then support teaches nothing."""
    episodes, orders, accuracy = drawn(runs[0], "shuffled")[0], set(), {}
    same_draws(episodes, drawn(runs[0], "not shuffled")[0])
    for name in ("shuffled", "not shuffled"):
        for step, (_, _, support, query) in enumerate(witnessed(runs[0], name)[1], 1):
            labels = episodes[step, 0]["support_labels"].tolist()
            assert query[0] == episodes[step, 0]["query_labels"].tolist() and sorted(support[0]) == labels
            assert (support[0] == labels) == (name == "not shuffled")
            orders.add(tuple(support[0]))
        accuracy[name] = np.mean([line["query_acc"] for line in log_of(runs[0] / name, "meta")])
    assert len(orders) == 1 + LONG["max_steps"]
    assert abs(accuracy["shuffled"] - 1 / 8) < 0.04 and accuracy["not shuffled"] > 1 / 8 + 0.06  # +- 0.013

def test_multi_task(runs):
    """inner_steps=0: an output for each id of the vocabulary, of which training moves those of its words."""
    here, name = runs[0], "multi-task, long"
    head = checkpoint(here / name, LONG["max_steps"]).head
    assert {key: tuple(p.shape) for key, p in head.items()} == {"0.weight": (V, D), "0.bias": (V,)}
    words = {i for episode in drawn(here, name)[0].values() for i in episode["words"].tolist()}
    assert set(head["0.weight"].any(1).nonzero().flatten().tolist()) == words
    lines, last = log_of(here / name, "meta"), log_of(here / name, "eval")[-1]
    assert all(line["query_acc"] == line["query_acc_before"] for line in lines)
    assert np.mean([line["query_acc"] for line in lines[20:]]) > 1 / 8 + 0.04
    assert last["heldout_query_acc_before"] == 1 / 8  # evaluations adapt all the same
    assert last["heldout_query_acc"] > 1 / 8 + 2 * last["heldout_query_acc_se"]

# ----------------------------------------------------------------------------------------------------
# Evaluations

@pytest.mark.parametrize("name, step, n", [
    ("both", 0, 8), ("both", 6, 8), ("both", 12, 64), ("multi-task, long", 20, 8)])
def test_evaluation_is_that_of_a_fresh_head_adapted_by_hand(runs, name, step, n):
    """On 8 episodes of either kind, at the end 64: last layer zero, 10 steps where training has none."""
    here, evaluations = runs[0], log_of(runs[0] / name, "eval")
    n_way, lr, steps = (8, 10, 10) if "long" in name else (N, INNER_LR, INNER_STEPS)
    saved = checkpoint(here / name, step or 1)
    if step == 0:
        torch.manual_seed(BOTH["seed"])
        saved.model = Llama(ModelConfig(D, 1, 2, 1, FF, V, T)).state_dict()
    last = len(saved.head) // 2 - 1
    saved.head[f"{last}.weight"] = torch.zeros(n_way, saved.head[f"{last}.weight"].shape[1])
    saved.head[f"{last}.bias"] = torch.zeros(n_way)
    line = next(line for line in evaluations if line["step"] == step)
    # After two calls that ask whether there are any, and earlier evaluations.
    first = 2 + 2 * 8 * len([line for line in evaluations if line["step"] < step])
    calls = drawn(here, name)[1][first : first + 2 * n]
    wanted = [(number, heldout) for heldout in (False, True) for number in range(n)]
    assert [(index, heldout) for index, heldout, _, _, _ in calls] == wanted
    for key, half in (("val_query_acc", calls[:n]), ("heldout_query_acc", calls[n:])):
        _, numbers = by_hand(saved, [episode for *_, episode in half], lr, steps)
        answer = 1 / (n * len(half[0][-1]["query_labels"]))  # of one that turns on a rounding error
        assert line[f"{key}_before"] == pytest.approx(1 / n_way, abs=1e-6)
        assert numbers["query_acc_before"].mean() == pytest.approx(1 / n_way)
        assert line[key] == pytest.approx(numbers["query_acc"].mean(), abs=1.1 * answer)
        right, of_word = numbers["query_acc"].ravel(), {}  # answers to one word go right or wrong together
        words = [word for *_, episode in half for word in episode["words"][episode["query_labels"]]]
        for word, residual in zip(words, right - right.mean(), strict=True):
            of_word[word] = of_word.get(word, 0) + residual
        variance = sum(x * x for x in of_word.values()) / len(right) ** 2 * len(of_word) / (len(of_word) - 1)
        assert line[f"{key}_se"] == pytest.approx(variance**0.5, abs=2 * answer)

def test_evaluations_are_the_same_for_every_run(runs):
    """Of another seed, meta_ratio, length and head."""
    ours, theirs = (drawn(runs[0], name)[1][-128:] for name in ("both", "still 0"))
    for a, b in zip(ours, theirs, strict=True):
        same_draws({0: a[-1]}, {0: b[-1]})

# ----------------------------------------------------------------------------------------------------
# What is written down

BUDGETS = {"lm_tokens", "episode_tokens", "support_tokens", "query_tokens", "flops", "seconds"}

def test_lines_have_all_fields_and_never_mix_the_losses(runs):
    accuracies = {f"{split}_query_acc{end}" for split in ("val", "heldout") for end in ("", "_before", "_se")}
    meta = """meta_loss support_loss_before query_loss_before support_acc query_acc query_acc_before chance
        majority_acc far_share lr grad_norm tokens_per_second""".split()
    spectra = {"per/weights/down", "per/weights/ov", "per/activations/0", "entropy/0"}
    fields = {"lm": {"lm_loss", "lr", "grad_norm", "tokens_per_second"}, "meta": {*meta},
              "eval": {"val_loss", "val_bits_per_byte", *accuracies, *spectra}}
    for name in ("both", "still 0", "multi-task, long"):
        for line in log_of(runs[0] / name):
            assert line.keys() == {"step", "kind"} | BUDGETS | fields[line["kind"]]
            assert all(math.isfinite(number) for key, number in line.items() if key != "kind")

def test_runs_end_well(runs):
    done = runs[1]
    assert {(done[name].returncode, done[name].stderr) for name in done.keys() - MISTAKES.keys()} == {(0, "")}

def cost(kind, episodes_per_step=1, second_order=False, inner_steps=INNER_STEPS, head_layers=1, head_hidden=0,
         k_shot=K, **_):
    """Tokens and FLOPs of a step: 2 a weight and token forward, 4 more backward; also for attention."""
    projections = D * D + 2 * D * (D // 2) + D * D  # queries, keys and values of one head for two, output
    weights = projections + 3 * D * FF + 3 * D  # and the SwiGLU, and three norms
    forward = {n: 2 * weights + 2 * 2 * D * (n + 1) / 2 for n in (T, L)}  # over half of the row on average
    if kind == "lm":
        return {"lm_tokens": B * T, "flops": B * T * 3 * (forward[T] + 2 * V * D)}
    support, query = episodes_per_step * N * k_shot, episodes_per_step * N * Q  # windows
    widths = [D, *[head_hidden] * (head_layers - 1), N]
    head = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))
    flops = L * support * forward[L] * (3 if second_order else 1) + L * query * forward[L] * 3
    return {"episode_tokens": L * (support + query), "support_tokens": L * support,
            "query_tokens": L * query, "flops": flops + 6 * head * (support * inner_steps + query)}

@pytest.mark.parametrize("name", [*KINDS, "both", "still 0", "still 0.3"])
def test_tokens_and_flops(runs, name):
    total = dict.fromkeys(BUDGETS - {"seconds"}, 0)
    for line in log_of(runs[0] / name, "lm", "meta"):
        for key, amount in cost(line["kind"], **(KINDS | {"both": BOTH}).get(name, {})).items():
            total[key] += amount
        assert {key: line[key] for key in total} == pytest.approx(total, rel=1e-9), line

def test_curves(runs):
    """Language-model loss above, query accuracy below, if there are episodes in the evaluations."""
    log, settings = log_of(runs[0] / "both"), json.loads((runs[0] / "both/config.json").read_text())
    plain = [{key: x for key, x in line.items() if "heldout" not in key} for line in log]
    for lines, labels in ((log, ["LM", "query"]), (plain, ["LM"])):
        assert [ax.get_ylabel().split()[0] for ax in curves(lines, settings, "").axes] == labels

def test_mistakes_are_one_line(runs):
    for name, (_, says) in MISTAKES.items():
        one_line(runs[1][name], says)
        assert not (runs[0] / name / "config.json").exists()
