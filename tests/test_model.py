import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cli import InputError
from model import PneumoniaUNET, choose_runtime, load_checkpoint, save_checkpoint

# name: channels in, in the middle, out; read off a checkpoint of the earlier implementation
LEVELS = {
    "down_1": (1, 64, 64), "down_2": (64, 128, 128), "down_3": (128, 256, 256),
    "down_4": (256, 512, 512), "down_5": (512, 512, 512), "middle": (512, 512, 512),
    "up_5": (768, 512, 512), "up_4": (768, 512, 512), "up_3": (384, 256, 256),
    "up_2": (192, 128, 128), "up_1": (96, 64, 1)}
TRANSPOSED = {"middle_t": (512, 256), "up_5_t": (512, 256), "up_4_t": (512, 128),
              "up_3_t": (256, 64), "up_2_t": (128, 32)}
STATISTICS = ("running_mean", "running_var", "weight", "bias")


def earlier_weights(seed=0):
    """A state_dict with the names and shapes of the earlier implementation, and plausible
    values."""
    generator, weights = torch.Generator().manual_seed(seed), {}

    def add(name, convolution, shape, out):
        scale = (2 / (9 * shape[1])) ** 0.5
        weights[f"{name}.{convolution}.weight"] = torch.randn(shape, generator=generator) * scale
        weights[f"{name}.{convolution}.bias"] = torch.randn(out, generator=generator) * 0.1
        lowest = {"weight": 0.5, "bias": -0.2, "running_mean": -0.2, "running_var": 0.5}
        for key, low in lowest.items():
            weights[f"{name}.bn.{key}"] = low + torch.rand(out, generator=generator)
        weights[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
    for name, (first, middle, out) in LEVELS.items():
        add(f"{name}.0", "conv", (middle, first, 3, 3), middle)
        add(f"{name}.1", "conv", (out, middle, 3, 3), out)
    for name, (first, out) in TRANSPOSED.items():
        add(name, "conv_t", (first, out, 3, 3), out)
    return weights


def earlier_forward(weights, x):
    """The earlier network written out with functions alone, from the description of its levels."""
    def finish(name, x):
        statistics = [weights[f"{name}.bn.{key}"] for key in STATISTICS]
        return F.leaky_relu(F.batch_norm(x, *statistics, eps=1e-5), 0.03)

    def level(name, x):
        for block in (f"{name}.0", f"{name}.1"):
            weight, bias = weights[f"{block}.conv.weight"], weights[f"{block}.conv.bias"]
            x = finish(block, F.conv2d(x, weight, bias, padding=1))
        return x

    def up(name, x, skip):
        weight, bias = weights[f"{name}.conv_t.weight"], weights[f"{name}.conv_t.bias"]
        wide = F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)
        return torch.cat([skip, finish(name, wide)], dim=1)
    skips = []
    for depth in range(1, 6):
        x = level(f"down_{depth}", x)
        skips.append(x)
        x = F.max_pool2d(x, 2)
    x = level("middle", x)
    for depth, transposed in zip((5, 4, 3, 2, 1), TRANSPOSED):
        x = level(f"up_{depth}", up(transposed, x, skips[depth - 1]))
    return x


def test_earlier_checkpoint_gives_the_same_mask(tmp_path):
    weights = earlier_weights()
    path = tmp_path / "final.pth.tar"
    torch.save({"state_dict": weights, "best_threshold": np.float64(0.12)}, path)
    model, checkpoint = load_checkpoint(path)
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(images), earlier_forward(weights, images)
    assert model.config["legacy"]
    assert ours.shape == (2, 1, 64, 64) and theirs.std() > 0.01
    torch.testing.assert_close(ours.sigmoid(), theirs.sigmoid(), atol=1e-4, rtol=0)
    assert float(checkpoint["best_threshold"]) == 0.12


def test_names_and_shapes_are_the_earlier_ones_but_for_the_last_block():
    model = PneumoniaUNET(width=64)
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in earlier_weights().items()}
    assert ours == {name: theirs[name] for name in theirs if not name.startswith("up_1.1.bn")}


def test_checkpoint_rebuilds_the_model_without_any_flag(tmp_path):
    torch.manual_seed(0)
    model = PneumoniaUNET(patch_size=2, alpha_leaky=0.2, bn_eps=1e-3, bn_momentum=0.3).eval()
    save_checkpoint(tmp_path / "a.pth.tar", model, best_threshold=0.4)
    again, checkpoint = load_checkpoint(tmp_path / "a.pth.tar")
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images))
    assert again.config == model.config and checkpoint["best_threshold"] == 0.4


def test_a_network_of_a_checkpoint_before_patches_works_on_pixels(tmp_path):
    torch.manual_seed(0)
    model = PneumoniaUNET(alpha_leaky=0.2).eval()
    del model.config["patch_size"]
    save_checkpoint(tmp_path / "a.pth.tar", model)
    again, _ = load_checkpoint(tmp_path / "a.pth.tar")
    images = torch.rand(1, 1, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images))
    assert again.patch_size == 1


@pytest.mark.parametrize("rescale_factor, patch_size", [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_every_network_sees_at_most_64_patches_a_side(rescale_factor, patch_size):
    assert PneumoniaUNET.for_images(rescale_factor).patch_size == patch_size


@pytest.mark.parametrize("patch_size, smallest", [(1, 32), (4, 8), (16, 2)])
def test_images_of_too_few_patches_are_refused(patch_size, smallest):
    model = PneumoniaUNET(patch_size=patch_size)
    model.check_side(smallest)
    factor, side = 2 * smallest, 1024 // (2 * smallest)
    message = f"--rescale-factor {factor} makes images of {side} pixels .*give {smallest} or less"
    with pytest.raises(InputError, match=message):
        model.check_side(factor)


def test_the_squares_of_an_image_are_where_the_logits_are():
    """An averaging first convolution makes it the network of the averaged image, its logits
    interpolated."""
    torch.manual_seed(0)
    plain, patched = PneumoniaUNET().eval(), PneumoniaUNET(patch_size=4).eval()
    weights = plain.state_dict()
    weights["down_1.0.conv.weight"] = weights["down_1.0.conv.weight"].repeat(1, 16, 1, 1) / 16
    patched.load_state_dict(weights)
    images = torch.rand(2, 1, 256, 128)
    with torch.no_grad():
        small = plain.one_view(F.avg_pool2d(images, 4))
        expected = F.interpolate(small, (256, 128), mode="bilinear")
        torch.testing.assert_close(patched.one_view(images), expected, atol=1e-5, rtol=1e-4)


def test_untrained_network_expects_few_opacity_pixels():
    torch.manual_seed(0)
    with torch.no_grad():
        assert 0.02 < PneumoniaUNET().eval()(torch.rand(1, 1, 64, 64)).sigmoid().mean() < 0.1


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def with_another_shape():
    return {**PneumoniaUNET().state_dict(), "middle_t.bn.bias": torch.zeros(4)}


UNSAFE = "is not a checkpoint that can be loaded safely"
OTHER = "does not hold the weights of this network"


@pytest.mark.parametrize("content, message", [
    (lambda: pickle.dumps(Hostile()), UNSAFE),
    (lambda: saved({"state_dict": {}, "x": Hostile()}), UNSAFE),
    (lambda: saved({"state_dict": PneumoniaUNET().state_dict()})[:100_000], UNSAFE),
    (lambda: b"", UNSAFE),
    (lambda: saved(torch.zeros(3)), "has no state_dict"),
    (lambda: saved({"model": {}}), "has no state_dict"),
    (lambda: saved({"state_dict": torch.nn.Linear(2, 2).state_dict()}), OTHER),
    (lambda: saved({"state_dict": with_another_shape()}), OTHER),
    (lambda: saved({"state_dict": {}, "config": {"layers": 9}}), OTHER),
])
def test_bad_checkpoints_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.pth.tar"
    path.write_bytes(content())
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("content, cause", [
    (b"no checkpoint", "Unsupported operand 110"),
    (saved({"state_dict": {}, "x": Hostile()}), "Unsupported global: .* by default.")])
def test_a_refusal_names_the_cause_without_advice_to_load_unsafely(tmp_path, content, cause):
    path = tmp_path / "bad.pth.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{UNSAFE}: {cause}$"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "a.pth.tar"
    save_checkpoint(path, PneumoniaUNET())
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, PneumoniaUNET(), broken=lambda: None)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# How it runs


def test_images_are_scaled_to_0_to_1():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    loaded = choose_runtime("cpu", "fp32").load(images)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.flatten(), torch.tensor([0, 0.2, 1]))


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.02)])
def test_masks_are_probabilities_of_every_image_in_every_precision(precision, tolerance):
    torch.manual_seed(0)
    model, runtime = PneumoniaUNET(patch_size=2).eval(), choose_runtime("cpu", precision)
    images = torch.randint(256, (3, 1, 64, 64), dtype=torch.uint8)
    masks = runtime.predict_masks(model, images)
    with torch.no_grad():
        expected = model(images.float() / 255).sigmoid()[:, 0].numpy()
    assert masks.dtype == np.float32
    np.testing.assert_allclose(masks, expected, atol=tolerance)


@pytest.mark.parametrize("device, precision, message", [
    ("cpu", "fp16", "fp16 needs a GPU"), ("cuda", "auto", "--device cuda is not available here")])
def test_a_runtime_that_is_not_there_is_refused(monkeypatch, device, precision, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        choose_runtime(device, precision)


def test_auto_takes_the_cpu_where_nothing_else_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    runtime = choose_runtime("auto", "auto")
    assert runtime.device.type == "cpu" and runtime.dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("width, millions", [(64, 31.0), (32, 7.8), (16, 1.9)])
def test_the_weights_grow_with_the_square_of_the_width(width, millions):
    weights = sum(value.numel() for value in PneumoniaUNET(width=width).parameters())
    assert weights / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_file_from_before_the_width_was_an_option_has_64_channels(tmp_path):
    model = PneumoniaUNET(width=64)
    del model.config["width"]
    save_checkpoint(tmp_path / "old.pth.tar", model)
    assert load_checkpoint(tmp_path / "old.pth.tar")[0].config["width"] == 64


def test_logits_are_interpolated_in_full_precision():
    """In bf16 a mask would have a few levels between two patches."""
    torch.manual_seed(0)
    model = PneumoniaUNET(patch_size=2, width=2).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.rand(1, 1, 64, 64)).dtype == torch.float32

def test_the_mask_of_a_mirror_image_is_the_mirror_image_of_the_mask():
    model = PneumoniaUNET(patch_size=1, width=4).eval()
    torch.nn.init.normal_(model.up_1[1].conv.weight)
    images = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        masks, mirrored = model(images), model(images.flip(-1))
        one_view = model.one_view(images)
    torch.testing.assert_close(mirrored.flip(-1), masks)
    assert not torch.allclose(one_view, masks, atol=0.01)


def test_training_sees_one_view():
    model = PneumoniaUNET(patch_size=1, width=4).train()
    images = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(model(images), model.one_view(images))


def test_a_mask_of_certain_pixels_has_finite_logits():
    model = PneumoniaUNET(patch_size=1, width=4).eval()
    torch.nn.init.constant_(model.up_1[1].conv.bias, 50)
    with torch.inference_mode():
        assert model(torch.rand(1, 1, 64, 64)).isfinite().all()


def test_a_file_from_before_mirror_images_gives_one_view(tmp_path):
    model = PneumoniaUNET(patch_size=4, width=4)
    model.config.pop("mirror")
    save_checkpoint(tmp_path / "old.pth.tar", model)
    loaded, _ = load_checkpoint(tmp_path / "old.pth.tar")
    assert not loaded.mirror


def test_one_infinite_view_makes_the_mean_nan():
    model = PneumoniaUNET(patch_size=1, width=4).eval()
    model.one_view = lambda images: F.pad(images[..., :-1], (0, 1), value=torch.inf)
    logits = model(torch.full((1, 1, 1, 3), 0.5))
    assert logits.flatten()[1] == pytest.approx(0.5) and logits.flatten()[[0, 2]].isnan().all()
