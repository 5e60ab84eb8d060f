"""Keeps README.md and the lists of requirements true."""

import ast
import importlib
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT
from torch.distributed import run
from trainml.cli import cli

README, CONTRIBUTING = (
    (ROOT / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md"))
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)
COMMANDS = [line for block in BLOCKS
            for line in re.sub(r"\\\n\s*", "", block).splitlines()]  # a backslash joins two
SCRIPTS, NOTEBOOKS = sorted(ROOT.glob("*.py")), sorted(ROOT.glob("*.ipynb"))
FOLDERS = ["radiographs", "results", "tools"]
SOURCES = [*SCRIPTS, *(path for name in FOLDERS for path in sorted((ROOT / name).glob("*.py")))]
WITH_FLAGS = [path.name for path in SCRIPTS if "def make_parser" in path.read_text("utf-8")]


def rooms(text):
    """Files and folders that the rows of the first table in `text` name."""
    [table] = re.findall(r"^\| storey .*?\n\n", text, re.M | re.S)
    return set(re.findall(r"`([\w-]+(?:\.(?:py|sh)|/))`", table))


def test_the_house_of_the_readme_names_six_scripts_and_only_what_is_there():
    named = rooms(README)
    assert {"sample_data.py", "data_processing.py", "train.py", "predict.py", "endpoint.py",
            "predict_scan.sh"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_house_of_contributing_names_every_room():
    assert rooms(CONTRIBUTING) == {path.name for path in SCRIPTS} | {f"{name}/" for name in FOLDERS}


def test_commands_for_maintainers_name_modules_that_exist():
    named = re.findall(r"python -m (tools\.\w+)", README + CONTRIBUTING)
    assert named
    for name in named:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name


@pytest.mark.parametrize("script", WITH_FLAGS)
def test_python_commands_parse(script):
    parser = importlib.import_module(script.removesuffix(".py")).make_parser()
    text = README.replace("$optimizer", "adam").replace("$TRAINML_DATA_PATH", "data")
    commands = re.findall(rf"(?<!\w)python {re.escape(script)}([^&;'`\n]*)", text)
    for flags in commands:
        parser.parse_args(shlex.split(flags))
    assert commands


@pytest.fixture
def create(tmp_path):
    """create(line) returns the options of a `trainml ... create` command by the real client."""
    for name in ("data", "new_images", "output"):
        (tmp_path / name).mkdir()

    def create(line):
        words = shlex.split(line.replace("~/rsna", str(tmp_path)))[1:]
        command = cli
        while name := words[0] if hasattr(command, "commands") else "":
            command, words = command.commands[name], words[1:]
        return command.make_context(command.name, words).params
    return create


def test_trainml_commands_parse_with_the_real_client(create):
    commands = [line for line in COMMANDS if line.startswith("trainml ")]
    for line in commands:
        create(line)
    assert len(commands) == 5


def test_the_marathon_on_several_gpus_parses_as_described(create):
    torchrun = "torchrun --standalone --nproc-per-node 4 train.py"
    assert f"`{torchrun} ...`" in README and "add `--gpu-count 4`" in README
    [marathon] = [line for line in COMMANDS if '"Marathon"' in line]
    line = marathon.replace("training", "training --gpu-count 4", 1)
    params = create(line.replace("python train.py", torchrun))
    [words] = re.findall(f"{torchrun[9:]} .*", str(params))
    assert params["gpu_count"] == 4
    script = run.get_args_parser().parse_args(shlex.split(words.split("'")[0])).training_script_args
    importlib.import_module("train").make_parser().parse_args(script)


@pytest.mark.parametrize("command", [
    "python train.py --optimizer adam", "python train.py --optimizer adamw",
    "python train.py --optimizer adamax", "python train.py --optimizer sgd",
    "python train.py --optimizer adagrad --lr 0.1",
    "python data_processing.py && python train.py --optimizer adamw --epochs 10 --train-threshold "
    "--no-save-images",
    "python data_processing.py --type prediction --images $TRAINML_DATA_PATH && python predict.py",
])
def test_the_seven_commands_of_the_tutorial_stand_as_they_were(command):
    assert command in COMMANDS


# Requirements


# names to import where they differ; GDCM is found by pydicom, TensorBoard by PyTorch
MODULES = {"pillow": "PIL", "scikit-image": "skimage", "scikit-learn": "sklearn"}
FOUND_BY_OTHERS = {"python-gdcm": "pydicom", "tensorboard": "torch.utils.tensorboard"}
LISTS = [path.name for path in sorted(ROOT.glob("requirements*.txt"))]


def packages(name):
    """Packages of a list in the repository, none if there is no such list."""
    path = ROOT / name
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [re.split(r"[^\w.-]", line)[0] for line in lines if re.match(r"\w", line)]


def modules(names):
    return {MODULES.get(package, package.replace("-", "_")) for package in names}


def imports(nodes):
    """Full names of the modules that syntax nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:  # not of the same package
            yield node.module


def trees():
    """Syntax trees of scripts, packages and notebooks, by file."""
    found = {str(path): ast.parse(path.read_text("utf-8")) for path in SOURCES}
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found[path.name] = ast.parse("\n".join(cells))
    return found


def foreign(names):
    """Top-level modules that are neither ours nor Python's."""
    own = {path.stem for path in SCRIPTS} | set(FOLDERS)
    return {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names


@pytest.mark.parametrize("name", LISTS)
def test_every_package_of_a_list_is_imported(name):
    imported = {module for tree in trees().values() for module in imports(ast.walk(tree))}
    roots = imported | {module.partition(".")[0] for module in imported}
    for package in packages(name):
        [module] = modules([package]) if package not in FOUND_BY_OTHERS else [
            FOUND_BY_OTHERS[package]]
        assert module in roots, package


def test_what_is_imported_at_the_start_is_required():
    started = {module for tree in trees().values() for module in imports(tree.body)}
    assert foreign(started) <= modules(packages("requirements.txt"))


def test_what_is_imported_on_use_is_required_or_an_extra():
    used = {module for tree in trees().values() for module in imports(ast.walk(tree))}
    listed = [package for name in LISTS for package in packages(name)]
    assert foreign(used) <= modules(listed)


def test_no_package_stands_in_two_lists():
    listed = [package for name in LISTS for package in packages(name)]
    assert len(listed) == len(set(listed))
