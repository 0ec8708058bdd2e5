"""The checks of gpu.py as tests: on a GPU where there is one, and in miniature on the CPU, where each is also shown to fail."""

import contextlib
import copy
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import gpu
import numpy as np
import pytest
import spread
import torch
import workbench
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


def test_the_command_says_pass_or_fail_prints_the_tables_writes_them_and_ends_with_the_hours(tmp_path, monkeypatch, capsys):
    def good(device, folder, sizes):
        """One is one."""
        return "1"

    def bad(device, folder, sizes):
        """One is two."""
        raise AssertionError("it is not")

    monkeypatch.setattr(gpu, "CHECKS", dict(good=good, bad=bad))
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    lines, report = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "gpu.json").read_text())
    assert lines[1:3] == ["PASS good: One is one. 1", "FAIL bad: One is two. AssertionError: it is not"]
    assert report["checks"] == dict(good=dict(passed=True, said="1"), bad=dict(passed=False, said="AssertionError: it is not"))
    assert report["device"] == "cpu" and lines[-1] == report["hours"]
    step, part, loader, evaluation = (report["tables"][name] for name in ("step", "part", "loader", "evaluation"))
    assert [(row["clip"], row["method"]) for row in step] == [(c, m) for c in gpu.SMALL["towers"] for m in ("erm", "ppar")]
    assert all(row["ms"] > 0 and row["images_per_s"] == pytest.approx(2000 / row["ms"]) and row["busy"] > 0 for row in step)
    whole = part.pop()
    assert whole["part"] == "the whole step" and all(0 < row["ms"] < 2 * whole["ms"] for row in part) and len(part) == 6
    assert [row["workers"] for row in loader] == [0, 1] and len(evaluation) == 4 and all(row["s"] > 0 for row in evaluation)


def test_the_hours_follow_from_the_steps_and_from_the_fastest_loader():
    step = [dict(clip="RN50", method=method, ms=ms) for method, ms in (("erm", 90.0), ("ppar", 180.0))]
    loader = [dict(workers=workers, images_per_s=speed) for workers, speed in ((4, 10.0), (16, 40.0), (8, 20.0))]
    assert gpu.hours(dict(step=step, loader=loader)) == ("hours for 40000 steps, baseline and method: RN50 1.0 and 2.0; no less than 2.2 "
                                                         "with 16 loader processes")


def test_a_package_that_is_missing_is_named_with_the_wheel_to_bring():
    assert gpu.missing_wheels() == ""
    told = gpu.missing_wheels(["torch>=2.6", "no_such_package<3", "Pillow"])
    assert "pip download -d wheels 'no_such_package<3';" in told and "--no-index" in told and "torch" not in told and "Pillow" not in told


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
