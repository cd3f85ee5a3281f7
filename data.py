"""Pictures in, tensors out; and what all scripts share: seeds, rounding, safe files, errors in one line.

    python data.py mnist              # or cifar10; downloads 10 or 170 MB, or reads them from --from DIR
    python data.py folder --src DIR --size 64 --out data/flowers      # your own .png .jpg .jpeg .webp
    python data.py folder --src DIR --size 256 --latents --out data/mine         # as SD-VAE latents
    torchrun --nproc_per_node=8 data.py imagenet --src DIR            # latents, writes data/imagenet256

Each command prepares a data set once; killed and typed again, folder and imagenet go on. All else sees:

    dataset = load("mnist")                     # or "digits", or the path of any prepared folder
    x, y = dataset.batch(step, batch_size=256)  # pictures (B, C, H, W) float32 in [-1, 1], y (B,) int64
    x = dataset.sample(x, noise)                # x itself; of latents one sample of their distribution
"""
import argparse
import contextlib
import datetime
import functools
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.request
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from model import fill, read_tensors

# ---- what all scripts share ------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line and guesses no abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(message)


def run(main):
    """Call main(). ValueError and OSError, what a user can mend, become one line and exit status 2."""
    try:
        main()
        if dist.is_initialized():                       # its threads can abort a process that just ends
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        if os.environ.get("DEBUG"):                     # shows where it comes from
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)           # what is wrong for all, the first one says, and its end ends the others
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def place(device=None):
    """(rank, world, device) of this process: torchrun's numbers, and cuda or cpu if none is given."""
    # Not mps, which has no float64 and no forward-mode derivative of attention.
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        torch.zeros(1, device=name)                     # the one test that cannot be wrong
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} is not to be had here: give cuda, cuda:1 or cpu") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
        torch.backends.cudnn.allow_tf32 = False         # on by default; 10 bits would show in features, too
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), torch.device(name)


def meet(backend="gloo", minutes=30 * 24 * 60):
    """Connect the processes of torchrun; nothing to do for one alone. minutes: to wait for others."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))


def wait_for_all():
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def seeds(*key):
    """A numpy SeedSequence of the integers in `key`, 0 .. 2**64 - 1, else ValueError."""
    # SeedSequence alone pads with zeros and cuts big integers into 32-bit words: (1, 2) and (1, 2, 0)
    # would be one seed. The length in front and 64 bits for each integer keep different keys different.
    if not all(0 <= k < 2**64 for k in key):
        raise ValueError(f"seeds are integers from 0 to 2**64 - 1, not {key}")
    return np.random.SeedSequence(np.array([len(key), *key], dtype=np.uint64).view(np.uint32))


def generator(*key, device="cpu"):
    """A torch.Generator on `device` seeded by the integers in `key`, whose order counts."""
    return torch.Generator(device).manual_seed(int(seeds(*key).generate_state(1, np.uint64)[0]))


def to_uint8(x):
    """Pictures in [-1, 1] -> uint8, same shape; clamped, infinities too, and NaN becomes 0."""
    # The one rounding rule of this project: 2u/255 - 1 is inexact, and rounding returns to the same u where
    # truncation loses a level now and then. Truncation also darkens every picture by half a level, which a
    # Fréchet distance sees. bfloat16 carries 8 bits, so the arithmetic is float32 at least.
    x = x if x.dtype == torch.float64 else x.float()
    return ((x.nan_to_num(nan=-1.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@contextlib.contextmanager
def replacing(path):
    """A file to write; it gets the name `path` when the block ends well. Until then an old one stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}.part")     # a process each
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())                     # or a power cut may keep the name and lose the bytes
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def prefetch(iterable, depth=4):
    """Yield the items of `iterable` in order, while a thread works up to `depth` items ahead."""
    items, end = iter(iterable), object()
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, items, end))
            yield item


class Shards:
    """Arrays that many processes make chunk by chunk, each chunk a file. Killed and typed again, it goes on.

    A chunk is always made as a whole, for a GPU may round a row otherwise in a batch of another size. So
    neither kills nor the number of processes show in the result.
    """

    def __init__(self, folder, count, chunk):
        self.folder, self.count = Path(folder), count
        self.files = {range(count)[k:k + chunk]: self.folder / f"{k:09d}.npz" for k in range(0, count, chunk)}

    def todo(self):
        """The chunks, as ranges of rows, that this process has to make and that are not there yet."""
        rank, world, _ = place("cpu")
        return [rows for rows in list(self.files)[rank::world] if not self.files[rows].exists()]

    def write(self, rows, **arrays):
        """Store what the arrays hold in the chunk `rows`."""
        with replacing(self.files[rows]) as file:
            np.savez(file, **arrays)

    def parts(self, name):
        """One of the arrays, chunk by chunk."""
        for file in self.files.values():
            with np.load(file) as arrays:
                yield arrays[name]

    def join(self, name, file):
        """Write one of the arrays to `file` as .npy, without having it in memory."""
        for k, part in enumerate(self.parts(name)):
            if k == 0:
                shape = self.count, *part.shape[1:]
                header = {"descr": part.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(part.tobytes())


# ---- a data set ------------------------------------------------------------------------------------

class Dataset:
    """Labelled pictures, and which of them belong to which step.

    images: uint8 (M, C, H, W). labels: int64 (M,), -1 where a file could not be read; N are left. about:
    name, classes, their names, range (lo, hi) of the stored integers. ValueError if they do not agree.
    """
    dtype = np.uint8

    def __init__(self, images, labels, about, seed=0, flip=False):
        self.images, self.about, self.seed, self.flip = images, about, seed, flip
        self.good = np.flatnonzero(labels >= 0)                                   # (N,)
        self.labels = labels[self.good]
        self.name, self.classes, self.shape = about["name"], about["classes"], images.shape[1:]
        if len(images) != len(labels) or images.dtype != self.dtype or self.labels.max() >= self.classes:
            raise ValueError("pictures, labels and meta.json do not fit together")

    def __len__(self):
        return len(self.labels)

    def describe(self):
        """Plain values for a checkpoint: what it was trained on."""
        return {**self.about, "label_counts": np.bincount(self.labels, minlength=self.classes).tolist()}

    def read(self, rows):
        """The pictures `rows` of N (whatever numpy indexes with), float32 (b, C, H, W) in [-1, 1]."""
        x = torch.from_numpy(self.images[self.good[rows]].astype(np.float32))     # (b, C, H, W)
        lo, hi = self.about["range"]
        return x.sub_(lo).mul_(2).div_(hi - lo).sub_(1)

    def sample(self, x, noise=None):
        """What the network is trained on, of a batch x: the pictures as they are."""
        return x

    def batch(self, step, rank=0, world=1, batch_size=64):
        """Pictures x (b, C, H, W) and labels y (b,) of `step` for process `rank` of `world`.

        batch_size is the global one: b = batch_size / world, namely rows rank, rank + world, ... of the
        batch that one process alone would get. A pure function of (seed, step): there is no position to
        save or restore. An epoch is one permutation cut into whole batches; the rest sits it out. A batch
        larger than the set goes round in it. ValueError if world does not divide batch_size.
        """
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"a batch of {batch_size} cannot be divided over {world} processes")
        epoch, k = divmod(step, max(1, len(self) // batch_size))
        places = np.arange(k * batch_size, (k + 1) * batch_size) % len(self)
        rows = permutation(self.seed, epoch, len(self))[places[rank::world]]      # (b,)
        x, y = self.read(rows), torch.from_numpy(self.labels[rows])
        if self.flip:                                   # one coin a row of the global batch
            coins = np.random.default_rng(seeds(1, self.seed, step)).random(batch_size)[rank::world] < 0.5
            x[coins] = x[coins].flip(-1)
        return x, y


@functools.lru_cache(2)
def permutation(seed, epoch, count):
    """The numbers 0 .. count - 1 in the order of this epoch."""
    return np.random.default_rng(seeds(0, seed, epoch)).permutation(count)


class Latents(Dataset):
    """Pictures as a VAE sees them: of each a normal distribution over tensors (4, h, w).

    images: their moments, float16 (M, 8, h, w), means and log-variances. about has also vae, which one,
    and stats, (2, 4, h, w), taken out of it: mean and variance over the set at each position.
    """
    dtype = np.float16

    def __init__(self, images, *arguments):
        super().__init__(images, *arguments)
        mean, var = torch.tensor(self.about.pop("stats"), dtype=torch.float64)    # each (4, h, w)
        self.mean, self.std, self.shape = mean.float(), var.sqrt().float(), tuple(mean.shape)
        if images.shape[1:] != (8, *self.shape[1:]):
            raise ValueError("moments and their statistics do not fit together")

    def read(self, rows):
        return torch.from_numpy(self.images[self.good[rows]])                     # (b, 8, h, w)

    def sample(self, x, noise=None):
        """Moments x (b, 8, h, w), fresh noise of N(0, 1) -> normalised latents, both (b, 4, h, w) float32."""
        self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        mean, logvar = x.float().chunk(2, dim=1)
        return (mean + (logvar / 2).exp() * noise - self.mean) / self.std


def load(name_or_folder, seed=0, flip=False):
    """-> Dataset (Latents if it holds latents): "digits", a name under data/, or a prepared folder's path.

    flip: mirror half of what batch() gives. ValueError with the command to type if it is not prepared.
    """
    name = str(name_or_folder)
    places = Path(name), Path("data") / name, Path(__file__).parent / "assets" / name
    folder = next((place for place in places if (place / "meta.json").is_file()), None)
    if not folder:
        known = {"mnist": "mnist", "cifar10": "cifar10", "imagenet256": "imagenet --src DIR"}
        src, out = "DIR", name if os.sep in name else f"data/{name}"
        if Path(name).is_dir():                         # raw pictures
            src, out = name, f"data/{Path(name).name}"
        command = known.get(Path(name).name, f"folder --src {src} --size 64 --out {out}")
        raise ValueError(f"data set {name!r} is not prepared: type  python data.py {command}")
    try:
        about = json.loads((folder / "meta.json").read_text()) | {"name": folder.resolve().name}
        images, labels = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")
        return (Latents if "vae" in about else Dataset)(images, labels, about, seed, flip)
    except Exception as error:                          # damage can raise nearly anything
        raise ValueError(f"{folder} is damaged ({error}): delete it and prepare it again") from None


# ---- preparing a data set: downloads, and your own pictures as pixels or latents ---------------------

LECUN = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
MNIST = {   # archive: its md5 as published, and the md5 of what is inside, for archives packed by others
    "train-images-idx3-ubyte.gz": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte.gz": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
}
CIFAR10 = ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
           ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"])
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CHUNK = 64              # pictures that are read, encoded and written together


def cache_folder():
    """Where downloads are kept: $ALPHAFLOW_CACHE, else ~/.cache/alphaflow."""
    return Path(os.environ.get("ALPHAFLOW_CACHE") or "~/.cache/alphaflow").expanduser()


def checksum_of(path, kind="sha256"):
    """The checksum of the file at `path` in hex. kind: "sha256" or "md5"."""
    return hashlib.new(kind, Path(path).read_bytes()).hexdigest()


def fetch(filename, checksum, urls, folder):
    """The path of `filename` in `folder`, downloaded if it is not there. checksum: hex, md5 or sha256.

    ValueError if a file of that name has another checksum, or no address in `urls` has the right one.
    """
    path, kind = Path(folder) / filename, "md5" if len(checksum) == 32 else "sha256"
    if path.exists():
        if checksum_of(path, kind) != checksum:
            raise ValueError(f"{path} is not the published file (its {kind} differs): delete it")
        return path
    problem = "it is not there"
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=30) as reply, replacing(path) as file, \
                    tqdm.wrapattr(reply, "read", reply.length, desc=filename, disable=None) as counted:
                shutil.copyfileobj(counted, file, 1 << 20)
                file.flush()
                if checksum_of(file.name, kind) != checksum:        # in here: the file must not get its name
                    raise OSError("wrong checksum, or the connection broke")
            return path
        except Exception as error:                      # a broken server can raise nearly anything
            problem = f"{url}: {error}"
    raise ValueError(f"no {filename} ({problem}): get it in another way and put it at {path}")


def mnist(out, source=None):
    """MNIST's 60,000 training digits (LeCun et al., CC BY-SA 3.0), padded from 28x28 to 32x32."""
    arrays = []
    for name, (md5, md5_inside) in MNIST.items():
        if source:                                      # plain, or as an archive
            plain = source / Path(name).stem
            path = plain if plain.is_file() else source / name
        else:
            path = fetch(name, md5, [url + name for url in LECUN], cache_folder())
        raw = path.read_bytes()
        with contextlib.suppress(Exception):            # plain bytes and damaged archives stay as they are
            raw = gzip.decompress(raw)
        if hashlib.md5(raw).hexdigest() != md5_inside:
            raise ValueError(f"{path} is not the published file (its md5 differs): get it again")
        arrays.append(np.frombuffer(raw, np.uint8))
    digits, labels = arrays[0][16:].reshape(-1, 28, 28), arrays[1][8:]            # without their headers
    images = np.pad(digits, ((0, 0), (2, 2), (2, 2)))[:, None]                    # (60000, 1, 32, 32)
    publish(out, labels, list("0123456789"), images, key="mnist")


def cifar10(out, source=None):
    """The 50,000 training pictures of CIFAR-10 (Krizhevsky, 2009), 3x32x32."""
    name, md5, urls = CIFAR10
    with tarfile.open(fetch(name, md5, [] if source else urls, source or cache_folder())) as tar:
        parts = [tar.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read() for i in range(1, 6)]
        names = tar.extractfile("cifar-10-batches-bin/batches.meta.txt").read().decode().split()
    rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # label, then R, G, B
    publish(out, rows[:, 0], names, rows[:, 1:].reshape(-1, 3, 32, 32), key="cifar10")


def listing(src):
    """-> picture paths (sorted), their labels, class names. Hidden files do not count.

    A class is a first-level folder, however deep its pictures lie; without folders there is one, "all".
    ValueError: `src` is no folder, holds no picture, or has pictures beside class folders.
    """
    found = map(Path, glob.iglob("**/*", root_dir=src, recursive=True))           # relative to src
    inside = sorted(path for path in found if path.suffix.lower() in PICTURES)
    if not inside:
        raise ValueError(f"{src} is no folder or holds no picture: looked for {' '.join(PICTURES)}")
    classes = [path.parts[0] if len(path.parts) > 1 else "all" for path in inside]
    if len({len(path.parts) == 1 for path in inside}) == 2:        # some lie in folders and some do not
        raise ValueError(f"{src} has pictures beside its class folders: move them into one")
    names, labels = np.unique(classes, return_inverse=True)
    return [src / path for path in inside], labels.tolist(), names.tolist()


def picture(path, size=None):
    """A file as uint8 (3, size, size), upright, RGB, centre square; no size: (3, H, W). Raises if damaged."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
        im = ImageOps.exif_transpose(file)              # phones store a turned picture and a note about it
    if im.mode.startswith("I"):                         # 16-bit grey: Pillow's convert would clip at 255
        im = Image.fromarray((np.asarray(im) / 257).round().clip(0, 255).astype(np.uint8))
    if im.mode.endswith("A") or "transparency" in im.info:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    im = im.convert("RGB")                              # grey, palette, CMYK
    if size is not None:
        side = min(im.size)
        left, top = (im.width - side) // 2, (im.height - side) // 2
        im = im.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(im).transpose(2, 0, 1)


def attempt(path, size):
    """picture(path, size), or what is wrong with the file, a str."""
    try:
        return picture(path, size)
    except Exception as error:                          # decoders raise nearly anything on damaged files
        return f"{type(error).__name__}: {error}"


def prepare(src, out, size, vae=None, device=None):
    """Prepare in `out` the tree of pictures `src` (see listing), on any number of processes.

    size: pixels a side. vae: None, or "ema" or a file (see find_vae): then latents are stored.
    Damaged files are reported and left out. ValueError for what does not fit.
    """
    rank, _, device = place(device or (None if vae else "cpu"))
    if size < 1 or vae and size % 8:
        raise ValueError(f"--size {size}: give pixels a side, for latents a multiple of 8")
    files, labels, names = listing(src)
    work = json.dumps([size, vae, [str(path.relative_to(src)) for path in files]])
    key = hashlib.sha256(work.encode()).hexdigest()[:16]
    if finished(out, key):
        return
    vae = str(Path(vae).resolve()) if vae and vae != "ema" else vae
    net = find_vae(vae, device) if vae else None
    meet()
    shards = Shards(out / f"unfinished-{key}", len(files), CHUNK)
    todo = shards.todo()
    with ThreadPoolExecutor() as pool:                  # its threads read ahead
        read = (list(pool.map(lambda k: attempt(files[k], size), rows)) for rows in todo)
        bar = tqdm(todo, unit="chunk", disable=True if rank else None)
        for rows, pictures in zip(bar, prefetch(read, 2)):
            own = [labels[k] for k in rows]
            for i, u in enumerate(pictures):
                if isinstance(u, str):                  # what is wrong with it
                    print(f"skipped {files[rows[i]]}: {u}", file=sys.stderr)
                    own[i], pictures[i] = -1, np.zeros((3, size, size), np.uint8)
            u = np.stack(pictures)                                                # (b, 3, size, size)
            shards.write(rows, images=encode(net, u, device) if vae else u, labels=own)
    wait_for_all()
    if rank == 0:
        labels = np.concatenate(list(shards.parts("labels")))
        if (labels < 0).all():
            shutil.rmtree(shards.folder)                # next time they may be readable
            raise ValueError(f"none of the pictures in --src {src} could be read")
        with replacing(out / "images.npy") as file:
            shards.join("images", file)
        about = {"vae": vae, "stats": statistics(shards).tolist()} if vae else {}
        publish(out, labels, names, key=key, **about)


def statistics(shards):
    """Mean and variance at each position of samples from the good rows' moments, float64 (2, 4, h, w)."""
    n, total = 0, 0.0                                   # total: of a sample and of its square
    for moments, labels in zip(shards.parts("images"), shards.parts("labels")):
        mean, logvar = np.split(moments[labels >= 0].astype(np.float64), 2, axis=1)
        n += len(mean)
        total += np.stack([mean.sum(0), (mean**2 + np.exp(logvar)).sum(0)])
    mean, square = total / n                                                      # each (4, h, w)
    return np.stack([mean, square - mean**2])


def finished(out, key):
    """True, tidied up and said, if `out` is prepared from `key`; ValueError if it holds another data set."""
    if not (out / "meta.json").exists():
        return False
    dataset = load(out)
    if dataset.about.get("key") != key:
        raise ValueError(f"--out {out} already holds another data set: give another folder, or delete it")
    if place("cpu")[0] == 0:
        print(f"{out} is prepared: {len(dataset):,} pictures in {dataset.classes} classes; "
              f"next: python train.py --data {out}")
        for folder in out.glob("unfinished-*"):         # its shards are joined
            shutil.rmtree(folder)
    return True


def publish(out, labels, names, images=None, **about):
    """Finish `out`: pictures, unless they are there, labels, and last of all meta.json."""
    for name, array in (("images.npy", images), ("labels.npy", labels.astype(np.int64))):
        if array is not None:
            with replacing(out / name) as file:
                np.save(file, array)
    with replacing(out / "meta.json") as file:
        meta = dict(classes=len(names), names=names, range=[0, 255], **about)
        file.write(json.dumps(meta).encode())
    finished(out, about["key"])


# ---- the autoencoder of Stable Diffusion -----------------------------------------------------------

VAE_WEIGHTS = (         # file, its sha256, where it is published
    "sd-vae-ft-ema.safetensors", "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ["https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/"
     "f04b2c4b98319346dad8c65879f680b1997b204a/diffusion_pytorch_model.safetensors"])


class Resnet(nn.Module):
    """x + what two convolutions, each after norm and SiLU, make of it: (n, a, h, w) -> (n, b, h, w)."""

    def __init__(self, a, b, norm):
        super().__init__()
        self.norm1, self.conv1 = norm(a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = norm(b), nn.Conv2d(b, b, 3, padding=1)
        self.conv_shortcut = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """x + attention with one head among all its pixels: (n, c, h, w) -> the same."""

    def __init__(self, c, norm):
        super().__init__()
        self.group_norm = norm(c)
        self.to_q, self.to_k, self.to_v, self.to_out0 = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        y = self.group_norm(x).flatten(2).mT[:, None]                             # (n, 1, h·w, c)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out0(y).mT.reshape(x.shape)


def coder(way, a, b, channels, norm):
    """Half of a VAE, "down" or "up": (n, a, h, w) -> (n, b, h/8, w/8) or (n, b, 8h, 8w)."""
    down, first, last, levels = way == "down", channels[0], channels[-1], OrderedDict()
    for i, (c, d) in enumerate(zip((first, *channels), channels)):
        level = OrderedDict((f"resnets{j}", Resnet(d if j else c, d, norm)) for j in range(2 if down else 3))
        if i < len(channels) - 1:                       # on to the size of the next one
            # Zeros at the right and the bottom alone, as in the original: padding=1 would shift all.
            resize = nn.ZeroPad2d((0, 1, 0, 1)) if down else nn.Upsample(scale_factor=2.0)
            conv = nn.Conv2d(d, d, 3, stride=2) if down else nn.Conv2d(d, d, 3, padding=1)
            level[f"{way}samplers0"] = nn.Sequential(OrderedDict(resize=resize, conv=conv))
        levels[f"{way}_blocks{i}"] = nn.Sequential(level)
    narrow = last if down else first                    # where the picture is smallest
    levels["mid_block"] = nn.Sequential(OrderedDict(
        resnets0=Resnet(narrow, narrow, norm), attentions0=Attention(narrow, norm),
        resnets1=Resnet(narrow, narrow, norm)))
    levels.move_to_end("mid_block", last=down)          # on the way up it comes first
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(a, first, 3, padding=1), **levels,
        conv_norm_out=norm(last), silu=nn.SiLU(), conv_out=nn.Conv2d(last, b, 3, padding=1)))


class VAE(nn.Module):
    """The autoencoder of latent diffusion (Rombach et al. 2022), names as in diffusers, see build_vae.

    channels of the levels, each a multiple of `groups`; with four levels 8x8 pixels become one of z.
    Diffusion models work on 0.18215·z; here latents are normalised by their own statistics instead.
    """

    def __init__(self, channels, groups):
        super().__init__()
        norm = functools.partial(nn.GroupNorm, groups, eps=1e-6)        # of so many channels; not 1e-5
        self.encoder = coder("down", 3, 8, channels, norm)
        self.decoder = coder("up", 4, 3, channels[::-1], norm)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def encode(self, x):
        """x (n, 3, H, W) in [-1, 1], 8 dividing H and W -> mean and logvar, each (n, 4, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (n, 4, h, w) -> pictures (n, 3, 8h, 8w), about [-1, 1] but not clamped to it."""
        return self.decoder(self.post_quant_conv(z))


VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}   # old


def build_vae(state, groups=32, dtype=torch.float32):
    """The VAE whose published weights `state` holds ({name: tensor} as in diffusers, old or new), frozen.

    Our resnets0 is their resnets.0. groups: of the norms, as no weight tells. ValueError for other weights.
    """
    have, channels = {}, []
    for name, w in state.items():
        for old, new in VAE_NAMES.items():
            name = name.replace(old, new)
        have[re.sub(r"\.(\d+)\.", r"\1.", name)] = w.detach().to(dtype)
    while (first := f"encoder.down_blocks{len(channels)}.resnets0.conv1.weight") in have:
        channels.append(len(have[first]))
    with torch.device("meta"):                          # no memory and no initial values
        net = VAE(channels or [groups], groups)         # without an encoder: any, it will not fit
    return fill(net, have, "a VAE")


def find_vae(name="ema", device="cpu"):
    """The VAE on `device`, frozen: "ema", the published one (cache, else download), or a file."""
    path = fetch(*VAE_WEIGHTS, cache_folder()) if name == "ema" else name
    try:
        return build_vae(read_tensors(path)).to(device)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


@torch.no_grad()
def encode(vae, u, device):
    """Pictures uint8 (n, 3, H, W), numpy -> moments float16 (n, 8, H/8, W/8), numpy: mean and logvar."""
    torch.backends.cudnn.deterministic = True           # else the numbers depend on more than the picture
    pieces = torch.from_numpy(u).split(8 if device.type == "cpu" else len(u))     # a laptop's memory
    moments = [torch.cat(vae.encode(piece.to(device).float() / 127.5 - 1), dim=1).half() for piece in pieces]
    moments = torch.cat(moments).cpu().numpy()
    if not np.isfinite(moments).all():
        raise ValueError("the VAE gives infinities or NaN: its weights are damaged")
    return moments


# ---- command line ----------------------------------------------------------------------------------

def main():
    parser = Parser(description="Prepare a data set once; train.py --data reads it from then on.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("mnist", "60,000 digits, 1x32x32"), ("cifar10", "50,000 photos, 3x32x32")):
        p = commands.add_parser(name, help=what)
        p.add_argument("--from", dest="source", type=Path, metavar="DIR", help="files you already have")
        p.add_argument("--out", type=Path, default=Path("data") / name, help=f"folder to write [data/{name}]")
    for name, size, what in (("folder", 64, "your own pictures; each first-level folder is a class"),
                             ("imagenet", 256, "the same as latents, for the paper's recipes")):
        p = commands.add_parser(name, help=what)
        p.add_argument("--src", type=Path, required=True, metavar="DIR", help="tree of png, jpeg or webp")
        p.add_argument("--out", type=Path, required=name == "folder", help="folder to write, like data/NAME")
        p.add_argument("--size", type=int, default=size, help=f"pixels a side [{size}]")
        p.add_argument("--latents", action="store_true", default=name == "imagenet", help="store latents")
        p.add_argument("--vae", help="ema or a file of weights, for latents [ema]")
        p.add_argument("--device", help="for latents: cuda or cpu [cuda if there]")
    args = parser.parse_args()
    if "src" in args:
        out = args.out or Path(f"data/imagenet{args.size}")
        prepare(args.src, out, args.size, args.vae or ("ema" if args.latents else None), args.device)
    elif not finished(args.out, args.command):
        {"mnist": mnist, "cifar10": cifar10}[args.command](args.out, args.source)


if __name__ == "__main__":
    run(main)
