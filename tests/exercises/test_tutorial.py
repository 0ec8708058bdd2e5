"""What exercises.md says is true: its step on paper is the step of the code."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import align
import ppar
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
    for believed in (True, False):
        config = SimpleNamespace(steps=2, ramp=(0, 1), align="progressive", reweight=believed, balance=0, w_align=1, tau=0.5,
                                 text_weight=0)
        terms, at = ppar.objective(out, otp, label, config, step=1)
        assert at == pytest.approx(dict(lam=0.5, ramp=0.5))
        losses += [f"{terms['seg']:.3f}", f"{terms['align']:.3f}"]
    config.reweight = True
    assert weight == printed(2, ppar.learning_weights(out, otp, label, config, ramp=0.5))
    assert re.findall(r"\*\*(\d\.\d{3})\*\*", TEXT) == losses

    align._demo(), reweight._demo()
    by_align, by_reweight = re.findall(r"on paper.*", capsys.readouterr().out)
    assert " ".join(each) in by_align and f"L_align {losses[1]}" in by_align
    assert all(" ".join(column) in by_reweight for column in (omega, place, weight)) and f"L_seg {losses[0]}" in by_reweight
