"""Model-agnostic meta-learning on torch.func: adapt a copy of some parameters to a task, then ask how well
the copy does on new examples of that task.

Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400, algorithm 2: `adapt` is lines 6 and 7,
`episode_loss` the sum in line 10, as a mean. First order is their section 5.2. Three departures:

* As a rule only a small head on top of fixed features adapts (ANIL, https://arxiv.org/abs/1909.09157). The
  backbone then reads each window once, for all episodes at once: `episode_loss`. With another `--target` it
  runs in each inner step, one episode at a time: `episode_loss_through_model`.
* The last layer of the head is initialised to zero, so that the first loss is ln N. Training then moves it;
  evaluations set it to zero again (`fresh_head`).
* Features are divided by sqrt(d). Those of a final RMSNorm then have a length of about 1, and one inner
  learning rate serves every width.

    head = {name: p.requires_grad_() for name, p in init_head(d_model, n_way=4).items()}
    loss, metrics = episode_loss(head, support, labels, query, labels, lr=2.5, steps=10)
    loss.backward()  # support and query are features (E, M, d), labels (E, M) are in 0..3

This file deals in features, labels and dicts of tensors. Of the model it uses names of parameters, `blocks`
and `features_at`; what the windows hold does not matter to it.
Letters in shapes: E episodes, N ways, K support and Q query windows of a way, M windows of one episode (N*K
or N*Q), L tokens of a window, d features (C in model.py and train.py).
"""
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

# --------------------------------------------------------------------------------------------------
# The head: {"0.weight": (hidden, d), "0.bias": (hidden,), "1.weight": ...}, the last (N, hidden) and (N,)

def init_head(d_model, n_way, layers=1, hidden=128, generator=None):
    """Initial weights of a classifier of `layers` linear layers with ReLU between, float32 on the CPU.

    layers=4 is the head of Africa et al. 2025 (https://arxiv.org/abs/2508.02189), but its last layer is zero.
    """
    widths = [d_model] + [hidden] * (layers - 1) + [n_way]
    head = {}
    for i in range(layers):
        head[f"{i}.weight"] = torch.zeros(widths[i + 1], widths[i])
        head[f"{i}.bias"] = torch.zeros(widths[i + 1])
        if i < layers - 1:  # the last layer is left at zero
            torch.nn.init.xavier_uniform_(head[f"{i}.weight"], generator=generator)
    return head

def last_layer(head):
    """Index of the last layer, read off the dict: a layer is one weight and one bias."""
    return len(head) // 2 - 1

def fresh_head(head, n_way):
    """A head as evaluations adapt it: hidden layers as they are, the last one zero, with n_way outputs."""
    last, fresh = last_layer(head), {name: p.detach() for name, p in head.items()}
    for name in (f"{last}.weight", f"{last}.bias"):
        fresh[name] = fresh[name].new_zeros(n_way, *fresh[name].shape[1:])
    return fresh

def head_logits(params, features):
    """features (..., d) -> logits (..., N)."""
    last = last_layer(params)
    for i in range(last):
        features = F.relu(F.linear(features, params[f"{i}.weight"], params[f"{i}.bias"]))  # (..., hidden)
    return F.linear(features, params[f"{last}.weight"], params[f"{last}.bias"])  # (..., N)

def word_heads(head, words):
    """The heads of E episodes, out of one head that has an output for each token id: a leading E, N outputs.

    For the multi-task control (inner_steps=0), which classifies words without adapting to labels: each word
    has an output of its own. words (E, N): token ids in label order.
    """
    last = f"{last_layer(head)}."
    return {name: p[words] if name.startswith(last) else p.expand(len(words), *p.shape)
            for name, p in head.items()}

# --------------------------------------------------------------------------------------------------
# What adapts besides the head

TARGETS = {  # target -> beginnings of the names of its parameters within a block; embeddings never adapt
    "head": [],
    "attention": ["attention."],
    "mlp": ["mlp."],
    "attention+mlp": ["attention.", "mlp."],
    "norms": ["attention_norm.", "mlp_norm."],
    "all": [""]}

class Reader(torch.nn.Module):
    """A model with `features_at` for its forward, since functional_call calls no other method."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model.features_at(*inputs)

def inner_target(model, target, layers=""):
    """A Reader of the model, and those of its parameters that adapt, by name: none for target="head".

    layers: numbers of blocks, as "0,1,5". Empty is all; then `norms` and `all` have the final norm too.
    """
    blocks = [number for number in layers.split(",") if number] or range(len(model.blocks))
    names = [f"model.blocks.{i}.{beginning}" for i in blocks for beginning in TARGETS[target]]
    if target in ("norms", "all") and not layers:
        names.append("model.norm.")
    reader = Reader(model)
    return reader, {name: p for name, p in reader.named_parameters() if name.startswith(tuple(names))}

# --------------------------------------------------------------------------------------------------
# The inner loop

def head_rates(head, inner_lr, n_way, k_shot):
    """{name: inner learning rate} of the head: one value of the setting serves any number of ways and shots.

    Steps are stable where rate times curvature is below 2. In a last layer of zeros the loss is curved by at
    most 2 / N; in the layers below the curvature does not fall with N. Half of inner_lr for those, and half
    the rate with one shot, whose support set is noisier, were found by trial (LOG.md).
    """
    last = f"{last_layer(head)}."
    rate = inner_lr * n_way * min(k_shot, 2) / 2
    return {name: rate if name.startswith(last) else inner_lr / 2 for name in head}

def adapt(loss_fn, params, batch, lr, steps, first_order=True):
    """New parameters: `steps` of gradient descent on the scalar loss_fn(params, batch), from `params` on.

    params: a dict of tensors, which stay as they are. lr: a number, or a dict with one for each name.
    Differentiable in `params`, and at second order in everything else that the loss depends on. First order
    treats every inner gradient as a constant: then d adapted / d params is the identity, and the gradient at
    the adapted parameters is also that of the initial ones.
    """
    rate = lr if isinstance(lr, dict) else dict.fromkeys(params, lr)
    for _ in range(steps):
        with torch.no_grad() if first_order else nullcontext():  # grad still works, and keeps no graph
            gradient = grad(loss_fn)(params, batch)
        # theta' = theta - alpha * grad_theta L(theta)
        params = {name: p - rate[name] * gradient[name] for name, p in params.items()}
    return params

# --------------------------------------------------------------------------------------------------
# The outer loss

def scaled(features, dtype=torch.float32):
    """Features (..., d) / sqrt(d), as a head takes them: here half precision ends and float32 begins."""
    return features.to(dtype) * features.shape[-1] ** -0.5

def adapted_loss(logits_fn, params, support, query, *, lr, steps, first_order=True):
    """The query loss of one episode after adaptation to its support (nats), and metrics (detached).

    logits_fn: a function of (parameters, inputs) that gives (M, N). params: all that adapts, at its start.
    support, query: (inputs, labels (M,)), labels int64 in 0..N-1. Only logits_fn knows what the inputs are.
    """
    def loss_fn(params, batch):
        inputs, labels = batch
        return F.cross_entropy(logits_fn(params, inputs), labels)

    # FORK HERE for another inner loss (its steps are in `adapt`). For other parameters, see the sign below.
    adapted = adapt(loss_fn, params, support, lr, steps, first_order)
    inputs, labels = query
    logits = logits_fn(adapted, inputs)  # (M, N)
    loss = F.cross_entropy(logits, labels)
    with torch.no_grad():
        before = logits_fn(params, inputs)
        support_before, support_after = logits_fn(params, support[0]), logits_fn(adapted, support[0])
        metrics = {
            "meta_loss": loss.detach(),
            "support_loss_before": F.cross_entropy(support_before, support[1]),
            "query_loss_before": F.cross_entropy(before, labels),
            "support_acc": correct(support_after, support[1]).mean(),
            "query_acc": correct(logits, labels),  # (M,), as is the next; the others are scalars
            "query_acc_before": correct(before, labels),
            # what answering the commonest label scores: above chance only if labels are unbalanced, a fault
            "majority_acc": (labels[:, None] == labels).to(loss.dtype).mean(0).max(),
            "chance": loss.new_full((), 1 / logits.shape[-1]),
        }
    return loss, metrics

def correct(logits, labels):
    """(M,) 1 where the largest of a row of logits (M, N) is the label's (M,). A head of zeros answers 0."""
    return (logits.argmax(-1) == labels).to(logits.dtype)

def standard_error(values, clusters):
    """Standard error of the mean of values (n,) that depend on each other within a cluster (n,), say a word.

    Residuals are summed within each of the G clusters, and the squares of the sums added up (Liang and Zeger
    1986), times G / (G - 1). With a single cluster it is NaN.
    """
    clusters = clusters.unique(return_inverse=True)[1]
    sums = torch.zeros(clusters.max() + 1, dtype=values.dtype).index_add(0, clusters, values - values.mean())
    return (sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / len(values)

def episode_loss(head, support, support_labels, query, query_labels, *, lr, steps, first_order=True):
    """The mean over E episodes of the query loss after the head has adapted to the support; metrics.

    head: initial weights, one dict for all episodes or one with a leading E on every tensor (`word_heads`).
    support, query: features as the backbone gives them, (E, N*K, d) and (E, N*Q, d), of any float dtype.
    The loss, in nats, is differentiable in head and query, at second order in support too. The metrics are
    detached, (E,) each or (E, N*Q).
    """
    def episode(head, support, query):  # support and query: features (M, d), labels (M,)
        return adapted_loss(head_logits, head, support, query, lr=lr, steps=steps, first_order=first_order)

    with torch.autocast(support.device.type, enabled=False):
        dtype = head["0.bias"].dtype  # the inner loop runs in the dtype of the head, which is float32
        head_axis = 0 if head["0.bias"].ndim == 2 else None  # a head for each episode, or one for all
        support, query = (scaled(support, dtype), support_labels), (scaled(query, dtype), query_labels)
        losses, metrics = vmap(episode, in_dims=(head_axis, 0, 0))(head, support, query)
    return losses.mean(), metrics

def episode_loss_through_model(reader, adapting, head, tasks, *, head_lr, target_lr, steps, first_order=True,
                               autocast):
    """`episode_loss` where parts of the model adapt too: it runs in each inner step, episode by episode.

    reader, adapting: as `inner_target` gives them. head, head_lr: as `init_head` and `head_rates` do. tasks:
    windows "support" and "query" (E, M, L), the positions to read "support_pos" and "query_pos" (E, M), and
    "support_labels" and "query_labels" (E, M). autocast: a context for the model alone.
    """
    # FORK HERE for other parameters to adapt, if --target is not head: name their start, and say in `logits`
    # how the model reads. The outer loop learns a start only if it is in the model or in `head`.
    start = {**adapting, **{f"head.{name}": p for name, p in head.items()}}
    rates = dict.fromkeys(start, target_lr) | {f"head.{name}": rate for name, rate in head_lr.items()}

    def logits(params, windows):  # windows: tokens (M, L) and the positions (M,) to read -> (M, N)
        with autocast:
            weights = {name: params[name] for name in adapting}
            features = functional_call(reader, weights, windows)  # (M, d)
        head_params = {name: params[f"head.{name}"] for name in head}
        return head_logits(head_params, scaled(features, head["0.bias"].dtype))

    # Compiled blocks know nothing of torch.func, and fused attention has no second derivative.
    kernel = nullcontext() if first_order else sdpa_kernel(SDPBackend.MATH)
    results = []
    with torch.compiler.set_stance("force_eager"), kernel:
        for i in range(len(tasks["support"])):
            support, query = (((tasks[part][i], tasks[f"{part}_pos"][i]), tasks[f"{part}_labels"][i])
                              for part in ("support", "query"))
            results.append(adapted_loss(logits, start, support, query, lr=rates, steps=steps,
                                        first_order=first_order))
    losses, metrics = zip(*results, strict=True)
    return torch.stack(losses).mean(), {key: torch.stack([m[key] for m in metrics]) for key in metrics[0]}
