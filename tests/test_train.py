"""
train.py: runs that are resumed, killed, signalled and divided over processes; recipes, noise, reports.

    python -m pytest -q tests/test_train.py

The runs are real processes. A Lab imports torch once and forks for each of them, which saves seconds a
run; exit status, signals and stderr are as if python had started it. One run goes through torchrun itself.
"""
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from loss import du_dt  # noqa: E402
from model import build  # noqa: E402

CPU = torch.device("cpu")
ENV = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
       "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Ten steps see all of the objective: α is 1 up to step 2, between 0 and 1 up to step 7, then 0.
TEN = ["--data", "digits", "--model", "Ti/8", "--batch", "16", "--steps", "10", "--lr", "1e-3",
       "--warmup", "2", "--device", "cpu", "--log-every", "1", "--preview-every", "5", "--save-every", "5"]
SHORT = [*TEN, "--steps", "3", "--preview-every", "3"]

# ---- processes -----------------------------------------------------------------------------------

SERVER = """
import gc, json, os, runpy, signal, sys, traceback
sys.path.insert(0, sys.argv[1])
import data, fid, loss, train, torch._dynamo        # the last one is what torch.optim imports late
gc.freeze()
for line in sys.stdin:
    ask = json.loads(line)
    if "wait" in ask:
        print(os.waitstatus_to_exitcode(os.waitpid(ask["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    os._exit(0)
signal.alarm(60)                                        # nothing here may hang
for fd, name, flags in ((0, os.devnull, 0), (1, ask["out"], os.O_WRONLY), (2, ask["err"], os.O_WRONLY)):
    os.dup2(os.open(name, flags), fd)
os.chdir(ask["cwd"])
os.environ.update(ask["env"])
sys.argv = [ask["program"], *ask["args"]]
status = 0
try:
    if ask["hook"]:
        exec(ask["hook"])
        data.run(sys.modules[os.path.basename(ask["program"])[:-3]].main)
    else:
        runpy.run_path(ask["program"], run_name="__main__")
except SystemExit as end:                               # what python does with it
    status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush(), sys.stderr.flush()
os._exit(status)                                        # to take the whole interpreter down costs a second
"""

# What a test may do to a run from inside, as code that is executed before main().
KEEP = """
import shutil
whole = train.save
def save(path, state):
    whole(path, state)
    if path.name == "ckpt.pt":
        shutil.copy(path, path.with_name("step%d.pt" % state["step"]))
train.save = save
"""
COMPARE = """
import torch
loop = train.train
def compared(run):
    finished = loop(run)
    mine = torch.cat([p.detach().flatten() for net in (run.net, run.ema) for p in net.parameters()])
    everyone = [torch.empty_like(mine) for _ in range(run.world)]
    torch.distributed.all_gather(everyone, mine)
    (run.out / ("rank%d.txt" % run.rank)).write_text(str(all(torch.equal(mine, other) for other in everyone)))
    return finished
train.train = compared
"""
BARE = """
import sample, train
train.preview = train.curve = sample.trajectory = lambda *args: None
"""
SLOW = """
import time
quick = train.draw
def draw(*args):
    time.sleep(0.25)
    return quick(*args)
train.draw = draw
"""


@dataclasses.dataclass
class Result:
    status: int
    out: str
    err: str

    def ok(self):
        assert self.status == 0 and "Traceback" not in self.err, self
        return self

    def one_line(self, *words, status=2):
        assert self.status == status and len(self.err.splitlines()) == 1 and self.err.endswith("\n"), self
        assert all(word in self.err for word in words), (words, self.err)
        return self


class Lab:
    """Starts programs as forks of a process that has imported everything already."""

    def __init__(self, folder):
        self.folder, self.count, self.running = folder, 0, set()
        self.server = subprocess.Popen([sys.executable, "-c", SERVER, str(ROOT)], env=ENV, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **what):
        self.server.stdin.write(json.dumps(what) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *args, program="train.py", cwd=None, hook="", **env):
        """The pid; finish() waits for it."""
        self.count += 1
        files = [self.folder / f"{self.count}.{kind}" for kind in ("out", "err")]
        for file in files:
            file.touch()
        pid = self.ask(args=[str(a) for a in args], program=str(ROOT / program), hook=hook, env=env,
                       cwd=str(cwd or self.folder), out=str(files[0]), err=str(files[1]))
        self.running.add(pid)
        return pid, files

    def finish(self, process):
        pid, files = process
        self.running.discard(pid)
        return Result(self.ask(wait=pid), *(file.read_text() for file in files))

    def run(self, *args, **options):
        return self.finish(self.start(*args, **options))

    def run_all(self, *commands, **options):
        """Side by side."""
        return [self.finish(process) for process in [self.start(*args, **options) for args in commands]]

    def start_ranks(self, *args, world=2, **options):
        """What torchrun does: the same command `world` times with these variables."""
        port = str(free_port())
        return [self.start(*args, **options, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(world)]


    def close(self):
        for pid in self.running:                        # what a test that failed has left behind
            os.kill(pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait(60)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def ten(lab, tmp_path_factory):
    """Ten uninterrupted steps: in one process, in one with two micro-batches, in two by torchrun."""
    folder = tmp_path_factory.mktemp("ten")
    driver = folder / "driver.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport data, train\n{KEEP}{COMPARE}\n"
                      "data.run(train.main)\n")
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}",
         str(driver), *TEN, "--out", str(folder / "two")], env=ENV, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    one = lab.run(*TEN, "--out", folder / "one", hook=KEEP).ok()
    lab.run(*TEN, "--accumulate", 2, "--out", folder / "micro").ok()
    out, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode == 0 and "2 processes" in out, err
    return SimpleNamespace(one=folder / "one", two=folder / "two", micro=folder / "micro", said=one.out)


def log(folder):
    """The log without what a clock or the machine's memory decides."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = ("images_per_s", "memory_mb", "waiting")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def flat(tree, path=""):
    """{path: leaf} of nested dicts, lists and tuples."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}
    return {path: tree}


def assert_same_run(a, b):
    """Two folders with one outcome, bit for bit: weights, averages, optimizer, step, recipe, log."""
    a_state, b_state = flat(sample.read(a / "ckpt.pt")), flat(sample.read(b / "ckpt.pt"))
    assert a_state.keys() == b_state.keys() and any("optimizer" in key for key in a_state)
    for key, value in a_state.items():
        same = torch.equal(value, b_state[key]) if torch.is_tensor(value) else value == b_state[key]
        assert same, key
    assert log(a) == log(b)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def lines(folder):
    path = folder / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- resume --------------------------------------------------------------------------------------

def test_five_and_five_steps_are_ten(lab, ten, tmp_path):
    before = (ten.one / "step5.pt").read_bytes()
    shutil.copy(ten.one / "log.jsonl", tmp_path / "log.jsonl")      # the lines from step 5 on are done again
    result = lab.run("--resume", ten.one / "step5.pt", "--out", tmp_path, "--log-every", 1, "--device", "cpu")
    assert "resuming at step 5 of 10" in result.ok().out
    assert_same_run(tmp_path, ten.one)
    assert (ten.one / "step5.pt").read_bytes() == before


def test_five_and_five_steps_are_ten_on_two_processes(lab, ten, tmp_path):
    shutil.copy(ten.two / "step5.pt", tmp_path / "ckpt.pt")
    shutil.copy(ten.two / "log.jsonl", tmp_path / "log.jsonl")
    ranks = lab.start_ranks("--resume", "--out", tmp_path, "--log-every", 1, "--device", "cpu")
    for rank in ranks:
        lab.finish(rank).ok()
    assert_same_run(tmp_path, ten.two)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(lab, ten, tmp_path, number):
    process = lab.start(*TEN, "--out", tmp_path, hook=SLOW)
    until(lambda: lines(tmp_path) >= 3)
    os.kill(process[0], number)
    began = time.monotonic()
    said = lab.finish(process).ok().out.splitlines()[-1]
    assert time.monotonic() - began < 5
    done = sample.read(tmp_path / "ckpt.pt")["step"]
    assert 3 <= done <= 5 and f"stopped after step {done} of 10" in said        # within a step of the signal
    command = said.partition("Continue with: python train.py ")[2].split()
    assert command == ["--resume", str(tmp_path / "ckpt.pt")]
    lab.run(*command, "--log-every", 1).ok()
    assert_same_run(tmp_path, ten.one)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(lab, ten, tmp_path):
    ranks = lab.start_ranks(*TEN, "--out", tmp_path, hook=SLOW)
    until(lambda: lines(tmp_path) >= 3)
    os.kill(ranks[1][0], signal.SIGTERM)
    said = [lab.finish(rank).ok().out for rank in ranks]
    assert "stopped after step" in said[0] and said[1] == ""
    assert 3 <= sample.read(tmp_path / "ckpt.pt")["step"] <= 6
    for rank in lab.start_ranks("--resume", "auto", "--out", tmp_path, "--log-every", 1):
        lab.finish(rank).ok()
    assert_same_run(tmp_path, ten.two)


def test_killed_again_and_again_it_always_leaves_a_whole_checkpoint(lab, ten, tmp_path):
    command = [*TEN, "--save-every", 1, "--resume", "auto", "--out", tmp_path]
    moments = random.Random(0)
    for _ in range(8):
        process, before = lab.start(*command), lines(tmp_path)
        until(lambda: lines(tmp_path) != before or (tmp_path / "trajectory.gif").exists())
        time.sleep(moments.uniform(0, 0.15))
        os.kill(process[0], signal.SIGKILL)
        lab.finish(process)
        if (tmp_path / "ckpt.pt").exists():
            sample.load(tmp_path / "ckpt.pt")
    lab.run(*command).ok()
    assert_same_run(tmp_path, ten.one)


@pytest.mark.parametrize("hook", [
    "import torch, io, os, signal\n"                        # killed in the middle of the second write
    "def half(state, file, whole=torch.save):\n"
    "    whole(state, buffer := io.BytesIO())\n"
    "    if state['step'] == 2:\n"
    "        file.write(buffer.getvalue()[:len(buffer.getvalue()) // 2]); file.flush()\n"
    "        os.kill(os.getpid(), signal.SIGKILL)\n"
    "    file.write(buffer.getvalue())\n"
    "torch.save = half",
    "import torch\n"                                        # the disk is full in the middle of it
    "def full(state, file, whole=torch.save):\n"
    "    if state['step'] == 2:\n"
    "        file.write(b'half'); raise OSError(28, 'No space left on device')\n"
    "    whole(state, file)\n"
    "torch.save = full",
    "import os, signal\n"                                   # killed just before the rename
    "os.replace = lambda a, b, whole=os.replace: whole(a, b) if not os.path.exists(b) else "
    "os.kill(os.getpid(), signal.SIGKILL)"], ids=["killed", "full", "unnamed"])
def test_a_write_that_breaks_off_leaves_the_checkpoint_before_it(lab, tmp_path, hook):
    result = lab.run(*SHORT, "--save-every", 1, "--out", tmp_path, hook=hook)
    if result.status == -signal.SIGKILL:
        assert result.err == ""
    else:
        result.one_line("No space left on device")
    assert sample.read(tmp_path / "ckpt.pt")["step"] == 1
    lab.run("--resume", "--out", tmp_path, "--log-every", 1).ok()
    assert [row["step"] for row in log(tmp_path)] == [0, 1, 2]


def test_a_torn_line_in_the_log_does_not_stop_a_resume(lab, ten, tmp_path):
    shutil.copy(ten.one / "step5.pt", tmp_path / "ckpt.pt")
    text = (ten.one / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text[:text.index('"step": 8') + 20])
    lab.run("--resume", "--out", tmp_path, "--log-every", 1).ok()
    assert_same_run(tmp_path, ten.one)


def test_a_preview_that_comes_before_the_first_line_of_the_log(lab, ten, tmp_path):
    lab.run("--resume", ten.one / "step5.pt", "--out", tmp_path, "--preview-every", 1,
            "--log-every", 100).ok()
    assert [row["step"] for row in log(tmp_path)] == [9] and (tmp_path / "curve.png").exists()


def test_when_to_start_and_when_to_go_on(lab, ten, tmp_path):
    out = tmp_path / "run"
    new = [*SHORT, "--out", out]
    lab.run(*new, "--resume").one_line("no checkpoint at")
    assert not out.exists()
    lab.run(*new, "--resume", "auto").ok()
    before = contents(out)
    results = lab.run_all(new, ["--out", out, "--resume", "--model", "Ti/4"],
                          [*new, "--resume", ten.one / "step5.pt"],
                          ["--out", out, "--resume", "--data", ROOT / "assets"])
    for result, word in zip(results, ("already holds a run", "not a Ti/4", "", "not prepared")):
        result.one_line(word)
    assert contents(out) == before
    assert "resuming at step 3 of 5" in lab.run("--resume", "auto", "--out", out, "--steps", 5).ok().out
    lab.run(*new, "--overwrite").ok()
    assert sample.read(out / "ckpt.pt")["step"] == 3


def test_another_run_is_not_replaced_by_a_resumed_one(lab, ten, tmp_path):
    lab.run(*SHORT, "--out", tmp_path).ok()
    before = contents(tmp_path)
    lab.run("--resume", ten.one / "step5.pt", "--out", tmp_path).one_line("already holds a run")
    assert contents(tmp_path) == before


def test_a_finished_run_that_is_resumed_says_so(lab, ten, tmp_path):
    for name in ("ckpt.pt", "log.jsonl"):
        shutil.copy(ten.one / name, tmp_path / name)
    before = contents(tmp_path)
    for how in (["--resume"], ["--resume", "auto"]):        # no error: a scheduler may start it once more
        assert "resuming at step 10 of 10" in lab.run(*how, "--out", tmp_path).ok().out
    assert (tmp_path / "trajectory.gif").exists()
    assert all(contents(tmp_path)[path] == content for path, content in before.items())
    elsewhere = lab.run("--resume", ten.one / "ckpt.pt", "--out", tmp_path / "other")
    elsewhere.one_line("has done 10 steps", "more --steps")
    lab.run("--resume", "--out", tmp_path, "--steps", 9).one_line("has done 10 steps", "more --steps")
    longer = lab.run("--resume", "--out", tmp_path, "--steps", 12, "--lr", 2e-3).ok().out
    assert "resuming with other settings: steps 12 (was 10), lr 0.002 (was 0.001)\n" in longer
    assert not (tmp_path / "other").exists()


# ---- several processes ---------------------------------------------------------------------------

@pytest.mark.parametrize("other", ["two", "micro"])
def test_the_division_of_the_batch_changes_nothing_but_rounding(ten, other):
    ours, theirs = log(ten.one), log(getattr(ten, other))
    for a, b in zip(ours, theirs, strict=True):
        assert (a["step"], a["alpha"], a["lr"]) == (b["step"], b["alpha"], b["lr"])
        for name in ("loss", "loss_fm", "loss_jump", "err", "grad_norm"):       # the log has six digits
            assert a[name] == pytest.approx(b[name], rel=1.1e-5, abs=1e-9), name
    a, b, start = (sample.read(path) for path in (ten.one / "ckpt.pt", getattr(ten, other) / "ckpt.pt",
                                                  ten.one / "step5.pt"))
    for kind in ("net", "ema"):
        moved = sum((a[kind][k] - start[kind][k]).square().sum() for k in a[kind]) ** 0.5
        apart = sum((a[kind][k] - b[kind][k]).square().sum() for k in a[kind]) ** 0.5
        assert moved > 0.1 and apart < 1e-4 * moved


def test_two_machines_make_what_one_process_makes_and_the_first_alone_writes(ten, tmp_path):
    nodes = []
    for rank, port in enumerate([free_port()] * 2):
        (tmp_path / f"{rank}").mkdir()
        nodes.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", f"{rank}",
             "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", f"{port}", "--",
             str(ROOT / "train.py"), *TEN, "--out", "run"], env={**ENV, "GLOO_SOCKET_IFNAME": "lo"},
            cwd=tmp_path / f"{rank}", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    said = [node.communicate(timeout=60) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and "2 processes" in said[0][0], said
    assert said[1][0] == "" and not any((tmp_path / "1").rglob("*.*")), said
    run = SimpleNamespace(one=ten.one, nodes=tmp_path / "0" / "run")
    test_the_division_of_the_batch_changes_nothing_but_rounding(run, "nodes")


def test_all_processes_hold_the_same_weights(ten):
    assert [(ten.two / f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["True", "True"]


def test_only_the_first_process_writes_and_only_where_it_should(ten):
    names = {path.name for path in ten.two.iterdir()} - {"rank0.txt", "rank1.txt"}
    assert names == {path.name for path in ten.one.iterdir()}
    assert names == {"ckpt.pt", "step5.pt", "step10.pt", "log.jsonl", "recipe.json", "samples_0000005.png",
                     "samples_0000010.png", "curve.png", "trajectory.gif"}


def test_a_batch_that_cannot_be_divided(lab, tmp_path):
    lab.run(*TEN, "--accumulate", 3, "--out", tmp_path / "a").one_line("16", "3 micro-batches")
    first, second = map(lab.finish, lab.start_ranks(*TEN, "--batch", 15, "--out", tmp_path / "b"))
    first.one_line("15", "2 processes")
    assert second.status != 0                               # the same, unless the end of the first cut it off
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3), (3, 1)])
def test_own_rows_cut_the_batch_into_equal_parts(world, accumulate):
    recipe = {"steps": 2, "batch": 24}
    dataset = data.load("digits")
    x, y = dataset.batch(1, 0, 1, 24)
    seen, seen_x, seen_y = torch.zeros(24), torch.zeros_like(x), torch.zeros_like(y)
    for rank in range(world):
        run = SimpleNamespace(rank=rank, world=world, recipe=recipe, dataset=dataset, start=1, device=CPU,
                              args=SimpleNamespace(accumulate=accumulate))
        parts = list(train.micro_batches(run))
        assert len(parts) == accumulate
        for m, (x_part, y_part) in enumerate(parts):
            rows = train.own_rows(run, m)
            assert len(x_part) == 24 // (world * accumulate)
            seen[rows] += 1
            seen_x[rows], seen_y[rows] = x_part, y_part
    assert (seen == 1).all() and torch.equal(seen_x, x) and torch.equal(seen_y, y)


def test_the_random_numbers_of_a_step_depend_on_seed_and_step_alone(monkeypatch):
    recipe = resolved(*TEN, "--batch", "64")

    def draw(step, **changes):
        return train.draw({**recipe, **changes}, step, (1, 8, 8), CPU)

    first = draw(7)
    draw(3), torch.randn(100), np.random.rand(10), torch.manual_seed(5)
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "4")
    again, other_step, other_seed = draw(7), draw(8), draw(7, seed=1)
    assert {name: tuple(value.shape) for name, value in first.items()} == \
        {"t": (64,), "r": (64,), "drop": (64,), "e": (64, 1, 8, 8)}
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert (value != other_step[name]).float().mean() > 0.9
        assert (value != other_seed[name]).float().mean() > 0.9
    assert (first["r"] <= first["t"]).all() and (first["r"] == first["t"]).sum() == 32
    assert (first["drop"] >= 0).all() and (first["drop"] < 1).all()


# ---- when numbers go wrong -----------------------------------------------------------------------

def test_a_non_finite_loss_stops_the_run_and_says_where(lab, tmp_path):
    result = lab.run(*TEN, "--lr", 1e30, "--warmup", 0, "--save-every", 1, "--out", tmp_path)
    result.one_line("non-finite", "step 1", "alpha 1", " t ", " r ", "gradient norm", "tangent norm",
                    status=1)
    ckpt = sample.read(tmp_path / "ckpt.pt")
    assert ckpt["step"] == 1
    assert all(torch.isfinite(w).all() for kind in ("net", "ema") for w in ckpt[kind].values())
    scene = torch.load(tmp_path / "nonfinite_rank0.pt", weights_only=True)
    x, y = scene["x"], scene["y"]
    expected_x, expected_y = data.load("digits").batch(1, 0, 1, 16)
    assert scene["step"] == 1 and torch.equal(x, expected_x) and torch.equal(y, expected_y)
    assert scene["net"].keys() == ckpt["net"].keys() and scene["e"].shape == x.shape
    assert len(scene["t"]) == len(scene["r"]) == len(scene["drop"]) == 16


def test_one_bad_row_is_named(lab, tmp_path):
    hook = ("import train\n"
            "def draw(recipe, step, *rest, whole=train.draw):\n"
            "    noise = whole(recipe, step, *rest)\n"
            "    noise['e'][11] += float('nan') if step == 2 else 0\n"
            "    return noise\n"
            "train.draw = draw")
    result = lab.run(*TEN, "--out", tmp_path, hook=hook).one_line("step 2", "in row 11", status=1)
    t, r = (train.draw(resolved(*TEN), 2, (1, 8, 8), CPU)[name][11].item() for name in "tr")
    assert f"t {t:.4f}, r {r:.4f}" in result.err


# ---- starting from other weights -----------------------------------------------------------------

def prepared(folder, classes):
    """A data set of grey noise in the format that data.py prepares."""
    folder.mkdir()
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (100, 1, 8, 8), np.uint8))
    np.save(folder / "labels.npy", np.arange(100) % classes)
    (folder / "meta.json").write_text(json.dumps(dict(
        shape=[1, 8, 8], classes=classes, names=[f"{c}" for c in range(classes)], range=[0, 255],
        source="noise", count=100, key="noise")))
    return folder


def assembled(*flags):
    return train.assemble(train.parse_flags([str(f) for f in flags]), 0, 1, CPU)


def test_init_from_takes_what_fits_and_says_what_does_not(ten, tmp_path, capsys):
    theirs = sample.read(ten.one / "ckpt.pt")
    assert any(not torch.equal(theirs["ema"][k], theirs["net"][k]) for k in theirs["ema"])

    run = assembled(*TEN, "--init-from", ten.one / "ckpt.pt", "--out", tmp_path / "a")
    for net in (run.net, run.ema):
        assert all(torch.equal(w, theirs["ema"][k]) for k, w in net.state_dict().items())
    assert run.start == 0 and not run.optimizer.state and "new here: none" in capsys.readouterr().out

    run = assembled(*TEN, "--data", prepared(tmp_path / "twenty", 20), "--init-from", ten.one / "ckpt.pt",
                    "--out", tmp_path / "b")
    differ = {k for k, w in run.net.state_dict().items()
              if w.shape != theirs["ema"][k].shape or not torch.equal(w, theirs["ema"][k])}
    said = capsys.readouterr().out
    assert differ == {"y_embedder.embedding_table.weight"}
    total = len(theirs["ema"])
    assert f"{total - 1} of {total} tensors" in said
    assert re.findall(r": (\w+\.\S+\w)", said) == 2 * ["y_embedder.embedding_table.weight"]

    run = assembled(*TEN, "--model", "Ti/4", "--init-from", ten.one / "ckpt.pt", "--out", tmp_path / "c")
    differ = {k for k, w in run.net.state_dict().items() if w.shape != theirs["ema"][k].shape}
    assert {"x_embedder.proj.weight", "pos_embed"} < differ
    assert all(torch.equal(w, theirs["ema"][k]) for k, w in run.net.state_dict().items() if k not in differ)
    said = capsys.readouterr().out
    for which in re.search(r"new here: (.*); left over there: (.*)", said).groups():
        assert set(which.split(", ")) == differ


def test_init_from_something_that_does_not_fit(lab, ten, tmp_path):
    torch.save({"format": "alphaflow-1", "net": {}, "ema": {"w": torch.zeros(3)}, "config": {}},
               tmp_path / "w.pt")
    lab.run(*TEN, "--init-from", tmp_path / "w.pt", "--out", tmp_path / "a").one_line("0 of 56 tensors fit")
    lab.run("--resume", tmp_path / "w.pt", "--out", tmp_path / "a").one_line("no training state")
    ours, theirs = ten.one / "step5.pt", ten.one / "ckpt.pt"
    lab.run("--resume", ours, "--init-from", theirs, "--out", tmp_path / "a").one_line("--init-from")
    assert not (tmp_path / "a").exists()


# ---- recipes and flags ---------------------------------------------------------------------------

def resolved(*flags):
    return train.resolve(train.parse_flags([str(f) for f in flags]))


PUBLISHED = dict(
    data="imagenet256", flip=False, seed=0,
    alpha_schedule="sigmoid", alpha_window=(0, 1), alpha_start=1, alpha_end=0, alpha_gamma=25,
    alpha_clamp=0.005, fm_ratio=0.5, time_mean=-0.4, time_std=1, omega=1, kappa=0, t_min=0, t_max=1,
    label_drop=0, clip=4, c=1e-3, shrink_c=False,
    steps=400_000, batch=256, lr=1e-4, lr_decay="constant", lr_tail=1, warmup=10_000, beta1=0.9, beta2=0.95,
    grad_clip=16, ema_half_life=6931, ema_ramp=0.05)
XL = dict(steps=1_200_000, alpha_window=(0.5, 0.83333333), omega=0.2, kappa=0.92, t_max=0.75, label_drop=0.1)
ALPHA_0 = dict(alpha_schedule="constant", alpha_start=0)


@pytest.mark.parametrize("model, network, changes", [
    ("B/4", "B/4", {}),
    ("B/2", "B/2", {}),
    ("B/2-cfg", "B/2", dict(steps=1_200_000, fm_ratio=0.25, kappa=0.5, label_drop=0.1)),
    ("L/2", "L/2", {**XL, "t_max": 0.8}),
    ("XL/2", "XL/2", XL),
    ("XL/2+", "XL/2", {**XL, **ALPHA_0, "steps": 75_000, "batch": 1024}),
    ("meanflow-B/2", "B/2", {**ALPHA_0, "fm_ratio": 0.75}),
    ("meanflow-B/2-cfg", "B/2", {**ALPHA_0, "steps": 1_200_000, "kappa": 0.5, "label_drop": 0.1}),
    ("meanflow-XL/2-cfg", "XL/2", {**XL, **ALPHA_0}),
    ("fm-B/2", "B/2", {"fm_ratio": 1.0}),
])
def test_the_published_recipes(model, network, changes):
    recipe, expected = resolved("--model", model), {"model": model, **PUBLISHED, **changes}
    assert train.network_name(model) == network and recipe.keys() == expected.keys()
    for name, value in expected.items():
        if name != "alpha_window":
            assert recipe[name] == value, name
        elif recipe["alpha_schedule"] != "constant":
            assert recipe[name] == pytest.approx(value, abs=1e-6)


def test_a_flag_wins_over_the_recipe():
    changes = dict(steps=77, batch=32, lr=0.5, alpha_schedule="linear", alpha_window=(0.25, 0.5), omega=0.7,
                   flip=True, data="digits", lr_decay="cosine", t_min=0.2, seed=9)
    flags = [f for k, v in changes.items() if v is not True
             for f in ("--" + k.replace("_", "-"), ",".join(map(str, v)) if isinstance(v, tuple) else v)]
    assert resolved("--model", "XL/2", *flags, "--flip") == {**resolved("--model", "XL/2"), **changes}
    assert resolved("--model", "Mi/2", "--no-flip")["flip"] is False
    assert resolved()["model"] == "Ti/2" and resolved()["data"] == "digits"


@pytest.mark.parametrize("flags, alphas, fm_ratio", [
    (["--alpha-schedule", "sigmoid"], {0.0, 1.0, 0.5}, 0.5),                     # α-Flow
    (["--alpha", "0"], {0.0}, 0.5),                                             # MeanFlow
    (["--alpha-schedule", "constant", "--alpha", "0"], {0.0}, 0.5),             # the same, in more words
    (["--alpha", "0.5"], {0.5}, 0.5),                                           # Shortcut
    (["--alpha", "1"], {1.0}, 0.5),                                             # trajectory flow matching
    (["--fm-ratio", "1"], {0.0, 1.0, 0.5}, 1.0),                                # flow matching, whatever α
    (["--alpha", "0.002"], {0.002}, 0.5),                                       # no snap to 0 ...
    (["--alpha", "0.999"], {0.999}, 0.5),                                       # ... or 1: given is given
    (["--alpha-schedule", "step"], {0.0, 1.0}, 0.5),
])
def test_the_objectives_by_two_flags(flags, alphas, fm_ratio):
    recipe = resolved("--steps", 100, *flags)
    assert recipe["fm_ratio"] == fm_ratio
    seen = [train.alpha_of(recipe, step) for step in range(100)]
    assert alphas <= set(seen) and (len(alphas) == 3 or alphas == set(seen))
    assert seen == sorted(seen, reverse=True)


def test_a_step_comes_in_the_middle_unless_told_otherwise():
    recipe = resolved("--steps", 100, "--alpha-schedule", "step")
    assert [train.alpha_of(recipe, step) for step in (0, 49, 50, 99)] == [1, 1, 0, 0]
    recipe = resolved("--steps", 100, "--alpha-schedule", "step", "--alpha-window", "0.2,0.2")
    assert [train.alpha_of(recipe, step) for step in (19, 20)] == [1, 0]


@pytest.mark.parametrize("flags", [
    ["--model", "meanflow-XL/2"],                           # would be α-Flow under MeanFlow's name
    ["--model", "Tu/2"],
    ["--alpha", "0", "--alpha-start", "0.5"],
    ["--model", "meanflow-B/2", "--alpha-schedule", "sigmoid"],     # from 0 to 0
    ["--omega", "nan"], ["--ema-ramp", "nan"], ["--seed", str(2**64)],
])
def test_flags_that_would_silently_do_something_else(flags):
    with pytest.raises(ValueError):
        resolved(*flags)


def test_all_recipes_are_listed(lab):
    said = lab.run("--list").ok().out
    assert all(f"\n{name} (" in said for name in train.RECIPES) and "XL/2 (676.7 M parameters)" in said


# ---- cost ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, channels", [("Ti/2", 8, 1), ("S/4", 16, 4)])
def test_flops_are_those_that_pytorch_counts(name, size, channels):
    net = build(name, size, channels, 10)
    z, t = torch.zeros(1, channels, size, size), torch.zeros(1)
    # Fused attention is not in the counter's table for CPUs, the plain one is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(z, t, t, torch.zeros(1, dtype=torch.long))
    assert train.flops_of_forward(net.config) == counter.get_total_flops()


def test_xl_2_costs_what_the_dit_paper_says():
    with torch.device("meta"):
        config = build("XL/2", 32, 4, 1000).config
    assert round(train.flops_of_forward(config) / 2e9, 1) == 118.6          # they count multiply-adds


def test_a_step_in_forwards_of_its_batch():
    plain = dict(fm_ratio=0.25, omega=1.0, kappa=0.0)
    assert [train.forwards_of_step(plain, alpha) for alpha in (1, 0.5, 0)] == [3, 3.75, 4.5]
    guided = dict(plain, omega=0.2, kappa=0.92, time_mean=0.0, time_std=1.0, label_drop=0.0, t_min=0.0)
    assert train.forwards_of_step(dict(guided, t_max=1.0), 1) == pytest.approx(4.75)
    half = dict(guided, t_max=0.5, label_drop=0.2)
    assert train.forwards_of_step(half, 0) == pytest.approx(4.5 + 0.4 * 1.75)


def test_recomputing_changes_memory_and_not_the_gradient():
    net = build("Ti/2", 8, 1, 10).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    z, t = torch.randn(3, 1, 8, 8).double(), torch.rand(3).double()
    found = {}
    for net.recompute in (False, True):
        u = net(z, t, t / 2, torch.tensor([1, 2, 3]))
        found[net.recompute] = torch.autograd.grad(u.square().sum(), list(net.parameters()))
        with torch.no_grad():
            assert torch.isfinite(du_dt(net, z, t, t / 2, z, torch.tensor([1, 2, 3]))).all()
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found[False], found[True]))
    kept = {}
    for net.recompute in (False, True):
        kept[net.recompute] = train.bytes_for_backward(net)
    assert kept[True] < kept[False] / 5
    # The activations of a picture in a block: more than seven tensors (T, D), less than forty.
    assert 7 < kept[False] / net.config.depth / (16 * 128 * 4) < 40


def test_the_learning_rate():
    recipe = resolved("--steps", 100, "--lr", 2.0, "--warmup", 10, "--lr-decay", "constant")
    assert [train.lr_at(recipe, k) for k in (0, 4, 9, 10, 99)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    recipe = resolved("--steps", 100, "--lr", 2.0, "--warmup", 0, "--lr-decay", "cosine", "--lr-tail", 1)
    assert [train.lr_at(recipe, k) for k in (0, 25, 50, 75)] == \
        pytest.approx([2, 1 + math.cos(math.pi / 4), 1, 1 - math.cos(math.pi / 4)])
    assert 0 < train.lr_at(recipe, 99) < 1e-2
    recipe = resolved("--steps", 100, "--lr", 2.0, "--warmup", 10, "--lr-decay", "linear", "--lr-tail", 0.2)
    assert [train.lr_at(recipe, k) for k in (4, 79, 80, 90, 95)] == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.5])


def test_the_averaged_weights():
    paper = {"ema_half_life": 6931.0, "ema_ramp": 0.05}
    assert train.ema_decay(paper, 0) == 0.0                                     # the first step copies
    assert train.ema_decay(paper, 1000) ** 50 == pytest.approx(0.5)             # half-life 0.05·1000
    assert train.ema_decay(paper, 400_000) ** 6931 == pytest.approx(0.5)
    assert train.ema_decay(paper, 400_000) == pytest.approx(0.9999, abs=1e-6)
    decays = [train.ema_decay(paper, k) for k in range(0, 200_000, 1000)]
    assert decays == sorted(decays)

    ema, net = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    old = ema.weight.detach().clone()
    train.update_ema(ema, net, 0.9)
    assert torch.allclose(ema.weight, 0.9 * old + 0.1 * net.weight)
    train.update_ema(ema, net, 0.0)
    assert torch.equal(ema.weight, net.weight) and torch.equal(ema.bias, net.bias)


# ---- reports -------------------------------------------------------------------------------------

def test_the_log(ten):
    rows = [json.loads(line) for line in (ten.one / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10))
    for row in rows:
        assert {"loss", "loss_fm", "loss_jump", "err", "L_TFM", "L_TC", "clipped", "tangent", "alpha", "lr",
                "grad_norm", "images_per_s", "memory_mb"} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss_fm"] + row["loss_jump"] == pytest.approx(row["loss"], rel=2e-5)
        assert row["images_per_s"] > 0 and 10 < row["memory_mb"] < 1e5 and row["grad_norm"] > 0
    recipe = json.loads((ten.one / "recipe.json").read_text())
    for k, row in enumerate(rows):
        assert row["alpha"] == pytest.approx(train.alpha_of(recipe, k), rel=1e-5)
        assert row["lr"] == pytest.approx(train.lr_at(recipe, k), rel=1e-5)
    assert {row["alpha"] for row in rows} >= {0.0, 1.0} and any(row["tangent"] > 0 for row in rows)


def test_the_recipe_is_kept_in_both_places(ten):
    recipe = resolved(*TEN)
    as_json = json.loads(json.dumps(recipe))
    assert json.loads((ten.one / "recipe.json").read_text()) == as_json
    ckpt = sample.read(ten.one / "ckpt.pt")
    assert json.loads(json.dumps(ckpt["config"]["recipe"])) == as_json
    assert ckpt["data"] == data.load("digits").describe()


def test_the_pictures(ten):
    for name, size, frames in (("samples_0000010.png", (300, 100), 1), ("curve.png", (600, 300), 1),
                               ("trajectory.gif", (300, 60), 17)):
        with Image.open(ten.one / name) as picture:
            picture.load()
            assert picture.width >= size[0] and picture.height >= size[1], name
            assert getattr(picture, "n_frames", 1) == frames
            assert len(set(np.asarray(picture.convert("L")).flat)) > 10, name
    assert (ten.one / "samples_0000005.png").read_bytes() != (ten.one / "samples_0000010.png").read_bytes()


def test_what_it_says(ten):
    said = ten.said.splitlines()
    assert "Ti/8 on digits" in said[0] and "1,797 pictures 1x8x8, 10 classes" in said[0]
    assert "1 process, fp32" in ten.said and "alpha_schedule sigmoid" in ten.said
    assert said[-1].endswith(f"python sample.py --ckpt {ten.one / 'ckpt.pt'} --nfe 1")


def test_a_run_of_one_step(lab, tmp_path):
    lab.run(*TEN, "--steps", 1, "--out", tmp_path).ok()
    assert sample.read(tmp_path / "ckpt.pt")["step"] == 1 and (tmp_path / "curve.png").exists()


def test_the_big_model_stops_at_once_without_its_latents(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--model", "XL/2"], cwd=tmp_path, env=ENV,
                          text=True, capture_output=True)
    assert time.monotonic() - began < 10
    Result(done.returncode, done.stdout, done.stderr).one_line("python data.py imagenet --src")
    assert not any(tmp_path.iterdir())


def test_every_objective_runs(lab, tmp_path):
    guided = ["--omega", "0.2", "--kappa", "0.92", "--t-max", "0.75", "--label-drop", "0.1"]
    objectives = [["--alpha-schedule", "sigmoid"], ["--alpha", "0"], ["--alpha", "0.5"], ["--alpha", "1"],
                  ["--fm-ratio", "1"], ["--shrink-c"], ["--alpha-schedule", "step"], ["--precision", "bf16"],
                  *(["--alpha", a, *guided] for a in ("0", "0.5"))]
    for i in range(0, len(objectives), 2):
        results = lab.run_all(*([*SHORT, *flags, "--out", tmp_path / f"{i + j}"]
                                for j, flags in enumerate(objectives[i:i + 2])), hook=BARE)
        for j, result in enumerate(results):
            result.ok()
            rows = log(tmp_path / f"{i + j}")
            assert len(rows) == 3 and all(math.isfinite(v) for row in rows for v in row.values())
            if "--fm-ratio" in objectives[i + j]:
                assert all(row["loss_jump"] == 0 for row in rows)


# ---- torch.compile -------------------------------------------------------------------------------

def broken_at_once(function):
    raise RuntimeError("no compiler here\nand a second line")


def broken_when_called(function):
    def call(*args):
        raise AssertionError("internal assertion")
    return call


def wrong_numbers(function):
    return lambda *args: 1.1 * function(*args)


def wrong_derivative(function):
    return function if isinstance(function, torch.nn.Module) else lambda *args: function(*args) + 1


def slow_derivative(function):
    def call(*args):
        time.sleep(0.1)
        return function(*args)
    return function if isinstance(function, torch.nn.Module) else call


@pytest.mark.parametrize("compiler, eager", [
    (broken_at_once, (True, True)), (broken_when_called, (True, True)), (wrong_numbers, (True, True)),
    (wrong_derivative, (False, True)), (slow_derivative, (False, True)),
    (lambda function: function, (False, False))])
def test_a_compiler_that_fails_or_errs_is_done_without(monkeypatch, capsys, compiler, eager):
    monkeypatch.setattr(torch, "compile", compiler)
    args = train.parse_flags([*TEN, "--compile", "--out", "unused"])
    torch.manual_seed(0)
    net = train.build("Ti/8", 8, 1, 10)
    before = {name: w.clone() for name, w in net.state_dict().items()}
    run = SimpleNamespace(args=args, net=net, dataset=data.load("digits"), device=CPU, rank=0, world=1,
                          recipe=train.resolve(args))
    fast, derivative, autocast = train.prepare_network(run, print)
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compile")]
    assert len(said) == 1 and ("network on" not in said[0], "du/dt on" not in said[0]) == eager, said
    z, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    assert fast is net                                          # but for wrong_numbers none is another
    if eager[1]:
        assert torch.equal(derivative(net, z, t, t / 2, z, torch.zeros(4, dtype=torch.long)),
                           train.du_dt(net, z, t, t / 2, z, torch.zeros(4, dtype=torch.long)))
