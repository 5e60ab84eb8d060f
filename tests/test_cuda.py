"""The CUDA path without a card: fake tensors have a device, a dtype and a shape, but no values. An
operation on two devices, or one that looks at a value, fails here as it would cost time there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import train
from engine import combined_loss, evaluate, train_one_epoch
from metrics import Thresholds
from model import PneumoniaUNET, Runtime

CUDA, SIDE, COUNT = torch.device("cuda", 0), 64, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Operations(TorchDispatchMode):
    """Keeps the devices and the dtypes of what is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.seen.append(([one.device for one in tensors], [one.device for one in outputs],
                          [one.dtype for one in outputs]))
        return result

    def copies(self, source, target):
        """How many operations take a tensor of one kind of device and make one of another."""
        return sum(source in {device.type for device in inputs}
                   and target in {device.type for device in outputs}
                   for inputs, outputs, _ in self.seen)


@pytest.fixture
def cuda(monkeypatch):
    """Fake tensors, and answers where PyTorch would ask for a driver."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with torch.backends.cudnn.flags(enabled=False), FakeTensorMode():
        try:
            torch.nn.Conv2d(1, 1, 1, device=CUDA)
        except RuntimeError:
            pytest.skip(f"PyTorch {torch.__version__} needs a driver to draw fake weights")
        yield monkeypatch


@pytest.fixture(params=DTYPES, ids=str)
def runtime(cuda, request):
    return Runtime(CUDA, request.param)


@pytest.fixture
def model(cuda):
    """A network on the card; fake weights cannot be moved, so it is made there and stays."""
    with CUDA:
        model = PneumoniaUNET.for_images(16, width=4)
    cuda.setattr(PneumoniaUNET, "to", lambda model, *_, **__: model)
    return model


@pytest.fixture
def batch(cuda):
    """Images and masks uint8 as they come from the data set."""
    return [torch.zeros(COUNT, 1, SIDE, SIDE, dtype=torch.uint8) for _ in range(2)]


class Batches(list):
    """A loader of batches that are there already."""
    sampler, dataset = SimpleNamespace(batch_size=COUNT), range(5 * COUNT)


@pytest.fixture
def training(model, batch, runtime):
    """A training of five steps an epoch."""
    args = train.parse_args(["--rescale-factor", "16", "--width", "4"])
    return train.build_training(model, Batches([batch] * 5), args, runtime)


def test_augmentation_stays_on_the_card_and_waits_for_nothing(training, batch):
    images, masks = batch
    with Operations() as operations:
        masks = masks.to(CUDA, non_blocking=True).float()
        images, masks = training.augmentation(training.runtime.load(images), masks)
    assert images.device == masks.device == CUDA and images.dtype == masks.dtype == torch.float32
    assert operations.copies("cpu", "cuda") == 4  # images, masks, warp and exposure
    assert operations.copies("cuda", "cpu") == 0


def test_images_are_channels_last_and_divided_on_the_card(runtime, batch):
    with Operations() as operations:
        images = runtime.load(batch[0])
    assert images.is_contiguous(memory_format=torch.channels_last)
    copied = [dtypes for inputs, outputs, dtypes in operations.seen
              if inputs[0].type == "cpu" and outputs]
    assert copied == [[torch.uint8]]
    *_, (inputs, *_) = operations.seen
    assert inputs == [CUDA]


def watch_convolutions(model):
    """A list that takes the dtype of each convolution's result."""
    dtypes = []
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            module.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    return dtypes


def test_convolutions_run_in_the_dtype_asked_for_and_the_loss_in_float32(model, runtime, batch):
    images = runtime.load(batch[0])
    convolved = watch_convolutions(model)
    with Operations() as operations:
        logits = runtime.segment(model.train(), images)
        loss = combined_loss(logits, torch.ones_like(images))
    assert set(convolved) == {runtime.dtype}
    assert logits.dtype == loss.dtype == torch.float32 and logits.device == loss.device == CUDA
    assert operations.copies("cuda", "cpu") == operations.copies("cpu", "cuda") == 0


def give_gradients(training, monkeypatch):
    """Makes `backward`, which needs a card, give every weight a gradient at once."""
    def backward(loss):
        assert loss.device == CUDA and loss.dtype == torch.float32
        for weight in training.model.parameters():
            weight.grad = torch.zeros_like(weight)
    monkeypatch.setattr(torch.Tensor, "backward", backward)


@pytest.mark.parametrize("runtime", [torch.float32, torch.bfloat16], indirect=True, ids=str)
def test_an_epoch_looks_at_values_once_in_check_steps(training, cuda):
    give_gradients(training, cuda)
    cuda.setattr(engine, "CHECK_STEPS", 2)
    looks = []
    cuda.setattr(FakeTensor, "tolist", lambda self: looks.append(len(self)) or [0.5] * len(self))
    with Operations() as operations:
        loss, _ = train_one_epoch(training, lambda *_: None)
    assert looks == [2, 2, 1] and loss == pytest.approx(0.5)
    assert operations.copies("cuda", "cpu") == 0
    assert training.optimizer.defaults["fused"]


@pytest.mark.parametrize("runtime", [torch.float16], indirect=True, ids=str)
def test_float16_scales_the_loss_on_the_card(training, batch):
    assert training.scaler.is_enabled()
    scaled = training.scaler.scale(torch.ones((), device=CUDA))
    assert scaled.device == CUDA and scaled.dtype == torch.float32


def fake_values(monkeypatch):
    """Lets fake tensors that are on the host hand out values."""
    def numpy(tensor):
        assert tensor.device.type == "cpu"
        return np.full(tensor.shape, 0.5, np.float32)
    monkeypatch.setattr(FakeTensor, "numpy", numpy)
    monkeypatch.setattr(FakeTensor, "item", lambda tensor: 0.5)


def test_prediction_copies_images_there_and_float32_masks_back(model, runtime, batch, cuda):
    fake_values(cuda)
    convolved = watch_convolutions(model)
    with Operations() as operations:
        masks = runtime.predict_masks(model.eval(), batch[0])
    assert masks.shape == (COUNT, SIDE, SIDE) and masks.dtype == np.float32
    assert operations.copies("cpu", "cuda") == operations.copies("cuda", "cpu") == 1
    assert set(convolved) == {runtime.dtype}


class Study:
    """A data set of fake batches."""
    original_sizes, boxes, views = [(1024, 1024)] * 4, [np.zeros((0, 4))] * 4, [""] * 4

    def __getitem__(self, indices):
        return [torch.zeros(len(indices), 1, SIDE, SIDE, dtype=torch.uint8) for _ in range(2)]


def test_evaluation_copies_the_masks_of_a_batch_once(model, runtime, cuda):
    fake_values(cuda)
    with Operations() as operations:
        evaluation = evaluate(model, Study(), range(4), Thresholds().alone(), runtime=runtime,
                              batch_size=2)
    assert evaluation.loss == 0.5 and evaluation.confidences.tolist() == [0.5] * 4
    assert operations.copies("cpu", "cuda") == 4 and operations.copies("cuda", "cpu") == 2
