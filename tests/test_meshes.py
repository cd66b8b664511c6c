"""Any mesh gives the same losses, and splits what it says: in shardings and compiled programs."""

import re
from functools import lru_cache
from math import prod

import numpy as np
import pytest

import bench
import hlo
import sharding
import train_gpt

STEPS = 20
SMALL = {"width": 32, "heads": 4, "bigram_rows": 64, "layers": "pvs,k,bl", "vocab": 272}
MESHES = ["data:8", "fsdp:8", "data:2,fsdp:2,tensor:2", "fsdp:4,tensor:2"]


@lru_cache
def compiled(mesh: str, device_rows: int, stage: int):
    """program, Config, rows -> array on the mesh, the gradients of that stage compiled."""
    keys = SMALL | {"steps": STEPS, "device_rows": device_rows}
    c, at = train_gpt.Config(preset="smoke", **keys), sharding.make_mesh(mesh)
    p, T = train_gpt.program(c, at), c.schedule()[stage][2].tokens // c.rows
    place = lambda rows: sharding.global_rows(at, rows.shape, rows.__getitem__)
    rows = place(np.zeros((c.rows, T + 1), np.uint16))
    return p, c, place, p.gradients.lower(p.like["params"], rows, 0, stage).compile()


def losses(mesh: str, device_rows: int) -> list[float]:
    rng, state, found = np.random.default_rng(0), None, []
    for step in range(STEPS):
        stage = sum(step >= end for end in (7, 13))
        p, c, place, gradients = compiled(mesh, device_rows, stage)
        rows = rng.integers(97, 123, (c.rows, c.schedule()[stage][2].tokens // c.rows + 1))
        rows[:, 0] = rows[rng.random(rows.shape) < 0.01] = c.bos
        state = state or p.init(0)
        loss, grads = gradients(state["params"], place(rows.astype(np.uint16)), step)
        state, _ = p.update(state, grads, step % 2)
        found.append(float(loss))
    apart = bool((state["params"]["head"] != state["params"]["embed"]).any())
    return [*found, apart]


@pytest.fixture(scope="module")
def one():
    return losses("fsdp:1", 8)


def test_the_steps_cross_the_stages_and_the_untying(one):
    c = train_gpt.Config(preset="smoke", steps=STEPS)
    assert [c.stage(step) for step in range(STEPS)] == [0] * 7 + [1] * 6 + [2] * 7
    assert one[-1] is True and one[-2] < one[0] - 2  # the head is the embedding no longer


@pytest.mark.parametrize(
    "mesh, device_rows",
    [("fsdp:1", 1), ("fsdp:1", 2), ("tensor:2", 8), *((mesh, 1) for mesh in MESHES)],
)
def test_20_steps_have_the_losses_of_one_device(one, mesh, device_rows):
    found = losses(mesh, device_rows)
    worst = max(abs(a / b - 1) for a, b in zip(found, one))
    print(f"{mesh} device_rows={device_rows}: worst relative difference {worst:.1e}")
    assert len(found) == STEPS + 1 and worst < 1e-4


@pytest.mark.parametrize("layout", ["data:2,fsdp:4", "fsdp:4,data:2", "data:2,fsdp:2,tensor:2"])
def test_weights_are_gathered_among_neighbours(layout):
    """Devices of a process or host have numbers in a row; what goes between hosts is `data`."""
    mesh, ids = sharding.make_mesh(layout), np.arange(8)
    found = np.vectorize(lambda device: device.id)(mesh.devices)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert (found == ids.reshape(2, -1, mesh.shape["tensor"])).all()
    at = sharding.placed(mesh, ["rows"], [8])
    cuts = at.devices_indices_map((8,))  # in that order, so that a host's rows are neighbours too
    starts = [cuts[device][0].indices(8)[0] for device in mesh.devices.flat]
    assert starts == sorted(starts)


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_bytes_of_state_per_device(mesh):
    """Of speedrun: an eighth where there is no data axis, else what the other axes split."""
    c = train_gpt.Config()
    whole, each = (
        bench.held(train_gpt.program(c, sharding.make_mesh(at)).like) for at in ("fsdp:1", mesh)
    )
    n = 4 if "data" in mesh else 8
    print(f"{mesh}: {each / 1e6:.0f} of {whole / 1e6:.0f} MB, {each / whole * n:.3f} / {n}")
    assert whole / n <= each < 1.1 * whole / n


def newton_schulz(p, devices: int) -> int:
    """FLOPs of Muon's products on each of the devices, if none has more matrices than it must."""
    total = 0
    for name in p.like["muon"]["momentum"]:
        *stack, rows, columns = p.like["params"][name].shape
        short, long = sorted((rows, columns))
        five = 5 * (4 * short * short * long + 2 * short**3)
        total += -(-prod(stack) // devices) * five
    return total


@lru_cache
def updates(mesh: str):
    keys = SMALL | {"width": 64, "layers": "p,v,pv,ls,o,p,k,b,v,pv,lv"}  # speedrun's stacks
    p = train_gpt.program(train_gpt.Config(preset="smoke", **keys), sharding.make_mesh(mesh))
    return p, p.update.lower(p.like, p.like["params"], 1).compile()


@pytest.mark.parametrize("mesh", ["fsdp:8", "data:8", "fsdp:4,tensor:2"])
def test_newton_schulz_is_split_over_all_devices(mesh):
    """By the compiler's count, which has all else in it, too, on `data` once for each device."""
    for at, devices in (("fsdp:1", 1), (mesh, 8)):
        p, update = updates(at)
        ratio = update.cost_analysis()["flops"] / newton_schulz(p, devices)
        print(f"{at}: {update.cost_analysis()['flops'] / 1e6:.1f} MFLOPs, {ratio:.3f} of the sum")
        assert 1 <= ratio < 1.2


def collectives(text: str):
    """(operation, shapes of its results) of each in a compiled program, but not of one device."""
    for i in (i for body in hlo.parse(text).values() for i in body):
        found = re.fullmatch(hlo.COLLECTIVE, i.op)
        if found and not re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\]<)", i.text):
            shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", i.type)
            yield found[1], [tuple(map(int, shape.split(","))) for shape in shapes]


@pytest.mark.parametrize("mesh, data", list(zip(MESHES[1:], (1, 2, 1))))
def test_the_update_gathers_no_whole_stack(mesh, data):
    """Matrices go to their device and back in all-to-alls; over data each is told to the others."""
    p, update = updates(mesh)
    found = list(collectives(update.as_text()))
    assert "all-to-all" in {kind for kind, _ in found}
    D = p.like["params"]["out"].shape[-1]
    for kind, shapes in found:
        for shape in shapes:
            held = 0 if shape[-1] == 1 else prod(shape) / (D * max(shape[-2:]))  # whole matrices
            assert kind == "all-to-all" or held <= 4 * data, (kind, shape)  # of 10, 11 and 30


def test_tensor_splits_heads_hidden_units_and_vocabulary():
    """Nothing over tensor is gathered but streams: no weight, no logits, no gradient."""
    p, c, _, gradients = compiled("fsdp:4,tensor:2", 1, 0)
    text = gradients.as_text()
    params = p.like["params"]
    part = lambda name: params[name].sharding.shard_shape(params[name].shape)
    halves = {"qkv": 2, "out": 2, "up": 1, "down": 1, "head": 0, "attn_gate": 1}
    for name, axis in halves.items():
        assert part(name)[axis] == params[name].shape[axis] // 2, name
    gathered = [s for kind, shapes in collectives(text) if kind == "all-gather" for s in shapes]
    D, F, V, A = c.width, 4 * c.width, c.vocab, params["out"].shape[0]
    for want in [(A, 3, D // 2, D), (A, D, D // 2), (3, F // 2, D), (V // 2, D)]:
        assert want in gathered, (want, gathered)
    for shape in gathered:  # nor logits, hidden units, or a whole matrix
        assert not {V, F} & {*shape} and shape[-2:] != (D, D), shape
    dots = [i.type for body in hlo.parse(text).values() for i in body if i.op == "dot"]
    assert dots and not [kind for kind in dots if re.search(rf"[\[,]({V}|{F})[\],]", kind)]
