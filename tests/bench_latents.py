"""
How fast latents are read, and how fast they are prepared if the VAE cost nothing. No test: run it by hand.

    OMP_NUM_THREADS=1 python tests/bench_latents.py

Reading: 20,000 latents of 4x32x32, their file in memory. Preparing: 256 JPEGs of 500x375, as in ImageNet.
"""
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402


class Nothing:
    """A VAE that costs nothing."""

    about = {"name": "nothing", "sha256": "0" * 64}

    def encode(self, x):
        moments = torch.zeros(len(x), 8, x.shape[2] // 8, x.shape[3] // 8)
        return moments[:, :4], moments[:, 4:]


def reading(folder, n=20_000, batch=256):
    """Latents a second, by batch() alone and with sample(), from a page cache that holds the file."""
    rng = np.random.default_rng(0)
    moments = np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (n, 8, 32, 32))
    for k in range(0, n, 1000):
        moments[k:k + 1000] = rng.standard_normal((1000, 8, 32, 32), dtype=np.float32)
    np.save(folder / "labels.npy", np.arange(n) % 1000)
    np.save(folder / "stats.npy", np.ones((2, 4, 32, 32)))
    meta = dict(kind="latents", shape=[4, 32, 32], classes=1000, names=[str(i) for i in range(1000)],
                range=[0, 255], source="", count=n)
    (folder / "meta.json").write_text(json.dumps(meta))
    del moments
    ds, noise = data.load(folder), torch.randn(batch, 4, 32, 32)
    for what, use in (("batch()", lambda x: x), ("batch() and sample()", lambda x: ds.sample(x, noise))):
        for step in range(n // batch):                          # one epoch to warm up
            ds.batch(step, batch_size=batch)
        began = time.perf_counter()
        for step in range(n // batch, 3 * (n // batch)):
            use(ds.batch(step, batch_size=batch)[0])
        seconds = time.perf_counter() - began
        print(f"{what}: {2 * (n // batch) * batch / seconds:,.0f} latents/s")


def preparing(folder, n=256):
    rng = np.random.default_rng(0)
    (folder / "src" / "a").mkdir(parents=True)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        photo = coarse.resize((500, 375), Image.Resampling.BICUBIC)
        photo.save(folder / "src" / "a" / f"{i}.jpg", quality=90)
    data.find_vae = lambda *args, **kwargs: Nothing()
    data.vae_file = lambda *args: (Path("nothing.pt"), Nothing.about, ())
    began = time.perf_counter()
    data.latents(folder / "src", folder / "out", device="cpu")
    print(f"prepared, without a VAE: {n / (time.perf_counter() - began):,.0f} pictures/s")
    began = time.perf_counter()
    data.statistics(np.load(folder / "out" / "moments.npy", mmap_mode="r"))
    print(f"of that, statistics: {n / (time.perf_counter() - began):,.0f} pictures/s")


if __name__ == "__main__":
    for measure in (reading, preparing):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder))
