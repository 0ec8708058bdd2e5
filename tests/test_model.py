"""model.py: the dense encoder is CLIP, loads every tensor of it or says why not, and trains what it should."""

import contextlib
import copy
import functools
import hashlib
import json
import math
import pathlib
import pickle
import urllib.error
from unittest import mock

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from make_clip import MARK, make_clip, write_archive, write_state_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import model
import ppar
import prototypes
from data import CLASSES, UserError
from model import DenseCLIP, SegmentationNet, load_clip

torch.set_num_threads(1)
WRITERS = {"archive": write_archive, "state dict": write_state_dict}
DIM = 48
small_clip = functools.partial(make_clip, dim=DIM, vocabulary=100, context=16)  # its text tower is of no importance
whole_clip = functools.partial(make_clip, dim=DIM)  # one that load_clip takes: it can read the prompts


def small_net(kind, stride=16):
    torch.manual_seed(0)
    return SegmentationNet(small_clip(kind).visual, num_classes=7, stride=stride, width=32)


def images(batch=2, height=64, width=64):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def close(got, expected):
    """Equal but for rounding, on the scale of the whole tensor."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_clip_loads_from_a_path_in_both_formats_with_every_tensor(kind, form, tmp_path):
    original = whole_clip(kind)
    if form == "state dict":  # float32 keeps its precision
        nn.init.normal_(original.text_projection, std=1e5)  # beyond half precision, too
    path = WRITERS[form](original, tmp_path / "clip.pt")
    loaded, report = load_clip(path)
    torch.testing.assert_close(loaded.state_dict(), original.state_dict(), rtol=0, atol=0)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    assert not any(m.training for m in loaded.modules())
    tokens = torch.tensor([[1, 5, 9, 99] + [0] * 73, [99] + [0] * 76])
    for cosines, expected in zip(loaded(images(), tokens), original(images(), tokens)):
        close(cosines, expected)
    assert f"{path}: {kind}, joint width {DIM}, {len(original.state_dict())} tensors" in report and "\n" not in report
    original.register_buffer("left_over", torch.zeros(3))
    with pytest.raises(UserError, match="left_over"):  # archives are held to the same strictness as state dicts
        load_clip(WRITERS[form](original, path))


class Trap:
    """What a hostile checkpoint does to a careless reader: unpickling it calls something, here what no except stops."""

    def __reduce__(self):
        return pytest.fail, ("code of the file was executed",)


GAPS = ("visual.layer3.1.bn2.running_var", "visual.attnpool.v_proj.bias", "logit_scale", "text_projection")
WRONG = [*[("resnet", name, None, name) for name in GAPS], ("resnet", "visual.layer3.9.conv1.weight", torch.zeros(3), ""),
         *[("vit", name, torch.zeros(3), name) for name in ("visual.head.weight", "visual.ln_post.bias")]]
FOREIGN = [b"404: Not Found\n", b"", {}, torch.zeros(3), {"x": {"y": torch.zeros(2)}}, {"x": Trap()}, pickle.dumps(Trap())]


@pytest.mark.parametrize("content", [*WRONG, *FOREIGN, *WRITERS])
def test_a_file_that_is_not_exactly_a_clip_is_refused_with_its_name_and_the_reason_and_executes_nothing(content, tmp_path):
    path, reason = tmp_path / "bad.pt", ""
    if isinstance(content, tuple):  # a tensor is missing, left over or of another shape
        kind, name, value, reason = content
        state = {**whole_clip(kind).state_dict(), **MARK, name: value}
        content = {key: tensor for key, tensor in state.items() if tensor is not None}
    if isinstance(content, str):  # half a file
        WRITERS[content](whole_clip("vit"), path)
        content = path.read_bytes()[:path.stat().st_size * 6 // 10]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=f"{path}.*{reason}") as refusal:  # no line break before the reason
        load_clip(str(path))
    assert not any(text in str(refusal.value) for text in ("\n", "\033", "weights_only")), "torch advises to be careless"
    with pytest.raises(pytest.fail.Exception):
        pickle.loads(pickle.dumps(Trap()))  # the trap itself works


# Typed from OpenAI's releases. Image: joint width, pixels, blocks, width, patch. Text: context, vocabulary, width, heads, blocks.
OPENAI = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 77, 49408, 640, 10, 12),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 77, 49408, 768, 12, 12),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 77, 49408, 1024, 16, 12),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
}
OTHERS = {  # of open_clip; in the first, a head is 80 wide, and in the second 88
    "ViT-H-14": (1024, 224, 32, 1280, 14, 77, 49408, 1024, 16, 24),
    "ViT-g-14": (1024, 224, 40, 1408, 14, 77, 49408, 1024, 16, 24),
    "ViT-B-16-plus": (640, 240, 12, 896, 16, 77, 49408, 640, 10, 12),
    "ViT-S-16": (384, 224, 12, 384, 16, 77, 49408, 384, 6, 12),
    "one block less": (512, 224, 11, 768, 16, 77, 49408, 512, 8, 12),
    "another text tower": (512, 224, 12, 768, 16, 77, 49408, 768, 12, 12),
    "a deeper text tower": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 13),
    "a short context": (512, 224, 12, 768, 16, 32, 49408, 512, 8, 12),
    "more tokens": (512, 224, 12, 768, 16, 77, 64000, 512, 8, 12),
    "another ResNet": (1024, 224, (3, 4, 6, 3), 96, None, 77, 49408, 512, 8, 12),
}


@pytest.mark.parametrize("name", [*OPENAI, *OTHERS])
def test_openais_own_towers_load_and_those_of_others_are_refused_because_a_file_does_not_tell_how_to_compute_them(name):
    with torch.device("meta"):  # shapes without numbers: the largest of them would fill the memory
        state = model.clip.model.CLIP(*(OPENAI | OTHERS)[name]).state_dict()
    assert model._check_towers("FILE", state, MARK["computed_as"]) == "QuickGELU and heads of width 64, as the file says"
    if name in OPENAI:
        said = model._check_towers("FILE", state, None)
        assert f"towers of {name.partition('@')[0]}: QuickGELU and heads of width 64 are assumed" in said
        assert set(model.OPENAI) == {n.partition("@")[0] for n in model.clip.available_models()}
    else:
        words = "FILE has not the towers.*heads and the activation.*give one of RN50, RN101"
        with pytest.raises(UserError, match=words) as refusal:
            model._check_towers("FILE", state, None)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", WRITERS)
def test_other_towers_load_if_their_file_says_how_they_are_computed_and_openais_without_a_mark(form, tmp_path, monkeypatch):
    path = WRITERS[form](whole_clip("vit"), tmp_path / "clip.pt")
    assert load_clip(path)[1].endswith("0 left over; QuickGELU and heads of width 64, as the file says")
    WRITERS[form](whole_clip("vit"), path, marked=False)
    sizes = "ViT of patch 16, width 128, 4 blocks; text: width 64, 1 blocks"
    with pytest.raises(UserError, match=f"{path} has not the towers.*{sizes}"):
        load_clip(path)
    monkeypatch.setitem(model.OPENAI, "ViT-Tiny", ((128, 4, 16), (64, 1)))  # as if OpenAI had made it
    assert "0 left over; towers of ViT-Tiny: QuickGELU and heads of width 64 are assumed" in load_clip(path)[1]
    monkeypatch.setattr(model, "COMPUTED", "clip.model.CLIP: GELU")
    with pytest.raises(UserError, match="is to be computed as `clip.model.CLIP: QuickGELU.*only `clip.model.CLIP: GELU`"):
        load_clip(WRITERS[form](whole_clip("vit"), path))


@pytest.mark.parametrize("sizes, words", [(dict(context=10), "10 tokens out of 49408.*up to 11 out of 49408"),
                                          (dict(vocabulary=49407), "77 tokens out of 49407.*up to 11 out of 49408"), ({}, ""),
                                          (dict(context=11), "")])
def test_a_text_tower_that_cannot_read_the_prompts_is_refused(sizes, words, tmp_path):
    path = write_state_dict(whole_clip("vit", **sizes), tmp_path / "clip.pt")
    if words:
        with pytest.raises(UserError, match=f"CLIP {path}: its text tower reads {words}"):
            load_clip(path)
    else:
        prototypes.original_text_prototypes(load_clip(path)[0], CLASSES)  # the longest prompt fits


@pytest.mark.parametrize("form", WRITERS)
def test_a_flipped_bit_in_a_weight_is_caught_by_the_check_sums_of_the_file(form, tmp_path, monkeypatch):
    path = WRITERS[form](whole_clip("vit"), tmp_path / "clip.pt")
    content, weight = bytearray(pathlib.Path(path).read_bytes()), load_clip(path)[0].visual.conv1.weight
    numbers = (weight.half() if form == "archive" else weight).numpy().tobytes()
    content[content.index(numbers) + 1000] ^= 2
    pathlib.Path(path).write_bytes(content)
    with pytest.raises(UserError, match=f"CLIP {path} is damaged or not whole.*check sum of .*differs.*fetch it again"):
        load_clip(path)
    monkeypatch.setattr(model, "check_sums", lambda path: None)  # torch itself does not notice
    assert (load_clip(path)[0].visual.conv1.weight != weight).sum() == 1


@pytest.mark.parametrize("form, value", [("archive", math.nan), ("state dict", math.inf), ("state dict", -math.inf)])
def test_weights_that_are_not_finite_are_refused_with_the_name_of_their_tensor(form, value, tmp_path):
    broken = whole_clip("resnet")
    with torch.no_grad():
        broken.visual.layer2[0].conv1.weight[3, 2] = value
    path = WRITERS[form](broken, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=rf"CLIP {path}: visual\.layer2\.0\.conv1\.weight holds weights that are inf or nan"):
        load_clip(path)


def renamed(old, new):
    def rename(state):
        return {new + name.removeprefix(old) if name.startswith(old) else name: x for name, x in state.items()}
    return rename


# What people pass as a CLIP -> (how it comes from a state dict in OpenAI's format, words of the refusal)
PASSED = {
    "training": (lambda state: dict(epoch=3, state_dict=state), "checkpoint of a training run"),
    "of several processes": (lambda state: dict(state_dict=renamed("", "module.")(state)), "checkpoint of a training run"),
    "wrapped": (renamed("", "module."), "checkpoint of a training run"),
    "model": (lambda state: dict(model=state, step=1), "checkpoint of a training run"),
    "transformers": (renamed("visual.", "vision_model."), "format of Hugging Face's transformers .*--clip ViT-B/16"),
    "open_clip, text": (renamed("transformer.", "text.transformer."), "another text tower than OpenAI's .*--clip ViT-B/16"),
    "open_clip, image": (renamed("visual.", "visual.trunk."), "image tower of timm .*--clip ViT-B/16"),
    "run": (lambda state: dict(model=state, arch={}, otp=torch.zeros(1), optimizer={}),
            "checkpoint of train.py: --clip takes"),
    "list": (lambda state: [*state.values()], "holds no state dict.*TorchScript archive or a plain state dict"),
}


@pytest.mark.parametrize("kind", PASSED)
def test_weights_in_another_format_are_refused_with_what_makes_them_readable(kind, tmp_path, monkeypatch):
    original, path, (change, words) = whole_clip("vit"), str(tmp_path / "it's.bin"), PASSED[kind]
    torch.save(change({**original.state_dict(), **MARK}), path)
    refusal = follow_remedy(path, words, tmp_path, monkeypatch)
    if "training run" in refusal:
        assert torch.equal(load_clip("new.pt")[0].visual.proj, original.visual.proj)


def follow_remedy(path, words, folder, monkeypatch):
    """Refused in one sentence with these words; if it holds a line of Python, run that line in `folder` -> the sentence."""
    with pytest.raises(UserError, match=f"CLIP {path} .*{words}") as refusal:
        load_clip(path)
    text = str(refusal.value)
    assert "\n" not in text and len(text) < 700
    if "in Python: " in text:
        monkeypatch.chdir(folder)
        exec(text.split("in Python: ")[1].split(", and give --clip new.pt")[0], dict(torch=torch))
    return text


def test_a_pickle_without_check_sums_is_refused_and_the_remedy_writes_one_that_has_them(tmp_path, monkeypatch):
    original, path = whole_clip("vit"), str(tmp_path / "old.pt")
    torch.save({**original.state_dict(), **MARK}, path, _use_new_zipfile_serialization=False)
    follow_remedy(path, "without check sums.*Nothing in it was executed", tmp_path, monkeypatch)
    assert torch.equal(load_clip("new.pt")[0].visual.proj, original.visual.proj)


@pytest.mark.parametrize("content, words", [
    (b"", "is empty: fetch it again"),
    (b"<!DOCTYPE html><html>", "is no archive of weights, it begins with b'<!DOCTYPE html><"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
    ((9).to_bytes(8, "little") + b'{"a": {}}', "is a safetensors file.*load_file.*--clip new.pt"),
    (b"PK\3\4 and no more", "is damaged or not whole"),
    (functools.partial(make_clip, "vit"), "Python objects.*nothing in it was executed.*state_dict")])
def test_a_file_that_holds_no_weights_is_named_for_what_it_is(content, words, tmp_path):
    path = tmp_path / "clip.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content(), path)
    with pytest.raises(UserError, match=f"CLIP {path} {words}|CLIP {path} .*{words}"):
        load_clip(str(path))


def test_toy_is_the_file_beside_the_module_and_an_unknown_name_or_a_folder_is_refused_with_the_right_names():
    (toy, report), (file, _) = load_clip("toy"), load_clip(str(pathlib.Path(model.__file__).with_name("toy_clip.pt")))
    torch.testing.assert_close(toy.state_dict(), file.state_dict(), rtol=0, atol=0)
    assert "CLIP toy" in report
    for name in ("RN49", "no/such/file.pt", "", str(pathlib.Path(__file__).parent)):
        with pytest.raises(UserError, match="neither a file nor one of toy, RN50, RN101.*ViT-B/16"):
            load_clip(name)


@pytest.mark.parametrize("error", [urllib.error.URLError("Name or service not known"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("name, remedy", [
    (model.TOY_CLIP, "Is it readable?"),
    ("RN50", f"Fetch {model.clip.clip._MODELS['RN50']} elsewhere and put it into ~/.cache/clip, or pass its path with --clip.")])
def test_a_failed_download_or_read_is_one_sentence_with_its_reason_and_the_remedy(name, remedy, error, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # a cached RN50 of the developer's must not be found
    for function in ("urllib.request.urlopen", "torch.load"):
        monkeypatch.setattr(function, mock.Mock(side_effect=error))
    with pytest.raises(UserError) as refusal:
        load_clip(name)
    message, reason = str(refusal.value), str(getattr(error, "reason", error))
    assert name in message and message.endswith(f"{reason}). {remedy}") and "\n" not in message


def test_a_name_is_fetched_once_and_its_hash_checked(monkeypatch, tmp_path):
    original = small_clip("vit")
    archive = pathlib.Path(write_archive(original, tmp_path / "source.pt", marked=False))
    published = tmp_path / hashlib.sha256(archive.read_bytes()).hexdigest() / "RN50.pt"
    published.parent.mkdir()
    archive.rename(published)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(model.clip.clip._MODELS, "RN50", published.as_uri())  # a hub that needs no network
    for _ in range(2):
        loaded, report = load_clip("RN50")
        assert torch.equal(loaded.visual.proj, original.visual.proj) and "CLIP RN50" in report
        published.unlink(missing_ok=True)  # the second time it comes from the cache
    (tmp_path / ".cache/clip/RN50.pt").unlink()
    published.write_bytes(b"something else")
    with pytest.raises(UserError, match="RN50.*SHA256"):
        load_clip("RN50")


def clamped(x, rows, cols):
    """x at the given rows and columns of its last two axes, each outside index moved onto the border."""
    return x[..., rows.clamp(0, x.shape[-2] - 1), :][..., cols.clamp(0, x.shape[-1] - 1)]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_beyond_the_border_stands_the_borders_own_cell_when_padding_and_when_pooling_without_stride(n):
    x, row, col = images(2, 5, 7), torch.arange(5), torch.arange(7)
    close(model._PoolWithoutStride(n)(x), sum(clamped(x, row + a, col + b) for a in (0, n) for b in (0, n)) / 4)
    rows, cols = torch.arange(-(-5 // n) * n), torch.arange(-(-7 // n) * n)
    assert torch.equal(model.pad(x, n), clamped(x, rows, cols))


def watch(*modules):
    """A dict of what each of these modules gave when it was last called."""
    seen = {}
    for module in modules:
        module.register_forward_hook(lambda module, _, output: seen.update({module: output}))
    return seen


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (128, 32)])
def test_a_dilated_resnet_holds_clips_own_cells_and_z_is_clips_pool_of_single_cells_averaged_around_the_place(stride, size):
    """Of a single cell, and without position code, CLIP's pool returns the value path. CLIP gets a code for this grid."""
    visual, step, grid = small_clip("resnet").visual, 32 // stride, (size[0] // 32, size[1] // 32)
    visual.attnpool.positional_embedding = nn.Parameter(model._resize_position(visual.attnpool.positional_embedding, *grid))
    encoder = DenseCLIP(copy.deepcopy(visual), stride)
    torch.testing.assert_close(encoder.visual.state_dict(), visual.state_dict(), rtol=0, atol=0)
    seen, pool = watch(encoder.visual.layer4, visual.layer1, visual.layer4), encoder.visual.attnpool
    with torch.no_grad():
        low, z = encoder(images(2, *size))
        vector = visual(images(2, *size))  # encode_image
        last, expected = seen[encoder.visual.layer4], seen[visual.layer4]
        close(pool(last[..., ::step, ::step]), vector)
        pool.positional_embedding.zero_()
        cells = pool(last.movedim(1, -1).flatten(0, 2)[..., None, None].expand(-1, -1, *grid))
        cells = cells.unflatten(0, (2, *last.shape[2:])).movedim(-1, 1)  # (B, D, h, w)
    close(low, seen[visual.layer1])
    close(last[..., ::step, ::step], expected)
    for varied in (expected.std(dim=(2, 3)).mean() / expected.std(), (vector[0] - vector[1]).abs().max() / vector.abs().max()):
        assert varied > 0.05  # no comparison of constants: positions differ, and images
    back = {32: [0], 16: [1, 0], 8: [2, 1]}[stride]  # how many cells before its own index a place lies
    row, col = torch.arange(size[0] // stride), torch.arange(size[1] // stride)
    close(z, torch.stack([clamped(cells, row - a, col - b) for a in back for b in back]).mean(0))


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_a_cell_of_z_looks_at_the_middle_of_the_pixels_that_it_stands_for(stride):
    """With all weights equal, what a cell sees is symmetric: the mean place of its gradient is where it looks."""
    encoder = DenseCLIP(small_clip("resnet").visual, stride)
    for name, tensor in encoder.visual.state_dict().items():
        flat = 0 if name.endswith(("bias", "running_mean")) else 1
        tensor.fill_(1 / tensor[0].numel() if tensor.ndim == 4 else flat)
    image = images(1, 1024, 32).abs().requires_grad_()
    z = encoder(image)[1]
    row = z.shape[2] // 2
    z[0, :, row].sum().backward()
    seen = image.grad.abs().sum((0, 1, 3)).double()  # (1024,)
    assert seen[:32].sum() == seen[-32:].sum() == 0  # no border in sight
    where = (seen * torch.arange(1024)).sum() / seen.sum()
    # CLIP's first convolution has stride 2 and looks half a pixel to the left of its own middle.
    assert abs(where - ((row + 0.5) * stride - 0.5)) <= 0.75


def test_the_position_code_is_clips_on_the_native_grid_and_keeps_its_places_on_others():
    code = torch.randn(17, 3, generator=torch.Generator().manual_seed(0))  # the class token's, and 4 x 4 places
    assert torch.equal(model._resize_position(code, 4, 4), code)
    finer = model._resize_position(code, 12, 20)  # an old cell is the middle of three by five new ones
    assert torch.equal(finer[0], code[0])
    close(finer[1:].view(12, 20, 3)[1::3, 2::5], code[1:].view(4, 4, 3))
    close(model._resize_position(code[:2], 1, 3), code[[0, 1, 1, 1]])  # CLIP's map may be a single cell


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_every_patch_token_of_a_vit_takes_the_path_of_the_class_token(size):
    visual = small_clip("vit").visual
    encoder = DenseCLIP(copy.deepcopy(visual), 16)
    h, w = size[0] // 16, size[1] // 16
    visual.positional_embedding = nn.Parameter(model._resize_position(visual.positional_embedding, h, w))
    ours, blocks = encoder.visual.transformer.resblocks, visual.transformer.resblocks
    seen = watch(ours[3], blocks[3])  # of 4, each (1 + hw, B, C)
    with torch.no_grad():
        _, z = encoder(images(2, *size))
        dense = visual.ln_post(seen[ours[3]]) @ visual.proj
        close(dense[0], visual(images(2, *size)))  # encode_image
    close(seen[ours[3]], seen[blocks[3]])
    close(z, dense[1:].permute(1, 2, 0).unflatten(2, (h, w)))


@pytest.mark.parametrize("patch, step", [(16, 4), (14, 7), (32, 8)])
def test_the_early_map_of_a_vit_is_its_first_layer_around_the_middle_of_every_finer_cell(patch, step):
    encoder, image = DenseCLIP(model.VisionTransformer(4 * patch, patch, 64, 1, 1, 24), 16), images(2, 2 * patch, 3 * patch)
    with torch.no_grad():
        low, weight = encoder(image)[0], encoder.visual.conv1.weight
        assert low.shape == (2, 64, 2 * patch // step, 3 * patch // step)
        for i, j in ((0, 0), (3, 4), (low.shape[2] - 1, low.shape[3] - 1)):
            top, left = (k * step + step // 2 - patch // 2 + (patch == 14) for k in (i, j))  # 14: of an odd margin, less is before
            window = clamped(image, torch.arange(top, top + patch), torch.arange(left, left + patch))
            close(low[:, :, i, j], torch.einsum("bcyx,dcyx->bd", window, weight))


@pytest.mark.parametrize("kind, multiple", [("resnet", 32), ("vit", 16)])
def test_what_a_tower_cannot_do_is_refused_with_what_it_can(kind, multiple):
    net = small_net(kind)
    tries = [(f"{h} x {w} .*multiples of {multiple} ", net, images(1, h, w)) for h, w in ((64, 72), (20, 64))]
    tries += [(f"--freeze {stages}.*0 to 5", net.encoder.freeze, stages) for stages in (-1, 6)]
    tries += [("--stride 4.*32, 16 or 8", lambda stride: small_net(kind, stride), 4)] if kind == "resnet" else []
    for words, function, argument in tries:
        with pytest.raises(UserError, match=words):
            function(argument)


@pytest.mark.parametrize("kind, stride", [("resnet", 32), ("resnet", 16), ("resnet", 8), ("vit", 16)])
def test_logits_at_a_quarter_and_unit_embeddings_of_each_image_for_itself_in_train_mode_as_in_eval_mode(kind, stride):
    net, image = small_net(kind, stride), images(2, 64, 96)
    with torch.no_grad():
        logits, emb = out = net.train()(image)
        low, z = net.encoder(image)
        branches = net.high(emb * DIM ** 0.5), net.low(low)  # entries of order one, whatever z's length
        maps = [F.interpolate(branch, (16, 24), mode="bilinear") for branch in branches]
        torch.testing.assert_close(logits, net.classify(net.fuse(torch.cat(maps, 1))))
        alone, evaluated = net(image[1:]), net.eval()(image)
    assert logits.shape == (2, 7, 16, 24) and emb.shape == (2, DIM, 64 // stride, 96 // stride)
    torch.testing.assert_close(emb, z / z.square().sum(1, keepdim=True).sqrt())
    for a, b, c in zip(out, alone, evaluated):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("dim, width, groups", [(16, 8, (2, 1, 2)), (64, 48, (12, 3, 12)), (1024, 128, (32, 8, 32))])
def test_19_classes_stride_16_and_a_width_that_follows_the_joint_space_unless_told_otherwise(dim, width, groups):
    net = SegmentationNet(small_clip("resnet", dim=dim, layers=(1, 1, 1, 1)).visual)
    assert net.encoder.stride == 16 and net.arch["num_classes"] == 19 and net.arch["width"] == width
    parts = net.high, net.low, net.fuse
    assert [part[0].weight.shape for part in parts] == [(width, dim, 1, 1), (width // 4, 64, 1, 1), (width, width * 5 // 4, 3, 3)]
    assert tuple(part[1].num_groups for part in parts) == groups  # four channels in a group, where there are four


@pytest.mark.parametrize("kind, layers, resolution", [("resnet", (1, 2, 2, 2), 96), ("resnet", (1, 2, 3, 1), 64), ("vit", 1, 96)])
def test_a_checkpoint_rebuilds_the_network_from_its_architecture_alone(kind, layers, resolution):
    net = SegmentationNet(small_clip(kind, layers=layers, resolution=resolution).visual, num_classes=5, stride=8)
    arch = json.loads(json.dumps(net.arch))
    rebuilt = SegmentationNet.from_arch(arch)
    assert arch == json.loads(json.dumps(net.arch)), "the caller's dict is his"
    assert rebuilt.arch == net.arch and rebuilt.encoder.visual.input_resolution == resolution
    with torch.no_grad():
        assert not torch.allclose(rebuilt(images()).logits, net(images()).logits)
        rebuilt.load_state_dict(net.state_dict())  # strict
        for a, b in zip(rebuilt(images(1, 64, 96)), net(images(1, 64, 96))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_under_bfloat16_autocast_the_network_trains_and_its_embeddings_are_float32_unit_vectors(kind):
    net = small_net(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(images())
    torch.testing.assert_close(out.emb.norm(dim=1), torch.ones(2, 4, 4))  # dtypes are compared, too
    for x, exact in zip(out, net(images())):
        assert F.cosine_similarity(x.float().flatten(1), exact.flatten(1)).min() > 0.99
    (out.logits.float().square().mean() + out.emb[:, 0].sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.requires_grad)


ATTENDING = ["attnpool.q_proj", "attnpool.k_proj", "attnpool.positional_embedding"]
RESNET_STAGES = [["conv1", "conv2", "conv3"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
VIT_STAGES = [["conv1", "ln_pre", "class_embedding", "positional_embedding"],
              *[[f"transformer.resblocks.{n}" for n in stage] for stage in ((0, 1), (2, 3), (4,), ())]]


@pytest.mark.parametrize("stages", range(6))
@pytest.mark.parametrize("kind, table, layers", [("resnet", RESNET_STAGES, (1, 2, 2, 2)), ("vit", VIT_STAGES, 5)])
def test_freeze_leaves_exactly_the_stages_behind_it_trainable_and_a_step_moves_those_alone(kind, table, layers, stages):
    """Of a CLIP that came frozen from its file. A ResNet's batch norms, and how its pool attends, stay CLIP's for ever."""
    visual = small_clip(kind, layers=layers).visual.requires_grad_(False).train()
    net = SegmentationNet(visual, num_classes=7, width=32)
    net.encoder.freeze(stages)
    frozen = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    frozen += ["encoder.visual." + part for part in sum(table[:stages], ATTENDING)]
    trainable = {name for name, _ in net.named_parameters() if not (name + ".").startswith(tuple(part + "." for part in frozen))}
    assert {name for name, p in net.named_parameters() if p.requires_grad} == trainable
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for count in (1, 2):  # 1: the baseline's loss; processes wait for ever for a gradient that never comes
        net.zero_grad(set_to_none=True)
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in net(images(1, 64, 96))[:count]).backward()
        assert {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == trainable
        net.train()
    optimizer.step()
    assert {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])} == trainable
    assert not any(m.training for m in net.eval().modules())


@pytest.mark.parametrize("kind, stride", [("resnet", 8), ("vit", 16)])
def test_no_tensor_stays_on_the_cpu_when_the_network_is_on_another_device(kind, stride, monkeypatch):
    """FakeTensorMode has shapes and devices and no numbers; an operation on two devices is an error, as on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know this device
    net = small_net(kind, stride)
    module = ppar.PPAR(net, torch.empty(7, DIM), copy.deepcopy(net.encoder).requires_grad_(False)).to_empty(device="meta")
    with torch._functorch.config.patch(fake_tensor_allow_meta=True), FakeTensorMode(allow_non_fake_inputs=True):
        out = module(torch.empty(2, 3, 96, 160, device="meta"))  # not the native grid, so positions are resized too
        label = torch.zeros(2, 96, 160, dtype=torch.long, device="meta")
        terms = ppar.objective(out, module.otp, label, lam=0.5, ramp=0.5, tau=0.1, judge_text=0.5, balance=0.5)
        sum(terms.values()).backward()
    assert {t.device.type for t in (*out, *terms.values())} == {"meta"} and set(terms) == {"seg", "align"}
    assert {p.grad.device.type for p in module.parameters() if p.requires_grad} == {"meta"}
