"""data.py with real files, a real web server on this computer and real processes that are really killed."""
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "golden")]
import data  # noqa: E402
from synthetic import synthetic_state  # noqa: E402

FILES = ["images.npy", "labels.npy", "meta.json"]
WEIGHTS = bytes(range(256)) * 8191                      # some 2 MB: more than one block, however it is read
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ARCHIVE = "cifar-10-binary.tar.gz"


def make(n=20, labels=None, seed=0, flip=False):
    """A data set in memory: picture i is filled with the value i, but for its left column, which is 255."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 1, 2, 3)).copy()
    images[..., 0] = 255
    labels = np.asarray(np.arange(n) % 3 if labels is None else labels, np.int64)
    about = dict(name="test", classes=3, names=list("abc"), range=[0, 255])
    return data.Dataset(images, labels, about, seed, flip)


def numbers(x):
    """Which pictures of make() are in this batch."""
    return data.to_uint8(x)[:, 0, 0, 1].tolist()


def refused(words, function, *args, **options):
    """`function` raises ValueError or OSError, in one line that holds `words` -> the line."""
    with pytest.raises((ValueError, OSError)) as caught:
        function(*args, **options)
    line = str(caught.value)
    assert words in line and "\n" not in line, line
    return line


# ---- batches and numbers -----------------------------------------------------------------------------

def test_an_epoch_is_a_permutation_and_the_next_one_another():
    ds = make(103)
    epochs = [sum((numbers(ds.batch(10 * e + k, batch_size=10)[0]) for k in range(10)), []) for e in range(3)]
    for order in epochs:                                # 103 // 10 = 10 steps, three pictures sit it out
        assert len(order) == len(set(order)) == 100 and order != sorted(order)
    assert len({frozenset(order) for order in epochs}) == 3         # and not the same three every time


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("n, batch, world", [(103, 12, 4), (50, 120, 6), (7, 7, 7)])
def test_a_batch_depends_on_seed_and_step_alone_and_ranks_hold_each_their_rows(n, batch, world, flip):
    one, two, other = (make(n, seed=seed, flip=flip) for seed in (5, 5, 6))
    found = {step: one.batch(step, batch_size=batch) for step in range(18)}
    for step in (17, 0, 3, 16):                         # in another order, by another object
        x, y = found[step]
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (batch, 1, 2, 3)
        for rank in range(world):
            mine, own = two.batch(step, rank, world, batch_size=batch)
            assert torch.equal(mine, x[rank::world]) and torch.equal(own, y[rank::world])
    assert not torch.equal(x, other.batch(16, batch_size=batch)[0]) and not torch.equal(x, found[15][0])


def test_a_batch_larger_than_the_set_goes_round_in_one_permutation():
    orders = [numbers(make(10).batch(step, batch_size=25)[0]) for step in range(3)]
    for order in orders:
        assert sorted(order[:10]) == list(range(10)) and order == (3 * order[:10])[:25]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_flip_turns_about_half_of_the_rows_and_changes_nothing_else(whole, kind):
    coins = []
    for seed, step in ((seed, step) for seed in range(5) for step in range(2)):
        (x, y), (fx, fy) = (data.load(whole[kind], seed, flip).batch(step, 0, 1, 41) for flip in (0, 1))
        rows = (fx == x.flip(-1)).flatten(1).all(1)
        assert torch.equal(y, fy) and torch.equal(fx[~rows], x[~rows])
        coins.append(tuple(rows.tolist()))
    assert len(set(coins)) == 10 and 160 < sum(map(sum, coins)) < 250               # thrown anew in each step


def test_generator_gives_one_key_one_stream_and_other_keys_others():
    keys = [(1, 2), (2, 1), (1, 2, 0), (1,), (1, 0), (0, 1), (2**32, 5), (0, 1 + 5 * 2**32), (), (0,)]
    drawn = [torch.randn(4, generator=data.generator(*key)).tolist() for key in keys]
    assert len(set(map(tuple, drawn))) == len(keys)
    assert torch.randn(4, generator=data.generator(1, 2)).tolist() == drawn[0]
    refused("seeds are integers", data.generator, -1)


def test_to_uint8_gives_back_all_256_levels_rounds_clamps_and_never_truncates():
    u = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(data.to_uint8(2 * u.to(dtype) / 255 - 1), u)
    assert numbers(make(256).read(np.arange(256))) == u.tolist()
    x = torch.tensor([-1, 1, 0, -7, 7, float("inf"), -float("inf"), float("nan")])
    assert data.to_uint8(x).tolist() == [0, 255, 128, 0, 255, 255, 0, 0]
    k = torch.arange(255, dtype=torch.float64)          # just below k + 1/2 down, just above it up
    assert torch.equal(data.to_uint8((k + 0.499) / 127.5 - 1), u[:-1])
    assert torch.equal(data.to_uint8((k + 0.501) / 127.5 - 1), u[1:])
    coarse = torch.linspace(-1, 1, 999).bfloat16()      # x + 1 in bfloat16 would lose most of what is there
    assert torch.equal(data.to_uint8(coarse), data.to_uint8(coarse.float()))


def test_the_digits_need_no_preparation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                         # they lie beside data.py, not in the current folder
    ds = data.load("digits")
    assert (len(ds), ds.shape, ds.classes) == (1797, (1, 8, 8), 10)
    x = ds.read(np.arange(1797))
    assert torch.equal(x, torch.from_numpy(ds.images.astype(np.float32) / 8 - 1))
    assert x.min() == -1 and x.max() == 1 and ds.sample(x) is x and ds.sample(x, torch.zeros(1)) is x
    assert ds.describe()["label_counts"] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    torch.save(ds.describe(), "about.pt")               # plain values, that a checkpoint can hold
    assert torch.load("about.pt", weights_only=True) == ds.describe()


# ---- files and threads -------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
def test_replacing_puts_a_whole_file_in_the_place_of_the_old_one_or_none(tmp_path, error):
    path = tmp_path / "log.json"
    path.write_bytes(b"old")
    with pytest.raises(error) if error else contextlib.nullcontext(), data.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        if error:
            raise error
    assert path.read_bytes() == (b"old" if error else b"new") and os.listdir(tmp_path) == ["log.json"]


def test_prefetch_keeps_the_order_hands_on_an_exception_and_leaves_no_thread():
    made, before = [], threading.active_count()
    stream = data.prefetch((made.append(i) or 12 // (9 - i) for i in range(50)), depth=3)
    assert next(stream) == 1
    for _ in range(1000):                               # the one taken and three ahead
        time.sleep(0.01 * (len(made) < 4))
    time.sleep(0.1)
    assert len(made) == 4
    assert [next(stream) for _ in range(8)] == [1, 1, 2, 2, 3, 4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    for taken in (0, 1, 5):                             # left early
        stream = data.prefetch(iter(int, 1))            # endless
        assert [next(stream) for _ in range(taken)] == [0] * taken
        stream.close()
    assert threading.active_count() == before


# ---- downloads ---------------------------------------------------------------------------------------

@pytest.fixture
def server(monkeypatch, tmp_path_factory):
    """A web server on 127.0.0.1: .files by path, .asked in order, and paths with "broken" end half-way."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            s.asked.append(self.path)
            if (body := s.files.get(self.path)) is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if "broken" in self.path else body)
    Handler.log_message = Mock()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("ALPHAFLOW_CACHE", str(tmp_path_factory.mktemp("cache") / "new"))
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.files, s.asked, s.url = {}, [], f"http://127.0.0.1:{s.server_address[1]}"
    threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_fetch_asks_one_address_after_the_other_until_the_checksum_is_right(server, tmp_path, kind):
    right = hashlib.new(kind, WEIGHTS).hexdigest()
    server.files = {"/wrong": WEIGHTS[:-1] + b"x", "/broken": WEIGHTS, "/v1/right?download=1": WEIGHTS}
    paths = ["/missing", "/wrong", "/broken", "/v1/right?download=1", "/never"]
    urls = [f"http://127.0.0.1:{free_port()}/", *(server.url + path for path in paths)]
    for _ in range(2):                                  # the second time nobody is asked
        path = data.fetch("net.pt", right, urls, tmp_path / "a" / "cache")
        assert path == tmp_path / "a" / "cache" / "net.pt" and path.read_bytes() == WEIGHTS
        assert server.asked == paths[:-1] and os.listdir(path.parent) == ["net.pt"]
    assert data.checksum_of(path, kind) == right
    path.write_bytes(b"my own work")                    # a file of the right name alone is not trusted
    refused("not the published file", data.fetch, "net.pt", right, urls, path.parent)
    assert path.read_bytes() == b"my own work"


@pytest.mark.parametrize("path", ["/wrong", "/broken", "/missing", "dead"])
def test_fetch_without_a_good_address_says_so_in_one_line_and_leaves_no_file(server, tmp_path, path):
    server.files = {"/wrong": b"<html>please log in</html>", "/broken": WEIGHTS}
    url = f"http://127.0.0.1:{free_port()}/x" if path == "dead" else server.url + path
    line = refused("no net.pt", data.fetch, "net.pt", md5(WEIGHTS), [url], tmp_path)
    assert url in line and str(tmp_path / "net.pt") in line and os.listdir(tmp_path) == []


def md5(raw):
    return hashlib.md5(raw).hexdigest()


def command(*args):
    """The command line in this process: main() of data.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["data.py", *map(str, args)])
        data.main()


@pytest.fixture
def mnist(server, monkeypatch):
    """Five digits in the real format -> pixels and files; checksums and addresses of data.py say these."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    raw = {"train-images-idx3-ubyte": np.array([2051, 5, 28, 28], ">i4").tobytes() + pixels.tobytes(),
           "train-labels-idx1-ubyte": np.array([2049, 5], ">i4").tobytes() + bytes([3, 1, 4, 1, 5])}
    packed = {f"{name}.gz": gzip.compress(body, mtime=0) for name, body in raw.items()}
    monkeypatch.setattr(data, "MNIST", {f"{k}.gz": (md5(packed[f"{k}.gz"]), md5(raw[k])) for k in raw})
    monkeypatch.setattr(data, "LECUN", (server.url + "/bad/", server.url + "/good/"))
    for name, body in packed.items():
        server.files |= {f"/bad/{name}": b"<html>", f"/good/{name}": body}
    return pixels, packed


@pytest.mark.parametrize("kind", ["downloaded", "published", "unpacked", "repacked"])
def test_mnist(mnist, server, tmp_path, capsys, kind):
    pixels, packed = mnist
    out, source = tmp_path / "out", ["--from", tmp_path] if kind != "downloaded" else []
    for name, body in packed.items() if source else ():
        raw = gzip.decompress(body)
        anew = dict(published=body, unpacked=raw, repacked=gzip.compress(raw, 1, mtime=77))
        (tmp_path / name.removesuffix(".gz" * (kind == "unpacked"))).write_bytes(anew[kind])
    command("mnist", "--out", out, *source)
    ds = data.load(out)
    assert ds.shape == (1, 32, 32) and ds.classes == 10 and ds.labels.tolist() == [3, 1, 4, 1, 5]
    assert np.array_equal(ds.images, np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None])
    assert isinstance(ds.images, np.memmap) and sorted(os.listdir(out)) == FILES
    assert len(server.asked) == (0 if source else 4) and len(os.listdir(tmp_path)) == (3 if source else 1)
    assert f"next: python train.py --data {out}" in capsys.readouterr().out


@pytest.fixture
def cifar(server, monkeypatch):
    """Five batches of two pictures in the real format -> rows of bytes, first the label; and the archive."""
    rows = np.random.default_rng(1).integers(0, 256, (10, 3073), np.uint8)
    rows[:, 0] = [9, *range(9)]
    files = {f"data_batch_{i + 1}.bin": rows[2 * i:2 * i + 2].tobytes() for i in range(5)}
    files |= {"test_batch.bin": bytes(3073), "batches.meta.txt": "\n".join([*NAMES, "", ""]).encode()}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in sorted(files, reverse=True):        # the order in the archive is not the order of batches
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(files[name])
            tar.addfile(entry, io.BytesIO(files[name]))
    server.files[f"/{ARCHIVE}"] = archive.getvalue()
    monkeypatch.setattr(data, "CIFAR10", (ARCHIVE, md5(archive.getvalue()), [f"{server.url}/{ARCHIVE}"]))
    return rows, archive.getvalue()


@pytest.mark.parametrize("downloaded", [True, False])
def test_cifar10(cifar, server, tmp_path, downloaded):
    (tmp_path / ARCHIVE).write_bytes(cifar[1])
    command("cifar10", "--out", tmp_path / "out", *([] if downloaded else ["--from", tmp_path]))
    ds = data.load(tmp_path / "out")
    assert ds.shape == (3, 32, 32) and ds.about["names"] == NAMES and ds.labels.tolist() == [9, *range(9)]
    assert np.array_equal(ds.images.reshape(10, 3072), cifar[0][:, 1:]) and len(server.asked) == downloaded
    assert sorted(os.listdir(tmp_path / "out")) == FILES and (tmp_path / ARCHIVE).exists()


@pytest.mark.parametrize("what, name", [("mnist", "train-labels-idx1-ubyte.gz"), ("cifar10", ARCHIVE)])
@pytest.mark.parametrize("spoil", [lambda a: b"", lambda a: a[:-50], lambda a: gzip.compress(b"x"), None])
def test_files_of_the_user_that_are_damaged_or_missing(mnist, cifar, server, tmp_path, what, name, spoil):
    for file, body in {**mnist[1], ARCHIVE: cifar[1]}.items():
        if file != name or spoil:
            (tmp_path / file).write_bytes(spoil(body) if file == name else body)
    refused(name, command, what, "--from", tmp_path, "--out", tmp_path / "out")
    refused("not prepared", data.load, tmp_path / "out")
    assert not server.asked                             # nor is another one downloaded


# ---- pictures ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, mode, colour, note, expected", [
    ("a.png", "RGB", (10, 200, 30), {}, (10, 200, 30)), ("a.JPG", "RGB", (10, 200, 30), {}, (10, 200, 30)),
    ("a.webp", "RGB", (10, 200, 30), {"lossless": True}, (10, 200, 30)), ("a.jpeg", "L", 7, {}, (7, 7, 7)),
    ("a.jpg", "CMYK", (255, 0, 0, 0), {}, (0, 255, 255)), ("a.png", "1", 1, {}, (255, 255, 255)),
    ("a.png", "LA", (0, 128), {}, (127, 127, 127)),     # and what is transparent is white, not black
    ("a.png", "RGBA", (0, 0, 0, 0), {}, (255, 255, 255))])
def test_every_kind_of_picture_becomes_rgb(tmp_path, name, mode, colour, note, expected):
    Image.new(mode, (16, 12), colour).save(tmp_path / name, **note)
    found = data.picture(tmp_path / name, 8)
    assert found.shape == (3, 8, 8) and found.dtype == np.uint8
    assert abs(found - np.array(expected)[:, None, None]).max() <= (10 if ".j" in name.lower() else 0)


def test_exif_rotation_centre_crop_and_sixteen_bits(tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    crop = Image.fromarray(upright[:, 10:40]).resize((16, 16), Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[0x0112] = 6                                    # the camera was turned: show it a quarter clockwise
    for turns, note in ((0, {}), (1, {"exif": exif})):
        Image.fromarray(np.rot90(upright, turns).copy()).save(tmp_path / "a.png", **note)
        assert np.array_equal(data.picture(tmp_path / "a.png", 16), np.asarray(crop).transpose(2, 0, 1))
        assert np.array_equal(data.picture(tmp_path / "a.png"), upright.transpose(2, 0, 1))  # all of it
        deep = upright[:, :, 0].astype(np.uint16) * 257                 # clipped, most would be white
        Image.fromarray(np.rot90(deep, turns).copy()).save(tmp_path / "b.png", **note)
        assert np.array_equal(data.picture(tmp_path / "b.png"), upright[:, :, [0] * 3].transpose(2, 0, 1))


# ---- preparing ---------------------------------------------------------------------------------------

BAD = ["a/07.png", "b/00.jpg", "c/12.webp"]             # what src damages, without "deeper"
MODES = dict(a=("png", "RGB", "L", "RGBA", "P", "1", "LA"), b=("jpg", "RGB", "L", "CMYK"), c=("webp", "RGB"))
CHUNK = 8                                               # 44 pictures: six chunks


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    """44 small pictures in three classes, of several sizes, modes and formats; three are damaged."""
    root, rng = tmp_path_factory.mktemp("pictures") / "train", np.random.default_rng(0)
    for i in range(44):
        name, i = "acb"[i // 20], i % 20
        kind, *modes = MODES[name]
        im = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(rng.integers(20, 90, 2))
        path = root / name / ("deeper" if i % 3 == 2 else "") / f"{i:02d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        im.convert(modes[i % len(modes)]).save(path)
        if f"{name}/{path.name}" in BAD:
            path.write_bytes(path.read_bytes()[:40])
    for name in ("notes.txt", "a/.hidden.png", ".hidden/b.png"):        # these do not count
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no picture")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A file of small weights for the VAE."""
    with np.load(HERE / "golden" / "vae.npz") as golden:
        state = synthetic_state(json.loads(str(golden["small_keys_json"])))
    path = tmp_path_factory.mktemp("vae") / "small.pt"
    torch.save({name: torch.from_numpy(w) for name, w in state.items()}, path)
    return path


def arguments(src, out, vae=None):
    latents = ["--latents", "--vae", str(vae), "--device", "cpu"] if vae else []
    return ["folder", "--src", str(src), "--size", "32", "--out", str(out), *latents]


@pytest.fixture(scope="module")
def whole(src, vae, tmp_path_factory):
    """{"pixels": folder, "latents": folder}, each prepared by one process without a break."""
    outs = {kind: tmp_path_factory.mktemp("whole") / kind for kind in ("pixels", "latents")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", CHUNK)             # for all tests that use it
        command(*arguments(src, outs["pixels"]))
        command(*arguments(src, outs["latents"], vae))
        yield outs


def same_files(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


def test_a_tree_becomes_a_data_set_without_its_damaged_files(src, whole, tmp_path, capsys):
    command(*arguments(src, tmp_path / "out"))
    said = capsys.readouterr()
    assert all(f"{src.name}/{name}" in said.err.replace("deeper/", "") for name in BAD)
    assert said.err.count("skipped") == 3 and "41 pictures in 3 classes" in said.out
    files, labels, names = data.listing(src)
    assert len(files) == 44 and names == list("abc") and labels == [0] * 20 + [1] * 4 + [2] * 20
    bad = np.array([str(path.relative_to(src)).replace("deeper/", "") in BAD for path in files])
    images, stored = (np.load(whole["pixels"] / name) for name in FILES[:2])
    assert stored.tolist() == np.where(bad, -1, labels).tolist() and not images[bad].any()
    assert np.array_equal(images[~bad], [data.picture(files[k], 32) for k in np.flatnonzero(~bad)])
    ds = data.load(tmp_path / "out")                    # what is damaged is not seen
    assert len(ds) == 41 and ds.about["names"] == names and ds.describe()["label_counts"] == [19, 3, 19]
    x, y = ds.batch(0, batch_size=41)
    seen = {(u.numpy().tobytes(), k) for u, k in zip(data.to_uint8(x), y.tolist())}
    assert seen == {(u.tobytes(), k) for u, k in zip(images[~bad], stored[~bad].tolist())}
    assert same_files(tmp_path / "out", whole["pixels"]) and sorted(os.listdir(tmp_path / "out")) == FILES


def test_a_finished_set_is_reported_and_another_one_refused(src, vae, whole, monkeypatch, capsys):
    monkeypatch.setattr(data, "find_vae", None)         # nor is a VAE asked for
    out = whole["latents"]
    (out / "unfinished-0").mkdir()                      # of a kill between the last file and the tidying up
    before = [(out / name).stat().st_mtime_ns for name in FILES]
    command(*arguments(src, out, vae))
    assert f"{out} is prepared: 41 pictures in 3 classes" in capsys.readouterr().out
    for args in (arguments(src, out), arguments(src / "c" / "deeper", out, vae), ["mnist", "--out", out]):
        refused("already holds another data set", command, *args)
    assert before == [(out / name).stat().st_mtime_ns for name in FILES] and len(os.listdir(out)) == 3


DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data
data.CHUNK, point = {CHUNK}, os.environ["KILL"]
def replace(a, b, real=os.replace):
    if os.path.basename(b) == point:
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
def write(self, rows, real=data.Shards.write, **arrays):
    if point == str(rows.start):
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, rows, **arrays)
os.replace, data.Shards.write = replace, write
data.run(data.main)
"""


def drive(folder, args, kill="", world=1):
    """data.py in processes of its own, killed with SIGKILL at `kill` -> the ended process."""
    (folder / "drive.py").write_text(DRIVER)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", f"--master_port={free_port()}"]
    return subprocess.run([sys.executable, *(launcher if world > 1 else []), "drive.py", *args], cwd=folder,
                          env={**os.environ, "KILL": kill}, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("point, left", [("000000000.npz", 44), ("16", 28), ("images.npy", 0),
                                         ("labels.npy", 0), ("meta.json", 0)])
def test_killed_and_continued_makes_the_same_bytes(src, whole, tmp_path, monkeypatch, point, left):
    out, looked, picture = tmp_path / "out", [], data.picture
    assert drive(tmp_path, arguments(src, out), point).returncode == -9
    refused(f"not prepared: type  python data.py folder --src {out} ", data.load, out)
    monkeypatch.setattr(data, "picture", lambda path, size: looked.append(path) or picture(path, size))
    command(*arguments(src, out))
    assert len(looked) == left                          # it went on, and did not begin again
    assert same_files(out, whole["pixels"]) and sorted(os.listdir(out)) == FILES


def test_two_processes_go_on_after_a_kill_and_make_the_same_bytes(src, vae, whole, tmp_path):
    args = arguments(src, tmp_path / "out", vae)
    assert drive(tmp_path, args, "24").returncode == -9
    ended = drive(tmp_path, args, world=2)
    assert ended.returncode == 0 and ended.stdout.count("is prepared") == 1, ended.stderr
    assert same_files(tmp_path / "out", whole["latents"])


def test_moments_are_those_of_the_vae_and_statistics_those_of_numpy(src, vae, whole):
    ds, files = data.load(whole["latents"]), data.listing(src)[0]
    images, labels = (np.load(whole["latents"] / name) for name in FILES[:2])
    assert isinstance(ds, data.Latents) and ds.shape == (4, 4, 4) and len(ds) == 41
    assert images.shape == (44, 8, 4, 4) and ds.batch(0)[0].dtype == torch.float16
    good = np.flatnonzero(labels >= 0)
    x = torch.from_numpy(np.stack([data.picture(files[k], 32) for k in good])).float() / 127.5 - 1
    with torch.no_grad():
        expected = torch.cat(data.find_vae(str(vae)).encode(x), 1)
    assert np.allclose(images[good], expected, rtol=2e-3, atol=2e-3)
    mean, logvar = np.split(images[good].astype(np.float64), 2, 1)
    stats = np.stack([mean.mean(0), mean.var(0) + np.exp(logvar).mean(0)])
    assert np.allclose(json.loads((whole["latents"] / "meta.json").read_text())["stats"], stats, rtol=1e-11)


def test_sample_is_one_normalised_latent_of_each_distribution(whole):
    ds = data.load(whole["latents"])
    x = ds.read(np.arange(41)).repeat(500, 1, 1, 1)
    noise = torch.randn(len(x), 4, 4, 4, generator=data.generator(1))
    (mean, logvar), z = x.double().chunk(2, 1), ds.sample(x, noise)
    assert z.dtype == torch.float32
    assert np.allclose(z, (mean + (logvar / 2).exp() * noise - ds.mean) / ds.std, atol=1e-4)
    assert z.mean(0).abs().max() < 0.05 and (z.var(0) - 1).abs().max() < 0.1        # over the whole set


# ---- mistakes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, name, spoil", [
    ("pixels", "images.npy", lambda a: a[:-1]), ("pixels", "images.npy", lambda a: a.astype(np.float32)),
    ("latents", "images.npy", lambda a: a[:, :4]), ("latents", "labels.npy", lambda a: a[1:]),
    ("pixels", "labels.npy", lambda a: a + 9), ("pixels", "labels.npy", lambda a: a * 0 - 1),
    ("pixels", "images.npy", None), ("pixels", "labels.npy", None), ("latents", "meta.json", None)])
def test_a_damaged_data_set_is_refused_in_one_line(whole, tmp_path, kind, name, spoil):
    for file in FILES:
        body = (whole[kind] / file).read_bytes()
        (tmp_path / file).write_bytes(body[:50] if file == name and not spoil else body)
    if spoil:
        np.save(tmp_path / name, spoil(np.load(tmp_path / name)))
    refused(f"{tmp_path} is damaged", data.load, tmp_path)


@pytest.mark.parametrize("args, words", [
    ("", "required"), ("mnits", "invalid choice"), ("mnist --from nowhere", "nowhere"), ("imagenet", "--src"),
    ("folder --src src", "--out"),
    ("folder --src src --size 0 --out o", "--size 0"), ("folder --src src --out a_file", "a_file"),
    ("folder --src nowhere --out o", "nowhere is no folder or holds no picture"),
    ("folder --src mixed --out o", "beside its class folders"), ("mnist --fro x", "unrecognized"),
    ("imagenet --src src --size 250", "multiple of 8"), ("imagenet --src src --device abacus", "abacus"),
    ("imagenet --src src --vae nowhere.pt --device cpu", "nowhere.pt"),
    ("imagenet --src src --vae a_file --device cpu", "a_file"),
    ("imagenet --src src --vae other.pt --device cpu", "not the weights of a VAE"),
    ("folder --src src --latents --size 8 --vae inf.pt --device cpu --out o", "infinities or NaN")])
def test_a_wrong_command_line_gets_one_line_and_status_2(vae, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    for path in ("src/a/b.png", "mixed/a.png", "mixed/class/b.png"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    Path("a_file").write_text("no picture and no weights")
    torch.save({"weight": torch.zeros(3)}, "other.pt")
    torch.save({name: w / 0 for name, w in torch.load(vae).items()}, "inf.pt")
    monkeypatch.setattr(sys, "argv", ["data.py", *args.split()])
    with pytest.raises(SystemExit) as stop:
        data.run(data.main)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "chunk" not in line]        # a progress bar aside
    assert stop.value.code == 2 and not out and not Path("o/meta.json").exists()
    assert len(lines) == 1 and lines[0].startswith("data.py: error: ") and words in lines[0], err


@pytest.mark.parametrize("error, status", [(ValueError("first\nsecond"), 2), (KeyboardInterrupt(), 130),
                                           (FileNotFoundError(2, "first second", "a/b"), 2)])
@pytest.mark.parametrize("rank", ["0", "1"])            # of processes that err alike one says it
def test_run_says_what_a_user_can_mend_and_hides_no_mistake_of_ours(monkeypatch, capsys, error, status, rank):
    """A process that is not the first waits before it speaks: if all are wrong, the first one ends it."""
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        data.run(Mock(side_effect=error))
    err = capsys.readouterr().err
    assert stop.value.code == status and len(waits) == (status == 2 and rank == "1")
    assert err.count("\n") == err.count("first second") == (status == 2)
    monkeypatch.setenv("DEBUG", "1")                    # shows where it comes from
    for error in (OSError, ZeroDivisionError):
        with pytest.raises(error):
            data.run(Mock(side_effect=error))
