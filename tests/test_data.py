"""Shards, texts and the hub: what is read from disk or the network is distrusted."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import data_fineweb as data
from sample import decoded

ROOT = Path(__file__).parent.parent
VOCAB, BOS = 264, 256


def shard_bytes(tokens, magic=20240520, version=1, count=None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


def tokens_of(n: int, document: int = 50) -> np.ndarray:
    tokens = np.random.default_rng(n).integers(0, 256, n)
    tokens[::document] = BOS
    return tokens


@pytest.fixture
def corpus(tmp_path):
    for name, n in (("train_000001", 3000), ("train_000002", 2500), ("val_000000", 2000)):
        (tmp_path / f"x_{name}.bin").write_bytes(shard_bytes(tokens_of(n)))
    return data.open_corpus(str(tmp_path), VOCAB, BOS)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not a token shard"),
        (b"x" * 500, "not a token shard"),
        (shard_bytes([1, 2], magic=7), "magic"),
        (shard_bytes([1, 2], version=2), "version"),
        (shard_bytes([1, 2, 3], count=4), "cut off"),
        (shard_bytes([], count=0), r"\[20240520, 1, 0\]"),
        (shard_bytes([1, 2], count=-5), r"\[20240520, 1, -5\]"),
        (shard_bytes([1, 264, 2]), "token 264 is outside the vocabulary of 264"),
    ],
)
def test_damaged_shards_are_named(tmp_path, content, says):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=says) as error:
        data.read_shard(path, VOCAB)
    assert "bad.bin" in str(error.value) and "\n" not in str(error.value)


def test_missing_shards_and_directories_are_named(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(OSError, match=path.name):
            data.read_shard(path, VOCAB)


def test_damage_at_random_gives_an_error_or_valid_tokens(tmp_path):
    random, good = np.random.default_rng(0), shard_bytes(tokens_of(400))
    path, refused = tmp_path / "fuzz.bin", 0
    for _ in range(300):
        damaged = bytearray(good[: random.integers(len(good))] if random.random() < 0.3 else good)
        for _ in range(random.integers(1, 9)):
            if damaged:
                damaged[random.integers(min(len(damaged), 1100))] = random.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            tokens = data.read_shard(path, VOCAB)
            assert len(tokens) and tokens.max() < VOCAB
        except data.DataError:
            refused += 1
    assert refused > 100


def test_batches_are_a_function_of_the_step_and_split_by_rows(corpus):
    steps = [(60, 40, 8)] * 3 + [(100, 64, 8), (80, 40, 8)]  # where two documents are 80 tokens
    plan = data.plan(corpus, steps)
    want = [batch(slice(0, 8)) for batch in plan]
    assert [rows.shape for rows in want] == [(n, tokens + 1) for tokens, _, n in steps]
    for batch, rows in reversed(list(zip(plan, want))):
        assert (batch(slice(4, 8)) == rows[4:]).all() and (batch(slice(4)) == rows[:4]).all()
        assert (batch(slice(None)) == rows).all() and len(rows) == 8
    for rows in want:
        assert (rows[:, 0] == BOS).all() and rows.dtype == np.uint16
    starts = np.flatnonzero(want[0][0] == BOS)
    assert np.diff(starts).max() <= 40  # a longer document was cut


def test_too_little_data_says_for_how_many_steps_it_lasts(corpus):
    with pytest.raises(data.DataError, match=r"lasts (\d+) of 99 steps") as error:
        data.plan(corpus, [(60, 64, 8)] * 99)
    n = int(str(error.value).split("lasts ")[1].split()[0])
    assert len(data.plan(corpus, [(60, 64, 8)] * n)) == n


def test_validation_is_contiguous_and_takes_whole_rows(corpus):
    held_out = data.read_shard(corpus.val, VOCAB)
    rows = data.validation(corpus, 10**6, 300)
    assert rows.shape == (6, 301)
    for split, n in ((2, 6), (4, 4), (8, 6)):  # for so many devices, where there is enough
        assert (data.validation(corpus, 10**6, 300, split) == rows[:n]).all()
    assert (rows[:, :-1].ravel() == held_out[:1800]).all() and (rows[:-1, -1] == rows[1:, 0]).all()
    with pytest.raises(data.DataError, match="no row"):
        data.validation(corpus, 10**6, 3000)


@pytest.mark.parametrize("sizes", [(260, 5_000_000), (5_000_000, 30_000)])
def test_texts_of_unlike_size_are_split_within_each(tmp_path, sizes):
    """A hash of the names would hold out readme.txt: next to nothing here, or nearly all."""
    assert zlib.crc32(b"readme.txt") % 20 == 0 != zlib.crc32(b"corpus.txt") % 20
    for name, size in zip(("readme", "corpus"), sizes):
        (tmp_path / f"{name}.txt").write_text(name[0] * size)
    got = data.open_corpus(str(tmp_path), VOCAB, BOS)
    for name, size in zip(("readme", "corpus"), sizes):
        held_out = np.count_nonzero(got.val == ord(name[0]))
        assert held_out == size - size * 9 // 10
        assert np.count_nonzero(got.train[0] == ord(name[0])) == size - held_out


@pytest.mark.parametrize("n, whole", [(199, False), (200, True)])
def test_many_texts_are_held_out_whole(tmp_path, n, whole):
    """A letter in each that is in no other: of which texts is there a part in both?"""
    for i in range(n):
        (tmp_path / f"{i}.txt").write_bytes(bytes([i]) * 40)
    got = data.open_corpus(str(tmp_path), VOCAB, BOS)
    both = {*got.val.tolist()} & {*got.train[0].tolist()} - {BOS}
    assert len(both) == (0 if whole else n)
    assert len({*got.val.tolist()} - {BOS}) == (7 if whole else n)


def test_what_a_run_writes_is_no_text_to_train_on(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a" * 9000)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/log.txt").write_text("log" * 9000)
    monkeypatch.chdir(tmp_path)
    got = data.open_corpus(".", VOCAB, BOS)
    assert {*got.train[0], *got.val} == {BOS, ord("a")}


def test_the_library_is_split_by_a_hash_of_the_path(tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    names = [f"module{i}.txt" for i in range(300)]
    for name in names:
        (tmp_path / name).write_text(name * 3)
    (tmp_path / "test" / "kept.txt").write_text("kept, unlike the library's tests")
    got = data.open_corpus(str(tmp_path), VOCAB, BOS)
    held_out = decoded(got.val.tolist(), VOCAB)
    train = decoded(got.train[0].tolist(), VOCAB)
    for name in names:
        assert (name in held_out) == (zlib.crc32(name.encode()) % 20 == 0)
        assert (name in train) != (name in held_out)
    places = [at for name in sorted(names) if (at := train.find(name)) >= 0]
    assert np.corrcoef(places, range(len(places)))[0, 1] < 0.5  # they are mixed
    assert "kept, unlike" in train + held_out
    library = data.open_corpus("stdlib", VOCAB, BOS)
    assert len(library.train[0]) > 5e6 and len(library.val) > 1e5
    assert np.diff(np.flatnonzero(library.train[0] == BOS)).max() <= 1024
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    library = data.open_corpus("stdlib", VOCAB, BOS)
    assert "kept, unlike" not in decoded([*library.train[0].tolist(), *library.val], VOCAB)


def test_texts_of_any_kind(tmp_path):
    one = tmp_path / "one.txt"
    one.write_bytes("Überall naïve Bytes.\n".encode("latin-1") * 200 + b"\xff\x00")
    got = data.open_corpus(str(one), VOCAB, BOS)
    assert got.train[0][0] == BOS and len(got.val) == pytest.approx(len(got.train[0]) / 9, rel=0.02)
    few = tmp_path / "few"
    few.mkdir()
    for name in "ab":  # too few to hold whole ones out
        (few / f"{name}.txt").write_text(name * 5000)
    got = data.open_corpus(str(few), VOCAB, BOS)
    assert len(got.val) == 1002 and {97, 98} <= set(got.train[0].tolist())
    with pytest.raises(data.DataError, match="no .*train"):
        (few / "shard.bin").write_bytes(shard_bytes([1]))
        data.open_corpus(str(few / "shard.bin"), VOCAB, BOS)
    (few / "caf\udce9.txt").write_text("a name that is not UTF-8 " * 100)
    assert len(data.open_corpus(str(few), VOCAB, BOS).val)
    (tmp_path / "empty.txt").touch()
    assert len(data.open_corpus(str(tmp_path), VOCAB, BOS).train[0])
    for name in ("nothing", "empty.txt"):
        (tmp_path / "nothing").mkdir(exist_ok=True)
        with pytest.raises(data.DataError):
            data.open_corpus(str(tmp_path / name), VOCAB, BOS)
    with pytest.raises(data.DataError, match="fineweb10B"):
        data.open_corpus("finweb10B", VOCAB, BOS)


@pytest.mark.parametrize("vocab, bos, least", [(264, 200, 256), (50304, 256, 50256)])
def test_the_start_of_a_document_is_no_token_of_the_texts(tmp_path, vocab, bos, least):
    (tmp_path / "a.txt").write_text("words " * 500)
    with pytest.raises(data.DataError, match=f"--vocab={vocab} takes --bos={least} or more"):
        data.open_corpus(str(tmp_path), vocab, bos)


def test_gpt2_tokens(monkeypatch):
    cache = ROOT.parent / "shared" / "tiktoken"
    if not cache.exists():
        pytest.skip("GPT-2's vocabulary is not at hand")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    ids = data.encode(b"Hello, world", 50304)
    assert ids.tolist() == [15496, 11, 995] and decoded([50256, *ids], 50304) == "Hello, world"


class Hub(http.server.BaseHTTPRequestHandler):
    """Stands in for the hub: the files of `served`, and what was asked for in `asked`."""

    served, asked = {}, []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        body = self.served.get(name, b"")
        self.send_response(200 if name in self.served else 404)
        self.send_header("ETag", f'"{zlib.crc32(body):08x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.asked.append(name)
            time.sleep(0.2)
            self.wfile.write(body)

    def log_message(self, *args):
        pass


FETCH = """
import json, sys
import data_fineweb as data
corpus = data.open_corpus("fineweb10B", 264, 256)
try:
    plan = data.plan(corpus, [(60, 64, 8)] * int(sys.argv[1]))
    print(json.dumps([len(plan), len(data.validation(corpus, 500, 100))]))
except (data.DataError, OSError) as error:
    print(type(error).__name__, str(error).splitlines()[0])
"""


@pytest.mark.parametrize("name, n", [("fineweb", 103), ("finewebedu", 99)])
def test_the_hubs_corpora_have_names_of_their_own(name, n):
    train, val, _, read = data.open_corpus(f"{name}10B", VOCAB, BOS, Path("there"))
    assert [val, *train] == [
        Path(f"there/{name}10B/{name}_{part}.bin")
        for part in ["val_000000", *(f"train_{i:06d}" for i in range(1, n + 1))]
    ]
    assert read.keywords["repo"] == f"kjj0/{name}10B-gpt2"


def test_only_the_shards_needed_come_from_the_hub(tmp_path):
    for i, n in enumerate((2000, 3000, 3000, 3000)):
        name = f"fineweb_train_{i:06d}.bin" if i else "fineweb_val_000000.bin"
        Hub.served[name] = shard_bytes(tokens_of(n))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    env |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}

    def fetch(steps):
        command = [sys.executable, "-c", FETCH, str(steps)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr

    for _ in range(3):  # what processes of one start do at once, each file is downloaded once
        Hub.asked.clear()
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        with ThreadPoolExecutor(4) as pool:
            assert [json.loads(said) for said in pool.map(fetch, [6] * 4)] == [[6, 5]] * 4
        assert sorted(name for name in Hub.asked if name.endswith(".bin")) == [
            "fineweb_train_000001.bin",
            "fineweb_train_000002.bin",
            "fineweb_val_000000.bin",
        ]
    Hub.asked.clear()
    assert json.loads(fetch(6)) == [6, 5] and not Hub.asked  # they are there now
    assert "fineweb_train_000004.bin: no download" in fetch(60)  # it does not have so many
    server.shutdown()
    server.server_close()
    assert "fineweb_train_000004.bin: no download" in fetch(60)
