"""Tokens from shards, the hub or texts, and documents packed into rows as in record #77."""

import sysconfig
import zlib
from argparse import ArgumentTypeError as DataError  # what the user can mend, in one line
from collections import namedtuple
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
from huggingface_hub import hf_hub_download, utils

HUB = {"fineweb10B": 103, "finewebedu10B": 99}  # kjj0/NAME-gpt2 on the hub -> training shards
Corpus = namedtuple("Corpus", "train val bos read")  # shards, read(shard) -> tokens (n,)
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # of the library


def read_shard(path: Path, vocab: int, repo: str = "") -> np.ndarray:
    """Tokens (n,) uint16, mapped, of a shard, if need be from the hub. Raises DataError."""
    if repo and not path.exists():
        try:
            with utils.WeakFileLock(f"{path}.lock"):  # else each of several processes downloads it
                hf_hub_download(repo, path.name, repo_type="dataset", local_dir=path.parent)
        except Exception as error:  # of several HTTP libraries
            raise DataError(f"{path}: no download: {' '.join(str(error).split())}") from error
    header, room = np.fromfile(path, "<i4", 256).tolist(), (path.stat().st_size - 1024) // 2
    if len(header) < 256 or header[:2] != [20240520, 1] or not 0 < header[2] <= room:
        raise DataError(f"{path}: not a token shard: magic, version, tokens {header[:3]}: cut off?")
    if (tokens := np.memmap(path, "<u2", "r", 1024, (header[2],))).max() >= vocab:
        raise DataError(f"{path}: token {tokens.max()} is outside the vocabulary of {vocab}")
    return tokens


def open_corpus(data: str, vocab: int, bos: int, cache: Path = Path("data")) -> Corpus:
    """The corpus of that name or path. Raises DataError."""
    if data in HUB:
        read = partial(read_shard, vocab=vocab, repo=f"kjj0/{data}-gpt2")
        shard = lambda part, i: cache / data / f"{data[:-3]}_{part}_{i:06d}.bin"
        return Corpus([shard("train", i + 1) for i in range(HUB[data])], shard("val", 0), bos, read)
    root = Path(sysconfig.get_path("stdlib") if data == "stdlib" else data).expanduser()
    val, train = (sorted(root.glob(f"*_{part}_*.bin")) for part in ("val", "train"))
    if val and train:
        return Corpus(train, val[0], bos, partial(read_shard, vocab=vocab))
    if bos < (least := 256 if vocab <= 50256 else 50256):  # else it is a token of the texts
        raise DataError(f"--bos={bos}: --vocab={vocab} takes --bos={least} or more for texts")
    endings, skip = ((".py", ".txt"), SKIP) if data == "stdlib" else ((".txt",), {"runs"})
    found = [p for p in [root, *sorted(root.rglob("*"))] if p.suffix in endings and p.is_file()]
    files = {str(p.relative_to(root)): p for p in found if not skip & {*p.relative_to(root).parts}}
    return Corpus(*tokenize(data, files, vocab, bos), bos, lambda tokens: tokens)


def tokenize(data: str, files: dict, vocab: int, bos: int) -> tuple:
    """([training tokens], validation tokens) of texts, name -> path: held out are a tenth of each
    or, of 200 and more, one in 20, by a hash of its name; training documents of 1024, mixed."""
    docs = {n.encode(errors="namereplace"): encode(p.read_bytes(), vocab) for n, p in files.items()}
    train, held_out, start = {}, {}, np.array([bos], np.uint16)
    for name, ids in docs.items():
        cut = len(ids) * 9 // 10 if len(docs) < 200 else len(ids) * (zlib.crc32(name) % 20 > 0)
        held_out |= {name: ids[cut:]} if cut < len(ids) else {}
        train |= {b"%s %d" % (name, i): ids[i : min(i + 1023, cut)] for i in range(0, cut, 1023)}
    if not (train and held_out):
        raise DataError(f"--data={data}: no train, val .bin or enough .txt; or {[*HUB, 'stdlib']}")
    mixed = lambda d: np.concatenate([x for n in sorted(d, key=zlib.crc32) for x in (start, d[n])])
    return [mixed(train)], mixed(held_out)


def encode(text: bytes, vocab: int) -> np.ndarray:
    """Tokens of a text: GPT-2's where the vocabulary has them, else its bytes."""
    if vocab <= 50256:
        return np.frombuffer(text, np.uint8)
    gpt2 = tiktoken.get_encoding("r50k_base")
    return gpt2.encode_to_numpy(text.decode(errors="replace"), disallowed_special=()).astype("u2")


def plan(corpus: Corpus, steps) -> list:
    """For steps of (row tokens, max_doc, rows): of each a function, slice -> those of its rows."""
    batch = lambda t, rows, cut: np.stack([np.concatenate([t[i] for i in r]) for r in rows[cut]])
    planned = []  # documents, cut at max_doc, till a row is full; a shard's tail is dropped
    for tokens in map(corpus.read, corpus.train):
        packed, n = [[]], 0  # a step's rows, lists of slices; tokens in the last of them
        for start, end in pairwise([*np.flatnonzero(tokens == corpus.bos).tolist(), len(tokens)]):
            row_tokens, max_doc, rows = steps[len(planned)]
            packed[-1].append(slice(start, min(end, start + max_doc, start + row_tokens + 1 - n)))
            if (n := n + packed[-1][-1].stop - start) > row_tokens:
                packed, n = [*packed, []], 0
            if len(packed) > rows:
                planned.append(partial(batch, tokens, packed[:-1]))
                packed = [[]]
            if len(planned) == len(steps):
                return planned
    raise DataError(f"training data lasts {len(planned)} of {len(steps)} steps: --steps? --bos?")


def validation(corpus: Corpus, tokens: int, row_tokens: int, split: int = 1) -> np.ndarray:
    """The first held-out tokens, (n, row_tokens + 1), not aligned to documents; split divides n."""
    if len(held_out := corpus.read(corpus.val)[: tokens + 1]) <= row_tokens:
        raise DataError(f"validation: no row of --val_row_tokens in {len(held_out)} tokens")
    rows = np.lib.stride_tricks.sliding_window_view(held_out, row_tokens + 1)[::row_tokens]
    return rows[: len(rows) // split * split or None]  # devices share them evenly
