"""A Llama-style decoder, small enough to read in one sitting.

RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al.
2023) and SwiGLU (Shazeer 2020) in the arrangement of LLaMA (Touvron et al. 2023): pre-norm, no biases, input
embedding and unembedding untied. With equal weights its logits are those of Hugging Face's LlamaForCausalLM.

One departure from the textbook: `features`, the final hidden states, is a method of its own. Few-shot
episodes put a classification head on the features and need no logits of a language model.

Letters in shape comments: B sequences (rows), T positions, C = d_model, H query heads, K key/value heads,
D = C / H, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class ModelConfig:
    """The shape of a model; the defaults are the paper's 11M (11,282,784 parameters at 50,304 tokens)."""

    d_model: int = 96  # width of the residual stream
    n_layers: int = 12  # transformer blocks
    n_heads: int = 12  # query heads; d_model / n_heads numbers each
    n_kv_heads: int = 4  # key/value heads, each shared by n_heads / n_kv_heads query heads
    d_ff: int = 384  # hidden width of the SwiGLU
    vocab_size: int = 50304  # rows of the embedding and of the unembedding
    block_size: int = 512  # longest sequence of a training step; rotary positions set no limit of their own
    norm_eps: float = 1e-6  # under the root of RMSNorm
    rope_theta: float = 10000.0  # base of the rotary frequencies: token t turns pair j by t / base^(2j/D)

# --------------------------------------------------------------------------------------------------
# The parts

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 whatever the precision around it."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).type_as(x)

def rotary_table(T, head_dim, theta, device):
    """cos and sin, each (T, head_dim): position t turns pair j by the angle t / theta^(2j / head_dim)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)  # (D/2,) per token
    angle = torch.outer(torch.arange(T, device=device).float(), frequency)  # (T, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (T, D): pair j is j and j + D/2, as in Hugging Face's Llama
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Turn each pair (x_j, x_{j + D/2}) of x (..., T, D) by the angle of its position.

    Then q.k depends on positions only through their difference.
    """
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).type_as(x)

class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.d_model // config.n_heads
        self.q_proj = nn.Linear(config.d_model, config.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, config.d_model, bias=False)

    def qkv(self, x, cos, sin):
        """Queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C), with rotary positions."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:  # in `generate`
            if cache:  # keys and values of the positions before these
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
            cache.update(k=k, v=v)
        y = attend(q, k, v)  # (B, H, T, D), causal: head h reads key/value head h // (H / K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))

class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the gate decides how much of up(x) passes."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))

class Block(nn.Module):
    """Attention, then SwiGLU, each reading a normalised copy of the residual stream and adding to it."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))

# --------------------------------------------------------------------------------------------------
# The model

class Llama(nn.Module):
    """The whole decoder. Token ids in; features, logits or a loss out.

    >>> Llama(ModelConfig()).n_params()
    11282784
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Draw all matrices (GPT-2's scheme, Radford et al. 2019). Logits start small: the loss is ln V."""
        std = 0.02
        residual_std = std / math.sqrt(2 * self.config.n_layers)  # 2 n_layers matrices add to the stream
        nn.init.normal_(self.embedding.weight, std=std)
        # Normalised features have length sqrt(C), so that logits spread by at most 0.5.
        nn.init.normal_(self.unembedding.weight, std=min(std, 0.5 / math.sqrt(self.config.d_model)))
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate, mlp.up):
                nn.init.normal_(linear.weight, std=std)
            for linear in (attention.o_proj, mlp.down):  # these write to the residual stream
                nn.init.normal_(linear.weight, std=residual_std)

    def features(self, idx, caches=None, first=0):
        """Final hidden states (B, T, C), after the last norm, of the token ids idx (B, T).

        Position t has read idx[:, :t + 1] and nothing later. In `generate` idx begins at position `first`,
        and `caches`, a dict for each block, holds the keys and values of the positions before.
        """
        head_dim = self.config.d_model // self.config.n_heads
        cos, sin = rotary_table(first + idx.size(1), head_dim, self.config.rope_theta, idx.device)
        x = self.embedding(idx)  # (B, T, C)
        for block, cache in zip(self.blocks, caches or [None] * self.config.n_layers, strict=True):
            x = block(x, cos[first:], sin[first:], cache)
        return self.norm(x)

    def features_at(self, idx, positions):
        """The features (B, C) of one position (B,) in each row of idx (B, T)."""
        return self.features(idx)[torch.arange(len(idx), device=idx.device), positions]

    def logits(self, idx):
        """Scores (B, T, V) of the token that follows each position of idx (B, T)."""
        return self.unembedding(self.features(idx))

    def loss(self, x, targets):
        """Mean cross-entropy, in nats, of the targets (B, T) that follow features x (B, T, C)."""
        logits = self.unembedding(x).flatten(0, 1).float()  # (B*T, V)
        return F.cross_entropy(logits, targets.flatten())

    def forward(self, idx, targets):
        """Mean cross-entropy, in nats, of the targets (B, T) that follow idx (B, T)."""
        return self.loss(self.features(idx), targets)

    @torch.no_grad()
    def generate(self, idx, n_tokens, temperature=1.0, top_k=None, generator=None):
        """Extend idx (B, T) by n_tokens; temperature 0 takes the likeliest.

        A token is run through the model once: its keys and values are kept. It attends to itself and the
        block_size - 1 before it, a sliding window.
        """
        window, caches = self.config.block_size, [{} for _ in self.blocks]
        new = idx[:, -window:]
        for _ in range(n_tokens):
            x = self.features(new, caches, first=idx.size(1) - new.size(1))[:, -1]  # (B, C)
            caches = [{name: kept[:, :, -window + 1 :] for name, kept in cache.items()} for cache in caches]
            logits = self.unembedding(x).float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1), the least that stays
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
        return idx

    def n_params(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, T, backward, unembedding):
        """FLOPs that one token of a T-token row costs (Kaplan et al. 2020, appendix B).

        Two for each weight in the forward pass, and four more in the backward pass. The input embedding is a
        look-up and costs nothing; the unembedding counts where logits are wanted. Attention adds two products
        (scores, mixing) of 2 C FLOPs for each of the (T + 1) / 2 positions that a token sees on average.
        """
        weights = self.n_params() - self.embedding.weight.numel()
        if not unembedding:
            weights -= self.unembedding.weight.numel()
        attention = self.config.n_layers * 2 * 2 * self.config.d_model * (T + 1) / 2
        return (2 * weights + attention) * (3 if backward else 1)

# --------------------------------------------------------------------------------------------------
# Speed. The last line of `attend` is all that attention needs; the rest only makes it faster. A CPU's fused
# kernel is slow with heads this narrow; the compiler makes better loops of plain arithmetic. A GPU's fused
# kernels take grouped queries in half precision from compute capability 8.0 on.

GROUPED = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)

def attend(q, k, v):
    """Causal softmax(q k^T / sqrt(D)) v of q (B, H, T, D) and k, v (B, K, S, D); S = T, or T = 1."""
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cpu":
            if torch.compiler.is_compiling() and q.size(2) == k.size(2) <= 512:  # too many scores beyond
                return causal_attention(q, k, v)
            q, k, v = q.float(), k.float(), v.float()  # here about three times as fast as bfloat16
        elif not GROUPED or q.dtype == torch.float32:
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        causal = q.size(2) > 1  # a single query, in `generate`, comes last and sees all keys
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

def causal_attention(q, k, v):
    """What F.scaled_dot_product_attention gives in `attend`, spelled out for the compiler.

    It takes a third of the fused kernel's time: mask and softmax are one loop, and the backward pass needs no
    second exponential. Query rows come in up to eight chunks, and a chunk leaves out the keys after its end.
    """
    B, H, T, D = q.shape
    K = k.size(1)
    q = q.reshape(B, K, H // K, T, D) * D**-0.5
    rows = max(32, -(-T // 8))
    mixed = []
    for first in range(0, T, rows):
        end = min(first + rows, T)
        query = q[:, :, :, first:end].flatten(2, 3)  # (B, K, H/K * rows, D)
        score = (query @ k[:, :, :end].mT).unflatten(2, (H // K, end - first))  # (B, K, H/K, rows, end)
        later = torch.arange(end, device=q.device) > torch.arange(first, end, device=q.device)[:, None]
        p = torch.where(later, -math.inf, score).softmax(-1)  # (B, K, H/K, rows, end)
        y = p.flatten(2, 3) @ v[:, :, :end]  # (B, K, H/K * rows, D)
        mixed.append(y.unflatten(2, (H // K, end - first)))
    return torch.cat(mixed, dim=3).flatten(1, 2)

def compile_parts(model):
    """Compile the block and the loss, not the model: one compilation serves all layers.

    Each shape gets its own kernels, so that it does not matter which comes first when a run is resumed. The
    compiled loss keeps the logits and their gradient in bfloat16. Plain cross-entropy makes several copies
    of them in float32.
    """
    torch._dynamo.config.recompile_limit = 32  # one for each shape and mode
    for block in model.blocks:
        block.compile(dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)
