import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn

from segheads.heads.fcn import FCNHead
from segheads.heads.smp import SmpHead
from segheads.heads.uper import SenUPer, UPerHead

CHANNELS = [8, 12, 16, 20, 24]
SIZES = [(19, 26), (10, 13), (5, 7), (3, 4), (2, 2)]


def make_maps(count, batch=2):
    torch.manual_seed(1)
    return [torch.randn(batch, C, *size) for C, size in zip(CHANNELS[:count], SIZES, strict=False)]


def randomise_norms(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)


def without_gradient(head):
    return [name for name, p in head.named_parameters() if p.grad is None]


@pytest.mark.parametrize("head_class", [UPerHead, SenUPer])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_any_number_of_maps_of_odd_sizes(head_class, count):
    torch.manual_seed(0)
    head, maps = head_class(CHANNELS[:count], 3, channels=8), make_maps(count)
    predictions = head.predictions(maps)
    assert [tuple(p.shape) for p in predictions] == [(2, 3, 19, 26)] * (1 if head_class is UPerHead else count + 1)
    sum(p.square().sum() for p in predictions).backward()
    assert without_gradient(head) == []
    head.eval()
    torch.testing.assert_close(head(maps)[1:], head([level[1:] for level in maps]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.predictions(maps)[0], head(maps))


@pytest.mark.parametrize("head_class", [UPerHead, SenUPer])
def test_maps_of_one_size_and_one_image_train(head_class):
    head = head_class([8, 8, 8], 3, channels=8)
    maps = [torch.randn(1, 8, 2, 2) for _ in range(3)]  # pooled to 1x1 inside
    head(maps).square().sum().backward()
    assert without_gradient(head) == []


def test_parameters_are_those_of_the_paper():
    with torch.device("meta"):
        head = UPerHead([256, 512, 1024, 2048], 150)
        auxiliary = FCNHead(1024, 150)
    resnet50 = 23_508_032
    total = resnet50 + sum(p.numel() for module in (head, auxiliary) for p in module.parameters())
    assert total == pytest.approx(67e6, rel=0.02)


def test_equals_smp():
    torch.manual_seed(0)
    model = smp.UPerNet("resnet18", encoder_weights=None, decoder_channels=16, classes=3).eval()
    randomise_norms(model.decoder)
    images = torch.randn(1, 3, 96, 64)
    maps = model.encoder(images)[2:]
    head = UPerHead([64, 128, 256, 512], 3, channels=16).eval()
    head.decoder.load_state_dict(model.decoder.state_dict())
    head.classifier.load_state_dict(model.segmentation_head[0].state_dict())
    ours = F.interpolate(head(maps), scale_factor=4.0, mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, model(images))
    other = SmpHead([64, 128, 256, 512], 3, decoder="upernet", decoder_channels=16).eval()
    other.decoder.load_state_dict(head.decoder.state_dict())
    other.segmentation_head[0].load_state_dict(head.classifier.state_dict())
    torch.testing.assert_close(other(maps), head(maps))


def test_learners_stand_on_what_upernet_fuses():
    torch.manual_seed(0)
    whole, head = UPerHead(CHANNELS[:4], 3, channels=8).eval(), SenUPer(CHANNELS[:4], 3, channels=8).eval()
    randomise_norms(whole)
    randomise_norms(head)
    head.decoder.load_state_dict(whole.decoder.state_dict(), strict=False)
    maps, seen = make_maps(4), []
    whole.decoder.fusion_block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    whole(maps)
    fused = seen[0].split(8, dim=1)  # fine to coarse, all on the finest grid
    learners = head.ensemble.learners
    received: list[torch.Tensor] = []
    assert [type(learner).__name__ for learner in learners] == ["FCNHead"] * 4
    assert len({learner.classifier.weight.data_ptr() for learner in learners}) == 4  # weights of their own
    for learner in learners:
        learner.register_forward_pre_hook(lambda module, args: received.append(args[0]))
        assert learner.classifier.in_channels == 8
    logits = head.predictions(maps)[1:]
    assert [tuple(level.shape[2:]) for level in received] == SIZES[:4]  # each on its own grid
    for expected, level in zip(fused, received, strict=True):
        torch.testing.assert_close(F.interpolate(level, SIZES[0], mode="bilinear"), expected)
    merged = torch.stack([level.softmax(1) for level in logits]).mean(0).log()
    torch.testing.assert_close(head(maps), merged)
    assert not any("fusion" in name for name, _ in head.named_parameters())


@pytest.mark.parametrize("levels", [[0], [3], [2], [0, 2], [1, 3]])
def test_only_chosen_levels_have_learners_and_nothing_else_is_kept(levels):
    torch.manual_seed(0)
    head, maps = SenUPer(CHANNELS[:4], 3, channels=8, levels=levels), make_maps(4)
    predictions = head.predictions(maps)
    assert len(predictions) == len(levels) + 1
    assert all(p.shape == (2, 3, 19, 26) for p in predictions)
    sum(p.square().sum() for p in predictions).backward()
    assert without_gradient(head) == []
    whole = SenUPer(CHANNELS[:4], 3, channels=8)
    randomise_norms(head)
    assert whole.decoder.load_state_dict(head.decoder.state_dict(), strict=False).unexpected_keys == []
    for level, learner in zip(levels, head.ensemble.learners, strict=True):
        whole.ensemble.learners[level].load_state_dict(learner.state_dict())
    whole.levels = levels
    torch.testing.assert_close(head.eval()(maps), whole.eval()(maps))


def test_merge_and_levels_can_be_changed_on_a_trained_head():
    torch.manual_seed(0)
    head, maps = SenUPer(CHANNELS[:4], 3, channels=8).eval(), make_maps(4)
    logits = head.predictions(maps)[1:]
    head.merge = "product"
    assert head.merge == head.ensemble.merge == "product"
    torch.testing.assert_close(head(maps), torch.stack(logits).log_softmax(2).sum(0).log_softmax(1))
    head.merge, head.levels = "average", [1, 2]
    assert head.levels == head.ensemble.levels == [1, 2]
    torch.testing.assert_close(head(maps), torch.stack(logits[1:3]).softmax(2).mean(0).log())
    with pytest.raises(ValueError, match="no merge is called 'sum'"):
        head.merge = "sum"
    with pytest.raises(ValueError, match=r"levels must be some of .* got \[4\]"):
        head.levels = [4]


@pytest.mark.parametrize(("init", "std"), [("xavier", (2 / (64 + 50)) ** 0.5), ("published", 0.01)])
def test_classifiers_start_as_asked(init, std):
    options = {} if init == "xavier" else {"init": init}
    for head_class in (UPerHead, SenUPer):
        head = head_class([8, 8], 50, channels=64, **options)
        classifiers = [m for name, m in head.named_modules() if name.endswith("classifier")]
        assert len(classifiers) == (1 if head_class is UPerHead else 2)
        for classifier in classifiers:
            assert float(classifier.weight.detach().std()) == pytest.approx(std, rel=0.05)


def test_state_round_trips():
    for head_class in (UPerHead, SenUPer):
        first, second = (head_class(CHANNELS[:3], 3, channels=8) for _ in range(2))
        randomise_norms(first)
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(second.eval()(make_maps(3)), first.eval()(make_maps(3)))


@pytest.mark.parametrize("head_class", [UPerHead, SenUPer])
def test_dropout_is_where_it_should_be(head_class):
    dropouts = [m for m in head_class([8, 8], 3, channels=8, drop_rate=0.3).modules() if isinstance(m, nn.Dropout2d)]
    assert [dropout.p for dropout in dropouts] == [0.3] * (1 if head_class is UPerHead else 2)
    head = head_class([8, 12], 3, channels=8, drop_rate=1.0)
    logits = head.predictions(make_maps(2))[-1]  # of nothing, so that the bias alone is left
    torch.testing.assert_close(logits, torch.zeros_like(logits))


@pytest.mark.parametrize("head_class", [UPerHead, SenUPer])
def test_errors_name_what_is_wrong(head_class):
    with pytest.raises(ValueError, match="UPerNet needs two maps or more; got one, of 8 channels"):
        head_class([8], 3)
    with pytest.raises(ValueError, match="channels must be 1 or more; got 0"):
        head_class([8, 8], 3, channels=0)
    with pytest.raises(ValueError, match=rf"{head_class.__name__} takes a list of maps .* channels \[8, 12\]; got"):
        head_class([8, 12], 3, channels=8)(make_maps(3))
