"""Both stages on live models of both families: what stage 1 adds, what `freeze` writes, what stage 2 cannot change."""

import copy
from pathlib import Path

import pytest
import torch
from agreement import agreement, hear
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from namex_hf.merging.routers import assignment, load_entropy, overlap
from namex_hf.merging.routing import TokenRouting
from namex_hf.training.stable_moe import StageOne, begin, freeze, student_of
from namex_hf.training.stable_moe.routing_hooks import LayerRouting, stable_routers
from namex_hf.training.stable_moe.student import balance_loss, distillation_loss

SPARSE = {"merge": "residual", "method": "smoe", "routing": "stable"}
RESIDUAL = {"merge": "residual", "routing": "stable"}
SOFT = {"merge": "soft", "routing": "stable", "segment": 4}
ALL = {
    f"{family}-{name}": (family, recipe)
    for family in ("qwen2_moe", "deepseek")
    for name, recipe in (("sparse", SPARSE), ("residual", RESIDUAL), ("soft", SOFT))
}
every_model = pytest.mark.parametrize(("family", "recipe"), ALL.values(), ids=ALL)


class StageOneTrainer(StageOne, Trainer):
    pass


def some_ids(rows: int = 4, length: int = 10, below: int = 30, seed: int = 1) -> torch.Tensor:
    """Ids from 3 on; the model knows more than those below `below`."""
    return torch.randint(3, below, (rows, length), generator=torch.Generator().manual_seed(seed))


def data(rows: int = 32) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in some_ids(rows)]


def arguments(folder: Path, **fields) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
        }
        | fields
    )


def tables(model) -> torch.Tensor:
    """``[layers, vocabulary, top_k]``"""
    return torch.stack([router.assignment for router in stable_routers(model)]).clone()


def fill(model, below: int = 30, seed: int = 5) -> None:
    """Random assignments for the ids below `below`."""
    draw = torch.Generator().manual_seed(seed)
    for router in stable_routers(model):
        vocabulary, top_k = router.assignment.shape
        found = torch.rand(vocabulary, model.config.num_experts, generator=draw).argsort(1)[:, :top_k]
        found[below:] = -1
        router.assignment.copy_(found)


@every_model
def test_stage_one_routes_linearly(make_model, family, recipe):
    ids = some_ids()
    model, linear = make_model(family, recipe), make_model(family, {**recipe, "routing": "linear"})
    linear.load_state_dict({n: t for n, t in model.state_dict().items() if "stable_router" not in n})
    with torch.no_grad():
        expected = linear(ids).logits
        fill(model)
        assert not torch.equal(model(ids).logits, expected)
        begin(model)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.train()(ids, labels=ids).logits, expected)
    assert (tables(model) == -1).all()


@every_model
def test_training_adds_the_two_terms_and_evaluation_nothing(make_model, family, recipe):
    model, ids = make_model(family, recipe), some_ids()
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, 5:] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        alone = model(ids, attention_mask=mask, labels=ids).loss
    student = begin(model, width=7, balance=0.3, distillation=0.7)
    assert student.tokens.shape == (model.config.vocab_size, 2, 7)
    real = mask.flatten() != 0
    logits = [one[real] for one in plain.router_logits]
    own = student(ids.flatten()[real])
    balance = sum(float(balance_loss(one, 3)) for one in logits) / 2
    distillation = sum(float(distillation_loss(own[layer].detach(), logits[layer], 3)) for layer in range(2)) / 2
    assert torch.equal(model(ids, attention_mask=mask, labels=ids).loss, alone)
    assert not student.seen.any()
    model.train()
    loss = model(ids, attention_mask=mask, labels=ids).loss
    assert loss.item() == pytest.approx(alone.item() + 0.3 * balance + 0.7 * distillation, rel=1e-5)
    assert student.seen.nonzero().flatten().tolist() == ids.flatten()[real].unique().tolist()
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    with torch.no_grad():  # a part of a step counts as its predicted tokens do in it
        share = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=72).loss
    assert share.item() == pytest.approx(loss.item() / 2, rel=1e-5)
    assert begin(model).factors == {"balance": 0.3, "distillation": 0.3}  # StableMoE's


def test_only_the_balance_loss_reaches_the_router(make_model):
    ids, grads = some_ids(), {}
    for balance, distillation in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0)):
        model = make_model().train()
        begin(model, balance=balance, distillation=distillation)
        model(ids, labels=ids).loss.backward()
        grads[balance, distillation] = [layer.mlp.gate.weight.grad for layer in model.model.layers]
    for layer in range(2):
        assert torch.equal(grads[0.0, 0.0][layer], grads[0.0, 0.5][layer])
        assert not torch.allclose(grads[0.0, 0.0][layer], grads[0.5, 0.0][layer])


def test_gradient_checkpointing_changes_nothing(make_model):
    ids, found = some_ids(), []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        begin(model)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert not any(router._forward_hooks for router in stable_routers(model))
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_pass_that_broke_off_leaves_nothing_behind(make_model):
    model, ids = make_model().train(), some_ids()
    student = begin(model)
    last = model.model.layers[-1]
    handle = last.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, labels=ids)
    handle.remove()
    model(ids, labels=ids)
    expected = student.losses
    model(ids, labels=ids)
    assert student.losses == expected
    freeze(model)
    assert not any(router._forward_hooks for router in stable_routers(model))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_model_and_its_copy_learn_apart(make_model):
    model, ids = make_model().train(), some_ids()
    begin(model)
    other = copy.deepcopy(model)
    other(ids, labels=ids)
    assert other.stable_student.seen.any()
    assert not model.stable_student.seen.any()


@every_model
def test_freeze_writes_the_students_choice_for_what_it_has_seen(make_model, family, recipe, tmp_path):
    model = make_model(family, recipe)
    trainer = StageOneTrainer(model=model, args=arguments(tmp_path), train_dataset=data(), student_learning_rate=0.05)
    student = student_of(trainer.model)
    start = student.tokens.detach().clone()
    trainer.train()
    seen = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    seen[some_ids(32)] = True  # 5 steps of 4 rows need not meet all of them
    assert not (student.seen & ~seen).any()
    seen = student.seen.clone()
    assert 20 <= seen.sum() <= 27
    moved = (student.tokens.detach() != start).flatten(1).any(1)
    assert torch.equal(moved, seen)
    assert freeze(model) is student
    found = tables(model)
    for layer in range(2):
        for token in range(len(seen)):
            expected = [-1, -1, -1]
            if seen[token]:
                logits = student.experts[layer] @ student.tokens[token, layer]
                expected = logits.argsort(descending=True)[:3].tolist()
            assert found[layer, token].tolist() == expected
    assert not any("student" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="no student"):
        freeze(model)


@every_model
def test_stage_two_cannot_change_an_assignment(make_model, family, recipe, tmp_path):
    model, ids = make_model(family, recipe), some_ids()
    fill(model)
    frozen, weights = tables(model), copy.deepcopy(model.state_dict())
    before = hear(model, ids, 2)
    Trainer(model=model, args=arguments(tmp_path, learning_rate=0.3), train_dataset=data()).train()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for one in (model, again):
        assert torch.equal(tables(one), frozen)
        after = hear(one, ids, 2)
        for layer in range(2):
            assert torch.equal(after[layer].chosen, before[layer].chosen)
            assert torch.equal(after[layer].chosen, frozen[layer, ids.flatten()])
            assert not torch.equal(after[layer].linear, before[layer].linear)  # the router would have
            assert not torch.allclose(after[layer].logits, before[layer].logits)
    assert any(name.endswith("mlp.gate.weight") for name in weights)
    for name, tensor in model.state_dict().items():
        kept = name.endswith("assignment")
        assert torch.equal(tensor, weights[name]) == kept, name


@every_model
def test_gate_values_train_in_stage_two(make_model, family, recipe):
    model, ids = make_model(family, recipe).train(), some_ids()
    fill(model)
    model(ids, labels=ids).loss.backward()
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    assert len(gates) == 2
    assert all(gate.weight.grad.abs().sum() > 0 for gate in gates)
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_the_student_learns_at_its_own_rate(make_model, tmp_path):
    model = make_model()
    trainer = StageOneTrainer(
        model=model,
        args=arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1, max_steps=60),
        train_dataset=data(),
        student_learning_rate=0.03,
        student={"width": 12},
    )
    student = student_of(model)
    optimiser = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimiser
    held = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert len(held) == len(set(map(id, held)))
    last = optimiser.param_groups[-1]
    assert list(map(id, last["params"])) == list(map(id, student.parameters()))
    assert (last["lr"], last["weight_decay"]) == (0.03, 0.0)
    ids = torch.stack([row["input_ids"] for row in data()])

    def overlaps(choose) -> list[float]:
        return [float(overlap(one.linear, choose(layer, one)).mean()) for layer, one in enumerate(hear(model, ids, 8))]

    def counted(layer: int, one: LayerRouting) -> torch.Tensor:
        value = one.logits.softmax(-1).gather(-1, one.linear)
        return assignment(one.ids, TokenRouting(one.linear, value), 8, 41)[one.ids].long()

    start = overlaps(lambda layer, one: student.choose(one.ids)[layer])
    trainer.train()
    end = overlaps(lambda layer, one: student.choose(one.ids)[layer])
    most = overlaps(counted)  # that any table of these tokens' ids could have
    freeze(model)
    for layer in range(2):
        assert start[layer] < 0.8 * most[layer] < 0.95 * most[layer] < end[layer] <= most[layer] + 1e-6
    assert all(row["seen"]["agreement"] > 0.45 for row in agreement(model, some_ids(seed=9)))  # by chance 3 of 8


def test_accumulated_passes_make_the_step_of_one(make_model, tmp_path):
    """Of the distillation, a mean over tokens; the balance is that of a pass."""
    found = []
    for size, passes in ((4, 1), (2, 2)):
        model = make_model()
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=passes,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            train_sampling_strategy="sequential",
        )
        torch.manual_seed(3)
        trainer = StageOneTrainer(
            model=model, args=args, train_dataset=data(4), student_learning_rate=0.1, student={"balance": 0.0}
        )
        trainer.train()
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_stage_one_is_resumed_from_a_checkpoint(make_model, tmp_path):
    def run(model, resume=None):
        torch.manual_seed(3)
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        StageOneTrainer(model=model, args=args, train_dataset=data()).train(resume_from_checkpoint=resume)
        return model

    undisturbed = run(make_model())
    checkpoint = tmp_path / "checkpoint-2"
    resumed = run(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), str(checkpoint))
    for name, tensor in undisturbed.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_under_an_adapter(make_model, tmp_path):
    model = make_model()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    trainer = StageOneTrainer(model=adapted, args=arguments(tmp_path), train_dataset=data(), student_learning_rate=0.05)
    student = student_of(trainer.model)
    start = student.tokens.detach().clone()
    trainer.train()
    assert student.seen.any()
    assert torch.equal((student.tokens.detach() != start).flatten(1).any(1), student.seen)
    assert freeze(trainer.model) is student
    seen = student.seen
    expected = student.choose(torch.arange(len(seen)))
    for layer, table in enumerate(tables(model)):
        assert torch.equal(table[seen].long(), expected[layer][seen])
        assert (table[~seen] == -1).all()
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items() if "base_layer" in name
    )


@every_model
def test_agreement_by_hand(make_model, family, recipe):
    model, ids = make_model(family, recipe).train(), some_ids(5, 11, below=41, seed=7)
    student = begin(model)
    model(some_ids(), labels=some_ids())
    freeze(model)
    found = agreement(model, ids, student, batch=2)
    assert model.training
    outputs = model.eval()(ids, output_router_logits=True)
    seen = [bool(student.seen[token]) for token in ids.flatten()]
    assert 0 < sum(seen) < len(seen)
    for layer, row in enumerate(found):
        linear = outputs.router_logits[layer].topk(3).indices.tolist()
        own = student.choose(ids.flatten())[layer].tolist()
        groups = {"seen": [], "unseen": [], "all": []}
        for token, known in enumerate(seen):
            groups["seen" if known else "unseen"].append((linear[token], own[token]))
            groups["all"].append((linear[token], own[token] if known else linear[token]))
        assert row["assigned"] == pytest.approx(sum(seen) / len(seen))
        for name, pairs in groups.items():
            overlaps = [len(set(one) & set(other)) / 3 for one, other in pairs]
            assert row[name]["agreement"] == pytest.approx(sum(overlaps) / len(pairs)), name
            assert row[name]["agreement_first"] == pytest.approx(sum(a[0] == b[0] for a, b in pairs) / len(pairs))
            entropies = [load_entropy(torch.tensor(side), 8) for side in zip(*pairs, strict=True)]
            assert [row[name]["load_entropy_linear"], row[name]["load_entropy"]] == pytest.approx(entropies)


def test_agreement_without_a_student_or_a_token(make_model):
    model, ids = make_model(), some_ids()
    fill(model)
    assert all(row["unseen"] is None and row["seen"] == row["all"] for row in agreement(model, ids))
    assert not model.training
    stranger = agreement(model, torch.full((1, 4), 40))
    assert all(row["seen"] is None and row["all"]["agreement"] == 1 for row in stranger)


def test_refusals(make_model):
    with pytest.raises(ValueError, match="routing: stable"):
        begin(make_model("qwen2_moe", {**SPARSE, "routing": "cosine"}))
    model, ids = make_model().train(), some_ids()
    with pytest.raises(ValueError, match="no student"):
        freeze(model)
    begin(model)
    with pytest.raises(ValueError, match="labels"):
        model(ids)
    with pytest.raises(ValueError, match="output_router_logits"):
        model(ids, labels=ids, output_router_logits=True)
    begin(model, balance=0)
    model(ids, labels=ids, output_router_logits=True)
