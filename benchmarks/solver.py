"""Time of the exact Nash solution: all MoE layers of a model in one batch, on the device named.

Players are domain vectors tau_i = E_i - E_m with pairwise cosine `--cosine` on average (0.5 where the base is one of
several unrelated experts, 0 for unrelated vectors) and lengths that differ by up to a factor of three.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from namex_hf.bargaining import AGREEMENT, NashSolution, nash_bargaining


def games(layers: int, experts: int, cosine: float, seed: int) -> Tensor:
    """Gram matrices float64 [layers, experts, experts]."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(layers, experts, 4 * experts, generator=generator, dtype=torch.float64)
    common = torch.randn(layers, 1, 4 * experts, generator=generator, dtype=torch.float64)
    vectors = (1 - cosine) ** 0.5 * own + cosine**0.5 * common
    lengths = 3 ** torch.rand(layers, experts, 1, generator=generator, dtype=torch.float64)
    vectors = lengths * vectors
    return vectors @ vectors.mT


def clocked(grams: Tensor, repeats: int) -> tuple[NashSolution, list[float]]:
    """The solution, and the seconds of each repeat after one that is not counted."""
    solution = nash_bargaining(grams)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        solution = nash_bargaining(grams)  # Reading the statuses waits for the device.
        seconds.append(time.perf_counter() - start)
    return solution, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="games in the batch (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="players a game (default: %(default)s)")
    parser.add_argument("--cosine", type=float, default=0.5, help="mean cosine of two players, 0 to 1 (default: 0.5)")
    parser.add_argument("--repeats", type=int, default=30, help="timed repeats (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    grams = games(options.layers, options.experts, options.cosine, options.seed).to(options.device)
    solution, seconds = clocked(grams, options.repeats)
    median, best = statistics.median(seconds), min(seconds)
    print(f"{options.layers} games of {options.experts} players, {options.device}, {torch.get_num_threads()} threads")
    print(f"batch        {1e3 * median:9.3f} ms median, {1e3 * best:.3f} ms best of {options.repeats}")
    print(f"per system   {1e3 * median / options.layers:9.3f} ms median")
    print(f"iterations   {int(solution.iterations.min()):9d} to {int(solution.iterations.max())}")
    print(f"residual     {float(solution.residual.max()):9.1e} worst")
    print(f"agreement    {sum(status == AGREEMENT for status in solution.status):9d} of {options.layers}")


if __name__ == "__main__":
    main()
