"""ppar.py: the method on one screen: network and prototypes in one module, the loss of a step in one function.

    logits, emb, vtp = PPAR(image)     dense CLIP and decoder, prototypes      model.py, prototypes.py (Eq. 1, 2)
    omega_i, w_i                       do the prototypes agree with label i?   reweight.py (Eq. 5, 6)
    L_seg, L_align                     decoder; pixels to prototypes           align.py (Eq. 3, 4)

    Eq. 7   L = L_seg(w) + w_align * L_align(w) + w_vtp * L(VTP; 1),     L_seg(w) = sum_i w_i CE(logits_i, y_i) / sum_i w_i

Every term is a mean over the labelled pixels of the whole batch, L_seg at label resolution, the others on the feature
grid. A batch that is spread over processes brings `reduce`, which sums a tensor over them.

Shapes
    image, label   (B, 3, H, W), (B, H, W) int64, 255 = void     logits   (B, K, H/4, W/4)
    emb            (B, D, h, w)  unit norm over D                otp, vtp (K, D), (B, K, D)  unit rows
    omega, weight  (B, H, W) or (B, h, w)                        grid     (B, h, w): the label at the centre of each cell

Not here: the loop (train.py), predictions (evaluate.py). Run `python ppar.py` for a demonstration in seconds.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import align
import prototypes
import reweight
from data import CLASSES, VOID
from model import SegmentationNet, load_clip, pad


class Output(NamedTuple):
    """What PPAR says about a batch of images. vtp is None where no loss needs it."""

    logits: torch.Tensor
    emb: torch.Tensor
    vtp: torch.Tensor | None


class PPAR(nn.Module):
    """The network and its prototypes: image -> Output. otp (K, D) is never trained."""

    def __init__(self, net, otp, vtp=None):
        super().__init__()
        self.net, self.vtp = net, vtp
        self.register_buffer("otp", otp)

    def forward(self, image):
        logits, emb, pooled = self.net(image)
        return Output(logits, emb, None if self.vtp is None else self.vtp(self.otp, emb, pooled))


def build(config):
    """PPAR at step 0, from the flags of train.py -> (PPAR, one line about CLIP). The same network for every method."""
    clip_model, report = load_clip(config.clip)
    torch.manual_seed(config.seed)  # fixes the decoder's initial weights; the VTP comes after it and cannot move them
    net = SegmentationNet(clip_model.visual, len(CLASSES), config.stride)
    net.encoder.freeze(config.freeze)
    otp = prototypes.original_text_prototypes(clip_model, CLASSES)  # Eq. 1
    if config.prototypes == "random":
        otp = prototypes.random_prototypes(*otp.shape, seed=config.seed)
    elif config.prototypes == "shuffled":
        otp = prototypes.shuffled_prototypes(otp, seed=config.seed)
    needs_vtp = config.w_vtp > 0 or config.align not in ("otp", "none")
    vtp = prototypes.VisualTextPrototypes(otp.shape[1], 2 * net.arch["width"]) if needs_vtp else None  # Eq. 2
    return PPAR(net, otp, vtp), report


def objective(out, otp, label, config, step, reduce=lambda x: x):
    """Eq. 3 to 7 for a batch -> ({term of Eq. 7, with its weight: scalar}, {"lam", "ramp"}); a term that is off is not computed.

    # our reading: the abstract does not name the loss that alignment and weights join; L_seg is the field's cross-entropy.
    """
    ramp = align.progress(step, config.steps, *config.ramp)  # 0 at first, 1 from some step on
    lam = align.SCHEDULES.get(config.align, align.SCHEDULES["otp"])(ramp)  # "none": the term is not computed
    grid = labels_on_grid(label, out.emb)  # (B, h, w)

    def mean(weight, loss):  # over the whole batch; 0 where nothing is labelled
        return (weight * loss).sum() / reduce(weight.sum(dtype=torch.float64)).clamp_min(1e-8).float()

    # Eq. 5, 6: one set of weights at label resolution, one on the feature grid, each with its own means
    weight = learning_weights(out, otp, label, config, ramp, reduce)  # (B, H, W)
    weight_grid = learning_weights(out, otp, grid, config, ramp, reduce)  # (B, h, w)

    logits = F.interpolate(out.logits.float(), size=label.shape[1:], mode="bilinear", align_corners=False)  # L_seg: (B, K, H, W)
    terms = {"seg": mean(weight, F.cross_entropy(logits, label, ignore_index=VOID, reduction="none"))}

    if config.align != "none":  # Eq. 3, 4: pixels to VTP and OTP
        loss = align.progressive_alignment_map(out.emb, grid, otp, out.vtp, lam, config.tau)  # (B, h, w)
        terms["align"] = config.w_align * mean(weight_grid, loss)
    if config.w_vtp > 0:  # L(VTP; 1) teaches the VTP what the image shows
        loss = align.alignment_map(out.emb, grid, out.vtp, config.tau)  # (B, h, w)
        terms["vtp"] = config.w_vtp * mean((grid != VOID).float(), loss)
    return terms, dict(lam=lam, ramp=ramp)


def learning_weights(out, otp, label, config, ramp, reduce=lambda x: x):
    """Eq. 5 and 6 as the flags ask: the weight of each pixel of label (at any resolution), 0 on void, no gradient."""
    weight = (label != VOID).float()
    if config.reweight != "none" and ramp > 0:  # what has learnt nothing has no opinion worth trusting
        weight = weights_of(reliability(out, otp, label, config.tau), label, config, ramp, reduce)
    if config.balance > 0:  # a control, not of the paper: n_c^-balance, n_c the pixels of the class in the batch
        count = reduce(torch.bincount(label.flatten(), minlength=VOID + 1)).clamp_min(1)
        weight = weight * count.float().pow(-config.balance)[label]
    return weight


def weights_of(omega, label, config, ramp, reduce=lambda x: x):
    """Eq. 6 in the form that --reweight names: class, batch or image."""
    if config.reweight == "image":
        omega = reweight.image_reliability(omega, label, reduce)
    return reweight.learning_weights(omega, label, ramp, per_class=config.reweight != "batch", reduce=reduce)


def reliability(out, otp, label, tau):
    """Eq. 5 at every pixel of label. # our reading: OTP and VTP are both asked, and the mean counts."""
    omega = reweight.reliability(out.emb, label, otp, tau)
    return omega if out.vtp is None else (omega + reweight.reliability(out.emb, label, out.vtp, tau)) / 2


def labels_on_grid(label, emb):
    """The label at the centre of each cell: (B, H, W) -> (B, h, w), for emb (B, D, h, w) and H, W multiples of h, w."""
    row, col = label.shape[1] // emb.shape[2], label.shape[2] // emb.shape[3]
    return label[:, row // 2::row, col // 2::col]


def distance(emb, label, prototypes):
    """|z - p_y|, from each pixel to the prototype of its class, (B, h, w), 0 on void; prototypes (K, D) or (B, K, D)."""
    image = torch.arange(len(emb), device=emb.device)[:, None, None]
    own = prototypes.expand(len(emb), -1, -1)[image, label.where(label != VOID, 0)]  # (B, h, w, D)
    return (emb.permute(0, 2, 3, 1) - own).norm(dim=-1) * (label != VOID)


@torch.no_grad()
def look(ppar, image, label):
    """image (3, H, W), label (H, W) -> Output, label (1, H', W'), grid: padded to CLIP's strides, the label by void."""
    image = pad(image[None], ppar.net.encoder.multiple)
    label = F.pad(label[None].long(), (0, image.shape[3] - label.shape[1], 0, image.shape[2] - label.shape[0]), value=VOID)
    out = ppar(image)
    return out, label, labels_on_grid(label, out.emb)


def _demo():
    """Two classes, four pixels, the last one labelled wrongly: each term of Eq. 7 at the start, half way and at the end."""
    otp = torch.eye(2, 4)
    emb = F.normalize(torch.tensor([[1.0, 0.2, 0, 0], [0.9, 0, 0.4, 0], [0.1, 1, 0, 0.3], [1, 0.1, 0.2, 0]]), dim=1)  # (4, D)
    out = Output(torch.zeros(1, 2, 1, 4), emb.T[None, :, None], F.normalize(otp + 0.3 * emb[[0, 2]], dim=1)[None])
    label = torch.tensor([[[0, 0, 1, 1]]])
    config = SimpleNamespace(steps=2, ramp=(0, 1), align="progressive", reweight="class", balance=0, w_align=1, w_vtp=0.2, tau=0.3)
    for step in (0, 1, 2):
        terms, at = objective(out, otp, label, config, step)
        weight = learning_weights(out, otp, label, config, at["ramp"]).flatten()
        print(f"lambda {at['lam']:.1f}", *(f"{name} {value:.3f}" for name, value in terms.items()), "weights", weight)
    assert weight[3] < weight[2] and abs(weight.sum() - 4) < 1e-5, "the wrong label loses, its class does not"


if __name__ == "__main__":
    _demo()
