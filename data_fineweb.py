"""Tokens from shards, the hub or texts, and documents packed into rows as in record #77."""

import difflib
import sysconfig
import zlib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from huggingface_hub import hf_hub_download

HUB = {  # name -> dataset on the Hugging Face hub, prefix of its files, training shards
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # of the library


class DataError(ValueError):
    """Something that the user can mend, in one line."""


class Corpus(NamedTuple):
    train: list  # of shards: paths, perhaps not here yet, or tokens
    val: Path | np.ndarray
    vocab: int
    bos: int  # the token that starts every document
    repo: str = ""  # where on the hub

    def tokens(self, shard) -> np.ndarray:
        """Tokens (n,) uint16 of a shard, downloaded where it is not here. Raises OSError."""
        if isinstance(shard, np.ndarray):
            return shard
        if self.repo and not shard.exists():
            try:
                hf_hub_download(self.repo, shard.name, repo_type="dataset", local_dir=shard.parent)
            except Exception as error:  # of several HTTP libraries
                raise DataError(f"{shard}: no download: {' '.join(str(error).split())}") from error
        return read_shard(shard, self.vocab)


def read_shard(path: Path, vocab: int) -> np.ndarray:
    """A shard as modded-nanogpt writes them, 256 int32 then uint16, mapped. Raises DataError."""
    header, room = np.fromfile(path, "<i4", 256), (path.stat().st_size - 1024) // 2
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise DataError(f"{path}: not a token shard: too short, or wrong magic number or version")
    if not 0 < header[2] <= room:
        raise DataError(f"{path}: the header says {header[2]} tokens, {room} are there: cut off?")
    tokens = np.memmap(path, "<u2", "r", 1024, (int(header[2]),))
    if tokens.max() >= vocab:
        raise DataError(f"{path}: token {tokens.max()} is outside the vocabulary of {vocab}")
    return tokens


def open_corpus(data: str, vocab: int, bos: int, cache: Path = Path("data")) -> Corpus:
    """The corpus of that name or path. Raises DataError."""
    if data in HUB:
        repo, prefix, count = HUB[data]
        train = [cache / data / f"{prefix}_train_{i + 1:06d}.bin" for i in range(count)]
        return Corpus(train, cache / data / f"{prefix}_val_000000.bin", vocab, bos, repo)
    root = Path(sysconfig.get_path("stdlib") if data == "stdlib" else data)
    val, train = (sorted(root.glob(f"*_{part}_*.bin")) for part in ("val", "train"))
    if val and train:
        return Corpus(train, val[0], vocab, bos)
    mine, endings = data != "stdlib", (".txt",) if data != "stdlib" else (".py", ".txt")
    found = [p for p in [root, *sorted(root.rglob("*"))] if p.suffix in endings and p.is_file()]
    files = {p.relative_to(root if root.is_dir() else root.parent): p for p in found}
    files = {n.as_posix(): p for n, p in files.items() if mine or not SKIP & {*n.parts}}
    if not files:
        near = difflib.get_close_matches(data, [*HUB, "stdlib"], 1, 0)[0]
        raise DataError(f"--data={data}: no *_train_*.bin, *_val_*.bin or .txt there; {near}?")
    return Corpus(*tokenize(files, vocab, bos), vocab, bos)


def tokenize(files: dict, vocab: int, bos: int) -> tuple:
    """([training tokens], validation tokens) of texts, name -> path, split by a hash of the name;
    training texts are cut into documents of 1024 and mixed, so that a short run sees of all.
    """
    docs = {n.encode(errors="namereplace"): encode(p.read_bytes(), vocab) for n, p in files.items()}
    train, held_out, start = {}, {}, np.array([bos], np.uint16)
    out = {n for n, ids in docs.items() if len(ids) and zlib.crc32(n) % 20 == 0}
    few = not 0 < len(out) < len(files)  # then it is the last tenth of each
    for name, ids in docs.items():
        cut = len(ids) * 9 // 10 if few else 0 if name in out else len(ids)
        if cut < len(ids):
            held_out[name] = ids[cut:]
        train |= {b"%s %d" % (name, i): ids[i : min(i + 1023, cut)] for i in range(0, cut, 1023)}
    if not (train and held_out):
        raise DataError(f"{next(iter(files.values()))}: too little text to train on and validate")
    mixed = [sorted(d.items(), key=lambda x: zlib.crc32(x[0])) for d in (train, held_out)]
    train, held_out = (np.concatenate([x for _, ids in d for x in (start, ids)]) for d in mixed)
    return [train], held_out


def encode(text: bytes, vocab: int) -> np.ndarray:
    """Tokens of a text: GPT-2's where the vocabulary has them, else its bytes."""
    if vocab <= 50256:
        return np.frombuffer(text, np.uint8)
    gpt2 = tiktoken.get_encoding("r50k_base")
    return np.array(gpt2.encode_ordinary(text.decode(errors="replace")), np.uint16)


def decode(tokens: list[int], vocab: int) -> str:  # less those that stand for no text
    if vocab <= 50256:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")
    return tiktoken.get_encoding("r50k_base").decode([t for t in tokens if t < 50256])


def plan(corpus: Corpus, steps) -> list:
    """Which pieces of which tokens every row takes, for steps of (row tokens, max_doc, rows)."""
    # Documents, cut at max_doc, until the row is full. A shard's tail that cannot fill all rows is
    # dropped, as in the record.
    planned, steps, shards, filled = [], list(steps), iter(corpus.train), {}
    tokens, bounds, document = None, np.zeros(1, int), 0
    for row_tokens, max_doc, rows in steps:
        ends = [document]
        while len(ends) <= rows:
            if max_doc not in filled:  # tokens taken before each document
                taken = np.minimum(np.diff(bounds), max_doc)
                filled[max_doc] = np.append(0, np.cumsum(taken))
            want = filled[max_doc][ends[-1]] + row_tokens + 1
            ends.append(int(np.searchsorted(filled[max_doc], want)))
            if ends[-1] == len(bounds):
                shard, lasts = next(shards, None), f"{len(planned)} of {len(steps)} steps"
                if shard is None:
                    raise DataError(f"training data lasts {lasts}: fewer --steps or more data")
                tokens, ends, filled = corpus.tokens(shard), [0], {}
                bounds = np.append(np.flatnonzero(tokens == corpus.bos), len(tokens))
        stops = np.minimum(bounds[1:], bounds[:-1] + max_doc)
        planned.append((tokens, row_tokens, [(bounds[i:j], stops[i:j]) for i, j in pairwise(ends)]))
        document = ends[-1]
    return planned


def batch(step: tuple, first_row: int, rows: int) -> np.ndarray:
    """Some rows of a planned step, (rows, row tokens + 1) uint16, token for token the record's."""
    tokens, row_tokens, pieces = step
    out = np.empty((rows, row_tokens + 1), np.uint16)
    for row, (starts, stops) in zip(out, pieces[first_row:]):
        row[:] = np.concatenate([tokens[a:b] for a, b in zip(starts, stops)])[: len(row)]
    return out


def validation(corpus: Corpus, tokens: int, row_tokens: int) -> np.ndarray:
    """The first held-out tokens as whole rows (n, row_tokens + 1), not aligned to documents."""
    held_out = corpus.tokens(corpus.val)
    n = min(tokens, len(held_out) - 1) // row_tokens
    if n < 1:
        raise DataError(f"validation: no row of --val_row_tokens in {len(held_out)} tokens")
    return held_out[np.arange(n)[:, None] * row_tokens + np.arange(row_tokens + 1)]
