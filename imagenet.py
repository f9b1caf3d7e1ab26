"""N-way classification in context on frozen image features (sec. 9.3; tables 2 and 4, where the features are DINOv2's of ImageNet).

A task is `--ways` random classes and a random function from them to as many labels, which may merge classes and never splits
one: x = features of an image, y = label. Context from the training split, queries from the validation split. Out of
distribution: CIFAR-10 and CIFAR-100, through the same backbone. The metric is the error in %.

Features lie in `--data-dir`, and their names go into everything that a run writes. They are extracted once, by
    python imagenet.py --extract imagenet --source DIR --backbone dinov2_vits14    # then cifar10 and cifar100; see ... --help
or they are the .npz files of a stand-in: MobileNetV2 on Tiny ImageNet and CIFAR. Without any, classes are synthetic Gaussians.

    python imagenet.py                              # implicit, 20 ways; with the stand-in 54% after 1 step, 39% after 5; ten minutes on one core
    python imagenet.py --regime parametric          # the weights of a linear predictor as state: 62% and 50%
    python imagenet.py --features synthetic         # no files needed; the Bayes error is known
    python imagenet.py --preset paper               # 100 ways; one GPU
"""

import collections
import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import common  # before torch: it answers --help by itself
from common import Task, refine
from mnist import basis, error, kernel_ridge, logistic_regression, loss, nearest_neighbour

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

NAMES = {
    "imagenet": "ImageNet", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
    "tiny_imagenet": "Tiny ImageNet", "synthetic": "synthetic Gaussian classes (no images)", "strangers": "other synthetic Gaussian classes",
}  # fmt: skip
# Ways follow from the paper's tables; width, depth and tasks are those of related work; the rest is our choice.
PRESETS = {"paper": dict(ways=100, dim=1024, queries=100, tasks=128, width=256, depth=4, iters=50_000, lr=3e-4)}

# One part of a dataset: features x (n, dim), sorted by class, and where the C classes start and how many rows each has (C,).
Split = collections.namedtuple("Split", "x start count")
# A dataset as tasks are drawn from; `means` (C, dim) are the true ones of synthetic classes.
Features = collections.namedtuple("Features", "key name train test means", defaults=[None])


def folder_name(text):
    """An argparse type: a backbone's name as a folder's, torchvision:resnet50 -> torchvision-resnet50."""
    return common.path(os.path.basename(text)).replace(":", "-")


def get_args(argv=None):
    parser = common.make_parser("imagenet", __doc__, eval_steps=True)
    add = parser.add_argument_group("the data").add_argument
    known = "a backbone that was extracted, mobilenet_v2 (the .npz files), or synthetic; auto: the only one extracted, else the first of the others that is found"
    add("--features", type=folder_name, default="auto", help=known)
    add("--data-dir", type=common.path, default=os.environ.get("IAI_DATA") or "data", help="its features/ holds them (default: $IAI_DATA or data/)")
    add("--ways", type=common.number(int, 2), default=20, help="classes of a task")
    add("--dim", type=common.count, default=128, help="leading principal components of the features that are kept, at most (synthetic classes have up to 32)")
    parser.set_defaults(regime="implicit", steps=5, context=100, queries=64, tasks=8, iters=2500, lr=3e-3)
    parser.set_defaults(width=128, heads=1, state_scale=0.1, init="rotation", basis="fourier", hidden=1024)
    return common.parse_args(parser, PRESETS, argv)


# ---------------------------------------------------------------- the data


MOBILENET = "mobilenet_v2"  # the stand-in for DINOv2: features/tiny_imagenet.npz, cifar10.npz and cifar100.npz
FAMILIES, MEMBERS, FAMILY_STD, MEMBER_STD = 20, 10, 0.5, 0.3  # of the synthetic classes
NOISE_STD = (1 - FAMILY_STD**2 - MEMBER_STD**2) ** 0.5  # so that features have unit variance


def read_npz(path):
    """Features of the stand-in, int8 numbers times `scale`, in the form of read_features."""
    parts = {}
    with common.or_fail(f"{path} is damaged, or no file of features"), np.load(path) as f:
        for split in ("train", "test"):
            x, y = f[f"x_{split}"] * f["scale"].astype(np.float16), f[f"y_{split}"]
            whole = x.ndim == 2 and x.size and np.isfinite(x).all() and y.shape == x.shape[:1]
            if not whole or y.dtype.kind not in "iu" or y.min() < 0 or y.max() > 10**6:
                raise ValueError(f"x_{split} or y_{split} is not what it should be")
            parts[split] = [(x, y)]
    return parts, {"backbone": "MobileNetV2", "size": 1280, "weights_sha256": None}  # the network's size; files hold leading components


def principal(parts, dim):
    """Mean (1, d), `dim` leading principal directions (d, dim) and unit of up to 100,000 features; all splits are standardised with them.

    One unit for all directions: dividing each by its own deviation would make the noisiest as loud as the first.
    """
    step = -(-sum(len(y) for _, y in parts) // 100_000)
    x = torch.from_numpy(np.concatenate([x[::step] for x, _ in parts])).double()
    mean = x.mean(0, keepdim=True)
    x -= mean
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))  # ascending
    vectors = vectors.flip(1)[:, :dim]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # the same sign on all machines
    return mean.float(), vectors.float(), values.flip(0)[:dim].mean().sqrt().float()


def standardise(parts, statistics, device):
    """Shards -> x (n, dim) on the device, standardised, in half precision (ImageNet should fit), and y (n,), sorted by class."""
    mean, vectors, unit = (s.to(device) for s in statistics)
    x = torch.cat([((torch.tensor(x, device=device).float() - mean) @ vectors / unit).half() for x, _ in parts])
    y, order = torch.from_numpy(np.concatenate([y for _, y in parts]).astype(np.int64)).to(device).sort(stable=True)
    return x[order], y


def make_features(key, name, train, test, means=None):
    """(x, y) of both splits, sorted by class -> Features of the classes that both have."""
    size = 1 + int(max(train[1][-1], test[1][-1]))
    counts = [y.bincount(minlength=size) for _, y in (train, test)]
    both = (counts[0] > 0) & (counts[1] > 0)
    if not both.any():
        common.fail(f"{name}: no class has both training and held-out features")
    splits = [Split(x, (count.cumsum(0) - count)[both], count[both]) for (x, _), count in zip((train, test), counts)]
    print(f"data {name}: {int(both.sum())} classes, {len(train[1])} training and {len(test[1])} held-out features")
    return Features(key, name, *splits, means)


def draw_synthetic(key, seed, args):
    """Gaussian classes in families: a family's centre is Gaussian, its members' means are around it, features around those."""
    g, dim = torch.Generator().manual_seed(seed), min(args.dim, 32)  # in more dimensions twenty classes would hardly overlap
    families = FAMILY_STD * torch.randn(FAMILIES, 1, dim, generator=g)
    means = (families + MEMBER_STD * torch.randn(FAMILIES, MEMBERS, dim, generator=g)).flatten(0, 1)

    def draw(n):
        y = torch.arange(len(means)).repeat_interleave(n)
        return (means[y] + NOISE_STD * torch.randn(len(y), dim, generator=g)).to(args.device), y.to(args.device)

    return make_features(key, NAMES[key], draw(200), draw(50), means.to(args.device))


def load_images(args):
    """Features of images, all standardised with the statistics of what is trained on."""
    data, folder, stand_in = {}, Path(args.data_dir, "features"), args.features == MOBILENET
    datasets = {"id": "tiny_imagenet" if stand_in else "imagenet", "ood_cifar10": "cifar10", "ood_cifar100": "cifar100"}
    for split, dataset in datasets.items():
        path = folder / f"{dataset}.npz" if stand_in else folder / args.features / dataset
        if not path.exists() and split == "id":
            common.fail(f"no features at {path}: extract them (imagenet.py --extract imagenet --help), or drop --features")
        if not path.exists():
            print(f"{split} will not run: no features at {path}")
            continue
        parts, facts = read_npz(path) if stand_in else read_features(path)
        if split == "id":
            weights, statistics = facts["weights_sha256"], principal(parts["train"], args.dim)
        d, dim = statistics[1].shape
        if facts["weights_sha256"] != weights or any(x.shape[1] != d for part in parts.values() for x, _ in part):
            common.fail(f"{path} and the features that are trained on come from different weights: extract one of them again")
        name = f"{NAMES[dataset]}, {facts['backbone']} features ({dim} of {facts['size']:,} dimensions by PCA)"
        train, test = (standardise(parts[s], statistics, args.device) for s in ("train", "test"))
        data[split] = make_features(dataset, name, train, test)
    return data


def load(args):
    """-> {"id": what is trained on, "ood_cifar10": ..., ...}; args.features becomes the backbone. `auto` says loudly when it finds none."""
    if args.features == "auto":
        folder = Path(args.data_dir, "features")
        found = sorted(path.parts[-3] for path in folder.glob("*/imagenet/features.json"))
        if len(found) > 1:
            common.fail(f"{args.data_dir} has features of several backbones: choose one with --features {'|'.join(found)}")
        args.features = found[0] if found else MOBILENET if (folder / "tiny_imagenet.npz").exists() else "synthetic"
        if args.features == "synthetic":
            print(f"WARNING: no features in {folder}: drawing SYNTHETIC Gaussian classes instead. Nothing below is about images.")
            if not args.out_given:  # runs on features of images and on drawn ones never share a folder by default
                args.out += "-synthetic"
                common.check_out(args)
    args.description["args"]["features"] = args.features  # what --resume and --eval will ask for, without a fallback
    if args.features == "synthetic":
        data = {"id": draw_synthetic("synthetic", 1, args), "ood": draw_synthetic("strangers", 2, args)}
    else:
        data = load_images(args)
    if args.ways > len(data["id"].train.count):
        common.fail(f"--ways {args.ways} is more than the {len(data['id'].train.count)} classes of {data['id'].name}")
    return data


# ---------------------------------------------------------------- the task


def draw_classes(B, classes, args):
    """For B tasks: `--ways` of the classes (or all, if there are fewer) and the label of each, a random function -> (B, ways) twice."""
    chosen = torch.rand(B, classes, device=args.device).argsort(1)[:, : args.ways]
    return chosen, torch.randint(args.ways, chosen.shape, device=args.device)  # merges, never splits


def sample_tasks(features, B, K, args):
    """B tasks with K mini-batches: classes and labels of their own, context from training and queries from held-out features.

    One-hot labels of the context are times sqrt(ways), so that their numbers are of order one as those of x are: without
    it labels are a whisper among the features, and the plateau of training was twice as long.
    """
    chosen, relabel = draw_classes(B, len(features.train.count), args)

    def pick(split, n):
        slot = torch.randint(chosen.shape[1], (B, n), device=args.device)  # classes are equally likely
        c = chosen.gather(1, slot)
        row = split.start[c] + torch.randint(2**40, (B, n), device=args.device) % split.count[c]  # randint has one bound for all
        return split.x[row].float(), F.one_hot(relabel.gather(1, slot), args.ways).float()  # (B, n, dim), (B, n, ways)

    query_x, query_y = pick(features.test, args.queries)
    context_x, context_y = zip(*(pick(features.train, args.context) for _ in range(K)))
    return Task(torch.stack(context_x), args.ways**0.5 * torch.stack(context_y), query_x, query_y)


# ---------------------------------------------------------------- training


def make_model(features, args):
    common.seed_all(common.WEIGHTS, args.seed)
    dim = features.train.x.shape[1]
    return common.place(common.REGIMES[args.regime](args, dim, args.ways, loss, basis), args)


def train(model, features, args):
    """Greedy training (eqs. 9, 19-22): K losses, their gradients accumulated, one optimizer step."""
    optimizer = common.make_optimizer(model, args)
    journal = common.Journal(model, optimizer, args)
    model.train()

    def step():
        """Draws tasks and leaves the gradients of their K losses in the parameters -> the losses and the metric."""
        task = common.share(sample_tasks(features, args.tasks, args.steps, args))
        losses = []
        for prediction in refine(model, task):  # (T, B, Q, ways)
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


def nearest_mean(x, y, query_x):
    """Minus the distance to the mean of each label's observations: x (B, n, dim), y (B, n, ways), query_x (B, Q, dim) -> (B, Q, ways)."""
    count = y.sum(1)  # (B, ways)
    means = y.mT @ x / count.clamp(min=1)[..., None]
    return (-torch.cdist(query_x, means)).masked_fill((count == 0)[:, None], -torch.inf)  # labels that were not seen


def fitted(x, y, query_x, prior):
    """Logistic regression on (x, y), and what it says about the queries."""
    start = torch.zeros(len(x), x.shape[-1] + 1, y.shape[-1], device=x.device)
    return F.pad(query_x, (0, 1), value=1.0) @ logistic_regression(x, y, start, prior)


def seen(task, k):
    """The observations of the first k mini-batches: x (B, k N, dim), one-hot y (B, k N, ways)."""
    x, y = common.seen(task, k)
    return x, (y > 0).float()


def best_priors(sample, steps):
    """The prior with which logistic regression errs least after each of `steps`, on 32 tasks that are not evaluated."""
    common.seed_all(common.EVALUATION, 1000)
    task = sample(32)
    errs = lambda k, prior: float(error(fitted(*seen(task, k), task.query_x, prior), task.query_y).mean())
    return [min((3.0, 10.0, 30.0, 100.0, 300.0), key=lambda prior: errs(k, prior)) for k in steps]


def bayes_error(features, args, tasks=500, n=100):
    """Error in % of one who knows the means of the synthetic classes and the task's labels: 1 - the largest posterior -> (tasks,)."""
    common.seed_all(common.EVALUATION, 1001)
    chosen, relabel = draw_classes(tasks, len(features.means), args)
    means = features.means[chosen]  # (tasks, ways, dim)
    slot = torch.randint(chosen.shape[1], (tasks, n, 1), device=args.device)
    x = means.take_along_dim(slot, 1)
    x = x + NOISE_STD * torch.randn_like(x)
    classes = (-torch.cdist(x, means).square() / (2 * NOISE_STD**2)).softmax(-1)  # (tasks, n, ways)
    return 100 * (1 - (classes @ F.one_hot(relabel, args.ways).float()).amax(-1)).mean(1)


def evaluate(model, features, args):
    """The model after 0 ... S fresh mini-batches (--eval-steps, or 2K), beside rivals that are given exactly the data it has seen so far."""
    steps = sorted({min(k, args.eval_steps) for k in (1, 2, args.steps, args.eval_steps)})  # of the rivals: logistic regression is slow
    sample = lambda B: sample_tasks(features, B, args.eval_steps, args)
    priors = best_priors(sample, steps)
    ours, rivals = [], collections.defaultdict(list)
    for task in common.evaluation_tasks(sample, args.eval_tasks, stream=list(NAMES).index(features.key)):
        ours.append(common.evaluate(model, task, error))
        rows = collections.defaultdict(list)
        for k, prior in zip(steps, priors):
            x, y = seen(task, k)
            rows["nearest class mean"].append(nearest_mean(x, y, task.query_x))
            rows["kernel ridge"].append(kernel_ridge(x, y, task.query_x)[0])
            rows["logistic regression"].append(fitted(x, y, task.query_x, prior))
            rows["nearest neighbour"].append(nearest_neighbour(x, y, task.query_x))
            rows["majority label"].append(y.mean(1, keepdim=True).expand_as(task.query_y))
        for name, answers in rows.items():
            rivals[name].append(torch.stack([error(a, task.query_y).mean(1) for a in answers], 1))
    baselines = {name: common.summary(chunks, steps) for name, chunks in rivals.items()}
    if features.means is not None:
        floor = bayes_error(features, args)
        print(f"Bayes error of {features.name}: {floor.mean():.2f}%")
        baselines["class means known, other tasks"] = common.summary([floor[:, None].expand(-1, len(steps))], steps)
    classes = len(features.train.count)
    few = f", {classes} ways" if classes < args.ways else ""
    return common.summary(ours, name="error %", data=features.name + few), baselines


# ---------------------------------------------------------------- extraction
#
# Features of images by a frozen backbone, computed once. features/BACKBONE/DATASET/ holds shards, train-00000.npy ...
# test-00000.npy ..., each moved into place when it is whole, and features.json: what they are and how many. A kill costs the
# shard that was being computed.


SHARD = 4096  # images in a file: ImageNet in some 330, since every memory map holds its file open and 1,024 is a usual limit


def get_extraction_args(argv):
    parser = common.Parser(prog="imagenet.py --extract imagenet", description=extract.__doc__, formatter_class=common.HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--extract", choices=("imagenet", "cifar10", "cifar100"), required=True, help="the dataset")
    add("--source", type=common.path, required=True, help="of ImageNet: train/ and val/, with a folder a class; of CIFAR: torchvision's folder")
    add("--backbone", type=common.path, default="dinov2_vits14", help="of DINOv2's hub, or torchvision:NAME, a classifier without its last layer")
    add("--weights", type=common.path, metavar="FILE", help="a state dict to use instead of the published one")
    add("--hub-dir", type=common.path, metavar="DIR", help="a copy of github.com/facebookresearch/dinov2")
    add("--data-dir", type=common.path, default=os.environ.get("IAI_DATA") or "data", help="writes to its features/ (default: $IAI_DATA or data/)")
    add("--batch", type=common.count, default=64, help="images in a forward pass")
    add("--workers", type=common.number(int, 0), default=os.cpu_count(), help="processes that decode images; 0: none but this one")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    args.device = common.pick_device(args.device, "auto")[0]
    return args


def load_backbone(args):
    """-> a network from images to features (B, d), the preprocessing that it was trained for, and d."""
    from torchvision import models, transforms

    name = args.backbone.removeprefix("torchvision:")
    origin = args.weights or args.hub_dir or "the network"
    trouble = f"cannot load {args.backbone} from {origin}; --weights FILE and --hub-dir DIR take what is on disk"
    with common.or_fail(trouble), contextlib.redirect_stderr(sys.stdout):  # downloads announce themselves; stderr is for what is wrong
        if name == args.backbone:
            hub, where = (args.hub_dir, "local") if args.hub_dir else ("facebookresearch/dinov2", "github")
            model = torch.hub.load(hub, name, source=where, trust_repo=True, skip_validation=True, pretrained=not args.weights)
            resize = transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC)
            normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # as its repository evaluates
            preprocess = transforms.Compose([resize, transforms.CenterCrop(224), transforms.ToTensor(), normalize])
        else:
            model = models.get_model(name, weights=None if args.weights else "DEFAULT")
            model.transform_input = True  # GoogLeNet and Inception; torchvision sets it with its own weights only
            preprocess = models.get_model_weights(name).DEFAULT.transforms()
        if args.weights:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        if name != args.backbone:
            linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
            if not linear:
                raise ValueError("it does not end in a linear layer")
            model.set_submodule(linear[-1], nn.Identity())
        model.requires_grad_(False).eval().to(args.device)
        return model, preprocess, forward(model, preprocess(Image.new("RGB", (256, 256)))[None], args).shape[1]


def open_source(args, preprocess):
    """-> {"train": ..., "test": ...}, torchvision's datasets: (preprocessed image, label) by index."""
    from torchvision import datasets

    with common.or_fail(f"--source {args.source} does not hold {NAMES[args.extract]}"), contextlib.redirect_stderr(sys.stdout):
        if args.extract == "imagenet":
            train, test = (datasets.ImageFolder(os.path.join(args.source, part), preprocess) for part in ("train", "val"))
        else:
            cifar = getattr(datasets, args.extract.upper())
            there = os.path.isdir(args.source)  # a mistyped folder is not made
            train, test = (cifar(args.source, part, preprocess, download=there) for part in (True, False))
        if train.classes != test.classes:
            raise ValueError("train/ and val/ do not have the same classes")
    return {"train": train, "test": test}


class Decoded(torch.utils.data.Dataset):
    """A torchvision dataset in which an image that cannot be decoded is black and has the label -1."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        try:
            return self.images[index]
        except Exception as problem:  # decoders raise errors of all kinds
            if getattr(problem, "errno", None) or isinstance(problem, MemoryError):
                raise  # a disk, a network or the memory failed, not this image
            return self.images.transform(Image.new("RGB", (256, 256))), -1


def quiet_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers


@torch.no_grad()
def forward(model, pixels, args):
    """Features (B, d), on the CPU. Half precision on a GPU, as they are stored."""
    with torch.autocast("cuda", torch.float16, enabled=args.device.startswith("cuda")):
        return model(pixels.to(args.device, non_blocking=True)).flatten(1).float().cpu()


def row_type(size):
    """An image in a shard: its place in the source, its label, its features. A gap in the places is an image that was skipped."""
    return np.dtype([("image", "<i4"), ("label", "<i4"), ("x", "<f2", (size,))])


def read_shard(path, size):
    """A shard, memory-mapped; None if it is not there, or not whole."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.dtype == row_type(size) else None


def read_features(folder):
    """A finished extraction, memory-mapped -> {"train": [(x (n, d), y (n,)) of each shard], "test": ...}, features.json."""
    parts = {}
    with common.or_fail(f"{folder} is damaged, or an extraction that did not finish: run its command again, or delete it if that is no help"):
        facts = json.loads(Path(folder, "features.json").read_text())
        for split in ("train", "test"):
            count = facts["count"][split]  # which is there once all shards are
            shards = [read_shard(path, facts["size"]) for path in sorted(Path(folder).glob(f"{split}-*.npy"))]
            if any(rows is None for rows in shards) or sum(map(len, shards)) != count:
                raise ValueError(f"it does not hold the {count} images of {split}")
            parts[split] = [(rows["x"], rows["label"]) for rows in shards]
        if not facts.keys() >= {"backbone", "weights_sha256"}:
            raise ValueError("features.json does not say what made them")
    return parts, facts


def describe(args, source, model, preprocess, size):
    """The facts that identify a set of features: an extraction goes on in a folder only where all of them are equal."""
    weights, listing = hashlib.sha256(), hashlib.sha256()
    for name, values in model.state_dict().items():
        weights.update(name.encode() + values.cpu().contiguous().numpy().tobytes())
    for images in source.values():
        for path, label in getattr(images, "samples", []):  # CIFAR is no list of files, and torchvision knows its checksum
            listing.update(os.fsencode(f"{os.path.relpath(path, args.source)} {label}\n"))
    return {
        "dataset": args.extract, "backbone": args.backbone + (f" with {os.path.basename(args.weights)}" if args.weights else ""),
        "weights_sha256": weights.hexdigest(), "preprocessing": " ".join(str(preprocess).split()), "listing_sha256": listing.hexdigest(),
        "size": size, "images_per_shard": SHARD,
    }  # fmt: skip


def extract_split(split, images, model, size, folder, args):
    """Writes the shards that are missing or not whole -> the names of the images that cannot be decoded."""
    indices = torch.arange(len(images))
    shards = {folder / f"{split}-{i:05d}.npy": shard for i, shard in enumerate(indices.split(SHARD))}
    todo = {path: shard.split(args.batch) for path, shard in shards.items() if read_shard(path, size) is None}
    plan = [batch.tolist() for batches in todo.values() for batch in batches]
    left, start = sum(map(len, plan)), time.time()
    workers = dict(num_workers=args.workers, worker_init_fn=quiet_worker, pin_memory=args.device.startswith("cuda"))
    decoded = iter(torch.utils.data.DataLoader(Decoded(images), batch_sampler=plan, **workers))  # workers go on while a shard is written
    with tqdm(desc=split, total=len(images), initial=len(images) - left, unit="image", dynamic_ncols=True) as bar:
        for path, batches in todo.items():
            rows = []
            for batch, (pixels, label) in zip(batches, decoded):
                x = forward(model, pixels, args).half()
                if not x.isfinite().all():
                    common.fail(f"{args.backbone} gives features that are not finite in half precision")
                good = label >= 0
                rows += zip(batch[good].tolist(), label[good].tolist(), x[good].numpy())
                bar.update(len(batch))
            common.replace_file(str(path), lambda f: np.save(f, np.array(rows, row_type(size))))
    if todo:
        speed, start = left / (time.time() - start), time.time()
        whole = max(map(len, plan))  # the last one may be smaller, and all of them smaller than --batch
        for _ in range(3):
            forward(model, pixels[:1].expand(whole, -1, -1, -1), args)
        alone = 3 * whole / (time.time() - start)
        print(f"{split}: {speed:.1f} images/s, {100 * speed / alone:.0f}% of the {alone:.1f} that the backbone does by itself")
    else:
        print(f"{split}: nothing to do, all of it was there")
    kept = np.concatenate([read_shard(path, size)["image"] for path in shards])
    if not len(kept):
        common.fail(f"no image of {split} can be decoded")
    name = lambda i: os.path.relpath(images.samples[i][0], args.source) if args.extract == "imagenet" else f"{split} {i}"
    return [name(i) for i in np.setdiff1d(indices, kept)]


def extract(argv):
    """Extracts features of a dataset by a frozen backbone. The same command again goes on where it was stopped."""
    signal.signal(signal.SIGINT, lambda *_: common.fail("interrupted; finished shards are kept, and the same command goes on", 130))
    socket.setdefaulttimeout(20)
    if common.RANKS > 1:
        common.fail("--extract is for one process: start it without torchrun")
    args = get_extraction_args(argv)
    model, preprocess, size = load_backbone(args)
    source = open_source(args, preprocess)
    asked = describe(args, source, model, preprocess, size)
    folder = Path(args.data_dir, "features", folder_name(args.backbone), args.extract)
    path = folder / "features.json"
    if not path.exists() and any(folder.glob("*.npy")):
        common.fail(f"{folder} has features, but no features.json that says what made them: delete it to extract it again")
    with common.or_fail(f"{path} is damaged: delete its folder to extract it again"):
        facts = json.loads(path.read_text()) if path.exists() else asked | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        different = [key for key in asked if facts.get(key) != asked[key]]
    if different:
        common.fail(f"{folder} holds other features (not the same {', '.join(different)}): delete it, or choose another --data-dir")
    print(f"{NAMES[args.extract]} through {facts['backbone']} on {args.device}: {size} features an image; writes to {folder}")
    common.write_json(str(path), facts)
    try:
        skipped = {split: extract_split(split, images, model, size, folder, args) for split, images in source.items()}
    except (OSError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "DataLoader worker" not in str(problem):
            raise
        common.fail(f"cannot go on with {folder}: {str(problem).splitlines()[-1]}")
    if not facts.keys() >= {"count", "skipped"}:  # counted once: shards of another extraction do not fit
        facts["count"] = {split: len(images) - len(skipped[split]) for split, images in source.items()}
        facts["skipped"] = skipped
        common.write_json(str(path), facts)
    names = facts["skipped"]["train"] + facts["skipped"]["test"]
    for name in names:
        print(f"skipped {name}: could not be decoded")
    print(f"{sum(facts['count'].values())} images, {len(names)} skipped")


# ---------------------------------------------------------------- main


def plot(out):
    common.plot_steps(out, common.read_results(out, "imagenet"), log_scale=True)
    print(f"plot: {out}/error.png")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--extract" for word in argv):
        return extract(argv)
    args = get_args(argv)
    if args.plot_only:
        return plot(args.plot_only)
    data = load(args)  # what is out of distribution too: damaged files should not cost a run
    model = make_model(data["id"], args)
    iterations, seconds = common.trained(args) if args.eval else train(model, data["id"], args)
    metrics, baselines = {}, {}
    for split, features in data.items():
        metrics[split], baselines[split] = evaluate(model, features, args)
    common.write_results(args, model, data["id"].name, iterations, seconds, metrics, baselines)
    plot(args.out)


if __name__ == "__main__":
    common.run(main)
