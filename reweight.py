"""reweight.py: a source pixel loses its weight where its own label and most labels around it are doubted.

Not every source pixel teaches what holds elsewhere. Some are labelled wrongly, some show what the source alone has, and
fitting them hard is negative transfer. A second opinion tells who they are: the decoder's, and that of CLIP as it came.

A label that is doubted is not yet wrong. Thin poles, borders and rare classes are doubted, too, and teach most. But they
are doubted pixel by pixel, amid surroundings that are believed; wrong labels come in regions: polygons, objects, frames.
So a pixel loses its weight where its place is doubted with it.

    Eq. 5   omega_i = q_i[y_i] / max_c q_i[c]                          reliability, in [0, 1]: 1 where the label is foremost
            Omega_i = mean of omega over the labelled pixels around i  reliability of the place
    Eq. 6   w_i = 1 - ramp * [omega_i < 0.2 and Omega_i < 0.5]         learning weight, in [0, 1]

Shapes
    logits         (B, K, h, w)       log q, up to a constant for each pixel; on the grid of the label, or on a coarser one
    label          (B, H, W) int64    y: 0 .. K-1, 255 = void
    omega, weight  (B, H, W)          in [0, 1], 0 on void, no gradient

Not here: what is weighted (ppar.py), how well wrong labels are found (figures.py). Needs torch alone. `python reweight.py` prints
    on paper:  omega 1.00 0.33 0.11  place 0.67 0.48 0.22  weight 1.00 1.00 0.50   L_seg 1.104
    clean pixels  omega 1.00   place 0.93   weight 1.00
    the pole      omega 0.01   place 0.78   weight 1.00
    wrong region  omega 0.02   place 0.25   weight 0.11
    Notice: pole and wrong region are doubted alike, pixel by pixel; their places tell them apart.
"""

import torch
import torch.nn.functional as F

VOID = 255  # the train id of pixels without a class: in no loss and in no mean


@torch.no_grad()
def reliability(logits, label):
    """Eq. 5: the label's probability over the largest one, q[y] / max q, (B, H, W) in [0, 1], 0 on void.

    # our reading: the abstract says that reliability is estimated, and not how. Beside q[y] itself, the ratio does not
    punish a pixel that is merely hard: where several classes are likely, the label's omega is high as long as it is
    one of them. It is small only where another class is named *instead*.
    Each pixel of the label asks the pixel of logits that it lies in: no (B, K, H, W) tensor is ever made.
    """
    ratio = (logits.float() - logits.float().amax(dim=1, keepdim=True)).exp()  # (B, K, h, w)
    (h, w), (height, width) = logits.shape[2:], label.shape[1:]
    row = torch.arange(height, device=label.device) * h // height  # the cell that each pixel row lies in
    col = torch.arange(width, device=label.device) * w // width
    valid = label != VOID
    index = (label.where(valid, torch.zeros_like(label)) * h + row[:, None]) * w + col  # class-major, into (K * h * w)
    return ratio.flatten(1).gather(1, index.flatten(1)).view(label.shape) * valid


@torch.no_grad()
def place_reliability(omega, label, side):
    """Omega of Eq. 5: the mean omega of the labelled pixels in a window of `side` (odd) pixels around each, (B, H, W).

    # our reading: a pixel doubted alone is hard, one in a doubted region is labelled wrongly.
    """
    valid = (label != VOID).double()
    both = torch.stack([omega * valid, valid], dim=1)  # (B, 2, H, W)
    before, after = side // 2 + 1, side // 2
    total = F.pad(both, (before, after, before, after)).cumsum(dim=2).cumsum(dim=3)  # a window's sum is four of its entries
    window = total[..., side:, side:] - total[..., :-side, side:] - total[..., side:, :-side] + total[..., :-side, :-side]
    return (window[:, 0] / window[:, 1].clamp_min(1) * valid).to(omega.dtype)


@torch.no_grad()
def learning_weights(omega, place, label, ramp, least_pixel=0.2, least_place=0.5):
    """Eq. 6: learning weights (B, H, W) in [0, 1], 0 on void, no gradient.

    # our reading: a step, where "corrects its learning weight" would allow any function. Weights in proportion to omega
    take from all hard pixels alike; what is wanted is 1 on all clean pixels and 0 on the harmful ones.
    omega, place   (B, H, W), Eq. 5
    ramp           in [0, 1]: 0 leaves every weight at 1 (a network that has learnt nothing has no opinion worth trusting)
    """
    if not 0 <= ramp <= 1:
        raise ValueError(f"ramp must lie in [0, 1], not {ramp}")
    doubtful = (omega < least_pixel) & (place < least_place)
    return (1 - ramp * doubtful.to(omega.dtype)) * (label != VOID)


def _demo():
    """The step on paper of exercises.md; then a street with a thin pole and a wrongly labelled region: who loses weight?"""
    q, label = torch.tensor([[0.8, 0.2], [0.75, 0.25], [0.9, 0.1]]), torch.tensor([[[0, 1, 1]]])
    omega = reliability(q.log().T.view(1, 2, 1, 3), label)
    place = place_reliability(omega, label, side=3)
    weight = learning_weights(omega, place, label, ramp=0.5)
    seg = (weight * F.nll_loss(q.log(), label.flatten(), reduction="none")).sum() / weight.sum()
    print("on paper:", *(f" {name} " + " ".join(f"{x:.2f}" for x in value.flatten())
                         for name, value in dict(omega=omega, place=place, weight=weight).items()), f"  L_seg {seg:.3f}")

    torch.manual_seed(0)
    truth = torch.zeros(1, 32, 64, dtype=torch.long)
    truth[:, :, 10:12] = 1  # a pole
    label = truth.clone()
    label[:, 8:24, 36:56] = 1  # a region under a wrong label
    wrong = label != truth
    logits = 5 * F.one_hot(truth, 2).permute(0, 3, 1, 2) + torch.randn(1, 2, 32, 64)
    logits[:, :, :, 10:12] = logits[:, :, :, 10:12].flip(1)  # the network does not see the pole yet
    omega = reliability(logits, label)
    place = place_reliability(omega, label, side=9)
    weight = learning_weights(omega, place, label, ramp=1.0)
    for name, where in (("clean pixels", (truth == 0) & ~wrong), ("the pole", truth == 1), ("wrong region", wrong)):
        print(f"{name:12s}  omega {omega[where].mean():.2f}   place {place[where].mean():.2f}   weight {weight[where].mean():.2f}")
    print("Notice: pole and wrong region are doubted alike, pixel by pixel; their places tell them apart.")
    assert weight[wrong].mean() < 0.2 and weight[truth == 1].mean() > 0.9


if __name__ == "__main__":
    _demo()
