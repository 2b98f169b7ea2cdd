"""torch.compile: no head breaks a graph, and sizes that change cost few compilations."""

import inspect
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from segheads.functional import upsample, upsample_argmax, upsample_cross_entropy
from segheads.heads import HEADS


class Whole(torch.nn.Module):
    """Logits, loss and label map of a head's maps."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, maps, labels):
        loss = self.head.loss(maps, labels, upsample_cross_entropy)
        logits = self.head(maps)
        return logits, loss, upsample_argmax(logits, labels.shape[1:])


def maps_and_labels(multi_level, batch, h, w):
    maps = [torch.randn(batch, 8, h // n, w // n) for n in (1, 2, 4, 8)]
    return maps if multi_level else maps[0], torch.randint(5, (batch, 4 * h, 4 * w))


SOME = ["mask_transformer", "mean_shift"]  # tracing takes long; SEGHEADS_ALL_HEADS=1 takes all


@pytest.mark.parametrize("name", sorted(HEADS) if os.environ.get("SEGHEADS_ALL_HEADS") else SOME)
def test_logits_loss_and_label_map_are_one_graph_for_few_compilations(name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    multi_level, counter = HEADS[name].multi_level, CompileCounter()
    options = {"num_layers": 1} if "num_layers" in inspect.signature(HEADS[name]).parameters else {}  # six trace slowly
    head = HEADS[name]([8] * 4 if multi_level else 8, 5, **options)
    whole = Whole(head.eval())
    compiled = torch.compile(whole, backend=counter, fullgraph=True)
    counts = []
    for batch, h, w in [(2, 16, 16), (3, 16, 16), (3, 24, 32)]:  # another batch, another size
        inputs = maps_and_labels(multi_level, batch, h, w)
        (logits, loss, labels), (*expected, expected_labels) = compiled(*inputs), whole(*inputs)
        torch.testing.assert_close([logits, loss], expected, rtol=1e-4, atol=1e-5)
        best, second = upsample(expected[0], labels.shape[1:]).topk(2, dim=1).values.unbind(1)
        is_clear = best - second > 1e-3
        assert torch.equal(labels[is_clear], expected_labels[is_clear])
        counts.append(counter.frame_count)
    assert all(count <= most for count, most in zip(counts, (1, 2, 3), strict=True)), counts
