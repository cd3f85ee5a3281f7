"""How fast fid.py is, each figure beside something known. Run by hand, on a quiet machine:

    python tests/bench_fid.py                      # about 3 minutes on 2 CPU cores
    python tests/bench_fid.py --device cuda --pictures 4096

1. Features and statistics of PNG files with Inception-v3, against bare forwards of the same network on
   one prepared batch. 2. The distance in 2048 dimensions, against scipy's matrix square root.
The weights are random: speed does not depend on them.
"""
import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid  # noqa: E402


def seconds(work):
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def features(folder, count, device):
    rng = np.random.default_rng(0)
    torch.save(fid.Inception().state_dict(), folder / "random.pth")
    extractor = fid.Extractor("inception", device, folder / "random.pth")
    (folder / "pictures").mkdir()
    for k in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        picture.save(folder / f"pictures/{k:06d}.png")
    pictures = fid.from_folder(folder / "pictures")
    batch = 16 if device == "cpu" else 64
    x = fid.prepare_inception(pictures.read(range(batch)).to(device))

    @torch.no_grad()
    def bare():
        for _ in range(count // batch):
            extractor.net(x)

    bare()
    rounds = [(seconds(bare), seconds(lambda: fid.measure(pictures, [extractor]))) for _ in range(3)]
    print(f"features: {count / statistics.median(whole for _, whole in rounds):.1f} pictures/s, "
          f"{statistics.median(whole / plain for plain, whole in rounds):.2f} of the time of bare forwards")


def distance():
    x, y = np.random.default_rng(0).normal(size=(2, 10_000, 2048))
    (mu1, cov1), (mu2, cov2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    ours = statistics.median(seconds(lambda: fid.frechet_distance(mu1, cov1, mu2, cov2)) for _ in range(3))
    print(f"distance in 2048 dimensions: {ours:.2f} s, scipy's sqrtm "
          f"{seconds(lambda: scipy.linalg.sqrtm(cov1 @ cov2)):.2f} s")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--pictures", type=int, default=128)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        features(Path(folder), args.pictures, args.device)
    distance()
