"""The callback in a real Hugging Face trainer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from torchgeom_optim.diagnostics import Diagnostics
from torchgeom_optim.diagnostics.huggingface import huggingface_callback

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.slow  # its import takes ten seconds


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1,
        n_embd=8,
        n_head=2,
        vocab_size=11,
        n_positions=6,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": tokens, "labels": tokens}


def trainer(model: nn.Module, folder, *callbacks, counts_items: bool = False, accumulation: int = 1):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=5,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=100,
        lr_scheduler_type="constant",
    )
    made = Trainer(model, arguments, train_dataset=Sentences(), callbacks=list(callbacks))
    if not counts_items:
        made.model_accepts_loss_kwargs = False  # the model averages over its own batch
    return made


def test_records_come_and_reach_the_log(tmp_path):
    plain, watched = gpt2(), gpt2()
    trainer(plain, tmp_path).train()
    diagnostics = Diagnostics(watched, every=2)
    running = trainer(watched, tmp_path, huggingface_callback(diagnostics))
    running.train()
    assert [record.step for record in diagnostics.history] == [0, 2, 4]
    assert not any("not measured" in note for record in diagnostics.history for note in record.notes)
    assert not any(math.isnan(value) for value in diagnostics.history[-1].values.values())
    assert diagnostics.history[0].batch_size == 4
    logged = [entry for entry in running.state.log_history if "diagnostics/loss" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    running.state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert "diagnostics/gradient_norm" in json.dumps(json.loads((tmp_path / "trainer_state.json").read_text()))
    assert not diagnostics.is_attached
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)  # the training did not feel it


def test_the_number_of_items_of_all_micro_batches_is_left_out(tmp_path):
    """Without accumulation all is as without it; with it, the loss is that of the micro-batch."""
    records = {}
    for name, options in (
        ("without", {}),
        ("with", {"counts_items": True}),
        ("accumulated", {"counts_items": True, "accumulation": 2}),
    ):
        model = gpt2()
        diagnostics = Diagnostics(model, every=2, metrics=["default", "free", "weight_condition_number"])
        trainer(model, tmp_path, huggingface_callback(diagnostics), **options).train()
        records[name] = list(diagnostics.history)
    for one, other in zip(records["with"], records["without"], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        of_steps = "weight_condition_number_two_step"  # Adam's first steps go by the signs of gradients near zero
        assert one.values == pytest.approx({**other.values, of_steps: one.values[of_steps]}, rel=1e-3, nan_ok=True)
        assert one.values[of_steps] == pytest.approx(other.values[of_steps], rel=0.1, nan_ok=True)
        assert any("num_items_in_batch left out" in note for note in one.notes)
    # The same first micro-batch and weights; what the optimizer gets is the mean over two micro-batches.
    one, other = records["accumulated"][0], records["without"][0]
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.values["fisher_trace"] == pytest.approx(other.values["fisher_trace"], rel=1e-3)
    assert all(
        math.isfinite(record.values["weight_condition_number_two_step"]) for record in records["accumulated"][1:]
    )


def test_what_is_attached_stays(tmp_path):
    model = gpt2()
    with Diagnostics(model, every=3).attach() as diagnostics:
        trainer(model, tmp_path, huggingface_callback(diagnostics)).train()
        assert diagnostics.is_attached
        assert diagnostics.history[0].learning_rate is None


def test_only_diagnostics():
    with pytest.raises(TypeError, match="diagnostics is a Linear"):
        huggingface_callback(nn.Linear(1, 1))
