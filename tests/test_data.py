"""
data.py with real files, a real (local) web server and real processes.

    python -m pytest -q tests/test_data.py
"""
import gzip
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402


def md5(raw):
    return hashlib.md5(raw).hexdigest()


def make(n, batch=None, classes=3, **kwargs):
    """A data set of n pictures in memory; picture i is filled with the value i."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 1, 2, 3)).copy()
    images[..., 0] = 255  # one column marks the left side, so that a flip shows
    meta = dict(shape=[1, 2, 3], classes=classes, names=list("abc"), range=[0, 255], source="", count=n)
    return data.Dataset("test", images, np.arange(n, dtype=np.int64) % classes, meta, **kwargs)


def numbers(x):
    return data.to_uint8(x)[:, 0, 0, 1].tolist()


# ---------------------------------------------------------------- batches


def test_an_epoch_repeats_nothing_and_the_next_one_is_shuffled_anew():
    ds = make(103)
    epochs = [[numbers(ds.batch(e * 10 + k, batch_size=10)[0]) for k in range(10)] for e in range(3)]
    flat = [sum(epoch, []) for epoch in epochs]
    for order in flat:  # 103 // 10 = 10 steps, three pictures sit the epoch out
        assert len(order) == len(set(order)) == 100
    assert flat[0] != flat[1] != flat[2] and flat[0] != sorted(flat[0])
    assert len({frozenset(order) for order in flat}) == 3  # and they are not the same three every time


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("n, batch, world", [(103, 12, 4), (103, 12, 1), (50, 120, 6), (7, 7, 7)])
def test_ranks_interleaved_are_the_batch_of_one_process(n, batch, world, flip):
    ds = make(n, seed=5, flip=flip)
    for step in (0, 3, 17):
        x, y = ds.batch(step, batch_size=batch)
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (batch, 1, 2, 3)
        parts = [ds.batch(step, rank, world, batch_size=batch) for rank in range(world)]
        for whole, mine in [(x, [p[0] for p in parts]), (y, [p[1] for p in parts])]:
            assert torch.equal(torch.stack(mine, 1).flatten(0, 1), whole)
        if batch <= n and not flip:
            assert len(set(numbers(x))) == batch  # disjoint over ranks


def test_a_batch_depends_on_seed_and_step_alone():
    a, b, other = make(40, seed=1, flip=True), make(40, seed=1, flip=True), make(40, seed=2, flip=True)
    forward = [a.batch(k, batch_size=8)[0] for k in range(20)]
    backward = [b.batch(k, batch_size=8)[0] for k in reversed(range(20))][::-1]
    assert all(torch.equal(p, q) for p, q in zip(forward, backward))
    assert not torch.equal(forward[0], other.batch(0, batch_size=8)[0])
    wrong = []

    def hammer(offset):  # many threads, one cached permutation
        for k in range(200):
            step = (k * 7 + offset) % 20
            if not torch.equal(a.batch(step, batch_size=8)[0], forward[step]):
                wrong.append(step)
    threads = [threading.Thread(target=hammer, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_a_batch_larger_than_the_set_is_whole_permutations_joined_and_cut():
    ds = make(10)
    for step in range(3):
        order = numbers(ds.batch(step, batch_size=25)[0])
        assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
        assert len(set(order[20:])) == 5


def test_flip_turns_about_half_of_the_rows_and_nothing_else():
    plain, flipped = make(200), make(200, flip=True)
    turned = 0
    for step in range(10):
        x, y = plain.batch(step, batch_size=200)
        fx, fy = flipped.batch(step, batch_size=200)
        rows = (fx == x.flip(-1)).flatten(1).all(1)
        assert torch.equal(y, fy) and torch.equal(fx[~rows], x[~rows])
        turned += rows.sum().item()
    assert 900 < turned < 1100


def test_bad_requests_raise_in_words():
    ds = make(20)
    for kwargs in [dict(step=0, batch_size=10, world=3), dict(step=-1), dict(step=0, rank=2, world=2),
                   dict(step=0, batch_size=0), dict(step=0, rank=-1)]:
        with pytest.raises(ValueError, match="cannot be divided|expected step"):
            ds.batch(**kwargs)
    with pytest.raises(ValueError, match="seeds are integers"):
        make(20, seed=-1).batch(0)


def test_labels_shapes_and_names_are_checked_once():
    good = make(6)
    meta = dict(shape=[1, 2, 3], classes=3, names=list("abc"), range=[0, 255], source="", count=6)
    for change, labels, word in [(dict(), good.labels + 1, "labels run from 1 to 3"),
                                 (dict(), good.labels - 1, "labels run from -1"),
                                 (dict(), good.labels[:5], "labels int64"),
                                 (dict(count=7), good.labels, "images"),
                                 (dict(shape=[3, 2, 1]), good.labels, "images"),
                                 (dict(names=["a"]), good.labels, "1 names for 3"),
                                 (dict(range=[5, 5]), good.labels, "range"),
                                 (dict(shape=None), good.labels, "not one of ours")]:
        with pytest.raises(data.UserError, match=word):
            data.Dataset("x", good.images, labels, {**meta, **change})


# ---------------------------------------------------------------- numbers


def test_generator_same_key_same_numbers_other_key_other_numbers():
    keys = [(1, 2), (2, 1), (1, 2, 0), (1,), (1, 0), (0, 1), (2**32, 5), (0, 1 + 5 * 2**32), ()]
    draw = {key: torch.randn(4, generator=data.generator(*key)).tolist() for key in keys}
    assert len({tuple(v) for v in draw.values()}) == len(draw)
    assert torch.randn(4, generator=data.generator(1, 2)).tolist() == draw[1, 2]


def test_to_uint8_rounds_clamps_and_inverts_pictures():
    u = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(data.to_uint8(2 * u.to(dtype) / 255 - 1), u)
    ds = make(256)
    assert numbers(ds.pictures(np.arange(256))) == list(range(256))
    x = torch.tensor([-1, 1, 0, -7, 7, float("inf"), -float("inf"), float("nan")])
    assert data.to_uint8(x).tolist() == [0, 255, 128, 0, 255, 255, 0, 0]
    k = torch.arange(255, dtype=torch.float64)  # just below k + 1/2 goes down, just above goes up
    assert torch.equal(data.to_uint8((k + 0.499) / 127.5 - 1), k.to(torch.uint8))
    assert torch.equal(data.to_uint8((k + 0.501) / 127.5 - 1), (k + 1).to(torch.uint8))
    assert data.to_uint8(torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)).shape == (2, 3, 4, 5)
    coarse = torch.linspace(-1, 1, 999).bfloat16()  # x + 1 in bfloat16 would lose most of what is there
    assert torch.equal(data.to_uint8(coarse), data.to_uint8(coarse.float()))


def test_the_digits_are_what_the_notice_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # beside data.py, not under the current directory
    ds = data.load("digits")
    assert len(ds) == 1797 and ds.shape == (1, 8, 8) and ds.classes == 10 and ds.range == (0, 16)
    assert ds.images.dtype == np.uint8 and ds.images.min() == 0 and ds.images.max() == 16
    x = ds.pictures(range(1797))
    assert x.shape == (1797, 1, 8, 8) and x.min() == -1 and x.max() == 1
    assert torch.equal(x, torch.from_numpy(ds.images.astype(np.float32) / 8 - 1))
    about = ds.describe()
    assert about["label_counts"] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    torch.save(about, tmp_path / "about.pt")
    assert torch.load(tmp_path / "about.pt", weights_only=True) == about
    assert " ".join(about) == "name shape classes names range source count label_counts"


# ---------------------------------------------------------------- prefetch


def workers():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_prefetch_keeps_the_order_and_works_ahead():
    made = []

    def source():
        for i in range(50):
            made.append(i)
            yield i
    stream = data.prefetch(source(), depth=3)
    assert next(stream) == 0 and len(workers()) == 1
    for _ in range(200):
        if len(made) >= 5:
            break
        time.sleep(0.01)
    assert len(made) == 5  # the one taken, three waiting, one in the thread's hand: never more
    assert list(stream) == list(range(1, 50)) and not workers()


def test_prefetch_raises_the_exception_after_the_items_before_it():
    def source():
        yield 1
        yield 2
        raise KeyError("spoiled")
    got = []
    with pytest.raises(KeyError, match="spoiled"):
        for item in data.prefetch(source()):
            got.append(item)
    assert got == [1, 2] and not workers()


@pytest.mark.parametrize("depth", [1, 4])
def test_prefetch_left_early_leaves_no_thread(depth):
    for taken in range(4):
        stream = data.prefetch(iter(int, 1), depth)  # endless
        for _ in range(taken):
            next(stream)
        stream.close()
        assert not workers()
    for item in data.prefetch(range(10**9), depth):
        break
    del item
    assert not workers()


# ---------------------------------------------------------------- downloads


class Server:
    """A web server on 127.0.0.1: files by path; `breaks` is how many replies it cuts half-way.

    pause: seconds before each tenth of a reply.
    """

    def __init__(self):
        outer, self.files, self.log, self.breaks, self.ranges = self, {}, [], 0, True
        self.pause = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                outer.log.append((self.path, wanted))
                body = outer.files.get(self.path)
                if body is None:
                    return self.send_error(404)
                start = int(wanted.split("=")[1].rstrip("-")) if wanted and outer.ranges else 0
                if start and start >= len(body):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                body = body[start:]
                if outer.breaks:
                    outer.breaks -= 1
                    body = body[:len(body) // 2]
                piece = len(body) // 10 + 1 if outer.pause else len(body)
                try:
                    while body:
                        time.sleep(outer.pause)
                        self.wfile.write(body[:piece])
                        body = body[piece:]
                except OSError:  # the other side has lost its patience
                    pass

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    s = Server()
    yield s
    s.server.shutdown()
    s.server.server_close()


@pytest.fixture
def tiny_mnist(monkeypatch):
    """Five digits in the real format, with the module's checksums pointed at them."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.array([3, 1, 4, 1, 5], np.uint8)
    raw = {"train-images-idx3-ubyte": np.array([2051, 5, 28, 28], ">i4").tobytes() + images.tobytes(),
           "train-labels-idx1-ubyte": np.array([2049, 5], ">i4").tobytes() + labels.tobytes()}
    packed = {name + ".gz": gzip.compress(body, mtime=0) for name, body in raw.items()}
    for name, body in raw.items():
        monkeypatch.setitem(data.INSIDE, name, md5(body))

    def point(*mirrors):
        for name, body in packed.items():
            monkeypatch.setitem(data.FILES, name, (md5(body), mirrors))
    point("http://127.0.0.1:9/", "http://127.0.0.1:9/")
    return dict(images=images, labels=labels, raw=raw, packed=packed, point=point)


def check_mnist(out, tiny):
    ds = data.load(out)
    assert ds.shape == (1, 32, 32) and ds.names == list("0123456789")
    assert ds.labels.tolist() == [3, 1, 4, 1, 5]
    assert isinstance(ds.images, np.memmap) and ds.name == out.name
    assert np.array_equal(ds.images[:, 0, 2:30, 2:30], tiny["images"])
    assert ds.images.sum(dtype=int) == tiny["images"].sum(dtype=int)  # zeros around
    assert sorted(os.listdir(out)) == ["images.npy", "labels.npy", "meta.json"]


def test_a_mirror_with_wrong_bytes_is_passed_over(server, tiny_mnist, tmp_path, capsys):
    for name, body in tiny_mnist["packed"].items():
        server.files["/bad/" + name] = b"<html>please log in</html>" * 20
        server.files["/good/" + name] = body
    tiny_mnist["point"](server.url + "/bad/", server.url + "/good/")
    data.mnist(None, tmp_path / "mnist")
    check_mnist(tmp_path / "mnist", tiny_mnist)
    assert [path.split("/")[1] for path, _ in server.log] == ["bad", "good"] * 2
    assert capsys.readouterr().out.count("next: python train.py --data") == 1
    data.mnist(None, tmp_path / "mnist")  # a second time: says so, asks nobody
    assert "already prepared" in capsys.readouterr().out and len(server.log) == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_broke(server, tiny_mnist, tmp_path, ranges):
    server.files = {"/" + name: body for name, body in tiny_mnist["packed"].items()}
    server.breaks, server.ranges = 1, ranges
    tiny_mnist["point"](server.url + "/", server.url + "/second/")
    data.mnist(None, tmp_path / "mnist")
    check_mnist(tmp_path / "mnist", tiny_mnist)
    half = len(tiny_mnist["packed"]["train-images-idx3-ubyte.gz"]) // 2
    assert [r for _, r in server.log] == [None, f"bytes={half}-", None]


@pytest.mark.parametrize("part", [b"rubbish", b"rubbish" * 3000])
def test_a_spoiled_part_of_an_earlier_run_is_thrown_away(server, tiny_mnist, tmp_path, part):
    server.files = {"/" + name: body for name, body in tiny_mnist["packed"].items()}
    tiny_mnist["point"](server.url + "/", server.url + "/none/")
    data._begin(tmp_path / "mnist", "mnist")
    (tmp_path / "mnist" / "download").mkdir()
    (tmp_path / "mnist" / "download" / "train-images-idx3-ubyte.gz.part").write_bytes(part)
    data.mnist(None, tmp_path / "mnist")
    check_mnist(tmp_path / "mnist", tiny_mnist)


def test_without_any_mirror_one_line_says_what_to_do(server, tiny_mnist, tmp_path):
    tiny_mnist["point"](server.url + "/", "http://127.0.0.1:9/")
    with pytest.raises(data.UserError) as error:
        data.mnist(None, tmp_path / "mnist")
    name, line = "train-images-idx3-ubyte.gz", str(error.value)
    assert line.startswith(f"could not download {name} (http://127.0.0.1:9/{name}: ")
    assert "\n" not in line and line.endswith(
        f"): get {server.url}/{name} in another way, put it into a folder DIR and type  "
        "python data.py mnist --from DIR")
    with pytest.raises(data.UserError, match="not prepared"):
        data.load(tmp_path / "mnist")


WEIGHTS = bytes(range(256)) * 8191  # some 2 MB: more than one block, however it is read


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_fetch_by_either_checksum_from_a_file_of_another_name(server, tmp_path, kind):
    right = hashlib.new(kind, WEIGHTS).hexdigest()
    server.files = {"/v1/a%20b.bin?download=1": WEIGHTS, "/wrong": WEIGHTS[:-1] + b"x"}
    addresses = [server.url + "/wrong", server.url + "/v1/a%20b.bin?download=1"]
    for checksum in (right, right.upper()):
        path = data.fetch("net.pt", checksum, addresses, tmp_path / "cache", "never shown")
        assert path == tmp_path / "cache" / "net.pt" and path.read_bytes() == WEIGHTS
        assert len(server.log) == 2                           # the second time nobody is asked
    assert data.checksum_of(path, kind) == right
    assert data.checksum_of(path) == hashlib.sha256(WEIGHTS).hexdigest()
    path.write_bytes(WEIGHTS[:1000])                          # what is there counts if it is right
    assert data.fetch("net.pt", right, addresses[1:], tmp_path / "cache", "") == path
    assert path.read_bytes() == WEIGHTS and not list(path.parent.glob("*.part"))
    with pytest.raises(data.UserError) as error:
        data.fetch("other.pt", right, addresses[:1], tmp_path / "cache", "do this instead")
    line = str(error.value)
    assert line == f"could not download other.pt ({addresses[0]}: wrong checksum): do this instead"
    assert {p.name for p in path.parent.iterdir()} == {"net.pt", ".net.pt.lock", ".other.pt.lock"}


def test_a_broken_download_goes_on_at_the_next_address_and_in_the_next_call(server, tmp_path):
    server.files, server.breaks = {"/a": WEIGHTS, "/b": WEIGHTS}, 9
    a, b, checksum = server.url + "/a", server.url + "/b", hashlib.sha256(WEIGHTS).hexdigest()
    with pytest.raises(data.UserError, match=r"broke after \d+ of 2096896 bytes"):
        data.fetch("net.pt", checksum, [a, b], tmp_path, "")
    half, asked = len(WEIGHTS) // 2, [wanted for _, wanted in server.log]
    assert asked == [None, *(f"bytes={len(WEIGHTS) - half // n}-" for n in (1, 2, 4))]
    assert os.listdir(tmp_path).count("net.pt.part") == 1 and not (tmp_path / "net.pt").exists()
    server.breaks = 0
    assert data.fetch("net.pt", checksum, [b], tmp_path, "").read_bytes() == WEIGHTS
    assert server.log[4:] == [("/b", f"bytes={len(WEIGHTS) - half // 8}-")]


def test_the_bar_shows_which_file(server, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(data, "tqdm", lambda **kwargs: shown.append(kwargs) or tqdm(**kwargs))
    server.files["/x"] = WEIGHTS
    data.fetch("net.pt", md5(WEIGHTS), [server.url + "/x"], tmp_path, "")
    assert [(bar["desc"], bar["total"]) for bar in shown] == [("net.pt", len(WEIGHTS))]


def test_a_slow_server_is_waited_for_and_a_silent_one_is_not(server, tmp_path, monkeypatch):
    assert data.SILENCE == 30
    server.files["/x"] = WEIGHTS
    monkeypatch.setattr(data, "SILENCE", 0.5)
    server.pause = 0.1                                        # ten times: longer than SILENCE in all
    path = data.fetch("net.pt", md5(WEIGHTS), [server.url + "/x"], tmp_path, "")
    assert path.read_bytes() == WEIGHTS and len(server.log) == 1
    server.pause = 1.5
    with pytest.raises(data.UserError, match="timed out"):
        data.fetch("other.pt", md5(WEIGHTS), [server.url + "/x"], tmp_path, "")


FETCHES = """
import sys, data
name, checksum, address, locks = sys.argv[1:]
def refused(*args):
    raise OSError(38, "Function not implemented")
if locks == "False":
    data.fcntl.flock = refused
print("ready", flush=True)
input()
path = data.fetch(name, checksum, [address], ".", "")
print(data.checksum_of(path), flush=True)
"""


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_fetch_one_file_at_once(server, tmp_path, locks):
    pytest.importorskip("fcntl")
    server.files["/x"], server.pause = WEIGHTS, 0.05
    checksum = hashlib.sha256(WEIGHTS).hexdigest()
    started = [subprocess.Popen([sys.executable, "-c", FETCHES, "net.pt", checksum, server.url + "/x",
                                 str(locks)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for _ in range(3)]
    assert [p.stdout.readline() for p in started] == ["ready\n"] * 3
    for p in started:
        p.stdin.write("\n")
        p.stdin.flush()
    assert [p.communicate(timeout=60)[0] for p in started] == [checksum + "\n"] * 3
    assert all(p.returncode == 0 for p in started)
    assert [wanted for _, wanted in server.log] == [None] * (1 if locks else 3)
    assert sorted(os.listdir(tmp_path)) == [".net.pt.lock", "net.pt"]


def test_mnist_from_files_the_user_has(tiny_mnist, tmp_path):
    raw, packed = tiny_mnist["raw"], tiny_mnist["packed"]
    kinds = dict(original=packed, unpacked=raw,
                 recompressed={n + ".gz": gzip.compress(b, 1, mtime=77) for n, b in raw.items()})
    for kind, files in kinds.items():
        (tmp_path / kind).mkdir()
        for name, body in files.items():
            (tmp_path / kind / name).write_bytes(body)
        data.mnist(tmp_path / kind, tmp_path / ("out_" + kind))
        check_mnist(tmp_path / ("out_" + kind), tiny_mnist)
        assert len(os.listdir(tmp_path / kind)) == 2  # the user's files stay
    image_file = tmp_path / "original" / "train-images-idx3-ubyte.gz"
    for body, word in [(image_file.read_bytes()[:-50], "damaged"),
                       (gzip.compress(b"other"), "not the published")]:
        image_file.write_bytes(body)
        with pytest.raises(data.UserError, match=word):
            data.mnist(tmp_path / "original", tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()


# Python 2 wrote numpy arrays like this (protocol 2, module numpy.core.multiarray, bytes as str).
def python2_pickle(entries):
    def text(s):
        return b"U" + bytes([len(s)]) + s if len(s) < 256 else b"T" + len(s).to_bytes(4, "little") + s

    def array(a):
        shape = b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in a.shape) + b"t"
        return (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
                + b"(K\x01" + shape + b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
                + b"(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
                + b"\x89" + text(a.tobytes()) + b"tb")

    def value(v):
        if isinstance(v, np.ndarray):
            return array(v)
        items = [text(i.encode()) if isinstance(i, str) else bytes([75, i]) for i in v]
        return b"](" + b"".join(items) + b"e"
    return b"\x80\x02}(" + b"".join(text(k.encode()) + value(v) for k, v in entries.items()) + b"u."


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def tiny_cifar(monkeypatch, tmp_path):
    """Five batches of two pictures in the real format: as a folder and as an archive."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 2, 3072), np.uint8)
    labels = [[9, 0], [1, 2], [3, 4], [5, 6], [7, 8]]
    files = {f"data_batch_{i + 1}": python2_pickle(dict(data=pixels[i], labels=labels[i]))
             for i in range(5)}
    files["batches.meta"] = python2_pickle(dict(label_names=NAMES))
    home = tmp_path / "have" / "cifar-10-batches-py"
    home.mkdir(parents=True)
    for name, body in files.items():
        (home / name).write_bytes(body)
        monkeypatch.setitem(data.INSIDE, name, md5(body))
    archive = tmp_path / "tar" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(home, "cifar-10-batches-py")
    return dict(home=home, archive=archive, pixels=pixels, labels=labels)


def test_cifar_from_folder_archive_and_server(tiny_cifar, server, tmp_path, monkeypatch):
    archive = tiny_cifar["archive"]
    server.files["/cifar-10-python.tar.gz"] = archive.read_bytes()
    monkeypatch.setitem(data.FILES, "cifar-10-python.tar.gz",
                        (md5(archive.read_bytes()), (server.url + "/none/", server.url + "/")))
    sources = [tiny_cifar["home"], tiny_cifar["home"].parent, archive, archive.parent, None]
    for i, source in enumerate(sources):
        out = tmp_path / f"out{i}"
        data.cifar10(source, out)
        ds = data.load(out)
        assert ds.shape == (3, 32, 32) and ds.names == NAMES and ds.labels.tolist() == [9, *range(9)]
        assert np.array_equal(ds.images, tiny_cifar["pixels"].reshape(10, 3, 32, 32))
        assert len(os.listdir(out)) == 3
    assert archive.exists() and len(os.listdir(tiny_cifar["home"])) == 6


def test_cifar_with_a_foreign_batch_or_a_broken_archive(tiny_cifar, tmp_path):
    archive, batch = tiny_cifar["archive"], tiny_cifar["home"] / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1] + b"x")
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(archive.read_bytes()[:3000])
    (tmp_path / "none").mkdir()
    for source, word in [(batch.parent, "data_batch_3 is not the published"), (broken, "damaged"),
                         (tmp_path / "none", "holds neither")]:
        with pytest.raises(data.UserError, match=word):
            data.cifar10(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hostile_pickle_runs_nothing(tiny_cifar, tmp_path, monkeypatch):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)
    evil = pickle.dumps({"data": Evil()}, protocol=2)
    (tiny_cifar["home"] / "data_batch_2").write_bytes(evil)
    monkeypatch.setitem(data.INSIDE, "data_batch_2", md5(evil))  # even if the checksum let it through
    with pytest.raises(data.UserError, match="asks for"):
        data.cifar10(tiny_cifar["home"], tmp_path / "out")
    for raw in [b"c__builtin__\neval\n(U\x0eprint('hello')tR.", b"cnumpy\nload\n.",
                b"cnumpy\nndarray.dump\n.", b"\x80\x02", b"", b"garbage",
                pickle.dumps(np.random.default_rng(0)), b"c_codecs\nencode\n(U\x03abcU\x05rot13tR.x"]:
        try:
            value = data.unpickle(raw)
        except data.UserError as error:
            assert "\n" not in str(error)
        else:
            assert value == b"abc"  # encode knows latin1 only, whatever codec is asked for
    assert not marker.exists()
    modern = data.unpickle(pickle.dumps({"data": np.arange(6, dtype=np.uint8)}, protocol=2)
                           .replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert modern["data"].tolist() == list(range(6))


# ---------------------------------------------------------------- your own pictures


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    def look(name, im, size=8, **save):
        im.save(tmp_path / name, **save)
        out = data.picture(tmp_path / name, size)
        assert out.shape == (3, size, size) and out.dtype == np.uint8
        return out
    rgb = Image.new("RGB", (20, 12), (10, 200, 30))
    for name in ["a.png", "b.webp"]:
        assert (look(name, rgb, lossless=True) == np.array([10, 200, 30])[:, None, None]).all()
    assert abs(look("c.JPG", rgb).astype(int) - np.array([10, 200, 30])[:, None, None]).max() <= 3
    assert (look("grey.png", Image.new("L", (9, 9), 77)) == 77).all()
    assert (look("bits.png", Image.new("1", (9, 9), 1)) == 255).all()
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 5, 6, 7])
    assert (look("palette.png", palette) == np.array([5, 6, 7])[:, None, None]).all()
    assert (look("hole.png", palette, transparency=1) == 255).all()  # transparent is white, not black
    assert (look("alpha.png", Image.new("RGBA", (9, 9), (0, 0, 0, 0))) == 255).all()
    assert (look("half.png", Image.new("LA", (9, 9), (0, 128))) == 127).all()
    assert (look("key.png", Image.new("RGB", (9, 9), (1, 2, 3)), transparency=(1, 2, 3)) == 255).all()
    cmyk = look("cmyk.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)))  # full cyan
    assert cmyk[0].max() < 10 and cmyk[1:].min() > 245
    # 16 bits: the whole scale is kept. Clipped it would be 255 almost everywhere.
    deep = np.repeat(np.array([0, 257 * 100, 257 * 200, 65535], np.uint16)[:, None], 4, 1)
    assert look("deep.png", Image.fromarray(deep), 4)[0, :, 0].tolist() == [0, 100, 200, 255]


def test_exif_rotation_centre_crop_and_lanczos(tmp_path):
    upright = np.zeros((30, 50, 3), np.uint8)
    upright[:, :, 0] = np.arange(50) * 5
    upright[:, :, 1] = np.arange(30)[:, None] * 8
    Image.fromarray(upright).save(tmp_path / "upright.png")
    crop = Image.fromarray(upright[:, 10:40]).resize((16, 16), Image.Resampling.LANCZOS)
    expected = data.picture(tmp_path / "upright.png", 16)
    assert np.array_equal(expected, np.asarray(crop).transpose(2, 0, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    turned = Image.fromarray(np.rot90(upright).copy())
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(data.picture(tmp_path / "turned.png", 16), expected)
    deep = Image.fromarray(np.rot90(upright[:, :, 0].astype(np.uint16) * 257).copy())
    deep.save(tmp_path / "deep.png", exif=exif)
    assert np.array_equal(data.picture(tmp_path / "deep.png", 16)[0], expected[0])
    for name in ("upright.png", "turned.png"):  # without a size: every pixel, the right way up
        assert np.array_equal(data.picture(tmp_path / name), upright.transpose(2, 0, 1))
    assert np.array_equal(data.picture(tmp_path / "deep.png"), upright[:, :, [0] * 3].transpose(2, 0, 1))


def tree(root, n=7, size=(24, 18), seed=3):
    """Two classes, one of them nested, with a damaged file in each."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        path = root / ("cats/deep" if i % 2 else "dogs") / f"{i:03d}.{['png', 'JPEG'][i % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
    whole = (root / "dogs" / "002.png").read_bytes()
    (root / "dogs" / "002.png").write_bytes(whole[:len(whole) // 2])
    (root / "cats" / "text.jpg").write_text("this is no picture")
    (root / "notes.txt").write_text("no picture either")
    (root / "cats" / ".hidden.png").write_text("nor this")
    return root


def test_a_folder_becomes_a_data_set_without_its_damaged_files(tmp_path, capsys):
    src, out = tree(tmp_path / "src"), tmp_path / "out"
    data.folder(src, 8, out)
    said = capsys.readouterr()
    assert "dogs/002.png" in said.err and "cats/text.jpg" in said.err and "left out 2 of 8" in said.err
    assert said.out.count("\n") == 1 and "6 pictures, shape 3x8x8, classes 2" in said.out
    ds = data.load(out)
    assert ds.names == ["cats", "dogs"] and ds.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert ds.range == (0, 255)
    assert np.array_equal(ds.images[4], data.picture(src / "dogs" / "004.png", 8))
    assert sorted(os.listdir(out)) == ["images.npy", "labels.npy", "meta.json"]
    before = (out / "images.npy").stat().st_mtime_ns
    data.folder(src, 8, out)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(data.UserError, match="already holds another data set, or one made from other files"):
        data.folder(src, 16, out)
    with pytest.raises(data.UserError, match=f"folder --src {src} --size 64 --out data/{src.name}$"):
        data.load(src)                              # the pictures as they are
    assert (out / "images.npy").stat().st_mtime_ns == before
    data.folder(src / "dogs", 8, tmp_path / "flat")
    assert data.load(tmp_path / "flat").names == ["all"]


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys):
    src = tree(tmp_path / "src", n=23)
    monkeypatch.setattr(data, "CHUNK", 4)
    data.folder(src, 8, tmp_path / "whole")
    real, calls = data.picture, []

    def failing(path, size):
        calls.append(path)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(path, size)
    for stop in (1, 6, 11, 18, 22):  # at any picture, in the middle of a chunk or not
        calls.clear()
        out = tmp_path / f"part{stop}"
        monkeypatch.setattr(data, "picture", failing)
        with pytest.raises(KeyboardInterrupt):
            data.folder(src, 8, out)
        assert (out / "preparing.json").exists()
        with open(out / "images.npy.part", "ab") as file:
            file.write(b"a torn write after the last entry")
        monkeypatch.setattr(data, "picture", lambda path, size: calls.append(path) or real(path, size))
        calls.clear()
        data.folder(src, 8, out)
        assert len(calls) <= 24 - (stop - 1) // 4 * 4 + 4  # it continued, and did not start again
        for name in ["images.npy", "labels.npy"]:
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("changed", [True, False])
@pytest.mark.parametrize("name, writes", [("preparing.json", 4), ("labels.npy", 1), ("meta.json", 1)])
def test_broken_off_at_any_write_and_a_changed_source_list(tmp_path, monkeypatch, name, writes, changed):
    src, out = tree(tmp_path / "src", n=9), tmp_path / "out"
    monkeypatch.setattr(data, "CHUNK", 2)
    real, seen = data.replacing, []

    def failing(path):
        seen.append(path.name)
        return 1 / 0 if seen.count(name) == writes else real(path)
    monkeypatch.setattr(data, "replacing", failing)
    with pytest.raises(ZeroDivisionError):
        data.folder(src, 8, out)
    with pytest.raises(data.UserError, match="not prepared"):
        data.load(out)
    monkeypatch.setattr(data, "replacing", real)
    if changed:
        Image.new("RGB", (9, 9), "red").save(src / "cats" / "aaa.png")
    data.folder(src, 8, out)
    data.folder(src, 8, tmp_path / "fresh")
    for file in ["images.npy", "labels.npy", "meta.json"]:
        assert (out / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()
    assert len(os.listdir(out)) == 3


def command(*args, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "data.py"), *map(str, args)], cwd=cwd, env=env,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_process_is_continued_by_the_same_command(tmp_path):
    src = tree(tmp_path / "src", n=300, size=(200, 200))
    data.folder(src, 16, tmp_path / "whole")
    process = command("folder", "--src", src, "--size", 16, "--out", "data/x", cwd=tmp_path)
    record = tmp_path / "data" / "x" / "preparing.json"
    while process.poll() is None and not (record.exists() and json.loads(record.read_text())["done"]):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert json.loads(record.read_text())["done"] < 301, "killed too late to show anything"
    process = command("folder", "--src", src, "--size", 16, "--out", "data/x", cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0 and "wrote data/x: 299 pictures" in out and "Traceback" not in err
    for name in ["images.npy", "labels.npy"]:
        assert (tmp_path / "data" / "x" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---------------------------------------------------------------- mistakes at the keyboard


def test_wrong_command_lines_get_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    src = tree(tmp_path / "src")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed" / "class").mkdir(parents=True)
    (tmp_path / "junk").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "a_file").write_text("x")
    for path in ["mixed/a.png", "mixed/class/b.png"]:
        Image.new("L", (4, 4)).save(tmp_path / path)
    (tmp_path / "junk" / "a.png").write_text("no picture")
    wrong = [
        ([], "required"),
        (["mnits"], "invalid choice"),
        (["mnist", "--form", "x"], "unrecognized"),
        (["mnist", "--from", "nowhere"], "does not exist"),
        (["mnist", "--from", "empty"], "train-images-idx3-ubyte.gz"),
        (["cifar10", "--from", "a_file"], "no archive"),
        (["cifar10", "--from", "empty"], "cifar-10-python.tar.gz"),
        (["folder", "--src", src], "--out"),
        (["folder", "--src", src, "--siz", 8, "--out", "o"], "unrecognized"),
        (["folder", "--src", src, "--size", "big", "--out", "o"], "invalid int"),
        (["folder", "--src", src, "--size", 0, "--out", "o"], "between 4 and 1024"),
        (["folder", "--src", "nowhere", "--out", "o"], "not a folder"),
        (["folder", "--src", "empty", "--out", "o"], "holds no picture"),
        (["folder", "--src", "mixed", "--out", "o"], "beside its class folders"),
        (["folder", "--src", src, "--out", src / "cats" / "out"], "among the pictures"),
        (["folder", "--src", src, "--out", src], "among the pictures"),
        (["folder", "--src", src, "--out", "other"], "already holds something else"),
        (["folder", "--src", src, "--out", "a_file"], "already holds something else"),
        (["folder", "--src", src, "--out", "a_file/below"], "a_file"),
    ]
    started = [command(*args, cwd=tmp_path) for args, _ in wrong[::5]]  # a second each: torch
    said = [(*process.communicate(), process.returncode) for process in started]
    monkeypatch.chdir(tmp_path)
    for args, _ in wrong:  # so all of them also run in this process
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            data.run(data.main)
        said.append((*capsys.readouterr(), stop.value.code))
    for (args, word), (out, err, status) in zip(wrong[::5] + wrong, said, strict=True):
        assert status == 2 and not out, (args, out, err)
        assert err.count("\n") == 1 and err.startswith("data.py"), (args, err)
        assert "error: " in err and word in err, (args, err)
    assert os.listdir(tmp_path / "other") == ["thesis.txt"] and not (tmp_path / "o").exists()
    with pytest.raises(data.UserError, match="none of the 1 pictures"):
        data.folder(tmp_path / "junk", 8, tmp_path / "o")


def test_a_set_that_is_not_prepared_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    far = tmp_path / "far"
    for name, typed in [("mnist", "python data.py mnist"), ("data/cifar10", "python data.py cifar10"),
                        ("imagenet256", "python data.py imagenet --src /path/to/train"),
                        ("cats", "python data.py folder --src DIR --size 64 --out data/cats"),
                        (far, f"python data.py folder --src DIR --size 64 --out {far}")]:
        with pytest.raises(data.UserError) as error:
            data.load(name)
        assert str(error.value).endswith("type  " + typed)
    Image.new("RGB", (5, 5)).save("a.png")
    Path("pics").mkdir()
    os.rename("a.png", "pics/a.png")
    data.folder(Path("pics"), 4, Path("data/cats"))
    for name in ["cats", "data/cats", tmp_path / "data" / "cats"]:
        assert data.load(name).name == "cats"
    Path("data/cats/images.npy").write_bytes(b"")
    with pytest.raises(data.UserError, match="damaged"):
        data.load("cats")
    Path("data/cats/meta.json").write_text("{")
    with pytest.raises(data.UserError):
        data.load("cats")


def test_run_turns_errors_into_one_line(capsys):
    def fail(error):
        def main():
            raise error
        with pytest.raises(SystemExit) as stop:
            data.run(main)
        return stop.value.code, capsys.readouterr().err
    code, line = fail(data.UserError("first\nsecond"))
    assert code == 2 and line.endswith(": error: first\n") and line.count("\n") == 1
    code, line = fail(FileNotFoundError(2, "No such file or directory", "a/b"))
    assert code == 2 and line.endswith(": error: a/b: No such file or directory\n")
    code, line = fail(KeyboardInterrupt())
    assert code == 130 and line.count("\n") == 1
    assert fail(ValueError())[1].count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        data.run(lambda: 1 / 0)
