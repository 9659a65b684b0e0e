"""How many files a reader passes from a public function to its gradient and back."""

import torch

from etpo.kernels import linear_kl
from tests.kernels.problems import files_passed, tensor


def test_a_divergence_and_its_gradient_pass_seven_files():
    for frozen in (False, True):
        hidden, weight = tensor(5, 8), tensor(31, 8).requires_grad_(not frozen)
        reference = torch.randn(5, 8).double(), torch.randn(31, 8).double()
        passed = files_passed(lambda h=hidden, w=weight, r=reference: linear_kl(h, w, *r).sum().backward())
        assert "losses.py" in passed
        assert len(passed) <= 7, passed
