"""What the documents say can be typed: commands name scripts and settings, links lead somewhere, Python runs."""

import ast
import json
import re
import shlex

import pytest

from ldm.files import ROOT
from ldm.pictures import load_picture
from ldm.settings import override, read_settings, split_arguments

DOCS, TOUR = ROOT / "docs", ROOT / "docs" / "tour.ipynb"
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *ROOT.glob("models/*/README.md")]
TEXTS = {file: file.read_text(encoding="utf-8") for file in FILES}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.S | re.M)]
TYPED = [line for kind, block in BLOCKS if not kind for line in block.replace("\\\n", " ").split("\n")]
SAID = [" ".join(code.split()) for text in TEXTS.values() for code in re.findall(r"(?<!`)`(python [^`]+)`", text)]
COMMANDS = sorted({line.split("  #")[0].strip() for line in TYPED + SAID if line.strip().startswith("python ")})
PATHS = {"tool_add_control.py": 2, "tool_export_control.py": 2, "tool_calibrate.py": 1}
PLACEHOLDERS = ("SCRIPT", "…")


def test_commands_were_found():
    assert len(COMMANDS) > 20 and len(SAID) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_typed(command):
    _, script, *arguments = shlex.split(command)
    if script in PLACEHOLDERS:
        return
    settings = {key: default for key, (default, *_) in read_settings(ROOT / script)[0].items()}
    names = ["PATH"] * PATHS.get(script, 0)
    paths, given = split_arguments([a for a in arguments if a not in PLACEHOLDERS], settings, names)
    override(settings, given)
    shipped = [value for value in [*paths, *(a.partition("=")[2] for a in given)] if value.startswith("models/")]
    assert all((ROOT / path).exists() or path.endswith("_ini") for path in shipped)


def anchors(text):
    """Returns: the names under which headings can be linked to."""
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)]


@pytest.mark.parametrize("file", [*FILES, TOUR], ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_index_names_every_page_once():
    named = re.findall(r"^- \[.*?\]\(([^)#]+)\): ", TEXTS[DOCS / "index.md"], re.M)
    pages = {path.name for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb")} - {"index.md"}
    assert sorted(named) == sorted(pages)


def run_cells(notebook):
    """Returns: the names that the cells of a notebook leave; the value of each cell's last line."""
    names, values = {}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            *body, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(body, []), "tour", "exec"), names)
            values.append(eval(compile(ast.Expression(last.value), "tour", "eval"), names))
    return names, values


@pytest.mark.slow
def test_the_tour_can_be_taken():
    names, (_, strip, figure, said) = run_cells(json.loads(TOUR.read_text(encoding="utf-8")))
    low, high = said[2][0]
    assert low < 2 < high and said[0] == pytest.approx(2, abs=0.2) and said[3] == []
    stored = TOUR.read_text(encoding="utf-8")
    assert all(f"size={picture.width}x{picture.height}" in stored for picture in (strip, figure))
    assert len(names["drawn"]) == 4 and strip.width > strip.height and figure.width > figure.height


def test_the_tour_was_taken_and_is_small():
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells) and TOUR.stat().st_size < 300_000


def test_the_readme_is_short():
    text = TEXTS[ROOT / "README.md"]
    assert len(text.encode()) <= 10_000 and text.count("\n") <= 180


def test_the_python_of_the_readme_runs():
    (snippet,) = (block for kind, block in BLOCKS if kind == "python" and "load_model" in block)
    given = {"picture": load_picture(ROOT / "dataForTrain" / "resultData" / "coins_+2.png")}
    exec(snippet, given)
    assert given["reading"].control.item() == pytest.approx(2, abs=0.2) and given["reading"].flags == [[]]
