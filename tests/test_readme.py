import ast
import glob
import graphlib
import importlib
import json
import os
import re
import subprocess

import pytest
from safetensors import safe_open

from weights import ROOT, WEIGHTS


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def section(first, following):
    """The part of the README from one heading to another."""
    return README[README.index(f"## {first}") : README.index(f"## {following}")]


README = read("README.md")
FUNCTIONS = re.findall(r"`(\w+)\.py`: `([\w.]+)`", README)


# ------------------------------------------------------------------------------------ what it says
def test_the_paper_to_code_table_names_functions():
    assert len(FUNCTIONS) > 15


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_what_the_paper_to_code_table_names_has_a_docstring(module, name):
    part = importlib.import_module(module)
    for attribute in name.split("."):
        part = getattr(part, attribute)
    assert part.__doc__


def test_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all(os.path.getsize(os.path.join(ROOT, path)) < 2**20 for path in pictures)


RESULTS = sorted(glob.glob(os.path.join(ROOT, "results", "*.md")))


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=os.path.basename)
def test_every_result_stands_in_the_docs_as_its_script_wrote_it(path):
    name = os.path.basename(path).removesuffix(".md")
    assert f"<!-- results/{name}.json -->\n{read(path)}" in read("docs/RESULTS.md")


@pytest.mark.parametrize("path", RESULTS, ids=os.path.basename)
def test_every_result_says_how_it_was_measured(path):
    measured = json.loads(read(path.removesuffix(".md") + ".json"))
    assert {"command", "commit", "hardware", "torch", "rows"} <= set(measured)


def test_the_rows_of_the_readme_are_those_of_the_results():
    lines = section("Results", "Uses of the stream").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 9
    assert all(row in read("docs/RESULTS.md") for row in rows)


def test_the_readme_is_short():
    assert len(README.split()) <= 2200


COUNTED = re.findall(r"^\|[^|]*\| ([^|]*\.py[^|]*) \|[^|]*\| (\d+) \|$", README, re.M)


@pytest.mark.parametrize(("names", "count"), COUNTED)
def test_line_counts_of_the_readme_are_right(names, count):
    lines = sum(len(read(name).splitlines()) for name in re.findall(r"`(\w+\.py)`", names))
    assert abs(lines - int(count)) <= 10


@pytest.mark.parametrize("path", ["README.md", ".ci/run"])
def test_readme_and_ci_have_the_same_test_command(path):
    assert "python -m pytest -q" in read(path)


# ---------------------------------------------------------------------------------- what is shipped
SHIPPED = sorted(glob.glob(os.path.join(WEIGHTS, "*")))


def test_all_weights_together_are_small():
    assert sum(map(os.path.getsize, SHIPPED)) <= 48 * 2**20


@pytest.mark.parametrize("path", SHIPPED, ids=os.path.basename)
def test_weights_are_small(path):
    assert os.path.getsize(path) <= 10 * 2**20


@pytest.mark.parametrize("path", SHIPPED, ids=os.path.basename)
def test_weights_say_where_they_come_from(path):
    with safe_open(path, "pt") as file:
        assert {"config", "command", "commit", "steps", "hardware"} <= set(file.metadata())


def test_no_weights_file_is_ever_executed():
    """torch.load appears with weights_only=True alone."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        if not name.startswith("tests/") and os.path.exists(os.path.join(ROOT, name)):
            for call in re.findall(r"torch\.load\([^\n]*", read(name)):
                assert "weights_only=True" in call, name


# ----------------------------------------------------------------------------------- the modules
def shelves():
    """The README's table of files, in its order: name of the shelf -> its modules."""
    found = {}
    table = section("The files", "Symbols and shapes")
    for name, module in re.findall(r"^\|([^|]*)\| `(\w+)\.py`", table, re.M):
        if name.strip():
            modules = found[name.strip()] = []
        modules.append(module)
    return found


SHELVES = shelves()
PAPER, *_ = SHELVES.values()
MODULES = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "*.py")))
PAPER_LINES = 1900  # all modules of the first shelf may have
OTHER_WORDS = re.compile(r"(?<![a-z])(action|walk|player)s?(?![a-z])(?!=)", re.I)


def imports(module):
    """The project's modules that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(read(f"{module}.py")).body:
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found & set(MODULES)


def lines_of(modules):
    return sum(len(read(f"{module}.py").splitlines()) for module in modules)


def test_every_module_stands_on_one_shelf():
    assert sorted(module for shelf in SHELVES.values() for module in shelf) == MODULES


@pytest.mark.parametrize("shelf", SHELVES)
def test_a_module_imports_from_its_shelf_only_what_stands_above(shelf):
    for place, module in enumerate(SHELVES[shelf]):
        assert not imports(module) & set(SHELVES[shelf][place:]), module


@pytest.mark.parametrize("module", PAPER)
def test_the_first_shelf_does_not_know_next_frame_diffusion(module):
    later = list(SHELVES)[list(SHELVES).index("Next-Frame Diffusion") :]
    assert not imports(module) & {name for shelf in later for name in SHELVES[shelf]}


@pytest.mark.parametrize("module", PAPER)
def test_the_first_shelf_does_not_speak_of_the_action_world(module):
    assert not [line for line in read(f"{module}.py").splitlines() if OTHER_WORDS.search(line)]


def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


def test_no_module_needs_the_page_to_be_imported():
    assert not [module for module in MODULES if "page" in imports(module)]


def test_the_first_shelf_is_short_enough_to_be_read():
    assert lines_of(PAPER) <= PAPER_LINES
