"""Facts about fid.py from pictures to printed numbers: sources, sums, references, weights, commands.

    python -m pytest tests/test_measure.py

The real networks are tested in test_networks.py and are slow. Here a tiny one stands for them, in
float64, so that other batches and processes agree to ten digits. Nothing is fetched from elsewhere.
"""
import hashlib
import json
import os
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import data  # noqa: E402
import fid  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
import test_data  # noqa: E402
import test_train  # noqa: E402
from test_fid import fid_py, save  # noqa: E402
from test_networks import weights  # noqa: E402

lab, server = test_train.lab, test_data.server      # fixtures


class Tiny(nn.Module):
    """For Inception: 6 features, 4 spatial ones and 1008 logits, all of 4x4 pixels of its input."""
    dim = 6

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(48, 1018, generator=data.generator(5), dtype=torch.float64))

    def forward(self, x):
        x = x[:, :, 30:220:60, 30:220:60].flatten(1)
        return torch.tanh(x @ self.w / 3).split([6, 4, 1008], 1)


class Light(fid.Extractor):
    """An Extractor for Tiny; .seen counts the pictures that it was given."""
    seen = 0

    def dims(self, shape):
        spatial = {"spatial": 4} if self.network == "inception" else {}
        return {"features": 6, **spatial} if self.net else super().dims(shape)

    def __call__(self, u):
        self.seen += len(u)
        return super().__call__(u)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALPHAFLOW_CACHE", str(tmp_path / "cache"))
    for network, (name, sha256, _) in fid.WEIGHTS.items():          # nobody listens at port 9
        monkeypatch.setitem(fid.WEIGHTS, network, (name, sha256, ["http://127.0.0.1:9/" + name]))


@pytest.fixture
def light(tmp_path, monkeypatch):
    """fid.py with Light for its Extractor -> a weights file for it, which holds nothing."""
    monkeypatch.setattr(fid, "build_network", lambda kind, state: Tiny())
    monkeypatch.setattr(fid, "Extractor", Light)
    torch.save({}, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def pictures(n, h=9, w=7, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), np.uint8)


def chw(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def write(kind, path, array, **more):
    """The pictures in `array` (n, h, w, c) as one of the sources that fid.py can read -> its name."""
    n, h, w, c = array.shape
    path = Path(path).absolute()
    if "npz" in kind:
        path = path.with_suffix(".npz")
        (np.savez_compressed if "compressed" in kind else np.savez)(path, arr_0=array, **more)
    elif kind == "prepared":
        path.mkdir()
        np.save(path / "images.npy", chw(array))
        np.save(path / "labels.npy", np.arange(n) % 2)
        (path / "meta.json").write_text(json.dumps(dict(
            shape=[c, h, w], count=n, classes=2, names=["a", "b"], range=[0, 255], source="a test")))
    else:
        for k, picture in enumerate(array):
            file = path / (f"{k // 4}/deep/{k}.png" if kind == "class folders" else f"{k:03d}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.squeeze()).save(file)
    return str(path)


def refused(call, *words):
    """UserError in one line that says all the words."""
    with pytest.raises(data.UserError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and all(str(word) in line for word in words), line


# ------------------------------------------------------------------ sources


@pytest.mark.parametrize("kind", ["folder", "class folders", "npz", "compressed npz", "prepared"])
def test_every_source_gives_the_same_pictures_in_any_order_and_batch(kind):
    array = pictures(7)
    source, want = fid.open_pictures(write(kind, "x", array)), chw(array)
    assert (source.count, source.shape) == (7, (3, 9, 7)) and source.read([0]).dtype == torch.uint8
    for batch in (1, 3, 7):
        parts = [source.read(range(7)[i:i + batch]) for i in range(0, 7, batch)]
        assert torch.equal(torch.cat(parts), want)
    for order in ([6, 0, 3, 3], range(1, 7, 3)):
        assert torch.equal(source.read(order), want[list(order)])


def test_grey_palette_alpha_and_digits_fill_the_range_of_a_byte(tmp_path):
    grey = pictures(4, c=1)
    image, want = Image.fromarray(grey[0].squeeze()), chw(grey)[0].expand(3, -1, -1)
    image.save("0grey.png")
    image.convert("P").save("1palette.png")
    image.putalpha(Image.fromarray(np.full((9, 7), 102, np.uint8)))             # 40 % over white
    image.save("2alpha.png")
    plain, palette, alpha = fid.from_folder(tmp_path).read(range(3))
    assert torch.equal(plain, want) and torch.equal(palette, want)
    assert torch.allclose(alpha.float(), 0.4 * want + 0.6 * 255, atol=1)
    sides = [fid.open_pictures(write(kind, "grey", grey)) for kind in ("folder", "npz")]
    assert torch.equal(*(fid.prepare_tf(side.read(range(4))) for side in sides))
    digits = data.load("digits")                                                # 0 .. 16
    want = torch.from_numpy(np.round(digits.images[:50] * (255 / 16)).astype(np.uint8))
    assert torch.equal(fid.from_dataset(digits).read(range(50)), want) and want.max() == 255


def test_folders_that_cannot_be_measured_are_refused(tmp_path):
    two = Path(write("folder", "two", pictures(2)))
    Image.fromarray(pictures(1, 12, 8)[0]).save(two / "999.png")
    refused(lambda: fid.from_folder(two).read([0, 2]), two / "999.png", "8x12", "7x9", "--size")
    assert fid.from_folder(two, 6).read([2, 0]).shape == (2, 3, 6, 6)
    (two / "500.png").write_bytes((two / "999.png").read_bytes()[:60])
    refused(lambda: fid.from_folder(two, 6).read(range(3)), two / "500.png")
    (two / "000.png").write_bytes(b"no picture")                                # the first one: at once
    refused(lambda: fid.from_folder(two, 6), two / "000.png")


@pytest.mark.parametrize("what, words", [
    ("float", ["float32", "uint8"]), ("three axes", []), ("four channels", ["(4, 90, 70, 4)"]),
    ("Fortran order", ["Fortran"]), ("objects", ["object"]), ("no arr_0", ["arr_0"]), ("truncated", []),
    ("no zip", ["zip"]), ("empty", ["zip"]), ("lacks some", ["cut short"]), ("flipped", ["damaged"])])
def test_npz_files_that_cannot_be_measured_are_refused(what, words, tmp_path):
    x, path = pictures(4, 90, 70), tmp_path / "x.npz"
    arrays = {"float": x.astype(np.float32), "three axes": x[..., 0], "objects": x.astype(object),
              "four channels": x[..., [0, 1, 2, 0]], "Fortran order": np.asfortranarray(x)}
    (np.savez_compressed if what == "flipped" else np.savez)(
        path, **{"images" if what == "no arr_0" else "arr_0": arrays.get(what, x)})
    if what == "lacks some":
        with zipfile.ZipFile(path) as file:
            whole = file.read("arr_0.npy")
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("arr_0.npy", whole[:-200])
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[:-100], "no zip": b"pictures", "empty": b"",
                      "flipped": raw[:40000] + bytes(20) + raw[40020:]}.get(what, raw))
    refused(lambda: fid.open_pictures(str(path)).read(range(4)), path, *words)


def test_a_drawn_picture_depends_on_its_number_alone_and_is_never_written():
    save("ckpt.pt")
    net, decode = sample.load("ckpt.pt")
    source = fid.from_network(net, decode, 12, "random", [1, 0.5, 0], "consistency", seed=3)
    whole = source.read(range(12))
    assert whole.shape == (12, 1, 8, 8) and len(whole.unique(dim=0)) == 12
    for few in ([7], [11, 2], range(1, 12, 2)):
        assert torch.equal(source.read(few), whole[list(few)])
    assert os.listdir() == ["ckpt.pt"]


# ------------------------------------------------------------------ measuring


def measure(array, e, **options):
    u = chw(array)
    source = fid.Pictures("array", len(u), tuple(u.shape[1:]), lambda rows: u[list(rows)])
    return fid.measure(source, [e], **options)[e.name]


def distance(a, b):
    """The largest difference of two Measured in means and covariances, relative to the largest entry."""
    assert a.gaussians.keys() == b.gaussians.keys()
    pairs = [map(np.asarray, pair) for part in a.gaussians
             for pair in zip(a.gaussians[part], b.gaussians[part])]
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs)


@pytest.mark.parametrize("divisor", ["N-1", "N"])
def test_mean_and_covariance_are_numpys_whatever_batch_and_order(divisor, light):
    x, e = pictures(23), Light("inception", light)
    found = {part: rows.numpy() for part, rows in e(chw(x)).items()}
    want = fid.Measured({part: (found[part].mean(0), np.cov(found[part].T, bias=divisor == "N"))
                         for part in ("features", "spatial")})
    for order in range(23), np.random.default_rng(1).permutation(23):
        score = fid.inception_score(found["logits"][order])         # its splits follow the order
        for batch in 1, 4, 64:
            m = measure(x[order], e, batch=batch, divisor=divisor, keep=True)
            assert distance(m, want) < 1e-10 and m.score == approx(score, rel=1e-10) and score[0] > 1
            assert np.array_equal(m.rows, found["features"][order].astype(np.float32))
    assert measure(x, e).rows is None and measure(x, Light("pixels")).score is None
    for n in 0, 1:
        with pytest.raises(ValueError, match="at least 2 pictures"):
            measure(x[:n], e, divisor=divisor)


COUNTS = {2: (2, 3, 24), 3: (2, 4, 7)}              # processes: pictures, also fewer than processes


def one_rank():
    """What a process of the next test does."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fid.build_network = lambda kind, state: Tiny()
    torch.distributed.init_process_group("gloo")
    e, options = Light("inception", sys.argv[1]), dict(batch=2, keep=True, rank=rank, world=world)
    found = [asdict(measure(pictures(n), e, **options)) for n in COUNTS[world]]
    torch.save((found, e.seen), f"{rank}of{world}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_the_pictures_and_all_know_the_result_of_one(lab, light, tmp_path):
    hook = f"sys.path.insert(0, {str(HERE)!r})\nimport test_measure\nfid.main = test_measure.one_rank"
    for rank in [rank for world in COUNTS for rank in
                 lab.start_ranks(light, world=world, program="fid.py", hook=hook, cwd=tmp_path)]:
        lab.finish(rank).ok()
    for rank, world in [(rank, world) for world in COUNTS for rank in range(world)]:
        found, seen = torch.load(f"{rank}of{world}.pt", weights_only=False)
        assert seen == sum(len(range(rank, n, world)) for n in COUNTS[world])
        for n, theirs in zip(COUNTS[world], (fid.Measured(**m) for m in found), strict=True):
            ours = measure(pictures(n), Light("inception", light), keep=True)
            assert distance(theirs, ours) < 1e-12
            assert torch.equal(theirs.rows, ours.rows) if rank == 0 else theirs.rows is None
            assert theirs.score == approx(ours.score, rel=1e-12, abs=1e-12)


# ------------------------------------------------------------------ references


@pytest.fixture
def command(light, monkeypatch, capsys):
    """Runs fid.py with the stand-in -> what its JSON file holds, and what stderr."""
    def run(*words):
        tiny = {"grey.pt", "drawn"} & set(map(str, words))          # pixels are the default, without weights
        network = [] if tiny else ["--weights", light]
        status, out, err = fid_py(monkeypatch, capsys, *words, *network, "--json", "r.json")
        assert status == 0, err
        return json.loads(Path("r.json").read_text()), err
    return run


def test_statistics_are_written_and_read_back(command):
    made, real = (write("npz", str(seed), pictures(12, seed=seed)) for seed in (1, 2))

    def values(of, against):
        return command("--pictures", of, "--ref", against)[0]["metrics"]["inception"]

    direct = values(made, real)
    command("--pictures", real, "--save-stats", "s.npz")
    with np.load("s.npz", allow_pickle=False) as file:
        stats = dict(file)
    assert stats.keys() == {"mu", "sigma", "mu_s", "sigma_s", "protocol"}
    assert max(values(real, "s.npz")[name] for name in ("fid", "sfid")) < 1e-12
    assert values(made, "s.npz") == approx(direct, rel=1e-9)
    np.savez("ref.npz", ref_mu=stats["mu"], ref_sigma=stats["sigma"])     # as some tools do
    other = values(made, "ref.npz")
    assert other["fid"] == approx(direct["fid"], rel=1e-9) and "sfid" not in other


def test_adms_files_give_the_distance_by_statistics_and_neighbours_by_pictures(command, light):
    made, everyone, some = pictures(12, seed=1), pictures(30, seed=2), pictures(8, seed=3)
    e = Light("inception", light)
    a, b, c = (measure(x, e, keep=True) for x in (made, everyone, some))
    (mu, sigma), (mu_s, sigma_s) = b.gaussians.values()
    file = write("npz", "adm", some, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found, _ = command("--pictures", write("npz", "x", made), "--ref", file, "--kid", "--prdc")
    want = fid.compare(e, a, c, kid=True, prdc=True) | fid.compare(e, a, b)
    assert found["metrics"]["inception"] == approx(want, rel=1e-9)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("said, change", [
    ("allow_pickle=False", dict(mu=np.array([Trap()], object))), ("cannot be read", "truncated"),
    ("sigma", dict(sigma=None)), ("5 dimensions, inception 6", dict(mu=np.zeros(5), sigma=np.eye(5))),
    ("arr_0", dict(mu=None)), ("--prdc need pictures, not statistics", "--prdc"),
    ("preprocessing is", dict(preprocessing="nearest")),
    ("weights_sha256 is", dict(weights_sha256="0" * 64)), ("features is", dict(features="dinov2"))])
def test_a_reference_that_does_not_fit_is_refused_before_any_picture(
        said, change, light, monkeypatch, capsys):
    arrays, protocol = dict(mu=np.zeros(6), sigma=np.eye(6)), Light("inception", light).protocol
    for key, value in change.items() if isinstance(change, dict) else ():
        (protocol if key in protocol else arrays)[key] = value
    arrays = {k: v for k, v in arrays.items() if v is not None}
    np.savez("s.npz", protocol=json.dumps(protocol), **arrays)
    if change == "truncated":
        Path("s.npz").write_bytes(Path("s.npz").read_bytes()[:-50])
    monkeypatch.setattr(fid, "measure", lambda *_, **__: pytest.fail("too late"))
    words = ["--pictures", write("npz", "x", pictures(9)), "--ref", "s.npz", "--weights", light]
    status, _, err = fid_py(monkeypatch, capsys, *words, *["--prdc"] * (change == "--prdc"))
    assert status == 2 and err.count("\n") == 1 and said in err and "s.npz" in err, err
    assert not Path("sprung").exists()


@pytest.fixture
def remembered(light):
    """Measures the prepared data set `set` -> Measured, how many pictures the network saw, its files."""
    folder = Path(write("prepared", "set", pictures(9)))

    def run(name="inception", **options):
        e = Light(name, light)
        found = fid.measure_reference(fid.open_pictures(str(folder)), [e], **options)[name]
        return found, e.seen, sorted(folder.glob("fid-*"))
    return run


@pytest.mark.parametrize("what", ["pictures", "weights", "preprocessing", "divisor", "features"])
def test_a_data_set_is_measured_once_for_all_that_its_numbers_depend_on(
        what, remembered, light, monkeypatch):
    first, seen, files = remembered()
    again, nobody, _ = remembered()
    assert (seen, nobody, len(files), distance(again, first)) == (9, 0, 1, 0)
    name = "inception-pytorch-fid" if what == "features" else "inception"
    options = dict(divisor="N") if what == "divisor" else {}
    if what == "pictures":
        np.save("set/images.npy", chw(pictures(9, seed=1)))
    elif what == "weights":
        torch.save({"w": torch.ones(1)}, light)
    elif what == "preprocessing":
        monkeypatch.setitem(fid.FEATURES, name, ("fid", name, fid.prepare_pytorch_fid, "another way"))
    second, seen, files = remembered(name, **options)
    assert (seen, len(files), remembered(name, **options)[1]) == (9, 2, 0)
    assert what == "weights" or distance(second, first) > 1e-6      # Tiny has always the same weights


def test_rows_are_not_kept_a_damaged_file_is_made_again_and_a_full_disk_costs_one_line(
        remembered, monkeypatch, capsys):
    first, _, [file] = remembered()
    found, seen, _ = remembered(keep=True)
    assert seen == 9 and found.rows.shape == (9, 6)
    assert remembered("pixels")[1:] == (9, [file])                  # quicker than any file
    file.write_bytes(file.read_bytes()[:1000])
    again, seen, _ = remembered()
    assert seen == 9 and distance(again, first) == 0 and remembered()[1] == 0

    def full(path):
        raise OSError(28, "No space left on device", str(path))
    file.unlink()
    monkeypatch.setattr(data, "replacing", full)
    again, _, files = remembered()
    err = capsys.readouterr().err
    assert distance(again, first) == 0 and not files and err.count("\n") == 1 and "No space" in err


def one_disk():
    """What a process of the next test does: measure its own copy of a data set, twice."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fid.build_network = lambda kind, state: Tiny()
    torch.distributed.init_process_group("gloo")
    e, options = Light("inception", sys.argv[1]), dict(rank=rank, world=world)
    real = fid.open_pictures(f"disk{rank}")
    found = [asdict(fid.measure_reference(real, [e], **options)["inception"]) for _ in range(2)]
    torch.save((found, e.seen), f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_what_one_disk_remembers_and_another_does_not_is_measured_by_all(lab, light, tmp_path):
    for rank in 0, 1:                                   # only rank 0 writes, so only its disk remembers
        write("prepared", f"disk{rank}", pictures(9))
    hook = f"sys.path.insert(0, {str(HERE)!r})\nimport test_measure\nfid.main = test_measure.one_disk"
    for rank in lab.start_ranks(light, program="fid.py", hook=hook, cwd=tmp_path):
        lab.finish(rank).ok()
    both = [torch.load(f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [seen for _, seen in both] == [10, 8]        # twice 5 of 9 pictures, twice 4
    first, *rest = [fid.Measured(**m) for found, _ in both for m in found]
    assert all(distance(m, first) == 0 for m in rest)


# ------------------------------------------------------------------ weights

BODY = np.random.default_rng(0).bytes(100_000)      # stands for a published file
SHA256 = hashlib.sha256(BODY).hexdigest()


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_weights_are_a_file_a_folder_the_cache_or_a_download_in_order(server, tmp_path, monkeypatch):
    server.files, server.breaks = {"/1": BODY[::-1], "/2": BODY}, 0     # only the second is right
    cache, mine, other = (tmp_path / name for name in ("cache", "mine", "other.pth"))
    path = cache / "net.pth"
    refused(lambda: fid.find_weights("clip"), "ViT-B-32.pt", cache, "--weights")    # nobody serves it
    monkeypatch.setitem(fid.WEIGHTS, "inception", ("net.pth", SHA256, [server.url + "/1"]))
    refused(lambda: fid.find_weights("inception"), "wrong checksum", path, "--weights")
    assert visible(cache) == [] and server.log.pop() == ("/1", None)
    fid.WEIGHTS["inception"][2].append(server.url + "/2")
    mine.mkdir()
    for given in mine, None:                        # downloaded for the first of them only
        assert fid.find_weights("inception", given) == (path, SHA256) and len(server.log) == 2
    assert visible(cache) == ["net.pth"] and path.read_bytes() == BODY
    for found, given in (mine / "net.pth", mine), (other, other):
        found.write_bytes(found.name.encode())                      # it may hold anything
        assert fid.find_weights("inception", given) == (found, data.checksum_of(found))
    refused(lambda: fid.find_weights("inception", tmp_path / "none"), "--weights", "none", "net.pth")
    path.write_bytes(b"somebody's work")
    refused(lambda: fid.find_weights("inception"), path, "not the published", "--weights")
    assert path.read_bytes() == b"somebody's work" and len(server.log) == 2


def test_two_processes_wait_for_one_slow_download_that_breaks(server, lab, tmp_path):
    server.files, server.pause, server.breaks, cache = {"/": BODY}, 0.02, 1, tmp_path / "cache"
    hook = (f"fid.WEIGHTS['inception'] = ('net.pth', {SHA256!r}, [{server.url + '/'!r}])\n"
            "fid.main = lambda: print(*fid.find_weights('inception'))")
    env = dict(ALPHAFLOW_CACHE=str(cache), no_proxy="*")
    for process in [lab.start(program="fid.py", hook=hook, **env) for _ in range(2)]:
        assert lab.finish(process).ok().out.split() == [str(cache / "net.pth"), SHA256]
    assert server.log == [("/", None), ("/", "bytes=50000-")] and visible(cache) == ["net.pth"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clip_comes_as_the_torchscript_archive_that_is_published(tmp_path):
    class Part(nn.Module):
        def forward(self, x):
            return x

    state, root = {k: v.half() for k, v in weights("clip").items()}, Part()
    for name, tensor in (state | {"ln_final.bias": torch.ones(64)}).items():
        *way, leaf = name.split(".")
        part = root
        for step in way:
            part = part._modules.setdefault(step, Part())
        part.register_parameter(leaf, nn.Parameter(tensor))
    path, u = tmp_path / "ViT-B-32.pt", chw(pictures(2, 20, 30))
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), path)
    clip, want = fid.Extractor("clip", tmp_path), fid.build_network("clip", state)(fid.prepare_clip(u))
    assert torch.equal(clip(u)["features"], want) and clip.protocol["published_weights"] is False
    refused(lambda: fid.Extractor("dinov2", path), path, "not the weights of DINOv2")


# ------------------------------------------------------------------ the command line and training


def test_inception_itself_from_the_command_line(tmp_path, monkeypatch, capsys):
    array, mine = pictures(12, 28, 28, 1), tmp_path / "mine.pth"
    torch.save({k: v for k, v in weights("inception").items() if "_tracked" not in k}, mine)
    sides = ["--pictures", write("folder", "a", array), "--ref", write("npz", "b", array)]
    status, out, err = fid_py(monkeypatch, capsys, *sides, "--features", "inception", "--weights", mine,
                              "--json", "r.json", "--save-stats", "s.npz")
    assert status == 0 and "FID: 0.0000" in out and "10,000" in err and "not the published" in err, err
    result, rows = json.loads(Path("r.json").read_text()), fid.Extractor("inception", mine)(chw(array))
    values = result["metrics"]["inception"]
    assert max(values["fid"], values["sfid"]) < 1e-6
    mean, spread = fid.inception_score(rows["logits"])              # about 1.0001 ± 0.0003
    found = values["inception_score"] - 1, values["inception_score_std"]
    assert found == approx((mean - 1, spread), rel=0.01)
    assert result["features"]["inception"] == dict(
        features="inception", preprocessing=fid.FEATURES["inception"][3], weights="mine.pth",
        weights_sha256=data.checksum_of(mine), published_weights=False,
        dtype="float32 network, float64 statistics")
    with np.load("s.npz") as stats:
        assert {k: stats[k].shape for k in stats if k != "protocol"} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
        assert stats["mu"] == approx(rows["features"].double().mean(0).numpy(), rel=1e-4, abs=1e-6)


@pytest.fixture
def colour(tmp_path):
    """A checkpoint that draws 3x8x8 pictures in 2 classes; it names the prepared data set `real`."""
    torch.manual_seed(0)
    net = model.build("Ti/4", 8, 3, 2)
    raw = {k: v + 0.02 * torch.randn_like(v) for k, v in net.state_dict().items()}
    real = write("prepared", "real", pictures(40, 8, 8))
    config = dict(model=asdict(net.config), recipe=dict(data=real))
    torch.save(dict(format=sample.FORMAT, net=raw, ema={k: 0.9 * v for k, v in raw.items()}, step=7,
                    config=config, data=data.load(real).describe()), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def test_two_processes_measure_and_save_what_one_does(colour, lab, tmp_path):
    end = dict(program="fid.py", cwd=tmp_path)
    common = ["--features", "pixels", "--device", "cpu", "--json"]
    drawn = ["--ckpt", colour, "--num", 31, "--nfe", 2, *common]
    for process in [lab.start(*drawn, "one.json", **end),
                    *lab.start_ranks(*drawn, "two.json", "--save-pictures", "drawn", **end)]:
        lab.finish(process).ok()
    assert visible(tmp_path / "drawn") == [f"{k:06d}.png" for k in range(31)]
    lab.run("--pictures", "drawn", "--ref", "real", *common, "again.json", **end).ok()
    one, two, again = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two", "again"))
    value = one.pop("metrics")["pixels"]["pixels"]
    for other in two.pop("metrics"), again["metrics"]:
        assert value > 1 and other["pixels"]["pixels"] == approx(value, rel=1e-9)
    assert two == one


def test_the_protocol_tells_how_pictures_were_drawn_and_defaults_are_the_usual_ones(command, colour):
    thirty = ["--ckpt", colour, "--num", 30]
    first, err = command(*thirty)
    assert first["pictures"] == dict(
        name="drawn", count=30, shape="3x8x8", checkpoint=str(colour), step=7, weights="ema", nfe=1,
        grid=[1, 0], sampler="ode", labels="data", seed=0)
    assert first["reference"] == dict(name="real", count=40, shape="3x8x8", range=[0, 255])
    assert first["divisor"] == "N-1" and first["metrics"]["inception"].keys() > {"fid", "sfid"}
    assert "30 pictures: below 10,000" in err and "net.pth is not the published" in err
    again, _ = command(*thirty, "--ema", "--batch", 7)
    assert again["metrics"]["inception"] == approx(first["metrics"]["inception"], rel=1e-9)
    for more in ["--raw"], ["--seed", 1], ["--nfe", 2], ["--labels", "random"], ["--divisor", "N"]:
        assert command(*thirty, *more)[0]["metrics"] != first["metrics"], more
    assert command("--ckpt", colour)[0]["pictures"]["count"] == 40              # as many as are real
    several = command(*thirty, "--features", "inception,pixels,dinov2")[0]["metrics"]
    assert [min(values) for values in several.values()] == ["fid", "pixels", "fdd"]
    save("grey.pt")
    found, err = command("--ckpt", "grey.pt", "--num", 70, "--save-pictures", "drawn")  # small and grey
    assert list(found["metrics"]) == ["pixels"] and found["pictures"]["labels"] == "data" and not err
    again, err = command("--pictures", "drawn", "--ref", "digits")      # grey in files is grey, too
    assert again["metrics"]["pixels"] == approx(found["metrics"]["pixels"], rel=1e-9) and not err
    save("grey.pt", label_counts=[])                                            # classes are not known
    found, _ = command("--ckpt", "grey.pt", "--ref", write("npz", "ref", pictures(70, 8, 8, 1)))
    assert found["pictures"]["labels"] == "random"


def test_fewer_pictures_are_spread_over_all_and_classes_are_those_the_network_knows(command, colour):
    real = write("npz", "real", pictures(20, 8, 8, 1))
    found, _ = command("--pictures", real, "--ref", real, "--num", 5, "--features", "inception")
    assert found["pictures"]["chosen"] == "5 of 20, evenly spaced" and found["pictures"]["count"] == 5
    some = fid.evenly(fid.from_npz(real), 5)
    assert torch.equal(some.read(range(5)), fid.from_npz(real).read([0, 4, 8, 12, 16]))
    # The reference has two classes, the network ten: how often they occur, its checkpoint knows.
    other = write("prepared", "other", pictures(70, 8, 8, 1))
    save("grey.pt")
    assert command("--ckpt", "grey.pt", "--ref", other)[0]["pictures"]["labels"] == "data"
    same, _ = command("--ckpt", "grey.pt", "--ref", "grey.pt", "--num", 70)     # drawn from the next seed
    assert same["reference"]["seed"] == 1 and same["metrics"]["pixels"]["pixels"] > 0.1


SIX = ["--data", "digits", "--model", "Ti/8", "--batch", 8, "--steps", 6, "--lr", "1e-3", "--warmup", 2,
       "--device", "cpu", "--log-every", 1, "--preview-every", 6, "--save-every", 3]
EVAL = [*SIX, "--eval-every", 3, "--eval-num", 70]


def test_training_logs_what_fid_py_prints_and_is_not_changed_by_it(lab, tmp_path):
    runs = [lab.start(*words, "--out", tmp_path / name, hook=test_train.KEEP)
            for name, words in (("one", EVAL), ("plain", SIX))]
    for process in [*lab.start_ranks(*EVAL, "--out", tmp_path / "two"), *runs]:
        lab.finish(process).ok()
    rows = [[json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    one, two = ([row for row in side if "loss" not in row] for side in rows)
    assert [row["step"] for row in one] == [2, 5] and Path("one/curve.png").exists()
    assert len({value for row in one for value in row.values()}) == 7 and one[0]["eval_num"] == 70
    assert two == [approx(row, rel=1e-4) for row in one]
    for row in one:
        for nfe in 1, 2:
            words = ["--ckpt", f"one/step{row['step'] + 1}.pt", "--nfe", nfe, "--num", 70]
            lab.run(*words, "--json", "r.json", program="fid.py", cwd=tmp_path).ok()
            found = json.loads(Path("r.json").read_text())["metrics"]["pixels"]["pixels"]
            assert row[f"pixels_{nfe}nfe"] == approx(found, rel=1e-5)   # the log keeps six digits
    kept = [json.dumps(row) + "\n" for row in rows[0] if "loss" in row]
    Path("one/log.jsonl").write_text("".join(kept))
    test_train.assert_same_run(Path("one"), Path("plain"))
