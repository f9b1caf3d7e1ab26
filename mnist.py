"""MNIST and FashionMNIST under random projections and random labels, classified in context (sec. 9.2; tables 2, 3 and 4).

A task is a random matrix A, 784 -> `--dim`, and a random function from the ten classes to ten labels, which may merge
classes and never splits one: x = A image, y = label. Context from the training images, queries from the test images.
Out of distribution: the other dataset. The metric is the error in %; guessing costs 90, the majority label about 73.

    python mnist.py --regime implicit --steps 5     # the main job: 31% after 1 step, 16% after 5; nine minutes on one core
    python mnist.py --dataset fmnist --dim 50       # another dataset, an easier projection
    python mnist.py --regime parametric             # the weights of a linear predictor as state: 37% and 25%
    python mnist.py --regime explicit               # those of a trained network's last layer: 33% and 18%
    python mnist.py --images raw                    # implicit, images not centred: 30% and 15%
    python mnist.py --method paper                  # implicit, as the paper does it, as far as flags allow: 34% and 24%
    python mnist.py --preset paper --launch graph   # implicit, at the paper's sizes: 23% and 11%; under four minutes on an H100
"""

import collections
import gzip
import http.client
import os
import socket
import tempfile
from pathlib import Path

import common  # before torch: it answers --help by itself
from common import Task, refine

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CLASSES = 10
OTHER = {"mnist": "fmnist", "fmnist": "mnist", "glyphs": "letters"}  # what each dataset is tested on out of distribution
NAMES = {"mnist": "MNIST", "fmnist": "FashionMNIST", "glyphs": "glyphs (drawn digits, not MNIST)", "letters": "glyphs (drawn letters A-J)"}
# Two heads of 128 numbers: a head that is narrower than x cannot compare two images.
PRESETS = {"paper": dict(context=100, queries=100, tasks=128, width=256, depth=4, heads=2, iters=5000, lr=1e-3)}


def get_args(argv=None):
    parser = common.make_parser("mnist", __doc__, eval_steps=True)
    add = parser.add_argument_group("the data").add_argument
    add("--dataset", choices=("auto", "mnist", "fmnist", "glyphs"), default="auto", help="auto: mnist, or drawn digits where it cannot be had")
    add("--data-dir", type=common.path, default=os.environ.get("IAI_DATA") or "data", help="where torchvision's MNIST/ and FashionMNIST/ lie or go (default: $IAI_DATA or data/)")
    add("--images", choices=("centred", "raw"), default="centred", help="minus the mean training image, or as they are, which is better for implicit models and worse for parametric ones")
    add("--dim", type=common.count, default=100, help="dimension of the random projection")
    parser.set_defaults(regime="implicit", steps=5, context=64, queries=64, tasks=8, iters=3000, lr=3e-3)
    parser.set_defaults(width=128, heads=1, state_scale=0.1, init="rotation", basis="fourier", hidden=1024)
    return common.parse_args(parser, PRESETS, argv)


# ---------------------------------------------------------------- the data


def read_idx(path):
    """An IDX file (plain, or .gz beside it) as a uint8 array; None if there is none. Exits if it is damaged."""
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        return None
    with common.or_fail(f"{path} (or its .gz) may not be read, or is damaged: delete it to download it again"):
        raw = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
        shape = np.frombuffer(raw, ">i4", raw[3], 4)
        if raw[:3] != b"\0\0\x08" or not len(shape) or shape.min() < 0:  # two zeros, then 8 for unsigned bytes
            raise ValueError("its header is not that of images or labels")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_mnist(dataset, folder):
    """-> train images, train labels, test images, test labels as uint8 arrays, or None where they cannot be had."""
    from torchvision import datasets

    source = datasets.MNIST if dataset == "mnist" else datasets.FashionMNIST
    raw = Path(folder) / source.__name__ / "raw"
    files = [raw / f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    arrays = [read_idx(file) for file in files]
    if any(a is None for a in arrays):
        socket.setdefaulttimeout(20)
        with tempfile.TemporaryDirectory() as new:  # in its place, half a download would be taken for a damaged file
            try:
                source(new, download=True)  # from torchvision's mirrors, with checksums
            except (OSError, RuntimeError, http.client.HTTPException):
                return None
            for file in (file for file, a in zip(files, arrays) if a is None):
                common.replace_file(str(file), lambda f: f.write(Path(new, *file.parts[-3:]).read_bytes()))
        arrays = [read_idx(file) for file in files]
    for images, labels in (arrays[:2], arrays[2:]):
        if not len(labels) or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() >= CLASSES:
            common.fail(f"{raw} does not hold {len(labels)} images of 28 x 28 with labels 0-9: delete it to download it again")
    return arrays


def draw_glyphs(characters, size, seed):
    """`size` images (size, 28, 28) of the ten characters in the fonts that matplotlib ships, randomly distorted, and labels."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    stems = ("DejaVuS", "STIXGeneral", "cmb", "cmr", "cmss", "cmtt")
    faces = sorted(p for stem in stems for p in fonts.glob(f"{stem}*.ttf") if "Display" not in p.name)
    drawn = []
    for face in faces:
        for character in characters:
            image = Image.new("L", (56, 56))
            ImageDraw.Draw(image).text((28, 28), character, fill=255, font=ImageFont.truetype(str(face), 40), anchor="mm")
            drawn.append(np.asarray(image))
    drawn = torch.tensor(np.stack(drawn)).float()[:, None]  # (faces * 10, 1, 56, 56)
    g = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(drawn), (size,), generator=g)
    jitter = 0.12 * torch.randn(size, 2, 2, generator=g)  # stretch, shear and a little rotation
    shift = 0.05 * torch.randn(size, 2, 1, generator=g)
    grid = F.affine_grid(torch.cat([torch.eye(2) + jitter, shift], 2), (size, 1, 28, 28), align_corners=False)
    images = F.grid_sample(drawn[pick], grid, align_corners=False)[:, 0]
    return images.round().byte().numpy(), (pick % CLASSES).byte().numpy()


def load_images(dataset, args):
    """-> {"train": (images (n, 784), labels (n,)), "test": ...} on the device, or None where the data cannot be had.

    Images are centred on the mean training image (unless --images raw) and divided by one number, such that a projection
    by a unit normal matrix has unit variance: the paper's A, with inputs of order one.
    """
    if dataset in ("mnist", "fmnist"):
        arrays = load_mnist(dataset, args.data_dir)
        if arrays is None:
            return None
    else:
        characters = "0123456789" if dataset == "glyphs" else "ABCDEFGHIJ"
        arrays = [*draw_glyphs(characters, 20_000, seed=1), *draw_glyphs(characters, 5_000, seed=2)]
    images, labels, test_images, test_labels = (torch.tensor(a, device=args.device) for a in arrays)
    train, test = images.flatten(1).float(), test_images.flatten(1).float()
    mean = train.mean(0)
    scale = (train - mean).square().sum(1).mean().sqrt()
    centre = mean if args.images == "centred" else 0
    return {"train": ((train - centre) / scale, labels.long()), "test": ((test - centre) / scale, test_labels.long())}


def full_name(dataset, args):
    return NAMES[dataset] + ", not centred" * (args.images == "raw")


def load(args):
    """-> the images of the training dataset; args.dataset becomes its name. `auto` says loudly when it falls back to drawn digits."""
    dataset = "mnist" if args.dataset == "auto" else args.dataset
    images = load_images(dataset, args)
    if images is None and args.dataset != "auto":
        common.fail(f"{NAMES[dataset]} is not in {args.data_dir} and cannot be downloaded; give its folder with --data-dir or IAI_DATA")
    if images is None:
        print(f"WARNING: MNIST is not in {args.data_dir} and cannot be downloaded: drawing GLYPHS instead. Nothing below is about MNIST.")
        dataset = "glyphs"
        if not args.out_given:  # runs on real data and on drawn digits never share a folder by default
            args.out += "-glyphs"
            common.check_out(args)
        images = load_images(dataset, args)
    print(f"data {full_name(dataset, args)}: {len(images['train'][1])} training images, {len(images['test'][1])} test images")
    args.dataset = args.description["args"]["dataset"] = dataset  # what --resume and --eval will ask for, without a fallback
    return images


# ---------------------------------------------------------------- the task


def sample_tasks(images, B, K, args):
    """B tasks with K mini-batches: a projection and a relabelling each, context from training and queries from test images."""
    projection = torch.randn(B, 784, args.dim, device=args.device)
    relabel = torch.randint(CLASSES, (B, CLASSES), device=args.device)  # a random function: merges, never splits

    def pick(split, n):
        images_of, labels = images[split]
        index = torch.randint(len(labels), (B, n), device=args.device)
        y = F.one_hot(relabel.gather(1, labels[index]), CLASSES).float()
        return images_of[index] @ projection, y  # projected here: pixels take eight times the memory

    query_x, query_y = pick("test", args.queries)
    context_x, context_y = zip(*(pick("train", args.context) for _ in range(K)))
    return Task(torch.stack(context_x), torch.stack(context_y), query_x, query_y)


def basis(x):
    """What the weights of the parametric regime are applied to, a linear softmax predictor: x (..., dim) -> x and a 1, at unit size.

    With a 1 that is not scaled down with x, updates that are sums over observations (--decoder span) would be about how often
    each label occurs, and little else.
    """
    return F.pad(x, (0, 1), value=1.0) * x.shape[-1] ** -0.5


def loss(logits, y):
    return -(y * logits.log_softmax(-1)).sum(-1)


def error(logits, y):
    return 100.0 * (logits.argmax(-1) != y.argmax(-1)).float()


# ---------------------------------------------------------------- training


def make_model(args):
    common.seed_all(common.WEIGHTS, args.seed)
    return common.place(common.REGIMES[args.regime](args, args.dim, CLASSES, loss, basis), args)


def train(model, images, args):
    """Greedy training (eqs. 9, 19-22): K losses, their gradients accumulated, one optimizer step."""
    optimizer = common.make_optimizer(model, args)
    journal = common.Journal(model, optimizer, args)
    model.train()

    def step():
        """Draws tasks and leaves the gradients of their K losses in the parameters -> the losses and the metric."""
        task = common.share(sample_tasks(images, args.tasks, args.steps, args))
        losses = []
        for prediction in refine(model, task):  # (T, B, Q, 10)
            step_loss = loss(prediction, task.query_y).mean()
            (step_loss / args.steps).backward()  # at once: memory does not grow with K
            losses.append(step_loss.detach())
        return losses, error(prediction[-1].detach(), task.query_y).mean()

    step = common.replayed(step, model, args)  # itself, or with --launch graph a CUDA graph of it
    for iteration in journal:
        common.seed_all(common.TRAINING, args.seed, iteration)
        common.set_learning_rate(optimizer, iteration, args)
        losses, metric = step()
        common.average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        journal.log(losses, metric)
    return journal.iteration, journal.seconds


# ---------------------------------------------------------------- evaluation


def logistic_regression(x, y, w, prior=10.0, iterations=100):
    """Softmax regression of B tasks at once: x (B, n, dim), one-hot y (B, n, C), start w (B, dim + 1, C) -> w.

    Minimizes mean cross-entropy + prior / n |w|^2 / 2, the posterior mode under a normal prior (picked on tasks that
    are not evaluated), by Nesterov's method with the step that the curvature allows.
    """
    x = F.pad(x, (0, 1), value=1.0)
    n = x.shape[1]
    curvature = 0.5 * torch.linalg.eigvalsh(x.mT @ x / n)[:, -1] + prior / n  # (B,), bounds the Hessian
    look = w
    for i in range(iterations):
        gradient = x.mT @ ((x @ look).softmax(-1) - y) / n + prior / n * look
        new = look - gradient / curvature[:, None, None]
        look, w = new + i / (i + 3) * (new - w), new
    return w


def nearest_neighbour(x, y, query_x):
    """The label of the nearest observation: x (B, n, dim), y (B, n, C), query_x (B, Q, dim) -> (B, Q, C)."""
    return y.take_along_dim(torch.cdist(query_x, x).argmin(-1)[..., None], 1)


def kernel_ridge(x, y, query_x, ridge=0.1):
    """A Gaussian process on the labels, kernel exp(-|x - x'|^2 / dim), ridge picked on tasks that are not evaluated.

    x (B, n, dim), y (B, n, C), query_x (B, Q, dim) -> how far its answers are from the prior mean 1 / C (B, Q, C), and
    their variance without noise (B, Q, 1).
    """
    kernel, C = common.gaussian_kernel, y.shape[-1]
    to_query = kernel(x, query_x)  # (B, n, Q)
    system = kernel(x, x) + ridge * torch.eye(x.shape[1], device=x.device)
    weights, gains = torch.linalg.solve(system, torch.cat([y - 1 / C, to_query], -1)).tensor_split([C], -1)  # (B, n, C), (B, n, Q)
    return to_query.mT @ weights, 1 - (to_query * gains).sum(1)[..., None]


def evaluate(model, images, dataset, args):
    """The model after 0 ... S fresh mini-batches (--eval-steps, or 2K), beside rivals that are given exactly the data it has seen so far."""
    steps = list(range(1, args.eval_steps + 1))
    ours, rivals = [], collections.defaultdict(list)
    sample = lambda B: sample_tasks(images, B, args.eval_steps, args)
    for task in common.evaluation_tasks(sample, args.eval_tasks, stream=list(NAMES).index(dataset)):
        ours.append(common.evaluate(model, task, error))
        w, product = torch.zeros(len(task.query_x), args.dim + 1, CLASSES, device=args.device), 0
        rows = collections.defaultdict(list)
        for k in steps:
            x, y = common.seen(task, k)
            answer, variance = kernel_ridge(task.context_x[k - 1], task.context_y[k - 1], task.query_x)
            # The mean of the product of the posteriors given each mini-batch alone, up to a factor that all labels share: a
            # reference for states of one answer a query.
            product = product + answer / variance
            w = logistic_regression(x, y, w)
            rows["kernel ridge"].append(kernel_ridge(x, y, task.query_x)[0])
            rows["kernel ridge, one a batch"].append(product)
            rows["logistic regression"].append(F.pad(task.query_x, (0, 1), value=1.0) @ w)
            rows["nearest neighbour"].append(nearest_neighbour(x, y, task.query_x))
            rows["majority label"].append(y.mean(1, keepdim=True).expand_as(task.query_y))
        for name, answers in rows.items():
            rivals[name].append(torch.stack([error(a, task.query_y).mean(1) for a in answers], 1))
    return common.summary(ours, name="error %", data=full_name(dataset, args)), {k: common.summary(v, steps) for k, v in rivals.items()}


# ---------------------------------------------------------------- main


def plot(out):
    common.plot_steps(out, common.read_results(out, "mnist"), log_scale=True)
    print(f"plot: {out}/error.png")


def main(argv=None):
    args = get_args(argv)
    if args.plot_only:
        return plot(args.plot_only)
    images = load(args)
    other = load_images(OTHER[args.dataset], args)  # before training: damaged files should not cost a run
    model = make_model(args)
    iterations, seconds = common.trained(args) if args.eval else train(model, images, args)
    metrics, baselines = {}, {}
    metrics["id"], baselines["id"] = evaluate(model, images, args.dataset, args)
    if other is None:
        print(f"ood not run: {NAMES[OTHER[args.dataset]]} is not in {args.data_dir} and cannot be downloaded")
    else:
        metrics["ood"], baselines["ood"] = evaluate(model, other, OTHER[args.dataset], args)
    common.write_results(args, model, full_name(args.dataset, args), iterations, seconds, metrics, baselines)
    plot(args.out)


if __name__ == "__main__":
    common.run(main)
