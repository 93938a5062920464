"""train.py with both objectives: the meta step against an unrolled loop of plain autograd, evaluations, accounts, controls, mistakes.

The commands run one after the other in one process, behind a witness that writes down every episode drawn. Checkpoints show the rest: AdamW's first
moment becomes 0.9 m + 0.1 g, so that two checkpoints in a row tell the gradient g of the step between them, parameter by parameter.
"""
import json
import math
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, run_many

from model import Llama, ModelConfig
from runs import load_corpus

WITNESS = f"""
import runpy, sys, zlib
import torch
import maml, smlmt
path, evaluates, sys.argv = sys.argv[1], sys.argv[2] == "True", [{str(ROOT / "train.py")!r}, *sys.argv[3:]]
episode, episode_loss, drawn, adapted = smlmt.Sampler.episode, maml.episode_loss, [], []

def seen_episode(self, index, heldout=False):
    if heldout and not evaluates:  # most runs can do without
        raise ValueError("not wanted here")
    drawn.append((index, heldout, len(self.tokens), zlib.crc32(self.tokens), vars(episode(self, index, heldout))))
    return smlmt.Episode(**drawn[-1][-1])

def seen_loss(head, support, support_labels, query, query_labels, **settings):
    if torch.is_grad_enabled():  # not in evaluations
        adapted.append((support.requires_grad, query.requires_grad, support_labels.tolist(), query_labels.tolist()))
    return episode_loss(head, support, support_labels, query, query_labels, **settings)

smlmt.Sampler.episode, maml.episode_loss = seen_episode, seen_loss
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    smlmt.Sampler.episode, maml.episode_loss = episode, episode_loss
    torch.save((drawn, adapted), path)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")  # it complains of more than 20 figures in one process
"""

D, FF, V, B, T = 16, 24, 1024, 4, 16  # one layer of two heads and one key/value head, on rows of 16 tokens
N, K, Q, L, INNER_LR, INNER_STEPS, LAST = 4, 2, 3, 20, 5.0, 3, 3
BASE = dict(
    d_model=D, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=FF, block_size=T, batch_size=B, compile=False, dtype="float32", device="cpu",
    n_way=N, k_shot=K, q_query=Q, episode_len=L, inner_lr=INNER_LR, inner_steps=INNER_STEPS, meta_ratio=1, max_steps=LAST, lr=0.01, warmup_steps=1,
    grad_clip=1e9, eval_steps=2, eval_interval=1000, ckpt_interval=1, log_interval=1000,
)  # fmt: skip
KINDS = {  # of meta steps, and what is set for each
    "first order": {},
    "second order": {"second_order": True},
    "deep head": {"head_layers": 4, "head_hidden": 8},
    "deep head, second order": {"head_layers": 2, "head_hidden": 8, "second_order": True},
    "at the blank": {"readout": "mask"},
    "at the end": {"readout": "last"},
    "four episodes": {"episodes_per_step": 4},
    "four episodes, one by one": {"episodes_per_step": 4, "micro_episodes": 1},
    "four episodes, two by two, second order": {"episodes_per_step": 4, "micro_episodes": 2, "second_order": True},
    "fixed outputs": {"inner_steps": 0},
    "fixed outputs, deep head": {"inner_steps": 0, "head_layers": 2, "head_hidden": 8, "episodes_per_step": 2},
}
STILL = {"lr": 1e-12, "max_steps": 40, "ckpt_interval": 40}  # weights that do not move: what is logged tells what was drawn
LONG = {"max_steps": 60, "ckpt_interval": 60, "n_way": 8, "k_shot": 4, "q_query": 2, "inner_lr": 10, "inner_steps": 10, "grad_clip": 1}
POOL = {"pool_tokens": 40_000, "meta_ratio": 0.6, "max_steps": 1, "lr": 1e-12, "schedule": "constant"}
BUDGETS = {"lm_tokens", "episode_tokens", "support_tokens", "query_tokens", "flops", "seconds"}
MISTAKES = {  # what is set, and what the one line says
    "many ways": ({"n_way": 1000}, ["n_way=1000", "training words", "lower n_way"]),
    "long windows": ({"episode_len": 10**6}, ["episode_len=1000000", "longest document", "lower episode_len"]),
    "empty band": ({"word_min_count": 5001}, ["n_way=4", "word_min_count", "word_max_count"]),
    "short windows": ({"episode_len": 15}, ["episode_len = 15", "at least 16"]),
    "one way": ({"n_way": 1}, ["n_way = 1", "at least 2"]),
    "no support": ({"k_shot": 0}, ["k_shot = 0"]),
    "no query": ({"q_query": 0}, ["q_query = 0"]),
    "a blank never seen": ({"readout": "mask", "meta_ratio": 0}, ["readout = mask", "meta_ratio"]),
    "unknown read-out": ({"readout": "first"}, ["readout = 'first'", "before, mask, last"]),
    "share above one": ({"meta_ratio": 1.5}, ["meta_ratio = 1.5"]),
    "share below zero": ({"meta_ratio": -0.1}, ["meta_ratio = -0.1"]),
    "share not a number": ({"meta_ratio": "nan"}, ["meta_ratio = nan"]),
    "inner_lr zero": ({"inner_lr": 0}, ["inner_lr = 0.0"]),
    "inner_steps below zero": ({"inner_steps": -1}, ["inner_steps = -1"]),
    "no layers": ({"head_layers": 0}, ["head_layers = 0"]),
    "tiny pool": ({"pool_tokens": 10}, ["pool_tokens=10"]),
    "no blank": ({}, ["<|mask|>", "data/prepare.py"]),
}


def run_witnessed(here, data_dir, cases):
    """Run train.py for each of the cases, name -> changes to BASE, into here/name, with the witness's account in here/name.pt."""
    (here / "witness.py").write_text(WITNESS)
    words = []
    for name, changes in cases.items():
        changes = BASE | {"data_dir": data_dir, "out_dir": here / name, "evaluates": False} | changes
        words.append([here / f"{name}.pt", changes.pop("evaluates"), *(f"--{key}={value}" for key, value in changes.items())])
    return dict(zip(cases, run_many(here / "witness.py", words), strict=True))


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """The folder of all runs, and what became of the commands by name."""
    here, cases = tmp_path_factory.mktemp("meta"), {}
    shutil.copytree(data_dir, here / "data")
    meta = json.loads((here / "data/docstrings/meta.json").read_text())
    del meta["special_tokens"]["<|mask|>"]
    (here / "data/docstrings/meta.json").write_text(json.dumps(meta))
    cases |= {name: changes | {"evaluates": name == "deep head"} for name, changes in KINDS.items()}
    cases["both"] = {"meta_ratio": 0.5, "max_steps": 12, "eval_interval": 6, "schedule": "constant", "evaluates": True}
    cases["both again"] = cases["both"] | {"max_steps": 7, "evaluates": False}
    cases["both, gone on"] = cases["both"] | {"resume": True, "out_dir": here / "both again"}
    cases["LM step"] = {"meta_ratio": 0, "max_steps": 1, "seed": 1, "evaluates": True}
    cases |= {f"still {ratio}": STILL | {"meta_ratio": ratio, "evaluates": ratio != 0.3} for ratio in (0, 0.3, 1)}
    cases["small pools"] = POOL
    cases["shuffled"] = LONG | {"shuffle_labels": True}
    cases["not shuffled"] = LONG
    cases["fixed outputs, long"] = LONG | {"inner_steps": 0, "evaluates": True}
    cases |= {name: changes for name, (changes, _) in MISTAKES.items()}
    cases["no blank"] = {"data_dir": here / "data"}
    return here, run_witnessed(here, data_dir, cases)


@pytest.fixture(scope="module")
def pools(runs, data_dir):
    """Two runs with small pools, gone on from a checkpoint whose step was rewritten, from 1 to 997 and to 1001."""
    here, _ = runs
    for name, step in {"from 997": 997, "from 1001": 1001}.items():
        shutil.copytree(here / "small pools", here / name)
        state = checkpoint(here / name, 1)
        (here / name / "ckpt_000001.pt").unlink()
        (here / name / "log.jsonl").unlink()  # it does not know of the steps in between
        torch.save(state | {"step": step}, here / name / f"ckpt_{step:06d}.pt")
    cases = {name: POOL | {"resume": True, "max_steps": 1006} for name in ("from 997", "from 1001")}
    assert [done.stderr for done in run_witnessed(here, data_dir, cases).values()] == ["", ""]
    return here


def log_of(folder, *kinds):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if not kinds or line["kind"] in kinds]


def checkpoint(folder, step):
    return torch.load(folder / f"ckpt_{step:06d}.pt", weights_only=True)


def drawn(here, name):
    """The episodes of a run's meta steps, (step, e) -> dict, and those of its evaluations, in the order they came."""
    calls = torch.load(here / f"{name}.pt", weights_only=False)[0]
    return {index: episode for index, _, _, _, episode in calls if isinstance(index, tuple)}, [call for call in calls if isinstance(call[0], int)]


def step_episodes(here, name, step):
    return [episode for (i, _), episode in sorted(drawn(here, name)[0].items()) if i == step]


def same_draws(ours, theirs):
    assert ours.keys() == theirs.keys()
    for index, episode in ours.items():
        assert all(np.array_equal(value, theirs[index][name]) for name, value in episode.items()), index


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# The meta step


def by_hand(state, episodes, lr, steps, second_order=False, fixed_outputs=False):
    """Gradients by parameter name and the numbers to log, by an unrolled loop of plain autograd over episodes one at a time.

    Nothing here is shared with maml.py: features divided by sqrt(d), rectified layers, cross-entropy, and gradient descent on the head alone. At
    first order support features and inner gradients are constants; at second order nothing is.
    """
    model = Llama(ModelConfig(D, 1, 2, 1, FF, V, T))
    model.load_state_dict(state["model"])
    head = {name: p.clone().requires_grad_() for name, p in state["head"].items()}

    def answer(weights, x, labels):  # mean surprise and accuracy
        for W, b in zip(weights[:-2:2], weights[1:-2:2], strict=True):
            x = torch.relu(x @ W.T + b)
        logits = x @ weights[-2].T + weights[-1]
        right = logits[torch.arange(len(labels)), labels]
        return (logits.exp().sum(1).log() - right).mean(), (logits.argmax(1) == labels).float().mean().item()

    losses, numbers = [], []
    for episode in episodes:
        labels, asked = (torch.from_numpy(episode[name]) for name in ("support_labels", "query_labels"))
        support, query = (model.features(torch.from_numpy(episode[name]))[range(len(episode[name])), episode[f"{name}_pos"]] / D**0.5
                          for name in ("support", "query"))  # fmt: skip
        support = support if second_order else support.detach()
        weights = [p[episode["words"]] if fixed_outputs and name[0] == str(len(head) // 2 - 1) else p for name, p in head.items()]
        line = {"chance": 1 / N, "majority_acc": 1 / N, "far_share": episode["far_share"]}
        line["support_loss_before"] = answer(weights, support, labels)[0].item()
        line["query_loss_before"], line["query_acc_before"] = answer(weights, query, asked)[0].item(), answer(weights, query, asked)[1]
        for _ in range(steps):
            slope = torch.autograd.grad(answer(weights, support, labels)[0], weights, create_graph=second_order)
            weights = [w - lr * g for w, g in zip(weights, slope, strict=True)]
        loss, line["query_acc"] = answer(weights, query, asked)
        losses.append(loss)
        numbers.append(line | {"meta_loss": loss.item(), "support_acc": answer(weights, support, labels)[1]})
    parameters = dict(model.named_parameters()) | head
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(parameters.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return gradients, {name: np.array([line[name] for line in numbers]) for name in numbers[0]}


def moments(state):
    """Name -> AdamW's first moment; parameters that never had a gradient are missing. Matrices come first there: only they decay."""
    parameters = state["model"] | (state["head"] if state["config"]["meta_ratio"] else {})
    order = [name for name, p in parameters.items() if p.dim() == 2] + [name for name, p in parameters.items() if p.dim() == 1]
    return {order[i]: moment["exp_avg"] for i, moment in state["optimizer"]["state"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_meta_step_is_that_of_an_unrolled_loop(runs, kind):
    here, changes = runs[0], KINDS[kind]
    before, after = checkpoint(here / kind, LAST - 1), checkpoint(here / kind, LAST)
    gradient = {name: (moment - 0.9 * moments(before)[name]) / 0.1 for name, moment in moments(after).items()}
    episodes, steps = step_episodes(here, kind, LAST), changes.get("inner_steps", INNER_STEPS)
    expected, numbers = by_hand(before, episodes, INNER_LR, steps, changes.get("second_order", False), steps == 0)
    assert len(episodes) == changes.get("episodes_per_step", 1)
    assert gradient.keys() == expected.keys() == (before["model"] | before["head"]).keys() - {"unembedding.weight"}
    largest = max(g.abs().max() for g in expected.values())
    for name, g in gradient.items():
        assert (g - expected[name]).abs().max() < 1e-4 * largest, name
    line = log_of(here / kind, "meta")[-1]
    assert {name: line[name] for name in numbers} == pytest.approx({name: value.mean() for name, value in numbers.items()}, rel=1e-4, abs=1e-6)
    assert line["grad_norm"] == pytest.approx(sum(g.square().sum().item() for g in expected.values()) ** 0.5, rel=1e-4)
    if steps:  # the comparison tells the two orders apart
        other, _ = by_hand(before, episodes, INNER_LR, steps, not changes.get("second_order", False))
        assert max((other[name] - g).abs().max() for name, g in expected.items()) > 1e-2 * largest


@pytest.mark.parametrize("kind", KINDS)
def test_first_step_knows_nothing(runs, kind):
    first = log_of(runs[0] / kind, "meta")[0]
    assert first["step"] == 1 and first["chance"] == first["majority_acc"] == first["query_acc_before"] == 1 / N
    assert first["query_loss_before"] == pytest.approx(math.log(N), rel=1e-6) and first["support_loss_before"] == pytest.approx(math.log(N), rel=1e-6)
    if "fixed outputs" not in kind:  # there the words of later steps have outputs of their own, which may be untouched
        assert abs(log_of(runs[0] / kind, "meta")[-1]["query_loss_before"] - math.log(N)) > 1e-5  # the head's initial weights are learnt


@pytest.mark.parametrize("kind", KINDS)
def test_backbone_keeps_no_graph_of_the_support_at_first_order(runs, kind):
    """The one thing that the numbers do not show: at first order it would cost memory and time, and come to the same."""
    calls = torch.load(runs[0] / f"{kind}.pt", weights_only=False)[1]
    assert {(support, query) for support, query, _, _ in calls} == {(KINDS[kind].get("second_order", False), True)}
    assert len(calls) == LAST * {"four episodes, one by one": 4, "four episodes, two by two, second order": 2}.get(kind, 1)


def test_episodes_in_parts_are_episodes_at_once(runs):
    whole, parts = (log_of(runs[0] / name, "meta") for name in ("four episodes", "four episodes, one by one"))
    for a, b in zip(whole, parts, strict=True):
        for name in a.keys() - {"kind", "seconds", "tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
    last = [checkpoint(runs[0] / name, LAST) for name in ("four episodes", "four episodes, one by one")]
    for name, p in moments(last[0]).items():
        torch.testing.assert_close(p, moments(last[1])[name], rtol=1e-3, atol=1e-4)


def test_each_objective_leaves_alone_what_it_does_not_use(runs):
    """Not even weight decay or the momentum of other steps moves the unembedding in a meta step, or the head in a language-model step."""
    here, seen = runs[0], set()
    states = [checkpoint(here / "both", step) for step in range(1, 13)]
    for before, after, line in zip(states[:-1], states[1:], log_of(here / "both", "lm", "meta")[1:], strict=True):
        seen.add(line["kind"])
        moved = {name for part in ("model", "head") for name in before[part] if not torch.equal(before[part][name], after[part][name])}
        still = set(before["head"]) if line["kind"] == "lm" else {"unembedding.weight"}
        assert moved == (before["model"] | before["head"]).keys() - still, line
    assert seen == {"lm", "meta"}
    vanilla = checkpoint(here / "LM step", 1)
    assert moments(vanilla).keys() == vanilla["model"].keys() and not any(p.any() for p in vanilla["head"].values())


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_share_of_meta_steps(runs):
    counts = {ratio: len(log_of(runs[0] / f"still {ratio}", "meta")) for ratio in (0, 0.3, 1)}
    assert counts[0] == 0 and counts[1] == 40 and 4 <= counts[0.3] <= 20  # 12 expected, with a standard deviation of 2.9
    for ratio in counts:
        assert [line["step"] for line in log_of(runs[0] / f"still {ratio}", "lm", "meta")] == list(range(1, 41))


def test_every_run_of_a_seed_sees_the_same_text_at_the_same_step(runs):
    here = runs[0]
    vanilla, mixed = ({line["step"]: line["lm_loss"] for line in log_of(here / f"still {ratio}", "lm")} for ratio in (0, 0.3))
    assert mixed == pytest.approx({step: vanilla[step] for step in mixed}, rel=1e-6)  # no two batches have losses so alike:
    losses = np.sort(list(vanilla.values()))
    assert len(vanilla) == 40 and np.median(np.diff(losses)) > 1e-4
    mixed, always = (drawn(here, f"still {ratio}")[0] for ratio in (0.3, 1))
    same_draws(mixed, {index: always[index] for index in mixed})
    assert {(line["step"], 0) for line in log_of(here / "still 0.3", "meta")} <= mixed.keys()


def test_heldout_words_are_never_trained_on(runs, data_dir):
    token_bytes, words = load_corpus(str(data_dir / "docstrings")).token_bytes, {}
    training, looks = drawn(runs[0], "still 1")
    for use, episodes in {
        "training": training.values(), "seen": [e for _, held, _, _, e in looks if not held], "held out": [e for _, held, _, _, e in looks if held]
    }.items():  # fmt: skip
        words[use] = {token_bytes[i].decode().strip().casefold() for episode in episodes for i in episode["words"]}
        assert len(words[use]) > 10
    heldout = {word for word in set().union(*words.values()) if zlib.crc32(word.encode("utf-8")) % 10 == 0}
    assert words["held out"] <= heldout and not heldout & (words["training"] | words["seen"])


def test_training_and_evaluations_read_their_own_split(runs, data_dir):
    crc = {name: zlib.crc32((data_dir / "docstrings" / f"{name}.bin").read_bytes()) for name in ("train", "val")}
    calls = torch.load(runs[0] / "still 1.pt", weights_only=False)[0]
    assert {(isinstance(index, tuple), crc) for index, _, _, crc, _ in calls} == {(True, crc["train"]), (False, crc["val"])}


def test_pool_is_refreshed_and_resumed(pools):
    """An uninterrupted run and one resumed after the refresh at step 1000 draw the same objectives and episodes."""
    whole, again = ({line["step"]: line for line in log_of(pools / name, "lm", "meta")} for name in ("from 997", "from 1001"))
    assert set(range(998, 1007)) <= whole.keys() and set(range(1002, 1007)) <= again.keys()
    assert {whole[step]["kind"] for step in again if step > 1} == {"lm", "meta"}
    for step in range(1002, 1007):
        assert whole[step]["kind"] == again[step]["kind"]
        for name in whole[step].keys() & {"lm_loss", "meta_loss", "support_loss_before", "far_share", "lr"}:
            assert whole[step][name] == pytest.approx(again[step][name], rel=1e-5), (step, name)
    whole, again = (torch.load(pools / f"{name}.pt", weights_only=False)[0] for name in ("from 997", "from 1001"))
    crc = {index[0]: crc for index, _, _, crc, _ in whole if isinstance(index, tuple)}
    pool = {step >= 1000: {crc[i] for i in crc if (i >= 1000) == (step >= 1000)} for step in crc}
    assert len(pool[False]) == len(pool[True]) == 1 and pool[False] != pool[True]  # one pool up to step 999, another from there
    assert all(crc[index[0]] == c for index, _, _, c, _ in again if isinstance(index, tuple))
    assert all(POOL["pool_tokens"] / 2 < tokens < 2 * POOL["pool_tokens"] for index, _, tokens, _, _ in whole if isinstance(index, tuple))
    whole, again = (drawn(pools, name)[0] for name in ("from 997", "from 1001"))
    assert {step for step, _ in again if step > 1001}
    same_draws(again, {index: whole[index] for index in again})


def test_both_objectives_resume_bit_equal(runs):
    here = runs[0]
    both, again = (
        [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")} for line in log_of(here / name)
         if line["kind"] != "eval" or line["step"] == 12] for name in ("both", "both again")
    )  # fmt: skip
    assert both == again and {line["kind"] for line in both if line["step"] > 7} == {"lm", "meta", "eval"}
    straight, again = (checkpoint(here / name, 12) for name in ("both", "both again"))
    for part in ("model", "head"):
        assert all(torch.equal(p, again[part][name]) for name, p in straight[part].items())
    assert all(torch.equal(m, moments(again)[name]) for name, m in moments(straight).items())


def test_shuffled_labels(runs):
    """Support labels are permuted within the episode, query labels and evaluations are not: then support teaches nothing."""
    here = runs[0]
    episodes = drawn(here, "shuffled")[0]
    same_draws(episodes, drawn(here, "not shuffled")[0])
    orders = set()
    for name in ("shuffled", "not shuffled"):
        for step, (_, _, support, query) in enumerate(torch.load(here / f"{name}.pt", weights_only=False)[1], 1):
            episode = episodes[step, 0]
            assert query[0] == episode["query_labels"].tolist() and sorted(support[0]) == episode["support_labels"].tolist()
            assert (support[0] == episode["support_labels"].tolist()) == (name == "not shuffled")
            orders.add(tuple(support[0]))
    assert len(orders) == 1 + LONG["max_steps"]
    accuracy = {name: np.mean([line["query_acc"] for line in log_of(here / name, "meta")]) for name in ("shuffled", "not shuffled")}
    assert abs(accuracy["shuffled"] - 1 / 8) < 0.04 and accuracy["not shuffled"] > 1 / 8 + 0.06  # with standard errors of 0.01


def test_fixed_outputs(runs):
    """inner_steps=0: an output for each id of the vocabulary, of which training moves those of its words; evaluations adapt all the same."""
    here, name = runs[0], "fixed outputs, long"
    head = checkpoint(here / name, LONG["max_steps"])["head"]
    assert {key: tuple(p.shape) for key, p in head.items()} == {"0.weight": (V, D), "0.bias": (V,)}
    words = {i for episode in drawn(here, name)[0].values() for i in episode["words"].tolist()}
    assert set(head["0.weight"].any(1).nonzero().flatten().tolist()) == words
    lines = log_of(here / name, "meta")
    assert all(line["query_acc"] == line["query_acc_before"] and line["meta_loss"] == line["query_loss_before"] for line in lines)
    assert np.mean([line["query_acc"] for line in lines[20:]]) > 1 / 8 + 0.04
    last = log_of(here / name, "eval")[-1]
    assert last["heldout_query_acc_before"] == 1 / 8 and last["heldout_query_acc"] > 1 / 8 + 3 * last["heldout_query_acc_se"]


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# Evaluations


@pytest.mark.parametrize("name, step, n, inner", [
    ("both", 0, 8, {}), ("both", 6, 8, {}), ("both", 12, 64, {}), ("deep head", LAST, 64, {}), ("LM step", 1, 64, {}),
    ("fixed outputs, long", 60, 64, {"lr": 10, "steps": 10}),
])  # fmt: skip
def test_evaluation_is_that_of_a_fresh_head_adapted_by_hand(runs, name, step, n, inner):
    """On 8 episodes of either kind, at the end 64: last layer zero, hidden layers as learnt, and 10 steps where training has none."""
    here, looks = runs[0], log_of(runs[0] / name, "eval")
    state = checkpoint(here / name, step or 1)
    if step == 0:
        torch.manual_seed(0)
        state["model"] = Llama(ModelConfig(D, 1, 2, 1, FF, V, T)).state_dict()
    last, n_way = len(state["head"]) // 2 - 1, LONG["n_way"] if inner else N
    widths = {"weight": (n_way, state["head"][f"{last}.weight"].shape[1]), "bias": (n_way,)}
    state["head"] |= {f"{last}.{key}": torch.zeros(shape) for key, shape in widths.items()}
    line = next(line for line in looks if line["step"] == step)
    first = 1 + 2 * 8 * len([look for look in looks if look["step"] < step])  # after a call that asks whether there are any, and earlier evaluations
    calls = drawn(here, name)[1][first : first + 2 * n]
    assert [(index, held) for index, held, _, _, _ in calls] == [(e, held) for held in (False, True) for e in range(n)]
    for held, key in ((False, "val_query_acc"), (True, "heldout_query_acc")):
        episodes = [episode for _, kind, _, _, episode in calls if kind == held]
        _, numbers = by_hand(state, episodes, **({"lr": INNER_LR, "steps": INNER_STEPS} | inner))
        answer = 1 / (n * len(episodes[0]["query_labels"]))  # what one answer weighs; one may turn on a rounding error
        assert line[f"{key}_before"] == pytest.approx(1 / n_way, abs=1e-6) == pytest.approx(numbers["query_acc_before"].mean())
        assert line[key] == pytest.approx(numbers["query_acc"].mean(), abs=1.1 * answer)
        assert line[f"{key}_se"] == pytest.approx(numbers["query_acc"].std(ddof=1) / n**0.5, abs=answer)


def test_evaluations_are_the_same_for_every_run(runs):
    here, expected = runs[0], drawn(runs[0], "still 0")[1]
    for name in ("still 1", "LM step", "both"):  # the second has another seed, the third other weights
        for ours, theirs in zip(drawn(here, name)[1][-128:], expected[-128:], strict=True):
            same_draws({0: ours[-1]}, {0: theirs[-1]})
    vanilla, meta = (log_of(here / f"still {ratio}", "eval") for ratio in (0, 1))
    for ours, theirs in zip(vanilla, meta, strict=True):  # weights that have moved by 1e-10 may turn an answer or two
        numbers = ours.keys() - BUDGETS - {"kind"}
        assert {key: ours[key] for key in numbers} == pytest.approx({key: theirs[key] for key in numbers}, abs=0.01)


# ----------------------------------------------------------------------------------------------------------------------------------------------------
# What is written down


def test_lines_have_all_fields_and_never_mix_the_losses(runs):
    always = {"step", "kind"} | BUDGETS
    fields = {
        "lm": {"lm_loss"},
        "meta": set("meta_loss support_loss_before query_loss_before support_acc query_acc query_acc_before majority_acc chance far_share".split()),
        "eval": {"val_loss", "val_bits_per_byte", *(key + end for key in ("val_query_acc", "heldout_query_acc") for end in ("", "_before", "_se")),
                 "per/weights/down", "per/weights/ov", "per/activations/0", "entropy/0"},
    }  # fmt: skip
    for name in ("both", "still 0", "still 1", "LM step", "fixed outputs, long"):
        for line in log_of(runs[0] / name):
            own = fields[line["kind"]] | ({"lr", "grad_norm", "tokens_per_second"} if line["kind"] != "eval" else set())
            assert line.keys() == always | own, line
            assert all(math.isfinite(value) for key, value in line.items() if key != "kind")
            if line["kind"] == "meta":
                assert line["majority_acc"] == line["chance"] == 1 / (8 if "long" in name else N) and 0 <= line["far_share"] <= 1
    assert {line["kind"] for line in log_of(runs[0] / "both")} == fields.keys()


def test_runs_end_with_the_result_on_heldout_words(runs):
    here, done = runs
    for name in done.keys() - MISTAKES.keys():
        assert done[name].returncode == 0 and not done[name].stderr, (name, done[name].stderr)
        last = log_of(here / name.replace(", gone on", " again"), "eval")[-1]
        if "not wanted here" in done[name].stdout:
            assert "data    no episodes in evaluations" in done[name].stdout and "result  held-out" not in done[name].stdout
            assert "heldout_query_acc" not in last or name == "both again"
        else:
            after, error, before = (last[f"heldout_query_acc{end}"] for end in ("", "_se", "_before"))
            assert f"query accuracy {after:.3f} ± {error:.3f} after adaptation, {before:.3f} before, chance " in done[name].stdout


def cost(kind, episodes=1, second_order=False, steps=INNER_STEPS, layers=1, hidden=0):
    """Tokens and FLOPs of one step, counted anew. 2 a weight and token forward, 4 more backward; the same factors for attention's two products."""
    projections = D * D + 2 * D * (D // 2) + D * D  # queries, keys and values of one head for two, output
    weights = projections + 3 * D * FF + 3 * D  # and the SwiGLU, and three norms
    forward = {length: 2 * weights + 2 * 2 * D * (length + 1) / 2 for length in (T, L)}  # scores and mixing, over half of the row on average
    if kind == "lm":
        return {"lm_tokens": B * T, "flops": B * T * 3 * (forward[T] + 2 * V * D)}
    support, query = episodes * N * K, episodes * N * Q  # windows
    head = D * N + N if layers == 1 else (D + 1) * hidden + (layers - 2) * (hidden + 1) * hidden + (hidden + 1) * N
    flops = L * support * forward[L] * (3 if second_order else 1) + L * query * forward[L] * 3 + 6 * head * (support * steps + query)
    return {"episode_tokens": L * (support + query), "support_tokens": L * support, "query_tokens": L * query, "flops": flops}


@pytest.mark.parametrize("name", [*KINDS, "both", "LM step", "still 0.3"])
def test_tokens_and_flops(runs, name):
    changes, total = KINDS.get(name, {}), dict.fromkeys(BUDGETS - {"seconds"}, 0)
    options = {"episodes": changes.get("episodes_per_step", 1), "second_order": changes.get("second_order", False),
               "steps": changes.get("inner_steps", INNER_STEPS), "layers": changes.get("head_layers", 1), "hidden": changes.get("head_hidden", 0)}
    for line in log_of(runs[0] / name):
        for key, value in (cost(line["kind"], **options) if line["kind"] != "eval" else {}).items():
            total[key] += value
        assert {key: line[key] for key in total} == pytest.approx(total, rel=1e-9), line
    assert total["flops"] > 0


@pytest.mark.parametrize("name, height", [("both", 1020), ("still 0", 1020), ("first order", 570)])
def test_curves(runs, name, height):
    """Language-model loss above, query accuracy below; without episodes in the evaluations there is nothing below."""
    png = (runs[0] / name / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">II", png[16:24]) == (1350, height)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(runs, name):
    here, results = runs
    done = results[name]
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (done.returncode, done.stderr)
    assert all(part in done.stderr for part in MISTAKES[name][1]), done.stderr
    assert not (here / name / "config.json").exists() and "step " not in done.stdout
