"""Tests of train.py: the whole command, exact resume, any number of processes and parts, refusals, configuration.

Most runs are train.main in this process (workbench.py); where a process has to die or to talk to others, it is forked
from one that has imported torch (kill_and_resume.fork). What takes longer than the quick suite can afford is run with
PPAR_LONG=1 in the environment.
"""

import copy
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kill_and_resume import FLAGS, ROOT, SIZE, command, difference, fork, kill_and_resume, read_log, read_state, start, wait
from PIL import Image
from workbench import (CPU, TERMS, assert_close, configured, is_one_sentence, largest_difference, main, one_batch, one_step, same,
                       trained)

import align
import checkpoint
import data
import evaluate
import ppar
import train

torch.set_num_threads(1)
LONG = pytest.mark.skipif(not os.environ.get("PPAR_LONG"), reason="long: run with PPAR_LONG=1")


@pytest.fixture(autouse=True)
def leave_no_trace():
    """train.main sets signal handlers and torch's determinism for a process of its own; this one goes on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """The full method, eight steps without a stop: what every interrupted or divided run must equal."""
    return trained(tmp_path_factory.mktemp("runs") / "straight", *world["flags"])


# --------------------------------------------------------------------------------------------------- the whole command


def test_the_main_job_on_tiny_files_in_the_official_layouts(world, tmp_path):
    out = tmp_path / "run"
    flags = f"""--source gta5 --targets cityscapes bdd mapillary --data-root {world['root']} --clip {world['archive']}
        --crop 64 --steps 12 --batch 2 --amp fp32 --workers 1 --out {out}""".split()
    done = subprocess.run(command(flags), cwd=tmp_path, capture_output=True, text=True, check=False,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"tensors loaded, 0 missing", done.stdout)
    bar = done.stderr.replace("\r", "\n")
    assert "12/12" in bar and "loss=" in bar and "<" in bar  # tqdm writes elapsed<remaining

    state = torch.load(out / "last.pt", weights_only=True)
    assert isinstance(state["model"], dict) and state["step"] == 12
    assert all(torch.isfinite(t).all() for t in state["model"].values() if t.is_floating_point())
    assert checkpoint.load_run(out).step == 12

    run = json.loads((out / "run.json").read_text())
    assert run["config"]["crop"] == 64 and run["config"]["seed"] == 0
    assert set(run["config"]) == set(vars(train.Config()))
    assert {"python", "torch", "clip-anytorch", "numpy"} <= set(run["versions"])
    assert run["commit"] is None or re.fullmatch("[0-9a-f]{40}", run["commit"])

    rows = read_log(out)
    assert [row["step"] for row in rows] == [10, 12]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["loss"] == pytest.approx(row["seg"] + row["align"] + row["vtp"], abs=1e-6) for row in rows)

    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert list(results["targets"]) == ["cityscapes", "bdd", "mapillary"]
    for name, target in results["targets"].items():
        assert 0 <= target["miou"] <= 100 and set(target["iou"]) == set(data.CLASSES)
        assert all(value is None or 0 <= value <= 100 for value in target["iou"].values())
        with Image.open(next(out.glob(f"*{name}*.png"))) as figure:
            assert min(figure.size) > 100
    assert results["mean"] == pytest.approx(np.mean([target["miou"] for target in results["targets"].values()]))
    with open(out / "results.csv", newline="") as file:
        assert {"cityscapes", "bdd", "mapillary"} <= {row["target"] for row in csv.DictReader(file)}
    lines = done.stdout.splitlines()
    assert any(line.split() == [*"IoU in % cityscapes bdd mapillary mean".split()] for line in lines)
    assert all(any(line.startswith(name[:13]) for line in lines) for name in (*data.CLASSES, "mean"))


def test_two_sources_and_a_vit_train_and_are_scored(world, tmp_path, capsys):
    out = tmp_path / "run"
    sentence = main(*world["flags"], "--source", "gta5", "synthia", "--targets", "bdd", "--clip", world["vit"],
                    "--steps", 3, "--out", out, scored=True)
    assert sentence is None
    assert "gta5 (5 images) + synthia (3 images)" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["targets"]["bdd"]["images"] == 3
    state = read_state(out)
    assert state["arch"]["visual"]["kind"] == "vit" and state["vtp"] is not None
    assert len(read_log(out)) == 3


def test_the_log_has_the_last_step_and_the_learning_rate_of_the_flag(straight):
    rows = read_log(straight)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["lr"] == pytest.approx(1e-3)  # --lr itself, not CLIP's tenth of it
    assert all(a["lr"] > b["lr"] for a, b in zip(rows[1:], rows[2:]))
    assert rows[0]["lam"] == 0 and rows[-1]["lam"] == 1 and all(math.isfinite(row["radius_otp"]) for row in rows)


def test_without_git_the_run_is_described_all_the_same(world, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = checkpoint.describe(configured(world))
    assert run["commit"] is None and run["changed_since_commit"] is None


# --------------------------------------------------------------------------------------------------------- exact resume


def stopped(out, at, monkeypatch, *flags):
    """A run whose process dies in the middle of step `at` + 1."""
    learning_rate = train.learning_rate

    def die(step, steps):
        if step == at:
            raise RuntimeError("killed by the test")
        return learning_rate(step, steps)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed by the test"):
        patch.setattr(train, "learning_rate", die)
        main(*flags, "--out", out)
    return out


def test_a_run_that_died_goes_on_with_other_workers_to_the_same_bits(world, straight, tmp_path, monkeypatch):
    out = stopped(tmp_path / "run", 5, monkeypatch, *world["flags"], "--save-every", 4)
    assert read_state(out)["step"] == 4
    assert len(read_log(out)) == 5  # step 5 is on record and not in the checkpoint: it is done again
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # and a row was being written
    assert main("--resume", out, "--workers", 2) is None
    assert same(out, straight) is None
    run = json.loads((out / "run.json").read_text())
    assert run["config"] == json.loads((straight / "run.json").read_text())["config"] | {"out": str(out), "save_every": 4}
    assert [(part["step"], part["versions"]) for part in run["resumed"]] == [(4, run["versions"])]


@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--prototypes", "source", "--align", "vtp", "--w-vtp", 0],
                                   ["--method", "erm", "--micro-batch", 3], ["--save-every", 500]],
                         ids=["bf16", "source means", "erm in parts", "from step 0"])
def test_resume_is_exact_whatever_is_trained(flags, world, tmp_path, monkeypatch):
    calm = trained(tmp_path / "calm", *world["flags"], *flags, "--steps", 4)
    out = stopped(tmp_path / "run", 2, monkeypatch, *world["flags"], "--save-every", 2, *flags, "--steps", 4)
    assert main("--resume", out) is None
    assert same(out, calm) is None


@pytest.mark.parametrize("saved, now", [(torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format)])
def test_moments_from_another_memory_layout_belong_to_the_same_weights(saved, now, world):
    """A run may go on on a device that wants the other layout; a fused kernel reads raw memory, whatever the strides say."""
    config = configured(world)

    def fresh(layout):
        module = ppar.build(config)[0].train().to(memory_format=layout)
        return module, train.make_optimizer(module, config)

    def step(module, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    straight, moved = fresh(saved), fresh(now)
    step(*straight, seed=1)
    moved[0].load_state_dict(straight[0].state_dict())
    checkpoint.load_optimizer(moved[1], dict(optimizer=copy.deepcopy(straight[1].state_dict())), "run")  # from a file, nothing is shared
    step(*straight, seed=2)
    step(*moved, seed=2)
    strided = [p for p in moved[0].parameters() if p.dim() == 4 and min(p.shape[1:]) > 1 and p.requires_grad]
    assert strided, "no weight whose layout matters"
    for p, q in zip(straight[0].parameters(), moved[0].parameters()):
        assert (p - q).abs().max() < 1e-6


def test_gradients_are_laid_out_as_their_weights(world):
    """The fused kernel trusts it, in channels_last too; autograd promises it."""
    config = configured(world)
    image, label = one_batch(config, world)
    module = ppar.build(config)[0].train().to(memory_format=torch.channels_last)
    one_step(config, image.contiguous(memory_format=torch.channels_last), label, step=2, module=module)
    weights = [p for p in module.parameters() if p.grad is not None]
    assert any(not p.is_contiguous() for p in weights) and all(p.grad.stride() == p.stride() for p in weights)


def test_a_folder_in_which_nothing_was_saved_can_be_used_again(world, tmp_path, monkeypatch):
    """A process that died while it wrote its first checkpoint must not block its own command for good."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="at once"):
        patch.setattr(checkpoint, "save", lambda *a: (_ for _ in ()).throw(RuntimeError("at once")))
        main(*world["flags"], "--steps", 2, "--out", out)
    trained(out, *world["flags"], "--steps", 2)
    assert [row["step"] for row in read_log(out)] == [1, 2]


def test_resuming_a_finished_run_trains_nothing_and_scores_it_again(world, straight, tmp_path, monkeypatch):
    out = shutil.copytree(straight, tmp_path / "run")
    before, log = (out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes()
    monkeypatch.setattr(train, "backward", lambda *a: pytest.fail("trained"))
    scored = []
    monkeypatch.setattr(evaluate, "evaluate_targets", lambda run, **more: scored.append(run))
    train.main({"resume": str(out), "figures": False})
    assert len(scored) == 1 and scored[0].ppar.net is not None and not scored[0].ppar.training
    assert (out / "last.pt").read_bytes() == before and (out / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("number, group, workers", [
    pytest.param(signal.SIGTERM, False, 0, marks=LONG, id="one"), pytest.param(signal.SIGINT, True, 1, id="Ctrl-C"),
    pytest.param(signal.SIGTERM, True, 1, marks=LONG, id="scheduler")])
def test_a_signal_saves_says_how_to_go_on_and_nothing_is_lost(number, group, workers, world, tmp_path, straight):
    """A terminal and a scheduler send it to the loader's processes as well, which must not take the loop with them."""
    out, output = tmp_path / "run", tmp_path / "output"
    slow = fork([*world["flags"], "--out", out, "--workers", workers], output, environment={"OMP_NUM_THREADS": "1"})
    until(lambda: (out / "log.jsonl").exists() and read_log_so_far(out) >= 2, slow, output)
    (os.killpg if group else os.kill)(slow.pid, number)
    assert wait(slow) == 1, output.read_text()
    text = output.read_text()
    assert f"python train.py --resume {out}" in text and "Traceback" not in text
    step = read_state(out)["step"]
    assert 2 <= step <= 8 and len(read_log(out)) == step
    assert main("--resume", out) is None
    assert same(out, straight) is None


def until(condition, process, output, limit=600):
    began = time.monotonic()
    while not condition():
        assert process.is_alive() and time.monotonic() - began < limit, output.read_text()
        time.sleep(0.001)


def read_log_so_far(out):
    return (out / "log.jsonl").read_text().count("\n")


def test_after_training_a_signal_kills_again(world, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trained(tmp_path / "run", *world["flags"], "--steps", 1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_second_signal_means_it_but_not_the_echo_of_the_first(monkeypatch):
    clock, killed = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    with checkpoint.catch_signals() as received:
        handler = signal.getsignal(signal.SIGTERM)
        handler(signal.SIGTERM, None)
        handler(signal.SIGTERM, None)  # torchrun hands on what the scheduler has sent already
        assert len(received) == 2 and not killed
        clock[0] += 5
        handler(signal.SIGTERM, None)
        assert killed == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_three_kills_one_while_a_checkpoint_is_written_lose_nothing(tmp_path, world):
    flags = world["flags"]
    writing, kills = kill_and_resume(tmp_path, 3, launch=fork, flags=flags[:len(FLAGS)], world=flags[len(FLAGS):],
                                     say=lambda line: None)
    assert kills == 3 and writing >= 1


@LONG
def test_twenty_kills_of_the_real_command_lose_nothing(tmp_path):
    writing, _ = kill_and_resume(tmp_path, 20, seed=1, launch=start)
    assert writing >= 5


SPOILT = {  # a last.pt that this train.py cannot have written; files that cannot be read at all: test_checkpoint.py
    "another project's": lambda s: {"state_dict": s["model"], "epoch": 3},
    "unknown flag": lambda s: {**s, "config": {**s["config"], "nonsense": 1}},
    "impossible flag": lambda s: {**s, "config": {**s["config"], "tau": -1.0}},
    "no flags": lambda s: {**s, "config": [1]},
    "no optimiser": lambda s: {k: v for k, v in s.items() if k != "optimizer"},
    "step too large": lambda s: {**s, "step": 999},
    "step no number": lambda s: {**s, "step": "four"},
    "weights missing": lambda s: {**s, "model": dict(list(s["model"].items())[1:])},
    "prototypes of another CLIP": lambda s: {**s, "otp": torch.zeros(19, 7)},
    "optimiser of another network": lambda s: {**s, "optimizer": {"state": {}, "param_groups": []}},
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_last_pt_that_train_did_not_write_is_refused(kind, straight, tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(straight / "log.jsonl", out)
    torch.save(SPOILT[kind](torch.load(straight / "last.pt", weights_only=True)), out / "last.pt")
    before = (out / "last.pt").read_bytes()
    monkeypatch.setattr(train, "backward", lambda *a: pytest.fail("trained"))
    assert is_one_sentence(main("--resume", out))
    assert (out / "last.pt").read_bytes() == before


def test_resuming_what_is_not_there_says_so(tmp_path):
    assert "no such run folder" in main("--resume", tmp_path / "nothing")
    assert "no last.pt" in main("--resume", tmp_path)


@pytest.mark.parametrize("flag", ["--lr 0.1", "--seed 1", "--steps 9", "--batch 2", "--method erm", "--align otp",
                                  "--reweight none", "--crop 32", "--source synthia", "--clip other.pt", "--w-vtp 0.3",
                                  "--amp bf16", "--ramp 0.2 0.4", "--out elsewhere"])
def test_a_flag_that_would_change_the_result_is_refused_on_resume(flag, straight):
    log = (straight / "log.jsonl").read_bytes()
    sentence = main("--resume", straight, *flag.split())
    assert is_one_sentence(sentence) and all(word in sentence for word in flag.split())
    assert (straight / "log.jsonl").read_bytes() == log


def test_what_changes_no_weight_may_change_on_resume_and_is_checked_as_at_the_start(world, straight, tmp_path, monkeypatch):
    out = stopped(tmp_path / "run", 5, monkeypatch, *world["flags"], "--save-every", 4)
    moved = shutil.copytree(world["root"], tmp_path / "moved")
    assert "--save-every 0 must be at least 1" in main("--resume", out, "--save-every", 0)
    assert main("--resume", out, "--data-root", moved, "--save-every", 3, "--device", "cpu",
                "--workers", 1, "--lr", 1e-3) is None  # the run's own value is no change
    a, b = read_state(out), read_state(straight)
    assert difference(a["model"], b["model"]) is None and read_log(out) == read_log(straight)
    assert a["config"]["data_root"] == str(moved)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_sentence(world, tmp_path, monkeypatch):
    out, output = stopped(tmp_path / "run", 5, monkeypatch, *world["flags"], "--save-every", 4), tmp_path / "output"
    before = (out / "last.pt").read_bytes()
    process = fork(["--resume", out], output, file_limit=len(before) // 2)
    assert wait(process) == 1
    text = output.read_text().replace("\r", "\n")
    [last] = [line for line in text.splitlines() if line.startswith("error: ")] or [text]
    assert is_one_sentence(last) and "Traceback" not in text, text[-3000:]
    assert "could not be written" in last and str(out) in last and "File too large" in last  # the system's own reason
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    assert main("--resume", out) is None  # room was made


def test_a_disk_too_full_for_a_checkpoint_shows_before_the_first_step(world, tmp_path):
    output = tmp_path / "output"
    process = fork([*world["flags"], "--out", tmp_path / "run"], output, file_limit=100_000)
    assert wait(process) == 1
    assert "could not be written" in output.read_text() and not (tmp_path / "run" / "log.jsonl").exists()


def test_a_disk_too_full_for_a_row_of_the_log_ends_in_one_sentence(world, tmp_path, monkeypatch):
    real, opened = open, []

    def full(file, mode="r", *rest, **more):
        if str(file).endswith("log.jsonl") and "a" in mode:
            opened.append(file)
            raise OSError(28, "No space left on device", str(file))
        return real(file, mode, *rest, **more)

    monkeypatch.setattr("builtins.open", full)
    sentence = main(*world["flags"], "--out", tmp_path / "run")
    assert opened and is_one_sentence(sentence) and "No space left on device" in sentence


# ---------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_two_runs_are_the_same_bits_with_any_number_of_workers(workers, world, straight, tmp_path):
    assert same(trained(tmp_path / "run", *world["flags"], "--workers", workers), straight) is None


def test_another_seed_is_another_run(world, straight, tmp_path):
    assert read_log(trained(tmp_path / "run", *world["flags"], "--steps", 1, "--seed", 1))[0] != read_log(straight)[0]


def test_the_state_of_the_global_random_numbers_does_not_matter(world, straight, tmp_path):
    torch.manual_seed(99)
    np.random.seed(99)
    assert difference(read_log(trained(tmp_path / "run", *world["flags"], "--steps", 8)), read_log(straight)) is None


def test_every_method_starts_from_the_same_network_and_sees_the_same_batches(world, tmp_path, monkeypatch):
    backward, seen = train.backward, {}
    ways = {"full": [], "erm": ["--method", "erm"], "random": ["--prototypes", "random"],
            "far": ["--align", "otp", "--w-vtp", 0]}
    for name, flags in ways.items():
        seen[name] = []

        def spy(network, image, label, *rest, name=name):
            start = {k: v.clone() for k, v in network.net.state_dict().items()} if not seen[name] else None
            seen[name].append((image, label, start))
            return backward(network, image, label, *rest)

        monkeypatch.setattr(train, "backward", spy)
        trained(tmp_path / name, *world["flags"], *flags, "--steps", 2)
    for name in ways:
        assert difference(seen["full"], seen[name]) is None, name
    assert not torch.equal(seen["full"][0][0], seen["full"][1][0])


# ---------------------------------------------------------------------------------------- several processes and parts


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_ranks(flags, out, tmp_path, number=2, scored=False):
    """The processes that torchrun starts, with the variables that it sets, forked."""
    environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(number))
    ranks = [fork([*flags, *(["--out", out] if "--resume" not in flags else [])], tmp_path / f"rank{r}",
                  dict(environment, RANK=str(r), LOCAL_RANK=str(r)), scored) for r in range(number)]
    codes = [wait(rank) for rank in ranks]
    assert codes == [0] * number, "".join((tmp_path / f"rank{r}").read_text()[-2000:] for r in range(number))
    return out


TWENTY = ["--steps", "20", "--lr", "1e-4"]


@pytest.fixture(scope="module")
def twenty(world, tmp_path_factory):
    """Twenty steps of the full method in one process, all at once."""
    return trained(tmp_path_factory.mktemp("runs") / "twenty", *world["flags"], *TWENTY)


def test_two_processes_have_the_losses_of_one_with_reweighting(world, twenty, tmp_path):
    assert largest_difference(as_ranks([*world["flags"], *TWENTY], tmp_path / "two", tmp_path), twenty) < 1e-5


def test_two_processes_have_the_losses_of_one_erm(world, tmp_path):
    flags = [*world["flags"], *TWENTY, "--method", "erm", "--balance", "0.5"]  # counts are over both, too
    one, two = trained(tmp_path / "one", *flags), as_ranks(flags, tmp_path / "two", tmp_path)
    assert largest_difference(one, two) < 1e-5
    assert "align" not in read_log(one)[0] and read_log(one)[0]["loss"] == read_log(one)[0]["seg"]


def test_micro_batches_have_the_losses_of_the_whole_batch(world, twenty, tmp_path):
    assert largest_difference(trained(tmp_path / "parts", *world["flags"], *TWENTY, "--micro-batch", 3), twenty) < 1e-5


def test_micro_batches_in_two_processes_have_the_losses_of_the_whole_batch(world, twenty, tmp_path):
    flags = [*world["flags"], *TWENTY, "--micro-batch", "1"]
    assert largest_difference(as_ranks(flags, tmp_path / "two", tmp_path), twenty) < 1e-5


@pytest.mark.parametrize("flags", ["--reweight none", "--reweight class", "--reweight image", "--reweight batch",
                                   "--align reversed", "--align otp --w-vtp 0", "--method erm", "--balance 0.5",
                                   "--method erm --balance 1"])
@pytest.mark.parametrize("void", [0, 1, 4])
def test_one_step_in_parts_is_the_step_of_the_whole(flags, void, world):
    """Gradients too; with images that have no label, which in a part of one are a mean over nothing."""
    config = configured(world, *flags.split())
    image, label = one_batch(config, world)
    label[:void] = data.VOID
    label[2:, 10:30] = data.VOID  # parts with other shares of labelled pixels
    whole, grads, module = one_step(config, image, label, step=2)
    for micro_batch in (1, 3):
        parts = dataclasses.replace(config, micro_batch=micro_batch)
        row, others, _ = one_step(parts, image, label, step=2, module=module)
        assert row.keys() == whole.keys()
        assert all(abs(row[key] - whole[key]) < 2e-6 * max(1, abs(whole[key])) for key in row)
        assert_close(others, grads, 2e-4)
    if void == 4:
        assert whole["loss"] == 0 and all((grad == 0).all() for grad in grads.values())


def test_results_are_the_same_from_one_process_and_from_two(world, straight, tmp_path):
    """bdd has three images, cityscapes one: the shares differ, and one process may have none."""
    state = torch.load(straight / "last.pt", weights_only=True)
    state["config"]["targets"] = ("cityscapes", "bdd")
    results = []
    for name in ("one", "two"):
        out = tmp_path / name / "run"
        out.mkdir(parents=True)
        torch.save(state, out / "last.pt")
        if name == "one":
            assert main("--resume", out, scored=True) is None
        else:
            as_ranks(["--resume", out], out, tmp_path, scored=True)
        results.append(json.loads((out / "results.json").read_text()))
    assert results[0] == results[1]


def test_a_batch_that_cannot_be_split_is_refused(world, tmp_path):
    with pytest.raises(data.UserError, match="--batch 4 cannot be split over 3 processes"):
        train.train(configured(world, "--out", tmp_path / "run"), None, 0, 3, CPU)
    assert not (tmp_path / "run").exists()


def torchrun(*launcher):
    return ["-m", "torch.distributed.run", *map(str, launcher)]  # what the command `torchrun` is


@LONG
def test_torchrun_trains_as_one_process_does(world, straight, tmp_path):
    out = tmp_path / "run"
    launcher = torchrun("--nproc_per_node", 2, "--master_port", free_port())
    done = subprocess.run(command([*world["flags"], "--out", out], launcher), capture_output=True, text=True,
                          check=False, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("IoU in %") == 1 and "2 process(es)" in done.stdout
    assert largest_difference(out, straight) < 1e-4  # eight steps at ten times the learning rate
    assert set(json.loads((out / "results.json").read_text())["targets"]) == {"cityscapes"}


@LONG
def test_two_nodes_on_loopback_start_with_the_documented_command(world, straight, tmp_path):
    port, nodes = free_port(), []
    for rank in range(2):
        launcher = torchrun("--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1, "--master_addr", "127.0.0.1",
                            "--master_port", port)
        nodes.append(subprocess.Popen(command([*world["flags"], "--steps", "8", "--out", tmp_path / "run"], launcher),
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                      env=dict(os.environ, OMP_NUM_THREADS="1")))
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-2000:] for text in outputs)
    assert largest_difference(tmp_path / "run", straight) < 1e-4


# ----------------------------------------------------------------------------------------- Eq. 7 and the switches


def test_erm_is_a_hand_written_cross_entropy_loop(world, tmp_path):
    config = configured(world, "--method", "erm", "--steps", 4)
    row, grads, module = one_step(config, *one_batch(config, world), step=0)
    assert all(name.startswith("net.") for name in grads) and module.vtp is None

    net = ppar.build(config)[0].net.train()
    clip = [p for n, p in net.named_parameters() if n.startswith("encoder.") and p.requires_grad]
    new = [p for n, p in net.named_parameters() if not n.startswith("encoder.")]
    groups = [dict(params=[p for p in params if (p.dim() > 1) == matrix], peak=peak, weight_decay=0.01 * matrix)
              for params, peak in ((clip, 1e-4), (new, 1e-3)) for matrix in (False, True)]
    optimizer, losses = torch.optim.AdamW(groups), []
    for step in range(4):
        image, label = one_batch(config, world, step)
        logits = F.interpolate(net(image).logits, size=(64, 64), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, label, ignore_index=255)
        net.zero_grad()
        loss.backward()
        if step == 0:
            assert_close(grads, {"net." + n: p.grad for n, p in net.named_parameters() if p.grad is not None})
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 if step == 0 else (1 - (step - 1) / 3) ** 0.9)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01  # it moved, so there is something to compare
    rows = read_log(trained(tmp_path / "run", *world["flags"], "--method", "erm", "--steps", 4))
    assert [r["loss"] for r in rows] == pytest.approx(losses, abs=2e-5)
    assert row["loss"] == pytest.approx(losses[0], abs=1e-6)


# --------------------------------------------------------------------------------------------------- targets are unseen


def test_training_opens_no_target_file_and_scoring_does(world, tmp_path):
    root = shutil.copytree(world["root"], tmp_path / "data")
    targets = [root / "cityscapes", root / "bdd100k", root / "mapillary"]
    for file in (file for folder in targets for file in folder.rglob("*.*") if file.is_file()):
        file.write_text("no picture")  # whoever opens it fails
    opened, watching = [], [True]

    def watch(event, arguments):
        if event == "open" and watching[0]:
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)  # sees every file that Python opens, by whatever library
    try:
        config = configured(world, "--data-root", root, "--targets", "cityscapes", "bdd", "mapillary", "--steps", 3,
                            "--prototypes", "source", "--out", tmp_path / "run")
        module = train.train(config, None, 0, 1, CPU)
        during = list(opened)
        with pytest.raises(data.UserError):
            evaluate.evaluate_targets(checkpoint.Run(module, config, 3, Path(config.out)))
    finally:
        watching[0] = False
    assert any(path.startswith(str(root / "gta5")) for path in during)
    assert not [path for path in during if any(path.startswith(str(folder)) for folder in targets)]
    assert any(path.startswith(str(root / "cityscapes")) for path in opened)


def test_the_network_that_is_scored_is_the_last_one(world, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(evaluate, "evaluate_targets", lambda run, **more: scored.append(copy.deepcopy(run)))
    train.main(train.parse([*world["flags"], "--steps", "3", "--no-figures", "--out", str(tmp_path / "run")]))
    assert difference(dict(scored[0].ppar.net.state_dict()), dict(read_state(tmp_path / "run")["model"])) is None
    assert len(scored) == 1


# ------------------------------------------------------------------------------------------------------------ bad input


def test_help_and_a_misspelt_flag_are_answered_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))

    def ask(*flags):
        return subprocess.run(command(flags), capture_output=True, text=True, check=False, env=environment)

    told = ask("--help")
    assert told.returncode == 0 and "torch was imported" not in told.stderr
    for field in dataclasses.fields(train.Config):
        assert "--" + field.name.replace("_", "-") in told.stdout
    wrong = ask("--lerning-rate", "1")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].endswith("unrecognized arguments: --lerning-rate 1")
    assert "torch was imported" in ask("--steps", "1").stderr  # the poison works


@pytest.mark.parametrize("flags, told", [
    ("--step 3", "unrecognized arguments: --step"), ("--no-fig", "unrecognized arguments"), ("--ramp a b", "invalid float"),
    ("--align sideways", "progressive"), ("--steps ten", "invalid int"), ("--stride 7", "8, 16, 32"),
    ("--lr", "expected one argument"), ("--mapillary C", "A"), ("extra", "unrecognized arguments: extra"),
    ("--source", "expected at least one"),
])
def test_a_command_line_that_cannot_be_read_is_refused(flags, told, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(flags.split())
    assert end.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


BAD_FLAGS = {flags: flags for flags in """--crop 0, --steps 0, --batch 0, --micro-batch -1, --workers -1, --lr 0, --lr nan,
    --lr-clip -1, --tau 0, --w-align -1, --w-align 0, --w-vtp -1,
    --text-weight 2, --harmful 1.5, --ramp 0.6 0.6, --ramp 0.5, --ramp 0.0 1.1,
    --ramp -0.1 1, --save-every 0, --seed -1, --holdout -1, --balance 2, --freeze 6, --freeze -1""".replace("\n    ", " ").split(", ")} | {
    "--crop 100": "--crop 100 must be a multiple of 32", "--holdout 5 --targets gta5": "--holdout 5",
    "--source nowhere": "no data set 'nowhere'",
    "--targets nowhere": "no data set 'nowhere'", "--clip RN51": "RN50", "--clip no/such/file.pt": "no/such/file.pt",
    "--data-root no/such/folder": "no/such/folder", "--targets idd": "leftImg8bit", "--source acdc": "rgb_anon",
    "--harmful 0.2": "gta5", "--method erm --align otp": "--align otp", "--method erm --w-vtp 0.2": "--w-vtp 0.2",
    "--method erm --reweight image": "--reweight image", "--method erm --text-weight 0.5": "--text-weight 0.5",
    "--device nonsense": "--device nonsense",
}


@pytest.mark.parametrize("flags, told", BAD_FLAGS.items())
def test_a_value_that_cannot_be_is_one_sentence_before_any_training(flags, told, world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "backward", lambda *a: pytest.fail("trained"))
    sentence = main(*world["flags"], "--out", tmp_path / "run", *flags.split())
    assert is_one_sentence(sentence) and told in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(world, tmp_path):
    sentence = main(*world["flags"], "--device", "cuda", "--out", tmp_path / "run")
    assert is_one_sentence(sentence) and "--device cuda" in sentence and not (tmp_path / "run").exists()


def spoil(kind, root):
    image, label = root / "gta5" / "images" / "00002.png", root / "gta5" / "labels" / "00002.png"
    if kind == "image without label":
        label.unlink()
    elif kind == "unreadable image":
        image.write_bytes(image.read_bytes()[:60])
    elif kind == "unreadable label":
        label.write_bytes(b"")
    elif kind == "label of another size":
        Image.new("L", (30, 20)).save(label)
    elif kind == "label ids outside the table":
        Image.new("L", (SIZE[1], SIZE[0]), 99).save(label)
    elif kind == "empty folder":
        shutil.rmtree(root / "gta5" / "images")
        (root / "gta5" / "images").mkdir()
    return "gta5/images" if kind == "empty folder" else "00002.png"


@pytest.mark.parametrize("kind", ["image without label", "unreadable image", "unreadable label", "empty folder",
                                  "label of another size", "label ids outside the table"])
def test_bad_files_are_named_in_one_sentence_before_any_training(kind, world, tmp_path):
    root = shutil.copytree(world["root"], tmp_path / "data")
    told = spoil(kind, root)
    sentence = main(*world["flags"], "--data-root", root, "--out", tmp_path / "run")
    assert is_one_sentence(sentence) and told in sentence and not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run_is_refused_and_untouched(world, straight):
    before = {file.name: file.read_bytes() for file in straight.iterdir()}
    sentence = main(*world["flags"], "--out", straight, "--seed", 5)
    assert is_one_sentence(sentence) and "holds another run" in sentence and f"--resume {straight}" in sentence
    assert {file.name: file.read_bytes() for file in straight.iterdir()} == before


@pytest.mark.parametrize("below", ["", "/run"])
def test_an_out_that_cannot_be_a_folder_is_one_sentence(below, world, tmp_path):
    (tmp_path / "file").write_text("mine")
    sentence = main(*world["flags"], "--out", f"{tmp_path}/file{below}")
    assert is_one_sentence(sentence) and str(tmp_path / "file") in sentence


def test_files_that_go_bad_during_training_end_in_one_sentence_from_a_loaders_process_too(world, tmp_path, monkeypatch):
    def gone(item, *rest, **more):
        raise data.UserError(f"{item.image} cannot be read (gone): fetch it again.")

    monkeypatch.setattr(data, "training_view", gone)
    warnings.simplefilter("ignore")
    for workers in (0, 1):
        sentence = main(*world["flags"], "--out", tmp_path / str(workers), "--workers", workers)
        assert is_one_sentence(sentence) and "gone" in sentence and "\n" not in sentence


def test_an_exploding_run_names_step_and_term_and_its_last_good_checkpoint_stays(world, tmp_path):
    sentence = main(*world["flags"], "--lr", "1e30", "--save-every", 1, "--out", tmp_path / "run")
    assert is_one_sentence(sentence) and re.search("at step [234]|after step [234]", sentence)
    state = read_state(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in state["model"].values() if t.is_floating_point())
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_term_that_is_nan_is_named_with_its_step(world, straight, tmp_path, monkeypatch):
    loss, calls = align.progressive_alignment_map, []

    def sometimes(*args):
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(align, "progressive_alignment_map", sometimes)
    sentence = main(*world["flags"], "--save-every", 2, "--out", tmp_path / "run")
    assert "`align` is nan at step 4" in sentence
    assert read_state(tmp_path / "run")["step"] == 2
    monkeypatch.undo()
    assert main("--resume", tmp_path / "run") is None  # good indeed: it goes on to where the straight run went
    assert same(tmp_path / "run", straight) is None


def test_weights_that_a_bad_gradient_spoilt_are_never_saved(world, tmp_path, monkeypatch):
    """The loss of that step is finite; the next one's would tell, but the checkpoint comes in between."""
    backward = train.backward

    def spoil_last(network, image, label, config, step, autocast):
        result = backward(network, image, label, config, step, autocast)
        if step == 3:
            network.net.classify.weight.grad[0, 0] = math.inf
        return result

    monkeypatch.setattr(train, "backward", spoil_last)
    sentence = main(*world["flags"], "--save-every", 2, "--out", tmp_path / "run")
    assert is_one_sentence(sentence) and "step 4" in sentence and read_state(tmp_path / "run")["step"] == 2


# ------------------------------------------------------------------------------------------- configuration and schedule


def test_the_learning_rate_rises_linearly_and_falls_polynomially():
    steps, warmup = 100, 0.1
    factor = [train.learning_rate(step, steps, warmup) for step in range(steps)]
    assert factor[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factor[10:] == pytest.approx([(1 - i / 90) ** 0.9 for i in range(90)])
    assert 0 < factor[-1] == min(factor) and max(factor) == 1
    assert [train.learning_rate(s, 100, 0.1) for s in (7, 3, 7)] == [factor[7], factor[3], factor[7]]


@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20, 1000])
@pytest.mark.parametrize("warmup", [0, 0.05, 0.5, 0.99])
def test_the_learning_rate_is_positive_and_at_most_one_at_every_step(steps, warmup):
    factor = [train.learning_rate(step, steps, warmup) for step in range(steps)]
    assert all(0 < f <= 1 for f in factor) and 1 in factor


def test_the_presets_are_what_the_documents_say():
    toy, real = train.configure({}), train.configure({"source": ("gta5",)})
    assert vars(toy) | dict(
        source=("toy-gta5",), clip="toy", stride=8, freeze=0, steps=400, batch=8, crop=96, lr=3e-3,
        amp="fp32", workers=2, harmful=0.1, out="runs/ppar-toy-gta5-seed0") == vars(toy)
    assert vars(real) | dict(
        targets=("cityscapes", "bdd", "mapillary"), clip="RN50", stride=16, freeze=1, steps=40000, batch=8,
        crop=512, lr=1e-4, amp="auto", workers=8, harmful=0.0, mapillary="A") == vars(real)
    assert train.configure({"source": ("toy-gta5", "gta5")}).clip == "RN50"  # one real source makes it a real run
    for config in (toy, real):
        assert (config.method, config.align, config.w_align, config.w_vtp, config.tau, config.ramp, config.reweight) == (
            "ppar", "progressive", 1.0, 0.2, 0.07, (0.1, 0.6), "class")
    undecided = {f.name for f in dataclasses.fields(train.Config) if f.default is None} - {"out", "resume", "device"}
    assert all(set(preset) == undecided for preset in train.PRESETS.values())
    assert train.configure(train.parse("--steps 7 --harmful 0".split())).steps == 7  # a flag that is given beats the preset
    assert train.configure(train.parse("--harmful 0".split())).harmful == 0
    assert len(dataclasses.fields(train.Config)) <= 34


def test_erm_is_the_method_with_every_switch_off_and_nothing_else():
    erm, full = train.configure({"method": "erm"}), train.configure({})
    differing = {name for name in vars(full) if getattr(erm, name) != getattr(full, name)}
    assert differing == {"method", "align", "w_vtp", "reweight", "text_weight", "out"}
    assert (erm.align, erm.w_vtp, erm.reweight, erm.text_weight) == ("none", 0, "none", 0)
    assert train.configure(train.parse("--method erm --align none --w-vtp 0".split())) == erm  # said twice is no clash


def test_every_flag_reaches_its_field():
    flags = "--source a b --no-figures --lr 2e-3 --micro-batch 3 --align vtp --compile --stride 8 --ramp 0 0.5"
    assert train.parse(flags.split()) == dict(source=("a", "b"), figures=False, lr=2e-3, micro_batch=3, align="vtp",
                                              compile=True, stride=8, ramp=(0.0, 0.5))


FIRST_STEPS = json.loads((Path(__file__).parent / "first_steps.json").read_text())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("erm", "vtp") else LONG) for n in FIRST_STEPS])
def test_the_first_twenty_steps_of_the_drawn_world_are_those_of_the_stored_log(name, tmp_path):
    """Stored by commit 2437fbc, before the house was laid anew: the same training but for rounding."""
    stored = FIRST_STEPS[name]
    train.main(train.parse([*"--steps 20 --no-figures --workers 0 --targets toy-fog --device cpu".split(), *stored["flags"].split(),
                            "--out", str(tmp_path / "run")]))
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [10, 20]
    for row, old in zip(rows, stored["rows"]):
        assert all(row[key] == pytest.approx(value, abs=1e-5, rel=1e-5) for key, value in old.items())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["mean"] == pytest.approx(stored["miou"], abs=0.05)


# --------------------------------------------------------------------------------------------------------------- guards


def test_the_optimiser_holds_exactly_the_trainable_parameters_once(world):
    config = configured(world)
    module = ppar.build(config)[0]
    optimizer = train.make_optimizer(module, config)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in module.parameters() if p.requires_grad}
    names = {id(p): name for name, p in module.named_parameters()}
    for group in optimizer.param_groups:
        assert {names[id(p)].startswith("net.encoder.") for p in group["params"]} == {group["peak"] == config.lr * 0.1}
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.01}
        assert group["peak"] in (config.lr, config.lr * 0.1)
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert frozen and any(name.startswith("net.encoder.visual.conv1") for name, p in module.named_parameters()
                          if not p.requires_grad)  # --freeze 1: the stem


def learnt(world, freeze=1):
    config = configured(world, "--freeze", freeze)
    _, _, module = one_step(config, *one_batch(config, world), step=2)
    return module, train.make_optimizer(module, config)


def test_the_guards_of_the_first_step_pass_what_is_right_and_catch_what_is_not(world):
    module, optimizer = learnt(world)
    train.check_first_step(module, optimizer)

    def caught(match):
        with pytest.raises(data.UserError, match=match):
            train.check_first_step(module, optimizer)

    group = optimizer.param_groups[0]["params"]
    group.append(optimizer.param_groups[1]["params"][0])
    caught("exactly the trainable")
    group.pop()
    left_out = group.pop()
    caught("exactly the trainable")
    group.append(left_out)
    grad, left_out.grad = left_out.grad, None
    caught("got no gradient")
    left_out.grad = torch.full_like(grad, math.nan)
    caught("non-finite gradient")
    left_out.grad = grad
    frozen = module.net.encoder.visual.conv1.weight
    frozen.grad = torch.zeros_like(frozen)
    caught("frozen parameter net.encoder.visual.conv1.weight")
    frozen.grad = None
    train.check_first_step(module, optimizer)


def test_frozen_weights_do_not_move_and_the_others_do(world, straight):
    before, after = ppar.build(configured(world))[0], read_state(straight)["model"]
    frozen = {n for n, p in before.net.named_parameters() if not p.requires_grad}
    for name, tensor in before.net.state_dict().items():
        still = name in frozen or "running_" in name or "num_batches" in name
        assert torch.equal(tensor, after[name]) == still, name
    assert torch.equal(before.otp, read_state(straight)["otp"])


# ------------------------------------------------------------------------------------------------------- other hardware


def test_bf16_on_the_cpu_trains_and_starts_from_the_loss_of_fp32(world, straight, tmp_path):
    rows = read_log(trained(tmp_path / "run", *world["flags"], "--amp", "bf16", "--steps", 4))
    for term in TERMS:  # bf16 has 8 bits of mantissa: 0.4 % each time a number is rounded
        assert rows[0][term] == pytest.approx(read_log(straight)[0][term], rel=0.01)
    assert rows[0]["loss"] != read_log(straight)[0]["loss"] and rows[-1]["loss"] < rows[0]["loss"]
    assert all(t.dtype in (torch.float32, torch.int64) for t in read_state(tmp_path / "run")["model"].values())


def test_the_losses_are_computed_in_fp32_under_autocast(world):
    config = configured(world)
    image, label = one_batch(config, world)
    module = ppar.build(config)[0].train()
    row, _ = train.backward(module, image, label, config, 2, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert row["seg"] != float(torch.tensor(row["seg"]).bfloat16())  # no bf16 number
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, emb, vtp = module(image)
    assert logits.dtype == torch.bfloat16 and emb.dtype == vtp.dtype == torch.float32


def test_auto_precision_asks_the_processor(world, monkeypatch):
    config = configured(world, "--amp", "auto")
    for able in (True, False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
        assert checkpoint.precision(config.amp, CPU)[0] == able
    assert checkpoint.precision("bf16", CPU)[0]
    assert not checkpoint.precision("fp32", CPU)[0]


@LONG
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_run_has_the_losses_of_the_plain_one(world, straight, tmp_path):
    out = trained(tmp_path / "run", *world["flags"], "--compile")
    assert largest_difference(out, straight) < 1e-3
    assert read_state(out)["model"].keys() == read_state(straight)["model"].keys()  # no _orig_mod in the names


@LONG
def test_kill_and_resume_as_a_command():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "kill_and_resume.py"), "--kills", "2"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "bit for bit" in done.stdout, done.stderr[-2000:]


