"""Keeps README.md true. `python tests/test_readme.py` prints its table of flags."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from trainml.cli import cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [line for block in re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M) for line in block.splitlines()]


def flag_table():
    import predict
    import train
    actions = {}
    for script, parser in (("train", train.make_parser()), ("predict", predict.make_parser())):
        for action in parser._actions[1:]:
            names = ", ".join(f"`{name}`" for name in action.option_strings if not name.startswith("--no-"))
            actions.setdefault(names, {})[script] = action
    rows = ["| flag | train.py | predict.py | meaning |", "|---|---|---|---|"]
    for names, found in actions.items():
        cells = [_default(found[script]) if script in found else "" for script in ("train", "predict")]
        meaning = re.sub(r" \(default: .*\)$", "", next(iter(found.values())).help)  # Python 3.10 adds some of its own
        rows.append(f"| {names} | {' | '.join(cells)} | {meaning} |")
    return "\n".join(rows)


def _default(action):
    if action.dest == "workers":
        return "all cores"
    if action.dest in ("data", "labels", "save", "model", "output"):
        return "see above"
    return {None: "-", True: "on", False: "off"}.get(action.default, f"{action.default}")


def test_flag_table_is_that_of_the_parsers():
    assert flag_table() in README


def test_files_of_the_table_exist_and_no_script_is_missing():
    named = set(re.findall(r"^\| `([\w-]+\.(?:py|ipynb))` \|", README, re.M))
    assert named == {path.name for pattern in ("*.py", "*.ipynb") for path in ROOT.glob(pattern)}


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if "make_parser" in path.read_text()))
def test_python_commands_parse(script):
    module = __import__(script.removesuffix(".py"))
    pattern = rf"(?<!\w)python {re.escape(script)}([^&;'`\n]*)"
    commands = re.findall(pattern, README.replace("$optimizer", "adam").replace("$TRAINML_DATA_PATH", "data"))
    for flags in commands:
        module.make_parser().parse_args(shlex.split(flags))
    assert commands


def test_trainml_commands_parse_with_the_real_client(tmp_path):
    for name in ("new_images", "output"):
        (tmp_path / name).mkdir()
    commands = [line for line in COMMANDS if line.startswith("trainml job create")]
    for line in commands:
        words = shlex.split(line.replace("~/rsna", str(tmp_path)))[3:]
        create = cli.commands["job"].commands["create"]
        create.commands[words[0]].make_context(words[0], words[1:])
    assert len(commands) == 4


def test_the_seven_commands_of_the_tutorial_stand_as_they_were():
    for command in ("python train.py --optimizer adam", "python train.py --optimizer adamw",
                    "python train.py --optimizer adamax", "python train.py --optimizer sgd",
                    "python train.py --optimizer adagrad --lr 0.1",
                    "python data_processing.py && python train.py --optimizer adamw --epochs 10 --train-threshold "
                    "--no-save-images",
                    "python data_processing.py --type prediction --images $TRAINML_DATA_PATH && python predict.py"):
        assert command in COMMANDS


def test_requirements_are_what_the_scripts_import():
    names = {"pillow": "PIL", "python-gdcm": None, "tensorboard": "torch.utils.tensorboard"}
    required = {re.split("[>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    code = "\n".join(path.read_text("utf-8") for pattern in ("*.py", "*.ipynb") for path in ROOT.glob(pattern))
    for package in required:
        module = names.get(package, package)
        assert module is None or re.search(rf"(from|import) {re.escape(module)}\b", code), package
    imported = set(re.findall(r"^(?:from|import) (\w+)", "\n".join(p.read_text() for p in ROOT.glob("*.py")), re.M))
    own = {path.stem for path in ROOT.glob("*.py")}
    assert imported - own - sys.stdlib_module_names <= {names.get(package, package) for package in required}


if __name__ == "__main__":
    print(flag_table())
