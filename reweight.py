"""reweight.py: trust a source pixel by how far its label agrees with the prototypes.

Not every source pixel teaches something that holds elsewhere. Some are labelled wrongly, some show what occurs in the
source alone, and fitting them hard is negative transfer. The prototypes are a second opinion that did not come from
the source labels: where pixel, label and language agree, the pixel is worth learning from; where they do not, it
gets a smaller learning weight.

    Eq. 5   omega_i = softmax_c(<z_i, p_c> / tau)[y_i]                                   reliability, in [0, 1]
    Eq. 6   u_i = max(1 + ramp * (omega_i / mean(omega) - 1), w_min),   w_i = u_i / mean(u)

z_i is emb at pixel i divided by its length, y_i its label, p the OTP or the VTP (ppar.py takes the mean of both omegas).

Both means of Eq. 6 are over the labelled pixels of the same class. A rare class is always hard, so its omega is
always small: with one mean for the whole batch its pixels get small weights, are learnt less, get smaller weights
still, and the class starves. Per class, weights move learning between the pixels of one class, and the share of the
class in the loss stays what it was (theory.md, Eq. 21).

Shapes
    emb         (B, D, h, w)          dense embedding; only its direction matters
    label       (B, H, W) int64       0 .. K-1, 255 = void; on the feature grid (H = h, W = w), or finer
    prototypes  (K, D) or (B, K, D)   unit rows
    omega       (B, H, W)             in [0, 1], 0 on void
    weight      (B, H, W)             w, mean 1 over the labelled pixels (of each class), 0 on void, no gradient

Not here: what is weighted with it (ppar.py, Eq. 7), and how well omega finds wrong labels (figures.py, AUROC).
This file needs torch alone. Run `python reweight.py` for a demonstration in seconds.
"""

import torch
import torch.nn.functional as F

VOID = 255  # the train id of pixels without a class: in no loss and in no mean


@torch.no_grad()
def reliability(emb, label, prototypes, tau):
    """Eq. 5: the probability that the prototypes give to the label of each pixel, (B, H, W) in [0, 1], 0 on void.

    # our reading: the abstract says that reliability is estimated, and not how.
    label may be finer than the feature grid by whole factors or not: each pixel asks the grid cell that it lies in
    about its own label. So a thin pole is judged as a pole although the centre of its cell may be labelled building,
    and no (B, K, H, W) tensor is ever made: one gather, whatever the number of classes.
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, not {tau}: it divides the cosine")
    with torch.autocast(emb.device.type, enabled=False):
        emb, prototypes = emb.float(), F.normalize(prototypes.float(), dim=-1).expand(len(emb), -1, -1)  # (B, K, D)
        length = torch.linalg.vector_norm(emb, dim=1).clamp_min(1e-8)  # (B, h, w)
        prob = (prototypes @ emb.flatten(2) / length.flatten(1)[:, None] / tau).softmax(dim=1)  # (B, K, hw)
    h, w = emb.shape[2:]
    height, width = label.shape[1:]
    row = (torch.arange(height, device=label.device) * h) // height  # the cell that each pixel row lies in
    col = (torch.arange(width, device=label.device) * w) // width
    cell = row[:, None] * w + col[None, :]  # (H, W)
    valid = label != VOID
    index = label.where(valid, torch.zeros_like(label)) * (h * w) + cell  # class-major index into (K * h * w)
    return prob.flatten(1).gather(1, index.flatten(1)).view(label.shape) * valid


@torch.no_grad()
def image_reliability(omega, label, reduce=None):
    """The image-level form of Eq. 5: every pixel gets the mean reliability of its image; (B, H, W) -> (B, H, W).

    # our reading: the abstract says "source data", which may mean images or pixels; pixels are the default.
    Each pixel is first divided by its class's mean, or an image of easy classes would count as a reliable image.
    """
    valid = label != VOID
    relative = omega / _class_mean(omega, label, reduce).clamp_min(1e-12)
    mean = (relative * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
    return mean[:, None, None] * valid


@torch.no_grad()
def learning_weights(omega, label, ramp, w_min=0.1, per_class=True, reduce=None):
    """Eq. 6: learning weights (B, H, W), mean 1 over the labelled pixels of each class, 0 on void, no gradient.

    # our reading: proportional to omega, with a floor, and means within each class.
    omega       (B, H, W) reliabilities >= 0
    ramp      in [0, 1]: 0 leaves every weight at 1 (a network that has learnt nothing has no opinion worth trusting)
    w_min     in [0, 1): the least weight before the last division; above 0, no pixel is ever ignored for good
    per_class means within each class (True), or one over all labelled pixels (False: the starving told above)
    reduce    sums a tensor over all processes of a distributed run; None for a single one
    """
    if not 0 <= ramp <= 1 or not 0 <= w_min < 1:
        raise ValueError(f"ramp must lie in [0, 1] and w_min in [0, 1), not {ramp} and {w_min}")
    valid = label != VOID
    group = label if per_class else label.where(~valid, torch.zeros_like(label))
    weight = 1 + ramp * (omega / _class_mean(omega, group, reduce).clamp_min(1e-12) - 1)
    weight = weight.clamp_min(w_min)
    mean = _class_mean(weight, group, reduce)
    # A class whose pixels all got weight 0 (all omega 0, ramp 1, w_min 0) has no order to go by: back to weight 1.
    weight = torch.where(mean > 0, weight / mean.clamp_min(1e-12), torch.ones_like(weight))
    return weight * valid


def _class_mean(value, group, reduce):
    """Mean of value (B, H, W) over the pixels with the same group id (0 .. 255), given back at every pixel.

    One scatter instead of a loop over classes; in float64, so that the sum does not depend on how the batch was
    divided between processes beyond the last bits of the result.
    """
    index = group.flatten()
    total = torch.zeros(256, 2, dtype=torch.float64, device=value.device)
    total[:, 0].index_add_(0, index, value.flatten().double())
    total[:, 1].index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
    if reduce is not None:
        total = reduce(total)
    mean = total[:, 0] / total[:, 1].clamp_min(1)
    return mean.to(value.dtype)[index].view(value.shape)


def _demo():
    """Two classes, one of them rare and hard, a tenth of the labels wrong: what each kind of mean does."""
    torch.manual_seed(0)
    prototypes = torch.eye(2)
    truth = (torch.rand(4, 32, 32) < 0.05).long()  # class 1 is rare
    spread = torch.where(truth == 1, 0.9, 0.3)  # ... and hard
    emb = prototypes[truth].permute(0, 3, 1, 2) + spread[:, None] * torch.randn(4, 2, 32, 32)
    wrong = torch.rand(truth.shape) < 0.1
    label = truth.where(~wrong, 1 - truth)
    omega = reliability(emb, label, prototypes, tau=0.3)
    print(f"mean reliability: right labels {omega[~wrong].mean():.2f}, wrong labels {omega[wrong].mean():.2f}")
    share = {}
    for per_class in (True, False):
        weight = learning_weights(omega, label, ramp=1.0, w_min=0.1, per_class=per_class)
        share[per_class] = (weight[label == 1].sum() / weight.sum()).item()
        print(f"mean 1 per {'class' if per_class else 'batch'}: weight of wrong labels {weight[wrong].mean():.2f}, "
              f"share of the rare class in the loss {share[per_class]:.3f}")
    before = (label == 1).float().mean().item()
    print(f"share of the rare class among the labels {before:.3f}")
    assert omega[~wrong].mean() > omega[wrong].mean() and abs(share[True] - before) < 1e-4 and share[False] < before


if __name__ == "__main__":
    _demo()
