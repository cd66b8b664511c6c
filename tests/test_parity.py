"""The port against a float32 run of record #77's own code (see data/A/config.json)."""

from pathlib import Path

import numpy as np
import pytest

import parity

HERE = Path(__file__).parent
FULL = HERE.parents[1] / "shared" / "reference"  # has the whole gradients, where it is at hand


def test_every_step_of_the_reference(capsys):
    worst = parity.run(FULL / "A" if FULL.exists() else HERE / "data" / "A")
    for kind, bar in parity.BARS.items():
        assert 0 < worst[kind] <= bar, worst
    for kind in set(worst) - set(parity.BARS):
        assert worst[kind] < 1e-3, worst
    assert len(capsys.readouterr().out.splitlines()) >= 16


@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,tensor:2", "fsdp:8"])
def test_first_steps_on_other_meshes(mesh):
    worst = parity.run(HERE / "data" / "A", mesh=mesh, steps=2)
    for kind, bar in parity.BARS.items():
        assert worst[kind] <= bar, worst


def test_what_is_not_a_number_is_the_worst(monkeypatch):
    loss = parity.train_gpt.model.loss
    nothing = lambda *args, **keys: np.nan * loss(*args, **keys)
    monkeypatch.setattr(parity.train_gpt.model, "loss", nothing)
    worst = parity.run(HERE / "data" / "A", steps=1, report=len)
    assert np.isnan([worst[kind] for kind in parity.BARS]).all(), worst


def test_a_row_at_full_size():
    """Losses and all gradients of the 11 layers, with the tables of 50304 and 251520 rows."""
    assert 0 < parity.full_size(report=lambda line: None) < parity.BARS["loss"]


def test_loader_matches_the_original(tmp_path):
    data = np.load(HERE / "data" / "loader" / "loader.npz")
    (tmp_path / "loader.json").write_text((HERE / "data/loader/loader.json").read_text())
    np.savez(tmp_path / "loader.npz", **{k: data[k] for k in data.files if "/" in k})
    for i in (1, 2, 3):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(data[f"shard{i}"])
        file = tmp_path / f"switch_train_{i:06d}.bin"
        file.write_bytes(header.tobytes() + data[f"shard{i}"].tobytes())
    assert parity.loader(tmp_path, []) == 0
    tokens = bytearray(file.read_bytes())
    (tmp_path / "switch_train_000001.bin").write_bytes(tokens)  # another shard: must be noticed
    assert parity.loader(tmp_path, [], report=lambda line: None) > 0
    if FULL.exists():
        shard = HERE.parents[1] / "shared" / "corpus" / "gutenberg_val_000000.bin"
        assert parity.loader(FULL / "loader", [shard]) == 0
