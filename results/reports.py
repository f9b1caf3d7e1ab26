"""What bench.py and the programs in results/ share: the file that each writes, a clock, and the scripts that they set to work."""

import contextlib
import datetime
import importlib
import io
import itertools
import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections import namedtuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler chats on stderr

import common  # before torch: it answers --help by itself

import numpy as np
import torch

# ---------------------------------------------------------------- flags and files


def make_parser(program, doc):
    """The flags of a program that writes one JSON file; it adds its own."""
    parser = common.Parser(prog=program, description=doc, formatter_class=common.HelpFormatter, allow_abbrev=False)
    out = f"out/{os.path.basename(program).removesuffix('.py')}.json"
    parser.add_argument("--out", type=common.path, metavar="FILE", default=out, help="the JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    return parser


def parse_args(parser, argv, fixed=()):
    """Checks where the report and its plot would go; args.more are the flags that are left for the scripts, `fixed` those that say nothing here."""
    args, args.more = parser.parse_known_args(argv)
    if wrong := [word for word in args.more if word.partition("=")[0] in ("--regime", "--eval", "--resume", "--iters", *fixed)]:
        common.fail(f"{wrong[0]}: {parser.prog} sets it by its own flags and arguments (see --help)")
    if common.RANKS > 1:
        common.fail(f"{parser.prog} runs on one rank: start it without torchrun, or unset WORLD_SIZE and RANK")
    plot = os.path.splitext(args.out)[0] + ".png"
    if args.out == plot or not os.path.basename(args.out):
        common.fail(f"--out {args.out}: the report is a JSON file, not a folder, and its plot, if there is one, lies beside it as .png")
    for path in filter(os.path.lexists, (args.out, plot)):
        checkpoint = os.path.realpath(getattr(args, "file", ""))
        if not os.path.isfile(path) or os.path.realpath(path) == checkpoint:  # a folder or a device, or what is read
            common.fail(f"--out {args.out}: {path} is not to be replaced: give another file")
        if not args.overwrite:
            common.fail(f"--out {args.out}: {path} exists: give another file, or --overwrite")
    common.check_out(Namespace(eval=None, resume=None, overwrite=True, out=os.path.dirname(args.out) or "."))
    args.command = shlex.join(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])
    return args


def header(wanted, args):
    """What every report begins with: `wanted` are the flags of the program, `args` those of a script."""
    return {
        "command": wanted.command, "machine": common.machine(args.device), "device": args.device, "dtype": args.dtype,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }  # fmt: skip


# ---------------------------------------------------------------- time and memory


def now(device):
    """Seconds, when all that the device was given is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(call, device):
    """Peak of the tensors that a call makes."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def exponent(K, values):
    """p of K^p: the slope of log values against log K."""
    return round(float(np.polyfit(np.log(K), np.log(values), 1)[0]), 3) + 0.0  # never -0


def line(left, right, cells):
    return f"{left:9} {right:10}" + " ".join(f"{c:>9}" if isinstance(c, str) else f"{c:9.2f}" for c in cells)


# ---------------------------------------------------------------- scripts


def quiet():
    """A context in which a script does not say what it is about to do: here it does something else."""
    return contextlib.redirect_stdout(io.StringIO())


def read_flags(script, *flags):
    """A script's own args. It checks where a run would be written, which none is: a folder that will do."""
    nowhere = os.path.join(tempfile.gettempdir(), "bench-writes-nothing-here")
    with quiet():
        return importlib.import_module(script).get_args([*flags, f"--out={nowhere}", "--overwrite"])


def load(script, args):
    """-> the data's name and the script's model, train(model, args) and sample(B, K)."""
    s = importlib.import_module(script)
    with quiet():
        if script == "linreg":
            return s.data_name(args), s.make_model(args), s.train, lambda B, K: s.sample_tasks(B, K, args)
        if script == "mog_flow":
            return s.data_name(args), s.make_model(args), s.train, lambda B, K: s.sample_tasks(s.sample_densities(B, args), K, args)
        data = s.load(args) if script == "mnist" else s.load(args)["id"]
        name, model = (s.full_name(args.dataset, args), s.make_model(args)) if script == "mnist" else (data.name, s.make_model(data, args))
    return name, model, lambda model, args: s.train(model, data, args), lambda B, K: s.sample_tasks(data, B, K, args)


# A checkpoint of linreg.py or mnist.py. script is the module, metric(prediction, y) its own, sample(B, K) draws tasks, tasks(K)
# yields those of the evaluation, and report is what a JSON file about them begins with.
Trained = namedtuple("Trained", "script args model metric sample tasks report")


def read_checkpoint(wanted):
    """wanted.file is the checkpoint, wanted.more are flags for its script."""
    name = common.load_checkpoint(wanted.file, None)["script"]
    if name not in ("linreg", "mnist"):
        common.fail(f"{wanted.file} is a checkpoint of {name}.py; it must be one of linreg.py or mnist.py")
    args = read_flags(name, *wanted.more, f"--eval={wanted.file}")
    if args.eval_tasks > 32 and args.eval_tasks % 32:
        common.fail(f"--eval-tasks {args.eval_tasks} is no multiple of 32, the tasks that are timed at once")
    data, model, _, sample = load(name, args)
    script = importlib.import_module(name)
    if name == "linreg":
        metric, unit, stream = script.make_metric(args), "squared error", 0
    else:
        metric, unit, stream = script.error, "error %", list(script.NAMES).index(args.dataset)
    iterations, seconds = common.trained(args)
    report = header(wanted, args) | {
        "script": name, "args": args.description["args"], "data": data, "metric": unit, "batch": min(32, args.eval_tasks),
        "iterations": iterations, "train_seconds": round(seconds, 1),
    }  # fmt: skip
    tasks = lambda K: common.evaluation_tasks(lambda B: sample(B, K), args.eval_tasks, stream)
    return Trained(script, args, model.eval(), metric, sample, tasks, report)
