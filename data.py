"""
Pictures in, tensors out. Everything that trains, samples or measures gets its pictures here.

    python train.py                                               # the digits in assets/: no preparation
    python data.py mnist                                          # downloads 10 MB, writes data/mnist
    python data.py cifar10                                        # downloads 170 MB, writes data/cifar10
    python data.py mnist --from DIR                               # the same from files you already have
    python data.py folder --src DIR --size 64 --out data/flowers  # your own .png .jpg .jpeg .webp

Each command prepares a data set once, in a folder of three files: images.npy (uint8, N x C x H x W),
labels.npy (int64, N) and meta.json, which is written last: where it is, the other two are whole.
A broken run is continued by typing the same command again. The rest of the program sees only this:

    ds = load("mnist")                          # or "digits", or the path of any prepared folder
    x, y = ds.batch(step, batch_size=256)       # x (B, C, H, W) float32 in [-1, 1], y (B,) int64
"""
import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import operator
import os
import pickle
import queue
import shlex
import shutil
import sys
import tarfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---------------------------------------------------------------- talking to the person at the keyboard


class UserError(ValueError):
    """What the person at the keyboard can mend: one line, what was given and what to type instead."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" and "(default: False)" tell nobody anything
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line, shows the defaults and guesses no abbreviation."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)  # --siz today may be another flag tomorrow
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def run(main):
    """Call main(). ValueError and OSError become one line on stderr and exit status 2, Ctrl-C 130."""
    try:
        main()
        return
    except (OSError, ValueError) as error:
        line, status = str(error), 2
        if getattr(error, "filename", None) and getattr(error, "strerror", None):
            line = f"{error.filename}: {error.strerror}"
        line = "error: " + (line.splitlines() or [type(error).__name__])[0]
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------- three rules the whole project shares


def _seeds(*key):
    # SeedSequence alone pads with zeros and cuts big integers into 32-bit words: (1, 2) and (1, 2, 0)
    # would be one seed. The length in front and 64 bits for each integer keep different keys different.
    key = [operator.index(k) for k in key]
    if not all(0 <= k < 2**64 for k in key):
        raise ValueError(f"seeds are integers from 0 to 2**64 - 1, not {key}")
    return np.random.SeedSequence(np.array([len(key), *key], dtype=np.uint64).view(np.uint32))


def generator(*key, device="cpu"):
    """A torch.Generator on `device` seeded by the integers in `key`: same key, same numbers.

    The order counts: (1, 2) and (2, 1) differ. ValueError for an integer outside 0 .. 2**64 - 1.
    """
    return torch.Generator(device).manual_seed(int(_seeds(*key).generate_state(1, np.uint64)[0]))


def to_uint8(x):
    """Pictures in [-1, 1], any shape -> uint8, same shape. The one rounding rule of this project.

    Values outside are clamped, infinities too; NaN raises nothing and becomes 0.
    """
    # Rounded, not truncated: 2u/255 - 1 is inexact in floating point, and rounding returns to the same u
    # where truncation loses a level now and then. Truncation also darkens every picture by half a level,
    # which a Frechet distance sees. bfloat16 carries 8 bits, so the arithmetic is float32 at least.
    x = x if x.dtype == torch.float64 else x.float()
    return ((x.nan_to_num(nan=-1.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@contextlib.contextmanager
def replacing(path, sync=True):
    """A file to write; it gets the name `path` when the block ends well. Until then an old one stays."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            if sync:  # or a power cut may keep the new name and lose the bytes
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- a data set


class Dataset:
    """Labelled pictures, and which of them belong to which step.

    name; shape (C, H, W); classes; names, one str a class; labels int64 (N,); images uint8 (N, C, H, W),
    memory-mapped if prepared; range (lo, hi) of the stored integers; source, where from; seed; flip.
    UserError if images, labels and meta do not agree, or a label is not in 0 .. classes - 1.
    """

    def __init__(self, name, images, labels, meta, seed=0, flip=False):
        self.name, self.images, self.labels = name, images, labels
        self.seed, self.flip = int(seed), bool(flip)
        try:
            self.shape, self.range = tuple(map(int, meta["shape"])), tuple(map(int, meta["range"]))
            self.classes, self.names = int(meta["classes"]), list(map(str, meta["names"]))
            self.source, n = str(meta["source"]), int(meta["count"])
            (_, _, _), (lo, hi) = self.shape, self.range
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"data set {name}: meta.json is not one of ours ({error!r})") from None
        for wrong, what in [
            (n < 1 or images.dtype != np.uint8 or images.shape != (n, *self.shape),
             f"images {images.dtype} {images.shape}, expected uint8 {(n, *self.shape)}"),
            (labels.dtype != np.int64 or labels.shape != (n,),
             f"labels {labels.dtype} {labels.shape}, expected int64 {(n,)}"),
            (len(self.names) != self.classes, f"{len(self.names)} names for {self.classes} classes"),
            (not 0 <= lo < hi <= 255, f"range {self.range}, expected lo < hi within 0 .. 255"),
        ]:
            if wrong:
                raise UserError(f"data set {name} does not fit together: {what}; prepare it again")
        if labels.min() < 0 or labels.max() >= self.classes:
            raise UserError(f"data set {name}: labels run from {labels.min()} to {labels.max()}, "
                            f"allowed are 0 to {self.classes - 1}; prepare it again")
        self._cache = (None, None)

    def __len__(self):
        return len(self.labels)

    def describe(self):
        """Plain str, int and list: a checkpoint that holds it still loads with weights_only=True."""
        return dict(name=self.name, shape=list(self.shape), classes=self.classes, names=list(self.names),
                    range=list(self.range), source=self.source, count=len(self),
                    label_counts=np.bincount(self.labels, minlength=self.classes).tolist())

    def pictures(self, index):
        """The pictures at `index` (whatever numpy indexes with), float32 (b, C, H, W) in [-1, 1]."""
        u = np.asarray(self.images[index]).reshape(-1, *self.shape)
        lo, hi = self.range
        x = torch.from_numpy(u.astype(np.float32))                                # (b, C, H, W)
        return x.sub_(lo).mul_(2).div_(hi - lo).sub_(1)

    def batch(self, step, rank=0, world=1, batch_size=64):
        """Pictures x (b, C, H, W) and labels y (b,) of `step` for process `rank` of `world`.

        batch_size is the global one: b = batch_size / world, namely rows rank, rank + world, ... of the
        batch that one process alone would get. A pure function of (seed, step): there is no position to
        save or restore. An epoch is one permutation cut into whole batches; the rest sits it out.
        ValueError if world does not divide batch_size, or step or rank is out of range.
        """
        if batch_size < 1 or world < 1 or batch_size % world:
            raise ValueError(f"a global batch of {batch_size} cannot be divided over {world} processes")
        if step < 0 or not 0 <= rank < world:
            raise ValueError(f"step {step}, rank {rank}: expected step >= 0 and 0 <= rank < {world}")
        rows = self._rows(step, batch_size)[rank::world]                          # (b,)
        x, y = self.pictures(rows), torch.from_numpy(self.labels[rows])
        if self.flip:  # one coin a row of the global batch, so that world does not change it
            coins = np.random.default_rng(_seeds(1, self.seed, step)).random(batch_size) < 0.5
            mine = torch.from_numpy(coins[rank::world])
            x[mine] = x[mine].flip(-1)
        return x, y

    def _rows(self, step, batch_size):
        """-> the picture numbers (batch_size,) of the global batch."""
        passes = -(-batch_size // len(self))  # permutations joined: 1, or more if the batch exceeds N
        epoch, k = divmod(step, passes * len(self) // batch_size)
        # Key and order are replaced together by one assignment, so a second thread sees the old pair or
        # the new one and never a mixture: no lock.
        key, order = self._cache
        if key != (epoch, passes):
            order = np.concatenate([np.random.default_rng(_seeds(0, self.seed, e)).permutation(len(self))
                                    for e in range(epoch * passes, (epoch + 1) * passes)])
            self._cache = ((epoch, passes), order)
        return order[k * batch_size:(k + 1) * batch_size]


def load(name_or_folder, seed=0, flip=False):
    """-> Dataset: "digits", a name prepared under data/, or the path of any prepared folder.

    UserError with the command to type if it is not prepared, or if its files do not fit together.
    """
    name = str(name_or_folder)
    if name == "digits":
        with np.load(Path(__file__).parent / "assets" / "digits.npz") as file:
            images, labels = file["images"][:, None], file["labels"].astype(np.int64)  # (1797, 1, 8, 8)
        meta = dict(shape=[1, 8, 8], classes=10, names="0123456789", range=[0, 16], count=len(images),
                    source="UCI Optical Recognition of Handwritten Digits, test part, CC BY 4.0")
        return Dataset(name, images, labels, meta, seed, flip)
    places = [Path("data") / name, Path(name)]
    folder = next((p for p in places if (p / "meta.json").is_file()), places[len(Path(name).parts) > 1])
    if not (folder / "meta.json").is_file():
        known = dict(mnist="mnist", cifar10="cifar10", imagenet256="imagenet --src /path/to/train")
        command = known.get(folder.name, f"folder --src DIR --size 64 --out {shlex.quote(str(folder))}")
        raise UserError(f"data set {name!r} is not prepared (no {folder / 'meta.json'}): "
                        f"type  python data.py {command}")
    try:
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}): delete it and prepare it again") from None
    return Dataset(folder.resolve().name, images, labels, _read_json(folder / "meta.json"), seed, flip)


def prefetch(iterable, depth=4):
    """Yield the items of `iterable` in order, while a background thread works up to `depth` items ahead.

    An exception in the thread is raised here. Leaving the loop early stops the thread.
    """
    ready, stop, end = queue.Queue(max(1, depth)), threading.Event(), object()

    def work():
        last = (end, None)
        try:
            for item in iterable:
                if stop.is_set():
                    return
                ready.put((item, None))
        except BaseException as error:  # whatever it is, it belongs to the one who waits for the item
            last = (end, error)
        if not stop.is_set():
            ready.put(last)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        while not ready.empty():  # the thread puts at most one more item: this makes room for it
            ready.get_nowait()
        thread.join(timeout=10)   # a source that hangs must not hang the one who leaves


# ---------------------------------------------------------------- the prepared format, written safely

RECORD = "preparing.json"  # there from our first byte until meta.json: it marks the folder as ours
HEADER = 128               # bytes before the first picture in images.npy


def _read_json(path):
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: delete its folder and prepare it again") from None


def _put(path, text):
    with replacing(path) as file:
        file.write(text.encode())


def _finished(out, key):
    """True, and says so, if `out` is prepared from `key`. UserError if it holds what is not ours."""
    if (out / "meta.json").exists():
        if _read_json(out / "meta.json").get("key") != key:
            raise UserError(f"--out {out} already holds another data set, or one made from other files: "
                            "give another folder, or delete that one")
        _report(f"{out} is already prepared", out, load(out.resolve()).describe())
        return True
    if (out / RECORD).exists() or not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    raise UserError(f"--out {out} already holds something else: give a new or an empty folder")


def _begin(out, key):
    """Make `out` ours. -> the record of an interrupted run with the same `key`, or a new one."""
    out.mkdir(parents=True, exist_ok=True)
    record = _read_json(out / RECORD) if (out / RECORD).exists() else {}
    if record.get("key") != key:
        record = dict(key=key, done=0, bad=[])
        _put(out / RECORD, json.dumps(record))
    return record


def _publish(out, key, labels, names, shape, source, images=None):
    """Finish `out`. Without `images`, images.npy.part is already whole and only waits for its name."""
    _begin(out, key)
    if images is None:
        os.replace(out / "images.npy.part", out / "images.npy")
    else:
        with replacing(out / "images.npy") as file:
            np.save(file, images)
    with replacing(out / "labels.npy") as file:
        np.save(file, np.asarray(labels, np.int64))
    meta = dict(shape=shape, classes=len(names), names=names, range=[0, 255], source=source,
                count=len(labels), key=key)
    _put(out / "meta.json", json.dumps(meta, indent=1))
    (out / RECORD).unlink(missing_ok=True)
    shutil.rmtree(out / "download", ignore_errors=True)  # what was downloaded is in images.npy now
    _report(f"wrote {out}", out, meta)


def _report(what, out, meta):
    print(f"{what}: {meta['count']} pictures, shape {'x'.join(map(str, meta['shape']))}, "
          f"classes {meta['classes']}; next: python train.py --data {shlex.quote(str(out))}")


# ---------------------------------------------------------------- downloads

LECUN = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
# CIFAR-10 has one home. Its second address is the same host without TLS, for machines whose proxy or old
# certificates break https; the checksum decides what is accepted, not the way it came.
TORONTO = ("https://www.cs.toronto.edu/~kriz/", "http://www.cs.toronto.edu/~kriz/")
FILES = {   # what is downloaded: md5, places tried in turn
    "train-images-idx3-ubyte.gz": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", LECUN),
    "train-labels-idx1-ubyte.gz": ("d53e105ee54ea40749a09fcbcd1e9432", LECUN),
    "cifar-10-python.tar.gz": ("c58f30108f718f92721af3b95e74349a", TORONTO),
}
INSIDE = {  # md5 of what is inside: a copy that was unpacked or packed again is as good as the original
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}


def _md5(raw):
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def _checked(name, raw, path):
    if _md5(raw) != INSIDE[name]:
        raise UserError(f"{path}: {name} is not the published file (its checksum differs): get it again")
    return raw


def _published(filename, out, command):
    """fetch `filename` of FILES into the folder that `out` has until it is prepared; return its path."""
    md5, mirrors = FILES[filename]
    addresses = [mirror + filename for mirror in mirrors]
    return fetch(filename, md5, addresses, out / "download", f"get {addresses[0]} in another way, put "
                 f"it into a folder DIR and type  {command} --from DIR")


SILENCE = 30  # seconds without a byte after which a server counts as broken, however slow it may be


def checksum_of(path, kind="sha256"):
    """The checksum of the file at `path` in hex, "sha256" or "md5". Read in blocks: it may be large."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(filename, checksum, addresses, folder, hint):
    """Download `filename` into `folder`, unless it is there already, and return its path.

    checksum: hex, an md5 (32 digits) or a sha256 (64). addresses: full URLs tried in turn, whatever the
    file is called there. A broken download is continued, also by a later call. A file that has its name
    is whole and checked; processes that ask for it at once wait for the first of them.
    UserError if no address has it: one line that ends with `hint`, what the person can do instead.
    """
    folder, kind = Path(folder), {32: "md5", 64: "sha256"}[len(checksum)]
    target = folder / filename

    def right(path):
        return path.exists() and checksum_of(path, kind) == checksum.lower()

    if right(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / f".{filename}.lock") as alone:
        if right(target):  # by the process that we have waited for
            return target
        # Without a lock two processes would append to one file: each gets its own, and no later run's.
        part = folder / (filename + (".part" if alone else f".{os.urandom(6).hex()}.part"))
        for url in addresses:
            for _ in range(2):  # the second try goes on where the connection broke
                resumed = part.exists()
                try:
                    _download(url, part, filename)
                except (OSError, http.client.HTTPException) as error:
                    problem = f"{url}: {error}"
                    if getattr(error, "code", None) == 416:   # the server has nothing after our part:
                        part.unlink(missing_ok=True)          # it is no part of this file
                    continue
                if right(part):
                    os.replace(part, target)
                    return target
                part.unlink()
                problem = f"{url}: wrong checksum"
                if not resumed:
                    break  # every byte came from here; after a resume the old part may be to blame
        if not alone:
            part.unlink(missing_ok=True)
    raise UserError(f"could not download {filename} ({problem}): {hint}")


@contextlib.contextmanager
def _alone(lock):
    """Wait until no other process is in here with the file `lock`, an empty one that stays.

    -> False if the disk knows no locks. True also on Windows, which renames no file that is open.
    """
    with open(lock, "ab") as file:
        alone = True
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, if only by a kill
        except OSError:
            alone = False
        yield alone


def _download(url, part, name):
    """Append to `part` what it lacks of `url`, or start again if the server sends no ranges."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "data.py"} | ({"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SILENCE) as reply:
        start = start if reply.status == 206 else 0
        total = start + int(reply.headers.get("Content-Length") or 0)
        with open(part, "ab" if start else "wb") as file, \
                tqdm(desc=name, total=total or None, initial=start, unit="B", unit_scale=True,
                     disable=None) as bar:
            while block := reply.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    if (size := part.stat().st_size) < total:  # read() ends a broken connection like a whole one
        raise OSError(f"the connection broke after {size} of {total} bytes")


# ---------------------------------------------------------------- MNIST and CIFAR-10


def mnist(source, out):
    """The 60,000 training digits, zero-padded from 28x28 to 32x32, which patches of 2 and 4 divide."""
    if _finished(out, "mnist"):
        return
    arrays = []
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        if source is None:
            _begin(out, "mnist")
            path = _published(name + ".gz", out, "python data.py mnist")
        else:
            path = next((p for p in (source / (name + ".gz"), source / name) if p.is_file()), None)
            if path is None:
                raise UserError(f"--from {source} holds neither {name}.gz nor {name}: give the folder "
                                "that does")
        raw = path.read_bytes()
        try:
            raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        except Exception as error:  # damaged archives raise nearly anything
            raise UserError(f"{path} is damaged ({error}): get it again") from None
        _checked(name, raw, path)
        # idx: two zeros, type, number of dimensions; each dimension as big-endian int32; then the bytes
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))
    images = np.pad(arrays[0], ((0, 0), (2, 2), (2, 2)))[:, None]                 # (N, 1, 32, 32)
    _publish(out, "mnist", arrays[1], list("0123456789"), images.shape[1:],
             "MNIST, training part (LeCun, Cortes, Burges), CC BY-SA 3.0", images)


def cifar10(source, out):
    """The 50,000 training pictures of CIFAR-10, 3x32x32."""
    if _finished(out, "cifar10"):
        return
    if source is None:
        _begin(out, "cifar10")
        source = _published("cifar-10-python.tar.gz", out, "python data.py cifar10")
    wanted = [f"data_batch_{i}" for i in range(1, 6)] + ["batches.meta"]
    files = _cifar_files(source, wanted)
    *batches, meta = [unpickle(_checked(name, files[name], source), name) for name in wanted]
    images = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)  # planes R, G, B
    labels = np.concatenate([b["labels"] for b in batches])
    _publish(out, "cifar10", labels, meta["label_names"], images.shape[1:],
             "CIFAR-10, training part (Krizhevsky, 2009)", images)


def _cifar_files(source, wanted):
    """-> {name: bytes} from the unpacked folder, the archive, or a folder that holds either."""
    for folder in (source, source / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            return {name: (folder / name).read_bytes() for name in wanted}
    archive = source / "cifar-10-python.tar.gz" if source.is_dir() else source
    if not archive.is_file():
        raise UserError(f"--from {source} holds neither cifar-10-python.tar.gz nor cifar-10-batches-py: "
                        "give the archive or the folder that does")
    files = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:  # in the archive's own order: going back means decompressing again
                if member.isfile() and (name := Path(member.name).name) in wanted:
                    files[name] = tar.extractfile(member).read()
    except Exception as error:  # as above
        raise UserError(f"{archive} is damaged or no archive ({error}): get it again") from None
    if missing := [name for name in wanted if name not in files]:
        raise UserError(f"{archive} lacks {', '.join(missing)}: get it again")
    return files


class _Unpickler(pickle.Unpickler):
    """A pickle may name any function and have it called. This one knows the four that CIFAR-10 needs."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # moved in numpy 2
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),  # no other codec
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def unpickle(raw, name="pickle"):
    """The object in the bytes `raw`, a Python-2 pickle of numbers; UserError if it asks for more."""
    try:
        return _Unpickler(io.BytesIO(raw), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{name} is not a harmless pickle ({error}): nothing in it was run") from None


# ---------------------------------------------------------------- your own pictures

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CHUNK = 64  # pictures between two entries in the record: the most that an interruption costs


def listing(src):
    """-> picture paths (sorted), their labels, class names. Hidden files do not count.

    A class is a first-level folder, however deep its pictures lie; without folders there is one, "all".
    UserError: `src` is no folder, holds no picture, or has pictures beside class folders.
    """
    if not src.is_dir():
        raise UserError(f"{src} is not a folder: give the folder that holds the pictures")
    top = [p for p in src.iterdir() if not p.name.startswith(".")]
    loose = sorted(p for p in top if p.suffix.lower() in PICTURES and p.is_file())
    deep = sorted(Path(root) / name for p in top if p.is_dir() for root, _, names in os.walk(p)
                  for name in names if name.lower().endswith(PICTURES) and not name.startswith("."))
    if loose and deep:
        raise UserError(f"{src} has pictures beside its class folders ({loose[0].name}, "
                        f"{len(loose)} in all): move them into a class folder")
    if not loose and not deep:
        raise UserError(f"{src} holds no picture: looked for {' '.join(PICTURES)} in it and below")
    if loose:
        return loose, [0] * len(loose), ["all"]
    classes = [p.relative_to(src).parts[0] for p in deep]
    names = sorted(set(classes))
    number = {name: i for i, name in enumerate(names)}
    return deep, [number[c] for c in classes], names


def picture(path, size=None):
    """One file as uint8 (3, size, size): upright, RGB, centre square, Lanczos. Raises if unreadable.

    Without a size nothing is cropped or resized: (3, H, W).
    """
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
        im = ImageOps.exif_transpose(file)       # phones store a turned picture and a note about it
    if im.mode.startswith("I"):                  # 16-bit grey: Pillow's convert would clip at 255
        grey = np.asarray(im).astype(np.int64)
        im = Image.fromarray(((grey * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    if im.mode.endswith("A") or "transparency" in im.info:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    im = im.convert("RGB")                       # grey, palette, CMYK
    if size is not None:
        side, left, top = min(im.size), (im.width - min(im.size)) // 2, (im.height - min(im.size)) // 2
        im = im.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(im).transpose(2, 0, 1)


def folder(src, size, out):
    """Prepare a tree of pictures (see listing). Damaged files are reported, counted and left out."""
    if not 4 <= size <= 1024:
        raise UserError(f"--size {size} is not between 4 and 1024: try --size 64")
    files, labels, names = listing(src)
    if src.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out} lies in --src {src}, among the pictures: "
                        f"try --out data/{src.resolve().name}")
    # The key is the work to do: these files as they are now, at this size. Another key starts again.
    stats = [(str(p.relative_to(src)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(repr((size, stats)).encode(errors="surrogateescape")).hexdigest()
    if _finished(out, key):
        return
    record = _begin(out, key)
    _decode(files, size, out, record)
    bad = set(record["bad"])
    if len(bad) == len(files):
        (out / "images.npy.part").unlink()
        (out / RECORD).unlink()
        raise UserError(f"none of the {len(files)} pictures in --src {src} could be read")
    if bad:
        print(f"left out {len(bad)} of {len(files)} files: they could not be read", file=sys.stderr)
    _publish(out, key, [y for i, y in enumerate(labels) if i not in bad], names, (3, size, size),
             f"pictures in {src.resolve().name}, centre crop, Lanczos to {size}x{size}")


def _decode(files, size, out, record):
    """Write images.npy.part: keep what record["done"] says is there, append the rest in order."""
    def attempt(path):
        try:
            return picture(path, size)
        except Exception as error:  # decoders raise nearly anything on damaged files
            return f"{type(error).__name__}: {error}"

    def end():  # of the pictures so far, in bytes
        return HEADER + (record["done"] - len(record["bad"])) * 3 * size * size

    part = out / "images.npy.part"
    if not part.exists() or part.stat().st_size < end():
        record.update(done=0, bad=[])
    with open(part, "r+b" if part.exists() else "w+b") as file, \
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, \
            tqdm(total=len(files), initial=record["done"], unit="img", disable=None) as bar:
        file.truncate(end())  # what came after the last entry in the record is cut off and done again
        file.seek(0, os.SEEK_END)
        while (done := record["done"]) < len(files):
            for i, result in enumerate(pool.map(attempt, files[done:done + CHUNK]), done):
                if isinstance(result, str):
                    tqdm.write(f"skipped {files[i]}: {' '.join(result.split())}", file=sys.stderr)
                    record["bad"].append(i)
                else:
                    file.write(result.tobytes())
                bar.update()
            file.flush()
            os.fsync(file.fileno())  # first the pictures, then the entry that says they are there
            record["done"] = min(done + CHUNK, len(files))
            _put(out / RECORD, json.dumps(record))
        # The header comes last because it names the count: .npy version 1.0, padded to 128 bytes.
        shape = (len(files) - len(record["bad"]), 3, size, size)
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(HEADER - 11)
        file.seek(0)
        file.write(b"\x93NUMPY\x01\x00" + bytes([HEADER - 10, 0]) + text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- command line


def main():
    parser = Parser(description="Prepare a data set once; train.py --data reads it from then on.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="mnist|cifar10|folder")
    for name, what in dict(mnist="60,000 digits, 1x32x32", cifar10="50,000 photos, 3x32x32").items():
        p = commands.add_parser(name, help=what, description=what)
        p.add_argument("--from", dest="source", type=Path, metavar="DIR",
                       help="use files you already have (for cifar10 also the .tar.gz); else download")
        p.add_argument("--out", type=Path, default=Path("data") / name, metavar="DIR", help="to write")
    p = commands.add_parser("folder", help="your own pictures", description="one folder is one class")
    p.add_argument("--src", type=Path, required=True, metavar="DIR", help="tree of png, jpeg or webp")
    p.add_argument("--size", type=int, default=64, metavar="PIXELS", help="height and width, 4 to 1024")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="to write: data/NAME")
    args = parser.parse_args()
    if args.command == "folder":
        return folder(args.src, args.size, args.out)
    if args.source is not None and not args.source.exists():
        raise UserError(f"--from {args.source} does not exist: give the folder that holds the files")
    return dict(mnist=mnist, cifar10=cifar10)[args.command](args.source, args.out)


if __name__ == "__main__":
    run(main)
