"""NorMuon and Adam as in record #77, as optax transformations, and the schedules they follow.

Parameters are a flat dict of arrays; per-parameter settings are dicts with the same names.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# arXiv:2505.16932 (Polar Express), 5 steps to the orthogonal factor
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(x):
    """U V^T of matrices (..., rows, columns), nearly: singular values end between 0.7 and 1.2."""
    tall = x.shape[-2] > x.shape[-1]
    square = jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True)
    x = (x / (1.02 * jnp.sqrt(square) + 1e-6)).astype(x.dtype)
    for a, b, c in POLAR_EXPRESS:
        xt = x.mT
        gram = xt @ x if tall else x @ xt
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


def normalize_rows(x, second, beta2: float):
    """NorMuon (arXiv:2510.05491): rows divided by their running size, the matrix's norm kept.

    x (..., rows, columns), second (..., rows, 1) float32; returns both anew.
    """
    square = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
    second = beta2 * second + (1 - beta2) * square
    scale = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    before = square.sum((-2, -1), keepdims=True)
    after = (square * scale**2).sum((-2, -1), keepdims=True)
    return (x * scale * jnp.sqrt(before / jnp.maximum(after, 1e-20))).astype(x.dtype), second


class NorMuonState(NamedTuple):
    count: jax.Array
    momentum: dict
    second: dict


def normuon(
    learning_rate: Callable,
    momentum: Callable,
    lr: dict[str, float],
    weight_decay: float = 1.2,
    beta2: float = 0.95,
    dtype=jnp.bfloat16,
    split: Callable = lambda x: x,
) -> optax.GradientTransformation:
    """NorMuon with cautious weight decay (record 43) for parameters of (..., rows, columns).

    `learning_rate` and `momentum` are functions of the step, `lr` multiplies the former. All
    matrices of one shape are orthogonalised at once, in `dtype`; `split` lays that stack
    (matrices, rows, columns) out over the devices, whole matrices each.
    """

    def init(params):
        second = {name: jnp.zeros((*p.shape[:-1], 1), jnp.float32) for name, p in params.items()}
        zeros = {name: jnp.zeros(p.shape, jnp.float32) for name, p in params.items()}
        return NorMuonState(jnp.zeros((), jnp.int32), zeros, second)

    def direction(grads, second):
        """Orthogonal, row-normalised matrices for a dict of gradients, a stack per shape."""
        shapes = {name: g.shape[-2:] for name, g in grads.items()}
        new = {}
        for shape in sorted(set(shapes.values())):
            names = [name for name in grads if shapes[name] == shape]
            stack = [grads[name].astype(dtype).reshape(-1, *shape) for name in names]
            rows = [second[name].reshape(-1, shape[0], 1) for name in names]
            x, v = split(jnp.concatenate(stack)), split(jnp.concatenate(rows))
            x, v = normalize_rows(orthogonalize(x), v, beta2)
            start = 0
            for name, part in zip(names, stack):
                own = slice(start, start + len(part))
                start += len(part)
                new[name] = x[own].reshape(grads[name].shape), v[own].reshape(second[name].shape)
        return new

    def update(grads, state, params):
        rate, m = learning_rate(state.count), momentum(state.count)
        average = optax.incremental_update(grads, state.momentum, 1 - m)
        nesterov = optax.incremental_update(average, grads, m)
        new = direction(nesterov, state.second)

        def step(p, x, lr):
            decay = jnp.where(x * p >= 0, weight_decay * rate * p, 0)
            return -lr * rate * (decay + x)

        updates = {name: step(params[name], new[name][0], lr[name]) for name in params}
        second = {name: v for name, (_, v) in new.items()}
        return updates, NorMuonState(state.count + 1, average, second)

    return optax.GradientTransformation(init, update)


class AdamState(NamedTuple):
    count: jax.Array
    pending: dict
    m: dict
    v: dict


def adam(
    learning_rate: Callable,
    lr: dict[str, float],
    betas: dict[str, tuple],
    wd: dict[str, float],
    weight_decay: float = 0.005,
    every: int = 2,
) -> optax.GradientTransformation:
    """Adam with cautious weight decay (record 50), on the sum of `every` steps' gradients (39).

    Its eps is outside the bias correction and its decay goes with the squared learning rate.
    """

    def init(params):
        zeros = {name: jnp.zeros(p.shape, jnp.float32) for name, p in params.items()}
        return AdamState(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

    def one(name, g, m, v, p, rate, t):
        b1, b2 = betas[name]
        rate = rate * lr[name]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t) * m / (jnp.sqrt(v) + 1e-10)
        decay = jnp.where(step * p > 0, rate**2 * weight_decay * wd[name] * p, 0)
        return -(step + decay), jnp.zeros_like(g), m, v

    def update(grads, state, params):
        count = state.count + 1
        pending = {name: state.pending[name] + g for name, g in grads.items()}

        def act(pending, m, v):
            rate, t = learning_rate(state.count), count // every
            new = {k: one(k, pending[k], m[k], v[k], params[k], rate, t) for k in pending}
            return tuple({k: four[i] for k, four in new.items()} for i in range(4))

        def wait(pending, m, v):
            return jax.tree.map(jnp.zeros_like, pending), pending, m, v

        now = count % every == 0
        updates, pending, m, v = jax.lax.cond(now, act, wait, pending, state.m, state.v)
        return updates, AdamState(count, pending, m, v)

    return optax.GradientTransformation(init, update)
