"""sample.py: the two samplers, which picture is which, files, the commands.

    python -m pytest -q tests/test_sample.py

golden/sampler.npz and golden/sit_small.npz: random weights, inputs, what the published sampler made of them.
"""
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402

TINY = dict(size=8, channels=1, patch=4, dim=16, depth=1, heads=2, classes=10)
COUNTS = [5, 1, 0, 2, 2, 2, 2, 2, 2, 2]                 # pictures a class in the checkpoint's data
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def tiny_net(seed, **changes):
    """A small DiT whose weights are all random, so that times, labels and pictures all matter."""
    torch.manual_seed(seed)
    net = model.DiT(model.DiTConfig(**{**TINY, **changes}))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def write_checkpoint(path, more=None, **changes):
    """A checkpoint in train.py's format; its raw weights are tiny_net(0), its average is tiny_net(1)."""
    raw, ema = tiny_net(0, **changes), tiny_net(1, **changes)
    about = {**data.load("digits").describe(), "label_counts": COUNTS}
    torch.save({"format": model.FORMAT, "net": raw.state_dict(), "ema": ema.state_dict(), "step": 7,
                "config": {"model": dataclasses.asdict(raw.config), "recipe": {"data": "digits"}},
                "data": about, **(more or {})}, path)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "ckpt.pt")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: (exit status, stdout, stderr). Real processes come below."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, words)])
        try:
            data.run(sample.main)
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()
    return call


# ---- the samplers against golden numbers -----------------------------------------------------------

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(HERE / "golden" / "sampler.npz").items()}


@pytest.fixture(scope="module")
def golden_net():
    net = model.DiT(model.DiTConfig(8, 4, 2, 64, 3, 4, 10))
    with np.load(HERE / "golden" / "sit_small.npz") as file:
        net.load_state_dict({k[3:]: torch.from_numpy(file[k]) for k in file.files if k.startswith("sd/")})
    return net.eval()


def close(got, expected, rel):
    off = (got.double() - expected.double()).abs().max()
    return got.shape == expected.shape and off < rel * max(1, expected.abs().max())


@pytest.mark.parametrize("case", ["ode1", "ode2", "ode4", "ode_custom", "ode2_open", "cons1", "cons2",
                                  "cons_custom", "fm4"])
def test_the_samplers_make_the_golden_states_and_pictures(case, golden_net):
    golden = {k.split("/")[1]: v for k, v in GOLDEN.items() if k.startswith(case + "/")}
    y, grid = GOLDEN["y"], golden["t_grid"].tolist()

    def run(net, dtype, callback=None):
        def euler(z, t, r, y):                          # u at r = t is the velocity: plain Euler steps
            return net(z.to(net.pos_embed), t.to(net.pos_embed), t.to(net.pos_embed), y)
        z = GOLDEN["noise"].to(dtype)
        if case.startswith("cons"):
            return sample.consistency(net, z, y, grid, GOLDEN["step_noise"].to(dtype), callback=callback)
        return sample.ode(euler if case == "fm4" else net, z, y, grid, callback)
    steps = []
    result = run(golden_net.double(), torch.float64, lambda *step: steps.append(step))
    assert close(result, golden["result_f64"], 1e-11)
    assert close(torch.stack([step[2] for step in steps]), golden["states_f64"], 1e-11)
    assert close(torch.stack([step[3] for step in steps]), golden["denoised_f64"], 1e-11)
    assert [step[:2] for step in steps] == list(zip(grid, grid[1:]))
    for dtype in (torch.float32, torch.float64):        # the state's; the network is float32
        result = run(golden_net.float(), dtype)
        assert result.dtype == dtype and close(result, golden["result_f32"], 2e-5)


# ---- facts about the samplers ----------------------------------------------------------------------

Z = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 1, 2, 2)
Y = torch.tensor([0, 1, 2])


def test_consistency_puts_noise_back_given_or_from_the_generator():
    def go(**options):
        return sample.consistency(lambda z, t, r, y: 0.5 * z, Z, Y, [1, 0.6, 0], **options)
    e = torch.randn(Z.shape, generator=data.generator(1))
    # x̂ = z - z/2, then z = 0.4·x̂ + 0.6·e, then z - 0.6·z/2
    torch.testing.assert_close(go(noise=[e]), 0.7 * (0.4 * 0.5 * Z + 0.6 * e))
    assert torch.equal(go(generator=data.generator(1)), go(noise=[e]))
    assert not torch.equal(go(generator=data.generator(2)), go(noise=[e]))


def test_grids_fall_from_one_to_zero_and_others_are_refused():
    assert sample.uniform_grid(1) == [1, 0] and sample.uniform_grid(4) == [1, 0.75, 0.5, 0.25, 0]
    assert sample.check_grid(["1", "0.55", "0"]) == [1, 0.55, 0]
    nan = float("nan")
    for grid in ([], [1], [1, 1], [0, 1], [1, 0.5, 0.6], [1.2, 0], [1, -0.1], [1, nan], [nan, 0], ["1", "x"]):
        with pytest.raises(ValueError):
            sample.check_grid(grid)
    for nfe in (0, -1):
        with pytest.raises(ValueError, match="1 or more"):
            sample.uniform_grid(nfe)


@pytest.mark.parametrize("name, sampler, middle", [
    ("meanflow-B-2", "ode", 0.5), ("alphaflow-B-2", "ode", 0.5), ("meanflow-B-2-cfg", "ode", 0.5),
    ("alphaflow-B-2-cfg", "ode", 0.5), ("meanflow-XL-2-cfg", "ode", 0.5), ("ckpt", "ode", 0.5),
    ("alphaflow-XL-2-cfg", "consistency", 0.55), ("alphaflow-XL-2-plus-cfg", "consistency", 0.5)])
def test_released_files_are_sampled_as_published_unless_told_otherwise(name, sampler, middle):
    path = f"anywhere/{name}.pt"
    assert sample.sampling_plan(path, 2, None, sampler) == ([1, middle, 0], sampler)
    assert sample.sampling_plan(path, nfe=2) == ([1, middle, 0], sampler)
    assert sample.sampling_plan(path) == ([1, 0], sampler)
    assert sample.sampling_plan(path, 4) == ([1, 0.75, 0.5, 0.25, 0], sampler)
    assert sample.sampling_plan(path, grid="1,0.7,0") == ([1, 0.7, 0], sampler)
    assert sample.sampling_plan(path, 2, sampler="ode") == ([1, 0.5, 0], "ode")


# ---- which picture is which ------------------------------------------------------------------------

@pytest.mark.parametrize("sampler, grid", [("ode", [1, 0.5, 0]), ("consistency", [1, 0.6, 0.3, 0])])
def test_a_picture_depends_on_the_seed_and_its_number_alone(ckpt, sampler, grid):
    noise = sample.noise_for(range(400), (2, 4, 4), seed=3)
    assert noise.dtype == torch.float32 and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(noise[[4, 1]], sample.noise_for([4, 1], (2, 4, 4), 3))
    for rows, *key in (([4], 4), ([5], 3), ([4], 3, 1), ([4], 3, 2)):
        assert not torch.equal(noise[4:5], sample.noise_for(rows, (2, 4, 4), *key))
    net, _ = sample.load(ckpt)
    labels = sample.make_labels("random", 11, 10, seed=5)
    whole = sample.draw(net, labels, range(11), grid, sampler, seed=5)
    for rows in (range(4, 8), range(1, 11, 3), [7], [9, 0]):
        part = sample.draw(net, labels, rows, grid, sampler, seed=5)
        torch.testing.assert_close(part, whole[list(rows)], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, sample.draw(net, labels, range(11), grid, sampler, seed=6), atol=0.1)


def test_labels_by_chance_in_turns_and_as_in_the_data():
    labels = sample.make_labels("random", 500, 10, seed=1)
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
    assert torch.equal(labels[:7], sample.make_labels("random", 7, 10, seed=1))         # of (seed, k) alone
    assert not torch.equal(labels, sample.make_labels("random", 500, 10, seed=2))
    assert sample.make_labels("balanced", 5, 3).tolist() == [0, 1, 2, 0, 1]
    assert sample.make_labels("3,1,4", 5, 10).tolist() == [3, 1, 4, 3, 1]
    for count in (1, 7, 13, 20, 60, 99):
        labels = sample.make_labels("data", count, 10, 0, COUNTS)
        share = labels.bincount(minlength=10) - torch.tensor(COUNTS) * count / 20
        assert len(labels) == count and (share.abs() < 1).all() and torch.equal(labels, labels.sort().values)
    assert sample.make_labels("data", 4, 3, 0, [5, 3, 2]).tolist() == [0, 0, 1, 2]      # 2, 1.2, 0.8
    assert sample.make_labels("data", 2, 3, 0, [50, 26, 24]).tolist() == [0, 1]         # 1, 0.52, 0.48
    for wrong in (("12", 5, 10), ("10", 5, 10), ("-1", 5, 10), ("cats", 5, 10), ("", 5, 10), ("1,,2", 5, 10),
                  ("data", 5, 10), ("data", 5, 10, 0, [1, 2]), ("balanced", 0, 10), ("random", -3, 10)):
        with pytest.raises(ValueError):
            sample.make_labels(*wrong)


# ---- sheets and animations -------------------------------------------------------------------------

def cells(sheet, rows, columns, scale=7, side=8):
    """The pictures in a contact sheet, (rows, columns, side, side[, 3]): captions are left of them."""
    pixels, cell = np.asarray(sheet), scale * side + 2
    pixels = pixels[2:2 + rows * cell, sheet.width - columns * cell:]
    return np.stack([np.stack([pixels[i * cell:, j * cell:][:cell - 2, :cell - 2][3::scale, 3::scale]
                               for j in range(columns)]) for i in range(rows)])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_puts_every_pixel_in_its_place(channels):
    pictures = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    sheet = sample.contact_sheet(pictures, columns=3)
    assert sheet.size == (2 + 3 * 58, 2 + 2 * 58)       # 8·7 pixels, 2 between
    found = cells(sheet, 2, 3).reshape(6, 8, 8, 3)
    assert (found[:5] == pictures.permute(0, 2, 3, 1).numpy()).all() and (found[5] == 255).all()
    captioned = sample.contact_sheet(pictures, 3, ["seven", "日本"])
    assert captioned.width > sheet.width and np.asarray(captioned)[:, :20].min() < 128      # there is ink
    assert (cells(captioned, 2, 3) == cells(sheet, 2, 3)).all()
    uneven = sample.labelled_grid(pictures, torch.tensor([3, 1, 3, 1, 3]), range(10))       # no rows by class
    assert (cells(uneven, 2, 3) == cells(sample.contact_sheet(pictures[[0, 2, 4, 1, 3]], 3), 2, 3)).all()


def test_a_trajectory_goes_from_the_noise_to_the_picture(ckpt, tmp_path):
    net, decode = sample.load(ckpt)
    labels, path = torch.tensor([1, 2]), tmp_path / "t.gif"
    sample.trajectory(net, decode, labels, path, steps=5)
    noise = sample.noise_for(range(2), (1, 8, 8), 0)
    leads_to = noise - net(noise, torch.ones(2), torch.full((2,), 0.8), labels)
    state = 0.2 * leads_to + 0.8 * noise                                        # at t = 0.8
    last = sample.draw(net, labels, range(2), sample.uniform_grid(5))
    with Image.open(path) as gif:
        assert gif.n_frames == 6 and gif.info["loop"] == 0
        for frame, rows in ((0, [noise, leads_to]), (1, [state]), (5, [last, last])):
            gif.seek(frame)
            shown = cells(gif.convert("L"), 2, 2).astype(int)[:len(rows)]
            assert np.abs(shown - decode(torch.stack(rows))[:, :, 0].numpy()).max() <= 1
    assert os.listdir(tmp_path) == ["t.gif"]


# ---- the commands ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, name, labels", [
    ([], "grid_ode_nfe2_ema.png", list(range(10))),                             # beside the checkpoint
    (["--labels", "3,1,4", "--raw"], "grid_ode_nfe2_raw.png", [3, 1, 4])])     # rows in the order typed
def test_the_grid_has_a_row_of_ten_for_each_class(flags, name, labels, ckpt, command):
    status, out, err = command("--ckpt", ckpt, "--nfe", 2, *flags)
    n, weights = len(labels), name[-7:-4]
    assert (status, err) == (0, "") and f"{name}: {10 * n} pictures of {ckpt}" in out
    assert f"weights {weights}, nfe 2, times [1.0, 0.5, 0.0]" in out and "seed 0" in out
    net, decode = sample.load(ckpt, weights)
    drawn = decode(sample.draw(net, torch.tensor(labels * 10), range(10 * n), [1, 0.5, 0]))
    shown = cells(Image.open(ckpt.parent / name).convert("L"), n, 10).astype(int)
    assert np.abs(shown - drawn.view(10, n, 8, 8).transpose(0, 1).numpy()).max() <= 1


MANY = ["--device", "cpu", "--samples", "22", "--batch", "4", "--labels", "random", "--seed", "3",
        "--grid", "1,0.55,0", "--sampler", "consistency"]


@pytest.fixture
def whole(ckpt, command, tmp_path_factory):
    """The .npz of one process that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole") / "a.npz"
    assert command("--ckpt", ckpt, *MANY, "--out", path)[0] == 0 and os.listdir(path.parent) == ["a.npz"]
    return path


def test_npz_and_folder_hold_the_drawn_pictures_and_labels(ckpt, whole, command, tmp_path):
    with np.load(whole) as file:
        pictures, labels = file["arr_0"], file["arr_1"]
    assert pictures.shape == (22, 8, 8, 1) and pictures.dtype == np.uint8 and labels.dtype == np.int64
    expected = sample.make_labels("random", 22, 10, 3)
    assert (labels == expected.numpy()).all()
    net, decode = sample.load(ckpt)
    drawn = [decode(sample.draw(net, expected, range(k, min(22, k + 4)), [1, 0.55, 0], "consistency", 3))
             for k in range(0, 22, 4)]
    assert (torch.cat(drawn).permute(0, 2, 3, 1).numpy() == pictures).all()


def test_two_processes_write_the_same_bytes_as_one(ckpt, whole, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    ran = subprocess.run([*two, str(ROOT / "sample.py"), "--ckpt", str(ckpt), *MANY, "--out", "a.npz"],
                         cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0 and ran.stdout.count("wrote a.npz") == 1, ran.stderr
    assert os.listdir(tmp_path) == ["a.npz"] and (tmp_path / "a.npz").read_bytes() == whole.read_bytes()


KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data, sample
die, write = lambda *_: os.kill(os.getpid(), signal.SIGKILL), data.Shards.write
if sys.argv.pop(1) == "drawing":
    data.Shards.write = lambda self, rows, **a: die() if rows.start == 8 else write(self, rows, **a)
else:
    data.Shards.join = die
data.run(sample.main)
"""


@pytest.mark.parametrize("where, first", [("drawing", 8), ("joining", 22)])
def test_killed_and_typed_again_it_goes_on(where, first, ckpt, whole, command, tmp_path, monkeypatch):
    words, path = ["--ckpt", str(ckpt), *MANY, "--out", str(tmp_path / "a.npz")], tmp_path / "a.npz"
    path.write_text("an old file")
    killed = subprocess.run([sys.executable, "-c", KILLED, where, *words], env=ENV, timeout=600)
    assert killed.returncode == -signal.SIGKILL and path.read_text() == "an old file"
    draw, drawn = sample.draw, set()
    monkeypatch.setattr(sample, "draw", lambda net, y, rows, *a: drawn.update(rows) or draw(net, y, rows, *a))
    assert command(*words, "--seed", 4)[0] == 0         # another run is not mixed in
    assert drawn == set(range(22)) and path.read_bytes() != whole.read_bytes()
    drawn.clear()
    assert command(*words)[0] == 0
    assert drawn == set(range(first, 22))
    assert path.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("a.npz.*"))


@pytest.mark.parametrize("words, said", [
    ("", "--ckpt"), ("--ckpt missing.pt", "missing.pt"), ("--ckpt .", "directory"),
    ("--ckpt cut.pt", "cut.pt"), ("CKPT --nfe 0", "--nfe 0"), ("CKPT --nfe -3", "--nfe -3"),
    ("CKPT --nfe many", "invalid int"), ("CKPT --grid 1,1,0", "falling"), ("CKPT --grid 1,x,0", "x"),
    ("CKPT --grid 0.8,0", "starts at 0.8"), ("CKPT --nfe 1 --grid 1,0", "not allowed"),
    ("CKPT --sampler euler", "invalid choice"), ("CKPT --labels 10", "0 to 9"),
    ("CKPT --labels 1,cat", "random, balanced, data"), ("CKPT --labels=", "random, balanced, data"),
    ("CKPT --samples 0", "--samples 0"), ("CKPT --batch 0", "--batch"), ("CKPT --seed -1", "seeds"),
    ("CKPT --device banana", "banana"), ("CKPT --devise cpu", "unrecognized"), ("CKPT --grid=", "grid|float"),
    ("CKPT --out a.jpg", "a.jpg"), ("CKPT --out cut.pt/a.png", "cut.pt"), ("CKPT --out many/", "many")])
def test_a_wrong_command_ends_in_one_line_and_status_2(words, said, ckpt, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cut.pt").write_bytes(ckpt.read_bytes()[:5000])
    Path("full/mine").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command("--out", "never.png", *words.replace("CKPT", f"--ckpt {ckpt}").split())
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("sample.py: error: ")
    assert re.search(said, err) and sorted(tmp_path.rglob("*")) == before, err
