"""toy_clip.py: makes toy_clip.pt, a CLIP in miniature that has seen more styles than the drawn source (toy.py).

It is a small clip.model.CLIP, trained with CLIP's symmetric contrastive loss on crops and captions ("a dark photo of a
bus."), never on label maps: of a crop it knows what its caption says, the class of the thing at its middle.

    crops       32 x 32 pixels, 48 from each of 8 scenes: at the scene's scale, enlarged, or cut to an object
    styles      random (_web), of a wider range than the domains': colours, texture, light, lens, camera, layout. With
                --styles source it sees the source's look alone: the control that tells what the wide styles are worth
    never seen  any domain's palette or look, haze, snow, lit windows, lamp glow, wet mirrors, light below 0.55 of noon

Shapes
    images   (384, 32, 32, 3) uint8    tokens   (texts, 24) captions, each once    which   (384,) image -> its caption

Not here: the world (toy.py), loading (model.load_clip("toy")), the prompts of the method (prototypes.py).
With --train it makes the file again (minutes), with --check it prints the figures to quote. With --mark it adds what
model.load_clip asks of towers that are not OpenAI's, to a file of an earlier version. `python toy_clip.py` prints
    ...
      all domains     native 0.54  zoom 0.57  cut 0.7...  of 1584 crops
    Notice: it names things in looks that it has never seen, ten times as often as chance would.
"""

import argparse
import functools
import io
import os
import sys
import zipfile

from data import CLASSES, CLIP_MEAN, CLIP_STD, UserError  # first: it refuses a Python that is too old

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import Normalize

import model
import toy
from model import clip  # says what to do where it is not CLIP's package
from prototypes import TEMPLATES, original_text_prototypes

# Pixels of its input: one cell of stride 32, so that its pooling attends to that cell alone, and reading a pixel
# (model.py: the value path at one position) is what it was trained to do.
SIZE = 32
REACH = 96  # the largest piece of a scene that is scaled down to it
SCENES, PER_SCENE, SHARES = 8, 48, (.5, .2, .3)  # of a batch; shares of the MODES
MODES = ("native", "zoom", "cut")  # a window at the scene's scale; a smaller one, enlarged; one cut to an object
RARE = (toy.TRUCK, toy.BUS, toy.RIDER, toy.MOTORCYCLE, toy.BICYCLE, toy.WALL, toy.FENCE, toy.LIGHT, toy.SIGN)
FORMS = ("a {m} of a {c}.", "a {m} of a {c}.", "a {m} of the {c}.", "a {c} in a street scene.", "a {c} in the street.",
         "a {c} on the road at day.", "{c}")
NORMALISE = Normalize(CLIP_MEAN, CLIP_STD)  # data.to_tensor rounds in another order than this file was trained in
NATURAL = toy.colours(  # what such things often look like, anywhere
    "6e6e70 505054 96928c/96928c 786e6e/aa8c6e 8c5a50 969696/8c8278/6e645a/5a5a5c/32322e/be3c3c 3c5ab4/466e32 5a6e3c "
    "6e6432/788246 8c785a/96bee6 c8ced6/5a505a/645a50/78787c 3c3c42 c8c8c8/b4b4b0/be783c/3c3c40/5a5a5a")


def _web(rng):
    """(layout, look) of a picture of the open web: three classes in four in fairly natural colours, others in any."""
    def once(low, high):
        return (rng.uniform(low, high),) * 2

    palette = {}
    for c in range(20):
        some = np.array(NATURAL[c])[rng.integers(len(NATURAL[c]), size=12)]
        free = rng.uniform(15, 245, 3) + rng.normal(0, rng.uniform(0, 60), (12, 3))
        palette[c] = (some + rng.normal(0, 22, (12, 3)) if rng.random() < .75 else free).clip(8, 250).tolist()
    look = dict(
        palette=palette, jitter=rng.uniform(2, 30), light=once(.55, 1.3), contrast=once(.55, 1.5), sun=once(0, .3),
        tint=tuple(rng.uniform(.82, 1.18, 3)), gray=once(0, 1) if rng.random() < .2 else (0, 0), shadow=once(0, .7),
        mark=tuple(rng.uniform(150, 255, 3)), glass=tuple(rng.uniform(10, 200, 3)), dark=tuple(rng.uniform(8, 70, 3)),
        lamp=tuple(rng.uniform(120, 255, 3)), joint=once(-45, 45), brick=once(-45, 45), window=once(.5, 1),
        cloud=once(0, 14), leaf=once(8, 42), grass=once(5, 30), noise=once(0, 6),
        blur=once(.2, 1.1) if rng.random() < .6 else (0, 0), vignette=once(0, .6) if rng.random() < .3 else (0, 0),
        texture={c: (rng.integers(8), rng.uniform(0, 8)) for c in toy.CLASSES})
    return dict(toy.STREET, focal=(85, 150), height=(1.1, 2.4), horizon=(.32, .54), sway=.14, road=(2.8, 8.5),
                sidewalk=.8, verge=.6, building=2.4, wall=1.2, fence=1.2, tree=1.8, open=.8, storeys=(1, 6),
                truck=.9, bus=.9, rider=2.2, light=2.2, sign=2.2, hood=.2), look


def _crops(rng, scene, image, count, share=SHARES):
    """Crops of one scene -> images (count, SIZE, SIZE, 3), class of each crop's subject; share: of the three MODES.

    Classes are drawn evenly (rare and small ones more often), then a pixel of the class. Whoever photographs a thing
    frames it: of eight places on it, a cut takes the one that shows most of it.
    """
    cls, obj, pad = scene.column(0), scene.column(2), REACH // 2
    ground = np.pad(cls, pad, constant_values=toy.VOID)
    canvas = ImageOps.expand(Image.fromarray(image), pad, tuple(round(255 * mean) for mean in CLIP_MEAN))  # later 0
    present = np.flatnonzero(np.bincount(cls.ravel(), minlength=256)[:19] >= 8)
    weight = np.isin(present, RARE) + 1
    subjects = rng.choice(present, count, p=weight / weight.sum())
    where = {c: np.argwhere(cls == c) for c in set(subjects)}
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for k, c in enumerate(subjects):
        pixel = where[c][rng.integers(len(where[c]))]
        places, mode = [pixel], MODES[rng.choice(3, p=share)]
        side = SIZE / rng.uniform(1, 2) if mode == "zoom" else SIZE
        if mode == "cut":
            body = np.argwhere((cls == c) & (obj == obj[tuple(pixel)]))
            side = np.prod(np.ptp(body, 0) + 1) ** .5
            side = len(body) ** .5 if side > REACH / 2 else side  # long or torn, as a pavement is: no box frames it
            side = np.clip(side * rng.uniform(1, 1.6), 14, REACH)
            places += [(body.min(0) + body.max(0)) / 2, *body[rng.integers(len(body), size=6)]]
        shake = rng.uniform(-.1, .1, 2) * side
        corners = [np.clip(place + .5 + pad - side / 2 + shake, 0, np.array(ground.shape) - side) for place in places]
        shown = [(ground[int(y):int(y + side), int(x):int(x + side)] == c).sum() for y, x in corners]
        top, left = corners[np.argmax(shown)]  # the first of equals
        images[k] = canvas.resize((SIZE, SIZE), Image.BILINEAR, box=(left, top, left + side, top + side))
        if rng.random() < .5:
            images[k] = images[k, :, ::-1]
    return images, subjects


def _caption(rng, look, subject):
    """What a person may write under a crop: its subject, at times the style; in the plain form, just the subject."""
    if rng.random() < .4:
        return f"a photo of a {CLASSES[subject]}."
    styles = [word for word, true in (("dark ", look["light"][0] < .75), ("bright ", look["light"][0] > 1.15),
                                      ("blurry ", look["blur"][0] > .6), ("gray ", look["gray"][0] > .6)) if true]
    style = rng.choice(styles) if styles and rng.random() < .6 else ""
    medium = style + rng.choice(("photo", "photo", "picture", "drawing"))
    return FORMS[rng.integers(len(FORMS))].format(m=medium, c=CLASSES[subject])


def web_batch(n, seed, styles):
    """Batch n of crops and captions: a pure function of (seed, n), so for any number of worker processes the same."""
    rng = np.random.default_rng([99, seed, n])
    images, captions = [], []
    for _ in range(SCENES):
        layout, look = _web(rng) if styles == "web" else (toy.STREET, toy.PLAIN | toy.DOMAINS["toy-gta5"]["look"])
        scene = toy.Scene(rng, layout)
        crops, subjects = _crops(rng, scene, toy.paint(rng, scene, look), PER_SCENE)
        images.append(crops)
        captions += [_caption(rng, look, c) for c in subjects]
    texts, which = np.unique(captions, return_inverse=True)  # equal captions have equal embeddings
    return torch.from_numpy(np.concatenate(images)), clip.tokenize(texts, context_length=24), torch.from_numpy(which)


def train_clip(out, steps, seed, styles):
    """CLIP's symmetric contrastive loss, over the batch's captions for an image and over its images for a caption."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # another number rounds differently
    # Of CLIP's 49,408 tokens the captions use a few dozen: train a table of those. In ascending order, because CLIP
    # finds the end of a text as its highest token.
    mediums = "dark bright blurry gray photo picture drawing"
    used = clip.tokenize([form.format(m=mediums, c=c) for form in FORMS for c in CLASSES]).unique()
    net = _miniature(len(used))
    for layer in (net.visual.layer1, net.visual.layer2, net.visual.layer3, net.visual.layer4):
        torch.nn.init.ones_(layer[0].bn3.weight)  # CLIP opens its residual branches from zero: safe if deep, but slow
    groups = [dict(params=[p for p in net.parameters() if p.ndim > 1], weight_decay=.05),
              dict(params=[p for p in net.parameters() if p.ndim < 2], weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, betas=(.9, .98))
    loader = torch.utils.data.DataLoader(range(steps), batch_size=None, num_workers=1, prefetch_factor=8,
                                         collate_fn=functools.partial(web_batch, seed=seed, styles=styles))
    target = torch.arange(SCENES * PER_SCENE)
    for n, (images, tokens, which) in enumerate(loader):
        for group in optimizer.param_groups:  # warm-up, then a cosine
            group["lr"] = 2e-3 * min(1, (n + 1) / 100) * (.502 + .498 * np.cos(np.pi * n / steps))
        tokens = torch.searchsorted(used, tokens)[:, :(tokens > 0).sum(1).max()]
        with torch.autocast("cpu", torch.bfloat16):  # half the time of float32
            image = net.encode_image(NORMALISE(images.permute(0, 3, 1, 2) / 255))
            text = net.encode_text(tokens)
        # Crops with the same caption are each other's negatives, as in CLIP; so the loss has a floor well above 0.
        logits = (F.normalize(image.float()) @ F.normalize(text.float()).T * net.logit_scale.exp())[:, which]
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.logit_scale.data.clamp_(0, np.log(100))  # as CLIP did
        if n % 100 == 99 or n + 1 == steps:
            print(f"step {n + 1:5d} of {steps}  loss {loss:.3f}  scale {net.logit_scale.exp():4.1f}", flush=True)
    _save(net, used, out)


def _miniature(vocabulary):
    """The small CLIP with fresh weights: joint space 64 wide, a ResNet 16 wide, a text tower 64 wide with two blocks."""
    return clip.model.CLIP(64, SIZE, (1, 1, 1, 1), 16, None, 77, vocabulary, 64, 1, 2)


def _save(net, used, out):
    """A state dict in half precision, as OpenAI's, with the mark that model.load_clip asks of other towers."""
    state = {k: v.detach().clone() for k, v in net.state_dict().items()}
    table = torch.zeros(49408, 64)  # of CLIP's tokens; zero: never trained
    state["token_embedding.weight"] = table.index_copy(0, used, state["token_embedding.weight"])
    # Pixels are read as c_proj(v_proj(f)), without a position code (model.py). The grid of training has one cell: move
    # its code into the biases. The same function, as q, k and v are linear: now reading a pixel is reading that cell.
    code = state["visual.attnpool.positional_embedding"]
    middle = code[len(code) // 2].clone()  # row 0 belongs to the mean
    for name in ("q", "k", "v"):
        state[f"visual.attnpool.{name}_proj.bias"] += state[f"visual.attnpool.{name}_proj.weight"] @ middle
    code -= middle
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    _write(half | model.mark(), out)


def _write(state, path):
    """What torch.save writes, compressed (the table of tokens is nearly all zeros: 9 MB become 3), whole or not at all."""
    plain, temporary = io.BytesIO(), f"{path}.{os.getpid()}.tmp"
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as parts, zipfile.ZipFile(temporary, "w") as small:
        for part in parts.infolist():  # each with its own date, which is the same at every time of writing
            small.writestr(part, parts.read(part), zipfile.ZIP_DEFLATED, 9)
    os.replace(temporary, path)


def mark_clip(path):
    """Add the mark to a file that an earlier version of this script made, in place; no weight changes.

    UserError if its tensors are not those of this script's CLIP: what another tower computes, a mark must not claim.
    """
    try:
        state = torch.load(path, weights_only=True)
        state.pop(model.MARK, None)
        _miniature(49408).load_state_dict(state)  # strict: names and shapes
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} was not made by toy_clip.py ({type(error).__name__}: {reason}): it gets no mark.") from None
    _write(state | model.mark(), path)
    print(f"{path}: {len(state)} tensors as they were, and the mark: {model.COMPUTED}")


@torch.no_grad()
def check_clip(path=model.TOY_CLIP, scenes=15):
    """Zero-shot top-1: crops of held-out scenes in the domains' looks, named by the nearest text of a drawn class."""
    net, recipes = model.load_clip(path)[0], list(toy.DOMAINS.values())
    text = original_text_prototypes(net, [CLASSES[c] for c in toy.CLASSES], TEMPLATES[:5])
    counts = np.zeros((len(recipes), 3, 2, 19))  # domains, modes, right or total, classes
    for d, mode, index in np.ndindex(len(recipes), 3, scenes):
        rng = np.random.default_rng([recipes[d]["number"], toy.SPLITS["val"], index, 77])
        scene = toy.Scene(rng, {**toy.STREET, **recipes[d]["layout"]})
        crops, subject = _crops(rng, scene, toy.paint(rng, scene, recipes[d]["look"]), 24, np.eye(3)[mode])
        image = net.encode_image(NORMALISE(torch.from_numpy(crops).permute(0, 3, 1, 2) / 255))
        guess = np.array(toy.CLASSES)[(image @ text.T).argmax(1)]
        counts[d, mode] += [np.bincount(some, minlength=19) for some in (subject[guess == subject], subject)]
    print(f"top-1 over {len(toy.CLASSES)} classes (chance {1 / len(toy.CLASSES):.2f}); native: at the scene's scale, "
          "zoom: enlarged, cut: cut to the object")
    rows = dict(zip(toy.DOMAINS, counts.sum(3))) | {CLASSES[c]: counts[..., c].sum(0) for c in toy.CLASSES}
    for name, row in (rows | {"all domains": counts.sum((0, 3))}).items():
        top1 = "  ".join(f"{mode} {right / total:.2f}" for mode, (right, total) in zip(MODES, row))
        print(f"  {name:15s} {top1}  of {row[:, 1].sum():.0f} crops")
    print("Notice: it names things in looks that it has never seen, ten times as often as chance would.")


def main():
    """Train the miniature CLIP or check it, as the flags ask; without flags, a check on a few crops."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", action="store_true", help="make the miniature CLIP again (minutes)")
    parser.add_argument("--check", action="store_true", help="zero-shot top-1 per domain and class")
    parser.add_argument("--mark", action="store_true", help="add to --out the mark that an earlier version did not write")
    parser.add_argument("--out", default=model.TOY_CLIP, help="file that --train writes, --check reads and --mark completes")
    parser.add_argument("--styles", choices=("web", "source"), default="web", help="what it sees in training")
    parser.add_argument("--steps", type=int, default=7000, help="of --train")
    parser.add_argument("--seed", type=int, default=0, help="of --train")
    args = parser.parse_args()
    try:
        if args.train:
            train_clip(args.out, args.steps, args.seed, args.styles)
        if args.mark:
            mark_clip(args.out)
        if args.check or not (args.train or args.mark):
            check_clip(args.out, scenes=15 if args.check else 2)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
