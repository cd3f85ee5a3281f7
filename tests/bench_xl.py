"""Full-size networks on whatever machine this is: three optimizer steps for each α, with guidance. By hand:

    python tests/bench_xl.py                       # XL/2, batch 2: 24 GB of memory, 10 minutes on 2 CPU cores
    python tests/bench_xl.py --model B/2 --batch 4

Prints loss, gradient norm, seconds and peak memory of each step. Random latents serve as data: neither
speed nor memory depend on them.
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from loss import alpha_flow_loss  # noqa: E402
from model import build  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="XL/2")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--recompute", action="store_true")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    device, recipe = torch.device(args.device), {**train.PAPER, **train.RECIPES["XL/2"], "batch": args.batch}
    torch.manual_seed(0)
    net = build(args.model, 32, 4, 1000).to(device)
    net.recompute = args.recompute
    ema = build(args.model, 32, 4, 1000).to(device).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), fused=True)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{args.model}: {sum(p.numel() for p in net.parameters()):,} parameters, batch {args.batch}, "
          f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}{load}")
    objective = {k: recipe[k] for k in ("omega", "kappa", "t_min", "t_max", "label_drop", "clip", "c")}
    step = 0
    for alpha in (1.0, 0.5, 0.0):
        for _ in range(args.steps):
            began, noise = time.perf_counter(), train.draw(recipe, step, (4, 32, 32), device)
            x, y = torch.randn(args.batch, 4, 32, 32, device=device), torch.randint(1000, (args.batch,))
            loss, _ = alpha_flow_loss(net, x, y, alpha, **noise, **objective, null=1000)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), recipe["grad_clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            train.update_ema(ema, net, 0.9999)
            assert math.isfinite(loss.item() + norm.item())
            print(f"alpha {alpha:g}: loss {loss.item():.4f}, gradient norm {norm.item():.4f}, "
                  f"{time.perf_counter() - began:.1f} s, peak memory {train.memory_mb(device):,.0f} MB",
                  flush=True)
            step += 1


if __name__ == "__main__":
    main()
