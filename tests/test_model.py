"""What the network must not do, and what its tables promise."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import model
import sharding
import train_gpt

TINY = {"width": 32, "heads": 2, "bigram_rows": 64, "device_rows": 8}
C = train_gpt.Config(preset="smoke", **TINY)
ONE = sharding.make_mesh("fsdp:1")


def with_keys(c, **keys):
    return train_gpt.Config(**vars(c) | keys)


def features(w, ids, c, view):
    """As on one device: the model's communication needs a mesh."""
    f = sharding.by_rows(
        ONE, lambda w, ids: model.features(w, ids, c, view), sharding.part(), sharding.part()
    )
    return jax.jit(f)(w, ids)  # else it would run operation by operation


@pytest.fixture(scope="module")
def weights():
    """Random everywhere, so that every path acts."""
    table = model.param_table(C)
    params = model.init(table, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    return {n: w + 0.1 * jax.random.normal(k, w.shape) for k, (n, w) in zip(keys, params.items())}


VIEW = model.View(8, 24, *model.yarn(C.width // C.heads, [24]), model.attend)
FIRST = jnp.concatenate(
    [jnp.asarray([[C.bos]]), jax.random.randint(jax.random.key(5), (1, 63), 0, 256)], 1
)


def test_no_token_sees_the_future(weights):
    """By the gradient of one position with respect to all positions' embeddings."""

    def at(scale, t):
        w = weights | {"embed": weights["embed"]}
        x = features(w | {"embed": scale[0][:, None] * w["embed"][FIRST[0]]}, ids, C, VIEW)
        return (x[0, t] ** 2).sum()

    ids = jnp.arange(64)[None] % 64  # position i looks up row i of the scaled table
    for t in (0, 1, 17, 62):
        grad = jax.grad(at)(jnp.ones((1, 64)), t)[0]
        assert not grad[t + 1 :].any() and grad[t] != 0


def test_documents_do_not_see_each_other(weights):
    """But for smear, the bigram and the key shift of long layers, which look one token back."""
    w, c = weights | {"smear": jnp.zeros(())}, with_keys(C, layers="pvs,k,b,v")
    tokens = FIRST.at[0, 32].set(C.bos)
    other = tokens.at[0, :31].set((tokens[0, :31] + 7) % 256)
    q = lambda ids: features(w, ids, c, VIEW)[0]
    a, b = q(tokens), q(other)
    assert jnp.abs(a[:31] - b[:31]).max() > 1e-3
    np.testing.assert_allclose(a[34:], b[34:], atol=1e-6)
    joined = FIRST.at[0, 32].set(3)  # without the boundary it does
    other = joined.at[0, :31].set((joined[0, :31] + 7) % 256)
    assert jnp.abs(q(joined)[34:] - q(other)[34:]).max() > 1e-4


@pytest.mark.parametrize("preset", ["speedrun", "smoke"])
def test_every_parameter_has_one_updater(preset):
    c = train_gpt.Config(preset=preset)
    p = train_gpt.program(c, sharding.make_mesh("fsdp:1"))
    groups = [set(p.like[group][kind]) for group, kind in (("muon", "momentum"), ("adam", "m"))]
    assert groups[0] | groups[1] == set(p.like["params"]) and not groups[0] & groups[1]
    assert groups[0] == {"qkv", "out", "up", "down"}
    if preset == "speedrun":
        sizes = {n: x.size for n, x in p.like["params"].items()}
        assert sizes["value4"] == 50304 * 768 and "value5" not in sizes
        assert sizes["bigram"] == 251520 * 768
        assert round(sum(sizes.values()) / 1e6) == 539


def test_start_values_are_the_records():
    """Of its code; parity starts from values of its own."""
    c = train_gpt.Config(width=96, vocab=1024, bos=1000, bigram_rows=64)
    params, D, zero, one = train_gpt.program(c, ONE).init(0)["params"], 96, (0, 0), (1, 0)
    want = dict.fromkeys(("qkv", "out", "up"), (0, 0.5 * D**-0.5)) | {"head": (0, 0.005)}
    want |= {"embed": (0, 0.005)} | {f"value{i}": (0, 0.01) for i in range(5)}
    want |= dict.fromkeys(("down", "bigram", "smear", "x0_inject"), zero)
    want |= {n: zero for n in params if n.endswith("_gate")}
    want |= {"qkv_scale": (0.5, 0), "out_scale": one, "post": one, "resid": (1.1**0.5, 0)}
    want |= {"backout": (0.5, 0), "skip": (-1.5, 0), "bigram_inject": (0.05, 0)}
    found = {n: (float(w.mean()), float(w.std())) for n, w in params.items()}
    assert found.keys() == want.keys()
    for name, (mean, std) in want.items():
        np.testing.assert_allclose(found[name], (mean, std), rtol=0.02, atol=2e-4, err_msg=name)
    assert abs(params["qkv"]).max() < 1.01 * 3**0.5 * 0.5 * D**-0.5  # uniform
    assert (params["head"] == params["embed"]).all()


def test_in_bf16_communication_and_muon_are_so_too(monkeypatch):
    """Weights, looked-up rows and Muon's products: float32 would take twice the time."""
    c = train_gpt.Config(preset="smoke", **TINY | {"device_rows": 1}, float32="false")
    p = train_gpt.program(c, mesh := sharding.make_mesh("fsdp:8"))
    rows = jax.ShapeDtypeStruct((8, 97), np.uint16, sharding=sharding.placed(mesh, ["rows"], [8]))
    text = p.gradients.lower(p.like["params"], rows, 0, 0).as_text()
    moved = re.findall(r"stablehlo\.(all_gather|all_to_all).*-> tensor<[\dx]+x(\w+)>", text)
    assert {*moved} == {("all_gather", "i32"), ("all_gather", "bf16"), ("all_to_all", "bf16")}
    seen, real = [], train_gpt.muon.orthogonalize
    monkeypatch.setattr(train_gpt.muon, "orthogonalize", lambda x: seen.append(x) or real(x))
    p.update.lower(p.like, p.like["params"], 0)
    assert {x.dtype for x in seen} == {jnp.dtype(jnp.bfloat16)}


def test_what_the_record_keeps_in_bf16_is_rounded_after_each_update_and_no_more():
    c = train_gpt.Config(preset="smoke", **TINY, float32="false")
    p = train_gpt.program(c, ONE)
    before, state = p.init(0)["params"], p.init(0)
    for i in range(2):  # Adam acts in the second
        keys = jax.random.split(jax.random.key(i), len(before))
        grads = {n: jax.random.normal(k, x.shape) for k, (n, x) in zip(keys, before.items())}
        state, _ = p.update(state, grads, i)
    exact = lambda x: bool((x == x.astype(jnp.bfloat16).astype(jnp.float32)).all())
    after = state["params"]
    assert all((after[n] != before[n]).any() for n in after)
    gates = {n for n in after if n.endswith("_gate")}
    tables = {n for n in after if n.startswith("value") or n in ("head", "embed", "bigram")}
    assert len(gates) == 4 and gates <= tables | gates == {n for n in after if exact(after[n])}
    assert {n for n in before if exact(before[n])} >= tables | gates
    row = model.param_table(C)["head"]
    assert row.bits == 23 and not exact(model.init({"head": row}, jax.random.key(0))["head"])


def test_the_rates_fall_till_the_extension_or_the_end(monkeypatch):
    seen, adam = [], train_gpt.muon.adam
    monkeypatch.setattr(train_gpt.muon, "adam", lambda *x: seen.append(x[1]) or adam(*x))
    for preset in ("speedrun", "smoke"):
        c = train_gpt.Config(preset=preset)
        train_gpt.program(c, ONE)
        rates = np.array(seen.pop()(jnp.arange(c.steps))) / c.adam_lr
        end = 1450 if preset == "speedrun" else c.steps
        start = int(end * 0.4)
        assert (rates[end:] - 0.15 < 1e-6).all() and len(rates[end:]) == c.steps - end
        assert abs(rates[start] - 1.52) < 1e-6 and rates[0] == 1
        assert abs(rates[end - 1] - 0.15 - (1.73 - 0.15) / (end - start)) < 1e-5


@pytest.mark.parametrize("key, till_the_end", [("rise", slice(1, 300)), ("fall", slice(400, None))])
@pytest.mark.filterwarnings("error")
def test_no_rise_or_fall_of_the_momentum(monkeypatch, key, till_the_end):
    """One of no length is not 0 / 0 in the first step, nor 1 / 0 in the others."""
    seen, normuon = [], train_gpt.muon.normuon
    monkeypatch.setattr(train_gpt.muon, "normuon", lambda *x: seen.append(x[2]) or normuon(*x))
    train_gpt.program(with_keys(C, **{f"momentum_{key}": "0.0"}), ONE)
    momentum = np.array(seen[0](jnp.arange(C.steps)))
    assert momentum[0] == np.float32(0.85) and np.isfinite(momentum).all()
    assert (momentum[till_the_end] == np.float32(0.95)).all()


def test_a_schedule_of_one_stage_trains(monkeypatch):
    """Head and embedding are tied till its end."""
    one = train_gpt.Stage(1, 1024, 896, 16, 64, 1.0, (1,), (1,))
    monkeypatch.setitem(train_gpt.STAGES, "one", (one,))
    c = with_keys(C, stages="one", steps=4)
    p = train_gpt.program(c, ONE)
    rows = np.random.default_rng(0).integers(0, 256, (c.rows, 129)).astype(np.uint16)
    state = p.init(0)
    for step in range(c.steps):
        loss, grads = p.gradients(state["params"], rows, step, 0)
        state, _ = p.update(state, grads, step % 2)
    assert jnp.isfinite(loss)
    assert (state["params"]["head"] == state["params"]["embed"]).all()


def test_the_sum_of_bits_is_of_numbers_of_any_size():
    """So that an optimizer may keep its state in bfloat16, say."""
    kinds = jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn
    state = [(jnp.arange(99.0) - 40).astype(kind) for kind in kinds]
    sizes = [f"u{x.itemsize}" for x in state]
    want = sum(int(np.asarray(x).view(u).astype("u8").sum()) for x, u in zip(state, sizes))
    p = train_gpt.program(C, ONE)
    assert int(p.bits(state)) == want % 2**32
    assert int(p.bits([*state[:-1], state[-1].at[7].multiply(2)])) != want % 2**32


def test_state_is_split_over_fsdp():
    """With 8 ways a device holds an eighth of parameters and optimizer state, within 10%."""
    p = train_gpt.program(C, sharding.make_mesh("fsdp:8"))
    leaves = jax.tree.leaves(p.like)
    whole = sum(x.size for x in leaves)
    mine = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    assert mine < 1.1 * whole / 8


def test_schedule_scales_with_steps():
    c = train_gpt.Config()
    assert [end for _, end, _ in c.schedule()] == [483, 967, 1450, 1490]
    assert [c.stage(s) for s in (0, 482, 483, 966, 967, 1449, 1450, 1489)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    half = with_keys(c, steps=745)
    assert [end for _, end, _ in half.schedule()] == [242, 484, 725, 745]


@pytest.mark.parametrize("mesh", ["fsdp:1", "data:2,fsdp:2,tensor:2"])
def test_what_is_faster_on_a_chip_gives_the_same(mesh):
    """Columns moved by products on a TPU; on a GPU one product for q, k, v, and a second tanh."""
    rows = np.random.default_rng(0).integers(0, 256, (8, 129)).astype(np.uint16)
    rows[:, [0, 50]] = C.bos
    programs, found = set(), []
    for chip in ("cpu cpu", "tpu TPU v6 lite", "gpu NVIDIA H100 80GB HBM3"):
        p = train_gpt.program(with_keys(C, layers="pvl,k,b"), sharding.make_mesh(mesh))
        p.views[0] = p.views[0]._replace(chip=chip)
        params = p.init(0)["params"]
        programs.add(p.gradients.lower(params, rows, 0, 0).as_text())
        found.append(jax.tree.map(np.array, p.gradients(params, rows, 0, 0)))
    assert len(programs) == 3
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), found[0], other)


@pytest.mark.parametrize(
    "chip, tokens, again",
    [
        ("tpu TPU v5 lite", 2**14 + 128, True),
        ("tpu TPU v5 lite", 2**14, False),
        ("tpu TPU v6 lite", 2**14 + 128, False),
    ],
)
def test_a_v5e_keeps_no_attention_of_long_rows(weights, chip, tokens, again):
    """From the second stage of speedrun on it is computed again, backwards."""
    view = VIEW._replace(attend=lambda q, k, v, *_: v, chip=chip)
    ids = jnp.zeros((1, tokens), jnp.int32)
    text = str(jax.make_jaxpr(lambda w: features(w, ids, C, view))(weights))
    assert ("remat" in text or "checkpoint" in text) == again


def test_same_gradients_for_any_mesh_and_accumulation():
    rows = np.random.default_rng(0).integers(0, 256, (8, 129)).astype(np.uint16)
    rows[:, [0, 50]] = C.bos
    want = None
    for mesh, device_rows, times in (
        ("fsdp:1", 8, 1),
        ("fsdp:1", 3, 1),
        ("data:4", 1, 1),
        ("fsdp:4", 2, 2),  # 16 rows, each of the 8 twice
        ("fsdp:4,tensor:2", 2, 1),
        ("data:2,fsdp:2,tensor:2", 1, 1),
    ):
        c = with_keys(C, device_rows=device_rows, layers="pvl", rows=8 * times)
        p = train_gpt.program(c, sharding.make_mesh(mesh))
        state = p.init(0)
        loss, grads = p.gradients(state["params"], np.tile(rows, (times, 1)), 3, 0)
        new, norm = p.update(state, grads, 0)
        np.testing.assert_allclose(norm, optax.tree.norm(grads), rtol=1e-5)
        assert all(x.is_deleted() for x in jax.tree.leaves(state))  # or there were two of them
        got = float(loss), float(norm), float(new["params"]["up"][0, 0, 0])
        want = want or got
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_the_gradients_of_turns_are_added_up_in_float32():
    """Of a row, once and eight times: in bfloat16 the sum would be off by 0.4%."""
    rows, found = np.random.default_rng(0).integers(0, 256, (1, 97)).astype(np.uint16), []
    for n in (1, 8):
        keys = TINY | {"device_rows": 1, "float32": False, "rows": n}
        p = train_gpt.program(train_gpt.Config(preset="smoke", **keys, layers="pvl"), ONE)
        found.append(p.gradients(p.init(0)["params"], np.repeat(rows, n, 0), 0, 0)[1])
    for name, once in found[0].items():
        off = jnp.linalg.norm(found[1][name] - once)
        assert off <= 1e-5 * jnp.linalg.norm(once), name


@pytest.mark.parametrize("P, window, T", [(1, 128, 512), (2, 200, 256), (1, 300, 1024)])
def test_the_kernel_of_a_tpu_sees_the_same(P, window, T, monkeypatch):
    """Interpreted on the CPU: forward and gradients, documents, pairs of heads that share keys."""
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    make = tpu.make_splash_mha_single_device
    monkeypatch.setattr(
        tpu, "make_splash_mha_single_device", lambda *a, **k: make(*a, **k, interpret=True)
    )
    model.splash_kernel.cache_clear()
    keys = jax.random.split(jax.random.key(P), 4)
    q, k, v, weight = (jax.random.normal(key, (2, 2 * P, T, 128)) for key in keys)
    doc = jnp.cumsum(jax.random.bernoulli(keys[0], 0.01, (2, T)), 1)

    def run(f):
        value = lambda q, k, v: (f(0.1 * q, k, v, doc, window, P) * weight).sum()
        local = jax.value_and_grad(value, (0, 1, 2))
        return jax.jit(sharding.by_rows(ONE, local, sharding.part(), sharding.part()))(q, k, v)

    for a, b in zip(jax.tree.leaves(run(model.splash)), jax.tree.leaves(run(model.attend))):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    model.splash_kernel.cache_clear()


@pytest.mark.parametrize("T, K, fits", [(256, 128, True), (192, 128, False), (256, 96, False)])
def test_the_kernel_of_a_tpu_gets_sizes_that_it_takes(T, K, fits, monkeypatch):
    q = jax.ShapeDtypeStruct((1, 2, T, K), jnp.bfloat16)
    f = lambda q: model.splash(q, q, q, jnp.zeros((1, T), int), 64, 1)
    asked = []
    kernel = lambda *sizes: asked.append(sizes) or (lambda q, k, v, doc: q)
    monkeypatch.setattr(model, "splash_kernel", kernel)
    assert jax.eval_shape(f, q) == q and asked == [(2, T, 64, 1)] * fits


@pytest.fixture
def same_api(monkeypatch):
    """JAX's own attention in place of cuDNN's, which is the same function by its documentation."""
    real = jax.nn.dot_product_attention
    names = {"cudnn": "xla"}
    stand_in = lambda *rows, implementation, **sees: real(
        *rows, implementation=names[implementation], **sees
    )
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


@pytest.mark.parametrize(
    "P, window, T", [(1, 100, 256), (2, 37, 128), (2, 500, 96), (1, 900, 1000)]
)
def test_longer_heads_keep_documents_apart(P, window, T, same_api):
    keys = jax.random.split(jax.random.key(P), 3)
    q, k, v = (jax.random.normal(key, (2, 2 * P, T, 64)) for key in keys)
    doc = jnp.cumsum(jax.random.bernoulli(keys[0], 0.3, (2, T)), 1) + 250  # carries over 8 bits

    def run(f):
        value = lambda q, k, v: jnp.sin(f(q / 4, k, v, doc, window, P)).sum()
        return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(q, k, v)

    for a, b in zip(jax.tree.leaves(run(model.cudnn)), jax.tree.leaves(run(model.attend))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_attention_that_is_wrong_is_not_trusted(same_api):
    trusted = lambda f: model.trusted(f, 64, jnp.bfloat16)
    right, why = trusted(model.cudnn)
    assert right and "cudnn is off by 0.00" in why
    for wrong in (
        lambda q, k, v, doc, window, P: model.cudnn(q, k, v, doc, window + 1, P),
        lambda q, k, v, doc, window, P: model.cudnn(q, k, v, 0 * doc, window, P),
        lambda q, k, v, doc, window, P: model.cudnn(q, k, v, doc, window, P) * jnp.nan,
        lambda q, k, v, doc, window, P: jax.lax.stop_gradient(model.cudnn(q, k, v, doc, window, P)),
    ):
        right, why = trusted(wrong)
        assert not right and "off by" in why


def test_without_cudnn_attention_is_plain():
    right, why = model.trusted(model.cudnn, 64, jnp.bfloat16)
    assert not right and "cudnn fails" in why


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_all_processes_take_the_attention_of_the_first(first, own, monkeypatch):
    """Else they would compile different programs, and each wait for the others' part."""
    gpu = SimpleNamespace(platform="gpu", device_kind="H100")
    mesh = SimpleNamespace(devices=np.array([gpu]), shape={"tensor": 1})

    def view(*args):
        raise RuntimeError(f"attention by {args[-2].__name__}")

    monkeypatch.setattr(model, "View", view)
    monkeypatch.setattr(model, "trusted", lambda *_: (own, ""))
    monkeypatch.setattr(ocp.multihost, "broadcast_one_to_all", lambda x: np.full_like(x, first))
    with pytest.raises(RuntimeError, match="attention by " + ("cudnn" if first else "attend")):
        train_gpt.program(C, mesh)
    mesh.shape["tensor"] = 2  # over which XLA splits the heads, which it cannot in a kernel
    with pytest.raises(RuntimeError, match="attention by attend"):
        train_gpt.program(C, mesh)


@pytest.mark.parametrize(
    "chip, given",
    [
        ("gpu NVIDIA H100", [{"xla_allow_excess_precision": False}] * 2),
        ("tpu TPU v5 lite", [{}, {"xla_tpu_scoped_vmem_limit_kib": 49152}]),
        ("tpu TPU v4", [{}, {}]),
        ("cpu cpu", [{}, {}]),
    ],
)
def test_what_the_compiler_of_a_chip_is_told(chip, given, monkeypatch):
    """For all programs, and for the gradients."""
    platform, _, kind = chip.partition(" ")
    device = SimpleNamespace(platform=platform, device_kind=kind)
    mesh = SimpleNamespace(devices=np.array([device]), shape={"tensor": 2})
    told, partial = [], train_gpt.partial
    keep = lambda f, *a, **k: told.append(k) if f is jax.jit else partial(f, *a, **k)
    monkeypatch.setattr(train_gpt, "partial", keep)
    monkeypatch.setattr(model, "yarn", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_gpt.program(C, mesh)
    assert [options["compiler_options"] for options in told] == given


def test_a_window_longer_than_the_row_takes_no_more_than_the_row():
    x, doc = jnp.ones((2, 4, 384, 16)), jnp.zeros((2, 384), int)
    attend = lambda window: jax.jit(partial(model.attend, window=window, P=1))
    memory = [attend(n).lower(x, x, x, doc).compile().memory_analysis() for n in (383, 2560)]
    assert memory[1].temp_size_in_bytes <= memory[0].temp_size_in_bytes


@pytest.mark.parametrize(
    "P, window, T", [(1, 9, 64), (2, 13, 32), (1, 40, 96), (1, 700, 96), (2, 900, 64)]
)
def test_plain_attention_is_what_it_says(P, window, T):
    """Against every query and key written out, with and without pairs."""
    keys = jax.random.split(jax.random.key(T), 3)
    q, k, v = (jax.random.normal(key, (2, 4, T, 8), jnp.bfloat16) for key in keys)
    q, k, v = (x.astype(jnp.float32) for x in (3 * q, k, v))
    doc = jnp.cumsum(jax.random.bernoulli(keys[0], 0.1, (2, T)), 1)
    rows = lambda x: x.reshape(2, 4 // P, P, T, 8).swapaxes(2, 3).reshape(2, 4 // P, P * T, 8)
    logits = jnp.einsum("bhqk,bhsk->bhqs", rows(q), rows(k))
    i, docs = np.arange(P * T), jnp.repeat(doc, P, 1)
    seen = (i[:, None] >= i) & (i[:, None] - i <= window)
    seen = seen & (docs[:, None, :, None] == docs[:, None, None])
    o = jax.nn.softmax(jnp.where(seen, logits, -1e30)) @ rows(v)
    want = o.reshape(2, 4 // P, T, P, 8).swapaxes(2, 3).reshape(2, 4, T, 8)
    np.testing.assert_allclose(model.attend(q, k, v, doc, window, P), want, rtol=1e-4, atol=1e-5)
    rounded = model.attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), doc, window, P)
    assert jnp.linalg.norm(rounded - want) < 0.0025 * jnp.linalg.norm(want)  # of logits in float32


def test_gradients_are_reduce_scattered_and_tables_stay():
    """In the compiled program: what shard_map asked for, and no whole table anywhere."""
    c = with_keys(C, bigram_rows=776, device_rows=1)
    p = train_gpt.program(c, sharding.make_mesh("fsdp:8"))
    zeros = np.zeros((8, 97), np.uint16)
    rows = sharding.global_rows(sharding.make_mesh("fsdp:8"), zeros.shape, zeros.__getitem__)
    text = p.gradients.lower(p.like["params"], rows, 0, 0).compile().as_text()
    scattered = [line for line in text.splitlines() if " reduce-scatter(" in line]
    assert len(scattered) >= 4  # qkv, out, up, down, perhaps together, and the head
    assert "[776,32]" not in text and f"[{c.vocab},2,32]" not in text
    whole_banks = [
        line for line in text.splitlines() if " all-reduce(" in line and "[5,128,32]" in line
    ]
    assert not whole_banks
