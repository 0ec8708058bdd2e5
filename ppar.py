"""ppar.py: the method on one screen: network and prototypes in one module, the loss of a step in one function.

    logits, emb, vtp = PPAR(image)     dense CLIP and decoder, prototypes      model.py, prototypes.py (Eq. 1, 2)
    L_align                            pixels to a goal that moves             align.py (Eq. 3, 4)
    omega_i, w_i                       is label i to be trusted?               reweight.py (Eq. 5, 6)
    Eq. 7   L = L_seg(w) + w_align * L_align(w),     L_seg(w) = sum_i w_i CE(logits_i, y_i) / sum_i w_i
            means over the labelled pixels of the whole batch; `reduce` sums a tensor over the processes that share it

Shapes
    image, label   (B, 3, H, W), (B, H, W) int64, 255 = void     logits   (B, K, H/4, W/4)
    emb            (B, D, h, w)  unit norm over D (clip_emb: on a coarser grid)    otp, vtp (K, D), (B, K, D)  unit rows
    omega, weight  (B, H, W)                                     grid     (B, h, w): the label at the centre of each cell

Not here: the loop (train.py), the score (evaluate.py). `python ppar.py` prints
    lambda 1.0   seg 1.30   align 1.10   weight 1.00, if wrong 1.00
    lambda 0.0   seg 0.05   align 0.05   weight 1.00, if wrong 0.00
    Notice: the network is fixed, and the losses fall all the same: wrong labels, a third of this street, lose their say.
"""

import copy
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import align
import prototypes
import reweight
from data import CLASSES, VOID
from model import SegmentationNet, load_clip, pad


class Output(NamedTuple):
    """What PPAR says about a batch of images. clip_emb, by CLIP as it came, and vtp, made of it, are None if no loss needs them."""

    logits: torch.Tensor
    emb: torch.Tensor
    vtp: torch.Tensor | None = None
    clip_emb: torch.Tensor | None = None


class PPAR(torch.nn.Module):
    """Image -> Output: the network, its prototypes, and CLIP's image tower as it came. otp (K, D) and clip are never trained."""

    def __init__(self, net, otp, clip=None, tau=0.07):
        super().__init__()
        self.net, self.clip, self.tau = net, clip, tau
        self.register_buffer("otp", otp)

    def forward(self, image):
        # In channels_last memory the softmax of a loss would copy its input: classes have to lie apart. Copy once, here.
        logits, emb = (x.contiguous() for x in self.net(image))
        return Output(logits, emb, *(() if self.clip is None else self.as_clip_came(image)))

    @torch.no_grad()
    def as_clip_came(self, image):
        """Eq. 2. # our reading: CLIP looks at about half the size (each side to the nearest that it takes), for less work."""
        half = [self.clip.multiple * max(1, round(side / 2 / self.clip.multiple)) for side in image.shape[2:]]
        emb = self.clip(F.interpolate(image, size=half, mode="bilinear", align_corners=False, antialias=True))[1]
        return prototypes.visual_text_prototypes(self.otp, emb, self.tau), emb


def build(config):
    """PPAR at step 0, from the flags of train.py -> (PPAR, one line about CLIP). The same network for every method."""
    clip_model, report = load_clip(config.clip)
    torch.manual_seed(config.seed)  # fixes the decoder's initial weights
    net = SegmentationNet(clip_model.visual, len(CLASSES), config.stride)
    otp = prototypes.original_text_prototypes(clip_model, CLASSES)  # Eq. 1
    if config.prototypes == "shuffled":
        otp = prototypes.shuffled_prototypes(otp, seed=config.seed)
    original = copy.deepcopy(net.encoder).requires_grad_(False) if config.reweight or config.align not in ("otp", "none") else None
    net.encoder.freeze(config.freeze)
    return PPAR(net, otp, original, config.tau), report


def objective(out, otp, label, config, step, reduce=lambda x: x):
    """Eq. 3 to 7 for a batch -> ({term of Eq. 7, with its weight: scalar}, {"lam", "ramp"}); a term that is off is not computed.

    # our reading: the abstract does not name the loss that alignment and weights join; L_seg is the field's cross-entropy.
    """
    ramp = align.progress(step, config.steps, *config.ramp)  # 0 at first, 1 from some step on

    def mean(weight, loss):  # over the whole batch; 0 where nothing is labelled
        return (weight * loss).sum() / reduce(weight.sum(dtype=torch.float64)).clamp_min(1e-8).float()

    weight = balanced = learning_weights(out, otp, label, config, ramp) if config.reweight and ramp else (label != VOID).float()  # Eq. 6
    if config.balance > 0:  # not of the paper: n_c^-balance, n_c the weight of the class in the batch, summed by columns first
        count = weight.new_zeros(VOID + 1, label.shape[2]).double().scatter_add_(0, label.flatten(0, 1), weight.flatten(0, 1).double())
        balanced = weight * reduce(count.sum(dim=1)).clamp_min(1).float().pow(-config.balance)[label]

    logits = F.interpolate(out.logits.float(), size=label.shape[1:], mode="bilinear", align_corners=False)  # L_seg: (B, K, H, W)
    terms = {"seg": mean(balanced, F.cross_entropy(logits, label, ignore_index=VOID, reduction="none"))}

    lam = align.SCHEDULES[config.align](ramp)
    if lam is not None:  # Eq. 3, 4: pixels to the goal
        grid, weight = (align.labels_on_grid(x, out.emb) for x in (label, weight))  # (B, h, w)
        loss = align.alignment_map(out.emb, grid, align.goal(otp, out.vtp, lam), config.tau)
        terms["align"] = config.w_align * mean(weight, loss)
    return terms, dict(lam=lam, ramp=ramp)


def reliability(out, otp, label, config):
    """Eq. 5, omega (B, H, W). # our reading: the judges are the decoder and CLIP as it came (without a copy of it, the trained
    tower): an embedding that is pulled to its label's prototype, right or wrong, is no witness for that label."""
    emb = out.emb if out.clip_emb is None else out.clip_emb
    return reweight.reliability(prediction(out._replace(emb=emb), otp, config), label)


def learning_weights(out, otp, label, config, ramp):
    """Eq. 5 and 6: the weight of each pixel of label (B, H, W), at any resolution, 0 on void, no gradient."""
    omega = reliability(out, otp, label, config)
    cell = label.shape[1] // out.emb.shape[2]  # our reading: a place is what lies within a cell of the pixel
    return reweight.learning_weights(omega, reweight.place_reliability(omega, label, 2 * cell + 1), label, ramp)


@torch.no_grad()
def prediction(out, otp, config):
    """log q = (1 - gamma) logits + gamma <z, p^O> / tau + constant, (B, K, H/4, W/4): decoder and text vote.

    # our reading: the abstract does not say how to predict. gamma is --text-weight: 0 asks the decoder alone, 1 the text
    alone, which on an untrained network is CLIP's zero-shot segmentation.
    """
    logits = out.logits.detach().float()
    if config.text_weight:
        text = align.cosine_similarity_map(out.emb, otp) / config.tau
        text = F.interpolate(text, size=logits.shape[2:], mode="bilinear", align_corners=False)
        logits = (1 - config.text_weight) * logits + config.text_weight * text
    return logits


@torch.no_grad()
def look(ppar, image, label):
    """image (3, H, W), label (H, W) -> Output, label (1, H', W'), grid: padded to CLIP's strides, the label by void."""
    (h, w), image = label.shape, pad(image[None].to(ppar.otp.device), ppar.net.encoder.multiple)
    label = torch.as_tensor(label, device=image.device)[None].long()
    label = F.pad(label, (0, image.shape[3] - w, 0, image.shape[2] - h), value=VOID)
    out = ppar(image)
    return out, label, align.labels_on_grid(label, out.emb)


def _demo():
    otp, truth, label = torch.eye(2, 4), torch.zeros(1, 12, 48, dtype=torch.long), torch.zeros(1, 12, 48, dtype=torch.long)
    truth[:, :, 16:32] = label[:, :, 16:] = 1
    emb = F.normalize(otp[truth[:, 1::4, 1::4]] + torch.tensor([0, 0, 0.3, 0.1]), dim=3).permute(0, 3, 1, 2)  # (1, 4, 3, 12)
    logits = 4 * F.one_hot(truth[:, ::4, ::4], 2).permute(0, 3, 1, 2).float()
    out = Output(logits, emb, prototypes.visual_text_prototypes(otp, emb, 0.3))
    config = SimpleNamespace(steps=2, ramp=(0, 1), align="progressive", reweight=True, balance=0, w_align=1, tau=0.3, text_weight=0.5)
    for step in (0, 2):
        terms, at = objective(out, otp, label, config, step)
        right, wrong = (part.mean() for part in learning_weights(out, otp, label, config, at["ramp"])[0].split(32, dim=1))
        print("lambda {lam:.1f}   seg {seg:.2f}   align {align:.2f}".format(**at, **terms), f"  weight {right:.2f}, if wrong {wrong:.2f}")
    print("Notice: the network is fixed, and the losses fall all the same: wrong labels, a third of this street, lose their say.")
    assert right > 0.95 and wrong < 0.2


if __name__ == "__main__":
    _demo()
