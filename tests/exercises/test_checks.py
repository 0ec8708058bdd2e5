"""test_checks.py: is an answer right? `pytest tests/exercises -k 02`; what it reads is mine.py, or the stubs where there is none."""

import copy
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import workbench
from PIL import Image

import align
import bound
import data
import ppar
import prototypes
import reweight
import toy
import train

ROOT = Path(__file__).resolve().parents[2]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(found := importlib.util.module_from_spec(spec))
    return found


@functools.cache
def untrained():
    """The network at step 0, whose prediction is CLIP's text score, and its flags."""
    config = train.configure(dict(align="none", reweight=False, text_weight=1.0, freeze=0))
    return train.build(config)[0].eval(), config


@pytest.fixture
def mine():
    own = ROOT / "mine.py"
    return module(own if own.is_file() else Path(__file__).with_name("stubs.py"))


def test_01_on_paper(mine):
    want = dict(omega=[1, 1, 1 / 9], place=[1, 19 / 27, 5 / 9], weight=[1, 1, 1], seg=0.938, align=0.982)
    got = mine.on_paper()
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=0.006), name


def test_02_alignment_loss(mine):
    g = torch.Generator().manual_seed(0)
    emb, weight = 3 * torch.randn(2, 8, 5, 7, generator=g), torch.rand(2, 5, 7, generator=g).round(decimals=1)
    label, points = torch.randint(0, 4, (2, 5, 7), generator=g), workbench.unit_rows(4, 8)
    label[torch.rand(2, 5, 7, generator=g) < 0.3] = 255
    for tau, w in ((0.07, weight), (1.0, weight), (0.07, 0 * weight)):
        torch.testing.assert_close(mine.alignment_loss(emb, label, points, tau, w), align.alignment_loss(emb, label, points, tau, w))


def test_03_minimum(mine):
    points, tau, anywhere = workbench.unit_rows(5, 6), 0.2, workbench.unit_rows(500, 6, seed=1)
    for y in range(5):
        z = mine.minimum(points, y, tau)
        best, *others = bound.score_loss(torch.cat([z[None], points[y:y + 1], anywhere]), torch.full((502,), y), points, tau)
        assert z.norm().item() == pytest.approx(1, abs=1e-4) and best < min(others)
    pair = torch.tensor([[1, 0, 0], [0.8, 0.6, 0]])
    assert (mine.minimum(pair, 0, tau) @ pair[0]).item() == pytest.approx(0.1 ** 0.5, abs=0.01), "72 degrees away"


def test_04_trainable(mine):
    for freeze, number in mine.trainable().items():
        encoder = copy.deepcopy(untrained()[0].net.encoder)
        encoder.freeze(freeze)
        assert number == sum(p.numel() for p in encoder.parameters() if p.requires_grad), f"--freeze {freeze}"
    assert {0, 3, 5} <= set(mine.trainable())


def test_05_suspects(mine):
    """The miniature CLIP, untrained, is the judge."""
    (judge, config), found, accused = untrained(), [], []
    for index in range(6):
        image, given, wrong = toy.draw("toy-gta5", "train", index, harmful=1.0)
        out, label, _ = ppar.look(judge, data.to_tensor(image), given)
        log_q = ppar.prediction(out.logits, out.emb, judge.otp, tau=config.tau, text_weight=1.0)
        guess = mine.suspects(log_q, label)[0].numpy()
        found.append(guess[wrong & (given != 255)])
        accused.append(guess[~wrong & (given != 255)])
    found, accused = np.concatenate(found).mean(), np.concatenate(accused).mean()
    assert found > 0.84 and accused < 0.17, f"found {found:.0%} of the wrong labels, accused {accused:.0%} of the right ones"


def test_06_share(mine):
    label = torch.as_tensor(toy.draw("toy-gta5", "train", 0)[1])[None].long()
    count = torch.bincount(label.flatten(), minlength=256)[:19]
    for balance in (0.0, 0.5, 1.0):
        logits = torch.zeros(1, 19, 96, 192, requires_grad=True)
        out = ppar.Output(logits, torch.ones(1, 2, 12, 24))
        ppar.objective(out, None, label, lam=None, ramp=0, tau=1, judge_text=0, balance=balance)["seg"].backward()
        pull = torch.stack([logits.grad.abs().sum(1)[label == c].sum() for c in range(19)])
        torch.testing.assert_close(mine.share(count, balance).float(), pull / pull.sum(), rtol=1e-3, atol=1e-5)


def test_07_schedule(mine):
    ramp = [k / 100 for k in range(101)]
    path = [float(mine.schedule(r)) for r in ramp]
    assert 0 <= min(path) and max(path) <= 1 and max(abs(a - b) for a, b in zip(path, path[1:])) < 0.2
    for name in set(align.SCHEDULES) - {"none", "mine"}:
        assert max(abs(a - align.SCHEDULES[name](r)) for a, r in zip(path, ramp)) > 0.1, f"that is {name}"
    a, b = [39.5, 39.7, 39.2, 40.1, 39.3], [39.2, 39.5, 39.3, 39.7, 39.0]
    assert mine.tell_apart(a, b) == pytest.approx((0.22, 0.239), abs=1e-3)


def test_08_register(mine, tmp_path):
    kept = dict(data.DATASETS), dict(data.TABLES)
    try:
        mine.register(data.DATASETS, data.TABLES)
        for split, ids in (("train", [0, 1, 2, 3]), ("val", [3, 9])):
            for kind, end, picture in (("photos", "jpg", np.zeros((1, len(ids), 3), np.uint8)), ("ids", "png", np.array([ids], np.uint8))):
                (tmp_path / "mine" / kind / split).mkdir(parents=True)
                Image.fromarray(picture).save(tmp_path / "mine" / kind / split / f"a.{end}")
        assert data.load_pair(data.list_items("mine", str(tmp_path), "train")[0])[1].tolist() == [[255, 0, 13, 11]]
        with pytest.raises(data.UserError):  # 9 means nothing, and that is said
            data.load_pair(data.list_items("mine", str(tmp_path), "val")[0])
    finally:
        for table, before in zip((data.DATASETS, data.TABLES), kept):
            table.clear(), table.update(before)


def test_09_two_hubs(mine):
    case = mine.two_hubs()
    tau, hub_s, (source, y_s), (target, y_t) = case["tau"], case["hub_s"], case["source"], case["target"]
    for rows in (hub_s, case["hub_t"], source, target):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    at = [(z - hub[y]).norm(dim=1).mean().item() for z, hub, y in ((source, hub_s, y_s), (target, case["hub_t"], y_t))]
    (hub, slope), shares = bound.hub_terms(hub_s, tau), [torch.bincount(y, minlength=len(hub_s)) / len(y) for y in (y_s, y_t)]
    risk_s, risk_t = (bound.score_loss(z, y, hub_s, tau).mean().item() for z, y in ((source, y_s), (target, y_t)))
    right = bound.hub_bound(risk_s, *at, slope.max().item(), bound.lipschitz_per_class(hub_s, tau).max().item(),
                            (hub.max() - hub.min()).item(), bound.total_variation(*shares))
    assert risk_t > right, f"left {risk_t:.2f}, right {right:.2f}: it still holds"


def test_10_loss(mine):
    g = torch.Generator().manual_seed(0)
    features, logits = torch.randn(2, 5, 6, 9, generator=g, requires_grad=True), 3 * torch.randn(2, 4, 24, 36, generator=g)
    label = torch.randint(0, 4, (2, 3, 4), generator=g).repeat_interleave(8, 1).repeat_interleave(9, 2)
    label[:, :, :5] = 255
    project, otp = torch.nn.Conv2d(5, 8, 1), workbench.unit_rows(4, 8)
    vtp = prototypes.visual_text_prototypes(otp, torch.randn(2, 8, 3, 3, generator=g), 0.07)
    for ramp in (0.0, 0.5, 1.0):
        out = ppar.Output(logits, F.normalize(project(features), dim=1), vtp)
        terms = ppar.objective(out, otp, label, lam=1 - ramp, ramp=ramp, tau=0.1, judge_text=0)
        got = mine.loss(logits, features, project, otp, vtp, label, ramp, 0.1)
        torch.testing.assert_close(got, terms["seg"] + terms["align"])
    got.backward()
    assert reweight.reliability(logits, label).min() < 0.2 and features.grad.abs().sum() > 0
