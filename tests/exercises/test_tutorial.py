"""What exercises.md says is true: its step on paper is that of the code, its eight lines work elsewhere, its checks check."""

import codecs
import contextlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_checks
import torch
import torchvision.models.segmentation as zoo
import workbench
from torch.nn.functional import cross_entropy

import align
import ppar
import prototypes
import reweight

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "exercises.md").read_text(encoding="utf-8")


def test_the_step_on_paper_is_the_step_of_the_code_and_both_demonstrations_print_it(capsys):
    table = [line.strip("| ").split(" | ") for line in TEXT.split("\n") if re.match(r"\| \d \| \d \|", line)]
    _, label, q, omega, place, weight, nll, z, cosine, each = zip(*table, strict=True)
    label = torch.tensor([[list(map(int, label))]])  # (1, 1, 3)
    q, emb = (torch.tensor([[float(x) for x in cell.split(",")] for cell in column]).T[None, :, None] for column in (q, z))
    otp, vtp = torch.eye(2, 3), torch.tensor([[[0.28, 0, 0.96], [0, 1, 0]]])

    def printed(digits, values):
        return tuple(f"{x:.{digits}f}" for x in values.flatten().tolist())

    reliable = reweight.reliability(q.log(), label)
    assert (omega, place) == (printed(2, reliable), printed(2, reweight.place_reliability(reliable, label, side=3)))
    assert nll == printed(3, torch.nn.functional.nll_loss(q.log(), label, reduction="none"))
    cosines = align.cosine_similarity_map(emb, align.goal(otp, vtp, 0.5))[0, :, 0].T
    assert cosine == tuple(", ".join(f"{round(x, 3) + 0:g}" for x in pair) for pair in cosines.tolist())
    assert each == printed(3, align.alignment_map(emb, label, align.goal(otp, vtp, 0.5), tau=0.5))

    out, losses = ppar.Output(q.log(), emb, vtp), []
    for ramp in (0.5, 0.0):  # with weights and without
        terms = ppar.objective(out, otp, label, lam=0.5, ramp=ramp, tau=0.5, judge_text=0)
        losses += [f"{terms['seg']:.3f}", f"{terms['align']:.3f}"]
    assert weight == printed(2, ppar.learning_weights(out, otp, label, tau=0.5, judge_text=0, ramp=0.5))
    assert re.findall(r"\*\*(\d\.\d{3})\*\*", TEXT) == losses

    align._demo(), reweight._demo()
    by_align, by_reweight = re.findall(r"on paper.*", capsys.readouterr().out)
    assert " ".join(each) in by_align and f"L_align {losses[1]}" in by_align
    assert all(" ".join(column) in by_reweight for column in (omega, place, weight)) and f"L_seg {losses[0]}" in by_reweight


@pytest.mark.parametrize("name, channels", [("deeplabv3_resnet50", 2048), ("lraspp_mobilenet_v3_large", 960)], ids=["deeplab", "lraspp"])
def test_the_eight_lines_train_a_segmentation_network_of_torchvision(name, channels):
    lines = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    torch.manual_seed(0)
    net, project, maps = getattr(zoo, name)(weights=None, weights_backbone=None, num_classes=3), torch.nn.Conv2d(channels, 8, 1), []
    net.backbone.register_forward_hook(lambda module, image, out: maps.append([*out.values()][-1]))
    otp, label = workbench.unit_rows(3, 8), torch.randint(0, 3, (2, 32, 64))
    label[:, :5] = 255
    vtp = prototypes.visual_text_prototypes(otp, torch.randn(2, 8, 4, 6), tau=0.07)
    for step, goal in ((0, otp), (10, vtp)):  # the two ends of the ramp
        net.zero_grad(), project.zero_grad()
        logits = (1 + step) * net(torch.randn(2, 3, 32, 64))["out"]  # certain of itself in the end
        at = dict(features=maps[-1], logits=logits, label=label, step=step, steps=10, otp=otp, vtp=vtp, project=project)
        exec(lines, at | dict(align=align, reweight=reweight, cross_entropy=cross_entropy), at)
        seg = cross_entropy(logits, label, ignore_index=255, reduction="none")
        pull = align.alignment_loss(at["emb"], at["grid"], goal, 0.07, align.labels_on_grid(at["weight"], at["emb"]))
        torch.testing.assert_close(at["loss"], (at["weight"] * seg).sum() / at["weight"].sum() + pull)
        assert set(at["weight"][label != 255].tolist()) == ({1.0} if step == 0 else {0.0, 1.0}) and not at["weight"][label == 255].any()
        at["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for module in (net, project) for p in module.parameters())
    assert len(lines.strip().split("\n")) == 8


def answers(number=None):
    """A module of right answers, or with the one of this number gone wrong."""
    found, text = ModuleType("answers"), codecs.decode(Path(__file__).with_name("answers.rot13.txt").read_text(), "rot13")
    exec(text, vars(found))
    exec(text.replace(*found.WRONG.get(number, ("", "")), 1), vars(found))
    return found


@pytest.mark.parametrize("check", [check for name, check in vars(test_checks).items() if name.startswith("test_")],
                         ids=lambda check: re.sub(r"\W|\d", "", check.__name__))
def test_a_check_fails_on_its_stub_and_on_a_wrong_answer_and_passes_on_a_right_one(check, tmp_path):
    number = re.match(r"test_0?(\d+)", check.__name__)[1]
    stub = test_checks.module(Path(__file__).with_name("stubs.py"))
    cases = dict(stub=(stub, NotImplementedError), wrong=(answers(number), AssertionError), right=(answers(), None))
    for name, (module, error) in cases.items():
        (tmp_path / name).mkdir()
        given = (module, tmp_path / name)[:check.__code__.co_argcount]
        with pytest.raises(error) if error else contextlib.nullcontext():
            check(*given)


def test_every_exercise_has_its_time_its_command_its_stub_and_its_check():
    heads = re.findall(r"^### (\d+)\. .* \((.*)\)$", TEXT, re.M)
    assert all(re.match(r"\d+ minutes|an hour|\d hours|a day", time) for _, time in heads)
    checks = [name[5:7] for name in vars(test_checks) if name.startswith("test_")]
    asked = re.findall(r"`pytest tests/exercises -k (\d+)`", TEXT.split("## Ten")[1])
    assert asked == checks == [f"{int(number):02d}" for number, _ in heads] == [f"{k:02d}" for k in range(1, 11)]


def test_the_sentence_on_noise_is_that_of_the_committed_runs():
    sys.path.insert(0, str(ROOT / "results"))
    import pictures

    lines = pictures.ablate.read(ROOT / "results" / "toy.csv")
    assert pictures.noise_sentence(lines) in (ROOT / "results" / "README.md").read_text(encoding="utf-8"), "python results/pictures.py"
