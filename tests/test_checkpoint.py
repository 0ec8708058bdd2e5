"""Tests of checkpoint.py: a run comes back as it was saved, hostile files are refused, no crash costs the old file."""

import ast
import contextlib
import errno
import hashlib
import json
import os
import pickle
import platform
import shutil
import signal
import socket
import subprocess
import time
from importlib import metadata
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kill_and_resume import ROOT, difference

import checkpoint
import machine
from data import UserError

torch.set_num_threads(1)


def read(path):
    return torch.load(path / "last.pt", weights_only=True)


@pytest.fixture(autouse=True)
def hold_no_lock():
    """This process lives longer than one test."""
    yield
    checkpoint.disown()


def test_a_run_is_loaded_as_it_was_saved(run, net, otp):
    loaded = checkpoint.load_run(run[0])
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.ppar(image).logits, net(image).logits)
    state = read(run[0])
    assert difference(dict(loaded.ppar.clip.state_dict()), dict(state["clip"])) is None
    assert torch.equal(loaded.ppar.otp, otp) and loaded.step == 7 and vars(loaded.config) == run[1] and loaded.path == run[0]
    assert not loaded.ppar.training and not any(p.requires_grad for p in loaded.ppar.parameters())
    torch.save({**state, "clip": None}, run[0] / "last.pt")
    assert checkpoint.load_run(run[0]).ppar.clip is None


def test_the_first_process_saves_the_whole_run_but_no_weight_that_is_not_finite(run):
    before, module = read(run[0]), checkpoint.load_run(run[0]).ppar
    config, optimizer = SimpleNamespace(**run[1] | dict(out=str(run[0]))), torch.optim.AdamW(module.parameters())
    checkpoint.save(module, optimizer, config, 8, rank=1)
    assert difference(read(run[0]), before) is None
    names = dict(pairs={"toy-gta5": ["train/0", "train/1"]}, withheld={"toy-gta5": ["train/2"]})
    checkpoint.save(module, optimizer, config, 8, names=names)
    assert checkpoint.load_run(run[0]).withheld == names["withheld"]
    saved, expected = read(run[0]), before | names | dict(step=8, config=vars(config), optimizer=optimizer.state_dict())
    assert saved.keys() == expected.keys() and difference(saved, {key: expected[key] for key in saved}) is None
    module.net.classify.bias.data[3] = torch.inf
    with pytest.raises(UserError, match="not finite after step 9"):
        checkpoint.save(module, optimizer, config, 9)
    assert read(run[0])["step"] == 8


@pytest.mark.parametrize("saved, now", [(torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format)])
def test_moments_from_another_memory_layout_belong_to_the_same_weights(saved, now):
    """A run may go on on a device that wants the other layout; a fused kernel reads raw memory, whatever the strides say."""
    grads = torch.randn(2, 5, 4, 3, 3)
    straight, moved = (torch.nn.Conv2d(4, 5, 3).to(memory_format=layout) for layout in (saved, now))
    optimizers = [torch.optim.AdamW(conv.parameters(), lr=1e-2, fused=True) for conv in (straight, moved)]

    def step(conv, optimizer, grad):
        conv.weight.grad = torch.empty_like(conv.weight).copy_(grad)
        optimizer.step()

    step(straight, optimizers[0], grads[0])
    moved.load_state_dict(straight.state_dict())
    checkpoint.load_optimizer(optimizers[1], pickle.loads(pickle.dumps(dict(optimizer=optimizers[0].state_dict()))), "run")
    for conv, optimizer in zip((straight, moved), optimizers):
        step(conv, optimizer, grads[1])
    assert straight.weight.stride() != moved.weight.stride() and (straight.weight - moved.weight).abs().max() < 1e-6


def test_a_folder_takes_one_run_and_its_log_goes_back_to_the_step_of_the_checkpoint(tmp_path):
    folder = tmp_path / "runs" / "run"
    config, log = SimpleNamespace(clip="toy", device="cpu", amp="fp32", out=str(folder)), folder / "log.jsonl"
    checkpoint.open_folder(config)
    log.write_text('{"step": 1}\n')
    checkpoint.open_folder(config)  # nothing was saved: it can be used again
    assert not log.exists() and json.loads((folder / "run.json").read_text())["config"] == vars(config)
    (folder / "last.pt").touch()
    with pytest.raises(UserError, match="holds another run, with a last.pt that cannot be read"):
        checkpoint.open_folder(config)
    log.write_text('{"step": 4}\n\x00\x00\n7\n{"step": 5}\n{"step": 6, "lo')  # a disk lost some, a row was being written
    for step in (5, 4):
        checkpoint.open_folder(config, step)
        assert [row["step"] for row in map(json.loads, log.read_text().splitlines())] == [4, 5][:step - 3]
    run = json.loads((folder / "run.json").read_text())
    assert [(part["step"], part["versions"]) for part in run["resumed"]] == [(5, run["versions"]), (4, run["versions"])]


def test_a_folder_with_step_0_alone_may_be_used_again_and_one_that_holds_training_may_not(run):
    config = SimpleNamespace(clip="toy", device="cpu", amp="fp32", out=str(run[0]))
    for step in (1, 7):
        torch.save({**read(run[0]), "step": step}, run[0] / "last.pt")
        with pytest.raises(UserError, match=f"holds another run, trained to step {step}: .* --resume {run[0]}"):
            checkpoint.open_folder(config)
    torch.save({**read(run[0]), "step": 0}, run[0] / "last.pt")
    checkpoint.open_folder(config)
    assert not (run[0] / "last.pt").exists(), "it has the flags of the former run: --resume must not find it"


# ----------------------------------------------------------------------------------------------------------- ownership


@contextlib.contextmanager
def owner(folder, *, with_children=False):
    """A process that owns the folder, and perhaps a forked and a started child that outlive it -> (its pid, those of the children)."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        checkpoint.own(folder)
        children = []
        if with_children:
            children = [os.fork()]
            if children == [0]:
                time.sleep(60)
                os._exit(0)
            children.append(subprocess.Popen(["sleep", "60"]).pid)
        os.write(tell, json.dumps(children).encode())
        time.sleep(60)
        os._exit(0)
    children = json.loads(os.read(told, 1000))
    try:
        yield pid, children
    finally:
        for process in (pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_has_one_owner_whose_lock_goes_with_it_even_when_it_is_killed(tmp_path):
    with owner(tmp_path) as (pid, _):
        before = (tmp_path / ".lock").read_bytes()
        for _ in range(2):
            with pytest.raises(UserError, match=f"{tmp_path} is being trained by process {pid} on {socket.gethostname()}: "
                                                "wait for it, or stop it, or give another --out"):
                checkpoint.own(tmp_path)
        assert (tmp_path / ".lock").read_bytes() == before
        kill(pid)
        checkpoint.own(tmp_path)
    checkpoint.own(tmp_path / ".." / tmp_path.name)  # the same folder: it is ours already
    assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    checkpoint.disown()
    with owner(tmp_path):  # given back
        pass


def test_children_that_live_on_when_the_owner_is_killed_do_not_keep_its_lock(tmp_path):
    with owner(tmp_path, with_children=True) as (pid, children):
        kill(pid)
        checkpoint.own(tmp_path)
        for child in children:
            os.kill(child, 0)  # it lives


@pytest.mark.parametrize("number", [None, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_note_says_so_and_nothing_else_changes(number, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    if number is None:  # Windows
        monkeypatch.setattr(checkpoint, "fcntl", None)
    else:
        monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    checkpoint.own(tmp_path)
    assert f"no lock for {tmp_path}" in capsys.readouterr().err
    with owner(tmp_path):
        pass


def test_the_owner_removes_what_killed_processes_left_and_not_what_an_evaluation_writes_at_this_moment(tmp_path):
    old = ["results.json.0123abcd.tmp"]
    ours = ["last.pt.00000000.tmp", "run.json.89abcdef.tmp", "log.jsonl.89abcdef.tmp"]
    others = ["results.json.01234567.tmp", "last.pt", "notes.tmp", "last.pt.better.tmp"]
    for name in (*old, *ours, *others):
        (tmp_path / name).touch()
    for name in (*old, "notes.tmp"):
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    with owner(tmp_path):
        assert sorted(os.listdir(tmp_path)) == sorted([".lock", *others])


def test_a_run_whose_folder_was_removed_and_made_anew_by_another_run_writes_nothing_more(run):
    module = checkpoint.load_run(run[0]).ppar
    config, optimizer = SimpleNamespace(**run[1] | dict(out=str(run[0]))), torch.optim.AdamW(module.parameters())
    checkpoint.own(run[0])
    checkpoint.save(module, optimizer, config, 8)
    shutil.rmtree(run[0])
    with pytest.raises(UserError, match="was removed or renamed"):
        checkpoint.save(module, optimizer, config, 9)
    run[0].mkdir()
    with owner(run[0]):
        with pytest.raises(UserError, match="was removed or renamed"):
            checkpoint.save(module, optimizer, config, 9)
        assert os.listdir(run[0]) == [".lock"]


def test_two_writers_of_one_file_do_not_mix_their_bytes(tmp_path):
    path = tmp_path / "results.json"

    def slow(file):
        file.write(b'{"mean": ')
        checkpoint.write_json(path, dict(mean=2))  # another process, from beginning to end
        assert json.loads(path.read_text()) == dict(mean=2)
        file.write(b"1}")

    checkpoint.write_atomically(path, slow)
    assert json.loads(path.read_text()) == dict(mean=1) and os.listdir(tmp_path) == ["results.json"]


# --------------------------------------------------------------------------------------------------------- description


@pytest.mark.parametrize("git, commit, changed", [("", None, None), ("exit 128", None, None), ("echo 0a1b-dirty", "0a1b", True),
                                                  ("echo 0a1b", "0a1b", False)])
def test_a_run_is_described_with_git_and_without(git, commit, changed, run, tmp_path, monkeypatch):
    if git:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = checkpoint.describe(SimpleNamespace(clip=str(run[0] / "last.pt"), device="cpu", amp="bf16"))
    assert (told["device"], told["precision"], told["processes"]) == ("cpu", "bf16", 1)
    assert (told["commit"], told["changed_since_commit"]) == (commit, changed)
    assert told["clip_sha256"] == hashlib.sha256((run[0] / "last.pt").read_bytes()).hexdigest()
    assert told["versions"]["python"] == platform.python_version() and torch.__version__.startswith(told["versions"]["torch"])


def test_what_only_fills_run_json_never_ends_a_run(run, monkeypatch):
    """OpenAI's own package has another name than clip-anytorch; and whatever else cannot be found out is left open."""
    config = SimpleNamespace(clip="RN50", device="cpu", amp="fp32")  # by name: clip.load compared its hash, there is no file
    installed = metadata.version
    only = {"clip": "1.0"}  # pip install git+https://github.com/openai/CLIP.git

    def version(name):
        if name in only or "clip" not in name:
            return only.get(name) or installed(name)
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    told = checkpoint.describe(config)
    assert told["versions"]["clip"] == "1.0" and "clip-anytorch" not in told["versions"] and told["clip_sha256"] is None

    def fail(*args, **kwargs):
        raise RuntimeError("it is not known")

    for place, name in ((metadata, "version"), (subprocess, "check_output"), (checkpoint, "choose_device"), (checkpoint, "precision")):
        monkeypatch.setattr(place, name, fail)
    monkeypatch.setenv("WORLD_SIZE", "many")
    told = checkpoint.describe(config)
    assert [*told["versions"]] == ["python"] and json.dumps(told, default=vars)
    assert {key for key, value in told.items() if value is None} >= {"commit", "precision", "processes", "device", "clip_sha256"}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(run, tmp_path, monkeypatch):
    state = read(run[0])
    monkeypatch.chdir(tmp_path)
    for write in (lambda bad, f: torch.save({**state, "extra": bad}, f), pickle.dump,
                  lambda bad, f: torch.save({**state, "extra": bad}, f, _use_new_zipfile_serialization=False)):
        with open(run[0] / "last.pt", "wb") as file:
            write(Malicious(), file)
        with pytest.raises(UserError, match="nothing in it was executed"):
            checkpoint.load_run(run[0])
        assert not (tmp_path / "pwned").exists()


def test_truncated_foreign_and_unfitting_checkpoints_end_in_one_sentence(run):
    file = run[0] / "last.pt"
    whole, state = file.read_bytes(), read(run[0])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", whole[:100], whole[:len(whole) // 2], whole[:-30], b"hello", bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(UserError, match="last.pt is no checkpoint that can be read"):
            checkpoint.load_run(run[0])
    for foreign, reason in ((state["model"], "not written by train.py"), ([1, 2], "no checkpoint|not written"),
                            ({**state, "arch": {"visual": 3}}, "does not hold"),
                            ({**state, "model": dict(list(state["model"].items())[1:])}, "does not hold"),
                            ({**state, "clip": {"gamma": torch.ones(3)}}, "does not hold"),
                            ({**state, "otp": state["otp"][:1]}, "does not hold"),
                            ({**state, "config": {"tau": 0.1}}, "without the flags .*source.*text_weight")):
        torch.save(foreign, file)
        with pytest.raises(UserError, match=reason) as caught:
            checkpoint.load_run(run[0])
        assert "\n" not in str(caught.value)
    for folder in (run[0] / "nothing", run[0].parent, file):
        with pytest.raises(UserError, match="last.pt does not exist: give the run folder"):
            checkpoint.load_run(folder)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "run.json", []
    checkpoint.write_json(path, dict(step=1))
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (events.append(json.loads(path.read_text())["step"]), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    checkpoint.write_json(path, dict(step=2))
    assert events == [1, "replace"]  # while it was written, the old one was there whole
    assert json.loads(path.read_text()) == dict(step=2) and os.listdir(tmp_path) == ["run.json"]


def test_a_crash_while_writing_leaves_the_old_file_and_says_why(tmp_path):
    path = tmp_path / "results.json"
    checkpoint.write_json(path, dict(mean=1.0))

    def full(file):
        file.write(b"{")
        raise OSError(28, "No space left on device")

    def torch_on_a_full_disk(file):
        try:
            full(file)
        finally:
            raise RuntimeError("unexpected pos 1 vs 0")

    def matplotlib_on_a_full_disk(file):
        try:
            dict()["font"]
        except KeyError:  # looked up a moment before, and no reason
            full(file)

    for crash in (full, torch_on_a_full_disk, matplotlib_on_a_full_disk):
        with pytest.raises(UserError, match="could not be written .*No space left on device.*untouched"):
            checkpoint.write_atomically(path, crash)
    with pytest.raises(ValueError):
        checkpoint.write_json(path, dict(mean=float("nan")))  # NaN is no JSON
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, mock.Mock(side_effect=KeyboardInterrupt))
    assert json.loads(path.read_text()) == dict(mean=1.0) and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("error, kind, reason", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a"), "memory", "Tried to allocate 2.00 GiB"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "memory", "MPS backend out of memory (MPS allocated: 9 GB)"),
    (MemoryError(), "memory", "MemoryError"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory", "[Errno 12] Cannot allocate memory"),
    (RuntimeError("Caught MemoryError in DataLoader worker process 0.\nOriginal: out of memory"), "loader", "out of memory"),
    (MemoryError("Caught MemoryError in DataLoader worker process 0.\nOriginal"), "loader", "out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), 
     "loader", "killed by signal: Bus error"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "loader", "exited unexpectedly"),
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "compiler", "Failed to find C compiler"),
    (type("TritonMissing", (RuntimeError,), dict(__module__="torch._inductor.exc"))("Cannot find a working triton"), "compiler",
     "Cannot find a working triton"),
    (RuntimeError("The size of tensor a (3) must match"), None, ""), (OSError(errno.ENOSPC, "No space left on device"), None, "")])
def test_trouble_of_the_machine_is_told_from_a_defect(error, kind, reason):
    told = machine.trouble(error)
    assert told == (kind, reason) if kind else told[0] is None


def test_the_allocators_of_torch_and_numpy_speak_as_expected():
    for allocate in (lambda: torch.empty(1 << 50), lambda: torch.zeros(1 << 46).add(1), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert machine.trouble(caught.value)[0] == "memory"


@pytest.mark.parametrize("name", ["evaluate.py", "figures.py", "bound.py", "ppar.py"])
def test_a_checkpoint_without_a_flag_that_is_read_of_a_finished_run_is_refused_when_it_is_loaded(name):
    """Not later, by an AttributeError: `load_run` asks for FLAGS. `config.x` and `run.config.x` are what is looked for."""
    read = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and "config" in (getattr(node.value, "id", ""), getattr(node.value, "attr", "")):
            read.add(node.attr)
    assert read <= checkpoint.FLAGS and (read or name == "ppar.py")


def test_the_doors_of_a_run_share_their_flags(run, tmp_path):
    parser = checkpoint.run_flags("A door.")
    opened = checkpoint.open_run(parser.parse_args([str(run[0]), "--targets", "toy-bdd", "--data-root", "there", "--device", "cpu"]))
    assert (opened.config.targets, opened.config.data_root, opened.config.out) == (["toy-bdd"], "there", str(run[0]))
    opened = checkpoint.open_run(parser.parse_args([str(run[0]), "--device", "cpu"]))
    assert opened.config.targets == ("bdd",) and opened.config.data_root == str(tmp_path / "data")
    with pytest.raises(SystemExit) as end, checkpoint.one_sentence("RUN"):
        raise PermissionError(13, "Permission denied", "RUN/x.png")
    assert end.value.code == "error: RUN/x.png: Permission denied; what was written before stays."
