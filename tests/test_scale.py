"""Runs of several processes on one machine: torchrun with gloo on the CPU."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import scale_worker
import torch
from conftest import ROOT, SMALL
from torch.utils.data import WeightedRandomSampler

import cli
import parallel
import predict
import train
from data_processing import Labels
from dataset import Augmentation, PneumoniaDataset
from engine import Training, combined_loss, evaluate
from model import PneumoniaUNET, choose_runtime, load_checkpoint, save_checkpoint
from radiographs.files import find_dicom_files

pytestmark = pytest.mark.linux
CPU = choose_runtime("cpu", "fp32")
STEPS, SIDE = 20, 64


def start_torchrun(processes, script, *flags):
    """torchrun in a process of its own; standard output and error come together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               processes, script, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([str(word) for word in command], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def torchrun(processes, script, *flags):
    """Exit status and lines of a whole run."""
    process = start_torchrun(processes, script, *flags)
    lines = process.communicate()[0].splitlines()
    return process.returncode, lines


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes of torchrun: sums of several threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What falls to which process


@pytest.mark.parametrize("world", [2, 3])
def test_each_drawn_index_goes_to_exactly_one_process(world):
    def draw(runtime):
        order = WeightedRandomSampler([1.0] * 50, 50, generator=torch.Generator().manual_seed(1))
        return list(parallel.SharedBatches(order, 4 * world, runtime, drop_last=True))
    whole = draw(CPU)
    shares = [draw(CPU._replace(rank=rank, world=world)) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part) for part in parts] == [4] * world
        assert sorted(batch) == sorted(sum(parts, []))


def test_processes_draw_the_same_order_and_augment_each_in_its_own_way():
    def draw(rank):
        augmentation = Augmentation(torch.Generator())
        loader = SimpleNamespace(generator=torch.Generator())
        training = SimpleNamespace(augmentation=augmentation, loader=loader,
                                   runtime=CPU._replace(rank=rank))
        Training.seed_epoch(training, 1, 3)
        return [torch.rand(4, generator=owner.generator).tolist()
                for owner in (loader, augmentation)]
    draws = [draw(rank) for rank in range(3)]
    assert draws[0][0] == draws[1][0] == draws[2][0]
    assert draws[0][1] == draws[0][0]  # as in a run of one process
    assert len({str(augmentation) for _, augmentation in draws}) == 3


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_shares_follow_one_another_and_are_the_whole(count):
    shares = [parallel.share(list(range(count)), CPU._replace(rank=rank, world=3))
              for rank in range(3)]
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_data_set_given_to_another_process_reads_the_same_images(phantoms):
    files, _ = find_dicom_files(phantoms / "stage_2_test_images")
    dataset = PneumoniaDataset(files, Labels(dict.fromkeys(files, ())), side=64)
    copy = pickle.loads(pickle.dumps(dataset))
    indices = list(range(len(dataset)))
    assert torch.equal(copy[indices][0], dataset[indices][0])
    assert copy.patient_ids == dataset.patient_ids


class OfAnotherMachine:
    """Names a file that is not here."""

    def __reduce__(self):
        return open, ("/no/such/file",)


def test_a_machine_does_not_open_the_data_set_of_another(monkeypatch):
    sent = []

    def exchange(parts, items):
        sent.append(pickle.dumps(items))
        parts[:] = [pickle.loads(items) for items in sent] + [[]] * (2 - len(sent))
    monkeypatch.setattr(torch.distributed, "all_gather_object", exchange)
    first, second = (CPU._replace(rank=rank, world=2) for rank in range(2))
    assert isinstance(parallel.once(OfAnotherMachine, first), OfAnotherMachine)
    assert parallel.once(lambda: "here", second) == "here"


# Joining


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(parallel, "choose_runtime",
                        lambda *_: CPU._replace(device=torch.device("cuda")))
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(cli.InputError, match="processes: 2, GPUs: 1; lower --nproc"):
        parallel.join("cuda", "fp32")


JOIN = """
import parallel
parallel.run(lambda: parallel.join("cpu", "fp32"))
"""


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_the_others_can_be_stopped(signum):
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                                "MASTER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-c", JOIN], cwd=ROOT, env=environment,
                               stderr=subprocess.PIPE)
    while not listens(port):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signum)
    try:
        errors = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == -signum and b"Traceback" not in errors


# Training and evaluation as in one process


@pytest.fixture(scope="module")
def study(phantoms, tmp_path_factory):
    """Folder with what scale_worker.py takes: 3 parts of augmented batches for each step."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    save_checkpoint(folder / "start.pth.tar", PneumoniaUNET.for_images(16, width=4))
    images, masks = torch.rand(STEPS, 3, 4, 1, SIDE, SIDE), torch.zeros(STEPS, 3, 4, 1, SIDE, SIDE)
    masks[..., 16:40, 8:30] = 1
    augmentation = Augmentation(torch.Generator().manual_seed(0))
    for step in range(STEPS):
        for part in range(3):
            images[step, part], masks[step, part] = augmentation(images[step, part],
                                                                 masks[step, part])
    torch.save(((images * 255).byte(), masks.byte()), folder / "batches.pt")
    files, _ = find_dicom_files(phantoms / "stage_2_train_images")
    files = dict(list(files.items())[:10])
    boxes = {key: [[300, 300, 200, 300]] if index % 2 else []
             for index, key in enumerate(files)}
    labels = Labels(boxes)
    torch.save({"files": files, "labels": labels}, folder / "study.pt")
    return folder


def train_alone(folder, parts):
    """Losses and weights of one process that runs the parts of each batch one after another and
    averages their gradients."""
    images, masks = torch.load(folder / "batches.pt")
    training = scale_worker.build_training(folder / "start.pth.tar", range(STEPS), CPU)
    model = training.model.train()
    losses = []
    for step in range(STEPS):
        training.optimizer.zero_grad()
        total = sum(combined_loss(CPU.segment(model, CPU.load(images[step, part])),
                                  masks[step, part].float()) for part in range(parts))
        (total / parts).backward()
        training.optimizer.step()
        training.scheduler.step()
        losses.append(total.item() / parts)
    return losses, dict(model.named_parameters())


@pytest.fixture(scope="module", params=[2, 3])
def several(request, study):
    """The number of processes and their result."""
    status, lines = torchrun(request.param, ROOT / "tests" / "scale_worker.py", study)
    assert status == 0, "\n".join(lines)
    return request.param, torch.load(study / "result.pt", weights_only=False)


def test_processes_train_as_one_that_averages_the_gradients_of_their_parts(several, study):
    processes, result = several
    losses, weights = train_alone(study, processes)
    assert result["losses"] == pytest.approx(losses, abs=1e-4)
    for name, values in weights.items():
        torch.testing.assert_close(result["states"][0][name], values, atol=1e-4, rtol=0)
    assert losses[-1] < losses[0] - 0.01


def test_all_processes_end_an_epoch_with_the_same_weights_and_statistics(several):
    first, *others = several[1]["states"]
    for state in others:
        for name, values in first.items():
            assert torch.equal(state[name], values), name


def test_processes_score_each_image_as_one_does(several, study):
    dataset = scale_worker.open_study(study / "study.pt")
    model, _ = load_checkpoint(study / "start.pth.tar")
    alone = evaluate(model, dataset, range(len(dataset)), scale_worker.GRID, runtime=CPU,
                     batch_size=3)
    for ours, theirs in zip(alone, several[1]["evaluation"], strict=True):
        assert np.array_equal(ours, theirs, equal_nan=np.asarray(ours).dtype.kind == "f")


def test_one_process_prepares_the_images_of_all(several):
    processes, result = several
    assert len(result["ids"]) == processes
    assert all(ids == result["ids"][0] and len(ids) == 10 for ids in result["ids"])


# The scripts


@pytest.fixture
def quick_flags(train_flags):
    """Flags of a run of the smallest network on 20 images."""
    return [*train_flags, "--width", "4", "--batch-size", "2", "--workers", "1"]


def test_a_run_of_two_processes_ends_like_one_of_one(quick_flags, tmp_path):
    status, lines = torchrun(2, ROOT / "train.py", *quick_flags, "--epochs", "1")
    assert status == 0, "\n".join(lines)
    assert sum(line.startswith("epoch 1/1: ") for line in lines) == 1
    assert lines[-1].startswith("Total Average Precision: ")
    output = tmp_path / "output"
    assert {path.name for path in output.iterdir()} - {".training.lock"} == {
        "last.pth.tar", "loss.best.pth.tar", "prec.best.pth.tar", "final.pth.tar", "curves.png",
        "scores.png", "report.html", "logs", "metrics.json", "split.csv"}
    writers = {path.name.split(".")[-2] for path in (output / "logs").iterdir()}
    assert len(writers) == 1  # process ids
    _, state = load_checkpoint(output / "last.pth.tar")
    assert state["scheduler"]["last_epoch"] == 18 // 4


def ranks_of(agent):
    """The processes that a torchrun has started, {rank: pid}."""
    found = {}
    for pid in open(f"/proc/{agent}/task/{agent}/children").read().split():
        environment = open(f"/proc/{pid}/environ").read().split("\0")
        found |= {int(line[5:]): int(pid) for line in environment if line.startswith("RANK=")}
    return found


def stop_in_the_middle(flags, choose):
    """Runs two processes, and sends a signal of `choose(torchrun's pid)` after the first epoch;
    returns the status, the seconds until all have ended, and the lines since."""
    process = start_torchrun(2, ROOT / "train.py", *flags, "--epochs", "500")
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    ranks = ranks_of(process.pid)
    os.kill(*choose(process.pid, ranks))
    started = time.monotonic()
    lines = process.communicate()[0].splitlines()
    seconds = time.monotonic() - started
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())
    return process.returncode, seconds, lines


@pytest.mark.parametrize("choose", [
    lambda agent, ranks: (ranks[1], signal.SIGKILL), lambda agent, ranks: (agent, signal.SIGTERM)],
    ids=["one of two is killed", "torchrun is stopped"])
def test_all_processes_end_and_one_continues_the_run(quick_flags, tmp_path, capsys, choose):
    status, seconds, lines = stop_in_the_middle(quick_flags, choose)
    assert status != 0 and seconds < 60  # torchrun kills after 30 what has not ended
    assert any(line.startswith("continue with: python train.py --checkpoint") for line in lines)
    assert sum(line.startswith("train.py: ") for line in lines) == 1
    assert not any(line.startswith("[rank") for line in lines)  # a traceback of ours
    output = tmp_path / "output"
    assert not list(output.glob(".*.part"))  # nothing half-written

    _, state = load_checkpoint(output / "last.pth.tar")
    epochs = len(state["history"]) + 1
    train.main([str(flag) for flag in [*quick_flags, "--checkpoint", output / "last.pth.tar",
                                       "--epochs", epochs]])
    _, state = load_checkpoint(output / "last.pth.tar")
    assert len(state["history"]) == epochs
    assert state["scheduler"]["last_epoch"] == epochs * (18 // 2)


def test_a_user_error_is_printed_once(quick_flags, tmp_path):
    rows = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join(rows[:5]))
    status, lines = torchrun(2, ROOT / "train.py", *quick_flags)
    told = [line for line in lines if line.startswith(("train.py: ", "[rank"))]
    assert status == 1 and len(told) == 1 and "training needs 10 of each" in told[0]


def test_predictions_of_two_processes_are_those_of_one_byte_for_byte(
        phantoms, checkpoint, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in (phantoms / "stage_2_train_images").glob("*0*.dcm"):
        (data / path.name).symlink_to(path)
    (data / "0.dcm").write_bytes(b"DICM" * 100)
    flags = ["--data", data, "--model", checkpoint, *SMALL, "--batch-size", "3", "--workers", "1"]
    status, lines = torchrun(2, ROOT / "predict.py", *flags, "--output", tmp_path / "two")
    assert status == 0, "\n".join(lines)
    predict.main([str(flag) for flag in [*flags, "--output", tmp_path / "one"]])
    one, two = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
                for folder in (tmp_path / "one", tmp_path / "two"))
    assert len(one) > 10 and one == two
