"""StableMoE's two stages (Dai et al. 2022) for a model patched with ``routing: stable``, in a top-k form.

Stage 1, from `begin` to `freeze`, trains the model under its linear router with a balance loss. It also trains a
student that predicts the router's experts from the token id alone. `freeze` writes the student's predictions into each
layer's table of assignments. Stage 2 is any training of the model. The table is a buffer of integers without gradient;
the gate values are still the router's own, and train::

    class StageOneTrainer(StageOne, Trainer): ...

    trainer = StageOneTrainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    freeze(trainer.model)
    Trainer(model=trainer.model, args=arguments, train_dataset=data).train()
"""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .routing_hooks import stable_routers
from .student import Student


def student_of(model: nn.Module) -> Student:
    """The student of a model between `begin` and `freeze`.

    Raises:
        ValueError: the model has no student.
    """
    for module in model.modules():
        if isinstance(module, Student):
            return module
    raise ValueError(f"{type(model).__name__} has no student: `begin` starts stage 1, and `freeze` ends it")


def begin(model: Any, width: int = 50, balance: float = 0.3, distillation: float = 0.3) -> Student:
    """Start stage 1: the model routes linearly, and the losses of its training passes get two further terms.

    The tables of assignments are cleared. The model gets a new, random `Student` as its ``stable_student``, which
    replaces an earlier student. Passes in training mode need `labels`, and with padding `attention_mask`, by keyword,
    as from `Trainer`. In eval mode the loss is the model's own.

    Args:
        model: patched with ``routing: stable``; under an adapter, the adapter's model.
        width, balance, distillation: see `Student`.
    """
    routers = stable_routers(model)
    if isinstance(getattr(model, "stable_student", None), Student):
        student_of(model).leave()
    for router in routers:
        router.assignment.fill_(-1)
    vocabulary, top_k = len(routers[0].assignment), max(router.assignment.shape[1] for router in routers)
    student = Student(len(routers), vocabulary, model.config.num_experts, top_k, width, balance, distillation)
    model.stable_student = student.to(routers[0].assignment.device)
    student.attend(model)
    return student


@torch.no_grad()
def freeze(model: Any) -> Student:
    """End stage 1: every id in training gets the student's top-k experts in each layer; other ids use the router's.

    Args:
        model: the model given to `begin`.

    Returns:
        The student, removed from the model.
    """
    student = student_of(model)
    ids = student.seen.nonzero().flatten()
    for router, experts in zip(stable_routers(model), student.choose(ids), strict=True):
        table = torch.full_like(router.assignment, -1)
        table[ids.to(table.device)] = experts[:, : table.shape[1]].to(table)
        router.assignment.copy_(table)
    student.leave()
    del model.stable_student
    return student


class StageOne:
    """Mixin for `transformers.Trainer`: calls `begin`, and optimises model and student.

    The two terms are part of the model's loss. This loss is minimised also under trainers with their own loss, such as
    TRL's `SFTTrainer`; there is no label smoothing. Evaluation reports the model's loss alone. The two terms are logged
    as ``stable/balance`` and ``stable/distillation``. Checkpoints hold the student, except under an adapter: to resume,
    load the model from the checkpoint.

    Args:
        student_learning_rate: learning rate of the untrained student; `learning_rate` is the model's. Both follow the
            same schedule.
        student: keyword arguments of `begin`.
    """

    model: Any
    optimizer: Any

    def __init__(
        self, *args: Any, student_learning_rate: float = 0.01, student: dict[str, Any] | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.student_learning_rate = student_learning_rate
        begin(self.model, **(student or {}))  # after the trainer has added an adapter to the model

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, in place of the trainer's."""
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update({f"stable/{name}": float(loss) for name, loss in student_of(self.model).losses.items()})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            student = student_of(self.model).requires_grad_(False)
            optimizer: Any = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
            group = {"params": list(student.requires_grad_(True).parameters()), "lr": self.student_learning_rate}
            optimizer.add_param_group({**group, "weight_decay": 0.0})
        return self.optimizer
