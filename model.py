"""The network of record #77: a table of parameters, and the functions from tokens to loss and text.

B batch rows  T row tokens  D width  H heads  K head size  F ffn (4 D)  V vocabulary  R bigram rows
L layers  A attention layers  E value embeddings  G gate inputs  M predicted tokens (MTP)

Everything below `init` runs inside `sharding.spmd`: shapes are one device's, H, F and V its part.
"""

import itertools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import enter, gather, leave, own, part, total, whole

G = 12  # gates read the first 12 dims of the stream (record 28)


class Param(NamedTuple):
    """One row of the table: all that is known of a weight."""

    shape: tuple
    axes: tuple  # logical axes, see sharding.RULES
    init: Callable  # (key, shape) -> float32 array
    group: str  # who updates it: "muon" or "adam"
    lr: float = 1.0  # times the group's learning rate
    wd: float = 0.0  # times the group's weight decay
    betas: tuple = ()  # Adam's


def param_table(c) -> dict[str, Param]:
    """name -> Param, for a config with layers, width, heads, vocab, bigram_rows.

    A layer is a word of letters: p paired heads (record 58), v value embedding (14, 63), l long
    window with key offset (49), s its output is kept for k, k that skip instead of attention (9),
    b its output feeds the later layers' attention and is backed out at the end (40, 77), . none.
    """
    kinds = c.layers.split()
    D, H, V, R, F, L = c.width, c.heads, c.vocab, c.bigram_rows, 4 * c.width, len(kinds)
    A = sum("k" not in kind for kind in kinds)
    E = sum("v" in kind for kind in kinds)
    bank = uniform(3**0.5 * 0.5 * D**-0.5)  # also for V and O: record 64
    fast, slow, even = (0.9, 0.95), (0.9, 0.99), (0.75, 0.95)
    words = Param((V, D), ("vocab", "embed"), normal(0.005), "adam", wd=150, betas=(0.5, 0.95))
    return {
        "qkv": Param((A, 3, D, D), (None, None, "heads", "embed"), bank, "muon"),
        "out": Param((A, D, D), (None, "embed", "heads"), bank, "muon"),
        "up": Param((L, F, D), (None, "ffn", "embed"), bank, "muon", lr=2),
        "down": Param((L, F, D), (None, "ffn", "embed"), const(0), "muon", lr=4),
        "head": words,
        "embed": words,
        "value": Param(
            (V, E, D), ("table", None, "heads"), normal(0.01), "adam", 75, wd=5, betas=even
        ),
        "bigram": Param((R, D), ("vocab", "embed"), const(0), "adam", 75, wd=5, betas=even),
        "attn_gate": Param((A, H, G), (None, "heads", None), const(0), "adam", wd=1, betas=slow),
        "value_gate": Param((E, H, G), (None, "heads", None), const(0), "adam", wd=1, betas=slow),
        "smear_gate": Param((1, G), (None, None), const(0), "adam", 0.01, betas=slow),
        "skip_gate": Param((1, G), (None, None), const(0), "adam", 0.05, betas=slow),
        "qkv_scale": Param((L,), (None,), const(0.5), "adam", 5, betas=slow),
        "out_scale": Param((L,), (None,), const(1), "adam", 5, betas=slow),
        "smear": Param((), (), const(0), "adam", 5, betas=slow),
        "backout": Param((), (), const(0.5), "adam", 5, betas=slow),
        "skip": Param((), (), const(-1.5), "adam", 5, betas=slow),
        "resid": Param((L, 2), (None, None), const(1.1**0.5), "adam", 5, betas=fast),
        "post": Param((L, 2), (None, None), const(1), "adam", betas=fast),
        "x0_inject": Param((L,), (None,), const(0), "adam", betas=fast),
        "bigram_inject": Param((L,), (None,), const(0.05), "adam", betas=fast),
    }


def normal(std):
    return lambda key, shape: std * jax.random.normal(key, shape)


def uniform(bound):
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def const(value):
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def init(table: dict[str, Param], key) -> dict[str, jax.Array]:
    """Start values, float32. The head starts as the embedding, with which it is tied (record 51)."""
    keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in table}
    params = {name: p.init(keys[name], p.shape) for name, p in table.items()}
    return params | {"embed": params["head"]}


def use(table: dict[str, Param], params, dtype):
    """The weights as the forward pass wants them: gathered, in `dtype` but for the small ones."""
    return {
        name: gather(w.astype(dtype) if any(table[name].axes) else w, table[name].axes)
        for name, w in params.items()
    }


class View(NamedTuple):
    """What a stage of training sets in the network."""

    short: int  # windows in tokens: a token sees itself and so many before it
    long: int
    freqs: np.ndarray  # (K/2,) rotary frequencies, the second half of them 0 (record 17)
    scale: float  # of the attention logits


def yarn(K: int, longs) -> tuple[np.ndarray, float]:
    """Frequencies and scale after the long window went through `longs` tokens (record 31)."""
    freqs, scale = (1 / 1024) ** np.linspace(0, 1, K // 4, dtype=np.float32), 0.1
    for old, new in itertools.pairwise(longs):
        keep = np.clip((old * freqs / (2 * np.pi) - 1) / 31, 0, 1)
        freqs = freqs * (old / new + keep * (1 - old / new))
        scale *= 0.2 * math.log(new / old) + 1
    return np.concatenate([freqs, np.zeros(K // 4, np.float32)]).astype(np.float32), scale


def norm(x):
    """RMSNorm without weights, in float32."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * lax.rsqrt(square + 1.1920929e-07)).astype(x.dtype)


def shift(x):
    """x at the token before (axis 1); the first token keeps its own."""
    return jnp.concatenate([x[:, :1], x[:, :-1]], 1)


def rotary(x_BTHK, theta):
    """Rotates the two halves of each head by theta (T, 1 or H, K/2)."""
    a, b = jnp.split(x_BTHK, 2, -1)
    cos, sin = jnp.cos(theta).astype(x_BTHK.dtype), jnp.sin(theta).astype(x_BTHK.dtype)
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], -1)


def bigram_hash(tokens_BT, R: int):
    """Row of the bigram table for each token and the one before it (record 62)."""
    before = jnp.concatenate([jnp.full_like(tokens_BT[:, :1], R - 1), tokens_BT[:, :-1]], 1)
    before = before.at[:, 1].set(R - 1)  # the record overwrites the first token, then reads it
    return (((36313 * tokens_BT) ^ (27191 * before)) % (R - 1)).at[:, 0].set(R - 1)


def lookup(table, ids):
    """Rows of a table that is split by rows over `tensor`."""
    index, parts = part("vocab")
    if parts == 1:
        return table[ids]
    ids = ids - index * len(table)
    here = (ids >= 0) & (ids < len(table))
    return leave(jnp.where(here[..., None], table[jnp.clip(ids, 0, len(table) - 1)], 0))


def attend(q, k, v, doc, window: int, scale: float):
    """Softmax attention of (B, T, H, K) to the same document, `window` tokens back, never ahead.

    A block of queries sees its own and the few blocks before it, so memory grows with T x window.
    """
    B, T, H, K = q.shape
    block = math.gcd(T, 1 << max(5, min(9, (window // 2).bit_length())))
    back = -(-window // block)
    span = (back + 1) * block

    def banded(x, fill):  # (B, T, ...) -> (B, T/block, span, ...)
        x = jnp.pad(x, [(0, 0), (back * block, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        blocks = x.reshape(B, -1, block, *x.shape[2:])
        n = T // block
        return jnp.concatenate([blocks[:, j : j + n] for j in range(back + 1)], 2)

    @jax.checkpoint
    def one(args):  # a block of queries: (block, H, K), (span, H, K), (block,), (span,)
        q, k, v, doc_q, doc_k = args
        ahead = back * block + jnp.arange(block)[:, None] - jnp.arange(span)
        seen = (ahead >= 0) & (ahead <= window) & (doc_q[:, None] == doc_k)
        logits = scale * jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(seen, logits, -1e30), -1).astype(v.dtype)
        return jnp.einsum("hqk,khd->qhd", p, v)

    q, doc_q = q.reshape(B, -1, block, H, K), doc.reshape(B, -1, block)
    args = (q, banded(k, 0), banded(v, 0), doc_q, banded(doc, -1))
    args = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), args)
    at_once = max(1, 2**26 // (H * block * span))
    return lax.map(one, args, batch_size=at_once).reshape(B, T, H, K)


def attention(y, ve, w, kind: str, view: View, doc):
    """Attention of the normed stream y_BTD, with this layer's weights w; ve (B, T, E D) or None."""
    B, T, D = y.shape
    y, K = enter(y), 2 * len(view.freqs)
    qkv = (enter(w["qkv_scale"]) * w["qkv"]).astype(y.dtype)
    q, k, v = (z.reshape(B, T, -1, K) for z in jnp.split(y @ qkv.reshape(-1, D).T, 3, -1))
    q, k = norm(q), norm(k)  # QK norm
    if "v" in kind:
        index, parts = part("heads")
        first = ve[..., : G // 2]  # of all heads, so the first device's
        if parts > 1:
            first = total(jnp.where(index == 0, first, 0), "heads")
        seen = y[..., :G] if "p" in kind else jnp.concatenate([y[..., : G // 2], first], -1)
        gate = 2 * jax.nn.sigmoid(seen @ w["value_gate"].T)
        v = v + gate[..., None] * ve.reshape(v.shape)
    window = view.long if "l" in kind else view.short
    time = jnp.arange(T, dtype=jnp.float32)[:, None, None]
    if "p" in kind:  # head h and h + H/2 see each other's keys: one row of 2T, half the heads
        q, k, v = (whole(z, "heads", 2) for z in (q, k, v))  # as pairs cross the devices' parts
        H = q.shape[2]
        theta = (2 * time + jnp.arange(H)[:, None] % 2) * view.freqs
        pairs = [z.reshape(B, 2 * T, H // 2, K) for z in (rotary(q, theta), rotary(k, theta), v)]
        o = attend(*pairs, jnp.repeat(doc, 2, 1), window, view.scale).reshape(B, T, H, K)
        o = own(o, "heads", 2)
    else:
        q, k = (rotary(z, time * view.freqs) for z in (q, k))
        if "l" in kind:  # the dims that do not rotate look one token back (record 49)
            k = jnp.where(np.tile(view.freqs == 0, 2), shift(k), k)
        o = attend(q, k, v, doc, window, view.scale)
    o = o * jax.nn.sigmoid(y[..., :G] @ w["attn_gate"].T)[..., None]
    out = (enter(w["out_scale"]) * w["out"]).astype(y.dtype)
    return leave(o.reshape(B, T, -1) @ out.T)


def mlp(x, w):
    """ReLU^2 (arXiv:2109.08668) of the normed stream."""
    return leave(jnp.square(jax.nn.relu(enter(x) @ w["up"].T)) @ w["down"])


def mix(*terms):
    """Sum of scalar * array, in float32, rounded once."""
    return sum(scalar * x for scalar, x in terms).astype(terms[0][1].dtype)


def features(w, tokens_BT, c, view: View):
    """Tokens to the normed stream (B, T, D) before the head; w from `use`."""
    doc = jnp.cumsum(tokens_BT == c.bos, 1)
    banks = {name: [x[0] for x in lax.split(w[name], (1,) * len(w[name]))] for name in BANKS}
    E = len(w["value_gate"])
    x = lookup(w["embed"], tokens_BT)
    bigram = lookup(w["bigram"], bigram_hash(tokens_BT, c.bigram_rows))
    values = jnp.split(w["value"].reshape(len(w["value"]), -1)[tokens_BT], E, -1)
    gate = jax.nn.sigmoid(x[..., :G] @ w["smear_gate"].T).at[:, 0].set(0)
    x = x0 = norm(mix((1, x), (w["smear"] * gate, shift(x))))
    x = mix((1, x), (w["bigram_inject"][0], bigram))
    x_skip = x_back = None
    for i, kind in enumerate(c.layers.split()):
        if "k" in kind:
            gate = jax.nn.sigmoid(w["skip"]) * 2 * jax.nn.sigmoid(x0[..., :G] @ w["skip_gate"].T)
            x = mix((1, x), (gate, x_skip))
        else:
            layer = {name: banks[name].pop(0) for name in ("qkv", "out", "attn_gate")}
            layer |= {name: w[name][i] for name in ("qkv_scale", "out_scale")}
            if "v" in kind:
                layer["value_gate"] = banks["value_gate"].pop(0)
            ve = values.pop(0) if "v" in kind else None
            y = attention(norm(x if x_back is None else x_back), ve, layer, kind, view, doc)
            inject = [(w["x0_inject"][i], x0), (w["bigram_inject"][i], bigram)]
            x = mix((w["resid"][i, 0], x), (w["post"][i, 0], y), *inject[: 2 if i else 1])
        y = mlp(norm(x), {name: banks[name][i] for name in ("up", "down")})
        x = mix((w["resid"][i, 1], x), (w["post"][i, 1], y))
        x_skip = x if "s" in kind else x_skip
        x_back = x if "b" in kind else x_back
    return norm(mix((1, x), (-w["backout"], x_back)))


BANKS = ("qkv", "out", "up", "down", "attn_gate", "value_gate")


def head_chunk(x, head, targets, weights):
    """Cross entropy summed over a chunk, and the gradient of the logits.

    x (N, D), head (V, D), targets (N, M) with -1 for none, weights (M,).
    """
    logits = (x @ head.T).astype(jnp.float32)
    s = jax.nn.sigmoid((logits + 5) / 7.5)
    z = 23 * s  # softcap (records 18, 54): below 23, so exp needs no maximum taken off
    e = jnp.exp(z)
    lse = jnp.log(total(e.sum(-1), "vocab"))
    index, _ = part("vocab")
    here = targets[:, None] - index * len(head) == jnp.arange(len(head))[:, None]  # (N, V, M)
    weight = jnp.where(targets >= 0, weights, 0)  # (N, M)
    hit = (here * weight[:, None]).sum(-1)
    loss = (weight.sum(-1) * lse).sum() - total((hit * z).sum(), "vocab")
    dz = (weight.sum(-1) / jnp.exp(lse))[:, None] * e - hit
    return loss, (dz * (23 / 7.5) * s * (1 - s)).astype(x.dtype)


@jax.custom_vjp
def head_loss(x, head, targets, weights):
    """Summed multi-token cross entropy (record 53), never holding all the logits.

    x (N, D), head (V, D), targets (N, M), weights (M,). In training each chunk's gradient is taken
    as its logits are there, so they are computed once.
    """
    return scan_chunks(x, head, targets, weights, False)[0]


def scan_chunks(x, head, targets, weights, grad: bool):
    def step(carry, args):
        x, targets = args
        loss, dlogits = head_chunk(x, head, targets, weights)
        if not grad:
            return (carry[0] + loss, carry[1]), None
        dhead = jnp.einsum("nv,nd->vd", dlogits, x, preferred_element_type=jnp.float32)
        return (carry[0] + loss, carry[1] + dhead), dlogits @ head

    n = math.gcd(len(x), 1 << (2**27 // len(head)).bit_length())
    chunks = [z.reshape(-1, n, *z.shape[1:]) for z in (x, targets)]
    zero = jnp.zeros(head.shape if grad else (), jnp.float32)
    (loss, dhead), dx = lax.scan(step, (jnp.zeros(()), zero), chunks)
    return loss, dx.reshape(x.shape) if grad else None, dhead.astype(head.dtype)


def head_loss_forward(x, head, targets, weights):
    loss, *gradients = scan_chunks(x, head, targets, weights, True)
    return loss, gradients


def head_loss_backward(gradients, g):
    dx, dhead = gradients
    return (g * dx).astype(dx.dtype), (g * dhead).astype(dhead.dtype), None, None


head_loss.defvjp(head_loss_forward, head_loss_backward)


def loss(w, rows, c, view: View, weights):
    """Sum over rows (B, T + 1) of the cross entropy of the next len(weights) tokens, each weighed.

    Targets beyond the row are dropped; those in the next document count, as in the record.
    """
    tokens, M = rows.astype(jnp.int32), len(weights)
    ahead = jnp.pad(tokens[:, 1:], ((0, 0), (0, M - 1)), constant_values=-1)
    T = tokens.shape[1] - 1
    targets = jnp.stack([ahead[:, k : k + T] for k in range(M)], -1)
    x = features(w, tokens[:, :-1], c, view)
    return head_loss(enter(x).reshape(-1, c.width), w["head"], targets.reshape(-1, M), weights)
