"""StableMoE's two stages (Dai et al. 2022) for a model patched with ``routing: stable``, in a top-k form.

Stage 1, from `begin` to `freeze`, trains the model under its linear router with a balance loss, and beside it a student
that learns from the token id alone which experts the router chooses. `freeze` writes what the student has learnt into
each layer's table of assignments. Stage 2 is any training of the model: the table is a buffer of integers, which no
gradient reaches, while the gate values stay the router's own and train::

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

from .listening import stable_routers
from .student import Student


def student_of(model: nn.Module) -> Student:
    """The student that a model has between `begin` and `freeze`.

    Raises:
        ValueError: it has none.
    """
    for module in model.modules():
        if isinstance(module, Student):
            return module
    raise ValueError(f"{type(model).__name__} has no student: `begin` starts stage 1, and `freeze` ends it")


def begin(model: Any, width: int = 50, balance: float = 0.3, distillation: float = 0.3) -> Student:
    """Start stage 1: the model routes linearly, and the losses of its training passes have the two terms added.

    The tables of assignments are cleared, from calibration text or an earlier stage 1 as they may be, and the model
    gets a new, random `Student` as its ``stable_student``, also where it had one. Passes in training mode are given
    `labels`, and `attention_mask` where there is padding, by keyword, as `Trainer` does; in eval mode the loss is the
    model's own.

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
    """End stage 1: every id that was seen gets the student's top-k experts in each layer, others keep the router's own.

    Args:
        model: the one that `begin` had.

    Returns:
        The student, which is no part of the model any more.
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
    """Mixin for `transformers.Trainer`: `begin`, with an optimiser for both.

    What it adds is part of the model's loss, which is minimised also where the trainer has a loss of its own, as TRL's
    `SFTTrainer` has; there is no label smoothing. What evaluation reports is the model's loss alone. The student's two
    losses are logged beside it, as ``stable/balance`` and ``stable/distillation``. Checkpoints hold the student: a run
    is resumed with the model loaded from the checkpoint that it is resumed from. Under an adapter they do not.

    Args:
        student_learning_rate: of the student, which starts from nothing; `learning_rate` is the model's. Both follow
            the same schedule.
        student: keyword arguments of `begin`.
    """

    model: Any
    optimizer: Any

    def __init__(
        self, *args: Any, student_learning_rate: float = 0.01, student: dict[str, Any] | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.student_learning_rate = student_learning_rate
        begin(self.model, **(student or {}))  # after the trainer has put an adapter around the model, if it does

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own, whatever the trainer's."""
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
