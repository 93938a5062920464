"""train.py with a target: what adapts inside the backbone, against an unrolled loop that sets a module's weights one by one and calls it."""
import math
import re

import numpy as np
import pytest
import torch
from test_meta_training import BASE, D, FF, INNER_LR, INNER_STEPS, LAST, N, T, V, checkpoint, log_of, moments, run_witnessed, step_episodes

from model import Llama, ModelConfig

LR = 0.3  # of the target; large enough that forgetting to adapt anything shows
TWO = {"n_layers": 2, "target_lr": LR}
ALL_OF = {  # kind -> its settings, and which parameters of two blocks must adapt
    "attention": ({"target": "attention"}, r"blocks\.[01]\.attention\.[qkvo]_proj"),
    "mlp": ({"target": "mlp", "episodes_per_step": 2}, r"blocks\.[01]\.mlp\.(gate|up|down)"),
    "both, upper": ({"target": "attention+mlp", "target_layers": "1"}, r"blocks\.1\.(attention|mlp)\."),
    "norms": ({"target": "norms"}, r"(blocks\.[01]\..*_)?norm"),
    "norms, lower": ({"target": "norms", "target_layers": "0"}, r"blocks\.0\..*_norm"),
    "all": ({"target": "all", "head_layers": 2, "head_hidden": 8, "episodes_per_step": 3, "micro_episodes": 2}, r"blocks\.|norm"),
    "attention, second order": ({"target": "attention", "second_order": True}, r"blocks\.[01]\.attention\.[qkvo]_proj"),
    "mlp, second order": ({"target": "mlp", "second_order": True, "target_layers": "0"}, r"blocks\.0\.mlp\.(gate|up|down)"),
    "norms, second order": ({"target": "norms", "second_order": True}, r"(blocks\.[01]\..*_)?norm"),
    "all, second order": ({"target": "all", "second_order": True, "episodes_per_step": 2, "micro_episodes": 1}, r"blocks\.|norm"),
    "all, float16": ({"target": "all", "dtype": "float16"}, r"blocks\.|norm"),
    "all, bfloat16": ({"target": "all", "dtype": "bfloat16"}, r"blocks\.|norm"),
    "all, bfloat16, second order": ({"target": "all", "dtype": "bfloat16", "second_order": True}, r"blocks\.|norm"),
}
MISTAKES = {
    "unknown": ({"target": "embeddings"}, ["target = 'embeddings'", "attention+mlp"]),
    "no such block": ({"target": "mlp", "target_layers": "2"}, ["target_layers = 2", "0 to 1"]),
    "not a block": ({"target": "mlp", "target_layers": "last"}, ["target_layers = last"]),
    "blocks for the head": ({"target_layers": "0"}, ["target_layers = 0", "target = head"]),
    "nothing adapts": ({"target": "mlp", "inner_steps": 0}, ["target = mlp", "inner_steps"]),
    "no lr": ({"target_lr": 0}, ["target_lr = 0.0"]),
}


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """The folder of all runs, and what became of the commands by name. One of them evaluates."""
    here = tmp_path_factory.mktemp("targets")
    cases = {kind: TWO | changes | {"evaluates": kind == "norms"} for kind, (changes, _) in ALL_OF.items()}
    cases |= {name: TWO | changes for name, (changes, _) in MISTAKES.items()}
    return here, run_witnessed(here, data_dir, cases)


def put(model, name, value):
    """Make a plain tensor the weight of that name."""
    path, leaf = name.rsplit(".", 1)
    module = model.get_submodule(path)
    module._parameters.pop(leaf, None)
    setattr(module, leaf, value)


def by_hand(state, episodes, pattern, second_order):
    """Gradients by parameter name and the mean query loss before and after: gradient descent written out, its weights put into a model in turn."""
    losses, gradients = [], {}
    for episode in episodes:
        model = Llama(ModelConfig(D, 2, 2, 1, FF, V, T))
        model.load_state_dict(state["model"])
        initial = dict(model.named_parameters()) | {f"head {name}": p.clone().requires_grad_() for name, p in state["head"].items()}
        weights = {name: p for name, p in initial.items() if name.startswith("head") or re.match(pattern, name)}

        def surprise(weights, part, model=model, episode=episode):
            for name, p in weights.items():
                if not name.startswith("head"):
                    put(model, name, p)
            x = model.features(torch.from_numpy(episode[part]))[range(len(episode[part])), episode[f"{part}_pos"]] / math.sqrt(D)
            head = [p for name, p in weights.items() if name.startswith("head")]
            for W, b in zip(head[:-2:2], head[1:-2:2], strict=True):
                x = torch.relu(x @ W.T + b)
            logits = x @ head[-2].T + head[-1]
            return (logits.exp().sum(1).log() - logits[range(len(x)), episode[f"{part}_labels"]]).mean()

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            before = surprise(weights, "query").item()
            for _ in range(INNER_STEPS):
                slope = torch.autograd.grad(surprise(weights, "support"), list(weights.values()), create_graph=second_order)
                weights = {name: p - (INNER_LR if name.startswith("head") else LR) * g for (name, p), g in zip(weights.items(), slope, strict=True)}
            loss = surprise(weights, "query")
            found = torch.autograd.grad(loss, list(initial.values()), allow_unused=True)
        losses.append((before, loss.item()))
        for name, g in zip(initial, found, strict=True):
            if g is not None:
                gradients[name.removeprefix("head ")] = gradients.get(name.removeprefix("head "), 0) + g / len(episodes)
    return gradients, *np.mean(losses, 0)


@pytest.mark.parametrize("kind", ALL_OF)
def test_meta_step_is_that_of_an_unrolled_loop(runs, kind):
    here, (changes, pattern) = runs[0], ALL_OF[kind]
    states = [checkpoint(here / kind, step) for step in (LAST - 1, LAST)]
    before, after = (moments(state) for state in states)
    gradient = {name: (moment - 0.9 * before[name]) / 0.1 for name, moment in after.items()}
    episodes, second_order = step_episodes(here, kind, LAST), changes.get("second_order", False)
    assert len(episodes) == changes.get("episodes_per_step", 1)
    expected, loss_before, loss = by_hand(states[0], episodes, pattern, second_order)
    assert gradient.keys() == expected.keys() == (states[0]["model"] | states[0]["head"]).keys() - {"unembedding.weight"}
    largest = max(g.abs().max() for g in expected.values())
    rough = 3e-2 if changes.get("dtype") == "bfloat16" else 1e-5
    for name, g in gradient.items():
        assert (g - expected[name]).abs().max() < rough * expected[name].abs().max(), name
    line = log_of(here / kind, "meta")[-1]
    assert line["meta_loss"] == pytest.approx(loss, rel=rough) and line["query_loss_before"] == pytest.approx(loss_before, rel=rough)
    # The comparison tells the two orders apart, and the target from its neighbours.
    for other, _, _ in (by_hand(states[0], episodes, pattern, not second_order), by_hand(states[0], episodes, r"embedding", second_order)):
        assert max((other[name] - g).abs().max() for name, g in expected.items()) > 3e-3 * largest


def test_evaluations_start_from_a_fresh_head(runs):
    looks = log_of(runs[0] / "norms", "eval")
    assert looks and all(line["heldout_query_acc_before"] == 1 / N and line["heldout_query_acc"] > 0 for line in looks)


@pytest.mark.parametrize("kind", ["attention", "all, second order"])
def test_flops(runs, kind):
    """Tokens times 6 a parameter where the model runs forward and back, twice that more to differentiate it again, 2 where it only runs forward."""
    changes = ALL_OF[kind][0]
    model = Llama(ModelConfig(D, 2, 2, 1, FF, V, T))
    L, K, Q = BASE["episode_len"], BASE["k_shot"], BASE["q_query"]
    weights = model.n_params() - model.embedding.weight.numel() - model.unembedding.weight.numel()
    forward = 2 * weights + 2 * 2 * 2 * D * (L + 1) / 2
    inner = 3 * forward * (3 if changes.get("second_order") else 1) * INNER_STEPS
    tokens = N * L * changes.get("episodes_per_step", 1)
    head = N * changes.get("episodes_per_step", 1) * (K * INNER_STEPS + Q) * 6 * (D * N + N)
    expected = tokens * (K * (inner + 2 * forward) + Q * 4 * forward) + head
    assert log_of(runs[0] / kind, "meta")[0]["flops"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(runs, name):
    done = runs[1][name]
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert all(word in done.stderr for word in MISTAKES[name][1]), done.stderr
