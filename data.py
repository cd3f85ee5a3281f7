"""
Pictures in, tensors out. Everything that trains, samples or measures gets its pictures here.

    python train.py                                               # the digits in assets/: no preparation
    python data.py mnist                                          # downloads 10 MB, writes data/mnist
    python data.py cifar10                                        # downloads 170 MB, writes data/cifar10
    python data.py mnist --from DIR                               # the same from files you already have
    python data.py folder --src DIR --size 64 --out data/flowers  # your own .png .jpg .jpeg .webp
    python data.py imagenet --src /path/to/train            # SD-VAE latents, writes data/imagenet256
    torchrun --nproc_per_node=8 -- data.py imagenet --src DIR     # the same bytes, from eight GPUs
    python data.py folder --src DIR --size 256 --latents --out data/mine     # latents of your own
    python data.py vae-check PICTURE                              # what the VAE makes of one picture

Each command prepares a data set once, in a folder of three files: images.npy (uint8, N x C x H x W),
labels.npy (int64, N) and meta.json, which is written last: where it is, the other two are whole. Latents
have moments.npy (float16, N x 8 x H/8 x W/8) and stats.npy in place of images.npy.
A broken run is continued by typing the same command again. The rest of the program sees only this:

    ds = load("mnist")                          # or "digits", or the path of any prepared folder
    x, y = ds.batch(step, batch_size=256)       # x (B, C, H, W) float32 in [-1, 1], y (B,) int64
    x = ds.sample(x, noise)                     # x itself; if ds holds latents, one posterior sample
"""
import argparse
import contextlib
import datetime
import functools
import gzip
import hashlib
import http.client
import io
import json
import math
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
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
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


def need_space(folder, missing, what, instead):
    """UserError unless the disk of `folder`, which need not exist yet, has `missing` bytes free."""
    disk = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(disk).free) < missing:
        raise UserError(f"--out {folder} needs {missing / 1e9:.3g} GB more {what}, and {free / 1e9:.3g} GB "
                        f"are free: give a folder on another disk, {instead}")


# ---------------------------------------------------------------- a data set


class Dataset:
    """Labelled pictures, and which of them belong to which step.

    name; shape (C, H, W); classes; names, one str a class; labels int64 (N,); images uint8 (N, C, H, W),
    memory-mapped if prepared; range (lo, hi) of the stored integers; source, where from; seed; flip.
    UserError if images, labels and meta do not agree, or a label is not in 0 .. classes - 1.
    """

    dtype, per_channel = np.uint8, 1    # of `images`: type, and numbers stored for each one of shape

    def __init__(self, name, images, labels, meta, seed=0, flip=False):
        self.name, self.images, self.labels = name, images, labels
        self.seed, self.flip = int(seed), bool(flip)
        try:
            self.shape, self.range = tuple(map(int, meta["shape"])), tuple(map(int, meta["range"]))
            self.picture_shape = self.shape
            self.classes, self.names = int(meta["classes"]), list(map(str, meta["names"]))
            self.source, n = str(meta["source"]), int(meta["count"])
            (C, H, W), (lo, hi) = self.shape, self.range
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"data set {name}: meta.json is not one of ours ({error!r})") from None
        whole = (n, self.per_channel * C, H, W)
        for wrong, what in [
            (n < 1 or images.dtype != self.dtype or images.shape != whole,
             f"images {images.dtype} {images.shape}, expected {np.dtype(self.dtype)} {whole}"),
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

    def sample(self, x, noise=None):
        """What the network is trained on, of a batch x: the pictures as they are."""
        return x

    _read = pictures                                                              # what batch() returns

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
        x, y = self._read(rows), torch.from_numpy(self.labels[rows])
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


class Latents(Dataset):
    """Pictures as a VAE sees them: of each a normal distribution (the posterior) over tensors (4, h, w).

    images are moments, float16 (N, 8, h, w): means, then log-variances. stats float64 (2, 4, h, w): mean
    and variance of a posterior sample of a random picture, one each per position. shape is (4, h, w);
    mean and std, float32 (4, h, w), are what `sample` normalises with. The rest, errors too, as Dataset.
    flip mirrors moments, which are nearly those of the mirrored picture, for nothing is stored twice.
    """

    dtype, per_channel = np.float16, 2

    def __init__(self, name, images, labels, meta, stats, seed=0, flip=False):
        super().__init__(name, images, labels, meta, seed, flip)
        if stats.shape != (2, *self.shape) or stats.dtype != np.float64 or not (stats[1] > 0).all():
            raise UserError(f"data set {name} does not fit together: stats {stats.dtype} {stats.shape}, "
                            f"expected float64 {(2, *self.shape)}, variances above 0; prepare it again")
        self.mean, self.std = (torch.from_numpy(a).float() for a in (stats[0], np.sqrt(stats[1])))
        self.origin = {k: meta.get(k) for k in ("src", "files", "size", "crop", "limit", "left_out", "vae")}
        self.picture_shape = (3, *(8 * side for side in self.shape[1:]))

    def describe(self):
        return {"kind": "latents", "vae": self.origin["vae"], **super().describe()}

    @functools.cached_property
    def files(self):
        """The pictures that the latents were made from, in their order.

        UserError if they are gone or have other names by now; what is inside them is not looked at.
        """
        src = Path(self.origin["src"] or "")
        if not self.origin["src"] or not src.is_dir():
            raise UserError(f"the pictures that {self.name} was made from are not at {src} any more")
        files, labels, _ = listing(src)
        if self.origin["limit"]:
            files = [files[i] for i in spread(labels, self.origin["limit"])]
        if _names(src, files) != self.origin["files"]:
            raise UserError(f"{src} has changed since {self.name} was made from it")
        bad = {src / file for file in self.origin["left_out"]}
        return [file for file in files if file not in bad]

    def pictures(self, index):
        """The real pictures at `index`, as the VAE saw them, float32 (b, 3, H, W) in [-1, 1]."""
        files = [self.files[i] for i in np.atleast_1d(np.arange(len(self))[index])]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            u = list(pool.map(lambda file: picture(file, self.origin["size"], self.origin["crop"]), files))
        return torch.from_numpy(np.stack(u)).float() / 127.5 - 1

    def _read(self, rows):
        return torch.from_numpy(np.asarray(self.images[rows]))                    # (b, 8, h, w) float16

    def sample(self, x, noise=None):
        """Moments x (b, 8, h, w), noise (b, 4, h, w) of N(0, 1) -> normalised latents (b, 4, h, w).

        float32, on the device of x. Fresh noise each time: a picture is a cloud of latents, not a point.
        """
        if self.mean.device != x.device:
            self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        mean, logvar = x.float().chunk(2, dim=1)
        return (mean + (logvar / 2).exp() * noise - self.mean) / self.std


def load(name_or_folder, seed=0, flip=False):
    """-> Dataset: "digits", a name prepared under data/, or the path of any prepared folder.

    Latents if that is what the folder holds. UserError with the command to type if it is not prepared,
    or if its files do not fit together.
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
        raw = Path(name).is_dir()                                     # pictures, perhaps, as they are
        src, out = (name, Path("data") / Path(name).resolve().name) if raw else ("DIR", folder)
        command = known.get(folder.name, f"folder --src {shlex.quote(src)} --size 64 "
                                         f"--out {shlex.quote(str(out))}")
        raise UserError(f"data set {name!r} is not prepared (no {folder / 'meta.json'}): "
                        f"type  python data.py {command}")
    meta = _read_json(folder / "meta.json")
    latent = meta.get("kind") == "latents"
    try:
        images = np.load(folder / ("moments.npy" if latent else "images.npy"), mmap_mode="r")
        labels = np.load(folder / "labels.npy")
        stats = [np.load(folder / "stats.npy")] if latent else []
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}): delete it and prepare it again") from None
    kind = Latents if latent else Dataset
    return kind(folder.resolve().name, images, labels, meta, *stats, seed, flip)


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


def _finished(out, key, asked=()):
    """True, and says so, if `out` is prepared from `key`. UserError if it holds what is not ours.

    asked: what the person asked for, {flag: value}, so that what differs can be named.
    """
    if (out / "meta.json").exists():
        theirs = _read_json(out / "meta.json")
        if theirs.get("key") != key:
            raise UserError(f"--out {out} already holds another data set{_difference(theirs, asked)}: give "
                            "another folder, or delete that one")
        _report(f"{out} is already prepared", out, load(out.resolve()).describe())
        return True
    if (out / RECORD).exists() or not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    raise UserError(f"--out {out} already holds something else: give a new or an empty folder")


def _difference(theirs, asked):
    other = [name for name in asked if name in theirs and theirs[name] != asked[name]]
    about = [f"--{name} {theirs[name]['name'] if name == 'vae' else theirs[name]}" for name in other]
    return f", made with {', '.join(about)}" if other else ", or one made from other files"


def _begin(out, key, **asked):
    """Make `out` ours. -> the record of an interrupted run with the same `key`, or a new one."""
    out.mkdir(parents=True, exist_ok=True)
    record = _read_json(out / RECORD) if (out / RECORD).exists() else {}
    if record.get("key") != key:
        record = dict(asked, key=key, done=0, bad=[])
        _put(out / RECORD, json.dumps(record))
    return record


def _publish(out, key, labels, names, shape, source, images=None, array="images.npy", **more):
    """Finish `out`. Without `images`, the part of `array` is whole already and only waits for its name.

    more: further entries of meta.json.
    """
    _begin(out, key)
    if images is None:
        os.replace(out / f"{array}.part", out / array)
    else:
        with replacing(out / "images.npy") as file:
            np.save(file, images)
    with replacing(out / "labels.npy") as file:
        np.save(file, np.asarray(labels, np.int64))
    meta = dict(shape=shape, classes=len(names), names=names, range=[0, 255], source=source,
                count=len(labels), **more, key=key)
    _put(out / "meta.json", json.dumps(meta, indent=1))
    (out / RECORD).unlink(missing_ok=True)
    shutil.rmtree(out / "download", ignore_errors=True)  # what was downloaded is in images.npy now
    _report(f"wrote {out}", out, meta)


def _report(what, out, meta):
    latent = meta.get("kind") == "latents"
    print(f"{what}: {meta['count']} {'latents' if latent else 'pictures'}, "
          f"shape {'x'.join(map(str, meta['shape']))}, classes {meta['classes']}; next: "
          f"python train.py --data {shlex.quote(str(out))}{' --model B/2' * latent}")


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


def picture(path, size=None, crop="lanczos"):
    """One file as uint8 (3, size, size): upright, RGB, centre square, Lanczos. Raises if unreadable.

    Without a size nothing is cropped or resized: (3, H, W). crop "adm": halved with a box filter while
    the short side is at least 2·size, bicubic to `size`, then the centre (Dhariwal & Nichol 2021).
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
    if size is not None and crop == "adm":
        while min(im.size) >= 2 * size:
            im = im.resize((im.width // 2, im.height // 2), Image.Resampling.BOX)
        scale = size / min(im.size)
        im = im.resize((round(im.width * scale), round(im.height * scale)), Image.Resampling.BICUBIC)
        left, top = (im.width - size) // 2, (im.height - size) // 2
        im = im.crop((left, top, left + size, top + size))
    elif size is not None:
        side, left, top = min(im.size), (im.width - min(im.size)) // 2, (im.height - min(im.size)) // 2
        im = im.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(im).transpose(2, 0, 1)


def _key(src, out, files, settings):
    """The work to do as a checksum: these files as they are now, with these settings."""
    if src.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out} lies in --src {src}, among the pictures: "
                        f"try --out data/{src.resolve().name}")
    stats = [(str(p.relative_to(src)), (at := p.stat()).st_size, at.st_mtime_ns) for p in files]
    return hashlib.sha256(repr((settings, stats)).encode(errors="surrogateescape")).hexdigest()


def _names(src, files):
    names = "\n".join(str(file.relative_to(src)) for file in files)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def _attempt(*args):
    """picture(*args), or what is wrong with the file, a str."""
    try:
        return picture(*args)
    except Exception as error:  # decoders raise nearly anything on damaged files
        return " ".join(f"{type(error).__name__}: {error}".split())


def folder(src, size, out):
    """Prepare a tree of pictures (see listing). Damaged files are reported, counted and left out."""
    if not 4 <= size <= 1024:
        raise UserError(f"--size {size} is not between 4 and 1024: try --size 64")
    files, labels, names = listing(src)
    key = _key(src, out, files, size)           # another key starts again
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
            for i, result in enumerate(pool.map(lambda path: _attempt(path, size),
                                                files[done:done + CHUNK]), done):
                if isinstance(result, str):
                    tqdm.write(f"skipped {files[i]}: {result}", file=sys.stderr)
                    record["bad"].append(i)
                else:
                    file.write(result.tobytes())
                bar.update()
            file.flush()
            os.fsync(file.fileno())  # first the pictures, then the entry that says they are there
            record["done"] = min(done + CHUNK, len(files))
            _put(out / RECORD, json.dumps(record))
        _head(file, "|u1", (len(files) - len(record["bad"]), 3, size, size))


def _head(file, kind, shape):
    """The header comes last because it names the count: .npy version 1.0, padded to 128 bytes."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(HEADER - 11)
    file.seek(0)
    file.write(b"\x93NUMPY\x01\x00" + bytes([HEADER - 10, 0]) + text.encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


# ---------------------------------------------------------------- latents: pictures through a VAE, once


def cache_folder():
    """Where downloaded networks are kept: $ALPHAFLOW_CACHE, else alphaflow/ in the user's cache."""
    given = os.environ.get("ALPHAFLOW_CACHE")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphaflow")


def vae_file(weights=None, name="ema"):
    """-> path, about, addresses of the VAE asked for; about is {"name", "sha256"} of its weights.

    name: "ema" or "mse", the published ones, or a name that about once gave. They are looked for in
    `weights` if that is given: a folder, or a file, which may be any in diffusers' or CompVis' layout.
    Else their place is in the cache, and published ones need not be there yet. UserError if others are
    not.
    """
    rows = VAE_WEIGHTS | {Path(row[0]).stem: row for row in VAE_WEIGHTS.values()}
    filename, sha256, _, addresses = rows.get(name) or (name, None, None, ())
    path = cache_folder() / filename
    if weights is not None:
        weights = Path(weights)
        inside = [weights / filename, weights / "diffusion_pytorch_model.safetensors"]
        path = next((p for p in (weights, *inside) if p.is_file()), None)
        if path is None:
            raise UserError(f"--weights {weights} is no file and no folder that holds {filename}")
    elif name not in rows and not path.is_file():
        raise UserError(f"the latents are of a VAE of your own: put its file {name} into {path.parent}")
    if weights is not None or name not in rows:
        sha256, addresses = checksum_of(path), ()
    published = [Path(file).stem for file, sha, *_ in VAE_WEIGHTS.values() if sha == sha256]
    return path, dict(name=(published or [path.name])[0], sha256=sha256), addresses


def find_vae(weights=None, name="ema", device="cpu", download=True, sha256=None):
    """The VAE on `device`, frozen; .about is {"name", "sha256"} of its weights, see vae_file.

    UserError if there is none to be had, the file holds another network, or is not the one with
    `sha256`, if that is given.
    """
    path, about, addresses = vae_file(weights, name)
    if sha256 not in (None, about["sha256"]):
        raise UserError(f"{path} is another VAE than the one that the latents were made with")
    if addresses and download:
        fetch(path.name, about["sha256"], addresses, path.parent, f"get {addresses[0]} in another way "
              f"and put it at {path}")
    elif addresses and not (path.is_file() and checksum_of(path) == about["sha256"]):
        raise UserError(f"no VAE at {path}: python data.py vae-check PICTURE downloads it")
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        from sample import read_tensors  # not at the top: sample.py imports this file
        state = read_tensors(path)
    try:
        net = build_vae(state).to(device)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    net.about = about
    return net


@torch.no_grad()
def encode(vae, u, device, precision="fp32"):
    """Pictures uint8 (n, 3, H, W), numpy -> moments float16 (n, 8, H/8, W/8), numpy: mean and logvar.

    precision "bf16" rounds the operands of products. UserError if the VAE does not give finite numbers.
    """
    device = torch.device(device)
    # TF32 and the choice among convolutions would make the numbers depend on more than the picture.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    pieces = torch.from_numpy(u).split(8 if device.type == "cpu" else len(u))      # a laptop's memory
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        parts = [vae.encode(piece.to(device).float() / 127.5 - 1) for piece in pieces]
    moments = torch.cat([torch.cat(part, dim=1).half() for part in parts])
    if not moments.isfinite().all():
        raise UserError(f"the VAE gives infinities or NaN with --precision {precision}: "
                        + ("its weights are damaged" if precision == "fp32" else "try --precision fp32"))
    return moments.cpu().numpy()


def spread(labels, limit):
    """Positions of `limit` of the pictures, ascending: the first of each class, then the second, ..."""
    seen, turn = {}, []
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        turn.append((seen[label], label, i))
    return sorted(i for _, _, i in sorted(turn)[:limit])


def latents(src, out, size=256, limit=None, crop="lanczos", precision=None, vae="ema", weights=None,
            batch=None, device=None):
    """Prepare in `out` the latents of a tree of pictures (see listing), on any number of processes.

    size: pixels, a multiple of 8 from 16 to 1024. limit: only so many pictures, see spread. crop: see
    picture. precision: "bf16" or "fp32" (bf16 on CUDA if not given). vae, weights: see vae_file. batch:
    pictures at once, 64 if not given, fewer above 256 pixels. device: see sample.pick_device.
    UserError for what the person can mend, such as too little space on the disk.

    The pictures, sorted, are cut into chunks of `batch`, and a chunk is always encoded as a whole: what
    comes of a picture depends on nothing that is done when or where. A chunk is a file that has its name
    when it is whole: there is no other record of what is done. The first process joins them in the end.
    Damaged files are reported, listed in meta.json and left out.
    """
    from sample import pick_device  # as in find_vae
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # for messages between CPUs alone; some process may finish long before the others
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    where = net = None

    def begin():
        nonlocal where, net
        if size % 8 or not 16 <= size <= 1024:
            raise UserError(f"--size {size}: latents need a multiple of 8 between 16 and 1024, like 256")
        for flag, number in (("--batch", batch), ("--limit", limit)):
            if number is not None and number < 1:
                raise UserError(f"{flag} {number}: give 1 or more")
        where = pick_device(device)
        kind = precision or ("bf16" if where.type == "cuda" else "fp32")
        job = _plan(src, out, limit, dict(kind="latents", size=size, crop=crop, precision=kind,
                                          batch=batch or max(1, min(CHUNK, CHUNK * 256**2 // size**2)),
                                          vae=vae_file(weights, vae)[1]))
        if job:  # nothing is downloaded for what is done already or cannot be done
            net = find_vae(weights, vae, where)
            job |= _resume(job)
            names = job["names"]
            print(f"{len(job['files']):,} pictures in {len(names)} class{'es' * (len(names) > 1)}, each a "
                  f"folder in {src}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}; "
                  f"their latents take {job['gigabytes']:.3g} GB")
        return job

    job = _on_first(rank, world, begin)
    if job:
        where = where or pick_device(device)
        net = net or find_vae(weights, vae, where, sha256=job["vae"]["sha256"])  # on other nodes, too
        _encode_chunks(job, net, where, rank, world)
        if world > 1:
            dist.barrier()
        _on_first(rank, world, lambda: _join(job))
    if world > 1:
        dist.destroy_process_group()


def _on_first(rank, world, work):
    """What work() returns on process 0, on all of them. If it raises there, the others just end."""
    if world == 1:
        return work()
    box = [None]
    try:
        if rank == 0:
            box = [("fine", work())]
    finally:
        dist.broadcast_object_list(box)
    if box[0] is None:
        sys.exit(2)
    return box[0][1]


def _plan(src, out, limit, settings):
    """-> what is to be done, a dict; None if it is done already. UserError if it cannot be done here."""
    files, labels, names = listing(src)
    if limit is not None:
        keep = spread(labels, limit)
        files, labels = [files[i] for i in keep], [labels[i] for i in keep]
    key, asked = _key(src, out, files, settings), settings | dict(limit=limit)
    if _finished(out, key, asked):
        return None
    if (out / RECORD).exists() and (theirs := _read_json(out / RECORD)).get("key") != key:
        raise UserError(f"--out {out} holds the beginning of another data set{_difference(theirs, asked)}: "
                        "give another folder, or delete that one")       # hours of work, perhaps
    shape = (8, settings["size"] // 8, settings["size"] // 8)
    there = sum(p.stat().st_size for p in (*out.glob("chunks/*.npz"), *out.glob("moments.npy*")))
    whole = len(files) * (2 * math.prod(shape) + 8) * 1.02
    need_space(out, whole - there, f"for {len(files)} pictures", "or --limit N")
    return dict(asked, asked=asked, key=key, src=src, out=out, names=names, labels=labels, shape=shape,
                files=[str(p) for p in files], chunks=-(-len(files) // settings["batch"]),
                gigabytes=whole / 1e9)


def _resume(job):
    """-> record, as in _begin, and todo, the numbers of the chunks that are still to be encoded."""
    out = job["out"]
    job = job | dict(record=_begin(out, job["key"], **job["asked"]))
    (out / "chunks").mkdir(exist_ok=True)
    if (out / "moments.npy").exists():  # the last run ended between this name and meta.json
        os.replace(out / "moments.npy", out / "moments.npy.part")
    part = out / "moments.npy.part"
    if not part.exists() or part.stat().st_size < _joined(job):
        job["record"].update(done=0, bad=[])
    there = {int(p.stem) for p in out.glob("chunks/*.npz") if not p.name.startswith(".")}
    todo = [k for k in range(job["record"]["done"], job["chunks"]) if k not in there]
    return dict(record=job["record"], todo=todo)


def _joined(job):
    """Bytes of moments.npy.part that the record says are there."""
    pictures = min(job["record"]["done"] * job["batch"], len(job["files"])) - len(job["record"]["bad"])
    return HEADER + pictures * 2 * math.prod(job["shape"])


def _encode_chunks(job, vae, device, rank, world):
    """Write chunks/K.npz for every world-th chunk to do: moments of its good files, numbers of its bad.

    Threads read the next pictures and write the last moments while the VAE computes.
    """
    todo, B, size = job["todo"][rank::world], job["batch"], job["size"]
    if device.type == "cuda":
        vae = vae.to(memory_format=torch.channels_last)
    threads = max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def read():
        with ThreadPoolExecutor(threads) as pool:
            for k in todo:
                files = job["files"][k * B:(k + 1) * B]
                yield k, list(pool.map(lambda path: _attempt(path, size, job["crop"]), files))

    def write(k, moments, bad):
        good = np.setdiff1d(np.arange(len(job["files"][k * B:(k + 1) * B])), bad)
        with replacing(job["out"] / "chunks" / f"{k:07d}.npz") as file:
            np.savez(file, moments=moments[good], bad=np.array(bad, np.int64) + k * B)

    count = sum(len(job["files"][k * B:(k + 1) * B]) for k in todo)
    what = "encoding" + f", process 0 of {world}" * (world > 1)
    with ThreadPoolExecutor(1) as writer, contextlib.closing(prefetch(read(), 2)) as chunks, \
            tqdm(desc=what, total=count, unit="img", disable=True if rank else None) as bar:
        written = None
        for k, results in chunks:
            bad = [i for i, result in enumerate(results) if isinstance(result, str)]
            for i in bad:
                tqdm.write(f"skipped {job['files'][k * B + i]}: {results[i]}", file=sys.stderr)
            # Holes are black and the last chunk is filled up: the VAE sees batches of one shape.
            u = np.zeros((B, 3, size, size), np.uint8)
            for i, result in enumerate(results):
                u[i] = 0 if i in bad else result
            moments = encode(vae, u, device, job["precision"])                    # (B, 8, h, w)
            if written:
                written.result()
            written = writer.submit(write, k, moments, bad)
            bar.update(len(results))
        if written:
            written.result()


def _join(job):
    """All chunks, in order, into one file; then statistics, labels and meta.json."""
    out, record, n = job["out"], job["record"], len(job["files"])
    part, shape = out / "moments.npy.part", job["shape"]
    with open(part, "r+b" if part.exists() else "w+b") as file:
        file.truncate(_joined(job))
        file.seek(0, os.SEEK_END)
        while (done := record["done"]) < job["chunks"]:
            record["done"] = min(done + 16, job["chunks"])
            for k in range(done, record["done"]):
                with np.load(out / "chunks" / f"{k:07d}.npz") as chunk:
                    file.write(chunk["moments"].tobytes())
                    record["bad"] += chunk["bad"].tolist()
            file.flush()
            os.fsync(file.fileno())  # first the moments, then the entry, and only then the chunks go
            _put(out / RECORD, json.dumps(record))
            for k in range(done, record["done"]):
                (out / "chunks" / f"{k:07d}.npz").unlink()
        bad = set(record["bad"])
        if len(bad) < n:
            _head(file, "<f2", (n - len(bad), *shape))
    if len(bad) == n:
        shutil.rmtree(out / "chunks")
        part.unlink()
        (out / RECORD).unlink()
        raise UserError(f"none of the {n} pictures in --src {job['src']} could be read")
    if bad:
        print(f"left out {len(bad)} of {n} files: they could not be read", file=sys.stderr)
    with replacing(out / "stats.npy") as file:
        np.save(file, statistics(np.load(part, mmap_mode="r")))
    shutil.rmtree(out / "chunks", ignore_errors=True)
    more = dict(job["asked"], src=str(job["src"].resolve()))
    more["files"] = _names(job["src"], map(Path, job["files"]))
    more["left_out"] = [os.path.relpath(job["files"][i], job["src"]) for i in sorted(bad)]
    how = "ADM's crop" if job["crop"] == "adm" else "centre crop, Lanczos"
    source = (f"pictures in {job['src'].resolve().name}, {how} to {job['size']}x{job['size']}, latents "
              f"of {job['vae']['name']}")
    _publish(out, job["key"], [y for i, y in enumerate(job["labels"]) if i not in bad], job["names"],
             (4, *shape[1:]), source, array="moments.npy", **more)
    own = cache_folder() / job["vae"]["name"]
    if own.name not in [Path(file).stem for file, *_ in VAE_WEIGHTS.values()] and not own.is_file():
        print(f"to make pictures of them, sample.py and fid.py look for the VAE at {own}: put a copy there")


def statistics(moments):
    """Moments (N, 8, h, w) -> float64 (2, 4, h, w), mean and variance of posterior samples.

    By the law of total variance that is the variance of the means plus the mean of the variances.
    """
    total, n = 0.0, len(moments)
    for start in tqdm(range(0, n, CHUNK), desc="statistics", unit="chunk", disable=None):
        mean, logvar = np.split(moments[start:start + CHUNK].astype(np.float64), 2, axis=1)
        total = total + np.stack([mean.sum(0), (mean**2).sum(0), np.exp(logvar).sum(0)])
    mean, square, inner = total / n                                               # each (4, h, w)
    return np.stack([mean, square - mean**2 + inner])


def vae_check(image, out, size, vae, weights, device):
    """Write a picture beside what is left of it after the VAE, and print the PSNR in dB."""
    from sample import pick_device  # as in find_vae
    if size % 8 or size < 16:
        raise UserError(f"--size {size}: the VAE needs a multiple of 8 from 16 up, like 256")
    u = _attempt(image, size) if image.is_file() else "no such file"
    if isinstance(u, str):
        raise UserError(f"{image} cannot be read as a picture ({u})")
    net = find_vae(weights, vae, device := pick_device(device))
    with torch.no_grad():
        mean, _ = net.encode(torch.tensor(u)[None].to(device).float() / 127.5 - 1)
        v = to_uint8(net.decode(mean))[0].cpu().numpy()                           # (3, size, size)
    error = ((u.astype(np.float64) - v) ** 2).mean()
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    with replacing(out) as file:
        Image.fromarray(np.concatenate([u, v], axis=2).transpose(1, 2, 0)).save(file, format="PNG")
    print(f"wrote {out}: the picture, and the same through {net.about['name']}; PSNR {psnr:.2f} dB")


# ---------------------------------------------------------------- tensors out of a .safetensors file

SAFE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """-> {name: CPU tensor}, memory-mapped: read when used, and a change never reaches the file.

    The file: length of the header (8 bytes, little endian), the header (JSON), the numbers.
    UserError, one line, if it is cut short or is not such a file.
    """
    path = Path(path)

    def need(ok, what):
        if not ok:
            raise UserError(f"{path} is damaged or no .safetensors file ({what}): get it again")

    need((size := path.stat().st_size) >= 8, f"{size} bytes")
    raw = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))                           # (size,)
    begin = 8 + int.from_bytes(raw[:8].numpy().tobytes(), "little")                     # of the numbers
    need(begin <= size, "cut short in its header")
    try:
        header = json.loads(raw[8:begin].numpy().tobytes().decode())
    except (ValueError, RecursionError):
        header = None
    need(isinstance(header, dict), "its header is not JSON")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = (entry[key] for key in ("dtype", "shape", "data_offsets"))
            whole = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            whole = False
        need(whole, f"no dtype, shape and data_offsets for {name!r:.60}")
        need(str(dtype) in SAFE, f"{name!r:.60} is of the unknown type {dtype!r:.20}")
        need(begin + end <= size, f"cut short: {name!r:.60} ends after {begin + end} of {size} bytes")
        need(end - start == math.prod(shape) * SAFE[dtype].itemsize,
             f"{name!r:.60} has {end - start} bytes for {dtype} of shape {shape}")
        part = raw[begin + start:begin + end]
        if (begin + start) % SAFE[dtype].itemsize:                  # a view must begin on a multiple
            part = part.clone()
        tensors[name] = part.view(SAFE[dtype]).view(shape)
    return tensors


# ---------------------------------------------------------------- the autoencoder of latent diffusion

EPS = 1e-6                                                            # of its norms, not PyTorch's 1e-5


class Resnet(nn.Module):
    """x + what two convolutions, each after norm and SiLU, make of it, (n, a, h, w) -> (n, b, h, w)."""

    def __init__(self, a, b, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, a, EPS), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, b, EPS), nn.Conv2d(b, b, 3, padding=1)
        self.conv_shortcut = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """x + attention with one head among all its pixels, (n, c, h, w) -> the same."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).mT[:, None]                                   # (n, 1, h·w, c)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).mT.reshape(x.shape)


class Coder(nn.Module):
    """Half of a VAE, way "down" or "up": (n, a, h, w) -> (n, b, h/8, w/8) or (n, b, 8h, 8w).

    channels: of its levels, in the order they are passed; between two levels the size changes by 2.
    """

    def __init__(self, way, a, b, channels, groups):
        super().__init__()
        down, first, last = way == "down", channels[0], channels[-1]
        narrow = last if down else first                                  # where the picture is smallest
        self.way = way
        self.conv_in = nn.Conv2d(a, first, 3, padding=1)
        self.mid_block = nn.ModuleDict(dict(
            resnets=nn.ModuleList(Resnet(narrow, narrow, groups) for _ in range(2)),
            attentions=nn.ModuleList([Attention(narrow, groups)])))
        self.conv_norm_out = nn.GroupNorm(groups, last, EPS)
        self.conv_out = nn.Conv2d(last, b, 3, padding=1)
        blocks = nn.ModuleList()
        for c, d in zip((first, *channels), channels):
            resnets = [Resnet(d if j else c, d, groups) for j in range(2 if down else 3)]
            conv = nn.Conv2d(d, d, 3, stride=2) if down else nn.Conv2d(d, d, 3, padding=1)
            samplers = [nn.ModuleDict(dict(conv=conv))] if len(blocks) < len(channels) - 1 else []
            blocks.append(nn.ModuleDict({"resnets": nn.ModuleList(resnets),
                                         way + "samplers": nn.ModuleList(samplers)}))
        self.add_module(way + "_blocks", blocks)

    def _middle(self, x):
        before, after = self.mid_block.resnets
        return after(self.mid_block.attentions[0](before(x)))

    def forward(self, x):
        down = self.way == "down"
        x = self.conv_in(x)
        x = x if down else self._middle(x)
        for block in self.get_submodule(self.way + "_blocks"):
            for resnet in block.resnets:
                x = resnet(x)
            for sampler in block[self.way + "samplers"]:                  # none in the last level
                # Zeros at the right and the bottom alone, as in the original: padding=1 would shift all.
                x = F.pad(x, (0, 1, 0, 1)) if down else F.interpolate(x, scale_factor=2.0)
                x = sampler.conv(x)
        x = self._middle(x) if down else x
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder of Stable Diffusion, under the names that its weights have in diffusers.

    channels of the levels, each a multiple of `groups`; with four levels 8x8 pixels become one of z.
    Flow models work on 0.18215·z, z = mean + exp(logvar/2)·noise: neither method knows that factor.
    Source: Rombach et al. 2022.
    """

    def __init__(self, channels=(128, 256, 512, 512), groups=32):
        super().__init__()
        self.factor = 2 ** (len(channels) - 1)                            # pixels for one of z, a side
        self.encoder = Coder("down", 3, 8, tuple(channels), groups)
        self.decoder = Coder("up", 4, 3, tuple(channels)[::-1], groups)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def encode(self, x):
        """x (n, 3, H, W) in [-1, 1] -> mean and logvar, each (n, 4, H/8, W/8), logvar in [-30, 20].

        ValueError unless H and W are multiples of 8.
        """
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"{x.shape[2]}x{x.shape[3]} pixels: height and width must be multiples of "
                             f"{self.factor}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (n, 4, h, w) -> pictures (n, 3, 8h, 8w), about [-1, 1] but not clamped to it."""
        return self.decoder(self.post_quant_conv(z))


# ---------------------------------------------------------------- a VAE from published weights

VAE_NAMES = {                             # in diffusers of today: as it was once, and in CompVis' code
    ".to_q.": [".query.", ".q."], ".to_k.": [".key.", ".k."], ".to_v.": [".value.", ".v."],
    ".to_out.0.": [".proj_attn.", ".proj_out."], ".down_blocks.": [".down."], ".resnets.": [".block."],
    ".conv_shortcut.": [".nin_shortcut."], ".downsamplers.0.": [".downsample."],
    ".upsamplers.0.": [".upsample."], ".mid_block.resnets.0.": [".mid.block_1."],
    ".mid_block.resnets.1.": [".mid.block_2."], ".mid_block.attentions.0.": [".mid.attn_1."],
    ".attentions.0.group_norm.": [".attentions.0.norm."], ".conv_norm_out.": [".norm_out."],
}
VAE_WEIGHTS = {                           # name: file, its sha256, its bytes, where it is published
    name: (f"sd-vae-ft-{name}.safetensors", sha256, 334_643_276,
           [f"https://huggingface.co/stabilityai/sd-vae-ft-{name}/resolve/{revision}/"
            "diffusion_pytorch_model.safetensors" for revision in (commit, "main")])
    for name, sha256, commit in [
        ("ema", "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
         "f04b2c4b98319346dad8c65879f680b1997b204a"),
        ("mse", "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
         "31f26fdeee1355a5c34592e401dd41e45d25a493")]
}


def build_vae(state, groups=32, dtype=torch.float32):
    """The VAE whose published weights `state` holds ({name: tensor}), frozen and in eval mode.

    Names as in diffusers, old or new, or as in CompVis' code; all may begin with the same words, such
    as "first_stage_model.". What else a CompVis file holds (loss, averages, a whole diffusion model) is
    passed over. groups: of the norms, as no weight tells. ValueError, one line, if names and shapes are
    not those of such a network.
    """
    have, others = _vae_names(state)
    channels = _vae_channels(have, groups)
    if any(c % groups for c in channels):
        raise ValueError(f"not the weights of a VAE: {channels} channels in {groups} groups")
    with torch.device("meta"):                                            # no memory, no initial values
        net = VAE(channels, groups)
    want = {k: v.shape for k, v in net.state_dict().items()}
    shape = {k: getattr(v, "shape", None) for k, v in have.items()}
    wrong = {"missing": [k for k in want if k not in have],
             "unexpected": others + [k for k in have if k not in want],
             "of another shape": [k for k in want if k in have and want[k] != shape[k]]}
    if any(wrong.values()):
        raise ValueError("not the weights of a VAE: " + "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})"
            for what, keys in wrong.items() if keys))
    net.load_state_dict({k: have[k].detach().to(dtype) for k in want}, assign=True)
    return net.requires_grad_(False).eval()


def _vae_names(state):
    """-> {name as in diffusers of today: tensor}, and a list of the names that belong to no VAE."""
    state = {str(k): v for k, v in state.items()}
    first = "encoder.conv_in.weight"                                      # has one name in every layout
    prefixes = [k.removesuffix(first) for k in state if ("." + k).endswith("." + first)]
    prefix = min(prefixes, key=len, default="")
    parts = tuple(prefix + k for k in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    compvis = any(k.startswith((prefix + "encoder.mid.", prefix + "decoder.mid.")) for k in state)
    levels = {k.removeprefix(prefix).split(".")[2] for k in state
              if k.startswith((prefix + "encoder.down.", prefix + "decoder.up."))}
    words = [(old, new) for new, theirs in VAE_NAMES.items() for old in theirs]
    # CompVis' decoder counts its levels from the finest up, diffusers' in the order they are passed.
    words += [(f".up.{i}.", f".up_blocks.{len(levels) - 1 - i}.") for i in range(len(levels))]
    have, others = {}, []
    for theirs, tensor in state.items():
        if not theirs.startswith(parts):
            others += [] if compvis else [theirs]
            continue
        name = theirs.removeprefix(prefix)
        for old, new in words:
            name = name.replace(old, new)
        if ".attentions." in name and getattr(tensor, "ndim", 0) == 4:    # CompVis: a 1x1 convolution
            tensor = tensor.flatten(1)
        if name in have:                                                  # in two layouts at once
            others.append(theirs)
        have[name] = tensor
    return have, others


def _vae_channels(have, groups):
    """The channels of each level. What the weights lack gets any: comparing names will tell of it."""
    channels = []
    while any(k.startswith(f"encoder.down_blocks.{len(channels)}.") for k in have):
        weight = have.get(f"encoder.down_blocks.{len(channels)}.resnets.0.conv1.weight")
        channels.append((*getattr(weight, "shape", ()), groups)[0])
    return tuple(channels) or (128, 256, 512, 512)


# ---------------------------------------------------------------- command line


LATENT_FLAGS = ("limit", "crop", "precision", "batch", "vae", "weights", "device")


def _latent_flags(p):
    p.add_argument("--limit", type=int, metavar="N", help="only N pictures, equally many of each class")
    p.add_argument("--crop", choices=("lanczos", "adm"), help="centre square and Lanczos (default), or "
                   "ADM's: halved by a box filter, bicubic, then the centre")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="of products (default: bf16 on CUDA)")
    p.add_argument("--batch", type=int, metavar="N",
                   help=f"pictures at once (default: {CHUNK}, fewer above 256 pixels)")
    _vae_flags(p)


def _vae_flags(p):
    p.add_argument("--vae", choices=("ema", "mse"), help="sd-vae-ft-ema (default) or sd-vae-ft-mse")
    p.add_argument("--weights", type=Path, metavar="PATH",
                   help="file or folder of the VAE's weights (default: the cache, else downloaded)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")


def parse_flags():
    parser = Parser(description="Prepare a data set once; train.py --data reads it from then on.")
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="mnist|cifar10|folder|imagenet|vae-check")
    for name, what in dict(mnist="60,000 digits, 1x32x32", cifar10="50,000 photos, 3x32x32").items():
        p = commands.add_parser(name, help=what, description=what)
        p.add_argument("--from", dest="source", type=Path, metavar="DIR",
                       help="use files you already have (for cifar10 also the .tar.gz); else download")
        p.add_argument("--out", type=Path, default=Path("data") / name, metavar="DIR", help="to write")
    p = commands.add_parser("folder", help="your own pictures", description="one folder is one class")
    p.add_argument("--src", type=Path, required=True, metavar="DIR", help="tree of png, jpeg or webp")
    p.add_argument("--size", type=int, default=64, metavar="PIXELS", help="height and width, 4 to 1024")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="to write: data/NAME")
    p.add_argument("--latents", action="store_true", help="encode with a VAE; 8 divides --size")
    _latent_flags(p.add_argument_group("with --latents"))
    what = "SD-VAE latents of ImageNet, or of any tree of class folders"
    p = commands.add_parser("imagenet", help=what, description=what)
    p.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder of class folders")
    p.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of pictures before the VAE")
    p.add_argument("--out", type=Path, metavar="DIR", help="to write (default: data/imagenetSIZE)")
    _latent_flags(p)
    what = "what a VAE makes of a picture"
    p = commands.add_parser("vae-check", help=what, description=what)
    p.add_argument("image", type=Path, metavar="PICTURE")
    p.add_argument("--out", type=Path, default=Path("vae_check.png"), metavar="FILE", help="to write")
    p.add_argument("--size", type=int, default=256, metavar="PIXELS", help="height and width before it")
    _vae_flags(p)
    return parser.parse_args()


def main():
    args = parse_flags()
    if args.command == "vae-check":
        return vae_check(args.image, args.out, args.size, args.vae or "ema", args.weights, args.device)
    if args.command in ("folder", "imagenet"):
        flags = {k: v for k in LATENT_FLAGS if (v := getattr(args, k)) is not None}
        if args.command == "imagenet" or args.latents:
            out = args.out or Path("data") / f"imagenet{args.size}"
            return latents(args.src, out, args.size, **flags)
        if flags:
            raise UserError(f"--{next(iter(flags))} does nothing without --latents")
        return folder(args.src, args.size, args.out)
    if args.source is not None and not args.source.exists():
        raise UserError(f"--from {args.source} does not exist: give the folder that holds the files")
    return dict(mnist=mnist, cifar10=cifar10)[args.command](args.source, args.out)


if __name__ == "__main__":
    run(main)
