"""The full validation loss of a checkpoint, as in its log: ./launch eval --run=NAME, and with
--hellaswag, or --hellaswag=PATH to its validation split (.parquet, which takes pyarrow, or .jsonl),
the accuracy on HellaSwag: the ending whose tokens have the highest mean log likelihood
(arXiv:1905.07830), GPT-2's: about 29.5%.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import hf_hub_download

import data_fineweb
import model
import sharding
import tool
from sample import saved, split, words
from sharding import InputError

REPO, FILE = "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"
COLUMNS = ["ctx", "endings", "label"]
T, ROWS = 256, 16  # tokens of context and ending; (question, ending) pairs at once, for each device


def lines(path: str) -> list:
    """The items of a file with one as JSON in a line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def table(path: str) -> list[dict]:
    """The items of a parquet file, as the hub has them."""
    from pyarrow import parquet

    return parquet.read_table(path, columns=COLUMNS).to_pylist()


def questions(path: str) -> list[dict]:
    """ctx, four endings and label, 0 to 3, of every item. Raises InputError."""
    if path == "true":
        try:
            path = hf_hub_download(REPO, FILE, repo_type="dataset", local_dir="data/hellaswag")
        except Exception as error:  # of several HTTP libraries
            why = " ".join(str(error).split())
            raise InputError(f"HellaSwag: no download, give --hellaswag=PATH: {why}") from error
    try:
        items = table(path) if path.endswith(".parquet") else lines(path)
        for i, item in enumerate(items):
            kinds = [type(text) for text in (item["endings"], item["ctx"], *item["endings"])]
            if kinds != [list] + [str] * 5 or str(item["label"]) not in [*"0123"]:
                raise ValueError(f"item {i + 1}: no ctx with 4 endings and a label of 0 to 3")
        if not items:
            raise ValueError("no items")
        return [{k: item[k] for k in COLUMNS} for item in items]
    except ImportError as error:
        how = f"{sys.executable} -m pip install pyarrow"
        raise InputError(f"--hellaswag={path}: {how}, which reads that file") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--hellaswag={path}: not HellaSwag's items: {error!r}") from error


def pairs(items: list[dict], c) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (4 items, T + 1) of context and ending behind BOS, and which are the ending."""
    rows = np.full((4 * len(items), T + 1), c.bos, np.int32)
    ending = np.zeros(rows.shape, bool)
    for i, item in enumerate(items):
        context = [c.bos, *data_fineweb.encode(item["ctx"].encode(), c.vocab)]
        for j, text in enumerate(item["endings"]):
            said = list(data_fineweb.encode((" " + text).encode(), c.vocab))[: T // 2]
            ids = [*context[-(T + 1 - len(said)) :], *said]
            rows[4 * i + j, : len(ids)] = ids
            ending[4 * i + j, len(ids) - len(said) : len(ids)] = True
    return rows, ending


def scores(run, rows: np.ndarray, ending: np.ndarray, report=print) -> np.ndarray:
    """Mean log likelihood of every row's ending, (n,)."""
    by_row = sharding.part(["rows"])

    def local(params, rows, ending):
        w = run.p.use(params)
        x = model.features(w, rows[:, :-1], run.c, run.view)
        z = 11.5 * model.cap(x @ w["head"].T)
        said = jnp.take_along_axis(jax.nn.log_softmax(z), rows[:, 1:, None], -1)[..., 0]
        return (said * ending[:, 1:]).sum(1) / ending[:, 1:].sum(1)

    f = sharding.by_rows(run.mesh, local, (run.p.parts, by_row, by_row), by_row)
    f = jax.jit(f, out_shardings=sharding.placed(run.mesh, []))  # whole in every process
    step = ROWS * sharding.ways(run.mesh, "rows")
    found = []
    for at in range(0, len(rows), step):
        some, marks = rows[at : at + step], ending[at : at + step]
        fill = ((0, step - len(some)), (0, 0))
        some, marks = np.pad(some, fill), np.pad(marks, fill, constant_values=True)
        found.append(np.asarray(f(run.params, some, marks)))
        if at // step % 50 == 0:
            report(f"hellaswag: {at // 4} of {len(rows) // 4}", file=sys.stderr)
    return np.concatenate(found)[: len(rows)]


def main(argv: list[str]):
    mine, keys = split(argv, {"hellaswag": ""})
    run = saved(keys)
    c, step = run.c, run.step
    items = []
    if mine["hellaswag"]:
        words(c.vocab)  # if one of them cannot be had, said at once
        items = questions(mine["hellaswag"])
    corpus = data_fineweb.open_corpus(c.data, c.vocab, c.bos)
    rows = data_fineweb.validation(corpus, c.val_tokens, c.val_row_tokens, c.rows)
    val = sharding.global_rows(run.mesh, rows.shape, rows.__getitem__)
    val_loss = float(run.p.evaluate(run.params, val, c.stage(step)))
    say = print if jax.process_index() == 0 else lambda *_, **to: None
    say(f"step:{step}/{c.steps} val_loss:{val_loss:.4f}")
    if items:
        best = scores(run, *pairs(items, c), say).reshape(-1, 4).argmax(1)
        right = int(sum(best == [int(item["label"]) for item in items]))
        say(f"hellaswag: {right} of {len(items)} right, accuracy {right / len(items):.4f}")


if __name__ == "__main__":
    tool.run(main)
