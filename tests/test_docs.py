"""What documents, docstrings and comments name exists: files, modules that are run, links, names in playbooks."""

import ast
import io
import re
import subprocess
import tokenize

import pytest
from places import ROOT

TRACKED = subprocess.run(
    ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
    capture_output=True,
    text=True,
    check=True,
).stdout.split()
PAGES = [name for name in TRACKED if name.endswith(".md")]
CODE = [name for name in TRACKED if name.endswith(".py")]
FOLDERS = ("cxr_jax", "tests", "experiments", "benchmarks", "scripts", "docs", "launch", "examples")

# A name with its ending, and whatever stands before it of its path; placeholders (`<name>.py`, `*.py`) are none.
FILE = re.compile(r"(?<![\w./<>*{}$-])[\w./-]*\w\.(?:py|toml|md|sh|sbatch|jinja|css)\b(?!\w)")
FOLDER = re.compile(rf"(?<![\w./*-])(?:{'|'.join(FOLDERS)})(?:/\w+)*/(?![\w<*{{])")
# An atomic group: of `python -m cxr_jax.data.sources.<name>` nothing is taken.
MODULE = re.compile(rf"python -m (?>((?:{'|'.join(FOLDERS)})(?:\.\w+)*))(?!\.<)")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
# Names of no file here: of a reader's own, of a run's folder, of a family's folder, of other projects.
ELSEWHERE = {"X.py", "file.py", "card.md"}
OF_OTHERS = re.compile(r"(huggingface|configs|transformers|/opt)/")


def text_of(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):  # its docstrings and comments
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, owners)]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        return "\n".join([*(ast.get_docstring(node) or "" for node in nodes), *comments])
    if name == "CHANGELOG.md":  # its tables name what is no more
        return re.sub(r"^\|.*\|$", "", text, flags=re.MULTILINE)
    return text


@pytest.mark.parametrize("name", PAGES + CODE)
def test_files_and_modules_exist(name):
    text = text_of(name)
    missing = []
    for file in sorted(set(FILE.findall(text))):
        path = file.removeprefix("../").removeprefix("./")
        is_there = any(tracked == path or tracked.endswith("/" + path) for tracked in TRACKED)
        if not is_there and path.split("/")[-1] not in ELSEWHERE and not OF_OTHERS.match(path):
            missing.append(file)
    missing += [folder for folder in FOLDER.findall(text) if not (ROOT / folder).is_dir()]
    for module in set(MODULE.findall(text)):
        path = module.replace(".", "/")
        if not {f"{path}.py", f"{path}/__main__.py"} & set(TRACKED):
            missing.append(f"python -m {module}")
    assert not missing, f"{name} names what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    links = [link for link in LINK.findall(text_of(name)) if "://" not in link]
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not missing, f"{name} links to what is not there: {', '.join(missing)}"


def test_the_playbooks_name_what_the_code_has():
    names = set(re.findall(r"`([A-Za-z_]{5,})`", text_of("CONTRIBUTING.md")))
    code = "\n".join(
        (ROOT / name).read_text(encoding="utf-8")
        for name in TRACKED
        if name.endswith((".py", ".toml"))
    )
    missing = [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)]
    assert not missing, f"CONTRIBUTING.md names what no code has: {', '.join(missing)}"
