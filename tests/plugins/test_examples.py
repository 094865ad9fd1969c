"""The example plugin, as a stranger's: installed with pip, discovered, spliced, trained, saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "plugins/examples"
EXAMPLE = EXAMPLES / "surgery-red"
INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
LIFE = """
import sys
import pytest, torch, surgery, surgery_red
from surgery.cli import app
from surgery.testing import make_model

assert surgery.methods()["red"] is surgery_red.RED
model, ids = make_model("fused"), torch.arange(12).reshape(2, 6) + 3
base = model(input_ids=ids).logits
print(surgery.splice(model, surgery.method("red")))
assert torch.equal(model(input_ids=ids).logits, base)
surgery.freeze_base(model)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
losses = []
for _ in range(20):
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.2, losses
tuned = model(input_ids=ids).logits
surgery.save(model, "adapter")
assert torch.equal(surgery.load(make_model("fused"), "adapter")(input_ids=ids).logits, tuned)
surgery.remove(model)
assert torch.equal(model(input_ids=ids).logits, base)
app(["methods"], standalone_mode=False)
imported = "ignore::pytest.PytestAssertRewriteWarning"  # a pytest plugin that transformers uses
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", imported, sys.argv[1]]))
"""


def run(*command: str, cwd: Path, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_plugin_lives_a_whole_life(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    run(*INSTALL, "--target", str(installed), str(EXAMPLE), cwd=tmp_path, path=installed)
    out = run("-c", LIFE, str(EXAMPLE / "test_red.py"), cwd=tmp_path, path=installed)
    assert "red" in out.partition("1 passed")[0]
    assert "1 passed" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["surgery-linear-attention", "surgery-brackets"])
def test_an_example_of_another_hook_passes_its_tests_installed(name: str, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    example = EXAMPLES / name
    run(*INSTALL, "--target", str(installed), str(example), cwd=tmp_path, path=installed)
    tests = next(example.glob("test_*.py")).read_text()
    (tmp_path / "test_installed.py").write_text(tests)  # away from the modules beside it
    tests_run = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_installed.py")
    assert "2 passed" in run(*tests_run, cwd=tmp_path, path=installed)
