"""Features of images by a frozen backbone, computed once: what `python imagenet.py --extract ...` runs, and the reader of its files.

features/BACKBONE/DATASET/ holds shards of 1,024 images, train-00000.npy ... test-00000.npy ..., each moved into place when it is
whole, and features.json: what they are and, once all are there, how many. A kill costs the shard that was being computed.
"""

import contextlib
import datetime
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import common

NAMES = {"imagenet": "ImageNet", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
DINOV2 = ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14")
SHARD = 1024  # images in a file


def get_args(argv):
    about = "Features of a dataset by a frozen backbone. The same command again goes on where it was stopped."
    parser = common.Parser(prog="imagenet.py --extract imagenet", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--extract", choices=NAMES, required=True, help="the dataset")
    add("--source", type=common.path, required=True, help="imagenet: the folder of train/ and val/, which have a folder for each class; CIFAR: torchvision's folder")
    add("--backbone", type=backbone, default=DINOV2[0], help=f"{', '.join(DINOV2)}, or torchvision:NAME for any of its classifiers (the layer before the last)")
    add("--weights", type=common.path, metavar="FILE", help="a state dict to use instead of the published one")
    add("--hub-dir", type=common.path, metavar="DIR", help="a copy of github.com/facebookresearch/dinov2")
    add("--data-dir", type=common.path, default=os.environ.get("IAI_DATA", "data"), help="writes to its features/BACKBONE/ (default: $IAI_DATA or data/)")
    add("--batch", type=common.count, default=64, help="images in a forward pass")
    add("--workers", type=common.number(int, 0), default=os.cpu_count(), help="processes that decode images; 0: none but this one")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    args.device, _, _ = common.pick_device(args.device, "auto")
    socket.setdefaulttimeout(20)
    return args


def backbone(text):
    """An argparse type."""
    if text not in DINOV2:
        from torchvision import models

        if text not in [f"torchvision:{name}" for name in models.list_models(module=models)]:
            raise common.argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DINOV2)} and no classifier torchvision:NAME")
    return text


def folder_name(text):
    """An argparse type: a backbone's name as a folder's, torchvision:resnet50 -> torchvision-resnet50."""
    return common.path(os.path.basename(text)).replace(":", "-")


# ---------------------------------------------------------------- images and backbones


def first_line(problem):
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def open_source(args):
    """-> {"train": ..., "test": ...}, torchvision's datasets: (PIL image, label) by index."""
    from torchvision import datasets

    if not os.path.isdir(args.source):
        common.fail(f"--source {args.source} is no folder")
    try:
        if args.extract == "imagenet":
            images = {split: datasets.ImageFolder(os.path.join(args.source, part)) for split, part in (("train", "train"), ("test", "val"))}
        else:
            kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[args.extract]
            with contextlib.redirect_stderr(sys.stdout):  # downloads announce themselves; stderr is for what is wrong
                images = {split: kind(args.source, train=split == "train", download=True) for split in ("train", "test")}
    except (OSError, RuntimeError) as problem:
        common.fail(f"--source {args.source} does not hold {NAMES[args.extract]}: {first_line(problem)}")
    if images["train"].classes != images["test"].classes:
        common.fail(f"--source {args.source}: train/ and val/ do not have the same classes")
    return images


def load_backbone(args):
    """-> a network from images to features (B, d), and the preprocessing that it was trained for."""
    from torchvision import models

    name = args.backbone.removeprefix("torchvision:")
    try:
        with contextlib.redirect_stderr(sys.stdout):
            if name == args.backbone:
                where = dict(source="local") if args.hub_dir else dict(skip_validation=True, trust_repo=True)
                model = torch.hub.load(args.hub_dir or "facebookresearch/dinov2", name, pretrained=not args.weights, verbose=False, **where)
                preprocess = dinov2_preprocess()
            else:
                published = models.get_model_weights(name).DEFAULT
                model, preprocess = models.get_model(name, weights=None if args.weights else published), published.transforms()
            if args.weights:
                model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
    except Exception as problem:  # a network, an archive, a pickle or a hub's own code: each raises errors of its own
        files = f" with {args.weights}" if args.weights else ""
        common.fail(f"cannot load {args.backbone}{files}: {first_line(problem)} (--weights FILE and --hub-dir DIR take what is on disk)")
    if name != args.backbone:
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            common.fail(f"--backbone {args.backbone} does not end in a linear layer: choose another")
        model.set_submodule(linear[-1], nn.Identity())
    return model.requires_grad_(False).eval().to(args.device), preprocess


def dinov2_preprocess():
    """As its repository evaluates (dinov2/data/transforms.py)."""
    from torchvision import transforms as t

    resize = t.Resize(256, interpolation=t.InterpolationMode.BICUBIC)
    return t.Compose([resize, t.CenterCrop(224), t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


class Decoded(torch.utils.data.Dataset):
    """(index, label, preprocessed image), made in worker processes; None in place of an image that cannot be decoded."""

    def __init__(self, images, preprocess):
        self.images, self.preprocess = images, preprocess

    def __getitem__(self, index):
        try:
            image, label = self.images[index]
        except (OSError, SyntaxError, ValueError, EOFError, struct.error):  # what decoders raise
            return None
        return index, label, self.preprocess(image.convert("RGB"))


def collate(rows):
    good = [row for row in rows if row is not None]
    return torch.utils.data.default_collate(good) if good else None


def quiet_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers


@torch.no_grad()
def forward(model, pixels, args):
    """Features (B, d), on the CPU. Half precision on a GPU, as they are stored."""
    with torch.autocast(torch.device(args.device).type, torch.float16, enabled=args.device.startswith("cuda")):
        return model(pixels.to(args.device, non_blocking=True)).flatten(1).float().cpu()


# ---------------------------------------------------------------- files


def row_type(size):
    """An image in a shard: its place in the source, its label, its features. A gap in the places is an image that was skipped."""
    return np.dtype([("image", "<i4"), ("label", "<i4"), ("x", "<f2", (size,))])


def shard_paths(folder, split, images):
    return [Path(folder, f"{split}-{i:05d}.npy") for i in range(-(-images // SHARD))]


def read_shard(path, size):
    """A shard, memory-mapped; None if it is not there, or not whole."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.ndim == 1 and rows.dtype == row_type(size) else None


def write_shard(path, rows):
    with open(path, "wb") as f:
        np.save(f, rows)


def read_facts(folder):
    try:
        facts = json.loads(Path(folder, "features.json").read_text())
        kinds = {"backbone": str, "weights_sha256": str, "size": int, "images": dict}
        if not all(isinstance(facts[key], kind) for key, kind in kinds.items()) or facts["images"].keys() != {"train", "test"}:
            raise ValueError
        return facts
    except (OSError, ValueError, KeyError, TypeError):
        common.fail(f"{folder}/features.json is missing or damaged: delete the folder to extract it again")


def write_facts(folder, facts):
    common.replace_file(str(folder / "features.json"), lambda path: common.write_text(path, json.dumps(facts, indent=1)))


def read_features(folder):
    """A finished extraction, memory-mapped -> {"train": [(x (n, d), y (n,)) of each shard], "test": ...}, features.json."""
    facts = read_facts(folder)
    if "count" not in facts:
        common.fail(f"{folder} is an extraction that did not finish: run its command again")
    parts = {}
    for split, images in facts["images"].items():
        shards = [read_shard(path, facts["size"]) for path in shard_paths(folder, split, images)]
        if any(rows is None for rows in shards):
            common.fail(f"{folder}: shards of {split} are missing or damaged: run its --extract command again")
        if sum(map(len, shards)) != facts["count"][split]:
            common.fail(f"{folder}: shards do not hold {facts['count'][split]} images of {split}: delete the folder to extract it again")
        parts[split] = [(rows["x"], rows["label"]) for rows in shards]
    return parts, facts


# ---------------------------------------------------------------- main


def describe(args, source, model, preprocess):
    """What makes features these and no others: a folder is continued with the same only."""
    from PIL import Image

    weights, listing = hashlib.sha256(), hashlib.sha256()
    for name, values in model.state_dict().items():
        weights.update(name.encode() + values.cpu().contiguous().numpy().tobytes())
    for images in source.values():
        for path, label in getattr(images, "samples", []):
            listing.update(f"{os.path.relpath(path, args.source)} {label}\n".encode())
    return {
        "dataset": args.extract, "backbone": args.backbone + (f" with {os.path.basename(args.weights)}" if args.weights else ""),
        "weights_sha256": weights.hexdigest(), "preprocessing": " ".join(str(preprocess).split()),
        "size": forward(model, preprocess(Image.new("RGB", (256, 256)))[None], args).shape[1],
        "images": {split: len(images) for split, images in source.items()}, "listing_sha256": listing.hexdigest(),
    }  # fmt: skip


def extract_split(folder, split, images, model, facts, args, bar):
    """Writes the shards that are missing -> images read, seconds, and the last batch of them."""
    paths = shard_paths(folder, split, len(images.images))
    shards = [range(i * SHARD, min((i + 1) * SHARD, len(images.images))) for i in range(len(paths))]
    todo = [i for i, path in enumerate(paths) if read_shard(path, facts["size"]) is None]
    plan = [list(shards[i][j : j + args.batch]) for i in todo for j in range(0, len(shards[i]), args.batch)]  # no batch is in two shards
    bar.update(len(images.images) - sum(map(len, plan)))
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=plan, num_workers=args.workers, collate_fn=collate, worker_init_fn=quiet_worker, pin_memory=args.device.startswith("cuda")
    )
    start, rows, last = time.time(), [], None
    for batch, decoded in zip(plan, loader):
        if decoded is not None:
            index, label, last = decoded
            x = forward(model, last, args).half()
            if not x.isfinite().all():
                common.fail(f"{facts['backbone']} gives features that are not finite in half precision")
            rows.append(np.empty(len(x), row_type(facts["size"])))
            rows[-1]["image"], rows[-1]["label"], rows[-1]["x"] = index, label, x
        bar.update(len(batch))
        i = batch[0] // SHARD
        if batch[-1] == shards[i][-1]:
            rows = np.concatenate([np.empty(0, row_type(facts["size"])), *rows])
            common.replace_file(str(paths[i]), lambda path: write_shard(path, rows))
            rows = []
    return sum(map(len, plan)), time.time() - start, last


def main(argv):
    args = get_args(argv)
    try:
        extract(args)
    except KeyboardInterrupt:
        common.fail("interrupted; finished shards are kept, and the same command goes on", 130)


def extract(args):
    source = open_source(args)
    model, preprocess = load_backbone(args)
    facts = describe(args, source, model, preprocess)
    folder = Path(args.data_dir, "features", folder_name(args.backbone), args.extract)
    before = read_facts(folder) if (folder / "features.json").exists() else facts
    different = [key for key in facts if before.get(key) != facts[key]]
    if different:
        common.fail(f"{folder} holds other features (not the same {', '.join(different)}): delete it, or choose another --data-dir")
    print(f"{NAMES[args.extract]} through {facts['backbone']} on {args.device}: {facts['size']} features an image; writes to {folder}")
    done, seconds, last = 0, 0.0, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_facts(folder, before)
        with tqdm(total=sum(facts["images"].values()), unit="image", dynamic_ncols=True) as bar:
            for split, images in source.items():
                n, s, batch = extract_split(folder, split, Decoded(images, preprocess), model, facts, args, bar)
                done, seconds, last = done + n, seconds + s, last if batch is None else batch
    except OSError as problem:
        common.fail(f"cannot write to {folder}: {problem.strerror or problem}")
    if not done and "count" in before:
        return print("nothing to do: all of it was there")
    facts |= {"count": {}, "skipped": {}, "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    for split, images in source.items():
        kept = np.concatenate([read_shard(path, facts["size"])["image"] for path in shard_paths(folder, split, len(images))])
        skipped = sorted(set(range(len(images))) - set(kept.tolist()))
        facts["count"][split] = len(kept)
        name = lambda i: os.path.relpath(images.samples[i][0], args.source) if args.extract == "imagenet" else f"{split} {i}"
        facts["skipped"][split] = [name(i) for i in skipped]
        for name in facts["skipped"][split]:
            print(f"skipped {name}: cannot be decoded")
        if not len(kept):
            common.fail(f"no image of {split} can be decoded")
    print(f"{sum(facts['count'].values())} images, {sum(map(len, facts['skipped'].values()))} skipped")
    if last is not None:
        start = time.time()
        for _ in range(3):
            forward(model, last, args)
        speed, alone = done / seconds, 3 * len(last) / (time.time() - start)
        print(f"{speed:.1f} images/s, {100 * speed / alone:.0f}% of the {alone:.1f} that the backbone does by itself")
        facts |= {"images_per_second": round(speed, 1), "backbone_images_per_second": round(alone, 1)}
    write_facts(folder, facts)
