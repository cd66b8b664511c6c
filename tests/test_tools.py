"""sample and eval: what they say of a run, and what they refuse."""

import json

import jax
import numpy as np
import pytest

import commands
import data_fineweb
import sharding
import train_gpt
from commands import run

TINY = [*commands.TINY, "--layers=vls,k,b", "--steps=4", "--val_every=2", "--run=a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools")
    done = run(path, *TINY)
    assert done.returncode == 0, done.stderr
    return path


def test_eval_says_the_loss_of_the_log(folder):
    done = run(folder, "eval", "--run=a")
    last = [x for x in (folder / "runs/a/log.txt").read_text().splitlines() if "4/4 val" in x][0]
    assert done.stdout.split()[0:2] == last.split()[0:2], (done.stdout, done.stderr, last)


def test_samples_are_texts_with_the_prompt_and_the_same_for_a_seed(folder):
    args = ["sample", "--run=a", "--prompt=def f(x", "--tokens=9", "--samples=2"]
    a, b = (run(folder, *args, f"--seed={seed}").stdout for seed in (0, 1))
    assert a.count("def f(x") == 2 and a != b and "tokens/s" in run(folder, *args).stderr
    greedy = run(folder, *args, "--top_k=1").stdout.rstrip("\n").split("\n" + "-" * 100 + "\n")
    assert len(greedy) == 2 and greedy[0] == greedy[1]


@pytest.mark.parametrize(
    "args, says",
    [
        (["sample", "--run=b"], "no such run; there are: a"),
        (["eval"], "no such run"),
        (["sample", "--run=a", "--promt=x"], "did you mean 'prompt'"),
        (["sample", "--run=a", "--tokens=many"], "expected int"),
        (["sample", "--run=a", "--tokens=999999"], "windows"),
        (["eval", "--run=a", "--hellaswag=nothing.jsonl"], "--hellaswag=nothing.jsonl"),
    ],
)
def test_refused_in_one_line(folder, args, says):
    done = run(folder, *args)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_hellaswag_of_a_model_whose_answers_are_known(tmp_path, monkeypatch):
    """A head that always says the same letter: the ending with the most of it wins."""
    import eval as tool

    from sample import saved  # noqa: F401  the module is importable without starting anything

    keys = dict(word[2:].split("=") for word in TINY if "run" not in word)
    c = train_gpt.Config(**keys)
    mesh = sharding.make_mesh("fsdp:1")
    p = train_gpt.program(c, mesh)
    params = jax.tree.map(np.array, p.init(0)["params"])
    params["embed"][:] = 1  # every token looks the same, so every state is the same
    for name in ("value0", "bigram"):
        params[name][:] = 0
    params["head"][:] = 0
    params["head"][ord("z")] = 1
    run_ = type("Run", (), {"c": c, "mesh": mesh, "p": p, "params": params})
    items = [
        {"ctx": "a b", "endings": ["q q", "zzzz", "z q", "qz"], "label": 1},
        {"ctx": "c" * 400, "endings": ["zzz zz", "nothing", "zq", "qqq"], "label": "0"},
        {"ctx": "x", "endings": ["aa", "bb", "cc", "dzzd"], "label": 2},
    ]
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items))
    read = tool.questions(str(path))
    best = tool.scores(run_, *tool.pairs(read, c)).reshape(-1, 4).argmax(1)
    assert best.tolist() == [1, 0, 3]
    assert sum(int(a) == int(i["label"]) for a, i in zip(best, read)) == 2
    assert data_fineweb.encode(b"z", c.vocab)[0] == ord("z")
