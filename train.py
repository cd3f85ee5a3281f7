"""Train a DiT with the α-Flow objective, on one CPU or on many GPUs. The loop is train().

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
import signal
import textwrap
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

# A thread that has to wait tries again for a while, then sleeps. A shorter while makes training twice as fast
# where other programs use the cores, and no slower where none do. OpenMP reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from PIL import Image, ImageDraw
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
    "model": ("B/2", "recipe, which sets all else, or SIZE/PATCH, with the paper's; else what fits --data"),
    "data": ("imagenet256", "digits, mnist, cifar10, imagenet256 or a prepared folder"),
    "flip": (False, "mirror half of the pictures, or of the latents (the paper does not)"),
    "seed": (0, "of weights, batches and noise"),
    # the objective
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
    # the optimisation
    "steps": (400_000, "length of the run, in optimizer steps"),
    "batch": (256, "pictures a step, over all processes and micro-batches"),
    "lr": (1e-4, "Adam's learning rate after the warm-up"),
    "lr_decay": ("constant", "what follows the warm-up: constant, or linear to 0 at the end"),
    "lr_tail": (1.0, "share of the run, at its end, in which a linear rate falls"),
    "warmup": (10_000, "steps of linear learning-rate warm-up"),
    "beta1": (0.9, "Adam's β₁"),
    "beta2": (0.95, "Adam's β₂"),
    "grad_clip": (16.0, "largest gradient norm"),
    "ema_half_life": (6931.0, "of the averaged weights, in steps (6931 is a decay of 0.9999)"),
    "ema_ramp": (0.05, "the half-life at step k is at most this times k"),
}
PAPER = {name: default for name, (default, _) in SETTINGS.items()}

GUIDED = dict(steps=1_200_000, label_drop=0.1)
XL_GUIDED = dict(GUIDED, omega=0.2, kappa=0.92, t_max=0.75)
MEANFLOW = dict(alpha_schedule="constant", alpha_start=0.0)
# Ours, for short runs. With this window α is 0 after 36 % of the run, and MeanFlow gets the rest. With so
# large a c all rows weigh nearly alike: the digits came out better than with 1/(err + 0.001) for easy rows.
# shrink_c, because beside a fixed c of 0.5 the weight α/(err + c) of a jump would vanish with α.
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
    """The network of a recipe, "B/2" for "meanflow-B/2-cfg"; what is no recipe must be a network's name."""
    if model not in RECIPES:
        return model
    return model.removesuffix("+").removesuffix("-cfg").split("-")[-1]


def recipe_for(dataset):
    """The recipe that fits a data set when --model is not given."""
    channels, size, _ = dataset.shape
    if isinstance(dataset, data.Latents):
        return "B/2"
    if size <= 8:
        return "Na/2"
    if size <= 32:
        return "Ti/4" if channels == 1 else "Mi/2"
    return "Mi/4"


def parse_flags():
    """The command line. A setting that was not typed is None: the recipe has it, or the resumed run."""
    def pair(text):
        first, second = text.split(",")
        return float(first), float(second)

    p = data.Parser(description=f"Train a DiT with the α-Flow objective. Recipes: {', '.join(RECIPES)}.")
    group = p.add_argument_group("run and machine")
    group.add_argument("--out", help="folder of the run [out/DATA]")
    group.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    group.add_argument("--init-from", help="start from the EMA weights of another checkpoint")
    group.add_argument("--device", help="cuda or cpu [cuda if there]")
    group.add_argument("--accumulate", type=int, default=1, help="micro-batches a step, to save memory [1]")
    group.add_argument("--recompute", action="store_true", help="backward computes blocks again: less memory")
    group.add_argument("--precision", choices=("bf16", "fp32"), help="of products [bf16 on CUDA, else fp32]")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks [on CUDA]")
    group = p.add_argument_group("reports")
    group.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl [10]")
    group.add_argument("--preview-every", type=int, help="steps between pictures [a tenth of the run]")
    group.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints [10]")
    group.add_argument("--conflict-every", type=int, help="steps between looks at the conflict [never]")
    group.add_argument("--eval-every", type=int, help="steps between measurements by fid.py [never]")
    group.add_argument("--eval-samples", type=int, help="pictures for that [as many as in --data or 50,000]")
    group.add_argument("--eval-ref", help="real pictures or statistics, see fid.py --ref [the training data]")
    group = p.add_argument_group("settings (in brackets the paper's value; recipes differ)")
    group.add_argument("--alpha", type=float, help="constant: --alpha-schedule constant --alpha-start α")
    for name, (default, text) in SETTINGS.items():
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": pair if isinstance(default, tuple) else type(default)}
        group.add_argument("--" + name.replace("_", "-"), help=f"{text} [{default}]", **kind)
    return p.parse_args()


def resolve(args, saved=None):
    """(recipe, data set): the saved recipe of a resumed run or the one of --model, what was typed on top.
    ValueError for what makes no sense; the schedule and the times check what they are given.
    """
    given = {name: value for name, value in vars(args).items() if name in PAPER and value is not None}
    if saved:
        recipe = saved | given
    else:
        model = args.model or recipe_for(data.load(args.data or "digits"))
        own = PAPER | RECIPES.get(model, {}) | {"model": model}
        recipe = own | given
        # The recipe's warm-up was made for its own run, and can be longer than this one.
        if args.warmup is None and (args.steps or recipe["data"] != own["data"]):
            recipe["warmup"] = min(own["warmup"], recipe["steps"] // 10)
    if args.alpha_schedule == "step" and args.alpha_window is None and not saved:
        recipe["alpha_window"] = (0.5, 0.5)             # in the whole-run window the step would be at step 0
    if args.alpha is not None:
        if any(name.startswith("alpha") for name in given):
            raise ValueError("--alpha is a constant: give it without any other --alpha-... flag")
        recipe |= {"alpha_schedule": "constant", "alpha_start": args.alpha}

    for name in ("steps", "batch", "lr", "lr_tail", "grad_clip", "clip", "c"):
        if not recipe[name] > 0:
            raise ValueError(f"{name} must be more than 0, not {recipe[name]}")
    if recipe["lr_decay"] not in ("constant", "linear"):
        raise ValueError(f"lr_decay must be constant or linear, not {recipe['lr_decay']}")
    if recipe["alpha_schedule"] != "constant" and recipe["alpha_start"] == recipe["alpha_end"]:
        raise ValueError("alpha would not move: see --alpha-start and --alpha-end")
    alpha_of(recipe, 0)                                 # raises if the schedule makes no sense
    sample_times(1, recipe["fm_ratio"], recipe["time_mean"], recipe["time_std"])
    return recipe, data.load(recipe["data"], seed=recipe["seed"], flip=recipe["flip"])


# ---- what depends on the step alone ----------------------------------------------------------------

def alpha_of(recipe, step):
    """The α of a step, as the curriculum of the recipe has it."""
    names = ("schedule", "window", "start", "end", "gamma", "clamp")
    return alpha_at(step, recipe["steps"], *(recipe[f"alpha_{name}"] for name in names))


def lr_at(recipe, step):
    """Linear warm-up, then constant; with a decay, down to 0 over the last `lr_tail` of the run."""
    lr = recipe["lr"] * min(1, (step + 1) / max(1, recipe["warmup"]))
    if recipe["lr_decay"] == "constant":
        return lr
    return lr * min(1, (1 - step / recipe["steps"]) / recipe["lr_tail"])


def ema_decay(recipe, step):
    """Decay of the averaged weights: half-life min(ema_half_life, ema_ramp·step), to forget the start."""
    half_life = min(recipe["ema_half_life"], recipe["ema_ramp"] * step)
    return 0.5 ** (1 / half_life) if half_life > 0 else 0.0


def random_numbers(run, step):
    """Everything random in a step, for the whole global batch: a function of (seed, step) alone.

    Each process draws it all and keeps its own rows, so the numbers do not depend on how many there are.
    """
    recipe, B = run.recipe, run.recipe["batch"]
    key = 0, recipe["seed"], step       # and a stream: four integers, sample.py's keys have two or three

    def normal(stream):
        generator = data.generator(*key, stream, device=run.device)
        return torch.randn(B, *run.dataset.shape, generator=generator, device=run.device)

    host = data.generator(*key, 0)
    t, r = sample_times(B, recipe["fm_ratio"], recipe["time_mean"], recipe["time_std"], host)
    return {"t": t, "r": r, "drop": torch.rand(B, generator=host),                  # (B,), on the CPU
            "e": normal(1), "posterior": normal(2)}     # (B, C, H, W); posterior: see data.Latents.sample


# ---- a run: fresh, from another's weights, or as an interrupted one left it --------------------------

def assemble(args):
    """All that the loop works on. ValueError, in one line, for what does not fit together."""
    rank, world, device = data.place(args.device)
    say = tqdm.write if rank == 0 else lambda *_: None          # like print, beside a progress bar
    cuda, parts = device.type == "cuda", world * args.accumulate
    own = PAPER | RECIPES.get(args.model or "Na/2", {})         # for the folder's name alone, see resolve
    out = Path(args.out or f"out/{Path(args.data or own['data']).name}")
    path, ckpt = out / "ckpt.pt", None
    if path.exists():
        if not args.resume:
            raise ValueError(f"{out} already holds a run: give --resume or another --out, or delete it")
        ckpt = read_checkpoint(path)
        if "optimizer" not in ckpt:
            raise ValueError(f"{path} holds no training state to resume: see --init-from")
    recipe, dataset = resolve(args, ckpt and ckpt["config"]["recipe"])
    if args.log_every < 1 or args.accumulate < 1 or recipe["batch"] % parts:
        raise ValueError(f"--log-every and --accumulate are 1 or more, and --batch {recipe['batch']} is a "
                         f"multiple of {world} processes x --accumulate {args.accumulate}")

    channels, size, _ = dataset.shape
    torch.manual_seed(recipe["seed"])                   # the same first weights on all processes
    model = build(network_name(recipe["model"]), size, channels, dataset.classes)
    if args.init_from and not ckpt:
        init_from(model, args.init_from, say)
    model.to(device)                                    # drawn on the CPU: a GPU makes other numbers
    model.recompute = args.recompute
    ema = copy.deepcopy(model).requires_grad_(False)    # the averaged weights
    optimizer = torch.optim.Adam(model.parameters(), betas=(recipe["beta1"], recipe["beta2"]), fused=True)
    if ckpt:
        was = ckpt["config"]["recipe"]["model"], ckpt["config"]["model"]
        if was != (recipe["model"], vars(model.config)):
            raise ValueError(f"{path} is no run of {recipe['model']} on {recipe['data']}: see --init-from")
        if ckpt["step"] > recipe["steps"]:
            raise ValueError(f"that run has done {ckpt['step']} steps: give more --steps")
        model.load_state_dict(ckpt["net"])
        ema.load_state_dict(ckpt["ema"])
        state = ckpt["optimizer"]["state"]              # Adam's settings are those of this run and its device
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    latents = None
    if isinstance(dataset, data.Latents):               # what a checkpoint must hold, to decode samples
        latents = {"mean": dataset.mean, "std": dataset.std, "vae": dataset.about["vae"]}
    return SimpleNamespace(
        args=args, say=say, rank=rank, world=world, parts=parts, device=device, cuda=cuda,
        recipe=recipe, dataset=dataset, latents=latents, decode=sample.decoder(latents, device),
        out=out, start=ckpt["step"] if ckpt else 0, model=model, ema=ema, optimizer=optimizer,
        # Only products are rounded: weights, targets, residual stream, norms, times and loss are float32.
        precision=args.precision or ("bf16" if cuda else "fp32"))


def init_from(model, path, say):
    """Copy the weights wherever name and shape agree, and say where not; ValueError if most do not."""
    theirs, ours = read_checkpoint(path)["ema"], model.state_dict()
    fits = {k: w for k, w in theirs.items() if k in ours and w.shape == ours[k].shape}
    if len(fits) < len(ours) / 2:
        raise ValueError(f"--init-from {path}: {len(fits)} of {len(ours)} tensors fit this network")
    model.load_state_dict(fits, strict=False)
    say(f"init-from {path}: {len(fits)} of {len(ours)} tensors; new here: {sorted(ours.keys() - fits)}")


def open_folder(run):
    """Save the recipe, and cut the log to where the run goes on: a kill leaves lines of later steps."""
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "recipe.json").write_text(json.dumps(run.recipe, indent=1) + "\n")
    path, kept = run.out / "log.jsonl", ""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):         # the last one can be cut short
            if line.endswith("}\n") and json.loads(line)["step"] < run.start:
                kept += line
    with data.replacing(path) as file:
        file.write(kept.encode())


# ---- training --------------------------------------------------------------------------------------

def compile_blocks(run):
    """Compile each block, and call the objective at every kind of α, so that no program is made later.
    The compiler fits its first program to one number of rows. When it meets another, it makes one for all.
    """
    run.say("compiling the blocks, which can take some minutes (--no-compile does without)")
    torch._dynamo.config.optimize_ddp = False           # which would cut the blocks once more
    for block in run.model.blocks:
        block.compile()
    numbers = random_numbers(run, 0)
    try:
        for alpha in (1.0, 0.5, 0.0):
            backward(run, micro_batches(run, 0), numbers, alpha)
            # Two times can be equal by chance: here it is so in one row of each micro-batch.
            numbers["r"][-run.parts:] = numbers["t"][-run.parts:]
    except Exception as error:                          # which can raise nearly anything
        raise ValueError(f"the compiler failed, give --no-compile ({str(error)[:200]})") from error
    run.optimizer.zero_grad()                           # no step was made


def micro_batches(run, start):
    """All that is to be seen from step `start` on, in order: (rows, x, y), labels y on the CPU (see loss.py).

    rows: which ones of the global batch. With a stride, because the first ones are the cheap ones with r = t.
    """
    for step in range(start, run.recipe["steps"]):
        for first in range(run.rank, run.parts, run.world):
            x, y = run.dataset.batch(step, first, run.parts, run.recipe["batch"])
            x = x.pin_memory() if run.cuda else x
            yield slice(first, None, run.parts), x, y


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
    """The loop. Step k is a function of the state after step k-1 and of (seed, k): to resume is to go on.
    Returns how many steps are done: all, or fewer after a signal.
    """
    args, recipe, steps = run.args, run.recipe, run.recipe["steps"]
    loader, stop = data.prefetch(micro_batches(run, run.start)), []
    for number in (signal.SIGTERM, signal.SIGINT):      # the latter is Ctrl-C; Ctrl-\ ends a run at once
        signal.signal(number, lambda *_: stop.append(True))
    parameters, averages = list(run.model.parameters()), list(run.ema.parameters())
    done, seconds, saved = run.start, [], perf_counter()
    bar = tqdm(range(done, steps), initial=done, total=steps, disable=True if run.rank else None)
    for step in bar:
        began = perf_counter()
        alpha, lr = alpha_of(recipe, step), lr_at(recipe, step)
        stats = backward(run, loader, random_numbers(run, step), alpha)     # targets, loss, gradients
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not math.isfinite(norm + stats["loss"]):     # here the host waits for the device
            raise ValueError(f"loss or gradient of step {step} is not finite (alpha {alpha:g}): try a "
                             "smaller --lr, with --resume from the last checkpoint, if there is one")
        if norm > recipe["grad_clip"]:
            torch.nn.utils.clip_grads_with_norm_(parameters, recipe["grad_clip"], norm)
        run.optimizer.param_groups[0]["lr"] = lr        # warm-up and decay
        run.optimizer.step()                            # Adam
        run.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - ema_decay(recipe, step))        # the EMA
        seconds.append(perf_counter() - began)          # of training alone, without what follows

        done = step + 1
        # All must stop at the same step, and to ask the others costs time.
        asked = run.world == 1 or step % 10 == 0
        stopping = done == steps or asked and any(fid.of_all(torch.tensor(len(stop))))
        if step % args.log_every == 0 or stopping:
            mine = torch.stack(list(stats.values()))
            means = torch.stack(fid.of_all(mine)).mean(0)       # over processes
            row = dict(zip(stats, means.tolist()), alpha=alpha, lr=lr, grad_norm=norm.item())
            row = log(run, step, row | speed(run, alpha, seconds))
            bar.set_postfix(alpha=alpha, err=row["err"])
            seconds.clear()
        measuring = args.eval_every and done % args.eval_every == 0
        if run.rank == 0 and (stopping or measuring or perf_counter() - saved > 60 * args.save_every):
            save(run, done)                             # before what takes long or can fail
            saved = perf_counter()
        with torch.compiler.set_stance("force_eager"):              # pictures would need other programs
            report(run, step, alpha)
        if stopping:
            break
    return done


def save(run, done):
    """Written beside it, flushed, renamed: whenever we are killed, ckpt.pt is a whole checkpoint."""
    ckpt = {"format": FORMAT, "net": run.model.state_dict(), "ema": run.ema.state_dict(),
            "optimizer": run.optimizer.state_dict(), "step": done, "data": run.dataset.describe(),
            "config": {"model": vars(run.model.config), "recipe": run.recipe}, "latents": run.latents}
    try:
        with data.replacing(run.out / "ckpt.pt") as file:
            torch.save(ckpt, file)
    except (OSError, RuntimeError) as error:            # how torch says that the disk is full
        raise OSError(f"cannot save {run.out}/ckpt.pt, is the disk full? ({str(error)[:80]})") from None


# ---- what a step costs -----------------------------------------------------------------------------

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}    # bf16


def flops_of_forward(model):
    """FLOPs of one forward for one picture, as PyTorch counts them; a multiply-add is two."""
    z = model.pos_embed.new_zeros(1, model.config.channels, model.config.size, model.config.size)
    t = z.new_zeros(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(z, t, t, t.long())                        # attention as plain products: others it cannot count
    return counter.get_total_flops()


def forwards_of_step(recipe, alpha):
    """About what a step costs in forwards of its batch: prediction, backward included, target, guidance."""
    jumps = 1 - recipe["fm_ratio"]
    passes = 0 if alpha == 1 else 1 if alpha > 0 else 2     # for the target; du/dt: see Linear in model.py
    cost = 3 + passes * jumps
    if (recipe["omega"], recipe["kappa"]) != (1, 0):
        times = torch.distributions.Normal(recipe["time_mean"], recipe["time_std"])
        low, high = times.cdf(torch.tensor([recipe["t_min"], recipe["t_max"]]).logit()).tolist()
        cost += (1 - jumps) * (high - low)              # one pass without the label; t is one draw
        cost += 2 * jumps * (high**2 - low**2)          # and one with it; t is the later one of two draws
    return cost


def speed(run, alpha, seconds):
    """For the log: pictures a second; on a GPU peak memory, on a known one its utilisation (MFU), too."""
    images_per_s = run.recipe["batch"] * len(seconds) / sum(seconds)
    found = {"images_per_s": images_per_s}
    if run.cuda:
        found["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        for name, peak in PEAK_TFLOPS.items():
            if name in torch.cuda.get_device_name():
                flops = images_per_s * forwards_of_step(run.recipe, alpha) * run.flops
                found["mfu"] = flops / (peak * 1e12 * run.world)       # 1 would be nothing but products
    return found


# ---- reports ---------------------------------------------------------------------------------------

def log(run, step, values):
    """Add a line to log.jsonl, numbers with six digits, and return it."""
    line = {"step": step}
    for name, value in values.items():
        line[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    if run.rank == 0:
        with open(run.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def report(run, step, alpha):
    """Measurements and pictures that are due after step `step`: every so many steps, and at the end."""
    args, done, steps = run.args, step + 1, run.recipe["steps"]

    def due(every):
        return every and (done % every == 0 or done == steps)

    if run.rank == 0 and due(args.conflict_every):
        log(run, step, conflict(run, alpha))
    if run.rank == 0 and due(max(1, steps // 10) if args.preview_every is None else args.preview_every):
        try:
            curve(run)
            if run.cuda or not run.latents:     # to decode a latent takes a CPU seconds
                preview(run, done)
        except (OSError, ValueError, RuntimeError) as error:        # a picture is not worth the run
            run.say(f"no pictures after step {step}: {error}")
    if due(args.eval_every):
        run.say(f"measured: {log(run, step, run.evaluate())}")      # all processes take part


def preview(run, done):
    """The same noise through raw and averaged weights, in one and two evaluations; at the end a film."""
    labels, rows = torch.arange(10) % run.dataset.classes, range(10)
    pictures = [run.decode(sample.draw(network, labels, rows, sample.uniform_grid(nfe))).cpu()
                for network in (run.model, run.ema) for nfe in (1, 2)]
    names = ["raw, 1 NFE", "raw, 2 NFE", "EMA, 1 NFE", "EMA, 2 NFE"]
    sample.contact_sheet(torch.cat(pictures), 10, names).save(run.out / f"samples_{done:07d}.png")
    if done == run.recipe["steps"]:
        sample.trajectory(run.ema, run.decode, labels, run.out / "trajectory.gif")


PANELS = {      # of curve.png: numbers in log.jsonl, the first in black and the second in red; title
    ("alpha",): "alpha, the share of a jump that is walked along v",
    ("err_fm", "err_jump"): "err, its parts from rows with r = t (black) and with r < t (red)",
    ("tangent",): "tangent, the part of a target that can run away",
    ("cos_tfm_tc", "cos_tfm_tc_now"): "conflict, cosine of two gradients at alpha = 0 (black) and now (red)",
}


def curve(run, width=1600, height=300):
    """A picture of log.jsonl, one panel a message, the steps from left to right, a grey line at zero."""
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    panels = [names for names in PANELS if any(names[0] in row for row in rows)]
    image = Image.new("RGB", (width, height * len(panels)), "white")
    pen = ImageDraw.Draw(image)
    for i, names in enumerate(panels):
        values = sorted(row[name] for name in names for row in rows if name in row)
        low = min(0.0, values[0])
        high = max(0.0, values[len(values) * 99 // 100]) or 1.0         # rare spikes are cut off
        scale = (height - 80) / (high - low)
        zero = (i + 1) * height - 20 + scale * low
        title = f"{PANELS[names]}: {low:.2g} to {high:.2g}"
        pen.text((10, i * height + 10), title, "black", font_size=28)
        pen.line([(0, zero), (width, zero)], "#cccccc", width=2)
        for name, colour in zip(names, ("black", "#d62728")):
            points = [(width * row["step"] / run.recipe["steps"], zero - scale * min(row[name], high))
                      for row in rows if name in row]
            pen.line(points, colour, width=4)
    image.reduce(2).save(run.out / "curve.png")         # drawn at twice the size, for smooth lines


def conflict(run, alpha):
    """The paper's measurement at α = 0 and at the current α, on a fixed micro-batch and the raw weights."""
    recipe, numbers = run.recipe, random_numbers(run, 0)
    rows, x, y = next(micro_batches(run, 0))            # (b, C, H, W) and (b,), or moments (b, 2C, H, W)
    x = run.dataset.sample(x.to(run.device), numbers["posterior"][rows])
    # All rows jump: at r = t there is no conflict.
    t, r = sample_times(len(x), 0.0, recipe["time_mean"], recipe["time_std"], data.generator(0))
    options = {name: run.objective[name] for name in ("omega", "kappa", "t_min", "t_max", "null")}
    options |= {"e": numbers["e"][rows], "t": t, "r": r}
    found = gradient_conflict(run.model, x, y, 0.0, **options)
    if alpha > 0:
        for name, value in gradient_conflict(run.model, x, y, alpha, **options).items():
            found[f"{name}_now"] = value
    return found


def evaluation(run):
    """A function -> {"FID 1 NFE": ..., ...} of the EMA weights now, which all processes call together."""
    ref = run.args.eval_ref or run.recipe["data"]
    real, stats = fid.open_ref(ref)
    count = run.args.eval_samples or min(50_000, len(run.dataset))
    counts = run.dataset.describe()["label_counts"]     # labels are drawn as often as they occur there
    labels = sample.make_labels("data", count, run.dataset.classes, 0, counts)
    made = {nfe: fid.from_network(run.ema, run.decode, labels, sample.uniform_grid(nfe), "ode", 0, {})
            for nfe in (1, 2)}                          # drawn anew whenever they are measured
    extractors = fid.extractors_for(None, made[1].shape, run.device)
    fid.check_comparable(made[1], extractors, real, stats)
    theirs = stats or fid.measure(real, extractors)[0]

    def evaluate():
        values = {"pictures": count, "reference": ref}
        for nfe, pictures in made.items():
            found = fid.compare(extractors[0], *fid.measure(pictures, extractors), theirs)
            values |= {f"{title} {nfe} NFE": value for title, value in found.items()}
        return values
    return evaluate


def main():
    args = parse_flags()
    run = assemble(args)
    recipe, dataset, model = run.recipe, run.dataset, run.model
    run.flops = flops_of_forward(model)
    run.say(f"{recipe['model']}, {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{run.flops / 1e9:.3g} GFLOPs a forward; {len(dataset):,} of {dataset.name}, {dataset.shape}; "
            f"{run.world} x {run.device.type}, {run.precision} products; "
            f"steps {run.start} to {recipe['steps']}")
    # The half-life that is reached: in a short run the ramp ends below it.
    reached = min(recipe["ema_half_life"], round(recipe["ema_ramp"] * recipe["steps"], 3))
    shown = recipe | {"ema_half_life": reached}
    run.say(textwrap.fill("recipe: " + ", ".join(f"{name} {value}" for name, value in shown.items()), 110))

    data.meet("nccl" if run.cuda else "gloo", minutes=60)
    if any(start != run.start for start in fid.of_all(torch.tensor(run.start))):
        raise ValueError("the processes would start at different steps: all must see the same --out")
    if args.eval_every:
        run.evaluate = evaluation(run)

    names = ("omega", "kappa", "t_min", "t_max", "label_drop", "clip", "c", "shrink_c")
    run.objective = {name: recipe[name] for name in names} | {
        "null": model.config.classes,
        # The prediction goes through DDP, whose backward averages gradients; targets need none.
        "target_net": model,
        # The compiler would make one more program of each block for forward mode.
        "derivative": torch.compiler.set_stance("force_eager")(du_dt)}
    run.ddp_model = model
    if args.compile or args.compile is None and run.cuda:
        compile_blocks(run)                             # no other process need be there for it
    if run.world > 1:
        run.ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)        # no second copy
    if run.rank == 0:
        open_folder(run)                                 # what could be wrong with the command has been seen
    done = train(run)
    if done < recipe["steps"]:
        run.say(f"stopped after step {done}, saved; the same command with --resume goes on")
    else:
        run.say(f"done, in {run.out}/. Next: python sample.py --ckpt {run.out}/ckpt.pt --nfe 1")


if __name__ == "__main__":
    data.run(main)
