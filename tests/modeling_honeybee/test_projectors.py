# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F

from modeling_honeybee import HoneybeeConfig
from modeling_honeybee.projectors_honeybee import CAbstractorBlock, build_projector
from tests.tiny import PROJECTORS, projector_settings, tiny_model


def config(num_patches=16, vision_width=12, text_width=24, **projector):
    side = math.isqrt(num_patches)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": vision_width,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": side * 14,
        "patch_size": 14,
    }
    text = {"model_type": "llama", "hidden_size": text_width, "num_attention_heads": 4, "num_hidden_layers": 1}
    return HoneybeeConfig(vision, text, projector)


def initialized(config):
    projector = build_projector(config)
    projector.reset_own_parameters()
    return projector.eval()


@pytest.mark.parametrize("num_patches", [16, 64, 256, 576])
@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_shapes(projector_type, num_patches):
    features = torch.randn(2, num_patches, 12)
    sizes = [1, 4, 9, 25, 144, 576, 1024]
    if projector_type in ("linear", "mlp"):
        sizes = [None]
    for num_eos_tokens in (0, 2):
        for size in sizes:
            settings = projector_settings(
                projector_type, hidden_size=16, num_query_tokens=size, num_eos_tokens=num_eos_tokens
            )
            projector = initialized(config(num_patches, **settings))
            before = features.clone()
            with torch.no_grad():
                tokens = projector(features)
            assert tokens.shape == (2, (size or num_patches) + num_eos_tokens, 24)
            assert torch.equal(features, before), "the caller's features were changed"


# Parameters of the official projectors in front of a language model of width 4096 and of 5120.
@pytest.mark.parametrize(
    ("settings", "small", "large"),
    [
        ({"projector_type": "linear"}, 4_198_400, None),
        ({"projector_type": "mlp"}, 20_979_712, None),
        ({"projector_type": "resampler", "num_query_tokens": 64}, 106_142_720, 107_192_320),
        ({"projector_type": "resampler", "num_query_tokens": 576}, 106_667_008, 107_716_608),
        ({"projector_type": "c-abs", "num_query_tokens": 144}, 37_070_336, 47_885_824),
        ({"projector_type": "c-abs", "num_query_tokens": 144, "prenorm": True}, 37_072_384, 47_887_872),
        ({"projector_type": "d-abs", "num_query_tokens": 64}, 55_534_272, 56_911_552),
        ({"projector_type": "d-abs", "num_query_tokens": 144}, 55_616_352, 56_993_632),
        ({"projector_type": "d-abs", "num_query_tokens": 144, "pooled_v_target": "tgt"}, 55_616_352, 56_993_632),
        ({"projector_type": "d-abs", "num_query_tokens": 144, "pooled_v_target": "none"}, 55_763_808, 57_141_088),
        ({"projector_type": "d-abs", "num_query_tokens": 576}, 56_059_584, 57_436_864),
    ],
)
def test_parameter_counts_at_real_size(settings, small, large):
    for expected, patches, text_width in ((small, 256, 4096), (large, 576, 5120)):
        if expected is not None:
            with torch.device("meta"):
                projector = build_projector(config(patches, 1024, text_width, **settings))
            assert sum(p.numel() for p in projector.parameters()) == expected


@pytest.mark.parametrize("in_channels", [8, 12])
def test_c_abstractor_block_against_separate_formulas(in_channels):
    """The block once more, channels first and written with functions only."""
    torch.manual_seed(0)
    block = CAbstractorBlock(in_channels, 8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 7, in_channels)
    w = dict(block.named_parameters())

    def layer_norm(t, name):
        mean = t.mean(1, keepdim=True)
        variance = ((t - mean) ** 2).mean(1, keepdim=True)
        normal = (t - mean) / (variance + 1e-5).sqrt()
        return normal * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def one_by_one(t, name):
        weight = w[f"{name}.weight"][:, :, None, None]
        return F.conv2d(t, weight, w.get(f"{name}.bias"))

    image = x.permute(0, 3, 1, 2)
    y = F.silu(layer_norm(one_by_one(image, "conv1"), "norm1"))
    y = F.silu(layer_norm(F.conv2d(y, w["conv2.weight"], padding=1, groups=8), "norm2"))
    squeezed = F.silu(one_by_one(y.mean((2, 3), keepdim=True), "squeeze_excite.fc1"))
    assert squeezed.shape[1] == round(0.25 * in_channels)
    y = y * torch.sigmoid(one_by_one(squeezed, "squeeze_excite.fc2"))
    y = layer_norm(one_by_one(y, "conv3"), "norm3")
    shortcut = image if in_channels == 8 else layer_norm(one_by_one(image, "shortcut.0"), "shortcut.1")
    torch.testing.assert_close(block(x).permute(0, 3, 1, 2), F.silu(y + shortcut), atol=1e-5, rtol=1e-5)


def test_locality_of_the_c_abstractor():
    """With one visual token a patch and no neighbours to mix (depth 0), token i depends on patch i alone."""
    projector = initialized(config(16, projector_type="c-abs", num_query_tokens=16, depth=0, hidden_size=12))
    features = torch.randn(1, 16, 12, requires_grad=True)
    projector(features)[0, 5].sum().backward()
    touched = features.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == [5]


def test_d_abstractor_targets_differ():
    outputs = {}
    for target in ("query", "tgt"):
        torch.manual_seed(0)
        projector = initialized(
            config(16, projector_type="d-abs", num_query_tokens=4, hidden_size=16, num_hidden_layers=1,
                   num_attention_heads=4, pooled_v_target=target)
        )  # fmt: skip
        outputs[target] = projector(torch.ones(1, 16, 12))
    assert not torch.allclose(outputs["query"], outputs["tgt"])


def test_multi_level_d_abstractor():
    model = tiny_model("d-abs", pooled_v_target="none", config={"vision_feature_layer": [1, 2, -2]})
    pixels = torch.randn(2, 3, 32, 32)
    assert model.model.get_patch_features(pixels).shape == (2, 3, 16, 32)
    assert model.model.get_visual_tokens(pixels).shape == (2, 4, 24)


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_initialization_follows_the_official_model(projector_type):
    """But for the resampler's queries, which start apart instead of at 0."""
    # One wide model, so that the spread of the weights is measured well.
    projector = tiny_model(
        projector_type,
        num_eos_tokens=2,
        pos_emb=True,
        **({} if projector_type in ("linear", "mlp") else {"hidden_size": 128}),
    ).model.projector
    for name, parameter in projector.named_parameters():
        kind = name.split(".")[-1]
        if name == "reference_points":
            centers = {0.25, 0.75}
            assert set(parameter.flatten().tolist()) == centers
            assert parameter[0, 1].tolist() == [0.75, 0.25], "points are (x, y), row by row"
        elif "norm" in name or ("shortcut.1" in name):
            assert (parameter == (1 if kind == "weight" else 0)).all(), name
        elif kind == "bias":
            assert (parameter == 0).all(), name
        elif parameter.numel() >= 500:
            assert 0.015 < parameter.std().item() < 0.025, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_half_precision_follows_float32(projector_type, dtype):
    model = tiny_model(projector_type)
    features = torch.randn(2, 16, 32)
    projector = model.model.projector
    full = projector(features)
    half = projector.to(dtype)(features.to(dtype))
    assert half.dtype == dtype
    assert (half.float() - full).norm() / full.norm() < 2e-2
    half.float().pow(2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in projector.parameters())


@pytest.mark.parametrize("pos_emb", [True, False])
@pytest.mark.parametrize("projector_type", ["resampler", "c-abs", "d-abs"])
def test_gradient_checkpointing_changes_no_gradient(projector_type, pos_emb):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(projector_type, pos_emb=pos_emb, dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.model.get_visual_tokens(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).pow(
            2
        ).sum().backward()
        gradients.append({n: p.grad for n, p in model.model.projector.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
