import math
from functools import partial

import numpy as np
import pytest
import torch

import train
from cli import InputError
from engine import check_losses, combined_loss, evaluate, training_loader
from metrics import Grid, Thresholds, average_precision_image, choose_thresholds, find_boxes
from model import PneumoniaUNET, choose_runtime
from results import overlays

CPU = choose_runtime("cpu", "fp32")
STEPS = 5  # of an epoch


# Batches


def test_the_loader_yields_whole_batches_of_training_images(labelled):
    args, dataset, parts = labelled
    loader = training_loader(dataset, parts["training"], args.batch_size, CPU)
    batches = list(loader)
    assert len(loader) == len(batches) == 4  # 36 images; what is left of the last batch is dropped
    training = {image.numpy().tobytes() for image in dataset[parts["training"]][0]}
    for images, masks in batches:
        assert images.shape == masks.shape == (8, 1, 64, 64)
        assert {image.numpy().tobytes() for image in images} <= training


def test_images_with_opacities_are_drawn_twice_as_often(labelled):
    args, dataset, parts = labelled
    loader = training_loader(dataset, parts["training"], args.batch_size, CPU)
    drawn = np.mean([mask.any().item() for seed in range(30) if loader.generator.manual_seed(seed)
                     for _, masks in loader for mask in masks])
    positive = np.mean([len(dataset.boxes[index]) > 0 for index in parts["training"]])
    assert drawn == pytest.approx(2 * positive / (1 + positive), abs=0.05)


def test_the_order_depends_on_the_seed_alone(labelled):
    args, dataset, parts = labelled
    loader = training_loader(dataset, parts["training"], args.batch_size, CPU)

    def epoch(seed):
        loader.generator.manual_seed(seed)
        return torch.cat([images for images, _ in loader])
    first, again, other = epoch(1), epoch(1), epoch(2)
    assert torch.equal(first, again) and not torch.equal(first, other)


# A run that continues


def build(args):
    return train.build_training(train.build_model(args), range(STEPS), args, CPU)


@pytest.fixture
def begun():
    """Arguments of a run and its state after two epochs."""
    args = train.parse_args(["--optimizer", "adagrad", "--width", "4"])
    training = build(args)
    training.optimizer.step()
    training.scheduler.step()
    return args, {**training.state_dict(), "history": [{}, {}]}


def test_a_run_continues_where_its_epochs_ended(begun):
    args, state = begun
    training = build(args)
    training.load_state_dict(state)
    assert training.scheduler.last_epoch == 2 * STEPS


def test_a_run_continues_in_a_precision_that_scales_the_loss(begun):
    args, state = begun
    training = build(args)
    training.scaler = torch.amp.GradScaler("cpu")  # as for float16 on a GPU
    training.load_state_dict(state)
    assert training.scaler.get_scale() == 65536


def test_a_run_continues_on_a_device_that_lacks_the_fused_form(begun, monkeypatch):
    args, state = begun
    assert state["optimizer"]["param_groups"][0]["fused"]
    optimizer_class, _, options = train.OPTIMIZERS["adagrad"]
    monkeypatch.setitem(train.OPTIMIZERS, "adagrad", (optimizer_class, (), options))
    training = build(args)
    training.load_state_dict(state)
    assert not training.optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("is_scaled, fused", [(False, False), (True, True)])
def test_a_run_that_began_without_the_fused_form_continues_without_unless_the_loss_is_scaled(
        begun, is_scaled, fused):
    args, state = begun
    state["optimizer"]["param_groups"][0]["fused"] = None
    training = build(args)
    training.scaler = torch.amp.GradScaler("cpu", enabled=is_scaled)
    training.load_state_dict(state)
    assert bool(training.optimizer.param_groups[0]["fused"]) == fused


# Loss


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_and_learning_rate(loss):
    message = f"loss is {loss} at step 39 of epoch 2, learning rate 0.5"
    with pytest.raises(InputError, match=message):
        check_losses([0.1, loss, 0.1], 40, 2, 0.5)


def test_finite_losses_are_in_order():
    check_losses([0.1, 1e30, 0], 3, 1, 0.5)


def test_loss_falls_towards_the_truth():
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, 2:6, 2:6] = 1
    right, wrong = 20 * masks - 10, 10 - 20 * masks
    assert combined_loss(right, masks) < 0.01 < 10 < combined_loss(wrong, masks)


def test_a_network_that_overfits_four_images_finds_their_boxes():
    """From images to score, end to end: the boxes of memorized images must be found again."""
    torch.manual_seed(0)
    noise = np.random.default_rng(0).integers(0, 60, (4, 1, 64, 64)).astype(np.uint8)
    masks = np.zeros((4, 1, 64, 64), np.uint8)
    for i in range(3):
        masks[i, :, 10 + 5 * i:40 + 5 * i, 20:40] = 1
    images, targets = torch.from_numpy(noise + 120 * masks), torch.from_numpy(masks).float()
    model = PneumoniaUNET()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        loss = combined_loss(CPU.segment(model, CPU.load(images)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = CPU.predict_masks(model, images)
    scores = []
    for i in range(4):
        found = find_boxes(predicted[i], (1024, 1024), Thresholds(0.5, 0.5))
        truth = [[320, 16 * (10 + 5 * i), 320, 480]] if i < 3 else []
        scores.append(average_precision_image(*found, truth))
    assert scores[:3] == [1, 1, 1] and math.isnan(scores[3])


# Scores


class Brightness(torch.nn.Module):
    """Takes bright regions for opacities."""

    def forward(self, images):
        return 20 * (torch.nn.functional.avg_pool2d(images, 9, 1, 4) - 0.93)


@pytest.fixture
def scored(labelled):
    """Evaluation of the training images at two box thresholds, and the scores of the boxes that
    are drawn at the second one and a gate of 0.5."""
    _, dataset, parts = labelled
    model, indices, thresholds = Brightness(), parts["training"], Thresholds(0.3, 0.5)
    some = indices[::2]
    for index, overlay in zip(some, overlays(model, dataset, some, thresholds, runtime=CPU)):
        dataset.boxes[index] = overlay.boxes  # these agree with the model at these thresholds
    grid = Grid([0.2, thresholds.box], [0.1, 0.2, thresholds.gate])
    evaluation = evaluate(model, dataset, indices, grid, runtime=CPU)
    drawn = [average_precision_image(overlay.boxes, overlay.confidences, overlay.truth)
             for overlay in overlays(model, dataset, indices, thresholds, runtime=CPU)]
    assert 0.1 < np.nanmean(drawn) < 1 and np.isnan(drawn).any()
    return evaluation, drawn


def test_scores_of_one_pass_are_those_of_the_boxes_that_are_drawn(scored):
    evaluation, drawn = scored
    figures = evaluation.summarize(Thresholds(0.3, 0.5))
    assert figures["rsna"] == pytest.approx(np.nanmean(drawn))
    assert figures["total"] == pytest.approx(np.nansum(drawn) / len(drawn))


def test_an_evaluation_holds_every_image_in_order(scored, labelled):
    (evaluation, _), (_, dataset, parts) = scored, labelled
    assert evaluation.scores.shape == (36, 2, 3)
    assert evaluation.views.tolist() == [dataset.views[index] for index in parts["training"]]
    assert set(evaluation.views) == {"AP", "PA"}
    boxes = [len(dataset.boxes[index]) > 0 for index in parts["training"]]
    assert evaluation.positive.tolist() == boxes


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_change_scores(labelled, batch_size):
    _, dataset, parts = labelled
    one, other = (
        evaluate(Brightness(), dataset, parts["training"], Thresholds(0.3).alone(), runtime=CPU,
                 batch_size=size)
        for size in (36, batch_size))
    np.testing.assert_allclose(one.confidences, other.confidences, rtol=1e-5)
    np.testing.assert_allclose(one.scores, other.scores)


class Blind(torch.nn.Module):
    """Is sure of an opacity in the same corner of every image, where there is none."""

    def forward(self, images):
        logits = torch.full_like(images, -9.0)
        logits[..., :12, :12] = 9.0
        return logits


def test_where_nothing_scores_the_defaults_stay_and_the_log_says_why(labelled):
    args, dataset, parts = labelled
    blind = partial(evaluate, Blind(), dataset, parts["validation"], runtime=CPU)
    thresholds = choose_thresholds(blind, train.build_thresholds(args))
    assert (thresholds.box, thresholds.gate) == (Thresholds().box, Thresholds().gate)
    assert "defaults; 4 images with boxes are too few for a search" in str(thresholds)


class Lost(torch.nn.Module):
    """Returns NaN."""

    def forward(self, images):
        return torch.full_like(images, math.nan)


def test_a_validation_loss_that_is_not_finite_is_refused(labelled):
    _, dataset, parts = labelled
    with pytest.raises(InputError, match="the validation loss is nan.*--learning-rate"):
        evaluate(Lost(), dataset, parts["validation"], Thresholds().alone(), runtime=CPU)
