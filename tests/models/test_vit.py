import pytest
import torch

from lwfed.models.backbones import build_encoder, load_encoder
from lwfed.models.initial import init_parts


def timm_model(model):
    from timm.models.vision_transformer import VisionTransformer

    token = model.pooling == "token"
    return VisionTransformer(
        img_size=model.image_size,
        patch_size=model.patch_size,
        in_chans=model.channels,
        embed_dim=model.width,
        depth=model.depth,
        num_heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        class_token=token,
        global_pool="token" if token else "avg",
        num_classes=0,
    ).eval()


@pytest.fixture(params=["mean", "token"])
def model(request, tiny):
    return tiny(f"model.pooling={request.param}").model


def pixels():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def scrambled(state):
    """Weights of ordinary size everywhere, so that no term hides behind zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in state.items()}


def test_our_weights_in_timm(model):
    reference = timm_model(model)
    tensors = scrambled(reference.state_dict())
    ours = load_encoder(model, tensors)
    reference.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(pixels()), reference((pixels() - 0.5) / 0.5), atol=1e-5, rtol=0)


def test_weights_of_timm_in_ours(model):
    reference = timm_model(model)
    ours = load_encoder(model, reference.state_dict())
    torch.testing.assert_close(ours(pixels()), reference((pixels() - 0.5) / 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_prefix_and_rest_are_the_whole(model, layers):
    encoder = load_encoder(model, scrambled(timm_model(model).state_dict()))
    prefix = encoder.through(encoder.stem(pixels()), last=layers)
    assert torch.equal(encoder.pool(encoder.through(prefix, layers)), encoder.features(pixels()))


def test_a_skipped_layer_is_the_identity(model):
    encoder = load_encoder(model, scrambled(timm_model(model).state_dict()))
    x = encoder.stem(pixels())
    assert torch.equal(encoder.through(x, skip={1}), encoder.through(encoder.through(x, last=1), 2))
    assert torch.equal(encoder.through(x, skip={0, 1, 2}), x)


def test_hidden_patches_have_no_influence(model):
    encoder = load_encoder(model, scrambled(timm_model(model).state_dict()))
    keep = torch.tensor([[0, 3], [1, 2], [0, 1], [2, 3], [1, 3]])
    painted = pixels()
    for sample, places in enumerate(keep.tolist()):
        for place in {0, 1, 2, 3} - set(places):
            row, column = 4 * (place // 2), 4 * (place % 2)
            painted[sample, :, row : row + 4, column : column + 4] = 0.123
    assert torch.equal(encoder.stem(pixels(), keep), encoder.stem(painted, keep))
    extra = encoder.stem(pixels()).shape[1] - 4
    whole = encoder.stem(pixels())
    for sample, places in enumerate(keep.tolist()):
        assert torch.equal(encoder.stem(pixels(), keep)[sample, extra:], whole[sample, [extra + place for place in places]])


def test_partial_encoder_is_timm_cut_short(model):
    reference = timm_model(model)
    state = scrambled(reference.state_dict())
    reference.load_state_dict(state)
    reference.blocks = reference.blocks[:2]
    ours = load_encoder(model, {name: tensor for name, tensor in state.items() if not name.startswith("blocks.2")})
    torch.testing.assert_close(ours(pixels()), reference((pixels() - 0.5) / 0.5), atol=1e-5, rtol=0)


def test_heads_are_ignored_and_nothing_is_drawn(tiny):
    config = tiny()
    tensors = init_parts(config, config.plan(1).present)
    before = torch.get_rng_state()
    encoder = load_encoder(config.model, tensors)
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder.pos_embed.data_ptr() == tensors["pos_embed"].data_ptr()
    assert not any(tensor.requires_grad for tensor in encoder.parameters())


def test_too_many_layers(tiny):
    with pytest.raises(ValueError, match="cannot have 4 layers"):
        build_encoder(tiny().model, 4)
