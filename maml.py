"""Model-agnostic meta-learning on torch.func: adapt a copy of some parameters to a task, then ask how well the copy does on more of it.

Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400, algorithm 2: `adapt` is lines 6 and 7, `episode_loss` the sum in line 10,
as a mean. First order is their section 5.2. Three departures from the textbook:

* As a rule only a small head on top of fixed features adapts (ANIL, https://arxiv.org/abs/1909.09157). The backbone then runs once a step
  instead of once an inner step, and at first order its support features need no graph: `episode_loss`, all episodes at once. Whatever else
  adapts goes through `adapted_loss`, one episode at a time, and the backbone runs in each inner step.
* The last layer of the head starts at zero, so that the loss before adaptation is ln N.
* Features are divided by sqrt(d). Those of a final RMSNorm then have a length of about 1, and one inner learning rate serves every width.

This file knows features, labels and dicts of tensors, and nothing of tokens or transformers. tests/test_maml.py proves it.
Letters in shapes: E episodes, N ways, M windows of one episode (N*K of support or N*Q of query), d features.
"""
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

# ------------------------------------------------------------------------------------------------------------------------------------
# the head: {"0.weight": (hidden, d), "0.bias": (hidden,), "1.weight": ...}, the last of them (N, hidden) and (N,)


def init_head(d_model: int, n_way: int, layers: int = 1, hidden: int = 128, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Initial weights of a classifier of `layers` linear layers with ReLU between, float32 on the CPU.

    One layer is a linear classifier. `layers=4, hidden=128` is the head of Africa et al. 2025 (https://arxiv.org/abs/2508.02189): Xavier,
    except that our last layer is zero. ValueError: less than one layer, or hidden layers without units.
    """
    if layers < 1 or hidden < 1:
        raise ValueError(f"head_layers and head_hidden must be at least 1, not {layers} and {hidden}")
    widths = [d_model] + [hidden] * (layers - 1) + [n_way]
    head = {}
    for i in range(layers):
        head[f"{i}.weight"], head[f"{i}.bias"] = torch.zeros(widths[i + 1], widths[i]), torch.zeros(widths[i + 1])
        if i < layers - 1:   # the last layer stays zero
            torch.nn.init.xavier_uniform_(head[f"{i}.weight"], generator=generator)
    return head


def last_layer(head: dict[str, Tensor]) -> int:
    """Index of the last layer, read off the dict: a layer is one weight and one bias."""
    return len(head) // 2 - 1


def head_logits(params: dict[str, Tensor], features: Tensor) -> Tensor:
    """features (..., d) -> logits (..., N)."""
    last = last_layer(params)
    for i in range(last):
        features = F.relu(F.linear(features, params[f"{i}.weight"], params[f"{i}.bias"]))   # (..., hidden)
    return F.linear(features, params[f"{last}.weight"], params[f"{last}.bias"])             # (..., N)


def columns(head: dict[str, Tensor], words: Tensor) -> dict[str, Tensor]:
    """The heads of E episodes, cut from one head with an output per vocabulary id: a leading E on every tensor, N outputs each.

    For the multi-task control, which does not adapt in training (inner_steps=0). There a word needs an output of its own, since a label
    that is permuted anew in every episode can be learnt only by adapting. With `head = init_head(d_model, vocab_size)` the loss of a step
    is `episode_loss(columns(head, words), ..., steps=0)`, where words (E, N) are vocabulary ids in label order; gradients reach the columns
    in use. At evaluation the big head is left aside, and a fresh one of N outputs adapts as for every other run.
    """
    return {name: p[words] if name.startswith(f"{last_layer(head)}.") else p.expand(len(words), *p.shape) for name, p in head.items()}


# ------------------------------------------------------------------------------------------------------------------------------------
# the inner loop


def adapt(loss_fn, params: dict[str, Tensor], batch, lr, steps: int, first_order: bool = True) -> dict[str, Tensor]:
    """New parameters, `steps` of gradient descent on the scalar loss_fn(params, batch) away from `params`, which stay as they are.

    lr: a number, or a dict with one for each name. Differentiable in `params`, and at second order in everything else that the loss depends
    on. First order takes every inner gradient for a constant: then d adapted / d params = 1, and the outer gradient at the adapted
    parameters is also that of the initial ones.
    """
    rate = lr if isinstance(lr, dict) else dict.fromkeys(params, lr)
    for _ in range(steps):
        with torch.no_grad() if first_order else nullcontext():   # grad still differentiates in here, but nobody differentiates it
            gradient = grad(loss_fn)(params, batch)
        params = {name: p - rate[name] * gradient[name] for name, p in params.items()}   # theta' = theta - alpha * grad_theta L(theta)
    return params


# ------------------------------------------------------------------------------------------------------------------------------------
# the outer loss


def scaled(features: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Features (..., d) as a head takes them: the one seam of precision, from the backbone's bfloat16 or float16 to float32, and / sqrt(d)."""
    return features.to(dtype) * features.shape[-1] ** -0.5


def adapted_loss(logits, params: dict[str, Tensor], support, query, *, lr, steps: int, first_order: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The query loss of one episode after `steps` of adaptation to its support, a scalar in nats, and the numbers to log, detached scalars.

    logits: a function of (parameters, inputs) that gives (M, N). params: all that adapts, the initial values, by name.
    support, query: (inputs, labels (M,)), labels int64 in 0..N-1; what the inputs are is between the caller and `logits`.
    """
    def loss_fn(params, batch):
        inputs, labels = batch
        return F.cross_entropy(logits(params, inputs), labels)

    # FORK HERE for another inner loss or inner loop. For other parameters to adapt, see the sign in train.py.
    adapted = adapt(loss_fn, params, support, lr, steps, first_order)
    inputs, labels = query
    answers = logits(adapted, inputs)                                 # (M, N)
    loss = F.cross_entropy(answers, labels)
    with torch.no_grad():
        before, support_before, support_after = logits(params, inputs), logits(params, support[0]), logits(adapted, support[0])
        numbers = {
            "meta_loss": loss.detach(),
            "support_loss_before": F.cross_entropy(support_before, support[1]),
            "query_loss_before": F.cross_entropy(before, labels),
            "support_acc": accuracy(support_after, support[1]),
            "query_acc": accuracy(answers, labels),
            "query_acc_before": accuracy(before, labels),
            # the share of the commonest label is what a constant answer scores: more than chance means broken labels
            "majority_acc": (labels[:, None] == labels).to(loss.dtype).mean(0).max(),
            "chance": loss.new_full((), 1 / answers.shape[-1]),
        }
    return loss, numbers


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows where the largest logit (M, N) is the label's (M,). A head at zero answers 0 throughout: chance for balanced labels."""
    return (logits.argmax(-1) == labels).to(logits.dtype).mean()


def episode_loss(head: dict[str, Tensor], support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, *,
                 lr: float, steps: int, first_order: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over E episodes of the query loss after the head has adapted to the episode's own support, and the numbers to log.

    head: initial weights, one dict for all episodes or one with a leading E on every tensor (see `columns`).
    support, query: features as the backbone gives them, (E, N*K, d) and (E, N*Q, d), of any float dtype. Labels: int64 in 0..N-1.

    The loss is a scalar in nats, differentiable in head and query, at second order in support too. The numbers are detached, (E,) each,
    under the names of the log: their mean is what a training step logs, their spread gives an evaluation its standard error.
    """
    def episode(head, support, query):   # each of the two a batch of (features (M, d), labels (M,))
        return adapted_loss(head_logits, head, support, query, lr=lr, steps=steps, first_order=first_order)

    with torch.autocast(support.device.type, enabled=False):
        dtype = head["0.bias"].dtype                         # the inner loop runs in the dtype of the head, which is float32
        head_dim = 0 if head["0.bias"].ndim == 2 else None   # a head per episode, or one for all
        losses, numbers = vmap(episode, in_dims=(head_dim, 0, 0))(
            head, (scaled(support, dtype), support_labels), (scaled(query, dtype), query_labels))
    return losses.mean(), numbers
