"""Train a DiT with the α-Flow objective, on one CPU or on many GPUs. The loop is train(), near the end.

    python train.py                                        # digits, on a laptop, in minutes
    python train.py --data mnist                           # after: python data.py mnist
    python train.py --data mine --steps 50000              # after: python data.py folder ... --out data/mine
    torchrun --nproc_per_node=8 train.py --model XL/2      # ImageNet latents, the paper's recipe

The objective is chosen by its flags:

    --alpha-schedule sigmoid     α-Flow            --alpha 0.5        Shortcut's step length
    --alpha 0                    MeanFlow          --alpha 1          trajectory flow matching
                                                   --fm-ratio 1       plain flow matching
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import resource
import signal
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import fid
import sample
from loss import alpha_at, alpha_flow_loss, du_dt, gradient_conflict, sample_times
from model import FORMAT, DiT, DiTConfig, build, read_checkpoint

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
        "alpha_clamp": (0.005, "η: a moving α < η snaps to 0, α > 1-η to 1"),
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
COLOUR = dict(flip=True, steps=100_000, lr=4e-4, warmup=1000)

RECIPES = {                 # --model: what differs from the paper's common settings; a flag wins over both
    # small networks, in pixels
    "Ti/2": dict(SMALL, data="digits"),
    "Ti/4": dict(SMALL, data="mnist") | dict(steps=1875, batch=32, lr=2e-3),        # one epoch
    "Mi/2": dict(COLOUR, data="cifar10"),
    "Mi/4": dict(COLOUR, data="PICTURES"),                  # your own: give --data
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


def recipe_for(dataset):
    """The recipe that fits a data set when --model is not given."""
    channels, size, _ = dataset.shape
    if isinstance(dataset, data.Latents):
        return "B/2"
    if size <= 8:
        return "Ti/2"
    return ("Ti/4" if channels == 1 else "Mi/2") if size <= 32 else "Mi/4"


def parse_flags():
    """The command line. A setting's default here is None: as the recipe, or the resumed run, has it."""
    def pair(text):
        first, second = text.split(",")
        return float(first), float(second)

    p = data.Parser(description="Train a DiT with the α-Flow objective.")
    p.add_argument("--model", help="recipe, which sets all else [the one that fits --data]: "
                   f"{', '.join(RECIPES)}; or any SIZE/PATCH")
    p.add_argument("--alpha", type=float, help="a constant α: --alpha-schedule constant --alpha-start α")
    for title, settings in SETTINGS.items():
        group = p.add_argument_group(f"{title} (in brackets the paper's value; recipes differ)")
        for name, (default, text) in settings.items():
            kind = dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else \
                dict(type=pair if isinstance(default, tuple) else type(default))
            group.add_argument(flag(name), default=None, help=f"{text} [{default}]", **kind)
    g = p.add_argument_group("run")
    g.add_argument("--out", help="folder of the run [out/DATA]")
    g.add_argument("--resume", nargs="?", const="yes", metavar="auto|CKPT",
                   help="continue the run in --out, or that file; auto: start anew if there is none")
    g.add_argument("--init-from", metavar="CKPT", help="start from another checkpoint's EMA weights")
    g.add_argument("--overwrite", action="store_true", help="replace the run that is already in --out")
    g = p.add_argument_group("machine")
    g.add_argument("--device", help="cuda or cpu [cuda if there]")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches a step, to save memory [1]")
    g.add_argument("--recompute", action="store_true", help="backward computes the blocks again: less memory")
    g.add_argument("--precision", choices=("bf16", "fp32"), help="of products [bf16 on CUDA, else fp32]")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks [on CUDA]")
    g = p.add_argument_group("reports")
    g.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl [10]")
    g.add_argument("--preview-every", type=int, help="steps between previews [a tenth of the run]")
    g.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints [10]")
    g.add_argument("--conflict-every", type=int, help="steps between measurements of the gradients' cosines")
    g.add_argument("--eval-every", type=int, help="steps between measurements by fid.py [never]")
    g.add_argument("--eval-features", help="see fid.py --features")
    g.add_argument("--eval-samples", type=int, help="pictures drawn for that [as many as real ones]")
    g.add_argument("--eval-ref", help="real pictures or statistics, see fid.py --ref [the training data]")
    return p.parse_args()


def flag(name):
    return "--" + name.replace("_", "-")


def resolve(args, saved=None):
    """(recipe, data set): a resumed run's own recipe or the model's, with the given flags on top.

    ValueError, in one line, for what makes no sense.
    """
    name = args.data or saved and saved["data"]
    model = args.model or saved and saved["model"] or (recipe_for(data.load(name)) if name else "Ti/2")
    own = RECIPES.get(model, {})
    if model not in RECIPES and network_name(model) != model:       # "meanflow-B/4" would train α-Flow
        raise ValueError(f"unknown recipe {model!r}: give one of {', '.join(RECIPES)}, or SIZE/PATCH")
    if saved and model != saved["model"]:
        raise ValueError(f"--resume continues a {saved['model']}, not a {model}; see --init-from")
    given = {k: v for k, v in vars(args).items() if k in PAPER and v is not None}
    recipe = {"model": model, **PAPER, **(saved or own), **given}
    if args.alpha is not None:
        if moving := [k for k in given if k.startswith("alpha_")]:
            raise ValueError(f"--alpha is a constant, so {flag(moving[0])} would do nothing")
        recipe.update(alpha_schedule="constant", alpha_start=args.alpha)
    if args.alpha_schedule == "step" and args.alpha_window is None:
        recipe["alpha_window"] = (0.5, 0.5)             # in the whole-run window the step would be at step 0
    other_data = recipe["data"] != own.get("data", PAPER["data"])
    if "warmup" not in given and not saved and (other_data or "steps" in given and "warmup" not in own):
        recipe["warmup"] = min(recipe["warmup"], recipe["steps"] // 10)     # it may be longer than the run
    check(recipe)
    return recipe, data.load(recipe["data"], seed=recipe["seed"], flip=recipe["flip"])


def check(recipe):
    positive = "steps batch lr lr_tail grad_clip ema_half_life clip c"
    wrong = [k for k in positive.split() if not recipe[k] > 0]
    wrong += [k for k in ("label_drop", "beta1", "beta2", "lr_tail") if not 0 <= recipe[k] <= 1]
    wrong += [] if recipe["t_min"] < recipe["t_max"] else ["t_min"]
    moves = recipe["alpha_schedule"] != "constant"
    wrong += ["alpha_start"] if moves and recipe["alpha_start"] == recipe["alpha_end"] else []
    wrong += [] if recipe["lr_decay"] in ("constant", "linear", "cosine") else ["lr_decay"]
    if wrong:
        raise ValueError(f"{flag(wrong[0])} cannot be {recipe[wrong[0]]}: see --help")
    alpha_of(recipe, 0)                                 # these two check what they are given
    sample_times(1, recipe["fm_ratio"], recipe["time_mean"], recipe["time_std"])


# ---- what depends on the step alone ----------------------------------------------------------------

def alpha_of(recipe, step):
    return alpha_at(step, recipe["steps"], recipe["alpha_schedule"], recipe["alpha_window"],
                    recipe["alpha_start"], recipe["alpha_end"], recipe["alpha_gamma"], recipe["alpha_clamp"])


def lr_at(recipe, step):
    """Linear warm-up, then constant; with a decay, down to 0 over the last `lr_tail` of the run."""
    lr = recipe["lr"] * min(1, (step + 1) / max(1, recipe["warmup"]))
    left = min(1, (1 - step / recipe["steps"]) / recipe["lr_tail"])                 # 1 before the tail
    cosine = (1 - math.cos(math.pi * left)) / 2
    return lr * {"constant": 1, "linear": left, "cosine": cosine}[recipe["lr_decay"]]


def ema_decay(recipe, step):
    """Decay of the averaged weights: half-life min(ema_half_life, ema_ramp·step), to forget the start."""
    half_life = min(recipe["ema_half_life"], recipe["ema_ramp"] * step)
    return 0.5 ** (1 / half_life) if half_life > 0 else 0.0


def random_numbers(recipe, step, dataset, device):
    """Everything random in a step, for the whole global batch: a function of (seed, step) alone.

    Each process draws it all and keeps its own rows, so the numbers do not depend on how many there are.
    """
    B, key = recipe["batch"], (0, recipe["seed"], step)             # sample.py has shorter keys
    host, noise = data.generator(*key, 0), data.generator(*key, 1, device=device)
    t, r = sample_times(B, recipe["fm_ratio"], recipe["time_mean"], recipe["time_std"], host)
    numbers = {"t": t, "r": r, "drop": torch.rand(B, generator=host),               # (B,), on the CPU
               "e": torch.randn(B, *dataset.shape, generator=noise, device=device)}     # (B, C, H, W)
    if isinstance(dataset, data.Latents):               # picks a latent of each picture's distribution
        cloud = data.generator(*key, 2, device=device)
        numbers["posterior"] = torch.randn(B, *dataset.shape, generator=cloud, device=device)
    return numbers


# ---- a run: fresh, from another's weights, or as an interrupted one left it --------------------------

def open_run(args):
    """(folder, checkpoint or None): where the run lives, and what it continues from."""
    name = args.data or RECIPES.get(args.model or "Ti/2", PAPER).get("data", PAPER["data"])
    path = Path(args.out or f"out/{Path(name).name}") / "ckpt.pt"
    if args.resume not in (None, "yes", "auto"):
        path = Path(args.resume)
    out = Path(args.out or path.parent)
    ckpt = read_checkpoint(path) if args.resume and (args.resume != "auto" or path.exists()) else None
    if args.init_from and args.resume not in (None, "auto"):
        raise ValueError("--resume goes on with its own weights: --init-from would do nothing")
    if ckpt and "optimizer" not in ckpt:
        raise ValueError(f"{path} holds no training state to resume; see --init-from")
    if (out / "ckpt.pt").exists() and not args.overwrite and not (ckpt and path.samefile(out / "ckpt.pt")):
        raise ValueError(f"{out} already holds a run: give --resume, --overwrite or another --out")
    return out, ckpt


def assemble(args, rank, world, device, say):
    """All that the loop works on. ValueError, in one line, for what does not fit together."""
    out, ckpt = open_run(args)
    recipe, dataset = resolve(args, ckpt and ckpt["config"]["recipe"])
    C, size, _ = dataset.shape
    if args.accumulate < 1 or args.log_every < 1 or recipe["batch"] % (world * args.accumulate):
        raise ValueError(f"--batch {recipe['batch']} is not divisible by {world} processes x "
                         f"{args.accumulate} micro-batches")
    torch.manual_seed(recipe["seed"])                   # the same first weights on all processes
    model = DiT(DiTConfig(**ckpt["config"]["model"])) if ckpt else \
        build(network_name(recipe["model"]), size, C, dataset.classes)
    if (model.config.channels, model.config.size, model.config.classes) != (C, size, dataset.classes):
        raise ValueError(f"{recipe['data']} has other sizes or classes than the run that is to be resumed")
    if args.init_from and not ckpt:
        init_from(model, args.init_from, say)
    model.to(device)
    model.recompute = args.recompute
    ema = copy.deepcopy(model).requires_grad_(False)
    betas = recipe["beta1"], recipe["beta2"]
    optimizer = torch.optim.Adam(model.parameters(), recipe["lr"], betas, fused=device.type != "mps")
    if ckpt:
        options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        model.load_state_dict(ckpt["net"])
        ema.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
        optimizer.param_groups[0].update(options)       # this run's and this device's
    start = ckpt["step"] if ckpt else 0
    if start > recipe["steps"]:
        raise ValueError(f"that run has done {start} steps: give more --steps")
    return SimpleNamespace(args=args, recipe=recipe, dataset=dataset, out=out, start=start, rank=rank,
                           world=world, device=device, model=model, ema=ema, optimizer=optimizer, say=say)


def init_from(model, path, say):
    """Copy the weights wherever name and shape agree, and say what did not; ValueError if most did not."""
    theirs, ours = read_checkpoint(path)["ema"], model.state_dict()
    fits = {k: w for k, w in theirs.items() if k in ours and w.shape == ours[k].shape}
    if len(fits) < len(ours) / 2:
        raise ValueError(f"--init-from {path}: {len(fits)} of {len(ours)} tensors fit this network")
    model.load_state_dict(fits, strict=False)
    new = ", ".join(sorted(ours.keys() - fits)) or "none"
    say(f"init-from {path}: {len(fits)} of {len(ours)} tensors; new here: {new}")


def latents_of(dataset):
    """What a checkpoint must hold of latents, so that samples can be decoded; None for pictures."""
    if isinstance(dataset, data.Latents):
        return {"mean": dataset.mean.cpu(), "std": dataset.std.cpu(), "vae": dataset.about["vae"]}


def save(run, finished):
    """Written beside it, flushed, renamed: whenever we are killed, ckpt.pt is a whole checkpoint."""
    ckpt = {"format": FORMAT, "net": run.model.state_dict(), "ema": run.ema.state_dict(),
            "optimizer": run.optimizer.state_dict(), "step": finished, "data": run.dataset.describe(),
            "config": {"model": dataclasses.asdict(run.model.config), "recipe": run.recipe},
            "latents": latents_of(run.dataset)}
    try:
        with data.replacing(run.out / "ckpt.pt") as file:
            torch.save(ckpt, file)
    except (OSError, RuntimeError) as error:            # how torch says that the disk is full
        raise OSError(f"cannot save {run.out}/ckpt.pt, is the disk full? ({str(error)[:80]})") from None


# ---- what it costs ---------------------------------------------------------------------------------

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}    # bf16


def flops_of_forward(config):
    """FLOPs of one forward for one picture; multiply-add is two, where DiT's tables count one."""
    D, C, p = config.dim, config.channels, config.patch
    T = (config.size // p) ** 2                         # tokens
    block = 12 * T * D * D + 2 * T * T * D + 6 * D * D  # linear maps, attention, modulation
    ends = 2 * T * p * p * C * D + 2 * D * D            # into patches and back, last modulation
    times = 2 * (256 * D + D * D)                       # of t and of t - r
    return 2 * (config.depth * block + ends + times)


def forwards_of_step(recipe, alpha):
    """About what a step costs in forwards of its batch: prediction 3, backward included, and target."""
    jumps = 1 - recipe["fm_ratio"]
    target = 0 if alpha == 1 else jumps if alpha > 0 else 2 * jumps     # du/dt: see Product in model.py
    if (recipe["omega"], recipe["kappa"]) == (1, 0):
        return 3 + target
    times = torch.distributions.Normal(recipe["time_mean"], recipe["time_std"])
    ends = torch.tensor([recipe["t_min"], recipe["t_max"]], dtype=torch.float64).clamp(0, 1).logit()
    low, high = times.cdf(ends).tolist()
    fm, jump = (1 - jumps) * (high - low), jumps * (high**2 - low**2)       # guided; t is the later of two
    return 3 + target + fm + 2 * jump                   # all without a label, those that jump with it, too


def utilisation(run, alpha, images_per_s):
    """Share of the GPUs' bf16 peak that the counted FLOPs are; None where the peak is not known."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    flops = images_per_s * forwards_of_step(run.recipe, alpha) * flops_of_forward(run.model.config)
    return peak and flops / (peak * 1e12 * run.world)


# ---- reports ---------------------------------------------------------------------------------------

def open_log(run):
    """A function that writes a line of log.jsonl; a resumed run first drops those that it will do again."""
    path = run.out / "log.jsonl"
    old = path.read_text().splitlines() if run.start and path.exists() else []
    old = [line for line in old if line.endswith("}") and json.loads(line)["step"] < run.start]
    with data.replacing(path) as file:
        file.write("".join(line + "\n" for line in old).encode())
    file = open(path, "a", buffering=1)

    def write(**line):
        file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v
                               for k, v in line.items() if v is not None}) + "\n")
    return write


def preview(run, done, columns=20):
    """The same noise through raw and averaged weights in one and two evaluations: four rows of pictures."""
    columns = 10 if run.dataset.shape[-1] > 8 else columns
    labels, rows = torch.arange(columns) % run.dataset.classes, range(columns)
    pictures = [run.decode(sample.draw(net, labels, rows, sample.uniform_grid(nfe))).cpu()
                for net in (run.model, run.ema) for nfe in (1, 2)]
    names = ["raw, 1 NFE", "raw, 2 NFE", "EMA, 1 NFE", "EMA, 2 NFE"]
    sample.contact_sheet(torch.cat(pictures), columns, names).save(run.out / f"samples_{done:07d}.png")


def curve(run, width=900, height=110, left=70):
    """A picture of log.jsonl, one panel a quantity, the steps from left to right."""
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    names = ["alpha", "loss_fm", "loss_jump", "err", "tangent", "grad_norm", "cos_tfm_tc", "cos_tfm_tc_now"]
    panels = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
    panels = {name: points for name, points in panels.items() if points}
    image = Image.new("RGB", (width, height * len(panels)), "white")
    pen, last = ImageDraw.Draw(image), max(1, run.recipe["steps"])
    for i, (name, points) in enumerate(panels.items()):
        values = sorted(value for _, value in points)
        top = values[int(0.99 * (len(values) - 1))] or 1.0          # a rare spike may not flatten the rest
        low, top = (-1, 1) if name.startswith("cos") else (0, top)
        floor, full = (i + 1) * height - 8, height - 30
        pen.line([(left, floor), (width - 10, floor)], fill="#cccccc")
        pen.line([(left + (width - 10 - left) * step / last,
                   floor - full * min(max((value - low) / (top - low), 0), 1.05)) for step, value in points],
                 fill="black")
        pen.text((4, i * height + 4), f"{name} = {points[-1][1]:.3g} at step {points[-1][0]}", fill="black")
        pen.text((4, floor - full - 6), f"{top:.3g}", fill="#888888")
    image.save(run.out / "curve.png")


def evaluation(run):
    """A function -> {"FID 1 NFE": ..., ...} of the EMA weights now, which all processes call together."""
    args = run.args
    real, stats = fid.open_ref(args.eval_ref) if args.eval_ref else (fid.from_dataset(run.dataset), None)
    extractors = fid.extractors_for(args.eval_features, (real or run.dataset).shape, run.device)
    theirs = [stats] * len(extractors) if stats else fid.measure(real, extractors)
    counts = run.dataset.describe()["label_counts"]
    count = args.eval_samples or min(50_000, real.count if real else 50_000)
    labels = sample.make_labels("data", count, run.dataset.classes, 0, counts)
    run.say(f"evaluation: {count} pictures of the EMA weights, labels as in the data, seed 0, against "
            f"{args.eval_ref or run.dataset.name}; {', '.join(e.name for e in extractors)}")

    def evaluate():
        values = {}
        for nfe in (1, 2):
            made = fid.from_network(run.ema, run.decode, labels, sample.uniform_grid(nfe), "ode", 0, {})
            for e, ours, other in zip(extractors, fid.measure(made, extractors), theirs):
                values |= {f"{title} {nfe} NFE": v for title, v in fid.compare(e, ours, other).items()}
        return values
    return evaluate


def conflict(run, alpha):
    """The paper's measurement at α = 0 and at the current α, on a fixed micro-batch and the raw weights."""
    rows, numbers = own_rows(run, 0), random_numbers(run.recipe, 0, run.dataset, run.device)
    x, y = run.dataset.batch(0, rows.start, rows.step, run.recipe["batch"])
    posterior = numbers["posterior"][rows] if "posterior" in numbers else None
    x = run.dataset.sample(x.to(run.device), posterior)
    t, r = sample_times(len(x), 0.0, run.recipe["time_mean"], run.recipe["time_std"], data.generator(0))
    options = {k: run.recipe[k] for k in ("omega", "kappa", "t_min", "t_max")}
    options.update(e=numbers["e"][rows], t=t, r=r, null=run.model.config.classes)
    with torch.compiler.set_stance("force_eager"):
        now = gradient_conflict(run.model, x, y, alpha, **options) if alpha > 0 else {}
        return gradient_conflict(run.model, x, y, 0.0, **options) | {f"{k}_now": v for k, v in now.items()}


# ---- training --------------------------------------------------------------------------------------

def eager_du_dt(net, z, t, r, v, y):
    """du/dt goes around the compiled blocks: in forward mode each would be compiled once more."""
    with torch.compiler.set_stance("force_eager"):
        return du_dt(net, z, t, r, v, y)


def catch_signals():
    """A list that is not empty once SIGTERM or Ctrl-C has come. A second Ctrl-C interrupts at once."""
    caught = []

    def handle(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return caught


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


def backward(run, ddp_model, loader, step, alpha, objective, autocast):
    """Add up the gradients of one step over its micro-batches. Returns the mean statistics."""
    numbers, total = random_numbers(run.recipe, step, run.dataset, run.device), {}
    for m in range(run.args.accumulate):
        (x, y), mine = next(loader), {k: v[own_rows(run, m)] for k, v in numbers.items()}
        x = x.to(run.device, non_blocking=True)
        x = run.dataset.sample(x, mine.pop("posterior", None))                      # (b, C, H, W)
        last = m == run.args.accumulate - 1 or run.world == 1
        with contextlib.nullcontext() if last else ddp_model.no_sync():             # DDP averages once
            with autocast:
                loss, stats = alpha_flow_loss(ddp_model, x, y, alpha, **mine, **objective)
            (loss / run.args.accumulate).backward()
        for name, value in {"loss": loss.detach(), **stats}.items():
            total[name] = total.get(name, 0) + value / run.args.accumulate
    return total


def mean_over_processes(run, stats):
    """The statistics as floats, averaged over the processes (their batches are equally large)."""
    values = torch.stack(list(stats.values())).float()
    if run.world > 1:
        dist.all_reduce(values)
        values /= run.world
    return dict(zip(stats, values.tolist()))


def train(run, ddp_model, autocast, evaluate=None):
    """The loop. Step k is a function of the state after step k-1 and of (seed, k): to resume is to go on."""
    args, recipe, model, steps = run.args, run.recipe, run.model, run.recipe["steps"]
    names = ("omega", "kappa", "t_min", "t_max", "label_drop", "clip", "c", "shrink_c")
    objective = {name: recipe[name] for name in names}
    # The prediction goes through DDP, whose backward averages gradients; targets need none and do without.
    objective.update(null=model.config.classes, target_net=model, derivative=eager_du_dt)
    write, loader, stop = run.rank == 0 and open_log(run), data.prefetch(micro_batches(run)), catch_signals()
    parameters, averages = list(model.parameters()), list(run.ema.parameters())
    clock, logged, saved = time.perf_counter(), run.start - 1, time.monotonic()
    bar = tqdm(range(run.start, steps), initial=run.start, total=steps, disable=True if run.rank else None)
    for step in bar:
        alpha = alpha_of(recipe, step)
        stats = backward(run, ddp_model, loader, step, alpha, objective, autocast)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not math.isfinite(norm + stats["loss"]):     # here the host waits for the device
            raise ValueError(f"loss or gradient of step {step} is not finite (alpha {alpha:g}): the last "
                             "checkpoint stays, go on from it with --resume and a smaller --lr")
        if norm > recipe["grad_clip"]:
            torch.nn.utils.clip_grads_with_norm_(parameters, recipe["grad_clip"], norm)
        run.optimizer.param_groups[0]["lr"] = lr_at(recipe, step)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - ema_decay(recipe, step))

        done = step + 1
        stopping = done == steps or any_told_to_stop(run, stop)
        began = time.perf_counter()
        if step % args.log_every == 0 or stopping:
            speed = recipe["batch"] * (step - logged) / (began - clock)
            stats, mfu = mean_over_processes(run, stats), utilisation(run, alpha, speed)
            logged, clock = step, began
            bar.set_postfix(alpha=f"{alpha:.3g}", err=f"{stats['err']:.3g}", img_s=f"{speed:.4g}",
                            **({"mfu": f"{mfu:.0%}"} if mfu else {}))
            if write:
                write(step=step, **stats, alpha=alpha, lr=lr_at(recipe, step), grad_norm=norm.item(),
                      images_per_s=speed, mfu=mfu, memory_mb=memory_mb(run.device))
        if write and (stopping or time.monotonic() - saved > 60 * args.save_every):
            save(run, done)                             # before the pictures: nothing may cost a save
            saved = time.monotonic()
        report(run, step, alpha, write, evaluate, bar)
        clock += time.perf_counter() - began            # images_per_s is about training alone
        if stopping:
            return done
    return steps


def any_told_to_stop(run, stop):
    """Whether any process got a signal: all must stop at the same step."""
    if run.world == 1:
        return bool(stop)
    told = torch.tensor(float(bool(stop)), device=run.device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def memory_mb(device):
    """Peak memory of this process, on the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # kB, but bytes on macOS
    return peak / 2**(20 if sys.platform == "darwin" else 10)


def report(run, step, alpha, write, evaluate, bar):
    """Pictures, curves and measurements, where they are due after step `step`."""
    args, done, steps = run.args, step + 1, run.recipe["steps"]
    if write and args.conflict_every and step % args.conflict_every == 0:
        write(step=step, **conflict(run, alpha))
    if write and (done % (args.preview_every or max(1, steps // 10)) == 0 or done == steps):
        try:
            if run.decode:
                preview(run, done)
            curve(run)
        except (OSError, ValueError, RuntimeError) as error:        # a picture is not worth the run
            bar.write(f"no pictures after step {step}: {error}", file=sys.stderr)
    if evaluate and (done % args.eval_every == 0 or done == steps):
        values = evaluate()
        if write:
            write(step=step, **values)
            bar.write(f"step {step}: " + ", ".join(f"{k} {v if isinstance(v, tuple) else round(v, 4)}"
                                                   for k, v in values.items()))


def introduce(run, kind):
    """What runs here: network, data, recipe, cost."""
    about, recipe, config = run.dataset.describe(), dict(run.recipe), run.model.config
    # The half-life that is reached: in a short run the ramp ends below it.
    recipe["ema_half_life"] = min(recipe["ema_half_life"], round(recipe["ema_ramp"] * recipe["steps"], 3))
    run.say(f"{recipe['model']}, {sum(p.numel() for p in run.model.parameters()):,} parameters, on "
            f"{about['name']}, {about['count']:,} of {'x'.join(map(str, about['shape']))}; {run.device}, "
            f"{run.world} process{'es' * (run.world > 1)}, {kind} products")
    run.say(textwrap.fill("recipe: " + ", ".join(f"{k} {v}" for k, v in recipe.items()), 110))
    batch = recipe["batch"] * flops_of_forward(config) / 1e12
    costs = (f"{forwards_of_step(recipe, alpha) * batch:.3g} at α = {alpha}" for alpha in (1, 0.5, 0))
    run.say(f"TFLOPs a step: {', '.join(costs)}" + f"; resuming at step {run.start}" * (run.start > 0))


def main():
    args = parse_flags()
    rank, world, device = data.place(args.device)
    run = assemble(args, rank, world, device, print if rank == 0 else lambda *_: None)
    cuda, latents = device.type == "cuda", latents_of(run.dataset)
    run.decode = sample.decoder(latents, device) if cuda or not latents else None   # a CPU takes seconds
    if args.eval_every and not run.decode:
        raise ValueError("--eval-every on latents needs a GPU")
    if not args.eval_every and (args.eval_features or args.eval_samples or args.eval_ref):
        raise ValueError("--eval-features, --eval-samples and --eval-ref need --eval-every STEPS")

    # Only matrix products are rounded: weights, targets, residual stream, norms, times, loss are float32.
    kind = args.precision or ("bf16" if cuda else "fp32")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16")
    introduce(run, kind)
    if rank == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "recipe.json").write_text(json.dumps(run.recipe, indent=1) + "\n")
        for old in (run.out / "ckpt.pt", *run.out.glob("samples_*.png")):
            if run.start == 0:                          # --overwrite: the old run is gone now
                old.unlink(missing_ok=True)
    data.meet("nccl" if cuda else "gloo", minutes=60)
    starts = [run.start] * world
    if world > 1:
        dist.all_gather_object(starts, run.start)
    if set(starts) != {run.start}:
        raise ValueError(f"the processes would start at steps {starts}: all must see the same --out")
    evaluate = evaluation(run) if args.eval_every else None
    ddp_model = run.model
    if cuda if args.compile is None else args.compile:
        torch._dynamo.config.optimize_ddp = False       # the blocks are separate programs already
        for block in run.model.blocks:
            block.compile()
    if world > 1:
        ddp_model = DistributedDataParallel(run.model, device_ids=[device] if cuda else None,
                                            gradient_as_bucket_view=True)           # no second copy
    done, ckpt = train(run, ddp_model, autocast, evaluate), run.out / "ckpt.pt"
    if done < run.recipe["steps"]:
        run.say(f"stopped after step {done}, saved; --resume {ckpt} continues")
    elif rank == 0:
        pictures = run.decode is not None
        if pictures:
            labels = torch.arange(10) % run.dataset.classes
            sample.trajectory(run.ema, run.decode, labels, run.out / "trajectory.gif")
        print(f"done: {run.out}/ holds ckpt.pt, log.jsonl, curve.png"
              f"{', samples_*.png, trajectory.gif' * pictures}. Next: python sample.py --ckpt {ckpt} --nfe 1")


if __name__ == "__main__":
    data.run(main)
