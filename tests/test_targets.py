"""train.py with a target: what adapts in the backbone, against an unrolled loop that sets weights by hand."""
import math
import re

import numpy as np
import pytest
import torch
from conftest import checkpoint, log_of, one_line
from test_meta_training import (BASE, FF, INNER_LR, INNER_STEPS, LAST, D, N, T, V, moments, parameters,
                                run_witnessed, step_episodes)

from model import Llama, ModelConfig

LR = 0.3  # of the target; large enough that forgetting to adapt anything shows
TWO = {"n_layers": 2, "target_lr": LR}
SECOND, BFLOAT16 = {"second_order": True}, {"dtype": "bfloat16"}
PARTS = {"episodes_per_step": 3, "micro_episodes": 2}
ATTENTION, MLP = r"blocks\.[01]\.attention\.[qkvo]_proj", r"blocks\.[01]\.mlp\.(gate|up|down)"
NORMS, ALL = r"(blocks\.[01]\..*_)?norm", r"blocks\.|norm"
KINDS = {  # kind -> its settings, and which parameters of two blocks must adapt
    "attention": ({"target": "attention"}, ATTENTION),
    "mlp": ({"target": "mlp", "episodes_per_step": 2}, MLP),
    "both, upper": ({"target": "attention+mlp", "target_layers": "1"}, r"blocks\.1\.(attention|mlp)\."),
    "norms": ({"target": "norms"}, NORMS),
    "norms, lower": ({"target": "norms", "target_layers": "0"}, r"blocks\.0\..*_norm"),
    "all": ({"target": "all", "head_layers": 2, "head_hidden": 8} | PARTS, ALL),
    "attention, second order": ({"target": "attention"} | SECOND, ATTENTION),
    "mlp, second order": ({"target": "mlp", "target_layers": "0"} | SECOND, r"blocks\.0\.mlp\."),
    "norms, second order": ({"target": "norms"} | SECOND, NORMS),
    "all, second order": ({"target": "all"} | PARTS | SECOND, ALL),
    "all, float16": ({"target": "all", "dtype": "float16"}, ALL),
    "all, bfloat16": ({"target": "all"} | BFLOAT16, ALL),
    "all, bfloat16, second order": ({"target": "all"} | BFLOAT16 | SECOND, ALL),
}
MISTAKES = {
    "no such block": ({"target": "mlp", "target_layers": "2"}, "target_layers = 2"),
    "blocks for the head": ({"target_layers": "0"}, "target_layers = 0"),
    "nothing adapts": ({"target": "mlp", "inner_steps": 0}, "target = mlp"),
}

@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """The folder of all runs, and what became of the commands by name. One of them evaluates."""
    here = tmp_path_factory.mktemp("targets")
    cases = {kind: TWO | changes for kind, (changes, _) in KINDS.items()}
    cases["evaluated"] = {"target": "norms", "n_way": 2, "k_shot": 1, "q_query": 1, "inner_steps": 1,
                          "max_steps": 1, "evaluates": True}
    cases |= {name: TWO | changes for name, (changes, _) in MISTAKES.items()}
    return here, run_witnessed(here, data_dir, cases)

def put(model, name, weight):
    """Make a plain tensor the weight of that name."""
    path, leaf = name.rsplit(".", 1)
    module = model.get_submodule(path)
    module._parameters.pop(leaf, None)
    setattr(module, leaf, weight)

def by_hand(saved, episodes, pattern, second_order):
    """Gradients by name, mean query loss before and after: gradient descent whose weights go into a model."""
    losses, gradients, layers = [], {}, len(saved.head) // 2
    for episode in episodes:
        model = Llama(ModelConfig(D, 2, 2, 1, FF, V, T))
        model.load_state_dict(saved.model)
        start = dict(model.named_parameters())
        start |= {f"head.{name}": p.clone().requires_grad_() for name, p in saved.head.items()}
        weights = {name: p for name, p in start.items() if re.match(f"head|{pattern}", name)}

        def surprise(weights, part, model=model, episode=episode):
            for name, p in weights.items():
                if not name.startswith("head"):
                    put(model, name, p)
            rows, positions = torch.from_numpy(episode[part]), episode[f"{part}_pos"]
            x = model.features(rows)[range(len(rows)), positions] / math.sqrt(D)
            for i in range(layers):
                x = x @ weights[f"head.{i}.weight"].T + weights[f"head.{i}.bias"]
                x = torch.relu(x) if i < layers - 1 else x
            return (x.exp().sum(1).log() - x[range(len(x)), episode[f"{part}_labels"]]).mean()

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            before = surprise(weights, "query").item()
            for _ in range(INNER_STEPS):
                loss = surprise(weights, "support")
                slope = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order)
                rates = [LR if "head" not in name else INNER_LR if f"head.{layers - 1}" in name
                         else INNER_LR / N / 2 for name in weights]
                steps = zip(weights.items(), rates, slope, strict=True)
                weights = {name: p - rate * g for (name, p), rate, g in steps}
            loss = surprise(weights, "query")
            outer = torch.autograd.grad(loss, list(start.values()), allow_unused=True)
        losses.append((before, loss.item()))
        for name, g in zip(start, outer, strict=True):
            if g is not None:
                gradients[name] = gradients.get(name, 0) + g / len(episodes)
    return gradients, *np.mean(losses, 0)

@pytest.mark.parametrize("kind", KINDS)
def test_meta_step_is_that_of_an_unrolled_loop(runs, kind):
    here, (changes, pattern) = runs[0], KINDS[kind]
    before, after = (checkpoint(here / kind, step) for step in (LAST - 1, LAST))
    gradient = {name: (m - 0.9 * moments(before)[name]) / 0.1 for name, m in moments(after).items()}
    episodes, second_order = step_episodes(here, kind, LAST), changes.get("second_order", False)
    assert len(episodes) == changes.get("episodes_per_step", 1)
    expected, loss_before, loss = by_hand(before, episodes, pattern, second_order)
    assert gradient.keys() == expected.keys() == parameters(before).keys() - {"unembedding.weight"}
    rough = 3e-2 if changes.get("dtype") == "bfloat16" else 1e-5
    for name, g in gradient.items():
        assert (g - expected[name]).abs().max() < rough * expected[name].abs().max(), name
    line = log_of(here / kind, "meta")[-1]
    assert line["meta_loss"] == pytest.approx(loss, rel=rough)
    assert line["query_loss_before"] == pytest.approx(loss_before, rel=rough)
    # The comparison tells the two orders apart, and the target from its neighbours.
    largest = max(g.abs().max() for g in expected.values())
    for other in ((pattern, not second_order), ("embedding", second_order)):
        others, _, _ = by_hand(before, episodes, *other)
        assert max((others[name] - g).abs().max() for name, g in expected.items()) > 3e-3 * largest

def test_evaluations_start_from_a_fresh_head(runs):
    evaluations = log_of(runs[0] / "evaluated", "eval")
    assert [line["heldout_query_acc_before"] for line in evaluations] == [1 / 2, 1 / 2]
    assert all(line["heldout_query_acc"] > 0 for line in evaluations)

@pytest.mark.parametrize("kind", ["attention", "all, second order"])
def test_flops(runs, kind):
    """6 a parameter and token forward and back, twice that more to differentiate it again, 2 forward only."""
    changes, model = KINDS[kind][0], Llama(ModelConfig(D, 2, 2, 1, FF, V, T))
    L, K, Q, E = BASE["episode_len"], BASE["k_shot"], BASE["q_query"], changes.get("episodes_per_step", 1)
    weights = model.n_params() - model.embedding.weight.numel() - model.unembedding.weight.numel()
    forward = 2 * weights + 2 * 2 * 2 * D * (L + 1) / 2
    inner = 3 * forward * (3 if changes.get("second_order") else 1) * INNER_STEPS
    head = N * E * (K * INNER_STEPS + Q) * 6 * (D * N + N)
    expected = N * L * E * (K * (inner + 2 * forward) + Q * 4 * forward) + head
    assert log_of(runs[0] / kind, "meta")[0]["flops"] == pytest.approx(expected, rel=1e-12)

def test_mistakes_are_one_line(runs):
    for name, (_, says) in MISTAKES.items():
        one_line(runs[1][name], says)
