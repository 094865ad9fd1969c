"""Every Python block of every page runs, and every relative link and anchor leads somewhere.

The blocks of a page run in order, as one program, in an empty folder. A page whose examples need
something at hand (a model in that folder, a batch) stands in ``RUN_BY`` with the test that provides
it. A block that cannot run has ``<!-- not run: the reason -->`` on the line above it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

import surgery
from surgery.plugin.registry import registry

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"([^\n]*)\n```python\n(.*?)\n```", re.DOTALL)
FENCED = re.compile(r"^(```|~~~).*?^\1$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NOT_RUN = re.compile(r"<!-- not run: (.{10,}) -->")
DOCS = "tests/test_docs.py::"
INTEROP = "tests/surgery/interop/"
RUN_BY = {  # how many blocks, and the tests that run them
    "README.md": (1, [f"{DOCS}test_the_readme_example_runs"]),
    "CONTRIBUTING.md": (
        5,
        [
            "tests/surgery/adapter/test_life_cycle.py::test_the_hook_in_contributing_runs",
            "tests/plugins/test_examples.py::test_the_example_plugin_lives_a_whole_life",
            f"{DOCS}test_the_plugin_in_contributing_is_the_one_that_is_tested",
            f"{DOCS}test_the_example_with_lse_keeps_the_contract",
            f"{DOCS}test_the_example_at_the_first_token_keeps_the_contract",
        ],
    ),
    "docs/reference.md": (1, [f"{DOCS}test_the_readme_example_runs"]),
    "docs/serving.md": (2, [f"{DOCS}test_the_page_on_serving_runs"]),
    "docs/trainers.md": (
        6,
        [
            "tests/whole/test_trainers.py::test_an_example_trains_and_its_checkpoint_holds_no_base",
            "tests/whole/test_trainers.py::test_the_example_of_a_loop_trains",
            f"{INTEROP}test_deepspeed.py::test_the_example_of_the_documentation_trains",
            f"{INTEROP}test_carried_over.py::test_two_processes_learn_what_one_does",
        ],
    ),
    "docs/architecture.md": (
        4,
        ["tests/test_architecture.py::test_an_example_runs_and_prints_what_the_document_shows"],
    ),
    "docs/moving_from_peft.md": (5, [f"{DOCS}test_the_page_for_users_of_peft_runs"]),
}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[tuple[str, str]]:
    """Each block, behind the line above it."""
    return BLOCK.findall("\n" + path.read_text())


WITH_CODE = [path for path in PAGES if blocks(path)]
RUN_HERE = [path for path in WITH_CODE if named(path) not in RUN_BY]


def to_run(path: Path) -> list[str]:
    """The blocks of a page that are not marked."""
    return [code for above, code in blocks(path) if not NOT_RUN.fullmatch(above)]


@pytest.mark.parametrize("path", RUN_HERE, ids=named)
@pytest.mark.filterwarnings("ignore")  # of other libraries: a page is a program of a user
def test_the_blocks_of_a_page_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where a dataclass looks its types up
    offered = registry()._offered["method"]
    monkeypatch.setattr(registry(), "_offered", {**registry()._offered, "method": dict(offered)})
    for code in to_run(path):
        exec(compile(code, path.name, "exec"), vars(module))


@pytest.mark.parametrize("page", RUN_BY)
def test_a_page_with_a_test_of_its_own_has_it(page: str) -> None:
    count, tests = RUN_BY[page]
    assert len(to_run(ROOT / page)) == count, "does that test run the new block, too?"
    for test in tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_few_blocks_are_not_run() -> None:
    marked = [above for path in WITH_CODE for above, _ in blocks(path) if "not run" in above]
    assert all(NOT_RUN.fullmatch(above) for above in marked)
    assert marked == []
    for path in PAGES:  # a block in another notation would go unseen
        fences = re.findall(r"^ *```[ ~]*(?:python|py|pycon)\d?\b.*$", path.read_text(), re.M)
        assert len(fences) == len(blocks(path)), path


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def broken(path: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", path.read_text()))
    wrong = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_and_anchors_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_link_or_an_anchor_that_is_wrong_is_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One `two`\n\n```\n# three\n```\n")
    page.write_text("[a](other.md) [b](other.md#one-two) [c](other.md#three) [d](gone.md) [e](#x)")
    assert broken(page) == ["other.md#three", "gone.md", "#x"]


def turned(markdown: str, page: str, repository: str) -> str:
    """What the site's hook makes of a page."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text: str = module.turned(markdown, page, repository)
    return text


def test_links_out_of_the_documents_lead_to_the_repository_on_the_site() -> None:
    page = "tutorials/write_a_plugin.md"
    text = "[a](../../CONTRIBUTING.md#x) [b](../numbers.md) [c](../../tests/conftest.py) [d](#y)"
    inside = "[a](../contributing.md#x) [b](../numbers.md) "
    assert turned(text, page, "") == f"{inside}c [d](#y)"
    assert turned(text, page, "R") == f"{inside}[c](R/blob/main/tests/conftest.py) [d](#y)"
    assert turned("[a](docs/numbers.md)", "index.md", "") == "[a](numbers.md)"
    assert turned("```\n[c](tests/x.py)\n```", "index.md", "") == "```\n[c](tests/x.py)\n```"


def test_every_page_is_in_the_navigation_and_every_name_in_the_api() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    pages -= {"changelog.d/README.md", *(p for p in pages if p.startswith("changelog.d/"))}
    assert listed == pages | {"index.md", "contributing.md", "security.md"}
    entries = re.findall(r"^::: surgery\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(entries) == sorted(surgery.__all__)
