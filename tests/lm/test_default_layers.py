"""The layers that are logged by default, on random models of many architectures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_lm import make_tokenizer
from torch import Tensor, nn

from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.lm.layers import called_on_every_token, default_layers, patterns
from logra_kernels.projection import ProjectionSpec

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {**SMALL, "num_attention_heads": 2, "intermediate_size": 32}
GROUPED: dict[str, Any] = {**HEADS, "num_key_value_heads": 1}
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
# {name: (configuration, its arguments, the layers by default)}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": (
        "LlamaConfig",
        HEADS,
        "model.layers.*.mlp.down_proj, model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj",
    ),
    "gpt2": ("GPT2Config", GPT, "transformer.h.*.mlp.c_fc, transformer.h.*.mlp.c_proj"),
    "gpt-neox": (
        "GPTNeoXConfig",
        HEADS,
        "gpt_neox.layers.*.mlp.dense_*h_to_h, gpt_neox.layers.*.mlp.dense_h_to_*h",
    ),
    "opt": (
        "OPTConfig",
        {**HEADS, "ffn_dim": 32, "word_embed_proj_dim": 8},
        "model.decoder.layers.*.fc*",
    ),
    "bart": (
        "BartConfig",
        {
            "vocab_size": 64,
            "d_model": 16,
            "decoder_layers": 2,
            "decoder_ffn_dim": 32,
            "decoder_attention_heads": 2,
        },
        "model.decoder.layers.*.fc*",
    ),
    "ctrl": ("CTRLConfig", {**GPT, "dff": 32}, "transformer.h.*.ffn.*"),
    "mamba": (
        "MambaConfig",
        {**SMALL, "state_size": 4},
        "backbone.layers.*.mixer.in_proj, backbone.layers.*.mixer.out_proj,"
        " backbone.layers.*.mixer.x_proj",
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            **GROUPED,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "num_experts": 4,
        },
        "model.layers.*.mlp.shared_expert.down_proj, model.layers.*.mlp.shared_expert.gate_proj,"
        " model.layers.*.mlp.shared_expert.up_proj, model.layers.*.mlp.shared_expert_gate",
    ),
    "mixtral": (
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4},
        "model.layers.*.self_attn.k_proj, model.layers.*.self_attn.o_proj,"
        " model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj",
    ),
}


def model_of(kind: str) -> CausalLM:
    name, arguments, _ = MODELS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return CausalLM(model.eval(), make_tokenizer(), kind, "float32", {})


@pytest.mark.parametrize("kind", list(MODELS))
def test_default_layers_and_their_rows(kind: str) -> None:
    """Rows equal a batch-of-one autograd loop: 1e-4 of a module's largest element covers the
    rounding of two float32 passes, about 1e-6 each for sums of this size."""
    lm = model_of(kind)
    notes: list[str] = []
    names = lm.linear_modules(note=notes.append)
    if kind in ("mixtral", "qwen2-moe") and transformers.__version__.startswith("4."):
        # Each expert has layers of its own there, beside a router.
        assert names
        assert not [name for name in names if ".experts." in name]
    else:
        assert patterns(names) == MODELS[kind][2]
    if kind == "mamba":
        assert notes == [
            "left out: backbone.layers.*.mixer.dt_proj: not called on every token (an expert, or a"
            " layer whose weight is used without it)"
        ]
    elif kind == "mixtral" or ".experts." in "".join(notes):
        assert len(notes) == 1
    else:
        assert notes == []

    lengths = (9, 5)
    examples = [Example(str(n), "", "", tuple(range(3, 3 + n)), 1) for n in lengths]
    gradients = LMGradients(lm, names, ProjectionSpec(rank=4))
    rows = gradients.rows(examples)
    projections = gradients.watched.projections
    for row, example in zip(rows, examples, strict=True):
        lm.model.zero_grad()
        lm.summed_loss(lm.collate([example])).backward()
        for module, part in zip(
            gradients.modules, gradients.watched.layout.split(row[None]), strict=True
        ):
            weight = lm.model.get_submodule(module.name).weight
            assert isinstance(weight.grad, Tensor)
            transposed = type(lm.model.get_submodule(module.name)).__name__ == "Conv1D"
            dense = weight.grad.T if transposed else weight.grad
            p = projections[module.name]
            # A side that is not larger than the rank is not projected.
            dense = dense if p.proj_out is None else p.proj_out @ dense
            dense = dense if p.proj_in is None else dense @ p.proj_in.T
            assert (part[0] - dense.flatten()).abs().max() <= 1e-4 * dense.abs().max() + 1e-7


def test_names_of_t5() -> None:
    """An encoder and a decoder, whose feed-forward layers have names of their own."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8
    )
    names, note = default_layers(transformers.T5ForConditionalGeneration(config))
    sides = ("decoder", "encoder")
    wanted = [f"{s}.block.*.layer.*.DenseReluDense.{w}" for s in sides for w in ("wi", "wo")]
    assert (patterns(names), note) == (", ".join(wanted), "")


class Experts(nn.Module):
    """Blocks with a layer for all tokens, and two experts that share the tokens."""

    def __init__(self, blocks: Callable[[list[nn.Module]], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 4)
        parts = {"shared": nn.Linear(4, 4), "router": nn.Linear(4, 2)}
        experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers = blocks([nn.ModuleDict({**parts, "experts": experts})])

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        (block,) = self.layers.children()
        assert isinstance(block, nn.ModuleDict)
        x = block["shared"](input=x)
        half = (block["router"](x).argsort(dim=1)[:, 0] + torch.arange(len(x))) % 2 == 0
        experts = block["experts"]
        assert isinstance(experts, nn.ModuleList)
        return torch.cat([experts[0](x[half]), experts[1](x[~half])])


def test_experts_are_left_out() -> None:
    model = Experts(nn.ModuleList)
    lm = CausalLM(model, None, "experts", "float32", {})
    notes: list[str] = []
    assert lm.linear_modules(note=notes.append) == ["layers.0.shared", "layers.0.router"]
    assert notes[0].startswith("left out: layers.*.experts.*: not called on every token (an exp")
    with pytest.raises(ValueError, match=r"modules: none can be logged: layers\.\*\.experts\.\*"):
        lm.linear_modules(["experts"])


def test_a_model_without_blocks() -> None:
    model = Experts(lambda blocks: nn.Sequential(*blocks))
    for experts in model.layers.children():
        assert isinstance(experts, nn.ModuleDict)
        experts["experts"] = nn.Sequential(nn.Linear(4, 4))
    names, note = default_layers(model)
    assert names == ["layers.0.shared", "layers.0.router", "layers.0.experts.0"]
    assert note == "the model has no list of blocks: all its linear layers are logged"


def test_a_model_without_weights_is_not_tried() -> None:
    with torch.device("meta"):
        model = Experts(nn.ModuleList)
    assert called_on_every_token(model, {"layers.0.shared"}) == {"layers.0.shared"}
