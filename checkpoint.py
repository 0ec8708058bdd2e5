"""checkpoint.py: what a run leaves on disk, and how it comes back: atomic, strict, exact, with one owner.

A run is a folder. A crash, a full disk or a kill at any moment must leave it usable, and a file that this project did
not write must be refused before any of it runs.

    last.pt       model, clip (frozen, for Eq. 2), otp, arch, config, optimizer, step; and the names of pairs
                  that are trained on and that are withheld              written whole or not at all
    run.json      command, flags, versions, commit, machine; one more entry for every resumption
    log.jsonl     one JSON object per logged step; after a resume, only rows up to the checkpoint's step stay
    .lock         the process that trains here holds a lock on this file

    save     write beside the file, flush to the disk, rename: whoever looks sees the old file or the new one
    load     compare check sums, unpickle weights alone, rebuild the network from `arch`, load every tensor strictly
    own      one process trains into a folder. evaluate.py, figures.py and bound.py may read it at any time.
             They write files of their own, whole, so they need no lock.

Not here: when a run is saved (train.py), results.json (evaluate.py). torch is imported inside the functions, so that
`--help` answers at once. `python checkpoint.py` prints
    RUN/run.json could not be written (no space left on device): the file before it is untouched; ...
    after it: ['{', '"step":', '1', '}'] ['run.json']
    Notice: the file holds what it held before the crash, and no half of a new one lies beside it.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

from data import UserError, check_sums, print_any_name, require
from machine import choose_device, choose_threads, precision

try:
    import fcntl  # locks of the operating system
except ModuleNotFoundError:  # Windows has no locks of this kind: `own` says so and goes on without
    fcntl = None

# A trained PPAR module, its flags as a namespace, its step, its folder, and {source: names of the withheld pairs}.
# Without the last one, the withheld pairs are those that --holdout chooses on the disk as it is.
Run = namedtuple("Run", "ppar config step path withheld", defaults=({},))
Flag = namedtuple("Flag", "kind default help rule")  # rule: (the rule in words, value -> whether it is kept)
FLAGS = set("""out workers reweight source targets data_root mapillary holdout harmful clip tau tau_assign beta
    mask_padding judge_text text_weight amp seed steps method""".split())  # of any run


# -------------------------------------------------------------------------------------------------------- how to score

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
    """write(binary file), so that `path` is at every moment either the old file or the new one, whole.

    The new content goes into a file beside it, whose name no other process has: two writers of one name would
    mix their bytes. A process that is killed here leaves this file; `own` removes it.
    """
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the data must be on the disk before the name is
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        Path(temporary).unlink(missing_ok=True)
        # torch reports a full disk as a position in its own source. The system's reason lies below it.
        chain = [error]
        while chain[-1].__context__ is not None:
            chain.append(chain[-1].__context__)
        reason = next((cause for cause in chain if isinstance(cause, OSError)), error)
        reason = " ".join(str(reason).split())[:200]
        raise UserError(f"{path} could not be written ({reason}): the file before it is untouched; make room and try "
                        f"again, a training run with --resume {os.path.dirname(path)}.") from None
    except BaseException:  # Ctrl-C, or a defect: no half of a file stays behind
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path, content):
    """A JSON file, whole or not at all. NaN is no JSON and is refused."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


# ----------------------------------------------------------------------------------------------------------- ownership


_HELD = {}  # real path of a run folder -> descriptor of its .lock, for the locks that this process holds
UNUSED_FOR = 3600  # seconds; nobody writes longer on one file: an older temporary file belongs to a dead process


def own(folder):
    """Take the lock of an existing run folder, or raise the UserError that names the process that has it.

    Two processes that train into one folder would overwrite each other's checkpoint and log every step twice.
    The operating system keeps the lock for as long as this process lives. So it also goes after SIGKILL, when
    no line of ours can run. The file .lock stays, and is no sign of a running process by itself.
    On a network the lock is as good as its file system: most share locks between machines, some do not. Where
    there are no locks at all, this says so and goes on.
    """
    place = os.path.realpath(folder)
    if place in _HELD:
        return
    if fcntl is None:
        return _warn_without_lock(folder, "this system has none")
    file = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another process has it
        owner = os.read(file, 500).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise UserError(f"{folder} is being trained by {owner}: wait for it, or stop it, or give another "
                        f"--out.") from None
    except OSError as error:
        os.close(file)
        return _warn_without_lock(folder, error.strerror)
    os.ftruncate(file, 0)
    who = f"process {os.getpid()} on {socket.gethostname()}\n"
    os.pwrite(file, who.encode(), 0)  # for the sentence above, when another process comes
    _close_in_children()
    _HELD[place] = file
    _remove_leftovers(folder)


def disown():
    """Give back the locks that this process holds. The end of the process does the same."""
    for file in _HELD.values():
        os.close(file)
    _HELD.clear()


@functools.cache
def _close_in_children():
    """Let no child keep a lock.

    A forked loader process has copies of all descriptors, and while one copy is open, the lock holds. The
    loader process may live on when we are killed. A program that is started anew inherits no descriptor of ours.
    """
    os.register_at_fork(after_in_child=disown)


def _warn_without_lock(folder, reason):
    note = f"note: no lock for {folder} ({reason}): see to it that no second process trains into it."
    print(note, file=sys.stderr)


def _check_still_ours(folder):
    """Refuse to write into a folder that was removed and made anew by another run while this one trained."""
    file = _HELD.get(os.path.realpath(folder))
    if file is None:  # a caller without a lock
        return
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(file), os.stat(os.path.join(folder, ".lock"))):
            return
    raise UserError(f"{folder} was removed or renamed while this run trained into it: nothing more is written; "
                    f"start the run anew.")


def _remove_leftovers(folder):
    """Remove what killed processes have half written; a checkpoint has up to 4 GB. Call it under the lock.

    Of the files that only the owner writes, every temporary is a leftover. Another one may belong to evaluate.py
    or figures.py, which write it at this moment. So it must be old.
    """
    for path in Path(folder).iterdir():
        match = re.fullmatch(r"(.+)\.[0-9a-f]{8}\.tmp", path.name)
        with contextlib.suppress(OSError):
            if match and (match[1] in ("last.pt", "run.json", "log.jsonl")
                          or time.time() - path.stat().st_mtime > UNUSED_FOR):
                path.unlink()


def check_unused(folder):
    """Refuse a run folder that holds training. One with step 0 alone holds none, and may be used again.

    So the remedy for a first step that does not fit into memory works: the same command with --micro-batch.
    """
    file = Path(folder) / "last.pt"
    if not file.exists():
        return
    step = None
    with contextlib.suppress(Exception):  # whatever it is, it is not ours to overwrite
        import torch
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # mmap: reads no weight
        step = state["step"]
    trained = f"trained to step {step}" if isinstance(step, int) else "with a last.pt that cannot be read"
    require(step == 0, f"--out {folder} holds another run, {trained}: give another --out, or go on with that "
                       f"one by --resume {folder}.")


def open_folder(config, step=None):
    """Make the folder of a new run and its run.json; refuse one that has an owner, or that holds training.

    With the step of a resumption, tell run.json of it, and drop the log rows of steps that will be done again.
    """
    folder, now = Path(config.out), describe(config)
    told, log = folder / "run.json", folder / "log.jsonl"
    if step is None:
        folder.mkdir(parents=True, exist_ok=True)
        own(folder)
        check_unused(folder)
        (folder / "last.pt").unlink(missing_ok=True)  # of step 0: --resume must not find the former flags
        log.unlink(missing_ok=True)
        return write_json(told, now)
    own(folder)
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


PACKAGES = ("torch", "torchvision", "numpy", "pillow", "clip-anytorch", "clip")  # the last: CLIP's code from OpenAI's own repository


def describe(config):
    """What somebody needs to trust or repeat a number, for run.json: command, flags, versions, commit, machine.

    All of this is told and never used. So a fact that cannot be found is None, and no run ends for the lack of one.
    """
    import torch
    device = _if_known(lambda: choose_device(config.device))
    commit = _if_known(_commit)
    versions = {name: _if_known(lambda: metadata.version(name)) for name in PACKAGES}
    return dict(
        command=" ".join(["python", *sys.argv]),
        config=vars(config),
        clip_sha256=_if_known(lambda: _clip_digest(config.clip)),
        versions=dict(python=sys.version.split()[0], **{name: version for name, version in versions.items() if version}),
        commit=commit and commit.removesuffix("-dirty"),
        changed_since_commit=commit and commit.endswith("-dirty"),
        precision=_if_known(lambda: precision(config.amp, device)[0]),
        threads=torch.get_num_threads(),
        processes=_if_known(lambda: int(os.environ.get("WORLD_SIZE", 1))),
        cuda=torch.version.cuda,
        device=_if_known(lambda: torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"))


def _if_known(find):
    """find(), or None if it fails in whatever way."""
    try:
        return find()
    except Exception:
        return None


def _commit():
    """The commit of this code, its whole hash, with "-dirty" behind it if a file was changed. No git: an error."""
    words = "git describe --always --exclude=* --abbrev=40 --dirty".split()
    folder = Path(__file__).resolve().parent
    return subprocess.check_output(words, cwd=folder, text=True, stderr=subprocess.DEVNULL, timeout=60).strip()


def _clip_digest(name):
    """SHA-256 of the file of a CLIP. OpenAI's, by name, have none here: clip.load has compared theirs."""
    from model import TOY_CLIP
    with open(TOY_CLIP if name == "toy" else name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------- checkpoints


NAMES = dict(pairs={}, withheld={})  # of a run that was not told which pairs it trains on


def save(ppar, optimizer, config, step, rank=0, names=NAMES):
    """Write last.pt, in the first process alone. Refuse weights that are not finite: every last.pt is one to go on with.

    names   dict(pairs={source: [Item.name, in the order of the list]}, withheld={source: [Item.name]})
    """
    import torch
    require(all(torch.isfinite(t).all() for t in ppar.state_dict().values() if t.is_floating_point()),
            f"the weights are not finite after step {step}: the last good checkpoint stays in {config.out}; "
            f"start anew with a lower --lr, or look at the data (python data.py --check).")
    if rank == 0:
        _check_still_ours(config.out)
        content = dict(model=ppar.net.state_dict(), clip=ppar.clip and ppar.clip.state_dict(),
                       otp=ppar.otp, seen=ppar.seen, arch=ppar.net.arch,
                       optimizer=optimizer.state_dict(), step=step, config=vars(config), **names)
        write_atomically(os.path.join(config.out, "last.pt"), lambda file: torch.save(content, file))


def read(folder):
    """FOLDER/last.pt as `save` wrote it, a dict on the CPU.

    weights_only: a checkpoint is a pickle, and a pickle may hold code. Here code is refused before any of it runs.
    The check sums in the file are compared first, which torch.load does not: a flipped bit is a wrong weight.
    """
    import torch
    file = Path(folder) / "last.pt"
    try:
        check_sums(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        parts = {"model", "clip", "otp", "seen", "arch", "config", "optimizer", "step", "pairs", "withheld"}
        missing = parts - set(state)
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
        # False: net and clip have lines of their own. Shapes are compared all the same.
        ppar.load_state_dict({"otp": state["otp"], "seen": state["seen"]}, strict=False)
        if ppar.clip is not None:
            ppar.clip.load_state_dict(state["clip"])


def rebuild(state, folder):
    """The PPAR of a checkpoint, on the CPU, without CLIP's file: sizes are in `arch`, weights in the state."""
    import torch
    from model import SegmentationNet
    from ppar import PPAR
    with refuse_misfit(folder):
        net, clip = (SegmentationNet.from_arch(state["arch"]) for _ in range(2))
        otp = torch.empty(state["arch"]["num_classes"], net.encoder.dim)
        frozen = clip.encoder.requires_grad_(False) if state["clip"] else None
        numbers = (state["config"][name] for name in ("tau_assign", "beta", "mask_padding"))
        ppar = PPAR(net, otp, frozen, *numbers)
    load_weights(ppar, state, folder)
    return ppar


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
    """A run folder -> Run, frozen and in eval mode."""
    state = read(folder)
    with refuse_misfit(folder):
        config = SimpleNamespace(**state["config"])
        if missing := FLAGS - set(vars(config)):
            raise KeyError(f"without the flags {', '.join(sorted(missing))}")
        step = int(state["step"])
    ppar = rebuild(state, folder)
    return Run(ppar.eval().requires_grad_(False).to(device), config, step, Path(folder), state["withheld"])


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
    choose_threads(run.config.source)
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
