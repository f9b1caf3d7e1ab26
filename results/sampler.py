"""toposort.py's batched simulation of causal models beside a plain numpy loop, in turns, on the same graphs.

    python results/sampler.py

Writes milliseconds of the processor for a data set, and their ratio, for either mechanism.
"""

import math
import os
import sys
import time
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import reports
import toposort

import numpy as np

REPEATS, GRAPHS, NODES, ROWS = 7, 64, 8, 320


def get_args(argv=None):
    args = reports.parse_args(reports.make_parser("results/sampler.py", __doc__), argv)
    if args.more:
        common.fail(f"{args.more[0]}: results/sampler.py has no such flag, what it measures is fixed")
    return args


def simulate_loop(graph, mechanism, shift, n, random):
    """The mechanisms in plain numpy, one graph, node, parent and feature at a time; rows are vectors."""
    d = len(graph)
    x = np.zeros((n, d))
    for j in range(d):
        parents = np.flatnonzero(graph[:, j])
        noise = random.normal(size=n) if shift == "in" else random.laplace(size=n)
        value = np.zeros(n)
        if mechanism == "lin":
            for i in parents:
                value += random.choice([-1, 1]) * random.uniform(*toposort.WEIGHT[shift]) * x[:, i]
        elif len(parents):
            length, scale = random.uniform(*toposort.LENGTH[shift]), random.uniform(*toposort.SCALE[shift])
            for _ in range(100):
                angle = x[:, parents] @ random.normal(size=len(parents)) / length + random.uniform(0, 2 * math.pi)
                value += scale * math.sqrt(2 / 100) * random.normal() * np.cos(angle)
        x[:, j] = value + random.uniform(-3, 3) + random.uniform(0.2, 2) * noise
    return x


def measure(mechanism):
    turns = []
    for turn in range(REPEATS):
        graph, random = toposort.erdos_renyi(GRAPHS, NODES, "cpu"), np.random.default_rng(turn)
        start = time.process_time()
        toposort.simulate(graph, mechanism, "in", ROWS)
        middle = time.process_time()
        for one in graph.numpy():
            simulate_loop(one, mechanism, "in", ROWS, random)
        turns.append((1000 * (middle - start) / GRAPHS, 1000 * (time.process_time() - middle) / GRAPHS))
    ratio = median(loop / ours for ours, loop in turns)
    return {"ms": median(ours for ours, _ in turns), "loop": median(loop for _, loop in turns), "ratio": ratio, "turns": turns}


def main(argv=None):
    wanted = get_args(argv)
    report = reports.header(wanted, reports.read_flags("toposort", "--device=cpu")) | {"nodes": NODES, "rows": ROWS}
    for mechanism in toposort.MECHANISMS:
        report[mechanism] = row = measure(mechanism)
        print(f"{mechanism}: {row['ms']:.3f} ms of processor a data set, plain numpy loop {row['loop']:.3f}: {row['ratio']:.1f} times faster")
    common.write_json(wanted.out, report)


if __name__ == "__main__":
    common.run(main)
