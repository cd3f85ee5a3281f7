"""Train a DiT with the α-Flow objective, on one CPU or on many GPUs. The loop is train(), one flat page.

    python train.py                                        # digits, on a laptop, in minutes
    python train.py --model Ti/4                           # MNIST, after: python data.py mnist
    python train.py --data mine --model Mi/4               # after: python data.py folder ... --out data/mine
    torchrun --nproc_per_node=8 train.py --model XL/2      # ImageNet latents, the paper's recipe

The objective is chosen by its flags:

    --alpha-schedule sigmoid     α-Flow            --alpha 0.5        Shortcut
    --alpha 0                    MeanFlow          --alpha 1          trajectory flow matching
                                                   --fm-ratio 1       plain flow matching
"""
import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import fid
import sample
from loss import alpha_at, alpha_flow_loss, du_dt, sample_times
from model import SIZES, DiT, DiTConfig, build

# ---- recipes ---------------------------------------------------------------------------------------
# Every setting of a run: its flag, the paper's value for ImageNet-256 (α-Flow §5, appendix), what it means.

SETTINGS = {
    "data": {
        "data": ("imagenet256", "digits, mnist, cifar10, imagenet256 or a prepared folder"),
        "flip": (False, "mirror half of the pictures, or of the latents (the paper does not)"),
        "seed": (0, "of weights, batches and noise"),
    },
    "objective": {
        "alpha_schedule": ("sigmoid", "constant, step, linear, log, exponential, sigmoid or cosine"),
        "alpha_window": ((0.0, 1.0), "where α moves, as fractions A,B of the run"),
        "alpha_start": (1.0, "α before the window"),
        "alpha_end": (0.0, "α after the window"),
        "alpha_gamma": (25.0, "steepness γ of sigmoid and exponential"),
        "alpha_clamp": (0.005, "η: α < η snaps to 0, α > 1-η to 1"),
        "fm_ratio": (0.5, "share of the batch with r = t, which is plain flow matching"),
        "time_mean": (-0.4, "mean of the logit-normal times"),
        "time_std": (1.0, "standard deviation of the logit-normal times"),
        "omega": (1.0, "ω of the guidance trained in; its effective scale is ω/(1-κ)"),
        "kappa": (0.0, "κ of the guidance trained in"),
        "t_min": (0.0, "guidance and label dropping act for t_min < t < t_max"),
        "t_max": (1.0, "see t_min"),
        "label_drop": (0.0, "probability of the null label inside that interval"),
        "clip": (4.0, "bound of the discrete target (0 < α <= 1)"),
        "c": (1e-3, "constant of the adaptive weight 1/(err + c)"),
        "shrink_c": (False, "use c·α² for r < t at α > 0, which keeps late gradients alive"),
    },
    "optimisation": {
        "steps": (400_000, "length of the run, in optimizer steps"),
        "batch": (256, "pictures a step, over all processes and micro-batches"),
        "lr": (1e-4, "Adam's learning rate after the warm-up"),
        "lr_decay": ("constant", "what follows the warm-up: constant, or linear or cosine to 0 at the end"),
        "lr_tail": (1.0, "share of the run, at its end, in which the rate falls (unless constant)"),
        "warmup": (10_000, "steps of linear learning-rate warm-up"),
        "beta1": (0.9, "Adam's β₁"),
        "beta2": (0.95, "Adam's β₂"),
        "grad_clip": (16.0, "largest gradient norm"),
        "ema_half_life": (6931.0, "of the averaged weights, in steps (6931 is a decay of 0.9999)"),
        "ema_ramp": (0.05, "the half-life at step k is at most this times k"),
    },
}
PAPER = {name: default for group in SETTINGS.values() for name, (default, _) in group.items()}

GUIDED = dict(steps=1_200_000, label_drop=0.1)
XL_GUIDED = dict(GUIDED, omega=0.2, kappa=0.92, t_max=0.75)
MEANFLOW = dict(alpha_schedule="constant", alpha_start=0.0)
# Ours, found on the digits: with this window α is 0 after 36 % of the run, and MeanFlow gets the rest.
SMALL = dict(steps=2500, batch=128, alpha_window=(0.0, 0.5), lr=3e-3, lr_decay="linear", lr_tail=0.3,
             warmup=100)

RECIPES = {                 # --model: what differs from the paper's common settings; a flag wins over both
    # small networks, in pixels
    "Ti/2": dict(SMALL, data="digits"),
    "Ti/4": dict(SMALL, data="mnist") | dict(steps=1875, batch=32, lr=2e-3),        # one epoch
    "Mi/2": dict(data="cifar10", flip=True, steps=100_000, lr=4e-4, warmup=1000),
    # the paper's networks, in SD-VAE latents; -cfg: with guidance trained in
    "B/4": dict(),
    "B/2": dict(),
    "B/2-cfg": dict(GUIDED, kappa=0.5, fm_ratio=0.25),
    "L/2": dict(XL_GUIDED, t_max=0.8, alpha_window=(0.5, 5 / 6)),
    "XL/2": dict(XL_GUIDED, alpha_window=(0.5, 5 / 6)),
    "XL/2+": dict(XL_GUIDED, **MEANFLOW) | dict(steps=75_000, batch=1024),  # with --init-from an XL/2
    "meanflow-B/2": dict(MEANFLOW, fm_ratio=0.75),
    "meanflow-B/2-cfg": dict(GUIDED, **MEANFLOW, kappa=0.5),
    "meanflow-XL/2-cfg": dict(XL_GUIDED, **MEANFLOW),
    "fm-B/2": dict(fm_ratio=1.0),
}


def network_name(model):
    """The network of a recipe: "B/2" for "meanflow-B/2-cfg"."""
    return model.removeprefix("meanflow-").removeprefix("fm-").removesuffix("-cfg").removesuffix("+")


def parse_flags(argv=None):
    """The command line. A setting's default here is None: as the recipe, or the resumed run, has it."""
    p = data.Parser(prog="train.py", description="Train a DiT with the α-Flow objective.")
    p.add_argument("--model", help="recipe, which sets all else (default Ti/2): "
                   f"{', '.join(RECIPES)}; or any SIZE/PATCH")
    p.add_argument("--list", action="store_true", help="print all recipes and exit")
    p.add_argument("--alpha", type=float,
                   help="a constant α, short for --alpha-schedule constant --alpha-start α")
    for title, settings in SETTINGS.items():
        group = p.add_argument_group(f"{title} (in brackets the paper's value; recipes differ)")
        for name, (default, text) in settings.items():
            kind = dict(type={tuple: pair}.get(type(default), type(default)))
            if isinstance(default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            group.add_argument(flag(name), default=None, help=f"{text} [{default}]", **kind)
    g = p.add_argument_group("run")
    g.add_argument("--out", help="folder of the run (default out/DATA)")
    g.add_argument("--resume", nargs="?", const="yes", metavar="auto|CKPT",
                   help="continue the run in --out, or that file; auto: start anew if there is none")
    g.add_argument("--init-from", metavar="CKPT", help="start from another checkpoint's EMA weights")
    g.add_argument("--overwrite", action="store_true", help="replace the run that is already in --out")
    g = p.add_argument_group("machine")
    g.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches a step, to save memory [1]")
    g.add_argument("--recompute", action="store_true",
                   help="keep no activations inside a block: less memory, a third more time")
    g.add_argument("--precision", choices=("bf16", "fp32"), help="autocast (default bf16 on CUDA, else fp32)")
    g.add_argument("--jvp-precision", choices=("bf16", "fp32"), help="of du/dt (default: as --precision)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="torch.compile (default: on CUDA)")
    g = p.add_argument_group("reports")
    g.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl [10]")
    g.add_argument("--preview-every", type=int, help="steps between previews (default: a tenth of the run)")
    g.add_argument("--save-every", type=int, help="steps between checkpoints (default: as previews, <= 5000)")
    g.add_argument("--eval-every", type=int, metavar="STEPS",
                   help="steps between measurements of the EMA weights by fid.py (default: never)")
    g.add_argument("--eval-features", metavar="NAME,...",
                   help="what is measured: pixels, inception, dinov2, clip, see fid.py [pixels]")
    g.add_argument("--eval-num", type=int, help="pictures drawn for that (default: as many as the data, "
                   "50,000 at most)")
    g.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too, if installed")
    return p.parse_args(argv)


def list_recipes():
    """Each recipe's network and all settings in which it differs from the paper's common ones."""
    lines = ["common to all, unless it says otherwise: "
             + ", ".join(f"{name} {value}" for name, value in PAPER.items())]
    for name, recipe in RECIPES.items():
        shape = {"digits": (8, 1, 10), "mnist": (32, 1, 10), "cifar10": (32, 3, 10)}   # else latents
        with torch.device("meta"):
            net = build(network_name(name), *shape.get(recipe.get("data"), (32, 4, 1000)))
        differs = ", ".join(f"{setting} {value}" for setting, value in recipe.items()) or "nothing differs"
        lines.append(f"{name} ({sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters): {differs}")
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)


def flag(name):
    return "--" + name.replace("_", "-")


def pair(text):
    first, second = text.split(",")
    return float(first), float(second)


def resolve(args, saved=None):
    """The run's recipe, a flat dict: a resumed run's own or the model's, then the given flags on top.

    Raises ValueError, in one line, for whatever would otherwise fail after minutes.
    """
    model = args.model or (saved["model"] if saved else "Ti/2")
    if model not in RECIPES and (network_name(model) != model or model.partition("/")[0] not in SIZES):
        raise ValueError(f"unknown model {model!r}: give a recipe ({', '.join(RECIPES)}) or SIZE/PATCH with "
                         f"SIZE one of {', '.join(SIZES)}")  # "meanflow-B/4" must not be α-Flow
    if saved and model != saved["model"]:
        raise ValueError(f"--resume continues a {saved['model']}, not a {model}; --init-from starts a new "
                         "run from it")
    recipe = {"model": model, **PAPER, **(saved or RECIPES.get(model, {}))}    # an old run may lack a setting
    recipe.update({k: v for k, v in vars(args).items() if k in PAPER and v is not None})
    if args.alpha is not None:
        if args.alpha_schedule not in (None, "constant"):
            raise ValueError(f"--alpha is a constant, and --alpha-schedule {args.alpha_schedule} is none")
        for name in ("alpha_start", "alpha_end", "alpha_window", "alpha_gamma"):
            if getattr(args, name) is not None:
                raise ValueError(f"--alpha is a constant, so {flag(name)} would do nothing: give one of them")
        recipe.update(alpha_schedule="constant", alpha_start=args.alpha)
        if args.alpha_clamp is None:
            recipe["alpha_clamp"] = 0.0                 # --alpha 0.002 means 0.002
    if args.alpha_schedule == "step" and args.alpha_window is None:
        recipe["alpha_window"] = (0.5, 0.5)             # in the whole-run window the step would be at step 0

    reports = {k: getattr(args, k) for k in ("accumulate", "log_every", "preview_every", "save_every",
                                             "eval_every", "eval_num")}
    check({**recipe, **{k: v for k, v in reports.items() if v is not None}})
    return recipe


LIMITS = {                  # what a setting must do: the test, and the settings it holds for
    "be positive": (lambda v: v > 0, "steps batch accumulate log_every preview_every save_every eval_every "
                                     "lr lr_tail beta1 beta2 grad_clip ema_half_life clip c"),
    "not be negative": (lambda v: v >= 0, "warmup ema_ramp seed"),
    "be 2 or more": (lambda v: v >= 2, "eval_num"),         # one picture has no covariance
    "be below 1": (lambda v: v < 1, "beta1 beta2 label_drop"),
    "lie in [0, 1]": (lambda v: 0 <= v <= 1, "label_drop lr_tail"),
    "be below 2**64": (lambda v: v < 2**64, "seed"),
    "be a finite number": (math.isfinite, "omega kappa t_min t_max time_mean time_std alpha_gamma lr c"),
    "be constant, linear or cosine": (lambda v: v in ("constant", "linear", "cosine"), "lr_decay"),
}


def check(recipe):
    """ValueError, in one line, for the first setting that makes no sense."""
    for demand, (holds, names) in LIMITS.items():
        for name in names.split():
            if name in recipe and not holds(recipe[name]):
                raise ValueError(f"{flag(name)} must {demand}, got {recipe[name]}")
    if not recipe["t_min"] < recipe["t_max"]:
        raise ValueError(f"guidance needs --t-min < --t-max, got {recipe['t_min']} and {recipe['t_max']}")
    if recipe["alpha_schedule"] != "constant" and recipe["alpha_start"] == recipe["alpha_end"]:
        raise ValueError(f"--alpha-schedule {recipe['alpha_schedule']} would stand still: --alpha-start and "
                         f"--alpha-end are both {recipe['alpha_end']:g}; try --alpha-start 1")
    alpha_of(recipe, 0)                                         # these two check what they are given
    sample_times(1, recipe["fm_ratio"], recipe["time_mean"], recipe["time_std"])


# ---- the quantities that depend on the step alone --------------------------------------------------

def alpha_of(recipe, step):
    return alpha_at(step, recipe["steps"], recipe["alpha_schedule"], recipe["alpha_window"],
                    recipe["alpha_start"], recipe["alpha_end"], recipe["alpha_gamma"], recipe["alpha_clamp"])


def lr_at(recipe, step):
    """Linear warm-up, then constant; with a decay, down to 0 over the last `lr_tail` of the run."""
    lr = recipe["lr"] * min(1, (step + 1) / max(1, recipe["warmup"]))
    left = min(1, (1 - step / recipe["steps"]) / recipe["lr_tail"])             # 1 before the tail, then to 0
    shape = {"constant": 1, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return lr * shape[recipe["lr_decay"]]


def ema_decay(recipe, step):
    """Decay of the averaged weights: half-life min(ema_half_life, ema_ramp·step), to forget the start."""
    half_life = min(recipe["ema_half_life"], recipe["ema_ramp"] * step)
    return 0.5 ** (1 / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def update_ema(ema, net, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)     # few launches


def draw(recipe, step, shape, device, latents=False):
    """Everything random in a step, for the whole global batch: a function of (seed, step) alone.

    Each process draws it all and keeps its own rows, so the numbers do not depend on how many there are.
    Times and coins stay on the CPU (see loss.py), the noise is made on the device.
    """
    B, key = recipe["batch"], (0, recipe["seed"], step)         # four integers each: unlike sample.py's keys
    host, noise = data.generator(*key, 0), data.generator(*key, 1, device=device)
    posterior = {}
    if latents:                         # what picks a latent of each picture: fresh in every epoch
        cloud = data.generator(*key, 2, device=device)
        posterior = {"posterior": torch.randn(B, *shape, generator=cloud, device=device)}
    t, r = sample_times(B, recipe["fm_ratio"], recipe["time_mean"], recipe["time_std"], host)
    return {"t": t, "r": r, "drop": torch.rand(B, generator=host),                      # each (B,)
            "e": torch.randn(B, *shape, generator=noise, device=device), **posterior}   # (B, C, H, W)


# ---- processes, checkpoints ------------------------------------------------------------------------

def start_processes(device_name):
    """(rank, world, device): from torchrun's environment, or a single process without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = sample.pick_device(device_name)
    if device.type == "mps" and device_name is None and not can_differentiate(device):
        print("mps cannot compute du/dt with this PyTorch: training on the CPU (--device mps insists)")
        device = torch.device("cpu")
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Long, for some wait while others fetch networks, measure the real pictures or draw previews.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=6))
    return int(os.environ.get("RANK", 0)), world, device


def can_differentiate(device):
    """Whether the forward-mode derivative du/dt runs on this device at all."""
    net, t = build("Ti/2", 8, 1, 10).to(device), torch.ones(1, device=device)
    z, y = torch.zeros(1, 1, 8, 8, device=device), torch.zeros(1, dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            du_dt(net, z, t, t, z, y)
        return True
    except (RuntimeError, NotImplementedError):
        return False


def any_process(run, *flags):
    """Which flags are set on at least one process: all must stop at the same step, or some wait forever."""
    if run.world == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.float32, device=run.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.bool().tolist()


def mean_over_processes(run, stats):
    """The statistics as floats, averaged over the processes (their batches are equally large)."""
    values = torch.stack(list(stats.values())).float()
    if run.world > 1:
        dist.all_reduce(values)
        values /= run.world
    return dict(zip(stats, values.tolist()))


def open_run(args):
    """(folder, checkpoint or None): where the run lives, and what it continues from."""
    name = args.data or RECIPES.get(args.model or "Ti/2", PAPER).get("data", PAPER["data"])
    path = Path(args.out or f"out/{Path(name).name}") / "ckpt.pt"
    if args.resume not in (None, "yes", "auto"):
        path = Path(args.resume)
    out = Path(args.out or path.parent)
    if args.resume and (args.resume != "auto" or path.exists()):
        if args.init_from and args.resume != "auto":
            raise ValueError("--resume goes on with its own weights, so --init-from has no place beside it")
        ckpt = sample.read(path)
        if not ({"optimizer", "step"} <= ckpt.keys() and "model" in ckpt["config"].get("recipe", ())):
            raise ValueError(f"{path} holds no training state to resume; --init-from starts a new run from "
                             "its weights")
        if not (out / "ckpt.pt").exists() or args.overwrite or path.samefile(out / "ckpt.pt"):
            return out, ckpt
    elif not path.exists() or args.overwrite:
        return out, None
    raise ValueError(f"{out} already holds a run: --resume continues it, --overwrite replaces it, or give "
                     "another --out")


def save(path, state):
    """Written beside it, flushed, renamed: whenever we are killed, `path` is a whole checkpoint."""
    with data.replacing(path) as file:
        torch.save(state, file)


def init_from(net, path, say, latents=None):
    """Copy the weights of another network wherever name and shape agree, and say what did not.

    path: a checkpoint of ours or a released one (its EMA), or a DiT's or SiT's. latents: mean and std of the
    run's, see sample.starting_weights. ValueError if less than a tenth fits: then it is another network.
    """
    (theirs, notes), ours = sample.starting_weights(path, latents), net.state_dict()
    matched = {k: v for k, v in theirs.items() if k in ours and v.shape == ours[k].shape}
    if 10 * len(matched) < len(ours):
        raise ValueError(f"--init-from {path}: {len(matched)} of {len(ours)} tensors fit this network")
    net.load_state_dict(matched, strict=False)

    def listed(names):
        names = sorted(names)
        return ", ".join(names[:20]) + f", ... ({len(names)} in all)" * (len(names) > 20) or "none"

    say(f"init-from {path}: {len(matched)} of {len(ours)} tensors; "
        f"new here: {listed(ours.keys() - matched)}; left over there: {listed(theirs.keys() - matched)}")
    for note in notes:
        say(f"init-from {path}: {note}")


def attempt_compile(eager, use):
    """(torch.compile(eager), ""), or (eager, why not): it fails, or `use` makes another tensor with it."""
    try:
        fast = torch.compile(eager)
        right = use(eager)
        gap = ((right - use(fast)).norm() / right.norm()).item()
        if not gap < 0.02:
            raise ArithmeticError(f"compiled and eager results differ by {gap:.1e}")
        return fast, ""
    except Exception as error:                          # whatever it is, training must go on without it
        return eager, f"{type(error).__name__}: {str(error)[:150]}".splitlines()[0]


def seconds_of(call):
    """The shortest of three calls that give a tensor, until the device is done with it."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call().sum().item()
        times.append(time.perf_counter() - began)
    return min(times)


def compiled(run, autocast, autocast_jvp, say):
    """torch.compile of the network and of du/dt: (network, du/dt).

    Either one stays eager if compiling fails or gives other numbers, and du/dt also if it gets slower: the
    compiler does without `Product` in model.py.
    """
    net, B = run.net, run.recipe["batch"]
    weights = [p.detach().clone() for p in net.parameters()]

    def points(n):
        t = torch.linspace(0.3, 1, n, device=run.device)
        z = torch.randn(n, *run.dataset.shape, device=run.device)
        return z, t, t / 2, torch.zeros(n, dtype=torch.long, device=run.device)

    # The program that trains is made at the first step, inside DDP, which cuts it up to send gradients
    # early. Seven is a size that few batches have: the program for that size would be taken as it is.
    some = points(7)
    # du/dt is compiled for one number of rows, so it is tried with the number it will get.
    z, t, r, y = points(max(1, sum(k >= int(B * run.recipe["fm_ratio"]) for k in range(B)[own_rows(run, 0)])))
    if net.recompute:
        torch._dynamo.config.optimize_ddp = False       # older releases cannot cut up checkpointed blocks

    def gradient(network):
        with autocast():
            loss = network(*some).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    def tangent(function):                              # as u_target asks for it, z serving as v
        with torch.no_grad(), autocast_jvp():
            return function(net, z, t, r, z, y)

    with torch.no_grad():
        for p in net.parameters():                      # a fresh DiT is u = 0, on which all programs agree
            p.add_(0.02 * torch.randn_like(p))
    fast, problem = attempt_compile(net, gradient)
    fast_du_dt, problem_du_dt = attempt_compile(du_dt, tangent)
    if fast_du_dt is not du_dt:
        ratio = seconds_of(lambda: tangent(fast_du_dt)) / seconds_of(lambda: tangent(du_dt))
        problem_du_dt = f"it takes {ratio:.2f} times as long as eager" if ratio > 1 else ""
    with torch.no_grad():
        for p, w in zip(net.parameters(), weights):
            p.copy_(w)
    # What one process has to do without, all do without: they would wait for it at every step.
    off = any_process(run, bool(problem), bool(problem_du_dt))
    say("compile: " + "; ".join(
        what + (f" off, because {why or 'it fails in another process'}" if no else " on")
        for what, no, why in zip(("network", "du/dt"), off, (problem, problem_du_dt))))
    return net if off[0] else fast, du_dt if off[1] else fast_du_dt


# ---- what it costs ---------------------------------------------------------------------------------

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}  # bf16


def flops_of_forward(cfg):
    """FLOPs of one forward for one picture; multiply-add is two, where DiT's tables count one."""
    D, C, p = cfg.dim, cfg.channels, cfg.patch
    T = (cfg.size // p) ** 2                                    # tokens
    block = 12 * T * D * D + 2 * T * T * D + 6 * D * D          # linear maps, attention, modulation
    ends = 2 * T * p * p * C * D + 2 * D * D                    # into patches and back, last modulation
    times = 2 * (256 * D + D * D)                               # of t and of t - r
    return 2 * (cfg.depth * block + ends + times)


def bytes_for_backward(net):
    """Bytes that a forward in float32 keeps for its backward, for one picture."""
    cfg, sums = net.config, []
    for depth in (1, 2):                                        # counted on two blocks: all others are equal
        with torch.random.fork_rng([]):                         # initial weights may not move the generator
            twin, kept = DiT(dataclasses.replace(cfg, depth=depth, classes=1)), {}
        twin.recompute = net.recompute
        weights = {p.data_ptr() for p in twin.parameters()}

        def keep(x):
            if x.data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        z, t = torch.zeros(1, cfg.channels, cfg.size, cfg.size), torch.zeros(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            u = twin(z, t, t, torch.zeros(1, dtype=torch.long))
        sums.append(sum(kept.values()))
        del u                                                   # whose graph kept the addresses apart
    return sums[0] + (cfg.depth - 1) * (sums[1] - sums[0])


def forwards_of_step(recipe, alpha):
    """About what a step costs in forwards of its batch: prediction 3, backward included, and target."""
    jumps = 1 - recipe["fm_ratio"]
    target = 0 if alpha == 1 else jumps if alpha > 0 else 2 * jumps     # du/dt: see Product in model.py
    omega, kappa = recipe["omega"], recipe["kappa"]
    if (omega, kappa) == (1.0, 0.0):
        return 3 + target
    # Guidance acts on labelled rows with t inside its interval; u of rows with r = t is there already.
    times = torch.distributions.Normal(recipe["time_mean"], recipe["time_std"])
    ends = torch.tensor([recipe["t_min"], recipe["t_max"]], dtype=torch.float64).clamp(0, 1).logit()
    low, high = times.cdf(ends).tolist()
    without_label = abs(1 - omega - kappa) > 1e-6
    return 3 + target + (high - low) * (1 - recipe["label_drop"]) * (jumps * (kappa != 0) + without_label)


def cost_report(run):
    """The lines about cost that are printed at the start."""
    flops, kept = flops_of_forward(run.net.config), bytes_for_backward(run.net)
    parameters = sum(p.numel() for p in run.net.parameters())
    micro = run.recipe["batch"] // (run.world * run.args.accumulate)
    step = {alpha: forwards_of_step(run.recipe, alpha) * run.recipe["batch"] * flops for alpha in (1, 0.5, 0)}
    states, activations = 20 * parameters / 2**30, micro * kept / 2**30
    return (f"cost: {flops / 1e9:.3g} GFLOPs a forward and picture; a step {step[1] / 1e12:.3g} TFLOPs at "
            f"α = 1, {step[0.5] / 1e12:.3g} between, {step[0] / 1e12:.3g} at α = 0\n"
            f"memory a process: about {states + activations:.2g} GiB, {states:.2g} for weights, gradients, "
            f"Adam and EMA, {activations:.2g} for activations of {micro} pictures in float32 (in bf16 0.6)")


def utilisation(run, alpha, images_per_s, flops):
    """Share of the GPUs' bf16 peak that the counted FLOPs are; None where the peak is not known."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    if peak is None:
        return None
    return images_per_s * forwards_of_step(run.recipe, alpha) * flops / (peak * 1e12 * run.world)


# ---- reports ---------------------------------------------------------------------------------------

def evaluation(run):
    """A function -> {"fid_1nfe": ..., "fid_2nfe": ...} of the EMA weights now; or None without --eval-every.

    All processes must call it, each draws its share. What it needs is fetched and measured here, before
    training: networks and the statistics of the real pictures.
    """
    if run.args.eval_every and not run.decode:
        raise ValueError("--eval-every on latents needs a GPU and the VAE in its cache (python data.py "
                         "vae-check PICTURE fetches a published one)")
    if not run.args.eval_every:
        if run.args.eval_num or run.args.eval_features:
            raise ValueError("--eval-num and --eval-features do nothing without --eval-every STEPS")
        return None
    share = dict(rank=run.rank, world=run.world)
    names = [name.strip() for name in (run.args.eval_features or "pixels").split(",")]
    extractors = [fid.Extractor(name, device=run.device) for name in names]
    real = fid.from_dataset(run.dataset)
    known = fid.measure_reference(real, extractors, **share)
    num = run.args.eval_num or min(real.count, 50_000)
    if run.rank == 0:
        print(f"evaluation every {run.args.eval_every} steps: {num} pictures drawn by the EMA weights, ODE "
              f"at 1 and 2 NFE, labels as in the data, seed 0, against all {real.count}, "
              + "; ".join(f"{e.name}: {e.protocol['preprocessing']}" for e in extractors))

    def evaluate():
        values = {"eval_num": num}
        for nfe in (1, 2):
            made = fid.from_network(run.ema, run.decode, num, "data", sample.uniform_grid(nfe),
                                    label_counts=real.label_counts)
            found = fid.measure(made, extractors, what=f"{nfe} NFE", **share)
            for e in extractors:
                values |= {f"{name}_{nfe}nfe": value for name, value in
                           fid.compare(e, found[e.name], known[e.name]).items()}
        return values
    return evaluate


def open_log(run):
    """A function that writes one line of out/log.jsonl (and of TensorBoard, if asked for).

    A resumed run first drops the lines of steps that it is about to do again.
    """
    path, board = run.out / "log.jsonl", None
    if run.args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(run.out)
    old = path.read_text().splitlines() if run.start and path.exists() else []
    old = [line for line in old if line.endswith("}")]          # the last one may be torn
    with data.replacing(path) as file:
        file.write("".join(line + "\n" for line in old if json.loads(line)["step"] < run.start).encode())
    file = open(path, "a", buffering=1)

    def write(line):
        short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        file.write(json.dumps(short) + "\n")
        if board:
            for name, value in line.items():
                board.add_scalar(name, value, line["step"])
            board.flush()
    return write


def memory_mb(device):
    """Peak memory of this process: the GPU's where there is one. 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource                                             # Windows has none
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss   # kB, but bytes on macOS
    return peak / 2**(20 if sys.platform == "darwin" else 10)


def decoder(dataset, config, device, say):
    """What makes uint8 pictures of the network's samples; None, and says why, if there is nothing here."""
    if not isinstance(dataset, data.Latents):
        return data.to_uint8 if dataset.shape[0] in (1, 3) else None
    latents = {"mean": dataset.mean, "std": dataset.std, "vae": dataset.describe()["vae"]}
    try:
        if device.type == "cpu":
            raise data.UserError("the VAE takes seconds a picture on a CPU")
        data.find_vae(download=False, **(latents["vae"] or {}))
    except data.UserError as error:                             # pictures can wait for sample.py
        say(f"no pictures during training: {error}")
        return None
    return sample.latent_decoder({"latents": latents}, config, "the data set", device)


def preview(path, net, ema, dataset, device, decode, columns=20):
    """The same noise through raw and averaged weights in one and two evaluations: four rows of pictures."""
    columns = max(10, min(columns, 1280 // max(48, dataset.picture_shape[-1])))
    labels = (torch.arange(columns) % dataset.classes).to(device)
    noise = sample.noise_for(range(columns), dataset.shape, seed=0).to(device)
    rows = [decode(sample.ode(model, noise, labels, sample.uniform_grid(nfe))).cpu()
            for model in (net, ema) for nfe in (1, 2)]
    names = ["raw, 1 NFE", "raw, 2 NFE", "EMA, 1 NFE", "EMA, 2 NFE"]
    sample.contact_sheet(torch.cat(rows), columns, captions=names).save(path)


def curve(log, path, panels=("alpha", "loss_fm", "loss_jump", "err", "tangent", "grad_norm")):
    """A picture of log.jsonl, one panel a quantity from 0 up, the steps from left to right."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]               # lines of --eval-every hold other numbers
    if not rows:                            # resumed into a new folder, and no line is due yet
        return
    width, height, left, last = 900, 110, 70, max(1, rows[-1]["step"])
    image = Image.new("RGB", (width, height * len(panels)), "white")
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(panels):
        values = [row[name] for row in rows]
        top = sorted(values)[int(0.99 * (len(values) - 1))] or 1.0   # a rare spike may not flatten the rest
        floor, full = (i + 1) * height - 8, height - 30
        pen.line([(left, floor), (width - 10, floor)], fill="#cccccc")
        heights = [full * min(max(value / top, 0), 1.05) for value in values]
        along = [left + (width - 10 - left) * row["step"] / last for row in rows]
        pen.line([(x, floor - h) for x, h in zip(along, heights)], fill="black")
        pen.text((4, i * height + 4), f"{name} = {values[-1]:.3g} at step {rows[-1]['step']}", fill="black")
        pen.text((4, floor - full - 6), f"{top:.3g}", fill="#888888")
    image.save(path)


def post_mortem(run, step, alpha, norm, tangent, batches, noise, objective):
    """After a non-finite loss or gradient: save what is needed to see why; returns a line that says where."""
    x, y = (torch.cat(part) for part in zip(*batches))
    noise = {k: torch.cat([v[own_rows(run, m)] for m in range(len(batches))]) for k, v in noise.items()}
    x = run.dataset.sample(x.to(run.device), noise.pop("posterior", None))
    run.out.mkdir(parents=True, exist_ok=True)                  # another node may not share rank 0's disk
    save(run.out / f"nonfinite_rank{run.rank}.pt",
         {"step": step, "alpha": alpha, "net": run.net.state_dict(), "x": x, "y": y, **noise})
    where = "all rows finite by themselves"
    objective = objective | {"target_net": run.net, "derivative": du_dt}        # eager: one row is a new size
    for i in range(len(x)):                                     # no row depends on another: try each alone
        row = {k: v[i:i + 1] for k, v in noise.items()}
        with torch.no_grad():
            loss, _ = alpha_flow_loss(run.net, x[i:i + 1], y[i:i + 1], alpha, **row, **objective)
        if not torch.isfinite(loss):
            where = f"t {noise['t'][i].item():.4f}, r {noise['r'][i].item():.4f} in row {i}"
            break
    return (f"non-finite loss or gradient at step {step}: alpha {alpha:g}, {where}, gradient norm {norm:g}, "
            f"tangent norm {tangent:g}. {run.out}/nonfinite_rank*.pt holds weights and batch; the last good "
            "checkpoint stays")


# ---- training --------------------------------------------------------------------------------------

@dataclasses.dataclass
class Run:
    """What a run consists of. train() changes net, ema and optimizer, and nothing else."""
    args: argparse.Namespace
    recipe: dict
    dataset: data.Dataset
    net: DiT
    ema: DiT
    optimizer: torch.optim.Optimizer
    start: int                                                  # steps already done
    out: Path
    rank: int
    world: int
    device: torch.device
    decode: object = None                                       # samples -> uint8 pictures, if possible
    evaluate: object = None                                     # what --eval-every calls

    def checkpoint(self, finished):
        ckpt = {"format": sample.FORMAT, "net": self.net.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": finished, "data": self.dataset.describe(),
                "config": {"model": dataclasses.asdict(self.net.config), "recipe": self.recipe}}
        if isinstance(self.dataset, data.Latents):              # without them no sample can be decoded
            ckpt["latents"] = {"mean": self.dataset.mean.cpu(), "std": self.dataset.std.cpu(),
                               "vae": self.dataset.describe()["vae"]}
        return ckpt


def assemble(args, rank, world, device):
    """A Run: fresh, from another checkpoint's weights, or as an interrupted one left it; else ValueError."""
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package: pip install tensorboard")
    out, ckpt = open_run(args)
    say = print if rank == 0 else lambda *_: None
    recipe = resolve(args, ckpt and ckpt["config"]["recipe"])
    if ckpt:
        was, finished = ckpt["config"]["recipe"], ckpt["step"]
        if finished > recipe["steps"] or finished == recipe["steps"] and not (out / "ckpt.pt").exists():
            raise ValueError(f"that run has done {finished} steps: give more --steps")
        if changed := [f"{k} {recipe[k]} (was {was[k]})" for k in was if recipe.get(k) != was[k]]:
            say(f"resuming with other settings: {', '.join(changed)}")
    if recipe["batch"] % (world * args.accumulate):
        raise ValueError(f"--batch {recipe['batch']} is not divisible by {world} processes x "
                         f"{args.accumulate} micro-batches")
    dataset = data.load(recipe["data"], seed=recipe["seed"], flip=recipe["flip"])
    C, size, _ = dataset.shape
    torch.manual_seed(recipe["seed"])                           # the same first weights on all processes
    if ckpt:
        net = DiT(DiTConfig(**ckpt["config"]["model"]))
    else:
        net = build(network_name(recipe["model"]), size, C, dataset.classes)
    if (net.config.channels, net.config.size, net.config.classes) != (C, size, dataset.classes):
        raise ValueError(f"{recipe['data']} has {C}x{size}x{size} pictures in {dataset.classes} classes, "
                         "unlike the data of the run that is to be resumed")
    latents = isinstance(dataset, data.Latents) and {"mean": dataset.mean, "std": dataset.std}
    if ckpt and latents:
        if not (ckpt.get("latents") and sample.same_latents(ckpt["latents"], latents)):
            raise ValueError(f"the latents in {recipe['data']} have other statistics than those that the "
                             "run was trained on: prepared anew, from other files or in another way")
    if args.init_from and not ckpt:
        init_from(net, args.init_from, say, latents)
    net.to(device)
    net.recompute = args.recompute
    ema = DiT(net.config).to(device).requires_grad_(False)
    ema.load_state_dict(ckpt["ema"] if ckpt else net.state_dict())
    options = dict(betas=(recipe["beta1"], recipe["beta2"]), fused=device.type in ("cpu", "cuda"))
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe["lr"], **options)
    if ckpt:
        net.load_state_dict(ckpt["net"])
        ckpt["optimizer"]["param_groups"][0].update(options)    # this run's and this device's
        optimizer.load_state_dict(ckpt["optimizer"])
    start = ckpt["step"] if ckpt else 0
    if world > 1:
        starts = [None] * world
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise ValueError(f"the processes would start at different steps, {starts}: --out must be a "
                             "folder that all of them see")
    return Run(args, recipe, dataset, net, ema, optimizer, start, out, rank, world, device)


def prepare_network(run, say):
    """(network, du/dt, autocast): compiled or eager, and the context that rounds products to bf16 or not.

    Only matrix products are rounded: weights, targets, residual stream, norms, times and loss are float32,
    and the products of the time embedders TF32 at the least (see model.py).
    """
    # TF32 where the device has it, unless float32 was asked for by name.
    exact = run.args.precision == "fp32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    cuda = run.device.type == "cuda"
    kind = run.args.precision or ("bf16" if cuda else "fp32")

    def autocast(kind=kind):
        return torch.autocast(run.device.type, torch.bfloat16, enabled=kind == "bf16")

    def autocast_jvp():
        return autocast(run.args.jvp_precision or kind)

    fast, fast_du_dt = run.net, du_dt
    if cuda if run.args.compile is None else run.args.compile:
        fast, fast_du_dt = compiled(run, autocast, autocast_jvp, say)

    def derivative(net, *point):
        with autocast_jvp():
            return fast_du_dt(run.net, *point)          # compiled as a whole, network included

    say(f"{run.device}, {run.world} process{'es' * (run.world > 1)}, {kind} products "
        f"({'as asked' if run.args.precision else 'the default on ' + run.device.type})")
    return fast, derivative, autocast


def catch_signals():
    """A function that tells whether SIGTERM or Ctrl-C has come. A second Ctrl-C interrupts at once."""
    caught = []

    def handle(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return lambda: bool(caught)


def own_rows(run, m):
    """The rows of the global batch in micro-batch m of this process: every (world·accumulate)-th.

    With a stride and not in blocks, because the first rows are the cheap ones with r = t.
    """
    return slice(run.rank + run.world * m, None, run.world * run.args.accumulate)


def micro_batches(run):
    """All that is still to be seen, in order; labels stay on the CPU (see loss.py)."""
    for step in range(run.start, run.recipe["steps"]):
        for m in range(run.args.accumulate):
            rows = own_rows(run, m)
            x, y = run.dataset.batch(step, rows.start, rows.step, run.recipe["batch"])
            yield x.pin_memory() if run.device.type == "cuda" else x, y


def backward(run, predict, batches, alpha, noise, objective, autocast):
    """Add up the gradients of one step over its micro-batches. Returns the mean statistics."""
    total = {}
    for m, (x, y) in enumerate(batches):
        mine = {k: v[own_rows(run, m)] for k, v in noise.items()}
        last = m == len(batches) - 1 or run.world == 1
        with contextlib.nullcontext() if last else predict.no_sync():                   # DDP averages once
            x = x.to(run.device, non_blocking=run.device.type == "cuda")
            x = run.dataset.sample(x, mine.pop("posterior", None))                      # (b, C, H, W)
            with autocast():
                loss, stats = alpha_flow_loss(predict, x, y, alpha, **mine, **objective)
            (loss / len(batches)).backward()
        for name, value in {"loss": loss.detach(), **stats}.items():
            total[name] = total.get(name, 0) + value / len(batches)
    return total


def train(run):
    """The loop. Step k is a function of the state after step k-1 and of (seed, k): to resume is to go on."""
    args, recipe, net, device = run.args, run.recipe, run.net, run.device
    steps, first = recipe["steps"], run.rank == 0
    preview_every = args.preview_every or max(1, steps // 10)
    save_every = args.save_every or min(preview_every, 5000)
    fast, derivative, autocast = prepare_network(run, print if first else lambda *_: None)
    # The prediction goes through DDP, whose backward averages gradients; targets need none and do without.
    predict = fast
    if run.world > 1:
        predict = DistributedDataParallel(fast, device_ids=[device] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True)                 # no second copy
    objective = {k: recipe[k] for k in ("omega", "kappa", "t_min", "t_max", "label_drop", "clip", "c",
                                        "shrink_c")}
    objective.update(null=net.config.classes, target_net=fast, derivative=derivative)

    latents = isinstance(run.dataset, data.Latents)
    write, flops = open_log(run) if first else None, flops_of_forward(net.config)
    loader, stop_asked = data.prefetch(micro_batches(run)), catch_signals()
    clock, waited, logged = time.perf_counter(), 0.0, run.start - 1
    bar = tqdm(range(run.start, steps), initial=run.start, total=steps, disable=None if first else True)
    for step in bar:
        asked = time.perf_counter()
        batches = [next(loader) for _ in range(args.accumulate)]
        waited += time.perf_counter() - asked
        alpha, noise = alpha_of(recipe, step), draw(recipe, step, run.dataset.shape, device, latents)
        stats = backward(run, predict, batches, alpha, noise, objective, autocast)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), recipe["grad_clip"])

        # The one place where the host waits for the device: a bad gradient must not reach the weights.
        stop, broken = any_process(run, stop_asked(), not math.isfinite(norm + stats["loss"]))
        if broken:
            with autocast():
                raise SystemExit(post_mortem(run, step, alpha, norm, stats["tangent"], batches, noise,
                                             objective))
        for group in run.optimizer.param_groups:
            group["lr"] = lr_at(recipe, step)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        update_ema(run.ema, net, ema_decay(recipe, step))

        done = step + 1
        if step % args.log_every == 0 or stop or done == steps:
            stats, seconds = mean_over_processes(run, stats), time.perf_counter() - clock
            speed = recipe["batch"] * (step - logged) / seconds
            mfu = utilisation(run, alpha, speed, flops)
            bar.set_postfix(alpha=f"{alpha:.3g}", err=f"{stats['err']:.3g}", img_s=f"{speed:.4g}",
                            **({} if mfu is None else {"mfu": f"{mfu:.0%}"}))
            if first:
                write({"step": step, **stats, "alpha": alpha, "lr": lr_at(recipe, step),
                       "grad_norm": norm.item(), "memory_mb": memory_mb(device),
                       "images_per_s": speed, **({} if mfu is None else {"mfu": mfu}),
                       "waiting": waited / seconds})            # share of the time, for pictures
            clock, waited, logged = time.perf_counter(), 0.0, step
        if first and (done % save_every == 0 or done == steps or stop):
            save(run.out / "ckpt.pt", run.checkpoint(done))     # before the pictures: nothing may cost a save
        if first and (done % preview_every == 0 or done == steps):
            began = time.perf_counter()
            if run.decode:
                preview(run.out / f"samples_{done:07d}.png", net, run.ema, run.dataset, device, run.decode)
            curve(run.out / "log.jsonl", run.out / "curve.png")
            clock += time.perf_counter() - began                # images_per_s is about training alone
        if run.evaluate and not stop and (done % args.eval_every == 0 or done == steps):
            began, values = time.perf_counter(), run.evaluate()     # on all processes
            if first:
                write({"step": step, **values})
                bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
            clock += time.perf_counter() - began
        if stop:
            break
    return done


def main():
    args = parse_flags()
    if args.list:
        print(list_recipes())
        return
    rank, world, device = start_processes(args.device)
    run = assemble(args, rank, world, device)
    say = print if rank == 0 else lambda *_: None
    run.decode = decoder(run.dataset, run.net.config, device, say)
    run.evaluate = evaluation(run)                              # may fail: before anything is written
    steps = run.recipe["steps"]
    if rank == 0:
        about, parameters = run.dataset.describe(), sum(p.numel() for p in run.net.parameters())
        print(f"{run.recipe['model']} on {about['name']}: {parameters:,} parameters, {about['count']:,} "
              f"{about.get('kind', 'pictures')} {'x'.join(map(str, about['shape']))}, "
              f"{about['classes']} classes")
        print(textwrap.fill("recipe: " + ", ".join(f"{k} {v}" for k, v in run.recipe.items()), 110))
        print(cost_report(run))
        if run.start:
            print(f"resuming at step {run.start} of {steps}")
        run.out.mkdir(parents=True, exist_ok=True)
        if run.start == 0:                                      # --overwrite: the old run is gone now
            for old in [run.out / "ckpt.pt", *run.out.glob("samples_*.png")]:
                old.unlink(missing_ok=True)
        (run.out / "recipe.json").write_text(json.dumps(run.recipe, indent=1) + "\n")
    finished = train(run) if run.start < steps else steps
    if rank == 0:
        ckpt = run.out / "ckpt.pt"
        if finished < steps:
            print(f"stopped after step {finished} of {steps}; saved. "
                  f"Continue with: python train.py --resume {ckpt}")
        else:
            labels, pictures = torch.arange(10) % run.dataset.classes, ""
            if run.decode:
                pictures = "samples_*.png, trajectory.gif, "
                sample.trajectory(run.ema, run.decode, labels, "ode", 0, run.out / "trajectory.gif")
            print(f"done: {run.out}/ holds ckpt.pt, {pictures}curve.png and log.jsonl. "
                  f"Next: python sample.py --ckpt {ckpt} --nfe 1")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
