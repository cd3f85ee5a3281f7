"""
From a checkpoint to pictures, in one evaluation of the network or a few.

    python sample.py --ckpt out/digits/ckpt.pt --nfe 1                        # a grid, one row a class
    python sample.py --ckpt out/digits/ckpt.pt --grid 1,0.55,0 --sampler consistency --classes 3,1,4
    python sample.py --ckpt out/digits/ckpt.pt --num 1000 --out out/many.npz  # or out/many/ for PNGs
    python sample.py --ckpt out/digits/ckpt.pt --trajectory out/digits/trajectory.gif
    torchrun --nproc_per_node=8 -- sample.py --ckpt out/digits/ckpt.pt --num 50000 --out out/many.npz
    python sample.py --ckpt alphaflow-XL-2-plus-cfg.pt --nfe 2                # released weights

t = 1 is noise, t = 0 is data. The network gives u(z, t, r, y), the average velocity of the jump from t
down to r, so a step t -> s is one subtraction however long it is: z_s = z_t - (t - s)·u(z_t, t, s, y).
The paper has two samplers: one follows such jumps, the other jumps to t = 0 each time and puts noise
back.

The noise of picture k depends on the seed and k alone, not on the batch size or the number of processes.
Many pictures that were interrupted, in an .npz or a folder, go on where they were with the same command.
"""
import contextlib
import datetime
import functools
import io
import json
import math
import mmap
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from data import UserError
from model import SIZES, DiT, DiTConfig

FORMAT = "alphaflow-1"  # what train.py writes into its checkpoints

# ------------------------------------------------------------------ grids of times


def uniform_grid(nfe):
    """[1.0, ..., 0.0], the times i/nfe of `nfe` equal jumps. ValueError if nfe is no integer >= 1."""
    if nfe != int(nfe) or nfe < 1:
        raise ValueError(f"network evaluations must be a whole number from 1 up, not {nfe}")
    return [i / nfe for i in range(int(nfe), -1, -1)]


def check_grid(grid):
    """`grid` as a list of floats. ValueError unless it is two or more falling times, all in [0, 1]."""
    try:
        times = [float(t) for t in grid]
    except (TypeError, ValueError):
        times = []
    falling = all(t > s for t, s in zip(times, times[1:]))  # NaN fails here, too
    if len(times) < 2 or not falling or not 0 <= times[-1] < times[0] <= 1:
        raise ValueError(f"grid {','.join(map(str, grid))} must be two or more falling times between "
                         "1 and 0, like 1,0.5,0")
    return times


# The published files: the sampler, and the times at 2 NFE. At 1 NFE both samplers are the same jump.
PUBLISHED = {
    "meanflow-B-2": ("ode", (1.0, 0.5, 0.0)),
    "alphaflow-B-2": ("ode", (1.0, 0.5, 0.0)),
    "meanflow-B-2-cfg": ("ode", (1.0, 0.5, 0.0)),
    "alphaflow-B-2-cfg": ("ode", (1.0, 0.5, 0.0)),
    "meanflow-XL-2-cfg": ("ode", (1.0, 0.5, 0.0)),
    "alphaflow-XL-2-cfg": ("consistency", (1.0, 0.55, 0.0)),
    "alphaflow-XL-2-plus-cfg": ("consistency", (1.0, 0.5, 0.0)),
}


def sampling_plan(path, nfe=None, grid=None, sampler=None):
    """(grid, sampler, note): how to sample from the checkpoint at `path`, given what the user typed.

    nfe: evaluations, 1 if None. grid: the times as typed, like "1,0.55,0". sampler: its name. Where grid
    and sampler are both None and the file has the name of a published one, it is what was published for
    it, and the note is one line that says so; else equal jumps, "ode" and "". ValueError for a bad grid.
    """
    times = uniform_grid(1 if nfe is None else nfe) if grid is None else check_grid(grid.split(","))
    name = Path(path).name.removesuffix(".pt")  # weights do not tell what they were sampled with
    if grid is not None or sampler is not None or name not in PUBLISHED:
        return times, sampler or "ode", ""
    sampler, two = PUBLISHED[name]
    times = list(two) if len(times) == 3 else times
    note = f"published sampler for {name}: {sampler}, times {' > '.join(f'{t:g}' for t in times)}"
    return times, sampler, note + " (equal jumps: none published beyond 2 NFE)" * (len(times) > 3)


# ------------------------------------------------------------------ the two samplers, α-Flow §6


def velocity(net, z, t, r, y):
    """u(z, t, r, y) for one pair of times, in z's dtype; the network is fed in that of its weights."""
    w = next(net.parameters(), z) if isinstance(net, torch.nn.Module) else z
    t, r = (torch.full((len(z),), s, dtype=w.dtype, device=z.device) for s in (t, r))    # (B,), (B,)
    return net(z.to(w.dtype), t, r, y).to(z.dtype)                                       # (B, C, H, W)


@torch.no_grad()
def ode(net, z, y, grid, callback=None):
    """Follow the average velocity down the grid: z <- z - (t - s)·u(z, t, s, y). α-Flow §6.

    net: any u(z, t, r, y). z: (B, C, H, W), the state at time grid[0], which is noise if that is 1;
    float32 or float64, which is kept. y: (B,) int64. grid: falling times in [0, 1], else ValueError.
    callback(i, t, s, z, x_hat) sees each step t -> s: the state after it, the picture it pointed at.
    Returns x_hat of the last step, (B, C, H, W); that is the last state if the grid ends at 0.
    """
    grid = check_grid(grid)
    for i, (t, s) in enumerate(zip(grid, grid[1:])):
        u = velocity(net, z, t, s, y)
        x_hat = z - t * u
        z = z - (t - s) * u
        if callback:
            callback(i, t, s, z, x_hat)
    return x_hat


@torch.no_grad()
def consistency(net, z, y, grid, noise=None, generator=None, callback=None):
    """Jump to the picture, put noise back, repeat: x_hat = z - t·u(z, t, 0, y), z <- (1-s)·x_hat + s·e'.

    α-Flow §6; arguments and result as in `ode`. noise: the fresh e' of each step, (steps, B, C, H, W) or
    a list of (B, C, H, W); a step that ends at s = 0 needs none. Without it, e' is drawn from
    `generator`. ValueError also if `noise` is too short or its draws are not of z's shape.
    """
    grid = check_grid(grid)
    needed = sum(s > 0 for s in grid[1:])
    if noise is not None and (len(noise) < needed or any(e.shape != z.shape for e in noise[:needed])):
        raise ValueError(f"noise must hold {needed} draws of shape {tuple(z.shape)} for this grid")
    for i, (t, s) in enumerate(zip(grid, grid[1:])):
        z = x_hat = z - t * velocity(net, z, t, 0., y)
        if s > 0:
            e = noise[i] if noise is not None else torch.randn(
                z.shape, generator=generator, device=generator.device if generator else z.device)
            z = (1 - s) * x_hat + s * e.to(z)  # (1 - s): as in training, z_s = (1-s)·x + s·e
        if callback:
            callback(i, t, s, z, x_hat)
    return x_hat


# ------------------------------------------------------------------ checkpoints


def read(path):
    """The checkpoint dict in `path`, on the CPU, as train.py writes it. Nothing in the file is executed.

    A released α-Flow file comes in the same layout, see `from_released`. This is the one place where
    kinds of checkpoint are told apart, and it goes by content.
    UserError in one line if it is missing, cut short, damaged, foreign or hostile.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the ckpt.pt that  python train.py  writes")
    open(path, "rb").close()  # the system says it best if we may not; the rest is the content's fault
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one line is enough
            # Mapped, not read: whoever samples touches the EMA only, a quarter of the file.
            ckpt = torch.load(str(path), map_location="cpu", weights_only=True,
                              mmap=zipfile.is_zipfile(path))
    except Exception:  # a damaged or hostile file can raise nearly anything; a released one does, too
        ckpt = _try_released(path)
        if ckpt is None:
            raise UserError(f"{path} cannot be read as a checkpoint: it is cut short or something else "
                            "(nothing in it was run); expected one that train.py wrote or a released one"
                            ) from None
    found = ckpt.get("format") if isinstance(ckpt, dict) else None
    if found is None and _is_released(ckpt):
        return from_released(ckpt, path)
    if not isinstance(found, str) or found != FORMAT:
        raise UserError(f"{path} is some other torch file: expected one that train.py wrote, with "
                        f"format {FORMAT!r}, found {found if isinstance(found, str) else 'no format'!r}")
    if missing := [key for key in ("net", "ema", "config") if not isinstance(ckpt.get(key), dict)]:
        raise UserError(f"{path} lacks {', '.join(missing)}: expected a whole file that train.py wrote")
    return ckpt


def load(path, weights="ema", device="cpu", precision="bf16"):
    """(net, decode) from a checkpoint: a frozen DiT on `device`, and what makes pictures of its samples.

    weights: "ema" (the running average: what one samples from) or "raw". decode: (B, C, H, W) samples of
    the network -> (B, C, H, W) uint8. Latents become pictures in a VAE, on CUDA in "bf16" or "fp32" as
    `precision` says, elsewhere in float32. ValueError for other words; UserError as in `read`, and if
    the stored weights are not those of the stored config.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be 'ema' or 'raw', not {weights!r}")
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision must be 'bf16' or 'fp32', not {precision!r}")
    ckpt, device = read(path), torch.device(device)
    try:
        with torch.device("meta"):  # no memory and no initialisation: every tensor comes from the file
            net = DiT(DiTConfig(**ckpt["config"]["model"]))
        state = ckpt["ema" if weights == "ema" else "net"]
        # copied, so that the network outlives the mapped file
        state = {name: w.to(device, torch.float32, copy=True) for name, w in state.items()}
        net.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"{path}: expected the {weights} weights and the config of one network, but "
                        f"they do not fit together ({reason})") from None
    return net.eval().requires_grad_(False), latent_decoder(ckpt, net.config, path, device, precision)


def latent_decoder(ckpt, config, path, device, precision="bf16"):
    """decode(x): samples (B, C, h, w) -> uint8 pictures, through a VAE if `ckpt` names means of latents.

    config: the network's. The VAE is the one in the file, else data.find_vae's; it is made at the first
    call, as whoever wants the network alone needs none. precision: as in `load`.
    UserError if the statistics are not of the network's shape; from decode, if the VAE is none.
    """
    if not ckpt.get("latents"):
        return data.to_uint8
    try:
        shape = (config.channels, config.size, config.size)
        mean, std = (ckpt["latents"][k].to(device, torch.float32).expand(shape) for k in ("mean", "std"))
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise UserError(f"{path}: expected mean and std of its latents, each {shape}") from None

    @functools.cache
    def vae():
        if not (state := ckpt.get("vae")):
            about = ckpt["latents"].get("vae") or {"name": "ema", "sha256": None}
            return data.find_vae(name=about["name"], device=device, sha256=about["sha256"])
        try:
            state = {name: w.to(device, torch.float32, copy=True) for name, w in state.items()}
            return data.build_vae(state)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: {error}") from None

    @torch.no_grad()
    def decode(x):
        if precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # else convolutions on CUDA round to 10 bits
        z = x.to(mean) * std + mean                                                      # (B, C, h, w)
        with torch.autocast(device.type, torch.bfloat16,
                            enabled=device.type == "cuda" and precision == "bf16"):
            # in small pieces: eight pictures of 256x256 need about 2 GB on their way
            return torch.cat([data.to_uint8(vae().decode(piece)) for piece in z.split(8)])

    return decode


def pick_device(name=None):
    """The torch.device `name`, else cuda, else mps, else cpu. UserError if there is no such device here.

    Under torchrun a plain "cuda" is this process's own card, LOCAL_RANK.
    """
    if name is None:
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.type in ("cuda", "mps", "cpu"):
            torch.zeros(1, device=device)  # the one test that cannot be wrong
            return device
    except (RuntimeError, AssertionError, ValueError):
        pass
    raise UserError(f"device {str(name)!r} is not to be had here: give cuda, cuda:1, mps or cpu")


# ------------------------------------------------------------------ tensors from other people's files

STORAGES = {f"torch.{kind}Storage": dtype for kind, dtype in dict(
    Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Double=torch.float64,
    Long=torch.int64, Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8,
    Bool=torch.bool, ComplexFloat=torch.complex64, ComplexDouble=torch.complex128).items()}
STORAGES["torch.storage.UntypedStorage"] = torch.uint8
WRAPPERS = ("torch._utils._rebuild_parameter", "torch.jit._pickle.", "torch.Size",
            "builtins.set", "__builtin__.set")


class _Inert:
    """Stands for whatever a pickle names, class or function: keeps what it is given and runs nothing."""

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args, self.kept = args, {"args": args, **kwargs} if args else kwargs
        return self

    def __setstate__(self, state):
        for part in state if isinstance(state, tuple) else (state,):     # (attributes, slots) or one
            self.kept.update(part if isinstance(part, dict) else {"state": state} if part else {})

    def __setitem__(self, key, value):
        self.kept[key] = value

    def extend(self, items):
        self.kept.setdefault("items", []).extend(items)


class _Foreign(pickle.Unpickler):
    """Unpickles nothing but inert objects; `plain` makes of them what their names are known for."""

    def __init__(self, archive, mapped=None):
        self.mapped = mapped                    # the bytes of the whole file, or None: read each storage
        # the archive's own folder has any name; a file that rides along deeper may be called the same
        name = min((n for n in archive.namelist() if n.endswith("/data.pkl")), key=len)
        self.archive, self.folder, self.made, self.raw = archive, name.removesuffix(".pkl"), {}, {}
        super().__init__(io.BytesIO(archive.read(name)), encoding="utf-8")

    def find_class(self, module, name):
        return type("Inert", (_Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid):
        return pid                              # ("storage", type, key, device, number of elements)

    def storage(self, key):
        """The bytes of a storage: read and their checksum compared or, of a mapped file, left in it."""
        info = self.archive.getinfo(f"{self.folder}/{key}")
        if self.mapped is None or info.compress_type != zipfile.ZIP_STORED:
            return bytearray(self.archive.read(info))
        at = info.header_offset                 # 30 bytes; the last four: lengths of name and padding
        name, padding = (int.from_bytes(self.mapped[at + k:at + k + 2], "little") for k in (26, 28))
        at += 30 + name + padding
        raw = self.mapped[at:at + info.file_size]
        if len(raw) < info.file_size:
            raise ValueError("a tensor lies beyond the end of the file")
        return raw if at % 16 == 0 else bytearray(raw)      # numbers begin at multiples of their size

    def tensor(self, version, storage, offset, size, stride, requires_grad, hooks, *rest):
        _, kind, key, _, numel = storage
        kind = dtype = STORAGES[kind.name]
        if version == "v3":                     # the storage is bytes, their type stands beside it
            dtype, *rest = vars(torch)[rest[0].name.removeprefix("torch.")], *rest[1:]
        if any(rest):
            raise ValueError("it holds a lazily conjugated tensor")
        if key not in self.raw:                 # read once, so that views of one storage stay views
            self.raw[key] = self.storage(key)
        count = numel * kind.itemsize // dtype.itemsize
        flat = torch.frombuffer(self.raw[key], dtype=dtype, count=count) if count else torch.empty(0)
        return flat.to(dtype).as_strided(size, stride, offset)          # raises beyond the storage

    def plain(self, x):
        """x with every object as a dict, every sequence as a list, every class as its name, a str."""
        name = getattr(x, "name", "") if isinstance(x, (type, _Inert)) else ""
        if isinstance(x, type) or not (name or isinstance(x, (dict, list, tuple, set, frozenset))):
            return name or x
        if name.startswith(WRAPPERS):
            return self.plain(x.args[0])
        if name == "_codecs.encode":            # how protocol 2 writes bytes
            return x.args[0].encode("latin1")
        if id(x) not in self.made:              # x may occur twice, also within itself
            if name.startswith("torch._utils._rebuild_tensor_v"):
                self.made[id(x)] = self.tensor(name[-2:], *x.args)
            elif name or isinstance(x, dict):
                out = self.made[id(x)] = {}
                for key, value in (x.kept if name else x).items():
                    if name != "collections.OrderedDict" or key != "_metadata":      # of a state_dict
                        out[key if isinstance(key, (str, int)) else str(key)] = self.plain(value)
            else:
                out = self.made[id(x)] = []
                out.extend(map(self.plain, x))
        return self.made[id(x)]


def read_foreign(path, only=None):
    """What torch.save or torch.jit.save wrote to `path`: plain dicts, lists, numbers, str and tensors.

    Nothing in the file is executed and no class in it needs to exist here. An object becomes the dict of
    its attributes (and "args", "state", "items", what else it was given), a class its name. Tensors are
    on the CPU and share memory where they did. OSError if there is no such file; UserError in one line
    if it is no zip archive of torch (little-endian), cut short or damaged.

    only: some keys of the outermost dict. Nothing but these is returned, and their tensors are mapped:
    no memory and no time for what is not used, but no checksum is compared either.
    """
    open(path, "rb").close()
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            if only is None:
                reader = _Foreign(archive)
                return reader.plain(reader.load())
            # a private map: a change never reaches the file
            reader = _Foreign(archive, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))
            whole = reader.load()
            whole = whole.kept if isinstance(whole, _Inert) else whole
            return {key: reader.plain(whole[key]) for key in only if key in whole}
    except Exception as error:  # as in `read`
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"{path} is cut short, damaged or no archive of torch ({reason}; nothing in it "
                        "was run): get it again") from None


def read_tensors(path):
    """{dotted name: tensor on the CPU}, every tensor in a file of torch.save or torch.jit.save.

    A name is made of the keys and attributes on the way: "visual.conv1.weight", "state_dict.0.bias"; in
    a module stored as an object, as in its state_dict. Nothing is executed. Errors as in `read_foreign`.
    """
    found = {}

    def walk(x, names, inside):
        if isinstance(x, torch.Tensor):
            found[".".join(names)] = x.detach()
        elif isinstance(x, (dict, list, tuple)) and id(x) not in inside:
            for key, value in x.items() if isinstance(x, dict) else enumerate(x):
                hidden = key in ("_parameters", "_buffers", "_modules")      # where nn.Module keeps them
                walk(value, names if hidden else (*names, str(key)), {*inside, id(x)})

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = torch.load(str(path), map_location="cpu", weights_only=True,
                               mmap=zipfile.is_zipfile(path))
    except Exception:  # TorchScript, foreign classes, damage, no file: the other reader tells
        whole = read_foreign(path)
    walk(whole, (), set())
    return found


# ------------------------------------------------------------------ other people's networks

MARK = "model.x_embedder.proj.weight"  # no checkpoint of ours has a name like this


def _is_released(ckpt):
    return isinstance(ckpt, dict) and any(isinstance(part, dict) and MARK in part
                                          for part in (ckpt.get("ema"), ckpt.get("net")))


def _try_released(path):
    """What a released file holds, without optimizer, settings and the like; None if it is not one."""
    try:
        found = read_foreign(path, only=("net", "ema", "stats", "step"))
    except UserError:
        return None
    return found if _is_released(found) else None


def from_released(theirs, path):
    """A released α-Flow checkpoint, `theirs`, in the layout of ours; tensors still mapped to the file.

    net, ema: names without "model.", and a row of zeros for "no label" if the file has none. The config
    is told by the shapes. step: the file's, or None. latents: mean and std, (C, h, w) float32. vae: its
    state dict, if embedded.
    UserError, one line, if pieces are missing. "net" alone may be: then it is empty.
    """
    try:
        if not isinstance(theirs.get("ema"), dict):
            raise KeyError("ema")
        ema, net = (own_names(theirs.get(key) or {}, "model.") for key in ("ema", "net"))
        config = config_of(ema)
        latents = latent_stats(theirs["ema"], config)
        vae = own_names(theirs["ema"], "autoencoder.model.model.")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:150]
        raise UserError(f"{path}: expected a whole released α-Flow checkpoint, but it lacks something "
                        f"({what}; nothing in it was run): get it again") from None
    stats = theirs.get("stats") if isinstance(theirs.get("stats"), dict) else {}
    step = stats.get("cur_step", theirs.get("step"))
    about = {"name": "imagenet256" if config.classes == 1000 else None, "classes": config.classes,
             "shape": [config.channels, config.size, config.size], "label_counts": None}
    return {"format": FORMAT, "net": net, "ema": ema, "step": step if isinstance(step, int) else None,
            "config": {"model": asdict(config), "recipe": {}}, "data": about, "latents": latents,
            **({"vae": vae} if vae else {})}


def own_names(state, prefix):
    """The tensors of `state` below `prefix`, without it. ValueError if something else is there."""
    own = {name.removeprefix(prefix): w for name, w in state.items() if str(name).startswith(prefix)}
    if wrong := [name for name, w in own.items() if not isinstance(w, torch.Tensor)]:
        raise ValueError(f"{prefix}{wrong[0]} is no tensor")
    table = own.get("y_embedder.embedding_table.weight")
    if table is not None and len(table) == 1000:  # trained without guidance: a thousand classes, no null
        own["y_embedder.embedding_table.weight"] = torch.cat([table, table.new_zeros(1, table.shape[1])])
    return own


def config_of(state):
    """The DiTConfig whose state dict `state` is, by its shapes. KeyError or another if it is none."""
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1])
    classes = len(state["y_embedder.embedding_table.weight"]) - 1
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    # No shape tells the heads. The published widths do; others get heads of 64, and four at least.
    heads = {d: h for _, d, h in SIZES.values()}.get(dim, max(4, dim // 64))
    return DiTConfig(side * patch, channels, patch, dim, depth, heads, classes)


def latent_stats(state, config):
    """{"mean", "std"}, (C, h, w) float32, of a released state dict. KeyError or another if none."""
    shape = (config.channels, config.size, config.size)
    mean, var = (state[f"autoencoder_{k}"][0].double().expand(shape) for k in ("mean", "var"))
    std = (var + 1e-16).sqrt()
    if not state.get("are_ldm_stats_inited", torch.ones(1)).all():
        raise ValueError("the statistics of its latents were never measured")
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError("the statistics of its latents are not finite")
    return {"mean": mean.float(), "std": std.float()}


def same_latents(a, b):
    """Whether two {"mean", "std"} normalise latents alike, up to what re-encoding may change."""
    return all(k in a and a[k].shape == b[k].shape and torch.allclose(a[k], b[k], 1e-3, 1e-3)
               for k in ("mean", "std"))


def starting_weights(path, latents=None):
    """(weights, notes): what a new network can start from, under model.py's names, and a few warnings.

    From any checkpoint that `read` takes, its EMA; or from the state dict of a DiT or SiT, alone or in a
    training checkpoint (then its EMA, if there). notes: lines on what does not carry over. latents: mean
    and std, {"mean", "std"}, of those that the new network will see.
    UserError as in `read` for anything else.
    """
    try:
        ckpt = read(path)
    except UserError as refused:
        try:
            found = from_dit(read_tensors(path))
        except (UserError, OSError):
            found = None
        if found is None:
            raise refused from None
        return found
    notes = []
    if ckpt.get("latents") and not (latents and same_latents(ckpt["latents"], latents)):
        notes.append("its latents were normalised by another mean and std, which it has to learn anew")
    table = ckpt["ema"].get("y_embedder.embedding_table.weight")
    if isinstance(table, torch.Tensor) and table.ndim == 2 and not table[-1:].any():
        notes.append("the null label's row is new, zeros: that network was trained without one")
    return ckpt["ema"], notes


def from_dit(tensors):
    """(weights, notes) as in `starting_weights`, from the tensors of a DiT or SiT; None if of neither.

    DiT: Peebles & Xie 2023. SiT: Ma et al. 2024. One time embedder, and twice the channels at the end if
    it learned the variance, too.
    """
    first, time = "x_embedder.proj.weight", "t_embedder.mlp.0.weight"
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    prefixes = [p for p in prefixes if p + time in tensors and tensors[p + first].ndim == 4]
    if not prefixes:
        return None
    prefix = min(prefixes, key=lambda p: ("ema" not in p.split("."), len(p)))  # "", "ema.", "model."
    state = {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}
    for name in [name for name in state if name.startswith("t_embedder.")]:
        state[name.replace("t_embedder", "noise_labels_embedder", 1)] = state.pop(name)
    notes = ["t_embedder became noise_labels_embedder, of the same frequencies, but t counts 0 to 999 "
             "from data to noise there (DiT) or 0 to 1 from noise to data (SiT), here 0 to 1 from data "
             "to noise: what it learned does not carry over",
             "it predicts noise (DiT) or data - noise (SiT), here that is noise - data, and its latents "
             "are times 0.18215, not normalised: what the first and the last map learned is not right"]
    _, C, p, _ = state[first].shape
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in state and len(state[name]) == 2 * C * p * p:           # rows: (row, column, channel)
            state[name] = state[name].unflatten(0, (p * p, 2, C))[:, 0].flatten(0, 1)
            notes += [f"{name}: {C} of its {2 * C} channels, the others are for the variance"]
    return state, notes


# ------------------------------------------------------------------ which picture is which


def make_labels(protocol, num, classes, seed, counts=None):
    """The labels of pictures 0 .. num - 1, int64 (num,). Name the protocol beside every FID.

    protocol: "random" (uniform; label k depends on (seed, k) alone), "balanced" (k mod classes), "data"
    (as frequent as in `counts`, the data set's pictures per class, by largest remainder; sorted), or a
    list like "3,1,4", repeated in turn. ValueError for anything else, or a label outside them.
    """
    if num < 1:
        raise ValueError(f"the number of pictures must be 1 or more, not {num}")
    if protocol == "random":  # the key (seed, k, 0) is no noise's key, see noise_for
        draws = [torch.randint(classes, (1,), generator=data.generator(seed, k, 0)) for k in range(num)]
        return torch.cat(draws)
    if protocol == "balanced":
        return torch.arange(num) % classes
    if protocol == "data":
        if counts is None or len(counts) != classes or sum(counts) < 1:
            raise ValueError("labels 'data' need the data set's pictures per class, not known here: "
                             "give random, balanced or a list like 3,1,4")
        share, rest = zip(*(divmod(int(c) * num, int(sum(counts))) for c in counts))  # exact: integers
        largest = set(sorted(range(classes), key=lambda c: -rest[c])[:num - sum(share)])
        share = [n + (c in largest) for c, n in enumerate(share)]
        return torch.arange(classes).repeat_interleave(torch.tensor(share))
    try:
        given = [int(label) for label in protocol.split(",")]
    except ValueError:
        raise ValueError(f"labels {protocol!r}: give random, balanced, data or like 3,1,4") from None
    if wrong := [label for label in given if not 0 <= label < classes]:
        raise ValueError(f"label {wrong[0]} is out of range: this network knows 0 to {classes - 1}")
    return torch.tensor(given)[torch.arange(num) % len(given)]


def noise_for(indices, shape, seed, step=None):
    """The noise of the pictures `indices`, (b, C, H, W) float32 on the CPU. shape: (C, H, W).

    step None: what a picture starts from. step i > 0: what the consistency sampler adds after i steps.
    """
    # Always drawn on the CPU: a GPU makes other numbers of the same seed.
    key = () if step is None else (step,)
    generators = [data.generator(seed, int(k), *key) for k in indices]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])            # (b, C, H, W)


def one_batch(net, y, indices, grid, sampler, seed, callback=None):
    """The samples x (b, C, H, W) of the pictures `indices` with the labels y (b,), not decoded yet."""
    shape = (net.config.channels, net.config.size, net.config.size)
    device = next(net.parameters()).device
    if grid[0] != 1:
        raise ValueError(f"the grid starts at {grid[0]:g}, but pictures start as pure noise, at 1")
    z, y = noise_for(indices, shape, seed).to(device), y.to(device)                      # (b, C, H, W)
    if sampler == "ode":
        return ode(net, z, y, grid, callback)
    if sampler == "consistency":
        steps = [i for i in range(1, len(grid)) if grid[i] > 0]
        noise = [noise_for(indices, shape, seed, i).to(device) for i in steps]
        return consistency(net, z, y, grid, noise=noise, callback=callback)
    raise ValueError(f"unknown sampler {sampler!r}: give ode or consistency")


def generate(net, decode, labels, grid, sampler="ode", seed=0, batch=256, indices=None, progress=None):
    """Yield the pictures `indices`, in that order, as uint8 (b, C, H, W) on the CPU, b <= batch.

    net, decode: from `load`. labels: (N,), of all N pictures. indices: which of them, all by default;
    process `rank` of `world` asks for range(rank, N, world). progress: called with b after each batch.
    ValueError for an unknown sampler, a bad grid, one that does not start at 1, or a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"the batch must be 1 or more, not {batch}")
    grid, indices = check_grid(grid), range(len(labels)) if indices is None else indices
    for start in range(0, len(indices), batch):
        k = list(indices[start:start + batch])
        pictures = decode(one_batch(net, labels[k], k, grid, sampler, seed)).cpu()       # (b, C, H, W)
        if progress:
            progress(len(k))
        yield pictures


# ------------------------------------------------------------------ to be looked at


def as_image(picture):
    """One uint8 (C, H, W) tensor as a PIL image, grey or RGB. ValueError if C is neither 1 nor 3."""
    if len(picture) not in (1, 3):
        raise ValueError(f"these pictures have {len(picture)} channels, PNG and GIF take 1 or 3: "
                         "write FILE.npz instead")
    return Image.fromarray((picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)).numpy())


def write_png(path, picture):
    """Write one uint8 (C, H, W) tensor as a PNG, whole or not at all. ValueError if C is neither 1 nor 3."""
    with data.replacing(path, sync=False) as file:
        as_image(picture).save(file, format="PNG")


def contact_sheet(pictures, columns, scale=None, captions=None):
    """All pictures, uint8 (N, C, H, W), as one PIL image in rows of `columns`.

    scale: a pixel becomes scale x scale pixels, never blurred; by default a cell gets about 56 pixels.
    captions: one short text a row, written down the left side. ValueError if C is neither 1 nor 3.
    """
    if len(pictures) < 1 or columns < 1:
        raise ValueError(f"a sheet needs pictures and columns, got {len(pictures)} and {columns}")
    _, C, H, W = pictures.shape
    scale, gap = scale or max(1, round(56 / max(H, W))), 2
    # Pillow's own font may know no more than ASCII. Width goes by letters, so frames of a GIF are equal.
    texts = [str(text)[:24].encode("ascii", "replace").decode() for text in captions or []]
    left = gap + (7 * max(map(len, texts)) + 4 if texts else 0)
    wide, high, rows = W * scale + gap, H * scale + gap, math.ceil(len(pictures) / columns)
    sheet = Image.new("L" if C == 1 else "RGB", (left + columns * wide, gap + rows * high), "white")
    for k, picture in enumerate(pictures):
        cell = as_image(picture).resize((W * scale, H * scale), Image.Resampling.NEAREST)
        sheet.paste(cell, (left + k % columns * wide, gap + k // columns * high))
    for row, text in enumerate(texts[:rows]):
        at = (4, gap + row * high + (high - 14) // 2)
        ImageDraw.Draw(sheet).text(at, text, fill="black", font=ImageFont.load_default())
    return sheet


def labelled_grid(pictures, labels, names):
    """A contact sheet sorted by class: a class a row if all have equally many, else captioned a - b."""
    order = labels.argsort(stable=True)
    pictures, labels = pictures[order], labels[order]
    counts = labels.unique(return_counts=True)[1]
    equal = 2 <= counts.min() == counts.max() <= 32
    columns = int(counts[0]) if equal else math.ceil(len(labels) ** 0.5)
    ends = [(names[row[0]], names[row[-1]]) for row in labels.split(columns)]
    return contact_sheet(pictures, columns, captions=[a if a == b else f"{a} - {b}" for a, b in ends])


def trajectory(net, decode, labels, sampler, seed, path, steps=16):
    """Write to `path` a GIF of how noise becomes the pictures 0 .. len(labels) - 1, in `steps` steps.

    Above: the state z at time t. Below: the picture that the network points at from there.
    """
    grid, indices = uniform_grid(steps), range(len(labels))
    states = [noise_for(indices, (net.config.channels, net.config.size, net.config.size), seed)]
    guesses = []

    def callback(i, t, s, z, x_hat):
        states.append(z)        # at s
        guesses.append(x_hat)   # made at t, from the state before

    guesses.append(one_batch(net, labels, indices, grid, sampler, seed, callback))
    frames = []
    for t, z, x_hat in zip(grid, states, guesses):
        rows = torch.cat([decode(z.to(x_hat)), decode(x_hat)]).cpu()                     # (2B, C, H, W)
        frames.append(contact_sheet(rows, len(labels), captions=[f"z, t = {t:.2f}", "leads to"]))
    with data.replacing(path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[150] * steps + [2000])


# ------------------------------------------------------------------ many pictures

# Pictures come in chunks of --batch, and a chunk is always drawn as a whole: how a picture is rounded
# depends on its company in the batch, so only this makes the same bytes of any number of processes,
# interrupted or not. A folder gets a chunk as PNGs; an .npz has it as a file in FILE.npz.parts/
# until all are there. Each has its name when it is whole: there is no other record of what is done.
RECORD = ".sampling.json"  # in that folder until the end: what the pictures depend on


def check_unfinished(folder, ext, key, what):
    """UserError, begun with `what`, unless `folder` is absent, empty or an unfinished run of `key`."""
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if not (made := names - {RECORD, f".{RECORD}.part"}):
        return
    ours = all(re.fullmatch(rf"\d+\.{ext}|\.\d+\.{ext}\.part", name) for name in made)
    if key is None or RECORD not in names or not ours:
        raise UserError(f"{what} is not empty, old pictures would mix with new ones: give another")
    theirs = json.loads((folder / RECORD).read_text())
    if other := [name for name in key if theirs.get(name) != key[name]]:
        raise UserError(f"{what} holds pictures of an interrupted run with other {', '.join(other)}: "
                        "repeat its command to go on, delete that folder, or give another")


@contextlib.contextmanager
def holding(folder):
    """UserError if another run writes to `folder`: kill -9 ends torchrun, but not its processes."""
    if data.fcntl is None:  # Windows
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            data.fcntl.flock(lock, data.fcntl.LOCK_EX | data.fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is still writing to {folder}: wait or end it") from None
        except OSError:
            pass  # a disk without locks
        yield
    finally:
        os.close(lock)  # so does the end of the process, whatever ends it


def to_do(folder, ext, starts, num):
    """-> those of `starts`, the first pictures of all chunks, of whose chunk `folder` lacks a part."""
    for half in folder.glob(".*.part"):
        half.unlink()
    there = set(os.listdir(folder))  # not asked by name: network disks remember a No for a while

    def whole(k):
        if f"{k:06d}.{ext}" not in there or ext == "raw":
            return f"{k:06d}.{ext}" in there
        with open(folder / f"{k:06d}.png", "rb") as file:  # a power cut may take its end
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8))
            return file.read() == b"IEND\xaeB`\x82"

    step = 1 if ext == "png" else starts.step
    return [k for k in starts if not all(map(whole, range(k, min(num, k + starts.step), step)))]


def write_chunks(folder, ext, starts, draw):
    """Write the chunks that begin at the pictures `starts`; draw(start) gives one, uint8 (b, C, H, W).

    Threads encode and write a chunk while the next one is drawn: two are in memory, never more.
    """
    def write(k, piece):
        if ext == "png":
            return write_png(folder / f"{k:06d}.png", piece)
        with data.replacing(folder / f"{k:06d}.raw") as file:
            file.write(piece.contiguous().numpy())                                       # (b, C, H, W)

    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, min(16, cores))) as pool:
        writing = ()
        for start in starts:
            pictures = draw(start)
            list(writing)  # waits, and raises what a thread has raised
            writing = pool.map(write, range(start, start + len(pictures)),
                               pictures if ext == "png" else [pictures])
        list(writing)


def write_many(path, kind, key, labels, batch, shape, draw, rank, world):
    """Draw all pictures, on all processes, into the .npz or the folder `path`, or what is left of them.

    draw(start, progress): the chunk that begins at picture `start`, uint8 (b, C, H, W), shape (C, H, W).
    """
    folder, ext = (path, "png") if kind == "folder" else (Path(f"{path}.parts"), "raw")
    num, starts, keys, left = len(labels), range(0, len(labels), batch), [key] * world, [None]
    if world > 1:  # nobody may write before everybody has looked into the folder
        dist.all_gather_object(keys, key)
    if keys != [key] * world:
        raise UserError("the processes see different checkpoints or flags: start all by one command, on "
                        "one disk, and while nothing writes to the checkpoint")
    if rank == 0 and ext == "raw":  # chunks stay until the .npz that joins them is whole
        there = sum(p.stat().st_size for p in folder.glob("*.raw"))
        data.need_space(path, 2 * num * math.prod(shape) - there, f"while {num} pictures are joined",
                        "or fewer pictures")
    folder.mkdir(exist_ok=True)
    with holding(folder) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            left = [to_do(folder, ext, starts, num)]
            with data.replacing(folder / RECORD) as file:
                file.write(json.dumps(key).encode())
            if len(left[0]) < len(starts):
                print(f"going on: {len(starts) - len(left[0])} of {len(starts)} batches are there")
        if world > 1:
            dist.broadcast_object_list(left)
        mine, what = left[0][rank::world], f"process 0 of {world}" if world > 1 else None
        with tqdm(desc=what, total=sum(min(batch, num - k) for k in mine), unit="img",
                  disable=True if rank else None) as bar:
            write_chunks(folder, ext, mine, lambda start: draw(start, bar.update))
        if world > 1:
            dist.barrier()
        if rank == 0:
            if ext == "raw":
                files = [folder / f"{k:06d}.raw" for k in starts]
                chunks = (torch.from_numpy(np.fromfile(f, np.uint8)).view(-1, *shape) for f in files)
                write_npz(path, chunks, labels, shape)
                for file in files:  # the record goes last: until then the folder is known as ours
                    file.unlink()
            (folder / RECORD).unlink()
            if ext == "raw":
                folder.rmdir()


def write_npz(path, batches, labels, shape):
    """ADM's sample file, streamed: arr_0 uint8 (N, H, W, C), arr_1 the labels (N,). shape: (C, H, W)."""
    C, H, W = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), H, W, C)}
    with data.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for pictures in batches:
                member.write(pictures.permute(0, 2, 3, 1).numpy().tobytes())             # (b, H, W, C)
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels.numpy())


# ------------------------------------------------------------------ command line


def parse():
    parser = data.Parser(description="Draw pictures from a checkpoint.")
    group = parser.add_argument_group("what")
    group.add_argument("--ckpt", type=Path, required=True, metavar="FILE",
                       help="what train.py wrote, or a released α-Flow checkpoint")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--ema", dest="weights", action="store_const", const="ema", default="ema",
                       help="the averaged weights")
    which.add_argument("--raw", dest="weights", action="store_const", const="raw", default="ema",
                       help="the weights as the optimizer left them, instead")
    group.add_argument("--classes", default="balanced", metavar="WHICH", help="balanced, random, data "
                       "(as frequent as in the training data), or labels like 0,1,2, repeated in turn")
    group.add_argument("--num", type=int, metavar="N",
                       help="pictures (default: 10 a class, 100 at most)")
    group.add_argument("--seed", type=int, default=0, help="picture k depends on the seed and k alone")

    group = parser.add_argument_group("how")
    times = group.add_mutually_exclusive_group()
    times.add_argument("--nfe", type=int, metavar="N",
                       help="network evaluations, as N equal jumps (default: 1)")
    times.add_argument("--grid", metavar="TIMES", help="the times of the jumps instead, like 1,0.55,0")
    group.add_argument("--sampler", choices=["ode", "consistency"],
                       help="follow the jumps, or jump to the picture each time and put noise back "
                       "(default: ode; of a released file without --grid, as published)")
    group.add_argument("--batch", type=int, default=256, metavar="N",
                       help="pictures at a time; another number may change how a picture is rounded")
    group.add_argument("--device", metavar="NAME", help="default: cuda, else mps, else cpu")
    group.add_argument("--precision", default="bf16", choices=["bf16", "fp32"],
                       help="of the VAE that decodes latents, on CUDA; fp32 elsewhere")

    group = parser.add_argument_group("where to")
    group.add_argument("--out", help="FILE.png: a labelled grid; FILE.npz: arr_0 as ADM's tools want it "
                       "and labels arr_1; FOLDER/: a PNG each (default: a grid beside the checkpoint)")
    group.add_argument("--trajectory", type=Path, metavar="FILE.gif",
                       help="also animate how noise becomes the first ten pictures, in 16 steps")
    return parser.parse_args()


def place(out, trajectory, world, num, flag="--out", key=None):
    """(path, kind) of the output, kind "png", "npz" or "folder"; UserError if it cannot be written.

    key: what the pictures depend on; unfinished pictures of the same may be there. None: none may.
    """
    path = Path(out)
    kind = "folder" if out.endswith("/") or path.is_dir() or not path.suffix else path.suffix.lower()[1:]
    if kind not in ("png", "npz", "folder"):
        raise UserError(f"{flag} {out}: give FILE.png for a grid, FILE.npz, or FOLDER/ with its slash")
    if kind == "png" and num > 4096:
        raise UserError(f"--num {num}: a grid shows 4096 at most, give --out FOLDER/ or --out FILE.npz")
    if kind == "png" and world > 1:
        raise UserError(f"{flag} {out}: several processes write many pictures, give --out FILE.npz or "
                        "--out FOLDER/")
    if kind == "folder":
        check_unfinished(path, "png", key, f"{flag} {out}")
    elif kind == "npz":
        check_unfinished(Path(f"{path}.parts"), "raw", key, f"{flag} {out}: {path}.parts")
    if trajectory and (trajectory.suffix.lower() != ".gif" or trajectory.is_dir()):
        raise UserError(f"--trajectory {trajectory}: give FILE.gif")
    targets = [path if kind == "folder" else path.parent] + ([trajectory.parent] if trajectory else [])
    for folder in targets:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # better to fail now than after an hour
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    return path, kind


def identity(args, grid, sampler, device):
    """All that the pictures depend on, by the flag that says it, as JSON would give it back."""
    about = args.ckpt.stat()  # no checksum: in every process it would be gigabytes to read
    return {"--ckpt": [about.st_size, about.st_mtime_ns], "--ema or --raw": args.weights, "times": grid,
            "--sampler": sampler, "--classes": args.classes, "--seed": args.seed, "--batch": args.batch,
            "--precision": args.precision, "--device": device.type}


def main():
    args = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # --nfe has no default in argparse: it would hide "--nfe 1 --grid ..." from it
    grid, sampler, note = sampling_plan(args.ckpt, args.nfe, args.grid, args.sampler)
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: give 1 or more")
    device = pick_device(args.device)
    ckpt = read(args.ckpt)
    key = identity(args, grid, sampler, device)  # first: the file may be replaced while it is read
    net, decode = load(args.ckpt, args.weights, device, args.precision)
    if note and rank == 0:
        print(note)
    cfg, about = net.config, ckpt["data"] if isinstance(ckpt.get("data"), dict) else {}
    listed = args.classes.count(",") + 1 if args.classes[:1].isdigit() else cfg.classes
    num = min(100, 10 * listed) if args.num is None else args.num
    if num > 10**8:
        raise UserError(f"--num {num}: give 100,000,000 at most")
    labels = make_labels(args.classes, num, cfg.classes, args.seed, about.get("label_counts"))
    shape = decode(torch.zeros(1, cfg.channels, cfg.size, cfg.size, device=device)).shape[1:]
    out = args.out or args.ckpt.parent / f"grid_{sampler}_nfe{len(grid) - 1}_{args.weights}.png"
    key["--num"] = num
    path, kind = place(str(out), args.trajectory, world, num, key=key)
    if kind != "npz" or args.trajectory:
        as_image(torch.zeros(shape, dtype=torch.uint8))  # says so now if this is no picture
    if world > 1:  # messages between CPUs alone; one process may finish days before another
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))

    def draw(start, progress):
        pictures, = generate(net, decode, labels, grid, sampler, args.seed, args.batch,
                             range(start, min(num, start + args.batch)), progress)
        return pictures

    if kind == "png":
        with tqdm(total=num, unit="img", disable=None) as bar:
            pictures = torch.cat([draw(start, bar.update) for start in range(0, num, args.batch)])
        names = about.get("names") or []
        names = names if len(names) == cfg.classes else range(cfg.classes)
        sheet = labelled_grid(pictures, labels, names)
        with data.replacing(path) as file:
            sheet.save(file, format="PNG")
    else:
        write_many(path, kind, key, labels, args.batch, shape, draw, rank, world)
    if args.trajectory and rank == 0:
        trajectory(net, decode, labels[:10], sampler, args.seed, args.trajectory)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        step = "" if ckpt.get("step") is None else f" of step {ckpt['step']}"
        print(f"wrote {path}{f' and {args.trajectory}' if args.trajectory else ''}: {num} pictures, "
              f"{args.weights} weights{step}, {len(grid) - 1} NFE, {sampler}, "
              f"grid {','.join(f'{t:g}' for t in grid)}, labels {args.classes}, seed {args.seed}")


if __name__ == "__main__":
    data.run(main)
