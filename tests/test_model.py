"""model.py: the dense encoder is CLIP, loads every tensor of it or says why not, and trains what it should."""

import contextlib
import copy
import hashlib
import json
import pathlib
import pickle
import urllib.error

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from make_clip import make_clip, write_archive, write_state_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import align
import model
import prototypes
import reweight
from data import UserError
from model import DenseCLIP, SegmentationNet, load_clip

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


def same(state, expected):
    """Two state dicts with the same names in the same order and the same bits."""
    assert list(state) == list(expected)
    for name in state:
        assert torch.equal(state[name], expected[name]), name


def close(got, expected):
    """Equal but for rounding, on the scale of the whole tensor."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_loads_from_a_path_in_both_formats_with_every_tensor(kind, form, tmp_path):
    original = small_clip(kind)
    if form == "state dict":  # float32 keeps its precision
        nn.init.normal_(original.text_projection, std=1e5)  # beyond half precision, too
    path = WRITERS[form](original, tmp_path / "clip.pt")
    loaded, report = load_clip(path)
    same(loaded.state_dict(), original.state_dict())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    assert not any(m.training for m in loaded.modules())
    tokens = torch.tensor([[1, 5, 9, 99] + [0] * 12])
    with torch.no_grad():
        close(loaded.encode_image(images()), original.encode_image(images()))
        close(loaded.encode_text(tokens), original.encode_text(tokens))
    assert path in report and f"{len(original.state_dict())} tensors" in report and f"joint width {DIM}" in report
    assert {"resnet": "ResNet", "vit": "ViT"}[kind] in report and "\n" not in report
    if form == "archive":  # the writer of the tests does as OpenAI's
        state = torch.jit.load(path).state_dict()
        assert [int(state[name]) for name in ("input_resolution", "context_length", "vocab_size")] == [64, 16, 100]
        assert state["visual.conv1.weight"].dtype == torch.float16


def refusal(path):
    """What load_clip says about a file that is not exactly a CLIP."""
    with pytest.raises(UserError, match=path.name) as error:
        load_clip(str(path))
    message = str(error.value)
    assert "\n" not in message
    assert "weights_only" not in message and "\033" not in message, "torch's advice to switch its protection off"
    return message


GAPS = ("visual.layer3.1.bn2.running_var", "visual.attnpool.v_proj.bias", "logit_scale", "visual.layer1.0.conv1.weight",
        "text_projection")
WRONG = [*[("resnet", name, None, name) for name in GAPS], ("resnet", "visual.layer3.9.conv1.weight", torch.zeros(3), ""),
         *[("vit", name, torch.zeros(3), name) for name in ("visual.head.weight", "visual.ln_post.bias")]]


@pytest.mark.parametrize("kind, name, value, words", WRONG)
def test_a_tensor_missing_left_over_or_of_another_shape_is_an_error_that_names_the_file(kind, name, value, words, tmp_path):
    state = {**small_clip(kind).state_dict(), name: value}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "bad.pt")
    assert words in refusal(tmp_path / "bad.pt")


def test_archives_are_held_to_the_same_strictness(tmp_path):
    extra, gap = small_clip("vit"), small_clip("vit")
    extra.register_buffer("left_over", torch.zeros(3))
    del gap.logit_scale
    for name, bad in (("left_over", extra), ("logit_scale", gap)):
        write_archive(bad, tmp_path / "bad.pt")
        assert name in refusal(tmp_path / "bad.pt")


@pytest.mark.parametrize("content", [b"404: Not Found\n", b"", b"<html>moved</html>" * 100, {}, [1, 2], torch.zeros(3),
                                     {"state_dict": {"weight": torch.zeros(2)}}, pickle.dumps(pathlib.PurePosixPath("x")),
                                     *WRITERS])
def test_a_file_of_something_else_or_half_a_file_is_an_error_that_names_the_file(content, tmp_path):
    path = tmp_path / "bad.pt"
    if isinstance(content, str):  # one of WRITERS
        whole = pathlib.Path(WRITERS[content](small_clip("vit"), path)).read_bytes()
        content = whole[:len(whole) * 6 // 10]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refusal(path)


class Trap:
    """Unpickling it makes a file: what a hostile checkpoint does to a careless reader."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("executed"),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_file_that_would_execute_code_is_refused_and_executes_nothing(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({**small_clip("vit").state_dict(), "note": Trap()}, tmp_path / "trap.pt")
    refusal(tmp_path / "trap.pt")
    assert not pathlib.Path("executed").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert pathlib.Path("executed").exists(), "the trap itself must work"


@pytest.mark.parametrize("name", ["RN49", "no/such/file.pt", "", str(pathlib.Path(__file__).parent)])
def test_an_unknown_name_or_a_folder_is_refused_with_the_right_names(name):
    with pytest.raises(UserError, match="neither a file nor one of toy, RN50, RN101.*ViT-B/16"):
        load_clip(name)


def test_the_toy_clip_is_the_file_beside_the_module(monkeypatch):
    loaded, report = load_clip("toy")
    same(loaded.state_dict(), load_clip(str(pathlib.Path(model.__file__).with_name("toy_clip.pt")))[0].state_dict())
    assert "CLIP toy" in report
    monkeypatch.setattr(model, "TOY_CLIP", "gone/toy_clip.pt")
    with pytest.raises(UserError, match="gone/toy_clip.pt: neither"):
        load_clip("toy")


@pytest.mark.parametrize("error", [urllib.error.URLError("Name or service not known"), TimeoutError("timed out"),
                                   ConnectionResetError("reset by peer"), OSError(28, "No space left on device")])
def test_a_failed_download_or_read_is_one_sentence_with_its_reason_and_the_remedy(error, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setenv("HOME", str(tmp_path))  # a cached RN50 of the developer's must not be found
    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("torch.jit.load", fail)
    for name, remedy in (("RN50", model.clip.clip._MODELS["RN50"]), ("RN50", "~/.cache/clip"), (__file__, "Is it readable")):
        with pytest.raises(UserError) as caught:
            load_clip(name)
        message = str(caught.value)
        assert name in message and remedy in message and str(getattr(error, "reason", error)) in message
        assert "\n" not in message and "state dict" not in message, "the checkpoint is not to blame"


@pytest.mark.parametrize("intact", [True, False])
def test_a_name_is_fetched_once_and_its_hash_checked(intact, monkeypatch, tmp_path):
    original = small_clip("vit")
    source = pathlib.Path(write_archive(original, tmp_path / "source.pt"))
    digest = hashlib.sha256(source.read_bytes()).hexdigest() if intact else "0" * 64
    (tmp_path / digest).mkdir()
    published = source.rename(tmp_path / digest / "RN50.pt")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(model.clip.clip._MODELS, "RN50", published.as_uri())  # a hub that needs no network
    if not intact:
        with pytest.raises(UserError, match="RN50.*SHA256"):
            load_clip("RN50")
        return
    for _ in range(2):
        loaded, report = load_clip("RN50")
        assert torch.equal(loaded.visual.proj, original.visual.proj) and "CLIP RN50" in report
        published.unlink(missing_ok=True)  # the second time it comes from the cache
    assert (tmp_path / "home/.cache/clip/RN50.pt").is_file()


def clamped(x, rows, cols):
    """x at the given rows and columns of its last two axes, each outside index moved onto the border."""
    return x[..., rows.clamp(0, x.shape[-2] - 1), :][..., cols.clamp(0, x.shape[-1] - 1)]


@pytest.mark.parametrize("size, multiple", [((5, 7), 4), ((1, 2), 32), ((64, 33), 16), ((8, 4), 4)])
def test_padding_continues_the_border_pixels_to_the_right_and_below(size, multiple):
    image = images(2, *size)
    height, width = (-(-side // multiple) * multiple for side in size)
    assert torch.equal(model.pad(image, multiple), clamped(image, torch.arange(height), torch.arange(width)))


def last_map(visual, image):
    """The last feature map by the layers of CLIP's own ResNet, as its forward has them before the attention pool."""
    visual = copy.deepcopy(visual)
    visual.attnpool = nn.Identity()
    return visual(image)


def watched(visual, stride):
    """An encoder with a copy of visual, and a dict that gets its early map and its last one."""
    encoder, seen = DenseCLIP(copy.deepcopy(visual), stride), {}
    encoder.visual.layer1.register_forward_hook(lambda _, __, output: seen.update(low=output.clone()))
    encoder.visual.layer4.register_forward_hook(lambda _, __, output: seen.update(last=output))
    return encoder, seen


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (128, 32)])
def test_on_the_cells_of_the_old_grid_a_dilated_resnet_computes_what_clip_computes(stride, size):
    visual = small_clip("resnet").visual
    encoder, seen = watched(visual, stride)
    same(encoder.visual.state_dict(), visual.state_dict())
    pool = copy.deepcopy(visual.attnpool)  # CLIP's own, for a grid of this size
    pool.positional_embedding.data = model._resize_position(pool.positional_embedding, size[0] // 32, size[1] // 32)
    with torch.no_grad():
        low, z, pooled = encoder(images(2, *size))
        expected = last_map(visual, images(2, *size))
        close(pooled, pool(expected))
        if size == (64, 64):
            close(pooled, visual(images()))  # encode_image
            assert (pooled[0] - pooled[1]).abs().max() > 0.05 * pooled.abs().max()  # no comparison of constants
    step = 32 // stride
    close(seen["last"][..., ::step, ::step], expected)
    assert z.shape == (2, DIM, size[0] // stride, size[1] // stride) and seen["last"].shape[2:] == z.shape[2:]
    assert low.shape == (2, encoder.low_channels, size[0] // 4, size[1] // 4)
    assert torch.equal(low, seen["low"])  # the first stage, and no later stage wrote into it
    assert expected.std(dim=(2, 3)).mean() > 0.05 * expected.std()  # positions differ
    if stride < 32:  # the cells between are new, and no copies
        for between in (seen["last"][..., 1::step, ::step], seen["last"][..., ::step, 1::step]):
            assert (between - expected).abs().mean() > 0.01 * expected.abs().mean()


@pytest.mark.parametrize("stride", [16, 8])
def test_a_dilated_resnet_is_the_old_one_seen_from_shifted_grids(stride):
    """Away from the border, the new cells are what CLIP computes on an image shifted by the new stride."""
    visual = small_clip("resnet").visual
    image = images(1, 1024, 32)  # long, because the deepest cells see some 300 pixels to each side
    encoder, seen = watched(visual, stride)
    with torch.no_grad():
        encoder(image)
        shifted = last_map(visual, image.roll(-stride, 2))
    close(seen["last"][:, :, 1::32 // stride, ::32 // stride][:, :, 14:18], shifted[:, :, 14:18])


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_z_is_the_value_path_averaged_over_the_four_cells_around_the_place(stride):
    encoder, seen = watched(small_clip("resnet").visual, stride)
    pool = encoder.visual.attnpool
    with torch.no_grad():
        z = encoder(images(2, 64, 96))[1]
        cells = pool.c_proj(pool.v_proj(seen["last"].movedim(1, -1))).movedim(-1, 1)
    back = {32: [0], 16: [1, 0], 8: [2, 1]}[stride]  # how many cells before its own index a place lies
    row, col = torch.arange(z.shape[2]), torch.arange(z.shape[3])
    close(z, torch.stack([clamped(cells, row - a, col - b) for a in back for b in back]).mean(0))


def test_of_a_single_cell_without_position_code_clips_pool_returns_the_value_path():
    visual = small_clip("resnet").visual
    nn.init.zeros_(visual.attnpool.positional_embedding)
    with torch.no_grad():
        last = last_map(visual, images(2, 32, 32))
        close(DenseCLIP(visual, 32)(images(2, 32, 32))[1], visual.attnpool(last.expand(2, -1, 2, 2))[..., None, None])


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_a_cell_of_z_looks_at_the_middle_of_the_pixels_that_it_stands_for(stride):
    """With all weights equal, what a cell sees is symmetric: the mean place of its gradient is where it looks."""
    encoder = DenseCLIP(small_clip("resnet").visual, stride)
    for name, tensor in encoder.visual.state_dict().items():
        if tensor.ndim == 4:
            tensor.fill_(1 / tensor[0].numel())
        else:
            tensor.fill_(0 if name.endswith(("bias", "running_mean")) else 1)
    image = torch.rand(1, 3, 1024, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    z = encoder(image)[1]
    row = z.shape[2] // 2  # no border in sight
    z[0, :, row].sum().backward()
    seen = image.grad.abs().sum((0, 1, 3)).double()  # (1024,)
    assert seen[:32].sum() == seen[-32:].sum() == 0
    where = (seen * torch.arange(1024)).sum() / seen.sum()
    # CLIP's first convolution has stride 2 and looks half a pixel to the left of its own middle.
    assert abs(where - ((row + 0.5) * stride - 0.5)) <= 0.75


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_pooling_without_stride_is_the_mean_of_four_cells_and_the_border_stands_for_what_is_beyond_it(dilation):
    x, row, col = torch.arange(2 * 6 * 5).float().view(1, 2, 6, 5).sqrt(), torch.arange(6), torch.arange(5)
    expected = sum(clamped(x, row + a, col + b) for a in (0, dilation) for b in (0, dilation)) / 4
    torch.testing.assert_close(model._PoolWithoutStride(dilation)(x), expected)


def test_the_position_code_is_clips_on_the_native_grid_and_keeps_its_directions_on_others():
    code = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0), torch.tensor([5.0]))  # row, column, a constant
    code = torch.cat([torch.tensor([[7.0, 8.0, 9.0]]), code])  # the class token's comes first
    assert model._resize_position(code, 4, 4) is code
    resized = model._resize_position(code, 3, 8)
    assert resized.shape == (25, 3) and torch.equal(resized[0], code[0])
    row, column, constant = resized[1:].view(3, 8, 3).unbind(-1)
    torch.testing.assert_close(constant, torch.full((3, 8), 5.0))
    assert (row[:, 0].diff() > 0).all() and (column[0].diff() > 0).all()
    torch.testing.assert_close(row, row[:, :1].expand(3, 8))
    torch.testing.assert_close(column, column[:1].expand(3, 8))
    assert row.mean().item() == pytest.approx(1.5) and column.mean().item() == pytest.approx(1.5)  # centred alike
    close(model._resize_position(code[:2], 1, 3), code[[0, 1, 1, 1]])  # CLIP's map may be a single cell
    finer = model._resize_position(code, 12, 12)[1:].view(12, 12, 3)  # an old cell is the middle of nine new ones
    torch.testing.assert_close(finer[1::3, 1::3], code[1:].view(4, 4, 3))


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_every_patch_token_of_a_vit_takes_the_path_of_the_class_token(size):
    visual = small_clip("vit").visual
    encoder = DenseCLIP(copy.deepcopy(visual), 16)
    same(encoder.visual.state_dict(), visual.state_dict())
    h, w = size[0] // 16, size[1] // 16
    visual.positional_embedding = nn.Parameter(model._resize_position(visual.positional_embedding, h, w))
    seen = {}
    visual.transformer.register_forward_hook(lambda _, __, output: seen.update(tokens=output))  # (1 + hw, B, C)
    visual.transformer.resblocks[1].register_forward_hook(lambda _, __, output: seen.update(half=output))  # of 4
    with torch.no_grad():
        low, z, pooled = encoder(images(2, *size))
        close(pooled, visual(images(2, *size)))  # encode_image
        for i, j in ((0, 0), (1, 2), (h - 1, w - 1), (2, 0)):
            token = seen["tokens"][1 + i * w + j]
            close(z[:, :, i, j], visual.ln_post(token) @ visual.proj)
            close(low[:, :, i, j], seen["half"][1 + i * w + j])
    assert z.shape == (2, DIM, h, w) and low.shape == (2, 128, h, w)
    assert z.std(dim=(2, 3)).mean() > 0.05 * z.std()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tower_cannot_do_is_refused_with_what_it_can(kind):
    net, multiple = small_net(kind), {"resnet": 32, "vit": 16}[kind]
    for size in ((64, 72), (20, 64)):
        with pytest.raises(UserError, match=f"{size[0]} x {size[1]} .*multiples of {multiple} "):
            net(images(1, *size))
    for stages in (-1, 6):
        with pytest.raises(UserError, match=f"--freeze {stages}.*0 to 5"):
            net.encoder.freeze(stages)
    if kind == "resnet":
        with pytest.raises(UserError, match="--stride 4.*32, 16 or 8"):
            DenseCLIP(small_clip("resnet").visual, 4)


@pytest.mark.parametrize("kind, stride", [("resnet", 32), ("resnet", 16), ("resnet", 8), ("vit", 16)])
def test_the_network_gives_logits_at_a_quarter_and_unit_embeddings(kind, stride):
    net = small_net(kind, stride)
    with torch.no_grad():
        logits, emb, pooled = out = net(images(2, 64, 96))
        _, z, expected = net.encoder(images(2, 64, 96))
    assert (logits is out.logits) and (emb is out.emb) and (pooled is out.pooled)
    assert logits.shape == (2, 7, 16, 24) and emb.shape == (2, DIM, 64 // stride, 96 // stride) and pooled.shape == (2, DIM)
    torch.testing.assert_close(emb, z / z.square().sum(1, keepdim=True).sqrt())
    torch.testing.assert_close(pooled, expected / expected.square().sum(1, keepdim=True).sqrt())
    assert net.encoder.stride == stride and net.encoder.dim == DIM


@pytest.mark.parametrize("dim, width, groups", [(16, 8, (2, 1, 2)), (64, 48, (12, 3, 12)), (1024, 128, (32, 8, 32))])
def test_19_classes_stride_16_and_a_width_that_follows_the_joint_space_unless_told_otherwise(dim, width, groups):
    net = SegmentationNet(make_clip("resnet", dim, layers=(1, 1, 1, 1), vocabulary=100, context=16).visual)
    assert net.encoder.stride == 16 and net.arch["num_classes"] == 19 and net.arch["width"] == width
    shapes = [(width, dim, 1, 1), (width // 4, 64, 1, 1), (width, width * 5 // 4, 3, 3)]
    parts = (net.high, net.low, net.fuse)
    assert [part[0].weight.shape for part in parts] == shapes
    assert tuple(part[1].num_groups for part in parts) == groups  # four channels in a group, where there are four
    assert net(images(1)).logits.shape[1] == 19


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_of_a_batch_do_not_see_each_other_and_train_mode_computes_what_eval_mode_computes(kind):
    net = small_net(kind)
    with torch.no_grad():
        both, alone, evaluated = net.train()(images(2)), net(images(2)[1:]), net.eval()(images(2))
    for a, b, c in zip(both, alone, evaluated):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c)


def test_the_embedding_enters_the_decoder_at_order_one_whatever_its_length():
    net = small_net("vit")
    seen = []
    net.high.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        before = net(images())
        net.encoder.visual.proj *= 10  # z ten times as long
        after = net(images())
    torch.testing.assert_close(seen[0], before.emb * DIM ** 0.5)
    assert seen[0].square().mean().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", ["high", "low"])
def test_both_branches_reach_the_logits_in_place(branch):
    """The logits in the top left corner hang on that corner of either branch, and not on the far borders."""
    net = small_net("resnet", stride=8)
    net.high[1] = net.low[1] = net.fuse[1] = nn.Identity()  # a norm's mean is over the image, and carries far
    seen = []
    getattr(net, branch).register_forward_hook(lambda _, __, output: seen.append(output))
    logits = net(images()).logits
    corner = torch.autograd.grad(logits[:, :, 0, 0].sum(), seen)[0].abs().amax(dim=(0, 1))
    assert corner[0, 0] > 1e-4 and corner[-1].max() == 0 and corner[:, -1].max() == 0


@pytest.mark.parametrize("kind, layers", [("resnet", (1, 2, 2, 2)), ("resnet", (1, 2, 3, 1)), ("vit", 4), ("vit", 3)])
@pytest.mark.parametrize("resolution", [64, 96])
def test_a_checkpoint_rebuilds_the_network_from_its_architecture_alone(kind, layers, resolution):
    net = SegmentationNet(small_clip(kind, layers=layers, resolution=resolution).visual, num_classes=5, stride=8).eval()
    arch = json.loads(json.dumps(net.arch))
    rebuilt = SegmentationNet.from_arch(arch).eval()
    assert arch == json.loads(json.dumps(net.arch)), "the caller's dict is his"
    assert rebuilt.arch == net.arch and rebuilt.encoder.visual.input_resolution == resolution
    with torch.no_grad():
        assert not torch.allclose(rebuilt(images()).logits, net(images()).logits)
        rebuilt.load_state_dict(net.state_dict())  # strict
        for a, b in zip(rebuilt(images(1, 64, 96)), net(images(1, 64, 96))):
            torch.testing.assert_close(a, b)


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
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.requires_grad)


ATTENDING = ("attnpool.q_proj.", "attnpool.k_proj.", "attnpool.positional_embedding")
RESNET_STAGES = [("conv1", "conv2", "conv3"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
VIT_STAGES = [("conv1", "ln_pre", "class_embedding", "positional_embedding"),
              *[[f"transformer.resblocks.{n}" for n in stage] for stage in ((0, 1), (2, 3), (4,), ())]]


@pytest.mark.parametrize("stages", range(6))
@pytest.mark.parametrize("kind, table, layers", [("resnet", RESNET_STAGES, (1, 2, 2, 2)), ("vit", VIT_STAGES, 5)])
def test_freeze_leaves_exactly_the_stages_behind_it_trainable_and_the_gradient_reaches_those(kind, table, layers, stages):
    """Of a CLIP that came frozen from its file. A ResNet's batch norms, and how its pool attends, stay CLIP's for ever."""
    net = SegmentationNet(small_clip(kind, layers=layers).visual.requires_grad_(False), num_classes=7, width=32).train()
    net.encoder.freeze(stages)
    visual = net.encoder.visual
    names = {name for name, _ in visual.named_parameters()}
    norms = tuple(name + "." for name, m in visual.named_modules() if isinstance(m, nn.BatchNorm2d))
    frozen = {name for name in names if name.startswith((*norms, *ATTENDING))}
    for part in sum(map(list, table[:stages]), []):
        found = {name for name in names if name == part or name.startswith(part + ".")}
        assert found, part
        frozen |= found
    assert {name for name, p in visual.named_parameters() if p.requires_grad} == names - frozen
    trainable = {f"encoder.visual.{name}" for name in names - frozen}
    trainable |= {name for name, _ in net.named_parameters() if not name.startswith("encoder.")}
    for count in (1, 3):  # 1: the baseline's loss; processes wait for ever for a gradient that never comes
        net.zero_grad(set_to_none=True)
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in net(images(1, 64, 96))[:count]).backward()
        assert {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == trainable


def test_frozen_batch_norm_stays_from_the_first_moment_through_train_mode_and_a_step_with_weight_decay():
    net = SegmentationNet.from_arch(small_net("resnet").arch)
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) > 20 and not any(m.training for m in norms.values())
    net.load_state_dict(small_net("resnet").state_dict())
    before = copy.deepcopy({name: m.state_dict() for name, m in norms.items()})
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    net.train()(5 + 3 * images()).logits.square().mean().backward()
    optimizer.step()
    assert not any(m.training for m in norms.values())
    assert net.training and net.encoder.training and net.fuse.training
    for name, m in norms.items():
        same(m.state_dict(), before[name])
    assert not any(m.training for m in net.eval().modules())


@pytest.mark.parametrize("kind, stride", [("resnet", 8), ("vit", 16)])
def test_no_tensor_stays_on_the_cpu_when_the_network_is_on_another_device(kind, stride, monkeypatch):
    """FakeTensorMode has shapes and devices and no numbers; an operation on two devices is an error, as on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know this device
    net = small_net(kind, stride).train().to_empty(device="meta")
    vtp_module = prototypes.VisualTextPrototypes(DIM, width=32).to_empty(device="meta")
    with torch._functorch.config.patch(fake_tensor_allow_meta=True), FakeTensorMode(allow_non_fake_inputs=True):
        fine = torch.zeros(2, 96, 160, dtype=torch.long, device="meta")
        otp = torch.empty(7, DIM, device="meta")
        out = net(torch.empty(2, 3, 96, 160, device="meta"))  # not the native grid, so positions are resized too
        label = torch.zeros(out.emb[:, 0].shape, dtype=torch.long, device="meta")
        vtp, weights = vtp_module(otp, out.emb, out.pooled), []
        for y, anchors in ((label, otp), (fine, vtp)):
            omega = reweight.image_reliability(reweight.reliability(out.emb, y, anchors, 0.1), y)
            weights.append(reweight.learning_weights(omega, y, 0.5, 0.1))
        logits = F.interpolate(out.logits, size=fine.shape[1:], mode="bilinear")
        loss = (weights[1] * F.cross_entropy(logits, fine, ignore_index=255, reduction="none")).mean()
        loss = loss + align.alignment_loss(out.emb, label, vtp, 0.1, weights[0])
        loss.backward()
    assert {t.device.type for t in (*out, vtp, loss, *weights)} == {"meta"}
    for name, p in [*net.named_parameters(), *vtp_module.named_parameters()]:
        assert p.grad is None if not p.requires_grad else p.grad.device.type == "meta", name


def test_the_demonstration_of_model_runs(capsys):
    model._demo()
    assert "largest difference from encode_image" in capsys.readouterr().out
