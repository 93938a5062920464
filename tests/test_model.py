"""model.py against Hugging Face's Llama, complex numbers, float64 formulas, counted products, invariants."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import (
    Attention, Llama, ModelConfig, RMSNorm, causal_attention, compile_parts, rotary_table, rotate)
from plumbing.checkpoint import hf_config, their_names

SIZES = {  # name: (d_model, d_ff, parameters with 50,304 ids)
    "11m": (96, 384, 11_282_784),
    "65m": (384, 1536, 64_595_328),
    "181m": (768, 3072, 181_095_168),
    "570m": (1536, 6144, 569_808_384),
}
SMALL = dict(d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=80, vocab_size=101, block_size=16)

@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)

def strong(gain=1.5, **changes):
    """A model whose weights are so large that every part matters. A fresh one attends almost evenly."""
    model = Llama(ModelConfig(**SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=gain / math.sqrt(parameter.size(1)))
        model.embedding.weight.normal_()
    return model

def ids(rows, length, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, (rows, length))

# --------------------------------------------------------------------------------------------------
# Shape

@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    d_model, d_ff, expected = SIZES[name]
    with torch.device("meta"):
        assert Llama(ModelConfig(d_model=d_model, d_ff=d_ff)).n_params() == expected

@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("unembedding", [False, True])
def test_flops_are_those_that_are_counted(backward, unembedding):
    model, B, T = strong(), 2, 12
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model.logits(ids(B, T)) if unembedding else model.features(ids(B, T))
        if backward:
            out.sum().backward()
    counted, config = counter.get_flop_counts()["Global"], model.config
    weights = counted[torch.ops.aten.mm] + counted.get(torch.ops.aten.addmm, 0)
    whole_square = sum(counted.values()) - weights  # the math path computes all T positions of all T queries
    assert whole_square == B * T * T * config.n_layers * 4 * config.d_model * (3 if backward else 1)
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    weights += 2 * B * T * vectors * (3 if backward else 1)  # norms cost as much, but are no matrix product
    seen = sum(position + 1 for position in range(T))  # of the T * T, those that causality leaves
    expected = weights + whole_square * seen / T**2
    assert B * T * model.flops_per_token(T, backward, unembedding) == pytest.approx(expected)

@pytest.mark.parametrize("T", [1, 7, 64, 130, 530])
def test_attention_for_the_compiler_is_attention(T):
    """In one chunk, in several, and with a last one that is shorter; its gradients too."""
    q, k, v = (torch.randn(2, heads, T, 6, requires_grad=True) for heads in (6, 2, 2))
    weight = torch.randn(2, 6, T, 6)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    spelled_out = causal_attention(q, k, v)
    torch.testing.assert_close(spelled_out, expected)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (spelled_out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_compiled_parts_are_the_model():
    """Loss and gradients of the compiled block and loss, whose attention is spelled out."""
    model = strong(block_size=30)
    idx = ids(3, 31)
    plain = model(idx[:, :-1], idx[:, 1:])
    plain.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    compile_parts(model)
    compiled = model(idx[:, :-1], idx[:, 1:])
    compiled.backward()
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)

# --------------------------------------------------------------------------------------------------
# The arithmetic

@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])  # eps rules, it does not, squares leave float16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_is_its_formula(dtype, scale):
    norm = RMSNorm(64, eps=1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (scale * torch.randn(5, 64)).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps * 2, atol=1e-30)

@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rotation_is_multiplication_by_a_complex_number(theta):
    T, D = 40, 16
    x = torch.randn(2, 3, T, D, dtype=torch.float64)
    position, pair = torch.arange(T, dtype=torch.float64)[:, None], torch.arange(D // 2, dtype=torch.float64)
    turn = torch.exp(1j * position * theta ** (-2 * pair / D))
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
    out = rotate(x, *rotary_table(T, D, theta, "cpu"))
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), dim=-1), rtol=0, atol=2e-5)

def test_scores_depend_on_distance_only():
    T, D = 64, 16
    q, k = torch.randn(2, D, dtype=torch.float64)
    cos, sin = rotary_table(T, D, 10_000.0, "cpu")
    # (T, T): the same q and k at all pairs of positions
    scores = rotate(q.expand(T, D), cos, sin) @ rotate(k.expand(T, D), cos, sin).T
    for distance in range(-T + 2, T - 1):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-5)
    assert scores[0].std() > 0.5  # and they do depend on it

def test_attention_does_not_see_a_common_shift():
    attention, T, shift = strong().blocks[0].attention, 12, 300
    assert isinstance(attention, Attention)
    x = torch.randn(2, T, SMALL["d_model"])
    cos, sin = rotary_table(T + shift, attention.head_dim, 10_000.0, "cpu")
    here, there = attention(x, cos[:T], sin[:T]), attention(x, cos[shift:], sin[shift:])
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)
    farther = attention(x, cos[: 2 * T : 2], sin[: 2 * T : 2])
    assert (here - farther).abs().max() > 0.05  # but twice the distance it does see

def test_features_depend_on_no_later_token():
    model, T, changed = strong(), 16, 9
    idx = ids(2, T)
    other = idx.clone()
    other[:, changed] = (other[:, changed] + 1) % SMALL["vocab_size"]
    before, after = model.features(idx), model.features(other)
    difference = (before - after).abs().amax(dim=(0, 2))  # (T,)
    assert (difference[:changed] == 0).all() and (difference[changed:] > 1e-3).all()

@pytest.mark.parametrize("t", [0, 7, 15])
def test_features_depend_on_every_earlier_token(t):
    model, inputs = strong(), []
    model.embedding.register_forward_hook(lambda module, args, out: inputs.append(out.retain_grad() or out))
    features = model.features(ids(1, 16))
    (features[0, t] * torch.randn(SMALL["d_model"])).sum().backward()
    gradient = inputs[0].grad[0].abs().amax(-1)  # (T,): what position t reads of each
    assert (gradient[t + 1 :] == 0).all() and (gradient[: t + 1] > 1e-4).all()

def test_grouped_heads_are_repeated_heads():
    grouped = strong()
    repeated = Llama(ModelConfig(**SMALL | {"n_kv_heads": 6}))
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:  # (K * D, C) -> (H * D, C), each head three times
            weights[name] = weight.view(2, 8, 48).repeat_interleave(3, dim=0).reshape(48, 48)
    repeated.load_state_dict(weights)
    idx = ids(3, 16)
    torch.testing.assert_close(grouped.features(idx), repeated.features(idx), rtol=0, atol=1e-5)

HUGGING_FACE = {  # ours, under blocks.i: theirs, under model.layers.i
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    **{f"attention.{role}_proj": f"self_attn.{role}_proj" for role in "qkvo"},
    **{f"mlp.{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}

@pytest.mark.parametrize("changes", [
    {},
    {"n_kv_heads": 6, "rope_theta": 300.0},
    {"n_kv_heads": 1, "norm_eps": 0.1},
    dict(d_model=96, n_layers=12, n_heads=12, n_kv_heads=4, d_ff=384, vocab_size=512, block_size=128),
], ids=["grouped", "all heads, other theta", "one kv head, other eps", "11m"])
def test_logits_are_those_of_hugging_face(changes):
    transformers = pytest.importorskip("transformers")
    model = strong(gain=1.0, **changes)
    config = model.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, hidden_act="silu",
        num_key_value_heads=config.n_kv_heads, rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, attention_bias=False,
        max_position_embeddings=config.block_size, mlp_bias=False, attn_implementation="eager",
    )).eval()
    ends = {"model.embed_tokens": model.embedding, "model.norm": model.norm, "lm_head": model.unembedding}
    weights = {f"{name}.weight": module.weight for name, module in ends.items()}
    for i, block in enumerate(model.blocks):
        for our_name, their_name in HUGGING_FACE.items():
            weights[f"model.layers.{i}.{their_name}.weight"] = block.get_parameter(f"{our_name}.weight")
    theirs.load_state_dict(weights)  # strict: every weight of theirs is one of ours
    assert sum(weight.numel() for weight in weights.values()) == model.n_params()
    idx = ids(2, config.block_size, config.vocab_size)
    with torch.no_grad():
        ours, expected = model.logits(idx), theirs(idx).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

def test_loss_is_the_mean_surprise_at_the_targets():
    model, idx, targets = strong(), ids(3, 16), ids(3, 16)
    log_p = model.logits(idx).double().log_softmax(-1)
    surprise = [-log_p[b, t, targets[b, t]] for b in range(3) for t in range(16)]
    torch.testing.assert_close(model(idx, targets).double(), torch.stack(surprise).mean(), rtol=1e-6, atol=0)

def test_bfloat16_products_give_nearly_the_same_float32_loss():
    model, idx, targets = strong(), ids(4, 16), ids(4, 16)
    exact = model(idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(idx, targets)
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded.item() / exact.item() - 1) < 0.02

# --------------------------------------------------------------------------------------------------
# Initial weights

def test_spread_of_each_kind_of_initial_weight():
    model = Llama(ModelConfig(vocab_size=512))
    stds = dict.fromkeys("q_proj k_proj v_proj gate up embedding unembedding".split(), 0.02)
    stds |= {"o_proj": 0.02 / math.sqrt(24), "down": 0.02 / math.sqrt(24)}
    met = set()
    for name, weight in model.named_parameters():
        role = name.split(".")[-2]
        met.add(role)
        if "norm" in role:
            assert (weight == 1).all(), name
            continue
        n, std = weight.numel(), stds[role]
        assert abs(weight.mean()) < 5 * std / math.sqrt(n), name  # five standard errors
        assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * n), name
        inside = (weight.abs() < std).float().mean()  # 0.6827 of a normal distribution
        assert abs(inside - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n), name
    assert met == {*stds, "attention_norm", "mlp_norm", "norm"}

@pytest.mark.parametrize("width", [96, 384, 768, 1536])
def test_first_loss_is_that_of_knowing_nothing(width):
    model = Llama(ModelConfig(d_model=width, n_layers=2, d_ff=width, vocab_size=4096))
    with torch.no_grad():
        scores = model.logits(ids(2, 64, 4096))
    loss = scores.logsumexp(-1).mean() - scores.mean()  # each target equally likely
    assert loss.item() == pytest.approx(math.log(4096), rel=0.02)

# --------------------------------------------------------------------------------------------------
# Writing

def greedy(model, idx, n_tokens):
    for _ in range(n_tokens):
        scores = model.logits(idx[:, -model.config.block_size :])[:, -1]
        rows = zip(idx, scores, strict=True)
        idx = torch.stack([torch.cat((row, score.argmax()[None])) for row, score in rows])
    return idx

def test_greedy_text_is_the_likeliest_token_each_time():
    model, idx = strong(), ids(3, 5)
    expected = greedy(model, idx, 11)  # 16 tokens: block_size
    assert expected.shape == (3, 16) and expected.dtype == torch.int64
    assert torch.equal(model.generate(idx, 11, temperature=0), expected)
    assert torch.equal(model.generate(idx, 11, top_k=1), expected)

def test_text_longer_than_block_size_attends_to_the_last_block_size():
    """As Hugging Face's Mistral does, which is a Llama with a window."""
    transformers = pytest.importorskip("transformers")
    model, idx = strong(), ids(3, 5)
    settings = hf_config(model.config) | {"model_type": "mistral", "sliding_window": 16}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**settings, pad_token_id=0)).eval()
    names = their_names(model.config.n_layers)
    theirs.load_state_dict({names[ours]: p for ours, p in model.state_dict().items()})
    expected = theirs.generate(idx, max_new_tokens=45, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(idx, 45, temperature=0), expected)
    assert torch.equal(model.generate(idx, 11, temperature=0), expected[:, :16])

def test_same_generator_same_text():
    model, idx = strong(), ids(2, 4)
    texts = [model.generate(idx, 12, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0][:, :4], idx)

@pytest.mark.parametrize(("temperature", "top_k"), [(1, None), (0.5, None), (2, None), (1.3, 5), (1, 1000)])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_k):
    model, rows = strong(vocab_size=20), 5_000
    idx = torch.tensor([[3, 7, 11]])
    scores = model.logits(idx)[0, -1].double() / temperature
    kept = scores.argsort(descending=True)[: top_k or 20]
    probability = torch.zeros(20, dtype=torch.float64)
    probability[kept] = F.softmax(scores[kept], dim=0)
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(idx.expand(rows, 3), 1, temperature, top_k, generator)[:, -1]
    share = torch.bincount(drawn, minlength=20) / rows
    assert (share[probability == 0] == 0).all()
    assert ((share - probability).abs() <= 5 * (probability * (1 - probability) / rows).sqrt() + 1e-9).all()
