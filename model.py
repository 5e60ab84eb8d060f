"""The U-Net that segments lung opacities, where it runs, and its checkpoint files."""

import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cli import IMAGE_SIDE, InputError, atomic_write, refuse_if

PATCHES_PER_SIDE = 64  # the U-Net runs on at most 64 x 64 patches
FEWEST_PATCHES = 32  # a side; five halvings leave 1
# sigmoid(-3) = 0.047: about the share of opacity pixels when positives are drawn more often
PRIOR_LOGIT = -3.0


class ConvBlock(nn.Sequential):
    """3x3 convolution, BatchNorm, LeakyReLU; the convolution alone with `plain`."""

    def __init__(self, in_channels, out_channels, *, alpha_leaky, bn_eps, bn_momentum, plain=False):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if not plain:
            self.bn = nn.BatchNorm2d(out_channels, eps=bn_eps, momentum=bn_momentum)
            self.act = nn.LeakyReLU(alpha_leaky, inplace=True)


class UpBlock(nn.Module):
    """3x3 transposed convolution of stride 2 to the size of the skip connection, BatchNorm,
    LeakyReLU; the skip connection's channels are put in front."""

    def __init__(self, in_channels, out_channels, *, alpha_leaky, bn_eps, bn_momentum):
        super().__init__()
        self.conv_t = nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(out_channels, eps=bn_eps, momentum=bn_momentum)
        self.act = nn.LeakyReLU(alpha_leaky, inplace=True)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn(self.conv_t(x, output_size=skip.shape[-2:])))
        return torch.cat([skip, x], dim=1)


class PneumoniaUNET(nn.Module):
    """U-Net of five levels on patches of `patch_size` x `patch_size` pixels.

    The pixels of a patch are the channels of the first convolution, and the patches' logits are
    interpolated to pixels: opacities are large, so this is as good as a U-Net on pixels, and takes
    1 / patch_size**2 of its time. `width` is the number of channels at the first level; the number
    of weights grows with its square. `alpha_leaky` is the negative slope of every LeakyReLU;
    `bn_momentum` and `bn_eps` follow PyTorch's convention. With `mirror`, a network in evaluation
    mode gives the mean of the masks of an image and of its mirror image (docs/experiments.md).
    `legacy` builds the network of the earlier implementation, whose last block ends in BatchNorm
    and LeakyReLU.
    """

    def __init__(self, *, patch_size: int = 1, width: int = 32, alpha_leaky: float = 0.03,
                 bn_eps: float = 1e-5, bn_momentum: float = 0.1, mirror: bool = True,
                 legacy: bool = False):
        super().__init__()
        options = {"alpha_leaky": alpha_leaky, "bn_eps": bn_eps, "bn_momentum": bn_momentum}
        self.config = {"patch_size": patch_size, "width": width, "mirror": mirror, "legacy": legacy,
                       **options}
        self.patch_size, self.mirror = patch_size, mirror

        def conv2(in_channels: int, mid_channels: int, out_channels: int,
                  plain: bool = False) -> nn.Sequential:
            return nn.Sequential(ConvBlock(in_channels, mid_channels, **options),
                                 ConvBlock(mid_channels, out_channels, plain=plain, **options))

        w = width
        self.down_1 = conv2(patch_size**2, w, w)
        self.down_2 = conv2(w, 2 * w, 2 * w)
        self.down_3 = conv2(2 * w, 4 * w, 4 * w)
        self.down_4 = conv2(4 * w, 8 * w, 8 * w)
        self.down_5 = conv2(8 * w, 8 * w, 8 * w)
        self.middle = conv2(8 * w, 8 * w, 8 * w)
        self.middle_t = UpBlock(8 * w, 4 * w, **options)
        self.up_5 = conv2(8 * w + 4 * w, 8 * w, 8 * w)
        self.up_5_t = UpBlock(8 * w, 4 * w, **options)
        self.up_4 = conv2(8 * w + 4 * w, 8 * w, 8 * w)
        self.up_4_t = UpBlock(8 * w, 2 * w, **options)
        self.up_3 = conv2(4 * w + 2 * w, 4 * w, 4 * w)
        self.up_3_t = UpBlock(4 * w, w, **options)
        self.up_2 = conv2(2 * w + w, 2 * w, 2 * w)
        self.up_2_t = UpBlock(2 * w, w // 2, **options)
        self.up_1 = conv2(w + w // 2, w, 1, plain=not legacy)
        self._initialize(alpha_leaky)

    @classmethod
    def for_images(cls, rescale_factor: int, **options: float) -> "PneumoniaUNET":
        """The network for images of IMAGE_SIDE / rescale_factor pixels a side."""
        patch_size = max(1, IMAGE_SIDE // rescale_factor // PATCHES_PER_SIDE)
        return cls(patch_size=patch_size, **options)

    def check_side(self, rescale_factor: int, batch_size: int | None = None) -> None:
        """Raises InputError if images would have fewer than FEWEST_PATCHES a side or, in training
        in such batches, BatchNorm a single value per channel."""
        side, smallest = IMAGE_SIDE // rescale_factor, FEWEST_PATCHES * self.patch_size
        refuse_if(side < smallest, f"--rescale-factor {rescale_factor} makes images of {side} "
                  f"pixels a side, but the checkpoint's network takes {smallest} and more: give "
                  f"{IMAGE_SIDE // smallest} or less")
        refuse_if(side == smallest and batch_size == 1, "--batch-size 1 leaves BatchNorm one value "
                  f"per channel at --rescale-factor {rescale_factor}: give 2 or more")

    def _initialize(self, alpha_leaky):
        """He initialization (arXiv:1502.01852); the last bias is a prior (arXiv:1708.02002)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, a=alpha_leaky)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.up_1[1].conv.weight, std=0.01)
        nn.init.constant_(self.up_1[1].conv.bias, PRIOR_LOGIT)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 1, P * H, P * W) in 0..1 -> mask logits of the same shape; P: patch size."""
        if self.training or not self.mirror:
            return self.one_view(images)
        views = torch.stack([self.one_view(images), self.one_view(images.flip(-1)).flip(-1)])
        # not the logit of the mean itself, which rounds probabilities near 1 to 1
        above, below = (F.logsigmoid(sign * views).logsumexp(0) for sign in (1, -1))
        return (above - below).where(views.isfinite().all(0), torch.nan)

    def one_view(self, images: torch.Tensor) -> torch.Tensor:
        """What forward returns, of the images alone without their mirror images."""
        x = F.pixel_unshuffle(images, self.patch_size)    # (B, P * P, H, W)
        down_1 = self.down_1(x)                           # (B, w, H, W), w: width
        down_2 = self.down_2(F.max_pool2d(down_1, 2))     # (B, 2w, H/2, W/2)
        down_3 = self.down_3(F.max_pool2d(down_2, 2))     # (B, 4w, H/4, W/4)
        down_4 = self.down_4(F.max_pool2d(down_3, 2))     # (B, 8w, H/8, W/8)
        down_5 = self.down_5(F.max_pool2d(down_4, 2))     # (B, 8w, H/16, W/16)
        middle = self.middle(F.max_pool2d(down_5, 2))     # (B, 8w, H/32, W/32)
        x = self.up_5(self.middle_t(middle, down_5))      # (B, 8w, H/16, W/16)
        x = self.up_4(self.up_5_t(x, down_4))             # (B, 8w, H/8, W/8)
        x = self.up_3(self.up_4_t(x, down_3))             # (B, 4w, H/4, W/4)
        x = self.up_2(self.up_3_t(x, down_2))             # (B, 2w, H/2, W/2)
        logits = self.up_1(self.up_2_t(x, down_1))        # (B, 1, H, W)
        return F.interpolate(logits.float(), images.shape[-2:], mode="bilinear")


class Runtime(NamedTuple):
    """Where a network runs, in which precision, and in how many processes (parallel.py)."""
    device: torch.device
    dtype: torch.dtype  # of autocast
    rank: int = 0  # of this process
    world: int = 1  # number of processes

    def load(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 1, S, S) in 0..255 -> float32 in 0..1 on the device, channels last."""
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images.float().div_(255)

    def segment(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """images float (B, 1, S, S) in 0..1 -> mask logits (B, 1, S, S), float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return model(images).float()

    @torch.inference_mode()
    def predict_masks(self, model: nn.Module, images: torch.Tensor) -> np.ndarray:
        """images uint8 (B, 1, S, S) -> mask probabilities (B, S, S), NaN where the network's value
        is not finite."""
        logits = self.segment(model, self.load(images))[:, 0]
        return logits.sigmoid().where(logits.isfinite(), torch.nan).cpu().numpy()


def choose_runtime(device: str, precision: str) -> Runtime:
    """Resolves `auto`: CUDA where it is available, else the CPU, in the fastest precision that it
    computes natively. Raises InputError for CUDA that is not available and fp16 on a CPU."""
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    refuse_if(device == "cuda" and not has_cuda,
              "--device cuda is not available here; use --device auto")
    refuse_if(device == "cpu" and precision == "fp16",
              "--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if precision == "auto":
        precision = _fastest_precision(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return Runtime(torch.device(device), dtype)


def _fastest_precision(device):
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    cpu_info = Path("/proc/cpuinfo")  # Linux: its flags name the bf16 units
    has_bf16 = cpu_info.exists() and "avx512_bf16" in cpu_info.read_text()
    return "bf16" if has_bf16 else "fp32"


def save_checkpoint(path: Path, model: PneumoniaUNET, **state: Any) -> None:
    """Writes the weights, the config that rebuilds the model, and `state` (plain values and
    tensors), atomically."""
    content = io.BytesIO()  # torch.save to a file would hide the error of a full disk
    torch.save({"state_dict": model.state_dict(), "config": model.config, **state}, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[PneumoniaUNET, dict]:
    """Rebuilds a model from a checkpoint of ours or of the earlier implementation, without
    executing anything in the file.

    Returns the model on `device` in evaluation mode, and the checkpoint's dictionary. Raises
    InputError with the reason if the file is broken, holds anything but plain values and tensors,
    or belongs to another network.
    """
    checkpoint = _read_checkpoint(path, device)
    weights = checkpoint["state_dict"]
    config = checkpoint.get("config") or {"legacy": "up_1.1.bn.weight" in weights}
    try:
        # of all networks before these were options
        model = PneumoniaUNET(**{"width": 64, "mirror": False} | config)
        model.load_state_dict(weights)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} does not hold the weights of this network: {reason:.300}") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def _read_checkpoint(path, device):
    # best_threshold of the earlier implementation is a NumPy scalar, under NumPy 1's module name
    scalar = np.float64(0).__reduce__()[0]
    safe = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(safe):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a broken or hostile file raises many types
        reason = " ".join(str(error).split()) or type(error).__name__
        # the cause alone: PyTorch's advice around it is to load the file unsafely
        reason = re.sub(".*WeightsUnpickler error: | (Please use|Check the doc).*", "", reason)
        raise InputError(
            f"{path} is not a checkpoint that can be loaded safely: {reason:.200}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{path} is not a checkpoint of this project: it has no state_dict")
    return checkpoint
