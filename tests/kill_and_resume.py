"""kill_and_resume.py: proof by fault injection that a training run survives being killed at any moment.

    python tests/kill_and_resume.py                 20 kills, about two minutes
    python tests/kill_and_resume.py --kills 100 --seed 7

One run is left alone. A second one, with the same flags, is killed with SIGKILL again and again and resumed each time:
half of the kills come while a checkpoint is being written, the others at random moments of random steps. After every
kill the checkpoint must be whole; at the end weights, optimiser and log must equal the undisturbed run's, bit for bit.

The tests use a short form of it (three kills) and the functions that start train.py in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import FLAGS, write_world

import train

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# ------------------------------------------------------------------------------------------- train.py as a process


def command(arguments, launcher=()):
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)]


def fork(arguments, output, environment=None, scored=False):
    """train.main in a process of its own, forked from one that has imported torch; what it prints goes to the file `output`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_and_resume", "matplotlib.figure", "matplotlib.backends.backend_agg"])
    process = context.Process(target=_child, args=([*map(str, arguments)], str(output), environment or {}, scored))
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", ""), f"{ROOT}{os.pathsep}{TESTS}"
    process.start()
    os.environ["PYTHONPATH"] = before
    return process


def _child(arguments, output, environment, scored):
    os.setsid()  # a group of its own, as under a scheduler
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    train.LOG_EVERY = 1
    if not scored:
        train.evaluate.evaluate_targets = lambda *args, **kwargs: dict(targets={}, mean=None)
    train.main(train.parse(arguments))


def free_port():
    """A port of this machine at which processes can meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(process):
    """Exit status of a process from fork()."""
    process.join(600)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


# ------------------------------------------------------------------------------------------------- what must be equal


def read_log(run):
    """Rows of log.jsonl without the one number that may differ."""
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def read_state(run):
    """last.pt without the flags that name the folder and what may change."""
    state = torch.load(Path(run) / "last.pt", weights_only=True)
    state["config"] = {k: v for k, v in state["config"].items() if k not in ("out", "workers", "save_every")}
    return state


def difference(a, b, name="state"):
    """Where two nested states differ first, to the last bit, or None."""
    if type(a) is not type(b):
        return f"{name}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else name
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not isinstance(a, dict):
        return None if a == b else f"{name}: {a} and {b}"
    if list(a) != list(b):
        return f"{name}: other keys"
    return next(filter(None, (difference(a[key], b[key], f"{name}.{key}") for key in a)), None)


def same(a, b):
    """None if two runs agree to the last bit in weights, optimiser, prototypes and log, else where they do not."""
    return difference(read_state(a), read_state(b)) or difference(read_log(a), read_log(b), "log")


# --------------------------------------------------------------------------------------------------------- the murders


def kill_and_resume(folder, kills, seed=0, flags=None):
    """Train undisturbed and under fire in `folder`, assert that the end is the same -> kills during a save."""
    rng = random.Random(seed)
    flags = [*(flags or FLAGS + write_world(folder)), "--save-every", 1, "--steps", 3 * kills + 4]
    calm, fire, output = folder / "calm", folder / "fire", folder / "output.txt"
    last, writing = fire / "last.pt", 0
    leftovers = set()  # what former murders left half written; the next run removes it

    def half_written():
        return bool(set(fire.glob("last.pt.*.tmp")) - leftovers)

    def go_on():
        return fork(["--resume", fire] if last.exists() else [*flags, "--out", fire], output)

    assert wait(fork([*flags, "--out", calm], output)) == 0, output.read_text()[-2000:]
    for kill in range(kills):
        leftovers = set(fire.glob("last.pt.*.tmp"))
        process, saves, seen, mark = go_on(), rng.randrange(3), _stamp(last), time.monotonic()
        while process.is_alive() and time.monotonic() - mark < 600:  # let it save a few times, then wait for the moment
            if _stamp(last) != seen:
                seen, saves = _stamp(last), saves - 1
            if saves < 0 and (kill % 2 or half_written()):
                break
            time.sleep(0.0005)
        time.sleep(rng.random() * (0.1 if kill % 2 else 0.004))
        assert process.is_alive(), "it ended before it was killed: " + output.read_text()[-2000:]
        os.kill(process.pid, signal.SIGKILL)
        wait(process)
        writing += half_written()
        if last.exists():
            step = torch.load(last, weights_only=True)["step"]  # whole, or this raises
            print(f"kill {kill + 1}: checkpoint of step {step} whole" + ", a next one half written" * half_written())
    assert wait(go_on()) == 0, output.read_text()[-2000:]
    assert same(calm, fire) is None, same(calm, fire)
    assert not list(fire.glob("*.tmp")), "a run removes what killed ones have left"
    return writing


def _stamp(file):
    return file.stat().st_mtime_ns if file.exists() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writing = kill_and_resume(Path(folder), given.kills, given.seed)
    print(f"{given.kills} kills, {writing} of them while a checkpoint was being written: weights, optimiser and log equal "
          f"those of the undisturbed run, bit for bit.")


if __name__ == "__main__":
    main()
