"""The decoder of a causal language model, one decoder layer in memory at a time.

Attention, norms, router, shared expert, rotary embedding and masks are those of the transformers class; nothing of them
is written again here.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from .. import models  # noqa: F401  (registers the model types that transformers does not know)
from ..checkpoint.layout import FLOATS
from ..errors import CheckpointError, FamilyError
from ..families import EMBEDDING, HEAD, Config, Family, MoeShape
from ..progress import ProgressCallback, ProgressEvent, no_progress

#: A tensor by its Hub name, on the CPU in its own dtype; KeyError where there is none of that name.
Read = Callable[[str], Tensor]

NORM = "model.norm"
#: Tokens of a batch: enough to keep a processor busy, few enough that activations stay about as large as a layer.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Tapped:
    """A MoE layer without its routed experts. Its true output is ``rest`` plus theirs for the other three.

    Attributes:
        rest: ``[sequences, length, hidden]`` float32, the layer's output without the routed part.
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
        family: Family,
        shape: MoeShape,
        read: Read,
        device: torch.device | str = "cpu",
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        """
        Args:
            config: the content of ``config.json``; it is not changed.
            family: of the model; says where its blocks are.
            shape: of the model; says which layers are mixtures.
            read: never asked for tensors of routed experts.
            device: where layers are held and run; hidden states may lie elsewhere.
            batch_tokens: run at a time, in whole sequences, at least one.

        Raises:
            FamilyError: transformers cannot build this model, or makes other layers mixtures than ``shape`` says.
        """
        model = on_meta(config)
        self._read, self._batch_tokens, self._shape = read, batch_tokens, shape
        self._embedding, self._tied = model.get_input_embeddings().weight.shape, bool(model.config.tie_word_embeddings)
        blocks = [family.block(index) for index in range(model.config.num_hidden_layers)]
        self._taps = _tap_experts([model.get_submodule(block) for block in blocks], shape)
        self._names = [block.rpartition(".")[0] for block in blocks]
        self._layers = [model.get_submodule(name) for name in self._names]
        self._norm = model.get_submodule(NORM)
        self._frame = _Frame(model, torch.device(device))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids ``[sequences, length]`` to hidden states ``[sequences, length, hidden]``, float32 on the device.

        Raises:
            CheckpointError: an id that is not in the vocabulary, or no table as ``config.json`` has it.
        """
        vocabulary, width = self._embedding
        if ids.numel() and int(ids.max()) >= vocabulary:
            raise CheckpointError(f"token id {int(ids.max())}: config.json makes the vocabulary {vocabulary}")
        table = self._tensor(self._embedding, EMBEDDING, *([HEAD] if self._tied else []))
        hidden = torch.empty(*ids.shape, width, device=self._frame.device, dtype=torch.float32)
        for rows, target in zip(ids.to(table.device), hidden, strict=True):  # the table is never converted whole
            target.copy_(nn.functional.embedding(rows, table))
        return hidden

    @contextmanager
    def layer(self, index: int) -> Iterator["DecoderLayer"]:
        """Decoder layer ``index`` with its weights; they go when the ``with`` block is left.

        Raises:
            CheckpointError: a tensor that the layer needs is missing, or has a wrong shape or dtype.
        """
        module = self._layers[index]
        try:
            self._materialise(module, self._names[index])
            tap, top_k = self._taps.get(index), self._shape.top_k
            if tap is not None:
                top_k = min(top_k, self._shape.experts_of(index))
            yield DecoderLayer(index, module, tap, top_k, self._frame, self._batch_tokens)
        finally:
            module.to("meta")

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
        self._materialise(self._norm, NORM)
        head = self._tensor(self._embedding, HEAD, *([EMBEDDING] if self._tied else [])).to(self._frame.device).float()
        means = []
        for hidden in streams:
            losses = [
                nn.functional.cross_entropy(self._norm(row.to(head))[:-1] @ head.T, labels[1:].to(head.device))
                for row, labels in zip(hidden, ids, strict=True)
            ]
            means.append(float(torch.stack(losses).double().mean()))
        self._norm.to("meta")
        return means

    def _materialise(self, module: nn.Module, name: str) -> None:
        weights = {
            key: self._tensor(empty.shape, f"{name}.{key}").to(self._frame.device, torch.float32)
            for key, empty in module.state_dict().items()
        }
        module.load_state_dict(weights, assign=True)

    def _tensor(self, shape: torch.Size, *names: str) -> Tensor:
        """The first of these names that there is."""
        name, tensor = self._find(names)
        if tensor.shape != shape:
            raise CheckpointError(f"tensor {name} is {list(tensor.shape)}; config.json makes it {list(shape)}")
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}; accepted: bfloat16, float16, float32")
        return tensor

    def _find(self, names: tuple[str, ...]) -> tuple[str, Tensor]:
        for name in names:
            try:
                # Detached: a live model's parameter that becomes a layer's weight takes over its requires_grad.
                return name, self._read(name).detach()
            except KeyError:
                continue
        raise CheckpointError(f"tensor {names[0]} is missing; calibration needs it")


class DecoderLayer:
    """A decoder layer that is in memory, lent by `Decoder.layer`. Hidden states are float32, on any device."""

    def __init__(
        self, index: int, module: nn.Module, tap: "_Tap | None", top_k: int, frame: "_Frame", batch_tokens: int
    ) -> None:
        self._index, self._module, self._tap, self._top_k = index, module, tap, top_k
        self._frame, self._batch_tokens = frame, batch_tokens

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
        for _ in self._run(hidden, progress):
            pass
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
        for rows in self._run(hidden, progress):
            for target, given in zip((inputs, index, value), self._tap.take(), strict=True):
                target[rows.start * length : rows.stop * length] = given.to(target.device)
        return Tapped(hidden, inputs, index, value)

    def _run(self, hidden: Tensor, progress: ProgressCallback) -> Iterator[slice]:
        """Write the layer's output over ``hidden``, batch by batch; yields the sequences that were done."""
        count = max(1, self._batch_tokens // max(1, hidden.shape[1]))
        for start in range(0, len(hidden), count):
            rows = slice(start, min(start + count, len(hidden)))
            batch = hidden[rows].to(self._frame.device)
            hidden[rows] = self._module(batch, **self._frame.arguments(batch.shape)[self._index]).to(hidden.device)
            yield rows
            progress(ProgressEvent("read", amount=rows.stop - rows.start, done=rows.stop, total=len(hidden)))


class _Tap(nn.Module):
    """In the place of the routed experts: keeps what it is given, once, and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._given: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor, index: Tensor, value: Tensor) -> Tensor:
        self._given = inputs, index, value
        return torch.zeros_like(inputs)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        given, self._given = self._given, None
        assert given is not None, "the block did not call its experts"
        return given


class _Recorder(nn.Module):
    """In the place of a decoder layer: keeps the arguments that the model hands to it."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden


class _Frame:
    """The model around its layers: what its own forward hands to each of them (masks, rotary embedding, positions)."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device, self._inner = device, model.get_decoder()
        self._recorders = [_Recorder() for _ in self._inner.layers]
        self._inner.layers, self._inner.norm = nn.ModuleList(self._recorders), nn.Identity()
        # Its buffers are in no checkpoint, and on meta they lost their values.
        self._inner.rotary_emb = type(self._inner.rotary_emb)(config=model.config).to(device)
        self._known: dict[torch.Size, list[dict[str, Any]]] = {}

    def arguments(self, shape: torch.Size) -> list[dict[str, Any]]:
        """Those of every layer, for hidden states of ``shape``, on which alone they depend."""
        if shape not in self._known:
            nothing = torch.zeros((), dtype=torch.float32, device=self.device).expand(shape)
            self._inner(inputs_embeds=nothing, use_cache=False)
            self._known[shape] = [recorder.arguments for recorder in self._recorders]
        return self._known[shape]


def layer_memory(hidden: int, shared: int) -> int:
    """Bytes of a decoder layer in float32 without its routed experts. Args: shared, width of the shared expert."""
    return 4 * hidden * (4 * hidden + 3 * shared)


def on_meta(config: Config) -> Any:
    """The causal language model of a configuration, without memory for its weights."""
    try:
        settings = AutoConfig.for_model(**copy.deepcopy(dict(config)))
        with torch.device("meta"):
            # What the configuration names may need packages that are not here.
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:  # what transformers raises is no closed set
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FamilyError(f"config.json: transformers cannot build this model: {reason}") from error
    return model.eval()


def _tap_experts(blocks: list[Any], shape: MoeShape) -> dict[int, _Tap]:
    """Put taps in the place of the routed experts of the MoE layers.

    Raises:
        FamilyError: the layers that have experts are others than ``shape`` says.
    """
    built = tuple(index for index, block in enumerate(blocks) if hasattr(block, "experts"))
    if built != shape.layers:
        raise FamilyError(f"config.json: MoE layers are {list(shape.layers)}; transformers makes them {list(built)}")
    taps = {index: _Tap() for index in built}
    for index, tap in taps.items():
        blocks[index].experts = tap
    return taps
