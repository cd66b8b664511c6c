"""`speedrun` at all 1490 steps against numbers of record #77's own schedule, which the parity run,
at a reduced size and in 14 steps, cannot show. Its classes were run for them, step by step."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muon
import sharding
import train_gpt

RECORD = np.load(Path(__file__).parent / "data" / "schedule.npz")
C = train_gpt.Config()
STEPS = np.arange(C.steps)
close = lambda a, b, tol=1e-5: np.testing.assert_allclose(a, b, rtol=tol)


@pytest.fixture(scope="module")
def program():
    """The program of `speedrun`, and with what its optimizers were made."""
    made, rules = {}, (muon.adam, muon.normuon)
    with pytest.MonkeyPatch.context() as patch:
        for rule in rules:
            keep = lambda *args, rule=rule: made.update({rule.__name__: args}) or rule(*args)
            patch.setattr(muon, rule.__name__, keep)
        return train_gpt.program(C, sharding.make_mesh("fsdp:1")), made


def size_and_decay(rule, rows, state, steps):
    """How far a rule moves weights at each step for a move of one, and by weight decay."""
    ones = {name: jnp.ones((1, 1)) for name in rows}
    weights = jax.tree.map(lambda x: 1024 * x, ones)  # of the sign for which they decay
    move = lambda p, step: rule.update(ones, state, p, step=step, odd=True)[0]
    at_steps = lambda p: jax.jit(jax.vmap(partial(move, p)))(steps)
    decays, moves = at_steps(weights), at_steps(jax.tree.map(jnp.negative, weights))
    flat = lambda name: (-moves[name].ravel(), (moves[name] - decays[name]).ravel() / 1024)
    return {name: np.stack(flat(name), 1) for name in rows}


def test_stages_windows_and_predictions(program):
    p, stages = program[0], [C.schedule()[C.stage(step)] for step in STEPS]
    ours = [(s.tokens, s.max_doc, s.short, s.long) for *_, s in stages]
    np.testing.assert_array_equal(ours, RECORD["stage"])
    assert sum(tokens for tokens, *_ in ours) == 395_837_440
    close([p.views[C.stage(step)].scale for step in STEPS], RECORD["scale"][:-1], 1e-6)
    view = p.views[C.stage(C.steps)]
    close([view.short, view.long, view.scale], RECORD["final"], 1e-6)
    for first, *_ in C.schedule():
        close(np.repeat(p.views[C.stage(first)].freqs, 2), RECORD[f"freqs/{first}"], 1e-6)


def test_documents_are_packed_as_the_stages_say(monkeypatch):
    """As `train` asks for them; and rows of validation that any devices can share."""

    def validation(corpus, *sizes):
        assert sizes == (10485760, 262144, 8)
        raise train_gpt.InputError

    seen = []
    monkeypatch.setattr(train_gpt, "start", lambda c: None)
    monkeypatch.setattr(train_gpt.data_fineweb, "plan", lambda corpus, steps: seen.extend(steps))
    monkeypatch.setattr(train_gpt.data_fineweb, "validation", validation)
    with pytest.raises(train_gpt.InputError):
        train_gpt.train(C)
    tokens, longest = RECORD["stage"][:, 0], RECORD["stage"][:, 1]
    np.testing.assert_array_equal(seen, np.stack([tokens // 8, longest, 0 * tokens + 8], 1))


def test_weights_of_the_predictions(monkeypatch):
    """As `gradients` gives them to the loss."""
    seen = []
    monkeypatch.setattr(train_gpt.model, "loss", lambda w, rows, c, view, mtp, fp8: mtp.sum() * 0)
    monkeypatch.setattr(sharding, "by_rows", lambda mesh, f, ins, out: lambda *args: (0, args[-1]))
    p = train_gpt.program(C, sharding.make_mesh("fsdp:1"))
    gradients = p.gradients.__wrapped__
    for step in STEPS:
        mtp = gradients(None, None, int(step), C.stage(step))[1]
        seen.append(np.pad(mtp, (0, 3 - len(mtp))))
    np.testing.assert_allclose(seen, RECORD["mtp"], atol=1e-6)


def test_muon_rate_decay_and_momentum(program):
    rows, rate, momentum, *_ = program[1]["normuon"]
    close(jax.vmap(momentum)(STEPS), RECORD["momentum"])
    alone = lambda f, x, v: (jnp.ones_like(x), v)
    rule = muon.normuon(rows, rate, momentum, jnp.float32, alone)
    ones = {name: jnp.ones((1, 1)) for name in rows}
    ours = size_and_decay(rule, rows, rule.init(ones), STEPS)
    assert [*ours] == ["qkv", "out", "up", "down"]
    for name in ours:
        size, decay = RECORD[f"muon/{name}"].T
        close(ours[name], np.stack([size, size * decay], 1))


def test_adam_size_and_decay_of_each_weight(program):
    rows, rate = program[1]["adam"]
    ones = {name: jnp.ones((1, 1)) for name in rows}
    zeros = jax.tree.map(jnp.zeros_like, ones)  # the gradients of the even step
    rule, state = muon.adam(rows, rate), {"pending": zeros, "m": ones, "v": ones}
    ours = size_and_decay(rule, rows, state, STEPS[1::2])
    assert sorted(ours) == sorted(RECORD["adam_names"].tolist())
    for name, table in zip(RECORD["adam_names"], RECORD["adam_of"]):
        size, decay = RECORD["adam"][table].T
        close(ours[name][:, 0], size)
        np.testing.assert_allclose(ours[name][:, 1], decay, rtol=2e-4, atol=1e-9 * size.max())


def test_head_and_embedding_are_tied_through_step_967():
    """Two gradients, as one for both; those of step 968 are the first of which each has its own."""
    small = {"width": 16, "heads": 2, "layers": "o", "vocab": 264, "bos": 256, "bigram_rows": 64}
    p = train_gpt.program(train_gpt.Config(**small), sharding.make_mesh("fsdp:1"))
    grads = jax.tree.map(jnp.zeros_like, (state := p.init(0))["params"])
    grads |= {"head": grads["head"] + 1, "embed": grads["embed"].at[3].set(2)}
    state["step"] = jnp.asarray(int(RECORD["split"]) - 3)
    same = []
    for step in range(int(state["step"]), int(RECORD["split"]) + 4):
        state, _ = p.update(state, grads, step % 2)
        tables = (state["params"], *(state["adam"][name] for name in ("pending", "m", "v")))
        same.append([bool((t["head"] == t["embed"]).all()) for t in tables])
    assert int(state["step"]) == 971 and same[:4] == [[True] * 4] * 4
    parts, pending, m, v = np.array(same[4:]).T.tolist()  # at steps 968, 969, 970
    assert pending == [False] * 3 and parts == m == v == [True, False, False]
