"""stubs.py: where the answers to exercises.md go. Copy this file to mine.py on the top level and write there.

`pytest tests/exercises -k 02` checks exercise 2. Every module of the top level can be imported.
"""


def on_paper():
    """1. The step on paper with pixel 2 labelled road -> dict(omega=[...], place=[...], weight=[...], seg=..., align=...)."""
    raise NotImplementedError("exercise 1")


def alignment_loss(emb, label, prototypes, tau, weight):
    """2. Eq. 3, a scalar: emb (B, D, h, w) of any length, label (B, h, w), prototypes (K, D) unit rows, weight (B, h, w)."""
    raise NotImplementedError("exercise 2")


def minimum(prototypes, y, tau):
    """3. The unit vector z (D,) at which the loss of Eq. 3 for class y is least, among prototypes (K, D)."""
    raise NotImplementedError("exercise 3")


def trainable():
    """4. {0: ..., 3: ..., 5: ...}: how many numbers of the miniature CLIP's image tower learn under --freeze 0, 3 and 5."""
    raise NotImplementedError("exercise 4")


def suspects(log_q, label):
    """5. Which labels are wrong: log_q (1, K, h, w), label (1, H, W) with 255 for void -> (1, H, W) bool."""
    raise NotImplementedError("exercise 5")


def share(count, balance):
    """6. count (K,), pixels of each class in a batch -> (K,), sum 1: the share of each class in L_seg under --balance."""
    raise NotImplementedError("exercise 6")


def schedule(ramp):
    """7. A schedule that SCHEDULES in align.py does not have: ramp in [0, 1] -> lambda in [0, 1], without a jump."""
    raise NotImplementedError("exercise 7")


def tell_apart(a, b):
    """7. Two lists of scores, the same seeds in the same order -> (mean difference, half width of its 95 % interval)."""
    raise NotImplementedError("exercise 7")


def register(datasets, tables):
    """8. Enter the data set "mine" of exercises.md into data.DATASETS and data.TABLES."""
    raise NotImplementedError("exercise 8")


def two_hubs():
    """9. -> dict(source=(z, y), target=(z, y), hub_s=..., hub_t=..., tau=...) that breaks Eq. 12: z (N, D), hubs (K, D), unit rows."""
    raise NotImplementedError("exercise 9")


def loss(logits, features, project, otp, vtp, label, ramp, tau):
    """10. Eq. 7 with w_align = 1 for a network of others, shapes as in "Lift this into your code", a place 2 cells and a pixel wide."""
    raise NotImplementedError("exercise 10")
