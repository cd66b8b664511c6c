"""Shards, texts, downloads and packing: what comes in, and what is said of damage."""

import http.server
import sysconfig
import threading
import zlib
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiktoken

import data_fineweb
from data_fineweb import Corpus, DataError, batch, decode, encode, open_corpus, plan, validation

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"  # more of the original's, where it is at hand
VOCAB, BOS = 264, 256


def shard_bytes(tokens, magic=20240520, version=1, count=None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


def texts(n, seed=0, longest=300, vocab=VOCAB) -> np.ndarray:
    """At least n tokens in documents of random lengths that each start with BOS."""
    rng, out = np.random.default_rng(seed), []
    while sum(map(len, out)) < n:
        out.append(np.append(BOS, rng.integers(0, 256, rng.integers(1, longest))))
    return np.concatenate(out).astype(np.uint16)


def corpus_of(*shards) -> Corpus:
    return Corpus(list(shards), shards[0], VOCAB, BOS)


def rows_of(steps, rows=8) -> list:
    return [batch(step, 0, rows) for step in steps]


def documents(tokens) -> list:
    """The documents of a training shard as bytes."""
    tokens = np.asarray(tokens)
    return [bytes(d[1:].tolist()) for d in np.split(tokens, np.flatnonzero(tokens == BOS))[1:]]


# The original's packing


def test_switch_of_shards_as_in_the_original():
    want = np.load(HERE / "data/loader/loader.npz")
    shards = [want[f"shard{i}"] for i in (1, 2, 3)]
    steps = plan(Corpus(shards, shards[0], 50304, 50256), [(1024, 896, 8)] * 5)
    for i, rows in enumerate(rows_of(steps)):
        assert (rows[:, :-1] == want[f"switch_step{i}/inputs"]).all()
        assert (rows[:, 1:] == want[f"switch_step{i}/targets"]).all()
    assert steps[2][0] is shards[0] and steps[3][0] is shards[1]  # a tail was dropped
    with pytest.raises(DataError):  # the shards hold no more
        plan(Corpus(shards, shards[0], 50304, 50256), [(1024, 896, 8)] * 50)


@pytest.mark.skipif(not (SHARED / "reference/loader").exists(), reason="not at hand")
def test_stages_and_validation_as_in_the_original():
    shard, folder = SHARED / "corpus/gutenberg_val_000000.bin", SHARED / "reference/loader"
    want = np.load(folder / "loader.npz")
    corpus = Corpus([shard], shard, 50304, 50256)
    for i, rows in enumerate(rows_of(plan(corpus, [(2048, 896, 8)] * 6 + [(4096, 2048, 8)] * 4))):
        assert (rows[:, :-1] == want[f"train_step{i}/inputs"]).all()
        assert (rows[:, 1:] == want[f"train_step{i}/targets"]).all()
    rows = validation(corpus, 2 * 8 * 8192, 8192)
    for i in (0, 1):
        assert (rows[8 * i : 8 * i + 8, :-1] == want[f"val_batch{i}/inputs"]).all()
        assert (rows[8 * i : 8 * i + 8, 1:] == want[f"val_batch{i}/targets"]).all()
    switch = sorted(folder.glob("switch_train_*.bin"))
    rows = rows_of(plan(Corpus(switch, shard, 50304, 50256), [(1024, 896, 8)] * 5))
    assert all((r[:, :-1] == want[f"switch_step{i}/inputs"]).all() for i, r in enumerate(rows))


# Shards


def test_a_sound_shard_is_read_as_it_is(tmp_path):
    tokens = texts(1000)
    (tmp_path / "x.bin").write_bytes(shard_bytes(tokens) + b"more than the header says")
    got = data_fineweb.read_shard(tmp_path / "x.bin", VOCAB)
    assert got.dtype == np.uint16 and (got == tokens).all()


DAMAGE = {
    "empty": b"",
    "short header": shard_bytes(texts(100))[:1000],
    "header alone": shard_bytes(texts(100))[:1024],
    "magic": shard_bytes(texts(100), magic=20240521),
    "version": shard_bytes(texts(100), version=2),
    "cut off": shard_bytes(texts(100))[:-1],
    "outside the vocabulary": shard_bytes([BOS, 1, VOCAB]),
    "no tokens": shard_bytes([BOS, 1, 2], count=0),
    "negative count": shard_bytes([BOS, 1, 2], count=-1),
    "huge count": shard_bytes([BOS, 1, 2], count=2**31 - 1),
    "text": b"Call me Ishmael. " * 100,
}


def one_line_with(error, *words):
    """What a user sees of an error: its first line, which must name what it is about."""
    lines = str(error.value).strip().splitlines()
    assert lines and all(word in lines[0] for word in words), lines
    if isinstance(error.value, DataError):
        assert len(lines) == 1


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shard(tmp_path, kind):
    path = tmp_path / "some_train_000001.bin"
    path.write_bytes(DAMAGE[kind])
    with pytest.raises(DataError) as error:
        data_fineweb.read_shard(path, VOCAB)
    one_line_with(error, str(path))
    good = tmp_path / "some_val_000000.bin"
    good.write_bytes(shard_bytes(texts(100)))
    corpus = open_corpus(str(tmp_path), VOCAB, BOS)
    with pytest.raises(DataError, match=path.name):
        plan(corpus, [(16, 16, 2)])
    with pytest.raises(DataError, match=path.name):
        validation(corpus._replace(val=path), 16, 16)


def test_missing_shard_and_a_folder_in_its_place(tmp_path):
    for path in (tmp_path / "some_train_000001.bin", tmp_path):
        with pytest.raises((DataError, OSError)) as error:
            plan(Corpus([path], path, VOCAB, BOS), [(16, 16, 2)])
        one_line_with(error, path.name)


def test_300_shards_with_random_damage(tmp_path):
    rng, path, read = np.random.default_rng(0), tmp_path / "x.bin", 0
    good = shard_bytes(texts(700))
    for i in range(300):
        data = bytearray(good)
        if i % 3 == 0:  # random bytes, in the header or anywhere
            end = (16, 1024, len(data))[i // 3 % 3]
            for at in rng.integers(0, end, rng.integers(1, 9)):
                data[at] = rng.integers(256)
        elif i % 3 == 1:
            del data[rng.integers(len(data)) :]
        else:  # a word of the header
            word = rng.choice([0, 1, -1, 2**31 - 1, -(2**31), rng.integers(-(2**31), 2**31)])
            at = 4 * rng.integers(4)
            data[at : at + 4] = int(word).to_bytes(4, "little", signed=True)
        path.write_bytes(data)
        try:
            tokens = data_fineweb.read_shard(path, VOCAB)
        except DataError as error:
            assert "x.bin" in str(error) and "\n" not in str(error)
            continue
        read += 1
        assert tokens.dtype == np.uint16 and 0 < len(tokens) and tokens.max() < VOCAB
        assert len(tokens) <= (len(data) - 1024) // 2
    assert 10 < read < 200


# Packing


def test_rows_start_with_bos_and_take_cut_documents_in_order():
    tokens, max_doc = texts(50_000, longest=200), 100
    want = [np.append(BOS, np.frombuffer(d, np.uint8))[:max_doc] for d in documents(tokens)]
    for rows in rows_of(plan(corpus_of(tokens), [(512, max_doc, 4)] * 5), 4):
        assert rows.shape == (4, 513) and rows.dtype == np.uint16
        for row in rows:
            assert row[0] == BOS
            whole = np.empty(0)
            while len(whole) < len(row):
                whole = np.concatenate([whole, want.pop(0)])
            assert (row == whole[: len(row)]).all()


def test_what_comes_before_the_first_bos_is_left_out():
    tokens = texts(5000)
    cut = rows_of(plan(corpus_of(np.append([5, 6, 7], tokens)), [(64, 300, 8)] * 3))
    assert all(
        (a == b).all() for a, b in zip(cut, rows_of(plan(corpus_of(tokens), [(64, 300, 8)] * 3)))
    )


def test_a_shard_without_bos_is_passed_over():
    tokens = texts(5000)
    steps = plan(corpus_of(np.arange(200), tokens), [(64, 300, 8)])
    assert (batch(steps[0], 0, 8) == batch(plan(corpus_of(tokens), [(64, 300, 8)])[0], 0, 8)).all()


def test_the_same_rows_on_any_number_of_processes_in_any_order():
    corpus, steps = (
        corpus_of(texts(9000, 1), texts(9000, 2)),
        [(128, 90, 8)] * 3 + [(256, 200, 8)] * 4,
    )
    first, again = plan(corpus, steps), plan(corpus, steps)
    backwards = [batch(step, 0, 8) for step in again[::-1]][::-1]
    for step, whole in zip(first, backwards):
        for n in (1, 2, 4, 8):
            parts = [batch(step, row, n) for row in range(0, 8, n)]
            assert (np.concatenate(parts) == whole).all()


def test_a_tail_that_cannot_fill_a_step_is_dropped():
    first, second = texts(3000, 1), texts(9000, 2)
    steps = plan(corpus_of(first, second), [(128, 300, 8)] * 4)
    at = [step[0] is second for step in steps].index(True)
    assert at == 2  # a step takes 8 * 129 tokens and the documents' ends
    fresh = plan(corpus_of(second), [(128, 300, 8)] * (4 - at))
    assert all((batch(a, 0, 8) == batch(b, 0, 8)).all() for a, b in zip(steps[at:], fresh))


@pytest.mark.parametrize("steps", [3, 20])
def test_too_little_data_says_how_many_steps_it_lasts(steps):
    corpus, sizes = corpus_of(texts(3000)), (128, 300, 8)
    with pytest.raises(DataError, match=rf"lasts 2 of {steps} steps") as error:
        plan(corpus, [sizes] * steps)
    one_line_with(error, "2")
    assert len(plan(corpus, [sizes] * 2)) == 2


def test_validation_takes_whole_rows_that_follow_each_other():
    tokens = texts(2000)
    corpus = corpus_of(tokens)
    rows = validation(corpus, 1000, 128)
    assert rows.shape == (7, 129)
    assert (rows[:, :-1].ravel() == tokens[: 7 * 128]).all() and (
        rows[:-1, -1] == rows[1:, 0]
    ).all()
    assert len(validation(corpus, 10**9, 128)) == (len(tokens) - 1) // 128
    with pytest.raises(DataError, match="val_row_tokens") as error:
        validation(corpus, 10**9, len(tokens))
    one_line_with(error)
    assert len(validation(corpus, 10**9, len(tokens) - 1)) == 1  # the last token is a target


# Texts


def test_library_is_split_by_a_hash_of_the_name():
    corpus = open_corpus("stdlib", VOCAB, BOS)
    root, train, held_out = Path(sysconfig.get_path("stdlib")), {}, {}
    for path in root.glob("*.py"):  # those at its root
        where = held_out if zlib.crc32(path.name.encode()) % 20 == 0 else train
        where[path.name] = path.read_bytes()
    assert len(train) > 100 and held_out
    kept, out = set(documents(corpus.train[0])), set(documents(corpus.val))
    for text in train.values():
        assert all(text[i : i + 1023] in kept for i in range(0, len(text), 1023))
    assert set(held_out.values()) <= out
    long = {text for text in out if len(text) > 100}  # short ones can be copies
    assert not long & set(train.values())
    assert not {text[:1023] for text in long} & kept
    assert max(map(len, kept)) == 1023
    again = open_corpus("stdlib", VOCAB, BOS)
    assert (corpus.train[0] == again.train[0]).all() and (corpus.val == again.val).all()
    assert corpus.train[0].dtype == corpus.val.dtype == np.uint16
    assert corpus.train[0][0] == corpus.val[0] == BOS


def test_split_of_a_folder_does_not_depend_on_where_it_is(tmp_path):
    got = []
    for folder in (tmp_path / "one", tmp_path / "other" / "deeper"):
        for i in range(60):
            path = folder / f"{'sub/' * (i % 2)}{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"text {i} " * 20)
        (folder / "notes.md").write_text("not this")
        got.append(open_corpus(str(folder), VOCAB, BOS))
    names = [f"{'sub/' * (i % 2)}{i}.txt" for i in range(60)]
    held_out = [i for i, name in enumerate(names) if zlib.crc32(name.encode()) % 20 == 0]
    for corpus in got:
        assert (corpus.train[0] == got[0].train[0]).all() and (corpus.val == got[0].val).all()
        kept, out = documents(corpus.train[0]), documents(corpus.val)
        assert sorted(out) == sorted(f"text {i} ".encode() * 20 for i in held_out)
        assert len(kept) + len(out) == 60 and not set(kept) & set(out)


def test_of_a_lone_text_the_last_tenth_is_held_out(tmp_path):
    text = np.random.default_rng(0).integers(0, 256, 10_000).astype(np.uint8).tobytes()
    (tmp_path / "one.txt").write_bytes(text)
    for data in (tmp_path / "one.txt", tmp_path):
        corpus = open_corpus(str(data), VOCAB, BOS)
        assert documents(corpus.val) == [text[9000:]]
        whole = [text[i : min(i + 1023, 9000)] for i in range(0, 9000, 1023)]
        assert sorted(documents(corpus.train[0])) == sorted(whole)
        assert len(plan(corpus, [(512, 1024, 2)] * 4)) == 4


def test_two_texts_are_enough(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 4000)
    corpus = open_corpus(str(tmp_path), VOCAB, BOS)
    kept, out = documents(corpus.train[0]), documents(corpus.val)
    assert kept and out and sum(map(len, kept + out)) == 16_000


def test_any_bytes_are_text(tmp_path):
    text = "naïve café, déjà vu. ".encode("latin-1") * 500
    (tmp_path / "latin.txt").write_bytes(text)
    corpus = open_corpus(str(tmp_path), VOCAB, BOS)
    assert b"".join(documents(corpus.val)) == text[-len(text) // 10 :]
    assert "caf\ufffd" in decode(corpus.val.tolist(), VOCAB)


@pytest.mark.parametrize("files", [[b""], [b"", b""], [b"x"], [], None])
def test_too_little_text(tmp_path, files):
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
    for i, text in enumerate(files or []):
        (folder / f"{i}.txt").write_bytes(text)
    with pytest.raises(DataError) as error:
        open_corpus(str(folder), VOCAB, BOS)
    one_line_with(error, str(folder))


def test_empty_files_among_others_do_no_harm(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_bytes(b"" if i % 2 else b"some words " * 50)
    corpus = open_corpus(str(tmp_path), VOCAB, BOS)
    found = documents(corpus.train[0]) + documents(corpus.val)
    assert len(found) == 20 and b"" not in found


def test_unknown_name_gets_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data, near in (
        ("stdlip", "stdlib"),
        ("fineweb", "fineweb10B"),
        ("edu10b", "finewebedu10B"),
    ):
        with pytest.raises(DataError, match=near) as error:
            open_corpus(data, VOCAB, BOS)
        one_line_with(error, data)


def test_folder_of_shards_in_the_order_of_their_names(tmp_path):
    for i in (10, 2, 1):
        (tmp_path / f"my_train_{i:06d}.bin").write_bytes(shard_bytes(texts(2000, i)))
    (tmp_path / "my_val_000000.bin").write_bytes(shard_bytes(texts(500)))
    (tmp_path / "also.txt").write_text("shards come first")
    corpus = open_corpus(str(tmp_path), VOCAB, BOS)
    assert [path.name[-6:-4] for path in corpus.train] == ["01", "02", "10"]
    assert batch(plan(corpus, [(64, 300, 8)])[0], 0, 8)[0, 0] == BOS
    assert (corpus.tokens(corpus.val) == texts(500)).all()


def test_bytes_there_and_back():
    text = bytes(range(256)) * 2
    assert encode(text, VOCAB).tolist() == list(text)
    assert decode([BOS, *"naïve".encode(), BOS, VOCAB - 1], VOCAB) == "naïve"
    assert decode([0xFF], VOCAB) == "\ufffd"


@pytest.mark.skipif(not (SHARED / "tiktoken").exists(), reason="not at hand")
def test_gpt2_tokens_there_and_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    assert encode(b"hello world", 50304).tolist() == [31373, 995]
    text = "To be, or not to be: <|endoftext|> naïve 日本\n\n  42 "
    ids = encode(text.encode(), 50304)
    assert ids.dtype == np.uint16 and ids.max() < 50256 and decode(ids.tolist(), 50304) == text
    assert decode([50256, *ids.tolist(), 50303], 50304) == text
    assert "\ufffd" in decode(encode(b"caf\xe9", 50304).tolist(), 50304)
    (tmp_path / "x.txt").write_text(text * 100)
    corpus = open_corpus(str(tmp_path), 50304, 50256)
    assert corpus.train[0][0] == corpus.val[0] == 50256 and corpus.train[0].max() == 50256


def test_gpt2_tokens_without_a_network(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("words " * 100)

    def unreachable(name):
        raise OSError("connection refused while fetching the vocabulary")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises((DataError, OSError), match="refused"):
        open_corpus(str(tmp_path), 50304, 50256)
    open_corpus(str(tmp_path), VOCAB, BOS)  # bytes need none


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub on this machine: .files are path -> bytes, .asked what was got."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self, body=False):
            data = server.files.get(self.path)
            if body:
                server.asked.append(self.path)
            self.send_response(404 if data is None else 200)
            if data is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(data or b"")))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{zlib.crc32(data or b""):040x}"')
            self.end_headers()
            if body:
                self.wfile.write((data or b"")[: server.cut])

        def do_GET(self):
            self.do_HEAD(body=True)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.cut = {}, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    download = partial(huggingface_hub.hf_hub_download, endpoint=endpoint, token=False)
    monkeypatch.setattr(data_fineweb, "hf_hub_download", download)
    yield server
    server.shutdown()
    server.server_close()


REPO, PREFIX, COUNT = data_fineweb.HUB["fineweb10B"]


def serve(hub, n=COUNT, vocab_tokens=3000):
    """Puts the first n shards and the validation shard on the hub; returns their tokens."""
    names = [f"{PREFIX}_val_000000.bin"] + [f"{PREFIX}_train_{i + 1:06d}.bin" for i in range(n)]
    tokens = {name: texts(vocab_tokens, i) for i, name in enumerate(names)}
    at = f"/datasets/{REPO}/resolve/main/"
    hub.files = {at + name: shard_bytes(t) for name, t in tokens.items()}
    return list(tokens.values())


def fetched(hub) -> list:
    return [path.rsplit("/", 1)[1] for path in hub.asked]


def test_hub_gives_as_many_shards_as_the_steps_need(tmp_path, hub):
    tokens = serve(hub)
    corpus = open_corpus("fineweb10B", VOCAB, BOS, tmp_path)
    assert len(corpus.train) == 103 and not hub.asked
    steps = [(128, 300, 8)] * 5  # two from each shard
    got = rows_of(plan(corpus, steps))
    assert fetched(hub) == [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)]
    want = rows_of(plan(corpus_of(*tokens[1:4]), steps))
    assert all((a == b).all() for a, b in zip(got, want))
    assert (
        validation(corpus, 256, 128).ravel() == validation(corpus_of(tokens[0]), 256, 128).ravel()
    ).all()
    assert fetched(hub)[3:] == ["fineweb_val_000000.bin"]
    kept = [path for path in (tmp_path / "fineweb10B").glob("*.bin")]
    assert len(kept) == 4
    plan(open_corpus("fineweb10B", VOCAB, BOS, tmp_path), steps)
    assert len(hub.asked) == 4  # nothing twice
    plan(corpus, steps + steps[:2])
    assert len(hub.asked) == 5 and fetched(hub)[4] == "fineweb_train_000004.bin"


def test_hub_lacks_a_shard(tmp_path, hub):
    serve(hub, n=1)
    with pytest.raises((DataError, OSError)) as error:
        plan(open_corpus("fineweb10B", VOCAB, BOS, tmp_path), [(128, 300, 8)] * 5)
    one_line_with(error)
    assert "404" in str(error.value) and "fineweb_train_000002.bin" in str(error.value)


def test_hub_cannot_be_reached(tmp_path, hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises((DataError, OSError)) as error:
        plan(open_corpus("fineweb10B", VOCAB, BOS, tmp_path), [(128, 300, 8)])
    one_line_with(error)


def test_hub_goes_away_amid_a_shard(tmp_path, hub):
    serve(hub)
    hub.cut = 1500
    with pytest.raises((DataError, OSError)) as error:
        plan(open_corpus("fineweb10B", VOCAB, BOS, tmp_path), [(128, 300, 8)])
    one_line_with(error)
    hub.cut = None
    assert plan(open_corpus("fineweb10B", VOCAB, BOS, tmp_path), [(128, 300, 8)])
