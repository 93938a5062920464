"""A Llama-style decoder, small enough to read in one sitting.

RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020), in the
arrangement of LLaMA (Touvron et al. 2023): pre-norm, no biases, input embedding and unembedding untied. With the same weights its logits are those of
Hugging Face's LlamaForCausalLM.

Departures from the textbook: `features` (the final hidden states) is a method of its own, because few-shot episodes read a classification head off
the features and have no use for the 4,096 or 50,304 logits that a language model step computes.

Letters in shape comments: B rows, T positions, C = d_model, H query heads, K key/value heads, D = C / H, V vocabulary.
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
    rope_theta: float = 10000.0  # slowest rotary wavelength is 2 pi times about this many tokens


# ----------------------------------------------------------------------------------------------------------------------------------------------------
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
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)  # (D/2,) radians a token
    angle = torch.outer(torch.arange(T, device=device).float(), frequency)  # (T, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (T, D): pair j is made of the numbers j and j + D/2, as in Hugging Face's Llama
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_j, x_{j + D/2}) of x (..., T, D) by its position's angle: then q.k depends on positions only through their difference."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).type_as(x)


def causal_attention(q, k, v):
    """What F.scaled_dot_product_attention gives for q (B, H, T, D) and k, v (B, K, T, D), causal, spelt out for the compiler: (B, H, T, D).

    The fused kernel of a CPU spends itself on blocks: with narrow heads this takes a third of its time, mask and softmax being one loop, whose result
    the way back needs no second exponential for. Query rows come in up to eight chunks, and a chunk leaves out the keys after its end: nearly half.
    """
    B, H, T, D = q.shape
    K = k.size(1)
    q, rows, mixed = q.reshape(B, K, H // K, T, D) * D**-0.5, max(64, -(-T // 8)), []
    for first in range(0, T, rows):
        end = min(first + rows, T)
        later = torch.arange(end, device=q.device) > torch.arange(first, end, device=q.device)[:, None]  # (rows, end)
        score = q[:, :, :, first:end].flatten(2, 3) @ k[:, :, :end].mT  # (B, K, H/K * rows, end)
        p = torch.where(later, -math.inf, score.unflatten(2, (H // K, end - first))).softmax(-1)  # (B, K, H/K, rows, end)
        mixed.append((p.flatten(2, 3) @ v[:, :, :end]).unflatten(2, (H // K, end - first)))  # (B, K, H/K, rows, D)
    return torch.cat(mixed, dim=3).flatten(1, 2)


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

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        with torch.autocast(x.device.type, enabled=False):
            if torch.compiler.is_compiling() and not x.is_cuda and T <= 512:  # longer rows would keep too many scores for the way back
                y = causal_attention(q, k, v)
            else:
                if not x.is_cuda:  # the CPU's fused kernel is about three times as fast in float32 as in bfloat16 on heads this narrow
                    q, k, v = q.float(), k.float(), v.float()
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, D): head h reads key/value head h // (H / K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): one half decides how much of the other passes."""

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

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


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
        """Draw all weights anew: the only place where any is set (GPT-2's scheme, Radford et al. 2019)."""
        std = 0.02
        residual_std = std / math.sqrt(2 * self.config.n_layers)  # 2 n_layers matrices write to the residual stream: together they add std^2
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.unembedding.weight, std=min(std, 0.5 / math.sqrt(self.config.d_model)))  # logits of at most 0.5: the first loss is ln V
        for block in self.blocks:
            for reads in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj, block.mlp.gate, block.mlp.up):
                nn.init.normal_(reads.weight, std=std)
            for writes in (block.attention.o_proj, block.mlp.down):
                nn.init.normal_(writes.weight, std=residual_std)
            for norm in (block.attention_norm, block.mlp_norm):
                nn.init.ones_(norm.weight)
        nn.init.ones_(self.norm.weight)

    def features(self, idx):
        """Final hidden states (B, T, C), after the last norm, of the token ids idx (B, T). Position t has read idx[:, :t + 1] and nothing later."""
        B, T = idx.shape
        cos, sin = rotary_table(T, self.config.d_model // self.config.n_heads, self.config.rope_theta, idx.device)
        x = self.embedding(idx)  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def features_at(self, idx, positions):
        """The features (B, C) of one position (B,) in each row of idx (B, T)."""
        return self.features(idx)[torch.arange(len(idx), device=idx.device), positions]

    def logits(self, idx):
        """Scores (B, T, V) of the token that follows each position of idx (B, T)."""
        return self.unembedding(self.features(idx))

    def loss(self, x, targets):
        """Mean cross-entropy, in nats, of the targets (B, T) that follow features x (B, T, C)."""
        return F.cross_entropy(self.unembedding(x).flatten(0, 1).float(), targets.flatten())  # (B*T, V) against (B*T,)

    def forward(self, idx, targets):
        """Mean cross-entropy, in nats, of the targets (B, T) that follow idx (B, T)."""
        return self.loss(self.features(idx), targets)

    @torch.no_grad()
    def generate(self, idx, n_tokens, temperature=1.0, top_k=None, generator=None):
        """Extend idx (B, T) by n_tokens sampled ids; each sees at most the last block_size. temperature 0 takes the likeliest."""
        for _ in range(n_tokens):
            logits = self.logits(idx[:, -self.config.block_size :])[:, -1].float()  # (B, V)
            if temperature == 0:
                idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
                continue
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1), the smallest score that stays
                logits = logits.masked_fill(logits < kth, -math.inf)
            idx = torch.cat((idx, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)), dim=1)
        return idx

    def compile_parts(self):
        """Compile the block and the loss, not the model: one compilation serves all layers, so that training starts sooner.

        Each shape gets kernels of its own, whichever comes first: a resumed run meets them in another order. The compiled loss reads the logits as
        the product leaves them, in bfloat16, and writes their gradient so, where plain cross-entropy makes several copies in float32.
        """
        torch._dynamo.config.recompile_limit = 32  # one for each shape and mode
        for block in self.blocks:
            block.compile(dynamic=False)
        self.loss = torch.compile(self.loss, dynamic=False)

    def n_params(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, T, backward, unembedding):
        """FLOPs that one token of a T-token row costs: the one place where they are counted (Kaplan et al. 2020, appendix B).

        Two a weight forward and four more backward. The input embedding is a look-up and costs nothing; the unembedding counts where logits are
        wanted. Attention adds two products (scores, mixing) of 2 C FLOPs for each of the (T + 1) / 2 positions that a token sees on average.
        """
        weights = self.n_params() - self.embedding.weight.numel() - (0 if unembedding else self.unembedding.weight.numel())
        attention = self.config.n_layers * 2 * 2 * self.config.d_model * (T + 1) / 2
        return (2 * weights + attention) * (3 if backward else 1)
