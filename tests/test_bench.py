"""The benchmarks: their columns, what they count, and that they make up no peak."""

import csv
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from types import SimpleNamespace

import gpu_check
import jax
import numpy as np
import pytest

import bench
import bench_torch
import model
import train_gpt
from commands import ROOT, run

TINY = (
    "--preset=smoke --cpu_devices=8 --width=16 --heads=2 --bigram_rows=64 --layers=pvs,k,b".split()
)


def test_table_csv_and_trace(tmp_path, capsys):
    path, was = tmp_path / "bench.csv", jax.config.jax_compilation_cache_dir
    argv = ["--mesh=fsdp:4", "--device_rows=2", f"--profile={tmp_path}"]
    try:
        bench.main([*TINY, *argv, f"--csv={path}"])
    finally:
        jax.config.update("jax_compilation_cache_dir", was)
        jax.config.update("jax_default_matmul_precision", None)
    out, (row, *costs) = capsys.readouterr().out, list(csv.DictReader(path.open()))
    assert "bench: smoke stage 0 on 4 x cpu" in out and "device_rows" in out
    assert row["MFU"] == "unknown" and row["says"] == "compiler"
    assert float(row["tokens/s"]) == pytest.approx(1000 * 768 / float(row["step ms"]))
    assert float(row["compile s"]) > 0.1 and float(row["first ms"]) > 0
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert {r["mesh"] for r in costs} == {"fsdp:4"} and float(costs[0]["state MB"]) > 0
    count = {r["collective"]: float(r["count"]) for r in costs if r["of"] == "gradients"}
    assert count["reduce-scatter"] == 5 and count["all-gather"] >= 5  # each of the weights


def test_what_is_counted_and_a_wrong_stage_is_named():
    c = train_gpt.Config(preset="smoke", width=16, heads=2, bigram_rows=64, layers="pvs,k,b")
    p = train_gpt.program(c, train_gpt.sharding.make_mesh("fsdp:1"))
    D, W = 16, 16  # a paired layer has rows of twice the tokens
    keys = sum(min(t, W) + 1 for t in range(192)) / 192 + sum(min(t, W) + 1 for t in range(96)) / 96
    matmuls = 2 * 4 * D * D + 3 * 2 * 4 * D * D + 264 * D
    assert bench.flops_per_token(c, p, 0) == pytest.approx(6 * matmuls + 12 * D * keys)
    assert bench.held(p.like["params"]) == sum(x.size * 4 for x in p.like["params"].values())
    split = train_gpt.program(c, train_gpt.sharding.make_mesh("fsdp:4"))
    assert 3 * bench.held(split.like) < bench.held(p.like) < 4 * bench.held(split.like)
    h200 = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="NVIDIA H200")]), size=8)
    assert bench.mfu(8 * 989e12 / 2 / bench.flops_per_token(c, p, 0), c, p, 0, h200) == "50.0%"
    with pytest.raises(train_gpt.InputError, match="--stage '7'"):
        bench.main([*TINY, "--stage=7"])


def test_memory_that_runs_out_ends_the_table(monkeypatch, capsys):
    def measure(c, stage, profile):
        if c.device_rows > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: so much")
        return {"device_rows": str(c.device_rows)}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(train_gpt, "start", lambda c: None)
    bench.main([*TINY, "--mesh=fsdp:1"])
    out = capsys.readouterr().out
    assert "out of device memory behind device_rows=2" in out and re.search(r"\n +2\n", out)


def test_peaks_are_of_known_chips_alone():
    assert bench.peak("NVIDIA H100 80GB HBM3") == bench.peak("NVIDIA H200") == 989e12
    assert bench.peak("TPU v5 lite") == 197e12 and bench.peak("TPU v5") == 459e12
    assert bench.peak("TPU v6 lite") == 918e12 and bench.peak("NVIDIA A100-SXM4-80GB") == 312e12
    for kind in ("cpu", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "TPU v9", "NVIDIA GH200 480GB"):
        assert bench.peak(kind) is None


def test_jax_against_pytorch_in_a_table_csv_and_a_picture(tmp_path, monkeypatch, capsys):
    """With what the side of JAX measures, tiny, in the place of PyTorch's."""
    tiny = "--tokens=8 --width=8 --heads=2 --layers=1 --steps=2".split()
    bench_torch.main([*tiny, "--side=jax", "--batches=2"])
    row = json.loads(capsys.readouterr().out)
    assert 0 < row["warm-up s"] < row["first s"] and row["step ms"] > 0

    def measured(command, **more):
        keys = dict(word[2:].split("=", 1) for word in command if word.startswith("--"))
        side = {"batch": int(keys["batches"]), "side": keys["side"]} if "side" in keys else {}
        return subprocess.CompletedProcess(command, 0, json.dumps(row | side), "")

    monkeypatch.setattr(bench_torch.subprocess, "run", measured)
    files = [f"--csv={tmp_path}/a.csv", f"--svg={tmp_path}/a.svg"]
    bench_torch.main([*tiny, "--batches=2,4", *files])
    out, rows = capsys.readouterr().out, list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [(r["batch"], r["side"]) for r in rows] == [
        (batch, side) for batch in "24" for side in bench_torch.SIDES
    ]
    names = ["batch", "side", "first s", "warm-up s", "step ms", "tokens/s", "loss"]
    assert [*rows[0]] == re.split(r"  +", out.splitlines()[0].strip()) == names
    bars = [x for x in xml.parse(tmp_path / "a.svg").iter() if x.tag.endswith("rect")]
    assert len(bars) == len(rows) == 6


def test_a_gpus_checks_at_tiny_sizes(tmp_path):
    """What a CPU can show: every row is there, and plain attention's losses are compared."""
    check = [sys.executable, ROOT / "tests/gpu_check.py", "--cpu", f"--out={tmp_path}/a"]
    done = run(tmp_path, "--only=bfloat16,head,speedrun,plain", command=check)
    assert done.returncode == 0 and done.stdout.endswith("gpu_check: passed: bfloat16\n"), done
    assert re.search(r"bfloat16: 1 steps of the record +pass ", done.stdout)
    assert done.stdout.count("tokens/s,") == 6 and done.stdout.count("losses after 24 steps") == 2
    assert re.search(r"less the first run's .*; steps part by 0\.0000 at most", done.stdout)
    assert [*xml.parse(tmp_path / "a/curves.svg").iter()]
    assert {p.name for p in (tmp_path / "a/runs").glob("*/*")} == {
        "log.txt",
        "metrics.csv",
        "tensorboard",
        ".lock0",
    }
    alone = [*check[:-1], f"--out={tmp_path}/b", "--only=plain"]
    done = run(tmp_path, command=alone)
    assert done.returncode == 0 and done.stdout.count("losses after 24 steps") == 1, done
    again = run(tmp_path, command=check)
    assert again.returncode == 2 and again.stderr.strip().endswith("a has runs already")


def test_a_gpus_checks_that_time_cut_short_have_a_verdict(tmp_path, monkeypatch, capsys):
    """Of a training that was still compiling, or had but its first validation."""
    csv = tmp_path / "runs/speedrun-1/metrics.csv"

    def check(name, argv, end):
        csv.parent.mkdir(parents=True)
        csv.write_text("step,train_time_ms,name,value\n0,0,val_loss,5.5\n")

    monkeypatch.setattr(gpu_check, "check", check)
    assert gpu_check.main(["--cpu", "--only=speedrun", f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out == "gpu_check: measured, but nothing checked\n"


@pytest.mark.parametrize("wrong", [0, 1], ids=["right", "wrong in long rows"])
def test_a_gpus_attention_is_refused_if_its_window_is_wrong(monkeypatch, capsys, wrong):
    def cudnn(q, k, v, doc, window, P):
        window //= 2 if wrong and q.shape[2] > 512 else 1
        return model.attend(q, k, v, doc, window, P)

    monkeypatch.setattr(model, "cudnn", cudnn)
    assert gpu_check.attention({"cpu": "true"}) == 3 * wrong
    assert ("DIFFERS" in capsys.readouterr().out) == bool(wrong)
