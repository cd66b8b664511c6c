"""NorMuon and Adam as in record #77, as optax transformations of a flat dict of arrays.

`rows` says per parameter what differs, as objects with `lr`, `wd` and `betas`; a transformation
updates the parameters it has rows for, and leaves the others out. Rates are functions of the step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

POLAR_EXPRESS = (  # arXiv:2505.16932, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(x):
    """Nearly U V^T of matrices (..., rows, columns): U S V^T with S close to 1."""
    square = jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True)
    x = (x / (1.02 * jnp.sqrt(square) + 1e-6)).astype(x.dtype)
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


def normalize_rows(x, second, beta2: float):
    """NorMuon (arXiv:2510.05491): rows over their running size, the matrix's norm kept.

    x (..., rows, columns), second (..., rows, 1) float32; returns both anew.
    """
    square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
    second = beta2 * second + (1 - beta2) * square
    scale = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    before, after = square.sum(-2, keepdims=True), (square * scale**2).sum(-2, keepdims=True)
    return (x * scale * jnp.sqrt(before / jnp.maximum(after, 1e-20))).astype(x.dtype), second


class NorMuonState(NamedTuple):
    count: jax.Array
    momentum: dict
    second: dict  # (..., rows, 1), running mean squares


def normuon(rows: dict, rate: Callable, momentum: Callable, dtype=jnp.bfloat16, split=lambda x: x):
    """NorMuon with cautious weight decay (records 41, 43) for parameters (..., rows, columns).

    All matrices of one shape are orthogonalised at once, in `dtype`; `split` lays their stack
    (matrices, rows, columns) out over the devices.
    """

    def init(params):
        zeros = {name: jnp.zeros(params[name].shape, jnp.float32) for name in rows}
        second = {name: z[..., :1] for name, z in zeros.items()}
        return NorMuonState(jnp.zeros((), jnp.int32), zeros, second)

    def update(grads, state, params):
        grads = {name: grads[name] for name in rows}
        lr, m, new, second = rate(state.count), momentum(state.count), {}, {}
        average = optax.incremental_update(grads, state.momentum, 1 - m)
        nesterov = optax.incremental_update(average, grads, m)
        for shape in sorted({g.shape[-2:] for g in grads.values()}):
            names = [name for name in rows if grads[name].shape[-2:] == shape]
            xs = [nesterov[name].astype(dtype).reshape(-1, *shape) for name in names]
            vs = [state.second[name].reshape(-1, shape[0], 1) for name in names]
            x, v = orthogonalize(split(jnp.concatenate(xs))), split(jnp.concatenate(vs))
            x, v = normalize_rows(x, v, beta2=0.95)
            for name, count in zip(names, map(len, xs)):
                new[name] = x[:count].reshape(grads[name].shape)
                second[name] = v[:count].reshape(state.second[name].shape)
                x, v = x[count:], v[count:]

        def step(p, x, mul):
            return -mul * lr * (x + jnp.where(x * p >= 0, 1.2 * lr * p, 0))

        updates = {name: step(params[name], new[name], row.lr) for name, row in rows.items()}
        return updates, NorMuonState(state.count + 1, average, second)

    return optax.GradientTransformation(init, update)


class AdamState(NamedTuple):
    count: jax.Array
    pending: dict  # the even steps' gradients
    m: dict
    v: dict


def adam(rows: dict, rate: Callable):
    """Adam with cautious weight decay (record 50), every second step, on the summed gradient (39).

    Its eps is outside the bias correction and its decay goes with the squared learning rate.
    """

    def init(params):
        zeros = {name: jnp.zeros(params[name].shape, jnp.float32) for name in rows}
        return AdamState(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

    def update(grads, state, params):
        count = state.count + 1
        pending = {name: state.pending[name] + grads[name] for name in rows}

        def act(pending, m, v):
            new = {}
            for name, row in rows.items():
                (b1, b2), p, g, t = row.betas, params[name], pending[name], count // 2
                lr = row.lr * rate(state.count)
                a, b = b1 * m[name] + (1 - b1) * g, b2 * v[name] + (1 - b2) * g * g
                step = lr * jnp.sqrt(1 - b2**t) / (1 - b1**t) * a / (jnp.sqrt(b) + 1e-10)
                step += jnp.where(step * p > 0, lr**2 * 0.005 * row.wd * p, 0)
                new[name] = -step, jnp.zeros_like(g), a, b
            return tuple({name: four[i] for name, four in new.items()} for i in range(4))

        def wait(pending, m, v):
            return jax.tree.map(jnp.zeros_like, pending), pending, m, v

        new = jax.lax.cond(count % 2 == 0, act, wait, pending, state.m, state.v)
        return new[0], AdamState(count, *new[1:])

    return optax.GradientTransformation(init, update)
