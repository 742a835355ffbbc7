"""take_step in all its kinds: parts, precisions, optimisers, losses, locked towers, checkpointed blocks."""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
from open_clip.model import resize_pos_embed
from torch.utils.checkpoint import checkpoint

from pipeline.clip_model import find_clip, open_model
from pipeline.errors import ConfigError, ModelError
from training.checkpoint import RunState, load_resume, snapshot, write_save
from training.config import TrainConfig
from training.data import Batch, open_batches
from training.flops import count_flops, peak_of
from training.images import read_crop
from training.index import list_tars, read_index
from training.loss import sigmoid_loss
from training.optim import build_optimizer
from training.order import step_seed
from training.run import train
from training.start import check_trainable, find_start, lock_text, open_start, resize_positions, set_checkpointing
from training.step import backward_in_parts, backward_whole, measure_loss, move_batch, take_step
from training.world import ALONE

CPU = torch.device("cpu")
ADAN = {"optimizer": "adan", "beta1": 0.98, "beta2": 0.92, "beta3": 0.99}


def make_config(**values):
    return TrainConfig(**{"model": "winnow-vit-tiny", "samples": 1280, "batch_size": 32, "warmup_steps": 2} | values)


def start_run(config):
    opened = open_start(find_start(config.model, None, out="absent"), config, device=CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=config.precision == "fp16")
    never_N = torch.zeros(256, dtype=torch.bool)
    state = RunState(opened.model, build_optimizer(opened.model, config), never_N, never_N.clone(), scaler)
    return state, read_crop(opened.train_transform)


@pytest.fixture(scope="module")
def batches(squares):
    """Four batches of 32 rows for the tiny models, which have the same tokens and crop."""
    opened = open_model("winnow-vit-tiny")
    index = read_index(list_tars(str(squares)), tokenize=opened.tokenize, quiet=True)
    return list(open_batches(index, crop=read_crop(opened.train_transform), batch_size=32, seed=0, steps=range(4)))


def weights_after(config, batches, state=None):
    state, crop = state or start_run(config)
    losses = [take_step(config, state, batch, crop, with_norm=False)[0].item() for batch in batches]
    assert all(map(math.isfinite, losses))
    return losses, {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


@pytest.mark.parametrize("values", [{}, {"loss": "siglip"}, {"model": "winnow-vitamin-tiny"}])
def test_in_parts_loss_and_gradients_are_the_whole_batchs(batches, values):
    found = []
    for run, parts in ((backward_whole, 1), (backward_in_parts, 4)):
        config = make_config(accum_freq=parts, **values)
        state, crop = start_run(config)
        loss = run(config, state, *move_batch(batches[0], crop, CPU))
        found.append((loss, {name: p.grad for name, p in state.model.named_parameters()}))
    (whole, whole_grads), (parts, part_grads) = found
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, gradient in whole_grads.items():
        assert torch.allclose(part_grads[name], gradient, rtol=1e-4, atol=1e-6), name


def test_in_parts_both_passes_drop_the_same_patches(batches):
    config = make_config(patch_dropout=0.5, accum_freq=2)
    state, crop = start_run(config)
    images, tokens = move_batch(batches[0], crop, CPU)
    loss = backward_in_parts(config, state, images, tokens)
    gradients = [p.grad.clone() for p in state.model.parameters()]
    state.model.zero_grad()
    features = []
    for number, (image, token) in enumerate(zip(images.chunk(2), tokens.chunk(2), strict=True)):
        torch.manual_seed(step_seed(config.seed, 0) + number)
        encoded = state.model.encode_image(image, normalize=True), state.model.encode_text(token, normalize=True)
        features.append(encoded)
    image_BD, text_BD = (torch.cat(part) for part in zip(*features, strict=True))
    wanted = measure_loss(config, ALONE, image_BD, text_BD, state.model.logit_scale.exp())
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for gradient, parameter in zip(gradients, state.model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_in_parts_running_statistics_see_each_part_once():
    norm = torch.nn.BatchNorm1d(4)
    model = torch.nn.Module()
    model.norm, model.logit_scale = norm, torch.nn.Parameter(torch.tensor(1.0))
    model.encode_image = model.encode_text = lambda x, normalize: norm(x.float())
    config = make_config(accum_freq=2)
    state = RunState(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(1), torch.zeros(1))
    images, tokens = torch.randn(8, 4), torch.randint(9, (8, 4))
    backward_in_parts(config, state, images, tokens)
    once = torch.nn.BatchNorm1d(4)
    for image, token in zip(images.chunk(2), tokens.chunk(2), strict=True):
        once(image), once(token.float())
    assert torch.allclose(norm.running_mean, once.running_mean) and norm.momentum == 0.1


@pytest.mark.parametrize(
    "values",
    [{"optimizer": "lamb"}, {"optimizer": "lion"}, {"optimizer": "muon"}, ADAN, {"precision": "fp16"}],
    ids=["lamb", "lion", "muon", "adan", "fp16"],
)
def test_saved_in_the_middle_a_run_goes_on_bit_for_bit(batches, tmp_path, values):
    config = make_config(**values)
    whole = weights_after(config, batches)
    first, crop = start_run(config)
    losses, _ = weights_after(config, batches[:2], (first, crop))
    write_save(str(tmp_path), snapshot(first, identity="x"), keep=1)
    second, _ = start_run(config)
    assert load_resume(str(tmp_path), second, identity="x") and second.step == 2
    more, weights = weights_after(config, batches[2:], (second, crop))
    assert losses + more == whole[0]
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in weights.items())
    assert not torch.equal(weights["logit_scale"], start_run(config)[0].model.logit_scale)


def test_fp16_passes_over_a_step_that_overflows(batches):
    config = make_config(precision="fp16")
    state, crop = start_run(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    _, norm = take_step(config, state, batches[0], crop, with_norm=True)
    assert not math.isfinite(norm) and state.scaler.get_scale() == 2.0**99
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    config = make_config(optimizer="muon")
    state, _ = start_run(config)
    names = {id(p): name for name, p in state.model.named_parameters()}
    plain, tables, matrices = ([names[id(p)] for p in g["params"]] for g in state.optimizer.param_groups)
    assert set(tables) == {"positional_embedding", "token_embedding.weight", "visual.positional_embedding"}
    assert state.optimizer.param_groups[1]["use_fallback"] and not any("embedding" in name for name in matrices)
    assert len(plain) + len(tables) + len(matrices) == len(names)


def test_muon_takes_matrices_alone():
    shapes = {
        "weight": (8, 8),
        "conv": (8, 3, 2, 2),
        "latent": (1, 1, 8),
        "temperature": (4, 1, 1),
        "bias_table": (9, 4),
    }
    model = torch.nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
        getattr(model, name).grad = torch.ones(shape)
    optimizer = build_optimizer(model, make_config(optimizer="muon"))
    optimizer.step()
    taken = {name for name, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert taken == {"weight", "conv"}


@pytest.mark.parametrize("parts", [1, 2])
def test_blocks_computed_again_count_once_in_running_statistics(parts):
    """So that grad_checkpointing changes nothing, as its absence from a run's identity says."""
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        norm = torch.nn.BatchNorm1d(4)
        block = functools.partial(checkpoint, norm, use_reentrant=False) if is_checkpointed else norm
        model = torch.nn.Module()
        model.norm, model.logit_scale = norm, torch.nn.Parameter(torch.tensor(1.0))
        model.encode_image = model.encode_text = lambda x, normalize, block=block: block(x.float().requires_grad_())
        state = RunState(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(1), torch.zeros(1))
        run = backward_whole if parts == 1 else backward_in_parts
        run(make_config(accum_freq=parts), state, torch.randn(8, 4), torch.randint(9, (8, 4)))
        found.append(norm.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert found[0]["num_batches_tracked"] == 2 * parts


@pytest.mark.parametrize("which", ["all", "conv"])
def test_checkpointed_blocks_give_the_same_weights(batches, which):
    plain, checkpointed = (
        weights_after(make_config(model="winnow-vitamin-tiny", grad_checkpointing=how), batches[:2])
        for how in ("none", which)
    )
    assert plain[0] == checkpointed[0]
    assert all(torch.equal(tensor, checkpointed[1][name]) for name, tensor in plain[1].items())


def test_blocks_that_are_not_there_cannot_be_checkpointed():
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    model = open_clip.CLIP(8, vision, text)
    set_checkpointing(model, "none")
    with pytest.raises(ConfigError, match="grad_checkpointing all: the model's image tower has none"):
        set_checkpointing(model, "all")


def test_siglip_begins_at_its_own_scale_and_bias_from_clips_weights(squares, tmp_path, caplog):
    clip, same = make_config(samples=32, report_to=()), {"samples": 32, "loss": "siglip", "learning_rate": 1e-9}
    train(clip, data=str(squares), out=str(tmp_path / "clip"), quiet=True)
    for init, out, told in (("clip", "first", True), ("first", "second", False)):
        caplog.clear()
        places = {"out": str(tmp_path / out), "init": str(tmp_path / init)}
        train(replace(clip, **same), data=str(squares), **places, quiet=True)
        found = torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["state_dict"]
        assert (float(found["logit_scale"].exp()), float(found["logit_bias"])) == pytest.approx((10, -10), rel=1e-5)
        assert ("no logit bias, so SigLIP's loss begins with scale 10" in caplog.text) == told


def test_conv_stages_are_vitamins():
    with pytest.raises(ConfigError, match="for ViTamin"):
        start_run(make_config(grad_checkpointing="conv"))
    state, _ = start_run(make_config(model="winnow-vitamin-tiny", grad_checkpointing="conv"))
    trunk = state.model.visual.trunk
    assert trunk.patch_embed.backbone.grad_checkpointing and not trunk.grad_checkpointing


@pytest.mark.parametrize("rows", [2, 7, 64])
def test_sigmoid_loss_and_gradients_equal_open_clips(rows):
    torch.manual_seed(rows)
    image_BD, text_BD = (
        torch.nn.functional.normalize(torch.randn(rows, 16), dim=-1).requires_grad_() for _ in range(2)
    )
    scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    given = [image_BD, text_BD, scale, bias]
    ours, theirs = sigmoid_loss(*given), open_clip.loss.SigLipLoss()(*given)
    assert ours.item() == theirs.item()
    for a, b in zip(*(torch.autograd.grad(loss, given) for loss in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_a_siglip_run_opens_with_its_bias(squares, tmp_path):
    config = make_config(loss="siglip", samples=64)
    train(config, data=str(squares), out=str(tmp_path), quiet=True)
    model = open_model(str(tmp_path)).model
    theirs = open_clip.create_model(
        "winnow-vit-tiny", pretrained=str(tmp_path / "checkpoint.pt"), init_logit_bias=-10.0
    )
    assert torch.equal(model.logit_bias, theirs.logit_bias) and model.logit_bias.item() != -10
    assert model.logit_scale.exp().item() == pytest.approx(10, abs=0.1)


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    train(make_config(samples=32), data=str(squares), out=str(out), quiet=True)
    return out


def test_a_locked_text_tower_is_anothers_and_stays(trained, squares, tmp_path):
    config = make_config(model="winnow-vitamin-tiny", samples=64, lock_text=str(trained), accum_freq=2)
    manifest = train(config, data=str(squares), out=str(tmp_path), quiet=True)
    assert set(manifest.parents) == {"data", "lock_text"}
    tokens = torch.randint(1, 400, (4, 16))
    given, ours = (open_model(str(folder)).model for folder in (trained, tmp_path))
    assert torch.equal(given.encode_text(tokens), ours.encode_text(tokens))
    fresh = open_model("winnow-vitamin-tiny").model
    assert not torch.equal(fresh.logit_scale, ours.logit_scale)


def test_a_text_tower_that_cannot_be_locked_is_named(trained):
    with pytest.raises(ModelError, match=r"winnow-vit-small|another than the model's"):
        start_run(make_config(model="winnow-vit-small", lock_text=str(trained)))
    with pytest.raises(ConfigError, match="names no weights"):
        start_run(make_config(lock_text="winnow-vit-tiny"))


def test_a_text_tower_of_the_same_shapes_that_computes_something_else_is_not_locked(trained):
    model = open_model("winnow-vit-tiny").model
    model.text_pool_type = "last"
    with pytest.raises(ModelError, match="computes something else"):
        lock_text(model, str(trained))


def test_models_that_would_not_be_trained_as_asked_are_refused():
    visual = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="is a CoCa"):
        check_trainable(SimpleNamespace(text_decoder=visual, visual=visual), make_config())
    with pytest.raises(ConfigError, match="no patches to drop"):
        check_trainable(SimpleNamespace(visual=visual), make_config(patch_dropout=0.5))


def test_positions_are_resampled_as_open_clip_and_timm_do():
    torch.manual_seed(0)
    given, wanted = torch.randn(1 + 49, 8), torch.zeros(1 + 144, 8)
    name = "visual.positional_embedding"
    theirs = {name: given}
    resize_pos_embed(theirs, SimpleNamespace(visual=SimpleNamespace(grid_size=12)))
    assert torch.allclose(resize_positions({name: given}, {name: wanted})[name], theirs[name], atol=1e-6)
    open_model("winnow-vitamin-tiny")  # registers the backbone
    trunk = timm.create_model("winnow_vitamin_tiny_32")
    small = trunk.pos_embed.detach().clone()
    trunk.set_input_size(64)
    name = "visual.trunk.pos_embed"
    ours = resize_positions({name: small}, {name: trunk.pos_embed})[name]
    assert ours.shape != small.shape and torch.allclose(ours, trunk.pos_embed, atol=1e-6)


def test_a_resolution_stage_is_known_by_its_architecture(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"never read")
    start = find_start("ViTamin-L-336", f"ViTamin-L@{tmp_path}/weights.pt", out=str(tmp_path / "out"))
    assert start.architecture == "ViTamin-L-336" and find_clip(start.model).architecture == "ViTamin-L"
    for other in ("ViTamin-L2", "ViTamin-B"):
        with pytest.raises(ConfigError, match="is a ViTamin-L"):
            find_start(other, f"ViTamin-L@{tmp_path}/weights.pt", out=str(tmp_path / "out"))


def test_constant_schedule_stays():
    from training.optim import learning_rate_at

    config = make_config(schedule="constant", warmup_steps=4)
    rates = [learning_rate_at(step, config) / config.learning_rate for step in range(8)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_flops_are_three_forwards_of_the_known_cost():
    model = open_model("winnow-vit-tiny").model
    width, tokens, mlp = 128, 17, 4
    block = 2 * tokens * width * width * (4 + 2 * mlp) + 2 * 2 * tokens * tokens * width
    image = 2 * 16 * 3 * 8 * 8 * width + 4 * block + 2 * width * 128
    context, text_width = 16, 96
    text_block = 2 * context * text_width * text_width * (4 + 2 * mlp) + 2 * 2 * context * context * text_width
    text = 2 * text_block + 2 * text_width * 128
    assert count_flops(model, context_length=16) == pytest.approx(3 * (image + text))
    assert count_flops(model, context_length=16, token_share=0.5) == pytest.approx(3 * (image + text / 2))
    model.lock_text_tower()
    assert count_flops(model, context_length=16) == pytest.approx(3 * image + text)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_is_that_of_the_whole_name(name, tera):
    assert peak_of(name) == (tera and tera * 1e12)


QUICK = ["efficientformerv2_s0"]
SLOW = [
    "volo_d1_224", "crossvit_9_240", "nextvit_small", "efficientformer_l1", "coatnet_nano_rw_224", "levit_128s",
    "pit_ti_224", "mobilevitv2_050", "fastvit_t8", "caformer_s18", "maxvit_nano_rw_256", "xcit_nano_12_p16_224",
    "pvt_v2_b0", "twins_svt_small", "cait_xxs24_224", "davit_tiny", "hiera_tiny_224", "tiny_vit_5m_224",
    "swiftformer_xs", "edgenext_xx_small", "convit_tiny", "visformer_tiny", "poolformerv2_s12", "repvit_m0_9",
]  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_timm_backbone_is_built_and_stepped(name):
    config = make_config(model=f"timm:{name}", samples=2, batch_size=2)
    state, crop = start_run(config)
    torch.manual_seed(0)
    pixels = torch.randint(256, (2, crop.height_px, crop.width_px, 3), dtype=torch.uint8)
    row_B, none = torch.arange(2), torch.empty(0, dtype=torch.int64)
    batch = Batch(pixels, torch.randint(1, 49000, (2, 77), dtype=torch.int32), row_B, none)
    loss, norm = take_step(config, state, batch, crop, with_norm=True)
    assert math.isfinite(loss) and math.isfinite(norm)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in state.model.visual.parameters()) > 10
    assert count_flops(state.model, context_length=77) > 1e9


def test_an_unknown_timm_backbone_gets_near_names():
    with pytest.raises(ConfigError, match="volo_d1_224"):
        find_clip("timm:volo_d1_225")
