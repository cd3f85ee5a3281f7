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
import copy
import json
import math
import os
import resource
import signal
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

# A thread that has to wait tries again for a while, then sleeps. A shorter while makes training twice as fast
# where other programs use the cores, and no slower where none do. OpenMP reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import fid
import sample
from loss import alpha_at, alpha_flow_loss, du_dt, gradient_conflict, sample_times
from model import FORMAT, build, read_checkpoint

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
# Ours, for short runs. With this window α is 0 after 36 % of the run, and MeanFlow gets the rest. With so
# large a c all rows weigh nearly alike: the digits came out better than with 1/(err + 0.001) for easy rows.
SMALL = dict(alpha_window=(0.0, 0.5), c=0.5, shrink_c=True, lr_decay="linear", lr_tail=0.6, beta2=0.99,
             warmup=100)
DIGITS = dict(SMALL, data="digits", steps=2750, batch=128, lr=3e-3, time_mean=-0.8, time_std=1.4)
COLOUR = dict(flip=True, steps=100_000, lr=4e-4, warmup=1000)

RECIPES = {                 # --model: what differs from the paper's common settings; a flag wins over both
    # small networks, in pixels
    "Na/2": DIGITS,
    "Ti/2": DIGITS,                                         # twice as wide
    "Ti/4": dict(SMALL, data="mnist", steps=10_500, batch=32, lr=2e-3, kappa=0.3, label_drop=0.1),
    "Mi/2": dict(COLOUR, data="cifar10"),
    "Mi/4": dict(COLOUR, data="PICTURES"),                  # your own: give --data
    # the paper's networks, in SD-VAE latents; all of L/2 and XL/2 have guidance trained in, and so has -cfg
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
        return "Na/2"
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
    g = p.add_argument_group("run and machine")
    g.add_argument("--out", help="folder of the run [out/DATA]")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    g.add_argument("--init-from", metavar="CKPT", help="start from another checkpoint's EMA weights")
    g.add_argument("--overwrite", action="store_true", help="replace the run that is already in --out")
    g.add_argument("--device", help="cuda or cpu [cuda if there]")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches a step, to save memory [1]")
    g.add_argument("--recompute", action="store_true", help="backward computes the blocks again: less memory")
    g.add_argument("--precision", choices=("bf16", "fp32"), help="of products [bf16 on CUDA, else fp32]")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks [on CUDA]")
    g = p.add_argument_group("reports")
    g.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl [10]")
    g.add_argument("--preview-every", type=int, help="steps between pictures [a tenth of the run]")
    g.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints [10]")
    g.add_argument("--conflict-every", type=int, help="steps between measurements of the gradients' cosines")
    g.add_argument("--eval-every", type=int, help="steps between measurements by fid.py [never]")
    g.add_argument("--eval-samples", type=int, help="pictures drawn for that [as many as real ones]")
    g.add_argument("--eval-ref", help="real pictures or statistics, see fid.py --ref [the training data]")
    return p.parse_args()


def flag(name):
    return "--" + name.replace("_", "-")


def resolve(args, saved=None):
    """(recipe, data set): a resumed run's own recipe or the model's, with the given flags on top.

    ValueError, in one line, for what makes no sense; the schedule and the times check what they are given.
    """
    name = args.data or saved and saved["data"]
    model = args.model or saved and saved["model"] or (recipe_for(data.load(name)) if name else "Na/2")
    own = RECIPES.get(model, {})
    if model not in RECIPES and network_name(model) != model:       # "meanflow-B/4" would train α-Flow
        raise ValueError(f"unknown recipe {model!r}: give one of {', '.join(RECIPES)}, or SIZE/PATCH")
    if saved and model != saved["model"]:
        raise ValueError(f"--resume continues a {saved['model']}, not a {model}; see --init-from")
    given = {k: v for k, v in vars(args).items() if k in PAPER and v is not None}       # what was typed
    recipe = {"model": model, **PAPER, **(saved or own), **given}       # the last one wins
    if args.alpha is not None:
        if moving := [k for k in given if k.startswith("alpha_")]:
            raise ValueError(f"--alpha is a constant, so {flag(moving[0])} would do nothing")
        recipe.update(alpha_schedule="constant", alpha_start=args.alpha)
    if args.alpha_schedule == "step" and args.alpha_window is None and not saved:
        recipe["alpha_window"] = (0.5, 0.5)             # in the whole-run window the step would be at step 0
    other_data = recipe["data"] != (PAPER | own)["data"]
    if "warmup" not in given and not saved and (other_data or "steps" in given and "warmup" not in own):
        recipe["warmup"] = min(recipe["warmup"], recipe["steps"] // 10)     # it may be longer than the run
    positive = ("steps", "batch", "lr", "lr_tail", "grad_clip", "ema_half_life", "clip", "c")
    wrong = [name for name in positive if not recipe[name] > 0]
    if recipe["lr_decay"] not in ("constant", "linear", "cosine"):
        wrong.append("lr_decay")
    if recipe["alpha_schedule"] != "constant" and recipe["alpha_start"] == recipe["alpha_end"]:
        wrong.append("alpha_start")                     # of a MeanFlow recipe: α would not move
    if wrong:
        raise ValueError(f"{flag(wrong[0])} cannot be {recipe[wrong[0]]}: see --help")
    alpha_of(recipe, 0)                                 # raises if the schedule makes no sense
    sample_times(1, recipe["fm_ratio"], recipe["time_mean"], recipe["time_std"])
    return recipe, data.load(recipe["data"], seed=recipe["seed"], flip=recipe["flip"])


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


def random_numbers(run, step):
    """Everything random in a step, for the whole global batch: a function of (seed, step) alone.

    Each process draws it all and keeps its own rows, so the numbers do not depend on how many there are.
    """
    recipe, B = run.recipe, run.recipe["batch"]
    key = 0, recipe["seed"], step                       # longer than sample.py's keys: other numbers

    def normal(stream):
        generator = data.generator(*key, stream, device=run.device)
        return torch.randn(B, *run.dataset.shape, generator=generator, device=run.device)

    host = data.generator(*key, 0)
    t, r = sample_times(B, recipe["fm_ratio"], recipe["time_mean"], recipe["time_std"], host)
    return {"t": t, "r": r, "drop": torch.rand(B, generator=host),                  # (B,), on the CPU
            "e": normal(1), "posterior": normal(2)}     # (B, C, H, W); posterior: see data.Latents.sample


# ---- a run: fresh, from another's weights, or as an interrupted one left it --------------------------

def open_run(args):
    """(folder, checkpoint or None): where the run lives, and what it continues from."""
    name = args.data or (PAPER | RECIPES.get(args.model or "Na/2", {}))["data"]
    out = Path(args.out or f"out/{Path(name).name}")
    path = out / "ckpt.pt"
    if path.exists() and not (args.resume or args.overwrite):
        raise ValueError(f"{out} already holds a run: give --resume, --overwrite or another --out")
    ckpt = read_checkpoint(path) if args.resume and path.exists() else None
    if ckpt and "optimizer" not in ckpt:
        raise ValueError(f"{path} holds no training state to resume; see --init-from")
    return out, ckpt


def assemble(args, rank, world, device):
    """All that the loop works on. ValueError, in one line, for what does not fit together."""
    say = tqdm.write if rank == 0 else lambda *_: None         # like print, beside a progress bar
    out, ckpt = open_run(args)
    recipe, dataset = resolve(args, ckpt and ckpt["config"]["recipe"])
    C, size, _ = dataset.shape
    if args.accumulate < 1 or args.log_every < 1 or recipe["batch"] % (world * args.accumulate):
        raise ValueError(f"--log-every and --accumulate are 1 or more, and --batch {recipe['batch']} is a "
                         f"multiple of {world} processes x --accumulate {args.accumulate}")
    torch.manual_seed(recipe["seed"])                   # the same first weights on all processes
    model = build(network_name(recipe["model"]), size, C, dataset.classes)
    if ckpt and ckpt["config"]["model"] != vars(model.config):
        raise ValueError(f"{recipe['data']} has other sizes or classes than the run that is to be resumed")
    if args.init_from and not ckpt:
        init_from(model, args.init_from, say)
    model.to(device)
    model.recompute = args.recompute
    ema = copy.deepcopy(model).requires_grad_(False)           # the averaged weights
    optimizer = torch.optim.Adam(model.parameters(), betas=(recipe["beta1"], recipe["beta2"]), fused=True)
    if ckpt:
        model.load_state_dict(ckpt["net"])
        ema.load_state_dict(ckpt["ema"])
        options = optimizer.state_dict()["param_groups"]            # this run's and this device's
        optimizer.load_state_dict(ckpt["optimizer"] | {"param_groups": options})
    start = ckpt["step"] if ckpt else 0
    if start > recipe["steps"]:
        raise ValueError(f"that run has done {start} steps: give more --steps")
    latents = None
    if isinstance(dataset, data.Latents):               # what a checkpoint must hold, to decode samples
        latents = {"mean": dataset.mean, "std": dataset.std, "vae": dataset.about["vae"]}
    cuda = device.type == "cuda"
    return SimpleNamespace(
        args=args, recipe=recipe, dataset=dataset, out=out, start=start, rank=rank, world=world, say=say,
        device=device, model=model, ema=ema, optimizer=optimizer, latents=latents,
        # Only what goes into and out of products is rounded: weights, targets, residual stream, norms, times
        # and loss are float32.
        precision=args.precision or ("bf16" if cuda else "fp32"),
        # To decode one latent takes a CPU seconds: no pictures then.
        decode=sample.decoder(latents, device) if cuda or not latents else None)


def init_from(model, path, say):
    """Copy the weights wherever name and shape agree, and say what did not; ValueError if most did not."""
    theirs, ours = read_checkpoint(path)["ema"], model.state_dict()
    fits = {k: w for k, w in theirs.items() if k in ours and w.shape == ours[k].shape}
    if len(fits) < len(ours) / 2:
        raise ValueError(f"--init-from {path}: {len(fits)} of {len(ours)} tensors fit this network")
    model.load_state_dict(fits, strict=False)
    new = ", ".join(sorted(ours.keys() - fits)) or "none"
    say(f"init-from {path}: {len(fits)} of {len(ours)} tensors; new here: {new}")


def save(run, finished):
    """Written beside it, flushed, renamed: whenever we are killed, ckpt.pt is a whole checkpoint."""
    ckpt = {"format": FORMAT, "net": run.model.state_dict(), "ema": run.ema.state_dict(),
            "optimizer": run.optimizer.state_dict(), "step": finished, "data": run.dataset.describe(),
            "config": {"model": vars(run.model.config), "recipe": run.recipe}, "latents": run.latents}
    try:
        with data.replacing(run.out / "ckpt.pt") as file:
            torch.save(ckpt, file)
    except (OSError, RuntimeError) as error:            # how torch says that the disk is full
        raise OSError(f"cannot save {run.out}/ckpt.pt, is the disk full? ({str(error)[:80]})") from None


# ---- what it costs ---------------------------------------------------------------------------------

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}    # bf16


def flops_of_forward(model):
    """FLOPs of one forward for one picture, as PyTorch counts them; a multiply-add is two."""
    z = model.pos_embed.new_zeros(1, model.config.channels, model.config.size, model.config.size)
    t = z.new_zeros(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(z, t, t, t.long())                        # attention as plain products: others it cannot count
    return counter.get_total_flops()


def forwards_of_step(recipe, alpha):
    """About what a step costs in forwards of its batch: prediction 3, backward included, and target."""
    jumps = 1 - recipe["fm_ratio"]
    target = 0 if alpha == 1 else jumps if alpha > 0 else 2 * jumps     # du/dt: see Linear in model.py
    if (recipe["omega"], recipe["kappa"]) == (1, 0):
        return 3 + target
    times = torch.distributions.Normal(recipe["time_mean"], recipe["time_std"])
    ends = torch.tensor([recipe["t_min"], recipe["t_max"]], dtype=torch.float64).clamp(0, 1).logit()
    low, high = times.cdf(ends).tolist()
    fm, jump = (1 - jumps) * (high - low), jumps * (high**2 - low**2)       # guided; t is the later of two
    return 3 + target + fm + 2 * jump                   # one pass without the label, one with it if r < t


def utilisation(run, alpha, images_per_s):
    """Share of the GPUs' bf16 peak that the counted FLOPs are; None where the peak is not known."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    for key, peak in PEAK_TFLOPS.items():
        if key in name:
            return images_per_s * forwards_of_step(run.recipe, alpha) * run.flops / (peak * 1e12 * run.world)


# ---- reports ---------------------------------------------------------------------------------------

def open_folder(run):
    """Prepare the folder of the run: a log that ends where the run goes on, nothing else of an older run."""
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "recipe.json").write_text(json.dumps(run.recipe, indent=1) + "\n")
    path, old = run.out / "log.jsonl", []
    if run.start == 0:                                  # with --overwrite there can be an older run
        for file in (*run.out.glob("ckpt.pt"), *run.out.glob("samples_*.png")):
            file.unlink()
    elif path.exists():
        old = [line for line in path.read_text().splitlines(keepends=True)      # the last can be cut short
               if line.endswith("}\n") and json.loads(line)["step"] < run.start]
    with data.replacing(path) as file:
        file.write("".join(old).encode())


def log(run, step, values):
    """Add a line to log.jsonl, and return what it says."""
    line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items() if v is not None}
    if run.rank == 0:
        with open(run.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
    return line


def preview(run, done):
    """The same noise through raw and averaged weights in one and two evaluations: four rows of pictures."""
    columns = 10 if run.dataset.shape[-1] > 8 else 20
    labels, rows = torch.arange(columns) % run.dataset.classes, range(columns)
    pictures = [run.decode(sample.draw(net, labels, rows, sample.uniform_grid(nfe))).cpu()
                for net in (run.model, run.ema) for nfe in (1, 2)]
    names = ["raw, 1 NFE", "raw, 2 NFE", "EMA, 1 NFE", "EMA, 2 NFE"]
    sample.contact_sheet(torch.cat(pictures), columns, names).save(run.out / f"samples_{done:07d}.png")


PANELS = [      # of curve.png: what one says, its lowest value, its numbers in log.jsonl, black and red
    ("alpha: the share of a jump that is walked along v; 0 is MeanFlow", 0, ["alpha"]),
    ("err: mean squared error of rows with r = t (black) and with r < t (red)", 0, ["err_fm", "err_jump"]),
    ("tangent: mean |delta du/dt|, the part of a target that can run away", 0, ["tangent"]),
    ("conflict: cosine of the gradients of L_TFM and L_TC at alpha = 0 (black) and at alpha now (red)", -1,
     ["cos_tfm_tc", "cos_tfm_tc_now"]),
]


def curve(run, width=1600, height=300):
    """A picture of log.jsonl, one panel a message, the steps from left to right."""
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    fm = run.recipe["fm_ratio"]
    share = {"err_fm": fm or 1, "err_jump": 1 - fm or 1}            # the log has means over the whole batch

    def line(name):
        return [(row["step"], row[name] / share.get(name, 1)) for row in rows if name in row]

    panels = [panel for panel in PANELS if line(panel[2][0])]
    image = Image.new("RGB", (width, height * len(panels)), "white")
    pen, font, left, right = ImageDraw.Draw(image), ImageFont.load_default(28), 130, width - 20
    for i, (title, low, names) in enumerate(panels):
        ceiling, floor = i * height + 60, (i + 1) * height - 24
        values = sorted(value for name in names for _, value in line(name))
        high = 1.0 if low < 0 else values[int(0.99 * (len(values) - 1))] or 1.0     # but for rare spikes
        pen.text((left, ceiling - 50), title, fill="black", font=font)
        for value, y in ((high, ceiling), (low, floor)):
            pen.line([(left, y), (right, y)], fill="#cccccc", width=2)
            pen.text((left - 12, y), f"{value:.2g}", fill="#888888", font=font, anchor="rm")
        for name, colour in zip(names, ("black", "#d62728")):
            scale = (floor - ceiling) / (high - low)
            at = [(left + (right - left) * step / run.recipe["steps"],
                   floor - scale * (min(max(value, low), high) - low)) for step, value in line(name)]
            pen.line(at, fill=colour, width=4)
    image.reduce(2).save(run.out / "curve.png")         # drawn at twice the size, for smooth lines


def evaluation(run):
    """A function -> {"FID 1 NFE": ..., ...} of the EMA weights now, which all processes call together."""
    if not run.decode:
        raise ValueError("--eval-every on latents needs a GPU")
    ref, counts = run.args.eval_ref, run.dataset.describe()["label_counts"]
    real, stats = fid.open_ref(ref) if ref else (fid.from_dataset(run.dataset), None)
    count = run.args.eval_samples or min(50_000, real.count if real else 50_000)
    labels = sample.make_labels("data", count, run.dataset.classes, 0, counts)
    made = {nfe: fid.from_network(run.ema, run.decode, labels, sample.uniform_grid(nfe), "ode", 0, {})
            for nfe in (1, 2)}                          # drawn anew whenever they are measured
    extractors = fid.extractors_for(None, made[1].shape, run.device)
    fid.check_comparable(made[1], extractors, real, stats)
    theirs = stats or fid.measure(real, extractors)[0]
    run.say(f"evaluation: {count} pictures of the EMA weights, labels as in the data, seed 0, against "
            f"{ref or run.dataset.name}; {extractors[0].name}")

    def evaluate():
        values = {}
        for nfe, pictures in made.items():
            found = fid.compare(extractors[0], *fid.measure(pictures, extractors), theirs)
            values |= {f"{title} {nfe} NFE": value for title, value in found.items()}
        return values
    return evaluate


def conflict(run, alpha):
    """The paper's measurement at α = 0 and at the current α, on a fixed micro-batch and the raw weights."""
    numbers, (rows, x, y) = random_numbers(run, 0), next(micro_batches(run, 0))
    x = run.dataset.sample(x.to(run.device), numbers["posterior"][rows])
    t, r = sample_times(len(x), 0.0, run.recipe["time_mean"], run.recipe["time_std"], data.generator(0))
    options = {k: run.objective[k] for k in ("omega", "kappa", "t_min", "t_max", "null")}
    options.update(e=numbers["e"][rows], t=t, r=r)
    now = gradient_conflict(run.model, x, y, alpha, **options) if alpha > 0 else {}
    return gradient_conflict(run.model, x, y, 0.0, **options) | {f"{k}_now": v for k, v in now.items()}


# ---- compiled blocks -------------------------------------------------------------------------------

def compile_blocks(run):
    """Compile each block, and call the objective at every kind of α, so that no program is made later.

    The compiler fits its first program to one number of rows. When it meets another number, it makes a
    program for all numbers: so it meets one here. If it fails on one process, all go on without it.
    """
    run.say("compiling the blocks, which can take some minutes (--no-compile does without)")
    torch._dynamo.config.optimize_ddp = False           # which would cut the blocks once more
    for block in run.model.blocks:
        block.compile()
    numbers, n, problem = random_numbers(run, 0), run.world * run.args.accumulate, ""
    try:
        for alpha in (1.0, 0.5, 0.5, 0.0):
            backward(run, micro_batches(run, 0), numbers, alpha)
            numbers["r"][-n:] = numbers["t"][-n:]       # two times can be equal by chance: one jump fewer
    except Exception as error:                          # which can raise nearly anything
        problem = repr(error)[:200]
    run.optimizer.zero_grad()                           # no step was made
    if any(fid.of_all(torch.tensor([len(problem)]))):
        torch.compiler.set_stance("force_eager")
        run.say(f"the compiler failed, so the run goes on without it ({problem or 'in another process'})")


# ---- training --------------------------------------------------------------------------------------

def micro_batches(run, start):
    """All that is to be seen from step `start` on, in order: (rows, x, y), labels y on the CPU (see loss.py).

    rows: which ones of the global batch. With a stride, because the first ones are the cheap ones with r = t.
    """
    parts = run.world * run.args.accumulate
    for step in range(start, run.recipe["steps"]):
        for first in range(run.rank, parts, run.world):
            x, y = run.dataset.batch(step, first, parts, run.recipe["batch"])
            yield slice(first, None, parts), x.pin_memory() if run.device.type == "cuda" else x, y


def backward(run, loader, numbers, alpha):
    """Add up the gradients of one step over its micro-batches. Returns the mean statistics."""
    total, n = {}, run.args.accumulate
    for m in range(n):
        rows, x, y = next(loader)                       # (b, C, H, W) and (b,), or moments (b, 2C, H, W)
        mine = {name: values[rows] for name, values in numbers.items()}
        x = run.dataset.sample(x.to(run.device, non_blocking=True), mine.pop("posterior"))  # (b, C, H, W)
        run.ddp_model.require_backward_grad_sync = m == n - 1       # DDP averages once
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss, stats = alpha_flow_loss(run.ddp_model, x, y, alpha, **mine, **run.objective)
        (loss / n).backward()
        for name, value in {"loss": loss.detach(), **stats}.items():
            total[name] = total.get(name, 0) + value / n
    return total


def train(run):
    """The loop. Step k is a function of the state after step k-1 and of (seed, k): to resume is to go on."""
    args, recipe, steps = run.args, run.recipe, run.recipe["steps"]
    loader, stop = data.prefetch(micro_batches(run, run.start)), []
    for number in (signal.SIGTERM, signal.SIGINT):      # the latter is Ctrl-C; Ctrl-\ ends a run at once
        signal.signal(number, lambda *_: stop.append(True))
    parameters, averages = list(run.model.parameters()), list(run.ema.parameters())
    logged, clock, saved = run.start - 1, time.perf_counter(), time.perf_counter()
    bar = tqdm(range(run.start, steps), initial=run.start, total=steps, disable=True if run.rank else None)
    for step in bar:
        alpha = alpha_of(recipe, step)
        stats = backward(run, loader, random_numbers(run, step), alpha)     # targets, loss, gradients
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not math.isfinite(norm + stats["loss"]):     # here the host waits for the device
            raise ValueError(f"loss or gradient of step {step} is not finite (alpha {alpha:g}): the last "
                             "checkpoint stays, go on from it with --resume and a smaller --lr")
        if norm > recipe["grad_clip"]:
            torch.nn.utils.clip_grads_with_norm_(parameters, recipe["grad_clip"], norm)
        run.optimizer.param_groups[0]["lr"] = lr_at(recipe, step)      # warm-up and decay
        run.optimizer.step()                            # Adam
        run.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - ema_decay(recipe, step))        # the EMA

        done = step + 1
        # All must stop at the same step, and to ask the others costs time.
        asked = run.world == 1 or step % 10 == 0
        stopping = done == steps or asked and any(fid.of_all(torch.tensor([len(stop)])))
        measuring = args.eval_every and (done % args.eval_every == 0 or done == steps)
        began = time.perf_counter()
        if step % args.log_every == 0 or stopping:
            speed = recipe["batch"] * (step - logged) / (began - clock)
            means = torch.stack(fid.of_all(torch.stack(list(stats.values())))).mean(0)      # over processes
            row = dict(zip(stats, means.tolist()), alpha=alpha, lr=lr_at(recipe, step), grad_norm=norm.item(),
                       images_per_s=speed, mfu=utilisation(run, alpha, speed),
                       memory_mb=memory_mb(run.device))
            log(run, step, row)
            bar.set_postfix(alpha=alpha, err=row["err"], images_per_s=speed, mfu=row["mfu"])
            logged, clock = step, began
        if run.rank == 0 and (stopping or measuring or began - saved > 60 * args.save_every):
            save(run, done)                             # before what takes long or can fail
            saved = began
        with torch.compiler.set_stance("force_eager"):              # pictures would need other programs
            report(run, step, alpha, measuring)
        clock += time.perf_counter() - began            # images_per_s is about training alone
        if stopping:
            return done
    return steps


def memory_mb(device):
    """Peak memory of this process, on the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # kB, but bytes on macOS
    return peak / 2**(20 if sys.platform == "darwin" else 10)


def report(run, step, alpha, measuring):
    """Pictures, curves and measurements, where they are due after step `step`."""
    args, done, steps, first = run.args, step + 1, run.recipe["steps"], run.rank == 0
    if first and args.conflict_every and step % args.conflict_every == 0:
        log(run, step, conflict(run, alpha))
    if first and (done % (args.preview_every or max(1, steps // 10)) == 0 or done == steps):
        try:
            if run.decode:
                preview(run, done)
            curve(run)
        except (OSError, ValueError, RuntimeError) as error:        # a picture is not worth the run
            run.say(f"no pictures after step {step}: {error}")
    if measuring:
        values = log(run, step, run.evaluate())         # all processes take part
        run.say(f"step {step}: {values}")


def introduce(run):
    """Say what runs here: network, data, recipe, cost."""
    recipe, dataset, run.flops = dict(run.recipe), run.dataset, flops_of_forward(run.model)
    # The half-life that is reached: in a short run the ramp ends below it.
    recipe["ema_half_life"] = min(recipe["ema_half_life"], round(recipe["ema_ramp"] * recipe["steps"], 3))
    run.say(f"{recipe['model']}, {sum(p.numel() for p in run.model.parameters()):,} parameters, "
            f"{run.flops / 1e9:.3g} GFLOPs a forward, on {dataset.name}, {len(dataset):,} of "
            f"{'x'.join(map(str, dataset.shape))}; {run.device}, {run.world} "
            f"process{'es' * (run.world > 1)}, {run.precision} products")
    run.say(textwrap.fill("recipe: " + ", ".join(f"{k} {v}" for k, v in recipe.items()), 110))
    if run.args.resume:
        run.say(f"resuming at step {run.start}" if run.start else "no run to resume yet: starting one")


def main():
    args = parse_flags()
    run = assemble(args, *data.place(args.device))
    introduce(run)
    cuda = run.device.type == "cuda"
    data.meet("nccl" if cuda else "gloo", minutes=60)
    if any(start != run.start for start in fid.of_all(torch.tensor([run.start]))):
        raise ValueError("the processes would start at different steps: all must see the same --out")
    if args.eval_every:
        run.evaluate = evaluation(run)

    names = ("omega", "kappa", "t_min", "t_max", "label_drop", "clip", "c", "shrink_c")
    # The prediction goes through DDP, whose backward averages gradients; targets need none and do without.
    run.objective = {name: run.recipe[name] for name in names} | dict(
        null=run.model.config.classes, target_net=run.model,
        # The compiler would make one more program of each block for forward mode.
        derivative=torch.compiler.set_stance("force_eager")(du_dt))
    run.ddp_model = run.model                           # no other process need be there to compile
    if cuda if args.compile is None else args.compile:
        compile_blocks(run)
    if run.world > 1:
        run.ddp_model = DistributedDataParallel(run.model, gradient_as_bucket_view=True)    # no second copy
    if run.rank == 0:
        open_folder(run)                                # what could be wrong with the command has been seen
    done = train(run)
    if done < run.recipe["steps"]:
        run.say(f"stopped after step {done}, saved; the same command with --resume goes on")
        return
    if run.rank == 0 and run.decode:
        labels = torch.arange(10) % run.dataset.classes
        sample.trajectory(run.ema, run.decode, labels, run.out / "trajectory.gif")
    run.say(f"done: the run is in {run.out}/. Next: python sample.py --ckpt {run.out}/ckpt.pt --nfe 1")


if __name__ == "__main__":
    data.run(main)
