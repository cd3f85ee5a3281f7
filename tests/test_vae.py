"""Facts about the VAE and the reader of .safetensors in data.py: both do what the published ones do.

    python -m pytest tests/test_vae.py

golden/vae.npz holds what the VAE makes of weights and pictures that golden/synthetic.py makes again from
names and sizes, so nothing is downloaded. Most checks are in float64: float32 sees no wrong epsilon.
"""
import hashlib
import json
import struct
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "golden")]

import data  # noqa: E402
from synthetic import synthetic_images, synthetic_state  # noqa: E402

GOLDEN = dict(np.load(HERE / "golden" / "vae.npz"))
GROUPS = {"small8": 8, "small32": 32, "full": 32}
F64, F32 = torch.float64, torch.float32


def shapes(size):
    return json.loads(str(GOLDEN[f"{size}_keys_json"]))


@cache
def weights():
    return {k: torch.from_numpy(v) for k, v in synthetic_state(shapes("small")).items()}


@cache
def vae(tag, dtype=F64):
    return data.build_vae(weights(), GROUPS[tag], dtype)


def pictures(case, dtype=F64):
    """(n, 3, H, W) in [-1, 1]; "_flat" is a single grey: the norms have little but eps to divide by."""
    if case == "_flat":
        u = np.full((1, 32, 32, 3), 128)
    else:
        u = synthetic_images("vae_image" + case, *{"": (2, 64, 64), "_rect": (1, 32, 48)}[case])
    return torch.from_numpy(u).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1


def latents(case, dtype=F64):
    return torch.from_numpy(GOLDEN["z" + case]).to(dtype)


def as_in(layout, state):
    """The same weights under the names and in the shapes of another layout."""
    if layout == "new":
        return dict(state)
    theirs = dict(zip(shapes("full"), json.loads(str(GOLDEN[f"names_{layout}_json"]))))
    conv = layout == "compvis"                              # its attention is four 1x1 convolutions
    return {theirs[k]: v[..., None, None] if conv and v.ndim == 2 else v for k, v in state.items()}


def close(got, golden, rel):
    """Is |got - golden| below rel·|golden|, in the Euclidean norm?"""
    got = got.double().numpy()
    assert got.shape == golden.shape and got.size
    error = np.linalg.norm(got - golden) / np.linalg.norm(golden)
    assert error < rel, f"relative error {error:.1e}"


def agrees(net, tag, case, rel, dtype=F64):
    mean, logvar = net.encode(pictures(case, dtype))
    pixels = net.decode(latents(case, dtype))
    assert mean.dtype == pixels.dtype == dtype
    close(mean, GOLDEN[f"{tag}_mean{case}"], rel)
    close(logvar, GOLDEN[f"{tag}_logvar{case}"], rel)
    close(pixels[:, :, ::5, ::5], GOLDEN[f"{tag}_decoded{case}"], rel)


# ------------------------------------------------------------------ what it computes


def test_the_weights_are_those_of_the_golden_results():
    # If this one fails, numpy's random numbers have changed, and the other failures mean nothing.
    raw = b"".join(v.numpy().tobytes() for v in weights().values())
    assert hashlib.sha256(raw).hexdigest() == str(GOLDEN["small_weights_sha256"])


@pytest.mark.parametrize("dtype, rel", [(F64, 1e-9), (F32, 1e-5)])
@pytest.mark.parametrize("case", ["", "_rect"])
@pytest.mark.parametrize("tag", ["small8", "small32"])
def test_it_agrees(tag, case, dtype, rel):
    agrees(vae(tag, dtype), tag, case, rel, dtype)


@pytest.mark.parametrize("tag, rel", [("small8", 1e-9), ("small32", 1e-6)])
def test_a_flat_picture_tells_the_epsilon_of_the_norms(tag, rel):
    # Every rounding error is divided by sqrt(eps) again and again: float32 would be wrong by 5 %, and in
    # float64 a correct small32 keeps ten digits. An eps of 1e-5 is off by 26 %.
    close(vae(tag).encode(pictures("_flat"))[0], GOLDEN[f"{tag}_mean_flat"], rel)


def test_it_agrees_in_the_published_size():
    state = synthetic_state(shapes("full"))
    net = data.build_vae({k: torch.from_numpy(state.pop(k)) for k in list(state)}, dtype=F64)
    agrees(net, "full", "_rect", 1e-9)


def test_logvar_is_clamped_and_mean_is_not():
    bias = torch.tensor([99., -99, 0, 0, 99, -99, 0, 0])          # added to the mean, then to logvar
    state = weights() | {"quant_conv.bias": bias}
    mean, logvar = data.build_vae(state, 8).encode(pictures("_rect", F32))
    assert mean[:, 0].min() > 20 and mean[:, 1].max() < -30
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()
    assert (logvar[:, 2:].abs() < 20).all()


def test_sizes_that_are_no_multiple_of_8_are_refused():
    for h, w in (60, 64), (64, 63):
        with pytest.raises(ValueError, match=f"{h}x{w} pixels: .* multiples of 8"):
            vae("small8").encode(torch.zeros(1, 3, h, w, dtype=F64))


# ------------------------------------------------------------------ weights as published


@pytest.mark.parametrize("layout", ["new", "old", "compvis"])
def test_the_full_size_has_the_published_names_and_shapes(layout):
    # On the meta device a tensor is a shape without numbers.
    state = {k: torch.empty(shape, device="meta") for k, shape in shapes("full").items()}
    net = data.build_vae(as_in(layout, state))
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == shapes("full")
    assert len(state) == 248 and sum(p.numel() for p in net.parameters()) == 83_653_863
    assert list(data.VAE().state_dict()) == list(net.state_dict())
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "autoencoder.model.model."])
@pytest.mark.parametrize("layout", ["new", "old", "compvis"])
def test_three_layouts_under_any_prefix_are_one_network(layout, prefix):
    state = as_in(layout, weights())
    assert (state.keys() == weights().keys()) == (layout == "new")
    net, plain = data.build_vae({prefix + k: v for k, v in state.items()}, 8), vae("small8", F32)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in net.state_dict().items())
    mean, logvar = net.encode(pictures("_rect", F32))
    assert all(map(torch.equal, (mean, logvar), plain.encode(pictures("_rect", F32))))
    assert torch.equal(net.decode(latents("_rect", F32)), plain.decode(latents("_rect", F32)))


def test_what_else_lies_in_a_file_is_passed_over_in_compvis_layout_alone():
    more = {name: torch.ones(1) for name in [
        "loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay",
        "model_ema.encoderconv_inbias", "model.diffusion_model.out.0.bias",
        "cond_stage_model.model.encoder.layers.0.mlp.fc1.weight"]}
    for prefix in "", "first_stage_model.":
        state = {prefix + k: v for k, v in as_in("compvis", weights()).items()}
        net = data.build_vae(more | state, 8)
        assert all(torch.equal(v, weights()[k]) for k, v in net.state_dict().items())
        extra = prefix + "decoder.up.0.attn.0.q.bias"        # but not what is a VAE's of another kind
        with pytest.raises(ValueError, match="1 unexpected"):
            data.build_vae(more | state | {extra: torch.ones(1)}, 8)
    for layout in "new", "old":
        with pytest.raises(ValueError, match=r"VAE: 6 unexpected \(loss.logvar, .*, \.\.\.\)$"):
            data.build_vae(as_in(layout, weights()) | more, 8)


QUERY = "encoder.mid_block.attentions.0.to_q.weight"


@pytest.mark.parametrize("change, match", [
    ({"decoder.conv_out.bias": None}, r"VAE: 1 missing \(decoder.conv_out.bias\)$"),
    ({"encoder.conv_in.weight": None}, r"VAE: 1 missing \(encoder.conv_in.weight\)$"),
    ({"encoder.down_blocks.2.resnets.0.conv1.weight": None}, "missing .encoder.down_blocks.2.resnets.0"),
    ({"encoder.extra": 1}, r"VAE: 1 unexpected \(encoder.extra\)$"),
    ({"extra": 1, 7: 2}, r"VAE: 2 unexpected \(extra, 7\)$"),
    ({QUERY.replace("to_q", "query"): torch.zeros(64, 64)}, r"1 unexpected \(.*query.weight\)$"),
    ({QUERY: torch.zeros(64, 64, 3, 3)}, rf"1 of another shape \({QUERY}\)$"),
    ({"quant_conv.bias": torch.zeros(7)}, r"1 of another shape \(quant_conv.bias\)$"),
    ({"quant_conv.bias": "text"}, r"1 of another shape \(quant_conv.bias\)$"),
    ({"encoder.down_blocks.1.resnets.0.conv1.weight": torch.zeros(7, 32, 3, 3)}, "7, 64, 64.* 8 groups"),
    (dict.fromkeys(shapes("small")), r"missing .*, \.\.\.\)$"),
])
def test_other_weights_are_refused_in_one_line_that_names_them(change, match):
    state = {k: v for k, v in (weights() | change).items() if v is not None}
    with pytest.raises(ValueError, match=match) as error:
        data.build_vae(state, 8)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_table_of_published_files_is_whole():
    assert sorted(data.VAE_WEIGHTS) == ["ema", "mse"]
    for name, (file, sha256, size, addresses) in data.VAE_WEIGHTS.items():
        assert file.endswith(".safetensors") and len(bytes.fromhex(sha256)) == 32
        assert 4 * 83_653_863 < size < 4 * 83_653_863 + 100_000    # the numbers and a header
        assert all(a.startswith("https://") and f"sd-vae-ft-{name}/resolve/" in a for a in addresses)


# ------------------------------------------------------------------ .safetensors


def written(path, header, raw=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)
    return path


def entry(dtype, shape, start, end):
    return dict(dtype=dtype, shape=shape, data_offsets=[start, end])


def test_a_file_of_the_original_package_is_read():
    tensors = data.read_safetensors(HERE / "golden" / "tiny.safetensors")
    golden = np.load(HERE / "golden" / "tiny_expected.npz")
    assert tensors.keys() == set(golden.files)
    assert {k: str(v.dtype)[6:] for k, v in tensors.items()} == {
        "a.weight": "float32", "half": "float16", "brain": "bfloat16", "count": "int64",
        "scalar": "float32"}
    for name, tensor in tensors.items():
        numbers = tensor.float() if name == "brain" else tensor
        assert tensor.shape == golden[name].shape and np.array_equal(numbers.numpy(), golden[name])


@pytest.mark.parametrize("shift", [0, 1])          # 1: no tensor begins on a multiple of its item's size
def test_every_type_comes_back_and_the_file_stays_as_it_is(tmp_path, shift):
    given = {name: torch.tensor([[1, 0, 3], [0, 1, 100]]).to(dtype) for name, dtype in data.SAFE.items()}
    given["empty"], given["scalar"] = torch.zeros(0, 4), torch.tensor(-1.5)
    header, raw = {"__metadata__": {"format": "pt"}}, bytes(shift)
    for name, tensor in given.items():
        part = tensor.flatten().view(torch.uint8).numpy().tobytes()
        kind = name if name in data.SAFE else "F32"
        header[name] = entry(kind, list(tensor.shape), len(raw), len(raw) + len(part))
        raw += part
    path = written(tmp_path / "all.safetensors", header, raw)
    before = path.read_bytes()
    tensors = data.read_safetensors(str(path))
    assert tensors.keys() == given.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == given[name].dtype and torch.equal(tensor, given[name])
        tensor.zero_()
    assert path.read_bytes() == before


def test_a_vae_in_half_precision_comes_out_of_a_file_in_float32(tmp_path):
    header, raw = {}, b""
    for name, tensor in weights().items():
        part = tensor.half().numpy().tobytes()
        header["vae." + name] = entry("F16", list(tensor.shape), len(raw), len(raw) + len(part))
        raw += part
    path = written(tmp_path / "vae.safetensors", header, raw)
    net = data.build_vae(data.read_safetensors(path), 8)
    assert all(p.dtype == F32 for p in net.parameters())
    agrees(net, "small8", "_rect", 1e-2, F32)                     # half keeps three digits


@pytest.mark.parametrize("header, raw, match", [
    ({"x": entry("F32", [2], 0, 8)}, 7, "cut short: 'x' ends after"),
    ({"x": entry("F32", [2], 0, 12)}, 12, "'x' has 12 bytes for F32 of shape"),
    ({"x": entry("F32", [2], 8, 0)}, 12, "'x' has -8 bytes"),
    ({"x": entry("F32", [-2], 0, 8)}, 12, "no dtype, shape and data_offsets for 'x'"),
    ({"x": entry("F32", [2.0], 0, 8)}, 12, "no dtype, shape"),
    ({"x": entry("F32", [0, 2 ** 70], 0, 0)}, 12, "no dtype, shape"),
    ({"x": entry("F32", 2, 0, 8)}, 12, "no dtype, shape"),
    ({"x": entry("F32", [2], 0, None)}, 12, "no dtype, shape"),
    ({"x": dict(dtype="F32", shape=[2], data_offsets=[0])}, 12, "no dtype, shape"),
    ({"x": dict(dtype="F32", shape=[2])}, 12, "no dtype, shape"),
    ({"a\nb": [1, 2]}, 12, r"no dtype, shape and data_offsets for 'a\\nb'"),
    ({"x": entry("F8_E4M3", [8], 0, 8)}, 8, "'x' is of the unknown type 'F8_E4M3'"),
    ({"x": entry(["F32"], [2], 0, 8)}, 8, "unknown type"),
    ([1, 2], 8, "its header is not JSON"),
    (b"{'x'}", 8, "its header is not JSON"),
    (b"\xff\xfe{", 8, "its header is not JSON"),
    (b"[" * 100_000, 8, "its header is not JSON"),
])
def test_damaged_headers_are_refused_in_one_line(tmp_path, header, raw, match):
    path = written(tmp_path / "bad.safetensors", header, bytes(raw))
    with pytest.raises(data.UserError, match=match) as error:
        data.read_safetensors(path)
    assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path):
    whole, path = (HERE / "golden" / "tiny.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(data.UserError, match="cut.safetensors is damaged or no .safetensors"):
            data.read_safetensors(path)
    with pytest.raises(FileNotFoundError):
        data.read_safetensors(tmp_path / "none.safetensors")
