"""The decoder of a causal language model, one decoder layer in memory at a time.

Embedding, attention, norms, router, shared expert, rotary embedding and masks are those of the transformers class;
nothing of them is written again here. The model's own forward pass runs once for every shape of a batch, with stand-ins
for its decoder layers: they record the arguments that it hands to each, which are replayed with the layer itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.layout import FLOATS
from ..errors import CheckpointError, FamilyError
from ..families import Config
from ..families.outline import Outline
from ..progress import ProgressCallback, ProgressEvent, no_progress
from .frame import Arguments, Frame, on_meta, restore_buffers

#: A tensor by its name in the class, on the CPU in its own dtype; KeyError where there is none of that name.
Read = Callable[[str], Tensor]

#: Tokens of a batch: enough to keep a processor busy, few enough that activations stay about as large as a layer.
BATCH_TOKENS = 2048
TOLERANCE = 1e-5
"""How far a layerwise pass may be from the model's own forward pass, relative to the largest number."""


@dataclass(frozen=True)
class Tapped:
    """A MoE layer without its routed experts, whose output `Decoder.pass_on` completes.

    Attributes:
        rest: ``[sequences, length, hidden]`` float32, the layer's output without the routed part; where that is no
            summand of the output (`Family.linear`), the layer's input.
        inputs: ``[tokens, hidden]`` float32, what the routed experts are given; sequence after sequence.
        index: ``[tokens, top_k]`` int64, the experts that the router chose.
        value: ``[tokens, top_k]`` float32, their weights as the router hands them over.
    """

    rest: Tensor
    inputs: Tensor
    index: Tensor
    value: Tensor


class Decoder:
    """Embeds token ids, and lends its layers one after the other.

    Memory: the embedding table in its own dtype while `embed` runs; then a layer in float32 without its routed experts
    (DeepSeek-MoE-16B: 140 MB, the dense layer 340 MB), and one tensor of it in its own dtype while it is read. With it
    the activations of one batch (200 MB, in the dense layer 400 MB), and one mask where a window slides.
    """

    def __init__(
        self,
        config: Config,
        outline: Outline,
        read: Read,
        device: torch.device | str = "cpu",
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        """
        Args:
            config: the content of ``config.json``; it is not changed.
            outline: of the model.
            read: never asked for tensors of routed experts.
            device: where layers are held and run; hidden states may lie elsewhere.
            batch_tokens: run at a time, in whole sequences, at least one.

        Raises:
            FamilyError: transformers cannot build this model.
        """
        self._read, self._batch_tokens, self._outline = read, batch_tokens, outline
        self._device, self._model = torch.device(device), on_meta(config)
        self._layers = [self._model.get_submodule(name) for name in outline.decoder_layers]
        self._taps = {layer: _Tap() for layer in outline.blocks}
        for layer, tap in self._taps.items():
            self._model.get_submodule(outline.blocks[layer]).experts = tap
        self._frame = Frame(self._model, outline, self._layers, self._device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids ``[sequences, length]`` to what the first layer receives, ``[sequences, length, hidden]`` float32.

        Raises:
            CheckpointError: an id that is not in the vocabulary, or no table as ``config.json`` has it.
        """
        vocabulary, width = self._model.get_input_embeddings().weight.shape
        if ids.numel() and int(ids.max()) >= vocabulary:
            raise CheckpointError(f"token id {int(ids.max())}: config.json makes the vocabulary {vocabulary}")
        table = self._tensor(torch.Size((vocabulary, width)), self._outline.embedding)
        hidden = torch.empty(*ids.shape, width, device=self._device, dtype=torch.float32)
        for rows, target in zip(ids.to(table.device), hidden, strict=True):  # the table is never converted whole
            target.copy_(nn.functional.embedding(rows, table))
        for rows in self._batches(hidden):
            hidden[rows] = self._frame.first(hidden[rows])
        return hidden

    @contextmanager
    def layer(self, index: int) -> Iterator["DecoderLayer"]:
        """Decoder layer ``index`` with its weights; they go when the ``with`` block is left.

        Raises:
            CheckpointError: a tensor that the layer needs is missing, or has a wrong shape or dtype.
        """
        module = self._layers[index]
        try:
            self._materialise(module, self._outline.decoder_layers[index])
            yield DecoderLayer(self, index)
        finally:
            module.to("meta")

    def pass_on(self, index: int, rest: Tensor, output: Tensor) -> None:
        """Make of `Tapped.rest` of a MoE layer its output, in place. Args: output, routed, ``[tokens, hidden]``.

        Memory: where that is no sum, the layer without its experts again.
        """
        if self._outline.family.linear:
            rest.add_(output.to(rest.device).view_as(rest))
            return
        with self.layer(index) as module:
            module.answer(rest, output)

    @torch.no_grad()
    def losses(self, streams: Iterable[Tensor], ids: Tensor) -> list[float]:
        """The mean loss a token of each stream of hidden states ``[sequences, length, hidden]``, in nats.

        Args:
            streams: behind the last layer.
            ids: ``[sequences, length]``, of all of them.

        Memory: the head in float32, and the logits of a sequence.

        Raises:
            CheckpointError: the norm or the head is missing, or has a wrong shape or dtype.
        """
        ends = [name for name, module in self._model.named_modules() if self._is_end(name, module)]
        for name in ends:
            self._materialise(self._model.get_submodule(name), name)
        means = []
        for hidden in streams:
            losses = [
                nn.functional.cross_entropy(self._frame.logits(row[None])[0, :-1], labels[1:].to(self._device))
                for row, labels in zip(hidden, ids, strict=True)
            ]
            means.append(float(torch.stack(losses).double().mean()))
        for name in ends:
            self._model.get_submodule(name).to("meta")
        return means

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Compare the layerwise pass with the model's own forward pass, routed experts apart, on one batch.

        Args:
            ids: ``[sequences, length]``, of which the first are taken.

        Memory: one layer, as always.

        Raises:
            FamilyError: they differ: the layers take what other layers make, or another norm follows the experts.
        """
        ids = ids[next(self._batches(ids))]
        replayed, draw = self.embed(ids), torch.Generator().manual_seed(0)
        self._frame.arguments(replayed.shape)  # known before the model's own forward pass begins

        def both(index: int, own: Tensor, arguments: Arguments) -> Tensor:
            nonlocal replayed
            with self.layer(index) as layer:
                own = layer.run(own, arguments)
                given = replayed.clone()
                if layer.is_mixture:
                    layer.tap(given)
                    if not self._outline.family.linear:
                        layer.answer(given, torch.zeros_like(given))
                    self._check_sum(layer, index, replayed, given, draw)
                else:
                    layer.forward(given)
            self._expect_equal(index, own, replayed := given)
            return own

        self._frame.in_step(replayed.clone(), both)

    def _check_sum(self, layer: "DecoderLayer", index: int, given: Tensor, rest: Tensor, draw: torch.Generator) -> None:
        """Whether the routed output is added to the rest, where the family says so."""
        if self._outline.family.linear:
            output, answered = torch.randn(rest.shape, generator=draw).to(rest), given.clone()
            layer.answer(answered, output)
            self._expect_equal(index, answered, rest + output)

    def _expect_equal(self, index: int, own: Tensor, layerwise: Tensor) -> None:
        apart = float((own - layerwise).abs().max() / own.abs().max().clamp(min=torch.finfo().tiny))
        if not apart <= TOLERANCE:
            raise FamilyError(
                f"model_type {self._outline.family.model_type!r}: layer {index} by itself is {apart:.1e} away from "
                f"{type(self._model).__name__}'s own forward pass (accepted: {TOLERANCE:.0e}), so calibration text "
                "cannot be used; a recipe without text works"
            )

    def _batches(self, hidden: Tensor) -> Iterator[slice]:
        """Whole sequences of about `BATCH_TOKENS`."""
        count = max(1, self._batch_tokens // max(1, hidden.shape[1]))
        for start in range(0, len(hidden), count):
            yield slice(start, min(start + count, len(hidden)))

    def _is_end(self, name: str, module: nn.Module) -> bool:
        """Whether a module with parameters of its own follows the layers."""
        inside = name.startswith(self._outline.decoder_layers[0].removesuffix(".0"))
        first = f"{name}.weight" == self._outline.embedding
        return not inside and not first and next(module.parameters(recurse=False), None) is not None

    def _materialise(self, module: nn.Module, name: str) -> None:
        restore_buffers(self._model, module, self._device)
        weights = {
            key: self._tensor(empty.shape, f"{name}.{key}").to(self._device, empty.dtype)
            for key, empty in module.state_dict().items()
        }
        module.load_state_dict(weights, assign=True)

    def _tensor(self, shape: torch.Size, name: str) -> Tensor:
        try:
            # Detached: a live model's parameter that becomes a layer's weight takes over its requires_grad.
            tensor = self._read(name).detach()
        except KeyError:
            raise CheckpointError(f"tensor {name} is missing; calibration needs it") from None
        if tensor.shape != shape:
            raise CheckpointError(f"tensor {name} is {list(tensor.shape)}; config.json makes it {list(shape)}")
        if tensor.dtype not in FLOATS and tensor.is_floating_point():
            raise CheckpointError(f"tensor {name} is {tensor.dtype}; accepted: bfloat16, float16, float32")
        return tensor


class DecoderLayer:
    """A decoder layer that is in memory, lent by `Decoder.layer`. Hidden states are float32, on any device."""

    def __init__(self, decoder: Decoder, index: int) -> None:
        outline, tap = decoder._outline, decoder._taps.get(index)
        top_k = outline.shape.gate.top_k
        self._top_k = top_k if tap is None else min(top_k, outline.shape.experts_of(index))
        self._index, self._module, self._tap, self._linear = index, decoder._layers[index], tap, outline.family.linear
        self._frame, self._batches = decoder._frame, decoder._batches

    @property
    def is_mixture(self) -> bool:
        """Whether to `tap` the layer; else `forward` runs it."""
        return self._tap is not None

    @torch.no_grad()
    def forward(self, hidden: Tensor, progress: ProgressCallback = no_progress) -> Tensor:
        """Run a dense layer over ``hidden [sequences, length, hidden]``, in place.

        Raises:
            ValueError: the layer is a mixture of experts.
        """
        if self._tap is not None:
            raise ValueError(f"layer {self._index} is a mixture of experts: tap it")
        for rows, output in self._outputs(hidden, progress):
            hidden[rows] = output
        return hidden

    @torch.no_grad()
    def tap(self, hidden: Tensor, progress: ProgressCallback = no_progress) -> Tapped:
        """Run a MoE layer without its routed experts, and keep what these would be given.

        Args:
            hidden: ``[sequences, length, hidden]``; `Tapped.rest` is written over it.

        Memory: as much as ``hidden`` for the inputs, and the indices and values.

        Raises:
            ValueError: the layer is dense.
        """
        if self._tap is None:
            raise ValueError(f"layer {self._index} is dense: there are no experts to tap")
        length, tokens = hidden.shape[1], hidden.shape[0] * hidden.shape[1]
        inputs, value = hidden.new_empty(tokens, hidden.shape[2]), hidden.new_empty(tokens, self._top_k)
        index = torch.empty_like(value, dtype=torch.int64)
        for rows, output in self._outputs(hidden, progress):
            if self._linear:
                hidden[rows] = output
            for target, given in zip((inputs, index, value), self._tap.take(), strict=True):
                target[rows.start * length : rows.stop * length] = given.to(target.device)
        return Tapped(hidden, inputs, index, value)

    @torch.no_grad()
    def answer(self, hidden: Tensor, output: Tensor) -> None:
        """Run a MoE layer over ``hidden``, in place, with ``output [tokens, hidden]`` as that of its routed experts."""
        assert self._tap is not None
        answers = output.reshape(hidden.shape)
        for rows in self._batches(hidden):
            self._tap.answer = answers[rows].to(self._frame.device)
            hidden[rows] = self.run(hidden[rows]).to(hidden.device)
        self._tap.answer = None

    def run(self, batch: Tensor, arguments: Arguments | None = None) -> Tensor:
        """The layer's output to a batch, with the arguments that the model's forward pass hands to it."""
        positional, named = arguments or self._frame.arguments(batch.shape)[self._index]
        output: Any = self._module(batch.to(self._frame.device), *positional, **named)
        if not isinstance(output, Tensor):
            kind = type(self._module).__name__
            raise FamilyError(f"{kind} gives {type(output).__name__}; accepted for calibration text: one tensor")
        return output

    def _outputs(self, hidden: Tensor, progress: ProgressCallback) -> Iterator[tuple[slice, Tensor]]:
        """The sequences of every batch, and the layer's output to them."""
        for rows in self._batches(hidden):
            yield rows, self.run(hidden[rows]).to(hidden.device)
            progress(ProgressEvent("read", amount=rows.stop - rows.start, done=rows.stop, total=len(hidden)))


class _Tap(nn.Module):
    """In the place of the routed experts: keeps what it is given, once, and returns zeros or an answer that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Tensor | None = None
        self._given: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor, index: Tensor, value: Tensor) -> Tensor:
        self._given = inputs, index, value
        return torch.zeros_like(inputs) if self.answer is None else self.answer.view_as(inputs)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        given, self._given = self._given, None
        assert given is not None, "the block did not call its experts"
        return given


def layer_memory(outline: Outline) -> int:
    """Bytes of the largest MoE layer in float32 without its routed experts."""
    sizes = dict.fromkeys(outline.shape.layers, 0)
    for name, file in outline.files.items():
        if (layer := outline.layer_of(name)) in sizes:
            sizes[layer] += 4 * math.prod(outline.tensors[file].shape)
    return max(sizes.values())
