"""align.py: pull every pixel towards its class prototype, the goal meant to be easier first.

Cross-entropy on a classifier's logits only asks that the right class wins on the source. It does not care where
in CLIP's space the pixels end up, so they drift to wherever the source's accidents put them. Alignment fixes the
place: the prototypes p_1 .. p_K are points that came from language, and each pixel embedding has to be closer to
the point of its own class than to any other. If the pixels of an unseen domain end near the same points, they land
on the same side of the same boundaries; nothing in training forces that (theory.md, Eq. 12: the prototypes are a hub between domains).

Two goals. The Original Text Prototype (OTP) is the same for every image and may be far from
the pixels of this one; the Visual Text Prototype (VTP) is the OTP after a look at this image, meant to be the easier goal. Asking
for the far goal at once may mean large, conflicting gradients in the first steps; so the goal moves, from easy to difficult.
Whether the order matters is a question for the table of results (`results/toy.md`), not for this sentence.

    Eq. 3   L(Q; w) = sum_i w_i CE(<z_i, Q> / tau, y_i) / sum_i w_i             over the labelled pixels i
    Eq. 4   L_align = (1 - lambda) L(VTP) + lambda L(OTP),   lambda(step / steps) from 0 to 1 without a jump

z_i is emb at pixel i divided by its length, Q are the prototypes, <z_i, Q> its K cosines, y_i its label, w_i its weight.

Shapes
    emb         (B, D, h, w)          dense embedding of each pixel; its length does not matter, its direction does
    label       (B, h, w) int64       0 .. K-1, 255 = void; on the grid of emb: resize a finer one to the nearest, never mix ids
    prototypes  (K, D) or (B, K, D)   unit rows; one set for all images (OTP), or one per image (VTP)
    weight      (B, h, w)             learning weights from reweight.py, no gradient
    cosine_similarity_map returns (B, K, h, w), cosines in [-1, 1]

Not here: how prototypes are made (prototypes.py), where weights come from (reweight.py).
This file needs torch alone. Run `python align.py` for a demonstration in seconds.
"""

import math

import torch
import torch.nn.functional as F

VOID = 255  # the train id of pixels without a class: in no loss and in no mean


def cosine_similarity_map(emb, prototypes):
    """Cosine between every pixel and every prototype: (B, D, h, w), (K, D) or (B, K, D) -> (B, K, h, w) float32.

    The dot product is divided by the pixel's length afterwards: the same number as normalising the embedding
    first, without a second copy of the largest tensor of the step. In float32 even under autocast: half precision
    ends at 65504, so a sum of squares overflows, and in it the 1e-8 below is 0; a NaN here is a NaN in every parameter.
    """
    with torch.autocast(emb.device.type, enabled=False):
        emb, prototypes = emb.float(), prototypes.float()
        length = torch.linalg.vector_norm(emb, dim=1, keepdim=True)  # (B, 1, h, w)
        prototypes = F.normalize(prototypes, dim=-1).expand(len(emb), -1, -1)  # (B, K, D): a batched product copies no map
        dot = prototypes @ emb.flatten(2)  # (B, K, hw)
        return dot.unflatten(2, emb.shape[2:]) / length.clamp_min(1e-8)


def alignment_loss(emb, label, prototypes, tau, weight=None):
    """Eq. 3: weighted cross-entropy of the cosine over the prototypes, averaged over labelled pixels; a scalar >= 0.

    tau > 0 divides the cosine: at tau = 1 the K cosines lie in [-1, 1] and the softmax can never become certain;
    CLIP's own training ended at 0.01. weight None means 1 everywhere. If no pixel is labelled, or all weights are
    zero, the loss is exactly 0 and so is its gradient: a mean over nothing would be 0 / 0, and one all-void
    crop would poison the run.
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, not {tau}: it divides the cosine")
    logits = cosine_similarity_map(emb, prototypes) / tau
    loss = F.cross_entropy(logits, label, ignore_index=VOID, reduction="none")  # (B, h, w), 0 on void
    weight = (label != VOID).to(loss.dtype) * (1.0 if weight is None else weight.detach())
    return (weight * loss).sum() / weight.sum().clamp_min(1e-8)


def progress(step, steps, start, end):
    """Eq. 4: how far the goal has moved from VTP to OTP, a float in [0, 1].

    0 until the fraction `start` of the run, 1 from the fraction `end` on, half a cosine between: no jump in the
    loss, and none in its slope, for the optimiser's momentum to trip over. It depends on step / steps alone, so a
    resumed run sees the schedule of the uninterrupted one.
    """
    if not 0 <= start < end:
        raise ValueError(f"progress needs 0 <= start < end, not start {start}, end {end}")
    x = (step / steps - start) / (end - start)
    return 0.5 * (1 - math.cos(math.pi * min(max(x, 0.0), 1.0)))


def progressive_alignment_loss(emb, label, otp, vtp, lam, tau, weight=None):
    """Eq. 4: (1 - lam) L(VTP) + lam L(OTP), lam in [0, 1]. A goal whose factor is 0 is not computed (and may be None)."""
    loss = emb.new_zeros((), dtype=torch.float32)
    if lam < 1:
        loss = loss + (1 - lam) * alignment_loss(emb, label, vtp, tau, weight)
    if lam > 0:
        loss = loss + lam * alignment_loss(emb, label, otp, tau, weight)
    return loss


# The schedules as functions of the ramp r = progress(...). Each returns lambda, the share of the far goal;
# "none" has no entry, because the term is then not computed at all.
SCHEDULES = {
    "progressive": lambda r: r,  # easy to difficult: what the abstract proposes
    "reversed": lambda r: 1 - r,  # difficult to easy: the control that tells order from mixture
    "otp": lambda r: 1.0,  # the far goal from the first step
    "vtp": lambda r: 0.0,  # the near goal to the last step
    "both": lambda r: 0.5,  # both at once: a mixture without an order
}


def _demo():
    """A cloud of pixels walks to a far prototype by way of a near one; prints the distance to both."""
    torch.manual_seed(0)
    otp = F.normalize(torch.randn(3, 8), dim=1)
    label = torch.randint(0, 3, (1, 6, 6))
    emb = F.normalize(torch.randn(1, 8, 6, 6), dim=1).requires_grad_()
    optimizer = torch.optim.SGD([emb], lr=2.0)
    first = None
    for step in range(101):
        with torch.no_grad():  # a stand-in for prototypes.py: half way between the text and the class mean of this image
            means = torch.stack([emb[0, :, (label[0] == c)].mean(1) for c in range(3)])
            vtp = F.normalize(otp + F.normalize(means, dim=1), dim=1)[None]
        lam = progress(step, 100, 0.2, 0.8)
        loss = progressive_alignment_loss(emb, label, otp, vtp, lam, tau=0.1)
        far, near = alignment_loss(emb, label, otp, 0.1).item(), alignment_loss(emb, label, vtp, 0.1).item()
        first = first or (near, far)
        if step % 25 == 0:
            print(f"step {step:3d}   lambda {lam:.2f}   loss to VTP {near:.3f}   loss to OTP {far:.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first[0] < first[1], "the near goal must start nearer"
    assert far < 0.1 * first[1], "the walk must end at the far goal"


if __name__ == "__main__":
    _demo()
