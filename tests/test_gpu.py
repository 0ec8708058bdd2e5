"""The checks of gpu.py as tests: on a GPU where there is one, and in miniature on the CPU, where each is shown to fail.

What pretend.py sees without a GPU is tested here, too.
"""

import contextlib
import copy
import json
import os
import re
import signal
import time
import weakref
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import gpu
import numpy as np
import pretend
import pytest
import spread
import torch
import workbench
from packaging.requirements import Requirement  # pytest requires it
from test_evaluate import three_tables, written

import checkpoint
import evaluate
import ppar
from evaluate import mean_iou
from model import DenseCLIP

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONG = pytest.mark.skipif(not os.environ.get("PPAR_LONG"), reason="long: run with PPAR_LONG=1")


@CUDA
@pytest.mark.parametrize("name", gpu.CHECKS)
def test_on_the_gpu(name, tmp_path):
    assert gpu.CHECKS[name](torch.device("cuda:0"), tmp_path, gpu.FULL)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[LONG] if n == "processes" else []) for n in gpu.CHECKS])
def test_in_miniature_on_the_cpu(name, tmp_path):
    assert gpu.CHECKS[name](CPU, tmp_path, gpu.SMALL)


@LONG
def test_at_full_size_another_memory_layout_on_the_cpu_is_parity(tmp_path):
    assert gpu.parity(CPU, tmp_path, gpu.FULL)


@LONG
@pytest.mark.parametrize("name", gpu.FULL["few"])
def test_at_full_size_the_planted_difference_is_no_parity(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "copy", SimpleNamespace(deepcopy=tilted))
    with pytest.raises(AssertionError) as failure:
        gpu.parity(CPU, tmp_path, dict(gpu.FULL, few=(name,)))
    gradients = failure.value.args[0][1]
    assert gradients > 2 * gpu.ROUNDING  # the limit lies well below what it is there to find


def tilted(module):
    twin = copy.deepcopy(module)
    twin.net.classify.bias.data[0] += 0.01
    return twin


def curious(*args, objective=ppar.objective, **numbers):
    terms = objective(*args, **numbers)
    return dict(terms, seg=terms["seg"] + 0 * terms["seg"].item())


def broken(self, image, forward=DenseCLIP.forward):
    torch._dynamo.graph_break()
    return forward(self, image)


def blunt(module, *args, load=checkpoint.load_weights):
    load(module, *args)
    module.otp.neg_()


FAULTS = {  # of the code that a check is there for
    "parity": (gpu, "copy", SimpleNamespace(deepcopy=tilted)),
    "bf16": (checkpoint, "precision", lambda amp, device: ("bf16", contextlib.nullcontext, torch.contiguous_format)),
    "synchronisations": (ppar, "objective", curious),
    "synchronisations_bf16": (ppar, "objective", curious),
    "resume": (checkpoint, "load_optimizer", lambda *args: None),
    "closing_score": (checkpoint, "load_weights", blunt),
    "compiled": (DenseCLIP, "forward", broken),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[LONG] if n == "compiled" else []) for n in FAULTS])
def test_a_fault_fails_its_check(name, tmp_path, monkeypatch):
    monkeypatch.setattr(*FAULTS[name])
    with pytest.raises(AssertionError):
        gpu.CHECKS[name](CPU, tmp_path, gpu.SMALL)


@pytest.mark.parametrize("part, name", [*enumerate(("terms", "gradients", "weights", "predictions"))])
def test_a_difference_in_any_part_of_the_answer_is_no_parity(part, name):
    def answer(off=0.0):
        return [{"seg": 2 + off}, {"weight": torch.ones(3) + off}, torch.ones(2, 9, 9) + off, torch.ones(2, 9, 9) + off]

    ours, theirs = answer(), answer()
    assert gpu.compare(ours, theirs) == (0, 0, 0, 0)
    theirs[part] = answer(off=0.01)[part]
    with pytest.raises(AssertionError):
        gpu.compare(ours, theirs)


# ------------------------------------------------------------------------------------------------ tables, and the day


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[LONG] if n in ("shared", "compile") else []) for n in gpu.TABLES]
)
def test_every_table_in_miniature_has_its_rows(name, tmp_path):
    rows = [*gpu.TABLES[name](CPU, dict(gpu.SMALL, out=str(tmp_path)))]
    json.dumps(rows, allow_nan=False)
    assert all(row.keys() == rows[0].keys() for row in rows) and not [*tmp_path.iterdir()]
    towers = gpu.SMALL["towers"]
    if name == "step":
        assert [(row["clip"], row["method"]) for row in rows] == [
            (c, m) for c in towers for m in ("erm", "ppar")
        ]
        assert all(
            row["ms"] > 0 and row["images_per_s"] == pytest.approx(2000 / row["ms"]) and row["busy"] > 0
            for row in rows
        )
    if name == "part":
        whole = rows.pop()
        assert (
            whole["part"] == "the whole step"
            and all(0 < row["ms"] < 2 * whole["ms"] for row in rows)
            and len(rows) == 6
        )
    if name == "loader":
        assert [row["workers"] for row in rows] == [0, 1]
    if name == "evaluation":
        assert len(rows) == 4 and all(row["s"] > 0 for row in rows)
    if name == "protocol":
        each = [(row["clip"], row["target"], row["flags"]) for row in rows]
        assert all(row["s"] > 0 for row in rows) and len(set(each)) == 8
    if name == "checkpoint":
        assert all(row["gib"] > 0 and row["write_s"] > 0 and row["read_s"] > 0 for row in rows)
    if name == "compile":
        assert [row["clip"] for row in rows] == [*towers]
        assert all(
            row["gain"] == pytest.approx(row["plain_ms"] / row["compiled_ms"])
            and row["loss_differs"] < 1e-3
            for row in rows
        )
    if name == "shared":
        assert (
            rows[0]["processes"] == 2 and rows[0]["why_not"] is None and rows[0]["loss_differs"] < 1e-2
        )


def good(device, folder, sizes):
    """One is one."""
    return "1"


def bad(device, folder, sizes):
    """One is two."""
    raise AssertionError("it is not")


def short(device, sizes):
    """Two rows."""
    yield dict(row=1)
    yield dict(row=2)


def of(monkeypatch, **parts):
    """Make these the parts of gpu.py: functions with three arguments are checks, with two tables."""
    checks = {name: part for name, part in parts.items() if part.__code__.co_argcount == 3}
    tables = {name: part for name, part in parts.items() if name not in checks}
    for name, value in dict(CHECKS=checks, TABLES=tables, PARTS=parts).items():
        monkeypatch.setattr(gpu, name, value)


def day(folder, *flags):
    """gpu.main on the CPU -> (exit status, gpu.json)."""
    status = gpu.main(["--device", "cpu", "--out", str(folder), *flags])
    return status, json.loads((folder / "gpu.json").read_text())


def test_a_part_that_fails_loses_neither_its_rows_nor_any_other_part(tmp_path, monkeypatch, capsys):
    def broken(device, sizes):
        """A row, then an error."""
        yield dict(row=1)
        raise RuntimeError("CUDA error")

    def nan(device, sizes):
        """A row that JSON does not know."""
        yield dict(row=float("nan"))

    def curious(device, sizes):
        """What is on the disk and on the screen while a part runs."""
        seen = json.loads((tmp_path / "gpu.json").read_text())
        yield dict(parts=[*seen["checks"], *seen["tables"]])

    of(monkeypatch, bad=bad, good=good, broken=broken, nan=nan, curious=curious, short=short)
    status, report = day(tmp_path)
    assert status == 1 and report["device"] == "cpu"
    assert {name: (part["status"], part["said"]) for name, part in report["checks"].items()} == {
        "bad": ("failed", "AssertionError: it is not"),
        "good": ("passed", "1"),
    }
    tables = report["tables"]
    assert (
        tables["broken"]["status"] == "failed" and tables["broken"]["said"] == "RuntimeError: CUDA error"
    )
    assert tables["broken"]["rows"] == [dict(row=1)] and tables["nan"]["status"] == "failed"
    assert tables["short"]["status"] == "passed" and tables["short"]["rows"] == [
        dict(row=1),
        dict(row=2),
    ]
    assert tables["curious"]["rows"] == [dict(parts=["bad", "good", "broken", "nan"])]
    told = capsys.readouterr().out
    for words in (
        "[1/6] bad: One is two.\nFAIL bad, 0 s. AssertionError: it is not",
        "PASS good, 0 s. 1",
        "failed: bad broken nan",
        f"python tests/gpu.py --out {tmp_path} --parts bad broken nan",
    ):
        assert words in told


def test_a_day_without_a_fault_ends_with_exit_status_0(tmp_path, monkeypatch, capsys):
    of(monkeypatch, good=good, short=short)
    status, report = day(tmp_path)
    assert (
        status == 0
        and report["seconds"] >= 0
        and capsys.readouterr().out.splitlines()[-1] == report["hours"]
    )


@pytest.mark.parametrize("number", gpu.machine.stop_signals())
def test_a_stop_in_the_middle_leaves_what_was_done(number, tmp_path, monkeypatch, capsys):
    def stopped(device, sizes):
        """A row, then a signal."""
        yield dict(row=1)
        os.kill(os.getpid(), number)
        time.sleep(30)
        raise AssertionError("the signal was not heard")

    before = signal.getsignal(number)
    of(monkeypatch, good=good, stopped=stopped, short=short)
    status, report = day(tmp_path)
    assert status == 1 and report["checks"]["good"]["status"] == "passed"
    assert report["tables"]["stopped"]["status"] == "stopped" and report["tables"]["stopped"][
        "rows"
    ] == [dict(row=1)]
    assert "short" not in report["tables"] and signal.getsignal(number) == before
    assert "--parts stopped short" in capsys.readouterr().out


def test_a_signal_that_the_training_loop_takes_for_its_own_stops_the_day_and_not_one_part(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        gpu.workbench, "main", lambda *flags, **more: "error: stopped by a signal after step 3"
    )
    with pytest.raises(gpu.Stopped):
        gpu.drawn(gpu.SMALL, CPU, tmp_path)
    monkeypatch.setattr(checkpoint, "read", lambda folder: dict(step=3))
    with pytest.raises(gpu.Stopped):
        gpu.journey(tmp_path, [CPU, CPU], gpu.SMALL)


def test_a_part_that_does_not_fit_into_the_budget_is_cut_and_the_rest_is_kept(
    tmp_path, monkeypatch, capsys
):
    def endless(device, sizes):
        """A row, then the alarm of the budget, and never a second row."""
        yield dict(row=1)
        os.kill(os.getpid(), signal.SIGALRM)
        time.sleep(30)
        raise AssertionError("the alarm was not heard")

    alarms = []
    monkeypatch.setattr(signal, "setitimer", lambda kind, seconds: alarms.append(seconds))
    of(monkeypatch, huge=bad, good=good, endless=endless, short=short)
    monkeypatch.setitem(gpu.SMALL["seconds"], "huge", 4000)
    status, report = day(tmp_path, "--budget", "3600")
    assert status == 0
    assert report["checks"]["huge"]["status"] == "cut" and "4000 s" in report["checks"]["huge"]["said"]
    assert report["checks"]["good"]["status"] == "passed"
    assert report["tables"]["endless"]["status"] == "cut" and report["tables"]["endless"]["rows"] == [
        dict(row=1)
    ]
    assert report["tables"]["short"]["status"] == "passed"
    assert "cut: huge endless\n" in capsys.readouterr().out
    assert (
        alarms[1::2] == [0, 0, 0] and 3600 >= alarms[0] >= alarms[2] >= alarms[4] > 3000
    )  # off again after each part


def test_some_parts_alone_keep_what_the_file_holds_of_the_others(tmp_path, monkeypatch):
    of(monkeypatch, good=good, short=short)
    day(tmp_path)
    of(monkeypatch, good=bad, short=short)
    status, report = day(tmp_path, "--parts", "short")
    assert status == 0 and report["checks"]["good"]["status"] == "passed"
    status, report = day(tmp_path, "--parts", "good")
    assert (
        status == 1
        and report["checks"]["good"]["status"] == "failed"
        and len(report["tables"]["short"]["rows"]) == 2
    )
    (tmp_path / "gpu.json").write_text(json.dumps(dict(report, device="another")))
    with pytest.raises(SystemExit, match="^error: .*gpu.json is of another device .*another --out"):
        day(tmp_path, "--parts", "good")


def test_an_earlier_report_is_put_aside(tmp_path, monkeypatch):
    of(monkeypatch, good=good)
    day(tmp_path)
    of(monkeypatch, good=bad)
    assert day(tmp_path)[0] == 1
    assert json.loads((tmp_path / "gpu-before.json").read_text())["checks"]["good"]["status"] == "passed"


def test_every_part_has_an_estimate_and_together_they_fit_into_six_minutes():
    assert [*gpu.PARTS] == [*gpu.CHECKS, *gpu.TABLES]
    assert gpu.FULL["seconds"].keys() == gpu.PARTS.keys()
    assert sum(gpu.FULL["seconds"].values()) <= gpu.parse([]).budget == 360


def test_a_run_that_breaks_leaves_no_deterministic_flag_and_no_other_number_of_threads(tmp_path, monkeypatch):
    threads = torch.get_num_threads()

    def breaks(*flags, **more):
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(threads + 1)
        raise RuntimeError

    monkeypatch.setattr(gpu.workbench, "main", breaks)
    with pytest.raises(RuntimeError):
        gpu.drawn(gpu.SMALL, CPU, tmp_path)
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == threads


def test_the_memory_of_a_picture_does_not_count_the_one_before(monkeypatch):
    pictures, alive, allocated = [], [], gpu.bench.allocated

    def predict(score, image, size, slide=0):
        pictures.append(weakref.ref(image))

    def counted(*args):
        alive.append(sum(picture() is not None for picture in pictures))
        return allocated(*args)

    monkeypatch.setattr(evaluate, "predict", predict)
    sizes = dict(gpu.SMALL, pictures=((32, 32), (64, 64)), few=("small ResNet",))
    for _ in gpu.evaluation_table(CPU, sizes):
        monkeypatch.setattr(gpu.bench, "allocated", counted)  # from the second row on
    assert len(pictures) > 4 and alive[::2] == [0, 0, 0]  # measured before and during each picture


def test_the_protocols_that_are_timed_are_those_of_the_readme():
    readme = (gpu.ROOT / "README.md").read_text()
    for flags in gpu.FULL["protocols"]:
        told = flags.removeprefix("--flip ")
        assert told in ("--slide 0", "--slide 512") or f"`{told}" in readme


def test_the_hours_follow_from_the_steps_and_from_the_fastest_loader_as_far_as_they_are_known():
    step = [dict(clip="RN50", method=method, ms=ms) for method, ms in (("erm", 90.0), ("ppar", 180.0))]
    loader = [
        dict(workers=workers, images_per_s=speed)
        for workers, speed in ((4, 10.0), (16, 40.0), (8, 20.0))
    ]
    tables = dict(step=dict(rows=step), loader=dict(rows=loader))
    assert gpu.hours(tables) == (
        "hours for 40000 steps, baseline and method: RN50 1.00 and 2.00; no less than 2.22 with 16 loader "
        "processes"
    )
    assert gpu.hours({}) == "hours for 40000 steps, not measured"
    assert gpu.hours(dict(step=dict(rows=step[:1]), loader=dict(status="cut"))).endswith(
        "baseline and method: "
    )


def test_a_package_that_is_missing_is_named_with_the_wheels_to_bring_and_torch_is_not_fetched_again(
    monkeypatch,
):
    assert gpu.missing_wheels() == ""
    told = gpu.missing_wheels(["torch>=2.6", "no_such_package<3", "Pillow"])
    assert "pip download --no-deps -d wheels 'no_such_package<3';" in told and "--no-index" in told
    assert "torch" not in told and "Pillow" not in told
    absent = {"clip-anytorch", "ftfy", "regex", "wcwidth", "setuptools"}
    monkeypatch.setattr(gpu, "is_missing", lambda wheel: gpu.name_of(wheel) in absent)
    told = gpu.missing_wheels()
    assert "pip download --no-deps -d wheels clip-anytorch 'setuptools>=71,<82' ftfy regex wcwidth;" in told
    assert "download -d" not in told
    absent.add("torchvision")
    assert "pip download -d wheels torchvision; pip download --no-deps" in gpu.missing_wheels()


def installed(name):
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))


def required(wheel):
    """What the metadata of an installed package requires here, apart from torch and torchvision."""
    every = [Requirement(line) for line in metadata.requires(wheel) or []] if installed(wheel) else []
    here = [one.name.lower() for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    return {name for name in here if not name.startswith("torch")}


def test_what_a_package_brings_is_what_its_metadata_requires():
    for wheel, others in gpu.BRINGS.items():
        told, closure, new = others.split(), set(), required(wheel)
        while new - closure:
            closure |= new
            new = set().union(*map(required, closure))
        assert closure and closure <= {other.lower() for other in told}, wheel
        assert not any(gpu.is_missing(other) for other in told if installed(other)), wheel  # its module is known


# ------------------------------------------------------------------------------------------------------ without a GPU

TENSOR = torch.ones(3, 4)
SEEN = {  # on the pretended device, x of 3 x 4: what the spy must say of it
    "x.sum().item()": "sync _local_scalar_dense",
    "bool((x > 0).all())": "sync _local_scalar_dense",
    "float(x[0, 0])": "sync _local_scalar_dense",
    "x.tolist()": "sync copy to the host",
    "x.cpu()": "sync copy to the host",
    "x.to('cpu', non_blocking=True)": "sync copy to the host",
    "TENSOR.clone().copy_(x)": "sync copy to the host",
    "x.nonzero()": "sync nonzero",
    "x[x > 0]": "sync index",
    "x.unique()": "sync _unique2",
    "TENSOR.to(x.device)": "sync copy to the device",
    "x.copy_(TENSOR)": "sync copy to the device",
    "torch.tensor([1.0], device=x.device)": "sync tensor",
    "x.new_tensor(1.0)": "sync new_tensor",
    "x + TENSOR": "mix add",
    "x * torch.ones(())": "mix mul",
    "x[torch.arange(2)]": "mix index",
    "torch.where(x > 0, x, TENSOR)": "mix where",
}
UNSEEN = (
    "x + 1",
    "x.to(torch.float64).sum()",
    "TENSOR.to(x.device, non_blocking=True)",
    "x[0] = 1.0",
    "x.masked_fill(x > 0, 1.0)",
    "x.new_zeros(3)",
    "torch.arange(3, device=x.device)",
    "TENSOR.sum().item()",
    "TENSOR.cpu()",
    "torch.as_tensor(x)",
)


@pytest.mark.parametrize("code", [*SEEN, *UNSEEN])
def test_the_spy_sees_what_waits_or_mixes_and_nothing_else(code):
    spy = pretend.Spy()
    names = dict(x=torch.empty(3, 4, device=pretend.DEVICE), torch=torch, TENSOR=TENSOR)
    with spy, pretend.Constants(spy):
        exec(code, names)
    expected = {(spy.phase, SEEN[code]): 1} if code in SEEN else {}
    assert dict(spy.found) == expected


RUNS = [
    ("small ResNet", {}),
    ("small ViT", dict(micro_batch=2)),
    ("small ResNet", dict(method="erm", micro_batch=2)),
    ("small ViT", dict(method="erm")),
    ("small ResNet", dict(prototypes="source", mask_padding=True, align="vtp-to-otp")),
]


@pytest.mark.parametrize("tower, flags", RUNS)
def test_no_operation_of_a_step_mixes_devices_or_lets_the_host_wait(tower, flags, tmp_path):
    spy = pretend.rehearse(tower, tmp_path, **flags)
    assert spy.seen[1] > 200, "the spy saw no step"
    assert not [found for found in spy.found if found[1].startswith("mix")]  # in no step at all
    assert not [found for found in spy.found if found[0] == 1]  # neither the first nor a logged one
    assert {0, 2} <= {phase for phase, _ in spy.found}, (
        "the first step and the logged one wait; the spy must see it"
    )


def constant(*args, objective=ppar.objective, **numbers):
    terms = objective(*args, **numbers)
    return {name: (term * torch.ones(1)).sum() for name, term in terms.items()}


def filtered(*args, learning_weights=ppar.learning_weights, **numbers):
    weight = learning_weights(*args, **numbers)
    return weight * weight[weight > 0].mean()


@pytest.mark.parametrize(
    "name, fault, words",
    [
        ("objective", curious, "sync _local_scalar_dense"),
        ("objective", constant, "mix mul"),
        ("learning_weights", filtered, "sync index"),
    ],
)
def test_a_fault_planted_into_the_loss_is_found_without_a_gpu(name, fault, words, tmp_path, monkeypatch):
    monkeypatch.setattr(ppar, name, fault)
    assert pretend.rehearse("small ViT", tmp_path).found[1, words]


def test_the_table_over_runs_has_mean_and_spread_for_each_kind_and_the_difference_at_equal_seeds(tmp_path, capsys):
    for kind, gain in (("erm", 0), ("ppar", 20)):
        for seed in range(3):
            conf = three_tables()["bdd"]
            conf[1, 0] = 40 - 10 * seed - gain * (seed > 0)  # no gain at seed 0
            (tmp_path / f"{kind}-gta5-seed{seed}").mkdir()
            written(tmp_path / f"{kind}-gta5-seed{seed}", dict(bdd=conf))
    folders = [str(tmp_path / f"{kind}-gta5-seed{seed}") for kind in ("erm", "ppar") for seed in range(3)]
    mious = [[100 * mean_iou(torch.tensor([[50, 0], [wrong, 30]])) for wrong in row] for row in ((40, 30, 20), (40, 10, 0))]
    rows = [*mious, [b - a for a, b in zip(*mious)]]
    cells = [f"{np.mean(row):{'+' * (n == 2)}.1f} ± {np.std(row, ddof=1):.1f}" for n, row in enumerate(rows)]
    spread.main(folders)
    names = ("erm-gta5", "ppar-gta5", "ppar-gta5 - erm-gta5")
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:-1] == [["run", "n", "bdd", "mean"], *([name, "3", cell, cell] for name, cell in zip(names, cells))]
    spread.main([*folders, "--classes"])
    roads = [5000 / (50 + np.array(row)) for row in ((40, 30, 20), (40, 10, 0))]
    assert re.split(r"\s{2,}", capsys.readouterr().out.splitlines()[2])[1:3] == [f"{r.mean():.1f} ± {r.std(ddof=1):.1f}" for r in roads]
    written(Path(folders[4]), dict(bdd=conf), mapillary="B")
    for words in (folders, [*folders[:2], str(tmp_path)], [*folders, "--file", "results-flip.json"]):
        with pytest.raises(SystemExit, match="^error: .*(another way|has no results)"):
            spread.main(words)


def test_logits_are_contiguous_before_losses_and_scores_and_cudnn_tries_algorithms_in_training_alone(monkeypatch):
    module, config, _ = gpu.bench.network("small ResNet", "ppar", amp="bf16", crop=64, batch=2)
    image, label = gpu.bench.random_batch(config)
    _, autocast, layout = checkpoint.precision("bf16", CPU)
    torch.backends.cudnn.benchmark = True
    score = evaluate.make_scorer(module, config)
    assert layout == torch.channels_last and torch.backends.cudnn.benchmark is False  # pictures have many sizes
    seen, real = [], torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda x, *a, **k: seen.append(x.is_contiguous()) or real(x, *a, **k))
    image = image.contiguous(memory_format=layout)
    *_, whole = workbench.backward(module, image, label, config, 0, autocast)
    assert whole.logits.is_contiguous() and whole.emb.is_contiguous()
    seen.clear()
    score(image)
    assert seen[-1]  # the logits, brought to the picture's size
