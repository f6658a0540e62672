"""Which mask belongs to which module, where parts of a model see tokens of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from logra_kernels.capture.batch import Batch
from logra_kernels.capture.layers import Layer, plain_name

# Words in the names of parts that see different tokens.
_SIDES = (
    (("encoder",), ("decoder",)),
    (("text", "language"), ("vision", "visual", "image", "audio")),
    (("question",), ("ctx", "context", "passage")),
)


def most_specific(name: str, keys: Iterable[str]) -> str | None:
    """The key that names the most of a module's name, or None if none of them fits.

    A key fits if its parts ("encoder", "EncDecAttention.k") stand in the name's one after another,
    and the empty key fits every name. The key with the most parts is the most specific, and of two
    with as many, the one that stands nearer to the name's end.
    """
    found = {key: place for key in keys if (place := _place(key, name)) is not None}
    return max(found, key=lambda key: (len(_parts(key)), found[key]), default=None)


def refuse_one_mask(model: nn.Module, layers: Sequence[Layer]) -> None:
    """ValueError if one mask cannot be for all layers, which see the tokens of two parts.

    Two parts side by side see different tokens where their names say so: encoder and decoder, text
    and vision. Modules of a decoder alone do, too: cross-attention sees the encoder's.
    """
    names = [layer.name for layer in layers]
    for path, module in model.named_modules():
        prefix = plain_name(path)
        children = [name for name, _ in module.named_children()]
        for words in _SIDES:
            # The first part of each side, and the first watched module in one of the side's parts.
            sides = [[n for n in children if any(w in n.lower() for w in side)] for side in words]
            within = [tuple(f"{prefix}.{n}.".lstrip(".") for n in side) for side in sides]
            inside = [next((n for n in names if n.startswith(parts)), "") for parts in within]
            if all(sides) and inside[1] and (inside[0] or words == _SIDES[0]):
                one, other = sides[0][0], sides[1][0]
                raise ValueError(
                    f"mask: expected one for each part of a model with {one} and {other}, as "
                    f"{{{one!r}: [N, T] or None, {other!r}: [N, T] or None}}, got one for all; "
                    f"module {inside[1]} is in {other}"
                )


@dataclass(frozen=True)
class _Part:
    """A module that a key names, whose output carries its tokens' mask."""

    module: nn.Module
    batch: Batch


class PartMasks:
    """The masks of a model's parts, {key: [N, T] or None}; None counts every token.

    A module has the mask of the most specific key. Where its input is a tensor that a part of
    another key gave out, as the encoder's output in cross-attention, it has that part's mask,
    unless a key names the module itself.

    Args:
        model: holds the layers and the parts.
        layers: the watched modules.
        num_examples: N.
        masks: {key: mask}.

    Raises: ValueError for a mask that does not fit, a key that names nothing, and a module that
        has two names with different masks (a shared embedding).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        num_examples: int,
        masks: Mapping[str, Any],
    ) -> None:
        if not masks or not all(isinstance(key, str) for key in masks):
            raise ValueError(f"mask: expected {{part of a module's name: mask}}, got {masks!r:.80}")
        batches = {
            key: Batch(num_examples, mask, name=f"mask[{key!r}]") for key, mask in masks.items()
        }
        # A module may have several names; named_modules gives them all.
        paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(plain_name(path))
        names = [name for those in paths.values() for name in those]
        names += [layer.name for layer in layers]
        for key in masks:
            if all(_place(key, name) is None for name in names):
                shown = ", ".join(layer.name for layer in layers[:4])
                raise ValueError(
                    f"mask: no module's name has the parts {key!r}; watched are {shown}"
                    + ", …" * (len(layers) > 4)
                )
        self._num_examples = num_examples
        self._batches: dict[str, Batch | None] = {}  # {layer's name: of its key}
        self._own = set[str]()  # the layers that a key names themselves
        for layer in layers:
            all_names = sorted({layer.name, *paths.get(layer.module, ())})
            keys = {name: most_specific(name, masks) for name in all_names}
            found = {key for key in keys.values() if key is not None}
            if len(found) > 1 and len({id(masks[key]) for key in found}) > 1:
                raise ValueError(
                    f"mask: module {layer.name} has the names {', '.join(all_names)}, for which "
                    "there are different masks; leave it out by name_filter"
                )
            own = next(iter(found), None)
            self._batches[layer.name] = None if own is None else batches[own]
            if own and any(_ends_with(name, own) for name in all_names):
                self._own.add(layer.name)
        self._parts = [
            _Part(module, batches[key])
            for module, those in paths.items()
            for key in masks
            if key and any(_ends_with(name, key) for name in those)
        ]
        self._given_out: list[tuple[Tensor, Batch]] = []

    def parts(self) -> Iterator[tuple[nn.Module, Batch]]:
        """The modules that keys name; `gave_out` is to be told of their outputs."""
        return ((part.module, part.batch) for part in self._parts)

    def gave_out(self, batch: Batch, output: Any) -> None:
        """Remember the tensors that a part gave out."""
        values = output.values() if isinstance(output, Mapping) else output
        tensors = [output] if isinstance(output, Tensor) else values
        if isinstance(tensors, Iterable):
            self._given_out += [(t, batch) for t in tensors if isinstance(t, Tensor)]

    def forget(self) -> None:
        """Let go of the tensors that parts gave out."""
        self._given_out.clear()

    def of(self, layer: Layer, x: Tensor) -> Batch:
        """The batch with the mask of a layer's input.

        Raises: ValueError if no key names the layer, and its input has tokens.
        """
        if layer.name not in self._own:
            for tensor, batch in self._given_out:
                if tensor.data_ptr() == x.data_ptr() and tensor.numel() == x.numel():
                    return batch
        own = self._batches[layer.name]
        if own is not None:
            return own
        plain = Batch(self._num_examples)
        tokens, _ = layer.count_tokens(x, plain)
        if tokens == 1:
            return plain
        raise ValueError(
            f"mask: expected a mask for module {layer.name}, whose input {list(x.shape)} has "
            f"tokens; add one that names it, or {{'': ...}} for all other modules (None: every "
            "token counts)"
        )


def _parts(key: str) -> list[str]:
    return key.split(".") if key else []


def _place(key: str, name: str) -> int | None:
    """Where the parts of a key stand in those of a name, the last place; None: nowhere."""
    parts, own = _parts(key), _parts(name)
    places = range(len(own) - len(parts), -1, -1)
    return next((place for place in places if own[place : place + len(parts)] == parts), None)


def _ends_with(name: str, key: str) -> bool:
    parts = _parts(key)
    return _parts(name)[-len(parts) :] == parts
