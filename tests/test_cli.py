"""
The commands as a person types them: wrong ones end in one line, and those of the README work.

    python -m pytest -q tests/test_cli.py
"""
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_train import BARE, ENV, ROOT, SHORT, Lab, Result  # noqa: E402
import train  # noqa: E402

PROGRAMS = ("train.py", "sample.py", "fid.py", "loss.py", "data.py")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


# ---- what goes wrong -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def desk(lab, tmp_path_factory):
    """A folder with two runs, files that are no runs, and pictures."""
    desk = tmp_path_factory.mktemp("desk")
    lab.run(*SHORT, "--out", "run", cwd=desk, hook=BARE).ok()
    shutil.copytree(desk / "run", desk / "other")
    whole = (desk / "run" / "ckpt.pt").read_bytes()
    (desk / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (desk / "text.pt").write_text("this is no checkpoint\n" * 100)
    torch.save({"weights": torch.zeros(3)}, desk / "foreign.pt")
    torch.save({"format": "alphaflow-1", "net": {}, "ema": {}, "config": {}}, desk / "hollow.pt")
    for name in ("full", "empty", "pictures/a", "damaged", "mnist"):
        (desk / name).mkdir(parents=True)
    (desk / "full" / "notes.txt").write_text("mine")
    Image.new("RGB", (9, 9)).save(desk / "pictures" / "a" / "1.png")
    (desk / "damaged" / "meta.json").write_text("{")
    for name in ("images", "labels"):
        (desk / "damaged" / f"{name}.npy").write_bytes(b"\x93NUMPY")
        (desk / "mnist" / f"train-{name}-idx{3 if name == 'images' else 1}-ubyte").write_bytes(b"not these")
    return desk


def state(folder):
    """{path: what must not change}"""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


WRONG = """
loss.py --ckpt hollow.pt
sample.py --ckpt run/ckpt.pt --num 1000000000000
sample.py --ckpt run/ckpt.pt --num 5000 --out new/grid.png
train.py --modle B/2
train.py --alph 0.5
train.py digits
train.py --steps
train.py --model Q/2
train.py --model Ti/3
train.py --model Ti/3 --data digits
train.py --model Ti --data digits
train.py --model meanflow-B/4
train.py --model XL/2
train.py --data nowhere
train.py --data full
train.py --data damaged
train.py --steps 0
train.py --steps 1.5
train.py --batch -4
train.py --batch 100 --accumulate 3
train.py --accumulate 0
train.py --lr 0
train.py --lr nan
train.py --lr fast
train.py --lr-decay sometimes
train.py --lr-tail 0
train.py --omega nan
train.py --time-mean inf
train.py --alpha-gamma inf
train.py --beta2 1
train.py --label-drop 1
train.py --warmup -1
train.py --seed -1
train.py --seed 18446744073709551616
train.py --grad-clip 0
train.py --fm-ratio 1.5
train.py --time-std 0
train.py --t-min 0.8 --t-max 0.2
train.py --alpha 2
train.py --alpha -0.1
train.py --alpha nan
train.py --alpha 0.5 --alpha-schedule sigmoid
train.py --alpha 0.5 --alpha-start 0.7
train.py --alpha-schedule sigmod
train.py --alpha-schedule sigmoid --alpha-start 0
train.py --alpha-schedule exponential
train.py --alpha-window 0.5
train.py --alpha-window 0.5,0.5
train.py --alpha-window 0.9,0.1
train.py --alpha-window 0,1000
train.py --alpha-window nan,1
train.py --alpha-gamma 0
train.py --alpha-clamp 0.7
train.py --log-every 0
train.py --save-every 0
train.py --preview-every -1
train.py --precision fp16
train.py --device toaster
train.py --tensorboard
train.py --out run
train.py --out text.pt/below
train.py --out text.pt
train.py --out nowhere --resume
train.py --resume nowhere/ckpt.pt
train.py --resume cut.pt
train.py --resume text.pt
train.py --resume foreign.pt
train.py --resume hollow.pt
train.py --resume run
train.py --resume run/ckpt.pt --model B/2
train.py --resume run/ckpt.pt --out other
train.py --resume run/ckpt.pt --init-from other/ckpt.pt
train.py --out run --resume --alpha 7
train.py --init-from nowhere.pt
train.py --init-from foreign.pt
train.py --init-from hollow.pt
sample.py
sample.py --ckpt nowhere.pt
sample.py --ckpt run
sample.py --ckpt cut.pt
sample.py --ckpt text.pt
sample.py --ckpt foreign.pt
sample.py --ckpt hollow.pt
sample.py --ckpt run/ckpt.pt --nfe 0
sample.py --ckpt run/ckpt.pt --nfe two
sample.py --ckpt run/ckpt.pt --nfe 2 --grid 1,0
sample.py --ckpt run/ckpt.pt --grid 1,0.5,0.7,0
sample.py --ckpt run/ckpt.pt --grid 0.5,0
sample.py --ckpt run/ckpt.pt --grid one
sample.py --ckpt run/ckpt.pt --ema --raw
sample.py --ckpt run/ckpt.pt --classes 3,99
sample.py --ckpt run/ckpt.pt --classes cats
sample.py --ckpt run/ckpt.pt --num 0
sample.py --ckpt run/ckpt.pt --batch 0
sample.py --ckpt run/ckpt.pt --seed -1
sample.py --ckpt run/ckpt.pt --sampler euler
sample.py --ckpt run/ckpt.pt --out full
sample.py --ckpt run/ckpt.pt --out grid.jpg
sample.py --ckpt run/ckpt.pt --out text.pt/grid.png
sample.py --ckpt run/ckpt.pt --trajectory path.png
sample.py --ckpt run/ckpt.pt --device toaster
fid.py
fid.py --ckpt nowhere.pt
fid.py --ckpt foreign.pt
fid.py --ckpt hollow.pt
fid.py --ckpt run/ckpt.pt --ref nowhere
fid.py --ckpt run/ckpt.pt --features vgg
fid.py --ckpt run/ckpt.pt --num 1
fid.py --ckpt run/ckpt.pt --nfe -1
fid.py --ckpt run/ckpt.pt --grid 0.5,0
fid.py --ckpt run/ckpt.pt --seed -1
fid.py --ckpt run/ckpt.pt --json nowhere/x.json
fid.py --ckpt run/ckpt.pt --bacth 8
fid.py --ckpt run/ckpt.pt --pictures pictures
fid.py --ckpt run/ckpt.pt --features pixels,vgg
fid.py --ckpt run/ckpt.pt --features inception --weights nowhere
fid.py --ckpt run/ckpt.pt --features inception --weights text.pt
fid.py --ckpt run/ckpt.pt --features clip --weights foreign.pt
fid.py --ckpt run/ckpt.pt --ref text.pt
fid.py --ckpt run/ckpt.pt --divisor N-2
fid.py --ckpt run/ckpt.pt --save-pictures full
fid.py --ckpt run/ckpt.pt --save-stats nowhere/x.npz
fid.py --ckpt run/ckpt.pt --save-stats x.npz --features pixels,inception
fid.py --pictures pictures
fid.py --pictures empty --ref digits
fid.py --pictures digits
fid.py --pictures digits --ref digits --num 9999
fid.py --pictures digits --ref digits --size 8
fid.py --pictures digits --ref digits --nfe 2
fid.py --pictures digits --ref digits --save-pictures x
fid.py --pictures text.pt --ref digits
fid.py --pictures nowhere.npz --ref digits
fid.py --pictures digits --ref text.pt
fid.py --pictures digits --ref ''
fid.py --pictures digits --ref digits --seed 1
fid.py --pictures digits --ref digits --weights text.pt
fid.py --pictures digits --save-stats x.npz --kid
fid.py --pictures digits --save-stats x.txt
fid.py --pictures digits --ref digits --num 5 --prdc
fid.py --ckpt run/ckpt.pt --nfe 100000000000
fid.py --ckpt run/ckpt.pt --num 100000000000000
train.py --eval-every 0
train.py --eval-every 2 --eval-num 1
train.py --eval-every 2 --eval-features vgg
train.py --eval-features pixels
loss.py
loss.py --ckpt nowhere.pt
loss.py --ckpt foreign.pt
loss.py --ckpt run/ckpt.pt --batches 0
loss.py --ckpt run/ckpt.pt --batch 0
loss.py --ckpt run/ckpt.pt --alpha 2 --batch 2
loss.py --ckpt run/ckpt.pt --seed -1
loss.py --ckpt run/ckpt.pt --batches 1 --batch 2 --out nowhere/x.json
data.py
data.py cifar100
data.py mnist --from nowhere
data.py mnist --from empty
data.py mnist --from mnist
data.py cifar10 --from empty
data.py cifar10 --from text.pt
data.py folder --src pictures
data.py folder --src nowhere --out made
data.py folder --src empty --out made
data.py folder --src pictures --out made --size 2
data.py folder --src pictures --out full
data.py folder --src pictures --out pictures/made
data.py folder --src pictures --out text.pt
""".strip().splitlines()


def skip_if_right_here(command):
    if "--tensorboard" in command and importlib.util.find_spec("tensorboard"):
        pytest.skip("here TensorBoard is installed")


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_ends_in_one_line_and_changes_nothing(lab, desk, command):
    skip_if_right_here(command)
    program, *args = shlex.split(command)
    before = state(desk)
    lab.run(*args, program=program, cwd=desk).one_line(program)
    assert state(desk) == before


def test_a_wrong_command_in_a_process_of_its_own(desk):
    before = state(desk)
    commands = ["train.py --alpha 2", "sample.py --ckpt cut.pt", "fid.py --ckpt nowhere.pt",
                "loss.py --bach 2", "data.py folder --src empty --out made"]
    for pair in (commands[:2], commands[2:4], commands[4:]):
        running = [subprocess.Popen([sys.executable, str(ROOT / program), *args], cwd=desk, env=ENV,
                                    text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                   for program, *args in map(shlex.split, pair)]
        for process in running:
            out, err = process.communicate(timeout=60)
            Result(process.returncode, out, err).one_line("error")
    assert state(desk) == before


def test_a_folder_that_may_not_be_written(lab, desk):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    closed = desk.parent / "closed"
    closed.mkdir(mode=0o500, exist_ok=True)
    for program, *args in (["train.py", *SHORT, "--out"], ["sample.py", "--ckpt", "run/ckpt.pt", "--out"]):
        lab.run(*args, closed / "x", program=program, cwd=desk).one_line(str(closed))
    assert not any(closed.iterdir())


# ---- what the README says ------------------------------------------------------------------------

def readme():
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("no README.md yet")
    return path.read_text(encoding="utf-8")


def fenced(text, *languages):
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    return [block for language, block in blocks if language in languages]


def commands(text):
    """[(processes, program, args)] for each of our programs that the lines of `text` start."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        cuts = [-1, *(i for i, word in enumerate(words) if word in ("&&", "||", ";", "|")), len(words)]
        for words in [words[a + 1:b] for a, b in zip(cuts, cuts[1:])]:
            if words[1:3] == ["-m", "torch.distributed.run"]:
                words = ["torchrun", *words[3:]]            # its other name
            if words and words[0] == "torchrun":
                try:
                    args = get_args_parser().parse_args(words[1:])
                except SystemExit:          # it takes --num for its own: torchrun ... -- sample.py --num 50
                    pytest.fail(f"torchrun does not understand: {line.strip()}")
                found.append((int(args.nproc_per_node), args.training_script, args.training_script_args))
            elif len(words) > 1 and re.fullmatch(r"(\S*/)?python3?", words[0]) and words[1] in PROGRAMS:
                found.append((1, words[1], words[2:]))
    return found


def of_readme():
    return commands("\n".join(fenced(readme(), "sh", "bash")))


def of_docstrings():
    docs = [(ROOT / program).read_text(encoding="utf-8").split('"""')[1] for program in PROGRAMS]
    return commands("\n".join(re.findall(r"^    ((?:python|torchrun) .*)$", "\n".join(docs), re.M)))


PARSE = """
def parse_args(self, *args, whole=data.Parser.parse_args, **named):
    whole(self, *args, **named)
    sys.exit(0)
data.Parser.parse_args = parse_args
"""


def test_the_readme_has_commands():
    found = of_readme()
    assert {"train.py", "sample.py", "fid.py", "loss.py"} <= {program for _, program, _ in found}
    assert len(found) >= 8
    assert any(processes > 1 for processes, _, _ in found)


@pytest.mark.parametrize("source", [of_readme, of_docstrings])
def test_every_flag_in_a_documented_command_exists(lab, source):
    for _, program, args in source():
        result = lab.run(*args, program=program, hook=PARSE)
        assert result.status == 0, (program, args, result.err)


def test_every_flag_that_the_text_names_exists(lab):
    text = re.sub(r"^.*(-m venv|pip install).*$", "", readme(), flags=re.M)     # those are not ours, and
    text = text.replace("--nnodes", "")                                 # this one is torchrun's
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)(?![\w-])", text))    # torchrun's have _
    known = set()
    for program in PROGRAMS:
        known |= set(re.findall(r"--([a-z][a-z0-9-]+)", lab.run("--help", program=program).ok().out))
    for command in ("folder", "mnist", "imagenet", "vae-check"):
        text = lab.run(command, "--help", program="data.py").ok().out
        known |= set(re.findall(r"--([a-z][a-z0-9-]+)", text))
    assert named <= known, named - known


def trimmed(program, args):
    """The flags that make a command short, or None if it needs a download, a GPU or ImageNet."""
    if program == "data.py" or "cuda" in " ".join(args):
        return None
    if program in ("fid.py", "sample.py") and not any(arg.startswith("out/digits") for arg in args):
        return None
    if program != "train.py":
        return {"sample.py": ["--num", "20"] if "--num" in args else [], "fid.py": ["--num", "100"],
                "loss.py": ["--batches", "1", "--batch", "8"]}[program] + ["--device", "cpu"]
    flags = train.parse_flags(args)
    if train.resolve(flags)["data"] != "digits":
        return None
    short = ["--batch", "8", "--preview-every", "3", "--log-every", "1", "--device", "cpu"]
    short += ["--eval-every", "2", "--eval-num", "50"] if "--eval-every" in args else []
    return short + (["--overwrite", "--steps", "3"] if flags.resume is None else [])


def test_the_commands_of_the_readme_work_in_their_order(lab, tmp_path):
    ran, steps = [], 3
    for processes, program, args in of_readme():
        extra = trimmed(program, args)
        if extra is None:
            continue
        if "--resume" in args:                                  # each goes one step further
            steps += 1
            extra += ["--steps", str(steps)]
        began = time.time()
        command = [*args, *extra]
        where = dict(program=program, cwd=tmp_path)
        started = (lab.start_ranks(*command, world=processes, **where) if processes > 1 else
                   [lab.start(*command, **where)])
        results = [lab.finish(process).ok() for process in started]
        said = results[0].out.splitlines()[-1]
        if program == "train.py":
            folder = tmp_path / re.match(r"done: (.*)/ holds", said)[1]
            made = [folder / name for name in ("ckpt.pt", "log.jsonl", "curve.png", "trajectory.gif")]
        else:
            made = [tmp_path / args[i + 1] for i, flag in enumerate(args)
                    if flag in ("--out", "--trajectory", "--json")]
            made += [tmp_path / re.match(r"wrote (\S+?):? ", said + " ")[1]] if program == "sample.py" else []
        for path in made:
            assert path.exists() and path.stat().st_mtime >= began - 1, (program, args, path)
        ran.append(program)
    assert {"train.py", "sample.py", "fid.py", "loss.py"} <= set(ran)

    for k, block in enumerate(fenced(readme(), "python")):      # with the first command's checkpoint
        script = tmp_path / f"block{k}.py"
        script.write_text(block)
        lab.run(program=str(script), cwd=tmp_path).ok()
