"""The network of record #77: the table of its parameters, and from tokens to loss and text.
B batch rows  T row tokens  D width  H heads  K head size  F ffn (4 D)  V vocabulary  R bigram rows
L layers  A attention layers  E value embeddings  G gate inputs  P heads in one sequence"""

import math
import zlib
from collections import namedtuple
from functools import cache, partial

import jax
import numpy as np
from jax import lax, numpy as jnp
from jax.nn.initializers import constant, normal

import sharding

G = 12  # gates read the first dims of the stream (record 28)
# A weight; lr and wd: factors of learning rate and decay, betas: Adam's (none: Muon's, matrices).
Param = namedtuple("Param", "shape axes init lr wd betas bits", defaults=(1, (), 23))  # mantissa
rounded = lambda x, row: lax.reduce_precision(x, 8, row.bits)  # 7: as bf16, which the record keeps
# Of a stage: windows in tokens back, rotary frequencies, scale of logits; attention and device.
View = namedtuple("View", "short long freqs scale attend chip", defaults=("",))  # "tpu TPU v4"


def param_table(c) -> dict:
    """name -> Param. A layer is a word of letters: p paired heads (record 58), v value embedding
    (14, 63), l long window with key offset (49), s its output is kept for k, k that skip instead of
    attention (45), b feeds all later attention and is backed out at the end (40, 77), o nothing."""
    kinds = c.layers.split(",")
    D, H, V, R, F, L = c.width, c.heads, c.vocab, c.bigram_rows, 4 * c.width, len(kinds)
    A, E = (max(1, n) for n in (sum("k" not in x for x in kinds), sum("v" in x for x in kinds)))
    bank = lambda *args: 3**0.5 * 0.5 * D**-0.5 * jax.random.uniform(*args, minval=-1.0)
    quick, slow, words, tables = (0.9, 0.95), (0.9, 0.99), (0.5, 0.95), (0.75, 0.95)
    values, bits = [f"value{i}" for i in range(E)], 23 if c.float32 else 7
    return {
        "qkv": Param((A, 3, D, D), (None, None, "heads", "embed"), bank, 1),
        "out": Param((A, D, D), (None, "embed", "heads"), bank, 1),  # as V, not zero: record 64
        "up": Param((L, F, D), (None, "ffn", "embed"), bank, 2),
        "down": Param((L, F, D), (None, "ffn", "embed"), constant(0), 4),
        "head": Param((V, D), ("vocab", "embed"), normal(0.005), 1, 150, words, bits),
        "embed": Param((V, D), (None, "table"), normal(0.005), 1, 150, words, bits),
        **dict.fromkeys(values, Param((V, D), (None, "table"), normal(0.01), 75, 5, tables, bits)),
        "bigram": Param((R, D), (None, "table"), constant(0), 75, 5, tables, bits),
        "attn_gate": Param((A, H, G), (None, "heads", None), constant(0), 1, 1, slow, bits),
        "value_gate": Param((E, H, G), (None, "heads", None), constant(0), 1, 1, slow, bits),
        "smear_gate": Param((1, G), (None, None), constant(0), 0.01, 0, slow, bits),
        "skip_gate": Param((1, G), (None, None), constant(0), 0.05, 0, slow, bits),
        "qkv_scale": Param((L,), (None,), constant(0.5), 5, 0, slow),
        "out_scale": Param((L,), (None,), constant(1), 5, 0, slow),
        "smear": Param((), (), constant(0), 5, 0, slow),
        "backout": Param((), (), constant(0.5), 5, 0, slow),
        "skip": Param((), (), constant(-1.5), 5, 0, slow),
        "resid": Param((L, 2), (None, None), constant(1.1**0.5), 5, 0, quick),
        "post": Param((L, 2), (None, None), constant(1), 1, 0, quick),
        "x0_inject": Param((L,), (None,), constant(0), 1, 0, quick),
        "bigram_inject": Param((L,), (None,), constant(0.05), 1, 0, quick),
    }


def init(table: dict, key) -> dict:
    """Start values, float32; the embedding is the head, with which it is tied (record 51)."""
    seed = lambda name: jax.random.fold_in(key, zlib.crc32(name.encode()))
    params = {n: rounded(row.init(seed(n), row.shape), row) for n, row in table.items()}
    return params | {"embed": params["head"]}


def yarn(K: int, longs) -> tuple[np.ndarray, float]:
    """Frequencies (K/2,), half of them 0 (record 17), and scale, behind windows `longs` (31)."""
    freqs, scale = (1 / 1024) ** np.linspace(0, 1, K // 4, dtype=np.float32), 0.1
    for old, new in zip(longs, longs[1:]):
        freqs = freqs * np.interp(old * freqs / (2 * np.pi), [1, 32], [old / new, 1])
        scale *= 0.2 * math.log(new / old) + 1
    return np.concatenate([freqs, np.zeros(K // 4)]).astype(np.float32), scale


rrms = lambda x: lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True) + 2**-23)
norm = lambda x: (x * rrms(x)).astype(x.dtype)  # RMSNorm, without weights
# mix: sum of scalar * array in float32, rounded once; shift: x (..., T, D) of the token before.
mix = lambda *terms: sum(a * x.astype(jnp.float32) for a, x in terms).astype(terms[0][1].dtype)
shift = lambda x: jnp.pad(x[..., :-1, :], [(0, 0)] * (x.ndim - 2) + [(1, 0), (0, 0)], "edge")
# On a TPU the product with 1 lays x (..., D) out for what follows, faster than the copies of XLA.
laid = lambda x, tpu: lax.optimization_barrier(x) @ np.eye(x.shape[-1], dtype=x.dtype) if tpu else x


def rotary(x, theta, odd, view):
    """Heads (B, H, T, K), their halves turned by theta[0] (T, K/2), where odd (H,) by theta[-1]."""
    half, eye = x.shape[-1] // 2, np.eye(x.shape[-1], dtype=x.dtype)
    other = x @ np.roll(eye, half, 0) if "tpu" in view.chip else jnp.roll(x, half, -1)  # see lookup
    cos, sin = jnp.tile(jnp.cos(theta), 2), jnp.concatenate([jnp.sin(theta), -jnp.sin(theta)], -1)
    cos, sin = (jnp.where(odd[:, None, None], t[-1], t[0]).astype(x.dtype) for t in (cos, sin))
    return mix((cos, x), (sin, other))  # whose factors are bf16 in the record, too


def bigram_hash(tokens_BT, R: int):
    """Row of the bigram table for a token and the one before it, int32 (record 62)."""
    before = jnp.roll(tokens_BT, 1, 1).at[:, :2].set(R - 1)  # 1 too: the record has overwritten 0
    return ((36313 * tokens_BT ^ 27191 * before) % (R - 1)).at[:, 0].set(R - 1)


def attend(q, k, v, doc, window: int, P: int):
    """Attention of heads (B, H, T, K) to the same document (B, T), `window` tokens back, not ahead.
    P heads are one of P T tokens: its token t P + p is token t of the p-th."""
    (B, _, T, K), N = q.shape, P * q.shape[2]
    block = math.gcd(N, 1 << max(5, min(9, (window // 2).bit_length())))
    back = min(-(-window // block), N // block - 1)
    span = (back + 1) * block  # what a block of queries sees: memory grows with N x window
    cut = lambda x: x.reshape(B, -1, block, x.shape[2])  # (B, N, K) -> (B, N / block, block, K)
    slide = lambda x: jnp.concatenate([x[:, j : j + N // block] for j in range(back + 1)], 2)
    band = lambda x: slide(jnp.pad(cut(x), [(0, 0), (back, 0), (0, 0), (0, 0)], constant_values=-1))
    away = back * block + np.subtract.outer(range(block), range(span))
    doc = jnp.repeat(doc, P, 1)[..., None]  # none is -1
    seen = (away >= 0) & (away <= window) & (cut(doc) == band(doc).mT)  # (B, N/block, block, span)

    @jax.checkpoint
    def head(qkv):  # (B, T, P, K) each
        q, k, v = (f(x.reshape(B, N, K)) for f, x in zip((cut, band, band), qkv))
        logits = jnp.einsum("bnqk,bnsk->bnqs", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(seen, logits, -1e30)).astype(v.dtype)
        return jnp.einsum("bnqs,bnsk->bnqk", p, v).reshape(B, N, K)

    qkv = [x.reshape(B, -1, P, T, K).transpose(1, 0, 3, 2, 4) for x in (q, k, v)]
    o = lax.map(head, qkv, batch_size=max(1, 2**27 // (B * N * span)))
    return o.reshape(-1, B, T, P, K).transpose(1, 0, 3, 2, 4).reshape(q.shape)


@cache
def splash_kernel(H: int, T: int, window: int, P: int):
    """A TPU's kernel of `attend`: P heads of T tokens stay one behind the other."""
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    class Band(tpu.Mask):
        shape, block = (P * T, P * T), P * np.arange(math.gcd(T, 512))

        def __getitem__(self, cuts):  # blocks of it, millions for long rows
            q, k = (P * (s.start % T) + s.start // T for s in cuts)
            if not -self.block[-1] <= q - k <= window + self.block[-1]:
                return np.zeros((1, 1), bool)  # nothing is seen, so that its shape is not read
            away = q - k + np.subtract.outer(self.block, self.block)
            return (away >= 0) & (away <= window)

    sizes = tpu.BlockSizes(*[len(Band.block)] * 8)  # of queries and keys, forward and backward
    with jax.ensure_compile_time_eval():
        run = tpu.make_splash_mha_single_device(tpu.MultiHeadMask([Band()] * H), block_sizes=sizes)
    every = jax.vmap(lambda q, k, v, doc: run(q, k, v, tpu.SegmentIds(doc, doc)))
    once = lambda x: lax.optimization_barrier(x) if x.dtype == jnp.float32 else x
    same = jax.custom_vjp(every)  # whose log sum exp XLA would lay out twice: for dq, for dk and dv
    same.defvjp(lambda *x: jax.tree.map(once, jax.vjp(every, *x)), lambda pull, g: pull(g))
    return same


def splash(q, k, v, doc, window: int, P: int):
    """What `attend` computes, on a TPU, where its kernel takes the sizes."""
    (B, H, T, K), eye = q.shape, np.eye(q.shape[3], dtype=q.dtype)  # see laid
    if T % 128 or K % 128:
        return attend(q, k, v, doc, window, P)
    rows = (lax.optimization_barrier(x @ eye).reshape(B, -1, P * T, K) for x in (q, k, v))
    o = lax.optimization_barrier(splash_kernel(H // P, T, window, P)(*rows, jnp.tile(doc, P)))
    return laid(o.reshape(q.shape), True)  # two barriers: 2% fewer cycles on a v6e (predicted)


def cudnn(q, k, v, doc, window: int, P: int):
    """What `attend` computes, on a GPU, in bf16. The library's kernel knows no documents: 16 more
    dims of q and k have the bits of their number, so that logits of others are lower by 128."""
    B, _, T, K, W = *q.shape, q.shape[3] + 16
    bits = jnp.where(doc[:, None, :, None] >> np.arange(16) & 1, jnp.full_like(q[..., :16], 8), -8)
    xs = (jnp.concatenate(both, -1) for both in ((q, bits), (k, bits), (v, 0 * bits)))
    xs = (x.reshape(B, -1, P, T, W).transpose(0, 3, 2, 1, 4).reshape(B, P * T, -1, W) for x in xs)
    sees = {"is_causal": True, "local_window_size": (window, 0), "implementation": "cudnn"}
    o = jax.nn.dot_product_attention(*xs, scale=1.0, **sees)[..., :K]
    return o.reshape(B, T, P, -1, K).transpose(0, 3, 2, 1, 4).reshape(q.shape)


def trusted(fast, K: int, dtype):
    """Whether the gradients of `fast` on this device are those of `attend`; and why, a text."""
    x, doc = jax.random.normal(jax.random.key(0), (3, 2, 4, 512, K)), jnp.arange(1024) // 300 * 9999
    total = lambda x, f: jnp.square(f(x[0] / 9, *x[1:], doc.reshape(2, 512), window=99, P=2)).sum()
    gradients = jax.jit(jax.grad(total), static_argnums=1)
    try:
        want, got = gradients(x, attend), gradients(x.astype(dtype), fast)
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    except Exception as reason:  # whatever the library, its version or the GPU lack
        return False, f", {fast.__name__} fails: {reason!r:.80}"
    return error < 0.02, f", {fast.__name__} is off by {error:.4f}"


def attention(x, r, w, kind: str, view, doc):
    """Attention of the stream x (B, T, D), r its rrms (B, T, 1), w a layer's weights and ve."""
    (B, T, D), K, P = x.shape, 2 * len(view.freqs), 1 + ("p" in kind)
    qkv = (w["qkv_scale"] * w["qkv"]).astype(x.dtype).reshape(3, -1, K, D)
    heads = partial(jnp.einsum, "btd,...hkd->...bhtk", x)  # T, K: a TPU's tiles
    q, k, v = heads(qkv) if "gpu" in view.chip else map(heads, qkv)  # a TPU would copy, 12% more
    gate = lambda y, n: lax.logistic(jnp.einsum("btg,hg->bht", y, w[n]))[..., None]  # float32
    y, v = mix((r, x[..., :G])), [(r[:, None], v)]  # of norm(x), as norm(x) @ w is r * (x @ w)
    if "v" in kind:
        by = y if P == 2 else jnp.concatenate([y[..., : G // 2], w["ve"][..., : G // 2]], -1)
        v += [(2 * gate(by, "value_gate"), w["ve"].reshape(B, T, -1, K).swapaxes(1, 2))]
    theta = (P * jnp.arange(T)[:, None] + jnp.arange(P)[:, None, None]) * view.freqs
    # In pairs the record turns odd heads one further; its pairs are h and h + H/2, ours neighbours.
    odd = np.arange(q.shape[1]).reshape(P, -1).T.ravel() % P if P == 2 else np.zeros(1)
    q, k = (rotary(mix((by * rrms(x), x)), theta, odd, view) for x, by in ((q, view.scale), (k, 1)))
    still = np.tile(view.freqs == 0, 2)  # dims that do not turn look one token back (record 49)
    k, window = (jnp.where(still, shift(k), k), view.long) if "l" in kind else (k, view.short)
    o = mix((gate(y, "attn_gate"), view.attend(q, k, mix(*v), doc, window, P)))
    out = (w["post"] * w["out_scale"] * w["out"]).astype(x.dtype).reshape(D, -1, K)
    return jnp.einsum("bhtk,dhk->btd", o, out)


def features(w, tokens_BT, c, view):
    """Tokens to the normed stream (B, T, D) before the head; w from `use`."""
    doc = jnp.cumsum(tokens_BT == c.bos, 1)
    banks = ("qkv", "out", "attn_gate", "value_gate", "up", "down", "qkv_scale", "out_scale")
    each = {name: iter(lax.split(w[name], (1,) * len(w[name]))) for name in banks}
    take = lambda *names: {name: next(each[name])[0] for name in names}
    get = partial(sharding.lookup, dtype=w["head"].dtype, tpu="tpu" in view.chip)
    x, bigram = get(w["embed"], tokens_BT), get(w["bigram"], bigram_hash(tokens_BT, c.bigram_rows))
    values = (get(w[f"value{i}"], tokens_BT) for i in range(len(w["value_gate"])))
    gate = jax.nn.sigmoid(x[..., :G] @ w["smear_gate"].T).at[:, 0].set(0)
    x = x0 = norm(mix((1, x), (w["smear"] * gate, shift(x))))
    x = mix((1, x), (w["bigram_inject"][0], bigram))
    kept = {"s": x}  # by letter, what the last layer with it gave
    remat = jax.checkpoint if "v5 lite" in view.chip and tokens_BT.size > 2**14 else lambda f: f
    for i, kind in enumerate(c.layers.split(",")):
        layer = take("qkv_scale", "out_scale", "up", "down")
        if "k" in kind:
            gate = jax.nn.sigmoid(w["skip"]) * 2 * jax.nn.sigmoid(x0[..., :G] @ w["skip_gate"].T)
            x = mix((1, x), (gate, kept["s"]))
        else:
            layer |= take("qkv", "out", "attn_gate") | {"post": w["post"][i, 0]}
            layer |= take("value_gate") | {"ve": next(values)} if "v" in kind else {}
            y = kept.get("b", x)
            y = remat(partial(attention, kind=kind, view=view, doc=doc))(y, rrms(y), layer)
            inject = [(w["x0_inject"][i], x0), (w["bigram_inject"][i], bigram)]
            x = mix((w["resid"][i, 0], x), (1, y), *inject[: 2 if i else 1])  # bigram 0 is above
        h = jnp.square(jax.nn.relu(mix((rrms(x), x @ layer["up"].T))))  # ReLU^2, arXiv:2109.08668
        x = mix((w["resid"][i, 1], x), (1, h @ (w["post"][i, 1] * layer["down"]).astype(h.dtype)))
        kept |= dict.fromkeys(kind, x)
    x = mix((1, x), (-w["backout"], kept["b"])) if "b" in kept else x
    return lax.optimization_barrier(laid(norm(x), "tpu" in view.chip))  # else v5e sums layers twice


# The logits are 23 sigmoid((x + 5) / 7.5) (records 18, 54) = 11.5 + 11.5 cap(x).
cap = lambda x, b=0: jnp.tanh((x.astype(jnp.float32) + 5 - 15 * b) / 15 + b)  # b cancels
e4m3 = lambda x: x.clip(-448, 448).astype(jnp.float8_e4m3fn)  # record 19; what is larger is NaN


def lse_and_grads(x, head, m, fp8, chip):
    """Sum of m log sum exp 11.5 cap(logits), x (B, T, D), head (V, D) float32, m (B, T, 1); and its
    gradients by x and head, so that the logits, GBs if not in chunks, are made but once."""
    n = math.gcd(x.shape[1], 1 << (2 ** (27 + ("v6" in chip)) // len(x) // len(head)).bit_length())
    w, mm = head.astype(x.dtype), partial(jnp.einsum, "bnd,vd->bnv", preferred_element_type=x.dtype)

    def chunk(sums, args):
        (total, dhead), (x, m) = sums, args  # x (B, n, D), m (B, n, 1)
        y, over = (mm(e4m3(4 * x), e4m3(256 * w)), 1024) if fp8 else (mm(x, w), 1)
        denom = jnp.exp(11.5 * cap(y / over, "gpu" in chip and 1 / 3)).sum(-1, keepdims=True)
        z = cap(y / over)  # without b: shared with the one above a GPU would store it, float32
        g, by = (jnp.exp(11.5 * z) * (1 - z * z)).astype(x.dtype), m * 11.5 / 15 / denom
        g, xs = lax.optimization_barrier((g, (by * x).astype(x.dtype)))  # g in denom's pass
        dhead += jnp.einsum("bnv,bnd->vd", g, xs, preferred_element_type=jnp.float32)
        return (total + (m * jnp.log(denom)).sum(), dhead), (by * (g @ w)).astype(x.dtype)

    chunks = [a.reshape(len(x), -1, n, a.shape[2]).swapaxes(0, 1) for a in (x, m)]
    (total, dhead), dx = lax.scan(chunk, (jnp.zeros(()), jnp.zeros_like(head)), chunks)
    return total, (dx.swapaxes(0, 1).reshape(x.shape), dhead)


lse = jax.custom_vjp(lambda *args: lse_and_grads(*args)[0], nondiff_argnums=(3, 4))
lse.defvjp(lse_and_grads, lambda _, __, gs, t: (*((t * g).astype(g.dtype) for g in gs), None))


def loss(w, rows, c, view, mtp, fp8=False):
    """Cross entropy of the next tokens by weights mtp (record 53), summed over rows (B, T + 1)."""
    tokens, T = rows.astype(jnp.int32), rows.shape[1] - 1  # targets cross documents (record 77)
    x, head = features(w, tokens[:, :-1], c, view), w["head"].astype(jnp.float32)
    m = [weight * (jnp.arange(T) < T - k)[:, None] for k, weight in enumerate(mtp)]
    total = lse(x, head, jnp.broadcast_to(sum(m), (*x.shape[:2], 1)), fp8, view.chip)
    for k in range(len(mtp)):  # rows of the float32 head, so that gradients add up in float32
        target = head[jnp.roll(tokens, -1 - k, 1)[:, :-1]].astype(x.dtype)
        logit = jnp.einsum("btd,btd->bt", x, target, preferred_element_type=jnp.float32)
        total -= (m[k] * 11.5 * cap(logit.astype(x.dtype))[..., None]).sum()
    return total
