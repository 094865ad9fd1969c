"""Read and write the adapters of other libraries, by their files and their names."""

from surgery.formats.foreign import Foreign, Translation
from surgery.formats.foreign_summary import ForeignContents, foreign_contents
from surgery.formats.loralib import from_layers
from surgery.formats.peft_files import CONFIG, PICKLED, TENSORS, read_foreign, tensors_in
from surgery.formats.peft_model import adapters_of, base_of, wrappers
from surgery.formats.peft_writing import as_peft
from surgery.formats.plain_files import contents
from surgery.formats.translate import translated

__all__ = [
    "CONFIG",
    "PICKLED",
    "TENSORS",
    "Foreign",
    "ForeignContents",
    "Translation",
    "adapters_of",
    "as_peft",
    "base_of",
    "contents",
    "foreign_contents",
    "from_layers",
    "read_foreign",
    "tensors_in",
    "translated",
    "wrappers",
]
