"""The losses in pieces against the losses at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training import loss
from training.loss import contrastive_loss, sigmoid_loss


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = out if isinstance(out, (tuple, list)) else [out]
        self.num = max([self.num, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize(("measure", "num_given"), [(contrastive_loss, 3), (sigmoid_loss, 4)])
@pytest.mark.parametrize("most", [100, 1], ids=["pieces of 4 rows, the last of 2", "row by row"])
def test_in_pieces_a_loss_is_the_same_and_its_logits_are_never_all_there(monkeypatch, measure, num_given, most):
    torch.manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(22, 4), dim=1) for _ in range(2)]
    given = [*rows, torch.tensor(10.0), torch.tensor(-3.0)][:num_given]
    found = []
    for limit in (2**26, most):
        monkeypatch.setattr(loss, "MOST_LOGITS", limit)
        leaves = [value.clone().requires_grad_() for value in given]
        with LargestTensor() as largest:
            value = measure(*leaves)
            value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
        assert largest.num == 22 * 22 if limit == 2**26 else largest.num <= max(most, 22 * 4)
    torch.testing.assert_close(found[1], found[0])
