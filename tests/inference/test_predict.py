import weakref

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segheads import create_model
from segheads.classes import Classes
from segheads.errors import ScoresError
from segheads.functional import bilinear
from segheads.inference import predict as functions
from segheads.inference.predict import sliding_window_logits
from segheads.inference.protocol import InferenceProtocol
from segheads.inference.windows import Grid, over_tiles


def with_options(function):
    """The function with its protocol's options given one by one, since tests vary these."""

    def call(*args, **options):
        names = InferenceProtocol.__dataclass_fields__
        protocol = InferenceProtocol(**{name: x for name, x in options.items() if name in names})
        return function(*args, protocol, **{name: x for name, x in options.items() if name not in names})

    return call


average_views, predict_labels, predict_probabilities, predict_with_confidence, predict_uncertainty = (
    with_options(getattr(functions, name))
    for name in (
        "average_views",
        "predict_labels",
        "predict_probabilities",
        "predict_with_confidence",
        "predict_uncertainty",
    )
)


class Recorder:
    """A stand-in model, logits of K classes that depend on the surroundings; it keeps what it was called with."""

    def __init__(self, K: int = 4):
        self.weight = torch.randn(K, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return F.conv2d(images, self.weight, padding=2)


class MemoryUse(TorchDispatchMode):
    """Bytes held by tensors made inside, the most of them at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                self.add(x.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.known.add(address)
        self.now += size
        self.most = max(self.most, self.now)

        def freed() -> None:
            self.known.discard(address)
            self.now -= size

        weakref.finalize(storage, freed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def segmenter_model(file):
    return lambda x: 3 * torch.tanh(F.conv2d(x, file["state.conv.weight"], file["state.conv.bias"], padding=2))


def mmsegmentation_model(file):
    def model(x: Tensor) -> Tensor:
        y = F.conv2d(x, file["state.backbone.conv.weight"], file["state.backbone.conv.bias"], stride=4, padding=2)
        y = F.conv2d(y.tanh(), file["state.decode_head.conv_seg.weight"], file["state.decode_head.conv_seg.bias"])
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)

    return model


@pytest.mark.parametrize("run", ["odd", "rect_crop", "smaller_than_crop", "padded_flip", "exact"])
def test_equals_mmsegmentation_one_view(golden, run):
    file = golden("sliding_window__mmseg")
    config, image, model = file.config["runs"][run], file[f"input.image_{run}"], mmsegmentation_model(file)
    options = {"window": tuple(config["crop_size"]), "stride": tuple(config["stride"])}
    assert_parity(sliding_window_logits(model, image, **options), file[f"output.slide_{run}"])
    if f"output.prob_{run}" in file.all:
        height, width = config.get("img_shape", config["image"])

        def without_padding(x: Tensor) -> Tensor:
            return sliding_window_logits(model, x, **options)[..., :height, :width]

        size, flipped = tuple(config["ori_shape"]), config.get("flip", False)
        rescaled = F.interpolate(without_padding(image), size=size, mode="bilinear", align_corners=False)
        assert_parity(rescaled, file[f"output.slide_rescaled_{run}"])
        assert_parity(average_views(without_padding, [(image, flipped)], size), file[f"output.prob_{run}"][0])
    if f"output.whole_{run}" in file.all:
        assert_parity(
            average_views(model, [(image, False)], image.shape[-2:]), file[f"output.whole_{run}"][0].softmax(0)
        )
        assert torch.equal(predict_labels(model, image), file[f"output.whole_{run}"][0].argmax(0))


def test_equals_mmsegmentation_multi_scale(golden):
    file = golden("sliding_window__mmseg")
    config, model = file.config["multi_scale"], mmsegmentation_model(file)
    options = {"window": tuple(config["crop_size"]), "stride": tuple(config["stride"])}
    views = [(file[f"input.ms_image_{i}"], i % 2 == 1) for i in range(6)]
    probabilities = average_views(model, views, tuple(config["ori_shape"]), **options)
    assert_parity(probabilities, file["output.ms_prob"][0])
    assert torch.equal(probabilities.argmax(0), file["output.ms_pred"])


@pytest.mark.parametrize("run", ["single", "multi", "small", "exact"])
def test_equals_segmenter(golden, run):
    file = golden("sliding_window__segm")
    config, model = file.config["runs"][run], segmenter_model(file)
    size = tuple(config["ori_shape"])
    options = {
        "window": config["window_size"],
        "stride": config["window_stride"],
        "batch_size": config["batch_size"],
        "small_images": "enlarge",
    }
    images = [file[f"input.{run}.image_{i}"] for i in range(len(config["flip_per_image"]))]
    views = list(zip(images, config["flip_per_image"], strict=True))
    assert_parity(average_views(model, iter(views), size, **options), file[f"output.{run}.prob"])
    for i, view in enumerate(views):
        if f"output.{run}.prob_image_{i}" in file.all:
            assert_parity(average_views(model, [view], size, **options), file[f"output.{run}.prob_image_{i}"])
    if config["scales"] == [1.0]:  # the images are the original and its mirror image: ours to make
        flip = len(config["flips"]) == 2
        assert_parity(predict_probabilities(model, images[0], flip=flip, **options), file[f"output.{run}.prob"])
        labels = predict_labels(model, images[0][0], flip=flip, **options)
        assert torch.equal(labels, file[f"output.{run}.prob"].argmax(0))


def test_scales_and_flips_are_the_views_of_the_golden_sizes():
    model, image = Recorder(), noise(3, 31, 43)
    views = []
    for scale, size in ((0.5, (16, 22)), (1.0, (31, 43)), (1.5, (47, 65))):
        scaled = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
        assert size == (int(31 * scale + 0.5), int(43 * scale + 0.5))
        views += [(scaled, False), (scaled.flip(-1), True)]
    expected = average_views(model, views, (40, 50), window=24, stride=18)
    model.shapes.clear()
    actual = predict_probabilities(
        model, image, size=(40, 50), window=24, stride=18, scales=(0.5, 1.0, 1.5), flip=True, batch_size=100
    )
    torch.testing.assert_close(actual, expected)
    assert [shape[-2:] for shape in model.shapes[:2]] == [(16, 22), (16, 22)]
    torch.testing.assert_close(actual.sum(0), torch.ones(40, 50))
    labels = predict_labels(model, image, size=(40, 50), window=24, stride=18, scales=(0.5, 1.0, 1.5), flip=True)
    assert torch.equal(labels, actual.argmax(0))


def test_slow_reference_every_pixel_averages_the_windows_that_see_it():
    model, images = Recorder(), noise(2, 3, 19, 30)
    total, count = torch.zeros(2, 4, 19, 30), torch.zeros(19, 30)
    for top in (0, 5, 7):  # 19 - 12 = 7
        for left in (0, 7, 14, 20):  # 30 - 10 = 20
            total[..., top : top + 12, left : left + 10] += model(images[..., top : top + 12, left : left + 10])
            count[top : top + 12, left : left + 10] += 1
    actual = sliding_window_logits(model, images, window=(12, 10), stride=(5, 7))
    torch.testing.assert_close(actual, total / count)
    for batch_size in (1, 3, 100):
        other = sliding_window_logits(model, images, window=(12, 10), stride=(5, 7), batch_size=batch_size)
        torch.testing.assert_close(other, actual)


def test_windows_are_batched_over_images():
    model = Recorder()
    sliding_window_logits(model, noise(2, 3, 40, 56), window=24, stride=16, batch_size=5)
    assert [shape[0] for shape in model.shapes] == [5, 5, 2]  # 2 images of 2 x 3 windows
    assert {shape[1:] for shape in model.shapes} == {(3, 24, 24)}


@pytest.mark.parametrize(("height", "width"), [(40, 56), (24, 24), (7, 90), (25, 23)])
def test_constant_model_gives_constant(height, width):
    def model(x: Tensor) -> Tensor:
        return torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1).expand(len(x), 3, *x.shape[-2:])

    image = noise(1, 3, height, width)
    expected = torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1).expand(3, height, width)
    torch.testing.assert_close(sliding_window_logits(model, image, window=24, stride=10)[0], expected)
    for small_images in ("shrink_window", "enlarge"):
        options = {"window": 24, "stride": 10, "scales": (0.5, 2.0), "flip": True, "small_images": small_images}
        torch.testing.assert_close(predict_probabilities(model, image, **options), expected.softmax(0))
        assert (predict_labels(model, image, **options) == 1).all()


def test_window_of_the_image_size_or_more_equals_whole():
    model, image = Recorder(), noise(3, 24, 40)
    whole = predict_probabilities(model, image)
    torch.testing.assert_close(whole, model(image[None])[0].softmax(0))
    for window in ((24, 40), 64):
        model.shapes.clear()
        torch.testing.assert_close(predict_probabilities(model, image, window=window, stride=8), whole)
        assert model.shapes == [(1, 3, 24, 40)]


@pytest.mark.parametrize(
    ("image", "window", "seen"),
    [
        ((15, 34), 24, (24, 54)),  # int(34 / 15 * 24)
        ((38, 15), 24, (60, 24)),  # int(60.8)
        ((20, 20), 24, (24, 24)),
        ((30, 60), 24, (30, 60)),
        ((30, 30), (20, 40), (40, 40)),
        ((10, 30), (20, 40), (20, 60)),
    ],
)
def test_enlarge_makes_room_for_the_window(image, window, seen):
    sizes = []

    def model(x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape[-2:]))
        return x

    rectangle = (window, window) if isinstance(window, int) else window
    actual = predict_probabilities(model, noise(3, *image), window=window, small_images="enlarge")
    assert set(sizes) == {rectangle}
    enlarged = F.interpolate(noise(1, 3, *image), size=seen, mode="bilinear") if seen != image else noise(1, 3, *image)
    expected = F.interpolate(enlarged, size=image, mode="bilinear") if seen != image else enlarged
    torch.testing.assert_close(actual, expected[0].softmax(0))


def test_flip_of_a_mirror_symmetric_model_changes_nothing():
    image = noise(3, 20, 30)
    once = predict_probabilities(lambda x: 3 * x, image)
    torch.testing.assert_close(predict_probabilities(lambda x: 3 * x, image, flip=True), once)
    left_to_right = Recorder()
    assert not predict_probabilities(left_to_right, image, flip=True).allclose(
        predict_probabilities(left_to_right, image)
    )
    both = predict_probabilities(left_to_right, image, flip=True)
    mirrored = predict_probabilities(left_to_right, image.flip(-1), flip=True)
    torch.testing.assert_close(mirrored.flip(-1), both)


def test_labels_of_one_view_are_the_most_probable_class():
    model, image = Recorder(), noise(3, 33, 47)
    for options in ({}, {"window": 16, "stride": 9}, {"scales": (1.5,)}, {"size": (50, 20), "window": 20}):
        labels = predict_labels(model, image, **options)
        assert labels.dtype == torch.int64
        assert labels.shape == options.get("size", (33, 47))
        assert torch.equal(labels, predict_probabilities(model, image[None], **options).argmax(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 16, "stride": 9},
        {"size": (50, 20), "window": 20},
        {"scales": (0.5, 1.5), "flip": True, "window": 24, "stride": 18},
        {"flip": True, "small_images": "enlarge", "window": 40},
    ],
)
def test_confidence_is_the_probability_of_the_label(options):
    model, image = Recorder(), noise(3, 33, 47)
    labels, confidence = predict_with_confidence(model, image, **options)
    assert torch.equal(labels, predict_labels(model, image, **options))
    probabilities = predict_probabilities(model, image, **options)
    torch.testing.assert_close(confidence, probabilities.gather(0, labels[None])[0])
    assert ((confidence > 1 / 4) & (confidence <= 1)).all()


def test_confidence_does_not_change_labels_by_rounding():
    logits = torch.tensor([0.0, 1e-9, -5.0]).view(1, 3, 1, 1)  # the softmax of the first two is the same
    assert logits.softmax(1)[0, 0] == logits.softmax(1)[0, 1]
    labels, confidence = predict_with_confidence(lambda x: logits.expand(1, 3, 4, 4), noise(3, 4, 4))
    assert (labels == 1).all()
    torch.testing.assert_close(confidence, torch.full((4, 4), logits.softmax(1).max().item()))


def test_confidence_of_huge_logits():
    logits = torch.tensor([1e4, 1e4 - 1, -1e4]).view(1, 3, 1, 1)
    _, confidence = predict_with_confidence(lambda x: logits.expand(1, 3, 4, 4), noise(3, 4, 4))
    torch.testing.assert_close(confidence, torch.full((4, 4), 0.7310586))


@pytest.mark.parametrize("flip", [False, True])
def test_confidence_takes_no_more_memory_than_probabilities(flip):
    image, most = noise(3, 64, 90), []
    for call in (predict_probabilities, predict_with_confidence):
        with MemoryUse() as memory:
            call(Recorder(150), image, window=24, flip=flip)
        most.append(memory.most)
    maps = 64 * 90 * (8 + 4)  # the labels and confidences themselves
    assert most[1] <= most[0] + 2 * maps


def test_sums_are_float32_and_the_image_and_logits_stay_as_they_were():
    image, kept = noise(1, 3, 20, 30).bfloat16(), {}

    def model(x: Tensor) -> Tensor:
        kept["logits"] = torch.full_like(x, 1.0)
        return kept["logits"]

    before = image.clone()
    assert sliding_window_logits(model, image, window=16, stride=1).dtype == torch.float32
    for window in (None, 16):
        assert predict_probabilities(model, image, window=window, flip=True).dtype == torch.float32
        assert (kept["logits"] == 1).all()
    assert sliding_window_logits(lambda x: x, image.double(), window=16).dtype == torch.float64
    assert torch.equal(image, before)


@pytest.mark.parametrize("size", [None, (80, 100)])
def test_memory_does_not_grow_with_windows_or_views(size, monkeypatch):
    monkeypatch.setattr(bilinear, "TILE_ELEMENTS", 1)  # tiles of 4 rows
    K, H, W, window, batch_size = 150, 64, 90, 24, 2
    image = noise(3, H, W)
    view, result = K * H * W * 4, K * (size or (H, W))[0] * (size or (H, W))[1] * 4
    one_batch = batch_size * (K + 3) * window * window * 4
    most = {}
    for stride, scales, flip in ((24, (1.0,), False), (4, (1.0,), False), (4, (0.9, 1.0), True)):
        model, memory = Recorder(K), MemoryUse()
        bilinear._kept_blocks.cache_clear()
        with memory:
            predict_probabilities(
                model, image, size=size, window=window, stride=stride, batch_size=batch_size, scales=scales, flip=flip
            )
        assert max(shape[0] for shape in model.shapes) == batch_size
        assert len(model.shapes) >= (5 if stride == 24 else 99)
        most[stride, flip] = memory.most
    slack = 20 * 4 * H * W + 5 * K * 4 * 128 * 4  # the image's own copies, weights, counts; a tile and its softmax
    assert abs(most[4, False] - most[24, False]) < 1000
    assert most[4, False] < max(view + one_batch, view + result, 2 * result) + slack
    assert most[4, True] < result + max(view + one_batch, view + result, 2 * result) + slack


PROTOCOLS = [
    {},
    {"size": (70, 33)},
    {"window": 32, "stride": 20},
    {"window": (40, 24), "stride": (24, 9), "size": (100, 61), "batch_size": 3},
    {"window": 96, "stride": 64},
    {"window": 96, "stride": 64, "small_images": "enlarge"},
    {"scales": (0.5, 1.0, 1.75), "flip": True},
    {"window": 32, "stride": 20, "scales": (0.75, 1.25), "flip": True, "size": (50, 77)},
]


@pytest.fixture(scope="module", params=[False, True], ids=["crop", "stretch"])
def model(request):
    torch.manual_seed(0)
    return create_model("test_vit", "linear", 7, pretrained=False, stretch_logits=request.param).eval()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_low_resolution_logits_give_what_full_resolution_gives(model, protocol):
    image = noise(3, 45, 61)  # no multiple of the patch
    expected = predict_probabilities(model.forward, image, **protocol)  # a function: full-resolution logits
    torch.testing.assert_close(predict_probabilities(model, image, **protocol), expected, rtol=1e-5, atol=1e-6)
    best, second = expected.topk(2, dim=0).values
    clear = best - second > 1e-5
    labels, confidence = predict_with_confidence(model, image, **protocol)
    assert clear.float().mean() > 0.99
    assert (labels == expected.argmax(0))[clear].all()
    torch.testing.assert_close(confidence, best, rtol=1e-5, atol=1e-6)
    assert torch.equal(predict_labels(model, image, **protocol), labels)


@pytest.mark.parametrize("protocol", [{}, {"window": 96, "stride": 64}, {"scales": (0.5, 1.0), "flip": True}])
def test_no_map_of_all_classes_is_held(protocol):
    K, H, W = 150, 300, 400
    model, image = create_model("test_vit", "linear", K, pretrained=False).eval(), noise(3, H, W)
    for predict in (predict_labels, predict_with_confidence):
        with MemoryUse() as memory:
            predict(model, image, **protocol)
        assert memory.most < 0.4 * K * H * W * 4


def test_a_compiled_model_is_called():
    model, image = create_model("test_vit", "linear", 5, pretrained=False).eval(), noise(3, 32, 48)
    calls = []
    compiled = torch.compile(model, backend=lambda graph, _: calls.append(graph) or graph.forward)
    assert torch.equal(predict_labels(compiled, image, scales=(1.0,)), predict_labels(model, image))
    assert calls


def scribbled(x):
    """Written to in place, and part of a loss: what a tensor of inference mode refuses."""
    x[x > 2] = 0
    weight = torch.ones(1, requires_grad=True)
    (x * weight).sum().backward()
    return x


def test_results_are_plain_tensors():
    weight, image = torch.ones(1, requires_grad=True), noise(3, 20, 30)
    for options in ({}, {"window": 16}, {"window": 16, "flip": True}, {"scales": (0.5, 1.0)}):
        labels, confidence = predict_with_confidence(lambda x: x * weight, image, **options)
        probabilities = predict_probabilities(lambda x: x * weight, image, **options)
        results = [predict_labels(lambda x: x * weight, image, **options), labels, confidence, probabilities]
        for result in results:
            assert not result.requires_grad
            assert not scribbled(result).is_inference()
    scribbled(sliding_window_logits(lambda x: x * weight, noise(1, 3, 20, 30), window=16))
    scribbled(average_views(lambda x: x * weight, [(image[None], False)], (20, 30)))
    ensemble = create_model("test_resnet", "senformer", 3, pretrained=False)
    for maps in predict_uncertainty(ensemble, image):
        scribbled(maps)
    for model in (ensemble, create_model("test_vit", "linear", 3, pretrained=False)):
        scribbled(predict_labels(model, image, flip=True))
        scribbled(model.predict(image[None]))


EVERY_FUNCTION = {
    "average_views": lambda model, x, **options: average_views(model, [(x[None], False)], (64, 64), **options),
    "labels": predict_labels,
    "probabilities": predict_probabilities,
    "confidence": predict_with_confidence,
    "uncertainty": predict_uncertainty,
    "windows": lambda model, x, **options: sliding_window_logits(model, x[None], window=40),
    "predict": lambda model, x, **options: model.predict(x[None]),
    "predict with uncertainty": lambda model, x, **options: model.predict(x[None], return_uncertainty=True),
}


@pytest.mark.parametrize("function", EVERY_FUNCTION)
def test_evaluation_mode_inside_and_each_parts_own_afterwards(function):
    model, image = create_model("test_resnet", "senformer", 3, pretrained=False), noise(3, 64, 64)
    call = EVERY_FUNCTION[function]
    expected = call(model.eval(), image)
    model.train()
    model.backbone.model.bn1.eval()  # as a user keeps a part
    modes = {name: part.training for name, part in model.named_modules()}
    before = {name: x.clone() for name, x in model.named_buffers()}
    for result, other in zip(call(model, image), expected, strict=True):
        torch.testing.assert_close(result, other)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())


@pytest.fixture(scope="module")
def broken():
    """An ensemble of which a test makes a weight NaN or infinite."""
    return create_model("test_resnet", "senformer", 3, pretrained=False, pyramid_kwargs={"out_channels": 16})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"flip": True}, {"window": 40, "scales": (0.5, 1.0)}])
@pytest.mark.parametrize("function", EVERY_FUNCTION)
def test_scores_that_are_not_finite_are_an_error(broken, function, options, value):
    model = broken
    with torch.no_grad():
        model.backbone.model.conv1[0].weight[0, 0, 0, 0] = value
    with pytest.raises(ScoresError, match="^the model's scores are NaN or infinite, so they name no class"):
        EVERY_FUNCTION[function](model, noise(3, 64, 64), **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"window": 16}, {"flip": True}, {"window": 16, "flip": True}])
def test_one_score_of_any_callable_that_is_not_finite_is_an_error(options, value):
    def model(images):
        logits = images.clone()
        logits[-1, 1, -1, 0] = value
        return logits

    for function in (predict_labels, predict_probabilities, predict_with_confidence):
        with pytest.raises(ScoresError, match="NaN or infinite"):
            function(model, noise(3, 20, 30), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 16, "stride": 17}, r"at most the window \(16, 16\), got \(17, 17\)"),
        ({"window": (16, 8), "stride": (16, 9)}, r"at most the window \(16, 8\), got \(16, 9\)"),
        ({"window": 0}, "window must be positive, got 0"),
        ({"window": (16, -1)}, "window must be positive, got -1"),
        ({"window": 16, "stride": 0}, "stride must be positive, got 0"),
        ({"window": 16, "batch_size": 0}, "batch_size must be positive, got 0"),
        ({"stride": 16}, "a stride needs a window, got stride 16"),
        ({"scales": ()}, "scales must be one number or more, got none"),
        ({"scales": (1.0, 0.0)}, r"scale must be positive, got 0\.0"),
        ({"scales": (-1.0,)}, r"scale must be positive, got -1\.0"),
        ({"size": (0, 4)}, "size must be positive, got 0"),
        ({"small_images": "pad"}, "shrink_window, enlarge, got 'pad'"),
    ],
)
@pytest.mark.parametrize("call", [predict_probabilities, predict_labels, predict_with_confidence])
def test_bad_options_are_explained(call, options, message):
    with pytest.raises(ValueError, match=message):
        call(lambda x: x, noise(3, 20, 30), **options)


def test_bad_tensors_are_explained():
    with pytest.raises(ValueError, match=r"required, got shape \(3, 20, 30\); add a batch"):
        sliding_window_logits(lambda x: x, noise(3, 20, 30), window=16)
    with pytest.raises(ValueError, match=r"one image .* got shape \(2, 3, 20, 30\)"):
        predict_labels(lambda x: x, noise(2, 3, 20, 30))
    with pytest.raises(ValueError, match=r"input's size \(16, 16\), got \(4, 4\); upsample"):
        predict_labels(lambda x: x[..., ::4, ::4], noise(3, 20, 30), window=16)
    with pytest.raises(ValueError, match="at least one view is required, got 0"):
        average_views(lambda x: x, [], (4, 4))


@pytest.fixture(scope="module")
def ensemble():
    torch.manual_seed(0)
    model = create_model("test_vit", "senformer", 5, pretrained=False, pyramid_kwargs={"out_channels": 16}).eval()
    for parameter in model.head.parameters():  # fresh ones leave every learner equally unsure everywhere
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_uncertainty_of_whole_images_is_that_of_the_model(ensemble):
    image = noise(3, 45, 61)
    _, expected = ensemble.predict(image[None], return_uncertainty=True)
    for maps, whole in zip(predict_uncertainty(ensemble, image), expected, strict=True):
        torch.testing.assert_close(maps, whole[0], rtol=1e-4, atol=1e-5)


def test_uncertainty_honours_the_protocol(ensemble):
    image = noise(3, 32, 64)
    parts = [predict_uncertainty(ensemble, image[..., x : x + 32]) for x in (0, 32)]
    flipped = predict_uncertainty(ensemble, image.flip(-1))
    whole = predict_uncertainty(ensemble, image)
    windows = predict_uncertainty(ensemble, image, window=32)
    both = predict_uncertainty(ensemble, image, flip=True)
    assert not windows.entropy.allclose(whole.entropy, atol=1e-4)
    for i in range(3):
        torch.testing.assert_close(windows[i], torch.cat([part[i] for part in parts], -1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[i], (whole[i] + flipped[i].flip(-1)) / 2, rtol=1e-4, atol=1e-5)


def test_uncertainty_needs_learners(model):
    with pytest.raises(ValueError, match="learners, such as senformer; got LinearHead"):
        predict_uncertainty(model, noise(3, 32, 32))


def test_every_module_keeps_its_mode():
    model = create_model("test_vit", "linear", 5, pretrained=False).train()
    model.backbone.eval()
    before = [module.training for module in model.modules()]
    for call in (predict_labels, predict_probabilities, predict_with_confidence):
        call(model, noise(3, 32, 32))
        assert [module.training for module in model.modules()] == before
    assert any(before)
    assert not all(before)


def test_an_image_is_resized_into_the_scale():
    model, image = Recorder(), noise(3, 40, 60)
    resized = F.interpolate(image[None], (20, 30), mode="bilinear", antialias=True)
    expected = predict_probabilities(model, resized, size=(40, 60))
    model.shapes.clear()
    torch.testing.assert_close(predict_probabilities(model, image, scale=(30, 30)), expected)
    assert model.shapes == [(1, 3, 20, 30)]
    assert torch.equal(predict_labels(model, image, scale=(60, 40)), predict_labels(model, image))


def knows_sides(images):
    """A perfect model: class 1 on the left half of what it sees, and 2 on the right."""
    logits = torch.zeros(len(images), 3, *images.shape[2:])
    half = images.shape[3] // 2
    logits[:, 1, :, :half], logits[:, 2, :, half:] = 9, 8
    return logits


@pytest.mark.parametrize("options", [{}, {"scales": (0.5, 1.0)}, {"window": 64}])
def test_paired_classes_change_places_in_mirrored_views(options):
    image, expected = noise(3, 64, 64), torch.ones(64, 64, dtype=torch.long)
    expected[:, 32:] = 2
    mirrored = {"flip": True, "flip_pairs": [(1, 2)], **options}
    labels, confidence = predict_with_confidence(knows_sides, image, **mirrored)
    probabilities = predict_probabilities(knows_sides, image, **mirrored)
    for found in (predict_labels(knows_sides, image, **mirrored), labels, probabilities.argmax(0)):
        assert torch.equal(found, expected)
    assert confidence.min() > 0.6
    assert not torch.equal(predict_labels(knows_sides, image, flip=True, **options), expected)


def test_pairs_are_those_of_the_models_classes():
    model, image = create_model("test_vit", "linear", 3, pretrained=False).eval(), noise(3, 32, 48)
    views = [model(image[None]), model(image[None].flip(-1)).flip(-1)[:, [1, 0, 2]]]
    expected = torch.stack([view.softmax(1) for view in views]).mean(0)[0]
    plain = predict_probabilities(model, image, flip=True)
    model.classes = Classes(("left", "right", "else"), flip_pairs=((0, 1),))
    torch.testing.assert_close(predict_probabilities(model, image, flip=True), expected)
    torch.testing.assert_close(predict_with_confidence(model, image, flip=True)[1], expected.amax(0))
    torch.testing.assert_close(predict_probabilities(model, image, flip=True, flip_pairs=()), plain)
    assert not torch.allclose(plain, expected)


def test_a_mirrored_ensemble_of_one_class_gives_probabilities():
    """Its grid holds probabilities, of which the class and what is not it change places as 1 - p."""
    narrow = {"out_channels": 16}
    model = create_model("test_resnet", "senformer", 1, pretrained=False, loss="bce", pyramid_kwargs=narrow)
    image = noise(3, 64, 64)
    swapped = predict_probabilities(model, image, flip=True, flip_pairs=[(0, 1)])
    plain, mirrored = predict_probabilities(model, image), predict_probabilities(model, image.flip(-1)).flip(-1)
    torch.testing.assert_close(swapped, (plain + 1 - mirrored) / 2)


@pytest.mark.parametrize("size", [(6, 7), (24, 30)])
def test_tiles_may_be_changed_and_logits_stay(size):
    """Also where a grid has the image's size, and its logits are the scores."""
    views = [Grid(torch.randn(3, 6, 7), 6, 7), Grid(torch.randn(3, 4, 5), 4, 5)]
    before, seen = [view.logits.clone() for view in views], []

    def use(at, each):
        first, second = each
        seen.append((first.clone(), second.clone()))
        first.zero_(), second.zero_()

    over_tiles(views, size, use)
    for number, view in enumerate(views):
        assert torch.equal(view.logits, before[number])
        expected = F.interpolate(before[number][None], size, mode="bilinear")[0].transpose(0, 1)
        torch.testing.assert_close(seen[0][number], expected)
