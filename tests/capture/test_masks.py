"""Masks of an encoder and a decoder, and of other parts that see tokens of their own."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import IGNORED, autograd_rows, make_layers, ragged_batch

from logra_kernels.capture import Capture
from logra_kernels.capture.masks import most_specific

SOURCE, TARGET = [6, 2, 4], [3, 6, 2]  # lengths; padded, both have six tokens


def refuse(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=41, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model: nn.Module = T5ForConditionalGeneration(config)
    return model.double()


def tiny_bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=41, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=20,
        decoder_ffn_dim=20, encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0,
        max_position_embeddings=16, decoder_start_token_id=2,
    )  # fmt: skip
    model: nn.Module = BartForConditionalGeneration(config)
    return model.double()


def ragged(lengths: list[int], seed: int, width: int = 0) -> tuple[Tensor, Tensor]:
    ids, mask = ragged_batch(41, lengths, "right", seed)
    more = max(width - ids.shape[1], 0)
    return nn.functional.pad(ids, (0, more)), nn.functional.pad(mask, (0, more))


def loss_of(
    model: nn.Module, source: Tensor, source_mask: Tensor, target: Tensor, target_mask: Tensor
) -> Tensor:
    """Next tokens of the target, and all of the encoder's output; padding is not counted."""
    out = model(
        input_ids=source, attention_mask=source_mask, decoder_input_ids=target,
        decoder_attention_mask=target_mask, use_cache=False,
    )  # fmt: skip
    labels = target[:, 1:].masked_fill(target_mask[:, 1:] == 0, IGNORED)
    loss = nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED
    )
    hidden: Tensor = out.encoder_last_hidden_state
    return loss + (hidden.square() * source_mask[..., None]).sum()


def single(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    ones = torch.ones_like(source), torch.ones_like(target)
    return loss_of(model, source, ones[0], target, ones[1])


MODELS = {
    "t5": (tiny_t5, ("shared", "embed_tokens", "relative_attention_bias", "lm_head")),
    "bart": (tiny_bart, ("shared", "embed_tokens", "embed_positions", "lm_head")),
}


@pytest.mark.parametrize("target_width", [6, 8])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_an_encoder_and_a_decoder(name: str, rank: int | None, target_width: int) -> None:
    """Cross-attention's keys see the encoder's tokens, though they are modules of the decoder."""
    make, unwatched = MODELS[name]
    model = make()
    names = [n for n, _ in model.named_modules() if not any(part in n for part in unwatched)]
    layers = make_layers(model, names, rank=rank)
    assert any(
        re.search(r"(EncDecAttention.k|encoder_attn.k_proj)$", layer.name) for layer in layers
    )
    (source, source_mask), (target, target_mask) = (
        ragged(SOURCE, 1),
        ragged(TARGET, 2, target_width),
    )
    masks = {"encoder": source_mask, "decoder": target_mask}
    with Capture(model, layers, 3, masks) as capture:
        loss_of(model, source, source_mask, target, target_mask).backward()
    losses = [
        partial(single, model, source[n : n + 1, : SOURCE[n]], target[n : n + 1, : TARGET[n]])
        for n in range(3)
    ]
    want = autograd_rows(model, layers, losses)
    assert (capture.rows() - want).abs().max() <= 1e-10 * want.abs().max()


def batch_of(name: str, *, target_width: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    model = MODELS[name][0]()
    return model, ragged(SOURCE, 1)[1], ragged(TARGET, 2, target_width)[1]


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("t5", "decoder.block.0.layer.0.SelfAttention.q"),
        ("bart", "model.decoder.layers.0.self_attn.k_proj"),
    ],
)
def test_one_mask_for_an_encoder_and_a_decoder_is_refused(name: str, inside: str) -> None:
    """With equal lengths it would be applied to both."""
    model, mask, _ = batch_of(name)
    layers = [layer for layer in make_layers(model) if ".q" in layer.name or "_proj" in layer.name]
    with refuse(
        "mask: expected one for each part of a model with encoder and decoder, as {'encoder': "
        f"[N, T] or None, 'decoder': [N, T] or None}}, got one for all; module {inside} is in"
    ):
        Capture(model, layers, 3, mask)
    with refuse("mask: expected one for each part of a model with encoder and decoder"):
        Capture(model, layers, 3, cu_seqlens=[0, 1, 2, 3])
    Capture(model, layers, 3)
    encoder = [layer for layer in layers if "encoder." in layer.name]
    assert encoder
    Capture(model, encoder, 3, mask)


@pytest.mark.parametrize(
    ("one", "other"), [("text_model", "vision_model"), ("question_encoder", "ctx_encoder")]
)
def test_one_mask_for_two_towers_is_refused(one: str, other: str) -> None:
    towers = nn.ModuleDict(
        {one: nn.Sequential(nn.Linear(4, 4)), other: nn.Sequential(nn.Linear(4, 4))}
    )
    model = nn.ModuleDict({"model": towers, "head": nn.Linear(4, 4)})
    layers = make_layers(model)
    with refuse(
        f"{one!r}: [N, T] or None, {other!r}: [N, T] or None}}, got one for all; module "
        f"model.{other}.0 is in {other}"
    ):
        Capture(model, layers, 3, torch.ones(3, 2))
    Capture(model, layers, 3)
    Capture(model, layers[:1], 3, torch.ones(3, 2))
    Capture(model, layers[1:], 3, torch.ones(3, 2))


def test_cross_attention_of_a_decoder_that_alone_is_watched() -> None:
    """The encoder's mask is found for its output, though no module of the encoder is watched."""
    model = tiny_t5()
    names = [n for n, _ in model.named_modules() if "decoder" in n and "EncDec" in n]
    layers = make_layers(model, names, rank=3)
    (source, source_mask), (target, target_mask) = ragged(SOURCE, 1), ragged(TARGET, 2)
    with Capture(model, layers, 3, {"encoder": source_mask, "decoder": target_mask}) as capture:
        loss_of(model, source, source_mask, target, target_mask).backward()
    losses = [
        partial(single, model, source[n : n + 1, : SOURCE[n]], target[n : n + 1, : TARGET[n]])
        for n in range(3)
    ]
    want = autograd_rows(model, layers, losses)
    assert (capture.rows() - want).abs().max() <= 1e-10 * want.abs().max()


class TwoSides(nn.Module):
    """Two kinds of tokens, one layer that sees both kinds under two names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.right = nn.ModuleDict({"own": nn.Linear(4, 4), "cross": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor, changed: bool = False) -> Tensor:
        memory = self.left(x).tanh() if changed else self.left(x)
        y = self.right["own"](y).tanh()
        y = y + (y @ memory.transpose(1, 2)).tanh() @ self.right["cross"](memory)
        out: Tensor = self.head(y.sum(1))
        return out


X_MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
Y_MASK = torch.tensor([[1, 0, 0], [1, 1, 1]])


def two_sided_rows(masks: Any, changed: bool = False, token: int = 3) -> Tensor:
    torch.manual_seed(0)
    model = TwoSides().double()
    x, y = torch.randn(2, 3, 4).double(), torch.randn(2, token, 4).double()
    with Capture(model, make_layers(model), 2, masks) as capture:
        model(x, y, changed).exp().sum().backward()
    return capture.rows()


def test_a_tensor_that_a_part_gave_out_keeps_its_mask() -> None:
    both = {"left": X_MASK, "right": Y_MASK}
    told = {**both, "cross": X_MASK}
    got = two_sided_rows(both)
    assert torch.equal(got, two_sided_rows(told))
    assert not torch.equal(got, two_sided_rows({**both, "cross": Y_MASK})), "the user's word counts"
    # After a change on the way nothing shows where it came from: a key says it.
    assert torch.equal(
        two_sided_rows(both, changed=True), two_sided_rows({**both, "cross": Y_MASK}, changed=True)
    )
    assert not torch.equal(two_sided_rows(both, changed=True), two_sided_rows(told, changed=True))


def test_none_counts_every_token_and_the_empty_key_is_for_all_others() -> None:
    ones = torch.ones(2, 3)
    want = two_sided_rows({"left": X_MASK, "right": ones})
    assert torch.equal(two_sided_rows({"left": X_MASK, "right": None}), want)
    assert torch.equal(two_sided_rows({"left": X_MASK, "": None}), want)
    assert torch.equal(two_sided_rows({"": ones}), two_sided_rows(ones))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "mask: expected {part of a module's name: mask}, got {}"),
        ({1: X_MASK}, "mask: expected {part of a module's name: mask}, got {1: "),
        ({"lef": X_MASK}, "mask: no module's name has the parts 'lef'; watched are left.0, left.1, "
                          "right.own, right.cross, …"),
        ({"left": X_MASK[:1]}, "mask['left']: expected shape [N, T] with N = 2 (one row per "
                               "data_id), got [1, 3]"),
        ({"left": X_MASK * 2}, "mask['left']: expected only 0 and 1, got other values"),
        ({"left": X_MASK, "right": torch.ones(2, 4)},
         "mask['right']: expected shape [N, T] = [2, 3] for the tokens of module right.own, got "
         "[2, 4]"),
        ({"left": X_MASK}, "mask: expected a mask for module right.own, whose input [2, 3, 4] has "
                           "tokens; add one that names it, or {'': ...} for all other modules"),
    ],
)  # fmt: skip
def test_masks_of_parts_that_are_refused(masks: Any, message: str) -> None:
    with refuse(message):
        two_sided_rows(masks)


def test_a_module_with_two_names_and_two_masks_is_refused() -> None:
    model = TwoSides().double()
    model.right["cross"] = model.left[1]
    layers = make_layers(model)
    with refuse(
        "mask: module left.1 has the names left.1, right.cross, for which there are different masks"
    ):
        Capture(model, layers, 2, {"left": X_MASK, "right": Y_MASK})
    Capture(model, layers, 2, {"left": X_MASK, "right": X_MASK})


def test_a_mask_does_not_mix_with_packed_sequences() -> None:
    model = TwoSides()
    with refuse("mask: expected None beside packed sequences"):
        Capture(model, make_layers(model), 2, {"": X_MASK}, cu_seqlens=[0, 1, 2])


def test_hooks_on_parts_are_removed() -> None:
    model = TwoSides().double()
    with Capture(model, make_layers(model), 2, {"left": X_MASK, "right": Y_MASK}):
        assert model.left._forward_hooks
        model(torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()).sum().backward()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        (["encoder", "decoder"], "decoder"),
        (["decoder", "decoder.block"], "decoder.block"),
        (["decoder", "EncDecAttention"], "EncDecAttention"),
        (["decoder.block.0", "EncDecAttention.k"], "decoder.block.0"),
        (["", "k"], "k"),
        ([""], ""),
        (["code", "block.1", "k.layer"], None),
        (["1", "0"], "1"),
    ],
)
def test_the_most_specific_key(keys: list[str], want: str | None) -> None:
    assert most_specific("decoder.block.0.layer.1.EncDecAttention.k", keys) == want
