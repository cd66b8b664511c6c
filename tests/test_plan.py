"""What `plan` counts in the text of a compiled program, and what it says of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_fineweb
import hlo
import plan
import sharding
import train_gpt
from sharding import InputError

# A loop of 3 turns around one of 5 (its number is written out), branches, fusions, collectives.
TEXT = """HloModule jit_f, is_scheduled=true

%inner (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %not_counted = f32[8]{0:T(256)} add(%a, %a), backend_config={"estimated_cycles":"7777"}
}

%all-reduce-scatter.1 (b: f32[80]) -> f32[10] {
  %b = f32[80]{0} parameter(0)
  %all-reduce.9 = f32[80]{0} all-reduce(%b), channel_id=1, to_apply=%sum
  ROOT %cut = f32[10]{0} slice(%all-reduce.9), slice={[0:10]}
}

%body5 (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) parameter(0)
  %deep = f32[8]{0} fusion(%c), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"2"}
  ROOT %t5 = (s32[], f32[8]) tuple(%c, %deep)
}

%body3 (d: (s32[], f32[8])) -> (s32[], f32[8]) {
  %d = (s32[], f32[8]) parameter(0)
  %w5 = (s32[], /*index=1*/f32[8]) while(%d), condition=%unknown, body=%body5, backend_config={"known_trip_count":{"n":"5"},"x":"9"}
  %x = f32[8]{0} get-tuple-element(%w5), index=1
  %ar = f32[8]{0} all-reduce(%x), channel_id=2, to_apply=%sum
  ROOT %t3 = (s32[], f32[8]) tuple(%d, %ar)
}

%unknown (e: (s32[], f32[8])) -> pred[] {
  %e = (s32[], f32[8]) parameter(0)
  ROOT %yes = pred[] custom-call(%e), custom_call_target="whatever"
}

%cond3 (g: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %g = (s32[], f32[8]) parameter(0)
  %n = s32[] get-tuple-element(%g), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

%act (h: f32[8]) -> f32[8] {
  ROOT %acts = f32[8]{0} add(%h, %h), backend_config={"estimated_cycles":"100"}
}

%wait (k: f32[8]) -> f32[8] {
  ROOT %waits = f32[8]{0} copy(%k), backend_config={"estimated_cycles":"20"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %big = f32[80]{0} broadcast(%p), backend_config={"estimated_cycles":"1"}, metadata={op_name="a/b"}
  %w3 = (s32[], f32[8]) while(%p), condition=%cond3, body=%body3
  %rs = f32[10]{0} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1
  %ags = (f32[10]{0}, f32[80]{0}) all-gather-start(%rs), channel_id=3, dimensions={0}
  %agd = f32[80]{0} all-gather-done(%ags)
  %splash_mha_fwd_segmented.1 = bf16[6,1024,128]{2,1,0} custom-call(%p), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, s8[1,2,2]{2,1,0}, bf16[6,1024,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512, \\"block_q_dkv\\": 256}"
}}, backend_config={}
  %mine = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %c = f32[8]{0} conditional(%n, %p, %p), branch_computations={%wait, %act}
}
"""  # noqa: E501
FLOPS = 2 * 2 * 6 * 2 * 2 * 512 * 512 * 128  # of the splash call: two products for each block
needs_libtpu = pytest.mark.skipif(
    not (os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")),
    reason="needs libtpu, the TPU compiler",
)


def test_loops_multiply_branches_share_fusions_count_once():
    cycles, moved, notes = hlo.cost(TEXT, FLOPS / 1000)
    spent = {name: n for (name, _, _), n in cycles.items() if n}
    splash = "splash_mha_fwd_segmented.1"
    assert spent == {"big": 1, "deep": 2 * 3 * 5, "acts": 50, "waits": 10, splash: 1000}
    assert cycles[splash, hlo.PALLAS, ""] == 1000 and cycles["big", "broadcast", "a/b"] == 1
    assert moved == {"all-reduce": (3, 96), "reduce-scatter": (1, 320), "all-gather": (1, 320)}
    assert [note.partition(":")[0] for note in notes] == ["mine"]
    assert hlo.cost(TEXT.replace('"n":"5"', ""))[2][0].startswith("w5: how often")


def test_what_xla_writes_on_the_cpu():
    @jax.jit
    def f(x):
        rows = jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x @ x), x)
        return jax.lax.map(lambda y: jax.lax.fori_loop(0, 5, lambda i, z: jnp.sin(z @ x), y), rows)

    module = hlo.parse(f.lower(jnp.ones((70, 70))).compile().as_text())
    turns = sorted(hlo.trips(module, i) for i, _ in hlo.walk(module) if i.op == "while")
    assert turns == [3, 5, 70]
    assert max(times for _, times in hlo.walk(module)) == 350


@needs_libtpu
def test_what_the_tpu_compiler_writes(capsys, tmp_path):
    path = tmp_path / "plan.csv"
    keys = "--preset=smoke --layers=p,v,ls,k,b --rows=8 --vocab=264 --device_rows=1 --top=3"
    argv = [*keys.split(), "--topology=v5e:2x4", "--only=update", f"--csv={path}"]
    assert plan.main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("plan: smoke on v5e:2x4 fits: peak 0.") and "of 16.0 GiB" in out[-1]
    assert len(path.read_text().splitlines()) == 3
    assert sum(" Mcycles " in line and " x " in line for line in out) == 6
    with pytest.raises(InputError, match="not divisible"):
        plan.slice_of("v5e:3x5")


def test_last_line():
    c, chip = train_gpt.Config(), plan.CHIPS["v6e"]
    rows = {"0": {"peak": 9.1, "cycles/token": 512}, "update": {"peak": 3.0}}
    line = "peak 9.1 of 32.0 GiB per chip, 512 cycles/token, 116 s to the last step (predicted)"
    assert plan.verdict(c, "v6e:2x4", chip, rows) == f"plan: speedrun on v6e:2x4 fits: {line}"
    two = rows | {"1": {"peak": 9.1, "cycles/token": 812}}  # for twice the tokens
    assert " 712 cycles/token, 161 s " in plan.verdict(c, "v6e:2x4", chip, two)
    none = plan.verdict(c, "v6e:2x4", chip, {"update": {"peak": 3.0}}, "update")
    assert none.endswith("fits: peak 3.0 of 32.0 GiB per chip (predicted from update alone)")
    rows["update"]["peak"] = 31.5
    assert plan.verdict(c, "v6e:2x4", chip, rows).startswith(
        "plan: speedrun on v6e:2x4 does not fit: peak 31.5 of 32.0 GiB per chip, 512 cycles"
    )


def test_an_array_that_is_donated_counts_once(monkeypatch):
    """And a chip's speed is in FLOPs per cycle."""
    speeds = []
    keep = lambda text, speed: speeds.append(speed) or hlo.cost(text, speed)
    monkeypatch.setattr(plan, "cost", keep)
    f, x = jax.jit(lambda x: x + 1, donate_argnums=0), jax.ShapeDtypeStruct((2**20,), np.float32)
    row, _ = plan.measure("f", lambda: f.lower(x), plan.CHIPS["v6e"])
    assert 2**22 <= row["peak"] * 2**30 < 1.1 * 2**22
    assert speeds == [pytest.approx(0.4 * 918e12 / 1.75e9)]


def test_a_step_is_its_gradients_and_the_mean_of_two_updates():
    c, like = train_gpt.Config(), jax.ShapeDtypeStruct((2**28,), np.float32)
    like = like.update(sharding=sharding.placed(sharding.make_mesh("fsdp:8"), ["embed"]))
    p = SimpleNamespace(like={"params": like, "muon": (like, like)})  # 1/8 GiB each
    rows = {"0": {"peak": 5.0, "generated_code": 0.5, "Mcycles": 60.0, "Mcycles*": 4.0, "ms": 30}}
    rows |= {f"update{odd}": {"peak": 2.0, "Mcycles": 1.0 + odd, "ms": 2 + odd} for odd in (0, 1)}
    plan.finish(c, p, rows)
    assert rows["0"]["peak"] == 5.25 and rows["update0"]["peak"] == 2.5
    assert rows["0"]["cycles/token"] == pytest.approx(65.5e6 / 131072)
    assert rows["0"]["tokens/s"] == pytest.approx(131072 / 0.0325)


def test_what_the_user_can_mend_is_one_line(monkeypatch):
    script = [sys.executable, Path(plan.__file__), "--topology=v5e:2x4"]
    env = os.environ | {"TPU_LIBRARY_PATH": "/not/there"}
    done = subprocess.run([*script], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "jax[tpu]"' in done.stderr.splitlines()[-1]
    monkeypatch.setenv("TPU_LIBRARY_PATH", __file__)  # anything: it is not opened
    for argv, what in (["--topology=v9:2x4"], "v9:2x4"), (["--widht=3"], "width"):
        with pytest.raises(InputError, match=what):
            plan.main(argv)


@pytest.mark.parametrize("rows, planned", [(8, 40), (16, 32), (64, 40)])
def test_validation_is_planned_with_the_rows_it_takes(rows, planned):
    c, tokens = train_gpt.Config(rows=rows, val_tokens=4000, val_row_tokens=100), np.zeros(4001)
    corpus = data_fineweb.Corpus([], tokens, c.bos, lambda tokens: tokens)
    mesh = sharding.make_mesh("fsdp:1")
    jobs = plan.programs(c, train_gpt.program(c, mesh), mesh)
    at = [job.args[1].shape for name, job in jobs.items() if name.startswith("val")]
    taken = data_fineweb.validation(corpus, c.val_tokens, c.val_row_tokens, c.rows).shape
    assert set(at) == {(planned, 101)} == {taken}
