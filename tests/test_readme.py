import glob
import importlib
import json
import os
import re
import subprocess

from weights import ROOT, WEIGHTS

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


def test_every_function_in_the_paper_to_code_table_exists():
    names = re.findall(r"`(\w+)\.py`: `([\w.]+)`", README)
    assert len(names) > 15
    for module, name in names:
        part = importlib.import_module(module)
        for attribute in name.split("."):
            part = getattr(part, attribute)
        assert part.__doc__, f"{module}.{name} has no docstring"


def test_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all(os.path.getsize(os.path.join(ROOT, path)) < 2**20 for path in pictures)


def test_tables_are_those_of_the_results():
    """docs/RESULTS.md has every table as its script wrote it, and the README's rows are of them."""
    with open(os.path.join(ROOT, "docs", "RESULTS.md"), encoding="utf-8") as file:
        results = file.read()
    tables = glob.glob(os.path.join(ROOT, "results", "*.md"))
    assert tables
    for path in tables:
        with open(path, encoding="utf-8") as table, open(path[:-3] + ".json") as measured:
            assert f"<!-- results/{os.path.basename(path)[:-3]}.json -->\n{table.read()}" in results
            assert {"command", "commit", "hardware", "torch", "rows"} <= set(json.load(measured))
    section = README[README.index("## Results") : README.index("## Uses of the stream")]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 9
    assert all(row in results for row in rows)


def test_the_readme_is_short_and_its_line_counts_are_right():
    assert len(README.split()) <= 2200
    for names, count in re.findall(
        r"^\|[^|]*\| ([^|]*\.py[^|]*) \|[^|]*\| (\d+) \|$", README, re.M
    ):
        lines = 0
        for name in re.findall(r"`(\w+\.py)`", names):
            with open(os.path.join(ROOT, name), encoding="utf-8") as file:
                lines += len(file.readlines())
        assert abs(lines - int(count)) <= 10, names


def test_ci_runs_the_test_command_of_the_readme():
    assert "python -m pytest -q" in README
    assert "python -m pytest -q" in open(os.path.join(ROOT, ".ci", "run")).read()


def test_weights_are_small_and_say_where_they_come_from():
    from safetensors import safe_open

    total = 0
    for name in os.listdir(WEIGHTS):
        path = os.path.join(WEIGHTS, name)
        total += os.path.getsize(path)
        assert os.path.getsize(path) <= 10 * 2**20
        with safe_open(path, "pt") as file:
            assert {"config", "command", "commit", "steps", "hardware"} <= set(file.metadata()), (
                name
            )
    assert total <= 48 * 2**20


def test_no_weights_file_is_ever_executed():
    """torch.load appears with weights_only=True alone."""
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in files:
        if not name.startswith("tests/"):
            for call in re.findall(
                r"torch\.load\([^\n]*", open(os.path.join(ROOT, name), encoding="utf-8").read()
            ):
                assert "weights_only=True" in call, name


def shelves():
    """The README's table of files: [[module, ...], ...], a list for each shelf, in its order."""
    section = README[README.index("## The files") : README.index("## Symbols and shapes")]
    found = []
    for shelf, module in re.findall(r"^\|([^|]*)\| `(\w+)\.py`", section, re.M):
        if shelf.strip():
            found.append([])
        found[-1].append(module)
    return found


def test_a_module_imports_from_its_shelf_only_what_stands_above_it():
    modules = [module for shelf in shelves() for module in shelf]
    files = {os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "*.py"))}
    assert set(modules) == files
    assert len(modules) == len(files)
    for shelf in shelves():
        for place, module in enumerate(shelf):
            with open(os.path.join(ROOT, f"{module}.py"), encoding="utf-8") as file:
                imported = re.findall(r"^(?:from|import) (\w+)", file.read(), re.M)
            assert not set(imported) & set(shelf[place:]), module
