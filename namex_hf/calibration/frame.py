"""A causal language model around its decoder layers: what its own forward pass hands to each of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FamilyError
from ..families import Config
from ..families.outline import Outline, build

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional ones behind the hidden states, and named ones."""


class _Finished(Exception):
    """All layers have what the model hands to them."""


class _StandIn(nn.Module):
    """In the place of a decoder layer: keeps what the model hands to it, and passes something on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # The forward pass of some models reads a layer's kind.
        vars(self).update({name: value for name, value in vars(layer).items() if isinstance(value, int | str)})
        self.given: tuple[Tensor, Arguments] | None = None
        self.replace: Callable[[Tensor, Arguments], Tensor] | None = None
        self.finishes = False

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        self.given = hidden, (positional, named)
        output = hidden if self.replace is None else self.replace(hidden, (positional, named))
        if self.finishes:
            raise _Finished
        return output


class Frame:
    """The model around its layers: what its own forward hands to each of them (masks, rotary embedding, positions)."""

    def __init__(self, model: Any, outline: Outline, layers: list[nn.Module], device: torch.device) -> None:
        self.device, self._model = device, model
        self._layers = [_StandIn(layer) for layer in layers]
        path = outline.decoder_layers[0].rpartition(".")[0]
        model.set_submodule(path, nn.ModuleList(self._layers))
        self._inner = model.get_submodule(path.rpartition(".")[0])
        restore_buffers(model, model, device)
        self._known: dict[torch.Size, list[Arguments]] = {}

    def arguments(self, shape: torch.Size) -> list[Arguments]:
        """Those of every layer, for hidden states of ``shape``, on which alone they depend."""
        if shape not in self._known:
            given = self._run(torch.zeros((), dtype=torch.float32, device=self.device).expand(shape))
            self._known[shape] = [arguments for _, arguments in given]
        return self._known[shape]

    def first(self, embedded: Tensor) -> Tensor:
        """What the first layer receives."""
        return self._run(embedded.to(self.device))[0][0]

    def in_step(self, embedded: Tensor, compute: Callable[[int, Tensor, Arguments], Tensor]) -> None:
        """The model's own forward pass. Args: compute, a layer's output from its number, input and arguments."""
        for index, layer in enumerate(self._layers):
            layer.replace = partial(compute, index)
        self._run(embedded)

    @torch.no_grad()
    def _run(self, embedded: Tensor) -> list[tuple[Tensor, Arguments]]:
        """What the model hands to every layer."""
        self._layers[-1].finishes = True
        try:
            self._inner(inputs_embeds=embedded, use_cache=False)
        except _Finished:
            return [layer.given for layer in self._layers if layer.given is not None]
        except (TypeError, ValueError, AttributeError) as error:  # what a layer hands on is not one tensor
            raise FamilyError(
                f"{type(self._inner).__name__} does not run with its layers one at a time ({error}), so calibration "
                "text cannot be used; a recipe without text works"
            ) from error
        finally:
            self._reset()
        raise FamilyError(f"{type(self._inner).__name__} does not call its decoder layers")

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states behind the last layer; norm and head have their weights."""
        hidden = hidden.to(self.device)
        self._layers[-1].replace = lambda *_: hidden
        try:
            logits: Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        finally:
            self._reset()
        return logits

    def _reset(self) -> None:
        for layer in self._layers:
            layer.given, layer.replace, layer.finishes = None, None, False


def on_meta(config: Config) -> Any:
    """The causal language model of a configuration, without memory for its weights.

    Raises:
        FamilyError: transformers cannot build it.
    """
    try:
        return build(config, "sdpa").float()
    except FamilyError:
        return build(config, "eager").float()  # some families have no other attention


def restore_buffers(model: Any, module: nn.Module, device: torch.device) -> None:
    """Give a module of a model on the meta device the buffers that are in no checkpoint, as its class computes them."""
    for part in module.modules():
        lost = [name for name in part._non_persistent_buffers_set if getattr(part, name).is_meta]
        for name in lost:
            setattr(part, name, torch.empty_like(getattr(part, name), device=device))
        if lost:
            model._init_weights(part)
