"""Loss of a causal language model on the labelled tokens of sequences, such as an assistant's turns."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

IGNORED = -100


@torch.no_grad()
def labelled_losses(model: Any, rows: Sequence[dict[str, Any]], pad: int, batch: int = 8) -> torch.Tensor:
    """The mean negative log-likelihood of each row's labelled tokens, in nats, float64 ``[rows]``.

    Args:
        model: a causal language model of transformers; its mode (training or eval) does not change.
        rows: ``input_ids`` and ``labels``, which are `IGNORED` for tokens that do not count. Each row needs a label
            after its first token.
        pad: the token that fills shorter rows of a batch.
    """
    training, losses = model.training, []
    model.eval()
    for start in range(0, len(rows), batch):
        part = [rows[index] for index in range(start, min(start + batch, len(rows)))]
        longest = max(len(row["input_ids"]) for row in part)
        ids = torch.full((len(part), longest), pad)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for place, row in enumerate(part):
            length = len(row["input_ids"])
            ids[place, :length], mask[place, :length] = torch.tensor(row["input_ids"]), 1
            labels[place, :length] = torch.tensor(row["labels"])
        ids, labels, mask = (tensor.to(model.device) for tensor in (ids, labels, mask))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:]
        each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
        counted = (targets != IGNORED).sum(1)
        losses.append((each.view_as(targets).double().sum(1) / counted).cpu())
    model.train(training)
    return torch.cat(losses)
