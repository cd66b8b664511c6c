"""NorMuon and Adam of record #77, optax transformations of dicts; `table`: name -> Param."""

from jax import lax, numpy as jnp
from optax import GradientTransformationExtraArgs, Schedule, incremental_update

POLAR_EXPRESS = (  # arXiv:2505.16932, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
zeros = lambda table, params: {name: jnp.zeros_like(params[name]) for name in table}


def orthogonalize(x):
    """Nearly U V^T of matrices (..., rows, columns): U S V^T with S close to 1."""
    square = jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True)
    x, tall = (x / (1.02 * jnp.sqrt(square) + 1e-6)).astype(x.dtype), x.shape[-2] > x.shape[-1]
    dot = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)
    for a, b, c in jnp.float32(POLAR_EXPRESS):  # else the coefficients, too, would be bfloat16
        gram = x.mT @ x if tall else x @ x.mT
        poly = (b * gram + c * dot(gram, gram)).astype(x.dtype)
        x = (a * x + (dot(x, poly) if tall else dot(poly, x))).astype(x.dtype)
    return x


def normalize_rows(x, second, beta2: float = 0.95):
    """Rows over their running size `second` (..., rows, 1), the norm kept (arXiv:2510.05491)."""
    square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
    second = beta2 * second + (1 - beta2) * square
    scale = lax.rsqrt(jnp.maximum(second, 1e-10))
    before, after = square.sum(-2, keepdims=True), (square * scale**2).sum(-2, keepdims=True)
    return (x * scale * jnp.sqrt(before / jnp.maximum(after, 1e-20))).astype(x.dtype), second


def normuon(table: dict, rate: Schedule, momentum: Schedule, dtype, split=lambda f, *x: f(*x)):
    """NorMuon with cautious decay (records 41, 43); `split` applies f to stacks of matrices."""
    init = lambda p: {"momentum": zeros(table, p), "second": {n: 0 * p[n][..., :1] for n in table}}

    def update(grads, state, params, *, step, **_):
        lr, m, updates, average, second = rate(step), momentum(step), {}, {}, {}
        for name, row in table.items():
            p, g, v = params[name], grads[name], state["second"][name]
            average[name] = incremental_update(g, state["momentum"][name], 1 - m)
            nesterov = incremental_update(average[name], g, m).astype(dtype)
            u, second[name] = split(lambda x, v: normalize_rows(orthogonalize(x), v), nesterov, v)
            updates[name] = -row.lr * lr * (u + jnp.where(u * p >= 0, 1.2 * lr * p, 0))
        return updates, {"momentum": average, "second": second}

    return GradientTransformationExtraArgs(init, update)


def adam(table: dict, rate: Schedule):
    """Adam with cautious weight decay (record 50), at odd steps by the gradients of two."""
    init = lambda params: dict.fromkeys(("pending", "m", "v"), zeros(table, params))

    def update(grads, state, params, *, step, odd):
        if not odd:
            return {}, state | {"pending": {n: grads[n] for n in table}}
        updates, ms, vs = {}, {}, {}
        for n, row in table.items():  # eps after the bias correction, decay by the squared rate
            m, v, g, p = state["m"][n], state["v"][n], state["pending"][n] + grads[n], params[n]
            (b1, b2), t, lr = row.betas, step // 2 + 1, row.lr * rate(step)
            ms[n], vs[n] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            move = lr * jnp.sqrt(1 - b2**t) / (1 - b1**t) * ms[n] / (jnp.sqrt(vs[n]) + 1e-10)
            updates[n] = -move - jnp.where(move * p > 0, lr**2 * 0.005 * row.wd * p, 0)
        return updates, state | {"m": ms, "v": vs}

    return GradientTransformationExtraArgs(init, update)
