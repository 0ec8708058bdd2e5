"""checkpoint.py: what a run leaves on disk, and how it comes back: atomic, strict, exact.

A run is a folder. A crash, a full disk or a kill at any moment must leave it usable, and a file that this project did
not write must be refused before any of it runs.

    last.pt       model, clip (as it came, for Eq. 2), otp, arch, config, optimizer, step     written whole or not at all
    run.json      command, flags, versions, commit, machine; one more entry for every resumption
    log.jsonl     one JSON object per logged step; after a resume, only rows up to the checkpoint's step stay

    save     write beside the file, flush to the disk, rename: whoever looks sees the old file or the new one
    load     compare check sums, unpickle weights alone, rebuild the network from `arch`, load every tensor strictly

Not here: when a run is saved (train.py), results.json (evaluate.py). torch is imported inside the functions, so that
`--help` answers at once. `python checkpoint.py` prints
    RUN/run.json could not be written (no space left on device): the file before it is untouched; ...
    after it: ['{', '"step":', '1', '}'] ['run.json']
    Notice: the file holds what it held before the crash, and no half of a new one lies beside it.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

from data import UserError, print_any_name, require
from machine import choose_device, precision

Run = namedtuple("Run", "ppar config step path")  # a trained PPAR module, its flags as a namespace, its step, its folder
Flag = namedtuple("Flag", "kind default help rule")  # rule: (the rule in words, value -> whether it is kept)
FLAGS = set("""source targets data_root mapillary holdout harmful clip tau tau_assign beta mask_padding judge_text
    text_weight amp seed steps method""".split())  # of any run

# How a score is taken: the flags of train.py for the evaluation that closes a run, and of evaluate.py for a later one.
_LEAST_0 = ("at least 0", lambda x: x is None or x >= 0)
PROTOCOL = dict(
    scale=Flag(float, 1.0, "evaluation: resize the input by this factor; scores return to the label's size",
               ("positive", lambda x: 0 < x < math.inf)),
    size=Flag(int, None, "evaluation: or resize the input to this size, H W, e.g. 1024 2048",
              ("two positive numbers, H and W", lambda x: x is None or len(x) == 2 and min(x) > 0)),
    height=Flag(int, 0, "evaluation: or to this height, its proportions kept, e.g. 1536; 0: not", _LEAST_0),
    slide=Flag(int, None, "evaluation: side of a sliding window in pixels (less memory); 0: the whole image at once; "
                          "left away: the training crop for a ViT, 0 for a ResNet", _LEAST_0),
    slide_stride=Flag(int, 0, "evaluation: step from window to window in pixels; 0: 2/3 of --slide", _LEAST_0),
    flip=Flag(bool, False, "evaluation: average with the mirrored image", ("yes or no", lambda x: True)),
)


def check_protocol(scale=1.0, size=None, height=0, slide=0, slide_stride=0, flip=False):
    """Refuse values of these flags that cannot be, alone or together. slide None: not decided yet."""
    for name, value in dict(scale=scale, size=size, height=height, slide=slide, slide_stride=slide_stride).items():
        words, kept = PROTOCOL[name].rule
        require(kept(value), f"--{name.replace('_', '-')} {value} must be {words}.")
    require((scale != 1) + bool(size) + bool(height) <= 1,
            "--scale, --size and --height say the same thing in three ways: give one.")
    require(slide is None or slide_stride <= slide,
            f"--slide-stride {slide_stride} is larger than --slide {slide}: pixels between windows would go unseen.")


def write_atomically(path, write):
    """write(binary file), so that `path` is at every moment either the old file or the new one, whole."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the data must be on the disk before the name is
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a position in its own source, and the system's reason lies below it. Pillow first
        # tries another way of writing, so that below the system's reason there lies an error that says nothing.
        reason = error
        while error is not None:
            reason = error if isinstance(error, OSError) else reason
            error = error.__context__
        Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({' '.join(str(reason).split())[:200]}): the file before it is untouched; "
                        f"make room and try again, a training run with --resume {os.path.dirname(path)}.") from None
    except BaseException:  # Ctrl-C
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path, content):
    """A JSON file, whole or not at all. NaN is no JSON and is refused."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def open_folder(config, step=None):
    """Make the folder of a new run and its run.json; refuse one that holds another run.

    With the step of a resumption, tell run.json of it, and drop the log rows of steps that will be done again.
    """
    folder, now = Path(config.out), describe(config)
    told, log = folder / "run.json", folder / "log.jsonl"
    if step is None:
        require(not (folder / "last.pt").exists(),  # there from step 0 on
                f"--out {folder} holds another run: give another --out, or go on with that one by --resume {folder}.")
        folder.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        return write_json(told, now)
    with contextlib.suppress(FileNotFoundError, ValueError, AttributeError):  # none, or none of ours
        run = json.loads(told.read_text(encoding="utf-8"))
        write_json(told, run | dict(resumed=[*run.get("resumed", []), dict(now, step=step)]))
    if log.exists():
        rows = [json.dumps(row) + "\n" for row in read_log(folder) if row["step"] <= step]
        write_atomically(log, lambda file: file.write("".join(rows).encode()))


def log(folder, row):
    """Append a row, a dict with `step`, to log.jsonl."""
    with open(Path(folder) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_log(folder):
    """The rows of log.jsonl, [] if there is none; a row that a crash left in pieces is none."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(Path(folder) / "log.jsonl", encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def describe(config):
    """What somebody needs to trust or repeat a number: command, flags, versions, commit."""
    import torch
    from model import TOY_CLIP
    digest = commit = None
    with contextlib.suppress(FileNotFoundError), open(TOY_CLIP if config.clip == "toy" else config.clip, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # of a CLIP by name, clip.load has checked the hash
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git here, or no repository
        words = "git describe --always --exclude=* --abbrev=40 --dirty".split()  # the whole hash, and "-dirty" after a change
        commit = subprocess.check_output(words, cwd=Path(__file__).resolve().parent, text=True, stderr=subprocess.DEVNULL).strip()
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "pillow", "clip-anytorch")}
    device = choose_device(config.device)
    machine = dict(threads=torch.get_num_threads(), processes=int(os.environ.get("WORLD_SIZE", 1)), cuda=torch.version.cuda,
                   device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    return dict(command=" ".join(["python", *sys.argv]), config=vars(config), clip_sha256=digest,
                versions=dict(python=sys.version.split()[0], **versions), commit=commit and commit.removesuffix("-dirty"),
                changed_since_commit=commit and commit.endswith("-dirty"), precision=precision(config.amp, device)[0], **machine)


def save(ppar, optimizer, config, step, rank=0):
    """Write last.pt, in the first process alone. Weights that are not finite are refused: the file is always one to go on with."""
    import torch
    require(all(torch.isfinite(t).all() for t in ppar.state_dict().values() if t.is_floating_point()),
            f"the weights are not finite after step {step}: the last good checkpoint stays in {config.out}; "
            f"start anew with a lower --lr, or look at the data (python data.py --check).")
    if rank == 0:
        content = dict(model=ppar.net.state_dict(), clip=ppar.clip and ppar.clip.state_dict(),
                       otp=ppar.otp, seen=ppar.seen, arch=ppar.net.arch,
                       optimizer=optimizer.state_dict(), step=step, config=vars(config))
        write_atomically(os.path.join(config.out, "last.pt"), lambda file: torch.save(content, file))


def read(folder):
    """FOLDER/last.pt as `save` wrote it, a dict on the CPU.

    weights_only: a checkpoint is a pickle, and a pickle may hold code. Here code is refused before any of it runs.
    The check sums in the file are compared first, which torch.load does not: a flipped bit is a wrong weight.
    """
    import torch
    file = Path(folder) / "last.pt"
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = {"model", "clip", "otp", "seen", "arch", "config", "optimizer", "step"} - set(state)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file} does not exist: give the run folder that train.py wrote (--out).") from None
    except Exception as error:
        raise UserError(f"{file} is no checkpoint that can be read ({type(error).__name__}): it is damaged or "
                        f"was not written by train.py; nothing in it was executed.") from None
    require(not missing, f"{file} was not written by train.py as it is now: it has no {', '.join(sorted(missing))}.")
    return state


@contextlib.contextmanager
def refuse_misfit(folder):
    """What torch says of a state dict that does not fit, as a sentence."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{folder}/last.pt does not hold the network that it describes ({' '.join(str(error).split())[:200]}).") from None


def load_weights(ppar, state, folder):
    """The weights of a checkpoint into a PPAR of the same shape, strictly."""
    with refuse_misfit(folder):
        ppar.net.load_state_dict(state["model"])
        # Not strict, because net and clip have lines of their own; shapes are checked all the same.
        ppar.load_state_dict({"otp": state["otp"], "seen": state["seen"]}, strict=False)
        if ppar.clip is not None:
            ppar.clip.load_state_dict(state["clip"])


def load_optimizer(optimizer, state, folder):
    """A checkpoint's moments into the optimiser, laid out in memory as the weights are here.

    load_state_dict keeps the strides of the machine that saved; the fused kernel reads raw memory and would give each
    weight another one's moments, without an error, where a run goes on in the other layout (channels_last or not).
    """
    import torch
    with refuse_misfit(folder):
        optimizer.load_state_dict(state["optimizer"])
        for p, moments in optimizer.state.items():
            moments.update({key: torch.empty_like(p).copy_(moments[key]) for key in ("exp_avg", "exp_avg_sq")})


def load_run(folder, device="cpu"):
    """A run folder -> Run, frozen and in eval mode, without CLIP's file: all sizes are read off the checkpoint."""
    import torch
    from model import SegmentationNet
    from ppar import PPAR
    state = read(folder)
    with refuse_misfit(folder):
        net, clip = (SegmentationNet.from_arch(state["arch"]) for _ in range(2))
        config = SimpleNamespace(**state["config"])
        if missing := FLAGS - set(vars(config)):
            raise KeyError(f"without the flags {', '.join(sorted(missing))}")
        otp = torch.empty(state["arch"]["num_classes"], net.encoder.dim)
        frozen = clip.encoder if state["clip"] else None
        ppar = PPAR(net, otp, frozen, config.tau_assign, config.beta, config.mask_padding)
        step = int(state["step"])
    load_weights(ppar, state, folder)
    return Run(ppar.eval().requires_grad_(False).to(device), config, step, Path(folder))


def run_flags(description):
    """The parser that the doors of a finished run begin with. None stands for "as the run was configured"."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder that train.py wrote; none: a demonstration")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="data sets to read (default: those of the run)")
    parser.add_argument("--data-root", metavar="D", help="folder with one folder per data set")
    parser.add_argument("--holdout", type=int, default=0, metavar="N",
                        help="of a target without a split of its own (gta5, synthia), N pairs, chosen by a "
                             "hash of their names; never of a source")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    return parser


def open_run(args):
    """What run_flags has parsed -> Run, its flags replaced by those that were given."""
    require(args.run is not None, "which run? Give the folder that train.py wrote, before the flags.")
    for name in ("holdout", "workers"):
        require(getattr(args, name, 0) >= 0, f"--{name} {getattr(args, name, 0)} cannot be negative.")
    run = load_run(args.run, choose_device(args.device))
    run.config.out, run.config.holdout_unseen = args.run, args.holdout
    given = {name: getattr(args, name, None) for name in ("targets", "data_root", "mapillary", "workers")}
    vars(run.config).update({name: value for name, value in given.items() if value is not None})
    return run


def sentence(error):
    """The sentence of a UserError. A loader's process wraps its error into its own traceback, and the sentence is the end of it."""
    return str(error).strip().rsplit("UserError: ", 1)[-1]


@contextlib.contextmanager
def one_sentence(folder):
    """A mistake of the user, or a disk that fails, ends the program in one sentence and exit status 1."""
    print_any_name()
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {sentence(error)}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error.filename or folder}: {error.strerror or error}; what was written before stays.")


def _demo():
    def crash(file):
        file.write(b'{"step"')
        raise OSError("no space left on device")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        write_json(path, dict(step=1))
        try:
            write_atomically(path, crash)
        except UserError as error:
            print(str(error).replace(folder, "RUN"))
        print("after it:", path.read_text().split(), os.listdir(folder))
        print("Notice: the file holds what it held before the crash, and no half of a new one lies beside it.")
        assert json.loads(path.read_text()) == dict(step=1) and os.listdir(folder) == ["run.json"]


if __name__ == "__main__":
    _demo()
