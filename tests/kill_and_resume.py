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
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

SIZE = (72, 100)  # of the pictures; no multiple of anything
# Every part of the method is at work from the first steps on, and the learning rate moves the weights.
FLAGS = """--source gta5 --targets cityscapes --crop 64 --batch 4 --steps 8 --lr 1e-3 --ramp 0 0.5
    --amp fp32 --workers 0 --device cpu""".split()


def write_world(folder):
    """A data root and a small CLIP -> the flags that name them."""
    from conftest import write_tiny
    from make_clip import make_clip, write_state_dict

    write_tiny(folder / "data", "gta5", n=5, size=SIZE)
    write_tiny(folder / "data", "cityscapes", n=1, size=SIZE, split="val")
    clip = write_state_dict(make_clip("resnet", layers=(1, 1, 1, 1)), folder / "clip.pt")
    return ["--data-root", str(folder / "data"), "--clip", clip]


# ------------------------------------------------------------------------------------------- train.py as a process


def command(arguments, launcher=()):
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)]


def start(arguments, output):
    """`python train.py ...` as a user starts it; what it prints goes to the file `output`."""
    with open(output, "a") as file:
        return subprocess.Popen(command(arguments), stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
                                env=dict(os.environ, OMP_NUM_THREADS="1"))


def fork(arguments, output, environment=None, scored=False, file_limit=None):
    """The same without the seconds in which torch is imported: a process that has done so already is forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "pytest", "matplotlib.figure", "matplotlib.backends.backend_agg"])
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", ""), f"{ROOT}{os.pathsep}{TESTS}"
    try:
        arguments = [str(a) for a in arguments]
        process = context.Process(target=_child, args=(arguments, str(output), environment or {}, scored, file_limit))
        process.start()
    finally:
        os.environ["PYTHONPATH"] = before
    return process


def _child(arguments, output, environment, scored, file_limit):
    os.setsid()  # a group of its own, as under a scheduler
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import torch

    import train

    torch.set_num_threads(1)
    train.LOG_EVERY = 1
    if not scored:
        train.evaluate.evaluate_targets = lambda *args, **kwargs: None
    train.main(train.parse(arguments))


def wait(process, timeout=600):
    """Exit status of a process from start() or fork()."""
    if isinstance(process, subprocess.Popen):
        return process.wait(timeout)
    process.join(timeout)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def running(process):
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


# ------------------------------------------------------------------------------------------------- what must be equal


def read_log(run):
    """Rows of log.jsonl without the one number that may differ."""
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def read_state(run):
    """last.pt without the flags that name the folder and what may change."""
    import torch

    state = torch.load(Path(run) / "last.pt", weights_only=True)
    state["config"] = {k: v for k, v in state["config"].items() if k not in ("out", "workers", "save_every")}
    return state


def difference(a, b, name="state"):
    """Where two nested states differ first, to the last bit, or None."""
    import torch

    if type(a) is not type(b):
        return f"{name}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else name
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{name}: other keys"
        return next(filter(None, (difference(a[key], b[key], f"{name}.{key}") for key in a)), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{name}: other length"
        return next(filter(None, (difference(x, y, f"{name}.{i}") for i, (x, y) in enumerate(zip(a, b)))), None)
    return None if a == b else f"{name}: {a} and {b}"


# --------------------------------------------------------------------------------------------------------- the murders


def kill_and_resume(folder, kills, seed=0, launch=start, flags=FLAGS, world=None, say=print):
    """Train undisturbed and under fire in `folder`, assert that the end is the same -> (kills during a save, kills)."""
    import torch

    rng = random.Random(seed)
    flags = [*flags, *(world or write_world(folder)), "--save-every", "1", "--steps", str(3 * kills + 4)]
    calm, fire, output = folder / "calm", folder / "fire", folder / "output.txt"
    assert wait(launch([*flags, "--out", calm], output)) == 0, output.read_text()[-2000:]
    writing = 0
    for kill in range(kills):
        saved = (fire / "last.pt").exists()
        process = launch(["--resume", fire] if saved else [*flags, "--out", fire], output)
        moved, half_written, mark = rng.randrange(3), fire / "last.pt.tmp", time.monotonic()
        half_written.unlink(missing_ok=True)  # of the murder before
        last = _stamp(fire)
        while running(process) and time.monotonic() - mark < 600:  # let it save a few times, then wait for the moment
            if _stamp(fire) != last:
                last, moved = _stamp(fire), moved - 1
            if moved < 0 and (kill % 2 or half_written.exists()):
                break
            time.sleep(0.0005)
        time.sleep(rng.random() * (0.1 if kill % 2 else 0.004))
        assert running(process), "it ended before it was killed: " + output.read_text()[-2000:]
        os.kill(process.pid, signal.SIGKILL)
        wait(process)
        writing += half_written.exists()
        if saved or (fire / "last.pt").exists():
            step = torch.load(fire / "last.pt", weights_only=True)["step"]  # whole, or this raises
            say(f"kill {kill + 1}: checkpoint of step {step} whole" + ", a next one half written" * half_written.exists())
    resumed = ["--resume", fire] if (fire / "last.pt").exists() else [*flags, "--out", fire]
    assert wait(launch(resumed, output)) == 0, output.read_text()[-2000:]
    assert difference(read_state(calm), read_state(fire)) is None, difference(read_state(calm), read_state(fire))
    assert difference(read_log(calm), read_log(fire), "log") is None, difference(read_log(calm), read_log(fire), "log")
    return writing, kills


def _stamp(run):
    try:
        return (run / "last.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writing, kills = kill_and_resume(Path(folder), given.kills, given.seed)
    print(f"{kills} kills, {writing} of them while a checkpoint was being written: weights, optimiser and log equal "
          f"those of the undisturbed run, bit for bit.")


if __name__ == "__main__":
    main()
