"""Model-agnostic meta-learning on torch.func: adapt a copy of some parameters to a task, then ask how well the copy does on more of it.

Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400, algorithm 2: `adapt` is lines 6 and 7, `episode_loss` the sum in line 10,
as a mean. First order is their section 5.2. Three departures from the textbook:

* Only a small head on top of fixed features adapts (ANIL, https://arxiv.org/abs/1909.09157). The backbone then runs once a step instead of
  once an inner step, and at first order its support features need no graph: compute them under no_grad.
* The last layer of the head starts at zero, so that the loss before adaptation is ln N.
* Features are divided by sqrt(d). Those of a final RMSNorm then have a length of about 1, and one inner learning rate serves every width.

This file knows features, labels and dicts of tensors, and nothing of tokens or transformers. tests/test_maml.py proves it.
Letters in shapes: E episodes, N ways, M windows of one episode (N*K of support or N*Q of query), d features.
"""
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


def adapt(loss_fn, params: dict[str, Tensor], batch, lr: float, steps: int, first_order: bool = True) -> dict[str, Tensor]:
    """New parameters, `steps` of gradient descent on the scalar loss_fn(params, batch) away from `params`, which stay as they are.

    Differentiable in `params`, and at second order in everything else that the loss depends on. First order takes every inner gradient for
    a constant: then d adapted / d params = 1, and the outer gradient at the adapted parameters is also that of the initial ones.
    """
    for _ in range(steps):
        gradient = grad(loss_fn)(params, batch)
        if first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        params = {name: p - lr * gradient[name] for name, p in params.items()}   # theta' = theta - alpha * grad_theta L(theta)
    return params


# ------------------------------------------------------------------------------------------------------------------------------------
# the outer loss


def head_loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in nats over a batch of (features (M, d), labels (M,))."""
    features, labels = batch
    return F.cross_entropy(head_logits(params, features), labels)


def head_accuracy(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Share of a batch where the largest logit is the label's. A head at zero answers 0 throughout, which is chance for balanced labels."""
    features, labels = batch
    return (head_logits(params, features).argmax(-1) == labels).to(features.dtype).mean()


def episode_loss(head: dict[str, Tensor], support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, *,
                 lr: float, steps: int, first_order: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over E episodes of the query loss after `steps` of adaptation to the episode's own support, and the numbers to log.

    head: initial weights, one dict for all episodes or one with a leading E on every tensor (see `columns`).
    support, query: features as the backbone gives them, (E, N*K, d) and (E, N*Q, d), of any float dtype. Labels: int64 in 0..N-1.

    The loss is a scalar in nats, differentiable in head and query, at second order in support too. The numbers are detached, (E,) each,
    under the names of the log: their mean is what a training step logs, their spread gives an evaluation its standard error.
    """
    def episode(head, support, query):   # each of the two a batch of (features (M, d), labels (M,))
        # FORK HERE: which parameters adapt, and on what loss. For a part of the backbone hand over its named parameters and a loss that
        # takes inputs through torch.func.functional_call and the head, send the query the same way, and loop over episodes without vmap.
        adapted = adapt(head_loss, head, support, lr, steps, first_order)
        loss = head_loss(adapted, query)
        with torch.no_grad():
            n_way, labels = len(head[f"{last_layer(head)}.bias"]), query[1]
            numbers = {
                "meta_loss": loss.detach(),
                "support_loss_before": head_loss(head, support),
                "query_loss_before": head_loss(head, query),
                "support_acc": head_accuracy(adapted, support),
                "query_acc": head_accuracy(adapted, query),
                "query_acc_before": head_accuracy(head, query),
                # the share of the commonest label is what a constant answer scores: more than chance means broken labels
                "majority_acc": (labels[:, None] == labels).to(loss.dtype).mean(0).max(),
                "chance": loss.new_full((), 1 / n_way),
            }
        return loss, numbers

    with torch.autocast(support.device.type, enabled=False):
        # the one seam of precision: bf16 or float16 features come in, the loop runs in the dtype of the head, which is float32
        dtype, scale = head["0.bias"].dtype, support.shape[-1] ** -0.5
        support, query = support.to(dtype) * scale, query.to(dtype) * scale
        head_dim = 0 if head["0.bias"].ndim == 2 else None   # a head per episode, or one for all
        losses, numbers = vmap(episode, in_dims=(head_dim, 0, 0))(head, (support, support_labels), (query, query_labels))
    return losses.mean(), numbers
