"""Flow matching in context on capital letters; the vector field is refined over mini-batches (sec. 9.5; table 6).

A task is a letter, randomly scaled and rotated, as a density of points on its ink. As in mog_flow.py, of which this is the
second task, the model infers the velocity E[x_1 - x_0 | x_t] from `--context` points and refines it with each further
mini-batch. Twenty letters are trained on; D, H, N, T, X and Y are held out, and the model never meets them before the
out-of-distribution evaluation.

    python alphabets.py                                 # W2 0.13 above fresh points after 1 step, 0.06 after 5; 17 minutes on one core
    python alphabets.py --context 100 --steps 10
    python alphabets.py --preset paper --launch graph   # two minutes of training on an H100
"""

import math
import os

import common  # before torch: it answers --help by itself
import mog_flow
from mog_flow import Density, make_model

import numpy as np
import torch

PRESETS = {"paper": dict(context=100, queries=256, tasks=32, width=256, depth=4, heads=4, iters=6000, lr=1e-3, points=512)}
LETTERS, HELD_OUT = "ABCEFGIJKLMOPQRSUVWZ", "DHNTXY"  # the paper's
FONT = "DejaVuSans.ttf"  # matplotlib ships it
STD = 0.05  # of the noise on ink pixels, which lie in [-3, 3]; as in related work
SCALE = (0.5, 1.5)  # times that size, uniformly; our choice, since the paper does not say
UNIT = 1.5  # models see points divided by this, so that data and the noise that flows start from are alike in size


def get_args(argv=None):
    parser = common.make_parser("alphabets", __doc__)
    parser.set_defaults(regime="implicit", steps=5, context=50, queries=64, tasks=16, iters=6000, lr=3e-3, decoder="linear", eval_tasks=100)
    args = mog_flow.parse_flow_args(parser, PRESETS, argv)
    args.dim = 2  # no flag: letters are flat
    return args


# ---------------------------------------------------------------- the task


def glyph(letter, size=64):
    """The ink of a letter as points (P, 2): pixels of a rendering in a font of `size`, centred, the longer side from -1 to 1, y up."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", FONT), size)
    image = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size // 2, size // 4), letter, fill=255, font=font)
    row, column = np.nonzero(np.asarray(image) > 127)
    points = np.stack([column, -row], 1).astype(np.float32)
    low, high = points.min(0), points.max(0)
    return torch.from_numpy((points - (low + high) / 2) / ((high - low).max() / 2))


def make_sampler(letters, args):
    """sample(B, args) -> the densities of B randomly chosen, scaled and rotated letters, in the model's units."""
    glyphs = [glyph(letter).to(args.device) for letter in letters]
    ink = torch.nn.utils.rnn.pad_sequence(glyphs, batch_first=True)  # (L, P, 2)
    count = torch.tensor([len(g) for g in glyphs], device=args.device)  # how many of the P points are ink

    def sample_densities(B, args):
        index = torch.randint(len(letters), (B,), device=args.device)
        angle = 2 * math.pi * torch.rand(B, device=args.device)
        low, high = SCALE
        scale = 3 / UNIT * (low + (high - low) * torch.rand(B, device=args.device))
        cos, sin = scale * angle.cos(), scale * angle.sin()
        turn = torch.stack([cos, sin, -sin, cos], -1).view(B, 2, 2)
        return Density(ink[index] @ turn, count[index], torch.tensor(STD / UNIT))

    return sample_densities


# ---------------------------------------------------------------- training


def train(model, args):
    """As for mixtures, on the letters that are not held out."""
    return mog_flow.train(model, args, make_sampler(LETTERS, args))


# ---------------------------------------------------------------- evaluation


def evaluate(model, args):
    """In distribution: new poses of the letters trained on. Out of distribution: the letters held out."""
    metrics, baselines = {}, {}
    for stream, (split, letters) in enumerate({"id": LETTERS, "ood": HELD_OUT}.items()):
        sample = make_sampler(letters, args)
        metrics[split], baselines[split] = mog_flow.compare(model, args, split, f"letters {letters}", sample, UNIT, stream)
    return metrics, baselines


# ---------------------------------------------------------------- main


def main(argv=None):
    args = get_args(argv)
    if args.plot_only:
        return mog_flow.plot(args.plot_only, "alphabets")
    model = make_model(args)
    iterations, seconds = common.trained(args) if args.eval else train(model, args)
    metrics, baselines = evaluate(model, args)
    common.write_results(args, model, "letters", iterations, seconds, metrics, baselines)
    mog_flow.report(metrics, baselines, args.steps)
    mog_flow.plot(args.out, "alphabets")


if __name__ == "__main__":
    common.run(main)
