"""model.py: the dense encoder is CLIP, loads every tensor of it or says why not, and trains what it should."""

import collections
import copy
import hashlib
import json
import os
import pathlib
import pickle
import urllib.error
import urllib.request

import pytest
import torch
import torch.nn.functional as F
from make_clip import make_clip, write_archive, write_state_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import align
import model
import prototypes
import reweight
from model import DenseCLIP, ModelError, SegmentationNet, load_clip

torch.set_num_threads(1)

KINDS = ("resnet", "vit")
WRITERS = {"archive": write_archive, "state dict": write_state_dict}
DIM = 48


def small_clip(kind, **options):
    """A random CLIP whose text tower is of no importance."""
    return make_clip(kind, DIM, vocabulary=100, context=16, **options)


def small_net(kind, stride=16, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SegmentationNet(small_clip(kind).visual, stride=stride, **{"num_classes": 7, "width": 32, **options})


def images(batch=2, height=64, width=64, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def last_map(visual, image):
    """The last feature map by the layers of CLIP's own ResNet, as its forward has them before the attention pool."""
    visual = copy.deepcopy(visual)
    visual.attnpool = nn.Identity()
    return visual(image)


# ---------------------------------------------------------------------------------------------------- CLIP, from file


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_loads_from_a_path_in_both_formats_with_every_tensor(kind, form, tmp_path):
    original = small_clip(kind)
    path = WRITERS[form](original, tmp_path / "clip.pt")
    loaded, report = load_clip(path)
    expected, got = original.state_dict(), loaded.state_dict()
    assert set(got) == set(expected)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    assert not any(m.training for m in loaded.modules())
    tokens = torch.tensor([[1, 5, 9, 99] + [0] * 12])
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images()), original.encode_image(images()))
        torch.testing.assert_close(loaded.encode_text(tokens), original.encode_text(tokens))
    assert path in report and f"{len(expected)} tensors" in report and f"joint width {DIM}" in report
    assert {"resnet": "ResNet", "vit": "ViT"}[kind] in report and "\n" not in report


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
def test_the_archives_of_the_tests_look_like_those_of_openai(tmp_path):
    state = torch.jit.load(write_archive(small_clip("resnet"), tmp_path / "clip.pt")).state_dict()
    sizes = {name: state[name].item() for name in ("input_resolution", "context_length", "vocab_size")}
    assert sizes == dict(input_resolution=64, context_length=16, vocab_size=100)
    assert state["visual.conv1.weight"].dtype == torch.float16 and state["visual.bn1.weight"].dtype == torch.float32


@pytest.mark.parametrize("name", ["visual.layer3.1.bn2.running_var", "visual.attnpool.v_proj.bias", "logit_scale",
                                  "visual.layer1.0.conv1.weight", "text_projection"])
def test_a_missing_tensor_is_an_error_that_names_the_file(name, tmp_path):
    state = small_clip("resnet").state_dict()
    del state[name]
    path = str(tmp_path / "gap.pt")
    torch.save(state, path)
    with pytest.raises(ModelError, match="gap.pt") as error:
        load_clip(path)
    assert name in str(error.value)


@pytest.mark.parametrize("kind, name", [("resnet", "visual.layer3.9.conv1.weight"), ("vit", "visual.head.weight")])
def test_an_extra_tensor_is_an_error_that_names_the_file(kind, name, tmp_path):
    state = small_clip(kind).state_dict()
    state[name] = torch.zeros(3)
    path = str(tmp_path / "extra.pt")
    torch.save(state, path)
    with pytest.raises(ModelError, match="extra.pt"):
        load_clip(path)


def test_archives_are_held_to_the_same_strictness(tmp_path):
    extra, gap = small_clip("vit"), small_clip("vit")
    extra.register_buffer("left_over", torch.zeros(3))
    del gap.logit_scale
    for name, bad in (("extra.pt", extra), ("gap.pt", gap)):
        with pytest.raises(ModelError, match=name):
            load_clip(write_archive(bad, tmp_path / name))


def test_a_tensor_of_another_shape_is_an_error_that_names_the_file(tmp_path):
    state = small_clip("vit").state_dict()
    state["visual.ln_post.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "shape.pt")
    with pytest.raises(ModelError, match="shape.pt.*ln_post"):
        load_clip(str(tmp_path / "shape.pt"))


@pytest.mark.parametrize("form", WRITERS)
def test_a_truncated_file_is_an_error_that_names_the_file(form, tmp_path):
    path = WRITERS[form](small_clip("vit"), tmp_path / "half.pt")
    whole = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(whole[:len(whole) * 6 // 10])
    with pytest.raises(ModelError, match="half.pt"):
        load_clip(path)


def test_a_float32_state_dict_keeps_its_precision(tmp_path):
    original = small_clip("vit")
    with torch.no_grad():
        original.visual.proj += 1e-4 * torch.rand_like(original.visual.proj)
        original.text_projection[0, 0] = 1e5  # beyond half precision
    loaded, _ = load_clip(write_state_dict(original, tmp_path / "clip.pt"))
    assert torch.equal(loaded.visual.proj, original.visual.proj)
    assert torch.equal(loaded.text_projection, original.text_projection)


@pytest.mark.parametrize("content", [b"404: Not Found\n", pickle.dumps({"path": pathlib.PurePosixPath("x")})])
def test_the_message_does_not_tell_the_user_to_switch_the_protection_off(content, tmp_path):
    (tmp_path / "page.pt").write_bytes(content)
    with pytest.raises(ModelError) as error:
        load_clip(str(tmp_path / "page.pt"))
    assert "weights_only" not in str(error.value) and "\033" not in str(error.value)


@pytest.mark.parametrize("content", ["404: Not Found\n", "", "<html>moved</html>" * 100])
def test_a_text_file_is_an_error_that_names_the_file(content, tmp_path):
    (tmp_path / "page.pt").write_text(content)
    with pytest.raises(ModelError, match="page.pt"):
        load_clip(str(tmp_path / "page.pt"))


@pytest.mark.parametrize("content", [{"state_dict": {"weight": torch.zeros(2)}}, {}, [1, 2], torch.zeros(3)])
def test_a_file_of_something_else_is_an_error_that_names_the_file(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="other.pt"):
        load_clip(str(tmp_path / "other.pt"))


class Trap:
    """Unpickling it makes a file: what a hostile checkpoint does to a careless reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_file_that_would_execute_code_is_refused_and_executes_nothing(how, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "trap.pt"
    content = {**small_clip("vit").state_dict(), "note": Trap(marker)}
    torch.save(content, path) if how == "torch.save" else path.write_bytes(pickle.dumps(content))
    with pytest.raises(ModelError, match="trap.pt"):
        load_clip(str(path))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists(), "the trap itself must work"


@pytest.mark.parametrize("name", ["RN49", "no/such/file.pt", ""])
def test_an_unknown_name_is_refused_with_the_right_ones(name):
    with pytest.raises(ModelError, match="RN50, RN101.*ViT-B/16"):
        load_clip(name)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="neither a file"):
        load_clip(str(tmp_path))


# ------------------------------------------------------------------------------------------------- CLIP, from the hub


@pytest.mark.parametrize("error", [urllib.error.URLError("Name or service not known"), TimeoutError("timed out"),
                                   ConnectionResetError("reset by peer")])
def test_an_unreachable_hub_is_one_sentence_with_the_address_and_the_folder(error, monkeypatch, tmp_path):
    def urlopen(*args, **kwargs):
        raise error

    monkeypatch.setenv("HOME", str(tmp_path))  # a cached RN50 of the developer's must not be found
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(ModelError) as caught:
        load_clip("RN50")
    message = str(caught.value)
    assert model.clip.clip._MODELS["RN50"] in message and "~/.cache/clip" in message and "RN50" in message
    assert str(getattr(error, "reason", error)) in message and "\n" not in message


def test_a_full_disk_is_no_fault_of_the_checkpoint(monkeypatch, tmp_path):
    def urlopen(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(ModelError, match="No space left") as error:
        load_clip("RN50")
    assert "~/.cache/clip" in str(error.value) and "state dict" not in str(error.value)


@pytest.mark.parametrize("intact", [True, False])
def test_a_name_is_fetched_once_and_its_hash_checked(intact, monkeypatch, tmp_path):
    original = small_clip("vit")
    path = write_archive(original, tmp_path / "source.pt")
    digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() if intact else "0" * 64
    (tmp_path / digest).mkdir()
    published = tmp_path / digest / "RN50.pt"
    os.rename(path, published)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(model.clip.clip._MODELS, "RN50", published.as_uri())  # a hub that needs no network
    if not intact:
        with pytest.raises(ModelError, match="RN50.*SHA256"):
            load_clip("RN50")
        return
    for _ in range(2):
        loaded, report = load_clip("RN50")
        assert torch.equal(loaded.visual.proj, original.visual.proj) and "CLIP RN50" in report
        published.unlink(missing_ok=True)  # the second time it comes from the cache
    assert (tmp_path / "home/.cache/clip/RN50.pt").is_file()


# ------------------------------------------------------------------------------------------------ the encoder is CLIP


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind, stride", [("vit", 16), ("resnet", 32), ("resnet", 16), ("resnet", 8)])
def test_pooled_equals_encode_image_of_clip(kind, stride, batch):
    original = small_clip(kind)
    encoder = DenseCLIP(copy.deepcopy(original.visual), stride)
    with torch.no_grad():
        expected = original.encode_image(images(batch))
        pooled = encoder(images(batch))[2]
    assert pooled.shape == (batch, DIM)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    if batch == 2:  # and the comparison is not one of constants
        assert (expected[0] - expected[1]).abs().max() > 0.05 * expected.abs().max()


def test_native_stride_followed_by_clips_own_attention_pool_equals_encode_image():
    original = small_clip("resnet")
    encoder = DenseCLIP(copy.deepcopy(original.visual), stride=32)
    seen = []
    encoder.visual.layer4.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        encoder(images())
        torch.testing.assert_close(original.visual.attnpool(seen[0]), original.encode_image(images()))


def watched(encoder):
    """The encoder and a list that gets the last map of every forward."""
    seen = []
    encoder.visual.layer4.register_forward_hook(lambda _, __, output: seen.append(output))
    return encoder, seen


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (128, 32)])
def test_on_the_cells_of_the_old_grid_a_dilated_resnet_computes_what_clip_computes(stride, size):
    visual = small_clip("resnet").visual
    encoder, seen = watched(DenseCLIP(copy.deepcopy(visual), stride))
    with torch.no_grad():
        expected = last_map(visual, images(2, *size))
        z, pooled = encoder(images(2, *size))[1:]
        native = DenseCLIP(copy.deepcopy(visual), 32)(images(2, *size))[2]
    step = 32 // stride
    assert z.shape == (2, DIM, size[0] // stride, size[1] // stride) and seen[0].shape[2:] == z.shape[2:]
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(seen[0][..., ::step, ::step], expected, rtol=1e-4, atol=tolerance)
    torch.testing.assert_close(pooled, native, rtol=1e-4, atol=1e-4 * native.abs().max().item())
    assert expected.std(dim=(2, 3)).mean() > 0.05 * expected.std()  # positions differ
    if stride < 32:  # the cells between are new, and no copies
        assert (seen[0][..., 1::step, ::step] - expected).abs().mean() > 0.01 * expected.abs().mean()
        assert (seen[0][..., ::step, 1::step] - expected).abs().mean() > 0.01 * expected.abs().mean()


@pytest.mark.parametrize("stride", [16, 8])
def test_a_dilated_resnet_is_the_old_one_seen_from_shifted_grids(stride):
    """Away from the border, the new cells are what CLIP computes on an image shifted by the new stride."""
    visual = small_clip("resnet").visual
    image = images(1, 1024, 32)  # long, because the deepest cells see some 300 pixels to each side
    encoder, seen = watched(DenseCLIP(copy.deepcopy(visual), stride))
    with torch.no_grad():
        encoder(image)
        shifted = last_map(visual, image.roll(-stride, 2))
    step = 32 // stride
    middle = slice(14, 18)
    tolerance = 1e-4 * shifted.abs().max().item()
    torch.testing.assert_close(seen[0][..., 1::step, ::step][:, :, middle], shifted[:, :, middle], rtol=1e-4,
                               atol=tolerance)


def value_path(pool, feat):
    return F.linear(F.linear(feat.movedim(1, -1), pool.v_proj.weight, pool.v_proj.bias),
                    pool.c_proj.weight, pool.c_proj.bias).movedim(-1, 1)


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_z_is_the_mean_of_the_four_cells_around_the_place(stride):
    encoder, seen = watched(DenseCLIP(small_clip("resnet").visual, stride))
    with torch.no_grad():
        z = encoder(images(2, 64, 96))[1]
        cells = value_path(encoder.visual.attnpool, seen[0])
    back = {32: [0], 16: [1, 0], 8: [2, 1]}[stride]  # how many cells before its own index a place lies
    for i in range(z.shape[2]):
        for j in range(z.shape[3]):
            around = [cells[..., max(0, i - a), max(0, j - b)] for a in back for b in back]
            torch.testing.assert_close(z[..., i, j], torch.stack(around).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_a_cell_of_z_looks_at_the_middle_of_the_pixels_that_it_stands_for(stride):
    """With all weights equal, what a cell sees is symmetric: the mean place of its gradient is where it looks."""
    encoder = DenseCLIP(small_clip("resnet").visual, stride)
    for module in encoder.visual.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        elif isinstance(module, torch.nn.BatchNorm2d):
            for tensor, value in ((module.weight, 1), (module.bias, 0), (module.running_mean, 0), (module.running_var, 1)):
                torch.nn.init.constant_(tensor, value)
    for name in ("v_proj", "c_proj"):
        torch.nn.init.constant_(getattr(encoder.visual.attnpool, name).weight, 1)
    size = 1024  # no border in sight
    image = torch.rand(1, 3, size, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    z = encoder(image)[1]
    row = z.shape[2] // 2
    z[0, :, row].sum().backward()
    seen = image.grad.abs().sum((0, 1, 3)).double()  # (size,)
    assert seen[:32].sum() == seen[-32:].sum() == 0
    where = (seen * torch.arange(size)).sum() / seen.sum()
    # CLIP's first convolution has stride 2 and looks half a pixel to the left of its own middle.
    assert abs(where - ((row + 0.5) * stride - 0.5)) <= 0.75


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_pooling_without_stride_equals_plain_loops(dilation):
    x = torch.arange(2 * 6 * 5).float().view(1, 2, 6, 5).sqrt()
    got = model._PoolWithoutStride(dilation)(x)
    assert got.shape == x.shape
    for i in range(6):
        for j in range(5):
            i2, j2 = min(i + dilation, 5), min(j + dilation, 4)
            expected = (x[0, :, i, j] + x[0, :, i2, j] + x[0, :, i, j2] + x[0, :, i2, j2]) / 4
            torch.testing.assert_close(got[0, :, i, j], expected)


def test_a_stride_that_a_resnet_cannot_have_is_refused():
    with pytest.raises(ModelError, match="stride 4"):
        DenseCLIP(small_clip("resnet").visual, 4)


def test_the_value_path_is_what_the_pool_returns_on_a_map_of_one_repeated_cell():
    """With the position code at zero: all positions are that one, so wherever the pool attends, it returns z."""
    visual = small_clip("resnet").visual
    nn.init.zeros_(visual.attnpool.positional_embedding)
    cell = torch.randn(1, 512, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = visual.attnpool(cell.expand(1, 512, 2, 2))
        z = visual.attnpool.c_proj(visual.attnpool.v_proj(cell[:, :, 0, 0]))
    torch.testing.assert_close(pooled, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (1, 1)])
def test_attention_pool_equals_clips_on_any_grid(size):
    pool = small_clip("resnet").visual.attnpool
    feat = torch.randn(2, 512, *size, generator=torch.Generator().manual_seed(0))
    resized = copy.deepcopy(pool)
    resized.positional_embedding = nn.Parameter(model._resize_position(pool.positional_embedding, *size))
    with torch.no_grad():
        torch.testing.assert_close(model.attention_pool(pool, feat), resized(feat), rtol=1e-4, atol=1e-5)


def test_the_position_code_is_clips_on_the_native_grid_and_keeps_its_directions_on_others():
    code = torch.zeros(1 + 16, 3)
    code[0] = torch.tensor([7.0, 8.0, 9.0])  # the code of the class token
    code[1:, 0] = torch.arange(4.0).repeat_interleave(4)  # row number
    code[1:, 1] = torch.arange(4.0).repeat(4)  # column number
    code[1:, 2] = 5.0
    assert model._resize_position(code, 4, 4) is code
    resized = model._resize_position(code, 3, 8)
    assert resized.shape == (25, 3) and torch.equal(resized[0], code[0])
    row, column, constant = resized[1:].view(3, 8, 3).unbind(-1)
    torch.testing.assert_close(constant, torch.full((3, 8), 5.0))
    torch.testing.assert_close(row, row[:, :1].expand(3, 8))
    torch.testing.assert_close(column, column[:1].expand(3, 8))
    assert (row[:, 0].diff() > 0).all() and (column[0].diff() > 0).all()
    assert row.mean().item() == pytest.approx(1.5) and column.mean().item() == pytest.approx(1.5)  # centred alike
    finer = model._resize_position(code, 12, 12)[1:].view(12, 12, 3)  # an old cell is the middle of nine new ones
    torch.testing.assert_close(finer[1::3, 1::3], code[1:].view(4, 4, 3))


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_every_patch_token_of_a_vit_takes_the_path_of_the_class_token(size):
    visual = small_clip("vit").visual
    encoder = DenseCLIP(copy.deepcopy(visual))
    h, w = size[0] // 16, size[1] // 16
    visual.positional_embedding = nn.Parameter(model._resize_position(visual.positional_embedding, h, w))
    seen = {}
    visual.transformer.register_forward_hook(lambda _, __, output: seen.update(tokens=output))  # (1 + hw, B, C)
    visual.transformer.resblocks[1].register_forward_hook(lambda _, __, output: seen.update(half=output))  # of 4
    with torch.no_grad():
        expected = visual(images(2, *size))
        low, z, pooled = encoder(images(2, *size))
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
        for i, j in ((0, 0), (1, 2), (h - 1, w - 1), (2, 0)):
            token = seen["tokens"][1 + i * w + j]
            torch.testing.assert_close(z[:, :, i, j], visual.ln_post(token) @ visual.proj, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(low[:, :, i, j], seen["half"][1 + i * w + j], rtol=1e-4, atol=1e-5)
    assert z.shape == (2, DIM, h, w) and low.shape == (2, 128, h, w)
    assert z.std(dim=(2, 3)).mean() > 0.05 * z.std()


def test_the_low_map_of_a_resnet_is_its_first_stage_at_a_quarter_of_the_image():
    visual = small_clip("resnet").visual
    seen = []
    encoder = DenseCLIP(visual)
    visual.layer1.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    low = encoder(images(1, 64, 96))[0]
    assert low.shape == (1, encoder.low_channels, 16, 24) and torch.equal(low, seen[0])  # no later stage wrote into it


@pytest.mark.parametrize("kind", KINDS)
def test_dilation_and_density_change_no_tensor_of_clip(kind):
    visual = small_clip(kind).visual
    before = {name: tensor.clone() for name, tensor in visual.state_dict().items()}
    after = DenseCLIP(visual, 8).visual.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


# --------------------------------------------------------------------------------------------------- the whole network


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind, stride", [("resnet", 32), ("resnet", 16), ("resnet", 8), ("vit", 16)])
def test_the_network_gives_logits_at_a_quarter_and_unit_embeddings(kind, stride, batch):
    net = small_net(kind, stride)
    with torch.no_grad():
        out = net(images(batch, 64, 96))
        _, z, pooled = net.encoder(images(batch, 64, 96))
    assert out.logits.shape == (batch, 7, 16, 24)
    assert out.emb.shape == (batch, DIM, 64 // stride, 96 // stride) and out.pooled.shape == (batch, DIM)
    torch.testing.assert_close(out.emb.norm(dim=1), torch.ones(batch, 64 // stride, 96 // stride))
    torch.testing.assert_close(out.pooled.norm(dim=1), torch.ones(batch))
    torch.testing.assert_close(out.emb, F.normalize(z, dim=1))
    torch.testing.assert_close(out.pooled, F.normalize(pooled, dim=1))
    assert net.encoder.stride == stride and net.encoder.dim == DIM
    assert tuple(out) == (out.logits, out.emb, out.pooled)  # the order that the docstring gives


def test_there_are_19_classes_and_stride_16_unless_told_otherwise():
    net = SegmentationNet(small_clip("resnet").visual)
    assert net.arch["num_classes"] == 19 and net.encoder.stride == 16 and net(images(1)).logits.shape[1] == 19


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_of_a_batch_do_not_see_each_other(kind):
    net = small_net(kind).train()
    with torch.no_grad():
        both, alone = net(images(2)), net(images(2)[1:])
    for a, b in zip(both, alone):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_computes_what_eval_mode_computes(kind):
    net = small_net(kind)
    with torch.no_grad():
        for a, b in zip(net.train()(images()), net.eval()(images())):
            torch.testing.assert_close(a, b)


def test_the_decoder_does_not_see_the_length_of_the_embedding():
    net = small_net("vit")
    with torch.no_grad():
        before = net(images())
        net.encoder.visual.proj *= 10  # z ten times as long
        after = net(images())
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", ["high", "low"])
def test_both_branches_reach_the_logits_in_place(branch):
    """A change in the top left corner of either branch moves the logits there and not in the far corner."""
    net = small_net("resnet", stride=8)
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):  # its mean is over the image, the one thing that carries far
            module.forward = lambda x: x

    def corner(_, __, output):
        output = output.clone()
        output[..., 0, 0] += 1
        return output

    with torch.no_grad():
        before = net(images()).logits
        getattr(net, branch).register_forward_hook(corner)
        moved = (net(images()).logits - before).abs().amax(dim=(0, 1))
    assert moved[0, 0] > 1e-4 and moved[-1].max() == 0 and moved[:, -1].max() == 0


def test_the_embedding_enters_the_decoder_at_order_one():
    net = small_net("resnet")
    seen = []
    net.high.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        out = net(images())
    torch.testing.assert_close(seen[0], out.emb * DIM ** 0.5)
    assert seen[0].square().mean().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_rebuilds_the_network_from_its_architecture_alone(kind):
    net = small_net(kind, stride=8, num_classes=5, width=64).eval()
    arch = json.loads(json.dumps(net.arch))
    kept = copy.deepcopy(arch)
    rebuilt = SegmentationNet.from_arch(arch).eval()
    assert arch == kept, "the caller's dict is his"
    assert rebuilt.arch == net.arch and rebuilt.encoder.stride == net.encoder.stride
    with torch.no_grad():
        assert not torch.allclose(rebuilt(images()).logits, net(images()).logits)
        rebuilt.load_state_dict(net.state_dict())  # strict
        for a, b in zip(rebuilt(images(1, 64, 96)), net(images(1, 64, 96))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind, layers", [("resnet", (1, 2, 3, 1)), ("vit", 3)])
@pytest.mark.parametrize("resolution", [64, 96])
def test_architecture_and_build_visual_are_inverse_for_other_sizes(kind, layers, resolution):
    visual = small_clip(kind, layers=layers, resolution=resolution).visual
    rebuilt = model.build_visual(model.architecture(visual))
    rebuilt.load_state_dict(visual.state_dict())
    with torch.no_grad():
        image = images(1, resolution, resolution)
        torch.testing.assert_close(rebuilt.eval()(image), visual(image))
    assert model.architecture(rebuilt) == model.architecture(visual)
    assert rebuilt.input_resolution == resolution


@pytest.mark.parametrize("kind, size, multiple", [("resnet", (64, 80), 32), ("resnet", (65, 64), 32),
                                                  ("vit", (64, 72), 16), ("vit", (20, 64), 16)])
def test_an_image_size_that_does_not_fit_is_refused_with_the_sizes(kind, size, multiple):
    with pytest.raises(ModelError) as error:
        small_net(kind)(images(1, *size))
    assert f"{size[0]} x {size[1]}" in str(error.value) and f"multiples of {multiple} " in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_under_bfloat16_autocast_the_network_trains_and_its_embeddings_are_float32_unit_vectors(kind):
    net = small_net(kind).train()
    exact = net(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(images())
    assert out.emb.dtype == out.pooled.dtype == torch.float32
    torch.testing.assert_close(out.emb.norm(dim=1), torch.ones(2, 4, 4))
    assert (out.emb * exact.emb).sum(1).min() > 0.97 and (out.pooled * exact.pooled).sum(1).min() > 0.97
    assert (out.logits.float() - exact.logits).abs().mean() < 0.1 * exact.logits.abs().mean()
    (out.logits.float().square().mean() + out.emb[:, 0].sum() + out.pooled[:, 0].sum()).backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name


# --------------------------------------------------------------------------------------------------- what is trained


def gradient_names(net, loss):
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("terms", ["logits alone", "logits, emb and pooled"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_exactly_the_trainable_parameters(kind, batch, terms):
    """Also for the loss of the baseline: several processes wait for ever for a gradient that never comes."""
    net = small_net(kind).train()
    out = net(images(batch, 64, 96))
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g)).sum() for x in (out[:1] if terms == "logits alone" else out))
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert gradient_names(net, loss) == trainable


def pool_and_norms(visual):
    """What stays CLIP's for ever in a ResNet: batch norms, and how the pool attends."""
    names = {f"{name}.{p}" for name, m in visual.named_modules() if isinstance(m, nn.BatchNorm2d)
             for p in ("weight", "bias")}
    return names | {f"attnpool.{p}" for p in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias",
                                              "positional_embedding")}


RESNET_STAGES = [("conv1", "conv2", "conv3"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
VIT_STAGES = [("conv1", "ln_pre", "class_embedding", "positional_embedding"),
              *[(f"transformer.resblocks.{2 * i}", f"transformer.resblocks.{2 * i + 1}") for i in range(4)]]


@pytest.mark.parametrize("stages", range(6))
@pytest.mark.parametrize("kind, table, layers", [("resnet", RESNET_STAGES, (1, 2, 2, 2)), ("vit", VIT_STAGES, 8)])
def test_freeze_leaves_exactly_the_stages_behind_it_trainable(kind, table, layers, stages):
    net = SegmentationNet(small_clip(kind, layers=layers).visual, num_classes=7, width=32)
    net.encoder.freeze(stages)
    net.train()
    visual = net.encoder.visual
    names = {name for name, _ in visual.named_parameters()}
    frozen = pool_and_norms(visual) if kind == "resnet" else set()
    for part in sum(table[:stages], ()):
        found = {name for name in names if name == part or name.startswith(part + ".")}
        assert found, part
        frozen |= found
    assert {name for name, p in visual.named_parameters() if p.requires_grad} == names - frozen
    assert all(p.requires_grad for name, p in net.named_parameters() if not name.startswith("encoder."))
    last = {"resnet": {"attnpool.c_proj.weight", "attnpool.v_proj.weight"}, "vit": {"proj", "ln_post.weight"}}[kind]
    assert last <= names - frozen
    if stages == 5:
        out = net(images(1))
        assert {f"encoder.visual.{name}" for name in last} <= gradient_names(net, out.logits.square().sum())


@pytest.mark.parametrize("stages", [-1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_freezing_more_stages_than_there_are_is_refused(kind, stages):
    with pytest.raises(ModelError, match="0 to 5"):
        small_net(kind).encoder.freeze(stages)


def test_frozen_batch_norm_stays_through_train_mode_and_an_optimiser_step_with_weight_decay():
    net = small_net("resnet")
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {f"{n}.{k}": t.clone() for n, m in norms.items() for k, t in m.state_dict().items()}
    weight = net.encoder.visual.layer2[0].conv1.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(2):
        net.train()
        optimizer.zero_grad()
        net(5 + 3 * images()).logits.square().mean().backward()
        optimizer.step()
    assert len(norms) > 20 and not any(m.training for m in norms.values())
    assert net.training and net.encoder.training and net.fuse.training
    for name, m in norms.items():
        for key, tensor in m.state_dict().items():
            assert torch.equal(tensor, before[f"{name}.{key}"]), f"{name}.{key}"
    assert not torch.equal(weight, net.encoder.visual.layer2[0].conv1.weight)
    net.eval()
    assert not any(m.training for m in net.modules())


def test_batch_norm_is_frozen_from_the_first_moment_and_not_only_after_train_or_eval():
    net = SegmentationNet.from_arch(small_net("resnet").arch)
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_that_came_frozen_from_its_file_becomes_trainable(kind):
    visual = small_clip(kind).visual.requires_grad_(False)
    DenseCLIP(visual)
    frozen = {name for name, p in visual.named_parameters() if not p.requires_grad}
    assert frozen == (pool_and_norms(visual) if kind == "resnet" else set())


# ----------------------------------------------------------------------------------- another device, without having one


def to_fake_cuda(module):
    """Every parameter and registered buffer moved to a CUDA device that need not exist; plain attributes stay."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, b in part._buffers.items():
            part._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return module


def backward_by_hand(loss):
    """loss.backward() without autograd's engine, which would look for the driver of the device."""
    users, order, grads = collections.Counter(), [loss.grad_fn], {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in order:  # grows while it is read
        for after in {after for after, _ in node.next_functions if after is not None}:
            users[after] += 1
            if users[after] == 1:
                order.append(after)
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        inputs = [grads.get(node, {}).get(i) for i in range(len(node._input_metadata))]
        if hasattr(node, "variable"):  # the end of a path: a parameter
            node.variable.grad = inputs[0]
            continue
        outputs = node(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for (after, i), grad in zip(node.next_functions, outputs):
            if after is not None and grad is not None:
                grad = grad.sum_to_size(after._input_metadata[i].shape)  # of a broadcast operand
                slot = grads.setdefault(after, {})
                slot[i] = slot[i] + grad if i in slot else grad
        for after in {after for after, _ in node.next_functions if after is not None}:
            users[after] -= 1
            if users[after] == 0:
                ready.append(after)


def test_the_backward_pass_by_hand_is_that_of_autograd():
    net = small_net("resnet")
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in net(images()))
    expected = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], retain_graph=True)
    backward_by_hand(loss)
    for p, grad in zip((p for p in net.parameters() if p.requires_grad), expected):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor", "ignore:.*CUDA is not available")
@pytest.mark.parametrize("kind, stride", [("resnet", 8), ("vit", 16)])
def test_no_tensor_stays_on_the_cpu_when_the_network_is_on_another_device(kind, stride):
    """FakeTensorMode has shapes and devices and no numbers; an operation on two devices is an error, as on a GPU."""
    net, vtp_module = small_net(kind, stride), prototypes.VisualTextPrototypes(DIM, width=32)
    with FakeTensorMode():
        net, vtp_module = to_fake_cuda(net).train(), to_fake_cuda(vtp_module)
        image = torch.empty(2, 3, 96, 160, device="cuda")  # not the native grid, so positions are resized too
        fine = torch.zeros(2, 96, 160, dtype=torch.long, device="cuda")
        otp = torch.empty(7, DIM, device="cuda")
        out = net(image)
        label = torch.zeros(out.emb[:, 0].shape, dtype=torch.long, device="cuda")
        vtp = vtp_module(otp, out.emb, out.pooled)
        weights = []
        for y in (label, fine):
            rel = (reweight.reliability(out.emb, y, otp, 0.1) + reweight.reliability(out.emb, y, vtp, 0.1)) / 2
            rel = reweight.image_reliability(rel, y)
            weights.append(reweight.learning_weights(rel, y, 0.5, 0.1))
        logits = F.interpolate(out.logits, size=fine.shape[1:], mode="bilinear")
        loss = (weights[1] * F.cross_entropy(logits, fine, ignore_index=255, reduction="none")).mean()
        loss = loss + align.progressive_alignment_loss(out.emb, label, otp, vtp, 0.5, 0.1, weights[0])
        loss = loss + align.alignment_loss(out.emb, label, vtp, 0.1)
        backward_by_hand(loss)
    assert {t.device.type for t in (*out, vtp, loss, *weights)} == {"cuda"}
    for name, p in [*net.named_parameters(), *vtp_module.named_parameters()]:
        assert p.grad is None if not p.requires_grad else p.grad.device.type == "cuda", name


# ---------------------------------------------------------------------------------------------------------- the file


def test_the_demonstration_of_model_runs(capsys):
    model._demo()
    assert "largest difference from encode_image" in capsys.readouterr().out
