"""workbench.py: what several tests share: train.main in this process, one batch, one step, a small network, comparisons."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
from kill_and_resume import read_log
from make_clip import make_clip

import data
import evaluate
import machine
import model
import ppar
import train

CPU = torch.device("cpu")
TERMS = ("loss", "seg", "align")


def unit_rows(number, dim, seed=0):
    """Random directions (number, dim), in the place of prototypes."""
    return torch.nn.functional.normalize(torch.randn(number, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def main(*flags, scored=False, every=1):
    """train.main in this process, every step logged (or as told) -> None, or the sentence that it ended with."""
    score = evaluate.evaluate_targets if scored else lambda *args, **kwargs: dict(targets={}, mean=None)
    flags = [*flags] if scored else [*flags, "--no-figures"]
    with mock.patch.object(evaluate, "evaluate_targets", score), mock.patch.object(train, "LOG_EVERY", every):
        try:
            train.main(train.parse([str(flag) for flag in flags]))
        except SystemExit as end:
            assert end.code not in (0, None)
            return str(end.code)


def trained(out, *flags):
    """Run folder of a run with these flags."""
    assert (sentence := main(*flags, "--out", out)) is None, sentence
    return out


def largest_difference(a, b):
    """Between the losses of two logs at the steps of the first (the real command logs fewer); relative where a loss is above 1."""
    rows, others = read_log(a), {row["step"]: row for row in read_log(b)}
    assert rows and rows[-1]["step"] == max(others)
    pairs = [(row, others[row["step"]]) for row in rows]
    assert all(row.keys() == other.keys() for row, other in pairs)
    return max(abs(row[term] - other[term]) / max(1, other[term]) for row, other in pairs for term in TERMS if term in row)


def configured(world, *flags):
    return train.configure(train.parse([*world["flags"], *map(str, flags)]))


def one_batch(config, world, step=0):
    stream = data.TrainingStream([data.list_items("gta5", str(world["root"]), "train")], config.crop, config.seed)
    pairs = [stream[step * config.batch + i] for i in range(config.batch)]
    image, label = (torch.stack(part) for part in zip(*pairs))
    return data.normalise(image), label.long()


def backward(module, image, label, config, step, autocast=contextlib.nullcontext):
    """Forward, loss and backward as the loop of train.py has them -> (terms, outputs of the batch)."""
    def objective(out):
        return ppar.objective(out, module.otp, label, **numbers(config, step))

    if config.micro_batch:
        return machine.backward_in_parts(module, image, config.micro_batch, objective, autocast)
    with autocast():
        out = module(image)
    terms = objective(out)
    sum(terms.values()).backward()
    return terms, out


def numbers(config, step):
    """The arguments of ppar.objective by name, as the loop of train.py has them."""
    return dict(train.schedule(config, step), tau=config.tau, judge_text=config.judge_text, balance=config.balance,
                w_align=config.w_align)


def one_step(config, image, label, step, module=None):
    """(row, gradients, module) of one backward on fresh weights."""
    module = module or train.build(config)[0].train()
    module.zero_grad(set_to_none=True)
    terms, _ = backward(module, image, label, config, step)
    row = {name: term.item() for name, term in terms.items()}
    return dict(row, loss=sum(row.values())), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, module


def assert_close(grads, others, tolerance=1e-5):
    assert grads.keys() == others.keys()
    for name in grads:
        scale = others[name].abs().max().clamp_min(1e-3)
        assert (grads[name] - others[name]).abs().max() <= tolerance * scale, name


def is_one_sentence(text):
    return text and "Traceback" not in text and text.startswith("error: ") and len(text) < 1500


def small_net(kind="resnet", seed=0):
    """A network of joint width 24, with random weights."""
    torch.manual_seed(seed)
    layers = (1, 1, 1, 1) if kind == "resnet" else 2
    return model.SegmentationNet(make_clip(kind, dim=24, layers=layers, vocabulary=100, context=8).visual, width=32).eval()


def scorer(net, otp, beta=0.0):
    """evaluate.make_scorer at tau 0.07."""
    return evaluate.make_scorer(ppar.PPAR(net, otp), SimpleNamespace(tau=0.07, text_weight=beta, amp="fp32"))
