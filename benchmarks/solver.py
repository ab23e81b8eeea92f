"""Time of the exact Nash solution: all MoE layers of a model in one batch, on the device named.

Players are domain vectors tau_i = E_i - E_m with pairwise cosine `--cosine` on average (0.5 where the base is one of
several unrelated experts, 0 for unrelated vectors) and lengths that differ by up to a factor of three.

With `--ccp` (extra `ccp`), instead: the convex-concave procedure over 2, 5, 20, 40 and 60 iterations beside the exact
solution, one game at a time, for 8 and 60 players. On the players above, and on players who conflict: unrelated ones,
moved nine tenths of the way to a sum of zero, of lengths that differ by up to a factor of thirty. A procedure that
stands still has ended, so `steps` may be fewer than asked for. `exact, batch` is the time a game of `--layers` games of
that kind in one call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from namex_hf.bargaining import AGREEMENT, NashSolution, nash_bargaining
from namex_hf.bargaining.ccp import ccp_bargaining
from namex_hf.errors import MissingExtraError

BUDGETS = (2, 5, 20, 40, 60)


def games(layers: int, experts: int, cosine: float, seed: int) -> Tensor:
    """Gram matrices float64 [layers, experts, experts]."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(layers, experts, 4 * experts, generator=generator, dtype=torch.float64)
    common = torch.randn(layers, 1, 4 * experts, generator=generator, dtype=torch.float64)
    vectors = (1 - cosine) ** 0.5 * own + cosine**0.5 * common
    lengths = 3 ** torch.rand(layers, experts, 1, generator=generator, dtype=torch.float64)
    vectors = lengths * vectors
    return vectors @ vectors.mT


def conflicting_games(layers: int, experts: int, seed: int) -> Tensor:
    """Gram matrices float64 [layers, experts, experts] of players who all but cancel, and differ in length."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(layers, experts, 4 * experts, generator=generator, dtype=torch.float64)
    vectors = vectors - 0.9 * vectors.mean(1, keepdim=True)
    vectors = vectors * 30 ** torch.rand(layers, experts, 1, generator=generator, dtype=torch.float64)
    return vectors @ vectors.mT


def clocked(solve: Callable[[], NashSolution], repeats: int) -> tuple[NashSolution, list[float]]:
    """The solution, and the seconds of each repeat after one that is not counted."""
    solution = solve()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        solution = solve()  # Reading the statuses waits for the device.
        seconds.append(time.perf_counter() - start)
    return solution, seconds


def ccp_table(grams: Tensor, repeats: int) -> None:
    """One row a budget, for the first game of the batch; times are medians."""
    gram = grams[0]
    exact, alone = clocked(lambda: nash_bargaining(gram), repeats)
    _, together = clocked(lambda: nash_bargaining(grams), repeats)
    one, share = statistics.median(alone), statistics.median(together) / len(grams)
    row = "{:<19} {:>5} {:>10} {:>10} {:>10} {:>9} {:>9}".format
    print(row("", "steps", "ms", "residual", "distance", "x exact", "x batch"))
    steps, residual = int(exact.iterations), float(exact.residual)
    print(row("exact", steps, f"{1e3 * one:.3f}", f"{residual:.1e}", "0", "1", f"{one / share:.1f}"))
    print(row("exact, batch", steps, f"{1e3 * share:.3f}", f"{residual:.1e}", "0", f"{share / one:.2f}", "1"))
    for budget in BUDGETS:
        found, seconds = clocked(partial(ccp_bargaining, gram, budget), max(3, repeats // 10))
        median, steps, residual = statistics.median(seconds), int(found.iterations), float(found.residual)
        distance = float((found.weights / exact.weights - 1).abs().max())
        measured = (f"{1e3 * median:.1f}", f"{residual:.1e}", f"{distance:.1e}")
        print(row(f"ccp, {budget} iterations", steps, *measured, f"{median / one:.0f}", f"{median / share:.0f}"))


def compare(options: argparse.Namespace) -> None:
    print(f"{torch.get_num_threads()} threads, {options.layers} games a batch, seed {options.seed}")
    print("residual: max |a_i (K a)_i - 1|; distance: max |a_i / exact_i - 1|; x: times as long\n")
    for experts in (8, 60):
        alike = games(options.layers, experts, options.cosine, options.seed)
        for kind, grams in (
            (f"mean cosine {options.cosine}, lengths within 3", alike),
            ("conflicting, lengths within 30", conflicting_games(options.layers, experts, options.seed)),
        ):
            print(f"{experts} players, {kind}")
            ccp_table(grams, options.repeats)
            print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="games in the batch (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="players a game (default: %(default)s)")
    parser.add_argument("--cosine", type=float, default=0.5, help="mean cosine of two players, 0 to 1 (default: 0.5)")
    parser.add_argument("--repeats", type=int, default=30, help="timed repeats (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ccp", action="store_true", help="set the convex-concave procedure beside it (CPU)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.ccp:
        try:
            compare(options)
        except MissingExtraError as error:
            parser.exit(2, f"{error}\n")
        return

    grams = games(options.layers, options.experts, options.cosine, options.seed).to(options.device)
    solution, seconds = clocked(lambda: nash_bargaining(grams), options.repeats)
    median, best = statistics.median(seconds), min(seconds)
    print(f"{options.layers} games of {options.experts} players, {options.device}, {torch.get_num_threads()} threads")
    print(f"batch        {1e3 * median:9.3f} ms median, {1e3 * best:.3f} ms best of {options.repeats}")
    print(f"per system   {1e3 * median / options.layers:9.3f} ms median")
    print(f"iterations   {int(solution.iterations.min()):9d} to {int(solution.iterations.max())}")
    print(f"residual     {float(solution.residual.max()):9.1e} worst")
    print(f"agreement    {sum(status == AGREEMENT for status in solution.status):9d} of {options.layers}")


if __name__ == "__main__":
    main()
