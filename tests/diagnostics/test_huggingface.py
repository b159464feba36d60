"""The callback in a real Hugging Face trainer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from torchgeom_optim.diagnostics import Diagnostics
from torchgeom_optim.diagnostics.huggingface import huggingface_callback
from torchgeom_optim.diagnostics.reading import verdicts
from torchgeom_optim.geometry.gram_recorder import GramRecorder

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.slow  # its import takes ten seconds


def gpt2(dropout: float = 0.0, num_layers: int = 1, width: int = 8) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=2,
        vocab_size=11,
        n_positions=6,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_records_come_and_reach_the_log(tmp_path, dropout):
    plain, watched = gpt2(dropout), gpt2(dropout)
    trainer(plain, tmp_path).train()
    diagnostics = Diagnostics(watched, every=2)
    running = trainer(watched, tmp_path, huggingface_callback(diagnostics))
    running.train()
    assert [record.step for record in diagnostics.history] == [0, 2, 4]
    notes = [note for record in diagnostics.history for note in record.notes]
    assert not any("not measured" in note or "pass of its own" in note for note in notes)
    assert not any(math.isnan(value) for value in diagnostics.history[-1].values.values())
    assert diagnostics.history[0].batch_size == 4
    logged = [entry for entry in running.state.log_history if "diagnostics/loss" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    running.state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert "diagnostics/gradient_norm" in json.dumps(json.loads((tmp_path / "trainer_state.json").read_text()))
    assert not diagnostics.is_attached
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)  # the training did not feel it


@pytest.mark.parametrize("rides", [True, False])
def test_dropouts_masks_are_those_of_one_pass(rides):
    """The Gram matrix against autograd's, sample by sample, on the very pass that was measured."""
    model = gpt2(dropout=0.3).double()
    tokens = torch.stack([Sentences()[k]["input_ids"] for k in range(4)])
    torch.manual_seed(1)
    if rides:
        with GramRecorder(model, reduction="mean") as recorder:
            model(input_ids=tokens, labels=tokens).loss.backward()
            found = recorder.result().weights
    else:
        found = Diagnostics(model).measure({"input_ids": tokens, "labels": tokens}).values["fisher_trace"]
    torch.manual_seed(1)
    logits = model(input_ids=tokens).logits.float()  # as the model's loss takes them
    predicted = logits[:, :-1].transpose(1, 2)
    losses = nn.functional.cross_entropy(predicted, tokens[:, 1:], reduction="none").mean(1)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    if rides:
        # The loss itself is in single precision, whose sum goes another way.
        torch.testing.assert_close(found, flat @ flat.T, **tolerance(torch.float32))
    else:
        assert found == pytest.approx(float(flat.square().sum() / 4), rel=1e-6)


def verdicts_while_training(model: nn.Module, steps: int = 40) -> set[tuple[str, str | None]]:
    """Whatever is said at any time of sentences that count on from a token, as a network learns in so many steps."""
    optimizer, said = torch.optim.AdamW(model.parameters(), lr=1e-2), set()
    generator = torch.Generator().manual_seed(1)
    with Diagnostics(model, every=2, metrics=["default", "free"]).attach(optimizer) as diagnostics:
        for _ in range(steps):
            tokens = (torch.randint(11, (8, 1), generator=generator) + torch.arange(6)) % 11
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            said |= {(verdict.kind, verdict.layer) for verdict in verdicts(diagnostics.history)}
    assert diagnostics.history[-1].loss < 0.5 * diagnostics.history[0].loss
    return said


@pytest.mark.parametrize(("dropout", "num_layers"), [(0.0, 2), (0.0, 6), (0.1, 2)])
def test_a_healthy_network_is_told_of_nothing(dropout, num_layers):
    assert verdicts_while_training(gpt2(dropout, num_layers, width=32)) == set()


def test_a_block_of_unequal_scale_is_told():
    model = gpt2(num_layers=4, width=32)
    feed = model.transformer.h[0].mlp
    with torch.no_grad():
        feed.c_fc.weight.div_(200.0)
        feed.c_proj.weight.mul_(200.0)
    assert ("exploding gradients", "transformer.h.0.mlp.c_fc") in verdicts_while_training(model)


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
