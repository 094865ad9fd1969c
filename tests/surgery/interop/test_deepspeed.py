"""DeepSpeed's ZeRO-3 itself, in two processes on CPU: every parameter is in parts between forwards.

Run this with ``make cases``. test_sharded_trainers.py has what needs no DeepSpeed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support.sharding import IDS, documented, first_alone_writes, fresh, in_two_processes

pytestmark = [pytest.mark.cases, pytest.mark.filterwarnings("ignore")]

CONFIG = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def _deepspeed() -> Any:
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="localhost", MASTER_PORT="0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo's sums; compile nothing
    deepspeed.init_distributed("gloo")
    return deepspeed


def _initialised(model: Any) -> Any:
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(chosen, lr=0.5)
    return _deepspeed().initialize(model=model, optimizer=optimiser, config=CONFIG)[0]


def _spliced(model: Any, method: Any = None, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    surgery.splice(model, method or surgery.method("lora", rank=2))
    surgery.freeze_base(model)
    return model


def _all_in_parts(model: Any) -> bool:
    return not any(p.numel() for p in model.parameters())


def _train(rank: int, engine: Any, alone: Any, steps: int = 3) -> None:
    """Train on halves of a batch, and on all of it alone: gradients and outputs are the same."""
    from deepspeed.utils import safe_get_full_grad

    chosen = [p for p in alone.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(chosen, lr=0.5)
    own = dict(surgery.spliced_parameters(engine))
    start = alone(IDS).logits
    for _ in range(steps):
        optimiser.zero_grad()
        alone(IDS).logits.square().mean().backward()
        engine.backward(engine(IDS[2 * rank : 2 * rank + 2]).logits.square().mean())
        for name, parameter in surgery.spliced_parameters(alone):
            torch.testing.assert_close(safe_get_full_grad(own[name]), parameter.grad)
        optimiser.step()
        engine.step()
    assert not torch.allclose(alone(IDS).logits, start, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(engine(IDS).logits, alone(IDS).logits)


def _is_refused(operate: Any, reason: str, error: Any = surgery.SpliceError) -> None:
    with pytest.raises(error, match=reason):
        operate()


def _before(rank: int, folder: str) -> None:
    """Splice, initialise, train, save the model and the engine, load."""
    base = fresh()(IDS).logits
    model, alone = _spliced(fresh()), _spliced(fresh())
    engine = _initialised(model)
    assert _all_in_parts(model)
    counts = surgery.summary(alone)
    assert (surgery.summary(engine).line, counts.line) == (counts.line, surgery.summary(model).line)
    assert surgery.summary(engine).stored == counts.stored
    _train(rank, engine, alone)
    assert surgery.summary(engine).line == counts.line
    expected = alone(IDS).logits
    first_alone_writes(rank)
    for name, each in (("model", model), ("engine", engine)):
        engine.empty_partition_cache()
        assert _all_in_parts(model)
        surgery.save(each, f"{folder}/{name}")
        files = sorted(path.name for path in Path(folder, name).iterdir())
        assert len(files) == 2, files
        torch.testing.assert_close(surgery.load(fresh(), f"{folder}/{name}")(IDS).logits, expected)
    with torch.no_grad(), surgery.disabled(engine):
        assert torch.equal(engine(IDS).logits, base)
    engine(IDS)  # leaves parameters whole: what is written to them would be lost
    for each in (model, engine):
        _is_refused(lambda each=each: surgery.merge(each), "engine has taken its parameters apart")
        _is_refused(lambda each=each: surgery.splice(each, "lora", name="late"), "engine.destroy")
        _is_refused(lambda each=each: surgery.copy(each, "default", "second"), "engine.destroy")
    _is_refused(lambda: surgery.locate(model), "engine.destroy")
    _is_refused(
        lambda: surgery.hotswap(model, "default", f"{folder}/model"),
        "taken.*apart",
        surgery.StoreError,
    )
    _is_refused(lambda: surgery.train_rows(model, "lm_head.weight", [3]), "is sharded")
    engine.backward(engine(IDS[:2]).logits.square().mean() * 0)
    engine.zero_grad()
    surgery.freeze_base(engine)
    _train(rank, engine, alone, steps=1)
    _is_gathered_by_hand(rank, folder, engine, alone)
    surgery.remove(engine)
    with torch.no_grad():
        assert torch.equal(engine(IDS).logits, base)


def _is_gathered_by_hand(rank: int, folder: str, engine: Any, alone: Any) -> None:
    """Save in one process, what the user has gathered there, as DeepSpeed's documentation does."""
    parameters = [p for _, p in surgery.spliced_parameters(engine)]
    with _deepspeed().zero.GatheredParameters(parameters):
        if rank == 0:
            surgery.save(engine, f"{folder}/first")
    torch.distributed.barrier()
    again = surgery.load(fresh(), f"{folder}/first")
    torch.testing.assert_close(again(IDS).logits, alone(IDS).logits)


def test_a_splice_before_zero_3_learns_what_one_process_does(tmp_path: Path) -> None:
    in_two_processes(tmp_path, _before)


def _in_parts(rank: int, folder: str) -> None:
    """Splice into a base that is in parts already, as a load under ZeRO-3 leaves it."""
    _deepspeed()
    from transformers.integrations import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(CONFIG)  # while it lives, a load leaves a part in each process
    model = type(fresh()).from_pretrained(f"{folder}/base").eval()
    del config
    alone = _spliced(fresh())
    assert _all_in_parts(model)
    assert str(surgery.locate(model)) == str(surgery.locate(fresh()))
    with pytest.raises(surgery.SurgeryError, match="no projection port 'nowhere'"):
        surgery.splice(model, surgery.method("lora", ports=("nowhere",)))
    _spliced(model, seed=1 + rank)  # the first process's draws count
    engine = _initialised(model)
    assert _all_in_parts(model)
    _train(rank, engine, alone)
    surgery.save(engine, f"{folder}/adapter")
    expected = alone(IDS).logits
    torch.testing.assert_close(surgery.load(fresh(), f"{folder}/adapter")(IDS).logits, expected)
    engine.destroy()
    torch.manual_seed(5)
    surgery.splice(model, surgery.method("inducer"), name="second")
    torch.manual_seed(5)
    surgery.splice(alone, surgery.method("inducer"), name="second")
    for each in (model, alone):
        surgery.freeze_base(each)
    engine = _initialised(model)
    _train(rank, engine, alone)
    surgery.save(engine, f"{folder}/both")
    expected = alone(IDS).logits
    torch.testing.assert_close(surgery.load(fresh(), f"{folder}/both")(IDS).logits, expected)
    engine.destroy()
    again = fresh()
    _deepspeed().zero.Init(module=again, config_dict_or_path=CONFIG)
    surgery.load(again, f"{folder}/both")
    surgery.freeze_base(again)
    engine = _initialised(again)
    with torch.no_grad():
        torch.testing.assert_close(engine(IDS).logits, expected)


def test_a_base_in_parts_is_spliced_into_and_an_engine_is_left_first(tmp_path: Path) -> None:
    in_two_processes(tmp_path, _in_parts)


def _example(rank: int, folder: str) -> None:
    """Run the example of docs/trainers.md in each process, with rows of its own."""
    batches = [{"input_ids": ids, "labels": ids} for ids in IDS.split(2)[rank : rank + 1] * 3]
    names = {"torch": torch, "surgery": surgery, "deepspeed": _deepspeed(), "model": fresh()}
    torch.manual_seed(0)
    exec(
        documented("DeepSpeed ZeRO-3"),
        {**names, "config": CONFIG, "batches": batches, "folder": f"{folder}/adapter"},
    )
    loaded = surgery.load(fresh(), f"{folder}/adapter")
    assert not torch.equal(loaded(IDS).logits, fresh()(IDS).logits)


def test_the_example_of_the_documentation_trains(tmp_path: Path) -> None:
    in_two_processes(tmp_path, _example)
