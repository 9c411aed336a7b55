"""Maps the names beside DynamiCrafter's UNet: query transformer, autoencoder, CLIP encoders.

The engine's names are those of diffusers' ``IPAdapterPlusImageProjection`` and ``AutoencoderKL``
and of transformers' ``CLIPTextModelWithProjection`` and ``CLIPVisionModelWithProjection``, so that
the parts open in those libraries and in the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from .names import TensorSource

PROJECTOR, VAE = "image_proj_model.", "first_stage_model."
TEXT, IMAGE = "cond_stage_model.model.", "embedder.model."

# Stored beside the weights and made anew from the variant: the noise schedule, and ``scale_arr``,
# the dynamic rescale.
SCHEDULE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "scale_arr",
}
# Stored and read by nothing: the image encoder's file drags the text half of CLIP along, and
# neither encoder is used for its similarity.
UNUSED = {
    TEXT + "logit_scale",
    IMAGE + "logit_scale",
    IMAGE + "positional_embedding",
    IMAGE + "text_projection",
    IMAGE + "token_embedding.weight",
    IMAGE + "ln_final.weight",
    IMAGE + "ln_final.bias",
}

Named = dict[str, TensorSource]
# A pattern over the name behind the prefix; what it becomes; how the tensor is taken.
Rule = tuple[str, str | tuple[str, ...], str]

PROJECTOR_RULES: tuple[Rule, ...] = (
    (r"latents|(?:proj_in|proj_out|norm_out)\.\w+", r"\g<0>", ""),
    (r"layers\.(\d+)\.0\.norm1\.(\w+)", r"layers.\1.ln0.\2", ""),
    (r"layers\.(\d+)\.0\.norm2\.(\w+)", r"layers.\1.ln1.\2", ""),
    (r"layers\.(\d+)\.0\.to_q\.weight", r"layers.\1.attn.to_q.weight", ""),
    (
        r"layers\.(\d+)\.0\.to_kv\.weight",
        (r"layers.\1.attn.to_k.weight", r"layers.\1.attn.to_v.weight"),
        "",
    ),
    (r"layers\.(\d+)\.0\.to_out\.weight", r"layers.\1.attn.to_out.0.weight", ""),
    (r"layers\.(\d+)\.1\.0\.(\w+)", r"layers.\1.ff.0.\2", ""),
    (r"layers\.(\d+)\.1\.1\.weight", r"layers.\1.ff.1.net.0.proj.weight", ""),
    (r"layers\.(\d+)\.1\.3\.weight", r"layers.\1.ff.1.net.2.weight", ""),
)
# The original numbers the decoder's levels from the finest, diffusers from the coarsest;
# ``_vae_name`` turns "up.N" over afterwards.
VAE_RULES: tuple[Rule, ...] = (
    (r"(?:post_)?quant_conv\.\w+|(?:en|de)coder\.conv_(?:in|out)\.\w+", r"\g<0>", ""),
    (r"((?:en|de)coder)\.norm_out\.(\w+)", r"\1.conv_norm_out.\2", ""),
    (r"((?:en|de)coder)\.mid\.block_1\.((?:norm|conv)[12]\.\w+)", r"\1.mid_block.resnets.0.\2", ""),
    (r"((?:en|de)coder)\.mid\.block_2\.((?:norm|conv)[12]\.\w+)", r"\1.mid_block.resnets.1.\2", ""),
    (
        r"((?:en|de)coder)\.mid\.attn_1\.norm\.(\w+)",
        r"\1.mid_block.attentions.0.group_norm.\2",
        "",
    ),
    (
        r"((?:en|de)coder)\.mid\.attn_1\.([qkv])\.weight",
        r"\1.mid_block.attentions.0.to_\2.weight",
        "matrix",
    ),
    (r"((?:en|de)coder)\.mid\.attn_1\.([qkv])\.bias", r"\1.mid_block.attentions.0.to_\2.bias", ""),
    (
        r"((?:en|de)coder)\.mid\.attn_1\.proj_out\.weight",
        r"\1.mid_block.attentions.0.to_out.0.weight",
        "matrix",
    ),
    (
        r"((?:en|de)coder)\.mid\.attn_1\.proj_out\.bias",
        r"\1.mid_block.attentions.0.to_out.0.bias",
        "",
    ),
    (
        r"encoder\.down\.(\d+)\.block\.(\d+)\.((?:norm|conv)[12]|nin_shortcut)\.(\w+)",
        r"encoder.down_blocks.\1.resnets.\2.\3.\4",
        "",
    ),
    (
        r"encoder\.down\.(\d+)\.downsample\.conv\.(\w+)",
        r"encoder.down_blocks.\1.downsamplers.0.conv.\2",
        "",
    ),
    (
        r"decoder\.up\.(\d+)\.block\.(\d+)\.((?:norm|conv)[12]|nin_shortcut)\.(\w+)",
        r"decoder.up_blocks.\1.resnets.\2.\3.\4",
        "",
    ),
    (
        r"decoder\.up\.(\d+)\.upsample\.conv\.(\w+)",
        r"decoder.up_blocks.\1.upsamplers.0.conv.\2",
        "",
    ),
)


def _clip_layers(there: str) -> tuple[Rule, ...]:
    here = r"transformer\.resblocks\.(\d+)\."
    attention = there + r"encoder.layers.\1.self_attn."
    return (
        (here + r"ln_([12])\.(\w+)", there + r"encoder.layers.\1.layer_norm\2.\3", ""),
        *(
            (
                here + rf"attn\.in_proj_{kind}",
                tuple(f"{attention}{p}_proj.{kind}" for p in "qkv"),
                "",
            )
            for kind in ("weight", "bias")
        ),
        (here + r"attn\.out_proj\.(\w+)", rf"{attention}out_proj.\2", ""),
        (here + r"mlp\.c_fc\.(\w+)", there + r"encoder.layers.\1.mlp.fc1.\2", ""),
        (here + r"mlp\.c_proj\.(\w+)", there + r"encoder.layers.\1.mlp.fc2.\2", ""),
    )


TEXT_RULES: tuple[Rule, ...] = (
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight", ""),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight", ""),
    (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1", ""),
    (r"text_projection", "text_projection.weight", "transposed"),
    *_clip_layers("text_model."),
)
IMAGE_RULES: tuple[Rule, ...] = tuple(
    (r"visual\." + pattern, target, form)
    for pattern, target, form in (
        (r"class_embedding", "vision_model.embeddings.class_embedding", ""),
        (r"positional_embedding", "vision_model.embeddings.position_embedding.weight", ""),
        (r"conv1\.weight", "vision_model.embeddings.patch_embedding.weight", ""),
        # The misspelling is transformers' own.
        (r"ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1", ""),
        (r"ln_post\.(\w+)", r"vision_model.post_layernorm.\1", ""),
        (r"proj", "visual_projection.weight", "transposed"),
        *_clip_layers("vision_model."),
    )
)


def apply_rules(
    keys: Iterable[str],
    prefix: str,
    rules: tuple[Rule, ...],
    finish: Callable[[str], str] = str,
) -> tuple[Named, list[str]]:
    """Engine name -> source for the keys behind ``prefix``, and the keys no rule knows."""
    found: Named = {}
    unknown: list[str] = []
    for key in keys:
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        for pattern, targets, form in rules:
            if match := re.fullmatch(pattern, name):
                split = (targets,) if isinstance(targets, str) else targets
                for piece, target in enumerate(split):
                    source = TensorSource(key, (piece,), len(split), form)
                    found[finish(match.expand(target))] = source
                break
        else:
            unknown.append(key)
    return found, unknown


def plan_projector(keys: Iterable[str], prefix: str) -> tuple[Named, list[str]]:
    """The query transformer."""
    return apply_rules(keys, prefix + PROJECTOR, PROJECTOR_RULES)


def plan_vae(keys: Iterable[str], prefix: str) -> tuple[Named, list[str]]:
    """The autoencoder of Stable Diffusion; another one, such as ToonCrafter's, leaves keys."""
    start = prefix + VAE
    levels = [
        int(m[1]) for k in keys if (m := re.match(re.escape(start) + r"decoder\.up\.(\d+)", k))
    ]
    coarsest = max(levels, default=0)

    def finish(name: str) -> str:
        name = name.replace(".nin_shortcut.", ".conv_shortcut.")
        return re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{coarsest - int(m[1])}", name)

    return apply_rules(keys, start, VAE_RULES, finish)


def plan_text(keys: Iterable[str], prefix: str) -> tuple[Named, list[str]]:
    """OpenCLIP's text half."""
    found, unknown = apply_rules(keys, prefix + TEXT, TEXT_RULES)
    return found, [key for key in unknown if key.removeprefix(prefix) not in UNUSED]


def plan_image(keys: Iterable[str], prefix: str) -> tuple[Named, list[str]]:
    """OpenCLIP's image half."""
    found, unknown = apply_rules(keys, prefix + IMAGE, IMAGE_RULES)
    return found, [key for key in unknown if key.removeprefix(prefix) not in UNUSED]
