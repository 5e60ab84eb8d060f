"""The U-Net that segments lung opacities, and its checkpoint files."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from job import InputError, atomic_write

GRID = 64  # squares a side in which our networks see an image, whatever its pixels
SMALLEST_GRID = 32  # at which the five halvings leave 1
PRIOR_LOGIT = -3.0  # sigmoid(-3) = 0.047: about the share of opacity pixels when positives are drawn more often


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm, LeakyReLU; the convolution alone with `plain`."""

    def __init__(self, in_channels, out_channels, *, alpha_leaky, bn_eps, bn_momentum, plain=False):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn = nn.Identity() if plain else nn.BatchNorm2d(out_channels, eps=bn_eps, momentum=bn_momentum)
        self.act = nn.Identity() if plain else nn.LeakyReLU(alpha_leaky, inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class UpBlock(nn.Module):
    """3x3 transposed convolution of stride 2 to the size of the skip connection, BatchNorm, LeakyReLU."""

    def __init__(self, in_channels, out_channels, *, alpha_leaky, bn_eps, bn_momentum):
        super().__init__()
        self.conv_t = nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(out_channels, eps=bn_eps, momentum=bn_momentum)
        self.act = nn.LeakyReLU(alpha_leaky, inplace=True)

    def forward(self, x, skip):
        x = self.act(self.bn(self.conv_t(x, output_size=skip.shape[-2:])))
        return torch.cat([skip, x], dim=1)


class PneumoniaUNET(nn.Module):
    """U-Net of five levels on squares of `patch_size` x `patch_size` pixels.

    The pixels of a square are the channels of the first convolution, and the logits of the squares are interpolated to
    pixels: opacities are large, so this is as good as a U-Net on pixels, and takes 1 / patch_size**2 of its time.
    `alpha_leaky` is the negative slope of every LeakyReLU; `bn_momentum` and `bn_eps` follow PyTorch's convention.
    `earlier` builds the network of the earlier implementation, whose last block ends in BatchNorm and LeakyReLU.
    """

    def __init__(self, *, patch_size=1, alpha_leaky=0.03, bn_eps=1e-5, bn_momentum=0.1, earlier=False):
        super().__init__()
        options = {"alpha_leaky": alpha_leaky, "bn_eps": bn_eps, "bn_momentum": bn_momentum}
        self.config = {"patch_size": patch_size, "earlier": earlier, **options}
        self.patch_size = patch_size

        def conv2(in_channels, mid_channels, out_channels, plain=False):
            return nn.Sequential(ConvBlock(in_channels, mid_channels, **options),
                                 ConvBlock(mid_channels, out_channels, plain=plain, **options))

        self.down_1 = conv2(patch_size**2, 64, 64)
        self.down_2 = conv2(64, 128, 128)
        self.down_3 = conv2(128, 256, 256)
        self.down_4 = conv2(256, 512, 512)
        self.down_5 = conv2(512, 512, 512)
        self.middle = conv2(512, 512, 512)
        self.middle_t = UpBlock(512, 256, **options)
        self.up_5 = conv2(512 + 256, 512, 512)
        self.up_5_t = UpBlock(512, 256, **options)
        self.up_4 = conv2(512 + 256, 512, 512)
        self.up_4_t = UpBlock(512, 128, **options)
        self.up_3 = conv2(256 + 128, 256, 256)
        self.up_3_t = UpBlock(256, 64, **options)
        self.up_2 = conv2(128 + 64, 128, 128)
        self.up_2_t = UpBlock(128, 32, **options)
        self.up_1 = conv2(64 + 32, 64, 1, plain=not earlier)
        self._initialize(alpha_leaky)

    def _initialize(self, alpha_leaky):
        """He initialization (arXiv:1502.01852); the last bias is a prior for rare pixels (arXiv:1708.02002, 4.1)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, a=alpha_leaky)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.up_1[1].conv.weight, std=0.01)
        nn.init.constant_(self.up_1[1].conv.bias, PRIOR_LOGIT)

    def forward(self, images):
        """images (B, 1, P * H, P * W) in 0..1 -> mask logits of the same shape, P the patch size."""
        x = F.pixel_unshuffle(images, self.patch_size)    # (B, P * P, H, W)
        down_1 = self.down_1(x)                           # (B, 64, H, W)
        down_2 = self.down_2(F.max_pool2d(down_1, 2))     # (B, 128, H/2, W/2)
        down_3 = self.down_3(F.max_pool2d(down_2, 2))     # (B, 256, H/4, W/4)
        down_4 = self.down_4(F.max_pool2d(down_3, 2))     # (B, 512, H/8, W/8)
        down_5 = self.down_5(F.max_pool2d(down_4, 2))     # (B, 512, H/16, W/16)
        middle = self.middle(F.max_pool2d(down_5, 2))     # (B, 512, H/32, W/32)
        x = self.up_5(self.middle_t(middle, down_5))      # (B, 512, H/16, W/16)
        x = self.up_4(self.up_5_t(x, down_4))             # (B, 512, H/8, W/8)
        x = self.up_3(self.up_4_t(x, down_3))             # (B, 256, H/4, W/4)
        x = self.up_2(self.up_3_t(x, down_2))             # (B, 128, H/2, W/2)
        logits = self.up_1(self.up_2_t(x, down_1))        # (B, 1, H, W)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")


def save_checkpoint(path, model, **state):
    """Writes the model, what rebuilds it, and `state` (plain values and tensors) to `path`, whole or not at all."""
    with atomic_write(path) as file:
        try:
            torch.save({"state_dict": model.state_dict(), "config": model.config, **state}, file)
        except RuntimeError as error:  # where a write fails, torch complains of its own position in the file
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_checkpoint(path, device="cpu"):
    """Rebuilds a model from a checkpoint of ours or of the earlier implementation; nothing in the file is executed.

    Returns the model on `device` in evaluation mode, and the checkpoint's dictionary. Raises InputError with the reason
    if the file is missing or broken, holds anything but plain values and tensors, or belongs to another network.
    """
    checkpoint = _read_checkpoint(path, device)
    weights = checkpoint["state_dict"]
    config = checkpoint.get("config") or {"earlier": "up_1.1.bn.weight" in weights}
    try:
        model = PneumoniaUNET(**config)
        model.load_state_dict(weights)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not hold the weights of this network: {reason:.300}") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def _read_checkpoint(path, device):
    # best_threshold of an earlier checkpoint is a NumPy scalar; NumPy 1 wrote it under its old module name
    scalar = np._core.multiarray.scalar
    safe = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(safe):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a broken or hostile file raises many types; each means that it cannot be loaded
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is no checkpoint that can be loaded safely: {reason:.200}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{path} is no checkpoint of this project: it has no state_dict")
    return checkpoint
