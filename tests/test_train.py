"""train.py: resumed, killed and divided runs, objectives, recipes, reports; mistakes at any command line.

Runs that are killed, that get signals or that are several are real processes. The others call main() here,
with a command line of their own, which saves two seconds each.
"""
import ast
import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections import namedtuple
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]
import data  # noqa: E402
import fid  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import build, read_checkpoint  # noqa: E402
from synthetic import synthetic_images, synthetic_state  # noqa: E402

SCRIPTS = {"train.py": train, "sample.py": sample, "fid.py": fid, "data.py": data}
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DEBUG")}

TINY = "--data digits --model Ti/4 --batch 16 --log-every 1 --device cpu".split()
SHORT = TINY + "--steps 6 --lr 1e-3 --warmup 2 --preview-every 6".split()
# Something of all that depends on step, seed or row: α is 1, then between, then 0, and labels are dropped.
REPORTS = "--log-every 1 --preview-every 12 --conflict-every 8 --eval-every 12 --eval-samples 50".split()
FULL = TINY + REPORTS + ("--steps 24 --lr 1e-3 --warmup 3 --flip --omega 0.5 --kappa 0.4 --t-max 0.9 "
                         "--label-drop 0.2").split()

# ---- running things ------------------------------------------------------------------------------

class Result(namedtuple("Result", "status out err")):
    def ok(self):
        assert self.status == 0 and "Traceback" not in self.err, self
        return self

    def one_line(self, script, *words):
        assert self.status == 2 and self.err.count("\n") == 1, self
        assert self.err.startswith(f"{script}: error: ") and all(word in self.err for word in words), self


def call(folder, script, *args):
    """What the command `python script args` in `folder` does, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *map(str, args)])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "DEBUG": ""}.items():
            patch.setenv(name, value)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                data.run(SCRIPTS[script].main)
        except SystemExit as end:
            status = end.code or 0
        finally:                                        # train.py has caught them for good
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Result(status, out.getvalue(), err.getvalue())


def start(folder, *args, **env):
    """train.py as a process; finish() waits for it."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return Popen(command, cwd=folder, env=ENV | env, text=True, stdout=PIPE, stderr=PIPE)


def finish(process):
    out, err = process.communicate(timeout=600)
    return Result(process.returncode, out, err)


def two_ranks():
    """The environments in which torchrun starts two processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    return [dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=port,
                 MASTER_ADDR="127.0.0.1") for rank in (0, 1)]


def start_two(folder, *args):
    return [start(folder, *args, **env) for env in two_ranks()]


def wait(process, condition):
    """Until the condition holds, the process has ended or ten minutes are over."""
    end = time.monotonic() + 600
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def lines(run):
    return (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").exists() else 0


def log(run):
    """The lines of log.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def flat(tree, path=""):
    """{path: leaf} of nested dicts, lists and tuples."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}
    return {path: tree}


def assert_same_run(a, b):
    """Two folders with one outcome, bit for bit: weights, averages, optimizer, step, recipe, log."""
    ours, theirs = flat(read_checkpoint(a / "ckpt.pt")), flat(read_checkpoint(b / "ckpt.pt"))
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in key for key in ours)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key], key
    assert log(a) == log(b)


def assert_close(a, b, rel):
    """Two logs that differ by rounding alone."""
    for ours, theirs in zip(a, b, strict=True):
        assert ours.pop("reference", None) == theirs.pop("reference", None)     # the one text
        assert ours == pytest.approx(theirs, rel=rel, abs=rel / 10)


def names(run):
    return {path.name for path in run.iterdir()}


def first_weights():
    """What a network of the runs here starts from."""
    torch.manual_seed(0)
    return build("Ti/4", 8, 1, 10).state_dict()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The uninterrupted run: by one process, with two micro-batches, and by two processes."""
    folder = tmp_path_factory.mktemp("full")
    two = start_two(folder, *FULL, "--out", "two")
    (folder / "one.txt").write_text(call(folder, "train.py", *FULL, "--out", "one").ok().out)
    call(folder, "train.py", *FULL, "--out", "micro", "--accumulate", 2).ok()
    (folder / "two.txt").write_text("".join(finish(process).ok().out for process in two))
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Six plain steps."""
    folder = tmp_path_factory.mktemp("short")
    call(folder, "train.py", *SHORT, "--out", "run").ok()
    return folder / "run"


# ---- stopped and resumed -------------------------------------------------------------------------

def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(full, tmp_path):
    process = start(tmp_path, *FULL, "--out", "run")
    wait(process, lambda: lines(tmp_path / "run") >= 3)
    process.send_signal(signal.SIGTERM)
    said = finish(process).ok().out.splitlines()[-1]
    done = read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    assert 3 <= done < 24 and f"stopped after step {done}" in said and "with --resume" in said
    with open(tmp_path / "run" / "log.jsonl", "a") as file:     # what a later kill would leave behind
        file.write(f'{{"step": {done}, "loss": 1.0}}\n{{"step": {done + 1}, "lo')
    call(tmp_path, "train.py", "--resume", "--out", "run", "--device", "cpu", *REPORTS).ok()
    assert_same_run(tmp_path / "run", full / "one")
    assert names(tmp_path / "run") == names(full / "one")


def test_ctrl_c_for_one_of_two_processes_stops_both_at_the_same_step(full, tmp_path):
    two = start_two(tmp_path, *FULL, "--out", "run")
    wait(two[0], lambda: lines(tmp_path / "run") >= 3)
    two[1].send_signal(signal.SIGINT)
    first, second = [finish(process).ok() for process in two]
    done = read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    assert 3 <= done < 24 and f"stopped after step {done}" in first.out and second.out == ""
    for process in start_two(tmp_path, "--resume", "--out", "run", "--device", "cpu", *REPORTS):
        finish(process).ok()
    assert_same_run(tmp_path / "run", full / "two")


def test_killed_at_any_moment_it_leaves_a_whole_checkpoint(short, tmp_path):
    command, run = [*SHORT, "--save-every", 0, "--resume", "--out", "run"], tmp_path / "run"
    for in_a_save in (True, False):
        process, old = start(tmp_path, *command), lines(run)
        wait(process, lambda: lines(run) > old and (run / "ckpt.pt").exists())
        wait(process, lambda: not in_a_save or [*run.glob(".ckpt.pt*.part")])
        process.kill()
        assert finish(process).err == "" and read_checkpoint(run / "ckpt.pt")["step"] >= 1
    call(tmp_path, "train.py", *command).ok()
    assert_same_run(run, short)
    assert names(run) == names(short), "a save that was killed has left its file"


def test_a_full_disk_costs_one_line_and_not_the_checkpoint(short, tmp_path):
    run, limits = shutil.copytree(short, tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    old = (run / "ckpt.pt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))       # no file can be larger
    try:
        result = call(tmp_path, "train.py", "--resume", "--out", "run", "--steps", 7, "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    result.one_line("train.py", "run/ckpt.pt")
    assert (run / "ckpt.pt").read_bytes() == old and names(run) == names(short)


def test_when_to_start_and_when_to_go_on(short, tmp_path):
    out = ["--out", "run"]
    assert "steps 0 to 6" in call(tmp_path, "train.py", *SHORT, *out, "--resume").ok().out
    assert_same_run(tmp_path / "run", short)
    before = contents(tmp_path)
    for flags, words in [([*SHORT, *out], "already holds a run"),
                         (["--resume", *out, "--model", "Ti/2"], "no run of Ti/2"),
                         (["--resume", *out, "--steps", 5], "more --steps")]:
        call(tmp_path, "train.py", *flags).one_line("train.py", words)
    assert contents(tmp_path) == before
    again = call(tmp_path, "train.py", "--resume", *out)                # no error: a scheduler may do it
    assert "steps 6 to 6" in again.ok().out and log(tmp_path / "run") == log(short)
    call(tmp_path, "train.py", "--resume", *out, "--steps", 8, "--log-every", 1).ok()
    assert [row["step"] for row in log(tmp_path / "run")] == list(range(8))
    (tmp_path / "run" / "ckpt.pt").unlink()
    call(tmp_path, "train.py", *SHORT, *out).ok()
    assert_same_run(tmp_path / "run", short)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(tmp_path):
    flags = [*SHORT, "--lr", 1e30, "--warmup", 0, "--save-every", 0, "--out", "run"]
    call(tmp_path, "train.py", *flags).one_line("train.py", "step 1", "not finite", "--resume")
    ckpt = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert ckpt["step"] == 1 and all(w.isfinite().all() for k in ("net", "ema") for w in ckpt[k].values())


def test_a_gradient_longer_than_its_bound_is_shortened(tmp_path):
    call(tmp_path, "train.py", *SHORT, "--grad-clip", 1e-12, "--out", "run").ok()       # far below Adam's eps
    assert read_checkpoint(tmp_path / "run/ckpt.pt")["net"]["final_layer.linear.weight"].abs().max() < 1e-5


# ---- divided -------------------------------------------------------------------------------------

@pytest.mark.parametrize("other", ["two", "micro"])
def test_the_division_of_the_batch_changes_nothing_but_rounding(full, other):
    logs = [[row for row in log(full / run) if "cos_tfm_tc" not in row] for run in ("one", other)]
    assert_close(*logs, rel=1e-3)                       # the cosines are of one micro-batch, of its own size
    assert_close(logs[0][:8], logs[1][:8], rel=2e-5)    # before the rounding has grown
    a, b = (read_checkpoint(full / run / "ckpt.pt") for run in ("one", other))
    for ours, theirs in ((a["net"], b["net"]), (a["ema"], b["ema"])):
        moved, apart = (sum((ours[k] - w[k]).square().sum() for k in w) for w in (first_weights(), theirs))
        assert moved > 0.01 and apart < 1e-4 * moved


def test_only_the_first_process_speaks_and_writes(full):
    assert names(full / "two") == names(full / "one")
    one, two = ((full / f"{run}.txt").read_text().splitlines() for run in ("one", "two"))
    assert len(one) == len(two) and one[1:6] == two[1:6] and "2 x cpu" in two[0]


# ---- objectives ----------------------------------------------------------------------------------

def run_log(folder, *flags):
    (folder / "run" / "ckpt.pt").unlink(missing_ok=True)
    call(folder, "train.py", *SHORT, *flags, "--out", "run").ok()
    return log(folder / "run")


@pytest.mark.parametrize("flags, alphas", [
    ("--alpha-schedule sigmoid", {1.0, 0.0}),                           # α-Flow
    ("--alpha 0", {0.0}),                                               # MeanFlow
    ("--alpha 0.5", {0.5}),                                             # Shortcut
    ("--alpha 1", {1.0}),                                               # trajectory flow matching
    ("--fm-ratio 1", {1.0, 0.0}),                                       # flow matching, whatever α
])
def test_the_five_objectives_by_their_flags(tmp_path, flags, alphas):
    rows = run_log(tmp_path, *flags.split())
    seen = [row["alpha"] for row in rows]
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == alphas or len(alphas) == 2 and alphas < set(seen)       # with some in between
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert (row["loss_jump"] == 0) == ("fm-ratio" in flags) and row["loss_fm"] > 0
        assert (row["tangent"] != 0) == (row["alpha"] < 1 and "fm-ratio" not in flags and row["step"] > 0)


def test_guidance_scales_the_velocity_and_drops_labels(tmp_path):
    """The first network is u = 0, so guidance leaves ω·v of the velocity in the rows it is for."""
    plain, guided, some = (run_log(tmp_path, "--steps", 1, "--alpha", 1, *flags)[0]["L_TFM"] for flags in (
        [], ["--omega", 0.2], ["--omega", 0.2, "--kappa", 0.92, "--t-max", 0.5]))
    assert guided == pytest.approx(0.04 * plain, rel=1e-4) and 1.1 * guided < some < 0.9 * plain
    errors = [run_log(tmp_path, "--steps", 5, "--kappa", kappa)[4]["err"] for kappa in (0, 0.5)]
    run_log(tmp_path, "--steps", 3, "--label-drop", 1)
    table = read_checkpoint(tmp_path / "run" / "ckpt.pt")["net"]["y_embedder.embedding_table.weight"]
    moved = (table - first_weights()["y_embedder.embedding_table.weight"]).abs().amax(1)
    assert errors[0] != errors[1] and moved[10] > 1e-4 and moved[:10].max() == 0    # the null label alone


@pytest.mark.parametrize("flags, rel", [(["--recompute"], 1e-5), (["--precision", "bf16"], 0.05)])
def test_less_memory_and_bf16_products_change_rounding_alone(short, tmp_path, flags, rel):
    rows = run_log(tmp_path, *flags)
    for name in ("step", "loss", "err", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in log(short)], rel=rel)
    assert (rows != log(short)) == ("bf16" in flags)                    # products that were rounded show


# ---- compiled ------------------------------------------------------------------------------------

GUIDED = "--omega 0.5 --kappa 0.4 --t-min 0.2 --t-max 0.9 --label-drop 0.3".split()
LINEAR = "--steps 10 --alpha-schedule linear --alpha-window 0,0.5".split()      # 1, four in between, 0
compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler here")
own_warning = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


@compiler
@own_warning
@pytest.mark.parametrize("flags", [["--fm-ratio", 0], [*GUIDED, "--recompute"]], ids=["plain", "guided"])
def test_compiled_blocks_compute_what_eager_ones_do_and_are_made_once(tmp_path, monkeypatch, flags):
    def with_ties(n, *args):                            # one jump less: not in step 0, but in step 4
        t, r = draw(n, *args)
        return t, torch.where((torch.arange(n) == n - 1) & (t[0] > t[n // 4]), t, r)

    draw = train.sample_times
    monkeypatch.setattr(train, "sample_times", with_ties)
    eager = run_log(tmp_path, *LINEAR, *flags)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run_log(tmp_path, *LINEAR, *flags, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2          # with gradient and without
    assert [row["alpha"] for row in compiled] == [1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0]
    assert_close(compiled, eager, rel=1e-3)


@compiler
def test_two_processes_with_compiled_blocks_compute_what_one_does(tmp_path):
    two = [start(tmp_path, *SHORT, *LINEAR, *GUIDED, "--out", "two", "--compile", TORCH_LOGS="recompiles",
                 **env) for env in two_ranks()]
    eager = run_log(tmp_path, *LINEAR, *GUIDED)
    for process in two:
        assert finish(process).ok().err.count("Recompiling function") == 1      # without gradient, once
    assert_close(log(tmp_path / "two"), eager, rel=1e-3)


@own_warning
def test_if_the_compiler_fails_one_line_says_how_to_do_without_it(tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise OSError("no space left")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: original(block, backend=broken))
    torch._dynamo.reset()
    result = call(tmp_path, "train.py", *SHORT, "--compile", "--out", "run")
    result.one_line("train.py", "the compiler failed", "no space left", "--no-compile")


# ---- recipes -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working folder in which data sets of noise are prepared."""
    desk, rng = tmp_path_factory.mktemp("desk"), np.random.default_rng(0)
    for name, C, size in (("mnist", 1, 32), ("cifar10", 3, 32), ("mine", 3, 64), ("birds", 3, 64),
                          ("small", 1, 8), ("imagenet256", 8, 4)):
        (desk / "data" / name).mkdir(parents=True)
        images = rng.integers(0, 256, (8, C, size, size))
        about = dict(vae="ema", stats=np.ones((2, 4, size, size)).tolist()) if C == 8 else {}
        data.publish(desk / "data" / name, np.arange(8) % 2, ["a", "b"],
                     images.astype(np.float16 if about else np.uint8), key="noise", **about)
    return desk


@pytest.fixture
def resolved(desk, monkeypatch):
    """The recipe that a command line of train.py stands for."""
    def resolve(*flags):
        monkeypatch.chdir(desk)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        return train.resolve(train.parse_flags())[0]
    return resolve


PUBLISHED = dict(
    data="imagenet256", flip=False, seed=0, alpha_schedule="sigmoid", alpha_window=(0, 1), alpha_start=1,
    alpha_end=0, alpha_gamma=25, alpha_clamp=0.005, fm_ratio=0.5, time_mean=-0.4, time_std=1, omega=1,
    kappa=0, t_min=0, t_max=1, label_drop=0, clip=4, c=1e-3, shrink_c=False, steps=400_000, batch=256,
    lr=1e-4, lr_decay="constant", lr_tail=1, warmup=10_000, beta1=0.9, beta2=0.95, grad_clip=16,
    ema_half_life=6931, ema_ramp=0.05)
XL = dict(steps=1_200_000, alpha_window=(0.5, 5 / 6), omega=0.2, kappa=0.92, t_max=0.75, label_drop=0.1)
ALPHA_0 = dict(alpha_schedule="constant", alpha_start=0)


@pytest.mark.parametrize("model, network, changes", [
    ("B/2", "B/2", {}),
    ("B/2-cfg", "B/2", dict(steps=1_200_000, fm_ratio=0.25, kappa=0.5, label_drop=0.1)),
    ("L/2", "L/2", XL | {"t_max": 0.8}),
    ("XL/2", "XL/2", XL),
    ("XL/2+", "XL/2", XL | ALPHA_0 | {"steps": 75_000, "batch": 1024}),
    ("meanflow-B/2", "B/2", ALPHA_0 | {"fm_ratio": 0.75}),
    ("meanflow-B/2-cfg", "B/2", ALPHA_0 | {"steps": 1_200_000, "kappa": 0.5, "label_drop": 0.1}),
    ("meanflow-XL/2-cfg", "XL/2", XL | ALPHA_0),
    ("fm-B/2", "B/2", {"fm_ratio": 1.0}),
])
def test_the_published_recipes(resolved, model, network, changes):
    recipe, expected = resolved("--model", model), {"model": model, **PUBLISHED, **changes}
    if recipe["alpha_schedule"] == "constant":
        expected["alpha_window"] = recipe["alpha_window"]               # means nothing there
    assert train.network_name(model) == network and recipe == expected


@pytest.mark.parametrize("flags, model", [
    ("", "Na/2"), ("--data digits", "Na/2"), ("--data mnist", "Ti/4"), ("--data cifar10", "Mi/2"),
    ("--data birds", "Mi/4"), ("--data data/mine", "Mi/4"), ("--data imagenet256", "B/2"),
    ("--data mine --model B/4", "B/4"),
])
def test_the_data_choose_the_recipe(resolved, flags, model):
    recipe = resolved(*flags.split())
    assert recipe["model"] == model and recipe["data"] == (flags.split() or ["", "digits"])[1]
    assert recipe["lr"] == (train.PAPER | train.RECIPES[model])["lr"]


@pytest.mark.parametrize("flags, warmup", [
    ("", 100), ("--steps 600", 60), ("--model XL/2+", 10_000),          # published recipes keep theirs
    ("--model B/2", 10_000), ("--model B/2 --steps 5000", 500),         # not made for so short a run
    ("--data birds --steps 500", 50), ("--data mine --steps 500", 50), ("--data birds", 1000),
    ("--data small --model Ti/2 --steps 200", 20),
    ("--data birds --steps 500 --warmup 300", 300),                     # typed is typed
])
def test_a_warmup_that_was_not_typed_is_at_most_a_tenth_of_a_run_it_was_not_made_for(resolved, flags, warmup):
    assert resolved(*flags.split())["warmup"] == warmup


@pytest.mark.parametrize("what, flags, values", [
    ("alpha", "--alpha 0.004", {0: 0.004, 50: 0.004, 99: 0.004}),       # exactly: no snap to 0 ...
    ("alpha", "--alpha-schedule constant --alpha-start 0.004", {0: 0.004, 50: 0.004, 99: 0.004}),
    ("alpha", "--alpha 0.999", {0: 0.999, 50: 0.999, 99: 0.999}),       # ... or 1
    ("alpha", "--alpha-schedule step --alpha-window 0.2,0.2", {0: 1, 19: 1, 20: 0, 99: 0}),
    ("alpha", "--alpha-schedule step", {0: 1, 49: 1, 50: 0, 99: 0}),    # in the middle, unless told otherwise
    ("lr", "--warmup 10 --lr-decay constant", {0: 0.2, 4: 1, 9: 2, 10: 2, 99: 2}),
    ("lr", "--warmup 0 --lr-decay linear --lr-tail 1", {0: 2, 25: 1.5, 50: 1, 75: 0.5}),
    ("lr", "--warmup 10 --lr-decay linear --lr-tail 0.2", {4: 1, 79: 2, 80: 2, 90: 1, 95: 0.5}),
])
def test_alpha_and_learning_rate_of_a_step(resolved, what, flags, values):
    recipe = resolved("--steps", 100, "--lr", 2.0, *flags.split())
    function = {"alpha": train.alpha_of, "lr": train.lr_at}[what]
    assert {k: function(recipe, k) for k in values} == pytest.approx(values, rel=1e-12)


def test_the_averaged_weights(full, tmp_path):
    paper = {"ema_half_life": 6931.0, "ema_ramp": 0.05}
    assert train.ema_decay(paper, 0) == 0.0                             # the first step copies
    assert train.ema_decay(paper, 1000) ** 50 == pytest.approx(0.5) == train.ema_decay(paper, 400_000) ** 6931
    recipe = json.loads((full / "one" / "recipe.json").read_text())
    printed = float(re.search(r"ema_half_life\s(\S+),", (full / "one.txt").read_text())[1])
    assert recipe["ema_half_life"] == 6931 and printed == pytest.approx(24 * 0.05)
    assert train.ema_decay(recipe, 24) ** printed == pytest.approx(0.5)         # it is what acts at the end
    flags, ckpts = ["--alpha", 0.5, "--lr-decay", "constant", "--ema-half-life", 1, "--ema-ramp", 99], []
    for steps in (1, 2):
        run = call(tmp_path, "train.py", *SHORT, *flags, "--steps", steps, "--out", steps)
        assert re.search(r"ema_half_life\s1.0,", run.ok().out)
        ckpts.append(read_checkpoint(tmp_path / str(steps) / "ckpt.pt"))
    for name, w in ckpts[1]["ema"].items():                             # after two steps: the mean of both
        torch.testing.assert_close(w, (ckpts[0]["net"][name] + ckpts[1]["net"][name]) / 2)


# ---- costs and reports ---------------------------------------------------------------------------

def test_what_a_step_costs():
    assert round(train.flops_of_forward(build("S/2", 32, 4, 1000)) / 2e9, 1) == 6.1      # DiT's paper: 6.06
    recipe = dict(fm_ratio=0.25, omega=1.0, kappa=0.0, time_mean=0.0, time_std=1.0, t_min=0.0, t_max=0.5)
    assert [train.forwards_of_step(recipe, alpha) for alpha in (1, 0.5, 0)] == [3, 3.75, 4.5]
    assert train.forwards_of_step(recipe | {"omega": 0.2}, 0) == 4.5 + 0.25 * 0.5 + 0.75 * 2 * 0.5**2


def test_the_log(full):
    rows = [json.loads(line) for line in (full / "one" / "log.jsonl").read_text().splitlines()]
    recipe = read_checkpoint(full / "one" / "ckpt.pt")["config"]["recipe"]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(24))
    for k, row in enumerate(steps):
        assert row["alpha"] == pytest.approx(train.alpha_of(recipe, k), rel=1e-5)
        assert row["lr"] == pytest.approx(train.lr_at(recipe, k), rel=1e-5)
        assert row["loss_fm"] + row["loss_jump"] == pytest.approx(row["loss"], rel=2e-5)
        assert row["images_per_s"] > 0 and row["grad_norm"] > 0 and "memory_mb" not in row
    cosines = {row["step"]: row for row in rows if "cos_tfm_tc" in row}
    assert list(cosines) == [7, 15, 23] and "cos_tfm_tc_now" in cosines[7] and len(cosines[23]) == 5
    assert all(-1 <= row["cos_tfm_tc"] <= 1 for row in cosines.values())
    distances = [row for row in rows if any("NFE" in name for name in row)]
    assert [row.pop("step") for row in distances] == [11, 23] and distances[0] != distances[1]
    for row in distances:
        assert (row.pop("pictures"), row.pop("reference")) == (50, "digits")
        assert [name[-5:] for name in row] == ["1 NFE", "2 NFE"] and all(0 < d < 1e3 for d in row.values())


def test_the_recipe_is_printed_and_kept_in_both_places(full, resolved):
    recipe, ckpt = resolved(*FULL), read_checkpoint(full / "one" / "ckpt.pt")
    assert ckpt["config"]["recipe"] == recipe and ckpt["data"] == data.load("digits").describe()
    assert json.loads((full / "one" / "recipe.json").read_text()) == json.loads(json.dumps(recipe))
    said = (full / "one.txt").read_text()
    for name, value in recipe.items():
        assert name == "ema_half_life" or f"{name} {value}" in " ".join(said.split()), name
    assert re.match(r"Ti/4.* 1,797 of digits, \(1, 8, 8\); 1 x cpu, fp32 products; steps 0 to 24\n", said)
    assert said.endswith("Next: python sample.py --ckpt one/ckpt.pt --nfe 1\n")


@pytest.mark.parametrize("name, width, height, frames", [
    ("samples_0000024.png", 300, 100, 1), ("curve.png", 600, 300, 1), ("trajectory.gif", 300, 60, 17)])
def test_the_pictures(full, name, width, height, frames):
    with Image.open(full / "one" / name) as picture:
        assert picture.width >= width and picture.height >= height
        assert getattr(picture, "n_frames", 1) == frames
        assert len(set(np.asarray(picture.convert("L")).flat)) > 10


# ---- other weights, other data -------------------------------------------------------------------

def test_training_starts_from_the_averaged_weights_of_another_run(short, desk, tmp_path):
    torch.manual_seed(1)
    theirs = {name: torch.randn_like(w) / 10 for name, w in first_weights().items()}
    released = {"autoencoder_mean": torch.zeros(1, 1, 1, 1), "autoencoder_var": torch.ones(1, 1, 1, 1)}
    torch.save({"net": {}, "ema": released | {f"model.{name}": w for name, w in theirs.items()}},
               tmp_path / "released.pt")
    torch.save({"format": "alphaflow-1", "ema": {"w": torch.zeros(3)}}, tmp_path / "none.pt")
    table, count = {"y_embedder.embedding_table.weight"}, len(theirs)
    for path, weights, dataset, new in [
            (short / "ckpt.pt", read_checkpoint(short / "ckpt.pt")["ema"], "digits", set()),
            (tmp_path / "released.pt", theirs, "digits", set()),
            (tmp_path / "released.pt", theirs, "small", table)]:        # two classes where there were ten
        said = call(desk, "train.py", *SHORT, "--data", dataset, "--batch", 4, "--steps", 1, "--lr", 1e-30,
                    "--init-from", path, "--out", tmp_path / "run").ok().out
        assert f"{count - len(new)} of {count} tensors; new here: {[*new]}\n" in said
        ckpt = read_checkpoint(tmp_path / "run" / "ckpt.pt")            # after a step that moves nothing
        (tmp_path / "run" / "ckpt.pt").unlink()
        for ours in (ckpt["net"], ckpt["ema"]):
            assert ckpt["step"] == 1 and new == {k for k, w in weights.items() if w.shape != ours[k].shape
                                                 or not torch.allclose(w, ours[k], 0, 1e-20)}
    call(tmp_path, "train.py", *SHORT, "--init-from", "none.pt", "--out", "a").one_line("train.py", "0 of 56")
    (tmp_path / "none.pt").rename(tmp_path / "ckpt.pt")
    call(tmp_path, "train.py", "--resume", "--out", ".").one_line("train.py", "no training state")


def test_own_pictures_from_a_folder_to_samples(tmp_path):
    (tmp_path / "src").mkdir()
    for k, picture in enumerate(synthetic_images("own pictures", 6, 40, 50)):
        Image.fromarray(picture).save(tmp_path / "src" / f"{k}.png")
    call(tmp_path, "data.py", "folder", "--src", "src", "--size", 8, "--out", "data/mine").ok()
    flags = ["--batch", 2, "--steps", 2, "--device", "cpu", "--log-every", 1, "--preview-every", 2]
    said = call(tmp_path, "train.py", "--data", "mine", *flags).ok().out
    assert said.startswith("Na/2, ") and "6 of mine, (3, 8, 8)" in said and names(tmp_path / "out/mine") == {
        "ckpt.pt", "log.jsonl", "recipe.json", "curve.png", "samples_0000002.png", "trajectory.gif"}

    with np.load(ROOT / "tests" / "golden" / "vae.npz") as file:
        shapes = json.loads(str(file["small_keys_json"]))
    vae, run = tmp_path / "vae.pt", tmp_path / "out" / "latents"
    torch.save({k: torch.from_numpy(w) for k, w in synthetic_state(shapes).items()}, vae)
    call(tmp_path, "data.py", "folder", "--src", "src", "--size", 32, "--out", "data/latents", "--latents",
         "--vae", vae, "--device", "cpu").ok()
    flags += ["--data", "latents", "--model", "Ti/2"]
    said, dataset = call(tmp_path, "train.py", *flags).ok().out, data.load(tmp_path / "data" / "latents")
    kept = read_checkpoint(run / "ckpt.pt")["latents"]
    assert torch.equal(kept["mean"], dataset.mean) and torch.equal(kept["std"], dataset.std)
    net, decode = sample.load(run / "ckpt.pt")
    x = sample.draw(net, torch.zeros(2, dtype=torch.long), range(2), [1, 0])
    with torch.no_grad():
        expected = data.find_vae(str(vae)).decode(x * dataset.std + dataset.mean)
    assert decode(x).shape == (2, 3, 32, 32) and torch.equal(decode(x), data.to_uint8(expected))
    call(tmp_path, "train.py", *flags, "--eval-every", 1, "--out", "b").one_line("train.py", "holds latents")
    assert len(log(run)) == 2 and names(run) == {"ckpt.pt", "log.jsonl", "recipe.json", "curve.png"}


# ---- mistakes ------------------------------------------------------------------------------------

WRONG = """         values that make no sense, and flags that would do nothing
--model meanflow-B/2 --data digits --alpha-schedule sigmoid | --alpha 0.5 --alpha-schedule sigmoid | --steps 0
--eval-every 1 --eval-samples 1 --steps 2 | --resume --out run --model Ti/2 | --alpha 0.5 --alpha-window 0,1
--alpha 0.5 --alpha-start 0.7 | --alpha-schedule exponential | --batch 100 --accumulate 3 | --alpha-window 0.5
--model Ti/3 --data digits | --model Q/2 --data digits | --alpha-schedule sigmod | --alpha-window 0.9,0.1
--model meanflow-B/4 | --lr-decay cosine | --out cut.pt/below | --init-from cut.pt | --precision fp16
--device toaster | --accumulate -1 | --accumulate 0 | --data nowhere | --fm-ratio 1.5 | --log-every 0 | digits
--resume --out run --alpha-end 1 --alpha-start 1 | --beta2 1
--time-std 0 | --alpha nan | --batch -4 | --seed -1 | --alpha 2 | --out run | --lr nan | --steps
"""


@pytest.mark.parametrize("flags", re.split(r" \| |\n", WRONG.strip())[1:])
def test_what_is_wrong_or_would_do_nothing_is_refused_in_one_line(short, tmp_path, flags):
    shutil.copytree(short, tmp_path / "run")
    (tmp_path / "cut.pt").write_bytes((short / "ckpt.pt").read_bytes()[:10**6])
    before = contents(tmp_path)
    more = [] if "--resume" in flags else ["--device", "cpu", "--batch", 8, "--steps", 1]
    call(tmp_path, "train.py", *more, *flags.split()).one_line("train.py")
    assert before.items() <= contents(tmp_path).items() and not list(tmp_path.rglob("*.pt.*"))
    assert "--eval" not in flags or read_checkpoint(tmp_path / "out" / "digits" / "ckpt.pt")["step"] == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_answers_help_a_bad_flag_and_a_missing_file(script, tmp_path):
    helped = call(tmp_path, script, "--help").ok()
    assert helped.out.startswith(f"usage: {script}") and helped.err == ""
    call(tmp_path, script, "--no-such-flag").one_line(script)
    missing = {"data.py": "folder --src nowhere --out x".split(), "train.py": ["--init-from", "nowhere"]}
    call(tmp_path, script, *missing.get(script, ["--ckpt", "nowhere"])).one_line(script, "nowhere")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["README.md", *SCRIPTS])
def test_every_flag_that_is_written_down_exists(file, tmp_path):
    text = (ROOT / file).read_text(encoding="utf-8").split('"""')       # docstring, or all of README.md
    text = re.sub(r"(?m)^.*(-m venv|pip install).*$", "", text[min(1, len(text) - 1)])
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]+)", text))
    known = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "shutdown_timeout",
             "index-url"}                                           # of torchrun and pip
    for command in [*SCRIPTS, "data.py mnist", "data.py folder", "data.py imagenet"]:
        known |= set(re.findall(r"--([a-z][a-z0-9-]+)", call(tmp_path, *command.split(), "--help").ok().out))
    assert named <= known, named - known


BELOW = {"loss.py": set(), "model.py": set(), "data.py": {"model"}, "sample.py": {"data", "model"},
         "fid.py": {"data", "model", "sample"}, "train.py": {"data", "fid", "loss", "model", "sample"}}


@pytest.mark.parametrize("file", BELOW)
def test_lines_fit_and_imports_point_one_way(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > 110] == []
    found = {name for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))
             for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])}
    assert found & {path.stem for path in ROOT.glob("*.py")} <= BELOW[file]
