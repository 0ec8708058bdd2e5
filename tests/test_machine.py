"""Tests of machine.py: any device, any precision, any number of processes and parts, and every way to stop a run."""

import copy
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kill_and_resume import ROOT, TESTS, free_port, read_state, wait
from workbench import CPU, assert_close, configured, is_one_sentence, main, one_batch, one_step

import align
import checkpoint
import data
import machine
import ppar
import train
from data import UserError

torch.set_num_threads(1)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def leave_no_trace():
    """Handlers of signals, torch's determinism and the global random numbers are as before."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests
    machine._say_once.cache_clear()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for number, handler in handlers.items():
        signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------------------- devices


def pretend(monkeypatch, gpus=0, capability=(8, 0), apple=False):
    """A machine with so many GPUs of this compute capability, or with an Apple GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability >= (8, 0))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)


@pytest.mark.parametrize("gpus, best, choice", [(0, "cpu", "cpu"), (2, "cuda:1", "cpu, cuda:0, cuda:1")])
def test_a_device_is_the_best_that_is_here_or_the_one_that_was_asked_for(gpus, best, choice, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")  # of torchrun's second process
    pretend(monkeypatch, gpus)
    assert machine.choose_device() == torch.device(best) and machine.choose_device("cpu") == CPU
    for name in ("meta", "cuda:2", "abacus"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here: choose from {choice}."):
            machine.choose_device(name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, devices", [(None, "0 1 0 1"), ("cuda", "0 1 0 1"), ("cuda:1", "1 1 1 1")])
def test_more_processes_than_gpus_share_them_and_a_gpu_that_is_named_belongs_to_all(name, devices, monkeypatch):
    pretend(monkeypatch, gpus=2)
    chosen = []
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        chosen.append(machine.choose_device(name))
    assert chosen == [torch.device(f"cuda:{index}") for index in devices.split()]


def test_an_apple_gpu_is_named_once_not_used_and_refused_with_its_reason(monkeypatch, capsys):
    pretend(monkeypatch, apple=True)
    assert machine.choose_device() == machine.choose_device() == machine.choose_device("cpu") == CPU
    said = capsys.readouterr().out
    assert said.count("Apple GPU, which is not used") == 1 and "float64" in said and said.count("\n") == 1
    for name in ("mps", "mps:0"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used: .*float64.*--device cpu"):
            machine.choose_device(name)
    pretend(monkeypatch, gpus=1, apple=True)
    assert machine.choose_device() == torch.device("cuda:0") and capsys.readouterr().out == ""


def test_auto_precision_asks_the_processor(monkeypatch):
    for capability, able in (("AVX512", True), ("AVX512", False), ("AVX2", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
        for amp, used in (("auto", able and capability == "AVX512"), ("bf16", True), ("fp32", False)):
            name, autocast, layout = machine.precision(amp, CPU)
            with autocast():
                assert (name == "bf16") == (layout == torch.channels_last) == torch.is_autocast_enabled("cpu") == used


@pytest.mark.parametrize("gpu, capability, auto, layouts", [
    ("V100", (7, 0), "fp32", dict(auto=False, fp32=False, bf16=True)),
    ("T4, 2080 Ti", (7, 5), "fp32", dict(auto=False, fp32=False, bf16=True)),
    ("A100", (8, 0), "bf16", dict(auto=True, fp32=True, bf16=True)),
    ("4090", (8, 9), "bf16", dict(auto=True, fp32=True, bf16=True)),
    ("H200", (9, 0), "bf16", dict(auto=True, fp32=True, bf16=True)),
    ("B200", (10, 0), "bf16", dict(auto=True, fp32=True, bf16=True))])
def test_a_gpu_gets_the_precision_and_the_memory_layout_that_its_tensor_cores_take(gpu, capability, auto, layouts, monkeypatch):
    pretend(monkeypatch, gpus=1, capability=capability)
    for amp, last in layouts.items():
        name, _, layout = machine.precision(amp, torch.device("cuda:0"))
        assert name == (auto if amp == "auto" else amp)
        assert layout == (torch.channels_last if last else torch.contiguous_format), amp


# ------------------------------------------------------------------------------------------------------------ processes


def write_gradient(file, flags):
    """train.main for one step, which writes down its gradient and the buffers."""
    check = train.check_first_step

    def write(module, optimizer):
        check(module, optimizer)
        gradient = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        torch.save(dict(gradient=gradient, buffers=dict(module.named_buffers())), file)

    # The first step is one in the middle of the ramp, so all terms and the weights of Eq. 6 have a say.
    with mock.patch.object(train, "check_first_step", write), mock.patch.object(align, "progress", lambda *args: 0.5):
        assert main(*flags, "--steps", 1) is None


def _child(environment, file, flags):
    os.environ.update(environment)
    torch.set_num_threads(1)
    write_gradient(file, flags)


def write_gradients(number, file, flags):
    """write_gradient in so many processes with torchrun's variables, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_and_resume", "matplotlib.figure", "matplotlib.backends.backend_agg"])
    world = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(number))
    ranks = []
    for rank in range(number):
        environment = world | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{TESTS}"):
            ranks.append(context.Process(target=_child, args=(environment, f"{file}{rank}", flags)))
            ranks[-1].start()
    assert [wait(rank) for rank in ranks] == [0] * number
    return [torch.load(f"{file}{rank}") for rank in range(number)]


@pytest.mark.parametrize("flags, parts", [("", ""), ("", "--micro-batch 1"), ("--prototypes source", "")],
                         ids=["whole", "in parts", "prototypes that follow the source"])
def test_the_gradient_of_two_processes_is_the_gradient_of_one(flags, parts, world, tmp_path):
    """Losses and weights would not tell: Adam divides a gradient by its own size, so a factor on all of it is lost."""
    flags = [*world["flags"], *flags.split()]
    write_gradient(tmp_path / "alone", [*flags, "--out", tmp_path / "one"])
    one = torch.load(tmp_path / "alone")
    assert len(one["gradient"]) > 20 and max(grad.abs().max() for grad in one["gradient"].values()) > 0.01
    first, second = write_gradients(2, tmp_path / "rank", [*flags, *parts.split(), "--out", str(tmp_path / "two")])
    assert_close(first["gradient"], one["gradient"], 1e-4)
    assert_close(second["gradient"], one["gradient"], 1e-4)
    for name, buffer in one["buffers"].items():  # nobody sends them around
        assert torch.equal(first["buffers"][name], second["buffers"][name]), name
        assert torch.allclose(first["buffers"][name], buffer, atol=1e-6), name


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_step_changes_no_buffer_so_processes_need_not_send_them_around(kind, world):
    clip = [] if kind == "resnet" else ["--clip", world["vit"]]
    config = configured(world, *clip)
    module = train.build(config)[0].train()
    before = copy.deepcopy(dict(module.named_buffers()))
    one_step(config, *one_batch(config, world), step=2, module=module)
    assert "otp" in before and (kind == "vit" or sum("running_" in name for name in before) > 10)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_networks_of_several_processes_send_no_buffers_around(world, tmp_path, monkeypatch, capsys):
    seen = []

    def wrap(network, **options):
        seen.append(options)
        return network

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", wrap)
    train.set_up(configured(world, "--out", tmp_path / "run"), None, 0, 2, CPU, torch.contiguous_format)
    assert seen == [dict(device_ids=None, broadcast_buffers=False)]
    assert "2 process(es) on cpu in fp32" in capsys.readouterr().out


@pytest.mark.parametrize("places, backend, note", [
    (["cpu"] * 3, "gloo", ""),
    (["GPU-a", "GPU-b", "GPU-c"], "cpu:gloo,cuda:nccl", ""),
    (["GPU-a", "GPU-a"], "cpu:gloo,cuda:gloo", "2 processes share 1 GPU"),
    (["GPU-a", "GPU-b", "GPU-a", "GPU-c"], "cpu:gloo,cuda:gloo", "4 processes share 3 GPU")])
def test_processes_that_share_a_gpu_exchange_over_gloo_and_say_so(places, backend, note, monkeypatch, capsys):
    """Each process reads the places of the others from the store; the first one speaks."""
    pretend(monkeypatch, gpus=0 if "cpu" in places else 2)
    joined = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: joined.append((args, options)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=places[rank]))
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    for rank in range(len(places)):
        store = torch.distributed.HashStore()
        for other, place in enumerate(places):
            store.set(f"place of {other}", "" if other == rank else place)
        monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: iter([(store, rank, len(places))]))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert machine.setup_processes(SimpleNamespace(device=None, source=("gta5",)))[:2] == (rank, len(places))
        (chosen,), options = joined.pop()
        assert chosen == backend and options["timeout"].total_seconds() > 3600  # a download of CLIP takes its time
        said = capsys.readouterr().out
        assert (said.startswith(note) and said.count("\n") == 1) if note and rank == 0 else said == ""


def test_processes_with_and_without_a_gpu_cannot_train_together():
    with pytest.raises(UserError, match="1 of 3 processes have no GPU, the others have one: .*--device cpu"):
        machine.choose_backend(["GPU-a", "cpu", "GPU-b"])


@pytest.mark.parametrize("rank, local_rank, turn", [(0, "0", 0), (2, "0", 1), (1, "1", 2), (3, "1", 2)])
def test_the_first_process_loads_then_one_of_every_machine_then_the_rest(rank, local_rank, turn, monkeypatch):
    events = []
    assert machine.take_turns(rank, lambda: 7) == 7  # one process alone waits for nobody
    monkeypatch.setattr(machine, "count_processes", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(machine, "sum_over_processes", lambda x: events.append("wait") or x)
    assert machine.take_turns(rank, lambda: events.append("load") or 7) == 7
    assert events == ["wait"] * turn + ["load"] + ["wait"] * (3 - turn)


def test_a_process_that_cannot_load_does_not_let_the_others_wait(monkeypatch):
    told = []

    def fail():
        raise UserError("no such CLIP.")

    monkeypatch.setattr(machine, "count_processes", lambda: 2)
    monkeypatch.setattr(machine, "sum_over_processes", lambda x: told.append(x.item()) or x)
    with pytest.raises(UserError, match="no such CLIP"):
        machine.take_turns(0, fail)
    assert told == [1]  # before it leaves
    monkeypatch.setattr(machine, "sum_over_processes", lambda x: x + 1)  # another one
    with pytest.raises(UserError, match="process 1 stops, because another one could not go on"):
        machine.take_turns(1, lambda: pytest.fail("loaded what the first could not"))


# ----------------------------------------------------------------------------------------------------------------- stop


def test_the_second_signal_means_it_but_not_the_echo_of_the_first(monkeypatch):
    before = [signal.getsignal(number) for number in STOPS]
    clock, killed = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    with machine.catch_signals() as received:
        handler = signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGHUP) == handler
        handler(signal.SIGTERM, None)
        clock[0] += 1.9
        handler(signal.SIGTERM, None)  # torchrun hands on what the scheduler has sent already
        assert len(received) == 2 and not killed
        clock[0] += 0.2
        handler(signal.SIGTERM, None)
        assert killed == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [signal.getsignal(number) for number in STOPS] == before  # after training, one kills again


@pytest.mark.parametrize("catch", [machine.catch_signals, functools.partial(machine.stop_with, lambda: "")])
def test_a_closed_terminal_is_a_stop_unless_nohup_has_started_the_program(catch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with catch():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_loaders_process_outlives_the_first_stop(monkeypatch):
    machine.outlive_signals(0)
    for number in STOPS:
        os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # by which the loop ends it


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_outside_of_the_loop_is_a_sentence_and_its_echo_changes_nothing(number, monkeypatch):
    before, clock, done = [signal.getsignal(each) for each in STOPS], [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(UserError, match="^stopped by a signal: all is well.$"), machine.stop_with(lambda: "all is well."):
        try:
            os.kill(os.getpid(), number)
        finally:  # cleaning up
            clock[0] += 1
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)
    assert done and [signal.getsignal(each) for each in STOPS] == before


def test_a_loaders_process_does_not_speak_for_the_program_that_forked_it():
    with machine.stop_with(lambda: pytest.fail("spoke")):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # the first is left to the owner
            os._exit(7 if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def stop_at(monkeypatch, owner, name, number):
    """Send the signal to this process when owner.name is called."""
    monkeypatch.setattr(owner, name, lambda *args, **options: os.kill(os.getpid(), number) or pytest.fail("went on"))


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("owner, name", [(data, "check_pairs"), (ppar, "build"), (train, "make_optimizer")])
def test_a_stop_before_the_loop_is_a_sentence_and_the_command_can_be_given_again(owner, name, number, world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, number)
        sentence = main(*world["flags"], "--out", out)
    assert is_one_sentence(sentence) and "stopped by a signal" in sentence and "give the same command again" in sentence
    assert not (out / "last.pt").exists()
    assert main(*world["flags"], "--steps", 1, "--out", out) is None


@pytest.mark.parametrize("owner, name", [(train, "continue_run"), (train.evaluate, "evaluate_targets")])
def test_a_stop_around_a_run_that_has_a_checkpoint_says_how_to_go_on(owner, name, world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert main(*world["flags"], "--steps", 1, "--out", out) is None
    stop_at(monkeypatch, owner, name, signal.SIGTERM)
    sentence = main("--resume", out, scored=True)
    assert is_one_sentence(sentence) and f"python train.py --resume {out}" in sentence and "stopped by a signal" in sentence
    assert read_state(out)["step"] == 1


class ClosedTerminal:
    """A stream that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        pass


def test_a_run_whose_terminal_was_closed_saves_before_it_writes_to_it_again(world, tmp_path, monkeypatch):
    rate, out = train.learning_rate, tmp_path / "run"

    def close(step, steps):
        if step == 2:
            monkeypatch.setattr(ClosedTerminal, "gone", True, raising=False)
            os.kill(os.getpid(), signal.SIGHUP)
        return rate(step, steps)

    def write(stream, text):
        if getattr(stream, "gone", False):
            raise BrokenPipeError(32, "Broken pipe")
        time.sleep(0.11)  # the bar writes at every step

    monkeypatch.setattr(ClosedTerminal, "write", write)
    monkeypatch.setattr(train, "learning_rate", close)
    monkeypatch.setattr(sys, "stderr", ClosedTerminal())
    assert main(*world["flags"], "--out", out) is not None
    assert checkpoint.read(out)["step"] == 3


def test_ctrl_c_while_torch_is_imported_is_a_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = subprocess.run([sys.executable, str(ROOT / "train.py")], capture_output=True, text=True, check=False,
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 1 and is_one_sentence(done.stderr.strip()) and "same command again" in done.stderr
