"""Wheel smoke: build the archives, install the wheel, and use it outside. Run:  make wheel-smoke

The wheel is built from the source archive, so that archive is complete. It must hold every file of
the repository. The wheel goes into an empty virtual environment. By default pip installs what the
wheel requires, pinned by constraints.txt: first torch and the like alone, then the extra ``hf``.
With ``--reuse`` the packages of this environment stand in for those, and nothing is downloaded; the
repository's own installation is not among them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "plugins/examples"
# Beside what the wheel requires: the type checker, and what builds the example plugin.
TOOLS = ("mypy", "setuptools>=77")
CORE = """
import torch, surgery
block = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
model = torch.nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()
surgery.splice(model, "lora", example_inputs=torch.randn(1, 4, 16))
surgery.remove(model)
"""


def main() -> int:
    """Build, install and use; 0 if every step worked."""
    words = argparse.ArgumentParser(description="Install the built wheel and use it.")
    words.add_argument("--reuse", action="store_true", help="take dependencies from this one")
    words.add_argument("--dist", type=Path, default=ROOT / "dist", help="where archives stand")
    given = words.parse_args()
    wheel = complete(given.dist.resolve())
    with tempfile.TemporaryDirectory() as temporary:
        home, outside = Path(temporary) / "environment", Path(temporary) / "outside"
        outside.mkdir()
        install(wheel, home, outside, given.reuse)
        use(home, outside, wheel)
    return 0


def complete(dist: Path) -> Path:
    """Return the wheel, once both archives hold what they must."""
    [source], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")
    missing = [name for name in tracked if name and name not in packed]
    assert not missing, f"{source.name} lacks {missing}"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    places = {"surgery": "surgery", "plugins": "surgery_plugins", "recipes": "surgery_recipes"}
    for name in tracked:
        top, _, rest = name.partition("/")
        ours = name.endswith((".py", ".yaml", "py.typed", ".txt", ".tsv.gz"))
        if top in places and ours and not rest.startswith(("examples/", "data/make_")):
            assert f"{places[top]}/{rest}" in held, f"{wheel.name} lacks {name}"
    assert "surgery/py.typed" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not [name for name in held if name.startswith(("tests/", "docs/"))]
    return wheel


def run(*command: object, cwd: Path) -> str:
    """Run a command with nothing of this environment in its own; raise with its output."""
    start, before = time.perf_counter(), os.times()
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=own, capture_output=True, text=True)
    shown = " ".join(Path(word).name for word in words if "\n" not in word)
    spent = time.perf_counter() - start
    after = os.times()
    work = sum(after[2:4]) - sum(before[2:4])  # of the command, on however busy a machine
    print(f"{spent:5.0f} s, {work:4.0f} s of a core  {shown}", flush=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def install(wheel: Path, home: Path, outside: Path, reuse: bool) -> None:
    """Make an environment with the wheel in it."""
    venv.create(home, with_pip=True)
    python = home / "bin/python"
    pip = (python, "-m", "pip", "install", "--quiet")
    if reuse:
        [packages] = home.glob("lib/python*/site-packages")
        others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        run(
            *pip[:3], "uninstall", "--yes", "--quiet", "setuptools", cwd=outside
        )  # hides the reused
        (packages / "reused.pth").write_text("\n".join(others))
        run(*pip, "--no-deps", "--force-reinstall", wheel, cwd=outside)
        return
    pinned = ("-c", ROOT / "constraints.txt")
    run(*pip, *pinned, wheel, cwd=outside)
    run(python, "-W", "error", "-c", CORE, cwd=outside)
    run(*pip, *pinned, f"{wheel}[hf]", *TOOLS, cwd=outside)


def use(home: Path, outside: Path, wheel: Path) -> None:
    """Do what a user does, in a folder without the repository."""
    python, program = home / "bin/python", home / "bin/surgery"
    for name in ("wheel_user.py", "wheel_consumer.py"):
        shutil.copy(Path(__file__).with_name(name), outside)
    run(python, "wheel_user.py", home, cwd=outside)
    version = run(program, "--version", cwd=outside).split()[-1]
    assert wheel.name.startswith(f"surgery-{version}-"), version
    assert "inducer" in run(program, "methods", cwd=outside)
    assert "quickstart" in run(program, "recipes", cwd=outside)
    steps = ("training.max_steps=2", "training.use_cpu=true", "training.report_to=none")
    size = "training.per_device_eval_batch_size=500"
    run(program, "train", "quickstart", "model=encoder", *steps, size, cwd=outside)
    assert (outside / "runs/quickstart/metrics.json").is_file()
    run(program, "eval", "runs/quickstart", cwd=outside)
    run(program, "new", "mine", "--like", "lora", cwd=outside)
    assert (outside / "surgery-mine/surgery_mine.py").is_file()
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    for example in sorted(EXAMPLES.iterdir()):
        shutil.copytree(example, outside / example.name)
        run(*pip, outside / example.name, cwd=outside)
    assert "red" in run(program, "methods", cwd=outside)
    run(program, "check", "red", cwd=outside)
    run(python, "-m", "mypy", "--strict", "wheel_consumer.py", cwd=outside)


if __name__ == "__main__":
    sys.exit(main())
