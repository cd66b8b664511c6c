"""Tokens: shards on disk or from the hub, texts made into shards, documents packed into rows."""

import difflib
import functools
import os
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

HUB = {  # name -> dataset on the Hugging Face hub, prefix of its files, training shards
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
MAGIC, VERSION, HEADER = 20240520, 1, 256  # int32; then uint16 tokens
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PIECE = 1024  # training texts are cut into documents of so many tokens


class DataError(ValueError):
    """Something about the data that the user can mend, in one line."""


def read_shard(path: Path, vocab: int) -> np.ndarray:
    """Tokens (n,) uint16 of a shard in modded-nanogpt's format, mapped. Raises DataError."""
    try:
        header, room = np.fromfile(path, "<i4", HEADER), (path.stat().st_size - 4 * HEADER) // 2
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if len(header) < HEADER or header[0] != MAGIC or header[1] != VERSION:
        raise DataError(f"{path}: not a token shard: too short, or wrong magic number or version")
    if not 0 < header[2] <= room:
        raise DataError(f"{path}: the header says {header[2]} tokens, {room} are there: cut off?")
    tokens = np.memmap(path, "<u2", "r", 4 * HEADER, (int(header[2]),))
    if tokens.max() >= vocab:
        raise DataError(f"{path}: token {tokens.max()} is outside the vocabulary of {vocab}")
    return tokens


def write_shard(path: Path, tokens):
    """Writes a shard whole or not at all."""
    header = np.zeros(HEADER, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Corpus(NamedTuple):
    train: list  # paths of shards; those of the hub may not be here yet
    val: Path
    vocab: int
    bos: int  # the token that starts every document
    repo: str = ""  # where on the hub


def open_corpus(data: str, vocab: int, bos: int, cache: Path = Path("data")) -> Corpus:
    """The corpus of that name or path; texts are tokenised into `cache`. Raises DataError."""
    if data in HUB:
        repo, prefix, count = HUB[data]
        names = [f"{prefix}_train_{i:06d}.bin" for i in range(1, count + 1)]
        names.append(f"{prefix}_val_000000.bin")
        *train, val = (cache / data / name for name in names)
        return Corpus(train, val, vocab, bos, repo)
    root = Path(sysconfig.get_path("stdlib") if data == "stdlib" else data)
    if not root.exists():
        close = difflib.get_close_matches(data, [*HUB, "stdlib"], 1)
        hint = f"did you mean {close[0]}?" if close else f"give a path, {', '.join(HUB)} or stdlib"
        raise DataError(f"--data={data}: no such data: {hint}")
    if val := sorted(root.glob("*_val_*.bin")):
        return Corpus(sorted(root.glob("*_train_*.bin")), val[0], vocab, bos)
    base, endings = (
        (root if root.is_dir() else root.parent),
        [".txt"] + [".py"] * (data == "stdlib"),
    )
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    files = {p.relative_to(base): p for p in files if p.suffix in endings}
    files = {name.as_posix(): p for name, p in files.items() if not SKIP & {*name.parts}}
    if not files:
        raise DataError(f"--data={data}: neither *_train_*.bin and *_val_*.bin nor .txt in there")
    stamp = [(name, p.stat().st_size, p.stat().st_mtime_ns) for name, p in files.items()]
    folder = cache / f"{root.stem}-{zlib.crc32(repr((vocab, bos, stamp)).encode()):08x}"
    corpus = Corpus([folder / "text_train_000001.bin"], folder / "text_val_000000.bin", vocab, bos)
    if not (corpus.train[0].exists() and corpus.val.exists()):
        both = tokenize(files, vocab, bos)
        write_shard(corpus.train[0], both[0])
        write_shard(corpus.val, both[1])
    return corpus


def tokenize(files: dict, vocab: int, bos: int) -> tuple:
    """(training, validation) tokens of texts, name -> path, split by a hash of the name.

    Training texts are cut into documents and mixed, by hash too, so that a short run sees of all.
    """
    train, held_out = {}, {}
    for name, path in files.items():
        try:
            ids = encode(path.read_bytes(), vocab)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        if len(files) == 1:  # of a lone text the last tenth
            held_out[name], ids = np.split(ids, [len(ids) - len(ids) // 10])[::-1]
        if zlib.crc32(name.encode()) % 20 or len(files) == 1:
            train |= {f"{name} {i}": ids[i : i + PIECE - 1] for i in range(0, len(ids), PIECE - 1)}
        else:
            held_out[name] = ids
    if not held_out:
        held_out["last"] = train.popitem()[1]
    mixed = (
        sorted(part.items(), key=lambda x: zlib.crc32(x[0].encode())) for part in (train, held_out)
    )
    return tuple(np.concatenate([x for _, ids in part for x in ([bos], ids)]) for part in mixed)


def gpt2():
    """GPT-2's tokenizer. Raises DataError where its vocabulary cannot be had."""
    import tiktoken

    try:
        return tiktoken.get_encoding("r50k_base")
    except Exception as error:  # its HTTP library's, let through
        raise DataError(f"cannot download GPT-2's vocabulary: {error!s:.100}") from None


def encode(text: bytes, vocab: int) -> np.ndarray:
    """Tokens of a text, uint16: GPT-2's where the vocabulary has them, else its bytes."""
    if vocab > 50256:
        return np.array(gpt2().encode_ordinary(text.decode(errors="replace")), np.uint16)
    return np.frombuffer(text, np.uint8).astype(np.uint16)


def decode(tokens: list[int], vocab: int) -> str:
    """Text of tokens, less those that stand for none."""
    if vocab > 50256:
        return gpt2().decode([t for t in tokens if t < 50256])
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


class Shard:
    """Tokens (n,), and where documents begin in them, with the end (documents + 1,)."""

    def __init__(self, tokens: np.ndarray, bos: int):
        self.tokens = tokens
        self.bounds = np.append(np.flatnonzero(tokens == bos), len(tokens))
        self.filled = functools.cache(self.filled)

    def filled(self, max_doc: int) -> np.ndarray:
        """Tokens before each document if none gives more than max_doc, (documents + 1,)."""
        return np.append(0, np.cumsum(np.minimum(np.diff(self.bounds), max_doc)))


def load(corpus: Corpus, path: Path) -> Shard:
    """A shard, downloaded where it is not here. Raises DataError."""
    if corpus.repo and not path.exists():
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(corpus.repo, path.name, repo_type="dataset", local_dir=path.parent)
        except Exception as error:  # of several HTTP libraries
            why = (str(error).strip() or repr(error)).splitlines()[0]
            raise DataError(f"cannot download {path.name} of {corpus.repo}: {why:.150}") from None
    return Shard(read_shard(path, corpus.vocab), corpus.bos)


class Plan(NamedTuple):
    """Which documents every row of every step takes: a batch is a function of its step alone."""

    steps: list  # of (row tokens, max_doc, rows)
    shards: list
    at: list  # per step its shard
    ends: list  # per step the first document of each row, and the one after the last


def plan(corpus: Corpus, steps) -> Plan:
    """Walks the shards for steps of (row tokens, max_doc, rows), downloading what they need.

    A shard's tail that cannot fill all rows of a step is dropped, as in the record. DataError
    where the data does not last.
    """
    plan, at, document = Plan(list(steps), [], [], []), 0, 0
    for step, (row_tokens, max_doc, rows) in enumerate(plan.steps):
        ends = []
        while len(ends) <= rows:
            if at == len(corpus.train):
                lasts = f"lasts {step} of {len(plan.steps)} steps ({at} shards)"
                raise DataError(f"training data {lasts}: add shards, or --steps={step}")
            if at == len(plan.shards):
                plan.shards.append(load(corpus, corpus.train[at]))
            filled, ends = plan.shards[at].filled(max_doc), [document]
            while len(ends) <= rows and ends[-1] < len(filled):
                ends.append(int(np.searchsorted(filled, filled[ends[-1]] + row_tokens + 1)))
            if ends[-1] == len(filled):
                at, document, ends = at + 1, 0, []
        document = ends[-1]
        plan.at.append(at)
        plan.ends.append(ends)
    return plan


def batch(plan: Plan, step: int, first_row: int, n_rows: int) -> np.ndarray:
    """Rows of a step's batch, (n_rows, row tokens + 1) uint16, token for token the record's.

    A row takes whole documents, cut at max_doc, until it is full; the last is cut to fit.
    """
    (row_tokens, max_doc, _), ends = plan.steps[step], plan.ends[step]
    tokens, bounds = plan.shards[plan.at[step]].tokens, plan.shards[plan.at[step]].bounds
    rows = np.empty((n_rows, row_tokens + 1), np.uint16)
    for row, first, end in zip(rows, ends[first_row:], ends[first_row + 1 :]):
        documents = (
            tokens[a : min(a + max_doc, b)] for a, b in zip(bounds[first:end], bounds[first + 1 :])
        )
        row[:] = np.concatenate(list(documents))[: len(row)]
    return rows


def validation(corpus: Corpus, tokens: int, row_tokens: int) -> np.ndarray:
    """The first `tokens` held-out tokens as rows (n, row_tokens + 1), not aligned to documents.

    As many whole rows as there are. Raises DataError where there is none.
    """
    held_out = load(corpus, corpus.val).tokens
    n = min(tokens, len(held_out) - 1) // row_tokens
    if n < 1:
        most = f"--val_row_tokens={len(held_out) - 1} is the most"
        raise DataError(f"{corpus.val}: {len(held_out)} tokens do not fill a row: {most}")
    return held_out[np.arange(n)[:, None] * row_tokens + np.arange(row_tokens + 1)]
