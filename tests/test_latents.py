"""
Latents: prepared by data.py with a small stand-in for the VAE, killed, divided over processes; trained on.

    python -m pytest -q tests/test_latents.py

Runs that are killed, or that are several, are real processes, forked from this one: torch is imported once.
"""
import json
import os
import shutil
import signal
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import fid  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

BAD = {"a/07.png", "b/00.jpg", "c/12.webp"}         # what tree() damages
FILES = ("moments.npy", "labels.npy", "stats.npy", "meta.json")


class TinyVAE:
    """Any function of the pictures will do. This one looks at the whole batch, too: so it tells on chunks
    that are put together in another way."""

    about = {"name": "tiny", "sha256": "0" * 64}

    def encode(self, x):
        y = torch.nn.functional.avg_pool2d(x, 8)                                          # (n, 3, h, w)
        y = torch.cat([3 * y, y[:, :1].square()], 1) + 0.01 * x.mean()         # (n, 4, h, w)
        return y, (y - 2).clamp(-30, 20)

    def decode(self, z):
        return torch.nn.functional.interpolate(z[:, :3] / 3, scale_factor=8.0)


def find_tiny(weights=None, name="ema", device="cpu", download=True, sha256=None):
    if sha256 not in (None, TinyVAE.about["sha256"]):
        raise data.UserError("another VAE")
    return TinyVAE()


def tiny_file(weights=None, name="ema"):
    return Path("tiny.pt"), TinyVAE.about, ()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(data.tqdm, "monitor_interval", 0)       # no thread that a fork would leave behind
    if "find_vae" not in os.environ.get("PYTEST_CURRENT_TEST", ""):
        monkeypatch.setattr(data, "find_vae", find_tiny)
        monkeypatch.setattr(data, "vae_file", tiny_file)


def tree(root):
    """44 small pictures in three classes, of several sizes, modes and formats; three are damaged."""
    rng = np.random.default_rng(0)
    modes = dict(png=["RGB", "L", "RGBA", "P", "1", "I;16", "LA"], jpg=["RGB", "L", "CMYK"], webp=["RGB"])
    for name, count in (("a", 20), ("b", 4), ("c", 20)):
        (root / name / "deeper").mkdir(parents=True)
        for i in range(count):
            kind = {"a": "png", "b": "jpg", "c": "webp"}[name]
            mode = modes[kind][i % len(modes[kind])]
            size = (int(rng.integers(20, 90)), int(rng.integers(20, 90)))
            pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            im = Image.fromarray(pixels).resize((4, 4)).resize(size)
            im = Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257) if mode == "I;16" \
                else im.convert(mode)
            path = root / name / ("deeper" if i % 3 == 2 else "") / f"{i:02d}.{kind}"
            im.save(path)
    for bad in BAD:
        path = next(root.glob(bad.replace("/", "/**/")))
        path.write_bytes(path.read_bytes()[:40])
    return root


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("imagenet") / "train")


@pytest.fixture(scope="module")
def mine(src, tmp_path_factory):
    """Prepared once, without interruption, by one process."""
    out = tmp_path_factory.mktemp("prepared") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "find_vae", find_tiny)
        patch.setattr(data, "vae_file", tiny_file)
        data.latents(src, out, **SMALL)
    return out


SMALL = dict(size=32, batch=2, device="cpu")                    # 22 chunks
PREPARE = ["imagenet", "--size", "32", "--batch", "2", "--device", "cpu"]


def start(folder, program, args, hook=lambda: None, **env):
    """A process that runs main() of `program` (data or train) as from the command line -> its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(60)
        for fd, name in ((1, "out"), (2, "err")):
            file = folder / f"{name}{env.get('RANK', 0)}.txt"
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.environ.update({k: str(v) for k, v in env.items()})
        hook()
        sys.argv = [f"{program.__name__}.py", *map(str, args)]
        data.run(program.main)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def together(folder, program, args, world, hook=lambda: None):
    """The exit statuses of `world` processes that do one thing together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [end(pid) for pid in [start(folder, program, args, hook, RANK=rank, LOCAL_RANK=rank, **env)
                                 for rank in range(world)]]


def same_files(a, b):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


# ---- preparing ---------------------------------------------------------------------------------------


def test_moments_labels_and_record_are_those_of_the_sorted_good_files(src, mine):
    files, labels, names = data.listing(src)
    bad = [i for i, p in enumerate(files) if isinstance(data._attempt(p, 32), str)]
    assert len(files) == 44 and len(bad) == 3
    meta = json.loads((mine / "meta.json").read_text())
    assert {p.replace("deeper/", "") for p in meta["left_out"]} == BAD and meta["classes"] == 3
    assert meta["kind"] == "latents" and meta["names"] == ["a", "b", "c"] and meta["shape"] == [4, 4, 4]
    assert (meta["size"], meta["crop"], meta["precision"]) == (32, "lanczos", "fp32")
    assert meta["vae"] == TinyVAE.about and len(meta["key"]) == 64 and meta["count"] == 41

    rows = []
    for k in range(0, 44, 2):                                   # chunk by chunk, holes black
        u = [data._attempt(p, 32) for p in files[k:k + 2]]
        u = np.stack([np.zeros((3, 32, 32), np.uint8) if isinstance(x, str) else x for x in u])
        mean, logvar = TinyVAE().encode(torch.from_numpy(u).float() / 127.5 - 1)
        rows.append(torch.cat([mean, logvar], 1).half())
    expected = np.delete(torch.cat(rows).numpy(), bad, 0)
    moments = np.load(mine / "moments.npy")
    assert moments.dtype == np.float16 and np.array_equal(moments, expected)
    assert np.load(mine / "labels.npy").tolist() == np.delete(labels, bad).tolist()


def test_statistics_are_those_of_posterior_samples(mine):
    mean, logvar = np.split(np.load(mine / "moments.npy").astype(np.float64), 2, 1)
    stats = np.load(mine / "stats.npy")
    assert stats.dtype == np.float64
    assert np.allclose(stats[0], mean.mean(0), rtol=1e-12, atol=1e-14)
    assert np.allclose(stats[1], mean.var(0) + np.exp(logvar).mean(0), rtol=1e-12)
    ds = data.load(mine)                                        # and so normalised samples are N(0, 1)
    x = ds._read(np.arange(41)).repeat(500, 1, 1, 1)
    z = ds.sample(x, torch.randn(len(x), 4, 4, 4, generator=data.generator(1)))
    assert z.mean(0).abs().max() < 0.03 and (z.var(0) - 1).abs().max() < 0.05


def kill_at(name, count):
    """A hook: the process kills itself when something gets, or loses, its `count`-th name like `name`."""
    def hook():
        seen = [0]

        def watched(function):
            def call(*args, **kwargs):
                seen[0] += name in str(args[-1])
                if seen[0] >= count and name in str(args[-1]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        os.replace = watched(os.replace)
        removed = watched(lambda path: os.unlink(path))
        Path.unlink = lambda self, missing_ok=False: removed(self) if self.exists() else None
    return hook


@pytest.mark.parametrize("point", [("chunks", 16), ("preparing.json", 2), ("preparing.json", 3),
                                   ("chunks", 30), ("stats.npy", 1), ("meta.json", 1)],
                         ids=["encoding", "before the first entry", "between entries", "after an entry",
                              "before statistics", "before meta.json"])
def test_killed_and_continued_equals_uninterrupted(src, mine, tmp_path, point):
    out = tmp_path / "mine"
    args = [*PREPARE, "--src", src, "--out", out]
    assert end(start(tmp_path, data, args, kill_at(*point))) == -signal.SIGKILL
    left = sorted(p.name for p in out.rglob("*"))
    assert "meta.json" not in left and "preparing.json" in left, left
    if point[0] == "meta.json":
        assert "moments.npy" in left                            # renamed already: must not be done again
    encoded = []
    plain, data.encode = data.encode, lambda *args: encoded.append(1) or plain(*args)
    try:
        data.latents(src, out, **SMALL)
    finally:
        data.encode = plain
    assert len(encoded) == (22 - 15 if point == ("chunks", 16) else 0)
    same_files(out, mine)


def test_two_processes_one_of_them_killed_and_then_three_write_the_same_bytes(src, mine, tmp_path):
    out = tmp_path / "mine"
    args = [*PREPARE, "--src", src, "--out", out]
    assert together(tmp_path, data, args, 2) == [0, 0], (tmp_path / "err0.txt").read_text()
    same_files(out, mine)
    said = [(tmp_path / f"out{rank}.txt").read_text() for rank in (0, 1)]
    told, wrote, where = said[0].splitlines()
    assert told == (f"44 pictures in 3 classes, each a folder in {src}: a, b, c; "
                    "their latents take 1.18e-05 GB")
    assert not said[1]
    assert wrote.startswith(f"wrote {out}: 41 latents, shape 4x4x4")
    assert where.endswith(f"{data.cache_folder() / 'tiny'}: put a copy there")

    shutil.rmtree(out)
    assert end(start(tmp_path, data, args, kill_at("chunks", 20))) == -signal.SIGKILL
    assert together(tmp_path, data, args, 3) == [0, 0, 0], (tmp_path / "err0.txt").read_text()
    same_files(out, mine)
    assert together(tmp_path, data, args, 2) == [0, 0]          # nothing to do
    assert "already prepared" in (tmp_path / "out0.txt").read_text()
    wrong = [*PREPARE, "--src", src, "--out", src / "below"]
    assert together(tmp_path, data, wrong, 2) == [2, 2]         # said once
    assert "among the pictures" in (tmp_path / "err0.txt").read_text()
    assert not (tmp_path / "err1.txt").read_text()


def test_limit_spreads_over_classes_and_is_part_of_the_whole(src, tmp_path):
    labels = [0] * 5 + [1] * 2 + [2] * 4
    assert data.spread(labels, 6) == [0, 1, 5, 6, 7, 8] and data.spread(labels, 99) == list(range(11))
    assert data.spread(labels, 4) == [0, 1, 5, 7] and data.spread(labels, 8) == [0, 1, 2, 5, 6, 7, 8, 9]
    data.latents(src, tmp_path / "few", limit=9, **SMALL)
    ds = data.load(tmp_path / "few")
    assert ds.describe()["label_counts"] == [3, 2, 3] and ds.names == ["a", "b", "c"]  # b/00 is damaged


def test_adm_crop(tmp_path):
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 301, 3), dtype=np.uint8))
    im.save(tmp_path / "a.png")
    expected = im.resize((150, 50), Image.Resampling.BOX).resize((75, 25), Image.Resampling.BOX)
    expected = expected.resize((48, 16), Image.Resampling.BICUBIC).crop((16, 0, 32, 16))
    found = data.picture(tmp_path / "a.png", 16, "adm").transpose(1, 2, 0)
    assert np.array_equal(found, np.asarray(expected))
    assert not np.array_equal(found, data.picture(tmp_path / "a.png", 16).transpose(1, 2, 0))


def test_folder_with_latents_is_the_same_machinery(src, mine, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", "folder", "--src", str(src), "--size", "32", "--batch", "2",
                                      "--device", "cpu", "--latents", "--out", str(tmp_path / "mine")])
    data.main()
    same_files(tmp_path / "mine", mine)


def test_wrong_commands_get_one_line(src, mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    half = tmp_path / "half"
    assert end(start(tmp_path, data, [*PREPARE, "--src", src, "--out", half], kill_at("chunks", 9))) < 0
    (tmp_path / "junk").mkdir()
    for i in range(3):
        (tmp_path / "junk" / f"{i}.png").write_text("no picture")
    imagenet, to = ["imagenet", "--src", src, "--device", "cpu"], ["--out", "o"]
    full = SimpleNamespace(free=1000)
    wrong = [
        (["imagenet"], "--src"),
        ([*imagenet, "--size", 250, *to], "multiple of 8"),
        ([*imagenet, "--size", 8, *to], "between 16 and 1024"),
        ([*imagenet, "--batch", 0, *to], "--batch 0: give 1"),
        ([*imagenet, "--limit", -1, *to], "--limit -1: give 1"),
        ([*imagenet, "--crop", "left", *to], "invalid choice"),
        ([*imagenet, "--precision", "fp16", *to], "invalid choice"),
        ([*imagenet, "--vae", "big", *to], "invalid choice"),
        (["imagenet", "--src", src, "--device", "abacus", *to], "not to be had"),
        (["imagenet", "--src", "nowhere", *to], "not a folder"),
        ([*imagenet, "--out", src / "a" / "out"], "among the pictures"),
        ([*imagenet, "--out", mine], "already holds another data set, made with --size 32, --batch 2: give"),
        ([*imagenet, "--size", 32, "--out", half], "the beginning of another data set, made with --batch 2:"),
        (["imagenet", "--src", "junk", "--size", 32, "--device", "cpu", *to], "none of the 3 pictures"),
        (["folder", "--src", src, "--size", 32, "--crop", "adm", *to], "--crop does nothing without"),
        (["vae-check", "nowhere.png"], "cannot be read"),
        (["vae-check", next(src.glob("a/*.png")), "--size", 30, "--device", "cpu"], "multiple of 8"),
        (["vae-check", "nowhere.png", "--size", 0], "multiple of 8"),
    ]
    for args, words in wrong:
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            data.run(data.main)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith(("skipped", "encoding", "\r"))]
        said = [line for line in out.splitlines() if "pictures in" not in line]
        assert stop.value.code == 2 and not said and len(lines) == 1, (args, out, err)
        assert "error: " in lines[0] and words in lines[0], (args, err)
        assert not (tmp_path / "o" / "meta.json").exists()
    assert not list((tmp_path / "o").iterdir())                 # of junk nothing is left
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(data.UserError, match="needs 0.000736 GB more for 44 pictures, and 1e-06 GB"):
        data.latents(src, tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


def test_what_is_finished_or_impossible_asks_for_no_vae(src, mine, tmp_path, monkeypatch, capsys):
    def none(*args, **kwargs):
        raise AssertionError("a VAE was fetched")
    monkeypatch.setattr(data, "find_vae", none)
    data.latents(src, mine, **SMALL)
    assert "is already prepared: 41 latents" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    with pytest.raises(data.UserError, match="are free"):
        data.latents(src, tmp_path / "new", **SMALL)


def test_chunks_hold_fewer_pictures_where_these_are_large(src, tmp_path, monkeypatch):
    batch = {}
    monkeypatch.setattr(data, "_plan", lambda src, out, limit, settings: batch.update(
        {settings["size"]: settings["batch"]}))
    for size in (16, 256, 512, 1024):
        data.latents(src, tmp_path / "o", size, device="cpu")
    assert batch == {16: 64, 256: 64, 512: 16, 1024: 4}


def test_every_process_asks_for_the_vae_of_the_first(src, tmp_path):
    """On another node --weights may be another file of the same name."""
    def hook():
        if os.environ["RANK"] == "1":
            TinyVAE.about = {"name": "tiny", "sha256": "1" * 64}       # find_tiny refuses what differs
    assert together(tmp_path, data, [*PREPARE, "--src", src, "--out", tmp_path / "o"], 2, hook) != [0, 0]
    assert "another VAE" in (tmp_path / "err1.txt").read_text()
    assert not (tmp_path / "o" / "meta.json").exists()


def test_a_vae_without_finite_numbers_is_not_believed(src, tmp_path, monkeypatch):
    def broken(self, x):
        return [x[:, :1, ::8, ::8].expand(-1, 4, -1, -1) / 0] * 2
    monkeypatch.setattr(TinyVAE, "encode", broken)
    with pytest.raises(data.UserError, match="gives infinities or NaN"):
        data.latents(src, tmp_path / "o", **SMALL)


def test_vae_check_writes_both_pictures_and_the_psnr(src, tmp_path, monkeypatch, capsys):
    path = next(src.glob("a/*.png"))
    monkeypatch.setattr(sys, "argv", ["data.py", "vae-check", str(path), "--size", "32", "--device", "cpu",
                                      "--out", str(tmp_path / "both.png")])
    data.main()
    both = np.asarray(Image.open(tmp_path / "both.png")).astype(float)
    assert both.shape == (32, 64, 3)
    assert np.array_equal(both[:, :32], data.picture(path, 32).transpose(1, 2, 0))
    psnr = 10 * np.log10(255**2 / ((both[:, :32] - both[:, 32:]) ** 2).mean())
    assert f"PSNR {psnr:.2f} dB" in capsys.readouterr().out


def test_find_vae_from_a_file_a_folder_and_the_cache(tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = {k: torch.randn_like(v) * 0.05 for k, v in data.VAE((32, 32, 32, 32)).state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    header, raw = {}, b""
    for name, tensor in state.items():
        part = tensor.numpy().tobytes()
        where = [len(raw), len(raw) + len(part)]
        header[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=where)
        raw += part
    header = json.dumps(header).encode()
    published = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    published.parent.mkdir()
    published.write_bytes(struct.pack("<Q", len(header)) + header + raw)
    sha256 = data.checksum_of(published)
    weights = {"ema": ("vae.safetensors", sha256, len(raw), ["http://127.0.0.1:9/v"])}
    monkeypatch.setattr(data, "VAE_WEIGHTS", weights)
    monkeypatch.setenv("ALPHAFLOW_CACHE", str(tmp_path / "cache"))
    assert data.cache_folder() == tmp_path / "cache"

    x = torch.rand(2, 3, 32, 32) * 2 - 1
    one, two = data.find_vae(tmp_path / "a.pt"), data.find_vae(published.parent)
    assert torch.equal(one.encode(x)[0], two.encode(x)[0]) and one.encode(x)[0].shape == (2, 4, 4, 4)
    assert one.about == {"name": "a.pt", "sha256": data.checksum_of(tmp_path / "a.pt")}
    assert two.about == {"name": "vae", "sha256": sha256}
    with pytest.raises(data.UserError, match="vae-check PICTURE downloads it"):
        data.find_vae(download=False)
    with pytest.raises(data.UserError, match="in another way and put it at"):
        data.find_vae()
    with pytest.raises(data.UserError, match="holds vae.safetensors"):
        data.find_vae(tmp_path)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(data.UserError, match="not the weights of a VAE"):
        data.find_vae(tmp_path / "other.pt")
    (tmp_path / "cache" / "vae.safetensors").write_bytes(b"half of it")       # as if damaged
    with pytest.raises(data.UserError, match="vae-check PICTURE downloads it"):
        data.find_vae(download=False)
    shutil.copy(published, tmp_path / "cache" / "vae.safetensors")
    assert data.find_vae(download=False).about == data.find_vae().about == two.about
    # What a data set says of its VAE finds it again: a published one, or one's own, put into the cache.
    assert data.find_vae(name=two.about["name"]).about == two.about
    with pytest.raises(data.UserError, match="put its file a.pt into"):
        data.find_vae(name="a.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "cache" / "a.pt")
    assert data.find_vae(name="a.pt", sha256=one.about["sha256"]).about == one.about
    torch.save({k: v * 2 for k, v in state.items()}, tmp_path / "cache" / "a.pt")
    with pytest.raises(data.UserError, match="another VAE"):
        data.find_vae(name="a.pt", sha256=one.about["sha256"])


# ---- the data set ------------------------------------------------------------------------------------


def test_batches_are_rank_interleaved_and_those_of_pictures(mine):
    ds = data.load(mine, seed=3)
    assert isinstance(ds, data.Latents) and ds.shape == (4, 4, 4) and len(ds) == 41 and ds.classes == 3
    about = ds.describe()
    assert about["kind"] == "latents" and about["shape"] == [4, 4, 4] and about["count"] == 41
    for step in (0, 2, 7):
        x, y = ds.batch(step, batch_size=12)
        assert x.dtype == torch.float16 and x.shape == (12, 8, 4, 4)
        rows = ds._rows(step, 12)
        assert np.array_equal(x.numpy(), np.load(mine / "moments.npy")[rows])
        assert y.tolist() == np.load(mine / "labels.npy")[rows].tolist()
        for rank in range(3):
            xr, yr = ds.batch(step, rank, 3, 12)
            assert torch.equal(xr, x[rank::3]) and torch.equal(yr, y[rank::3])


def test_sample_in_closed_form(mine):
    ds = data.load(mine)
    x, _ = ds.batch(0, batch_size=5)
    noise = torch.randn(5, 4, 4, 4, generator=data.generator(0))
    mean, logvar = np.split(x.numpy().astype(np.float64), 2, 1)
    stats = np.load(mine / "stats.npy")
    expected = (mean + np.exp(logvar / 2) * noise.numpy() - stats[0]) / np.sqrt(stats[1])
    z = ds.sample(x, noise)
    assert z.dtype == torch.float32 and np.allclose(z.numpy(), expected, atol=1e-5)
    assert ds.mean.dtype == ds.std.dtype == torch.float32 and ds.mean.shape == ds.std.shape == (4, 4, 4)
    digits = data.load("digits")
    x, _ = digits.batch(0, batch_size=5)
    assert digits.sample(x) is x and digits.sample(x, noise) is x


def test_posterior_noise_is_fresh_in_each_step_and_disturbs_nothing_else():
    recipe = train.resolve(train.parse_flags(["--batch", "6"]))
    def draw(step, latents=True):
        return train.draw(recipe, step, (4, 2, 2), "cpu", latents)
    a, again, b, plain = draw(3), draw(3), draw(4), draw(3, False)
    assert a["posterior"].shape == (6, 4, 2, 2) and "posterior" not in plain
    assert all(torch.equal(a[k], again[k]) for k in a) and all(torch.equal(a[k], plain[k]) for k in plain)
    assert not torch.equal(a["posterior"], b["posterior"]) and not torch.equal(a["posterior"], a["e"])


def test_a_flip_mirrors_moments_and_stores_nothing(mine):
    plain, mirrored = (data.load(mine, seed=3, flip=flip).batch(5, batch_size=12)[0]
                       for flip in (False, True))
    turned = [not torch.equal(a, b) for a, b in zip(plain, mirrored)]
    assert 2 < sum(turned) < 10
    assert all(torch.equal(b, a.flip(-1) if t else a) for a, b, t in zip(plain, mirrored, turned))


def test_the_real_pictures_are_those_that_the_vae_saw(src, mine, tmp_path):
    ds = data.load(mine)
    real = fid.from_dataset(ds)
    assert (real.count, real.shape) == (41, (3, 32, 32)) and not {Path(f) for f in ds.files} & BAD
    for k in (0, 17, 40):                               # the moments of picture k are made of picture k
        u = real.read([k])[0]
        assert torch.equal(u, torch.tensor(data.picture(ds.files[k], 32)))
        mean = torch.nn.functional.avg_pool2d(u.float() / 127.5 - 1, 8) * 3
        assert (torch.from_numpy(ds.images[k, :3].astype(np.float32)) - mean).abs().max() < 0.1
    moved = shutil.copytree(src, tmp_path / "src")
    data.latents(moved, tmp_path / "out", **SMALL, limit=9)
    assert len(fid.from_dataset(data.load(tmp_path / "out")).read(range(8))) == 8
    next(file for file in data.load(tmp_path / "out").files).unlink()
    with pytest.raises(data.UserError, match="has changed"):
        fid.from_dataset(data.load(tmp_path / "out"))
    shutil.rmtree(moved)
    with pytest.raises(data.UserError, match="not at"):
        fid.from_dataset(data.load(tmp_path / "out"))


@pytest.mark.parametrize("name, spoil", [
    ("moments.npy", lambda a: a[:-1]), ("moments.npy", lambda a: a.astype(np.float32)),
    ("moments.npy", lambda a: a[:, :4]), ("stats.npy", lambda a: a[:1]), ("stats.npy", lambda a: a * 0),
    ("labels.npy", lambda a: a[1:])])
def test_files_that_do_not_fit_together(mine, tmp_path, name, spoil):
    shutil.copytree(mine, tmp_path / "mine")
    np.save(tmp_path / "mine" / name, spoil(np.load(mine / name)))
    with pytest.raises(data.UserError, match="does not fit together"):
        data.load(tmp_path / "mine")


# ---- training ----------------------------------------------------------------------------------------


def keep():
    whole = train.save

    def save(path, state):
        whole(path, state)
        shutil.copy(path, path.with_name(f"step{state['step']}.pt"))
    train.save = save


def test_training_one_process_two_processes_and_resumed(mine, tmp_path):
    def flags(out):
        return ["--data", mine, "--model", "Ti/2", "--batch", "8", "--steps", "3", "--lr", "1e-3",
                "--warmup", "1", "--device", "cpu", "--log-every", "1", "--save-every", "1",
                "--out", tmp_path / out]

    def network(path):
        return torch.cat([w.flatten() for k in ("net", "ema") for w in sample.read(path)[k].values()])

    assert end(start(tmp_path, train, flags("one"), keep)) == 0, (tmp_path / "err0.txt").read_text()
    ckpt = sample.read(tmp_path / "one" / "ckpt.pt")
    ds = data.load(mine)
    assert ckpt["data"]["kind"] == "latents" and ckpt["config"]["model"]["channels"] == 4
    assert torch.equal(ckpt["latents"]["mean"], ds.mean) and torch.equal(ckpt["latents"]["std"], ds.std)
    assert not [*(tmp_path / "one").glob("samples_*"), *(tmp_path / "one").glob("*.gif")]
    assert "trajectory.gif" not in (tmp_path / "out0.txt").read_text()

    one = network(tmp_path / "one" / "ckpt.pt")
    resume = ["--resume", tmp_path / "one" / "step2.pt", "--out", tmp_path / "on", "--device", "cpu"]
    assert end(start(tmp_path, train, resume)) == 0, (tmp_path / "err0.txt").read_text()
    assert torch.equal(network(tmp_path / "on" / "ckpt.pt"), one)

    assert together(tmp_path, train, flags("two"), 2) == [0, 0], (tmp_path / "err0.txt").read_text()
    assert (network(tmp_path / "two" / "ckpt.pt") - one).abs().max() < 1e-4
    first = [json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[0]) for out in ("one", "two")]
    assert first[0]["err"] == pytest.approx(first[1]["err"], rel=1e-5)      # the same latents, exactly


def test_what_training_on_latents_refuses(mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for args, words in [(["--eval-every", 1], "needs a GPU and the VAE"),
                        (["--model", "B/2", "--data", "imagenet256"], "data.py imagenet --src"),
                        (["--model", "Ti/3"], "not divisible by patch 3")]:
        flags = ["--data", str(mine), "--device", "cpu", *map(str, args)]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        with pytest.raises(SystemExit) as stop:
            data.run(train.main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and words in err, err


def test_training_says_why_it_draws_no_pictures(mine, monkeypatch):
    ds, said = data.load(mine), []
    def none(download, name, sha256):
        raise data.UserError(f"no {sha256}")
    monkeypatch.setattr(data, "find_vae", none)
    for device, reason in (("cpu", "takes seconds a picture on a CPU"), ("cuda", "0" * 64)):
        assert train.decoder(ds, None, torch.device(device), said.append) is None
        assert said[-1].startswith("no pictures during training") and reason in said[-1]


def test_other_statistics_than_those_of_the_run_are_refused(mine, tmp_path, monkeypatch, capsys):
    shutil.copytree(mine, tmp_path / "mine")
    run = ["--data", tmp_path / "mine", "--model", "Ti/4", "--batch", "4", "--steps", "2", "--device", "cpu",
           "--save-every", "1", "--out", tmp_path / "o"]
    assert end(start(tmp_path, train, run, keep)) == 0, (tmp_path / "err0.txt").read_text()
    np.save(tmp_path / "mine" / "stats.npy", np.load(mine / "stats.npy") * 1.5)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path / "o" / "step1.pt"),
                                      "--device", "cpu", "--out", str(tmp_path / "p")])
    with pytest.raises(SystemExit) as stop:
        data.run(train.main)
    assert stop.value.code == 2 and "statistics" in capsys.readouterr().err


def test_the_report_on_a_bad_step_holds_samples(mine, tmp_path):
    ds = data.load(mine)
    args = train.parse_flags(["--data", str(mine), "--model", "Ti/4", "--batch", "4", "--steps", "2",
                              "--device", "cpu", "--out", str(tmp_path / "o")])
    run = train.assemble(args, 0, 1, torch.device("cpu"))
    run.out.mkdir()
    with torch.no_grad():
        next(run.net.parameters()).fill_(float("nan"))
    with pytest.raises(SystemExit, match="non-finite"):
        train.train(run)
    found = torch.load(tmp_path / "o" / "nonfinite_rank0.pt", weights_only=True)
    noise = train.draw(run.recipe, 0, ds.shape, "cpu", True)
    assert torch.equal(found["x"], ds.sample(ds.batch(0, batch_size=4)[0], noise["posterior"]))
    assert "posterior" not in found
