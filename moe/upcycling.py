"""Dense GPT-2 to MoE GPT-2 (sparse upcycling, Komatsuzaki et al. 2022).

What an expert of width w gets from a dense FFN of H neurons:

- **w = H: a copy**, biases included. With weights that sum to 1 the layer equals the dense one, to rounding.
- **w > H: a widened copy**: neurons repeat cyclically, and what each repeat writes is divided by how often its neuron
  occurs (Net2Net, Chen et al. 2016, §2.2). Exact too.
- **all w = H/G, E and K multiples of G: a split**. Expert r·G + g gets the g-th slice; its down weight (not its bias)
  is scaled by G, and the router's rows are tied within a group, so that a token takes whole groups. Exact.
- **any other w < H: the w neurons that matter most**, and the mean of the others. A neuron's importance is the spread
  of what it writes, std(h_j)·‖down_j‖; what the omitted neurons write on average goes into the bias. Both follow from
  the layer norm before the FFN, without data: a normalised x is taken as standard normal, so a pre-activation is
  N(W_j·β + b_j, ‖γ ⊙ W_j‖²), and mean and spread of the activation are Gauss-Hermite sums. Not exact:
  `upcycling_error` measures by how much.
- **w = 0: nothing**. A null expert takes weight from the mixture, so a layer with one is not exact.

A shared expert gets its own most important neurons and the bias; the experts then share what is left. SwiGLU experts
take silu(1.702·a)/1.702 for gelu(a), which is within 0.021 of it everywhere; so they are not exact either.

Shapes: D model width, H dense neurons, F neurons of an expert, E experts.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from moe.blocks import MoEMLP
from moe.config import MoEGPT2Config
from moe.modeling import MoEGPT2LMHeadModel

QUICK_GELU = 1.702


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFN:
    """A feed-forward network in GPT-2's Conv1D layout: h = act(x·up + up_bias), y = h·down + down_bias.

    `mean_H` and `spread_H` are mean and standard deviation of h under the layer norm before it.
    """

    up_DH: Tensor
    up_bias_H: Tensor
    down_HD: Tensor
    down_bias_D: Tensor
    mean_H: Tensor
    spread_H: Tensor

    @property
    def width(self) -> int:
        return self.up_DH.shape[1]

    def neurons(self, index_F: Tensor, scale_F: Tensor | float = 1.0) -> FFN:
        """The sub-network of these neurons, what they write scaled."""
        scale = torch.as_tensor(scale_F, dtype=self.down_HD.dtype).expand(len(index_F))
        return dataclasses.replace(
            self,
            up_DH=self.up_DH[:, index_F],
            up_bias_H=self.up_bias_H[index_F],
            down_HD=self.down_HD[index_F] * scale[:, None],
            mean_H=self.mean_H[index_F],
            spread_H=self.spread_H[index_F],
        )

    def without_bias(self) -> FFN:
        return dataclasses.replace(self, down_bias_D=torch.zeros_like(self.down_bias_D))

    def by_importance(self) -> Tensor:
        """Neurons, the one whose output varies most first."""
        return (self.spread_H * self.down_HD.norm(dim=1)).argsort(descending=True, stable=True)


@torch.no_grad()
def upcycle(dense: GPT2LMHeadModel, config: MoEGPT2Config, *, noise: float = 0.0, seed: int = 0) -> MoEGPT2LMHeadModel:
    """An MoE model that starts from what a dense one knows.

    Args:
        dense: any GPT-2-family language model.
        config: the model to build; what it says of the architecture must equal `dense.config`.
        noise: relative noise on each expert's up weights (standard deviation over that of the weights). 0 keeps the
            step exact, and then experts of one width are equal: for K ≥ 2 their router has no gradient but that of the
            regularizers until noise or dropout tells them apart. 0.01 is enough.
        seed: of the router's weights and of the noise.

    Raises:
        ValueError: the architectures differ; the line names the key.
    """
    _check_same_architecture(dense, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoEGPT2LMHeadModel(config).to(dense.dtype)
        expected = model.load_state_dict(_shared_state(dense, config), strict=False)
        assert not expected.unexpected_keys, expected.unexpected_keys
        groups = split_factor(config)
        for index in config.moe_layer_indices:
            dense_block = dense.transformer.h[index]
            mlp = model.transformer.h[index].mlp
            _fill(mlp, ffn_of(dense_block), config, noise)
            if groups > 1 and mlp.router.learned:
                rows_ED = mlp.router.gate.weight[::groups]
                mlp.router.gate.weight.copy_(rows_ED.repeat_interleave(groups, dim=0))
    model.generation_config = dense.generation_config
    return model.to(dense.device).train(dense.training)


def split_factor(config: MoEGPT2Config) -> int:
    """G where the configuration splits the FFN into G narrower experts exactly, else 1."""
    widths = set(config.expert_widths)
    if len(widths) != 1 or config.shared_expert_width:
        return 1
    width = widths.pop()
    if width == 0 or config.dense_width % width:
        return 1
    groups = config.dense_width // width
    whole = config.num_experts % groups == 0 and config.num_experts_per_tok % groups == 0
    return groups if whole else 1


def ffn_of(block: GPT2Block) -> FFN:
    """The FFN of a dense block, and what the layer norm before it says of its activations."""
    mlp, gain_D, shift_D = block.mlp, block.ln_2.weight, block.ln_2.bias
    up_DH = mlp.c_fc.weight
    centre_H = shift_D @ up_DH + mlp.c_fc.bias
    scale_H = (gain_D[:, None] * up_DH).norm(dim=0)
    mean_H, spread_H = _moments(mlp, centre_H, scale_H)
    return FFN(
        up_DH=up_DH,
        up_bias_H=mlp.c_fc.bias,
        down_HD=mlp.c_proj.weight,
        down_bias_D=mlp.c_proj.bias,
        mean_H=mean_H,
        spread_H=spread_H,
    )


def _moments(mlp: GPT2MLP, centre_H: Tensor, scale_H: Tensor, points: int = 32) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of act(a), a ~ N(centre, scale²), by Gauss-Hermite quadrature."""
    node_P, weight_P = (torch.as_tensor(v, dtype=centre_H.dtype) for v in np.polynomial.hermite_e.hermegauss(points))
    node_P, weight_P = node_P.to(centre_H.device), (weight_P / weight_P.sum()).to(centre_H.device)
    h_PH = mlp.act(centre_H + scale_H * node_P[:, None])
    mean_H = weight_P @ h_PH
    return mean_H, (weight_P @ (h_PH - mean_H).square()).sqrt()


def narrow_or_widen(ffn: FFN, width: int) -> FFN:
    """The rule for an expert of any width; see the module's docstring."""
    if width >= ffn.width:
        index_F = torch.arange(width, device=ffn.up_DH.device) % ffn.width
        occurs_H = index_F.bincount().to(ffn.down_HD.dtype)
        return ffn.neurons(index_F, 1.0 / occurs_H[index_F])
    order_H = ffn.by_importance()
    kept_F, omitted = order_H[:width].sort().values, order_H[width:]
    mean_D = ffn.mean_H[omitted] @ ffn.down_HD[omitted]
    return dataclasses.replace(ffn.neurons(kept_F), down_bias_D=ffn.down_bias_D + mean_D)


def _fill(mlp: MoEMLP, ffn: FFN, config: MoEGPT2Config, noise: float) -> None:
    groups = split_factor(config)
    if mlp.shared is not None:
        ffn = _fill_shared(mlp.shared, ffn)
    for e, width in enumerate(config.expert_widths):
        if width == 0:
            continue
        if groups > 1:
            index_F = torch.arange(width, device=ffn.up_DH.device) + (e % groups) * width
            expert = ffn.neurons(index_F, float(groups))
        else:
            expert = narrow_or_widen(ffn, width)
        _load(mlp, e, expert, config, noise)


def _fill_shared(shared: GPT2MLP, ffn: FFN) -> FFN:
    """Give the shared expert its neurons and the bias; return the FFN that is left for the others."""
    width = shared.c_fc.weight.shape[1]
    order_H = ffn.by_importance()
    part = ffn.neurons(order_H[:width].sort().values) if width < ffn.width else narrow_or_widen(ffn, width)
    shared.c_fc.weight.copy_(part.up_DH)
    shared.c_fc.bias.copy_(part.up_bias_H)
    shared.c_proj.weight.copy_(part.down_HD)
    shared.c_proj.bias.copy_(part.down_bias_D)
    rest = order_H[width:].sort().values
    if len(rest):
        return ffn.neurons(rest).without_bias()
    return ffn.neurons(order_H, 0.0).without_bias()  # nothing is left: the experts start at zero output


def _load(mlp: MoEMLP, e: int, expert: FFN, config: MoEGPT2Config, noise: float) -> None:
    up_DF = expert.up_DH
    if noise > 0:
        up_DF = up_DF + torch.randn(up_DF.shape).to(up_DF) * (noise * up_DF.std())
    if config.expert_activation == "gelu":
        mlp.experts.load_expert(e, up_DF, expert.up_bias_H, expert.down_HD, expert.down_bias_D)
        return
    # silu(gate)·up with gate = 1.702·a and up = 1/1.702
    one_F = torch.full_like(expert.up_bias_H, 1 / QUICK_GELU)
    mlp.experts.load_expert(
        e,
        torch.zeros_like(up_DF),
        one_F,
        expert.down_HD,
        expert.down_bias_D,
        QUICK_GELU * up_DF,
        QUICK_GELU * expert.up_bias_H,
    )


@torch.no_grad()
def upcycling_error(dense: GPT2LMHeadModel, model: MoEGPT2LMHeadModel, input_ids: Tensor) -> float:
    """Largest |logit difference| over the largest |logit| of the dense model, on these tokens, in evaluation."""
    training = dense.training, model.training
    expected, got = dense.eval()(input_ids).logits, model.eval()(input_ids).logits
    dense.train(training[0])
    model.train(training[1])
    return float((got - expected).abs().max() / expected.abs().max())


def upcycle_checkpoint(
    base: str | os.PathLike[str], out: str | os.PathLike[str], *, noise: float = 0.0, seed: int = 0, **moe: object
) -> MoEGPT2LMHeadModel:
    """Read a dense GPT-2 checkpoint (folder or hub name), write an MoE checkpoint, with its tokenizer if there is one.

    Args:
        base: checkpoint of the GPT-2 family.
        out: folder to write.
        noise, seed: see `upcycle`.
        moe: MoE keys of `MoEGPT2Config`; all else comes from the base.

    Raises:
        ValueError: the base is not a dense GPT-2, or an MoE key is bad; one line.
    """
    found = AutoConfig.from_pretrained(base).model_type
    if found != "gpt2":
        raise ValueError(f"base: expected a dense checkpoint of model_type gpt2, got {found} in {base}")
    dense = GPT2LMHeadModel.from_pretrained(base)
    model = upcycle(dense, moe_config(dense, **moe), noise=noise, seed=seed)
    model.save_pretrained(out)
    if os.path.isdir(base) and not any(name.startswith(("vocab", "tokenizer")) for name in os.listdir(base)):
        return model
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return model


def moe_config(dense: GPT2LMHeadModel, **moe: object) -> MoEGPT2Config:
    """The configuration of a dense model, with MoE keys added."""
    ignored = {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype"}
    base = {key: value for key, value in dense.config.to_dict().items() if key not in ignored}
    return MoEGPT2Config(**(base | moe))


_ARCHITECTURE = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "dense_width",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",  # tied, the head of an untied base would overwrite the embeddings
)


def _check_same_architecture(dense: GPT2LMHeadModel, config: MoEGPT2Config) -> None:
    for key in _ARCHITECTURE:
        own = config.dense_width if key == "dense_width" else getattr(config, key)
        theirs = dense.transformer.h[0].mlp.c_fc.nf if key == "dense_width" else getattr(dense.config, key)
        if own != theirs:
            raise ValueError(f"{key}: expected {theirs!r} as in the dense model, got {own!r}")


def _shared_state(dense: GPT2LMHeadModel, config: MoEGPT2Config) -> dict[str, Tensor]:
    """All of the dense model but the FFNs that become experts."""
    replaced = tuple(f"transformer.h.{index}.mlp." for index in config.moe_layer_indices)
    return {name: value for name, value in dense.state_dict().items() if not name.startswith(replaced)}
