"""A spliced model beside libraries of the ``cases`` extra: exported, and trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.models import build, perturb

pytestmark = [pytest.mark.cases, pytest.mark.filterwarnings("ignore")]
IDS = torch.arange(14).reshape(2, 7) + 3


@pytest.mark.parametrize("name", ["lora", "inducer", "prefix", "prompt"])
def test_onnx_runtime_gives_what_the_model_gives(name: str, tmp_path: Path) -> None:
    import onnxruntime

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama").eval()
            surgery.splice(self.model, surgery.method(name))
            perturb(self.model)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return out

    wrapped, mask = Logits(), torch.ones_like(IDS)
    file, names = str(tmp_path / "model.onnx"), ["ids", "mask"]
    any_size = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("n")},) * 2
    torch.onnx.export(
        wrapped, (IDS, mask), file, dynamo=True, input_names=names, verbose=False,
        dynamic_shapes=any_size,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch, n in [(2, 7), (3, 11), (1, 5)]:
        ids, mask = torch.randint(3, 60, (batch, n)), torch.ones(batch, n, dtype=torch.int64)
        mask[0, :2] = 0  # padding
        found = torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])
        seen = mask.bool()
        torch.testing.assert_close(found[seen], wrapped(ids, mask)[seen], rtol=1e-4, atol=1e-5)


def test_trl_reaches_adapter_dropout() -> None:
    from trl.trainer.utils import disable_dropout_in_model

    model = build("llama").train()
    surgery.splice(model, surgery.method("lora", rank=4, dropout=0.5))
    perturb(model)
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    disable_dropout_in_model(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
