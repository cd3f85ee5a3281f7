"""From a checkpoint to pictures, in one evaluation of the network or a few.

    python sample.py --ckpt out/digits/ckpt.pt --nfe 1                  # a grid, one row a class
    python sample.py --ckpt out/digits/ckpt.pt --grid 1,0.55,0 --sampler consistency --labels 3,1,4
    torchrun --nproc_per_node=8 sample.py --ckpt CKPT --nfe 2 --samples 50000 --out samples.npz
    python sample.py --ckpt alphaflow-XL-2-plus-cfg.pt --nfe 2          # released weights

t = 1 is noise, t = 0 is data. Of two samplers one follows the average velocity, the other jumps to t = 0
each time and puts noise back. What picture k starts from depends on the seed and k alone.
"""
import functools
import hashlib
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from model import DiT, DiTConfig, fill, read_checkpoint

# ---- grids of times, and the two samplers of α-Flow §6 ---------------------------------------------

def uniform_grid(nfe):
    """[1.0, ..., 0.0], the times of `nfe` equal jumps: one network evaluation each."""
    if nfe < 1:
        raise ValueError(f"--nfe {nfe}: give 1 or more network evaluations")
    return [i / nfe for i in range(nfe, -1, -1)]


def check_grid(grid):
    """`grid` as floats; ValueError unless it is two or more falling times between 1 and 0."""
    grid = [float(t) for t in grid]
    if len(grid) < 2 or not all(1 >= t > s >= 0 for t, s in zip(grid, grid[1:])):
        raise ValueError(f"grid {grid}: give two or more falling times between 1 and 0, like 1,0.5,0")
    return grid


# The published files that were sampled by `consistency`, and their times at 2 NFE; all others by `ode`.
PUBLISHED = {"alphaflow-XL-2-cfg": [1.0, 0.55, 0.0], "alphaflow-XL-2-plus-cfg": [1.0, 0.5, 0.0]}


def sampling_plan(path, nfe=None, grid=None, sampler=None):
    """(times, sampler) as typed, None where nothing was: then one jump of `ode`, or what was published."""
    name = Path(path).stem
    times = check_grid(grid.split(",")) if grid is not None else uniform_grid(1 if nfe is None else nfe)
    sampler = sampler or ("consistency" if name in PUBLISHED else "ode")
    if nfe == 2 and sampler == "consistency":
        times = PUBLISHED.get(name, times)
    return times, sampler


def velocity(net, z, t, r, y):
    """u(z, t, r, y) for one pair of times, in z's dtype; the network is fed in that of its weights."""
    w = next(net.parameters(), z) if isinstance(net, torch.nn.Module) else z
    t, r = (torch.full((len(z),), s, dtype=w.dtype, device=z.device) for s in (t, r))   # (B,), (B,)
    return net(z.to(w.dtype), t, r, y).to(z.dtype)                                      # (B, C, H, W)


@torch.no_grad()
def ode(net, z, y, grid, callback=None):
    """Follow the average velocity down the grid: z <- z - (t - s)·u(z, t, s, y). α-Flow §6.

    net: any u(z, t, r, y). z: (B, C, H, W), the state at time grid[0], noise if that is 1; float32 or
    float64, which is kept. y: (B,) int64. grid: falling times in [0, 1], else ValueError.
    callback(t, s, z, x_hat) sees each step t -> s: the state after it, the picture it pointed at.
    Returns x_hat of the last step, (B, C, H, W); that is the last state if the grid ends at 0.
    """
    grid = check_grid(grid)
    for t, s in zip(grid, grid[1:]):
        u = velocity(net, z, t, s, y)
        x_hat = z - t * u
        z = z - (t - s) * u
        if callback:
            callback(t, s, z, x_hat)
    return x_hat


@torch.no_grad()
def consistency(net, z, y, grid, noise=None, generator=None, callback=None):
    """Jump to the picture, put noise back, repeat: x_hat = z - t·u(z, t, 0, y), z <- (1-s)·x_hat + s·e'.

    α-Flow §6; arguments and result as in `ode`. noise: the fresh e' of each step, (steps, B, C, H, W) or
    a list; a step that ends at s = 0 needs none. Without it, e' is drawn from `generator`.
    """
    grid = check_grid(grid)
    for i, (t, s) in enumerate(zip(grid, grid[1:])):
        z = x_hat = z - t * velocity(net, z, t, 0.0, y)
        if s > 0:
            e = noise[i] if noise is not None else torch.randn(
                z.shape, generator=generator, device=generator.device if generator else z.device)
            z = (1 - s) * x_hat + s * e.to(z)           # (1-s): as in training, z_s = (1-s)·x + s·e
        if callback:
            callback(t, s, z, x_hat)
    return x_hat


# ---- a network, what makes pictures of its samples, and which picture is which ---------------------

def load(path, weights="ema", device="cpu"):
    """(net, decode) from a checkpoint of train.py or a released file: a frozen DiT and its `decoder`.

    weights: "ema", what one samples from, or "raw". ValueError, one line, for what is no such file.
    """
    ckpt = read_checkpoint(path)
    try:
        # copied, so that the network outlives the mapped file
        theirs = ckpt["ema" if weights == "ema" else "net"]
        state = {name: w.to(device, torch.float32, copy=True) for name, w in theirs.items()}
        with torch.device("meta"):                      # no memory: every tensor comes from the file
            net = DiT(DiTConfig(**ckpt["config"]["model"]))
        return fill(net, state, f"a {net.config}"), decoder(ckpt.get("latents"), device, ckpt.get("vae"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: weights and config do not fit together ({error})") from None


def decoder(latents, device, state=None):
    """decode(x): samples (B, C, h, w) -> uint8 pictures. latents: None, or a dict: mean, std, vae.

    state: the VAE's weights; else the one that `latents` names is found or downloaded, at the first call.
    """
    if not latents:
        return data.to_uint8
    mean, std = latents["mean"].to(device), latents["std"].to(device)

    @functools.cache
    def vae():
        return data.build_vae(state).to(device) if state else data.find_vae(latents.get("vae", "ema"), device)

    @torch.no_grad()
    def decode(x):
        z = x.to(mean) * std + mean                                                     # (B, C, h, w)
        # in small pieces: eight pictures of 256x256 need about 2 GB on their way
        return torch.cat([data.to_uint8(vae().decode(piece)) for piece in z.split(8)])
    return decode


def make_labels(protocol, count, classes, seed=0, label_counts=None):
    """The labels of pictures 0 .. count - 1, int64 (count,). Name the protocol beside every FID.

    protocol: "random" (uniform; label k depends on (seed, k) alone), "balanced" (k mod classes), "data"
    (as frequent as in `label_counts`, the data's pictures per class, by largest remainder; sorted), or a
    list like "3,1,4", repeated in turn. ValueError for anything else, or a label outside them.
    """
    if count < 1:
        raise ValueError(f"--samples {count}: give 1 or more")
    if protocol == "random":                            # noise_for has no step 0: another stream
        return torch.cat([torch.randint(classes, (1,), generator=data.generator(seed, k, 0))
                          for k in range(count)])
    if protocol == "balanced":
        return torch.arange(count) % classes
    if protocol == "data":
        if not label_counts or len(label_counts) != classes:
            raise ValueError("how often the classes occur in the data is not known: give balanced or random")
        share, rest = np.divmod(np.array(label_counts) * count, sum(label_counts))
        share[np.argsort(-rest, kind="stable")[:count - share.sum()]] += 1
        return torch.arange(classes).repeat_interleave(torch.from_numpy(share))
    given = protocol.split(",")
    if not all(label.isdecimal() and int(label) < classes for label in given):
        raise ValueError(f"labels {protocol!r}: give random, balanced, data or 0 to {classes - 1} like 3,1,4")
    return torch.tensor([int(given[k % len(given)]) for k in range(count)])


def noise_for(rows, shape, seed, *step):
    """The noise of the pictures `rows`, (b, C, H, W) float32. shape: (C, H, W).

    No step: what a picture starts from. A step i > 0: what the consistency sampler adds after i steps.
    """
    # Always drawn on the CPU: a GPU makes other numbers of the same seed.
    return torch.stack([torch.randn(shape, generator=data.generator(seed, int(k), *step)) for k in rows])


def draw(net, labels, rows, grid, sampler="ode", seed=0, callback=None):
    """The samples (b, C, H, W) of the pictures `rows`, still to be decoded. labels: of all pictures."""
    shape = (net.config.channels, net.config.size, net.config.size)
    device = next(net.parameters()).device
    if check_grid(grid)[0] != 1:
        raise ValueError(f"the grid starts at {grid[0]:g}, but pictures start as pure noise, at 1")
    z, y = noise_for(rows, shape, seed).to(device), labels[rows].to(device)             # (b, C, H, W), (b,)
    if sampler == "ode":
        return ode(net, z, y, grid, callback)
    if sampler != "consistency":
        raise ValueError(f"unknown sampler {sampler!r}: give ode or consistency")
    noise = [noise_for(rows, shape, seed, i).to(device) for i in range(1, len(grid)) if grid[i] > 0]
    return consistency(net, z, y, grid, noise, callback=callback)


# ---- pictures in files: to be looked at, or many ---------------------------------------------------

def contact_sheet(pictures, columns, captions=()):
    """All pictures, uint8 (N, C, H, W), as one PIL image in rows of `columns`, with a short text a row."""
    pixels = pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()           # (N, H, W, 3)
    N, H, W, _ = pixels.shape
    scale, gap = max(1, round(56 / max(H, W))), 2       # a pixel becomes scale x scale pixels, never blurred
    wide, high = W * scale + gap, H * scale + gap
    left = gap + 7 * max(map(len, captions), default=0)         # a letter is 6 pixels wide
    sheet = Image.new("RGB", (left + columns * wide, gap + math.ceil(N / columns) * high), "white")
    for k, picture in enumerate(pixels):
        cell = Image.fromarray(picture).resize((W * scale, H * scale), Image.Resampling.NEAREST)
        sheet.paste(cell, (left + k % columns * wide, gap + k // columns * high))
    for row, text in enumerate(captions):
        ImageDraw.Draw(sheet).text((4, gap + row * high + (high - 14) // 2), text, fill="black")
    return sheet


def labelled_grid(pictures, labels, names):
    """A contact sheet with a class a row, in the order of their first pictures, if all have equally many."""
    seen = list(dict.fromkeys(labels.tolist()))
    order = sorted(range(len(labels)), key=lambda k: seen.index(labels[k]))
    counts = labels.unique(return_counts=True)[1]
    if counts.min() == counts.max() > 1:
        return contact_sheet(pictures[order], int(counts[0]), [str(names[y]) for y in seen])
    return contact_sheet(pictures[order], math.ceil(len(labels) ** 0.5))


def trajectory(net, decode, labels, path, steps=16):
    """Write a GIF of how noise becomes the pictures 0 .. len(labels) - 1, in `steps` steps: above the
    state z at time t, below the picture that the network points at from there.
    """
    rows, taken, frames = range(len(labels)), [], []
    x = draw(net, labels, rows, uniform_grid(steps), callback=lambda *step: taken.append(step))
    z = noise_for(rows, x.shape[1:], seed=0)
    for t, _, after, x_hat in [*taken, (0.0, 0.0, x, x)]:
        both = torch.cat([decode(z.to(x_hat)), decode(x_hat)])                          # (2B, C, H, W)
        frames.append(contact_sheet(both, len(labels), [f"z, t = {t:.2f}", "leads to"]))
        z = after                                       # where the next step begins
    with data.replacing(path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[150] * steps + [2000])


def write_npz(path, pictures, labels, batch, about):
    """ADM's sample file: arr_0 uint8 (N, H, W, C), arr_1 the labels (N,). Killed and typed again, it goes on.

    pictures(rows): the pictures `rows`, uint8 (b, C, H, W). about: all that they depend on, plain values.
    Any number of processes writes the same file.
    """
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    shards = data.Shards(f"{path}.unfinished-{key}", len(labels), batch)
    rank = data.place("cpu")[0]
    for rows in tqdm(shards.todo(), unit="batch", disable=True if rank else None):
        u = pictures(rows).permute(0, 2, 3, 1).numpy()                                  # (b, H, W, C)
        shards.write(rows, arr_0=u, arr_1=labels[rows].numpy())
    data.wait_for_all()
    if rank == 0:
        with data.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name in ("arr_0", "arr_1"):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as array:
                    shards.join(name, array)
        shutil.rmtree(shards.folder)


# ---- command line ----------------------------------------------------------------------------------

def drawing_flags(p):
    """The flags that say what is drawn from --ckpt, for fid.py as well."""
    p.add_argument("--raw", action="store_true", help="the weights as trained, not their running average")
    p.add_argument("--labels", metavar="WHICH", help="balanced, random, data (as frequent as in the training "
                   "data), or some like 0,1,2, repeated in turn [balanced; fid.py: data if known, or random]")
    p.add_argument("--samples", type=int, metavar="N", help="pictures to draw [10 a class, 100 at most; "
                   "fid.py: as many as real ones, 50,000 at most]")
    p.add_argument("--seed", type=int, default=0, help="picture k depends on the seed and k alone [0]")
    times = p.add_mutually_exclusive_group()
    times.add_argument("--nfe", type=int, help="network evaluations, as equal jumps [1]")
    times.add_argument("--grid", metavar="TIMES", help="the times of the jumps instead, like 1,0.55,0")
    p.add_argument("--sampler", choices=["ode", "consistency"], help="follow the jumps, or jump to the "
                   "picture each time and put noise back [ode; released files: as published]")
    p.add_argument("--batch", type=int, default=64, help="pictures at a time [64]")
    p.add_argument("--device", help="cuda or cpu [cuda if there]")


def to_draw(args, device, count):
    """What these flags ask for: (net, decode, labels, grid, sampler), see draw; and in words, a dict.

    count: of pictures, where --samples is not given.
    """
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: give 1 or more")
    ckpt, weights = read_checkpoint(args.ckpt), "raw" if args.raw else "ema"
    net, decode = load(args.ckpt, weights, device)
    grid, sampler = sampling_plan(args.ckpt, args.nfe, args.grid, args.sampler)
    counts = ckpt["data"].get("label_counts")           # a released file does not know them
    protocol = ("data" if counts else "random") if args.labels is None else args.labels
    count = count if args.samples is None else args.samples
    labels = make_labels(protocol, count, net.config.classes, args.seed, counts)
    return (net, decode, labels, grid, sampler), {
        "step": ckpt["step"], "weights": weights, "nfe": len(grid) - 1, "times": grid, "sampler": sampler,
        "labels": protocol, "seed": args.seed}


def main():
    p = data.Parser(description="Draw pictures from a checkpoint.")
    p.add_argument("--ckpt", type=Path, required=True, help="what train.py wrote, or a released file")
    p.add_argument("--out", help="FILE.png: a grid; FILE.npz: as ADM's tools want it [a grid beside --ckpt]")
    drawing_flags(p)
    p.set_defaults(labels="balanced")
    args = p.parse_args()
    rank, _, device = data.place(args.device)
    known = read_checkpoint(args.ckpt)["data"]
    listed = args.labels.count(",") + 1 if args.labels[:1].isdigit() else known["classes"]
    (net, decode, labels, grid, sampler), words = to_draw(args, device, min(100, 10 * listed))
    path = Path(args.out or args.ckpt.parent / f"grid_{sampler}_nfe{words['nfe']}_{words['weights']}.png")
    if path.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {path}: give FILE.png or FILE.npz")

    def pictures(rows):
        return decode(draw(net, labels, rows, grid, sampler, args.seed)).cpu()

    data.meet()
    if path.suffix == ".npz":
        stat = args.ckpt.stat()
        depends_on = [stat.st_size, stat.st_mtime_ns, words, len(labels), args.batch, device.type]
        write_npz(path, pictures, labels, args.batch, depends_on)
    elif rank == 0:
        drawn = torch.cat([pictures(rows) for rows in torch.arange(len(labels)).split(args.batch)])
        with data.replacing(path) as file:
            names = known.get("names", range(known["classes"]))
            labelled_grid(drawn, labels, names).save(file, format="PNG")
    if rank == 0:
        how = ", ".join(f"{k} {v}" for k, v in words.items())
        print(f"wrote {path}: {len(labels)} pictures of {args.ckpt}, {how}")


if __name__ == "__main__":
    data.run(main)
