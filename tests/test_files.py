"""Files of strangers: checkpoints, state dicts and .safetensors are read, and nothing in them is run.

    python -m pytest tests/test_files.py

Files in the layout of the released α-Flow checkpoints are written here, with golden weights; the classes
that are pickled inside are gone when they are read. golden/README.md says where the numbers come from.
"""
import dataclasses
import json
import os
import pickle
import struct
import sys
import types
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path[:0] = [str(GOLDEN.parent.parent), str(GOLDEN)]
import data  # noqa: E402
import sample  # noqa: E402
from model import FORMAT, SAFE, DiT, DiTConfig, build, read_checkpoint, read_tensors, read_torch  # noqa: E402
from synthetic import synthetic_state  # noqa: E402

CONFIG = DiTConfig(size=8, channels=4, patch=2, dim=64, depth=3, heads=4, classes=10)
TABLE = "y_embedder.embedding_table.weight"
SIT, VAE = (dict(np.load(GOLDEN / f"{name}.npz")) for name in ("sit_small", "vae"))
WEIGHTS = {name[3:]: torch.from_numpy(w) for name, w in SIT.items() if name.startswith("sd/")}
RAW = {name: w + 1 for name, w in WEIGHTS.items()}          # another network than WEIGHTS
VAE_STATE = {name: torch.from_numpy(w)
             for name, w in synthetic_state(json.loads(str(VAE["small_keys_json"]))).items()}
MEAN, VAR = 0.1 + torch.rand(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def state_of(weights=WEIGHTS, vae=(), **changes):
    """What a released file has for net or ema; the names are theirs."""
    state = dict(autoencoder_mean=MEAN, autoencoder_var=VAR, are_ldm_stats_inited=torch.ones(()))
    state |= {f"autoencoder.model.model.{name}": w for name, w in dict(vae).items()}
    state |= {f"model.{name}": w for name, w in weights.items()} | changes
    return {name: w for name, w in state.items() if w is not None}


def released(path, **changes):
    """Write a file in the released layout, with foreign classes; what is to be None is left out."""
    structs = types.ModuleType("src.structs")
    structs.EasyDict, structs.Group = (
        type(name, (dict,), {"__module__": structs.__name__}) for name in ("EasyDict", "Group"))
    sys.modules.update({"src": types.ModuleType("src"), "src.structs": structs})
    try:
        whole = dict(net=state_of(RAW), ema=state_of(), optimizer={"state": {0: torch.ones(500)}},
                     cfg=structs.EasyDict(model=structs.EasyDict(use_ema=True), dir=Path("a/b")),
                     vis=structs.EasyDict(x=structs.Group(video=torch.zeros(2, 3)), y=np.ones(3)),
                     stats=dict(cur_step=1_200_000)) | changes
        torch.save(structs.EasyDict({k: v for k, v in whole.items() if v is not None}), path)
    finally:
        del sys.modules["src"], sys.modules["src.structs"]
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return released(tmp_path_factory.mktemp("released") / "alphaflow-B-2.pt", ema=state_of(vae=VAE_STATE))


def own(**changes):                                         # what train.py writes
    return {"format": FORMAT, "net": RAW, "ema": WEIGHTS, "step": 7, "latents": None,
            "config": {"model": dataclasses.asdict(CONFIG), "recipe": {}}, "data": {"classes": 10}, **changes}


def safetensors(path, tensors, header=None, shift=0):
    """shift: bytes of nothing in front, so that numbers lie askew. header: another than the right one."""
    about, raw, kinds = {"__metadata__": {"format": "pt"}}, bytes(shift), {v: k for k, v in SAFE.items()}
    for name, w in tensors.items():
        part = w.flatten().view(torch.uint8).numpy().tobytes()
        span = [len(raw), len(raw) + len(part)]
        about[name], raw = dict(dtype=kinds[w.dtype], shape=list(w.shape), data_offsets=span), raw + part
    header = header or json.dumps(about).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)
    return path


def close(got, golden, tolerance):
    golden = torch.as_tensor(golden).double()
    assert got.shape == golden.shape
    assert (got.double() - golden).abs().max() < tolerance * max(1, golden.abs().max())


def u(net, dtype=torch.float32):
    z, t, r = (torch.from_numpy(SIT[name]).to(dtype) for name in "xtr")
    return net.to(dtype)(z, t, r, torch.from_numpy(SIT["y"]))


def one_line(path, read, words=""):
    """`read` refuses the file at `path` in one line that names it, and warns of nothing."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=rf"\A.*{path.name}.*{words}.*\Z") as caught:
            read(path)
    assert len(str(caught.value)) < 500 and not warned


# ---- released α-Flow checkpoints -------------------------------------------------------------------

def test_a_released_file_gives_the_golden_velocity(path):
    with pytest.raises(pickle.UnpicklingError):             # as it is, torch's careful reader refuses it
        torch.load(path, weights_only=True)
    net, _ = sample.load(path)
    assert net.config == CONFIG and not net.training and not any(p.requires_grad for p in net.parameters())
    close(u(net), SIT["u_f32"], 2e-5)
    close(u(net, torch.float64), SIT["u_f64"], 1e-11)


def test_it_comes_in_the_layout_of_our_own_checkpoints(path):
    ckpt = read_checkpoint(path)
    assert ckpt["step"] == 1_200_000 and ckpt["config"]["model"] == dataclasses.asdict(CONFIG)
    for part, weights in (("ema", WEIGHTS), ("net", RAW)):
        assert ckpt[part].keys() == DiT(CONFIG).state_dict().keys()
        assert all(torch.equal(w, weights[name]) for name, w in ckpt[part].items())
    close(ckpt["latents"]["mean"], MEAN[0], 1e-6)
    close(ckpt["latents"]["std"], VAR[0].sqrt(), 1e-6)


def test_its_samples_are_decoded_by_the_vae_inside(path):
    """The VAE sees x·std + mean."""
    x = ((torch.from_numpy(VAE["z"]).double() - MEAN) / VAR.sqrt()).float()
    got = sample.load(path)[1](x)
    assert got.shape == (2, 3, 64, 64) and got.dtype == torch.uint8
    golden = data.to_uint8(torch.from_numpy(VAE["small32_decoded"])).int()
    assert (got[:, :, ::5, ::5].int() - golden).abs().max() <= 1


@pytest.mark.parametrize("rows", [1000, 1001])
def test_a_table_without_a_null_label_gets_a_row_of_zeros(tmp_path, rows):
    table = torch.arange(rows * 64.).view(rows, 64) + 1
    ckpt = read_checkpoint(released(tmp_path / "a.pt", net=None, ema=state_of({**WEIGHTS, TABLE: table})))
    assert ckpt["config"]["model"]["classes"] == 1000 and ckpt["ema"][TABLE].shape == (1001, 64)
    assert torch.equal(ckpt["ema"][TABLE][:rows], table) and ckpt["ema"][TABLE][1000].any() == (rows == 1001)


@pytest.mark.parametrize("name", ["B/2", "XL/2"])
def test_the_published_sizes_are_known_by_their_shapes(tmp_path, name):
    with torch.device("meta"):
        net = build(name, 32, 4, 1000)
    zeros = {k: torch.zeros(()).expand(w.shape) for k, w in net.state_dict().items()}   # four bytes each
    stats = torch.full((1, 4, 1, 1), 9.0)                   # of whole channels: for all positions
    ema = state_of(zeros, autoencoder_mean=stats, autoencoder_var=stats)
    ckpt = read_checkpoint(released(tmp_path / "a.pt", net=None, ema=ema))
    assert ckpt["config"]["model"] == dataclasses.asdict(net.config)
    assert torch.equal(ckpt["latents"]["std"], torch.full((4, 32, 32), 3.0))


# ---- our own checkpoints, and others ---------------------------------------------------------------

@pytest.mark.parametrize("zipped", [True, False])           # False: as torch.save once wrote
def test_own_checkpoints_and_the_network_outlives_its_file(tmp_path, zipped):
    path = tmp_path / "ckpt.pt"
    torch.save(own(), path, _use_new_zipfile_serialization=zipped)
    before = path.read_bytes()
    read_checkpoint(path)["ema"]["pos_embed"].fill_(7)      # a change never reaches the file
    assert path.read_bytes() == before and read_checkpoint(path)["step"] == 7
    (net, decode), (raw, _) = sample.load(path), sample.load(path, "raw")
    with open(path, "r+b") as file:                         # in place, under whatever is still mapped
        file.write(bytes(len(before)))
    close(u(net), SIT["u_f32"], 2e-5)
    assert torch.equal(raw.pos_embed, RAW["pos_embed"])
    assert torch.equal(decode(torch.tensor([-1, 0.3, 1])), data.to_uint8(torch.tensor([-1, 0.3, 1])))


@pytest.mark.parametrize("thing", [
    torch.zeros(3), [], "text", {}, {"net": {}}, {"format": "alphaflow-9"}, {"format": torch.zeros(3)},
    own(ema={}), own(ema=None), own(ema={"w": "text"}), own(config=None), own(config={"model": {"size": 8}}),
    own(config={"model": dataclasses.asdict(CONFIG) | {"depth": 2}}), own(latents={"mean": 1}),
    own(ema=WEIGHTS | {"more": torch.zeros(2)}),
    *[{"ema": state_of(**changes)} for changes in (         # the others: nearly a released file
        {"model.pos_embed": None}, {f"model.{TABLE}": None}, dict(autoencoder_mean=None),
        dict(autoencoder_var=None), dict(are_ldm_stats_inited=torch.zeros(())), dict(autoencoder_var=-VAR),
        dict(autoencoder_mean=torch.zeros(1, 3, 8, 8)), {"model.pos_embed": torch.zeros(3)},
        {"model.x_embedder.proj.weight": torch.zeros(64, 4)}, {f"model.{TABLE}": torch.zeros(())},
        {"model.extra": torch.zeros(2)}, {"model.blocks.9.mlp.fc1.bias": torch.zeros(2)},
        {"model.pos_embed": torch.zeros(1, 25, 64)}, {"model.pos_embed": "text"})]])
def test_other_files_of_torch_save_are_no_checkpoints(tmp_path, thing):
    torch.save(thing, tmp_path / "bad.pt")
    one_line(tmp_path / "bad.pt", sample.load)


class Calls(tuple):
    """(function, *arguments): pickled, it is that call, made by whoever unpickles carelessly."""

    def __reduce__(self):
        return self[0], self[1:]


@pytest.mark.parametrize("kind", ["system", "eval", "open", "getattr", "parameter", "subclass"])
def test_hostile_files_run_nothing(tmp_path, kind):
    marker, path = tmp_path / "owned", tmp_path / "bad.pt"
    inner = Calls((eval, f"open({str(marker)!r}, 'w')"))
    evil = {"system": Calls((os.system, f"touch {marker}")), "eval": inner,
            "open": Calls((open, str(marker), "w")), "getattr": Calls((getattr, inner, "x")),
            "parameter": Calls((torch._utils._rebuild_parameter, inner, True, None)),
            "subclass": Calls((torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, inner[1:], {}))}[kind]
    for thing in (evil, {"format": FORMAT, "config": evil, "ema": {}}, {"ema": {"a": evil}}, ["a", evil]):
        for save in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, 2)),
                     lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False)):
            save(thing, path)
            with suppress(ValueError):
                read_tensors(path)
            one_line(path, sample.load)
    for changes in (dict(ema=evil), dict(ema=state_of(**{"model.pos_embed": evil}))):
        one_line(released(path, **changes), sample.load, "nothing in it was run")
    if kind == "eval":                                      # where nobody looks, it disturbs nobody
        released(path, optimizer=evil, cfg=[evil], stats={"cur_step": evil})
        close(u(sample.load(path)[0]), SIT["u_f32"], 2e-5)
    assert not marker.exists()
    with suppress(TypeError, AttributeError):
        pickle.loads(pickle.dumps(evil))
    assert marker.exists()                                  # where it is let, it does run


@pytest.mark.parametrize("raw", [b"", b"h", b"hello\n" * 99, pickle.dumps({"w": 1}, 4),
                                 (GOLDEN / "sampler.npz").read_bytes(), None], ids=range(6))
@pytest.mark.parametrize("read", [read_torch, read_tensors, sample.load])
@pytest.mark.filterwarnings("ignore:.*torch.jit")           # TorchScript is deprecated
def test_what_torch_save_did_not_write_is_refused(tmp_path, raw, read):
    path = tmp_path / "bad.pt"
    path.write_bytes(raw) if raw is not None else torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    one_line(path, read, "nothing in it was run")
    for missing in (tmp_path / "none.pt", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(OSError):
            read(missing)


def test_a_damaged_file_gives_an_answer_or_one_line(tmp_path):
    raw = (bad := released(tmp_path / "bad.pt", net=None)).read_bytes()
    for n in (1000, len(raw) // 2, len(raw) - 100, len(raw) - 1):
        bad.write_bytes(raw[:n])
        one_line(bad, sample.load, "nothing in it was run")
    for k in [*range(0, 20_000, 997), *range(len(raw) - 12_000, len(raw), 499)]:
        bad.write_bytes(raw[:k] + bytes([raw[k] ^ 0x55]) + raw[k + 1:])
        with suppress(ValueError):
            sample.load(bad)


# ---- .safetensors ----------------------------------------------------------------------------------

def test_a_file_of_the_original_package_is_read_but_not_a_part_of_it(tmp_path):
    golden, got = np.load(GOLDEN / "tiny_expected.npz"), read_tensors(GOLDEN / "tiny.safetensors")
    dtypes = dict(zip(("a.weight", "half", "brain", "count", "scalar"), ("F32", "F16", "BF16", "I64", "F32")))
    assert got.keys() == dtypes.keys()
    for name, w in got.items():
        assert w.dtype == SAFE[dtypes[name]] and w.shape == golden[name].shape
        assert np.array_equal((w.float() if name == "brain" else w).numpy(), golden[name])
    whole, path = (GOLDEN / "tiny.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        one_line(path, read_tensors, "damaged")


@pytest.mark.parametrize("shift", [0, 1])
def test_every_type_comes_back_and_the_file_stays_as_it_is(tmp_path, shift):
    given = {name: torch.tensor([[1, 0, 3], [0, 1, 100]]).to(dtype) for name, dtype in SAFE.items()}
    path = safetensors(tmp_path / "all.safetensors", {**given, "empty": torch.zeros(0, 4)}, shift=shift)
    before, got = path.read_bytes(), read_tensors(path)
    assert got.pop("empty").shape == (0, 4) and got.keys() == given.keys()
    for name, w in got.items():
        assert w.dtype == given[name].dtype and torch.equal(w, given[name])
        w.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("header", [
    ("F32", [2], [0, 13]), ("F32", [2], [0, 12]), ("F32", [2], [8, 0]), ("F32", [-2], [0, 8]),
    ("F32", [2.5], [0, 8]), ("F32", 2, [0, None]), ("F32", [0, 2**70], [0, 0]), ("F8_E4M3", [8], [0, 8]),
    (["F32"], [2], [0, 8]), ("F32",), b'{"a\\nb": [1, 2]}', b"[1, 2]", b"\xff\xfe{", b"[" * 100_000],
    ids=range(14))
def test_damaged_headers_are_refused_in_one_line(tmp_path, header):
    if isinstance(header, tuple):
        header = json.dumps({"x": dict(zip(("dtype", "shape", "data_offsets"), header))}).encode()
    one_line(safetensors(tmp_path / "bad.safetensors", {"x": torch.ones(3)}, header), read_tensors, "damaged")
