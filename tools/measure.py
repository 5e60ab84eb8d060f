"""Prints the size of the code: code lines and longest function by file and by room (a folder is a
room), and the names of ours that train.py uses.

    python -m tools.measure
"""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
WINGS = "radiographs", "results", "tools"


def code_lines(source, tree):
    """Number of lines that are not blank, a comment or part of a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


def names_of_ours(tree, own):
    """Names that a module takes from the others: `from x import name`, or `x.name` after `import
    x`."""
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import)
                for alias in node.names} & own
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom() if node.module in own:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            case ast.Attribute(value=ast.Name()) if node.value.id in imported:
                names.add(ast.unparse(node))
    return sorted(names)


def main():
    paths = sorted(Path(".").glob("*.py"))
    own, rooms = {path.stem for path in paths} | set(WINGS), Counter()
    print(f"{'file':<28}{'lines':>7}{'code':>7}{'longest function':>30}")
    for path in paths + [path for wing in WINGS for path in sorted(Path(wing).glob("*.py"))]:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        code = code_lines(source, tree)
        length, longest = max(((node.end_lineno - node.lineno + 1, node.name)
                               for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)),
                              default=(0, "-"))
        print(f"{str(path):<28}{len(source.splitlines()):>7}{code:>7}{longest:>25} {length:>4}")
        rooms[path.parts[0]] += code
    print(f"\n{'room':<28}{'code':>14}")
    for room, code in sorted(rooms.items()):
        print(f"{room:<28}{code:>14}")
    flat = sum(code for room, code in rooms.items() if room.endswith(".py"))
    print(f"{'all':<28}{rooms.total():>14}\n"
          f"{'top level, no sample_data':<28}{flat - rooms['sample_data.py']:>14}")
    names = names_of_ours(ast.parse(Path("train.py").read_text("utf-8")), own)
    print(f"train.py uses {len(names)} names of ours: {', '.join(names)}")


if __name__ == "__main__":
    main()
